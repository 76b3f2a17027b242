//! A guest of a few instructions that speaks to every device in turn, for ever, and rings for them.

use std::io;

use skerry_devices::bus::MmioDevice;
use skerry_devices::virtio::VirtioMmio;

use crate::layout::{IOAPIC_BASE, LAPIC_BASE, VIRTIO_BASE, VIRTIO_STRIDE};

/// Virtio devices of the machine.
pub(super) const DEVICES: u32 = 5;
/// Where the first device's rings lie.
pub(super) const RINGS: u64 = 0x20_0000;
/// Room for those of one device.
pub(super) const RINGS_OF_ONE: u64 = 0x1_0000;
const RINGS_OF_QUEUE: u64 = 0x2000;
/// Where the kernel is loaded.
const LOAD: u32 = 0x10_0000;

/// 32-bit code.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn port_in(&mut self, port: u16) {
        self.0.extend([0x66, 0xba]);
        self.0.extend(port.to_le_bytes());
        self.0.push(0xec);
    }

    fn port_out(&mut self, port: u16, value: u8) {
        self.0.extend([0xb0, value, 0x66, 0xba]);
        self.0.extend(port.to_le_bytes());
        self.0.push(0xee);
    }

    fn load(&mut self, address: u32) {
        self.0.push(0xa1);
        self.0.extend(address.to_le_bytes());
    }

    fn store(&mut self, address: u32, value: u32) {
        self.0.push(0xb8);
        self.0.extend(value.to_le_bytes());
        self.0.push(0xa3);
        self.0.extend(address.to_le_bytes());
    }
}

/// A multiboot kernel (multiboot 0.6.96, 3.1.1, with the address fields).
pub(super) fn kernel(devices: u32) -> Vec<u8> {
    let mut code = Code::default();
    for port in [0x20, 0x21, 0xa0, 0x40, 0x42, 0x43, 0x60, 0x61, 0x64, 0x92] {
        code.port_in(port);
    }
    for port in (0x3f9..0x400).chain([0x2fd, 0x4d0, 0x505]) {
        code.port_in(port);
    }
    code.port_out(0x3f8, b'.');
    for register in [0x00, 0x04, 0x0a, 0x0c, 0x32] {
        code.port_out(0x70, register);
        code.port_in(0x71);
    }
    for port in (0x600..0x614).step_by(4) {
        code.port_in(port);
    }
    for register in [0x20, 0x30, 0x320, 0x390] {
        code.load(LAPIC_BASE + register);
    }
    for register in [0, 0x10, 0x14, 0x3f] {
        code.store(IOAPIC_BASE, register);
        code.load(IOAPIC_BASE + 0x10);
    }
    for device in 0..devices {
        let base = VIRTIO_BASE + device * VIRTIO_STRIDE;
        for register in [0x34, 0x44, 0x60, 0x70, 0xfc, 0x100, 0x104] {
            code.load(base + register);
        }
        for queue in 0..3 {
            code.store(base + 0x50, queue);
        }
        code.store(base + 0x64, 3);
    }
    // Back to the first instruction.
    let back = -(code.0.len() as i32 + 5);
    code.0.push(0xe9);
    code.0.extend(back.to_le_bytes());

    const MAGIC: u32 = 0x1bad_b002;
    const FLAGS: u32 = 1 << 16;
    let checksum = 0_u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS);
    let header = [MAGIC, FLAGS, checksum, LOAD, LOAD, 0, 0, LOAD + 32];
    let mut kernel: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    kernel.append(&mut code.0);
    kernel.resize(4096, 0);
    kernel
}

fn write(device: &VirtioMmio, register: u64, value: u32) {
    MmioDevice::write(device, register, &value.to_le_bytes());
}

fn read(device: &VirtioMmio, register: u64) -> u32 {
    let mut data = [0; 4];
    MmioDevice::read(device, register, &mut data);
    u32::from_le_bytes(data)
}

/// Does what a driver does at its start (virtio 1.3, 3.1.1), with one chain in each queue: a readable
/// buffer and a writable one.
pub(super) fn set_up(
    device: &VirtioMmio,
    base: u64,
    memory: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    write(device, 0x70, 3);
    for half in 0..2 {
        write(device, 0x14, half);
        write(device, 0x24, half);
        write(device, 0x20, read(device, 0x10));
    }
    write(device, 0x70, 0xb);
    for queue in 0..3 {
        write(device, 0x30, queue);
        let size = read(device, 0x34).min(64);
        if size == 0 {
            break;
        }
        let at = base + u64::from(queue) * RINGS_OF_QUEUE;
        let (available, used, buffers) = (at + 0x800, at + 0xc00, at + 0x1000);
        write(device, 0x38, size);
        for (register, address) in [(0x80, at), (0x90, available), (0xa0, used)] {
            write(device, register, address as u32);
            write(device, register + 4, (address >> 32) as u32);
        }
        for (index, place, flags) in [(0, buffers, 1_u16), (1, buffers + 0x100, 2)] {
            let mut descriptor = place.to_le_bytes().to_vec();
            descriptor.extend(256_u32.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend(1_u16.to_le_bytes());
            memory(at + 16 * index, &descriptor)?;
        }
        memory(available, &[0, 0, 1, 0])?;
        write(device, 0x44, 1);
    }
    write(device, 0x70, 0xf);
    Ok(())
}
