//! What network a machine is given.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
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
use skerry_protocol::message::Card;

use crate::error::EngineError;
use crate::networks;
use crate::paths::Paths;
pub use crate::tap::{LinkAddress, TapReport, TapSpec};

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
    /// The host's network behind this device, in place of all that.
    pub tap: Option<TapSpec>,
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
    /// The machine's IPv6 address there, where the network has such.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub address6: Option<Ipv6Addr>,
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
    /// The host's network that it is on, in place of all that.
    #[serde(default)]
    pub tap: Option<TapReport>,
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
                tap: network.options().tap.as_ref().map(TapReport::from),
            },
            None => Self {
                mode: NetworkMode::None,
                ports: Vec::new(),
                counters: Counters::default(),
                allow: Vec::new(),
                deny: Vec::new(),
                denied: Vec::new(),
                shared: Vec::new(),
                tap: None,
            },
        }
    }
}

impl NetworkSpec {
    /// The card that a new machine has for it.
    pub(crate) fn card(&self) -> Option<NetConfig> {
        let reaches = self.mode.unwrap_or_default() != NetworkMode::None;
        let wanted = reaches || !self.join.is_empty() || self.tap.is_some();
        let longest = self.tap.as_ref().and_then(TapSpec::mtu);
        let card = NetConfig {
            mtu: self.mtu.or(longest).unwrap_or(address::MTU),
            offload: self.tap.is_some(),
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
            tap,
        } = network.options().clone();
        Self {
            // A device takes one machine.
            mode: Some(if tap.is_some() {
                NetworkMode::None
            } else {
                mode
            }),
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
            tap,
        } = self;
        if let Some(tap) = tap {
            return self.on_tap(tap, card).map(Some);
        }
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
        if card.offload && !off {
            return Err(EngineError::NeedsTap);
        }
        self.check_mtu(card)?;
        let mode = match mode {
            Some(mode) => *mode,
            // Its walls are those of its networks.
            None if networks::are_internal(paths, join)? => NetworkMode::None,
            None => NetworkMode::default(),
        };
        let options = Options {
            mode,
            publish: publish.clone(),
            dns: dns.clone(),
            allow: allow.clone(),
            deny: deny.clone(),
            tap: None,
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

impl NetworkSpec {
    fn check_mtu(&self, card: NetConfig) -> Result<(), EngineError> {
        match self.mtu {
            Some(wanted) if !MTUS.contains(&wanted) => Err(EngineError::BadMtu {
                least: *MTUS.start(),
                most: *MTUS.end(),
            }),
            Some(wanted) if wanted != card.mtu => Err(EngineError::OtherMtu { kept: card.mtu }),
            _ => Ok(()),
        }
    }

    /// A network of the host's for a machine that has a `card` or not.
    fn on_tap(&self, tap: &TapSpec, card: Option<NetConfig>) -> Result<Arc<Network>, EngineError> {
        let ruled = !(self.allow.is_empty() && self.deny.is_empty() && self.publish.is_empty());
        let named = !(self.join.is_empty() && self.aliases.is_empty());
        if ruled || named || self.mode.is_some() {
            return Err(EngineError::TapAlone);
        }
        let card = card.ok_or(EngineError::NoCard)?;
        if !card.offload {
            return Err(EngineError::TapOfOther);
        }
        // The device first: what it lacks comes before what is wanted of it.
        let on = tap.open(&self.dns)?;
        self.check_mtu(card)?;
        if card.mtu > on.device.mtu() {
            return Err(EngineError::TapMtu {
                name: tap.name.clone(),
                mtu: on.device.mtu(),
                card: card.mtu,
            });
        }
        let options = Options {
            mode: NetworkMode::Full,
            tap: Some(on),
            ..Options::default()
        };
        Ok(Network::new(&options, Vec::new())?)
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
        subnet: attached.subnets.v4,
        address6: attached.address6,
    };
    attached.map(place).collect()
}

/// The addresses that a guest with this network has besides its own, with their prefixes' lengths.
pub(crate) fn addresses(network: Option<&Network>) -> Vec<String> {
    let attached = network.map(Network::attached).unwrap_or_default();
    let mut addresses = Vec::new();
    for one in attached {
        addresses.push(format!("{}/{}", one.address, one.subnets.v4.prefix_len()));
        if let (Some(address), Some(net)) = (one.address6, one.subnets.v6) {
            addresses.push(format!("{address}/{}", net.prefix_len()));
        }
    }
    addresses
}

/// What a guest's card is to be, on a network of the host's.
pub(crate) fn card_of(network: Option<&Network>) -> Option<Card> {
    let on = network?.options().tap.as_ref()?;
    fn texts<T: ToString>(all: &[T]) -> Vec<String> {
        all.iter().map(T::to_string).collect()
    }
    Some(Card {
        link_address: on.link_address,
        addresses: texts(&on.addresses),
        gateways: texts(&on.gateways),
        nameservers: texts(&on.nameservers),
    })
}

/// The name servers that a guest with this card is told of before it has a network.
pub(crate) fn nameservers(card: Option<NetConfig>) -> Vec<String> {
    let own = card.filter(|card| !card.offload);
    own.map(|_| address::DNS_V4.to_string())
        .into_iter()
        .collect()
}
