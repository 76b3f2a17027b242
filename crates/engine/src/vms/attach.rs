//! Being attached to the command of a machine that another process runs.
//!
//! ```text
//!  output:  command ─► log ─► any number of readers, each at its own pace
//!  input:   stdin, signals, sizes ─► frames ─► control socket ─► the machine's process ─► command
//! ```
//! Output comes from the log: a reader that is slow or gone loses nothing and holds nothing up, and one
//! can begin where the command did. A frame is a byte for its kind, a 32-bit little-endian length, and
//! so many bytes.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use skerry_protocol::message::WinSize;

use super::control::{Client, Request};
use super::host::Hosted;
use super::info::{Status, VmInfo};
use super::output::{Line, LogReader, Stream};
use super::registry::Registry;
use super::watch::Watch;
use crate::error::EngineError;
use crate::run::{Event, RunIo};

/// The longest frame.
const LONGEST: usize = 64 << 10;
/// Bytes of input that are sent at a time.
const PIECE: usize = 16 << 10;
/// How often it is looked whether a machine still runs.
const LOOK: Duration = Duration::from_millis(50);

/// From where on the output of a command is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Since {
    /// From what is written next.
    #[default]
    Now,
    /// All that the log has.
    Start,
    /// From this place of the log, which [`log_length`] told.
    At(u64),
}

/// How the time of being attached ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachEnd {
    /// The command ended with this exit status.
    Ended(u8),
    /// The user left, and the command goes on: see [`DetachKeys`].
    Detached,
}

/// What goes to the command.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Frame {
    Bytes(Vec<u8>),
    End,
    Resize(WinSize),
    Signal(u8),
}

impl Frame {
    fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, payload): (u8, Vec<u8>) = match self {
            Self::Bytes(bytes) => (0, bytes.clone()),
            Self::End => (1, Vec::new()),
            Self::Resize(size) => {
                let sides = [size.rows, size.cols, size.x_pixels, size.y_pixels];
                (2, sides.into_iter().flat_map(u16::to_le_bytes).collect())
            }
            Self::Signal(signal) => (3, vec![*signal]),
        };
        let mut frame = vec![kind];
        frame.extend((payload.len() as u32).to_le_bytes());
        frame.extend(payload);
        to.write_all(&frame)
    }

    /// The next one; `None` at the end.
    fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut head = [0; 5];
        match from.read_exact(&mut head) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        }
        let [kind, length @ ..] = head;
        let length = u32::from_le_bytes(length) as usize;
        let wrong = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text);
        if length > LONGEST {
            return Err(wrong("a frame is too long"));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        let frame = match (kind, &payload[..]) {
            (0, _) => Self::Bytes(payload),
            (1, []) => Self::End,
            (2, &[a, b, c, d, e, f, g, h]) => Self::Resize(WinSize {
                rows: u16::from_le_bytes([a, b]),
                cols: u16::from_le_bytes([c, d]),
                x_pixels: u16::from_le_bytes([e, f]),
                y_pixels: u16::from_le_bytes([g, h]),
            }),
            (3, &[signal]) => Self::Signal(signal),
            _ => return Err(wrong("a frame is of no known kind")),
        };
        Ok(Some(frame))
    }
}

/// Passes what an attached process sends on to the command, until that leaves.
pub(super) fn serve(mut stream: UnixStream, hosted: &Hosted) {
    loop {
        let frame = match Frame::read(&mut stream) {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, "an attached process sent what is no frame");
                return;
            }
        };
        let passed = match frame {
            Frame::Signal(signal) => hosted.signal(signal),
            Frame::Resize(size) => hosted.life().and_then(|life| life.resize(size)),
            // Of a command that reads nothing, nobody misses it.
            Frame::Bytes(bytes) => hosted.life().map(|life| {
                let input = life.input.as_ref();
                let _ = input.map(|input| input.write(&bytes));
            }),
            Frame::End => hosted.life().map(|life| {
                let _ = life.input.as_ref().map(|input| input.end());
            }),
        };
        if let Err(error) = passed {
            tracing::debug!(%error, "what an attached process sent came too late");
        }
    }
}

/// How long the log of a machine is.
pub fn log_length(registry: &Registry, info: &VmInfo) -> u64 {
    let metadata = std::fs::metadata(registry.log(&info.config.id));
    metadata.map_or(0, |metadata| metadata.len())
}

/// The lines of a machine's log as they are written; waits for each.
#[derive(Debug)]
pub struct Follower {
    registry: Registry,
    id: String,
    path: PathBuf,
    at: u64,
    reader: Option<LogReader>,
    watch: Watch,
    /// One that was never started is waited for.
    created: bool,
    left: Arc<AtomicBool>,
}

impl Follower {
    /// Follows the log of a machine, of one that was only [created](super::create), too.
    pub fn new(registry: &Registry, info: &VmInfo, since: Since) -> Result<Self, EngineError> {
        if !info.config.detached {
            return Err(EngineError::NoLog {
                name: info.config.name.clone(),
            });
        }
        Ok(Self {
            registry: registry.clone(),
            id: info.config.id.clone(),
            path: registry.log(&info.config.id),
            at: match since {
                Since::Now => log_length(registry, info),
                Since::Start => 0,
                Since::At(at) => at,
            },
            reader: None,
            watch: Watch::new(),
            created: info.state.status == Status::Created,
            left: Arc::new(AtomicBool::new(false)),
        })
    }

    /// The next line; `None` when the command has ended and its last one was given, or the machine is
    /// gone.
    pub fn next_line(&mut self) -> io::Result<Option<Line>> {
        loop {
            // Before the reading: what a command writes last is read when it is known to have ended.
            let goes_on = self.goes_on();
            if let Some(line) = self.written()? {
                return Ok(Some(line));
            }
            if !goes_on || self.left.load(Ordering::Acquire) {
                return Ok(None);
            }
            self.watch.wait(LOOK);
        }
    }

    fn goes_on(&mut self) -> bool {
        match self.registry.find(&self.id) {
            Ok(info) if info.state.status == Status::Created => self.created,
            Ok(info) => info.state.status.is_alive(),
            Err(_) => false,
        }
    }

    fn written(&mut self) -> io::Result<Option<Line>> {
        if self.reader.is_none() {
            match LogReader::open_at(&self.path, self.at) {
                Ok(reader) => self.reader = Some(reader),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
            self.watch.add(&self.path);
        }
        match &mut self.reader {
            Some(reader) => reader.next_line(),
            None => Ok(None),
        }
    }
}

/// Somebody who is about to be attached to the command of a machine: what it writes from a moment on is
/// theirs, whenever they come for it.
#[derive(Debug)]
pub struct Attachment {
    registry: Registry,
    info: VmInfo,
    follower: Follower,
}

impl Attachment {
    /// To the command of a machine that runs, or was only created.
    pub fn new(registry: &Registry, info: &VmInfo, since: Since) -> Result<Self, EngineError> {
        if !info.state.status.is_alive() && info.state.status != Status::Created {
            let name = info.config.name.clone();
            return Err(EngineError::VmStopped { name });
        }
        Ok(Self {
            follower: Follower::new(registry, info, since)?,
            registry: registry.clone(),
            info: info.clone(),
        })
    }

    /// Is attached until the command ends or the user leaves.
    pub fn run(self, io: RunIo) -> Result<AttachEnd, EngineError> {
        let Self {
            registry,
            info,
            mut follower,
        } = self;
        let RunIo {
            stdin,
            mut stdout,
            mut stderr,
            events,
        } = io;
        let left = follower.left.clone();
        if stdin.is_some() || events.is_some() {
            let sender = Sender {
                registry: registry.clone(),
                info: info.clone(),
                left: left.clone(),
            };
            let thread = std::thread::Builder::new().name("attach".to_owned());
            let thread = thread.spawn(move || sender.send(stdin, events));
            thread.map_err(EngineError::host("start a thread"))?;
        }
        let unread = EngineError::host("read the log of a virtual machine");
        let unwritten = EngineError::host("pass the output of a command on");
        while let Some(line) = follower.next_line().map_err(&unread)? {
            let to = match line.stream {
                Stream::Stdout => &mut stdout,
                Stream::Stderr => &mut stderr,
            };
            let written = to.write_all(line.bytes()).and_then(|()| to.flush());
            match written {
                // Nobody reads it any more.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Ok(AttachEnd::Detached);
                }
                written => written.map_err(&unwritten)?,
            }
        }
        match left.load(Ordering::Acquire) {
            true => Ok(AttachEnd::Detached),
            false => super::wait(&registry, &info.config.id).map(AttachEnd::Ended),
        }
    }
}

/// Attaches to the command of a machine: passes input, signals and sizes on to it and gives what it
/// writes, until it ends or the user leaves. A machine that was only created is waited for.
pub fn attach(
    registry: &Registry,
    name: &str,
    since: Since,
    io: RunIo,
) -> Result<AttachEnd, EngineError> {
    let info = registry.find(name)?;
    Attachment::new(registry, &info, since)?.run(io)
}

/// Tells the terminal of a machine's command its size.
pub fn resize(registry: &Registry, name: &str, size: WinSize) -> Result<(), EngineError> {
    let info = registry.find(name)?;
    if !info.state.status.is_alive() {
        let name = info.config.name;
        return Err(EngineError::VmStopped { name });
    }
    let client = Client::connect(&info.config.name, &registry.control(&info.config.id))?;
    let (_, mut stream) = client.ask(&Request::Attach)?;
    let sent = Frame::Resize(size).write(&mut stream);
    sent.map_err(EngineError::host("tell a terminal its size"))
}

/// Sends what goes to a command.
struct Sender {
    registry: Registry,
    info: VmInfo,
    left: Arc<AtomicBool>,
}

impl Sender {
    fn send(
        self,
        stdin: Option<Box<dyn Read + Send>>,
        events: Option<std::sync::mpsc::Receiver<Event>>,
    ) {
        let Some(stream) = self.connect() else {
            return;
        };
        if let (Some(events), Ok(mut stream)) = (events, stream.try_clone()) {
            let pass = move || {
                while let Ok(event) = events.recv() {
                    let frame = match event {
                        Event::Signal(signal) => Frame::Signal(signal),
                        Event::Resize(size) => Frame::Resize(size),
                    };
                    if frame.write(&mut stream).is_err() {
                        return;
                    }
                }
            };
            let thread = std::thread::Builder::new().name("attach-events".to_owned());
            // Without it, signals have no effect.
            let _ = thread.spawn(pass);
        }
        if let Some(stdin) = stdin {
            self.pass(stdin, stream);
        }
    }

    /// A connection to the machine's process, as soon as there is one.
    fn connect(&self) -> Option<UnixStream> {
        loop {
            let info = self.registry.find(&self.info.config.id).ok()?;
            if info.state.status.is_alive() {
                let socket = self.registry.control(&info.config.id);
                let client = Client::connect(&info.config.name, &socket);
                let asked = client.and_then(|client| client.ask(&Request::Attach));
                if let Ok((_, stream)) = asked {
                    return Some(stream);
                }
            } else if info.state.status != Status::Created {
                return None;
            }
            std::thread::sleep(LOOK);
        }
    }

    fn pass(&self, mut stdin: Box<dyn Read + Send>, mut stream: UnixStream) {
        let mut buffer = vec![0; PIECE];
        loop {
            let frame = match stdin.read(&mut buffer) {
                Ok(0) => Frame::End,
                Ok(length) => Frame::Bytes(buffer.get(..length).unwrap_or_default().to_vec()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {
                    self.left.store(true, Ordering::Release);
                    return;
                }
                Err(_) => return,
            };
            if frame.write(&mut stream).is_err() || frame == Frame::End {
                return;
            }
        }
    }
}

/// Input in which a sequence of keys, ctrl-p ctrl-q as docker has it, means that the user leaves: reading
/// fails with [`io::ErrorKind::ConnectionAborted`] then, which ends an [`attach`] and not the command.
#[derive(Debug)]
pub struct DetachKeys<R> {
    inner: R,
    keys: Vec<u8>,
    /// How many of the keys came last.
    matched: usize,
    /// What was read and is no part of the sequence.
    ready: std::collections::VecDeque<u8>,
    left: bool,
    ended: bool,
}

impl<R: Read> DetachKeys<R> {
    /// Ctrl-p, then ctrl-q.
    pub const DEFAULT: [u8; 2] = [0x10, 0x11];

    /// Looks for `keys` in what `inner` gives; for nothing, if there are none.
    pub fn new(inner: R, keys: &[u8]) -> Self {
        Self {
            inner,
            keys: keys.to_vec(),
            matched: 0,
            ready: std::collections::VecDeque::new(),
            left: false,
            ended: false,
        }
    }

    fn take(&mut self, byte: u8) {
        if self.keys.get(self.matched) == Some(&byte) {
            self.matched += 1;
            self.left = self.matched == self.keys.len();
            return;
        }
        // The keys differ from each other in use; what came of them was meant for the command.
        let held = self.keys.get(..self.matched).unwrap_or_default();
        self.ready.extend(held);
        self.matched = usize::from(self.keys.first() == Some(&byte));
        self.left = self.matched > 0 && self.matched == self.keys.len();
        if self.matched == 0 {
            self.ready.push_back(byte);
        }
    }
}

impl<R: Read> Read for DetachKeys<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.ready.is_empty() && !buffer.is_empty() {
            if self.left {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if self.ended {
                return Ok(0);
            }
            let mut piece = [0; 4096];
            let length = self.inner.read(&mut piece)?;
            if length == 0 {
                self.ended = true;
                let held = self.keys.get(..self.matched).unwrap_or_default();
                self.ready.extend(held);
            }
            for byte in piece.iter().take(length) {
                if !self.left {
                    self.take(*byte);
                }
            }
        }
        self.ready.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_survive_the_wire(bytes in prop::collection::vec(any::<u8>(), 0..100), signal in any::<u8>(), sides in any::<[u16; 4]>()) {
            let [rows, cols, x_pixels, y_pixels] = sides;
            let frames = [
                Frame::Bytes(bytes),
                Frame::Resize(WinSize { rows, cols, x_pixels, y_pixels }),
                Frame::Signal(signal),
                Frame::End,
            ];
            let mut wire = Vec::new();
            for frame in &frames {
                frame.write(&mut wire).expect("written");
            }
            let mut wire = &wire[..];
            for frame in frames {
                prop_assert_eq!(Frame::read(&mut wire).expect("read"), Some(frame));
            }
            prop_assert_eq!(Frame::read(&mut wire).expect("read"), None);
        }

        #[test]
        fn what_is_no_frame_is_an_error_or_the_end(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let mut wire = &bytes[..];
            while let Ok(Some(_)) = Frame::read(&mut wire) {}
        }

        #[test]
        fn keys_are_found_however_they_come(
            before in "[abp]{0,8}", after in "[abpq]{0,8}", with in any::<bool>(), piece in 1..5_usize,
        ) {
            /// Gives a few bytes at a time.
            struct Slow(Vec<u8>, usize);
            impl Read for Slow {
                fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                    let length = self.1.min(self.0.len());
                    let piece: Vec<u8> = self.0.drain(..length).collect();
                    (&piece[..]).read(buffer)
                }
            }
            let text = if with { format!("{before}pq{after}") } else { before.clone() };
            let mut keys = DetachKeys::new(Slow(text.into_bytes(), piece), b"pq");
            let mut read = Vec::new();
            let result = keys.read_to_end(&mut read);
            prop_assert_eq!(result.is_err(), with);
            prop_assert_eq!(read, before.into_bytes());
        }
    }
}
