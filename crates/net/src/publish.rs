//! Ports of the guest's that the host listens at.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What a port speaks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Connections.
    #[default]
    Tcp,
    /// Datagrams.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the guest's, and where on the host it is to be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Mapping {
    /// The host's address and port; port 0 is any that is free.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub host: SocketAddr,
    /// The guest's port.
    pub guest: u16,
    /// What it speaks.
    #[serde(default)]
    pub protocol: Protocol,
}

/// A port of the guest's that the host listens at.
pub type Published = Mapping;

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} -> {}", self.guest, self.protocol, self.host)
    }
}

fn port(text: &str) -> Result<u16, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is no port: write a number from 1 to 65535"))
}

impl FromStr for Mapping {
    type Err = String;

    /// `[[IP:]HOST:]GUEST[/udp]`, with an IPv6 address in brackets.
    fn from_str(text: &str) -> Result<Self, String> {
        let (ends, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((ends, "tcp")) => (ends, Protocol::Tcp),
            Some((ends, "udp")) => (ends, Protocol::Udp),
            Some((_, other)) => return Err(format!("no protocol {other:?}: write tcp or udp")),
        };
        let (host, guest) = match ends.rsplit_once(':') {
            None => ("", ends),
            Some((host, guest)) => (host, guest),
        };
        let (address, number) = match host.rsplit_once(':') {
            None => (None, host),
            Some((address, number)) => (Some(address), number),
        };
        let address: IpAddr = match address {
            None => Ipv4Addr::UNSPECIFIED.into(),
            Some(address) => {
                let bare = address
                    .strip_prefix('[')
                    .and_then(|rest| rest.strip_suffix(']'));
                let parsed = match bare {
                    Some(bare) => bare.parse().map(IpAddr::V6).ok(),
                    None => address.parse().map(IpAddr::V4).ok(),
                };
                parsed.ok_or_else(|| {
                    format!("{address:?} is no address: write one such as 127.0.0.1 or [::1]")
                })?
            }
        };
        let guest = match port(guest)? {
            0 => return Err("the guest has no port 0".to_owned()),
            guest => guest,
        };
        let number = match number {
            "" => 0,
            number => port(number)?,
        };
        Ok(Self {
            host: SocketAddr::new(address, number),
            guest,
            protocol,
        })
    }
}

/// A socket of the host's behind a published port.
#[derive(Debug)]
pub(crate) enum Door {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) published: Published,
    pub(crate) door: Door,
    /// Somebody may be at the door.
    pub(crate) ready: bool,
    /// Connections that the guest has not answered yet.
    pub(crate) opening: usize,
}

impl Listener {
    pub(crate) fn open(mapping: Mapping) -> io::Result<Self> {
        let (door, host) = match mapping.protocol {
            Protocol::Tcp => {
                let listener = TcpListener::bind(mapping.host)?;
                // The standard library's queue is short for thousands that come at once.
                rustix::net::listen(&listener, 4096)?;
                listener.set_nonblocking(true)?;
                let host = listener.local_addr()?;
                (Door::Tcp(listener), host)
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind(mapping.host)?;
                socket.set_nonblocking(true)?;
                let host = socket.local_addr()?;
                (Door::Udp(socket), host)
            }
        };
        Ok(Self {
            published: Published { host, ..mapping },
            door,
            ready: true,
            opening: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_as_elsewhere() {
        for (text, shown) in [
            ("80", "80/tcp -> 0.0.0.0:0"),
            ("8080:80", "80/tcp -> 0.0.0.0:8080"),
            ("8080:80/tcp", "80/tcp -> 0.0.0.0:8080"),
            ("127.0.0.1:53:5353/udp", "5353/udp -> 127.0.0.1:53"),
            ("127.0.0.1::80", "80/tcp -> 127.0.0.1:0"),
            ("[::1]:8080:80", "80/tcp -> [::1]:8080"),
        ] {
            let mapping: Mapping = text.parse().unwrap();
            assert_eq!(mapping.to_string(), shown, "{text}");
        }
        for bad in [
            "",
            "x",
            "0",
            "80/sctp",
            "8080:",
            "1:2:3",
            "::1:80:80",
            "localhost:1:2",
            "70000:80",
            "80:70000",
            "[1.2.3.4]:1:2",
            "8000-8010:80",
            "-1:80",
        ] {
            assert!(bad.parse::<Mapping>().is_err(), "{bad}");
        }
    }

    #[test]
    fn any_port_becomes_one() {
        for text in ["127.0.0.1::7", "127.0.0.1::7/udp"] {
            let listener = Listener::open(text.parse().unwrap()).unwrap();
            assert_ne!(listener.published.host.port(), 0);
            assert!(Listener::open(listener.published).is_err(), "{text}");
        }
    }
}
