//! Getting a thread out of `KVM_RUN`.
//!
//! A kick is a signal to the thread that runs the processor. The handler sets `immediate_exit` in
//! the page of the processor that this thread is running *now*, so that a signal which arrives
//! between the last check and the system call still keeps the guest from being entered, and one
//! which arrives late does nothing. Together with [`CallWord`](skerry_hypervisor::cancel::CallWord)
//! this leaves no window: the kicker writes the word, then reads the thread; the runner writes the
//! thread, then reads the word.
#![expect(
    unsafe_code,
    reason = "signal handling and the kernel's thread ids have no safe interface"
)]

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use skerry_hypervisor::Kick;

thread_local! {
    /// `immediate_exit` of the processor that this thread is running; null between runs.
    static RUNNING: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
    static THREAD_ID: Cell<i32> = const { Cell::new(0) };
}

/// The handler that was there before ours.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

fn signal_number() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_signal(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    let immediate_exit = RUNNING.get();
    // SAFETY: non-null only while the processor's page is mapped and this thread runs it.
    if let Some(flag) = unsafe { immediate_exit.as_ref() } {
        flag.store(1, Ordering::SeqCst);
    }
    let Some(previous) = PREVIOUS.get() else {
        return;
    };
    match previous.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {}
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the kernel gave us this handler as one of three arguments.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: the kernel gave us this handler as one of one argument.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

/// Installs the handler, once for the process; a handler that was there is called after ours.
pub(crate) fn install() -> io::Result<()> {
    INSTALLED
        .get_or_init(|| {
            // SAFETY: all-zero is a valid sigaction, filled in below.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = on_signal as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
            // SAFETY: as above; the kernel fills it in.
            let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: both point to initialised structures; the handler is async-signal-safe.
            if unsafe { libc::sigaction(signal_number(), &action, &mut previous) } != 0 {
                return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
            }
            let _ = PREVIOUS.set(previous);
            Ok(())
        })
        .map_err(io::Error::from_raw_os_error)
}

/// This thread's id for the kernel. On its first use in a thread, also makes sure that the thread
/// takes the signal.
fn this_thread() -> i32 {
    let known = THREAD_ID.get();
    if known != 0 {
        return known;
    }
    // SAFETY: no arguments.
    let tid = unsafe { libc::gettid() };
    // SAFETY: the set is initialised by sigemptyset before it is used.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal_number());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
    }
    THREAD_ID.set(tid);
    tid
}

/// The thread that runs a processor, for those who want it out.
#[derive(Debug, Default)]
pub(crate) struct ThreadKick {
    thread: AtomicI32,
}

impl ThreadKick {
    /// From here to the drop of the guard, a kick reaches this thread.
    ///
    /// `immediate_exit` must be cleared before and stays borrowed as long as the guard lives.
    pub(crate) fn enter<'a>(&'a self, immediate_exit: &'a AtomicU8) -> Running<'a> {
        let thread = this_thread();
        RUNNING.set(immediate_exit);
        self.thread.store(thread, Ordering::SeqCst);
        Running { kick: self }
    }
}

/// This thread is in, or about to enter, the guest.
pub(crate) struct Running<'a> {
    kick: &'a ThreadKick,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.kick.thread.store(0, Ordering::Release);
        RUNNING.set(ptr::null());
    }
}

impl Kick for ThreadKick {
    fn kick(&self) {
        let thread = self.thread.load(Ordering::SeqCst);
        if thread == 0 {
            return;
        }
        // SAFETY: no memory is passed. If the thread has ended meanwhile this fails, and if its
        // number was given to another thread of this process that one takes a harmless signal.
        unsafe {
            libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal_number());
        }
    }
}
