//! The virtual machines of a user: each a process of its own with a folder and a socket, found,
//! listed and told what to do from any other process, with no daemon between.
//!
//! ```text
//!  run, run -d ─► host: Vm + command + Entry ─┬─ lock, state, log   (registry, output)
//!  ps, logs, rm ── Registry ──────────────────┘
//!  exec, pause, stop, kill, wait ── Client ──► control socket ──► serve
//! ```

mod attach;
pub(crate) mod children;
mod control;
mod copies;
mod copy;
mod host;
mod info;
mod input;
mod job;
mod launch;
mod names;
mod operations;
mod output;
pub(crate) mod places;
mod ready;
mod registry;
mod restart;
mod serve;
mod stat;
mod tools;
mod unpack;
mod usage;
mod watch;

pub use attach::{AttachEnd, Attachment, DetachKeys, Follower, Since, attach, log_length, resize};
pub use control::{Client, Reply, Request};
pub use control::{Forked, Snapshotted, Traffic};
pub(crate) use control::{connect, listen, receive, send};
pub use copy::{CopyOptions, archive_in, archive_out, copy_in, copy_out};
pub use host::host;
pub use info::{KILLED, Status, VmConfig, VmInfo, VmState};
pub use job::{Job, Source};
pub use launch::{Begin, Detached, Launch, create, detach, run_detached, start, told_of};
pub(crate) use names::check as check_name;
pub(crate) use operations::command_over;
pub use operations::{
    Inspected, exec, fork, inspect, kill, log, network, pause, remove, rename, restart, signal,
    snapshot, stop, unpause, wait, wait_ready,
};
pub use output::{Line, LogReader, Stream};
pub(crate) use ready::Finder;
pub use ready::ReadyMark;
pub use registry::{Registry, new_id, now};
pub use restart::RestartPolicy;
pub(crate) use serve::bridge;
pub use stat::{PathKind, PathStat, stat};
pub use tools::{Process, processes};
pub use usage::{Usage, usage};
pub(crate) use watch::Watch;
