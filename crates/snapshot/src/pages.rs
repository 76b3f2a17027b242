//! Page images: memory or a disk as the runs of its pages that hold something.
//!
//! ```text
//! page 0 …          the data, run after run, with nothing between
//! page n …          the table: 24 bytes for each run, little endian
//!                     guest page (u64)  pages (u64)  file page (u64)
//!                   zeros
//!                   in a difference, pages that became zero may be a run without data, whose file
//!                   page is 2^64 - 1; flag 2 says that there are such
//! last 64 bytes     magic "SKRYPAGE", version (u32), page size (u32), flags (u32), zero (u32),
//!                   runs (u64), size in bytes (u64), data pages (u64), zeros
//! ```
//! The file's size is a multiple of the page size, so that each run can be mapped. The table comes
//! last because only then are the runs known: an image is written and hashed in one pass. It has a
//! digest of its own in the manifest, for it to be checked without reading the data.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::PagesError;

/// The size of a page in bytes.
pub const PAGE_SIZE: u64 = 4096;
const MAGIC: [u8; 8] = *b"SKRYPAGE";
const VERSION: u32 = 1;
const FLAG_DIFF: u32 = 1;
const FLAG_ZEROS: u32 = 2;
/// The file page of a run of zero pages.
const NO_DATA: u64 = u64::MAX;
const RUN_BYTES: u64 = 24;
pub(crate) const FOOTER_BYTES: u64 = 64;
/// As many as every second page of 32 GiB; their table has 96 MiB.
pub(crate) const RUNS_MAX: u64 = 1 << 22;
/// What 52 bits of physical address reach.
const SIZE_MAX: u64 = 1 << 52;

/// What the pages are that an image doesn't have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zero.
    Full,
    /// As in the parent.
    Diff,
}

/// Pages that follow each other, in the guest and in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The number of the first page in the guest.
    pub guest_page: u64,
    /// How many there are.
    pub pages: u64,
    /// The number of the first page in the file.
    pub file_page: u64,
}

impl Run {
    /// The number after the last page's, in the guest.
    pub fn end(&self) -> u64 {
        self.guest_page + self.pages
    }
}

/// A page image whose table has been checked.
///
/// Each run can be mapped: the file's bytes from `file_page` on are the guest's from `guest_page`
/// on, and both are bounded by the sizes that were checked.
#[derive(Debug)]
pub struct PageImage {
    /// The file, read-only.
    pub file: File,
    /// What it has, ascending and without overlap.
    pub runs: Vec<Run>,
    /// Pages of a difference that are zero, whatever they are in the parent; apart from `runs`.
    pub zeros: Vec<Range<u64>>,
    /// How many bytes the whole stands for.
    pub size: u64,
    /// What the pages are that aren't in `runs`.
    pub content: Content,
}

/// What a table lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) runs: Vec<Run>,
    pub(crate) zeros: Vec<Range<u64>>,
}

impl Table {
    /// How many entries it has.
    pub(crate) fn len(&self) -> u64 {
        (self.runs.len() + self.zeros.len()) as u64
    }

    /// All entries in the order of the guest's pages.
    fn entries(&self) -> impl Iterator<Item = [u64; 3]> + '_ {
        let (mut runs, mut zeros) = (self.runs.iter().peekable(), self.zeros.iter().peekable());
        std::iter::from_fn(move || {
            let run_first = match (runs.peek(), zeros.peek()) {
                (Some(run), Some(zero)) => run.guest_page < zero.start,
                (run, _) => run.is_some(),
            };
            match run_first {
                true => runs.next().map(|r| [r.guest_page, r.pages, r.file_page]),
                false => zeros.next().map(|z| [z.start, z.end - z.start, NO_DATA]),
            }
        })
    }
}

/// What the end of a page image says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) content: Content,
    /// Whether there are runs of zero pages, which only a difference has.
    pub(crate) zeros: bool,
    /// Entries of the table.
    pub(crate) runs: u64,
    pub(crate) size: u64,
    pub(crate) data_pages: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let part = bytes.get(at..at + 4).and_then(|part| part.try_into().ok());
    u32::from_le_bytes(part.unwrap_or_default())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let part = bytes.get(at..at + 8).and_then(|part| part.try_into().ok());
    u64::from_le_bytes(part.unwrap_or_default())
}

impl Footer {
    /// The size of the table with its padding and the footer.
    pub(crate) fn table_bytes(&self) -> u64 {
        (self.runs * RUN_BYTES + FOOTER_BYTES).next_multiple_of(PAGE_SIZE)
    }

    fn total_pages(&self) -> u64 {
        self.size.div_ceil(PAGE_SIZE)
    }

    /// Reads the last bytes of a file of `file_size` bytes.
    pub(crate) fn decode(
        bytes: &[u8; FOOTER_BYTES as usize],
        file_size: u64,
    ) -> Result<Self, PagesError> {
        if bytes[..8] != MAGIC {
            return Err(PagesError::Magic);
        }
        let (version, page_size, flags) = (u32_at(bytes, 8), u32_at(bytes, 12), u32_at(bytes, 16));
        if version != VERSION {
            return Err(PagesError::Version(version));
        }
        if u64::from(page_size) != PAGE_SIZE {
            return Err(PagesError::PageSize(page_size));
        }
        if ![0, FLAG_DIFF, FLAG_DIFF | FLAG_ZEROS].contains(&flags) {
            return Err(PagesError::Flags(flags));
        }
        if bytes[20..24].iter().chain(&bytes[48..]).any(|b| *b != 0) {
            return Err(PagesError::Padding);
        }
        let footer = Footer {
            content: if flags & FLAG_DIFF == 0 {
                Content::Full
            } else {
                Content::Diff
            },
            zeros: flags & FLAG_ZEROS != 0,
            runs: u64_at(bytes, 24),
            size: u64_at(bytes, 32),
            data_pages: u64_at(bytes, 40),
        };
        if footer.size > SIZE_MAX {
            return Err(PagesError::Size(footer.size));
        }
        if footer.runs > RUNS_MAX {
            return Err(PagesError::TooManyRuns { limit: RUNS_MAX });
        }
        let expected = footer
            .data_pages
            .checked_mul(PAGE_SIZE)
            .and_then(|data| data.checked_add(footer.table_bytes()));
        if footer.data_pages > footer.total_pages() || expected != Some(file_size) {
            return Err(PagesError::FileSize {
                found: file_size,
                expected: expected.unwrap_or(u64::MAX),
            });
        }
        Ok(footer)
    }

    /// Checks the bytes of a table, the footer's included, and gives its runs.
    pub(crate) fn table(&self, bytes: &[u8]) -> Result<Table, PagesError> {
        let expected = self.table_bytes();
        let used = (self.runs * RUN_BYTES) as usize;
        let padding = (expected - FOOTER_BYTES) as usize;
        if bytes.len() as u64 != expected {
            let found = bytes.len() as u64;
            return Err(PagesError::FileSize { found, expected });
        }
        if bytes[used..padding].iter().any(|byte| *byte != 0) {
            return Err(PagesError::Padding);
        }
        let mut table = Table::default();
        // The end of the runs so far, and whether the last one had data.
        let (mut guest, mut file, mut last) = (0, 0, None);
        for (i, entry) in (0..).zip(bytes[..used].chunks_exact(RUN_BYTES as usize)) {
            let run = Run {
                guest_page: u64_at(entry, 0),
                pages: u64_at(entry, 8),
                file_page: u64_at(entry, 16),
            };
            let has_data = !(self.zeros && run.file_page == NO_DATA);
            if run.pages == 0 {
                return Err(PagesError::EmptyRun(i));
            }
            // Adjacent runs of a kind would be one.
            if run.guest_page < guest || (last == Some(has_data) && run.guest_page == guest) {
                return Err(PagesError::Order(i));
            }
            match run.guest_page.checked_add(run.pages) {
                Some(end) if end <= self.total_pages() => guest = end,
                _ => return Err(PagesError::Bounds(i)),
            }
            last = Some(has_data);
            if !has_data {
                table.zeros.push(run.guest_page..guest);
                continue;
            }
            if run.file_page != file {
                return Err(PagesError::FilePage(i));
            }
            // Both are at most the number of pages of 52 bits.
            file += run.pages;
            table.runs.push(run);
        }
        if file != self.data_pages {
            return Err(PagesError::FileSize {
                found: self.data_pages * PAGE_SIZE,
                expected: file * PAGE_SIZE,
            });
        }
        match self.zeros == table.zeros.is_empty() {
            true => Err(PagesError::Flags(self.flags())),
            false => Ok(table),
        }
    }

    fn flags(&self) -> u32 {
        match (self.content, self.zeros) {
            (Content::Full, _) => 0,
            (Content::Diff, false) => FLAG_DIFF,
            (Content::Diff, true) => FLAG_DIFF | FLAG_ZEROS,
        }
    }

    /// The bytes of the table, with the footer.
    pub(crate) fn encode(&self, table: &Table) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.table_bytes() as usize);
        for field in table.entries().flatten() {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.resize((self.table_bytes() - FOOTER_BYTES) as usize, 0);
        bytes.extend_from_slice(&MAGIC);
        for field in [VERSION, PAGE_SIZE as u32, self.flags(), 0] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        for field in [self.runs, self.size, self.data_pages, 0, 0] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

/// Checks that an image of `size` bytes can be written.
pub(crate) fn check_size(size: u64) -> Result<(), PagesError> {
    if size > SIZE_MAX {
        return Err(PagesError::Size(size));
    }
    Ok(())
}

impl PageImage {
    /// How many pages the file has.
    pub fn data_pages(&self) -> u64 {
        self.runs.iter().map(|run| run.pages).sum()
    }

    /// Writes the pages to where they belong in `out`, and makes it `size` bytes long.
    ///
    /// Of a [full](Content::Full) image, `out` must be empty or zero before; of a difference, it
    /// must be what the parent wrote. Between files of one file system that can, data is shared.
    pub fn unpack(&self, out: &File) -> io::Result<()> {
        out.set_len(self.size)?;
        for run in &self.runs {
            let to = run.guest_page * PAGE_SIZE;
            let len = (run.pages * PAGE_SIZE).min(self.size.saturating_sub(to));
            copy_range(&self.file, run.file_page * PAGE_SIZE, out, to, len)?;
        }
        for pages in &self.zeros {
            let (from, to) = (pages.start * PAGE_SIZE, pages.end * PAGE_SIZE);
            clear_range(out, from, to.min(self.size).saturating_sub(from))?;
        }
        Ok(())
    }
}

/// Makes a range of a file zero, without space where that is possible.
fn clear_range(file: &File, mut at: u64, len: u64) -> io::Result<()> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, hole, at, len) {
        Ok(()) => return Ok(()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        Err(error) => return Err(error.into()),
    }
    let zeros = vec![0; 256 << 10];
    let end = at + len;
    while at < end {
        let part = zeros
            .len()
            .min(usize::try_from(end - at).unwrap_or(usize::MAX));
        file.write_all_at(&zeros[..part], at)?;
        at += part as u64;
    }
    Ok(())
}

/// Copies a range of one file into another, in the kernel where that is possible.
fn copy_range(from: &File, mut at: u64, to: &File, mut to_at: u64, mut len: u64) -> io::Result<()> {
    while len > 0 {
        let part = usize::try_from(len).unwrap_or(usize::MAX).min(1 << 30);
        match rustix::fs::copy_file_range(from, Some(&mut at), to, Some(&mut to_at), part) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => len -= n as u64,
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let mut buffer = vec![0; (256 << 10).min(len as usize)];
    while len > 0 {
        let part = buffer.len().min(usize::try_from(len).unwrap_or(usize::MAX));
        from.read_exact_at(&mut buffer[..part], at)?;
        to.write_all_at(&buffer[..part], to_at)?;
        (at, to_at, len) = (at + part as u64, to_at + part as u64, len - part as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn footer(table: &Table, size: u64) -> Footer {
        Footer {
            content: Content::Diff,
            zeros: !table.zeros.is_empty(),
            runs: table.len(),
            size,
            data_pages: table.runs.iter().map(|run| run.pages).sum(),
        }
    }

    fn decode(table: &[u8], file_size: u64) -> Result<(Footer, Table), PagesError> {
        let (_, last) = table.split_last_chunk().unwrap();
        let footer = Footer::decode(last, file_size)?;
        let table = footer.table(table)?;
        Ok((footer, table))
    }

    fn run(guest_page: u64, pages: u64, file_page: u64) -> Run {
        Run {
            guest_page,
            pages,
            file_page,
        }
    }

    fn table(runs: &[Run], zeros: &[Range<u64>]) -> Table {
        Table {
            runs: runs.to_vec(),
            zeros: zeros.to_vec(),
        }
    }

    fn refused(runs: &[Run], zeros: &[Range<u64>]) -> PagesError {
        let table = table(runs, zeros);
        let footer = footer(&table, 100 * PAGE_SIZE);
        let table = footer.encode(&table);
        let size = footer
            .data_pages
            .wrapping_mul(PAGE_SIZE)
            .wrapping_add(table.len() as u64);
        decode(&table, size).unwrap_err()
    }

    #[test]
    fn tables_that_lie() {
        assert_eq!(refused(&[run(0, 0, 0)], &[]), PagesError::EmptyRun(0));
        assert_eq!(
            refused(&[run(5, 2, 0), run(6, 1, 2)], &[]),
            PagesError::Order(1)
        );
        assert_eq!(
            refused(&[run(5, 2, 0), run(7, 1, 2)], &[]),
            PagesError::Order(1)
        );
        assert_eq!(
            refused(&[run(5, 2, 0), run(0, 1, 2)], &[]),
            PagesError::Order(1)
        );
        assert_eq!(refused(&[run(99, 2, 0)], &[]), PagesError::Bounds(0));
        assert_eq!(refused(&[run(u64::MAX, 2, 0)], &[]), PagesError::Bounds(0));
        assert_eq!(refused(&[run(1, 2, 1)], &[]), PagesError::FilePage(0));
        assert_eq!(
            refused(&[run(1, 2, 0), run(4, 1, 1)], &[]),
            PagesError::FilePage(1)
        );
        assert!(matches!(
            refused(&[run(0, u64::MAX, 0)], &[]),
            PagesError::FileSize { .. }
        ));
        // Runs of zeros among them.
        let data = run(5, 2, 0);
        assert_eq!(refused(&[data], &[6..9, 20..21]), PagesError::Order(1));
        assert_eq!(refused(&[data], &[0..6, 20..21]), PagesError::Order(1));
        assert_eq!(refused(&[data], &[9..12, 12..13]), PagesError::Order(2));
        assert_eq!(refused(&[data], &[9..9, 12..13]), PagesError::EmptyRun(1));
        assert_eq!(refused(&[data], &[9..11, 99..101]), PagesError::Bounds(2));
        // Without the flag they are runs whose data isn't there.
        let table = table(&[data], &[9..12, 30..31]);
        let mut footer = footer(&table, 100 * PAGE_SIZE);
        let size = 3 * PAGE_SIZE;
        assert_eq!(
            decode(&footer.encode(&table), size),
            Ok((footer, table.clone()))
        );
        footer.zeros = false;
        let found = decode(&footer.encode(&table), size);
        assert_eq!(found, Err(PagesError::FilePage(1)));
        // And the flag without them says nothing.
        let without = self::table(&[data], &[]);
        footer.runs = 1;
        footer.zeros = true;
        assert_eq!(
            decode(&footer.encode(&without), size),
            Err(PagesError::Flags(3))
        );
    }

    #[test]
    fn footers_that_lie() {
        let table = table(&[run(1, 2, 0)], &[]);
        let table = footer(&table, 9 * PAGE_SIZE).encode(&table);
        let size = 2 * PAGE_SIZE + table.len() as u64;
        assert!(decode(&table, size).is_ok());
        assert!(decode(&table, size - PAGE_SIZE).is_err());
        let end = table.len() - FOOTER_BYTES as usize;
        let with = |at: usize, byte: u8| {
            let mut table = table.clone();
            table[at] ^= byte;
            decode(&table, size)
        };
        assert_eq!(with(end, 1), Err(PagesError::Magic));
        assert_eq!(with(end + 8, 3), Err(PagesError::Version(2)));
        assert_eq!(with(end + 13, 0x30), Err(PagesError::PageSize(0x2000)));
        assert_eq!(with(end + 16, 4), Err(PagesError::Flags(5)));
        // Zeros in an image that has no parent.
        assert_eq!(with(end + 16, 3), Err(PagesError::Flags(2)));
        assert_eq!(with(end + 20, 1), Err(PagesError::Padding));
        assert_eq!(with(end - 1, 1), Err(PagesError::Padding));
        assert_eq!(
            with(end + 30, 1),
            Err(PagesError::TooManyRuns { limit: RUNS_MAX })
        );
        assert!(matches!(with(end + 39, 1), Err(PagesError::Size(_))));
        assert!(matches!(
            with(end + 40, 1),
            Err(PagesError::FileSize { .. })
        ));
    }

    proptest! {
        #[test]
        fn tables_come_back(
            gaps in proptest::collection::vec((0u64..50, 1u64..50, any::<bool>()), 0..400),
            odd in 0..PAGE_SIZE,
        ) {
            let (mut guest, mut file, mut last) = (0, 0, None);
            let mut table = Table::default();
            for (gap, pages, data) in gaps {
                // Those of a kind don't touch.
                let at = guest + gap.max(u64::from(last == Some(data)));
                match data {
                    true => table.runs.push(run(at, pages, file)),
                    false => table.zeros.push(at..at + pages),
                }
                file += if data { pages } else { 0 };
                guest = at + pages;
                last = Some(data);
            }
            let footer = footer(&table, guest * PAGE_SIZE + odd);
            let bytes = footer.encode(&table);
            let size = file * PAGE_SIZE + bytes.len() as u64;
            prop_assert_eq!(size % PAGE_SIZE, 0);
            prop_assert_eq!(decode(&bytes, size), Ok((footer, table)));
        }
    }
}
