//! The devices of Skerry's machine: a PC's chipset, serial ports, and virtio over MMIO.

pub mod bus;
pub mod chipset;
pub mod clock;
pub mod events;
pub mod irq;
pub mod serial;
mod state;
pub mod virtio;

pub use state::StateError;
