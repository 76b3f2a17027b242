//! Control registers, descriptor-table registers and translation caches (Intel SDM 3A §§2.5, 5.10;
//! 2A/2B "MOV — Move to/from Control Registers", "INVPCID", "XSETBV").

use crate::code::{Op, op_flag};
use crate::cpu::{Cpu, reg, seg};
use crate::sys::descriptor::canonical;
use crate::sys::operand::{read_rm16, size_of_op, write_register, write_sized};
use crate::sys::state::{DescriptorTable, cr0, cr4, efer};
use crate::trap::{Trap, TrapKind};

impl Cpu {
    /// Writes CR0 with all checks and consequences.
    pub(crate) fn write_cr0(&mut self, value: u64) -> Result<(), Trap> {
        let old = self.sys.cr0;
        let new = (value & cr0::WRITABLE) | cr0::ET;
        let illegal = value >> 32 != 0
            || new & cr0::PG != 0 && new & cr0::PE == 0
            || new & cr0::NW != 0 && new & cr0::CD == 0;
        if illegal {
            return Err(self.gp0());
        }
        let mut efer = self.sys.efer;
        if new & !old & cr0::PG != 0 {
            if efer & efer::LME != 0 {
                let cs = self.sys.segments[usize::from(seg::CS)];
                if self.sys.cr4 & cr4::PAE == 0 || cs.long() {
                    return Err(self.gp0());
                }
                efer |= efer::LMA;
            } else if self.sys.cr4 & cr4::PAE != 0 {
                self.load_pdptes()?;
            }
        } else if old & !new & cr0::PG != 0 {
            if self.sys.mode.is64() || self.sys.cr4 & cr4::PCIDE != 0 {
                return Err(self.gp0());
            }
            efer &= !efer::LMA;
        }
        self.sys.cr0 = new;
        self.sys.efer = efer;
        self.update_mode();
        if (old ^ new) & cr0::PG != 0 {
            self.tlb_flush_all();
        }
        Ok(())
    }

    /// MOV to CR3, and a task switch's load of it.
    pub(crate) fn load_cr3(&mut self, value: u64, explicit: bool) -> Result<(), Trap> {
        const NO_FLUSH: u64 = 1 << 63;
        let old = self.sys.cr3;
        if self.sys.long_mode() {
            let pcide = self.sys.cr4 & cr4::PCIDE != 0;
            let no_flush = pcide && value & NO_FLUSH != 0;
            let new = if pcide { value & !NO_FLUSH } else { value };
            if new >> self.cpuid.physical_address_bits() != 0 {
                return Err(self.gp0());
            }
            self.sys.cr3 = new;
            self.tlb_load_cr3(old, new, no_flush && explicit);
            return Ok(());
        }
        let new = value & 0xffff_ffff;
        self.sys.cr3 = new;
        if self.sys.cr0 & cr0::PG != 0 && self.sys.cr4 & cr4::PAE != 0 {
            self.load_pdptes().inspect_err(|_| self.sys.cr3 = old)?;
        }
        self.tlb_load_cr3(old, new, false);
        Ok(())
    }

    /// The bits of CR4 that CPUID offers.
    pub(crate) fn cr4_mask(&self) -> u64 {
        let edx = self.cpuid.feature_edx();
        let ecx = self.cpuid.feature_ecx();
        let ebx7 = self.cpuid.structured_ebx();
        let ecx7 = self.cpuid.structured_ecx();
        [
            (edx, 1, cr4::VME | cr4::PVI),
            (edx, 4, cr4::TSD),
            (edx, 2, cr4::DE),
            (edx, 3, cr4::PSE),
            (edx, 6, cr4::PAE),
            (edx, 7, cr4::MCE),
            (edx, 13, cr4::PGE),
            (edx, 24, cr4::OSFXSR),
            (edx, 25, cr4::OSXMMEXCPT),
            (ecx, 17, cr4::PCIDE),
            (ecx, 26, cr4::OSXSAVE),
            (ebx7, 0, cr4::FSGSBASE),
            (ebx7, 7, cr4::SMEP),
            (ebx7, 20, cr4::SMAP),
            (ecx7, 2, cr4::UMIP),
        ]
        .iter()
        .filter(|(word, bit, _)| word & (1 << bit) != 0)
        .fold(cr4::PCE, |mask, (_, _, flags)| mask | flags)
    }

    /// Writes CR4 with all checks and consequences.
    pub(crate) fn write_cr4(&mut self, value: u64) -> Result<(), Trap> {
        let old = self.sys.cr4;
        let changed = old ^ value;
        let long = self.sys.long_mode();
        let illegal = value & !self.cr4_mask() != 0
            || long && value & cr4::PAE == 0
            || changed & value & cr4::PCIDE != 0 && (!long || self.sys.cr3 & 0xfff != 0);
        if illegal {
            return Err(self.gp0());
        }
        self.sys.cr4 = value;
        const PAGING: u64 = cr4::PGE | cr4::PSE | cr4::PAE | cr4::SMEP;
        let pae_paging = self.sys.cr0 & cr0::PG != 0 && value & cr4::PAE != 0 && !long;
        if changed & PAGING != 0 && pae_paging {
            self.load_pdptes().inspect_err(|_| self.sys.cr4 = old)?;
        }
        self.update_mode();
        if changed & (PAGING | cr4::SMAP) != 0 || changed & old & cr4::PCIDE != 0 {
            self.tlb_flush_all();
        }
        Ok(())
    }

    /// Writes IA32_EFER with all checks and consequences.
    pub(crate) fn write_efer(&mut self, value: u64) -> Result<(), Trap> {
        let old = self.sys.efer;
        let paging = self.sys.cr0 & cr0::PG != 0;
        let illegal = value & !(self.efer_mask() | efer::LMA) != 0
            || paging && (old ^ value) & efer::LME != 0;
        if illegal {
            return Err(self.gp0());
        }
        self.sys.efer = (value & !efer::LMA) | (old & efer::LMA);
        self.update_mode();
        if (old ^ value) & efer::NXE != 0 {
            self.tlb_flush_all();
        }
        Ok(())
    }

    /// #GP(0) where user-mode instruction prevention forbids the instruction.
    pub(super) fn check_umip(&mut self) -> Result<(), Trap> {
        if self.cpl != 0 && self.sys.cr4 & cr4::UMIP != 0 {
            return Err(self.gp0());
        }
        Ok(())
    }

    /// The limit of the code segment; offsets of 64-bit code have none.
    #[inline]
    pub fn cs_limit(&self) -> u32 {
        self.sys.segments[usize::from(seg::CS)].limit
    }
}

/// Operand size of control and debug register moves: all of the register.
fn whole(cpu: &Cpu) -> u64 {
    if cpu.sys.mode.is64() { 8 } else { 4 }
}

fn source(cpu: &Cpu, register: u8) -> u64 {
    let value = cpu.gpr[usize::from(register & 15)];
    if cpu.sys.mode.is64() {
        value
    } else {
        value & 0xffff_ffff
    }
}

/// MOV r, CRn: `r0` register, `r1` control register.
pub(super) fn mov_from_cr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let value = match op.r1 {
        0 => cpu.sys.cr0,
        2 => cpu.sys.cr2,
        3 => cpu.sys.cr3,
        4 => cpu.sys.cr4,
        8 => cpu.apic.cr8(),
        _ => return Err(cpu.ud()),
    };
    let size = whole(cpu);
    write_register(cpu, op.r0, size, value);
    Ok(())
}

/// MOV CRn, r: `r0` control register, `r1` register.
pub(super) fn mov_to_cr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let value = source(cpu, op.r1);
    match op.r0 {
        0 => cpu.write_cr0(value),
        2 => {
            cpu.sys.cr2 = value;
            Ok(())
        }
        3 => cpu.load_cr3(value, true),
        4 => cpu.write_cr4(value),
        8 => {
            if value > 15 {
                return Err(cpu.gp0());
            }
            cpu.apic.set_cr8(value);
            cpu.want_events_if_deliverable();
            Ok(())
        }
        _ => Err(cpu.ud()),
    }
}

/// LMSW: can set PE but not clear it.
pub(super) fn lmsw(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let value = u64::from(read_rm16(cpu, op, op.r1)?);
    let keep = cpu.sys.cr0 & (!0xf | cr0::PE);
    cpu.write_cr0(keep | (value & 0xf))
}

/// SMSW.
pub(super) fn smsw(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.check_umip()?;
    let value = cpu.sys.cr0;
    if op.extra != 0 {
        cpu.store::<u16>(op, value as u16)
    } else {
        write_sized(cpu, op, op.r0, value);
        Ok(())
    }
}

/// CLTS.
pub(super) fn clts(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    cpu.sys.cr0 &= !cr0::TS;
    cpu.update_mode();
    Ok(())
}

/// SGDT (`imm` 0), SIDT (1).
pub(super) fn store_table(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.check_umip()?;
    let table = if op.imm == 0 {
        cpu.sys.gdt
    } else {
        cpu.sys.idt
    };
    let at = op.offset(cpu);
    if cpu.sys.mode.is64() {
        cpu.check_write_at::<u64>(op.seg, at.wrapping_add(2))?;
        cpu.store_at::<u16>(op.seg, at, table.limit)?;
        cpu.store_at::<u64>(op.seg, at.wrapping_add(2), table.base)
    } else {
        cpu.check_write_at::<u32>(op.seg, at.wrapping_add(2))?;
        cpu.store_at::<u16>(op.seg, at, table.limit)?;
        cpu.store_at::<u32>(op.seg, at.wrapping_add(2), table.base as u32)
    }
}

/// LGDT (`imm` 0), LIDT (1).
pub(super) fn load_table(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let at = op.offset(cpu);
    let limit = cpu.load_at::<u16>(op.seg, at)?;
    let base = if cpu.sys.mode.is64() {
        let base = cpu.load_at::<u64>(op.seg, at.wrapping_add(2))?;
        if !canonical(base) {
            return Err(cpu.gp0());
        }
        base
    } else {
        let base = u64::from(cpu.load_at::<u32>(op.seg, at.wrapping_add(2))?);
        // A 16-bit operand size loads 24 bits.
        if size_of_op(op) == 2 {
            base & 0xff_ffff
        } else {
            base
        }
    };
    let table = DescriptorTable { base, limit };
    if op.imm == 0 {
        cpu.sys.gdt = table;
    } else {
        cpu.sys.idt = table;
    }
    Ok(())
}

/// INVLPG: a non-canonical address is no error.
pub(super) fn invlpg(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let offset = op.offset(cpu);
    let base = cpu.seg_base[usize::from(op.seg & 7)];
    let linear = base.wrapping_add(offset);
    if cpu.sys.mode.is64() {
        if canonical(linear) {
            cpu.tlb_flush_page(linear);
        }
    } else {
        cpu.tlb_flush_page(linear & 0xffff_ffff);
    }
    Ok(())
}

/// INVPCID: `r0` type.
pub(super) fn invpcid(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let kind = source(cpu, op.r0);
    let at = op.offset(cpu);
    let descriptor = cpu.load_at::<u64>(op.seg, at)?;
    let linear = cpu.load_at::<u64>(op.seg, at.wrapping_add(8))?;
    let pcid = (descriptor & 0xfff) as u16;
    let pcide = cpu.sys.cr4 & cr4::PCIDE != 0;
    let illegal = kind > 3
        || descriptor >> 12 != 0
        || kind < 2 && pcid != 0 && !pcide
        || kind == 0 && !canonical(linear);
    if illegal {
        return Err(cpu.gp0());
    }
    match kind {
        0 => cpu.tlb_flush_page_pcid(linear, pcid),
        1 => cpu.tlb_flush_pcid(pcid),
        2 => cpu.tlb_flush_all(),
        _ => cpu.tlb_flush_non_global(),
    }
    Ok(())
}

/// INVD, WBINVD, WBNOINVD: there are no caches.
pub(super) fn flush_caches(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_cpl0()
}

/// XGETBV.
pub(super) fn xgetbv(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if cpu.sys.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    let index = cpu.gpr[usize::from(reg::RCX)] as u32;
    let value = match index {
        0 => cpu.sys.xcr0,
        // XCR0 and what is in use: all of it may be.
        1 if cpu.cpuid.get(0xd, 1).is_some_and(|r| r.eax & 4 != 0) => cpu.sys.xcr0 & cpu.xinuse(),
        _ => return Err(cpu.gp0()),
    };
    write_register(cpu, reg::RAX, 4, value);
    write_register(cpu, reg::RDX, 4, value >> 32);
    Ok(())
}

/// XSETBV.
pub(super) fn xsetbv(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if cpu.sys.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let index = cpu.gpr[usize::from(reg::RCX)] as u32;
    let low = cpu.gpr[usize::from(reg::RAX)] & 0xffff_ffff;
    let value = low | (cpu.gpr[usize::from(reg::RDX)] << 32);
    if index != 0 || !valid_xcr0(value, cpu.cpuid.xcr0_mask()) {
        return Err(cpu.gp0());
    }
    cpu.sys.xcr0 = value;
    cpu.update_mode();
    Ok(())
}

/// XCR0's rules: x87 always, AVX only with SSE (SDM 1 §13.3).
pub(crate) fn valid_xcr0(value: u64, mask: u64) -> bool {
    value & 1 != 0 && value & !mask == 0 && value & 6 != 4
}

/// MOV r, DRn: `r0` register, `r1` debug register.
pub(super) fn mov_from_dr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let number = cpu.check_debug_access(op.r1)?;
    let value = match number {
        n @ 0..=3 => cpu.sys.dr[usize::from(n)],
        6 => cpu.sys.dr6,
        _ => cpu.sys.dr7,
    };
    let size = whole(cpu);
    write_register(cpu, op.r0, size, value);
    Ok(())
}

/// MOV DRn, r: `r0` debug register, `r1` register.
pub(super) fn mov_to_dr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let number = cpu.check_debug_access(op.r0)?;
    let value = source(cpu, op.r1);
    if number >= 6 && value >> 32 != 0 {
        return Err(cpu.gp0());
    }
    match number {
        n @ 0..=3 => cpu.sys.dr[usize::from(n)] = value,
        6 => cpu.sys.dr6 = (value & 0xe00f) | 0xffff_0ff0,
        _ => {
            cpu.sys.dr7 = (value & 0xffff_2bff) | 0x400;
            cpu.update_mode();
        }
    }
    cpu.want_events();
    Ok(())
}

impl Cpu {
    /// The debug register that an instruction means: aliases, CPL, DR7.GD.
    fn check_debug_access(&mut self, number: u8) -> Result<u8, Trap> {
        const GENERAL_DETECT: u64 = 1 << 13;
        let number = match number {
            4 | 5 if self.sys.cr4 & cr4::DE != 0 => return Err(self.ud()),
            4 | 5 => number + 2,
            0..=3 | 6 | 7 => number,
            _ => return Err(self.ud()),
        };
        self.require_cpl0()?;
        if self.sys.dr7 & GENERAL_DETECT != 0 {
            self.sys.dr6 |= 1 << 13;
            self.sys.dr7 &= !GENERAL_DETECT;
            self.trap.kind = TrapKind::Fault {
                vector: crate::trap::vector::DB,
                error_code: None,
            };
            return Err(Trap);
        }
        Ok(number)
    }
}

const _: () = assert!(op_flag::OPSIZE16 != 0);
