//! The device's side of a split virtqueue (virtio 1.3, 2.7) over hostile memory.
//!
//! Everything in the rings and descriptors is the guest's to change at any moment: each value is read
//! once, checked, and used from that copy. A ring that breaks the rules yields a [`QueueError`], after
//! which the device must be reset by its driver.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use skerry_hypervisor::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::chain::{Chain, Segment};
use crate::state::{StateError, require};

/// The largest queue that a split ring can have (virtio 1.3, 2.7).
pub const MAX_QUEUE_SIZE: u16 = 1 << 15;

const DESCRIPTOR_LEN: u64 = 16;
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;
/// Flags and index precede the entries of both rings.
const RING_HEADER: u64 = 4;

/// How the guest broke the rules of a virtqueue.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QueueError {
    /// The size is not a power of two, or beyond what the device offers.
    #[error(
        "The virtqueue size {0} is not a power of two up to the maximum; the driver must choose another"
    )]
    Size(u16),
    /// A ring is misaligned or not in RAM.
    #[error(
        "The virtqueue's {part} at {address:#x} is misaligned or outside RAM; the driver must place it elsewhere"
    )]
    Placement {
        /// Which of the three areas.
        part: &'static str,
        /// Where the driver put it.
        address: u64,
    },
    /// The available index moved by more than the queue's size.
    #[error("The available index jumped from {from} to {to}; the driver must reset the device")]
    AvailableJump {
        /// The index of the next entry that the device expected.
        from: u16,
        /// The index found.
        to: u16,
    },
    /// A descriptor index is outside the table.
    #[error("Descriptor {0} does not exist; the driver must reset the device")]
    Index(u16),
    /// A chain visits more descriptors than there are.
    #[error("The descriptor chain at {0} loops; the driver must reset the device")]
    Loop(u16),
    /// A buffer is not in RAM.
    #[error(
        "The buffer at {address:#x} of {len} bytes is not in RAM; the driver must reset the device"
    )]
    Buffer {
        /// Start of the buffer.
        address: u64,
        /// Its length.
        len: u32,
    },
    /// A device-readable buffer follows a device-writable one.
    #[error(
        "The chain at {0} has a readable buffer after a writable one; the driver must reset the device"
    )]
    Order(u16),
    /// An indirect table is misplaced, empty, of odd length, nested or continued.
    #[error(
        "The indirect table of the chain at {0} is malformed; the driver must reset the device"
    )]
    Indirect(u16),
    /// A chain describes 4 GiB or more.
    #[error("The chain at {0} is longer than 4 GiB; the driver must reset the device")]
    TooLong(u16),
    /// A request is too short for its header, or misses a part its type needs.
    #[error("A request lacks its {0}; the driver must reset the device")]
    Request(&'static str),
    /// Ring memory could not be accessed.
    #[error(
        "The virtqueue's memory at {0:#x} cannot be accessed; the driver must reset the device"
    )]
    Memory(u64),
}

/// Where a driver placed a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct QueueLayout {
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring ("driver area").
    pub available: u64,
    /// Used ring ("device area").
    pub used: u64,
}

impl QueueLayout {
    /// Checks size, alignment and that all three areas are in RAM (virtio 1.3, 2.7).
    pub fn validate(&self, max_size: u16, ram: &GuestRam) -> Result<(), QueueError> {
        if !self.size.is_power_of_two() || self.size > max_size {
            return Err(QueueError::Size(self.size));
        }
        let size = u64::from(self.size);
        for (part, address, align, len) in [
            (
                "descriptor table",
                self.descriptors,
                16,
                DESCRIPTOR_LEN * size,
            ),
            (
                "available ring",
                self.available,
                2,
                RING_HEADER + 2 * size + 2,
            ),
            ("used ring", self.used, 4, RING_HEADER + 8 * size + 2),
        ] {
            let in_ram = address.checked_add(len).is_some()
                && GuestMemoryBackend::check_range(ram, GuestAddress(address), len as usize);
            if address % align != 0 || !in_ram {
                return Err(QueueError::Placement { part, address });
            }
        }
        Ok(())
    }
}

/// A queue's indices for a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Index of the next available entry to take.
    pub next_available: u16,
    /// Index of the next used entry to fill.
    pub next_used: u16,
    /// The used index up to which the driver has been considered for an interrupt.
    pub signalled: u16,
}

/// One descriptor, copied out of the table.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Tells the servers of a device's queues to leave them alone, now or from some time on.
///
/// A device can be made to write into the rings that it serves, so that they never become empty.
#[derive(Debug)]
pub(super) struct Stop {
    now: AtomicBool,
    begun: Instant,
    /// In nanoseconds since `begun`; [`NEVER`] for never.
    from: AtomicU64,
}

const NEVER: u64 = u64::MAX;

impl Default for Stop {
    fn default() -> Self {
        Self {
            now: AtomicBool::new(false),
            begun: Instant::now(),
            from: AtomicU64::new(NEVER),
        }
    }
}

impl Stop {
    pub(super) fn set(&self, stop: bool) {
        self.now.store(stop, Ordering::SeqCst);
    }

    /// Stops when `patience` is over.
    pub(super) fn set_patience(&self, patience: Duration) {
        let from = self.begun.elapsed().saturating_add(patience);
        let from = u64::try_from(from.as_nanos()).unwrap_or(NEVER);
        self.from.store(from, Ordering::SeqCst);
    }

    /// Doesn't stop by itself any more; tells whether anybody may have stopped because it did.
    pub(super) fn end_patience(&self) -> bool {
        let from = self.from.swap(NEVER, Ordering::SeqCst);
        self.has_come(from)
    }

    fn has_come(&self, from: u64) -> bool {
        from != NEVER && self.begun.elapsed().as_nanos() >= u128::from(from)
    }

    pub(super) fn is_set(&self) -> bool {
        self.now.load(Ordering::SeqCst) || self.has_come(self.from.load(Ordering::SeqCst))
    }
}

/// A live split virtqueue.
pub struct Queue {
    ram: Arc<GuestRam>,
    layout: QueueLayout,
    next_available: Wrapping<u16>,
    next_used: Wrapping<u16>,
    signalled: Wrapping<u16>,
    event_index: bool,
    indirect: bool,
    /// The driver was told that it need not notify.
    notifications_off: bool,
    /// Chains whose vectors are used again.
    spare: Vec<Chain>,
    /// The machine wants the queue left alone: it looks empty from then on.
    stop: Arc<Stop>,
    /// The thread that serves the queue may wait for the host.
    may_wait: bool,
}

impl Queue {
    /// A queue with validated `layout`; `event_index` and `indirect` as negotiated.
    pub fn new(
        ram: Arc<GuestRam>,
        layout: QueueLayout,
        max_size: u16,
        event_index: bool,
        indirect: bool,
    ) -> Result<Self, QueueError> {
        layout.validate(max_size, &ram)?;
        Ok(Self {
            ram,
            layout,
            next_available: Wrapping(0),
            next_used: Wrapping(0),
            signalled: Wrapping(0),
            event_index,
            indirect,
            notifications_off: false,
            spare: Vec::new(),
            stop: Arc::default(),
            may_wait: true,
        })
    }

    /// Makes the queue look empty while `stop` is set, so that a driver that never stops adding chains
    /// can't keep its server from stopping.
    pub(super) fn stop_with(mut self, stop: &Arc<Stop>) -> Self {
        self.stop = stop.clone();
        self
    }

    pub(super) fn set_may_wait(&mut self, may_wait: bool) {
        self.may_wait = may_wait;
    }

    /// Whether the serving thread may wait for the host, as a vCPU's may not.
    pub const fn may_wait(&self) -> bool {
        self.may_wait
    }

    /// Guest memory.
    pub const fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Number of descriptors.
    pub const fn size(&self) -> u16 {
        self.layout.size
    }

    fn slot(&self, index: Wrapping<u16>) -> u64 {
        // The size is a power of two.
        u64::from(index.0 & (self.layout.size - 1))
    }

    fn load(&self, address: u64, order: Ordering) -> Result<u16, QueueError> {
        self.ram
            .load::<u16>(GuestAddress(address), order)
            .map(u16::from_le)
            .map_err(|_| QueueError::Memory(address))
    }

    fn store(&self, address: u64, value: u16, order: Ordering) -> Result<(), QueueError> {
        self.ram
            .store(value.to_le(), GuestAddress(address), order)
            .map_err(|_| QueueError::Memory(address))
    }

    fn descriptor(&self, table: u64, index: u16) -> Result<Descriptor, QueueError> {
        let address = table
            .checked_add(DESCRIPTOR_LEN * u64::from(index))
            .ok_or(QueueError::Memory(table))?;
        let mut raw = [0; 16];
        self.ram
            .read_slice(&mut raw, GuestAddress(address))
            .map_err(|_| QueueError::Memory(address))?;
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            f0,
            f1,
            n0,
            n1,
        ] = raw;
        Ok(Descriptor {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }

    /// How many chains the driver has made available.
    pub fn available(&self) -> Result<u16, QueueError> {
        let index = self.load(self.layout.available + 2, Ordering::Acquire)?;
        let count = (Wrapping(index) - self.next_available).0;
        if count > self.layout.size {
            return Err(QueueError::AvailableJump {
                from: self.next_available.0,
                to: index,
            });
        }
        Ok(count)
    }

    /// Takes the next chain, if there is one. It must come back through [`complete`](Self::complete)
    /// or [`put_back`](Self::put_back).
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if self.stop.is_set() || self.available()? == 0 {
            return Ok(None);
        }
        let entry = self.layout.available + RING_HEADER + 2 * self.slot(self.next_available);
        let head = self.load(entry, Ordering::Relaxed)?;
        let mut chain = self.spare.pop().unwrap_or_default();
        chain.start(head);
        self.walk(&mut chain)?;
        self.next_available += 1;
        Ok(Some(chain))
    }

    /// Undoes the last [`pop`](Self::pop): the chain stays available.
    pub fn put_back(&mut self, chain: Chain) {
        self.next_available -= 1;
        self.spare.push(chain);
    }

    /// Collects the buffers of the chain that starts at `chain.head()`.
    fn walk(&self, chain: &mut Chain) -> Result<(), QueueError> {
        let head = chain.head();
        let mut index = head;
        for _ in 0..self.layout.size {
            if index >= self.layout.size {
                return Err(QueueError::Index(index));
            }
            let descriptor = self.descriptor(self.layout.descriptors, index)?;
            if descriptor.flags & DESC_INDIRECT != 0 {
                // An indirect descriptor ends its chain; WRITE says nothing on it (2.7.5.3).
                if !self.indirect || descriptor.flags & DESC_NEXT != 0 {
                    return Err(QueueError::Indirect(head));
                }
                return self.walk_indirect(chain, &descriptor);
            }
            self.add_segment(chain, &descriptor)?;
            if descriptor.flags & DESC_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(QueueError::Loop(head))
    }

    fn walk_indirect(&self, chain: &mut Chain, table: &Descriptor) -> Result<(), QueueError> {
        let head = chain.head();
        let count = u64::from(table.len) / DESCRIPTOR_LEN;
        // A chain may not be longer than the queue (2.7.5.3.1).
        let fits = count >= 1
            && count <= u64::from(self.layout.size)
            && u64::from(table.len) % DESCRIPTOR_LEN == 0
            && self.in_ram(table.address, table.len);
        if !fits {
            return Err(QueueError::Indirect(head));
        }
        let mut index = 0;
        for _ in 0..count {
            let descriptor = self.descriptor(table.address, index)?;
            if descriptor.flags & DESC_INDIRECT != 0 {
                return Err(QueueError::Indirect(head));
            }
            self.add_segment(chain, &descriptor)?;
            if descriptor.flags & DESC_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
            if u64::from(index) >= count {
                return Err(QueueError::Index(index));
            }
        }
        Err(QueueError::Loop(head))
    }

    fn in_ram(&self, address: u64, len: u32) -> bool {
        address.checked_add(len.into()).is_some()
            && GuestMemoryBackend::check_range(&*self.ram, GuestAddress(address), len as usize)
    }

    fn add_segment(&self, chain: &mut Chain, descriptor: &Descriptor) -> Result<(), QueueError> {
        let Descriptor {
            address,
            len,
            flags,
            next: _,
        } = *descriptor;
        if len > 0 && !self.in_ram(address, len) {
            return Err(QueueError::Buffer { address, len });
        }
        let writable = flags & DESC_WRITE != 0;
        if !writable && chain.has_writable() {
            return Err(QueueError::Order(chain.head()));
        }
        chain
            .push(Segment { address, len }, writable)
            .map_err(|_| QueueError::TooLong(chain.head()))
    }

    /// Returns a chain to the driver with `written` bytes in its writable part.
    pub fn complete(&mut self, chain: Chain, written: u32) -> Result<(), QueueError> {
        self.fill_used(chain, written)?;
        self.show_used()
    }

    /// Fills the next used entry for a chain, which the driver sees with
    /// [`show_used`](Self::show_used): what belongs together must not be seen in parts.
    pub fn fill_used(&mut self, chain: Chain, written: u32) -> Result<(), QueueError> {
        let entry = self.layout.used + RING_HEADER + 8 * self.slot(self.next_used);
        let mut raw = [0; 8];
        raw[..4].copy_from_slice(&u32::from(chain.head()).to_le_bytes());
        raw[4..].copy_from_slice(&written.to_le_bytes());
        self.ram
            .write_slice(&raw, GuestAddress(entry))
            .map_err(|_| QueueError::Memory(entry))?;
        self.next_used += 1;
        if self.spare.len() < 4 {
            self.spare.push(chain);
        }
        Ok(())
    }

    /// Lets the driver see the entries that were filled.
    pub fn show_used(&mut self) -> Result<(), QueueError> {
        self.store(self.layout.used + 2, self.next_used.0, Ordering::Release)
    }

    /// Whether the driver wants an interrupt for what was completed since the last call (2.7.7, 2.7.10).
    pub fn take_interrupt(&mut self) -> Result<bool, QueueError> {
        let (old, new) = (self.signalled, self.next_used);
        if old == new {
            return Ok(false);
        }
        self.signalled = new;
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        if self.event_index {
            let at = self.layout.available + RING_HEADER + 2 * u64::from(self.layout.size);
            let event = Wrapping(self.load(at, Ordering::Relaxed)?);
            Ok((new - event - Wrapping(1)) < (new - old))
        } else {
            let flags = self.load(self.layout.available, Ordering::Relaxed)?;
            Ok(flags & AVAIL_NO_INTERRUPT == 0)
        }
    }

    /// Tells the driver that it need not notify for new chains.
    pub fn disable_notifications(&mut self) -> Result<(), QueueError> {
        if !self.notifications_off {
            self.notifications_off = true;
            // With event indices, an event index that is left behind does it.
            if !self.event_index {
                self.store(self.layout.used, USED_NO_NOTIFY, Ordering::Relaxed)?;
            }
        }
        Ok(())
    }

    /// Asks the driver to notify for the next chain. Returns whether one arrived meanwhile, in which
    /// case no notification may come for it.
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        self.notifications_off = false;
        if self.event_index {
            let at = self.layout.used + RING_HEADER + 8 * u64::from(self.layout.size);
            self.store(at, self.next_available.0, Ordering::Relaxed)?;
        } else {
            self.store(self.layout.used, 0, Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.available()? != 0)
    }

    /// Asks the driver to notify when there are more than `count` chains, which are left in the ring.
    /// Returns whether there are already, in which case no notification may come for them.
    pub fn await_more(&mut self, count: u16) -> Result<bool, QueueError> {
        self.notifications_off = false;
        if self.event_index {
            let at = self.layout.used + RING_HEADER + 8 * u64::from(self.layout.size);
            let event = self.next_available + Wrapping(count);
            self.store(at, event.0, Ordering::Relaxed)?;
        } else {
            self.store(self.layout.used, 0, Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        Ok(!self.stop.is_set() && self.available()? > count)
    }

    /// The indices for a snapshot.
    pub const fn save(&self) -> QueueState {
        QueueState {
            next_available: self.next_available.0,
            next_used: self.next_used.0,
            signalled: self.signalled.0,
        }
    }

    /// Puts saved indices back.
    pub fn restore(&mut self, saved: QueueState) -> Result<(), StateError> {
        let QueueState {
            next_available,
            next_used,
            signalled,
        } = saved;
        let in_flight = next_available.wrapping_sub(next_used);
        require(
            in_flight <= self.layout.size,
            "virtqueue",
            "more chains are in flight than exist",
        )?;
        self.next_available = Wrapping(next_available);
        self.next_used = Wrapping(next_used);
        self.signalled = Wrapping(signalled);
        Ok(())
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("layout", &self.layout)
            .field("indices", &self.save())
            .finish()
    }
}
