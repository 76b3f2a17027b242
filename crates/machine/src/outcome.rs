//! How a run ended.

use std::fmt;

/// Why a guest crashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CrashReason {
    /// A processor met a fault while it delivered a double fault, or shut itself down.
    TripleFault {
        /// Which processor.
        cpu: u32,
    },
    /// The guest's kernel reported a panic.
    Panic,
}

impl fmt::Display for CrashReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TripleFault { cpu } => write!(f, "Triple fault on CPU {cpu}"),
            Self::Panic => write!(f, "The guest's kernel panicked"),
        }
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// The guest powered the machine off.
    PoweredOff,
    /// The guest reset the machine, which was told not to reboot.
    Reset,
    /// The guest wrote to the debug-exit port: the status is `(value << 1) | 1`.
    DebugExit(u32),
    /// The guest can't go on.
    GuestCrash {
        /// Why.
        reason: CrashReason,
        /// The processors' registers, for a person.
        registers: String,
    },
    /// The time limit passed.
    TimedOut,
    /// The host ended the run.
    Killed,
    /// Skerry itself failed.
    InternalError(String),
}
