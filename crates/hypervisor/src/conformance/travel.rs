//! States that go from one backend to another.

use std::time::Duration;

use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

use super::guest::{
    APIC, DATA, Guest, VcpuOf, apic_enable, apic_write, report, reported, reporting_handler,
};
use crate::cpu_model::CpuModel;
use crate::cpuid::{CpuidResult, CpuidTable};
use crate::exit::Exit;
use crate::msr;
use crate::probe::chain;
use crate::state::CpuState;
use crate::traits::{Capabilities, Hypervisor, Irqchip, Vcpu, Vm};

/// What the interrupt's handler reports; more than the count ever is.
const INTERRUPT: u32 = u32::MAX;

/// The model's table on this backend, without the leaves that tell a clock's frequency: the
/// backends' own differ.
fn table<H: Hypervisor>(hypervisor: &H) -> CpuidTable {
    let supported_cpuid = hypervisor.supported_cpuid().clone();
    let accepted_cpuid = hypervisor.accepted_cpuid().clone();
    let capabilities = Capabilities {
        name: "",
        description: String::new(),
        measured_mips: None,
        max_vcpus: 1,
        supported_cpuid,
        accepted_cpuid,
        tsc_scaling: true,
        native: true,
        tsc_khz: 1_000_000,
        physical_address_bits: 40,
    };
    // A KVM that only emulates has not even the features of the smallest model.
    let mut table = CpuModel::V2
        .cpuid(&capabilities, 1, 0)
        .or_else(|_| CpuModel::Host.cpuid(&capabilities, 1, 0))
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    for entry in table.entries.iter_mut().filter(|entry| entry.leaf == 0xd) {
        match entry.subleaf {
            Some(0) => entry.result.eax = 3,
            Some(2..) => entry.result = CpuidResult::default(),
            _ => {}
        }
    }
    table
        .entries
        .retain(|entry| !matches!(entry.leaf, 0x15 | 0x16 | 0x4000_0010));
    table
}

fn counting<H: Hypervisor>(hypervisor: &H) -> Guest<H> {
    let mut guest = Guest::bare(hypervisor, Irqchip::Split);
    guest.cpuid = table(hypervisor);
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

fn capture<H: Hypervisor>(vcpu: &mut VcpuOf<H>, last: &mut u32) -> CpuState {
    let canceller = vcpu.canceller();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(5));
            canceller.kick();
        });
        while vcpu.run().unwrap_or_else(|e| panic!("{}", chain(&e))) != Exit::Interrupted {
            *last += 1;
        }
    });
    vcpu.state().unwrap_or_else(|e| panic!("{}", chain(&e)))
}

/// Machine of `B` with the memory of one of `A` and its processor's state.
fn move_to<A: Hypervisor, B: Hypervisor>(
    from: &Guest<A>,
    state: &CpuState,
    to: &B,
) -> (Guest<B>, VcpuOf<B>) {
    let mut guest = Guest::bare(to, Irqchip::Split);
    guest.cpuid = table(to);
    let mut contents = vec![0; super::guest::RAM];
    from.ram
        .read_slice(&mut contents, GuestAddress(0))
        .expect("a read");
    guest
        .ram
        .write_slice(&contents, GuestAddress(0))
        .expect("a write");
    let mut vcpu = guest.vcpu(0);
    vcpu.set_state(state)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    let _ = vcpu.begin_call();
    (guest, vcpu)
}

/// A counting guest with a programmed local APIC goes from `a` to `b` and back, and goes on
/// counting and taking interrupts; what it wrote into registers goes along.
pub fn there_and_back<A: Hypervisor, B: Hypervisor>(a: &A, b: &B) {
    let home = counting(a);
    let mut vcpu = home.start();
    let mut last = 0;
    for _ in 0..20 {
        last += 1;
        assert_eq!(reported(&mut vcpu), last);
    }
    let state = capture::<A>(&mut vcpu, &mut last);
    let (away, mut vcpu) = move_to(&home, &state, b);
    goes_on(&away, &mut vcpu, &mut last);
    let state = capture::<B>(&mut vcpu, &mut last);
    let (back, mut vcpu) = move_to(&away, &state, a);
    goes_on(&back, &mut vcpu, &mut last);
    let state = capture::<A>(&mut vcpu, &mut last);
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
