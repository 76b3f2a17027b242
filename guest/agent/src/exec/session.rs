//! One command from its first frame to its last, in one poll loop.
//!
//! ```text
//!   connection --> decoder --> input buffer (<= STDIN_WINDOW) --> pipe or terminal
//!   pipe(s) or terminal --> frames in the output buffer (<= OUTPUT_LIMIT + one read) --> connection
//!   pidfd --> status;  when the output is drained: Ended
//! ```
//!
//! Nothing in the loop blocks but `poll`. A slow host stops the reading of output, and so the
//! command; a command that doesn't read stops the granting of credit, and so the host.
//!
//! A command ends with its connection, but for a kept one: that goes on without, like under a host
//! that is slow for ever, until another connection comes in through [`super::kept`].

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use skerry_protocol::STDIN_WINDOW;
use skerry_protocol::frame::{self, FrameDecoder, FrameError};
use skerry_protocol::message::{
    ExecCommand, ExecEvent, ExecFailure, ExecRequest, ExitStatus, FailureKind,
};

use super::environment::{DEFAULT_PATH, Environment};
use super::kept::{Lease, Link};
use super::output::Output;
use super::spawn::{self, Launch, Running};
use super::{Desk, ExecServer, failure, lookup, show};
use crate::sys;

/// Output that may wait for the host before the command has to.
const OUTPUT_LIMIT: usize = 256 * 1024;

/// After the command has ended, a descendant may still hold its output open. What it has written
/// is passed on; then the report waits for so long a silence ...
const QUIET: Duration = Duration::from_millis(300);

/// ... and for a descendant that never falls silent so long in all.
const GRACE: Duration = Duration::from_secs(2);

/// How long the news that a command runs may wait for more to say: for most of those that end at
/// once it is one packet less.
const TOGETHER: Duration = Duration::from_millis(4);

/// Serves one exec connection.
pub fn run(
    mut connection: UnixStream,
    server: &ExecServer,
    desk: &mut Desk,
) -> Result<(), FrameError> {
    let mut decoder = FrameDecoder::new();
    let (request, id) = match frame::decode(decoder.read_frame(&mut connection)?)? {
        ExecCommand::Start(request) => (request, None),
        ExecCommand::StartKept { id, request } => (request, Some(id)),
        ExecCommand::Attach { id } => {
            let link = Link {
                connection,
                decoder,
            };
            let Err(mut link) = server.kept.attach(id, link) else {
                return Ok(());
            };
            let text = format!("No kept command {id}");
            let failure = failure(FailureKind::NoSession, text);
            return frame::write(&mut link.connection, &ExecEvent::Failed(failure));
        }
        _ => return Err(FrameError::Malformed),
    };
    let stdin = request.stdin;
    let started = id.map(|id| server.kept.lease(id)).transpose();
    let started = started.and_then(|lease| {
        let launch = prepare(request, server)?;
        Ok((launch.start(server, desk)?, lease))
    });
    match started {
        Ok((process, lease)) => {
            let link = Link {
                connection,
                decoder,
            };
            let mut session = Session::new(process, stdin, lease);
            session.scratch = std::mem::take(&mut desk.scratch);
            let result = session.adopt(link, true).and_then(|()| session.serve());
            if session.status.is_none() {
                session.kill();
            }
            desk.scratch = session.scratch;
            result
        }
        Err(failure) => frame::write(&mut connection, &ExecEvent::Failed(failure)),
    }
}

/// Turns a request into what the kernel takes.
fn prepare(request: ExecRequest, server: &ExecServer) -> Result<Launch, ExecFailure> {
    let user = server.accounts.resolve("/".as_ref(), &request.user)?;
    let uname = rustix::system::uname();
    let hostname = uname.nodename().to_bytes();
    let mut environment = Environment::new(&user.home, hostname, request.tty.is_some());
    environment.extend(&server.env)?;
    environment.extend(&request.env)?;

    let cwd = std::path::Path::new("/").join(spawn_path(&request.cwd)?);
    let Some(name) = request.argv.first() else {
        return Err(failure(FailureKind::BadRequest, "No command to run"));
    };
    let path = environment.get(b"PATH").unwrap_or(DEFAULT_PATH);
    let program = lookup::find(name, path, &cwd)?;
    let argv = request.argv.iter().map(|argument| {
        std::ffi::CString::new(argument.as_slice()).map_err(|_| {
            let text = format!("Argument \"{}\" holds a NUL", show(argument));
            failure(FailureKind::BadRequest, text)
        })
    });
    Ok(Launch {
        program,
        argv: argv.collect::<Result<_, _>>()?,
        envp: environment.strings()?,
        cwd,
        user,
        tty: request.tty,
        stdin: request.stdin,
    })
}

fn spawn_path(bytes: &[u8]) -> Result<&std::path::Path, ExecFailure> {
    use std::os::unix::ffi::OsStrExt;
    if bytes.contains(&0) {
        let text = format!("Working directory \"{}\" holds a NUL", show(bytes));
        return Err(failure(FailureKind::BadRequest, text));
    }
    Ok(std::path::Path::new(std::ffi::OsStr::from_bytes(bytes)))
}

/// Which descriptors the last poll found ready.
struct Ready {
    connection: PollFlags,
    stdin: PollFlags,
    stdout: PollFlags,
    stderr: PollFlags,
    process: PollFlags,
    bell: PollFlags,
}

/// Field of [`Ready`] that belongs to a descriptor.
type Slot = fn(&mut Ready) -> &mut PollFlags;

/// Descriptors for one poll.
#[derive(Default)]
struct Watch<'a> {
    fds: Vec<PollFd<'a>>,
    slots: Vec<Slot>,
}

impl<'a> Watch<'a> {
    fn add(&mut self, fd: &'a impl AsFd, flags: PollFlags, slot: Slot) {
        self.fds.push(PollFd::new(fd, flags));
        self.slots.push(slot);
    }

    fn poll(mut self, timeout: Option<&Timespec>) -> io::Result<Ready> {
        match rustix::event::poll(&mut self.fds, timeout) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let none = PollFlags::empty();
        let mut ready = Ready {
            connection: none,
            stdin: none,
            stdout: none,
            stderr: none,
            process: none,
            bell: none,
        };
        for (fd, slot) in self.fds.iter().zip(&self.slots) {
            *slot(&mut ready) = fd.revents();
        }
        Ok(ready)
    }
}

/// The state of things after the command has ended.
#[derive(Clone, Copy)]
struct End {
    since: Instant,
    /// When output last came, or could not be read because the host was slow.
    last_output: Instant,
    /// Bytes that were in each pipe when the command ended: its own are among them.
    owed: [u64; 2],
}

struct Session {
    /// The host; a kept command may be without.
    link: Option<Link>,
    /// The name of a kept command.
    lease: Option<Lease>,
    process: Running,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    stdin: Option<OwnedFd>,
    /// Input that the command hasn't taken.
    input: Vec<u8>,
    input_ended: bool,
    output: Output,
    status: Option<ExitStatus>,
    ended: Option<End>,
    /// The status is in the output buffer, or with the host.
    told: bool,
    /// The host hasn't been told that the command runs, and waits for nothing else: the news may
    /// travel with the next.
    fresh: bool,
    scratch: Vec<u8>,
}

impl Session {
    fn new(mut process: Running, wants_stdin: bool, lease: Option<Lease>) -> Self {
        Self {
            link: None,
            lease,
            stdout: process.stdout.take(),
            stderr: process.stderr.take(),
            stdin: process.stdin.take().filter(|_| wants_stdin),
            process,
            input: Vec::new(),
            input_ended: false,
            output: Output::default(),
            status: None,
            ended: None,
            told: false,
            scratch: Vec::new(),
            fresh: !wants_stdin,
        }
    }

    /// Goes on with another host, which knows nothing yet unless it is the `first`.
    fn adopt(&mut self, link: Link, first: bool) -> Result<(), FrameError> {
        self.hang_up();
        let pid = ExecEvent::Started(u32::try_from(self.process.pid).unwrap_or(0));
        if first {
            self.output.push(&pid)?;
        } else {
            let input = if self.stdin.is_some() && !self.input_ended {
                // Exact: the buffer never exceeds the window by more than the terminal's end.
                let held = self.input.len().min(STDIN_WINDOW as usize) as u32;
                ExecEvent::StdinCredit(STDIN_WINDOW - held)
            } else {
                ExecEvent::StdinClosed
            };
            self.output.restart(&[pid, input])?;
            self.told = false;
        }
        self.link = Some(link);
        // The first frame may have come with others behind it.
        self.take_frames().or_else(|error| self.lost(error))
    }

    /// Serves whoever waits for a kept command.
    fn meet(&mut self) -> Result<(), FrameError> {
        match self.lease.as_ref().and_then(Lease::newcomer) {
            Some(link) => self.adopt(link, false),
            None => Ok(()),
        }
    }

    fn hang_up(&mut self) {
        if let Some(link) = self.link.take() {
            // Fails when the host was first.
            let _ = link.connection.shutdown(Shutdown::Both);
        }
    }

    /// The connection is of no more use: the end of a session, unless its command is a kept one.
    fn lost(&mut self, error: FrameError) -> Result<(), FrameError> {
        if self.lease.is_none() {
            return Err(error);
        }
        self.hang_up();
        Ok(())
    }

    /// Runs until the host has the status.
    fn serve(&mut self) -> Result<(), FrameError> {
        loop {
            if let Some(status) = self.status
                && !self.told
                && self.is_drained()
            {
                self.told = true;
                self.fresh = false;
                // What a descendant writes from here on is nobody's.
                self.stdout = None;
                self.stderr = None;
                self.output.push(&ExecEvent::Ended(status))?;
            }
            if !self.fresh
                && let Err(error) = self.flush()
            {
                self.lost(error)?;
            }
            // Who started a kept command may be gone without having read: its status stays until
            // the host hangs up in order.
            if self.told && self.output.pending() == 0 && self.lease.is_none() {
                return Ok(());
            }
            if let Some(end) = &mut self.ended
                && self.output.pending() >= OUTPUT_LIMIT
            {
                end.last_output = Instant::now();
            }
            let ready = self.poll()?;
            self.fresh = false;
            if !ready.stdout.is_empty() {
                self.read_output(false)?;
            }
            if !ready.stderr.is_empty() {
                self.read_output(true)?;
            }
            if !ready.process.is_empty() && self.status.is_none() {
                self.collect()?;
            }
            if !ready.stdin.is_empty() {
                self.write_input(ready.stdin)?;
            }
            let connection = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
            if ready.connection.intersects(connection) {
                if self.hear()? {
                    return Ok(());
                }
            } else if !ready.bell.is_empty() {
                // Only when the last host has been heard out.
                self.meet()?;
            }
        }
    }

    /// Reads what the host sent; returns whether it has hung up with the status in its hands.
    fn hear(&mut self) -> Result<bool, FrameError> {
        let Err(error) = self.receive() else {
            return Ok(false);
        };
        let content = self.told && self.output.pending() == 0;
        if !(content && matches!(error, FrameError::Closed)) {
            self.lost(error)?;
            return Ok(false);
        }
        match self.lease.as_ref().and_then(Lease::end) {
            Some(link) => self.adopt(link, false).map(|()| false),
            None => Ok(true),
        }
    }

    fn is_drained(&self) -> bool {
        let Some(end) = self.ended else {
            return false;
        };
        if self.stdout.is_none() && self.stderr.is_none() {
            return true;
        }
        // While the host is slow nothing is read, and silence means nothing.
        let idle = self.output.pending() < OUTPUT_LIMIT;
        let silent = end.last_output.elapsed() >= QUIET || end.since.elapsed() >= GRACE;
        idle && silent && end.owed == [0, 0]
    }

    fn poll(&self) -> Result<Ready, FrameError> {
        let mut watch = Watch::default();
        if let Some(link) = &self.link {
            let mut wanted = PollFlags::IN;
            wanted.set(PollFlags::OUT, self.output.pending() > 0 && !self.fresh);
            watch.add(&link.connection, wanted, |ready| &mut ready.connection);
        }
        let bell = self.lease.as_ref().map(Lease::bell);
        if let Some(bell) = &bell {
            watch.add(bell, PollFlags::IN, |ready| &mut ready.bell);
        }
        if let Some(stdin) = &self.stdin {
            // Without input to write, only the end of the reader is of interest.
            let flags = if self.input.is_empty() {
                PollFlags::empty()
            } else {
                PollFlags::OUT
            };
            // A terminal hangs up when its last user closes it, and more may open it.
            if !(flags.is_empty() && self.process.terminal.is_some()) {
                watch.add(stdin, flags, |ready| &mut ready.stdin);
            }
        }
        let reading = self.output.pending() < OUTPUT_LIMIT;
        if reading {
            if let Some(stdout) = &self.stdout {
                watch.add(stdout, PollFlags::IN, |ready| &mut ready.stdout);
            }
            if let Some(stderr) = &self.stderr {
                watch.add(stderr, PollFlags::IN, |ready| &mut ready.stderr);
            }
        }
        if self.status.is_none() {
            watch.add(&self.process.pidfd, PollFlags::IN, |ready| {
                &mut ready.process
            });
        }
        let silence = self.ended.filter(|_| reading && !self.told).map(|end| {
            let until = (end.last_output + QUIET).min(end.since + GRACE);
            // Rounded up by a little, so that the time is over when poll returns.
            until.saturating_duration_since(Instant::now()) + Duration::from_millis(1)
        });
        let timeout = self
            .fresh
            .then_some(TOGETHER)
            .or(silence)
            .map(|left| Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            });
        Ok(watch.poll(timeout.as_ref())?)
    }

    /// Takes the command's status.
    fn collect(&mut self) -> Result<(), FrameError> {
        let id = WaitId::PidFd(self.process.pidfd.as_fd());
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let Some(status) = rustix::process::waitid(id, options).map_err(io::Error::from)? else {
            return Ok(());
        };
        self.status = Some(match status.terminating_signal() {
            Some(signal) => ExitStatus::Signal {
                signal: signal as u8,
                core: status.dumped(),
            },
            None => ExitStatus::Code(status.exit_status().unwrap_or(0) as u8),
        });
        // Ours were the last but for a descendant's.
        self.process.writers = None;
        if self.output.pending() < OUTPUT_LIMIT {
            self.read_output(false)?;
            self.read_output(true)?;
        }
        let now = Instant::now();
        let waiting = |stream: &Option<OwnedFd>| {
            let stream = stream.as_ref().filter(|_| self.process.terminal.is_none());
            stream
                .and_then(|stream| rustix::io::ioctl_fionread(stream).ok())
                .unwrap_or(0)
        };
        let owed = [waiting(&self.stdout), waiting(&self.stderr)];
        self.ended = Some(End {
            since: now,
            last_output: now,
            owed,
        });
        self.stdin = None;
        self.input.clear();
        Ok(())
    }

    /// Reads output once and frames it.
    fn read_output(&mut self, errors: bool) -> Result<(), FrameError> {
        let stream = if errors {
            &mut self.stderr
        } else {
            &mut self.stdout
        };
        let Some(fd) = stream.as_ref() else {
            return Ok(());
        };
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = match rustix::io::read(fd, &mut scratch) {
            Ok(0) => {
                self.close_output(errors);
                Ok(())
            }
            Ok(length) => {
                if let Some(end) = &mut self.ended {
                    end.last_output = Instant::now();
                    let [out, err] = &mut end.owed;
                    let owed = if errors { err } else { out };
                    *owed = owed.saturating_sub(length as u64);
                }
                let bytes = scratch.get(..length).unwrap_or_default();
                self.output.push(&if errors {
                    ExecEvent::Stderr(bytes)
                } else {
                    ExecEvent::Stdout(bytes)
                })
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            // A terminal that nobody has open reads as an error; while the command lives, it may
            // open it again, but no command of ours does. Linux, tty_ldisc.
            Err(_) => {
                self.close_output(errors);
                Ok(())
            }
        };
        self.scratch = scratch;
        result
    }

    fn close_output(&mut self, errors: bool) {
        let stream = if errors {
            &mut self.stderr
        } else {
            &mut self.stdout
        };
        *stream = None;
        if let Some(End {
            owed: [out, err], ..
        }) = &mut self.ended
        {
            *(if errors { err } else { out }) = 0;
        }
    }

    /// Passes input on and grants the host what that freed.
    fn write_input(&mut self, ready: PollFlags) -> Result<(), FrameError> {
        let Some(stdin) = &self.stdin else {
            return Ok(());
        };
        if self.input.is_empty() {
            return if ready.intersects(PollFlags::ERR) {
                self.close_input()
            } else {
                Ok(())
            };
        }
        match rustix::io::write(stdin, &self.input) {
            Ok(length) => {
                self.input.drain(..length);
                // Exact: the buffer never exceeds the window.
                self.output.push(&ExecEvent::StdinCredit(length as u32))?;
                if self.input.is_empty() && self.input_ended {
                    self.stdin = None;
                }
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(_) => self.close_input(),
        }
    }

    fn close_input(&mut self) -> Result<(), FrameError> {
        self.stdin = None;
        self.input.clear();
        self.output.push(&ExecEvent::StdinClosed)
    }

    /// Reads what the host sent.
    fn receive(&mut self) -> Result<(), FrameError> {
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        match rustix::net::recv(&link.connection, &mut self.scratch, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err(FrameError::Closed),
            Ok((length, _)) => {
                let bytes = self.scratch.get(..length).unwrap_or_default();
                link.decoder.push(bytes);
                self.take_frames()
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    fn take_frames(&mut self) -> Result<(), FrameError> {
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        let mut decoder = std::mem::take(&mut link.decoder);
        let result = loop {
            match decoder.next_frame() {
                Ok(Some(payload)) => {
                    if let Err(error) = self.obey(payload) {
                        break Err(error);
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if let Some(link) = &mut self.link {
            link.decoder = decoder;
        }
        result
    }

    fn obey(&mut self, payload: &[u8]) -> Result<(), FrameError> {
        match frame::decode(payload)? {
            ExecCommand::Stdin(bytes) => {
                if self.stdin.is_none() || self.input_ended {
                    return Ok(());
                }
                if self.input.len() + bytes.len() > STDIN_WINDOW as usize {
                    return Err(FrameError::Malformed);
                }
                self.input.extend_from_slice(bytes);
            }
            ExecCommand::StdinEof => {
                self.input_ended = true;
                if self.process.terminal.is_some() {
                    // A terminal has no end; its end-of-file character, at the start of a line,
                    // is what a person would type.
                    self.input.push(END_OF_TRANSMISSION);
                } else if self.input.is_empty() {
                    self.stdin = None;
                }
            }
            ExecCommand::Resize(size) => {
                if let Some(terminal) = &self.process.terminal {
                    // Fails only for a terminal that is gone.
                    let _ = rustix::termios::tcsetwinsize(terminal, spawn::winsize(size));
                }
            }
            ExecCommand::Signal(number) => {
                let signal = sys::signal(number).ok_or(FrameError::Malformed)?;
                self.signal(signal);
            }
            ExecCommand::Start(_) | ExecCommand::StartKept { .. } | ExecCommand::Attach { .. } => {
                return Err(FrameError::Malformed);
            }
        }
        Ok(())
    }

    /// Signals the terminal's foreground group, or the command. That it has ended meanwhile is no
    /// error.
    fn signal(&self, signal: Signal) {
        if self.status.is_some() {
            return;
        }
        let foreground = self
            .process
            .terminal
            .as_ref()
            .and_then(|terminal| rustix::termios::tcgetpgrp(terminal).ok());
        let _ = match foreground {
            Some(group) => rustix::process::kill_process_group(group, signal),
            None => rustix::process::pidfd_send_signal(&self.process.pidfd, signal),
        };
    }

    /// Ends the command and its group when the host is gone.
    fn kill(&mut self) {
        if let Some(group) = Pid::from_raw(self.process.pid) {
            // The leader is a child that hasn't been collected, so the number is still its own.
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        let id = WaitId::PidFd(self.process.pidfd.as_fd());
        while let Err(Errno::INTR) = rustix::process::waitid(id.clone(), WaitIdOptions::EXITED) {}
    }

    /// Sends what the host takes.
    fn flush(&mut self) -> Result<(), FrameError> {
        match &self.link {
            Some(link) => self.output.flush(&mut Sender(&link.connection)),
            None => Ok(()),
        }
    }
}

/// A connection to write to without waiting.
struct Sender<'a>(&'a UnixStream);

impl Write for Sender<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(rustix::net::send(self.0, bytes, flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The terminal's end-of-file character (`VEOF`, termios(3)).
const END_OF_TRANSMISSION: u8 = 4;
