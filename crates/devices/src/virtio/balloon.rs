//! The memory balloon (virtio 1.3, 5.5), for free page reporting: what the guest has no use for goes
//! back to the host, which gives it again when it is touched.
//!
//! The driver offers free pages as device-writable buffers and leaves them alone until they are used
//! (5.5.6.7). Nothing is written into them: the host takes them away, and what is read there next is
//! something that was there before, or zero. `VIRTIO_BALLOON_F_PAGE_POISON` is not offered, so that a
//! driver that relies on what is in free pages reports none.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::{DeviceKind, DeviceState, Queue, QueueError, Served, VirtioDevice, read_config_bytes};
use crate::state::StateError;

/// Free pages are reported (virtio 1.3, 5.5.3).
const F_REPORTING: u64 = 1 << 5;
/// The queues that there are without statistics and hints: `inflateq`, `deflateq`, `reporting_vq`.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Linux reports up to 32 pieces at a time, in one chain.
const SIZES: [u16; 3] = [64, 64, 64];
/// What pages are counted in, whatever the guest's are (5.5.6).
const PAGE: u64 = 4096;
/// Page numbers that are read at a time.
const NUMBERS: usize = 256;

/// Takes memory away from the guest.
pub trait MemorySink: Send + Sync {
    /// Gives `len` bytes of guest memory at `address`, whole pages, back to the host. What lies outside
    /// of RAM is left out.
    fn give_back(&self, address: u64, len: u64);
}

/// The saved state of a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {
    /// Pages that the driver says it has given up.
    pub actual: u32,
}

/// The memory balloon.
pub struct BalloonDevice {
    sink: Arc<dyn MemorySink>,
    actual: AtomicU32,
    reported: AtomicU64,
}

impl std::fmt::Debug for BalloonDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BalloonDevice")
            .field("actual", &self.actual)
            .field("reported", &self.reported)
            .finish_non_exhaustive()
    }
}

impl BalloonDevice {
    /// A balloon of no size, whose guest's free memory goes to `sink`.
    pub fn new(sink: Arc<dyn MemorySink>) -> Arc<Self> {
        Arc::new(Self {
            sink,
            actual: AtomicU32::new(0),
            reported: AtomicU64::new(0),
        })
    }

    /// Bytes that were given back so far.
    pub fn given_back(&self) -> u64 {
        self.reported.load(Ordering::Relaxed)
    }

    fn give_back(&self, address: u64, len: u64) {
        self.sink.give_back(address, len);
        self.reported.fetch_add(len, Ordering::Relaxed);
    }

    /// The whole pages of the buffers that the driver offers.
    fn report(&self, chain: &super::Chain) {
        for segment in chain.writable() {
            let end = segment.address.saturating_add(u64::from(segment.len));
            let (first, end) = (segment.address.next_multiple_of(PAGE), end / PAGE * PAGE);
            if first < end {
                self.give_back(first, end - first);
            }
        }
    }

    /// Pages by number, 32 bits each (5.5.6.1). The balloon never asks for any, and takes what it gets.
    fn inflate(&self, chain: &super::Chain, queue: &Queue) -> Result<(), QueueError> {
        let ram = queue.ram().clone();
        let mut reader = chain.reader(&ram);
        let mut bytes = [0; NUMBERS * 4];
        while reader.remaining() >= 4 {
            let len = bytes.len().min(reader.remaining() as usize / 4 * 4);
            let part = bytes.get_mut(..len).unwrap_or_default();
            reader.read_exact(part)?;
            for number in part.as_chunks::<4>().0 {
                self.give_back(u64::from(u32::from_le_bytes(*number)) * PAGE, PAGE);
            }
        }
        Ok(())
    }
}

impl VirtioDevice for BalloonDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        let actual = self.actual.load(Ordering::Relaxed).to_le_bytes();
        config[4..].copy_from_slice(&actual);
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        // Of the fields, the driver writes `actual` only (5.5.4), at once.
        if let (4, Ok(actual)) = (offset, data.try_into()) {
            self.actual
                .store(u32::from_le_bytes(actual), Ordering::Relaxed);
        }
    }

    fn reset(&self) {
        self.actual.store(0, Ordering::Relaxed);
    }

    fn process(&self, index: usize, queue: &mut Queue) -> Result<Served, QueueError> {
        while let Some(chain) = queue.pop()? {
            match index {
                INFLATE => self.inflate(&chain, queue)?,
                // Its memory is there again as soon as it is touched.
                DEFLATE => {}
                _ => self.report(&chain),
            }
            queue.complete(chain, 0)?;
        }
        Ok(Served::Drained)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(BalloonState {
            actual: self.actual.load(Ordering::Relaxed),
        })
    }

    fn restore(&self, saved: DeviceState) -> Result<(), StateError> {
        let DeviceState::Balloon(BalloonState { actual }) = saved else {
            let problem = "it belongs to another kind of device";
            return Err(StateError::new("virtio-balloon", problem));
        };
        self.actual.store(actual, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod recording {
    //! A sink that keeps books.

    use parking_lot::Mutex;

    use super::MemorySink;

    #[derive(Debug, Default)]
    pub(crate) struct Recorder(pub(crate) Mutex<Vec<(u64, u64)>>);

    impl MemorySink for Recorder {
        fn give_back(&self, address: u64, len: u64) {
            assert!(address.is_multiple_of(super::PAGE) && len.is_multiple_of(super::PAGE));
            assert!(len > 0);
            self.0.lock().push((address, len));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::recording::Recorder;
    use super::*;
    use crate::virtio::QueueRunner;
    use crate::virtio::testing::FakeGuest;

    const REPORT: usize = 2;

    #[test]
    fn whole_pages_of_reports_go_back() {
        let sink = Arc::new(Recorder::default());
        let device = BalloonDevice::new(sink.clone());
        let mut guest = FakeGuest::start(device.clone(), u64::MAX, QueueRunner::Inline);
        guest.request(REPORT, &[], &[3 * 4096 + 100, 100]);
        let told = sink.0.lock().clone();
        let total: u64 = told.iter().map(|(_, len)| len).sum();
        assert!((2 * 4096..=3 * 4096).contains(&total), "{told:?}");
        assert_eq!(device.given_back(), total);
    }

    #[test]
    fn page_numbers_go_back_and_may_be_any() {
        let sink = Arc::new(Recorder::default());
        let device = BalloonDevice::new(sink.clone());
        let mut guest = FakeGuest::start(device, u64::MAX, QueueRunner::Inline);
        let mut numbers = 7_u32.to_le_bytes().to_vec();
        numbers.extend(u32::MAX.to_le_bytes());
        numbers.push(1);
        guest.request(INFLATE, &[&numbers], &[]);
        guest.request(DEFLATE, &[&numbers], &[]);
        let last = u64::from(u32::MAX) * 4096;
        assert_eq!(*sink.0.lock(), [(7 * 4096, 4096), (last, 4096)]);
    }

    #[test]
    fn what_the_driver_says_is_kept() {
        let device = BalloonDevice::new(Arc::new(Recorder::default()));
        device.write_config(4, &5_u32.to_le_bytes());
        device.write_config(0, &9_u32.to_le_bytes());
        let saved = device.save();
        assert_eq!(saved, DeviceState::Balloon(BalloonState { actual: 5 }));
        device.reset();
        device.restore(saved).expect("its own");
        let mut config = [0; 12];
        device.read_config(0, &mut config);
        assert_eq!(config, [0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert!(device.restore(DeviceState::Rng).is_err());
    }
}
