//! The protocol's bytes (FUSE 7.37, Linux `include/uapi/linux/fuse.h`): numbers in, numbers out.

use std::ffi::CStr;

use rustix::io::Errno;

/// Bytes of `struct fuse_in_header`.
pub const REQUEST_HEADER: usize = 40;
/// Bytes of `struct fuse_out_header`.
pub const REPLY_HEADER: usize = 16;
/// Bytes of `struct fuse_write_in`, behind which a write has its data.
pub const WRITE_ARGS: usize = 40;
/// Bytes of `struct fuse_entry_out`.
pub(crate) const ENTRY_LEN: usize = 128;
/// The longest name of a file.
const NAME_MAX: usize = 255;

macro_rules! opcodes {
    ($($name:ident = $number:literal,)*) => {
        /// What a request asks for (`enum fuse_opcode`).
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Opcode { $($name = $number,)* }

        impl Opcode {
            pub(crate) const fn of(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

// Locks are kept by the guest's kernel, which is told so in INIT and doesn't ask; FLUSH, ACCESS, IOCTL and the
// rest are answered "no such operation", after which the kernel does without.
opcodes! {
    Lookup = 1, Forget = 2, GetAttr = 3, SetAttr = 4, ReadLink = 5, Symlink = 6, MkNod = 8, MkDir = 9,
    Unlink = 10, RmDir = 11, Rename = 12, Link = 13, Open = 14, Read = 15, Write = 16, StatFs = 17,
    Release = 18, FSync = 20, SetXattr = 21, GetXattr = 22, ListXattr = 23, RemoveXattr = 24, Init = 26,
    OpenDir = 27, ReadDir = 28, ReleaseDir = 29, FSyncDir = 30, Create = 35, Interrupt = 36, Destroy = 38,
    BatchForget = 42, FAllocate = 43, ReadDirPlus = 44, Rename2 = 45, LSeek = 46, CopyFileRange = 47,
    SyncFs = 50, TmpFile = 51,
}

/// The first bytes of a request.
#[derive(Debug, Clone, Copy)]
pub struct RequestHeader {
    pub(crate) opcode: u32,
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl RequestHeader {
    /// Reads the header. What it says of its own length is of no use: the transport knows better.
    #[must_use]
    pub fn parse(bytes: &[u8; REQUEST_HEADER]) -> Self {
        let mut args = Args(bytes);
        // There are enough bytes for all of it.
        let mut u32 = || args.u32().unwrap_or_default();
        let (_len, opcode) = (u32(), u32());
        let mut u64 = || args.u64().unwrap_or_default();
        let (unique, node) = (u64(), u64());
        let mut u32 = || args.u32().unwrap_or_default();
        let (uid, gid) = (u32(), u32());
        Self {
            opcode,
            unique,
            node,
            uid,
            gid,
        }
    }

    fn is(&self, opcode: Opcode) -> bool {
        Opcode::of(self.opcode) == Some(opcode)
    }

    /// How many bytes of a request of `len` bytes come before data that need not be copied.
    #[must_use]
    pub fn args_end(&self, len: usize) -> usize {
        match self.is_write() {
            true => len.min(REQUEST_HEADER + WRITE_ARGS),
            false => len,
        }
    }

    /// Whether the answer is data that goes to the requester's own buffers, behind the header.
    #[must_use]
    pub fn fills_buffers(&self) -> bool {
        self.is(Opcode::Read)
    }

    /// Whether nobody waits for an answer.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.is(Opcode::Forget) || self.is(Opcode::BatchForget)
    }

    /// Whether this is a write, which may be quick ([`Share::writes_quickly`](crate::Share::writes_quickly)).
    #[must_use]
    pub fn is_write(&self) -> bool {
        self.is(Opcode::Write)
    }

    /// Whether the answer takes nothing but files that are open: no name, no right of an owner's, no
    /// wait for the host's disk. A thread that is confined to that can give it.
    #[must_use]
    pub fn is_quick(&self) -> bool {
        use Opcode::{BatchForget, Forget, LSeek, Read, Release, ReleaseDir};
        [Read, LSeek, Forget, BatchForget, Release, ReleaseDir]
            .iter()
            .any(|opcode| self.is(*opcode))
    }
}

/// What comes behind the header, read from front to back.
pub(crate) struct Args<'a>(pub(crate) &'a [u8]);

impl<'a> Args<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*first)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Errno> {
        self.take().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Errno> {
        self.take().map(u64::from_le_bytes)
    }

    pub(crate) fn skip(&mut self, bytes: usize) -> Result<(), Errno> {
        self.0 = self.0.get(bytes..).ok_or(Errno::INVAL)?;
        Ok(())
    }

    /// A string with its end.
    pub(crate) fn string(&mut self) -> Result<&'a CStr, Errno> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.skip(string.count_bytes() + 1)?;
        Ok(string)
    }

    /// The name of a directory's entry.
    pub(crate) fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::of(self.string()?)
    }
}

/// One component of a path, and none that leads elsewhere: not empty, no `/`, not `.` or `..`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    pub(crate) fn of(name: &'a CStr) -> Result<Self, Errno> {
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
            _ => Ok(Self(name)),
        }
    }

    pub(crate) const fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// Appends numbers to a reply.
pub(crate) trait Put {
    fn u16(&mut self, value: u16) -> &mut Self;
    fn u32(&mut self, value: u32) -> &mut Self;
    fn u64(&mut self, value: u64) -> &mut Self;
}

impl Put for Vec<u8> {
    fn u16(&mut self, value: u16) -> &mut Self {
        self.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.extend_from_slice(&value.to_le_bytes());
        self
    }
}

bitflags::bitflags! {
    /// Abilities that the two sides of a session agree on (`FUSE_INIT` flags).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct InitFlags: u32 {
        const ASYNC_READ = 1 << 0;
        const ATOMIC_O_TRUNC = 1 << 3;
        const BIG_WRITES = 1 << 5;
        const AUTO_INVAL_DATA = 1 << 12;
        const DO_READDIRPLUS = 1 << 13;
        const READDIRPLUS_AUTO = 1 << 14;
        const ASYNC_DIO = 1 << 15;
        const PARALLEL_DIROPS = 1 << 18;
        const MAX_PAGES = 1 << 22;
        const HANDLE_KILLPRIV_V2 = 1 << 28;
    }

    /// What an attribute change changes (`FATTR_*`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct SetAttr: u32 {
        const MODE = 1 << 0;
        const UID = 1 << 1;
        const GID = 1 << 2;
        const SIZE = 1 << 3;
        const ATIME = 1 << 4;
        const MTIME = 1 << 5;
        const FH = 1 << 6;
        const ATIME_NOW = 1 << 7;
        const MTIME_NOW = 1 << 8;
        const KILL_SUIDGID = 1 << 11;
        const _ = !0;
    }
}

/// The guest's cache of an open file stays (`FOPEN_KEEP_CACHE`).
pub(crate) const OPEN_KEEP_CACHE: u32 = 1 << 1;
/// An open takes away set-user-id and set-group-id (`FUSE_OPEN_KILL_SUIDGID`).
pub(crate) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// A write does (`FUSE_WRITE_KILL_SUIDGID`).
pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// Only data need be durable (`FUSE_FSYNC_FDATASYNC`).
pub(crate) const FSYNC_DATA: u32 = 1 << 0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_component() {
        for bad in [c"", c".", c"..", c"/", c"a/b", c"../x", c"/etc"] {
            assert_eq!(Name::of(bad), Err(Errno::INVAL), "{bad:?}");
        }
        for good in [c"a", c"...", c"..a", c" ", c"a\nb", c"-"] {
            assert!(Name::of(good).is_ok(), "{good:?}");
        }
        let long = std::ffi::CString::new(vec![b'a'; 256]).unwrap();
        assert_eq!(Name::of(&long), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn arguments_end_where_the_request_does() {
        let mut args = Args(b"\x01\0\0\0name\0rest");
        assert_eq!(args.u32(), Ok(1));
        assert_eq!(args.string(), Ok(c"name"));
        assert_eq!(args.string(), Err(Errno::INVAL));
        assert_eq!(args.u64(), Err(Errno::INVAL));
        assert_eq!(args.skip(5), Err(Errno::INVAL));
    }
}
