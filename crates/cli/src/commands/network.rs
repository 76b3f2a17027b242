//! `skerry port`, and what the options on a machine's network come to.

use std::io::{self, Write};

use anyhow::{Result, bail};
use skerry_engine::Paths;
use skerry_engine::network::{Mapping, NetworkSpec, Published};
use skerry_engine::vms::{self, Registry};

use crate::args::{Format, NetworkArg, NetworkArgs, PortArgs, ReachArgs};

/// A network that reaches so far, as the engine has it.
pub fn reach(args: ReachArgs) -> Result<NetworkSpec> {
    let ReachArgs {
        network,
        network_allow,
        network_deny,
        network_mtu,
    } = args;
    let mut spec = NetworkSpec {
        allow: network_allow,
        deny: network_deny,
        mtu: network_mtu,
        ..NetworkSpec::default()
    };
    for arg in network {
        match arg {
            NetworkArg::Reach(mode) if spec.mode.is_none() => spec.mode = Some(mode),
            NetworkArg::Reach(_) => {
                bail!("A network reaches one far: name none, public or full once")
            }
            NetworkArg::Named(name) => spec.join.push(name),
            NetworkArg::Tap(tap) if spec.tap.is_none() => spec.tap = Some(tap),
            NetworkArg::Tap(_) => bail!("A machine has one network card: name one TAP device"),
        }
    }
    Ok(spec)
}

/// A network, as the engine has it.
pub fn network(args: NetworkArgs) -> Result<NetworkSpec> {
    Ok(NetworkSpec {
        publish: args.publish,
        dns: args.dns.iter().map(|server| server.0).collect(),
        aliases: args.network_alias,
        ..reach(args.reach)?
    })
}

/// Prints the published ports of a machine.
pub fn ports(args: &PortArgs) -> Result<u8> {
    let wanted: Option<Mapping> = match &args.port {
        None => None,
        Some(text) => match text.parse::<Mapping>() {
            Ok(port) if port.host.port() == 0 && !text.contains(':') => Some(port),
            _ => bail!("{text:?} is no port of a guest's: write a number, or one with /udp"),
        },
    };
    let registry = Registry::open(&Paths::of_user()?)?;
    let found = vms::network(&registry, &args.vm)?.ports;
    let of = |port: &&Published| {
        wanted.is_none_or(|wanted| (port.guest, port.protocol) == (wanted.guest, wanted.protocol))
    };
    let found: Vec<&Published> = found.iter().filter(of).collect();
    if let (Some(text), true) = (&args.port, found.is_empty()) {
        bail!(
            "Port {text} of {} is not published: see skerry port {0}",
            args.vm
        );
    }
    let mut out = io::stdout().lock();
    match args.format {
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&found)?)?,
        Format::Text => {
            for port in found {
                match wanted {
                    Some(_) => writeln!(out, "{}", port.host)?,
                    None => writeln!(out, "{port}")?,
                }
            }
        }
    }
    Ok(0)
}
