//! What the gateway answers itself: who has an address (RFC 826, 4861), and echo requests to it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::address::{GATEWAY_MAC, Place, place};
use crate::outlet::Outlet;
use crate::wire::{self, Packet};

const ARP_LEN: usize = 28;
const ARP_REQUEST: [u8; 2] = [0, 1];
const ECHO: u8 = 8;
const ECHO_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// A router that was asked, and overrides what was known.
const ADVERTISEMENT_FLAGS: u8 = 0xe0;
const TARGET_LINK_ADDRESS: u8 = 2;

/// Answers a request for the gateway's or the name server's link address, or for that of an address
/// that is `shared` with other machines: the gateway takes what is sent there.
pub(crate) fn arp(request: &[u8], outlet: &Outlet, shared: impl Fn(IpAddr) -> bool) {
    let Some(request) = request.get(..ARP_LEN) else {
        return;
    };
    let ethernet_ipv4 = [0, 1, 8, 0, 6, 4];
    let target = Ipv4Addr::new(request[24], request[25], request[26], request[27]);
    // Who looks for others with its own address has none yet (RFC 5227, 2.1).
    let has_address = request[14..18] != [0; 4];
    let ours = matches!(place(target.into()), Place::Gateway | Place::Dns)
        || has_address && shared(target.into());
    if request[..6] != ethernet_ipv4 || request[6..8] != ARP_REQUEST || !ours {
        return;
    }
    let mut answer = ethernet_ipv4.to_vec();
    answer.extend([0, 2]);
    answer.extend(GATEWAY_MAC);
    answer.extend(target.octets());
    answer.extend(&request[8..18]);
    outlet.frame(wire::ARP, &answer);
}

/// Answers an ICMP packet that concerns the gateway alone: echoes of addresses that are `here`, and who has
/// those or ones that are `shared` with other machines. `false`: it goes further.
pub(crate) fn icmp(
    packet: &Packet<'_>,
    outlet: &Outlet,
    here: impl Fn(IpAddr) -> bool,
    shared: impl Fn(IpAddr) -> bool,
) -> bool {
    let Some((&kind, rest)) = packet.payload.split_first() else {
        return true;
    };
    let v6 = packet.target.is_ipv6();
    match (v6, kind) {
        (true, NEIGHBOUR_SOLICITATION) => {
            neighbour(packet, outlet, |address| here(address) || shared(address));
        }
        (false, ECHO) | (true, ECHO_V6) => {
            if !here(packet.target) {
                return false;
            }
            let Some((four, data)) = rest.get(3..).and_then(|rest| rest.split_first_chunk()) else {
                return true;
            };
            let ends = (packet.target, packet.source);
            let reply = if v6 { ECHO_REPLY_V6 } else { 0 };
            let message = wire::icmp(ends, (reply, 0), *four, data);
            outlet.ip(ends, packet.protocol, &[&message]);
        }
        _ => {}
    }
    true
}

fn neighbour(packet: &Packet<'_>, outlet: &Outlet, ours: impl Fn(IpAddr) -> bool) {
    let octets = packet
        .payload
        .get(8..24)
        .and_then(|bytes| bytes.try_into().ok());
    let Some(target) = octets.map(|octets: [u8; 16]| Ipv6Addr::from(octets)) else {
        return;
    };
    // A look for others with the address has no sender to answer to.
    let from_nobody = matches!(packet.source, IpAddr::V6(source) if source.is_unspecified());
    if from_nobody || !ours(target.into()) {
        return;
    }
    let ends = (target.into(), packet.source);
    let mut body = target.octets().to_vec();
    body.extend([TARGET_LINK_ADDRESS, 1]);
    body.extend(GATEWAY_MAC);
    let flags = [ADVERTISEMENT_FLAGS, 0, 0, 0];
    let message = wire::icmp(ends, (NEIGHBOUR_ADVERTISEMENT, 0), flags, &body);
    outlet.ip(ends, wire::ICMPV6, &[&message]);
}
