//! The kernel's structures and the contract's, each way.

use kvm_bindings::*;
use skerry_hypervisor::state::{
    DebugRegisters, DescriptorTable, Events, ExceptionEvent, GeneralRegisters, InterruptEvent,
    LocalApicState, MpState, Segment, SystemRegisters,
};
use skerry_hypervisor::validate::LAPIC_REGISTERS;
use skerry_hypervisor::{CpuidEntry, CpuidResult, CpuidTable, StateError};

pub(crate) fn general_from(regs: &kvm_regs) -> GeneralRegisters {
    let &kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    } = regs;
    GeneralRegisters {
        gpr: [
            rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
        ],
        rip,
        rflags,
    }
}

pub(crate) fn general_to(general: &GeneralRegisters) -> kvm_regs {
    let &GeneralRegisters { gpr, rip, rflags } = general;
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    }
}

fn segment_from(segment: &kvm_segment) -> Segment {
    if segment.unusable != 0 {
        return Segment {
            selector: segment.selector,
            base: segment.base,
            limit: segment.limit,
            ..Segment::UNUSABLE
        };
    }
    let bit = |value: u8, at: u32| u16::from(value & 1) << at;
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        attributes: u16::from(segment.type_ & 15)
            | bit(segment.s, 4)
            | u16::from(segment.dpl & 3) << 5
            | bit(segment.present, 7)
            | bit(segment.avl, 12)
            | bit(segment.l, 13)
            | bit(segment.db, 14)
            | bit(segment.g, 15),
        unusable: false,
    }
}

fn segment_to(segment: &Segment) -> kvm_segment {
    let &Segment {
        selector,
        base,
        limit,
        attributes,
        unusable,
    } = segment;
    let bit = |at: u32| (attributes >> at & 1) as u8;
    kvm_segment {
        base,
        limit,
        selector,
        type_: (attributes & 15) as u8,
        present: bit(7) & u8::from(!unusable),
        dpl: (attributes >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: unusable.into(),
        padding: 0,
    }
}

fn table_from(table: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: table.base,
        limit: table.limit,
    }
}

fn table_to(table: DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: table.base,
        limit: table.limit,
        ..Default::default()
    }
}

pub(crate) fn system_from(sregs: &kvm_sregs) -> SystemRegisters {
    // `interrupt_bitmap` is in the events.
    let kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        interrupt_bitmap: _,
    } = sregs;
    SystemRegisters {
        segments: [es, cs, ss, ds, fs, gs].map(segment_from),
        tr: segment_from(tr),
        ldt: segment_from(ldt),
        gdt: table_from(gdt),
        idt: table_from(idt),
        cr0: *cr0,
        cr2: *cr2,
        cr3: *cr3,
        cr4: *cr4,
        cr8: *cr8,
        efer: *efer,
        apic_base: *apic_base,
    }
}

pub(crate) fn system_to(system: &SystemRegisters) -> kvm_sregs {
    let &SystemRegisters {
        ref segments,
        ref tr,
        ref ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
    } = system;
    let [es, cs, ss, ds, fs, gs] = segments.map(|segment| segment_to(&segment));
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
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
        interrupt_bitmap: [0; 4],
    }
}

/// SCE, LME, LMA, NXE.
const EFER_BASE: u64 = 0xd01;
/// Automatic IBRS: bit 8 in EAX of leaf 0x8000_0021.
const EFER_AUTOMATIC_IBRS: u64 = 1 << 21;

/// The registers as this host's processor can have them. It refuses to enter a guest with a bit of EFER
/// that it doesn't know. One that only asks for a defence is left out instead: whoever lets the guest
/// travel has told so.
pub(crate) fn system_for(
    system: &SystemRegisters,
    host: &CpuidTable,
) -> Result<SystemRegisters, StateError> {
    // Fast FXSAVE and the extension of translation caches (AMD APM 2 §3.1.7).
    let leaf = host.get(0x8000_0001, 0).unwrap_or_default();
    let known =
        EFER_BASE | u64::from(leaf.edx >> 25 & 1) << 14 | u64::from(leaf.ecx >> 17 & 1) << 15;
    let has_ibrs = host
        .get(0x8000_0021, 0)
        .is_some_and(|leaf| leaf.eax & (1 << 8) != 0);
    let mut system = *system;
    if !has_ibrs {
        system.efer &= !EFER_AUTOMATIC_IBRS;
    }
    if system.efer & !(known | EFER_AUTOMATIC_IBRS) != 0 {
        return Err(StateError::Invalid {
            field: "efer",
            reason: format!("this host's processor can't have {:#x}", system.efer),
        });
    }
    Ok(system)
}

/// The area without what the CPU model doesn't have: the kernel keeps protection keys' rights for every
/// guest.
pub(crate) fn xsave_from(mut area: Vec<u8>, xcr0: u64) -> Vec<u8> {
    if let Some(present) = area.get_mut(512..520) {
        for (byte, allowed) in present.iter_mut().zip(xcr0.to_le_bytes()) {
            *byte &= allowed;
        }
    }
    area
}

pub(crate) fn debug_from(debug: &kvm_debugregs) -> DebugRegisters {
    DebugRegisters {
        address: debug.db,
        dr6: debug.dr6,
        dr7: debug.dr7,
    }
}

pub(crate) fn debug_to(debug: &DebugRegisters) -> kvm_debugregs {
    let &DebugRegisters { address, dr6, dr7 } = debug;
    kvm_debugregs {
        db: address,
        dr6,
        dr7,
        ..Default::default()
    }
}

/// The vector of a pending SIPI lies in the events, for the kernel.
pub(crate) fn mp_state_from(mp: kvm_mp_state, events: &kvm_vcpu_events) -> MpState {
    match mp.mp_state {
        KVM_MP_STATE_UNINITIALIZED => MpState::Uninitialized,
        KVM_MP_STATE_INIT_RECEIVED => MpState::InitReceived,
        KVM_MP_STATE_HALTED => MpState::Halted,
        KVM_MP_STATE_SIPI_RECEIVED => MpState::SipiReceived(events.sipi_vector as u8),
        _ => MpState::Runnable,
    }
}

pub(crate) fn mp_state_to(mp: MpState) -> kvm_mp_state {
    let mp_state = match mp {
        MpState::Runnable => KVM_MP_STATE_RUNNABLE,
        MpState::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
        MpState::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
        MpState::Halted => KVM_MP_STATE_HALTED,
        MpState::SipiReceived(_) => KVM_MP_STATE_SIPI_RECEIVED,
    };
    kvm_mp_state { mp_state }
}

pub(crate) fn events_from(events: &kvm_vcpu_events) -> Events {
    let kvm_vcpu_events {
        exception,
        interrupt,
        nmi,
        exception_has_payload,
        exception_payload,
        ..
    } = *events;
    let shadow = |bit: u32| u32::from(interrupt.shadow) & bit != 0;
    Events {
        exception: (exception.injected != 0 || exception.pending != 0).then(|| ExceptionEvent {
            vector: exception.nr,
            error_code: (exception.has_error_code != 0).then_some(exception.error_code),
            payload: (exception_has_payload != 0).then_some(exception_payload),
            injected: exception.injected != 0,
        }),
        interrupt: (interrupt.injected != 0).then_some(InterruptEvent {
            vector: interrupt.nr,
            soft: interrupt.soft != 0,
        }),
        sti_shadow: shadow(KVM_X86_SHADOW_INT_STI),
        mov_ss_shadow: shadow(KVM_X86_SHADOW_INT_MOV_SS),
        nmi_injected: nmi.injected != 0,
        nmi_pending: nmi.pending != 0,
        nmi_masked: nmi.masked != 0,
    }
}

pub(crate) fn events_to(events: &Events, mp: MpState) -> kvm_vcpu_events {
    let &Events {
        exception,
        interrupt,
        sti_shadow,
        mov_ss_shadow,
        nmi_injected,
        nmi_pending,
        nmi_masked,
    } = events;
    let mut to = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SHADOW
            | KVM_VCPUEVENT_VALID_PAYLOAD,
        ..Default::default()
    };
    if let Some(event) = exception {
        to.exception.nr = event.vector;
        to.exception.injected = event.injected.into();
        to.exception.pending = (!event.injected).into();
        to.exception.has_error_code = event.error_code.is_some().into();
        to.exception.error_code = event.error_code.unwrap_or(0);
        to.exception_has_payload = (!event.injected && event.payload.is_some()).into();
        to.exception_payload = event.payload.unwrap_or(0);
    }
    if let Some(event) = interrupt {
        to.interrupt.injected = 1;
        to.interrupt.nr = event.vector;
        to.interrupt.soft = event.soft.into();
    }
    if sti_shadow {
        to.interrupt.shadow |= KVM_X86_SHADOW_INT_STI as u8;
    }
    if mov_ss_shadow {
        to.interrupt.shadow |= KVM_X86_SHADOW_INT_MOV_SS as u8;
    }
    to.nmi.injected = nmi_injected.into();
    to.nmi.pending = nmi_pending.into();
    to.nmi.masked = nmi_masked.into();
    if let MpState::SipiReceived(vector) = mp {
        to.sipi_vector = vector.into();
        to.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
    }
    to
}

const APIC_TIMER_ENTRY: usize = 0x32;
const APIC_INITIAL_COUNT: usize = 0x38;
const APIC_CURRENT_COUNT: usize = 0x39;

/// Whether a page's timer is a one-shot one with an interrupt to raise, and its count is at 0.
fn at_zero(registers: &[u32]) -> bool {
    const MASKED_OR_OTHER_MODE: u32 = 7 << 16;
    let register = |at: usize| registers.get(at).copied().unwrap_or(0);
    register(APIC_TIMER_ENTRY) & MASKED_OR_OTHER_MODE == 0
        && register(APIC_INITIAL_COUNT) != 0
        && register(APIC_CURRENT_COUNT) == 0
}

/// Whether the timer's vector is requested or in service.
fn timer_raised(registers: &[u32]) -> bool {
    let vector = registers.get(APIC_TIMER_ENTRY).copied().unwrap_or(0) & 0xff;
    let (word, bit) = ((vector / 32) as usize, vector % 32);
    [0x10, 0x20].iter().any(|from| {
        registers
            .get(from + word)
            .is_some_and(|w| w & (1 << bit) != 0)
    })
}

pub(crate) fn lapic_from(lapic: &kvm_lapic_state, tsc_deadline: u64) -> LocalApicState {
    let mut registers: Vec<u32> = lapic
        .regs
        .chunks_exact(16)
        .take(LAPIC_REGISTERS)
        .map(|r| u32::from_le_bytes([r[0] as u8, r[1] as u8, r[2] as u8, r[3] as u8]))
        .collect();
    // The kernel raises the interrupt of a timer that is over at the next entry, and doesn't tell
    // whether it has. One that comes twice does less harm than one that never comes.
    if at_zero(&registers)
        && !timer_raised(&registers)
        && let Some(count) = registers.get_mut(APIC_CURRENT_COUNT)
    {
        *count = 1;
    }
    LocalApicState {
        registers,
        tsc_deadline,
    }
}

pub(crate) fn lapic_to(lapic: &LocalApicState) -> kvm_lapic_state {
    let mut registers = lapic.registers.clone();
    // Over, its interrupt raised: the kernel would raise it again.
    if at_zero(&registers)
        && let Some(count) = registers.get_mut(APIC_INITIAL_COUNT)
    {
        *count = 0;
    }
    let mut to = kvm_lapic_state::default();
    for (register, value) in to.regs.chunks_exact_mut(16).zip(&registers) {
        for (byte, value) in register.iter_mut().zip(value.to_le_bytes()) {
            *byte = value as _;
        }
    }
    to
}

pub(crate) fn cpuid_from(entries: &[kvm_cpuid_entry2]) -> CpuidTable {
    let entries = entries
        .iter()
        .map(|entry| CpuidEntry {
            leaf: entry.function,
            subleaf: (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index),
            result: CpuidResult {
                eax: entry.eax,
                ebx: entry.ebx,
                ecx: entry.ecx,
                edx: entry.edx,
            },
        })
        .collect();
    CpuidTable { entries }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_survive_both_conversions() {
        let general = GeneralRegisters {
            gpr: std::array::from_fn(|i| 0x1111 * i as u64),
            rip: 0x1234,
            rflags: 0x202,
        };
        assert_eq!(general_from(&general_to(&general)), general);
        let system = skerry_hypervisor::BootRegisters::long_mode(0x1000, 0, 0).system;
        assert_eq!(system_from(&system_to(&system)), system);
    }

    #[test]
    fn events_survive_both_conversions() {
        let events = Events {
            exception: Some(ExceptionEvent {
                vector: 14,
                error_code: Some(2),
                payload: Some(0x5000),
                injected: false,
            }),
            interrupt: Some(InterruptEvent {
                vector: 0x80,
                soft: true,
            }),
            sti_shadow: true,
            mov_ss_shadow: true,
            nmi_injected: true,
            nmi_pending: true,
            nmi_masked: true,
        };
        let raw = events_to(&events, MpState::SipiReceived(9));
        assert_eq!(events_from(&raw), events);
        let mp = mp_state_to(MpState::SipiReceived(9));
        assert_eq!(mp_state_from(mp, &raw), MpState::SipiReceived(9));
    }

    #[test]
    fn a_one_shot_timer_at_zero_fires_unless_it_has() {
        let page = |entry: u32, requested: u32| {
            let mut registers = vec![0; LAPIC_REGISTERS];
            registers[APIC_TIMER_ENTRY] = entry;
            registers[APIC_INITIAL_COUNT] = 1000;
            registers[0x22] = requested;
            LocalApicState {
                registers,
                tsc_deadline: 0,
            }
        };
        let counts = |state: &LocalApicState| {
            (
                state.registers[APIC_INITIAL_COUNT],
                state.registers[APIC_CURRENT_COUNT],
            )
        };
        let raw = |state: &LocalApicState| {
            let mut to = kvm_lapic_state::default();
            for (register, value) in to.regs.chunks_exact_mut(16).zip(&state.registers) {
                for (byte, value) in register.iter_mut().zip(value.to_le_bytes()) {
                    *byte = value as _;
                }
            }
            to
        };
        let (one_shot, periodic, masked) = (0x40, 0x2_0040, 0x1_0040);
        let read = |entry, requested| lapic_from(&raw(&page(entry, requested)), 0);
        assert_eq!(counts(&read(one_shot, 0)), (1000, 1));
        assert_eq!(counts(&read(one_shot, 1)), (1000, 0), "requested");
        assert_eq!(counts(&read(periodic, 0)), (1000, 0));
        assert_eq!(counts(&read(masked, 0)), (1000, 0));
        let written = |entry| lapic_from(&lapic_to(&page(entry, 0)), 0);
        assert_eq!(counts(&written(one_shot)), (0, 0), "disarmed");
        assert_eq!(counts(&written(periodic)), (1000, 0));
    }

    #[test]
    fn only_defences_are_left_out_of_efer() {
        let system = skerry_hypervisor::BootRegisters::long_mode(0x1000, 0, 0).system;
        let with = |bits: u64| SystemRegisters {
            efer: system.efer | bits,
            ..system
        };
        let host = CpuidTable::default();
        let plain = system_for(&with(EFER_AUTOMATIC_IBRS), &host).expect("can be done without");
        assert_eq!(plain.efer, system.efer);
        assert!(system_for(&with(1 << 14), &host).is_err());
        let leaf = |leaf, eax, edx| CpuidEntry {
            leaf,
            subleaf: None,
            result: CpuidResult {
                eax,
                edx,
                ..CpuidResult::default()
            },
        };
        let host = CpuidTable {
            entries: vec![leaf(0x8000_0021, 1 << 8, 0), leaf(0x8000_0001, 0, 1 << 25)],
        };
        let both = with(EFER_AUTOMATIC_IBRS | 1 << 14);
        assert_eq!(system_for(&both, &host).expect("known"), both);
    }
}
