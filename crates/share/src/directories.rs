//! OPENDIR, READDIR and READDIRPLUS.

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::handles::Entry;
use crate::nodes::ROOT;
use crate::wire::{ENTRY_LEN, Name, Put};
use crate::{Call, Share, host};

/// Bytes of `struct fuse_dirent` without its name.
const DIRENT_LEN: usize = 24;

impl Share {
    pub(crate) fn open_directory(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let node = call.header.node;
        let fd = self.directory(node)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let file = self.open_plain(&fd, FileType::Directory, flags)?;
        let handle = self.handles.lock().add(file, node, flags.bits(), true)?;
        call.put().u64(handle).u64(0);
        Ok(())
    }

    pub(crate) fn read_directory(&self, call: &mut Call<'_>, plus: bool) -> Result<(), Errno> {
        let (handle, from, size) = (call.args.u64()?, call.args.u64()?, call.args.u32()?);
        let handle = self.handle(handle)?;
        let parent = handle.node;
        let room = call.room.min(usize::try_from(size).unwrap_or(usize::MAX));
        let begin = call.reply.len();
        let reply = &mut *call.reply;
        handle.list(from, |entry| {
            let bytes = entry.name.as_bytes();
            let len = (DIRENT_LEN + bytes.len()).next_multiple_of(8);
            let whole = len + if plus { ENTRY_LEN } else { 0 };
            if reply.len() - begin + whole > room {
                return false;
            }
            if !self.is_listed(parent, entry) {
                return true;
            }
            if plus && !self.put_plus(reply, parent, entry) {
                return true;
            }
            let end = reply.len() + len;
            reply.u64(self.inode_shown(parent, entry)).u64(entry.next);
            // A name has 255 bytes at the most; types are those of a mode, shifted.
            reply
                .u32(bytes.len() as u32)
                .u32(entry.kind.as_raw_mode() >> 12);
            reply.extend_from_slice(bytes);
            reply.resize(end, 0);
            true
        })?;
        Ok(())
    }

    fn is_listed(&self, parent: u64, entry: &Entry) -> bool {
        match entry.name.to_bytes() {
            b"." | b".." => true,
            _ => Name::of(&entry.name).is_ok_and(|name| self.is_visible(parent, name)),
        }
    }

    /// The folder has nothing above it: what the host has there is nobody's business.
    fn inode_shown(&self, parent: u64, entry: &Entry) -> u64 {
        if parent == ROOT && entry.name.to_bytes() == b".." {
            let root = self.node(ROOT).and_then(|(fd, _)| host::stat(&fd));
            return root.map_or(ROOT, |stat| stat.stx_ino);
        }
        entry.inode
    }

    /// Appends what a look-up of an entry tells; `false` if there is none any more.
    fn put_plus(&self, reply: &mut Vec<u8>, parent: u64, entry: &Entry) -> bool {
        let found = match Name::of(&entry.name) {
            Ok(name) => self.find(parent, name),
            // "." and ".." are not looked up.
            Err(_) => Err(Errno::INVAL),
        };
        match found {
            Ok((node, stat)) => self.put_entry(reply, node, &stat),
            Err(Errno::NOENT) => return false,
            // Number 0: the guest has to look it up itself.
            Err(_) => reply.resize(reply.len() + ENTRY_LEN, 0),
        }
        true
    }
}
