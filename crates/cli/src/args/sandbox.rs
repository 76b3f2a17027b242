//! `skerry sandbox` and its verbs.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{Format, HypervisorArg, Size, Span};

/// `skerry sandbox`.
#[derive(Debug, Args)]
#[command(disable_help_subcommand = true)]
pub struct SandboxArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: SandboxVerb,
}

/// The verbs of `skerry sandbox`.
#[derive(Debug, Subcommand)]
pub enum SandboxVerb {
    /// Call a function of a guest in a virtual machine of its own, and print what it returns
    Call(SandboxCallArgs),
    /// Print the functions of a guest and the host functions that it needs
    Inspect(SandboxInspectArgs),
    /// Measure what a guest costs: to make it, to call it, to copy it, to take it back
    Bench(SandboxBenchArgs),
}

/// What a sandbox is made of.
#[derive(Debug, Args)]
pub struct SandboxGuestArgs {
    /// The guest's program, a WebAssembly module or component, or a script (.rhai)
    #[arg(value_name = "GUEST")]
    pub guest: PathBuf,

    /// What runs the guest
    #[arg(long, value_enum, value_name = "NAME", default_value_t)]
    pub hypervisor: HypervisorArg,

    /// The guest's heap: a number of bytes, or with k, m, g; the defaults of WebAssembly and of scripts are larger `[default: 1m]`
    #[arg(long, value_name = "SIZE")]
    pub heap: Option<Size>,

    /// The guest's stack; not for WebAssembly `[default: 256k, a script's 4m]`
    #[arg(long, value_name = "SIZE")]
    pub stack: Option<Size>,

    /// Room for the arguments of a call, and for what it returns; not for WebAssembly `[default: 1m]`
    #[arg(long, value_name = "SIZE")]
    pub buffers: Option<Size>,
}

/// What a call may take.
#[derive(Debug, Args)]
pub struct SandboxLimitArgs {
    /// End the call after so long, with exit status 124: a number of seconds, or with ms, s, m, h
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<Span>,

    /// End the call after so much processor time, with exit status 124
    #[arg(long, value_name = "TIME")]
    pub cpu_time: Option<Span>,

    /// End the call after so many instructions, with exit status 124; only soft counts them
    #[arg(long, value_name = "N")]
    pub instructions: Option<u64>,
}

/// A capability of WASI's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GrantArg {
    /// The time
    Clock,
    /// Random numbers
    Random,
    /// What this program gets on stdin
    Stdin,
    /// This program's environment
    Env,
}

/// `skerry sandbox call`.
#[derive(Debug, Args)]
pub struct SandboxCallArgs {
    /// The guest.
    #[command(flatten)]
    pub guest: SandboxGuestArgs,

    /// What it may take.
    #[command(flatten)]
    pub limits: SandboxLimitArgs,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,

    /// Wait for gdb there and stop before the guest's first instruction: ADDRESS:PORT, or the path of a
    /// socket
    #[arg(long, value_name = "WHERE")]
    pub gdb: Option<String>,

    /// Write a core dump into this folder if the guest crashes
    #[arg(long, value_name = "FOLDER")]
    pub core_dumps: Option<PathBuf>,

    /// What a WebAssembly program may have besides stdout and stderr; more than once
    #[arg(long = "grant", value_enum, value_name = "NAME")]
    pub grants: Vec<GrantArg>,

    /// The function; `_start` of WebAssembly is its program, which gets the arguments as words, and which a
    /// component runs without one. A script is run first; without a function its value is printed
    #[arg(value_name = "FUNCTION")]
    pub function: Option<String>,

    /// Its arguments, as its signature has them; lists, options and structures as JSON (for components also
    /// as WAVE), and `@FILE` for bytes from a file. A script's are JSON, or else strings
    #[arg(value_name = "ARG", allow_hyphen_values = true)]
    pub arguments: Vec<String>,
}

/// `skerry sandbox inspect`.
#[derive(Debug, Args)]
pub struct SandboxInspectArgs {
    /// The guest.
    #[command(flatten)]
    pub guest: SandboxGuestArgs,

    /// How to print it
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    pub format: Format,
}

/// `skerry sandbox bench`.
#[derive(Debug, Args)]
pub struct SandboxBenchArgs {
    /// The guest.
    #[command(flatten)]
    pub guest: SandboxGuestArgs,

    /// How often each is done
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub count: u32,

    /// How to print it
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    pub format: Format,

    /// The function to call; without, only what needs no call is measured
    #[arg(value_name = "FUNCTION")]
    pub function: Option<String>,

    /// Its arguments
    #[arg(value_name = "ARG", allow_hyphen_values = true)]
    pub arguments: Vec<String>,
}
