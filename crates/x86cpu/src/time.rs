//! The time-stamp counter and the paravirtual clock of the KVM interface.
//!
//! The TSC is the guest clock (nanoseconds) plus an offset, so that snapshots travel between hosts.
//! The paravirtual clock publishes, in guest memory, how to turn a TSC value into nanoseconds; as
//! the TSC counts nanoseconds the factor is one.

use std::sync::atomic::Ordering;

use crate::cpu::Cpu;
use crate::trap::Trap;

/// Time-stamp counter and paravirtual clock of one processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeState {
    /// TSC minus guest clock.
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// MSR_KVM_WALL_CLOCK as last written.
    pub kvm_wall_clock: u64,
    /// MSR_KVM_SYSTEM_TIME: address of the clock's page, bit 0 enables.
    pub kvm_system_time: u64,
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
/// system time = (tsc - timestamp) << shift >> 32 * mul: for 1 GHz mul is 2^31 and shift 1.
const MUL: u32 = 1 << 31;
const SHIFT: i8 = 1;

fn system_time_record(version: u32, tsc: u64, system_ns: u64) -> [u8; SYSTEM_TIME_SIZE] {
    let mut record = [0; SYSTEM_TIME_SIZE];
    record[0..4].copy_from_slice(&version.to_le_bytes());
    record[8..16].copy_from_slice(&tsc.to_le_bytes());
    record[16..24].copy_from_slice(&system_ns.to_le_bytes());
    record[24..28].copy_from_slice(&MUL.to_le_bytes());
    record[28] = SHIFT as u8;
    record[29] = FLAG_TSC_STABLE;
    record
}

impl Cpu {
    /// The time-stamp counter.
    #[inline]
    pub fn tsc(&self) -> u64 {
        self.machine
            .host
            .clock_ns()
            .wrapping_add(self.sys.time.tsc_offset)
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

    /// Sets the counter as a snapshot has it: no adjustment follows.
    pub(crate) fn restore_tsc(&mut self, value: u64) {
        self.sys.time.tsc_offset = value.wrapping_sub(self.machine.host.clock_ns());
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
    pub(crate) fn publish_system_time(&mut self) {
        let msr = self.sys.time.kvm_system_time;
        if msr & 1 == 0 {
            return;
        }
        let gpa = msr & !3;
        let clock = self.machine.host.clock_ns();
        let tsc = clock.wrapping_add(self.sys.time.tsc_offset);
        let memory = &self.machine.memory;
        let mut version = [0; 4];
        memory.read_physical(gpa, &mut version);
        let version = u32::from_le_bytes(version) | 1;
        memory.write_physical(gpa, &system_time_record(version, tsc, clock));
        std::sync::atomic::fence(Ordering::SeqCst);
        memory.write_physical(gpa, &version.wrapping_add(1).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formula of the interface, as a guest computes it.
    fn guest_time(record: &[u8; SYSTEM_TIME_SIZE], tsc: u64) -> u64 {
        let word = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().expect("8 bytes"));
        let mul = u32::from_le_bytes(record[24..28].try_into().expect("4 bytes"));
        let delta = (tsc - word(8)) << record[28];
        word(16) + ((u128::from(delta) * u128::from(mul)) >> 32) as u64
    }

    #[test]
    fn one_tick_is_one_nanosecond() {
        let record = system_time_record(3, 5_000, 70_000);
        assert_eq!(guest_time(&record, 5_000), 70_000);
        assert_eq!(guest_time(&record, 5_123), 70_123);
        assert_eq!(
            guest_time(&record, 5_000 + 86_400_000_000_000),
            70_000 + 86_400_000_000_000
        );
    }
}
