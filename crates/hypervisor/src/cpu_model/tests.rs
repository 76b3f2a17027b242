use super::*;

/// A backend that says yes to everything, of the given vendor.
pub(crate) fn capabilities(vendor: [u32; 3]) -> Capabilities {
    let all = |leaf, subleaf| CpuidEntry {
        leaf,
        subleaf,
        result: CpuidResult {
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
        },
    };
    let of = |leaf, subleaf, eax, ebx, ecx, edx| CpuidEntry {
        leaf,
        subleaf,
        result: CpuidResult { eax, ebx, ecx, edx },
    };
    let [ebx, edx, ecx] = vendor;
    let entries = vec![
        of(0, None, 0x20, ebx, ecx, edx),
        all(1, None),
        all(7, Some(0)),
        of(0xd, Some(0), 0x6_02e7, 0, 11008, 0),
        of(0xd, Some(1), 0x1f, 0, 0, 0),
        of(0xd, Some(2), 256, 576, 0, 0),
        of(0xd, Some(5), 64, 832, 0, 0),
        of(0xd, Some(6), 512, 896, 0, 0),
        of(0xd, Some(7), 1024, 1408, 0, 0),
        of(
            0x4000_0000,
            None,
            0x4000_0001,
            0x4b4d_564b,
            0x564b_4d56,
            0x4d,
        ),
        all(0x4000_0001, None),
        all(0x8000_0001, None),
        all(0x8000_0007, None),
        all(0x8000_0008, None),
        all(0x8000_0021, None),
    ];
    Capabilities {
        name: "test",
        description: String::new(),
        measured_mips: None,
        max_vcpus: 64,
        supported_cpuid: CpuidTable {
            entries: entries.clone(),
        },
        accepted_cpuid: CpuidTable { entries },
        tsc_khz: 2_500_000,
        tsc_scaling: false,
        native: true,
        physical_address_bits: 46,
    }
}

pub(crate) const AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];
pub(crate) const INTEL: [u32; 3] = [VENDOR_INTEL.0, VENDOR_INTEL.1, VENDOR_INTEL.2];

#[test]
fn names_are_read_back() {
    for model in CpuModel::ALL {
        assert_eq!(model.to_string().parse(), Ok(model));
    }
    let error = "x86-64-v9".parse::<CpuModel>().unwrap_err();
    assert!(error.to_string().contains("x86-64-v9"));
}

#[test]
fn levels_have_what_the_abi_says() {
    let capabilities = capabilities(AMD);
    let table = |model: CpuModel| model.cpuid(&capabilities, 1, 0).unwrap();
    let (v2, v3) = (table(CpuModel::V2), table(CpuModel::V3));
    let avx = 1 << 28;
    assert_eq!(v2.get(1, 0).unwrap().ecx & avx, 0);
    assert_eq!(v3.get(1, 0).unwrap().ecx & avx, avx);
    assert_eq!(v2.get(0xd, 0).unwrap().eax, 3);
    assert_eq!(v2.get(0xd, 0).unwrap().ebx, 576);
    assert_eq!(v3.get(0xd, 0).unwrap().eax, 7);
    assert_eq!(v3.get(0xd, 0).unwrap().ecx, 832);
    assert_eq!(v3.get(7, 0).unwrap().ebx & (1 << 16), 0, "no AVX-512");
    let host = table(CpuModel::Host);
    assert_eq!(
        host.get(0xd, 0).unwrap().eax,
        0xe7,
        "no tiles, no protection keys"
    );
    for table in [&v2, &v3, &host] {
        let leaf = table.get(1, 0).unwrap();
        assert_eq!(leaf.ecx & (1 << 5 | 1 << 27), 0, "neither VMX nor OSXSAVE");
        assert_eq!(table.get(0x8000_0001, 0).unwrap().ecx & 4, 0, "no SVM");
        assert_eq!(table.tsc_khz(), Some(2_500_000));
        let limits = crate::validate::StateLimits::of(table, true);
        assert_eq!(limits.physical_address_bits, 46);
    }
}

#[test]
fn missing_features_are_named() {
    let mut capabilities = capabilities(AMD);
    for entry in &mut capabilities.supported_cpuid.entries {
        if entry.leaf == 7 {
            entry.result.ebx &= !(1 << 5 | 1 << 8);
        }
    }
    assert_eq!(CpuModel::best(&capabilities), CpuModel::V2);
    let error = CpuModel::V3.cpuid(&capabilities, 1, 0).unwrap_err();
    assert_eq!(
        error,
        CpuModelError::Missing {
            model: CpuModel::V3,
            missing: vec!["avx2", "bmi2"]
        }
    );
}

#[test]
fn a_table_of_another_host_is_compared_by_name() {
    let rich = capabilities(AMD);
    let table = CpuModel::V3.cpuid(&rich, 2, 1).unwrap();
    assert_eq!(
        table.missing_from(&rich.supported_cpuid),
        Vec::<String>::new()
    );
    let mut poor = rich.clone();
    for entry in &mut poor.supported_cpuid.entries {
        if entry.leaf == 1 {
            entry.result.ecx &= !(1 << 30);
        }
    }
    assert_eq!(table.missing_from(&poor.supported_cpuid), ["rdrand"]);
}

#[test]
fn processors_are_told_apart() {
    for vendor in [AMD, INTEL] {
        let capabilities = capabilities(vendor);
        for cpus in [1, 2, 3, 8, 255] {
            for id in [0, cpus - 1] {
                let table = CpuModel::V3.cpuid(&capabilities, cpus, id).unwrap();
                assert_eq!(table.get(1, 0).unwrap().ebx >> 24, id);
                let cores = table.get(0xb, 1).unwrap();
                assert_eq!((cores.ebx, cores.edx), (cpus, id));
                assert!(id >> cores.eax == 0, "ids fit the shift");
                assert_eq!(table.get(0xb, 2).unwrap().ebx, 0, "the list ends");
                let cache_leaf = if vendor == INTEL { 4 } else { 0x8000_001d };
                let l3 = table.get(cache_leaf, 3).unwrap();
                let size = (l3.ebx >> 22) + 1;
                assert_eq!(size * 64 * (l3.ecx + 1), 16 << 20);
                assert_eq!(table.get(cache_leaf, 4), None);
            }
        }
        assert!(CpuModel::V3.cpuid(&capabilities, 0, 0).is_err());
        assert!(CpuModel::V3.cpuid(&capabilities, 2, 2).is_err());
        assert!(CpuModel::V3.cpuid(&capabilities, 256, 0).is_err());
    }
}

#[test]
fn frequencies_past_32_bits_of_hertz_are_told() {
    let mut capabilities = capabilities(AMD);
    capabilities.tsc_khz = 5_100_000;
    let table = CpuModel::V2.cpuid(&capabilities, 1, 0).unwrap();
    let leaf = table.get(0x15, 0).unwrap();
    assert_eq!(
        u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax),
        5_100_000_000
    );
}

#[test]
fn changes_are_made() {
    let mut capabilities = capabilities(AMD);
    capabilities.tsc_scaling = true;
    let choice: CpuChoice = "x86-64-v3,-pcid,-invariant-tsc,tsc-khz=1000000"
        .parse()
        .unwrap();
    let table = choice.cpuid(&capabilities, 1, 0).unwrap();
    assert_eq!(table.get(1, 0).unwrap().ecx & 1 << 17, 0, "no PCID");
    assert_eq!(table.get(0x8000_0007, 0).unwrap().edx, 0);
    assert_eq!(table.tsc_khz(), Some(1_000_000));
    let plain = CpuModel::V3.cpuid(&capabilities, 1, 0).unwrap();
    assert_ne!(plain.get(1, 0).unwrap().ecx & 1 << 17, 0);
    capabilities.tsc_scaling = false;
    let refused = choice.cpuid(&capabilities, 1, 0).unwrap_err();
    assert_eq!(
        refused,
        CpuModelError::TscFrequency {
            asked: 1_000_000,
            here: 2_500_000
        }
    );
    for bad in [
        "x86-64-v3,pcid",
        "x86-64-v3,-nothing",
        "x86-64-v3,-svm",
        "x86-64-v3,tsc-khz=",
        "x86-64-v3,tsc-khz=5",
        "x86-64-v3,",
    ] {
        let error = bad.parse::<CpuChoice>().unwrap_err();
        assert!(matches!(error, CpuModelError::UnknownChange(_)), "{bad}");
    }
    let error = "x86-64-v3,-avx2".parse::<CpuChoice>().unwrap_err();
    assert!(error.to_string().contains("avx2"), "{error}");
    assert!("x86-64-v2,-avx2".parse::<CpuChoice>().is_ok());
}
