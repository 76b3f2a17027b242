//! Disks: what a virtual block device reads and writes.
//!
//! ```text
//!   guest RAM (VolatileSlice)                      host file or block device
//!        │                                                    ▲
//!        ▼                                                    │ preadv / pwritev /
//!   virtio-blk ── IoBuf / IoBufMut ──▶ dyn Disk ──▶ RawDisk ──┘ fallocate / fdatasync
//!   (devices)       no copy             trait          ▲
//!                                                      │
//!   engine ── scratch::create(dir) ────────────────────┘  an unlinked sparse file that
//!             one per VM: the writable overlay            already holds an empty ext4
//! ```
//!
//! `devices` calls [`Disk`] from the thread of a virtio queue; `engine` opens the disks and hands
//! them over. Transfers are positional, so that one disk serves several queues without a lock, and
//! whole: a call moves every byte it was asked for or fails, naming the disk.
//!
//! Guest memory is reached through [`IoBuf`] and [`IoBufMut`], which carry raw addresses rather
//! than slices, since the guest may write that memory while the host reads it.

mod disk;
mod error;
mod iobuf;
mod raw;
pub mod scratch;
mod sys;

pub use disk::{Abilities, Disk, SECTOR_SIZE, check_range};
pub use error::{DiskError, Operation};
pub use iobuf::{IoBuf, IoBufMut, MarkDirty};
pub use raw::{Access, RawDisk};
