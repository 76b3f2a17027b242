//! The files that the guest has open.

use std::collections::{HashMap, VecDeque};
use std::ffi::CString;
use std::fs::File;
use std::mem::MaybeUninit;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{FileType, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Bytes of entries that are fetched from the host at a time.
const FETCH: usize = 16 << 10;

/// An open file or directory.
#[derive(Debug)]
pub(crate) struct Handle {
    /// `None` in a restored session whose file was not found again.
    pub(crate) file: Option<File>,
    /// Which file it is.
    pub(crate) node: u64,
    /// How it was opened, as open(2) has it.
    flags: u32,
    directory: bool,
    entries: Mutex<Entries>,
}

/// Entries of a directory that were fetched and not yet asked for.
#[derive(Debug, Default)]
struct Entries {
    waiting: VecDeque<Entry>,
    /// The place that the first of them has; where nothing waits, that of the next fetch.
    at: u64,
}

/// An entry of a directory.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: CString,
    pub(crate) inode: u64,
    pub(crate) kind: FileType,
    /// The place behind it.
    pub(crate) next: u64,
}

impl Handle {
    pub(crate) fn file(&self) -> Result<&File, Errno> {
        self.file.as_ref().ok_or(Errno::STALE)
    }

    /// An open regular file.
    pub(crate) fn regular(&self) -> Result<&File, Errno> {
        match self.directory {
            true => Err(Errno::ISDIR),
            false => self.file(),
        }
    }

    /// Whether what is written to it is on the host's disk before the writer goes on.
    pub(crate) fn is_synchronous(&self) -> bool {
        let synchronous = OFlags::SYNC.union(OFlags::DSYNC);
        OFlags::from_bits_retain(self.flags).intersects(synchronous)
    }

    /// Hands out a directory's entries from a place on, until `take` refuses one, which is handed out
    /// again the next time.
    pub(crate) fn list(
        &self,
        from: u64,
        mut take: impl FnMut(&Entry) -> bool,
    ) -> Result<(), Errno> {
        if !self.directory {
            return Err(Errno::NOTDIR);
        }
        let file = self.file()?;
        let mut entries = self.entries.lock();
        if entries.at != from || (from == 0 && entries.waiting.is_empty()) {
            entries.waiting.clear();
            rustix::fs::seek(file, SeekFrom::Start(from))?;
            entries.at = from;
        }
        loop {
            while let Some(entry) = entries.waiting.front() {
                if !take(entry) {
                    return Ok(());
                }
                entries.at = entry.next;
                entries.waiting.pop_front();
            }
            entries.fetch(file)?;
            if entries.waiting.is_empty() {
                return Ok(());
            }
        }
    }
}

impl Entries {
    fn fetch(&mut self, file: &File) -> Result<(), Errno> {
        let mut buffer = [const { MaybeUninit::uninit() }; FETCH];
        let mut raw = RawDir::new(file, &mut buffer);
        while let Some(entry) = raw.next() {
            let entry = entry?;
            self.waiting.push_back(Entry {
                name: entry.file_name().to_owned(),
                inode: entry.ino(),
                kind: entry.file_type(),
                next: entry.next_entry_cookie(),
            });
            if raw.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }
}

/// All that the guest has open.
#[derive(Debug)]
pub(crate) struct Handles {
    by_number: HashMap<u64, Arc<Handle>>,
    next: u64,
    most: usize,
}

impl Handles {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            by_number: HashMap::new(),
            next: 1,
            most: most.max(16),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.by_number.clear();
        self.next = 1;
    }

    /// A number for an open file.
    pub(crate) fn add(
        &mut self,
        file: File,
        node: u64,
        flags: u32,
        directory: bool,
    ) -> Result<u64, Errno> {
        if self.by_number.len() >= self.most {
            return Err(Errno::MFILE);
        }
        let number = self.next;
        self.next = number.checked_add(1).ok_or(Errno::MFILE)?;
        let handle = Handle {
            file: Some(file),
            node,
            flags,
            directory,
            entries: Mutex::default(),
        };
        self.by_number.insert(number, Arc::new(handle));
        Ok(number)
    }

    pub(crate) fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.by_number.get(&number).cloned().ok_or(Errno::BADF)
    }

    pub(crate) fn remove(&mut self, number: u64) {
        self.by_number.remove(&number);
    }

    pub(crate) fn save(&self) -> SavedHandles {
        let mut handles: Vec<_> = self.by_number.iter().collect();
        handles.sort_unstable_by_key(|(number, _)| **number);
        let handles = handles.into_iter().map(|(number, handle)| SavedHandle {
            number: *number,
            node: handle.node,
            flags: handle.flags,
            directory: handle.directory,
        });
        SavedHandles {
            next: self.next,
            handles: handles.collect(),
        }
    }

    /// Puts saved numbers back; `open` opens the file of one, with the same flags.
    pub(crate) fn restore(
        &mut self,
        saved: SavedHandles,
        open: impl Fn(u64, u32, bool) -> Option<File>,
    ) -> Result<(), &'static str> {
        self.clear();
        if saved.handles.len() > self.most {
            return Err("it has more files open than this host allows");
        }
        for handle in saved.handles {
            if handle.number >= saved.next || handle.number == 0 {
                return Err("its numbers of open files are not sound");
            }
            let SavedHandle {
                number,
                node,
                flags,
                directory,
            } = handle;
            let restored = Handle {
                file: open(node, flags, directory),
                node,
                flags,
                directory,
                entries: Mutex::default(),
            };
            self.by_number.insert(number, Arc::new(restored));
        }
        self.next = saved.next.max(1);
        Ok(())
    }
}

/// The open files of a saved session.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedHandles {
    next: u64,
    handles: Vec<SavedHandle>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedHandle {
    number: u64,
    node: u64,
    flags: u32,
    directory: bool,
}
