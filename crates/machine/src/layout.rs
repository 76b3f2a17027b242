//! Addresses and interrupts of the machine's devices: fixed, so that snapshots travel.
//!
//! ```text
//!  ISA ports   PIC 0x20 0xa0 0x4d0   PIT 0x40 0x61   i8042 0x60 0x64   RTC 0x70   POST 0x80
//!              A20 0x92   COM 0x3f8 0x2f8 0x3e8 0x2e8   panic 0x505   ACPI 0x600   PCI stub 0xcf8
//!  MMIO        virtio 0xd000_0000 + n × 0x1000   I/O APIC 0xfec0_0000   local APIC 0xfee0_0000
//!  RAM         VM generation id 0xf_f000, event GPE 5
//!  GSI         0 PIT (pin 2)   1, 12 i8042   3, 4 COM   8 RTC   9 SCI   16–23 virtio
//! ```

use skerry_boot::platform::{PowerManagement, SerialPort, VirtioMmio};
use skerry_boot::{MemoryMap, Platform};
use skerry_devices::chipset::{IOAPIC_PINS, NoPci, PanicNotifier, RTC_CENTURY, Rtc, acpi};
use skerry_devices::serial::COM_PORTS;

use crate::MachineConfig;

/// Most processors of one machine: their ids must fit the MADT's place and the I/O APIC's byte.
pub const MAX_CPUS: u32 = 255;
/// Most memory of one machine, in bytes: what is kept per page stays small beside it.
pub const MAX_MEMORY: u64 = 1 << 40;
/// Local APICs.
pub const LAPIC_BASE: u32 = 0xfee0_0000;
/// I/O APIC.
pub const IOAPIC_BASE: u32 = 0xfec0_0000;
/// Id of the I/O APIC.
pub const IOAPIC_ID: u8 = 0;
/// Registers of the first virtio device.
pub const VIRTIO_BASE: u32 = 0xd000_0000;
/// From one virtio device to the next.
pub const VIRTIO_STRIDE: u32 = 0x1000;
/// Virtio devices that a machine can have.
pub const VIRTIO_SLOTS: usize = 64;
/// First of the interrupts that virtio devices share in turn.
pub const VIRTIO_FIRST_GSI: u32 = 16;
/// ACPI power management block.
pub const ACPI_PORT: u16 = 0x600;
/// System control interrupt.
pub const SCI: u32 = 9;
/// General-purpose event of a new VM generation id.
pub const GENERATION_EVENT: u8 = 5;
/// Keyboard and mouse interrupts of the i8042.
pub const I8042_IRQS: (u32, u32) = (1, 12);
/// The RTC's interrupt.
pub const RTC_IRQ: u32 = 8;

/// Registers and interrupt of the virtio device in `slot`.
pub fn virtio_slot(slot: usize) -> VirtioMmio {
    let slot = slot as u32;
    let lines = IOAPIC_PINS as u32 - VIRTIO_FIRST_GSI;
    VirtioMmio {
        base: VIRTIO_BASE + slot * VIRTIO_STRIDE,
        len: VIRTIO_STRIDE,
        gsi: VIRTIO_FIRST_GSI + slot % lines,
    }
}

/// The machine as its tables describe it.
pub fn platform(config: &MachineConfig, virtio_devices: usize) -> Platform {
    let ports = COM_PORTS
        .iter()
        .zip(config.serial)
        .filter(|(_, present)| *present);
    Platform {
        cpus: config.cpus,
        lapic_base: LAPIC_BASE,
        ioapic_base: IOAPIC_BASE,
        ioapic_id: IOAPIC_ID,
        ioapic_pins: IOAPIC_PINS as u32,
        power: PowerManagement {
            pm1_event: ACPI_PORT + acpi::layout::PM1_EVENT,
            pm1_control: ACPI_PORT + acpi::layout::PM1_CONTROL,
            timer: ACPI_PORT + acpi::layout::PM_TIMER,
            gpe0: ACPI_PORT + acpi::layout::GPE0,
            gpe0_len: acpi::layout::GPE0_LEN,
            sci: SCI as u8,
            s5_sleep_type: acpi::SLEEP_TYPE_S5,
            reset_port: NoPci::RESET_PORT,
            reset_value: NoPci::RESET_VALUE,
        },
        serial: ports
            .map(|((port, irq), _)| SerialPort {
                port: *port,
                irq: *irq as u8,
            })
            .collect(),
        rtc_port: Rtc::PORT,
        rtc_century: RTC_CENTURY,
        panic_port: Some(PanicNotifier::PORT),
        virtio: (0..virtio_devices).map(virtio_slot).collect(),
        generation_event: config.generation_id.then_some(GENERATION_EVENT),
    }
}

/// What the BIOS of a PC leaves in CMOS about memory: index and value.
pub(crate) fn cmos_memory(map: &MemoryMap) -> [(u8, u8); 9] {
    let kib_above_1m = ((map.low_end() >> 10) - 1024).min(0xffff) as u16;
    let above_16m = (map.low_end().saturating_sub(16 << 20) >> 16).min(0xffff) as u16;
    let above_4g = (map.size() - map.low_end()) >> 16;
    let [ext_low, ext_high] = kib_above_1m.to_le_bytes();
    let [high_low, high_high] = above_16m.to_le_bytes();
    let above_4g = (above_4g.min(0xff_ffff) as u32).to_le_bytes();
    [
        (0x17, ext_low),
        (0x18, ext_high),
        (0x30, ext_low),
        (0x31, ext_high),
        (0x34, high_low),
        (0x35, high_high),
        (0x5b, above_4g[0]),
        (0x5c, above_4g[1]),
        (0x5d, above_4g[2]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_stay_in_the_hole_and_on_pins() {
        for slot in 0..VIRTIO_SLOTS {
            let device = virtio_slot(slot);
            assert!(device.base + device.len <= IOAPIC_BASE);
            assert!((16..24).contains(&device.gsi));
        }
        let (first, second) = (virtio_slot(0), virtio_slot(1));
        assert_eq!((first.base, first.gsi), (0xd000_0000, 16));
        assert_eq!((second.base, second.gsi), (0xd000_1000, 17));
    }

    #[test]
    fn cmos_tells_of_eight_gib() {
        let cmos = cmos_memory(&MemoryMap::new(8 << 30).unwrap());
        let get = |index| cmos.iter().find(|(i, _)| *i == index).unwrap().1;
        let high = u32::from(get(0x5b)) | u32::from(get(0x5c)) << 8 | u32::from(get(0x5d)) << 16;
        assert_eq!(u64::from(high) << 16, 5 << 30);
        assert_eq!((get(0x30), get(0x31)), (0xff, 0xff));
    }
}
