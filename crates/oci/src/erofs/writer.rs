//! Writes an image, front to back.

use std::fs::File;
use std::io::{self, Write};

use super::layout::{Layout, Placed, dir_blocks, names, plan};
use super::{
    BLOCK, BLOCK_BITS, COMPAT, DIRENT, FLAT_INLINE, FLAT_PLAIN, MAGIC, S_IFBLK, S_IFCHR, S_IFDIR,
    S_IFIFO, S_IFLNK, S_IFREG, S_IFSOCK, SUPERBLOCK, crc32c::crc32c, xattr,
};
use crate::digest::{Digest, Hasher};
use crate::spool::Spool;
use crate::tree::{FileData, Kind, Tree};

/// A written image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    pub size: u64,
    pub digest: Digest,
}

/// Why an image was not written.
#[derive(Debug)]
pub(crate) enum WriteError {
    /// More than 16 TiB.
    TooLarge,
    /// The data of a file could not be read back.
    Data(FileData, io::Error),
    /// The image could not be written.
    Output(io::Error),
}

/// The file type of directory entries.
fn dirent_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File(_) => 1,
        Kind::Directory(_) => 2,
        Kind::CharDevice { .. } => 3,
        Kind::BlockDevice { .. } => 4,
        Kind::Fifo => 5,
        Kind::Socket => 6,
        Kind::Symlink(_) => 7,
    }
}

fn mode_type(kind: &Kind) -> u16 {
    match kind {
        Kind::File(_) => S_IFREG,
        Kind::Directory(_) => S_IFDIR,
        Kind::CharDevice { .. } => S_IFCHR,
        Kind::BlockDevice { .. } => S_IFBLK,
        Kind::Fifo => S_IFIFO,
        Kind::Socket => S_IFSOCK,
        Kind::Symlink(_) => S_IFLNK,
    }
}

/// Linux's 32-bit device number: 12 bits of major, 20 of minor, the minor's low 8 lowest.
fn device_number(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

/// Writes in order, hashing; long runs of zeros become holes.
struct Output<'a> {
    file: &'a mut File,
    buf: Vec<u8>,
    written: u64,
    hasher: Hasher,
}

const FLUSH_AT: usize = 1 << 20;

impl Output<'_> {
    fn position(&self) -> u64 {
        self.written + self.buf.len() as u64
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buf.extend_from_slice(bytes);
        if self.buf.len() >= FLUSH_AT {
            self.flush()
        } else {
            Ok(())
        }
    }

    fn pad_to(&mut self, position: u64) -> io::Result<()> {
        while self.position() < position {
            let room = FLUSH_AT - self.buf.len().min(FLUSH_AT - 1);
            let part = (position - self.position()).min(room as u64) as usize;
            self.buf.resize(self.buf.len() + part, 0);
            if self.buf.len() >= FLUSH_AT {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.written == 0 {
            seal_superblock(&mut self.buf);
        }
        self.hasher.update(&self.buf);
        if self.buf.iter().any(|byte| *byte != 0) {
            self.file.write_all(&self.buf)?;
        } else {
            io::Seek::seek(self.file, io::SeekFrom::Current(self.buf.len() as i64))?;
        }
        self.written += self.buf.len() as u64;
        self.buf.clear();
        Ok(())
    }
}

/// The checksum covers the rest of the first block, the inodes there included.
pub(crate) fn seal_superblock(image: &mut [u8]) {
    if let Some(covered) = image.get_mut(SUPERBLOCK..BLOCK as usize) {
        covered[4..8].fill(0);
        let sum = crc32c(covered);
        covered[4..8].copy_from_slice(&sum.to_le_bytes());
    }
}

fn superblock(layout: &Layout, uuid: [u8; 16]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    let root = layout.of(Tree::ROOT).map_or(0, Placed::nid);
    bytes.extend(MAGIC.to_le_bytes());
    bytes.extend([0; 4]); // checksum
    bytes.extend(COMPAT.to_le_bytes());
    bytes.extend([BLOCK_BITS, 0]); // block size, extension slots
    // The root is the first inode, so it is in the first two blocks.
    bytes.extend((root as u16).to_le_bytes());
    bytes.extend((layout.inodes.len() as u64).to_le_bytes());
    bytes.extend([0; 12]); // time of building: none, for the same bytes each time
    bytes.extend(layout.blocks.to_le_bytes());
    bytes.extend([0; 8]); // metadata and shared attributes count from block 0
    bytes.extend(uuid);
    bytes.resize(128, 0); // no volume name, no incompatible features, no devices
    bytes
}

fn inode(tree: &Tree, placed: &Placed, number: u32) -> Vec<u8> {
    let node = tree.node(placed.node);
    let layout = if placed.tail > 0 {
        FLAT_INLINE
    } else {
        FLAT_PLAIN
    };
    let place = match node.kind {
        Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
            device_number(major, minor)
        }
        _ => placed.block,
    };
    let mut bytes = Vec::with_capacity(64 + placed.xattr_len);
    bytes.extend((1 | layout << 1).to_le_bytes()); // bit 0: extended
    bytes.extend(xattr::count_of(placed.xattr_len).to_le_bytes());
    bytes.extend((mode_type(&node.kind) | node.meta.mode & 0o7777).to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(placed.size.to_le_bytes());
    bytes.extend(place.to_le_bytes());
    bytes.extend(number.to_le_bytes());
    bytes.extend(node.meta.uid.to_le_bytes());
    bytes.extend(node.meta.gid.to_le_bytes());
    bytes.extend(node.meta.mtime.seconds.to_le_bytes());
    bytes.extend(node.meta.mtime.nanoseconds.to_le_bytes());
    bytes.extend(placed.links.to_le_bytes());
    bytes.resize(64, 0);
    bytes.extend(xattr::encode(&node.meta.xattrs));
    bytes
}

/// The data of a directory: per block the entries, then the names, then zeros.
fn directory(tree: &Tree, layout: &Layout, placed: &Placed) -> Vec<u8> {
    let names = names(tree, placed.node, placed.parent);
    let plan = dir_blocks(names.iter().map(|(name, _)| *name));
    let mut bytes = Vec::with_capacity(plan.size as usize);
    let mut rest = &names[..];
    for count in plan.counts {
        bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
        let (block, after) = rest.split_at(count);
        rest = after;
        let mut name_at = count * DIRENT;
        for (name, node) in block {
            bytes.extend(layout.of(*node).map_or(0, Placed::nid).to_le_bytes());
            bytes.extend((name_at as u16).to_le_bytes());
            bytes.extend([dirent_type(&tree.node(*node).kind), 0]);
            name_at += name.len();
        }
        block.iter().for_each(|(name, _)| bytes.extend(*name));
    }
    bytes
}

/// Copies a part of a file's data.
fn copy_data(
    out: &mut Output<'_>,
    spool: &Spool,
    data: &FileData,
    range: std::ops::Range<u64>,
) -> Result<(), WriteError> {
    let failed = |error| WriteError::Data(*data, error);
    let opened = spool.open(data).map_err(failed)?;
    let mut at = range.start;
    while at < range.end {
        // Small files aren't worth the question.
        if range.end - at > FLUSH_AT as u64 {
            let data = opened.next_data(at).min(range.end);
            let to = out.position() + (data - at);
            out.pad_to(to).map_err(WriteError::Output)?;
            at = data;
        }
        let start = out.buf.len();
        let room = (FLUSH_AT - start.min(FLUSH_AT - 1)) as u64;
        let part = (range.end - at).min(room);
        out.buf.resize(start + part as usize, 0);
        opened
            .read_exact_at(&mut out.buf[start..], at)
            .map_err(failed)?;
        at += part;
        if out.buf.len() >= FLUSH_AT {
            out.flush().map_err(WriteError::Output)?;
        }
    }
    Ok(())
}

fn write_range(
    out: &mut Output<'_>,
    image: (&Tree, &Layout, &Spool),
    placed: &Placed,
    range: std::ops::Range<u64>,
) -> Result<(), WriteError> {
    let (tree, layout, spool) = image;
    if range.is_empty() {
        return Ok(());
    }
    let within = range.start as usize..range.end as usize;
    match &tree.node(placed.node).kind {
        Kind::File(data) => copy_data(out, spool, data, range),
        Kind::Symlink(target) => out
            .put(target.get(within).unwrap_or(&[]))
            .map_err(WriteError::Output),
        Kind::Directory(_) => {
            let bytes = directory(tree, layout, placed);
            out.put(bytes.get(within).unwrap_or(&[]))
                .map_err(WriteError::Output)
        }
        _ => Ok(()),
    }
}

/// Writes `tree` as an EROFS image into the empty `file`. The same tree gives the same bytes.
pub(crate) fn write(
    tree: &Tree,
    spool: &Spool,
    uuid: [u8; 16],
    file: &mut File,
) -> Result<Written, WriteError> {
    let layout = plan(tree).ok_or(WriteError::TooLarge)?;
    let image = (tree, &layout, spool);
    let mut out = Output {
        file,
        buf: Vec::new(),
        written: 0,
        hasher: Hasher::default(),
    };
    let output = WriteError::Output;
    out.pad_to(SUPERBLOCK as u64).map_err(output)?;
    out.put(&superblock(&layout, uuid)).map_err(output)?;
    for (number, placed) in layout.inodes.iter().enumerate() {
        out.pad_to(placed.offset).map_err(output)?;
        out.put(&inode(tree, placed, number as u32 + 1))
            .map_err(output)?;
        write_range(
            &mut out,
            image,
            placed,
            placed.size - placed.tail..placed.size,
        )?;
    }
    out.pad_to(layout.data_start * BLOCK).map_err(output)?;
    for placed in layout.inodes.iter().filter(|placed| placed.blocks() > 0) {
        out.pad_to(u64::from(placed.block) * BLOCK)
            .map_err(output)?;
        write_range(&mut out, image, placed, 0..placed.size - placed.tail)?;
    }
    let size = u64::from(layout.blocks) * BLOCK;
    out.pad_to(size).map_err(output)?;
    out.flush().map_err(output)?;
    // The last run of zeros may have been left as a hole.
    out.file.set_len(size).map_err(output)?;
    Ok(Written {
        size,
        digest: out.hasher.finish(),
    })
}
