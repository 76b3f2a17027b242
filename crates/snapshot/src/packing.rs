//! Writing page images: one pass that finds zeros, hashes and writes.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use skerry_oci::Hasher;

use crate::pages::{self, Content, Footer, PAGE_SIZE, RUNS_MAX, Run};
use crate::{Digest, Error, PagesError};

/// A gap of so many zero pages is cheaper to write than a further run is to map.
const GAP_MAX: u64 = 15;
/// Fits the cache, where the bytes are hashed and written from.
const BUFFER: usize = 256 << 10;
const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// A file that is hashed while it is written.
pub(crate) struct BlobSink {
    pub(crate) path: PathBuf,
    file: File,
    hasher: Hasher,
    size: u64,
}

impl BlobSink {
    pub(crate) fn create(path: PathBuf) -> Result<Self, Error> {
        let mut options = File::options();
        let file = options.write(true).create_new(true).open(&path);
        Ok(BlobSink {
            file: file.map_err(|error| Error::io("make", &path, error))?,
            path,
            hasher: Hasher::default(),
            size: 0,
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hasher.update(bytes);
        let written = self.file.write_all(bytes);
        written.map_err(|error| Error::io("write", &self.path, error))?;
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// The digest and the size of what was written.
    pub(crate) fn finish(self) -> (Digest, u64) {
        (self.hasher.finish(), self.size)
    }
}

/// How much a page image came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packed {
    /// Separate runs of pages.
    pub runs: u64,
    /// Pages in them.
    pub data_pages: u64,
}

/// Takes the pages of a memory or a disk, in ascending order.
///
/// Of a [full](Content::Full) image, zero pages are left out. Of a difference, each page given is
/// kept.
pub struct PageWriter {
    sink: BlobSink,
    part: String,
    buffer: Vec<u8>,
    runs: Vec<Run>,
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
            buffer: Vec::with_capacity(BUFFER),
            runs: Vec::new(),
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
            if self.content == Content::Diff || !is_zero(page) {
                self.page(number, page)?;
            }
        }
        self.next = first + whole.len() as u64;
        Ok(())
    }

    fn page(&mut self, number: u64, page: &[u8]) -> Result<(), Error> {
        let gap = self.runs.last().map_or(u64::MAX, |run| number - run.end());
        let bridged = match self.content {
            Content::Full => GAP_MAX,
            Content::Diff => 0,
        };
        if gap <= bridged {
            for _ in 0..gap {
                self.append(&ZEROS)?;
            }
            if let Some(run) = self.runs.last_mut() {
                run.pages += gap + 1;
            }
        } else if self.runs.len() as u64 == RUNS_MAX {
            return Err(self.refused(PagesError::TooManyRuns { limit: RUNS_MAX }));
        } else {
            self.runs.push(Run {
                guest_page: number,
                pages: 1,
                file_page: self.file_page,
            });
        }
        self.append(page)
    }

    fn append(&mut self, page: &[u8]) -> Result<(), Error> {
        self.buffer.extend_from_slice(page);
        self.file_page += 1;
        if self.buffer.len() >= BUFFER {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        self.sink.write(&self.buffer)?;
        self.buffer.clear();
        Ok(())
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
        self.flush()?;
        let packed = Packed {
            runs: self.runs.len() as u64,
            data_pages: self.file_page,
        };
        let footer = Footer {
            content: self.content,
            runs: packed.runs,
            size: self.size,
            data_pages: packed.data_pages,
        };
        let table = footer.encode(&self.runs);
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
