//! One exec connection from its first frame to its last, in one poll loop.
//!
//! ```text
//!   connection --> decoder --> input buffer (<= STDIN_WINDOW) --> pipe or terminal
//!   pipe(s) or terminal --> frames in the output buffer (<= OUTPUT_LIMIT + one read) --> connection
//!   pidfd --> status;  when the output is drained: Ended
//! ```
//!
//! Nothing in the loop blocks but `poll`. A slow host stops the reading of output, and so the
//! command; a command that doesn't read stops the granting of credit, and so the host.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use skerry_protocol::frame::{self, FrameDecoder, FrameError};
use skerry_protocol::message::{
    ExecCommand, ExecEvent, ExecFailure, ExecRequest, ExitStatus, FailureKind, GuestString,
};
use skerry_protocol::{MAX_DATA, STDIN_WINDOW};

use super::environment::{DEFAULT_PATH, Environment};
use super::spawn::{self, Launch, Running};
use super::user::Accounts;
use super::{failure, lookup, show};
use crate::reap::Reaper;
use crate::sys;

/// Output that may wait for the host before the command has to.
const OUTPUT_LIMIT: usize = 256 * 1024;

/// After the command has ended, a descendant may still hold its output open. What it has written
/// is passed on; then the report waits for so long a silence ...
const QUIET: Duration = Duration::from_millis(300);

/// ... and for a descendant that never falls silent so long in all.
const GRACE: Duration = Duration::from_secs(2);

/// How long the host has to take the last frame and hang up.
const LINGER: Duration = Duration::from_secs(10);

/// Serves one exec connection.
pub fn run(
    mut connection: UnixStream,
    reaper: &Reaper,
    env: &[(GuestString, GuestString)],
) -> Result<(), FrameError> {
    let mut decoder = FrameDecoder::new();
    let request = match frame::decode(decoder.read_frame(&mut connection)?)? {
        ExecCommand::Start(request) => request,
        _ => return Err(FrameError::Malformed),
    };
    let stdin = request.stdin;
    match prepare(request, env).and_then(|launch| launch.start(reaper)) {
        Ok(running) => {
            let mut session = Session::new(connection, decoder, running, stdin)?;
            let result = session.serve();
            if session.status.is_none() {
                session.kill();
            }
            reaper.release(session.process.pid);
            result?;
            session.finish();
        }
        Err(failure) => {
            frame::write(&mut connection, &ExecEvent::Failed(failure))?;
            linger(&mut connection);
        }
    }
    Ok(())
}

/// Turns a request into what the kernel takes.
fn prepare(
    request: ExecRequest,
    env: &[(GuestString, GuestString)],
) -> Result<Launch, ExecFailure> {
    let user = Accounts::read("/".as_ref()).resolve(&request.user)?;
    let uname = rustix::system::uname();
    let hostname = uname.nodename().to_bytes();
    let mut environment = Environment::new(&user.home, hostname, request.tty.is_some());
    environment.extend(env)?;
    environment.extend(&request.env)?;

    let cwd = std::path::Path::new("/").join(spawn_path(&request.cwd)?);
    std::fs::create_dir_all(&cwd).map_err(|error| spawn::bad_cwd(&cwd, &error))?;
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
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let none = PollFlags::empty();
        let mut ready = Ready {
            connection: none,
            stdin: none,
            stdout: none,
            stderr: none,
            process: none,
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
    connection: UnixStream,
    decoder: FrameDecoder,
    process: Running,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    stdin: Option<OwnedFd>,
    /// Input that the command hasn't taken.
    input: Vec<u8>,
    input_ended: bool,
    /// Frames that the host hasn't taken, from `sent` on.
    output: Vec<u8>,
    sent: usize,
    status: Option<ExitStatus>,
    ended: Option<End>,
    scratch: Vec<u8>,
}

impl Session {
    fn new(
        connection: UnixStream,
        decoder: FrameDecoder,
        mut process: Running,
        wants_stdin: bool,
    ) -> Result<Self, FrameError> {
        connection.set_nonblocking(true)?;
        let mut session = Self {
            connection,
            decoder,
            stdout: process.stdout.take(),
            stderr: process.stderr.take(),
            stdin: process.stdin.take().filter(|_| wants_stdin),
            process,
            input: Vec::new(),
            input_ended: false,
            output: Vec::new(),
            sent: 0,
            status: None,
            ended: None,
            scratch: vec![0; MAX_DATA],
        };
        let pid = u32::try_from(session.process.pid).unwrap_or(0);
        session.emit(&ExecEvent::Started(pid))?;
        Ok(session)
    }

    /// Runs until the status is known and the output is in the output buffer or given up.
    fn serve(&mut self) -> Result<(), FrameError> {
        // The request may have come with the first bytes of input behind it.
        self.take_frames()?;
        while !self.is_drained() {
            if let Some(end) = &mut self.ended
                && self.output.len() - self.sent >= OUTPUT_LIMIT
            {
                end.last_output = Instant::now();
            }
            let ready = self.poll()?;
            if !ready.process.is_empty() && self.status.is_none() {
                self.collect()?;
            }
            if !ready.stdout.is_empty() {
                self.read_output(false)?;
            }
            if !ready.stderr.is_empty() {
                self.read_output(true)?;
            }
            if !ready.stdin.is_empty() {
                self.write_input(ready.stdin)?;
            }
            if ready.connection.intersects(PollFlags::OUT | PollFlags::ERR) {
                self.flush()?;
            }
            if ready
                .connection
                .intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR)
            {
                self.receive()?;
            }
        }
        Ok(())
    }

    fn is_drained(&self) -> bool {
        let Some(end) = self.ended else {
            return false;
        };
        if self.stdout.is_none() && self.stderr.is_none() {
            return true;
        }
        // While the host is slow nothing is read, and silence means nothing.
        let idle = self.pending() < OUTPUT_LIMIT;
        let silent = end.last_output.elapsed() >= QUIET || end.since.elapsed() >= GRACE;
        idle && silent && end.owed == [0, 0]
    }

    fn poll(&self) -> Result<Ready, FrameError> {
        let mut watch = Watch::default();
        let mut wanted = PollFlags::IN;
        wanted.set(PollFlags::OUT, self.pending() > 0);
        watch.add(&self.connection, wanted, |ready| &mut ready.connection);
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
        if self.pending() < OUTPUT_LIMIT {
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
        let reading = self.pending() < OUTPUT_LIMIT;
        let timeout = self.ended.filter(|_| reading).map(|end| {
            let until = (end.last_output + QUIET).min(end.since + GRACE);
            // Rounded up by a little, so that the time is over when poll returns.
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            }
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
                self.emit(&if errors {
                    ExecEvent::Stderr(bytes)
                } else {
                    ExecEvent::Stdout(bytes)
                })
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
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
                self.emit(&ExecEvent::StdinCredit(length as u32))?;
                if self.input.is_empty() && self.input_ended {
                    self.stdin = None;
                }
                Ok(())
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
            Err(_) => self.close_input(),
        }
    }

    fn close_input(&mut self) -> Result<(), FrameError> {
        self.stdin = None;
        self.input.clear();
        self.emit(&ExecEvent::StdinClosed)
    }

    /// Reads what the host sent.
    fn receive(&mut self) -> Result<(), FrameError> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.connection.read(&mut scratch);
        if let Ok(length) = result {
            self.decoder.push(scratch.get(..length).unwrap_or_default());
        }
        self.scratch = scratch;
        match result {
            Ok(0) => Err(FrameError::Closed),
            Ok(_) => self.take_frames(),
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn take_frames(&mut self) -> Result<(), FrameError> {
        let mut decoder = std::mem::take(&mut self.decoder);
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
        self.decoder = decoder;
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
            ExecCommand::Start(_) => return Err(FrameError::Malformed),
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
        while let Err(rustix::io::Errno::INTR) =
            rustix::process::waitid(id.clone(), WaitIdOptions::EXITED)
        {}
    }

    fn pending(&self) -> usize {
        self.output.len() - self.sent
    }

    fn emit(&mut self, event: &ExecEvent<'_>) -> Result<(), FrameError> {
        if self.sent > OUTPUT_LIMIT {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
        frame::encode_into(event, &mut self.output)?;
        self.flush()
    }

    /// Sends what the connection takes.
    fn flush(&mut self) -> Result<(), FrameError> {
        while self.pending() > 0 {
            match self
                .connection
                .write(self.output.get(self.sent..).unwrap_or_default())
            {
                Ok(0) => return Err(FrameError::Closed),
                Ok(length) => self.sent += length,
                Err(error) if is_transient(&error) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(())
    }

    /// Sends what is left and the status, then waits for the host to hang up.
    fn finish(mut self) {
        let Some(status) = self.status else {
            return;
        };
        let sent = self.emit(&ExecEvent::Ended(status)).and_then(|()| {
            self.connection.set_nonblocking(false)?;
            Ok(self
                .connection
                .write_all(self.output.get(self.sent..).unwrap_or_default())?)
        });
        if sent.is_ok() {
            linger(&mut self.connection);
        }
    }
}

/// The terminal's end-of-file character (`VEOF`, termios(3)).
const END_OF_TRANSMISSION: u8 = 4;

/// Closing a stream with unread input may throw away output that is under way: says that nothing
/// more comes, and reads until the host has hung up.
fn linger(connection: &mut UnixStream) {
    let started = Instant::now();
    let mut waste = [0; 4096];
    if connection.shutdown(Shutdown::Write).is_err()
        || connection.set_read_timeout(Some(LINGER)).is_err()
    {
        return;
    }
    while started.elapsed() < LINGER {
        match connection.read(&mut waste) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
