//! Whole transfers between a list of buffers and files.

use std::fs::File;
use std::io;

use crate::sys::{self, IoVecs};
use crate::{DiskError, IoBuf, IoBufMut, Operation};

/// What the two kinds of buffers have in common.
pub(crate) trait Buffer {
    fn size(&self) -> usize;
    fn vec_from(&self, skip: usize) -> libc::iovec;
}

impl Buffer for IoBuf<'_> {
    fn size(&self) -> usize {
        self.len()
    }

    fn vec_from(&self, skip: usize) -> libc::iovec {
        self.iovec(skip)
    }
}

impl Buffer for IoBufMut<'_> {
    fn size(&self) -> usize {
        self.len()
    }

    fn vec_from(&self, skip: usize) -> libc::iovec {
        self.iovec(skip)
    }
}

/// The bytes in a list of buffers.
pub(crate) fn total<B: Buffer>(bufs: &[B]) -> u64 {
    bufs.iter()
        .fold(0, |sum, buf| sum.saturating_add(buf.size() as u64))
}

/// Where a transfer stopped, and why; [`io::ErrorKind::UnexpectedEof`] is the end of the file.
pub(crate) struct Stopped {
    pub(crate) offset: u64,
    pub(crate) source: io::Error,
}

impl Stopped {
    /// The same as the error of a disk.
    pub(crate) fn on(self, disk: &str, operation: Operation) -> DiskError {
        let Stopped { offset, source } = self;
        let disk = disk.to_owned();
        match (source.kind(), source.raw_os_error()) {
            (io::ErrorKind::UnexpectedEof, None) => DiskError::Shrunk { disk, offset },
            (_, Some(libc::ENOSPC | libc::EDQUOT)) => DiskError::HostFull { disk, source },
            _ => DiskError::Io {
                disk,
                operation,
                offset,
                source,
            },
        }
    }
}

/// Where a transfer over several buffers stands.
pub(crate) struct Cursor<'b, B> {
    bufs: &'b [B],
    /// How much of the first of them is done.
    within: usize,
}

impl<'b, B: Buffer> Cursor<'b, B> {
    pub(crate) fn new(bufs: &'b [B]) -> Self {
        Cursor { bufs, within: 0 }
    }

    /// What comes next, `limit` bytes at most, for one call.
    fn batch(&self, limit: u64) -> IoVecs {
        let mut vecs = IoVecs::new();
        let mut skip = self.within;
        let mut left = usize::try_from(limit).unwrap_or(usize::MAX);
        for buf in self.bufs {
            let mut vec = buf.vec_from(skip);
            vec.iov_len = vec.iov_len.min(left);
            skip = 0;
            if left == 0 || (vec.iov_len > 0 && !vecs.push(vec)) {
                break;
            }
            left -= vec.iov_len;
        }
        vecs
    }

    fn advance(&mut self, mut n: usize) {
        while let Some((first, rest)) = self.bufs.split_first() {
            let left = first.size() - self.within;
            if n < left {
                self.within += n;
                return;
            }
            n -= left;
            (self.bufs, self.within) = (rest, 0);
        }
    }

    fn run(
        &mut self,
        offset: u64,
        len: u64,
        at_end: io::ErrorKind,
        call: impl Fn(&IoVecs, u64) -> io::Result<usize>,
    ) -> Result<(), Stopped> {
        let mut done = 0;
        while done < len {
            let offset = offset + done;
            match call(&self.batch(len - done), offset) {
                Ok(0) => {
                    let source = at_end.into();
                    return Err(Stopped { offset, source });
                }
                Ok(n) => {
                    self.advance(n);
                    done += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Stopped { offset, source }),
            }
        }
        Ok(())
    }
}

impl Cursor<'_, IoBufMut<'_>> {
    /// Fills the next `len` bytes of the buffers from a file.
    pub(crate) fn read(&mut self, file: &File, offset: u64, len: u64) -> Result<(), Stopped> {
        self.run(offset, len, io::ErrorKind::UnexpectedEof, |vecs, offset| {
            sys::preadv(file, vecs, offset)
        })
    }

    /// Fills the next `len` bytes of the buffers with zeros.
    pub(crate) fn zero(&mut self, mut len: u64) {
        while let Some(first) = self.bufs.first().filter(|_| len > 0) {
            let n = (ZEROS.len() as u64).min(len) as usize;
            let n = first.copy_from(self.within, &ZEROS[..n]);
            self.advance(n);
            len -= n as u64;
        }
    }
}

impl Cursor<'_, IoBuf<'_>> {
    /// Writes the next `len` bytes of the buffers to a file.
    pub(crate) fn write(&mut self, file: &File, offset: u64, len: u64) -> Result<(), Stopped> {
        self.run(offset, len, io::ErrorKind::WriteZero, |vecs, offset| {
            sys::pwritev(file, vecs, offset)
        })
    }
}

/// Zeros to copy from.
pub(crate) static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Fills buffers from a file, from `offset` on; returns how many bytes, fewer than there is room for
/// only at the end of the file.
pub fn read_file(file: &File, bufs: &[IoBufMut<'_>], offset: u64) -> io::Result<usize> {
    let read = until(bufs, offset, |vecs, offset| sys::preadv(file, vecs, offset));
    let mut left = *read.as_ref().unwrap_or(&0);
    for buf in bufs {
        let filled = left.min(buf.len());
        buf.mark_dirty(0, filled);
        left -= filled;
    }
    read
}

/// Writes buffers to a file, from `offset` on; returns how many bytes, all unless the file system
/// takes no more.
pub fn write_file(file: &File, bufs: &[IoBuf<'_>], offset: u64) -> io::Result<usize> {
    until(bufs, offset, |vecs, offset| {
        sys::pwritev(file, vecs, offset)
    })
}

/// Moves bytes until there are no more; an error counts only where nothing was moved.
fn until<B: Buffer>(
    bufs: &[B],
    offset: u64,
    call: impl Fn(&IoVecs, u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut cursor = Cursor::new(bufs);
    let (len, mut done) = (total(bufs), 0);
    while done < len {
        match call(&cursor.batch(len - done), offset.saturating_add(done)) {
            Ok(0) => break,
            Ok(n) => {
                cursor.advance(n);
                done += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) if done > 0 => break,
            Err(error) => return Err(error),
        }
    }
    // No more than the buffers hold.
    Ok(done as usize)
}
