//! What the fuzzer can't reach: control registers, other modes, page edges.

use crate::Cpu;
use crate::sys::state::{cr0, cr4};
use crate::testing::{DATA, Outcome, TestCpu};
use crate::trap::{TrapKind, vector};

const ADDPS: &[u8] = &[0x0f, 0x58, 0xc1];
const MOVAPS_LOAD: &[u8] = &[0x0f, 0x28, 0x06];
const MOVUPS_STORE: &[u8] = &[0x0f, 0x11, 0x06];
const VADDPS: &[u8] = &[0xc5, 0xf0, 0x58, 0xc2];
const PADDB_MMX: &[u8] = &[0x0f, 0xfc, 0xc1];
const FLD1: &[u8] = &[0xd9, 0xe8];
const FWAIT: &[u8] = &[0x9b];
const MOVNTI: &[u8] = &[0x0f, 0xc3, 0x06];
const XSAVE: &[u8] = &[0x0f, 0xae, 0x26];

fn fault(outcome: Outcome) -> Option<u8> {
    match outcome {
        Outcome::Trap(TrapKind::Fault { vector, .. }) => Some(vector),
        Outcome::End => None,
        other => panic!("{other:?}"),
    }
}

/// Runs `code` in 64-bit mode after `set` has changed the processor; RSI points to data.
fn with(set: impl Fn(&mut Cpu), code: &[u8]) -> Option<u8> {
    let mut t = TestCpu::new64();
    t.cpu.gpr[6] = DATA;
    set(&mut t.cpu);
    t.cpu.update_mode();
    fault(t.run_bytes(code))
}

#[test]
fn task_switched_flag_raises_device_not_available() {
    let set = |cpu: &mut Cpu| cpu.sys.cr0 |= cr0::TS;
    for code in [ADDPS, MOVAPS_LOAD, VADDPS, PADDB_MMX, FLD1, FWAIT, XSAVE] {
        assert_eq!(with(set, code), Some(vector::NM), "{code:x?}");
    }
    assert_eq!(with(set, MOVNTI), None);
    let no_mp = |cpu: &mut Cpu| cpu.sys.cr0 = cpu.sys.cr0 & !cr0::MP | cr0::TS;
    assert_eq!(with(no_mp, FWAIT), None);
}

#[test]
fn emulation_flag_makes_simd_undefined() {
    let set = |cpu: &mut Cpu| cpu.sys.cr0 |= cr0::EM;
    assert_eq!(with(set, ADDPS), Some(vector::UD));
    assert_eq!(with(set, PADDB_MMX), Some(vector::UD));
    assert_eq!(with(set, FLD1), Some(vector::NM));
}

#[test]
fn operating_system_support_is_needed() {
    let no_fxsr = |cpu: &mut Cpu| cpu.sys.cr4 &= !cr4::OSFXSR;
    assert_eq!(with(no_fxsr, ADDPS), Some(vector::UD));
    assert_eq!(with(no_fxsr, PADDB_MMX), None);
    let no_xsave = |cpu: &mut Cpu| cpu.sys.cr4 &= !cr4::OSXSAVE;
    assert_eq!(with(no_xsave, VADDPS), Some(vector::UD));
    assert_eq!(with(no_xsave, XSAVE), Some(vector::UD));
    assert_eq!(with(no_xsave, ADDPS), None);
    let no_avx = |cpu: &mut Cpu| cpu.sys.xcr0 = 3;
    assert_eq!(with(no_avx, VADDPS), Some(vector::UD));
    assert_eq!(with(no_avx, XSAVE), None);
}

#[test]
fn alignment_is_that_of_the_guest() {
    let mut t = TestCpu::new64();
    t.cpu.gpr[6] = DATA + 8;
    assert_eq!(fault(t.run_bytes(MOVAPS_LOAD)), Some(vector::GP));
    assert_eq!(fault(t.run_bytes(MOVUPS_STORE)), None);
}

#[test]
fn unmasked_exception_without_os_support_is_undefined() {
    // divps xmm0, xmm1 of zeros: invalid.
    const DIVPS: &[u8] = &[0x0f, 0x5e, 0xc1];
    let unmask = |cpu: &mut Cpu| cpu.fpu.set_mxcsr(0x1f00);
    assert_eq!(with(unmask, DIVPS), Some(vector::XM));
    let without = |cpu: &mut Cpu| {
        cpu.fpu.set_mxcsr(0x1f00);
        cpu.sys.cr4 &= !cr4::OSXMMEXCPT;
    };
    assert_eq!(with(without, DIVPS), Some(vector::UD));
    assert_eq!(with(|_| {}, DIVPS), None);
}

#[test]
fn exception_flags_gather_and_are_read_back() {
    let mut t = TestCpu::new64();
    t.cpu.gpr[6] = DATA;
    t.cpu.fpu_enter();
    // divps xmm0, xmm1; stmxcsr [rsi]
    assert_eq!(
        t.run_bytes(&[0x0f, 0x5e, 0xc1, 0x0f, 0xae, 0x1e]),
        Outcome::End
    );
    t.cpu.fpu_sync();
    assert_eq!(t.read(DATA, 4), [0x81, 0x1f, 0, 0]);
}

#[test]
fn operands_may_cross_pages() {
    let mut t = TestCpu::new64();
    let at = DATA + 0x1000 - 7;
    t.write(at, &[0x11; 16]);
    t.cpu.gpr[6] = at;
    // movups xmm0, [rsi]; paddb xmm0, xmm0; movups [rsi], xmm0; fld tword [rsi]; fstp tword [rsi+3]
    let code = [
        0x0f, 0x10, 0x06, 0x66, 0x0f, 0xfc, 0xc0, 0x0f, 0x11, 0x06, 0xdb, 0x2e, 0xdb, 0x7e, 0x03,
    ];
    assert_eq!(t.run_bytes(&code), Outcome::End);
    t.cpu.fpu_sync();
    assert_eq!(t.read(at, 16), [0x22; 16]);
}

#[test]
fn protected_mode_knows_eight_registers() {
    let mut t = TestCpu::new32();
    t.cpu.gpr[6] = DATA;
    t.cpu.fpu.ymm[7].set_low(0x0102);
    t.cpu.fpu.ymm[8].set_low(0x0304);
    t.write(DATA, &[0xee; 512]);
    // fxsave [esi]
    assert_eq!(t.run_bytes(&[0x0f, 0xae, 0x06]), Outcome::End);
    assert_eq!(t.read(DATA + 160 + 16 * 7, 2), [2, 1]);
    assert_eq!(t.read(DATA + 160 + 16 * 8, 2), [0xee, 0xee]);
}

#[test]
fn real_mode_has_sse_but_not_avx() {
    let mut t = TestCpu::new16();
    t.cpu.sys.cr4 |= cr4::OSFXSR | cr4::OSXSAVE;
    t.cpu.sys.xcr0 = 7;
    t.cpu.update_mode();
    assert_eq!(fault(t.run_bytes(ADDPS)), None);
    assert_eq!(fault(t.run_bytes(VADDPS)), Some(vector::UD));
}

#[test]
fn real_mode_segment_limits_hold() {
    let mut t = TestCpu::new16();
    t.cpu.sys.cr4 |= cr4::OSFXSR;
    t.cpu.update_mode();
    t.cpu.gpr[6] = 0xfff8;
    // movups xmm0, [si]
    assert_eq!(fault(t.run_bytes(&[0x0f, 0x10, 0x04])), Some(vector::GP));
}
