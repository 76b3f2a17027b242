//! States that go to another machine, and states that must not.

use std::time::Duration;

use iced_x86::code_asm::*;

use super::guest::{
    APIC, Guest, apic_enable, next, report, report_value, reported, reporting_handler, spin, stop,
};
use super::registers::{assert_same, comparable};
use crate::error::StateError;
use crate::exit::Exit;
use crate::probe::chain;
use crate::state::{CpuState, MpState};
use crate::traits::{Hypervisor, Irqchip, Vcpu, Vm};

const A_WHILE: Duration = Duration::from_millis(10);

/// Counts for ever and reports every 100th number (divided by 100).
fn counter<H: Hypervisor>(hypervisor: &H) -> Guest<H> {
    Guest::new(hypervisor, |a| {
        let mut again = a.create_label();
        let mut inner = a.create_label();
        a.xor(esi, esi)?;
        a.set_label(&mut again)?;
        a.mov(ecx, 100)?;
        a.set_label(&mut inner)?;
        a.dec(ecx)?;
        a.jnz(inner)?;
        a.inc(esi)?;
        a.mov(eax, esi)?;
        report(a)?;
        a.jmp(again)?;
        Ok(vec![])
    })
}

pub(super) fn counter_goes_on_in_fresh_vm<H: Hypervisor>(hypervisor: &H) {
    let mut guest = counter(hypervisor);
    let mut vcpu = guest.start();
    let mut last = 0;
    for generation in 0..5 {
        for _ in 0..10 + generation {
            last += 1;
            assert_eq!(reported(&mut vcpu), last, "generation {generation}");
        }
        // Stop it somewhere in the middle, between two reports.
        vcpu.canceller().kick();
        while vcpu.run().expect("a run") != Exit::Interrupted {
            last += 1;
        }
        let state = vcpu.state().unwrap_or_else(|e| panic!("{}", chain(&e)));
        let twin = guest.twin(hypervisor);
        let mut fresh = twin.vcpu(0);
        fresh
            .set_state(&state)
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
        assert_same(
            &fresh.state().expect("a state"),
            &state,
            "in the fresh machine",
        );
        fresh.begin_call();
        drop(vcpu);
        (guest, vcpu) = (twin, fresh);
    }
    assert_eq!(reported(&mut vcpu), last + 1);
    drop(guest);
}

pub(super) fn pending_interrupt_goes_on_in_fresh_vm<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        report_value(a, 1)?;
        a.sti()?;
        spin(a)?;
        report_value(a, 2)?;
        stop(a)?;
        Ok(vec![(0x47, reporting_handler(a, 0x47, true)?)])
    });
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    guest.vm.signal_msi(APIC, 0x47).expect("a message");
    let state = vcpu.state().expect("a state");
    let twin = guest.twin(hypervisor);
    let mut fresh = twin.vcpu(0);
    fresh
        .set_state(&state)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(reported(&mut fresh), 0x47);
    assert_eq!(reported(&mut fresh), 2);
}

pub(super) fn halted_goes_on_in_fresh_vm<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        report_value(a, 1)?;
        a.sti()?;
        a.hlt()?;
        report_value(a, 2)?;
        stop(a)?;
        Ok(vec![(0x48, reporting_handler(a, 0x48, true)?)])
    });
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    let canceller = vcpu.canceller();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(A_WHILE);
            canceller.kick();
        });
        assert_eq!(vcpu.run().expect("a run"), Exit::Interrupted);
    });
    let state = vcpu.state().expect("a state");
    assert_eq!(state.mp_state, MpState::Halted);
    let twin = guest.twin(hypervisor);
    let mut fresh = twin.vcpu(0);
    fresh
        .set_state(&state)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(A_WHILE);
            twin.vm.signal_msi(APIC, 0x48).expect("a message");
        });
        assert_eq!(reported(&mut fresh), 0x48);
    });
    assert_eq!(reported(&mut fresh), 2);
}

type Damage = (&'static str, fn(&mut CpuState));

/// Corrupted, truncated and oversized.
const DAMAGES: &[Damage] = &[
    ("another version", |s| s.version += 1),
    ("reserved RFLAGS", |s| s.general.rflags = u64::MAX),
    ("RIP that is not canonical", |s| {
        s.general.rip = 0x8000_0000_0000
    }),
    ("paging without protection", |s| s.system.cr0 = 0x8000_0000),
    ("reserved CR4", |s| s.system.cr4 = u64::MAX),
    ("LMA without paging", |s| s.system.cr0 &= !0x8000_0000),
    ("CR3 past physical memory", |s| s.system.cr3 = 1 << 60),
    ("CR8 of 16", |s| s.system.cr8 = 16),
    ("reserved EFER", |s| s.system.efer = u64::MAX),
    ("APIC base with reserved bits", |s| {
        s.system.apic_base = u64::MAX
    }),
    ("segment base that is not canonical", |s| {
        s.system.segments[5].base = 1 << 63
    }),
    ("DR7 with high bits", |s| s.debug.dr7 = u64::MAX),
    ("XCR0 of 0", |s| s.xcr0 = 0),
    ("XCR0 of everything", |s| s.xcr0 = u64::MAX),
    ("empty XSAVE area", |s| s.xsave.clear()),
    ("truncated XSAVE area", |s| s.xsave.truncate(100)),
    ("oversized XSAVE area", |s| s.xsave.resize(10 << 20, 0xff)),
    ("XSAVE header with unknown components", |s| {
        s.xsave[519] = 0xff
    }),
    ("compacted XSAVE header", |s| s.xsave[527] = 0x80),
    ("reserved MXCSR", |s| s.xsave[27] = 0xff),
    ("truncated local APIC", |s| {
        s.lapic.as_mut().expect("an APIC").registers.truncate(3)
    }),
    ("oversized local APIC", |s| {
        s.lapic
            .as_mut()
            .expect("an APIC")
            .registers
            .resize(1 << 20, 0);
    }),
    ("no local APIC", |s| s.lapic = None),
    ("MSRs out of order", |s| s.msrs.reverse()),
    ("millions of MSRs", |s| {
        s.msrs = (0..2_000_000).map(|n| (n, 0)).collect()
    }),
    ("exception 200", |s| {
        s.events.exception = Some(crate::state::ExceptionEvent {
            vector: 200,
            error_code: None,
            payload: None,
            injected: true,
        });
    }),
];

pub(super) fn damaged_states_are_refused<H: Hypervisor>(hypervisor: &H) {
    let guest = counter(hypervisor);
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    let good = vcpu.state().expect("a state");
    for (name, damage) in DAMAGES {
        let mut bad = good.clone();
        damage(&mut bad);
        match vcpu.set_state(&bad) {
            Err(StateError::Invalid { .. } | StateError::Version { .. }) => {}
            other => panic!("{name}: {other:?}"),
        }
        let now = vcpu.state().expect("a state");
        assert_eq!(
            comparable(&now),
            comparable(&good),
            "{name}: something was set"
        );
    }
    assert_eq!(
        reported(&mut vcpu),
        2,
        "the processor goes on as if nothing had happened"
    );
}

/// A guest without interrupt controllers that leaves something of itself in registers of each kind.
fn traces<H: Hypervisor>(hypervisor: &H) -> Guest<H> {
    let guest = Guest::bare(hypervisor, Irqchip::None);
    guest.load(|a| {
        report_value(a, 1)?;
        a.mov(rbx, 0x5ec2_e700_5ec2_u64)?;
        a.mov(dr0, rbx)?;
        // Of whatever was set: single step, and breakpoint 3.
        a.mov(ecx, 0xffff_4ff8_u32)?;
        a.mov(dr6, rcx)?;
        a.mov(ecx, 0x10)?;
        a.mov(ds, ecx)?;
        a.std()?;
        report_value(a, 2)?;
        stop(a)?;
        Ok(vec![])
    });
    guest
}

pub(super) fn user_state_replaces_what_a_guest_left<H: Hypervisor>(hypervisor: &H) {
    let guest = traces(hypervisor);
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    let clean = vcpu.state().expect("a state");
    for round in 0..3 {
        // With the exit of the second report pending, which must not be finished into the new state.
        assert_eq!(reported(&mut vcpu), 2);
        if round == 1 {
            let mut left = vcpu.state().expect("a state");
            assert_ne!(left.debug.address[0], clean.debug.address[0]);
            assert_ne!(left.debug.dr6, clean.debug.dr6);
            // XMM7: not every processor here can execute what sets it.
            left.xsave[160 + 7 * 16] = 0x5e;
            left.xsave[512] |= 2;
            vcpu.set_state(&left)
                .unwrap_or_else(|e| panic!("{}", chain(&e)));
        }
        vcpu.set_user_state(&clean)
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
        assert_same(&vcpu.state().expect("a state"), &clean, "over its own");
    }
    // A new processor has all else as that one had it.
    let other = traces(hypervisor);
    let mut fresh = other.vcpu(0);
    fresh
        .set_user_state(&clean)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_same(&fresh.state().expect("a state"), &clean, "in a fresh one");
    fresh.begin_call();
    assert_eq!(reported(&mut fresh), 2);
    // Debug registers and XCR0 of the state, not those that the processor happens to have.
    let mut watching = clean.clone();
    watching.debug.address[1] = 0x1234;
    watching.debug.dr7 |= 1 << 2;
    watching.xcr0 = 3;
    for state in [&watching, &clean, &watching] {
        fresh
            .set_user_state(state)
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
        assert_same(&fresh.state().expect("a state"), state, "one after another");
    }
    let mut bad = clean.clone();
    bad.general.rflags = 0;
    let refused = fresh.set_user_state(&bad);
    assert!(matches!(refused, Err(StateError::Invalid { .. })));
    assert_same(&fresh.state().expect("a state"), &watching, "refused");
}

/// Random changes of a good state are taken or refused; the process and the machine survive, and
/// the good state still goes in.
pub(super) fn random_states_do_no_harm<H: Hypervisor>(hypervisor: &H) {
    let guest = counter(hypervisor);
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    let good = vcpu.state().expect("a state");
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut refused = 0;
    for _ in 0..300 {
        let mut state = good.clone();
        for _ in 0..=random() % 3 {
            let value = 1 << (random() % 64);
            let at = random() as usize;
            let system = &mut state.system;
            match random() % 14 {
                0 => system.cr0 ^= value,
                1 => system.cr4 ^= value,
                2 => system.efer ^= value,
                3 => system.cr3 ^= value,
                4 => system.segments[at % 6].attributes ^= value as u16,
                5 => system.segments[at % 6].base ^= value,
                6 => state.general.rflags ^= value,
                7 => state.general.rip ^= value,
                8 => state.xcr0 ^= value,
                9 => {
                    let at = at % state.xsave.len();
                    state.xsave[at] ^= value as u8 | 1;
                }
                10 => {
                    let at = at % state.msrs.len().max(1);
                    if let Some(msr) = state.msrs.get_mut(at) {
                        msr.1 ^= value;
                    }
                }
                11 => {
                    if let Some(lapic) = &mut state.lapic {
                        lapic.registers[at % 64] ^= value as u32;
                    }
                }
                12 => system.apic_base ^= value,
                _ => state.debug.dr7 ^= value,
            }
        }
        refused += u32::from(vcpu.set_state(&state).is_err());
        // Whatever went in must not hang the host: a cancelled run ends at once.
        let canceller = vcpu.canceller();
        vcpu.begin_call();
        let call = canceller.current().expect("a call");
        let _ = canceller.cancel(call);
        let _ = vcpu.run();
        vcpu.end_call();
    }
    assert!(refused > 0, "no random change was refused");
    vcpu.set_state(&good)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    vcpu.begin_call();
    assert_eq!(reported(&mut vcpu), 2);
    assert!(matches!(next(&mut vcpu), Exit::PortOut { data: 3, .. }));
}
