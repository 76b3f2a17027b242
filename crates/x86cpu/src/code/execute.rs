//! Running blocks: the innermost loop.
#![expect(
    unsafe_code,
    reason = "walks the ops of a block, and from block to block, by pointer"
)]

use std::sync::atomic::Ordering;

use crate::code::cache::{BlockRef, KeyBits};
use crate::code::fuse::instructions_of;
use crate::code::op::Op;
use crate::cpu::{Cpu, reg};
use crate::mem::PAGE_MASK;
use crate::trap::{Trap, TrapKind};
use crate::tuning::Counters;

impl Cpu {
    /// Ends the running block after the current instruction.
    #[inline]
    pub(crate) fn end_block_early(&mut self) {
        self.block_end.0 = std::ptr::null();
    }

    /// Whether a long instruction should stop where it can be resumed: somebody wants something, or
    /// the running block is stale.
    #[inline]
    pub fn must_leave_block(&self) -> bool {
        self.block_end.0.is_null() || self.shared.requests.load(Ordering::Relaxed) != 0
    }

    /// Whether a block found earlier may run now: not stale, and if it crosses into another page,
    /// that page is mapped and the same.
    pub(crate) fn usable(&mut self, block: BlockRef, linear: u64) -> Result<bool, Trap> {
        // SAFETY: nothing has cleared the cache since the caller found the block.
        let found = unsafe { block.get() };
        if !found.is_current() || !self.code_within_limit(u64::from(found.len)) {
            return Ok(false);
        }
        let Some(second) = found.second_gpa() else {
            return Ok(true);
        };
        let next = (linear | PAGE_MASK).wrapping_add(1);
        let next = if self.sys.mode.is64() {
            next
        } else {
            next & 0xffff_ffff
        };
        Ok(self.translate_fetch(next)? == second && found.second_is_current())
    }

    /// Remembers a block unless each of its entries needs the checks of [`Cpu::usable`].
    pub(crate) fn remember_plain(&mut self, linear: u64, global: bool, block: BlockRef) {
        // SAFETY: nothing has cleared the cache since the caller found the block.
        let found = unsafe { block.get() };
        if found.second_gpa().is_none() && !found.is_one() {
            self.remember_block(linear, global, block);
        }
    }

    /// Runs blocks until something is requested.
    pub(crate) fn run_blocks(&mut self) -> Result<(), Trap> {
        // `Arc` keeps it in place while the processor is borrowed by handlers.
        let shared = self.shared.clone();
        let mut last: Option<(BlockRef, u64)> = None;
        self.forget_way();
        loop {
            if shared.requests.load(Ordering::Relaxed) != 0 || self.budget_exit().is_some() {
                return Ok(());
            }
            let block = match self.quick_block() {
                // SAFETY: the jump cache holds only blocks of the cache as it is.
                Some(block) if unsafe { block.get() }.is_current() => block,
                _ => {
                    let cleared = self.code.clears;
                    // Not later: what decodes may have been called by compiled code, which goes.
                    if self.code.wants_to_grow() {
                        self.grow_code();
                    }
                    let block = self.find_block(0)?;
                    if self.code.clears != cleared {
                        last = None;
                    }
                    block
                }
            };
            if let Some((from, delta)) = last.take() {
                // SAFETY: `from` was forgotten above if the cache was cleared.
                let from = unsafe { from.get() };
                // A link must not skip the checks of a block that the jump cache doesn't take: one
                // that goes on in another page, or that CS's limit cuts short.
                if self.quick_block() == Some(block) {
                    from.link(delta, block);
                }
            }
            if self.code.jit.is_on() && self.mmu.is_fast() {
                self.drop_stale_traces();
                let code = self.compiled(block);
                if code != 0 {
                    last = None;
                    self.run_compiled(code)?;
                    continue;
                }
                if std::mem::take(&mut self.code.jit.wants_room) {
                    if self.code.wants_to_grow() {
                        self.grow_code();
                    } else {
                        self.flush_blocks();
                    }
                    last = None;
                    continue;
                }
            }
            self.forget_way();
            let mut block = block;
            loop {
                // SAFETY: blocks stay in place while they run: only `find_block` and requests,
                // handled outside of this function, clear the cache.
                let current = unsafe { block.get() };
                let start = self.rip;
                let start_linear = self.code_linear();
                self.execute(block)?;
                let delta = self.rip.wrapping_sub(start);
                match current.follow(delta) {
                    // SAFETY: links are between blocks of the cache as it is.
                    Some(next) if unsafe { next.get() }.is_current() => {
                        block = next;
                        if self.code.jit.is_on() && self.is_hot(block) {
                            break;
                        }
                    }
                    _ => {
                        if current.linkable
                            && (start_linear ^ self.code_linear()) & !PAGE_MASK == 0
                            && !self.block_end.0.is_null()
                        {
                            last = Some((block, delta));
                        }
                        break;
                    }
                }
                if shared.requests.load(Ordering::Relaxed) != 0 || self.budget_exit().is_some() {
                    return Ok(());
                }
            }
        }
    }

    /// Forgets decoded blocks for want of room. Not while one runs.
    pub(super) fn flush_blocks(&mut self) {
        self.code.clear_blocks();
        Counters::add(&self.shared.counters.flushes, 1);
    }

    /// Whether a block is compiled, or is to be; counts that it is run.
    #[inline(always)]
    fn is_hot(&self, block: BlockRef) -> bool {
        // SAFETY: the caller has just found the block.
        let block = unsafe { block.get() };
        block.code() != 0 || block.warms_to(self.code.jit.threshold(), 1)
    }

    /// Runs what is left of a block from one of its ops on, whose block's RIP is set.
    pub(crate) fn execute_rest(&mut self, block: BlockRef, op: *const Op) -> Result<(), Trap> {
        // SAFETY: as in `execute`.
        let end = unsafe { block.get() }.end();
        self.instructions += instructions_from(op, end);
        self.block_end.0 = end;
        self.run_ops(op, end)
    }

    /// Runs one instruction at the current RIP.
    pub(crate) fn run_one(&mut self) -> Result<(), Trap> {
        let block = self.find_block(KeyBits::ONE)?;
        self.execute(block)
    }

    /// Runs a block. On an error RIP is where the trap leaves it.
    #[inline(always)]
    fn execute(&mut self, block: BlockRef) -> Result<(), Trap> {
        // SAFETY: handed out by the cache, which nothing clears while a block runs.
        let block = unsafe { block.get() };
        self.gpr[usize::from(reg::BLOCK_RIP)] = self.rip;
        self.instructions += u64::from(block.count);
        self.block_end.0 = block.end();
        self.run_ops(block.ops(), block.end())
    }

    /// Runs ops up to the block's end.
    #[inline(always)]
    fn run_ops(&mut self, mut op: *const Op, end: *const Op) -> Result<(), Trap> {
        loop {
            // SAFETY: `op` is within the block: it starts at the first and stops at the end.
            let current = unsafe { &*op };
            if (current.run)(self, current).is_err() {
                return self.stopped(current, end);
            }
            // SAFETY: at most one past the last op.
            op = unsafe { op.add(1) };
            if op >= self.block_end.0 {
                break;
            }
        }
        if op != end {
            return self.ended_early(op, end);
        }
        Ok(())
    }

    /// The op did not complete.
    #[cold]
    #[inline(never)]
    fn stopped(&mut self, op: &Op, end: *const Op) -> Result<(), Trap> {
        self.instructions -= instructions_from(op, end);
        if !matches!(self.trap.kind, TrapKind::Resume) {
            // SAFETY: a part of this op, behind its block.
            let part = unsafe { std::mem::take(&mut self.failed_part).0.as_ref() };
            self.rip = self.own_rip(part.unwrap_or(op));
        }
        Err(Trap)
    }

    /// The block was told to end before `op`; the instruction before it is complete once its other
    /// ops have run.
    #[cold]
    #[inline(never)]
    fn ended_early(&mut self, mut op: *const Op, end: *const Op) -> Result<(), Trap> {
        loop {
            // SAFETY: `op` is before the block's end and after its first op.
            let (before, current) = unsafe { (&*op.sub(1), &*op) };
            if current.ip != before.ip {
                self.instructions -= instructions_from(op, end);
                self.rip = self.own_rip(current);
                return Ok(());
            }
            if (current.run)(self, current).is_err() {
                return self.stopped(current, end);
            }
            // SAFETY: at most the block's end.
            op = unsafe { op.add(1) };
            if op == end {
                return Ok(());
            }
        }
    }
}

/// Instructions of a block from an op on.
fn instructions_from(mut op: *const Op, end: *const Op) -> u64 {
    let (mut count, mut ip) = (0, None);
    while op < end {
        // SAFETY: between an op of the block and its end.
        let current = unsafe { &*op };
        if current.len != 0 && ip != Some(current.ip) {
            ip = Some(current.ip);
            count += instructions_of(current);
        }
        // SAFETY: at most the block's end.
        op = unsafe { op.add(1) };
    }
    count
}
