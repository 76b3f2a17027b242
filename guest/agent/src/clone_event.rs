//! Telling the guest's programs that they have been cloned: the file [`PATH`].
//!
//! A program that holds random state, unique names or connections watches the directory with inotify
//! for a file that is moved in, and reads it (docs/src/guest.md). Every clone's file is another, and
//! is there before any of its programs runs again.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;

/// The directory.
const DIRECTORY: &str = "/run/skerry";

/// The file; there is none in a guest that was booted.
pub const PATH: &str = "/run/skerry/clone";

/// Name of the file and of the next one until it is whole.
const NAME: &str = "clone";
const UNFINISHED: &str = ".clone";

/// The writer of the file.
#[derive(Debug)]
pub struct CloneEvents {
    /// Held, so that a workload which mounts something over it meets no stale file later.
    directory: OwnedFd,
    /// How often this guest, and what it was cloned from, has been cloned.
    generation: u64,
}

impl CloneEvents {
    /// Makes the directory, in memory, so that it works in a read-only root and wears no disk.
    pub fn set_up() -> io::Result<Self> {
        fs::create_dir_all(DIRECTORY)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("tmpfs", DIRECTORY, "tmpfs", flags, c"mode=0755,size=64k")?;
        Self::at(DIRECTORY)
    }

    /// Writes into an existing directory.
    pub fn at(directory: impl rustix::path::Arg) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            directory: rustix::fs::open(directory, flags, Mode::empty())?,
            generation: 0,
        })
    }

    /// Writes down that this guest is a new clone. Its random generator has to be its own by now.
    pub fn record(&mut self) -> io::Result<()> {
        self.generation += 1;
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
        let time = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let text = format!(
            "generation {}\nid {:032x}\ntime {}\n",
            self.generation,
            u128::from_be_bytes(id),
            time.as_nanos()
        );
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o644);
        let file = rustix::fs::openat(&self.directory, UNFINISHED, flags, mode)?;
        File::from(file).write_all(text.as_bytes())?;
        rustix::fs::renameat(&self.directory, UNFINISHED, &self.directory, NAME)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_record_is_another_generation_and_id_in_a_file_that_replaces_the_last() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().unwrap();
        let mut events = CloneEvents::at(directory.path()).unwrap();
        let path = directory.path().join(NAME);
        assert!(!path.exists());
        let mut ids = Vec::new();
        let mut held = Vec::new();
        for generation in 1..=3u64 {
            events.record().unwrap();
            let text = fs::read_to_string(&path).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            assert_eq!(lines.len(), 3);
            assert_eq!(lines[0], format!("generation {generation}"));
            let id = lines[1].strip_prefix("id ").unwrap();
            assert!(id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()));
            ids.push(id.to_owned());
            let time: u128 = lines[2].strip_prefix("time ").unwrap().parse().unwrap();
            assert!(time > 1_600_000_000_000_000_000);
            // Held open, so that its number isn't used again.
            held.push(File::open(&path).unwrap());
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        }
        ids.dedup();
        assert_eq!(ids.len(), 3);
        let mut inodes: Vec<u64> = held.iter().map(|f| f.metadata().unwrap().ino()).collect();
        inodes.dedup();
        assert_eq!(inodes.len(), 3);
    }
}
