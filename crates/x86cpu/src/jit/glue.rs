//! The code around traces: the way in, the way to the interpreter and back, the way out.
//!
//! ```text
//! enter(frame, code) ─▶ save the caller's registers ─▶ guest's into the host's ─▶ trace
//!                                                          ▲                       │ CALL replay
//!                                                          └─ 0 ── helper ◀── guest's registers saved
//!                                             out ◀─ else ────┘                    │ JMP leave
//!                                              ◀───────────────────────────────────┘
//! ```
//! RSP is the frame and [`BIAS`] while a trace runs; the helper runs on the caller's stack.

use std::mem::offset_of;

use super::asm::{Asm, BIAS, Mem, R11, RAX, RBX, RCX, RDI, RSI, RSP, Rm};
use super::registers::{SPILLED, pinned};
use crate::Cpu;
use crate::fpu::FpuState;
use crate::mem::area::Frame;

/// Offsets of the three pieces in the code of [`glue`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Glue {
    pub replay: usize,
    pub leave: usize,
}

/// What the caller's registers that it wants back are, in the order in which they are pushed.
const SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

fn gpr(n: usize) -> Mem {
    Mem::base(R11, (offset_of!(Cpu, gpr) + 8 * n) as i32)
}

fn vector(n: u8) -> Mem {
    let at = offset_of!(Cpu, fpu) + offset_of!(FpuState, ymm) + 32 * usize::from(n);
    Mem::base(R11, at as i32)
}

/// How much of a vector register is moved: by VMOVDQU, or by MOVUPS where there is no AVX.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Legacy,
    /// The lower half; the upper one becomes zero.
    Lower,
    Whole,
}

fn move_vector(asm: &mut Asm, part: Part, n: u8, mem: Mem, store: bool) {
    if part == Part::Legacy {
        asm.byte(0x40 | (n >> 3) << 2 | mem.rex());
        asm.put(&[0x0f, if store { 0x11 } else { 0x10 }]);
    } else {
        let rex = (n >> 3) << 2 | mem.rex();
        asm.put(&[
            0xc4,
            (!rex & 7) << 5 | 1,
            // vvvv none, L, pp of F3.
            0x7a | u8::from(part == Part::Whole) << 2,
            if store { 0x7f } else { 0x6f },
        ]);
    }
    asm.modrm(n, Rm::Mem(mem));
}

/// VZEROUPPER.
fn clean(asm: &mut Asm) {
    asm.put(&[0xc5, 0xf8, 0x77]);
}

fn vectors(asm: &mut Asm, avx: bool, store: bool) {
    asm.load_byte(RCX, Mem::frame(offset_of!(Frame, vectors_live)));
    let away = asm.jrcxz();
    // Too far for the short jump.
    let live = asm.jmp();
    asm.here(away);
    let past = asm.jmp();
    asm.bind_here(live);
    let all = |asm: &mut Asm, part| {
        for n in 0..16 {
            move_vector(asm, part, n, vector(n), store);
        }
    };
    if !avx {
        all(asm, Part::Legacy);
    } else if store {
        all(asm, Part::Whole);
        // The code that comes next is of the legacy kind.
        clean(asm);
    } else {
        asm.load_byte(RCX, Mem::frame(offset_of!(Frame, uppers)));
        let lower = asm.jrcxz();
        let whole = asm.jmp();
        asm.here(lower);
        // The host has to know that there is nothing in the upper halves: legacy instructions wait
        // for what they keep there, else.
        all(asm, Part::Lower);
        clean(asm);
        let done = asm.jmp();
        asm.bind_here(whole);
        all(asm, Part::Whole);
        asm.bind_here(done);
    }
    asm.bind_here(past);
}

/// From the host's registers to the processor's state. R11 is the processor afterwards.
fn save(asm: &mut Asm, avx: bool) {
    asm.load(R11, Mem::frame(offset_of!(Frame, cpu)));
    for (guest, host) in pinned() {
        asm.store(gpr(guest), host);
    }
    for (guest, at) in SPILLED {
        asm.load(RCX, Mem::frame(at));
        asm.store(gpr(guest), RCX);
    }
    // LAHF, SETO AL.
    asm.put(&[0x9f, 0x0f, 0x90, 0xc0]);
    asm.store32(Mem::frame(offset_of!(Frame, flags)), RAX);
    vectors(asm, avx, true);
}

/// The code, to be called with a frame and an address in a trace.
pub(super) fn glue(avx: bool) -> (Vec<u8>, Glue) {
    let mut asm = Asm::default();
    let host_rsp = Mem::frame(offset_of!(Frame, host_rsp));
    let resume = Mem::frame(offset_of!(Frame, resume));
    for register in SAVED {
        if register >= 8 {
            asm.byte(0x41);
        }
        asm.byte(0x50 | register & 7);
    }
    // Calls find the stack aligned.
    asm.lea(RSP, Mem::base(RSP, -8));
    asm.store(Mem::base(RDI, offset_of!(Frame, host_rsp) as i32), RSP);
    asm.store(Mem::base(RDI, offset_of!(Frame, resume) as i32), RSI);
    asm.lea(RSP, Mem::base(RDI, BIAS));

    let load = asm.at();
    asm.load(R11, Mem::frame(offset_of!(Frame, cpu)));
    vectors(&mut asm, avx, false);
    for (guest, at) in SPILLED {
        asm.load(RCX, gpr(guest));
        asm.store(Mem::frame(at), RCX);
    }
    asm.load32(RAX, Mem::frame(offset_of!(Frame, flags)));
    // ADD AL, 0x7f overflows if AL is 1; SAHF sets the others.
    asm.put(&[0x04, 0x7f, 0x9e]);
    for (guest, host) in pinned() {
        asm.load(host, gpr(guest));
    }
    asm.jmp_memory(resume);

    let replay = asm.at();
    // POP: its operand's address is computed after RSP has changed (SDM 2B, POP).
    asm.op32(0x8f, 0, Rm::Mem(resume));
    asm.store32(Mem::frame(offset_of!(Frame, number)), RCX);
    asm.store(Mem::frame(offset_of!(Frame, missed)), R11);
    save(&mut asm, avx);
    asm.lea(RBX, Mem::base(RSP, -BIAS));
    asm.mov(RDI, R11);
    asm.mov(RSI, RBX);
    asm.load(RSP, host_rsp);
    asm.call_memory(Mem::base(RBX, offset_of!(Frame, helper) as i32));
    asm.lea(RSP, Mem::base(RBX, BIAS));
    asm.mov32(RCX, RAX);
    let stay = asm.jrcxz();
    let out = asm.jmp();
    asm.here(stay);
    let again = asm.jmp();
    asm.bind(again, load);

    let leave = asm.at();
    asm.store32(Mem::frame(offset_of!(Frame, number)), RCX);
    asm.store(Mem::frame(offset_of!(Frame, target)), R11);
    save(&mut asm, avx);
    asm.constant32(RAX, 0);
    asm.bind_here(out);
    asm.load(RSP, host_rsp);
    asm.lea(RSP, Mem::base(RSP, 8));
    for register in SAVED.into_iter().rev() {
        if register >= 8 {
            asm.byte(0x41);
        }
        asm.byte(0x58 | register & 7);
    }
    asm.byte(0xc3);
    (asm.bytes, Glue { replay, leave })
}
