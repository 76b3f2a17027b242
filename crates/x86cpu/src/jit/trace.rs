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

/// An op of an instruction.
struct Found {
    ip: u16,
    op: *const Op,
    back: u16,
    /// It may be one of several.
    plain: bool,
}

/// Gives the ops of a block that are for instructions, fused ones by their parts.
#[expect(unsafe_code, reason = "walks the ops of a block")]
fn each_op(block: &Block, mut found: impl FnMut(Found) -> Option<()>) -> Option<()> {
    let mut at = block.ops();
    while at < block.end() {
        // SAFETY: between the block's first op and its end.
        let op = unsafe { &*at };
        if op.is_fused() {
            for n in 0..u32::from(op.extra) {
                // SAFETY: `aux` ops on from a fused op there are `extra` parts.
                let part = unsafe { at.add((op.aux + n) as usize) };
                found(Found {
                    // SAFETY: as above.
                    ip: unsafe { &*part }.ip,
                    op: part,
                    back: if n == 0 {
                        u16::try_from(op.aux).unwrap_or(Call::MIDST)
                    } else {
                        Call::MIDST
                    },
                    plain: false,
                })?;
            }
        } else if op.len != 0 {
            found(Found {
                ip: op.ip,
                op: at,
                back: 0,
                plain: true,
            })?;
        }
        // SAFETY: at most the block's end.
        at = unsafe { at.add(1) };
    }
    Some(())
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
    /// Follows the path from a block on. `find` gives the block that comes after one at an offset of the
    /// page, if it is decoded and current; `read` fills in the page from an offset on, of which only what
    /// blocks were made of is looked at. `None` if bytes and blocks don't agree, or nothing can be compiled.
    pub(super) fn new(
        head: BlockRef,
        page: &mut [u8; PAGE_SIZE],
        read: impl Fn(usize, &mut [u8]),
        find: impl Fn(BlockRef, u16) -> Option<BlockRef>,
        steps: Vec<Step>,
    ) -> Option<Self> {
        let mut trace = Self {
            steps,
            crosses: false,
        };
        let mut seen = [head; BLOCKS];
        let mut block = head;
        for n in 0..BLOCKS {
            trace.add(block, page, &read)?;
            seen[n] = block;
            if trace.steps.len() >= LONGEST || n + 1 == BLOCKS {
                break;
            }
            let Some((offset, next)) = trace.next(&find, &seen[..=n]) else {
                break;
            };
            if let Some(step) = trace.steps.last_mut() {
                step.follow = Some(offset);
            }
            block = next;
        }
        Some(trace)
    }

    /// The one instruction of a block that goes on in another page. `bytes` are those of its page and the
    /// first of the other.
    pub(super) fn crossing(head: BlockRef, bytes: Option<&[u8]>, steps: Vec<Step>) -> Option<Self> {
        // SAFETY: nothing clears the cache while a trace is made.
        #[expect(unsafe_code, reason = "looks into a block")]
        let block = unsafe { head.get() };
        let instruction = bytes.and_then(|bytes| {
            let options = DecoderOptions::FORCE_RESERVED_NOP;
            let mut decoder = Decoder::with_ip(64, bytes, 0, options);
            decoder.set_position(block.offset()).ok()?;
            decoder.set_ip(block.offset() as u64);
            let instruction = decoder.decode();
            (instruction.len() == usize::from(block.len)).then_some(instruction)
        });
        let mut trace = Self {
            crosses: true,
            steps,
        };
        each_op(block, |found| {
            match trace.steps.last_mut() {
                Some(step) => step.ops += 1,
                None => trace.steps.push(Step {
                    instruction: instruction.unwrap_or_default(),
                    at: block.offset() as u16,
                    op: found.op,
                    ops: 1,
                    back: found.back,
                    block: head,
                    last: true,
                    follow: None,
                }),
            }
            Some(())
        })?;
        (!trace.steps.is_empty()).then_some(trace)
    }

    #[expect(unsafe_code, reason = "looks into a block")]
    fn add(
        &mut self,
        block: BlockRef,
        page: &mut [u8; PAGE_SIZE],
        read: impl Fn(usize, &mut [u8]),
    ) -> Option<()> {
        // SAFETY: nothing clears the cache while a trace is made.
        let current = unsafe { block.get() };
        let start = current.offset();
        let end = start + usize::from(current.len);
        let bytes = page.get_mut(start..end)?;
        read(start, bytes);
        let options = DecoderOptions::FORCE_RESERVED_NOP;
        let mut decoder = Decoder::with_ip(64, bytes, start as u64, options);
        let first = self.steps.len();
        each_op(current, |found| {
            let at = start + usize::from(found.ip);
            if let Some(last) = self.steps[first..].last_mut()
                && found.plain
                && usize::from(last.at) == at
            {
                last.ops += 1;
                return Some(());
            }
            if start + decoder.position() != at {
                return None;
            }
            self.steps.push(Step {
                instruction: Instruction::default(),
                at: at as u16,
                op: found.op,
                ops: 1,
                back: found.back,
                block,
                last: false,
                follow: None,
            });
            decoder.decode_out(&mut self.steps.last_mut()?.instruction);
            Some(())
        })?;
        self.steps[first..].last_mut()?.last = true;
        (start + decoder.position() == end).then_some(())
    }

    /// Where control most likely goes from the last instruction, if the trace can go on there.
    #[expect(unsafe_code, reason = "looks into blocks")]
    fn next(
        &self,
        find: impl Fn(BlockRef, u16) -> Option<BlockRef>,
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
            let found =
                find(step.block, offset).filter(|block| unsafe { block.get() }.is_whole())?;
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
