//! The host's own floating-point units: moving the guest's state in and out.
#![expect(unsafe_code, reason = "runs the instructions that move FPU state")]

use std::arch::asm;
use std::sync::OnceLock;

use super::{MXCSR_DEFAULT, X87Image};

/// The host's MXCSR.
#[inline(always)]
pub(super) fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: writes four bytes to a local variable.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

/// Sets the host's MXCSR, for good only ever to [`MXCSR_DEFAULT`].
#[inline(always)]
pub(super) fn set_mxcsr(value: u32) {
    // SAFETY: reads four bytes of a local variable; the control bits are those that Rust expects.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags)) };
}

fn has_xsave() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| std::arch::is_x86_feature_detected!("xsave"))
}

/// Saves the x87 registers; they stay as they are.
pub(super) fn save_x87(image: &mut X87Image) {
    if has_xsave() {
        // SAFETY: the image is 64-byte aligned and holds the legacy region and the header, which is
        // all that component 0 needs.
        unsafe {
            asm!("xsave64 [{}]", in(reg) image, in("eax") 1, in("edx") 0, options(nostack, preserves_flags));
        }
    } else {
        // SAFETY: the image is aligned and larger than 512 bytes.
        unsafe { asm!("fxsave64 [{}]", in(reg) image, options(nostack, preserves_flags)) };
        image.0[512] = 1;
    }
}

/// Loads the x87 registers.
pub(super) fn load_x87(image: &X87Image) {
    if has_xsave() {
        // SAFETY: as in `save_x87`; the header has nothing but bit 0 of XSTATE_BV. Rust code
        // doesn't use the x87 registers on this architecture.
        unsafe {
            asm!("xrstor64 [{}]", in(reg) image, in("eax") 1, in("edx") 0, options(nostack, preserves_flags));
        }
    } else {
        let mut whole = image.clone();
        whole.0[24..28].copy_from_slice(&MXCSR_DEFAULT.to_le_bytes());
        // SAFETY: aligned, larger than 512 bytes, MXCSR valid; all XMM registers are declared lost.
        unsafe {
            asm!("fxrstor64 [{}]", in(reg) &raw const whole,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                options(nostack, preserves_flags));
        }
    }
}

/// FNINIT: what the C library expects to find, without pending exceptions.
pub(super) fn init_x87() {
    // SAFETY: changes x87 state only, which Rust code doesn't use.
    unsafe { asm!("fninit", options(nomem, nostack, preserves_flags)) };
}

/// The live control word.
#[inline(always)]
pub(super) fn control_word() -> u16 {
    let mut value = 0u16;
    // SAFETY: writes two bytes to a local variable.
    unsafe { asm!("fnstcw [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

/// Sets the live control word. Not while an exception is pending: this waits.
#[inline(always)]
pub(super) fn set_control_word(value: u16) {
    // SAFETY: reads two bytes of a local variable.
    unsafe { asm!("fldcw [{}]", in(reg) &raw const value, options(nostack, preserves_flags)) };
}

/// The live status word.
#[inline(always)]
pub(super) fn status_word() -> u16 {
    let value: u16;
    // SAFETY: writes AX only.
    unsafe { asm!("fnstsw ax", out("ax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// FNCLEX on the live unit.
#[inline(always)]
pub(super) fn clear_exceptions() {
    // SAFETY: changes x87 state only.
    unsafe { asm!("fnclex", options(nomem, nostack, preserves_flags)) };
}

/// FNSTENV's second effect on the live unit: every exception is masked.
pub(super) fn mask_exceptions() {
    let mut environment = [0u8; 28];
    // SAFETY: FNSTENV writes 28 bytes, into a local array.
    unsafe {
        asm!("fnstenv [{}]", in(reg) &raw mut environment, options(nostack, preserves_flags))
    };
}
