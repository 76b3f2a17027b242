//! The way to the guest: IP packets become frames with their checksums left to whom it costs nothing.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};

use skerry_devices::virtio::net::{Checksum, HEADER_LEN, NetPort};

use crate::address::GATEWAY_MAC;
use crate::fragments;
use crate::wire::{self, ETHERNET_LEN, Packet};

/// Bytes of a packet that an ICMP error quotes: headers and what they begin.
const QUOTED: usize = 96;

/// Why a packet goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unreachable {
    Host,
    Port,
    Prohibited,
}

pub(crate) struct Outlet {
    port: NetPort,
    /// Where the guest's last frame came from.
    pub(crate) guest: [u8; 6],
    frames: Cell<u64>,
    bytes: Cell<u64>,
    /// What fragments of the next packet have in common.
    fragmented: Cell<u32>,
}

impl Outlet {
    pub(crate) fn new(port: NetPort, guest: [u8; 6]) -> Self {
        Self {
            port,
            guest,
            frames: Cell::new(0),
            bytes: Cell::new(0),
            fragmented: Cell::new(0),
        }
    }

    pub(crate) const fn port(&self) -> &NetPort {
        &self.port
    }

    pub(crate) fn frames(&self) -> u64 {
        self.frames.get()
    }

    /// Bytes of the frames.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    pub(crate) fn has_room(&self) -> bool {
        self.port.has_room()
    }

    fn send(&self, mut buffer: Vec<u8>, kind: u16, checksum: Option<Checksum>) {
        if let Some(header) = buffer.get_mut(HEADER_LEN..HEADER_LEN + ETHERNET_LEN) {
            header[..6].copy_from_slice(&self.guest);
            header[6..12].copy_from_slice(&GATEWAY_MAC);
            header[12..].copy_from_slice(&kind.to_be_bytes());
        }
        let length = buffer.len().saturating_sub(HEADER_LEN) as u64;
        self.frames.set(self.frames.get() + 1);
        self.bytes.set(self.bytes.get() + length);
        self.port.push(buffer, checksum);
    }

    /// Sends a frame as it is.
    pub(crate) fn frame(&self, kind: u16, body: &[u8]) {
        let mut buffer = self.port.buffer(ETHERNET_LEN + body.len());
        buffer[HEADER_LEN + ETHERNET_LEN..].copy_from_slice(body);
        self.send(buffer, kind, None);
    }

    /// Sends a packet of `len` bytes that `write` writes, with the checksum of its TCP or UDP left empty.
    pub(crate) fn packet<R>(&self, len: usize, write: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut buffer = self.port.buffer(ETHERNET_LEN + len);
        let packet = &mut buffer[HEADER_LEN + ETHERNET_LEN..];
        let result = write(packet);
        if len > usize::from(self.port.mtu()) && self.in_fragments(packet) {
            return result;
        }
        let checksum = leave_checksum(packet);
        let kind = match packet.first().map(|first| first >> 4) {
            Some(6) => wire::IPV6,
            _ => wire::IPV4,
        };
        self.send(buffer, kind, checksum);
        result
    }

    /// Sends a packet that is longer than the guest's card takes in fragments. `false`: it is TCP's, whose
    /// ends agree on a length.
    fn in_fragments(&self, packet: &mut [u8]) -> bool {
        let Some(checksum) = leave_checksum(packet) else {
            let whole = Packet::parse(packet);
            return whole.is_some_and(|whole| {
                self.send_fragments(whole.bytes);
                true
            });
        };
        if Packet::parse(packet).is_none_or(|whole| whole.protocol != wire::UDP) {
            return false;
        }
        // Nobody completes a checksum over several packets.
        let covered = usize::from(checksum.start) - ETHERNET_LEN;
        let field = covered + usize::from(checksum.offset);
        let sum = match !wire::sum(&[packet.get(covered..).unwrap_or_default()]) {
            0 => u16::MAX,
            sum => sum,
        };
        if let Some(field) = packet.get_mut(field..field + 2) {
            field.copy_from_slice(&sum.to_be_bytes());
        }
        self.send_fragments(packet);
        true
    }

    fn send_fragments(&self, packet: &[u8]) {
        let id = self.fragmented.get().wrapping_add(1);
        self.fragmented.set(id);
        let v6 = packet.first().is_some_and(|first| first >> 4 == 6);
        let kind = if v6 { wire::IPV6 } else { wire::IPV4 };
        let mtu = usize::from(self.port.mtu());
        fragments::split(packet, mtu, id, |part| self.frame(kind, part));
    }

    /// Sends `parts` as a packet's payload.
    pub(crate) fn ip(&self, (source, target): (IpAddr, IpAddr), protocol: u8, parts: &[&[u8]]) {
        let header = wire::ip_len(source);
        let len = header + parts.iter().map(|part| part.len()).sum::<usize>();
        self.packet(len, |packet| {
            wire::write_ip(packet, source, target, protocol);
            let mut at = header;
            for part in parts {
                packet[at..at + part.len()].copy_from_slice(part);
                at += part.len();
            }
        });
    }

    pub(crate) fn udp(&self, source: SocketAddr, target: SocketAddr, data: &[u8]) {
        let Ok(len) = u16::try_from(wire::UDP_LEN + data.len()) else {
            return;
        };
        let mut header = [0; wire::UDP_LEN];
        header[..2].copy_from_slice(&source.port().to_be_bytes());
        header[2..4].copy_from_slice(&target.port().to_be_bytes());
        header[4..6].copy_from_slice(&len.to_be_bytes());
        self.ip((source.ip(), target.ip()), wire::UDP, &[&header, data]);
    }

    /// Tells the guest that a packet of its went nowhere (RFC 792, 4443).
    pub(crate) fn unreachable(&self, packet: &Packet<'_>, why: Unreachable) {
        let from = crate::address::gateway(packet.target);
        let quoted = &packet.bytes[..packet.bytes.len().min(QUOTED)];
        let (protocol, kind) = match (packet.target, why) {
            (IpAddr::V4(_), Unreachable::Host) => (wire::ICMP, (3, 1)),
            (IpAddr::V4(_), Unreachable::Port) => (wire::ICMP, (3, 3)),
            (IpAddr::V4(_), Unreachable::Prohibited) => (wire::ICMP, (3, 13)),
            (IpAddr::V6(_), Unreachable::Host) => (wire::ICMPV6, (1, 3)),
            (IpAddr::V6(_), Unreachable::Port) => (wire::ICMPV6, (1, 4)),
            (IpAddr::V6(_), Unreachable::Prohibited) => (wire::ICMPV6, (1, 1)),
        };
        let ends = (from, packet.source);
        self.ip(ends, protocol, &[&wire::icmp(ends, kind, [0; 4], quoted)]);
    }

    /// Tells the guest why a connection isn't made. Kernels only note the reason if it comes while the
    /// process is still in its call; the reset behind it is what they wait for.
    pub(crate) fn refuse(&self, packet: &Packet<'_>, why: Unreachable) {
        self.unreachable(packet, why);
        self.reset(packet);
    }

    /// Resets the connection of a segment of the guest's.
    pub(crate) fn reset(&self, packet: &Packet<'_>) {
        if let Some(header) = wire::reset_for(packet) {
            self.ip((packet.target, packet.source), wire::TCP, &[&header]);
        }
    }
}

/// Puts the pseudo-header's sum into the place of a TCP or UDP checksum, and says where it is.
fn leave_checksum(packet: &mut [u8]) -> Option<Checksum> {
    let (source, target, protocol, start, len) = {
        let parsed = Packet::parse(packet)?;
        let len = parsed.payload.len();
        let start = parsed.bytes.len() - len;
        (parsed.source, parsed.target, parsed.protocol, start, len)
    };
    let offset: u16 = match protocol {
        wire::TCP => 16,
        wire::UDP => 6,
        _ => return None,
    };
    let field = start + usize::from(offset);
    let sum = wire::pseudo_sum(source, target, protocol, len);
    packet
        .get_mut(field..field + 2)?
        .copy_from_slice(&sum.to_be_bytes());
    Some(Checksum {
        start: u16::try_from(ETHERNET_LEN + start).ok()?,
        offset,
    })
}
