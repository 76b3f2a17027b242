//! System instructions in loops: kernel entry and exit, flags, interrupt windows, bits of memory.
//! What the interpreter comes to is what compiled code must come to.

use std::time::Duration;

use skerry_x86cpu::sys::state::{DescriptorTable, cr4, efer};
use skerry_x86cpu::testing::{CODE, DATA, STACK, TABLES, TestCpu};

use crate::machine::{ALIAS, Deadline, GDT, IDT, TUNINGS, gate, machine, run_to_halt};
use crate::{apic, assemble};

/// What must agree: the general registers, RFLAGS, the low vector registers, and memory.
fn state(t: &TestCpu) -> (Vec<u64>, u64, Vec<u8>) {
    (
        t.cpu.gpr[..16].to_vec(),
        t.cpu.rflags_full(),
        t.read(DATA, 0x40000),
    )
}

/// Runs to HLT in every way: all must come to the same.
fn agree(what: &str, code: &[u8], set_up: impl Fn(&mut TestCpu)) {
    let mut expected = None;
    for (name, tuning) in TUNINGS {
        let _deadline = Deadline::new(format!("{what} ({name})"), Duration::from_secs(60));
        let mut t = machine(1, tuning);
        t.write(CODE, code);
        set_up(&mut t);
        run_to_halt(&mut t.cpu, name);
        let state = state(&t);
        let expected = expected.get_or_insert_with(|| state.clone());
        assert_eq!(expected.0, state.0, "{what} ({name}): registers");
        assert_eq!(expected.1, state.1, "{what} ({name}): flags");
        assert!(expected.2 == state.2, "{what} ({name}): memory");
    }
}

#[test]
fn flags_come_and_go() {
    // Each image: TF and RF excepted, which are others' to test; AC without CR0.AM.
    let code = assemble!(
        "mov ebp, 400",
        "xor r8d, r8d",
        "2:",
        "mov rbx, 1",
        "3:",
        "mov rax, rbx",
        "xor rax, rbp",
        "and eax, 0x244ed5",
        "push rax",
        "popfq",
        "pushfq",
        "setc dl",
        "seto dh",
        "pop rcx",
        "cld",
        "pushfq",
        "pop rsi",
        "rol r8, 7",
        "xor r8, rcx",
        "add r8, rsi",
        "add r8, rdx",
        "pushfq",
        "add r8, [rsp]",
        "add rsp, 8",
        "push 2",
        "popfq",
        "shl rbx, 1",
        "bt rbx, 22",
        "jnc 3b",
        "dec ebp",
        "jnz 2b",
        "cli",
        "hlt",
    );
    agree("flags", code, |_| {});
}

/// AH to BH where a REX prefix has to be: beside memory, and beside registers that the compiler has
/// elsewhere.
#[test]
fn second_bytes() {
    let code = assemble!(
        "mov ebx, {data}",
        "mov r12, 0x9e3779b97f4a7c15",
        "mov ebp, 5000",
        "xor r8d, r8d",
        "2:",
        "imul r12, r12, 0x5851f42d",
        "add r12, 0x14057b7",
        "mov rax, r12",
        "mov rcx, r12",
        "ror rcx, 19",
        "mov rdx, r12",
        "ror rdx, 37",
        "movzx esi, bh",
        "mov [rbx + rsi], ah",
        "mov [rbx + 2*rsi + 1], ch",
        "mov dh, [rbx + rsi]",
        "add ah, [rbx + 2*rsi + 1]",
        "adc r8, rax",
        "sub [rbx + 7], dh",
        "movzx edi, byte ptr [rbx + 7]",
        "cmp ch, [rbx + rsi]",
        "adc r8, rdi",
        "movzx ecx, ah",
        "add r8, rcx",
        "mov rcx, r12",
        "movsx edi, ch",
        "xor ch, dh",
        "setp ch",
        "add r8, rcx",
        "xchg cl, ch",
        "xchg al, ah",
        "xchg ch, ah",
        "xchg dh, [rbx + 9]",
        "lock xadd [rbx + 11], ch",
        "cmpxchg [rbx + 12], dh",
        "adc r8, rax",
        "cmpxchg ch, dl",
        "adc r8, rcx",
        "mov cl, 3",
        "rol ch, cl",
        "sar dh, cl",
        "shl byte ptr [rbx + 13], cl",
        "rcr ch, 1",
        "adc r8, rcx",
        "mov ch, 0x5a",
        "neg ch",
        "inc dh",
        "mul ch",
        "adc r8, rax",
        "rol r8, 7",
        "xor r8, rdx",
        "test ch, 0x24",
        "setz bh",
        "and ebx, {mask}",
        "or ebx, {data}",
        "sub ebp, 1",
        "jnz 2b",
        "cli",
        "hlt";
        data = const DATA,
        mask = const DATA | 0x1ff,
    );
    agree("second bytes", code, |_| {});
}

/// Words around the middle of a region, by numbers of bits up to 2^18 either way.
#[test]
fn bits_of_memory() {
    macro_rules! bits {
        ($index64:literal, $index32:literal) => {
            assemble!(
                "mov ebx, {middle}",
                "mov rbp, 0x9e3779b97f4a7c15",
                "mov r14d, 6000",
                "xor r8d, r8d",
                "2:",
                "imul rbp, rbp, 0x5851f42d",
                "add rbp, 0x14057b7",
                "mov r9, rbp",
                "shl r9, 13",
                "sar r9, 46",
                concat!("mov ", $index64, ", r9"),
                "cmp rbp, r14",
                concat!("bt qword ptr [rbx], ", $index64),
                "adc r8, 3",
                concat!("bts qword ptr [rbx + 4], ", $index64),
                "pushfq",
                "pop rax",
                "xor r8, rax",
                concat!("lock btc dword ptr [rbx - 3], ", $index32),
                "adc r8, 5",
                concat!("btr dword ptr [rbx + 8*r14], ", $index32),
                "adc r8, r8",
                concat!("bt dword ptr fs:[rbx], ", $index32),
                "adc r8, 7",
                concat!("lock btr qword ptr [rsp - 0x8000], ", $index64),
                "adc r8, 9",
                concat!("btc qword ptr [rbx - 0x7f8], ", $index64),
                "rcl r8, 1",
                "dec r14d",
                "jnz 2b",
                "cli",
                "hlt";
                middle = const DATA + 0x20000,
            )
        };
    }
    let set_up = |t: &mut TestCpu| {
        t.cpu.gpr[4] = DATA + 0x20000 + 0x8000;
        t.cpu.seg_base[4] = 0x180;
        t.cpu.sys.segments[4].base = 0x180;
    };
    agree("bits by RSI", bits!("rsi", "esi"), set_up);
    agree("bits by RCX", bits!("rcx", "ecx"), set_up);
    agree("bits by R11", bits!("r11", "r11d"), set_up);
    agree("bits by R15", bits!("r15", "r15d"), set_up);
}

/// An index so large that it leads to where nothing is: a fault each time, on the instruction.
#[test]
fn bits_of_no_memory() {
    let code = assemble!(
        "mov ebx, {data}",
        "mov ebp, 200",
        "mov rsi, -1",
        "shr rsi, 1",
        "2:",
        "xor rsi, rbp",
        "cmp esi, ebp",
        "bts qword ptr [rbx], rsi",
        "nop",
        "dec ebp",
        "jnz 2b",
        "cli",
        "hlt";
        data = const DATA,
    );
    agree("far bits", code, |t| {
        t.write(CODE + 0x3000, SKIP);
        gate(t, 13, CODE + 0x3000);
        gate(t, 14, CODE + 0x3000);
    });
}

/// Several aligned accesses by one pointer, which are looked up together: where they are aligned, over
/// the ends of pages, and where they aren't, so that each of them faults.
#[test]
fn aligned_together() {
    let code = assemble!(
        "mov esi, {data}",
        "mov ebp, 3000",
        "2:",
        "imul rax, rbp, 0x5851f42d",
        "mov [rsi + 8*rbp], rax",
        "movq xmm0, rax",
        "pshufd xmm1, xmm0, 0x1b",
        "dec ebp",
        "jnz 2b",
        "mov ebp, 4096",
        "3:",
        "lea rbx, [rsi + 2*rbp + 0x60]",
        "test ebp, 31",
        "jz 4f",
        "and ebx, -16",
        "4:",
        "and ebx, -8",
        "movaps xmm2, [rbx - 0x40]",
        "movaps xmm3, [rbx - 0x20]",
        "movaps [rbx - 0x30], xmm3",
        "movaps xmm4, [rbx + 0x10]",
        "paddq xmm0, xmm2",
        "pxor xmm1, xmm4",
        "movaps [rbx + 0x20], xmm0",
        "movaps [rbx + 0x30], xmm1",
        "mov eax, [rbx + 0x25]",
        "add r8, rax",
        "dec ebp",
        "jnz 3b",
        "cli",
        "hlt";
        data = const DATA + 0x800,
    );
    agree("aligned", code, |t| {
        t.write(CODE + 0x3000, SKIP);
        gate(t, 13, CODE + 0x3000);
    });
}

/// A handler of #GP and #PF: counts them with the flags, and goes on four bytes on.
const SKIP: &[u8] = &[
    // add r13, [rsp + 24]; inc r12; add qword ptr [rsp + 8], 4; add rsp, 8; iretq
    0x4c, 0x03, 0x6c, 0x24, 0x18, 0x49, 0xff, 0xc4, 0x48, 0x83, 0x44, 0x24, 0x08, 0x04, 0x48, 0x83,
    0xc4, 0x08, 0x48, 0xcf,
];

const KERNEL: u64 = ALIAS + CODE + 0x2000;
/// What GS points at in the kernel: its stack, and room for the user's.
const PER_CPU: u64 = ALIAS + DATA + 0x1000;

/// A kernel in the pages from [`ALIAS`] on, which users can't reach, and SYSCALL to it; SMAP and SMEP
/// are on. The processor starts in the kernel at [`CODE`]'s alias.
fn kernel(t: &mut TestCpu, entry: &[u8]) {
    for n in 0..2u64 {
        let entry = n << 21 | 0x83;
        t.write(TABLES + 0x2000 + (16 + n) * 8, &entry.to_le_bytes());
    }
    t.write(KERNEL - ALIAS, entry);
    let cpu = &mut t.cpu;
    cpu.sys.gdt = DescriptorTable {
        base: ALIAS + GDT,
        limit: 0x17,
    };
    cpu.sys.idt = DescriptorTable {
        base: ALIAS + IDT,
        limit: 0xfff,
    };
    cpu.sys.efer |= efer::SCE;
    cpu.sys.msr.star = 0x10 << 48 | 8 << 32;
    cpu.sys.msr.lstar = KERNEL;
    cpu.sys.msr.fmask = 0x47700;
    cpu.sys.msr.kernel_gs_base = 0x1234;
    cpu.seg_base[5] = PER_CPU;
    cpu.sys.segments[5].base = PER_CPU;
    cpu.sys.cr4 |= cr4::SMAP | cr4::SMEP;
    cpu.update_mode();
    cpu.tlb_flush_all();
    cpu.rip = ALIAS + CODE;
    cpu.gpr[4] = ALIAS + STACK;
    t.write(PER_CPU - ALIAS, &(ALIAS + STACK).to_le_bytes());
}

/// From the kernel to the user's code behind it, and its loop: RBX is data, R12 counts down.
fn user() -> &'static [u8] {
    assemble!(
        "lea rcx, [rip + 5f]",
        "sub rcx, {alias}",
        "mov r11d, 0x202",
        "mov ebx, {data}",
        "mov r12d, 3000",
        "xor r8d, r8d",
        "swapgs",
        "sysretq",
        "5:",
        "mov esp, {stack}",
        "mov r10, 77",
        "movq xmm1, r12",
        "2:",
        "mov eax, 5",
        "cmp r12, rbx",
        "syscall",
        "adc r8, rax",
        "pushfq",
        "pop rcx",
        "xor r8, rcx",
        "rol r8, 5",
        "paddq xmm2, xmm1",
        "test r12b, 7",
        "jnz 3f",
        "vpaddq ymm3, ymm2, ymm1",
        "movq rcx, xmm3",
        "add r8, rcx",
        "3:",
        "inc r10",
        "dec r12d",
        "jnz 2b",
        "xor eax, eax",
        "syscall";
        alias = const ALIAS,
        data = const DATA,
        stack = const STACK - 0x1000,
    )
}

#[test]
fn kernel_entry_and_exit() {
    let entry = assemble!(
        "swapgs",
        "mov gs:[8], rsp",
        "mov rsp, gs:[0]",
        "push qword ptr gs:[8]",
        "push rcx",
        "push r11",
        "clac",
        "sti",
        "test eax, eax",
        "jz 4f",
        // The user's page is out of reach, within it, and out of it again.
        "stac",
        "mov rdx, [rbx]",
        "add [rbx + 8], rdx",
        "inc qword ptr [rbx]",
        "clac",
        "pushfq",
        "pop rax",
        "mov rcx, cr3",
        "add rax, rcx",
        "mov edx, ss",
        "add rax, rdx",
        "bts qword ptr [rsp - 64], rax",
        "test r12b, 15",
        "jnz 2f",
        "mov rdx, [rbx]",
        "nop",
        "paddq xmm2, xmm2",
        "2:",
        "cli",
        "pop r11",
        "pop rcx",
        "pop rsp",
        "swapgs",
        "sysretq",
        "4:",
        "pop r11",
        "pop rcx",
        "pop rsp",
        "cli",
        "hlt",
    );
    agree("syscalls", user(), |t| {
        kernel(t, entry);
        // MOV RDX, [RBX] and NOP make four bytes; the fault is counted where the user has nothing.
        t.write(CODE + 0x3000, SKIP_R14);
        gate(t, 14, ALIAS + CODE + 0x3000);
    });
}

/// add r14, [rsp]; add qword ptr [rsp + 8], 4; add rsp, 8; iretq
const SKIP_R14: &[u8] = &[
    0x4c, 0x03, 0x34, 0x24, 0x48, 0x83, 0x44, 0x24, 0x08, 0x04, 0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf,
];

/// The user writes the kernel's code, which it has a mapping of its own of, and the kernel the
/// user's; each between two system calls.
#[test]
fn code_changes_across_privileges() {
    let entry = assemble!(
        "swapgs",
        "test eax, eax",
        "jz 4f",
        ".byte 0xb8",
        "2:",
        ".long 0",
        // The constant in the user's code.
        "mov edx, {own}",
        "stac",
        "add dword ptr [rdx], 3",
        "clac",
        "swapgs",
        "sysretq",
        "4:",
        "cli",
        "hlt";
        own = const CODE + 0x800 + 1,
    );
    let start = assemble!(
        "mov ecx, {user}",
        "mov r11d, 0x202",
        "mov ebx, {kernels}",
        "mov r12d, 500",
        "xor r8d, r8d",
        "swapgs",
        "sysretq";
        user = const CODE + 0x800,
        // Behind SWAPGS, TEST, JZ and the opcode.
        kernels = const CODE + 0x2000 + 3 + 2 + 2 + 1,
    );
    let user = assemble!(
        "3:",
        ".byte 0xb8",
        ".long 1",
        "mov ebp, eax",
        "syscall",
        "add r8, rax",
        "rol r8, 3",
        "add r8, rbp",
        "add dword ptr [rbx], 7",
        "dec r12d",
        "jnz 3b",
        "xor eax, eax",
        "syscall",
    );
    agree("changing code", start, |t| {
        kernel(t, entry);
        t.write(CODE + 0x800, user);
    });
}

/// An interrupt that waits is delivered past the instruction behind STI, and not past the next.
#[test]
fn the_shadow_of_sti() {
    let code = assemble!(
        "mov r12d, 400",
        "2:",
        "cli",
        "xor ebx, ebx",
        "test r12b, 3",
        "jz 3f",
        // To itself, vector 0x41.
        "mov ecx, 0x83f",
        "mov eax, 0x41",
        "xor edx, edx",
        "wrmsr",
        "3:",
        "inc ebx",
        "sti",
        "inc ebx",
        "inc ebx",
        "cli",
        "inc ebx",
        "sti",
        "sti",
        "inc ebx",
        "inc ebx",
        "dec r12d",
        "jnz 2b",
        "cli",
        "hlt",
    );
    let handler = apic::handler(assemble!("rol r8, 3", "add r8, rbx"));
    let code = [apic::enable(), code].concat();
    agree("STI", &code, |t| {
        t.write(CODE + 0x3000, &handler);
        gate(t, 0x41, CODE + 0x3000);
    });
}
