//! Overlays that outlive their process: files with names, each of which says what it has.
//!
//! ```text
//!   disk-0   clusters, each at its place │ a bit for each: what the disk began with, and was written
//!   disk-1   what was written since the first freeze     │ bits
//!   …        the last is the top
//! ```
//! A bit is written before the guest is told that its write is done, and after the bytes. Both are in
//! the host's page cache then: a process that is killed leaves what a disk would have after its power
//! was cut. Bits are never taken away: a cluster that is discarded is a hole, which reads as the zeros
//! that it would be without a bit, too, unless a file below has something there.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::present::Present;
use super::{Overlay, by_zone};
use crate::layer::{CLUSTER_SIZE, Layer, LayerRun};
use crate::transfer::Stopped;
use crate::{DiskError, OVERLAY_MAX, SECTOR_SIZE, sys};

const NAME: &str = "disk-";
/// A file that never became one of the disk's.
const STAGED: &str = ".disk-new";

/// What the top has, as the file itself says.
pub(super) struct Noted {
    number: u64,
    present: Present,
    /// Where the bits begin.
    at: u64,
}

fn failed(folder: &Path) -> impl Fn(io::Error) -> DiskError {
    move |source| DiskError::Scratch {
        dir: folder.to_owned(),
        source,
    }
}

fn path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{NAME}{number}"))
}

/// The numbers of the files in a folder, ascending.
fn numbers(folder: &Path) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(NAME));
        found.extend(number.and_then(|number| number.parse::<u64>().ok()));
    }
    found.sort_unstable();
    Ok(found)
}

/// Where the bits begin, and the length of the file with them.
fn lengths(size: u64) -> (u64, u64) {
    let at = size.next_multiple_of(CLUSTER_SIZE);
    let words = at.div_ceil(CLUSTER_SIZE * u64::from(u64::BITS));
    (at, at + words * 8)
}

/// Whether the file system can take space away from a file: tried behind its end.
fn has_holes(file: &File, size: u64) -> bool {
    let behind = lengths(size).1.next_multiple_of(CLUSTER_SIZE);
    sys::punch_hole(file, behind, CLUSTER_SIZE).is_ok()
}

/// Makes an empty file that has no number yet.
fn stage(folder: &Path, size: u64) -> io::Result<File> {
    let staged = folder.join(STAGED);
    match fs::remove_file(&staged) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&staged)?;
    file.set_len(lengths(size).1)?;
    Ok(file)
}

/// Lets the file that was staged be one of the disk's.
fn publish(folder: &Path, number: u64) -> io::Result<()> {
    fs::rename(folder.join(STAGED), path(folder, number))
}

impl Noted {
    fn new(number: u64, size: u64) -> Self {
        Self {
            number,
            present: Present::new(size),
            at: lengths(size).0,
        }
    }

    /// Notes in the file that a range of whole clusters is there.
    pub(super) fn set(&self, file: &File, range: Range<u64>) -> Result<(), Stopped> {
        for part in by_zone(range) {
            let Some(zone) = self.present.zone(part.start) else {
                continue;
            };
            if zone.has_all(&part) {
                continue;
            }
            // One at a time: bits that are neighbours are written together.
            let _alone = zone.lock.write();
            zone.set(part.clone());
            let (at, bytes) = zone.bytes(&part);
            if let Err(source) = file.write_all_at(&bytes, self.at + at) {
                zone.clear(part.clone());
                let offset = part.start;
                return Err(Stopped { offset, source });
            }
        }
        Ok(())
    }

    /// A new top, over this one.
    pub(super) fn next(&self, folder: &Path, size: u64) -> Result<(Arc<File>, Self), DiskError> {
        let number = self.number + 1;
        let make = || {
            let file = stage(folder, size)?;
            publish(folder, number)?;
            Ok(Arc::new(file))
        };
        let file = make().map_err(failed(folder))?;
        Ok((file, Self::new(number, size)))
    }

    /// What a file says that it has, which may be anybody's: no more than the disk's own clusters.
    fn read(&self, file: &File, size: u64) -> io::Result<()> {
        let mut at = self.at;
        let end = lengths(size).1;
        let mut buffer = vec![0; 64 << 10];
        while let Ok(data) = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            at = data / 8 * 8;
            if at >= end {
                break;
            }
            let len = (end - at).min(buffer.len() as u64);
            let bytes = &mut buffer[..len as usize];
            file.read_exact_at(bytes, at)?;
            self.take(bytes, (at - self.at) * 8, size);
            at += len;
        }
        Ok(())
    }

    /// Takes over bits of the clusters from `first` on.
    fn take(&self, bytes: &[u8], first: u64, size: u64) {
        for (byte, base) in bytes.iter().zip((first..).step_by(8)) {
            for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
                let start = (base + bit) * CLUSTER_SIZE;
                let range = start..(start + CLUSTER_SIZE).min(size);
                if range.start < range.end
                    && let Some(zone) = self.present.zone(start)
                {
                    zone.set(range);
                }
            }
        }
    }
}

impl Overlay {
    /// Whether `folder` has a disk to [`reopen`](Self::reopen).
    pub fn is_kept(folder: &Path) -> bool {
        path(folder, 0).exists()
    }

    /// As [`new`](Self::new), with what it begins with and what is written in files with names in
    /// `folder`, so that it can be [reopened](Self::reopen). One machine at a time may have it.
    pub fn keep(size: u64, layers: Vec<Layer>, folder: &Path) -> Result<Self, DiskError> {
        // Checks size and layers.
        let base = Self::new(size, layers.clone(), folder)?;
        let file = Arc::new(stage(folder, size).map_err(failed(folder))?);
        let noted = Noted::new(0, size);
        base.read_ranges(&base.used(), |at, bytes| {
            let there = at..at + bytes.len() as u64;
            file.write_all_at(bytes, at).map_err(failed(folder))?;
            let set = noted.set(&file, there);
            set.map_err(|stopped| failed(folder)(stopped.source))
        })?;
        publish(folder, 0).map_err(failed(folder))?;
        let holes = has_holes(&file, size);
        let disk = Self::over(file, holes, size, &layers, folder);
        disk.stack.write().noted = Some(noted);
        Ok(disk)
    }

    /// The disk of `size` bytes that was kept in `folder`.
    pub fn reopen(size: u64, folder: &Path) -> Result<Self, DiskError> {
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) || size > OVERLAY_MAX {
            return Err(DiskError::Size {
                size,
                limit: OVERLAY_MAX,
            });
        }
        let open = |number: u64| {
            let file = File::options()
                .read(true)
                .write(true)
                .open(path(folder, number))?;
            if file.metadata()?.len() != lengths(size).1 {
                let text = format!("{NAME}{number} is not as long as it was made");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            let noted = Noted::new(number, size);
            noted.read(&file, size)?;
            Ok((file, noted))
        };
        let mut layers = Vec::new();
        let mut numbers = numbers(folder).map_err(failed(folder))?;
        let missing = || failed(folder)(io::ErrorKind::NotFound.into());
        let top = numbers.pop().ok_or_else(missing)?;
        for number in numbers {
            let (file, noted) = open(number).map_err(failed(folder))?;
            let ranges = noted.present.ranges();
            let runs = ranges.iter().map(|range| LayerRun {
                at: range.start,
                len: range.end - range.start,
                offset: range.start,
            });
            layers.push(Layer::new(file, runs.collect::<Vec<_>>())?);
        }
        let (file, noted) = open(top).map_err(failed(folder))?;
        let holes = has_holes(&file, size);
        let disk = Self::over(Arc::new(file), holes, size, &layers, folder);
        let mut stack = disk.stack.write();
        for range in noted.present.ranges() {
            for part in by_zone(range) {
                if let Some(zone) = stack.present.zone(part.start) {
                    zone.set(part);
                }
            }
        }
        stack.noted = Some(noted);
        drop(stack);
        Ok(disk)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Disk;

    const C: u64 = CLUSTER_SIZE;
    const SIZE: u64 = 700 * C + 512;

    fn bytes(disk: &Overlay) -> Vec<u8> {
        let mut bytes = vec![0xee; SIZE as usize];
        disk.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// A layer with a byte pattern in two places.
    fn base(folder: &Path) -> Layer {
        let disk = Overlay::new(SIZE, Vec::new(), folder).unwrap();
        disk.write_at(&[0x11; 3 * C as usize], 0).unwrap();
        disk.write_at(&[0x22; 512], 700 * C).unwrap();
        disk.freeze().unwrap()
    }

    #[derive(Clone, Debug)]
    enum Act {
        Write(u64, usize, u8),
        Zero(u64, u64),
        Discard(u64, u64),
        Freeze,
        /// The process is killed.
        Kill,
    }

    fn act() -> impl Strategy<Value = Act> {
        let place = || (0..SIZE / 512, 1..40_u64);
        prop_oneof![
            4 => (place(), 1..=255_u8).prop_map(|((at, len), byte)| {
                let at = at * 512;
                Act::Write(at, (len * 512).min(SIZE - at) as usize, byte)
            }),
            2 => place().prop_map(|(at, len)| Act::Zero(at * 512, (len * 512).min(SIZE - at * 512))),
            1 => place().prop_map(|(at, len)| {
                // Whole clusters, whose content afterwards is known.
                let at = at * 512 / C * C;
                Act::Discard(at, (len * C).min(SIZE / C * C - at))
            }),
            1 => Just(Act::Freeze),
            1 => Just(Act::Kill),
        ]
    }

    proptest! {
        #[test]
        fn what_was_written_is_there_after_a_kill(acts in prop::collection::vec(act(), 1..30)) {
            let dir = tempfile::tempdir().unwrap();
            let mut disk = Overlay::keep(SIZE, vec![base(dir.path())], dir.path()).unwrap();
            let mut model = bytes(&disk);
            for act in acts {
                match act {
                    Act::Write(at, len, byte) => {
                        disk.write_at(&vec![byte; len], at).unwrap();
                        model[at as usize..][..len].fill(byte);
                    }
                    Act::Zero(at, len) => {
                        disk.write_zeroes(at, len, true).unwrap();
                        model[at as usize..][..len as usize].fill(0);
                    }
                    Act::Discard(_, 0) => {}
                    Act::Discard(at, len) => {
                        disk.discard(at, len).unwrap();
                        model[at as usize..][..len as usize].fill(0);
                    }
                    Act::Freeze => {
                        disk.freeze().unwrap();
                    }
                    Act::Kill => {
                        // Without a word to the disk, which has nothing to do when it is dropped.
                        drop(disk);
                        disk = Overlay::reopen(SIZE, dir.path()).unwrap();
                    }
                }
                prop_assert!(bytes(&disk) == model);
            }
            drop(disk);
            prop_assert!(bytes(&Overlay::reopen(SIZE, dir.path()).unwrap()) == model);
        }
    }

    #[test]
    fn what_it_began_with_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!Overlay::is_kept(dir.path()));
        let disk = Overlay::keep(SIZE, vec![base(dir.path())], dir.path()).unwrap();
        assert!(Overlay::is_kept(dir.path()) && disk.written().is_empty());
        disk.write_at(&[7; 512], 9 * C).unwrap();
        let changed = 9 * C..10 * C;
        assert_eq!(disk.written(), std::slice::from_ref(&changed));
        assert!(disk.rewind().is_err());
    }

    #[test]
    fn a_damaged_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Overlay::reopen(SIZE, dir.path()).is_err());
        drop(Overlay::keep(SIZE, Vec::new(), dir.path()).unwrap());
        let file = File::options().write(true).open(path(dir.path(), 0));
        file.unwrap().set_len(SIZE).unwrap();
        let error = Overlay::reopen(SIZE, dir.path()).unwrap_err();
        assert!(
            error.to_string().contains(dir.path().to_str().unwrap()),
            "{error}"
        );
    }

    #[test]
    fn threads_note_neighbours() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Overlay::keep(SIZE, Vec::new(), dir.path()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let disk = &disk;
                scope.spawn(move || {
                    for cluster in (thread..700).step_by(4) {
                        disk.write_at(&[7; C as usize], cluster * C).unwrap();
                    }
                });
            }
        });
        drop(disk);
        let disk = Overlay::reopen(SIZE, dir.path()).unwrap();
        assert_eq!(disk.written(), std::slice::from_ref(&(0..700 * C)));
    }
}
