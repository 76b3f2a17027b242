//! The code around traces: the way in, the way to the interpreter and back, the way out.
//!
//! ```text
//! enter(frame, code) ─▶ save the caller's registers ─▶ guest's into the host's ─▶ trace
//!                                                          ▲                       │ CALL replay
//!                                                          └─ 0 ── helper ◀── guest's registers saved
//!                                             out ◀─ else ────┘                    │ CALL leave
//!                                              ◀───────────────────────────────────┘
//! ```
//! RSP is the frame and [`BIAS`] while a trace runs; the helper runs on the caller's stack. The helper may
//! answer with another frame to go on with. What comes out is its answer and the frame that ran last.
//! Where it was called from says which call it is, and which way out.

use std::mem::offset_of;

use super::asm::{Asm, BIAS, Mem, Near, R11, RAX, RBX, RCX, RDI, RDX, RSI, RSP, Rm};
use super::registers::{SPILLED, pinned};
use super::runtime::TRAP;
use crate::Cpu;
use crate::fpu::FpuState;
use crate::mem::area::{Area, Frame, JUMP_GROUP, JUMP_ROTATE};
use crate::mem::jumps::{self, Jump, JumpKeys};

/// Numbers of conditions.
const EQUAL: u8 = 4;
const NOT_EQUAL: u8 = 5;

/// Offsets of the three pieces in the code of [`glue`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Glue {
    pub replay: usize,
    pub leave: usize,
    pub switch: usize,
    pub bring_sse: usize,
    pub bring_avx: usize,
    /// Where a jump goes that its cache misses: back, if the second level has it, or to the replay.
    pub find: usize,
    /// In the place of a trace that is gone.
    pub gone: usize,
}

/// What moves from frame to frame when [`Frame::other`] becomes the running one. The bytes that tell
/// what can't be used as it is are in one word.
const MOVED: [usize; 17] = [
    offset_of!(Frame, uppers),
    offset_of!(Frame, cross_key),
    offset_of!(Frame, jumps),
    offset_of!(Frame, jumps_mask),
    offset_of!(Frame, jump_keys),
    offset_of!(Frame, rip_page),
    offset_of!(Frame, r10),
    offset_of!(Frame, r11),
    offset_of!(Frame, r15),
    offset_of!(Frame, fs_base),
    offset_of!(Frame, gs_base),
    offset_of!(Frame, sse_away),
    offset_of!(Frame, host_rsp),
    offset_of!(Frame, x87_note),
    offset_of!(Frame, x87_page),
    offset_of!(Frame, x87_dp),
    offset_of!(Frame, left),
];

const _: () = assert!(offset_of!(Frame, waiting) == offset_of!(Frame, sse_away) + 7);

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
    if !avx {
        move_vectors(asm, Part::Legacy, store);
    } else if store {
        move_vectors(asm, Part::Whole, store);
        // The code that comes next is of the legacy kind.
        clean(asm);
    } else {
        load_vectors(asm);
    }
    asm.bind_here(past);
}

fn move_vectors(asm: &mut Asm, part: Part, store: bool) {
    for n in 0..16 {
        move_vector(asm, part, n, vector(n), store);
    }
}

/// Loads all vector registers where there is AVX.
fn load_vectors(asm: &mut Asm) {
    asm.load_byte(RCX, Mem::frame(offset_of!(Frame, uppers)));
    let lower = asm.jrcxz();
    let whole = asm.jmp();
    asm.here(lower);
    // The host has to know that there is nothing in the upper halves: legacy instructions wait for what
    // they keep there, else.
    move_vectors(asm, Part::Lower, false);
    clean(asm);
    let done = asm.jmp();
    asm.bind_here(whole);
    move_vectors(asm, Part::Whole, false);
    asm.bind_here(done);
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
    asm.store_flags(Mem::frame(offset_of!(Frame, flags)));
    vectors(asm, avx, true);
}

/// From the processor's state to the host's registers.
fn restore(asm: &mut Asm, avx: bool) {
    asm.load(R11, Mem::frame(offset_of!(Frame, cpu)));
    vectors(asm, avx, false);
    for (guest, at) in SPILLED {
        asm.load(RCX, gpr(guest));
        asm.store(Mem::frame(at), RCX);
    }
    asm.load_flags(Mem::frame(offset_of!(Frame, flags)));
    for (guest, host) in pinned() {
        asm.load(host, gpr(guest));
    }
    asm.load(R11, Mem::frame(offset_of!(Frame, missed)));
}

/// The code, to be called with a frame and an address in a trace.
pub(super) fn glue(avx: bool) -> (Vec<u8>, Glue) {
    let mut asm = Asm::new(Vec::new());
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

    let enter = asm.at();
    restore(&mut asm, avx);
    asm.jmp_memory(resume);

    let back = asm.at();
    restore(&mut asm, avx);
    // PUSH, RET: as the processor expects after a call, most often with where that was from.
    asm.op32(0xff, 6, Rm::Mem(resume));
    asm.byte(0xc3);

    let replay = asm.at();
    // POP: its operand's address is computed after RSP has changed (SDM 2B, POP).
    asm.op32(0x8f, 0, Rm::Mem(resume));
    let popped = asm.at();
    asm.store(Mem::frame(offset_of!(Frame, missed)), R11);
    save(&mut asm, avx);
    asm.lea(RBX, Mem::base(RSP, -BIAS));
    asm.mov(RDI, R11);
    asm.mov(RSI, RBX);
    asm.load(RSP, host_rsp);
    asm.call_memory(Mem::base(RBX, offset_of!(Frame, helper) as i32));
    asm.lea(RSP, Mem::base(RBX, BIAS));
    // CMP RAX, what the last way out is: more than that is another frame.
    asm.op64(0x83, 7, Rm::Reg(RAX));
    asm.byte(TRAP as u8);
    let other = asm.jcc(7);
    // TEST RAX, RAX.
    asm.op64(0x85, RAX, Rm::Reg(RAX));
    let out = asm.jcc(5);
    let again = asm.jmp();
    asm.bind(again, back);
    asm.bind_here(other);
    asm.lea(RSP, Mem::base(RAX, BIAS));
    let again = asm.jmp();
    asm.bind(again, enter);

    let leave = asm.at();
    asm.op32(0x8f, 0, Rm::Mem(resume));
    asm.store(Mem::frame(offset_of!(Frame, target)), R11);
    save(&mut asm, avx);
    asm.constant32(RAX, 0);
    asm.bind_here(out);
    asm.lea(RDX, Mem::base(RSP, -BIAS));
    asm.load(RSP, host_rsp);
    // LEA RCX, [RIP + 2]; PUSH RCX; RET: the return that the processor expects from the call out of
    // compiled code, or it would take all others for the one before.
    asm.put(&[0x48, 0x8d, 0x0d, 2, 0, 0, 0, 0x51, 0xc3]);
    asm.lea(RSP, Mem::base(RSP, 8));
    for register in SAVED.into_iter().rev() {
        if register >= 8 {
            asm.byte(0x41);
        }
        asm.byte(0x58 | register & 7);
    }
    asm.byte(0xc3);

    let find = asm.at();
    let missed = find_jump(&mut asm);
    asm.bind(missed, replay);
    let gone = asm.at();
    let out = asm.call();
    asm.bind(out, leave);
    let switch = switch(&mut asm);
    let [bring_sse, bring_avx] = bring(&mut asm, avx, popped);
    let glue = Glue {
        replay,
        leave,
        switch,
        bring_sse,
        bring_avx,
        find,
        gone,
    };
    (asm.code().unwrap_or_default().to_vec(), glue)
}

/// To be called with another frame in RCX: goes on with it, and RFLAGS.AC as it has it.
fn switch(asm: &mut Asm) -> usize {
    let at = asm.at();
    asm.op32(
        0x8f,
        0,
        Rm::Mem(Mem::base(RCX, offset_of!(Frame, resume) as i32)),
    );
    for field in MOVED {
        asm.load(R11, Mem::frame(field));
        asm.store(Mem::base(RCX, field as i32), R11);
    }
    asm.lea(RSP, Mem::base(RCX, BIAS));
    asm.load_byte(RCX, Mem::frame(offset_of!(Frame, alignment)));
    asm.load(R11, Mem::frame(offset_of!(Frame, cpu)));
    let flags = offset_of!(Cpu, rflags) + 2;
    asm.op32(0x88, RCX, Rm::Mem(Mem::base(R11, flags as i32)));
    asm.jmp_memory(Mem::frame(offset_of!(Frame, resume)));
    at
}

/// To be called: has the guest's vector registers in the host's. If they can't be, that becomes a call of
/// the interpreter, at `replay`, which finds in the frame where it was from.
fn bring(asm: &mut Asm, avx: bool, replay: usize) -> [usize; 2] {
    let resume = Mem::frame(offset_of!(Frame, resume));
    let mut starts = [asm.at(); 2];
    asm.op32(0x8f, 0, Rm::Mem(resume));
    asm.load_byte(RCX, Mem::frame(offset_of!(Frame, sse_blocked)));
    let both = asm.jmp();
    starts[1] = asm.at();
    asm.op32(0x8f, 0, Rm::Mem(resume));
    asm.load_byte(RCX, Mem::frame(offset_of!(Frame, avx_blocked)));
    asm.bind_here(both);
    let free = asm.jrcxz();
    let blocked = asm.jmp();
    asm.bind(blocked, replay);
    asm.here(free);
    asm.store_byte(Mem::frame(offset_of!(Frame, vectors_live)), 1);
    asm.store_byte(Mem::frame(offset_of!(Frame, sse_away)), 0);
    asm.load_byte(RCX, Mem::frame(offset_of!(Frame, avx_blocked)));
    asm.op32(0x88, RCX, Rm::Mem(Mem::frame(offset_of!(Frame, avx_away))));
    asm.load(R11, Mem::frame(offset_of!(Frame, cpu)));
    if avx {
        load_vectors(asm);
    } else {
        move_vectors(asm, Part::Legacy, false);
    }
    // PUSH, RET.
    asm.op32(0xff, 6, Rm::Mem(resume));
    asm.byte(0xc3);
    starts
}

/// A field of the frame in a function that a trace has called.
fn called(offset: usize) -> Mem {
    Mem::base(RSP, offset as i32 + 8 - BIAS)
}

/// A function that traces call when the jump cache misses the guest address in R11. If the second level
/// has it, it goes into the first, and back to the trace; else there is the jump that is returned, with
/// all as it was.
fn find_jump(asm: &mut Asm) -> Near {
    let rax = called(offset_of!(Frame, rax));
    let flags = called(offset_of!(Frame, flags));
    let keys = offset_of!(Frame, jump_keys);
    asm.store(rax, RAX);
    asm.store_flags(flags);
    asm.rorx(RAX, R11, jumps::SHIFT as u8);
    asm.op64(0x33, RAX, Rm::Reg(R11));
    let salt = called(keys + offset_of!(JumpKeys, salt));
    asm.op32(0x33, RAX, Rm::Mem(salt));
    // AND.
    asm.op32(0x23, RAX, Rm::Mem(called(offset_of!(Frame, jumps_mask))));
    asm.lea(RAX, Mem::indexed(RAX, RAX, 0, 0));
    asm.load(RCX, called(offset_of!(Frame, jumps)));
    asm.lea(RAX, Mem::indexed(RCX, RAX, 3, 0));
    // CMP.
    asm.op64(0x39, R11, Rm::Mem(Mem::base(RAX, 0)));
    let other = asm.jcc(NOT_EQUAL);
    asm.load32(RCX, Mem::base(RAX, offset_of!(Jump, key) as i32));
    let own = called(keys + offset_of!(JumpKeys, own));
    asm.op32(0x3b, RCX, Rm::Mem(own));
    let hit = asm.jcc(EQUAL);
    let global = called(keys + offset_of!(JumpKeys, global));
    asm.op32(0x3b, RCX, Rm::Mem(global));
    let stale = asm.jcc(NOT_EQUAL);
    asm.bind_here(hit);
    asm.load32(RCX, Mem::base(RAX, offset_of!(Jump, code) as i32));
    asm.op64(0x03, RCX, Rm::Mem(called(offset_of!(Frame, code_base))));
    enter_found(asm);
    asm.load_flags(flags);
    asm.load(RAX, rax);
    // RET.
    asm.byte(0xc3);
    asm.bind_here(other);
    asm.bind_here(stale);
    asm.load_flags(flags);
    asm.load(RAX, rax);
    asm.jmp()
}

/// Has the first level take the code in RCX for the guest address in R11. RAX is free.
fn enter_found(asm: &mut Asm) {
    let column = |offset: usize| Mem::indexed(RSP, RAX, 3, offset as i32 + 8 - BIAS);
    asm.rorx(RAX, R11, JUMP_ROTATE as u8);
    asm.op64(0x03, RAX, Rm::Reg(R11));
    // AND.
    asm.op64(0x23, RAX, Rm::Mem(called(offset_of!(Frame, jump_mask))));
    asm.store(column(offset_of!(Area, jump_code)), RCX);
    // NEG, before and after.
    asm.op64(0xf7, 3, Rm::Reg(R11));
    asm.store(column(offset_of!(Area, jump_tag)), R11);
    asm.op64(0xf7, 3, Rm::Reg(R11));
    // SHR.
    asm.op32(0xc1, 5, Rm::Reg(RAX));
    asm.byte(JUMP_GROUP as u8);
    // MOV of a byte.
    asm.op32(
        0xc6,
        0,
        Rm::Mem(Mem::indexed(
            RSP,
            RAX,
            0,
            offset_of!(Area, jump_used) as i32 + 8 - BIAS,
        )),
    );
    asm.byte(1);
}
