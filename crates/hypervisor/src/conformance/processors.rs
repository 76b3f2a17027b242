//! More than one processor.

use iced_x86::code_asm::*;

use super::guest::{
    AP_START, DATA, Guest, REPORT, SECOND_STACK, apic_enable, apic_write, entry, next, report,
    report_value, reported, reporting_handler, stop,
};
use crate::error::CreateVcpuError;
use crate::exit::Exit;
use crate::probe::chain;
use crate::state::MpState;
use crate::traits::{Hypervisor, Vcpu, Vm};

/// Sends INIT and SIPI to processor 1 (Intel SDM 3A §9.4.4).
fn start_second(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    apic_write(a, 0x310, 1 << 24)?;
    apic_write(a, 0x300, 0x4500)?;
    apic_write(a, 0x310, 1 << 24)?;
    apic_write(a, 0x300, 0x4600 | (AP_START >> 12) as u32)
}

pub(super) fn init_sipi_starts_second<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        report_value(a, 1)?;
        start_second(a)?;
        report_value(a, 2)?;
        stop(a)?;
        Ok(vec![])
    });
    guest.load_start_up(|a| {
        a.mov(dx, u32::from(REPORT))?;
        a.mov(eax, 0x1234)?;
        a.out(dx, eax)?;
        a.mov(ax, cs)?;
        a.movzx(eax, ax)?;
        a.out(dx, eax)?;
        stop(a)
    });
    let mut first = guest.start();
    let mut second = guest.vcpu(1);
    assert_eq!(
        second.state().expect("its state").mp_state,
        MpState::Uninitialized
    );
    second.begin_call();
    std::thread::scope(|scope| {
        let other = scope.spawn(move || (reported(&mut second), reported(&mut second)));
        assert_eq!(reported(&mut first), 1);
        assert_eq!(reported(&mut first), 2);
        let told = other.join().expect("the second processor");
        assert_eq!(told, (0x1234, (AP_START >> 4) as u32));
    });
}

pub(super) fn interprocessor_interrupt<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        a.sti()?;
        // Processor 1 comes in with 1 here and only waits; 0 sends when 1 is ready.
        let mut wait = a.create_label();
        let mut not_ready = a.create_label();
        a.cmp(edi, 1)?;
        a.je(wait)?;
        a.set_label(&mut not_ready)?;
        a.cmp(dword_ptr(DATA + 4), 1)?;
        a.jne(not_ready)?;
        apic_write(a, 0x310, 1 << 24)?;
        apic_write(a, 0x300, 0x4000 | 0x46)?;
        a.set_label(&mut wait)?;
        a.mov(dword_ptr(DATA + 4), 1)?;
        stop(a)?;
        Ok(vec![(0x46, reporting_handler(a, 0x46, true)?)])
    });
    let first = guest.start();
    let mut second = guest.vcpu(1);
    let mut state = second.state().expect("its state");
    let mut registers = entry();
    registers.general.gpr[4] = SECOND_STACK;
    registers.general.gpr[7] = 1;
    registers.system.apic_base &= !0x100;
    state.general = registers.general;
    state.system = registers.system;
    state.mp_state = MpState::Runnable;
    second
        .set_state(&state)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    second.begin_call();
    let stop_first = first.canceller();
    std::thread::scope(|scope| {
        let call = stop_first.current().expect("a call");
        let mut first = first;
        let sender = scope.spawn(move || next(&mut first));
        assert_eq!(reported(&mut second), 0x46);
        let _ = stop_first.cancel(call);
        assert_eq!(sender.join().expect("the sender"), Exit::Cancelled);
    });
}

pub(super) fn locked_counter<H: Hypervisor>(hypervisor: &H) {
    const ROUNDS: u32 = 100_000;
    let guest = Guest::new(hypervisor, |a| {
        let mut again = a.create_label();
        a.mov(ebx, DATA as u32)?;
        a.mov(ecx, ROUNDS)?;
        a.set_label(&mut again)?;
        a.lock().inc(dword_ptr(rbx))?;
        a.mov(eax, 1)?;
        a.lock().xadd(qword_ptr(rbx + 8), rax)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut first = guest.start();
    let mut second = guest.vcpu(1);
    let mut state = second.state().expect("its state");
    let registers = entry();
    state.general = registers.general;
    state.system = registers.system;
    state.system.apic_base &= !0x100;
    state.mp_state = MpState::Runnable;
    second
        .set_state(&state)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    std::thread::scope(|scope| {
        scope.spawn(|| reported(&mut first));
        reported(&mut second);
    });
    assert_eq!(guest.read(DATA), u64::from(2 * ROUNDS));
    assert_eq!(guest.read(DATA + 8), u64::from(2 * ROUNDS));
}

pub(super) fn bad_ids_are_refused<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| stop(a).map(|()| vec![]));
    let first = guest.vcpu(0);
    assert_eq!(first.id(), 0);
    for id in [0, 4, 1 << 20, u32::MAX] {
        let refused = guest.vm.create_vcpu(id, &guest.cpuid).err();
        assert!(
            matches!(refused, Some(CreateVcpuError::BadId { .. })),
            "{id}: {refused:?}"
        );
    }
    guest.vcpu(1);
}
