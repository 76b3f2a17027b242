//! Clocks and timers.

use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::guest::{
    DATA, Guest, Handlers, apic_enable, apic_write, report, report_value, reported,
    reporting_handler, stop,
};
use crate::cpuid::{CpuidEntry, CpuidResult};
use crate::error::CreateVcpuError;
use crate::probe::chain;
use crate::traits::{Hypervisor, Vcpu, Vm};

/// Stores the time-stamp counter and reports, for ever.
pub(super) fn read_tsc(a: &mut CodeAssembler) -> Result<Handlers, IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.rdtsc()?;
    a.mov(dword_ptr(DATA), eax)?;
    a.mov(dword_ptr(DATA + 4), edx)?;
    report(a)?;
    a.jmp(again)?;
    Ok(vec![])
}

fn tsc_reader<H: Hypervisor>(hypervisor: &H) -> Guest<H> {
    Guest::new(hypervisor, read_tsc)
}

pub(super) fn tsc_is_monotonic_after_restore<H: Hypervisor>(hypervisor: &H) {
    let guest = tsc_reader(hypervisor);
    let mut vcpu = guest.start();
    reported(&mut vcpu);
    let mut last = guest.read(DATA);
    reported(&mut vcpu);
    assert!(guest.read(DATA) > last);
    last = guest.read(DATA);
    let state = vcpu.state().expect("a state");
    assert!(state.tsc >= last, "{} after {last}", state.tsc);
    drop(vcpu);
    std::thread::sleep(Duration::from_millis(30));
    for round in 0..3 {
        let fresh = guest.twin(hypervisor);
        let start = Instant::now();
        let mut vcpu = fresh.vcpu(0);
        fresh.vm.set_clock_ns(state.clock_ns).expect("a clock");
        vcpu.set_state(&state)
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
        let khz = u64::from(fresh.cpuid.tsc_khz().unwrap_or(8_000_000));
        let mut last = state.tsc;
        for _ in 0..3 {
            reported(&mut vcpu);
            let now = fresh.read(DATA);
            assert!(now >= last, "round {round}: {now} after {last}");
            last = now;
        }
        // It goes on from where it was, not from the host's counter.
        let most = (start.elapsed().as_micros() as u64 + 10_000) * khz / 1000 * 2;
        let went = last - state.tsc;
        assert!(
            went <= most,
            "round {round}: {went} ticks passed, {most} at the most"
        );
        let again = vcpu.state().expect("a state");
        assert!(again.tsc >= last);
    }
}

pub(super) fn tsc_has_the_frequency_told<H: Hypervisor>(hypervisor: &H) {
    let guest = tsc_reader(hypervisor);
    if let Some(khz) = guest.cpuid.tsc_khz() {
        assert_frequency(&guest, khz);
    }
}

/// A table may tell a frequency that is not the backend's own: the counter has it, or no processor is
/// made.
pub(super) fn tsc_has_another_frequency_or_none<H: Hypervisor>(hypervisor: &H) {
    for khz in [1_000_000, 1_234_567, 4_800_000] {
        let mut guest = tsc_reader(hypervisor);
        for entry in &mut guest.cpuid.entries {
            if matches!(entry.leaf, 0x15 | 0x4000_0010) {
                entry.result = CpuidResult::default();
            }
        }
        let result = CpuidResult {
            eax: 1,
            ebx: khz / 1000,
            ecx: 1_000_000,
            edx: 0,
        };
        let told = CpuidEntry {
            leaf: 0x15,
            subleaf: None,
            result,
        };
        guest.cpuid.entries.insert(0, told);
        let khz = guest.cpuid.tsc_khz().expect("a frequency");
        match guest.vm.create_vcpu(1, &guest.cpuid) {
            Ok(_) => assert_frequency(&guest, khz),
            Err(CreateVcpuError::Unsupported { feature, .. }) => {
                assert!(feature.contains(&khz.to_string()), "{feature}");
            }
            Err(error) => panic!("{}", chain(&error)),
        }
    }
}

fn assert_frequency<H: Hypervisor>(guest: &Guest<H>, khz: u32) {
    let mut vcpu = guest.start();
    reported(&mut vcpu);
    // Each reading lies between two moments of the host.
    let measure = |vcpu: &mut super::guest::VcpuOf<H>| {
        let before = Instant::now();
        reported(vcpu);
        (before, guest.read(DATA), Instant::now())
    };
    let first = measure(&mut vcpu);
    std::thread::sleep(Duration::from_millis(200));
    let second = measure(&mut vcpu);
    let ticks = (second.1 - first.1) as f64 / f64::from(khz) / 1000.0;
    let least = (second.0 - first.2).as_secs_f64() * 0.99;
    let most = (second.2 - first.0).as_secs_f64() * 1.01;
    assert!(
        (least..most).contains(&ticks),
        "{ticks} s, not {least} to {most}"
    );
}

pub(super) fn clock_round_trip<H: Hypervisor>(hypervisor: &H) {
    let guest = tsc_reader(hypervisor);
    let mut vcpu = guest.start();
    reported(&mut vcpu);
    let clock = || guest.vm.clock_ns().expect("a clock");
    let first = clock();
    assert!(clock() >= first);
    const TEN_HOURS: u64 = 36_000_000_000_000;
    guest.vm.set_clock_ns(TEN_HOURS).expect("a clock");
    let now = clock();
    assert!(
        (TEN_HOURS..TEN_HOURS + 5_000_000_000).contains(&now),
        "{now}"
    );
    std::thread::sleep(Duration::from_millis(5));
    assert!(clock() >= now + 4_000_000);
    reported(&mut vcpu);
}

/// Waits in a loop for the timer's handler.
fn timer_guest<H: Hypervisor>(
    hypervisor: &H,
    arm: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Guest<H> {
    Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        report_value(a, 1)?;
        arm(a)?;
        a.sti()?;
        stop(a)?;
        Ok(vec![(0x50, reporting_handler(a, 0x50, true)?)])
    })
}

pub(super) fn apic_timer_one_shot<H: Hypervisor>(hypervisor: &H) {
    let guest = timer_guest(hypervisor, |a| {
        apic_write(a, 0x3e0, 0xb)?;
        apic_write(a, 0x320, 0x50)?;
        apic_write(a, 0x380, 2_000_000)
    });
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    assert_eq!(reported(&mut vcpu), 0x50);
}

pub(super) fn apic_timer_deadline<H: Hypervisor>(hypervisor: &H) {
    let has_deadline = hypervisor
        .supported_cpuid()
        .get(1, 0)
        .is_some_and(|leaf| leaf.ecx & 1 << 24 != 0);
    assert!(has_deadline, "CPUID offers no TSC-deadline timer");
    let guest = timer_guest(hypervisor, |a| {
        apic_write(a, 0x320, 0x4_0050)?;
        // Serialises the write before the deadline's (Intel SDM 3A §12.5.4.1).
        a.mfence()?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.add(rax, 5_000_000)?;
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, 0x6e0)?;
        a.wrmsr()
    });
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    assert_eq!(reported(&mut vcpu), 0x50);
    let state = vcpu.state().expect("a state");
    assert!(state.tsc >= guest.read(DATA), "fired before its deadline");
}

pub(super) fn apic_timer_wakes_from_halt<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        let mut again = a.create_label();
        apic_enable(a)?;
        apic_write(a, 0x3e0, 0xb)?;
        apic_write(a, 0x320, 0x2_0050)?;
        apic_write(a, 0x380, 1_000_000)?;
        a.set_label(&mut again)?;
        a.sti()?;
        a.hlt()?;
        a.mov(eax, 2)?;
        report(a)?;
        a.jmp(again)?;
        Ok(vec![(0x50, reporting_handler(a, 0x50, true)?)])
    });
    let mut vcpu = guest.start();
    let mut fired = 0;
    for _ in 0..20 {
        fired += u32::from(reported(&mut vcpu) == 0x50);
    }
    assert!(fired >= 5, "a periodic timer fired {fired} times");
}
