//! Networks that machines share.

use clap::{Args, Subcommand};
use skerry_engine::networks::Ipv4Net;

use super::Format;

/// `skerry network`.
#[derive(Debug, Args)]
pub struct NetworksArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: NetworksCommand,
}

/// What to do with networks.
#[derive(Debug, Subcommand)]
pub enum NetworksCommand {
    /// Make a network, and print its ID
    Create(NetworkCreateArgs),
    /// List networks
    #[command(alias = "list")]
    Ls(NetworkListArgs),
    /// Print all that is known of networks as JSON, and which machines are on them
    Inspect(NetworkNamesArgs),
    /// Remove networks that no machine is on
    #[command(alias = "remove")]
    Rm(NetworkNamesArgs),
    /// Remove all networks that no machine is on, and print their names
    Prune,
}

/// `skerry network create`.
#[derive(Debug, Args)]
pub struct NetworkCreateArgs {
    /// Its addresses, of private ones [default: 256 that no other network has, from 10.89.0.0/16]
    #[arg(long, value_name = "CIDR")]
    pub subnet: Option<Ipv4Net>,

    /// Something to remember of it; may be given several times
    #[arg(long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,

    /// Its name
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// `skerry network ls`.
#[derive(Debug, Args)]
pub struct NetworkListArgs {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,

    /// Names only
    #[arg(short = 'q', long, conflicts_with = "format")]
    pub quiet: bool,
}

/// `skerry network inspect` and `rm`.
#[derive(Debug, Args)]
pub struct NetworkNamesArgs {
    /// The networks
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}
