//! What can go wrong with snapshots and their store.

use std::io;
use std::path::{Path, PathBuf};

use crate::SnapshotId;

/// An error of a snapshot or of the store; the thing is always named.
///
/// The text of an error doesn't repeat that of its source: print the chain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name or identifier that the store doesn't have.
    #[error("There is no snapshot '{name}' in the store; `skerry snapshot ls` lists what there is")]
    NoSuchSnapshot {
        /// What was asked for.
        name: String,
    },
    /// A prefix that several snapshots have.
    #[error("'{prefix}' could be any of the snapshots {}; give more digits", candidates.join(", "))]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// The identifiers that start so.
        candidates: Vec<String>,
    },
    /// A text that can't name a snapshot or a part of one.
    #[error(
        "'{name}' can't be a name; use at most {limit} letters, digits and any of '{punctuation}', a letter or digit first"
    )]
    Name {
        /// What was given.
        name: String,
        /// The longest name.
        limit: usize,
        /// What may stand between letters and digits.
        punctuation: &'static str,
    },
    /// Something that the operating system refused.
    #[error("Can't {action} '{}'; check that it exists, that it is yours and that the disk is healthy", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No room is left.
    #[error("The disk that holds '{}' is full; remove snapshots that are no longer needed, with `skerry snapshot rm`", path.display())]
    Full {
        /// What was written.
        path: PathBuf,
    },
    /// A file that the snapshot must have.
    #[error("Snapshot '{snapshot}' lacks its {part}; it is not whole, take or import it again")]
    Missing {
        /// The snapshot.
        snapshot: String,
        /// The part.
        part: String,
    },
    /// A symbolic link, directory or device in the place of a file.
    #[error(
        "The {part} of snapshot '{snapshot}' is no regular file; take or import the snapshot again"
    )]
    NotAFile {
        /// The snapshot.
        snapshot: String,
        /// The part.
        part: String,
    },
    /// A part that is shorter or longer than the manifest says.
    #[error(
        "The {part} of snapshot '{snapshot}' has {found} bytes instead of {expected}; it was cut short or changed, take or import the snapshot again"
    )]
    Size {
        /// The snapshot.
        snapshot: String,
        /// The part.
        part: String,
        /// The size it has.
        found: u64,
        /// The size it must have.
        expected: u64,
    },
    /// A part whose content isn't what it was.
    #[error(
        "The {part} of snapshot '{snapshot}' doesn't match its digest; it was changed or damaged, take or import the snapshot again"
    )]
    Digest {
        /// The snapshot.
        snapshot: String,
        /// The part.
        part: String,
    },
    /// A part that is larger than such a part may be.
    #[error(
        "The {part} of snapshot '{snapshot}' has {size} bytes, more than the {limit} that are allowed"
    )]
    TooLarge {
        /// The snapshot.
        snapshot: String,
        /// The part.
        part: String,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A JSON document that isn't as it must be.
    #[error("The {document} of snapshot '{snapshot}' is malformed; take or import it again")]
    Document {
        /// The snapshot.
        snapshot: String,
        /// Which.
        document: &'static str,
        /// Why.
        source: serde_json::Error,
    },
    /// A manifest that is no snapshot's.
    #[error("'{snapshot}' is not a snapshot of a virtual machine: {problem}")]
    NotASnapshot {
        /// What was opened.
        snapshot: String,
        /// What is wrong.
        problem: String,
    },
    /// A version of the format that this program doesn't know.
    #[error(
        "Snapshot '{snapshot}' has version {found} of the format and this program reads {known}; use the program that took it"
    )]
    Version {
        /// The snapshot.
        snapshot: String,
        /// Its version.
        found: u32,
        /// The version known here.
        known: u32,
    },
    /// A page image that can't be read or written.
    #[error("The {part} of snapshot '{snapshot}' is not a well-formed page image")]
    Pages {
        /// The snapshot.
        snapshot: String,
        /// The part.
        part: String,
        /// Why.
        source: PagesError,
    },
    /// A directory of the store with another snapshot in it than its name says.
    #[error(
        "The place of snapshot {expected} holds {found} instead; remove it with `skerry snapshot rm`"
    )]
    WrongId {
        /// By its place.
        expected: SnapshotId,
        /// By its manifest.
        found: SnapshotId,
    },
    /// A diff without the snapshot it is a difference to.
    #[error(
        "Snapshot '{snapshot}' is a difference to {parent}, which the store doesn't have; import that one first"
    )]
    MissingParent {
        /// The diff.
        snapshot: String,
        /// What it needs.
        parent: SnapshotId,
    },
    /// A diff of a machine with another memory than its parent's.
    #[error(
        "Snapshot '{snapshot}' has {size} bytes of memory and its parent {parent} has {parent_size}; they don't belong together"
    )]
    WrongParent {
        /// The diff.
        snapshot: String,
        /// Its size.
        size: u64,
        /// What it names.
        parent: SnapshotId,
        /// The size of that.
        parent_size: u64,
    },
    /// A diff whose disk doesn't fit its parent's.
    #[error(
        "The {part} of snapshot '{snapshot}' doesn't fit its parent {parent}: {problem}; take or import the snapshot again"
    )]
    BrokenChain {
        /// The diff.
        snapshot: String,
        /// The part.
        part: String,
        /// What it is a difference to.
        parent: SnapshotId,
        /// What is wrong.
        problem: &'static str,
    },
    /// A page image that can't be laid over others.
    #[error("The {part} of snapshot '{snapshot}' can't be used")]
    Layer {
        /// The snapshot.
        snapshot: String,
        /// The part.
        part: String,
        /// Why.
        source: Box<skerry_storage::DiskError>,
    },
    /// A diff of a diff of a diff, too many times.
    #[error(
        "Snapshot '{snapshot}' has more than {limit} parents; take a full snapshot in place of one more difference"
    )]
    ChainTooLong {
        /// The diff.
        snapshot: String,
        /// The limit.
        limit: usize,
    },
    /// A snapshot that others are differences to.
    #[error("Snapshot {id} is needed by {}; remove those first",
        children.iter().map(|child| child.hex()[..16].to_owned()).collect::<Vec<_>>().join(", "))]
    HasChildren {
        /// What was to be removed.
        id: SnapshotId,
        /// The differences to it.
        children: Vec<SnapshotId>,
    },
    /// A snapshot that its maker hasn't given all its parts, or some twice.
    #[error("The snapshot can't be written: {problem}")]
    Incomplete {
        /// What is wrong.
        problem: String,
    },
    /// A configuration that has no form in JSON.
    #[error("The configuration of the snapshot can't be written as JSON")]
    Encode {
        /// Why.
        source: serde_json::Error,
    },
    /// A file that is no tar archive, or one that lacks its end.
    #[error("'{}' is not a whole tar archive; name one that `skerry snapshot export` made, or export the snapshot again", path.display())]
    NotAnArchive {
        /// The file.
        path: PathBuf,
    },
    /// A tar archive with something in it that has no place there.
    #[error("Archive '{}' holds '{member}', {problem}; export the snapshot again", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// The member.
        member: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A name that another snapshot has.
    #[error(
        "The name '{name}' is that of snapshot {id}; take another name, or take it from that one with `skerry snapshot rm`"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// What has it.
        id: SnapshotId,
    },
    /// Something in the way of an export.
    #[error("'{}' exists already; name another place or remove it first", path.display())]
    Exists {
        /// What is there.
        path: PathBuf,
    },
}

/// What is wrong with a page image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PagesError {
    /// Another kind of file.
    #[error("Its end isn't that of a page image")]
    Magic,
    /// A version that this program doesn't know.
    #[error("Its version is {0} and this program reads 1; use the program that wrote it")]
    Version(u32),
    /// Pages of another size.
    #[error("Its pages have {0} bytes and not 4096; use the program that wrote it")]
    PageSize(u32),
    /// Flags that this program doesn't know.
    #[error("Its flags are {0:#x}, of which some aren't known here; use the program that wrote it")]
    Flags(u32),
    /// Bytes that must be zero.
    #[error("Its table is followed by bytes that aren't zero")]
    Padding,
    /// A file whose size isn't what its table adds up to.
    #[error("Its file has {found} bytes where its table needs {expected}")]
    FileSize {
        /// What there is.
        found: u64,
        /// What must be.
        expected: u64,
    },
    /// More memory than any machine has.
    #[error("Its size of {0} bytes is more than a machine can have")]
    Size(u64),
    /// More runs than are allowed.
    #[error("It has more than {limit} separate runs of pages; take a full snapshot instead")]
    TooManyRuns {
        /// The limit.
        limit: u64,
    },
    /// A run of no pages.
    #[error("Its run {0} is empty")]
    EmptyRun(u64),
    /// A run that doesn't come after the one before.
    #[error("Its run {0} overlaps the one before or comes too late")]
    Order(u64),
    /// A run beyond the end.
    #[error("Its run {0} goes beyond the end")]
    Bounds(u64),
    /// A run whose data isn't where it must be.
    #[error("Its run {0} doesn't have its data where the run before ends")]
    FilePage(u64),
    /// A page written after a later one.
    #[error("Page {0} was written after a later page; write pages in ascending order")]
    NotAscending(u64),
    /// A page written beyond the end.
    #[error("Page {0} was written beyond the end; a snapshot's memory has a fixed size")]
    BeyondEnd(u64),
    /// Bytes at a place where no page begins.
    #[error("Bytes were written at offset {0}, where no page begins")]
    NotAtAPage(u64),
    /// Bytes that don't make whole pages.
    #[error("{0} bytes were written, which isn't a number of whole pages")]
    NotWholePages(usize),
    /// An image that says it is complete in a place of a diff, or the other way round.
    #[error("It and the configuration disagree about being a difference to a parent")]
    Content,
    /// An image of another size than the configuration says.
    #[error("It stands for {found} bytes and the configuration says {expected}")]
    Disagrees {
        /// By the image.
        found: u64,
        /// By the configuration.
        expected: u64,
    },
}

/// What is wrong with a working set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkingSetError {
    /// Another kind of file.
    #[error("It doesn't begin as a working set does")]
    Magic,
    /// A version that this program doesn't know.
    #[error("Its version is {0} and this program reads 1; have it recorded again")]
    Version(u8),
    /// It ends too early.
    #[error("It is cut short")]
    Short,
    /// It goes on after its end.
    #[error("There is more after its end")]
    Long,
    /// A number that isn't one.
    #[error("A number in it is too large or not in its shortest form")]
    Number,
    /// More ranges than are allowed, or than there can be.
    #[error("It has more than {limit} ranges, or more than it has bytes for")]
    TooMany {
        /// The limit.
        limit: u64,
    },
    /// A range without pages, or one that is a part of the one before.
    #[error("A range in it is empty or touches the one before")]
    Empty,
    /// A page that the machine doesn't have.
    #[error("It goes beyond the end of the memory")]
    BeyondEnd,
}

impl Error {
    /// The error of an operation of the system.
    pub(crate) fn io(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        let (path, source) = (path.to_owned(), source.into());
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Full { path },
            _ => Error::Io {
                action,
                path,
                source,
            },
        }
    }

    /// Whether the snapshot itself is at fault, rather than the machine it is read on.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Error::Missing { .. }
                | Error::NotAFile { .. }
                | Error::Size { .. }
                | Error::Digest { .. }
                | Error::TooLarge { .. }
                | Error::Document { .. }
                | Error::NotASnapshot { .. }
                | Error::Pages { .. }
                | Error::WrongId { .. }
                | Error::BrokenChain { .. }
                | Error::Layer { .. }
                | Error::NotAnArchive { .. }
        )
    }
}
