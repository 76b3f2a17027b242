//! Reads images of the kind that the writer makes: to check a store's entries, and as the other
//! half of the tests. It trusts nothing: every offset is looked at before it is used.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{
    BLOCK, BLOCK_BITS, COMPAT_CHECKSUM, DIRENT, FLAT_INLINE, FLAT_PLAIN, INODE, MAGIC, S_IFBLK,
    S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK, SLOT, SUPERBLOCK,
    crc32c::crc32c, xattr,
};
use crate::tree::Xattrs;

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The file could not be read, or ends too early.
    #[error("The image can't be read")]
    Io(#[from] io::Error),
    /// It isn't a file system of the kind expected.
    #[error("The image is damaged: {0}")]
    Damaged(&'static str),
}

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the types of stat(2)")]
pub enum InodeKind {
    File,
    Directory,
    Symlink,
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
    Socket,
}

/// One inode.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields of stat(2)")]
pub struct Inode {
    pub nid: u64,
    pub kind: InodeKind,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub links: u32,
    pub size: u64,
    pub mtime: (i64, u32),
    pub xattrs: Xattrs,
    layout: u16,
    block: u32,
    tail_at: u64,
}

/// An image opened for reading.
pub struct Reader<'a> {
    file: &'a File,
    root: u64,
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u16::from_le_bytes)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

/// Checks the first block's checksum; returns it and the size that it states.
fn first_block(file: &File) -> Result<(Vec<u8>, u64), ReadError> {
    let mut block = vec![0; BLOCK as usize];
    file.read_exact_at(&mut block, 0)?;
    let superblock = block.get(SUPERBLOCK..).unwrap_or(&[]);
    if le32(superblock, 0) != MAGIC || superblock.get(12) != Some(&BLOCK_BITS) {
        return Err(ReadError::Damaged("no superblock"));
    }
    if le32(superblock, 8) & COMPAT_CHECKSUM == 0 || le32(superblock, 80) != 0 {
        return Err(ReadError::Damaged("unexpected features"));
    }
    let sum = le32(superblock, 4);
    let mut covered = superblock.to_vec();
    covered[4..8].fill(0);
    if crc32c(&covered) != sum {
        return Err(ReadError::Damaged("the superblock's checksum is wrong"));
    }
    let size = u64::from(le32(superblock, 36)) * BLOCK;
    Ok((block, size))
}

/// Whether a file starts as an image should and has the length that it states.
pub(crate) fn check_superblock(file: &File) -> Result<(), ReadError> {
    let (_, size) = first_block(file)?;
    match file.metadata()?.len() {
        len if len == size => Ok(()),
        _ => Err(ReadError::Damaged("the size is wrong")),
    }
}

impl<'a> Reader<'a> {
    /// Opens an image.
    pub fn new(file: &'a File) -> Result<Self, ReadError> {
        let (block, _) = first_block(file)?;
        Ok(Reader {
            file,
            root: u64::from(le16(&block, SUPERBLOCK + 14)),
        })
    }

    /// The root directory.
    pub fn root(&self) -> Result<Inode, ReadError> {
        self.inode(self.root)
    }

    /// The inode with a node id.
    pub fn inode(&self, nid: u64) -> Result<Inode, ReadError> {
        let at = nid
            .checked_mul(SLOT)
            .ok_or(ReadError::Damaged("a node id is out of range"))?;
        let mut bytes = [0; INODE as usize];
        self.file.read_exact_at(&mut bytes, at)?;
        let format = le16(&bytes, 0);
        let layout = format >> 1;
        if format & 1 == 0 || !matches!(layout, FLAT_PLAIN | FLAT_INLINE) {
            return Err(ReadError::Damaged("an inode is of an unexpected form"));
        }
        let mut xattrs = vec![0; xattr::len_of(le16(&bytes, 2))];
        let xattrs_at = at.saturating_add(INODE);
        self.file.read_exact_at(&mut xattrs, xattrs_at)?;
        let (mode, place) = (le16(&bytes, 4), le32(&bytes, 16));
        let device = (place >> 8 & 0xfff, place & 0xff | place >> 12 & 0xf_ff00);
        let kind = match mode & S_IFMT {
            S_IFREG => InodeKind::File,
            S_IFDIR => InodeKind::Directory,
            S_IFLNK => InodeKind::Symlink,
            S_IFCHR => InodeKind::CharDevice {
                major: device.0,
                minor: device.1,
            },
            S_IFBLK => InodeKind::BlockDevice {
                major: device.0,
                minor: device.1,
            },
            S_IFIFO => InodeKind::Fifo,
            S_IFSOCK => InodeKind::Socket,
            _ => return Err(ReadError::Damaged("an inode has no type")),
        };
        Ok(Inode {
            nid,
            kind,
            mode: mode & !S_IFMT,
            size: le64(&bytes, 8),
            uid: le32(&bytes, 24),
            gid: le32(&bytes, 28),
            mtime: (le64(&bytes, 32).cast_signed(), le32(&bytes, 40)),
            links: le32(&bytes, 44),
            tail_at: xattrs_at.saturating_add(xattrs.len() as u64),
            xattrs: xattr::decode(&xattrs).ok_or(ReadError::Damaged("attributes of an inode"))?,
            layout,
            block: place,
        })
    }

    /// Fills `buf` with a file's data from `offset` on, which must be there.
    pub fn read_at(&self, inode: &Inode, buf: &mut [u8], offset: u64) -> Result<(), ReadError> {
        let damaged = ReadError::Damaged("data outside of a file");
        let end = offset
            .checked_add(buf.len() as u64)
            .filter(|end| *end <= inode.size);
        let Some(_) = end else { return Err(damaged) };
        let whole = match inode.layout {
            FLAT_INLINE => inode.size - inode.size % BLOCK,
            _ => inode.size,
        };
        let from_blocks = whole.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (blocks, tail) = buf.split_at_mut(from_blocks);
        let start = u64::from(inode.block) * BLOCK;
        if !blocks.is_empty() {
            let at = start.checked_add(offset).ok_or(damaged)?;
            self.file.read_exact_at(blocks, at)?;
        }
        if !tail.is_empty() {
            let within = (offset + from_blocks as u64) - whole;
            self.file
                .read_exact_at(tail, inode.tail_at.saturating_add(within))?;
        }
        Ok(())
    }

    /// All of a file's data; refused above `most` bytes.
    pub fn read(&self, inode: &Inode, most: u64) -> Result<Vec<u8>, ReadError> {
        let len = usize::try_from(inode.size)
            .ok()
            .filter(|_| inode.size <= most);
        let mut bytes = vec![0; len.ok_or(ReadError::Damaged("a file is too large"))?];
        self.read_at(inode, &mut bytes, 0)?;
        Ok(bytes)
    }

    /// The names of a directory, with their node ids, in stored order.
    pub fn names(&self, dir: &Inode) -> Result<Vec<(Vec<u8>, u64)>, ReadError> {
        const DAMAGED: ReadError = ReadError::Damaged("a directory block");
        let bytes = self.read(dir, 1 << 30)?;
        let mut names = Vec::new();
        for block in bytes.chunks(BLOCK as usize) {
            let entries = usize::from(le16(block, 8));
            if entries < DIRENT || entries % DIRENT != 0 || entries > block.len() {
                return Err(DAMAGED);
            }
            for at in (0..entries).step_by(DIRENT) {
                let start = usize::from(le16(block, at + 8));
                let last = at + DIRENT == entries;
                let end = if last {
                    block.len()
                } else {
                    usize::from(le16(block, at + DIRENT + 8))
                };
                let name = block.get(start..end).ok_or(DAMAGED)?;
                // The last name is ended by zeros, where the block has room left.
                let name = name.split(|b| *b == 0).next().unwrap_or(&[]);
                if name.is_empty() {
                    return Err(DAMAGED);
                }
                names.push((name.to_vec(), le64(block, at)));
            }
        }
        Ok(names)
    }
}
