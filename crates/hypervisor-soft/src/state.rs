//! The contract's state to and from the processor's: field by field, in both directions.

use skerry_hypervisor::state::{
    self as contract, CPU_STATE_VERSION, DebugRegisters, ExceptionEvent, InterruptEvent,
    LocalApicState,
};
use skerry_hypervisor::{CpuidEntry, CpuidResult, CpuidTable, StateError, msr};
use skerry_x86cpu::sys::snapshot::{self as own, InvalidState};
use skerry_x86cpu::sys::state::{DescriptorTable, PendingException, Segment};
use skerry_x86cpu::{self as x86cpu, Cpu};

/// Bytes of the processor's XSAVE area: x87, SSE and AVX.
const XSAVE_LEN: usize = 832;

pub(crate) fn cpuid_to(table: &CpuidTable) -> x86cpu::CpuidTable {
    x86cpu::CpuidTable::new(table.entries.iter().map(|entry| {
        let &CpuidEntry {
            leaf,
            subleaf,
            result,
        } = entry;
        let CpuidResult { eax, ebx, ecx, edx } = result;
        x86cpu::CpuidEntry {
            leaf,
            subleaf,
            result: x86cpu::CpuidResult { eax, ebx, ecx, edx },
        }
    }))
}

pub(crate) fn cpuid_from(table: &x86cpu::CpuidTable) -> CpuidTable {
    let entries = table.entries().iter().map(|entry| {
        let &x86cpu::CpuidEntry {
            leaf,
            subleaf,
            result,
        } = entry;
        let x86cpu::CpuidResult { eax, ebx, ecx, edx } = result;
        CpuidEntry {
            leaf,
            subleaf,
            result: CpuidResult { eax, ebx, ecx, edx },
        }
    });
    CpuidTable {
        entries: entries.collect(),
    }
}

pub(crate) fn general_to(general: &contract::GeneralRegisters) -> own::GeneralRegisters {
    let &contract::GeneralRegisters { gpr, rip, rflags } = general;
    own::GeneralRegisters { gpr, rip, rflags }
}

pub(crate) fn general_from(general: &own::GeneralRegisters) -> contract::GeneralRegisters {
    let &own::GeneralRegisters { gpr, rip, rflags } = general;
    contract::GeneralRegisters { gpr, rip, rflags }
}

fn segment_to(segment: &contract::Segment) -> Segment {
    let &contract::Segment {
        selector,
        base,
        limit,
        attributes,
        unusable,
    } = segment;
    Segment {
        selector,
        base,
        limit,
        attributes,
        unusable,
    }
}

fn segment_from(segment: &Segment) -> contract::Segment {
    let &Segment {
        selector,
        base,
        limit,
        attributes,
        unusable,
    } = segment;
    contract::Segment {
        selector,
        base,
        limit,
        attributes,
        unusable,
    }
}

fn table_to(table: &contract::DescriptorTable) -> DescriptorTable {
    let &contract::DescriptorTable { base, limit } = table;
    DescriptorTable { base, limit }
}

fn table_from(table: &DescriptorTable) -> contract::DescriptorTable {
    let &DescriptorTable { base, limit } = table;
    contract::DescriptorTable { base, limit }
}

pub(crate) fn system_to(system: &contract::SystemRegisters) -> own::SystemRegisters {
    let &contract::SystemRegisters {
        ref segments,
        ref tr,
        ref ldt,
        ref gdt,
        ref idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
    } = system;
    own::SystemRegisters {
        segments: segments.map(|segment| segment_to(&segment)),
        tr: segment_to(tr),
        ldt: segment_to(ldt),
        gdt: table_to(gdt),
        idt: table_to(idt),
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
    }
}

pub(crate) fn system_from(system: &own::SystemRegisters) -> contract::SystemRegisters {
    let &own::SystemRegisters {
        ref segments,
        ref tr,
        ref ldt,
        ref gdt,
        ref idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
    } = system;
    contract::SystemRegisters {
        segments: segments.map(|segment| segment_from(&segment)),
        tr: segment_from(tr),
        ldt: segment_from(ldt),
        gdt: table_from(gdt),
        idt: table_from(idt),
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
    }
}

fn mp_state_to(mp: contract::MpState) -> own::MpState {
    match mp {
        contract::MpState::Runnable => own::MpState::Runnable,
        contract::MpState::Uninitialized => own::MpState::Uninitialized,
        contract::MpState::InitReceived => own::MpState::InitReceived,
        contract::MpState::Halted => own::MpState::Halted,
        contract::MpState::SipiReceived(vector) => own::MpState::SipiReceived(vector),
    }
}

fn mp_state_from(mp: own::MpState) -> contract::MpState {
    match mp {
        own::MpState::Runnable => contract::MpState::Runnable,
        own::MpState::Uninitialized => contract::MpState::Uninitialized,
        own::MpState::InitReceived => contract::MpState::InitReceived,
        own::MpState::Halted => contract::MpState::Halted,
        own::MpState::SipiReceived(vector) => contract::MpState::SipiReceived(vector),
    }
}

fn events_to(events: &contract::Events) -> own::Events {
    let &contract::Events {
        exception,
        interrupt,
        sti_shadow,
        mov_ss_shadow,
        nmi_injected,
        nmi_pending,
        nmi_masked,
    } = events;
    own::Events {
        // Whether its delivery had begun makes no difference: it is delivered from the start.
        exception: exception
            .filter(|event| !event.is_unfinished_trap())
            .map(|event| {
                let ExceptionEvent {
                    vector,
                    error_code,
                    payload,
                    injected: _,
                } = event;
                PendingException {
                    vector,
                    error_code,
                    payload,
                }
            }),
        interrupt: interrupt.map(|event| (event.vector, event.soft)),
        sti_shadow,
        mov_ss_shadow,
        nmi_injected,
        nmi_pending,
        nmi_masked,
    }
}

fn events_from(events: &own::Events) -> contract::Events {
    let &own::Events {
        exception,
        interrupt,
        sti_shadow,
        mov_ss_shadow,
        nmi_injected,
        nmi_pending,
        nmi_masked,
    } = events;
    contract::Events {
        exception: exception.map(|event| {
            let PendingException {
                vector,
                error_code,
                payload,
            } = event;
            ExceptionEvent {
                vector,
                error_code,
                payload,
                // One with a payload has not yet had its effect on CR2 or DR6.
                injected: payload.is_none(),
            }
        }),
        interrupt: interrupt.map(|(vector, soft)| InterruptEvent { vector, soft }),
        sti_shadow,
        mov_ss_shadow,
        nmi_injected,
        nmi_pending,
        nmi_masked,
    }
}

/// What was saved, as the contract has it.
pub(crate) fn state_from(
    saved: own::CpuState,
    has_apic: bool,
    xsave_size: usize,
) -> contract::CpuState {
    let own::CpuState {
        general,
        system,
        debug_address,
        dr6,
        dr7,
        xcr0,
        mut xsave,
        mut msrs,
        lapic,
        tsc_deadline,
        mp_state,
        events,
        tsc,
        clock_ns,
    } = saved;
    msrs.retain(|(index, _)| !msr::has_own_field(*index));
    trim_xsave(&mut xsave, xsave_size);
    contract::CpuState {
        version: CPU_STATE_VERSION,
        general: general_from(&general),
        system: system_from(&system),
        debug: DebugRegisters {
            address: debug_address,
            dr6,
            dr7,
        },
        xcr0,
        xsave,
        msrs,
        lapic: has_apic.then_some(LocalApicState {
            registers: lapic,
            tsc_deadline,
        }),
        mp_state: mp_state_from(mp_state),
        events: events_from(&events),
        tsc,
        clock_ns,
    }
}

/// Cuts the area to what the CPU model has; components behind the cut are not claimed.
fn trim_xsave(xsave: &mut Vec<u8>, size: usize) {
    xsave.truncate(size);
    if xsave.len() < XSAVE_LEN
        && let Some(components) = xsave.get_mut(512)
    {
        *components &= 3;
    }
}

fn state_to(state: &contract::CpuState) -> own::CpuState {
    let contract::CpuState {
        version: _,
        general,
        system,
        debug,
        xcr0,
        xsave,
        msrs,
        lapic,
        mp_state,
        events,
        tsc,
        clock_ns,
    } = state;
    let mut xsave = xsave.clone();
    xsave.resize(XSAVE_LEN, 0);
    let (registers, tsc_deadline) = match lapic {
        Some(LocalApicState {
            registers,
            tsc_deadline,
        }) => (registers.clone(), *tsc_deadline),
        None => (Vec::new(), 0),
    };
    own::CpuState {
        general: general_to(general),
        system: system_to(system),
        debug_address: debug.address,
        dr6: debug.dr6,
        dr7: debug.dr7,
        xcr0: *xcr0,
        xsave,
        msrs: msrs.clone(),
        lapic: registers,
        tsc_deadline,
        mp_state: mp_state_to(*mp_state),
        events: events_to(events),
        tsc: *tsc,
        clock_ns: *clock_ns,
    }
}

/// The processor's refusal, as the contract says it.
pub(crate) fn invalid(error: InvalidState) -> StateError {
    let field = match &error {
        InvalidState::Control { name, .. }
        | InvalidState::NotCanonical { name, .. }
        | InvalidState::Segment { name, .. } => name,
        InvalidState::Msr { .. } => "MSR list",
        InvalidState::Xsave => "XSAVE area",
        InvalidState::Event(_) => "pending event",
        InvalidState::Apic(_) => "local APIC",
    };
    StateError::Invalid {
        field,
        reason: error.to_string(),
    }
}

/// Sets everything, or nothing. Registers that other backends list and this processor does not
/// have are left out where [`msr::dispensable`] allows it.
pub(crate) fn load(cpu: &mut Cpu, state: &contract::CpuState) -> Result<(), StateError> {
    let mut state = state_to(state);
    loop {
        match cpu.load_state(&state) {
            Ok(()) => return Ok(()),
            Err(InvalidState::Msr { index, value }) => {
                let Some(why) = msr::dispensable(index, value) else {
                    return Err(invalid(InvalidState::Msr { index, value }));
                };
                tracing::debug!(index, value, why, "model-specific register left out");
                state.msrs.retain(|msr| msr.0 != index);
            }
            Err(error) => return Err(invalid(error)),
        }
    }
}
