//! One module for each group of verbs.

pub mod about;
pub mod archives;
pub mod boot;
pub mod doctor;
pub mod events;
pub mod files;
pub mod images;
pub mod lifecycle;
pub mod network;
pub mod networks;
pub mod pool;
pub mod registry;
pub mod run;
pub mod sandbox;
pub mod serve;
pub mod snapshot;
pub mod stats;
pub mod system;
pub mod table;
pub mod usage;
pub mod vms;
pub mod volume;

use skerry_engine::confinement::Strictness;
use skerry_engine::hypervisor::{Backend, Choice};
use skerry_engine::{MachineOptions, SoftMode, SoftOptions};

use crate::args::{ConfineArg, ConfineArgs, HypervisorArg, MachineArgs, SoftArgs, SoftModeArg};

/// Digits of an ID that a table shows.
const SHORT: usize = 12;

/// As much of an ID as people need.
fn short(id: &str) -> &str {
    id.get(..SHORT).unwrap_or(id)
}

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

/// How the software processor is to run code.
fn soft_options(args: &SoftArgs) -> SoftOptions {
    let &SoftArgs {
        soft_mode,
        soft_code_memory,
        soft_hardened,
        soft_perf_map,
    } = args;
    SoftOptions {
        mode: soft_mode.map(|mode| match mode {
            SoftModeArg::Interpreter => SoftMode::Interpreter,
            SoftModeArg::Jit => SoftMode::Jit,
            SoftModeArg::JitStress => SoftMode::JitStress,
        }),
        code_memory: soft_code_memory.map(|size| size.0),
        hardened: soft_hardened,
        perf_map: soft_perf_map,
    }
}

/// How far the machine's process is confined.
fn strictness(args: &ConfineArgs) -> Strictness {
    match args.confine {
        ConfineArg::Auto => Strictness::Auto,
        ConfineArg::Strict => Strictness::Strict,
        ConfineArg::Off => Strictness::Off,
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
        soft,
        confine,
    } = args;
    let mut options = MachineOptions {
        memory: memory.0,
        hypervisor: choice(hypervisor),
        soft: soft_options(&soft),
        cpu_model,
        time_limit: timeout.map(|span| span.0),
        confine: strictness(&confine),
        ..MachineOptions::default()
    };
    // Its range was seen to where it was read.
    let _ = options.set_nano_cpus(cpus.0);
    options
}
