//! Formats of other modes, pending exceptions, images.

use super::image::{HEADER, legacy};
use crate::XsaveImageError;
use crate::testing::{CODE, DATA, Outcome, TestCpu};
use crate::trap::{TrapKind, vector};

const MF: Outcome = Outcome::Trap(TrapKind::Fault {
    vector: vector::MF,
    error_code: None,
});

#[test]
fn exceptions_wait_for_the_next_waiting_instruction() {
    let mut t = TestCpu::new64();
    t.cpu.gpr[6] = DATA;
    t.write(DATA, &0x37bu16.to_le_bytes());
    // fninit; fldcw [rsi] (divide by zero unmasked); fld1; fldz; fdivp: nothing raised yet
    let code = [0xdb, 0xe3, 0xd9, 0x2e, 0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9];
    assert_eq!(t.run_bytes(&code), Outcome::End);
    // fnstsw ax doesn't wait.
    assert_eq!(t.run_bytes(&[0xdf, 0xe0]), Outcome::End);
    assert_eq!(t.cpu.gpr[0] & 0x84, 0x84);
    assert_eq!(t.run_bytes(&[0x9b]), MF);
    assert_eq!(t.run_bytes(&[0xd9, 0xe8]), MF);
    assert_eq!(t.run_bytes(&[0x0f, 0x77]), MF, "EMMS waits, too");
    // fnclex; fwait
    assert_eq!(t.run_bytes(&[0xdb, 0xe2, 0x9b]), Outcome::End);
    t.cpu.fpu_sync();
}

#[test]
fn environment_in_protected_mode() {
    let mut t = TestCpu::new32();
    t.cpu.gpr[6] = DATA;
    // fninit; fld1; fnstenv [esi]
    assert_eq!(
        t.run_bytes(&[0xdb, 0xe3, 0xd9, 0xe8, 0xd9, 0x36]),
        Outcome::End
    );
    let bytes = t.read(DATA, 28);
    assert_eq!(bytes[..4], [0x7f, 3, 0xff, 0xff]);
    assert_eq!(bytes[4..8], [0, 0x38, 0xff, 0xff]);
    assert_eq!(bytes[8..12], [0xff, 0x3f, 0xff, 0xff]);
    assert_eq!(bytes[12..16], (CODE as u32 + 2).to_le_bytes());
    // FOP: D9 E8.
    assert_eq!(bytes[18..20], [0xe8, 1]);
    // fnstenv [esi] with 16-bit operands
    let at = t.cpu.rip;
    assert_eq!(t.run_bytes(&[0x66, 0xd9, 0x36]), Outcome::End, "at {at:x}");
    assert_eq!(t.read(DATA, 8), [0x7f, 3, 0, 0x38, 0xff, 0x3f, 2, 0]);
    t.cpu.fpu_sync();
}

#[test]
fn save_and_restore_in_real_mode() {
    let mut t = TestCpu::new16();
    t.cpu.gpr[6] = 0x8000;
    // fninit; fldpi; fld1; fnsave [si]
    let code = [0xdb, 0xe3, 0xd9, 0xeb, 0xd9, 0xe8, 0xdd, 0x34];
    assert_eq!(t.run_bytes(&code), Outcome::End);
    let saved = t.read(CODE + 0x8000, 94);
    // The pointer is linear: CS base 0x10000 and offset 4.
    assert_eq!(saved[6..8], [4, 0]);
    assert_eq!(u16::from_le_bytes([saved[8], saved[9]]), 0x11e8);
    assert_eq!(saved[14..24], [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    // frstor [si]; fnsave [si + 0x80]
    assert_eq!(
        t.run_bytes(&[0xdd, 0x24, 0xdd, 0xb4, 0x80, 0]),
        Outcome::End
    );
    let again = t.read(CODE + 0x8080, 94);
    assert_eq!(again[..6], saved[..6]);
    assert_eq!(again[14..], saved[14..]);
    t.cpu.fpu_sync();
}

#[test]
fn images_are_checked() {
    let mut t = TestCpu::new64();
    t.cpu.fpu.ymm[3].0 = [7; 32];
    let image = t.cpu.xsave_image();
    let mut fresh = TestCpu::new64();
    fresh.cpu.set_xsave_image(&image).unwrap();
    assert_eq!(fresh.cpu.fpu.ymm[3].0, [7; 32]);
    assert_eq!(fresh.cpu.xsave_image(), image);
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bad = image.clone();
        change(&mut bad);
        TestCpu::new64().cpu.set_xsave_image(&bad).unwrap_err()
    };
    assert_eq!(refused(&|b| b.truncate(831)), XsaveImageError::Length(831));
    assert_eq!(
        refused(&|b| b[HEADER] = 0x87),
        XsaveImageError::Header { xstate_bv: 0x87 }
    );
    assert!(matches!(
        refused(&|b| b[HEADER + 9] = 1),
        XsaveImageError::Header { .. }
    ));
    assert_eq!(
        refused(&|b| b[legacy::MXCSR + 2] = 1),
        XsaveImageError::Mxcsr(0x1_1f80)
    );
}

#[test]
fn reset_state_differs_from_fninit() {
    let mut t = TestCpu::new64();
    t.cpu.fpu.reset();
    assert_eq!(t.cpu.xsave_image()[..2], [0x40, 0]);
    assert_eq!(t.run_bytes(&[0xdb, 0xe3]), Outcome::End);
    t.cpu.fpu_sync();
    assert_eq!(t.cpu.xsave_image()[..2], [0x7f, 3]);
}
