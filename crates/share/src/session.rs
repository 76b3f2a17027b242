//! A session from INIT on, and what a snapshot keeps of one.

use std::fs::File;

use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::handles::SavedHandles;
use crate::nodes::SavedNodes;
use crate::wire::{InitFlags, Put};
use crate::{Call, Share, ShareError};

/// The protocol's major number, and the minor one that is spoken here.
const MAJOR: u32 = 7;
const MINOR: u32 = 37;
/// The oldest minor one: Linux 5.4.
const OLDEST_MINOR: u32 = 31;
/// Pages of one request: 1 MiB, which is the most that the kernel asks for.
const MAX_PAGES: u16 = 256;
const MAX_WRITE: u32 = MAX_PAGES as u32 * 4096;
/// Requests that nobody waits for, which the kernel sends at a time.
const MAX_BACKGROUND: u16 = 64;

/// Not WRITEBACK_CACHE: with it the guest would not see what the host writes to a file that it
/// knows. Not POSIX_ACL: modes are all that counts. Neither kind of locks: they hold among the guest's
/// processes.
const FLAGS: InitFlags = InitFlags::all();

impl Share {
    pub(crate) fn init(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let (major, minor) = (call.args.u32()?, call.args.u32()?);
        if major > MAJOR {
            // The other side asks again with ours (`fuse_init_out`).
            call.put().u32(MAJOR).u32(MINOR);
            call.reply.resize(crate::REPLY_HEADER + 64, 0);
            return Ok(());
        }
        if major < MAJOR || minor < OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        let (readahead, offered) = (call.args.u32()?, call.args.u32()?);
        // A new session, whatever became of the last one.
        self.reset();
        let flags = InitFlags::from_bits_truncate(offered) & FLAGS;
        let congestion = MAX_BACKGROUND / 4 * 3;
        let put = call.put().u32(MAJOR).u32(MINOR).u32(readahead);
        put.u32(flags.bits()).u16(MAX_BACKGROUND).u16(congestion);
        // Times are exact to a nanosecond.
        put.u32(MAX_WRITE).u32(1).u16(MAX_PAGES).u16(0);
        // The second half of the flags, and what isn't used.
        call.reply.resize(crate::REPLY_HEADER + 64, 0);
        Ok(())
    }

    pub(crate) fn forget(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let count = call.args.u64()?;
        self.nodes.lock().forget(call.header.node, count);
        Ok(())
    }

    pub(crate) fn batch_forget(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let (count, _) = (call.args.u32()?, call.args.u32()?);
        let mut nodes = self.nodes.lock();
        // Ends where the request does, whatever count it names.
        for _ in 0..count {
            let (node, lookups) = (call.args.u64()?, call.args.u64()?);
            nodes.forget(node, lookups);
        }
        Ok(())
    }

    /// What a snapshot keeps of the session: the ways to its files, and how they are open.
    #[must_use]
    pub fn save(&self) -> ShareState {
        let handles = self.handles.lock().save();
        let nodes = self.nodes.lock();
        ShareState {
            nodes: nodes.save(|place, id| self.is_at(&nodes, place, id)),
            handles,
        }
    }

    /// Puts a saved session back: onto the folder that it was saved from, or one like it. A file that
    /// isn't there any more is stale for the guest, which is no error here.
    pub fn restore(&self, state: ShareState) -> Result<(), ShareError> {
        let ShareState { nodes, handles } = state;
        let restored = self.nodes.lock().restore(nodes);
        restored.map_err(ShareError::State)?;
        let open = |node, flags, directory| self.open_again(node, flags, directory);
        let restored = self.handles.lock().restore(handles, open);
        restored.map_err(ShareError::State)
    }

    fn open_again(&self, node: u64, flags: u32, directory: bool) -> Option<File> {
        let (fd, kind) = self.node(node).ok()?;
        let flags = match directory {
            true => OFlags::RDONLY | OFlags::DIRECTORY,
            false => crate::files::host_flags(flags) - OFlags::TRUNC,
        };
        if self.options.read_only && crate::files::writes(flags) {
            return None;
        }
        self.open_plain(fd, kind, flags).ok()
    }
}

/// A saved session.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareState {
    nodes: SavedNodes,
    handles: SavedHandles,
}
