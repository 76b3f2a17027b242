//! Container images: from the forms they travel in to a block image that a guest mounts.
//!
//! ```text
//!  oci:DIR  oci-archive:TAR  docker-archive:TAR  (built in)           dir:ROOTFS
//!     └──────────┴──── files ───┴───────────────────┘                     │
//!                        │ manifest: the right platform, digests checked  │ hostdir
//!                        ▼                                                │
//!               layers: gzip, zstd or plain ── tar ──▶ layer              │
//!                                                        │ names, metadata│
//!                        data ──▶ spool (unnamed file)   ▼                │
//!                                    │                  tree ◀────────────┘
//!                                    └────────┬──────────┘
//!                                             ▼
//!                                      erofs ──▶ store: images/DIGEST/rootfs.erofs
//! ```
//! A registry's image takes the same way: [pulling](Store::pull) fetches its parts, which become
//! [files](Store::import) like those of a layout. What an image was made from stays beside it, for
//! [pushing](Store::push) and [saving](Store::save).
//!
//! `engine` opens a [`Store`], asks it to [import](Store::import) what the user named, and hands
//! the file at [`Image::rootfs`] to a read-only block device. The guest's kernel mounts it as
//! EROFS and puts a writable overlay above it.
//!
//! Everything here reads what strangers made. Archives are bounded by [`Limits`]; content is
//! checked against its digest; nothing an archive says can name a file of the host; and an image
//! becomes visible in the store by one rename, whole or not at all.

mod config;
mod convert;
mod digest;
mod erofs;
mod error;
mod export;
mod files;
#[doc(hidden)]
pub mod fuzz;
mod hostdir;
mod layer;
mod lock;
mod manifest;
mod reference;
mod registry;
mod source;
mod spool;
mod store;
pub mod tar;
#[cfg(test)]
mod testing;
mod tree;

pub use config::ImageConfig;
pub use digest::{Digest, DigestError, Hasher};
pub use erofs::ReadError;
#[doc(hidden)]
pub use erofs::{Inode, InodeKind, Reader};
pub use error::Error;
pub use export::Loaded;
pub use layer::{LayerError, Limits};
pub use reference::{ImageRef, RefError};
pub use registry::{Incoming, Name, NameError, Outgoing, Pulled, Pushed, RegistryError, Settings};
pub use store::{Image, Listing, Progress, Removed, Store};
pub use tar::TarError;
pub use tree::TreeError;
