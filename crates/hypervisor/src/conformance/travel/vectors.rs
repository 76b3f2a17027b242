//! x87, SSE and AVX registers that travel while a guest has them in use.

use iced_x86::code_asm::*;

use super::super::guest::{DATA, report_value, reported, stop};
use super::super::registers::YMM;
use super::{Journey, state_of, stop_anywhere};
use crate::traits::Hypervisor;

/// Rounding up, everything masked.
const MXCSR: u32 = 0x5f80;

/// All of YMM0–15, ST(0), the x87 control word and MXCSR are what the guest loaded before.
pub(super) fn registers_arrive<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    let home = journey.home();
    let avx = home.cpuid.get(1, 0).unwrap_or_default().ecx & (1 << 28) != 0;
    if !avx {
        return;
    }
    for at in 0..64 {
        home.write(DATA + at * 8, (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    home.write(DATA + 0x400, MXCSR.into());
    home.write(DATA + 0x408, f64::to_bits(42.5));
    home.load(|a| {
        let mut wait = a.create_label();
        // XCR0: x87, SSE, AVX.
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, 7)?;
        a.xsetbv()?;
        a.mov(ebx, DATA as u32)?;
        a.fninit()?;
        a.fld(qword_ptr(rbx + 0x408))?;
        a.ldmxcsr(dword_ptr(rbx + 0x400))?;
        for (register, n) in YMM.into_iter().zip(0..) {
            a.vmovdqu(register, ymmword_ptr(rbx + n * 32))?;
        }
        report_value(a, 1)?;
        // Until the host says so.
        a.set_label(&mut wait)?;
        a.cmp(qword_ptr(rbx + 0x500), 0)?;
        a.je(wait)?;
        for (register, n) in YMM.into_iter().zip(0..) {
            a.vmovdqu(ymmword_ptr(rbx + 0x800 + n * 32), register)?;
        }
        a.stmxcsr(dword_ptr(rbx + 0xc00))?;
        a.fstp(qword_ptr(rbx + 0xc08))?;
        report_value(a, 2)?;
        stop(a)?;
        Ok(vec![])
    });
    // OSXSAVE.
    let mut vcpu = home.start_with(|registers| registers.system.cr4 |= 1 << 18);
    assert_eq!(reported(&mut vcpu), 1);
    stop_anywhere(&mut vcpu, |exit| panic!("{exit:?} of a waiting guest"));
    let state = state_of(&mut vcpu);
    let (away, mut vcpu) = journey.travel(&home, &state);
    stop_anywhere(&mut vcpu, |exit| panic!("{exit:?} of a waiting guest"));
    away.write(DATA + 0x500, 1);
    assert_eq!(reported(&mut vcpu), 2);
    for at in 0..64 {
        let arrived = away.read(DATA + 0x800 + at * 8);
        assert_eq!(
            arrived,
            away.read(DATA + at * 8),
            "quarter {at} of the registers"
        );
    }
    assert_eq!(away.read(DATA + 0xc00) as u32, MXCSR);
    assert_eq!(f64::from_bits(away.read(DATA + 0xc08)), 42.5);
}
