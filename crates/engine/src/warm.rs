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
use crate::command::CommandSpec;
use crate::error::EngineError;
use crate::frozen::{FORMAT, Frozen, Writing};
use crate::hypervisor::Backend;
use crate::machine::Prepared;
use crate::paths::Paths;
use crate::snapshots::{self, START_PREFIX};
use crate::vm::{Vm, VmSpec};

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
    #[serde(flatten)]
    disk: WarmDisk,
}

/// What sort of writable disk a machine begins with.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct WarmDisk {
    /// It has a journal.
    pub(crate) journal: bool,
    /// Its size, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) size: Option<u64>,
}

/// The first digits of the digest of a document.
fn digest(document: &impl Serialize, digits: usize) -> Result<String, EngineError> {
    let unwritable = EngineError::host("write down what a start depends on");
    let bytes = serde_json::to_vec(document).map_err(|error| unwritable(error.into()))?;
    let mut hex = Digest::of(&bytes).hex();
    hex.truncate(digits);
    Ok(hex)
}

/// What the names of an image's kept starts begin with.
fn image_prefix(image: &Digest) -> String {
    format!("{START_PREFIX}{}-", &image.hex()[..32])
}

/// Takes the name of a kept start away; the snapshot goes unless the user has named it too, or has
/// snapshots that are differences to it. Of those `snapshots::prune` finds the last to go by its name.
fn drop_start(store: &SnapshotStore, id: &SnapshotId, name: &str) -> Result<(), EngineError> {
    if store.info(id).is_ok_and(|info| info.names.len() > 1) {
        store.untag(name)?;
        return Ok(());
    }
    // A damaged one can't say what else it is called, and is of no use by any name.
    match store.remove(id) {
        Err(skerry_snapshot::Error::HasChildren { .. }) => Ok(()),
        result => Ok(result?),
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
        disk: WarmDisk,
    ) -> Result<Self, EngineError> {
        let backend = prepared.selected.backend;
        Self::named(paths, image, backend, &prepared.tables, machine, disk)
    }

    fn named(
        paths: &Paths,
        image: &Image,
        backend: Backend,
        cpuid: &[CpuidTable],
        machine: &MachineConfig,
        disk: WarmDisk,
    ) -> Result<Self, EngineError> {
        let build = Build {
            version: env!("CARGO_PKG_VERSION"),
            format: FORMAT,
            state_version: MACHINE_STATE_VERSION,
            kernel: builtin::KERNEL_MANIFEST,
            agent: builtin::AGENT_SOURCES,
        };
        let kind = Kind {
            root: image.rootfs_digest().hex(),
            backend: backend.name(),
            cpuid,
            machine,
            disk,
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
        let id = self.write(paths, vm, Writing::default())?;
        if self.store.resolve(&self.name).is_ok() {
            // Another run was faster after all.
            return Ok(self.store.remove(&id)?);
        }
        self.store.tag(&id, &self.name)?;
        self.tidy()
    }

    fn write(&self, paths: &Paths, vm: &Vm, writing: Writing) -> Result<SnapshotId, EngineError> {
        // A machine whose disk is kept elsewhere has had no use for it.
        Paths::ensure(&paths.scratch())?;
        let frozen = vm.capture()?.frozen;
        frozen.write(&self.store, &paths.scratch(), writing)
    }

    /// Removes what was kept by other builds, and what killed processes left.
    fn tidy(&self) -> Result<(), EngineError> {
        drop_starts(&self.store, &self.image, |name| {
            !name.starts_with(&self.prefix)
        })?;
        self.store.sweep()?;
        Ok(())
    }

    /// Keeps the machine as it is now in place of what was kept before.
    fn replace(&self, paths: &Paths, vm: &Vm) -> Result<SnapshotId, EngineError> {
        let writing = Writing {
            durable: true,
            ..Writing::default()
        };
        let id = self.write(paths, vm, writing)?;
        let before = self.store.resolve(&self.name).ok();
        self.store.tag(&id, &self.name)?;
        if let Some(before) = before.filter(|before| *before != id)
            && self
                .store
                .info(&before)
                .is_ok_and(|info| info.names.is_empty())
        {
            match self.store.remove(&before) {
                Ok(()) | Err(skerry_snapshot::Error::HasChildren { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.tidy()?;
        Ok(id)
    }
}

/// How an image is warmed up.
#[derive(Clone, Debug, Default)]
pub struct WarmSpec {
    /// The machine, which later runs must ask for too.
    pub vm: VmSpec,
    /// A command to run before the start is kept.
    pub command: Option<CommandSpec>,
    /// The command goes on in every run; it is ready when it has written this. Without it, it has to
    /// end, with success.
    pub ready: Option<String>,
    /// A name for the snapshot, besides that of the image's kept start.
    pub name: Option<String>,
}

/// Boots a machine from `image`, which the user calls `name`, warms it up, and keeps it as the start of
/// later runs.
pub fn warm(
    paths: &Paths,
    image: &Image,
    name: &str,
    spec: &WarmSpec,
    note: &mut dyn FnMut(&str),
) -> Result<SnapshotId, EngineError> {
    if let Some(name) = &spec.name {
        snapshots::check_name(name)?;
    }
    let fresh = VmSpec {
        fresh: true,
        ..spec.vm.clone()
    };
    if spec.command.is_some() && !spec.vm.mounts.is_empty() {
        return Err(EngineError::WarmMounts);
    }
    // Later runs have as many folders, and perhaps others: none is mounted in what is kept.
    let vm = Vm::start_unmounted(paths, image, name, &fresh, note)?;
    vm.run_first_programs()?;
    match (&spec.command, &spec.ready) {
        (None, _) => {}
        (Some(command), None) => vm.prewarm(command)?,
        (Some(command), Some(ready)) => vm.leave_running(command, ready)?,
    }
    let about = vm.about();
    let kept = Warm::named(
        paths,
        image,
        about.backend,
        &about.cpuid,
        &about.machine,
        WarmDisk::default(),
    )?;
    let id = kept.replace(paths, &vm)?;
    vm.kill();
    if let Some(name) = &spec.name {
        kept.store.tag(&id, name)?;
    }
    Ok(id)
}
