//! What network a machine is given.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

pub use ipnet::IpNet;
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use skerry_devices::virtio::net::NetConfig;
use skerry_net::{Attached, NamePattern, address};
pub use skerry_net::{
    Counters, Denial, DenialReason, Mapping, Network, NetworkMode, Options, Protocol, Published,
    Rule, parse_network,
};

use crate::error::EngineError;
use crate::networks;
use crate::paths::Paths;

/// The longest packets that a card may have: IPv6 asks for the least (RFC 8200, 5).
pub(crate) const MTUS: std::ops::RangeInclusive<u16> = 1280..=address::MTU;

/// The network that is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct NetworkSpec {
    /// How far it reaches; `None` is public, where the machine has a card at all.
    pub mode: Option<NetworkMode>,
    /// Ports of the guest's that the host listens at.
    pub publish: Vec<Mapping>,
    /// Name servers in place of the host's.
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub dns: Vec<SocketAddr>,
    /// What it may reach, if not everything in its reach.
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub allow: Vec<Rule>,
    /// What it may not reach, whatever else says so.
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub deny: Vec<IpNet>,
    /// Networks that it shares with other machines.
    pub join: Vec<String>,
    /// What others find it by there, besides its own names.
    pub aliases: Vec<String>,
    /// The longest packet of its card; `None` is the longest there is.
    pub mtu: Option<u16>,
    /// Its own names, once it has any.
    pub names: Vec<String>,
}

/// A machine's place on a network that it shares with others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Place {
    /// The network's name.
    pub network: String,
    /// The machine's address there.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub address: Ipv4Addr,
    /// The network's addresses.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub subnet: Ipv4Net,
}

/// A machine's network, as it is while the machine runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct NetworkReport {
    /// How far it reaches.
    pub mode: NetworkMode,
    /// The ports that the host listens at.
    pub ports: Vec<Published>,
    /// What it has done.
    pub counters: Counters,
    /// What it may reach, if not everything in its reach.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub allow: Vec<Rule>,
    /// What it may not reach.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub deny: Vec<IpNet>,
    /// What it was denied last.
    #[serde(default)]
    pub denied: Vec<Denial>,
    /// The networks that it shares with others.
    #[serde(default)]
    pub shared: Vec<Place>,
}

impl NetworkReport {
    /// Of a machine with this network, or with none.
    pub(crate) fn of(network: Option<&Network>) -> Self {
        match network {
            Some(network) => Self {
                mode: network.mode(),
                ports: network.published().to_vec(),
                counters: network.counters(),
                allow: network.options().allow.clone(),
                deny: network.options().deny.clone(),
                denied: network.denials(),
                shared: shared(network),
            },
            None => Self {
                mode: NetworkMode::None,
                ports: Vec::new(),
                counters: Counters::default(),
                allow: Vec::new(),
                deny: Vec::new(),
                denied: Vec::new(),
                shared: Vec::new(),
            },
        }
    }
}

impl NetworkSpec {
    /// The card that a new machine has for it.
    pub(crate) fn card(&self) -> Option<NetConfig> {
        let wanted = self.mode.unwrap_or_default() != NetworkMode::None || !self.join.is_empty();
        let card = NetConfig {
            mtu: self.mtu.unwrap_or(address::MTU),
            ..address::CARD
        };
        wanted.then_some(card)
    }

    /// Others find a machine with this network by `names`.
    pub(crate) fn known_as<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) {
        self.names = names.into_iter().map(str::to_ascii_lowercase).collect();
    }

    /// What a copy of a machine with this network has: the same reach.
    pub(crate) fn of_fork(network: &Network) -> Self {
        let Options {
            mode,
            publish: _,
            dns,
            allow,
            deny,
        } = network.options().clone();
        Self {
            mode: Some(mode),
            dns,
            allow,
            deny,
            ..Self::default()
        }
    }

    /// A network for a machine that has a `card` or not.
    pub(crate) fn make(
        &self,
        paths: &Paths,
        card: Option<NetConfig>,
    ) -> Result<Option<Arc<Network>>, EngineError> {
        let Self {
            mode,
            publish,
            dns,
            allow,
            deny,
            join,
            aliases,
            mtu,
            names,
        } = self;
        let off = *mode == Some(NetworkMode::None) && join.is_empty();
        if join.is_empty() && !aliases.is_empty() {
            return Err(EngineError::AliasOfNothing);
        }
        let ruled = !(allow.is_empty() && deny.is_empty());
        let detailed = ruled || !publish.is_empty() || !dns.is_empty() || !join.is_empty();
        if off && detailed {
            return Err(EngineError::NetworkOff);
        }
        let Some(card) = card else {
            let wanted = mode.is_some() && !off || detailed || mtu.is_some();
            return match wanted {
                true => Err(EngineError::NoCard),
                false => Ok(None),
            };
        };
        if let Some(wanted) = *mtu {
            if !MTUS.contains(&wanted) {
                return Err(EngineError::BadMtu {
                    least: *MTUS.start(),
                    most: *MTUS.end(),
                });
            }
            if wanted != card.mtu {
                return Err(EngineError::OtherMtu { kept: card.mtu });
            }
        }
        let options = Options {
            mode: mode.unwrap_or_default(),
            publish: publish.clone(),
            dns: dns.clone(),
            allow: allow.clone(),
            deny: deny.clone(),
        };
        let mut all = names.clone();
        for alias in aliases {
            if !is_label(alias) {
                let alias = alias.clone();
                return Err(EngineError::BadAlias { alias });
            }
            all.push(alias.to_ascii_lowercase());
        }
        all.sort();
        all.dedup();
        let mut wanted = join.clone();
        wanted.sort();
        wanted.dedup();
        let places = wanted.iter().map(|name| networks::join(paths, name, &all));
        let places = places.collect::<Result<_, _>>()?;
        Ok(Some(Network::new(&options, places)?))
    }
}

/// Whether a name can be asked for.
fn is_label(name: &str) -> bool {
    name.parse::<NamePattern>().is_ok() && !name.starts_with('*')
}

/// The places of a machine with this network on networks that it shares.
fn shared(network: &Network) -> Vec<Place> {
    let attached = network.attached().iter();
    let place = |attached: &Attached| Place {
        network: attached.network.clone(),
        address: attached.address,
        subnet: attached.subnet,
    };
    attached.map(place).collect()
}

/// The addresses that a guest with this network has besides its own, with their prefixes' lengths.
pub(crate) fn addresses(network: Option<&Network>) -> Vec<String> {
    let attached = network.map(Network::attached).unwrap_or_default();
    let address = |one: &Attached| format!("{}/{}", one.address, one.subnet.prefix_len());
    attached.iter().map(address).collect()
}

/// The name servers that a guest with a card is told of.
pub(crate) fn nameservers(card: bool) -> Vec<String> {
    card.then(|| address::DNS_V4.to_string())
        .into_iter()
        .collect()
}
