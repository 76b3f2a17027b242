//! The chipset and the serial ports, wired up in one place for cold boot, reset and restore.

use std::io::{self, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use skerry_boot::MemoryMap;
use skerry_devices::bus::{BusError, MmioBusBuilder, PortBusBuilder};
use skerry_devices::chipset::{
    AcpiPm, AcpiPmState, DebugExit, DualPic, I8042, I8042State, IoApic, IoApicState, NoPci,
    PanicNotifier, PicChip, PicState, Pit, PitState, PostCode, Rtc, RtcState, SystemControlA, acpi,
    add_test_device,
};
use skerry_devices::clock::TimerService;
use skerry_devices::events::MachineEvents;
use skerry_devices::irq::{ExtIntSink, InterruptRouter, MsiSink};
use skerry_devices::serial::{COM_PORTS, Uart, UartState};

use crate::MachineError;
use crate::layout;

/// Where a serial port's output goes.
pub type SerialSink = Box<dyn Write + Send>;

/// Every device of the chipset that keeps state, in the order of saving and restoring.
#[derive(Debug)]
pub(crate) struct Chipset {
    pub(crate) timers: Arc<TimerService>,
    pub(crate) router: Arc<InterruptRouter>,
    pub(crate) pic: Arc<DualPic>,
    pub(crate) ioapic: Arc<IoApic>,
    pub(crate) pit: Arc<Pit>,
    pub(crate) rtc: Arc<Rtc>,
    pub(crate) acpi: Arc<AcpiPm>,
    pub(crate) i8042: Arc<I8042>,
    pub(crate) uarts: [Option<Arc<Uart>>; 4],
}

/// What a [`Chipset`] is built from.
pub(crate) struct ChipsetParts<'a> {
    pub(crate) map: &'a MemoryMap,
    pub(crate) events: Arc<dyn MachineEvents>,
    pub(crate) msi: Arc<dyn MsiSink>,
    pub(crate) extint: Arc<dyn ExtIntSink>,
    pub(crate) serial: [bool; 4],
    pub(crate) sinks: [Option<SerialSink>; 4],
    pub(crate) debug_exit: Option<u16>,
}

fn resource(what: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Resource { what, source }
}

impl Chipset {
    /// Makes the devices and puts them on the buses.
    pub(crate) fn new(
        parts: ChipsetParts<'_>,
        ports: &mut PortBusBuilder,
        mmio: &mut MmioBusBuilder,
    ) -> Result<Self, MachineError> {
        let ChipsetParts {
            map,
            events,
            msi,
            extint,
            serial,
            sinks,
            debug_exit,
        } = parts;
        let timers = TimerService::new().map_err(resource("timer thread"))?;
        let pic = DualPic::new(extint);
        let ioapic = IoApic::new(layout::IOAPIC_ID, msi);
        let router = InterruptRouter::new(pic.clone(), ioapic.clone());
        let (keyboard, mouse) = layout::I8042_IRQS;
        let chipset = Self {
            pit: Pit::new(&timers, router.line(0)),
            rtc: Rtc::new(&timers, router.line(layout::RTC_IRQ)),
            acpi: AcpiPm::new(&timers, router.line(layout::SCI), events.clone()),
            i8042: I8042::new(router.line(keyboard), router.line(mouse), events.clone()),
            uarts: uarts(&router, serial, sinks).map_err(resource("serial port"))?,
            timers,
            router,
            pic,
            ioapic,
        };
        for (index, value) in layout::cmos_memory(map) {
            chipset.rtc.set_cmos(index, value);
        }
        chipset.add_ports(ports)?;
        ports.add("post code", PostCode::PORT, 1, PostCode::new())?;
        let port_a = SystemControlA::new(events.clone());
        ports.add("system control A", SystemControlA::PORT, 1, port_a)?;
        let notifier = PanicNotifier::new(events.clone());
        ports.add("panic notifier", PanicNotifier::PORT, 1, notifier)?;
        ports.add(
            "pci stub",
            NoPci::PORT,
            NoPci::LEN,
            NoPci::new(events.clone()),
        )?;
        if let Some(port) = debug_exit {
            ports.add("debug exit", port, DebugExit::LEN, DebugExit::new(events))?;
            // Test kernels that end through this port expect its companion as well.
            add_test_device(&chipset.router, ports, mmio)?;
        }
        let base = layout::IOAPIC_BASE.into();
        mmio.add("ioapic", base, IoApic::MMIO_LEN, chipset.ioapic.clone())?;
        Ok(chipset)
    }

    fn add_ports(&self, ports: &mut PortBusBuilder) -> Result<(), BusError> {
        let pic = &self.pic;
        ports.add("pic", DualPic::MASTER_PORT, 2, pic.ports(PicChip::Master))?;
        ports.add("pic 2", DualPic::SLAVE_PORT, 2, pic.ports(PicChip::Slave))?;
        ports.add("elcr", DualPic::ELCR_PORT, 2, pic.ports(PicChip::EdgeLevel))?;
        ports.add("pit", Pit::PORT, 4, self.pit.clone())?;
        ports.add("control B", Pit::CONTROL_B_PORT, 1, self.pit.control_b())?;
        ports.add("i8042 data", I8042::DATA_PORT, 1, self.i8042.data_port())?;
        ports.add("i8042", I8042::COMMAND_PORT, 1, self.i8042.command_port())?;
        ports.add("rtc", Rtc::PORT, 2, self.rtc.clone())?;
        ports.add(
            "acpi",
            layout::ACPI_PORT,
            acpi::layout::LEN,
            self.acpi.clone(),
        )?;
        for (n, uart) in self.uarts.iter().enumerate() {
            if let Some(uart) = uart {
                let name = format!("com{}", n + 1);
                ports.add(&name, COM_PORTS[n].0, Uart::LEN, uart.clone())?;
            }
        }
        Ok(())
    }

    /// Takes every device back to power-on, sources of interrupts first.
    pub(crate) fn reset(&self) {
        for uart in self.uarts.iter().flatten() {
            uart.reset();
        }
        self.i8042.reset();
        self.acpi.reset();
        self.rtc.reset();
        self.pit.reset();
        self.ioapic.reset();
        self.pic.reset();
    }

    /// Everything that changes. The timers must be paused and all processors parked.
    pub(crate) fn save(&self) -> ChipsetState {
        ChipsetState {
            time_ns: self.timers.now(),
            pit: self.pit.save(),
            rtc: self.rtc.save(),
            acpi: self.acpi.save(),
            i8042: self.i8042.save(),
            uarts: self.uarts.each_ref().map(|u| u.as_ref().map(|u| u.save())),
            ioapic: self.ioapic.save(),
            pic: self.pic.save(),
        }
    }

    /// Puts a saved state back: time first, then sources of interrupts, then the controllers,
    /// whose saved state has seen those levels.
    pub(crate) fn restore(&self, saved: ChipsetState) -> Result<(), MachineError> {
        let ChipsetState {
            time_ns,
            pit,
            rtc,
            acpi,
            i8042,
            uarts,
            ioapic,
            pic,
        } = saved;
        self.timers.restore(time_ns)?;
        self.pit.restore(pit)?;
        self.rtc.restore(rtc)?;
        self.acpi.restore(acpi)?;
        self.i8042.restore(i8042)?;
        for (uart, state) in self.uarts.iter().zip(uarts) {
            match (uart, state) {
                (Some(uart), Some(state)) => uart.restore(state)?,
                (None, None) => {}
                _ => {
                    let problem = "it has other serial ports than this machine";
                    return Err(skerry_devices::StateError::new("uart", problem).into());
                }
            }
        }
        self.ioapic.restore(ioapic)?;
        self.pic.restore(pic)?;
        Ok(())
    }
}

fn uarts(
    router: &Arc<InterruptRouter>,
    present: [bool; 4],
    sinks: [Option<SerialSink>; 4],
) -> io::Result<[Option<Arc<Uart>>; 4]> {
    let mut uarts = [None, None, None, None];
    for (n, sink) in sinks.into_iter().enumerate() {
        if present[n] {
            uarts[n] = Some(Uart::new(router.line(COM_PORTS[n].1), sink)?);
        }
    }
    Ok(uarts)
}

/// The chipset's part of a machine's saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipsetState {
    time_ns: u64,
    pit: PitState,
    rtc: RtcState,
    acpi: AcpiPmState,
    i8042: I8042State,
    uarts: [Option<UartState>; 4],
    ioapic: IoApicState,
    pic: PicState,
}
