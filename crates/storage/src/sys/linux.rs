#![expect(
    unsafe_code,
    reason = "preadv and pwritev on guest memory, which has no Rust reference"
)]
//! Linux: vectored positional I/O, hole punching, locks.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation, MemfdFlags, Mode, OFlags, SealFlags};

/// The most buffers that one system call takes here; the kernel's bound (UIO_MAXIOV) is 1024, and
/// this many fit the stack.
pub(crate) const MAX_IOVECS: usize = 64;

/// A batch of buffers for one call.
pub(crate) struct IoVecs {
    vecs: [libc::iovec; MAX_IOVECS],
    len: usize,
}

impl IoVecs {
    pub(crate) fn new() -> Self {
        const EMPTY: libc::iovec = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        IoVecs {
            vecs: [EMPTY; MAX_IOVECS],
            len: 0,
        }
    }

    /// Adds a buffer; false when there is no room.
    ///
    /// Only [`crate::IoBuf::iovec`] and [`crate::IoBufMut::iovec`] make these.
    pub(crate) fn push(&mut self, vec: libc::iovec) -> bool {
        let Some(slot) = self.vecs.get_mut(self.len) else {
            return false;
        };
        *slot = vec;
        self.len += 1;
        true
    }
}

fn offset_of(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

fn transferred(n: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// One `preadv`: may read less than asked, 0 at the end of the file.
pub(crate) fn preadv(file: &File, vecs: &IoVecs, offset: u64) -> io::Result<usize> {
    let (count, offset) = (vecs.len as libc::c_int, offset_of(offset)?);
    // SAFETY: every vec comes from an IoBufMut that the caller still borrows, so its memory is
    // valid and writable; the kernel writes nothing else.
    transferred(unsafe { libc::preadv(file.as_raw_fd(), vecs.vecs.as_ptr(), count, offset) })
}

/// One `pwritev`: may write less than asked.
pub(crate) fn pwritev(file: &File, vecs: &IoVecs, offset: u64) -> io::Result<usize> {
    let (count, offset) = (vecs.len as libc::c_int, offset_of(offset)?);
    // SAFETY: every vec comes from an IoBuf that the caller still borrows, so its memory is valid
    // to read.
    transferred(unsafe { libc::pwritev(file.as_raw_fd(), vecs.vecs.as_ptr(), count, offset) })
}

/// Makes writes durable without forcing out metadata that doesn't matter for reading them back.
pub(crate) fn sync_data(file: &File) -> io::Result<()> {
    Ok(rustix::io::retry_on_intr(|| rustix::fs::fdatasync(file))?)
}

fn fallocate(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    Ok(rustix::io::retry_on_intr(|| {
        rustix::fs::fallocate(file, flags, offset, len)
    })?)
}

/// Gives the space of a range back to the file system; it reads as zeros afterwards.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(
        file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        offset,
        len,
    )
}

/// Zeros a range and keeps its space.
pub(crate) fn zero_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(
        file,
        FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        offset,
        len,
    )
}

/// Whether an error says that the file system lacks the operation.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL)
    )
}

/// Takes a lock on the open file without waiting; false when somebody else has it.
pub(crate) fn try_lock(file: &File, exclusive: bool) -> io::Result<bool> {
    let operation = if exclusive {
        FlockOperation::NonBlockingLockExclusive
    } else {
        FlockOperation::NonBlockingLockShared
    };
    match rustix::fs::flock(file, operation) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Opens a file of `dir` that has no name, so that it goes away with its last user, however that
/// one ends.
pub(crate) fn unnamed_file(dir: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::EXCL;
    match rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => Ok(fd.into()),
        // File systems without O_TMPFILE (overlayfs before 6.x, NFS, some FUSE).
        Err(error) if is_unsupported(&error.into()) || error == rustix::io::Errno::ISDIR => {
            named_then_unlinked(dir)
        }
        Err(error) => Err(error.into()),
    }
}

/// Makes a file in memory. `name` is what `/proc` shows.
pub(crate) fn memory_file(name: &str) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(rustix::fs::memfd_create(name, flags)?.into())
}

/// Makes a file in memory unchangeable for everyone.
pub(crate) fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    Ok(rustix::fs::fcntl_add_seals(file, seals)?)
}

fn named_then_unlinked(dir: &Path) -> io::Result<File> {
    for attempt in 0..64u32 {
        let path = dir.join(format!(".scratch-{}-{attempt}", std::process::id()));
        match File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
        {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn both_ways_to_an_unnamed_file_leave_no_name() {
        let dir = tempfile::tempdir().unwrap();
        for file in [
            unnamed_file(dir.path()).unwrap(),
            named_then_unlinked(dir.path()).unwrap(),
        ] {
            assert_eq!(file.metadata().unwrap().nlink(), 0);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
