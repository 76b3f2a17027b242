//! Snapshots in memory: taking, going back, making more sandboxes of them.
//!
//! A snapshot's memory is a sealed file without a name. Its sandboxes map it copy-on-write: they share
//! what they don't write. The backend logs the pages that the guest writes, so that going back copies
//! those and no others, however large the memory is.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use skerry_hypervisor::{CpuState, Gpa, PAGE_SIZE, StateError};

use crate::builder::Limits;
use crate::error::{BuildError, RestoreError, SnapshotError};
use crate::host_fn::HostFunctions;
use crate::layout::{Layout, PAGE};
use crate::mapping::Recipe;
use crate::processor::{self, Backend};
use crate::region::{Region, View};
use crate::sandbox::{Exports, Parts, Sandbox, Status, fresh_seed, slot};

/// The pages that a range touches.
fn pages_of(at: u64, len: u64) -> Range<u64> {
    at / PAGE..(at + len).div_ceil(PAGE)
}

/// A set of pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pages(Vec<u64>);

impl Pages {
    pub(crate) fn insert(&mut self, page: u64) {
        let word = (page / 64) as usize;
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (page % 64);
    }

    pub(crate) fn contains(&self, page: u64) -> bool {
        let word = self.0.get((page / 64) as usize).copied().unwrap_or(0);
        word >> (page % 64) & 1 != 0
    }

    fn insert_bytes(&mut self, at: u64, len: u64) {
        pages_of(at, len).for_each(|page| self.insert(page));
    }

    fn join(&mut self, other: &Self) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (word, other) in self.0.iter_mut().zip(&other.0) {
            *word |= other;
        }
    }

    /// All of them, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().enumerate().flat_map(|(n, word)| {
            let word = *word;
            (0..64)
                .filter(move |bit| word >> bit & 1 != 0)
                .map(move |bit| n as u64 * 64 + bit)
        })
    }
}

/// What a sandbox's memory differs from, by the pages that were written since.
#[derive(Debug)]
pub(crate) enum Origin {
    /// Zeroes, and what the host has loaded.
    Empty(Pages),
    /// A snapshot.
    Snapshot(Arc<Snapshot>),
}

impl Origin {
    /// Memory that was just loaded with a program of `image` bytes.
    pub(crate) fn empty(layout: &Layout, image: u64) -> Self {
        let mut pages = Pages::default();
        pages.insert_bytes(0, layout.tables.end());
        pages.insert_bytes(layout.image.at, image);
        Self::Empty(pages)
    }
}

/// What a sandbox was at one moment. Immutable, to be shared: any number of sandboxes can be made of
/// it and go back to it.
#[derive(Debug)]
pub struct Snapshot {
    id: u64,
    file: Arc<File>,
    pub(crate) view: View,
    pub(crate) kept: Kept,
}

/// What a snapshot keeps besides the content of its memory.
#[derive(Debug)]
pub(crate) struct Kept {
    /// The pages that are in the file; all others are zero.
    pub(crate) pages: Pages,
    pub(crate) state: CpuState,
    /// Whether it is known to be of a guest that was never anywhere but in ring 3 and in the host's stubs.
    pub(crate) plain: bool,
    pub(crate) layout: Layout,
    pub(crate) exports: Arc<Exports>,
    pub(crate) limits: Limits,
    /// What was mapped, to be mapped again.
    pub(crate) mappings: Vec<Recipe>,
    /// The snapshot that it was taken after, and what is different from that.
    pub(crate) base: Option<(u64, Pages)>,
}

/// A memory file to be filled.
pub(crate) fn memory_file(size: u64) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("skerry-sandbox", flags)?;
    ftruncate(&file, size)?;
    Ok(file.into())
}

/// Nobody writes it from here on.
pub(crate) fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    Ok(fcntl_add_seals(file, seals)?)
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Snapshot {
    /// Of a file that nobody writes any more.
    pub(crate) fn new(file: File, kept: Kept) -> io::Result<Arc<Self>> {
        seal(&file)?;
        let file = Arc::new(file);
        let view = View::of(&file, kept.layout.size)?;
        Ok(Arc::new(Self {
            id: next_id(),
            file,
            view,
            kept,
        }))
    }

    /// The pages in which memory that is this snapshot's differs from that of snapshot `id`; `None` where
    /// that isn't known.
    fn difference_to(&self, id: u64) -> Option<&Pages> {
        static NONE: Pages = Pages(Vec::new());
        match &self.kept.base {
            _ if self.id == id => Some(&NONE),
            Some((base, changed)) if *base == id => Some(changed),
            _ => None,
        }
    }

    /// The guest's memory in bytes.
    pub fn memory_size(&self) -> u64 {
        self.kept.layout.size
    }

    /// The bytes that it takes.
    pub fn size(&self) -> u64 {
        self.kept.pages.iter().count() as u64 * PAGE
    }

    fn page(&self, page: u64) -> Option<&[u8]> {
        match self.kept.pages.contains(page) {
            true => self.view.page(page),
            false => None,
        }
    }
}

impl Sandbox {
    /// Pages that may differ from the origin; takes the backend's log.
    fn written(&mut self) -> Result<Pages, skerry_hypervisor::DirtyLogError> {
        let mut pages = Pages::default();
        self.processor
            .drain_dirty(Gpa(0), &mut |page| pages.insert(page))?;
        pages.insert_bytes(self.layout.control.at, PAGE);
        pages.insert_bytes(self.layout.input.at, self.input_written);
        Ok(pages)
    }

    /// Keeps what the sandbox is now. Costs what its guest has written, not what it could have.
    pub fn snapshot(&mut self) -> Result<Arc<Snapshot>, SnapshotError> {
        match &self.status {
            Status::Ready => {}
            Status::Poisoned(why) => return Err(SnapshotError::Poisoned(why.clone())),
            Status::Unrecoverable(why) => return Err(SnapshotError::Unrecoverable(why.clone())),
        }
        if self.mappings.recipes().iter().any(Recipe::is_private) {
            return Err(SnapshotError::PrivateMapping);
        }
        let state = self.processor.state()?;
        let file = memory_file(self.layout.size).map_err(SnapshotError::Memory)?;
        let written = self.written()?;
        let (mut pages, base) = match &self.origin {
            Origin::Empty(loaded) => (loaded.clone(), None),
            Origin::Snapshot(origin) => (
                origin.kept.pages.clone(),
                Some((origin.id, written.clone())),
            ),
        };
        pages.join(&written);
        let kept = self.keep(&file, &mut pages);
        let snapshot = kept.and_then(|()| {
            let kept = Kept {
                pages,
                state,
                plain: self.plain,
                layout: self.layout,
                exports: self.exports.clone(),
                limits: self.limits,
                mappings: self.mappings.recipes(),
                base,
            };
            Snapshot::new(file, kept)
        });
        match snapshot {
            Ok(snapshot) => {
                self.origin = Origin::Snapshot(snapshot.clone());
                self.input_written = 0;
                Ok(snapshot)
            }
            Err(error) => {
                // The log is taken: what was written is known here only.
                self.remember(written);
                Err(SnapshotError::Memory(error))
            }
        }
    }

    /// The host has written a page that no other record has.
    pub(crate) fn remember_page(&mut self, page: u64) {
        let mut pages = Pages::default();
        pages.insert(page);
        self.remember(pages);
    }

    /// Puts pages back into what is known to differ from the origin.
    fn remember(&mut self, written: Pages) {
        match &mut self.origin {
            Origin::Empty(pages) => pages.join(&written),
            // What differs from it is not known any more: the next restore replaces all.
            Origin::Snapshot(_) => {
                let mut pages = Pages::default();
                pages.insert_bytes(0, self.layout.size);
                self.origin = Origin::Empty(pages);
            }
        }
    }

    /// Writes `pages` to a file, and takes out those that are zero.
    fn keep(&self, file: &File, pages: &mut Pages) -> io::Result<()> {
        let all: Vec<u64> = pages.iter().collect();
        let mut run = 0..0;
        let flush = |run: &Range<u64>| -> io::Result<()> {
            let (at, len) = (run.start * PAGE, (run.end - run.start) * PAGE);
            let bytes = self
                .region
                .bytes(at, len)
                .ok_or(io::ErrorKind::InvalidData)?;
            file.write_all_at(bytes, at)
        };
        for page in all {
            let bytes = self.region.bytes(page * PAGE, PAGE).unwrap_or_default();
            if bytes.iter().all(|byte| *byte == 0) {
                pages.0[(page / 64) as usize] &= !(1 << (page % 64));
                continue;
            }
            if run.end != page {
                if !run.is_empty() {
                    flush(&run)?;
                }
                run = page..page;
            }
            run.end = page + 1;
        }
        match run.is_empty() {
            true => Ok(()),
            false => flush(&run),
        }
    }

    /// Goes back to what `snapshot` kept: memory, registers, everything. Costs what was written since,
    /// where the sandbox comes from it (or from one that was taken right after it); else its memory is
    /// mapped anew.
    ///
    /// A poisoned sandbox is ready again. If it fails half way the sandbox can't be used any more.
    pub fn restore(&mut self, snapshot: &Arc<Snapshot>) -> Result<(), RestoreError> {
        if let Status::Unrecoverable(why) = &self.status {
            return Err(RestoreError::Unrecoverable(why.clone()));
        }
        if !Arc::ptr_eq(&self.exports, &snapshot.kept.exports) {
            let links = self.functions.link(&snapshot.kept.exports.description);
            self.links = links.map_err(|error| RestoreError::HostFunctions(Box::new(error)))?;
            self.exports = snapshot.kept.exports.clone();
        }
        self.status = Status::Unrecoverable("a restore failed".into());
        self.spans.close_all();
        self.restore_memory(snapshot)?;
        self.set_mappings(&snapshot.kept.mappings)?;
        self.set_processor(snapshot)?;
        self.input_written = 0;
        self.control.set_seed(fresh_seed());
        self.set_profiled();
        self.metrics.restores += 1;
        self.status = Status::Ready;
        Ok(())
    }

    /// Sets the registers; only those that code in ring 3 can change, if no other code has run here. A
    /// snapshot from a file may be in any ring.
    fn set_processor(&mut self, snapshot: &Snapshot) -> Result<(), StateError> {
        self.plain &= snapshot.kept.plain;
        match self.plain {
            true => self.processor.set_user_state(&snapshot.kept.state),
            false => self.processor.set_state(&snapshot.kept.state),
        }
    }

    fn restore_memory(&mut self, snapshot: &Arc<Snapshot>) -> Result<(), RestoreError> {
        let rebuild = |error| RestoreError::Rebuild(Box::new(error));
        if self.layout != snapshot.kept.layout {
            return self.rebuild(snapshot).map_err(rebuild);
        }
        let origin = match &self.origin {
            Origin::Snapshot(origin) => Some(origin.clone()),
            Origin::Empty(_) => None,
        };
        let changed = origin
            .as_deref()
            .and_then(|origin| origin.difference_to(snapshot.id));
        let Some(changed) = changed else {
            self.processor.drain_dirty(Gpa(0), &mut |_| {})?;
            let remapped = self.region.remap(&snapshot.file);
            remapped.map_err(|error| rebuild(BuildError::Memory(error)))?;
            self.origin = Origin::Snapshot(snapshot.clone());
            return Ok(());
        };
        let mut complete = true;
        let mut again = |page| {
            complete &= self.region.restore_page(page, snapshot.page(page));
        };
        self.processor.drain_dirty(Gpa(0), &mut again)?;
        pages_of(self.layout.control.at, PAGE).for_each(&mut again);
        pages_of(self.layout.input.at, self.input_written).for_each(&mut again);
        changed.iter().for_each(&mut again);
        if !complete {
            let outside = io::Error::other("a page outside of the sandbox's memory was written");
            return Err(rebuild(BuildError::Memory(outside)));
        }
        self.origin = Origin::Snapshot(snapshot.clone());
        Ok(())
    }

    /// Becomes a sandbox of another layout: a new machine, the same handle's generation of calls ends.
    fn rebuild(&mut self, snapshot: &Arc<Snapshot>) -> Result<(), BuildError> {
        let backend = self.processor.backend();
        let region =
            Region::of(&snapshot.file, snapshot.kept.layout.size).map_err(BuildError::Memory)?;
        let processor = processor::make(backend, slot(&region, &snapshot.kept.layout))?;
        let (limits, metrics) = (self.limits, self.metrics);
        let (debug, aids) = (self.debug.take(), std::mem::take(&mut self.aids));
        let made = Self::assemble(Parts {
            processor,
            region,
            layout: snapshot.kept.layout,
            functions: self.functions.clone(),
            limits,
            exports: snapshot.kept.exports.clone(),
            links: std::mem::take(&mut self.links),
            origin: Origin::Snapshot(snapshot.clone()),
        })?;
        *self = made;
        self.metrics = metrics;
        self.debug = debug;
        self.aids = aids;
        Ok(())
    }

    /// As [`Sandbox::from_snapshot`], on this backend. Limits are those of the sandbox that it was
    /// taken of.
    pub fn from_snapshot_on(
        snapshot: &Arc<Snapshot>,
        functions: &Arc<HostFunctions>,
        backend: Backend,
    ) -> Result<Self, BuildError> {
        let links = functions.link(&snapshot.kept.exports.description)?;
        let layout = snapshot.kept.layout;
        let region = Region::of(&snapshot.file, layout.size).map_err(BuildError::Memory)?;
        let processor = processor::make(backend, slot(&region, &layout))?;
        let mut sandbox = Self::assemble(Parts {
            processor,
            region,
            layout,
            functions: functions.clone(),
            limits: snapshot.kept.limits,
            exports: snapshot.kept.exports.clone(),
            links,
            origin: Origin::Snapshot(snapshot.clone()),
        })?;
        sandbox.set_processor(snapshot)?;
        sandbox.control.set_seed(fresh_seed());
        sandbox.set_profiled();
        let mapped = sandbox.set_mappings(&snapshot.kept.mappings);
        mapped.map_err(|error| BuildError::Mapping(Box::new(error)))?;
        Ok(sandbox)
    }
}

/// The least that a page is.
const _: () = assert!(PAGE_SIZE as u64 == PAGE);
