//! The time-stamp counter and the paravirtual clock of the KVM interface.
//!
//! The TSC is the guest clock (nanoseconds) times a factor, plus an offset: a guest that was started
//! where the counter has another frequency keeps it. The paravirtual clock publishes, in guest memory,
//! how to turn a TSC value back into nanoseconds.

use std::sync::atomic::Ordering;

use crate::cpu::Cpu;
use crate::trap::Trap;

/// Ticks of a time-stamp counter in nanoseconds of the guest clock, and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscScale {
    khz: u32,
    /// Ticks of a nanosecond, as a fixed-point number with [`Self::TICK_BITS`] after the point;
    /// rounded down, as the rest.
    ticks: u64,
    /// Nanoseconds of a tick, with [`Self::NS_BITS`].
    ns: u64,
    /// For the guest's own conversion: nanoseconds = (ticks << shift) * mul >> 32.
    mul: u32,
    shift: i8,
}

impl Default for TscScale {
    fn default() -> Self {
        Self::of(Self::GHZ)
    }
}

impl TscScale {
    const GHZ: u32 = 1_000_000;
    const TICK_BITS: u32 = 32;
    const NS_BITS: u32 = 56;
    /// What a counter can have, in kHz: what is past it no processor has, and the factors would not
    /// fit their words.
    pub const RANGE: std::ops::RangeInclusive<u32> = 10_000..=20_000_000;

    /// The scale of a counter of `khz`; `None` outside of [`Self::RANGE`].
    pub fn new(khz: u32) -> Option<Self> {
        Self::RANGE.contains(&khz).then(|| Self::of(khz))
    }

    fn of(khz: u32) -> Self {
        let ticks = (u64::from(khz) << Self::TICK_BITS) / u64::from(Self::GHZ);
        let ns = ((1u128 << (Self::TICK_BITS + Self::NS_BITS)) / u128::from(ticks)) as u64;
        // The factor with its top bit set: all 32 bits count.
        let factor = |shift: i32| {
            let ghz = u128::from(Self::GHZ) << 64;
            let khz = (u128::from(khz) << 32) << (shift + 16);
            (ghz << 16) / khz
        };
        let shift = (-15..16)
            .find(|shift| factor(*shift) >> 32 == 0)
            .unwrap_or_default();
        Self {
            khz,
            ticks,
            ns,
            mul: factor(shift) as u32,
            shift: shift as i8,
        }
    }

    /// Its frequency in kHz.
    pub fn khz(&self) -> u32 {
        self.khz
    }

    /// What the counter stands at `ns` nanoseconds after 0.
    #[inline]
    pub fn ticks(&self, ns: u64) -> u64 {
        ((u128::from(ns) * u128::from(self.ticks)) >> Self::TICK_BITS) as u64
    }

    /// The first nanosecond at which the counter stands at `ticks` or more.
    pub fn ns(&self, ticks: u64) -> u64 {
        let near = (u128::from(ticks) * u128::from(self.ns)) >> Self::NS_BITS;
        let Ok(mut ns) = u64::try_from(near) else {
            return u64::MAX;
        };
        // Rounded down twice: short by some nanoseconds at the most.
        let reached =
            |ns: u64| (u128::from(ns) * u128::from(self.ticks)) >> Self::TICK_BITS >= ticks.into();
        while !reached(ns) && ns != u64::MAX {
            ns += 1;
        }
        ns
    }
}

/// Time-stamp counter and paravirtual clock of one processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeState {
    /// The counter's frequency.
    pub scale: TscScale,
    /// TSC minus scaled guest clock.
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// MSR_KVM_WALL_CLOCK as last written.
    pub kvm_wall_clock: u64,
    /// MSR_KVM_SYSTEM_TIME: address of the clock's page, bit 0 enables.
    pub kvm_system_time: u64,
}

impl TimeState {
    /// The counter when the guest clock stands at `clock_ns`.
    #[inline]
    pub fn tsc_at(&self, clock_ns: u64) -> u64 {
        self.scale.ticks(clock_ns).wrapping_add(self.tsc_offset)
    }

    /// The guest clock when the counter reaches `tsc`; 0 if it is past that already at 0.
    pub(crate) fn clock_at(&self, tsc: u64) -> u64 {
        // The counter may be behind the clock (negative offset).
        let ticks = i128::from(tsc) - i128::from(self.tsc_offset as i64);
        self.scale.ns(ticks.clamp(0, i128::from(u64::MAX)) as u64)
    }
}

/// MSRs of the KVM clock: the old pair and the new one.
pub(crate) mod kvm_msr {
    pub(crate) const WALL_CLOCK: u32 = 0x11;
    pub(crate) const SYSTEM_TIME: u32 = 0x12;
    pub(crate) const WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
    pub(crate) const SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
}

/// `pvclock_vcpu_time_info`: version u32, pad u32, tsc_timestamp u64, system_time u64, mul u32,
/// shift i8, flags u8, pad[2].
const SYSTEM_TIME_SIZE: usize = 32;
const FLAG_TSC_STABLE: u8 = 1;

fn system_time_record(
    version: u32,
    tsc: u64,
    system_ns: u64,
    scale: &TscScale,
) -> [u8; SYSTEM_TIME_SIZE] {
    let mut record = [0; SYSTEM_TIME_SIZE];
    record[0..4].copy_from_slice(&version.to_le_bytes());
    record[8..16].copy_from_slice(&tsc.to_le_bytes());
    record[16..24].copy_from_slice(&system_ns.to_le_bytes());
    record[24..28].copy_from_slice(&scale.mul.to_le_bytes());
    record[28] = scale.shift as u8;
    record[29] = FLAG_TSC_STABLE;
    record
}

impl Cpu {
    /// The time-stamp counter.
    #[inline]
    pub fn tsc(&self) -> u64 {
        self.sys.time.tsc_at(self.machine.host.clock_ns())
    }

    /// Gives the counter another frequency: before the processor first runs. `false` if no counter
    /// can have it.
    pub fn set_tsc_khz(&mut self, khz: u32) -> bool {
        let scale = TscScale::new(khz);
        if let Some(scale) = scale {
            self.sys.time.scale = scale;
        }
        scale.is_some()
    }

    /// TSC minus scaled guest clock.
    pub fn tsc_offset(&self) -> u64 {
        self.sys.time.tsc_offset
    }

    /// Moves the counter, no adjustment follows: to bring processors in step whose states were not
    /// read at one moment.
    pub fn set_tsc_offset(&mut self, offset: u64) {
        self.sys.time.tsc_offset = offset;
        self.apic_timer_due();
        self.publish_system_time();
    }

    /// Writes the time-stamp counter: IA32_TSC_ADJUST moves along (SDM 3B §18.17.3).
    pub(crate) fn set_tsc(&mut self, value: u64) {
        let delta = value.wrapping_sub(self.tsc());
        self.shift_tsc(delta);
        self.sys.time.tsc_adjust = self.sys.time.tsc_adjust.wrapping_add(delta);
    }

    /// Writes IA32_TSC_ADJUST: the TSC moves by the difference.
    pub(crate) fn set_tsc_adjust(&mut self, value: u64) {
        let delta = value.wrapping_sub(self.sys.time.tsc_adjust);
        self.sys.time.tsc_adjust = value;
        self.shift_tsc(delta);
    }

    fn shift_tsc(&mut self, delta: u64) {
        let time = &mut self.sys.time;
        time.tsc_offset = time.tsc_offset.wrapping_add(delta);
        self.apic_timer_due();
        self.publish_system_time();
    }

    /// Sets the counter as a snapshot has it, at that reading of the guest clock: no adjustment
    /// follows.
    pub(crate) fn restore_tsc(&mut self, value: u64, clock_ns: u64) {
        let time = &mut self.sys.time;
        time.tsc_offset = value.wrapping_sub(time.scale.ticks(clock_ns));
    }

    /// WRMSR of a wall clock MSR: writes the boot time at the address (version, seconds,
    /// nanoseconds; u32 each).
    pub(crate) fn kvm_write_wall_clock(&mut self, address: u64) -> Result<(), Trap> {
        self.sys.time.kvm_wall_clock = address;
        let base = self.machine.host.wall_clock_base_ns();
        let (seconds, ns) = (base / 1_000_000_000, base % 1_000_000_000);
        let gpa = address & !3;
        let memory = &self.machine.memory;
        // Odd while it changes, even and different after.
        let mut version = [0; 4];
        memory.read_physical(gpa, &mut version);
        let version = u32::from_le_bytes(version) | 1;
        let mut record = [0; 12];
        record[0..4].copy_from_slice(&version.to_le_bytes());
        record[4..8].copy_from_slice(&(seconds as u32).to_le_bytes());
        record[8..12].copy_from_slice(&(ns as u32).to_le_bytes());
        memory.write_physical(gpa, &record);
        std::sync::atomic::fence(Ordering::SeqCst);
        memory.write_physical(gpa, &version.wrapping_add(1).to_le_bytes());
        Ok(())
    }

    /// WRMSR of a system time MSR.
    pub(crate) fn kvm_write_system_time(&mut self, value: u64) -> Result<(), Trap> {
        self.sys.time.kvm_system_time = value;
        self.publish_system_time();
        Ok(())
    }

    /// Writes the clock record where the guest asked for it: when it asks, and whenever the TSC
    /// and the clock move apart.
    ///
    /// The records of all processors name one moment, so that what they tell is equal to the
    /// nanosecond.
    pub(crate) fn publish_system_time(&mut self) {
        let time = &self.sys.time;
        let msr = time.kvm_system_time;
        if msr & 1 == 0 {
            return;
        }
        let gpa = msr & !3;
        let clock = self.machine.host.clock_base_ns();
        let record = |version| system_time_record(version, time.tsc_at(clock), clock, &time.scale);
        let memory = &self.machine.memory;
        let mut version = [0; 4];
        memory.read_physical(gpa, &mut version);
        let version = u32::from_le_bytes(version) | 1;
        memory.write_physical(gpa, &record(version));
        std::sync::atomic::fence(Ordering::SeqCst);
        memory.write_physical(gpa, &version.wrapping_add(1).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The formula of the interface, as a guest computes it.
    fn guest_time(record: &[u8; SYSTEM_TIME_SIZE], tsc: u64) -> u64 {
        let word = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().expect("8 bytes"));
        let mul = u32::from_le_bytes(record[24..28].try_into().expect("4 bytes"));
        let delta = tsc - word(8);
        let delta = match record[28] as i8 {
            left @ 0.. => delta << left,
            right => delta >> -right,
        };
        word(16) + ((u128::from(delta) * u128::from(mul)) >> 32) as u64
    }

    const DAY: u64 = 86_400_000_000_000;

    #[test]
    fn at_a_gigahertz_one_tick_is_one_nanosecond() {
        let scale = TscScale::default();
        for ns in [0, 1, 12_345, DAY, u64::MAX] {
            assert_eq!(scale.ticks(ns), ns);
            assert_eq!(scale.ns(ns), ns);
        }
        let record = system_time_record(3, 5_000, 70_000, &scale);
        assert_eq!(guest_time(&record, 5_000), 70_000);
        assert_eq!(guest_time(&record, 5_123), 70_123);
        assert_eq!(guest_time(&record, 5_000 + DAY), 70_000 + DAY);
    }

    #[test]
    fn impossible_frequencies_are_refused() {
        for khz in [0, 9_999, 20_000_001, u32::MAX] {
            assert_eq!(TscScale::new(khz), None);
        }
    }

    proptest! {
        #[test]
        fn scales_there_and_back(khz in TscScale::RANGE, ns in 0..1000 * DAY) {
            let scale = TscScale::new(khz).expect("in range");
            let ticks = scale.ticks(ns);
            let exact = u128::from(ns) * u128::from(khz) / 1_000_000;
            prop_assert!(u128::from(ticks) <= exact);
            prop_assert!(exact - u128::from(ticks) <= exact / 10_000_000 + 1);
            // The first nanosecond with these ticks, and not one earlier.
            let back = scale.ns(ticks);
            prop_assert!(back <= ns);
            prop_assert_eq!(scale.ticks(back), ticks);
            prop_assert!(back == 0 || scale.ticks(back - 1) < ticks);
        }

        #[test]
        fn guests_compute_the_guest_clock(khz in TscScale::RANGE, at in 0..100 * DAY, went in 0..DAY) {
            let time = TimeState {
                scale: TscScale::new(khz).expect("in range"),
                tsc_offset: 77,
                ..TimeState::default()
            };
            let record = system_time_record(1, time.tsc_at(at), at, &time.scale);
            let told = guest_time(&record, time.tsc_at(at + went));
            // Never ahead: at the next publication the clock must not step back. A tick of the
            // slowest counter is 100 ns.
            prop_assert!(told <= at + went);
            prop_assert!(at + went - told <= went / 5_000_000 + 200, "{} behind", at + went - told);
        }

        #[test]
        fn any_deadline_has_a_time(khz in TscScale::RANGE, tsc: u64, tsc_offset: u64) {
            let scale = TscScale::new(khz).expect("in range");
            let time = TimeState { scale, tsc_offset, ..TimeState::default() };
            let at = time.clock_at(tsc);
            if tsc_offset as i64 >= 0 && tsc_offset <= tsc && at < u64::MAX / 32 {
                prop_assert!(time.tsc_at(at) >= tsc);
            }
        }
    }
}
