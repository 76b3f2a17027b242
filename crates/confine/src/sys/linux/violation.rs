//! What a forbidden system call leads to: one line, and the end.
#![expect(
    unsafe_code,
    reason = "a signal handler is set and says what happened with calls that are safe in one"
)]

use std::cell::Cell;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use crate::Role;

/// Exit status of Skerry's own failures.
const FAILED: i32 = 125;

thread_local! {
    static ROLE: Cell<Role> = const { Cell::new(Role::Process) };
}

/// Where the line goes besides standard error; below zero: nowhere.
static LAST_WORDS: AtomicI32 = AtomicI32::new(-1);

/// Has the line written to `file` too, which stays open as long as the process.
pub(crate) fn last_words(file: OwnedFd) {
    LAST_WORDS.store(file.into_raw_fd(), Ordering::Relaxed);
}

/// Notes what this thread is.
pub(super) fn note_role(role: Role) {
    ROLE.set(role);
}

/// What the kernel tells of a call that a filter has trapped (`SYS_SECCOMP` of siginfo).
#[repr(C)]
struct Trapped {
    signal: i32,
    errno: i32,
    code: i32,
    padding: i32,
    address: usize,
    call: i32,
    architecture: u32,
}

/// Has SIGSYS say what happened.
pub(super) fn install() -> Result<(), String> {
    // SAFETY: all zero bytes are a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    let handler: extern "C" fn(i32, *const Trapped, *const libc::c_void) = trapped;
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: `action` is whole, and its handler does only what a handler may.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(format!("sigaction: {}", std::io::Error::last_os_error())),
    }
}

extern "C" fn trapped(_signal: i32, info: *const Trapped, _context: *const libc::c_void) {
    // SAFETY: the kernel passes a siginfo that is longer than this.
    let call = unsafe { (*info).call };
    let mut line = Line::default();
    line.text("skerry: a thread of the role ");
    line.text(ROLE.get().name());
    line.text(" made the system call ");
    line.number(call.unsigned_abs());
    line.text(", which its filter forbids: the process ends\n");
    line.write();
    // SAFETY: these take no pointers. SIGSYS is blocked in its handler, so that the first, which
    // filters forbid, ends the process by that signal; where one doesn't, the second does.
    unsafe {
        libc::signal(libc::SIGSYS, libc::SIG_DFL);
        libc::_exit(128 + libc::SIGSYS)
    }
}

/// Ends the process because a thread of `role` couldn't be confined.
pub(super) fn end_for(problem: &str, role: Role) -> ! {
    let mut line = Line::default();
    line.text("skerry: a thread of the role ");
    line.text(role.name());
    line.text(" ");
    line.text(problem);
    line.text(": the process ends\n");
    line.write();
    // SAFETY: it takes no pointer.
    unsafe { libc::_exit(FAILED) }
}

/// Text without an allocator.
struct Line {
    bytes: [u8; 160],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 160],
            length: 0,
        }
    }
}

impl Line {
    fn text(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
    }

    fn number(&mut self, mut number: u32) {
        let mut digits = [0; 10];
        let mut first = digits.len();
        for place in digits.iter_mut().rev() {
            *place = b'0' + (number % 10) as u8;
            number /= 10;
            first -= 1;
            if number == 0 {
                break;
            }
        }
        let digits = digits.get(first..).unwrap_or_default();
        self.text(std::str::from_utf8(digits).unwrap_or_default());
    }

    fn write(&self) {
        for file in [libc::STDERR_FILENO, LAST_WORDS.load(Ordering::Relaxed)] {
            // SAFETY: the bytes are there, as many as that; a descriptor that isn't there is an error.
            unsafe { libc::write(file, self.bytes.as_ptr().cast(), self.length) };
        }
    }
}
