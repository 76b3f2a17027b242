//! The trait that block devices are written against.

use crate::{DiskError, IoBuf, IoBufMut};

/// The unit of virtio-blk addresses (virtio 1.3 §5.2.4); every disk is a whole number of these.
pub const SECTOR_SIZE: u64 = 512;

/// What a disk does beyond reading and writing; a device offers its guest no more than this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Abilities {
    /// [`Disk::discard`] gives space back to the host.
    pub discard: bool,
    /// [`Disk::write_zeroes`] is quicker than writing zeros.
    pub fast_zeroes: bool,
}

/// A disk of fixed size, used by several threads at once.
///
/// Each transfer is whole: it moves every byte or fails. After a failed write the range holds any
/// mix of old and new bytes, as on real disks.
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// The name used in messages: usually the path.
    fn name(&self) -> &str;

    /// The size in bytes: a multiple of [`SECTOR_SIZE`], never 0.
    fn size(&self) -> u64;

    /// Whether changes are refused.
    fn is_read_only(&self) -> bool;

    /// What this disk does beyond reading and writing.
    fn abilities(&self) -> Abilities;

    /// Fills `bufs` in order with the bytes from `offset` on, and marks the memory as dirty.
    fn read_vectored_at(&self, bufs: &[IoBufMut<'_>], offset: u64) -> Result<(), DiskError>;

    /// Stores the bytes of `bufs` in order from `offset` on.
    fn write_vectored_at(&self, bufs: &[IoBuf<'_>], offset: u64) -> Result<(), DiskError>;

    /// Returns once all writes that completed before the call would survive a loss of power.
    fn flush(&self) -> Result<(), DiskError>;

    /// Lets go of the content of a range; what is read there afterwards is unspecified old data
    /// or zeros.
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError>;

    /// Makes a range read as zeros; with `unmap` its space may be given back to the host.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError>;

    /// Fills one slice from `offset` on.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.read_vectored_at(&[IoBufMut::from(buf)], offset)
    }

    /// Stores one slice from `offset` on.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        self.write_vectored_at(&[IoBuf::from(buf)], offset)
    }
}

/// Refuses a range that leaves a disk of `size` bytes.
pub fn check_range(disk: &str, offset: u64, len: u64, size: u64) -> Result<(), DiskError> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(DiskError::OutOfRange {
            disk: disk.to_owned(),
            offset,
            len,
            size,
        }),
    }
}
