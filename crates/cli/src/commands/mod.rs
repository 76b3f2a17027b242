//! One module for each group of verbs.

pub mod about;
pub mod boot;
pub mod doctor;
pub mod images;
pub mod pool;
pub mod run;
pub mod snapshot;
pub mod vms;

use skerry_engine::MachineOptions;
use skerry_engine::hypervisor::{Backend, Choice};

use crate::args::{HypervisorArg, MachineArgs};

/// A number of bytes, for people.
fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// What the user asks for.
fn choice(hypervisor: HypervisorArg) -> Choice {
    match hypervisor {
        HypervisorArg::Auto => Choice::Auto,
        HypervisorArg::Kvm => Choice::Only(Backend::Kvm),
        HypervisorArg::Soft => Choice::Only(Backend::Soft),
    }
}

/// The machine that the options describe.
fn machine_options(args: MachineArgs) -> MachineOptions {
    let MachineArgs {
        memory,
        cpus,
        hypervisor,
        cpu_model,
        timeout,
    } = args;
    MachineOptions {
        memory: memory.0,
        cpus,
        hypervisor: choice(hypervisor),
        cpu_model,
        time_limit: timeout.map(|span| span.0),
    }
}
