//! Where a guest may go.
//!
//! The address that the host is about to connect to is judged, in this order: what a rule denies is denied;
//! what a rule of addresses allows is allowed; with rules at all, what the name server answered for a name
//! that a rule allows is allowed where the network reaches, and nothing else; without, wherever it reaches.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use smoltcp::time::Instant;

use crate::rules::{Destination, Rule};

/// Addresses of which it is known what name led there.
const MOST_HEARD: usize = 4096;
/// Denials that are told of.
const MOST_DENIALS: usize = 32;
/// How long an address is good after its name was asked for: at least, since programs keep addresses
/// longer than they should, and at most.
const LEAST_TTL: Duration = Duration::from_secs(60);
const MOST_TTL: Duration = Duration::from_secs(24 * 3600);
/// Networks that are shorter are the whole internet rather than a private part of it.
const LEAST_SPECIAL_V4: u8 = 8;
const LEAST_SPECIAL_V6: u8 = 7;

/// How far a guest's network reaches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// Nowhere.
    None,
    /// The internet: nothing that is private, the host's own, or a cloud's metadata.
    #[default]
    Public,
    /// Wherever the host gets; the gateway is the host's loopback interface.
    Full,
}

impl NetworkMode {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Public => "public",
            Self::Full => "full",
        }
    }

    /// Whether `address`, the one that the host is about to send to, may be reached.
    pub(crate) fn allows(self, address: IpAddr) -> bool {
        match self {
            Self::None => false,
            Self::Public => match address {
                IpAddr::V4(address) => is_public_v4(address),
                IpAddr::V6(address) => is_public_v6(address),
            },
            Self::Full => is_unicast(address),
        }
    }
}

fn is_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            !(address.is_multicast() || address.is_broadcast() || address.octets()[0] == 0)
        }
        IpAddr::V6(address) => !(address.is_multicast() || address.is_unspecified()),
    }
}

/// Whether an address is of the internet (RFC 6890 and the registry of special-purpose addresses).
/// 169.254.0.0/16 and 100.64.0.0/10 have the clouds' metadata services.
fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = a == 0
        || a >= 224
        || address.is_loopback()
        || address.is_private()
        || address.is_link_local()
        || a == 100 && (64..128).contains(&b)
        || a == 198 && (18..20).contains(&b)
        || (a, b, c) == (192, 0, 0)
        || (a, b, c) == (192, 88, 99)
        // The host's side of Azure's virtual network.
        || address == Ipv4Addr::new(168, 63, 129, 16)
        || address.is_documentation();
    !special
}

/// The IPv4 address that an IPv6 one leads to: mapped, by NAT64 (RFC 6052) or by 6to4 (RFC 3056).
fn inside(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let embedded = |high: u16, low: u16| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
    match address.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(embedded(high, low)),
        [0x2002, high, low, ..] => Some(embedded(high, low)),
        _ => address.to_ipv4_mapped(),
    }
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    if let Some(address) = inside(address) {
        return is_public_v4(address);
    }
    match address.segments() {
        // Teredo, benchmarks, ORCHID and documentation.
        [0x2001, second, ..] if second < 0x200 || second == 0xdb8 => false,
        [0x3fff, second, ..] if second < 0x1000 => false,
        // Global unicast is 2000::/3; all else is special.
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// Why a guest may not go somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum DenialReason {
    /// Its network doesn't reach so far.
    Reach,
    /// A rule denies it.
    Rule,
    /// There are rules that allow things, and none allows it.
    Unlisted,
    /// A name that may be reached led to an address that may not.
    Rebinding,
    /// No rule allows the name that was asked for.
    Name,
}

/// Something that the guest was denied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Denial {
    /// When, the last time, in nanoseconds since 1970.
    pub time: u64,
    /// `tcp`, `udp`, `icmp` or `dns`.
    pub protocol: String,
    /// Where it led: an address, for TCP and UDP with a port.
    pub address: Option<String>,
    /// The name that led there, or was asked for.
    pub name: Option<String>,
    /// Why.
    pub reason: DenialReason,
    /// How often.
    pub count: u64,
}

/// What the name server said of an address.
struct Heard {
    /// The last name that led there.
    name: String,
    /// Rules that allow it because of a name, and until when.
    rules: Vec<(usize, Instant)>,
    until: Instant,
}

/// What a guest may reach, and what it has learnt from the name server.
pub(crate) struct Policy {
    mode: NetworkMode,
    allow: Vec<Rule>,
    deny: Vec<IpNet>,
    heard: HashMap<IpAddr, Heard>,
    denials: VecDeque<Denial>,
}

/// Whether all of a network is out of the public part of the internet, so that whoever names it means it.
fn is_special(network: &IpNet) -> bool {
    let public = |address: IpAddr| NetworkMode::Public.allows(address);
    let least = match network {
        IpNet::V4(_) => LEAST_SPECIAL_V4,
        IpNet::V6(_) => LEAST_SPECIAL_V6,
    };
    network.prefix_len() >= least && !public(network.network()) && !public(network.broadcast())
}

impl Policy {
    pub(crate) fn new(mode: NetworkMode, allow: &[Rule], deny: &[IpNet]) -> Self {
        Self {
            mode,
            allow: allow.to_vec(),
            deny: deny.to_vec(),
            heard: HashMap::new(),
            denials: VecDeque::new(),
        }
    }

    pub(crate) fn mode(&self) -> NetworkMode {
        self.mode
    }

    /// Whether only some names may be asked for.
    pub(crate) fn has_names(&self) -> bool {
        let mut rules = self.allow.iter();
        rules.any(|rule| matches!(rule.to, Destination::Name(_)))
    }

    /// The rules that allow a name.
    fn rules_for<'a>(&'a self, name: &'a str) -> impl Iterator<Item = usize> + 'a {
        let rules = self.allow.iter().enumerate();
        rules.filter_map(move |(number, rule)| match &rule.to {
            Destination::Name(pattern) if pattern.matches(name) => Some(number),
            _ => None,
        })
    }

    pub(crate) fn allows_name(&self, name: &str) -> bool {
        !self.has_names() || self.rules_for(name).next().is_some()
    }

    /// Whether the host may connect to `address`, which the guest calls `peer`; a packet that has no `port`
    /// is an echo request.
    pub(crate) fn check(
        &self,
        (peer, address): (IpAddr, IpAddr),
        port: Option<u16>,
        now: Instant,
    ) -> Result<(), DenialReason> {
        if self.mode == NetworkMode::None {
            return Err(DenialReason::Reach);
        }
        let v4 = match address {
            IpAddr::V6(address) => inside(address).map(IpAddr::V4),
            IpAddr::V4(_) => None,
        };
        let covers = |network: &IpNet| {
            network.contains(&address) || v4.is_some_and(|v4| network.contains(&v4))
        };
        if self.deny.iter().any(covers) {
            return Err(DenialReason::Rule);
        }
        let reaches = self.mode.allows(address);
        let named = self.allow.iter().any(|rule| match &rule.to {
            Destination::Network(network) => {
                covers(network) && rule.has_port(port) && (reaches || is_special(network))
            }
            Destination::Name(_) => false,
        });
        if named && is_unicast(address) {
            return Ok(());
        }
        let learnt = self.heard.get(&peer).is_some_and(|heard| {
            let mut rules = heard.rules.iter();
            rules.any(|(number, until)| {
                *until > now
                    && self
                        .allow
                        .get(*number)
                        .is_some_and(|rule| rule.has_port(port))
            })
        });
        match (self.allow.is_empty() || learnt, reaches) {
            (true, true) => Ok(()),
            (false, true) => Err(DenialReason::Unlisted),
            (_, false) if learnt => Err(DenialReason::Rebinding),
            (_, false) => Err(DenialReason::Reach),
        }
    }

    /// The name server answered `name` with an address, for so many seconds.
    pub(crate) fn learn(&mut self, name: &str, address: IpAddr, ttl: u32, now: Instant) {
        let ttl = Duration::from_secs(ttl.into()).clamp(LEAST_TTL, MOST_TTL);
        let until = now + ttl.into();
        let rules: Vec<usize> = self.rules_for(name).collect();
        if !self.heard.contains_key(&address) && self.heard.len() >= MOST_HEARD {
            self.heard.retain(|_, heard| heard.until > now);
            let oldest = self.heard.iter().min_by_key(|(_, heard)| heard.until);
            if let Some(oldest) = oldest.map(|(address, _)| *address)
                && self.heard.len() >= MOST_HEARD
            {
                self.heard.remove(&oldest);
            }
        }
        let heard = self.heard.entry(address).or_insert_with(|| Heard {
            name: String::new(),
            rules: Vec::new(),
            until,
        });
        name.clone_into(&mut heard.name);
        heard.until = heard.until.max(until);
        for number in rules {
            match heard.rules.iter_mut().find(|(rule, _)| *rule == number) {
                Some((_, before)) => *before = until.max(*before),
                None => heard.rules.push((number, until)),
            }
        }
    }

    /// The guest is another one, which has asked for nothing.
    pub(crate) fn forget(&mut self) {
        self.heard.clear();
    }

    /// Notes that the guest was denied an address.
    pub(crate) fn note(&mut self, protocol: &str, peer: SocketAddr, reason: DenialReason) {
        let name = self.heard.get(&peer.ip()).map(|heard| heard.name.clone());
        let address = match peer.port() {
            0 => peer.ip().to_string(),
            _ => peer.to_string(),
        };
        tracing::debug!(
            address,
            name,
            protocol,
            ?reason,
            "The guest may not go there"
        );
        self.record(protocol, Some(address), name, reason);
    }

    /// Notes that it was denied a name.
    pub(crate) fn note_name(&mut self, name: &str) {
        tracing::debug!(name, "The guest may not ask for this name");
        self.record("dns", None, Some(name.to_owned()), DenialReason::Name);
    }

    fn record(
        &mut self,
        protocol: &str,
        address: Option<String>,
        name: Option<String>,
        reason: DenialReason,
    ) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let time = since.map_or(0, |since| {
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        });
        let same = self.denials.iter().position(|denial| {
            denial.protocol == protocol
                && denial.address == address
                && denial.name == name
                && denial.reason == reason
        });
        let count = match same.and_then(|number| self.denials.remove(number)) {
            Some(denial) => denial.count + 1,
            None => 1,
        };
        if self.denials.len() >= MOST_DENIALS {
            self.denials.pop_front();
        }
        self.denials.push_back(Denial {
            time,
            protocol: protocol.to_owned(),
            address,
            name,
            reason,
            count,
        });
    }

    /// What it was denied last.
    pub(crate) fn denials(&self) -> Vec<Denial> {
        self.denials.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn public_is_the_internet() {
        let allowed = |text: &str| NetworkMode::Public.allows(text.parse().unwrap());
        for text in [
            "1.1.1.1",
            "8.8.8.8",
            "93.184.216.34",
            "172.15.0.1",
            "172.32.0.1",
            "100.63.0.1",
            "2606:4700::1111",
            "2a00:1450::1",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
            "2002:808:808::1",
        ] {
            assert!(allowed(text), "{text}");
        }
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "10.0.2.2",
            "100.64.0.1",
            "100.100.100.200",
            "127.0.0.1",
            "127.255.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "192.0.0.192",
            "192.0.2.1",
            "198.18.0.1",
            "168.63.129.16",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "fd00:ec2::254",
            "fc00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::1",
            "2002:a9fe:a9fe::",
            "2001::1",
            "2001:db8::1",
            "3fff::1",
            "::127.0.0.1",
        ] {
            assert!(!allowed(text), "{text}");
        }
    }

    #[test]
    fn full_is_what_one_can_send_to() {
        let allowed = |text: &str| NetworkMode::Full.allows(text.parse().unwrap());
        assert!(
            allowed("127.0.0.1") && allowed("10.1.2.3") && allowed("::1") && allowed("fe80::1")
        );
        assert!(!allowed("224.0.0.1") && !allowed("255.255.255.255") && !allowed("0.0.0.0"));
        assert!(!allowed("ff02::1") && !allowed("::"));
    }

    proptest! {
        #[test]
        fn whatever_is_public_is_in_full_too(address in any::<IpAddr>()) {
            prop_assert!(!NetworkMode::Public.allows(address) || NetworkMode::Full.allows(address));
            prop_assert!(!NetworkMode::None.allows(address));
        }

        #[test]
        fn an_address_inside_another_is_judged_alike(address in any::<Ipv4Addr>()) {
            let [a, b, c, d] = address.octets();
            let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            let public = NetworkMode::Public.allows(address.into());
            for inside in [
                address.to_ipv6_mapped(),
                Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low),
                Ipv6Addr::new(0x2002, high, low, 1, 2, 3, 4, 5),
            ] {
                prop_assert_eq!(NetworkMode::Public.allows(inside.into()), public);
            }
        }
    }

    fn policy(mode: NetworkMode, allow: &[&str], deny: &[&str]) -> Policy {
        let allow: Vec<Rule> = allow.iter().map(|rule| rule.parse().unwrap()).collect();
        let deny: Vec<IpNet> = deny.iter().map(|net| net.parse().unwrap()).collect();
        Policy::new(mode, &allow, &deny)
    }

    fn judged(policy: &Policy, peer: &str) -> Result<(), DenialReason> {
        let peer: SocketAddr = peer.parse().unwrap();
        policy.check(
            (peer.ip(), peer.ip()),
            Some(peer.port()),
            Instant::from_secs(10),
        )
    }

    #[test]
    fn rules_have_their_order() {
        use DenialReason::{Reach, Rule, Unlisted};
        let rules = [
            "1.1.1.0/24:443",
            "8.8.8.8",
            "10.1.0.0/16:80-90",
            "127.0.0.1:3000",
        ];
        let policy = policy(NetworkMode::Public, &rules, &["1.1.1.9/32", "10.1.2.0/24"]);
        for (peer, expected) in [
            ("1.1.1.1:443", Ok(())),
            ("[::ffff:1.1.1.1]:443", Ok(())),
            ("1.1.1.1:80", Err(Unlisted)),
            ("1.1.1.9:443", Err(Rule)),
            ("[::ffff:1.1.1.9]:443", Err(Rule)),
            ("8.8.8.8:1", Ok(())),
            ("9.9.9.9:1", Err(Unlisted)),
            // Private, and named by a rule.
            ("10.1.0.1:80", Ok(())),
            ("10.1.2.1:80", Err(Rule)),
            ("10.1.0.1:91", Err(Reach)),
            ("10.2.0.1:80", Err(Reach)),
            ("127.0.0.1:3000", Ok(())),
            ("127.0.0.1:3001", Err(Reach)),
            ("169.254.169.254:80", Err(Reach)),
        ] {
            assert_eq!(judged(&policy, peer), expected, "{peer}");
        }
        let echo = |address: &str| {
            let address = address.parse().unwrap();
            policy.check((address, address), None, Instant::ZERO)
        };
        assert_eq!(echo("8.8.8.8"), Ok(()));
        assert_eq!(
            echo("1.1.1.1"),
            Err(Unlisted),
            "a rule on ports is about no echo"
        );
    }

    #[test]
    fn everything_is_not_the_private_part_of_it() {
        for rule in [
            "0.0.0.0/0",
            "0.0.0.0/1",
            "128.0.0.0/2",
            "::/0",
            "172.0.0.0/8",
        ] {
            let public = policy(NetworkMode::Public, &[rule], &[]);
            for peer in [
                "169.254.169.254:80",
                "172.16.0.1:80",
                "127.0.0.1:1",
                "[::1]:1",
            ] {
                assert_eq!(
                    judged(&public, peer),
                    Err(DenialReason::Reach),
                    "{rule} {peer}"
                );
            }
        }
        let full = policy(NetworkMode::Full, &["0.0.0.0/0:80"], &["169.254.0.0/16"]);
        assert_eq!(judged(&full, "10.0.0.1:80"), Ok(()));
        assert_eq!(judged(&full, "169.254.169.254:80"), Err(DenialReason::Rule));
        let nothing = policy(NetworkMode::None, &["0.0.0.0/0"], &[]);
        assert_eq!(judged(&nothing, "8.8.8.8:80"), Err(DenialReason::Reach));
    }

    #[test]
    fn names_lead_to_what_was_answered() {
        let mut policy = policy(NetworkMode::Public, &["*.example.org:443", "a.test"], &[]);
        assert!(policy.allows_name("www.example.org") && policy.allows_name("a.test"));
        assert!(!policy.allows_name("example.org") && !policy.allows_name("b.test"));
        let at = |second| Instant::from_secs(second);
        let learnt = |policy: &Policy, peer: &str, second| {
            let peer: SocketAddr = peer.parse().unwrap();
            policy.check((peer.ip(), peer.ip()), Some(peer.port()), at(second))
        };
        policy.learn("www.example.org", "8.8.8.8".parse().unwrap(), 300, at(0));
        policy.learn("b.test", "9.9.9.9".parse().unwrap(), 300, at(0));
        assert_eq!(learnt(&policy, "8.8.8.8:443", 299), Ok(()));
        assert_eq!(
            learnt(&policy, "8.8.8.8:80", 299),
            Err(DenialReason::Unlisted)
        );
        assert_eq!(
            learnt(&policy, "8.8.8.8:443", 300),
            Err(DenialReason::Unlisted)
        );
        assert_eq!(
            learnt(&policy, "9.9.9.9:443", 1),
            Err(DenialReason::Unlisted)
        );
        // A name that leads into the host's own network.
        policy.learn("a.test", "169.254.169.254".parse().unwrap(), 300, at(0));
        let metadata = "169.254.169.254:80";
        assert_eq!(learnt(&policy, metadata, 1), Err(DenialReason::Rebinding));
        policy.note("tcp", metadata.parse().unwrap(), DenialReason::Rebinding);
        policy.note("tcp", metadata.parse().unwrap(), DenialReason::Rebinding);
        let denials = policy.denials();
        assert_eq!((denials.len(), denials[0].count), (1, 2));
        assert_eq!(denials[0].name.as_deref(), Some("a.test"));
        policy.forget();
        assert_eq!(
            learnt(&policy, "8.8.8.8:443", 1),
            Err(DenialReason::Unlisted)
        );
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut policy = policy(NetworkMode::Public, &["a.test"], &[]);
        for number in 0..2 * MOST_HEARD as u32 {
            let address = Ipv4Addr::from(0x0100_0000 + number).into();
            policy.learn("a.test", address, number, Instant::ZERO);
            policy.note("udp", SocketAddr::new(address, 1), DenialReason::Unlisted);
        }
        assert_eq!(policy.heard.len(), MOST_HEARD);
        assert_eq!(policy.denials().len(), MOST_DENIALS);
    }
}
