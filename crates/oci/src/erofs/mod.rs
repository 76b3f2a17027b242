//! Writing and reading EROFS, the kernel's read-only file system.
//!
//! The on-disk format is the kernel's `Documentation/filesystems/erofs.rst` and
//! <https://erofs.docs.kernel.org/>; of it we use: 4096-byte blocks, extended inodes, plain and
//! inline ("tail-packed") data, inline extended attributes, and the superblock's checksum.
//! Everything little-endian.
//!
//! ```text
//!  0      1024        1152                       data start
//!  ├ zeros ┼ superblock ┼ inodes, each followed by  ┼ whole blocks of files and directories, ┤
//!  │       │            │ its xattrs and its tail,  │ in the order of their inodes           │
//!  │       │            │ the root first            │                                        │
//! ```
//! A node id ("nid") is the place of the inode in units of 32 bytes.

mod crc32c;
mod layout;
mod reader;
mod writer;
pub(crate) mod xattr;

pub(crate) use reader::check_superblock;
#[doc(hidden)]
pub use reader::{Inode, InodeKind, ReadError, Reader};
pub(crate) use writer::{WriteError, Written, seal_superblock, write};

pub(crate) const BLOCK: u64 = 4096;
pub(crate) const BLOCK_BITS: u8 = 12;
pub(crate) const SUPERBLOCK: usize = 1024;
pub(crate) const SUPERBLOCK_SIZE: usize = 128;
pub(crate) const MAGIC: u32 = 0xe0f5_e1e2;
/// The superblock has a checksum; extended inodes have their own times.
pub(crate) const COMPAT: u32 = COMPAT_CHECKSUM | 2;
pub(crate) const COMPAT_CHECKSUM: u32 = 1;
/// The unit of node ids.
pub(crate) const SLOT: u64 = 32;
pub(crate) const INODE: u64 = 64;
pub(crate) const DIRENT: usize = 12;
/// Data layouts, in `i_format` from bit 1 on.
pub(crate) const FLAT_PLAIN: u16 = 0;
pub(crate) const FLAT_INLINE: u16 = 2;

/// `st_mode` types.
pub(crate) const S_IFMT: u16 = 0o170_000;
pub(crate) const S_IFIFO: u16 = 0o010_000;
pub(crate) const S_IFCHR: u16 = 0o020_000;
pub(crate) const S_IFDIR: u16 = 0o040_000;
pub(crate) const S_IFBLK: u16 = 0o060_000;
pub(crate) const S_IFREG: u16 = 0o100_000;
pub(crate) const S_IFLNK: u16 = 0o120_000;
pub(crate) const S_IFSOCK: u16 = 0o140_000;

#[cfg(test)]
mod tests;
