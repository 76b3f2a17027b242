//! Segmentation: from an offset in a segment to a linear address (Intel SDM 3A §3.4, §5.3, §5.5).

use crate::code::{Op, op_flag};
use crate::cpu::{Cpu, seg};
use crate::trap::{Trap, vector};

impl Cpu {
    /// The linear address of `op`'s memory operand of `len` bytes, with all checks of its segment.
    /// Whether it is canonical and mapped is the access's business.
    #[inline(always)]
    pub fn linear(&mut self, op: &Op, len: usize, write: bool) -> Result<u64, Trap> {
        // One test sends all that isn't plain 64-bit addressing off the fast path.
        if op.has(op_flag::ADDR16 | op_flag::ADDR32 | op_flag::SEGMENTED) {
            return self.linear_legacy(op, len, write);
        }
        Ok(self.seg_base[usize::from(op.seg & 7)].wrapping_add(op.sum(self)))
    }

    #[inline(never)]
    fn linear_legacy(&mut self, op: &Op, len: usize, write: bool) -> Result<u64, Trap> {
        let offset = op.offset(self);
        if op.has(op_flag::SEGMENTED) {
            return self.linear_at(op.seg, offset, len, write);
        }
        Ok(self.seg_base[usize::from(op.seg & 7)].wrapping_add(offset))
    }

    /// The linear address of `len` bytes at `offset` in segment `segment`.
    #[inline(always)]
    pub fn linear_at(
        &mut self,
        segment: u8,
        offset: u64,
        len: usize,
        write: bool,
    ) -> Result<u64, Trap> {
        let base = self.seg_base[usize::from(segment & 7)];
        if segment >= seg::FLAT || self.sys.mode.is64() {
            return Ok(base.wrapping_add(offset));
        }
        self.check_segment(segment, offset, len, write)?;
        Ok(base.wrapping_add(offset) & 0xffff_ffff)
    }

    #[inline]
    fn check_segment(
        &mut self,
        segment: u8,
        offset: u64,
        len: usize,
        write: bool,
    ) -> Result<(), Trap> {
        let descriptor = &self.sys.segments[usize::from(segment) % 6];
        let typed = if !self.sys.mode.protected() {
            true
        } else if descriptor.unusable {
            false
        } else if write {
            descriptor.is_writable()
        } else {
            descriptor.is_readable()
        };
        if typed && descriptor.contains(offset, len.max(1) as u64) {
            return Ok(());
        }
        Err(self.segment_fault(segment))
    }

    #[cold]
    fn segment_fault(&mut self, segment: u8) -> Trap {
        let vector = if segment == seg::SS {
            vector::SS
        } else {
            vector::GP
        };
        self.fault(vector, 0)
    }

    /// Whether every offset is within the segment, reading and writing alike, so that bulk work
    /// needn't check each element.
    pub fn segment_is_flat(&self, segment: u8) -> bool {
        if segment >= seg::FLAT || self.sys.mode.is64() {
            return true;
        }
        let descriptor = &self.sys.segments[usize::from(segment) % 6];
        descriptor.limit == u32::MAX && descriptor.is_writable() && !descriptor.is_expand_down()
    }
}
