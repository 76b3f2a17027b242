//! The software processor: a complete x86-64 system processor that runs on any x86-64 host without
//! privilege or device.
//!
//! ```text
//!  hypervisor-soft ── Machine{Memory, Host, CpuShared…} ──┐ one thread per Cpu
//!        │ Cpu::run                                       │
//!        v                                                v
//!  run.rs: requests? events (sys, apic) ─> block lookup (code/) ─> ops, one handler each
//!                                            │ miss                 exec/  integer
//!                                            v                      sys/   system, events
//!                                  code/decode: bytes ─ iced ─>     simd/, fpu/ SSE, AVX, x87
//!                                  Lowering ─> Op                     │
//!                                                                     v
//!                                  mem/: soft TLB ─ miss ─> page walk ─> RAM | device exit
//! ```
//! A [`Cpu`] runs guest code until it needs the world outside ([`CpuExit`]); the caller answers and
//! runs it again. All that several threads touch is in [`shared`] and [`mem::Memory`].

mod apic;
mod budget;
pub mod code;
mod cpu;
mod cpuid;
mod exec;
mod exit;
pub mod flags;
mod fpu;
mod jit;
pub mod mem;
mod run;
pub mod shared;
mod simd;
pub mod sys;
pub mod testing;
mod time;
mod trap;
mod tuning;

pub use apic::{InvalidMessage, InvalidPage, LocalApic, PAGE_REGISTERS};
pub use cpu::{Cpu, reg, seg};
pub use cpuid::{
    CpuidEntry, CpuidResult, CpuidTable, Features, HostFeatures, KVM_SIGNATURE, TSC_HZ, accepted,
    supported,
};
pub use exit::CpuExit;
pub use fpu::{XSAVE_IMAGE_LEN, XsaveImageError};
pub use shared::{CpuShared, Doing, Host, Machine};
pub use simd::prepare_executable_memory;
pub use time::TscScale;
pub use trap::{Trap, TrapKind, TrapState, vector};
pub use tuning::{CounterValues, Counters, Tuning};
