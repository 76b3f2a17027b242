//! Hidden directories in which snapshots come into being, and the locks of a store.
//!
//! ```text
//! ROOT/.lock            taken shared while a staging directory is made or renamed into place,
//!                       exclusively to sweep, remove and rename
//!      .new-PID-N/      being written; its maker holds a lock on it, gone when the maker is
//!      .gone-PID-N/     being removed, likewise
//!      HEX/             a snapshot
//! ```

use std::fs::{DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, SnapshotId};

const NEW: &str = ".new-";
const GONE: &str = ".gone-";

/// A lock on the store as a whole.
pub(crate) struct StoreLock(#[expect(dead_code, reason = "held for its lock")] File);

fn lock_file(root: &Path) -> Result<(PathBuf, File), Error> {
    let path = root.join(".lock");
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.mode(0o600).open(&path);
    let file = file.map_err(|error| Error::io("open", &path, error))?;
    Ok((path, file))
}

impl StoreLock {
    pub(crate) fn shared(root: &Path) -> Result<Self, Error> {
        let (path, file) = lock_file(root)?;
        file.lock_shared()
            .map_err(|error| Error::io("lock", &path, error))?;
        Ok(StoreLock(file))
    }

    pub(crate) fn exclusive(root: &Path) -> Result<Self, Error> {
        let (path, file) = lock_file(root)?;
        file.lock()
            .map_err(|error| Error::io("lock", &path, error))?;
        Ok(StoreLock(file))
    }
}

/// Makes the directory of a store, for its owner alone: guests' secrets are in there.
pub(crate) fn make_root(root: &Path) -> Result<(), Error> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(root);
    made.map_err(|error| Error::io("make", root, error))
}

/// A hidden directory of this process, removed with everything in it unless published.
#[derive(Debug)]
pub(crate) struct Staging {
    root: PathBuf,
    path: PathBuf,
    /// Open for its lock.
    dir: Option<File>,
}

/// A path in `root` that no other process uses.
fn unused(root: &Path, prefix: &str) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    root.join(format!("{prefix}{}-{number}", std::process::id()))
}

impl Staging {
    pub(crate) fn create(root: &Path) -> Result<Self, Error> {
        make_root(root)?;
        let _lock = StoreLock::shared(root)?;
        let path = loop {
            let path = unused(root, NEW);
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => break path,
                // Left by a killed process that had our number.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io("make", &path, error)),
            }
        };
        let mut staging = Staging {
            root: root.to_owned(),
            path,
            dir: None,
        };
        let failed = |error| Error::io("make", &staging.path, error);
        let dir = File::open(&staging.path).map_err(failed)?;
        dir.lock().map_err(failed)?;
        let blobs = staging.path.join("blobs/sha256");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&blobs)
            .map_err(failed)?;
        staging.dir = Some(dir);
        Ok(staging)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Brings the directories to disk.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        for dir in ["blobs/sha256", "blobs", ""] {
            sync_dir(&self.path.join(dir))?;
        }
        Ok(())
    }

    /// Renames it into place. False when there is something already. The store must be locked.
    pub(crate) fn publish(&mut self, id: &SnapshotId) -> Result<bool, Error> {
        let place = self.root.join(id.hex());
        match std::fs::rename(&self.path, &place) {
            Ok(()) => {
                self.dir = None;
                Ok(true)
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(Error::io("make", &place, error)),
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.dir.is_some() {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Brings a directory's entries to disk.
pub(crate) fn sync_dir(path: &Path) -> Result<(), Error> {
    let sync = || File::open(path)?.sync_all();
    sync().map_err(|error| Error::io("write", path, error))
}

/// What is to be deleted, out of sight and locked.
pub(crate) struct Gone {
    path: PathBuf,
    _dir: File,
}

impl Gone {
    /// Takes a snapshot out of its place. The store must be locked exclusively.
    pub(crate) fn take(root: &Path, id: &SnapshotId) -> Result<Self, Error> {
        let place = root.join(id.hex());
        let failed = |error| Error::io("remove", &place, error);
        let dir = File::open(&place).map_err(failed)?;
        // For a sweeper to leave it to us. Not vital, should a child of the writer still hold it.
        let _ = dir.try_lock();
        loop {
            let path = unused(root, GONE);
            match std::fs::rename(&place, &path) {
                Ok(()) => return Ok(Gone { path, _dir: dir }),
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Deletes it.
    pub(crate) fn delete(self) -> Result<(), Error> {
        match std::fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("remove", &self.path, error))
            }
            _ => Ok(()),
        }
    }
}

/// The hidden directories of a store.
fn hidden(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |error| Error::io("read", root, error);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        if name.starts_with(NEW.as_bytes()) || name.starts_with(GONE.as_bytes()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// What killed processes left in a store.
pub(crate) fn leftovers(root: &Path) -> Result<Vec<Gone>, Error> {
    // Without a lock, so that looking costs and hinders nothing when there is nothing.
    if hidden(root)?.is_empty() {
        return Ok(Vec::new());
    }
    // Nobody is between making a directory and locking it.
    let _lock = StoreLock::exclusive(root)?;
    let mut found = Vec::new();
    for path in hidden(root)? {
        // One that disappears was being removed.
        let Ok(dir) = File::open(&path) else { continue };
        match dir.try_lock() {
            Ok(()) => found.push(Gone { path, _dir: dir }),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path, error)),
        }
    }
    Ok(found)
}
