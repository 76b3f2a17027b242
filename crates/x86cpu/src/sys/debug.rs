//! Breakpoints in DR0 to DR3 (Intel SDM 3B §18.2).

use crate::cpu::{Cpu, seg};
use crate::sys::state::SystemState;

/// Condition of a breakpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Execute,
    Write,
    /// I/O, with CR4.DE: not raised.
    Port,
    ReadWrite,
}

impl SystemState {
    fn enabled(&self, n: usize) -> bool {
        self.dr7 & (3 << (2 * n)) != 0
    }

    fn condition(&self, n: usize) -> Condition {
        match (self.dr7 >> (16 + 4 * n)) & 3 {
            0 => Condition::Execute,
            1 => Condition::Write,
            2 => Condition::Port,
            _ => Condition::ReadWrite,
        }
    }

    fn length(&self, n: usize) -> u64 {
        match (self.dr7 >> (18 + 4 * n)) & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        }
    }

    /// Whether an instruction breakpoint is enabled.
    pub(crate) fn instruction_breakpoints_armed(&self) -> bool {
        self.dr7 & 0xff != 0
            && (0..4).any(|n| self.enabled(n) && self.condition(n) == Condition::Execute)
    }
}

impl Cpu {
    /// The bits of DR6 for instruction breakpoints at RIP.
    pub(crate) fn instruction_breakpoint(&self) -> u64 {
        let base = if self.sys.mode.is64() {
            0
        } else {
            self.seg_base[usize::from(seg::CS)]
        };
        let linear = self.table_address(base.wrapping_add(self.rip));
        (0..4)
            .filter(|&n| {
                self.sys.enabled(n)
                    && self.sys.condition(n) == Condition::Execute
                    && self.sys.dr[n] == linear
            })
            .fold(0, |bits, n| bits | (1 << n))
    }

    /// A data access of the running instruction: breakpoints that match are trapped after it.
    /// Called by the slow path of memory accesses.
    pub fn data_breakpoint(&mut self, linear: u64, size: usize, write: bool) {
        let last = linear.wrapping_add(size as u64 - 1);
        let sys = &self.sys;
        let hit = (0..4)
            .filter(|&n| {
                let wanted = match sys.condition(n) {
                    Condition::Write => write,
                    Condition::ReadWrite => true,
                    Condition::Execute | Condition::Port => false,
                };
                let length = sys.length(n);
                let first = sys.dr[n] & !(length - 1);
                sys.enabled(n) && wanted && linear <= first + (length - 1) && last >= first
            })
            .fold(0u64, |bits, n| bits | (1 << n));
        if hit != 0 {
            self.sys.events.pending_debug |= hit;
            self.want_events();
            self.end_block_early();
        }
    }
}
