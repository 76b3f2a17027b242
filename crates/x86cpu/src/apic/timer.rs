//! The APIC timer: one-shot, periodic and TSC-deadline (Intel SDM 3A §12.5.4). It counts
//! nanoseconds of the guest clock, whatever the TSC's frequency.

use super::{LocalApic, lvt};
use crate::cpu::Cpu;
use crate::time::TimeState;

/// What the guest wrote, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Timer {
    pub(super) initial: u32,
    /// Divide configuration register: bits 0, 1 and 3.
    pub(super) divide: u32,
    /// Guest clock at which the current count-down began.
    pub(super) start_ns: u64,
    /// A one-shot count-down is over.
    pub(super) expired: bool,
    /// IA32_TSC_DEADLINE; 0 when disarmed.
    pub(super) tsc_deadline: u64,
}

const MODE_PERIODIC: u32 = 1;
const MODE_DEADLINE: u32 = 2;

impl Timer {
    fn divisor(&self) -> u64 {
        let code = (self.divide & 3) | ((self.divide >> 1) & 4);
        1 << ((code + 1) & 7)
    }

    pub(super) fn period_ns(&self) -> u64 {
        u64::from(self.initial) * self.divisor()
    }
}

impl LocalApic {
    fn timer_mode(&self) -> u32 {
        (self.lvt[lvt::TIMER] >> 17) & 3
    }

    pub(super) fn periodic_mode(&self) -> bool {
        self.timer_mode() == MODE_PERIODIC
    }

    pub(super) fn deadline_mode(&self) -> bool {
        self.timer_mode() == MODE_DEADLINE
    }

    /// When the timer fires, in guest-clock nanoseconds.
    pub(crate) fn timer_deadline(&self, time: &TimeState) -> Option<u64> {
        if self.deadline_mode() {
            return (self.timer.tsc_deadline != 0).then(|| time.clock_at(self.timer.tsc_deadline));
        }
        (self.timer.initial != 0 && !self.timer.expired)
            .then(|| self.timer.start_ns.saturating_add(self.timer.period_ns()))
    }

    /// The current count register.
    pub(super) fn current_count(&self, now: u64) -> u32 {
        if self.deadline_mode() || self.timer.initial == 0 || self.timer.expired {
            return 0;
        }
        let gone = now.saturating_sub(self.timer.start_ns) / self.timer.divisor();
        let initial = u64::from(self.timer.initial);
        if self.timer_mode() == MODE_PERIODIC {
            (initial - gone % initial) as u32
        } else {
            initial.saturating_sub(gone) as u32
        }
    }

    /// Fires if it is time.
    fn timer_expire(&mut self, now: u64, time: &TimeState) {
        if self.timer_deadline(time).is_none_or(|at| at > now) {
            return;
        }
        if self.deadline_mode() {
            self.timer.tsc_deadline = 0;
        } else if self.timer_mode() == MODE_PERIODIC {
            // Periods that went by unseen are one interrupt: the request bit is already set.
            let period = self.timer.period_ns().max(1);
            let periods = (now - self.timer.start_ns) / period;
            self.timer.start_ns += periods * period;
        } else {
            self.timer.expired = true;
        }
        let entry = self.lvt[lvt::TIMER];
        if entry & lvt::MASKED == 0 && self.software_enabled() {
            self.accept(entry as u8, false);
        }
    }

    /// After a change of the LVT entry's mode: the switch to or from deadline mode disarms.
    pub(super) fn timer_mode_changed(&mut self, old_entry: u32) {
        let was_deadline = (old_entry >> 17) & 3 == MODE_DEADLINE;
        if was_deadline != self.deadline_mode() {
            self.timer.initial = 0;
            self.timer.tsc_deadline = 0;
        }
    }
}

impl Cpu {
    /// Looks at the timer and arms the host's for the next time it is due.
    pub(crate) fn apic_timer_due(&mut self) {
        let now = self.machine.host.clock_ns();
        self.apic.timer_expire(now, &self.sys.time);
        self.apic_arm_timer();
    }

    /// Arms the host's timer for what the registers say.
    pub(crate) fn apic_arm_timer(&mut self) {
        let deadline = self.apic.timer_deadline(&self.sys.time);
        self.machine.host.arm_timer(self.id, deadline);
    }

    pub(super) fn apic_start_timer(&mut self, initial: u32) {
        if self.apic.deadline_mode() {
            return;
        }
        self.apic.timer.initial = initial;
        self.apic.timer.expired = false;
        self.apic.timer.start_ns = self.machine.host.clock_ns();
        self.apic_arm_timer();
    }

    /// The divisor changes in the middle of a count-down: the count goes on from where it is.
    pub(super) fn apic_set_divide(&mut self, value: u32) {
        let now = self.machine.host.clock_ns();
        let timer = &self.apic.timer;
        let gone = now.saturating_sub(timer.start_ns) / timer.divisor();
        self.apic.timer.divide = value & 0xb;
        let ns = gone.saturating_mul(self.apic.timer.divisor());
        self.apic.timer.start_ns = now.saturating_sub(ns);
        self.apic_arm_timer();
    }

    /// IA32_TSC_DEADLINE.
    pub(crate) fn apic_tsc_deadline(&self) -> u64 {
        if self.apic.deadline_mode() {
            self.apic.timer.tsc_deadline
        } else {
            0
        }
    }

    /// Writes IA32_TSC_DEADLINE: ignored in the other modes.
    pub(crate) fn apic_set_tsc_deadline(&mut self, value: u64) {
        if self.apic.deadline_mode() {
            self.apic.timer.tsc_deadline = value;
            self.apic_timer_due();
            self.want_events_if_deliverable();
        }
    }
}
