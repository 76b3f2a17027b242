//! What can go wrong with images and their store.

use std::io;
use std::path::PathBuf;

use crate::digest::{Digest, DigestError};
use crate::erofs::ReadError;
use crate::layer::LayerError;
use crate::registry::RegistryError;
use crate::tar::TarError;

/// An error of an image or of the store; the thing is always named.
///
/// The text of an error doesn't repeat that of its source: print the chain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A registry, or what was said about it.
    #[error(transparent)]
    Registry(Box<RegistryError>),
    /// A name that the store doesn't have.
    #[error(
        "There is no image '{name}' in the store; `skerry images` lists what there is, `skerry pull` gets one from a registry, and `oci:DIR`, `oci-archive:TAR`, `docker-archive:TAR` or `dir:ROOTFS` name one outside of it"
    )]
    NoSuchImage {
        /// What was asked for.
        name: String,
    },
    /// A prefix that several images have.
    #[error("'{prefix}' could be any of the images {}; give more digits", candidates.join(", "))]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// The digests that start so.
        candidates: Vec<String>,
    },
    /// A file or directory of the image can't be read.
    #[error("Image '{image}' can't be read at '{}'; check that the path exists and is readable", path.display())]
    Source {
        /// The image.
        image: String,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The archive around the image is no tar file.
    #[error("Image '{image}' is not a whole tar archive; save or copy it again")]
    Archive {
        /// The image.
        image: String,
        /// Why.
        source: TarError,
    },
    /// A compressed archive that can't be unpacked.
    #[error(
        "Image '{image}' is a compressed archive that can't be unpacked; save or copy it again"
    )]
    Unpack {
        /// The image.
        image: String,
        /// Why.
        source: LayerError,
    },
    /// A part that the image should have.
    #[error("Image '{image}' lacks '{part}'{hint}")]
    MissingPart {
        /// The image.
        image: String,
        /// The file in it.
        part: String,
        /// What it may be instead, and what to do.
        hint: &'static str,
    },
    /// A JSON document that isn't as it must be.
    #[error("Image '{image}' has a malformed {document}; save or copy it again")]
    Document {
        /// The image.
        image: String,
        /// Which.
        document: String,
        /// Why.
        source: serde_json::Error,
    },
    /// A JSON document that is far too long.
    #[error(
        "Image '{image}' has a {document} of {size} bytes, more than the {limit} that such a document may have"
    )]
    DocumentSize {
        /// The image.
        image: String,
        /// Which.
        document: String,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A tag that the image doesn't have, or none where several are there.
    #[error("Image '{image}' {}; its tags are: {}",
        if *asked { "has no such tag" } else { "has several tags and none was named; add one of them, as `:TAG`" },
        if tags.is_empty() { "(none)".to_owned() } else { tags.join(", ") })]
    Tag {
        /// The image.
        image: String,
        /// Whether a tag was asked for.
        asked: bool,
        /// What there is.
        tags: Vec<String>,
    },
    /// No variant for this kind of machine.
    #[error(
        "Image '{image}' is not for linux/amd64 but for {found}; get it for that platform, for example with `skopeo copy --override-os linux --override-arch amd64`"
    )]
    Platform {
        /// The image.
        image: String,
        /// What it is for.
        found: String,
    },
    /// A type of document or layer that has no meaning here.
    #[error(
        "Image '{image}' has a {what} of the type '{media_type}', which is not part of a container image; name an image that can be run"
    )]
    MediaType {
        /// The image.
        image: String,
        /// The part.
        what: &'static str,
        /// Its type.
        media_type: String,
    },
    /// A digest that isn't one.
    #[error("Image '{image}' names a part by something that is not a usable digest")]
    Digest {
        /// The image.
        image: String,
        /// Why.
        source: DigestError,
    },
    /// Content that is not what its digest says.
    #[error(
        "Image '{image}' is damaged: '{part}' has the digest {found} instead of {expected}; save or copy it again"
    )]
    Mismatch {
        /// The image.
        image: String,
        /// The part.
        part: String,
        /// What it should be.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// The manifest and the configuration disagree.
    #[error(
        "Image '{image}' is malformed: its manifest has {layers} layers, its configuration {diff_ids}; build it again"
    )]
    LayerCount {
        /// The image.
        image: String,
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        diff_ids: usize,
    },
    /// A layer that can't be applied.
    #[error("Image '{image}' can't be unpacked: layer {number} of {count} ({layer}) is not usable")]
    Layer {
        /// The image.
        image: String,
        /// The layer, by its digest or file name.
        layer: String,
        /// Its number, from 1.
        number: usize,
        /// Of how many.
        count: usize,
        /// Why.
        source: LayerError,
    },
    /// A directory that should be a root file system.
    #[error("'{}' can't be used as a root file system: '{}' can't be read; check its permissions, or run as its owner", root.display(), path.display())]
    HostTree {
        /// The directory.
        root: PathBuf,
        /// The name in it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of a directory changed while it was copied.
    #[error("'{}' changed while it was being copied; leave the directory alone and try again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What was noticed.
        source: io::Error,
    },
    /// An archive of images that can't be written.
    #[error("The archive can't be written; check the disk and the permissions of where it goes")]
    Save {
        /// Why.
        source: io::Error,
    },
    /// Larger than the format allows.
    #[error("Image '{image}' is larger than 16 TiB, more than its file system can hold")]
    ImageSize {
        /// The image.
        image: String,
    },
    /// The disk of the store is full.
    #[error("The file system of the image store '{}' is full; free space there, for example with `skerry rmi`", store.display())]
    StoreFull {
        /// The store.
        store: PathBuf,
        /// The error of the host.
        source: io::Error,
    },
    /// The store can't be used.
    #[error("The image store can't {action} '{}'; check its permissions and its disk", path.display())]
    Store {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A store made by another version.
    #[error("The image store '{}' has the format '{found}', which this version doesn't know; move it away or name another store", path.display())]
    StoreFormat {
        /// The store.
        path: PathBuf,
        /// What it says.
        found: String,
    },
    /// An entry whose files are damaged.
    #[error(
        "Image {digest} in the store is damaged: {problem}; remove it with `skerry rmi {digest}` and import it again"
    )]
    Corrupt {
        /// The entry.
        digest: String,
        /// What is wrong.
        problem: String,
    },
    /// An entry whose file system is damaged.
    #[error(
        "Image {digest} in the store is damaged; remove it with `skerry rmi {digest}` and import it again"
    )]
    CorruptRootfs {
        /// The entry.
        digest: String,
        /// What is wrong.
        source: ReadError,
    },
}

impl From<RegistryError> for Error {
    fn from(error: RegistryError) -> Self {
        Error::Registry(Box::new(error))
    }
}

impl Error {
    /// What a registry did, where that is what went wrong.
    pub fn of_registry(&self) -> Option<&RegistryError> {
        match self {
            Error::Registry(error) => Some(error),
            _ => None,
        }
    }

    /// An error of the store's own files; a full disk is told apart.
    pub(crate) fn store(
        store: &std::path::Path,
        action: &'static str,
        path: &std::path::Path,
        source: io::Error,
    ) -> Self {
        if is_full(&source) {
            return Error::StoreFull {
                store: store.to_owned(),
                source,
            };
        }
        Error::Store {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// Whether an error says that there is no space, or none left for this user.
pub(crate) fn is_full(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::NOSPC | Errno::DQUOT))
}
