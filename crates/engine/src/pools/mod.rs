//! Pools: clean virtual machines, kept ready in one process for whoever needs one for a moment.
//!
//! ```text
//!  library:  Clones (what to make) ─► Pool ── acquire ─► Lease ─► exec … ── dropped ─► reset
//!  commands: pool create ─► a process with a Pool ◄─ socket ── pool exec, acquire, release, stats
//! ```

mod client;
mod clones;
mod place;
mod pool;
mod server;

pub use client::{acquire, close, exec, list, release, stats};
pub use clones::{Clones, VmPool};
pub use place::{PoolConfig, PoolInfo};
pub use pool::{Lease, Pool, PoolError, PoolOptions, PoolStats, ResetPolicy, Template};
pub use server::{PoolLaunch, create, run_pool};
