//! How the process of a machine is confined.

use clap::{Args, ValueEnum};

/// How far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ConfineArg {
    /// As far as this host can
    #[default]
    Auto,
    /// In full, or the machine doesn't start
    Strict,
    /// Not at all: to find out whether confinement is in the way
    Off,
}

/// Options of confinement.
#[derive(Debug, Default, Args)]
pub struct ConfineArgs {
    /// How far the machine's process gives up what it doesn't need (seccomp, Landlock, capabilities,
    /// namespaces): doctor says what this host can
    #[arg(long, value_enum, value_name = "HOW", default_value_t)]
    pub confine: ConfineArg,
}
