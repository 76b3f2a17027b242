//! A writable disk made of read-only layers and a sparse file over them.
//!
//! ```text
//!   write ──► top     own sparse file without a name: cluster n is at its place n, if a bit of
//!              │      `Present` says that it is there; a hole that is there is zeros
//!   read ──────┤ not there
//!              ▼
//!            index    one sorted list of what all layers show; found by binary search,
//!              │      however many layers there are
//!              ▼
//!            layers   files of snapshots, of forks (what was the top once), of the template
//!                     what none has is zero
//! ```

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{RwLock, RwLockWriteGuard};

use crate::layer::{CLUSTER_SIZE, Index, Layer, LayerRun, files_of};
use crate::transfer::{Cursor, Stopped, ZEROS, total};
use crate::{
    Abilities, Disk, DiskError, IoBuf, IoBufMut, Operation, SECTOR_SIZE, check_range, sys,
};

mod compact;
mod kept;
mod present;

use kept::Noted;
use present::{Present, ZONE_SIZE, Zone};

/// The largest overlay: a file of this size is possible on the usual file systems.
pub const OVERLAY_MAX: u64 = 8 << 40;

/// So much is freed while the machine waits: some milliseconds.
const IN_PLACE_MAX: u64 = 16 << 20;

/// A disk whose changes lie apart from what it began with.
///
/// Nothing of it outlives the process, except for the layers that it gives away, unless it is made to
/// be [kept](Self::keep). Either way [`Disk::flush`] has nothing to do: what was written is the host's,
/// and stays there however the process ends.
pub struct Overlay {
    name: String,
    folder: PathBuf,
    size: u64,
    abilities: Abilities,
    /// Requests go on under a shared lock; who replaces the top takes it alone.
    stack: RwLock<Stack>,
}

/// What is read and written.
struct Stack {
    top: Arc<File>,
    present: Present,
    index: Index,
    /// What `index` refers to.
    files: Vec<Arc<File>>,
    /// What was frozen since the base: sorted and apart.
    frozen: Vec<Range<u64>>,
    /// What the top says of itself, where it is kept.
    noted: Option<Noted>,
}

impl Overlay {
    /// A disk of `size` bytes that shows `layers`, later ones over earlier ones, and zeros where
    /// these have nothing. What is written goes to a file without a name in `folder`.
    pub fn new(size: u64, layers: Vec<Layer>, folder: &Path) -> Result<Self, DiskError> {
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) || size > OVERLAY_MAX {
            return Err(DiskError::Size {
                size,
                limit: OVERLAY_MAX,
            });
        }
        let end = layers.iter().map(Layer::end).max().unwrap_or(0);
        if end > size.next_multiple_of(CLUSTER_SIZE) {
            return Err(DiskError::LayerEnd { end, size });
        }
        let top = new_top(folder, size)?;
        let holes = sys::punch_hole(&top, 0, CLUSTER_SIZE).is_ok();
        Ok(Self::over(top, holes, size, &layers, folder))
    }

    /// A disk with this top, which may have `holes`.
    fn over(top: Arc<File>, holes: bool, size: u64, layers: &[Layer], folder: &Path) -> Self {
        Overlay {
            name: format!("{}/(scratch)", folder.display()),
            folder: folder.to_owned(),
            size,
            abilities: Abilities {
                discard: holes,
                fast_zeroes: holes,
            },
            stack: RwLock::new(Stack {
                top,
                present: Present::new(size),
                index: Index::of(layers),
                files: files_of(layers),
                frozen: Vec::new(),
                noted: None,
            }),
        }
    }

    /// Makes what was written since the last time (or since the beginning) one more layer, under a
    /// new empty top. The layer may be given to other disks. If nothing was written, it is empty
    /// and the disk is as before.
    pub fn freeze(&self) -> Result<Layer, DiskError> {
        let mut stack = self.stack.write();
        let ranges = stack.present.ranges();
        let runs = ranges.iter().map(|range| LayerRun {
            at: range.start,
            len: range.end - range.start,
            offset: range.start,
        });
        let layer = Layer::new(stack.top.clone(), runs.collect::<Vec<_>>())?;
        if layer.is_empty() {
            return Ok(layer);
        }
        let (top, noted) = match &stack.noted {
            None => (new_top(&self.folder, self.size)?, None),
            Some(noted) => {
                let (top, noted) = noted.next(&self.folder, self.size)?;
                (top, Some(noted))
            }
        };
        stack.noted = noted;
        let frozen = std::mem::replace(&mut stack.top, top);
        stack.present.reset();
        let number = stack.files.len();
        stack.index = stack.index.under(&Index::single(number, layer.runs()));
        stack.files.push(frozen);
        stack.frozen = union(&stack.frozen, &ranges);
        stack.compact(&self.folder);
        Ok(layer)
    }

    /// Forgets what was written since the last [`freeze`](Self::freeze), or since the beginning.
    /// Its space is freed, which for much of it goes on for a while after the return. A disk that is
    /// [kept](Self::keep) forgets nothing: it is an error.
    pub fn rewind(&self) -> Result<(), DiskError> {
        let mut stack = self.stack.write();
        let written = stack.present.ranges();
        let bytes: u64 = written.iter().map(|range| range.end - range.start).sum();
        if stack.noted.is_some() {
            return Err(DiskError::Unsupported {
                disk: self.name.clone(),
                operation: Operation::Discard,
            });
        }
        if bytes > IN_PLACE_MAX {
            let top = new_top(&self.folder, self.size)?;
            let old = std::mem::replace(&mut stack.top, top);
            stack.present.reset();
            drop(stack);
            free_beside(old);
        } else if bytes > 0 {
            let failed = |source| DiskError::Io {
                disk: self.name.clone(),
                operation: Operation::Discard,
                offset: 0,
                source,
            };
            // Emptied and made long again: the quickest way to free all of a file.
            stack.top.set_len(0).map_err(failed)?;
            stack.present.reset();
            let len = self.size.next_multiple_of(CLUSTER_SIZE);
            stack.top.set_len(len).map_err(failed)?;
        }
        Ok(())
    }

    /// What is [`written`](Self::written) is counted from the last [`freeze`](Self::freeze) on:
    /// that state has been saved, and the next snapshot is a difference to it.
    pub fn rebase(&self) {
        self.stack.write().frozen.clear();
    }

    /// The ranges, in whole clusters, that were written since the base: since the beginning, or
    /// since the last [`rebase`](Self::rebase). What was discarded or zeroed is among them where
    /// the base had something. The last one may go beyond the end of the disk, with zeros.
    pub fn written(&self) -> Vec<Range<u64>> {
        let stack = self.stack.read();
        union(&stack.frozen, &stack.present.ranges())
    }

    /// The ranges, in whole clusters, that may hold something else than zeros.
    pub fn used(&self) -> Vec<Range<u64>> {
        let stack = self.stack.read();
        let layers = stack.index.extents().iter().map(|e| e.at..e.end());
        let layers: Vec<_> = layers.collect();
        union(&layers, &stack.present.ranges())
    }

    /// Calls `each` with place and content of the given ranges of whole clusters, piece by piece.
    /// What is written meanwhile may be among it or not.
    pub fn read_ranges<E: From<DiskError>>(
        &self,
        ranges: &[Range<u64>],
        mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        const PIECE: u64 = 256 << 10;
        let mut buffer = vec![0; PIECE as usize];
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let len = (range.end - at).min(PIECE);
                // Beyond the end there are zeros up to a whole cluster.
                let there = len.min(self.size.saturating_sub(at));
                let bytes = &mut buffer[..len as usize];
                self.read_at(&mut bytes[..there as usize], at)?;
                bytes[there as usize..].fill(0);
                each(at, bytes)?;
                at += len;
            }
        }
        Ok(())
    }

    /// What lies under the top, each byte once: what a clone is made of after a
    /// [`freeze`](Self::freeze).
    pub fn layers(&self) -> Vec<Layer> {
        let stack = self.stack.read();
        stack.index.layers(&stack.files)
    }

    fn failed(&self, operation: Operation) -> impl Fn(Stopped) -> DiskError {
        move |stopped| stopped.on(&self.name, operation)
    }

    /// Writes to the part of a disk that lies in one zone.
    fn write_part(
        &self,
        stack: &Stack,
        zone: &Zone,
        bufs: &mut Cursor<'_, IoBuf<'_>>,
        range: Range<u64>,
    ) -> Result<(), DiskError> {
        let whole = |at: u64| at.is_multiple_of(CLUSTER_SIZE) || at == self.size;
        let partial = |at: u64, byte: u64| (!whole(at)).then_some(byte);
        let edges = [
            partial(range.start, range.start),
            partial(range.end, range.end - 1),
        ];
        let absent = |at: &Option<u64>| at.is_some_and(|at| !zone.has(at));
        let mut shared = zone.lock.read();
        if edges.iter().any(absent) {
            drop(shared);
            let alone = zone.lock.write();
            for at in edges.iter().filter(|at| absent(at)).flatten() {
                self.copy_up(stack, zone, at / CLUSTER_SIZE * CLUSTER_SIZE)?;
            }
            shared = RwLockWriteGuard::downgrade(alone);
        }
        let written = bufs.write(&stack.top, range.start, range.end - range.start);
        written.map_err(self.failed(Operation::Write))?;
        stack
            .set(zone, range)
            .map_err(self.failed(Operation::Write))?;
        drop(shared);
        Ok(())
    }

    /// Brings the cluster at `at`, which isn't there, to the top. The zone is locked.
    fn copy_up(&self, stack: &Stack, zone: &Zone, at: u64) -> Result<(), DiskError> {
        let mut cluster = [0; CLUSTER_SIZE as usize];
        let end = (at + CLUSTER_SIZE).min(self.size);
        let bytes = &mut cluster[..(end - at) as usize];
        let read = stack.read_below(&mut Cursor::new(&[IoBufMut::from(bytes)]), at..end);
        read.map_err(self.failed(Operation::Read))?;
        // All of it, zeros too: a write that failed may have left something there.
        let whole = [IoBuf::from(&cluster[..])];
        let written = Cursor::new(&whole).write(&stack.top, at, CLUSTER_SIZE);
        written.map_err(self.failed(Operation::Write))?;
        stack
            .set(zone, at..end)
            .map_err(self.failed(Operation::Write))
    }

    /// Makes whole clusters read as zeros; false if the file system has no holes.
    fn clear_clusters(&self, range: Range<u64>, operation: Operation) -> Result<bool, DiskError> {
        let stack = self.stack.read();
        for part in by_zone(range) {
            let mut below = stack.index.within(part.clone()).peekable();
            if below.peek().is_none() && stack.present.touched(part.start).is_none() {
                continue;
            }
            let Some(zone) = stack.present.zone(part.start) else {
                continue;
            };
            let _alone = zone.lock.write();
            match sys::punch_hole(&stack.top, part.start, part.end - part.start) {
                Ok(()) => {}
                Err(error) if sys::is_unsupported(&error) => return Ok(false),
                Err(source) => {
                    let offset = part.start;
                    return Err(Stopped { offset, source }.on(&self.name, operation));
                }
            }
            // Zeros have to be there only where something would show through.
            let mut at = part.start;
            for extent in below {
                zone.clear(at..extent.at);
                let set = stack.set(zone, extent.at..extent.end());
                set.map_err(self.failed(operation))?;
                at = extent.end();
            }
            zone.clear(at..part.end);
        }
        Ok(true)
    }

    /// Writes zeros to a range.
    fn write_zeros(&self, range: Range<u64>) -> Result<(), DiskError> {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(ZEROS.len() as u64);
            self.write_at(&ZEROS[..len as usize], at)?;
            at += len;
        }
        Ok(())
    }

    /// The whole clusters of a range; the last one of the disk may be a part of one.
    fn whole_clusters(&self, offset: u64, len: u64) -> Range<u64> {
        let start = offset.next_multiple_of(CLUSTER_SIZE);
        let end = match offset + len {
            end if end == self.size => end.next_multiple_of(CLUSTER_SIZE),
            end => end / CLUSTER_SIZE * CLUSTER_SIZE,
        };
        start..end.max(start)
    }
}

impl Stack {
    /// A range of whole clusters, which the top has now, is known to be there.
    fn set(&self, zone: &Zone, range: Range<u64>) -> Result<(), Stopped> {
        // First the file: what the guest is told to be there must be found again.
        if let Some(noted) = &self.noted {
            noted.set(&self.top, range.clone())?;
        }
        zone.set(range);
        Ok(())
    }

    fn read(&self, bufs: &mut Cursor<'_, IoBufMut<'_>>, range: Range<u64>) -> Result<(), Stopped> {
        let mut at = range.start;
        while at < range.end {
            let (there, part) = self.present.first_part(at..range.end);
            at = part.end;
            if there {
                bufs.read(&self.top, part.start, part.end - part.start)?;
            } else {
                self.read_below(bufs, part)?;
            }
        }
        Ok(())
    }

    /// Reads what lies under the top.
    fn read_below(
        &self,
        bufs: &mut Cursor<'_, IoBufMut<'_>>,
        range: Range<u64>,
    ) -> Result<(), Stopped> {
        let mut at = range.start;
        for extent in self.index.within(range.clone()) {
            bufs.zero(extent.at - at);
            at = extent.end();
            if let Some(file) = self.files.get(extent.file) {
                bufs.read(file, extent.offset, extent.len)?;
            }
        }
        bufs.zero(range.end - at);
        Ok(())
    }
}

/// Makes an empty file for a disk of `size` bytes.
fn new_top(folder: &Path, size: u64) -> Result<Arc<File>, DiskError> {
    let make = || {
        let file = sys::unnamed_file(folder)?;
        // As long as the disk, so that a hole at the end can be read.
        file.set_len(size.next_multiple_of(CLUSTER_SIZE))?;
        Ok(Arc::new(file))
    };
    make().map_err(|source| DiskError::Scratch {
        dir: folder.to_owned(),
        source,
    })
}

/// Closes a file on another thread: what it takes is freed by that, and waits for what is on its
/// way to the disk. Here, if there can be no thread.
fn free_beside(file: Arc<File>) {
    let thread = std::thread::Builder::new().name("scratch free".to_owned());
    let _ = thread.spawn(move || drop(file));
}

/// Cuts a range at the ends of zones.
fn by_zone(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let end = range.end.min((at / ZONE_SIZE + 1) * ZONE_SIZE);
        let part = at..end;
        at = end;
        (part.start < part.end).then_some(part)
    })
}

/// What is in either of two sorted lists.
fn union(one: &[Range<u64>], two: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut one, mut two) = (one.iter().peekable(), two.iter().peekable());
    let mut all: Vec<Range<u64>> = Vec::new();
    loop {
        let next = match (one.peek(), two.peek()) {
            (Some(a), Some(b)) if a.start <= b.start => one.next(),
            (Some(_), None) => one.next(),
            _ => two.next(),
        };
        let Some(next) = next else {
            return all;
        };
        match all.last_mut() {
            Some(last) if last.end >= next.start => last.end = last.end.max(next.end),
            _ => all.push(next.clone()),
        }
    }
}

impl Disk for Overlay {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn abilities(&self) -> Abilities {
        self.abilities
    }

    fn read_vectored_at(&self, bufs: &[IoBufMut<'_>], offset: u64) -> Result<(), DiskError> {
        let len = total(bufs);
        check_range(&self.name, offset, len, self.size)?;
        let stack = self.stack.read();
        let result = stack.read(&mut Cursor::new(bufs), offset..offset + len);
        // As for a raw disk: when the bytes are there, and whatever the result.
        bufs.iter().for_each(|buf| buf.mark_dirty(0, buf.len()));
        result.map_err(self.failed(Operation::Read))
    }

    fn write_vectored_at(&self, bufs: &[IoBuf<'_>], offset: u64) -> Result<(), DiskError> {
        let len = total(bufs);
        check_range(&self.name, offset, len, self.size)?;
        let stack = self.stack.read();
        let mut bufs = Cursor::new(bufs);
        for part in by_zone(offset..offset + len) {
            if let Some(zone) = stack.present.zone(part.start) {
                self.write_part(&stack, zone, &mut bufs, part)?;
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        check_range(&self.name, offset, len, self.size)?;
        // What isn't a whole cluster may stay as it is.
        let operation = Operation::Discard;
        match self.clear_clusters(self.whole_clusters(offset, len), operation)? {
            true => Ok(()),
            false => Err(DiskError::Unsupported {
                disk: self.name.clone(),
                operation,
            }),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<(), DiskError> {
        check_range(&self.name, offset, len, self.size)?;
        let (whole, end) = (self.whole_clusters(offset, len), offset + len);
        if whole.is_empty() || !self.clear_clusters(whole.clone(), Operation::WriteZeroes)? {
            return self.write_zeros(offset..end);
        }
        self.write_zeros(offset..whole.start)?;
        self.write_zeros(whole.end..end)
    }
}

impl std::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overlay")
            .field("name", &self.name)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
