//! Memory order between processors: what x86-TSO forbids is never seen (Intel SDM 3A §10.2).
//!
//! Threads meet at a barrier, wait a few instructions of varying number, and run a test's few
//! accesses on memory of their own; what they read goes into a table.

use std::sync::atomic::{AtomicU32, Ordering};

use skerry_x86cpu::testing::{CODE, DATA};

use crate::assemble;
use crate::machine::{TUNINGS, alone, another, machine, run_to_halt};

const SYNC: u64 = DATA - 0x1000;
const RESULTS: u64 = DATA + 0x20_0000;
const TESTS: u64 = 3000;
const SPACING: u64 = 128;

/// One thread: X is `[rsi]`, Y is `[rdi]`, results are EAX and EDX.
macro_rules! thread {
    ($($line:expr),+ $(,)?) => {
        assemble!(
            "2:",
            "test r8d, r11d",
            "jnz 4f",
            "lock inc dword ptr [rbx]",
            "add ebp, r10d",
            "3:",
            "pause",
            "cmp [rbx], ebp",
            "jl 3b",
            "4:",
            "mov ecx, r8d",
            "imul ecx, r13d",
            "and ecx, 15",
            "5:",
            "dec ecx",
            "jns 5b",
            "xor eax, eax",
            "xor edx, edx",
            $($line,)+
            "mov [r9], eax",
            "mov [r9 + 4], edx",
            "add rsi, 128",
            "add rdi, 128",
            "add r9, 32",
            "dec r8d",
            "jnz 2b",
            "hlt",
        )
    };
}

/// A test: its threads, and what may not be seen of their EAX and EDX.
struct Litmus {
    name: &'static str,
    threads: Vec<&'static [u8]>,
    forbidden: fn(&[[u32; 2]]) -> bool,
}

/// Runs a test; how often `forbidden` holds.
fn seen(test: &Litmus, tuning: skerry_x86cpu::Tuning, what: &str) -> u64 {
    let _alone = alone();
    let count = test.threads.len();
    let t = machine(count + 1, tuning);
    // With more threads than the host has processors, meeting takes a turn of its scheduler.
    let batch = if count > 2 { 255 } else { 127 };
    let base = DATA + 0x1000;
    let mut cpus: Vec<_> = (0..count)
        .map(|n| {
            let at = CODE + 0x1000 * n as u64;
            t.write(at, test.threads[n]);
            let mut cpu = another(&t, n as u32 + 1, at);
            cpu.gpr[3] = SYNC;
            cpu.gpr[6] = base;
            cpu.gpr[7] = base + SPACING / 2;
            cpu.gpr[8] = TESTS;
            cpu.gpr[9] = RESULTS + 8 * n as u64;
            cpu.gpr[10] = count as u64;
            cpu.gpr[11] = batch;
            cpu.gpr[13] = 1 + 2 * n as u64;
            cpu
        })
        .collect();
    std::thread::scope(|scope| {
        for cpu in &mut cpus {
            scope.spawn(move || run_to_halt(cpu, what));
        }
    });
    let table = t.read(RESULTS, 32 * TESTS as usize);
    table
        .chunks_exact(32)
        .filter(|row| {
            let values: Vec<[u32; 2]> = row
                .chunks_exact(8)
                .take(count)
                .map(|pair| {
                    let word = |n: usize| {
                        let mut bytes = [0; 4];
                        bytes.copy_from_slice(&pair[4 * n..][..4]);
                        u32::from_le_bytes(bytes)
                    };
                    [word(0), word(1)]
                })
                .collect();
            (test.forbidden)(&values)
        })
        .count() as u64
}

fn never(name: &'static str, threads: Vec<&'static [u8]>, forbidden: fn(&[[u32; 2]]) -> bool) {
    let test = Litmus {
        name,
        threads,
        forbidden,
    };
    for (how, tuning) in TUNINGS {
        let times = seen(&test, tuning, name);
        assert_eq!(times, 0, "{} ({how}): the forbidden outcome", test.name);
    }
}

fn message_passed(r: &[[u32; 2]]) -> bool {
    r[1] == [1, 0]
}

fn both_zero(r: &[[u32; 2]]) -> bool {
    r[0][0] == 0 && r[1][0] == 0
}

#[test]
fn message_passing() {
    let reader = thread!("mov eax, [rdi]", "mov edx, [rsi]");
    let plain = thread!("mov dword ptr [rsi], 1", "mov dword ptr [rdi], 1");
    never("MP", vec![plain, reader], message_passed);
    let split = thread!(
        "mov dword ptr [rsi], 1",
        "jmp 6f",
        "6:",
        "mov dword ptr [rdi], 1"
    );
    let reader_split = thread!("mov eax, [rdi]", "jmp 6f", "6:", "mov edx, [rsi]");
    never("MP, blocks", vec![split, reader_split], message_passed);
    let locked = thread!("lock inc dword ptr [rsi]", "lock inc dword ptr [rdi]");
    never("MP, locked", vec![locked, reader], message_passed);
    let half = thread!("mov dword ptr [rsi], 1", "lock inc dword ptr [rdi]");
    let locked_reader = thread!("lock xadd [rdi], eax", "lock xadd [rsi], edx");
    never("MP, half locked", vec![half, locked_reader], message_passed);
    let fenced = thread!("mov dword ptr [rsi], 1", "mfence", "mov dword ptr [rdi], 1");
    let fenced_reader = thread!("mov eax, [rdi]", "lfence", "mov edx, [rsi]");
    never("MP, fences", vec![fenced, fenced_reader], message_passed);
    let vectors = thread!(
        "mov ecx, 1",
        "vmovd xmm0, ecx",
        "vmovd [rsi], xmm0",
        "vmovd [rdi], xmm0"
    );
    let vector_reader = thread!(
        "vmovd xmm0, [rdi]",
        "vmovd xmm1, [rsi]",
        "vmovd eax, xmm0",
        "vmovd edx, xmm1"
    );
    never("MP, vectors", vec![vectors, vector_reader], message_passed);
}

#[test]
fn store_buffering() {
    let plain = [
        thread!("mov dword ptr [rsi], 1", "mov eax, [rdi]"),
        thread!("mov dword ptr [rdi], 1", "mov eax, [rsi]"),
    ];
    let test = Litmus {
        name: "SB",
        threads: plain.to_vec(),
        forbidden: both_zero,
    };
    for (how, tuning) in TUNINGS {
        // Allowed: the store may wait while the load is done.
        println!("SB ({how}): {} of {TESTS}", seen(&test, tuning, "SB"));
    }
    println!("SB on the host: {} of {TESTS}", native_store_buffering());
    never(
        "SB, MFENCE",
        vec![
            thread!("mov dword ptr [rsi], 1", "mfence", "mov eax, [rdi]"),
            thread!("mov dword ptr [rdi], 1", "mfence", "mov eax, [rsi]"),
        ],
        both_zero,
    );
    never(
        "SB, XCHG",
        vec![
            thread!("mov ecx, 1", "xchg [rsi], ecx", "mov eax, [rdi]"),
            thread!("mov ecx, 1", "xchg [rdi], ecx", "mov eax, [rsi]"),
        ],
        both_zero,
    );
    never(
        "SB, locked on the stack",
        vec![
            thread!(
                "mov dword ptr [rsi], 1",
                "lock add dword ptr [rsp - 4], 0",
                "mov eax, [rdi]"
            ),
            thread!(
                "mov dword ptr [rdi], 1",
                "lock add dword ptr [rsp - 4], 0",
                "mov eax, [rsi]"
            ),
        ],
        both_zero,
    );
    never(
        "SB, locked",
        vec![
            thread!("lock inc dword ptr [rsi]", "mov eax, [rdi]"),
            thread!("lock inc dword ptr [rdi]", "mov eax, [rsi]"),
        ],
        both_zero,
    );
}

/// The same on the host's processors, for comparison.
fn native_store_buffering() -> usize {
    let sync = AtomicU32::new(0);
    let cells: Vec<[AtomicU32; 32]> = (0..TESTS)
        .map(|_| std::array::from_fn(|_| AtomicU32::new(0)))
        .collect();
    let side = |mine: usize, other: usize| {
        let mut results = Vec::new();
        for (n, cell) in cells.iter().enumerate() {
            sync.fetch_add(1, Ordering::SeqCst);
            while sync.load(Ordering::SeqCst) < 2 * (n as u32 + 1) {
                std::hint::spin_loop();
            }
            cell[mine].store(1, Ordering::Relaxed);
            results.push(cell[other].load(Ordering::Relaxed));
        }
        results
    };
    let (a, b) = std::thread::scope(|scope| {
        let other = scope.spawn(|| side(16, 0));
        (side(0, 16), other.join().unwrap_or_default())
    });
    a.iter()
        .zip(&b)
        .filter(|(a, b)| (**a, **b) == (0, 0))
        .count()
}

#[test]
fn load_buffering() {
    let both_one = |r: &[[u32; 2]]| r[0][0] == 1 && r[1][0] == 1;
    never(
        "LB",
        vec![
            thread!("mov eax, [rsi]", "mov dword ptr [rdi], 1"),
            thread!("mov eax, [rdi]", "mov dword ptr [rsi], 1"),
        ],
        both_one,
    );
    never(
        "LB, locked",
        vec![
            thread!("mov eax, [rsi]", "lock inc dword ptr [rdi]"),
            thread!("mov eax, [rdi]", "lock inc dword ptr [rsi]"),
        ],
        both_one,
    );
    never(
        "LB, read and write",
        vec![
            thread!("mov eax, [rsi]", "add dword ptr [rdi], 1"),
            thread!("mov eax, [rdi]", "add dword ptr [rsi], 1"),
        ],
        both_one,
    );
}

#[test]
fn independent_reads_of_independent_writes() {
    let disagree = |r: &[[u32; 2]]| r[2] == [1, 0] && r[3] == [1, 0];
    let readers = [
        thread!("mov eax, [rsi]", "mov edx, [rdi]"),
        thread!("mov eax, [rdi]", "mov edx, [rsi]"),
    ];
    never(
        "IRIW",
        vec![
            thread!("mov dword ptr [rsi], 1"),
            thread!("mov dword ptr [rdi], 1"),
            readers[0],
            readers[1],
        ],
        disagree,
    );
    never(
        "IRIW, locked",
        vec![
            thread!("lock inc dword ptr [rsi]"),
            thread!("lock inc dword ptr [rdi]"),
            readers[0],
            readers[1],
        ],
        disagree,
    );
}

#[test]
fn one_location_goes_forward() {
    never(
        "CoRR",
        vec![
            thread!("mov dword ptr [rsi], 1", "mov dword ptr [rsi], 2"),
            thread!("mov eax, [rsi]", "mov edx, [rsi]"),
        ],
        |r| r[1][1] < r[1][0],
    );
    // A read of 64 bits is one: both halves are of one write.
    never(
        "64 bits",
        vec![
            thread!("mov rcx, -1", "mov [rsi], rcx"),
            thread!("mov rax, [rsi]", "mov rdx, rax", "shr rdx, 32"),
        ],
        |r| r[1][0] != r[1][1],
    );
}
