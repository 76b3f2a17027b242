//! Interrupts from the machine's controllers to the backend's local APICs.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use skerry_devices::chipset::IOAPIC_PINS;
use skerry_devices::irq::{ExtIntSink, MsiMessage, MsiSink};
use skerry_hypervisor::{Canceller, Vm};

/// Trigger mode bit of message data (Intel SDM 3A §12.11.2).
const LEVEL: u32 = 1 << 15;

/// Delivers the I/O APIC's messages to the virtual machine.
pub(crate) struct MsiToVm<V> {
    vm: Arc<V>,
    routes: Mutex<[Option<MsiMessage>; IOAPIC_PINS]>,
}

impl<V: Vm> MsiToVm<V> {
    pub(crate) fn new(vm: Arc<V>) -> Self {
        Self {
            vm,
            routes: Mutex::new([None; IOAPIC_PINS]),
        }
    }
}

impl<V: Vm> MsiSink for MsiToVm<V> {
    fn send(&self, address: u64, data: u32) {
        // The guest writes destination and vector: a message that no APIC takes is lost, as on
        // the bus.
        if let Err(error) = self.vm.signal_msi(address, data) {
            tracing::debug!(address, data, %error, "interrupt message lost");
        }
    }

    fn route_changed(&self, pin: u32, message: Option<MsiMessage>) {
        // A pin that is masked while its handler runs still needs the end of that interrupt, or
        // its remote IRR stays set for ever: the last route stays.
        let Some(message) = message else {
            return;
        };
        let level = (message.data & LEVEL != 0).then_some(message);
        let mut routes = self.routes.lock();
        let Some(route) = routes.get_mut(pin as usize) else {
            return;
        };
        if *route == level {
            return;
        }
        *route = level;
        let messages: Vec<_> = routes
            .iter()
            .flatten()
            .map(|m| (m.address, m.data))
            .collect();
        if let Err(error) = self.vm.set_ioapic_routes(&messages) {
            tracing::warn!(%error, "level-triggered interrupts may get lost");
        }
    }
}

/// Gets processor 0 out of the guest when the PIC's output changes; it looks at the PIC before
/// every run.
#[derive(Default)]
pub(crate) struct PicToVcpu {
    canceller: OnceLock<Canceller>,
}

impl PicToVcpu {
    pub(crate) fn connect(&self, canceller: Canceller) {
        // Set once, while the machine is built.
        let _ = self.canceller.set(canceller);
    }
}

impl ExtIntSink for PicToVcpu {
    fn intr_changed(&self) {
        if let Some(canceller) = self.canceller.get() {
            canceller.kick();
        }
    }
}
