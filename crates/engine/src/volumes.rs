//! Named volumes: disks that outlive machines.
//!
//! ```text
//!  volumes/NAME/disk          a sparse file with an ext4, locked by who has it in use
//!  volumes/NAME/volume.json   what it is
//!  volumes/NAME/holder        who had it last: read only where the lock is taken
//! ```
//! A volume appears and goes by one rename of its folder; what a process that was killed left of one
//! begins with a dot.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use skerry_oci::Digest;
use skerry_storage::{Access, DiskError, RawDisk, scratch};

use crate::error::EngineError;
use crate::paths::Paths;
use crate::random::random;

/// How large a volume is unless it is said: what the guest may write, not what the host spends.
pub const DEFAULT_SIZE: u64 = 64 << 30;
/// The largest: what ext4 with blocks of 4 KiB is made for.
const MAX_SIZE: u64 = 16 << 40;
/// Volumes are whole blocks of this.
const GRAIN: u64 = 1 << 20;
const DISK: &str = "disk";
const ABOUT: &str = "volume.json";
const HOLDER: &str = "holder";
const LONGEST_NAME: usize = 128;

/// What is written down of a volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct About {
    created: u64,
    size: u64,
    /// Nobody named it.
    anonymous: bool,
}

/// A volume.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// When it was made: nanoseconds since 1970.
    pub created: u64,
    /// What a guest may write, in bytes.
    pub size: u64,
    /// What the host spends, in bytes.
    pub used: u64,
    /// Nobody named it: it was made for one machine.
    pub anonymous: bool,
    /// Its disk.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub path: PathBuf,
    /// A machine has it.
    pub in_use: bool,
    /// Which machine that is.
    pub holder: Option<String>,
}

/// A volume that a machine has; whoever holds it alone may write.
#[derive(Debug)]
pub(crate) struct Held {
    disk: Arc<RawDisk>,
    holder: PathBuf,
}

impl Held {
    pub(crate) fn disk(&self) -> &Arc<RawDisk> {
        &self.disk
    }

    /// Notes by which machine, for whoever finds it locked; who can't be told is told less.
    pub(crate) fn note_holder(&self, machine: &str) {
        let _ = fs::write(&self.holder, machine);
    }
}

/// All volumes of a user.
#[derive(Clone, Debug)]
pub struct Volumes {
    root: PathBuf,
}

fn check_name(name: &str) -> Result<(), EngineError> {
    let mut bytes = name.bytes();
    let first = bytes
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    let rest = bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    match first && rest && name.len() <= LONGEST_NAME {
        true => Ok(()),
        false => Err(EngineError::VolumeName(name.to_owned())),
    }
}

fn hex(bytes: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(bytes))
}

fn failed(name: &str, what: &'static str) -> impl FnOnce(io::Error) -> EngineError {
    move |source| EngineError::Volume {
        name: name.to_owned(),
        what,
        source,
    }
}

impl Volumes {
    /// The volumes in the user's folder.
    pub fn open(paths: &Paths) -> Result<Self, EngineError> {
        let root = paths.volumes();
        Paths::ensure(&root)?;
        Ok(Self { root })
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Makes a volume of so many bytes; of any name, if none is given.
    pub fn create(&self, name: Option<&str>, size: Option<u64>) -> Result<String, EngineError> {
        match name {
            Some(name) => self.make(name.to_owned(), size, false),
            None => self.make(hex(random()?), size, true),
        }
    }

    /// Makes the volume that machine `id` has at `target` and nobody has named, unless it is there from an
    /// earlier start; gives its name.
    pub(crate) fn provide_own(&self, id: &str, target: &str) -> Result<String, EngineError> {
        let mut name = Digest::of(format!("{id} {target}").as_bytes()).hex();
        name.truncate(32);
        match self.folder(&name).exists() {
            true => Ok(name),
            false => self.make(name, None, true),
        }
    }

    fn make(
        &self,
        name: String,
        size: Option<u64>,
        anonymous: bool,
    ) -> Result<String, EngineError> {
        check_name(&name)?;
        let size = size.unwrap_or(DEFAULT_SIZE);
        if !(scratch::MIN_VOLUME..=MAX_SIZE).contains(&size) {
            return Err(EngineError::VolumeSize {
                least: scratch::MIN_VOLUME >> 20,
                most: MAX_SIZE >> 40,
            });
        }
        let size = size.next_multiple_of(GRAIN);
        if self.folder(&name).exists() {
            return Err(EngineError::VolumeExists(name));
        }
        let about = About {
            created: crate::vms::now(),
            size,
            anonymous,
        };
        let unfinished = self.root.join(format!(".new-{}", hex(random()?)));
        let made = Self::fill(&unfinished, &about)
            .and_then(|()| fs::rename(&unfinished, self.folder(&name)));
        let Err(error) = made else { return Ok(name) };
        let _ = fs::remove_dir_all(&unfinished);
        match self.folder(&name).exists() {
            true => Err(EngineError::VolumeExists(name)),
            false => Err(failed(&name, "make")(error)),
        }
    }

    fn fill(folder: &Path, about: &About) -> io::Result<()> {
        fs::create_dir(folder)?;
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        let disk = options.open(folder.join(DISK))?;
        scratch::make_volume(&disk, about.size)?;
        disk.sync_all()?;
        let mut file = File::create_new(folder.join(ABOUT))?;
        file.write_all(&serde_json::to_vec(about)?)?;
        file.sync_all()
    }

    /// The folder of a volume, which is made where there is none.
    pub(crate) fn provide(&self, name: &str) -> Result<PathBuf, EngineError> {
        check_name(name)?;
        if !self.folder(name).exists() {
            match self.create(Some(name), None) {
                // Another machine was faster.
                Ok(_) | Err(EngineError::VolumeExists(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.folder(name))
    }

    /// Takes a volume for a machine, and makes it where there is none.
    pub(crate) fn hold(&self, name: Option<&str>, read_only: bool) -> Result<Held, EngineError> {
        let name = match name {
            None => self.create(None, None)?,
            Some(name) => {
                self.provide(name)?;
                name.to_owned()
            }
        };
        let folder = self.folder(&name);
        let access = match read_only {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        };
        let disk = RawDisk::open(folder.join(DISK), access).map_err(|error| match error {
            DiskError::Locked { .. } => EngineError::VolumeInUse {
                holder: self.holder(&name),
                name: name.clone(),
            },
            error => error.into(),
        })?;
        let same = |file: &File| {
            Ok::<_, io::Error>(file.metadata()?.ino() == fs::metadata(folder.join(DISK))?.ino())
        };
        if !same(disk.file()).unwrap_or(false) {
            // Removed between the opening and the lock.
            return Err(EngineError::NoVolume(name));
        }
        Ok(Held {
            disk: Arc::new(disk),
            holder: folder.join(HOLDER),
        })
    }

    fn holder(&self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.folder(name).join(HOLDER)).ok()?;
        (!text.is_empty()).then_some(text)
    }

    /// What is known of a volume.
    pub fn inspect(&self, name: &str) -> Result<Volume, EngineError> {
        check_name(name)?;
        let folder = self.folder(name);
        let read = fs::read(folder.join(ABOUT)).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => EngineError::NoVolume(name.to_owned()),
            _ => failed(name, "read")(error),
        })?;
        let about: About =
            serde_json::from_slice(&read).map_err(|error| failed(name, "read")(error.into()))?;
        let path = folder.join(DISK);
        let metadata = fs::metadata(&path).map_err(failed(name, "read"))?;
        let in_use = match RawDisk::open(&path, Access::ReadWrite) {
            Ok(_) => false,
            Err(DiskError::Locked { .. }) => true,
            Err(error) => return Err(error.into()),
        };
        Ok(Volume {
            name: name.to_owned(),
            created: about.created,
            size: about.size,
            used: metadata.blocks() * 512,
            anonymous: about.anonymous,
            path,
            in_use,
            holder: in_use.then(|| self.holder(name)).flatten(),
        })
    }

    /// All volumes, by name.
    pub fn list(&self) -> Result<Vec<Volume>, EngineError> {
        let mut volumes = Vec::new();
        for name in self.names()? {
            match self.inspect(&name) {
                Ok(volume) => volumes.push(volume),
                // Removed meanwhile.
                Err(EngineError::NoVolume(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(volumes)
    }

    fn names(&self) -> Result<Vec<String>, EngineError> {
        let unreadable = |source| EngineError::host("list the volumes")(source);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            names.extend(
                name.into_string()
                    .ok()
                    .filter(|name| check_name(name).is_ok()),
            );
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Removes a volume that no machine has; gives what the host spent on it.
    pub fn remove(&self, name: &str) -> Result<u64, EngineError> {
        let volume = self.inspect(name)?;
        // Nobody gets it between the look and the end.
        let _held =
            RawDisk::open(&volume.path, Access::ReadWrite).map_err(|error| match error {
                DiskError::Locked { .. } => EngineError::VolumeInUse {
                    name: name.to_owned(),
                    holder: self.holder(name),
                },
                error => error.into(),
            })?;
        let bytes: [u8; 8] = random()?;
        let gone = self
            .root
            .join(format!(".gone-{:016x}", u64::from_le_bytes(bytes)));
        fs::rename(self.folder(name), &gone).map_err(failed(name, "remove"))?;
        fs::remove_dir_all(&gone).map_err(failed(name, "remove"))?;
        Ok(volume.used)
    }

    /// Removes the volumes that no machine has: those that nobody named, or all. Gives their names and
    /// what the host spent on them.
    pub fn prune(&self, all: bool) -> Result<Vec<(String, u64)>, EngineError> {
        self.sweep()?;
        let mut removed = Vec::new();
        for volume in self.list()? {
            if volume.in_use || !(all || volume.anonymous) {
                continue;
            }
            match self.remove(&volume.name) {
                Ok(used) => removed.push((volume.name, used)),
                Err(EngineError::VolumeInUse { .. } | EngineError::NoVolume(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// Removes what processes that were killed left.
    fn sweep(&self) -> Result<(), EngineError> {
        const YOUNG: std::time::Duration = std::time::Duration::from_secs(600);
        let unreadable = |source| EngineError::host("list the volumes")(source);
        for entry in fs::read_dir(&self.root).map_err(unreadable)?.flatten() {
            let left = entry.file_name().as_encoded_bytes().starts_with(b".");
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let old = modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > YOUNG));
            if left && old {
                // Somebody else may be at it too.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(())
    }
}
