//! Loops over memory: pointers that walk over the ends of pages, and what comes of a page between two
//! turns. Random loops say the same in each way to run them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use skerry_x86cpu::Tuning;
use skerry_x86cpu::testing::{CODE, RAM, TABLES, TestCpu};

use crate::machine::{COMPILING, Deadline, Seen, TUNINGS, gate, machine, run_to_halt, run_to_trap};
use crate::{apic, assemble};

/// Sixteen small pages from here on, and their table.
const PAGES: u64 = 0x300_0000;
const PT: u64 = 0x30_0000;
/// RAM that they show, in no order.
const SHOWN: u64 = 0x31_0000;
/// A variable that code moves on.
const CELL: u64 = 0x5_0000;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// Instructions of a loop's body. RBX, RSI, RDI, R10, R15 and RSP are pointers, RDX and R9 small.
fn accesses() -> Vec<&'static [u8]> {
    vec![
        assemble!("mov rax, [rbx]"),
        assemble!("add rax, [rbx + 8]"),
        assemble!("mov [rbx + 16], rax"),
        assemble!("movzx eax, byte ptr [rbx - 1]"),
        assemble!("add [rsi], eax"),
        assemble!("xor r8w, [rsi + 6]"),
        assemble!("mov [rsi + rdx], r8"),
        assemble!("mov r8, [rsi + 8*r9 + 24]"),
        assemble!("adc r8d, [rdi + 4*rdx]"),
        assemble!("mov byte ptr [rdi + r9], 77"),
        assemble!("sbb r12, [rdi - 0x20]"),
        assemble!("mov r12, [r10]"),
        assemble!("mov [r10 + 8], r11"),
        assemble!("add r11, [r10 + 2*r9]"),
        assemble!("mov r12, [r15 + 4]"),
        assemble!("mov [r15 + r9], r15"),
        assemble!("xadd [r15], r12"),
        assemble!("push rax"),
        assemble!("pop r12"),
        assemble!("push r10"),
        assemble!("mov rax, [rsp + 8]"),
        assemble!("mov [rsp + rdx + 16], r8"),
        assemble!("mov rax, fs:[rsi]"),
        assemble!("mov fs:[rbx + rdx], eax"),
        assemble!("mov rax, [r9 + {pages}]"; pages = const PAGES),
        assemble!("inc qword ptr [{cell}]"; cell = const CELL),
        assemble!("mov rax, [rip + 0x1000]"),
        assemble!("movups xmm1, [rbx]"),
        assemble!("movaps xmm2, [rsi]"),
        assemble!("movaps [rdi + 16], xmm1"),
        assemble!("paddd xmm2, [rsi + rdx]"),
        assemble!("vmovups ymm3, [rdi + r9]"),
        assemble!("vmovaps ymm3, [r10]"),
        assemble!("vmovdqa [r10 + 32], ymm3"),
        assemble!("vpaddb ymm1, ymm3, [rbx + 1]"),
        assemble!("fld qword ptr [rsi]", "fstp qword ptr [rsi + 8]"),
        assemble!(
            "fld dword ptr [rbx + 4*r9]",
            "fadd st(0), st(0)",
            "fstp dword ptr [rdi]"
        ),
        assemble!("fild word ptr [r15 + rdx]", "fistp qword ptr [rdi + 8]"),
        assemble!("cmp rax, [rbx + 24]"),
        assemble!("lock inc dword ptr [rdi + 12]"),
        assemble!(
            "mov r13, [rbx + 8*rdx]",
            "and r13d, 0xff",
            "mov rax, [rsi + r13]"
        ),
        assemble!("cmpxchg [rdi], r11"),
        assemble!("mov eax, 5", "div dword ptr [{cell} + 16]", "test eax, eax"; cell = const CELL),
    ]
}

/// What moves the pointers, or other registers.
fn moves() -> Vec<&'static [u8]> {
    vec![
        assemble!("add rbx, 8"),
        assemble!("sub rbx, 40"),
        assemble!("add rsi, 16"),
        assemble!("sub rsi, -128"),
        assemble!("lea rdi, [rdi + 32]"),
        assemble!("lea rdi, [rdi - 4]"),
        assemble!("add r10, 64"),
        assemble!("dec r10"),
        assemble!("add r15, 3"),
        assemble!("sub r15, 1000"),
        assemble!("add r10, 4096"),
        assemble!("add rdi, 0x1800"),
        assemble!("inc r9"),
        assemble!("dec rdx"),
        assemble!("add rdx, 16"),
        assemble!("add rsp, 32"),
        assemble!("sub rsp, 8"),
        assemble!("add ebx, 8"),
        assemble!("mov r13, rbx", "mov rbx, rsi", "mov rsi, r13"),
        assemble!("xchg rbx, rdi"),
        assemble!("mov r13, rsi", "add r13, 8", "mov rsi, r13"),
        assemble!("test al, 1", "cmovnz rsi, rdi"),
        assemble!("nop"),
        assemble!("adc r14, 0"),
        assemble!("seto r14b"),
        assemble!("test al, 3", "jnz 2f", "add r14, 7", "2:"),
        assemble!("cmp r14, 100", "ja 2f", "inc r14", "2:"),
    ]
}

/// A loop of RCX turns, and OUT.
fn body(random: &mut Random) -> Vec<u8> {
    let (accesses, moves) = (accesses(), moves());
    let mut code = Vec::new();
    for _ in 0..1 + random.below(6) {
        code.extend(random.pick(&accesses));
        if random.below(2) == 0 {
            code.extend(random.pick(&moves));
        }
    }
    let back = |code: &mut Vec<u8>, jump: &[u8]| {
        code.extend(jump);
        let distance = -(code.len() as i32 + 4);
        code.extend(distance.to_le_bytes());
    };
    if random.below(5) == 0 {
        // TEST BPL, 7 and JZ: a second way back.
        code.extend([0x40, 0xf6, 0xc5, 7]);
        code.extend(assemble!("lea rbp, [rbp + 1]"));
        back(&mut code, &[0x0f, 0x84]);
    }
    // LEA RCX, [RCX - 1]; JRCXZ over JMP: or DEC RCX and JNZ, or SUB RCX, 1 and JA.
    match random.below(3) {
        0 => {
            code.extend(assemble!("lea rcx, [rcx - 1]"));
            code.extend([0xe3, 5]);
            back(&mut code, &[0xe9]);
        }
        1 => {
            code.extend(assemble!("dec rcx"));
            back(&mut code, &[0x0f, 0x85]);
        }
        _ => {
            code.extend(assemble!("sub rcx, 1"));
            back(&mut code, &[0x0f, 0x87]);
        }
    }
    code.extend([0xe6, 0x99]);
    code
}

/// Small pages: most of them RAM, not in their order; some absent, read-only, or no RAM.
fn map(t: &TestCpu, random: &mut Random) {
    let put = |at: u64, value: u64| t.write(at, &value.to_le_bytes());
    put(TABLES + 0x2000 + 8 * (PAGES >> 21 & 511), PT | 7);
    for n in 0..16u64 {
        let shown = SHOWN + ((n * 7 + 3) % 16) * 0x1000;
        put(
            PT + 8 * n,
            match random.below(24) {
                0 => 0,
                1 => shown | 5,
                2 => 0x80_0000 | 7,
                3 => SHOWN | 7,
                _ => shown | 7,
            },
        );
    }
    let mut bytes = vec![0; 16 * 4096];
    for chunk in bytes.chunks_mut(8) {
        // Numbers for all units, and few that x87 is slow with.
        chunk.copy_from_slice(&(random.next() >> 12 | 0x3ff << 52).to_le_bytes());
    }
    t.write(SHOWN, &bytes);
    t.write(CELL, &[0x11; 64]);
}

fn run(t: &mut TestCpu, gpr: &[u64; 16]) -> Seen {
    let mut seen = run_to_trap(t, CODE, gpr, 0x20);
    // AF is undefined after some of them.
    seen.flags &= !0x10;
    seen
}

#[test]
fn random_loops() {
    const LOOPS: u64 = 600;
    let mut random = Random(0x5eed);
    for n in 0..LOOPS {
        let code = body(&mut random);
        let (how, tuning) = COMPILING[(n % 3) as usize];
        let _deadline = Deadline::new(format!("loop {n} ({how})"), Duration::from_secs(60));
        let seed = random.next();
        let (mut reference, mut actual) = (machine(1, Tuning::INTERPRETER), machine(1, tuning));
        for t in [&reference, &actual] {
            map(t, &mut Random(seed));
            t.write(CODE, &code);
        }
        for _ in 0..6 {
            let mut gpr: [u64; 16] = std::array::from_fn(|_| random.next());
            for pointer in [3, 4, 6, 7, 10, 15] {
                let edge = PAGES + 0x1000 * (1 + random.below(14));
                gpr[pointer] = match random.below(4) {
                    0 => edge - random.below(64),
                    1 => edge + random.below(0x1000),
                    _ => edge + 32 * random.below(128),
                };
            }
            gpr[1] = 1 + random.below(700);
            gpr[2] = random.below(64);
            gpr[9] = 16 * random.below(8);
            let a = run(&mut reference, &gpr);
            let b = run(&mut actual, &gpr);
            assert_eq!(a, b, "loop {n} ({how}): {code:02x?} from {gpr:x?}");
        }
        let (a, b) = (reference.read(0, RAM), actual.read(0, RAM));
        if let Some(at) = (0..RAM).find(|&n| a[n] != b[n]) {
            panic!("loop {n} ({how}): memory at {at:x}: {code:02x?}");
        }
    }
}

#[test]
fn a_loop_comes_to_its_own_code() {
    // It stores a byte of its own, as it is, up to the end of its page; then another immediate.
    let code = assemble!(
        "lea rdi, [rip + 3f]",
        "and rdi, -4096",
        "sub rdi, 0x800",
        "lea rbx, [rip + 3f + 1]",
        "xor eax, eax",
        "mov ecx, 0x900",
        "2:",
        "movzx edx, byte ptr [rdi]",
        "mov [rdi], dl",
        "add rdi, 1",
        "cmp rdi, rbx",
        "jne 3f",
        "mov byte ptr [rdi], 5",
        "3:",
        "mov esi, 1",
        "add rax, rsi",
        "dec rcx",
        "jnz 2b",
        "hlt",
    );
    let mut expected = None;
    for (name, tuning) in TUNINGS {
        let mut t = machine(1, tuning);
        t.write(CODE, code);
        run_to_halt(&mut t.cpu, name);
        let expected = *expected.get_or_insert(t.cpu.gpr[0]);
        assert!(expected > 0x900, "{name}: the store was not seen");
        assert_eq!(t.cpu.gpr[0], expected, "{name}");
    }
}

/// A page becomes another in an interrupt, or may no longer be written, while a loop goes on in it.
#[test]
fn an_interrupt_changes_the_page() {
    const INTERRUPT: u64 = CODE + 0x3000;
    const FAULT: u64 = CODE + 0x3800;
    const A: u64 = SHOWN;
    const B: u64 = SHOWN + 0x1000;
    // The cell says which page it is: that one has the same number in it.
    let code = assemble!(
        "2:",
        "mov r8, [{cell}]",
        "mov rax, [rsi]",
        "mov r9, [{cell}]",
        "cmp r8, r9",
        "jne 4f",
        "cmp rax, r8",
        "jne 5f",
        "4:",
        "mov rbx, [{cell} + 8]",
        "mov [rdi], rcx",
        "mov rbp, [{cell} + 8]",
        "cmp [rdi], rcx",
        "jne 6f",
        "7:",
        "add rdx, [rsi + 16]",
        "dec rcx",
        "jnz 2b",
        "jmp 2b",
        // Not so if the page became another in between.
        "6:",
        "cmp rbx, rbp",
        "jne 7b",
        "mov rbp, [{cell} + 8]",
        "cmp rbx, rbp",
        "jne 7b",
        "5:",
        "mov r15d, 0xbad",
        "8: jmp 8b";
        cell = const CELL,
    );
    // In turn: another page; a page that must not be written.
    let interrupt = apic::handler(assemble!(
        "inc qword ptr [{cell} + 8]",
        "xor qword ptr [{pt}], {both}",
        "and qword ptr [{pt}], -3",
        "invlpg [{pages}]",
        "xor qword ptr [{cell}], 1";
        cell = const CELL,
        pt = const PT,
        both = const A ^ B,
        pages = const PAGES,
    ));
    let fault = assemble!(
        "inc qword ptr [{cell} + 16]",
        "add rsp, 8",
        "or qword ptr [{pt}], 2",
        "invlpg [{pages}]",
        "iretq";
        cell = const CELL,
        pt = const PT,
        pages = const PAGES,
    );
    for (how, tuning) in TUNINGS {
        let _deadline = Deadline::new(how.to_owned(), Duration::from_secs(60));
        let mut t = machine(1, tuning);
        let put = |at: u64, value: u64| t.write(at, &value.to_le_bytes());
        put(TABLES + 0x2000 + 8 * (PAGES >> 21 & 511), PT | 7);
        put(PT, A | 7);
        put(A, 0);
        put(B, 1);
        t.write(CELL, &[0; 32]);
        t.write(CODE, code);
        t.write(INTERRUPT, &interrupt);
        t.write(FAULT, fault);
        gate(&t, 0x41, INTERRUPT);
        gate(&t, 14, FAULT);
        t.cpu.rip = CODE;
        crate::requests::enable_apic(&mut t);
        t.cpu.gpr[6] = PAGES;
        t.cpu.gpr[7] = PAGES + 0x800;
        let (machine, shared) = (t.machine.clone(), t.cpu.shared.clone());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let poster = std::thread::spawn(move || {
            for _ in 0..400 {
                std::thread::sleep(Duration::from_micros(100));
                machine.post(0, 0x41, false);
            }
            stopped.store(true, Ordering::SeqCst);
            shared.request_exit();
        });
        while !stop.load(Ordering::SeqCst) {
            let _ = t.cpu.run();
        }
        assert!(poster.join().is_ok());
        assert_ne!(t.cpu.gpr[15], 0xbad, "{how}: {:x?}", t.cpu.gpr);
        assert!(t.read_u64(CELL + 8) > 20, "{how}: too few interrupts");
        assert!(t.read_u64(CELL + 16) > 10, "{how}: too few faults");
    }
}
