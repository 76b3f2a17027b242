//! The compiler: traces of 64-bit guest code become code of the host.
//!
//! ```text
//! run_blocks: block ─ heat ≥ threshold ─▶ Trace (trace.rs) ─▶ compile.rs ─▶ CodeBuffer
//!     │                                                        classify, encoding, asm
//!     └─ block has code ─▶ glue.rs: enter ─▶ trace ─▶ trace ─▶ … ─ leave ─▶ run_blocks
//!                                             │ ▲ linked as they are found
//!                             TLB miss, rare  ▼ │
//!                                       runtime.rs: the interpreter's own op
//! ```
//! The interpreter stays what decides: it decodes, it raises every exception, and what compiled code
//! doesn't have in itself it asks of the interpreter's op for that instruction.

mod access;
mod asm;
mod branch;
mod classify;
mod compile;
mod copy;
mod encoding;
mod forms;
mod glue;
mod loops;
mod perf;
mod places;
mod ready;
mod registers;
mod runtime;
mod trace;
mod windows;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::code::{Block, BlockIndex, BlockRef, Indexer, OpIndex};
use crate::mem::PageState;
use crate::simd::CodeBuffer;
use crate::tuning::Tuning;

use compile::{Compiled, Link, Scratch, Work};
use places::{Placed, Places};

/// Times that a page's code may change before its blocks have to be hotter to be compiled again.
const PATIENCE: u32 = 4;

/// Eighths of [`Tuning::code_bytes`] that compiled code may take; its tables may take one more.
const CODE: usize = 5;

/// A trace that is compiled.
struct Entry {
    /// Its first block, if [`Entry::generation`] is the cache's; else that is gone.
    head: BlockRef,
    generation: u64,
    /// Offset in the page.
    offset: u16,
    /// Its page, as a key of [`Jit::pages`].
    page: usize,
    /// Offsets in the buffer of its code for jumps from elsewhere, and from its page.
    indirect: u32,
    direct: u32,
    /// Ways of other traces that jump here.
    linked: Vec<u32>,
    live: bool,
    /// It is one instruction across two pages.
    crosses: bool,
    /// Number of the first of its calls.
    first_call: u32,
    /// How often accesses that were to share a look into the TLB turned out not to, since when.
    failed: u16,
    since: Option<Instant>,
}

/// A call of the interpreter, packed: there are many.
#[derive(Clone, Copy)]
struct Call {
    /// Where the call ends, in the buffer.
    end: u32,
    /// Where in the cache the instruction's ops are, and its block, as long as that is there.
    op: OpIndex,
    block: BlockIndex,
    /// Offset of the instruction in the page.
    at: u16,
    /// How many ops before it the op of the block is that begins with it; see [`Call::MIDST`].
    back: u16,
    /// Where the trace goes on, from the call's end on.
    resume: i16,
    ops: u8,
    missed: bool,
    work: Work,
}

impl Placed for Call {
    fn place(&self) -> u32 {
        self.end
    }
}

impl Call {
    /// It is in the midst of an op.
    const MIDST: u16 = u16::MAX;
}

const _: () = assert!(size_of::<Call>() == 24);

/// A way out of a trace.
#[derive(Clone, Copy)]
struct Way {
    /// Where the call that leaves ends, in the buffer.
    end: u32,
    /// Where the displacement of the jump ends that may be linked: that call itself, or one that leads
    /// there; 0 for none.
    link: u32,
    /// Offset from the page's start.
    goal: i32,
    trace: u32,
}

impl Placed for Way {
    fn place(&self) -> u32 {
        self.end
    }
}

/// The traces of a page.
#[derive(Default)]
struct PageTraces {
    version: u32,
    traces: Vec<u32>,
    /// How often they were dropped because the page changed.
    changes: u32,
}

/// What the compiler keeps for one processor.
pub(crate) struct Jit {
    tuning: Tuning,
    /// Runs after which a block is compiled.
    threshold: u16,
    /// Counts how often all blocks were forgotten.
    generation: u64,
    /// There may be traces whose blocks are gone.
    orphans: bool,
    /// Number of the first call whose blocks are there.
    first_call: u32,
    /// Counts how often all traces were forgotten.
    clears: u64,
    made: Option<Made>,
    /// Executable memory was refused.
    refused: bool,
    traces: Vec<Entry>,
    calls: Places<Call>,
    ways: Places<Way>,
    pages: HashMap<usize, PageTraces>,
    /// [`crate::mem::code_changes`] that have been dealt with.
    seen: u64,
    /// The way by which compiled code was left last, to be linked.
    pending: Option<u32>,
    /// An indirect jump went where the jump cache has nothing.
    missed_jump: bool,
    /// What it takes to compile, but for the processor's features, when that has been done before.
    scratch: Option<Box<Scratch>>,
    /// By a trace's page and offset, the offsets of instructions that must not open a window.
    plain: HashMap<(usize, usize), Vec<u16>>,
    /// Decoded blocks have to go before anything else is compiled.
    pub(crate) wants_room: bool,
    perf: perf::Map,
}

// SAFETY: the pointers in it are into the code cache of the same processor, which it moves with.
#[expect(unsafe_code, reason = "holds pointers to blocks")]
unsafe impl Send for Jit {}

/// What needs executable memory.
struct Made {
    buffer: CodeBuffer,
    glue: glue::Glue,
    /// Where the buffer's code runs; the glue comes first.
    base: u64,
    /// Bytes of glue.
    glue_len: usize,
}

impl Jit {
    pub(crate) fn new(tuning: Tuning) -> Self {
        Self {
            tuning,
            threshold: tuning.threshold,
            generation: 0,
            orphans: false,
            first_call: 0,
            clears: 0,
            made: None,
            refused: !tuning.compile || !host_can(),
            traces: Vec::new(),
            calls: Places::new(),
            ways: Places::new(),
            pages: HashMap::new(),
            seen: 0,
            pending: None,
            missed_jump: false,
            scratch: None,
            plain: HashMap::new(),
            wants_room: false,
            perf: perf::Map::new(tuning.perf_map),
        }
    }

    /// Whether anything is compiled at all.
    #[inline(always)]
    pub(crate) fn is_on(&self) -> bool {
        !self.refused
    }

    /// The blocks of all traces are gone.
    pub(crate) fn lose_blocks(&mut self) {
        self.generation += 1;
        self.orphans = !self.traces.is_empty();
        self.first_call = self.calls.len() as u32;
    }

    /// Gives a block that has been decoded once more the trace that was made of it before.
    pub(crate) fn adopt(&mut self, block: BlockRef) -> Option<()> {
        if !self.orphans {
            return None;
        }
        // SAFETY: the caller has just made it.
        #[expect(unsafe_code, reason = "looks at a block")]
        let found = unsafe { block.get() };
        let traces = self
            .pages
            .get(&(std::ptr::from_ref(found.page()) as usize))?;
        if !found.is_of(traces.version) {
            return None;
        }
        let number = traces.traces.iter().copied().find(|&number| {
            let entry = &self.traces[number as usize];
            entry.live
                && entry.generation != self.generation
                && usize::from(entry.offset) == found.offset()
                && entry.crosses != found.is_whole()
        })?;
        let entry = self.traces.get_mut(number as usize)?;
        entry.head = block;
        entry.generation = self.generation;
        found.set_code(number + 1);
        Some(())
    }

    /// How hot a block must be.
    #[inline(always)]
    pub(crate) fn threshold(&self) -> u16 {
        self.threshold
    }

    /// Sets how hot a block must be: the less room is left, the hotter, so that what is hottest need not
    /// go for what is lukewarm. Who wants everything compiled gets that.
    fn set_threshold(&mut self) {
        let eighth = self.tuning.code_bytes / 8;
        let sixteenths =
            (self.code_used() * 16 / (eighth * CODE)).max(self.side_tables() * 16 / eighth);
        let factor = match sixteenths {
            _ if self.tuning.threshold == 1 => 1,
            ..9 => 1,
            9..12 => 2,
            12..14 => 4,
            14 => 16,
            _ => 64,
        };
        self.threshold = self
            .tuning
            .threshold
            .saturating_mul(factor)
            .min(u16::MAX - 1);
    }

    /// More than the code of any trace takes.
    pub(crate) const LARGEST: usize = 64 << 10;

    /// Bytes of code.
    pub(crate) fn code_used(&self) -> usize {
        self.made.as_ref().map_or(0, |made| made.buffer.used())
    }

    /// Bytes of code and of what goes with it.
    pub(crate) fn used(&self) -> usize {
        self.code_used() + self.side_tables()
    }

    fn side_tables(&self) -> usize {
        // A way may be noted with the trace that it is linked to.
        self.calls.used()
            + self.ways.used()
            + self.ways.len() * size_of::<u32>()
            + self.traces.len() * (size_of::<Entry>() + size_of::<u32>())
    }

    /// Forgets all traces. Their blocks are gone, or going.
    pub(crate) fn clear(&mut self) {
        self.clears += 1;
        self.orphans = false;
        self.generation += 1;
        self.first_call = 0;
        self.traces.clear();
        self.calls.clear();
        self.ways.clear();
        self.pages.clear();
        self.plain.clear();
        self.pending = None;
        self.missed_jump = false;
        if let Some(made) = &mut self.made {
            made.buffer.reset_to(made.glue_len);
        }
        self.set_threshold();
    }

    /// The same, and gives their memory back.
    pub(crate) fn give_back(&mut self) {
        self.clear();
        self.made = None;
        self.scratch = None;
        self.traces = Vec::new();
        self.calls = Places::new();
        self.ways = Places::new();
        self.pages = HashMap::new();
    }

    fn made(&mut self) -> Option<&mut Made> {
        if self.made.is_none() && !self.refused {
            match Made::new(self.tuning.code_bytes / 8 * CODE) {
                Some(made) => self.made = Some(made),
                None => self.refused = true,
            }
        }
        self.made.as_mut()
    }

    /// Whether compiled code was left, by a call from this address, for a trace that is gone.
    fn is_gone(&self, from: u64) -> bool {
        self.made
            .as_ref()
            .is_some_and(|made| from == made.base + (made.glue.gone + CALL) as u64)
    }

    /// Whether another trace may be added.
    fn has_room(&self) -> bool {
        let code = self
            .made
            .as_ref()
            .is_none_or(|made| made.buffer.has_room(Self::LARGEST));
        code && self.side_tables() < self.tuning.code_bytes / 8
    }

    /// Puts compiled code in its place. `None` if there is no room for it.
    fn add(
        &mut self,
        head: BlockRef,
        page: &PageState,
        version: u32,
        trace: &trace::Trace,
        compiled: &Compiled,
        index: Indexer,
    ) -> Option<u32> {
        let made = self.made.as_mut()?;
        let bytes = compiled.asm.code()?;
        let code = made.buffer.push(bytes)?.as_ptr() as u64;
        let offset = (code - made.base) as u32;
        let number = u32::try_from(self.traces.len()).ok()?;
        self.perf.add(code, bytes.len(), number);
        let first_call = self.calls.len() as u32;
        for slow in &compiled.slow {
            let call = &compiled.calls[slow.call];
            let step = &trace.steps[call.step];
            let end = slow.from.0;
            let resume = slow.resume.unwrap_or(end) as i64 - end as i64;
            self.calls.push(Call {
                end: offset + end as u32,
                op: index.op(step.op),
                block: index.block(step.block),
                at: step.at,
                back: step.back,
                // No trace is longer.
                resume: resume as i16,
                ops: step.ops,
                work: call.work,
                missed: call.missed,
            });
        }
        for way in &compiled.ways {
            let end = offset + way.end as u32;
            self.ways.push(Way {
                end,
                link: match way.link {
                    Link::None => 0,
                    Link::Call => end,
                    Link::Jump(at) => offset + at as u32,
                },
                goal: way.goal as i32,
                trace: number,
            });
        }
        let key = std::ptr::from_ref(page) as usize;
        self.traces.push(Entry {
            head,
            generation: self.generation,
            offset: head_offset(head) as u16,
            page: key,
            indirect: offset,
            direct: offset + compiled.direct as u32,
            linked: Vec::new(),
            live: true,
            crosses: trace.crosses,
            first_call,
            failed: 0,
            since: None,
        });
        let traces = self.pages.entry(key).or_default();
        traces.version = version;
        traces.traces.push(number);
        self.set_threshold();
        Some(number)
    }

    /// Has a way of one trace go straight to another of the same page.
    fn link(&mut self, way: u32, to: u32) {
        let Some(way_) = self.ways.get(way).copied() else {
            return;
        };
        let from = &self.traces[way_.trace as usize];
        let goal = &self.traces[to as usize];
        let good = from.page == goal.page && from.live && goal.live && way_.link != 0;
        let direct = goal.direct;
        if let (true, Some(made)) = (good, &mut self.made) {
            made.link(&way_, Some(direct));
            self.traces[to as usize].linked.push(way);
        }
    }

    /// The way out that compiled code was left by, and its number, from where that was called.
    fn way_from(&self, address: u64) -> Option<(u32, Way)> {
        let number = self.ways.at(self.place(address)?)?;
        Some((number, *self.ways.get(number)?))
    }

    /// The number of the call of the interpreter from there.
    fn call_from(&self, address: u64) -> Option<u32> {
        self.calls.at(self.place(address)?)
    }

    /// Where in the buffer an address of compiled code is.
    fn place(&self, address: u64) -> Option<u32> {
        let made = self.made.as_ref()?;
        address.checked_sub(made.base)?.try_into().ok()
    }

    /// The trace that makes a call.
    fn trace_of(&self, call: u32) -> u32 {
        self.traces
            .partition_point(|entry| entry.first_call <= call)
            .saturating_sub(1) as u32
    }

    /// Whether the blocks of the trace that makes a call are there still.
    fn has_blocks(&self, call: u32) -> bool {
        // The first trace of the present blocks, and whatever was made after it.
        call >= self.first_call
    }

    /// Takes note that a window was not one. If that comes often, the trace is compiled again without
    /// that window.
    fn window_failed(&mut self, call: u32) {
        let number = self.trace_of(call);
        let (Some(entry), Some(call)) =
            (self.traces.get_mut(number as usize), self.calls.get(call))
        else {
            return;
        };
        entry.failed += 1;
        let since = *entry.since.get_or_insert_with(Instant::now);
        if entry.failed < FAILURES {
            return;
        }
        entry.failed = 0;
        entry.since = None;
        if since.elapsed() < OFTEN {
            let key = (entry.page, usize::from(entry.offset));
            self.plain.entry(key).or_default().push(call.at);
            self.drop_trace(number);
        }
    }

    /// The instructions that must not open a window in a trace that begins with this block.
    fn plain(&self, head: &Block) -> &[u16] {
        let key = (std::ptr::from_ref(head.page()) as usize, head.offset());
        self.plain.get(&key).map_or(&[], Vec::as_slice)
    }

    /// Takes a trace out. Jump caches may lead there still, and find that it is gone.
    fn drop_trace(&mut self, number: u32) {
        let Some(entry) = self.traces.get_mut(number as usize) else {
            return;
        };
        if !std::mem::replace(&mut entry.live, false) {
            return;
        }
        let linked = std::mem::take(&mut entry.linked);
        if entry.generation == self.generation {
            forget_code(entry.head);
        }
        if let Some(made) = &mut self.made {
            for way in linked {
                if let Some(way) = self.ways.get(way) {
                    made.link(way, None);
                }
            }
            made.bury(entry.indirect);
        }
    }

    /// Whether a page has traces of another version than this.
    fn has_others(&self, page: usize, version: u32) -> bool {
        self.pages
            .get(&page)
            .is_some_and(|page| page.version != version && !page.traces.is_empty())
    }

    /// Drops the traces of a page if it has changed. Says how many those were.
    fn drop_changed(&mut self, page: usize) -> usize {
        let Some(traces) = self.pages.get_mut(&page) else {
            return 0;
        };
        if page_version(page) == traces.version || traces.traces.is_empty() {
            return 0;
        }
        traces.changes += 1;
        let dropped = std::mem::take(&mut traces.traces);
        for &number in &dropped {
            self.drop_trace(number);
        }
        dropped.len()
    }
}

/// Windows that aren't ones, and the time in which they come, before a trace is compiled without: when
/// what they cost is no more than a hundredth of that, the others are worth it.
const FAILURES: u16 = 64;
const OFTEN: Duration = Duration::from_millis(5);
/// Bytes of a near call, or of a jump.
const CALL: usize = 5;

/// Whether the host has the instructions that traces are made with.
fn host_can() -> bool {
    std::arch::is_x86_feature_detected!("bmi2")
}

#[expect(unsafe_code, reason = "looks at a block")]
fn head_offset(head: BlockRef) -> usize {
    // SAFETY: traces go when their blocks go.
    unsafe { head.get() }.offset()
}

#[expect(unsafe_code, reason = "looks at a block")]
fn forget_code(head: BlockRef) {
    // SAFETY: traces go when their blocks go.
    let head = unsafe { head.get() };
    head.set_code(0);
    // It has to show once more that it is hot.
    head.set_heat(0);
}

#[expect(unsafe_code, reason = "looks at a page's state by its address")]
fn page_version(page: usize) -> u32 {
    // SAFETY: keys are the addresses of page states; all are forgotten with the memory map that
    // has them.
    unsafe { &*(page as *const PageState) }.version()
}

impl Made {
    fn new(capacity: usize) -> Option<Self> {
        let mut buffer = CodeBuffer::new(capacity).ok()?;
        let (code, glue) = glue::glue(std::arch::is_x86_feature_detected!("avx"));
        let base = buffer.push(&code)?.as_ptr() as u64;
        Some(Self {
            buffer,
            glue,
            base,
            glue_len: code.len(),
        })
    }

    /// Has whoever jumps to an offset leave compiled code instead.
    fn bury(&mut self, at: u32) {
        let distance = self.glue.gone as i32 - (at as i32 + CALL as i32);
        let [a, b, c, d] = distance.to_le_bytes();
        // JMP.
        self.buffer.write(at as usize, &[0xe9, a, b, c, d]);
    }

    /// Has a way lead to an offset, or out again.
    fn link(&mut self, way: &Way, to: Option<u32>) {
        let own = way.link == way.end;
        let to = to.unwrap_or(match own {
            true => self.glue.leave as u32,
            // The call that leaves.
            false => way.end - CALL as u32,
        });
        let distance = to.wrapping_sub(way.link).to_le_bytes();
        let end = way.link as usize;
        self.buffer.write(end - distance.len(), &distance);
        if own {
            let opcode = if to == self.glue.leave as u32 {
                0xe8
            } else {
                0xe9
            };
            self.buffer.write(end - CALL, &[opcode]);
        }
    }
}
