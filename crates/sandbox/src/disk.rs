//! Snapshots on disk, in the project's snapshot format: an OCI image layout with the memory's pages.

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
use crate::snapshot::{Pages, Snapshot, memory_file};

/// What makes a snapshot one of a sandbox; raised with every change of what is in it.
const VERSION: u32 = 1;

/// The configuration blob.
#[derive(Serialize, Deserialize)]
struct Saved {
    /// Nothing else has this field.
    function_sandbox: u32,
    layout: Layout,
    description: Description,
}

fn not_one(why: impl Into<String>) -> SnapshotError {
    SnapshotError::NotASandbox(why.into())
}

impl Snapshot {
    /// Writes it to the store at `root` (a folder, made if need be), and says its identity there.
    pub fn save(&self, root: &Path) -> Result<SnapshotId, SnapshotError> {
        if !self.mappings.is_empty() {
            return Err(SnapshotError::Mappings);
        }
        let mut writer = SnapshotStore::open(root)?.writer(WriteOptions::default())?;
        writer.memory(self.layout.size, |pages| {
            for page in self.pages.iter() {
                let bytes = self.view.page(page).unwrap_or_default();
                pages.write(page, bytes)?;
            }
            Ok::<_, skerry_snapshot::Error>(())
        })?;
        let state = serde_json::to_vec(&self.state).map_err(|error| not_one(error.to_string()))?;
        writer.state(&state)?;
        let saved = Saved {
            function_sandbox: VERSION,
            layout: self.layout,
            description: self.exports.description.clone(),
        };
        Ok(writer.commit(&saved)?)
    }

    /// Reads one from the store at `root`: by identity, a part of it, or a name. Its digests are checked;
    /// what they can't vouch for is checked as anything hostile is.
    pub fn load(root: &Path, name: &str) -> Result<Arc<Self>, SnapshotError> {
        let store = SnapshotStore::open(root)?;
        let id = store.resolve(name)?;
        let kept = store.get(&id, Trust::Seal)?;
        let saved: Saved = kept.config().map_err(|_| not_one("it is of a machine"))?;
        if saved.function_sandbox != VERSION {
            let found = saved.function_sandbox;
            return Err(not_one(format!(
                "it has version {found}, and this build reads {VERSION}"
            )));
        }
        if !saved.layout.is_sound() || kept.memory_size() != saved.layout.size {
            return Err(not_one("its memory is laid out as none is"));
        }
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
        let exports = Exports::new(saved.description);
        let limits = Limits::default();
        let snapshot = Self::new(
            file,
            pages,
            state,
            saved.layout,
            exports,
            limits,
            Vec::new(),
            None,
        );
        snapshot.map_err(SnapshotError::Memory)
    }
}

const _: () = assert!(skerry_snapshot::PAGE_SIZE as u64 == PAGE);
