//! The KVM backend of the hypervisor contract.
//!
//! ```text
//!   machine ── Kvm::create_vm ─► KvmVm ── memory slots, MSI, clock ─────► /dev/kvm VM
//!                                  └─ create_vcpu ─► KvmVcpu ── run ────► KVM_RUN
//!   any thread ── Canceller ── signal to the vCPU's thread (kick.rs) ───────┘
//! ```
//!
//! Called by `engine` (which picks the backend) and, through the contract, by `machine`. Local
//! APICs are the kernel's (split irqchip); PIC, PIT and I/O APIC are the machine's devices.
//!
//! | module | job |
//! |---|---|
//! | `probe` | opens the device and finds out whether it truly runs guests |
//! | `vm`, `slots` | the VM and its memory |
//! | `vcpu`, `run_page`, `kick` | entering the guest, reading exits, getting out |
//! | `state`, `convert`, `msrs` | architectural state to and from the kernel's structures |
//! | `sys` | the system calls that the KVM crates do not wrap safely |
//!
//! Modules with `unsafe`: `run_page` (the page shared with the kernel), `kick` (signals), `sys`.

mod convert;
mod kick;
mod msrs;
mod probe;
mod run_page;
mod slots;
mod state;
mod sys;
mod vcpu;
mod vm;

pub use probe::Kvm;
pub use vcpu::KvmVcpu;
pub use vm::KvmVm;
