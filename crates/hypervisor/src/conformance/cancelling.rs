//! Getting processors out of the guest.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;

use super::guest::{Guest, VcpuOf, apic_enable, next, report, report_value, reported, stop};
use crate::cancel::{CancelOutcome, Canceller, cancel_all};
use crate::exit::Exit;
use crate::state::MpState;
use crate::traits::{Hypervisor, Vcpu};

const A_WHILE: Duration = Duration::from_millis(20);

fn spinner<H: Hypervisor>(hypervisor: &H) -> Guest<H> {
    Guest::new(hypervisor, |a| {
        report_value(a, 1)?;
        stop(a)?;
        Ok(vec![])
    })
}

/// Reports 1, 2, 3 …
fn counter<H: Hypervisor>(hypervisor: &H) -> Guest<H> {
    Guest::new(hypervisor, |a| {
        let mut again = a.create_label();
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.inc(eax)?;
        report(a)?;
        a.jmp(again)?;
        Ok(vec![])
    })
}

fn cancel_current(canceller: &Canceller) -> CancelOutcome {
    canceller.cancel(canceller.current().expect("a call"))
}

pub(super) fn spinning<H: Hypervisor>(hypervisor: &H) {
    let guest = spinner(hypervisor);
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    let canceller = vcpu.canceller();
    for wait in [A_WHILE, Duration::ZERO, A_WHILE] {
        vcpu.begin_call();
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(wait);
                assert_eq!(cancel_current(&canceller), CancelOutcome::Cancelled);
            });
            assert_eq!(next(&mut vcpu), Exit::Cancelled);
        });
        assert!(
            start.elapsed() < A_WHILE * 100,
            "cancelling took {:?}",
            start.elapsed()
        );
        vcpu.end_call();
    }
}

pub(super) fn never_run<H: Hypervisor>(hypervisor: &H) {
    let guest = spinner(hypervisor);
    let mut vcpu = guest.start();
    let canceller = vcpu.canceller();
    assert_eq!(cancel_current(&canceller), CancelOutcome::Cancelled);
    assert_eq!(next(&mut vcpu), Exit::Cancelled);
    vcpu.end_call();
    vcpu.begin_call();
    assert_eq!(reported(&mut vcpu), 1, "the next call runs from the start");
}

/// Processor `id` at the program's start.
fn runnable<H: Hypervisor>(guest: &Guest<H>, id: u32) -> VcpuOf<H> {
    if id == 0 {
        return guest.start();
    }
    let mut vcpu = guest.vcpu(id);
    let mut state = vcpu.state().expect("its state");
    let registers = super::guest::entry();
    state.general = registers.general;
    state.system = registers.system;
    state.system.apic_base &= !0x100;
    state.mp_state = MpState::Runnable;
    vcpu.set_state(&state).expect("a good state");
    vcpu.begin_call();
    vcpu
}

pub(super) fn several_at_once<H: Hypervisor>(hypervisor: &H) {
    let guest = spinner(hypervisor);
    let vcpus: Vec<_> = (0..3).map(|id| runnable(&guest, id)).collect();
    let cancellers: Vec<_> = vcpus.iter().map(Vcpu::canceller).collect();
    let started = Barrier::new(4);
    std::thread::scope(|scope| {
        let threads: Vec<_> = vcpus
            .into_iter()
            .map(|mut vcpu| {
                let started = &started;
                scope.spawn(move || {
                    assert_eq!(reported(&mut vcpu), 1);
                    started.wait();
                    next(&mut vcpu)
                })
            })
            .collect();
        started.wait();
        std::thread::sleep(A_WHILE);
        assert_eq!(cancel_all(&cancellers), vec![CancelOutcome::Cancelled; 3]);
        for thread in threads {
            assert_eq!(thread.join().expect("a processor"), Exit::Cancelled);
        }
    });
}

pub(super) fn during_host_exit<H: Hypervisor>(hypervisor: &H) {
    let guest = counter(hypervisor);
    let mut vcpu = guest.start();
    let canceller = vcpu.canceller();
    assert_eq!(reported(&mut vcpu), 1);
    // The processor is out of the guest: the cancel takes hold when it would go back.
    assert_eq!(cancel_current(&canceller), CancelOutcome::Cancelled);
    assert_eq!(next(&mut vcpu), Exit::Cancelled);
    vcpu.end_call();
    vcpu.begin_call();
    assert_eq!(reported(&mut vcpu), 2, "nothing was lost, nothing ran");
}

pub(super) fn halted<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        apic_enable(a)?;
        report_value(a, 1)?;
        a.sti()?;
        a.hlt()?;
        report_value(a, 2)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 1);
    let canceller = vcpu.canceller();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(A_WHILE);
            let _ = cancel_current(&canceller);
        });
        assert_eq!(next(&mut vcpu), Exit::Cancelled);
    });
}

pub(super) fn waiting_for_sipi<H: Hypervisor>(hypervisor: &H) {
    let guest = spinner(hypervisor);
    let mut vcpu = guest.vcpu(1);
    vcpu.begin_call();
    let canceller = vcpu.canceller();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(A_WHILE);
            let _ = cancel_current(&canceller);
        });
        assert_eq!(next(&mut vcpu), Exit::Cancelled);
    });
}

pub(super) fn late_misses_next_call<H: Hypervisor>(hypervisor: &H) {
    let guest = counter(hypervisor);
    let mut vcpu = guest.start();
    let canceller = vcpu.canceller();
    let first = canceller.current().expect("a call");
    assert_eq!(reported(&mut vcpu), 1);
    vcpu.end_call();
    assert_eq!(canceller.cancel(first), CancelOutcome::NotActive);
    vcpu.begin_call();
    assert_eq!(canceller.cancel(first), CancelOutcome::NotActive);
    for expected in 2..10 {
        assert_eq!(canceller.cancel(first), CancelOutcome::NotActive);
        assert_eq!(reported(&mut vcpu), expected);
    }
    // One that took hold ends with its call.
    assert_eq!(cancel_current(&canceller), CancelOutcome::Cancelled);
    vcpu.end_call();
    vcpu.begin_call();
    assert_eq!(reported(&mut vcpu), 10);
}

pub(super) fn without_call_does_nothing<H: Hypervisor>(hypervisor: &H) {
    let guest = counter(hypervisor);
    let mut vcpu = guest.start();
    let canceller = vcpu.canceller();
    vcpu.end_call();
    assert_eq!(canceller.current(), None);
    assert_eq!(
        cancel_all(std::slice::from_ref(&canceller)),
        [CancelOutcome::NotActive]
    );
    vcpu.begin_call();
    assert_eq!(reported(&mut vcpu), 1);
}

pub(super) fn is_sticky_until_call_ends<H: Hypervisor>(hypervisor: &H) {
    let guest = counter(hypervisor);
    let mut vcpu = guest.start();
    let canceller = vcpu.canceller();
    assert_eq!(reported(&mut vcpu), 1);
    assert_eq!(cancel_current(&canceller), CancelOutcome::Cancelled);
    assert_eq!(cancel_current(&canceller), CancelOutcome::Cancelled);
    for _ in 0..3 {
        assert_eq!(next(&mut vcpu), Exit::Cancelled);
    }
    vcpu.end_call();
    vcpu.begin_call();
    assert_eq!(reported(&mut vcpu), 2);
}

pub(super) fn kick_interrupts_once<H: Hypervisor>(hypervisor: &H) {
    let guest = spinner(hypervisor);
    let mut vcpu = guest.start();
    let canceller = vcpu.canceller();
    canceller.kick();
    assert_eq!(
        vcpu.run().expect("a run"),
        Exit::Interrupted,
        "kicked before it ran"
    );
    assert_eq!(reported(&mut vcpu), 1);
    for _ in 0..3 {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(A_WHILE);
                canceller.kick();
            });
            assert_eq!(vcpu.run().expect("a run"), Exit::Interrupted);
        });
    }
}

/// Many short calls, each cancelled from another thread at an arbitrary moment: none is missed,
/// none hits another call, and the guest loses nothing.
pub(super) fn storm<H: Hypervisor>(hypervisor: &H) {
    let guest = counter(hypervisor);
    let mut vcpu = guest.start();
    let canceller = vcpu.canceller();
    vcpu.end_call();
    let mut expected = 1;
    std::thread::scope(|scope| {
        let (send, receive) = std::sync::mpsc::channel();
        scope.spawn(move || {
            for (round, call) in receive.iter().enumerate() {
                for _ in 0..round % 7 * 50 {
                    std::hint::spin_loop();
                }
                let _ = canceller.cancel(call);
            }
        });
        for _ in 0..300 {
            send.send(vcpu.begin_call()).expect("the other thread");
            loop {
                match next(&mut vcpu) {
                    Exit::Cancelled => break,
                    Exit::PortOut { data, .. } => {
                        assert_eq!(data, expected);
                        expected += 1;
                    }
                    other => panic!("{other:?}"),
                }
            }
            vcpu.end_call();
        }
        drop(send);
    });
}
