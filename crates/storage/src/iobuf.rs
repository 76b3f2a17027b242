#![expect(
    unsafe_code,
    reason = "turns guest memory, which only has raw addresses, into the buffers of system calls"
)]
//! Buffers in memory that somebody else may be writing: the guest's RAM.
//!
//! A `&[u8]` promises that its bytes stand still, which guest memory can't; these carry an address
//! and a length that are valid for `'a`, and are read and written only by the kernel (as an
//! `iovec`) or by `vm-memory`'s volatile copies.

use std::marker::PhantomData;

use vm_memory::bitmap::{Bitmap, BitmapSlice};
use vm_memory::{Bytes, VolatileSlice};

/// Told of the bytes of a buffer that were written; in guest memory this is the dirty log.
pub trait MarkDirty: Sync {
    /// `len` bytes from `offset` of the buffer on were changed.
    fn mark_dirty(&self, offset: usize, len: usize);
}

impl<B: Bitmap + Sync> MarkDirty for B {
    fn mark_dirty(&self, offset: usize, len: usize) {
        Bitmap::mark_dirty(self, offset, len);
    }
}

/// A buffer whose bytes are written *to* a disk.
#[derive(Clone, Copy)]
pub struct IoBuf<'a> {
    addr: *const u8,
    len: usize,
    lifetime: PhantomData<&'a [u8]>,
}

/// A buffer that is filled *from* a disk.
pub struct IoBufMut<'a> {
    addr: *mut u8,
    len: usize,
    dirty: Option<&'a dyn MarkDirty>,
    lifetime: PhantomData<&'a mut [u8]>,
}

// SAFETY: the address stays valid for 'a on every thread; all access is by system calls or volatile
// copies, which tolerate others writing the same bytes, so nothing is tied to a thread.
unsafe impl Send for IoBuf<'_> {}
// SAFETY: as above: a shared `IoBuf` only lets its bytes be copied out.
unsafe impl Sync for IoBuf<'_> {}
// SAFETY: as above; `dirty` is a shared reference to a Sync type.
unsafe impl Send for IoBufMut<'_> {}
// SAFETY: as above; two threads filling one buffer race as a guest's own writes do, in volatile
// copies or in the kernel, never through a Rust reference.
unsafe impl Sync for IoBufMut<'_> {}

impl<'a> IoBuf<'a> {
    /// A buffer over guest memory.
    pub fn from_volatile<B: BitmapSlice>(slice: &VolatileSlice<'a, B>) -> Self {
        IoBuf {
            addr: slice.ptr_guard().as_ptr(),
            len: slice.len(),
            lifetime: PhantomData,
        }
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes out, from `offset` of the buffer on; returns how many.
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) -> usize {
        let Some(room) = self.len.checked_sub(offset).filter(|room| *room > 0) else {
            return 0;
        };
        let len = room.min(to.len());
        // SAFETY: addr..addr+len is valid for 'a by construction; VolatileSlice copies with
        // volatile accesses, so a guest writing meanwhile is allowed.
        let slice = unsafe { VolatileSlice::new(self.addr.cast_mut(), self.len) };
        slice.read_slice(&mut to[..len], offset).map_or(0, |()| len)
    }

    /// The part from `skip` on, as the kernel wants it.
    pub(crate) fn iovec(&self, skip: usize) -> libc::iovec {
        let skip = skip.min(self.len);
        libc::iovec {
            iov_base: self.addr.wrapping_add(skip).cast_mut().cast(),
            iov_len: self.len - skip,
        }
    }
}

impl<'a> IoBufMut<'a> {
    /// A buffer over guest memory; what a disk fills is marked in the slice's bitmap.
    pub fn from_volatile<B: BitmapSlice + Sync>(slice: &'a VolatileSlice<'_, B>) -> Self {
        IoBufMut {
            addr: slice.ptr_guard_mut().as_ptr(),
            len: slice.len(),
            dirty: Some(slice.bitmap()),
            lifetime: PhantomData,
        }
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes in, to `offset` of the buffer on, and marks them dirty; returns how many.
    pub fn copy_from(&self, offset: usize, from: &[u8]) -> usize {
        let Some(room) = self.len.checked_sub(offset).filter(|room| *room > 0) else {
            return 0;
        };
        let len = room.min(from.len());
        // SAFETY: addr..addr+len is valid for 'a by construction; VolatileSlice copies with
        // volatile accesses, so a guest reading or writing meanwhile is allowed.
        let slice = unsafe { VolatileSlice::new(self.addr, self.len) };
        let copied = slice.write_slice(&from[..len], offset).map_or(0, |()| len);
        self.mark_dirty(offset, copied);
        copied
    }

    /// Tells the owner of the memory that a part of it has been filled.
    pub fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(dirty) = self.dirty.filter(|_| len > 0) {
            dirty.mark_dirty(offset, len);
        }
    }

    /// The part from `skip` on, as the kernel wants it.
    pub(crate) fn iovec(&self, skip: usize) -> libc::iovec {
        let skip = skip.min(self.len);
        libc::iovec {
            iov_base: self.addr.wrapping_add(skip).cast(),
            iov_len: self.len - skip,
        }
    }
}

impl<'a> From<&'a [u8]> for IoBuf<'a> {
    fn from(slice: &'a [u8]) -> Self {
        IoBuf {
            addr: slice.as_ptr(),
            len: slice.len(),
            lifetime: PhantomData,
        }
    }
}

impl<'a> From<&'a mut [u8]> for IoBufMut<'a> {
    fn from(slice: &'a mut [u8]) -> Self {
        IoBufMut {
            addr: slice.as_mut_ptr(),
            len: slice.len(),
            dirty: None,
            lifetime: PhantomData,
        }
    }
}

impl std::fmt::Debug for IoBuf<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBuf({} bytes)", self.len)
    }
}

impl std::fmt::Debug for IoBufMut<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBufMut({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::bitmap::AtomicBitmap;

    #[test]
    fn copies_stay_inside_the_buffer() {
        let mut store = [1u8, 2, 3, 4];
        {
            let buf = IoBufMut::from(&mut store[..]);
            assert_eq!(buf.copy_from(2, &[9, 9, 9]), 2);
            assert_eq!(buf.copy_from(4, &[7]), 0);
            assert_eq!(buf.copy_from(usize::MAX, &[7]), 0);
        }
        assert_eq!(store, [1, 2, 9, 9]);
        let mut out = [0u8; 8];
        assert_eq!(IoBuf::from(&store[..]).copy_to(1, &mut out), 3);
        assert_eq!(out, [2, 9, 9, 0, 0, 0, 0, 0]);
        assert_eq!(IoBuf::from(&store[..]).copy_to(9, &mut out), 0);
    }

    #[test]
    fn filling_guest_memory_marks_its_bitmap() {
        let mut store = vec![0u8; 3 * 4096];
        let bitmap = AtomicBitmap::new(store.len(), std::num::NonZeroUsize::new(4096).unwrap());
        // SAFETY: `store` outlives the slice and nothing else touches it meanwhile.
        let slice = unsafe {
            VolatileSlice::with_bitmap(store.as_mut_ptr(), store.len(), bitmap.slice_at(0), None)
        };
        let buf = IoBufMut::from_volatile(&slice);
        buf.copy_from(4096, &[1]);
        assert!(!bitmap.dirty_at(0) && bitmap.dirty_at(4096) && !bitmap.dirty_at(8192));
    }

    #[test]
    fn an_iovec_never_reaches_past_the_end() {
        let store = [0u8; 16];
        let buf = IoBuf::from(&store[..]);
        assert_eq!(buf.iovec(4).iov_len, 12);
        assert_eq!(buf.iovec(99).iov_len, 0);
    }
}
