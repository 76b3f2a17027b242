//! Writing page images: one pass that finds zeros, hashes and writes.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::hashing::{BUFFER, Hashing};
use crate::pages::{self, Content, Footer, PAGE_SIZE, RUNS_MAX, Run, Table};
use crate::{Digest, Error, PagesError};

/// A gap of so many zero pages is cheaper to write than a further run is to map.
const GAP_MAX: u64 = 15;
const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// A file that is hashed while it is written.
pub(crate) struct BlobSink {
    pub(crate) path: PathBuf,
    file: File,
    hashing: Hashing,
    buffer: Vec<u8>,
    size: u64,
}

impl BlobSink {
    pub(crate) fn create(path: PathBuf) -> Result<Self, Error> {
        let mut options = File::options();
        let file = options.write(true).create_new(true).open(&path);
        Ok(BlobSink {
            file: file.map_err(|error| Error::io("make", &path, error))?,
            path,
            hashing: Hashing::new(),
            buffer: Vec::new(),
            size: 0,
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.buffer.extend_from_slice(bytes);
        match self.buffer.len() >= BUFFER {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<(), Error> {
        let written = self.file.write_all(&self.buffer);
        written.map_err(|error| Error::io("write", &self.path, error))?;
        self.size += self.buffer.len() as u64;
        self.buffer = self.hashing.take(std::mem::take(&mut self.buffer));
        Ok(())
    }

    /// The digest and the size of what was written.
    pub(crate) fn finish(mut self) -> Result<(Digest, u64), Error> {
        self.flush()?;
        Ok((self.hashing.finish(), self.size))
    }
}

/// How much a page image came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packed {
    /// Separate runs of pages.
    pub runs: u64,
    /// Pages with data.
    pub data_pages: u64,
    /// Pages of a difference that are known to be zero, and take no space.
    pub zero_pages: u64,
}

/// Takes the pages of a memory or a disk, in ascending order.
///
/// Of a [full](Content::Full) image, zero pages are left out. Of a difference, each page given is
/// kept; that it became zero costs no space.
pub struct PageWriter {
    sink: BlobSink,
    part: String,
    table: Table,
    /// Zero pages of a difference that aren't in the table yet.
    zeros: Range<u64>,
    content: Content,
    size: u64,
    /// The lowest page that may come.
    next: u64,
    file_page: u64,
}

fn is_zero(page: &[u8]) -> bool {
    page.chunks(256)
        .all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

impl PageWriter {
    pub(crate) fn new(
        sink: BlobSink,
        part: String,
        size: u64,
        content: Content,
    ) -> Result<Self, Error> {
        let writer = PageWriter {
            sink,
            part,
            table: Table::default(),
            zeros: 0..0,
            content,
            size,
            next: 0,
            file_page: 0,
        };
        pages::check_size(size).map_err(|source| writer.refused(source))?;
        Ok(writer)
    }

    fn refused(&self, source: PagesError) -> Error {
        Error::Pages {
            snapshot: "(being written)".to_owned(),
            part: self.part.clone(),
            source,
        }
    }

    /// Takes pages that follow each other, `first` being the number of the first.
    pub fn write(&mut self, first: u64, bytes: &[u8]) -> Result<(), Error> {
        let (whole, rest) = bytes.as_chunks::<{ PAGE_SIZE as usize }>();
        if !rest.is_empty() {
            return Err(self.refused(PagesError::NotWholePages(bytes.len())));
        }
        if first < self.next {
            return Err(self.refused(PagesError::NotAscending(first)));
        }
        let total = self.size.div_ceil(PAGE_SIZE);
        if total
            .checked_sub(first)
            .is_none_or(|room| room < whole.len() as u64)
        {
            return Err(self.refused(PagesError::BeyondEnd(first)));
        }
        for (number, page) in (first..).zip(whole) {
            match (is_zero(page), self.content) {
                (false, _) => self.page(number, page)?,
                (true, Content::Full) => {}
                (true, Content::Diff) => self.zero(number)?,
            }
        }
        self.next = first + whole.len() as u64;
        Ok(())
    }

    /// Takes whole pages that begin at byte `at` of the memory or disk.
    pub fn write_at(&mut self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        match at.is_multiple_of(PAGE_SIZE) {
            true => self.write(at / PAGE_SIZE, bytes),
            false => Err(self.refused(PagesError::NotAtAPage(at))),
        }
    }

    fn page(&mut self, number: u64, page: &[u8]) -> Result<(), Error> {
        self.settle_zeros(number)?;
        let last = self.table.runs.last_mut();
        let gap = last.as_ref().map_or(u64::MAX, |run| number - run.end());
        let bridged = match self.content {
            Content::Full => GAP_MAX,
            Content::Diff => 0,
        };
        match last {
            Some(run) if gap <= bridged => {
                run.pages += gap + 1;
                self.append_zeros(gap)?;
            }
            _ => {
                self.check_room()?;
                self.table.runs.push(Run {
                    guest_page: number,
                    pages: 1,
                    file_page: self.file_page,
                });
            }
        }
        self.append(page)
    }

    /// A page of a difference that became zero.
    fn zero(&mut self, number: u64) -> Result<(), Error> {
        if self.zeros.is_empty() || self.zeros.end != number {
            self.settle_zeros(number)?;
            self.zeros = number..number;
        }
        self.zeros.end = number + 1;
        Ok(())
    }

    /// Decides on the zero pages so far. `next` is the next page given that has data, or that comes
    /// after a gap.
    fn settle_zeros(&mut self, next: u64) -> Result<(), Error> {
        let zeros = std::mem::replace(&mut self.zeros, 0..0);
        let pages = zeros.end - zeros.start;
        if pages == 0 {
            return Ok(());
        }
        match self.table.runs.last_mut() {
            // A few between pages with data: cheaper to have than to leave out.
            Some(run) if run.end() == zeros.start && next == zeros.end && pages <= GAP_MAX => {
                run.pages += pages;
                self.append_zeros(pages)
            }
            _ => {
                self.check_room()?;
                self.table.zeros.push(zeros);
                Ok(())
            }
        }
    }

    fn check_room(&self) -> Result<(), Error> {
        match self.table.len() < RUNS_MAX {
            true => Ok(()),
            false => Err(self.refused(PagesError::TooManyRuns { limit: RUNS_MAX })),
        }
    }

    fn append_zeros(&mut self, pages: u64) -> Result<(), Error> {
        (0..pages).try_for_each(|_| self.append(&ZEROS))
    }

    fn append(&mut self, page: &[u8]) -> Result<(), Error> {
        self.file_page += 1;
        self.sink.write(page)
    }

    /// Takes the data of a file, leaving its holes out.
    pub(crate) fn write_file(&mut self, file: &File, path: &Path) -> Result<(), Error> {
        let failed = |error: io::Error| Error::io("read", path, error);
        let mut buffer = vec![0; BUFFER];
        let mut at = 0;
        while at < self.size {
            let (start, end) = match next_data(file, at).map_err(failed)? {
                Some((start, end)) => (start.max(at), end.min(self.size)),
                None => break,
            };
            at = start / PAGE_SIZE * PAGE_SIZE;
            while at < end {
                // The last page of the file may be a part of one.
                let upto = (at + BUFFER as u64).min(end.next_multiple_of(PAGE_SIZE));
                let len = (upto - at) as usize;
                let real = (upto.min(self.size) - at) as usize;
                file.read_exact_at(&mut buffer[..real], at)
                    .map_err(failed)?;
                buffer[real..len].fill(0);
                self.write(at / PAGE_SIZE, &buffer[..len])?;
                at = upto;
            }
        }
        Ok(())
    }

    /// Writes the table; gives the sink and the digest of the table.
    pub(crate) fn finish(mut self) -> Result<(BlobSink, Digest, Packed), Error> {
        self.settle_zeros(u64::MAX)?;
        let zeros = self.table.zeros.iter();
        let packed = Packed {
            runs: self.table.runs.len() as u64,
            data_pages: self.file_page,
            zero_pages: zeros.map(|pages| pages.end - pages.start).sum(),
        };
        let footer = Footer {
            content: self.content,
            zeros: packed.zero_pages > 0,
            runs: self.table.len(),
            size: self.size,
            data_pages: packed.data_pages,
        };
        let table = footer.encode(&self.table);
        self.sink.write(&table)?;
        Ok((self.sink, Digest::of(&table), packed))
    }
}

/// The next range of a file that may hold something, from `at` on.
fn next_data(file: &File, at: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // A file system without holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, u64::MAX))),
        Err(error) => return Err(error.into()),
    };
    match rustix::fs::seek(file, SeekFrom::Hole(start)) {
        Ok(end) => Ok(Some((start, end))),
        // The file shrank this moment; reading will say so.
        Err(Errno::NXIO) => Ok(Some((start, start + 1))),
        Err(error) => Err(error.into()),
    }
}
