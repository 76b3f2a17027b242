//! The guest's network: the same in every machine, so that machines can be clones of each other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use skerry_devices::virtio::net::NetConfig;

/// The guest.
pub const GUEST_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The gateway; with a full network, what the host's loopback interface is.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server.
pub const DNS_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// Length of the network's prefix.
pub const PREFIX_V4: u8 = 24;
/// The guest. A unique local address: programs prefer IPv4 to it (RFC 6724), which every host has.
pub const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfd53, 0x6b72, 0x7279, 2, 0, 0, 0, 15);
/// The gateway.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd53, 0x6b72, 0x7279, 2, 0, 0, 0, 2);
/// The name server.
pub const DNS_V6: Ipv6Addr = Ipv6Addr::new(0xfd53, 0x6b72, 0x7279, 2, 0, 0, 0, 3);
/// Length of the network's prefix.
pub const PREFIX_V6: u8 = 64;
/// Everything on the link but the guest.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x53, 0x6b, 0x72, 0x00, 0x02];
/// The guest's card.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x53, 0x6b, 0x72, 0x00, 0x0f];
/// Packets end here, so they may be as long as they get: fewer of them for as many bytes. A page less
/// than the most, as an Ethernet frame of that has to fit too.
pub const MTU: u16 = 65_520;

/// The guest's network card.
pub const CARD: NetConfig = NetConfig {
    mac: GUEST_MAC,
    mtu: MTU,
    offload: false,
};

/// What an address in the guest's packets stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The gateway.
    Gateway,
    /// The name server.
    Dns,
    /// Some other machine.
    Remote,
}

pub(crate) fn place(address: IpAddr) -> Place {
    match address {
        IpAddr::V4(GATEWAY_V4) | IpAddr::V6(GATEWAY_V6) => Place::Gateway,
        IpAddr::V4(DNS_V4) | IpAddr::V6(DNS_V6) => Place::Dns,
        _ => Place::Remote,
    }
}

/// The gateway in the family of `address`.
pub(crate) fn gateway(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => GATEWAY_V4.into(),
        IpAddr::V6(_) => GATEWAY_V6.into(),
    }
}

/// What the guest's agent is told on the kernel command line.
#[must_use]
pub fn kernel_parameter() -> String {
    format!(
        "skerry.network={GUEST_V4}/{PREFIX_V4}@{GATEWAY_V4},{GUEST_V6}/{PREFIX_V6}@{GATEWAY_V6}"
    )
}
