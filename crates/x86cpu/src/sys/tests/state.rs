use super::*;
use crate::sys::snapshot::{CpuState, InvalidState, MpState};
use crate::sys::state::cr0;
use crate::testing::CODE;

fn busy() -> Kernel {
    let mut k = Kernel::long();
    for (n, value) in k.gpr.iter_mut().take(16).enumerate() {
        *value = 0x1111_1111 * n as u64;
    }
    k.sys.dr = [1, 2, 3, 4];
    k.sys.cr2 = 0xdead_b000;
    k.write_msr(0xc000_0082, 0xffff_8000_1234_5678)
        .expect("LSTAR");
    k.write_msr(0x277, 0x0007_0406_0007_0401).expect("PAT");
    k.write_msr(0xc000_0103, 3).expect("TSC_AUX");
    k.apic_mmio_write(0xf0, 4, 0x1ff);
    k.apic_mmio_write(0x80, 4, 0x30);
    k.t.machine.post(0, 0x55, true);
    k.t.machine.post(0, 0x66, false);
    k.sys.events.nmi_masked = true;
    k
}

#[test]
fn survives_a_round_trip() {
    let mut k = busy();
    let saved = k.save_state();
    assert_eq!(saved.lapic[0x20 + 2], 1 << (0x55 - 0x40));
    assert_eq!(saved.lapic[0x20 + 3], 1 << (0x66 - 0x60));
    let mut other = TestCpu::new();
    other.cpu.load_state(&saved).expect("loads");
    let mut again = other.cpu.save_state();
    assert!(again.tsc >= saved.tsc);
    (again.tsc, again.clock_ns) = (saved.tsc, saved.clock_ns);
    assert_eq!(again, saved);
    // And what it does with it: the interrupts are still there.
    assert_eq!(other.cpu.apic.deliverable(), Some(0x66));
}

fn refused(change: impl Fn(&mut CpuState)) -> InvalidState {
    let mut k = busy();
    let good = k.save_state();
    let mut bad = good.clone();
    change(&mut bad);
    let error = k.load_state(&bad).expect_err("refused");
    let mut after = k.save_state();
    (after.tsc, after.clock_ns) = (good.tsc, good.clock_ns);
    assert_eq!(after, good, "nothing changed");
    error
}

#[test]
fn nonsense_is_refused_whole() {
    refused(|s| s.system.cr0 &= !cr0::PE);
    refused(|s| s.system.cr0 |= 1 << 40);
    refused(|s| s.system.cr4 |= 1 << 60);
    refused(|s| s.system.cr4 = 0);
    refused(|s| s.system.efer &= !(1 << 10));
    refused(|s| s.system.cr3 = 1 << 60);
    refused(|s| s.system.cr8 = 16);
    refused(|s| s.system.gdt.base = 1 << 50);
    refused(|s| s.system.segments[4].base = 1 << 50);
    refused(|s| s.system.segments[1].attributes = 0);
    refused(|s| s.system.tr.attributes = 0x8082);
    refused(|s| s.general.rip = 1 << 47);
    refused(|s| s.general.rflags |= 1 << 40);
    refused(|s| s.general.rflags |= crate::flags::rflags::VM);
    refused(|s| s.dr7 |= 1 << 40);
    refused(|s| s.xcr0 = 0);
    refused(|s| s.xcr0 = 5);
    refused(|s| s.xsave.truncate(100));
    refused(|s| s.lapic.truncate(10));
    refused(|s| s.lapic[0x0f] = u32::MAX);
    refused(|s| s.system.apic_base = 1 << 10);
    refused(|s| s.msrs.push((0x1234_5678, 0)));
    refused(|s| {
        s.msrs.retain(|(i, _)| *i != 0xc000_0082);
        s.msrs.push((0xc000_0082, 1 << 50));
    });
}

#[test]
fn a_software_interrupt_that_was_broken_off_is_raised_by_its_instruction() {
    let mut k = Kernel::long();
    let mut state = k.save_state();
    state.events.interrupt = Some((0x40, true));
    k.load_state(&state).expect("a good state");
    let now = k.save_state();
    assert_eq!(now.events.interrupt, None);
    assert_eq!(now.general.rip, state.general.rip);
}

#[test]
fn a_counter_of_another_frequency_goes_on() {
    let mut k = Kernel::long();
    assert!(!k.set_tsc_khz(0));
    assert!(k.set_tsc_khz(2_500_000));
    let mut state = k.save_state();
    state.tsc = 1 << 50;
    k.load_state(&state).expect("a good state");
    // The test's clock goes a microsecond at each reading.
    let (first, second) = (k.tsc(), k.tsc());
    assert!(first > 1 << 50 && first < (1 << 50) + 100_000, "{first}");
    assert!(
        (2499..=2501).contains(&(second - first)),
        "{}",
        second - first
    );
}

#[test]
fn halted_processor_stays_halted() {
    let mut k = Kernel::long();
    k.put(CODE, &[0xf4]);
    assert!(matches!(k.run(), CpuExit::Halted { .. }));
    let saved = k.save_state();
    assert_eq!(saved.mp_state, MpState::Halted);
    assert_eq!(saved.general.rip, CODE + 1);
    let mut other = TestCpu::new();
    other.cpu.load_state(&saved).expect("loads");
    assert!(matches!(other.cpu.run(), CpuExit::Halted { .. }));
}

#[test]
fn power_up() {
    let t = TestCpu::with_processors(2);
    let second = t.another(1);
    assert_eq!(t.cpu.rip, 0xfff0);
    assert_eq!(t.cpu.seg_base[1], 0xffff_0000);
    assert_eq!(t.cpu.sys.cr0, 0x6000_0010);
    assert!(second.apic.base() & 0x100 == 0);
    assert!(t.cpu.apic.base() & 0x100 != 0);
}

#[test]
fn stale_timestamps_are_followed() {
    let mut k = Kernel::long();
    k.write_msr(0x10, 5_000_000_000).expect("TSC");
    let adjust = k.read_msr(0x3b).expect("TSC_ADJUST");
    assert!(k.tsc() >= 5_000_000_000);
    k.write_msr(0x3b, 0).expect("TSC_ADJUST");
    assert!(k.tsc() < 5_000_000_000 - adjust / 2);
}

#[test]
fn paravirtual_clock_is_published() {
    let mut k = Kernel::long();
    k.write_msr(0x4b56_4d01, 0x7_0001).expect("system time");
    let record = k.t.read(0x7_0000, 32);
    assert_eq!(record[0] & 1, 0, "version is even");
    assert_ne!(record[0], 0);
    assert_eq!(record[24..30], [0, 0, 0, 0x80, 1, 1]);
    k.write_msr(0x4b56_4d00, 0x7_0100).expect("wall clock");
    let record = k.t.read(0x7_0100, 12);
    assert_eq!(record[4..8], 1_700_000_000u32.to_le_bytes());
}

/// A generator of bits that is the same in every run.
struct Bits(u64);

impl Bits {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A value with a few bits, or one that likes to be an edge.
    fn value(&mut self) -> u64 {
        match self.next() % 6 {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << (self.next() % 64),
            3 => (1 << (self.next() % 64)) - 1,
            4 => self.next() & 0xffff_ffff,
            _ => self.next(),
        }
    }
}

fn damage(state: &mut CpuState, bits: &mut Bits) {
    let v = bits.value();
    let n = bits.next() as usize;
    let s = &mut state.system;
    match bits.next() % 24 {
        0 => s.cr0 ^= v,
        1 => s.cr4 ^= v,
        2 => s.efer ^= v,
        3 => s.cr3 = v,
        4 => s.gdt.base = v,
        5 => s.idt.limit = v as u16,
        6 => s.segments[n % 6].base = v,
        7 => s.segments[n % 6].attributes = v as u16,
        8 => s.segments[n % 6].limit = v as u32,
        9 => s.segments[n % 6].selector = v as u16,
        10 => s.tr.base = v,
        11 => s.tr.attributes ^= 1 << (n % 16),
        12 => s.ldt.limit = v as u32,
        13 => state.general.rip = v,
        14 => state.general.rflags ^= v,
        15 => state.general.gpr[n % 16] = v,
        16 => state.dr7 = v,
        17 => state.debug_address[n % 4] = v,
        18 => state.lapic[n % 64] = v as u32,
        19 => {
            let len = state.msrs.len();
            state.msrs[n % len].1 = v;
        }
        20 => state.tsc = v,
        21 => s.apic_base ^= v,
        22 => {
            let len = state.xsave.len();
            state.xsave[n % len] = v as u8;
        }
        _ => s.cr0 ^= cr0::PG | cr0::PE,
    }
}

#[test]
fn whatever_loads_runs_without_panic() {
    let mut bits = Bits(0x1234_5678_9abc_def1);
    let bases = [busy().save_state(), Kernel::protected().save_state()];
    let mut accepted = 0;
    let mut t = TestCpu::new64();
    for round in 0..4000 {
        let mut state = bases[round % 2].clone();
        for _ in 0..1 + bits.next() % 4 {
            damage(&mut state, &mut bits);
        }
        let code: Vec<u8> = (0..16).flat_map(|_| bits.next().to_le_bytes()).collect();
        t.write(CODE, &code);
        if t.cpu.load_state(&state).is_err() {
            continue;
        }
        accepted += 1;
        for _ in 0..8 {
            if let crate::sys::Next::Exit(_) = t.cpu.poll_events() {
                break;
            }
            if t.cpu.step().is_err()
                && let crate::TrapKind::Fault { vector, error_code } = t.cpu.trap.kind
                && t.cpu.deliver_exception(vector, error_code).is_some()
            {
                break;
            }
            t.cpu.after_step(true);
        }
        t.cpu.save_state();
    }
    assert!(accepted > 500, "{accepted}");
}
