//! A root file system in memory: names, metadata, and where the data of files is.
//!
//! Layers are applied in order, lowest first. Everything that a layer says about a name is decided
//! here; what the bytes of its archive mean is decided in `layer`.

use std::collections::{BTreeMap, VecDeque};

use crate::tar::{Time, printable};

/// The longest name (NAME_MAX) and path (PATH_MAX) of Linux.
pub(crate) const NAME_MAX: usize = 255;
pub(crate) const PATH_MAX: usize = 4096;
/// As many symbolic links as Linux follows in one path.
const LINKS_MAX: usize = 40;

/// The index of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeId(u32);

impl NodeId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Extended attributes by full name.
pub(crate) type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// What `stat` tells, but for kind and size.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Metadata {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    pub xattrs: Xattrs,
}

/// Where the bytes of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileData {
    Empty,
    /// In the spool, from `offset` on.
    Spooled {
        offset: u64,
        len: u64,
    },
    /// In a file of the host, by its number.
    Host {
        file: u32,
        len: u64,
    },
}

impl FileData {
    pub(crate) fn len(&self) -> u64 {
        match self {
            FileData::Empty => 0,
            FileData::Spooled { len, .. } | FileData::Host { len, .. } => *len,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory(BTreeMap<Box<[u8]>, Child>),
    File(FileData),
    Symlink(Box<[u8]>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
    Socket,
}

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Child {
    pub node: NodeId,
    /// The last layer that has this name, or a name below it.
    layer: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub meta: Metadata,
    pub kind: Kind,
    /// The layer that gave `meta`; for a directory that is only implied by names below it, 0.
    meta_layer: u32,
}

/// A name that can't be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// `..` in a name.
    #[error("Entry '{0}' has `..` in its name and could leave the image")]
    Escapes(String),
    /// Too long, empty, or with a NUL.
    #[error(
        "Entry '{0}' has a name that Linux doesn't allow (empty, with a NUL, a part over 255 or a whole over 4095 bytes)"
    )]
    BadName(String),
    /// Something that isn't a directory has names below it.
    #[error("Entry '{path}' is below '{parent}', which is not a directory")]
    NotADirectory {
        /// The entry.
        path: String,
        /// The name in its way.
        parent: String,
    },
    /// Symbolic links in a circle.
    #[error("Entry '{0}' is below symbolic links that go round in a circle")]
    LinkLoop(String),
    /// The target of a hard link doesn't exist.
    #[error("Entry '{path}' is a hard link to '{target}', which is not in the image")]
    NoTarget {
        /// The entry.
        path: String,
        /// What it links to.
        target: String,
    },
    /// A hard link to a directory.
    #[error("Entry '{path}' is a hard link to the directory '{target}'")]
    LinkToDirectory {
        /// The entry.
        path: String,
        /// What it links to.
        target: String,
    },
    /// The root is given as something else.
    #[error("Entry '{0}' makes the root of the image something else than a directory")]
    Root(String),
    /// A whiteout without a name.
    #[error("Entry '{0}' is a whiteout that names nothing")]
    Whiteout(String),
}

/// A root file system.
pub(crate) struct Tree {
    nodes: Vec<Node>,
    layer: u32,
}

/// The parts of a path: no empty ones, no `.`; `..` is refused.
pub(crate) fn components(path: &[u8]) -> Result<Vec<&[u8]>, TreeError> {
    if path.len() >= PATH_MAX || path.is_empty() || path.contains(&0) {
        return Err(TreeError::BadName(printable(path)));
    }
    let mut parts = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(TreeError::Escapes(printable(path))),
            _ if part.len() > NAME_MAX => return Err(TreeError::BadName(printable(path))),
            _ => parts.push(part),
        }
    }
    Ok(parts)
}

/// Directories that no layer describes: what `mkdir -p` would make, at a fixed time.
fn implied_metadata() -> Metadata {
    Metadata {
        mode: 0o755,
        ..Metadata::default()
    }
}

impl Tree {
    /// An empty root.
    pub(crate) fn new() -> Self {
        let root = Node {
            meta: implied_metadata(),
            kind: Kind::Directory(BTreeMap::new()),
            meta_layer: 0,
        };
        Tree {
            nodes: vec![root],
            layer: 0,
        }
    }

    pub(crate) const ROOT: NodeId = NodeId(0);

    /// What follows belongs to the next layer.
    pub(crate) fn begin_layer(&mut self) {
        self.layer += 1;
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// How many nodes there are, the replaced ones included.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    fn children(&self, id: NodeId) -> Option<&BTreeMap<Box<[u8]>, Child>> {
        match &self.node(id).kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn children_mut(&mut self, id: NodeId) -> Option<&mut BTreeMap<Box<[u8]>, Child>> {
        match &mut self.nodes[id.index()].kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn lookup(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        self.children(dir)?.get(name).map(|child| child.node)
    }

    fn add_node(&mut self, meta: Metadata, kind: Kind, meta_layer: u32) -> NodeId {
        // Bounded far below 2^32 by the limit on entries.
        let id = NodeId(u32::try_from(self.nodes.len()).unwrap_or(u32::MAX));
        self.nodes.push(Node {
            meta,
            kind,
            meta_layer,
        });
        id
    }

    fn bind(&mut self, dir: NodeId, name: &[u8], node: NodeId) {
        let layer = self.layer;
        if let Some(children) = self.children_mut(dir) {
            children.insert(name.into(), Child { node, layer });
        }
    }

    /// Finds the directory that `parts` name, following symbolic links as a process would whose
    /// root this is. With `create`, what is missing is made; without, it gives `None`.
    fn directory(
        &mut self,
        path: &[u8],
        parts: &[&[u8]],
        create: bool,
    ) -> Result<Option<NodeId>, TreeError> {
        let mut way = vec![Self::ROOT];
        let mut todo: VecDeque<Vec<u8>> = parts.iter().map(|part| part.to_vec()).collect();
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            let here = way.last().copied().unwrap_or(Self::ROOT);
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    if way.len() > 1 {
                        way.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let Some(found) = self.lookup(here, &name) else {
                if !create {
                    return Ok(None);
                }
                let dir = self.add_node(implied_metadata(), Kind::Directory(BTreeMap::new()), 0);
                self.bind(here, &name, dir);
                way.push(dir);
                continue;
            };
            match &self.node(found).kind {
                Kind::Directory(_) => {
                    if create {
                        self.bind(here, &name, found);
                    }
                    way.push(found);
                }
                Kind::Symlink(target) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(TreeError::LinkLoop(printable(path)));
                    }
                    let target = target.clone();
                    if target.first() == Some(&b'/') {
                        way.truncate(1);
                    }
                    for part in target.split(|b| *b == b'/').rev() {
                        todo.push_front(part.to_vec());
                    }
                }
                _ if !create => return Ok(None),
                _ => {
                    let (path, parent) = (printable(path), printable(&name));
                    return Err(TreeError::NotADirectory { path, parent });
                }
            }
        }
        Ok(way.last().copied())
    }

    /// Puts a directory at `path`; one that is there keeps its names.
    pub(crate) fn put_directory(&mut self, path: &[u8], meta: Metadata) -> Result<(), TreeError> {
        let parts = components(path)?;
        let layer = self.layer;
        let Some((name, parents)) = parts.split_last() else {
            self.nodes[0].meta = meta;
            self.nodes[0].meta_layer = layer;
            return Ok(());
        };
        let Some(parent) = self.directory(path, parents, true)? else {
            return Ok(());
        };
        let there = self
            .lookup(parent, name)
            .filter(|id| self.children(*id).is_some());
        let node = match there {
            Some(id) => {
                self.nodes[id.index()].meta = meta;
                self.nodes[id.index()].meta_layer = layer;
                id
            }
            None => self.add_node(meta, Kind::Directory(BTreeMap::new()), layer),
        };
        self.bind(parent, name, node);
        Ok(())
    }

    /// Puts anything but a directory at `path`, in place of whatever is there.
    pub(crate) fn put(&mut self, path: &[u8], meta: Metadata, kind: Kind) -> Result<(), TreeError> {
        let parts = components(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return Err(TreeError::Root(printable(path)));
        };
        let Some(parent) = self.directory(path, parents, true)? else {
            return Ok(());
        };
        let node = self.add_node(meta, kind, self.layer);
        self.bind(parent, name, node);
        Ok(())
    }

    /// Gives what is at `target` a second name.
    pub(crate) fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), TreeError> {
        let parts = components(path)?;
        let target_parts = components(target)?;
        let (Some((name, parents)), Some((target_name, target_parents))) =
            (parts.split_last(), target_parts.split_last())
        else {
            return Err(TreeError::Root(printable(path)));
        };
        let names = || (printable(path), printable(target));
        let node = self
            .directory(target, target_parents, false)?
            .and_then(|dir| self.lookup(dir, target_name))
            .ok_or_else(|| {
                let (path, target) = names();
                TreeError::NoTarget { path, target }
            })?;
        if self.children(node).is_some() {
            let (path, target) = names();
            return Err(TreeError::LinkToDirectory { path, target });
        }
        if let Some(parent) = self.directory(path, parents, true)? {
            self.bind(parent, name, node);
        }
        Ok(())
    }

    /// Removes the name `path` as lower layers have it (OCI image-spec, layer.md, "Whiteouts"):
    /// names of the current layer stay, wherever in the archive the whiteout stands.
    pub(crate) fn whiteout(&mut self, path: &[u8]) -> Result<(), TreeError> {
        let parts = components(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return Err(TreeError::Whiteout(printable(path)));
        };
        let Some(parent) = self.directory(path, parents, false)? else {
            return Ok(());
        };
        let Some(child) = self.children(parent).and_then(|c| c.get(*name)).copied() else {
            return Ok(());
        };
        if child.layer < self.layer {
            if let Some(children) = self.children_mut(parent) {
                children.remove(*name);
            }
            return Ok(());
        }
        // The directory is of this layer too, or has names of it: it starts anew with these.
        if self.children(child.node).is_some() {
            let layer = self.layer;
            let node = &mut self.nodes[child.node.index()];
            if node.meta_layer < layer {
                node.meta = implied_metadata();
                node.meta_layer = 0;
            }
            self.prune(child.node);
        }
        Ok(())
    }

    /// Removes everything that lower layers have in the directory `path`.
    pub(crate) fn opaque(&mut self, path: &[u8]) -> Result<(), TreeError> {
        // The empty path is the root: the marker stood there.
        let parts = if path.is_empty() {
            Vec::new()
        } else {
            components(path)?
        };
        if let Some(dir) = self.directory(path, &parts, false)? {
            self.prune(dir);
        }
        Ok(())
    }

    /// Removes the names below `top` that the current layer doesn't have.
    fn prune(&mut self, top: NodeId) {
        let layer = self.layer;
        let mut todo = vec![top];
        while let Some(dir) = todo.pop() {
            let Some(children) = self.children_mut(dir) else {
                continue;
            };
            children.retain(|_, child| child.layer >= layer);
            let kept: Vec<NodeId> = children.values().map(|child| child.node).collect();
            for id in kept {
                let node = &mut self.nodes[id.index()];
                if matches!(node.kind, Kind::Directory(_)) {
                    if node.meta_layer < layer {
                        node.meta = implied_metadata();
                        node.meta_layer = 0;
                    }
                    todo.push(id);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
