//! The host's end of a network card.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{
    F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, HEADER_LEN, RECEIVE, TRANSMIT, ToGuest, Wire,
};

/// Bytes that wait for the guest, beyond which whoever makes them waits.
const TO_GUEST: usize = 512 << 10;
/// Answers and the like still find room up to here.
const TO_GUEST_LIMIT: usize = 2 * TO_GUEST;
/// The most frames that wait.
const FRAMES: usize = 2048;
/// Buffers that are kept for later frames, and how large they may be.
const SPARE: usize = 32;
const SPARE_LEN: usize = 70_000;
/// Header flag: the checksum is to be completed (virtio 1.3, 5.1.6).
const NEEDS_CSUM: u8 = 1;

/// A checksum whose field has the sum of the pseudo-header only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum {
    /// From where in the frame it is taken.
    pub start: u16,
    /// Where its field is, from `start` on.
    pub offset: u16,
}

/// What the guest's driver takes of frames that are not complete.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames whose checksum is left to it.
    pub checksums: bool,
    /// TCP segments over IPv4 that are longer than the network's.
    pub tcp4: bool,
    /// The same over IPv6.
    pub tcp6: bool,
}

impl ToGuest {
    pub(super) fn has_room(&self) -> bool {
        self.bytes < TO_GUEST && self.frames.len() < FRAMES
    }

    pub(super) fn pop(&mut self) {
        if let Some(mut frame) = self.frames.pop_front() {
            self.bytes -= frame.len();
            if self.spare.len() < SPARE && frame.capacity() <= SPARE_LEN {
                frame.clear();
                self.spare.push(frame);
            }
        }
    }
}

impl Wire {
    pub(super) fn has(&self, feature: u64) -> bool {
        self.features.load(Ordering::SeqCst) & feature != 0
    }

    pub(super) fn clear(&self) {
        self.live.store(false, Ordering::SeqCst);
        self.features.store(0, Ordering::SeqCst);
        *self.to_guest.lock() = ToGuest::default();
        *self.from_guest.lock() = super::FromGuest::default();
    }
}

/// Completes a checksum (RFC 1071) in software.
fn complete(frame: &mut [u8], checksum: Checksum) {
    let Checksum { start, offset } = checksum;
    let Some(covered) = frame.get_mut(usize::from(start)..) else {
        return;
    };
    let mut sum: u64 = 0;
    for pair in covered.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u64::from(u16::from_be_bytes([pair[0], low]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // A sum of zero is written as all ones, which is the same number and for UDP not "none".
    let value = match !(sum as u16) {
        0 => 0xffff,
        value => value,
    };
    let field = usize::from(offset);
    if let Some(field) = covered.get_mut(field..field + 2) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

/// The host's end of a network card.
#[derive(Clone)]
pub struct NetPort(pub(super) Arc<Wire>);

impl NetPort {
    /// Takes frames that the guest sent. Whoever gets some asks again: only after none is the backend
    /// woken for the next.
    pub fn receive(&self) -> Vec<Vec<u8>> {
        let _ = self.0.receiver.set(std::thread::current().id());
        self.0.link.serve_in_turn(TRANSMIT);
        self.take()
    }

    /// Takes what has been fetched from the guest, and doesn't look for more.
    pub fn take(&self) -> Vec<Vec<u8>> {
        let mut from_guest = self.0.from_guest.lock();
        from_guest.bytes = 0;
        std::mem::take(&mut from_guest.frames)
    }

    /// An empty buffer of `len` zero bytes behind room for a header, for [`push`](Self::push).
    pub fn buffer(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.0.to_guest.lock().spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.resize(HEADER_LEN + len, 0);
        buffer
    }

    /// Whether more should be made for the guest. If not, the backend is woken when it is time.
    pub fn has_room(&self) -> bool {
        let mut to_guest = self.0.to_guest.lock();
        let room = to_guest.has_room();
        to_guest.stalled |= !room;
        room
    }

    /// Has a frame, which stands behind [`HEADER_LEN`] bytes, wait for the guest; it is dropped where the
    /// guest has no driver or far too much waits already.
    pub fn push(&self, mut buffer: Vec<u8>, checksum: Option<Checksum>) {
        let Some((header, frame)) = buffer.split_at_mut_checked(HEADER_LEN) else {
            return;
        };
        header.fill(0);
        match checksum {
            Some(checksum) if self.0.has(F_GUEST_CSUM) => {
                header[0] = NEEDS_CSUM;
                header[6..8].copy_from_slice(&checksum.start.to_le_bytes());
                header[8..10].copy_from_slice(&checksum.offset.to_le_bytes());
            }
            Some(checksum) => complete(frame, checksum),
            None => {}
        }
        self.wait(buffer);
    }

    /// As [`push`](Self::push), with the header that stands in the buffer.
    pub fn push_whole(&self, buffer: Vec<u8>) {
        if buffer.len() > HEADER_LEN {
            self.wait(buffer);
        }
    }

    fn wait(&self, buffer: Vec<u8>) {
        let mut to_guest = self.0.to_guest.lock();
        let full = to_guest.bytes >= TO_GUEST_LIMIT || to_guest.frames.len() >= 2 * FRAMES;
        if full || !self.0.live.load(Ordering::SeqCst) {
            return;
        }
        to_guest.bytes += buffer.len();
        to_guest.frames.push_back(buffer);
    }

    /// Puts what waits into the guest's buffers.
    pub fn flush(&self) {
        if !self.0.to_guest.lock().frames.is_empty() {
            self.0.link.serve(RECEIVE);
        }
    }

    /// From now on frames come with their headers in front.
    pub fn keep_headers(&self) {
        self.0.headers.store(true, Ordering::SeqCst);
    }

    /// What the guest's driver takes; nothing while it has none.
    pub fn offloads(&self) -> Offloads {
        Offloads {
            checksums: self.0.has(F_GUEST_CSUM),
            tcp4: self.0.has(F_GUEST_CSUM) && self.0.has(F_GUEST_TSO4),
            tcp6: self.0.has(F_GUEST_CSUM) && self.0.has(F_GUEST_TSO6),
        }
    }

    /// The longest packet of the card, without the Ethernet header.
    pub fn mtu(&self) -> u16 {
        self.0.mtu
    }

    /// Whether the guest has a driver for the card.
    pub fn is_live(&self) -> bool {
        self.0.live.load(Ordering::SeqCst)
    }
}

impl fmt::Debug for NetPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetPort").finish_non_exhaustive()
    }
}
