//! What network a machine is given.

use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use skerry_net::address;
pub use skerry_net::{Counters, Mapping, Network, NetworkMode, Options, Protocol, Published};

use crate::error::EngineError;

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
}

impl NetworkReport {
    /// Of a machine with this network, or with none.
    pub(crate) fn of(network: Option<&Network>) -> Self {
        match network {
            Some(network) => Self {
                mode: network.mode(),
                ports: network.published().to_vec(),
                counters: network.counters(),
            },
            None => Self {
                mode: NetworkMode::None,
                ports: Vec::new(),
                counters: Counters::default(),
            },
        }
    }
}

impl NetworkSpec {
    /// Whether a new machine has a card for it.
    pub(crate) fn wants_card(&self) -> bool {
        self.mode.unwrap_or_default() != NetworkMode::None
    }

    /// A network for a machine that has a `card` or not.
    pub(crate) fn make(&self, card: bool) -> Result<Option<Arc<Network>>, EngineError> {
        let Self { mode, publish, dns } = self;
        let off = *mode == Some(NetworkMode::None);
        if off && !(publish.is_empty() && dns.is_empty()) {
            return Err(EngineError::NetworkOff);
        }
        if !card {
            let wanted = mode.is_some() && !off || !publish.is_empty() || !dns.is_empty();
            return match wanted {
                true => Err(EngineError::NoCard),
                false => Ok(None),
            };
        }
        let options = Options {
            mode: mode.unwrap_or_default(),
            publish: publish.clone(),
            dns: dns.clone(),
        };
        Ok(Some(Network::new(&options)?))
    }
}

/// The name servers that a guest with a card is told of.
pub(crate) fn nameservers(card: bool) -> Vec<String> {
    card.then(|| address::DNS_V4.to_string())
        .into_iter()
        .collect()
}
