//! Thunks: short pieces of host code that run one guest SIMD, MMX or x87 instruction on the host's
//! own units.
//!
//! ```text
//! guest   vaddps ymm9, ymm3, [rbx+8]        thunk   vmovdqa ymm2, [rsi]
//! Op      r0 = 9, r1 = 3, memory, imm ──────────▶   vaddps  ymm1, ymm2, [rdx]
//! handler resolves every operand to a pointer       vmovdqa [rdi], ymm1
//!         into the register file or guest RAM       vzeroupper; ret
//! ```
//!
//! Since operands come as pointers, one thunk serves all registers and addressing forms of an
//! instruction: there are no more thunks than instruction forms times immediates, so they are kept
//! for ever and shared by all processors of the process. Only MMX and x87 registers stay what they
//! are: they live in the host's FPU while the guest runs (see [`crate::fpu`]).
//!
//! Legacy SSE keeps the upper half of a YMM register: it isn't loaded or stored. VEX encodings clear
//! it: the whole register is stored.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};

use iced_x86::{
    Code, CodeSize, CpuidFeature, Encoder, EncodingKind, IcedError, Instruction,
    InstructionInfoFactory, MemoryOperand, Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};

use super::code_buffer::CodeBuffer;

/// Every form with every immediate takes less than half of this.
const CAPACITY: usize = 32 << 20;

/// The flags among `RflagsBits`, which also has the condition codes of the x87.
pub(super) const ARITHMETIC_FLAGS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// What the pointer of an operand points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A vector register's 32 bytes.
    Vector(u8),
    /// A general register's 8 bytes (for implicit operands: the first of them all).
    General(u8),
    /// The memory operand.
    Memory,
}

/// How the memory operand is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes.
    pub size: u8,
    /// Read by the instruction.
    pub read: bool,
    /// Written by it.
    pub write: bool,
    /// Must be aligned to its size (#GP).
    pub aligned: bool,
}

/// What a form of an instruction is, apart from its registers and address.
#[derive(Clone, Copy, Debug)]
pub struct Thunk {
    /// Address of the code: `extern "sysv64" fn(*mut u8 × operands) -> u64`.
    pub code: u64,
    /// Floating-point arithmetic: reads MXCSR's control bits and sets its flags.
    pub arithmetic: bool,
    /// Returns the host's flags, which become the guest's (x87: takes the guest's, too).
    pub flags: bool,
    /// Works on the live x87/MMX registers.
    pub x87: bool,
    /// VEX-encoded.
    pub vex: bool,
    /// Has XMM or YMM operands.
    pub sse: bool,
    /// The memory operand.
    pub memory: MemoryUse,
}

/// The operands of one instruction in the order in which its thunk takes them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Operands {
    places: [Option<Place>; 4],
    count: usize,
}

impl Operands {
    fn push(&mut self, place: Place) -> bool {
        let Some(slot) = self.places.get_mut(self.count) else {
            return false;
        };
        *slot = Some(place);
        self.count += 1;
        true
    }

    /// The operands.
    pub fn iter(&self) -> impl Iterator<Item = Place> + '_ {
        self.places.iter().flatten().copied()
    }
}

/// Number of a vector register.
pub fn vector_number(register: Register) -> Option<u8> {
    (register.is_xmm() || register.is_ymm()).then(|| register.number() as u8)
}

/// Operands that an instruction has without naming them.
fn implicit(i: &Instruction) -> &'static [Place] {
    const XMM0: Place = Place::Vector(0);
    const GENERAL: Place = Place::General(0);
    match i.mnemonic() {
        Mnemonic::Blendvpd | Mnemonic::Blendvps | Mnemonic::Pblendvb | Mnemonic::Sha256rnds2 => {
            &[XMM0]
        }
        Mnemonic::Pcmpistrm | Mnemonic::Vpcmpistrm => &[XMM0],
        Mnemonic::Pcmpestrm
        | Mnemonic::Pcmpestrm64
        | Mnemonic::Vpcmpestrm
        | Mnemonic::Vpcmpestrm64 => &[XMM0, GENERAL],
        Mnemonic::Pcmpestri
        | Mnemonic::Pcmpestri64
        | Mnemonic::Vpcmpestri
        | Mnemonic::Vpcmpestri64
        | Mnemonic::Pcmpistri
        | Mnemonic::Vpcmpistri => &[GENERAL],
        _ => &[],
    }
}

/// The operands of `i`, or `None` if it has some that thunks don't know.
pub fn operands(i: &Instruction) -> Option<Operands> {
    let mut operands = Operands::default();
    for k in 0..i.op_count() {
        let known = match i.op_kind(k) {
            OpKind::Register => {
                let register = i.op_register(k);
                if let Some(n) = vector_number(register) {
                    operands.push(Place::Vector(n))
                } else if register.is_gpr32() || register.is_gpr64() {
                    operands.push(Place::General(register.number() as u8))
                } else {
                    register.is_mm() || register.is_st()
                }
            }
            OpKind::Memory => operands.push(Place::Memory),
            OpKind::Immediate8 | OpKind::Immediate8_2nd => true,
            _ => false,
        };
        if !known {
            return None;
        }
    }
    implicit(i)
        .iter()
        .all(|&place| operands.push(place))
        .then_some(operands)
}

/// What tells thunks apart: the form, its immediate, and MMX and x87 registers.
fn key(i: &Instruction) -> u64 {
    let mut key = i.code() as u64;
    let mut shift = 16;
    for k in 0..i.op_count().min(5) {
        let part = match i.op_kind(k) {
            OpKind::Register => {
                let register = i.op_register(k);
                if register.is_mm() || register.is_st() {
                    register.number() as u64 | 0x10
                } else {
                    0x20
                }
            }
            OpKind::Memory => 0x40,
            OpKind::Immediate8 => u64::from(i.immediate8()),
            OpKind::Immediate8_2nd => u64::from(i.immediate8_2nd()),
            _ => 0x80,
        };
        key |= part << shift;
        shift += 8;
    }
    key
}

/// All thunks made so far.
struct Thunks {
    buffer: CodeBuffer,
    made: HashMap<u64, Option<Thunk>>,
    info: InstructionInfoFactory,
}

static THUNKS: OnceLock<Result<Mutex<Thunks>, io::ErrorKind>> = OnceLock::new();

fn thunks() -> &'static Result<Mutex<Thunks>, io::ErrorKind> {
    THUNKS.get_or_init(|| {
        let buffer = CodeBuffer::new(CAPACITY).map_err(|e| e.kind())?;
        Ok(Mutex::new(Thunks {
            buffer,
            made: HashMap::new(),
            info: InstructionInfoFactory::new(),
        }))
    })
}

/// Makes the code buffer if that hasn't happened: call it before the process gives up the right to
/// map executable memory.
///
/// # Errors
/// The host refuses executable memory.
pub fn prepare_executable_memory() -> io::Result<()> {
    thunks().as_ref().map(|_| ()).map_err(|&kind| kind.into())
}

/// The thunk for `i`; `None` if it can't be made (not such an instruction, or no buffer).
pub fn thunk(i: &Instruction) -> Option<Thunk> {
    let mut thunks = thunks()
        .as_ref()
        .ok()?
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let Thunks { buffer, made, info } = &mut *thunks;
    *made
        .entry(key(i))
        .or_insert_with(|| make(buffer, info, i).ok().flatten())
}

fn make(
    buffer: &mut CodeBuffer,
    info: &mut InstructionInfoFactory,
    i: &Instruction,
) -> Result<Option<Thunk>, IcedError> {
    let vex = match i.code().encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return Ok(None),
    };
    let Some(operands) = operands(i) else {
        return Ok(None);
    };
    let (copy, hosts) = canonical(i);
    // Not of `i` itself: with one register twice it may read nothing at all (PXOR).
    let info = info.info(&copy);
    let explicit = Accesses {
        of: std::array::from_fn(|k| info.op_access(k as u32)),
    };
    let flags = (i.rflags_modified() | i.rflags_read()) & ARITHMETIC_FLAGS != 0;
    let mut assembler = Assembler::new(vex);
    assembler.instruction(&copy, &hosts, &explicit, &operands, flags)?;
    let Some(code) = buffer.push(&assembler.finish()) else {
        return Ok(None);
    };
    let registers = || (0..i.op_count()).map(|k| i.op_register(k));
    Ok(Some(Thunk {
        code: code.as_ptr() as u64,
        arithmetic: is_arithmetic(i.mnemonic()),
        flags,
        x87: is_x87(i) || i.mnemonic() == Mnemonic::Emms || registers().any(Register::is_mm),
        vex,
        sse: registers().any(Register::is_vector_register),
        memory: memory_use(i, &explicit, vex),
    }))
}

/// Whether an instruction belongs to the x87 unit proper.
pub fn is_x87(i: &Instruction) -> bool {
    i.cpuid_features().iter().any(|&feature| {
        matches!(
            feature,
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387
        )
    })
}

struct Accesses {
    of: [OpAccess; 5],
}

impl Accesses {
    fn reads(&self, k: u32) -> bool {
        !matches!(self.of[k as usize], OpAccess::Write | OpAccess::None)
    }

    fn writes(&self, k: u32) -> bool {
        matches!(
            self.of[k as usize],
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        )
    }
}

fn memory_use(i: &Instruction, explicit: &Accesses, vex: bool) -> MemoryUse {
    let Some(k) = (0..i.op_count()).find(|&k| i.op_kind(k) == OpKind::Memory) else {
        return MemoryUse::default();
    };
    let size = i.memory_size().size() as u8;
    MemoryUse {
        size,
        read: explicit.reads(k),
        write: explicit.writes(k),
        aligned: needs_alignment(i.mnemonic(), size, vex),
    }
}

/// Legacy SSE wants 16-byte operands aligned (SDM 2 tables 2-18 to 2-21), except for the moves that
/// say otherwise and the string comparisons; VEX only for the moves that promise alignment.
pub fn needs_alignment(mnemonic: Mnemonic, size: u8, vex: bool) -> bool {
    use Mnemonic as M;
    if vex {
        return matches!(
            mnemonic,
            M::Vmovaps
                | M::Vmovapd
                | M::Vmovdqa
                | M::Vmovntdq
                | M::Vmovntdqa
                | M::Vmovntps
                | M::Vmovntpd
        );
    }
    size == 16
        && !matches!(
            mnemonic,
            M::Movups
                | M::Movupd
                | M::Movdqu
                | M::Lddqu
                | M::Pcmpestri
                | M::Pcmpestri64
                | M::Pcmpestrm
                | M::Pcmpestrm64
                | M::Pcmpistri
                | M::Pcmpistrm
        )
        && !is_sha(mnemonic)
}

/// The manual wants SHA operands aligned; processors don't check.
fn is_sha(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Sha1msg1
            | M::Sha1msg2
            | M::Sha1nexte
            | M::Sha1rnds4
            | M::Sha256msg1
            | M::Sha256msg2
            | M::Sha256rnds2
    )
}

/// Whether an instruction is floating-point arithmetic, by its name: the others neither read nor
/// write MXCSR.
pub(super) fn is_arithmetic(mnemonic: Mnemonic) -> bool {
    const STEMS: [&str; 21] = [
        "addp", "adds", "subp", "subs", "mulp", "muls", "divp", "divs", "sqrt", "max", "min",
        "cmp", "comis", "ucomis", "cvt", "round", "dpp", "haddp", "hsubp", "fm", "fnm",
    ];
    let name = format!("{mnemonic:?}").to_ascii_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    let integer_name = name.starts_with("cmpxchg") || name.starts_with("fmul");
    !integer_name
        && (STEMS.iter().any(|stem| name.starts_with(stem))
            || name.starts_with("rcp")
            || name.starts_with("rsqrt"))
}

/// Where the pointers of operands arrive (System V calling convention).
const POINTERS: [Register; 4] = [Register::RDI, Register::RSI, Register::RDX, Register::RCX];
/// General-purpose operands, by operand.
const GENERAL64: [Register; 4] = [Register::R8, Register::R9, Register::R10, Register::R11];
const GENERAL32: [Register; 4] = [Register::R8D, Register::R9D, Register::R10D, Register::R11D];
const XMM: [Register; 4] = [
    Register::XMM1,
    Register::XMM2,
    Register::XMM3,
    Register::XMM4,
];
const YMM: [Register; 4] = [
    Register::YMM1,
    Register::YMM2,
    Register::YMM3,
    Register::YMM4,
];

fn host_register(guest: Register, n: usize) -> Register {
    if guest.is_ymm() {
        YMM[n]
    } else if guest.is_xmm() {
        XMM[n]
    } else if guest.is_gpr32() {
        GENERAL32[n]
    } else {
        GENERAL64[n]
    }
}

/// The instruction with host registers and a pointer for its operands, and for each register operand
/// its number, host register and the pointer to its guest register.
fn canonical(i: &Instruction) -> (Instruction, Vec<(u32, Register, Register)>) {
    let mut copy = *i;
    copy.set_code_size(CodeSize::Code64);
    let mut hosts = Vec::new();
    let mut n = 0;
    for k in 0..i.op_count() {
        match i.op_kind(k) {
            OpKind::Memory => {
                copy.set_segment_prefix(Register::None);
                copy.set_memory_base(POINTERS[n]);
                copy.set_memory_index(Register::None);
                copy.set_memory_index_scale(1);
                copy.set_memory_displ_size(0);
                copy.set_memory_displacement64(0);
                n += 1;
            }
            OpKind::Register => {
                let register = i.op_register(k);
                if register.is_mm() || register.is_st() {
                    continue;
                }
                let host = host_register(register, n);
                copy.set_op_register(k, host);
                hosts.push((k, host, POINTERS[n]));
                n += 1;
            }
            _ => {}
        }
    }
    (copy, hosts)
}

/// Pointers of implicit operands that must survive the instruction.
const KEPT_GENERAL: Register = Register::R11;
const KEPT_XMM0: Register = Register::R10;

struct Assembler {
    encoder: Encoder,
    vex: bool,
    dirty_upper: bool,
}

impl Assembler {
    fn new(vex: bool) -> Self {
        Self {
            encoder: Encoder::new(64),
            vex,
            dirty_upper: false,
        }
    }

    fn emit(&mut self, i: &Instruction) -> Result<(), IcedError> {
        self.encoder.encode(i, 0).map(|_| ())
    }

    fn finish(mut self) -> Vec<u8> {
        self.encoder.take_buffer()
    }

    /// Loads the operands, runs the instruction, stores what it wrote, returns.
    fn instruction(
        &mut self,
        i: &Instruction,
        hosts: &[(u32, Register, Register)],
        explicit: &Accesses,
        operands: &Operands,
        flags: bool,
    ) -> Result<(), IcedError> {
        let mut stores = Vec::new();
        for &(k, host, pointer) in hosts {
            // A legacy destination keeps what the instruction doesn't write.
            let merges = !self.vex && k == 0 && host.is_vector_register();
            if explicit.reads(k) || merges {
                self.load(host, pointer)?;
            }
            if explicit.writes(k) {
                stores.push((host, pointer));
            }
        }
        let memory = (0..i.op_count()).filter(|&k| i.op_kind(k) == OpKind::Memory);
        let n = hosts.len() + memory.count();
        let implicit = &POINTERS[n..operands.count];
        self.load_implicit(i.mnemonic(), implicit)?;
        if flags && is_x87(i) {
            self.emit(&Instruction::with1(Code::Push_r64, Register::RDI)?)?;
            self.emit(&Instruction::with(Code::Popfq))?;
        }
        self.emit(i)?;
        if flags {
            self.emit(&Instruction::with(Code::Pushfq))?;
            self.emit(&Instruction::with1(Code::Pop_r64, Register::RAX)?)?;
        }
        for (host, pointer) in stores {
            self.store(host, pointer)?;
        }
        self.store_implicit(i.mnemonic(), implicit)?;
        if self.dirty_upper {
            self.emit(&Instruction::with(Code::VEX_Vzeroupper))?;
        }
        self.emit(&Instruction::with(Code::Retnq))
    }

    fn load(&mut self, host: Register, from: Register) -> Result<(), IcedError> {
        let memory = MemoryOperand::with_base(from);
        let code = if host.is_ymm() {
            self.dirty_upper = true;
            Code::VEX_Vmovdqa_ymm_ymmm256
        } else if host.is_xmm() && self.vex {
            Code::VEX_Vmovdqa_xmm_xmmm128
        } else if host.is_xmm() {
            Code::Movaps_xmm_xmmm128
        } else {
            return self.emit(&Instruction::with2(
                Code::Mov_r64_rm64,
                host.full_register(),
                memory,
            )?);
        };
        self.emit(&Instruction::with2(code, host, memory)?)
    }

    fn store(&mut self, host: Register, to: Register) -> Result<(), IcedError> {
        let memory = MemoryOperand::with_base(to);
        if host.is_gpr() {
            return self.emit(&Instruction::with2(
                Code::Mov_rm64_r64,
                memory,
                host.full_register(),
            )?);
        }
        if self.vex {
            self.dirty_upper |= host.is_ymm();
            let whole = Register::YMM0 + host.number() as u32;
            self.emit(&Instruction::with2(
                Code::VEX_Vmovdqa_ymmm256_ymm,
                memory,
                whole,
            )?)
        } else {
            self.emit(&Instruction::with2(Code::Movaps_xmmm128_xmm, memory, host)?)
        }
    }

    /// `pointers` are those of the operands that [`implicit`] lists, in the same order.
    fn load_implicit(
        &mut self,
        mnemonic: Mnemonic,
        pointers: &[Register],
    ) -> Result<(), IcedError> {
        use Mnemonic as M;
        match (mnemonic, pointers) {
            (M::Blendvpd | M::Blendvps | M::Pblendvb | M::Sha256rnds2, [xmm0]) => {
                self.load(Register::XMM0, *xmm0)
            }
            // The pointers move out of the way of the lengths (RAX, RDX) and the index (RCX).
            (M::Pcmpistri | M::Vpcmpistri, [general]) => self.copy(KEPT_GENERAL, *general),
            (M::Pcmpestri | M::Pcmpestri64 | M::Vpcmpestri | M::Vpcmpestri64, [general]) => {
                self.copy(KEPT_GENERAL, *general)?;
                self.load_lengths()
            }
            (M::Pcmpestrm | M::Pcmpestrm64 | M::Vpcmpestrm | M::Vpcmpestrm64, [xmm0, general]) => {
                self.copy(KEPT_XMM0, *xmm0)?;
                self.copy(KEPT_GENERAL, *general)?;
                self.load_lengths()
            }
            _ => Ok(()),
        }
    }

    fn copy(&mut self, to: Register, from: Register) -> Result<(), IcedError> {
        self.emit(&Instruction::with2(Code::Mov_r64_rm64, to, from)?)
    }

    fn load_lengths(&mut self) -> Result<(), IcedError> {
        self.load(Register::RAX, KEPT_GENERAL)?;
        self.emit(&Instruction::with2(
            Code::Mov_r64_rm64,
            Register::RDX,
            MemoryOperand::with_base_displ(KEPT_GENERAL, 16),
        )?)
    }

    fn store_implicit(
        &mut self,
        mnemonic: Mnemonic,
        pointers: &[Register],
    ) -> Result<(), IcedError> {
        use Mnemonic as M;
        match (mnemonic, pointers) {
            (M::Pcmpestrm | M::Pcmpestrm64 | M::Vpcmpestrm | M::Vpcmpestrm64, _) => {
                self.store(Register::XMM0, KEPT_XMM0)
            }
            (M::Pcmpistrm | M::Vpcmpistrm, [xmm0]) => self.store(Register::XMM0, *xmm0),
            (
                M::Pcmpestri
                | M::Pcmpestri64
                | M::Vpcmpestri
                | M::Vpcmpestri64
                | M::Pcmpistri
                | M::Vpcmpistri,
                _,
            ) => self.emit(&Instruction::with2(
                Code::Mov_rm64_r64,
                MemoryOperand::with_base_displ(KEPT_GENERAL, 8),
                Register::RCX,
            )?),
            _ => Ok(()),
        }
    }
}
