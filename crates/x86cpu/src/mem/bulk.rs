//! Accesses of more than a register: byte strings, page-crossers, host pointers for SIMD and for
//! string instructions.
#![expect(unsafe_code, reason = "copies between guest memory and buffers")]

use std::ptr::NonNull;

use crate::cpu::Cpu;
use crate::mem::access::crosses;
use crate::mem::int::{copy_in, copy_out};
use crate::mem::mmu::Place;
use crate::mem::{Access, PAGE_MASK, PAGE_SIZE};
use crate::trap::{Trap, vector};

impl Cpu {
    /// Calls `part(self, linear, range)` for the part of `len` bytes in each page.
    fn pages(
        &mut self,
        linear: u64,
        len: usize,
        mut part: impl FnMut(&mut Self, u64, std::ops::Range<usize>) -> Result<(), Trap>,
    ) -> Result<(), Trap> {
        let mut done = 0;
        while done < len {
            let at = self.wrap_linear(linear.wrapping_add(done as u64));
            let here = (PAGE_SIZE - (at & PAGE_MASK) as usize).min(len - done);
            part(self, at, done..done + here)?;
            done += here;
        }
        Ok(())
    }

    /// Reads bytes that may lie in several pages.
    pub(super) fn read_parts(
        &mut self,
        linear: u64,
        into: &mut [u8],
        access: Access,
        stack: bool,
    ) -> Result<(), Trap> {
        self.check_canonical_end(linear, into.len(), stack)?;
        // All pages first: a fault in a later page comes before an earlier page's device is read.
        self.pages(linear, into.len(), |cpu, at, _| {
            cpu.translate(at, access, false, stack).map(|_| ())
        })?;
        self.pages(linear, into.len(), |cpu, at, range| {
            let into = &mut into[range];
            match cpu.translate(at, access, false, stack)? {
                Place::Ram(host) | Place::Code(host, _) => {
                    // SAFETY: just translated to RAM; the range ends with the page.
                    unsafe { copy_out(host, into) };
                    Ok(())
                }
                Place::Device(gpa) => cpu.device_read_bytes(gpa, into),
            }
        })
    }

    /// An operand that ends beyond the canonical addresses is refused before any of its pages is
    /// looked at.
    pub(super) fn check_canonical_end(
        &mut self,
        linear: u64,
        len: usize,
        stack: bool,
    ) -> Result<(), Trap> {
        let last = linear.wrapping_add((len as u64).saturating_sub(1));
        if self.is_canonical(last) {
            return Ok(());
        }
        Err(self.fault(if stack { vector::SS } else { vector::GP }, 0))
    }

    /// Writes bytes that may lie in several pages; all of them or none.
    pub(super) fn write_parts(
        &mut self,
        linear: u64,
        from: &[u8],
        access: Access,
        stack: bool,
    ) -> Result<(), Trap> {
        self.check_canonical_end(linear, from.len(), stack)?;
        self.pages(linear, from.len(), |cpu, at, _| {
            cpu.translate(at, access, true, stack).map(|_| ())
        })?;
        self.pages(linear, from.len(), |cpu, at, range| {
            let from = &from[range];
            match cpu.translate(at, access, true, stack)? {
                // SAFETY: just translated to writable RAM; the range ends with the page.
                Place::Ram(host) => unsafe { copy_in(host, from) },
                Place::Code(host, gpa) => {
                    // SAFETY: as above.
                    unsafe { copy_in(host, from) };
                    cpu.wrote_code(gpa, from.len());
                }
                Place::Device(gpa) => cpu.device_write_bytes(gpa, from)?,
            }
            Ok(())
        })
    }

    /// Reads bytes at a linear address.
    pub fn read_bytes(&mut self, linear: u64, into: &mut [u8]) -> Result<(), Trap> {
        self.watch(linear, into.len(), false);
        self.read_parts(linear, into, Access::Current, false)
    }

    /// Writes bytes at a linear address; all of them or, if it faults, none.
    pub fn write_bytes(&mut self, linear: u64, from: &[u8]) -> Result<(), Trap> {
        self.watch(linear, from.len(), true);
        self.write_parts(linear, from, Access::Current, false)
    }

    fn watch(&mut self, linear: u64, len: usize, write: bool) {
        if self.sys.dr7 & 0xff != 0 {
            self.data_breakpoint(linear, len, write);
        }
    }

    /// The host address of `len` bytes, if they lie in one page of RAM that can be accessed
    /// directly until the instruction ends; else they go through [`Cpu::read_bytes`] and
    /// [`Cpu::write_bytes`].
    #[inline]
    pub fn host_ptr(
        &mut self,
        linear: u64,
        len: usize,
        write: bool,
    ) -> Result<Option<NonNull<u8>>, Trap> {
        let hit = if write {
            self.view.write(linear, len)
        } else {
            self.view.read(linear, len)
        };
        match hit {
            Some(host) if len <= PAGE_SIZE => Ok(NonNull::new(host as *mut u8)),
            _ => self.host_ptr_slow(linear, len, write),
        }
    }

    #[cold]
    #[inline(never)]
    fn host_ptr_slow(
        &mut self,
        linear: u64,
        len: usize,
        write: bool,
    ) -> Result<Option<NonNull<u8>>, Trap> {
        if crosses(linear, len) {
            return Ok(None);
        }
        self.watch(linear, len, write);
        match self.translate(linear, Access::Current, write, false)? {
            Place::Ram(host) => Ok(NonNull::new(host as *mut u8)),
            Place::Code(..) | Place::Device(_) => Ok(None),
        }
    }

    /// The host address of the byte at `linear` and how many bytes follow in its page, that one
    /// included, if it is RAM. Good until the instruction ends; a page that holds code is made
    /// plain data for writing.
    pub fn page_run(
        &mut self,
        linear: u64,
        write: bool,
    ) -> Result<Option<(NonNull<u8>, usize)>, Trap> {
        let left = PAGE_SIZE - (linear & PAGE_MASK) as usize;
        let hit = if write {
            self.view.write(linear, 1)
        } else {
            self.view.read(linear, 1)
        };
        let host = match hit {
            Some(host) => host,
            None => {
                if self.sys.dr7 & 0xff != 0 {
                    // Element by element, so that breakpoints see each.
                    return Ok(None);
                }
                match self.translate(linear, Access::Current, write, false)? {
                    Place::Ram(host) => host,
                    Place::Code(host, gpa) => {
                        self.code_to_data(gpa);
                        host
                    }
                    Place::Device(_) => return Ok(None),
                }
            }
        };
        Ok(NonNull::new(host as *mut u8).map(|start| (start, left)))
    }
}
