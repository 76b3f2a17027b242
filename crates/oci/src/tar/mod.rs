//! Reading tar archives that may be hostile, and writing plain ones.
//!
//! What is read: POSIX ustar and pax, GNU (long names, base-256 numbers, all four sparse formats)
//! and the older v7. Memory is bounded by [`Limits`], whatever the archive claims.

mod header;
mod pax;
mod reader;
mod sparse;
mod writer;

pub use reader::{Skip, Streaming, TarReader};
pub(crate) use writer::TarWriter;

/// The size of headers and the unit of padding.
pub(crate) const BLOCK: usize = 512;

/// What an archive may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of one extended header or long name.
    pub extended: u64,
    /// Data areas of one sparse file.
    pub extents: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // Linux bounds one xattr to 64 KiB and all of an inode's names to 64 KiB.
        Limits {
            extended: 1 << 20,
            extents: 1 << 18,
        }
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A file with content.
    File,
    /// One more name of a file that came before.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A device of characters.
    CharDevice,
    /// A device of blocks.
    BlockDevice,
    /// A folder.
    Directory,
    /// A named pipe.
    Fifo,
}

/// A time as tar and file systems keep it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// And so many nanoseconds.
    pub nanoseconds: u32,
}

/// A part of a sparse file that holds data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where in the file.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// One member of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name, as the archive has it: it may be absolute, or lead elsewhere.
    pub path: Vec<u8>,
    /// What a link points to.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, set-id and sticky.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When its content changed.
    pub mtime: Time,
    /// Major number of a device.
    pub major: u32,
    /// Minor number of a device.
    pub minor: u32,
    /// The size of the file once unpacked.
    pub size: u64,
    /// The parts that hold data, when not everything does.
    pub extents: Option<Vec<Extent>>,
    /// Names with their prefix, and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What is wrong with an archive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TarError {
    /// Reading the archive failed (also: the compressed stream around it is damaged).
    #[error("The archive can't be read")]
    Read(#[source] std::io::Error),
    /// The archive ends inside an entry.
    #[error("The archive ends in the middle of an entry; it was cut short")]
    Truncated,
    /// The sum over a header is wrong.
    #[error(
        "A header at byte {offset} has a wrong checksum; the file is damaged or not a tar archive"
    )]
    Checksum {
        /// Where the header is.
        offset: u64,
    },
    /// A field holds no number, or one out of range.
    #[error("Entry '{path}' has an invalid {field}")]
    Field {
        /// The entry.
        path: String,
        /// The field.
        field: &'static str,
    },
    /// A type that has no meaning in an image.
    #[error("Entry '{path}' is of the unknown type {kind:?}")]
    Type {
        /// The entry.
        path: String,
        /// The type flag.
        kind: char,
    },
    /// An extended header or long name beyond the limit.
    #[error("Entry '{path}' has {len} bytes of extended header, more than {limit}")]
    Extended {
        /// The entry before which it stands.
        path: String,
        /// What it claims.
        len: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A pax header that isn't made of records.
    #[error("Entry '{path}' has a malformed pax header")]
    Pax {
        /// The entry before which it stands.
        path: String,
    },
    /// A map of a sparse file that makes no sense.
    #[error("Entry '{path}' has a malformed map of its sparse data")]
    Sparse {
        /// The entry.
        path: String,
    },
}

/// A name for messages: valid text, of bounded length.
pub(crate) fn printable(name: &[u8]) -> String {
    const MOST: usize = 200;
    let text =
        String::from_utf8_lossy(&name[..name.len().min(MOST)]).replace(char::is_control, "?");
    if name.len() > MOST {
        format!("{text}…")
    } else {
        text
    }
}
