//! Rings that break the rules, and rings that keep them in unusual ways.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::testing::*;
use super::super::*;

const LAYOUT: QueueLayout = QueueLayout {
    size: 8,
    descriptors: 0x1000,
    available: 0x2000,
    used: 0x3000,
};

struct Rig {
    ram: Arc<skerry_hypervisor::memory::GuestRam>,
    queue: Queue,
}

fn rig(event_index: bool) -> Rig {
    let ram = ram(1 << 20);
    let queue = Queue::new(ram.clone(), LAYOUT, 8, event_index, true).unwrap();
    Rig { ram, queue }
}

impl Rig {
    fn describe(&self, table: u64, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * index;
        self.ram.write_obj(address, GuestAddress(at)).unwrap();
        self.ram.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.ram.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn set_available(&self, index: u16, heads: &[u16]) {
        for (i, head) in heads.iter().enumerate() {
            self.ram
                .write_obj(*head, GuestAddress(0x2004 + 2 * i as u64))
                .unwrap();
        }
        self.ram.write_obj(index, GuestAddress(0x2002)).unwrap();
    }

    fn pop_error(&mut self) -> QueueError {
        self.queue.pop().unwrap_err()
    }
}

#[test]
fn available_index_may_not_jump() {
    let mut r = rig(false);
    r.set_available(9, &[]);
    assert_eq!(r.pop_error(), QueueError::AvailableJump { from: 0, to: 9 });
    r.set_available(0xffff, &[]);
    assert!(matches!(r.pop_error(), QueueError::AvailableJump { .. }));
}

#[test]
fn bad_indices_and_loops() {
    let mut r = rig(false);
    r.set_available(1, &[8]);
    assert_eq!(r.pop_error(), QueueError::Index(8));
    r.set_available(1, &[0]);
    r.describe(0x1000, 0, 0x8000, 4, 1, 9);
    assert_eq!(r.pop_error(), QueueError::Index(9));
    r.describe(0x1000, 0, 0x8000, 4, 1, 1);
    r.describe(0x1000, 1, 0x8000, 4, 1, 0);
    assert_eq!(r.pop_error(), QueueError::Loop(0));
}

#[test]
fn buffers_must_be_in_ram_and_in_order() {
    let mut r = rig(false);
    r.set_available(1, &[0]);
    for (address, len) in [(0x10_0000, 1), (0xf_ffff, 2), (u64::MAX, 2), (0, u32::MAX)] {
        r.describe(0x1000, 0, address, len, 0, 0);
        assert_eq!(r.pop_error(), QueueError::Buffer { address, len });
    }
    r.describe(0x1000, 0, 0x8000, 4, 1 | 2, 1);
    r.describe(0x1000, 1, 0x8000, 4, 0, 0);
    assert_eq!(r.pop_error(), QueueError::Order(0));
    // An empty buffer is harmless wherever it points.
    r.describe(0x1000, 0, u64::MAX, 0, 1, 1);
    let chain = r.queue.pop().unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (4, 0));
}

#[test]
fn indirect_tables_are_checked() {
    let mut r = rig(false);
    r.set_available(1, &[0]);
    for (address, len, flags) in [
        (0x9000, 0, 4),
        (0x9000, 15, 4),
        (0x9000, 16 * 9, 4),
        (0xf_fff8, 16, 4),
        (0x9000, 16, 4 | 1),
    ] {
        r.describe(0x1000, 0, address, len, flags, 0);
        assert_eq!(
            r.pop_error(),
            QueueError::Indirect(0),
            "{address:#x} {len} {flags}"
        );
    }
    r.describe(0x1000, 0, 0x9000, 32, 4, 0);
    r.describe(0x9000, 0, 0x8000, 4, 4, 0);
    assert_eq!(r.pop_error(), QueueError::Indirect(0), "nested");
    r.describe(0x9000, 0, 0x8000, 4, 1, 2);
    assert_eq!(r.pop_error(), QueueError::Index(2));
    r.describe(0x9000, 0, 0x8000, 4, 1, 0);
    assert_eq!(r.pop_error(), QueueError::Loop(0));
    r.describe(0x9000, 0, 0x8000, 4, 1, 1);
    r.describe(0x9000, 1, 0x8100, 6, 2, 0);
    let chain = r.queue.pop().unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (4, 6));
    // Not negotiated: refused.
    r.queue = Queue::new(r.ram.clone(), LAYOUT, 8, false, false).unwrap();
    assert_eq!(r.pop_error(), QueueError::Indirect(0));
}

#[test]
fn chains_may_not_describe_4_gib() {
    let ram = Arc::new(
        skerry_hypervisor::memory::GuestRam::from_ranges(&[
            (GuestAddress(0), 1 << 20),
            (GuestAddress(1 << 32), 3 << 30),
        ])
        .unwrap(),
    );
    let queue = Queue::new(ram.clone(), LAYOUT, 8, false, true).unwrap();
    let mut r = Rig { ram, queue };
    r.set_available(1, &[0]);
    r.describe(0x1000, 0, 1 << 32, 0xa000_0000, 1, 1);
    r.describe(0x1000, 1, 1 << 32, 0xa000_0000, 2, 0);
    assert_eq!(r.pop_error(), QueueError::TooLong(0));
}

#[test]
fn indices_wrap_around() {
    let mut r = rig(false);
    r.describe(0x1000, 0, 0x8000, 4, 2, 0);
    r.set_available(0, &[0; 8]);
    for i in 1..=70_000u32 {
        r.set_available(i as u16, &[]);
        let chain = r.queue.pop().unwrap().unwrap();
        assert!(r.queue.pop().unwrap().is_none());
        r.queue.complete(chain, 4).unwrap();
        assert!(r.queue.take_interrupt().unwrap());
    }
    let used: u16 = r.ram.read_obj(GuestAddress(0x3002)).unwrap();
    assert_eq!(used, 70_000u32 as u16);
}

#[test]
fn interrupts_are_suppressed_as_asked() {
    let mut r = rig(false);
    r.describe(0x1000, 0, 0x8000, 4, 2, 0);
    r.set_available(2, &[0, 0]);
    r.ram.write_obj(1u16, GuestAddress(0x2000)).unwrap();
    let chain = r.queue.pop().unwrap().unwrap();
    r.queue.complete(chain, 0).unwrap();
    assert!(!r.queue.take_interrupt().unwrap());

    let mut r = rig(true);
    r.describe(0x1000, 0, 0x8000, 4, 2, 0);
    r.set_available(4, &[0; 4]);
    // Interrupt when the third is used.
    r.ram.write_obj(2u16, GuestAddress(0x2014)).unwrap();
    for expected in [false, false, true, false] {
        let chain = r.queue.pop().unwrap().unwrap();
        r.queue.complete(chain, 0).unwrap();
        assert_eq!(r.queue.take_interrupt().unwrap(), expected);
    }
    // The device asks for a notification at the next available entry.
    assert!(!r.queue.enable_notifications().unwrap());
    let event: u16 = r.ram.read_obj(GuestAddress(0x3044)).unwrap();
    assert_eq!(event, 4);
}

#[test]
fn indirect_and_event_index_through_a_device() {
    let mut guest = FakeGuest::start(rng::RngDevice::new(), u64::MAX, QueueRunner::Inline);
    guest.use_indirect();
    for _ in 0..200 {
        assert_eq!(guest.request(0, &[b"x"], &[8, 0, 8]).1, 16);
    }
    let buffer = guest.buffer(8, true);
    guest.add(0, &[buffer]);
    assert!(
        guest.must_kick(0),
        "the queue is drained: the next chain needs a notification"
    );
}

proptest! {
    /// Whatever is in ring memory: errors or chains inside RAM, no panic.
    #[test]
    fn random_rings(
        seed in proptest::collection::vec(any::<u8>(), 0x200),
        heads in proptest::collection::vec(0u16..10, 8),
        count in 0u16..10,
    ) {
        let mut r = rig(count % 2 == 0);
        // Addresses in RAM mostly, so that walks get somewhere.
        for (i, raw) in seed.chunks(16).enumerate() {
            let mut descriptor = raw.to_vec();
            descriptor[2..8].fill(0);
            if raw[7] > 16 {
                descriptor[9..12].fill(0);
                descriptor[15] = 0;
                descriptor[14] &= 0x0f;
                descriptor[13] = 0;
            }
            let table = if i < 8 { 0x1000 } else { 0x8000 };
            r.ram.write_slice(&descriptor, GuestAddress(table + 16 * (i as u64 % 8))).unwrap();
        }
        r.set_available(count, &heads);
        let mut taken = 0;
        while let Ok(Some(chain)) = r.queue.pop() {
            taken += 1;
            prop_assert!(taken <= 8);
            let ram = r.ram.clone();
            let mut data = vec![0; chain.readable_len().min(1 << 16) as usize];
            chain.reader(&ram).read_exact(&mut data).unwrap();
            // Where the answer lands is the guest's business, even on the rings themselves.
            chain.writer(&ram).write_all(&vec![1; chain.writable_len().min(64) as usize]).unwrap();
            r.queue.complete(chain, 0).unwrap();
            let _ = r.queue.take_interrupt();
        }
    }
}
