//! Guest memory: slots of RAM, address translation, and every access that instructions make.
//!
//! ```text
//! load, store, rmw (access.rs) ── segment (segment.rs) ── first-level TLB hit ── host access
//!                                                             │ miss
//!       device exit <── device.rs <── no RAM ── translate (mmu.rs): second level, page walk
//! ```

mod access;
pub(crate) mod area;
mod bulk;
mod device;
mod dirty;
pub(crate) mod home;
mod int;
pub(crate) mod jumps;
mod memory;
mod mmu;
mod segment;
mod tlb;
mod walk;

#[cfg(test)]
mod tests;

pub use int::Int;

pub use memory::{Backing, MapRefused, Memory, PageState, Slot};
pub use mmu::{Access, Mmu};

pub(crate) use device::DeviceReplay;
pub(crate) use memory::{SlotTable, changed_pages, code_changes};
pub(crate) use tlb::{Target, TlbView};

/// Log2 of the page size.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// What the host has for a large page.
pub(crate) const HOST_LARGE_PAGE: usize = 2 << 20;
/// The bits of an address within its page.
pub const PAGE_MASK: u64 = (1 << PAGE_SHIFT) - 1;
