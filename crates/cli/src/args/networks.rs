//! Networks that machines share.

use std::net::Ipv4Addr;

use clap::{Args, Subcommand};
use skerry_engine::network::IpNet;

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
    /// Its addresses, of private ones; once for IPv4 and once for IPv6 [default: 256 that no other network
    /// has, from 10.89.0.0/16, and with --ipv6 random IPv6 ones]
    #[arg(long, value_name = "CIDR")]
    pub subnet: Vec<IpNet>,

    /// The IPv4 address of its gateway, which no machine gets; the IPv6 one has the same place in its
    /// network [default: the first]
    #[arg(long, value_name = "IP")]
    pub gateway: Option<Ipv4Addr>,

    /// Whether it has IPv6 addresses too [default: where --subnet names some]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub ipv6: Option<bool>,

    /// Machines that are on such networks only reach nothing else, unless a reach is named too
    #[arg(long)]
    pub internal: bool,

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
