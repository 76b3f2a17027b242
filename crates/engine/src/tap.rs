//! A machine on a network of the host's, by a TAP device.
//!
//! The device is opened before a machine's process is confined, and stays open as long as the process
//! lives: a machine that is started again in it has the same one.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use skerry_net::{OnTap, Tap, TapError, resolvers_of_host};

use crate::error::EngineError;

/// The most addresses that a guest is given.
const MOST_ADDRESSES: usize = 16;
/// Where name servers listen: a guest's configuration has no place for another port.
const DNS_PORT: u16 = 53;

/// A link address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LinkAddress(pub [u8; 6]);

impl fmt::Display for LinkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for LinkAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unclear = || {
            format!(
                "{text:?} is no address of one network card: write one such as 02:53:6b:00:00:01"
            )
        };
        let mut parts = text.split(':').map(|part| {
            let hex = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            hex.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        });
        let mut octets = [0; 6];
        for octet in &mut octets {
            *octet = parts.next().flatten().ok_or_else(unclear)?;
        }
        // Of a group of cards, or of none.
        let bad = octets[0] & 1 != 0 || octets == [0; 6];
        match bad || parts.next().is_some() {
            true => Err(unclear()),
            false => Ok(Self(octets)),
        }
    }
}

impl TryFrom<String> for LinkAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<LinkAddress> for String {
    fn from(address: LinkAddress) -> Self {
        address.to_string()
    }
}

/// A network of the host's for a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct TapSpec {
    /// The device's name.
    pub name: String,
    /// The guest's addresses; with none, the guest asks for them itself.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub addresses: Vec<IpNet>,
    /// Where what is for other networks goes, one for IPv4 and one for IPv6 at most.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub gateways: Vec<IpAddr>,
    /// The guest's link address; `None` is one that goes with the device's.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub mac: Option<LinkAddress>,
}

/// What a machine's network is, where it is one of the host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct TapReport {
    /// The device's name.
    pub name: String,
    /// The guest's link address.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub mac: LinkAddress,
    /// The addresses that the guest was given.
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub addresses: Vec<IpNet>,
    /// Its gateways.
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub gateways: Vec<IpAddr>,
}

impl From<&OnTap> for TapReport {
    fn from(on: &OnTap) -> Self {
        Self {
            name: on.device.name().to_owned(),
            mac: LinkAddress(on.link_address),
            addresses: on.addresses.clone(),
            gateways: on.gateways.clone(),
        }
    }
}

impl FromStr for TapSpec {
    type Err = String;

    /// `NAME[,ip=ADDRESS/PREFIX]…[,gateway=ADDRESS]…[,mac=ADDRESS]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        Tap::check_name(name).map_err(|error| error.to_string())?;
        let mut spec = Self {
            name: name.to_owned(),
            addresses: Vec::new(),
            gateways: Vec::new(),
            mac: None,
        };
        for part in parts {
            match part.split_once('=') {
                Some(("ip", value)) => {
                    let address = value.contains('/').then(|| value.parse().ok()).flatten();
                    spec.addresses.push(address.ok_or_else(|| {
                        format!("ip={value} is no address with a prefix: write one such as ip=10.1.0.2/24")
                    })?);
                }
                Some(("gateway", value)) => {
                    let gateway = value.parse().ok();
                    spec.gateways.push(gateway.ok_or_else(|| {
                        format!("gateway={value} is no address: write one such as gateway=10.1.0.1")
                    })?);
                }
                Some(("mac", value)) if spec.mac.is_none() => spec.mac = Some(value.parse()?),
                Some(("mac", _)) => return Err("mac= is given twice".to_owned()),
                _ => {
                    return Err(format!(
                        "{part:?} is nothing of a TAP device's: write ip=ADDRESS/PREFIX, gateway=ADDRESS or mac=ADDRESS"
                    ));
                }
            }
        }
        spec.check().map_err(|error| error.to_string())?;
        Ok(spec)
    }
}

impl TapSpec {
    /// Refuses what makes no sense together.
    fn check(&self) -> Result<(), EngineError> {
        Tap::check_name(&self.name)?;
        let refused = |problem: String| Err(EngineError::TapAddresses { problem });
        if self.addresses.len() > MOST_ADDRESSES {
            return refused(format!("a guest has {MOST_ADDRESSES} of them at most"));
        }
        for net in &self.addresses {
            let address = net.addr();
            let many = match net {
                IpNet::V4(net) if net.prefix_len() < 31 => {
                    net.addr() == net.network() || net.addr() == net.broadcast()
                }
                _ => false,
            };
            if many || address.is_multicast() || address.is_unspecified() || address.is_loopback() {
                return refused(format!("{net} is not the address of one machine"));
            }
        }
        for (number, gateway) in self.gateways.iter().enumerate() {
            let own = |net: &&IpNet| net.contains(gateway) && net.addr() != *gateway;
            if self.addresses.iter().find(own).is_none() {
                return refused(format!(
                    "the gateway {gateway} is not another machine on the network of an ip="
                ));
            }
            let before = self.gateways.iter().take(number);
            if before.clone().any(|one| one.is_ipv4() == gateway.is_ipv4()) {
                return refused("there are two gateways of one family".to_owned());
            }
        }
        Ok(())
    }

    /// The longest packet of the device; `None`: there is no such device.
    pub(crate) fn mtu(&self) -> Option<u16> {
        match held(&self.name) {
            Some(tap) => Some(tap.mtu()),
            None => Tap::mtu_of(&self.name).ok(),
        }
    }

    /// The device, and what a guest has to know of its network; `dns` are the name servers that the user
    /// names.
    pub(crate) fn open(&self, dns: &[SocketAddr]) -> Result<OnTap, EngineError> {
        self.check()?;
        let device = match held(&self.name) {
            Some(held) => held,
            None => Tap::open(&self.name)?,
        };
        let nameservers = match dns {
            [] => resolvers_of_host(),
            some => {
                if let Some(other) = some.iter().find(|server| server.port() != DNS_PORT) {
                    return Err(EngineError::TapDns { server: *other });
                }
                some.iter().map(SocketAddr::ip).collect()
            }
        };
        let own = device.guest_address();
        Ok(OnTap {
            link_address: self.mac.map_or(own, |mac| mac.0),
            addresses: self.addresses.clone(),
            gateways: self.gateways.clone(),
            nameservers,
            device,
        })
    }
}

/// The devices that this process opened while it could.
static HELD: Mutex<Vec<Tap>> = Mutex::new(Vec::new());

fn held(name: &str) -> Option<Tap> {
    let held = HELD.lock();
    held.iter().find(|tap| tap.name() == name).cloned()
}

/// Opens a machine's device for good, before its process is confined.
pub(crate) fn hold(spec: &TapSpec) -> Result<(), TapError> {
    if held(&spec.name).is_none() {
        let opened = Tap::open(&spec.name)?;
        HELD.lock().push(opened);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_addresses() {
        let text = "tap0,ip=10.1.0.2/24,gateway=10.1.0.1,ip=fd00::2/64,gateway=fd00::1,mac=02:53:6B:00:00:0a";
        let spec: TapSpec = text.parse().unwrap();
        assert_eq!(spec.name, "tap0");
        assert_eq!(spec.addresses.len(), 2);
        assert_eq!(spec.gateways.len(), 2);
        assert_eq!(spec.mac.unwrap().to_string(), "02:53:6b:00:00:0a");
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<TapSpec>(&json).unwrap(), spec);
        assert!("tap0".parse::<TapSpec>().unwrap().addresses.is_empty());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (bad, why) in [
            ("", "no name"),
            ("a/b", "no name"),
            ("tap0,", "nothing of"),
            ("tap0,ip=10.1.0.2", "with a prefix"),
            ("tap0,ip=10.1.0.0/24", "one machine"),
            ("tap0,ip=10.1.0.255/24", "one machine"),
            ("tap0,ip=ff02::1/64", "one machine"),
            ("tap0,gateway=10.1.0.1", "not another machine"),
            (
                "tap0,ip=10.1.0.2/24,gateway=10.1.1.1",
                "not another machine",
            ),
            (
                "tap0,ip=10.1.0.2/24,gateway=10.1.0.2",
                "not another machine",
            ),
            (
                "tap0,ip=10.1.0.2/24,gateway=10.1.0.1,gateway=10.1.0.3",
                "two gateways",
            ),
            ("tap0,mac=03:00:00:00:00:01", "one network card"),
            ("tap0,mac=00:00:00:00:00:00", "one network card"),
            ("tap0,mac=2:0:0:0:0:1", "one network card"),
            ("tap0,mac=02:00:00:00:00:01:02", "one network card"),
            ("tap0,speed=10", "nothing of"),
        ] {
            let refused = bad.parse::<TapSpec>().unwrap_err();
            assert!(refused.contains(why), "{bad}: {refused}");
        }
    }
}
