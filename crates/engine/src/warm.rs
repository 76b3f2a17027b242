//! Nobody waits for a boot twice: the first run of an image keeps the machine as it is when its
//! agent is ready, and later runs start from there.
//!
//! ```text
//!  first run:  boot ─► agent ready ─► pause, save, resume ─► command
//!  later runs: map memory, copy the scratch disk's few blocks, set state ─► agent meets its new
//!              host: clock, entropy, names ─► command
//! ```
//! What is kept is named by all that it depends on, so that a change of any finds nothing.

use serde::{Deserialize, Serialize};
use skerry_hypervisor::CpuidTable;
use skerry_machine::{
    MACHINE_STATE_VERSION, MachineConfig, MachineRemote, MachineState, SavedMemory, SavedRun,
};
use skerry_oci::{Digest, Image};
use skerry_snapshot::{
    PAGE_SIZE, PageImage, Snapshot, SnapshotId, SnapshotStore, Trust, WriteOptions,
};
use skerry_storage::RawDisk;

use crate::builtin;
use crate::error::EngineError;
use crate::machine::Prepared;
use crate::paths::Paths;
use crate::snapshots::START_PREFIX;

/// Name of the writable disk in a snapshot.
const SCRATCH: &str = "scratch";

/// What a snapshot says of the machine that it is of.
#[derive(Debug, Serialize, Deserialize)]
struct SavedConfig {
    backend: String,
    machine: MachineConfig,
    cpuid: Vec<CpuidTable>,
}

/// What Skerry puts into the guest: a start that was kept with another is of no more use.
#[derive(Serialize)]
struct Build {
    version: &'static str,
    state_version: u32,
    kernel: &'static str,
    agent: &'static str,
}

/// The rest of what the state of a started image depends on.
#[derive(Serialize)]
struct Kind<'a> {
    root: String,
    backend: &'static str,
    cpuid: &'a [CpuidTable],
    machine: &'a MachineConfig,
}

/// The first digits of the digest of a document.
fn digest(document: &impl Serialize, digits: usize) -> Result<String, EngineError> {
    let bytes = serde_json::to_vec(document).map_err(|source| unwritable(&source))?;
    let mut hex = Digest::of(&bytes).hex();
    hex.truncate(digits);
    Ok(hex)
}

/// What the names of an image's kept starts begin with.
fn image_prefix(image: &Digest) -> String {
    format!("{START_PREFIX}{}-", &image.hex()[..32])
}

/// Takes the name of a kept start away; the snapshot goes unless the user has named it too.
fn drop_start(store: &SnapshotStore, id: &SnapshotId, name: &str) -> Result<(), EngineError> {
    store.untag(name)?;
    match store.info(id) {
        Ok(info) if !info.names.is_empty() => Ok(()),
        // A damaged one can't say what else it is called, and is of no use by any name.
        Ok(_) | Err(_) => Ok(store.remove(id)?),
    }
}

/// Drops the kept starts of an image, or those for which `stale` holds.
fn drop_starts(
    store: &SnapshotStore,
    image: &Digest,
    stale: impl Fn(&str) -> bool,
) -> Result<(), EngineError> {
    let prefix = image_prefix(image);
    for info in store.list()?.snapshots {
        for name in &info.names {
            if name.starts_with(&prefix) && stale(name) {
                drop_start(store, &info.id, name)?;
            }
        }
    }
    Ok(())
}

/// Removes all that was kept of an image.
pub(crate) fn forget_image(paths: &Paths, image: &Digest) -> Result<(), EngineError> {
    if !paths.snapshots().exists() {
        return Ok(());
    }
    drop_starts(&SnapshotStore::open(paths.snapshots())?, image, |_| true)
}

/// The kept start of one image on one kind of machine.
pub(crate) struct Warm {
    store: SnapshotStore,
    image: Digest,
    /// What the names of starts of this image and build begin with.
    prefix: String,
    name: String,
    config: SavedConfig,
}

/// A kept start that was found and checked.
pub(crate) struct Found {
    pub(crate) memory: SavedMemory,
    pub(crate) state: MachineState,
    pub(crate) scratch: Option<PageImage>,
}

impl Warm {
    pub(crate) fn of(
        paths: &Paths,
        image: &Image,
        prepared: &Prepared,
        machine: &MachineConfig,
    ) -> Result<Self, EngineError> {
        let backend = prepared.selected.backend.name();
        let build = Build {
            version: env!("CARGO_PKG_VERSION"),
            state_version: MACHINE_STATE_VERSION,
            kernel: builtin::KERNEL_MANIFEST,
            agent: builtin::AGENT_SOURCES,
        };
        let kind = Kind {
            root: image.rootfs_digest().hex(),
            backend,
            cpuid: &prepared.tables,
            machine,
        };
        let prefix = format!("{}{}-", image_prefix(&image.digest), digest(&build, 12)?);
        Ok(Self {
            store: SnapshotStore::open(paths.snapshots())?,
            image: image.digest,
            name: format!("{prefix}{}", digest(&kind, 32)?),
            prefix,
            config: SavedConfig {
                backend: backend.to_owned(),
                machine: machine.clone(),
                cpuid: prepared.tables.clone(),
            },
        })
    }

    /// The kept start, if there is one.
    pub(crate) fn find(&self) -> Result<Option<Found>, EngineError> {
        let id = match self.store.resolve(&self.name) {
            Ok(id) => id,
            Err(skerry_snapshot::Error::NoSuchSnapshot { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut snapshot = self.store.get(&id, Trust::Seal)?;
        let state = serde_json::from_slice(snapshot.state()).map_err(|source| {
            let snapshot = self.name.clone();
            EngineError::SavedState { snapshot, source }
        })?;
        let scratch = snapshot.disks.remove(SCRATCH);
        Ok(Some(Found {
            memory: saved_memory(snapshot),
            state,
            scratch,
        }))
    }

    /// Removes a start that can't be used.
    pub(crate) fn forget(&self) -> Result<(), EngineError> {
        match self.store.resolve(&self.name) {
            Ok(id) => drop_start(&self.store, &id, &self.name),
            Err(skerry_snapshot::Error::NoSuchSnapshot { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps the machine as it is now; it stands still meanwhile.
    pub(crate) fn keep(
        &self,
        remote: &MachineRemote,
        scratch: Option<&RawDisk>,
    ) -> Result<(), EngineError> {
        if self.store.resolve(&self.name).is_ok() {
            // Another run was faster.
            return Ok(());
        }
        remote.pause()?;
        let result = self.write(remote, scratch);
        remote.resume();
        result
    }

    fn write(&self, remote: &MachineRemote, scratch: Option<&RawDisk>) -> Result<(), EngineError> {
        let state = serde_json::to_vec(&remote.save_state()?).map_err(|e| unwritable(&e))?;
        // It can be made again: no need to wait for the disk.
        let options = WriteOptions {
            durable: false,
            ..WriteOptions::default()
        };
        let mut writer = self.store.writer(options)?;
        writer.memory(self.config.machine.memory, |pages| {
            remote.for_each_used_memory(|at, bytes| -> Result<(), EngineError> {
                Ok(pages.write(at / PAGE_SIZE, bytes)?)
            })
        })?;
        writer.state(&state)?;
        if let Some(disk) = scratch {
            writer.disk_file(SCRATCH, disk.file())?;
        }
        let id = writer.commit(&self.config)?;
        if self.store.resolve(&self.name).is_ok() {
            // Another run was faster after all.
            return Ok(self.store.remove(&id)?);
        }
        self.store.tag(&id, &self.name)?;
        drop_starts(&self.store, &self.image, |name| {
            !name.starts_with(&self.prefix)
        })?;
        self.store.sweep()?;
        Ok(())
    }
}

fn saved_memory(snapshot: Snapshot) -> SavedMemory {
    let runs = snapshot.memory.runs.iter().map(|run| SavedRun {
        at: run.guest_page * PAGE_SIZE,
        len: run.pages * PAGE_SIZE,
        offset: run.file_page * PAGE_SIZE,
    });
    let runs = runs.collect();
    SavedMemory {
        layers: vec![(snapshot.memory.file, runs)],
    }
}

fn unwritable(source: &serde_json::Error) -> EngineError {
    EngineError::Host {
        what: "write down a machine's state",
        source: std::io::Error::other(source.to_string()),
    }
}
