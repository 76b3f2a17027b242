//! The language that the host and the guest's agent speak.
//!
//! ```text
//!   host (crates/engine)                                   guest (guest/agent, PID 1)
//!
//!   vsock listen 1025  <-- control connection ------------  connect to CID 2 at start
//!       host::Control       Hello  ->  <- Setup                mounts the root, sets names
//!                           Ready  ->                          (the host never polls)
//!                           <- ControlRequest   Reply ->       clock, entropy, freeze, shutdown
//!
//!   vsock connect 1024 --- one connection for each exec ->  accept
//!       host::ExecSession   <- ExecRequest, Stdin, Resize, Signal ...
//!                           Started, Stdout, Stderr, Exited ->
//! ```
//!
//! Every message is one *frame*: a 32-bit little-endian length and that many bytes of
//! [postcard](https://postcard.jamesmunns.com/wire-format). A frame is at most [`MAX_FRAME`] bytes, so
//! the peer can't make us reserve more; anything else that doesn't decode is an error that ends the
//! connection. Both peers treat the other's bytes as hostile: nothing in this crate panics on input.
//!
//! Where a guest has no vsock, [`mux`] carries the same connections over one byte stream.
//!
//! The wire format is versioned by [`message::Hello`]; new message kinds go at the end of their enum.
//! A guest that is restored may be older than its host: what its agent can't do is an error that says
//! so ([`host::HostError::TooOld`]), and all else works.
#![forbid(unsafe_code)]

pub mod frame;
pub mod host;
pub mod message;
#[cfg(unix)]
pub mod mux;
pub mod transport;

pub use frame::{FrameDecoder, FrameError, MAX_FRAME};
pub use transport::Transport;

/// Port on the guest at which the agent accepts one connection for each exec.
pub const EXEC_PORT: u32 = 1024;

/// Port on the host (CID 2) to which the agent opens its control connection.
pub const CONTROL_PORT: u32 = 1025;

/// Newest protocol version that this crate speaks.
pub const VERSION: u16 = 6;

/// Oldest protocol version that this crate speaks.
pub const OLDEST_VERSION: u16 = 1;

/// First version with kept sessions, freeze and thaw, sync and compact.
pub const SNAPSHOT_VERSION: u16 = 2;

/// First version with further addresses.
pub const ADDRESS_VERSION: u16 = 3;

/// First version with mounts.
pub const MOUNT_VERSION: u16 = 4;

/// First version with cards on the host's networks.
pub const CARD_VERSION: u16 = 5;

/// First version that limits the number of processes.
pub const PROCESSES_VERSION: u16 = 6;

/// Bytes of standard input that the host may send before the agent grants more with
/// [`message::ExecEvent::StdinCredit`].
///
/// Without it, a process that doesn't read its input would fill the connection, and a signal for
/// that process would wait behind data that nobody takes.
pub const STDIN_WINDOW: u32 = 512 * 1024;

/// Most bytes of standard input or output that a sender puts into one frame.
pub const MAX_DATA: usize = 64 * 1024;
