//! From the agent to the program of an exec: a process made with `clone3`, and what it does before
//! `execve`.
//!
//! The child runs on a stack of its own in the agent's memory while the thread that made it waits
//! (`CLONE_VM | CLONE_VFORK`, clone(2)): no page table is copied, and a failed step is simply
//! written down where the agent reads it. The agent handles no signal, so neither does the child. It
//! is born in the cgroup of the user's processes, so that a freeze can't miss it.
#![expect(unsafe_code, reason = "code between clone and exec")]

use std::arch::asm;
use std::ffi::{CStr, CString, c_char, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

/// Stack of a child up to its `execve`.
const STACK: usize = 32 * 1024;

/// `struct clone_args` of Linux's `sched.h`, up to the field of Linux 5.7.
#[repr(C)]
#[derive(Debug, Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// A flag of `struct clone_args` that doesn't fit the older calls' type.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// Makes a process that runs `entry(argument)` in this process's memory, and waits until that
/// process has ended or become another program.
///
/// # Safety
///
/// `entry` must not return, unwind, allocate or take locks, and must touch nothing but `argument`
/// and its own stack; the descriptors that `args` names must be what they are said to be.
unsafe fn vfork(
    args: &mut CloneArgs,
    entry: unsafe extern "C" fn(*mut c_void) -> !,
    argument: *mut c_void,
) -> io::Result<i32> {
    let mut stack = MaybeUninit::<[u128; STACK / 16]>::uninit();
    args.flags |= (libc::CLONE_VM | libc::CLONE_VFORK) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.stack = stack.as_mut_ptr() as u64;
    args.stack_size = STACK as u64;
    let mut result = libc::SYS_clone3;
    // SAFETY: the parent's side is an ordinary system call; it returns when the child no longer uses
    // the stack. The child's side starts with the stack pointer at the aligned end of `stack` (System V
    // ABI, x86-64, 3.2.2), calls `entry`, and never gets to what follows.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r13",
            "call r12",
            "ud2",
            "2:",
            inlateout("rax") result,
            in("rdi") &raw const *args,
            in("rsi") size_of::<CloneArgs>(),
            in("r12") entry,
            in("r13") argument,
            out("rcx") _,
            out("r11") _,
        );
    }
    // Exact: an error number or a process id.
    let result = result as i32;
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    Ok(result)
}

/// Steps of the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The process itself.
    Clone,
    /// Session, terminal, streams, signals, cgroup namespace.
    Session,
    /// Working directory.
    Directory,
    /// User and groups.
    Identity,
    /// `execve`.
    Program,
}

/// The step that failed and why.
pub type Failure = (Step, io::Error);

/// What a child takes from its parent.
#[derive(Debug)]
pub struct Child<'a> {
    /// The program's path.
    pub program: &'a CStr,
    /// Arguments.
    pub argv: &'a [CString],
    /// `NAME=value` strings.
    pub envp: &'a [CString],
    /// Working directory.
    pub cwd: &'a CStr,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: &'a [u32],
    /// The calling thread has that identity already.
    pub keep_identity: bool,
    /// Descriptors for its standard streams, all of them above 2.
    pub streams: [BorrowedFd<'a>; 3],
    /// Whether the first is a terminal to control it.
    pub tty: bool,
    /// Directory of the cgroup to be born in.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Cgroup namespace to live in.
    pub namespace: Option<BorrowedFd<'a>>,
}

/// [`Child`] as the child uses it.
struct Plan {
    program: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
    cwd: *const c_char,
    uid: u32,
    gid: u32,
    groups: *const u32,
    group_count: usize,
    streams: [RawFd; 3],
    tty: bool,
    namespace: RawFd,
    /// Signals to set back to their default, bit `n - 1` for signal `n`.
    ignored: u64,
    keep_identity: bool,
    failed: Option<(Step, i32)>,
}

impl Child<'_> {
    /// Starts the program: its process id and a descriptor of its process. A child that failed before
    /// its program began has been collected.
    pub fn start(&self) -> Result<(i32, OwnedFd), Failure> {
        let argv = pointers(self.argv);
        let envp = pointers(self.envp);
        let mut plan = Plan {
            program: self.program.as_ptr(),
            argv: argv.as_ptr(),
            envp: envp.as_ptr(),
            cwd: self.cwd.as_ptr(),
            uid: self.uid,
            gid: self.gid,
            groups: self.groups.as_ptr(),
            group_count: self.groups.len(),
            streams: self.streams.map(|stream| stream.as_raw_fd()),
            tty: self.tty,
            namespace: self.namespace.map_or(-1, |fd| fd.as_raw_fd()),
            ignored: ignored_signals(),
            keep_identity: self.keep_identity,
            failed: None,
        };
        let mut pidfd: RawFd = -1;
        let mut args = CloneArgs {
            flags: libc::CLONE_PIDFD as u64,
            pidfd: &raw mut pidfd as u64,
            ..CloneArgs::default()
        };
        if let Some(cgroup) = self.cgroup {
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = cgroup.as_raw_fd() as u64;
        }
        // SAFETY: `run_child` keeps to the contract; the plan and all that it points to outlive the
        // call, and only the child writes to it meanwhile.
        let pid = unsafe { vfork(&mut args, run_child, (&raw mut plan).cast()) }
            .map_err(|error| (Step::Clone, error))?;
        // SAFETY: a successful clone with CLONE_PIDFD has put a new descriptor there.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        if let Some((step, code)) = plan.failed {
            crate::sys::wait_for_child(pid);
            return Err((step, io::Error::from_raw_os_error(code)));
        }
        Ok((pid, pidfd))
    }
}

/// Runs `entry` in a cgroup and in this process's memory and descriptors, and returns its result.
///
/// `entry` runs while this thread waits: it may make system calls and nothing else.
pub fn run_in_cgroup<T>(
    cgroup: BorrowedFd<'_>,
    entry: fn() -> Result<T, rustix::io::Errno>,
) -> io::Result<T> {
    struct Errand<T> {
        entry: fn() -> Result<T, rustix::io::Errno>,
        result: Option<Result<T, rustix::io::Errno>>,
    }
    unsafe extern "C" fn run<T>(argument: *mut c_void) -> ! {
        // SAFETY: the argument is the errand below, which nobody else uses meanwhile.
        let errand = unsafe { &mut *argument.cast::<Errand<T>>() };
        errand.result = Some((errand.entry)());
        // SAFETY: ends this process without touching memory.
        unsafe { libc::_exit(0) }
    }
    let mut errand = Errand {
        entry,
        result: None,
    };
    let mut args = CloneArgs {
        flags: CLONE_INTO_CGROUP | libc::CLONE_FILES as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    // SAFETY: `run` calls a function of the module that sets cgroups up, which makes system calls only.
    let pid = unsafe { vfork(&mut args, run::<T>, (&raw mut errand).cast()) }?;
    crate::sys::wait_for_child(pid);
    Ok(errand.result.ok_or(io::ErrorKind::Interrupted)??)
}

/// Pointers to C strings with the null pointer that ends them.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    let pointers = strings.iter().map(|string| string.as_ptr());
    pointers.chain([std::ptr::null()]).collect()
}

/// The signals that this process ignores, which its programs must not; they don't change.
fn ignored_signals() -> u64 {
    static IGNORED: OnceLock<u64> = OnceLock::new();
    *IGNORED.get_or_init(|| {
        let is_ignored = |signal: i32| {
            // SAFETY: all-zero bytes are a valid action.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: the action is writable and no new one is given.
            let result = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
            result == 0 && action.sa_sigaction == libc::SIG_IGN
        };
        (1..=64)
            .filter(|&signal| is_ignored(signal))
            .fold(0, |set, signal| set | 1 << (signal - 1))
    })
}

/// The child's side.
unsafe extern "C" fn run_child(argument: *mut c_void) -> ! {
    // SAFETY: the argument is the plan of `Child::start`, which nobody else uses meanwhile.
    let plan = unsafe { &mut *argument.cast::<Plan>() };
    // SAFETY: the plan's pointers are valid, as `Child::start` made them.
    plan.failed = Some(unsafe { prepare_and_exec(plan) });
    // SAFETY: ends this process without touching memory.
    unsafe { libc::_exit(127) }
}

/// Does every step; comes back with the one that failed.
///
/// # Safety
///
/// The plan's pointers are valid. To be called in a child of [`vfork`] only.
unsafe fn prepare_and_exec(plan: &Plan) -> (Step, i32) {
    macro_rules! step {
        ($step:expr, $call:expr) => {
            // SAFETY: a system call on the plan's values; the C library's wrappers used here touch
            // nothing but `errno` of the thread that waits.
            if unsafe { $call } < 0 {
                return ($step, last_error());
            }
        };
    }
    step!(Step::Session, libc::setsid());
    if plan.tty {
        step!(
            Step::Session,
            libc::ioctl(plan.streams[0], libc::TIOCSCTTY, 0)
        );
    }
    for (target, stream) in (0..).zip(plan.streams) {
        step!(Step::Session, libc::dup2(stream, target));
    }
    // SAFETY: the kernel's own call on this process alone: the C library's would note it for the agent.
    unsafe { reset_signals(plan.ignored) };
    if plan.namespace >= 0 {
        step!(
            Step::Session,
            libc::setns(plan.namespace, libc::CLONE_NEWCGROUP)
        );
    }
    step!(Step::Directory, libc::chdir(plan.cwd));
    if !plan.keep_identity {
        // Groups first, user last: after that the right to change groups is gone. The kernel's own
        // calls: the C library's would change the agent's threads too.
        let (uid, gid) = (plan.uid, plan.gid);
        step!(
            Step::Identity,
            libc::syscall(libc::SYS_setgroups, plan.group_count, plan.groups)
        );
        step!(
            Step::Identity,
            libc::syscall(libc::SYS_setresgid, gid, gid, gid)
        );
        step!(
            Step::Identity,
            libc::syscall(libc::SYS_setresuid, uid, uid, uid)
        );
    }
    step!(
        Step::Program,
        libc::execve(plan.program, plan.argv, plan.envp)
    );
    (Step::Program, libc::EIO)
}

/// Error number of the last call.
fn last_error() -> i32 {
    io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}

/// Default dispositions for the signals in `ignored`, and none blocked.
///
/// # Safety
///
/// To be called in a child of [`vfork`] only.
unsafe fn reset_signals(ignored: u64) {
    /// `struct sigaction` of the kernel (not the C library's): handler, flags, restorer, mask.
    type KernelAction = [u64; 4];
    const SET_BYTES: usize = size_of::<u64>();
    let default: KernelAction = [0; 4];
    for signal in (1..=64u64).filter(|signal| ignored & (1 << (signal - 1)) != 0) {
        // SAFETY: `default` has the kernel's layout. SIGKILL and SIGSTOP are never ignored.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                &raw const default,
                std::ptr::null_mut::<KernelAction>(),
                SET_BYTES,
            );
        }
    }
    let none = 0u64;
    // SAFETY: `none` is a set of the kernel's size, and the old one isn't asked for.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            std::ptr::null_mut::<u64>(),
            SET_BYTES,
        );
    }
}
