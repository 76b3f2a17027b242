//! Blocks of ops and where to find them: by guest-physical address and mode, and, in front of
//! that, by linear address.
//!
//! ```text
//! jumps: linear address, context ─┐
//! directory: page ─▶ granule ─────┼─▶ block │ op │ op │ … │ parts of fused ops ┃ block │ …
//! links of other blocks ──────────┘
//! ```
#![expect(
    unsafe_code,
    reason = "blocks lie in an arena with their ops, and refer to each other by pointers"
)]

use std::cell::Cell;
use std::ptr::{self, NonNull};

use crate::code::arena::{Arena, UNIT, populate};
use crate::code::directory::{Directory, List, Lists, granule};
use crate::code::found::Found;
use crate::code::fuse::Lowered;
use crate::code::lower::no_forms;
use crate::code::op::Op;
use crate::code::pool::Pool;
use crate::cpu::{Cpu, seg};
use crate::cpuid::Features;
use crate::jit::Jit;
use crate::mem::home::{Home, Table, Zeroed};
use crate::mem::{PAGE_MASK, PAGE_SHIFT, PageState, code_changes};
use crate::simd::fused::FusedCode;
use crate::tuning::{Counters, Tuning};

/// The most and the least that decoded blocks may take of [`Tuning::code_bytes`], in eighths. Between
/// them it depends on what compiled code leaves.
const MOST: usize = 5;
const LEAST: usize = 2;
/// What decoded blocks and compiled code may take together, in eighths: the rest is for tables.
const BOTH: usize = 6;
/// More than any block takes.
const LARGEST: usize = 64 << 10;
/// Bytes of blocks that an idle guest, which runs little but its timers, doesn't come to.
const MUCH: usize = 1 << 20;
/// Bytes of blocks from which on a guest is taken to run on for a while, and to need its tables.
const SOME: usize = 192 << 10;
/// Entries of the jump cache; of a processor that begins small.
const JUMPS: usize = 1 << 14;
const FEW_JUMPS: usize = 1 << 8;
/// Ops that run one after the other, right behind this in memory.
#[repr(C)]
pub(crate) struct Block {
    /// [`code_changes`] when it was last found current.
    checked: Cell<u64>,
    /// Number of its trace plus one; 0 for none.
    code: Cell<u32>,
    /// How often it has been run.
    heat: Cell<u16>,
    /// Ops that run one after the other.
    main: u16,
    /// Where control goes from here, within the same page; by distance of RIP from the start.
    links: [Cell<Option<BlockRef>>; 2],
    page: NonNull<PageState>,
    deltas: [Cell<i16>; 2],
    version: u32,
    /// The next in the list of its granule; 0 for none.
    next: Cell<u32>,
    /// Bytes of all ops.
    all: u16,
    /// Instructions.
    pub count: u16,
    /// Bytes.
    pub len: u16,
    /// Offset in the page.
    offset: u16,
    /// Bits of its key beside the address.
    bits: u16,
    /// Ends in a way that can't change mode, privilege or mapping.
    pub linkable: bool,
    /// Is an instruction that goes on in a second page: a [`Second`] is behind the ops.
    crosses: bool,
}

const _: () = assert!(size_of::<Block>() == 64 && align_of::<Block>() <= UNIT);
const _: () = assert!(size_of::<Op>().is_multiple_of(8) && align_of::<Op>() <= 8);
const _: () = assert!(align_of::<Second>() <= 8);

/// The second page of an instruction that crosses: its address, state and version.
#[derive(Clone, Copy)]
struct Second {
    gpa: u64,
    page: NonNull<PageState>,
    version: u32,
}

/// A block in the arena: good until [`CodeCache::clear`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockRef(NonNull<Block>);

impl BlockRef {
    /// The block.
    ///
    /// # Safety
    ///
    /// [`CodeCache::clear`] has not been called since this was handed out.
    #[inline(always)]
    pub(crate) unsafe fn get<'a>(self) -> &'a Block {
        // SAFETY: the arena keeps blocks in place until it is cleared.
        unsafe { self.0.as_ref() }
    }
}

impl Block {
    /// First op.
    #[inline(always)]
    pub(crate) fn ops(&self) -> *const Op {
        // SAFETY: the ops are behind the block, in the same piece of the arena.
        unsafe { ptr::from_ref(self).add(1).cast() }
    }

    /// Past the last op that runs.
    #[inline(always)]
    pub(crate) fn end(&self) -> *const Op {
        // SAFETY: there are as many ops behind the block.
        unsafe { self.ops().add(usize::from(self.main)) }
    }

    /// Offset in the page.
    pub(crate) fn offset(&self) -> usize {
        usize::from(self.offset)
    }

    /// Its page.
    pub(crate) fn page(&self) -> &PageState {
        // SAFETY: the memory map that has the page is kept until the cache is cleared.
        unsafe { self.page.as_ref() }
    }

    /// Whether it is within its page, and ends where blocks end.
    pub(crate) fn is_whole(&self) -> bool {
        !self.crosses && !self.is_one()
    }

    /// Number of the trace that starts with it, plus one; 0 for none.
    #[inline(always)]
    pub(crate) fn code(&self) -> u32 {
        self.code.get()
    }

    /// Sets it.
    pub(crate) fn set_code(&self, code: u32) {
        self.code.set(code);
    }

    /// How often it has been run, about.
    pub(crate) fn heat(&self) -> u16 {
        self.heat.get()
    }

    /// Sets it; [`u16::MAX`] is for what must not be compiled.
    pub(crate) fn set_heat(&self, heat: u16) {
        self.heat.set(heat);
    }

    /// Counts so many more runs. Whether that makes it, or it was, so hot, and it may be compiled.
    #[inline(always)]
    pub(crate) fn warms_to(&self, threshold: u16, runs: u16) -> bool {
        let mut heat = self.heat.get();
        if heat < u16::MAX - 1 {
            heat = heat.saturating_add(runs).min(u16::MAX - 1);
            self.heat.set(heat);
        }
        heat >= threshold && heat != u16::MAX
    }

    /// Whether the bytes that it was decoded from are still those in memory.
    #[inline(always)]
    pub(crate) fn is_current(&self) -> bool {
        let changes = code_changes();
        self.checked.get() == changes || self.check(changes)
    }

    /// Whether it was decoded from this version of its page.
    pub(crate) fn is_of(&self, version: u32) -> bool {
        self.version == version
    }

    #[inline(never)]
    fn check(&self, changes: u64) -> bool {
        // SAFETY: the memory map that has the page is kept until the cache is cleared.
        let current = unsafe { self.page.as_ref() }.version() == self.version;
        if current {
            self.checked.set(changes);
        }
        current
    }

    /// Whether it was decoded as one instruction alone.
    pub(crate) fn is_one(&self) -> bool {
        u64::from(self.bits) & KeyBits::ONE != 0
    }

    /// Whether this is the key, apart from the page.
    fn has_key(&self, key: u64) -> bool {
        usize::from(self.offset) == in_page(key >> KEY_SHIFT) && self.bits == key as u16 & KEY_BITS
    }

    fn second(&self) -> Option<Second> {
        if !self.crosses {
            return None;
        }
        // SAFETY: `add` wrote it behind the ops of a block that crosses.
        Some(unsafe {
            self.ops()
                .byte_add(usize::from(self.all))
                .cast::<Second>()
                .read()
        })
    }

    pub(super) fn second_is_current(&self) -> bool {
        match self.second() {
            // SAFETY: as in `is_current`.
            Some(second) => unsafe { second.page.as_ref() }.version() == second.version,
            None => true,
        }
    }

    /// The page into which its only instruction crosses: address, state, version.
    pub(crate) fn second_page(&self) -> Option<(u64, &PageState, u32)> {
        let second = self.second()?;
        // SAFETY: as in `is_current`.
        Some((second.gpa, unsafe { second.page.as_ref() }, second.version))
    }

    /// Guest-physical address of the page into which its only instruction crosses.
    pub(super) fn second_gpa(&self) -> Option<u64> {
        self.second().map(|second| second.gpa)
    }

    /// The block that has followed this one at this distance.
    #[inline(always)]
    pub(crate) fn follow(&self, delta: u64) -> Option<BlockRef> {
        let is = |n: usize| i64::from(self.deltas[n].get()) as u64 == delta;
        if is(0) {
            return self.links[0].get();
        }
        if is(1) {
            return self.links[1].get();
        }
        None
    }

    /// Remembers what follows at this distance, if it is one within a page.
    pub(crate) fn link(&self, delta: u64, to: BlockRef) {
        let Ok(delta) = i16::try_from(delta as i64) else {
            return;
        };
        if self.links[0].get().is_some() {
            self.links[1].set(self.links[0].get());
            self.deltas[1].set(self.deltas[0].get());
        }
        self.links[0].set(Some(to));
        self.deltas[0].set(delta);
    }
}

/// Where a block is in the cache, in units of 8 bytes.
#[derive(Clone, Copy)]
pub(crate) struct BlockIndex(u32);

/// Turns pointers into the cache into numbers, and back.
#[derive(Clone, Copy)]
pub(crate) struct Indexer(NonNull<u8>);

impl Indexer {
    /// Where an op of a block is, from the block on.
    pub(crate) fn op(self, block: BlockRef, op: *const Op) -> u16 {
        ((op as usize - block.0.as_ptr() as usize) / 8) as u16
    }

    pub(crate) fn block(self, block: BlockRef) -> BlockIndex {
        BlockIndex(((block.0.as_ptr() as usize - self.0.as_ptr() as usize) / 8) as u32)
    }

    /// The op again: good until the cache is cleared.
    #[inline(always)]
    pub(crate) fn op_in(self, block: BlockIndex, op: u16) -> *const Op {
        let at = block.0 as usize + usize::from(op);
        // SAFETY: indices are those of ops in the arena.
        unsafe { self.0.add(at * 8).cast::<Op>().as_ptr() }
    }

    /// The block again.
    #[inline(always)]
    pub(crate) fn block_at(self, index: BlockIndex) -> BlockRef {
        // SAFETY: as above.
        BlockRef(unsafe { self.0.add(index.0 as usize * 8).cast() })
    }
}

/// A block about to be entered.
pub(super) struct NewBlock<'a> {
    pub ops: &'a [Op],
    /// How many of them run one after the other; the rest are parts of those.
    pub main: usize,
    pub page: &'a PageState,
    pub version: u32,
    pub count: u16,
    pub len: u16,
    pub linkable: bool,
    pub second: Option<(u64, &'a PageState, u32)>,
}

/// Where the address is in a block's key, and what is below it: mode, and [`KeyBits::ONE`].
pub(super) const KEY_SHIFT: u32 = 9;
const KEY_BITS: u16 = (1 << KEY_SHIFT) - 1;

/// Where the epoch is in what must agree beside the linear address.
const EPOCH_SHIFT: u32 = 21;

/// Bits of a block's key beside its address and mode.
pub(crate) struct KeyBits;

impl KeyBits {
    /// The block is one instruction, to be followed by a look at events.
    pub(crate) const ONE: u64 = 1 << 8;
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Jump {
    linear: u64,
    key: u32,
    /// Index in the arena; 0 for none.
    block: u32,
}

const NO_JUMP: Jump = Jump {
    linear: 0,
    key: 0,
    block: 0,
};

// SAFETY: zeros are `NO_JUMP`.
unsafe impl Zeroed for Jump {}

/// Memory for decoding, kept from block to block.
pub(super) struct Scratch {
    /// What the forms were found out for.
    features: Features,
    /// By instruction form: see [`no_forms`].
    pub(super) forms: Box<[u8]>,
    pub(super) ops: Vec<Op>,
    pub(super) lowered: Vec<Lowered>,
    /// Ops with fused ones among them.
    pub(super) out: Vec<Op>,
    /// What those stand for.
    pub(super) parts: Vec<Op>,
}

/// What processors that begin small take turns with.
static POOL: Pool<Scratch> = Pool::new();

impl Scratch {
    /// None, until there is something to decode.
    fn none() -> Self {
        Self {
            features: Features::default(),
            forms: Box::default(),
            ops: Vec::new(),
            lowered: Vec::new(),
            out: Vec::new(),
            parts: Vec::new(),
        }
    }

    fn new(features: Features) -> Self {
        Self {
            features,
            forms: no_forms(),
            ..Self::none()
        }
    }
}

/// The decoded code of one processor.
pub struct CodeCache {
    arena: Arena,
    directory: Directory,
    jumps: Table<Jump>,
    /// What was asked for last.
    found: Found,
    /// Address space, mode, privilege and epoch: what must agree beside the linear address.
    key: u32,
    /// The same for pages that all address spaces have.
    global_key: u32,
    /// Counts what made linear addresses stale.
    epoch: u32,
    /// Hashes of the linear pages that jump-cache entries of this epoch are for.
    pages: Box<[u64; 64]>,
    /// Base of CS, as code is addressed.
    base: u64,
    limit: u32,
    /// There while it decodes, and afterwards unless others may need it.
    pub(super) scratch: Scratch,
    /// Code that ops of blocks call.
    pub(crate) fused: FusedCode,
    /// Blocks decoded so far.
    pub(crate) decoded: u64,
    /// How often all was forgotten.
    pub(super) clears: u64,
    /// The tables have their memory.
    has_tables: bool,
    /// An eighth of [`Tuning::code_bytes`], or of what is small.
    eighth: usize,
    /// It is small, and has this size once it grows.
    grows_to: Option<usize>,
    /// [`CodeCache::decoded`] when all was last forgotten.
    forgotten: u64,
    pub(crate) jit: Jit,
}

// SAFETY: the block references in it are to its own arena.
unsafe impl Send for CodeCache {}

impl CodeCache {
    /// Empty: small, with its tables in the processor's home, if it has one.
    pub(crate) fn new(tuning: Tuning, mut home: Option<&mut Home>) -> Self {
        let bytes = tuning.code_bytes.max(Tuning::LEAST_CODE_BYTES);
        let grows_to = home.is_some().then_some(bytes);
        let bytes = grows_to.map_or(bytes, |_| Tuning::LEAST_CODE_BYTES);
        let jumps = if home.is_some() { FEW_JUMPS } else { JUMPS };
        let mut cache = Self {
            jumps: Table::new(home.as_deref_mut(), jumps),
            found: Found::new(home.as_deref_mut()),
            arena: match home {
                Some(home) => Arena::small(home, capacity(bytes / 8)),
                None => Arena::new(capacity(bytes / 8)),
            },
            jit: Jit::new(Tuning {
                code_bytes: bytes,
                ..tuning
            }),
            directory: Directory::new(),
            key: 0,
            global_key: 0,
            epoch: 0,
            pages: Box::new([0; 64]),
            base: 0,
            limit: 0,
            scratch: Scratch::none(),
            fused: FusedCode::default(),
            decoded: 0,
            clears: 0,
            has_tables: false,
            eighth: bytes / 8,
            grows_to,
            forgotten: 0,
        };
        cache.begin();
        cache
    }

    /// Bytes of a home for what is small here.
    pub(crate) const HOME: usize =
        capacity(Tuning::LEAST_CODE_BYTES / 8) + FEW_JUMPS * size_of::<Jump>() + Found::FEW_BYTES;

    /// Whether it is small, and has turned out to be too small: rather than go to and fro it grows.
    pub(crate) fn wants_to_grow(&self) -> bool {
        self.grows_to.is_some() && (!self.has_room() || self.jit.is_filling())
    }

    /// Forgets all, and has its full size from here on.
    fn grow(&mut self) {
        let Some(bytes) = self.grows_to.take() else {
            return;
        };
        self.eighth = bytes / 8;
        self.clear();
        self.jit.grow(bytes);
        self.arena = Arena::new(capacity(self.eighth));
        self.begin();
        self.jumps = Table::new(None, JUMPS);
        self.found = Found::new(None);
    }

    /// Makes index 0 no block's.
    fn begin(&mut self) {
        self.forgotten = self.decoded;
        self.arena.skip_first();
    }

    /// Takes the memory for decoding, if it isn't there.
    pub(super) fn take_scratch(&mut self, features: Features) {
        if self.scratch.forms.is_empty() {
            let pooled = POOL.take().filter(|scratch| scratch.features == features);
            self.scratch = pooled.unwrap_or_else(|| Scratch::new(features));
        }
    }

    /// Lets others have it.
    pub(super) fn share_scratch(&mut self) {
        if self.grows_to.is_some() {
            POOL.give(std::mem::replace(&mut self.scratch, Scratch::none()));
        }
    }

    /// Forgets all blocks. Every [`BlockRef`] is void from here on.
    pub(crate) fn clear(&mut self) {
        self.clear_blocks();
        self.pages.fill(0);
        self.jit.clear();
    }

    /// Forgets all blocks but keeps the traces that were made of them, which find the instructions
    /// again that they need.
    pub(super) fn clear_blocks(&mut self) {
        self.clears += 1;
        if self.decoded == self.forgotten {
            // Nothing is anywhere.
            return;
        }
        self.arena.clear(self.eighth * LEAST);
        self.begin();
        self.directory.clear();
        self.jumps.all_mut().fill(NO_JUMP);
        self.found.clear();
        self.fused.clear();
        self.jit.lose_blocks();
    }

    /// The same, and gives the memory back to the host.
    fn give_back(&mut self) {
        self.clears += 1;
        self.grow();
        self.arena.give_back();
        self.begin();
        self.directory.clear();
        self.jumps = Table::new(None, JUMPS);
        self.found = Found::new(None);
        self.has_tables = false;
        self.pages.fill(0);
        self.fused = FusedCode::default();
        self.scratch = Scratch::none();
        self.jit.give_back();
    }

    /// Shows others what is counted here.
    pub(crate) fn count(&self, counters: &Counters) {
        Counters::set(&counters.decoded_blocks, self.decoded);
        Counters::set(&counters.decoded_bytes, self.arena.used() as u64);
        Counters::set(&counters.compiled_bytes, self.jit.used() as u64);
    }

    /// Makes all of the jump cache stale.
    fn next_epoch(&mut self) {
        self.epoch += 1;
        if self.epoch == 1 << (u32::BITS - EPOCH_SHIFT) {
            self.epoch = 0;
            self.jumps.all_mut().fill(NO_JUMP);
        }
    }

    /// Whether the tables beside the blocks are about to be needed as a whole, for the first time.
    pub(super) fn wants_tables(&self) -> bool {
        !self.has_tables && self.arena.used() > SOME
    }

    /// Takes the memory for them.
    pub(super) fn take_tables(&mut self) {
        self.has_tables = true;
        self.found.populate();
        populate(self.jumps.all_mut());
    }

    /// Whether any block fits, with the code that its ops call, without forgetting all.
    pub(super) fn has_room(&self) -> bool {
        self.arena.has_room(LARGEST) && self.has_both(LARGEST) && !self.fused.is_full()
    }

    /// Whether there may be so many bytes more of blocks and compiled code together.
    fn has_both(&self, more: usize) -> bool {
        self.arena.used() + self.jit.code_used() + more <= self.eighth * BOTH
    }

    /// Whether blocks have to make room before more is compiled.
    pub(crate) fn has_too_many_blocks(&self) -> bool {
        self.arena.used() > self.eighth * LEAST && !self.has_both(Jit::LARGEST)
    }

    /// Adds a block, under its key.
    pub(super) fn add(&mut self, key: u64, new: &NewBlock<'_>) -> Option<BlockRef> {
        let all = size_of_val(new.ops);
        let second = new.second.map(|(gpa, page, version)| Second {
            gpa,
            page: NonNull::from(page),
            version,
        });
        let len = size_of::<Block>() + all + second.map_or(0, |_| size_of::<Second>());
        if len > LARGEST {
            return None;
        }
        let piece = self.arena.take(len)?.cast::<Block>();
        let block = Block {
            checked: Cell::new(0),
            code: Cell::new(0),
            heat: Cell::new(0),
            main: new.main.min(new.ops.len()) as u16,
            links: [Cell::new(None), Cell::new(None)],
            deltas: [Cell::new(0), Cell::new(0)],
            all: all as u16,
            count: new.count,
            len: new.len,
            offset: in_page(key >> KEY_SHIFT) as u16,
            bits: key as u16 & KEY_BITS,
            version: new.version,
            page: NonNull::from(new.page),
            next: Cell::new(0),
            linkable: new.linkable,
            crosses: second.is_some(),
        };
        // SAFETY: the piece has room for the block, its ops and what may follow, and its alignment
        // is enough for all of them.
        let added = unsafe {
            piece.write(block);
            let ops = piece.add(1).cast::<Op>();
            ptr::copy_nonoverlapping(new.ops.as_ptr(), ops.as_ptr(), new.ops.len());
            if let Some(second) = second {
                ops.add(new.ops.len()).cast().write(second);
            }
            BlockRef(piece)
        };
        self.decoded += 1;
        self.enter(key, added);
        self.note_found(key, added);
        Some(added)
    }

    /// Puts a block at the head of its list, in the place of one with the same key.
    fn enter(&mut self, key: u64, added: BlockRef) {
        let gpa = key >> KEY_SHIFT;
        let Some(lists) = self.directory.of(gpa >> PAGE_SHIFT, &mut self.arena) else {
            // It is found no more, and decoded again.
            return;
        };
        let index = self.arena.index_of(added.0.cast());
        let list = &mut self.arena.get_mut::<Lists>(lists)[granule(gpa)];
        let first = std::mem::replace(&mut list.first, index);
        let known = list.starts & List::bit(gpa) != 0;
        list.starts |= List::bit(gpa);
        // SAFETY: what is on lists was added, and nothing has been forgotten since.
        let added = unsafe { added.get() };
        added.next.set(first);
        if !known {
            return;
        }
        let mut before = added;
        while let Some(block) = listed(&self.arena, before.next.get()) {
            // SAFETY: as above.
            let block = unsafe { block.get() };
            if block.has_key(key) {
                before.next.set(block.next.get());
                return;
            }
            before = block;
        }
    }

    /// The block under a key, current or not.
    pub(crate) fn find(&self, key: u64) -> Option<BlockRef> {
        match self.found.block(key) {
            Some(block) => Some(BlockRef(self.arena.at(block).cast())),
            None => self
                .find_listed(key)
                .inspect(|&block| self.note_found(key, block)),
        }
    }

    fn note_found(&self, key: u64, block: BlockRef) {
        self.found.note(key, self.arena.index_of(block.0.cast()));
    }

    /// The code for jumps to the block under a key, if it was found last.
    pub(crate) fn find_code(&self, key: u64) -> Option<u32> {
        self.found.code(key)
    }

    /// Takes note of it.
    pub(crate) fn note_code(&self, key: u64, code: u32) {
        self.found.note_code(key, code);
    }

    /// Takes note that the compiled code is another from here on.
    pub(crate) fn forget_codes(&self) {
        self.found.forget_codes();
    }

    fn find_listed(&self, key: u64) -> Option<BlockRef> {
        let gpa = key >> KEY_SHIFT;
        let lists = self.directory.find(gpa >> PAGE_SHIFT)?;
        let list = self.arena.get::<Lists>(lists)[granule(gpa)];
        if list.starts & List::bit(gpa) == 0 {
            return None;
        }
        let mut next = list.first;
        while let Some(block) = listed(&self.arena, next) {
            // SAFETY: what is on lists was added, and nothing has been forgotten since.
            let found = unsafe { block.get() };
            if found.has_key(key) {
                return Some(block);
            }
            next = found.next.get();
        }
        None
    }

    /// For what refers to blocks and ops by number.
    #[inline(always)]
    pub(crate) fn indexer(&self) -> Indexer {
        Indexer(self.arena.base())
    }

    /// Remembers that there is a jump to a linear page.
    pub(crate) fn note_page(&mut self, linear: u64) {
        let (word, bit) = Self::page_bit(linear);
        self.pages[word] |= bit;
    }

    fn page_bit(linear: u64) -> (usize, u64) {
        let hash = (linear >> PAGE_SHIFT).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
        ((hash >> 6) as usize, 1 << (hash & 63))
    }
}

/// The block at an index of a list; `None` at its end.
fn listed(arena: &Arena, index: u32) -> Option<BlockRef> {
    (index != 0).then(|| BlockRef(arena.at(index).cast()))
}

/// What decoded blocks may take, of so much in an eighth.
const fn capacity(eighth: usize) -> usize {
    (eighth * MOST).next_multiple_of(LARGEST)
}

#[inline(always)]
fn jump_index(linear: u64) -> usize {
    (linear ^ (linear >> 14)) as usize
}

impl Cpu {
    /// Whether decoded code takes so much memory that a processor which waits for long should
    /// [forget it](Cpu::forget_code).
    pub fn has_much_code(&self) -> bool {
        self.code.arena.used() > MUCH
    }

    /// Forgets all decoded code and gives its memory back. Between two calls of [`Cpu::run`] only.
    pub fn forget_code(&mut self) {
        self.code.give_back();
        self.mmu.drop_jumps();
        self.mmu.give_back();
    }

    /// Forgets all code, if that takes little room, and has room for more than a little from here on. Not
    /// while compiled code waits for something: it goes, and so does what it came by.
    pub(super) fn grow_code(&mut self) {
        self.code.grow();
        self.mmu.grow_jumps();
        Counters::add(&self.shared.counters.flushes, 1);
    }

    /// Linear address of the next instruction.
    #[inline(always)]
    pub(crate) fn code_linear(&self) -> u64 {
        let linear = self.rip.wrapping_add(self.code.base);
        if self.sys.mode.is64() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// After a change of mode, privilege, CS or address space.
    pub(crate) fn code_context_changed(&mut self) {
        let mode = self.sys.mode;
        self.code.base = if mode.is64() {
            0
        } else {
            self.seg_base[usize::from(seg::CS)]
        };
        if !mode.is64() {
            let limit = self.sys.segments[usize::from(seg::CS)].limit;
            if limit != self.code.limit {
                self.code.limit = limit;
                self.code.next_epoch();
            }
        }
        // No address space has number 0, and none one of more than 12 bits.
        self.code.global_key = u32::from(self.cpl == 3) << 12
            | u32::from(mode.raw()) << 13
            | self.code.epoch << EPOCH_SHIFT;
        self.code.key = self.code.global_key | u32::from(self.asid());
    }

    /// All linear addresses may mean something else now.
    pub(crate) fn code_mappings_changed(&mut self) {
        self.code.next_epoch();
        self.code.pages.fill(0);
        self.mmu.drop_jumps();
        self.code_context_changed();
    }

    /// A linear page may mean something else now.
    pub(crate) fn code_page_unmapped(&mut self, linear: u64) {
        let (word, bit) = CodeCache::page_bit(linear);
        if self.code.pages[word] & bit != 0 {
            self.code_mappings_changed();
        }
    }

    /// A block that can be entered at the current RIP without further checks, if it is known.
    #[inline(always)]
    pub(crate) fn quick_block(&self) -> Option<BlockRef> {
        let linear = self.code_linear();
        let jump = self.code.jumps.at(jump_index(linear));
        let known = jump.key == self.code.key || jump.key == self.code.global_key;
        if jump.linear == linear && known && jump.block != 0 {
            Some(BlockRef(self.code.arena.at(jump.block).cast()))
        } else {
            None
        }
    }

    /// Remembers a block by the current RIP; `global` says that its page is in all address spaces.
    pub(super) fn remember_block(&mut self, linear: u64, global: bool, block: BlockRef) {
        self.code.note_page(linear);
        *self.code.jumps.at_mut(jump_index(linear)) = Jump {
            linear,
            key: if global {
                self.code.global_key
            } else {
                self.code.key
            },
            block: self.code.arena.index_of(block.0.cast()),
        };
    }

    /// Whether `len` bytes at the current RIP are within CS's limit.
    pub(super) fn code_within_limit(&self, len: u64) -> bool {
        self.sys.mode.is64()
            || self.rip.saturating_add(len.max(1) - 1)
                <= u64::from(self.sys.segments[usize::from(seg::CS)].limit)
    }

    /// The key of the block at a guest-physical address in the current mode.
    pub(crate) fn block_key(&self, gpa: u64, bits: u64) -> u64 {
        gpa << KEY_SHIFT | u64::from(self.sys.mode.raw()) | bits
    }
}

/// Where the running block ends.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct BlockEnd(pub *const Op);

// SAFETY: only compared with other pointers.
unsafe impl Send for BlockEnd {}

impl Default for BlockEnd {
    fn default() -> Self {
        Self(ptr::null())
    }
}

/// Offset of an address in its page.
pub(super) fn in_page(address: u64) -> usize {
    (address & PAGE_MASK) as usize
}
