use super::*;
use crate::cpuid::{CpuidEntry, CpuidResult};

fn limits() -> StateLimits {
    let entry = |leaf, subleaf, eax, ebx| CpuidEntry {
        leaf,
        subleaf,
        result: CpuidResult {
            eax,
            ebx,
            ..CpuidResult::default()
        },
    };
    let table = CpuidTable {
        entries: vec![
            entry(0xd, Some(0), 7, 832),
            entry(0xd, Some(2), 256, 576),
            entry(0x8000_0008, None, 40, 0),
        ],
    };
    StateLimits::of(&table, true)
}

fn state() -> CpuState {
    let boot = BootRegisters::long_mode(0x1000, 0xffff_8000_0000_0000, 0x8000);
    CpuState {
        version: CPU_STATE_VERSION,
        general: boot.general,
        system: boot.system,
        xcr0: 7,
        xsave: vec![0; 832],
        msrs: vec![(msr::IA32_PAT, 0x0007_0406_0007_0406), (msr::STAR, 1)],
        lapic: Some(LocalApicState {
            registers: vec![0; 64],
            tsc_deadline: 0,
        }),
        ..CpuState::default()
    }
}

#[test]
fn limits_follow_the_cpuid_table() {
    let limits = limits();
    assert_eq!((limits.xcr0, limits.xsave_size), (7, 832));
    assert_eq!(limits.physical_address_bits, 40);
}

#[test]
fn a_good_state_passes() {
    limits().check(&state()).unwrap();
}

#[test]
fn every_kind_of_damage_is_refused() {
    type Damage = (&'static str, fn(&mut CpuState));
    let damages: &[Damage] = &[
        ("version", |s| s.version = 99),
        ("rflags", |s| s.general.rflags = 0),
        ("rflags reserved", |s| s.general.rflags |= 1 << 40),
        ("rip", |s| s.general.rip = 1 << 60),
        ("cr0", |s| s.system.cr0 &= !1),
        ("cr0 high", |s| s.system.cr0 |= 1 << 32),
        ("cr3", |s| s.system.cr3 = 1 << 50),
        ("cr4", |s| s.system.cr4 |= 1 << 60),
        ("cr4 pae", |s| s.system.cr4 = 0),
        ("cr8", |s| s.system.cr8 = 16),
        ("efer", |s| s.system.efer |= 1 << 63),
        ("efer lma", |s| s.system.efer = 0),
        ("segment", |s| s.system.segments[3].attributes |= 0x100),
        ("segment base", |s| s.system.tr.base = 1 << 63),
        ("gdt", |s| s.system.gdt.base = 1 << 63),
        ("apic base", |s| s.system.apic_base = 0xfee0_0400),
        ("dr7", |s| s.debug.dr7 = 1 << 32),
        ("xcr0", |s| s.xcr0 = 0),
        ("xcr0 avx without sse", |s| s.xcr0 = 5),
        ("xcr0 avx512", |s| s.xcr0 = 0xe7),
        ("xsave empty", |s| s.xsave.clear()),
        ("xsave short", |s| s.xsave.truncate(575)),
        ("xsave long", |s| s.xsave.resize(1 << 20, 0)),
        ("xstate_bv", |s| s.xsave[519] = 0x80),
        ("xcomp_bv", |s| s.xsave[527] = 0x80),
        ("mxcsr", |s| s.xsave[27] = 1),
        ("msr order", |s| s.msrs.swap(0, 1)),
        ("msr twice", |s| s.msrs.push((msr::STAR, 0))),
        ("msr own field", |s| s.msrs = vec![(msr::IA32_TSC, 0)]),
        ("msr address", |s| s.msrs = vec![(msr::LSTAR, 1 << 63)]),
        ("pat", |s| s.msrs = vec![(msr::IA32_PAT, 2)]),
        ("msr flood", |s| {
            s.msrs = (0x10000..0x20000).map(|i| (i, 0)).collect()
        }),
        ("lapic missing", |s| s.lapic = None),
        ("lapic short", |s| {
            s.lapic.as_mut().unwrap().registers.clear()
        }),
        ("exception", |s| {
            s.events.exception = Some(crate::state::ExceptionEvent {
                vector: 40,
                error_code: None,
                payload: None,
                injected: true,
            });
        }),
    ];
    for (name, damage) in damages {
        let mut state = state();
        damage(&mut state);
        let refused = limits().check(&state);
        assert!(refused.is_err(), "{name} was accepted");
    }
}
