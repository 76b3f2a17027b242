//! Says which program ran when the process was about to die of a signal or a panic.
#![expect(
    unsafe_code,
    reason = "a signal handler, and a process of its own for each case"
)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

static SEED: AtomicU64 = AtomicU64::new(0);
static CASE: AtomicU64 = AtomicU64::new(0);

/// Takes note of what runs now.
pub fn running(seed: u64, case: u64) {
    SEED.store(seed, Ordering::Relaxed);
    CASE.store(case, Ordering::Relaxed);
}

fn digits(mut n: u64, text: &mut [u8; 20]) -> &[u8] {
    let mut at = text.len();
    loop {
        at -= 1;
        text[at] = b'0' + (n % 10) as u8;
        n /= 10;
        if n == 0 {
            return &text[at..];
        }
    }
}

/// Ends the process: a processor doesn't come back although it was asked to.
pub fn stuck() -> ! {
    eprintln!(
        "case {} of seed {}: the processor doesn't come back",
        CASE.load(Ordering::Relaxed),
        SEED.load(Ordering::Relaxed)
    );
    std::process::exit(101)
}

extern "C" fn died(signal: libc::c_int) {
    let write = |bytes: &[u8]| {
        // SAFETY: the bytes are there; write(2) may be called from a handler.
        unsafe { libc::write(2, bytes.as_ptr().cast(), bytes.len()) };
    };
    let mut text = [0; 20];
    write(b"signal ");
    write(digits(signal as u64, &mut text));
    write(b" in case ");
    write(digits(CASE.load(Ordering::Relaxed), &mut text));
    write(b" of seed ");
    write(digits(SEED.load(Ordering::Relaxed), &mut text));
    write(b"\n");
    // SAFETY: ends the process.
    unsafe { libc::_exit(101) };
}

/// From now on.
pub fn install() {
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE] {
        // SAFETY: the handler calls only what handlers may.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = died as *const () as usize;
            action.sa_flags = libc::SA_ONSTACK;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        eprintln!(
            "in case {} of seed {}:",
            CASE.load(Ordering::Relaxed),
            SEED.load(Ordering::Relaxed)
        );
        before(panic);
    }));
}

/// Whether `what` says yes, crashes or doesn't end within the limit, tried in another process.
pub fn in_a_process(limit: Duration, what: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child uses nothing that other threads may have locked but the allocator, which
    // the C library keeps usable; it ends here.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: closes what would print, and ends the process.
        unsafe {
            libc::close(1);
            libc::close(2);
            let status = i32::from(what());
            libc::_exit(status);
        }
    }
    let started = Instant::now();
    loop {
        let mut status = 0;
        // SAFETY: waits for the child only.
        if unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == child {
            return status != 0;
        }
        if started.elapsed() > limit {
            // SAFETY: ends the child only, and takes note of its end.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, &raw mut status, 0);
            }
            return true;
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}
