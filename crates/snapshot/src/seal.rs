//! The seal: this host's note of which blobs it has verified, so that opening a snapshot again
//! doesn't read all of its memory.
//!
//! A seal records for each bulky blob what the file system says of its file. A file changed since
//! has another change time, which no program can set. A file copied or restored from a backup has
//! another inode. Whatever doesn't fit, down to a seal that makes no sense, means only that
//! everything is hashed again. The seal is no part of the content and doesn't travel.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::Digest;

pub(crate) const FILE: &str = "seal.json";
const VERSION: u32 = 1;
/// A snapshot has few blobs; each takes some 200 bytes.
const SIZE_MAX: u64 = 1 << 20;
/// Longer than any clock tick.
const SETTLING_MAX: Duration = Duration::from_millis(100);

/// What the file system says of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Stamp {
    size: u64,
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// The content of `seal.json`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Seal {
    version: u32,
    manifest: Digest,
    /// The boot within which it holds, when the files may not have reached the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    boot: Option<String>,
    blobs: BTreeMap<Digest, Stamp>,
}

impl Stamp {
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Stamp {
            size: metadata.size(),
            inode: metadata.ino(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    /// Waits until a further change would get another change time: the kernel takes it from a
    /// clock that moves by ticks. False when that doesn't come about.
    pub(crate) fn settle(&self) -> bool {
        let start = Instant::now();
        loop {
            // Read before the look at the clock: on a busy host, much time may pass between.
            let late = start.elapsed() > SETTLING_MAX;
            let now = clock_gettime(ClockId::RealtimeCoarse);
            if (now.tv_sec, now.tv_nsec) > self.changed {
                return true;
            }
            if late {
                return false;
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }
}

fn this_boot() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

impl Seal {
    /// A seal; `durable` says that the files are known to be on the disk itself.
    pub(crate) fn new(manifest: Digest, blobs: BTreeMap<Digest, Stamp>, durable: bool) -> Self {
        let boot = (!durable).then(|| this_boot().unwrap_or_default());
        Seal {
            version: VERSION,
            manifest,
            boot,
            blobs,
        }
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }

    /// Reads the seal of a snapshot, if it has one that could be this user's.
    pub(crate) fn load(dir: &File) -> Option<Self> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(openat(dir, FILE, flags, Mode::empty()).ok()?);
        let metadata = file.metadata().ok()?;
        let own = [0, rustix::process::geteuid().as_raw()].contains(&metadata.uid());
        if !metadata.is_file() || !own || metadata.mode() & 0o022 != 0 {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(SIZE_MAX).read_to_end(&mut bytes).ok()?;
        Self::decode(&bytes)
    }

    /// Whether it vouches for just these blobs.
    pub(crate) fn covers(&self, manifest: Digest, blobs: &BTreeMap<Digest, Stamp>) -> bool {
        self.version == VERSION
            && self.manifest == manifest
            && self.blobs == *blobs
            && self
                .boot
                .as_ref()
                .is_none_or(|boot| !boot.is_empty() && this_boot().as_ref() == Some(boot))
    }

    /// Writes it. A reader that sees half of it verifies.
    pub(crate) fn store(&self, dir: &File, durable: bool) -> io::Result<()> {
        // Anew, not over what is there, which may be anything and anyone's.
        match unlinkat(dir, FILE, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let mut file = File::from(openat(dir, FILE, flags, mode)?);
        file.write_all(&serde_json::to_vec(self)?)?;
        if durable {
            file.sync_data()?;
        }
        Ok(())
    }
}
