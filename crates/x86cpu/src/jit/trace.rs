//! What is compiled at a time: blocks of one page, along the path that is taken most.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind};

use super::Call;
use crate::code::{Block, BlockRef, Op};
use crate::mem::PAGE_SIZE;

/// Instructions in one trace, about.
const LONGEST: usize = 128;
const BLOCKS: usize = 24;
/// Instructions up to which a trace that is a loop begins once more.
const SHORT: usize = 24;

/// One instruction of a trace.
pub(super) struct Step {
    pub instruction: Instruction,
    /// Offset in the page.
    pub at: u16,
    /// The first op of the interpreter for it, and how many there are.
    pub op: *const Op,
    pub ops: u8,
    /// How many ops before it the op of the block is that begins with it; see [`Call::MIDST`].
    pub back: u16,
    /// The block that has it.
    pub block: BlockRef,
    /// It is the last of its block.
    pub last: bool,
    /// Of a last one: where the trace goes on, as an offset in the page.
    pub follow: Option<u16>,
}

impl Step {
    /// Whether what comes after this last instruction of a block simply runs.
    #[expect(unsafe_code, reason = "looks into a block")]
    pub(super) fn falls_through(&self) -> bool {
        // SAFETY: nothing clears the cache while a trace is made.
        unsafe { self.block.get() }.linkable && self.instruction.flow_control() == FlowControl::Next
    }
}

/// See the module's text.
pub(super) struct Trace {
    pub steps: Vec<Step>,
    /// It is one instruction across two pages.
    pub crosses: bool,
}

/// The ops of one instruction.
struct Found {
    ip: u16,
    op: *const Op,
    ops: u8,
    back: u16,
}

/// Ops by instruction.
#[expect(unsafe_code, reason = "walks the ops of a block")]
fn ops_of(block: &Block) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    let mut at = block.ops();
    while at < block.end() {
        // SAFETY: between the block's first op and its end.
        let op = unsafe { &*at };
        if op.is_fused() {
            for n in 0..u32::from(op.extra) {
                // SAFETY: `aux` ops on from a fused op there are `extra` parts.
                let part = unsafe { at.add((op.aux + n) as usize) };
                found.push(Found {
                    // SAFETY: as above.
                    ip: unsafe { &*part }.ip,
                    op: part,
                    ops: 1,
                    back: if n == 0 {
                        u16::try_from(op.aux).unwrap_or(Call::MIDST)
                    } else {
                        Call::MIDST
                    },
                });
            }
        } else if op.len != 0 {
            match found.last_mut() {
                Some(last) if last.ip == op.ip => last.ops += 1,
                _ => found.push(Found {
                    ip: op.ip,
                    op: at,
                    ops: 1,
                    back: 0,
                }),
            }
        }
        // SAFETY: at most the block's end.
        at = unsafe { at.add(1) };
    }
    found
}

/// Where a near branch with a target in the instruction goes, relative to the page.
pub(super) fn direct_target(i: &Instruction) -> Option<i64> {
    (i.op_count() > 0 && i.op_kind(0) == OpKind::NearBranch64).then(|| i.near_branch64() as i64)
}

/// The same if it is in the page.
pub(super) fn in_page(target: i64) -> Option<u16> {
    u16::try_from(target)
        .ok()
        .filter(|&offset| usize::from(offset) < PAGE_SIZE)
}

impl Trace {
    /// Follows the path from a block on. `find` gives the block at an offset of the page, if it is
    /// decoded and current. `None` if bytes and blocks don't agree, or nothing can be compiled.
    pub(super) fn new(
        head: BlockRef,
        page: &[u8; PAGE_SIZE],
        find: &dyn Fn(u16) -> Option<BlockRef>,
    ) -> Option<Self> {
        let mut trace = Self {
            steps: Vec::new(),
            crosses: false,
        };
        let mut seen = Vec::new();
        let mut block = head;
        loop {
            trace.add(block, page)?;
            seen.push(block);
            let next = trace.next(find, &seen);
            let Some((offset, next)) = next else {
                break;
            };
            if trace.steps.len() >= LONGEST || seen.len() >= BLOCKS {
                break;
            }
            if let Some(step) = trace.steps.last_mut() {
                step.follow = Some(offset);
            }
            block = next;
        }
        Some(trace)
    }

    /// The one instruction of a block that goes on in another page. `bytes` are those of its page and the
    /// first of the other.
    pub(super) fn crossing(head: BlockRef, bytes: Option<&[u8]>) -> Option<Self> {
        // SAFETY: nothing clears the cache while a trace is made.
        #[expect(unsafe_code, reason = "looks into a block")]
        let block = unsafe { head.get() };
        let found = ops_of(block).into_iter().next()?;
        let instruction = bytes.and_then(|bytes| {
            let options = DecoderOptions::FORCE_RESERVED_NOP;
            let mut decoder = Decoder::with_ip(64, bytes, 0, options);
            decoder.set_position(block.offset()).ok()?;
            decoder.set_ip(block.offset() as u64);
            let instruction = decoder.decode();
            (instruction.len() == usize::from(block.len)).then_some(instruction)
        });
        Some(Self {
            crosses: true,
            steps: vec![Step {
                instruction: instruction.unwrap_or_default(),
                at: block.offset() as u16,
                op: found.op,
                ops: found.ops,
                back: found.back,
                block: head,
                last: true,
                follow: None,
            }],
        })
    }

    #[expect(unsafe_code, reason = "looks into a block")]
    fn add(&mut self, block: BlockRef, page: &[u8; PAGE_SIZE]) -> Option<()> {
        // SAFETY: nothing clears the cache while a trace is made.
        let current = unsafe { block.get() };
        let ops = ops_of(current);
        let start = current.offset();
        let end = start + usize::from(current.len);
        let options = DecoderOptions::FORCE_RESERVED_NOP;
        let bytes = page.get(..end)?;
        let mut decoder = Decoder::with_ip(64, bytes, 0, options);
        decoder.set_position(start).ok()?;
        decoder.set_ip(start as u64);
        for (n, found) in ops.iter().enumerate() {
            let at = start + usize::from(found.ip);
            if decoder.position() != at {
                return None;
            }
            let instruction = decoder.decode();
            self.steps.push(Step {
                instruction,
                at: at as u16,
                op: found.op,
                ops: found.ops,
                back: found.back,
                block,
                last: n + 1 == ops.len(),
                follow: None,
            });
        }
        (decoder.position() == end).then_some(())
    }

    /// Where control most likely goes from the last instruction, if the trace can go on there.
    #[expect(unsafe_code, reason = "looks into blocks")]
    fn next(
        &self,
        find: &dyn Fn(u16) -> Option<BlockRef>,
        seen: &[BlockRef],
    ) -> Option<(u16, BlockRef)> {
        let step = self.steps.last()?;
        // SAFETY: nothing clears the cache while a trace is made.
        if !unsafe { step.block.get() }.linkable {
            return None;
        }
        let i = &step.instruction;
        let after = in_page(i64::from(step.at) + i.len() as i64);
        let target = direct_target(i).and_then(in_page);
        let known = |offset: Option<u16>| {
            let offset = offset?;
            // SAFETY: as above.
            let found = find(offset).filter(|block| unsafe { block.get() }.is_whole())?;
            Some((offset, found))
        };
        let (offset, block) = match i.flow_control() {
            FlowControl::Next => known(after)?,
            FlowControl::UnconditionalBranch | FlowControl::Call => known(target)?,
            FlowControl::ConditionalBranch if i.is_jcc_short_or_near() => {
                // SAFETY: as above.
                let heat = |side: &(u16, BlockRef)| unsafe { side.1.get() }.heat();
                match (known(target), known(after)) {
                    (Some(taken), Some(not)) if heat(&taken) > heat(&not) => taken,
                    (Some(taken), None) => taken,
                    (_, not) => not?,
                }
            }
            _ => return None,
        };
        // A short loop is gone through several times: its accesses share what they look up.
        let short = self.steps.len() <= SHORT && block == *seen.first()?;
        (short || !seen.contains(&block)).then_some((offset, block))
    }
}
