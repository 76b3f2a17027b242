//! How a process that runs guests gives up what it doesn't need, before the first instruction of the
//! first of them.
//!
//! ```text
//!  engine ── confine(Plan) ─► namespaces ─► Landlock ─► groups, capabilities ─► seccomp (Process)
//!                                                                                  │ inherited
//!  machine, devices, net, engine ── a thread begins ─► enter(Role) ─► capabilities, seccomp (Role)
//! ```
//! The process is confined once, while it has one thread; every thread that it starts afterwards has
//! the filter of the process, and narrows it to its [`Role`]. Nothing here is ever taken back.
//!
//! What a host doesn't have is left out, and told: [`Report`] has a line for each [`Layer`].
//! [`Strictness::Strict`] makes it an error. In a process that was never confined, [`enter`] does nothing: a
//! program that embeds machines keeps its own rights.
//!
//! A system call that a thread's role has no need for ends the process, with a line on its standard
//! error that names the role and the call.

mod report;
mod sys;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use report::{ConfineError, Layer, LayerReport, Report};

/// What a thread is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The process as a whole: what all of its threads may do.
    Process,
    /// Runs a virtual processor, and serves its devices meanwhile.
    Vcpu,
    /// Runs the user-mode network.
    Network,
    /// Answers at the machine's socket: writes snapshots, makes copies.
    Control,
    /// Passes bytes between descriptors that are open.
    Stream,
    /// Fires timers, takes samples.
    Timer,
    /// Reads, hashes and frees files.
    Storage,
    /// Serves folders of the host to the guest.
    Share,
    /// Passes frames between the guest and a TAP device.
    Tap,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Process,
        Self::Vcpu,
        Self::Network,
        Self::Control,
        Self::Stream,
        Self::Timer,
        Self::Storage,
        Self::Share,
        Self::Tap,
    ];

    /// A word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Vcpu => "vcpu",
            Self::Network => "network",
            Self::Control => "control",
            Self::Stream => "stream",
            Self::Timer => "timer",
            Self::Storage => "storage",
            Self::Share => "share",
            Self::Tap => "tap",
        }
    }
}

/// What happens where the host doesn't have a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Strictness {
    /// It is left out.
    #[default]
    Auto,
    /// It is an error.
    Strict,
    /// The process is not confined at all.
    Off,
}

/// What a process still needs.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// What happens where a layer is missing.
    pub strictness: Strictness,
    /// Names of threads that may be there and end by themselves, having run nothing of a guest's.
    pub passing: &'static [&'static str],
    /// Files and folders that are read. What doesn't exist is left out.
    pub read: Vec<PathBuf>,
    /// Folders below which everything may be done, and files that are written. What doesn't exist is
    /// left out.
    pub write: Vec<PathBuf>,
    /// Folders in which names are made and removed; nothing below them is read.
    pub names: Vec<PathBuf>,
    /// It needs the host's network.
    pub network: bool,
    /// It listens at ports below 1024, as far as it may.
    pub low_ports: bool,
    /// It serves folders of the host, as far as it may with the owner of their files.
    pub shares: bool,
}

/// Confines this process, which has one thread, for good. The first call counts; later ones change
/// nothing and tell what the first did.
pub fn confine(plan: &Plan) -> Result<&'static Report, ConfineError> {
    sys::confine(plan)
}

/// Has the line that a forbidden system call leads to written to `file` besides standard error, where
/// nobody may be.
pub fn last_words(file: std::os::fd::OwnedFd) {
    sys::last_words(file);
}

/// What holds for this process, if it was confined.
#[must_use]
pub fn active() -> Option<&'static Report> {
    sys::active()
}

/// Narrows this thread to `role`, if the process is confined. Where that fails the process ends: it
/// would be less confined than it says.
pub fn enter(role: Role) {
    sys::enter(role);
}

/// What would hold here: tried out in a process of its own.
pub fn probe() -> Result<Report, ConfineError> {
    sys::probe()
}
