//! `skerry network`.

use std::collections::BTreeMap;
use std::io::{self, Write};

use anyhow::Result;
use skerry_engine::Paths;
use skerry_engine::networks::{self, NetworkInfo, NetworkPlan};

use super::short;
use super::table;
use crate::args::{
    Format, NetworkCreateArgs, NetworkListArgs, NetworkNamesArgs, NetworksArgs, NetworksCommand,
};

/// Does what is asked with networks.
pub fn execute(args: NetworksArgs) -> Result<u8> {
    let paths = Paths::of_user()?;
    match args.command {
        NetworksCommand::Create(args) => create(&paths, args),
        NetworksCommand::Ls(args) => list(&paths, &args),
        NetworksCommand::Inspect(args) => inspect(&paths, &args),
        NetworksCommand::Rm(args) => remove(&paths, &args),
        NetworksCommand::Prune => {
            let mut out = io::stdout().lock();
            for name in networks::prune(&paths)? {
                writeln!(out, "{name}")?;
            }
            Ok(0)
        }
    }
}

fn create(paths: &Paths, args: NetworkCreateArgs) -> Result<u8> {
    let pairs = args.label.iter().map(|label| match label.split_once('=') {
        Some((key, value)) => (key.to_owned(), value.to_owned()),
        None => (label.clone(), String::new()),
    });
    let labels: BTreeMap<String, String> = pairs.collect();
    let plan = NetworkPlan {
        subnets: args.subnet,
        gateway: args.gateway,
        ipv6: args.ipv6,
        internal: args.internal,
        labels,
    };
    let made = networks::create(paths, &args.name, plan)?;
    writeln!(io::stdout(), "{}", made.id)?;
    Ok(0)
}

fn list(paths: &Paths, args: &NetworkListArgs) -> Result<u8> {
    let found = networks::list(paths)?;
    let mut out = io::stdout().lock();
    if args.quiet {
        for network in found {
            writeln!(out, "{}", network.config.name)?;
        }
        return Ok(0);
    }
    if args.format == Format::Json {
        writeln!(out, "{}", serde_json::to_string_pretty(&found)?)?;
        return Ok(0);
    }
    let row = |network: &NetworkInfo| {
        [
            short(&network.config.id).to_owned(),
            network.config.name.clone(),
            network.config.subnet.to_string(),
            network
                .config
                .subnet6
                .map_or_else(|| "-".to_owned(), |net| net.to_string()),
            network.members.len().to_string(),
        ]
    };
    let header = ["NETWORK ID", "NAME", "SUBNET", "IPV6", "MACHINES"].map(str::to_owned);
    let rows: Vec<[String; 5]> = [header].into_iter().chain(found.iter().map(row)).collect();
    table::write(&mut out, &rows)?;
    Ok(0)
}

fn inspect(paths: &Paths, args: &NetworkNamesArgs) -> Result<u8> {
    let found = args.names.iter().map(|name| networks::inspect(paths, name));
    let found: Vec<NetworkInfo> = found.collect::<Result<_, _>>()?;
    writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&found)?)?;
    Ok(0)
}

fn remove(paths: &Paths, args: &NetworkNamesArgs) -> Result<u8> {
    for name in &args.names {
        networks::remove(paths, name)?;
        writeln!(io::stdout(), "{name}")?;
    }
    Ok(0)
}
