//! Interrupt lines between devices and the interrupt controllers.
//!
//! ```text
//! device ── IrqLine(gsi) ──> InterruptRouter ─┬─> DualPic  (GSI 0-15, except 2)  ── ExtIntSink ──> vCPU 0
//!                                             └─> IoApic   (GSI 0 → pin 2, else n → n) ── MsiSink ──> local APICs
//! ```
//! A line carries *asserted* or *not asserted*; polarity is a matter of wiring that no device needs to
//! know. Several devices may share a GSI: the router forms the wired OR.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::chipset::{DualPic, IOAPIC_PINS, IoApic};

/// Takes interrupt messages on behalf of the local APICs.
pub trait MsiSink: Send + Sync {
    /// Delivers one message (Intel SDM vol. 3, 11.11).
    fn send(&self, address: u64, data: u32);

    /// The redirection entry of I/O APIC pin `pin` now stands for `message` (`None`: masked).
    ///
    /// Backends that report EOI only for vectors they know of (KVM with a split irqchip) put this
    /// into their routing table; the others need not care. Called with the I/O APIC locked: it must
    /// not call back.
    fn route_changed(&self, pin: u32, message: Option<MsiMessage>) {
        let _ = (pin, message);
    }
}

/// An interrupt message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// 0xFEExxxxx: destination and destination mode.
    pub address: u64,
    /// Vector, delivery mode, trigger mode.
    pub data: u32,
}

/// Learns that the PIC's INTR output may have changed.
pub trait ExtIntSink: Send + Sync {
    /// Ask `DualPic::intr_pending` and act. Called without any PIC lock held.
    fn intr_changed(&self);
}

/// Where lines end: told of each change of one source of one GSI.
pub trait IrqSink: Send + Sync {
    /// One source of `gsi` went from one level to the other.
    fn source_changed(&self, gsi: u32, asserted: bool);
}

/// A device's end of an interrupt line. Clones are the same source.
#[derive(Clone)]
pub struct IrqLine {
    inner: Arc<Line>,
}

struct Line {
    sink: Option<Arc<dyn IrqSink>>,
    gsi: u32,
    asserted: Mutex<bool>,
}

impl IrqLine {
    /// A new source on `gsi` of `sink`, not asserted.
    pub fn new(sink: Arc<dyn IrqSink>, gsi: u32) -> Self {
        Self {
            inner: Arc::new(Line {
                sink: Some(sink),
                gsi,
                asserted: Mutex::new(false),
            }),
        }
    }

    /// A line that ends nowhere, for a device that is not wired up.
    pub fn unconnected() -> Self {
        Self {
            inner: Arc::new(Line {
                sink: None,
                gsi: 0,
                asserted: Mutex::new(false),
            }),
        }
    }

    /// Drives the line. Cheap where the level stays as it was.
    pub fn set(&self, asserted: bool) {
        let mut now = self.inner.asserted.lock();
        if *now != asserted {
            *now = asserted;
            // Told under the lock, so that two threads' changes arrive in the order they were made.
            if let Some(sink) = &self.inner.sink {
                sink.source_changed(self.inner.gsi, asserted);
            }
        }
    }

    /// Deasserts, then asserts: a rising edge whatever the level was.
    pub fn pulse_high(&self) {
        self.set(false);
        self.set(true);
    }

    /// The level this source drives.
    pub fn is_asserted(&self) -> bool {
        *self.inner.asserted.lock()
    }

    /// The GSI the line belongs to.
    pub fn gsi(&self) -> u32 {
        self.inner.gsi
    }
}

impl std::fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IrqLine")
            .field("gsi", &self.inner.gsi)
            .field("asserted", &self.is_asserted())
            .finish()
    }
}

/// Turns GSI lines into PIC and I/O APIC inputs.
#[derive(Debug)]
pub struct InterruptRouter {
    pic: Arc<DualPic>,
    ioapic: Arc<IoApic>,
    /// How many sources assert each GSI.
    asserted: [Mutex<u32>; IOAPIC_PINS],
}

impl InterruptRouter {
    /// Wires both controllers up.
    pub fn new(pic: Arc<DualPic>, ioapic: Arc<IoApic>) -> Arc<Self> {
        Arc::new(Self {
            pic,
            ioapic,
            asserted: std::array::from_fn(|_| Mutex::new(0)),
        })
    }

    /// A new source on `gsi`. A GSI outside the I/O APIC's 24 pins goes nowhere.
    pub fn line(self: &Arc<Self>, gsi: u32) -> IrqLine {
        let sink: Arc<dyn IrqSink> = self.clone();
        IrqLine::new(sink, gsi)
    }

    fn forward(&self, gsi: u32, asserted: bool) {
        if gsi < 16 && gsi != 2 {
            self.pic.set_irq(gsi as u8, asserted);
        }
        // The PIT (ISA IRQ 0) sits on pin 2, as the MADT's interrupt source override says.
        match gsi {
            0 => self.ioapic.set_pin(2, asserted),
            2 => {}
            _ => self.ioapic.set_pin(gsi, asserted),
        }
    }
}

impl IrqSink for InterruptRouter {
    fn source_changed(&self, gsi: u32, asserted: bool) {
        let Some(count) = self.asserted.get(gsi as usize) else {
            return;
        };
        let mut count = count.lock();
        let before = *count;
        *count = if asserted {
            before + 1
        } else {
            before.saturating_sub(1)
        };
        if (before == 0) != (*count == 0) {
            self.forward(gsi, asserted);
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod testing {
    use super::*;

    /// Records the level and counts the rising edges of a line.
    #[derive(Debug, Default)]
    pub(crate) struct LineProbe(pub(crate) Mutex<(bool, u32)>);

    impl IrqSink for LineProbe {
        fn source_changed(&self, _gsi: u32, asserted: bool) {
            let mut probe = self.0.lock();
            probe.0 = asserted;
            probe.1 += u32::from(asserted);
        }
    }

    impl LineProbe {
        pub(crate) fn new() -> (Arc<Self>, IrqLine) {
            let probe = Arc::new(Self::default());
            (probe.clone(), IrqLine::new(probe, 0))
        }
        pub(crate) fn level(&self) -> bool {
            self.0.lock().0
        }
        pub(crate) fn edges(&self) -> u32 {
            self.0.lock().1
        }
    }

    /// Keeps the messages an I/O APIC sends.
    #[derive(Debug, Default)]
    pub(crate) struct MsiLog(pub(crate) Mutex<Vec<MsiMessage>>);

    impl MsiSink for MsiLog {
        fn send(&self, address: u64, data: u32) {
            self.0.lock().push(MsiMessage { address, data });
        }
    }

    /// Ignores the PIC's output.
    #[derive(Debug, Default)]
    pub(crate) struct NoExtInt;

    impl ExtIntSink for NoExtInt {
        fn intr_changed(&self) {}
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;

    #[test]
    fn shared_line_is_a_wired_or() {
        let msi = Arc::new(MsiLog::default());
        let pic = DualPic::new(Arc::new(NoExtInt));
        let ioapic = IoApic::new(0, msi.clone());
        let router = InterruptRouter::new(pic.clone(), ioapic.clone());
        ioapic.write_register(0x10 + 2 * 4, 0x0000_8030);
        let (a, b) = (router.line(4), router.line(4));
        a.set(true);
        b.set(true);
        a.set(false);
        assert_eq!(msi.0.lock().len(), 1);
        // Still asserted by `b`: an EOI delivers again.
        ioapic.eoi(0x30);
        assert_eq!(msi.0.lock().len(), 2);
        b.set(false);
        ioapic.eoi(0x30);
        assert_eq!(msi.0.lock().len(), 2);
        // Outside the controller: ignored.
        router.line(99).set(true);
    }
}
