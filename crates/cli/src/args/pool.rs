//! `skerry pool` and its verbs.

use clap::{Args, Subcommand, ValueEnum};

use super::{CommandArgs, CommandLine, Format, MachineArgs, MountArgs, NetworkArgs, Span};

/// `skerry pool`.
#[derive(Debug, Args)]
#[command(disable_help_subcommand = true)]
pub struct PoolArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: PoolVerb,
}

/// The verbs of `skerry pool`.
#[derive(Debug, Subcommand)]
pub enum PoolVerb {
    /// Make a pool; it lives in the background until it is removed
    Create(Box<PoolCreateArgs>),
    /// Run a command in a clean machine, which is given back when the command ends
    Exec(PoolExecArgs),
    /// Take a clean machine for several commands, and print its number
    Acquire(PoolNameArgs),
    /// Give a machine back
    Release(PoolReleaseArgs),
    /// List the pools
    Ls(PoolLsArgs),
    /// Print what a pool has and has done
    Stats(PoolStatsArgs),
    /// End pools, with the machines in use
    Rm(PoolRmArgs),
}

/// `skerry pool create`.
#[derive(Debug, Args)]
pub struct PoolCreateArgs {
    /// Machines that there are at least
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub min: usize,

    /// Machines that there are at most
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub max: usize,

    /// Remove machines beyond the least number when nobody wanted them for so long: a number of
    /// seconds, or with ms, s, m, h
    #[arg(long, value_name = "TIME")]
    pub idle_timeout: Option<Span>,

    /// How long to wait for a machine when all are in use
    #[arg(long, value_name = "TIME", default_value = "30")]
    pub acquire_timeout: Span,

    /// What becomes of used machines: rewind takes them back to where they began, replace makes new
    /// ones
    #[arg(long, value_enum, value_name = "POLICY", default_value_t)]
    pub reset: ResetArg,

    /// Clone a snapshot instead of a start of an image
    #[arg(
        long,
        value_name = "SNAPSHOT",
        conflicts_with_all = ["memory", "cpus", "cpu_model", "read_only", "image"]
    )]
    pub from_snapshot: Option<String>,

    /// Keep the root file system as it is: writes fail
    #[arg(long)]
    pub read_only: bool,

    /// The network of each
    #[command(flatten)]
    pub network: NetworkArgs,

    /// Folders and file systems in memory of each
    #[command(flatten)]
    pub mounts: MountArgs,

    /// The machines
    #[command(flatten)]
    pub machine: MachineArgs,

    /// Name of the pool
    #[arg(value_name = "NAME")]
    pub name: String,

    /// What names the image, as for run
    #[arg(value_name = "IMAGE", required_unless_present = "from_snapshot")]
    pub image: Option<String>,

    /// Run this before the first machine is cloned: a command and, up to the end of the line, its
    /// arguments
    #[arg(long, value_name = "CMD", num_args = 1.., allow_hyphen_values = true)]
    pub exec: Vec<String>,
}

/// What becomes of a pool's used machines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ResetArg {
    /// They go back to where they began
    #[default]
    Rewind,
    /// New ones are made
    Replace,
}

/// `skerry pool exec`.
#[derive(Debug, Args)]
pub struct PoolExecArgs {
    /// The command's surroundings
    #[command(flatten)]
    pub io: CommandArgs,

    /// In the machine that was acquired under this number, instead of a clean one
    #[arg(long, value_name = "NUMBER")]
    pub lease: Option<u64>,

    /// Name of the pool
    #[arg(value_name = "NAME")]
    pub name: String,

    /// The command
    #[command(flatten)]
    pub line: CommandLine,
}

/// A pool, for verbs that need nothing else.
#[derive(Debug, Args)]
pub struct PoolNameArgs {
    /// Name of the pool
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// `skerry pool release`.
#[derive(Debug, Args)]
pub struct PoolReleaseArgs {
    /// Name of the pool
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The number that acquire printed
    #[arg(value_name = "NUMBER")]
    pub lease: u64,
}

/// `skerry pool ls`.
#[derive(Debug, Args)]
pub struct PoolLsArgs {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// `skerry pool stats`.
#[derive(Debug, Args)]
pub struct PoolStatsArgs {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Name of the pool
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// `skerry pool rm`.
#[derive(Debug, Args)]
pub struct PoolRmArgs {
    /// Names of pools
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}
