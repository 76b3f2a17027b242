//! `skerry system` and its verbs.

use clap::{Args, Subcommand};

use super::Format;

/// `skerry system`.
#[derive(Debug, Args)]
pub struct SystemArgs {
    /// What to do
    #[command(subcommand)]
    pub verb: SystemVerb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum SystemVerb {
    /// Read all that is kept, and say what isn't whole; fails where something isn't
    Check(CheckArgs),
}

/// `skerry system check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Remove what isn't whole
    #[arg(long)]
    pub repair: bool,

    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}
