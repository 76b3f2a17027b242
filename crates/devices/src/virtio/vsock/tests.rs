//! The socket device against a driver that speaks virtio-vsock by hand.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

use super::packet::*;
use super::*;
use crate::virtio::QueueRunner;
use crate::virtio::testing::{Buffer, FakeGuest};

const CID: u64 = 3;
const GUEST_PORT: u32 = 5000;
const HOST_PORT: u32 = 1025;
const CREDIT: u32 = 128 * 1024;

struct Rig {
    guest: FakeGuest,
    host: VsockHost,
    receive: Vec<(u16, Buffer)>,
}

fn rig() -> Rig {
    let (device, host) = VsockDevice::new(CID);
    let mut guest = FakeGuest::start(device, u64::MAX, QueueRunner::Inline);
    assert_eq!(guest.config(0), CID.to_le_bytes());
    let receive = (0..64)
        .map(|_| {
            let buffer = guest.buffer(4096, true);
            (guest.add(0, &[buffer]), buffer)
        })
        .collect();
    guest.kick(0);
    Rig {
        guest,
        host,
        receive,
    }
}

fn packet(op: u16) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: GUEST_PORT,
        dst_port: HOST_PORT,
        kind: TYPE_STREAM,
        op,
        buf_alloc: CREDIT,
        ..Header::default()
    }
}

impl Rig {
    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header {
            len: data.len() as u32,
            ..header
        };
        self.guest.request(1, &[&header.to_bytes(), data], &[]);
    }

    /// The next packet from the device, if there is one; its buffer is offered again.
    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.guest.used(0)?;
        let at = self
            .receive
            .iter()
            .position(|(other, _)| *other == head)
            .unwrap();
        let (_, buffer) = self.receive.swap_remove(at);
        let bytes = self.guest.bytes(buffer);
        let header = Header::from_bytes(bytes[..HEADER_LEN].try_into().unwrap());
        assert_eq!(len as usize, HEADER_LEN + header.len as usize);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        self.receive.push((self.guest.add(0, &[buffer]), buffer));
        self.guest.kick(0);
        Some((header, bytes[HEADER_LEN..len as usize].to_vec()))
    }

    fn next(&mut self) -> (Header, Vec<u8>) {
        for _ in 0..2_000_000 {
            if let Some(packet) = self.poll() {
                return packet;
            }
            std::thread::yield_now();
        }
        panic!("no packet came");
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.next();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    fn expect_nothing(&mut self) {
        assert_eq!(self.poll(), None);
    }

    /// The guest connects to the host.
    fn accepted(&mut self) -> (VsockListener, VsockStream) {
        let listener = self.host.listen(HOST_PORT).unwrap();
        self.send(packet(OP_REQUEST), b"");
        let response = self.expect(OP_RESPONSE);
        assert_eq!(
            (response.src_port, response.dst_port),
            (HOST_PORT, GUEST_PORT)
        );
        assert_eq!(response.buf_alloc as usize, VsockDevice::receive_window());
        let stream = listener.accept().unwrap();
        assert_eq!(
            (stream.host_port(), stream.guest_port()),
            (HOST_PORT, GUEST_PORT)
        );
        (listener, stream)
    }
}

#[test]
fn guest_connects_and_data_flows_both_ways() {
    let mut r = rig();
    let (_listener, mut stream) = r.accepted();
    r.send(packet(OP_RW), b"from the guest");
    let mut data = [0; 64];
    assert_eq!(stream.read(&mut data).unwrap(), 14);
    assert_eq!(&data[..14], b"from the guest");
    stream.write_all(b"from the host").unwrap();
    let (header, data) = r.next();
    assert_eq!(
        (header.op, header.fwd_cnt, &data[..]),
        (OP_RW, 14, &b"from the host"[..])
    );
    stream
        .set_read_timeout(Some(Duration::from_millis(1)))
        .unwrap();
    let error = stream.read(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
}

#[test]
fn nobody_listens_or_the_packet_is_for_nobody() {
    let mut r = rig();
    r.send(packet(OP_REQUEST), b"");
    let reset = r.expect(OP_RST);
    assert_eq!((reset.src_port, reset.dst_port), (HOST_PORT, GUEST_PORT));
    r.send(packet(OP_RW), b"x");
    r.expect(OP_RST);
    r.send(
        Header {
            kind: 2,
            ..packet(OP_REQUEST)
        },
        b"",
    );
    assert_eq!(r.expect(OP_RST).kind, 2);
    // A reset is never answered; other contexts' packets are dropped.
    r.send(packet(OP_RST), b"");
    r.send(
        Header {
            src_cid: 99,
            ..packet(OP_RW)
        },
        b"x",
    );
    r.send(
        Header {
            dst_cid: 99,
            ..packet(OP_RW)
        },
        b"x",
    );
    r.expect_nothing();
    assert!(!r.guest.needs_reset());
}

#[test]
fn host_connects_or_is_refused() {
    let mut r = rig();
    for accept in [true, false] {
        let host = r.host.clone();
        let connecting = std::thread::spawn(move || host.connect(GUEST_PORT));
        let request = r.expect(OP_REQUEST);
        assert_eq!(request.dst_port, GUEST_PORT);
        let op = if accept { OP_RESPONSE } else { OP_RST };
        r.send(
            Header {
                dst_port: request.src_port,
                ..packet(op)
            },
            b"",
        );
        match connecting.join().unwrap() {
            Ok(mut stream) => {
                assert!(accept);
                stream.write_all(b"hi").unwrap();
                assert_eq!(r.next().1, b"hi");
                drop(stream);
                assert_eq!(r.expect(OP_SHUTDOWN).flags, SHUTDOWN_BOTH);
            }
            Err(error) => {
                assert!(!accept);
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            }
        }
    }
    let error = r
        .host
        .connect_timeout(GUEST_PORT, Duration::from_millis(1))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    r.expect(OP_REQUEST);
    r.expect(OP_RST);
}

#[test]
fn connect_waits_for_the_driver() {
    let (device, host) = VsockDevice::new(CID);
    let error = host
        .connect_timeout(GUEST_PORT, Duration::from_millis(1))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    drop(device);
    let error = host.connect(GUEST_PORT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
    assert!(host.listen(1).is_err());
}

#[test]
fn the_guests_credit_bounds_what_is_sent() {
    let mut r = rig();
    let listener = r.host.listen(HOST_PORT).unwrap();
    r.send(
        Header {
            buf_alloc: 100,
            ..packet(OP_REQUEST)
        },
        b"",
    );
    r.expect(OP_RESPONSE);
    let mut stream = listener.accept().unwrap();
    let sent: Vec<u8> = (0..250).collect();
    stream.write_all(&sent).unwrap();
    let (header, first) = r.next();
    assert_eq!((header.op, &first[..]), (OP_RW, &sent[..100]));
    r.expect(OP_CREDIT_REQUEST);
    r.expect_nothing();
    let update = packet(OP_CREDIT_UPDATE);
    r.send(
        Header {
            buf_alloc: 100,
            fwd_cnt: 60,
            ..update
        },
        b"",
    );
    assert_eq!(r.next().1, sent[100..160]);
    r.expect(OP_CREDIT_REQUEST);
    // A count that was never sent gives nothing.
    r.send(
        Header {
            buf_alloc: 100,
            fwd_cnt: 50_000,
            ..update
        },
        b"",
    );
    r.expect_nothing();
    r.send(
        Header {
            buf_alloc: 100,
            fwd_cnt: 160,
            ..update
        },
        b"",
    );
    assert_eq!(r.next().1, sent[160..]);
    r.expect_nothing();
}

#[test]
fn the_host_gives_credit_as_it_reads() {
    let mut r = rig();
    let (_listener, mut stream) = r.accepted();
    let chunk = vec![7; 64 * 1024];
    for _ in 0..4 {
        r.send(packet(OP_RW), &chunk);
    }
    r.expect_nothing();
    let mut data = vec![0; 60 * 1024];
    stream.read_exact(&mut data).unwrap();
    r.expect_nothing();
    stream.read_exact(&mut data).unwrap();
    assert_eq!(r.expect(OP_CREDIT_UPDATE).fwd_cnt, 120 * 1024);
    r.send(packet(OP_CREDIT_REQUEST), b"");
    assert_eq!(r.expect(OP_CREDIT_UPDATE).fwd_cnt, 120 * 1024);
}

#[test]
fn breaking_credit_or_length_costs_the_connection() {
    let mut r = rig();
    let (_listener, mut stream) = r.accepted();
    let chunk = vec![7; 64 * 1024];
    for _ in 0..4 {
        r.send(packet(OP_RW), &chunk);
    }
    r.send(packet(OP_RW), b"one too many");
    r.expect(OP_RST);
    // What was within the credit can still be read.
    let mut data = vec![0; 4 * chunk.len()];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(
        stream.read(&mut data).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    assert!(stream.write(b"x").is_err());

    let mut r = rig();
    let (_listener, _stream) = r.accepted();
    let lie = Header {
        len: 100,
        ..packet(OP_RW)
    };
    r.guest.request(1, &[&lie.to_bytes(), b"short"], &[]);
    r.expect(OP_RST);
    for op in [OP_REQUEST, OP_RESPONSE, 0, 99] {
        let mut r = rig();
        let (_listener, _stream) = r.accepted();
        r.send(packet(op), b"");
        r.expect(OP_RST);
    }
}

#[test]
fn half_close_by_the_guest() {
    let mut r = rig();
    let (_listener, mut stream) = r.accepted();
    r.send(packet(OP_RW), b"last words");
    r.send(
        Header {
            flags: SHUTDOWN_SEND,
            ..packet(OP_SHUTDOWN)
        },
        b"",
    );
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last words");
    stream.write_all(b"an answer").unwrap();
    assert_eq!(r.next().1, b"an answer");
    r.send(packet(OP_RW), b"after its end");
    r.expect(OP_RST);
}

#[test]
fn full_close_by_the_guest_is_confirmed_and_keeps_data() {
    let mut r = rig();
    let (_listener, mut stream) = r.accepted();
    r.send(packet(OP_RW), b"bye");
    r.send(
        Header {
            flags: SHUTDOWN_BOTH,
            ..packet(OP_SHUTDOWN)
        },
        b"",
    );
    r.expect(OP_RST);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "bye");
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    drop(stream);
    r.expect_nothing();
    // The ports are free for a new connection.
    r.send(packet(OP_REQUEST), b"");
    r.expect(OP_RESPONSE);
}

#[test]
fn close_by_the_host_sends_everything_first() {
    let mut r = rig();
    let (_listener, mut stream) = r.accepted();
    stream.write_all(&[1; 10_000]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    let mut got = 0;
    while got < 10_000 {
        let (header, data) = r.next();
        assert_eq!(header.op, OP_RW);
        got += data.len();
    }
    assert_eq!(r.expect(OP_SHUTDOWN).flags, SHUTDOWN_SEND);
    // The other direction goes on.
    r.send(packet(OP_RW), b"still here");
    assert_eq!(stream.read(&mut [0; 32]).unwrap(), 10);
    drop(stream);
    assert_eq!(r.expect(OP_SHUTDOWN).flags, SHUTDOWN_BOTH);
    // Late data is swallowed, the guest's reset ends it all.
    r.send(packet(OP_RW), b"late");
    r.send(packet(OP_RST), b"");
    r.expect_nothing();
}

#[test]
fn a_reset_wakes_a_blocked_reader() {
    let mut r = rig();
    let (_listener, stream) = r.accepted();
    let mut clone = stream.try_clone().unwrap();
    let reader = std::thread::spawn(move || clone.read(&mut [0; 8]));
    r.send(packet(OP_RST), b"");
    assert_eq!(
        reader.join().unwrap().unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
}

#[test]
fn listeners_refuse_when_full_and_after_close() {
    let mut r = rig();
    let listener = r.host.listen(HOST_PORT).unwrap();
    assert_eq!(
        r.host.listen(HOST_PORT).unwrap_err().kind(),
        ErrorKind::AddrInUse
    );
    let error = listener
        .accept_timeout(Duration::from_millis(1))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    for port in 0..130 {
        r.send(
            Header {
                src_port: port,
                ..packet(OP_REQUEST)
            },
            b"",
        );
        r.expect(if port < 128 { OP_RESPONSE } else { OP_RST });
    }
    drop(listener);
    for _ in 0..128 {
        r.expect(OP_SHUTDOWN);
    }
    r.send(
        Header {
            src_port: 999,
            ..packet(OP_REQUEST)
        },
        b"",
    );
    r.expect(OP_RST);
}

#[test]
fn a_flood_of_strays_is_held_up_not_hoarded() {
    let (device, _host) = VsockDevice::new(CID);
    let mut guest = FakeGuest::start(device, u64::MAX, QueueRunner::Inline);
    let stray = guest.readable(&packet(OP_RW).to_bytes());
    let mut taken = 0;
    for _ in 0..5000 {
        guest.add(1, &[stray]);
        guest.kick(1);
        if guest.used(1).is_none() {
            break;
        }
        taken += 1;
    }
    assert_eq!(taken, MAX_CONTROL);
    // Receive buffers let it go on.
    while guest.used(1).is_none() {
        let buffer = guest.buffer(64, true);
        guest.add(0, &[buffer]);
        guest.kick(0);
        while guest.used(0).is_some() {}
    }
}

#[test]
fn driver_reset_and_restore_end_connections_but_not_listeners() {
    let mut r = rig();
    let (listener, mut stream) = r.accepted();
    let unaccepted = Header {
        src_port: 77,
        ..packet(OP_REQUEST)
    };
    r.send(unaccepted, b"");
    r.expect(OP_RESPONSE);
    r.guest.mmio.pause();
    let saved = r.guest.mmio.save();
    r.guest.mmio.restore(saved).unwrap();
    assert_eq!(
        stream.read(&mut [0; 8]).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    let accepted = listener.accept_timeout(Duration::ZERO);
    assert_eq!(accepted.unwrap_err().kind(), ErrorKind::TimedOut);
    r.guest.mmio.resume();
    // The guest is told that its connections are gone.
    let event = r.guest.buffer(4, true);
    r.guest.add(2, &[event]);
    r.guest.kick(2);
    assert_eq!(r.guest.wait_used(2).1, 4);
    r.send(packet(OP_REQUEST), b"");
    r.expect(OP_RESPONSE);
    let mut stream = listener.accept().unwrap();
    r.guest.write(0x70, 0);
    assert_eq!(
        stream.read(&mut [0; 8]).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    drop(r);
    assert_eq!(
        listener.accept().unwrap_err().kind(),
        ErrorKind::ConnectionAborted
    );
}

/// Many connections at once, echoing through several threads, with a threaded runner.
#[test]
fn many_connections_in_parallel() {
    let (device, host) = VsockDevice::new(CID);
    let guest = FakeGuest::start(device, u64::MAX, QueueRunner::Thread);
    let mut r = Rig {
        guest,
        host,
        receive: Vec::new(),
    };
    for _ in 0..128 {
        let buffer = r.guest.buffer(4096, true);
        let head = r.guest.add(0, &[buffer]);
        r.receive.push((head, buffer));
    }
    r.guest.kick(0);
    let listener = Arc::new(r.host.listen(HOST_PORT).unwrap());
    const COUNT: u32 = 20;
    const LEN: usize = 40_000;
    let servers: Vec<_> = (0..4)
        .map(|_| {
            let listener = listener.clone();
            std::thread::spawn(move || {
                for _ in 0..COUNT / 4 {
                    let mut stream = listener.accept().unwrap();
                    let mut data = Vec::new();
                    (&stream).read_to_end(&mut data).unwrap();
                    stream.write_all(&data).unwrap();
                }
            })
        })
        .collect();
    let pattern = |port: u32| {
        (0..LEN)
            .map(|i| (i as u32 * port) as u8)
            .collect::<Vec<_>>()
    };
    for port in 1..=COUNT {
        r.send(
            Header {
                src_port: port,
                ..packet(OP_REQUEST)
            },
            b"",
        );
        for chunk in pattern(port).chunks(3000) {
            r.send(
                Header {
                    src_port: port,
                    ..packet(OP_RW)
                },
                chunk,
            );
        }
        let end = Header {
            src_port: port,
            flags: SHUTDOWN_SEND,
            ..packet(OP_SHUTDOWN)
        };
        r.send(end, b"");
    }
    let mut echoed: HashMap<u32, Vec<u8>> = HashMap::new();
    let mut closed = 0;
    while closed < COUNT {
        let (header, data) = r.next();
        let all = echoed.entry(header.dst_port).or_default();
        match header.op {
            OP_RW => {
                all.extend(data);
                let credit = Header {
                    src_port: header.dst_port,
                    ..packet(OP_CREDIT_UPDATE)
                };
                let fwd_cnt = all.len() as u32;
                r.send(Header { fwd_cnt, ..credit }, b"");
            }
            OP_SHUTDOWN => {
                closed += 1;
                r.send(
                    Header {
                        src_port: header.dst_port,
                        ..packet(OP_RST)
                    },
                    b"",
                );
            }
            _ => {}
        }
    }
    for server in servers {
        server.join().unwrap();
    }
    for (port, data) in echoed {
        assert!(data == pattern(port), "port {port}");
    }
}
