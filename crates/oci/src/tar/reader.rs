//! Entries one after the other, with their extended headers applied.

use std::io::{self, Read};

use super::header::Header;
use super::pax::Pax;
use super::sparse::{self, MapReader};
use super::{BLOCK, Entry, EntryKind, Extent, Limits, TarError, Time, printable};

/// A reader that can pass over bytes.
pub trait Skip: Read {
    /// Passes over `n` bytes; [`io::ErrorKind::UnexpectedEof`] when there are fewer.
    fn skip(&mut self, n: u64) -> io::Result<()>;
}

/// A reader that passes over bytes by reading them.
#[derive(Debug)]
pub struct Streaming<R>(pub R);

impl<R: Read> Read for Streaming<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl<R: Read> Skip for Streaming<R> {
    fn skip(&mut self, n: u64) -> io::Result<()> {
        match io::copy(&mut self.0.by_ref().take(n), &mut io::sink())? {
            skipped if skipped < n => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

/// Reads the entries of an archive.
#[derive(Debug)]
pub struct TarReader<R> {
    source: R,
    limits: Limits,
    /// Bytes read or passed over so far.
    position: u64,
    /// Data of the current entry that is still to come.
    remaining: u64,
    /// Zeros after that data.
    padding: u64,
    ended: bool,
}

/// What stands before an entry and changes it.
#[derive(Default)]
struct Extensions {
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Pax,
}

fn padding_of(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

impl<R: Skip> TarReader<R> {
    /// Reads from `source`.
    pub fn new(source: R, limits: Limits) -> Self {
        TarReader {
            source,
            limits,
            position: 0,
            remaining: 0,
            padding: 0,
            ended: false,
        }
    }

    /// Where the next unread byte is: after [`TarReader::next_entry`], the data of the entry.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// How many bytes of data the archive stores for the current entry, not yet read.
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// The source, wherever it stands.
    pub fn into_inner(self) -> R {
        self.source
    }

    /// Passes over what is left of the current entry and reads the next.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extensions = Extensions::default();
        let mut extended = false;
        loop {
            let at = self.position + self.remaining + self.padding;
            let Some(block) = self.next_header()? else {
                // An extended header that announces nothing means that the rest was cut off.
                return if extended {
                    Err(TarError::Truncated)
                } else {
                    Ok(None)
                };
            };
            let header = Header(&block);
            if !header.checksum_is_right() {
                return Err(TarError::Checksum { offset: at });
            }
            let name = header.path();
            let field = |field| TarError::Field {
                path: printable(&name),
                field,
            };
            let size = header.size().ok_or_else(|| field("size"))?;
            match header.type_flag() {
                kind @ (b'x' | b'g' | b'L' | b'K') => {
                    let bytes = self.extended(&name, size)?;
                    let until_nul = || bytes.split(|b| *b == 0).next().unwrap_or(&[]).to_vec();
                    match kind {
                        b'L' => extensions.long_path = Some(until_nul()),
                        b'K' => extensions.long_link = Some(until_nul()),
                        b'x' => {
                            extensions.pax =
                                Pax::parse(&bytes, self.limits.extents).ok_or_else(|| {
                                    TarError::Pax {
                                        path: printable(&name),
                                    }
                                })?;
                        }
                        // Global headers hold comments; nothing that images are made with puts
                        // attributes there.
                        _ => {}
                    }
                    extended |= kind != b'g';
                }
                // A volume label.
                b'V' => self.set_data(size),
                _ => return self.entry(&header, extensions).map(Some),
            }
        }
    }

    fn set_data(&mut self, size: u64) {
        self.remaining = size;
        self.padding = padding_of(size);
    }

    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<usize, TarError> {
        let mut filled = 0;
        while filled < BLOCK {
            match self.source.read(&mut block[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TarError::Read(error)),
            }
        }
        self.position += filled as u64;
        Ok(filled)
    }

    /// The next header; `None` at the end: two blocks of zeros, or one, or just no more bytes.
    fn next_header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        if self.ended {
            return Ok(None);
        }
        let rest = self.remaining.saturating_add(self.padding);
        if rest > 0 {
            self.source.skip(rest).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => TarError::Truncated,
                _ => TarError::Read(error),
            })?;
            self.position = self.position.saturating_add(rest);
            (self.remaining, self.padding) = (0, 0);
        }
        let mut block = [0; BLOCK];
        match self.read_block(&mut block)? {
            BLOCK if Header(&block).is_zero() => self.ended = true,
            BLOCK => return Ok(Some(block)),
            0 => self.ended = true,
            _ => return Err(TarError::Truncated),
        }
        Ok(None)
    }

    fn extended(&mut self, name: &[u8], size: u64) -> Result<Vec<u8>, TarError> {
        let limit = self.limits.extended;
        if size > limit {
            return Err(TarError::Extended {
                path: printable(name),
                len: size,
                limit,
            });
        }
        self.set_data(size);
        let mut bytes = Vec::new();
        // Grown as bytes arrive: an archive can't make us allocate what it doesn't hold.
        self.read_to_end(&mut bytes).map_err(TarError::Read)?;
        if bytes.len() as u64 != size {
            return Err(TarError::Truncated);
        }
        Ok(bytes)
    }

    fn entry(&mut self, header: &Header<'_>, extensions: Extensions) -> Result<Entry, TarError> {
        let Extensions {
            long_path,
            long_link,
            pax,
        } = extensions;
        let is_sparse_1 = pax.sparse.major == Some(1) && pax.sparse.minor == Some(0);
        let path = pax
            .sparse
            .name
            .or(pax.path)
            .or(long_path)
            .unwrap_or_else(|| header.path());
        let link = pax
            .link
            .or(long_link)
            .unwrap_or_else(|| header.link().to_vec());
        let field = |field| TarError::Field {
            path: printable(&path),
            field,
        };
        let id = |value: Option<i64>| u32::try_from(value?).ok();
        let kind = match header.type_flag() {
            // In v7 archives a directory is a file whose name ends in a slash.
            b'0' | 0 | b'7' | b'S' if path.ends_with(b"/") => EntryKind::Directory,
            b'0' | 0 | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice,
            b'4' => EntryKind::BlockDevice,
            // 'D' is a directory of an incremental dump, whose data is a list of names.
            b'5' | b'D' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => {
                return Err(TarError::Type {
                    path: printable(&path),
                    kind: other.into(),
                });
            }
        };
        let stored = match (header.type_flag(), kind) {
            (b'D', _) | (_, EntryKind::File) => pax
                .size
                .or_else(|| header.size())
                .ok_or_else(|| field("size"))?,
            // The others have no data, whatever their size says.
            _ => 0,
        };
        self.set_data(stored);
        let is_device = matches!(kind, EntryKind::CharDevice | EntryKind::BlockDevice);
        let (major, minor) = match is_device.then(|| header.device()) {
            None => (0, 0),
            Some(numbers) => numbers
                .and_then(|(major, minor)| Some((id(Some(major))?, id(Some(minor))?)))
                .ok_or_else(|| field("device number"))?,
        };
        let seconds = || {
            Some(Time {
                seconds: header.mtime()?,
                nanoseconds: 0,
            })
        };
        let mut entry = Entry {
            kind,
            mode: (header.mode().ok_or_else(|| field("mode"))? & 0o7777) as u16,
            uid: pax
                .uid
                .or_else(|| id(header.uid()))
                .ok_or_else(|| field("owner"))?,
            gid: pax
                .gid
                .or_else(|| id(header.gid()))
                .ok_or_else(|| field("group"))?,
            mtime: pax
                .mtime
                .or_else(seconds)
                .ok_or_else(|| field("modification time"))?,
            major,
            minor,
            size: if kind == EntryKind::File { stored } else { 0 },
            extents: None,
            xattrs: pax.xattrs,
            path,
            link,
        };
        if kind == EntryKind::File {
            let found = match () {
                () if header.type_flag() == b'S' => self.old_sparse(header)?,
                () if is_sparse_1 => self.sparse_1_0(pax.sparse.real_size)?,
                () => Some((pax.sparse.extents, pax.sparse.real_size)),
            };
            let malformed = || TarError::Sparse {
                path: printable(&entry.path),
            };
            if let (Some(extents), size) = found.ok_or_else(malformed)? {
                let size = size.ok_or_else(malformed)?;
                if !sparse::is_sound(&extents, size, self.remaining) {
                    return Err(malformed());
                }
                (entry.size, entry.extents) = (size, Some(extents));
            }
        }
        Ok(entry)
    }

    /// Reads the rest of the map of GNU's old format, in blocks after the header.
    fn old_sparse(&mut self, header: &Header<'_>) -> Result<Option<SparseMap>, TarError> {
        let most = self.limits.extents;
        let mut extents = Vec::new();
        let (area, mut more, size) = header.old_sparse();
        if sparse::push_old(area, &mut extents, most).is_none() {
            return Ok(None);
        }
        while more {
            let mut block = [0; BLOCK];
            if self.read_block(&mut block)? != BLOCK {
                return Err(TarError::Truncated);
            }
            // A block that names nothing and asks for more would never end.
            let before = extents.len();
            if sparse::push_old(&block[..504], &mut extents, most).is_none()
                || extents.len() == before
            {
                return Ok(None);
            }
            more = block[504] != 0;
        }
        Ok(Some((Some(extents), size)))
    }

    /// Reads the map of format 1.0, which stands in front of the data.
    fn sparse_1_0(&mut self, size: Option<u64>) -> Result<Option<SparseMap>, TarError> {
        let mut map = MapReader::new(self.limits.extents);
        loop {
            let mut block = [0; BLOCK];
            let Some(rest) = self.remaining.checked_sub(BLOCK as u64) else {
                return Ok(None);
            };
            if self.read_block(&mut block)? != BLOCK {
                return Err(TarError::Truncated);
            }
            self.remaining = rest;
            match map.block(&block) {
                None => return Ok(None),
                Some(true) => return Ok(Some((Some(map.finish()), size))),
                Some(false) => {}
            }
        }
    }
}

/// The areas and the real size.
type SparseMap = (Option<Vec<Extent>>, Option<u64>);

/// The data of the current entry.
impl<R: Skip> Read for TarReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buf.len());
        if most == 0 {
            return Ok(0);
        }
        let n = self.source.read(&mut buf[..most])?;
        self.remaining -= n as u64;
        self.position += n as u64;
        Ok(n)
    }
}
