//! Instructions whose execution depends on the backend: exceptions, and code that changes.

use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

use super::guest::{DATA, Guest, SECOND_STACK, entry, next, report, report_value, reported, stop};
use crate::exit::Exit;
use crate::state::MpState;
use crate::traits::{Hypervisor, Vcpu};

/// Where a program's function lies, in a page of its own.
const FUNCTION: u64 = DATA + 0x1_0000;

/// `mov eax, value; ret`.
fn function(value: u32) -> u64 {
    let mut bytes = [0xb8, 0, 0, 0, 0, 0xc3, 0x90, 0x90];
    bytes[1..5].copy_from_slice(&value.to_le_bytes());
    u64::from_le_bytes(bytes)
}

pub(super) fn exceptions_reach_handlers<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        let mut divide = a.create_label();
        let mut after_divide = a.create_label();
        let mut fault = a.create_label();
        let mut after_fault = a.create_label();
        a.xor(ecx, ecx)?;
        a.mov(eax, 1)?;
        a.xor(edx, edx)?;
        a.div(ecx)?;
        a.set_label(&mut after_divide)?;
        a.mov(rbx, 0x12_3456_7000_u64)?;
        a.mov(dword_ptr(rbx + 8), eax)?;
        a.set_label(&mut after_fault)?;
        report_value(a, 3)?;
        stop(a)?;
        a.set_label(&mut divide)?;
        report_value(a, 0)?;
        a.lea(rax, qword_ptr(after_divide))?;
        a.mov(qword_ptr(rsp), rax)?;
        a.iretq()?;
        // Page fault: the error code (not present, write), then the address.
        a.set_label(&mut fault)?;
        a.pop(rax)?;
        report(a)?;
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(DATA), rax)?;
        a.lea(rax, qword_ptr(after_fault))?;
        a.mov(qword_ptr(rsp), rax)?;
        a.iretq()?;
        Ok(vec![(0, divide), (14, fault)])
    });
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 0);
    assert_eq!(reported(&mut vcpu), 2);
    assert_eq!(reported(&mut vcpu), 3);
    assert_eq!(guest.read(DATA), 0x12_3456_7008);
}

pub(super) fn self_modifying<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        let mut again = a.create_label();
        let mut patched = a.create_label();
        a.mov(edi, FUNCTION as u32)?;
        a.xor(esi, esi)?;
        a.set_label(&mut again)?;
        // Another page's code, and this page's just ahead.
        a.inc(esi)?;
        a.mov(dword_ptr(rdi + 1), esi)?;
        a.call(rdi)?;
        report(a)?;
        a.mov(eax, esi)?;
        a.neg(eax)?;
        a.lea(rdx, qword_ptr(patched))?;
        a.mov(dword_ptr(rdx + 1), eax)?;
        a.set_label(&mut patched)?;
        a.mov(eax, 0x1111_1111)?;
        report(a)?;
        a.jmp(again)?;
        Ok(vec![])
    });
    guest.write(FUNCTION, function(0));
    let mut vcpu = guest.start();
    for round in 1..50_u32 {
        assert_eq!(reported(&mut vcpu), round, "another page's code");
        assert_eq!(
            reported(&mut vcpu),
            round.wrapping_neg(),
            "the code just ahead"
        );
    }
}

pub(super) fn host_rewrites_code<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        let mut again = a.create_label();
        a.mov(edi, FUNCTION as u32)?;
        a.set_label(&mut again)?;
        a.call(rdi)?;
        report(a)?;
        a.jmp(again)?;
        Ok(vec![])
    });
    guest.write(FUNCTION, function(0));
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 0);
    for round in 1..50_u32 {
        if round % 2 == 0 {
            guest.write(FUNCTION, function(round));
        } else {
            guest
                .ram
                .write_obj(round, GuestAddress(FUNCTION + 1))
                .expect("a write");
        }
        assert_eq!(reported(&mut vcpu), round);
    }
}

/// One processor rewrites a function that another calls, with the hand-shake that the architecture
/// asks for (Intel SDM 3A §10.1.3).
pub(super) fn cross_modifying<H: Hypervisor>(hypervisor: &H) {
    const ROUNDS: u32 = 200;
    let guest = Guest::new(hypervisor, |a| {
        let mut writer = a.create_label();
        let mut caller = a.create_label();
        let mut wrong = a.create_label();
        let mut wait = a.create_label();
        a.mov(ebx, DATA as u32)?;
        a.mov(r8d, FUNCTION as u32)?;
        a.mov(esi, 1)?;
        a.cmp(edi, 1)?;
        a.je(writer)?;
        // [rbx] = the round that was written, [rbx + 64] = the round that was called.
        a.set_label(&mut caller)?;
        a.pause()?;
        a.cmp(dword_ptr(rbx), esi)?;
        a.jne(caller)?;
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.mov(ebx, DATA as u32)?;
        a.call(r8)?;
        a.cmp(eax, esi)?;
        a.jne(wrong)?;
        a.mov(dword_ptr(rbx + 64), esi)?;
        a.inc(esi)?;
        a.cmp(esi, ROUNDS)?;
        a.jb(caller)?;
        report_value(a, 1)?;
        stop(a)?;
        a.set_label(&mut wrong)?;
        a.neg(esi)?;
        a.mov(eax, esi)?;
        report(a)?;
        stop(a)?;
        a.set_label(&mut writer)?;
        a.mov(dword_ptr(r8 + 1), esi)?;
        a.mov(dword_ptr(rbx), esi)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(rbx + 64), esi)?;
        a.jne(wait)?;
        a.inc(esi)?;
        a.cmp(esi, ROUNDS)?;
        a.jb(writer)?;
        report_value(a, 2)?;
        stop(a)?;
        Ok(vec![])
    });
    guest.write(FUNCTION, function(0));
    let mut caller = guest.start();
    let mut writer = guest.vcpu(1);
    let mut state = writer.state().expect("its state");
    let mut registers = entry();
    registers.general.gpr[4] = SECOND_STACK;
    registers.general.gpr[7] = 1;
    registers.system.apic_base &= !0x100;
    state.general = registers.general;
    state.system = registers.system;
    state.mp_state = MpState::Runnable;
    writer.set_state(&state).expect("a good state");
    std::thread::scope(|scope| {
        scope.spawn(move || assert_eq!(reported(&mut writer), 2));
        let told = reported(&mut caller);
        assert_eq!(told, 1, "round {} saw old code", told.wrapping_neg());
    });
}

pub(super) fn triple_fault_is_shutdown<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        report_value(a, 1)?;
        a.ud2()?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start_with(|registers| registers.system.idt.limit = 0);
    assert_eq!(reported(&mut vcpu), 1);
    assert_eq!(next(&mut vcpu), Exit::Shutdown);
}

pub(super) fn sse_arithmetic<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.mov(eax, 7)?;
        a.cvtsi2sd(xmm0, eax)?;
        a.mulsd(xmm0, xmm0)?;
        a.sqrtsd(xmm1, xmm0)?;
        a.addsd(xmm0, xmm1)?;
        a.cvttsd2si(eax, xmm0)?;
        report(a)?;
        a.pcmpeqd(xmm2, xmm2)?;
        a.paddd(xmm2, xmm2)?;
        a.movdqu(xmmword_ptr(DATA), xmm2)?;
        a.fninit()?;
        a.fld1()?;
        a.fadd_2(st0, st0)?;
        a.fistp(dword_ptr(DATA + 16))?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 56);
    reported(&mut vcpu);
    assert_eq!(guest.read(DATA), 0xffff_fffe_ffff_fffe);
    assert_eq!(guest.read(DATA + 16), 2);
}
