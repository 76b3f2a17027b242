//! Blocks of ops and where to find them: by guest-physical address and mode, and, in front of
//! that, by linear address.
#![expect(
    unsafe_code,
    reason = "blocks refer to each other and to their ops by pointers into arenas"
)]

use std::cell::Cell;
use std::ptr::{self, NonNull};

use crate::code::fuse::Lowered;
use crate::code::op::Op;
use crate::cpu::{Cpu, seg};
use crate::mem::{PAGE_MASK, PAGE_SHIFT, PageState, code_changes};
use crate::simd::fused::FusedCode;

/// Ops of all blocks together.
const OPS: usize = 1 << 19;
/// Blocks.
const BLOCKS: usize = 1 << 17;
/// Entries of the jump cache.
const JUMPS: usize = 1 << 13;
/// Sets of four in the table by physical address.
const SETS: usize = 1 << 14;

/// Memory that is handed out piece by piece and taken back all at once.
struct Arena<T> {
    base: NonNull<T>,
    used: usize,
    capacity: usize,
}

// SAFETY: it owns its memory like a vector; what it holds stays on the processor's thread.
unsafe impl<T> Send for Arena<T> {}

impl<T> Arena<T> {
    fn new(capacity: usize) -> Self {
        const { assert!(!std::mem::needs_drop::<T>()) };
        let mut memory = std::mem::ManuallyDrop::new(Vec::<T>::with_capacity(capacity));
        Self {
            base: NonNull::new(memory.as_mut_ptr()).unwrap_or(NonNull::dangling()),
            used: 0,
            capacity: memory.capacity(),
        }
    }

    fn room_for(&self, count: usize) -> bool {
        self.capacity - self.used >= count
    }

    /// Moves an item in; `None` if there is no room.
    fn push(&mut self, item: T) -> Option<NonNull<T>> {
        if !self.room_for(1) {
            return None;
        }
        // SAFETY: one more item fits; the memory from `used` on is nobody's.
        unsafe {
            let to = self.base.add(self.used);
            to.write(item);
            self.used += 1;
            Some(to)
        }
    }
}

impl<T> Drop for Arena<T> {
    fn drop(&mut self) {
        // SAFETY: from a vector of this capacity; items need no drop.
        drop(unsafe { Vec::from_raw_parts(self.base.as_ptr(), 0, self.capacity) });
    }
}

/// Where control goes from a block, within the same page.
#[derive(Clone, Copy)]
struct Link {
    /// Distance of RIP from the block's start.
    delta: u64,
    to: Option<BlockRef>,
}

/// Ops that run one after the other. What every run of a block touches is in one cache line.
#[repr(C, align(64))]
pub(crate) struct Block {
    ops: NonNull<Op>,
    end: *const Op,
    /// [`code_changes`] when it was last found current.
    checked: Cell<u64>,
    /// Instructions.
    pub count: u16,
    /// Bytes.
    pub len: u16,
    /// Ends in a way that can't change mode, privilege or mapping.
    pub linkable: bool,
    links: [Cell<Link>; 2],
    page: NonNull<PageState>,
    version: u32,
    /// The second page of an instruction that crosses: its address, state and version.
    second: Option<(u64, NonNull<PageState>, u32)>,
}

const _: () = assert!(std::mem::offset_of!(Block, page) == 64);

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
        self.ops.as_ptr()
    }

    /// Past the last op.
    #[inline(always)]
    pub(crate) fn end(&self) -> *const Op {
        self.end
    }

    /// Whether the bytes that it was decoded from are still those in memory.
    #[inline(always)]
    pub(crate) fn is_current(&self) -> bool {
        let changes = code_changes();
        self.checked.get() == changes || self.check(changes)
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

    pub(super) fn second_is_current(&self) -> bool {
        match self.second {
            // SAFETY: as in `is_current`.
            Some((_, page, version)) => unsafe { page.as_ref() }.version() == version,
            None => true,
        }
    }

    /// Guest-physical address of the page into which its only instruction crosses.
    pub(super) fn second_gpa(&self) -> Option<u64> {
        self.second.map(|(gpa, _, _)| gpa)
    }

    /// The block that has followed this one at this distance.
    #[inline(always)]
    pub(crate) fn follow(&self, delta: u64) -> Option<BlockRef> {
        let first = self.links[0].get();
        if first.delta == delta {
            return first.to;
        }
        let second = self.links[1].get();
        if second.delta == delta {
            return second.to;
        }
        None
    }

    /// Remembers what follows at this distance.
    pub(crate) fn link(&self, delta: u64, to: BlockRef) {
        if self.links[0].get().to.is_some() {
            self.links[1].set(self.links[0].get());
        }
        self.links[0].set(Link {
            delta,
            to: Some(to),
        });
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

/// Bits of a block's key beside its address: mode, and [`KeyBits::ONE`].
pub(crate) struct KeyBits;

impl KeyBits {
    /// The block is one instruction, to be followed by a look at events.
    pub(crate) const ONE: u64 = 1 << 8;
}

#[derive(Clone, Copy)]
struct Jump {
    linear: u64,
    key: u64,
    block: Option<BlockRef>,
}

const NO_JUMP: Jump = Jump {
    linear: 0,
    key: 0,
    block: None,
};

/// Key and block.
type Known = (u64, Option<BlockRef>);

/// Memory for decoding, kept from block to block.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) ops: Vec<Op>,
    pub(super) lowered: Vec<Lowered>,
    /// Ops with fused ones among them.
    pub(super) out: Vec<Op>,
    /// What those stand for.
    pub(super) parts: Vec<Op>,
}

/// The decoded code of one processor.
pub struct CodeCache {
    ops: Arena<Op>,
    blocks: Arena<Block>,
    jumps: Box<[Jump; JUMPS]>,
    sets: Box<[[Known; 4]]>,
    /// Address space, mode, privilege and epoch: what must agree beside the linear address.
    key: u64,
    /// Counts what made linear addresses stale.
    epoch: u64,
    /// Hashes of the linear pages that jump-cache entries of this epoch are for.
    pages: Box<[u64; 64]>,
    /// Base of CS, as code is addressed.
    base: u64,
    limit: u32,
    pub(super) scratch: Scratch,
    /// Code that ops of blocks call.
    pub(crate) fused: FusedCode,
    /// Blocks decoded so far.
    pub(crate) decoded: u64,
    /// How often all was forgotten.
    pub(super) clears: u64,
}

// SAFETY: the block references in it are to its own arena.
unsafe impl Send for CodeCache {}

impl CodeCache {
    /// Empty.
    pub fn new() -> Self {
        Self {
            ops: Arena::new(OPS),
            blocks: Arena::new(BLOCKS),
            jumps: Box::new([NO_JUMP; JUMPS]),
            sets: vec![[(u64::MAX, None); 4]; SETS].into_boxed_slice(),
            key: 0,
            epoch: 0,
            pages: Box::new([0; 64]),
            base: 0,
            limit: 0,
            scratch: Scratch::default(),
            fused: FusedCode::default(),
            decoded: 0,
            clears: 0,
        }
    }

    /// Forgets all blocks. Every [`BlockRef`] is void from here on.
    pub(crate) fn clear(&mut self) {
        self.clears += 1;
        self.ops.used = 0;
        self.blocks.used = 0;
        self.jumps.fill(NO_JUMP);
        self.sets.fill([(u64::MAX, None); 4]);
        self.pages.fill(0);
        self.fused.clear();
    }

    /// Whether a block of `ops` ops fits without forgetting all.
    pub(super) fn has_room(&self, ops: usize) -> bool {
        self.ops.room_for(ops) && self.blocks.room_for(1)
    }

    /// Adds a block, under its key.
    pub(super) fn add(&mut self, key: u64, new: &NewBlock<'_>) -> Option<BlockRef> {
        if !self.has_room(new.ops.len()) {
            return None;
        }
        let mut first = None;
        for op in new.ops {
            let at = self.ops.push(*op)?;
            first.get_or_insert(at);
        }
        let ops = first?;
        let no_link = Link { delta: 0, to: None };
        let block = BlockRef(
            self.blocks.push(Block {
                ops,
                // SAFETY: the ops were pushed one behind the other.
                end: unsafe { ops.add(new.main.min(new.ops.len())) }.as_ptr(),
                checked: Cell::new(0),
                count: new.count,
                len: new.len,
                linkable: new.linkable,
                links: [Cell::new(no_link), Cell::new(no_link)],
                page: NonNull::from(new.page),
                version: new.version,
                second: new
                    .second
                    .map(|(gpa, page, version)| (gpa, NonNull::from(page), version)),
            })?,
        );
        self.decoded += 1;
        let set = &mut self.sets[set_of(key)];
        let way = set
            .iter()
            .position(|(k, _)| *k == key || *k == u64::MAX)
            .unwrap_or((self.decoded & 3) as usize);
        set[way] = (key, Some(block));
        Some(block)
    }

    /// The block under a key, current or not.
    pub(super) fn find(&self, key: u64) -> Option<BlockRef> {
        self.sets[set_of(key)]
            .iter()
            .find(|(k, _)| *k == key)
            .and_then(|(_, block)| *block)
    }

    fn page_bit(linear: u64) -> (usize, u64) {
        let hash = (linear >> PAGE_SHIFT).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
        ((hash >> 6) as usize, 1 << (hash & 63))
    }
}

impl Default for CodeCache {
    fn default() -> Self {
        Self::new()
    }
}

fn set_of(key: u64) -> usize {
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 50) as usize & (SETS - 1)
}

#[inline(always)]
fn jump_index(linear: u64) -> usize {
    (linear ^ (linear >> 13)) as usize & (JUMPS - 1)
}

impl Cpu {
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
                self.code.epoch += 1;
            }
        }
        self.code.key = u64::from(self.asid())
            | u64::from(mode.raw()) << 16
            | u64::from(self.cpl == 3) << 24
            | self.code.epoch << 25;
    }

    /// All linear addresses may mean something else now.
    pub(crate) fn code_mappings_changed(&mut self) {
        self.code.epoch += 1;
        self.code.pages.fill(0);
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
        let jump = &self.code.jumps[jump_index(linear)];
        if jump.linear == linear && jump.key == self.code.key {
            jump.block
        } else {
            None
        }
    }

    /// Remembers a block by the current RIP.
    pub(super) fn remember_block(&mut self, linear: u64, block: BlockRef) {
        let (word, bit) = CodeCache::page_bit(linear);
        self.code.pages[word] |= bit;
        self.code.jumps[jump_index(linear)] = Jump {
            linear,
            key: self.code.key,
            block: Some(block),
        };
    }

    /// Whether `len` bytes at the current RIP are within CS's limit.
    pub(super) fn code_within_limit(&self, len: u64) -> bool {
        self.sys.mode.is64()
            || self.rip.saturating_add(len.max(1) - 1)
                <= u64::from(self.sys.segments[usize::from(seg::CS)].limit)
    }

    /// The key of the block at a guest-physical address in the current mode.
    pub(super) fn block_key(&self, gpa: u64, bits: u64) -> u64 {
        gpa << 9 | u64::from(self.sys.mode.raw()) | bits
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
