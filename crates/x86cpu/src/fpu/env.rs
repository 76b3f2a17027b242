//! FNSTENV, FLDENV, FNSAVE, FRSTOR: the formats of the 8087, 286 and 387 (Intel SDM 1 §8.1.10).

use iced_x86::{Code, Instruction};

use super::attention;
use super::control::{check_no_wait, with_summary};
use super::image::{X87_LEN, get, legacy, put};
use super::x87::{check, prepare_x87};
use crate::Cpu;
use crate::code::{Lowering, Op};
use crate::cpu::seg;
use crate::simd::operand::operand;
use crate::trap::Trap;

/// Bits of `Op::extra`: 32-bit format, with data registers, protected mode, preceded by FWAIT.
const FORMAT32: u8 = 1;
const DATA: u8 = 2;
const PROTECTED: u8 = 4;
const WAITS: u8 = 8;

/// Bytes of ST0–7 in these formats.
const DATA_LEN: usize = 80;

/// Control, status and tag word, and the pointers, as one image holds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Environment {
    fcw: u16,
    fsw: u16,
    /// Two bits per physical register.
    ftw: u16,
    fop: u16,
    fip: u32,
    fdp: u32,
}

/// What the tag word says of a register that isn't empty.
fn tag(register: [u8; 10]) -> u16 {
    let significand = u64::from_le_bytes(get(&register, 0));
    let exponent = u16::from_le_bytes(get(&register, 8)) & 0x7fff;
    match (exponent, significand) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, s) if s >> 63 == 0 => 2,
        _ => 0,
    }
}

impl Environment {
    fn of(image: &[u8; X87_LEN]) -> Self {
        let half = |offset| u16::from_le_bytes(get(image, offset));
        let (fsw, in_use) = (half(legacy::FSW), image[legacy::FTW]);
        let top = usize::from(fsw >> 11 & 7);
        let mut ftw = 0;
        for physical in 0..8 {
            let st = (physical + 8 - top) & 7;
            let bits = match in_use >> physical & 1 {
                0 => 3,
                _ => tag(get(image, legacy::ST + 16 * st)),
            };
            ftw |= bits << (2 * physical);
        }
        Self {
            fcw: half(legacy::FCW),
            fsw,
            ftw,
            fop: half(legacy::FOP),
            fip: u32::from_le_bytes(get(image, legacy::FIP)),
            fdp: u32::from_le_bytes(get(image, legacy::FDP)),
        }
    }

    fn put_into(&self, image: &mut [u8; X87_LEN]) {
        let mut in_use = 0u8;
        for physical in 0..8 {
            if self.ftw >> (2 * physical) & 3 != 3 {
                in_use |= 1 << physical;
            }
        }
        put(image, legacy::FCW, &self.fcw.to_le_bytes());
        let fsw = with_summary(self.fsw, self.fcw);
        put(image, legacy::FSW, &fsw.to_le_bytes());
        image[legacy::FTW] = in_use;
        put(image, legacy::FOP, &self.fop.to_le_bytes());
        put(image, legacy::FIP, &u64::from(self.fip).to_le_bytes());
        put(image, legacy::FDP, &u64::from(self.fdp).to_le_bytes());
    }

    /// Selectors are stored as 0, as by processors that have deprecated them.
    fn encode(&self, format: u8) -> ([u8; 28], usize) {
        let mut out = [0; 28];
        let protected = format & PROTECTED != 0;
        if format & FORMAT32 != 0 {
            // The unused halves read as ones.
            for (offset, value) in [(0, self.fcw), (4, self.fsw), (8, self.ftw)] {
                put(
                    &mut out,
                    offset,
                    &(0xffff_0000 | u32::from(value)).to_le_bytes(),
                );
            }
            let fop = u32::from(self.fop);
            let words = if protected {
                [self.fip, fop << 16, self.fdp, 0xffff_0000]
            } else {
                [
                    0xffff_0000 | self.fip & 0xffff,
                    (self.fip >> 16) << 12 | fop,
                    0xffff_0000 | self.fdp & 0xffff,
                    (self.fdp >> 16) << 12,
                ]
            };
            for (n, word) in words.into_iter().enumerate() {
                put(&mut out, 12 + 4 * n, &word.to_le_bytes());
            }
            return (out, 28);
        }
        let (ip_high, dp_high) = if protected {
            (0, 0)
        } else {
            let high = |address: u32| (address >> 4 & 0xf000) as u16;
            (high(self.fip) | self.fop, high(self.fdp))
        };
        let words = [
            self.fcw,
            self.fsw,
            self.ftw,
            self.fip as u16,
            ip_high,
            self.fdp as u16,
            dp_high,
        ];
        for (n, word) in words.into_iter().enumerate() {
            put(&mut out, 2 * n, &word.to_le_bytes());
        }
        (out, 14)
    }

    fn decode(bytes: &[u8], format: u8) -> Self {
        let protected = format & PROTECTED != 0;
        let half = |offset| u16::from_le_bytes(get(bytes, offset));
        let word = |offset| u32::from_le_bytes(get(bytes, offset));
        if format & FORMAT32 != 0 {
            let (fip, fop, fdp) = if protected {
                (word(12), (word(16) >> 16) as u16, word(20))
            } else {
                let join = |low: u32, high: u32| low & 0xffff | (high >> 12) << 16;
                (
                    join(word(12), word(16)),
                    word(16) as u16,
                    join(word(20), word(24)),
                )
            };
            return Self {
                fcw: half(0),
                fsw: half(4),
                ftw: half(8),
                fop: fop & 0x7ff,
                fip,
                fdp,
            };
        }
        let high = |value: u16| (u32::from(value) & 0xf000) << 4;
        let (ip_high, dp_high, fop) = if protected {
            (0, 0, 0)
        } else {
            (high(half(8)), high(half(12)), half(8) & 0x7ff)
        };
        Self {
            fcw: half(0),
            fsw: half(2),
            ftw: half(4),
            fop,
            fip: u32::from(half(6)) | ip_high,
            fdp: u32::from(half(10)) | dp_high,
        }
    }
}

fn environment_len(format: u8) -> usize {
    if format & FORMAT32 != 0 { 28 } else { 14 }
}

/// FNSTENV, FNSAVE.
fn store(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_no_wait(cpu)?;
    let format = op.extra;
    if format & WAITS != 0 && cpu.fpu.attention & attention::X87_UNMASKED != 0 {
        prepare_x87(cpu)?;
    }
    let image = cpu.fpu.x87_image();
    let mut environment = Environment::of(&image);
    if format & PROTECTED == 0 {
        let base = cpu.seg_base[usize::from(seg::CS)] as u32;
        environment.fip = environment.fip.wrapping_add(base);
    }
    let mut bytes = [0; 28 + DATA_LEN];
    let (encoded, mut len) = environment.encode(format);
    put(&mut bytes, 0, &encoded);
    if format & DATA != 0 {
        for st in 0..8 {
            let register: [u8; 10] = get(&image, legacy::ST + 16 * st);
            put(&mut bytes, len + 10 * st, &register);
        }
        len += DATA_LEN;
    }
    let at = operand(cpu, op, len, 1, true)?;
    at.write(cpu, op, bytes.get(..len).unwrap_or(&[]))?;
    if format & DATA != 0 {
        cpu.fpu.fninit();
    } else {
        super::host::mask_exceptions();
        cpu.fpu.note_control(environment.fcw | 0x3f);
    }
    Ok(())
}

/// FLDENV, FRSTOR.
fn load(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check(cpu)?;
    let format = op.extra;
    let env_len = environment_len(format);
    let len = env_len + if format & DATA != 0 { DATA_LEN } else { 0 };
    let mut bytes = [0; 28 + DATA_LEN];
    let Some(bytes) = bytes.get_mut(..len) else {
        return Err(cpu.ud());
    };
    operand(cpu, op, len, 1, false)?.read(cpu, op, bytes)?;
    let mut image = cpu.fpu.x87_image();
    // The image holds the registers by their distance from TOP, which may change.
    let old_top = u16::from_le_bytes(get(&image, legacy::FSW)) >> 11 & 7;
    Environment::decode(bytes, format).put_into(&mut image);
    let new_top = u16::from_le_bytes(get(&image, legacy::FSW)) >> 11 & 7;
    let old = image;
    for st in 0..8usize {
        let at = legacy::ST + 16 * st;
        if format & DATA != 0 {
            put(&mut image, at, &get::<10>(bytes, env_len + 10 * st));
        } else {
            let from = (st + usize::from(new_top + 8 - old_top)) & 7;
            put(&mut image, at, &get::<16>(&old, legacy::ST + 16 * from));
        }
    }
    cpu.fpu.set_x87_image(&image);
    Ok(())
}

/// Lowers these instructions.
pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let (run, mut format): (crate::code::Handler, u8) = match i.code() {
        Code::Fnstenv_m14byte => (store, 0),
        Code::Fnstenv_m28byte => (store, FORMAT32),
        Code::Fstenv_m14byte => (store, WAITS),
        Code::Fstenv_m28byte => (store, FORMAT32 | WAITS),
        Code::Fnsave_m94byte => (store, DATA),
        Code::Fnsave_m108byte => (store, FORMAT32 | DATA),
        Code::Fsave_m94byte => (store, DATA | WAITS),
        Code::Fsave_m108byte => (store, FORMAT32 | DATA | WAITS),
        Code::Fldenv_m14byte => (load, 0),
        Code::Fldenv_m28byte => (load, FORMAT32),
        Code::Frstor_m94byte => (load, DATA),
        Code::Frstor_m108byte => (load, FORMAT32 | DATA),
        _ => return false,
    };
    if l.mode.protected() && !l.mode.v86() {
        format |= PROTECTED;
    }
    let mut op = l.op();
    l.mem(&mut op, i);
    op.run = run;
    op.extra = format;
    l.push(op);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_round_trip() {
        let environment = Environment {
            fcw: 0x37f,
            fsw: 0x3800,
            ftw: 0x1234,
            fop: 0x5ab,
            fip: 0xabcde,
            fdp: 0x1_2345,
        };
        for format in [0, FORMAT32, FORMAT32 | PROTECTED] {
            let (bytes, len) = environment.encode(format);
            assert_eq!(len, environment_len(format));
            assert_eq!(Environment::decode(&bytes, format), environment);
        }
    }

    #[test]
    fn tags() {
        let mut one = [0; 10];
        one[7] = 0x80;
        one[8..].copy_from_slice(&0x3fffu16.to_le_bytes());
        assert_eq!(tag(one), 0);
        assert_eq!(tag([0; 10]), 1);
        assert_eq!(tag([0xff; 10]), 2);
        one[7] = 0;
        assert_eq!(tag(one), 2);
    }
}
