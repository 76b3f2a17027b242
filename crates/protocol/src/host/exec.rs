//! One command in a guest.
//!
//! ```text
//!   StdinWriter ----> Sender (one lock, whole frames) ----> connection ----> agent
//!   ExecHandle  ---/                                             |
//!   wait(stdout, stderr) <---- frames <--------------------------+
//!        `---> Credit: wakes StdinWriter
//! ```

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::frame::{self, FrameDecoder, FrameError};
use crate::message::{ExecCommand, ExecEvent, ExecRequest, ExitStatus, WinSize};
use crate::transport::Transport;
use crate::{MAX_DATA, STDIN_WINDOW};

use super::HostError;

/// A command that runs in the guest.
#[derive(Debug)]
pub struct ExecSession<T: Transport> {
    stream: T,
    decoder: FrameDecoder,
    shared: Arc<Shared<T>>,
    pid: u32,
    wants_stdin: bool,
}

/// Resizes, signals and ends a command from any thread.
#[derive(Debug)]
pub struct ExecHandle<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Clone for ExecHandle<T> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

/// Standard input of a command. Dropping it closes the input.
#[derive(Debug)]
pub struct StdinWriter<T: Transport> {
    shared: Arc<Shared<T>>,
}

#[derive(Debug)]
struct Shared<T> {
    /// The sending half; the lock is held for whole frames.
    sender: Mutex<T>,
    /// A handle to end the connection with while a sender blocks.
    closer: Mutex<T>,
    credit: Mutex<Credit>,
    credit_changed: Condvar,
}

#[derive(Debug)]
struct Credit {
    /// Bytes of input that may still be sent.
    bytes: u64,
    /// Nobody reads input any more.
    closed: bool,
}

impl<T: Transport> Shared<T> {
    fn send(&self, command: &ExecCommand<'_>) -> Result<(), FrameError> {
        // A thread that panicked while it sent leaves at worst a broken frame, which the peer
        // refuses: the lock's poison adds nothing.
        let mut stream = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        frame::write(&mut *stream, command)
    }

    fn credit(&self) -> MutexGuard<'_, Credit> {
        self.credit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grant(&self, bytes: u32) {
        let mut credit = self.credit();
        credit.bytes = credit.bytes.saturating_add(u64::from(bytes));
        drop(credit);
        self.credit_changed.notify_all();
    }

    fn close_stdin(&self) {
        self.credit().closed = true;
        self.credit_changed.notify_all();
    }

    /// Waits until input may be sent and takes up to `wanted` bytes of the credit; `None` when the
    /// input is closed.
    fn take_credit(&self, wanted: usize) -> Option<usize> {
        let mut credit = self.credit();
        while credit.bytes == 0 && !credit.closed {
            credit = self
                .credit_changed
                .wait(credit)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if credit.closed {
            return None;
        }
        let taken = wanted.min(usize::try_from(credit.bytes).unwrap_or(usize::MAX));
        credit.bytes -= taken as u64;
        Some(taken)
    }
}

impl<T: Transport> ExecSession<T> {
    /// Starts `request` over a fresh connection to [`crate::EXEC_PORT`]; returns when the command
    /// runs or the agent said why it can't.
    pub fn start(stream: T, request: ExecRequest) -> Result<Self, HostError> {
        let wants_stdin = request.stdin;
        let command = ExecCommand::Start(request);
        Self::begin(stream, &command, STDIN_WINDOW, wants_stdin)
    }

    /// Starts `request` as the kept command `id`: it goes on when this session is gone, and
    /// [`Self::attach`] takes it up, here or in a restored copy of the guest.
    ///
    /// Check [`super::Control::require_kept_sessions`] first.
    pub fn start_kept(stream: T, id: u32, request: ExecRequest) -> Result<Self, HostError> {
        let wants_stdin = request.stdin;
        let command = ExecCommand::StartKept { id, request };
        Self::begin(stream, &command, STDIN_WINDOW, wants_stdin)
    }

    /// Takes the kept command `id` up over a fresh connection to [`crate::EXEC_PORT`], from whoever
    /// had it. What it wrote since then comes now.
    pub fn attach(stream: T, id: u32) -> Result<Self, HostError> {
        let mut session = Self::begin(stream, &ExecCommand::Attach { id }, 0, true)?;
        // The second event says how much input the agent has room for, and whether it takes any.
        let payload = session.decoder.read_frame(&mut session.stream)?;
        match frame::decode(payload)? {
            ExecEvent::StdinCredit(bytes) => session.shared.grant(bytes),
            ExecEvent::StdinClosed => session.shared.close_stdin(),
            _ => {
                return Err(HostError::Protocol(
                    "a command that was taken up came without word of its input",
                ));
            }
        }
        Ok(session)
    }

    fn begin(
        mut stream: T,
        command: &ExecCommand<'_>,
        credit: u32,
        wants_stdin: bool,
    ) -> Result<Self, HostError> {
        frame::write(&mut stream, command)?;
        let mut decoder = FrameDecoder::new();
        let pid = match frame::decode(decoder.read_frame(&mut stream)?)? {
            ExecEvent::Started(pid) => pid,
            ExecEvent::Failed(failure) => return Err(HostError::NotStarted(failure)),
            _ => {
                return Err(HostError::Protocol(
                    "an exec was answered with neither yes nor no",
                ));
            }
        };
        let clone = || stream.try_clone().map(Mutex::new).map_err(FrameError::Io);
        let shared = Arc::new(Shared {
            sender: clone()?,
            closer: clone()?,
            credit: Mutex::new(Credit {
                bytes: u64::from(credit),
                closed: false,
            }),
            credit_changed: Condvar::new(),
        });
        Ok(Self {
            stream,
            decoder,
            shared,
            pid,
            wants_stdin,
        })
    }

    /// Process id of the command in the guest.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A handle for other threads.
    #[must_use]
    pub fn handle(&self) -> ExecHandle<T> {
        ExecHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// The command's standard input, where the request asked for one. Two writers interleave. That
    /// a command which was taken up has none shows at the first write.
    #[must_use]
    pub fn stdin(&self) -> Option<StdinWriter<T>> {
        self.wants_stdin.then(|| StdinWriter {
            shared: Arc::clone(&self.shared),
        })
    }

    /// Copies `input` to the command's standard input in a thread of its own, then closes it.
    ///
    /// The thread ends at the end of `input` or with the command; where `input` blocks for ever
    /// (a terminal), so does the thread, and it is harmless.
    pub fn pump_stdin(&self, mut input: impl Read + Send + 'static) -> io::Result<()> {
        let Some(mut stdin) = self.stdin() else {
            return Ok(());
        };
        std::thread::Builder::new()
            .name("exec-stdin".to_owned())
            .spawn(move || {
                let mut buffer = vec![0; MAX_DATA];
                loop {
                    match input.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(length) => {
                            let bytes = buffer.get(..length).unwrap_or_default();
                            if stdin.write_all(bytes).is_err() {
                                break;
                            }
                        }
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
            })?;
        Ok(())
    }

    /// Passes the command's output on until it ends.
    ///
    /// A sink that fails with a broken pipe has no reader any more: its output is dropped and the
    /// command goes on. Another failure ends the session, and with it the command.
    pub fn wait(
        mut self,
        stdout: &mut impl Write,
        stderr: &mut impl Write,
    ) -> Result<ExitStatus, HostError> {
        let mut stdout = Sink {
            inner: stdout,
            name: "standard output",
            open: true,
        };
        let mut stderr = Sink {
            inner: stderr,
            name: "standard error",
            open: true,
        };
        loop {
            let payload = self.decoder.read_frame(&mut self.stream)?;
            match frame::decode(payload)? {
                ExecEvent::Stdout(bytes) => stdout.write(bytes)?,
                ExecEvent::Stderr(bytes) => stderr.write(bytes)?,
                ExecEvent::StdinCredit(bytes) => self.shared.grant(bytes),
                ExecEvent::StdinClosed => self.shared.close_stdin(),
                ExecEvent::Ended(status) => return Ok(status),
                ExecEvent::Failed(failure) => return Err(HostError::NotStarted(failure)),
                ExecEvent::Started(_) => {
                    return Err(HostError::Protocol("a command was started twice"));
                }
            }
        }
    }
}

impl<T: Transport> Drop for ExecSession<T> {
    /// However the session ends, a writer of input must not wait for credit that never comes.
    fn drop(&mut self) {
        self.shared.close_stdin();
        // Fails only when the connection is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

struct Sink<'a, W> {
    inner: &'a mut W,
    name: &'static str,
    open: bool,
}

impl<W: Write> Sink<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), HostError> {
        if !self.open {
            return Ok(());
        }
        match self
            .inner
            .write_all(bytes)
            .and_then(|()| self.inner.flush())
        {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.open = false;
                Ok(())
            }
            Err(source) => Err(HostError::LocalStream {
                stream: self.name,
                source,
            }),
            Ok(()) => Ok(()),
        }
    }
}

impl<T: Transport> ExecHandle<T> {
    /// Tells the command's terminal its new size.
    pub fn resize(&self, size: WinSize) -> Result<(), HostError> {
        Ok(self.shared.send(&ExecCommand::Resize(size))?)
    }

    /// Sends a signal to the command.
    pub fn signal(&self, signal: u8) -> Result<(), HostError> {
        Ok(self.shared.send(&ExecCommand::Signal(signal))?)
    }

    /// Closes the connection; the agent then kills the command, unless it is a kept one.
    pub fn abort(&self) -> io::Result<()> {
        let stream = self
            .shared
            .closer
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        stream.shutdown(Shutdown::Both)
    }
}

impl<T: Transport> Write for StdinWriter<T> {
    /// Blocks until the agent takes input; [`io::ErrorKind::BrokenPipe`] when nobody reads it.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let taken = self
            .shared
            .take_credit(bytes.len().min(MAX_DATA))
            .ok_or_else(|| io::Error::from(io::ErrorKind::BrokenPipe))?;
        let piece = bytes.get(..taken).unwrap_or_default();
        match self.shared.send(&ExecCommand::Stdin(piece)) {
            Ok(()) => Ok(taken),
            Err(FrameError::Io(error)) => Err(error),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<T: Transport> Drop for StdinWriter<T> {
    fn drop(&mut self) {
        // Fails only when the session is over, and with it the input.
        let _ = self.shared.send(&ExecCommand::StdinEof);
    }
}
