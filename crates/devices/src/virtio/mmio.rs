//! The MMIO transport (virtio 1.3, 4.2), version 2.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use skerry_hypervisor::memory::GuestRam;

use super::{
    DeviceState, F_EVENT_IDX, F_INDIRECT_DESC, F_RING_RESET, F_VERSION_1, Queue, QueueEngine,
    QueueError, QueueLayout, QueueRunner, QueueState, RING_FEATURES, VirtioDevice,
};
use crate::bus::MmioDevice;
use crate::irq::IrqLine;
use crate::state::{StateError, require};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// Tells the maker of the device; drivers ignore it.
const VENDOR: u32 = u32::from_le_bytes(*b"SKRY");

const REG_MAGIC: u64 = 0x000;
const REG_VERSION: u64 = 0x004;
const REG_DEVICE_ID: u64 = 0x008;
const REG_VENDOR_ID: u64 = 0x00c;
const REG_DEVICE_FEATURES: u64 = 0x010;
const REG_DEVICE_FEATURES_SEL: u64 = 0x014;
const REG_DRIVER_FEATURES: u64 = 0x020;
const REG_DRIVER_FEATURES_SEL: u64 = 0x024;
const REG_QUEUE_SEL: u64 = 0x030;
const REG_QUEUE_SIZE_MAX: u64 = 0x034;
const REG_QUEUE_SIZE: u64 = 0x038;
const REG_QUEUE_READY: u64 = 0x044;
const REG_QUEUE_NOTIFY: u64 = 0x050;
const REG_INTERRUPT_STATUS: u64 = 0x060;
const REG_INTERRUPT_ACK: u64 = 0x064;
const REG_STATUS: u64 = 0x070;
const REG_QUEUE_DESC_LOW: u64 = 0x080;
const REG_QUEUE_DESC_HIGH: u64 = 0x084;
const REG_QUEUE_DRIVER_LOW: u64 = 0x090;
const REG_QUEUE_DRIVER_HIGH: u64 = 0x094;
const REG_QUEUE_DEVICE_LOW: u64 = 0x0a0;
const REG_QUEUE_DEVICE_HIGH: u64 = 0x0a4;
const REG_SHM_FIRST: u64 = 0x0b0;
const REG_SHM_LAST: u64 = 0x0bc;
const REG_QUEUE_RESET: u64 = 0x0c0;
const REG_CONFIG_GENERATION: u64 = 0x0fc;
const REG_CONFIG: u64 = 0x100;

const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_NEEDS_RESET: u32 = 0x40;
/// The bits a driver sets: acknowledge, driver, driver OK, features OK, failed.
const STATUS_DRIVER_BITS: u32 = 0x8f;

/// One queue as the driver set it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
struct QueueSetup {
    layout: QueueLayout,
    ready: bool,
}

/// The registers that a driver writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueSetup>,
}

/// The state of a transport and its device, for a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioMmioState {
    registers: Registers,
    /// Indices of the queues that were live.
    queues: Vec<Option<QueueState>>,
    interrupt_status: u32,
    device: DeviceState,
}

/// A virtio device at a guest-physical address.
pub struct VirtioMmio {
    engine: Arc<QueueEngine>,
    registers: Mutex<Registers>,
}

impl VirtioMmio {
    /// Bytes of address space the device takes.
    pub const MMIO_LEN: u64 = 0x1000;

    /// Puts `device` behind an MMIO transport. `runner` says where notifications are served.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        irq: IrqLine,
        runner: QueueRunner,
    ) -> std::io::Result<Arc<Self>> {
        let registers = Mutex::new(Registers::new(&*device));
        let engine = QueueEngine::new(device, ram, irq, runner)?;
        Ok(Arc::new(Self { engine, registers }))
    }

    /// The live half, for a machine that delivers notifications by other means (eventfd).
    pub const fn engine(&self) -> &Arc<QueueEngine> {
        &self.engine
    }

    /// Stops serving queues; none is under way when this returns.
    pub fn pause(&self) {
        self.engine.pause();
    }

    /// Serves queues again.
    pub fn resume(&self) {
        self.engine.resume();
    }

    /// Serves what the guest left behind when its processors ended, for `patience` at the most.
    pub fn finish(&self, patience: Duration) {
        self.engine.finish(patience);
    }

    /// Resets the device as a driver would by writing 0 to the status.
    pub fn reset(&self) {
        self.reset_locked(&mut self.registers.lock());
    }

    /// Ends the device for good: its queues stop, and host threads that wait for the guest wake up.
    pub fn close(&self) {
        self.engine.pause();
        self.engine.shut_down();
        self.device().close();
    }

    fn device(&self) -> &dyn VirtioDevice {
        self.engine.device()
    }

    fn offered(&self) -> u64 {
        self.device().features() | RING_FEATURES
    }

    fn reset_locked(&self, registers: &mut Registers) {
        *registers = Registers::new(self.device());
        self.engine.reset();
        self.device().reset();
    }

    fn write_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            self.reset_locked(registers);
            return;
        }
        let mut new = registers.status | (value & STATUS_DRIVER_BITS);
        let added = new & !registers.status;
        let mut activate = false;
        if added & STATUS_FEATURES_OK != 0 {
            let accepted = registers.driver_features & !self.offered() == 0
                && registers.driver_features & F_VERSION_1 != 0;
            if !accepted {
                // The driver reads the status back to learn of it (virtio 1.3, 3.1.1).
                new &= !STATUS_FEATURES_OK;
            }
        }
        if added & STATUS_DRIVER_OK != 0 {
            if new & STATUS_FEATURES_OK == 0 {
                new &= !STATUS_DRIVER_OK;
            } else {
                activate = true;
            }
        }
        registers.status = new;
        if activate {
            self.device().activate(registers.driver_features);
            for index in 0..registers.queues.len() {
                self.start_queue(registers, index);
            }
            self.engine.kick_all();
        }
    }

    fn build_queue(&self, registers: &Registers, index: usize) -> Result<Queue, QueueError> {
        let layout = registers
            .queues
            .get(index)
            .map(|setup| setup.layout)
            .unwrap_or_default();
        let max = self.device().queue_sizes().get(index).copied().unwrap_or(0);
        let features = registers.driver_features;
        Queue::new(
            self.engine.ram().clone(),
            layout,
            max,
            features & F_EVENT_IDX != 0,
            features & F_INDIRECT_DESC != 0,
        )
    }

    /// Makes a ready queue live once the driver is.
    fn start_queue(&self, registers: &mut Registers, index: usize) {
        if !registers.is_live(index) {
            return;
        }
        match self.build_queue(registers, index) {
            Ok(queue) => self.engine.set_queue(index, Some(queue)),
            Err(error) => self.engine.fail(&error),
        }
    }

    fn write_ready(&self, registers: &mut Registers, value: u32) {
        let index = registers.queue_sel as usize;
        let features_ok = registers.status & STATUS_FEATURES_OK != 0;
        let Some(setup) = registers.queues.get_mut(index) else {
            return;
        };
        if value & 1 == 0 {
            setup.ready = false;
            self.engine.set_queue(index, None);
        } else if features_ok && !setup.ready {
            setup.ready = true;
            if let Err(error) = self.build_queue(registers, index) {
                registers.queues[index].ready = false;
                self.engine.fail(&error);
                return;
            }
            self.start_queue(registers, index);
        }
    }

    fn write_queue_reset(&self, registers: &mut Registers, value: u32) {
        let index = registers.queue_sel as usize;
        if value & 1 != 0
            && registers.driver_features & F_RING_RESET != 0
            && let Some(setup) = registers.queues.get_mut(index)
        {
            *setup = QueueSetup::default();
            self.engine.set_queue(index, None);
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            REG_MAGIC => return MAGIC,
            REG_VERSION => return VERSION,
            REG_DEVICE_ID => return self.device().kind() as u32,
            REG_VENDOR_ID => return VENDOR,
            REG_INTERRUPT_STATUS => return self.engine.interrupt_status(),
            REG_CONFIG_GENERATION => return self.engine.config_generation(),
            // No shared memory regions: length and base of any of them are -1 (4.2.2).
            REG_SHM_FIRST..=REG_SHM_LAST => return u32::MAX,
            _ => {}
        }
        let registers = self.registers.lock();
        let index = registers.queue_sel as usize;
        match offset {
            REG_DEVICE_FEATURES => match registers.device_features_sel {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            REG_QUEUE_SIZE_MAX => self
                .device()
                .queue_sizes()
                .get(index)
                .copied()
                .unwrap_or(0)
                .into(),
            REG_QUEUE_READY => registers
                .queues
                .get(index)
                .is_some_and(|setup| setup.ready)
                .into(),
            // A queue's reset is complete when the write to this register returns.
            REG_QUEUE_RESET => 0,
            REG_STATUS => {
                let broken = self.engine.is_broken();
                registers.status | if broken { STATUS_NEEDS_RESET } else { 0 }
            }
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        // The hot registers come first and take no lock of the transport.
        match offset {
            REG_QUEUE_NOTIFY => return self.engine.kick(value as usize),
            REG_INTERRUPT_ACK => return self.engine.acknowledge(value),
            _ => {}
        }
        let mut registers = self.registers.lock();
        match offset {
            REG_DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            REG_DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            REG_DRIVER_FEATURES => registers.write_driver_features(value),
            REG_QUEUE_SEL => registers.queue_sel = value,
            REG_QUEUE_READY => self.write_ready(&mut registers, value),
            REG_QUEUE_RESET => self.write_queue_reset(&mut registers, value),
            REG_STATUS => self.write_status(&mut registers, value),
            _ => registers.write_layout(offset, value),
        }
    }

    /// The state for a snapshot; the transport must be paused.
    pub fn save(&self) -> VirtioMmioState {
        let registers = self.registers.lock().clone();
        let queues = (0..registers.queues.len())
            .map(|index| self.engine.with_queue(index, Queue::save))
            .collect();
        VirtioMmioState {
            registers,
            queues,
            interrupt_status: self.engine.interrupt_status(),
            device: self.device().save(),
        }
    }

    /// Puts a saved state back into a paused transport over the same device and memory.
    pub fn restore(&self, saved: VirtioMmioState) -> Result<(), StateError> {
        let VirtioMmioState {
            registers,
            queues,
            interrupt_status,
            device,
        } = saved;
        let count = self.device().queue_sizes().len();
        let fits = registers.queues.len() == count && queues.len() == count;
        require(fits, "virtio", "the device has another number of queues")?;
        let unknown = registers.driver_features & !self.offered();
        require(
            unknown == 0,
            "virtio",
            "it uses features that the device does not offer",
        )?;
        registers.check()?;
        let mut current = self.registers.lock();
        self.engine.reset();
        self.device().restore(device)?;
        if registers.status & STATUS_DRIVER_OK != 0 {
            self.device().activate(registers.driver_features);
        }
        for (index, indices) in queues.into_iter().enumerate() {
            if let Some(indices) = indices {
                let live = registers.is_live(index);
                require(live, "virtio", "a queue is in use that was not set up")?;
                let mut queue = self
                    .build_queue(&registers, index)
                    .map_err(|error| StateError::new("virtio", error.to_string()))?;
                queue.restore(indices)?;
                self.engine.set_queue(index, Some(queue));
            }
        }
        self.engine.restore_interrupt(interrupt_status);
        *current = registers;
        Ok(())
    }
}

impl Registers {
    fn new(device: &dyn VirtioDevice) -> Self {
        Self {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: vec![QueueSetup::default(); device.queue_sizes().len()],
        }
    }

    /// Whether the device may use queue `index`.
    fn is_live(&self, index: usize) -> bool {
        self.status & STATUS_DRIVER_OK != 0
            && self.queues.get(index).is_some_and(|setup| setup.ready)
    }

    /// Refuses a status that no driver can have reached.
    fn check(&self) -> Result<(), StateError> {
        let has = |bit| self.status & bit != 0;
        let modern = self.driver_features & F_VERSION_1 != 0;
        let possible = self.status & !STATUS_DRIVER_BITS == 0
            && (has(STATUS_FEATURES_OK) || !has(STATUS_DRIVER_OK))
            && (modern || !has(STATUS_FEATURES_OK));
        require(possible, "virtio", "no driver can have set its status")
    }

    fn write_driver_features(&mut self, value: u32) {
        // Features are fixed once the device has accepted them.
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let low = u64::from(u32::MAX);
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !low | u64::from(value),
            1 => self.driver_features = self.driver_features & low | u64::from(value) << 32,
            _ => {}
        }
    }

    /// Size and addresses of the selected queue, which must not be ready.
    fn write_layout(&mut self, offset: u64, value: u32) {
        let Some(setup) = self.queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        if setup.ready {
            return;
        }
        let layout = &mut setup.layout;
        let low = |old: u64| old & !u64::from(u32::MAX) | u64::from(value);
        let high = |old: u64| old & u64::from(u32::MAX) | u64::from(value) << 32;
        match offset {
            // A size that doesn't fit can't be valid: 0 is refused when the queue is made ready.
            REG_QUEUE_SIZE => layout.size = u16::try_from(value).unwrap_or(0),
            REG_QUEUE_DESC_LOW => layout.descriptors = low(layout.descriptors),
            REG_QUEUE_DESC_HIGH => layout.descriptors = high(layout.descriptors),
            REG_QUEUE_DRIVER_LOW => layout.available = low(layout.available),
            REG_QUEUE_DRIVER_HIGH => layout.available = high(layout.available),
            REG_QUEUE_DEVICE_LOW => layout.used = low(layout.used),
            REG_QUEUE_DEVICE_HIGH => layout.used = high(layout.used),
            _ => {}
        }
    }
}

impl MmioDevice for VirtioMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= REG_CONFIG {
            self.device().read_config(offset - REG_CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        } else {
            // Registers take aligned 32-bit accesses only (4.2.2.2).
            data.fill(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= REG_CONFIG {
            self.device().write_config(offset - REG_CONFIG, data);
        } else if let (Ok(bytes), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
    }
}

impl std::fmt::Debug for VirtioMmio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioMmio")
            .field("registers", &*self.registers.lock())
            .field("engine", &self.engine)
            .finish()
    }
}

impl Drop for VirtioMmio {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::rng::RngDevice;
    use crate::virtio::testing::{FakeGuest, STATUS_OK};

    #[test]
    fn states_that_no_driver_can_make_are_refused() {
        let guest = FakeGuest::start(RngDevice::new(), u64::MAX, QueueRunner::Inline);
        guest.mmio.pause();
        let saved = guest.mmio.save();
        assert_eq!(saved.registers.status, STATUS_OK);
        guest.mmio.restore(saved.clone()).unwrap();
        let cases: [fn(&mut VirtioMmioState); 9] = [
            |s| s.registers.status = STATUS_NEEDS_RESET | STATUS_OK,
            |s| s.registers.status &= !STATUS_FEATURES_OK,
            |s| s.registers.status = 3,
            |s| s.registers.driver_features &= !F_VERSION_1,
            |s| s.registers.driver_features |= 1 << 63,
            |s| s.registers.queues[0].ready = false,
            |s| s.registers.queues[0].layout.used = u64::MAX - 3,
            |s| s.queues.clear(),
            |s| s.queues[0].as_mut().unwrap().next_used ^= 0x8000,
        ];
        for (number, change) in cases.iter().enumerate() {
            let mut bad = saved.clone();
            change(&mut bad);
            assert!(guest.mmio.restore(bad).is_err(), "case {number}");
        }
        guest.mmio.restore(saved.clone()).unwrap();
        assert_eq!(guest.mmio.save(), saved);
    }
}
