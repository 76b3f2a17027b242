//! The store: snapshots by identity, and names for them.
//!
//! ```text
//! ROOT/HEX/          a snapshot
//!      names.json    names → identities, replaced by renaming `.names`
//!      .…            see `staging`
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::layout::Layout;
use crate::manifest;
use crate::snapshot::{Outline, Snapshot, Trust};
use crate::staging::{self, Gone, StoreLock};
use crate::writer::{SnapshotWriter, WriteOptions};
use crate::{Error, SnapshotId};

/// No snapshot is a difference to a difference, and so on, more often.
pub const CHAIN_MAX: usize = 64;
const NAME_MAX: usize = 255;
const PUNCTUATION: &str = "._-:/@+";
/// Names for more snapshots than a disk holds.
const NAMES_BYTES_MAX: u64 = 64 << 20;

/// What a snapshot says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its identity.
    pub id: SnapshotId,
    /// The names it has in the store.
    pub names: Vec<String>,
    /// What it is a difference to.
    pub parent: Option<SnapshotId>,
    /// The size of all its blobs in bytes.
    pub size: u64,
    /// The size of the guest's memory in bytes.
    pub memory_size: u64,
    /// When it was taken.
    pub created: SystemTime,
}

/// What the store has.
#[derive(Debug, Default)]
pub struct Listing {
    /// The snapshots, the newest first.
    pub snapshots: Vec<SnapshotInfo>,
    /// An error for each entry that isn't usable, naming it.
    pub damaged: Vec<Error>,
}

/// A directory of snapshots, used by any number of processes at once.
#[derive(Debug, Clone)]
pub struct SnapshotStore {
    root: PathBuf,
}

type Names = BTreeMap<String, SnapshotId>;

/// What a snapshot of the store says of itself; `None` when there is none.
fn outline(root: &Path, id: &SnapshotId) -> Result<Option<Outline>, Error> {
    let place = root.join(id.hex());
    let layout = match Layout::open(&place, id.hex()) {
        Err(Error::NoSuchSnapshot { .. }) => return Ok(None),
        layout => layout?,
    };
    let outline = Outline::read(&layout)?;
    check_id(id, outline.id)?;
    Ok(Some(outline))
}

fn check_id(expected: &SnapshotId, found: SnapshotId) -> Result<(), Error> {
    match found == *expected {
        true => Ok(()),
        false => Err(Error::WrongId {
            expected: *expected,
            found,
        }),
    }
}

pub(crate) fn check_size(
    child: &str,
    size: u64,
    parent: SnapshotId,
    parent_size: u64,
) -> Result<(), Error> {
    match size == parent_size {
        true => Ok(()),
        false => Err(Error::WrongParent {
            snapshot: child.to_owned(),
            size,
            parent,
            parent_size,
        }),
    }
}

/// Checks that a difference to `parent` can be added to the store.
pub(crate) fn check_parent(
    root: &Path,
    child: &str,
    parent: SnapshotId,
    size: Option<u64>,
) -> Result<(), Error> {
    let mut next = Some(parent);
    for _ in 0..CHAIN_MAX - 1 {
        let Some(id) = next else { return Ok(()) };
        let found = outline(root, &id)?.ok_or_else(|| Error::MissingParent {
            snapshot: child.to_owned(),
            parent: id,
        })?;
        if let Some(size) = size {
            check_size(child, size, id, found.memory_size)?;
        }
        next = found.parent;
    }
    match next {
        None => Ok(()),
        Some(_) => Err(too_long(child)),
    }
}

fn too_long(snapshot: &str) -> Error {
    Error::ChainTooLong {
        snapshot: snapshot.to_owned(),
        limit: CHAIN_MAX - 1,
    }
}

impl SnapshotStore {
    /// Opens the store in `root`, making it if need be.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, Error> {
        let root = root.into();
        staging::make_root(&root)?;
        Ok(SnapshotStore { root })
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Begins a snapshot.
    pub fn writer(&self, options: WriteOptions) -> Result<SnapshotWriter, Error> {
        SnapshotWriter::create(&self.root, options)
    }

    /// Removes what killed processes left; gives how many pieces there were. With nothing to
    /// remove it is one look into the directory, without a lock: cheap enough for every start.
    pub fn sweep(&self) -> Result<usize, Error> {
        let leftovers = staging::leftovers(&self.root)?;
        let count = leftovers.len();
        leftovers.into_iter().try_for_each(Gone::delete)?;
        Ok(count)
    }

    /// What snapshots there are; whole or not.
    pub fn ids(&self) -> Result<Vec<SnapshotId>, Error> {
        let failed = |error| Error::io("read", &self.root, error);
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.root).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            ids.extend(name.to_str().and_then(SnapshotId::from_hex));
        }
        ids.sort();
        Ok(ids)
    }

    /// Whether there is such a snapshot.
    pub fn contains(&self, id: &SnapshotId) -> bool {
        self.root.join(id.hex()).is_dir()
    }

    /// All snapshots of the store. Their documents are checked, their bulk isn't read.
    pub fn list(&self) -> Result<Listing, Error> {
        let names = self.names()?;
        let mut listing = Listing::default();
        for id in self.ids()? {
            match outline(&self.root, &id) {
                Ok(Some(outline)) => listing.snapshots.push(info(&outline, &names)),
                Ok(None) => {}
                Err(error) => listing.damaged.push(error),
            }
        }
        let newest = |info: &SnapshotInfo| std::cmp::Reverse(info.created);
        listing.snapshots.sort_by_key(newest);
        Ok(listing)
    }

    /// What one snapshot says of itself.
    pub fn info(&self, id: &SnapshotId) -> Result<SnapshotInfo, Error> {
        let outline = outline(&self.root, id)?.ok_or_else(|| no_such(&id.hex()))?;
        Ok(info(&outline, &self.names()?))
    }

    /// The identity that a name, an identity or the start of one stands for.
    pub fn resolve(&self, name: &str) -> Result<SnapshotId, Error> {
        if let Some(id) = self.names()?.get(name).filter(|id| self.contains(id)) {
            return Ok(*id);
        }
        let digits = name.strip_prefix("sha256:").unwrap_or(name);
        let mut found = self.ids()?;
        found.retain(|id| !digits.is_empty() && id.hex().starts_with(digits));
        match found[..] {
            [] => Err(no_such(name)),
            [id] => Ok(id),
            _ => Err(Error::Ambiguous {
                prefix: name.to_owned(),
                candidates: found.iter().map(|id| id.hex()[..16].to_owned()).collect(),
            }),
        }
    }

    /// Opens and verifies a snapshot.
    pub fn get(&self, id: &SnapshotId, trust: Trust) -> Result<Snapshot, Error> {
        let snapshot = Snapshot::open_as(&self.root.join(id.hex()), id.hex(), trust)?;
        check_id(id, snapshot.id())?;
        Ok(snapshot)
    }

    /// Opens a snapshot and those it is a difference to, the one without parent first.
    pub fn open_chain(&self, id: &SnapshotId, trust: Trust) -> Result<Vec<Snapshot>, Error> {
        let mut chain = vec![self.get(id, trust)?];
        while let Some(child) = chain.last()
            && let Some(parent) = child.parent()
        {
            let label = child.id().hex();
            if chain.len() == CHAIN_MAX {
                return Err(too_long(&id.hex()));
            }
            let found = match self.get(&parent, trust) {
                Err(Error::NoSuchSnapshot { .. }) => {
                    let snapshot = label;
                    return Err(Error::MissingParent { snapshot, parent });
                }
                found => found?,
            };
            check_size(&label, child.memory_size(), parent, found.memory_size())?;
            chain.push(found);
        }
        chain.reverse();
        Ok(chain)
    }

    /// Checks that a snapshot can be named so.
    pub fn check_name(name: &str) -> Result<(), Error> {
        manifest::check_name(name, NAME_MAX, PUNCTUATION)
    }

    /// Gives a snapshot a name, taking it from another that has it.
    pub fn tag(&self, id: &SnapshotId, name: &str) -> Result<(), Error> {
        Self::check_name(name)?;
        let _lock = StoreLock::exclusive(&self.root)?;
        if !self.contains(id) {
            return Err(no_such(&id.hex()));
        }
        self.change_names(|names| {
            names.insert(name.to_owned(), *id);
        })
    }

    /// Gives a snapshot a name that no other has.
    pub fn tag_new(&self, id: &SnapshotId, name: &str) -> Result<(), Error> {
        Self::check_name(name)?;
        let _lock = StoreLock::exclusive(&self.root)?;
        if !self.contains(id) {
            return Err(no_such(&id.hex()));
        }
        self.check_free(name, id)?;
        self.change_names(|names| {
            names.insert(name.to_owned(), *id);
        })
    }

    /// Checks that a name is nobody's, or that of `id`.
    fn check_free(&self, name: &str, id: &SnapshotId) -> Result<(), Error> {
        match self.names()?.get(name) {
            Some(other) if other != id && self.contains(other) => Err(Error::NameTaken {
                name: name.to_owned(),
                id: *other,
            }),
            _ => Ok(()),
        }
    }

    /// Takes a name away; false when there is none such.
    pub fn untag(&self, name: &str) -> Result<bool, Error> {
        let _lock = StoreLock::exclusive(&self.root)?;
        let mut removed = false;
        self.change_names(|names| removed = names.remove(name).is_some())?;
        Ok(removed)
    }

    /// Removes a snapshot with all its names, unless others are differences to it.
    ///
    /// A virtual machine that runs from it goes on: its open files stay.
    pub fn remove(&self, id: &SnapshotId) -> Result<(), Error> {
        let gone = {
            let _lock = StoreLock::exclusive(&self.root)?;
            if !self.contains(id) {
                return Err(no_such(&id.hex()));
            }
            let mut children = self.ids()?;
            children.retain(|child| {
                matches!(outline(&self.root, child), Ok(Some(child)) if child.parent == Some(*id))
            });
            if !children.is_empty() {
                return Err(Error::HasChildren { id: *id, children });
            }
            self.change_names(|names| names.retain(|_, named| named != id))?;
            Gone::take(&self.root, id)?
        };
        gone.delete()
    }

    fn names(&self) -> Result<Names, Error> {
        let path = self.root.join("names.json");
        let failed = |error| Error::io("read", &path, error);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Names::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, NAMES_BYTES_MAX), &mut bytes)
            .map_err(failed)?;
        serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))
    }

    /// The store must be locked exclusively.
    fn change_names(&self, change: impl FnOnce(&mut Names)) -> Result<(), Error> {
        let before = self.names()?;
        let mut names = before.clone();
        change(&mut names);
        if names == before {
            return Ok(());
        }
        names.retain(|_, id| self.contains(id));
        let (new, path) = (self.root.join(".names"), self.root.join("names.json"));
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec_pretty(&names)?)?;
            file.sync_data()?;
            std::fs::rename(&new, &path)
        };
        write().map_err(|error| Error::io("write", &path, error))
    }
}

fn no_such(name: &str) -> Error {
    Error::NoSuchSnapshot {
        name: name.to_owned(),
    }
}

fn info(outline: &Outline, names: &Names) -> SnapshotInfo {
    let own = names.iter().filter(|(_, id)| **id == outline.id);
    SnapshotInfo {
        id: outline.id,
        names: own.map(|(name, _)| name.clone()).collect(),
        parent: outline.parent,
        size: outline.size,
        memory_size: outline.memory_size,
        created: outline.created,
    }
}
