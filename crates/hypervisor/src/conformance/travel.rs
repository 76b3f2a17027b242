//! States that go from one backend to another.

mod events;
mod time;
mod vectors;

use std::time::Duration;

use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

use super::guest::{
    APIC, DATA, Guest, VcpuOf, apic_enable, apic_write, report, reported, reporting_handler,
};
use crate::cpu_model::{CpuChoice, CpuModel};
use crate::cpuid::{CpuidResult, CpuidTable};
use crate::exit::Exit;
use crate::msr;
use crate::probe::chain;
use crate::state::CpuState;
use crate::traits::{Capabilities, Hypervisor, Irqchip, Vcpu, Vm};

/// What the interrupt's handler reports; more than the count ever is.
const INTERRUPT: u32 = u32::MAX;

/// Two backends between which guests travel.
#[derive(Debug)]
pub struct Journey<'a, A, B> {
    /// Where they start.
    pub from: &'a A,
    /// Where they go.
    pub to: &'a B,
    /// The frequency of the time-stamp counter that both can have, in kHz.
    pub tsc_khz: u32,
    /// Both run guests as a processor does. One that only emulates them in a host's kernel may lack
    /// vectors, and a time-stamp counter that can be set.
    pub real: bool,
}

/// Every case; it panics at the first that fails, and says on standard output which it tries.
pub fn everything<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    type Case<'a, A, B> = (&'static str, bool, fn(&Journey<'a, A, B>));
    /// The case needs backends that are real.
    const REAL: bool = true;
    const ANY: bool = false;
    let cases: [Case<'_, A, B>; 12] = [
        ("there and back", ANY, there_and_back),
        ("one-shot timer", ANY, time::one_shot_timer_goes_on),
        ("one-shot timer, over", ANY, time::one_shot_timer_stays_over),
        ("periodic timer", ANY, time::periodic_timer_goes_on),
        ("deadline timer", REAL, time::deadline_timer_goes_on),
        ("time-stamp counter", REAL, time::counter_goes_on),
        ("two counters", REAL, time::counters_stay_in_step),
        ("paravirtual clock", REAL, time::paravirtual_clock_goes_on),
        ("exception on its way", ANY, events::exception_is_delivered),
        ("interrupt on its way", ANY, events::interrupt_is_delivered),
        ("halted", ANY, events::halted_wakes),
        ("vectors", REAL, vectors::registers_arrive),
    ];
    for (name, needs, case) in cases {
        if needs && !journey.real {
            println!("travel: {name} ... skipped: one of the backends only emulates");
            continue;
        }
        println!("travel: {name}");
        case(journey);
    }
}

impl<A: Hypervisor, B: Hypervisor> Journey<'_, A, B> {
    /// A table that both backends accept: that of a model with what both support.
    fn table(&self) -> CpuidTable {
        let supported_cpuid = common(self.from.supported_cpuid(), self.to.supported_cpuid());
        let capabilities = Capabilities {
            name: "",
            description: String::new(),
            measured_mips: None,
            max_vcpus: 2,
            accepted_cpuid: supported_cpuid.clone(),
            supported_cpuid,
            tsc_khz: self.tsc_khz,
            tsc_scaling: false,
            native: true,
            physical_address_bits: 36,
        };
        // A KVM that only emulates has not even the features of the smallest model.
        let table = [CpuModel::V3, CpuModel::V2, CpuModel::Host]
            .into_iter()
            .find_map(|model| CpuChoice::from(model).cpuid(&capabilities, 1, 0).ok());
        let mut table = table.expect("a model that both have");
        if table.get(1, 0).unwrap_or_default().ecx & (1 << 28) == 0 {
            // State that no instruction of the model reaches.
            for entry in table.entries.iter_mut().filter(|entry| entry.leaf == 0xd) {
                match entry.subleaf {
                    Some(0) => entry.result.eax = 3,
                    Some(2..) => entry.result = CpuidResult::default(),
                    _ => {}
                }
            }
        }
        table
    }

    /// A machine without program at the start.
    fn home(&self) -> Guest<A> {
        let mut guest = Guest::bare(self.from, Irqchip::Split);
        guest.cpuid = self.table();
        guest
    }

    /// A machine there with the memory and clock of one here, and its processor with that state.
    fn travel(&self, from: &Guest<A>, state: &CpuState) -> (Guest<B>, VcpuOf<B>) {
        move_to(from, state, self.to)
    }
}

/// The bits that both tables have in the registers that tell features; the rest is the first's.
fn common(one: &CpuidTable, other: &CpuidTable) -> CpuidTable {
    let mut both = one.clone();
    for entry in &mut both.entries {
        let there = other
            .get(entry.leaf, entry.subleaf.unwrap_or(0))
            .unwrap_or_default();
        let here = &mut entry.result;
        match (entry.leaf, entry.subleaf) {
            (1 | 0x8000_0001, _) => {
                here.ecx &= there.ecx;
                here.edx &= there.edx;
            }
            (7, _) => {
                here.ebx &= there.ebx;
                here.ecx &= there.ecx;
                here.edx &= there.edx;
            }
            (0xd, Some(0 | 1)) | (0x4000_0001, _) => here.eax &= there.eax,
            (0x8000_0007, _) => here.edx &= there.edx,
            (0x8000_0008, _) => here.ebx &= there.ebx,
            (0x8000_0021, _) => {
                here.eax &= there.eax;
                here.ecx &= there.ecx;
            }
            _ => {}
        }
    }
    both
}

fn counting<H: Hypervisor>(guest: Guest<H>) -> Guest<H> {
    guest.load(|a| {
        let mut again = a.create_label();
        let mut inner = a.create_label();
        apic_enable(a)?;
        // A timer that is armed, and slow enough not to fire.
        apic_write(a, 0x3e0, 0xb)?;
        apic_write(a, 0x320, 0x1_0055)?;
        apic_write(a, 0x380, 0xffff_0000)?;
        for (index, value) in [
            (msr::LSTAR, 0x8100_0000_u32),
            (msr::SFMASK, 0x4_7700),
            (msr::KERNEL_GS_BASE, 0x1234_5000),
        ] {
            a.mov(ecx, index)?;
            a.mov(eax, value)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
        }
        a.mov(rax, DATA)?;
        a.mov(dr1, rax)?;
        a.sti()?;
        a.xor(esi, esi)?;
        a.set_label(&mut again)?;
        a.mov(ecx, 500)?;
        a.set_label(&mut inner)?;
        a.dec(ecx)?;
        a.jnz(inner)?;
        a.inc(esi)?;
        a.mov(qword_ptr(DATA), rsi)?;
        a.mov(eax, esi)?;
        report(a)?;
        a.jmp(again)?;
        Ok(vec![(0x49, reporting_handler(a, INTERRUPT, true)?)])
    });
    guest
}

/// Stops a processor between two instructions, wherever it is; `report` is told what it reports
/// meanwhile.
fn stop_anywhere<V: Vcpu>(vcpu: &mut V, mut report: impl FnMut(Exit)) {
    let canceller = vcpu.canceller();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(5));
            canceller.kick();
        });
        loop {
            match vcpu.run().unwrap_or_else(|e| panic!("{}", chain(&e))) {
                Exit::Interrupted => return,
                exit => report(exit),
            }
        }
    });
}

fn state_of<V: Vcpu>(vcpu: &mut V) -> CpuState {
    vcpu.state().unwrap_or_else(|e| panic!("{}", chain(&e)))
}

fn set<V: Vcpu>(vcpu: &mut V, state: &CpuState) {
    vcpu.set_state(state)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
}

fn capture<V: Vcpu>(vcpu: &mut V, last: &mut u32) -> CpuState {
    stop_anywhere(vcpu, |_| *last += 1);
    state_of(vcpu)
}

/// Machine of `B` with the memory, clock and table of one of `A`, and its processor's state.
fn move_to<A: Hypervisor, B: Hypervisor>(
    from: &Guest<A>,
    state: &CpuState,
    to: &B,
) -> (Guest<B>, VcpuOf<B>) {
    let mut guest = Guest::bare(to, Irqchip::Split);
    guest.cpuid = from.cpuid.clone();
    let mut contents = vec![0; super::guest::RAM];
    from.ram
        .read_slice(&mut contents, GuestAddress(0))
        .expect("a read");
    guest
        .ram
        .write_slice(&contents, GuestAddress(0))
        .expect("a write");
    let mut vcpu = guest.vcpu(0);
    guest.vm.set_clock_ns(state.clock_ns).expect("a clock");
    set(&mut vcpu, state);
    let _ = vcpu.begin_call();
    (guest, vcpu)
}

/// A counting guest with a programmed local APIC goes there and back, and goes on counting and taking
/// interrupts; what it wrote into registers goes along.
fn there_and_back<A: Hypervisor, B: Hypervisor>(journey: &Journey<'_, A, B>) {
    let home = counting(journey.home());
    let mut vcpu = home.start();
    let mut last = 0;
    for _ in 0..20 {
        last += 1;
        assert_eq!(reported(&mut vcpu), last);
    }
    let state = capture(&mut vcpu, &mut last);
    let (away, mut vcpu) = journey.travel(&home, &state);
    goes_on(&away, &mut vcpu, &mut last);
    let state = capture(&mut vcpu, &mut last);
    let (back, mut vcpu) = move_to(&away, &state, journey.from);
    goes_on(&back, &mut vcpu, &mut last);
    let state = capture(&mut vcpu, &mut last);
    for (index, value) in [
        (msr::LSTAR, 0x8100_0000),
        (msr::SFMASK, 0x4_7700),
        (msr::KERNEL_GS_BASE, 0x1234_5000),
    ] {
        assert!(
            state.msrs.contains(&(index, value)),
            "register {index:#x} got lost"
        );
    }
    assert_eq!(state.debug.address[1], DATA);
    let lapic = state.lapic.expect("a local APIC");
    assert_eq!(lapic.registers[0x32], 0x1_0055);
    assert_eq!(lapic.registers[0x38], 0xffff_0000);
}

fn goes_on<H: Hypervisor>(guest: &Guest<H>, vcpu: &mut VcpuOf<H>, last: &mut u32) {
    for _ in 0..20 {
        *last += 1;
        assert_eq!(reported(vcpu), *last, "the count goes on");
    }
    guest.vm.signal_msi(APIC, 0x49).expect("a message");
    let mut came = false;
    for _ in 0..20 {
        match reported(vcpu) {
            INTERRUPT => came = true,
            count => {
                *last += 1;
                assert_eq!(count, *last);
            }
        }
    }
    assert!(came, "the interrupt does not come");
}
