//! The six arithmetic flags, kept as what they are computed from.
//!
//! `result` is the last result, sign-extended from its size: ZF is "is zero", SF its top bit, PF
//! the parity of its low byte. `aux` holds what the result can't tell:
//!
//! | bits | meaning |
//! |---|---|
//! | 63 | CF |
//! | 62 | carry out of the bit below the top one; OF is bit 63 xor bit 62 |
//! | 16 | xor-ed into SF |
//! | 8–15 | xor-ed into the byte whose parity is PF |
//! | 3 | AF |
//!
//! An addition of size n stores its vector of carries, aligned so that the carry out of its top
//! bit comes to bit 63, and the carry out of bit 3 at bit 3.

/// Bits of RFLAGS.
pub mod rflags {
    #![expect(missing_docs, reason = "the names are the manual's")]
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The flags that [`super::LazyFlags`] holds.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
}

const AUX_CF: u64 = 1 << 63;
const AUX_PO: u64 = 1 << 62;
const AUX_SF: u64 = 1 << 16;
const AUX_AF: u64 = 1 << 3;

/// See the module's text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LazyFlags {
    /// Last result, sign-extended.
    pub result: u64,
    /// Carries and corrections.
    pub aux: u64,
}

impl LazyFlags {
    /// After an addition or subtraction of `bits` bits with the given result (any upper bits) and
    /// vector of carries or borrows.
    #[inline(always)]
    pub fn set_carries(&mut self, bits: u32, result: u64, carries: u64) {
        let shift = 64 - bits;
        self.result = (((result << shift) as i64) >> shift) as u64;
        self.aux = ((carries << shift) & (AUX_CF | AUX_PO)) | (carries & AUX_AF);
    }

    /// After a logic operation: CF, OF and AF clear.
    #[inline(always)]
    pub fn set_logic(&mut self, bits: u32, result: u64) {
        let shift = 64 - bits;
        self.result = (((result << shift) as i64) >> shift) as u64;
        self.aux = 0;
    }

    /// As [`Self::set_carries`], but CF stays (INC, DEC).
    #[inline(always)]
    pub fn set_carries_keep_cf(&mut self, bits: u32, result: u64, carries: u64) {
        let cf = self.aux & AUX_CF;
        self.set_carries(bits, result, carries);
        let overflow = ((self.aux >> 1) ^ self.aux) & AUX_PO;
        self.aux = (self.aux & AUX_AF) | cf | ((cf >> 1) ^ overflow);
    }

    /// After a shift: result, CF and OF; AF clear.
    #[inline(always)]
    pub fn set_shift(&mut self, bits: u32, result: u64, cf: bool, of: bool) {
        let shift = 64 - bits;
        self.result = (((result << shift) as i64) >> shift) as u64;
        self.aux = (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
    }

    /// CF.
    #[inline(always)]
    pub fn cf(&self) -> bool {
        (self.aux as i64) < 0
    }

    /// PF.
    #[inline(always)]
    pub fn pf(&self) -> bool {
        ((self.result ^ (self.aux >> 8)) as u8).count_ones() & 1 == 0
    }

    /// AF.
    #[inline(always)]
    pub fn af(&self) -> bool {
        self.aux & AUX_AF != 0
    }

    /// ZF.
    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.result == 0
    }

    /// SF.
    #[inline(always)]
    pub fn sf(&self) -> bool {
        ((self.result >> 63) ^ (self.aux >> 16)) & 1 != 0
    }

    /// OF.
    #[inline(always)]
    pub fn of(&self) -> bool {
        ((self.aux >> 63) ^ (self.aux >> 62)) & 1 != 0
    }

    /// Changes CF and OF and leaves the rest.
    #[inline(always)]
    pub fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.aux =
            (self.aux & !(AUX_CF | AUX_PO)) | (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
    }

    /// Changes CF and leaves the rest, OF too.
    #[inline(always)]
    pub fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.set_cf_of(cf, of);
    }

    /// The six flags at their places in RFLAGS.
    #[inline]
    pub fn bits(&self) -> u64 {
        use rflags::{AF, CF, OF, PF, SF, ZF};
        let pick = |on: bool, bit: u64| if on { bit } else { 0 };
        pick(self.cf(), CF)
            | pick(self.pf(), PF)
            | pick(self.af(), AF)
            | pick(self.zf(), ZF)
            | pick(self.sf(), SF)
            | pick(self.of(), OF)
    }

    /// Any combination of the six flags, at their places in RFLAGS.
    #[inline]
    pub fn set_bits(&mut self, bits: u64) {
        use rflags::{AF, CF, OF, PF, SF, ZF};
        let (cf, of, sf) = (bits & CF != 0, bits & OF != 0, bits & SF != 0);
        // A result of 0x100 is neither zero nor negative, and its low byte has even parity.
        self.result = if bits & ZF != 0 { 0 } else { 0x100 };
        self.aux = (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
        if sf {
            self.aux |= AUX_SF;
        }
        if bits & PF == 0 {
            self.aux |= 1 << 8;
        }
        if bits & AF != 0 {
            self.aux |= AUX_AF;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_survives() {
        let mut flags = LazyFlags::default();
        for pattern in 0..64u64 {
            let mut bits = 0;
            for (i, bit) in [0, 2, 4, 6, 7, 11].into_iter().enumerate() {
                bits |= ((pattern >> i) & 1) << bit;
            }
            flags.set_bits(bits);
            assert_eq!(flags.bits(), bits);
            let mut toggled = flags;
            toggled.set_cf(!flags.cf());
            assert_eq!(toggled.bits(), bits ^ rflags::CF);
        }
    }

    #[test]
    fn addition_of_bytes() {
        let mut flags = LazyFlags::default();
        for a in 0..=255u64 {
            for b in 0..=255u64 {
                let r = a + b;
                flags.set_carries(8, r, (a & b) | ((a | b) & !r));
                assert_eq!(flags.cf(), r > 255);
                assert_eq!(flags.zf(), r as u8 == 0);
                assert_eq!(flags.sf(), r as u8 >= 128);
                assert_eq!(flags.af(), (a & 15) + (b & 15) > 15);
                let signed = i32::from(a as u8 as i8) + i32::from(b as u8 as i8);
                assert_eq!(flags.of(), i8::try_from(signed).is_err());
            }
        }
    }
}
