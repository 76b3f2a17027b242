//! Random instructions of every family, with operands that make sense.
//!
//! Instructions come from iced's table of forms; register operands are random, memory operands use
//! every addressing form and point (mostly) into the data pages.

use std::collections::HashSet;

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Encoder, EncodingKind, FlowControl, Instruction,
    InstructionInfoFactory, Mnemonic, OpAccess, OpCodeOperandKind as Kind, OpKind, Register,
    RflagsBits,
};

use crate::operands::{Style, address, operand, target};
use crate::state::{CODE, DATA, DATA_LEN, DATA_WRITABLE, End, Random, State};

/// One test: code, start state, and what isn't to be compared.
pub struct Case {
    /// Instructions, without a landing pad.
    pub code: Vec<u8>,
    pub instructions: Vec<Instruction>,
    pub start: State,
    /// Flags (at their places in RFLAGS) that are undefined after each instruction.
    pub undefined: Vec<u64>,
    /// Bytes of the data pages that depend on where the code runs (FIP and the like).
    pub ignored: Vec<std::ops::Range<usize>>,
}

impl Case {
    /// The flags that are undefined at this end.
    pub fn undefined_flags(&self, end: &End) -> u64 {
        let done = match end {
            End::Exit(_) => self.instructions.len(),
            End::Fault { rip, .. } => self
                .instructions
                .iter()
                .position(|i| i.ip() == *rip)
                .unwrap_or(0),
        };
        let last = done.checked_sub(1).and_then(|n| self.undefined.get(n));
        last.copied().unwrap_or(0)
    }
}

/// Instructions that do not belong to a user program's own state, or whose result depends on the
/// machine.
fn excluded(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Syscall
            | M::Sysenter
            | M::Cpuid
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdpmc
            | M::Rdpid
            | M::Xgetbv
            | M::Xsetbv
            | M::In
            | M::Out
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd
            | M::Lss
            | M::Lfs
            | M::Lgs
            | M::Lds
            | M::Les
            | M::Verr
            | M::Verw
            | M::Lar
            | M::Lsl
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Sidt
            | M::Sgdt
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Rdrand
            | M::Rdseed
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaves
            | M::Xsaves64
            | M::Xrstors
            | M::Xrstors64
            | M::Monitor
            | M::Mwait
            | M::Montmul
            | M::Cli
            | M::Sti
            | M::Rdsspd
            | M::Rdsspq
            | M::Prefetch
            | M::Prefetchw
    )
}

/// Encodings with which vendors differ: PAUSE with REX.B is XCHG on some, and whether a failed
/// CMPXCHG of 32 bits clears the upper half of its register.
pub fn differs(i: &Instruction) -> bool {
    match i.mnemonic() {
        Mnemonic::Pause => i.len() > 2,
        Mnemonic::Cmpxchg => i.op0_register().is_gpr32(),
        _ => false,
    }
}

/// The forms that may be generated.
pub struct Generator {
    /// By family name: forms.
    pub families: Vec<(String, Vec<Code>)>,
    /// All forms of all families, whatever is asked for: prefixes may turn one into another.
    pub usable: HashSet<Code>,
    /// Those with vector registers.
    vectors: Vec<Code>,
    info: InstructionInfoFactory,
}

fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory)
}

/// Whether a form has vector operands, and may do without memory.
fn has_vectors(code: &Code) -> bool {
    let info = code.op_code();
    let names = || (0..info.op_count()).map(|k| format!("{:?}", info.op_kind(k)));
    let vector = |name: &String| name.starts_with("xmm") || name.starts_with("ymm");
    names().any(|name| vector(&name)) && !names().any(|name| name.starts_with("mem"))
}

/// Name of an instruction's family, for counting.
fn family(code: Code) -> String {
    let feature = code.cpuid_features().first().copied();
    match feature {
        None
        | Some(
            CpuidFeature::INTEL8086
            | CpuidFeature::INTEL186
            | CpuidFeature::INTEL286
            | CpuidFeature::INTEL386
            | CpuidFeature::INTEL486
            | CpuidFeature::X64,
        ) => "integer".to_owned(),
        Some(CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387) => "x87".to_owned(),
        Some(feature) => format!("{feature:?}").to_lowercase(),
    }
}

fn usable(code: Code, offered: &dyn Fn(&[CpuidFeature]) -> bool) -> bool {
    let info = code.op_code();
    if !info.is_instruction()
        || !info.mode64()
        || info.fwait()
        || info.is_privileged()
        || info.is_reserved_nop()
        || code.flow_control() != FlowControl::Next
        || !matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        || excluded(code.mnemonic())
        // Vendors differ in how much of memory it reads.
        || code == Code::Movsxd_r16_rm16
        || !offered(code.cpuid_features())
    {
        return false;
    }
    (0..info.op_count()).all(|k| {
        !matches!(
            info.op_kind(k),
            Kind::seg_reg
                | Kind::cr_reg
                | Kind::dr_reg
                | Kind::fs
                | Kind::gs
                | Kind::mem_offs
                | Kind::br16_1
                | Kind::k_reg
                | Kind::k_rm
                | Kind::k_or_mem
                | Kind::tmm_reg
                | Kind::sibmem
                | Kind::bnd_reg
                | Kind::mem_mpx
                | Kind::mem_mib
        )
    })
}

impl Generator {
    pub fn new(offered: &dyn Fn(&[CpuidFeature]) -> bool, only: Option<&str>) -> Self {
        let mut families: Vec<(String, Vec<Code>)> = Vec::new();
        let usable: HashSet<Code> = Code::values()
            .filter(|&code| usable(code, offered))
            .collect();
        for code in Code::values().filter(|code| usable.contains(code)) {
            let name = family(code);
            let mnemonic = format!("{:?}", code.mnemonic()).to_lowercase();
            let whole = only
                .is_none_or(|only| matches!(only, "sequences" | "vector-runs" | "integer-runs"));
            if !whole && only.is_some_and(|only| only != name && only != mnemonic) {
                continue;
            }
            match families.iter_mut().find(|(known, _)| *known == name) {
                Some((_, codes)) => codes.push(code),
                None => families.push((name, vec![code])),
            }
        }
        let mut vectors: Vec<Code> = usable.iter().copied().filter(has_vectors).collect();
        vectors.sort_by_key(|code| *code as usize);
        Self {
            families,
            usable,
            vectors,
            info: InstructionInfoFactory::new(),
        }
    }

    /// A form, and the number of its family.
    pub fn pick_code(&self, random: &mut Random) -> Option<(usize, Code)> {
        if self.families.is_empty() {
            return None;
        }
        // Half by family, half by number of forms.
        let family = if random.one_in(2) {
            random.below(self.families.len() as u64) as usize
        } else {
            let total: usize = self.families.iter().map(|f| f.1.len()).sum();
            let mut n = random.below(total as u64) as usize;
            let mut at = 0;
            while n >= self.families[at].1.len() {
                n -= self.families[at].1.len();
                at += 1;
            }
            at
        };
        Some((family, random.pick(&self.families[family].1)))
    }

    /// A case of one instruction; the family's number with it.
    pub fn single(&mut self, random: &mut Random) -> Option<(usize, Case)> {
        let (family, code) = self.pick_code(random)?;
        let mut start = State::random(random);
        let bytes = self.instruction(random, code, CODE, Style::Single, &mut start)?;
        let i = decode(&bytes, CODE)?;
        if !self.usable.contains(&i.code()) || differs(&i) {
            return None;
        }
        self.place(random, &i, &mut start);
        let double_shift = matches!(i.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd);
        let count = match i.op2_kind() {
            OpKind::Immediate8 => i.immediate8(),
            _ => start.gpr[1] as u8,
        };
        if double_shift && count & 31 > 15 && i.op1_register().is_gpr16() {
            // Undefined.
            return None;
        }
        let mut case = Case {
            code: bytes,
            instructions: vec![i],
            start,
            undefined: vec![to_rflags(i.rflags_undefined())],
            ignored: Vec::new(),
        };
        finish(&mut case);
        Some((family, case))
    }

    /// A case of several instructions that don't touch the pointers they use.
    /// With `vectors`, of vector instructions that touch no memory: the interpreter runs those
    /// together.
    pub fn sequence(&mut self, random: &mut Random, vectors: bool) -> Option<Case> {
        let mut start = State::random(random);
        for n in 12..16 {
            start.gpr[n] = DATA + 64 * random.below(DATA_WRITABLE as u64 / 64 - 1);
        }
        start.gpr[4] = DATA + 4096;
        let (mut code, mut instructions) = (Vec::new(), Vec::new());
        let mut undefined = 0;
        let mut all_undefined = Vec::new();
        let length = 3 + random.below(6);
        let mut attempts = 0;
        // All of a run are VEX-encoded or none.
        let vex = random.one_in(2);
        while (instructions.len() as u64) < length && attempts < 400 {
            attempts += 1;
            let form = if vectors {
                random.pick(&self.vectors)
            } else {
                self.pick_code(random)?.1
            };
            let ip = CODE + code.len() as u64;
            let Some(bytes) = self.instruction(random, form, ip, Style::Sequence, &mut start)
            else {
                continue;
            };
            let Some(i) = decode(&bytes, ip) else {
                continue;
            };
            let is_vex = i.code().encoding() == EncodingKind::VEX;
            if vectors && (has_memory(&i) || is_vex != vex) {
                continue;
            }
            if !self.fits_sequence(&i) || to_rflags(i.rflags_read()) & undefined != 0 {
                continue;
            }
            // With a count of zero, old flags stay.
            if !keeps_flags_sometimes(i.mnemonic()) {
                undefined &= !to_rflags(i.rflags_modified());
            }
            undefined |= to_rflags(i.rflags_undefined());
            all_undefined.push(undefined);
            code.extend_from_slice(&bytes);
            instructions.push(i);
        }
        let mut case = Case {
            code,
            instructions,
            start,
            undefined: all_undefined,
            ignored: Vec::new(),
        };
        finish(&mut case);
        Some(case)
    }

    /// Whether an instruction can stand among others: it is none whose result is undefined, and it
    /// leaves the pointers alone.
    pub fn fits_sequence(&mut self, i: &Instruction) -> bool {
        if !self.usable.contains(&i.code()) || differs(i) {
            return false;
        }
        if i.is_stack_instruction()
            || i.is_string_instruction()
            || is_environment(i.mnemonic())
            || i.mnemonic() == Mnemonic::Xlatb
        {
            return false;
        }
        let undefined_result = matches!(
            i.mnemonic(),
            Mnemonic::Bsf | Mnemonic::Bsr | Mnemonic::Shld | Mnemonic::Shrd
        );
        let implicit_memory = (0..i.op_count()).any(|k| {
            !matches!(
                i.op_kind(k),
                OpKind::Memory
                    | OpKind::Register
                    | OpKind::Immediate8
                    | OpKind::Immediate8_2nd
                    | OpKind::Immediate16
                    | OpKind::Immediate32
                    | OpKind::Immediate64
                    | OpKind::Immediate8to16
                    | OpKind::Immediate8to32
                    | OpKind::Immediate8to64
                    | OpKind::Immediate32to64
            )
        });
        let is_bit_test = matches!(
            i.mnemonic(),
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
        ) && i.op0_kind() == OpKind::Memory
            && i.op1_kind() == OpKind::Register;
        let writes_pointer = self.info.info(i).used_registers().iter().any(|used| {
            let full = used.register().full_register();
            let pointer = full == Register::RSP || full.is_gpr64() && full.number() >= 12;
            pointer && !matches!(used.access(), OpAccess::Read | OpAccess::CondRead)
        });
        !implicit_memory && !is_bit_test && !writes_pointer && !undefined_result && !i.is_vsib()
    }

    /// Encodes a random instruction of this form at `ip`.
    pub fn instruction(
        &mut self,
        random: &mut Random,
        code: Code,
        ip: u64,
        style: Style,
        state: &mut State,
    ) -> Option<Vec<u8>> {
        let info = code.op_code();
        let mut i = Instruction::default();
        i.set_code(code);
        let mut memory = false;
        for k in 0..info.op_count() {
            memory |= operand(random, &mut i, k, info.op_kind(k), style);
        }
        let size = i.memory_size().size() as u64;
        if memory {
            address(random, &mut i, size, style, state);
        }
        let is_string = (0..i.op_count()).any(|k| {
            !matches!(i.op_kind(k), OpKind::Memory | OpKind::Register) && i.is_string_instruction()
        });
        if is_string && random.one_in(2) {
            if info.can_use_repne_prefix() && random.one_in(2) {
                i.set_has_repne_prefix(true);
            } else {
                i.set_has_rep_prefix(true);
            }
        }
        if memory && info.can_use_lock_prefix() && random.one_in(3) {
            i.set_has_lock_prefix(true);
        }
        let mut encoder = Encoder::new(64);
        encoder.encode(&i, ip).ok()?;
        let mut bytes = encoder.take_buffer();
        // Prefixes where they mean nothing, or something else.
        if style == Style::Single && random.one_in(16) && bytes.len() < 14 {
            bytes.insert(
                0,
                random.pick(&[0x66, 0x67, 0xf2, 0xf3, 0x2e, 0x3e, 0x36, 0x26]),
            );
        }
        Some(bytes)
    }

    /// Makes registers point where the operands should be.
    pub fn place(&mut self, random: &mut Random, i: &Instruction, state: &mut State) {
        let implicit_pointers = i.is_stack_instruction()
            || i.is_string_instruction()
            || (0..i.op_count()).any(|k| {
                matches!(
                    i.op_kind(k),
                    OpKind::MemorySegRDI | OpKind::MemorySegEDI | OpKind::MemorySegRSI
                )
            })
            || i.mnemonic() == Mnemonic::Xlatb;
        if implicit_pointers {
            for n in [3, 4, 5, 6, 7] {
                state.gpr[n] = target(random, 8);
            }
            if i.mnemonic() == Mnemonic::Enter || i.mnemonic() == Mnemonic::Leave {
                state.gpr[4] = DATA + 4096 + 8 * random.below(64);
            }
        }
        if i.is_string_instruction() {
            let limit = if random.one_in(8) { 600 } else { 20 };
            state.gpr[1] = random.below(limit);
        }
        if matches!(
            i.mnemonic(),
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq
        ) {
            // Neither single steps nor alignment checks.
            let at = 4096 + 8 * random.below(64) as usize;
            state.gpr[4] = DATA + at as u64;
            let flags = random.bits() & 0x8d5 | 0x202;
            state.data[at..at + 8].copy_from_slice(&flags.to_le_bytes());
        }
        if matches!(i.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd) {
            // Counts beyond 16 bits are undefined.
            state.gpr[1] = state.gpr[1] & !31 | random.below(16);
        }
        if (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory) {
            self.place_explicit(random, i, state);
        }
    }

    fn place_explicit(&mut self, random: &mut Random, i: &Instruction, state: &mut State) {
        let size = i.memory_size().size() as u64;
        let goal = target(random, size.max(1));
        let segment = match i.memory_segment() {
            Register::FS => state.fs_base,
            Register::GS => state.gs_base,
            _ => 0,
        };
        let (base, index) = (i.memory_base(), i.memory_index());
        let scale = u64::from(i.memory_index_scale());
        let disp = i.memory_displacement64();
        let bits32 = base.is_gpr32() || index.is_gpr32();
        let mut scaled = 0;
        if i.is_vsib() {
            place_indices(random, i, state);
        } else if index.is_gpr() && index.full_register() != base.full_register() && base.is_gpr() {
            let value = if random.one_in(4) {
                random.integer()
            } else {
                random.below(64).wrapping_sub(32)
            };
            let value = if bits32 { value & 0xffff_ffff } else { value };
            state.gpr[index.number()] = value;
            scaled = value.wrapping_mul(scale);
        }
        if base.is_gpr() {
            let value = goal
                .wrapping_sub(disp)
                .wrapping_sub(segment)
                .wrapping_sub(scaled);
            let value = if base.full_register() == index.full_register() {
                value / (1 + scale)
            } else {
                value
            };
            state.gpr[base.number()] = if bits32 {
                value & 0xffff_ffff | random.bits() << 32
            } else {
                value
            };
        } else if index.is_gpr() {
            // The displacement was chosen for a small index.
            state.gpr[index.number()] = random.below(32);
        }
        let is_bit_test = matches!(
            i.mnemonic(),
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
        );
        if is_bit_test && i.op1_kind() == OpKind::Register {
            let register = i.op1_register().full_register();
            if register != base.full_register() && register != index.full_register() {
                let bit = random.below(8192).wrapping_sub(4096);
                state.gpr[register.number()] = bit;
            }
        }
    }
}

/// Lanes of an index register: small offsets, now and then a wild one.
fn place_indices(random: &mut Random, i: &Instruction, state: &mut State) {
    let number = i.memory_index().number();
    let wild = random.one_in(6);
    let wide = i.is_vsib64();
    for half in [160, 576] {
        let bytes = &mut state.xsave[half + 16 * number..][..16];
        for lane in bytes.chunks_exact_mut(if wide { 8 } else { 4 }) {
            let mut value = random.below(256).wrapping_sub(64);
            if wild && random.one_in(4) {
                value = random.integer();
            }
            let len = lane.len();
            lane.copy_from_slice(&value.to_le_bytes()[..len]);
        }
    }
}

pub fn decode(bytes: &[u8], ip: u64) -> Option<Instruction> {
    let mut decoder = Decoder::with_ip(64, bytes, ip, DecoderOptions::NONE);
    let i = decoder.decode();
    (!i.is_invalid() && i.len() == bytes.len()).then_some(i)
}

/// From iced's flag bits to RFLAGS.
pub fn to_rflags(bits: u32) -> u64 {
    [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::DF, 10),
        (RflagsBits::OF, 11),
    ]
    .iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |flags, (_, n)| flags | 1 << n)
}

fn keeps_flags_sometimes(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

fn is_environment(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Fnstenv
            | M::Fnsave
            | M::Fxsave
            | M::Fxsave64
            | M::Fldenv
            | M::Frstor
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xrstor
            | M::Xrstor64
    )
}

/// Notes what can't be compared.
fn finish(case: &mut Case) {
    for i in &case.instructions {
        let pointers: &[(u64, u64)] = match i.mnemonic() {
            Mnemonic::Fxsave | Mnemonic::Fxsave64 => &[(6, 18), (28, 4)],
            Mnemonic::Fnstenv | Mnemonic::Fnsave => match i.code() {
                Code::Fnstenv_m14byte | Code::Fnsave_m94byte => &[(6, 8)],
                _ => &[(12, 16)],
            },
            _ => continue,
        };
        let gpr = case.start.gpr;
        let (fs, gs) = (case.start.fs_base, case.start.gs_base);
        let address = i.virtual_address(0, 0, |register, _, _| {
            Some(match register {
                Register::FS => fs,
                Register::GS => gs,
                Register::ES | Register::CS | Register::SS | Register::DS => 0,
                r if r.is_gpr32() => gpr[r.number()] & 0xffff_ffff,
                r => gpr[r.number()],
            })
        });
        for (offset, len) in pointers {
            let start = address
                .unwrap_or(0)
                .wrapping_add(*offset)
                .wrapping_sub(DATA);
            let start = start.min(DATA_LEN as u64) as usize;
            case.ignored
                .push(start..(start + *len as usize).min(DATA_LEN));
        }
    }
}
