//! A descriptor chain whose every buffer has been checked, and cursors over its bytes.

use skerry_hypervisor::memory::{GuestRam, PageTracker};
use vm_memory::bitmap::RefSlice;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::queue::QueueError;

/// A piece of guest memory that is in RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
}

impl Segment {
    fn end(&self) -> Option<u64> {
        self.address.checked_add(self.len.into())
    }
}

/// A piece of guest memory as the host reaches it.
pub type RamSlice<'a> = VolatileSlice<'a, RefSlice<'a, PageTracker>>;

/// The buffers of one request: first those the device reads, then those it writes.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_len: u32,
    writable_len: u32,
}

/// A chain that describes more than 32 bits of bytes.
pub(super) struct TooLong;

impl Chain {
    pub(super) fn start(&mut self, head: u16) {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        self.readable_len = 0;
        self.writable_len = 0;
    }

    pub(super) fn push(&mut self, segment: Segment, writable: bool) -> Result<(), TooLong> {
        // The sum over both halves is what virtio 1.3, 2.7.5.2 bounds.
        let other = if writable {
            self.readable_len
        } else {
            self.writable_len
        };
        let (list, total) = if writable {
            (&mut self.writable, &mut self.writable_len)
        } else {
            (&mut self.readable, &mut self.readable_len)
        };
        *total = total.checked_add(segment.len).ok_or(TooLong)?;
        total.checked_add(other).ok_or(TooLong)?;
        // Neighbours are one: a guest's buffer of many pages often lies in one piece.
        match list.last_mut() {
            Some(last) if last.end() == Some(segment.address) => last.len += segment.len,
            _ => list.push(segment),
        }
        Ok(())
    }

    pub(super) fn has_writable(&self) -> bool {
        !self.writable.is_empty()
    }

    /// The index of the first descriptor, which names the chain.
    pub const fn head(&self) -> u16 {
        self.head
    }

    /// Bytes the device may read.
    pub const fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes the device may write.
    pub const fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// The buffers that the device may write, each of them in RAM.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// A cursor over the readable bytes.
    pub fn reader<'a>(&'a self, ram: &'a GuestRam) -> ChainCursor<'a> {
        ChainCursor::new(ram, &self.readable, self.readable_len)
    }

    /// A cursor over the writable bytes.
    pub fn writer<'a>(&'a self, ram: &'a GuestRam) -> ChainCursor<'a> {
        ChainCursor::new(ram, &self.writable, self.writable_len)
    }
}

/// A position in one half of a chain.
#[derive(Clone)]
pub struct ChainCursor<'a> {
    ram: &'a GuestRam,
    segments: &'a [Segment],
    /// Bytes of the first segment that are behind the cursor.
    skipped: u32,
    remaining: u32,
}

impl<'a> ChainCursor<'a> {
    const fn new(ram: &'a GuestRam, segments: &'a [Segment], remaining: u32) -> Self {
        Self {
            ram,
            segments,
            skipped: 0,
            remaining,
        }
    }

    /// Bytes ahead of the cursor.
    pub const fn remaining(&self) -> u32 {
        self.remaining
    }

    /// Takes the next contiguous piece of at most `limit` bytes.
    fn take_segment(&mut self, limit: u32) -> Option<Segment> {
        while let Some((first, rest)) = self.segments.split_first() {
            let left = first.len - self.skipped;
            if left == 0 {
                self.segments = rest;
                self.skipped = 0;
                continue;
            }
            let len = left.min(limit);
            let piece = Segment {
                address: first.address + u64::from(self.skipped),
                len,
            };
            self.skipped += len;
            self.remaining -= len;
            return Some(piece);
        }
        None
    }

    /// Calls `each` with consecutive pieces until `len` bytes are covered; `false` if there are fewer.
    fn each_piece(
        &mut self,
        len: usize,
        mut each: impl FnMut(Segment, usize) -> Result<(), QueueError>,
    ) -> Result<(), QueueError> {
        let mut done = 0;
        while done < len {
            let limit = u32::try_from(len - done).unwrap_or(u32::MAX);
            let piece = self
                .take_segment(limit)
                .ok_or(QueueError::Request("remaining bytes"))?;
            each(piece, done)?;
            done += piece.len as usize;
        }
        Ok(())
    }

    /// Copies exactly `out.len()` bytes out of guest memory.
    pub fn read_exact(&mut self, out: &mut [u8]) -> Result<(), QueueError> {
        let ram = self.ram;
        self.each_piece(out.len(), |piece, at| {
            let part = &mut out[at..at + piece.len as usize];
            ram.read_slice(part, GuestAddress(piece.address))
                .map_err(|_| QueueError::Memory(piece.address))
        })
    }

    /// Copies all of `data` into guest memory.
    pub fn write_all(&mut self, data: &[u8]) -> Result<(), QueueError> {
        let ram = self.ram;
        self.each_piece(data.len(), |piece, at| {
            ram.write_slice(
                &data[at..at + piece.len as usize],
                GuestAddress(piece.address),
            )
            .map_err(|_| QueueError::Memory(piece.address))
        })
    }

    /// Moves on by `len` bytes.
    pub fn skip(&mut self, len: usize) -> Result<(), QueueError> {
        self.each_piece(len, |_, _| Ok(()))
    }

    /// Takes the next `len` bytes as slices of host memory, appended to `out`.
    pub fn take_slices(
        &mut self,
        len: usize,
        out: &mut Vec<RamSlice<'a>>,
    ) -> Result<(), QueueError> {
        let ram = self.ram;
        self.each_piece(len, |piece, _| {
            let address = GuestAddress(piece.address);
            for slice in GuestMemoryBackend::get_slices(ram, address, piece.len as usize) {
                out.push(slice.map_err(|_| QueueError::Memory(piece.address))?);
            }
            Ok(())
        })
    }
}

impl std::fmt::Debug for ChainCursor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChainCursor")
            .field("remaining", &self.remaining)
            .finish_non_exhaustive()
    }
}
