//! Locks between processes: `flock` on a file, gone with its holder however that one ends.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// A lock that is held.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "held for its lock")] File);

fn open(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
}

fn attempt(file: File) -> io::Result<Option<Lock>> {
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(Lock(file))),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl Lock {
    /// Waits until nobody else holds the lock.
    pub(crate) fn exclusive(path: &Path) -> io::Result<Lock> {
        let file = open(path)?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))?;
        Ok(Lock(file))
    }

    /// Takes the lock unless somebody else holds it.
    pub(crate) fn try_exclusive(path: &Path) -> io::Result<Option<Lock>> {
        attempt(open(path)?)
    }

    /// As [`Lock::try_exclusive`], on a file that must exist.
    pub(crate) fn try_existing(path: &Path) -> io::Result<Option<Lock>> {
        attempt(File::open(path)?)
    }

    /// Holds a file as one of several users.
    pub(crate) fn shared(path: &Path) -> io::Result<Lock> {
        let file = File::open(path)?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockShared))?;
        Ok(Lock(file))
    }
}
