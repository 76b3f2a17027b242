//! What network a machine gets.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use clap::Args;
use skerry_engine::network::{IpNet, Mapping, NetworkMode, Rule, TapSpec, parse_network};
use skerry_engine::networks;

use super::Format;

/// Where help texts have the options.
const HEADING: &str = "Network";

/// What a machine's network is: how far it reaches, or one that it shares with other machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkArg {
    /// How far it reaches.
    Reach(NetworkMode),
    /// A network of `skerry network create`.
    Named(String),
    /// The host's network behind a TAP device.
    Tap(TapSpec),
}

impl FromStr for NetworkArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::Reach(NetworkMode::None)),
            "public" => Ok(Self::Reach(NetworkMode::Public)),
            "full" => Ok(Self::Reach(NetworkMode::Full)),
            name => {
                if let Some(tap) = name.strip_prefix("tap=") {
                    return tap.parse().map(Self::Tap);
                }
                networks::check_name(name).map_err(|error| error.to_string())?;
                Ok(Self::Named(name.to_owned()))
            }
        }
    }
}

/// The network of machines of which there may be several.
#[derive(Clone, Debug, Default, Args)]
pub struct ReachArgs {
    /// How far the network reaches: none (there is no network card), public (the internet, but nothing
    /// that is private, the host's own, or a cloud's metadata) or full (wherever the host gets; its
    /// loopback interface is 10.0.2.2); or the NAME of a network that the machine shares with others, as
    /// often as there are such; or `tap=DEVICE[,ip=ADDRESS/PREFIX][,gateway=ADDRESS][,mac=ADDRESS]`, the
    /// host's network behind a TAP device of the user's [default: public, or of a machine that was kept
    /// without a network card: none]
    #[arg(help_heading = HEADING, long, value_name = "REACH|NAME|tap=DEVICE")]
    pub network: Vec<NetworkArg>,

    /// Reach only this: addresses, or what the name server answers for a name (*.example.org is every name
    /// below it), all ports or some; may be given several times
    #[arg(help_heading = HEADING, long, value_name = "CIDR|HOST[:PORT[-PORT]]")]
    pub network_allow: Vec<Rule>,

    /// Never reach these addresses, whatever allows them; may be given several times
    #[arg(help_heading = HEADING, long, value_name = "CIDR", value_parser = parse_network)]
    pub network_deny: Vec<IpNet>,

    /// The longest packet of the network card, from 1280 bytes; fewer, longer packets are faster [default:
    /// 65520]
    #[arg(help_heading = HEADING, long, value_name = "BYTES")]
    pub network_mtu: Option<u16>,
}

/// The network of one machine.
#[derive(Clone, Debug, Default, Args)]
pub struct NetworkArgs {
    /// How far it reaches
    #[command(flatten)]
    pub reach: ReachArgs,

    /// Have the host listen for connections to a port of the guest's, or with /udp for datagrams; HOST is
    /// any free port if none is named, IP every address of the host's
    #[arg(help_heading = HEADING, short = 'p', long, value_name = "[[IP:]HOST:]GUEST[/udp]")]
    pub publish: Vec<Mapping>,

    /// Name server that the guest's questions go to, instead of the host's own; several: the next one is
    /// asked when one doesn't answer
    #[arg(help_heading = HEADING, long, value_name = "IP[:PORT]")]
    pub dns: Vec<ServerArg>,

    /// One more name by which others find the machine in the networks that it shares with them
    #[arg(help_heading = HEADING, long, value_name = "NAME")]
    pub network_alias: Vec<String>,
}

/// A name server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerArg(pub SocketAddr);

impl FromStr for ServerArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const PORT: u16 = 53;
        let whole = text.parse();
        let address = || text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, PORT));
        let server = whole.or_else(|_| address());
        server.map(Self).map_err(|_| {
            format!("{text:?} is no address: write one such as 9.9.9.9 or 127.0.0.1:5353")
        })
    }
}

/// `skerry port`.
#[derive(Debug, Args)]
pub struct PortArgs {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,

    /// Name of the virtual machine, its ID or the ID's first digits
    #[arg(value_name = "VM")]
    pub vm: String,

    /// Only this port of the guest's
    #[arg(value_name = "GUEST[/udp]")]
    pub port: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_may_have_ports() {
        let server = |text: &str| text.parse::<ServerArg>().map(|server| server.0.to_string());
        assert_eq!(server("9.9.9.9").as_deref(), Ok("9.9.9.9:53"));
        assert_eq!(server("127.0.0.1:5353").as_deref(), Ok("127.0.0.1:5353"));
        assert_eq!(server("::1").as_deref(), Ok("[::1]:53"));
        assert_eq!(server("[::1]:5353").as_deref(), Ok("[::1]:5353"));
        assert!(server("dns.example").is_err());
    }
}
