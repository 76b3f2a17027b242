//! The heap: an allocator over the range that the host gave.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr;

use skerry_sandbox_abi::status;
use talc::{ErrOnOom, Span, Talc, Talck, locking::AssumeUnlockable};

use crate::entry::Host;

/// The allocator, and what the host may know of it.
struct Heap(Talck<AssumeUnlockable, ErrOnOom>);

// SAFETY (of the lock that isn't one): one processor, and no interrupt returns to guest code.
#[global_allocator]
static HEAP: Heap = Heap(Talc::new(ErrOnOom).lock());

// SAFETY: `Talck` is an allocator; counting changes nothing of what it returns.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let block = unsafe { self.0.alloc(layout) };
        count(block, 0, layout.size());
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let host = Host::get();
        host.set_allocated(host.allocated().wrapping_sub(layout.size() as u64));
        // SAFETY: the caller's promise.
        unsafe { self.0.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        let block = unsafe { self.0.realloc(block, layout, size) };
        count(block, layout.size(), size);
        block
    }
}

fn count(block: *mut u8, before: usize, size: usize) {
    let host = Host::get();
    if block.is_null() {
        // In case the guest gives up for it, which is what Rust code does.
        host.set_status(status::OUT_OF_MEMORY);
        host.set_detail(u32::try_from(size).unwrap_or(u32::MAX));
        return;
    }
    let allocated = host
        .allocated()
        .wrapping_sub(before as u64)
        .wrapping_add(size as u64);
    host.set_allocations(host.allocations() + 1);
    if host.profiled() != 0 {
        let below = crate::profile::stack_pointer();
        crate::profile::record(size.saturating_sub(before) as u64, below);
    }
    host.set_allocated(allocated);
    if allocated > host.allocated_peak() {
        host.set_allocated_peak(allocated);
    }
}

pub(crate) fn init(heap: u64, size: u64) {
    let heap = Span::from_base_size(
        ptr::with_exposed_provenance_mut(heap as usize),
        size as usize,
    );
    // SAFETY: the range is the guest's, for this and nothing else.
    let claimed = unsafe { HEAP.0.lock().claim(heap) };
    if claimed.is_err() {
        panic!("a heap of {size} bytes is too small");
    }
}
