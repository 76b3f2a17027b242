//! Small port devices that keep no state worth saving: resets, debug exit, panic notifier, POST codes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::PortDevice;
use crate::events::{MachineEvent, MachineEvents, ResetSource};

/// Ends the machine with a status of the guest's choice: writing `v` exits with `(v << 1) | 1`, the
/// convention of QEMU's `isa-debug-exit`, so that a guest can never claim plain success by accident.
pub struct DebugExit {
    events: Arc<dyn MachineEvents>,
}

impl DebugExit {
    /// Ports the device takes.
    pub const LEN: u16 = 4;

    /// A debug-exit port.
    pub fn new(events: Arc<dyn MachineEvents>) -> Arc<Self> {
        Arc::new(Self { events })
    }
}

impl PortDevice for DebugExit {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u16, data: &[u8]) {
        let mut bytes = [0; 4];
        let len = data.len().min(4);
        bytes[..len].copy_from_slice(&data[..len]);
        let status = u32::from_le_bytes(bytes).wrapping_shl(1) | 1;
        self.events.notify(MachineEvent::DebugExit(status));
    }
}

/// Port 0x80: firmware and kernels write progress codes or use it as a delay.
#[derive(Debug, Default)]
pub struct PostCode {
    last: AtomicU8,
}

impl PostCode {
    /// The port.
    pub const PORT: u16 = 0x80;

    /// A latch that holds zero.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The last code the guest wrote.
    pub fn last(&self) -> u8 {
        self.last.load(Ordering::Relaxed)
    }
}

impl PortDevice for PostCode {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(self.last());
    }

    fn write(&self, _offset: u16, data: &[u8]) {
        if let Some(value) = data.first() {
            self.last.store(*value, Ordering::Relaxed);
        }
    }
}

/// Port 0x92, system control port A: fast A20 (always open) and fast reset.
pub struct SystemControlA {
    events: Arc<dyn MachineEvents>,
}

impl SystemControlA {
    /// The port.
    pub const PORT: u16 = 0x92;
    const RESET: u8 = 0x01;
    const A20: u8 = 0x02;

    /// The port with A20 open.
    pub fn new(events: Arc<dyn MachineEvents>) -> Arc<Self> {
        Arc::new(Self { events })
    }
}

impl PortDevice for SystemControlA {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(Self::A20);
    }

    fn write(&self, _offset: u16, data: &[u8]) {
        if data.first().is_some_and(|value| value & Self::RESET != 0) {
            self.events
                .notify(MachineEvent::Reset(ResetSource::SystemControlPortA));
        }
    }
}

/// Ports 0xCF8–0xCFF of a machine without PCI: configuration reads give ones, which is how software
/// learns that there is no host bridge. A byte at 0xCF9 is the reset control register (PIIX3).
pub struct NoPci {
    events: Arc<dyn MachineEvents>,
}

impl NoPci {
    /// First port.
    pub const PORT: u16 = 0xcf8;
    /// Ports the device takes.
    pub const LEN: u16 = 8;
    /// The reset control register, for the FADT.
    pub const RESET_PORT: u16 = 0xcf9;
    /// The value that resets the whole machine, for the FADT.
    pub const RESET_VALUE: u8 = 0x06;
    const RESET_CPU: u8 = 0x04;

    /// The absent host bridge.
    pub fn new(events: Arc<dyn MachineEvents>) -> Arc<Self> {
        Arc::new(Self { events })
    }
}

impl PortDevice for NoPci {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let reset_control = offset == Self::RESET_PORT - Self::PORT && data.len() == 1;
        data.fill(if reset_control { 0 } else { 0xff });
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if let ([value], true) = (data, offset == Self::RESET_PORT - Self::PORT)
            && value & Self::RESET_CPU != 0
        {
            self.events
                .notify(MachineEvent::Reset(ResetSource::ResetControl));
        }
    }
}

/// The panic notifier that Linux knows as `pvpanic` (QEMU's specification of the device).
pub struct PanicNotifier {
    events: Arc<dyn MachineEvents>,
}

impl PanicNotifier {
    /// Where guests look for it when no ACPI table says otherwise.
    pub const PORT: u16 = 0x505;
    const PANICKED: u8 = 1 << 0;
    const CRASH_LOADED: u8 = 1 << 1;
    const SHUTDOWN: u8 = 1 << 2;

    /// A notifier that announces all three events.
    pub fn new(events: Arc<dyn MachineEvents>) -> Arc<Self> {
        Arc::new(Self { events })
    }
}

impl PortDevice for PanicNotifier {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(Self::PANICKED | Self::CRASH_LOADED | Self::SHUTDOWN);
    }

    fn write(&self, _offset: u16, data: &[u8]) {
        let Some(value) = data.first() else { return };
        for (bit, event) in [
            (Self::PANICKED, MachineEvent::GuestPanicked),
            (Self::CRASH_LOADED, MachineEvent::GuestCrashLoaded),
            (Self::SHUTDOWN, MachineEvent::GuestShutdown),
        ] {
            if value & bit != 0 {
                self.events.notify(event);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::testing::EventLog;

    fn read(device: &dyn PortDevice, offset: u16) -> u8 {
        let mut data = [0xff];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn debug_exit_shifts_the_status() {
        let log = Arc::new(EventLog::default());
        let port = DebugExit::new(log.clone());
        port.write(0, &[0x10]);
        port.write(0, &0x1234_5678u32.to_le_bytes());
        let expected = [
            MachineEvent::DebugExit(0x21),
            MachineEvent::DebugExit(0x2468_acf1),
        ];
        assert_eq!(*log.0.lock(), expected);
    }

    #[test]
    fn resets_and_absent_pci() {
        let log = Arc::new(EventLog::default());
        let pci = NoPci::new(log.clone());
        let mut data = [0; 4];
        pci.write(0, &0x8000_0000u32.to_le_bytes());
        pci.read(0, &mut data);
        assert_eq!(data, [0xff; 4]);
        pci.write(1, &[0x02]);
        assert_eq!(read(&*pci, 1), 0);
        pci.write(1, &[NoPci::RESET_VALUE]);
        let port_a = SystemControlA::new(log.clone());
        assert_eq!(read(&*port_a, 0), 2);
        port_a.write(0, &[2]);
        port_a.write(0, &[3]);
        let expected = [ResetSource::ResetControl, ResetSource::SystemControlPortA];
        assert_eq!(*log.0.lock(), expected.map(MachineEvent::Reset));
    }

    #[test]
    fn panic_notifier_and_post_code() {
        let log = Arc::new(EventLog::default());
        let notifier = PanicNotifier::new(log.clone());
        assert_eq!(read(&*notifier, 0), 7);
        notifier.write(0, &[3]);
        let expected = [MachineEvent::GuestPanicked, MachineEvent::GuestCrashLoaded];
        assert_eq!(*log.0.lock(), expected);
        let post = PostCode::new();
        post.write(0, &[0x42]);
        assert_eq!((post.last(), read(&*post, 0)), (0x42, 0x42));
    }
}
