//! Events on their way, and waiting processors, that travel.

use std::time::Duration;

use iced_x86::code_asm::*;

use super::super::guest::{
    APIC, DATA, apic_enable, report, report_value, reported, reporting_handler, spin, stop,
};
use super::{Journey, set, state_of, stop_anywhere};
use crate::state::{ExceptionEvent, MpState};
use crate::traits::{Hypervisor, Vm};

/// A page fault that was raised and not delivered: its handler finds address and error code.
pub(super) fn exception_is_delivered<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    const ADDRESS: u64 = 0x1234_5678_9000;
    for injected in [false, true] {
        let home = journey.home();
        home.load(|a| {
            let mut handler = a.create_label();
            report_value(a, 1)?;
            stop(a)?;
            a.set_label(&mut handler)?;
            a.pop(rax)?;
            a.mov(qword_ptr(DATA), rax)?;
            a.mov(rax, cr2)?;
            a.mov(qword_ptr(DATA + 8), rax)?;
            report_value(a, 14)?;
            stop(a)?;
            Ok(vec![(14, handler)])
        });
        let mut vcpu = home.start();
        assert_eq!(reported(&mut vcpu), 1);
        let mut state = state_of(&mut vcpu);
        state.events.exception = Some(ExceptionEvent {
            vector: 14,
            error_code: Some(6),
            payload: (!injected).then_some(ADDRESS),
            injected,
        });
        if injected {
            state.system.cr2 = ADDRESS;
        }
        // Through the backend here, as if it had come up there.
        set(&mut vcpu, &state);
        let state = state_of(&mut vcpu);
        let (away, mut vcpu) = journey.travel(&home, &state);
        assert_eq!(reported(&mut vcpu), 14);
        assert_eq!(away.read(DATA), 6, "error code");
        assert_eq!(away.read(DATA + 8), ADDRESS, "address");
    }
}

/// An interrupt in the local APIC's request register, while interrupts are disabled.
pub(super) fn interrupt_is_delivered<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    let home = journey.home();
    home.load(|a| {
        apic_enable(a)?;
        report_value(a, 1)?;
        report_value(a, 2)?;
        a.sti()?;
        spin(a)?;
        report_value(a, 3)?;
        stop(a)?;
        Ok(vec![(0x47, reporting_handler(a, 0x47, true)?)])
    });
    let mut vcpu = home.start();
    assert_eq!(reported(&mut vcpu), 1);
    home.vm.signal_msi(APIC, 0x47).expect("a message");
    assert_eq!(reported(&mut vcpu), 2);
    let state = state_of(&mut vcpu);
    let (_away, mut vcpu) = journey.travel(&home, &state);
    assert_eq!(reported(&mut vcpu), 0x47);
    assert_eq!(reported(&mut vcpu), 3);
}

pub(super) fn halted_wakes<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    let home = journey.home();
    home.load(|a| {
        apic_enable(a)?;
        report_value(a, 1)?;
        a.sti()?;
        a.hlt()?;
        a.mov(eax, 2)?;
        report(a)?;
        stop(a)?;
        Ok(vec![(0x48, reporting_handler(a, 0x48, true)?)])
    });
    let mut vcpu = home.start();
    assert_eq!(reported(&mut vcpu), 1);
    stop_anywhere(&mut vcpu, |exit| panic!("{exit:?} of a halted processor"));
    let state = state_of(&mut vcpu);
    assert_eq!(state.mp_state, MpState::Halted);
    let (away, mut vcpu) = journey.travel(&home, &state);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(10));
            away.vm.signal_msi(APIC, 0x48).expect("a message");
        });
        assert_eq!(reported(&mut vcpu), 0x48);
    });
    assert_eq!(reported(&mut vcpu), 2);
}
