//! Packets, as far as this crate looks into them: IPv4, IPv6, and the headers behind (RFC 791, 8200,
//! 768, 9293, 792, 4443).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub(crate) const ETHERNET_LEN: usize = 14;
pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const ARP: u16 = 0x0806;
pub(crate) const IPV6: u16 = 0x86dd;
pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;
pub(crate) const IPV4_LEN: usize = 20;
pub(crate) const IPV6_LEN: usize = 40;
pub(crate) const UDP_LEN: usize = 8;
const TCP_LEN: usize = 20;
const HOP_LIMIT: u8 = 64;

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(pair.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(four.try_into().ok()?))
}

/// An Ethernet frame.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame<'a> {
    pub(crate) source: [u8; 6],
    pub(crate) kind: u16,
    pub(crate) body: &'a [u8],
}

impl<'a> Frame<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        Some(Self {
            source: bytes.get(6..12)?.try_into().ok()?,
            kind: u16_at(bytes, 12)?,
            body: bytes.get(ETHERNET_LEN..)?,
        })
    }
}

/// An IP packet that is whole.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packet<'a> {
    pub(crate) source: IpAddr,
    pub(crate) target: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) payload: &'a [u8],
    /// All of it.
    pub(crate) bytes: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Packets in fragments are none yet; of IPv6 extension headers nothing is known.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::parse_v4(bytes),
            6 => Self::parse_v6(bytes),
            _ => None,
        }
    }

    fn parse_v4(bytes: &'a [u8]) -> Option<Self> {
        let header = usize::from(bytes.first()? & 15) * 4;
        let total = usize::from(u16_at(bytes, 2)?);
        let fragment = u16_at(bytes, 6)? & 0x3fff != 0;
        if header < IPV4_LEN || total < header || fragment {
            return None;
        }
        let address = |at: usize| Some(Ipv4Addr::from(u32_at(bytes, at)?).into());
        let (source, target) = (address(12)?, address(16)?);
        let protocol = *bytes.get(9)?;
        let bytes = bytes.get(..total)?;
        Some(Self {
            source,
            target,
            protocol,
            payload: bytes.get(header..)?,
            bytes,
        })
    }

    fn parse_v6(bytes: &'a [u8]) -> Option<Self> {
        let total = IPV6_LEN + usize::from(u16_at(bytes, 4)?);
        let address = |at: usize| {
            let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
            Some(Ipv6Addr::from(octets).into())
        };
        let (source, target) = (address(8)?, address(24)?);
        let protocol = *bytes.get(6)?;
        let bytes = bytes.get(..total)?;
        Some(Self {
            source,
            target,
            protocol,
            payload: bytes.get(IPV6_LEN..)?,
            bytes,
        })
    }

    /// The ends of a TCP or UDP packet.
    pub(crate) fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        let (from, to) = (u16_at(self.payload, 0)?, u16_at(self.payload, 2)?);
        Some((
            SocketAddr::new(self.source, from),
            SocketAddr::new(self.target, to),
        ))
    }

    /// Whether it is of neighbour or router discovery (RFC 4861, 4).
    pub(crate) fn is_discovery(&self) -> bool {
        let kind = self.payload.first();
        self.protocol == ICMPV6 && kind.is_some_and(|kind| (133..=137).contains(kind))
    }

    /// What a UDP packet carries.
    pub(crate) fn datagram(&self) -> Option<&'a [u8]> {
        let len = usize::from(u16_at(self.payload, 4)?);
        self.payload.get(UDP_LEN..len)
    }

    /// The flags of a TCP segment whose header is whole.
    pub(crate) fn tcp_flags(&self) -> Option<u8> {
        let header = usize::from(*self.payload.get(12)? >> 4) * 4;
        (header >= TCP_LEN && header <= self.payload.len()).then_some(())?;
        self.payload.get(13).copied()
    }
}

/// Bytes of the IP header in the family of `address`.
pub(crate) const fn ip_len(address: IpAddr) -> usize {
    match address {
        IpAddr::V4(_) => IPV4_LEN,
        IpAddr::V6(_) => IPV6_LEN,
    }
}

/// The sum of RFC 1071, folded, not complemented.
pub(crate) fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum: u64 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u64::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum of a pseudo-header.
pub(crate) fn pseudo_sum(source: IpAddr, target: IpAddr, protocol: u8, len: usize) -> u16 {
    let rest = [
        &u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes()[..],
        &[0, protocol],
    ]
    .concat();
    match (source, target) {
        (IpAddr::V4(source), IpAddr::V4(target)) => {
            sum(&[&source.octets(), &target.octets(), &rest])
        }
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            sum(&[&source.octets(), &target.octets(), &rest])
        }
        // Packets of two families don't exist.
        _ => 0,
    }
}

/// Writes an IP header into the start of `packet`, for the rest of it.
pub(crate) fn write_ip(packet: &mut [u8], source: IpAddr, target: IpAddr, protocol: u8) {
    let total = packet.len();
    match (source, target) {
        (IpAddr::V4(source), IpAddr::V4(target)) if total >= IPV4_LEN => {
            let total = u16::try_from(total).unwrap_or(u16::MAX);
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&total.to_be_bytes());
            // It may not be fragmented.
            packet[6] = 0x40;
            packet[8] = HOP_LIMIT;
            packet[9] = protocol;
            packet[12..16].copy_from_slice(&source.octets());
            packet[16..20].copy_from_slice(&target.octets());
            let checksum = !sum(&[&packet[..IPV4_LEN]]);
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(target)) if total >= IPV6_LEN => {
            let payload = u16::try_from(total - IPV6_LEN).unwrap_or(u16::MAX);
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&payload.to_be_bytes());
            packet[6] = protocol;
            // Neighbour discovery asks for the highest (RFC 4861, 7.1).
            packet[7] = if protocol == ICMPV6 { 255 } else { HOP_LIMIT };
            packet[8..24].copy_from_slice(&source.octets());
            packet[24..40].copy_from_slice(&target.octets());
        }
        _ => {}
    }
}

/// The payload of an ICMP packet of this family with its checksum: `kind`, code, four bytes, and what
/// follows.
pub(crate) fn icmp(
    (source, target): (IpAddr, IpAddr),
    (kind, code): (u8, u8),
    rest: [u8; 4],
    body: &[u8],
) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend(rest);
    message.extend(body);
    let pseudo = match source {
        IpAddr::V4(_) => 0,
        IpAddr::V6(_) => pseudo_sum(source, target, ICMPV6, message.len()),
    };
    let checksum = !sum(&[&pseudo.to_be_bytes(), &message]);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    message
}

/// The TCP header that resets the connection of a segment (RFC 9293, 3.5.2); none for a reset.
pub(crate) fn reset_for(packet: &Packet<'_>) -> Option<Vec<u8>> {
    let flags = packet.tcp_flags()?;
    if flags & RST != 0 {
        return None;
    }
    let segment = packet.payload;
    let header = usize::from(*segment.get(12)? >> 4) * 4;
    let (sequence, flags) = if flags & ACK != 0 {
        (u32_at(segment, 8)?, (RST, 0))
    } else {
        let ends = u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        let len = u32::try_from(segment.len() - header).ok()?;
        let next = u32_at(segment, 4)?.wrapping_add(len).wrapping_add(ends);
        (0, (RST | ACK, next))
    };
    let ports = (u16_at(segment, 2)?, u16_at(segment, 0)?);
    Some(tcp_header(ports, sequence, flags))
}

/// A TCP header without a checksum: from and to port, sequence number, flags and acknowledgement.
pub(crate) fn tcp_header(
    (from, to): (u16, u16),
    sequence: u32,
    (flags, ack): (u8, u32),
) -> Vec<u8> {
    let mut header = Vec::with_capacity(TCP_LEN);
    header.extend(from.to_be_bytes());
    header.extend(to.to_be_bytes());
    header.extend(sequence.to_be_bytes());
    header.extend(ack.to_be_bytes());
    header.extend([(TCP_LEN as u8 / 4) << 4, flags]);
    header.extend([0; 6]);
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn addresses(v6: bool) -> (IpAddr, IpAddr) {
        match v6 {
            false => ("10.0.2.15".parse().unwrap(), "8.8.4.4".parse().unwrap()),
            true => ("fd00::1".parse().unwrap(), "2001:db8::2".parse().unwrap()),
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..120), version in 0_u8..16) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = version << 4 | *first & 15;
            }
            let _ = Frame::parse(&bytes);
            if let Some(packet) = Packet::parse(&bytes) {
                prop_assert!(packet.bytes.len() <= bytes.len());
                let _ = (packet.ends(), packet.datagram(), packet.tcp_flags(), reset_for(&packet));
            }
        }

        #[test]
        fn packets_survive_the_wire(
            v6 in any::<bool>(), protocol in any::<u8>(), body in prop::collection::vec(any::<u8>(), 0..99),
        ) {
            let (source, target) = addresses(v6);
            let mut bytes = vec![0; ip_len(source)];
            bytes.extend(&body);
            write_ip(&mut bytes, source, target, protocol);
            bytes.extend([0; 7]);
            let packet = Packet::parse(&bytes).unwrap();
            prop_assert_eq!((packet.source, packet.target), (source, target));
            prop_assert_eq!((packet.protocol, packet.payload), (protocol, &body[..]));
            if !v6 {
                prop_assert_eq!(sum(&[&bytes[..20]]), 0xffff);
            }
        }

        #[test]
        fn resets_fit_what_they_reset(sequence in any::<u32>(), ack in any::<u32>(), flags in 0_u8..64) {
            let (source, target) = addresses(false);
            let segment = [tcp_header((1, 2), sequence, (flags, ack)), vec![7; 5]].concat();
            let mut bytes = [vec![0; 20], segment].concat();
            write_ip(&mut bytes, source, target, TCP);
            let packet = Packet::parse(&bytes).unwrap();
            let reset = reset_for(&packet);
            prop_assert_eq!(reset.is_none(), flags & RST != 0);
            if let Some(reset) = reset {
                prop_assert_eq!(&reset[..4], &[0, 2, 0, 1]);
                if flags & ACK != 0 {
                    prop_assert_eq!(u32_at(&reset, 4), Some(ack));
                } else {
                    let ends = u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
                    prop_assert_eq!(u32_at(&reset, 8), Some(sequence.wrapping_add(5 + ends)));
                }
            }
        }
    }

    #[test]
    fn icmp_checksums_add_up() {
        for v6 in [false, true] {
            let (source, target) = addresses(v6);
            let message = icmp((source, target), (8, 0), [0, 1, 0, 2], b"hello");
            let pseudo = if v6 {
                pseudo_sum(source, target, ICMPV6, message.len())
            } else {
                0
            };
            assert_eq!(sum(&[&pseudo.to_be_bytes(), &message]), 0xffff);
        }
    }
}
