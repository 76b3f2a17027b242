//! Executable memory: one file mapped twice, once writable and once executable, so that no address
//! is ever both.
//!
//! Code is appended, and taken back only all at once.
#![expect(unsafe_code, reason = "maps memory and writes machine code into it")]

use std::io;
use std::ptr::NonNull;

use super::code_slab::{SLICE, Slice};
use crate::mem::HOST_LARGE_PAGE as LARGE;

/// Start of each piece of code: a fetch line's half, so that short pieces take one fetch.
const ALIGN: usize = 16;

/// A bounded store of machine code.
pub struct CodeBuffer {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    capacity: usize,
    used: usize,
    /// So much from the start on is in large pages, or was refused them.
    large: usize,
    _owned: Owned,
}

/// What keeps a buffer's memory.
enum Owned {
    /// Mappings of its own.
    Alone { _mapped: [Mapped; 2] },
    /// A slice of what is shared.
    Slice { _slice: Slice },
}

// SAFETY: the memory belongs to this value alone; writing takes `&mut self`, and what has been
// handed out for execution isn't written again before it is void.
unsafe impl Send for CodeBuffer {}

impl CodeBuffer {
    /// Reserves `capacity` bytes (pages are taken as they are written).
    ///
    /// # Errors
    /// What the host said when memory that can be executed was refused.
    pub fn new(capacity: usize) -> io::Result<Self> {
        let capacity = capacity.next_multiple_of(4096);
        let file = File::create(capacity)?;
        let writable = file.map(capacity, libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = file.map(capacity, libc::PROT_READ | libc::PROT_EXEC)?;
        Ok(Self {
            writable: writable.at(0),
            executable: executable.at(0),
            capacity,
            used: 0,
            large: 0,
            _owned: Owned::Alone {
                _mapped: [writable, executable],
            },
        })
    }

    /// A buffer of at most `capacity` bytes, and of few, which has no mapping of its own.
    ///
    /// # Errors
    /// As with [`CodeBuffer::new`].
    pub fn small(capacity: usize) -> io::Result<Self> {
        let slice = Slice::new()?;
        let [writable, executable] = slice.places();
        Ok(Self {
            writable,
            executable,
            capacity: capacity.min(SLICE),
            used: 0,
            large: 0,
            _owned: Owned::Slice { _slice: slice },
        })
    }

    /// Has the host use large pages for code that has grown into the next of them: a hundred thousand
    /// small pieces, all over the buffer, would need more translations than processors keep. A buffer
    /// that stays small has none. Where the kernel doesn't do that (before 6.1), all stays as it is.
    #[cold]
    fn enlarge(&mut self) {
        let end = self.used.next_multiple_of(LARGE).min(self.capacity);
        let start = std::mem::replace(&mut self.large, end);
        for mapping in [self.writable, self.executable] {
            // SAFETY: within both mappings; it changes where their bytes are kept, not what they are.
            unsafe {
                libc::madvise(
                    mapping.add(start).as_ptr().cast(),
                    end - start,
                    libc::MADV_COLLAPSE,
                );
            }
        }
    }

    /// Where, from the start on, the code comes that is appended next.
    pub fn next(&self) -> usize {
        self.used.next_multiple_of(ALIGN)
    }

    /// Appends code (position-independent, or made for [`CodeBuffer::next`]) and returns where it can be called; `None` when full.
    pub fn push(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let start = self.next();
        let end = start.checked_add(code.len())?;
        if end > self.capacity {
            return None;
        }
        // SAFETY: start..end lies within the writable mapping, which nothing else refers to.
        unsafe {
            self.writable
                .add(start)
                .copy_from_nonoverlapping(NonNull::from(code).cast(), code.len());
        }
        self.used = end;
        if end > LARGE && end > self.large {
            self.enlarge();
        }
        // SAFETY: as above, within the executable mapping of the same size.
        Some(unsafe { self.executable.add(start) })
    }
}

impl CodeBuffer {
    /// Bytes handed out.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Whether code of `len` bytes can be appended.
    pub fn has_room(&self, len: usize) -> bool {
        self.capacity - self.used >= len + ALIGN
    }

    /// Writes over code that was handed out; `at` counts from the buffer's start. What is executed
    /// by this thread only may be changed while it is elsewhere.
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        if at + bytes.len() > self.used {
            return;
        }
        // SAFETY: within what was handed out, as just seen; nothing else refers to the mapping.
        unsafe {
            self.writable
                .add(at)
                .copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len());
        }
    }

    /// Forgets all code; what was handed out must not be called any more.
    pub fn reset(&mut self) {
        self.reset_to(0);
    }

    /// The same but for the first `used` bytes.
    pub fn reset_to(&mut self, used: usize) {
        self.used = used.min(self.used);
        let keep = self.used.next_multiple_of(4096);
        self.large = 0;
        // Gives the pages back to the host. Where that isn't possible they are written over in time.
        // SAFETY: the range is within the mapping, and no code in it is called any more.
        unsafe {
            libc::madvise(
                self.writable.add(keep).as_ptr().cast(),
                self.capacity - keep,
                libc::MADV_REMOVE,
            );
        }
        // What is written next through one mapping may have been prefetched through the other: a
        // serializing instruction drops that (SDM 3A §9.1.3).
        std::arch::x86_64::__cpuid(0);
    }
}

/// One mapping of a file.
pub(super) struct Mapped {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its memory, like a box; who has parts of it keeps to them.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// So far from its start.
    pub(super) fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.len, "within the mapping");
        // SAFETY: as just seen.
        unsafe { self.base.add(offset) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `File::map` with this size; who has parts of it has this too.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The file behind the mappings, closed once they are made.
pub(super) struct File(i32);

impl File {
    pub(super) fn create(size: usize) -> io::Result<Self> {
        let flags = libc::MFD_CLOEXEC;
        // Kernels from 6.3 on want to hear that the file may be executed; older ones refuse the flag.
        let mut fd = -1;
        for extra in [libc::MFD_EXEC, 0] {
            // SAFETY: the name is a C string; the flags are plain bits.
            fd = unsafe { libc::memfd_create(c"skerry-code".as_ptr(), flags | extra) };
            if fd >= 0 {
                break;
            }
        }
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let file = Self(fd);
        let size = libc::off_t::try_from(size).map_err(io::Error::other)?;
        // SAFETY: the descriptor is open and ours.
        if unsafe { libc::ftruncate(file.0, size) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(file)
    }

    pub(super) fn map(&self, size: usize, protection: i32) -> io::Result<Mapped> {
        // Large pages are only where addresses and places in the file agree. What never gets any can be
        // anywhere.
        let (start, fixed) = match size {
            ..=LARGE => (std::ptr::null_mut(), 0),
            _ => (reserve(size)?, libc::MAP_FIXED),
        };
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | fixed;
        // SAFETY: a new mapping at an address of the kernel's choice, or over what was reserved for it.
        let address = unsafe { libc::mmap(start, size, protection, flags, self.0, 0) };
        if address == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            if !start.is_null() {
                // SAFETY: what was reserved just now, and nobody has it.
                unsafe { libc::munmap(start, size) };
            }
            return Err(error);
        }
        let base =
            NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Mapped { base, len: size })
    }
}

/// Address space of `size` bytes that starts where a large page does.
fn reserve(size: usize) -> io::Result<*mut libc::c_void> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let nowhere = std::ptr::null_mut();
    // SAFETY: a new mapping at an address of the kernel's choice.
    let all = unsafe { libc::mmap(nowhere, size + LARGE, libc::PROT_NONE, flags, -1, 0) };
    if all == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let before = all.align_offset(LARGE);
    // SAFETY: what was reserved just now: what is in front of the start and behind the end goes back.
    unsafe {
        let start = all.byte_add(before);
        if before > 0 {
            libc::munmap(all, before);
        }
        libc::munmap(start.byte_add(size), LARGE - before);
        Ok(start)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: the descriptor is open and ours.
        unsafe { libc::close(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_and_capacity_holds() {
        let mut buffer = CodeBuffer::new(4096).unwrap();
        // lea eax, [rdi + 1]; ret
        let code = buffer.push(&[0x8d, 0x47, 0x01, 0xc3]).unwrap();
        // SAFETY: the bytes above are such a function.
        let f: extern "sysv64" fn(u32) -> u32 = unsafe { std::mem::transmute(code) };
        assert_eq!(f(41), 42);
        assert!(buffer.push(&[0x90; 4090]).is_none());
        assert!(buffer.push(&[0xc3; 4080]).is_some());
        assert!(buffer.push(&[0xc3]).is_none());
    }

    #[test]
    fn code_stays_what_it_was_when_a_buffer_grows() {
        let mut buffer = CodeBuffer::new(3 * LARGE).unwrap();
        for _ in 0..2 {
            let mut codes = Vec::new();
            for n in 0..48_u32 {
                // mov eax, n; ret
                let [a, b, c, d] = n.to_le_bytes();
                codes.push(buffer.push(&[0xb8, a, b, c, d, 0xc3]).unwrap());
                if n < 47 {
                    buffer.push(&vec![0xcc; LARGE / 16 - 32]).unwrap();
                }
                for (expected, code) in codes.iter().enumerate() {
                    // SAFETY: the bytes above are such a function.
                    let f: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(*code) };
                    assert_eq!(f(), expected as u32);
                }
            }
            assert!(buffer.used() > 2 * LARGE);
            buffer.reset();
        }
    }
}
