//! From an instruction to ops: what the lowering functions of the families share.

use iced_x86::{Code, Instruction, OpKind, Register};

use crate::code::cache::Scratch;
use crate::code::fuse::{Lowered, Window};
use crate::code::op::{Op, op_flag};
use crate::cpu::{Cpu, reg, seg};
use crate::cpuid::Features;
use crate::sys::CodeMode;
use crate::trap::Trap;

/// Adds the ops of an instruction if it is one of its own.
pub type Family = fn(&mut Lowering<'_>, &Instruction) -> bool;

/// All of them, in the order in which they are asked.
const FAMILIES: [Family; 12] = {
    let mut all: [Family; 12] = [crate::sys::lower; 12];
    let integer = crate::exec::FAMILIES;
    let mut n = 0;
    while n < integer.len() {
        all[n] = integer[n];
        n += 1;
    }
    all[VECTOR] = crate::simd::lower;
    all
};
/// Where SIMD and x87 are among them.
const VECTOR: usize = 11;

/// Of an instruction form: nothing is known; the processor hasn't got it; from here on, the family
/// that it was of.
const UNKNOWN: u8 = 0;
const REFUSED: u8 = 1;
const FAMILY: u8 = 2;

/// What one processor knows of each instruction form.
pub(super) fn no_forms() -> Box<[u8]> {
    vec![UNKNOWN; Code::values().len()].into_boxed_slice()
}

/// Does nothing: what an op runs until its lowering function says better.
pub fn nop(_: &mut Cpu, _: &Op) -> Result<(), Trap> {
    Ok(())
}

fn undefined(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    Err(cpu.ud())
}

/// The end of a block whose last instruction is no branch.
fn advance(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.rip = cpu.own_rip(op);
    Ok(())
}

fn advance64(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.rip = cpu.rip.wrapping_add(u64::from(op.ip));
    Ok(())
}

fn load_temporary(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.gpr[usize::from(reg::TMP)] = op.imm;
    Ok(())
}

fn rip_to_temporary(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.gpr[usize::from(reg::TMP)] = cpu.rip.wrapping_add(op.imm);
    Ok(())
}

/// One block in the making, and the instruction that is being lowered.
pub struct Lowering<'a> {
    /// The processor that decodes, for side tables that ops refer to.
    pub cpu: &'a mut Cpu,
    /// How the code is decoded.
    pub mode: CodeMode,
    ops: &'a mut Vec<Op>,
    bytes: &'a [u8],
    start: u64,
    ip: u16,
    ended: bool,
    branch: bool,
    window: &'a [u8],
    lowered: Vec<Lowered>,
    /// Several instructions may become one op. What is to be compiled when it gets hot doesn't pay for
    /// being made faster until then.
    fuses: bool,
}

impl<'a> Lowering<'a> {
    /// For code that starts at `start`, whose bytes are the first of `window`.
    pub(super) fn new(
        cpu: &'a mut Cpu,
        ops: &'a mut Vec<Op>,
        start: u64,
        window: &'a [u8],
    ) -> Self {
        let lowered = std::mem::take(&mut cpu.code.scratch.lowered);
        let fuses = !(cpu.code.jit.is_on() && cpu.sys.mode.is64());
        Self {
            mode: cpu.sys.mode,
            cpu,
            ops,
            bytes: &[],
            start,
            ip: 0,
            ended: false,
            branch: false,
            window,
            lowered,
            fuses,
        }
    }

    /// Lowers `i`, whose encoding is the next `i.len()` bytes from `ip`.
    pub(super) fn instruction(&mut self, i: &Instruction, ip: u16) {
        let at = usize::from(ip);
        self.ip = ip;
        self.bytes = self.window.get(at..at + i.len()).unwrap_or_default();
        let before = self.ops.len();
        let family = self.family(i);
        if family.is_none() {
            self.ops.truncate(before);
            let mut op = self.op();
            op.run = undefined;
            self.push(op);
            self.end_block_after();
        }
        if self.fuses {
            self.lowered.push(Lowered {
                instruction: *i,
                ops: before..self.ops.len(),
                ip: at,
                vector: family == Some(VECTOR),
            });
        }
    }

    /// Has the family that `i` is of add its ops.
    fn family(&mut self, i: &Instruction) -> Option<usize> {
        let form = i.code() as usize;
        let known = self.cpu.code.scratch.forms.get(form).copied()?;
        if known == REFUSED || i.is_invalid() {
            return None;
        }
        if known == UNKNOWN && !self.cpu.features.has_all(i.cpuid_features()) {
            self.note(form, REFUSED);
            return None;
        }
        let before = self.ops.len();
        if let Some(family) = usize::from(known).checked_sub(usize::from(FAMILY)) {
            if FAMILIES.get(family)?(self, i) {
                return Some(family);
            }
            self.ops.truncate(before);
        }
        for (family, lower) in FAMILIES.iter().enumerate() {
            if lower(self, i) {
                self.note(form, FAMILY + family as u8);
                return Some(family);
            }
        }
        None
    }

    fn note(&mut self, form: usize, known: u8) {
        if let Some(slot) = self.cpu.code.scratch.forms.get_mut(form) {
            *slot = known;
        }
    }

    /// Whether the block ends after the last instruction lowered.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// Adds the op that moves RIP past the block, unless a branch has done so, and makes one op of
    /// several instructions where that is known to be faster. Returns how many ops run one after
    /// the other; behind them are the parts of fused ones.
    pub(super) fn finish(mut self, len: u16) -> usize {
        if !self.branch {
            let mut op = self.op();
            op.ip = len;
            op.len = 0;
            op.run = if self.mode.is64() { advance64 } else { advance };
            self.ops.push(op);
        }
        let mut lowered = std::mem::take(&mut self.lowered);
        let main = if self.fuses {
            self.fuse(&lowered)
        } else {
            self.ops.len()
        };
        lowered.clear();
        self.cpu.code.scratch.lowered = lowered;
        main
    }

    fn fuse(&mut self, lowered: &[Lowered]) -> usize {
        let Scratch { parts, out, .. } = &mut self.cpu.code.scratch;
        let fused = &mut self.cpu.code.fused;
        parts.clear();
        out.clear();
        let (mut at, mut copied) = (0, 0);
        while at + 1 < lowered.len() {
            let window = Window {
                lowered: &lowered[at..],
                ops: self.ops,
                bytes: self.window,
                is64: self.mode.is64(),
            };
            let op = if window.lowered[0].vector {
                fused.fuse(&window)
            } else {
                crate::exec::fuse(&window)
            };
            let Some((mut op, range)) = op.and_then(|op| Some((op, window.range(&op)?))) else {
                at += 1;
                continue;
            };
            at += usize::from(op.extra);
            op.aux = parts.len() as u32;
            out.extend_from_slice(&self.ops[copied..range.start]);
            out.push(op);
            copied = range.end;
            parts.extend_from_slice(&self.ops[range]);
        }
        if copied == 0 {
            return self.ops.len();
        }
        out.extend_from_slice(&self.ops[copied..]);
        let main = out.len();
        for (n, op) in out.iter_mut().enumerate().filter(|(_, op)| op.is_fused()) {
            op.aux += (main - n) as u32;
        }
        out.append(parts);
        std::mem::swap(self.ops, out);
        main
    }

    /// A new op for this instruction: address and length filled in, no operands.
    pub fn op(&self) -> Op {
        Op {
            run: nop,
            imm: 0,
            disp: 0,
            ip: self.ip,
            len: self.bytes.len() as u8,
            flags: 0,
            r0: reg::ZERO,
            r1: reg::ZERO,
            r2: reg::ZERO,
            base: reg::ZERO,
            index: reg::ZERO,
            scale: 0,
            seg: seg::FLAT,
            extra: 0,
            aux: 0,
        }
    }

    /// The instruction's encoding.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The instruction's linear address within the code segment (RIP), as decoded. The same block
    /// may run at other addresses.
    pub fn rip(&self) -> u64 {
        self.start.wrapping_add(u64::from(self.ip))
    }

    /// Features that the guest may use.
    pub fn features(&self) -> &Features {
        &self.cpu.features
    }

    /// Adds an op.
    pub fn push(&mut self, op: Op) {
        self.ops.push(op);
    }

    /// Adds an op that sets RIP on every path, and ends the block.
    pub fn push_branch(&mut self, op: Op) {
        self.ops.push(op);
        self.ended = true;
        self.branch = true;
    }

    /// Ends the block after this instruction; the framework moves RIP.
    pub fn end_block_after(&mut self) {
        self.ended = true;
    }

    /// Width of the stack pointer: 64, 32 or 16.
    pub fn stack_bits(&self) -> u32 {
        if self.mode.is64() {
            64
        } else if self.mode.stack32() {
            32
        } else {
            16
        }
    }

    /// The number by which ops name a register: general registers in encoding order, AH to BH as
    /// [`reg::HIGH8`] and up, segment registers by [`seg`], others by their own number.
    pub fn reg(&self, r: Register) -> u8 {
        match r {
            Register::AH => reg::HIGH8,
            Register::CH => reg::HIGH8 + 1,
            Register::DH => reg::HIGH8 + 2,
            Register::BH => reg::HIGH8 + 3,
            Register::None => reg::ZERO,
            Register::EIP | Register::RIP => reg::BLOCK_RIP,
            Register::SPL => reg::RSP,
            Register::BPL => reg::RBP,
            Register::SIL => reg::RSI,
            Register::DIL => reg::RDI,
            r if r.is_gpr() => r.full_register().number() as u8,
            r => r.number() as u8,
        }
    }

    /// Fills `op`'s memory operand, segment and LOCK flag from the instruction's.
    pub fn mem(&mut self, op: &mut Op, i: &Instruction) {
        if i.has_lock_prefix() {
            op.flags |= op_flag::LOCK;
        }
        let stack = matches!(
            i.memory_base(),
            Register::RSP
                | Register::ESP
                | Register::SP
                | Register::RBP
                | Register::EBP
                | Register::BP
        );
        self.segment(op, i.memory_segment(), stack);
        if i.is_ip_rel_memory_operand() {
            self.ip_relative(op, i);
            return;
        }
        op.base = self.reg(i.memory_base());
        op.index = self.reg(i.memory_index());
        op.scale = i.memory_index_scale().trailing_zeros() as u8;
        op.flags |= match address_bits(i) {
            64 => 0,
            32 => op_flag::ADDR32,
            _ => op_flag::ADDR16,
        };
        let disp = i.memory_displacement64();
        // Truncation to the address size makes the low half enough for shorter addresses.
        if address_bits(i) != 64 || disp as i32 as i64 as u64 == disp {
            op.disp = disp as i32;
        } else {
            // Only MOV with a 64-bit offset has such a displacement, and no base.
            let mut load = self.op();
            load.run = load_temporary;
            load.imm = disp;
            self.ops.push(load);
            op.base = reg::TMP;
        }
    }

    fn ip_relative(&mut self, op: &mut Op, i: &Instruction) {
        if i.memory_base() == Register::EIP {
            op.flags |= op_flag::ADDR32;
        }
        let disp = i.memory_displacement64().wrapping_sub(self.start);
        if op.has(op_flag::ADDR32) || disp as i32 as i64 as u64 == disp {
            op.base = reg::BLOCK_RIP;
            op.disp = disp as i32;
        } else {
            let mut load = self.op();
            load.run = rip_to_temporary;
            load.imm = disp;
            self.ops.push(load);
            op.base = reg::TMP;
        }
    }

    /// Sets the segment of a memory operand. `stack` says that the address is relative to RSP or
    /// RBP, so that a non-canonical one is a stack fault (SDM 1 §3.7.4).
    fn segment(&self, op: &mut Op, segment: Register, stack: bool) {
        let number = segment.number() as u8;
        if !self.mode.is64() {
            op.seg = number;
            op.flags |= op_flag::SEGMENTED;
        } else if number == seg::FS || number == seg::GS {
            op.seg = number;
        } else if stack {
            op.seg = seg::FLAT_SS;
        } else {
            op.seg = seg::FLAT;
        }
    }

    /// Fills in what a string instruction needs: source segment in `seg`, destination segment in
    /// `r0`, address size.
    pub fn string_operands(&self, op: &mut Op, i: &Instruction) {
        let source = (0..i.op_count()).any(|n| {
            matches!(
                i.op_kind(n),
                OpKind::MemorySegSI
                    | OpKind::MemorySegESI
                    | OpKind::MemorySegRSI
                    | OpKind::MemorySegDI
                    | OpKind::MemorySegEDI
                    | OpKind::MemorySegRDI
            )
        });
        self.segment(
            op,
            if source {
                i.memory_segment()
            } else {
                Register::DS
            },
            false,
        );
        op.r0 = if self.mode.is64() { seg::FLAT } else { seg::ES };
        for n in 0..i.op_count() {
            op.flags |= match i.op_kind(n) {
                OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => op_flag::ADDR16,
                OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => {
                    op_flag::ADDR32
                }
                _ => 0,
            };
        }
    }
}

/// Address size of the memory operand: 64, 32 or 16.
fn address_bits(i: &Instruction) -> u32 {
    let register = if i.memory_base() == Register::None {
        i.memory_index()
    } else {
        i.memory_base()
    };
    match register.size() {
        8 => 64,
        4 => 32,
        2 => 16,
        // No register, or a vector of indices: the displacement's size tells.
        _ => match i.memory_displ_size() {
            8 => 64,
            4 => 32,
            2 => 16,
            _ => 64,
        },
    }
}
