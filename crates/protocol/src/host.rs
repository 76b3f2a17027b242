//! The host's side: the control connection of a guest and exec sessions in it.
//!
//! Generic over [`Transport`](crate::Transport); nothing here knows of vsock. Called by `crates/engine`.

mod control;
mod exec;

pub use control::Control;
pub use exec::{ExecHandle, ExecSession, StdinWriter};

use crate::frame::FrameError;
use crate::message::ExecFailure;

/// Why the agent did not do what the host asked.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The connection failed or carried something else than the protocol.
    #[error("Lost the guest's agent")]
    Connection(#[from] FrameError),
    /// Another message was due.
    #[error("Guest's agent broke the protocol: {0}")]
    Protocol(&'static str),
    /// No common version.
    #[error(
        "Guest's agent {agent} speaks protocol versions {oldest} to {newest}, this host {}; \
         use the agent that came with this version of Skerry",
        crate::VERSION
    )]
    Version {
        /// Version of the agent.
        agent: String,
        /// Oldest protocol version that it speaks.
        oldest: u16,
        /// Newest protocol version that it speaks.
        newest: u16,
    },
    /// The agent of a guest that an older Skerry started lacks something.
    #[error(
        "Guest's agent {agent} cannot {asked}: it speaks protocol version {speaks} and that takes \
         {needs}; start the guest anew, not from a snapshot of an older version of Skerry"
    )]
    TooOld {
        /// Version of the agent.
        agent: String,
        /// What it was to do.
        asked: &'static str,
        /// Protocol version that both sides speak.
        speaks: u16,
        /// Protocol version that has it.
        needs: u16,
    },
    /// The agent tried and failed; the words are its own.
    #[error("Guest's agent could not {asked}: {reason}")]
    Agent {
        /// What it was asked to do.
        asked: &'static str,
        /// Its answer.
        reason: String,
    },
    /// The command was not started.
    #[error("{}", .0.message)]
    NotStarted(ExecFailure),
    /// The local reader or writer of a stream failed.
    #[error("Could not pass on the command's {stream}")]
    LocalStream {
        /// Which of the streams.
        stream: &'static str,
        /// What happened.
        source: std::io::Error,
    },
}
