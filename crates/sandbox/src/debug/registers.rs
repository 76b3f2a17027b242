//! Registers as gdb has them (its `features/i386/64bit-core.xml` and `64bit-sse.xml`), to and from the
//! processor's state.

use gdbstub_arch::x86::reg::{X86_64CoreRegs, X86SegmentRegs, X87FpuInternalRegs};
use skerry_hypervisor::CpuState;

use super::memory::USER_END;

/// gdb's order of the general registers, by their encoding.
const ORDER: [usize; 16] = [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15];
/// The flags that ring 3 can change freely: CF, PF, AF, ZF, SF, DF, OF.
const FLAGS: u64 = 0xcd5;
/// The legacy region of an XSAVE area (Intel SDM 1 §13.4.1).
pub(super) const LEGACY: usize = 512;
/// Its first parts: FCW, FSW, FTW, FOP, FIP, FDP, MXCSR.
const FSW: usize = 2;
const FTW: usize = 4;
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;
const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;
/// MXCSR's bits; the others are reserved and can't be set.
const MXCSR_BITS: u32 = 0xffff;
/// Components that the header says are not in their initial state: x87, SSE.
const X87: u8 = 1;
const SSE: u8 = 2;

/// What gdb asked for that can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused;

/// The legacy region, with what the header says is in its initial state as that state is (Intel SDM 1 §13.6).
pub(super) fn legacy(state: &CpuState) -> [u8; LEGACY] {
    let mut area = [0; LEGACY];
    for (to, from) in area.iter_mut().zip(&state.xsave) {
        *to = *from;
    }
    let present = state.xsave.get(LEGACY).copied().unwrap_or(0);
    if present & X87 == 0 {
        area[..MXCSR].fill(0);
        area[ST..XMM].fill(0);
        area[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
    }
    if present & SSE == 0 {
        area[XMM..XMM + 256].fill(0);
    }
    area
}

fn word(area: &[u8; LEGACY], at: usize) -> u16 {
    u16::from_le_bytes([area[at], area[at + 1]])
}

fn double(area: &[u8; LEGACY], at: usize) -> u32 {
    u32::from(word(area, at)) | u32::from(word(area, at + 2)) << 16
}

/// The bytes of ST(`n`).
fn st(area: &[u8; LEGACY], n: usize) -> [u8; 10] {
    let mut bytes = [0; 10];
    bytes.copy_from_slice(&area[ST + 16 * n..ST + 16 * n + 10]);
    bytes
}

/// The full tag word from the abridged one (Intel SDM 1 §10.5.1.1 and 8.1.7).
fn tags(area: &[u8; LEGACY]) -> u16 {
    let top = usize::from(word(area, FSW) >> 11 & 7);
    (0..8).fold(0, |tags, physical| {
        let tag = match area[FTW] >> physical & 1 {
            0 => 3,
            _ => {
                let bytes = st(area, (physical + 8 - top) & 7);
                let exponent = u16::from_le_bytes([bytes[8], bytes[9]]) & 0x7fff;
                let integer = bytes[7] >> 7 != 0;
                match exponent {
                    0x7fff => 2,
                    0 if bytes[..8] == [0; 8] => 1,
                    0 => 2,
                    _ if integer => 0,
                    _ => 2,
                }
            }
        };
        tags | tag << (2 * physical)
    })
}

/// Reads all.
pub(super) fn read(state: &CpuState, registers: &mut X86_64CoreRegs) {
    let area = legacy(state);
    let selector = |n: usize| u32::from(state.system.segments[n].selector);
    *registers = X86_64CoreRegs {
        regs: ORDER.map(|n| state.general.gpr[n]),
        eflags: state.general.rflags as u32,
        rip: state.general.rip,
        segments: X86SegmentRegs {
            cs: selector(1),
            ss: selector(2),
            ds: selector(3),
            es: selector(0),
            fs: selector(4),
            gs: selector(5),
        },
        st: std::array::from_fn(|n| st(&area, n)),
        fpu: X87FpuInternalRegs {
            fctrl: word(&area, 0).into(),
            fstat: word(&area, FSW).into(),
            ftag: tags(&area).into(),
            fiseg: double(&area, FIP + 4),
            fioff: double(&area, FIP),
            foseg: double(&area, FDP + 4),
            fooff: double(&area, FDP),
            fop: word(&area, FOP).into(),
        },
        xmm: std::array::from_fn(|n| {
            let bytes = area[XMM + 16 * n..].first_chunk().copied();
            u128::from_le_bytes(bytes.unwrap_or_default())
        }),
        mxcsr: double(&area, MXCSR),
    };
}

/// Writes all, or nothing: segments can't be changed, and not what the processor would refuse.
pub(super) fn write(state: &mut CpuState, registers: &X86_64CoreRegs) -> Result<(), Refused> {
    let mut now = X86_64CoreRegs::default();
    read(state, &mut now);
    let canonical = registers.rip < USER_END;
    if now.segments != registers.segments || !canonical || registers.mxcsr & !MXCSR_BITS != 0 {
        return Err(Refused);
    }
    for (n, value) in ORDER.into_iter().zip(registers.regs) {
        state.general.gpr[n] = value;
    }
    state.general.rip = registers.rip;
    let flags = &mut state.general.rflags;
    *flags = *flags & !FLAGS | u64::from(registers.eflags) & FLAGS;
    let same = (&now.st, &now.fpu, &now.xmm, now.mxcsr)
        == (
            &registers.st,
            &registers.fpu,
            &registers.xmm,
            registers.mxcsr,
        );
    if same {
        return Ok(());
    }
    let area = changed(legacy(state), registers);
    let header = state.xsave.get_mut(..=LEGACY).ok_or(Refused)?;
    header[..LEGACY].copy_from_slice(&area);
    header[LEGACY] |= X87 | SSE;
    Ok(())
}

/// The legacy region with other registers.
fn changed(mut area: [u8; LEGACY], registers: &X86_64CoreRegs) -> [u8; LEGACY] {
    let fpu = &registers.fpu;
    let mut put = |at: usize, bytes: &[u8]| area[at..at + bytes.len()].copy_from_slice(bytes);
    // Bit 6 is always set, 7 and 13 to 15 never are (Intel SDM 1 §8.1.5).
    put(0, &(fpu.fctrl as u16 & 0x1f3f | 0x40).to_le_bytes());
    put(FSW, &(fpu.fstat as u16).to_le_bytes());
    let abridged = (0..8).fold(0_u8, |bits, n| {
        bits | u8::from(fpu.ftag >> (2 * n) & 3 != 3) << n
    });
    put(FTW, &[abridged]);
    put(FOP, &(fpu.fop as u16 & 0x7ff).to_le_bytes());
    put(FIP, &fpu.fioff.to_le_bytes());
    put(FIP + 4, &fpu.fiseg.to_le_bytes());
    put(FDP, &fpu.fooff.to_le_bytes());
    put(FDP + 4, &fpu.foseg.to_le_bytes());
    put(MXCSR, &registers.mxcsr.to_le_bytes());
    for (n, bytes) in registers.st.iter().enumerate() {
        put(ST + 16 * n, bytes);
    }
    for (n, value) in registers.xmm.iter().enumerate() {
        put(XMM + 16 * n, &value.to_le_bytes());
    }
    area
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> CpuState {
        CpuState {
            xsave: (0..832_u32).map(|n| (n * 7) as u8).collect(),
            ..CpuState::default()
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let mut state = state();
        state.xsave[LEGACY] = 3;
        let mut registers = X86_64CoreRegs::default();
        read(&state, &mut registers);
        registers.regs = std::array::from_fn(|n| n as u64 + 1);
        registers.rip = 0x1234;
        registers.xmm[15] = u128::MAX - 5;
        registers.st[2] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f];
        registers.mxcsr = 0x1f80;
        registers.fpu.fctrl = 0x37f;
        registers.fpu.fstat = 1 << 11;
        registers.fpu.fop = 5;
        registers.fpu.ftag = 0xffff & !(3 << 6);
        write(&mut state, &registers).unwrap();
        assert_eq!(state.general.gpr[3], 2, "RBX is gdb's second");
        assert_eq!(state.general.gpr[4], 8, "RSP is gdb's eighth");
        let mut back = X86_64CoreRegs::default();
        read(&state, &mut back);
        // ST(2) is physical register 3, and holds 1.0.
        assert_eq!(back, registers);
    }

    #[test]
    fn a_component_in_its_initial_state_is_read_so() {
        let mut state = state();
        state.xsave[LEGACY] = 0;
        let mut registers = X86_64CoreRegs::default();
        read(&state, &mut registers);
        assert_eq!(registers.fpu.fctrl, 0x37f);
        assert_eq!(registers.fpu.ftag, 0xffff);
        assert_eq!(registers.xmm, [0; 16]);
    }

    #[test]
    fn what_the_processor_would_refuse_is_refused() {
        let mut state = state();
        let before = state.clone();
        let mut registers = X86_64CoreRegs::default();
        read(&state, &mut registers);
        registers.mxcsr = 0;
        let spoils: [fn(&mut X86_64CoreRegs); 3] = [
            |r| r.rip = 1 << 60,
            |r| r.segments.cs = 8,
            |r| r.mxcsr = 1 << 16,
        ];
        for spoil in spoils {
            let mut registers = registers.clone();
            spoil(&mut registers);
            assert_eq!(write(&mut state, &registers), Err(Refused));
        }
        assert_eq!(state, before);
    }

    #[test]
    fn a_short_area_is_no_reason_to_panic() {
        let mut state = CpuState::default();
        let mut registers = X86_64CoreRegs::default();
        read(&state, &mut registers);
        registers.xmm[0] = 1;
        assert_eq!(write(&mut state, &registers), Err(Refused));
    }
}
