//! Executable memory for many processors that have little code each: a file that is mapped twice as any
//! [`super::code_buffer`] is, and handed out in slices.
#![expect(unsafe_code, reason = "gives memory back to the host")]

use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::code_buffer::{File, Mapped};

/// Bytes of a slice.
pub(super) const SLICE: usize = 512 << 10;
/// Slices of one mapping.
const SLICES: usize = 128;

/// One file, in slices.
struct Slab {
    writable: Mapped,
    executable: Mapped,
    /// Bit per slice that nobody has.
    free: Mutex<u128>,
}

/// Those that have slices in use, and the last one that had.
static SLABS: Mutex<Vec<Arc<Slab>>> = Mutex::new(Vec::new());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half-done under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slab {
    fn new() -> io::Result<Self> {
        const LEN: usize = SLICE * SLICES;
        let file = File::create(LEN)?;
        Ok(Self {
            writable: file.map(LEN, libc::PROT_READ | libc::PROT_WRITE)?,
            executable: file.map(LEN, libc::PROT_READ | libc::PROT_EXEC)?,
            free: Mutex::new(u128::MAX),
        })
    }

    fn take(self: &Arc<Self>) -> Option<Slice> {
        let mut free = locked(&self.free);
        let number = (*free != 0).then(|| free.trailing_zeros())?;
        *free &= !(1 << number);
        Some(Slice {
            slab: self.clone(),
            number,
        })
    }
}

const _: () = assert!(SLICES == u128::BITS as usize);

/// Part of a slab that one processor has.
pub(super) struct Slice {
    slab: Arc<Slab>,
    number: u32,
}

impl Slice {
    /// A slice of zeros.
    pub(super) fn new() -> io::Result<Self> {
        let mut slabs = locked(&SLABS);
        // The last one is that which most likely has any.
        if let Some(slice) = slabs.iter().rev().find_map(Slab::take) {
            return Ok(slice);
        }
        let slab = Arc::new(Slab::new()?);
        let slice = slab.take();
        slabs.push(slab);
        slice.ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// Where it can be written, and where it can be executed.
    pub(super) fn places(&self) -> [NonNull<u8>; 2] {
        let start = self.number as usize * SLICE;
        [&self.slab.writable, &self.slab.executable].map(|mapped| mapped.at(start))
    }
}

impl Drop for Slice {
    fn drop(&mut self) {
        let [writable, _] = self.places();
        // Gives the pages back to the host, and every processor of it forgets what it has of them.
        // SAFETY: the slice's own memory, whose code nobody calls any more.
        let gone =
            unsafe { libc::madvise(writable.as_ptr().cast(), SLICE, libc::MADV_REMOVE) } == 0;
        let mut slabs = locked(&SLABS);
        let mut free = locked(&self.slab.free);
        if gone {
            *free |= 1 << self.number;
        }
        let unused = *free == u128::MAX;
        drop(free);
        if unused && slabs.len() > 1 {
            slabs.retain(|slab| !Arc::ptr_eq(slab, &self.slab));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn slices_are_apart_and_come_back_empty() {
        let mut slices = Vec::new();
        let mut places = HashSet::new();
        for n in 0..SLICES + 3 {
            let slice = Slice::new().expect("a slice");
            let [writable, executable] = slice.places();
            assert!(places.insert(writable) && places.insert(executable));
            // SAFETY: the slice's own memory.
            unsafe {
                assert_eq!(executable.read(), 0);
                assert_eq!(executable.add(SLICE - 1).read(), 0);
                writable.write(n as u8 | 1);
                writable.add(SLICE - 1).write(n as u8 | 1);
                assert_eq!(executable.read(), n as u8 | 1);
            }
            slices.push(slice);
        }
        drop(slices.split_off(1));
        // SAFETY: the slice's own memory.
        assert_eq!(unsafe { slices[0].places()[1].read() }, 1);
        for _ in 0..SLICES {
            let slice = Slice::new().expect("a slice");
            // SAFETY: as above.
            assert_eq!(unsafe { slice.places()[1].read() }, 0);
            slices.push(slice);
        }
    }
}
