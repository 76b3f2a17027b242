use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::{Buffer, FakeGuest};
use crate::virtio::{F_EVENT_IDX, F_VERSION_1, QueueRunner};

const CARD: NetConfig = NetConfig {
    mac: [2, 0, 0, 0, 0, 1],
    mtu: 1500,
    offload: false,
};

/// A network of a test's: it counts how often it is woken.
#[derive(Default)]
pub(crate) struct Plug {
    port: OnceLock<NetPort>,
    woken: AtomicUsize,
    connections: Mutex<Vec<Connection>>,
}

impl Plug {
    fn port(&self) -> &NetPort {
        self.port.get().unwrap()
    }

    fn woken(&self) -> usize {
        self.woken.swap(0, Ordering::SeqCst)
    }
}

impl NetBackend for Plug {
    fn attach(&self, port: NetPort) {
        assert!(self.port.set(port).is_ok(), "attached once");
    }

    fn wake(&self) {
        self.woken.fetch_add(1, Ordering::SeqCst);
    }

    fn connections(&self) -> Vec<Connection> {
        self.connections.lock().clone()
    }

    fn replace(&self, connections: Vec<Connection>) {
        *self.connections.lock() = connections;
    }

    fn close(&self) {}
}

fn guest(mask: u64) -> (FakeGuest, Arc<Plug>) {
    let plug = Arc::new(Plug::default());
    let device = NetDevice::new(CARD, plug.clone());
    (FakeGuest::start(device, mask, QueueRunner::Inline), plug)
}

/// A frame of so many bytes behind room for a header.
fn frame(port: &NetPort, len: usize) -> Vec<u8> {
    let mut buffer = port.buffer(len);
    for (at, byte) in buffer[HEADER_LEN..].iter_mut().enumerate() {
        *byte = at as u8;
    }
    buffer
}

#[test]
fn the_card_tells_what_it_is() {
    let (guest, _) = guest(u64::MAX);
    assert_eq!(
        guest.config::<12>(0),
        [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5]
    );
    assert_eq!(guest.features & FEATURES, FEATURES);
}

#[test]
fn frames_from_the_guest_arrive_when_the_thread_takes_them() {
    let (mut guest, plug) = guest(u64::MAX);
    plug.woken();
    for len in [60_u8, 61] {
        let data = [&[0; HEADER_LEN][..], &vec![len; len.into()]].concat();
        let buffer = guest.readable(&data);
        guest.add(TRANSMIT, &[buffer]);
    }
    guest.kick(TRANSMIT);
    assert_eq!(plug.woken(), 1);
    assert!(guest.used(TRANSMIT).is_none(), "a vCPU copies nothing");
    assert_eq!(plug.port().receive(), [vec![60; 60], vec![61; 61]]);
    assert!(guest.used(TRANSMIT).is_some() && guest.used(TRANSMIT).is_some());
    assert!(plug.port().receive().is_empty());
    assert!(guest.must_kick(TRANSMIT) || guest.features & F_EVENT_IDX != 0);
    assert_eq!(plug.woken(), 0, "it took them itself");
}

/// A guest with a card whose frames leave the process.
fn offloading(mask: u64) -> (FakeGuest, Arc<Plug>) {
    let plug = Arc::new(Plug::default());
    let card = NetConfig {
        offload: true,
        ..CARD
    };
    let device = NetDevice::new(card, plug.clone());
    plug.port().keep_headers();
    (FakeGuest::start(device, mask, QueueRunner::Inline), plug)
}

#[test]
fn a_backend_that_wants_headers_gets_them_and_gives_them() {
    let (mut guest, plug) = offloading(u64::MAX);
    let port = plug.port();
    let all = Offloads {
        checksums: true,
        tcp4: true,
        tcp6: true,
    };
    assert_eq!(port.offloads(), all);
    let header: Vec<u8> = (1..=HEADER_LEN as u8).collect();
    let sent = [&header[..], &[7; 60]].concat();
    let buffer = guest.readable(&sent);
    guest.add(TRANSMIT, &[buffer]);
    // A header alone is no frame.
    let buffer = guest.readable(&header);
    guest.add(TRANSMIT, &[buffer]);
    assert_eq!(port.receive(), std::slice::from_ref(&sent));
    let buffer = guest.buffer(200, true);
    guest.add(RECEIVE, &[buffer]);
    port.push_whole(header.clone());
    port.push_whole(sent.clone());
    port.flush();
    guest.wait_used(RECEIVE);
    let got = guest.bytes(buffer);
    assert_eq!(got[..NUM_BUFFERS], sent[..NUM_BUFFERS]);
    assert_eq!(got[NUM_BUFFERS..HEADER_LEN], [1, 0]);
    assert_eq!(got[HEADER_LEN..sent.len()], sent[HEADER_LEN..]);
    guest.mmio.reset();
    assert_eq!(port.offloads(), Offloads::default());
    let (_, plug) = offloading(!F_GUEST_CSUM);
    assert_eq!(plug.port().offloads(), Offloads::default());
}

#[test]
fn what_is_no_frame_is_dropped() {
    let (mut guest, plug) = guest(u64::MAX);
    for len in [0, 5, HEADER_LEN, HEADER_LEN + MAX_FRAME + 1] {
        let buffer = guest.readable(&vec![1; len.max(1)]);
        guest.add(TRANSMIT, &[buffer]);
    }
    assert!(plug.port().receive().is_empty());
    for _ in 0..4 {
        assert_eq!(guest.wait_used(TRANSMIT).1, 0);
    }
    assert!(!guest.needs_reset());
}

#[test]
fn a_guest_that_sends_without_end_waits() {
    let (mut guest, plug) = guest(u64::MAX);
    let buffer = guest.readable(&vec![1; 30_000]);
    for _ in 0..200 {
        guest.add(TRANSMIT, &[buffer]);
    }
    let first = plug.port().receive();
    let bytes: usize = first.iter().map(Vec::len).sum();
    assert!(
        (FROM_GUEST..FROM_GUEST + 30_000).contains(&bytes),
        "{bytes}"
    );
    let mut all = first.len();
    loop {
        match plug.port().receive().len() {
            0 => break,
            more => all += more,
        }
    }
    assert_eq!(all, 200);
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_needs() {
    let (mut guest, plug) = guest(u64::MAX);
    let port = plug.port();
    let buffers: Vec<_> = (0..5).map(|_| guest.buffer(100, true)).collect();
    for buffer in &buffers {
        guest.add(RECEIVE, &[*buffer]);
    }
    port.push(frame(port, 250), None);
    port.flush();
    let used: Vec<u32> = (0..3).map(|_| guest.wait_used(RECEIVE).1).collect();
    assert_eq!(used, [100, 100, 62]);
    assert!(guest.used(RECEIVE).is_none());
    let bytes: Vec<u8> = buffers[..3].iter().flat_map(|b| guest.bytes(*b)).collect();
    assert_eq!(bytes[NUM_BUFFERS..HEADER_LEN], [3, 0]);
    assert!((0..250).all(|at| bytes[HEADER_LEN + at] == at as u8));
}

/// A driver on another processor that finds the first buffer of a frame takes the rest to be there.
#[test]
fn a_frame_is_seen_whole_or_not_at_all() {
    let (mut guest, plug) = guest(u64::MAX);
    let port = plug.port().clone();
    let buffers: Vec<_> = (0..200).map(|_| guest.buffer(100, true)).collect();
    for buffer in &buffers {
        guest.add(RECEIVE, &[*buffer]);
    }
    let (_, _, used) = guest.rings(RECEIVE);
    let ram = guest.ram.clone();
    let index = move || -> u16 {
        let at = vm_memory::GuestAddress(used + 2);
        vm_memory::Bytes::load(&*ram, at, Ordering::Acquire).unwrap()
    };
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            for _ in 0..4 {
                // Fifty buffers each.
                port.push(frame(&port, 50 * 100 - HEADER_LEN), None);
                port.flush();
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        });
        while !server.is_finished() {
            assert_eq!(index() % 50, 0);
        }
    });
    assert_eq!(index(), 200);
}

#[test]
fn frames_wait_for_buffers_and_ask_for_more_of_them() {
    for mask in [u64::MAX, !F_EVENT_IDX] {
        let (mut guest, plug) = guest(mask);
        let port = plug.port();
        let buffer = guest.buffer(100, true);
        guest.add(RECEIVE, &[buffer]);
        port.push(frame(port, 250), None);
        port.flush();
        assert!(guest.used(RECEIVE).is_none());
        guest.add(RECEIVE, &[buffer]);
        assert!(guest.must_kick(RECEIVE), "one more is asked for");
        guest.kick(RECEIVE);
        assert!(guest.used(RECEIVE).is_none(), "two are too few");
        guest.add(RECEIVE, &[buffer]);
        assert!(guest.must_kick(RECEIVE));
        guest.kick(RECEIVE);
        assert!((0..3).all(|_| guest.used(RECEIVE).is_some()));
        assert!(!guest.needs_reset());
    }
}

#[test]
fn whoever_makes_too_much_is_told_when_there_is_room() {
    let (mut guest, plug) = guest(u64::MAX);
    let port = plug.port();
    let mut made = 0;
    while port.has_room() {
        port.push(frame(port, 60_000), None);
        made += 1;
    }
    assert!(made < 20);
    for _ in 0..100 {
        port.push(frame(port, 60_000), None);
    }
    plug.woken();
    let buffer = guest.buffer(61_000, true);
    for _ in 0..200 {
        guest.add(RECEIVE, &[buffer]);
    }
    guest.kick(RECEIVE);
    assert!(plug.woken() >= 1);
    let mut got = 0;
    while guest.used(RECEIVE).is_some() {
        got += 1;
    }
    assert!(
        (made..2 * made + 2).contains(&got),
        "{made} made, {got} got"
    );
    assert!(port.has_room());
}

#[test]
fn checksums_are_left_or_made() {
    let checksum = Checksum {
        start: 14,
        offset: 6,
    };
    for offload in [true, false] {
        let mask = if offload { u64::MAX } else { !F_GUEST_CSUM };
        let (mut guest, plug) = guest(mask);
        let port = plug.port();
        let buffer = guest.buffer(200, true);
        guest.add(RECEIVE, &[buffer]);
        let mut bytes = frame(port, 99);
        bytes[HEADER_LEN + 20..][..2].copy_from_slice(&[0x12, 0x34]);
        port.push(bytes, Some(checksum));
        port.flush();
        guest.wait_used(RECEIVE);
        let got = guest.bytes(buffer);
        if offload {
            assert_eq!(got[..10], [1, 0, 0, 0, 0, 0, 14, 0, 6, 0]);
            assert_eq!(got[HEADER_LEN + 20..][..2], [0x12, 0x34]);
        } else {
            assert_eq!(got[..10], [0; 10]);
            let covered = &got[HEADER_LEN + 14..HEADER_LEN + 99];
            let mut sum = 0;
            for pair in covered.chunks(2) {
                sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            }
            // The pseudo-header's sum was part of it.
            sum += 0x1234;
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            assert_eq!(sum, 0xffff);
        }
    }
}

#[test]
fn a_state_names_connections_and_no_more_than_there_can_be() {
    let (guest, plug) = guest(u64::MAX);
    let connection = Connection {
        guest: "10.0.2.15:40000".parse().unwrap(),
        peer: "1.2.3.4:80".parse().unwrap(),
    };
    *plug.connections.lock() = vec![connection; 2];
    guest.mmio.pause();
    let saved = guest.mmio.save();
    plug.connections.lock().clear();
    guest.mmio.restore(saved.clone()).unwrap();
    assert_eq!(*plug.connections.lock(), [connection; 2]);
    assert!(plug.port().is_live());
    let mut text = serde_json_like(MAX_CONNECTIONS + 1, connection);
    let device = NetDevice::new(CARD, Arc::new(Plug::default()));
    assert!(device.restore(text.clone()).is_err());
    if let DeviceState::Net(state) = &mut text {
        state.connections.pop();
    }
    device.restore(text).unwrap();
    assert!(device.restore(DeviceState::Rng).is_err());
}

fn serde_json_like(count: usize, connection: Connection) -> DeviceState {
    DeviceState::Net(NetState {
        connections: vec![connection; count],
    })
}

#[test]
fn without_a_driver_frames_are_lost() {
    let (guest, plug) = guest(F_VERSION_1);
    let port = plug.port();
    assert!(port.is_live());
    guest.mmio.reset();
    assert!(!port.is_live());
    for _ in 0..10_000 {
        port.push(frame(port, 100), None);
    }
    assert!(port.has_room());
}

proptest! {
    /// Frames come out as they went in, whatever the sizes of buffers, as long as the most that the device
    /// takes for one are enough.
    #[test]
    fn frames_survive_any_buffers(
        frames in prop::collection::vec(1_usize..3000, 1..8),
        sizes in prop::collection::vec(50_u32..900, 1..40),
    ) {
        let (mut guest, plug) = guest(u64::MAX);
        let port = plug.port();
        for len in &frames {
            port.push(frame(port, *len), None);
        }
        let mut added: Vec<(u16, Buffer)> = Vec::new();
        let mut got = Vec::new();
        'all: for size in sizes.iter().cycle().take(2000) {
            let buffer = guest.buffer(*size, true);
            let head = guest.add(RECEIVE, &[buffer]);
            added.push((head, buffer));
            guest.kick(RECEIVE);
            while let Some((head, len)) = guest.used(RECEIVE) {
                let at = added.iter().position(|(added, _)| *added == head).unwrap();
                let (_, buffer) = added.remove(at);
                got.push(guest.bytes(buffer)[..len as usize].to_vec());
                if got.iter().map(Vec::len).sum::<usize>()
                    == frames.iter().map(|len| len + HEADER_LEN).sum::<usize>() {
                    break 'all;
                }
            }
        }
        let mut parts = got.iter();
        for len in &frames {
            let first = parts.next().unwrap();
            let count = u16::from_le_bytes([first[NUM_BUFFERS], first[NUM_BUFFERS + 1]]);
            let mut whole = first.clone();
            for _ in 1..count {
                whole.extend(parts.next().unwrap());
            }
            prop_assert_eq!(whole.len(), len + HEADER_LEN);
            prop_assert!((0..*len).all(|at| whole[HEADER_LEN + at] == at as u8));
        }
    }
}

/// A network whose thread is at the queue before the processor that woke it has left it.
#[derive(Default)]
struct Hasty {
    port: OnceLock<NetPort>,
    woken: AtomicUsize,
    attempts: AtomicUsize,
}

impl NetBackend for Hasty {
    fn attach(&self, port: NetPort) {
        assert!(self.port.set(port).is_ok(), "attached once");
    }

    fn wake(&self) {
        let before = self.attempts.load(Ordering::SeqCst);
        self.woken.fetch_add(1, Ordering::SeqCst);
        let until = Instant::now() + Duration::from_millis(500);
        while self.attempts.load(Ordering::SeqCst) == before && Instant::now() < until {
            std::thread::yield_now();
        }
        // It is about to ask, or has asked.
        std::thread::sleep(Duration::from_millis(5));
    }

    fn connections(&self) -> Vec<Connection> {
        Vec::new()
    }

    fn replace(&self, _: Vec<Connection>) {}

    fn close(&self) {}
}

/// The thread that takes the guest's frames and the processor that says that there are some were at the
/// queue in turn once, each sending the other round again.
#[test]
fn a_notification_wakes_the_thread_once() {
    const ENOUGH: usize = 10;
    let hasty = Arc::new(Hasty::default());
    let device = NetDevice::new(CARD, hasty.clone());
    let mut guest = FakeGuest::start(device, u64::MAX, QueueRunner::Inline);
    let before = hasty.woken.load(Ordering::SeqCst);
    let buffer = guest.readable(&[1; HEADER_LEN + 60]);
    guest.add(TRANSMIT, &[buffer]);
    let taken = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (mut seen, mut taken) = (before, 0);
            let until = Instant::now() + Duration::from_secs(10);
            while taken == 0 && seen < before + ENOUGH && Instant::now() < until {
                let woken = hasty.woken.load(Ordering::SeqCst);
                if woken > seen {
                    seen = woken;
                    hasty.attempts.fetch_add(1, Ordering::SeqCst);
                    taken += hasty.port.get().expect("attached").receive().len();
                }
            }
            taken
        });
        guest.kick(TRANSMIT);
        thread.join().expect("the thread")
    });
    assert_eq!(hasty.woken.load(Ordering::SeqCst) - before, 1);
    assert_eq!(taken, 1);
}
