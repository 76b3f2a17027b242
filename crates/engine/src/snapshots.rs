//! What a user does with the snapshots of the store: look at them, carry them about, remove them.
//!
//! ```text
//!  name, identity or its start ─► resolve ─► inspect, remove, export
//!  directory or archive ─► import ─► identity
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use skerry_oci::{Name, Outgoing, Progress, Pushed};
use skerry_snapshot::{ARTIFACT_TYPE, Form, PAGE_SIZE, PageImage, SnapshotStore, Trust};
pub use skerry_snapshot::{Listing, SnapshotId, SnapshotInfo};

use crate::dates;
use crate::error::EngineError;
use crate::images;
use crate::paths::Paths;

/// Names with this in front are those of kept starts of images; nothing else is named so.
pub const START_PREFIX: &str = "start-";

/// The pages of a memory or disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Pages {
    /// What the guest sees, in bytes.
    pub size: u64,
    /// What of it is stored, in bytes; the rest is zero or the parent's.
    pub stored: u64,
}

impl Pages {
    fn of(image: &PageImage) -> Self {
        let pages = image.runs.iter().map(|run| run.pages);
        Self {
            size: image.size,
            stored: pages.sum::<u64>().saturating_mul(PAGE_SIZE),
        }
    }
}

/// Everything that is known of a snapshot.
#[derive(Clone, Debug)]
pub struct Details {
    /// What it says of itself.
    pub info: SnapshotInfo,
    /// Its memory.
    pub memory: Pages,
    /// Its disks, by name.
    pub disks: BTreeMap<String, Pages>,
    /// The sizes of its other blobs in bytes, by name.
    pub extras: BTreeMap<String, u64>,
    /// The size of the machine's state in bytes.
    pub state_size: u64,
    /// The configuration, as whoever took the snapshot wrote it.
    pub config: serde_json::Value,
}

/// A snapshot, as programs are told of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct SnapshotEntry {
    /// 64 hexadecimal digits.
    pub id: String,
    /// Its names.
    pub names: Vec<String>,
    /// When it was made, as RFC 3339 has it.
    pub created: String,
    /// What it is a difference to.
    pub parent: Option<String>,
    /// Bytes of its guest's memory.
    pub memory: u64,
    /// Bytes that it takes in the store.
    pub size: u64,
}

impl SnapshotEntry {
    /// Of what the store says.
    #[must_use]
    pub fn of(info: SnapshotInfo) -> Self {
        let SnapshotInfo {
            id,
            names,
            parent,
            size,
            memory_size,
            created,
        } = info;
        Self {
            id: id.to_string(),
            names,
            created: dates::rfc3339(created),
            parent: parent.map(|parent| parent.to_string()),
            memory: memory_size,
            size,
        }
    }
}

/// All of a snapshot, likewise: its [`SnapshotEntry`] and what only opening it tells.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct SnapshotDetails {
    /// What the store says of it.
    #[serde(flatten)]
    pub entry: SnapshotEntry,
    /// Bytes of memory that it stores itself.
    pub memory_stored: u64,
    /// Bytes of the machine's state.
    pub state_size: u64,
    /// Its disks, by name.
    pub disks: BTreeMap<String, Pages>,
    /// Bytes of its other blobs, by name.
    pub extras: BTreeMap<String, u64>,
    /// The configuration, as whoever took the snapshot wrote it.
    pub config: serde_json::Value,
}

impl SnapshotDetails {
    /// Of what [`inspect`] has found.
    #[must_use]
    pub fn of(details: Details) -> Self {
        let Details {
            info,
            memory,
            disks,
            extras,
            state_size,
            config,
        } = details;
        Self {
            entry: SnapshotEntry::of(info),
            memory_stored: memory.stored,
            state_size,
            disks,
            extras,
            config,
        }
    }
}

/// What was removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removed {
    /// A name; the snapshot has others.
    Name(String),
    /// A snapshot with all its names.
    Snapshot(SnapshotId),
}

/// What [`prune`] did.
#[derive(Debug, Default)]
pub struct Pruned {
    /// The kept starts that were removed.
    pub removed: Vec<SnapshotInfo>,
    /// How many pieces were left by ended processes, and removed.
    pub leftovers: usize,
    /// Why others couldn't be removed.
    pub failed: Vec<EngineError>,
}

fn open(paths: &Paths) -> Result<SnapshotStore, EngineError> {
    let folder = paths.snapshots();
    Paths::ensure(&folder)?;
    Ok(SnapshotStore::open(folder)?)
}

/// All snapshots of the store, the newest first.
pub fn list(paths: &Paths) -> Result<Listing, EngineError> {
    Ok(open(paths)?.list()?)
}

/// Verifies a snapshot and tells everything about it.
pub fn inspect(paths: &Paths, name: &str) -> Result<Details, EngineError> {
    let store = open(paths)?;
    let id = store.resolve(name)?;
    let snapshot = store.get(&id, Trust::Seal)?;
    let disks = snapshot.disks.iter();
    let extras = snapshot.extras.iter();
    Ok(Details {
        info: store.info(&id)?,
        memory: Pages::of(&snapshot.memory),
        disks: disks
            .map(|(name, disk)| (name.clone(), Pages::of(disk)))
            .collect(),
        extras: extras
            .map(|(name, extra)| (name.clone(), extra.size))
            .collect(),
        state_size: snapshot.state().len() as u64,
        config: snapshot.config()?,
    })
}

/// Takes a name from a snapshot that has others, or else removes it. One that is damaged can be
/// removed too, and one that others are differences to can't.
pub fn remove(paths: &Paths, name: &str) -> Result<Removed, EngineError> {
    let store = open(paths)?;
    let id = store.resolve(name)?;
    let names = match store.info(&id) {
        Ok(info) => info.names,
        Err(error) if error.is_damage() => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    if names.len() > 1 && names.iter().any(|own| own == name) {
        store.untag(name)?;
        return Ok(Removed::Name(name.to_owned()));
    }
    store.remove(&id)?;
    Ok(Removed::Snapshot(id))
}

/// Copies a snapshot out of the store to `target`: a tar archive where that ends in `.tar`, a
/// directory otherwise. Gives what the snapshot is a difference to, where that doesn't go with it, as
/// `parents` has it do.
pub fn export(
    paths: &Paths,
    name: &str,
    target: &Path,
    parents: bool,
) -> Result<Option<SnapshotId>, EngineError> {
    let store = open(paths)?;
    let id = store.resolve(name)?;
    let form = match target.as_os_str().as_encoded_bytes().ends_with(b".tar") {
        true => Form::Archive,
        false => Form::Directory,
    };
    if parents {
        store.export_chain(&id, target, form)?;
        return Ok(None);
    }
    let parent = store.info(&id)?.parent;
    store.export(&id, target, form)?;
    Ok(parent)
}

/// Refuses a name that a user can't give.
pub(crate) fn check_name(name: &str) -> Result<(), EngineError> {
    SnapshotStore::check_name(name)?;
    if name.starts_with(START_PREFIX) {
        return Err(EngineError::ReservedName {
            name: name.to_owned(),
            prefix: START_PREFIX,
        });
    }
    Ok(())
}

/// Takes a snapshot from a directory or archive into the store, and gives it a name.
pub fn import(paths: &Paths, source: &Path, name: Option<&str>) -> Result<SnapshotId, EngineError> {
    // Before gigabytes are copied.
    if let Some(name) = name {
        check_name(name)?;
    }
    let store = open(paths)?;
    let id = store.import(source)?;
    if let Some(name) = name {
        store.tag(&id, name)?;
    }
    Ok(id)
}

/// Sends a snapshot, and all that it is a difference to, to the registry of `target`, as OCI artifacts.
/// Everything is verified first.
pub fn push(
    paths: &Paths,
    name: &str,
    target: &Name,
    progress: &mut dyn FnMut(Progress),
) -> Result<Pushed, EngineError> {
    let store = open(paths)?;
    let chain = store.open_chain(&store.resolve(name)?, Trust::Nothing)?;
    let artifact = |snapshot: &skerry_snapshot::Snapshot| Outgoing {
        folder: snapshot.path().to_owned(),
        manifest: snapshot.id(),
    };
    let artifacts: Vec<_> = chain.iter().rev().map(artifact).collect();
    let images = images::open(paths)?;
    Ok(images.push_artifacts(target, &artifacts, &images::settings()?, progress)?)
}

/// Brings a snapshot from its registry into the store, with what it is a difference to unless that is
/// there, and calls it `name` if that is given. Nothing is to be seen of it before all is verified.
pub fn pull(
    paths: &Paths,
    source: &Name,
    name: Option<&str>,
    progress: &mut dyn FnMut(Progress),
) -> Result<SnapshotId, EngineError> {
    if let Some(name) = name {
        check_name(name)?;
    }
    let store = open(paths)?;
    store.sweep()?;
    let folder = store.receive()?;
    let mut next =
        |config: &[u8]| skerry_snapshot::parent_of(config).filter(|parent| !store.contains(parent));
    let settings = images::settings()?;
    let received = images::open(paths)?.pull_artifacts(
        source,
        ARTIFACT_TYPE,
        folder.path(),
        &settings,
        &mut next,
        progress,
    )?;
    let manifests = received.iter().map(|found| (found.manifest, found.size));
    let id = folder.import(manifests)?;
    if let Some(name) = name {
        store.tag(&id, name)?;
    }
    Ok(id)
}

/// Removes what the next run makes again, or nobody can use: kept starts of images that have no
/// other name and no differences to them, and the remains of killed processes.
pub fn prune(paths: &Paths) -> Result<Pruned, EngineError> {
    let store = open(paths)?;
    let mut pruned = Pruned::default();
    let Listing { snapshots, damaged } = store.list()?;
    pruned.failed.extend(damaged.into_iter().map(Into::into));
    for info in snapshots.into_iter().filter(is_kept_start) {
        use skerry_snapshot::Error::{HasChildren, NoSuchSnapshot};
        match store.remove(&info.id) {
            Ok(()) => pruned.removed.push(info),
            // Another process was faster, or still needs it.
            Err(NoSuchSnapshot { .. } | HasChildren { .. }) => {}
            Err(error) => pruned.failed.push(error.into()),
        }
    }
    pruned.leftovers = store.sweep()?;
    Ok(pruned)
}

fn is_kept_start(info: &SnapshotInfo) -> bool {
    let mut names = info.names.iter();
    !info.names.is_empty() && names.all(|name| name.starts_with(START_PREFIX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_snapshot::WriteOptions;

    /// A snapshot of one page with names, and a parent.
    fn take(paths: &Paths, byte: u8, names: &[&str], parent: Option<SnapshotId>) -> SnapshotId {
        let store = open(paths).expect("store");
        let options = WriteOptions {
            durable: false,
            parent,
        };
        let mut writer = store.writer(options).expect("writer");
        writer
            .memory(4 * PAGE_SIZE, |pages| {
                pages.write(1, &[byte; PAGE_SIZE as usize])
            })
            .expect("memory");
        writer.state(b"{}").expect("state");
        let id = writer
            .commit(&serde_json::json!({ "byte": byte }))
            .expect("commit");
        for name in names {
            store.tag(&id, name).expect("tag");
        }
        id
    }

    fn left(paths: &Paths) -> Vec<SnapshotId> {
        let mut ids: Vec<_> = list(paths)
            .expect("list")
            .snapshots
            .iter()
            .map(|info| info.id)
            .collect();
        ids.sort();
        ids
    }

    #[test]
    fn pruning_takes_kept_starts_alone() {
        let folder = tempfile::tempdir().expect("folder");
        let paths = Paths::at(folder.path());
        let start = take(&paths, 1, &["start-1"], None);
        let used = take(&paths, 2, &["start-2"], None);
        let mut kept = [
            used,
            take(&paths, 3, &["start-3", "mine"], None),
            take(&paths, 4, &[], None),
            take(&paths, 5, &["restart-5"], None),
            take(&paths, 6, &["child"], Some(used)),
        ];
        kept.sort();
        let pruned = prune(&paths).expect("prune");
        let removed: Vec<_> = pruned.removed.iter().map(|info| info.id).collect();
        assert_eq!(removed, [start]);
        assert!(pruned.failed.is_empty(), "{:?}", pruned.failed);
        assert_eq!(left(&paths), kept);
    }

    #[test]
    fn removing_one_of_two_names_keeps_the_snapshot() {
        let folder = tempfile::tempdir().expect("folder");
        let paths = Paths::at(folder.path());
        let id = take(&paths, 1, &["one", "two"], None);
        let removed = remove(&paths, "one").expect("remove");
        assert_eq!(removed, Removed::Name("one".to_owned()));
        assert_eq!(inspect(&paths, "two").expect("inspect").info.id, id);
        let removed = remove(&paths, "two").expect("remove");
        assert_eq!(removed, Removed::Snapshot(id));
        assert!(left(&paths).is_empty());
    }

    #[test]
    fn a_parent_stays_while_it_is_needed() {
        let folder = tempfile::tempdir().expect("folder");
        let paths = Paths::at(folder.path());
        let parent = take(&paths, 1, &["parent"], None);
        take(&paths, 2, &["child"], Some(parent));
        assert!(remove(&paths, "parent").is_err());
        assert_eq!(
            export(&paths, "child", &folder.path().join("child.tar"), false).expect("export"),
            Some(parent)
        );
        remove(&paths, "child").expect("child");
        remove(&paths, "parent").expect("parent");
    }

    #[test]
    fn names_are_looked_at_before_anything_is_imported() {
        let folder = tempfile::tempdir().expect("folder");
        let (from, to) = (
            Paths::at(folder.path().join("from")),
            Paths::at(folder.path().join("to")),
        );
        let id = take(&from, 1, &["mine"], None);
        let archive = folder.path().join("mine.tar");
        assert_eq!(
            export(&from, "mine", &archive, false).expect("export"),
            None
        );
        for name in ["", "-x", "a b", "start-x"] {
            assert!(import(&to, &archive, Some(name)).is_err(), "{name:?}");
        }
        assert!(left(&to).is_empty());
        assert_eq!(import(&to, &archive, Some("yours")).expect("import"), id);
        let details = inspect(&to, "yours").expect("inspect");
        assert_eq!(details.config, serde_json::json!({ "byte": 1 }));
        let memory = Pages {
            size: 4 * PAGE_SIZE,
            stored: PAGE_SIZE,
        };
        assert_eq!((details.memory, details.state_size), (memory, 2));
    }

    #[test]
    fn a_damaged_snapshot_can_be_removed() {
        let folder = tempfile::tempdir().expect("folder");
        let paths = Paths::at(folder.path());
        let id = take(&paths, 1, &["start-1"], None);
        let index = paths.snapshots().join(id.hex()).join("index.json");
        std::fs::write(index, "{").expect("damage");
        assert_eq!(list(&paths).expect("list").damaged.len(), 1);
        assert!(inspect(&paths, "start-1").is_err());
        assert_eq!(prune(&paths).expect("prune").failed.len(), 1);
        let removed = remove(&paths, &id.hex()[..12]).expect("remove");
        assert_eq!(removed, Removed::Snapshot(id));
    }
}
