//! What an exec's process is made of: its streams, its identity, and what a failure means.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pipe::PipeFlags;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use skerry_protocol::message::{ExecFailure, FailureKind, WinSize};

use super::child::{self, Child, Step};
use super::user::User;
use super::{Desk, ExecServer, failure, lookup, show};
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
    /// The other ends of both pipes: held until the command has ended, so that the pipes' ends are
    /// news only then.
    pub writers: Option<[OwnedFd; 2]>,
    /// The terminal's controlling side.
    pub terminal: Option<OwnedFd>,
}

/// The child's end of a stream.
enum Stream<'a> {
    Own(OwnedFd),
    Shared(BorrowedFd<'a>),
}

impl AsFd for Stream<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Own(fd) => fd.as_fd(),
            Self::Shared(fd) => *fd,
        }
    }
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
    pub fn start(self, server: &ExecServer, desk: &mut Desk) -> Result<Running, ExecFailure> {
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
            None => self
                .pipes(&server.null)
                .map_err(|error| resources("pipes", error))?,
        };
        let cgroup = server.cgroup.as_deref();
        let mut result = self.spawn(&streams, cgroup, desk);
        if let Err((Step::Directory, error)) = &result
            && error.kind() == io::ErrorKind::NotFound
        {
            std::fs::create_dir_all(&self.cwd).map_err(|error| bad_cwd(&self.cwd, &error))?;
            result = self.spawn(&streams, cgroup, desk);
        }
        let (pid, pidfd) = result.map_err(|(step, error)| self.explain(step, &error))?;
        let writers = match streams {
            [_, Stream::Own(out), Stream::Own(err)] if self.tty.is_none() => Some([out, err]),
            _ => None,
        };
        Ok(Running {
            pid,
            pidfd,
            stdin: ends.stdin,
            stdout: ends.stdout,
            stderr: ends.stderr,
            writers,
            terminal: ends.terminal,
        })
    }

    /// Pipes for output and errors, and for input where it is wanted: the child's ends and ours.
    fn pipes<'a>(&self, null: &'a OnceLock<OwnedFd>) -> io::Result<([Stream<'a>; 3], Ends)> {
        let (out_read, out_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (err_read, err_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (stdin, in_write) = if self.stdin {
            let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            self.give(&read)?;
            set_nonblocking(&write)?;
            (Stream::Own(above(read)?), Some(write))
        } else {
            (Stream::Shared(open_null(null)?.as_fd()), None)
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
        let streams = [
            stdin,
            Stream::Own(above(out_write)?),
            Stream::Own(above(err_write)?),
        ];
        Ok((streams, ends))
    }

    fn terminal(&self, size: WinSize) -> io::Result<([Stream<'static>; 3], Ends)> {
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
        let copy = || slave.try_clone().and_then(above).map(Stream::Own);
        Ok(([copy()?, copy()?, copy()?], ends))
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
        streams: &[Stream<'_>; 3],
        cgroup: Option<&Cgroup>,
        desk: &mut Desk,
    ) -> Result<(i32, OwnedFd), child::Failure> {
        let no_nul = |_| (Step::Program, io::Error::from_raw_os_error(libc::ENOENT));
        let program = CString::new(self.program.as_os_str().as_bytes()).map_err(no_nul)?;
        let cwd = CString::new(self.cwd.as_os_str().as_bytes()).map_err(no_nul)?;
        let keep_identity = self.match_identity(desk);
        let start = |directory: Option<BorrowedFd<'_>>| {
            let child = Child {
                program: &program,
                argv: &self.argv,
                envp: &self.envp,
                cwd: &cwd,
                uid: self.user.uid,
                gid: self.user.gid,
                groups: &self.user.groups,
                keep_identity,
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

    /// Whether this thread has the command's identity, so that the child inherits it: always root's,
    /// where the agent is root, as a thread may have groups of its own.
    fn match_identity(&self, desk: &mut Desk) -> bool {
        let own = rustix::process::geteuid();
        if !own.is_root() {
            // A test's ordinary process may only keep the identity that it has.
            return own.as_raw() == self.user.uid;
        }
        if (self.user.uid, self.user.gid) != (0, 0) {
            return false;
        }
        if desk.groups.as_ref() != Some(&self.user.groups) {
            let groups: Vec<Gid> = self
                .user
                .groups
                .iter()
                .copied()
                .map(Gid::from_raw)
                .collect();
            let set = rustix::thread::set_thread_groups(&groups);
            desk.groups = set.is_ok().then(|| self.user.groups.clone());
        }
        desk.groups.is_some()
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

/// `/dev/null`, opened once.
fn open_null(null: &OnceLock<OwnedFd>) -> io::Result<&OwnedFd> {
    if let Some(null) = null.get() {
        return Ok(null);
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let opened = above(rustix::fs::open("/dev/null", flags, Mode::empty())?)?;
    Ok(null.get_or_init(|| opened))
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
