//! The DSDT's AML: devices that a guest can't find by probing, and how to power off.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};

use crate::layout;
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
    if platform.generation_event.is_some() {
        generation_id().append_to(&mut devices);
    }
    let mut aml = Vec::new();
    let s5 = platform.power.s5_sleep_type;
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&s5, &s5, &0_u8, &0_u8]),
    )
    .to_aml_bytes(&mut aml);
    aml.extend_from_slice(&Scope::raw(Path::new("_SB_"), devices));
    if let Some(event) = platform.generation_event {
        generation_event(event).append_to(&mut aml);
    }
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

/// "Virtual Machine Generation ID" (Microsoft, 2012): a compatible id, and where the 16 bytes are.
fn generation_id() -> Encoded {
    let (low, high) = (
        layout::GENERATION_ID as u32,
        (layout::GENERATION_ID >> 32) as u32,
    );
    Encoded::device(
        "VGEN",
        vec![
            &Name::new(Path::new("_HID"), &"SKRY0001"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high])),
        ],
    )
}

/// The method of an edge-triggered general-purpose event (ACPI §5.6.4.1): the id is a new one.
fn generation_event(event: u8) -> Encoded {
    const CHANGED: u8 = 0x80;
    let device = Path::new("\\_SB_.VGEN");
    let name = Path::new(&format!("_E{event:02X}"));
    let notify = Notify::new(&device, &CHANGED);
    let mut method = Vec::new();
    Method::new(name, 0, false, vec![&notify]).to_aml_bytes(&mut method);
    Encoded(Scope::raw(Path::new("\\_GPE"), method))
}
