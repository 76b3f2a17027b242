//! The files of a snapshot, opened without following symbolic links and read within bounds.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use skerry_oci::Hasher;

use crate::Error;
use crate::manifest::{self, Descriptor};
use crate::pages::{FOOTER_BYTES, Footer, PAGE_SIZE, PageImage, Table};
use crate::seal::Stamp;

/// An open directory in OCI image layout.
pub(crate) struct Layout {
    /// What the snapshot is called in errors.
    pub(crate) label: String,
    pub(crate) path: PathBuf,
    pub(crate) dir: File,
    blobs: File,
}

/// An open blob of the size that the manifest says.
pub(crate) struct Blob<'a> {
    pub(crate) file: File,
    layout: &'a Layout,
    part: String,
    descriptor: &'a Descriptor,
}

fn open_in(dir: &File, name: &str, flags: OFlags) -> Result<File, Errno> {
    // NONBLOCK: opening a FIFO would wait for its other end.
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    openat(dir, name, flags, Mode::empty()).map(File::from)
}

impl Layout {
    /// Opens the directories; `label` is what errors call the snapshot.
    pub(crate) fn open(path: &Path, label: String) -> Result<Self, Error> {
        let dir = match File::open(path) {
            Ok(dir) => dir,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NoSuchSnapshot { name: label });
            }
            Err(error) => return Err(Error::io("open", path, error)),
        };
        let mut blobs = None;
        for name in ["blobs", "sha256"] {
            let parent = blobs.as_ref().unwrap_or(&dir);
            blobs = match open_in(parent, name, OFlags::DIRECTORY) {
                Ok(inner) => Some(inner),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => None,
                Err(error) => return Err(Error::io("open", &path.join(name), error)),
            };
            if blobs.is_none() {
                let part = format!("directory '{name}'");
                return Err(Error::Missing {
                    snapshot: label,
                    part,
                });
            }
        }
        let blobs = blobs.unwrap_or_else(|| unreachable!("the loop ran twice"));
        Ok(Layout {
            label,
            path: path.to_owned(),
            dir,
            blobs,
        })
    }

    fn open_file(&self, dir: &File, name: &str, part: &str) -> Result<(File, u64), Error> {
        let (snapshot, part) = (self.label.clone(), part.to_owned());
        let file = match open_in(dir, name, OFlags::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Err(Error::Missing { snapshot, part }),
            Err(Errno::LOOP | Errno::NXIO) => return Err(Error::NotAFile { snapshot, part }),
            Err(error) => return Err(Error::io("open", &self.path.join(name), error)),
        };
        let metadata = file.metadata();
        let metadata = metadata.map_err(|e| Error::io("read", &self.path.join(name), e))?;
        if !metadata.is_file() {
            return Err(Error::NotAFile { snapshot, part });
        }
        Ok((file, metadata.size()))
    }

    /// Reads a short file that no digest covers.
    pub(crate) fn document(&self, name: &str) -> Result<Vec<u8>, Error> {
        let (file, size) = self.open_file(&self.dir, name, name)?;
        self.check_limit(name, size, manifest::DOCUMENT_MAX)?;
        self.read(&file, name, 0, size)
    }

    /// Opens a blob, and checks its size.
    pub(crate) fn blob<'a>(
        &'a self,
        part: &str,
        descriptor: &'a Descriptor,
    ) -> Result<Blob<'a>, Error> {
        let hex = descriptor.digest.hex();
        let part = format!("{part} (blob {})", &hex[..16]);
        let (file, found) = self.open_file(&self.blobs, &hex, &part)?;
        if found != descriptor.size {
            return Err(Error::Size {
                snapshot: self.label.clone(),
                part,
                found,
                expected: descriptor.size,
            });
        }
        Ok(Blob {
            file,
            layout: self,
            part,
            descriptor,
        })
    }

    /// Where a blob is.
    pub(crate) fn blob_path(&self, descriptor: &Descriptor) -> PathBuf {
        blob_path(&self.path, descriptor)
    }

    fn check_limit(&self, part: &str, size: u64, limit: u64) -> Result<(), Error> {
        if size <= limit {
            return Ok(());
        }
        Err(Error::TooLarge {
            snapshot: self.label.clone(),
            part: part.to_owned(),
            size,
            limit,
        })
    }

    fn read(&self, file: &File, part: &str, at: u64, len: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; len as usize];
        match file.read_exact_at(&mut bytes, at) {
            Ok(()) => Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(self.changed(part)),
            Err(error) => Err(Error::io("read", &self.path, error)),
        }
    }

    fn changed(&self, part: &str) -> Error {
        Error::Digest {
            snapshot: self.label.clone(),
            part: part.to_owned(),
        }
    }
}

/// Where the blob of a snapshot is.
pub(crate) fn blob_path(snapshot: &Path, descriptor: &Descriptor) -> PathBuf {
    snapshot.join("blobs/sha256").join(descriptor.digest.hex())
}

impl Blob<'_> {
    /// The whole content, checked.
    pub(crate) fn bytes(&self, limit: u64) -> Result<Vec<u8>, Error> {
        self.layout
            .check_limit(&self.part, self.descriptor.size, limit)?;
        let bytes = self
            .layout
            .read(&self.file, &self.part, 0, self.descriptor.size)?;
        match crate::Digest::of(&bytes) == self.descriptor.digest {
            true => Ok(bytes),
            false => Err(self.layout.changed(&self.part)),
        }
    }

    /// What the file system says of the file.
    pub(crate) fn stamp(&self) -> Result<Stamp, Error> {
        Stamp::of(&self.file).map_err(|error| Error::io("read", &self.layout.path, error))
    }

    /// Reads everything and compares its digest.
    pub(crate) fn verify(&self) -> Result<(), Error> {
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; 256 << 10];
        let mut at = 0;
        while at < self.descriptor.size {
            match self.file.read_at(&mut buffer, at) {
                Ok(0) => break,
                Ok(n) => {
                    hasher.update(&buffer[..n]);
                    at += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("read", &self.layout.path, error)),
            }
        }
        match at == self.descriptor.size && hasher.finish() == self.descriptor.digest {
            true => Ok(()),
            false => Err(self.layout.changed(&self.part)),
        }
    }

    /// Reads the table of a page image, and checks it against its own digest.
    pub(crate) fn into_pages(self) -> Result<PageImage, Error> {
        let refused = |source| Error::Pages {
            snapshot: self.layout.label.clone(),
            part: self.part.clone(),
            source,
        };
        let size = self.descriptor.size;
        let Some(at) = size.checked_sub(FOOTER_BYTES) else {
            return Err(refused(crate::PagesError::Magic));
        };
        let mut footer = [0; FOOTER_BYTES as usize];
        let read = self.file.read_exact_at(&mut footer, at);
        read.map_err(|_| self.layout.changed(&self.part))?;
        let footer = Footer::decode(&footer, size).map_err(refused)?;
        let at = footer.data_pages * PAGE_SIZE;
        let table = self
            .layout
            .read(&self.file, &self.part, at, footer.table_bytes())?;
        if self.descriptor.table() != Some(crate::Digest::of(&table)) {
            return Err(self
                .layout
                .changed(&format!("page table of its {}", self.part)));
        }
        let Table { runs, zeros } = footer.table(&table).map_err(refused)?;
        Ok(PageImage {
            runs,
            zeros,
            size: footer.size,
            content: footer.content,
            file: self.file,
        })
    }

    /// A page image that belongs to a configuration.
    pub(crate) fn part(&self) -> &str {
        &self.part
    }
}
