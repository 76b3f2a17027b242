//! Making the process of an exec.
#![expect(unsafe_code, reason = "code between fork and exec")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use skerry_protocol::message::{ExecFailure, FailureKind, WinSize};

use super::user::User;
use super::{failure, lookup, show};
use crate::reap::Reaper;

/// What `execve` and the steps before it take.
#[derive(Debug)]
pub struct Launch {
    /// The program's path.
    pub program: PathBuf,
    /// Arguments, the program's name first.
    pub argv: Vec<CString>,
    /// `NAME=value` strings.
    pub envp: Vec<CString>,
    /// Working directory.
    pub cwd: PathBuf,
    /// Whom to run as.
    pub user: User,
    /// A terminal of this size instead of pipes.
    pub tty: Option<WinSize>,
    /// Whether standard input is a pipe rather than `/dev/null`.
    pub stdin: bool,
}

/// A running command and the agent's ends of its streams, none of which blocks.
#[derive(Debug)]
pub struct Running {
    /// Process id; also its session and process group.
    pub pid: i32,
    /// Readable when the process has ended.
    pub pidfd: OwnedFd,
    /// Where to write its input, unless it has none.
    pub stdin: Option<OwnedFd>,
    /// Where to read its output, or the terminal's.
    pub stdout: Option<OwnedFd>,
    /// Where to read its errors; with a terminal there is no such stream.
    pub stderr: Option<OwnedFd>,
    /// The terminal's controlling side.
    pub terminal: Option<OwnedFd>,
}

/// Steps of the child; the number of the one that failed travels above the error number.
#[derive(Clone, Copy)]
enum Step {
    Session = 1,
    Directory = 2,
    Identity = 3,
    Program = 4,
}

const STEP_SHIFT: u32 = 16;

/// The child's ends of the streams.
struct ChildEnds {
    stdin: Stdio,
    stdout: Stdio,
    stderr: Stdio,
}

impl Launch {
    /// Starts the command. The child belongs to the caller, who releases it from `reaper`.
    pub fn start(self, reaper: &Reaper) -> Result<Running, ExecFailure> {
        let resources = |what: &str, error: io::Error| {
            failure(
                FailureKind::Resources,
                format!("No {what} for the command: {error}"),
            )
        };
        let (ends, mut running) = match self.tty {
            Some(size) => self
                .terminal(size)
                .map_err(|error| resources("terminal", error))?,
            None => self.pipes().map_err(|error| resources("pipes", error))?,
        };
        let pid = reaper
            .spawn(|| self.fork(ends))
            .map_err(|error| self.explain(&error))?;
        let opened = Pid::from_raw(pid)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
            .and_then(|pid| Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?));
        match opened {
            Ok(pidfd) => running.pidfd = pidfd,
            Err(error) => {
                reaper.release(pid);
                return Err(resources("process handle", error));
            }
        }
        running.pid = pid;
        Ok(running)
    }

    fn pipes(&self) -> io::Result<(ChildEnds, Running)> {
        let (out_read, out_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (err_read, err_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (stdin, in_write) = if self.stdin {
            let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            self.give(&read)?;
            set_nonblocking(&write)?;
            (Stdio::from(read), Some(write))
        } else {
            (Stdio::null(), None)
        };
        self.give(&out_write)?;
        self.give(&err_write)?;
        set_nonblocking(&out_read)?;
        set_nonblocking(&err_read)?;
        let ends = ChildEnds {
            stdin,
            stdout: out_write.into(),
            stderr: err_write.into(),
        };
        let running = Running {
            pid: 0,
            pidfd: out_read.try_clone()?,
            stdin: in_write,
            stdout: Some(out_read),
            stderr: Some(err_read),
            terminal: None,
        };
        Ok((ends, running))
    }

    fn terminal(&self, size: WinSize) -> io::Result<(ChildEnds, Running)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&master)?;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        rustix::termios::tcsetwinsize(&master, winsize(size))?;
        self.give(&slave)?;
        rustix::fs::fchmod(&slave, Mode::from_raw_mode(0o620))?;
        set_nonblocking(&master)?;
        let ends = ChildEnds {
            stdin: slave.try_clone()?.into(),
            stdout: slave.try_clone()?.into(),
            stderr: slave.into(),
        };
        let running = Running {
            pid: 0,
            pidfd: master.try_clone()?,
            stdin: self.stdin.then(|| master.try_clone()).transpose()?,
            stdout: Some(master.try_clone()?),
            stderr: None,
            terminal: Some(master),
        };
        Ok((ends, running))
    }

    /// Makes the command's user the owner of a stream, so that it can open `/dev/stdout` anew.
    fn give(&self, stream: &OwnedFd) -> io::Result<()> {
        if rustix::process::geteuid().as_raw() == self.user.uid {
            return Ok(());
        }
        Ok(rustix::fs::fchown(
            stream,
            Some(Uid::from_raw(self.user.uid)),
            None,
        )?)
    }

    fn fork(&self, ends: ChildEnds) -> io::Result<i32> {
        let program = CString::new(self.program.as_os_str().as_bytes())?;
        let cwd = CString::new(self.cwd.as_os_str().as_bytes())?;
        let argv = pointers(&self.argv);
        let envp = pointers(&self.envp);
        let groups: Vec<Gid> = self
            .user
            .groups
            .iter()
            .map(|&gid| Gid::from_raw(gid))
            .collect();
        let (uid, gid) = (Uid::from_raw(self.user.uid), Gid::from_raw(self.user.gid));
        let tty = self.tty.is_some();

        let child_side = move || {
            at(Step::Session, prepare_session(tty))?;
            at(
                Step::Directory,
                rustix::process::chdir(&cwd).map_err(io::Error::from),
            )?;
            at(Step::Identity, take_identity(uid, gid, &groups))?;
            // SAFETY: both arrays end with a null pointer, and their strings live in `self`,
            // which outlives the fork.
            unsafe { libc::execve(program.as_ptr(), argv.first(), envp.first()) };
            at(Step::Program, Err(io::Error::last_os_error()))
        };
        let mut command = Command::new(&self.program);
        command
            .stdin(ends.stdin)
            .stdout(ends.stdout)
            .stderr(ends.stderr);
        // SAFETY: the closure allocates nothing and takes no lock: system calls on data made above.
        unsafe { command.pre_exec(child_side) };
        let child = command.spawn()?;
        i32::try_from(child.id()).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// What a failed fork or child step means.
    fn explain(&self, error: &io::Error) -> ExecFailure {
        let code = error.raw_os_error().unwrap_or(0);
        let inner = io::Error::from_raw_os_error(code & ((1 << STEP_SHIFT) - 1));
        let name = self
            .argv
            .first()
            .map(|name| name.to_bytes())
            .unwrap_or_default();
        match code >> STEP_SHIFT {
            step if step == Step::Program as i32 => lookup::exec_failure(name, &inner),
            step if step == Step::Directory as i32 => bad_cwd(&self.cwd, &inner),
            step if step == Step::Identity as i32 => {
                let (uid, gid) = (self.user.uid, self.user.gid);
                let text = format!("Command cannot run as user {uid}, group {gid}: {inner}");
                failure(FailureKind::BadUser, text)
            }
            _ => {
                let text = format!("No process for command \"{}\": {inner}", show(name));
                failure(FailureKind::Resources, text)
            }
        }
    }
}

/// The failure for a working directory that can't be entered.
pub fn bad_cwd(cwd: &Path, error: &io::Error) -> ExecFailure {
    let text = format!(
        "Working directory \"{}\" cannot be entered: {error}",
        cwd.display()
    );
    failure(FailureKind::BadCwd, text)
}

/// A terminal size for the kernel.
#[must_use]
pub fn winsize(size: WinSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: size.x_pixels,
        ws_ypixel: size.y_pixels,
    }
}

/// Pointers to C strings with the null pointer that ends them.
struct Pointers(Vec<*const libc::c_char>);

// SAFETY: the pointers are only read, by one process after a fork.
unsafe impl Send for Pointers {}
// SAFETY: as above.
unsafe impl Sync for Pointers {}

impl Pointers {
    fn first(&self) -> *const *const libc::c_char {
        self.0.as_ptr()
    }
}

fn pointers(strings: &[CString]) -> Pointers {
    Pointers(
        strings
            .iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect(),
    )
}

/// Marks an error with the step that it happened in. Runs between fork and exec.
fn at<T>(step: Step, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| {
        let code = error.raw_os_error().unwrap_or(libc::EIO);
        io::Error::from_raw_os_error((step as i32) << STEP_SHIFT | code)
    })
}

/// Own session, terminal, default signal dispositions. Runs between fork and exec.
fn prepare_session(tty: bool) -> io::Result<()> {
    rustix::process::setsid()?;
    if tty {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
    }
    for signal in 1..=64 {
        // SAFETY: "default" involves no handler. Refused for SIGKILL, SIGSTOP and the C library's
        // own signals, which are never altered.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: all-zero bytes are the empty set of Linux.
    let none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `none` is valid, and the old mask isn't asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) };
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(())
}

/// Groups first, user last: after that the right to change groups is gone. Runs between fork and
/// exec, where the process has one thread.
fn take_identity(uid: Uid, gid: Gid, groups: &[Gid]) -> io::Result<()> {
    // A test's ordinary process may only keep the identity that it has.
    if !rustix::process::geteuid().is_root() && rustix::process::geteuid() == uid {
        return Ok(());
    }
    rustix::thread::set_thread_groups(groups)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}
