//! Open files and their content.

use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom, openat};
use rustix::io::Errno;
use skerry_storage::{IoBuf, IoBufMut, read_file, write_file};

use crate::host::{self, Seen};
use crate::wire::{
    Args, FSYNC_DATA, Name, OPEN_KEEP_CACHE, OPEN_KILL_SUIDGID, Put, WRITE_ARGS, WRITE_KILL_SUIDGID,
};
use crate::{Call, Share};

const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

/// What counts of open(2)'s flags on the host. Append stays: a file that host and guest both append to
/// loses nothing. Direct I/O is between the guest and its cache.
const KEPT: OFlags = OFlags::RWMODE
    .union(OFlags::APPEND)
    .union(OFlags::TRUNC)
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC);

pub(crate) fn host_flags(guest: u32) -> OFlags {
    OFlags::from_bits_retain(guest) & KEPT
}

/// Whether files are changed that are opened so.
pub(crate) fn writes(flags: OFlags) -> bool {
    flags & OFlags::RWMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC)
}

/// An error of the host's as the guest gets it.
fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

impl Share {
    pub(crate) fn open_file(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let (asked, open_flags) = (call.args.u32()?, call.args.u32()?);
        let flags = host_flags(asked);
        if writes(flags) {
            self.must_be_writable()?;
        }
        let node = call.header.node;
        let (fd, kind) = self.node(node)?;
        if kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        let file = self.open_plain(&fd, kind, flags)?;
        if open_flags & OPEN_KILL_SUIDGID != 0 {
            self.kill_privileges(&file)?;
        }
        let now = Seen::of(&host::stat(&file)?);
        let unchanged = self.nodes.lock().opens(node, now);
        let handle = self.handles.lock().add(file, node, flags.bits(), false)?;
        let keep = if unchanged { OPEN_KEEP_CACHE } else { 0 };
        call.put().u64(handle).u32(keep).u32(0);
        Ok(())
    }

    pub(crate) fn create(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        self.must_be_changeable(call.header.node)?;
        let (asked, mode) = (call.args.u32()?, call.args.u32()?);
        let (_umask, open_flags) = (call.args.u32()?, call.args.u32()?);
        let name = call.args.name()?;
        let directory = self.directory(call.header.node)?;
        let flags = host_flags(asked);
        let exclusive = OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC
            | (flags - OFlags::TRUNC);
        let permissions = Mode::from_raw_mode(mode & 0o7777);
        // Exclusive, so that nothing that is there already is opened: it might be a FIFO, or a link.
        match self.spare(|| openat(&directory, name.as_c_str(), exclusive, permissions)) {
            Ok(fd) => {
                let file = std::fs::File::from(fd);
                let finished = self.finish(call, &directory, &file, mode & 0o7777);
                finished.inspect_err(|_| {
                    let none = rustix::fs::AtFlags::empty();
                    let _ = rustix::fs::unlinkat(&directory, name.as_c_str(), none);
                })?;
                self.tell_created(call, name, file, flags)
            }
            Err(Errno::EXIST) if asked & OFlags::EXCL.bits() == 0 => {
                let (found, _) = self.spare(|| host::find(&directory, name))?;
                if found.kind == FileType::Directory {
                    return Err(Errno::ISDIR);
                }
                let file = self.open_plain(&found.fd, found.kind, flags)?;
                if open_flags & OPEN_KILL_SUIDGID != 0 {
                    self.kill_privileges(&file)?;
                }
                self.tell_created(call, name, file, flags)
            }
            Err(error) => Err(error),
        }
    }

    /// A file that no directory has, until it is linked into one (open(2), `O_TMPFILE`).
    pub(crate) fn create_nameless(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        self.must_be_changeable(call.header.node)?;
        let (asked, mode) = (call.args.u32()?, call.args.u32()?);
        let directory = self.directory(call.header.node)?;
        let flags = host_flags(asked) - OFlags::TRUNC;
        let permissions = Mode::from_raw_mode(mode & 0o7777);
        let how = flags | OFlags::TMPFILE | OFlags::CLOEXEC;
        let open = || openat(&directory, c".", how, permissions);
        let file = std::fs::File::from(self.spare(open)?);
        self.finish(call, &directory, &file, mode & 0o7777)?;
        // Not the name of anything: such a file is lost with its session.
        let name = Name::of(c"(nameless)")?;
        self.tell_created(call, name, file, flags)
    }

    fn tell_created(
        &self,
        call: &mut Call<'_>,
        name: Name<'_>,
        file: std::fs::File,
        flags: OFlags,
    ) -> Result<(), Errno> {
        let (found, stat) = self.spare(|| host::hold(&self.links, &file))?;
        let node = self.enter(call.header.node, found, name)?;
        let added = self.handles.lock().add(file, node, flags.bits(), false);
        let handle = added.inspect_err(|_| self.nodes.lock().forget(node, 1))?;
        self.put_entry(call.reply, node, &stat);
        call.put().u64(handle).u64(0);
        Ok(())
    }

    pub(crate) fn release(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let handle = call.args.u64()?;
        self.handles.lock().remove(handle);
        Ok(())
    }

    pub(crate) fn read(&self, call: &mut Call<'_>, room: &[IoBufMut<'_>]) -> Result<usize, Errno> {
        let (handle, offset, size) = (call.args.u64()?, call.args.u64()?, call.args.u32()?);
        let handle = self.handle(handle)?;
        let file = handle.regular()?;
        let offered: usize = room.iter().map(IoBufMut::len).sum();
        if (size as usize) < offered {
            // More room than was asked for: not what a kernel does, and not to be filled.
            return Err(Errno::INVAL);
        }
        read_file(file, room, offset).map_err(|error| errno(&error))
    }

    /// Whether a write is as good on a thread that has no rights and must not wait for the host's disk,
    /// by its arguments.
    #[must_use]
    pub fn writes_quickly(&self, args: &[u8; WRITE_ARGS]) -> bool {
        let mut args = Args(args);
        let asked = (|| {
            let (handle, _, _) = (args.u64()?, args.u64()?, args.u32()?);
            let flags = args.u32()?;
            let handle = self.handle(handle)?;
            let plain = !handle.is_synchronous() && flags & WRITE_KILL_SUIDGID == 0;
            Ok::<_, Errno>(plain && !Self::has_privileges(handle.regular()?)?)
        })();
        // What is wrong with it is told by whoever answers it.
        asked.unwrap_or(true)
    }

    pub(crate) fn write(&self, call: &mut Call<'_>, data: &[IoBuf<'_>]) -> Result<(), Errno> {
        self.must_be_writable()?;
        let (handle, offset, size) = (call.args.u64()?, call.args.u64()?, call.args.u32()?);
        let flags = call.args.u32()?;
        let handle = self.handle(handle)?;
        let file = handle.regular()?;
        let given: usize = data.iter().map(IoBuf::len).sum();
        if size as usize != given {
            return Err(Errno::INVAL);
        }
        let written = write_file(file, data, offset).map_err(|error| errno(&error))?;
        if flags & WRITE_KILL_SUIDGID != 0 {
            self.kill_privileges(file)?;
        }
        // No more than was given.
        call.put().u32(written as u32).u32(0);
        Ok(())
    }

    pub(crate) fn sync(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let (handle, flags) = (call.args.u64()?, call.args.u32()?);
        let handle = self.handle(handle)?;
        match flags & FSYNC_DATA {
            0 => rustix::fs::fsync(handle.file()?),
            _ => rustix::fs::fdatasync(handle.file()?),
        }
    }

    pub(crate) fn sync_all(&self) -> Result<(), Errno> {
        let (root, kind) = self.node(crate::nodes::ROOT)?;
        let root = self.open_plain(&root, kind, OFlags::RDONLY | OFlags::DIRECTORY)?;
        rustix::fs::syncfs(&root)
    }

    pub(crate) fn allocate(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        self.must_be_writable()?;
        let (handle, offset, len) = (call.args.u64()?, call.args.u64()?, call.args.u64()?);
        let mode = FallocateFlags::from_bits_retain(call.args.u32()?);
        let handle = self.handle(handle)?;
        let file = handle.regular()?;
        rustix::fs::fallocate(file, mode, offset, len)?;
        self.kill_privileges(file.as_fd())
    }

    pub(crate) fn seek(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let (handle, offset, whence) = (call.args.u64()?, call.args.u64()?, call.args.u32()?);
        let to = match whence {
            SEEK_DATA => SeekFrom::Data(offset),
            SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        let handle = self.handle(handle)?;
        // Transfers have offsets of their own: where the file stands is of no consequence.
        let at = rustix::fs::seek(handle.regular()?, to)?;
        call.put().u64(at);
        Ok(())
    }

    pub(crate) fn copy_range(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        self.must_be_writable()?;
        let args = &mut call.args;
        let (from, mut from_at, _) = (args.u64()?, args.u64()?, args.u64()?);
        let (to, mut to_at, len) = (args.u64()?, args.u64()?, args.u64()?);
        let (from, to) = (self.handle(from)?, self.handle(to)?);
        // What fits the answer; whoever asked goes on from there.
        let len = usize::try_from(len.min(1 << 30)).unwrap_or(1 << 30);
        let (from, to) = (from.regular()?, to.regular()?);
        let copied =
            rustix::fs::copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), len)?;
        call.put().u32(copied as u32).u32(0);
        Ok(())
    }
}
