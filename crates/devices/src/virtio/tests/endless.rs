//! A ring that never becomes empty: each request has the disk write the next one into memory.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use skerry_storage::{Abilities, Disk, DiskError, IoBuf, IoBufMut};
use vm_memory::{Bytes, GuestAddress};

use super::super::block::*;
use super::super::testing::*;
use super::super::*;

/// Where [`FakeGuest`] puts the first queue's available ring.
const AVAILABLE: u64 = 0x8000;
/// In the piece that is read over the ring: the header of the only request.
const HEADER: usize = 0x600;
const PIECE: usize = 0x800;

/// Piece n holds the available index n + 2, and the header of a request for piece n + 1.
#[derive(Debug)]
struct Tape;

fn piece(n: u64) -> [u8; PIECE] {
    let mut bytes = [0; PIECE];
    bytes[2..4].copy_from_slice(&(n as u16).wrapping_add(2).to_le_bytes());
    let sector = (n + 1) % 0x1_0000 * (PIECE as u64 / 512);
    bytes[HEADER + 8..HEADER + 16].copy_from_slice(&sector.to_le_bytes());
    bytes
}

impl Disk for Tape {
    fn name(&self) -> &str {
        "tape"
    }
    fn size(&self) -> u64 {
        (PIECE as u64) << 16
    }
    fn is_read_only(&self) -> bool {
        true
    }
    fn abilities(&self) -> Abilities {
        Abilities {
            discard: false,
            fast_zeroes: false,
        }
    }
    fn read_vectored_at(&self, bufs: &[IoBufMut<'_>], offset: u64) -> Result<(), DiskError> {
        let bytes = piece(offset / PIECE as u64);
        bufs[0].copy_from(0, &bytes[..bufs[0].len()]);
        Ok(())
    }
    fn write_vectored_at(&self, _: &[IoBuf<'_>], _: u64) -> Result<(), DiskError> {
        Ok(())
    }
    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), DiskError> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), DiskError> {
        Ok(())
    }
}

/// A paused device whose first request is to be served.
fn endless() -> FakeGuest {
    let config = BlockConfig::default();
    let device = BlockDevice::new(Arc::new(Tape), &config);
    let guest = FakeGuest::start(device, F_VERSION_1, QueueRunner::Inline);
    guest.mmio.pause();
    let buffer = |address, len, writable| Buffer {
        address,
        len,
        writable,
    };
    let header = buffer(AVAILABLE + HEADER as u64, 16, false);
    guest.write_descriptor(0, 0, header, 1, 1);
    guest.write_descriptor(0, 1, buffer(AVAILABLE, PIECE as u32, true), 1, 2);
    guest.write_descriptor(0, 2, buffer(0x1000, 1, true), 0, 0);
    let first = piece(u64::MAX - 0xffff);
    guest
        .ram
        .write_slice(&first, GuestAddress(AVAILABLE))
        .unwrap();
    guest
        .ram
        .write_obj(1_u16, GuestAddress(AVAILABLE + 2))
        .unwrap();
    guest
}

/// Fails if `act` takes for ever.
fn returns(act: impl FnOnce() + Send + 'static) -> Duration {
    let (done, finished) = mpsc::channel();
    let begun = Instant::now();
    std::thread::spawn(move || {
        act();
        let _ = done.send(());
    });
    let patience = Duration::from_secs(60);
    finished.recv_timeout(patience).expect("it never ends");
    begun.elapsed()
}

fn served(guest: &FakeGuest) -> u16 {
    guest.ram.read_obj(GuestAddress(0xa002)).unwrap()
}

#[test]
fn the_end_of_a_machine_does_not_wait_for_it() {
    let guest = endless();
    let mmio = guest.mmio.clone();
    returns(move || {
        mmio.finish(Duration::from_millis(100));
        mmio.close();
    });
    assert_ne!(served(&guest), 0);
    assert!(!guest.needs_reset());
}

#[test]
fn who_lets_a_machine_go_on_does_not_wait_for_it() {
    let guest = endless();
    let mmio = guest.mmio.clone();
    returns(move || mmio.resume());
    // It goes on elsewhere, until it is told to stop.
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut before = served(&guest);
    for _ in 0..3 {
        while served(&guest) == before {
            assert!(Instant::now() < deadline, "nobody serves it");
            std::thread::yield_now();
        }
        before = served(&guest);
    }
    let mmio = guest.mmio.clone();
    returns(move || mmio.pause());
    let stopped = served(&guest);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(served(&guest), stopped);
    assert!(!guest.needs_reset());
}
