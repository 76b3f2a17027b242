//! The pages that a machine touches soon after it was started from a snapshot, for the next start
//! to fetch them before they are asked for.
//!
//! ```text
//! "SKRYWSET"  version (u8)  ranges  { gap  pages } for each range, ascending
//! ```
//! The numbers are LEB128, 7 bits in a byte, the low ones first, in the fewest bytes; a gap counts
//! from the end of the range before. Some 3 bytes stand for a range.
//!
//! It is a hint, and nothing is wrong with a machine that is started with another. So it may come
//! with a snapshot, as the extra blob [`NAME`](WorkingSet::NAME), or be noted beside one later, by
//! the first that starts from it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::pages::PAGE_SIZE;
use crate::{Error, Snapshot, WorkingSetError};

const MAGIC: &[u8; 8] = b"SKRYWSET";
const VERSION: u8 = 1;
const RANGES_MAX: u64 = 1 << 18;
/// No page of a machine has a higher number.
const PAGES_MAX: u64 = 1 << 40;

/// Ranges of pages, ascending and apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkingSet {
    ranges: Vec<Range<u64>>,
}

impl WorkingSet {
    /// The name of the extra blob, and of the note beside a snapshot.
    pub const NAME: &str = "working-set";
    /// The longest that is read, in bytes.
    pub const BYTES_MAX: u64 = 4 << 20;

    /// A set of pages by their numbers, which may come in any order and more than once.
    pub fn new(ranges: impl IntoIterator<Item = Range<u64>>) -> Result<Self, WorkingSetError> {
        let mut all: Vec<_> = ranges.into_iter().filter(|r| !r.is_empty()).collect();
        all.sort_by_key(|range| range.start);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for range in all {
            if range.end > PAGES_MAX {
                return Err(WorkingSetError::BeyondEnd);
            }
            match ranges.last_mut() {
                Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
                _ => ranges.push(range),
            }
        }
        match ranges.len() as u64 <= RANGES_MAX {
            true => Ok(WorkingSet { ranges }),
            false => Err(WorkingSetError::TooMany { limit: RANGES_MAX }),
        }
    }

    /// The numbers of the pages: ascending, apart, and within the memory it was read for.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.push(VERSION);
        put(&mut bytes, self.ranges.len() as u64);
        let mut end = 0;
        for range in &self.ranges {
            put(&mut bytes, range.start - end);
            put(&mut bytes, range.end - range.start);
            end = range.end;
        }
        bytes
    }

    /// Understands bytes that stand for pages of a memory of `pages` pages.
    pub fn decode(bytes: &[u8], pages: u64) -> Result<Self, WorkingSetError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(WorkingSetError::Magic)?;
        let (version, mut rest) = rest.split_first().ok_or(WorkingSetError::Short)?;
        if *version != VERSION {
            return Err(WorkingSetError::Version(*version));
        }
        let count = take(&mut rest)?;
        // Two bytes at least for each.
        if count > RANGES_MAX || count > rest.len() as u64 / 2 {
            return Err(WorkingSetError::TooMany { limit: RANGES_MAX });
        }
        let mut ranges = Vec::with_capacity(count as usize);
        let mut end = 0u64;
        for number in 0..count {
            let (gap, len) = (take(&mut rest)?, take(&mut rest)?);
            if len == 0 || (gap == 0 && number > 0) {
                return Err(WorkingSetError::Empty);
            }
            let start = end.checked_add(gap);
            let range = start.and_then(|start| Some(start..start.checked_add(len)?));
            match range {
                Some(range) if range.end <= pages.min(PAGES_MAX) => {
                    end = range.end;
                    ranges.push(range);
                }
                _ => return Err(WorkingSetError::BeyondEnd),
            }
        }
        match rest {
            [] => Ok(WorkingSet { ranges }),
            _ => Err(WorkingSetError::Long),
        }
    }
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take(bytes: &mut &[u8]) -> Result<u64, WorkingSetError> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or(WorkingSetError::Short)?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        // Bits that don't fit, and a last byte that says nothing.
        if (bits << shift) >> shift != bits || (*byte == 0 && shift > 0) {
            return Err(WorkingSetError::Number);
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(WorkingSetError::Number)
}

impl Snapshot {
    /// The working set that came with it, or else the one that was noted beside it. One that is
    /// damaged came from nobody: it is as if there were none.
    pub fn working_set(&self) -> Option<WorkingSet> {
        let pages = self.memory_size() / PAGE_SIZE;
        let bytes = match self.extras.get(WorkingSet::NAME) {
            Some(extra) if extra.size <= WorkingSet::BYTES_MAX => {
                let mut bytes = vec![0; extra.size as usize];
                extra.file.read_exact_at(&mut bytes, 0).map(|()| bytes)
            }
            Some(_) => return None,
            None => noted(self.path()),
        };
        match WorkingSet::decode(&bytes.ok()?, pages) {
            Ok(set) => Some(set),
            Err(error) => {
                tracing::debug!(snapshot = %self.id(), %error, "no use of a working set");
                None
            }
        }
    }

    /// Notes a working set beside the snapshot, in place of an earlier note. It is no part of the
    /// snapshot's identity and doesn't travel.
    pub fn note_working_set(&self, set: &WorkingSet) -> Result<(), Error> {
        let failed = |error| Error::io("write", &self.path().join(WorkingSet::NAME), error);
        let mut file = tempfile::Builder::new()
            .prefix(".working-set-")
            .tempfile_in(self.path())
            .map_err(failed)?;
        file.write_all(&set.encode()).map_err(failed)?;
        let persisted = file.persist(self.path().join(WorkingSet::NAME));
        persisted.map(drop).map_err(|error| failed(error.error))
    }
}

fn noted(snapshot: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(snapshot.join(WorkingSet::NAME))?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    file.take(WorkingSet::BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(numbers: &[u64]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.push(VERSION);
        numbers.iter().for_each(|number| put(&mut bytes, *number));
        bytes
    }

    #[test]
    fn sets_that_lie() {
        use WorkingSetError::*;
        let refused = |bytes: &[u8]| WorkingSet::decode(bytes, 100).unwrap_err();
        assert_eq!(refused(b"SKRYWSEX\x01\0"), Magic);
        assert_eq!(refused(b"SKRYWSET"), Short);
        assert_eq!(refused(b"SKRYWSET\x02\0"), Version(2));
        assert_eq!(refused(b"SKRYWSET\x01"), Short);
        assert_eq!(refused(b"SKRYWSET\x01\x80"), Short);
        // A number in more bytes than it needs, and one of more than 64 bits.
        assert_eq!(refused(b"SKRYWSET\x01\x80\0"), Number);
        let huge = [&b"SKRYWSET\x01"[..], &[0xff; 9], &[2]].concat();
        assert_eq!(refused(&huge), Number);
        assert_eq!(refused(&bytes(&[1, 0])), TooMany { limit: RANGES_MAX });
        assert_eq!(refused(&bytes(&[u64::MAX])), TooMany { limit: RANGES_MAX });
        assert_eq!(refused(&bytes(&[1, 0, 0])), Empty);
        assert_eq!(refused(&bytes(&[2, 0, 1, 0, 1])), Empty);
        assert_eq!(refused(&bytes(&[1, 99, 2])), BeyondEnd);
        assert_eq!(refused(&bytes(&[1, u64::MAX, u64::MAX])), BeyondEnd);
        assert_eq!(refused(&bytes(&[1, 0, 1, 0])), Long);
        let whole = WorkingSet::decode(&bytes(&[1, 0, 100]), 100).unwrap();
        assert_eq!((whole.ranges().len(), whole.pages()), (1, 100));
        assert_eq!(
            WorkingSet::new([1..2, 3..PAGES_MAX + 1]).unwrap_err(),
            BeyondEnd
        );
    }

    proptest! {
        #[test]
        fn sets_come_back(ranges in proptest::collection::vec((0u64..1 << 22, 0u64..300), 0..200)) {
            let ranges = ranges.into_iter().map(|(start, len)| start..start + len);
            let pages: std::collections::BTreeSet<u64> = ranges.clone().flatten().collect();
            let set = WorkingSet::new(ranges).unwrap();
            prop_assert_eq!(set.pages(), pages.len() as u64);
            prop_assert!(set.ranges().iter().cloned().flatten().eq(pages));
            let bytes = set.encode();
            prop_assert_eq!(WorkingSet::decode(&bytes, 1 << 23).unwrap(), set.clone());
            // No more than 6 bytes for each range here.
            prop_assert!(bytes.len() <= 16 + 6 * set.ranges().len());
            let end = set.ranges().last().map_or(0, |range| range.end);
            prop_assert!(WorkingSet::decode(&bytes, end).is_ok());
            prop_assert!(end == 0 || WorkingSet::decode(&bytes, end - 1).is_err());
        }
    }
}
