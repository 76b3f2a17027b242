//! Counting the instructions that run, and stopping after a number of them.
//!
//! The interpreter counts by blocks as it runs them, always ([`Cpu::instructions`]). Compiled code counts
//! only once somebody has asked for it: its traces are made with the counting in them from then on. What is
//! left runs down in [`crate::mem::area::Frame::left`] while compiled code runs, and is kept here else.

use crate::cpu::Cpu;
use crate::exit::CpuExit;

/// More than any budget: centuries of instructions, and far from where the counters wrap.
const MOST: u64 = 1 << 62;

/// See the module's text.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// What [`Cpu::instructions`] stays below as long as the budget isn't spent; negative where compiled
    /// code has run further than that.
    until: i64,
    /// The count of both at which it is spent.
    end: u64,
    /// Instructions that compiled code has run since it counts.
    compiled: u64,
    /// The count of both when counting began.
    start: u64,
    /// Whether compiled code counts.
    pub(crate) counting: bool,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            until: i64::MAX,
            end: u64::MAX,
            compiled: 0,
            start: 0,
            counting: false,
        }
    }
}

impl Cpu {
    /// After so many more instructions [`Cpu::run`] returns [`CpuExit::BudgetSpent`], and goes on doing so
    /// until another number is set; `None` for no end. Compiled code looks where it looks for requests, so
    /// that it may run a few thousand instructions more.
    ///
    /// The first number has compiled code count from then on, for which all of it is made anew.
    pub fn set_budget(&mut self, instructions: Option<u64>) {
        let total = self.instructions.wrapping_add(self.budget.compiled);
        if !self.budget.counting {
            if instructions.is_none() {
                return;
            }
            self.budget.counting = true;
            self.budget.start = total;
            self.count_in_compiled_code();
        }
        self.budget.end = total.wrapping_add(instructions.unwrap_or(MOST).min(MOST));
        self.budget_changed();
    }

    /// Instructions that have run to their end since [`Cpu::set_budget`] was first called with a number;
    /// `None` before that. Between two runs only.
    pub fn retired(&self) -> Option<u64> {
        let total = self.instructions.wrapping_add(self.budget.compiled);
        (self.budget.counting).then(|| total.wrapping_sub(self.budget.start))
    }

    fn budget_changed(&mut self) {
        self.budget.until = self.budget.end.wrapping_sub(self.budget.compiled) as i64;
    }

    /// The exit, if the budget is spent.
    #[inline(always)]
    pub(crate) fn budget_exit(&self) -> Option<CpuExit> {
        (self.instructions as i64 >= self.budget.until).then_some(CpuExit::BudgetSpent)
    }

    /// What is left for compiled code, less one: negative when it is spent.
    pub(crate) fn budget_left(&self) -> u64 {
        (self.budget.until as u64)
            .wrapping_sub(self.instructions)
            .wrapping_sub(1)
    }

    /// Takes note of what compiled code has left of it.
    pub(crate) fn set_budget_left(&mut self, left: u64) {
        let ran = self.budget_left().wrapping_sub(left);
        self.add_compiled(ran);
    }

    /// Counts instructions of compiled code. (Those that are taken off have been counted twice, or will
    /// be.)
    pub(crate) fn add_compiled(&mut self, instructions: u64) {
        self.budget.compiled = self.budget.compiled.wrapping_add(instructions);
        self.budget_changed();
    }
}
