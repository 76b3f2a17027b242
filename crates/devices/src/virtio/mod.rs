//! Virtio devices over MMIO (virtio 1.3; modern interface only).
//!
//! ```text
//! vCPU ── QueueNotify ──> VirtioMmio ──> QueueEngine::kick ──┬─ Inline: on the vCPU thread
//!                            │                               └─ Thread: wakes the device's worker
//!                            │            QueueEngine::serve <── host threads with data for the guest
//!                            │                  │ one server per queue at a time
//!                            │                  ▼
//!                            │            VirtioDevice::process(queue) ── pop / complete ── rings in RAM
//!                            └── Interrupt (ISR + IrqLine) <──┘
//! ```
//! A device never holds a chain across two calls of `process`: stopping a queue (reset, snapshot) only
//! waits for the call under way.

pub mod balloon;
pub mod block;
mod chain;
pub mod console;
mod engine;
pub mod fs;
mod mmio;
pub mod net;
mod queue;
mod ring;
pub mod rng;
pub mod vsock;

#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use skerry_confine::Role;

pub use chain::{Chain, ChainCursor, RamSlice, Segment};
pub use engine::{QueueEngine, QueueRunner};
pub use mmio::{VirtioMmio, VirtioMmioState};
pub use queue::{MAX_QUEUE_SIZE, Queue, QueueError, QueueLayout, QueueState};

use std::sync::{Arc, Weak};

use std::time::Instant;

use parking_lot::{Condvar, MutexGuard};

use crate::state::StateError;

/// Chains with indirect tables (virtio 1.3, 6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Notification suppression by index.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// The modern interface.
pub const F_VERSION_1: u64 = 1 << 32;
/// Queues can be reset one by one.
pub const F_RING_RESET: u64 = 1 << 40;

/// What the transport offers for every device.
pub const RING_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_RING_RESET;

/// Device identifiers (virtio 1.3, 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// File system.
    Fs = 26,
}

/// What `process` left in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Everything the driver made available was taken: notify for more.
    Drained,
    /// Chains were left on purpose until the device has something to put into them.
    Waiting,
    /// The next request may take long and [`Queue::may_wait`] says that this thread shouldn't: it was
    /// put back for a thread that may.
    Later,
}

/// A device behind a virtio transport.
pub trait VirtioDevice: Send + Sync {
    /// The device identifier.
    fn kind(&self) -> DeviceKind;

    /// The device's own feature bits.
    fn features(&self) -> u64;

    /// The largest size of each queue.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the device configuration; bytes beyond it are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device configuration.
    fn write_config(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Gives the device the way to its queues. Called once, when the transport is built.
    fn attach(&self, engine: Weak<QueueEngine>) {
        let _ = engine;
    }

    /// The driver is ready: `features` were negotiated and the queues are live.
    fn activate(&self, features: u64) {
        let _ = features;
    }

    /// The driver reset the device; its queues are gone.
    fn reset(&self) {}

    /// What the device's own thread may do of the host, where requests need more than a processor's
    /// may: such a thread is there from the start. `None`: one is started when it is first needed.
    fn worker_role(&self) -> Option<Role> {
        None
    }

    /// The queues are served again, after a pause or a restore.
    fn resumed(&self) {}

    /// The machine is over: host threads that wait for the guest get what is left, then an end.
    fn close(&self) {}

    /// Serves queue `index`. No other thread serves the same queue meanwhile.
    fn process(&self, index: usize, queue: &mut Queue) -> Result<Served, QueueError>;

    /// The device's state for a snapshot, taken with the queues paused.
    fn save(&self) -> DeviceState;

    /// Puts a saved state back, before `activate`.
    fn restore(&self, saved: DeviceState) -> Result<(), StateError>;
}

/// The state that is specific to a device's kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Block device.
    Block(block::BlockState),
    /// Console.
    Console(console::ConsoleState),
    /// Entropy source.
    Rng,
    /// Socket device.
    Vsock(vsock::VsockState),
    /// Network card.
    Net(net::NetState),
    /// File system.
    Fs(fs::FsState),
    /// Memory balloon.
    Balloon(balloon::BalloonState),
}

/// Copies the part of `config` at `offset` into `data`; what lies beyond is zero.
fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = start
            .checked_add(i)
            .and_then(|at| config.get(at))
            .copied()
            .unwrap_or(0);
    }
}

/// The link from a device to the engine that serves its queues; set once by `attach`.
#[derive(Default)]
struct EngineLink(std::sync::OnceLock<Weak<QueueEngine>>);

impl EngineLink {
    fn set(&self, engine: Weak<QueueEngine>) {
        let _ = self.0.set(engine);
    }

    fn get(&self) -> Option<Arc<QueueEngine>> {
        self.0.get().and_then(Weak::upgrade)
    }

    /// Serves a queue on this thread, or has the thread that is at it go round once more.
    fn serve(&self, queue: usize) {
        if let Some(engine) = self.get() {
            engine.serve(queue);
        }
    }

    /// Serves a queue on this thread, when another that is at it is through.
    fn serve_in_turn(&self, queue: usize) {
        if let Some(engine) = self.get() {
            engine.serve_in_turn(queue);
        }
    }
}

/// Waits on `condition` until `deadline`, if there is one. `false` when it has passed.
fn wait<T>(condition: &Condvar, guard: &mut MutexGuard<'_, T>, deadline: Option<Instant>) -> bool {
    match deadline {
        Some(at) => !condition.wait_until(guard, at).timed_out(),
        None => {
            condition.wait(guard);
            true
        }
    }
}
