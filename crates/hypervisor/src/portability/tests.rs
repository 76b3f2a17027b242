use super::*;
use crate::cpu_model::CpuModel;
use crate::cpu_model::tests::{AMD, INTEL, capabilities};
use crate::cpuid::CpuidResult;

const MEMORY: u64 = 1 << 30;

fn change(table: &mut CpuidTable, leaf: u32, subleaf: u32, change: impl Fn(&mut CpuidResult)) {
    for entry in &mut table.entries {
        if entry.leaf == leaf && entry.subleaf.is_none_or(|s| s == subleaf) {
            change(&mut entry.result);
        }
    }
}

fn guest(here: &Capabilities, cpus: u32) -> Vec<CpuidTable> {
    (0..cpus)
        .map(|id| CpuModel::V3.cpuid(here, cpus, id).unwrap())
        .collect()
}

#[test]
fn at_home_nothing_is_in_the_way() {
    for vendor in [AMD, INTEL] {
        let here = capabilities(vendor);
        assert_eq!(check(&guest(&here, 2), MEMORY, &here), Ok(vec![]));
    }
}

#[test]
fn everything_in_the_way_is_named_at_once() {
    let home = capabilities(AMD);
    let tables = guest(&home, 2);
    let mut here = home.clone();
    here.max_vcpus = 1;
    here.tsc_khz = 3_000_000;
    here.physical_address_bits = 36;
    change(&mut here.accepted_cpuid, 1, 0, |r| r.ecx &= !(1 << 17));
    change(&mut here.accepted_cpuid, 0xd, 2, |r| r.ebx = 640);
    let refused = check(&tables, 64 << 30, &here).unwrap_err();
    assert_eq!(
        refused.problems,
        [
            Problem::Processors { guest: 2, most: 1 },
            Problem::Features(vec!["pcid".to_owned()]),
            Problem::TscFrequency {
                guest: 2_500_000,
                here: 3_000_000
            },
            Problem::Memory {
                guest_bits: 37,
                bits: 36
            },
            Problem::ExtendedState { component: 2 },
        ]
    );
    let text = refused.to_string();
    for part in [
        "it was shown pcid, which this processor doesn't have",
        "runs at 2500000 kHz, and this one's 3000000 kHz can't be scaled",
        "--cpu-model MODEL,-pcid,tsc-khz=3000000",
        "--hypervisor soft",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn what_is_named_in_the_remedy_helps() {
    let home = capabilities(AMD);
    let mut here = home.clone();
    here.tsc_khz = 2_000_000;
    change(&mut here.accepted_cpuid, 7, 0, |r| r.ebx &= !(1 << 10));
    let mut source = home.clone();
    source.tsc_scaling = true;
    let choice: crate::CpuChoice = "x86-64-v3,-invpcid,tsc-khz=2000000".parse().unwrap();
    let table = choice.cpuid(&source, 1, 0).unwrap();
    assert_eq!(check(&[table], MEMORY, &here), Ok(vec![]));
}

#[test]
fn frequencies_may_differ_a_little_or_be_scaled() {
    let home = capabilities(AMD);
    let tables = guest(&home, 1);
    let mut here = home.clone();
    here.tsc_khz = 2_500_500;
    assert_eq!(check(&tables, MEMORY, &here), Ok(vec![]));
    here.tsc_khz = 2_501_000;
    assert!(check(&tables, MEMORY, &here).is_err());
    here.tsc_scaling = true;
    assert_eq!(check(&tables, MEMORY, &here), Ok(vec![]));
}

#[test]
fn addresses_that_are_not_used_may_be_missing() {
    let home = capabilities(AMD);
    let tables = guest(&home, 1);
    let mut here = home.clone();
    here.physical_address_bits = 39;
    assert_eq!(check(&tables, 256 << 30, &here), Ok(vec![]));
    assert!(check(&tables, 512 << 30, &here).is_err());
}

#[test]
fn lost_defences_are_told_and_not_refused() {
    let home = capabilities(AMD);
    let tables = guest(&home, 1);
    let mut here = home.clone();
    change(&mut here.accepted_cpuid, 0x8000_0021, 0, |r| {
        r.eax = 1 << 2 | 1 << 27
    });
    change(&mut here.accepted_cpuid, 0x8000_0008, 0, |r| {
        r.ebx &= !(1 << 26)
    });
    let losses = check(&tables, MEMORY, &here).unwrap();
    let [Loss::Defences(names)] = losses.as_slice() else {
        panic!("{losses:?}");
    };
    for name in ["ssb-no", "automatic-ibrs", "srso-no"] {
        assert!(names.iter().any(|n| n == name), "{names:?}");
    }
    assert!(!names.iter().any(|n| n == "lfence-serialises"), "{names:?}");
}

#[test]
fn another_vendor_is_told_where_code_runs_on_its_processor() {
    let tables = guest(&capabilities(AMD), 1);
    let mut here = capabilities(INTEL);
    let losses = check(&tables, MEMORY, &here).unwrap();
    assert_eq!(
        losses,
        [Loss::Vendor {
            guest: "AMD".to_owned(),
            here: "Intel".to_owned()
        }]
    );
    here.native = false;
    assert_eq!(check(&tables, MEMORY, &here), Ok(vec![]));
}

#[test]
fn hints_may_be_missing() {
    let home = capabilities(AMD);
    let tables = guest(&home, 1);
    let mut here = home.clone();
    // ERMS, MMXEXT, PREFETCHW.
    change(&mut here.accepted_cpuid, 7, 0, |r| r.ebx &= !(1 << 9));
    change(&mut here.accepted_cpuid, 0x8000_0001, 0, |r| {
        r.ecx &= !(1 << 8);
        r.edx &= !(1 << 22);
    });
    assert_eq!(check(&tables, MEMORY, &here), Ok(vec![]));
}
