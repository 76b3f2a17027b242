//! The checks that every backend makes before it sets any of a [`CpuState`].
//!
//! A state comes from a file that somebody may have torn or edited. What passes here can be set
//! on any backend without it refusing half way, and makes no processor that hardware would not
//! enter a guest with (Intel SDM 3C §27.3.1, AMD APM 2 §15.5.1).

use crate::cpuid::CpuidTable;
use crate::error::StateError;
use crate::msr;
use crate::state::{
    BootRegisters, CPU_STATE_VERSION, CpuState, DebugRegisters, Events, LocalApicState, MpState,
    Segment, SystemRegisters,
};

/// Bytes of an XSAVE area before its extended regions: legacy region and header.
pub const XSAVE_MIN: usize = 576;
/// Registers in [`LocalApicState::registers`].
pub const LAPIC_REGISTERS: usize = 64;
/// More than any processor has; a bound on what a file can ask for.
const MAX_MSRS: usize = 1024;

/// What the processor that takes the state can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateLimits {
    /// Bits of XCR0 that the CPU model allows.
    pub xcr0: u64,
    /// Bytes of the XSAVE area for all of them.
    pub xsave_size: usize,
    /// Bits of a guest-physical address.
    pub physical_address_bits: u8,
    /// Whether it has a local APIC.
    pub lapic: bool,
}

impl StateLimits {
    /// The limits that a CPUID table sets (leaf 0xd, leaf 0x8000_0008).
    pub fn of(cpuid: &CpuidTable, lapic: bool) -> Self {
        let leaf = cpuid.get(0xd, 0).unwrap_or_default();
        let xcr0 = (u64::from(leaf.edx) << 32 | u64::from(leaf.eax)) | 3;
        let xsave_size = (2..63)
            .filter(|bit| xcr0 & (1 << bit) != 0)
            .filter_map(|bit| cpuid.get(0xd, bit))
            .map(|region| region.ebx as usize + region.eax as usize)
            .fold(XSAVE_MIN, usize::max);
        let physical_address_bits = match cpuid.get(0x8000_0008, 0) {
            Some(leaf) if (32..=52).contains(&(leaf.eax & 0xff)) => (leaf.eax & 0xff) as u8,
            _ => 36,
        };
        Self {
            xcr0,
            xsave_size,
            physical_address_bits,
            lapic,
        }
    }

    /// Checks a whole state.
    pub fn check(&self, state: &CpuState) -> Result<(), StateError> {
        let CpuState {
            version,
            general,
            system,
            debug,
            xcr0,
            xsave,
            msrs,
            lapic,
            mp_state,
            events,
            tsc: _,
            clock_ns: _,
        } = state;
        if *version != CPU_STATE_VERSION {
            return Err(StateError::Version {
                found: *version,
                expected: CPU_STATE_VERSION,
            });
        }
        self.check_boot(&BootRegisters {
            general: *general,
            system: *system,
        })?;
        check_debug(debug)?;
        self.check_xsave(*xcr0, xsave)?;
        check_msrs(msrs)?;
        self.check_lapic(lapic.as_ref(), *mp_state)?;
        check_events(events)
    }

    /// Checks general and system registers.
    pub fn check_boot(&self, registers: &BootRegisters) -> Result<(), StateError> {
        let BootRegisters { general, system } = registers;
        // Bits 3, 5, 15 and those above ID (21) are always 0, bit 1 always 1.
        if general.rflags & !0x3f_7fd7 != 0 || general.rflags & 2 == 0 {
            return bad(
                "rflags",
                format!("{:#x} sets reserved bits", general.rflags),
            );
        }
        check_modes(system)?;
        if system.efer & EFER_LMA == 0 && general.rip > u32::MAX.into() {
            return bad(
                "rip",
                format!("{:#x} lies outside of 32-bit code", general.rip),
            );
        }
        if !canonical(general.rip) {
            return bad("rip", format!("{:#x} is not canonical", general.rip));
        }
        if system.cr3 & !low_bits(self.physical_address_bits) & !CR3_NOFLUSH != 0 {
            return bad(
                "cr3",
                format!("{:#x} is not a physical address", system.cr3),
            );
        }
        let base = system.apic_base & !0xfff;
        if system.apic_base & 0x2ff != 0 || base & !low_bits(self.physical_address_bits) != 0 {
            return bad(
                "apic_base",
                format!("{:#x} sets reserved bits", system.apic_base),
            );
        }
        if system.apic_base & 0xc00 == 0x400 {
            return bad("apic_base", "x2APIC mode needs the APIC enabled".into());
        }
        let SystemRegisters {
            segments,
            tr,
            ldt,
            gdt,
            idt,
            ..
        } = system;
        for segment in segments.iter().chain([tr, ldt]) {
            check_segment(segment)?;
        }
        if !canonical(gdt.base) || !canonical(idt.base) {
            return bad("descriptor table", "its base is not canonical".into());
        }
        Ok(())
    }

    fn check_xsave(&self, xcr0: u64, xsave: &[u8]) -> Result<(), StateError> {
        let avx_without_sse = xcr0 & 6 == 4;
        let avx512 = xcr0 & 0xe0;
        if xcr0 & 1 == 0
            || xcr0 & !self.xcr0 != 0
            || avx_without_sse
            || (avx512 != 0 && (avx512 != 0xe0 || xcr0 & 4 == 0))
        {
            return bad(
                "xcr0",
                format!("{xcr0:#x} is not possible with this CPU model"),
            );
        }
        if xsave.len() < XSAVE_MIN || xsave.len() > self.xsave_size {
            return bad(
                "XSAVE area",
                format!(
                    "{} bytes, not {XSAVE_MIN} to {}",
                    xsave.len(),
                    self.xsave_size
                ),
            );
        }
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&xsave[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        // XSTATE_BV, XCOMP_BV and the reserved rest of the header (Intel SDM 1 §13.4.2).
        if word(512) & !self.xcr0 != 0 {
            return bad(
                "XSAVE area",
                format!("it claims components {:#x}", word(512)),
            );
        }
        if (520..576).step_by(8).any(|at| word(at) != 0) {
            return bad("XSAVE area", "reserved bytes of its header are set".into());
        }
        let mxcsr = word(24) as u32;
        if mxcsr & !0xffff != 0 {
            return bad("MXCSR", format!("{mxcsr:#x} sets reserved bits"));
        }
        Ok(())
    }

    fn check_lapic(
        &self,
        lapic: Option<&LocalApicState>,
        mp_state: MpState,
    ) -> Result<(), StateError> {
        match lapic {
            Some(_) if !self.lapic => bad("local APIC", "this machine has none".into()),
            None if self.lapic => bad("local APIC", "it is missing".into()),
            None if mp_state != MpState::Runnable && mp_state != MpState::Halted => {
                bad("activity state", format!("{mp_state:?} needs a local APIC"))
            }
            Some(lapic) if lapic.registers.len() != LAPIC_REGISTERS => bad(
                "local APIC",
                format!("{} registers, not {LAPIC_REGISTERS}", lapic.registers.len()),
            ),
            _ => Ok(()),
        }
    }
}

const CR0_PE: u64 = 1;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR0_KNOWN: u64 = 0xe005_003f;
const CR3_NOFLUSH: u64 = 1 << 63;
const CR4_PAE: u64 = 1 << 5;
const CR4_PCIDE: u64 = 1 << 17;
const CR4_KNOWN: u64 = 0x0ff7_ffff;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
// SCE, LME, LMA, NXE, SVME, LMSLE, FFXSR, TCE, MCOMMIT, INTWB, AutoIBRS.
const EFER_KNOWN: u64 = 0x26_fd01;

fn bad<T>(field: &'static str, reason: String) -> Result<T, StateError> {
    Err(StateError::Invalid { field, reason })
}

fn low_bits(bits: u8) -> u64 {
    (1 << bits) - 1
}

/// Whether bits 63–47 are equal (48-bit linear addresses).
fn canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

fn check_modes(system: &SystemRegisters) -> Result<(), StateError> {
    let &SystemRegisters {
        cr0,
        cr4,
        cr8,
        efer,
        segments,
        ..
    } = system;
    if cr0 & !CR0_KNOWN != 0
        || cr0 & (CR0_PG | CR0_PE) == CR0_PG
        || cr0 & (CR0_NW | CR0_CD) == CR0_NW
    {
        return bad("cr0", format!("{cr0:#x} is no possible value"));
    }
    if cr4 & !CR4_KNOWN != 0 {
        return bad("cr4", format!("{cr4:#x} sets reserved bits"));
    }
    if cr8 > 15 {
        return bad("cr8", format!("{cr8:#x} is more than 15"));
    }
    if efer & !EFER_KNOWN != 0 {
        return bad("efer", format!("{efer:#x} sets reserved bits"));
    }
    let long = efer & EFER_LMA != 0;
    if long != (efer & EFER_LME != 0 && cr0 & CR0_PG != 0) {
        return bad("efer", format!("{efer:#x} does not go with cr0 {cr0:#x}"));
    }
    if long && cr4 & CR4_PAE == 0 {
        return bad("cr4", "long mode needs PAE".into());
    }
    if !long && cr4 & CR4_PCIDE != 0 {
        return bad("cr4", "PCIDE needs long mode".into());
    }
    let code = segments[1].attributes;
    if long && code & 0x6000 == 0x6000 {
        return bad("code segment", "it is both 64-bit and 32-bit".into());
    }
    Ok(())
}

fn check_segment(segment: &Segment) -> Result<(), StateError> {
    if segment.attributes & 0x0f00 != 0 {
        return bad(
            "segment",
            format!("attributes {:#x} set reserved bits", segment.attributes),
        );
    }
    if !canonical(segment.base) {
        return bad(
            "segment",
            format!("base {:#x} is not canonical", segment.base),
        );
    }
    Ok(())
}

fn check_debug(debug: &DebugRegisters) -> Result<(), StateError> {
    let DebugRegisters {
        address: _,
        dr6,
        dr7,
    } = debug;
    if dr6 >> 32 != 0 {
        return bad("dr6", format!("{dr6:#x} sets reserved bits"));
    }
    if dr7 >> 32 != 0 {
        return bad("dr7", format!("{dr7:#x} sets reserved bits"));
    }
    Ok(())
}

fn check_msrs(msrs: &[(u32, u64)]) -> Result<(), StateError> {
    if msrs.len() > MAX_MSRS {
        return bad(
            "MSR list",
            format!("{} entries, more than {MAX_MSRS}", msrs.len()),
        );
    }
    if let Some(pair) = msrs.windows(2).find(|pair| pair[0].0 >= pair[1].0) {
        return bad(
            "MSR list",
            format!("{:#x} is not above its predecessor", pair[1].0),
        );
    }
    for &(index, value) in msrs {
        if msr::has_own_field(index) {
            return bad("MSR list", format!("{index:#x} has a field of its own"));
        }
        let address = matches!(
            index,
            msr::IA32_SYSENTER_ESP
                | msr::IA32_SYSENTER_EIP
                | msr::LSTAR
                | msr::CSTAR
                | msr::KERNEL_GS_BASE
        );
        if address && !canonical(value) {
            return bad("MSR list", format!("{index:#x} is not a canonical address"));
        }
        // Memory types 2, 3 and above 7 are reserved (Intel SDM 3A §12.12.2).
        let bad_type = |byte: &u8| !matches!(byte, 0 | 1 | 4..=7);
        if index == msr::IA32_PAT && value.to_le_bytes().iter().any(bad_type) {
            return bad(
                "MSR list",
                format!("PAT {value:#x} has reserved memory types"),
            );
        }
    }
    Ok(())
}

fn check_events(events: &Events) -> Result<(), StateError> {
    let Events {
        exception,
        interrupt: _,
        sti_shadow: _,
        mov_ss_shadow: _,
        nmi_injected: _,
        nmi_pending: _,
        nmi_masked: _,
    } = events;
    // 2 is the NMI, which is no exception.
    if let Some(exception) = exception
        && (exception.vector > 31 || exception.vector == 2)
    {
        return bad("exception", format!("vector {}", exception.vector));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
