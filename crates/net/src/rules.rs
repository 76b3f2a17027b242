//! What a guest may reach besides how far its network reaches: rules that name networks, names and ports.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The longest name (RFC 1035, 2.3.4), written with dots.
const LONGEST_NAME: usize = 253;
const LONGEST_LABEL: usize = 63;

/// A name, or with `*.` all names below one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NamePattern {
    /// In small letters, without a dot at the end.
    name: String,
    below: bool,
}

/// Where a rule leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// Addresses.
    Network(IpNet),
    /// What the name server answers for such names.
    Name(NamePattern),
}

/// Something that a guest may reach: `CIDR[:PORT[-PORT]]` or `NAME[:PORT[-PORT]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rule {
    /// Where it leads.
    pub to: Destination,
    /// Ports of TCP and UDP, first and last; all of them and echo if there are none.
    pub ports: Option<(u16, u16)>,
}

/// A rule that can't be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} names no addresses and no name: write one such as 192.0.2.0/24, 192.0.2.1:443, [2001:db8::/32]:443, example.org:443 or *.example.org"
)]
pub struct RuleError(String);

/// Whether a text can be a name: letters, digits, hyphens and underscores between dots.
pub(crate) fn is_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=LONGEST_LABEL).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    text.len() <= LONGEST_NAME && text.split('.').all(label)
}

impl NamePattern {
    /// Whether `name`, in small letters, is such a name.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match self.below {
            false => name == self.name,
            true => name
                .strip_suffix(&self.name)
                .and_then(|rest| rest.strip_suffix('.'))
                .is_some_and(|rest| !rest.is_empty()),
        }
    }
}

impl FromStr for NamePattern {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let unclear = || RuleError(text.to_owned());
        let (below, name) = match text.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, text),
        };
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        // What ends in a number is an address that is written wrong (WHATWG URL, 3.5).
        let last = name.rsplit('.').next().unwrap_or_default();
        let number = last.bytes().all(|byte| byte.is_ascii_digit());
        if !is_name(&name) || number {
            return Err(unclear());
        }
        Ok(Self { name, below })
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let below = if self.below { "*." } else { "" };
        write!(f, "{below}{}", self.name)
    }
}

/// Addresses from `ADDRESS` or `ADDRESS/PREFIX`.
pub fn parse_network(text: &str) -> Result<IpNet, RuleError> {
    let network = text.parse::<IpNet>().map(|network| network.trunc());
    let single = || text.parse::<IpAddr>().map(IpNet::from);
    network
        .or_else(|_| single())
        .map_err(|_| RuleError(text.to_owned()))
}

fn parse_ports(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (1 <= first && first <= last).then_some((first, last))
}

impl Rule {
    /// Whether it is about this port; none is an echo's.
    #[must_use]
    pub fn has_port(&self, port: Option<u16>) -> bool {
        match (self.ports, port) {
            (None, _) => true,
            (Some((first, last)), Some(port)) => (first..=last).contains(&port),
            (Some(_), None) => false,
        }
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let unclear = || RuleError(text.to_owned());
        let destination = |text: &str| {
            let network = parse_network(text).map(Destination::Network);
            network.or_else(|_| text.parse().map(Destination::Name))
        };
        if let Some(rest) = text.strip_prefix('[') {
            let (inside, after) = rest.split_once(']').ok_or_else(unclear)?;
            let to = parse_network(inside).map_err(|_| unclear())?;
            let ports = match after.strip_prefix(':') {
                Some(ports) => Some(parse_ports(ports).ok_or_else(unclear)?),
                None if after.is_empty() => None,
                None => return Err(unclear()),
            };
            return Ok(Self {
                to: Destination::Network(to),
                ports,
            });
        }
        if let Ok(to) = destination(text) {
            return Ok(Self { to, ports: None });
        }
        let (before, ports) = text.rsplit_once(':').ok_or_else(unclear)?;
        // An IPv6 address with a port behind it needs brackets: "::1:443" is an address.
        if before.contains(':') {
            return Err(unclear());
        }
        Ok(Self {
            to: destination(before).map_err(|_| unclear())?,
            ports: Some(parse_ports(ports).ok_or_else(unclear)?),
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.to, self.ports) {
            (Destination::Network(IpNet::V6(to)), Some(_)) => write!(f, "[{to}]")?,
            (Destination::Network(to), _) => write!(f, "{to}")?,
            (Destination::Name(to), _) => write!(f, "{to}")?,
        }
        match self.ports {
            None => Ok(()),
            Some((first, last)) if first == last => write!(f, ":{first}"),
            Some((first, last)) => write!(f, ":{first}-{last}"),
        }
    }
}

impl TryFrom<String> for Rule {
    type Error = RuleError;

    fn try_from(text: String) -> Result<Self, RuleError> {
        text.parse()
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> Self {
        rule.to_string()
    }
}

impl TryFrom<String> for NamePattern {
    type Error = RuleError;

    fn try_from(text: String) -> Result<Self, RuleError> {
        text.parse()
    }
}

impl From<NamePattern> for String {
    fn from(pattern: NamePattern) -> Self {
        pattern.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rules_are_read_and_written() {
        for text in [
            "192.0.2.0/24",
            "192.0.2.0/24:443",
            "192.0.2.1/32:1-1024",
            "2001:db8::/32",
            "[2001:db8::/32]:443",
            "example.org",
            "example.org:443",
            "*.example.org:80-443",
        ] {
            let rule: Rule = text.parse().expect(text);
            assert_eq!(rule.to_string(), text);
        }
        let written = |text: &str| text.parse::<Rule>().expect(text).to_string();
        assert_eq!(written("192.0.2.77/24"), "192.0.2.0/24");
        assert_eq!(written("192.0.2.1:80"), "192.0.2.1/32:80");
        assert_eq!(written("::1"), "::1/128");
        assert_eq!(written("[::1]:80"), "[::1/128]:80");
        assert_eq!(written("Example.ORG."), "example.org");
        for text in [
            "",
            ":",
            "*",
            "*.",
            "a..b",
            "1.2.3",
            "1.2.3.4.5",
            "1.2.3.4/33",
            "1.2.3.4:0",
            "a:9-8",
            "a:70000",
            "[::1",
            "[::1]x",
            "[a]:1",
            "::1:x",
            "a b",
            "*.*.a",
            "x.*.a",
            "a:",
            "ä.de",
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text}");
        }
    }

    #[test]
    fn patterns_match_whole_labels() {
        let pattern = |text: &str| text.parse::<NamePattern>().unwrap();
        assert!(pattern("example.org").matches("example.org"));
        assert!(!pattern("example.org").matches("www.example.org"));
        let below = pattern("*.example.org");
        assert!(below.matches("www.example.org") && below.matches("a.b.example.org"));
        for name in [
            "example.org",
            ".example.org",
            "badexample.org",
            "example.org.evil",
            "",
        ] {
            assert!(!below.matches(name), "{name}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_read_again(text in "[a-z0-9.*:/\\[\\]-]{0,24}") {
            if let Ok(rule) = text.parse::<Rule>() {
                prop_assert_eq!(rule.to_string().parse::<Rule>(), Ok(rule));
            }
        }
    }
}
