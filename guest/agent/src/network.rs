//! Bringing interfaces up: loopback, and the network card with the addresses that the kernel command
//! line names (`skerry.network=ADDRESS/PREFIX@GATEWAY,…`).

use std::io;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use skerry_protocol::message::Card;

use crate::log;

/// Index of `lo` in every network namespace.
const LOOPBACK_INDEX: u32 = 1;
/// What the kernel calls the first network card.
const CARD: &str = "eth0";
/// Where the command line has the card's addresses.
const PARAMETER: &str = "skerry.network=";

// rtnetlink(7) and netlink(7).
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const IFF_UP: u32 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// No look for others with the address: there are none, and it would take a second.
const IFA_F_NODAD: u8 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;

/// An address of the card, and the gateway of its family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address {
    address: IpAddr,
    prefix: u8,
    gateway: IpAddr,
}

/// Sets `IFF_UP` of `lo`.
pub fn bring_up_loopback() -> io::Result<()> {
    Netlink::open()?.bring_up(LOOPBACK_INDEX)
}

/// Brings the network card up as the kernel command line says; without a word of it there is none.
pub fn bring_up_card(command_line: &str) -> io::Result<()> {
    let Some(addresses) = parse(command_line)? else {
        return Ok(());
    };
    let netlink = Netlink::open()?;
    let card = rustix::net::netdevice::name_to_index(&netlink.0, CARD)?;
    // Nobody else is on the link: no router to ask for, no address to contest.
    for setting in ["accept_ra", "accept_dad", "router_solicitations"] {
        // A kernel without IPv6 has none of them.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{CARD}/{setting}"), "0");
    }
    netlink.bring_up(card)?;
    for address in addresses {
        let result = netlink
            .add_address(card, (address.address, address.prefix))
            .and_then(|()| netlink.add_default_route(card, address.gateway));
        match result {
            Err(error) if address.address.is_ipv6() => {
                // A kernel without IPv6 is of use with IPv4 alone.
                log::error(format_args!("{}: {error}", address.address));
            }
            result => result?,
        }
    }
    Ok(())
}

/// Addresses that set-ups named, and that the card has.
static ADDED: Mutex<Vec<(IpAddr, u8)>> = Mutex::new(Vec::new());

fn with_prefixes(addresses: &[String]) -> io::Result<Vec<(IpAddr, u8)>> {
    let unclear = |text: &str| io::Error::other(format!("{text:?} is no address with a prefix"));
    let one = |text: &String| {
        let (address, prefix) = text.split_once('/').ok_or_else(|| unclear(text))?;
        match (address.parse(), prefix.parse()) {
            (Ok(address), Ok(prefix)) => Ok((address, prefix)),
            _ => Err(unclear(text)),
        }
    };
    addresses.iter().map(one).collect()
}

/// Has the card be what it is to be on a network of the host's. Others are on the link, and routers may
/// give more addresses.
pub fn set_card(card: &Card) -> io::Result<()> {
    let unclear = |text: &str| io::Error::other(format!("{text:?} is no address"));
    let gateways = card.gateways.iter();
    let gateways = gateways.map(|text| text.parse().map_err(|_| unclear(text)));
    let gateways: Vec<IpAddr> = gateways.collect::<io::Result<_>>()?;
    let netlink = Netlink::open()?;
    let index = rustix::net::netdevice::name_to_index(&netlink.0, CARD)?;
    // Before it is up: the link-local address is made of it.
    netlink.set_link_address(index, card.link_address)?;
    netlink.bring_up(index)?;
    set_addresses(&card.addresses)?;
    for gateway in gateways {
        netlink.add_default_route(index, gateway)?;
    }
    Ok(())
}

/// Gives the card these addresses (`ADDRESS/PREFIX`) besides its own, and takes those from it that an
/// earlier call gave it.
pub fn set_addresses(addresses: &[String]) -> io::Result<()> {
    let wanted = with_prefixes(addresses)?;
    let mut added = ADDED.lock().unwrap_or_else(PoisonError::into_inner);
    if *added == wanted {
        return Ok(());
    }
    let netlink = Netlink::open()?;
    let card = rustix::net::netdevice::name_to_index(&netlink.0, CARD)?;
    for (address, prefix) in added.drain(..) {
        // Somebody in the guest may have taken it away.
        let _ = netlink.change_address(RTM_DELADDR, 0, card, (address, prefix));
    }
    for address in wanted {
        netlink.add_address(card, address)?;
        added.push(address);
    }
    Ok(())
}

/// The card's addresses, if the command line has any.
fn parse(command_line: &str) -> io::Result<Option<Vec<Address>>> {
    let mut words = command_line.split_ascii_whitespace();
    let Some(list) = words.find_map(|word| word.strip_prefix(PARAMETER)) else {
        return Ok(None);
    };
    let one = |text: &str| {
        let (address, rest) = text.split_once('/')?;
        let (prefix, gateway) = rest.split_once('@')?;
        Some(Address {
            address: address.parse().ok()?,
            prefix: prefix.parse().ok()?,
            gateway: gateway.parse().ok()?,
        })
    };
    let addresses: Option<Vec<_>> = list.split(',').map(one).collect();
    let unclear = || io::Error::other(format!("\"{PARAMETER}{list}\" is no list of addresses"));
    addresses.map(Some).ok_or_else(unclear)
}

fn family(address: IpAddr) -> u8 {
    let family = match address {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    // Both are small.
    family.as_raw() as u8
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// An rtnetlink message that is being written.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        // struct nlmsghdr: length, kind, flags, sequence number, port.
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(body);
        Self(bytes)
    }

    /// Appends a struct rtattr, and what fills it up to a multiple of four bytes.
    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

/// A socket to the kernel's network configuration.
struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // Protocol 0 of this family is NETLINK_ROUTE.
            None,
        )?;
        Ok(Self(socket))
    }

    fn bring_up(&self, index: u32) -> io::Result<()> {
        // struct ifinfomsg: family, pad, type, index, flags, change mask.
        let mut body = vec![0; 4];
        body.extend_from_slice(&index.to_ne_bytes());
        body.extend_from_slice(&IFF_UP.to_ne_bytes());
        body.extend_from_slice(&IFF_UP.to_ne_bytes());
        self.ask(Message::new(RTM_NEWLINK, 0, &body))
    }

    fn set_link_address(&self, index: u32, address: [u8; 6]) -> io::Result<()> {
        // struct ifinfomsg: family, pad, type, index, flags, change mask.
        let mut body = vec![0; 4];
        body.extend_from_slice(&index.to_ne_bytes());
        body.extend_from_slice(&[0; 8]);
        self.ask(Message::new(RTM_NEWLINK, 0, &body).attribute(IFLA_ADDRESS, &address))
    }

    fn add_address(&self, index: u32, address: (IpAddr, u8)) -> io::Result<()> {
        self.change_address(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, index, address)
    }

    fn change_address(
        &self,
        kind: u16,
        flags: u16,
        index: u32,
        (address, prefix): (IpAddr, u8),
    ) -> io::Result<()> {
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        let mut body = vec![family(address), prefix, IFA_F_NODAD, 0];
        body.extend_from_slice(&index.to_ne_bytes());
        let octets = octets(address);
        self.ask(
            Message::new(kind, flags, &body)
                .attribute(IFA_LOCAL, &octets)
                .attribute(IFA_ADDRESS, &octets),
        )
    }

    fn add_default_route(&self, index: u32, gateway: IpAddr) -> io::Result<()> {
        // struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type, flags.
        let mut body = vec![family(gateway), 0, 0, 0];
        body.extend_from_slice(&[RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST]);
        body.extend_from_slice(&[0; 4]);
        self.ask(
            Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &body)
                .attribute(RTA_GATEWAY, &octets(gateway))
                .attribute(RTA_OIF, &index.to_ne_bytes()),
        )
    }

    /// Sends a message and waits for the kernel's answer.
    fn ask(&self, message: Message) -> io::Result<()> {
        rustix::net::send(&self.0, &message.finish(), SendFlags::empty())?;
        let mut answer = [0u8; 256];
        let (length, _) = rustix::net::recv(&self.0, &mut answer, RecvFlags::empty())?;
        let answer = answer.get(..length).unwrap_or_default();
        let kind = answer
            .get(4..6)
            .and_then(|bytes| bytes.try_into().ok())
            .map(u16::from_ne_bytes);
        let code = answer
            .get(16..20)
            .and_then(|bytes| bytes.try_into().ok())
            .map(i32::from_ne_bytes);
        match (kind, code) {
            (Some(NLMSG_ERROR), Some(0)) => Ok(()),
            (Some(NLMSG_ERROR), Some(code)) => {
                Err(io::Error::from_raw_os_error(code.saturating_neg()))
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_names_addresses() {
        assert_eq!(parse("quiet panic=-1").unwrap(), None);
        let line = "quiet skerry.network=10.0.2.15/24@10.0.2.2,fd00::f/64@fd00::2 panic=-1\n";
        let addresses = parse(line).unwrap().unwrap();
        assert_eq!(addresses.len(), 2);
        assert_eq!(
            addresses[0],
            Address {
                address: "10.0.2.15".parse().unwrap(),
                prefix: 24,
                gateway: "10.0.2.2".parse().unwrap(),
            }
        );
        assert_eq!(addresses[1].prefix, 64);
        for bad in [
            "",
            "10.0.2.15",
            "10.0.2.15/24",
            "a/24@b",
            "10.0.2.15/x@10.0.2.2",
        ] {
            assert!(parse(&format!("skerry.network={bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn messages_know_their_length() {
        let message = Message::new(RTM_NEWADDR, 0, &[1, 2, 3, 4]).attribute(2, &[9; 4]);
        let bytes = message.finish();
        assert_eq!(bytes.len(), 16 + 4 + 8);
        assert_eq!(bytes[..4], 28_u32.to_ne_bytes());
        assert_eq!(bytes[20..24], [8, 0, 2, 0]);
        // Six bytes of a link address take eight.
        let bytes = Message::new(RTM_NEWLINK, 0, &[])
            .attribute(1, &[9; 6])
            .finish();
        assert_eq!(bytes.len(), 16 + 4 + 8);
        assert_eq!(bytes[16..20], [10, 0, 1, 0]);
    }
}
