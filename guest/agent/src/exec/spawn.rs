//! What an exec's process is made of: its streams, its identity, and what a failure means.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, Uid};
use rustix::pipe::PipeFlags;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use skerry_protocol::message::{ExecFailure, FailureKind, WinSize};

use super::child::{self, Child, Step};
use super::user::User;
use super::{failure, lookup, show};
use crate::cgroup::Cgroup;

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

/// The agent's ends of the streams.
struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
}

impl Launch {
    /// Starts the command. The child belongs to the calling thread, which has to collect it.
    pub fn start(self, cgroup: Option<&Cgroup>) -> Result<Running, ExecFailure> {
        let resources = |what: &str, error: io::Error| {
            failure(
                FailureKind::Resources,
                format!("No {what} for the command: {error}"),
            )
        };
        let (streams, ends) = match self.tty {
            Some(size) => self
                .terminal(size)
                .map_err(|error| resources("terminal", error))?,
            None => self.pipes().map_err(|error| resources("pipes", error))?,
        };
        let (pid, pidfd) = self
            .spawn(&streams, cgroup)
            .map_err(|(step, error)| self.explain(step, &error))?;
        Ok(Running {
            pid,
            pidfd,
            stdin: ends.stdin,
            stdout: ends.stdout,
            stderr: ends.stderr,
            terminal: ends.terminal,
        })
    }

    /// Pipes for output and errors, and for input where it is wanted: the child's ends and ours.
    fn pipes(&self) -> io::Result<([OwnedFd; 3], Ends)> {
        let (out_read, out_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (err_read, err_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (stdin, in_write) = if self.stdin {
            let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            self.give(&read)?;
            set_nonblocking(&write)?;
            (read, Some(write))
        } else {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let null = rustix::fs::open("/dev/null", flags, Mode::empty())?;
            (null, None)
        };
        self.give(&out_write)?;
        self.give(&err_write)?;
        set_nonblocking(&out_read)?;
        set_nonblocking(&err_read)?;
        let ends = Ends {
            stdin: in_write,
            stdout: Some(out_read),
            stderr: Some(err_read),
            terminal: None,
        };
        Ok(([above(stdin)?, above(out_write)?, above(err_write)?], ends))
    }

    fn terminal(&self, size: WinSize) -> io::Result<([OwnedFd; 3], Ends)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&master)?;
        let slave = above(rustix::pty::ioctl_tiocgptpeer(&master, flags)?)?;
        rustix::termios::tcsetwinsize(&master, winsize(size))?;
        self.give(&slave)?;
        rustix::fs::fchmod(&slave, Mode::from_raw_mode(0o620))?;
        let master_flags = OFlags::RDWR | OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(&master, master_flags)?;
        let ends = Ends {
            stdin: self.stdin.then(|| master.try_clone()).transpose()?,
            stdout: Some(master.try_clone()?),
            stderr: None,
            terminal: Some(master),
        };
        let streams = [
            above(slave.try_clone()?)?,
            above(slave.try_clone()?)?,
            slave,
        ];
        Ok((streams, ends))
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

    fn spawn(
        &self,
        streams: &[OwnedFd; 3],
        cgroup: Option<&Cgroup>,
    ) -> Result<(i32, OwnedFd), child::Failure> {
        let no_nul = |_| (Step::Program, io::Error::from_raw_os_error(libc::ENOENT));
        let program = CString::new(self.program.as_os_str().as_bytes()).map_err(no_nul)?;
        let cwd = CString::new(self.cwd.as_os_str().as_bytes()).map_err(no_nul)?;
        let start = |directory: Option<BorrowedFd<'_>>| {
            let child = Child {
                program: &program,
                argv: &self.argv,
                envp: &self.envp,
                cwd: &cwd,
                uid: self.user.uid,
                gid: self.user.gid,
                groups: &self.user.groups,
                streams: [streams[0].as_fd(), streams[1].as_fd(), streams[2].as_fd()],
                tty: self.tty.is_some(),
                cgroup: directory,
                namespace: cgroup.map(Cgroup::namespace),
            };
            child.start()
        };
        let Some(cgroup) = cgroup else {
            return start(None);
        };
        match start(Some(cgroup.directory())) {
            // A workload that shares resources out among cgroups of its own leaves none for processes
            // beside them (Linux, admin-guide/cgroup-v2, "No Internal Process Constraint").
            Err((Step::Clone, error)) if error.raw_os_error() == Some(libc::EBUSY) => {
                let leaf = cgroup.leaf().map_err(|error| (Step::Clone, error))?;
                start(Some(leaf.as_fd()))
            }
            result => result,
        }
    }

    /// What a failed step of the child means.
    fn explain(&self, step: Step, error: &io::Error) -> ExecFailure {
        let name = self
            .argv
            .first()
            .map(|name| name.to_bytes())
            .unwrap_or_default();
        match step {
            Step::Program => lookup::exec_failure(name, error),
            Step::Directory => bad_cwd(&self.cwd, error),
            Step::Identity => {
                let (uid, gid) = (self.user.uid, self.user.gid);
                let text = format!("Command cannot run as user {uid}, group {gid}: {error}");
                failure(FailureKind::BadUser, text)
            }
            Step::Clone | Step::Session => {
                let text = format!("No process for command \"{}\": {error}", show(name));
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

/// The stream under a number that the standard streams don't have: the child gives it theirs.
fn above(stream: OwnedFd) -> io::Result<OwnedFd> {
    if stream.as_raw_fd() > 2 {
        return Ok(stream);
    }
    Ok(rustix::io::fcntl_dupfd_cloexec(&stream, 3)?)
}

/// For our end of a pipe, which has no other flags.
fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::fcntl_setfl(&fd, OFlags::NONBLOCK)?)
}
