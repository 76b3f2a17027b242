//! Which pools there are: a folder for each, with a lock that its process holds as long as it lives.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::PoolOptions;
use crate::command::Surroundings;
use crate::error::EngineError;
use crate::paths::Paths;
use crate::vms::places::{hold, is_held, read_json, write_json};
use crate::vms::{check_name, now};

const LOCK: &str = "lock";
const CONFIG: &str = "config";
const CONTROL: &str = "control";

/// What a pool is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct PoolConfig {
    /// Its name, which no other has.
    pub name: String,
    /// What its machines are of: an image or a snapshot, as the user named it.
    pub source: String,
    /// How it is kept.
    pub options: PoolOptions,
    /// What commands in its machines find.
    pub surroundings: Surroundings,
    /// When it was made, in nanoseconds since 1970.
    pub created: u64,
    /// Its process.
    pub pid: u32,
}

/// A pool whose process lives.
pub type PoolInfo = PoolConfig;

/// A pool's place; the lock goes with it, and the folder.
#[derive(Debug)]
pub(super) struct Place {
    folder: PathBuf,
    _lock: File,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn failed(paths: &Paths) -> impl Fn(io::Error) -> EngineError {
    let path = paths.pools();
    move |source| EngineError::Registry {
        what: "make a place for a pool",
        path: path.clone(),
        source,
    }
}

/// Where the process of a pool listens.
pub(super) fn control(paths: &Paths, name: &str) -> PathBuf {
    paths.pools().join(name).join(CONTROL)
}

impl Place {
    /// Takes the place of a name. What a killed process left there is removed.
    pub(super) fn take(paths: &Paths, name: &str) -> Result<Self, EngineError> {
        check_name(name)?;
        Paths::ensure(&paths.pools())?;
        let folder = paths.pools().join(name);
        let taken = || EngineError::PoolTaken {
            name: name.to_owned(),
        };
        let made = fs::DirBuilder::new().mode(0o700).create(&folder);
        match made {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(paths)(error));
            }
            _ => {}
        }
        let lock = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(folder.join(LOCK))
            .map_err(failed(paths))?;
        if !hold(&lock) {
            return Err(taken());
        }
        // Its last process may have removed the folder just before this held the lock in it.
        if !same_file(&lock, &folder.join(LOCK)) {
            return Err(taken());
        }
        let _ = fs::remove_file(folder.join(CONTROL));
        let _ = fs::remove_file(folder.join(CONFIG));
        Ok(Self {
            folder,
            _lock: lock,
        })
    }

    /// Makes the pool known.
    pub(super) fn publish(
        &self,
        paths: &Paths,
        config: &mut PoolConfig,
    ) -> Result<(), EngineError> {
        config.created = now();
        config.pid = std::process::id();
        let staged = self.folder.join("config.new");
        write_json(&staged, config)
            .and_then(|()| fs::rename(&staged, self.folder.join(CONFIG)))
            .map_err(failed(paths))
    }
}

fn same_file(open: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let named = fs::metadata(path).map(identity);
    let opened = open.metadata().map(identity);
    matches!((named, opened), (Ok(named), Ok(opened)) if named == opened)
}

/// The pool of a name, if its process lives.
pub(super) fn find(paths: &Paths, name: &str) -> Result<PoolInfo, EngineError> {
    let missing = || EngineError::NoSuchPool {
        name: name.to_owned(),
    };
    check_name(name).map_err(|_| missing())?;
    let folder = paths.pools().join(name);
    if !is_held(&folder.join(LOCK)) {
        return Err(missing());
    }
    read_json(&folder.join(CONFIG)).map_err(|_| missing())
}

/// All pools, by name.
pub(super) fn all(paths: &Paths) -> Result<Vec<PoolInfo>, EngineError> {
    let folder = paths.pools();
    Paths::ensure(&folder)?;
    let entries = fs::read_dir(&folder).map_err(failed(paths))?;
    let names = entries.flatten().map(|entry| entry.file_name());
    let mut pools: Vec<PoolInfo> = names
        .filter_map(|name| find(paths, &name.to_string_lossy()).ok())
        .collect();
    pools.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(pools)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_pool_and_none_when_its_process_is_gone() {
        let folder = tempfile::tempdir().expect("folder");
        let paths = Paths::at(folder.path());
        let place = Place::take(&paths, "fast").expect("place");
        assert!(find(&paths, "fast").is_err());
        let mut config = PoolConfig {
            name: "fast".to_owned(),
            source: "demo".to_owned(),
            options: PoolOptions::default(),
            surroundings: Surroundings::default(),
            created: 0,
            pid: 0,
        };
        place.publish(&paths, &mut config).expect("publish");
        assert_eq!(find(&paths, "fast").expect("found"), config);
        assert_eq!(all(&paths).expect("all").len(), 1);
        assert!(matches!(
            Place::take(&paths, "fast"),
            Err(EngineError::PoolTaken { .. })
        ));
        drop(place);
        assert!(find(&paths, "fast").is_err());
        // One that was killed leaves its folder, and nobody holds the lock in it.
        let left = paths.pools().join("left");
        fs::create_dir(&left).expect("folder");
        fs::write(left.join(LOCK), "").expect("lock");
        write_json(&left.join(CONFIG), &config).expect("config");
        assert!(find(&paths, "left").is_err());
        assert!(all(&paths).expect("all").is_empty());
        let place = Place::take(&paths, "left").expect("taken over");
        assert!(find(&paths, "left").is_err(), "it shows its predecessor");
        drop(place);
        assert!(Place::take(&paths, "../fast").is_err());
        assert!(find(&paths, "../fast").is_err());
    }
}
