//! Guest memory against its base: what was written since, and how it goes back.
//!
//! ```text
//!  guest's writes ─► the backend's log ─┐ collect   ┌─► written: since the base ─► diffs, rewind
//!  host's writes ──► PageTracker's log ─┴───────────┴─► fresh: since last asked ─► rounds of a copy
//!  base: layers of files, zero elsewhere ◄── rebase: what was written becomes a layer, mapped
//! ```
//! Nothing is logged, and nothing here costs anything, until it is asked for.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, MutexGuard};
use skerry_hypervisor::{
    DirtyLogError, Gpa, GuestRam, MapError, PAGE_SIZE, StateError, Statistics, Vm,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::MachineError;
use crate::layers::Base;
use crate::memory::{self, Region, SavedMemory, SavedRun};
use crate::pages::PageSet;

const PAGE: u64 = PAGE_SIZE as u64;
/// Bytes that are read at a time where there may be many.
const CHUNK: usize = 256 << 10;
/// A page of the base that is in no file.
const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
/// Bits of a page's entry in the host's pagemap: in memory, or swapped out.
const PRESENT: u64 = 1 << 63 | 1 << 62;
/// Bit of a page's entry in the host's pagemap: a page of a file, not a private copy.
const OF_FILE: u64 = 1 << 61;
/// From so many pages on (64 MiB), what was written is given back to the host rather than copied
/// over. The guest pays for that with a fault for each page that it writes again, which takes some
/// four times as long as the copy; but the host would else keep all that a guest ever wrote.
const DISCARD_PAGES: u64 = 16384;

/// What a handle needs of the virtual machine, whichever backend's it is.
pub(crate) trait AnyVm: Send + Sync {
    fn clock_ns(&self) -> Result<u64, StateError>;
    fn set_clock_ns(&self, ns: u64) -> Result<(), StateError>;
    /// Logs guest writes in the slot at `gpa` from now on.
    fn log_writes(&self, gpa: Gpa) -> Result<(), MapError>;
    fn dirty_pages(&self, gpa: Gpa) -> Result<Vec<u64>, DirtyLogError>;
    fn statistics(&self) -> Option<&dyn Statistics>;
}

impl<V: Vm> AnyVm for V {
    fn clock_ns(&self) -> Result<u64, StateError> {
        Vm::clock_ns(self)
    }

    fn set_clock_ns(&self, ns: u64) -> Result<(), StateError> {
        Vm::set_clock_ns(self, ns)
    }

    fn log_writes(&self, gpa: Gpa) -> Result<(), MapError> {
        self.protect(gpa, false, true)
    }

    fn dirty_pages(&self, gpa: Gpa) -> Result<Vec<u64>, DirtyLogError> {
        Vm::dirty_pages(self, gpa)
    }

    fn statistics(&self) -> Option<&dyn Statistics> {
        Vm::statistics(self)
    }
}

/// Guest memory, its base and the log of writes.
pub(crate) struct TrackedMemory {
    ram: GuestRam,
    vm: Arc<dyn AnyVm>,
    books: Mutex<Books>,
}

struct Books {
    /// Writes are logged.
    on: bool,
    base: Base,
    written: PageSet,
    fresh: PageSet,
}

fn failed(source: io::Error) -> MachineError {
    let what = "saved memory";
    MachineError::Resource { what, source }
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> MachineError {
    failed(io::Error::other(error))
}

impl TrackedMemory {
    /// `tracked`: the slots were mapped with their logs on, before anything could be written.
    pub(crate) fn new(
        ram: GuestRam,
        vm: Arc<dyn AnyVm>,
        saved: Option<SavedMemory>,
        tracked: bool,
    ) -> Self {
        let mut base = Base::default();
        for (file, runs) in saved.into_iter().flat_map(|saved| saved.layers) {
            base.overlay(file, runs);
        }
        let pages = ram.iter().map(|region| region.len() / PAGE).sum();
        if tracked {
            set_logging(&ram);
        }
        Self {
            ram,
            vm,
            books: Mutex::new(Books {
                on: tracked,
                base,
                written: PageSet::new(pages),
                fresh: PageSet::new(pages),
            }),
        }
    }

    /// Regions and where each begins, counted without holes.
    fn regions(&self) -> impl Iterator<Item = (u64, &Region)> {
        self.ram.iter().scan(0, |next, region| {
            let base = *next;
            *next += region.len();
            Some((base, region))
        })
    }

    /// The parts of `range`, each with its region and the place within it.
    fn parts(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &Region, Range<u64>)> {
        self.regions().filter_map(move |(base, region)| {
            let start = range.start.max(base);
            let end = range.end.min(base + region.len());
            (start < end).then(|| (start, region, start - base..end - base))
        })
    }

    /// Starts the log. What was written before is what the host had to take private pages for.
    pub(crate) fn track(&self) -> Result<(), MachineError> {
        self.tracked().map(drop)
    }

    fn tracked(&self) -> Result<MutexGuard<'_, Books>, MachineError> {
        let mut books = self.books.lock();
        if !books.on {
            set_logging(&self.ram);
            for region in self.ram.iter() {
                self.vm.log_writes(Gpa(region.start_addr().0))?;
            }
            let before = self.resident(|entry| entry & PRESENT != 0 && entry & OF_FILE == 0)?;
            books.written.union(&before);
            books.fresh.union(&before);
            books.on = true;
        }
        Ok(books)
    }

    /// The log up to now, which must be on.
    fn collected(&self) -> Result<MutexGuard<'_, Books>, MachineError> {
        let mut books = self.books.lock();
        if !books.on {
            return Err(MachineError::NotTracked);
        }
        self.collect(&mut books)?;
        Ok(books)
    }

    fn collect(&self, books: &mut Books) -> Result<(), MachineError> {
        for (base, region) in self.regions() {
            let by_guest = self.vm.dirty_pages(Gpa(region.start_addr().0))?;
            let by_host = region.get_mmap().bitmap().take_dirty();
            for words in [&by_guest, &by_host] {
                books.written.insert_words(base / PAGE, words);
                books.fresh.insert_words(base / PAGE, words);
            }
        }
        Ok(())
    }

    /// All that was written since the base; what [`Self::harvest`] gives starts anew here.
    pub(crate) fn written(&self) -> Result<PageSet, MachineError> {
        let mut books = self.collected()?;
        books.fresh.clear();
        Ok(books.written.clone())
    }

    /// How many pages were written since the base.
    pub(crate) fn written_count(&self) -> Result<u64, MachineError> {
        Ok(self.collected()?.written.count())
    }

    /// What was written since this or [`Self::written`] was last called.
    pub(crate) fn harvest(&self) -> Result<PageSet, MachineError> {
        let mut books = self.collected()?;
        let fresh = books.fresh.clone();
        books.fresh.clear();
        Ok(fresh)
    }

    /// How many separate pieces of files memory is mapped from.
    pub(crate) fn pieces(&self) -> usize {
        self.books.lock().base.len()
    }

    /// Everything that may hold something other than zero.
    pub(crate) fn used(&self) -> Result<PageSet, MachineError> {
        let mut used = self.resident(|entry| entry & PRESENT != 0)?;
        for run in self.books.lock().base.runs() {
            used.insert(run.start / PAGE..run.end / PAGE);
        }
        Ok(used)
    }

    /// Everything that is mapped.
    pub(crate) fn touched(&self) -> Result<PageSet, MachineError> {
        self.resident(|entry| entry & PRESENT != 0)
    }

    /// The pages whose entries in the host's pagemap `counts`.
    fn resident(&self, counts: impl Fn(u64) -> bool) -> Result<PageSet, MachineError> {
        let pagemap = pagemap().map_err(failed)?;
        let mut set = PageSet::new(self.regions().map(|(_, region)| region.len() / PAGE).sum());
        let mut entries = vec![0; CHUNK];
        for (base, region) in self.regions() {
            let first = region.as_ptr() as u64 / PAGE;
            let mut at = first * 8;
            let mut page = base / PAGE;
            let end = page + region.len() / PAGE;
            while page < end {
                let count = (end - page).min(CHUNK as u64 / 8);
                let entries = &mut entries[..count as usize * 8];
                pagemap.read_exact_at(entries, at).map_err(failed)?;
                at += entries.len() as u64;
                for (page, entry) in (page..).zip(entries.as_chunks::<8>().0) {
                    if counts(u64::from_le_bytes(*entry)) {
                        set.insert(page..page + 1);
                    }
                }
                page += count;
            }
        }
        Ok(set)
    }

    /// Reads guest memory at `at`, counted without holes.
    pub(crate) fn read(&self, at: u64, into: &mut [u8]) -> Result<(), MachineError> {
        let range = at..at.saturating_add(into.len() as u64);
        let mut done = 0;
        for (_, region, part) in self.parts(range) {
            let len = (part.end - part.start) as usize;
            region
                .read_slice(&mut into[done..done + len], MemoryRegionAddress(part.start))
                .map_err(other)?;
            done += len;
        }
        if done == into.len() {
            return Ok(());
        }
        let text = format!("the machine has no memory at {at:#x}");
        Err(failed(io::Error::new(io::ErrorKind::InvalidInput, text)))
    }

    /// Writes guest memory at a guest-physical address.
    pub(crate) fn write_physical(&self, at: u64, bytes: &[u8]) -> Result<(), MachineError> {
        self.ram.write_slice(bytes, GuestAddress(at)).map_err(other)
    }

    /// Calls `each` with place and bytes of the pages of `set`.
    pub(crate) fn for_each<E: From<MachineError>>(
        &self,
        set: &PageSet,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = vec![0; CHUNK];
        for run in set.runs() {
            let mut at = run.start * PAGE;
            let end = run.end * PAGE;
            while at < end {
                let bytes = &mut buffer[..(end - at).min(CHUNK as u64) as usize];
                self.read(at, bytes)?;
                each(at, bytes)?;
                at += bytes.len() as u64;
            }
        }
        Ok(())
    }

    /// Maps `runs` of `layer` over memory, which holds the same bytes and which nobody writes.
    pub(crate) fn rebase(&self, layer: File, runs: Vec<SavedRun>) -> Result<(), MachineError> {
        let mut books = self.tracked()?;
        self.collect(&mut books)?;
        let mut mapped = Vec::with_capacity(runs.len());
        let mut result = Ok(());
        for run in runs {
            result = memory::map_saved(&self.ram, &layer, &run).map_err(failed);
            if result.is_err() {
                break;
            }
            let pages = run.at / PAGE..(run.at + run.len) / PAGE;
            books.written.remove(pages.clone());
            books.fresh.remove(pages);
            mapped.push(run);
        }
        books.base.overlay(layer, mapped);
        result
    }

    /// Gives every page that was written its content in the base back, and tells how many those
    /// were. Nobody writes memory meanwhile.
    pub(crate) fn rewind(&self) -> Result<u64, MachineError> {
        let mut books = self.collected()?;
        let Books {
            base,
            written,
            fresh,
            ..
        } = &mut *books;
        if base.is_none() {
            return Err(MachineError::NoBase);
        }
        let pages = written.count();
        let discard = pages >= DISCARD_PAGES;
        for run in written.runs() {
            let range = run.start * PAGE..run.end * PAGE;
            if discard {
                // Given back, it is read from the base's files, which are mapped there, or zero.
                for (_, region, part) in self.parts(range) {
                    memory::discard(region, part).map_err(failed)?;
                }
            } else {
                self.copy_back(base, range)?;
            }
        }
        // The copies are in the host's log, and are no writes that the base does not have.
        for region in self.ram.iter() {
            region.get_mmap().bitmap().take_dirty();
        }
        written.clear();
        fresh.clear();
        Ok(pages)
    }

    /// Copies the base's content over `range`.
    fn copy_back(&self, base: &mut Base, range: Range<u64>) -> Result<(), MachineError> {
        base.find(range, |found, source| {
            for (at, region, part) in self.parts(found.clone()) {
                let len = (part.end - part.start) as usize;
                let slice = region
                    .get_slice(MemoryRegionAddress(part.start), len)
                    .map_err(other)?;
                match source {
                    None => {
                        for at in (0..len).step_by(ZEROS.len()) {
                            let len = ZEROS.len().min(len - at);
                            slice.write_slice(&ZEROS[..len], at).map_err(other)?;
                        }
                    }
                    Some((file, offset)) => {
                        let offset = offset + (at - found.start);
                        file.copy(offset, &slice).map_err(failed)?;
                    }
                }
            }
            Ok(())
        })
    }
}

/// Which pages of this process are in memory.
fn pagemap() -> io::Result<&'static File> {
    static PAGEMAP: OnceLock<File> = OnceLock::new();
    if let Some(open) = PAGEMAP.get() {
        return Ok(open);
    }
    let open = File::open("/proc/self/pagemap")?;
    Ok(PAGEMAP.get_or_init(|| open))
}

/// Opens what the log of writes begins with: a process that is confined may not open it later.
pub fn prepare_tracking() {
    // Where it fails, so does what needs it, and says so.
    let _ = pagemap();
}

fn set_logging(ram: &GuestRam) {
    for region in ram.iter() {
        region.get_mmap().bitmap().set_logging(true);
    }
}
