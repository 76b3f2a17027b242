//! Snapshots of virtual machines on disk: how they are written, checked, kept and carried about.
//!
//! ```text
//!   engine                                          engine, machine
//!     │ state bytes, configuration, pages              ▲ the same, once every digest is right
//!     ▼                                                │
//!  SnapshotWriter ── PageWriter ──┐             Snapshot ◀── seal: what this host has checked
//!     │ staging: a hidden         │ pages          ▲ layout: no symbolic links, bounded reads
//!     │ directory, one rename     ▼                │
//!     └──────▶ ROOT/HEX/{oci-layout, index.json, blobs/sha256/…} ◀── SnapshotStore
//!                                                                     │ names, chains, removal
//!                              oci directory or tar archive ◀─ transfer ─▶
//! ```
//! A snapshot is an OCI image layout: a manifest names a configuration, one blob with the state of
//! the machine, one [page image](PageImage) with its memory, and any number of disks (page images
//! too) and other blobs. Its identity is the digest of its manifest, which covers all the rest.
//!
//! Nothing here knows what a machine is. State comes and goes as bytes, configuration as any
//! `serde` value. What comes from disk is taken for hostile: sizes are bounded, tables are checked,
//! and nothing is handed out before its digest was.

mod error;
#[doc(hidden)]
pub mod fuzz;
mod hashing;
mod layout;
mod manifest;
mod merge;
mod packing;
mod pages;
mod seal;
mod snapshot;
mod staging;
mod store;
mod transfer;
mod working_set;
mod writer;

pub use error::{Error, PagesError, WorkingSetError};
pub use manifest::{ARTIFACT_TYPE, parent_of};
pub use merge::{Merged, merged_disks, merged_memory};
pub use packing::{Packed, PageWriter};
pub use pages::{Content, PAGE_SIZE, PageImage, Run};
pub use skerry_oci::Digest;
pub use snapshot::{Extra, Snapshot, Trust};
pub use store::{CHAIN_MAX, Listing, SnapshotInfo, SnapshotStore};
pub use transfer::{Form, Receiving};
pub use working_set::WorkingSet;
pub use writer::{SnapshotWriter, WriteOptions};

/// The identity of a snapshot: the digest of its manifest.
pub type SnapshotId = Digest;
