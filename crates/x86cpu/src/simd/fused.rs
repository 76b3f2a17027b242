//! Runs of register-only SIMD instructions as one op.
//!
//! A thunk per instruction loads its operands from the register file and stores its result there,
//! which takes longer than the instruction. Where several follow each other without touching
//! memory, the host runs them as they stand, on the registers that the guest names:
//!
//! ```text
//! guest   paddd xmm0, xmm1          host   movaps xmm0, [rdi]
//!         pxor  xmm1, xmm0    ──▶          movaps xmm1, [rdi+32]
//!         movd  xmm2, eax                  paddd  xmm0, xmm1
//!                                          pxor   xmm1, xmm0
//!                                          mov    rax, [rsi]
//!                                          movd   xmm2, eax
//!                                          movaps [rdi], xmm0 …
//! ```
//!
//! When the units are disabled or MXCSR isn't the default, the parts run one by one, so that
//! exceptions come where they belong.
//!
//! Unlike the thunks of single instructions there is no end to the combinations that a guest can
//! come up with. So the code is its processor's own, has a bound, and goes when all blocks go.
#![expect(unsafe_code, reason = "calls generated code")]

use std::collections::HashMap;

use iced_x86::{
    Code, CodeSize, Encoder, EncodingKind, IcedError, Instruction, InstructionInfoFactory,
    MemoryOperand, Mnemonic, OpAccess, OpKind, Register,
};

use super::code_buffer::CodeBuffer;
use super::thunk::{self, ARITHMETIC_FLAGS};
use crate::Cpu;
use crate::code::{Handler, Op, Window, apart};
use crate::fpu::{attention, blocked};
use crate::trap::Trap;

/// Bytes of code for one processor.
const CAPACITY: usize = 2 << 20;

/// What has been generated.
#[derive(Clone, Copy)]
struct Piece {
    code: u64,
    arithmetic: bool,
    vex: bool,
}

/// The code of one processor, made when it first needs some.
#[derive(Default)]
pub(crate) struct FusedCode {
    buffer: Option<CodeBuffer>,
    refused: bool,
    full: bool,
    /// By encoding, 64-bit code or not in front.
    made: HashMap<Box<[u8]>, Option<Piece>>,
}

impl FusedCode {
    /// Forgets all code: no block refers to it any more.
    pub(crate) fn clear(&mut self) {
        self.made.clear();
        self.full = false;
        if let Some(buffer) = &mut self.buffer {
            buffer.reset();
        }
    }

    /// Whether there was no room for some code: time to forget all.
    pub(crate) fn is_full(&self) -> bool {
        self.full
    }

    /// The memory for code, unless the host refuses any.
    fn buffer(&mut self) -> Option<&mut CodeBuffer> {
        if self.buffer.is_none() && !self.refused {
            self.buffer = CodeBuffer::new(CAPACITY).ok();
            self.refused = self.buffer.is_none();
        }
        self.buffer.as_mut()
    }

    fn piece(&mut self, run: &[Instruction], bytes: &[u8], is64: bool) -> Option<Piece> {
        let mut key = Vec::with_capacity(bytes.len() + 1);
        key.push(u8::from(is64));
        key.extend_from_slice(bytes);
        if let Some(&known) = self.made.get(key.as_slice()) {
            return known;
        }
        let vex = run.first()?.code().encoding() == EncodingKind::VEX;
        let code = assemble(run, vex).ok();
        let code = code.and_then(|code| {
            let code = self.buffer()?.push(&code);
            self.full |= code.is_none();
            code
        });
        let piece = code.map(|code| Piece {
            code: code.as_ptr() as u64,
            arithmetic: run.iter().any(|i| thunk::is_arithmetic(i.mnemonic())),
            vex,
        });
        self.made.insert(key.into_boxed_slice(), piece);
        piece
    }

    /// The op for the run at the start of `window`, if there is one.
    pub(crate) fn fuse(&mut self, window: &Window<'_>) -> Option<Op> {
        let (first, op) = window.get(0)?;
        let vex = part_of_run(first)?;
        let rest = (1..).map_while(|n| window.get(n).map(|(i, _)| *i));
        let rest = rest.take_while(|i| part_of_run(i) == Some(vex));
        let run: Vec<_> = std::iter::once(*first).chain(rest).collect();
        if run.len() < 2 {
            return None;
        }
        let piece = self.piece(&run, window.bytes(run.len())?, window.is64())?;
        let mut op = window.op(run.len(), op)?;
        op.imm = piece.code;
        op.run = handler(piece);
        Some(op)
    }
}

/// Whether `i` may be part of a run, and if so, whether it is VEX-encoded: runs are all of one kind.
fn part_of_run(i: &Instruction) -> Option<bool> {
    let vex = match i.code().encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return None,
    };
    let mut general = 0;
    let mut vectors = 0;
    for k in 0..i.op_count() {
        match i.op_kind(k) {
            OpKind::Register => {
                let register = i.op_register(k);
                if thunk::vector_number(register).is_some() {
                    vectors += 1;
                } else if register.is_gpr32() || register.is_gpr64() {
                    general += 1;
                } else {
                    return None;
                }
            }
            OpKind::Immediate8 | OpKind::Immediate8_2nd => {}
            _ => return None,
        }
    }
    let flags = (i.rflags_modified() | i.rflags_read()) & ARITHMETIC_FLAGS != 0;
    let known = vectors > 0 && general <= 1 && !flags && !compares_strings(i.mnemonic());
    known.then_some(vex)
}

/// These have general registers for results or lengths that they don't name.
fn compares_strings(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Pcmpistrm
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Vpcmpistrm
            | M::Vpcmpestrm
            | M::Vpcmpestrm64
            | M::Pcmpistri
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Vpcmpistri
            | M::Vpcmpestri
            | M::Vpcmpestri64
    )
}

/// Where the register files arrive (System V calling convention).
const VECTORS: Register = Register::RDI;
const GENERALS: Register = Register::RSI;

fn vector_at(number: u32) -> MemoryOperand {
    MemoryOperand::with_base_displ(VECTORS, i64::from(number) * 32)
}

fn general_at(register: Register) -> MemoryOperand {
    let number = register.full_register().number() as i64;
    MemoryOperand::with_base_displ(GENERALS, number * 8)
}

/// `extern "sysv64" fn(vectors, generals)`: loads what the run reads, runs it, stores what it wrote.
fn assemble(run: &[Instruction], vex: bool) -> Result<Vec<u8>, IcedError> {
    let mut info = InstructionInfoFactory::new();
    let mut encoder = Encoder::new(64);
    let mut emit = |i: &Instruction| encoder.encode(i, 0).map(|_| ());
    let (mut read, mut written) = (0u16, 0u16);
    for i in run {
        // One register may be listed twice, as source and as destination.
        let mut writes = 0;
        for used in info.info(i).used_registers() {
            let Some(number) = vector_of(used.register()) else {
                continue;
            };
            let bit = 1 << (number & 15);
            // A legacy instruction may keep part of what it writes.
            if used.access() != OpAccess::Write || !vex {
                read |= bit & !written;
            }
            if !matches!(used.access(), OpAccess::Read | OpAccess::CondRead) {
                writes |= bit;
            }
        }
        written |= writes;
    }
    let (load, store, name) = if vex {
        let (load, store) = (Code::VEX_Vmovdqa_ymm_ymmm256, Code::VEX_Vmovdqa_ymmm256_ymm);
        (load, store, Register::YMM0)
    } else {
        let (load, store) = (Code::Movaps_xmm_xmmm128, Code::Movaps_xmmm128_xmm);
        (load, store, Register::XMM0)
    };
    for n in (0..16).filter(|n| read >> n & 1 != 0) {
        emit(&Instruction::with2(load, name + n, vector_at(n))?)?;
    }
    for i in run {
        let mut copy = *i;
        copy.set_code_size(CodeSize::Code64);
        let general = (0..i.op_count()).find(|&k| i.op_register(k).is_gpr());
        let Some(k) = general else {
            emit(&copy)?;
            continue;
        };
        let guest = i.op_register(k);
        let host = if guest.is_gpr64() {
            Register::RAX
        } else {
            Register::EAX
        };
        copy.set_op_register(k, host);
        let access = info.info(i).op_access(k);
        if access != OpAccess::Write {
            let load = Code::Mov_r64_rm64;
            emit(&Instruction::with2(load, Register::RAX, general_at(guest))?)?;
        }
        emit(&copy)?;
        if !matches!(access, OpAccess::Read | OpAccess::CondRead) {
            let store = Code::Mov_rm64_r64;
            emit(&Instruction::with2(
                store,
                general_at(guest),
                Register::RAX,
            )?)?;
        }
    }
    for n in (0..16).filter(|n| written >> n & 1 != 0) {
        emit(&Instruction::with2(store, vector_at(n), name + n)?)?;
    }
    if vex {
        emit(&Instruction::with(Code::VEX_Vzeroupper))?;
    }
    emit(&Instruction::with(Code::Retnq))?;
    Ok(encoder.take_buffer())
}

/// The number of a vector register of any width.
fn vector_of(register: Register) -> Option<u32> {
    register
        .is_vector_register()
        .then(|| register.full_register().number() as u32)
}

fn handler(piece: Piece) -> Handler {
    match (piece.arithmetic, piece.vex) {
        (false, false) => fused::<false, false>,
        (false, true) => fused::<false, true>,
        (true, false) => fused::<true, false>,
        (true, true) => fused::<true, true>,
    }
}

fn fused<const ARITHMETIC: bool, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let bit = if VEX { blocked::AVX } else { blocked::SSE };
    let special = ARITHMETIC && cpu.fpu.attention & attention::MXCSR != 0;
    if cpu.simd_blocked & bit != 0 || special {
        return apart(cpu, op);
    }
    let cpu: *mut Cpu = cpu;
    // SAFETY: `imm` is code of this processor, which is kept until all blocks are forgotten; it
    // takes the two register files, which are borrowed for the call, and stays within them.
    unsafe {
        let code: extern "sysv64" fn(*mut u8, *mut u8) = std::mem::transmute(op.imm as *const ());
        code(
            (&raw mut (*cpu).fpu.ymm).cast(),
            (&raw mut (*cpu).gpr).cast(),
        );
    }
    Ok(())
}
