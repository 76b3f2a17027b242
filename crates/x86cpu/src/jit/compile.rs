//! From a trace to machine code.
//!
//! The guest's instructions are the host's: most are copied with other registers, and memory
//! operands that go through the TLB. The guest's flags are the host's; nothing that is emitted
//! between the guest's instructions changes them.

use std::mem::offset_of;

use super::asm::{Asm, Mem, Near, R11, RCX};
use super::loops::{self, Copies};
use super::ready::{Branch, Ready};
use super::registers::Address;
use super::trace::{Step, Trace};
use super::windows::{Share, Windows};
use crate::cpuid::Features;
use crate::mem::area::Frame;

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
    /// Run the one instruction of a block that goes on in the next page, and say in
    /// [`Frame::target`] where control goes.
    Cross,
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
    /// Offsets of instructions whose accesses must not open a window.
    pub plain: &'a [u16],
}

/// Bit of a way's number: it is left because something is requested.
pub(super) const POLLED: u32 = 1 << 31;

/// A jump to the slow path of an access, and the call that is made there.
pub(super) struct Slow {
    pub(super) from: Near,
    pub(super) call: u32,
    pub(super) resume: Resume,
    pub(super) noted: Noted,
    /// What R11 is to hold for the call.
    pub(super) first: Option<Mem>,
}

/// Where to go on after a slow path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resume {
    /// Behind the instruction, which isn't complete yet.
    Behind,
    At(usize),
    /// In the cold turns of the loop, at a step.
    Cold(usize),
}

pub(super) struct Compiler<'a> {
    pub(super) asm: Asm,
    pub(super) request: Request<'a>,
    pub(super) calls: Vec<Call>,
    pub(super) ways: Vec<Way>,
    pub(super) slow: Vec<Slow>,
    /// Jumps out, each with its way.
    pub(super) leaving: Vec<(Near, Exit)>,
    /// Which copy of a loop this is; where its warm turns begin, where the steps of its cold ones do,
    /// and jumps from the former to the latter.
    pub(super) copies: Copies,
    pub(super) warm: usize,
    pub(super) cold: Vec<usize>,
    pub(super) falls: Vec<(Near, usize)>,
    pub(super) direct: usize,
    pub(super) head: u16,
    /// Which window's pointer is in R11.
    pub(super) held: Option<usize>,
    pub(super) shares: Vec<[Option<Share>; 2]>,
    /// Accesses of the instruction that have been made.
    pub(super) made: usize,
    /// See [`Compiler::went`].
    pub(super) went_back: bool,
    /// There has been an x87 instruction.
    pub(super) noted_x87: bool,
    pub(super) noted: Noted,
    pub(super) sse: bool,
    pub(super) avx: bool,
    pub(super) x87: bool,
}

/// A way out in the making: where to, and whether to look for requests first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Exit {
    pub(super) target: i64,
    pub(super) poll: bool,
    pub(super) noted: Noted,
}

/// What is still to be stored of the last x87 instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Noted {
    /// See [`Frame::x87_note`].
    pub(super) note: Option<u32>,
    /// The address of its last memory operand, of registers that are as they were.
    pub(super) operand: Option<Address>,
}

/// A trace for a block that is one instruction across two pages. What is in the second one may
/// change without a trace of the first, so that it is looked at each time, by the interpreter.
pub(super) fn crossing(trace: &Trace, request: Request<'_>) -> Option<Compiled> {
    let mut c = Compiler::new(trace.steps.first()?.at, request);
    c.entry();
    let call = c.call(Work::Cross, 0, false);
    c.interpret(call);
    c.asm.load(R11, Mem::frame(offset_of!(Frame, target)));
    c.jump();
    Some(c.done())
}

/// Compiles a trace. `bytes` are those of its page.
pub(super) fn compile(trace: &Trace, bytes: &[u8], request: Request<'_>) -> Option<Compiled> {
    let head = trace.steps.first()?.at;
    let mut c = Compiler::new(head, request);
    c.asm.bytes.reserve(4096);
    let ready: Vec<Ready> = trace
        .steps
        .iter()
        .map(|step| Ready::new(step, bytes, request.features))
        .collect();
    // Pointers that are carried on are used where the processor may only guess that they are good.
    let again = !request.hardened && loops::goes_round(&trace.steps, &ready);
    let found = Windows::find(&trace.steps, &ready, request.plain, again);
    c.shares = found.shares;
    if found.carried.is_empty() {
        c.entry();
        c.body(&trace.steps, &ready, bytes);
    } else {
        c.rounds(&trace.steps, &ready, bytes, &found.carried);
    }
    Some(c.done())
}

impl<'a> Compiler<'a> {
    fn new(head: u16, request: Request<'a>) -> Self {
        Self {
            asm: Asm::default(),
            request,
            calls: Vec::new(),
            ways: Vec::new(),
            slow: Vec::new(),
            leaving: Vec::new(),
            copies: Copies::Once,
            warm: 0,
            cold: Vec::new(),
            falls: Vec::new(),
            direct: 0,
            head,
            held: None,
            shares: Vec::new(),
            made: 0,
            went_back: false,
            noted_x87: false,
            noted: Noted::default(),
            sse: false,
            avx: false,
            x87: false,
        }
    }

    fn done(mut self) -> Compiled {
        self.finish();
        Compiled {
            bytes: self.asm.bytes,
            direct: self.direct,
            calls: self.calls,
            ways: self.ways,
        }
    }

    /// Jumps through the jump cache come here, with the target in R11.
    pub(super) fn entry(&mut self) {
        self.enter_page();
        self.poll(i64::from(self.head));
        self.direct = self.asm.at();
    }

    pub(super) fn enter_page(&mut self) {
        let head = i32::from(self.head);
        self.asm.lea(R11, Mem::base(R11, -head));
        self.asm.store(Mem::frame(offset_of!(Frame, rip_page)), R11);
    }

    /// Compiles the trace's instructions.
    pub(super) fn body(&mut self, steps: &[Step], ready: &[Ready], bytes: &[u8]) {
        for (n, (step, ready)) in steps.iter().zip(ready).enumerate() {
            if self.copies == Copies::Cold {
                self.cold.push(self.asm.at());
            }
            if self.step(n, step, ready, bytes) {
                break;
            }
        }
    }

    /// Leaves for `target` if something is requested.
    pub(super) fn poll(&mut self, target: i64) {
        self.asm.load(RCX, Mem::frame(offset_of!(Frame, requests)));
        self.asm.load32(RCX, Mem::base(RCX, 0));
        let quiet = self.asm.jrcxz();
        let way = self.way(Goal::Direct(target), None);
        self.leave(way | POLLED);
        self.asm.here(quiet);
    }

    pub(super) fn way(&mut self, goal: Goal, link: Option<usize>) -> u32 {
        self.ways.push(Way { goal, link });
        self.request.first_way + self.ways.len() as u32 - 1
    }

    pub(super) fn leave(&mut self, way: u32) {
        self.asm.constant32(RCX, way);
        self.asm.jmp_memory(Mem::frame(offset_of!(Frame, leave)));
    }

    pub(super) fn call(&mut self, work: Work, step: usize, missed: bool) -> u32 {
        if missed && self.copies == Copies::Warm {
            // Never made: see `missed`.
            return 0;
        }
        self.calls.push(Call { work, step, missed });
        self.request.first_call + self.calls.len() as u32 - 1
    }

    /// Calls the interpreter here and now.
    pub(super) fn interpret(&mut self, call: u32) {
        self.asm.constant32(RCX, call);
        self.asm.call_memory(Mem::frame(offset_of!(Frame, replay)));
    }

    /// A slow path, with what it finds noted as it is now.
    pub(super) fn slow(&mut self, from: Near, call: u32, resume: Option<usize>) {
        let resume = resume.map_or(Resume::Behind, Resume::At);
        self.slow.push(Slow {
            from,
            call,
            resume,
            noted: self.noted,
            first: None,
        });
    }

    /// What is behind the trace: slow paths and ways out.
    pub(super) fn finish(&mut self) {
        self.copies = match self.copies {
            Copies::Once => Copies::Once,
            Copies::Warm | Copies::Cold => Copies::Cold,
        };
        for slow in std::mem::take(&mut self.slow) {
            self.asm.bind_here(slow.from);
            self.noted = slow.noted;
            self.store_noted();
            if let Some(first) = slow.first {
                self.asm.lea(R11, first);
            }
            self.interpret(slow.call);
            let back = self.asm.jmp();
            let target = match slow.resume {
                Resume::Behind => slow.from.0,
                Resume::At(at) => at,
                Resume::Cold(step) => self.cold.get(step).copied().unwrap_or(slow.from.0),
            };
            self.asm.bind(back, target);
        }
        let mut made: Vec<(Exit, usize)> = Vec::new();
        for (from, exit) in std::mem::take(&mut self.leaving) {
            match made.iter().find(|(other, _)| *other == exit) {
                Some(&(_, at)) => self.asm.bind(from, at),
                None => {
                    made.push((exit, self.asm.at()));
                    self.asm.bind_here(from);
                    self.go(exit);
                }
            }
        }
    }

    /// Compiles one instruction; `true` if nothing comes after it.
    pub(super) fn step(&mut self, n: usize, step: &Step, ready: &Ready, bytes: &[u8]) -> bool {
        let before = self.slow.len();
        self.made = 0;
        let done = self.one(n, step, ready, bytes);
        if self.slow.len() != before {
            self.held = None;
        }
        // The end of the instruction, not of what leads away from it.
        let here = match self.copies {
            Copies::Warm => Resume::Cold(n + 1),
            _ => Resume::At(self.asm.at()),
        };
        for slow in &mut self.slow[before..] {
            if slow.resume == Resume::Behind {
                slow.resume = here;
            }
        }
        if !done && step.last && step.follow.is_none() {
            let target = i64::from(step.at) + step.instruction.len() as i64;
            self.go(Exit {
                target,
                poll: self.went_back,
                noted: self.noted,
            });
            return true;
        }
        done
    }

    pub(super) fn one(&mut self, n: usize, step: &Step, ready: &Ready, bytes: &[u8]) -> bool {
        match ready {
            Ready::Branch(branch) => {
                if !matches!(branch, Branch::Conditional { .. } | Branch::Jump { .. }) {
                    self.held = None;
                }
                return self.branch(n, step, *branch);
            }
            Ready::Interpret { to_end: true } => {
                self.store_noted();
                let call = self.call(Work::ToEnd, n, false);
                self.interpret(call);
                return true;
            }
            Ready::Interpret { to_end: false } => {
                self.held = None;
                self.store_noted();
                let call = self.call(Work::Run, n, false);
                self.interpret(call);
                (self.sse, self.avx, self.x87) = (false, false, false);
            }
            Ready::Copy(copy) => {
                let at = usize::from(step.at);
                self.keep_operand(&step.instruction);
                self.copy(n, step, copy, &bytes[at..at + step.instruction.len()]);
            }
        }
        false
    }
}
