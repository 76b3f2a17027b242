//! Looking into a guest: gdb, core dumps, where its memory goes.
//!
//! ```text
//!   enter ─▶ debugged: arm ─▶ Processor::run ─▶ exit: exception stub, kick, end of the call
//!              ▲         (INT3, DR0–DR3, TF)       │
//!              │                                   ▼ disarm; context: what the stub's frame says
//!              └──────────── serve ◀─▶ gdbstub ◀─▶ Output, Input ◀─▶ gdb
//! ```
//!
//! Nothing of this needs a backend's help: breakpoints are INT3 in the guest's code, steps and watchpoints
//! are the processor's own, and all of them end in the host's exception stubs, from where the host
//! sets the state back to what was interrupted.
//!
//! | module | job |
//! |---|---|
//! | `context` | the guest's own state, wherever it stands |
//! | `core_dump` | all of it in a file |
//! | `image` | its program, where it lies |
//! | `memory` | its memory, without its rights |
//! | `registers` | registers as gdb has them |
//! | `points` | breakpoints and watchpoints |
//! | `probe` | whether there are debug registers |
//! | `profile` | where allocations come from |
//! | `listener` | the connection |
//! | `target` | what gdb asks for |
//! | `session` | a debugger's session: stops, and what it wants then |
//! | `watch` | calls as spans, and their time |
//! | `run` | the loop of a call under a debugger |

mod context;
mod core_dump;
mod image;
mod listener;
mod memory;
mod points;
mod probe;
mod profile;
mod registers;
mod run;
mod session;
mod target;
mod watch;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::error::CallError;

pub use listener::DebugListener;
pub(crate) use profile::Profile;
pub use profile::{AllocationProfile, AllocationSite, CodeAddress};
pub(crate) use session::Debugging;
pub(crate) use watch::Watch;

/// A guest could not be looked into.
#[derive(Debug, Error)]
pub enum DebugError {
    /// The connection.
    #[error("The debugger's connection failed")]
    Connection(#[source] io::Error),
    /// The file.
    #[error("Can't write the core dump {path:?}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The sandbox can't be used any more.
    #[error("The sandbox can't be used any more: {0}")]
    Unrecoverable(String),
    /// The guest's state can't be read.
    #[error("The guest's state can't be read")]
    State(#[source] Box<CallError>),
}

/// What a sandbox does for those who want to know more, besides a debugger.
#[derive(Debug, Default)]
pub(crate) struct Aids {
    /// Where core dumps of crashes go.
    pub(crate) core_dumps: Option<PathBuf>,
    /// The last that was written.
    last_core_dump: Option<PathBuf>,
    /// Whether calls are timed.
    measures: bool,
    /// Allocations, while they are wanted.
    pub(crate) profile: Option<Box<Profile>>,
}
