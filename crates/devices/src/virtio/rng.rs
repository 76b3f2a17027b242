//! The entropy device (virtio 1.3, 5.4): fills what the driver offers from the host's generator.

use std::sync::Arc;

use super::{DeviceKind, DeviceState, Queue, QueueError, Served, VirtioDevice};
use crate::state::StateError;

/// Bytes fetched from the host at a time.
const BLOCK: usize = 4096;
/// No request gets more than this, however large its buffer: the driver asks again.
const MAX_REQUEST: u32 = 64 * 1024;

/// The entropy device.
#[derive(Debug, Default)]
pub struct RngDevice;

impl RngDevice {
    /// An entropy device.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }
}

impl VirtioDevice for RngDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn process(&self, _index: usize, queue: &mut Queue) -> Result<Served, QueueError> {
        let ram = queue.ram().clone();
        let mut block = [0; BLOCK];
        while let Some(chain) = queue.pop()? {
            let mut writer = chain.writer(&ram);
            let mut written = 0;
            while written < chain.writable_len().min(MAX_REQUEST) {
                let len = BLOCK.min((chain.writable_len().min(MAX_REQUEST) - written) as usize);
                let part = &mut block[..len];
                if let Err(error) = getrandom::fill(part) {
                    tracing::warn!(%error, "The host gave no entropy; the guest gets a short answer");
                    break;
                }
                writer.write_all(part)?;
                written += len as u32;
            }
            queue.complete(chain, written)?;
        }
        Ok(Served::Drained)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng
    }

    fn restore(&self, saved: DeviceState) -> Result<(), StateError> {
        match saved {
            DeviceState::Rng => Ok(()),
            _ => Err(StateError::new(
                "virtio-rng",
                "it belongs to another kind of device",
            )),
        }
    }
}
