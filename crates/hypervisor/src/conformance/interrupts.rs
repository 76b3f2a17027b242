//! Interrupts from outside.

use std::time::Duration;

use iced_x86::code_asm::*;

use super::guest::{
    APIC, Guest, apic_enable, apic_write, next, report, report_value, reported, reporting_handler,
    spin, stop,
};
use crate::error::InterruptError;
use crate::exit::Exit;
use crate::traits::{Hypervisor, Irqchip, Vcpu, Vm};

/// Long enough for another thread to be halted.
const A_WHILE: Duration = Duration::from_millis(20);

pub(super) fn external_through_window<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        // LINT0 passes the 8259's interrupts.
        apic_write(a, 0x350, 0x700)?;
        report_value(a, 1)?;
        spin(a)?;
        report_value(a, 2)?;
        a.sti()?;
        spin(a)?;
        report_value(a, 3)?;
        stop(a)?;
        Ok(vec![(0x40, reporting_handler(a, 0x40, false)?)])
    });
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    assert!(!vcpu.ready_for_extint(), "interrupts are disabled");
    vcpu.request_interrupt_window(true);
    assert_eq!(reported(&mut vcpu), 2);
    assert_eq!(next(&mut vcpu), Exit::InterruptWindow);
    assert!(vcpu.ready_for_extint());
    vcpu.inject_extint(0x40).expect("an interrupt");
    assert_eq!(reported(&mut vcpu), 0x40);
    assert_eq!(reported(&mut vcpu), 3);
    // A request that is taken back gives no exit.
    vcpu.request_interrupt_window(true);
    vcpu.request_interrupt_window(false);
    let canceller = vcpu.canceller();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(A_WHILE);
            canceller.kick();
        });
        assert_eq!(vcpu.run().expect("a run"), Exit::Interrupted);
    });
}

/// Enables the local APIC and interrupts, reports 1, then reports 2 after many spins.
fn waiting_guest<H: Hypervisor>(hypervisor: &H, vector: u8) -> Guest<H> {
    Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        a.sti()?;
        report_value(a, 1)?;
        stop(a)?;
        Ok(vec![(
            vector,
            reporting_handler(a, u32::from(vector), true)?,
        )])
    })
}

pub(super) fn message_signalled<H: Hypervisor>(hypervisor: &H) {
    let guest = waiting_guest(hypervisor, 0x41);
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    for _ in 0..5 {
        guest.vm.signal_msi(APIC, 0x41).expect("a message");
        assert_eq!(reported(&mut vcpu), 0x41);
    }
    // And from another thread, while the guest spins.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(A_WHILE);
            guest.vm.signal_msi(APIC, 0x41).expect("a message");
        });
        assert_eq!(reported(&mut vcpu), 0x41);
    });
}

pub(super) fn level_triggered_end_is_reported<H: Hypervisor>(hypervisor: &H) {
    const LEVEL_ASSERT: u32 = 3 << 14;
    let guest = waiting_guest(hypervisor, 0x42);
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    guest
        .vm
        .set_ioapic_routes(&[(APIC, 0x31), (APIC, LEVEL_ASSERT | 0x42)])
        .expect("routes");
    for _ in 0..3 {
        guest
            .vm
            .signal_msi(APIC, LEVEL_ASSERT | 0x42)
            .expect("a message");
        assert_eq!(reported(&mut vcpu), 0x42);
        assert_eq!(next(&mut vcpu), Exit::IoapicEoi { vector: 0x42 });
    }
    // Edge-triggered, the end is nobody's business: the next thing seen is the next interrupt.
    guest.vm.set_ioapic_routes(&[]).expect("routes");
    for _ in 0..2 {
        guest.vm.signal_msi(APIC, 0x42).expect("a message");
        assert_eq!(reported(&mut vcpu), 0x42);
    }
}

pub(super) fn nmi<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        // Interrupts stay disabled: an NMI does not care.
        report_value(a, 1)?;
        stop(a)?;
        Ok(vec![(2, reporting_handler(a, 2, false)?)])
    });
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    for _ in 0..3 {
        guest.vm.inject_nmi(0).expect("an NMI");
        assert_eq!(reported(&mut vcpu), 2);
    }
}

pub(super) fn bad_messages_are_refused<H: Hypervisor>(hypervisor: &H) {
    let guest = waiting_guest(hypervisor, 0x41);
    for address in [0, 0xd000_0000, 0xfec0_0000, 0xfed0_0000, 0x1_0000_0000] {
        let refused = guest.vm.signal_msi(address, 0x41);
        assert!(
            matches!(refused, Err(InterruptError::BadMessage { .. })),
            "{address:#x}"
        );
    }
    let bare = Guest::bare(hypervisor, Irqchip::None);
    assert!(matches!(
        bare.vm.signal_msi(APIC, 0x41),
        Err(InterruptError::NoApic)
    ));
    assert!(matches!(bare.vm.inject_nmi(0), Err(InterruptError::NoApic)));
}

pub(super) fn held_off_while_disabled<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        report_value(a, 1)?;
        spin(a)?;
        report_value(a, 2)?;
        a.mov(eax, 3)?;
        a.mov(edx, u32::from(super::guest::REPORT))?;
        // The instruction after STI still belongs to it (Intel SDM 2B, STI).
        a.sti()?;
        a.out(dx, eax)?;
        a.nop()?;
        report_value(a, 4)?;
        stop(a)?;
        Ok(vec![
            (0x51, reporting_handler(a, 0x51, true)?),
            (0x61, reporting_handler(a, 0x61, true)?),
        ])
    });
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    guest.vm.signal_msi(APIC, 0x51).expect("a message");
    guest.vm.signal_msi(APIC, 0x61).expect("a message");
    // The higher vector goes first.
    for expected in [2, 3, 0x61, 0x51, 4] {
        assert_eq!(reported(&mut vcpu), expected);
    }
}

pub(super) fn halt_wakes_on_message<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        report_value(a, 1)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        report_value(a, 2)?;
        a.jmp(again)?;
        Ok(vec![(0x43, reporting_handler(a, 0x43, true)?)])
    });
    let mut vcpu = guest.start();
    for wait in [A_WHILE, Duration::ZERO, A_WHILE] {
        assert_eq!(reported(&mut vcpu), 1);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(wait);
                guest.vm.signal_msi(APIC, 0x43).expect("a message");
            });
            assert_eq!(reported(&mut vcpu), 0x43);
        });
        assert_eq!(reported(&mut vcpu), 2);
    }
}

pub(super) fn halt_wakes_on_external<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        apic_write(a, 0x350, 0x700)?;
        report_value(a, 1)?;
        a.sti()?;
        a.hlt()?;
        report_value(a, 2)?;
        stop(a)?;
        Ok(vec![(0x44, reporting_handler(a, 0x44, false)?)])
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
    if !vcpu.ready_for_extint() {
        vcpu.request_interrupt_window(true);
        assert_eq!(next(&mut vcpu), Exit::InterruptWindow);
    }
    vcpu.inject_extint(0x44).expect("an interrupt");
    assert_eq!(reported(&mut vcpu), 0x44);
    assert_eq!(reported(&mut vcpu), 2);
}

pub(super) fn halt_exits_without_apics<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::bare(hypervisor, Irqchip::None);
    guest.load(|a| {
        a.hlt()?;
        report_value(a, 1)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    assert_eq!(next(&mut vcpu), Exit::Halt);
    assert_eq!(
        reported(&mut vcpu),
        1,
        "a run after the exit goes on behind the HLT"
    );
}

pub(super) fn x2apic<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        // IA32_APIC_BASE: enabled, x2APIC, boot processor.
        a.mov(ecx, 0x1b)?;
        a.mov(eax, APIC as u32 | 0xd00)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(ecx, 0x80f)?;
        a.mov(eax, 0x1ff)?;
        a.wrmsr()?;
        a.mov(ecx, 0x802)?;
        a.rdmsr()?;
        report(a)?;
        // A self IPI (Intel SDM 3A §12.12.11).
        a.sti()?;
        a.mov(ecx, 0x83f)?;
        a.mov(eax, 0x45)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        spin(a)?;
        report_value(a, 2)?;
        stop(a)?;
        let mut handler = a.create_label();
        a.set_label(&mut handler)?;
        report_value(a, 0x45)?;
        a.push(rcx)?;
        a.mov(ecx, 0x80b)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.pop(rcx)?;
        a.iretq()?;
        Ok(vec![(0x45, handler)])
    });
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 0, "the APIC id");
    assert_eq!(reported(&mut vcpu), 0x45);
    assert_eq!(reported(&mut vcpu), 2);
    guest.vm.signal_msi(APIC, 0x45).expect("a message");
    assert_eq!(reported(&mut vcpu), 0x45);
}
