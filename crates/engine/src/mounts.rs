//! Folders of the host, volumes and memory file systems that a machine is given besides its root.
//!
//! ```text
//!  configuration (kept with a start):  disks vol0, vol1, …   file systems fs0, fs1, …
//!  attached at each start:             the volumes' files    the host's folders
//!  agent, when the start is kept:      mounts each where it is wanted
//! ```
//! So a start that was kept serves every run with as many folders and volumes, whichever they are.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use skerry_machine::{DiskConfig, MachineConfig, ShareConfig};
use skerry_protocol::message::{BlockDevice, Mount, MountSource};
use skerry_share::{Share, ShareOptions};
use skerry_storage::Disk;

use crate::error::EngineError;
use crate::paths::Paths;
use crate::volumes::{Held, Volumes};

/// The most folders, and the most volumes, of a machine.
pub(crate) const MOST: usize = 16;
/// Permissions of a memory file system's root, as docker has them.
const TMPFS_MODE: u32 = 0o1777;

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum MountKind {
    /// A folder or a file of the host's.
    Bind {
        /// Which.
        #[cfg_attr(feature = "schema", schema(value_type = String))]
        source: PathBuf,
    },
    /// A volume, made where there is none.
    Volume {
        /// Its name; `None`: one of the machine's own, whose name is made up.
        name: Option<String>,
        /// An empty one doesn't get what the image has in its place.
        #[serde(default)]
        no_copy: bool,
    },
    /// Guest memory.
    Tmpfs {
        /// The most bytes; `None`: half of the guest's memory.
        size: Option<u64>,
        /// Permissions of its root.
        mode: Option<u32>,
    },
}

/// A file system that a machine is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MountSpec {
    /// What is mounted.
    pub kind: MountKind,
    /// Where in the guest.
    pub target: String,
    /// The guest may not write.
    #[serde(default)]
    pub read_only: bool,
}

/// A mount that a kept machine has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountAbout {
    /// Where in the guest.
    pub target: String,
    /// The guest may not write.
    pub read_only: bool,
    /// One file alone.
    pub file: bool,
}

impl MountSpec {
    fn check(&self) -> Result<(), EngineError> {
        let path = Path::new(&self.target);
        let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
        let fits = path.is_absolute()
            && path.components().all(plain)
            && path != Path::new("/")
            && !self.target.contains('\0');
        match fits {
            true => Ok(()),
            false => Err(EngineError::MountTarget(self.target.clone())),
        }
    }

    pub(crate) const fn is_bind(&self) -> bool {
        matches!(self.kind, MountKind::Bind { .. })
    }

    pub(crate) const fn is_volume(&self) -> bool {
        matches!(self.kind, MountKind::Volume { .. })
    }
}

fn share_tag(number: usize) -> String {
    format!("fs{number}")
}

fn volume_serial(number: usize) -> String {
    format!("vol{number}")
}

/// The devices for mounts: what a machine's configuration has of them.
pub(crate) fn devices(mounts: &[MountSpec]) -> (Vec<DiskConfig>, Vec<ShareConfig>) {
    let volumes = mounts.iter().filter(|mount| mount.is_volume());
    let disks = volumes.enumerate().map(|(number, mount)| DiskConfig {
        name: volume_serial(number),
        read_only: mount.read_only,
        exchangeable: true,
    });
    let shares = mounts.iter().filter(|mount| mount.is_bind()).count();
    let shares = (0..shares).map(|number| ShareConfig {
        tag: share_tag(number),
    });
    (disks.collect(), shares.collect())
}

/// Whether these are devices that [`devices`] makes, behind the `own` disks of a machine.
pub(crate) fn are_plausible(machine: &MachineConfig, own: usize) -> bool {
    let volumes = machine.disks.get(own..).unwrap_or_default();
    let disk = |(number, disk): (usize, &DiskConfig)| {
        disk.exchangeable && disk.name == volume_serial(number)
    };
    let share = |(number, share): (usize, &ShareConfig)| share.tag == share_tag(number);
    volumes.len() <= MOST
        && machine.shares.len() <= MOST
        && volumes.iter().enumerate().all(disk)
        && machine.shares.iter().enumerate().all(share)
}

/// Gives the volumes of machine `id` that nobody has named the names that they have at its every start.
pub(crate) fn name_volumes(
    paths: &Paths,
    specs: &mut [MountSpec],
    id: &str,
) -> Result<(), EngineError> {
    for spec in specs {
        if let MountKind::Volume {
            name: name @ None, ..
        } = &mut spec.kind
        {
            *name = Some(Volumes::open(paths)?.provide_own(id, &spec.target)?);
        }
    }
    Ok(())
}

/// What mounts come to on the host: opened, and what the agent is to do with it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Opened {
    pub(crate) shares: Vec<Arc<Share>>,
    volumes: Vec<Arc<Held>>,
    /// In the order of mounting.
    requests: Vec<Mount>,
    specs: Vec<MountSpec>,
    /// The guest has them mounted already.
    mounted: bool,
}

impl Opened {
    /// Opens folders and volumes for a new machine.
    pub(crate) fn new(paths: &Paths, specs: &[MountSpec]) -> Result<Self, EngineError> {
        let mut opened = Self {
            specs: specs.to_vec(),
            ..Self::default()
        };
        for (number, spec) in specs.iter().enumerate() {
            spec.check()?;
            let before = specs.get(..number).unwrap_or_default();
            if before.iter().any(|other| other.target == spec.target) {
                return Err(EngineError::MountTwice(spec.target.clone()));
            }
            let source = opened.open(paths, spec)?;
            opened.requests.push(Mount {
                source,
                target: spec.target.clone().into_bytes(),
                read_only: spec.read_only,
            });
        }
        if opened.shares.len() > MOST || opened.volumes.len() > MOST {
            return Err(EngineError::TooManyMounts { most: MOST });
        }
        // What is deeper is mounted into what is above it.
        let depth = |mount: &Mount| mount.target.iter().filter(|byte| **byte == b'/').count();
        opened.requests.sort_by_key(depth);
        Ok(opened)
    }

    /// Opens the folders of a machine that goes on from where it had `mounted` these, or none yet.
    pub(crate) fn again(
        paths: &Paths,
        specs: &[MountSpec],
        mounted: &[MountAbout],
        machine: &MachineConfig,
    ) -> Result<Self, EngineError> {
        if mounted.is_empty() {
            let opened = Self::new(paths, specs)?;
            let (disks, shares) = devices(specs);
            let volumes = machine.disks.iter().filter(|disk| disk.exchangeable);
            return match volumes.eq(&disks) && machine.shares == shares {
                true => Ok(opened),
                false => Err(EngineError::OtherMounts {
                    shares: machine.shares.len(),
                    volumes: machine
                        .disks
                        .iter()
                        .filter(|disk| disk.exchangeable)
                        .count(),
                }),
            };
        }
        let mut opened = Self {
            mounted: true,
            ..Self::default()
        };
        for about in mounted {
            let spec = specs
                .iter()
                .find(|spec| spec.target == about.target && spec.is_bind());
            let spec = spec.ok_or_else(|| EngineError::MountMissing(about.target.clone()))?;
            let read_only = about.read_only || spec.read_only;
            let spec = MountSpec {
                read_only,
                ..spec.clone()
            };
            if let MountSource::Share { file, .. } = opened.open(paths, &spec)?
                && file.is_some() != about.file
            {
                return Err(EngineError::MountMissing(about.target.clone()));
            }
            opened.specs.push(spec);
        }
        let known = |spec: &&MountSpec| !mounted.iter().any(|about| about.target == spec.target);
        match specs.iter().find(known) {
            Some(new) => Err(EngineError::MountNew(new.target.clone())),
            None => Ok(opened),
        }
    }

    fn open(&mut self, paths: &Paths, spec: &MountSpec) -> Result<MountSource, EngineError> {
        Ok(match &spec.kind {
            MountKind::Bind { source } => {
                let (share, file) = open_share(source, spec.read_only)?;
                let tag = share_tag(self.shares.len());
                self.shares.push(share);
                MountSource::Share { tag, file }
            }
            MountKind::Volume { name, no_copy } => {
                let store = Volumes::open(paths)?;
                let held = store.hold(name.as_deref(), spec.read_only)?;
                let serial = volume_serial(self.volumes.len());
                let size = held.disk().size();
                self.volumes.push(Arc::new(held));
                MountSource::Volume {
                    device: BlockDevice::Serial(serial),
                    size,
                    fill: !no_copy,
                }
            }
            MountKind::Tmpfs { size, mode } => MountSource::Tmpfs {
                size: size.unwrap_or(0),
                mode: mode.unwrap_or(TMPFS_MODE),
            },
        })
    }

    /// Notes by which machine the volumes are held.
    pub(crate) fn note_holder(&self, machine: &str) {
        self.volumes
            .iter()
            .for_each(|held| held.note_holder(machine));
    }

    /// The volumes' disks.
    pub(crate) fn disks(&self) -> impl Iterator<Item = Arc<dyn Disk>> + '_ {
        self.volumes
            .iter()
            .map(|held| held.disk().clone() as Arc<dyn Disk>)
    }

    /// What the agent has to be asked for.
    pub(crate) fn requests(&self) -> &[Mount] {
        match self.mounted {
            true => &[],
            false => &self.requests,
        }
    }

    /// Whether the guest goes on with them mounted.
    pub(crate) const fn is_mounted(&self) -> bool {
        self.mounted
    }

    pub(crate) fn has_volumes(&self) -> bool {
        !self.volumes.is_empty()
    }

    /// What was asked for.
    pub(crate) fn specs(&self) -> &[MountSpec] {
        &self.specs
    }

    /// What a state says of the folders that are mounted in it.
    pub(crate) fn about(&self) -> Vec<MountAbout> {
        let binds = self.specs.iter().filter(|spec| spec.is_bind());
        let file = |spec: &MountSpec| match &spec.kind {
            MountKind::Bind { source } => !source.is_dir(),
            _ => false,
        };
        let about = binds.map(|spec| MountAbout {
            target: spec.target.clone(),
            read_only: spec.read_only,
            file: file(spec),
        });
        about.collect()
    }
}

/// Shares a folder; of a file, the folder that it is in, and nothing of that but the file.
fn open_share(
    source: &Path,
    read_only: bool,
) -> Result<(Arc<Share>, Option<Vec<u8>>), EngineError> {
    let failed = |error: io::Error| EngineError::MountSource {
        path: source.to_owned(),
        source: error,
    };
    let source_path = std::fs::canonicalize(source).map_err(failed)?;
    let kind = std::fs::metadata(&source_path).map_err(failed)?;
    if kind.is_dir() {
        let options = ShareOptions {
            read_only,
            only: None,
        };
        return Ok((Share::open(&source_path, options)?, None));
    }
    let (Some(folder), Some(name)) = (source_path.parent(), source_path.file_name()) else {
        return Err(EngineError::MountSpecial(source.to_owned()));
    };
    if !kind.is_file() {
        return Err(EngineError::MountSpecial(source.to_owned()));
    }
    let only = CString::new(name.as_bytes()).map_err(|nul| failed(nul.into()))?;
    let options = ShareOptions {
        read_only,
        only: Some(only),
    };
    Ok((
        Share::open(folder, options)?,
        Some(name.as_bytes().to_vec()),
    ))
}
