//! Taking a machine's state while it goes on.
//!
//! ```text
//!  running:  copy what was written ─► copy what was written meanwhile ─► … until it is little
//!  frozen:   user code stands still (the agent's doing)
//!  paused:   copy the last of it, take the state, give the disk a new top, map the copy underneath
//!  running:  whoever asked writes the copy to the store or makes machines of it, at leisure
//! ```
//! The pause is in proportion to what is written while the last round is copied, and not to memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use skerry_machine::{MachineRemote, PageSet, SavedRun};
use skerry_snapshot::{SnapshotId, SnapshotStore, Trust, WorkingSet};
use skerry_storage::{Disk, Layer, LayerRun};

use super::{Base, Vm};
use crate::error::EngineError;
use crate::frozen::{About, Frozen};
use crate::mounts::MountAbout;
use crate::paths::Paths;

/// Pages that are copied in no more time than anybody notices: 2 MiB.
const FEW: u64 = 512;
/// What a machine touches later is not what the next one needs first.
const YOUTH: Duration = Duration::from_secs(2);
/// Layers of a machine's own after which they are made one.
const LAYERS: usize = 16;
/// A guest that writes faster than it is copied is not waited for.
const ROUNDS: usize = 6;
const PAGE: u64 = 4096;

/// A machine's state, and what taking it cost the machine.
#[derive(Debug)]
pub struct Captured {
    /// The state.
    pub frozen: Frozen,
    /// How long no instruction of the guest ran.
    pub pause: Duration,
    /// How long its user code stood still.
    pub freeze: Duration,
    /// Pages that were copied while it stood still.
    pub pages: u64,
}

fn failed(source: io::Error) -> EngineError {
    EngineError::host("copy a machine's memory")(source)
}

/// A copy of some of guest memory, each page at its own place in a sparse file in memory.
struct Copy {
    file: File,
    pages: PageSet,
}

impl Copy {
    fn new(memory: u64) -> Result<Self, EngineError> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create("skerry-memory", flags);
        let file = File::from(file.map_err(|error| failed(error.into()))?);
        file.set_len(memory).map_err(failed)?;
        Ok(Self {
            file,
            pages: PageSet::new(memory / PAGE),
        })
    }

    fn take(&mut self, machine: &MachineRemote, pages: &PageSet) -> Result<(), EngineError> {
        machine.for_each_page_run(pages, |at, bytes| {
            self.file.write_all_at(bytes, at).map_err(failed)
        })?;
        self.pages.union(pages);
        Ok(())
    }
}

/// Ranges, ascending and apart.
fn merged<'a>(ranges: impl Iterator<Item = &'a Range<u64>>) -> Vec<Range<u64>> {
    let mut all: Vec<_> = ranges.cloned().collect();
    all.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(all.len());
    for range in all {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

impl Vm {
    /// Takes the machine's state. Other machines can go on from it, and this one does, with its
    /// memory shared with theirs as far as neither writes it.
    pub fn capture(&self) -> Result<Captured, EngineError> {
        let mut books = self.shared.books.lock();
        let machine = self.machine();
        let mounts = self.mounts_about()?;
        if machine.is_paused() {
            return Err(EngineError::CapturePaused);
        }
        machine.track_writes()?;
        let mut copy = Copy::new(self.shared.about.machine.memory)?;
        let mut written = machine.written()?;
        if books.own_layers().len() >= LAYERS {
            // One that has what all of them had.
            for run in books
                .own_layers()
                .iter()
                .flat_map(|layer| layer.runs().iter())
            {
                written.insert(run.at / PAGE..(run.at + run.len) / PAGE);
            }
        }
        for _ in 0..ROUNDS {
            if written.count() <= FEW {
                break;
            }
            copy.take(machine, &written)?;
            written = machine.harvest()?;
        }
        let frozen = Instant::now();
        self.freeze()?;
        let paused = Instant::now();
        let taken = machine
            .pause()
            .map_err(EngineError::from)
            .and_then(|()| self.take(&mut books, copy, written, mounts));
        machine.resume();
        let pause = paused.elapsed();
        self.thaw()?;
        let (frozen_state, pages) = taken?;
        Ok(Captured {
            frozen: frozen_state,
            pause,
            freeze: frozen.elapsed(),
            pages,
        })
    }

    /// The part for which the machine stands still.
    fn take(
        &self,
        books: &mut super::Books,
        mut copy: Copy,
        mut written: PageSet,
        mounts: Vec<MountAbout>,
    ) -> Result<(Frozen, u64), EngineError> {
        let machine = self.machine();
        // Until memory, disk and state belong together again.
        books.origin = None;
        // First, since it may finish an access.
        let state = machine.save_state()?;
        written.union(&machine.harvest()?);
        let pages = written.count();
        copy.take(machine, &written)?;
        self.underlay(books, copy)?;
        let scratch = match &self.shared.scratch {
            None => None,
            Some(disk) => {
                disk.freeze()?;
                books.disk.push((books.captures, disk.written()));
                disk.rebase();
                Some((disk.size(), disk.layers()))
            }
        };
        let state = Arc::new(state);
        books.origin = Some(state.clone());
        let frozen = Frozen {
            about: About {
                command: self.shared.command.lock().clone(),
                surroundings: self.shared.surroundings.lock().clone(),
                mounts,
                ..self.shared.about.clone()
            },
            state,
            memory: books.memory.clone(),
            scratch,
            root: self.shared.root.clone(),
            base: books.base.clone().map(|base| Base {
                disk: merged(
                    base.disk
                        .iter()
                        .chain(books.disk.iter().flat_map(|(_, disk)| disk)),
                ),
                ..base
            }),
            capture: books.captures,
            working: None,
        };
        Ok((frozen, pages))
    }

    /// Makes the copy the newest layer of memory, and maps it underneath. In that order: should the
    /// mapping stop halfway, what is not mapped counts as written still.
    fn underlay(&self, books: &mut super::Books, copy: Copy) -> Result<(), EngineError> {
        let machine = self.machine();
        let Copy {
            file,
            pages: copied,
        } = copy;
        // Few mappings are worth some pages more.
        let all = copied.coalesce(PageSet::GAP, PageSet::RUNS);
        let mut gaps = all.clone();
        gaps.subtract(&copied);
        machine.for_each_page_run(&gaps, |at, bytes| {
            file.write_all_at(bytes, at).map_err(failed)
        })?;
        books.captures += 1;
        if all.is_empty() {
            return Ok(());
        }
        let runs = all.runs().map(|run| {
            let (at, len) = (run.start * PAGE, (run.end - run.start) * PAGE);
            let offset = at;
            LayerRun { at, len, offset }
        });
        let layer = Layer::new(file, runs.collect::<Vec<_>>())?;
        let mapped = layer.file().try_clone().map_err(failed)?;
        let saved = layer.runs().iter().map(|run| SavedRun {
            at: run.at,
            len: run.len,
            offset: run.offset,
        });
        let saved = saved.collect();
        if books.own_layers().len() >= LAYERS {
            let kept = books.memory.len() - books.own_layers().len();
            books.memory.truncate(kept);
        }
        books.memory.push(layer);
        Ok(machine.rebase(mapped, saved)?)
    }

    /// Notes beside the snapshot that the machine came from which pages it has touched, if nobody knew
    /// yet and it is young: later ones are to have them at hand.
    pub(crate) fn note_working_set(&self, paths: &Paths) -> Result<(), EngineError> {
        let mut books = self.shared.books.lock();
        let young = self.shared.born.elapsed() < YOUTH;
        let from = books.base.as_ref().map(|base| base.id);
        let Some(id) = from.filter(|_| std::mem::take(&mut books.unknown) && young) else {
            return Ok(());
        };
        drop(books);
        let pages = self.machine().resident()?;
        let unnoted = EngineError::host("note what a machine touches");
        let set = WorkingSet::new(pages.runs());
        let set = set.map_err(|error| unnoted(io::Error::other(error)))?;
        let store = SnapshotStore::open(paths.snapshots())?;
        Ok(store.get(&id, Trust::Seal)?.note_working_set(&set)?)
    }

    /// Whether a difference to something in the store can be taken.
    pub(crate) fn has_base(&self) -> bool {
        self.shared.books.lock().base.is_some()
    }

    /// The store has `frozen`, a state of this machine, as `id`: what is written after it is what
    /// differs from that.
    pub(crate) fn saved(&self, id: SnapshotId, frozen: &Frozen) {
        let mut books = self.shared.books.lock();
        let (count, now) = (frozen.memory.len(), &books.memory);
        let same = |(one, other): (&Layer, &Layer)| Arc::ptr_eq(one.file(), other.file());
        if now.len() < count || !now.iter().zip(&frozen.memory).all(same) {
            // Its layers have been made one since, with what was written later.
            return;
        }
        books.disk.retain(|(capture, _)| *capture > frozen.capture);
        books.base = Some(Base {
            id,
            layers: count,
            disk: Vec::new(),
        });
    }

    /// Has user code stand still.
    fn freeze(&self) -> Result<(), EngineError> {
        Ok(self.shared.agent.lock().freeze()?)
    }

    /// Lets user code go on.
    fn thaw(&self) -> Result<(), EngineError> {
        Ok(self.shared.agent.lock().thaw()?)
    }
}
