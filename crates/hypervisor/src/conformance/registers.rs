//! Processor state: what is set is what is read, and what the guest sees.

use iced_x86::code_asm::*;

use super::guest::{
    DATA, Guest, apic_enable, entry, next, report, report_value, reported, reporting_handler, stop,
};
use crate::error::StateError;
use crate::exit::Exit;
use crate::msr;
use crate::probe::chain;
use crate::state::{
    CpuState, DescriptorTable, Events, ExceptionEvent, InterruptEvent, LocalApicState, MpState,
    Segment,
};
use crate::traits::{Hypervisor, Vcpu};
use crate::validate::StateLimits;

/// Task priority, logical destination, spurious vector, LVT entries, initial count, divider: the
/// registers of a local APIC that hold what was written.
const APIC_STORED: [usize; 12] = [
    0x08, 0x0d, 0x0e, 0x0f, 0x30, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37, 0x3e,
];
const APIC_ISR: usize = 0x10;
const APIC_IRR: usize = 0x20;

/// What must be equal after a state was set and read: without what ticks by itself, what follows
/// from other registers, and what some CPU models don't have.
pub(super) fn comparable(state: &CpuState) -> CpuState {
    let mut state = state.clone();
    state.tsc = 0;
    state.clock_ns = 0;
    state.msrs.retain(|(index, value)| {
        msr::dispensable(*index, *value).is_none() && *index != msr::IA32_TSC_ADJUST
    });
    if let Some(LocalApicState { registers, .. }) = &mut state.lapic {
        // Version, arbitration and processor priority, current count.
        for at in [0x03, 0x09, 0x0a, 0x39] {
            registers[at] = 0;
        }
    }
    // Some processors know only one kind of shadow.
    let shadow = state.events.sti_shadow || state.events.mov_ss_shadow;
    state.events.sti_shadow = shadow;
    state.events.mov_ss_shadow = false;
    // One whose delivery has begun may be delivered from the start.
    if state.events.nmi_injected {
        state.events.nmi_injected = false;
        state.events.nmi_pending = true;
        state.events.nmi_masked = false;
    }
    for segment in state
        .system
        .segments
        .iter_mut()
        .chain([&mut state.system.ldt])
    {
        if segment.unusable {
            *segment = Segment {
                selector: segment.selector,
                ..Segment::UNUSABLE
            };
        }
    }
    initialise_absent(&mut state);
    state
}

/// A component whose XSTATE_BV bit is clear has its initial value, whatever lies in its place; one
/// that has its initial value may have its bit set or not (Intel SDM 1 §13.6).
fn initialise_absent(state: &mut CpuState) {
    let (legacy, rest) = state.xsave.split_at_mut(512);
    let present = rest[0];
    if present & 1 == 0 {
        legacy[..24].fill(0);
        legacy[0..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        legacy[32..160].fill(0);
    }
    if present & 2 == 0 {
        legacy[160..416].fill(0);
    }
    // Software-available bytes, and MXCSR_MASK, which describes the processor.
    legacy[28..32].fill(0);
    legacy[416..].fill(0);
    if present & 4 == 0 && rest.len() >= 64 + 256 {
        rest[64..64 + 256].fill(0);
    }
    rest[0] = 0;
}

#[track_caller]
pub(super) fn assert_same(found: &CpuState, wanted: &CpuState, what: &str) {
    let (found, wanted) = (comparable(found), comparable(wanted));
    assert_eq!(found.general, wanted.general, "{what}");
    assert_eq!(found.system, wanted.system, "{what}");
    assert_eq!(found.debug, wanted.debug, "{what}");
    assert_eq!(found.xcr0, wanted.xcr0, "{what}: XCR0");
    if let Some(at) =
        (0..wanted.xsave.len()).find(|at| found.xsave.get(*at) != wanted.xsave.get(*at))
    {
        panic!(
            "{what}: XSAVE area differs at byte {at}: {:?}, not {:?}",
            found.xsave.get(at),
            wanted.xsave[at]
        );
    }
    for (index, value) in &wanted.msrs {
        let other = found
            .msrs
            .iter()
            .find(|msr| msr.0 == *index)
            .map(|msr| msr.1);
        assert_eq!(other, Some(*value), "{what}: register {index:#x}");
    }
    assert_eq!(found.lapic, wanted.lapic, "{what}: local APIC");
    assert_eq!(found.mp_state, wanted.mp_state, "{what}");
    assert_eq!(found.events, wanted.events, "{what}");
}

/// Sets every field that can be set to a value of its own.
fn fill(state: &mut CpuState, limits: &StateLimits, seed: u64) {
    let pattern = |n: u64| (seed ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let address = |n: u64| pattern(n) >> 18 & !0xf;
    for (register, n) in state.general.gpr.iter_mut().zip(1..) {
        *register = pattern(n);
    }
    state.general.rip = address(20);
    // CF, PF, AF, ZF, SF, OF, DF, ID.
    state.general.rflags = 2 | pattern(21) & 0x20_0cd5;
    let data = |n: u64| Segment {
        selector: pattern(n) as u16 & !7,
        base: address(n),
        limit: u32::MAX,
        attributes: 0xc093,
        unusable: false,
    };
    let system = &mut state.system;
    system.segments[0] = Segment {
        base: 0,
        ..data(30)
    };
    system.segments[3] = Segment {
        base: 0,
        ..data(33)
    };
    system.segments[4] = data(34);
    system.segments[5] = data(35);
    system.tr = Segment {
        selector: 0x18,
        base: address(36),
        limit: 0x67,
        attributes: 0x8b,
        unusable: false,
    };
    system.ldt = Segment {
        selector: 0x28,
        base: address(37),
        limit: 0xff,
        attributes: 0x82,
        unusable: false,
    };
    system.gdt = DescriptorTable {
        base: address(38),
        limit: pattern(38) as u16,
    };
    system.idt = DescriptorTable {
        base: address(39),
        limit: pattern(39) as u16,
    };
    system.cr2 = pattern(40);
    system.cr3 = 0x1000 + (pattern(41) & 0xff) * 0x1000;
    system.cr4 |= 0x80 | (pattern(42) & 1) << 2;
    system.cr8 = pattern(43) & 15;
    system.efer |= 1;
    for (register, n) in state.debug.address.iter_mut().zip(50..) {
        *register = address(n);
    }
    state.debug.dr6 = 0xffff_0ff0 | pattern(54) & 15;
    state.debug.dr7 = 0x400 | pattern(55) & 0xff;
    fill_vectors(state, limits, seed);
    for (index, value) in &mut state.msrs {
        match *index {
            msr::STAR => *value = pattern(60),
            msr::LSTAR | msr::CSTAR | msr::KERNEL_GS_BASE => {
                *value = address(u64::from(*index));
            }
            // AMD processors keep 32 bits of the SYSENTER registers.
            msr::SFMASK
            | msr::TSC_AUX
            | msr::IA32_SYSENTER_CS
            | msr::IA32_SYSENTER_ESP
            | msr::IA32_SYSENTER_EIP => *value = pattern(u64::from(*index)) & 0xffff,
            msr::IA32_PAT => *value = 0x0007_0406_0007_0406 | ((seed & 1) * 5),
            _ => {}
        }
    }
    if let Some(LocalApicState { registers, .. }) = &mut state.lapic {
        registers[0x08] = (state.system.cr8 as u32) << 4;
        registers[0x0d] = (pattern(70) as u32) << 24;
        registers[0x0f] = 0x100 | pattern(71) as u32 & 0xff | 0x10;
        // Masked LVT entries with vectors; a timer that counts too slowly to fire.
        for at in [0x32, 0x33, 0x34, 0x35, 0x36, 0x37] {
            registers[at] = 0x1_0000 | (0x20 + pattern(at as u64) as u32 % 200);
        }
        registers[0x3e] = 0xa;
        registers[0x38] = u32::MAX - pattern(72) as u32 % 1000;
        registers[APIC_ISR + 4] = 1 << (seed % 32);
        registers[APIC_IRR + 5] = 1 << (seed % 31);
    }
}

fn fill_vectors(state: &mut CpuState, limits: &StateLimits, seed: u64) {
    state.xcr0 = limits.xcr0 & if seed & 1 == 0 { 3 } else { 7 };
    let byte = |n: usize| (n as u64 * 7 + seed) as u8;
    let area = &mut state.xsave;
    area.resize(limits.xsave_size, 0);
    area.fill(0);
    // Control words: everything masked; a stack of eight registers in use.
    area[0..2].copy_from_slice(&0x37f_u16.to_le_bytes());
    area[2..4].copy_from_slice(&((seed as u16 & 7) << 11).to_le_bytes());
    area[4] = 0xff;
    area[24..28].copy_from_slice(&(0x1f80 | seed as u32 & 0x3f).to_le_bytes());
    for register in 0..8 {
        for n in 0..10 {
            area[32 + register * 16 + n] = byte(register * 16 + n);
        }
        // A number with its integer bit, so that it is one on every processor.
        area[32 + register * 16 + 7] |= 0x80;
    }
    for (n, at) in area[160..416].iter_mut().enumerate() {
        *at = byte(n) ^ 0x55;
    }
    area[512] = 3;
    if state.xcr0 & 4 != 0 && area.len() >= 832 {
        area[512] = 7;
        for (n, at) in area[576..832].iter_mut().enumerate() {
            *at = byte(n) ^ 0xaa;
        }
    }
}

pub(super) fn round_trip_of_every_field<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        report_value(a, 1)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    reported(&mut vcpu);
    let limits = StateLimits::of(&guest.cpuid, true);
    let original = vcpu.state().unwrap_or_else(|e| panic!("{}", chain(&e)));
    limits
        .check(&original)
        .expect("a state that was read is valid");
    for at in APIC_STORED {
        assert!(
            original
                .lapic
                .as_ref()
                .is_some_and(|lapic| lapic.registers.len() > at)
        );
    }
    for seed in [0x1234_5677, 0x8765_4320] {
        let mut filled = original.clone();
        fill(&mut filled, &limits, seed);
        vcpu.set_state(&filled)
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
        let read = vcpu.state().expect("a state");
        assert_same(&read, &filled, "as it was set");
    }
    vcpu.set_state(&original)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_same(
        &vcpu.state().expect("a state"),
        &original,
        "as it was at first",
    );
}

pub(super) fn round_trip_of_events<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| stop(a).map(|()| vec![]));
    let mut vcpu = guest.start();
    let mut state = vcpu.state().expect("a state");
    let exception = |vector, error_code, payload, injected| {
        Some(ExceptionEvent {
            vector,
            error_code,
            payload,
            injected,
        })
    };
    let none = Events::default();
    for events in [
        Events {
            exception: exception(13, Some(0x18), None, true),
            ..none
        },
        Events {
            exception: exception(14, Some(2), Some(0x1234_5000), false),
            ..none
        },
        Events {
            exception: exception(6, None, None, true),
            ..none
        },
        Events {
            interrupt: Some(InterruptEvent {
                vector: 0x77,
                soft: false,
            }),
            ..none
        },
        Events {
            nmi_pending: true,
            nmi_masked: true,
            ..none
        },
        Events {
            nmi_injected: true,
            ..none
        },
        Events {
            nmi_masked: true,
            ..none
        },
        Events {
            sti_shadow: true,
            ..none
        },
        none,
    ] {
        state.events = events;
        vcpu.set_state(&state)
            .unwrap_or_else(|e| panic!("{events:?}: {}", chain(&e)));
        let read = vcpu.state().expect("a state");
        assert_eq!(comparable(&read).events, comparable(&state).events);
    }
}

pub(super) fn round_trip_of_activity<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| stop(a).map(|()| vec![]));
    let _first = guest.start();
    let mut vcpu = guest.vcpu(1);
    let mut state = vcpu.state().expect("a state");
    assert_eq!(state.mp_state, MpState::Uninitialized);
    for mp_state in [MpState::Halted, MpState::Runnable, MpState::Uninitialized] {
        state.mp_state = mp_state;
        vcpu.set_state(&state)
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
        assert_eq!(vcpu.state().expect("a state").mp_state, mp_state);
    }
}

pub(super) fn guest_sees_what_was_set<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(qword_ptr(DATA + 8), r15)?;
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(DATA + 16), rax)?;
        a.mov(rax, dr0)?;
        a.mov(qword_ptr(DATA + 24), rax)?;
        a.mov(rax, qword_ptr(0).fs())?;
        a.mov(qword_ptr(DATA + 32), rax)?;
        for (n, index) in [msr::STAR, msr::LSTAR, msr::KERNEL_GS_BASE]
            .into_iter()
            .enumerate()
        {
            a.mov(ecx, index)?;
            a.rdmsr()?;
            a.mov(dword_ptr(DATA + 40 + n as u64 * 8), eax)?;
            a.mov(dword_ptr(DATA + 44 + n as u64 * 8), edx)?;
        }
        a.pushfq()?;
        a.pop(rax)?;
        report(a)?;
        a.mov(rax, cr8)?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    guest.write(DATA + 0x800, 0xfeed_f00d_dead_beef);
    let mut vcpu = guest.start();
    let mut state = vcpu.state().expect("a state");
    state.general.gpr[0] = 0x1122_3344_5566_7788;
    state.general.gpr[15] = 0x99aa_bbcc_ddee_ff00;
    state.general.rflags = 0x8d7;
    state.system.cr2 = 0x1_2345_6789;
    state.system.cr8 = 5;
    state.system.segments[4].base = DATA + 0x800;
    state.debug.address[0] = 0x7f00_1000;
    for (index, value) in &mut state.msrs {
        match *index {
            msr::STAR => *value = 0x0023_0010_0000_0000,
            msr::LSTAR => *value = 0xffff_ffff_8100_0000,
            msr::KERNEL_GS_BASE => *value = 0xffff_8880_0000_1000,
            _ => {}
        }
    }
    if let Some(lapic) = &mut state.lapic {
        lapic.registers[0x08] = 0x50;
    }
    vcpu.set_state(&state)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(reported(&mut vcpu) & 0x8d7, 0x8d7, "RFLAGS");
    assert_eq!(reported(&mut vcpu), 5, "CR8");
    for (n, value) in [
        0x1122_3344_5566_7788,
        0x99aa_bbcc_ddee_ff00,
        0x1_2345_6789,
        0x7f00_1000,
        0xfeed_f00d_dead_beef,
        0x0023_0010_0000_0000,
        0xffff_ffff_8100_0000,
        0xffff_8880_0000_1000_u64,
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(guest.read(DATA + n as u64 * 8), value, "value {n}");
    }
}

pub(super) const YMM: [AsmRegisterYmm; 16] = [
    ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14,
    ymm15,
];

/// XMM, YMM upper halves, x87 and MXCSR reach the guest; what the guest writes is in the state.
pub(super) fn guest_sees_vectors_that_were_set<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.mov(ebx, DATA as u32)?;
        a.stmxcsr(dword_ptr(rbx + 0x400))?;
        for (register, n) in YMM.into_iter().zip(0..) {
            a.vmovdqu(ymmword_ptr(rbx + n * 32), register)?;
        }
        a.fistp(dword_ptr(rbx + 0x408))?;
        report_value(a, 1)?;
        // Clobber: each register becomes its left neighbour's old value.
        for (register, n) in YMM.into_iter().zip(0..) {
            a.vmovdqu(register, ymmword_ptr(rbx + (n + 1) % 16 * 32))?;
        }
        report_value(a, 2)?;
        stop(a)?;
        Ok(vec![])
    });
    // OSXSAVE.
    let mut vcpu = guest.start_with(|registers| registers.system.cr4 |= 1 << 18);
    let limits = StateLimits::of(&guest.cpuid, true);
    let mut state = vcpu.state().expect("a state");
    fill_vectors(&mut state, &limits, 1);
    assert_eq!(state.xcr0, 7);
    // ST(0) = 42.0 with the stack's top at 7.
    state.xsave[2..4].copy_from_slice(&(7_u16 << 11).to_le_bytes());
    state.xsave[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0xa8, 0x04, 0x40]);
    vcpu.set_state(&state)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(reported(&mut vcpu), 1);
    let half = |area: &[u8], at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&area[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let place = |n: usize, quarter: usize| match quarter {
        0 | 1 => 160 + n * 16 + quarter * 8,
        _ => 576 + n * 16 + (quarter - 2) * 8,
    };
    for n in 0..16 {
        for quarter in 0..4 {
            let seen = guest.read(DATA + (n * 32 + quarter * 8) as u64);
            assert_eq!(
                seen,
                half(&state.xsave, place(n, quarter)),
                "ymm{n}, quarter {quarter}"
            );
        }
    }
    assert_eq!(guest.read(DATA + 0x400) as u32, 0x1f81, "MXCSR");
    assert_eq!(guest.read(DATA + 0x408) as u32, 42, "ST(0)");
    assert_eq!(reported(&mut vcpu), 2);
    let clobbered = vcpu.state().expect("a state");
    for n in 0..16 {
        for quarter in 0..4 {
            let now = half(&clobbered.xsave, place(n, quarter));
            assert_eq!(
                now,
                half(&state.xsave, place((n + 1) % 16, quarter)),
                "ymm{n}"
            );
        }
    }
}

pub(super) fn state_is_between_instructions<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.out(0x80, al)?;
        a.in_(al, 0x60)?;
        a.movzx(eax, al)?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    assert!(matches!(next(&mut vcpu), Exit::PortOut { port: 0x80, .. }));
    let after_out = vcpu.state().expect("a state");
    assert_eq!(
        after_out.general.rip,
        entry().general.rip + 2,
        "OUT is done"
    );
    assert!(matches!(next(&mut vcpu), Exit::PortIn { port: 0x60, .. }));
    let inside = vcpu.state();
    assert!(
        matches!(inside, Err(StateError::InsideInstruction { .. })),
        "{:?}",
        inside.err()
    );
    vcpu.complete_read(0x5a);
    let after_in = vcpu.state().expect("a state");
    assert_eq!(after_in.general.rip, entry().general.rip + 4);
    assert_eq!(after_in.general.gpr[0] as u8, 0x5a);
    assert_eq!(reported(&mut vcpu), 0x5a);
    // A state that is set while a read waits for its answer takes the read's place.
    vcpu.set_state(&after_out).expect("a good state");
    assert!(matches!(next(&mut vcpu), Exit::PortIn { .. }));
    vcpu.set_state(&after_in).expect("a good state");
    assert_eq!(reported(&mut vcpu), 0x5a);
}

pub(super) fn boot_registers_round_trip<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        report_value(a, 1)?;
        stop(a)?;
        Ok(vec![(0x20, reporting_handler(a, 0x20, true)?)])
    });
    let vcpu = guest.start();
    let read = vcpu.boot_registers().expect("registers");
    assert_eq!(read.general, entry().general);
    let (mut system, mut wanted) = (read.system, entry().system);
    for system in [&mut system, &mut wanted] {
        system.ldt = Segment {
            selector: 0,
            ..Segment::UNUSABLE
        };
    }
    assert_eq!(system, wanted);
    let mut other = guest.vcpu(1);
    let mut bad = entry();
    bad.system.cr0 &= !1;
    let refused = other.set_boot_registers(&bad);
    assert!(
        matches!(refused, Err(StateError::Invalid { .. })),
        "{refused:?}"
    );
}
