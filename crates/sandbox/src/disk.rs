//! Snapshots on disk, in the project's snapshot format: an OCI image layout with the memory's pages.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use skerry_hypervisor::CpuState;
use skerry_sandbox_abi::Description;
use skerry_snapshot::{SnapshotId, SnapshotStore, Trust, WriteOptions};

use crate::builder::Limits;
use crate::error::SnapshotError;
use crate::layout::{Layout, PAGE};
use crate::sandbox::Exports;
use crate::snapshot::{Kept, Pages, Snapshot, memory_file};

/// What makes a snapshot one of a sandbox; raised with every change of what is in it.
const VERSION: u32 = 1;

/// The configuration blob.
#[derive(Serialize, Deserialize)]
pub(crate) struct Saved {
    /// Nothing else has this field.
    function_sandbox: u32,
    pub(crate) layout: Layout,
    description: Description,
}

impl Saved {
    /// Checks what no digest vouches for; `memory` is the size of what was kept.
    pub(crate) fn check(&self, memory: u64) -> Result<(), SnapshotError> {
        let found = self.function_sandbox;
        if found != VERSION {
            let why = format!("it has version {found}, and this build reads {VERSION}");
            return Err(not_one(why));
        }
        if !self.layout.is_sound() || memory != self.layout.size {
            return Err(not_one("its memory is laid out as none is"));
        }
        Ok(())
    }

    /// The snapshot, with memory and processor.
    pub(crate) fn snapshot(
        self,
        file: File,
        pages: Pages,
        state: CpuState,
    ) -> Result<Arc<Snapshot>, SnapshotError> {
        let kept = Kept {
            pages,
            state,
            plain: false,
            layout: self.layout,
            exports: Exports::new(self.description),
            limits: Limits::default(),
            mappings: Vec::new(),
            base: None,
        };
        Snapshot::new(file, kept).map_err(SnapshotError::Memory)
    }
}

fn not_one(why: impl Into<String>) -> SnapshotError {
    SnapshotError::NotASandbox(why.into())
}

impl Snapshot {
    /// Writes it to the store at `root` (a folder, made if need be), and says its identity there.
    pub fn save(&self, root: &Path) -> Result<SnapshotId, SnapshotError> {
        if !self.kept.mappings.is_empty() {
            return Err(SnapshotError::Mappings);
        }
        let mut writer = SnapshotStore::open(root)?.writer(WriteOptions::default())?;
        writer.memory(self.kept.layout.size, |pages| {
            for page in self.kept.pages.iter() {
                let bytes = self.view.page(page).unwrap_or_default();
                pages.write(page, bytes)?;
            }
            Ok::<_, skerry_snapshot::Error>(())
        })?;
        let state =
            serde_json::to_vec(&self.kept.state).map_err(|error| not_one(error.to_string()))?;
        writer.state(&state)?;
        Ok(writer.commit(&self.saved())?)
    }

    /// The configuration that goes to disk.
    pub(crate) fn saved(&self) -> Saved {
        Saved {
            function_sandbox: VERSION,
            layout: self.kept.layout,
            description: self.kept.exports.description.clone(),
        }
    }

    /// Reads one from the store at `root`: by identity, a part of it, or a name. Its digests are checked;
    /// what they can't vouch for is checked as anything hostile is.
    pub fn load(root: &Path, name: &str) -> Result<Arc<Self>, SnapshotError> {
        let store = SnapshotStore::open(root)?;
        let id = store.resolve(name)?;
        let kept = store.get(&id, Trust::Seal)?;
        let saved: Saved = kept.config().map_err(|_| not_one("it is of a machine"))?;
        saved.check(kept.memory_size())?;
        let state: CpuState =
            serde_json::from_slice(kept.state()).map_err(|error| not_one(error.to_string()))?;
        let file = memory_file(saved.layout.size).map_err(SnapshotError::Memory)?;
        kept.memory.unpack(&file).map_err(SnapshotError::Memory)?;
        let mut pages = Pages::default();
        for run in &kept.memory.runs {
            for page in run.guest_page..run.end() {
                pages.insert(page);
            }
        }
        saved.snapshot(file, pages, state)
    }
}

const _: () = assert!(skerry_snapshot::PAGE_SIZE == PAGE);
