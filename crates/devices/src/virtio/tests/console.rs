//! The console device: control protocol, both data directions, back-pressure.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use super::super::console::*;
use super::super::testing::*;
use super::super::*;

fn two_ports() -> (FakeGuest, Vec<PortHandle>, Arc<ConsoleDevice>) {
    let ports = vec![
        ConsolePort {
            name: String::new(),
            console: true,
        },
        ConsolePort {
            name: "agent".into(),
            console: false,
        },
    ];
    let (device, handles) = ConsoleDevice::new(ports);
    (
        FakeGuest::start(device.clone(), u64::MAX, QueueRunner::Inline),
        handles,
        device,
    )
}

fn control(id: u32, event: u16, value: u16) -> Vec<u8> {
    let mut raw = id.to_le_bytes().to_vec();
    raw.extend(event.to_le_bytes());
    raw.extend(value.to_le_bytes());
    raw
}

/// Posts a receive buffer on `queue` and returns what arrives in it.
fn receive(guest: &mut FakeGuest, queue: usize, buffer: Buffer) -> Vec<u8> {
    let (_, len) = guest.wait_used(queue);
    let mut data = guest.bytes(buffer);
    data.truncate(len as usize);
    data
}

#[test]
fn control_protocol_announces_ports() {
    let (mut guest, handles, device) = two_ports();
    assert_eq!(guest.config(4), 2u32.to_le_bytes());
    let buffers: Vec<_> = (0..16).map(|_| guest.buffer(64, true)).collect();
    for buffer in &buffers {
        guest.add(2, &[*buffer]);
    }
    guest.kick(2);
    let mut buffers = buffers.into_iter();
    let mut next = |guest: &mut FakeGuest| receive(guest, 2, buffers.next().unwrap());
    guest.request(3, &[&control(0xffff_ffff, 0, 1)], &[]);
    assert_eq!(next(&mut guest), control(0, 1, 1));
    assert_eq!(next(&mut guest), control(1, 1, 1));
    guest.request(3, &[&control(0, 3, 1)], &[]);
    assert_eq!(next(&mut guest), control(0, 4, 1));
    assert_eq!(
        next(&mut guest),
        [control(0, 5, 0), vec![80, 0, 25, 0]].concat()
    );
    assert_eq!(next(&mut guest), control(0, 6, 1));
    guest.request(3, &[&control(1, 3, 1)], &[]);
    assert_eq!(
        next(&mut guest),
        [control(1, 7, 1), b"agent".to_vec()].concat()
    );
    assert_eq!(next(&mut guest), control(1, 6, 1));
    assert!(!handles[1].is_guest_open());
    guest.request(3, &[&control(1, 6, 1)], &[]);
    assert!(handles[1].is_guest_open());
    device.resize(132, 43);
    assert_eq!(
        next(&mut guest),
        [control(0, 5, 0), vec![132, 0, 43, 0]].concat()
    );
    assert_eq!(guest.config(0), [132, 0, 43, 0]);
    // Ports that don't exist and unknown events are ignored.
    guest.request(3, &[&control(9, 3, 1)], &[]);
    guest.request(3, &[&control(0, 99, 1)], &[]);
    assert!(guest.used(2).is_none() && !guest.needs_reset());
}

#[test]
fn data_goes_both_ways() {
    let (mut guest, mut handles, _) = two_ports();
    let mut agent = handles.remove(1);
    guest.request(5, &[b"hello ", b"host"], &[]);
    let mut data = [0; 32];
    assert_eq!(agent.read(&mut data).unwrap(), 10);
    assert_eq!(&data[..10], b"hello host");
    agent.write_all(b"hello guest").unwrap();
    let (small, large) = (guest.buffer(6, true), guest.buffer(64, true));
    guest.add(4, &[small]);
    guest.add(4, &[large]);
    guest.kick(4);
    assert_eq!(receive(&mut guest, 4, small), b"hello ");
    assert_eq!(receive(&mut guest, 4, large), b"guest");
    agent.set_read_timeout(Some(Duration::from_millis(1)));
    assert_eq!(
        agent.read(&mut data).unwrap_err().kind(),
        std::io::ErrorKind::TimedOut
    );
    // The emergency write needs no queue.
    crate::bus::MmioDevice::write(&*guest.mmio, 0x108, b"!\0\0\0");
    assert_eq!(handles[0].read(&mut data).unwrap(), 1);
}

#[test]
fn a_slow_host_stalls_the_guest_and_nothing_is_lost() {
    let (mut guest, handles, _) = two_ports();
    let sent: Vec<u8> = (0..300_000u32).map(|i| (i * 7) as u8).collect();
    for chunk in sent.chunks(50_000) {
        let buffer = guest.readable(chunk);
        guest.add(1, &[buffer]);
    }
    guest.kick(1);
    assert!(
        guest.used(1).is_some() && guest.used(1).is_none(),
        "the ring takes 64 KiB"
    );
    let mut got = vec![0; sent.len()];
    (&handles[0]).read_exact(&mut got).unwrap();
    assert_eq!(got, sent);
    for _ in 0..5 {
        guest.wait_used(1);
    }
}

#[test]
fn a_slow_guest_stalls_the_host() {
    let (mut guest, handles, _) = two_ports();
    let sent: Vec<u8> = (0..200_000u32).map(|i| (i * 11) as u8).collect();
    std::thread::scope(|scope| {
        let (handle, data) = (handles[0].clone(), &sent);
        scope.spawn(move || (&handle).write_all(data).unwrap());
        let buffer = guest.buffer(4096, true);
        let mut got = Vec::new();
        while got.len() < sent.len() {
            guest.add(0, &[buffer]);
            guest.kick(0);
            got.extend(receive(&mut guest, 0, buffer));
        }
        assert_eq!(got, sent);
    });
}

#[test]
fn a_port_nobody_holds_drops_its_output() {
    let (mut guest, handles, _) = two_ports();
    drop(handles);
    for _ in 0..10 {
        guest.request(1, &[&[0; 50_000]], &[]);
    }
}

#[test]
fn control_flood_is_bounded() {
    let (mut guest, _handles, _) = two_ports();
    let message = control(1, 3, 1);
    let buffer = guest.readable(&message);
    for _ in 0..1000 {
        guest.add(3, &[buffer]);
        guest.kick(3);
        if guest.used(3).is_none() {
            // Stalled: it goes on once the device's own messages have been taken.
            let reply = guest.buffer(64, true);
            for _ in 0..64 {
                guest.add(2, &[reply]);
            }
            guest.kick(2);
            guest.wait_used(3);
            while guest.used(2).is_some() {}
            assert!(!guest.needs_reset());
            return;
        }
    }
    panic!("a flood of control messages was never held up");
}

#[test]
fn state_keeps_what_is_under_way() {
    let (mut guest, handles, _) = two_ports();
    (&handles[1]).write_all(b"to guest").unwrap();
    guest.request(5, &[b"to host"], &[]);
    guest.mmio.pause();
    let saved = guest.mmio.save();
    let (other, mut others, _) = two_ports();
    other.mmio.pause();
    other.mmio.restore(saved.clone()).unwrap();
    assert_eq!(other.mmio.save(), saved);
    let mut data = [0; 16];
    assert_eq!(others[1].read(&mut data).unwrap(), 7);
    let (one, _handle) = ConsoleDevice::new(Vec::new());
    let one = FakeGuest::start(one, u64::MAX, QueueRunner::Inline);
    assert!(one.mmio.restore(saved).is_err());
}

#[test]
fn readers_end_with_the_device() {
    let (guest, handles, device) = two_ports();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| (&handles[0]).read(&mut [0; 8]).unwrap());
        drop((guest, device));
        assert_eq!(reader.join().unwrap(), 0);
    });
    assert!((&handles[0]).write(b"x").is_err());
}
