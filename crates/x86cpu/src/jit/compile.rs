//! From a trace to machine code.
//!
//! The guest's instructions are the host's: most are copied with other registers, and memory
//! operands that go through the TLB. The guest's flags are the host's; nothing that is emitted
//! between the guest's instructions changes them.

use std::mem::offset_of;

use super::asm::{Asm, Mem, Near, R11, RCX};
use super::ready::Ready;
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

/// One way out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    /// Offset from the page's start.
    pub goal: i64,
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
    /// Offset of the words of [`Compiler::guard`].
    pub guard: Option<usize>,
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

/// A jump to the slow path of an access, and the call that is made there.
pub(super) struct Slow {
    pub(super) from: Near,
    pub(super) call: u32,
    /// Where to go on; `None` while the instruction isn't complete.
    pub(super) resume: Option<usize>,
}

pub(super) struct Compiler<'a> {
    pub(super) asm: Asm,
    pub(super) request: Request<'a>,
    pub(super) calls: Vec<Call>,
    pub(super) ways: Vec<Way>,
    pub(super) slow: Vec<Slow>,
    /// Jumps out, each with its way.
    pub(super) leaving: Vec<(Near, Exit)>,
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
    pub(super) sse: bool,
    pub(super) avx: bool,
    pub(super) x87: bool,
}

/// A way out in the making: where to, and whether to look for requests first.
#[derive(Clone, Copy)]
pub(super) struct Exit {
    pub(super) target: i64,
    pub(super) poll: bool,
}

/// A trace for a block that is one instruction across two pages. What the second one is depends on how
/// it is mapped, which the interpreter looks at, and vouches for until mappings change.
pub(super) fn crossing(
    trace: &Trace,
    bytes: Option<&[u8]>,
    request: Request<'_>,
) -> Option<Compiled> {
    let step = trace.steps.first()?;
    let mut c = Compiler::new(step.at, request);
    let ready = bytes.map(|bytes| (bytes, Ready::crossing(step, bytes, request.features)));
    c.entry();
    let call = c.call(Work::Cross, 0, false);
    let mut words = Vec::new();
    if let Some((bytes, ready)) = ready
        && !matches!(ready, Ready::Interpret { .. })
    {
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
    let mut done = c.done();
    if !words.is_empty() {
        done.guard = Some(done.bytes.len());
        for (n, word) in words.into_iter().enumerate() {
            let distance = (done.bytes.len() + 8 * n) as i32 - word as i32;
            done.bytes[word - 4..word].copy_from_slice(&distance.to_le_bytes());
        }
        done.bytes.extend([0; 16]);
    }
    Some(done)
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
        }
    }

    fn done(mut self) -> Compiled {
        self.finish();
        Compiled {
            bytes: self.asm.bytes,
            direct: self.direct,
            calls: self.calls,
            ways: self.ways,
            guard: None,
        }
    }

    /// Jumps through the jump cache come here, with the target in R11.
    pub(super) fn entry(&mut self) {
        let head = i32::from(self.head);
        self.asm.lea(R11, Mem::base(R11, -head));
        self.asm.store(Mem::frame(offset_of!(Frame, rip_page)), R11);
        self.poll(i64::from(head));
        self.direct = self.asm.at();
    }

    /// Goes on only if the instruction is what the interpreter last vouched for: minus its linear address
    /// and minus the key are in two words behind the code. Gives where the displacements of those
    /// end, and the jumps for when it isn't.
    fn guard(&mut self) -> (Vec<usize>, Vec<Near>) {
        let (mut words, mut unsure) = (Vec::new(), Vec::new());
        let fields = [
            (offset_of!(Frame, rip_page), i32::from(self.head)),
            (offset_of!(Frame, cross_key), 0),
        ];
        for (field, added) in fields {
            self.asm.load(R11, Mem::frame(field));
            self.asm.load_relative(RCX);
            words.push(self.asm.at());
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
        let way = self.way(target, None);
        self.leave(way | POLLED);
        self.asm.here(quiet);
    }

    pub(super) fn way(&mut self, goal: i64, link: Option<usize>) -> u32 {
        self.ways.push(Way { goal, link });
        self.request.first_way + self.ways.len() as u32 - 1
    }

    pub(super) fn leave(&mut self, way: u32) {
        self.asm.constant32(RCX, way);
        self.asm.jmp_memory(Mem::frame(offset_of!(Frame, leave)));
    }

    pub(super) fn call(&mut self, work: Work, step: usize, missed: bool) -> u32 {
        self.calls.push(Call { work, step, missed });
        self.request.first_call + self.calls.len() as u32 - 1
    }

    /// Calls the interpreter here and now.
    pub(super) fn interpret(&mut self, call: u32) {
        self.asm.constant32(RCX, call);
        self.asm.call_memory(Mem::frame(offset_of!(Frame, replay)));
    }

    /// The same for what has to be done first: vector registers are not the interpreter's to bring.
    fn slow_call(&mut self, call: u32) {
        let number = (call - self.request.first_call) as usize;
        let field = match self.calls[number].work {
            Work::Sse => offset_of!(Frame, bring_sse),
            Work::Avx => offset_of!(Frame, bring_avx),
            _ => return self.interpret(call),
        };
        self.asm.constant32(RCX, call);
        self.asm.call_memory(Mem::frame(field));
    }

    /// What is behind the trace: slow paths and ways out.
    pub(super) fn finish(&mut self) {
        for slow in std::mem::take(&mut self.slow) {
            self.asm.bind_here(slow.from);
            self.slow_call(slow.call);
            let back = self.asm.jmp();
            self.asm.bind(back, slow.resume.unwrap_or(slow.from.0));
        }
        for (from, exit) in std::mem::take(&mut self.leaving) {
            self.asm.bind_here(from);
            self.go(exit);
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

    pub(super) fn one(&mut self, n: usize, step: &Step, ready: &Ready, bytes: &[u8]) -> bool {
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
            Ready::System(system) => self.system(n, step, *system),
            Ready::Copy(copy) => {
                let at = usize::from(step.at);
                self.copy(n, step, copy, &bytes[at..at + step.instruction.len()]);
            }
        }
        false
    }
}
