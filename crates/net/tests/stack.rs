//! A guest that is a few lines: what its frames are answered with.

#[path = "stack/fragments.rs"]
mod fragments;
#[path = "stack/many.rs"]
mod many;
#[path = "stack/segments.rs"]
mod segments;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use skerry_devices::virtio::QueueRunner;
use skerry_devices::virtio::net::{NetConfig, NetDevice};
use skerry_devices::virtio::testing::{Buffer, FakeGuest};
use skerry_net::{Network, NetworkMode, Options, address};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const HEADER: usize = 12;
const GUEST: Ipv4Addr = address::GUEST_V4;
const GATEWAY: Ipv4Addr = address::GATEWAY_V4;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const FIN: u8 = 1;

struct Guest {
    card: FakeGuest,
    network: Arc<Network>,
    /// What the device may write into, by head.
    buffers: Vec<(u16, Buffer)>,
    /// Frames that the device has not given back.
    sent: usize,
    /// Frames that came while it could not send.
    taken: VecDeque<Vec<u8>>,
}

impl Guest {
    fn new(options: &Options) -> Self {
        Self::with(options, Vec::new())
    }

    fn with(options: &Options, segments: Vec<skerry_net::Segment>) -> Self {
        Self::with_packets(options, segments, address::MTU)
    }

    /// One whose packets are of so many bytes at most.
    fn with_packets(options: &Options, segments: Vec<skerry_net::Segment>, mtu: u16) -> Self {
        let network = Network::new(options, segments).expect("a network");
        let card = NetConfig {
            mtu,
            ..address::CARD
        };
        let device = NetDevice::new(card, network.clone());
        let mut card = FakeGuest::start(device, u64::MAX, QueueRunner::Inline);
        let mut buffers = Vec::new();
        for _ in 0..64 {
            let buffer = card.buffer(70_000, true);
            buffers.push((card.add(RECEIVE, &[buffer]), buffer));
        }
        card.kick(RECEIVE);
        Self {
            card,
            network,
            buffers,
            sent: 0,
            taken: VecDeque::new(),
        }
    }

    fn in_mode(mode: NetworkMode) -> Self {
        Self::new(&Options {
            mode,
            ..Options::default()
        })
    }

    fn send(&mut self, frame: &[u8]) {
        // As a driver does, it waits while its ring is full; what comes meanwhile is taken nevertheless, or
        // the other side would have no room for answers, and take nothing either.
        loop {
            while self.card.used(TRANSMIT).is_some() {
                self.sent -= 1;
            }
            if self.sent < 128 {
                break;
            }
            while let Some(frame) = self.take() {
                self.taken.push_back(frame);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        self.sent += 1;
        let bytes = [&[0; HEADER][..], frame].concat();
        let buffer = self.card.readable(&bytes);
        self.card.add(TRANSMIT, &[buffer]);
        self.card.kick(TRANSMIT);
    }

    /// A frame that has come.
    fn take(&mut self) -> Option<Vec<u8>> {
        let (head, len) = self.card.used(RECEIVE)?;
        let at = self.buffers.iter().position(|(added, _)| *added == head);
        let (_, buffer) = self.buffers.remove(at.expect("a buffer of ours"));
        let bytes = self.card.bytes(buffer)[HEADER..len as usize].to_vec();
        self.buffers
            .push((self.card.add(RECEIVE, &[buffer]), buffer));
        self.card.kick(RECEIVE);
        Some(bytes)
    }

    /// The next frame that comes in time.
    fn receive_in(&mut self, patience: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + patience;
        loop {
            let waiting = self.taken.pop_front();
            if let Some(frame) = waiting.or_else(|| self.take()) {
                return Some(frame);
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    #[track_caller]
    fn receive(&mut self) -> Vec<u8> {
        let frame = self.receive_in(Duration::from_secs(20));
        frame.expect("a frame")
    }

    fn send_ip(&mut self, protocol: u8, to: Ipv4Addr, payload: &[u8]) {
        let total = 20 + payload.len() as u16;
        let mut frame = [&address::GATEWAY_MAC[..], &address::GUEST_MAC, &[8, 0]].concat();
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
        frame.extend(GUEST.octets());
        frame.extend(to.octets());
        frame.extend(payload);
        self.send(&frame);
    }

    fn send_udp(&mut self, from: u16, to: SocketAddr, data: &[u8]) {
        let IpAddr::V4(address) = to.ip() else {
            panic!("IPv4 only");
        };
        let mut payload = Vec::new();
        payload.extend(from.to_be_bytes());
        payload.extend(to.port().to_be_bytes());
        payload.extend((8 + data.len() as u16).to_be_bytes());
        payload.extend([0, 0]);
        payload.extend(data);
        self.send_ip(17, address, &payload);
    }

    fn send_tcp(
        &mut self,
        (from, to): (u16, SocketAddr),
        (seq, ack): (u32, u32),
        flags: u8,
        data: &[u8],
    ) {
        let IpAddr::V4(address) = to.ip() else {
            panic!("IPv4 only");
        };
        let mut payload = Vec::new();
        payload.extend(from.to_be_bytes());
        payload.extend(to.port().to_be_bytes());
        payload.extend(seq.to_be_bytes());
        payload.extend(ack.to_be_bytes());
        payload.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        payload.extend(data);
        self.send_ip(6, address, &payload);
    }

    /// The next TCP segment: sequence number, acknowledgement, flags, data.
    #[track_caller]
    fn receive_tcp(&mut self) -> (u32, u32, u8, Vec<u8>) {
        let frame = self.receive();
        assert_eq!(frame[14 + 9], 6, "{frame:?}");
        let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        let segment = &frame[34..14 + total];
        let number = |at: usize| u32::from_be_bytes(segment[at..at + 4].try_into().expect("four"));
        let header = usize::from(segment[12] >> 4) * 4;
        (
            number(4),
            number(8),
            segment[13],
            segment[header..].to_vec(),
        )
    }

    #[track_caller]
    fn receive_udp(&mut self) -> (u16, u16, Vec<u8>) {
        let frame = self.receive();
        assert_eq!(frame[14 + 9], 17, "{frame:?}");
        let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        let len = usize::from(port(38));
        (port(34), port(36), frame[42..34 + len].to_vec())
    }
}

#[test]
fn the_gateway_tells_its_address_and_nobody_elses() {
    let mut guest = Guest::in_mode(NetworkMode::Public);
    let ask = |target: Ipv4Addr| {
        let mut frame = [&[0xff; 6][..], &address::GUEST_MAC, &[8, 6]].concat();
        frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(address::GUEST_MAC);
        frame.extend(GUEST.octets());
        frame.extend([0; 6]);
        frame.extend(target.octets());
        frame
    };
    for target in [GATEWAY, address::DNS_V4] {
        guest.send(&ask(target));
        let answer = guest.receive();
        assert_eq!(answer[..6], address::GUEST_MAC);
        assert_eq!(answer[20..22], [0, 2]);
        assert_eq!(answer[22..28], address::GATEWAY_MAC);
        assert_eq!(answer[28..32], target.octets());
    }
    guest.send(&ask(GUEST));
    guest.send(&ask(Ipv4Addr::new(10, 0, 2, 77)));
    assert!(guest.receive_in(Duration::from_millis(100)).is_none());
}

#[test]
fn neighbours_and_echoes_are_answered_over_ipv6() {
    let mut guest = Guest::in_mode(NetworkMode::Public);
    let packet = |target: [u8; 16], message: &[u8]| {
        let mut frame = [
            &address::GATEWAY_MAC[..],
            &address::GUEST_MAC,
            &[0x86, 0xdd],
        ]
        .concat();
        frame.extend([0x60, 0, 0, 0, 0, message.len() as u8, 58, 255]);
        frame.extend(address::GUEST_V6.octets());
        frame.extend(target);
        frame.extend(message);
        frame
    };
    let gateway = address::GATEWAY_V6.octets();
    let solicitation = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &gateway].concat();
    let many = "ff02::1:ff00:2"
        .parse::<std::net::Ipv6Addr>()
        .expect("address");
    guest.send(&packet(many.octets(), &solicitation));
    let answer = guest.receive();
    assert_eq!((answer[54], &answer[62..78]), (136, &gateway[..]));
    assert_eq!(answer[80..86], address::GATEWAY_MAC);
    guest.send(&packet(gateway, &[128, 0, 0, 0, 1, 2, 3, 4, 5]));
    let answer = guest.receive();
    assert_eq!(answer[54..56], [129, 0]);
    assert_eq!(answer[58..], [1, 2, 3, 4, 5]);
}

/// A host that listens, a guest, and the ends of a connection from the one to the other.
fn before_a_host() -> (TcpListener, Guest, (u16, SocketAddr)) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let ends = (4000, SocketAddr::new(GATEWAY.into(), port));
    (listener, Guest::in_mode(NetworkMode::Full), ends)
}

#[test]
fn a_connection_from_its_first_packet_to_its_last() {
    let (listener, mut guest, ends) = before_a_host();
    guest.send_tcp(ends, (99, 0), SYN, &[]);
    let (first, ack, flags, _) = guest.receive_tcp();
    assert_eq!((ack, flags), (100, SYN | ACK));
    guest.send_tcp(ends, (100, first + 1), ACK, b"hello");
    let (mut host, _) = listener.accept().expect("accept");
    let mut data = [0; 5];
    host.read_exact(&mut data).expect("read");
    assert_eq!(&data, b"hello");
    assert_eq!(guest.receive_tcp().1, 105);
    // The host ends first; the guest still sends.
    host.write_all(b"bye").expect("write");
    host.shutdown(std::net::Shutdown::Write).expect("shutdown");
    let (mut seen, mut ended) = (Vec::new(), false);
    while !ended {
        let (_, _, flags, data) = guest.receive_tcp();
        seen.extend(data);
        ended = flags & FIN != 0;
    }
    assert_eq!(seen, b"bye");
    guest.send_tcp(ends, (105, first + 5), ACK | FIN, b"more");
    let mut rest = String::new();
    host.read_to_string(&mut rest).expect("read");
    assert_eq!(rest, "more");
    assert_eq!(guest.receive_tcp().1, 110);
    // It is over: what comes now is of no connection.
    guest.send_tcp(ends, (110, first + 5), ACK, &[]);
    let (sequence, _, flags, _) = guest.receive_tcp();
    assert_eq!((sequence, flags), (first + 5, RST));
    assert_eq!(guest.network.counters().tcp_opened, 1);
}

#[test]
fn resets_pass_through() {
    let (listener, mut guest, ends) = before_a_host();
    guest.send_tcp(ends, (0, 0), SYN, &[]);
    let (first, ..) = guest.receive_tcp();
    guest.send_tcp(ends, (1, first + 1), ACK, &[]);
    let (mut host, _) = listener.accept().expect("accept");
    guest.send_tcp(ends, (1, first + 1), RST, &[]);
    let error = host.read(&mut [0]).expect_err("a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    // Nobody listens.
    let nobody = (4000, SocketAddr::new(GATEWAY.into(), 1));
    guest.send_tcp(nobody, (7, 0), SYN, &[]);
    let (_, ack, flags, _) = guest.receive_tcp();
    assert_eq!((ack, flags), (8, RST | ACK));
}

#[test]
fn what_is_denied_is_told_and_counted() {
    let mut guest = Guest::in_mode(NetworkMode::Public);
    for target in [
        GATEWAY,
        Ipv4Addr::new(169, 254, 169, 254),
        Ipv4Addr::new(192, 168, 1, 1),
    ] {
        let to = SocketAddr::new(target.into(), 80);
        guest.send_tcp((4000, to), (7, 0), SYN, &[]);
        let answer = guest.receive();
        assert_eq!((answer[23], &answer[34..36]), (1, &[3, 13][..]), "{target}");
        // Whose packet it was stands in it.
        assert_eq!(answer[42 + 16..42 + 20], target.octets());
        assert_eq!(guest.receive_tcp().2, RST | ACK);
        guest.send_udp(4000, to, b"x");
        assert_eq!(guest.receive()[34..36], [3, 13]);
    }
    let counters = guest.network.counters();
    assert_eq!((counters.denied_tcp, counters.denied_udp), (3, 3));
    assert_eq!((counters.tcp_opened, counters.datagram_flows), (0, 0));
}

#[test]
fn datagrams_come_back() {
    let echo = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let port = echo.local_addr().expect("address").port();
    let mut guest = Guest::in_mode(NetworkMode::Full);
    let to = SocketAddr::new(GATEWAY.into(), port);
    for len in [0, 1, 1400, 60_000] {
        let data = vec![len as u8; len];
        guest.send_udp(5000, to, &data);
        let mut buffer = vec![0; 65_536];
        let (got, from) = echo.recv_from(&mut buffer).expect("receive");
        assert_eq!(&buffer[..got], data);
        echo.send_to(&buffer[..got], from).expect("send");
        assert_eq!(guest.receive_udp(), (port, 5000, data));
    }
    assert_eq!(guest.network.counters().datagram_flows, 1);
    drop(echo);
    guest.send_udp(5000, to, b"gone");
    assert_eq!(guest.receive()[34..36], [3, 3], "port unreachable");
}

#[test]
fn clients_of_published_ports_are_told_apart() {
    let options = Options {
        mode: NetworkMode::Public,
        publish: vec![
            "127.0.0.1::53/udp".parse().expect("a mapping"),
            "127.0.0.1::80".parse().expect("a mapping"),
        ],
        ..Options::default()
    };
    let mut guest = Guest::new(&options);
    let [udp, tcp] = guest.network.published() else {
        panic!("two ports");
    };
    let (udp, tcp) = (udp.host, tcp.host);
    let clients: Vec<_> = (0_u8..3)
        .map(|number| {
            let client = UdpSocket::bind("127.0.0.1:0").expect("bind");
            client.connect(udp).expect("connect");
            client.send(&[number]).expect("send");
            let (from, to, data) = guest.receive_udp();
            assert_eq!((to, data), (53, vec![number]));
            (client, from)
        })
        .collect();
    for (number, (client, port)) in (10_u8..).zip(clients) {
        guest.send_udp(53, SocketAddr::new(GATEWAY.into(), port), &[number]);
        let mut buffer = [0; 8];
        assert_eq!(client.recv(&mut buffer).expect("receive"), 1);
        assert_eq!(buffer[0], number);
    }
    // A guest that refuses takes the connection down with it.
    let mut stream = TcpStream::connect(tcp).expect("connect");
    let frame = guest.receive();
    assert_eq!(frame[47] & (SYN | ACK), SYN);
    let port = u16::from_be_bytes([frame[34], frame[35]]);
    let first = u32::from_be_bytes(frame[38..42].try_into().expect("four"));
    let ends = (80, SocketAddr::new(GATEWAY.into(), port));
    guest.send_tcp(ends, (0, first + 1), RST | ACK, &[]);
    let error = stream.read(&mut [0]).expect_err("a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// A guest that has many half-open connections begins to answer with cookies, and to forget some.
#[test]
fn a_guest_has_few_half_open_connections_at_a_time() {
    const CLIENTS: usize = 60;
    const MOST: usize = 16;
    let mut guest = Guest::new(&Options {
        publish: vec!["127.0.0.1::80".parse().expect("a mapping")],
        ..Options::default()
    });
    let door = guest.network.published()[0].host;
    let clients: Vec<TcpStream> = (0..CLIENTS)
        .map(|_| TcpStream::connect(door).expect("connect"))
        .collect();
    let (mut waiting, mut opened) = (Vec::new(), 0);
    while opened < CLIENTS {
        while let Some(frame) = guest.receive_in(Duration::from_millis(100)) {
            let port = u16::from_be_bytes([frame[34], frame[35]]);
            let seq = u32::from_be_bytes(frame[38..42].try_into().expect("four"));
            // Not the end of a handshake, nor one that is asked again.
            if frame[47] & (SYN | ACK) == SYN && !waiting.contains(&(port, seq)) {
                waiting.push((port, seq));
            }
        }
        assert!((1..=MOST).contains(&waiting.len()), "{}", waiting.len());
        for (port, seq) in waiting.drain(..) {
            let ends = (80, SocketAddr::new(GATEWAY.into(), port));
            // Whether it is taken or refused.
            let flags = if opened % 2 == 0 { SYN } else { RST };
            guest.send_tcp(ends, (0, seq + 1), flags | ACK, &[]);
            opened += 1;
        }
    }
    assert_eq!(opened, CLIENTS);
    drop(clients);
}

#[test]
fn an_earlier_lifes_connections_are_probed_and_reset() {
    let (listener, mut guest, ends) = before_a_host();
    guest.send_tcp(ends, (0, 0), SYN, &[]);
    let (first, ..) = guest.receive_tcp();
    guest.send_tcp(ends, (1, first + 1), ACK, b"x");
    let (mut host, _) = listener.accept().expect("accept");
    host.read_exact(&mut [0]).expect("read");
    assert_eq!(guest.receive_tcp().1, 2);
    guest.card.mmio.pause();
    let saved = guest.card.mmio.save();
    guest.card.mmio.restore(saved).expect("restore");
    guest.card.mmio.resume();
    assert!(host.read(&mut [0]).is_err(), "the host's end broke");
    let (_, _, flags, _) = guest.receive_tcp();
    assert_eq!(flags, SYN, "a question out of place");
    guest.send_tcp(ends, (2, first + 1), ACK, &[]);
    let (sequence, _, flags, _) = guest.receive_tcp();
    assert_eq!((sequence, flags), (first + 1, RST));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever comes, the network lives on.
    #[test]
    fn noise_does_no_harm(
        frames in prop::collection::vec(
            (0_usize..6, prop::collection::vec(any::<u8>(), 0..100)), 1..60),
    ) {
        let mut guest = Guest::in_mode(NetworkMode::None);
        for (kind, bytes) in frames {
            match kind {
                0 => guest.send(&bytes),
                1 => guest.send_ip(6, GATEWAY, &bytes),
                2 => guest.send_ip(17, address::DNS_V4, &bytes),
                3 => guest.send_ip(1, GATEWAY, &bytes),
                4 => guest.send(&[&[0; 12][..], &[0x86, 0xdd, 0x60], &bytes].concat()),
                _ => guest.send(&[&[0; 12][..], &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &bytes].concat()),
            }
        }
        while guest.receive_in(Duration::from_millis(5)).is_some() {}
        guest.send_tcp((4000, SocketAddr::new(GATEWAY.into(), 80)), (7, 0), SYN, &[]);
        prop_assert!(guest.receive_in(Duration::from_secs(20)).is_some());
    }
}
