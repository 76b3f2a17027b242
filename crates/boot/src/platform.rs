//! What a machine has, as the tables that describe it need to know it.

/// A 16550 on the ISA bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SerialPort {
    /// First of eight ports.
    pub port: u16,
    /// ISA interrupt.
    pub irq: u8,
}

/// A virtio device behind the MMIO transport (virtio 1.3 §4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// First address of its registers, below 4 GiB.
    pub base: u32,
    /// Bytes of its registers.
    pub len: u32,
    /// Global system interrupt, level-triggered, active high.
    pub gsi: u32,
}

/// The fixed ACPI hardware (ACPI §4.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerManagement {
    /// PM1 event block, 4 bytes.
    pub pm1_event: u16,
    /// PM1 control block, 2 bytes.
    pub pm1_control: u16,
    /// Power-management timer, 4 bytes, 32 bits wide.
    pub timer: u16,
    /// General-purpose event block 0.
    pub gpe0: u16,
    /// Its bytes.
    pub gpe0_len: u8,
    /// ISA interrupt of the SCI, level-triggered, active high.
    pub sci: u8,
    /// `SLP_TYP` that powers off.
    pub s5_sleep_type: u8,
    /// Reset register.
    pub reset_port: u16,
    /// What resets when written there.
    pub reset_value: u8,
}

/// A machine for [`crate::acpi::write`] and [`crate::mptable::write`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// Processors; their APIC ids count from 0.
    pub cpus: u32,
    /// Address of the local APICs.
    pub lapic_base: u32,
    /// Address of the I/O APIC.
    pub ioapic_base: u32,
    /// Its id.
    pub ioapic_id: u8,
    /// Its pins.
    pub ioapic_pins: u32,
    /// Power management.
    pub power: PowerManagement,
    /// Serial ports, COM1 first.
    pub serial: Vec<SerialPort>,
    /// Real-time clock: first of two ports. Interrupt 8.
    pub rtc_port: u16,
    /// CMOS index of the century.
    pub rtc_century: u8,
    /// Panic notification port, if there is one.
    pub panic_port: Option<u16>,
    /// Virtio devices in the order in which a guest should find them.
    pub virtio: Vec<VirtioMmio>,
    /// General-purpose event that tells of a new VM generation id at
    /// [`layout::GENERATION_ID`](crate::layout::GENERATION_ID), if the machine has one.
    pub generation_event: Option<u8>,
}

#[cfg(test)]
pub(crate) fn sample(cpus: u32) -> Platform {
    Platform {
        cpus,
        lapic_base: 0xfee0_0000,
        ioapic_base: 0xfec0_0000,
        ioapic_id: 0,
        ioapic_pins: 24,
        power: PowerManagement {
            pm1_event: 0x600,
            pm1_control: 0x604,
            timer: 0x608,
            gpe0: 0x610,
            gpe0_len: 4,
            sci: 9,
            s5_sleep_type: 5,
            reset_port: 0xcf9,
            reset_value: 6,
        },
        serial: vec![
            SerialPort {
                port: 0x3f8,
                irq: 4,
            },
            SerialPort {
                port: 0x2f8,
                irq: 3,
            },
        ],
        rtc_port: 0x70,
        rtc_century: 0x32,
        panic_port: Some(0x505),
        virtio: (0..10)
            .map(|n| VirtioMmio {
                base: 0xd000_0000 + n * 0x1000,
                len: 0x1000,
                gsi: 16 + n % 8,
            })
            .collect(),
        generation_event: Some(5),
    }
}
