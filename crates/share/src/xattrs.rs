//! Extended attributes: those of users. What the host keeps in others (ACLs, capabilities, labels) means
//! something to the host, and a guest has no say in it.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, XattrFlags, getxattr, listxattr, removexattr, setxattr};
use rustix::io::Errno;

use crate::host::Links;
use crate::wire::Put;
use crate::{Call, Share};

const USER: &[u8] = b"user.";
/// The most that a value, or a list of names, can have (`XATTR_SIZE_MAX`).
const MOST: usize = 64 << 10;

fn is_users(name: &CStr) -> Result<(), Errno> {
    match name.to_bytes().starts_with(USER) {
        true => Ok(()),
        false => Err(Errno::OPNOTSUPP),
    }
}

impl Share {
    /// A file that can have such attributes (xattr(7)).
    fn attributed(&self, call: &Call<'_>) -> Result<Arc<OwnedFd>, Errno> {
        match self.node(call.header.node)? {
            (fd, FileType::RegularFile | FileType::Directory) => Ok(fd),
            _ => Err(Errno::PERM),
        }
    }

    pub(crate) fn get_xattr(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let size = call.args.u32()?;
        call.args.skip(4)?;
        let name = call.args.string()?;
        is_users(name)?;
        let fd = self.attributed(call).map_err(|error| match error {
            Errno::PERM => Errno::NODATA,
            other => other,
        })?;
        let mut value = vec![0; MOST];
        let len = getxattr(Links::path(&fd), name, value.as_mut_slice())?;
        value.truncate(len);
        reply_sized(call, size, &value)
    }

    pub(crate) fn list_xattrs(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let size = call.args.u32()?;
        let Ok(fd) = self.attributed(call) else {
            return reply_sized(call, size, &[]);
        };
        let mut names = vec![0; MOST];
        let len = listxattr(Links::path(&fd), names.as_mut_slice())?;
        names.truncate(len);
        let names = names.split_inclusive(|byte| *byte == 0);
        let users: Vec<u8> = names
            .filter(|name| name.starts_with(USER))
            .flatten()
            .copied()
            .collect();
        reply_sized(call, size, &users)
    }

    pub(crate) fn set_xattr(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        self.must_be_writable()?;
        let (size, flags) = (call.args.u32()?, call.args.u32()?);
        let name = call.args.string()?;
        is_users(name)?;
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let value = call.args.0.get(..size).ok_or(Errno::INVAL)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let fd = self.attributed(call)?;
        setxattr(Links::path(&fd), name, value, flags)
    }

    pub(crate) fn remove_xattr(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        self.must_be_writable()?;
        let name = call.args.string()?;
        is_users(name)?;
        let fd = self.attributed(call)?;
        removexattr(Links::path(&fd), name)
    }
}

/// Answers with bytes, or, where no room is offered, with how many there are.
fn reply_sized(call: &mut Call<'_>, size: u32, bytes: &[u8]) -> Result<(), Errno> {
    if size == 0 {
        // No more than `MOST`.
        call.put().u32(bytes.len() as u32).u32(0);
        return Ok(());
    }
    if bytes.len() > size as usize {
        return Err(Errno::RANGE);
    }
    call.reply.extend_from_slice(bytes);
    Ok(())
}
