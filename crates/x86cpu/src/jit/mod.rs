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
mod enter;
mod glue;
mod perf;
mod ready;
mod registers;
mod runtime;
mod system;
mod trace;
mod windows;

use std::collections::{HashMap, HashSet};

use crate::code::{Block, BlockIndex, BlockRef, Indexer, OpIndex};
use crate::mem::{PAGE_SIZE, PageState};
use crate::simd::CodeBuffer;
use crate::tuning::Tuning;

use compile::{Compiled, Work};

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
    /// Offset in the buffer of what is known of an instruction across two pages; 0 for nothing.
    guard: u32,
    /// Number of the first of its calls.
    first_call: u32,
    /// How often accesses that were to share a look into the TLB turned out not to.
    failed: u16,
}

/// A call of the interpreter, packed: there are many.
#[derive(Clone, Copy)]
struct Call {
    /// Where in the cache the instruction's ops are, and its block, as long as that is there.
    op: OpIndex,
    block: BlockIndex,
    /// Offset of the instruction in the page.
    at: u16,
    /// How many ops before it the op of the block is that begins with it; see [`Call::MIDST`].
    back: u16,
    ops: u8,
    missed: bool,
    work: Work,
}

impl Call {
    /// It is in the midst of an op.
    const MIDST: u16 = u16::MAX;
}

const _: () = assert!(size_of::<Call>() == 20);

/// A way out of a trace.
#[derive(Clone, Copy)]
struct Way {
    /// Offset from the page's start.
    goal: i32,
    /// Offset in the buffer where the jump's displacement ends that may be linked; 0 for none.
    link: u32,
    trace: u32,
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
    calls: Vec<Call>,
    ways: Vec<Way>,
    pages: HashMap<usize, PageTraces>,
    /// [`crate::mem::code_changes`] that have been dealt with.
    seen: u64,
    /// The way by which compiled code was left last, to be linked.
    pending: Option<u32>,
    /// An indirect jump went where the jump cache has nothing.
    missed_jump: bool,
    bytes: Option<Box<[u8; PAGE_SIZE]>>,
    /// Pages and offsets of traces without windows.
    plain: HashSet<(usize, usize)>,
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
            calls: Vec::new(),
            ways: Vec::new(),
            pages: HashMap::new(),
            seen: 0,
            pending: None,
            missed_jump: false,
            bytes: None,
            plain: HashSet::new(),
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
        let key = std::ptr::from_ref(found.page()) as usize;
        let traces = self.pages.get(&key)?;
        if !found.is_of(traces.version) {
            return None;
        }
        let number = traces.traces.iter().copied().find(|&number| {
            let entry = &self.traces[number as usize];
            entry.live
                && entry.page == key
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
        self.calls.len() * size_of::<Call>()
            + self.ways.len() * (size_of::<Way>() + size_of::<u32>())
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
        self.traces = Vec::new();
        self.calls = Vec::new();
        self.ways = Vec::new();
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
        pages: [Option<(&PageState, u32)>; 2],
        trace: &trace::Trace,
        compiled: &Compiled,
        index: Indexer,
    ) -> Option<u32> {
        let made = self.made.as_mut()?;
        let code = made.buffer.push(&compiled.bytes)?.as_ptr() as u64;
        let offset = (code - made.base) as u32;
        let number = u32::try_from(self.traces.len()).ok()?;
        self.perf.add(code, compiled.bytes.len(), number);
        let first_call = self.calls.len() as u32;
        self.calls.extend(compiled.calls.iter().map(|call| {
            let step = &trace.steps[call.step];
            Call {
                op: index.op(step.op),
                block: index.block(step.block),
                at: step.at,
                back: step.back,
                ops: step.ops,
                work: call.work,
                missed: call.missed,
            }
        }));
        self.ways.extend(compiled.ways.iter().map(|way| Way {
            goal: way.goal as i32,
            link: way.link.map_or(0, |at| offset + at as u32),
            trace: number,
        }));
        let key = std::ptr::from_ref(pages[0]?.0) as usize;
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
            guard: compiled.guard.map_or(0, |at| offset + at as u32),
            first_call,
            failed: 0,
        });
        // It goes when either page changes.
        for (page, version) in pages.into_iter().flatten() {
            let key = std::ptr::from_ref(page) as usize;
            let traces = self.pages.entry(key).or_default();
            traces.version = version;
            traces.traces.push(number);
        }
        self.set_threshold();
        Some(number)
    }

    /// Has a way of one trace go straight to another of the same page.
    fn link(&mut self, way: u32, to: u32) {
        let Some(from) = self.ways.get(way as usize).copied() else {
            return;
        };
        let same_page = self.traces[from.trace as usize].page == self.traces[to as usize].page;
        let live = self.traces[from.trace as usize].live && self.traces[to as usize].live;
        if let (link @ 1.., true, Some(made)) = (from.link, same_page && live, &mut self.made) {
            let distance = i64::from(self.traces[to as usize].direct) - i64::from(link);
            made.patch(link, distance as i32);
            self.traces[to as usize].linked.push(way);
        }
    }

    /// Has the trace that makes a call take its instruction across two pages for what it was, at an
    /// address and under what [`crate::mem::Mmu::code_key`] says.
    fn vouch(&mut self, call: u32, linear: u64, key: u64) {
        let number = self.trace_of(call) as usize;
        if let (Some(entry), Some(made)) = (self.traces.get(number), &mut self.made)
            && entry.guard != 0
            && entry.live
        {
            let words = [linear.wrapping_neg(), key.wrapping_neg()];
            let at = entry.guard as usize;
            made.buffer
                .write(at, words.map(u64::to_le_bytes).as_flattened());
        }
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

    /// Takes note that a window was not one. If that comes often, the trace is compiled again without.
    fn window_failed(&mut self, call: u32) {
        let number = self.trace_of(call);
        let Some(entry) = self.traces.get_mut(number as usize) else {
            return;
        };
        entry.failed += 1;
        if entry.failed == FAILURES {
            self.plain.insert((entry.page, usize::from(entry.offset)));
            self.drop_trace(number);
        }
    }

    /// Whether a trace that begins with this block must not have windows.
    fn is_plain(&self, head: &Block) -> bool {
        self.plain
            .contains(&(std::ptr::from_ref(head.page()) as usize, head.offset()))
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
                made.patch(self.ways[way as usize].link, 0);
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

/// Windows that aren't ones before a trace is compiled without.
const FAILURES: u16 = 16;
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
        let distance = self.glue.gone as i32 - (at as i32 + 5);
        let [a, b, c, d] = distance.to_le_bytes();
        // JMP.
        self.buffer.write(at as usize, &[0xe9, a, b, c, d]);
    }

    /// Writes the displacement of a jump that ends at an offset.
    fn patch(&mut self, end: u32, distance: i32) {
        self.buffer.write(end as usize - 4, &distance.to_le_bytes());
    }
}
