//! The allocator as C has it. A block's size lies in front of it.

use alloc::alloc::{Layout, alloc, dealloc, realloc as resize};
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::ptr;

/// Alignment of blocks (that of `max_align_t`), and bytes in front of each.
const HEADER: usize = 16;

fn layout(size: usize) -> Option<Layout> {
    Layout::from_size_align(size.checked_add(HEADER)?, HEADER).ok()
}

/// The start of an allocation as its user sees it.
///
/// # Safety
/// `start` is one of `size` bytes and a header.
unsafe fn begin(start: *mut u8, size: usize) -> *mut c_void {
    if start.is_null() {
        return ptr::null_mut();
    }
    // SAFETY: the header is within the allocation, and aligned.
    unsafe {
        start.cast::<usize>().write(size);
        start.add(HEADER).cast()
    }
}

/// The allocation of a block, and its layout.
///
/// # Safety
/// `block` is one of [`malloc`]'s.
unsafe fn whole(block: *mut c_void) -> (*mut u8, Layout) {
    // SAFETY: the header lies in front of it; its size made a layout before.
    unsafe {
        let start = block.cast::<u8>().sub(HEADER);
        let size = start.cast::<usize>().read() + HEADER;
        (start, Layout::from_size_align_unchecked(size, HEADER))
    }
}

/// As in the C standard (C17 §7.22.3).
#[unsafe(no_mangle)]
pub extern "C" fn malloc(size: usize) -> *mut c_void {
    match layout(size) {
        // SAFETY: the layout has a size, and is what `begin` wants.
        Some(layout) => unsafe { begin(alloc(layout), size) },
        None => ptr::null_mut(),
    }
}

/// As in the C standard.
#[unsafe(no_mangle)]
pub extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    let Some(size) = count.checked_mul(size) else {
        return ptr::null_mut();
    };
    let block = malloc(size);
    if !block.is_null() {
        // SAFETY: as many bytes were just allocated.
        unsafe { block.cast::<u8>().write_bytes(0, size) };
    }
    block
}

/// As in the C standard.
///
/// # Safety
/// `block` is null or one of [`malloc`]'s.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(block: *mut c_void, size: usize) -> *mut c_void {
    if block.is_null() {
        return malloc(size);
    }
    let Some(new) = layout(size) else {
        return ptr::null_mut();
    };
    // SAFETY: the caller's promise; the new size makes a layout.
    unsafe {
        let (start, old) = whole(block);
        begin(resize(start, old, new.size()), size)
    }
}

/// As in the C standard.
///
/// # Safety
/// `block` is null or one of [`malloc`]'s.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(block: *mut c_void) {
    if !block.is_null() {
        // SAFETY: the caller's promise.
        unsafe {
            let (start, layout) = whole(block);
            dealloc(start, layout);
        }
    }
}

/// Blocks to be freed when the call is answered.
struct Waiting(UnsafeCell<Vec<*mut c_void>>);

// SAFETY: there is one thread, and no interrupt returns to guest code.
unsafe impl Sync for Waiting {}

static WAITING: Waiting = Waiting(UnsafeCell::new(Vec::new()));

/// Frees a block when the result has been copied.
///
/// # Safety
/// `block` is null or one of [`malloc`]'s.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn skerry_free_later(block: *mut c_void) {
    // SAFETY: one thread, and nothing else has a reference.
    unsafe { (*WAITING.0.get()).push(block) };
}

pub(crate) fn free_waiting() {
    // SAFETY: one thread, and nothing else has a reference.
    let waiting = unsafe { &mut *WAITING.0.get() };
    for block in waiting.drain(..) {
        // SAFETY: the promise of who put it there.
        unsafe { free(block) };
    }
}
