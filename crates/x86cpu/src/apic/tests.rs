use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::CpuExit;
use crate::cpu::Cpu;
use crate::shared::{Host, Machine};
use crate::sys::state::Activity;
use crate::testing::TestCpu;

/// A clock that stands until the test moves it, and the last deadline asked for.
#[derive(Default)]
struct StandingHost {
    clock: AtomicU64,
    deadline: AtomicU64,
}

impl Host for StandingHost {
    fn wake(&self, _: u32) {}
    fn arm_timer(&self, _: u32, deadline: Option<u64>) {
        self.deadline
            .store(deadline.unwrap_or(u64::MAX), Ordering::SeqCst);
    }
    fn clock_ns(&self) -> u64 {
        self.clock.load(Ordering::SeqCst)
    }
    fn wall_clock_base_ns(&self) -> u64 {
        0
    }
}

#[expect(clippy::vec_box, reason = "processors are made in boxes")]
fn machine(count: usize) -> (Arc<StandingHost>, Vec<Box<Cpu>>) {
    let host = Arc::new(StandingHost::default());
    let machine = Arc::new(Machine::new(host.clone(), count));
    let cpus = (0..count as u32)
        .map(|id| {
            let mut cpu = Cpu::new(&machine, id, TestCpu::cpuid()).expect("free");
            cpu.apic_mmio_write(0xf0, 4, 0x1ff);
            cpu
        })
        .collect();
    (host, cpus)
}

fn one() -> (Arc<StandingHost>, Box<Cpu>) {
    let (host, mut cpus) = machine(1);
    (host, cpus.remove(0))
}

fn irr(cpu: &mut Cpu) -> Vec<u8> {
    cpu.collect_interrupts();
    (0..=255u8)
        .filter(|v| test_bit(&cpu.apic.irr, *v))
        .collect()
}

#[test]
fn priorities() {
    let (_, mut cpu) = one();
    let apic = &mut cpu.apic;
    apic.accept(0x51, false);
    apic.accept(0x62, false);
    assert_eq!(apic.deliverable(), Some(0x62));
    apic.acknowledge(0x62);
    assert_eq!(apic.ppr(), 0x60);
    assert_eq!(apic.deliverable(), None, "0x51 waits for 0x62's end");
    apic.accept(0x6f, false);
    assert_eq!(apic.deliverable(), None, "same class");
    apic.accept(0x70, false);
    assert_eq!(apic.deliverable(), Some(0x70));
    apic.set_cr8(7);
    assert_eq!(apic.deliverable(), None);
    assert_eq!(apic.ppr(), 0x70);
    apic.set_cr8(0);
    apic.acknowledge(0x70);
    assert_eq!(apic.end_of_interrupt(), None);
    assert_eq!(apic.end_of_interrupt(), None);
    assert_eq!(apic.deliverable(), Some(0x6f));
}

#[test]
fn level_interrupts_report_their_end() {
    let (_, mut cpu) = one();
    cpu.machine.eoi_exit[1].store(1 << 1, Ordering::SeqCst);
    let machine = cpu.machine.clone();
    machine.post(0, 0x21, true);
    machine.post(0, 0x22, true);
    cpu.collect_interrupts();
    cpu.apic.acknowledge(0x22);
    cpu.apic_mmio_write(0xb0, 4, 0);
    cpu.apic.acknowledge(0x21);
    cpu.apic_mmio_write(0xb0, 4, 0);
    assert_eq!(cpu.run(), CpuExit::IoapicEoi { vector: 0x21 });
    assert_eq!(cpu.apic.take_ended(), None);
}

#[test]
fn one_shot_timer() {
    let (host, mut cpu) = one();
    cpu.apic_mmio_write(0x320, 4, 0x40);
    cpu.apic_mmio_write(0x3e0, 4, 0b0001); // divide by 4
    cpu.apic_mmio_write(0x380, 4, 1000);
    assert_eq!(host.deadline.load(Ordering::SeqCst), 4000);
    host.clock.store(1200, Ordering::SeqCst);
    assert_eq!(cpu.apic_mmio_read(0x390, 4), 700);
    host.clock.store(3999, Ordering::SeqCst);
    cpu.apic_timer_due();
    assert!(irr(&mut cpu).is_empty());
    host.clock.store(4000, Ordering::SeqCst);
    cpu.apic_timer_due();
    assert_eq!(irr(&mut cpu), [0x40]);
    assert_eq!(cpu.apic_mmio_read(0x390, 4), 0);
    assert_eq!(host.deadline.load(Ordering::SeqCst), u64::MAX, "disarmed");
}

#[test]
fn periodic_timer_keeps_its_phase() {
    let (host, mut cpu) = one();
    cpu.apic_mmio_write(0x320, 4, 0x2_0040);
    cpu.apic_mmio_write(0x3e0, 4, 0b1011); // divide by 1
    cpu.apic_mmio_write(0x380, 4, 1000);
    host.clock.store(3500, Ordering::SeqCst);
    cpu.apic_timer_due();
    assert_eq!(irr(&mut cpu), [0x40]);
    assert_eq!(host.deadline.load(Ordering::SeqCst), 4000);
    assert_eq!(cpu.apic_mmio_read(0x390, 4), 500);
}

#[test]
fn deadlines_are_in_ticks_and_counts_in_nanoseconds() {
    let (host, mut cpu) = one();
    assert!(cpu.set_tsc_khz(2_500_000));
    cpu.apic_mmio_write(0x320, 4, 0x40);
    cpu.apic_mmio_write(0x3e0, 4, 0b1011); // divide by 1
    cpu.apic_mmio_write(0x380, 4, 4000);
    assert_eq!(host.deadline.load(Ordering::SeqCst), 4000);
    cpu.apic_mmio_write(0x320, 4, 0x4_0040);
    cpu.write_msr(0x6e0, 5001).expect("deadline");
    assert_eq!(host.deadline.load(Ordering::SeqCst), 2001);
    host.clock.store(2000, Ordering::SeqCst);
    cpu.apic_timer_due();
    assert!(irr(&mut cpu).is_empty(), "a tick too early");
    host.clock.store(2001, Ordering::SeqCst);
    cpu.apic_timer_due();
    assert_eq!(irr(&mut cpu), [0x40]);
}

#[test]
fn counts_go_on_from_a_page() {
    const NEVER: u64 = u64::MAX;
    for (entry, current, deadline, requested) in [
        (0x40, 700, 1700, false),
        (0x40, 0, NEVER, false),
        (0x2_0040, 700, 1700, false),
        // Due: the other backend had no time to raise it.
        (0x2_0040, 0, 2000, true),
    ] {
        let (host, mut cpu) = one();
        host.clock.store(1000, Ordering::SeqCst);
        let mut page = cpu.apic.page(1000);
        page[0x32] = entry;
        page[0x38] = 1000;
        page[0x39] = current;
        page[0x3e] = 0b1011;
        let base = cpu.apic.base();
        cpu.apic = cpu
            .apic
            .with_page(base, 46, &page, 0, 1_000)
            .expect("a good page");
        cpu.apic_timer_due();
        assert_eq!(
            !irr(&mut cpu).is_empty(),
            requested,
            "{entry:#x} at {current}"
        );
        assert_eq!(host.deadline.load(Ordering::SeqCst), deadline);
    }
}

#[test]
fn deadline_timer() {
    let (host, mut cpu) = one();
    cpu.write_msr(0x6e0, 5000).expect("ignored in other modes");
    assert_eq!(cpu.read_msr(0x6e0), Ok(0));
    cpu.apic_mmio_write(0x320, 4, 0x4_0040);
    cpu.write_msr(0x10, 1_000_000).expect("TSC");
    cpu.write_msr(0x6e0, 1_005_000).expect("deadline");
    assert_eq!(host.deadline.load(Ordering::SeqCst), 5000);
    host.clock.store(5000, Ordering::SeqCst);
    cpu.apic_timer_due();
    assert_eq!(irr(&mut cpu), [0x40]);
    assert_eq!(cpu.read_msr(0x6e0), Ok(0), "fired");
    // A deadline in the past fires at once.
    cpu.apic.acknowledge(0x40);
    cpu.write_msr(0x6e0, 1).expect("deadline");
    assert_eq!(irr(&mut cpu), [0x40]);
}

#[test]
fn masked_timer_is_silent() {
    let (host, mut cpu) = one();
    cpu.apic_mmio_write(0x320, 4, 0x1_0040);
    cpu.apic_mmio_write(0x380, 4, 10);
    host.clock.store(1000, Ordering::SeqCst);
    cpu.apic_timer_due();
    assert!(irr(&mut cpu).is_empty());
}

fn send(cpu: &mut Cpu, destination: u32, low: u32) {
    cpu.apic_mmio_write(0x310, 4, u64::from(destination) << 24);
    cpu.apic_mmio_write(0x300, 4, u64::from(low));
}

#[test]
fn destinations_and_shorthands() {
    let (_, mut cpus) = machine(3);
    send(&mut cpus[0], 1, 0x31);
    send(&mut cpus[0], 0xff, 0x32);
    send(&mut cpus[0], 0, 0x4_0033);
    send(&mut cpus[0], 0, 0x8_0034);
    send(&mut cpus[0], 0, 0xc_0035);
    assert_eq!(irr(&mut cpus[0]), [0x32, 0x33, 0x34]);
    assert_eq!(irr(&mut cpus[1]), [0x31, 0x32, 0x34, 0x35]);
    assert_eq!(irr(&mut cpus[2]), [0x32, 0x34, 0x35]);
    // Vectors below 16 are errors.
    send(&mut cpus[0], 1, 0x05);
    cpus[0].apic_mmio_write(0x280, 4, 0);
    assert_eq!(cpus[0].apic_mmio_read(0x280, 4), 0x20);
}

#[test]
fn logical_destinations() {
    let (_, mut cpus) = machine(3);
    for (n, cpu) in cpus.iter_mut().enumerate() {
        cpu.apic_mmio_write(0xd0, 4, 1 << (24 + n));
    }
    send(&mut cpus[0], 0b110, 0x0831);
    assert_eq!(irr(&mut cpus[1]), [0x31]);
    assert_eq!(irr(&mut cpus[2]), [0x31]);
    assert!(irr(&mut cpus[0]).is_empty());
    // Clusters: 1.1 and 1.2, 2.1.
    for (cpu, ldr) in cpus.iter_mut().zip([0x11u64, 0x12, 0x21]) {
        cpu.apic_mmio_write(0xe0, 4, 0x0fff_ffff);
        cpu.apic_mmio_write(0xd0, 4, ldr << 24);
    }
    send(&mut cpus[2], 0x13, 0x0841);
    assert_eq!(irr(&mut cpus[0]), [0x41]);
    assert_eq!(irr(&mut cpus[1]), [0x31, 0x41]);
    assert_eq!(irr(&mut cpus[2]), [0x31]);
}

#[test]
fn x2apic_mode() {
    let (_, mut cpus) = machine(2);
    for cpu in &mut cpus {
        let base = cpu.read_msr(0x1b).expect("base");
        cpu.write_msr(0x1b, base | 1 << 10).expect("x2APIC");
        assert!(cpu.apic.page_address().is_none());
        cpu.write_msr(0x80f, 0x1ff).expect("SVR");
    }
    assert_eq!(cpus[1].read_msr(0x802), Ok(1));
    assert_eq!(cpus[1].read_msr(0x80d), Ok(2));
    // Physical to 1, logical to bit 1 of cluster 0.
    cpus[0].write_msr(0x830, 1 << 32 | 0x51).expect("ICR");
    cpus[0].write_msr(0x830, 2 << 32 | 0x852).expect("ICR");
    cpus[0].write_msr(0x83f, 0x53).expect("self IPI");
    assert_eq!(irr(&mut cpus[1]), [0x51, 0x52]);
    assert_eq!(irr(&mut cpus[0]), [0x53]);
    assert!(cpus[0].write_msr(0x80b, 1).is_err(), "EOI takes zero");
    assert!(cpus[0].read_msr(0x80b).is_err());
    assert!(cpus[0].read_msr(0x80e).is_err(), "no DFR");
    // Straight back to xAPIC mode is not allowed.
    assert!(cpus[0].write_msr(0x1b, 0xfee0_0900).is_err());
    assert!(cpus[0].write_msr(0x1b, 0xfee0_0100).is_ok());
}

#[test]
fn messages() {
    let (_, mut cpus) = machine(2);
    let machine = cpus[0].machine.clone();
    machine.deliver_msi(0xfee0_1000, 0x61).expect("to 1");
    machine.deliver_msi(0xfeef_f000, 0x62).expect("to all");
    machine.deliver_msi(0xfee0_1000, 0x400).expect("NMI");
    assert_eq!(irr(&mut cpus[1]), [0x61, 0x62]);
    assert_eq!(irr(&mut cpus[0]), [0x62]);
    assert_eq!(cpus[1].sys.events.nmis_pending, 1);
    assert_eq!(
        machine.deliver_msi(0xfee0_0000, 3),
        Err(InvalidMessage::Vector(3))
    );
    assert_eq!(
        machine.deliver_msi(0xfec0_0000, 0x30),
        Err(InvalidMessage::Address(0xfec0_0000))
    );
    // A disabled APIC takes nothing.
    cpus[0].apic_mmio_write(0xf0, 4, 0xff);
    machine.deliver_msi(0xfee0_0000, 0x63).expect("lost");
    assert_eq!(irr(&mut cpus[0]), [0x62]);
}

#[test]
fn lowest_priority_goes_to_one() {
    let (_, mut cpus) = machine(2);
    let machine = cpus[0].machine.clone();
    machine.deliver_msi(0xfeef_f000, 0x170).expect("lowest");
    let all = [irr(&mut cpus[0]), irr(&mut cpus[1])].concat();
    assert_eq!(all, [0x70]);
}

#[test]
fn error_interrupt() {
    let (_, mut cpu) = one();
    cpu.apic_mmio_write(0x370, 4, 0xfe);
    assert_eq!(cpu.apic_mmio_read(0x2f0, 4), 0);
    assert_eq!(irr(&mut cpu), [0xfe]);
    cpu.apic_mmio_write(0x280, 4, 0);
    assert_eq!(cpu.apic_mmio_read(0x280, 4), 0x80);
}

#[test]
fn page_comes_back() {
    let (host, mut cpu) = one();
    cpu.apic_mmio_write(0x320, 4, 0x2_0040);
    cpu.apic_mmio_write(0x380, 4, 1000);
    cpu.apic_mmio_write(0x350, 4, 0x700);
    host.clock.store(500, Ordering::SeqCst);
    let page = cpu.apic.page(host.clock_ns());
    let (_, fresh) = one();
    let apic = fresh
        .apic
        .with_page(0xfee0_0900, 46, &page, 0, 10_000)
        .expect("valid");
    assert_eq!(apic.page(10_000), page);
    assert!(apic.accepts_extint());
}

/// Processor 0 starts processor 1 with INIT and SIPI, each in a thread of its own; processor 1
/// answers with an interrupt.
#[test]
fn processors_start_each_other() {
    let t = TestCpu::with_processors(2);
    let mut boot = t.cpu;
    let mut second = Cpu::new(&t.machine, 1, TestCpu::cpuid()).expect("free");
    // It comes up at 0x8000 in real mode: counts in memory, then CLI and HLT.
    // INC WORD [0x9000] by way of DS = 0; HLT
    let code = [0xff, 0x06, 0x00, 0x90, 0xf4];
    t.machine.memory.write_physical(0x8000, &code);
    second.sys.activity = Activity::WaitForInit;
    assert_eq!(second.run(), CpuExit::WaitForSipi);
    let halted = Arc::new(AtomicBool::new(false));
    let seen = halted.clone();
    let worker = std::thread::spawn(move || {
        let limit = Instant::now() + Duration::from_secs(20);
        while Instant::now() < limit {
            match second.run() {
                CpuExit::Halted { .. } => {
                    seen.store(true, Ordering::SeqCst);
                    break;
                }
                CpuExit::WaitForSipi => std::thread::yield_now(),
                other => panic!("{other:?}"),
            }
        }
        second
    });
    // INIT, then SIPI with vector 8, as the boot protocol says.
    send(&mut boot, 1, 0x4500);
    std::thread::sleep(Duration::from_millis(20));
    send(&mut boot, 1, 0x4608);
    let mut second = worker.join().expect("no panic");
    assert!(halted.load(Ordering::SeqCst));
    let mut word = [0; 2];
    t.machine.memory.read_physical(0x9000, &mut word);
    assert_eq!(word, [1, 0]);
    assert_eq!(second.sys.segments[1].selector, 0x800);
    // Its own IPI back.
    boot.apic_mmio_write(0xf0, 4, 0x1ff);
    send(&mut second, 0, 0x77);
    assert_eq!(irr(&mut boot), [0x77]);
}

#[test]
fn expired_count_stays_at_zero_in_another_mode() {
    let (host, mut cpu) = one();
    cpu.apic_mmio_write(0x320, 4, 0x1_0040);
    cpu.apic_mmio_write(0x3e0, 4, 0b1011);
    cpu.apic_mmio_write(0x380, 4, 1000);
    // Over, but nobody has looked yet.
    host.clock.store(1500, Ordering::SeqCst);
    cpu.apic_mmio_write(0x320, 4, 0x3_0040);
    assert_eq!(cpu.apic_mmio_read(0x390, 4), 0);
}

#[test]
fn disabling_brings_the_id_back() {
    let (_, mut cpu) = one();
    cpu.apic_mmio_write(0x20, 4, 7 << 24);
    assert_eq!(cpu.apic.id(), 7);
    cpu.write_msr(0x1b, 0xfee0_0100).expect("disabled");
    cpu.write_msr(0x1b, 0xfee0_0900).expect("enabled");
    assert_eq!(cpu.apic.id(), 0);
}

#[test]
fn two_nmis_are_kept() {
    let (_, mut cpu) = one();
    for _ in 0..5 {
        cpu.machine.post_nmi(0);
    }
    cpu.collect_interrupts();
    assert_eq!(cpu.sys.events.nmis_pending, 2);
}

#[test]
fn sets_of_processors() {
    let (_, mut cpus) = machine(3);
    assert_eq!(cpus[0].apic_send_to_set(0b101, 0, 0x48), 2);
    assert_eq!(cpus[0].apic_send_to_set(0b1, 2, 0x49), 1);
    assert_eq!(cpus[0].apic_send_to_set(u128::MAX, u32::MAX, 0x4a), 0);
    assert_eq!(cpus[0].apic_send_to_set(1, 0, 0x4500), 0, "no INIT");
    assert_eq!(irr(&mut cpus[0]), [0x48]);
    assert!(irr(&mut cpus[1]).is_empty());
    assert_eq!(irr(&mut cpus[2]), [0x48, 0x49]);
}
