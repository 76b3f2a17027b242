//! The probe of the software processor.

use std::time::{Duration, Instant};

use skerry_hypervisor::cpu_model::CpuModel;
use skerry_hypervisor::{Capabilities, Hypervisor, ProbeReport};
use skerry_hypervisor_soft::Soft;

#[test]
fn the_probe_is_short_and_succeeds() {
    let start = Instant::now();
    let capabilities = Soft::probe().expect("a processor in software works anywhere");
    let took = start.elapsed();
    println!("{:?} MIPS in {took:?}", capabilities.measured_mips);
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert!(capabilities.measured_mips > Some(1.0));
    let report = ProbeReport {
        backend: "soft",
        result: Ok(capabilities.clone()),
    };
    let usable = Soft::usable().expect("a processor in software works anywhere");
    let unmeasured = Capabilities {
        measured_mips: None,
        ..capabilities
    };
    assert_eq!(usable, unmeasured);
    let json = serde_json::to_value(&report).expect("a report");
    assert_eq!(json["usable"], true);
    assert_eq!(json["backend"], "soft");
}

#[test]
fn named_models_can_be_had() {
    let capabilities = Soft::probe().expect("a processor in software works anywhere");
    let soft = Soft::open().expect("a processor in software works anywhere");
    let best = CpuModel::best(&capabilities);
    for model in [CpuModel::V2, best, CpuModel::Host] {
        let table = model.cpuid(&capabilities, 2, 1).expect("a table");
        assert_eq!(
            table.missing_from(soft.supported_cpuid()),
            Vec::<String>::new()
        );
        assert_eq!(table.tsc_khz(), Some(capabilities.tsc_khz));
    }
    if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        assert_eq!(best, CpuModel::V3);
    }
}
