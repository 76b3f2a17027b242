//! The guest's state in the formats of FXSAVE and XSAVE (Intel SDM 1 §10.5.1, §13.4).

use super::{FpuState, MXCSR_MASK, attention};
use crate::Cpu;

/// FCW after FNINIT.
pub(super) const FCW_FNINIT: u16 = 0x37f;
/// FCW after reset.
pub(super) const FCW_RESET: u16 = 0x40;

/// Bits of FCW that exist, and the one that is always set.
const FCW_MASK: u16 = 0x1f3f;
const FCW_FIXED: u16 = 0x40;

/// Bytes of x87 state in the legacy region: header and ST0–7.
pub(crate) const X87_LEN: usize = 160;
/// Offsets in the legacy region.
pub(super) mod legacy {
    pub(crate) const FCW: usize = 0;
    pub(crate) const FSW: usize = 2;
    pub(crate) const FTW: usize = 4;
    pub(crate) const FOP: usize = 6;
    pub(crate) const FIP: usize = 8;
    pub(crate) const FDP: usize = 16;
    pub(crate) const MXCSR: usize = 24;
    pub(crate) const MXCSR_MASK: usize = 28;
    pub(crate) const ST: usize = 32;
    pub(crate) const XMM: usize = 160;
}
/// Offset of the XSAVE header.
pub(super) const HEADER: usize = 512;
/// Offset of the upper halves of YMM0–15, in the standard and the compacted format alike.
pub(super) const YMM_HIGH: usize = 576;
/// Bytes of an image with x87, SSE and AVX state.
pub const XSAVE_IMAGE_LEN: usize = 832;
/// The state components that exist.
pub(super) const COMPONENTS: u64 = 7;

/// Why an XSAVE image can't be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XsaveImageError {
    /// Wrong size.
    #[error(
        "XSAVE image of {0} bytes can't be loaded: {XSAVE_IMAGE_LEN} bytes (x87, SSE, AVX in standard format) are needed"
    )]
    Length(usize),
    /// Unknown components or reserved header bytes.
    #[error(
        "XSAVE image has a header with unknown components or reserved bits (XSTATE_BV {xstate_bv:#x}): save it from a processor model with x87, SSE and AVX only"
    )]
    Header {
        /// The field.
        xstate_bv: u64,
    },
    /// Reserved MXCSR bits.
    #[error("XSAVE image sets reserved bits of MXCSR ({0:#x}): only bits 0 to 15 exist")]
    Mxcsr(u32),
}

pub(super) fn get<const N: usize>(image: &[u8], offset: usize) -> [u8; N] {
    image
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

pub(super) fn put(image: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(to) = image.get_mut(offset..offset + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

impl FpuState {
    /// x87 registers as FXSAVE64 would store them (without MXCSR).
    pub(crate) fn x87_image(&mut self) -> [u8; X87_LEN] {
        self.store_live();
        let mut image: [u8; X87_LEN] = get(&self.x87.0, 0);
        put(&mut image, legacy::FOP, &self.last_opcode.to_le_bytes());
        put(&mut image, legacy::FIP, &self.last_ip.to_le_bytes());
        put(&mut image, legacy::FDP, &self.last_dp.to_le_bytes());
        put(&mut image, legacy::MXCSR, &[0; 8]);
        image
    }

    /// Loads x87 registers from an image as FXSAVE64 stores it.
    pub(crate) fn set_x87_image(&mut self, image: &[u8; X87_LEN]) {
        self.release();
        self.x87.0.fill(0);
        put(&mut self.x87.0, 0, image);
        put(&mut self.x87.0, legacy::FOP, &[0; 18]);
        put(&mut self.x87.0, legacy::MXCSR, &[0; 8]);
        // Reserved bits of FCW read as fixed values.
        let fcw = u16::from_le_bytes(get(image, legacy::FCW)) & FCW_MASK | FCW_FIXED;
        put(&mut self.x87.0, legacy::FCW, &fcw.to_le_bytes());
        self.x87.0[HEADER] = 1;
        self.last_opcode = u16::from_le_bytes(get(image, legacy::FOP)) & 0x7ff;
        self.last_ip = u64::from_le_bytes(get(image, legacy::FIP));
        self.last_dp = u64::from_le_bytes(get(image, legacy::FDP));
        self.note_control(fcw);
    }

    /// Initial x87 state with this control word (FNINIT's is 0x37f).
    pub(super) fn set_x87_control(&mut self, control: u16) {
        let mut image = [0; X87_LEN];
        put(&mut image, legacy::FCW, &control.to_le_bytes());
        self.set_x87_image(&image);
    }

    /// Keeps track of unmasked exceptions.
    pub(super) fn note_control(&mut self, control: u16) {
        if control & 0x3f == 0x3f {
            self.attention &= !attention::X87_UNMASKED;
        } else {
            self.attention |= attention::X87_UNMASKED;
        }
    }

    /// The components that aren't in their initial configuration (XINUSE).
    pub(super) fn in_use(&mut self) -> u64 {
        let mut initial = [0; X87_LEN];
        put(&mut initial, legacy::FCW, &FCW_FNINIT.to_le_bytes());
        let x87 = self.x87_image() != initial;
        let sse = self.ymm.iter().any(|r| r.low() != 0);
        let avx = self.ymm.iter().any(|r| r.0[16..] != [0; 16]);
        u64::from(x87) | u64::from(sse) << 1 | u64::from(avx) << 2
    }
}

impl Cpu {
    /// x87, SSE and AVX state in XSAVE's standard format. Not while `run()` runs.
    pub fn xsave_image(&mut self) -> Vec<u8> {
        let mut image = vec![0; XSAVE_IMAGE_LEN];
        put(&mut image, 0, &self.fpu.x87_image());
        put(&mut image, legacy::MXCSR, &self.fpu.mxcsr().to_le_bytes());
        put(&mut image, legacy::MXCSR_MASK, &MXCSR_MASK.to_le_bytes());
        put(&mut image, HEADER, &COMPONENTS.to_le_bytes());
        for (n, register) in self.fpu.ymm.iter().enumerate() {
            put(&mut image, legacy::XMM + 16 * n, &register.0[..16]);
            put(&mut image, YMM_HIGH + 16 * n, &register.0[16..]);
        }
        image
    }

    /// Loads what [`Self::xsave_image`] made; nothing changes when it is refused.
    ///
    /// # Errors
    /// Wrong size, unknown components, reserved bits.
    pub fn set_xsave_image(&mut self, image: &[u8]) -> Result<(), XsaveImageError> {
        if image.len() != XSAVE_IMAGE_LEN {
            return Err(XsaveImageError::Length(image.len()));
        }
        let xstate_bv = u64::from_le_bytes(get(image, HEADER));
        let reserved: [u8; 56] = get(image, HEADER + 8);
        if xstate_bv & !COMPONENTS != 0 || reserved != [0; 56] {
            return Err(XsaveImageError::Header { xstate_bv });
        }
        let mxcsr = u32::from_le_bytes(get(image, legacy::MXCSR));
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(XsaveImageError::Mxcsr(mxcsr));
        }
        if xstate_bv & 1 != 0 {
            self.fpu.set_x87_image(&get(image, 0));
        } else {
            self.fpu.set_x87_control(FCW_FNINIT);
        }
        self.fpu.set_mxcsr(mxcsr);
        for (n, register) in self.fpu.ymm.iter_mut().enumerate() {
            let half = |bit: u64, offset: usize| match xstate_bv & bit {
                0 => [0; 16],
                _ => get::<16>(image, offset + 16 * n),
            };
            register.0[..16].copy_from_slice(&half(2, legacy::XMM));
            register.0[16..].copy_from_slice(&half(4, YMM_HIGH));
        }
        Ok(())
    }
}
