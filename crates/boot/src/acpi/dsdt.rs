//! The DSDT's AML: devices that a guest can't find by probing, and how to power off.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};

use crate::platform::{Platform, SerialPort, VirtioMmio};

/// Everything below the root.
pub(super) fn aml(platform: &Platform) -> Vec<u8> {
    let mut devices = Vec::new();
    for (unit, serial) in (1..).zip(&platform.serial) {
        serial_port(unit, serial).append_to(&mut devices);
    }
    clock(platform.rtc_port).append_to(&mut devices);
    if let Some(port) = platform.panic_port {
        panic_notifier(port).append_to(&mut devices);
    }
    for (unit, device) in (0..).zip(&platform.virtio) {
        virtio(unit, device).append_to(&mut devices);
    }
    let mut aml = Vec::new();
    let s5 = platform.power.s5_sleep_type;
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&s5, &s5, &0_u8, &0_u8]),
    )
    .to_aml_bytes(&mut aml);
    aml.extend_from_slice(&Scope::raw(Path::new("_SB_"), devices));
    aml
}

/// One device's encoded AML; the crate's tree borrows its leaves, so each is encoded at once.
struct Encoded(Vec<u8>);

impl Encoded {
    fn device(name: &str, children: Vec<&dyn Aml>) -> Self {
        let mut bytes = Vec::new();
        Device::new(Path::new(name), children).to_aml_bytes(&mut bytes);
        Self(bytes)
    }

    fn append_to(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }
}

fn isa_interrupt(irq: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, irq.into())
}

fn serial_port(unit: u8, serial: &SerialPort) -> Encoded {
    Encoded::device(
        &format!("COM{}", unit % 10),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &unit),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &IO::new(serial.port, serial.port, 8, 8),
                    &isa_interrupt(serial.irq),
                ]),
            ),
        ],
    )
}

fn clock(port: u16) -> Encoded {
    Encoded::device(
        "RTC_",
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, 2), &isa_interrupt(8)]),
            ),
        ],
    )
}

fn panic_notifier(port: u16) -> Encoded {
    Encoded::device(
        "PEVT",
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(Path::new("_STA"), &0x0f_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, 1)]),
            ),
        ],
    )
}

fn virtio(unit: u32, device: &VirtioMmio) -> Encoded {
    Encoded::device(
        &format!("V{unit:03X}"),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &unit),
            &Name::new(Path::new("_CCA"), &acpi_tables::aml::ONE),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, device.base, device.len),
                    &Interrupt::new(true, false, false, true, device.gsi),
                ]),
            ),
        ],
    )
}
