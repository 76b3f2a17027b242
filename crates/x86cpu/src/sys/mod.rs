//! The system side of the processor: modes, segments, events, control registers, MSRs, ports.
//!
//! ```text
//! code::Lowering ── lower.rs ──> handlers in control, segment, far, iret, syscall, msr, port, …
//! run loop ── poll_events (events.rs) ──> deliver_* (interrupt.rs) ──> task.rs for task gates
//! every change of mode ── Cpu::update_mode (mode.rs) ──> cpl, block key, TLB table, blocked units
//! snapshots ── save_state / load_state (snapshot.rs)
//! ```

mod control;
mod debug;
pub(crate) mod descriptor;
pub mod events;
mod far;
mod flag_ops;
mod interrupt;
mod iret;
mod lower;
mod misc;
pub mod mode;
mod msr;
mod operand;
mod port;
mod segment;
pub mod snapshot;
mod stack;
pub mod state;
mod syscall;
mod task;

#[cfg(test)]
mod tests;

pub use events::Next;
pub(crate) use lower::lower;
pub use mode::CodeMode;
pub use state::SystemState;
