//! Applies one layer, a tar stream, to the tree.

use std::io::{self, Read};

use crate::digest::{Digest, HashingReader};
use crate::erofs;
use crate::spool::{SpoolError, SpoolWriter};
use crate::tar::{
    Entry, EntryKind, Limits as TarLimits, Streaming, TarError, TarReader, printable,
};
use crate::tree::{FileData, Kind, Metadata, PATH_MAX, Tree, TreeError, Xattrs};

/// What an image may cost its host while it is imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files of all layers, unpacked.
    pub unpacked_bytes: u64,
    /// Entries of all layers.
    pub entries: u64,
    /// Bytes of memory for names, link targets and attributes of all layers.
    pub metadata_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            unpacked_bytes: 64 << 30,
            entries: 4_000_000,
            metadata_bytes: 2 << 30,
        }
    }
}

/// What is wrong with a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The archive itself.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// What an entry asks for.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// Not compressed as its type says.
    #[error("It is said to be compressed with {0}, but isn't")]
    Compression(&'static str),
    /// A decompressor refused the start of the stream.
    #[error("Its compressed data is damaged")]
    Decompress(#[source] io::Error),
    /// The bound on unpacked data.
    #[error(
        "It unpacks to more than {limit} bytes, the limit for one image; raise the limit if the image is trusted"
    )]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// The bound on entries.
    #[error(
        "It brings the image to more than {limit} entries, the limit for one image; raise the limit if the image is trusted"
    )]
    TooManyEntries {
        /// The limit.
        limit: u64,
    },
    /// The bound on metadata.
    #[error(
        "Its names and attributes bring the image to more than {limit} bytes, the limit for one image; raise the limit if the image is trusted"
    )]
    TooMuchMetadata {
        /// The limit.
        limit: u64,
    },
    /// One file has more attributes than a file system holds.
    #[error("Entry '{path}' has more extended attributes than fit an inode")]
    TooManyXattrs {
        /// The entry.
        path: String,
    },
    /// A symbolic link to nothing, or too far.
    #[error("Entry '{path}' is a symbolic link whose target is empty or longer than 4095 bytes")]
    LinkTarget {
        /// The entry.
        path: String,
    },
    /// The temporary file for data failed.
    #[error("Its data can't be stored")]
    Spool(#[source] io::Error),
}

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Plain,
    Gzip,
    Zstd,
}

impl Compression {
    pub(crate) fn of_magic(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            // A skippable frame (RFC 8878 §3.1.2), with which some writers start.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
            _ => Compression::Plain,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Compression::Plain => "nothing",
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
        }
    }
}

/// Unpacks a stream according to its first bytes. `said` is what its media type says: a stream
/// that is compressed otherwise is read all the same, as other tools do; one that claims to be
/// compressed and isn't is refused.
pub(crate) fn decompress<'a>(
    mut raw: impl Read + Send + 'a,
    said: Option<Compression>,
) -> Result<Box<dyn Read + Send + 'a>, LayerError> {
    let mut start = Vec::new();
    raw.by_ref()
        .take(4)
        .read_to_end(&mut start)
        .map_err(TarError::Read)?;
    let found = Compression::of_magic(&start);
    if let (Some(said), Compression::Plain) = (said, found)
        && said != Compression::Plain
    {
        return Err(LayerError::Compression(said.name()));
    }
    let whole = io::Cursor::new(start).chain(raw);
    Ok(match found {
        Compression::Plain => Box::new(whole),
        // Several members in a row are one stream: parallel and seekable writers make these.
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(
            io::BufReader::with_capacity(64 << 10, whole),
        )),
        Compression::Zstd => {
            let mut decoder = zstd::Decoder::new(whole).map_err(LayerError::Decompress)?;
            // 128 MiB: as far back as zstd itself looks unless told otherwise.
            decoder.window_log_max(27).map_err(LayerError::Decompress)?;
            Box::new(decoder)
        }
    })
}

/// Builds a root file system from layers.
pub(crate) struct Unpacker {
    pub(crate) tree: Tree,
    pub(crate) spool: SpoolWriter,
    limits: Limits,
    unpacked: u64,
    entries: u64,
    metadata: u64,
}

/// About what a node takes in memory; names imply directories that no entry describes.
const NODE_COST: u64 = 320;

/// Names that the AUFS storage driver of old Docker versions left in layers; not whiteouts.
const AUFS: &[u8] = b".wh..wh.";

impl Unpacker {
    pub(crate) fn new(spool: SpoolWriter, limits: Limits) -> Self {
        Unpacker {
            tree: Tree::new(),
            spool,
            limits,
            unpacked: 0,
            entries: 0,
            metadata: 0,
        }
    }

    /// Applies a layer, given as its unpacked tar stream; returns the digest of that.
    pub(crate) fn apply(&mut self, layer: impl Read) -> Result<Digest, LayerError> {
        self.tree.begin_layer();
        // What may still come, and then some for headers, padding and the names themselves: a
        // stream of nothing but zeros behind the end of the archive is not read for ever.
        let most = self
            .limits
            .unpacked_bytes
            .saturating_mul(2)
            .saturating_add(1 << 30);
        let hashing = HashingReader::new(layer.take(most));
        let mut reader = TarReader::new(Streaming(hashing), TarLimits::default());
        while let Some(entry) = reader.next_entry()? {
            self.count(&entry)?;
            self.entry(&mut reader, entry)?;
        }
        let Streaming(hashing) = reader.into_inner();
        Ok(hashing.finish().map_err(TarError::Read)?)
    }

    fn count(&mut self, entry: &Entry) -> Result<(), LayerError> {
        let Limits {
            unpacked_bytes,
            entries,
            metadata_bytes,
        } = self.limits;
        self.entries += 1;
        if self.entries > entries {
            return Err(LayerError::TooManyEntries { limit: entries });
        }
        self.unpacked = self.unpacked.saturating_add(entry.size);
        if self.unpacked > unpacked_bytes {
            return Err(LayerError::TooLarge {
                limit: unpacked_bytes,
            });
        }
        let xattrs: usize = entry
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        let cost = entry.path.len() + entry.link.len() + xattrs;
        self.metadata = self.metadata.saturating_add(cost as u64);
        let nodes = self.tree.len() as u64 * NODE_COST;
        if self.metadata.saturating_add(nodes) > metadata_bytes {
            return Err(LayerError::TooMuchMetadata {
                limit: metadata_bytes,
            });
        }
        Ok(())
    }

    fn entry<R: Read>(
        &mut self,
        reader: &mut TarReader<Streaming<R>>,
        entry: Entry,
    ) -> Result<(), LayerError> {
        let path = without_trailing_slashes(&entry.path);
        let (dir, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&path[..0], path),
        };
        if name == b".wh..wh..opq" {
            return Ok(self.tree.opaque(dir)?);
        }
        if has_aufs_part(path) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(TreeError::Whiteout(printable(path)).into());
            }
            return Ok(self.tree.whiteout(&[dir, b"/", hidden].concat())?);
        }
        if entry.kind == EntryKind::HardLink {
            return Ok(self.tree.link(path, &entry.link)?);
        }
        let kind = match entry.kind {
            EntryKind::Directory | EntryKind::HardLink => None,
            EntryKind::File => Some(Kind::File(self.spool_data(reader, &entry)?)),
            EntryKind::Symlink => {
                if entry.link.is_empty() || entry.link.len() >= PATH_MAX || entry.link.contains(&0)
                {
                    return Err(LayerError::LinkTarget {
                        path: printable(path),
                    });
                }
                Some(Kind::Symlink(entry.link.clone().into()))
            }
            EntryKind::CharDevice => Some(Kind::CharDevice {
                major: entry.major,
                minor: entry.minor,
            }),
            EntryKind::BlockDevice => Some(Kind::BlockDevice {
                major: entry.major,
                minor: entry.minor,
            }),
            EntryKind::Fifo => Some(Kind::Fifo),
        };
        let meta = metadata_of(&entry)?;
        match kind {
            None => self.tree.put_directory(path, meta)?,
            Some(kind) => self.tree.put(path, meta, kind)?,
        }
        Ok(())
    }

    fn spool_data<R: Read>(
        &mut self,
        reader: &mut TarReader<Streaming<R>>,
        entry: &Entry,
    ) -> Result<FileData, LayerError> {
        self.spool
            .append(reader, entry.size, entry.extents.as_deref())
            .map_err(|error| match error {
                SpoolError::Read(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    TarError::Truncated.into()
                }
                SpoolError::Read(error) => TarError::Read(error).into(),
                SpoolError::Write(error) => LayerError::Spool(error),
            })
    }
}

fn without_trailing_slashes(path: &[u8]) -> &[u8] {
    let end = path
        .iter()
        .rposition(|b| *b != b'/')
        .map_or(0, |last| last + 1);
    // The root itself: "/" or "//".
    if end == 0 {
        &path[..path.len().min(1)]
    } else {
        &path[..end]
    }
}

fn has_aufs_part(path: &[u8]) -> bool {
    path.split(|b| *b == b'/')
        .any(|part| part.starts_with(AUFS) && part != b".wh..wh..opq")
}

/// Attributes that describe the host's storage of a layer, not the image: an overlay file system
/// in the guest would take them for its own.
fn is_of_overlay(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}

/// Keeps the attributes that the image can hold; says so about the others.
pub(crate) fn keep_xattrs<N: Into<Box<[u8]>> + AsRef<[u8]>, V: Into<Box<[u8]>> + AsRef<[u8]>>(
    path: &[u8],
    xattrs: impl IntoIterator<Item = (N, V)>,
) -> Result<Xattrs, LayerError> {
    let mut kept = Xattrs::new();
    for (name, value) in xattrs {
        let bytes = name.as_ref();
        if is_of_overlay(bytes) {
            continue;
        }
        if !erofs::xattr::is_storable(bytes, value.as_ref()) {
            tracing::warn!(
                "Entry '{}': the extended attribute '{}' is left out, since a Linux guest has no such",
                printable(path),
                printable(bytes)
            );
            continue;
        }
        kept.insert(name.into(), value.into());
    }
    if erofs::xattr::encode(&kept).len() > erofs::xattr::MOST {
        return Err(LayerError::TooManyXattrs {
            path: printable(path),
        });
    }
    Ok(kept)
}

fn metadata_of(entry: &Entry) -> Result<Metadata, LayerError> {
    let xattrs = entry
        .xattrs
        .iter()
        .map(|(name, value)| (name.as_slice(), value.as_slice()));
    Ok(Metadata {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        xattrs: keep_xattrs(&entry.path, xattrs)?,
    })
}

#[cfg(test)]
mod tests;
