//! A directory of the host as a root file system (`dir:ROOTFS`).
//!
//! Other file systems mounted below it show as empty directories, so that `dir:/` doesn't read
//! `/proc`.

use std::collections::HashMap;
use std::fs::Metadata as HostMetadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{lgetxattr, llistxattr, major, minor};
use rustix::io::Errno;

use crate::Error;
use crate::layer::{LayerError, keep_xattrs};
use crate::spool::Spool;
use crate::tar::Time;
use crate::tree::{FileData, Kind, Metadata, Tree, Xattrs};

/// Linux bounds both the list of names and each value to this (XATTR_LIST_MAX, XATTR_SIZE_MAX).
const XATTR_MAX: usize = 64 << 10;

struct Walk<'a> {
    root: &'a Path,
    device: u64,
    tree: Tree,
    files: Vec<PathBuf>,
    /// Names already seen of what has several.
    links: HashMap<u64, Vec<u8>>,
    buf: Vec<u8>,
}

/// Reads the names and metadata below `root`; the data stays in the files.
pub(crate) fn read(root: &Path) -> Result<(Tree, Spool), Error> {
    let source = |source| Error::Source {
        image: format!("dir:{}", root.display()),
        path: root.to_owned(),
        source,
    };
    let metadata = std::fs::metadata(root).map_err(source)?;
    if !metadata.is_dir() {
        return Err(source(io::ErrorKind::NotADirectory.into()));
    }
    let mut walk = Walk {
        root,
        device: metadata.dev(),
        tree: Tree::new(),
        files: Vec::new(),
        links: HashMap::new(),
        buf: vec![0; XATTR_MAX],
    };
    walk.tree.begin_layer();
    let mut todo = vec![PathBuf::new()];
    while let Some(dir) = todo.pop() {
        walk.directory(&dir, &mut todo)?;
    }
    Ok((walk.tree, Spool::of_host_files(walk.files)))
}

impl Walk<'_> {
    fn failed(&self, path: &Path, source: impl Into<io::Error>) -> Error {
        let source = source.into();
        Error::HostTree {
            root: self.root.to_owned(),
            path: path.to_owned(),
            source,
        }
    }

    fn directory(&mut self, dir: &Path, todo: &mut Vec<PathBuf>) -> Result<(), Error> {
        let host = self.root.join(dir);
        let metadata = if dir.as_os_str().is_empty() {
            std::fs::metadata(&host)
        } else {
            std::fs::symlink_metadata(&host)
        };
        let metadata = metadata.map_err(|error| self.failed(&host, error))?;
        let meta = self.metadata(&host, &metadata)?;
        let path = dir.as_os_str().as_bytes();
        let path = if path.is_empty() { b"/" } else { path };
        self.tree
            .put_directory(path, meta)
            .map_err(|e| self.failed(&host, io::Error::other(e)))?;
        if metadata.dev() != self.device {
            return Ok(());
        }
        for entry in std::fs::read_dir(&host).map_err(|error| self.failed(&host, error))? {
            let entry = entry.map_err(|error| self.failed(&host, error))?;
            let path = dir.join(entry.file_name());
            let host = self.root.join(&path);
            let metadata = entry
                .metadata()
                .map_err(|error| self.failed(&host, error))?;
            if metadata.is_dir() {
                todo.push(path);
            } else {
                self.other(&path, &host, &metadata)?;
            }
        }
        Ok(())
    }

    fn other(&mut self, path: &Path, host: &Path, metadata: &HostMetadata) -> Result<(), Error> {
        let bytes = path.as_os_str().as_bytes();
        if metadata.nlink() > 1 {
            if let Some(first) = self.links.get(&metadata.ino()) {
                let linked = self.tree.link(bytes, first);
                return linked.map_err(|error| self.failed(host, io::Error::other(error)));
            }
            self.links.insert(metadata.ino(), bytes.to_vec());
        }
        let kind = metadata.file_type();
        let device = || (major(metadata.rdev()), minor(metadata.rdev()));
        let kind = if kind.is_file() {
            Kind::File(self.file(host, metadata.len()))
        } else if kind.is_symlink() {
            let target = std::fs::read_link(host).map_err(|error| self.failed(host, error))?;
            Kind::Symlink(target.as_os_str().as_bytes().into())
        } else if kind.is_char_device() {
            let (major, minor) = device();
            Kind::CharDevice { major, minor }
        } else if kind.is_block_device() {
            let (major, minor) = device();
            Kind::BlockDevice { major, minor }
        } else if kind.is_fifo() {
            Kind::Fifo
        } else {
            Kind::Socket
        };
        let meta = self.metadata(host, metadata)?;
        self.tree
            .put(bytes, meta, kind)
            .map_err(|e| self.failed(host, io::Error::other(e)))
    }

    fn file(&mut self, host: &Path, len: u64) -> FileData {
        match u32::try_from(self.files.len()) {
            Ok(file) if len > 0 => {
                self.files.push(host.to_owned());
                FileData::Host { file, len }
            }
            _ => FileData::Empty,
        }
    }

    fn metadata(&mut self, host: &Path, metadata: &HostMetadata) -> Result<Metadata, Error> {
        Ok(Metadata {
            mode: (metadata.mode() & 0o7777) as u16,
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime: Time {
                seconds: metadata.mtime(),
                nanoseconds: metadata.mtime_nsec() as u32,
            },
            xattrs: self.xattrs(host)?,
        })
    }

    fn xattrs(&mut self, host: &Path) -> Result<Xattrs, Error> {
        let names = match llistxattr(host, &mut self.buf[..]) {
            Ok(len) => self.buf[..len].to_vec(),
            Err(Errno::NOTSUP) => return Ok(Xattrs::new()),
            Err(error) => return Err(self.failed(host, error)),
        };
        let mut xattrs = Vec::new();
        for name in names.split(|b| *b == 0).filter(|name| !name.is_empty()) {
            match lgetxattr(host, name, &mut self.buf[..]) {
                Ok(len) => xattrs.push((name.to_vec(), self.buf[..len].to_vec())),
                // Gone since it was listed, or none of our business.
                Err(Errno::NODATA | Errno::NOTSUP | Errno::PERM | Errno::ACCESS) => {}
                Err(error) => return Err(self.failed(host, error)),
            }
        }
        let kept = keep_xattrs(host.as_os_str().as_bytes(), xattrs);
        kept.map_err(|error: LayerError| self.failed(host, io::Error::other(error)))
    }
}
