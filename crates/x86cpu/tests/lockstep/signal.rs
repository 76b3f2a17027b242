//! Says which program ran when the process was about to die of a signal or a panic.

use std::sync::atomic::{AtomicU64, Ordering};

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
