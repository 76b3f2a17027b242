//! One stream connection: its buffers, credit in both directions, and how it ends (virtio 1.3, 5.10.6).

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::packet::*;
use crate::virtio::ring::ByteRing;
use crate::virtio::{ChainCursor, QueueError};

/// Bytes that wait for the host to read: the credit the guest is given.
pub(super) const RECEIVE_LEN: usize = 256 * 1024;
/// Bytes that wait for the guest to take.
const SEND_LEN: usize = 256 * 1024;
/// The guest is told of new credit once it amounts to this.
const CREDIT_STEP: u32 = RECEIVE_LEN as u32 / 4;
/// The most data in one packet.
const MAX_PAYLOAD: usize = 64 * 1024;

/// Names a connection: the two ports, since the two contexts are fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// A request was sent, or is about to be.
    Connecting,
    Established,
    /// Over, in order or with this error.
    Closed(Option<io::ErrorKind>),
}

/// What the device does after a packet from the guest was taken in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The connection goes on; it may have something to send.
    Keep,
    /// It is over, no answer is due.
    Remove,
    /// It is over and the guest is told so.
    Reset,
}

struct Io {
    phase: Phase,
    receive: ByteRing,
    /// Bytes the host has read, modulo 2^32.
    fwd_cnt: u32,
    /// The `fwd_cnt` that the guest was last told.
    told_fwd_cnt: u32,
    send: ByteRing,
    /// Bytes sent to the guest, modulo 2^32.
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// What the guest has shut down.
    peer_shutdown: u32,
    /// What the host wants shut down, and what of that has been sent.
    local_shutdown: u32,
    sent_shutdown: u32,
    credit_update_due: bool,
    credit_requested: bool,
    /// It stands in the device's list of connections with something to send.
    queued: bool,
    /// The host has dropped its end: what arrives is thrown away.
    abandoned: bool,
}

impl Io {
    /// Bytes the guest has room for.
    const fn credit(&self) -> u32 {
        let in_flight = self.tx_cnt.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight)
    }

    /// The next thing to tell the guest, without data.
    fn next_op(&self) -> Option<(u16, u32)> {
        if self.phase != Phase::Established {
            return None;
        }
        let wanted = self.local_shutdown & !self.sent_shutdown;
        if !self.send.is_empty() {
            if self.credit() > 0 {
                return Some((OP_RW, 0));
            }
            if !self.credit_requested {
                return Some((OP_CREDIT_REQUEST, 0));
            }
        } else if wanted != 0 {
            return Some((OP_SHUTDOWN, self.local_shutdown));
        }
        self.credit_update_due.then_some((OP_CREDIT_UPDATE, 0))
    }

    /// Puts the connection on the ready list if it should be and isn't; the caller then adds it.
    fn claim_queue(&mut self) -> bool {
        let claim = !self.queued && self.next_op().is_some();
        self.queued |= claim;
        claim
    }

    fn close(&mut self, error: Option<io::ErrorKind>) {
        if !matches!(self.phase, Phase::Closed(_)) {
            self.phase = Phase::Closed(error);
        }
        self.send.clear();
    }

    fn note_read(&mut self, len: usize) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(len as u32);
        if self.fwd_cnt.wrapping_sub(self.told_fwd_cnt) >= CREDIT_STEP {
            self.credit_update_due = true;
        }
    }

    /// Takes the payload of an RW packet.
    fn take_payload(&mut self, len: usize, data: &mut ChainCursor<'_>) -> Result<bool, QueueError> {
        let allowed = self.phase == Phase::Established
            && self.peer_shutdown & SHUTDOWN_SEND == 0
            && len <= data.remaining() as usize
            && len <= self.receive.room();
        if !allowed {
            return Ok(false);
        }
        if self.abandoned || self.local_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.note_read(len);
        } else {
            self.receive
                .append_with(len, |part| data.read_exact(part))?;
        }
        Ok(true)
    }
}

/// One connection.
pub(super) struct Connection {
    pub(super) key: Key,
    io: Mutex<Io>,
    readable: Condvar,
    writable: Condvar,
    /// Nanoseconds; 0 for no limit.
    read_timeout: AtomicU64,
}

impl Connection {
    /// A connection that the host asks for.
    pub(super) fn connecting(key: Key) -> Self {
        Self::new(key, Phase::Connecting, 0, 0)
    }

    /// A connection that the guest asked for with `request`.
    pub(super) fn accepted(key: Key, request: &Header) -> Self {
        Self::new(key, Phase::Established, request.buf_alloc, request.fwd_cnt)
    }

    fn new(key: Key, phase: Phase, peer_buf_alloc: u32, peer_fwd_cnt: u32) -> Self {
        Self {
            key,
            io: Mutex::new(Io {
                phase,
                receive: ByteRing::new(RECEIVE_LEN),
                fwd_cnt: 0,
                told_fwd_cnt: 0,
                send: ByteRing::new(SEND_LEN),
                tx_cnt: 0,
                peer_buf_alloc,
                peer_fwd_cnt,
                peer_shutdown: 0,
                local_shutdown: 0,
                sent_shutdown: 0,
                credit_update_due: false,
                credit_requested: false,
                queued: false,
                abandoned: false,
            }),
            readable: Condvar::new(),
            writable: Condvar::new(),
            read_timeout: AtomicU64::new(0),
        }
    }

    /// Takes in a packet of this connection from the guest. The second value says that the caller must
    /// put the connection on the ready list.
    pub(super) fn receive(
        &self,
        header: &Header,
        data: &mut ChainCursor<'_>,
    ) -> Result<(Outcome, bool), QueueError> {
        let mut io = self.io.lock();
        io.peer_buf_alloc = header.buf_alloc;
        io.peer_fwd_cnt = header.fwd_cnt;
        if io.credit() > 0 {
            io.credit_requested = false;
        }
        let outcome = match header.op {
            OP_RESPONSE if io.phase == Phase::Connecting => {
                io.phase = Phase::Established;
                Outcome::Keep
            }
            OP_RW => match io.take_payload(header.len as usize, data)? {
                true => Outcome::Keep,
                false => Outcome::Reset,
            },
            OP_CREDIT_UPDATE => Outcome::Keep,
            OP_CREDIT_REQUEST => {
                io.credit_update_due = true;
                Outcome::Keep
            }
            OP_SHUTDOWN => {
                io.peer_shutdown |= header.flags & SHUTDOWN_BOTH;
                if io.peer_shutdown & SHUTDOWN_RECEIVE != 0 {
                    io.send.clear();
                }
                // The answer to a full shutdown is a reset (5.10.6.6).
                if io.peer_shutdown == SHUTDOWN_BOTH {
                    Outcome::Reset
                } else {
                    Outcome::Keep
                }
            }
            OP_RST => Outcome::Remove,
            _ => Outcome::Reset,
        };
        if outcome != Outcome::Keep {
            let orderly = io.peer_shutdown == SHUTDOWN_BOTH || io.sent_shutdown == SHUTDOWN_BOTH;
            let error = match io.phase {
                Phase::Connecting => Some(io::ErrorKind::ConnectionRefused),
                _ if orderly => None,
                _ => Some(io::ErrorKind::ConnectionReset),
            };
            io.close(error);
        }
        let claimed = io.claim_queue();
        drop(io);
        self.readable.notify_all();
        self.writable.notify_all();
        Ok((outcome, claimed))
    }

    /// Writes the next packet for the guest into `writer`, which has room for a header at least. Returns
    /// the packet's length, or `None` if there is nothing to send, and the connection leaves the ready
    /// list.
    pub(super) fn emit(
        &self,
        guest_cid: u64,
        writer: &mut ChainCursor<'_>,
    ) -> Result<Option<u32>, QueueError> {
        let mut io = self.io.lock();
        let Some((op, flags)) = io.next_op() else {
            io.queued = false;
            return Ok(None);
        };
        let len = match op {
            OP_RW => {
                let room = (writer.remaining() as usize).saturating_sub(HEADER_LEN);
                let len = io
                    .send
                    .len()
                    .min(io.credit() as usize)
                    .min(room)
                    .min(MAX_PAYLOAD);
                if len == 0 {
                    return Err(QueueError::Request("room for data"));
                }
                len
            }
            _ => 0,
        };
        match op {
            OP_SHUTDOWN => io.sent_shutdown = flags,
            OP_CREDIT_REQUEST => io.credit_requested = true,
            _ => {}
        }
        // Every packet tells the guest its credit.
        io.credit_update_due = false;
        io.told_fwd_cnt = io.fwd_cnt;
        let header = Header {
            len: len as u32,
            op,
            flags,
            fwd_cnt: io.fwd_cnt,
            ..self.header(guest_cid)
        };
        writer.write_all(&header.to_bytes())?;
        let (first, second) = io.send.filled();
        let from_first = first.len().min(len);
        writer.write_all(&first[..from_first])?;
        writer.write_all(&second[..len - from_first])?;
        if len > 0 {
            io.send.consume(len);
            io.tx_cnt = io.tx_cnt.wrapping_add(len as u32);
            drop(io);
            self.writable.notify_all();
        }
        Ok(Some((HEADER_LEN + len) as u32))
    }

    /// A header of this connection from host to guest.
    pub(super) fn header(&self, guest_cid: u64) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            kind: TYPE_STREAM,
            buf_alloc: RECEIVE_LEN as u32,
            ..Header::default()
        }
    }

    /// Waits until the guest has answered a request.
    pub(super) fn wait_established(&self, deadline: Instant) -> io::Result<()> {
        let mut io = self.io.lock();
        loop {
            match io.phase {
                Phase::Established => return Ok(()),
                Phase::Closed(error) => {
                    return Err(error.unwrap_or(io::ErrorKind::ConnectionReset).into());
                }
                Phase::Connecting => {}
            }
            if self.readable.wait_until(&mut io, deadline).timed_out() {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    /// Reads what has arrived, waiting for something to. The second value says that the caller must put
    /// the connection on the ready list.
    pub(super) fn read(&self, out: &mut [u8]) -> io::Result<(usize, bool)> {
        let timeout = self.read_timeout();
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut io = self.io.lock();
        loop {
            let len = io.receive.pop(out);
            if len > 0 || out.is_empty() {
                io.note_read(len);
                return Ok((len, io.claim_queue()));
            }
            match io.phase {
                Phase::Closed(Some(error)) => return Err(error.into()),
                Phase::Closed(None) => return Ok((0, false)),
                _ if io.peer_shutdown & SHUTDOWN_SEND != 0
                    || io.local_shutdown & SHUTDOWN_RECEIVE != 0 =>
                {
                    return Ok((0, false));
                }
                _ => {}
            }
            if !crate::virtio::wait(&self.readable, &mut io, deadline) {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    /// Takes data for the guest, waiting for room.
    pub(super) fn write(&self, data: &[u8]) -> io::Result<(usize, bool)> {
        let mut io = self.io.lock();
        loop {
            match io.phase {
                Phase::Closed(error) => {
                    return Err(error.unwrap_or(io::ErrorKind::BrokenPipe).into());
                }
                _ if io.peer_shutdown & SHUTDOWN_RECEIVE != 0
                    || io.local_shutdown & SHUTDOWN_SEND != 0 =>
                {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                _ => {}
            }
            let len = io.send.push(data);
            if len > 0 || data.is_empty() {
                return Ok((len, io.claim_queue()));
            }
            self.writable.wait(&mut io);
        }
    }

    /// Shuts one or both directions down. Data already written is sent first.
    pub(super) fn shutdown(&self, flags: u32) -> bool {
        let mut io = self.io.lock();
        io.local_shutdown |= flags;
        if flags & SHUTDOWN_RECEIVE != 0 {
            let dropped = io.receive.len();
            io.receive.clear();
            io.note_read(dropped);
        }
        let claimed = io.claim_queue();
        drop(io);
        self.readable.notify_all();
        self.writable.notify_all();
        claimed
    }

    /// The host drops its end. Returns the phase it was in, and whether to put it on the ready list.
    pub(super) fn abandon(&self) -> (Phase, bool) {
        let mut io = self.io.lock();
        io.abandoned = true;
        let phase = io.phase;
        if phase == Phase::Connecting {
            io.close(None);
        }
        drop(io);
        (phase, self.shutdown(SHUTDOWN_BOTH))
    }

    /// Ends the connection without a word to the guest.
    pub(super) fn kill(&self, error: io::ErrorKind) {
        self.io.lock().close(Some(error));
        self.readable.notify_all();
        self.writable.notify_all();
    }

    pub(super) fn set_read_timeout(&self, timeout: Option<Duration>) {
        let nanos = timeout.map_or(0, |t| {
            u64::try_from(t.as_nanos()).unwrap_or(u64::MAX).max(1)
        });
        self.read_timeout.store(nanos, Ordering::Relaxed);
    }

    pub(super) fn read_timeout(&self) -> Option<Duration> {
        match self.read_timeout.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let io = self.io.lock();
        f.debug_struct("Connection")
            .field("key", &self.key)
            .field("phase", &io.phase)
            .field("unread", &io.receive.len())
            .field("unsent", &io.send.len())
            .field("credit", &io.credit())
            .finish()
    }
}
