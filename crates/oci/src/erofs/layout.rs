//! Decides where everything goes, before the first byte is written.

use super::{BLOCK, DIRENT, INODE, SLOT, SUPERBLOCK, SUPERBLOCK_SIZE, xattr};
use crate::tree::{Kind, NodeId, Tree};

/// Tails up to this length go behind their inode; longer ones are worth a block of their own,
/// since an inode and its tail must fit one block together and would leave gaps.
const TAIL_MAX: u64 = 2048;

/// One inode and its place.
pub(super) struct Placed {
    pub node: NodeId,
    pub parent: NodeId,
    pub links: u32,
    /// Where the inode is, in bytes.
    pub offset: u64,
    pub xattr_len: usize,
    pub size: u64,
    /// The part of the data that is behind the inode.
    pub tail: u64,
    /// The first block of the rest.
    pub block: u32,
}

impl Placed {
    pub(super) fn nid(&self) -> u64 {
        self.offset / SLOT
    }

    /// The blocks of the data that isn't behind the inode.
    pub(super) fn blocks(&self) -> u64 {
        (self.size - self.tail).div_ceil(BLOCK)
    }
}

/// The whole image.
pub(super) struct Layout {
    pub inodes: Vec<Placed>,
    /// From node to index in `inodes`.
    index: Vec<u32>,
    /// Where the metadata ends and whole blocks begin, in blocks.
    pub data_start: u64,
    pub blocks: u32,
}

impl Layout {
    pub(super) fn of(&self, node: NodeId) -> Option<&Placed> {
        self.inodes.get(*self.index.get(node.index())? as usize)
    }
}

const UNSEEN: u32 = u32::MAX;

/// Blocks of a directory: how many names each takes, and how many bytes.
pub(super) struct DirBlocks {
    pub counts: Vec<usize>,
    pub size: u64,
}

/// Names fill a block as long as they and their 12-byte entries fit.
pub(super) fn dir_blocks<'a>(names: impl Iterator<Item = &'a [u8]>) -> DirBlocks {
    let (mut counts, mut count, mut used) = (Vec::new(), 0, 0);
    for name in names {
        let need = DIRENT + name.len();
        if used + need > BLOCK as usize {
            counts.push(count);
            (count, used) = (0, 0);
        }
        count += 1;
        used += need;
    }
    let size = counts.len() as u64 * BLOCK + used as u64;
    counts.push(count);
    DirBlocks { counts, size }
}

/// The names of a directory in the order of their bytes, `.` and `..` among them.
pub(super) fn names(tree: &Tree, dir: NodeId, parent: NodeId) -> Vec<(&[u8], NodeId)> {
    let mut names = vec![(&b"."[..], dir), (&b".."[..], parent)];
    if let Kind::Directory(children) = &tree.node(dir).kind {
        names.extend(children.iter().map(|(name, child)| (&name[..], child.node)));
    }
    names.sort_unstable_by_key(|(name, _)| *name);
    names
}

/// Collects the inodes: a directory, then what it holds but for directories, then those. So what
/// is looked at together is stored together.
fn collect(tree: &Tree) -> (Vec<Placed>, Vec<u32>) {
    let mut inodes: Vec<Placed> = Vec::new();
    let mut index = vec![UNSEEN; tree.len()];
    let mut todo = vec![(Tree::ROOT, Tree::ROOT)];
    let place = |node: NodeId, parent, links| Placed {
        node,
        parent,
        links,
        offset: 0,
        xattr_len: xattr::encode(&tree.node(node).meta.xattrs).len(),
        size: 0,
        tail: 0,
        block: 0,
    };
    while let Some((dir, parent)) = todo.pop() {
        let Kind::Directory(children) = &tree.node(dir).kind else {
            continue;
        };
        let mut subdirs = Vec::new();
        index[dir.index()] = inodes.len() as u32;
        let at = inodes.len();
        inodes.push(place(dir, parent, 2));
        for child in children.values() {
            let seen = &mut index[child.node.index()];
            if matches!(tree.node(child.node).kind, Kind::Directory(_)) {
                subdirs.push((child.node, dir));
            } else if *seen == UNSEEN {
                *seen = inodes.len() as u32;
                inodes.push(place(child.node, dir, 1));
            } else if let Some(inode) = inodes.get_mut(*seen as usize) {
                inode.links += 1;
            }
        }
        inodes[at].links += subdirs.len() as u32;
        todo.extend(subdirs.into_iter().rev());
    }
    (inodes, index)
}

/// Lays an image out; `None` when it is larger than block numbers reach (16 TiB).
pub(super) fn plan(tree: &Tree) -> Option<Layout> {
    let (mut inodes, index) = collect(tree);
    let mut cursor = (SUPERBLOCK + SUPERBLOCK_SIZE) as u64;
    for inode in &mut inodes {
        let node = tree.node(inode.node);
        inode.size = match &node.kind {
            Kind::Directory(_) => {
                let names = names(tree, inode.node, inode.parent);
                dir_blocks(names.iter().map(|(name, _)| *name)).size
            }
            Kind::File(data) => data.len(),
            Kind::Symlink(target) => target.len() as u64,
            _ => 0,
        };
        let head = INODE + inode.xattr_len as u64;
        let tail = inode.size % BLOCK;
        inode.tail = if tail <= TAIL_MAX && head + tail <= BLOCK {
            tail
        } else {
            0
        };
        cursor = cursor.next_multiple_of(SLOT);
        // The kernel reads these without looking for a block's end: the inode with the header of
        // its attributes; an inode with its tail.
        let together = if inode.tail > 0 {
            head + inode.tail
        } else {
            INODE + SLOT
        };
        if cursor % BLOCK + together > BLOCK {
            cursor = cursor.next_multiple_of(BLOCK);
        }
        inode.offset = cursor;
        cursor += head + inode.tail;
    }
    let data_start = cursor.div_ceil(BLOCK);
    let mut next = data_start;
    for inode in inodes.iter_mut().filter(|inode| inode.blocks() > 0) {
        inode.block = u32::try_from(next).ok()?;
        next = next.checked_add(inode.blocks())?;
    }
    Some(Layout {
        inodes,
        index,
        data_start,
        blocks: u32::try_from(next).ok()?,
    })
}
