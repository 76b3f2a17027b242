//! Linear addresses that come to mean other code or data.

use skerry_x86cpu::sys::state::cr4;
use skerry_x86cpu::testing::{CODE, TABLES, TestCpu};

use crate::assemble;
use crate::machine::{TUNINGS, gate, machine, run_to_halt};

/// The page that is mapped to [`A`] or [`B`], and one behind it that jumps there.
const PAGE: u64 = 0x300_0000;
const A: u64 = 0x31_0000;
const B: u64 = 0x32_0000;
const C: u64 = 0x33_0000;
/// Page table of the first address space, and tables of a second.
const PT: u64 = 0x30_0000;
const ROOT2: u64 = 0x34_0000;
const PT2: u64 = ROOT2 + 0x3000;
const HANDLER: u64 = CODE + 0x3000;
const FAULTS: u64 = 0x5_0000;
const ROUNDS: u64 = 3000;

fn set_up(t: &TestCpu) {
    let put = |at: u64, value: u64| t.write(at, &value.to_le_bytes());
    let index = PAGE >> 21 & 511;
    put(TABLES + 0x2000 + 8 * index, PT | 7);
    put(PT, A | 7);
    put(PT + 8, C | 7);
    // The second address space: the same but for the page.
    put(ROOT2, (ROOT2 + 0x1000) | 7);
    put(ROOT2 + 0x1000, (ROOT2 + 0x2000) | 7);
    let directory = t.read(TABLES + 0x2000, 4096);
    t.write(ROOT2 + 0x2000, &directory);
    put(ROOT2 + 0x2000 + 8 * index, PT2 | 7);
    put(PT2, B | 7);
    put(PT2 + 8, C | 7);
    // 1, after a loop; 100.
    t.write(
        A,
        assemble!("mov ecx, 3", "2:", "dec ecx", "jnz 2b", "mov eax, 1", "ret"),
    );
    t.write(B, assemble!("mov eax, 100", "ret"));
    // JMP to the page's beginning.
    t.write(C, &[0xe9, 0xfb, 0xef, 0xff, 0xff]);
}

fn each(code: &[u8], set: impl Fn(&mut TestCpu), expected: u64) {
    for (name, tuning) in TUNINGS {
        // Entered indirectly, and by a direct jump from another page.
        for entry in [PAGE, PAGE + 0x1000] {
            let mut t = machine(1, tuning);
            set_up(&t);
            t.write(CODE, code);
            set(&mut t);
            t.cpu.gpr[6] = entry;
            t.cpu.gpr[9] = ROUNDS;
            run_to_halt(&mut t.cpu, name);
            assert_eq!(t.cpu.gpr[8], expected, "{name}, entered at {entry:x}");
        }
    }
}

/// Puts the roots of both address spaces into R12 and R13: with `pcid` to be switched to without a flush,
/// under process-context identifiers.
fn two_spaces(pcid: bool) -> impl Fn(&mut TestCpu) {
    move |t| {
        t.cpu.gpr[12] = TABLES;
        t.cpu.gpr[13] = ROOT2;
        if pcid {
            t.cpu.sys.cr4 |= cr4::PCIDE;
            t.cpu.update_mode();
            t.cpu.gpr[12] |= 1 | 1 << 63;
            t.cpu.gpr[13] |= 2 | 1 << 63;
        }
    }
}

#[test]
fn entry_changed_and_invalidated() {
    let code = assemble!(
        "xor r8d, r8d",
        "2:",
        "mov qword ptr [{pt}], {a}",
        "invlpg [{page}]",
        "call rsi",
        "add r8, rax",
        "call rsi",
        "add r8, rax",
        "mov qword ptr [{pt}], {b}",
        "invlpg [{page}]",
        "call rsi",
        "add r8, rax",
        "dec r9",
        "jnz 2b",
        "hlt";
        pt = const PT,
        a = const A | 7,
        b = const B | 7,
        page = const PAGE,
    );
    each(code, |_| {}, ROUNDS * 102);
}

#[test]
fn address_spaces_in_turn() {
    let code = assemble!(
        "xor r8d, r8d",
        "2:",
        "mov cr3, r12",
        "call rsi",
        "add r8, rax",
        "mov cr3, r13",
        "call rsi",
        "add r8, rax",
        "dec r9",
        "jnz 2b",
        "hlt",
    );
    for pcid in [false, true] {
        each(code, two_spaces(pcid), ROUNDS * 101);
    }
}

#[test]
fn more_address_spaces_than_are_kept() {
    // Twelve identifiers in turn, every other one with the second tables; now and then one is flushed.
    const CONTEXTS: u64 = 12;
    const ROOTS: u64 = 0x5_1000;
    let code = assemble!(
        "xor r8d, r8d",
        "xor r13d, r13d",
        "2:",
        "mov r12, [{roots} + r13 * 8]",
        "test r9d, 63",
        "jnz 3f",
        "btr r12, 63",
        "3:",
        "mov cr3, r12",
        "call rsi",
        "add r8, rax",
        "inc r13",
        "cmp r13, {contexts}",
        "jne 4f",
        "xor r13d, r13d",
        "4:",
        "dec r9",
        "jnz 2b",
        "hlt";
        roots = const ROOTS,
        contexts = const CONTEXTS,
    );
    each(
        code,
        |t| {
            t.cpu.sys.cr4 |= cr4::PCIDE;
            t.cpu.update_mode();
            for n in 0..CONTEXTS {
                let root = if n % 2 == 0 { TABLES } else { ROOT2 };
                t.write(ROOTS + 8 * n, &(root | (n + 1) | 1 << 63).to_le_bytes());
            }
        },
        ROUNDS / 2 * 101,
    );
}

#[test]
fn so_many_address_spaces_that_their_numbers_come_again() {
    // The first one is left as soon as it has run the page, and the second one gets its number.
    let code = assemble!(
        "xor r8d, r8d",
        "mov r9d, 4090",
        "2:",
        "mov cr3, r12",
        "call rsi",
        "add r8, rax",
        "call rsi",
        "add r8, rax",
        "mov ecx, r9d",
        "3:",
        "mov cr3, r12",
        "dec ecx",
        "jnz 3b",
        "mov cr3, r13",
        "call rsi",
        "add r8, rax",
        "inc r9d",
        "cmp r9d, 4096",
        "jne 2b",
        "hlt",
    );
    each(code, two_spaces(false), 6 * 102);
}

#[test]
fn another_address_space_is_changed() {
    // While in the first, the second one's entry changes; INVPCID says so.
    let code = assemble!(
        "xor r8d, r8d",
        "sub rsp, 16",
        "mov qword ptr [rsp], 2",
        "mov qword ptr [rsp + 8], {page}",
        "2:",
        "mov cr3, r12",
        "call rsi",
        "add r8, rax",
        "xor qword ptr [{pt2}], {both}",
        "xor eax, eax",
        "invpcid rax, [rsp]",
        "mov cr3, r13",
        "call rsi",
        "add r8, rax",
        "dec r9",
        "jnz 2b",
        "hlt";
        page = const PAGE,
        pt2 = const PT2,
        both = const A ^ B,
    );
    // The second is A and B in turn.
    each(code, two_spaces(true), ROUNDS + ROUNDS / 2 * 101);
}

/// The page goes, or loses a right; the handler counts and gives it back.
fn faulting(entry: u64, code: &[u8], set: impl Fn(&mut TestCpu), error: u64) {
    let handler = assemble!(
        "inc qword ptr [{faults}]",
        "pop r14",
        "mov [{faults} + 8], r14",
        "mov qword ptr [{pt}], {good}",
        "invlpg [{page}]",
        "iretq";
        faults = const FAULTS,
        pt = const PT,
        good = const A | 7,
        page = const PAGE,
    );
    for (name, tuning) in TUNINGS {
        let mut t = machine(1, tuning);
        set_up(&t);
        t.write(CODE, code);
        t.write(HANDLER, handler);
        gate(&t, 14, HANDLER);
        t.cpu.gpr[6] = PAGE;
        t.cpu.gpr[9] = ROUNDS;
        t.cpu.gpr[10] = entry;
        set(&mut t);
        run_to_halt(&mut t.cpu, name);
        assert_eq!(t.read_u64(FAULTS), ROUNDS, "{name}: faults");
        assert_eq!(t.read_u64(FAULTS + 8), error, "{name}: error code");
    }
}

#[test]
fn code_that_goes() {
    let code = assemble!(
        "xor r8d, r8d",
        "2:",
        "call rsi",
        "mov [{pt}], r10",
        "invlpg [{page}]",
        "call rsi",
        "add r8, rax",
        "dec r9",
        "jnz 2b",
        "hlt";
        pt = const PT,
        page = const PAGE,
    );
    // Absent (with EFER.NXE, fetches say so), and not to be executed.
    faulting(0, code, |_| {}, 0x10);
    faulting(A | 7 | 1 << 63, code, |_| {}, 0x11);
}

#[test]
fn data_that_goes() {
    let store = assemble!(
        "mov edi, {page} + 0x800",
        "2:",
        "mov [rdi], r9",
        "mov [{pt}], r10",
        "invlpg [{page}]",
        "mov [rdi], r9",
        "cmp [rdi], r9",
        "jne 3f",
        "dec r9",
        "jnz 2b",
        "hlt",
        "3: ud2";
        pt = const PT,
        page = const PAGE,
    );
    faulting(0, store, |_| {}, 2);
    faulting(A | 5, store, |_| {}, 3);
    let push = assemble!(
        "mov rbp, rsp",
        "2:",
        "mov esp, {page} + 0x800",
        "push r9",
        "pop rax",
        "mov [{pt}], r10",
        "invlpg [{page}]",
        "pop rax",
        "push rax",
        "mov rsp, rbp",
        "dec r9",
        "jnz 2b",
        "hlt";
        pt = const PT,
        page = const PAGE,
    );
    // The handler's frame needs a stack of its own: IST 1.
    faulting(0, push, with_own_stack, 0);
    let load = assemble!(
        "mov edi, {page} + 0x800",
        "2:",
        "movups xmm0, [rdi]",
        "mov rax, [rdi]",
        "mov [{pt}], r10",
        "invlpg [{page}]",
        "mov rax, [rdi]",
        "add rax, [rdi + 8]",
        "movups xmm0, [rdi]",
        "dec r9",
        "jnz 2b",
        "hlt";
        pt = const PT,
        page = const PAGE,
    );
    faulting(0, load, |_| {}, 0);
}

fn with_own_stack(t: &mut TestCpu) {
    const TSS: u64 = 0x4000;
    t.write(TSS + 0x24, &(0x1_f000u64).to_le_bytes());
    t.cpu.sys.tr = skerry_x86cpu::sys::state::Segment {
        selector: 0x18,
        base: TSS,
        limit: 0x67,
        attributes: 0x8b,
        unusable: false,
    };
    let at = crate::machine::IDT + 16 * 14 + 4;
    t.write(at, &[1]);
}

/// A page whose last instruction goes on in the next one, which is [`E`] or [`F`]; and again, with the
/// other behind it. Its end is jumped to from within the page.
const D: u64 = 0x35_0000;
const E: u64 = 0x36_0000;
const F: u64 = 0x37_0000;
const ACROSS: u64 = PAGE + 0x2ff0;
const AGAIN: u64 = PAGE + 0x4ff0;
/// What it leaves in EAX.
const WITH_E: u64 = 0x1_0010;
const WITH_F: u64 = 0x2_0010;

fn set_up_across(t: &TestCpu) {
    for (table, pages) in [(PT, [D, E, D, F]), (PT2, [D, F, D, E])] {
        for (n, page) in pages.into_iter().enumerate() {
            t.write(table + 16 + 8 * n as u64, &(page | 7).to_le_bytes());
        }
    }
    // JMP to where MOV EAX, imm32 begins, and that; RET.
    t.write(D + 0xff0, &[0xeb, 0x0b]);
    t.write(D + 0xffd, &[0xb8, 0x10, 0]);
    t.write(E, &[1, 0, 0xc3]);
    t.write(F, &[2, 0, 0xc3]);
}

fn each_across(code: &[u8], set: impl Fn(&mut TestCpu), expected: u64) {
    for (name, tuning) in TUNINGS {
        let mut t = machine(1, tuning);
        set_up(&t);
        set_up_across(&t);
        t.write(CODE, code);
        set(&mut t);
        t.cpu.gpr[9] = ROUNDS;
        t.cpu.gpr[6] = ACROSS;
        t.cpu.gpr[7] = AGAIN;
        run_to_halt(&mut t.cpu, name);
        assert_eq!(t.cpu.gpr[8], expected, "{name}");
    }
}

#[test]
fn across_pages_under_two_addresses() {
    let code = assemble!(
        "xor r8d, r8d",
        "2:",
        "call rsi",
        "add r8, rax",
        "call rsi",
        "add r8, rax",
        "call rdi",
        "add r8, rax",
        "dec r9",
        "jnz 2b",
        "hlt",
    );
    each_across(code, |_| {}, ROUNDS * (2 * WITH_E + WITH_F));
}

#[test]
fn across_pages_that_are_mapped_anew() {
    let code = assemble!(
        "xor r8d, r8d",
        "2:",
        "call rsi",
        "add r8, rax",
        "mov qword ptr [{pt}], {f}",
        "invlpg [{page}]",
        "call rsi",
        "add r8, rax",
        "call rsi",
        "add r8, rax",
        "mov qword ptr [{pt}], {e}",
        "invlpg [{page}]",
        "dec r9",
        "jnz 2b",
        "hlt";
        pt = const PT + 24,
        e = const E | 7,
        f = const F | 7,
        page = const PAGE + 0x3000,
    );
    each_across(code, |_| {}, ROUNDS * (WITH_E + 2 * WITH_F));
}

#[test]
fn across_pages_in_two_address_spaces() {
    let code = assemble!(
        "xor r8d, r8d",
        "2:",
        "mov cr3, r12",
        "call rsi",
        "add r8, rax",
        "call rsi",
        "add r8, rax",
        "mov cr3, r13",
        "call rsi",
        "add r8, rax",
        "dec r9",
        "jnz 2b",
        "hlt",
    );
    for pcid in [false, true] {
        each_across(code, two_spaces(pcid), ROUNDS * (2 * WITH_E + WITH_F));
    }
}

#[test]
fn across_pages_of_which_the_second_changes() {
    let code = assemble!(
        "xor r8d, r8d",
        "2:",
        "mov [{e}], r9w",
        "call rsi",
        "add r8, rax",
        "call rsi",
        "add r8, rax",
        "dec r9",
        "jnz 2b",
        "hlt";
        e = const E,
    );
    let sum = (1..=ROUNDS).map(|n| 2 * (n << 16 | 0x10)).sum();
    each_across(code, |_| {}, sum);
}
