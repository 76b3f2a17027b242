//! The test device of PC test kernels (QEMU's `pc-testdev`): ports and memory that keep what is written,
//! and interrupt lines that the guest drives itself.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::bus::{BusError, MmioBusBuilder, MmioDevice, PortBusBuilder, PortDevice};
use crate::chipset::IOAPIC_PINS;
use crate::irq::{InterruptRouter, IrqLine};

/// Four ports that read back what was written, in any width.
const ECHO_PORT: u16 = 0xe0;
/// Writing asks the host to drop a page; harmless where the host has nothing cached.
const FLUSH_PORT: u16 = 0xe4;
/// The same as [`ECHO_PORT`], for byte accesses.
const ECHO_BYTE_PORT: u16 = 0xe8;
/// One port for each interrupt line; bit 0 is its level.
const IRQ_PORT: u16 = 0x2000;
/// Memory that is a device.
const MEMORY: u64 = 0xff00_0000;
const MEMORY_LEN: usize = 0x1_0000;

/// Puts the test device's parts on the buses. It has no state that a snapshot keeps.
pub fn add_test_device(
    router: &Arc<InterruptRouter>,
    ports: &mut PortBusBuilder,
    mmio: &mut MmioBusBuilder,
) -> Result<(), BusError> {
    let bytes = |len| Arc::new(Bytes(Mutex::new(vec![0; len])));
    ports.add("test echo", ECHO_PORT, 4, bytes(4))?;
    ports.add("test flush", FLUSH_PORT, 4, bytes(4))?;
    ports.add("test echo bytes", ECHO_BYTE_PORT, 4, bytes(4))?;
    let lines = (0..IOAPIC_PINS as u32)
        .map(|gsi| router.line(gsi))
        .collect();
    let lines = Arc::new(Lines(lines));
    ports.add("test interrupts", IRQ_PORT, IOAPIC_PINS as u16, lines)?;
    mmio.add("test memory", MEMORY, MEMORY_LEN as u64, bytes(MEMORY_LEN))
}

/// Registers without meaning.
struct Bytes(Mutex<Vec<u8>>);

impl Bytes {
    fn load(&self, offset: usize, data: &mut [u8]) {
        let bytes = self.0.lock();
        if let Some(part) = offset
            .checked_add(data.len())
            .and_then(|end| bytes.get(offset..end))
        {
            data.copy_from_slice(part);
        }
    }

    fn store(&self, offset: usize, data: &[u8]) {
        let mut bytes = self.0.lock();
        let end = offset.checked_add(data.len());
        if let Some(part) = end.and_then(|end| bytes.get_mut(offset..end)) {
            part.copy_from_slice(data);
        }
    }
}

impl PortDevice for Bytes {
    fn read(&self, offset: u16, data: &mut [u8]) {
        self.load(offset.into(), data);
    }

    fn write(&self, offset: u16, data: &[u8]) {
        self.store(offset.into(), data);
    }
}

impl MmioDevice for Bytes {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.load(offset as usize, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.store(offset as usize, data);
    }
}

/// Interrupt lines, one a port.
struct Lines(Vec<IrqLine>);

impl PortDevice for Lines {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if let (Some(line), Some(value)) = (self.0.get(usize::from(offset)), data.first()) {
            line.set(value & 1 != 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::{DualPic, IoApic};
    use crate::irq::testing::{MsiLog, NoExtInt};

    #[test]
    fn echoes_and_interrupts() {
        let log = Arc::new(MsiLog::default());
        let ioapic = IoApic::new(0, log.clone());
        let router = InterruptRouter::new(DualPic::new(Arc::new(NoExtInt)), ioapic.clone());
        let (mut ports, mut mmio) = (PortBusBuilder::new(), MmioBusBuilder::new());
        add_test_device(&router, &mut ports, &mut mmio).unwrap();
        let (ports, mmio) = (ports.build(), mmio.build());

        ports.write(ECHO_PORT, &0x1234_5678u32.to_le_bytes());
        ports.write(ECHO_PORT, &[0x99]);
        let mut data = [0; 4];
        assert!(ports.read(ECHO_PORT, &mut data));
        assert_eq!(u32::from_le_bytes(data), 0x1234_5699);
        mmio.write(MEMORY + 0xfff8, &7u64.to_le_bytes());
        let mut data = [0; 8];
        assert!(mmio.read(MEMORY + 0xfff8, &mut data));
        assert_eq!(u64::from_le_bytes(data), 7);

        ioapic.write_register(0x10 + 2 * 14, 0x55);
        ports.write(IRQ_PORT + 14, &[1]);
        ports.write(IRQ_PORT + 14, &[0]);
        assert_eq!(log.0.lock().len(), 1);
    }
}
