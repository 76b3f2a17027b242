//! Guest-physical memory as host and backends share it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestMemoryMmap, MmapRegion};

/// Bytes in the smallest page of the architecture.
pub const PAGE_SIZE: usize = 4096;

/// Guest RAM as devices and loaders see it: every write through it is seen by the region's
/// [`PageTracker`].
pub type GuestRam = GuestMemoryMmap<PageTracker>;

/// One host mapping that backs guest memory.
pub type RamRegion = MmapRegion<PageTracker>;

/// A guest-physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpa({:#x})", self.0)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A range of guest-physical addresses and the host memory behind it.
///
/// The slot owns a reference to its mapping, so that a backend can't be left with an address
/// whose memory is gone. `gpa`, `offset` and `len` are multiples of [`PAGE_SIZE`].
#[derive(Clone)]
pub struct MemorySlot {
    /// First guest-physical address of the range.
    pub gpa: Gpa,
    /// The host mapping.
    pub region: Arc<RamRegion>,
    /// Where the range starts in `region`, in bytes.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
    /// Guest writes leave the guest as [`crate::Exit::MmioWrite`] and change nothing.
    pub read_only: bool,
    /// Guest writes are logged for [`crate::Vm::dirty_pages`].
    pub log_dirty: bool,
}

impl MemorySlot {
    /// Checks that the slot is made of whole pages, inside its region and inside the address
    /// space.
    pub fn check(&self) -> Result<(), crate::MapError> {
        let &Self {
            gpa, offset, len, ..
        } = self;
        let whole = [gpa.0, offset as u64, len as u64]
            .iter()
            .all(|n| n.is_multiple_of(PAGE_SIZE as u64));
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= self.region.size());
        if whole && inside && len != 0 && gpa.0.checked_add(len as u64).is_some() {
            Ok(())
        } else {
            Err(crate::MapError::Misaligned { gpa, len })
        }
    }
}

impl fmt::Debug for MemorySlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemorySlot")
            .field("gpa", &self.gpa)
            .field("len", &self.len)
            .field("read_only", &self.read_only)
            .field("log_dirty", &self.log_dirty)
            .finish_non_exhaustive()
    }
}

/// Told of every write that the host makes to guest memory.
///
/// A backend that keeps anything derived from guest memory (decoded instructions) registers one
/// with [`PageTracker::observe`]. Called on the writing thread, after the write, possibly often:
/// it must be cheap and must not block.
pub trait HostWriteObserver: Send + Sync {
    /// `len` bytes at `offset` of the region were written.
    fn host_wrote(&self, offset: usize, len: usize);
}

/// What the host remembers of its own writes to one [`RamRegion`].
#[derive(Default)]
pub struct PageTracker {
    logging: AtomicBool,
    dirty: Box<[AtomicU64]>,
    observed: AtomicBool,
    observers: RwLock<Vec<Arc<dyn HostWriteObserver>>>,
}

impl fmt::Debug for PageTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTracker")
            .field("logging", &self.logging)
            .field("pages", &(self.dirty.len() * 64))
            .finish_non_exhaustive()
    }
}

impl PageTracker {
    /// Adds an observer of host writes; it stays as long as the region does.
    pub fn observe(&self, observer: Arc<dyn HostWriteObserver>) {
        self.observers
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .push(observer);
        self.observed.store(true, Ordering::Release);
    }

    /// Starts or stops the log of pages that the host writes; starting clears it.
    pub fn set_logging(&self, on: bool) {
        if on {
            for word in &self.dirty {
                word.store(0, Ordering::Relaxed);
            }
        }
        self.logging.store(on, Ordering::Release);
    }

    /// Takes and clears the log: one bit per page of the region, lowest bit first.
    pub fn take_dirty(&self) -> Vec<u64> {
        self.dirty
            .iter()
            .map(|word| word.swap(0, Ordering::AcqRel))
            .collect()
    }

    fn log(&self, offset: usize, len: usize) {
        let first = offset / PAGE_SIZE;
        let last = offset.saturating_add(len - 1) / PAGE_SIZE;
        for page in first..=last {
            let Some(word) = self.dirty.get(page / 64) else {
                return;
            };
            word.fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }
}

impl<'a> WithBitmapSlice<'a> for PageTracker {
    type S = RefSlice<'a, PageTracker>;
}

impl Bitmap for PageTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        if self.logging.load(Ordering::Relaxed) {
            self.log(offset, len);
        }
        if self.observed.load(Ordering::Acquire) {
            let observers = self
                .observers
                .read()
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            for observer in observers.iter() {
                observer.host_wrote(offset, len);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_SIZE;
        self.dirty
            .get(page / 64)
            .is_some_and(|word| word.load(Ordering::Acquire) & (1 << (page % 64)) != 0)
    }

    fn slice_at(&self, offset: usize) -> <Self as WithBitmapSlice<'_>>::S {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for PageTracker {
    fn with_len(len: usize) -> Self {
        let words = len.div_ceil(PAGE_SIZE).div_ceil(64);
        Self {
            dirty: (0..words).map(|_| AtomicU64::new(0)).collect(),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    struct Log(Mutex<Vec<(usize, usize)>>);

    impl HostWriteObserver for Log {
        fn host_wrote(&self, offset: usize, len: usize) {
            self.0.lock().unwrap().push((offset, len));
        }
    }

    #[test]
    fn host_writes_are_seen_by_page_and_by_observer() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0x10_0000), 0x10_000)]).unwrap();
        let region = ram.iter().next().unwrap().get_mmap();
        let log = Arc::new(Log(Mutex::new(Vec::new())));
        region.bitmap().observe(log.clone());
        region.bitmap().set_logging(true);
        ram.write_slice(&[1; 8], GuestAddress(0x10_1ffc)).unwrap();
        assert_eq!(region.bitmap().take_dirty(), vec![0b110]);
        assert_eq!(region.bitmap().take_dirty(), vec![0]);
        let seen = log.0.lock().unwrap();
        let covered: usize = seen.iter().map(|(_, len)| len).sum();
        assert_eq!((seen[0].0, covered), (0x1ffc, 8));
    }
}
