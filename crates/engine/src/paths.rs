//! Where Skerry keeps things on the host.

use std::env;
use std::path::{Path, PathBuf};

use crate::error::EngineError;

/// The folders of one user's Skerry.
#[derive(Clone, Debug)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// The user's own: `$XDG_DATA_HOME/skerry`, or `~/.local/share/skerry`.
    pub fn of_user() -> Result<Self, EngineError> {
        let absolute = |name| {
            env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let data = absolute("XDG_DATA_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
            .ok_or(EngineError::NoHome)?;
        Ok(Self::at(data.join("skerry")))
    }

    /// Everything below `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The image store.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// Unlinked files of running machines (their writable disks).
    pub fn scratch(&self) -> PathBuf {
        self.root.join("scratch")
    }

    /// Snapshots, those of started images among them.
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// A folder for each virtual machine.
    pub fn vms(&self) -> PathBuf {
        self.root.join("vms")
    }

    /// A folder for each network that machines share.
    pub fn networks(&self) -> PathBuf {
        self.root.join("networks")
    }

    /// A folder for each pool.
    pub fn pools(&self) -> PathBuf {
        self.root.join("pools")
    }

    /// A folder for each named volume.
    pub fn volumes(&self) -> PathBuf {
        self.root.join("volumes")
    }

    /// The folder that everything is in.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes a folder and its parents, private to the user.
    pub fn ensure(path: &Path) -> Result<(), EngineError> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|source| EngineError::Folder {
                path: path.to_owned(),
                source,
            })
    }
}
