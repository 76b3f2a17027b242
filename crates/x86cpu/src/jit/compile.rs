//! From a trace to machine code.
//!
//! The guest's instructions are the host's: most are copied with other registers, and memory
//! operands that go through the TLB. The guest's flags are the host's; nothing that is emitted
//! between the guest's instructions changes them.

use std::mem::offset_of;

use iced_x86::{Instruction, OpKind, Register};

use super::asm::{Asm, Mem, Near, R10, R11, R15, RAX, RCX, RDX, Reg, Rm, Short};
use super::classify::{
    Align, Class, alignment, classify, writes_count, writes_memory, writes_register,
};
use super::encoding::{Encoding, Field, General, Operands, generals};
use super::trace::{Step, Trace};
use super::windows::{Memory, Share, Wanted, Windows};
use crate::cpu::reg;
use crate::cpuid::Features;
use crate::mem::area::{Area, Frame, JUMP_ROTATE};

/// What the interpreter is asked to do for compiled code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Run the instruction, then go on behind it.
    Run,
    /// The same; the flags are those of before a division was tried.
    Divide,
    /// Have the TLB take a window that is opened here, whose first byte's address is in R11; if it
    /// can't, as [`Work::ToEnd`].
    Window {
        bytes: u16,
        write: bool,
    },
    /// Run it and leave: it is a branch.
    Branch,
    /// The same; the jump cache is to have where it goes.
    Jump,
    /// Run it and all others up to its block's end, and leave.
    ToEnd,
    /// Have what it needs in the host's registers; or else as [`Work::ToEnd`].
    Sse,
    Avx,
    X87,
}

/// One reason to call the interpreter. The step is by number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub work: Work,
    pub step: usize,
    /// The memory access missed the TLB; else the instruction is the interpreter's.
    pub missed: bool,
}

/// Where a trace is left.
#[derive(Clone, Copy, Debug)]
pub(super) enum Goal {
    /// For an offset from the page's start.
    Direct(i64),
    /// For where [`Frame::target`] says.
    Indirect,
}

/// One way out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub goal: Goal,
    /// Where the jump's displacement ends that may be linked to another trace.
    pub link: Option<usize>,
}

/// Machine code, and what goes with it. Calls and ways have their numbers in the code, counted from
/// where the compiler was told to start.
pub(super) struct Compiled {
    pub bytes: Vec<u8>,
    /// Offset of the entry for jumps from within the page; at 0 is that for others.
    pub direct: usize,
    pub calls: Vec<Call>,
    pub ways: Vec<Way>,
}

/// What is asked of the compiler beside the trace.
#[derive(Clone, Copy)]
pub(super) struct Request<'a> {
    pub features: &'a Features,
    pub first_call: u32,
    pub first_way: u32,
    pub hardened: bool,
    /// Whether accesses may share a look into the TLB.
    pub windows: bool,
}

/// Bit of a way's number: it is left because something is requested.
pub(super) const POLLED: u32 = 1 << 31;

/// The host register of each guest register; guest registers without one are in the frame.
const HOST: [Option<Reg>; 16] = [
    Some(RAX),
    Some(R10),
    Some(RDX),
    Some(3),
    Some(R15),
    Some(5),
    Some(6),
    Some(7),
    Some(8),
    Some(9),
    None,
    None,
    Some(12),
    Some(13),
    Some(14),
    None,
];

/// The guest registers that have a host register, with it.
pub(super) fn pinned() -> impl Iterator<Item = (usize, Reg)> {
    HOST.into_iter()
        .enumerate()
        .filter_map(|(guest, host)| Some((guest, host?)))
}

/// Guest registers that are in the frame, and where.
pub(super) const SPILLED: [(usize, usize); 3] = [
    (10, offset_of!(Frame, r10)),
    (11, offset_of!(Frame, r11)),
    (15, offset_of!(Frame, r15)),
];

/// Host register of the guest's RCX, and of its RSP.
const GUEST_RCX: Reg = R10;
const GUEST_RSP: Reg = R15;

fn slot(guest: u8) -> Mem {
    let offset = match guest {
        10 => offset_of!(Frame, r10),
        11 => offset_of!(Frame, r11),
        _ => offset_of!(Frame, r15),
    };
    Mem::frame(offset)
}

/// Where a part of an address is.
#[derive(Clone, Copy, Debug)]
enum Part {
    Host(Reg),
    Frame(Mem),
}

/// A guest address in the making: `base + index << scale + disp`, in a segment.
#[derive(Clone, Copy, Debug)]
struct Address {
    segment: Option<Mem>,
    base: Option<Part>,
    index: Option<(Part, u8)>,
    disp: i32,
}

fn part(register: Register) -> Option<Part> {
    if !register.is_gpr64() {
        return None;
    }
    let guest = register.number() as u8;
    Some(match HOST.get(usize::from(guest)).copied().flatten() {
        Some(host) => Part::Host(host),
        None => Part::Frame(slot(guest)),
    })
}

impl Address {
    fn new(i: &Instruction) -> Option<Self> {
        let segment = match i.memory_segment() {
            Register::FS => Some(Mem::frame(offset_of!(Frame, fs_base))),
            Register::GS => Some(Mem::frame(offset_of!(Frame, gs_base))),
            _ => None,
        };
        let base = match i.memory_base() {
            Register::None => None,
            Register::EIP => return None,
            Register::RIP => Some(Part::Frame(Mem::frame(offset_of!(Frame, rip_page)))),
            register => Some(part(register)?),
        };
        let index = match i.memory_index() {
            Register::None => None,
            register => Some((
                part(register)?,
                i.memory_index_scale().trailing_zeros() as u8,
            )),
        };
        let disp = i32::try_from(i.memory_displacement64() as i64).ok()?;
        // Room for what is added to reach the last byte.
        (disp.unsigned_abs() < i32::MAX as u32 - 4096).then_some(Self {
            segment,
            base,
            index,
            disp,
        })
    }

    /// A host register plus a constant.
    fn of(base: Reg, disp: i32) -> Self {
        Self {
            segment: None,
            base: Some(Part::Host(base)),
            index: None,
            disp,
        }
    }

    /// The same operand for an instruction of the host, if all parts are in registers.
    fn plain(&self) -> Option<Mem> {
        let base = match self.base {
            Some(Part::Host(base)) => Some(base),
            Some(Part::Frame(_)) => return None,
            None => None,
        };
        let index = match self.index {
            Some((Part::Host(index), scale)) => Some((index, scale)),
            Some((Part::Frame(_), _)) => return None,
            None => None,
        };
        Some(Mem {
            base,
            index,
            disp: self.disp,
        })
    }
}

/// What is known of an instruction before anything is emitted.
pub(super) enum Ready {
    /// A near branch.
    Branch(Branch),
    /// The interpreter runs it, or it and what is left of its block.
    Interpret {
        to_end: bool,
    },
    Copy(Copy),
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
    class: Class,
    /// Not for those that are emitted in another form.
    encoding: Option<Encoding>,
    address: Option<Address>,
    plan: Plan,
    size: usize,
    align: Align,
    write: bool,
}

impl Ready {
    fn new(step: &Step, bytes: &[u8], features: &Features) -> Self {
        let i = &step.instruction;
        if step.last {
            if let Some(branch) = Branch::new(i) {
                return Self::Branch(branch);
            }
            if !step.falls_through() {
                return Self::Interpret { to_end: true };
            }
        }
        let at = usize::from(step.at);
        let copy = bytes.get(at..at + i.len()).and_then(|bytes| {
            let class = classify(i).filter(|_| features.has_all(i.cpuid_features()))?;
            Copy::new(i, class, bytes)
        });
        match copy {
            Some(copy) => Self::Copy(copy),
            None => Self::Interpret { to_end: false },
        }
    }

    /// Whether the interpreter runs it.
    pub(super) fn is_interpreted(&self) -> bool {
        match self {
            Self::Branch(_) => false,
            Self::Interpret { .. } => true,
            // It changes registers in its own way, and may be interpreted.
            Self::Copy(copy) => copy.class == Class::Strings,
        }
    }

    /// The accesses that are made for it, in their order.
    pub(super) fn accesses(&self) -> [Option<Wanted>; 2] {
        let rsp = |disp, write| {
            Some(Wanted {
                memory: Memory::Register(reg::RSP, disp),
                size: 8,
                write,
                aligned: false,
            })
        };
        let operand = Some(Wanted {
            memory: Memory::Operand,
            size: 8,
            write: false,
            aligned: false,
        });
        match self {
            Self::Interpret { .. } => [None, None],
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
                Class::Push => [rsp(-8, true), None],
                Class::Pop => [rsp(0, false), None],
                Class::Leave => [
                    Some(Wanted {
                        memory: Memory::Register(5, 0),
                        size: 8,
                        write: false,
                        aligned: false,
                    }),
                    None,
                ],
                Class::Lea | Class::Nothing | Class::Strings => [None, None],
                _ if copy.address.is_some() => [
                    Some(Wanted {
                        memory: Memory::Operand,
                        size: copy.size,
                        write: copy.write,
                        aligned: copy.align != Align::None,
                    }),
                    None,
                ],
                _ => [None, None],
            },
        }
    }
}

impl Branch {
    fn new(i: &Instruction) -> Option<Self> {
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
    fn new(i: &Instruction, class: Class, bytes: &[u8]) -> Option<Self> {
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        let mut copy = Self {
            class,
            encoding: None,
            address: None,
            plan: Plan::default(),
            size: 0,
            align: Align::None,
            write: false,
        };
        match class {
            Class::Nothing => return Some(copy),
            Class::Strings => return Strings::of(i).map(|_| copy),
            Class::Push => {
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
                copy.plan = Plan::new(i, memory)?;
                if copy.plan.high && (memory || encoding.needs_rex(&copy.plan.operands)) {
                    return None;
                }
                copy.encoding = Some(encoding);
                copy.size = i.memory_size().size().max(1);
            }
        }
        if memory {
            copy.address = Some(Address::new(i)?);
            copy.align = alignment(i, class, copy.size);
            copy.write = writes_memory(i, class);
        }
        Some(copy)
    }
}

/// A jump to the slow path of an access, and the call that is made there.
struct Slow {
    from: Near,
    call: u32,
    /// Where to go on; `None` while the instruction isn't complete.
    resume: Option<usize>,
}

pub(super) struct Compiler<'a> {
    asm: Asm,
    request: Request<'a>,
    calls: Vec<Call>,
    ways: Vec<Way>,
    slow: Vec<Slow>,
    /// Jumps out, each with its way.
    leaving: Vec<(Near, Exit)>,
    direct: usize,
    head: u16,
    /// Which window's pointer is in R11.
    held: Option<usize>,
    shares: Vec<[Option<Share>; 2]>,
    /// Accesses of the instruction that have been made.
    made: usize,
    /// See [`Compiler::went`].
    went_back: bool,
    /// There has been an x87 instruction.
    noted_x87: bool,
    sse: bool,
    avx: bool,
    x87: bool,
}

/// A way out in the making: where to, and whether to look for requests first.
#[derive(Clone, Copy)]
struct Exit {
    target: i64,
    poll: bool,
}

/// Compiles a trace. `bytes` are those of its page.
pub(super) fn compile(trace: &Trace, bytes: &[u8], request: Request<'_>) -> Option<Compiled> {
    let head = trace.steps.first()?.at;
    let mut c = Compiler {
        asm: Asm::default(),
        request,
        calls: Vec::new(),
        ways: Vec::new(),
        slow: Vec::new(),
        leaving: Vec::new(),
        direct: 0,
        head,
        held: None,
        shares: Vec::new(),
        made: 0,
        went_back: false,
        noted_x87: false,
        sse: false,
        avx: false,
        x87: false,
    };
    c.asm.bytes.reserve(4096);
    let ready: Vec<Ready> = trace
        .steps
        .iter()
        .map(|step| Ready::new(step, bytes, request.features))
        .collect();
    c.shares = if request.windows {
        Windows::find(&trace.steps, &ready)
    } else {
        vec![[None; 2]; ready.len()]
    };
    c.entry();
    for (n, (step, ready)) in trace.steps.iter().zip(&ready).enumerate() {
        if c.step(n, step, ready, bytes) {
            break;
        }
    }
    c.finish();
    Some(Compiled {
        bytes: c.asm.bytes,
        direct: c.direct,
        calls: c.calls,
        ways: c.ways,
    })
}

impl Compiler<'_> {
    /// Jumps through the jump cache come here, with the target in R11.
    fn entry(&mut self) {
        let head = i32::from(self.head);
        self.asm.lea(R11, Mem::base(R11, -head));
        self.asm.store(Mem::frame(offset_of!(Frame, rip_page)), R11);
        self.poll(i64::from(head));
        self.direct = self.asm.at();
    }

    /// Leaves for `target` if something is requested.
    fn poll(&mut self, target: i64) {
        self.asm.load(RCX, Mem::frame(offset_of!(Frame, requests)));
        self.asm.load32(RCX, Mem::base(RCX, 0));
        let quiet = self.asm.jrcxz();
        let way = self.way(Goal::Direct(target), None);
        self.leave(way | POLLED);
        self.asm.here(quiet);
    }

    fn way(&mut self, goal: Goal, link: Option<usize>) -> u32 {
        self.ways.push(Way { goal, link });
        self.request.first_way + self.ways.len() as u32 - 1
    }

    fn leave(&mut self, way: u32) {
        self.asm.constant32(RCX, way);
        self.asm.jmp_memory(Mem::frame(offset_of!(Frame, leave)));
    }

    fn call(&mut self, work: Work, step: usize, missed: bool) -> u32 {
        self.calls.push(Call { work, step, missed });
        self.request.first_call + self.calls.len() as u32 - 1
    }

    /// Calls the interpreter here and now.
    fn interpret(&mut self, call: u32) {
        self.asm.constant32(RCX, call);
        self.asm.call_memory(Mem::frame(offset_of!(Frame, replay)));
    }

    /// What is behind the trace: slow paths and ways out.
    fn finish(&mut self) {
        for slow in std::mem::take(&mut self.slow) {
            self.asm.bind_here(slow.from);
            self.interpret(slow.call);
            let back = self.asm.jmp();
            self.asm.bind(back, slow.resume.unwrap_or(slow.from.0));
        }
        for (from, exit) in std::mem::take(&mut self.leaving) {
            self.asm.bind_here(from);
            self.go(exit);
        }
    }

    /// Goes to another trace, or to this one's start.
    fn go(&mut self, exit: Exit) {
        let offset = super::trace::in_page(exit.target);
        let Some(offset) = offset else {
            self.asm.load(R11, Mem::frame(offset_of!(Frame, rip_page)));
            match i32::try_from(exit.target) {
                Ok(target) => self.asm.lea(R11, Mem::base(R11, target)),
                // No branch in the page goes so far.
                Err(_) => self.asm.constant32(R11, 0),
            }
            self.jump();
            return;
        };
        if exit.poll {
            self.poll(exit.target);
        }
        if offset == self.head {
            let again = self.asm.jmp();
            self.asm.bind(again, self.direct);
            return;
        }
        self.settle_x87();
        let link = self.asm.jmp();
        self.asm.bind_here(link);
        let way = self.way(Goal::Direct(exit.target), Some(link.0));
        self.leave(way);
    }

    /// Jumps to the guest address in R11, another page of straight code or a direct branch.
    fn jump(&mut self) {
        let hit = self.find_jump();
        let way = self.way(Goal::Indirect, None);
        self.leave(way);
        self.asm.here(hit);
        self.jump_found();
    }

    /// Looks the guest address in R11 up in the jump cache.
    fn find_jump(&mut self) -> Short {
        let tags = offset_of!(Area, jump_tag) as i32;
        self.hash_jump();
        self.asm.load(RCX, entry(RCX, tags));
        self.asm.lea(RCX, Mem::indexed(RCX, R11, 0, 0));
        self.asm.jrcxz()
    }

    /// The index of the address in R11, into RCX.
    fn hash_jump(&mut self) {
        self.asm.rorx(RCX, R11, JUMP_ROTATE as u8);
        self.asm.lea(RCX, Mem::indexed(RCX, R11, 0, 0));
        self.asm
            .pext(RCX, RCX, Mem::frame(offset_of!(Frame, jump_mask)));
    }

    /// Goes there, after [`Compiler::find_jump`].
    fn jump_found(&mut self) {
        self.settle_x87();
        let codes = offset_of!(Area, jump_code) as i32;
        self.hash_jump();
        self.asm.jmp_memory(entry(RCX, codes));
    }

    /// Looks the target of an indirect branch up, which is in R11, before anything is changed: if the
    /// jump cache hasn't got it, or it is no address at all, the branch is the interpreter's.
    fn indirect(&mut self, n: usize) {
        let hit = self.find_jump();
        let call = self.call(Work::Jump, n, false);
        self.interpret(call);
        self.asm.here(hit);
    }

    /// Compiles one instruction; `true` if nothing comes after it.
    fn step(&mut self, n: usize, step: &Step, ready: &Ready, bytes: &[u8]) -> bool {
        let before = self.slow.len();
        self.made = 0;
        let done = self.one(n, step, ready, bytes);
        if self.slow.len() != before {
            self.held = None;
        }
        // The end of the instruction, not of what leads away from it.
        let here = self.asm.at();
        for slow in &mut self.slow[before..] {
            slow.resume.get_or_insert(here);
        }
        if !done && step.last && step.follow.is_none() {
            let target = i64::from(step.at) + step.instruction.len() as i64;
            self.go(Exit {
                target,
                poll: self.went_back,
            });
            return true;
        }
        done
    }

    fn one(&mut self, n: usize, step: &Step, ready: &Ready, bytes: &[u8]) -> bool {
        match ready {
            Ready::Branch(branch) => {
                self.held = None;
                return self.branch(n, step, *branch);
            }
            Ready::Interpret { to_end: true } => {
                let call = self.call(Work::ToEnd, n, false);
                self.interpret(call);
                return true;
            }
            Ready::Interpret { to_end: false } => {
                self.held = None;
                let call = self.call(Work::Run, n, false);
                self.interpret(call);
                (self.sse, self.avx, self.x87) = (false, false, false);
            }
            Ready::Copy(copy) => {
                let at = usize::from(step.at);
                self.copy(n, step, copy, &bytes[at..at + step.instruction.len()]);
            }
        }
        false
    }

    // --- memory -----------------------------------------------------------------------------

    /// Computes an address within its segment (and adds the segment's base if `linear`) into R11.
    fn address(&mut self, address: &Address, linear: bool) {
        self.held = None;
        let disp = address.disp;
        let index = match address.index {
            Some((Part::Host(index), scale)) => Some((index, scale)),
            Some((Part::Frame(slot), scale)) => {
                self.asm.load(RCX, slot);
                Some((RCX, scale))
            }
            None => None,
        };
        let base = match address.base {
            Some(Part::Host(base)) => Some(base),
            Some(Part::Frame(slot)) => {
                self.asm.load(R11, slot);
                Some(R11)
            }
            None => None,
        };
        self.asm.lea(R11, Mem { base, index, disp });
        if let Some(segment) = address.segment
            && linear
        {
            self.asm.load(RCX, segment);
            self.asm.lea(R11, Mem::indexed(R11, RCX, 0, 0));
        }
    }

    /// An access of the instruction: its window's pointer, or a look into the TLB.
    fn access(
        &mut self,
        n: usize,
        address: &Address,
        size: usize,
        align: Align,
        write: bool,
        call: u32,
    ) -> Mem {
        let which = self.made;
        self.made += 1;
        let share = self.shares[n][which.min(1)];
        let Some(share) = share else {
            self.held = None;
            return self.look_up(address, size, align, write, call);
        };
        let slot = Mem::frame(offset_of!(Frame, windows) + 8 * share.window);
        if let Some((low, high)) = share.opens {
            self.held = None;
            self.open(n, address, (low, high), write, share.added, slot);
        } else if self.held != Some(share.window) {
            self.asm.load(R11, slot);
        }
        self.held = Some(share.window);
        match address.index {
            None => Mem::base(R11, share.distance),
            Some((part, scale)) => {
                let index = match part {
                    Part::Host(index) => index,
                    Part::Frame(slot) => {
                        self.asm.load(RCX, slot);
                        // RCX has to be free.
                        let at = Mem::indexed(R11, RCX, scale, share.added + address.disp);
                        self.asm.lea(R11, at);
                        self.held = None;
                        return Mem::base(R11, 0);
                    }
                };
                Mem::indexed(R11, index, scale, share.added + address.disp)
            }
        }
    }

    /// Looks a whole window up: the bytes from `low` up to `high`, relative to the address. The
    /// pointer to what its base register once held is in R11 afterwards, and in its slot.
    fn open(
        &mut self,
        n: usize,
        address: &Address,
        (low, high): (i32, i32),
        write: bool,
        added: i32,
        slot: Mem,
    ) {
        let again = self.asm.at();
        self.address(address, true);
        if low != 0 {
            self.asm.lea(R11, Mem::base(R11, low));
        }
        let (tags, addend) = columns(write);
        let index_mask = Mem::frame(offset_of!(Frame, index_mask));
        self.asm.pext(RCX, R11, index_mask);
        self.asm.load(RCX, entry(RCX, tags));
        self.asm.lea(RCX, Mem::indexed(RCX, R11, 0, high - low - 1));
        let mask = Mem::frame(offset_of!(Frame, masks));
        self.asm.pext(RCX, RCX, mask);
        let hit = self.asm.jrcxz();
        let from = self.asm.jmp();
        self.asm.here(hit);
        let call = self.call(
            Work::Window {
                bytes: (high - low) as u16,
                write,
            },
            n,
            true,
        );
        self.slow.push(Slow {
            from,
            call,
            resume: Some(again),
        });
        self.asm.pext(RCX, R11, index_mask);
        self.asm.load(RCX, entry(RCX, addend));
        if address.index.is_none() {
            // The address is at hand: from it, back to the origin.
            let back = -(low + address.disp + added);
            self.asm.lea(R11, Mem::indexed(R11, RCX, 0, back));
        } else {
            match address.base {
                Some(Part::Host(base)) => {
                    self.asm.lea(R11, Mem::indexed(RCX, base, 0, -added));
                }
                Some(Part::Frame(slot)) => {
                    self.asm.load(R11, slot);
                    self.asm.lea(R11, Mem::indexed(R11, RCX, 0, -added));
                }
                None => self.asm.mov(R11, RCX),
            }
            if let Some(segment) = address.segment {
                self.asm.load(RCX, segment);
                self.asm.lea(R11, Mem::indexed(R11, RCX, 0, 0));
            }
        }
        self.asm.store(slot, R11);
        if self.request.hardened {
            self.fence();
        }
    }

    /// Nothing is read ahead of the comparison before this (SDM 2A, LFENCE).
    fn fence(&mut self) {
        self.asm.put(&[0x0f, 0xae, 0xe8]);
    }

    /// Looks an address up in the TLB. What is returned is good for one access of `size` bytes and
    /// uses R11 and guest registers; RCX is free.
    fn look_up(
        &mut self,
        address: &Address,
        size: usize,
        align: Align,
        write: bool,
        call: u32,
    ) -> Mem {
        let (tags, addend) = columns(write);
        let last = if align == Align::None {
            size as i32 - 1
        } else {
            0
        };
        let simple = match *address {
            Address {
                segment: None,
                base: Some(Part::Host(base)),
                index: None,
                disp,
            } => Some((base, disp)),
            _ => None,
        };
        let index_mask = Mem::frame(offset_of!(Frame, index_mask));
        let mask = Mem::frame(offset_of!(Frame, masks) + 8 * align as usize);
        let asm = &mut self.asm;
        let (index, base, disp) = match simple {
            Some((base, 0)) => {
                asm.pext(R11, base, index_mask);
                (R11, base, 0)
            }
            Some((base, disp)) => {
                asm.lea(RCX, Mem::base(base, disp));
                asm.pext(R11, RCX, index_mask);
                (R11, base, disp)
            }
            None => {
                self.address(address, true);
                self.asm.pext(RCX, R11, index_mask);
                (RCX, R11, 0)
            }
        };
        let asm = &mut self.asm;
        asm.load(RCX, entry(index, tags));
        asm.lea(RCX, Mem::indexed(RCX, base, 0, disp + last));
        asm.pext(RCX, RCX, mask);
        let hit = asm.jrcxz();
        let miss = asm.jmp();
        asm.here(hit);
        let operand = if simple.is_some() {
            asm.load(R11, entry(R11, addend));
            Mem::indexed(R11, base, 0, disp)
        } else {
            asm.pext(RCX, R11, index_mask);
            asm.load(RCX, entry(RCX, addend));
            asm.lea(R11, Mem::indexed(R11, RCX, 0, 0));
            Mem::base(R11, 0)
        };
        if self.request.hardened {
            self.fence();
        }
        self.slow.push(Slow {
            from: miss,
            call,
            resume: None,
        });
        operand
    }

    // --- copies -----------------------------------------------------------------------------

    /// Makes sure that the vector or x87 registers are where copied instructions find them.
    fn ready(&mut self, n: usize, class: Class) {
        let (known, field, work) = match class {
            Class::Sse => (&mut self.sse, offset_of!(Frame, sse_away), Work::Sse),
            Class::Avx => (&mut self.avx, offset_of!(Frame, avx_away), Work::Avx),
            Class::X87 | Class::Mmx => (&mut self.x87, offset_of!(Frame, x87_away), Work::X87),
            _ => return,
        };
        if std::mem::replace(known, true) {
            return;
        }
        self.asm.load_byte(RCX, Mem::frame(field));
        let ready = self.asm.jrcxz();
        let from = self.asm.jmp();
        self.asm.here(ready);
        let call = self.call(work, n, false);
        self.slow.push(Slow {
            from,
            call,
            resume: Some(self.asm.at()),
        });
        // Whoever comes back from there has nothing in it.
        self.held = None;
    }

    /// Emits an instruction.
    fn copy(&mut self, n: usize, step: &Step, copy: &Copy, bytes: &[u8]) {
        let i = &step.instruction;
        let class = copy.class;
        match class {
            Class::Nothing => return,
            Class::Push | Class::Pop | Class::Leave => return self.stack(n, i, class),
            Class::Divide { signed } => return self.divide(n, i, copy, signed),
            Class::Strings => {
                self.held = None;
                self.strings(n, i);
                return;
            }
            _ => {}
        }
        let Some(encoding) = &copy.encoding else {
            return;
        };
        self.ready(n, class);
        let mut operands = copy.plan.operands;
        if let Some(address) = &copy.address {
            let operand = if class == Class::Lea {
                address.plain().unwrap_or_else(|| {
                    self.held = None;
                    self.address(address, false);
                    Mem::base(R11, 0)
                })
            } else {
                let call = self.call(Work::Run, n, true);
                self.access(n, address, copy.size, copy.align, copy.write, call)
            };
            operands.rm = Some(Rm::Mem(operand));
        }
        if copy.plan.count {
            self.asm.mov(RCX, GUEST_RCX);
        }
        for spill in copy.plan.spills() {
            if spill.temporary == R11 {
                self.held = None;
            }
            self.asm.load(spill.temporary, slot(spill.guest));
        }
        encoding.emit(&mut self.asm, &operands);
        if writes_count(i) {
            self.asm.mov(GUEST_RCX, RCX);
        }
        for spill in copy.plan.spills().filter(|spill| spill.written) {
            self.asm.store(slot(spill.guest), spill.temporary);
        }
        if class == Class::X87 {
            self.note_x87(step, bytes, copy.address.as_ref());
        }
    }

    /// FIP, FOP and FDP, which the host's unit has for its own addresses. The address is told
    /// relative to the page; what leaves the trace makes it whole.
    fn note_x87(&mut self, step: &Step, bytes: &[u8], address: Option<&Address>) {
        let opcode = bytes
            .iter()
            .skip_while(|b| !(0xd8..=0xdf).contains(*b))
            .take(2)
            .fold(0, |opcode, &b| opcode << 8 | u16::from(b))
            & 0x7ff;
        if let Some(address) = address {
            let to = Mem::frame(offset_of!(Frame, x87_dp));
            match address.plain() {
                Some(plain) => {
                    self.asm.lea(RCX, plain);
                    self.asm.store(to, RCX);
                }
                None => {
                    self.address(address, false);
                    self.asm.store(to, R11);
                }
            }
        }
        let note = u32::from(opcode) << 16 | u32::from(step.at);
        self.asm
            .store_constant(Mem::frame(offset_of!(Frame, x87_note)), note as i32);
        self.noted_x87 = true;
    }

    /// Before the page is left: keeps which one the last x87 instruction was in.
    fn settle_x87(&mut self) {
        if !self.noted_x87 {
            return;
        }
        self.asm.load(RCX, Mem::frame(offset_of!(Frame, rip_page)));
        self.asm.store(Mem::frame(offset_of!(Frame, x87_page)), RCX);
        self.asm
            .store_constant32(Mem::frame(offset_of!(Frame, x87_note) + 4), 1);
    }

    /// PUSH, POP of registers and constants; LEAVE.
    fn stack(&mut self, n: usize, i: &Instruction, class: Class) {
        let call = self.call(Work::Run, n, true);
        match class {
            Class::Push => {
                let to = Address::of(GUEST_RSP, -8);
                let to = self.access(n, &to, 8, Align::None, true, call);
                match i.op0_kind() {
                    OpKind::Immediate8to64 => {
                        self.asm.store_constant(to, i.immediate8to64() as i32);
                    }
                    OpKind::Immediate32to64 => {
                        self.asm.store_constant(to, i.immediate32to64() as i32);
                    }
                    _ => {
                        let source = self.value(i.op0_register().number() as u8, RCX);
                        self.asm.store(to, source);
                    }
                }
                self.asm.lea(GUEST_RSP, Mem::base(GUEST_RSP, -8));
            }
            Class::Pop => {
                let guest = i.op0_register().number() as u8;
                let from = Address::of(GUEST_RSP, 0);
                let from = self.access(n, &from, 8, Align::None, false, call);
                if guest == reg::RSP {
                    self.asm.load(GUEST_RSP, from);
                    return;
                }
                match HOST[usize::from(guest & 15)] {
                    Some(host) => self.asm.load(host, from),
                    None => {
                        self.asm.load(RCX, from);
                        self.asm.store(slot(guest), RCX);
                    }
                }
                self.asm.lea(GUEST_RSP, Mem::base(GUEST_RSP, 8));
            }
            _ => {
                // LEAVE with a 64-bit stack.
                let rbp = 5;
                let from = Address::of(rbp, 0);
                let from = self.access(n, &from, 8, Align::None, false, call);
                self.asm.load(RCX, from);
                self.asm.lea(GUEST_RSP, Mem::base(rbp, 8));
                self.asm.mov(rbp, RCX);
            }
        }
    }

    /// String instructions with REP that are within a page each way: MOVS and STOS. Else, and with
    /// DF set, the interpreter's.
    fn strings(&mut self, n: usize, i: &Instruction) {
        let Some(strings) = Strings::of(i) else {
            return;
        };
        let call = self.call(Work::Run, n, true);
        let (rsi, rdi) = (6, 7);
        let asm = &mut self.asm;
        asm.load_byte(RCX, Mem::frame(offset_of!(Frame, backwards)));
        let forwards = asm.jrcxz();
        let from = asm.jmp();
        asm.here(forwards);
        // A count with which no address wraps around.
        asm.pext(RCX, GUEST_RCX, Mem::frame(offset_of!(Frame, masks)));
        let few = asm.jrcxz();
        let many = asm.jmp();
        asm.here(few);
        let mut slow = vec![from, many];
        let sides: &[(Reg, bool)] = if strings.moves {
            &[(rdi, true), (rsi, false)]
        } else {
            &[(rdi, true)]
        };
        let index_mask = Mem::frame(offset_of!(Frame, index_mask));
        for &(register, write) in sides {
            let (tags, _) = columns(write);
            let asm = &mut self.asm;
            asm.lea(R11, Mem::indexed(register, GUEST_RCX, strings.scale, -1));
            asm.pext(RCX, register, index_mask);
            asm.load(RCX, entry(RCX, tags));
            asm.lea(RCX, Mem::indexed(RCX, R11, 0, 0));
            asm.pext(RCX, RCX, Mem::frame(offset_of!(Frame, masks)));
            let hit = asm.jrcxz();
            slow.push(asm.jmp());
            asm.here(hit);
        }
        if self.request.hardened {
            self.fence();
        }
        let saved = |n: usize| Mem::frame(offset_of!(Frame, strings) + 8 * n);
        for (n, &(register, write)) in sides.iter().enumerate() {
            let (_, addend) = columns(write);
            let asm = &mut self.asm;
            asm.pext(RCX, register, index_mask);
            asm.load(RCX, entry(RCX, addend));
            asm.store(saved(n), RCX);
            asm.lea(register, Mem::indexed(register, RCX, 0, 0));
        }
        let asm = &mut self.asm;
        asm.mov(RCX, GUEST_RCX);
        asm.put(strings.bytes());
        for (n, &(register, _)) in sides.iter().enumerate() {
            // What was added comes off again, without a trace in the flags: ~x = -x - 1.
            asm.load(R11, saved(n));
            asm.op64(0xf7, 2, Rm::Reg(R11));
            asm.lea(register, Mem::indexed(register, R11, 0, 1));
        }
        asm.mov(GUEST_RCX, RCX);
        for from in slow {
            self.slow.push(Slow {
                from,
                call,
                resume: None,
            });
        }
    }

    /// A register that holds the guest's: its own, or `temporary`, into which it is loaded.
    fn value(&mut self, guest: u8, temporary: Reg) -> Reg {
        match HOST[usize::from(guest & 15)] {
            Some(host) => host,
            None => {
                if temporary == R11 {
                    self.held = None;
                }
                self.asm.load(temporary, slot(guest));
                temporary
            }
        }
    }

    /// DIV and IDIV of 32 and 64 bits, where no #DE can come of it; else the interpreter's.
    fn divide(&mut self, n: usize, i: &Instruction, copy: &Copy, signed: bool) {
        let wide = copy.size == 8;
        if let Some(address) = &copy.address {
            let call = self.call(Work::Run, n, true);
            let from = self.access(n, address, copy.size, Align::None, false, call);
            self.operation(wide, 0x8b, RCX, Rm::Mem(from));
        } else {
            let guest = i.op0_register().full_register().number() as u8;
            let from = self.value(guest, RCX);
            self.operation(wide, 0x8b, RCX, Rm::Reg(from));
        }
        self.held = None;
        // All flags are undefined after a division, so that these may change them; but it may turn
        // out that there is an exception instead.
        self.asm.mov(R11, RAX);
        self.asm.put(&[0x9f, 0x0f, 0x90, 0xc0]);
        self.asm
            .store32(Mem::frame(offset_of!(Frame, divide_flags)), RAX);
        self.asm.mov(RAX, R11);
        if signed {
            // What is divided is a sign-extended number, and the divisor is neither 0 nor -1.
            self.operation(wide, 0x8b, R11, Rm::Reg(RAX));
            self.operation(wide, 0xc1, 7, Rm::Reg(R11));
            self.asm.byte(if wide { 63 } else { 31 });
            self.operation(wide, 0x3b, R11, Rm::Reg(RDX));
            let odd = self.asm.jcc(5);
            self.slow_from(odd, n);
            self.operation(wide, 0x8d, R11, Rm::Mem(Mem::base(RCX, 1)));
            self.operation(wide, 0x83, 7, Rm::Reg(R11));
            self.asm.byte(1);
            let odd = self.asm.jcc(6);
            self.slow_from(odd, n);
        } else {
            // The quotient fits if the upper half is less than the divisor.
            self.operation(wide, 0x3b, RDX, Rm::Reg(RCX));
            let odd = self.asm.jcc(3);
            self.slow_from(odd, n);
        }
        self.operation(wide, 0xf7, if signed { 7 } else { 6 }, Rm::Reg(RCX));
    }

    fn slow_from(&mut self, from: Near, n: usize) {
        let call = self.call(Work::Divide, n, false);
        self.slow.push(Slow {
            from,
            call,
            resume: None,
        });
    }

    fn operation(&mut self, wide: bool, opcode: u8, reg: Reg, rm: Rm) {
        if wide {
            self.asm.op64(opcode, reg, rm);
        } else {
            self.asm.op32(opcode, reg, rm);
        }
    }

    // --- branches ---------------------------------------------------------------------------

    /// Compiles a near branch. Says whether the trace ends here.
    fn branch(&mut self, n: usize, step: &Step, branch: Branch) -> bool {
        let after = i64::from(step.at) + step.instruction.len() as i64;
        match branch {
            Branch::Conditional { condition, target } => {
                let taken = step.follow.is_some_and(|next| i64::from(next) == target)
                    && step.follow.map(i64::from) != Some(after);
                let (condition, aside) = if taken {
                    (condition ^ 1, after)
                } else {
                    (condition, target)
                };
                if step.follow.is_none() && target == i64::from(self.head) {
                    // A loop: what goes back doesn't go out of its way.
                    let from = self.asm.jcc(condition ^ 1);
                    self.leaving.push((from, self.exit(step, after)));
                    self.go(self.exit(step, target));
                    return true;
                }
                let from = self.asm.jcc(condition);
                self.leaving.push((from, self.exit(step, aside)));
                if step.follow.is_some() {
                    self.went(step, if taken { target } else { after });
                    return false;
                }
                self.go(self.exit(step, after));
            }
            Branch::Zero { target } | Branch::Loop { target } => {
                let is_loop = matches!(branch, Branch::Loop { .. });
                if is_loop {
                    self.asm.lea(GUEST_RCX, Mem::base(GUEST_RCX, -1));
                }
                self.asm.mov(RCX, GUEST_RCX);
                let zero = self.asm.jrcxz();
                let other = self.asm.jmp();
                self.asm.here(zero);
                let (if_zero, if_not) = if is_loop {
                    (after, target)
                } else {
                    (target, after)
                };
                self.leaving.push((other, self.exit(step, if_not)));
                self.go(self.exit(step, if_zero));
            }
            Branch::Jump { target } => {
                if step.follow.is_some() {
                    self.went(step, target);
                    return false;
                }
                self.go(self.exit(step, target));
            }
            Branch::Call { target } => {
                self.push_return(n, after);
                if step.follow.is_some() {
                    self.went(step, target);
                    return false;
                }
                self.go(self.exit(step, target));
            }
            Branch::Return { extra } => {
                let call = self.call(Work::Branch, n, true);
                let from = Address::of(GUEST_RSP, 0);
                let from = self.access(n, &from, 8, Align::None, false, call);
                self.asm.load(R11, from);
                self.indirect(n);
                self.asm.lea(GUEST_RSP, Mem::base(GUEST_RSP, 8 + extra));
                self.jump_found();
            }
            Branch::Indirect { call, register } => {
                let target = Mem::frame(offset_of!(Frame, target));
                self.indirect_target(n, step, register);
                self.indirect(n);
                if call {
                    self.asm.store(target, R11);
                    self.push_return(n, after);
                    self.asm.load(R11, target);
                }
                self.jump_found();
            }
        }
        true
    }

    /// Where the trace itself goes back in the page without a look at requests: whatever leaves it
    /// looks then, or there could be a loop that never does.
    fn went(&mut self, step: &Step, target: i64) {
        self.went_back |= target <= i64::from(step.at);
    }

    fn exit(&self, step: &Step, target: i64) -> Exit {
        Exit {
            target,
            poll: self.went_back || target <= i64::from(step.at),
        }
    }

    fn push_return(&mut self, n: usize, after: i64) {
        let call = self.call(Work::Branch, n, true);
        let to = Address::of(GUEST_RSP, -8);
        let to = self.access(n, &to, 8, Align::None, true, call);
        self.asm.load(RCX, Mem::frame(offset_of!(Frame, rip_page)));
        self.asm.lea(RCX, Mem::base(RCX, after as i32));
        self.asm.store(to, RCX);
        self.asm.lea(GUEST_RSP, Mem::base(GUEST_RSP, -8));
    }

    /// Loads the target of an indirect near branch into R11.
    fn indirect_target(&mut self, n: usize, step: &Step, register: Option<u8>) {
        if let Some(register) = register {
            let source = self.value(register, R11);
            if source != R11 {
                self.asm.mov(R11, source);
            }
            return;
        }
        let Some(address) = Address::new(&step.instruction) else {
            return;
        };
        let call = self.call(Work::Branch, n, true);
        let from = self.access(n, &address, 8, Align::None, false, call);
        self.asm.load(R11, from);
        self.held = None;
    }
}

/// The columns of the TLB for reads or writes: tags, and what is added.
fn columns(write: bool) -> (i32, i32) {
    let tags = if write {
        offset_of!(Area, write)
    } else {
        offset_of!(Area, read)
    };
    (tags as i32, offset_of!(Area, addend) as i32)
}

/// An entry of a column.
fn entry(index: Reg, column: i32) -> Mem {
    Mem::indexed(super::asm::RSP, index, 3, column)
}

/// REP MOVS or REP STOS with 64-bit addresses.
struct Strings {
    moves: bool,
    /// Log2 of the elements' bytes.
    scale: u8,
}

impl Strings {
    fn of(i: &Instruction) -> Option<Self> {
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

    fn bytes(&self) -> &'static [u8] {
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
struct Spill {
    guest: u8,
    temporary: Reg,
    written: bool,
}

/// Which registers a copied instruction gets.
#[derive(Default)]
struct Plan {
    operands: Operands,
    spills: [Option<Spill>; 2],
    /// CL is a count: host RCX must hold the guest's.
    count: bool,
    /// AH, DH or BH is an operand.
    high: bool,
}

impl Plan {
    fn spills(&self) -> impl Iterator<Item = Spill> + use<> {
        self.spills.into_iter().flatten()
    }

    fn new(i: &Instruction, memory: bool) -> Option<Self> {
        let (generals, number) = generals(i)?;
        let generals = || generals.iter().take(number).flatten();
        let mut plan = Self {
            operands: Operands::default(),
            spills: [None; 2],
            count: generals().any(|g| g.field == Field::Fixed && g.number == reg::RCX),
            high: false,
        };
        if matches!(
            i.mnemonic(),
            iced_x86::Mnemonic::Cmpxchg8b | iced_x86::Mnemonic::Cmpxchg16b
        ) {
            plan.count16(i)?;
        }
        // An address may need R11, and RCX until the operand is reached.
        let free: &[Reg] = match (memory, plan.count) {
            (true, true) => &[],
            (true, false) => &[RCX],
            (false, true) => &[R11],
            (false, false) => &[RCX, R11],
        };
        let mut free = free.iter().copied();
        for g in generals() {
            plan.assign(i, g, &mut free)?;
        }
        Some(plan)
    }

    /// CMPXCHG8B and CMPXCHG16B take the new upper half from RCX.
    fn count16(&mut self, i: &Instruction) -> Option<()> {
        // With 32 bits the upper half of RCX doesn't matter.
        (i.op0_kind() == OpKind::Memory).then(|| self.count = true)
    }

    fn assign(
        &mut self,
        i: &Instruction,
        g: &General,
        free: &mut impl Iterator<Item = Reg>,
    ) -> Option<()> {
        if g.high {
            self.high = true;
            return (g.number != reg::RCX).then_some(());
        }
        if g.field == Field::Fixed {
            return Some(());
        }
        let written = writes_register(i, g.operand);
        let host = match HOST[usize::from(g.number & 15)] {
            Some(host) => host,
            None => self.spill(g.number, written, free)?,
        };
        if g.size == 1 && (4..8).contains(&host) {
            self.operands.byte_low = true;
        }
        match g.field {
            Field::Reg => self.operands.reg = Some(host),
            Field::Rm => self.operands.rm = Some(Rm::Reg(host)),
            Field::Vvvv => self.operands.vvvv = Some(host),
            Field::Opcode => self.operands.opcode = Some(host),
            Field::Fixed => {}
        }
        Some(())
    }

    fn spill(
        &mut self,
        guest: u8,
        written: bool,
        free: &mut impl Iterator<Item = Reg>,
    ) -> Option<Reg> {
        for spill in self.spills.iter_mut().flatten() {
            if spill.guest == guest {
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
        });
        Some(temporary)
    }
}
