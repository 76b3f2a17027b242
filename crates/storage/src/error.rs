//! What can go wrong with a disk.

use std::io;
use std::path::PathBuf;

/// What was being done to a disk when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reading bytes.
    Read,
    /// Writing bytes.
    Write,
    /// Making earlier writes durable.
    Flush,
    /// Giving back the space of a range.
    Discard,
    /// Turning a range into zeros.
    WriteZeroes,
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
            Operation::WriteZeroes => "write zeroes",
        })
    }
}

/// An error of a disk; the disk is always named.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The file could not be opened.
    #[error("Disk '{}' can't be opened; check that the path exists and may be {}", path.display(),
        if *write { "read and written" } else { "read" })]
    Open {
        /// The file.
        path: PathBuf,
        /// Whether writing was asked for.
        write: bool,
        /// Why.
        source: io::Error,
    },
    /// The path is a directory, a pipe or another thing without blocks.
    #[error("Disk '{}' is {kind}; give a regular file or a block device", path.display())]
    NotADisk {
        /// The path.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// Another process (or another disk of this one) holds the file.
    #[error("Disk '{}' is in use by another virtual machine; stop that one{}", path.display(),
        if *write { ", or attach the disk read-only to both" } else { ", which writes to it" })]
    Locked {
        /// The file.
        path: PathBuf,
        /// Whether it was to be opened for writing.
        write: bool,
    },
    /// The length is not a whole number of sectors.
    #[error(
        "Disk '{}' is {len} bytes long, which is not a multiple of 512; pad it with `truncate -s {}`",
        path.display(), len.next_multiple_of(512)
    )]
    UnalignedSize {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// The file holds nothing.
    #[error("Disk '{}' is empty; give it a size with `truncate -s SIZE`", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A request reaches past the end of the disk.
    #[error("Disk '{disk}' has {size} bytes, but {len} bytes at offset {offset} were asked for")]
    OutOfRange {
        /// The disk.
        disk: String,
        /// Where the request starts.
        offset: u64,
        /// How long it is.
        len: u64,
        /// The size of the disk.
        size: u64,
    },
    /// A change was asked of a read-only disk.
    #[error("Disk '{disk}' is attached read-only; attach it without `ro` to {operation}")]
    ReadOnly {
        /// The disk.
        disk: String,
        /// What was asked.
        operation: Operation,
    },
    /// The file became shorter than it was when it was opened.
    #[error(
        "Disk '{disk}' was cut short on the host while in use: nothing left at offset {offset}; restore its size"
    )]
    Shrunk {
        /// The disk.
        disk: String,
        /// Where the data ended.
        offset: u64,
    },
    /// The host's file system has no room for a write.
    #[error("Disk '{disk}' can't grow: the host's file system is full; free some space on it")]
    HostFull {
        /// The disk.
        disk: String,
        /// The error of the host.
        source: io::Error,
    },
    /// The host can't do this operation on this disk.
    #[error("Disk '{disk}' can't {operation}: the host's file system has no such operation")]
    Unsupported {
        /// The disk.
        disk: String,
        /// What was asked.
        operation: Operation,
    },
    /// The host failed.
    #[error("Disk '{disk}' failed to {operation} at offset {offset}; check the host's storage")]
    Io {
        /// The disk.
        disk: String,
        /// What was being done.
        operation: Operation,
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// A disk of a size that can't be.
    #[error("A disk of {size} bytes is not possible; give it a multiple of 512, at most {limit}")]
    Size {
        /// What was asked for.
        size: u64,
        /// The largest.
        limit: u64,
    },
    /// A layer whose runs make no sense.
    #[error("Run {number} of a layer of a disk {problem}; take the snapshot that it is from again")]
    Layer {
        /// Which, from 0 on.
        number: usize,
        /// What is wrong.
        problem: &'static str,
    },
    /// A layer of a larger disk.
    #[error(
        "A layer has content up to byte {end}, beyond the {size} bytes of the disk that it is for; give it the disk that it was made for"
    )]
    LayerEnd {
        /// Where the layer ends.
        end: u64,
        /// The size of the disk.
        size: u64,
    },
    /// A temporary file for a scratch disk could not be made.
    #[error("No scratch disk can be made in '{}'; check that the directory exists, is writable and has space", dir.display())]
    Scratch {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}
