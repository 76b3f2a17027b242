//! From a trace to machine code.
//!
//! The guest's instructions are the host's: most are copied with other registers, and memory
//! operands that go through the TLB. The guest's flags are the host's; nothing that is emitted
//! between the guest's instructions changes them.

use std::mem::{offset_of, take};

use super::asm::{Asm, Mem, Near, R11, RCX, Short};
use super::classify::Align;
use super::forms::Forms;
use super::glue::Glue;
use super::loops::{self, Copies};
use super::ready::{Branch, Ready};
use super::registers::Address;
use super::trace::{Step, Trace};
use super::windows::{self, Share, Windows};
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
    /// Have the TLB take a window that is opened here, whose first byte's address is in R11, and aligned;
    /// if it can't, as [`Work::ToEnd`].
    Window {
        bytes: u16,
        write: bool,
        align: Align,
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

impl Work {
    /// In 16 bits: for a window, those from bit 4 on.
    pub(super) fn pack(self) -> u16 {
        match self {
            Self::Run => 0,
            Self::Divide => 1,
            Self::Branch => 2,
            Self::Jump => 3,
            Self::ToEnd => 4,
            Self::Cross => 5,
            Self::Sse => 6,
            Self::Avx => 7,
            Self::X87 => 8,
            Self::Goto => 9,
            Self::Window {
                bytes,
                write,
                align,
            } => bytes << 5 | u16::from(write) << 4 | (10 + align as u16),
        }
    }

    pub(super) fn unpack(packed: u16) -> Self {
        match packed & 15 {
            0 => Self::Run,
            1 => Self::Divide,
            2 => Self::Branch,
            3 => Self::Jump,
            4 => Self::ToEnd,
            5 => Self::Cross,
            6 => Self::Sse,
            7 => Self::Avx,
            8 => Self::X87,
            9 => Self::Goto,
            kind => Self::Window {
                bytes: packed >> 5,
                write: packed & 16 != 0,
                align: match kind {
                    10 => Align::None,
                    11 => Align::Sixteen,
                    _ => Align::ThirtyTwo,
                },
            },
        }
    }
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
    /// Nothing: something is requested.
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
    /// Offset of the words of [`Compiler::guard`].
    pub guard: Option<usize>,
}

/// What the compiler has from one trace to the next: memory, and what it has found out of
/// instructions.
pub(super) struct Scratch {
    pub forms: Forms,
    /// The page that the trace is of, and as much of the next as an instruction may reach.
    pub page: Box<[u8; PAGE_SIZE + 14]>,
    pub steps: Vec<Step>,
    ready: Vec<Ready>,
    code: Vec<u8>,
    calls: Vec<Call>,
    slow: Vec<Slow>,
    ways: Vec<Way>,
    leaving: Vec<(Near, Exit)>,
    windows: windows::Kept,
}

// SAFETY: the pointers that steps have are those of a trace in the making. There are no steps but while
// one is made.
#[expect(unsafe_code, reason = "steps have pointers to blocks")]
unsafe impl Send for Scratch {}

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
            windows: windows::Kept::default(),
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
pub(super) struct Request<'a> {
    /// Where the code is going to be, and what it calls, from the buffer's start on.
    pub origin: usize,
    pub glue: Glue,
    pub hardened: bool,
    /// Instructions are counted.
    pub counted: bool,
    /// Offsets of instructions whose accesses must not open a window.
    pub plain: &'a [u16],
}

/// A place where the interpreter is called: when an access misses, or always.
pub(super) struct Slow {
    pub(super) from: Near,
    /// Which call it is.
    pub(super) call: usize,
    pub(super) resume: Resume,
    /// What has to be stored before: not in line, then.
    pub(super) noted: Noted,
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
    /// Number of the instruction.
    pub(super) current: usize,
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
    /// Instructions that have run when it is taken.
    pub(super) done: usize,
}

/// What is still to be stored of the last x87 instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Noted {
    /// See [`Frame::x87_note`].
    pub(super) note: Option<u32>,
    /// The address of its last memory operand, of registers that are as they were.
    pub(super) operand: Option<Address>,
}

/// A trace for a block that is one instruction across two pages. What the second one is depends on how
/// it is mapped, which the interpreter looks at, and vouches for until mappings change.
pub(super) fn crossing(
    trace: &Trace,
    request: Request<'_>,
    scratch: &mut Scratch,
) -> Option<Compiled> {
    let step = trace.steps.first()?;
    let mut c = Compiler::new(step.at, request, scratch);
    let bytes = &scratch.page[..];
    let ready = Ready::crossing(step, bytes, &mut scratch.forms);
    c.entry();
    let call = c.call(Work::Cross, 0, false);
    let mut words = Vec::new();
    if !matches!(ready, Ready::Interpret { .. }) {
        c.shares = vec![[None; 2]];
        let unsure;
        (words, unsure) = c.guard();
        c.step(0, step, &ready, bytes);
        for from in unsure {
            c.asm.bind_here(from);
        }
    }
    c.interpret(call);
    c.asm.load(R11, Mem::frame(offset_of!(Frame, target)));
    c.jump();
    let mut done = c.done(scratch);
    if !words.is_empty() {
        let at = done.asm.at();
        for (n, word) in words.into_iter().enumerate() {
            done.asm.bind(word, at + 8 * n);
        }
        done.asm.put(&[0; 16]);
        done.guard = Some(at);
    }
    Some(done)
}

/// Compiles a trace.
pub(super) fn compile(
    trace: &Trace,
    request: Request<'_>,
    scratch: &mut Scratch,
) -> Option<Compiled> {
    let head = trace.steps.first()?.at;
    let mut c = Compiler::new(head, request, scratch);
    let mut ready = take(&mut scratch.ready);
    let (forms, bytes) = (&mut scratch.forms, &scratch.page[..]);
    ready.extend((trace.steps.iter()).map(|step| Ready::new(step, bytes, forms)));
    // Pointers that are carried on are used where the processor may only guess that they are good.
    let again = !request.hardened && loops::goes_round(&trace.steps, &ready);
    let found = Windows::find(
        &trace.steps,
        &ready,
        request.plain,
        again,
        &mut scratch.windows,
    );
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

impl<'a> Compiler<'a> {
    fn new(head: u16, request: Request<'a>, scratch: &mut Scratch) -> Self {
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
            current: 0,
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
        scratch.windows.shares = self.shares;
        Compiled {
            asm: self.asm,
            direct: self.direct,
            calls: self.calls,
            slow: self.slow,
            ways: self.ways,
            guard: None,
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

    /// Goes on only if the instruction is what the interpreter last vouched for: minus its linear address
    /// and minus the key are in two words behind the code. Gives the loads of those, to be bound as
    /// jumps are, and the jumps for when it isn't.
    fn guard(&mut self) -> (Vec<Near>, Vec<Near>) {
        let (mut words, mut unsure) = (Vec::new(), Vec::new());
        let fields = [
            (offset_of!(Frame, rip_page), i32::from(self.head)),
            (offset_of!(Frame, cross_key), 0),
        ];
        for (field, added) in fields {
            self.asm.load(R11, Mem::frame(field));
            words.push(self.asm.load_relative(RCX));
            self.asm.lea(RCX, Mem::indexed(RCX, R11, 0, added));
            let same = self.asm.jrcxz();
            unsure.push(self.asm.jmp());
            self.asm.here(same);
        }
        (words, unsure)
    }

    /// Leaves for `target` if something is requested.
    pub(super) fn poll(&mut self, target: i64) {
        self.asm.load(RCX, Mem::frame(offset_of!(Frame, requests)));
        self.asm.load32(RCX, Mem::base(RCX, 0));
        let quiet = self.asm.jrcxz();
        self.leave(target, Link::None);
        self.asm.here(quiet);
        if self.request.counted {
            let goes_on = self.budget();
            self.leave(target, Link::None);
            self.asm.here(goes_on);
        }
    }

    /// Counts instructions, if that is asked for.
    pub(super) fn count(&mut self, instructions: usize) {
        if self.request.counted && instructions > 0 {
            let left = Mem::frame(offset_of!(Frame, left));
            self.asm.load(RCX, left);
            self.asm.lea(RCX, Mem::base(RCX, -(instructions as i32)));
            self.asm.store(left, RCX);
        }
    }

    /// Goes where the jump leads to as long as not all of the budget is spent.
    pub(super) fn budget(&mut self) -> Short {
        self.asm.load(RCX, Mem::frame(offset_of!(Frame, left)));
        self.asm
            .pext(RCX, RCX, Mem::frame(offset_of!(Frame, sign_mask)));
        self.asm.jrcxz()
    }

    /// Leaves for an offset from the page's start.
    pub(super) fn leave(&mut self, goal: i64, link: Link) {
        let end = self.asm.call();
        self.bind_glue(end, self.request.glue.leave);
        let end = end.0;
        self.ways.push(Way { end, goal, link });
    }

    /// Has a call go to a place in the glue.
    pub(super) fn bind_glue(&mut self, from: Near, place: usize) {
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
        self.slow(from, call, Some(self.asm.at()));
    }

    /// A call of the interpreter at a place, with what it finds noted as it is now.
    pub(super) fn slow(&mut self, from: Near, call: usize, resume: Option<usize>) {
        let resume = resume.map_or(Resume::Behind, Resume::At);
        self.slow.push(Slow {
            from,
            call,
            resume,
            noted: self.noted,
        });
    }

    /// What is behind the trace: ways out, and what is to be stored before calls.
    pub(super) fn finish(&mut self) {
        self.copies = match self.copies {
            Copies::Once => Copies::Once,
            Copies::Warm | Copies::Cold => Copies::Cold,
        };
        let mut leaving = take(&mut self.leaving);
        let mut made: Vec<(Exit, usize)> = Vec::new();
        for (from, exit) in leaving.drain(..) {
            if self.is_plain(exit) {
                self.asm.bind_here(from);
                self.leave(exit.target, Link::Jump(from.0));
                continue;
            }
            match made.iter().find(|(other, _)| *other == exit) {
                Some(&(_, at)) => self.asm.bind(from, at),
                None => {
                    made.push((exit, self.asm.at()));
                    self.asm.bind_here(from);
                    self.go(exit);
                }
            }
        }
        self.leaving = leaving;
        // After the ways out, which may have calls.
        for n in 0..self.slow.len() {
            self.finish_slow(n);
        }
        // The accesses of one instruction may be noted after what it calls besides.
        self.slow.sort_unstable_by_key(|slow| slow.from.0);
    }

    /// Says where a slow path goes, and comes back to; out of line if there is something to store.
    fn finish_slow(&mut self, n: usize) {
        let slow = &self.slow[n];
        let (mut from, noted) = (slow.from, slow.noted);
        let target = match slow.resume {
            Resume::Behind => from.0,
            Resume::At(at) => at,
            Resume::Cold(step) => self.cold.get(step).copied().unwrap_or(from.0),
        };
        if noted != Noted::default() {
            self.asm.make_jump(from);
            self.asm.bind_here(from);
            self.noted = noted;
            self.store_noted();
            from = self.asm.call();
            // For who comes back to where the call was from.
            let back = self.asm.jmp();
            self.asm.bind(back, target);
        }
        let to = match self.calls[self.slow[n].call].work {
            Work::Jump | Work::Goto => self.request.glue.find,
            Work::Sse => self.request.glue.bring_sse,
            Work::Avx => self.request.glue.bring_avx,
            _ => self.request.glue.replay,
        };
        self.bind_glue(from, to);
        self.slow[n].from = from;
        self.slow[n].resume = Resume::At(target);
    }

    /// Whether a way out is but to another trace of the page.
    fn is_plain(&self, exit: Exit) -> bool {
        let other = super::trace::in_page(exit.target).is_some_and(|offset| offset != self.head);
        other
            && !exit.poll
            && !self.request.counted
            && !self.noted_x87
            && exit.noted == Noted::default()
    }

    /// Compiles one instruction; `true` if nothing comes after it.
    pub(super) fn step(&mut self, n: usize, step: &Step, ready: &Ready, bytes: &[u8]) -> bool {
        let before = self.slow.len();
        self.current = n;
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
                done: n + 1,
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
            Ready::System(system) => {
                self.keep_operand(ready.changed());
                self.system(n, step, *system);
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
