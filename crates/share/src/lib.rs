//! A folder of the host, shared with a guest: a FUSE server (protocol 7.37, what Linux 6.1 speaks).
//!
//! ```text
//!   virtio-fs device ── request bytes ──► Share::serve ──► names, attributes: *at() calls on O_PATH
//!        ▲                 WRITE's data as buffers │        data: preadv / pwritev, guest memory ⇄ file
//!        └───── reply bytes; READ's data is in the guest's buffers already
//! ```
//! It knows nothing of virtio: a device hands over what it found and puts the answer back. One share
//! serves one guest; requests may come from several threads.
//!
//! **Containment.** The guest names files by numbers that it got from here and by single components of
//! paths. A number stands for an `O_PATH` descriptor; a component is looked up in such a directory
//! without following a link, and `.`, `..`, the empty name and names with `/` are refused. So
//! every descriptor was reached from the folder's own in steps that lead down: whatever the guest plants
//! or renames in between, there is no path to walk. Symbolic links are the guest's to resolve. Only
//! regular files and directories are ever opened.
//!
//! **Caching.** The guest may believe names and attributes for a second ([`VALID`]). An open file's
//! cache outlives its closing only if the file is unchanged at the next open.

mod attributes;
mod directories;
mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod handles;
mod host;
mod names;
mod nodes;
mod owner;
mod session;
#[cfg(test)]
mod tests;
mod wire;
mod xattrs;

use std::ffi::CString;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use rustix::process::Resource;
use skerry_storage::{IoBuf, IoBufMut};

use handles::{Handle, Handles};
use host::{FileId, Found, Links};
use nodes::{Known, Nodes, Place, ROOT};
use owner::Owners;
pub use session::ShareState;
use wire::{Args, Name, Opcode, Put};
pub use wire::{REPLY_HEADER, REQUEST_HEADER, RequestHeader, WRITE_ARGS};

/// How long the guest may believe what it was told of a file.
pub const VALID: Duration = Duration::from_secs(1);
/// Directories on the way to a file that is opened again.
const MAX_DEPTH: usize = 128;
/// The most descriptors that the files a guest knows take, whatever the process is allowed.
const MOST_OPEN: u64 = 64 << 10;

/// Why a folder can't be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It isn't there, or may not be reached.
    #[error("Can't share {}", path.display())]
    Open {
        /// The folder.
        path: PathBuf,
        /// What the host says.
        source: std::io::Error,
    },
    /// The process's descriptors can't be reached.
    #[error("Sharing a folder needs /proc/self/fd of the host")]
    NoProc(#[source] std::io::Error),
    /// A saved session can't be put back.
    #[error("The saved state of a shared folder can't be used: {0}")]
    State(&'static str),
}

/// What is shared, and how.
#[derive(Debug, Clone, Default)]
pub struct ShareOptions {
    /// Nothing may be changed.
    pub read_only: bool,
    /// Of the folder itself only the entry of this name can be seen.
    pub only: Option<CString>,
}

/// How an answer is to be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Not at all.
    Silent,
    /// The reply's bytes are all of it.
    Bytes,
    /// So many bytes in the requester's buffers come behind them.
    Filled(usize),
}

/// A shared folder.
pub struct Share {
    options: ShareOptions,
    links: Links,
    owners: Owners,
    umask: u32,
    nodes: Mutex<Nodes>,
    handles: Mutex<Handles>,
}

/// A request that is being answered.
struct Call<'a> {
    header: RequestHeader,
    args: Args<'a>,
    reply: &'a mut Vec<u8>,
    /// Bytes that the requester takes, the header apart.
    room: usize,
}

impl Share {
    /// Shares the folder at `path`.
    pub fn open(path: &Path, options: ShareOptions) -> Result<Arc<Self>, ShareError> {
        let failed = |source: std::io::Error| ShareError::Open {
            path: path.to_owned(),
            source,
        };
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|nul| failed(nul.into()))?;
        let (root, _) = host::open_folder(&name).map_err(|error| failed(error.into()))?;
        let links = Links::new().map_err(|error| ShareError::NoProc(error.into()))?;
        let limit = rustix::process::getrlimit(Resource::Nofile).current;
        let limit = limit.unwrap_or(MOST_OPEN * 2);
        // Half for the files that the guest knows, a quarter for those that it has open.
        let most = usize::try_from(MOST_OPEN.min(limit / 2)).unwrap_or(usize::MAX);
        Ok(Arc::new(Self {
            options,
            links,
            owners: Owners::of_process(),
            umask: host::umask(),
            nodes: Mutex::new(Nodes::new(root, most)),
            handles: Mutex::new(Handles::new(most / 2)),
        }))
    }

    /// Answers one request: its header and arguments in `request`, cut at
    /// [`RequestHeader::args_end`]; what a write has behind that in `data`; where the data of a read
    /// goes in `room`; otherwise `room_len` bytes are taken. The answer's bytes replace what is in
    /// `reply`.
    pub fn serve(
        &self,
        request: &[u8],
        data: &[IoBuf<'_>],
        room: &[IoBufMut<'_>],
        room_len: usize,
        reply: &mut Vec<u8>,
    ) -> Answer {
        reply.clear();
        let Some((header, args)) = request.split_first_chunk() else {
            return Answer::Silent;
        };
        let header = RequestHeader::parse(header);
        reply.resize(REPLY_HEADER, 0);
        let call = Call {
            header,
            args: Args(args),
            reply,
            room: room_len.saturating_sub(REPLY_HEADER),
        };
        let result = self.dispatch(call, data, room);
        if header.is_silent() {
            return Answer::Silent;
        }
        let (error, filled) = match result {
            Ok(filled) => (0, filled),
            Err(errno) => {
                reply.truncate(REPLY_HEADER);
                (errno.raw_os_error().wrapping_neg(), 0)
            }
        };
        // A read's buffers hold no more than 32 bits of bytes.
        let len = (reply.len() + filled) as u32;
        reply[..4].copy_from_slice(&len.to_le_bytes());
        reply[4..8].copy_from_slice(&error.to_le_bytes());
        reply[8..16].copy_from_slice(&header.unique.to_le_bytes());
        match filled {
            0 => Answer::Bytes,
            filled => Answer::Filled(filled),
        }
    }

    /// Does what is asked; gives how many bytes are in the requester's buffers.
    fn dispatch(
        &self,
        mut call: Call<'_>,
        data: &[IoBuf<'_>],
        room: &[IoBufMut<'_>],
    ) -> Result<usize, Errno> {
        let opcode = Opcode::of(call.header.opcode).ok_or(Errno::NOSYS)?;
        let call = &mut call;
        match opcode {
            Opcode::Read => return self.read(call, room),
            Opcode::Write => self.write(call, data),
            Opcode::Init => self.init(call),
            Opcode::Destroy => {
                self.reset();
                Ok(())
            }
            Opcode::Interrupt => Ok(()),
            Opcode::Forget => self.forget(call),
            Opcode::BatchForget => self.batch_forget(call),
            Opcode::Lookup => self.look_up(call),
            Opcode::GetAttr => self.get_attributes(call),
            Opcode::SetAttr => self.set_attributes(call),
            Opcode::StatFs => self.stat_fs(call),
            Opcode::ReadLink => self.read_link(call),
            Opcode::Symlink => self.symlink(call),
            Opcode::MkNod => self.make_node(call),
            Opcode::MkDir => self.make_directory(call),
            Opcode::Unlink => self.unlink(call, false),
            Opcode::RmDir => self.unlink(call, true),
            Opcode::Rename => self.rename(call, false),
            Opcode::Rename2 => self.rename(call, true),
            Opcode::Link => self.link(call),
            Opcode::Open => self.open_file(call),
            Opcode::Create => self.create(call),
            Opcode::TmpFile => self.create_nameless(call),
            Opcode::Release | Opcode::ReleaseDir => self.release(call),
            Opcode::FSync | Opcode::FSyncDir => self.sync(call),
            Opcode::SyncFs => self.sync_all(),
            Opcode::FAllocate => self.allocate(call),
            Opcode::LSeek => self.seek(call),
            Opcode::CopyFileRange => self.copy_range(call),
            Opcode::OpenDir => self.open_directory(call),
            Opcode::ReadDir => self.read_directory(call, false),
            Opcode::ReadDirPlus => self.read_directory(call, true),
            Opcode::GetXattr => self.get_xattr(call),
            Opcode::SetXattr => self.set_xattr(call),
            Opcode::ListXattr => self.list_xattrs(call),
            Opcode::RemoveXattr => self.remove_xattr(call),
        }?;
        Ok(0)
    }

    fn must_be_writable(&self) -> Result<(), Errno> {
        match self.options.read_only {
            true => Err(Errno::ROFS),
            false => Ok(()),
        }
    }

    /// Whether a name may be looked up in a directory: all of them, unless one file alone is shared.
    fn is_visible(&self, parent: u64, name: Name<'_>) -> bool {
        match &self.options.only {
            Some(only) if parent == ROOT => only.as_c_str() == name.as_c_str(),
            _ => true,
        }
    }

    /// Refuses to change the entry of a directory that belongs to nobody: that of a file which alone is shared.
    fn must_be_changeable(&self, parent: u64) -> Result<(), Errno> {
        self.must_be_writable()?;
        match self.options.only.is_some() && parent == ROOT {
            true => Err(Errno::PERM),
            false => Ok(()),
        }
    }

    /// The descriptor behind a number, and what kind of file it is.
    fn node(&self, number: u64) -> Result<(Arc<OwnedFd>, FileType), Errno> {
        match self.nodes.lock().get(number)? {
            Known::Open(fd, kind) => return Ok((fd, kind)),
            Known::Closed(_) => {}
        }
        self.reopen(number)
    }

    /// The descriptor of a directory, to look something up in it.
    fn directory(&self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        let (fd, kind) = self.node(number)?;
        match kind {
            FileType::Directory => Ok(fd),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// Opens a file again by the way to it, from the nearest directory on that is open.
    fn reopen(&self, number: u64) -> Result<(Arc<OwnedFd>, FileType), Errno> {
        let mut way: Vec<(u64, Place)> = Vec::new();
        let (mut fd, mut kind) = {
            let mut nodes = self.nodes.lock();
            let mut at = number;
            loop {
                match nodes.get(at)? {
                    Known::Open(fd, kind) => break (fd, kind),
                    Known::Closed(place) if way.len() < MAX_DEPTH => {
                        let parent = place.parent;
                        way.push((at, place));
                        at = parent;
                    }
                    Known::Closed(_) => return Err(Errno::STALE),
                }
            }
        };
        while let Some((number, place)) = way.pop() {
            let name = Name::of(&place.name)?;
            if !self.is_visible(place.parent, name) {
                return Err(Errno::STALE);
            }
            let (found, _) = self
                .spare(|| host::find(&fd, name))
                .map_err(|error| match error {
                    Errno::NOENT | Errno::NOTDIR => Errno::STALE,
                    other => other,
                })?;
            kind = found.kind;
            fd = self.nodes.lock().reopened(number, found)?;
        }
        Ok((fd, kind))
    }

    /// Does what takes a descriptor; where the process has no more, those that it can do without are
    /// closed first.
    fn spare<T>(&self, open: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
        match open() {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.nodes.lock().shed();
                open()
            }
            result => result,
        }
    }

    fn handle(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.handles.lock().get(number)
    }

    /// Forgets the session: the guest's driver was reset.
    pub fn reset(&self) {
        self.handles.lock().clear();
        self.nodes.lock().clear();
    }

    /// Whether nothing may be changed.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// What a file is known by, where it is the one that a directory has under this name.
    fn is_at(&self, nodes: &Nodes, place: &Place, id: &FileId) -> bool {
        let Ok(name) = Name::of(&place.name) else {
            return false;
        };
        match nodes.directory_of(place) {
            Some(directory) => {
                host::stat_at(directory, name).is_ok_and(|stat| FileId::of(&stat) == *id)
            }
            // Closed as well: it is found when it is opened, or it isn't.
            None => true,
        }
    }

    /// Opens a file for its content or its entries.
    fn open_plain(
        &self,
        fd: impl AsFd,
        kind: FileType,
        flags: OFlags,
    ) -> Result<std::fs::File, Errno> {
        self.spare(|| self.links.open_plain(fd.as_fd(), kind, flags))
    }

    /// Takes hold of a directory's entry and counts a look-up.
    fn enter(&self, parent: u64, found: Found, name: Name<'_>) -> Result<u64, Errno> {
        let place = Place {
            parent,
            name: name.as_c_str().to_owned(),
        };
        self.nodes.lock().enter(found, place)
    }
}

impl Call<'_> {
    fn put(&mut self) -> &mut impl Put {
        self.reply
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Share")
            .field("options", &self.options)
            .field("owners", &self.owners)
            .finish_non_exhaustive()
    }
}
