//! A virtual machine that stands still outside of any process: its state, and files with its memory
//! and disk that any number of machines go on from without copying them.
//!
//! ```text
//!  Vm::capture ──┐                     ┌─► Vm::resume          (fork, reset, restore, warm run)
//!  store: open ──┼─► Frozen ───────────┼─► store: write        (full, or what differs from a parent)
//!  another process: receive ─┘         └─► another process: send
//! ```

use std::fs::File;
use std::io::Seek;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::Advice;
use serde::{Deserialize, Serialize};
use skerry_hypervisor::{CpuidTable, portability};
use skerry_machine::{MachineConfig, MachineState, SavedMemory, SavedRun};
use skerry_oci::Image;
use skerry_snapshot::{
    Content, Merged, PAGE_SIZE, SnapshotId, SnapshotStore, Trust, WorkingSet, WriteOptions,
    merged_disks, merged_memory,
};
use skerry_storage::{Access, Layer, Overlay, Part, RawDisk, flatten};

use crate::command::Surroundings;
use crate::error::EngineError;
use crate::hypervisor::{Backend, Selected};
use crate::images;
use crate::mounts::MountAbout;
use crate::paths::Paths;

/// Raised with every change of [`About`] or of what a guest is set up with.
pub(crate) const FORMAT: u32 = 3;
/// Enough for a loop over lists.
const PREFETCH_STACK: usize = 64 << 10;
/// Name of the writable disk in a snapshot.
const SCRATCH: &str = "scratch";
/// Name of the image's root file system, in the snapshots that carry it.
const ROOT: &str = "root";

/// The image that a machine's root file system is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageAbout {
    /// As the user named it.
    pub name: String,
    /// Its digest.
    pub digest: String,
    /// The digest of its root file system.
    pub rootfs: String,
}

/// The command of a machine, which goes on where the machine does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandAbout {
    /// The command and its arguments.
    pub argv: Vec<String>,
    /// It has a terminal.
    pub tty: bool,
    /// It reads input.
    pub stdin: bool,
    /// The agent's number for it.
    pub session: u32,
}

/// What a snapshot says of the machine that it is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// What it ran on.
    pub backend: Backend,
    /// The machine.
    pub machine: MachineConfig,
    /// What its processors tell of themselves.
    pub cpuid: Vec<CpuidTable>,
    /// Its image.
    pub image: ImageAbout,
    /// Its root file system can't be written.
    pub read_only: bool,
    /// Its command, where one was running.
    pub command: Option<CommandAbout>,
    /// Folders of its host that it has mounted: of the next host, whoever starts it says which.
    #[serde(default)]
    pub mounts: Vec<MountAbout>,
    /// What further commands in it find.
    pub surroundings: Surroundings,
}

/// See the module's description.
#[derive(Clone, Debug)]
pub struct Frozen {
    /// What machine it is.
    pub about: About,
    pub(crate) state: Arc<MachineState>,
    /// Guest memory, counted without the holes in its address space.
    pub(crate) memory: Vec<Layer>,
    /// The writable disk, and its size.
    pub(crate) scratch: Option<(u64, Vec<Layer>)>,
    pub(crate) root: Arc<File>,
    pub(crate) base: Option<Base>,
    /// Which of the machine's states it is.
    pub(crate) capture: u64,
    /// The pages of memory that machines from here touch first, where that is known.
    pub(crate) working: Option<WorkingSet>,
}

/// What a machine was before, in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Base {
    /// The snapshot.
    pub(crate) id: SnapshotId,
    /// How many of the memory's layers are its.
    pub(crate) layers: usize,
    /// What of the disk is not its any more.
    pub(crate) disk: Vec<Range<u64>>,
}

/// How a snapshot is written.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Writing {
    /// The disk has it when it is done.
    pub(crate) durable: bool,
    /// Only what differs from the base.
    pub(crate) difference: bool,
    /// The image's root file system goes with it.
    pub(crate) with_root: bool,
}

impl Frozen {
    /// Opens and verifies a snapshot of the store, and finds the image that it needs.
    pub fn open(paths: &Paths, name: &str) -> Result<Self, EngineError> {
        let store = SnapshotStore::open(paths.snapshots())?;
        let id = store.resolve(name)?;
        Self::of_store(paths, &store, &id, None)
    }

    /// Opens a snapshot; `image` is the one that it is of, where that is at hand.
    pub(crate) fn of_store(
        paths: &Paths,
        store: &SnapshotStore,
        id: &SnapshotId,
        image: Option<&Image>,
    ) -> Result<Self, EngineError> {
        let mut chain = store.open_chain(id, Trust::Seal)?;
        let Merged {
            size,
            layers: memory,
        } = merged_memory(&chain)?;
        let scratch = merged_disks(&chain)?.remove(SCRATCH);
        let extras = chain.iter_mut().rev();
        let carried = extras
            .filter_map(|snapshot| snapshot.extras.remove(ROOT))
            .next();
        let Some(last) = chain.last() else {
            unreachable!("a chain holds the snapshot that it was asked for");
        };
        let about: About = last.config()?;
        let working = last.working_set();
        let state: Result<MachineState, _> = serde_json::from_slice(last.state());
        let state = state.map_err(|source| EngineError::SavedState {
            snapshot: id.to_string(),
            source,
        })?;
        let root = match (image, carried) {
            (Some(image), _) => open_root(image)?,
            (None, Some(carried)) => carried.file,
            (None, None) => open_root(&image_of(paths, &about.image)?)?,
        };
        let base = Base {
            id: *id,
            layers: memory.len(),
            disk: Vec::new(),
        };
        if size != about.machine.memory {
            let memory = about.machine.memory;
            return Err(EngineError::Implausible {
                problem: format!("it has {memory} bytes of memory, and {size} were saved"),
            });
        }
        let frozen = Self {
            about,
            state: Arc::new(state),
            memory,
            scratch: scratch.map(|disk| (disk.size, disk.layers)),
            root: Arc::new(root),
            base: Some(base),
            capture: 0,
            working,
        };
        frozen.vet()?;
        Ok(frozen)
    }

    /// Writes it to the store.
    pub(crate) fn write(
        &self,
        store: &SnapshotStore,
        folder: &std::path::Path,
        writing: Writing,
    ) -> Result<SnapshotId, EngineError> {
        let base = self.base.as_ref().filter(|_| writing.difference);
        let state = serde_json::to_vec(&*self.state);
        let unwritable = EngineError::host("write down a machine's state");
        let state = state.map_err(|error| unwritable(error.into()))?;
        let mut writer = store.writer(WriteOptions {
            durable: writing.durable,
            parent: base.map(|base| base.id),
        })?;
        let (layers, content) = match base {
            Some(base) => (
                self.memory.get(base.layers..).unwrap_or_default(),
                Content::Diff,
            ),
            None => (self.memory.as_slice(), Content::Full),
        };
        let size = self.about.machine.memory;
        let memory = Overlay::new(size, layers.to_vec(), folder)?;
        writer.memory(size, |pages| {
            memory.read_ranges(&memory.used(), |at, bytes| -> Result<(), EngineError> {
                Ok(pages.write_at(at, bytes)?)
            })
        })?;
        drop(memory);
        writer.state(&state)?;
        if let Some((size, layers)) = &self.scratch {
            let disk = Overlay::new(*size, layers.clone(), folder)?;
            let ranges = match base {
                Some(base) => base.disk.clone(),
                None => disk.used(),
            };
            writer.disk(SCRATCH, *size, content, |pages| {
                disk.read_ranges(&ranges, |at, bytes| -> Result<(), EngineError> {
                    Ok(pages.write_at(at, bytes)?)
                })
            })?;
        }
        if writing.with_root {
            let mut root = self
                .root
                .try_clone()
                .map_err(EngineError::host("read an image"))?;
            root.rewind().map_err(EngineError::host("read an image"))?;
            writer.extra(ROOT, root)?;
        }
        Ok(writer.commit(&self.about)?)
    }

    /// Whether it can go on with a backend, before anything is made for it; gives what the user
    /// should be told if it does.
    pub(crate) fn check(&self, selected: &Selected) -> Result<Vec<String>, EngineError> {
        let About { cpuid, machine, .. } = &self.about;
        let losses = portability::check(cpuid, machine.memory, &selected.capabilities)?;
        Ok(losses.iter().map(ToString::to_string).collect())
    }

    /// Has the host read what machines from here touch first, in as few and as large pieces as it lies
    /// in; from memory that takes no time, from a disk it spares the guest a wait for each page.
    pub(crate) fn prefetch(&self) -> Result<(), EngineError> {
        let Some(working) = self.working.clone() else {
            return Ok(());
        };
        let layers = self.memory.clone();
        let thread = std::thread::Builder::new().name("prefetch".to_owned());
        let reading = move || {
            for layer in &layers {
                for (offset, len) in wanted(layer, &working) {
                    // It is advice: where it isn't taken, pages are read one by one.
                    let len = NonZeroU64::new(len);
                    let _ = rustix::fs::fadvise(layer.file(), offset, len, Advice::WillNeed);
                }
            }
        };
        let thread = thread.stack_size(PREFETCH_STACK).spawn(reading);
        thread
            .map(drop)
            .map_err(EngineError::host("start a thread"))
    }

    /// Guest memory as a machine maps it: each page once.
    pub(crate) fn saved_memory(&self) -> Result<SavedMemory, EngineError> {
        let mut layers = Vec::with_capacity(self.memory.len());
        let parts: Vec<_> = self.memory.iter().cloned().map(Part::Layer).collect();
        for layer in flatten(&parts) {
            let file = layer.file().try_clone();
            let runs = layer.runs().iter().map(|run| SavedRun {
                at: run.at,
                len: run.len,
                offset: run.offset,
            });
            layers.push((
                file.map_err(EngineError::host("share a machine's memory"))?,
                runs.collect(),
            ));
        }
        Ok(SavedMemory { layers })
    }
}

/// Where in a layer's file the pages of a working set lie.
fn wanted(layer: &Layer, working: &WorkingSet) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut ranges = working.ranges().iter().peekable();
    for run in layer.runs().iter() {
        let end = run.at + run.len;
        while let Some(range) = ranges.peek() {
            let (from, to) = (range.start * PAGE_SIZE, range.end * PAGE_SIZE);
            if from >= end {
                break;
            }
            let (start, stop) = (from.max(run.at), to.min(end));
            if start < stop {
                found.push((run.offset + (start - run.at), stop - start));
            }
            if to > end {
                break;
            }
            ranges.next();
        }
    }
    found
}

pub(crate) fn open_root(image: &Image) -> Result<File, EngineError> {
    let opened = RawDisk::open(&image.rootfs, Access::ReadOnly)?;
    opened
        .file()
        .try_clone()
        .map_err(EngineError::host("open an image"))
}

/// The image that a snapshot needs.
fn image_of(paths: &Paths, about: &ImageAbout) -> Result<Image, EngineError> {
    let missing = || EngineError::SnapshotImage {
        name: about.name.clone(),
        digest: about.digest.clone(),
    };
    let store = images::open(paths)?;
    let found = store.list()?.images.into_iter();
    let mut found = found.filter(|image| image.rootfs_digest().hex() == about.rootfs);
    found.next().ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_storage::LayerRun;

    #[test]
    fn a_working_set_is_found_in_a_layer() {
        let page = PAGE_SIZE;
        let file = tempfile::tempfile().expect("file");
        file.set_len(100 * page).expect("length");
        let run = |at, len, offset| LayerRun {
            at: at * page,
            len: len * page,
            offset: offset * page,
        };
        let layer = Layer::new(file, vec![run(10, 5, 0), run(20, 10, 5), run(40, 1, 50)]);
        let working = WorkingSet::new([0..11, 13..22, 25..26, 29..60]).expect("set");
        let found = wanted(&layer.expect("layer"), &working);
        let pages: Vec<_> = found
            .iter()
            .map(|(at, len)| (at / page, len / page))
            .collect();
        assert_eq!(pages, [(0, 1), (3, 2), (5, 2), (10, 1), (14, 1), (50, 1)]);
    }
}
