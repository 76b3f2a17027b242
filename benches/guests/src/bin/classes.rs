//! The program whose cost `bench-classes` compares: natively, under QEMU's TCG and under Skerry.
//!
//! It prints a line `CLASS name nanoseconds-per-operation` for each class: the best of several
//! pieces, so that a busy host disturbs little. As process 1 it powers the machine off at its end.
#![expect(
    unsafe_code,
    reason = "the classes are instructions, written as inline assembly, and raw system calls"
)]

use std::arch::asm;
use std::ffi::CString;
use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Pieces that are measured of each class, and how long one should take.
const PIECES: u32 = 7;
const PIECE: Duration = Duration::from_millis(30);

type Body = fn(u64);

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("exit") {
        return ExitCode::SUCCESS;
    }
    let classes: [(&str, Body); 12] = [
        ("alu", alu),
        ("memory", memory),
        ("calls", calls),
        ("indirect-calls", indirect_calls),
        ("scalar-sse", scalar_sse),
        ("packed-sse", packed_sse),
        ("x87", x87),
        ("rep-movs-4k", rep_movs),
        ("page-fault", page_fault),
        ("fork-exec", fork_exec),
        ("syscall", syscall),
        ("code-rewrite", code_rewrite),
    ];
    // Names given choose classes: after "--" on a kernel's command line.
    let wanted: Vec<_> = std::env::args().skip(1).collect();
    for (name, body) in classes {
        if !wanted.is_empty() && !wanted.iter().any(|w| w == name) {
            continue;
        }
        println!("CLASS {name} {:.2}", best(body));
    }
    println!("CLASSES DONE");
    if std::process::id() == 1 {
        // SAFETY: plain system calls without pointers; as process 1 nothing else runs.
        unsafe {
            libc::sync();
            libc::reboot(libc::RB_POWER_OFF);
        }
    }
    ExitCode::SUCCESS
}

/// Nanoseconds for one operation of `body`, which does as many as it is told.
fn best(body: Body) -> f64 {
    let mut count = 1;
    loop {
        let taken = time(body, count);
        if taken >= PIECE || count >= 1 << 40 {
            break;
        }
        let factor = (PIECE.as_nanos() / taken.as_nanos().max(1)).clamp(2, 16);
        count *= factor as u64;
    }
    (0..PIECES)
        .map(|_| time(body, count).as_nanos() as f64 / count as f64)
        .fold(f64::INFINITY, f64::min)
}

fn time(body: Body, count: u64) -> Duration {
    let start = Instant::now();
    body(count);
    start.elapsed()
}

/// Nine dependent integer instructions.
fn alu(count: u64) {
    // SAFETY: registers only, all declared.
    unsafe {
        asm!(
            "2:",
            "lea {a}, [{a} + {b} + 1]",
            "xor {b}, {a}",
            "rol {a}, 7",
            "add {b}, 0x1234567",
            "sub {a}, {b}",
            "and {b}, {a}",
            "or {a}, 3",
            "dec {n}",
            "jnz 2b",
            a = inout(reg) 1u64 => _,
            b = inout(reg) 2u64 => _,
            n = inout(reg) count => _,
        );
    }
}

/// Two loads and two stores in the first-level cache.
fn memory(count: u64) {
    let mut words = [0u64; 64];
    // SAFETY: every access is within `words`: the index is masked to 0..32, the displacement adds
    // at most 24 bytes.
    unsafe {
        asm!(
            "2:",
            "mov {t}, {n}",
            "and {t}, 31",
            "mov {u}, [{p} + {t} * 8]",
            "add {u}, {n}",
            "mov [{p} + {t} * 8 + 8], {u}",
            "mov {t}, [{p} + 16]",
            "mov [{p} + 24], {t}",
            "dec {n}",
            "jnz 2b",
            p = in(reg) words.as_mut_ptr(),
            t = out(reg) _,
            u = out(reg) _,
            n = inout(reg) count => _,
        );
    }
    black_box(words);
}

/// CALL and RET.
fn calls(count: u64) {
    // SAFETY: the called code returns at once; the stack is balanced.
    unsafe {
        asm!(
            "2:",
            "call 3f",
            "dec {n}",
            "jnz 2b",
            "jmp 4f",
            "3:",
            "ret",
            "4:",
            n = inout(reg) count => _,
        );
    }
}

/// CALL through a register, to two places in turn.
fn indirect_calls(count: u64) {
    // SAFETY: both targets are in this block and return at once.
    unsafe {
        asm!(
            "lea {a}, [rip + 3f]",
            "lea {b}, [rip + 5f]",
            "2:",
            "call {a}",
            "xchg {a}, {b}",
            "dec {n}",
            "jnz 2b",
            "jmp 4f",
            "3:",
            "ret",
            "5:",
            "nop",
            "ret",
            "4:",
            a = out(reg) _,
            b = out(reg) _,
            n = inout(reg) count => _,
        );
    }
}

/// MULSD, ADDSD, DIVSD.
fn scalar_sse(count: u64) {
    // SAFETY: registers only, all declared.
    unsafe {
        asm!(
            "2:",
            "mulsd {a}, {b}",
            "addsd {a}, {c}",
            "divsd {a}, {b}",
            "dec {n}",
            "jnz 2b",
            a = inout(xmm_reg) 1.0f64 => _,
            b = in(xmm_reg) 1.000_000_1f64,
            c = in(xmm_reg) 1e-9f64,
            n = inout(reg) count => _,
        );
    }
}

/// Five packed integer and float instructions.
fn packed_sse(count: u64) {
    // SAFETY: registers only, all declared.
    unsafe {
        asm!(
            "2:",
            "paddd {a}, {b}",
            "pxor {b}, {a}",
            "pshufd {c}, {a}, 0x1b",
            "pmuludq {c}, {b}",
            "paddq {a}, {c}",
            "dec {n}",
            "jnz 2b",
            a = inout(xmm_reg) 1.5f64 => _,
            b = inout(xmm_reg) 2.5f64 => _,
            c = out(xmm_reg) _,
            n = inout(reg) count => _,
        );
    }
}

/// FMUL, FADD, FDIV.
fn x87(count: u64) {
    let (by, plus) = (1.000_000_1f64, 1e-9f64);
    // SAFETY: what is pushed on the x87 stack is popped again.
    unsafe {
        asm!(
            "fld1",
            "2:",
            "fmul qword ptr [{by}]",
            "fadd qword ptr [{plus}]",
            "fdiv qword ptr [{by}]",
            "dec {n}",
            "jnz 2b",
            "fstp st(0)",
            by = in(reg) &raw const by,
            plus = in(reg) &raw const plus,
            n = inout(reg) count => _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
}

/// REP MOVSB of 4 KiB.
fn rep_movs(count: u64) {
    let from = vec![1u8; 4096];
    let mut to = vec![0u8; 4096];
    for _ in 0..count {
        // SAFETY: both buffers have 4096 bytes.
        unsafe {
            asm!(
                "rep movsb",
                inout("rcx") 4096u64 => _,
                inout("rsi") from.as_ptr() => _,
                inout("rdi") to.as_mut_ptr() => _,
            );
        }
    }
    black_box(to);
}

fn map(length: usize, protection: i32) -> *mut u8 {
    // SAFETY: an anonymous mapping where the kernel chooses.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert!(at != libc::MAP_FAILED, "no memory");
    at.cast()
}

/// First touch of an anonymous page.
fn page_fault(count: u64) {
    const PAGES: u64 = 256;
    let mut left = count;
    while left > 0 {
        let at = map(PAGES as usize * 4096, libc::PROT_READ | libc::PROT_WRITE);
        let now = left.min(PAGES);
        for page in 0..now as usize {
            // SAFETY: within the mapping.
            unsafe { at.add(page * 4096).write_volatile(1) };
        }
        // SAFETY: the whole mapping made above, unused from here.
        unsafe { libc::munmap(at.cast(), PAGES as usize * 4096) };
        left -= now;
    }
}

/// Fork, exec of this program, its exit and the wait.
fn fork_exec(count: u64) {
    let program = std::env::current_exe().unwrap_or_else(|_| "/init".into());
    let path = CString::new(program.into_os_string().into_encoded_bytes()).expect("no NUL");
    let argument = c"exit";
    for _ in 0..count {
        // SAFETY: the child only calls execv and _exit; the pointers live across the call.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                let argv = [path.as_ptr(), argument.as_ptr(), std::ptr::null()];
                libc::execv(path.as_ptr(), argv.as_ptr());
                libc::_exit(127);
            }
            let mut status = 0;
            libc::waitpid(child, &raw mut status, 0);
            assert_eq!(status, 0, "the child failed");
        }
    }
}

/// getppid.
fn syscall(count: u64) {
    for _ in 0..count {
        // SAFETY: a system call without arguments.
        unsafe { libc::syscall(libc::SYS_getppid) };
    }
}

/// Writes six bytes of code and calls them.
fn code_rewrite(count: u64) {
    let at = map(4096, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
    for n in 0..count as u32 {
        let [a, b, c, d] = n.to_le_bytes();
        // mov eax, n; ret
        let code = [0xb8, a, b, c, d, 0xc3];
        // SAFETY: the page is writable and executable, and the bytes are a function that returns
        // its number and touches EAX alone.
        let answer = unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), at, code.len());
            let function: extern "C" fn() -> u32 = std::mem::transmute(at);
            function()
        };
        assert_eq!(answer, n, "stale code was run");
    }
    // SAFETY: the whole mapping made above, unused from here.
    unsafe { libc::munmap(at.cast(), 4096) };
}
