//! The host's files, reached by descriptors only.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, SystemTime};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, Statx, StatxFlags, StatxTimestamp, openat, statx,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use crate::wire::Name;

/// A file's timestamps may be too coarse to show a change that comes this soon after another one.
const COARSE: Duration = Duration::from_secs(2);

/// What a file is known by as long as it exists. The time of birth tells it from one that got the same
/// number later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FileId {
    device: (u32, u32),
    inode: u64,
    birth: (i64, u32),
}

impl FileId {
    pub(crate) fn of(stat: &Statx) -> Self {
        Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            birth: (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec),
        }
    }
}

/// What changes with a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    modified: (i64, u32),
    changed: (i64, u32),
    size: u64,
}

impl Seen {
    /// `None` where a change just now might not show.
    pub(crate) fn of(stat: &Statx) -> Option<Self> {
        let pair = |time: &StatxTimestamp| (time.tv_sec, time.tv_nsec);
        let since = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .ok()?;
        let settled = since.checked_sub(COARSE)?.as_secs();
        let changed = u64::try_from(stat.stx_ctime.tv_sec).ok()?;
        (changed < settled).then(|| Self {
            modified: pair(&stat.stx_mtime),
            changed: pair(&stat.stx_ctime),
            size: stat.stx_size,
        })
    }
}

/// An `O_PATH` descriptor and what it stands for.
pub(crate) struct Found {
    pub(crate) fd: OwnedFd,
    pub(crate) kind: FileType,
    pub(crate) id: FileId,
}

fn wanted() -> StatxFlags {
    StatxFlags::BASIC_STATS | StatxFlags::BTIME
}

/// The attributes of an open file.
pub(crate) fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    statx(
        fd,
        c"",
        AtFlags::EMPTY_PATH | AtFlags::STATX_SYNC_AS_STAT,
        wanted(),
    )
}

/// The attributes of a directory's entry.
pub(crate) fn stat_at(directory: impl AsFd, name: Name<'_>) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_SYNC_AS_STAT;
    statx(directory, name.as_c_str(), flags, wanted())
}

pub(crate) fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

/// Whether no directory has the file.
pub(crate) fn is_nameless(fd: impl AsFd) -> bool {
    stat(fd).is_ok_and(|stat| stat.stx_nlink == 0)
}

/// Takes hold of a directory's entry, whatever it is. One component without following a link leads
/// nowhere but into the directory (openat(2), `O_PATH` with `O_NOFOLLOW`); a special file isn't opened.
pub(crate) fn find(directory: impl AsFd, name: Name<'_>) -> Result<(Found, Statx), Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = openat(directory, name.as_c_str(), flags, Mode::empty())?;
    let stat = stat(&fd)?;
    let found = Found {
        fd,
        kind: kind(&stat),
        id: FileId::of(&stat),
    };
    Ok((found, stat))
}

/// Takes hold of a file that this process opened itself.
pub(crate) fn hold(links: &Links, file: impl AsFd) -> Result<(Found, Statx), Errno> {
    let fd = links.open(file, OFlags::PATH)?;
    let stat = stat(&fd)?;
    let found = Found {
        fd,
        kind: kind(&stat),
        id: FileId::of(&stat),
    };
    Ok((found, stat))
}

/// The process's own descriptors as files (`/proc/self/fd`): the way from an `O_PATH` descriptor to one
/// that can be read, which goes by no name.
#[derive(Debug)]
pub(crate) struct Links(OwnedFd);

impl Links {
    pub(crate) fn new() -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat(CWD, c"/proc/self/fd", flags, Mode::empty()).map(Self)
    }

    pub(crate) fn folder(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Opens again what a descriptor stands for. Never waits, as a FIFO would.
    pub(crate) fn open(&self, fd: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        openat(&self.0, DecInt::from_fd(fd), flags, Mode::empty())
    }

    /// The path of a descriptor, for calls that take nothing else.
    pub(crate) fn path(fd: impl AsFd) -> String {
        format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
    }

    /// Opens again a regular file or a directory, and nothing else: the host's devices, FIFOs and
    /// sockets are none of the guest's business.
    pub(crate) fn open_plain(
        &self,
        fd: impl AsFd,
        kind: FileType,
        flags: OFlags,
    ) -> Result<File, Errno> {
        match kind {
            FileType::RegularFile => {}
            FileType::Directory => {}
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        self.open(fd, flags).map(File::from)
    }
}

/// The bits of new files that this process takes away.
pub(crate) fn umask() -> u32 {
    // Asking by umask(2) would set it, for all threads.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    let mask = line.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok());
    // Not known: modes are always set again.
    mask.unwrap_or(0o777)
}

/// Opens a folder to share.
pub(crate) fn open_folder(path: &CStr) -> Result<(Found, Statx), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = openat(CWD, path, flags, Mode::empty())?;
    let stat = stat(&fd)?;
    let found = Found {
        fd,
        kind: kind(&stat),
        id: FileId::of(&stat),
    };
    Ok((found, stat))
}
