//! Compiled code and the processor around it: in, out, and what it asks of the interpreter.
#![expect(unsafe_code, reason = "runs compiled code, and serves it")]

use std::ptr::NonNull;
use std::time::Instant;

use super::classify::Align;
use super::compile::{self, Request, Scratch, Work};
use super::trace::Trace;
use super::{Call, PATIENCE, Way};
use crate::code::{BlockRef, Op, Pool};
use crate::cpu::{Cpu, reg, seg};
use crate::flags::rflags;
use crate::fpu::{Ymm, attention, blocked, prepare_x87};
use crate::mem::area::{Area, Frame};
use crate::mem::{PAGE_MASK, PAGE_SIZE, PageState, Target, changed_pages, code_changes};
use crate::shared::Doing;
use crate::trap::{Trap, TrapKind};
use crate::tuning::Counters;

/// What comes out of compiled code: what [`replay`] said, or that a way out was taken; and the frame
/// that ran last.
#[repr(C)]
struct Left {
    out: u64,
    frame: *mut Frame,
}

/// What [`replay`] tells the glue: back to the trace.
const BACK: u64 = 0;
/// Leave: RIP is set.
pub(super) const LEAVE: u64 = 1;
/// Leave: the reason is in `cpu.trap`. What is more than this is the frame to go on with.
pub(super) const TRAP: u64 = 2;

/// Runs that one counts for which compiled code was left for: it costs as much as so many, and what hot
/// code leads to gets hot.
const LEFT: u16 = 4;

/// What processors that begin small take turns with.
static POOL: Pool<Box<Scratch>> = Pool::new();

/// Flags as LAHF and SETO give them, at their places in RFLAGS.
fn to_bits(flags: u32) -> u64 {
    u64::from(flags >> 8 & 0xd5) | u64::from(flags & 1) << 11
}

pub(super) fn from_bits(bits: u64) -> u32 {
    ((bits as u32 & 0xd5) | 2) << 8 | (bits >> 11 & 1) as u32
}

impl Cpu {
    /// Forgets all code, decoded and compiled.
    pub(crate) fn clear_code(&mut self) {
        self.code.clear();
        self.mmu.drop_jumps();
    }

    /// Drops compiled code that is stale. To be called before any is entered.
    #[inline(always)]
    pub(crate) fn drop_stale_traces(&mut self) {
        let now = code_changes();
        if self.code.jit.seen != now {
            self.drop_traces_before(now);
        }
    }

    #[cold]
    fn drop_traces_before(&mut self, now: u64) {
        let jit = &mut self.code.jit;
        let since = std::mem::replace(&mut jit.seen, now);
        let mut dropped = 0;
        if !changed_pages(since, now, |page| dropped += jit.drop_changed(page)) {
            let pages: Vec<usize> = jit.pages.keys().copied().collect();
            dropped += pages
                .into_iter()
                .map(|page| jit.drop_changed(page))
                .sum::<usize>();
        }
        if dropped > 0 {
            jit.pending = None;
            Counters::add(&self.shared.counters.invalidated_traces, dropped as u64);
        }
    }

    /// The number of a block's trace plus one, compiled now if it is hot; 0 for none.
    #[inline(always)]
    pub(crate) fn compiled(&mut self, block: BlockRef) -> u32 {
        // SAFETY: the caller has just found the block.
        let found = unsafe { block.get() };
        let code = found.code();
        if code != 0 {
            return code;
        }
        let jit = &self.code.jit;
        let left = jit.missed_jump || jit.pending.is_some();
        if found.warms_to(jit.threshold(), if left { LEFT } else { 1 }) {
            self.compile_block(block)
        } else {
            0
        }
    }

    #[cold]
    #[inline(never)]
    fn compile_block(&mut self, block: BlockRef) -> u32 {
        // SAFETY: as above.
        let found = unsafe { block.get() };
        let single = !found.linkable && found.count == 1 && found.is_whole();
        if !self.sys.mode.is64() || found.is_one() || single {
            found.set_heat(u16::MAX);
            return 0;
        }
        if self.code.has_too_many_blocks() || self.code.wants_to_grow() {
            self.code.jit.wants_room = true;
            return 0;
        }
        let page = found.page();
        let changes = self
            .code
            .jit
            .pages
            .get(&(std::ptr::from_ref(page) as usize))
            .map_or(0, |page| page.changes);
        if changes > PATIENCE {
            let wanted = u32::from(self.code.jit.threshold()) << (changes - PATIENCE).min(7);
            if u32::from(found.heat()) < wanted.min(u32::from(u16::MAX) - 1) {
                return 0;
            }
        }
        self.shared.set_doing(Doing::Compiling);
        let start = Instant::now();
        let number = self.compile_now(block);
        let counters = &self.shared.counters;
        Counters::add(&counters.compiler_ns, start.elapsed().as_nanos() as u64);
        self.shared.set_doing(Doing::Interpreting);
        match number {
            Some(number) => {
                found.set_code(number + 1);
                number + 1
            }
            None => {
                found.set_heat(u16::MAX);
                0
            }
        }
    }

    fn compile_now(&mut self, block: BlockRef) -> Option<u32> {
        let kept = self.code.jit.scratch.take().or_else(|| POOL.take());
        let mut scratch = kept
            .filter(|scratch| *scratch.forms.features() == self.features)
            .unwrap_or_else(|| Box::new(Scratch::new(self.features)));
        let number = self.compile_with(block, &mut scratch);
        if self.code.jit.tuning.small {
            scratch.steps.clear();
            POOL.give(scratch);
        } else {
            self.code.jit.scratch = Some(scratch);
        }
        number
    }

    fn compile_with(&mut self, block: BlockRef, scratch: &mut Scratch) -> Option<u32> {
        let (gpa, _) = self.fetch_from(self.code_linear()).ok()?;
        if !self.code.jit.has_room() {
            self.flush_traces();
        }
        let made = self.code.jit.made()?;
        let (origin, glue) = (made.buffer.next(), made.glue);
        // SAFETY: as above.
        let found = unsafe { block.get() };
        let slots = self.mmu.slots().clone();
        let page = slots.page(gpa)?;
        if !std::ptr::eq(page.state, found.page()) || (gpa & PAGE_MASK) as usize != found.offset() {
            return None;
        }
        let version = page.state.version();
        if !found.is_of(version) || !page.state.is_claimed() {
            return None;
        }
        let second = found.second_page();
        if let Some((gpa, state, _)) = second {
            let second = slots.page(gpa)?;
            if !std::ptr::eq(second.state, state) {
                return None;
            }
            second.read(0, &mut scratch.page[PAGE_SIZE..]);
        }
        let steps = std::mem::take(&mut scratch.steps);
        let find = |from: BlockRef, offset: u16| {
            // SAFETY: blocks of the cache as it is, and what follows them in the same page.
            let of_version = |block: &BlockRef| unsafe { block.get() }.is_of(version);
            // SAFETY: the same.
            let from = unsafe { from.get() };
            let delta = u64::from(offset).wrapping_sub(from.offset() as u64);
            from.follow(delta).filter(of_version).or_else(|| {
                let key = self.block_key(gpa & !PAGE_MASK | u64::from(offset), 0);
                self.code.find(key).filter(of_version)
            })
        };
        let read = |offset: usize, into: &mut [u8]| page.read(offset, into);
        let options = self.features.decoder_options();
        let trace = Trace::new(block, &mut scratch.page[..], read, find, steps, options)?;
        let request = Request {
            origin,
            glue,
            hardened: self.code.jit.tuning.hardened,
            counted: self.code.jit.counts.is_some(),
            plain: self.code.jit.plain(found),
        };
        let compiled = match second {
            None => compile::compile(&trace, request, scratch),
            Some(_) => compile::crossing(&trace, request, scratch),
        }?;
        // Whoever writes the page from here on makes the trace stale; who has done so before, or
        // is doing so, has changed the version, or will.
        let changed = |(_, state, version): (u64, &PageState, u32)| state.version() != version;
        if page.state.version() != version || second.is_some_and(changed) {
            return None;
        }
        // Those of another version are stale, whether or not the change has been counted yet: the
        // version that is noted now would hide them.
        let pages = [Some((page.state, version)), second.map(|(_, p, v)| (p, v))];
        for (state, version) in pages.into_iter().flatten() {
            let key = std::ptr::from_ref(state) as usize;
            if self.code.jit.has_others(key, version) {
                self.code.jit.drop_changed(key);
            }
        }
        let counters = &self.shared.counters;
        Counters::add(&counters.compiled_traces, 1);
        Counters::add(&counters.compiled_instructions, trace.steps.len() as u64);
        let index = self.code.indexer();
        let number = self.code.jit.add(block, pages, &trace, &compiled, index);
        if let Some(trace) = number.and_then(|number| self.code.jit.traces.get(number as usize)) {
            // What jumps to the block found before was of a trace that is gone.
            self.code.note_code(self.block_key(gpa, 0), trace.indirect);
        }
        scratch.take_back(trace, compiled);
        number
    }

    /// Forgets all compiled code; the blocks stay.
    fn flush_traces(&mut self) {
        for n in 0..self.code.jit.traces.len() {
            self.code.jit.drop_trace(n as u32);
        }
        self.code.jit.clear();
        self.code.forget_codes();
        self.mmu.drop_jumps();
        Counters::add(&self.shared.counters.flushes, 1);
    }

    /// Has what was left for this trace lead here from now on.
    fn connect(&mut self, number: u32) {
        let jit = &mut self.code.jit;
        if let Some(way) = jit.pending.take() {
            jit.link(way, number);
        }
        if std::mem::take(&mut jit.missed_jump) {
            self.enter_jump(self.rip, number);
        }
    }

    /// Has jumps to a linear address go to a trace.
    fn enter_jump(&mut self, linear: u64, number: u32) {
        if let Some(trace) = self.code.jit.traces.get(number as usize) {
            self.enter_jump_to(linear, trace.indirect);
        }
    }

    /// Has them go to an offset in the buffer.
    fn enter_jump_to(&mut self, linear: u64, offset: u32) {
        if let Some(made) = &self.code.jit.made {
            let entry = Target {
                base: made.base,
                offset,
            };
            self.code.note_page(linear);
            self.mmu.enter_jump(linear, entry);
        }
    }

    /// Has jumps go to the trace for a linear address, if there is one, with as little ado as can be:
    /// this is what a new address space asks for again and again.
    pub(super) fn find_trace(&mut self, linear: u64) -> bool {
        if code_changes() != self.code.jit.seen || !self.mmu.is_fast() {
            return false;
        }
        let Some((gpa, global)) = self.quietly(|cpu| cpu.fetch_from(linear)) else {
            return false;
        };
        let key = self.block_key(gpa, 0);
        let code = match self.code.find_code(key) {
            Some(code) => code,
            None => match self.code_under(key, linear, global) {
                Some(code) => code,
                None => return false,
            },
        };
        Counters::add(&self.shared.counters.jumps_found, 1);
        self.enter_jump_to(linear, code);
        true
    }

    /// The offset in the buffer of the code for jumps to the block under a key. If there is none, the
    /// interpreter is going to ask for the block.
    fn code_under(&mut self, key: u64, linear: u64, global: bool) -> Option<u32> {
        let block = self.code.find(key)?;
        // SAFETY: a block of the cache as it is.
        let found = unsafe { block.get() };
        if !found.is_current() {
            return None;
        }
        let Some(number) = found.code().checked_sub(1) else {
            self.remember_plain(linear, global, block);
            return None;
        };
        let code = self.code.jit.traces.get(number as usize)?.indirect;
        self.code.note_code(key, code);
        Some(code)
    }

    /// Runs compiled code from the trace of this number plus one, until it is left.
    pub(crate) fn run_compiled(&mut self, code: u32) -> Result<(), Trap> {
        let number = code - 1;
        self.connect(number);
        let mut area = self.view.area();
        let rip_page = self.rip & !PAGE_MASK;
        let jit = &self.code.jit;
        let Some(made) = &jit.made else {
            return Ok(());
        };
        let glue = made.base;
        let entry = glue + u64::from(jit.traces[number as usize].direct);
        // SAFETY: the area is the processor's, and nobody uses it now.
        let frame = unsafe { &mut area.as_mut().frame };
        self.prepare(frame);
        frame.rip_page = rip_page;
        frame.flags = from_bits(self.flags.bits());
        frame.left = self.budget_left();
        self.refresh(frame);
        self.shared.set_doing(Doing::Compiled);
        Counters::add(&self.shared.counters.entries, 1);
        // SAFETY: the glue's code is such a function: it keeps what a function must keep, and runs
        // code that is made to use the frame, its area and the processor that the frame names, and
        // guest memory that the TLB has; none of that is borrowed now.
        let Left { out, frame } = unsafe {
            let enter: extern "sysv64" fn(*mut Frame, u64) -> Left =
                std::mem::transmute(glue as *const ());
            enter(area.cast::<Frame>().as_ptr(), entry)
        };
        self.shared.set_doing(Doing::Interpreting);
        // SAFETY: the frame that ran last, of an area of the processor.
        let frame = unsafe { &mut *frame };
        self.follow_frame(frame);
        self.take_x87_note(frame);
        if self.budget.counting {
            self.set_budget_left(frame.left);
        }
        let (from, page, target) = (frame.resume, frame.rip_page, frame.target);
        self.flags.set_bits(to_bits(frame.flags));
        self.left(out, from, page, target)
    }

    /// What comes after compiled code.
    fn left(&mut self, out: u64, from: u64, page: u64, target: u64) -> Result<(), Trap> {
        let counters = &self.shared.counters;
        match out {
            BACK if self.code.jit.is_gone(from) => {
                self.leave_for(target);
                Ok(())
            }
            BACK => {
                let Some((number, way)) = self.code.jit.way_from(from) else {
                    return Ok(());
                };
                self.rip = page.wrapping_add(way.goal as u64);
                if way.link == Way::NO_LINK {
                    Counters::add(&counters.exits_request, 1);
                } else {
                    Counters::add(&counters.exits_unlinked, 1);
                    self.code.jit.pending = Some(number);
                }
                Ok(())
            }
            TRAP => {
                Counters::add(&counters.exits_trap, 1);
                Err(Trap)
            }
            _ => Ok(()),
        }
    }

    /// Compiled code is left for an address that its jump caches don't have.
    fn leave_for(&mut self, target: u64) {
        Counters::add(&self.shared.counters.exits_indirect, 1);
        self.code.jit.missed_jump = true;
        self.rip = target;
    }

    /// Forgets for what compiled code was left: control has gone elsewhere since.
    #[inline(always)]
    pub(crate) fn forget_way(&mut self) {
        self.code.jit.pending = None;
        self.code.jit.missed_jump = false;
    }

    /// What compiled code has noted of its last x87 instruction.
    fn take_x87_note(&mut self, frame: &mut Frame) {
        let note = std::mem::replace(&mut frame.x87_note, u64::MAX);
        if note as u32 != u32::MAX {
            let page = if note >> 32 == 0 {
                frame.rip_page
            } else {
                frame.x87_page
            };
            self.fpu.last_ip = page.wrapping_add(note & PAGE_MASK);
            self.fpu.last_opcode = (note >> 16) as u16 & 0x7ff;
            self.fpu.last_dp = frame.x87_dp;
        }
    }

    /// What compiled code finds in its frame, as it is now.
    pub(super) fn refresh(&mut self, frame: &mut Frame) {
        frame.fs_base = self.seg_base[usize::from(seg::FS)];
        frame.gs_base = self.seg_base[usize::from(seg::GS)];
        let idle = attention::X87_IDLE | attention::X87_UNMASKED;
        let x87 = self.simd_blocked & blocked::X87 == 0 && self.fpu.attention & idle == 0;
        let sse = self.can_copy(blocked::SSE);
        if !sse {
            frame.vectors_live = 0;
        }
        let live = frame.vectors_live != 0;
        let uppers = self.fpu.ymm.iter().map(Ymm::high);
        frame.uppers = u64::from(uppers.fold(0, |all, upper| all | upper) != 0);
        (frame.jumps, frame.jump_keys) = self.mmu.jumps();
        frame.jumps_mask = self.mmu.jumps_mask();
        frame.x87_dp = self.fpu.last_dp;
        frame.backwards = u8::from(self.rflags & rflags::DF != 0);
        frame.x87_away = u8::from(!x87);
        frame.sse_away = u8::from(!live);
        let avx = self.can_copy(blocked::AVX);
        frame.avx_away = u8::from(!live || !avx);
        frame.cross_key = self.mmu.code_key();
        frame.sse_blocked = u8::from(!sse);
        frame.avx_blocked = u8::from(!sse || !avx);
        self.refresh_system(frame);
    }

    /// Whether vector instructions of a kind may run as they are.
    fn can_copy(&self, kind: u32) -> bool {
        self.simd_blocked & kind == 0 && self.fpu.attention & attention::MXCSR == 0
    }

    fn can_copy_x87(&mut self) -> bool {
        self.simd_blocked & blocked::X87 == 0
            && self.fpu.attention & attention::X87_UNMASKED == 0
            && prepare_x87(self).is_ok()
    }

    /// Has the TLB take a window, if it is within a page of RAM.
    fn take_window(
        &mut self,
        number: u32,
        linear: u64,
        bytes: u16,
        write: bool,
        align: Align,
    ) -> bool {
        let within = (linear & PAGE_MASK) + u64::from(bytes) <= PAGE_SIZE as u64;
        let aligned = linear & (align.bytes() as u64 - 1) == 0;
        if within && aligned && self.fill_tlb(linear, write) {
            return true;
        }
        self.code.jit.window_failed(number);
        false
    }

    /// Does a call of compiled code.
    fn serve(&mut self, call: Call, frame: &mut Frame) -> u64 {
        if call.missed {
            Counters::add(&self.shared.counters.tlb_misses, 1);
        } else if call.work == Work::Run {
            Counters::add(&self.shared.counters.calls_interpreter, 1);
        }
        self.take_x87_note(frame);
        self.flags.set_bits(to_bits(match call.work {
            Work::Divide => frame.divide_flags,
            _ => frame.flags,
        }));
        if self.make_ready(call, frame) {
            self.refresh(frame);
            return BACK;
        }
        if call.work == Work::Goto {
            self.leave_for(frame.missed);
            return LEAVE;
        }
        if !self.code.jit.has_blocks(frame.number) {
            if call.work == Work::Cross {
                // Without its block nobody can vouch for it any more: it is to be compiled again.
                let number = self.code.jit.trace_of(frame.number);
                self.code.jit.drop_trace(number);
            }
            return self.decode_again(call, frame);
        }
        let (found, op) = (call.block, call.op);
        // SAFETY: the block of a trace that has its blocks still.
        let block = unsafe { found.get() };
        self.rip = frame.rip_page + block.offset() as u64;
        self.gpr[usize::from(reg::BLOCK_RIP)] = self.rip;
        match call.work {
            Work::Run | Work::Divide | Work::Branch | Work::Jump => {
                self.run_one_op(call, op, block.end(), frame)
            }
            Work::Cross => self.run_crossing(found, frame),
            _ => {
                let result = self.execute_rest(found, op);
                frame.flags = from_bits(self.flags.bits());
                match result {
                    Ok(()) => self.go_on(frame),
                    Err(Trap) => TRAP,
                }
            }
        }
    }

    /// The same where instructions are counted. The trace counts those that the interpreter does for it if
    /// it goes on; if it doesn't, it hasn't counted those before.
    #[cold]
    fn serve_counted(&mut self, call: Call, frame: &mut Frame) -> u64 {
        self.set_budget_left(frame.left);
        let before = self.code.jit.counted_before(frame.number);
        let interpreted = self.instructions;
        let out = self.serve(call, frame);
        let interpreted = self.instructions.wrapping_sub(interpreted);
        match (out, call.work) {
            // What comes next in the trace is a jump.
            (BACK, Work::Cross) => {}
            (BACK, _) => self.add_compiled(interpreted.wrapping_neg()),
            _ => self.add_compiled(before),
        }
        let left = self.budget_left();
        if out > TRAP {
            // SAFETY: the frame to go on with, of an area of the processor; nobody uses it now. It may be
            // the one that is lent to this.
            unsafe { (*(out as *mut Frame)).left = left };
        } else {
            frame.left = left;
        }
        out
    }

    /// Has compiled code count from here on.
    pub(crate) fn count_in_compiled_code(&mut self) {
        self.flush_traces();
        self.code.jit.counts = Some(Vec::new());
    }

    /// Has what compiled code asks for where it expects it. `false` if that can't be, or if it asks for
    /// something else.
    fn make_ready(&mut self, call: Call, frame: &mut Frame) -> bool {
        match call.work {
            Work::Sse | Work::Avx => {
                let ready = self.can_copy(blocked::SSE)
                    && (call.work == Work::Sse || self.can_copy(blocked::AVX));
                frame.vectors_live |= u8::from(ready);
                ready
            }
            Work::X87 => self.can_copy_x87(),
            Work::Window {
                bytes,
                write,
                align,
            } => self.take_window(frame.number, frame.missed, bytes, write, align),
            Work::Jump | Work::Goto => self.find_trace(frame.missed),
            _ => false,
        }
    }

    /// Runs an instruction of a trace whose blocks have been forgotten.
    fn decode_again(&mut self, call: Call, frame: &mut Frame) -> u64 {
        self.rip = frame.rip_page + u64::from(call.at);
        let area = self.view.area();
        let start = self.rip;
        let clears = self.code.jit.clears;
        let result = self.run_one();
        frame.flags = from_bits(self.flags.bits());
        if result.is_err() {
            return TRAP;
        }
        self.code.jit.missed_jump |= call.work == Work::Jump;
        let goes_on = matches!(call.work, Work::Run | Work::Divide)
            && (1..=15).contains(&self.rip.wrapping_sub(start));
        // To decode may be to find a new memory map, for which all traces go: this one too.
        if !goes_on || clears != self.code.jit.clears {
            return self.go_on(frame);
        }
        self.back_if_same(area, frame)
    }

    /// Runs a block that crosses into another page, if it is still what is there.
    fn run_crossing(&mut self, block: BlockRef, frame: &mut Frame) -> u64 {
        let area = self.view.area();
        // SAFETY: traces go before their blocks do.
        let ops = unsafe { block.get() }.ops();
        let result = match self.usable(block, self.rip) {
            Ok(true) => {
                let linear = self.rip;
                self.code.note_page((linear | PAGE_MASK).wrapping_add(1));
                let key = self.mmu.code_key();
                self.code.jit.vouch(frame.number, linear, key);
                self.execute_rest(block, ops)
            }
            Ok(false) => return LEAVE,
            Err(Trap) => Err(Trap),
        };
        frame.flags = from_bits(self.flags.bits());
        frame.target = self.rip;
        if result.is_err() {
            return TRAP;
        }
        self.back_if_same(area, frame)
    }

    /// Back to the trace, with RIP set for where it goes on, unless what was run has changed code, mode
    /// or address space.
    fn back_if_same(&mut self, area: NonNull<Area>, frame: &mut Frame) -> u64 {
        let stale = code_changes() != self.code.jit.seen || self.block_end.0.is_null();
        if stale || self.view.area() != area || !self.sys.mode.is64() {
            return self.go_on(frame);
        }
        self.refresh(frame);
        BACK
    }

    /// Runs the ops of one instruction.
    fn run_one_op(
        &mut self,
        call: Call,
        first: *const Op,
        end: *const Op,
        frame: &mut Frame,
    ) -> u64 {
        self.block_end.0 = end;
        self.instructions += 1;
        let area = self.view.area();
        for n in 0..usize::from(call.ops) {
            // SAFETY: that many ops of the instruction follow each other.
            let op: &Op = unsafe { &*first.add(n) };
            if (op.run)(self, op).is_err() {
                self.instructions -= 1;
                if !matches!(self.trap.kind, TrapKind::Resume) {
                    self.rip = self.own_rip(op);
                }
                frame.flags = from_bits(self.flags.bits());
                return TRAP;
            }
        }
        frame.flags = from_bits(self.flags.bits());
        if matches!(call.work, Work::Branch | Work::Jump) {
            self.code.jit.missed_jump = call.work == Work::Jump;
            return self.go_on(frame);
        }
        if self.block_end.0.is_null() || self.view.area() != area {
            // SAFETY: the first of them.
            let op: &Op = unsafe { &*first };
            self.rip = self.next_rip(op);
            return self.go_on(frame);
        }
        self.refresh(frame);
        BACK
    }
}

/// What the glue calls when compiled code wants something done. A panic ends the process: it can't
/// pass through compiled frames, and the calling convention doesn't let it.
pub(super) extern "sysv64" fn replay(cpu: *mut Cpu, frame: *mut Frame) -> u64 {
    // SAFETY: the glue passes on what `run_compiled` has put into the frame: the processor, which
    // lent itself to compiled code, and the frame, which is apart from it.
    let (cpu, frame) = unsafe { (&mut *cpu, &mut *frame) };
    cpu.shared.set_doing(Doing::Interpreting);
    let jit = &cpu.code.jit;
    let found = jit.call_from(frame.resume);
    let found = found.and_then(|number| Some((number, jit.calls.get(number)?)));
    let out = match found {
        Some((number, call)) => {
            frame.number = number;
            frame.resume = frame.resume.wrapping_add_signed(i64::from(call.resume));
            let call = call.unpack(cpu.code.indexer());
            cpu.follow_frame(frame);
            if cpu.budget.counting {
                cpu.serve_counted(call, frame)
            } else {
                cpu.serve(call, frame)
            }
        }
        None => LEAVE,
    };
    cpu.shared.set_doing(Doing::Compiled);
    out
}

const _: () = assert!(std::mem::offset_of!(Area, frame) == 0);
