//! Several connections over one byte stream, for guests without vsock.
//!
//! ```text
//!   connect(port) --> UnixStream ~~ socket pair ~~ outbound thread --+--> stream --> the peer's Mux
//!   accept(port)  <-- UnixStream ~~ socket pair ~~ inbound thread <--+--  reader thread
//! ```
//!
//! Each channel has a window in each direction: a receiver that doesn't read stops its own sender and
//! nobody else. A peer that breaks the rules ends the whole stream.
//!
//! Called by `guest/agent` on a console port and by the host on the other end of it.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::frame::{self, FrameDecoder, FrameError};
use crate::message::as_bytes;
use crate::transport::Transport;

/// Bytes that a sender may have under way on one channel.
const WINDOW: u32 = 256 * 1024;

/// Most bytes of one data frame: small, so that channels take turns.
const PIECE: usize = 16 * 1024;

/// Channels at one time.
const MAX_CHANNELS: usize = 4096;

/// Connections that wait for [`Mux::accept`].
const MAX_WAITING: usize = 128;

/// Stack of a channel's threads, which hold one piece each.
const STACK: usize = 128 * 1024;

/// Which end of the stream this is; it keeps the two ends' channel numbers apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Even channel numbers.
    Host,
    /// Odd channel numbers.
    Guest,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum MuxFrame<'a> {
    /// The sender connects to a port of the receiver.
    Open { channel: u32, port: u32 },
    /// Bytes of a channel.
    Data {
        channel: u32,
        #[serde(borrow)]
        bytes: Bytes<'a>,
    },
    /// So many more bytes may be sent.
    Credit { channel: u32, bytes: u32 },
    /// The sender sends no more on this channel.
    Finish { channel: u32 },
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Bytes<'a>(#[serde(borrow, serialize_with = "as_bytes")] &'a [u8]);

/// One end of a multiplexed stream.
#[derive(Clone, Debug)]
pub struct Mux {
    shared: Arc<Shared>,
}

struct Shared {
    writer: Mutex<Box<dyn Write + Send>>,
    state: Mutex<State>,
    /// A connection waits, or the stream is over.
    changed: Condvar,
    next_channel: AtomicU32,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Shared")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct State {
    channels: HashMap<u32, Channel>,
    /// Connections of the peer by port.
    waiting: HashMap<u32, VecDeque<UnixStream>>,
    over: bool,
}

/// The reader's end of a channel.
#[derive(Debug)]
struct Channel {
    /// To the inbound thread; `None` when the peer has finished.
    inbound: Option<mpsc::Sender<Vec<u8>>>,
    /// Bytes that the peer may still send.
    allowed: u32,
    credit: Arc<Credit>,
    /// Threads of the channel that still run.
    threads: u8,
    local: UnixStream,
}

/// What the outbound thread may send.
#[derive(Debug)]
struct Credit {
    bytes: Mutex<u32>,
    changed: Condvar,
}

impl Mux {
    /// Takes the stream over.
    pub fn start<T: Transport>(stream: T, side: Side) -> io::Result<Self> {
        let writer = stream.try_clone()?;
        let closer = stream.try_clone()?;
        let first = if side == Side::Host { 2 } else { 1 };
        let shared = Arc::new(Shared {
            writer: Mutex::new(Box::new(writer)),
            state: Mutex::default(),
            changed: Condvar::new(),
            next_channel: AtomicU32::new(first),
        });
        let reader = Arc::clone(&shared);
        spawn("mux", move || {
            // The reason is lost on the peer, which broke the stream; here every channel ends.
            let _ = reader.read_all(stream);
            // Fails when the peer was first.
            let _ = closer.shutdown(Shutdown::Both);
            reader.end();
        })?;
        Ok(Self { shared })
    }

    /// A connection to a port of the peer. That nobody accepts there shows as its end.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let channel = self.shared.next_channel.fetch_add(2, Ordering::Relaxed);
        let stream = self.shared.add_channel(channel, Some(port))?;
        Ok(stream)
    }

    /// Waits for the peer's next connection to a port.
    pub fn accept(&self, port: u32) -> io::Result<UnixStream> {
        let mut state = self.shared.state();
        loop {
            if let Some(stream) = state.waiting.get_mut(&port).and_then(VecDeque::pop_front) {
                return Ok(stream);
            }
            if state.over {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            state = self
                .shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, frame: &MuxFrame<'_>) -> Result<(), FrameError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        frame::write(&mut *writer, frame)
    }

    /// Makes a channel with its threads; returns the user's end. With `port` it is ours to open.
    fn add_channel(self: &Arc<Self>, channel: u32, port: Option<u32>) -> io::Result<UnixStream> {
        let (user, local) = UnixStream::pair()?;
        let credit = Arc::new(Credit {
            bytes: Mutex::new(WINDOW),
            changed: Condvar::new(),
        });
        let (sender, receiver) = mpsc::channel();
        {
            let mut state = self.state();
            if state.over {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if state.channels.len() >= MAX_CHANNELS || state.channels.contains_key(&channel) {
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            let entry = Channel {
                inbound: Some(sender),
                allowed: WINDOW,
                credit: Arc::clone(&credit),
                threads: 2,
                local: local.try_clone()?,
            };
            state.channels.insert(channel, entry);
        }
        if let Some(port) = port {
            self.send(&MuxFrame::Open { channel, port })
                .map_err(io::Error::other)?;
        }
        let (reader, writer) = (local.try_clone()?, local);
        let shared = Arc::clone(self);
        spawn("mux-out", move || {
            shared.outbound(channel, reader, &credit);
            shared.thread_ended(channel);
        })?;
        let shared = Arc::clone(self);
        spawn("mux-in", move || {
            shared.inbound(channel, writer, &receiver);
            shared.thread_ended(channel);
        })?;
        Ok(user)
    }

    /// Sends what the user writes, within the peer's credit, then the end.
    fn outbound(&self, channel: u32, mut local: UnixStream, credit: &Credit) {
        let mut piece = vec![0; PIECE];
        while let Some(limit) = self.wait_for_credit(credit) {
            let length = match local.read(piece.get_mut(..limit).unwrap_or_default()) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            *credit.bytes() -= length as u32;
            let bytes = Bytes(piece.get(..length).unwrap_or_default());
            if self.send(&MuxFrame::Data { channel, bytes }).is_err() {
                break;
            }
        }
        // Fails when the stream is over, and the peer's channels with it.
        let _ = self.send(&MuxFrame::Finish { channel });
    }

    /// Bytes that may be sent now, at most one piece; `None` when the stream is over.
    fn wait_for_credit(&self, credit: &Credit) -> Option<usize> {
        let mut bytes = credit.bytes();
        while *bytes == 0 {
            if self.state().over {
                return None;
            }
            bytes = credit
                .changed
                .wait(bytes)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Some(PIECE.min(*bytes as usize))
    }

    /// Passes on what the peer sent, and grants as much again.
    fn inbound(&self, channel: u32, mut local: UnixStream, queue: &mpsc::Receiver<Vec<u8>>) {
        while let Ok(bytes) = queue.recv() {
            // A user who is gone reads no more; what comes is dropped, and its sender not held up.
            let _ = local.write_all(&bytes);
            let granted = bytes.len() as u32;
            if let Some(entry) = self.state().channels.get_mut(&channel) {
                entry.allowed = entry.allowed.saturating_add(granted);
            }
            if self
                .send(&MuxFrame::Credit {
                    channel,
                    bytes: granted,
                })
                .is_err()
            {
                break;
            }
        }
        // Fails when the user is gone.
        let _ = local.shutdown(Shutdown::Write);
    }

    fn thread_ended(&self, channel: u32) {
        let mut state = self.state();
        if let Some(entry) = state.channels.get_mut(&channel) {
            entry.threads = entry.threads.saturating_sub(1);
            if entry.threads == 0 {
                state.channels.remove(&channel);
            }
        }
    }

    fn read_all<T: Transport>(self: &Arc<Self>, mut stream: T) -> Result<(), FrameError> {
        let mut decoder = FrameDecoder::new();
        loop {
            let payload = decoder.read_frame(&mut stream)?;
            self.handle(frame::decode(payload)?)?;
        }
    }

    fn handle(self: &Arc<Self>, frame: MuxFrame<'_>) -> Result<(), FrameError> {
        match frame {
            MuxFrame::Open { channel, port } => self.handle_open(channel, port),
            MuxFrame::Data {
                channel,
                bytes: Bytes(bytes),
            } => {
                let mut state = self.state();
                // Frames of a channel that has ended here may still be under way.
                let Some(entry) = state.channels.get_mut(&channel) else {
                    return Ok(());
                };
                let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                entry.allowed = entry
                    .allowed
                    .checked_sub(length)
                    .ok_or(FrameError::Malformed)?;
                if let Some(inbound) = &entry.inbound {
                    // Fails when the channel ends here.
                    let _ = inbound.send(bytes.to_vec());
                }
                Ok(())
            }
            MuxFrame::Credit { channel, bytes } => {
                let credit = self
                    .state()
                    .channels
                    .get(&channel)
                    .map(|e| Arc::clone(&e.credit));
                if let Some(credit) = credit {
                    let mut available = credit.bytes();
                    let more = available.checked_add(bytes).filter(|&sum| sum <= WINDOW);
                    *available = more.ok_or(FrameError::Malformed)?;
                    credit.changed.notify_all();
                }
                Ok(())
            }
            MuxFrame::Finish { channel } => {
                if let Some(entry) = self.state().channels.get_mut(&channel) {
                    entry.inbound = None;
                }
                Ok(())
            }
        }
    }

    fn handle_open(self: &Arc<Self>, channel: u32, port: u32) -> Result<(), FrameError> {
        // The peer's numbers have the other parity.
        if channel % 2 == self.next_channel.load(Ordering::Relaxed) % 2 {
            return Err(FrameError::Malformed);
        }
        let waiting: usize = self.state().waiting.values().map(VecDeque::len).sum();
        if waiting >= MAX_WAITING {
            return self.send(&MuxFrame::Finish { channel });
        }
        match self.add_channel(channel, None) {
            Ok(stream) => {
                self.state()
                    .waiting
                    .entry(port)
                    .or_default()
                    .push_back(stream);
                self.changed.notify_all();
                Ok(())
            }
            Err(_) => self.send(&MuxFrame::Finish { channel }),
        }
    }

    /// Ends every channel and every wait.
    fn end(&self) {
        let mut state = self.state();
        state.over = true;
        state.waiting.clear();
        let credits: Vec<_> = state
            .channels
            .values_mut()
            .map(|entry| {
                entry.inbound = None;
                // Wakes a thread that reads from or writes to a user; fails when there is none.
                let _ = entry.local.shutdown(Shutdown::Both);
                Arc::clone(&entry.credit)
            })
            .collect();
        drop(state);
        for credit in credits {
            // Taken, so that a thread between its look at `over` and its wait is waited for.
            drop(credit.bytes());
            credit.changed.notify_all();
        }
        self.changed.notify_all();
    }
}

impl Credit {
    fn bytes(&self) -> MutexGuard<'_, u32> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(body)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn pair() -> (Mux, Mux) {
        let (host, guest) = UnixStream::pair().unwrap();
        let host = Mux::start(host, Side::Host).unwrap();
        (host, Mux::start(guest, Side::Guest).unwrap())
    }

    #[test]
    fn connections_of_both_sides_carry_data_and_its_end() {
        let (host, guest) = pair();
        for (from, to) in [(&host, &guest), (&guest, &host)] {
            let mut client = from.connect(7).unwrap();
            let mut server = to.accept(7).unwrap();
            client.write_all(b"question").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut text = String::new();
            server.read_to_string(&mut text).unwrap();
            assert_eq!(text, "question");
            server.write_all(b"answer").unwrap();
            drop(server);
            let mut text = String::new();
            client.read_to_string(&mut text).unwrap();
            assert_eq!(text, "answer");
        }
    }

    #[test]
    fn a_channel_that_nobody_reads_does_not_stop_another() {
        let (host, guest) = pair();
        let mut stuck = host.connect(1).unwrap();
        let _unread = guest.accept(1).unwrap();
        stuck
            .set_write_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let piece = vec![1; 100_000];
        let sent = (0..100)
            .take_while(|_| stuck.write_all(&piece).is_ok())
            .count();
        assert!(sent < 100);
        let mut free = host.connect(2).unwrap();
        let mut other = guest.accept(2).unwrap();
        let echo =
            std::thread::spawn(move || io::copy(&mut other.try_clone().unwrap(), &mut other));
        let mut back = free.try_clone().unwrap();
        let reader = std::thread::spawn(move || {
            let mut data = Vec::new();
            back.read_to_end(&mut data).map(|_| data.len())
        });
        for _ in 0..30 {
            free.write_all(&piece).unwrap();
        }
        free.shutdown(Shutdown::Write).unwrap();
        assert_eq!(echo.join().unwrap().unwrap(), 3_000_000);
        assert_eq!(reader.join().unwrap().unwrap(), 3_000_000);
    }

    #[test]
    fn the_end_of_the_stream_ends_channels_and_waits() {
        let (raw, guest) = UnixStream::pair().unwrap();
        let guest = Mux::start(guest, Side::Guest).unwrap();
        let mut channel = guest.connect(3).unwrap();
        let accepting = guest.clone();
        let waiting = std::thread::spawn(move || accepting.accept(9).is_err());
        drop(raw);
        assert_eq!(channel.read(&mut [0; 8]).unwrap_or(0), 0);
        assert!(waiting.join().unwrap());
        assert!(guest.connect(3).is_err());
    }

    #[test]
    fn a_peer_that_breaks_the_rules_is_cut_off() {
        let flood = vec![0; 60_000];
        let over_window: Vec<MuxFrame<'_>> = std::iter::once(MuxFrame::Open {
            channel: 2,
            port: 1,
        })
        .chain((0..20).map(|_| MuxFrame::Data {
            channel: 2,
            bytes: Bytes(&flood),
        }))
        .collect();
        let cases = [
            vec![MuxFrame::Open {
                channel: 1,
                port: 1,
            }],
            vec![
                MuxFrame::Open {
                    channel: 2,
                    port: 1,
                },
                MuxFrame::Credit {
                    channel: 2,
                    bytes: u32::MAX,
                },
            ],
            over_window,
        ];
        for frames in cases {
            let (mut raw, guest) = UnixStream::pair().unwrap();
            let guest = Mux::start(guest, Side::Guest).unwrap();
            for frame in &frames {
                // The cut may come before the last of them.
                let _ = frame::write(&mut raw, frame);
            }
            assert!(guest.accept(99).is_err());
        }
    }

    #[test]
    fn many_short_connections_leave_no_channel_behind() {
        let (host, guest) = pair();
        for _ in 0..200 {
            let mut client = host.connect(5).unwrap();
            let server = guest.accept(5).unwrap();
            drop(server);
            assert_eq!(client.read(&mut [0; 4]).unwrap(), 0);
        }
        for mux in [&host, &guest] {
            let mut tries = 0;
            while !mux.shared.state().channels.is_empty() {
                tries += 1;
                assert!(
                    tries < 500,
                    "{} channels left",
                    mux.shared.state().channels.len()
                );
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}
