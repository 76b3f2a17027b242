//! How the software processor runs code.

use clap::{Args, ValueEnum};

use super::Size;

/// What the software processor does with code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SoftModeArg {
    /// Interpret all of it
    Interpreter,
    /// Compile what runs often
    Jit,
    /// Compile everything at once, into as little memory as will do: for tests
    JitStress,
}

/// Where help texts have the options.
const HEADING: &str = "Software processor";

/// Options of the software processor; with another hypervisor they are errors.
#[derive(Debug, Default, Args)]
pub struct SoftArgs {
    /// What it does with code [default: jit]
    #[arg(help_heading = HEADING, long, value_enum, value_name = "MODE")]
    pub soft_mode: Option<SoftModeArg>,

    /// Memory that each processor may take for decoded and compiled code and their tables, from 1M to
    /// 1G [default: 64M; 1M with jit-stress]
    #[arg(help_heading = HEADING, long, value_name = "SIZE")]
    pub soft_code_memory: Option<Size>,

    /// Compiled code holds speculation back where a guest could lead it to memory that isn't its own
    #[arg(help_heading = HEADING, long)]
    pub soft_hardened: bool,

    /// Tell Linux perf of compiled code, in /tmp/perf-PID.map
    #[arg(help_heading = HEADING, long)]
    pub soft_perf_map: bool,
}
