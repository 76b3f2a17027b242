//! Which system calls: seccomp.
//!
//! Lists of what is allowed, for x86-64; all else ends the process. Two things fail instead, because
//! the C library tries them by itself and can do without: `clone3`, whose arguments no filter sees
//! (threads are made with `clone`, whose flags can be seen), and files that are opened by name where a
//! thread has no use for any.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use libc::*;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

use super::{tree, violation};
use crate::Role;

/// Asks for the vector that the kernel gave the program, for page sizes and the like (`linux/prctl.h`).
const PR_GET_AUXV: c_int = 0x4155_5856;

/// A call that is allowed whatever its arguments.
type Calls = &'static [c_long];

/// What Rust's and C's libraries do on every thread: memory, locks, time, its end.
///
/// A thread gives up its capabilities before it is narrowed; one that a narrowed thread starts does so
/// again, with that one's filter on, and has none to win.
const COMMON: Calls = &[
    SYS_brk,
    SYS_capset,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_exit,
    SYS_exit_group,
    SYS_futex,
    SYS_getpid,
    SYS_getrandom,
    SYS_gettid,
    SYS_gettimeofday,
    SYS_madvise,
    SYS_membarrier,
    SYS_mremap,
    SYS_munmap,
    SYS_nanosleep,
    SYS_restart_syscall,
    SYS_rseq,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_getaffinity,
    SYS_sched_yield,
    SYS_set_robust_list,
    SYS_sigaltstack,
];

/// Reading, writing and waiting at descriptors that are open, and what files are.
const STREAMS: Calls = &[
    SYS_close,
    SYS_dup,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_epoll_wait,
    SYS_eventfd2,
    SYS_fstat,
    SYS_lseek,
    SYS_newfstatat,
    SYS_poll,
    SYS_ppoll,
    SYS_read,
    SYS_readv,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_sendto,
    SYS_shutdown,
    SYS_statx,
    SYS_write,
    SYS_writev,
];

/// The content of files that are open.
const CONTENT: Calls = &[
    SYS_copy_file_range,
    SYS_fadvise64,
    SYS_fallocate,
    SYS_fdatasync,
    SYS_fstatfs,
    SYS_fsync,
    SYS_ftruncate,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_sendfile,
    SYS_splice,
    SYS_sync_file_range,
];

/// Files by name, as far as Landlock lets them be.
const NAMES: Calls = &[
    SYS_access,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_flock,
    SYS_getcwd,
    SYS_getdents64,
    SYS_link,
    SYS_linkat,
    SYS_lstat,
    SYS_memfd_create,
    SYS_mkdir,
    SYS_mkdirat,
    SYS_open,
    SYS_openat,
    SYS_openat2,
    SYS_readlink,
    SYS_readlinkat,
    SYS_rename,
    SYS_renameat,
    SYS_renameat2,
    SYS_rmdir,
    SYS_stat,
    SYS_statfs,
    SYS_symlink,
    SYS_symlinkat,
    SYS_umask,
    SYS_unlink,
    SYS_unlinkat,
    SYS_utimensat,
];

/// What else a server of folders does.
const SHARES: Calls = &[
    SYS_capget,
    SYS_capset,
    SYS_fchown,
    SYS_fchownat,
    SYS_fgetxattr,
    SYS_flistxattr,
    SYS_fremovexattr,
    SYS_fsetxattr,
    SYS_getxattr,
    SYS_inotify_add_watch,
    SYS_inotify_init1,
    SYS_inotify_rm_watch,
    SYS_lgetxattr,
    SYS_listxattr,
    SYS_llistxattr,
    SYS_lremovexattr,
    SYS_lsetxattr,
    SYS_mknodat,
    SYS_name_to_handle_at,
    SYS_open_by_handle_at,
    SYS_removexattr,
    SYS_setfsgid,
    SYS_setfsuid,
    SYS_setresgid,
    SYS_setresuid,
    SYS_setxattr,
    SYS_syncfs,
    SYS_fchdir,
];

/// The sockets of a network. Which ones: [`sockets`].
const NETWORK: Calls = &[
    SYS_accept4,
    SYS_bind,
    SYS_connect,
    SYS_getpeername,
    SYS_getsockname,
    SYS_getsockopt,
    SYS_listen,
    SYS_pipe2,
    SYS_recvmmsg,
    SYS_sendmmsg,
    SYS_setsockopt,
    SYS_splice,
];

/// A server of a socket that is there.
const SERVER: Calls = &[
    SYS_accept4,
    SYS_bind,
    SYS_getsockname,
    SYS_getsockopt,
    SYS_listen,
    SYS_pipe2,
    SYS_setsockopt,
];

/// What the process does besides: its own end, its children's, its threads' filters.
const PROCESS: Calls = &[
    SYS_capget,
    SYS_capset,
    SYS_epoll_create1,
    SYS_getegid,
    SYS_geteuid,
    SYS_getgid,
    SYS_getppid,
    SYS_getrusage,
    SYS_getsid,
    SYS_getuid,
    SYS_pause,
    SYS_pidfd_open,
    SYS_prlimit64,
    SYS_seccomp,
    SYS_setsid,
    SYS_signalfd4,
    SYS_sysinfo,
    SYS_timerfd_create,
    SYS_timerfd_settime,
    SYS_times,
    SYS_uname,
    SYS_wait4,
    SYS_waitid,
];

/// The lists of a role.
fn lists(role: Role) -> Vec<Calls> {
    let mut lists = vec![COMMON];
    lists.extend_from_slice(match role {
        Role::Process => &[STREAMS, CONTENT, NAMES, SHARES, NETWORK, SERVER, PROCESS][..],
        Role::Vcpu => &[STREAMS, CONTENT, MACHINE],
        Role::Network => &[STREAMS, NETWORK, RESOLVER],
        Role::Control => &[STREAMS, CONTENT, NAMES, SERVER],
        Role::Stream | Role::Timer | Role::Tap => &[STREAMS],
        Role::Storage => &[STREAMS, CONTENT, NAMES],
        Role::Share => &[STREAMS, CONTENT, NAMES, SHARES],
    });
    lists
}

/// What serves a processor's devices and its compiled code.
const MACHINE: Calls = &[SYS_memfd_create, SYS_timerfd_settime, SYS_getrusage];
/// The host's resolver and its configuration; leases of shared networks.
const RESOLVER: Calls = &[
    SYS_epoll_create1,
    SYS_flock,
    SYS_getdents64,
    SYS_openat,
    SYS_unlink,
    SYS_unlinkat,
];

/// An argument, how it is compared, and with what.
type Condition = (u8, Op, u64);

fn rule(conditions: &[Condition]) -> Result<SeccompRule, String> {
    let conditions: Result<Vec<_>, _> = conditions
        .iter()
        .map(|(argument, op, value)| {
            SeccompCondition::new(*argument, Len::Dword, op.clone(), *value)
        })
        .collect();
    conditions.and_then(SeccompRule::new).map_err(text)
}

fn text(error: impl std::fmt::Display) -> String {
    format!("seccomp: {error}")
}

/// `argument` is one of `values`.
fn one_of(argument: u8, values: &[i64]) -> Result<Vec<SeccompRule>, String> {
    let each = values
        .iter()
        .map(|value| rule(&[(argument, Op::Eq, (*value as u64) & 0xffff_ffff)]));
    each.collect()
}

/// Calls that are allowed with some arguments.
fn by_argument(role: Role) -> Result<Vec<(c_long, Vec<SeccompRule>)>, String> {
    const THREAD: u64 = (CLONE_VM | CLONE_THREAD | CLONE_SIGHAND) as u64;
    // New namespaces, or a process of its own.
    const FORBIDDEN: u64 = THREAD
        | (CLONE_NEWNS | CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC) as u64
        | (CLONE_NEWUTS | CLONE_NEWCGROUP | CLONE_VFORK) as u64;
    let own = u64::from(std::process::id());
    let mut rules = vec![
        (
            SYS_clone,
            vec![rule(&[(0, Op::MaskedEq(FORBIDDEN), THREAD)])?],
        ),
        (SYS_tgkill, vec![rule(&[(0, Op::Eq, own)])?]),
        // Its handler says what a filter forbade.
        (SYS_rt_sigaction, vec![rule(&[(0, Op::Ne, SIGSYS as u64)])?]),
        (
            SYS_fcntl,
            one_of(
                1,
                &[
                    F_DUPFD,
                    F_DUPFD_CLOEXEC,
                    F_GETFD,
                    F_SETFD,
                    F_GETFL,
                    F_SETFL,
                    F_OFD_GETLK,
                    F_OFD_SETLK,
                    F_OFD_SETLKW,
                    F_GETLK,
                    F_SETLK,
                    F_SETLKW,
                    F_SETPIPE_SZ,
                    F_GETPIPE_SZ,
                    F_ADD_SEALS,
                    F_GET_SEALS,
                ]
                .map(i64::from),
            )?,
        ),
        (SYS_ioctl, controls(role)?),
    ];
    let executable = PROT_EXEC as u64;
    for call in [SYS_mmap, SYS_mprotect] {
        rules.push(match role {
            // Compiled code: never writable and executable at one address.
            Role::Process | Role::Vcpu => {
                let both = (PROT_EXEC | PROT_WRITE) as u64;
                let allowed = [0, PROT_WRITE as u64, PROT_EXEC as u64];
                let each = allowed
                    .iter()
                    .map(|value| rule(&[(2, Op::MaskedEq(both), *value)]));
                (call, each.collect::<Result<_, _>>()?)
            }
            _ => (call, vec![rule(&[(2, Op::MaskedEq(executable), 0)])?]),
        });
    }
    // A thread that a narrowed one starts narrows itself further.
    let names = [PR_SET_NAME, PR_SET_VMA, PR_SET_NO_NEW_PRIVS, PR_GET_AUXV].map(i64::from);
    rules.push((SYS_prctl, one_of(0, &names)?));
    rules.push((
        SYS_seccomp,
        one_of(0, &[i64::from(SECCOMP_SET_MODE_FILTER)])?,
    ));
    if matches!(role, Role::Process | Role::Network) {
        rules.push((SYS_socket, sockets()?));
    }
    if matches!(role, Role::Process | Role::Control) {
        let stream = SOCK_STREAM as u64;
        let pair = rule(&[(0, Op::Eq, AF_UNIX as u64), (1, Op::MaskedEq(KIND), stream)])?;
        rules.push((SYS_socketpair, vec![pair]));
    }
    Ok(rules)
}

/// The kind of a socket, without its flags.
const KIND: u64 = 0xf;

/// Sockets of the internet's protocols that need no right, and those between machines that share a
/// network.
fn sockets() -> Result<Vec<SeccompRule>, String> {
    let neighbours = SOCK_SEQPACKET as u64;
    let mut rules = vec![rule(&[
        (0, Op::Eq, AF_UNIX as u64),
        (1, Op::MaskedEq(KIND), neighbours),
    ])?];
    for family in [AF_INET, AF_INET6] {
        for kind in [SOCK_STREAM, SOCK_DGRAM] {
            rules.push(rule(&[
                (0, Op::Eq, family as u64),
                (1, Op::MaskedEq(KIND), kind as u64),
            ])?);
        }
    }
    Ok(rules)
}

/// Controls of devices: terminals, files, and KVM for those who run guests. Not one that types into a
/// terminal.
fn controls(role: Role) -> Result<Vec<SeccompRule>, String> {
    let mut rules = one_of(1, &[FIONBIO as i64, FIONREAD as i64, FIOCLEX as i64])?;
    if matches!(role, Role::Process | Role::Stream) {
        let terminal = [
            TCGETS, TCSETS, TCSETSW, TCSETSF, TIOCGWINSZ, TCGETS2, TCSETS2, TCSETSW2, TCSETSF2,
        ];
        rules.extend(one_of(1, &terminal.map(|control| control as i64))?);
    }
    if !matches!(role, Role::Stream | Role::Timer | Role::Network | Role::Tap) {
        rules.extend(one_of(1, &[FICLONE as i64, FICLONERANGE as i64])?);
    }
    if matches!(
        role,
        Role::Process | Role::Vcpu | Role::Timer | Role::Control
    ) {
        const KVM: u64 = 0xae00;
        rules.push(rule(&[(1, Op::MaskedEq(0xff00), KVM)])?);
    } else {
        // Whatever thread serves a device interrupts the guest (KVM_SIGNAL_MSI).
        const SIGNAL_MSI: u64 = 0x4020_aea5;
        rules.push(rule(&[(1, Op::Eq, SIGNAL_MSI)])?);
    }
    if matches!(role, Role::Process | Role::Tap) {
        // Of the device that was opened before: how frames come, and not which device it is.
        const TUNSETOFFLOAD: i64 = 0x4004_54d0;
        rules.extend(one_of(1, &[TUNSETOFFLOAD])?);
    }
    Ok(rules)
}

/// What fails, as where it can't be had, and ends nothing.
fn refusals(role: Role) -> Option<(Calls, c_int)> {
    match role {
        // Not what its flags say can be looked into.
        Role::Process => Some((&[SYS_clone3], ENOSYS)),
        Role::Vcpu | Role::Stream | Role::Timer | Role::Tap => {
            Some((&[SYS_open, SYS_openat], EACCES))
        }
        Role::Network | Role::Control | Role::Storage | Role::Share => None,
    }
}

/// The filters of a role, in the order in which they are put on.
fn programs(role: Role) -> Result<Vec<BpfProgram>, String> {
    let build = |rules, otherwise, matched| {
        let filter = SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64);
        filter.and_then(BpfProgram::try_from).map_err(text)
    };
    let every = |calls: Calls| calls.iter().map(|call| (*call, Vec::new()));
    let mut programs = Vec::new();
    let mut allowed = vec![SYS_clone3];
    if let Some((calls, error)) = refusals(role) {
        let refused = SeccompAction::Errno(error.unsigned_abs());
        programs.push(build(
            every(calls).collect(),
            SeccompAction::Allow,
            refused,
        )?);
        // An error yields to a trap.
        allowed.extend_from_slice(calls);
    }
    for calls in lists(role) {
        allowed.extend_from_slice(calls);
    }
    let rules: BTreeMap<_, _> = by_argument(role)?.into_iter().collect();
    let open: Vec<c_long> = rules.keys().copied().collect();
    let filter = build(rules, SeccompAction::Trap, SeccompAction::Allow)?;
    programs.push(tree::before(&allowed, &open, &filter));
    Ok(programs)
}

fn put_on(programs: &[BpfProgram]) -> Result<(), String> {
    programs
        .iter()
        .try_for_each(|program| apply_filter(program).map_err(text))
}

/// Filters what all threads do that begin from now on, and this one.
pub(super) fn filter_process() -> Result<String, String> {
    violation::install()?;
    put_on(&programs(Role::Process)?)?;
    Ok("a list of system calls for each kind of thread; others end the process".to_owned())
}

/// Narrows what this thread may do.
pub(super) fn filter_thread(role: Role) -> Result<(), String> {
    static PROGRAMS: [OnceLock<Result<Vec<BpfProgram>, String>>; Role::ALL.len()] =
        [const { OnceLock::new() }; Role::ALL.len()];
    violation::note_role(role);
    if role == Role::Process {
        return Ok(());
    }
    let Some(place) = PROGRAMS.get(role as usize) else {
        return Err("no such role".to_owned());
    };
    match place.get_or_init(|| programs(role)) {
        Ok(programs) => put_on(programs),
        Err(error) => Err(error.clone()),
    }
}
