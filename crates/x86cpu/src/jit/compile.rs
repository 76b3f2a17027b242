//! From a trace to machine code.
//!
//! The guest's instructions are the host's: most are copied with other registers, and memory
//! operands that go through the TLB. The guest's flags are the host's; nothing that is emitted
//! between the guest's instructions changes them.

use std::mem::{offset_of, take};

use super::asm::{Asm, Mem, Near, R11, RCX};
use super::forms::Forms;
use super::glue::Glue;
use super::loops::{self, Copies};
use super::ready::{Branch, Ready};
use super::registers::Address;
use super::trace::{Step, Trace};
use super::windows::{Share, Windows};
use crate::cpuid::Features;
use crate::mem::PAGE_SIZE;
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
    /// Go on if there is code for the address in R11. Else the same; the jump cache is to have where it
    /// goes.
    Jump,
    /// Go on if there is code for the address in R11, or else leave for there.
    Goto,
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

/// What of a way out may be linked to another trace.
#[derive(Clone, Copy, Debug)]
pub(super) enum Link {
    /// Nothing.
    None,
    /// The call that leaves: it becomes a jump.
    Call,
    /// A jump to that call, whose displacement ends here.
    Jump(usize),
}

/// One way out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    /// Where the call that leaves ends.
    pub end: usize,
    /// Offset from the page's start.
    pub goal: i64,
    pub link: Link,
}

/// Machine code, and what goes with it. Calls and ways are found by where in the code they are made.
pub(super) struct Compiled {
    pub asm: Asm,
    /// Offset of the entry for jumps from within the page; at 0 is that for others.
    pub direct: usize,
    pub calls: Vec<Call>,
    /// The places where they are made.
    pub slow: Vec<Slow>,
    pub ways: Vec<Way>,
}

/// What the compiler has from one trace to the next: memory, and what it has found out of
/// instructions.
pub(super) struct Scratch {
    pub forms: Forms,
    /// The page that the trace is of.
    pub page: Box<[u8; PAGE_SIZE]>,
    pub steps: Vec<Step>,
    ready: Vec<Ready>,
    code: Vec<u8>,
    calls: Vec<Call>,
    slow: Vec<Slow>,
    ways: Vec<Way>,
    leaving: Vec<(Near, Exit)>,
}

impl Scratch {
    pub(super) fn new(features: Features) -> Self {
        Self {
            forms: Forms::new(features),
            page: Box::new([0; _]),
            steps: Vec::new(),
            ready: Vec::new(),
            code: Vec::new(),
            calls: Vec::new(),
            slow: Vec::new(),
            ways: Vec::new(),
            leaving: Vec::new(),
        }
    }

    /// Takes the memory of what was compiled.
    pub(super) fn take_back(&mut self, trace: Trace, compiled: Compiled) {
        self.steps = trace.steps;
        self.code = compiled.asm.into_bytes();
        self.calls = compiled.calls;
        self.slow = compiled.slow;
        self.ways = compiled.ways;
        self.steps.clear();
        self.calls.clear();
        self.slow.clear();
        self.ways.clear();
    }
}

/// What is asked of the compiler beside the trace.
#[derive(Clone, Copy)]
pub(super) struct Request {
    /// Where the code is going to be, and what it calls, from the buffer's start on.
    pub origin: usize,
    pub glue: Glue,
    pub hardened: bool,
}

/// A place where the interpreter is called: when an access misses, or always.
pub(super) struct Slow {
    pub(super) from: Near,
    /// Which call it is.
    pub(super) call: usize,
    /// Where to go on; `None` while the instruction isn't complete.
    pub(super) resume: Option<usize>,
    /// What is to be stored before: then `from` is a jump to where that is done.
    pub(super) noted: Noted,
}

pub(super) struct Compiler {
    pub(super) asm: Asm,
    pub(super) request: Request,
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
pub(super) fn crossing(trace: &Trace, request: Request, scratch: &mut Scratch) -> Option<Compiled> {
    let mut c = Compiler::new(trace.steps.first()?.at, request, scratch);
    c.entry();
    let call = c.call(Work::Cross, 0, false);
    c.interpret(call);
    c.asm.load(R11, Mem::frame(offset_of!(Frame, target)));
    c.jump();
    Some(c.done(scratch))
}

/// Compiles a trace. `plain` are offsets of instructions whose accesses must not open a window.
pub(super) fn compile(
    trace: &Trace,
    request: Request,
    plain: &[u16],
    scratch: &mut Scratch,
) -> Option<Compiled> {
    let head = trace.steps.first()?.at;
    let mut c = Compiler::new(head, request, scratch);
    let mut ready = take(&mut scratch.ready);
    let (forms, bytes) = (&mut scratch.forms, &scratch.page[..]);
    ready.extend((trace.steps.iter()).map(|step| Ready::new(step, bytes, forms)));
    // Pointers that are carried on are used where the processor may only guess that they are good.
    let again = !request.hardened && loops::goes_round(&trace.steps, &ready);
    let found = Windows::find(&trace.steps, &ready, plain, again);
    c.shares = found.shares;
    if found.carried.is_empty() {
        c.entry();
        c.body(&trace.steps, &ready, bytes);
    } else {
        c.rounds(&trace.steps, &ready, bytes, &found.carried);
    }
    ready.clear();
    scratch.ready = ready;
    Some(c.done(scratch))
}

impl Compiler {
    fn new(head: u16, request: Request, scratch: &mut Scratch) -> Self {
        Self {
            asm: Asm::new(take(&mut scratch.code)),
            request,
            calls: take(&mut scratch.calls),
            ways: take(&mut scratch.ways),
            slow: take(&mut scratch.slow),
            leaving: take(&mut scratch.leaving),
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

    fn done(mut self, scratch: &mut Scratch) -> Compiled {
        self.finish();
        scratch.leaving = self.leaving;
        Compiled {
            asm: self.asm,
            direct: self.direct,
            calls: self.calls,
            slow: self.slow,
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
        self.leave(target, Link::None);
        self.asm.here(quiet);
    }

    /// Leaves. Ways without a link are those on which something is requested.
    pub(super) fn leave(&mut self, goal: i64, link: Link) {
        let end = self.asm.call();
        self.bind_glue(end, self.request.glue.leave);
        let end = end.0;
        self.ways.push(Way { end, goal, link });
    }

    /// Has a call go to a place in the glue.
    fn bind_glue(&mut self, from: Near, place: usize) {
        self.asm.bind(from, place.wrapping_sub(self.request.origin));
    }

    pub(super) fn call(&mut self, work: Work, step: usize, missed: bool) -> usize {
        if missed && self.copies == Copies::Warm {
            // Never made: see `missed`.
            return 0;
        }
        self.calls.push(Call { work, step, missed });
        self.calls.len() - 1
    }

    /// Calls the interpreter here and now.
    pub(super) fn interpret(&mut self, call: usize) {
        let from = self.asm.call();
        let resume = Some(self.asm.at());
        self.slow.push(Slow {
            from,
            call,
            resume,
            noted: Noted::default(),
        });
    }

    /// A slow path, with what is to be stored before.
    pub(super) fn slow(&mut self, from: Near, call: usize, resume: Option<usize>) {
        self.slow.push(Slow {
            from,
            call,
            resume,
            noted: self.noted,
        });
    }

    /// What is behind the trace: slow paths on which something is stored, ways out.
    pub(super) fn finish(&mut self) {
        if self.copies == Copies::Warm {
            self.copies = Copies::Cold;
        }
        for n in 0..self.slow.len() {
            let noted = take(&mut self.slow[n].noted);
            if noted != Noted::default() {
                self.asm.bind_here(self.slow[n].from);
                self.noted = noted;
                self.store_noted();
                self.slow[n].from = self.asm.call();
            }
        }
        let mut leaving = take(&mut self.leaving);
        for (from, exit) in leaving.drain(..) {
            self.asm.bind_here(from);
            let offset = super::trace::in_page(exit.target);
            if exit.poll || self.noted_x87 || offset.is_none_or(|offset| offset == self.head) {
                self.go(exit);
            } else {
                self.leave(exit.target, Link::Jump(from.0));
            }
        }
        self.leaving = leaving;
        // Ways out may be more of them.
        for n in 0..self.slow.len() {
            let place = match self.calls[self.slow[n].call].work {
                Work::Jump | Work::Goto => self.request.glue.find,
                _ => self.request.glue.replay,
            };
            self.bind_glue(self.slow[n].from, place);
        }
        // The accesses of one instruction may be noted after what it calls besides.
        self.slow.sort_unstable_by_key(|slow| slow.from.0);
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
        let here = self.asm.at();
        for slow in &mut self.slow[before..] {
            slow.resume.get_or_insert(here);
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
                self.keep_operand(ready.changed());
                self.copy(n, step, copy, &bytes[at..at + step.instruction.len()]);
            }
        }
        false
    }
}
