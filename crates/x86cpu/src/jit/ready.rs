//! What is known of an instruction before anything is emitted for it: whether it is copied, with which
//! registers, and what it accesses.

use iced_x86::{Instruction, OpKind, Register};

use super::asm::{R11, RCX, Reg, Rm};
use super::classify::{Align, Class};
use super::encoding::{Encoding, Field, Operands};
use super::forms::{Form, Forms};
use super::registers::{Address, HOST};
use super::system::System;
use super::trace::Step;
use super::windows::{Memory, Wanted};
use crate::cpu::reg;

/// What is known of an instruction before anything is emitted.
pub(super) enum Ready {
    /// A near branch.
    Branch(Branch),
    /// The interpreter runs it, or it and what is left of its block.
    Interpret {
        to_end: bool,
    },
    Copy(Copy),
    System(System),
}

/// A near branch in its form for 64-bit code.
#[derive(Clone, Copy, Debug)]
pub(super) enum Branch {
    Conditional {
        condition: u8,
        target: i64,
    },
    Zero {
        target: i64,
    },
    Loop {
        target: i64,
    },
    Jump {
        target: i64,
    },
    Call {
        target: i64,
    },
    Return {
        extra: i32,
    },
    /// To a register, or to what is in memory.
    Indirect {
        call: bool,
        register: Option<u8>,
    },
}

/// An instruction that is emitted with other operands, or in another form.
pub(super) struct Copy {
    pub(super) class: Class,
    /// Not for those that are emitted in another form.
    pub(super) encoding: Option<Encoding>,
    /// It has a memory operand.
    memory: bool,
    pub(super) plan: Plan,
    pub(super) size: usize,
    pub(super) align: Align,
    pub(super) write: bool,
    /// The general registers that it may change, as bits.
    changed: u16,
}

impl Ready {
    #[inline]
    pub(super) fn new(step: &Step, bytes: &[u8], forms: &mut Forms) -> Self {
        let i = &step.instruction;
        if step.last {
            if let Some(branch) = Branch::new(i) {
                return Self::Branch(branch);
            }
            if !step.falls_through() {
                return Self::Interpret { to_end: true };
            }
        }
        Self::plain(step, bytes, forms)
    }

    /// The same for an instruction across two pages, which is a block of its own.
    pub(super) fn crossing(step: &Step, bytes: &[u8], forms: &mut Forms) -> Self {
        match Branch::new(&step.instruction) {
            Some(branch) => Self::Branch(branch),
            None => Self::plain(step, bytes, forms),
        }
    }

    fn plain(step: &Step, bytes: &[u8], forms: &mut Forms) -> Self {
        let i = &step.instruction;
        if let Some(system) = System::of(i, forms.features()) {
            return Self::System(system);
        }
        let at = usize::from(step.at);
        let copy = bytes.get(at..at + i.len()).and_then(|bytes| {
            let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
            let form = forms.of(i, memory)?;
            Copy::new(i, &form, memory, bytes)
        });
        match copy {
            Some(copy) => Self::Copy(copy),
            None => Self::Interpret { to_end: false },
        }
    }

    /// The general registers that it may change, as bits.
    pub(super) fn changed(&self) -> u16 {
        match self {
            Self::Interpret { .. } => u16::MAX,
            Self::System(System::Bit(_)) => 0,
            Self::System(System::Pushf) => 1 << reg::RSP,
            Self::System(_) => u16::MAX,
            Self::Copy(copy) => copy.changed,
            Self::Branch(branch) => match branch {
                Branch::Conditional { .. } | Branch::Zero { .. } | Branch::Jump { .. } => 0,
                Branch::Indirect { call: false, .. } => 0,
                Branch::Loop { .. } => 1 << reg::RCX,
                Branch::Call { .. } | Branch::Return { .. } => 1 << reg::RSP,
                Branch::Indirect { call: true, .. } => 1 << reg::RSP,
            },
        }
    }

    /// Whether the interpreter runs it.
    pub(super) fn is_interpreted(&self) -> bool {
        match self {
            Self::Branch(_) => false,
            Self::Interpret { .. } => true,
            // It changes registers in its own way, and may be interpreted.
            Self::Copy(copy) => copy.class == Class::Strings,
            // RSP may be another frame, whose windows are not these.
            Self::System(system) => !matches!(system, System::Pushf | System::Bit(_)),
        }
    }

    /// The accesses that are made for it, in their order.
    pub(super) fn accesses(&self) -> [Option<Wanted>; 2] {
        let rsp = |disp, write| {
            Some(Wanted {
                memory: Memory::Register(reg::RSP, disp),
                size: 8,
                write,
                align: Align::None,
            })
        };
        let operand = Some(Wanted {
            memory: Memory::Operand,
            size: 8,
            write: false,
            align: Align::None,
        });
        match self {
            Self::Interpret { .. } => [None, None],
            Self::System(System::Pushf) => [rsp(-8, true), None],
            Self::System(_) => [None, None],
            Self::Branch(branch) => match *branch {
                Branch::Call { .. } => [rsp(-8, true), None],
                Branch::Return { .. } => [rsp(0, false), None],
                Branch::Indirect { call, register } => match (register, call) {
                    (None, true) => [operand, rsp(-8, true)],
                    (None, false) => [operand, None],
                    (Some(_), true) => [rsp(-8, true), None],
                    (Some(_), false) => [None, None],
                },
                _ => [None, None],
            },
            Self::Copy(copy) => match copy.class {
                // For the second see `push_memory`.
                Class::Push if copy.memory => [operand, None],
                Class::Push => [rsp(-8, true), None],
                Class::Pop => [rsp(0, false), None],
                Class::Leave => [
                    Some(Wanted {
                        memory: Memory::Register(5, 0),
                        size: 8,
                        write: false,
                        align: Align::None,
                    }),
                    None,
                ],
                Class::Lea | Class::Nothing | Class::Strings => [None, None],
                _ if copy.memory => [
                    Some(Wanted {
                        memory: Memory::Operand,
                        size: copy.size,
                        write: copy.write,
                        align: copy.align,
                    }),
                    None,
                ],
                _ => [None, None],
            },
        }
    }
}

impl Branch {
    pub(super) fn new(i: &Instruction) -> Option<Self> {
        use iced_x86::Code;
        let target = super::trace::direct_target(i);
        Some(match (i.code(), target) {
            (_, Some(target)) if i.is_jcc_short_or_near() => Self::Conditional {
                condition: i.condition_code() as u8 - 1,
                target,
            },
            (Code::Jrcxz_rel8_64, Some(target)) => Self::Zero { target },
            (Code::Loop_rel8_64_RCX, Some(target)) => Self::Loop { target },
            (Code::Jmp_rel8_64 | Code::Jmp_rel32_64, Some(target)) => Self::Jump { target },
            (Code::Call_rel32_64, Some(target)) => Self::Call { target },
            (Code::Retnq, _) => Self::Return { extra: 0 },
            (Code::Retnq_imm16, _) => Self::Return {
                extra: i32::from(i.immediate16()),
            },
            (code @ (Code::Jmp_rm64 | Code::Call_rm64), _) => {
                let register = match i.op0_kind() {
                    OpKind::Register => Some(i.op0_register().number() as u8),
                    _ => {
                        Address::new(i)?;
                        None
                    }
                };
                Self::Indirect {
                    call: code == Code::Call_rm64,
                    register,
                }
            }
            _ => return None,
        })
    }
}

impl Copy {
    #[inline]
    pub(super) fn new(i: &Instruction, form: &Form, memory: bool, bytes: &[u8]) -> Option<Self> {
        let class = form.class;
        let mut copy = Self {
            class,
            encoding: None,
            memory: false,
            plan: Plan::default(),
            size: 0,
            align: Align::None,
            write: false,
            changed: form.changed(i),
        };
        match class {
            Class::Nothing => return Some(copy),
            Class::Strings => return Strings::of(i).map(|_| copy),
            Class::Push => {
                if i.code() == iced_x86::Code::Push_rm64 && memory {
                    Address::new(i)?;
                    copy.memory = true;
                    return Some(copy);
                }
                let known = match i.op0_kind() {
                    OpKind::Register => i.op0_register().is_gpr64(),
                    kind => matches!(kind, OpKind::Immediate8to64 | OpKind::Immediate32to64),
                };
                return known.then_some(copy);
            }
            Class::Pop => {
                let known = i.op0_kind() == OpKind::Register && i.op0_register().is_gpr64();
                return known.then_some(copy);
            }
            Class::Leave => return (i.code() == iced_x86::Code::Leaveq).then_some(copy),
            Class::Divide { .. } => {
                let size = match i.op0_kind() {
                    OpKind::Register => i.op0_register().size(),
                    OpKind::Memory => i.memory_size().size(),
                    _ => return None,
                };
                if size != 4 && size != 8 {
                    return None;
                }
                copy.size = size;
            }
            _ => {
                let encoding = Encoding::new(bytes, i)?;
                copy.plan = Plan::new(i, form, memory, memory)?;
                if copy.plan.high && encoding.needs_rex(&copy.plan.operands) {
                    copy.plan = Plan::new(i, form, memory, true)?;
                }
                copy.encoding = Some(encoding);
                copy.size = usize::from(form.size);
            }
        }
        if memory {
            Address::new(i)?;
            copy.memory = true;
            copy.align = form.align;
            copy.write = form.write;
        }
        Some(copy)
    }
}

impl Copy {
    /// The memory operand's address.
    #[inline]
    pub(super) fn address(&self, i: &Instruction) -> Option<Address> {
        self.memory.then(|| Address::new(i)).flatten()
    }
}

/// REP MOVS or REP STOS with 64-bit addresses.
pub(super) struct Strings {
    pub(super) moves: bool,
    /// Log2 of the elements' bytes.
    pub(super) scale: u8,
}

impl Strings {
    pub(super) fn of(i: &Instruction) -> Option<Self> {
        use iced_x86::Code;
        let (moves, scale) = match i.code() {
            Code::Movsb_m8_m8 => (true, 0),
            Code::Movsw_m16_m16 => (true, 1),
            Code::Movsd_m32_m32 => (true, 2),
            Code::Movsq_m64_m64 => (true, 3),
            Code::Stosb_m8_AL => (false, 0),
            Code::Stosw_m16_AX => (false, 1),
            Code::Stosd_m32_EAX => (false, 2),
            Code::Stosq_m64_RAX => (false, 3),
            _ => return None,
        };
        let plain = (0..i.op_count()).all(|n| {
            matches!(
                i.op_kind(n),
                OpKind::MemoryESRDI | OpKind::MemorySegRSI | OpKind::Register
            )
        });
        let segment = moves && matches!(i.memory_segment(), Register::FS | Register::GS);
        (plain && !segment && i.has_rep_prefix() && !i.has_repne_prefix())
            .then_some(Self { moves, scale })
    }

    pub(super) fn bytes(&self) -> &'static [u8] {
        match (self.moves, self.scale) {
            (true, 0) => &[0xf3, 0xa4],
            (true, 1) => &[0x66, 0xf3, 0xa5],
            (true, 2) => &[0xf3, 0xa5],
            (true, _) => &[0xf3, 0x48, 0xa5],
            (false, 0) => &[0xf3, 0xaa],
            (false, 1) => &[0x66, 0xf3, 0xab],
            (false, 2) => &[0xf3, 0xab],
            (false, _) => &[0xf3, 0x48, 0xab],
        }
    }
}

/// A guest register that has to be brought into a host register for one instruction.
#[derive(Clone, Copy)]
pub(super) struct Spill {
    pub(super) guest: u8,
    pub(super) temporary: Reg,
    pub(super) written: bool,
    /// The second byte of a register that has a host register: AH, CH, DH or BH. It comes as the first
    /// one of the temporary, which can be had together with a REX prefix.
    pub(super) high: bool,
}

/// Which registers a copied instruction gets.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) operands: Operands,
    pub(super) spills: [Option<Spill>; 2],
    /// CL is a count: host RCX must hold the guest's.
    pub(super) count: bool,
    /// AH, DH or BH is an operand where it is: nothing may need a REX prefix (SDM 1 §3.4.1.1).
    pub(super) high: bool,
}

impl Plan {
    pub(super) fn spills(&self) -> impl Iterator<Item = Spill> + use<> {
        self.spills.into_iter().flatten()
    }

    /// `apart` has AH to BH be brought into registers of their own.
    #[inline]
    pub(super) fn new(i: &Instruction, form: &Form, memory: bool, apart: bool) -> Option<Self> {
        let fields = || (0..).zip(form.fields).filter_map(|(n, f)| Some((n, f?)));
        let counts = |(n, field)| field == Field::Fixed && i.op_register(n) == Register::CL;
        let mut plan = Self {
            operands: Operands::default(),
            spills: [None; 2],
            count: form.count || fields().any(counts),
            high: false,
        };
        // An address may need R11, and RCX until the operand is reached.
        let free: &[Reg] = match (memory, plan.count) {
            (true, true) => &[],
            (true, false) => &[RCX],
            (false, true) => &[R11],
            (false, false) => &[RCX, R11],
        };
        let mut free = free.iter().copied();
        for (n, field) in fields() {
            let written = form.writes >> n & 1 != 0;
            plan.assign(i.op_register(n), field, written, apart, &mut free)?;
        }
        Some(plan)
    }

    #[inline]
    pub(super) fn assign(
        &mut self,
        register: Register,
        field: Field,
        written: bool,
        apart: bool,
        free: &mut impl Iterator<Item = Reg>,
    ) -> Option<()> {
        let number = register.full_register().number() as u8;
        let high = matches!(
            register,
            Register::AH | Register::CH | Register::DH | Register::BH
        );
        // The host register of the guest's RCX has no second byte that could be named.
        if high && !apart && number != reg::RCX {
            self.high = true;
            return Some(());
        }
        if field == Field::Fixed {
            return Some(());
        }
        let host = match HOST[usize::from(number & 15)] {
            Some(host) if !high => host,
            _ => self.spill(number, written, high, free)?,
        };
        if register.size() == 1 && (4..8).contains(&host) {
            self.operands.byte_low = true;
        }
        match field {
            Field::Reg => self.operands.reg = Some(host),
            Field::Rm => self.operands.rm = Some(Rm::Reg(host)),
            Field::Vvvv => self.operands.vvvv = Some(host),
            Field::Opcode => self.operands.opcode = Some(host),
            Field::Fixed => {}
        }
        Some(())
    }

    pub(super) fn spill(
        &mut self,
        guest: u8,
        written: bool,
        high: bool,
        free: &mut impl Iterator<Item = Reg>,
    ) -> Option<Reg> {
        for spill in self.spills.iter_mut().flatten() {
            if spill.guest == guest && spill.high == high {
                spill.written |= written;
                return Some(spill.temporary);
            }
        }
        let temporary = free.next()?;
        let empty = self.spills.iter_mut().find(|spill| spill.is_none())?;
        *empty = Some(Spill {
            guest,
            temporary,
            written,
            high,
        });
        Some(temporary)
    }
}
