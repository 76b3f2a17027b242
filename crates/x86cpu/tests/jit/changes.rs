//! Code that changes under way, by the processor that runs it.

use skerry_x86cpu::testing::{CODE, DATA};

use crate::assemble;
use crate::machine::{ALIAS, TUNINGS, each_way, machine, run_to_halt};

fn rax(expected: u64) -> impl Fn(&skerry_x86cpu::testing::TestCpu, &str) {
    move |t, name| assert_eq!(t.cpu.gpr[0], expected, "{name}")
}

#[test]
fn a_loop_patches_its_own_immediate() {
    let code = assemble!(
        "xor ecx, ecx",
        "xor eax, eax",
        "2:",
        "inc ecx",
        "mov [rip + 3f + 1], ecx",
        "3:",
        "mov edx, 0x11111111",
        "add rax, rdx",
        "cmp ecx, 100000",
        "jne 2b",
        "hlt",
    );
    each_way(code, rax(100_000 * 100_001 / 2));
}

#[test]
fn the_running_block_patches_what_it_has_run() {
    // At the end of a block, its beginning.
    let code = assemble!(
        "xor ecx, ecx",
        "xor eax, eax",
        "2:",
        "mov edx, 1",
        "add rax, rdx",
        "inc ecx",
        "lea rsi, [rip + 2b]",
        "mov [rsi + 1], ecx",
        "cmp ecx, 20000",
        "jne 2b",
        "hlt",
    );
    // 1, then 1, 2, 3 …
    each_way(code, rax(1 + 19_999 * 20_000 / 2));
}

#[test]
fn the_next_instruction_becomes_another() {
    // ADD EAX, EDX (0x01) and SUB EAX, EDX (0x29) in turn; then JZ (0x74) and JNZ (0x75) over
    // ADD RDI, 1, behind a comparison that says zero.
    let code = assemble!(
        "xor ecx, ecx",
        "mov eax, 1000000",
        "xor edi, edi",
        "2:",
        "mov edx, 3",
        "mov ebx, ecx",
        "and ebx, 1",
        "imul ebx, ebx, 0x28",
        "inc ebx",
        "mov [rip + 3f], bl",
        "3:",
        ".byte 0x01, 0xd0",
        "mov ebx, ecx",
        "shr ebx, 1",
        "and ebx, 1",
        "add ebx, 0x74",
        "cmp ecx, ecx",
        "mov [rip + 4f], bl",
        "4:",
        ".byte 0x74, 0x04",
        // ADD RDI, 1
        ".byte 0x48, 0x83, 0xc7, 0x01",
        "inc ecx",
        "cmp ecx, 10001",
        "jne 2b",
        "hlt",
    );
    each_way(code, |t, name| {
        assert_eq!(t.cpu.gpr[0], 1_000_003, "{name}: one more ADD than SUB");
        // Two of four rounds go on: rounds 2 and 3 of each.
        assert_eq!(t.cpu.gpr[7], 5000, "{name}");
    });
}

#[test]
fn through_an_alias() {
    // The same loop, but the store goes to the page's other address; before it, one that doesn't
    // touch code but the same page.
    let code = assemble!(
        "xor ecx, ecx",
        "xor eax, eax",
        "lea rsi, [rip + 3f + 1]",
        "add rsi, {alias}",
        "2:",
        "inc ecx",
        "mov [rsi + 0x400], ecx",
        "mov [rsi], ecx",
        "3:",
        "mov edx, 0x11111111",
        "add rax, rdx",
        "cmp ecx, 30000",
        "jne 2b",
        "hlt";
        alias = const ALIAS,
    );
    each_way(code, rax(30_000 * 30_001 / 2));
}

#[test]
fn by_strings_vectors_and_locked_instructions() {
    // A function of MOV EAX, n; RET is copied, compared-and-exchanged and stored as a vector.
    let code = assemble!(
        "xor r8d, r8d",
        "mov ebx, {function}",
        "mov r9d, 3000",
        "2:",
        // As a vector: b8 n n n n c3
        "mov rax, 0xc300000000b8",
        "mov rdx, r9",
        "shl rdx, 8",
        "or rax, rdx",
        "movq xmm0, rax",
        "movups [rbx], xmm0",
        "call rbx",
        "add r8, rax",
        // By XADD: n + 1
        "mov ecx, 1",
        "lock xadd [rbx + 1], ecx",
        "call rbx",
        "add r8, rax",
        // By REP MOVSB from a copy of n + 7
        "mov rax, [rbx]",
        "add rax, 0x600",
        "mov [rbx + 0x100], rax",
        "lea rsi, [rbx + 0x100]",
        "mov rdi, rbx",
        "mov ecx, 8",
        "rep movsb",
        "call rbx",
        "add r8, rax",
        // By PUSH: MOV EAX, 9; RET
        "mov rax, 0xc300000009b8",
        "mov rbp, rsp",
        "lea rsp, [rbx + 8]",
        "push rax",
        "mov rsp, rbp",
        "call rbx",
        "add r8, rax",
        "dec r9",
        "jnz 2b",
        "mov rax, r8",
        "hlt";
        function = const CODE + 0x2340,
    );
    let sum: u64 = (1..=3000).map(|n: u64| n + (n + 1) + (n + 7) + 9).sum();
    each_way(code, rax(sum));
}

#[test]
fn an_instruction_across_pages() {
    // MOV EAX, imm32 with its immediate in the next page, which changes.
    let code = assemble!(
        "xor r8d, r8d",
        "mov r9d, 5000",
        "mov ebx, {function}",
        "mov byte ptr [rbx], 0xb8",
        "mov byte ptr [rbx + 5], 0xc3",
        "2:",
        "mov [rbx + 1], r9d",
        "call rbx",
        "add r8, rax",
        "mov byte ptr [rbx + 4], 1",
        "call rbx",
        "shr rax, 24",
        "add r8, rax",
        "dec r9",
        "jnz 2b",
        "mov rax, r8",
        "hlt";
        function = const CODE + 0x3000 - 3,
    );
    each_way(code, rax(5000 * 5001 / 2 + 5000));
}

#[test]
fn the_host_changes_code() {
    for (name, tuning) in TUNINGS {
        let mut t = machine(1, tuning);
        t.write(
            CODE,
            assemble!("2:", "mov eax, 0", "add rdi, rax", "hlt", "jmp 2b"),
        );
        let mut sum = 0;
        for n in 0..2000u32 {
            t.write(CODE + 1, &n.to_le_bytes());
            sum += u64::from(n);
            run_to_halt(&mut t.cpu, name);
            t.cpu.rip = CODE;
            t.cpu.sys.activity = Default::default();
            assert_eq!(t.cpu.gpr[7], sum, "{name}");
        }
    }
}

#[test]
fn data_among_code() {
    // A counter between two blocks of a loop, in their granule and in others.
    let code = assemble!(
        "mov ecx, 50000",
        "2:",
        "inc dword ptr [rip + 4f]",
        "jmp 3f",
        "4:",
        ".long 0",
        "3:",
        "inc qword ptr [rip + 5f]",
        "add dword ptr [rip + 6f], 2",
        "dec ecx",
        "jnz 2b",
        "mov eax, [rip + 4b]",
        "add rax, [rip + 5f]",
        "add eax, [rip + 6f]",
        "hlt",
        ".balign 64",
        "5:",
        ".quad 0",
        ".zero 500",
        "6:",
        ".long 0",
    );
    each_way(code, rax(4 * 50_000));
}

#[test]
fn code_that_writes_code_that_is_run_once() {
    // A generator: each round writes a new function behind the last, and calls it.
    let code = assemble!(
        "mov ebx, {area}",
        "xor r8d, r8d",
        "xor ecx, ecx",
        "2:",
        "mov byte ptr [rbx], 0xb8",
        "mov [rbx + 1], ecx",
        "mov byte ptr [rbx + 5], 0xc3",
        "call rbx",
        "add r8, rax",
        "add rbx, 16",
        "inc ecx",
        "cmp ecx, 60000",
        "jne 2b",
        "mov rax, r8",
        "hlt";
        area = const DATA,
    );
    each_way(code, rax(59_999 * 60_000 / 2));
}
