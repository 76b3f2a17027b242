//! Attributes: GETATTR, SETATTR, STATFS, and how they are told.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
    chmodat, chownat, ftruncate, utimensat,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use crate::wire::{Put, SetAttr};
use crate::{Call, Share, VALID, host};

/// Set-user-id, set-group-id, and the group's right to execute.
const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o010;
const PERMISSIONS: u32 = 0o7777;

/// The number of a device as the guest's kernel packs it (`new_encode_dev`).
const fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

impl Share {
    /// Appends a `struct fuse_attr`.
    pub(crate) fn put_attributes(&self, reply: &mut Vec<u8>, stat: &Statx) {
        // Seconds before 1970 are negative numbers in the same bits.
        let put = reply
            .u64(stat.stx_ino)
            .u64(stat.stx_size)
            .u64(stat.stx_blocks);
        put.u64(stat.stx_atime.tv_sec as u64)
            .u64(stat.stx_mtime.tv_sec as u64)
            .u64(stat.stx_ctime.tv_sec as u64)
            .u32(stat.stx_atime.tv_nsec)
            .u32(stat.stx_mtime.tv_nsec)
            .u32(stat.stx_ctime.tv_nsec)
            .u32(stat.stx_mode.into())
            .u32(stat.stx_nlink)
            .u32(self.owners.user_shown(stat.stx_uid))
            .u32(self.owners.group_shown(stat.stx_gid))
            .u32(device_number(stat.stx_rdev_major, stat.stx_rdev_minor))
            .u32(stat.stx_blksize)
            .u32(0);
    }

    /// Appends a `struct fuse_entry_out`.
    pub(crate) fn put_entry(&self, reply: &mut Vec<u8>, node: u64, stat: &Statx) {
        // Numbers are never used again, so the generation stays 0.
        let put = reply.u64(node).u64(0);
        put.u64(VALID.as_secs()).u64(VALID.as_secs());
        put.u32(VALID.subsec_nanos()).u32(VALID.subsec_nanos());
        self.put_attributes(reply, stat);
    }

    fn put_attr_out(&self, call: &mut Call<'_>, stat: &Statx) {
        call.put()
            .u64(VALID.as_secs())
            .u32(VALID.subsec_nanos())
            .u32(0);
        self.put_attributes(call.reply, stat);
    }

    pub(crate) fn get_attributes(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let (fd, _) = self.node(call.header.node)?;
        let stat = host::stat(&fd)?;
        self.put_attr_out(call, &stat);
        Ok(())
    }

    pub(crate) fn set_attributes(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        self.must_be_writable()?;
        let args = &mut call.args;
        let valid = SetAttr::from_bits_retain(args.u32()?);
        args.skip(4)?;
        let (handle, size) = (args.u64()?, args.u64()?);
        args.skip(8)?;
        let (atime, mtime, _ctime) = (args.u64()?, args.u64()?, args.u64()?);
        let (atime_nanos, mtime_nanos, _) = (args.u32()?, args.u32()?, args.u32()?);
        let mode = args.u32()?;
        args.skip(4)?;
        let (user, group) = (args.u32()?, args.u32()?);
        let (fd, kind) = self.node(call.header.node)?;
        if valid.contains(SetAttr::MODE) {
            self.change_mode(&fd, mode)?;
        }
        if valid.intersects(SetAttr::UID | SetAttr::GID) {
            let user = valid.contains(SetAttr::UID).then_some(user);
            let group = valid.contains(SetAttr::GID).then_some(group);
            let user = user.map(|user| self.owners.user_meant(user));
            change_owner(&fd, user, group.map(|group| self.owners.group_meant(group)))?;
        }
        if valid.contains(SetAttr::SIZE) {
            let handle = valid.contains(SetAttr::FH).then_some(handle);
            self.truncate(&fd, kind, handle, size)?;
            if valid.contains(SetAttr::KILL_SUIDGID) {
                self.kill_privileges(&fd)?;
            }
        }
        if valid.intersects(SetAttr::ATIME | SetAttr::MTIME) {
            let time = |wanted: SetAttr, now: SetAttr, seconds: u64, nanos: u32| {
                let tv_nsec = match (valid.contains(wanted), valid.contains(now)) {
                    (false, _) => UTIME_OMIT,
                    (true, true) => UTIME_NOW,
                    (true, false) => nanos.min(999_999_999).into(),
                };
                Timespec {
                    tv_sec: seconds as i64,
                    tv_nsec,
                }
            };
            let times = Timestamps {
                last_access: time(SetAttr::ATIME, SetAttr::ATIME_NOW, atime, atime_nanos),
                last_modification: time(SetAttr::MTIME, SetAttr::MTIME_NOW, mtime, mtime_nanos),
            };
            utimensat(
                self.links.folder(),
                DecInt::from_fd(&fd),
                &times,
                AtFlags::empty(),
            )?;
        }
        let stat = host::stat(&fd)?;
        self.put_attr_out(call, &stat);
        Ok(())
    }

    fn truncate(
        &self,
        fd: &OwnedFd,
        kind: FileType,
        handle: Option<u64>,
        size: u64,
    ) -> Result<(), Errno> {
        if let Some(handle) = handle {
            return ftruncate(self.handle(handle)?.regular()?, size);
        }
        match kind {
            FileType::RegularFile => ftruncate(self.open_plain(fd, kind, OFlags::WRONLY)?, size),
            FileType::Directory => Err(Errno::ISDIR),
            _ => Err(Errno::INVAL),
        }
    }

    fn change_mode(&self, fd: impl AsFd, mode: u32) -> Result<(), Errno> {
        let mode = Mode::from_raw_mode(mode & PERMISSIONS);
        chmodat(
            self.links.folder(),
            DecInt::from_fd(fd),
            mode,
            AtFlags::empty(),
        )
    }

    /// Takes away what a change by somebody without the right to keep it takes away (Linux,
    /// `setattr_should_drop_suidgid`).
    pub(crate) fn kill_privileges(&self, fd: impl AsFd) -> Result<(), Errno> {
        let mode = u32::from(host::stat(fd.as_fd())?.stx_mode);
        let mut lost = SET_UID;
        if mode & GROUP_EXECUTE != 0 {
            lost |= SET_GID;
        }
        match mode & lost {
            0 => Ok(()),
            _ => self.change_mode(fd, mode & !lost),
        }
    }

    /// Whether a file has modes that writing takes away, on threads without the right to leave them.
    pub(crate) fn has_privileges(fd: impl AsFd) -> Result<bool, Errno> {
        let mode = u32::from(host::stat(fd.as_fd())?.stx_mode);
        Ok(mode & (SET_UID | SET_GID) != 0)
    }

    /// Gives a new file the owner and the mode that its maker meant; the host gave it this process's.
    pub(crate) fn finish(
        &self,
        call: &Call<'_>,
        directory: impl AsFd,
        fd: impl AsFd,
        mode: u32,
    ) -> Result<(), Errno> {
        let (user, group) = (call.header.uid, call.header.gid);
        let given = self.owners == crate::owner::Owners::Same && (user, group) != (0, 0);
        if given {
            // A directory with set-group-id has given its group already (inode(7)).
            let inherits = u32::from(host::stat(directory)?.stx_mode) & SET_GID != 0;
            change_owner(fd.as_fd(), Some(user), (!inherits).then_some(group))?;
        }
        // A change of owner takes these away.
        let lost = given && mode & (SET_UID | SET_GID) != 0;
        if lost || mode & self.umask != 0 {
            let stat = host::stat(fd.as_fd())?;
            let inherited = match host::kind(&stat) {
                FileType::Directory => u32::from(stat.stx_mode) & SET_GID,
                FileType::Symlink => return Ok(()),
                _ => 0,
            };
            self.change_mode(fd, mode | inherited)?;
        }
        Ok(())
    }

    pub(crate) fn stat_fs(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let (fd, _) = self.node(call.header.node)?;
        let stat = rustix::fs::fstatvfs(&fd)?;
        // Sizes of blocks are small numbers; the last is the longest name.
        let put = call
            .put()
            .u64(stat.f_blocks)
            .u64(stat.f_bfree)
            .u64(stat.f_bavail);
        put.u64(stat.f_files).u64(stat.f_ffree);
        put.u32(stat.f_bsize as u32)
            .u32(stat.f_namemax as u32)
            .u32(stat.f_frsize as u32);
        call.reply.resize(crate::REPLY_HEADER + 80, 0);
        Ok(())
    }
}

fn change_owner(fd: impl AsFd, user: Option<u32>, group: Option<u32>) -> Result<(), Errno> {
    let user = user.map(Uid::from_raw);
    let group = group.map(Gid::from_raw);
    chownat(fd, c"", user, group, AtFlags::EMPTY_PATH)
}
