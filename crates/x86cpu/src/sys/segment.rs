//! Loads of the data segment registers, and the instructions that look at descriptors without
//! loading them (Intel SDM 3A §§5.5–5.10; 2A/2B "MOV", "LAR", "LSL", "VERR", "ARPL").

use crate::code::Op;
use crate::cpu::{Cpu, seg};
use crate::flags::rflags;
use crate::sys::descriptor::{Descriptor, canonical, is_null, system_type};
use crate::sys::operand::{read_rm16, write_sized};
use crate::sys::state::{Segment, attr};
use crate::trap::{Trap, vector};

impl Cpu {
    /// Loads ES, SS, DS, FS or GS as MOV and POP do.
    pub(crate) fn load_segment(&mut self, index: u8, selector: u16) -> Result<(), Trap> {
        let loaded = if self.in_v86() {
            Segment::v86(selector)
        } else if !self.sys.protected() {
            self.real_segment(index, selector)
        } else if index == seg::SS {
            self.checked_ss(selector, self.cpl, vector::GP)?
        } else {
            self.checked_data(selector)?
        };
        self.set_segment(index, loaded);
        if index == seg::SS {
            self.update_mode();
        }
        Ok(())
    }

    /// In real-address mode only selector and base change: limits loaded before stay
    /// (SDM 3A §10.9.1 counts on it).
    pub(crate) fn real_segment(&self, index: u8, selector: u16) -> Segment {
        let old = self.sys.segments[usize::from(index) % 6];
        if old.unusable || !old.present() {
            return Segment::real(selector);
        }
        Segment {
            selector,
            base: u64::from(selector) << 4,
            ..old
        }
    }

    /// A stack segment for privilege level `cpl`; selector faults raise `fault` (#GP, or #TS in
    /// task switches and stack switches).
    pub(crate) fn checked_ss(
        &mut self,
        selector: u16,
        cpl: u8,
        fault: u8,
    ) -> Result<Segment, Trap> {
        let rpl = (selector & 3) as u8;
        if is_null(selector) {
            if fault == vector::GP && self.sys.mode.is64() && cpl != 3 && rpl == cpl {
                return Ok(null_stack(selector));
            }
            return Err(self.selector_fault(fault, if fault == vector::GP { 0 } else { selector }));
        }
        let mut d = self.read_descriptor(selector, fault)?;
        if rpl != cpl || !d.is_writable_data() || d.dpl() != cpl {
            return Err(self.selector_fault(fault, selector));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::SS, selector));
        }
        self.mark_accessed(&mut d)?;
        Ok(d.segment(selector))
    }

    fn checked_data(&mut self, selector: u16) -> Result<Segment, Trap> {
        if is_null(selector) {
            return Ok(Segment::null(selector));
        }
        let mut d = self.read_descriptor(selector, vector::GP)?;
        if !d.is_readable() || !self.may_access(&d, selector) {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        self.mark_accessed(&mut d)?;
        Ok(d.segment(selector))
    }

    /// Whether CPL and RPL allow data access; conforming code always does.
    fn may_access(&self, d: &Descriptor, selector: u16) -> bool {
        d.is_conforming() || d.dpl() >= self.cpl.max((selector & 3) as u8)
    }

    /// The descriptor that LAR, LSL, VERR and VERW look at; `None` where they clear ZF.
    fn inspect(&mut self, selector: u16) -> Result<Option<Descriptor>, Trap> {
        if is_null(selector) || self.descriptor_address(selector, 8).is_none() {
            return Ok(None);
        }
        let d = self.read_descriptor(selector, vector::GP)?;
        Ok(self.may_access(&d, selector).then_some(d))
    }

    fn set_zf(&mut self, on: bool) {
        let bits = self.flags.bits() & !rflags::ZF;
        self.flags.set_bits(bits | if on { rflags::ZF } else { 0 });
    }

    fn protected_only(&mut self) -> Result<(), Trap> {
        if self.sys.mode.protected() {
            Ok(())
        } else {
            Err(self.ud())
        }
    }

    /// Segments that a return to an outer level may not keep: DPL below the new CPL
    /// (SDM 2B "RET", validity checks).
    pub(crate) fn drop_inner_segments(&mut self) {
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let s = self.sys.segments[usize::from(index)];
            if !s.unusable && !s.is_conforming() && s.dpl() < self.cpl {
                let base = if self.sys.mode.is64() { s.base } else { 0 };
                self.set_segment(
                    index,
                    Segment {
                        base,
                        ..Segment::null(0)
                    },
                );
            }
        }
    }
}

/// SS as a null selector leaves it: the level stays in DPL.
pub(crate) fn null_stack(selector: u16) -> Segment {
    Segment {
        attributes: (selector & 3) << 5,
        ..Segment::null(selector)
    }
}

/// MOV Sreg, r/m16: `r0` segment, `r1` register or memory by `extra`.
pub(super) fn mov_to_segment(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let selector = read_rm16(cpu, op, op.r1)?;
    cpu.load_segment(op.r0, selector)?;
    if op.r0 == seg::SS {
        cpu.start_mov_ss_shadow(op);
    }
    Ok(())
}

/// LDS, LES, LFS, LGS, LSS: `r0` segment, `r1` register.
pub(super) fn load_far_pointer(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (offset, selector) = cpu.load_far(op)?;
    cpu.load_segment(op.r0, selector)?;
    write_sized(cpu, op, op.r1, offset);
    Ok(())
}

fn type_allowed_lar(cpu: &Cpu, d: &Descriptor) -> bool {
    use system_type::{CALL16, CALL32, LDT, TASK_GATE, TSS16, TSS16_BUSY, TSS32, TSS32_BUSY};
    if d.is_segment() {
        return true;
    }
    match d.kind() {
        LDT | TSS32 | TSS32_BUSY | CALL32 => true,
        TSS16 | TSS16_BUSY | CALL16 | TASK_GATE => !cpu.sys.long_mode(),
        _ => false,
    }
}

/// LAR: access rights.
pub(super) fn lar(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.protected_only()?;
    let selector = read_rm16(cpu, op, op.r1)?;
    let d = cpu.inspect(selector)?;
    match d.filter(|d| type_allowed_lar(cpu, d)) {
        Some(d) => {
            write_sized(cpu, op, op.r0, (d.raw >> 32) & 0x00ff_ff00);
            cpu.set_zf(true);
        }
        None => cpu.set_zf(false),
    }
    Ok(())
}

/// LSL: limit.
pub(super) fn lsl(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    use system_type::{LDT, TSS16, TSS16_BUSY, TSS32, TSS32_BUSY};
    cpu.protected_only()?;
    let selector = read_rm16(cpu, op, op.r1)?;
    let d = cpu.inspect(selector)?;
    let long = cpu.sys.long_mode();
    let allowed = |d: &Descriptor| {
        d.is_segment()
            || match d.kind() {
                LDT | TSS32 | TSS32_BUSY => true,
                TSS16 | TSS16_BUSY => !long,
                _ => false,
            }
    };
    match d.filter(allowed) {
        Some(d) => {
            write_sized(cpu, op, op.r0, u64::from(d.limit()));
            cpu.set_zf(true);
        }
        None => cpu.set_zf(false),
    }
    Ok(())
}

/// VERR (`extra` bit 1 clear) and VERW (set).
pub(super) fn verify(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.protected_only()?;
    let write = op.imm != 0;
    let selector = read_rm16(cpu, op, op.r1)?;
    let ok = cpu.inspect(selector)?.is_some_and(|d| {
        d.is_segment()
            && if write {
                d.is_writable_data()
            } else {
                d.is_readable()
            }
    });
    cpu.set_zf(ok);
    Ok(())
}

/// ARPL.
pub(super) fn arpl(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.protected_only()?;
    let source = cpu.gpr[usize::from(op.r1 & 15)] as u16;
    let target = read_rm16_for_write(cpu, op)?;
    let raise = target & 3 < source & 3;
    let value = (target & !3) | (source & 3);
    if op.extra != 0 {
        cpu.store::<u16>(op, if raise { value } else { target })?;
    } else if raise {
        let slot = &mut cpu.gpr[usize::from(op.r0 & 15)];
        *slot = (*slot & !0xffff) | u64::from(value);
    }
    cpu.set_zf(raise);
    Ok(())
}

fn read_rm16_for_write(cpu: &mut Cpu, op: &Op) -> Result<u16, Trap> {
    if op.extra != 0 {
        cpu.load_for_write::<u16>(op)
    } else {
        Ok(cpu.gpr[usize::from(op.r0 & 15)] as u16)
    }
}

impl Cpu {
    /// LLDT's load; also of task switches (`fault` #TS).
    pub(crate) fn load_ldt(&mut self, selector: u16, fault: u8) -> Result<(), Trap> {
        if is_null(selector) {
            self.sys.ldt = Segment::null(selector);
            return Ok(());
        }
        if selector & 4 != 0 {
            return Err(self.selector_fault(fault, selector));
        }
        let d = self.read_descriptor(selector, fault)?;
        if d.is_segment() || d.kind() != system_type::LDT {
            return Err(self.selector_fault(fault, selector));
        }
        if !d.present() {
            let missing = if fault == vector::TS {
                fault
            } else {
                vector::NP
            };
            return Err(self.selector_fault(missing, selector));
        }
        let mut ldt = d.segment(selector);
        if self.sys.long_mode() {
            ldt.base |= self.read_descriptor_high(selector, fault)? << 32;
        }
        if !canonical(ldt.base) {
            return Err(self.selector_fault(vector::GP, selector));
        }
        self.sys.ldt = ldt;
        Ok(())
    }

    /// LTR's load.
    pub(crate) fn load_task_register(&mut self, selector: u16) -> Result<(), Trap> {
        if is_null(selector) {
            return Err(self.gp0());
        }
        if selector & 4 != 0 {
            return Err(self.selector_fault(vector::GP, selector));
        }
        let mut d = self.read_descriptor(selector, vector::GP)?;
        let long = self.sys.long_mode();
        let ok = !d.is_segment()
            && (d.kind() == system_type::TSS32 || d.kind() == system_type::TSS16 && !long);
        if !ok {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        let high = if long {
            self.read_descriptor_high(selector, vector::GP)?
        } else {
            0
        };
        let mut tr = d.segment(selector);
        tr.base |= high << 32;
        if !canonical(tr.base) {
            return Err(self.selector_fault(vector::GP, selector));
        }
        self.mark_descriptor(&mut d, BUSY)?;
        tr.attributes = d.attributes();
        self.sys.tr = tr;
        Ok(())
    }
}

/// The busy bit in a TSS descriptor's type.
pub(crate) const BUSY: u64 = 2;

/// LLDT.
pub(super) fn lldt(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.protected_only()?;
    cpu.require_cpl0()?;
    let selector = read_rm16(cpu, op, op.r1)?;
    cpu.load_ldt(selector, vector::GP)
}

/// LTR.
pub(super) fn ltr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.protected_only()?;
    cpu.require_cpl0()?;
    let selector = read_rm16(cpu, op, op.r1)?;
    cpu.load_task_register(selector)
}

/// SLDT (`imm` 0), STR (1).
pub(super) fn store_system_selector(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.protected_only()?;
    cpu.check_umip()?;
    let value = if op.imm == 0 {
        cpu.sys.ldt.selector
    } else {
        cpu.sys.tr.selector
    };
    if op.extra != 0 {
        cpu.store::<u16>(op, value)
    } else {
        write_sized(cpu, op, op.r0, u64::from(value));
        Ok(())
    }
}

const _: () = assert!(attr::ACCESSED == 1);
