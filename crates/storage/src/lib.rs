//! Disks: what a virtual block device reads and writes.
//!
//! ```text
//!   guest RAM (VolatileSlice)                      host file or block device
//!        │                                                    ▲
//!        ▼                                                    │ preadv / pwritev /
//!   virtio-blk ── IoBuf / IoBufMut ──▶ dyn Disk ──▶ RawDisk ──┘ fallocate / fdatasync
//!   (devices)       no copy             trait
//!
//!                   dyn Disk ──▶ Overlay ──▶ top: own unlinked sparse file
//!                                  ▲  └────▶ Layer, Layer, ...: read-only files, shared
//!   engine ── scratch::overlay ────┤         an empty ext4 that all virtual machines share
//!             Overlay::new ────────┘         disks of snapshots, what forks wrote
//! ```
//!
//! `devices` calls [`Disk`] from the thread of a virtio queue; `engine` opens the disks and hands
//! them over. Transfers are positional, so that one disk serves several queues without a lock, and
//! whole: a call moves every byte it was asked for or fails, naming the disk.
//!
//! An [`Overlay`] takes changes apart from what it was made of, so that a disk can be frozen, shared
//! with clones, rewound, and saved as a difference.
//!
//! Guest memory is reached through [`IoBuf`] and [`IoBufMut`], which carry raw addresses rather
//! than slices, since the guest may write that memory while the host reads it.

mod disk;
mod error;
mod iobuf;
mod layer;
mod overlay;
mod raw;
pub mod scratch;
mod sys;
mod transfer;

pub use disk::{Abilities, Disk, SECTOR_SIZE, check_range};
pub use error::{DiskError, Operation};
pub use iobuf::{IoBuf, IoBufMut, MarkDirty};
pub use layer::{CLUSTER_SIZE, Layer, LayerRun, Part, flatten};
pub use overlay::{OVERLAY_MAX, Overlay};
pub use raw::{Access, RawDisk};
pub use transfer::{read_file, write_file};
