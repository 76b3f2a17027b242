#![no_main]

use std::sync::LazyLock;

use skerry_hypervisor::Hypervisor;
use skerry_hypervisor_soft::Soft;
use skerry_machine::fuzzing::Seed;

static MACHINE: LazyLock<(Soft, Seed)> = LazyLock::new(|| {
    let soft = Soft::open().expect("a software processor");
    let seed = Seed::make(&soft).expect("a machine to start from");
    (soft, seed)
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let (soft, seed) = &*MACHINE;
    if let Err(fault) = seed.restore(soft, data) {
        panic!("{fault}");
    }
});
