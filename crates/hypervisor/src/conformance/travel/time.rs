//! Clocks and armed timers that travel.

use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::super::guest::{
    DATA, Guest, apic_enable, apic_write, report_value, reported, reporting_handler, stop,
};
use super::super::time::read_tsc;
use super::{Journey, set, state_of};
use crate::exit::Exit;
use crate::traits::{Hypervisor, Irqchip, Vm};

const TIMER: u32 = 0x50;
/// Nanoseconds of the count-downs, which are past the time that travelling takes.
const COUNT: u32 = 400_000_000;
const COUNT_TIME: Duration = Duration::from_nanos(COUNT as u64);
/// Clocks are read, and set, so far from exactly; a test bed is slow.
const SLACK: Duration = Duration::from_millis(100);

/// A guest that arms its timer, reports, and waits; its handler reports [`TIMER`].
fn arming<A: Hypervisor, B: Hypervisor>(
    journey: &Journey<'_, A, B>,
    arm: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Guest<A> {
    let guest = journey.home();
    guest.load(|a| {
        apic_enable(a)?;
        arm(a)?;
        report_value(a, 1)?;
        a.sti()?;
        stop(a)?;
        Ok(vec![(0x50, reporting_handler(a, TIMER, true)?)])
    });
    guest
}

fn counting_down(entry: u32) -> impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        apic_write(a, 0x3e0, 0xb)?;
        apic_write(a, 0x320, entry)?;
        apic_write(a, 0x380, COUNT)
    }
}

/// The timer fires there when it would have here, as the guest's clock tells.
fn fires_in_time<A: Hypervisor, B: Hypervisor>(
    journey: &Journey<'_, A, B>,
    home: &Guest<A>,
    times: u32,
) {
    let mut vcpu = home.start();
    assert_eq!(reported(&mut vcpu), 1);
    let armed = home.vm.clock_ns().expect("a clock");
    let state = state_of(&mut vcpu);
    // The guest is nowhere for a while; its time stands still.
    std::thread::sleep(COUNT_TIME);
    let (away, mut vcpu) = journey.travel(home, &state);
    let mut due = Duration::from_nanos(armed);
    for _ in 0..times {
        assert_eq!(reported(&mut vcpu), TIMER);
        due += COUNT_TIME;
        let now = Duration::from_nanos(away.vm.clock_ns().expect("a clock"));
        // Armed some time before the clock was read.
        assert!(now + SLACK >= due, "fired {:?} too early", due - now);
        assert!(now <= due + 5 * SLACK, "fired {:?} too late", now - due);
    }
}

pub(super) fn one_shot_timer_goes_on<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    fires_in_time(journey, &arming(journey, counting_down(TIMER)), 1);
}

pub(super) fn periodic_timer_goes_on<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    fires_in_time(
        journey,
        &arming(journey, counting_down(TIMER | 0x2_0000)),
        3,
    );
}

pub(super) fn deadline_timer_goes_on<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    let ticks = u64::from(COUNT) * u64::from(journey.tsc_khz) / 1_000_000;
    let home = arming(journey, |a| {
        apic_write(a, 0x320, TIMER | 0x4_0000)?;
        a.mfence()?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(rcx, ticks)?;
        a.add(rax, rcx)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, 0x6e0)?;
        a.wrmsr()
    });
    fires_in_time(journey, &home, 1);
}

/// A one-shot timer whose interrupt was taken here does not fire there, if the backend can tell.
pub(super) fn one_shot_timer_stays_over<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    let home = arming(journey, |a| {
        apic_write(a, 0x3e0, 0xb)?;
        apic_write(a, 0x320, TIMER)?;
        apic_write(a, 0x380, 1000)
    });
    let mut vcpu = home.start();
    assert_eq!(reported(&mut vcpu), 1);
    assert_eq!(reported(&mut vcpu), TIMER);
    let state = state_of(&mut vcpu);
    let count = state.lapic.as_ref().map(|lapic| lapic.registers[0x39]);
    if count != Some(0) {
        // It may come twice, as the backend has written.
        return;
    }
    let (_away, mut vcpu) = journey.travel(&home, &state);
    super::stop_anywhere(&mut vcpu, |exit| panic!("fired again: {exit:?}"));
}

fn reader<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) -> Guest<A> {
    let guest = journey.home();
    guest.load(read_tsc);
    guest
}

/// The counter goes on from its value, with its frequency, and with the clock.
pub(super) fn counter_goes_on<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    let home = reader(journey);
    let mut vcpu = home.start();
    reported(&mut vcpu);
    let last = home.read(DATA);
    let state = state_of(&mut vcpu);
    assert!(state.tsc >= last);
    std::thread::sleep(COUNT_TIME);
    let start = Instant::now();
    let (away, mut vcpu) = journey.travel(&home, &state);
    for _ in 0..3 {
        reported(&mut vcpu);
        let now = away.read(DATA);
        assert!(now >= state.tsc, "{now} after {}", state.tsc);
        let most = (start.elapsed() + SLACK).as_micros() as u64 * u64::from(journey.tsc_khz) / 1000;
        assert!(now - state.tsc <= most, "{} ticks passed", now - state.tsc);
        std::thread::sleep(Duration::from_millis(20));
    }
    let again = state_of(&mut vcpu);
    // As much time on the one as on the other.
    let ticks = (again.tsc - state.tsc) as f64 / f64::from(journey.tsc_khz) * 1e6;
    let clock = (again.clock_ns - state.clock_ns) as f64;
    // Half a millisecond is what reading them one after the other could cost in a test bed.
    assert!(
        (ticks - clock).abs() < 500_000.0 + clock / 1000.0,
        "{ticks} ns on the counter, {clock} on the clock"
    );
}

/// Processors whose states were read one after the other have one time again.
pub(super) fn counters_stay_in_step<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    let home = journey.home();
    let mut states = Vec::new();
    for id in 0..2 {
        let mut vcpu = home.vcpu(id);
        states.push(state_of(&mut vcpu));
        std::thread::sleep(Duration::from_millis(20));
    }
    let guest = Guest::bare(journey.to, Irqchip::Split);
    let mut away = guest;
    away.cpuid = home.cpuid.clone();
    let mut vcpus: Vec<_> = (0..2).map(|id| away.vcpu(id)).collect();
    away.vm.set_clock_ns(states[1].clock_ns).expect("a clock");
    for (vcpu, state) in vcpus.iter_mut().zip(&states) {
        set(vcpu, state);
        std::thread::sleep(Duration::from_millis(20));
    }
    let khz = f64::from(journey.tsc_khz);
    // What the counter of each stood at when the clock stood at 0.
    let origins: Vec<f64> = vcpus
        .iter_mut()
        .map(|vcpu| {
            let state = state_of(vcpu);
            state.tsc as f64 / khz * 1e6 - state.clock_ns as f64
        })
        .collect();
    let apart = (origins[0] - origins[1]).abs();
    assert!(apart < 500_000.0, "{apart} ns apart");
}

/// Where the paravirtual clock's record is.
const RECORD: u64 = DATA + 0x1000;

/// What a guest computes from the record at [`RECORD`] and its counter (the KVM interface's
/// `pvclock_vcpu_time_info`).
fn guest_clock<H: Hypervisor>(guest: &Guest<H>, tsc: u64) -> u64 {
    let (stamp, system) = (guest.read(RECORD + 8), guest.read(RECORD + 16));
    let last = guest.read(RECORD + 24);
    let (mul, shift) = (last as u32, (last >> 32) as i8);
    let delta = tsc.wrapping_sub(stamp);
    let delta = if shift < 0 {
        delta >> shift.unsigned_abs()
    } else {
        delta << shift
    };
    system.wrapping_add(((u128::from(delta) * u128::from(mul)) >> 32) as u64)
}

/// The guest's own reckoning of the time goes on, neither back nor far ahead.
pub(super) fn paravirtual_clock_goes_on<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    const NEW_REGISTERS: u32 = 1 << 3;
    let offered = journey.table().get(0x4000_0001, 0).unwrap_or_default().eax;
    if offered & NEW_REGISTERS == 0 {
        return;
    }
    let home = journey.home();
    home.load(|a| {
        a.mov(ecx, crate::msr::KVM_SYSTEM_TIME)?;
        a.mov(eax, RECORD as u32 | 1)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        read_tsc(a)
    });
    let mut vcpu = home.start();
    for _ in 0..3 {
        reported(&mut vcpu);
    }
    let before = guest_clock(&home, home.read(DATA));
    let real = home.vm.clock_ns().expect("a clock");
    assert!(before <= real + 1000 && real - before < SLACK.as_nanos() as u64);
    super::stop_anywhere(&mut vcpu, |exit| {
        assert!(matches!(exit, Exit::PortOut { .. }));
    });
    let state = state_of(&mut vcpu);
    let start = Instant::now();
    let (away, mut vcpu) = journey.travel(&home, &state);
    for _ in 0..3 {
        reported(&mut vcpu);
    }
    let told = guest_clock(&away, away.read(DATA));
    let since = told.checked_sub(before).expect("the clock went back");
    let most = (start.elapsed() + 2 * SLACK).as_nanos() as u64;
    assert!(since <= most, "{since} ns passed, of {most} at the most");
    let real = away.vm.clock_ns().expect("a clock");
    assert!(
        told <= real + 100_000 && real.saturating_sub(told) < SLACK.as_nanos() as u64,
        "the guest thinks {told}, the host {real}"
    );
}
