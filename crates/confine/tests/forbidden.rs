//! What a confined thread of each role is kept from: tried out, one attempt to a process.
//!
//! This program starts itself again for each attempt. An attempt that is stopped is one that an error
//! answers, or that ends its process by SIGSYS with a line on standard error that names the role. One
//! that is allowed shows that attempts can succeed.
#![expect(
    unsafe_code,
    reason = "system calls are made by number, with what an attacker would pass"
)]

use std::ffi::CString;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};

use libc::*;
use skerry_confine::{Layer, Plan, Role, Strictness};

/// Exit statuses of an attempt.
const DONE: u8 = 10;
const REFUSED: u8 = 11;
const UNCONFINED: u8 = 12;

/// A system call and its arguments, with `{}` for what an attempt is given.
struct Attempt(&'static str, fn(&Given) -> c_long);

/// What attempts need.
struct Given {
    /// The process that wants to know.
    maker: c_long,
    /// A file that is none of the plan's.
    secret: CString,
}

fn call(number: c_long, arguments: &[c_long]) -> c_long {
    let argument = |n: usize| arguments.get(n).copied().unwrap_or(0);
    // SAFETY: what is passed are numbers, null pointers, and texts that outlive the call.
    unsafe {
        syscall(
            number,
            argument(0),
            argument(1),
            argument(2),
            argument(3),
            argument(4),
            argument(5),
        )
    }
}

fn text(text: &'static std::ffi::CStr) -> c_long {
    text.as_ptr() as c_long
}

const HERE: c_long = AT_FDCWD as c_long;

/// What no role has any use for.
#[rustfmt::skip]
const FORBIDDEN: &[Attempt] = &[
    Attempt("execve", |_| call(SYS_execve, &[text(c"/bin/true"), 0, 0])),
    Attempt("execveat", |_| call(SYS_execveat, &[HERE, text(c"/bin/true"), 0, 0, 0])),
    Attempt("fork", |_| call(SYS_fork, &[])),
    Attempt("clone of a process", |_| call(SYS_clone, &[SIGCHLD as c_long])),
    Attempt("clone3", |_| call(SYS_clone3, &[0, 0])),
    Attempt("ptrace", |g| call(SYS_ptrace, &[PTRACE_ATTACH as c_long, g.maker])),
    Attempt("open a secret", |g| call(SYS_openat, &[HERE, g.secret.as_ptr() as c_long, O_RDONLY as c_long])),
    Attempt("open /etc/shadow", |_| call(SYS_openat, &[HERE, text(c"/etc/shadow"), O_RDONLY as c_long])),
    Attempt("open /etc/passwd by open", |_| call(SYS_open, &[text(c"/etc/passwd"), O_RDONLY as c_long])),
    Attempt("open the maker's memory", |_| call(SYS_openat, &[HERE, text(c"/proc/1/mem"), O_RDWR as c_long])),
    Attempt("write a secret", |g| call(SYS_openat, &[HERE, g.secret.as_ptr() as c_long, O_WRONLY as c_long])),
    Attempt("truncate a secret", |g| call(SYS_truncate, &[g.secret.as_ptr() as c_long, 0])),
    Attempt("remove a secret", |g| call(SYS_unlinkat, &[HERE, g.secret.as_ptr() as c_long, 0])),
    Attempt("make a file", |_| call(SYS_openat, &[HERE, text(c"/tmp/skerry-made"), (O_CREAT | O_WRONLY) as c_long, 0o600])),
    Attempt("make a folder", |_| call(SYS_mkdirat, &[HERE, text(c"/tmp/skerry-folder"), 0o700])),
    Attempt("make a device", |_| call(SYS_mknodat, &[HERE, text(c"/tmp/skerry-null"), (S_IFCHR | 0o600) as c_long, 0x103])),
    Attempt("link a secret", |g| call(SYS_linkat, &[HERE, g.secret.as_ptr() as c_long, HERE, text(c"/tmp/skerry-link"), 0])),
    Attempt("mount", |_| call(SYS_mount, &[text(c"none"), text(c"/mnt"), text(c"tmpfs"), 0, 0])),
    Attempt("umount", |_| call(SYS_umount2, &[text(c"/proc"), MNT_DETACH as c_long])),
    Attempt("setns", |_| call(SYS_setns, &[0, 0])),
    Attempt("unshare", |_| call(SYS_unshare, &[CLONE_NEWUSER as c_long])),
    Attempt("chroot", |_| call(SYS_chroot, &[text(c"/tmp")])),
    Attempt("pivot_root", |_| call(SYS_pivot_root, &[text(c"/"), text(c"/")])),
    Attempt("bpf", |_| call(SYS_bpf, &[0, 0, 0])),
    Attempt("perf_event_open", |_| call(SYS_perf_event_open, &[0, 0, -1, -1, 0])),
    Attempt("keyctl", |_| call(SYS_keyctl, &[0, -3, 1])),
    Attempt("add_key", |_| call(SYS_add_key, &[text(c"user"), text(c"skerry"), text(c"x"), 1, -2])),
    Attempt("request_key", |_| call(SYS_request_key, &[text(c"user"), text(c"skerry"), 0, -2])),
    Attempt("kexec_load", |_| call(SYS_kexec_load, &[0, 0, 0, 0])),
    Attempt("init_module", |_| call(SYS_init_module, &[0, 0, 0])),
    Attempt("finit_module", |_| call(SYS_finit_module, &[0, 0, 0])),
    Attempt("delete_module", |_| call(SYS_delete_module, &[text(c"none"), 0])),
    Attempt("reboot", |_| call(SYS_reboot, &[0, 0, 0])),
    Attempt("swapon", |_| call(SYS_swapon, &[text(c"/none"), 0])),
    Attempt("acct", |_| call(SYS_acct, &[text(c"/none")])),
    Attempt("sethostname", |_| call(SYS_sethostname, &[text(c"x"), 0])),
    Attempt("clock_settime", |_| call(SYS_clock_settime, &[0, 0])),
    Attempt("settimeofday", |_| call(SYS_settimeofday, &[0, 0])),
    Attempt("iopl", |_| call(SYS_iopl, &[3])),
    Attempt("ioperm", |_| call(SYS_ioperm, &[0x70, 1, 1])),
    Attempt("modify_ldt", |_| call(SYS_modify_ldt, &[0, 0, 0])),
    Attempt("personality", |_| call(SYS_personality, &[0])),
    Attempt("syslog", |_| call(SYS_syslog, &[10, 0, 0])),
    Attempt("userfaultfd", |_| call(SYS_userfaultfd, &[0])),
    Attempt("io_uring_setup", |_| call(SYS_io_uring_setup, &[1, 0])),
    Attempt("fanotify_init", |_| call(SYS_fanotify_init, &[0, 0])),
    Attempt("quotactl", |_| call(SYS_quotactl, &[0, 0, 0, 0])),
    Attempt("process_vm_readv", |g| call(SYS_process_vm_readv, &[g.maker, 0, 0, 0, 0, 0])),
    Attempt("process_vm_writev", |g| call(SYS_process_vm_writev, &[g.maker, 0, 0, 0, 0, 0])),
    Attempt("kill", |g| call(SYS_kill, &[g.maker, 0])),
    Attempt("tkill", |g| call(SYS_tkill, &[g.maker, 0])),
    Attempt("tgkill of another", |g| call(SYS_tgkill, &[g.maker, g.maker, 0])),
    Attempt("pidfd_send_signal", |_| call(SYS_pidfd_send_signal, &[0, 0, 0, 0])),
    Attempt("pidfd_getfd", |_| call(SYS_pidfd_getfd, &[0, 0, 0])),
    Attempt("kcmp", |g| call(SYS_kcmp, &[g.maker, g.maker, 0, 0, 0])),
    Attempt("packet socket", |_| call(SYS_socket, &[AF_PACKET as c_long, SOCK_RAW as c_long, 0])),
    Attempt("netlink socket", |_| call(SYS_socket, &[AF_NETLINK as c_long, SOCK_RAW as c_long, 0])),
    Attempt("unix socket", |_| call(SYS_socket, &[AF_UNIX as c_long, SOCK_STREAM as c_long, 0])),
    Attempt("vsock socket", |_| call(SYS_socket, &[AF_VSOCK as c_long, SOCK_STREAM as c_long, 0])),
    Attempt("raw socket", |_| call(SYS_socket, &[AF_INET as c_long, SOCK_RAW as c_long, 1])),
    Attempt("datagram socketpair", |_| call(SYS_socketpair, &[AF_UNIX as c_long, SOCK_DGRAM as c_long, 0, 0])),
    Attempt("type into the terminal", |_| call(SYS_ioctl, &[0, TIOCSTI as c_long, 0])),
    Attempt("open the TAP devices' door", |_| call(SYS_openat, &[HERE, text(c"/dev/net/tun"), O_RDWR as c_long])),
    Attempt("be another TAP device", |_| call(SYS_ioctl, &[0, 0x4004_54ca, 0])),
    Attempt("dumpable again", |_| call(SYS_prctl, &[PR_SET_DUMPABLE as c_long, 1])),
    Attempt("another handler of SIGSYS", |_| call(SYS_rt_sigaction, &[SIGSYS as c_long, 0, 0, 8])),
    Attempt("memory to write and run", |_| call(SYS_mmap, &[0, 4096, (PROT_READ | PROT_WRITE | PROT_EXEC) as c_long, (MAP_PRIVATE | MAP_ANONYMOUS) as c_long, -1, 0])),
];

/// What roles without compiled code, files or sockets have no use for.
#[rustfmt::skip]
const NARROW: &[(Attempt, &[Role])] = &[
    (Attempt("code", |_| call(SYS_mmap, &[0, 4096, (PROT_READ | PROT_EXEC) as c_long, (MAP_PRIVATE | MAP_ANONYMOUS) as c_long, -1, 0])),
        &[Role::Network, Role::Control, Role::Stream, Role::Timer, Role::Storage, Role::Share, Role::Tap]),
    (Attempt("internet socket", |_| call(SYS_socket, &[AF_INET as c_long, SOCK_STREAM as c_long, 0])),
        &[Role::Vcpu, Role::Control, Role::Stream, Role::Timer, Role::Storage, Role::Share, Role::Tap]),
    (Attempt("make a virtual machine", |_| call(SYS_ioctl, &[0, KVM_CREATE_VM, 0])),
        &[Role::Network, Role::Stream, Role::Storage, Role::Share, Role::Tap]),
    (Attempt("open /proc/self/maps", |_| call(SYS_openat, &[HERE, text(c"/proc/self/maps"), O_RDONLY as c_long])),
        &[Role::Vcpu, Role::Stream, Role::Timer, Role::Tap]),
];

/// What is allowed, to see that attempts can succeed.
#[rustfmt::skip]
const ALLOWED: &[Attempt] = &[
    Attempt("getpid", |_| call(SYS_getpid, &[])),
    // On KVM, every thread that serves a device does: here it gets as far as that there is no guest.
    Attempt("interrupt a guest", |_| match call(SYS_ioctl, &[-1, KVM_SIGNAL_MSI]) {
        -1 if std::io::Error::last_os_error().raw_os_error() == Some(EBADF) => 0,
        _ => -1,
    }),
];
const KVM_CREATE_VM: c_long = 0xae01;
const KVM_SIGNAL_MSI: c_long = 0x4020_aea5;

fn attempts(role: Role) -> impl Iterator<Item = &'static Attempt> {
    let narrow = NARROW
        .iter()
        .filter(move |(_, roles)| roles.contains(&role));
    FORBIDDEN
        .iter()
        .chain(narrow.map(|(attempt, _)| attempt))
        .chain(ALLOWED)
}

fn is_allowed(name: &str) -> bool {
    ALLOWED.iter().any(|attempt| attempt.0 == name)
}

/// In a process of its own: confines itself, becomes `role`, and tries.
fn attempt(role: &str, name: &str, maker: &str, secret: &str) -> u8 {
    let plan = Plan {
        network: true,
        strictness: Strictness::Auto,
        ..Plan::default()
    };
    let role = Role::ALL.into_iter().find(|one| one.name() == role);
    let role = role.expect("a role");
    let given = Given {
        maker: maker.parse().expect("a process"),
        secret: CString::new(secret).expect("a path"),
    };
    let attempt = attempts(role).find(|attempt| attempt.0 == name);
    let attempt = attempt.expect("an attempt");
    let report = skerry_confine::confine(&plan).expect("as far as it goes");
    if !report.holds(Layer::Seccomp) || !report.holds(Layer::Landlock) {
        return UNCONFINED;
    }
    let tried = std::thread::spawn(move || {
        skerry_confine::enter(role);
        (attempt.1)(&given)
    });
    match tried.join().expect("the thread") {
        -1 => REFUSED,
        _ => DONE,
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    if let [_, mode, role, name, maker, secret] = words.as_slice()
        && mode == "--attempt"
    {
        return attempt(role, name, maker, secret).into();
    }
    let own = std::env::current_exe().expect("this program");
    let secret = std::env::temp_dir().join(format!("skerry-secret-{}", std::process::id()));
    std::fs::write(&secret, "secret").expect("a secret");
    let (mut killed, mut refused) = (0, 0);
    for role in Role::ALL {
        for Attempt(name, _) in attempts(role) {
            let output = Command::new(&own)
                .args([
                    "--attempt",
                    role.name(),
                    name,
                    &std::process::id().to_string(),
                ])
                .arg(&secret)
                .stdin(Stdio::null())
                .output()
                .expect("this program again");
            let said = String::from_utf8_lossy(&output.stderr);
            let status = output.status;
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            match (status.signal(), code) {
                _ if is_allowed(name) => assert_eq!(code, Some(DONE), "{role:?}, {name}: {said}"),
                (Some(SIGSYS), _) => {
                    // A thread that is being made has all signals blocked.
                    assert!(said.contains(role.name()), "{role:?}, {name}: {said}");
                    killed += 1;
                }
                (None, Some(REFUSED)) => refused += 1,
                (None, Some(UNCONFINED)) => {
                    println!("skipped: this host has no Landlock or no seccomp");
                    return ExitCode::SUCCESS;
                }
                _ => panic!("{role:?} did it: {name} ({status}, {said})"),
            }
        }
    }
    let kept = std::fs::read(&secret).expect("still there");
    assert_eq!(kept, b"secret");
    std::fs::remove_file(&secret).expect("its end");
    println!("{killed} attempts ended their process, {refused} were refused");
    assert!(killed + refused >= 60 * Role::ALL.len());
    ExitCode::SUCCESS
}
