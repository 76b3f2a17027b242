//! Cancelling a call from any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use skerry_hypervisor::{CallId, CancelOutcome, Canceller};

/// Why a call was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Reason {
    Killed = 0,
    TimedOut = 1,
    CpuTime = 2,
}

/// What the owner of a sandbox and those who cancel its calls share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) canceller: Canceller,
    reason: AtomicU8,
}

impl Shared {
    pub(crate) fn new(canceller: Canceller) -> Self {
        Self {
            canceller,
            reason: AtomicU8::new(Reason::Killed as u8),
        }
    }

    /// Cancels this call. Of several reasons that meet, one counts.
    pub(crate) fn cancel(&self, call: CallId, reason: Reason) -> CancelOutcome {
        if reason != Reason::Killed {
            self.reason.store(reason as u8, Ordering::Release);
        }
        self.canceller.cancel(call)
    }

    /// Why the call that has just been cancelled was.
    pub(crate) fn take_reason(&self) -> Reason {
        match self.reason.swap(Reason::Killed as u8, Ordering::AcqRel) {
            1 => Reason::TimedOut,
            2 => Reason::CpuTime,
            _ => Reason::Killed,
        }
    }
}

/// Names one call of one sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallToken(CallId);

/// What a kill found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Killed {
    /// A call was active: it ends with [`CallError::Cancelled`](crate::CallError::Cancelled), at once or,
    /// if a host function is running, when that returns.
    Call,
    /// No call was active, or not the one that was meant: nothing was done.
    NothingActive,
}

impl From<CancelOutcome> for Killed {
    fn from(outcome: CancelOutcome) -> Self {
        match outcome {
            CancelOutcome::Cancelled => Self::Call,
            CancelOutcome::NotActive => Self::NothingActive,
        }
    }
}

/// Cancels calls of one sandbox, from any thread, also after the sandbox is gone.
#[derive(Clone, Debug)]
pub struct InterruptHandle(pub(crate) Arc<Shared>);

impl InterruptHandle {
    /// Kills the call that is active now. A kill never reaches a later call.
    pub fn kill(&self) -> Killed {
        match self.0.canceller.current() {
            Some(call) => self.0.cancel(call, Reason::Killed).into(),
            None => Killed::NothingActive,
        }
    }

    /// The call that is active now.
    pub fn current(&self) -> Option<CallToken> {
        self.0.canceller.current().map(CallToken)
    }

    /// Kills this call, if it is still active.
    pub fn kill_call(&self, call: CallToken) -> Killed {
        self.0.cancel(call.0, Reason::Killed).into()
    }
}
