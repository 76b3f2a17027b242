//! The data of all files of an image, in one unnamed file, until the image is written.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::tar::{Extent, Skip, TarReader};
use crate::tree::FileData;

/// Appends the data of files.
pub(crate) struct SpoolWriter {
    file: BufWriter<File>,
    end: u64,
}

/// Why data could not be spooled.
#[derive(Debug)]
pub(crate) enum SpoolError {
    /// The archive failed, or ended too early.
    Read(io::Error),
    /// The file behind the spool failed.
    Write(io::Error),
}

impl SpoolWriter {
    pub(crate) fn new(dir: &Path) -> io::Result<Self> {
        let file = BufWriter::with_capacity(256 << 10, tempfile::tempfile_in(dir)?);
        Ok(SpoolWriter { file, end: 0 })
    }

    /// Appends the data of the archive's current entry.
    pub(crate) fn append<R: Skip>(
        &mut self,
        reader: &mut TarReader<R>,
        size: u64,
        extents: Option<&[Extent]>,
    ) -> Result<FileData, SpoolError> {
        if size == 0 {
            return Ok(FileData::Empty);
        }
        let offset = self.end;
        match extents {
            None => self.copy(reader, size)?,
            Some(extents) => {
                for extent in extents {
                    self.seek(offset + extent.offset)?;
                    self.copy(reader, extent.len)?;
                }
                self.seek(offset + size)?;
            }
        }
        self.end = offset + size;
        Ok(FileData::Spooled { offset, len: size })
    }

    fn seek(&mut self, to: u64) -> Result<(), SpoolError> {
        self.file
            .seek(SeekFrom::Start(to))
            .map(|_| ())
            .map_err(SpoolError::Write)
    }

    fn copy(&mut self, reader: &mut impl Read, len: u64) -> Result<(), SpoolError> {
        let mut buf = [0; 32 << 10];
        let mut left = len;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
            match reader.read(&mut buf[..most]) {
                Ok(0) => return Err(SpoolError::Read(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => {
                    self.file.write_all(&buf[..n]).map_err(SpoolError::Write)?;
                    left -= n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(SpoolError::Read(error)),
            }
        }
        Ok(())
    }

    pub(crate) fn finish(self) -> io::Result<Spool> {
        let file = self
            .file
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        // A hole at the very end must be readable too.
        file.set_len(self.end)?;
        Ok(Spool {
            file: Some(file),
            host: Vec::new(),
        })
    }
}

/// Gives the data back.
#[derive(Default)]
pub(crate) struct Spool {
    file: Option<File>,
    /// The files behind [`FileData::Host`].
    host: Vec<PathBuf>,
}

/// The data of one file, opened.
pub(crate) enum Opened<'a> {
    Empty,
    Spooled(&'a File, u64),
    Host(File),
}

impl Spool {
    /// Data that stays where it is: in files of the host.
    pub(crate) fn of_host_files(host: Vec<PathBuf>) -> Self {
        Spool { file: None, host }
    }

    /// The name of a host's file, for messages.
    pub(crate) fn host_path(&self, data: &FileData) -> Option<&Path> {
        match data {
            FileData::Host { file, .. } => self.host.get(*file as usize).map(PathBuf::as_path),
            _ => None,
        }
    }

    pub(crate) fn open(&self, data: &FileData) -> io::Result<Opened<'_>> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        Ok(match data {
            FileData::Empty => Opened::Empty,
            FileData::Spooled { offset, .. } => {
                Opened::Spooled(self.file.as_ref().ok_or_else(gone)?, *offset)
            }
            FileData::Host { .. } => {
                let path = self.host_path(data).ok_or_else(gone)?;
                use rustix::fs::{Mode, OFlags};
                // Should it have become a link or a pipe since it was seen, then not that.
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                Opened::Host(rustix::fs::open(path, flags, Mode::empty())?.into())
            }
        })
    }
}

impl Opened<'_> {
    /// Where data comes next, at `offset` or behind it: reading what lies between would only
    /// fill the host's cache with zeros.
    pub(crate) fn next_data(&self, offset: u64) -> u64 {
        let (file, start) = match self {
            Opened::Empty => return offset,
            Opened::Spooled(file, start) => (*file, *start),
            Opened::Host(file) => (file, 0),
        };
        match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(start + offset)) {
            Ok(at) => at.saturating_sub(start).max(offset),
            Err(rustix::io::Errno::NXIO) => u64::MAX,
            // Not every file system can tell.
            Err(_) => offset,
        }
    }

    /// Fills `buf` from `offset` of the file on.
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Opened::Empty if buf.is_empty() => Ok(()),
            Opened::Empty => Err(io::ErrorKind::UnexpectedEof.into()),
            Opened::Spooled(file, start) => file.read_exact_at(buf, start + offset),
            Opened::Host(file) => file.read_exact_at(buf, offset),
        }
    }
}
