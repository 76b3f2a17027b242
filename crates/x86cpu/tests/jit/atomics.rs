//! Locked instructions of two processors on the same memory.

use skerry_x86cpu::testing::{CODE, DATA};

use crate::assemble;
use crate::machine::{TUNINGS, alone, another, machine, run_to_halt};

const TIMES: u64 = 20_000;

/// Both processors run the code with RBX at `at`, R8 the number of rounds, RDI a table of their
/// own; `check` looks at the memory.
fn two_processors(code: &[u8], at: u64, check: impl Fn(&skerry_x86cpu::testing::TestCpu, &str)) {
    for (name, tuning) in TUNINGS {
        let t = machine(3, tuning);
        let _alone = alone();
        t.write(CODE, code);
        let mut cpus = [1, 2].map(|id| {
            let mut cpu = another(&t, id, CODE);
            cpu.gpr[3] = at;
            cpu.gpr[7] = DATA + 0x10_0000 * u64::from(id);
            cpu.gpr[8] = TIMES;
            cpu
        });
        std::thread::scope(|scope| {
            for cpu in &mut cpus {
                scope.spawn(move || run_to_halt(cpu, name));
            }
        });
        check(&t, name);
    }
}

#[test]
fn counters_of_every_size() {
    let code = assemble!(
        "2:",
        "lock inc byte ptr [rbx]",
        "lock add word ptr [rbx + 8], 1",
        "lock sub dword ptr [rbx + 16], -1",
        "lock inc qword ptr [rbx + 24]",
        "lock dec qword ptr [rbx + 32]",
        "mov eax, 3",
        "lock xadd [rbx + 40], rax",
        "dec r8",
        "jnz 2b",
        "hlt",
    );
    // Aligned, across cache lines, across pages.
    for at in [DATA, DATA + 61, DATA + 0x1000 - 3, DATA + 0x1000 - 29] {
        two_processors(code, at, |t, name| {
            let total = 2 * TIMES;
            let word = |n: u64| t.read_u64(at + 8 * n);
            assert_eq!(word(0) & 0xff, total & 0xff, "{name}");
            assert_eq!(word(1) & 0xffff, total & 0xffff, "{name}");
            assert_eq!(word(2) & 0xffff_ffff, total, "{name}");
            assert_eq!(word(3), total, "{name}");
            assert_eq!(word(4), total.wrapping_neg(), "{name}");
            assert_eq!(word(5), 3 * total, "{name}");
        });
    }
}

#[test]
fn tickets_are_unique() {
    let code = assemble!(
        "2:",
        "mov eax, 1",
        "lock xadd [rbx], eax",
        "mov [rdi], eax",
        "add rdi, 4",
        "dec r8",
        "jnz 2b",
        "hlt",
    );
    two_processors(code, DATA, |t, name| {
        let mut seen = vec![false; 2 * TIMES as usize];
        for id in 1..3 {
            let table = t.read(DATA + 0x10_0000 * id, 4 * TIMES as usize);
            let mut before = None;
            for entry in table.chunks_exact(4) {
                let ticket = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
                assert!(before < Some(ticket), "{name}: tickets in order");
                before = Some(ticket);
                let slot = &mut seen[ticket as usize];
                assert!(!*slot, "{name}: ticket {ticket} twice");
                *slot = true;
            }
        }
    });
}

#[test]
fn compare_and_exchange() {
    let code = assemble!(
        "2:",
        "mov rax, [rbx]",
        "3:",
        "lea rcx, [rax + 1]",
        "lock cmpxchg [rbx], rcx",
        "jne 3b",
        "4:",
        "mov eax, [rbx + 8]",
        "lea ecx, [rax + 5]",
        "lock cmpxchg [rbx + 8], ecx",
        "jne 4b",
        "dec r8",
        "jnz 2b",
        "hlt",
    );
    for at in [DATA, DATA + 0x1000 - 5] {
        two_processors(code, at, |t, name| {
            assert_eq!(t.read_u64(at), 2 * TIMES, "{name}");
            assert_eq!(t.read_u64(at + 8), 10 * TIMES, "{name}");
        });
    }
}

#[test]
fn sixteen_bytes() {
    let code = assemble!(
        "mov rsi, rbx",
        "2:",
        "mov rax, [rsi]",
        "mov rdx, [rsi + 8]",
        "3:",
        "lea rbx, [rax + 1]",
        "lea rcx, [rdx + 2]",
        "lock cmpxchg16b [rsi]",
        "jne 3b",
        "dec r8",
        "jnz 2b",
        "hlt",
    );
    two_processors(code, DATA + 0x40, |t, name| {
        assert_eq!(t.read_u64(DATA + 0x40), 2 * TIMES, "{name}");
        assert_eq!(t.read_u64(DATA + 0x48), 4 * TIMES, "{name}");
    });
}

#[test]
fn a_lock_protects() {
    let code = assemble!(
        "2:",
        "mov eax, 1",
        "xchg [rbx], eax",
        "test eax, eax",
        "jz 3f",
        "pause",
        "jmp 2b",
        "3:",
        "inc qword ptr [rbx + 64]",
        "add qword ptr [rbx + 0x2000], 7",
        "mov dword ptr [rbx], 0",
        // The same with a bit.
        "4:",
        "lock bts dword ptr [rbx + 8], 5",
        "jc 4b",
        "inc qword ptr [rbx + 72]",
        "lock btr dword ptr [rbx + 8], 5",
        "dec r8",
        "jnz 2b",
        "hlt",
    );
    two_processors(code, DATA, |t, name| {
        assert_eq!(t.read_u64(DATA + 64), 2 * TIMES, "{name}");
        assert_eq!(t.read_u64(DATA + 0x2000), 14 * TIMES, "{name}");
        assert_eq!(t.read_u64(DATA + 72), 2 * TIMES, "{name}");
    });
}
