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
mod forms;
mod glue;
mod loops;
mod perf;
mod places;
mod ready;
mod registers;
mod runtime;
mod system;
mod trace;
mod windows;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::{Duration, Instant};

use crate::code::{Block, BlockIndex, BlockRef, Indexer, Op};
use crate::mem::PageState;
use crate::simd::CodeBuffer;
use crate::tuning::Tuning;

use compile::{Compiled, Link, Resume, Scratch, Work};
use places::{Placed, Places};

/// Times that a page's code may change before its blocks have to be hotter to be compiled again.
const PATIENCE: u32 = 4;

/// Eighths of [`Tuning::code_bytes`] that compiled code may take, and its tables.
const CODE: usize = 4;
const TABLES: usize = 2;

/// A trace that is compiled.
struct Entry {
    /// Its first block, if [`Entry::generation`] is the cache's; else that is gone.
    head: BlockRef,
    /// Its page, as a key of [`Jit::pages`].
    page: usize,
    generation: u32,
    /// Offsets in the buffer of its code for jumps from elsewhere, and from its page.
    indirect: u32,
    direct: u32,
    /// The last way of another trace that was linked to it; see [`Way::next`].
    linked: u32,
    /// Number of the first of its calls.
    first_call: u32,
    /// Offset in the page.
    offset: u16,
    live: bool,
    /// It is one instruction across two pages.
    crosses: bool,
    /// Offset in the buffer of what is known of an instruction across two pages; 0 for nothing.
    guard: u32,
}

const _: () = assert!(size_of::<Entry>() == 48);

/// A call of the interpreter.
#[derive(Clone, Copy)]
struct Call {
    /// Where in the cache the instruction's ops are, and its block, as long as that is there.
    op: *const Op,
    block: BlockRef,
    /// Offset of the instruction in the page.
    at: u16,
    ops: u8,
    missed: bool,
    work: Work,
}

/// The same as it is kept: there are many.
struct PackedCall {
    /// Where the call ends, in the buffer.
    end: u32,
    block: BlockIndex,
    /// Its op, from the block on.
    op: u16,
    at: u16,
    /// Where the trace goes on, from the call's end on.
    resume: i16,
    work: u16,
    ops: u8,
    missed: bool,
}

const _: () = assert!(size_of::<PackedCall>() == 20);

impl PackedCall {
    fn unpack(&self, index: Indexer) -> Call {
        Call {
            op: index.op_in(self.block, self.op),
            block: index.block_at(self.block),
            at: self.at,
            ops: self.ops,
            missed: self.missed,
            work: Work::unpack(self.work),
        }
    }
}

impl Placed for PackedCall {
    fn place(&self) -> u32 {
        self.end
    }
}

/// A way out of a trace.
struct Way {
    /// Where the call that leaves ends, in the buffer.
    end: u32,
    trace: u32,
    /// The next way that is linked to the same trace, or one of the constants.
    next: u32,
    /// What may be linked: a jump whose displacement ends so many bytes before; 0 is the call itself.
    link: u16,
    /// Offset from the page's start.
    goal: i16,
}

const _: () = assert!(size_of::<Way>() == 16);

impl Way {
    /// It has no link.
    const NO_LINK: u16 = u16::MAX;
    /// It is the last that is linked to a trace, or isn't linked.
    const LAST: u32 = u32::MAX;
    const UNLINKED: u32 = u32::MAX - 1;
}

impl Placed for Way {
    fn place(&self) -> u32 {
        self.end
    }
}

/// How often a window wasn't one, and since when.
struct Failures {
    count: u16,
    since: Instant,
}

/// The traces of a page.
#[derive(Default)]
struct PageTraces {
    version: u32,
    /// Their numbers, with [`Entry::offset`] of each.
    traces: Vec<(u32, u16)>,
    /// How often they were dropped because the page changed.
    changes: u32,
}

/// What the compiler keeps for one processor.
pub(crate) struct Jit {
    tuning: Tuning,
    /// Runs after which a block is compiled.
    threshold: u16,
    /// Counts how often all blocks were forgotten.
    generation: u32,
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
    calls: Places<PackedCall>,
    /// Where instructions are counted: how many a trace has run before a call, that it hasn't counted.
    counts: Option<Vec<u16>>,
    ways: Places<Way>,
    pages: ByAddress<usize, PageTraces>,
    /// [`crate::mem::code_changes`] that have been dealt with.
    seen: u64,
    /// The way by which compiled code was left last, to be linked.
    pending: Option<u32>,
    /// An indirect jump went where the jump cache has nothing.
    missed_jump: bool,
    /// What it takes to compile, but for the processor's features, when that has been done before.
    scratch: Option<Box<Scratch>>,
    /// By a trace's page and offset, the offsets of instructions that must not open a window.
    plain: ByAddress<(usize, usize), Vec<u16>>,
    /// By the call that looks for the window.
    failures: ByAddress<u32, Failures>,
    /// Decoded blocks have to go before anything else is compiled.
    pub(crate) wants_room: bool,
    perf: perf::Map,
}

// SAFETY: the pointers in it are into the code cache of the same processor, which it moves with.
#[expect(unsafe_code, reason = "holds pointers to blocks")]
unsafe impl Send for Jit {}

/// A table by addresses of this process and the like, which no guest chooses.
type ByAddress<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// Spreads the bits of addresses.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_usize(usize::from(byte));
        }
    }

    fn write_u32(&mut self, part: u32) {
        self.write_usize(part as usize);
    }

    fn write_usize(&mut self, part: usize) {
        let mixed = (self.0 ^ part as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }
}

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
        let mut jit = Self {
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
            counts: None,
            ways: Places::new(),
            pages: ByAddress::default(),
            seen: 0,
            pending: None,
            missed_jump: false,
            scratch: None,
            plain: ByAddress::default(),
            failures: ByAddress::default(),
            wants_room: false,
            perf: perf::Map::new(tuning.perf_map),
        };
        jit.set_threshold();
        jit
    }

    /// Whether anything is compiled at all.
    #[inline(always)]
    pub(crate) fn is_on(&self) -> bool {
        !self.refused
    }

    /// The blocks of all traces are gone.
    pub(crate) fn lose_blocks(&mut self) {
        self.generation = self.generation.wrapping_add(1);
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
        let (number, _) = traces.traces.iter().copied().find(|&(number, offset)| {
            usize::from(offset) == found.offset() && {
                let entry = &self.traces[number as usize];
                entry.live
                    && entry.page == key
                    && entry.generation != self.generation
                    && entry.crosses != found.is_whole()
            }
        })?;
        let entry = self.traces.get_mut(number as usize)?;
        entry.head = block;
        entry.generation = self.generation;
        found.set_code(number + 1);
        Some(())
    }

    /// Whether so much room is taken that blocks have to be hotter than at first.
    pub(crate) fn is_filling(&self) -> bool {
        self.sixteenths() >= 9
    }

    fn sixteenths(&self) -> usize {
        let eighth = self.tuning.code_bytes / 8;
        (self.code_used() * 16 / (eighth * CODE)).max(self.side_tables() * 16 / (eighth * TABLES))
    }

    /// Has more room from here on. There must be no traces.
    pub(crate) fn grow(&mut self, code_bytes: usize) {
        self.tuning.code_bytes = code_bytes;
        self.tuning.small = false;
        self.made = None;
        self.set_threshold();
    }

    /// How hot a block must be.
    #[inline(always)]
    pub(crate) fn threshold(&self) -> u16 {
        self.threshold
    }

    /// Sets how hot a block must be: the less room is left, the hotter, so that what is hottest need not
    /// go for what is lukewarm; and hotter at first, for most commands are over soon. Who wants everything
    /// compiled gets that.
    fn set_threshold(&mut self) {
        let factor = match self.sixteenths() {
            _ if self.tuning.threshold == 1 => 1,
            ..9 if self.traces.len() < VERY_FIRST => 32,
            ..9 if self.traces.len() < FIRST => 4,
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
        self.calls.used()
            + self.ways.used()
            + self.traces.len() * (size_of::<Entry>() + size_of::<(u32, u16)>())
    }

    /// Forgets all traces. Their blocks are gone, or going.
    pub(crate) fn clear(&mut self) {
        self.clears += 1;
        self.orphans = false;
        self.generation = self.generation.wrapping_add(1);
        self.first_call = 0;
        self.traces.clear();
        self.calls.clear();
        if let Some(counts) = &mut self.counts {
            counts.clear();
        }
        self.ways.clear();
        self.pages.clear();
        self.plain.clear();
        self.failures.clear();
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
        self.counts = self.counts.take().map(|_| Vec::new());
        self.ways = Places::new();
        self.pages = ByAddress::default();
    }

    fn made(&mut self) -> Option<&mut Made> {
        if self.made.is_none() && !self.refused {
            match Made::new(self.tuning.code_bytes / 8 * CODE, self.tuning.small) {
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
        code && self.side_tables() < self.tuning.code_bytes / 8 * TABLES
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
            let resume = match slow.resume {
                Resume::At(at) => at as i64 - end as i64,
                _ => 0,
            };
            if let Some(counts) = &mut self.counts {
                counts.push(match call.work {
                    // What comes before has been counted already.
                    Work::Goto => 0,
                    _ => call.step as u16,
                });
            }
            self.calls.push(PackedCall {
                end: offset + end as u32,
                block: index.block(step.block),
                op: index.op(step.block, step.op),
                at: step.at,
                // No trace is longer.
                resume: resume as i16,
                work: call.work.pack(),
                ops: step.ops,
                missed: call.missed,
            });
        }
        for way in &compiled.ways {
            self.ways.push(Way {
                end: offset + way.end as u32,
                trace: number,
                next: Way::UNLINKED,
                link: match way.link {
                    Link::None => Way::NO_LINK,
                    Link::Call => 0,
                    Link::Jump(at) => (way.end - at) as u16,
                },
                goal: way.goal as i16,
            });
        }
        let key = std::ptr::from_ref(pages[0]?.0) as usize;
        self.traces.push(Entry {
            head,
            page: key,
            generation: self.generation,
            indirect: offset,
            direct: offset + compiled.direct as u32,
            linked: Way::LAST,
            first_call,
            offset: head_offset(head) as u16,
            live: true,
            crosses: pages[1].is_some(),
            guard: compiled.guard.map_or(0, |at| offset + at as u32),
        });
        // It goes when either page changes.
        for (page, version) in pages.into_iter().flatten() {
            let key = std::ptr::from_ref(page) as usize;
            let traces = self.pages.entry(key).or_default();
            traces.version = version;
            traces.traces.push((number, head_offset(head) as u16));
        }
        self.set_threshold();
        Some(number)
    }

    /// Has a way of one trace go straight to another of the same page.
    fn link(&mut self, way: u32, to: u32) {
        let (Some(found), Some(made)) = (self.ways.get_mut(way), &mut self.made) else {
            return;
        };
        let from = &self.traces[found.trace as usize];
        let goal = &self.traces[to as usize];
        let good = from.page == goal.page && from.live && goal.live;
        if good && found.link != Way::NO_LINK && found.next == Way::UNLINKED {
            made.link(found, Some(goal.direct));
            found.next = std::mem::replace(&mut self.traces[to as usize].linked, way);
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

    /// The way out that compiled code was left by, and its number, from where that was called.
    fn way_from(&self, address: u64) -> Option<(u32, &Way)> {
        let number = self.ways.at(self.place(address)?)?;
        Some((number, self.ways.get(number)?))
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

    /// How many instructions a trace has run before a call, that it hasn't counted.
    fn counted_before(&self, call: u32) -> u64 {
        let counts = self.counts.as_ref();
        let before = counts.and_then(|counts| counts.get(call as usize));
        before.copied().unwrap_or_default().into()
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
        if self.failures.len() > COUNTED {
            self.failures.clear();
        }
        let failures = self.failures.entry(call).or_insert_with(|| Failures {
            count: 0,
            since: Instant::now(),
        });
        failures.count += 1;
        if failures.count < FAILURES {
            return;
        }
        let often = failures.since.elapsed() < OFTEN;
        self.failures.remove(&call);
        let number = self.trace_of(call);
        let (true, Some(entry), Some(call)) = (
            often,
            self.traces.get(number as usize),
            self.calls.get(call),
        ) else {
            return;
        };
        let key = (entry.page, usize::from(entry.offset));
        self.plain.entry(key).or_default().push(call.at);
        self.drop_trace(number);
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
        let mut linked = std::mem::replace(&mut entry.linked, Way::LAST);
        if entry.generation == self.generation {
            forget_code(entry.head);
        }
        if let Some(made) = &mut self.made {
            while let Some(way) = self.ways.get_mut(linked) {
                made.link(way, None);
                linked = std::mem::replace(&mut way.next, Way::UNLINKED);
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
        for &(number, _) in &dropped {
            self.drop_trace(number);
        }
        dropped.len()
    }
}

/// Traces that are made before the processor takes what it runs for something that goes on.
const FIRST: usize = 1024;
/// Those before which nothing is compiled but what is by far the hottest.
const VERY_FIRST: usize = 48;

/// Windows that aren't ones, and the time in which they come, before a trace is compiled without: when
/// what they cost is no more than a hundredth of that, the others are worth it.
const FAILURES: u16 = 64;
const OFTEN: Duration = Duration::from_millis(5);
/// Windows whose failures are counted at a time.
const COUNTED: usize = 4096;
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
    fn new(capacity: usize, small: bool) -> Option<Self> {
        let buffer = if small {
            CodeBuffer::small(capacity)
        } else {
            CodeBuffer::new(capacity)
        };
        let mut buffer = buffer.ok()?;
        let (code, glue) = glue::glue(std::arch::is_x86_feature_detected!("avx"));
        let base = buffer.push(&code)?.as_ptr() as u64;
        Some(Self {
            buffer,
            glue,
            base,
            glue_len: code.len(),
        })
    }

    /// Has a way lead to an offset, or out again.
    fn link(&mut self, way: &Way, to: Option<u32>) {
        let end = way.end as usize;
        let (own, jump) = (way.link == 0, end - usize::from(way.link));
        let out = if own {
            self.glue.leave
        } else {
            // The call that leaves.
            end - CALL
        };
        let distance = to.map_or(out, |to| to as usize).wrapping_sub(jump) as u32;
        let distance = distance.to_le_bytes();
        self.buffer.write(jump - distance.len(), &distance);
        if own {
            let opcode = if to.is_some() { 0xe9 } else { 0xe8 };
            self.buffer.write(end - CALL, &[opcode]);
        }
    }

    /// Has whoever jumps to an offset leave compiled code instead.
    fn bury(&mut self, at: u32) {
        let distance = self.glue.gone as i32 - (at as i32 + CALL as i32);
        let [a, b, c, d] = distance.to_le_bytes();
        // JMP.
        self.buffer.write(at as usize, &[0xe9, a, b, c, d]);
    }
}
