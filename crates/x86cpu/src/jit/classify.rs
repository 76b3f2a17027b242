//! Which instructions are copied, and what they do to memory.

use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use crate::simd::thunk::needs_alignment;

/// What an instruction needs, and how it is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Nothing happens.
    Nothing,
    Integer,
    /// Of unsigned or signed numbers: raises #DE.
    Divide {
        signed: bool,
    },
    Lea,
    Sse,
    Avx,
    Mmx,
    /// With what FOP becomes.
    X87,
    Push,
    Pop,
    Leave,
    /// MOVS and STOS with REP.
    Strings,
}

/// What alignment a memory operand must have: log2, in steps of [`crate::mem::area::Frame::masks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    None = 0,
    Sixteen = 1,
    ThirtyTwo = 2,
}

impl Align {
    pub(super) fn bytes(self) -> i32 {
        match self {
            Self::None => 1,
            Self::Sixteen => 16,
            Self::ThirtyTwo => 32,
        }
    }
}

/// Classifies an instruction of 64-bit code; `None` if the interpreter is to run it.
pub(super) fn classify(i: &Instruction) -> Option<Class> {
    use Mnemonic as M;
    Some(match i.mnemonic() {
        M::Nop
        | M::Endbr64
        | M::Endbr32
        | M::Reservednop
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw => Class::Nothing,
        M::Lea => Class::Lea,
        M::Push => Class::Push,
        M::Pop => Class::Pop,
        M::Leave => Class::Leave,
        M::Movsb | M::Movsw | M::Movsq | M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
            Class::Strings
        }
        M::Movsd if i.code() == Code::Movsd_m32_m32 => Class::Strings,
        M::Div => Class::Divide { signed: false },
        M::Idiv => Class::Divide { signed: true },
        M::Bt | M::Bts | M::Btr | M::Btc
            if i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register =>
        {
            return None;
        }
        M::Mov
            if matches!(i.memory_displ_size(), 8)
                && i.memory_base() == Register::None
                && is_moffs(i) =>
        {
            return None;
        }
        M::Mov
        | M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Add
        | M::Adc
        | M::Sub
        | M::Sbb
        | M::And
        | M::Or
        | M::Xor
        | M::Cmp
        | M::Test
        | M::Inc
        | M::Dec
        | M::Neg
        | M::Not
        | M::Shl
        | M::Sal
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror
        | M::Rcl
        | M::Rcr
        | M::Shld
        | M::Shrd
        | M::Imul
        | M::Mul
        | M::Bsf
        | M::Bsr
        | M::Tzcnt
        | M::Lzcnt
        | M::Popcnt
        | M::Bt
        | M::Bts
        | M::Btr
        | M::Btc
        | M::Bswap
        | M::Cbw
        | M::Cwde
        | M::Cdqe
        | M::Cwd
        | M::Cdq
        | M::Cqo
        | M::Xchg
        | M::Cmpxchg
        | M::Xadd
        | M::Movbe
        | M::Crc32
        | M::Andn
        | M::Bextr
        | M::Blsi
        | M::Blsmsk
        | M::Blsr
        | M::Bzhi
        | M::Mulx
        | M::Pdep
        | M::Pext
        | M::Rorx
        | M::Sarx
        | M::Shlx
        | M::Shrx
        | M::Adcx
        | M::Adox
        | M::Lahf
        | M::Sahf
        | M::Stc
        | M::Clc
        | M::Cmc
        | M::Movnti
        | M::Mfence
        | M::Lfence
        | M::Sfence
        | M::Pause
        | M::Cmpxchg8b
        | M::Cmpxchg16b => Class::Integer,
        m if is_setcc_or_cmov(m) => Class::Integer,
        m if is_x87(m) => Class::X87,
        _ => return vector(i),
    })
}

fn is_moffs(i: &Instruction) -> bool {
    use iced_x86::Code as C;
    matches!(
        i.code(),
        C::Mov_AL_moffs8
            | C::Mov_AX_moffs16
            | C::Mov_EAX_moffs32
            | C::Mov_RAX_moffs64
            | C::Mov_moffs8_AL
            | C::Mov_moffs16_AX
            | C::Mov_moffs32_EAX
            | C::Mov_moffs64_RAX
    )
}

fn is_setcc_or_cmov(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
            | M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
    )
}

/// x87 instructions that compute, load or store: each notes its address and opcode.
fn is_x87(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Fadd
            | M::Faddp
            | M::Fiadd
            | M::Fsub
            | M::Fsubp
            | M::Fisub
            | M::Fsubr
            | M::Fsubrp
            | M::Fisubr
            | M::Fmul
            | M::Fmulp
            | M::Fimul
            | M::Fdiv
            | M::Fdivp
            | M::Fidiv
            | M::Fdivr
            | M::Fdivrp
            | M::Fidivr
            | M::Fld
            | M::Fild
            | M::Fst
            | M::Fstp
            | M::Fist
            | M::Fistp
            | M::Fisttp
            | M::Fld1
            | M::Fldz
            | M::Fldpi
            | M::Fldl2e
            | M::Fldl2t
            | M::Fldlg2
            | M::Fldln2
            | M::Fabs
            | M::Fchs
            | M::Fsqrt
            | M::Fxch
            | M::Fcom
            | M::Fcomp
            | M::Fcompp
            | M::Fucom
            | M::Fucomp
            | M::Fucompp
            | M::Fcomi
            | M::Fcomip
            | M::Fucomi
            | M::Fucomip
            | M::Fcmove
            | M::Fcmovne
            | M::Fcmovb
            | M::Fcmovnb
            | M::Fcmovbe
            | M::Fcmovnbe
            | M::Fcmovu
            | M::Fcmovnu
            | M::Frndint
            | M::Fscale
            | M::F2xm1
            | M::Fyl2x
            | M::Fprem
            | M::Fsin
            | M::Fcos
            | M::Fpatan
            | M::Ftst
            | M::Fxam
    )
}

fn vector(i: &Instruction) -> Option<Class> {
    use Mnemonic as M;
    match i.mnemonic() {
        // These use registers that their operands don't name, or touch memory in their own way, or
        // change what this processor keeps elsewhere.
        M::Maskmovdqu
        | M::Vmaskmovdqu
        | M::Maskmovq
        | M::Vmaskmovps
        | M::Vmaskmovpd
        | M::Vpmaskmovd
        | M::Vpmaskmovq
        | M::Cvtpd2pi
        | M::Cvttpd2pi
        | M::Cvtps2pi
        | M::Cvttps2pi
        | M::Cvtpi2ps
        | M::Cvtpi2pd
        | M::Movq2dq
        | M::Movdq2q
        | M::Ldmxcsr
        | M::Stmxcsr
        | M::Vldmxcsr
        | M::Vstmxcsr => return None,
        _ => {}
    }
    if i.is_vsib() {
        return None;
    }
    let mut has_vector = false;
    let mut has_mmx = i.mnemonic() == M::Emms;
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register => {
                let register = i.op_register(n);
                has_mmx |= register.is_mm();
                has_vector |= register.is_xmm() || register.is_ymm();
                if !(register.is_mm()
                    || register.is_xmm()
                    || register.is_ymm()
                    || register.is_gpr())
                {
                    return None;
                }
            }
            OpKind::Memory | OpKind::Immediate8 => {}
            _ => return None,
        }
    }
    match i.code().encoding() {
        EncodingKind::VEX if has_vector || matches!(i.mnemonic(), M::Vzeroupper | M::Vzeroall) => {
            Some(Class::Avx)
        }
        // Both an MMX and an SSE register: two units to look after.
        EncodingKind::Legacy if has_mmx && has_vector => None,
        EncodingKind::Legacy if has_mmx => Some(Class::Mmx),
        EncodingKind::Legacy if has_vector => Some(Class::Sse),
        _ => None,
    }
}

/// Whether the memory operand is written (it may be read too).
pub(super) fn writes_memory(i: &Instruction, class: Class) -> bool {
    use Mnemonic as M;
    match class {
        Class::Nothing | Class::Lea | Class::Divide { .. } | Class::Leave | Class::Strings => false,
        Class::Push => false,
        Class::Pop => true,
        Class::Integer => {
            i.op0_kind() == OpKind::Memory
                && !matches!(i.mnemonic(), M::Cmp | M::Test | M::Bt | M::Mul | M::Imul)
        }
        Class::Sse | Class::Avx | Class::Mmx => i.op0_kind() == OpKind::Memory,
        Class::X87 => matches!(
            i.mnemonic(),
            M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp
        ),
    }
}

/// Whether ECX is a result, as the number of a character is.
pub(super) fn writes_count(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpistri
            | M::Vpcmpestri
            | M::Vpcmpestri64
            | M::Vpcmpistri
    )
}

/// Whether an operand in a general register is written.
pub(super) fn writes_register(i: &Instruction, operand: u8) -> bool {
    use Mnemonic as M;
    match i.mnemonic() {
        M::Cmp | M::Test | M::Bt | M::Push => false,
        M::Xchg | M::Xadd | M::Mulx => operand < 2,
        _ => operand == 0,
    }
}

/// The alignment that a memory operand must have.
pub(super) fn alignment(i: &Instruction, class: Class, size: usize) -> Align {
    let aligned = match class {
        Class::Integer => i.mnemonic() == Mnemonic::Cmpxchg16b,
        Class::Sse | Class::Avx => {
            needs_alignment(i.mnemonic(), size.min(64) as u8, class == Class::Avx)
        }
        _ => false,
    };
    match (aligned, size) {
        (false, _) => Align::None,
        (true, 32) => Align::ThirtyTwo,
        (true, _) => Align::Sixteen,
    }
}
