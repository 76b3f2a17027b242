//! Machines that share a network.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use skerry_net::{Lease, Segment};

use super::*;

/// A guest on the network whose leases are in `folder`, and its address there.
fn neighbour(folder: &Path, name: &str) -> (Guest, Ipv4Addr) {
    let subnet = "10.89.5.0/24".parse().expect("a subnet");
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
