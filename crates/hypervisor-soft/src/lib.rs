//! The software processor as a backend of the hypervisor contract: it runs on any x86-64 Linux
//! host, without device or privilege.
//!
//! ```text
//!   machine ── Soft::create_vm ─► SoftVm ── map: Backing + observer of host writes ─► x86cpu::Machine
//!                 │                  └─ create_vcpu ─► SoftVcpu ── run: Cpu::run, park while halted
//!                 │                                                     ▲
//!                 └─ SoftHost: clock, timer thread, wake-ups ───────────┘ (any thread: MSI, kick)
//! ```
//!
//! A machine without interrupt controllers has no timer thread, and a processor that begins small
//! ([`Tuning::small`]): it is for functions, of which there may be thousands in a process.
//!
//! Called by `engine` (which picks the backend) and, through the contract, by `machine`. The
//! processor itself (registers, MMU, interpreter, local APIC) is `skerry-x86cpu`, which knows
//! nothing of VMMs; this crate gives it threads, time and memory.
//!
//! | module | job |
//! |---|---|
//! | `probe` | `Soft`: what the processor offers here, and how fast it is |
//! | `vm` | memory slots, interrupts, clock |
//! | `host` | clock, timers and wake-ups that the processors ask for |
//! | `vcpu` | the run loop: exits, halting, kicks |
//! | `state` | the contract's state to and from the processor's |

mod host;
mod probe;
mod state;
mod vcpu;
mod vm;

pub use probe::Soft;
pub use skerry_x86cpu::Tuning;
pub use vcpu::SoftVcpu;
pub use vm::SoftVm;
