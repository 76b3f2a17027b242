//! The files that the guest knows: numbers that the guest's kernel holds on to, and what they stand for.
//!
//! Each is an `O_PATH` descriptor, so that nothing on the way to it can be exchanged. Descriptors are
//! few: of files that were not used for long only the way is kept (the directory's number and the name
//! in it), and the file found there again must be the same one. A saved session has only ways.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::host::{FileId, Found, Seen};
use crate::wire::Name;

/// The shared folder's own number (`FUSE_ROOT_ID`).
pub(crate) const ROOT: u64 = 1;
/// The most files that a guest may know at a time.
pub(crate) const MAX_NODES: usize = 1 << 20;
/// The fewest descriptors that a table makes do with.
const MIN_OPEN: usize = 16;

/// Where a file was last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) parent: u64,
    pub(crate) name: CString,
}

#[derive(Debug)]
struct Node {
    kind: FileType,
    /// Unknown in a restored session, until the file is opened.
    id: Option<FileId>,
    fd: Option<Arc<OwnedFd>>,
    place: Option<Place>,
    /// How often the guest was told the number and hasn't forgotten it.
    lookups: u64,
    /// It was used since the last look for descriptors to close.
    used: bool,
    /// What the file was when the guest last opened it.
    seen: Option<Seen>,
}

/// A number as the table has it.
pub(crate) enum Known {
    /// The file is open.
    Open(Arc<OwnedFd>, FileType),
    /// It has to be opened again, there.
    Closed(Place),
}

/// All files that the guest knows.
#[derive(Debug)]
pub(crate) struct Nodes {
    by_number: HashMap<u64, Node>,
    by_id: HashMap<FileId, u64>,
    next: u64,
    /// Numbers with a descriptor, some without; about the longest unused first.
    queue: VecDeque<u64>,
    open: usize,
    most_open: usize,
}

impl Nodes {
    pub(crate) fn new(root: Found, most_open: usize) -> Self {
        let mut nodes = Self {
            by_number: HashMap::new(),
            by_id: HashMap::new(),
            next: ROOT + 1,
            queue: VecDeque::new(),
            open: 0,
            most_open: most_open.max(MIN_OPEN),
        };
        nodes.by_id.insert(root.id, ROOT);
        let node = Node {
            kind: root.kind,
            id: Some(root.id),
            fd: Some(Arc::new(root.fd)),
            place: None,
            lookups: 1,
            used: true,
            seen: None,
        };
        nodes.by_number.insert(ROOT, node);
        nodes
    }

    /// Forgets all but the folder itself.
    pub(crate) fn clear(&mut self) {
        self.by_number.retain(|number, _| *number == ROOT);
        self.by_id.retain(|_, number| *number == ROOT);
        self.queue.clear();
        (self.open, self.next) = (0, ROOT + 1);
    }

    pub(crate) fn get(&mut self, number: u64) -> Result<Known, Errno> {
        let node = self.by_number.get_mut(&number).ok_or(Errno::STALE)?;
        match &node.fd {
            Some(fd) => {
                node.used = true;
                Ok(Known::Open(fd.clone(), node.kind))
            }
            None => Ok(Known::Closed(node.place.clone().ok_or(Errno::STALE)?)),
        }
    }

    /// Takes a file that was opened again for `number`, if it is the same.
    pub(crate) fn reopened(&mut self, number: u64, found: Found) -> Result<Arc<OwnedFd>, Errno> {
        let node = self.by_number.get_mut(&number).ok_or(Errno::STALE)?;
        if let Some(fd) = &node.fd {
            return Ok(fd.clone());
        }
        if node.kind != found.kind || node.id.is_some_and(|id| id != found.id) {
            return Err(Errno::STALE);
        }
        let fd = Arc::new(found.fd);
        (node.fd, node.used, node.id) = (Some(fd.clone()), true, Some(found.id));
        self.by_id.entry(found.id).or_insert(number);
        self.opened(number);
        Ok(fd)
    }

    /// Counts a look-up of the file with this identity, if it is known and open.
    pub(crate) fn look_up(&mut self, id: &FileId, place: &Place) -> Option<u64> {
        let number = *self.by_id.get(id)?;
        let node = self.by_number.get_mut(&number)?;
        node.fd.as_ref()?;
        node.lookups = node.lookups.saturating_add(1);
        node.used = true;
        if number != ROOT && node.place.as_ref() != Some(place) {
            node.place = Some(place.clone());
        }
        Some(number)
    }

    /// Counts a look-up of a file that was opened for it.
    pub(crate) fn enter(&mut self, found: Found, place: Place) -> Result<u64, Errno> {
        if let Some(number) = self.look_up(&found.id, &place) {
            return Ok(number);
        }
        if let Some(&number) = self.by_id.get(&found.id)
            && let Some(node) = self.by_number.get_mut(&number)
            && node.kind == found.kind
        {
            node.lookups = node.lookups.saturating_add(1);
            (node.used, node.place) = (true, Some(place));
            node.fd = Some(Arc::new(found.fd));
            self.opened(number);
            return Ok(number);
        }
        if self.by_number.len() >= MAX_NODES {
            return Err(Errno::NFILE);
        }
        let number = self.next;
        // 2^64 look-ups don't come to pass.
        self.next = self.next.checked_add(1).ok_or(Errno::NFILE)?;
        let node = Node {
            kind: found.kind,
            id: Some(found.id),
            fd: Some(Arc::new(found.fd)),
            place: Some(place),
            lookups: 1,
            used: true,
            seen: None,
        };
        self.by_number.insert(number, node);
        self.by_id.insert(found.id, number);
        self.opened(number);
        Ok(number)
    }

    /// The guest has forgotten `count` look-ups.
    pub(crate) fn forget(&mut self, number: u64, count: u64) {
        let Some(node) = self.by_number.get_mut(&number) else {
            return;
        };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 || number == ROOT {
            return;
        }
        let Some(node) = self.by_number.remove(&number) else {
            return;
        };
        self.open -= usize::from(node.fd.is_some());
        if let Some(id) = node.id
            && self.by_id.get(&id) == Some(&number)
        {
            self.by_id.remove(&id);
        }
        if self.queue.len() > 2 * self.open + 64 {
            let by_number = &self.by_number;
            let open = |number: &u64| by_number.get(number).is_some_and(|node| node.fd.is_some());
            self.queue.retain(open);
        }
    }

    /// The file with this identity is somewhere else now.
    pub(crate) fn moved(&mut self, id: &FileId, place: Place) {
        if let Some(number) = self.by_id.get(id).filter(|number| **number != ROOT)
            && let Some(node) = self.by_number.get_mut(number)
        {
            node.place = Some(place);
        }
    }

    /// The file is opened by the guest: whether it is unchanged since the last time, so that what the
    /// guest has of it is still right.
    pub(crate) fn opens(&mut self, number: u64, now: Option<Seen>) -> bool {
        let Some(node) = self.by_number.get_mut(&number) else {
            return false;
        };
        let unchanged = now.is_some() && node.seen == now;
        node.seen = now;
        unchanged
    }

    fn opened(&mut self, number: u64) {
        self.queue.push_back(number);
        self.open += 1;
        if self.open > self.most_open {
            self.close_some(1);
        }
    }

    /// The directory that a place is in, if it is open.
    pub(crate) fn directory_of(&self, place: &Place) -> Option<&Arc<OwnedFd>> {
        self.by_number.get(&place.parent)?.fd.as_ref()
    }

    /// The process has no more descriptors: closes what it can do without.
    pub(crate) fn shed(&mut self) {
        self.close_some((self.open / 2).max(1));
    }

    /// Closes `count` of the descriptors that were not used for long.
    fn close_some(&mut self, count: usize) {
        let mut closed = 0;
        // Each is looked at twice at the most: once to take its mark away.
        for _ in 0..2 * self.queue.len() {
            if closed == count {
                return;
            }
            let Some(number) = self.queue.pop_front() else {
                return;
            };
            let Some(node) = self.by_number.get_mut(&number) else {
                continue;
            };
            let Some(fd) = &node.fd else { continue };
            // A file without a name couldn't be found again.
            if std::mem::take(&mut node.used) || crate::host::is_nameless(fd) {
                self.queue.push_back(number);
                continue;
            }
            node.fd = None;
            self.open -= 1;
            closed += 1;
        }
    }

    /// What a snapshot keeps. `still_there` tells whether the file is where it was last seen.
    pub(crate) fn save(&self, still_there: impl Fn(&Place, &FileId) -> bool) -> SavedNodes {
        let nodes = self.by_number.iter().filter(|(number, _)| **number != ROOT);
        let nodes = nodes.map(|(number, node)| {
            let place = node.place.as_ref().filter(|place| match &node.id {
                Some(id) => node.fd.is_none() || still_there(place, id),
                None => true,
            });
            SavedNode {
                number: *number,
                kind: node.kind.as_raw_mode(),
                lookups: node.lookups,
                place: place.map(|place| (place.parent, place.name.as_bytes().to_vec())),
            }
        });
        let mut nodes: Vec<_> = nodes.collect();
        nodes.sort_unstable_by_key(|node| node.number);
        SavedNodes {
            next: self.next,
            nodes,
        }
    }

    /// Puts saved numbers back; `Err` names what can't be.
    pub(crate) fn restore(&mut self, saved: SavedNodes) -> Result<(), &'static str> {
        self.clear();
        if saved.nodes.len() >= MAX_NODES {
            return Err("it has too many files");
        }
        let mut known = HashSet::new();
        for node in saved.nodes {
            if node.number <= ROOT || node.number >= saved.next || !known.insert(node.number) {
                return Err("its numbers of files are not sound");
            }
            let place = match node.place {
                None => None,
                Some((parent, name)) => {
                    let name = CString::new(name).map_err(|_| "it has a name that can't be")?;
                    Name::of(&name).map_err(|_| "it has a name that can't be")?;
                    Some(Place { parent, name })
                }
            };
            let restored = Node {
                kind: FileType::from_raw_mode(node.kind),
                id: None,
                fd: None,
                place,
                lookups: node.lookups,
                used: false,
                seen: None,
            };
            self.by_number.insert(node.number, restored);
        }
        self.next = saved.next.max(ROOT + 1);
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.by_number.len(), self.open)
    }
}

/// The files of a saved session.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedNodes {
    next: u64,
    nodes: Vec<SavedNode>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedNode {
    number: u64,
    /// The type bits of its mode.
    kind: u32,
    lookups: u64,
    /// The directory's number and the name in it; `None` for a file that has no name any more.
    place: Option<(u64, Vec<u8>)>,
}
