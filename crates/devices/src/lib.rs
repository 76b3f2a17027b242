//! The devices of Skerry's machine: a PC's chipset, serial ports, and virtio over MMIO.
//!
//! ```text
//!            vCPU thread (machine)                             host threads (engine, cli)
//!  port I/O │         │ MMIO                                     │ streams, input, disks
//!           ▼         ▼                                          ▼
//!        PortBus   MmioBus ── sorted ranges, no lock     VsockHost · PortHandle · SerialInput
//!           │         │                                          │
//!   ┌───────┴──┐   ┌──┴─────┬──────────────┐                     │
//!   chipset  serial  IoApic   virtio::VirtioMmio ─ QueueEngine ──┴─ block · console · vsock · rng
//!   │    │     │       ▲                               │     │
//!   │    └─────┴───────┼──── IrqLine ──────────────────┘     └── rings and buffers in GuestRam
//!   │                  │
//!   │           InterruptRouter ──> DualPic ── ExtIntSink ─┐
//!   │                  └──────────> IoApic  ── MsiSink ────┴──> local APICs (backend)
//!   └── MachineEvents: reset, power off, debug exit, panic ──> machine
//! ```
//! `machine` builds the devices, puts them on the buses and implements the sinks. Time comes from one
//! [`clock::TimerService`] per machine, which can stand still and be set, so that a snapshot's timers go
//! on where they were.
//!
//! Every device has three parts: what is fixed at construction, the runtime glue (lines, timers, sinks),
//! and one serialisable `State`, which `save` copies out and `restore` validates and puts back. All take
//! `&self` and lock only themselves. Whatever the guest writes into registers or memory, nothing panics,
//! blocks without end or grows without bound; the fuzz targets hold the crate to it.

#![forbid(unsafe_code)]

pub mod bus;
pub mod chipset;
pub mod clock;
pub mod events;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod irq;
pub mod serial;
mod state;
pub mod virtio;

pub use state::StateError;
