//! The host's name servers.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// How often the file is looked at again: hosts change networks.
const FRESH: Duration = Duration::from_secs(2);
const FILE: &str = "/etc/resolv.conf";
/// More are not asked (resolv.conf(5)).
const MOST: usize = 3;

/// The name servers that questions go to.
#[derive(Debug)]
pub(crate) struct Resolvers {
    /// Given by the user: the file is not looked at.
    given: bool,
    file: PathBuf,
    servers: Vec<SocketAddr>,
    changed: Option<SystemTime>,
    looked: Option<Instant>,
}

/// The servers in a text like resolv.conf(5).
fn parse(text: &str) -> Vec<SocketAddr> {
    let mut servers: Vec<SocketAddr> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            if words.next() != Some("nameserver") {
                return None;
            }
            // An address with a zone is of a link that a socket needs the number of.
            let address: IpAddr = words.next()?.parse().ok()?;
            Some(SocketAddr::new(address, 53))
        })
        .take(MOST)
        .collect();
    if servers.is_empty() {
        // What a resolver asks without the file.
        servers.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 53));
    }
    servers
}

/// The host's name servers that others than the host reach.
#[must_use]
pub fn of_host() -> Vec<IpAddr> {
    let text = std::fs::read_to_string(FILE).unwrap_or_default();
    let servers = parse(&text).into_iter().map(|server| server.ip());
    servers.filter(|server| !server.is_loopback()).collect()
}

impl Resolvers {
    pub(crate) fn new(given: &[SocketAddr]) -> Self {
        Self {
            given: !given.is_empty(),
            file: FILE.into(),
            servers: given.to_vec(),
            changed: None,
            looked: None,
        }
    }

    /// The servers, the preferred one first; never none.
    pub(crate) fn servers(&mut self) -> &[SocketAddr] {
        let fresh = self.looked.is_some_and(|at| at.elapsed() < FRESH);
        if !self.given && !fresh {
            self.looked = Some(Instant::now());
            let changed = std::fs::metadata(&self.file).and_then(|found| found.modified());
            let changed = changed.ok();
            if self.servers.is_empty() || changed != self.changed {
                self.changed = changed;
                self.servers = parse(&std::fs::read_to_string(&self.file).unwrap_or_default());
            }
        }
        &self.servers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_read() {
        let text = "# nameserver 9.9.9.9\nsearch lan\nnameserver 127.0.0.53\n nameserver  fd00::1 # x\n\
                    nameserver fe80::1%eth0\nnameserver nonsense\nnameserver\n";
        let servers = parse(text);
        let expected: [SocketAddr; 2] = [
            "127.0.0.53:53".parse().unwrap(),
            "[fd00::1]:53".parse().unwrap(),
        ];
        assert_eq!(servers, expected);
        assert_eq!(parse(""), ["127.0.0.1:53".parse().unwrap()]);
        assert_eq!(parse(&"nameserver 1.1.1.1\n".repeat(9)).len(), MOST);
    }

    #[test]
    fn those_given_are_asked() {
        let given = ["127.0.0.1:5353".parse().unwrap()];
        assert_eq!(Resolvers::new(&given).servers(), given);
        assert!(!Resolvers::new(&[]).servers().is_empty());
    }
}
