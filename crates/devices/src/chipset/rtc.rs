//! The CMOS real-time clock (Motorola MC146818A data sheet) with 128 bytes of CMOS RAM.
//!
//! The time of day is the host's plus an offset that the guest changes by setting the clock. Flags of
//! register C are computed when somebody looks; the timer runs only for enabled interrupts.

use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::bus::PortDevice;
use crate::clock::{Timer, TimerService, TimerTarget};
use crate::irq::IrqLine;
use crate::state::{StateError, require};

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
/// Where a PC keeps the century; the FADT says so to the guest.
pub const RTC_CENTURY: u8 = 0x32;

const A_UPDATE_IN_PROGRESS: u8 = 0x80;
const B_SET: u8 = 0x80;
const B_PERIODIC: u8 = 0x40;
const B_ALARM: u8 = 0x20;
const B_UPDATE_ENDED: u8 = 0x10;
const B_BINARY: u8 = 0x04;
const B_24_HOUR: u8 = 0x02;
const C_IRQ: u8 = 0x80;
/// Valid RAM and time: the battery is never empty.
const D_VALID: u8 = 0x80;
/// An alarm byte of 0xC0 or more matches everything.
const ALARM_ANY: u8 = 0xc0;

const NANOS: u64 = 1_000_000_000;
/// The update-in-progress bit rises this long before the second changes (data sheet, "update cycle").
const UPDATE_LEAD_NS: u64 = 244_000;
const CMOS_LEN: usize = 128;
/// The clock stands when it gets here, in the year 2262: a guest may set any year.
const LAST_NS: u64 = i64::MAX as u64;

/// A civil date and time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Civil {
    year: u32,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Civil {
    /// From seconds since 1970; Gregorian rules, eras of 400 years.
    fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(86_400);
        let in_day = seconds.rem_euclid(86_400);
        // Day 0 of the shifted calendar is 0000-03-01: leap days then fall at a year's end.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_shifted = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_shifted + 2) / 5 + 1;
        let month = if month_shifted < 10 {
            month_shifted + 3
        } else {
            month_shifted - 9
        };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        Self {
            year: year.clamp(0, 9999) as u32,
            month: month as u8,
            day: day as u8,
            hour: (in_day / 3600) as u8,
            minute: (in_day / 60 % 60) as u8,
            second: (in_day % 60) as u8,
        }
    }

    fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let month_shifted = (month + 9) % 12;
        let day_of_year = (153 * month_shifted + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * 86_400
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }

    /// 1 is Sunday. 1970-01-01 was a Thursday.
    fn day_of_week(self) -> u8 {
        ((self.to_unix().div_euclid(86_400) + 4).rem_euclid(7) + 1) as u8
    }
}

/// Everything that changes in an [`Rtc`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// The register that port 0x71 stands for.
    index: u8,
    /// 128 bytes; the time bytes in it are live only while the clock is being set.
    cmos: Vec<u8>,
    /// Flags of register C that were raised and not read.
    flags: u8,
    /// Guest time minus host time, in seconds.
    offset_s: i64,
    /// The nanosecond of guest time up to which flags have been computed.
    seen_ns: u64,
}

impl RtcState {
    fn new() -> Self {
        let mut cmos = vec![0; CMOS_LEN];
        // 32.768 kHz time base, 1024 Hz periodic rate; 24 hours, BCD.
        cmos[usize::from(REG_A)] = 0x26;
        cmos[usize::from(REG_B)] = B_24_HOUR;
        Self {
            index: REG_D,
            cmos,
            flags: 0,
            offset_s: 0,
            seen_ns: 0,
        }
    }

    fn reg(&self, index: u8) -> u8 {
        self.cmos.get(usize::from(index)).copied().unwrap_or(0)
    }

    fn set_reg(&mut self, index: u8, value: u8) {
        if let Some(byte) = self.cmos.get_mut(usize::from(index)) {
            *byte = value;
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.reg(REG_B) & B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, byte: u8) -> u8 {
        if self.reg(REG_B) & B_BINARY != 0 {
            byte
        } else {
            (byte >> 4).min(9) * 10 + (byte & 0xf).min(9)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.reg(REG_B) & B_24_HOUR != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        let on_dial = if hour.is_multiple_of(12) {
            12
        } else {
            hour % 12
        };
        self.encode(on_dial) | afternoon
    }

    fn decode_hour(&self, byte: u8) -> u8 {
        if self.reg(REG_B) & B_24_HOUR != 0 {
            return self.decode(byte);
        }
        self.decode(byte & 0x7f) % 12 + if byte & 0x80 != 0 { 12 } else { 0 }
    }

    /// Copies `time` into the time bytes.
    fn store_time(&mut self, time: Civil) {
        for (index, value) in [
            (SECONDS, time.second),
            (MINUTES, time.minute),
            (DAY_OF_WEEK, time.day_of_week()),
            (DAY_OF_MONTH, time.day),
            (MONTH, time.month),
            (YEAR, (time.year % 100) as u8),
            (RTC_CENTURY, (time.year / 100) as u8),
        ] {
            let byte = self.encode(value);
            self.set_reg(index, byte);
        }
        let hour = self.encode_hour(time.hour);
        self.set_reg(HOURS, hour);
    }

    /// The time that the time bytes spell.
    fn load_time(&self) -> Civil {
        let value = |index| self.decode(self.reg(index));
        let century = match value(RTC_CENTURY) {
            0 => 20,
            century => century,
        };
        Civil {
            year: u32::from(century) * 100 + u32::from(value(YEAR) % 100),
            month: value(MONTH).clamp(1, 12),
            day: value(DAY_OF_MONTH).clamp(1, 31),
            hour: self.decode_hour(self.reg(HOURS)).min(23),
            minute: value(MINUTES).min(59),
            second: value(SECONDS).min(59),
        }
    }

    /// Nanoseconds between periodic interrupts, if the rate is one.
    fn period_ns(&self) -> Option<u64> {
        // Rates 1 and 2 repeat 8 and 9 with a 32.768 kHz time base.
        let rate = match self.reg(REG_A) & 0x0f {
            0 => return None,
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        Some(NANOS * (1 << (rate - 1)) / 32_768)
    }

    /// The first second after `after` (guest time) at which the alarm goes off, within a day.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let matches = |index: u8, encoded: u8| {
            let byte = self.reg(index);
            byte >= ALARM_ANY || byte == encoded
        };
        let first = after.saturating_add(1);
        // Hour, minute and second in turn, so that an alarm hours away is found in a few dozen steps.
        let hours = (0..=24).map(|n| first.div_euclid(3600) + n);
        let hours =
            hours.filter(|h| matches(HOURS_ALARM, self.encode_hour(h.rem_euclid(24) as u8)));
        let minutes = hours.flat_map(|hour| {
            let set = (0..60u8).filter(|m| matches(MINUTES_ALARM, self.encode(*m)));
            set.map(move |minute| (hour * 60 + i64::from(minute)) * 60)
        });
        let mut seconds = minutes
            .filter(|start| start + 59 >= first)
            .flat_map(|start| {
                let set = (0..60u8).filter(|s| matches(SECONDS_ALARM, self.encode(*s)));
                set.map(move |second| start + i64::from(second))
            });
        seconds.find(|at| (first..first.saturating_add(86_400)).contains(at))
    }

    fn setting(&self) -> bool {
        self.reg(REG_B) & B_SET != 0
    }

    /// Raises the flags of everything that happened between the last look and `guest_ns`.
    fn catch_up(&mut self, guest_ns: u64) {
        let seen = std::mem::replace(&mut self.seen_ns, guest_ns);
        if guest_ns <= seen {
            return;
        }
        if let Some(period) = self.period_ns()
            && guest_ns / period != seen / period
        {
            self.flags |= B_PERIODIC;
        }
        let (from, to) = ((seen / NANOS) as i64, (guest_ns / NANOS) as i64);
        if from != to && !self.setting() {
            self.flags |= B_UPDATE_ENDED;
            if self.next_alarm(from).is_some_and(|at| at <= to) {
                self.flags |= B_ALARM;
            }
        }
    }

    fn irq(&self) -> bool {
        self.flags & self.reg(REG_B) & (B_PERIODIC | B_ALARM | B_UPDATE_ENDED) != 0
    }

    /// Guest time of the next event that has an interrupt to raise.
    fn next_event(&self, guest_ns: u64) -> Option<u64> {
        // Flags that are up already keep the line high: nothing more to wake for.
        let wanted = self.reg(REG_B) & !self.flags;
        let second = guest_ns / NANOS;
        let periodic = self
            .period_ns()
            .filter(|_| wanted & B_PERIODIC != 0)
            .map(|period| (guest_ns / period + 1) * period);
        let ticking = !self.setting();
        let update = (wanted & B_UPDATE_ENDED != 0 && ticking).then_some(second.saturating_add(1));
        let alarm = (wanted & B_ALARM != 0 && ticking)
            .then(|| self.next_alarm(second as i64))
            .flatten()
            .map(|s| s as u64);
        let seconds = [update, alarm]
            .into_iter()
            .flatten()
            .map(|s| s.saturating_mul(NANOS));
        periodic.into_iter().chain(seconds).min()
    }
}

/// Reads the host's time of day in nanoseconds since 1970.
pub type WallClock = Box<dyn Fn() -> u64 + Send + Sync>;

fn host_wall_clock() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as u64)
}

/// The clock chip at ports 0x70 and 0x71, on IRQ 8.
pub struct Rtc {
    irq: IrqLine,
    timer: Timer,
    wall: WallClock,
    state: Mutex<RtcState>,
}

impl Rtc {
    /// The index port; the data port follows.
    pub const PORT: u16 = 0x70;

    /// A clock that shows the host's time (UTC); `irq` is IRQ 8.
    pub fn new(timers: &TimerService, irq: IrqLine) -> Arc<Self> {
        Self::with_wall_clock(timers, irq, Box::new(host_wall_clock))
    }

    /// A clock that shows another time than the host's.
    pub fn with_wall_clock(timers: &TimerService, irq: IrqLine, wall: WallClock) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| {
            let mut state = RtcState::new();
            state.seen_ns = wall();
            Self {
                irq,
                timer: timers.timer(this.clone()),
                wall,
                state: Mutex::new(state),
            }
        })
    }

    /// Sets CMOS bytes beyond the clock's registers, as firmware leaves them (memory size and such).
    pub fn set_cmos(&self, index: u8, value: u8) {
        if index > REG_D && index != RTC_CENTURY {
            self.state.lock().set_reg(index, value);
        }
    }

    fn guest_ns(&self, state: &RtcState) -> u64 {
        (self.wall)()
            .saturating_add_signed(state.offset_s.saturating_mul(NANOS as i64))
            .min(LAST_NS)
    }

    fn sync(&self, state: &mut RtcState) {
        let now = self.guest_ns(state);
        state.catch_up(now);
        self.irq.set(state.irq());
        let wait = state.next_event(now).map(|at| at - now);
        self.timer
            .set(wait.map(|ns| self.timer.now().saturating_add(ns)));
    }

    fn read_data(&self) -> u8 {
        let mut state = self.state.lock();
        let now = self.guest_ns(&state);
        match state.index {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | RTC_CENTURY => {
                if !state.setting() {
                    state.store_time(Civil::from_unix((now / NANOS) as i64));
                }
                state.reg(state.index)
            }
            REG_A => {
                let updating = !state.setting() && now % NANOS >= NANOS - UPDATE_LEAD_NS;
                state.reg(REG_A) | if updating { A_UPDATE_IN_PROGRESS } else { 0 }
            }
            REG_C => {
                state.catch_up(now);
                let irq = if state.irq() { C_IRQ } else { 0 };
                let value = std::mem::take(&mut state.flags) | irq;
                self.sync(&mut state);
                value
            }
            REG_D => D_VALID,
            index => state.reg(index),
        }
    }

    fn write_data(&self, value: u8) {
        let mut state = self.state.lock();
        let now = self.guest_ns(&state);
        state.catch_up(now);
        let index = state.index;
        match index {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | RTC_CENTURY => {
                if state.setting() {
                    state.set_reg(index, value);
                } else {
                    state.store_time(Civil::from_unix((now / NANOS) as i64));
                    state.set_reg(index, value);
                    self.apply_time(&mut state);
                }
            }
            REG_A => state.set_reg(REG_A, value & !A_UPDATE_IN_PROGRESS),
            REG_B => {
                let was_setting = state.setting();
                if value & B_SET != 0 && !was_setting {
                    state.store_time(Civil::from_unix((now / NANOS) as i64));
                }
                // SET also clears the update-ended enable (data sheet, register B).
                let mask = if value & B_SET != 0 {
                    !B_UPDATE_ENDED
                } else {
                    0xff
                };
                state.set_reg(REG_B, value & mask);
                if was_setting && value & B_SET == 0 {
                    self.apply_time(&mut state);
                }
            }
            REG_C | REG_D => {}
            _ => state.set_reg(index, value),
        }
        self.sync(&mut state);
    }

    /// Makes the time bytes the time.
    fn apply_time(&self, state: &mut RtcState) {
        let host = ((self.wall)() / NANOS) as i64;
        state.offset_s = state.load_time().to_unix() - host;
        state.seen_ns = self.guest_ns(state);
    }

    /// Clears what a CPU reset clears: interrupt enables and flags. The time goes on.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        let b = state.reg(REG_B) & !(B_PERIODIC | B_ALARM | B_UPDATE_ENDED | B_SET);
        state.set_reg(REG_B, b);
        state.flags = 0;
        self.sync(&mut state);
    }

    /// The state for a snapshot.
    pub fn save(&self) -> RtcState {
        self.state.lock().clone()
    }

    /// Puts a saved state back. The time of day is then the host's present one plus the guest's offset.
    pub fn restore(&self, saved: RtcState) -> Result<(), StateError> {
        let RtcState {
            index,
            cmos,
            flags: _,
            offset_s: _,
            seen_ns: _,
        } = &saved;
        require(
            cmos.len() == CMOS_LEN,
            "rtc",
            "the CMOS RAM is not 128 bytes long",
        )?;
        require(
            usize::from(*index) < CMOS_LEN,
            "rtc",
            "the selected register does not exist",
        )?;
        let mut state = self.state.lock();
        *state = saved;
        state.seen_ns = self.guest_ns(&state);
        self.sync(&mut state);
        Ok(())
    }
}

impl TimerTarget for Rtc {
    fn timer_expired(&self, _now_ns: u64) {
        self.sync(&mut self.state.lock());
    }
}

impl PortDevice for Rtc {
    fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            // The index port is write-only.
            *byte = if offset as usize + i == 1 {
                self.read_data()
            } else {
                0xff
            };
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            match offset as usize + i {
                // Bit 7 is the NMI mask, which nothing here raises.
                0 => self.state.lock().index = byte & 0x7f,
                _ => self.write_data(*byte),
            }
        }
    }
}

impl std::fmt::Debug for Rtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rtc")
            .field("state", &*self.state.lock())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::testing::LineProbe;

    /// 2024-02-29 23:59:58 UTC, a Thursday.
    const LEAP_EVE: u64 = 1_709_251_198;

    struct Rig {
        timers: Arc<TimerService>,
        probe: Arc<LineProbe>,
        rtc: Arc<Rtc>,
    }

    fn rig() -> Rig {
        let timers = TimerService::manual();
        let (probe, irq) = LineProbe::new();
        let clock = timers.clone();
        let wall = Box::new(move || LEAP_EVE * NANOS + clock.now());
        Rig {
            rtc: Rtc::with_wall_clock(&timers, irq, wall),
            timers,
            probe,
        }
    }

    impl Rig {
        fn read(&self, index: u8) -> u8 {
            let mut data = [0];
            self.rtc.write(0, &[index]);
            self.rtc.read(1, &mut data);
            data[0]
        }
        fn write(&self, index: u8, value: u8) {
            self.rtc.write(0, &[index]);
            self.rtc.write(1, &[value]);
        }
        fn date(&self) -> [u8; 8] {
            [
                RTC_CENTURY,
                YEAR,
                MONTH,
                DAY_OF_MONTH,
                HOURS,
                MINUTES,
                SECONDS,
                DAY_OF_WEEK,
            ]
            .map(|index| self.read(index))
        }
    }

    #[test]
    fn shows_the_hosts_time_across_a_leap_day() {
        let r = rig();
        assert_eq!(r.date(), [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58, 5]);
        r.timers.advance(2 * NANOS);
        assert_eq!(r.date(), [0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x00, 6]);
    }

    #[test]
    fn binary_and_twelve_hour_formats() {
        let r = rig();
        r.write(REG_B, B_BINARY);
        assert_eq!(r.read(HOURS), 11 | 0x80);
        assert_eq!(r.read(MINUTES), 59);
        r.timers.advance(2 * NANOS);
        assert_eq!(r.read(HOURS), 12, "midnight is 12 AM");
        r.write(REG_B, 0);
        assert_eq!(r.read(HOURS), 0x12);
    }

    #[test]
    fn no_time_of_day_wakes_the_timer_for_ever() {
        let interrupts = B_PERIODIC | B_ALARM | B_UPDATE_ENDED;
        let calm = |r: &Rig| {
            let state = r.rtc.state.lock();
            let now = r.rtc.guest_ns(&state);
            let next = state.next_event(now).unwrap();
            assert!(next - now >= NANOS / 32_768, "{now} {next}");
        };
        // As a guest sets it: a year beyond what 64 bits of nanoseconds hold.
        let r = rig();
        for (index, value) in [
            (REG_B, B_SET | B_BINARY | B_24_HOUR),
            (RTC_CENTURY, 255),
            (YEAR, 99),
            (REG_B, interrupts | B_BINARY | B_24_HOUR),
        ] {
            r.write(index, value);
        }
        calm(&r);
        // As a snapshot says it.
        let saved = r.rtc.save();
        for offset_s in [i64::MIN, i64::MAX, -1 << 40, 1 << 40, 7_000_000_000] {
            let rig = rig();
            let state = RtcState {
                offset_s,
                seen_ns: u64::MAX,
                ..saved.clone()
            };
            rig.rtc.restore(state).unwrap();
            calm(&rig);
        }
    }

    #[test]
    fn setting_the_clock_freezes_and_offsets_it() {
        let r = rig();
        r.write(REG_B, B_SET | B_24_HOUR);
        r.timers.advance(5 * NANOS);
        assert_eq!(r.read(SECONDS), 0x58, "frozen");
        for (index, value) in [
            (RTC_CENTURY, 0x19),
            (YEAR, 0x99),
            (MONTH, 0x12),
            (DAY_OF_MONTH, 0x31),
        ] {
            r.write(index, value);
        }
        r.write(REG_B, B_24_HOUR);
        r.timers.advance(2 * NANOS);
        assert_eq!(r.date()[..4], [0x20, 0x00, 0x01, 0x01]);
    }

    #[test]
    fn update_in_progress_precedes_the_second() {
        let r = rig();
        assert_eq!(r.read(REG_A), 0x26);
        r.timers.advance(NANOS - 100_000);
        assert_eq!(r.read(REG_A), 0xa6);
        r.timers.advance(100_000);
        assert_eq!(r.read(REG_A), 0x26);
        assert_eq!(r.read(REG_C), B_UPDATE_ENDED | B_PERIODIC);
        assert_eq!(r.read(REG_C), 0);
    }

    #[test]
    fn periodic_interrupt_needs_each_one_read() {
        let r = rig();
        r.write(REG_A, 0x26);
        r.write(REG_B, B_24_HOUR | B_PERIODIC);
        for n in 1..=4 {
            r.timers.advance(NANOS / 1024);
            assert_eq!(r.probe.edges(), n);
            assert_eq!(r.read(REG_C) & (C_IRQ | B_PERIODIC), C_IRQ | B_PERIODIC);
            assert!(!r.probe.level());
        }
        r.timers.advance(NANOS);
        assert_eq!(r.probe.edges(), 5, "unread: the line stays high");
    }

    #[test]
    fn alarm_goes_off_once() {
        let r = rig();
        for (index, value) in [
            (SECONDS_ALARM, 0x10),
            (MINUTES_ALARM, 0xff),
            (HOURS_ALARM, 0xc0),
        ] {
            r.write(index, value);
        }
        r.write(REG_B, B_24_HOUR | B_ALARM);
        r.timers.advance(11 * NANOS);
        assert!(!r.probe.level());
        r.timers.advance(NANOS);
        assert!(r.probe.level());
        assert_eq!(r.read(REG_C) & (C_IRQ | B_ALARM), C_IRQ | B_ALARM);
        r.timers.advance(59 * NANOS);
        assert!(!r.probe.level());
        r.timers.advance(NANOS);
        assert!(r.probe.level(), "next minute");
    }

    #[test]
    fn state_round_trip_and_refusal() {
        let r = rig();
        r.write(0x40, 0x5a);
        let saved = r.rtc.save();
        let other = rig();
        other.rtc.restore(saved.clone()).unwrap();
        assert_eq!(other.read(0x40), 0x5a);
        let mut bad = saved;
        bad.cmos.pop();
        assert!(other.rtc.restore(bad).is_err());
    }

    proptest::proptest! {
        #[test]
        fn civil_dates_round_trip(seconds in 0i64..250_000_000_000) {
            proptest::prop_assert_eq!(Civil::from_unix(seconds).to_unix(), seconds);
        }
    }
}
