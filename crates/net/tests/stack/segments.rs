//! Machines that share a network.

use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use skerry_net::{Lease, Segment, Subnets};

use super::*;

/// A guest on the network whose leases are in `folder`, and its address there.
fn neighbour(folder: &Path, name: &str) -> (Guest, Ipv4Addr) {
    let subnet = Subnets {
        v4: "10.89.5.0/24".parse().expect("a subnet"),
        v6: Some("fd00:89:5::/64".parse().expect("a subnet")),
        gateway: Ipv4Addr::new(10, 89, 5, 1),
    };
    let lease = Lease::take(folder, subnet, &[name.to_owned()]).expect("leases");
    let lease = lease.expect("an address");
    let address = lease.address();
    let segment = Segment::open("lab", subnet, lease).expect("a segment");
    let options = Options {
        mode: NetworkMode::None,
        ..Options::default()
    };
    (Guest::with(&options, vec![segment]), address)
}

fn datagram(data: &[u8]) -> Vec<u8> {
    let len = 8 + data.len() as u16;
    [&[0, 7, 0, 9], &len.to_be_bytes()[..], &[0, 0], data].concat()
}

impl Guest {
    fn send_from(&mut self, from: Ipv4Addr, to: Ipv4Addr, data: &[u8]) {
        let payload = datagram(data);
        let total = 20 + payload.len() as u16;
        let mut frame = [&address::GATEWAY_MAC[..], &address::GUEST_MAC, &[8, 0]].concat();
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        frame.extend(from.octets());
        frame.extend(to.octets());
        frame.extend(payload);
        self.send(&frame);
    }

    /// Sends a question for a name's address to the name server; gives the answer.
    fn ask(&mut self, name: &str) -> Vec<u8> {
        let mut question = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        question.push(name.len() as u8);
        question.extend(name.as_bytes());
        question.extend([0, 0, 1, 0, 1]);
        self.send_udp(5000, (address::DNS_V4, 53).into(), &question);
        self.receive_udp().2
    }
}

#[test]
fn packets_get_to_the_neighbour_that_has_the_address() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut one, first) = neighbour(folder.path(), "one");
    let (mut two, second) = neighbour(folder.path(), "two");
    one.send_from(first, second, b"hello");
    let frame = two.receive();
    assert_eq!(frame[26..30], first.octets());
    assert_eq!(frame[30..34], second.octets());
    assert_eq!(&frame[42..], b"hello");
    two.send_from(second, first, b"hello yourself");
    assert_eq!(&one.receive()[42..], b"hello yourself");
    // By name, too; and a name that nobody has isn't asked for further.
    let answer = one.ask("two");
    assert_eq!(answer[answer.len() - 4..], second.octets());
    assert_eq!(one.ask("three")[3] & 15, 3);
    // Another's address is not one's own.
    one.send_from(Ipv4Addr::new(10, 89, 5, 77), second, b"who");
    one.send_from(GUEST, second, b"who");
    assert!(two.receive_in(Duration::from_millis(100)).is_none());
    assert_eq!(one.network.counters().dropped, 2);
    // Nobody is there any more.
    drop(two);
    one.send_from(first, second, b"still there?");
    let frame = one.receive();
    assert_eq!(
        (frame[23], frame[34], frame[35]),
        (1, 3, 1),
        "host unreachable"
    );
}

#[test]
fn a_neighbour_that_takes_nothing_holds_up_nobody() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut one, first) = neighbour(folder.path(), "one");
    let (slow, second) = neighbour(folder.path(), "slow");
    let (mut third_guest, third) = neighbour(folder.path(), "third");
    let data = vec![7; 60_000];
    for _ in 0..200 {
        one.send_from(first, second, &data);
    }
    one.send_from(first, third, b"hello");
    assert_eq!(&third_guest.receive()[42..], b"hello");
    let lost = one.network.counters().dropped;
    assert!(lost > 50, "{lost} of 200 lost");
    assert!(slow.network.counters().from_neighbours < 200);
}

#[test]
fn a_connection_is_held_to_the_address_of_its_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut one, first) = neighbour(folder.path(), "one");
    let flags = SocketFlags::CLOEXEC;
    let kind = SocketType::SEQPACKET;
    let socket: OwnedFd =
        rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).expect("socket");
    let there = folder.path().join(format!("{first}.sock"));
    let there = SocketAddrUnix::new(there).expect("a path");
    rustix::net::connect(&socket, &there).expect("connect");
    // An address that no process has, the guest's own network, and no packets at all.
    let strangers = [Ipv4Addr::new(10, 89, 5, 99), GATEWAY];
    for from in strangers {
        let mut packet = vec![0x45, 0, 0, 33, 0, 0, 0, 0, 64, 17, 0, 0];
        packet.extend(from.octets());
        packet.extend(first.octets());
        packet.extend(datagram(b"hello"));
        rustix::net::send(&socket, &packet, SendFlags::empty()).expect("send");
    }
    rustix::net::send(&socket, b"junk", SendFlags::empty()).expect("send");
    assert!(one.receive_in(Duration::from_millis(200)).is_none());
    assert_eq!(one.network.counters().dropped, 3);
}

/// An IPv6 packet from the guest's card.
fn packet6(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = [
        &address::GATEWAY_MAC[..],
        &address::GUEST_MAC,
        &[0x86, 0xdd],
    ]
    .concat();
    let [high, low] = (payload.len() as u16).to_be_bytes();
    frame.extend([0x60, 0, 0, 0, high, low, protocol, 255]);
    frame.extend(from.octets());
    frame.extend(to.octets());
    frame.extend(payload);
    frame
}

fn six(address: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x89, 5, 0, 0, 0, 0, address.octets()[3].into())
}

#[test]
fn neighbours_have_ipv6_addresses_beside_the_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut one, first) = neighbour(folder.path(), "one");
    let (mut two, second) = neighbour(folder.path(), "two");
    assert_eq!(one.network.attached()[0].address6, Some(six(first)));
    // The gateway has all addresses but the guest's own, for those who ask the link, and for those who
    // ask whether one is still there.
    let solicited: Ipv6Addr = "ff02::1:ff00:3".parse().expect("an address");
    for (target, to, answered) in [
        (six(second), solicited, true),
        (six(second), six(second), true),
        (six(first), solicited, false),
    ] {
        let message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets()].concat();
        one.send(&packet6(six(first), to, 58, &message));
        let answer = one.receive_in(Duration::from_millis(if answered { 20_000 } else { 50 }));
        assert_eq!(answer.is_some(), answered, "{target}");
        if let Some(answer) = answer {
            assert_eq!((answer[54], &answer[62..78]), (136, &target.octets()[..]));
            assert_eq!(answer[80..86], address::GATEWAY_MAC);
        }
    }
    assert_eq!(
        two.network.counters().from_neighbours,
        0,
        "nobody else is asked"
    );
    one.send(&packet6(six(first), six(second), 17, &datagram(b"hello")));
    let frame = two.receive();
    assert_eq!(frame[22..38], six(first).octets());
    assert_eq!(&frame[62..], b"hello");
    // By name: four bytes, or sixteen.
    let mut question = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3];
    question.extend(b"two\0\0\x1c\0\x01");
    one.send_udp(5000, (address::DNS_V4, 53).into(), &question);
    let answer = one.receive_udp().2;
    assert_eq!(answer[6..8], [0, 1]);
    assert_eq!(answer[answer.len() - 16..], six(second).octets());
    let answer = one.ask("two");
    assert_eq!(answer[6..8], [0, 1]);
    assert_eq!(answer[answer.len() - 4..], second.octets());
    // Another's address is not one's own, and a place beyond the network's is nobody's.
    let before = one.network.counters().dropped;
    let stranger = Ipv6Addr::new(0xfd00, 0x89, 5, 0, 0, 0, 0, 77);
    for from in [stranger, address::GUEST_V6] {
        one.send(&packet6(from, six(second), 17, &datagram(b"who")));
    }
    assert!(two.receive_in(Duration::from_millis(100)).is_none());
    assert_eq!(one.network.counters().dropped, before + 2);
    let far = Ipv6Addr::new(0xfd00, 0x89, 5, 0, 1, 0, 0, 2);
    one.send(&packet6(six(first), far, 17, &datagram(b"who")));
    assert_eq!(one.receive()[54..56], [1, 3], "address unreachable");
}

#[test]
fn a_networks_gateway_answers_echoes() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut one, first) = neighbour(folder.path(), "one");
    let gateway = Ipv4Addr::new(10, 89, 5, 1);
    one.send(&packet6(
        six(first),
        six(gateway),
        58,
        &[128, 0, 0, 0, 1, 2, 3, 4, 5],
    ));
    let answer = one.receive();
    assert_eq!((answer[54], &answer[58..]), (129, &[1, 2, 3, 4, 5][..]));
    one.send_ip(1, gateway, &[8, 0, 0, 0, 1, 2, 3, 4, 5]);
    let answer = one.receive();
    assert_eq!(
        (answer[26..30].to_vec(), answer[34]),
        (gateway.octets().to_vec(), 0)
    );
}
