//! The MMIO register interface (virtio 1.3, 4.2.2 and 3.1).

use std::sync::Arc;

use super::super::testing::*;
use super::super::*;
use crate::bus::MmioDevice;
use crate::irq::IrqLine;

fn fresh() -> Arc<VirtioMmio> {
    let (ram, device) = (ram(1 << 20), rng::RngDevice::new());
    VirtioMmio::new(device, ram, IrqLine::unconnected(), QueueRunner::Inline).unwrap()
}

fn read(mmio: &VirtioMmio, register: u64) -> u32 {
    let mut data = [0; 4];
    MmioDevice::read(mmio, register, &mut data);
    u32::from_le_bytes(data)
}

fn write(mmio: &VirtioMmio, register: u64, value: u32) {
    MmioDevice::write(mmio, register, &value.to_le_bytes());
}

#[test]
fn identity_and_absent_shared_memory() {
    let mmio = fresh();
    assert_eq!(read(&mmio, 0x00), 0x7472_6976);
    assert_eq!(read(&mmio, 0x04), 2);
    assert_eq!(read(&mmio, 0x08), 4);
    for register in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(read(&mmio, register), u32::MAX);
    }
    // Odd widths read as zero and write nothing.
    let mut data = [0xff; 2];
    MmioDevice::read(&*mmio, 0, &mut data);
    assert_eq!(data, [0; 2]);
    MmioDevice::write(&*mmio, 0x70, &[1]);
    assert_eq!(read(&mmio, 0x70), 0);
}

#[test]
fn features_must_be_offered_and_modern() {
    let mmio = fresh();
    write(&mmio, 0x70, 3);
    // Without VERSION_1.
    write(&mmio, 0x70, 0xb);
    assert_eq!(read(&mmio, 0x70), 3);
    write(&mmio, 0x24, 1);
    write(&mmio, 0x20, 1 | 1 << 20);
    write(&mmio, 0x70, 0xb);
    assert_eq!(read(&mmio, 0x70), 3, "an unknown feature");
    write(&mmio, 0x20, 1);
    write(&mmio, 0x70, 0xb);
    assert_eq!(read(&mmio, 0x70), 0xb);
    // Fixed from now on.
    write(&mmio, 0x20, 0);
    write(&mmio, 0x70, 0xf);
    assert_eq!(read(&mmio, 0x70), 0xf);
    write(&mmio, 0x70, 0);
    assert_eq!(read(&mmio, 0x70), 0);
}

#[test]
fn a_driver_is_not_live_without_features() {
    let mmio = fresh();
    write(&mmio, 0x70, 7);
    assert_eq!(read(&mmio, 0x70), 3);
    write(&mmio, 0x44, 1);
    assert_eq!(
        read(&mmio, 0x44),
        0,
        "no queue before the features are settled"
    );
}

#[test]
fn misplaced_queue_needs_reset() {
    for (size, descriptors) in [
        (3u32, 0u32),
        (128, 0),
        (0x1_0010, 0),
        (64, 8),
        (64, 0x10_0000),
    ] {
        let mmio = fresh();
        write(&mmio, 0x70, 3);
        write(&mmio, 0x24, 1);
        write(&mmio, 0x20, 1);
        write(&mmio, 0x70, 0xb);
        write(&mmio, 0x38, size);
        write(&mmio, 0x80, descriptors);
        write(&mmio, 0x90, 0x2000);
        write(&mmio, 0xa0, 0x4000);
        write(&mmio, 0x44, 1);
        assert_eq!(read(&mmio, 0x44), 0);
        assert_eq!(
            read(&mmio, 0x70),
            0x4b,
            "size {size}, descriptors at {descriptors:#x}"
        );
        assert_eq!(read(&mmio, 0x60), 2, "configuration interrupt");
        write(&mmio, 0x70, 0);
        assert_eq!(read(&mmio, 0x70), 0);
        assert_eq!(read(&mmio, 0x60), 0);
    }
}

#[test]
fn queue_reset_lets_the_driver_start_over() {
    let mut guest = FakeGuest::start(rng::RngDevice::new(), u64::MAX, QueueRunner::Inline);
    guest.request(0, &[], &[16]);
    guest.write(0x30, 0);
    guest.write(0xc0, 1);
    assert_eq!((guest.read(0xc0), guest.read(0x44)), (0, 0));
    guest.kick(0);
    assert!(!guest.needs_reset());
    // Nonsense in selectors is harmless.
    guest.write(0x30, 77);
    assert_eq!(guest.read(0x34), 0);
    guest.write(0x44, 1);
    guest.write(0xc0, 1);
    guest.kick(77);
    assert!(!guest.needs_reset());
}

#[test]
fn interrupt_follows_status_and_acknowledge() {
    let mut guest = FakeGuest::start(rng::RngDevice::new(), u64::MAX, QueueRunner::Inline);
    guest.request(0, &[], &[16]);
    assert_eq!(guest.read(0x60), 1);
    assert_eq!(guest.interrupt(), (true, 1));
    guest.acknowledge();
    assert_eq!(guest.interrupt(), (false, 1));
    // A pending configuration change makes a new edge when the other bit is acknowledged.
    guest.request(0, &[], &[16]);
    guest.mmio.engine().config_changed();
    assert_eq!(guest.read(0xfc), 1);
    guest.write(0x64, 1);
    assert_eq!(guest.interrupt(), (true, 3));
}

#[test]
fn both_runners_serve() {
    for runner in [QueueRunner::Inline, QueueRunner::Thread] {
        let mut guest = FakeGuest::start(rng::RngDevice::new(), u64::MAX, runner);
        for _ in 0..100 {
            let (data, len) = guest.request(0, &[], &[24, 40]);
            assert_eq!(len, 64);
            assert!(data.iter().flatten().any(|byte| *byte != 0));
        }
    }
}

#[test]
fn paused_engine_keeps_notifications() {
    for runner in [QueueRunner::Inline, QueueRunner::Thread] {
        let mut guest = FakeGuest::start(rng::RngDevice::new(), u64::MAX, runner);
        guest.mmio.pause();
        let buffer = guest.buffer(8, true);
        guest.add(0, &[buffer]);
        guest.kick(0);
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(guest.used(0).is_none());
        guest.mmio.resume();
        guest.wait_used(0);
    }
}

#[test]
fn state_moves_to_another_transport() {
    let mut guest = FakeGuest::start(rng::RngDevice::new(), u64::MAX, QueueRunner::Inline);
    for _ in 0..100 {
        guest.request(0, &[], &[16]);
    }
    guest.mmio.pause();
    let saved = guest.mmio.save();
    let device = rng::RngDevice::new();
    let (probe, line) = crate::irq::testing::LineProbe::new();
    let other = VirtioMmio::new(device, guest.ram.clone(), line, QueueRunner::Inline).unwrap();
    other.pause();
    other.restore(saved.clone()).unwrap();
    assert_eq!(other.save(), saved);
    assert!(probe.level(), "the interrupt that was pending");
    other.resume();
    guest.mmio = other;
    guest.request(0, &[], &[16]);

    let block = vsock::VsockDevice::new(3).0;
    let wrong = VirtioMmio::new(
        block,
        guest.ram.clone(),
        IrqLine::unconnected(),
        QueueRunner::Inline,
    )
    .unwrap();
    assert!(wrong.restore(saved).is_err());
}

/// A driver on another processor that gives the device a new chain for each one it completes must not
/// keep the serving thread, which may be a vCPU that is to be stopped.
#[test]
fn an_endless_supply_of_chains_does_not_hold_up_a_pause() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use vm_memory::{Bytes, GuestAddress};

    let mut guest = FakeGuest::start(rng::RngDevice::new(), u64::MAX, QueueRunner::Inline);
    let buffer = guest.buffer(8, true);
    let head = guest.add(0, &[buffer]);
    assert_eq!(head, 0);
    let (_, available, used) = guest.rings(0);
    let done = AtomicBool::new(false);
    let (guest, ram) = (&guest, guest.ram.clone());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let index: u16 = ram.load(GuestAddress(used + 2), Ordering::Acquire).unwrap();
                let next = GuestAddress(available + 2);
                // Every entry of the ring names chain 0.
                ram.store(index.wrapping_add(32), next, Ordering::Release)
                    .unwrap();
            }
        });
        let vcpu = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                guest.kick(0);
            }
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        // With the supplier running on, so that only the pause can end the service.
        guest.mmio.pause();
        done.store(true, Ordering::Relaxed);
        vcpu.join().unwrap();
    });
}
