//! Nobody waits for a boot twice: the first run of an image keeps the machine as it is when its
//! agent is ready, and later runs start from there.
//!
//! ```text
//!  first run:  boot ─► agent ready ─► pause, save, resume ─► command
//!  later runs: map memory, copy the scratch disk's few blocks, set state ─► agent meets its new
//!              host: clock, entropy, names ─► command
//! ```
//! What is kept is named by all that it depends on, so that a change of any finds nothing.

use serde::Serialize;
use skerry_hypervisor::CpuidTable;
use skerry_machine::{MACHINE_STATE_VERSION, MachineConfig};
use skerry_oci::{Digest, Image};
use skerry_snapshot::{SnapshotId, SnapshotStore};

use crate::builtin;
use crate::error::EngineError;
use crate::frozen::{FORMAT, Frozen, Writing};
use crate::machine::Prepared;
use crate::paths::Paths;
use crate::snapshots::START_PREFIX;
use crate::vm::Vm;

/// What Skerry puts into the guest: a start that was kept with another is of no more use.
#[derive(Serialize)]
struct Build {
    version: &'static str,
    format: u32,
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
            format: FORMAT,
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
        })
    }

    /// The kept start, if there is one.
    pub(crate) fn find(&self, paths: &Paths, image: &Image) -> Result<Option<Frozen>, EngineError> {
        match self.store.resolve(&self.name) {
            Ok(id) => Frozen::of_store(paths, &self.store, &id, Some(image)).map(Some),
            Err(skerry_snapshot::Error::NoSuchSnapshot { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a start that can't be used.
    pub(crate) fn forget(&self) -> Result<(), EngineError> {
        match self.store.resolve(&self.name) {
            Ok(id) => drop_start(&self.store, &id, &self.name),
            Err(skerry_snapshot::Error::NoSuchSnapshot { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps the machine as it is now.
    pub(crate) fn keep(&self, paths: &Paths, vm: &Vm) -> Result<(), EngineError> {
        if self.store.resolve(&self.name).is_ok() {
            // Another run was faster.
            return Ok(());
        }
        // It can be made again: no need to wait for the disk.
        let writing = Writing::default();
        let id = vm.capture()?.frozen.write(&self.store, &paths.scratch(), writing)?;
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

fn unwritable(source: &serde_json::Error) -> EngineError {
    EngineError::Host {
        what: "write down a machine's state",
        source: std::io::Error::other(source.to_string()),
    }
}
