//! Packets that are longer than the card's, both ways.

use std::collections::BTreeMap;

use skerry_net::{Lease, Segment, Subnets};

use super::*;

const MTU: u16 = 1500;

fn guest(options: &Options) -> Guest {
    Guest::with_packets(options, Vec::new(), MTU)
}

fn noise(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8)
        .collect()
}

/// The sum of RFC 1071.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u64;
    for pair in parts.concat().chunks(2) {
        sum += u64::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or(0),
        ]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

impl Guest {
    /// Sends a datagram in as many fragments as it takes, the last one first.
    fn send_udp_in_parts(&mut self, id: u16, from: (Ipv4Addr, u16), to: SocketAddr, data: &[u8]) {
        let IpAddr::V4(address) = to.ip() else {
            panic!("IPv4 only");
        };
        let mut payload = from.1.to_be_bytes().to_vec();
        payload.extend(to.port().to_be_bytes());
        payload.extend((8 + data.len() as u16).to_be_bytes());
        payload.extend([0, 0]);
        payload.extend(data);
        let step = usize::from(MTU - 20) / 8 * 8;
        for (number, part) in payload
            .chunks(step)
            .enumerate()
            .collect::<Vec<_>>()
            .iter()
            .rev()
        {
            let more = if (number + 1) * step < payload.len() {
                0x2000
            } else {
                0
            };
            let place = (number * step / 8) as u16 | more;
            let mut frame = [&address::GATEWAY_MAC[..], &address::GUEST_MAC, &[8, 0]].concat();
            frame.extend([0x45, 0]);
            frame.extend((20 + part.len() as u16).to_be_bytes());
            frame.extend(id.to_be_bytes());
            frame.extend(place.to_be_bytes());
            frame.extend([64, 17, 0, 0]);
            frame.extend(from.0.octets());
            frame.extend(address.octets());
            frame.extend(*part);
            self.send(&frame);
        }
    }

    /// Puts the next datagram together from its fragments, whose checksums are right.
    #[track_caller]
    fn receive_udp_in_parts(&mut self) -> (u16, u16, Vec<u8>) {
        let (mut parts, mut total) = (BTreeMap::new(), None);
        loop {
            let frame = self.receive();
            let packet = &frame[14..];
            assert!(packet.len() <= usize::from(MTU), "{}", packet.len());
            assert_eq!(sum(&[&packet[..20]]), 0xffff);
            let place = u16::from_be_bytes([packet[6], packet[7]]);
            let offset = usize::from(place & 0x1fff) * 8;
            let body = packet[20..].to_vec();
            if place & 0x2000 == 0 {
                total = Some(offset + body.len());
            }
            parts.insert(offset, body);
            let whole: Vec<u8> = parts.values().flatten().copied().collect();
            if total == Some(whole.len()) {
                let len = (whole.len() as u32).to_be_bytes();
                if parts.len() > 1 {
                    assert_eq!(sum(&[&packet[12..20], &[0, 17], &len, &whole]), 0xffff);
                }
                let port = |at: usize| u16::from_be_bytes([whole[at], whole[at + 1]]);
                return (port(0), port(2), whole[8..].to_vec());
            }
        }
    }
}

#[test]
fn long_datagrams_go_out_and_come_back() {
    let echo = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let port = echo.local_addr().expect("address").port();
    let mut guest = guest(&Options {
        mode: NetworkMode::Full,
        ..Options::default()
    });
    let to = SocketAddr::new(GATEWAY.into(), port);
    for (id, len) in [(1, 1472), (2, 1473), (3, 8 << 10), (4, 60 << 10)] {
        let data = noise(len);
        guest.send_udp_in_parts(id, (GUEST, 5000), to, &data);
        let mut buffer = vec![0; 65_536];
        let (got, from) = echo.recv_from(&mut buffer).expect("receive");
        assert!(buffer[..got] == data, "{len}");
        echo.send_to(&buffer[..got], from).expect("send");
        assert!(guest.receive_udp_in_parts() == (port, 5000, data), "{len}");
    }
    assert_eq!(guest.network.counters().reassembled, 3);
    assert_eq!(guest.network.counters().dropped, 0);
}

#[test]
fn long_datagrams_reach_published_ports_and_are_answered() {
    let mut guest = guest(&Options {
        publish: vec!["127.0.0.1::53/udp".parse().expect("a mapping")],
        ..Options::default()
    });
    let host = guest.network.published()[0].host;
    let client = UdpSocket::bind("127.0.0.1:0").expect("bind");
    client.connect(host).expect("connect");
    for len in [100, 8 << 10, 60 << 10] {
        let data = noise(len);
        client.send(&data).expect("send");
        let (from, to, got) = guest.receive_udp_in_parts();
        assert!((to, &got) == (53, &data), "{len}");
        let there = SocketAddr::new(GATEWAY.into(), from);
        guest.send_udp_in_parts(9, (GUEST, 53), there, &got);
        let mut buffer = vec![0; 65_536];
        let got = client.recv(&mut buffer).expect("receive");
        assert!(buffer[..got] == data, "{len}");
    }
}

#[test]
fn neighbours_with_shorter_packets_get_them_in_parts() {
    let folder = tempfile::tempdir().expect("a folder");
    let subnets = Subnets {
        v4: "10.89.5.0/24".parse().expect("a subnet"),
        v6: None,
        gateway: Ipv4Addr::new(10, 89, 5, 1),
    };
    let join = |mtu: u16| {
        let lease = Lease::take(folder.path(), subnets, &[])
            .expect("leases")
            .expect("free");
        let address = lease.address();
        let segment = Segment::open("lab", subnets, lease).expect("a segment");
        (
            Guest::with_packets(&Options::default(), vec![segment], mtu),
            address,
        )
    };
    let (mut one, first) = join(MTU);
    let (mut two, second) = join(MTU);
    let data = noise(8 << 10);
    one.send_udp_in_parts(1, (first, 7), SocketAddr::new(second.into(), 9), &data);
    assert!(two.receive_udp_in_parts() == (7, 9, data));
    assert_eq!(two.network.counters().from_neighbours, 1);
}

#[test]
fn what_never_comes_is_not_waited_for_without_end() {
    let mut guest = guest(&Options {
        mode: NetworkMode::Full,
        ..Options::default()
    });
    let to = SocketAddr::new(GATEWAY.into(), 9);
    for id in 0..2000 {
        // The first, and never the rest.
        let mut frame = [&address::GATEWAY_MAC[..], &address::GUEST_MAC, &[8, 0]].concat();
        frame.extend([0x45, 0, 5, 220]);
        frame.extend(u16::to_be_bytes(id));
        frame.extend([0x20, 0, 64, 17, 0, 0]);
        frame.extend(GUEST.octets());
        frame.extend(GATEWAY.octets());
        frame.resize(14 + 1500, 7);
        guest.send(&frame);
    }
    // Others pass all the same.
    guest.send_udp_in_parts(5000, (GUEST, 5000), to, &noise(4000));
    eventually(|| {
        let counters = guest.network.counters();
        counters.reassembled == 1 && counters.dropped >= 2000 - 64
    });
}

fn eventually(holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "it never came to hold");
        std::thread::sleep(Duration::from_millis(5));
    }
}
