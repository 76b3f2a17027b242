//! Files and shared regions in a guest's address space.
//!
//! Each mapping has slots of its own behind the sandbox's memory: its data, and the page tables for it
//! (a page directory per 1 GiB, a table per 2 MiB). One entry of the guest's third-level table per 1 GiB
//! leads there; to unmap is to clear those and to take the slots away.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use skerry_hypervisor::{Gpa, MapError, MemorySlot, RamRegion};
use thiserror::Error;
use vm_memory::VolatileMemory;

use crate::layout::{LARGE, MAPPINGS, PAGE};
use crate::processor::Processor;
use crate::region::{self, Region};
use crate::sandbox::{Sandbox, Status};
use crate::snapshot::memory_file;
use crate::tables;

/// Bytes behind one entry of the third-level table.
const GIB: u64 = 1 << 30;
/// The last entry of that table, and one.
const ENTRIES: u64 = 512;
/// Backends have 36 bits of guest-physical addresses at least.
const GPA_END: u64 = 1 << 36;

/// What the guest may do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapMode {
    /// Read it.
    ReadOnly,
    /// Read and write; what it writes is its own and never reaches the file.
    CopyOnWrite,
}

/// Where something is in the guest's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The guest's address of the first byte.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// A file or region could not be mapped.
#[derive(Debug, Error)]
pub enum MapFileError {
    /// It can't be opened or read.
    #[error("Can't map {path:?}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is nothing in it.
    #[error("{0:?} is empty; there is nothing to map")]
    Empty(PathBuf),
    /// The guest's address space is full.
    #[error("The sandbox's address space has no room for {0} bytes more")]
    NoRoom(u64),
    /// No memory from the host.
    #[error("The host gives no memory for a mapping")]
    Memory(#[source] io::Error),
    /// The backend refused.
    #[error(transparent)]
    Slot(#[from] MapError),
    /// Nothing of the sandbox's is mapped there.
    #[error("Nothing is mapped at {0:#x}")]
    NotMapped(u64),
    /// The sandbox can't be used any more.
    #[error("The sandbox can't be used any more: {0}")]
    Unrecoverable(String),
}

/// Memory that several sandboxes and the host see at once. What one writes the others may read at any
/// moment: all of it is as hostile as the guests are.
#[derive(Debug)]
pub struct SharedRegion {
    ram: RamRegion,
    file: Arc<File>,
    len: u64,
}

impl SharedRegion {
    /// `size` bytes, rounded up to whole pages, all zero.
    pub fn new(size: u64) -> Result<Arc<Self>, MapFileError> {
        let len = size.max(1).next_multiple_of(PAGE);
        let file = memory_file(len).map_err(MapFileError::Memory)?;
        let file = Arc::new(file);
        let ram = region::shared(&file, len).map_err(MapFileError::Memory)?;
        Ok(Arc::new(Self { ram, file, len }))
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Copies bytes out; `None` where they lie outside.
    pub fn read(&self, at: u64, into: &mut [u8]) -> Option<()> {
        let slice = self
            .ram
            .get_slice(usize::try_from(at).ok()?, into.len())
            .ok()?;
        slice.copy_to(into);
        Some(())
    }

    /// Copies bytes in; `None` where they lie outside.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Option<()> {
        let slice = self
            .ram
            .get_slice(usize::try_from(at).ok()?, bytes.len())
            .ok()?;
        slice.copy_from(bytes);
        Some(())
    }
}

/// What is mapped.
#[derive(Clone, Debug)]
enum Source {
    File {
        file: Arc<File>,
        mode: MapMode,
    },
    Shared {
        region: Arc<SharedRegion>,
        write: bool,
    },
}

impl Source {
    /// Whether the guest may write to it.
    fn writable(&self) -> bool {
        match self {
            Self::File { mode, .. } => *mode == MapMode::CopyOnWrite,
            Self::Shared { write, .. } => *write,
        }
    }
}

/// How a mapping is made again, for a snapshot's other sandboxes.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    id: u64,
    source: Source,
    mapped: Mapped,
    gpa: u64,
}

impl Recipe {
    /// Whether its content is the sandbox's own.
    pub(crate) fn is_private(&self) -> bool {
        matches!(
            self.source,
            Source::File {
                mode: MapMode::CopyOnWrite,
                ..
            }
        )
    }
}

/// The host's mappings of a source, with their offsets in it.
type Parts = Vec<(u64, Arc<RamRegion>)>;

/// A mapping as it is made.
#[derive(Debug)]
struct Made {
    recipe: Recipe,
    slots: Vec<Gpa>,
    data: Parts,
}

/// All mappings of a sandbox.
#[derive(Debug, Default)]
pub(crate) struct Mappings {
    made: Vec<Made>,
}

impl Mappings {
    pub(crate) fn recipes(&self) -> Vec<Recipe> {
        self.made.iter().map(|made| made.recipe.clone()).collect()
    }

    /// Where each is, and whether the guest may write to it.
    pub(crate) fn places(&self) -> impl Iterator<Item = (Mapped, bool)> {
        self.made
            .iter()
            .map(|Made { recipe, .. }| (recipe.mapped, recipe.source.writable()))
    }

    /// What the guest has at an address: the memory, and the offset in it.
    pub(crate) fn data_at(&self, gva: u64) -> Option<(&Arc<RamRegion>, usize)> {
        let Made { recipe, data, .. } = self.made.iter().find(|made| {
            let Mapped { address, len } = made.recipe.mapped;
            gva.wrapping_sub(address) < len.next_multiple_of(PAGE)
        })?;
        let at = gva - recipe.mapped.address;
        let inside = |part: &&(u64, Arc<RamRegion>)| at.wrapping_sub(part.0) < part.1.size() as u64;
        let (start, ram) = data.iter().find(inside)?;
        Some((ram, (at - start) as usize))
    }

    /// Whether these are the ones of a snapshot.
    pub(crate) fn are(&self, recipes: &[Recipe]) -> bool {
        self.made
            .iter()
            .map(|made| made.recipe.id)
            .eq(recipes.iter().map(|recipe| recipe.id))
    }

    /// The first guest-physical address that is free, and the first entry of the third-level table.
    fn free(&self, memory: u64) -> (u64, u64) {
        let next = |Made { recipe, .. }: &Made| {
            let Mapped { address, len } = recipe.mapped;
            let end = recipe.gpa + len + tables_size(len);
            (end.next_multiple_of(LARGE), (address + len).div_ceil(GIB))
        };
        let start = (memory.next_multiple_of(LARGE), MAPPINGS / GIB);
        self.made
            .iter()
            .map(next)
            .fold(start, |a, b| (a.0.max(b.0), a.1.max(b.1)))
    }

    /// Takes all slots away. The guest's tables are the caller's.
    pub(crate) fn drop_slots(&mut self, processor: &mut dyn Processor) -> Result<(), MapError> {
        while let Some(made) = self.made.last() {
            for gpa in &made.slots {
                processor.unmap(*gpa)?;
            }
            self.made.pop();
        }
        Ok(())
    }

    /// Maps the data and makes tables for it.
    pub(crate) fn make(
        &mut self,
        recipe: &Recipe,
        processor: &mut dyn Processor,
        memory: &mut Region,
        root: u64,
    ) -> Result<(), MapFileError> {
        let pages = recipe.mapped.len.div_ceil(PAGE);
        let write = recipe.source.writable();
        let mut slots = Vec::new();
        let slot = |gpa: u64, region: Arc<RamRegion>, read_only| MemorySlot {
            gpa: Gpa(gpa),
            len: region.size(),
            region,
            offset: 0,
            read_only,
            log_dirty: false,
        };
        let mut made = Vec::new();
        let data = data(&recipe.source, recipe.mapped.len).map_err(MapFileError::Memory)?;
        for (at, region) in &data {
            made.push(slot(recipe.gpa + at, region.clone(), !write));
        }
        let tables_at = recipe.gpa + pages * PAGE;
        let tables =
            tables::for_mapping(recipe.mapped.address, recipe.gpa, pages, tables_at, write)
                .map_err(MapFileError::Memory)?;
        // Not read-only: with nested paging a processor reads a guest's tables by accesses that count as writes
        // (AMD64 APM volume 2 §15.25.5). No address of the guest's leads there.
        made.push(slot(tables_at, tables.region, false));
        for slot in made {
            let gpa = slot.gpa;
            if let Err(error) = processor.map(slot) {
                for gpa in slots {
                    let _ = processor.unmap(gpa);
                }
                return Err(error.into());
            }
            slots.push(gpa);
        }
        // Last: nothing leads to what isn't there.
        for (entry, directory) in tables.directories {
            let linked = tables::link(memory, root, entry, directory);
            linked.ok_or(MapFileError::NoRoom(recipe.mapped.len))?;
        }
        self.made.push(Made {
            recipe: recipe.clone(),
            slots,
            data,
        });
        Ok(())
    }
}

/// More than the tables of a mapping take: a page per 2 MiB and per 1 GiB, and rounding.
fn tables_size(len: u64) -> u64 {
    len / 256 + 4 * PAGE
}

/// The host's mappings of a source, with their offsets. The rest of a file's last page is zero, and a page of
/// its own, so that nothing lies behind the file's end.
fn data(source: &Source, len: u64) -> io::Result<Parts> {
    let mut parts = Vec::new();
    match source {
        Source::Shared { region, .. } => {
            parts.push((0, Arc::new(region::shared(&region.file, region.len)?)));
        }
        Source::File { file, .. } => {
            let whole = len / PAGE * PAGE;
            if whole != 0 {
                parts.push((0, Arc::new(region::private(file, whole)?)));
            }
            if whole != len {
                let mut last = vec![0; (len - whole) as usize];
                let mut from: &File = file;
                from.seek(SeekFrom::Start(whole))?;
                from.read_exact(&mut last)?;
                let mut page = Region::new(PAGE)?;
                if let Some(room) = page.bytes_mut(0, last.len() as u64) {
                    room.copy_from_slice(&last);
                }
                parts.push((whole, page.ram().clone()));
            }
        }
    }
    Ok(parts)
}

impl Sandbox {
    /// Maps a file into the guest's address space, where its functions find it at the address that this
    /// returns. Nothing is copied.
    ///
    /// The file must not become shorter while it is mapped. A restore of a snapshot that was taken before
    /// unmaps it.
    pub fn map_file(
        &mut self,
        path: impl AsRef<Path>,
        mode: MapMode,
    ) -> Result<Mapped, MapFileError> {
        let path = path.as_ref();
        let failed = |source| MapFileError::File {
            path: path.into(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(io::Error::other("it is not a regular file")));
        }
        match metadata.len() {
            0 => Err(MapFileError::Empty(path.into())),
            len => self.map_source(
                Source::File {
                    file: Arc::new(file),
                    mode,
                },
                len,
            ),
        }
    }

    /// Maps a shared region; the guest may read it, and write it if `write`.
    pub fn map_shared(
        &mut self,
        region: &Arc<SharedRegion>,
        write: bool,
    ) -> Result<Mapped, MapFileError> {
        let source = Source::Shared {
            region: region.clone(),
            write,
        };
        self.map_source(source, region.len)
    }

    fn map_source(&mut self, source: Source, len: u64) -> Result<Mapped, MapFileError> {
        if let Status::Unrecoverable(why) = &self.status {
            return Err(MapFileError::Unrecoverable(why.clone()));
        }
        let (gpa, entry) = self.mappings.free(self.layout.size);
        let room = (ENTRIES - entry.min(ENTRIES)) * GIB;
        if len > room || gpa + len + tables_size(len) > GPA_END {
            return Err(MapFileError::NoRoom(len));
        }
        let mapped = Mapped {
            address: entry * GIB,
            len,
        };
        let id = crate::sandbox::fresh_seed();
        let recipe = Recipe {
            id,
            source,
            mapped,
            gpa,
        };
        let root = self.layout.tables.at;
        let (processor, region) = (&mut *self.processor, &mut self.region);
        self.mappings.make(&recipe, processor, region, root)?;
        Ok(mapped)
    }

    /// Takes a mapping away. The guest that goes on using its address gets an access violation.
    pub fn unmap(&mut self, mapped: Mapped) -> Result<(), MapFileError> {
        let mut recipes = self.mappings.recipes();
        let before = recipes.len();
        recipes.retain(|recipe| recipe.mapped != mapped);
        if recipes.len() == before {
            return Err(MapFileError::NotMapped(mapped.address));
        }
        self.set_mappings(&recipes)
    }

    /// Makes the mappings these.
    pub(crate) fn set_mappings(&mut self, recipes: &[Recipe]) -> Result<(), MapFileError> {
        if self.mappings.are(recipes) {
            return Ok(());
        }
        let root = self.layout.tables.at;
        for Made { recipe, .. } in &self.mappings.made {
            let first = recipe.mapped.address / GIB;
            let last = (recipe.mapped.address + recipe.mapped.len - 1) / GIB;
            for entry in first..=last {
                tables::unlink(&mut self.region, root, entry);
            }
        }
        self.mappings.drop_slots(&mut *self.processor)?;
        for recipe in recipes {
            self.mappings
                .make(recipe, &mut *self.processor, &mut self.region, root)?;
        }
        Ok(())
    }
}
