//! What happens between instructions: resets, traps, NMIs, interrupts, in the order of Intel SDM 3A
//! table 7-2; and single steps.
//!
//! The run loop asks [`Cpu::poll_events`] when it starts and whenever
//! [`crate::shared::CpuShared::requests`] is non-zero at a block's entry.

use std::sync::atomic::Ordering;

use crate::cpu::{Cpu, reg, seg};
use crate::exit::CpuExit;
use crate::flags::rflags;
use crate::shared::request;
use crate::sys::state::{Activity, Segment, SystemState, attr, cr0};
use crate::trap::vector;

/// What the run loop does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run blocks until a request comes.
    Run,
    /// Run one instruction, call [`Cpu::after_step`], and ask again.
    Step,
    /// Leave.
    Exit(CpuExit),
}

/// What held when a single instruction began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepState {
    sti_shadow: bool,
    mov_ss_shadow: bool,
    trap_flag: bool,
    resume_flag: bool,
}

impl StepState {
    /// Shadows of STI and of MOV SS.
    pub(crate) fn shadows(&self) -> (bool, bool) {
        (self.sti_shadow, self.mov_ss_shadow)
    }
}

/// DR6 bits.
pub(crate) mod dr6 {
    pub(crate) const BREAKPOINTS: u64 = 0xf;
    pub(crate) const BS: u64 = 1 << 14;
}

impl crate::sys::state::EventState {
    /// SYSCALL: the single-step trap comes only if TF is still set after it.
    pub(crate) fn keep_step_if(&mut self, trap_flag: bool) {
        if let Some(step) = &mut self.step {
            step.trap_flag &= trap_flag;
        }
    }
}

impl Cpu {
    /// Has the events looked at before the next block.
    #[inline]
    pub(crate) fn want_events(&self) {
        self.shared.request(request::EVENTS);
    }

    /// The same, if the APIC has something for the processor.
    #[inline]
    pub(crate) fn want_events_if_deliverable(&self) {
        if self.apic.deliverable().is_some() {
            self.want_events();
        }
    }

    /// The same, if anything waits for RFLAGS.IF.
    #[inline]
    pub(crate) fn want_events_if_pending(&self) {
        let events = &self.sys.events;
        if events.external.is_some() || events.window_wanted || self.apic.deliverable().is_some() {
            self.want_events();
        }
    }

    /// MOV SS, POP SS: the next instruction is not interrupted.
    pub(crate) fn start_mov_ss_shadow(&mut self, op: &crate::code::Op) {
        let events = &mut self.sys.events;
        // Of several in a row only the first has the effect.
        if events.step.is_some_and(|s| s.mov_ss_shadow) {
            return;
        }
        events.mov_ss_shadow = true;
        self.sys.events.shadow_rip = self.next_rip(op);
        self.want_events_if_pending();
        if self.sys.events.nmis_pending != 0 || self.rflags & rflags::TF != 0 {
            self.want_events();
        }
    }

    /// Whether an external interrupt could be taken now.
    fn interruptible(&self) -> bool {
        let events = &self.sys.events;
        let awake = matches!(self.sys.activity, Activity::Running | Activity::Halted);
        awake
            && self.rflags & rflags::IF != 0
            && !(events.sti_shadow || events.mov_ss_shadow)
            && events.external.is_none()
            && events.exception.is_none()
    }

    /// Whether [`Self::inject_extint`] would be taken now.
    pub fn ready_for_extint(&self) -> bool {
        self.apic.accepts_extint() && self.interruptible()
    }

    /// Delivers an interrupt of the 8259s before the next instruction.
    pub fn inject_extint(&mut self, vector: u8) {
        self.sys.events.external = Some(vector);
        self.want_events();
    }

    /// Asks for [`CpuExit::InterruptWindow`] as soon as external interrupts can be taken.
    pub fn request_interrupt_window(&mut self, wanted: bool) {
        self.sys.events.window_wanted = wanted;
        if wanted {
            self.want_events();
        }
    }

    /// Deals with everything that waits between two instructions.
    pub fn poll_events(&mut self) -> Next {
        let shared = &self.shared;
        let taken = request::INTERRUPT | request::TIMER | request::EVENTS | request::EXIT;
        let requests = shared.requests.fetch_and(!taken, Ordering::SeqCst);
        if self.inside_instruction() {
            // It waits for its device answers, and goes on before anything else.
            self.shared.request(requests & taken | request::EVENTS);
            if self.sys.events.step.is_some() {
                return Next::Step;
            }
            return self.begin_step();
        }
        if requests & request::EXIT != 0 {
            self.shared.request(requests & taken & !request::EXIT);
            return Next::Exit(CpuExit::Requested);
        }
        if requests & request::INTERRUPT != 0 {
            self.collect_interrupts();
            self.take_init_and_sipi();
        }
        if requests & request::TIMER != 0 {
            self.apic_timer_due();
        }
        if let Some(vector) = self.apic.take_ended() {
            self.want_events();
            return Next::Exit(CpuExit::IoapicEoi { vector });
        }
        match self.sys.activity {
            Activity::WaitForInit | Activity::WaitForSipi => {
                return Next::Exit(CpuExit::WaitForSipi);
            }
            Activity::Shutdown if self.sys.events.nmis_pending == 0 => {
                return Next::Exit(CpuExit::Shutdown);
            }
            _ => {}
        }
        self.expire_shadow();
        if let Some(exit) = self.deliver_next() {
            return Next::Exit(exit);
        }
        if self.sys.activity == Activity::Halted {
            let deadline = self.apic.timer_deadline(&self.sys.time);
            return Next::Exit(CpuExit::Halted { deadline });
        }
        self.prepare_step()
    }

    /// A shadow covers the one instruction at `shadow_rip`; past it, it is over.
    fn expire_shadow(&mut self) {
        let rip = self.rip;
        let events = &mut self.sys.events;
        if (events.sti_shadow || events.mov_ss_shadow) && rip != events.shadow_rip {
            events.sti_shadow = false;
            events.mov_ss_shadow = false;
        }
    }

    /// Delivers the most urgent event; after it, others may follow before the handler's first
    /// instruction. The result is an exit.
    fn deliver_next(&mut self) -> Option<CpuExit> {
        if let Some(pending) = self.sys.events.exception.take() {
            if let Some(payload) = pending.payload {
                if pending.vector == vector::PF {
                    self.trap.address = payload;
                } else if pending.vector == vector::DB {
                    self.sys.dr6 |= payload;
                }
            } else {
                self.trap.address = self.sys.cr2;
            }
            if let Some(exit) = self.deliver_exception(pending.vector, pending.error_code) {
                return Some(exit);
            }
        }
        if let Some(exit) = self.deliver_debug() {
            return Some(exit);
        }
        let shadow = self.sys.events.sti_shadow || self.sys.events.mov_ss_shadow;
        if self.sys.events.nmis_pending != 0 && !self.sys.events.nmi_masked && !shadow {
            self.sys.events.nmis_pending -= 1;
            self.sys.events.nmi_masked = true;
            if let Some(exit) = self.deliver_interrupt(vector::NMI) {
                return Some(exit);
            }
        }
        self.deliver_external()
    }

    fn deliver_debug(&mut self) -> Option<CpuExit> {
        let pending = self.sys.events.pending_debug;
        if pending == 0 || self.sys.events.mov_ss_shadow {
            return None;
        }
        self.sys.events.pending_debug = 0;
        self.sys.dr6 = (self.sys.dr6 & !dr6::BREAKPOINTS) | pending;
        self.deliver_trap(vector::DB)
    }

    fn deliver_external(&mut self) -> Option<CpuExit> {
        let events = &self.sys.events;
        let shadow = events.sti_shadow || events.mov_ss_shadow;
        if let Some(vector) = events.external {
            // Accepted earlier: taken as soon as it can be.
            if self.rflags & rflags::IF == 0 || shadow {
                return None;
            }
            self.sys.events.external = None;
            return self.deliver_interrupt(vector);
        }
        if !self.interruptible() {
            return None;
        }
        if let Some(vector) = self.apic.deliverable() {
            self.apic.acknowledge(vector);
            return self.deliver_interrupt(vector);
        }
        if self.sys.events.window_wanted && self.apic.accepts_extint() {
            // Asked again until the interrupt comes or the request is taken back.
            self.want_events();
            return Some(CpuExit::InterruptWindow);
        }
        None
    }

    /// Instruction breakpoints, and whether the next instruction must run alone.
    fn prepare_step(&mut self) -> Next {
        let breakpoints = self.sys.instruction_breakpoints_armed();
        if !breakpoints {
            // RF has no other effect than to hold them off.
            self.rflags &= !rflags::RF;
        } else if self.rflags & rflags::RF == 0 && !self.sys.events.mov_ss_shadow {
            let hit = self.instruction_breakpoint();
            if hit != 0 {
                self.sys.dr6 = (self.sys.dr6 & !dr6::BREAKPOINTS) | hit;
                if let Some(exit) = self.deliver_exception(vector::DB, None) {
                    return Next::Exit(exit);
                }
            }
        }
        let events = &self.sys.events;
        let alone = breakpoints
            || events.sti_shadow
            || events.mov_ss_shadow
            || events.pending_debug != 0
            || self.rflags & (rflags::TF | rflags::RF) != 0;
        if alone { self.begin_step() } else { Next::Run }
    }

    fn begin_step(&mut self) -> Next {
        let events = &mut self.sys.events;
        let step = StepState {
            sti_shadow: events.sti_shadow,
            mov_ss_shadow: events.mov_ss_shadow,
            trap_flag: self.rflags & rflags::TF != 0,
            resume_flag: self.rflags & rflags::RF != 0,
        };
        events.sti_shadow = false;
        events.mov_ss_shadow = false;
        events.step = Some(step);
        self.rflags &= !rflags::RF;
        self.want_events();
        Next::Step
    }

    /// After a step: `completed` says that the instruction was carried out, rather than having
    /// raised a fault or waiting for a device.
    pub fn after_step(&mut self, completed: bool) {
        // A delivered event has ended the step; there is nothing to put back then.
        let Some(step) = self.sys.events.step.take() else {
            return;
        };
        if completed {
            // MOV SS suppresses the trap that would follow it.
            if step.trap_flag && !self.sys.events.mov_ss_shadow {
                self.sys.events.pending_debug |= dr6::BS;
            }
        } else {
            self.sys.events.sti_shadow = step.sti_shadow;
            self.sys.events.mov_ss_shadow = step.mov_ss_shadow;
            self.sys.events.shadow_rip = self.rip;
            if step.resume_flag {
                self.rflags |= rflags::RF;
            }
        }
    }

    /// INIT and SIPI from other processors (SDM 3A §9.4.3).
    fn take_init_and_sipi(&mut self) {
        if self.shared.init.load(Ordering::Relaxed)
            && self.shared.init.swap(false, Ordering::SeqCst)
        {
            self.init();
        }
        let sipi = self.shared.sipi.swap(0, Ordering::SeqCst);
        if sipi != 0 && self.sys.activity == Activity::WaitForSipi {
            self.start_at(sipi as u8);
        }
    }

    /// INIT: as power-up, except what SDM 3A table 10-1 says stays: caches' bits of CR0, the
    /// TSC and other MSRs, the FPU and SIMD registers.
    pub(crate) fn init(&mut self) {
        let old = self.sys.clone();
        self.sys = SystemState {
            cr0: (old.cr0 & (cr0::CD | cr0::NW)) | cr0::ET,
            msr: old.msr,
            time: old.time,
            xcr0: old.xcr0,
            ..SystemState::reset()
        };
        self.set_reset_registers();
        self.apic.reset();
        self.apic.publish(&self.shared);
        self.apic_arm_timer();
        if self.id != 0 {
            self.sys.activity = Activity::WaitForSipi;
        }
        self.forget_devices();
    }

    /// General registers, flags and segment bases as after reset.
    pub(crate) fn set_reset_registers(&mut self) {
        self.gpr[..16].fill(0);
        let signature = self.cpuid.get(1, 0).unwrap_or_default().eax;
        self.gpr[usize::from(reg::RDX)] = u64::from(signature);
        self.rip = 0xfff0;
        self.rflags = rflags::FIXED;
        self.flags.set_bits(0);
        for index in 0..6u8 {
            let segment = self.sys.segments[usize::from(index)];
            self.set_segment(index, segment);
        }
        self.update_mode();
        self.tlb_flush_all();
    }

    fn start_at(&mut self, sipi: u8) {
        let cs = Segment {
            selector: u16::from(sipi) << 8,
            base: u64::from(sipi) << 12,
            limit: 0xffff,
            attributes: attr::P | attr::S | attr::CODE | attr::RW | attr::ACCESSED,
            unusable: false,
        };
        self.set_segment(seg::CS, cs);
        self.rip = 0;
        self.sys.activity = Activity::Running;
        self.update_mode();
    }
}
