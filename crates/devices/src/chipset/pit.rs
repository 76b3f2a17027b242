//! The 8254 programmable interval timer (Intel 8254 data sheet, order 231164) and port 0x61.
//!
//! Nothing counts: each channel remembers when its counter was loaded, and counter, OUT pin and the next
//! rising edge of OUT are functions of the time since then.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::bus::PortDevice;
use crate::clock::{Timer, TimerService, TimerTarget};
use crate::irq::IrqLine;
use crate::state::{StateError, require};

/// The input clock of all three channels in Hz.
pub const PIT_HZ: u64 = 1_193_182;

/// The shortest time between two interrupts of a periodic mode, 50 µs.
const MIN_PERIOD_TICKS: u64 = PIT_HZ / 20_000;

const NANOS: u128 = 1_000_000_000;

fn ticks(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(PIT_HZ) / NANOS) as u64
}

/// The earliest nanosecond at which `ticks` has been reached; the last one that there is if none is.
fn nanos(ticks: u64) -> u64 {
    let ns = (u128::from(ticks) * NANOS).div_ceil(u128::from(PIT_HZ));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// How the counter's two bytes are transferred (control word bits 5:4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    LowThenHigh,
}

/// One of the three counters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Channel {
    /// 0 to 5.
    mode: u8,
    bcd: bool,
    access: Access,
    /// The count register; 1 to 65536 (10000 in BCD).
    reload: u32,
    /// The low byte of a two-byte write that waits for its high byte.
    write_low: Option<u8>,
    /// The next read of a two-byte sequence gives the high byte.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    gate: bool,
    /// A count was loaded (and, in modes 1 and 5, the gate triggered it).
    running: bool,
    /// A count was written but has not been loaded into the counter.
    null_count: bool,
    /// When counting (re)started, in input clocks since machine time zero.
    start_tick: u64,
    /// Ticks counted before the gate last stopped the counter (modes 0 and 4).
    counted: u64,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: Access::LowThenHigh,
            reload: 0x1_0000,
            write_low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
            gate,
            running: false,
            null_count: true,
            start_tick: 0,
            counted: 0,
        }
    }

    /// A divisor of 1 is illegal in the rate generators.
    fn least_reload(&self) -> u32 {
        if matches!(self.mode, 2 | 3) { 2 } else { 1 }
    }

    fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// The gate stops the counter in modes 0 and 4 and holds it in modes 2 and 3.
    fn counts(&self) -> bool {
        self.running && (self.gate || matches!(self.mode, 1 | 5))
    }

    fn elapsed(&self, now: u64) -> u64 {
        if self.counts() {
            self.counted
                .saturating_add(ticks(now).saturating_sub(self.start_tick))
        } else {
            self.counted
        }
    }

    fn counter(&self, now: u64) -> u16 {
        let reload = u64::from(self.reload);
        let elapsed = self.elapsed(now);
        let value = match self.mode {
            2 => reload - elapsed % reload,
            // Counts down by two, reloading on each half period; an odd count loses its lowest bit.
            3 => {
                let even = (reload & !1).max(2);
                even - (elapsed * 2) % even
            }
            _ => {
                let modulus = self.modulus();
                (reload % modulus + modulus - elapsed % modulus) % modulus
            }
        };
        if self.bcd {
            to_bcd(value % 10_000)
        } else {
            value as u16
        }
    }

    fn output(&self, now: u64) -> bool {
        let reload = u64::from(self.reload);
        let elapsed = self.elapsed(now);
        match self.mode {
            0 => self.running && elapsed >= reload,
            1 => !self.running || elapsed >= reload,
            2 => !self.counts() || elapsed % reload != reload - 1,
            3 => !self.counts() || elapsed % reload < reload.div_ceil(2),
            _ => !self.running || elapsed != reload,
        }
    }

    /// Machine time of the next rising edge of OUT after `now`.
    fn next_rise(&self, now: u64) -> Option<u64> {
        if !self.counts() {
            return None;
        }
        let reload = u64::from(self.reload);
        let elapsed = self.elapsed(now);
        let at = match self.mode {
            // A guest that asks for hundreds of thousands of interrupts a second gets fewer: the phase
            // stays, but the timer thread rests between two of them.
            2 | 3 => ((elapsed + MIN_PERIOD_TICKS.saturating_sub(reload)) / reload + 1) * reload,
            0 | 1 if elapsed < reload => reload,
            4 | 5 if elapsed <= reload => reload + 1,
            _ => return None,
        };
        Some(nanos(self.start_tick.saturating_add(at - self.counted)))
    }

    fn start(&mut self, now: u64) {
        self.start_tick = ticks(now);
        self.counted = 0;
        self.running = true;
        self.null_count = false;
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        if gate == self.gate {
            return;
        }
        match self.mode {
            0 | 4 => {
                self.counted = self.elapsed(now);
                self.start_tick = ticks(now);
            }
            // A rising gate triggers the one-shots and restarts the rate generators.
            _ if gate && (self.running || !self.null_count || self.has_count()) => self.start(now),
            _ => {}
        }
        self.gate = gate;
    }

    /// Modes 1 and 5: a count was written and waits for its trigger.
    fn has_count(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    fn write_control(&mut self, value: u8) {
        self.access = match (value >> 4) & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::LowThenHigh,
        };
        // Bit 2 of the mode is "don't care" for modes 2 and 3.
        self.mode = match (value >> 1) & 7 {
            6 => 2,
            7 => 3,
            mode => mode,
        };
        self.bcd = value & 1 != 0;
        self.reload = self.reload.max(self.least_reload());
        self.running = false;
        self.null_count = true;
        self.counted = 0;
        self.write_low = None;
        self.read_high = false;
        self.latched_count = None;
        self.latched_status = None;
    }

    fn write_count(&mut self, value: u8, now: u64) {
        let count = match (self.access, self.write_low.take()) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::LowThenHigh, Some(low)) => u16::from(value) << 8 | u16::from(low),
            (Access::LowThenHigh, None) => {
                self.write_low = Some(value);
                if self.mode == 0 {
                    // The first byte stops the counter and pulls OUT low.
                    self.running = false;
                }
                return;
            }
        };
        let count = if self.bcd {
            from_bcd(count)
        } else {
            u32::from(count)
        };
        self.reload = if count == 0 {
            self.modulus() as u32
        } else {
            count
        };
        self.reload = self.reload.max(self.least_reload());
        self.null_count = true;
        if !matches!(self.mode, 1 | 5) {
            self.start(now);
        }
    }

    fn latch_count(&mut self, now: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.counter(now));
        }
    }

    fn latch_status(&mut self, now: u64) {
        if self.latched_status.is_none() {
            let access = match self.access {
                Access::Low => 1,
                Access::High => 2,
                Access::LowThenHigh => 3,
            };
            self.latched_status = Some(
                u8::from(self.output(now)) << 7
                    | u8::from(self.null_count) << 6
                    | access << 4
                    | self.mode << 1
                    | u8::from(self.bcd),
            );
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self
            .latched_count
            .unwrap_or_else(|| self.counter(now))
            .to_le_bytes();
        let (byte, done) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::LowThenHigh => {
                self.read_high = !self.read_high;
                if self.read_high {
                    (low, false)
                } else {
                    (high, true)
                }
            }
        };
        if done {
            self.latched_count = None;
        }
        byte
    }

    fn validate(&self) -> Result<(), StateError> {
        let Self {
            mode,
            bcd: _,
            access: _,
            reload,
            write_low: _,
            read_high: _,
            latched_count: _,
            latched_status: _,
            gate: _,
            running: _,
            null_count: _,
            start_tick,
            counted,
        } = self;
        require(
            *mode <= 5,
            "pit",
            "a channel is in a mode that does not exist",
        )?;
        let counts = self.least_reload()..=0x1_0000;
        require(counts.contains(reload), "pit", "a count is out of range")?;
        let times = *start_tick < 1 << 62 && *counted < 1 << 62;
        require(times, "pit", "a channel started at a time that never was")
    }
}

fn to_bcd(value: u64) -> u16 {
    let digit = |divisor: u64| (value / divisor % 10) as u16;
    digit(1000) << 12 | digit(100) << 8 | digit(10) << 4 | digit(1)
}

fn from_bcd(value: u16) -> u32 {
    (0..4).rev().fold(0, |sum, i| {
        sum * 10 + u32::from(value >> (4 * i) & 0xf).min(9)
    })
}

/// Everything that changes in a [`Pit`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    channels: [Channel; 3],
    /// Port 0x61 bit 1.
    speaker: bool,
    /// The level of the IRQ 0 line.
    line: bool,
}

impl PitState {
    fn new() -> Self {
        Self {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            speaker: false,
            line: false,
        }
    }
}

/// The timer: channel 0 is IRQ 0, channel 1 the old DRAM refresh, channel 2 the speaker.
pub struct Pit {
    irq: IrqLine,
    timer: Timer,
    state: Mutex<PitState>,
}

impl Pit {
    /// First of the four counter and control ports.
    pub const PORT: u16 = 0x40;
    /// System control port B: gate of channel 2, speaker, refresh and OUT 2.
    pub const CONTROL_B_PORT: u16 = 0x61;

    /// A PIT at power-on; `irq` is IRQ 0.
    pub fn new(timers: &TimerService, irq: IrqLine) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| Self {
            irq,
            timer: timers.timer(this.clone()),
            state: Mutex::new(PitState::new()),
        })
    }

    /// Goes back to power-on.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        *state = PitState::new();
        self.sync(&mut state);
    }

    /// Drives IRQ 0 to the level of OUT 0 and arms the timer for its next rise.
    fn sync(&self, state: &mut PitState) {
        let now = self.timer.now();
        let channel = &state.channels[0];
        state.line = match channel.mode {
            0 => channel.output(now),
            // The low phases matter only for the edge at their end, which the timer makes.
            _ => true,
        };
        self.irq.set(state.line);
        self.timer.set(state.channels[0].next_rise(now));
    }

    fn read_byte(&self, offset: u16) -> u8 {
        let now = self.timer.now();
        match self.state.lock().channels.get_mut(usize::from(offset)) {
            Some(channel) => channel.read(now),
            None => 0xff,
        }
    }

    fn write_byte(&self, offset: u16, value: u8) {
        let now = self.timer.now();
        let mut state = self.state.lock();
        if let Some(channel) = state.channels.get_mut(usize::from(offset)) {
            channel.write_count(value, now);
        } else if value >> 6 == 3 {
            read_back(&mut state, value, now);
            return;
        } else {
            let channel = &mut state.channels[usize::from(value >> 6)];
            if value & 0x30 == 0 {
                channel.latch_count(now);
                return;
            }
            channel.write_control(value);
        }
        if offset == 0 || (offset == 3 && value >> 6 == 0) {
            self.sync(&mut state);
        }
    }

    fn read_control_b(&self) -> u8 {
        let now = self.timer.now();
        let state = self.state.lock();
        let speaker = &state.channels[2];
        // Bit 4 toggles with each DRAM refresh, every 15.085 µs.
        let refresh = (now / 15_085) & 1;
        u8::from(speaker.gate)
            | u8::from(state.speaker) << 1
            | (refresh as u8) << 4
            | u8::from(speaker.output(now)) << 5
    }

    fn write_control_b(&self, value: u8) {
        let now = self.timer.now();
        let mut state = self.state.lock();
        state.channels[2].set_gate(value & 1 != 0, now);
        state.speaker = value & 2 != 0;
    }

    /// The state for a snapshot.
    pub fn save(&self) -> PitState {
        self.state.lock().clone()
    }

    /// Puts a saved state back; machine time must be that of the snapshot already.
    pub fn restore(&self, saved: PitState) -> Result<(), StateError> {
        let PitState {
            channels,
            speaker: _,
            line,
        } = &saved;
        channels.iter().try_for_each(Channel::validate)?;
        self.irq.set(*line);
        let mut state = self.state.lock();
        *state = saved;
        self.timer
            .set(state.channels[0].next_rise(self.timer.now()));
        Ok(())
    }

    /// The device of port 0x61.
    pub fn control_b(self: &Arc<Self>) -> Arc<dyn PortDevice> {
        Arc::new(ControlB(self.clone()))
    }
}

/// The read-back command latches several counters' counts and states at once.
fn read_back(state: &mut PitState, value: u8, now: u64) {
    for (i, channel) in state.channels.iter_mut().enumerate() {
        if value & (2 << i) != 0 {
            if value & 0x20 == 0 {
                channel.latch_count(now);
            }
            if value & 0x10 == 0 {
                channel.latch_status(now);
            }
        }
    }
}

impl TimerTarget for Pit {
    fn timer_expired(&self, now_ns: u64) {
        let mut state = self.state.lock();
        let channel = &state.channels[0];
        // Periods that passed while the host was busy elsewhere are not made up for: the phase stays.
        match channel.mode {
            0 => state.line = channel.output(now_ns),
            _ if channel.counts() => {
                state.line = true;
                self.irq.set(false);
            }
            _ => {}
        }
        self.irq.set(state.line);
        self.timer.set(state.channels[0].next_rise(now_ns));
    }
}

impl PortDevice for Pit {
    fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.read_byte(offset + i as u16);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            self.write_byte(offset + i as u16, *byte);
        }
    }
}

struct ControlB(Arc<Pit>);

impl PortDevice for ControlB {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(self.0.read_control_b());
    }

    fn write(&self, _offset: u16, data: &[u8]) {
        if let Some(value) = data.first() {
            self.0.write_control_b(*value);
        }
    }
}

impl std::fmt::Debug for Pit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pit")
            .field("state", &*self.state.lock())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::testing::LineProbe;

    struct Rig {
        timers: Arc<TimerService>,
        probe: Arc<LineProbe>,
        pit: Arc<Pit>,
    }

    fn rig() -> Rig {
        let timers = TimerService::manual();
        let (probe, irq) = LineProbe::new();
        let pit = Pit::new(&timers, irq);
        Rig { timers, probe, pit }
    }

    impl Rig {
        fn load(&self, channel: u8, mode: u8, count: u16) {
            self.pit.write(3, &[channel << 6 | 0x30 | mode << 1]);
            self.pit.write(channel.into(), &[count as u8]);
            self.pit.write(channel.into(), &[(count >> 8) as u8]);
        }
        fn read16(&self, channel: u16) -> u16 {
            let mut bytes = [0; 2];
            for byte in &mut bytes {
                self.pit.read(channel, std::slice::from_mut(byte));
            }
            u16::from_le_bytes(bytes)
        }
        fn advance_ticks(&self, count: u64) {
            self.timers
                .advance(nanos(ticks(self.timers.now()) + count) - self.timers.now());
        }
    }

    #[test]
    fn rate_generator_interrupts_at_its_rate() {
        let r = rig();
        r.load(0, 2, 11_932);
        let before = r.probe.edges();
        r.timers.advance(1_000_000_000);
        let edges = r.probe.edges() - before;
        assert!(
            (99..=100).contains(&edges),
            "{edges} edges at 100 Hz in a second"
        );
    }

    #[test]
    fn terminal_count_interrupts_once() {
        let r = rig();
        r.load(0, 0, 1000);
        assert!(!r.probe.level());
        r.advance_ticks(999);
        assert!(!r.probe.level());
        assert_eq!(r.read16(0), 1);
        r.advance_ticks(1);
        assert!(r.probe.level());
        assert_eq!(r.read16(0), 0);
        let edges = r.probe.edges();
        r.timers.advance(1_000_000_000);
        assert_eq!(r.probe.edges(), edges);
        // The counter runs on below zero.
        assert_ne!(r.read16(0), 0);
    }

    #[test]
    fn strobe_and_square_wave() {
        let r = rig();
        r.load(2, 3, 100);
        r.pit.write_control_b(1);
        let out = || r.pit.read_control_b() & 0x20 != 0;
        assert!(out());
        r.advance_ticks(50);
        assert!(!out());
        r.advance_ticks(50);
        assert!(out());
        assert_eq!(r.read16(2), 100);
        r.advance_ticks(10);
        assert_eq!(r.read16(2), 80);
        r.load(2, 4, 10);
        r.advance_ticks(10);
        assert!(!out());
        r.advance_ticks(1);
        assert!(out());
    }

    #[test]
    fn gate_holds_and_triggers_channel_2() {
        let r = rig();
        r.load(2, 0, 1000);
        r.advance_ticks(500);
        assert_eq!(r.read16(2), 1000, "gate low");
        r.pit.write_control_b(1);
        r.advance_ticks(400);
        r.pit.write_control_b(0);
        r.advance_ticks(400);
        assert_eq!(r.read16(2), 600);
        r.pit.write_control_b(1);
        r.advance_ticks(600);
        assert_ne!(r.pit.read_control_b() & 0x20, 0);
        // One-shot: waits for the gate's rise.
        r.pit.write_control_b(0);
        r.load(2, 1, 100);
        r.advance_ticks(200);
        assert_ne!(r.pit.read_control_b() & 0x20, 0);
        r.pit.write_control_b(1);
        assert_eq!(r.pit.read_control_b() & 0x20, 0);
        r.advance_ticks(100);
        assert_ne!(r.pit.read_control_b() & 0x20, 0);
    }

    #[test]
    fn latch_and_read_back() {
        let r = rig();
        r.load(0, 2, 1000);
        r.advance_ticks(100);
        r.pit.write(3, &[0x00]);
        r.advance_ticks(100);
        assert_eq!(r.read16(0), 900, "latched");
        assert_eq!(r.read16(0), 800);
        r.pit.write(3, &[0xc2]);
        let mut status = [0];
        r.pit.read(0, &mut status);
        assert_eq!(status[0], 0b1011_0100);
        assert_eq!(r.read16(0), 800);
    }

    #[test]
    fn bcd_counts() {
        let r = rig();
        r.pit.write(3, &[0x35]);
        r.pit.write(0, &[0x00]);
        r.pit.write(0, &[0x10]);
        r.advance_ticks(1);
        assert_eq!(r.read16(0), 0x0999);
        assert_eq!(from_bcd(0x9999), 9999);
    }

    #[test]
    fn a_start_in_the_far_future_is_not_due() {
        let r = rig();
        r.load(0, 2, 1000);
        let mut saved = r.pit.save();
        saved.channels[0].start_tick = (1 << 62) - 1;
        r.pit.restore(saved).unwrap();
        let next = r.pit.state.lock().channels[0].next_rise(r.timers.now());
        assert_eq!(next, Some(u64::MAX));
    }

    #[test]
    fn state_continues_in_a_fresh_device() {
        let r = rig();
        r.load(0, 0, 1000);
        r.advance_ticks(400);
        let (saved, now) = (r.pit.save(), r.timers.now());
        let other = rig();
        other.timers.set_now(now);
        other.pit.restore(saved.clone()).unwrap();
        other.advance_ticks(600);
        assert!(other.probe.level());
        let mut bad = saved;
        bad.channels[1].reload = 0;
        assert!(other.pit.restore(bad).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_sequence_of_accesses_panics(
            ops in proptest::collection::vec((0u16..5, proptest::num::u8::ANY, 0u64..1u64 << 40), 1..200),
        ) {
            let r = rig();
            let b = r.pit.control_b();
            for (port, value, ns) in ops {
                match port {
                    4 => b.write(0, &[value]),
                    _ => r.pit.write(port, &[value]),
                }
                // Long idle stretches with a fast timer would only make the test slow.
                r.timers.set_now(r.timers.now().saturating_add(ns));
                r.timers.advance(1000);
                r.pit.read(port.min(3), &mut [0]);
                b.read(0, &mut [0]);
                r.pit.restore(r.pit.save()).unwrap();
            }
        }
    }
}
