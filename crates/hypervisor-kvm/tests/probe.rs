//! The probe, on whatever this machine has.

use std::time::{Duration, Instant};

use skerry_hypervisor::{Hypervisor, Unusable};
use skerry_hypervisor_kvm::Kvm;

#[test]
fn the_probe_ends_soon_and_explains_itself() {
    let start = Instant::now();
    let result = Kvm::probe();
    let took = start.elapsed();
    println!("probe took {took:?}: {result:#?}");
    // 150 ms of guest at the most; the rest is slack for a busy machine.
    assert!(took < Duration::from_secs(2), "{took:?}");
    match result {
        Ok(capabilities) => {
            assert!(capabilities.measured_mips > Some(1.0));
            assert!(capabilities.tsc_khz > 100_000);
            assert!(capabilities.supported_cpuid.get(0, 0).is_some());
        }
        Err(Unusable { reason, remedy, .. }) => {
            assert!(reason.contains("/dev/kvm"), "{reason}");
            assert!(!remedy.is_empty());
        }
    }
}
