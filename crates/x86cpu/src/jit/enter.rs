//! From one address space or privilege to another without leaving compiled code: an instruction
//! that changes either has run, and what comes next is compiled too.
#![expect(
    unsafe_code,
    reason = "prepares frames, which the areas of the processor have"
)]

use std::sync::atomic::Ordering;

use super::runtime::{LEAVE, from_bits, replay};
use crate::cpu::Cpu;
use crate::flags::rflags;
use crate::mem::PAGE_MASK;
use crate::mem::area::Frame;
use crate::tuning::Counters;

impl Cpu {
    /// Has compiled code go on at RIP, in whatever area is current now. Gives what the glue is told:
    /// the frame to go on with, or to leave.
    pub(super) fn go_on(&mut self, from: &mut Frame) -> u64 {
        let out = self.other_frame(from);
        if out == LEAVE {
            let counters = &self.shared.counters;
            Counters::add(
                if self.code.jit.missed_jump {
                    &counters.exits_indirect
                } else {
                    &counters.exits_interpreter
                },
                1,
            );
        }
        out
    }

    fn other_frame(&mut self, from: &mut Frame) -> u64 {
        let busy = self.shared.requests.load(Ordering::Relaxed) != 0;
        if busy || !self.sys.mode.is64() || !self.mmu.is_fast() {
            return LEAVE;
        }
        self.drop_stale_traces();
        let Some(code) = self.code_here() else {
            return LEAVE;
        };
        let mut area = self.view.area();
        if std::ptr::eq(area.cast::<Frame>().as_ptr(), from) {
            return self.start(from, code);
        }
        let host_rsp = from.host_rsp;
        // SAFETY: the area is the processor's, and another than that of the frame that is borrowed.
        let to = unsafe { &mut area.as_mut().frame };
        self.prepare(to);
        to.host_rsp = host_rsp;
        self.start(to, code)
    }

    /// The last that a frame needs before compiled code runs with it.
    fn start(&mut self, frame: &mut Frame, code: u64) -> u64 {
        frame.flags = from_bits(self.flags.bits());
        frame.resume = code;
        frame.missed = self.rip;
        frame.rip_page = self.rip & !PAGE_MASK;
        self.refresh(frame);
        self.forget_way();
        std::ptr::from_mut(frame) as u64
    }

    /// What a frame needs that isn't running: all but flags and where to go.
    pub(super) fn prepare(&mut self, frame: &mut Frame) {
        frame.cpu = std::ptr::from_mut(self) as u64;
        frame.requests = &raw const self.shared.requests as u64;
        frame.helper = replay as *const () as u64;
        frame.vectors_live = 0;
        frame.x87_note = u64::MAX;
        if let Some(made) = &self.code.jit.made {
            frame.code_base = made.base;
        }
    }

    /// What system instructions find in the frame, and in the one that STAC and CLAC change to.
    pub(super) fn refresh_system(&mut self, frame: &mut Frame) {
        let kernel = self.cpl == 0;
        frame.not_kernel = u8::from(!kernel);
        frame.other = 0;
        (frame.stac, frame.clac) = (1, 1);
        if !kernel {
            frame.waiting = 1;
            return;
        }
        let events = &self.sys.events;
        let waiting =
            events.external.is_some() || events.window_wanted || self.apic.deliverable().is_some();
        frame.waiting = u8::from(waiting);
        let set = self.rflags & rflags::AC != 0;
        (frame.stac, frame.clac) = (u8::from(!set), u8::from(set));
        frame.alignment = (self.rflags >> 16) as u8;
        let Some(mut other) = self.mmu.other_under_smap() else {
            return;
        };
        frame.other = other.as_ptr() as u64;
        // SAFETY: an area of the processor, and another than that of the frame.
        let other = unsafe { &mut other.as_mut().frame };
        if other.cpu != frame.cpu || other.code_base != frame.code_base {
            self.prepare(other);
        }
        other.not_kernel = 0;
        (other.stac, other.clac) = (frame.clac, frame.stac);
        other.alignment = frame.alignment ^ (rflags::AC >> 16) as u8;
        other.other = std::ptr::from_mut(frame) as u64;
    }

    /// Takes note that compiled code has changed the frame, and RFLAGS.AC with it.
    #[inline]
    pub(super) fn follow_frame(&mut self, frame: &Frame) {
        if !std::ptr::eq(self.view.area().cast::<Frame>().as_ptr(), frame) {
            self.update_mmu_mode();
        }
    }

    /// The code for jumps to RIP.
    fn code_here(&mut self) -> Option<u64> {
        let linear = self.rip;
        let base = self.code.jit.made.as_ref()?.base;
        if let Some(code) = self.view.jump(linear) {
            return Some(code);
        }
        if let Some(offset) = self.mmu.jump(linear) {
            return Some(base + u64::from(offset));
        }
        if self.find_trace(linear) {
            return self.view.jump(linear);
        }
        None
    }
}
