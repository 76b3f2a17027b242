//! Running guest code until something needs the caller.

use std::sync::atomic::Ordering;

use crate::cpu::Cpu;
use crate::exit::CpuExit;
use crate::shared::{Doing, request};
use crate::sys::events::Next;
use crate::trap::{Trap, TrapKind};
use crate::tuning::Counters;

impl Cpu {
    /// Runs guest code until something needs the caller. An exit that reads is answered with
    /// [`Cpu::complete_read`] before the next run.
    pub fn run(&mut self) -> CpuExit {
        self.fpu_enter();
        self.catch_up_with_memory();
        self.shared.set_doing(Doing::Interpreting);
        let exit = self.run_inside();
        self.shared.set_doing(Doing::Outside);
        self.count();
        self.leave_memory();
        self.fpu_sync();
        exit
    }

    /// Whether the last exit was a read whose value has not been given.
    pub fn wants_value(&self) -> bool {
        self.devices.wants_value()
    }

    /// Shows others what is counted elsewhere.
    fn count(&self) {
        let counters = &self.shared.counters;
        Counters::set(&counters.interpreted_instructions, self.instructions);
        self.code.count(counters);
    }

    fn run_inside(&mut self) -> CpuExit {
        if self.devices.wants_value() {
            // The caller has no answer: an empty bus.
            self.complete_read(u64::MAX);
        }
        if self.devices.is_active()
            && let Some(exit) = self.step_and_deliver()
        {
            return exit;
        }
        let mut first = true;
        loop {
            let requests = self.shared.requests.load(Ordering::SeqCst);
            if requests & request::EXIT != 0 {
                self.shared
                    .requests
                    .fetch_and(!request::EXIT, Ordering::SeqCst);
                return CpuExit::Requested;
            }
            if let Some(exit) = self.budget_exit() {
                return exit;
            }
            if requests & request::MEMORY != 0 {
                self.shared
                    .requests
                    .fetch_and(!request::MEMORY, Ordering::SeqCst);
                self.catch_up_with_memory();
            }
            if requests & request::CODE != 0 {
                // `run_blocks` looks before it runs any.
                self.shared
                    .requests
                    .fetch_and(!request::CODE, Ordering::SeqCst);
            }
            if first || requests & !(request::MEMORY | request::CODE) != 0 {
                first = false;
                match self.poll_events() {
                    Next::Run => {}
                    Next::Step => {
                        if let Some(exit) = self.step_and_deliver() {
                            return exit;
                        }
                        continue;
                    }
                    Next::Exit(exit) => return exit,
                }
            }
            if let Err(Trap) = self.run_blocks()
                && let Some(exit) = self.handle_trap()
            {
                return exit;
            }
        }
    }

    /// Runs one instruction, and what it raises; what waits for its end then has its turn.
    fn step_and_deliver(&mut self) -> Option<CpuExit> {
        self.devices.restart();
        let result = self.run_one();
        let completed = result.is_ok() || matches!(self.trap.kind, TrapKind::Resume);
        let exit = match result {
            Ok(()) => {
                self.devices.clear();
                None
            }
            Err(Trap) => self.handle_trap(),
        };
        // A step that waits for a device goes on, as the same step, in the next run.
        if exit.is_none() || !self.devices.is_active() {
            self.after_step(completed);
        }
        exit
    }

    /// Runs one instruction without delivering what it raises: the trap is in [`Cpu::trap`], and
    /// RIP is on the instruction if it did not complete. For tests and debuggers.
    pub fn step(&mut self) -> Result<(), Trap> {
        self.catch_up_with_memory();
        self.devices.restart();
        let mut result = self.run_one();
        if result.is_err() && matches!(self.trap.kind, TrapKind::Resume) {
            result = Ok(());
        }
        if result.is_ok() {
            self.devices.clear();
        }
        self.leave_memory();
        result
    }

    #[cold]
    fn handle_trap(&mut self) -> Option<CpuExit> {
        match std::mem::take(&mut self.trap.kind) {
            TrapKind::Fault { vector, error_code } => {
                self.devices.clear();
                self.deliver_exception(vector, error_code)
            }
            TrapKind::Exit(exit) => Some(exit),
            TrapKind::Resume | TrapKind::None => {
                self.devices.clear();
                None
            }
        }
    }
}
