//! Loads, stores and read-modify-write accesses of instructions.
#![expect(
    unsafe_code,
    reason = "accesses guest memory at host addresses that the TLB has vouched for"
)]

use crate::code::{Op, op_flag};
use crate::cpu::{Cpu, seg};
use crate::mem::mmu::Place;
use crate::mem::{Access, Int, PAGE_MASK, PAGE_SIZE};
use crate::trap::{Trap, vector};

/// Whether `size` bytes at `linear` reach into the next page.
#[inline(always)]
pub(super) fn crosses(linear: u64, size: usize) -> bool {
    (linear & PAGE_MASK) as usize + size > PAGE_SIZE
}

impl Cpu {
    /// Loads `op`'s memory operand if that takes no more than a hit in the first-level TLB under
    /// 64-bit addressing. A handler that leaves all else to a function of its own, called last,
    /// needs no stack frame.
    #[inline(always)]
    pub fn try_load<T: Int>(&self, op: &Op) -> Option<T> {
        if op.has(op_flag::ADDR16 | op_flag::ADDR32 | op_flag::SEGMENTED) {
            return None;
        }
        let base = self.seg_base[usize::from(op.seg & 7)];
        self.try_load_flat(base.wrapping_add(op.sum(self)))
    }

    /// The same at a linear address.
    #[inline(always)]
    pub fn try_load_flat<T: Int>(&self, linear: u64) -> Option<T> {
        let host = self.view.read(linear, T::SIZE)?;
        // SAFETY: the TLB maps the operand to RAM until the instruction ends.
        Some(unsafe { T::read(host) })
    }

    /// Stores likewise; `false` if it takes more.
    #[inline(always)]
    pub fn try_store<T: Int>(&mut self, op: &Op, value: T) -> bool {
        if op.has(op_flag::ADDR16 | op_flag::ADDR32 | op_flag::SEGMENTED) {
            return false;
        }
        let base = self.seg_base[usize::from(op.seg & 7)];
        self.try_store_flat(base.wrapping_add(op.sum(self)), value)
    }

    /// The same at a linear address.
    #[inline(always)]
    pub fn try_store_flat<T: Int>(&mut self, linear: u64, value: T) -> bool {
        match self.view.write(linear, T::SIZE) {
            Some(host) => {
                // SAFETY: the TLB maps the operand to writable RAM until the instruction ends.
                unsafe { T::write(host, value) };
                true
            }
            None => false,
        }
    }

    /// Whether [`Cpu::try_store_flat`] would store there.
    #[inline(always)]
    pub fn can_store_flat<T: Int>(&self, linear: u64) -> bool {
        self.view.write(linear, T::SIZE).is_some()
    }

    /// Loads `N` words of 8 bytes at a linear address, if all of them are a hit.
    #[inline(always)]
    pub fn try_load_words<const N: usize>(&self, linear: u64) -> Option<[u64; N]> {
        let host = self.view.read(linear, 8 * N)?;
        // SAFETY: the TLB maps that many bytes to RAM until the instruction ends.
        Some(std::array::from_fn(|n| unsafe { u64::read(host + 8 * n) }))
    }

    /// Stores words likewise, from the last to the first; `false`, and none stored, if it takes
    /// more.
    #[inline(always)]
    pub fn try_store_words<const N: usize>(&mut self, linear: u64, words: [u64; N]) -> bool {
        let Some(host) = self.view.write(linear, 8 * N) else {
            return false;
        };
        for (n, word) in words.into_iter().enumerate().rev() {
            // SAFETY: the TLB maps that many bytes to writable RAM until the instruction ends.
            unsafe { u64::write(host + 8 * n, word) };
        }
        true
    }

    /// Loads `op`'s memory operand.
    #[inline(always)]
    pub fn load<T: Int>(&mut self, op: &Op) -> Result<T, Trap> {
        let linear = self.linear(op, T::SIZE, false)?;
        self.load_linear(linear, Access::Current, op.seg)
    }

    /// Stores to `op`'s memory operand.
    #[inline(always)]
    pub fn store<T: Int>(&mut self, op: &Op, value: T) -> Result<(), Trap> {
        let linear = self.linear(op, T::SIZE, true)?;
        self.store_linear(linear, value, Access::Current, op.seg)
    }

    /// Loads `op`'s memory operand, which will be stored to: faults as the store would.
    #[inline(always)]
    pub fn load_for_write<T: Int>(&mut self, op: &Op) -> Result<T, Trap> {
        let linear = self.linear(op, T::SIZE, true)?;
        self.load_linear_for_write(linear, op.seg)
    }

    #[inline(always)]
    fn load_linear_for_write<T: Int>(&mut self, linear: u64, segment: u8) -> Result<T, Trap> {
        if let Some(host) = self.view.write(linear, T::SIZE) {
            // SAFETY: the TLB maps the operand to RAM until the instruction ends.
            return Ok(unsafe { T::read(host) });
        }
        self.check_write(linear, T::SIZE, Access::Current, segment)?;
        self.load_linear(linear, Access::Current, segment)
    }

    /// Loads at an offset of a segment.
    #[inline(always)]
    pub fn load_at<T: Int>(&mut self, segment: u8, offset: u64) -> Result<T, Trap> {
        let linear = self.linear_at(segment, offset, T::SIZE, false)?;
        self.load_linear(linear, Access::Current, segment)
    }

    /// Stores at an offset of a segment.
    #[inline(always)]
    pub fn store_at<T: Int>(&mut self, segment: u8, offset: u64, value: T) -> Result<(), Trap> {
        let linear = self.linear_at(segment, offset, T::SIZE, true)?;
        self.store_linear(linear, value, Access::Current, segment)
    }

    /// Faults if a store there would.
    pub fn check_write_at<T: Int>(&mut self, segment: u8, offset: u64) -> Result<(), Trap> {
        let linear = self.linear_at(segment, offset, T::SIZE, true)?;
        if self.view.write(linear, T::SIZE).is_some() {
            return Ok(());
        }
        self.check_write(linear, T::SIZE, Access::Current, segment)
    }

    /// Loads at a linear address.
    pub fn load_lin<T: Int>(&mut self, linear: u64, access: Access) -> Result<T, Trap> {
        self.load_linear(linear, access, seg::FLAT)
    }

    /// Stores at a linear address.
    pub fn store_lin<T: Int>(&mut self, linear: u64, value: T, access: Access) -> Result<(), Trap> {
        self.store_linear(linear, value, access, seg::FLAT)
    }

    #[inline(always)]
    fn load_linear<T: Int>(&mut self, linear: u64, access: Access, segment: u8) -> Result<T, Trap> {
        match self.view_of(access).read(linear, T::SIZE) {
            // SAFETY: the TLB maps the operand to RAM until the instruction ends.
            Some(host) => Ok(unsafe { T::read(host) }),
            None => self.load_slow(linear, access, segment),
        }
    }

    #[inline(always)]
    fn store_linear<T: Int>(
        &mut self,
        linear: u64,
        value: T,
        access: Access,
        segment: u8,
    ) -> Result<(), Trap> {
        match self.view_of(access).write(linear, T::SIZE) {
            Some(host) => {
                // SAFETY: the TLB maps the operand to writable RAM until the instruction ends.
                unsafe { T::write(host, value) };
                Ok(())
            }
            None => self.store_slow(linear, value, access, segment),
        }
    }

    /// What every access on the slow path is subject to before it is translated.
    fn checks(
        &mut self,
        linear: u64,
        size: usize,
        write: bool,
        access: Access,
    ) -> Result<(), Trap> {
        if access != Access::Current {
            return Ok(());
        }
        if size <= 8 && linear & (size as u64 - 1) != 0 && self.alignment_checked() {
            return Err(self.fault(vector::AC, 0));
        }
        if self.sys.dr7 & 0xff != 0 {
            self.data_breakpoint(linear, size, write);
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Int>(&mut self, linear: u64, access: Access, segment: u8) -> Result<T, Trap> {
        self.checks(linear, T::SIZE, false, access)?;
        let stack = segment == seg::FLAT_SS || segment == seg::SS;
        if crosses(linear, T::SIZE) {
            let mut bytes = [0; 16];
            self.read_parts(linear, &mut bytes[..T::SIZE], access, stack)?;
            return Ok(T::from_low(u128::from_le_bytes(bytes)));
        }
        match self.translate(linear, access, false, stack)? {
            // SAFETY: just translated to RAM, within one page.
            Place::Ram(host) | Place::Code(host, _) => Ok(unsafe { T::read(host) }),
            Place::Device(gpa) => {
                let low = self.device_read(gpa, T::SIZE.min(8) as u8)?;
                let high = if T::SIZE == 16 {
                    self.device_read(gpa + 8, 8)?
                } else {
                    0
                };
                Ok(T::from_low((u128::from(high) << 64) | u128::from(low)))
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Int>(
        &mut self,
        linear: u64,
        value: T,
        access: Access,
        segment: u8,
    ) -> Result<(), Trap> {
        self.checks(linear, T::SIZE, true, access)?;
        let stack = segment == seg::FLAT_SS || segment == seg::SS;
        if crosses(linear, T::SIZE) {
            let bytes = value.to_wide().to_le_bytes();
            return self.write_parts(linear, &bytes[..T::SIZE], access, stack);
        }
        match self.translate(linear, access, true, stack)? {
            // SAFETY: just translated to writable RAM, within one page.
            Place::Ram(host) => unsafe { T::write(host, value) },
            Place::Code(host, gpa) => {
                // SAFETY: as above.
                unsafe { T::write(host, value) };
                self.wrote_code(gpa, T::SIZE);
            }
            Place::Device(gpa) => {
                let wide = value.to_wide();
                self.device_write(gpa, T::SIZE.min(8) as u8, wide as u64)?;
                if T::SIZE == 16 {
                    self.device_write(gpa + 8, 8, (wide >> 64) as u64)?;
                }
            }
        }
        Ok(())
    }

    /// Faults if a write of `size` bytes would; touches nothing but accessed and dirty bits.
    #[cold]
    #[inline(never)]
    fn check_write(
        &mut self,
        linear: u64,
        size: usize,
        access: Access,
        segment: u8,
    ) -> Result<(), Trap> {
        let stack = segment == seg::FLAT_SS || segment == seg::SS;
        if size <= 8 && linear & (size as u64 - 1) != 0 && self.alignment_checked() {
            return Err(self.fault(vector::AC, 0));
        }
        self.check_canonical_end(linear, size, stack)?;
        self.translate(linear, access, true, stack)?;
        if crosses(linear, size) {
            let next = (linear | PAGE_MASK).wrapping_add(1);
            self.translate(self.wrap_linear(next), access, true, stack)?;
        }
        Ok(())
    }

    /// Linear addresses have 32 bits outside of 64-bit mode.
    #[inline]
    pub(super) fn wrap_linear(&self, linear: u64) -> u64 {
        if self.sys.mode.is64() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// Changes `op`'s memory operand by `change`, which may run more than once, and gives the old
    /// value. Atomic if `op` has the LOCK flag.
    #[inline(always)]
    pub fn rmw<T: Int>(&mut self, op: &Op, change: impl Fn(T) -> T) -> Result<T, Trap> {
        let linear = self.linear(op, T::SIZE, true)?;
        let Some(host) = self.view.write(linear, T::SIZE) else {
            return self.rmw_slow(op, linear, &change);
        };
        if op.has(op_flag::LOCK) {
            // SAFETY: the TLB maps the operand to writable RAM; 16-byte operands are aligned, or
            // the instruction has faulted.
            Ok(unsafe { exchange(host, &change) })
        } else {
            // SAFETY: as above.
            unsafe {
                let old = T::read(host);
                T::write(host, change(old));
                Ok(old)
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn rmw_slow<T: Int>(
        &mut self,
        op: &Op,
        linear: u64,
        change: &dyn Fn(T) -> T,
    ) -> Result<T, Trap> {
        self.checks(linear, T::SIZE, true, Access::Current)?;
        let stack = op.seg == seg::FLAT_SS || op.seg == seg::SS;
        let locked = op.has(op_flag::LOCK);
        if crosses(linear, T::SIZE) {
            self.check_write(linear, T::SIZE, Access::Current, op.seg)?;
            let machine = self.machine.clone();
            let _all = locked.then(|| machine.memory.lock_split());
            let mut bytes = [0; 16];
            self.read_parts(linear, &mut bytes[..T::SIZE], Access::Current, stack)?;
            let old = T::from_low(u128::from_le_bytes(bytes));
            let new = change(old).to_wide().to_le_bytes();
            self.write_parts(linear, &new[..T::SIZE], Access::Current, stack)?;
            return Ok(old);
        }
        let place = self.translate(linear, Access::Current, true, stack)?;
        match place {
            Place::Ram(host) | Place::Code(host, _) => {
                // SAFETY: just translated to writable RAM, within one page; a locked access is as
                // good as one that isn't.
                let old = unsafe { exchange(host, change) };
                if let Place::Code(_, gpa) = place {
                    self.wrote_code(gpa, T::SIZE);
                }
                Ok(old)
            }
            Place::Device(gpa) => {
                let size = T::SIZE.min(8) as u8;
                let old = T::from_low(u128::from(self.device_read(gpa, size)?));
                self.device_write(gpa, size, change(old).to_wide() as u64)?;
                Ok(old)
            }
        }
    }
}

/// Exchanges atomically.
///
/// # Safety
///
/// As [`Int::compare_exchange`].
#[inline(always)]
unsafe fn exchange<T: Int>(host: usize, change: &(impl Fn(T) -> T + ?Sized)) -> T {
    // SAFETY: the caller vouches for the address.
    let mut old = unsafe { T::read(host) };
    loop {
        // SAFETY: the caller vouches for the address.
        let seen = unsafe { T::compare_exchange(host, old, change(old)) };
        if seen == old {
            return old;
        }
        old = seen;
    }
}
