//! A disk that is the bytes of a file or of a block device.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use crate::sys;
use crate::transfer::{Cursor, Stopped, ZEROS, total};
use crate::{Abilities, Disk, DiskError, IoBuf, IoBufMut, Operation, SECTOR_SIZE, check_range};

/// How a disk is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only reading; any number of virtual machines may share it.
    ReadOnly,
    /// Reading and writing, by one virtual machine alone.
    ReadWrite,
}

/// A raw disk: sector n is at byte 512·n of the file.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    name: String,
    size: u64,
    access: Access,
    abilities: Abilities,
}

impl RawDisk {
    /// Opens the file or block device at `path`.
    ///
    /// The file is locked (`flock`) as long as the disk lives, shared for reading and exclusive
    /// for writing, so that no two virtual machines can damage it.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self, DiskError> {
        let path = path.as_ref();
        let write = access == Access::ReadWrite;
        let failed = |source| DiskError::Open {
            path: path.to_owned(),
            write,
            source,
        };
        // Looked at before it is opened: opening a pipe would wait for its other end.
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let kind = match () {
                () if kind.is_dir() => "a directory",
                () if kind.is_fifo() => "a pipe",
                () if kind.is_socket() => "a socket",
                () => "a character device",
            };
            return Err(DiskError::NotADisk {
                path: path.to_owned(),
                kind,
            });
        }
        let mut file = File::options()
            .read(true)
            .write(write)
            .open(path)
            .map_err(failed)?;
        if !sys::try_lock(&file, write).map_err(failed)? {
            return Err(DiskError::Locked {
                path: path.to_owned(),
                write,
            });
        }
        // A block device has length 0 in its metadata; the end of its offsets is its size.
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if len == 0 {
            return Err(DiskError::Empty {
                path: path.to_owned(),
            });
        }
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(DiskError::UnalignedSize {
                path: path.to_owned(),
                len,
            });
        }
        Ok(RawDisk::from_file(
            file,
            path.display().to_string(),
            len,
            access,
        ))
    }

    /// A disk over a file that is already open (and locked, or unnamed).
    pub(crate) fn from_file(file: File, name: String, size: u64, access: Access) -> Self {
        let mut abilities = Abilities::default();
        if access == Access::ReadWrite {
            // A hole past the end changes nothing, and says whether the file system has holes.
            // Block devices refuse ranges past their end whatever they can do; so for these
            // nothing is promised.
            abilities.discard = sys::punch_hole(&file, size, SECTOR_SIZE).is_ok();
            abilities.fast_zeroes = abilities.discard;
        }
        RawDisk {
            file,
            name,
            size,
            access,
            abilities,
        }
    }

    /// The file, for saving it while nobody writes.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn check(&self, operation: Operation, offset: u64, len: u64) -> Result<(), DiskError> {
        if operation != Operation::Read && self.access == Access::ReadOnly {
            return Err(DiskError::ReadOnly {
                disk: self.name.clone(),
                operation,
            });
        }
        check_range(&self.name, offset, len, self.size)
    }

    fn failed(&self, operation: Operation, offset: u64, source: io::Error) -> DiskError {
        Stopped { offset, source }.on(&self.name, operation)
    }

    fn write_zeros_by_hand(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let mut done = 0;
        while done < len {
            // At most 64 KiB, so it fits a usize.
            let part = (len - done).min(ZEROS.len() as u64) as usize;
            self.write_at(&ZEROS[..part], offset + done)?;
            done += part as u64;
        }
        Ok(())
    }
}

impl Disk for RawDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    fn abilities(&self) -> Abilities {
        self.abilities
    }

    fn read_vectored_at(&self, bufs: &[IoBufMut<'_>], offset: u64) -> Result<(), DiskError> {
        let len = total(bufs);
        self.check(Operation::Read, offset, len)?;
        let result = Cursor::new(bufs).read(&self.file, offset, len);
        // Marked after the bytes are there, so that who harvests the log doesn't miss them, and
        // whatever the result: a failed read may have filled a part.
        bufs.iter().for_each(|buf| buf.mark_dirty(0, buf.len()));
        result.map_err(|stopped| stopped.on(&self.name, Operation::Read))
    }

    fn write_vectored_at(&self, bufs: &[IoBuf<'_>], offset: u64) -> Result<(), DiskError> {
        let len = total(bufs);
        self.check(Operation::Write, offset, len)?;
        let result = Cursor::new(bufs).write(&self.file, offset, len);
        result.map_err(|stopped| stopped.on(&self.name, Operation::Write))
    }

    fn flush(&self) -> Result<(), DiskError> {
        match self.access {
            Access::ReadOnly => Ok(()),
            Access::ReadWrite => {
                sys::sync_data(&self.file).map_err(|error| self.failed(Operation::Flush, 0, error))
            }
        }
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check(Operation::Discard, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        match sys::punch_hole(&self.file, offset, len) {
            Ok(()) => Ok(()),
            Err(error) if sys::is_unsupported(&error) => Err(DiskError::Unsupported {
                disk: self.name.clone(),
                operation: Operation::Discard,
            }),
            Err(error) => Err(self.failed(Operation::Discard, offset, error)),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.check(Operation::WriteZeroes, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let quick = if unmap {
            sys::punch_hole(&self.file, offset, len)
        } else {
            sys::zero_range(&self.file, offset, len)
        };
        match quick {
            Ok(()) => Ok(()),
            Err(error) if sys::is_unsupported(&error) => self.write_zeros_by_hand(offset, len),
            Err(error) => Err(self.failed(Operation::WriteZeroes, offset, error)),
        }
    }
}

#[cfg(test)]
mod tests;
