//! The files that an image is made of: in a directory, in a tar file, or in this program.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::Error;
use crate::layer::{self, Compression};
use crate::tar::{EntryKind, Limits, Skip, TarError, TarReader, printable};

/// Where files come from.
pub(crate) enum Files {
    /// A directory of the host.
    Directory { image: String, dir: PathBuf },
    /// A tar archive.
    Archive {
        image: String,
        path: PathBuf,
        bytes: Bytes,
        members: HashMap<String, Member>,
    },
    /// Parts that were fetched one by one.
    Parts {
        image: String,
        parts: HashMap<String, Bytes>,
        /// The files of the store that hold some of them: they can be linked.
        paths: HashMap<String, PathBuf>,
    },
}

/// Bytes that can be read at any place, by several readers.
#[derive(Clone)]
pub(crate) enum Bytes {
    File(Arc<File>),
    Static(&'static [u8]),
    Memory(Arc<[u8]>),
}

fn copy_at(bytes: &[u8], buf: &mut [u8], offset: u64) -> usize {
    let start = usize::try_from(offset)
        .unwrap_or(usize::MAX)
        .min(bytes.len());
    let part = buf.len().min(bytes.len() - start);
    buf[..part].copy_from_slice(&bytes[start..start + part]);
    part
}

impl Bytes {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        match self {
            Bytes::File(file) => file.read_at(buf, offset),
            Bytes::Static(bytes) => Ok(copy_at(bytes, buf, offset)),
            Bytes::Memory(bytes) => Ok(copy_at(bytes, buf, offset)),
        }
    }

    fn len(&self) -> io::Result<u64> {
        match self {
            Bytes::File(file) => Ok(file.metadata()?.len()),
            Bytes::Static(bytes) => Ok(bytes.len() as u64),
            Bytes::Memory(bytes) => Ok(bytes.len() as u64),
        }
    }
}

/// Reads a range of [`Bytes`] from its start.
pub(crate) struct Cursor {
    bytes: Bytes,
    at: u64,
    end: u64,
}

impl Read for Cursor {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let most = (self.end.saturating_sub(self.at)).min(buf.len() as u64) as usize;
        let n = self.bytes.read_at(&mut buf[..most], self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Skip for Cursor {
    fn skip(&mut self, n: u64) -> io::Result<()> {
        match self.at.checked_add(n) {
            Some(to) if to <= self.end => {
                self.at = to;
                Ok(())
            }
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// One file of an archive.
pub(crate) enum Member {
    Data {
        offset: u64,
        len: u64,
    },
    /// Another member: older `docker save` writes a layer once and links to it.
    Link(String),
}

/// An image has a few files per layer; Linux mounts no more than some hundred layers.
const MEMBERS_MAX: usize = 100_000;

/// A member's name without `./`, doubled slashes and `..`.
fn normal(name: &[u8]) -> String {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in name.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    String::from_utf8_lossy(&parts.join(&b'/')).into_owned()
}

fn index(bytes: &Bytes) -> Result<HashMap<String, Member>, TarError> {
    let end = bytes.len().map_err(TarError::Read)?;
    let mut reader = TarReader::new(
        Cursor {
            bytes: bytes.clone(),
            at: 0,
            end,
        },
        Limits::default(),
    );
    let mut members = HashMap::new();
    while let Some(entry) = reader.next_entry()? {
        let name = normal(&entry.path);
        let member = match entry.kind {
            EntryKind::File if entry.extents.is_some() => {
                return Err(TarError::Sparse {
                    path: printable(&entry.path),
                });
            }
            EntryKind::File => Member::Data {
                offset: reader.position(),
                len: reader.remaining(),
            },
            EntryKind::HardLink => Member::Link(normal(&entry.link)),
            EntryKind::Symlink => {
                let dir = entry.path.iter().rposition(|b| *b == b'/').unwrap_or(0);
                Member::Link(normal(&[&entry.path[..dir], b"/", &entry.link].concat()))
            }
            _ => continue,
        };
        if members.len() >= MEMBERS_MAX {
            return Err(TarError::Extended {
                path: printable(&entry.path),
                len: MEMBERS_MAX as u64 + 1,
                limit: MEMBERS_MAX as u64,
            });
        }
        members.insert(name, member);
    }
    Ok(members)
}

impl Files {
    /// The files of a directory.
    pub(crate) fn directory(image: &str, dir: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Source {
            image: image.to_owned(),
            path: dir.to_owned(),
            source,
        };
        if !std::fs::metadata(dir).map_err(failed)?.is_dir() {
            return Err(failed(io::ErrorKind::NotADirectory.into()));
        }
        Ok(Files::Directory {
            image: image.to_owned(),
            dir: dir.to_owned(),
        })
    }

    /// The files of a tar archive, which may be compressed; `scratch` is a directory for it then.
    pub(crate) fn archive(
        image: &str,
        path: &Path,
        scratch: &Path,
        most: u64,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Source {
            image: image.to_owned(),
            path: path.to_owned(),
            source,
        };
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(failed(io::Error::other("not a regular file")));
        }
        let file = File::open(path).map_err(failed)?;
        let mut start = [0; 4];
        let n = file.read_at(&mut start, 0).map_err(failed)?;
        let bytes = match Compression::of_magic(&start[..n]) {
            Compression::Plain => Bytes::File(Arc::new(file)),
            _ => Bytes::File(Arc::new(unpacked(image, file, scratch, most)?)),
        };
        Files::of_bytes(image, path, bytes)
    }

    /// The files of a tar archive in memory.
    pub(crate) fn embedded(image: &str, bytes: &'static [u8]) -> Result<Self, Error> {
        Files::of_bytes(image, Path::new("(built in)"), Bytes::Static(bytes))
    }

    fn of_bytes(image: &str, path: &Path, bytes: Bytes) -> Result<Self, Error> {
        let image = image.to_owned();
        match index(&bytes) {
            Ok(members) => Ok(Files::Archive {
                image,
                path: path.to_owned(),
                bytes,
                members,
            }),
            Err(TarError::Read(source)) => Err(Error::Source {
                image,
                path: path.to_owned(),
                source,
            }),
            Err(source) => Err(Error::Archive { image, source }),
        }
    }

    pub(crate) fn image(&self) -> &str {
        match self {
            Files::Directory { image, .. }
            | Files::Archive { image, .. }
            | Files::Parts { image, .. } => image,
        }
    }

    /// The store's own file that holds a part.
    pub(crate) fn own_path(&self, name: &str) -> Option<&Path> {
        match self {
            Files::Parts { paths, .. } => paths.get(name).map(PathBuf::as_path),
            _ => None,
        }
    }

    /// Opens a file by its path in the image; `None` when there is none.
    pub(crate) fn open(&self, name: &str) -> Result<Option<(Cursor, u64)>, Error> {
        let (bytes, offset, len) = match self {
            Files::Directory { image, dir } => {
                let path = dir.join(name);
                let failed = |source| Error::Source {
                    image: image.clone(),
                    path: path.clone(),
                    source,
                };
                let metadata = match std::fs::metadata(&path) {
                    Ok(metadata) => metadata,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(failed(error)),
                };
                if !metadata.is_file() {
                    return Err(failed(io::Error::other("not a regular file")));
                }
                let file = File::open(&path).map_err(failed)?;
                let len = file.metadata().map_err(failed)?.len();
                (Bytes::File(Arc::new(file)), 0, len)
            }
            Files::Archive { bytes, members, .. } => {
                let mut name = normal(name.as_bytes());
                let mut hops = 0;
                loop {
                    match members.get(&name) {
                        Some(Member::Data { offset, len }) => break (bytes.clone(), *offset, *len),
                        Some(Member::Link(to)) if hops < 8 => {
                            name.clone_from(to);
                            hops += 1;
                        }
                        _ => return Ok(None),
                    }
                }
            }
            Files::Parts { parts, .. } => match parts.get(name) {
                Some(bytes) => {
                    let len = bytes.len().map_err(|error| self.unreadable(name, error))?;
                    (bytes.clone(), 0, len)
                }
                None => return Ok(None),
            },
        };
        Ok(Some((
            Cursor {
                bytes,
                at: offset,
                end: offset.saturating_add(len),
            },
            len,
        )))
    }

    /// The error for a file that can't be read.
    pub(crate) fn unreadable(&self, name: &str, source: io::Error) -> Error {
        let path = match self {
            Files::Directory { dir, .. } => dir.join(name),
            Files::Archive { path, .. } => path.clone(),
            Files::Parts { paths, .. } => paths.get(name).cloned().unwrap_or_else(|| name.into()),
        };
        Error::Source {
            image: self.image().to_owned(),
            path,
            source,
        }
    }
}

/// Unpacks a compressed archive into an unnamed file.
fn unpacked(image: &str, file: File, scratch: &Path, most: u64) -> Result<File, Error> {
    let failed = |source| Error::Unpack {
        image: image.to_owned(),
        source,
    };
    let reader = layer::decompress(file, None).map_err(failed)?;
    let store = |source| Error::store(scratch, "write into", scratch, source);
    let mut out = tempfile::tempfile_in(scratch).map_err(store)?;
    let mut reader = reader.take(most.saturating_add(1));
    let mut buf = vec![0; 128 << 10];
    let mut total = 0;
    loop {
        let n = match reader.read(&mut buf) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(layer::LayerError::Decompress(error))),
        };
        total += n as u64;
        if total > most {
            return Err(failed(layer::LayerError::TooLarge { limit: most }));
        }
        io::Write::write_all(&mut out, &buf[..n]).map_err(store)?;
    }
    Ok(out)
}
