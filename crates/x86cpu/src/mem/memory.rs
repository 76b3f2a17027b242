//! Guest-physical memory: slots, and what is remembered of each page.
#![expect(
    unsafe_code,
    reason = "hands out host addresses of guest memory that its slots keep mapped"
)]

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};

use thiserror::Error;
use vm_memory::MmapRegion;
use vm_memory::bitmap::Bitmap;

use crate::mem::dirty::{self, DirtyLog};
use crate::mem::int::{copy_in, copy_out};
use crate::mem::{PAGE_MASK, PAGE_SHIFT, PAGE_SIZE};
use crate::shared::{CpuShared, Machine, request};

/// What is known of one page of RAM, shared by all processors.
#[derive(Debug, Default)]
pub struct PageState {
    /// Which of the page's 64-byte granules hold decoded code.
    granules: AtomicU64,
    /// Changes whenever decoded code of the page may be stale.
    version: AtomicU32,
    /// Some processor has found a page table in it.
    table: AtomicBool,
    /// Bit 31: holds code, so that writes take the slow path. Those below: which processors (id mod
    /// 31) may hold a TLB entry through which they write. From bit 32: how often the page has become
    /// data again.
    users: AtomicU64,
}

/// In [`PageState::users`].
const CODE: u64 = 1 << 31;
/// The same: the processors.
const WRITERS: u64 = CODE - 1;
/// The same: the least bit of the count.
const EPOCH: u64 = 1 << 32;

fn writer_bit(cpu: u32) -> u32 {
    1 << (cpu % 31)
}

fn granules_of(offset: usize, len: usize) -> u64 {
    let first = (offset & (PAGE_SIZE - 1)) / 64;
    let last = ((offset & (PAGE_SIZE - 1)) + len.max(1) - 1).min(PAGE_SIZE - 1) / 64;
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

/// Counts changes of any page's version, so that what was found current needn't look at its page
/// again until something has changed somewhere.
static CODE_CHANGES: AtomicU64 = AtomicU64::new(1);

/// One of the last changes: its number, and the address of the page's state.
struct Change {
    number: AtomicU64,
    page: AtomicUsize,
}

static CHANGED: [Change; 256] = [const {
    Change {
        number: AtomicU64::new(0),
        page: AtomicUsize::new(0),
    }
}; 256];

/// Names the pages whose code has changed, by the addresses of their states, from the change after
/// `since` up to `now`. `false` if not all of them are known any more.
pub(crate) fn changed_pages(since: u64, now: u64, mut each: impl FnMut(usize)) -> bool {
    if now.wrapping_sub(since) >= CHANGED.len() as u64 {
        return false;
    }
    for number in since + 1..=now {
        let change = &CHANGED[number as usize % CHANGED.len()];
        let before = change.number.load(Ordering::SeqCst);
        let page = change.page.load(Ordering::SeqCst);
        if before != number || change.number.load(Ordering::SeqCst) != number {
            return false;
        }
        each(page);
    }
    true
}

/// How often decoded code has become stale in this process, counted from 1. To be read before the
/// versions of pages are.
#[inline(always)]
pub(crate) fn code_changes() -> u64 {
    CODE_CHANGES.load(Ordering::Acquire)
}

impl PageState {
    /// The version that decoded code must have been made from.
    #[inline(always)]
    pub(crate) fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// Notes that processor `cpu` writes the page through its TLB from now on; `false` if it must
    /// not, because the page holds code.
    pub(super) fn add_writer(&self, cpu: u32) -> bool {
        self.users
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |users| {
                (users & CODE == 0).then_some(users | u64::from(writer_bit(cpu)))
            })
            .is_ok()
    }

    /// Takes note that there is a page table in the page.
    #[inline]
    pub(super) fn note_table(&self) {
        if !self.table.load(Ordering::Relaxed) {
            self.table.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the page, although it is taken for one of code, has none left.
    pub(super) fn has_no_code(&self) -> bool {
        self.granules.load(Ordering::SeqCst) == 0
    }

    /// Whether the page holds code.
    pub(super) fn is_code(&self) -> bool {
        self.users.load(Ordering::SeqCst) & CODE != 0
    }

    /// Whether the page holds code and nobody can write it unseen.
    pub(crate) fn is_claimed(&self) -> bool {
        self.users.load(Ordering::SeqCst) & (CODE | WRITERS) == CODE
    }

    /// Makes the page hold code. Gives the processors that may still write it unseen, with the
    /// count that [`PageState::clear_writers`] wants back.
    fn make_code(&self) -> u64 {
        self.users.fetch_or(CODE, Ordering::SeqCst) & !CODE
    }

    /// All writers that `make_code` gave have given up. But one that has made the page data since,
    /// and writes it unseen again, is none of them.
    fn clear_writers(&self, found: u64) {
        let _ = self
            .users
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |users| {
                (users / EPOCH == found / EPOCH).then_some(users & !(found & WRITERS))
            });
    }

    /// Marks bytes as decoded; to be called before they are compared with what was decoded.
    pub(crate) fn add_code(&self, offset: usize, len: usize) {
        self.granules
            .fetch_or(granules_of(offset, len), Ordering::SeqCst);
    }

    /// After a write of bytes: drops decoded code that they overlap. `true` if there was any.
    ///
    /// The granules go first: a decoder that comes between sets them again and reads the version
    /// that is about to go.
    pub(crate) fn wrote(&self, offset: usize, len: usize) -> bool {
        // The write must be visible before the granules are read: the decoder sets them before it
        // reads the bytes for the last time.
        fence(Ordering::SeqCst);
        if self.granules.load(Ordering::SeqCst) & granules_of(offset, len) == 0 {
            return false;
        }
        self.granules.swap(0, Ordering::SeqCst);
        self.make_stale();
        true
    }

    fn make_stale(&self) {
        self.version.fetch_add(1, Ordering::SeqCst);
        let number = CODE_CHANGES.fetch_add(1, Ordering::SeqCst) + 1;
        let change = &CHANGED[number as usize % CHANGED.len()];
        change.number.store(0, Ordering::SeqCst);
        change
            .page
            .store(std::ptr::from_ref(self) as usize, Ordering::SeqCst);
        change.number.store(number, Ordering::SeqCst);
    }

    /// Makes the page plain data again, and `cpu` one of its writers. `true` if code was dropped.
    pub(super) fn make_data(&self, cpu: u32) -> bool {
        // In this order: a decoder that still finds the page claimed when it is done has read the
        // version that goes here.
        let _ = self
            .users
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |users| {
                Some((users & !CODE).wrapping_add(EPOCH) | u64::from(writer_bit(cpu)))
            });
        let had_code = self.granules.swap(0, Ordering::SeqCst) != 0;
        self.make_stale();
        had_code
    }
}

/// Host memory that can back slots, and the state of its pages.
///
/// One per mapping, however many slots show it.
pub struct Backing {
    address: usize,
    len: usize,
    pages: Box<[PageState]>,
    /// How often the host wrote to page tables.
    table_writes: AtomicU64,
    _mapping: Box<dyn Send + Sync>,
}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backing")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Backing {
    /// Backs slots by a mapping; `None` if it is empty or not page-aligned.
    pub fn new<B: Bitmap + Send + Sync + 'static>(
        mapping: Arc<MmapRegion<B>>,
    ) -> Option<Arc<Self>> {
        let address = mapping.as_ptr() as usize;
        let len = mapping.size();
        if len == 0 || !address.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return None;
        }
        // Not written before something is known of a page: memory of 8 GiB has 48 MiB of this.
        // SAFETY: atomics of zeros are `PageState::default`.
        let pages = unsafe { Box::<[PageState]>::new_zeroed_slice(len / PAGE_SIZE).assume_init() };
        Some(Arc::new(Self {
            address,
            len,
            pages,
            table_writes: AtomicU64::new(0),
            _mapping: Box::new(mapping),
        }))
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a backing has at least a page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// To be called after the host has written `len` bytes at `offset`: decoded code of them goes, and a
    /// processor that is given a state next forgets its translations, if there was a page table.
    pub fn host_wrote(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        // As in `PageState::wrote`: first the write, then the look at what is decoded.
        fence(Ordering::SeqCst);
        let last = offset.saturating_add(len - 1).min(self.len - 1);
        let mut at = offset;
        while at <= last {
            let end = (at | (PAGE_SIZE - 1)).min(last);
            if let Some(page) = self.pages.get(at / PAGE_SIZE) {
                if page.is_code() {
                    page.wrote(at, end - at + 1);
                }
                if page.table.load(Ordering::Relaxed) {
                    self.table_writes.fetch_add(1, Ordering::SeqCst);
                }
            }
            at = end + 1;
        }
    }
}

/// A range of guest-physical addresses and the memory behind it.
#[derive(Clone, Debug)]
pub struct Slot {
    /// First address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// The memory.
    pub backing: Arc<Backing>,
    /// Where in it.
    pub offset: usize,
    /// Guest writes become exits.
    pub read_only: bool,
    /// Pages that the guest wrote, a bit each, if that is logged.
    log: Option<Arc<DirtyLog>>,
}

/// A page of RAM, found by its guest-physical address.
#[derive(Clone, Copy)]
pub(crate) struct RamPage<'a> {
    /// Host address of its first byte.
    pub host: usize,
    /// Guest writes become exits.
    pub read_only: bool,
    /// What is known of it.
    pub state: &'a PageState,
    log: Option<&'a DirtyLog>,
    /// Number of the page in its slot.
    number: usize,
}

impl RamPage<'_> {
    /// Copies bytes out; those past the page's end stay as they are in `into`.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) {
        let offset = offset.min(PAGE_SIZE);
        let len = into.len().min(PAGE_SIZE - offset);
        // SAFETY: within the page, which its slot keeps mapped.
        unsafe { copy_out(self.host + offset, &mut into[..len]) };
    }

    /// Logs a guest write.
    pub(super) fn log_write(&self) {
        if let Some(log) = self.log {
            log.add(self.number);
        }
    }
}

/// All slots at one moment, sorted by address.
#[derive(Debug, Default)]
pub(crate) struct SlotTable {
    slots: Vec<Slot>,
}

impl SlotTable {
    /// A number that is another one when the host has written to page tables.
    pub(crate) fn table_writes(&self) -> u64 {
        let backings = self.slots.iter().map(|slot| &slot.backing);
        backings.fold(0, |all, backing| {
            all.wrapping_add(backing.table_writes.load(Ordering::SeqCst))
        })
    }

    /// The page of RAM at `gpa`.
    pub(crate) fn page(&self, gpa: u64) -> Option<RamPage<'_>> {
        let after = self.slots.partition_point(|slot| slot.gpa <= gpa);
        let slot = self.slots.get(after.checked_sub(1)?)?;
        let within = (gpa - slot.gpa) & !PAGE_MASK;
        if within >= slot.len {
            return None;
        }
        let offset = slot.offset + within as usize;
        let number = (within >> PAGE_SHIFT) as usize;
        Some(RamPage {
            host: slot.backing.address + offset,
            read_only: slot.read_only,
            state: &slot.backing.pages[offset / PAGE_SIZE],
            log: slot.log.as_deref(),
            number,
        })
    }
}

/// A change of the memory map was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MapRefused {
    /// Not whole pages within the backing.
    #[error("Memory slot of {len:#x} bytes at {gpa:#x} isn't made of whole pages of its backing")]
    Misaligned {
        /// First address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// Overlaps another.
    #[error("Memory slot of {len:#x} bytes at {gpa:#x} overlaps one that is mapped")]
    Overlap {
        /// First address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// There is none.
    #[error("No memory slot starts at {0:#x}")]
    NotMapped(u64),
    /// The slot has no log.
    #[error("The memory slot at {0:#x} keeps no dirty log")]
    NotLogged(u64),
}

/// Guest-physical memory of one machine.
#[derive(Debug, Default)]
pub struct Memory {
    table: Mutex<Arc<SlotTable>>,
    /// Counts everything that makes TLB entries stale from outside; see [`CpuShared::memory_seen`].
    generation: AtomicU64,
    /// Held for locked accesses that cross a page, which no host instruction does at once.
    pub(super) split_lock: Mutex<()>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half-done under these locks, so a panic elsewhere doesn't spoil them.
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn new_log(len: u64) -> Arc<DirtyLog> {
    Arc::new(DirtyLog::new((len >> PAGE_SHIFT) as usize))
}

impl Memory {
    /// No slots.
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) fn slots(&self) -> Arc<SlotTable> {
        locked(&self.table).clone()
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Takes the lock of accesses that no host instruction does at once.
    pub(super) fn lock_split(&self) -> MutexGuard<'_, ()> {
        locked(&self.split_lock)
    }

    /// The backing that already shows the mapping at `address`, so that all slots of one mapping
    /// share the state of its pages.
    pub fn backing_at(&self, address: *const u8) -> Option<Arc<Backing>> {
        locked(&self.table)
            .slots
            .iter()
            .find(|slot| slot.backing.address == address as usize)
            .map(|slot| slot.backing.clone())
    }

    fn physical(
        &self,
        gpa: u64,
        len: usize,
        write: bool,
        mut part: impl FnMut(RamPage<'_>, usize, usize, usize),
    ) -> bool {
        let slots = self.slots();
        let mut done = 0;
        while done < len {
            let at = gpa.wrapping_add(done as u64);
            let offset = (at & PAGE_MASK) as usize;
            let here = (PAGE_SIZE - offset).min(len - done);
            let Some(page) = slots.page(at) else {
                return false;
            };
            if write && page.read_only {
                return false;
            }
            part(page, offset, done, here);
            done += here;
        }
        true
    }

    /// Reads guest-physical memory for the processor itself; `false` if there is no RAM.
    pub fn read_physical(&self, gpa: u64, into: &mut [u8]) -> bool {
        self.physical(gpa, into.len(), false, |page, offset, done, here| {
            page.read(offset, &mut into[done..done + here]);
        })
    }

    /// Writes guest-physical memory for the processor itself; `false` if there is no RAM, or none
    /// that the guest could write.
    pub fn write_physical(&self, gpa: u64, from: &[u8]) -> bool {
        self.physical(gpa, from.len(), true, |page, offset, done, here| {
            page.log_write();
            // SAFETY: within the page, which its slot keeps mapped and lets be written.
            unsafe { copy_in(page.host + offset, &from[done..done + here]) };
            if page.state.is_code() {
                page.state.wrote(offset, here);
            }
        })
    }

    fn change<R>(
        &self,
        edit: impl FnOnce(&mut Vec<Slot>) -> Result<R, MapRefused>,
    ) -> Result<R, MapRefused> {
        let mut table = locked(&self.table);
        let mut slots = table.slots.clone();
        let result = edit(&mut slots)?;
        *table = Arc::new(SlotTable { slots });
        Ok(result)
    }
}

fn position(slots: &[Slot], gpa: u64) -> Result<usize, MapRefused> {
    slots
        .iter()
        .position(|slot| slot.gpa == gpa)
        .ok_or(MapRefused::NotMapped(gpa))
}

impl Machine {
    /// Maps `len` bytes at `offset` of `backing`. Processors may be running.
    pub fn map(
        &self,
        gpa: u64,
        len: u64,
        backing: &Arc<Backing>,
        offset: usize,
        read_only: bool,
        log_dirty: bool,
    ) -> Result<(), MapRefused> {
        let misaligned = MapRefused::Misaligned { gpa, len };
        let end = gpa.checked_add(len).ok_or(misaligned)?;
        let end_offset = usize::try_from(len)
            .ok()
            .and_then(|len| offset.checked_add(len))
            .ok_or(misaligned)?;
        if len == 0
            || (gpa | len | offset as u64) & PAGE_MASK != 0
            || end_offset > backing.len
            || end > 1 << 52
        {
            return Err(misaligned);
        }
        self.memory.change(|slots| {
            if slots.iter().any(|s| s.gpa < end && gpa < s.gpa + s.len) {
                return Err(MapRefused::Overlap { gpa, len });
            }
            let at = slots.partition_point(|slot| slot.gpa < gpa);
            slots.insert(
                at,
                Slot {
                    gpa,
                    len,
                    backing: backing.clone(),
                    offset,
                    read_only,
                    log: log_dirty.then(|| new_log(len)),
                },
            );
            Ok(())
        })?;
        self.memory_changed(None);
        Ok(())
    }

    /// Unmaps the slot at `gpa`. When this returns no processor accesses it any more.
    pub fn unmap(&self, gpa: u64) -> Result<(), MapRefused> {
        let removed = self.memory.change(|slots| {
            let at = position(slots, gpa)?;
            Ok(slots.remove(at))
        })?;
        self.memory_changed(None);
        drop(removed);
        Ok(())
    }

    /// Changes whether the slot at `gpa` is read-only and whether its writes are logged; a log
    /// that goes on keeps what it has.
    pub fn protect(&self, gpa: u64, read_only: bool, log_dirty: bool) -> Result<(), MapRefused> {
        self.memory.change(|slots| {
            let at = position(slots, gpa)?;
            let slot = &mut slots[at];
            slot.read_only = read_only;
            slot.log = match slot.log.take() {
                Some(log) if log_dirty => Some(log),
                None if log_dirty => Some(new_log(slot.len)),
                _ => None,
            };
            Ok(())
        })?;
        self.memory_changed(None);
        Ok(())
    }

    /// Takes and clears the log of the slot at `gpa`: a bit per page, lowest first.
    ///
    /// A write that a processor makes until this returns is in what was taken: the bits go first,
    /// then every processor gives up the entries through which it writes without logging.
    pub fn take_dirty(&self, gpa: u64) -> Result<Vec<u64>, MapRefused> {
        let log = self.log(gpa)?;
        let mut taken = vec![0; log.words()];
        self.take_log(&log, |word, bits| taken[word] = bits);
        Ok(taken)
    }

    /// Takes and clears the same log, and names the pages in it, ascending.
    ///
    /// As with [`Machine::take_dirty`], but `each` is called before processors have given up their
    /// entries: what the pages hold is for later.
    pub fn drain_dirty(&self, gpa: u64, each: &mut dyn FnMut(u64)) -> Result<(), MapRefused> {
        let log = self.log(gpa)?;
        self.take_log(&log, |word, taken| {
            for bit in dirty::bits(taken) {
                each((word * 64) as u64 + u64::from(bit));
            }
        });
        Ok(())
    }

    fn log(&self, gpa: u64) -> Result<Arc<DirtyLog>, MapRefused> {
        let table = self.memory.slots();
        let slot = &table.slots[position(&table.slots, gpa)?];
        slot.log.clone().ok_or(MapRefused::NotLogged(gpa))
    }

    /// Where nothing was logged, no processor has an entry through which it writes without logging.
    fn take_log(&self, log: &DirtyLog, mut each: impl FnMut(usize, u64)) {
        let mut any = false;
        log.take(|word, taken| {
            any = true;
            each(word, taken);
        });
        if any {
            self.memory_changed(None);
        }
    }

    /// Makes every processor bring its TLB up to date, and waits until those that run guest code
    /// have done so. A processor that calls this passes itself: it answers others while it waits.
    pub(crate) fn memory_changed(&self, caller: Option<&mut dyn FnMut()>) {
        let generation = self.memory.generation.fetch_add(1, Ordering::SeqCst) + 1;
        self.wait_for(generation, u32::MAX, None, caller);
    }

    fn wait_for(
        &self,
        generation: u64,
        processors: u32,
        own: Option<u32>,
        mut answer: Option<&mut dyn FnMut()>,
    ) {
        let others = || {
            self.cpus
                .iter()
                .enumerate()
                .filter(|(id, _)| own != Some(*id as u32))
                .filter(|(id, _)| writer_bit(*id as u32) & processors != 0)
                .filter_map(|(_, cpu)| cpu.get())
        };
        for cpu in others() {
            cpu.request(request::MEMORY);
        }
        let behind = |cpu: &CpuShared| cpu.memory_seen.load(Ordering::SeqCst) < generation;
        let mut spins = 0u32;
        while others().any(|cpu| behind(cpu)) {
            if let Some(answer) = &mut answer {
                answer();
            }
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(64) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// Makes a page hold code, for processor `own` that is about to decode it. On return no
    /// processor has a TLB entry left through which it writes the page unseen, but perhaps `own`:
    /// the result says whether it must drop its.
    pub(crate) fn make_code(&self, page: &PageState, own: u32, answer: &mut dyn FnMut()) -> bool {
        if page.is_claimed() {
            return false;
        }
        let found = page.make_code();
        let writers = (found & WRITERS) as u32;
        // Bits are shared where there are more processors than bits.
        let others = if self.cpus.len() > 31 {
            writers
        } else {
            writers & !writer_bit(own)
        };
        if others != 0 {
            let generation = self.memory.generation.fetch_add(1, Ordering::SeqCst) + 1;
            self.wait_for(generation, others, Some(own), Some(answer));
        }
        page.clear_writers(found);
        writers & writer_bit(own) != 0
    }
}
