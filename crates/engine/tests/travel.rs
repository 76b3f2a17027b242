//! Guests go from one backend to another: states, clocks, timers, events.
//!
//! Where `/dev/kvm` can't be opened there is no second backend; the test says so. Where it only
//! emulates, the cases that need more are left out.

use skerry_hypervisor::Hypervisor;
use skerry_hypervisor::conformance::travel::{Journey, everything};
use skerry_hypervisor_kvm::Kvm;
use skerry_hypervisor_soft::Soft;

fn soft() -> Soft {
    Soft::open().expect("a processor in software works anywhere")
}

/// KVM, the frequency of its time-stamp counter, and whether it does more than emulate.
fn kvm() -> Option<(Kvm, u32, bool)> {
    match Kvm::open() {
        Ok(kvm) => {
            let tsc_khz = kvm.tsc_khz().expect("a frequency");
            Some((kvm, tsc_khz, Kvm::probe().is_ok()))
        }
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}

fn travels<A: Hypervisor, B: Hypervisor>(from: &A, to: &B, tsc_khz: u32, real: bool) {
    everything(&Journey {
        from,
        to,
        tsc_khz,
        real,
    });
}

#[test]
fn guests_travel_from_kvm_to_soft() {
    if let Some((kvm, tsc_khz, real)) = kvm() {
        travels(&kvm, &soft(), tsc_khz, real);
    }
}

#[test]
fn guests_travel_from_soft_to_kvm() {
    if let Some((kvm, tsc_khz, real)) = kvm() {
        travels(&soft(), &kvm, tsc_khz, real);
    }
}

#[test]
fn guests_travel_between_machines_of_kvm() {
    if let Some((kvm, tsc_khz, real)) = kvm() {
        travels(&kvm, &kvm, tsc_khz, real);
    }
}

#[test]
fn guests_travel_between_machines_of_the_software_processor() {
    for tsc_khz in [1_000_000, 2_400_123] {
        travels(&soft(), &soft(), tsc_khz, true);
    }
}
