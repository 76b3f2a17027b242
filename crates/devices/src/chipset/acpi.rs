//! The fixed-hardware registers of ACPI (ACPI 6.5, 4.8): PM1 events and control, PM timer, one GPE block.
//!
//! There is no SMI command port: the machine is in ACPI mode from the start, so `SCI_EN` always reads 1.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::bus::PortDevice;
use crate::clock::{Timer, TimerService, TimerTarget};
use crate::events::{MachineEvent, MachineEvents};
use crate::irq::IrqLine;
use crate::state::StateError;

/// Where each register block lies in the device's port range; the FADT is written from these.
pub mod layout {
    /// Ports the device takes.
    pub const LEN: u16 = 0x14;
    /// PM1a event block: status, then enable; 4 bytes.
    pub const PM1_EVENT: u16 = 0x00;
    /// Length of the PM1a event block.
    pub const PM1_EVENT_LEN: u8 = 4;
    /// PM1a control block, 2 bytes.
    pub const PM1_CONTROL: u16 = 0x04;
    /// Length of the PM1a control block.
    pub const PM1_CONTROL_LEN: u8 = 2;
    /// PM timer, 4 bytes, 32 bits wide (`TMR_VAL_EXT`).
    pub const PM_TIMER: u16 = 0x08;
    /// Length of the PM timer block.
    pub const PM_TIMER_LEN: u8 = 4;
    /// GPE0 block: 2 bytes of status, 2 bytes of enable.
    pub const GPE0: u16 = 0x10;
    /// Length of the GPE0 block.
    pub const GPE0_LEN: u8 = 4;
}

/// The SLP_TYP value of S5, which `\_S5` in the DSDT must name.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Frequency of the PM timer in Hz (ACPI 6.5, 4.8.2.1).
pub const PM_TIMER_HZ: u64 = 3_579_545;

const STATUS_TIMER: u16 = 1 << 0;
const STATUS_GLOBAL: u16 = 1 << 5;
const STATUS_POWER_BUTTON: u16 = 1 << 8;
const STATUS_SLEEP_BUTTON: u16 = 1 << 9;
const STATUS_RTC: u16 = 1 << 10;
const STATUS_WAKE: u16 = 1 << 15;
const STATUS_KNOWN: u16 = STATUS_TIMER
    | STATUS_GLOBAL
    | STATUS_POWER_BUTTON
    | STATUS_SLEEP_BUTTON
    | STATUS_RTC
    | STATUS_WAKE;
const ENABLE_KNOWN: u16 =
    STATUS_TIMER | STATUS_GLOBAL | STATUS_POWER_BUTTON | STATUS_SLEEP_BUTTON | STATUS_RTC;

const CONTROL_SCI_ENABLE: u16 = 1 << 0;
const CONTROL_SLEEP_TYPE_SHIFT: u16 = 10;
const CONTROL_SLEEP_ENABLE: u16 = 1 << 13;
/// Bus-master reload and the sleep type keep what is written.
const CONTROL_KEPT: u16 = 1 << 1 | 7 << CONTROL_SLEEP_TYPE_SHIFT;

/// Everything that changes in an [`AcpiPm`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct AcpiPmState {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    /// The PM timer's top bit when the status was last computed.
    timer_top: bool,
}

/// The power-management block on the SCI line.
pub struct AcpiPm {
    sci: IrqLine,
    timer: Timer,
    events: Arc<dyn MachineEvents>,
    state: Mutex<AcpiPmState>,
}

impl AcpiPm {
    /// A block at power-on. `sci` is the level-triggered interrupt that the FADT names.
    pub fn new(timers: &TimerService, sci: IrqLine, events: Arc<dyn MachineEvents>) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| Self {
            sci,
            timer: timers.timer(this.clone()),
            events,
            state: Mutex::new(AcpiPmState::default()),
        })
    }

    /// Presses the power button: the guest's OS is asked to shut down.
    pub fn press_power_button(&self) {
        let mut state = self.state.lock();
        state.status |= STATUS_POWER_BUTTON;
        self.sync(&mut state);
    }

    /// Raises general-purpose event `bit` (0–15).
    pub fn raise_gpe(&self, bit: u8) {
        let mut state = self.state.lock();
        state.gpe_status |= 1u16.checked_shl(bit.into()).unwrap_or(0);
        self.sync(&mut state);
    }

    fn timer_ticks(&self) -> u64 {
        (u128::from(self.timer.now()) * u128::from(PM_TIMER_HZ) / 1_000_000_000) as u64
    }

    /// Recomputes the timer status and the SCI, and arms the timer if its overflow interrupts.
    fn sync(&self, state: &mut AcpiPmState) {
        let ticks = self.timer_ticks();
        // TMR_STS is set by each change of the counter's top bit (ACPI 6.5, 4.8.2.1).
        let top = ticks & (1 << 31) != 0;
        if top != state.timer_top {
            state.timer_top = top;
            state.status |= STATUS_TIMER;
        }
        let fixed = state.status & state.enable & ENABLE_KNOWN != 0;
        self.sci
            .set(fixed || state.gpe_status & state.gpe_enable != 0);
        let armed = state.enable & STATUS_TIMER != 0 && state.status & STATUS_TIMER == 0;
        let next = ((ticks >> 31) + 1) << 31;
        let at = (u128::from(next) * 1_000_000_000).div_ceil(u128::from(PM_TIMER_HZ));
        // A time that wrapped round would be due at once, again and again.
        let at = u64::try_from(at).unwrap_or(u64::MAX);
        self.timer.set(armed.then_some(at));
    }

    fn snapshot(&self, state: &AcpiPmState) -> [u8; layout::LEN as usize] {
        let mut block = [0; layout::LEN as usize];
        let mut put = |at: u16, value: u16| {
            block[usize::from(at)..usize::from(at) + 2].copy_from_slice(&value.to_le_bytes());
        };
        let timer = self.timer_ticks() as u32;
        put(layout::PM1_EVENT, state.status);
        put(layout::PM1_EVENT + 2, state.enable);
        put(layout::PM1_CONTROL, state.control | CONTROL_SCI_ENABLE);
        put(layout::PM_TIMER, timer as u16);
        put(layout::PM_TIMER + 2, (timer >> 16) as u16);
        put(layout::GPE0, state.gpe_status);
        put(layout::GPE0 + 2, state.gpe_enable);
        block
    }

    fn write_byte(state: &mut AcpiPmState, offset: u16, value: u8) {
        let shift = 8 * (offset & 1);
        let wide = u16::from(value) << shift;
        let kept = !(0xff << shift);
        match offset & !1 {
            layout::PM1_EVENT => state.status &= !(wide & STATUS_KNOWN),
            0x02 => state.enable = (state.enable & kept) | wide & ENABLE_KNOWN,
            layout::PM1_CONTROL => state.control = (state.control & kept) | wide & CONTROL_KEPT,
            layout::GPE0 => state.gpe_status &= !wide,
            0x12 => state.gpe_enable = (state.gpe_enable & kept) | wide,
            _ => {}
        }
    }

    /// Goes back to power-on.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        let timer_top = state.timer_top;
        *state = AcpiPmState {
            timer_top,
            ..AcpiPmState::default()
        };
        self.sync(&mut state);
    }

    /// The state for a snapshot.
    pub fn save(&self) -> AcpiPmState {
        self.state.lock().clone()
    }

    /// Puts a saved state back; machine time must be that of the snapshot already.
    pub fn restore(&self, saved: AcpiPmState) -> Result<(), StateError> {
        let AcpiPmState {
            status,
            enable,
            control,
            gpe_status,
            gpe_enable,
            timer_top,
        } = saved;
        let mut state = self.state.lock();
        *state = AcpiPmState {
            status: status & STATUS_KNOWN,
            enable: enable & ENABLE_KNOWN,
            control: control & CONTROL_KEPT,
            gpe_status,
            gpe_enable,
            timer_top,
        };
        self.sync(&mut state);
        Ok(())
    }
}

impl TimerTarget for AcpiPm {
    fn timer_expired(&self, _now_ns: u64) {
        self.sync(&mut self.state.lock());
    }
}

impl PortDevice for AcpiPm {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let mut state = self.state.lock();
        // The PM timer is read in tight loops and has no side effects on the rest.
        if offset < layout::PM_TIMER {
            self.sync(&mut state);
        }
        let block = self.snapshot(&state);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = block.get(usize::from(offset) + i).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let mut state = self.state.lock();
        let mut sleep = false;
        self.sync(&mut state);
        for (i, byte) in data.iter().enumerate() {
            let offset = offset + i as u16;
            Self::write_byte(&mut state, offset, *byte);
            // SLP_EN lies in the control register's high byte, with the sleep type.
            sleep |=
                offset == layout::PM1_CONTROL + 1 && *byte & (CONTROL_SLEEP_ENABLE >> 8) as u8 != 0;
        }
        self.sync(&mut state);
        let kind = (state.control >> CONTROL_SLEEP_TYPE_SHIFT) & 7;
        drop(state);
        if sleep && kind == u16::from(SLEEP_TYPE_S5) {
            self.events.notify(MachineEvent::PowerOff);
        }
    }
}

impl std::fmt::Debug for AcpiPm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AcpiPm")
            .field("state", &*self.state.lock())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::testing::EventLog;
    use crate::irq::testing::LineProbe;

    struct Rig {
        timers: Arc<TimerService>,
        probe: Arc<LineProbe>,
        log: Arc<EventLog>,
        pm: Arc<AcpiPm>,
    }

    fn rig() -> Rig {
        let timers = TimerService::manual();
        let (probe, sci) = LineProbe::new();
        let log = Arc::new(EventLog::default());
        let pm = AcpiPm::new(&timers, sci, log.clone());
        Rig {
            timers,
            probe,
            log,
            pm,
        }
    }

    impl Rig {
        fn read<const N: usize>(&self, offset: u16) -> [u8; N] {
            let mut data = [0; N];
            self.pm.read(offset, &mut data);
            data
        }
    }

    #[test]
    fn sleep_enable_powers_off_in_s5_only() {
        let r = rig();
        r.pm.write(
            layout::PM1_CONTROL,
            &(3u16 << 10 | CONTROL_SLEEP_ENABLE).to_le_bytes(),
        );
        assert!(r.log.0.lock().is_empty());
        r.pm.write(
            layout::PM1_CONTROL,
            &(5u16 << 10 | CONTROL_SLEEP_ENABLE).to_le_bytes(),
        );
        assert_eq!(*r.log.0.lock(), [MachineEvent::PowerOff]);
        assert_eq!(
            r.read(layout::PM1_CONTROL),
            (5u16 << 10 | CONTROL_SCI_ENABLE).to_le_bytes()
        );
    }

    #[test]
    fn power_button_raises_sci_until_cleared() {
        let r = rig();
        r.pm.press_power_button();
        assert!(!r.probe.level());
        r.pm.write(layout::PM1_EVENT + 2, &STATUS_POWER_BUTTON.to_le_bytes());
        assert!(r.probe.level());
        r.pm.write(layout::PM1_EVENT, &STATUS_POWER_BUTTON.to_le_bytes());
        assert!(!r.probe.level());
        r.pm.write(layout::GPE0 + 2, &[0, 0x80]);
        r.pm.raise_gpe(15);
        assert!(r.probe.level());
        r.pm.write(layout::GPE0 + 1, &[0x80]);
        assert!(!r.probe.level());
    }

    #[test]
    fn pm_timer_counts_and_reports_its_top_bit() {
        let r = rig();
        r.timers.advance(1_000_000_000);
        assert_eq!(
            u32::from_le_bytes(r.read(layout::PM_TIMER)),
            PM_TIMER_HZ as u32
        );
        r.pm.write(layout::PM1_EVENT + 2, &STATUS_TIMER.to_le_bytes());
        assert!(!r.probe.level());
        r.timers.advance(600_000_000_000);
        assert!(r.probe.level());
        r.pm.write(layout::PM1_EVENT, &STATUS_TIMER.to_le_bytes());
        assert!(!r.probe.level());
    }

    #[test]
    fn state_round_trip() {
        let r = rig();
        r.pm.write(layout::PM1_EVENT + 2, &STATUS_POWER_BUTTON.to_le_bytes());
        r.pm.press_power_button();
        let other = rig();
        other.pm.restore(r.pm.save()).unwrap();
        assert!(other.probe.level());
        assert_eq!(other.pm.save(), r.pm.save());
    }
}
