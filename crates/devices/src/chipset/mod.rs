//! The PC's chipset: interrupt controllers, timers, power management and the small ports.

pub mod acpi;
mod i8042;
mod ioapic;
mod pic;
mod pit;
mod ports;
mod rtc;
mod test_device;

pub use acpi::{AcpiPm, AcpiPmState};
pub use i8042::{I8042, I8042State};
pub use ioapic::{IOAPIC_PINS, IoApic, IoApicState};
pub use pic::{DualPic, PicChip, PicState};
pub use pit::{PIT_HZ, Pit, PitState};
pub use ports::{DebugExit, NoPci, PanicNotifier, PostCode, SystemControlA};
pub use rtc::{RTC_CENTURY, Rtc, RtcState, WallClock};
pub use test_device::add_test_device;
