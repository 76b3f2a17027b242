//! The guest's own state, wherever it stands: of a guest that stands in one of the host's exception stubs,
//! the state that the exception interrupted.

use gdbstub::common::Signal;
use skerry_hypervisor::CpuState;
use skerry_hypervisor::state::DebugRegisters;
use skerry_sandbox_abi::status;

use crate::error::CallError;
use crate::fault::{Fault, Frame, in_stub};
use crate::sandbox::{Sandbox, Status};
use crate::tables;

/// DR6 and DR7 when nothing has happened and nothing is watched (Intel SDM 3B §18.2).
const DR6: u64 = 0xffff_0ff0;
const DR7: u64 = 0x400;
/// The vector of a debug exception.
pub(super) const DEBUG: u8 = 1;
/// The vector of INT3.
pub(super) const BREAKPOINT: u8 = 3;
/// RFLAGS.TF: a debug exception after each instruction.
pub(super) const TRAP: u64 = 1 << 8;
/// RFLAGS.RF: no instruction breakpoint at the next one.
pub(super) const RESUME: u64 = 1 << 16;

const CS: usize = 1;
const SS: usize = 2;
pub(super) const RSP: usize = 4;

/// What interrupted the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Exception {
    pub(super) vector: u8,
    /// The conditions that DR6 had recorded.
    pub(super) conditions: u64,
}

/// A guest that does not run.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// As it goes on: in ring 3, no condition in DR6, no trap flag and no breakpoints of the host's.
    pub(super) state: CpuState,
    /// Present if it stands in an exception stub.
    pub(super) exception: Option<Exception>,
    /// What the exception means.
    pub(super) fault: Option<Fault>,
}

impl Sandbox {
    /// What the guest is.
    pub(crate) fn context(&mut self) -> Result<Context, CallError> {
        let mut state = self.processor.state()?;
        let conditions = state.debug.dr6;
        state.debug = DebugRegisters {
            address: [0; 4],
            dr6: DR6,
            dr7: DR7,
        };
        // A trap that has yet to be delivered is one that was asked for here.
        if state.events.exception.is_some_and(|e| e.vector == DEBUG) {
            state.events.exception = None;
        }
        let (mut exception, mut fault) = (None, None);
        if in_stub(&state.system) {
            let frame = Frame::read(&self.region)
                .ok_or_else(|| CallError::Misbehaved("no exception frame".into()))?;
            let ring3 = tables::entry_registers(&self.layout, frame.rip);
            state.system.segments[CS] = ring3.system.segments[CS];
            state.system.segments[SS] = ring3.system.segments[SS];
            state.general.rip = frame.rip;
            state.general.rflags = frame.rflags;
            state.general.gpr[RSP] = frame.rsp;
            state.events = Default::default();
            exception = Some(Exception {
                vector: frame.vector,
                conditions,
            });
            fault = Some(frame.fault(state.system.cr2, &self.layout));
        }
        state.general.rflags &= !(TRAP | RESUME);
        Ok(Context {
            state,
            exception,
            fault,
        })
    }

    /// The signal that a Unix system would have ended the guest with; `None` for one that is well.
    pub(super) fn crash(&self, context: &Context) -> Option<Signal> {
        if let Some(exception) = context.exception {
            return Some(of_vector(exception.vector));
        }
        match (&self.status, self.control.status()) {
            (Status::Ready, _) => None,
            (_, status::PANIC | status::OUT_OF_MEMORY) => Some(Signal::SIGABRT),
            _ => Some(Signal::SIGTERM),
        }
    }
}

/// As Linux has it (`arch/x86/kernel/traps.c`).
pub(super) fn of_vector(vector: u8) -> Signal {
    match vector {
        0 | 16 | 19 => Signal::SIGFPE,
        DEBUG | BREAKPOINT => Signal::SIGTRAP,
        6 => Signal::SIGILL,
        10..=12 | 17 => Signal::SIGBUS,
        _ => Signal::SIGSEGV,
    }
}

/// The signal that stands for an error which ends a call.
pub(super) fn of_error(error: &CallError) -> Signal {
    match error {
        CallError::Panicked(_) | CallError::OutOfMemory { .. } => Signal::SIGABRT,
        CallError::TimedOut(_) | CallError::CpuTime(_) | CallError::BudgetSpent(_) => {
            Signal::SIGXCPU
        }
        CallError::Cancelled => Signal::SIGTERM,
        CallError::Fault(_) => Signal::SIGSEGV,
        _ => Signal::SIGSYS,
    }
}
