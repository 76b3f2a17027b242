//! What is compiled at a time: blocks of one page, along the path that is taken most.

use iced_x86::{Decoder, FlowControl, Instruction, OpKind};

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
    /// [`Features::decoder_options`](crate::cpuid::Features::decoder_options).
    options: u32,
}

/// The ops of a block that are for instructions; none is for several, as lowering leaves what is to be
/// compiled.
#[expect(unsafe_code, reason = "looks at the ops of a block")]
fn instruction_ops(block: &Block) -> impl Iterator<Item = &Op> {
    let count = (block.end() as usize - block.ops() as usize) / size_of::<Op>();
    // SAFETY: so many ops lie behind the block, and stay as they are while it is there.
    let ops = unsafe { std::slice::from_raw_parts(block.ops(), count) };
    ops.iter().filter(|op| op.len != 0)
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
    /// blocks were made of is looked at. `page` has the first bytes of the next page behind it, if the block is
    /// an instruction that goes on there. `None` if bytes and blocks don't agree.
    pub(super) fn new(
        head: BlockRef,
        page: &mut [u8],
        read: impl Fn(usize, &mut [u8]),
        find: impl Fn(BlockRef, u16) -> Option<BlockRef>,
        steps: Vec<Step>,
        options: u32,
    ) -> Option<Self> {
        let mut trace = Self { steps, options };
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

    #[expect(unsafe_code, reason = "looks into a block")]
    fn add(
        &mut self,
        block: BlockRef,
        page: &mut [u8],
        read: impl Fn(usize, &mut [u8]),
    ) -> Option<()> {
        // SAFETY: nothing clears the cache while a trace is made.
        let current = unsafe { block.get() };
        let start = current.offset();
        let end = start + usize::from(current.len);
        let bytes = page.get_mut(start..end)?;
        read(start, bytes);
        let mut decoder = Decoder::with_ip(64, bytes, start as u64, self.options);
        let first = self.steps.len();
        for op in instruction_ops(current) {
            let at = start + usize::from(op.ip);
            if let Some(last) = self.steps[first..].last_mut()
                && usize::from(last.at) == at
            {
                last.ops += 1;
                continue;
            }
            if start + decoder.position() != at {
                return None;
            }
            self.steps.push(Step {
                instruction: Instruction::default(),
                at: at as u16,
                op,
                ops: 1,
                block,
                last: false,
                follow: None,
            });
            decoder.decode_out(&mut self.steps.last_mut()?.instruction);
        }
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
