//! What function sandboxes ask of the software backend, each as a median: making and dropping a machine,
//! leaving and entering the guest, setting a state, draining the dirty log, cancelling. Run it with
//! `cargo bench -p skerry-hypervisor-soft --bench sandbox`; an argument picks some by name.

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{PORT, Small, assemble, fill, many_blocks, out_loop, ram, slot, soft, work_loop};
use iced_x86::code_asm::*;
use skerry_hypervisor::{BootRegisters, CancelOutcome, Exit, Gpa, Hypervisor, Vcpu, Vm};
use skerry_hypervisor_soft::Tuning;
use vm_memory::{Bytes, GuestAddress};

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Prints the median of so many rounds, each of which does something `times` times.
fn measure(name: &str, rounds: usize, times: u32, mut each: impl FnMut()) {
    let mut round = || {
        let start = Instant::now();
        for _ in 0..times {
            each();
        }
        start.elapsed() / times
    };
    round();
    let took = median((0..rounds).map(|_| round()).collect());
    println!("{name:40} {:>10.3} µs", took.as_nanos() as f64 / 1e3);
}

fn create() {
    let soft = soft(Tuning::JIT);
    let ram = ram(1 << 20);
    fill(&ram, &out_loop());
    let spec = common::SPEC;
    let cpuid = soft.supported_cpuid().clone();
    let mut made = Vec::new();
    let mut times = Vec::new();
    for _ in 0..500 {
        let start = Instant::now();
        let vm = soft.create_vm(&spec).expect("a machine");
        vm.map(slot(&ram, true)).expect("a slot");
        let vcpu = vm.create_vcpu(0, &cpuid).expect("a processor");
        times.push(start.elapsed());
        made.push((vm, vcpu));
    }
    println!(
        "{:40} {:>10.3} µs",
        "create VM, 1 MiB slot, vCPU",
        median(times).as_nanos() as f64 / 1e3
    );
    let mut times = Vec::new();
    for (vm, vcpu) in made {
        let start = Instant::now();
        drop((vcpu, vm));
        times.push(start.elapsed());
    }
    println!(
        "{:40} {:>10.3} µs",
        "drop them",
        median(times).as_nanos() as f64 / 1e3
    );
    let mut made = Vec::new();
    let mut times = Vec::new();
    for _ in 0..500 {
        let start = Instant::now();
        let vm = soft.create_vm(&spec).expect("a machine");
        vm.map(slot(&ram, true)).expect("a slot");
        let mut vcpu = vm.create_vcpu(0, &cpuid).expect("a processor");
        vcpu.set_boot_registers(&common::entry())
            .expect("registers");
        vcpu.run().expect("a run");
        times.push(start.elapsed());
        made.push((vcpu, vm));
    }
    println!(
        "{:40} {:>10.3} µs",
        "create, set registers, first exit",
        median(times).as_nanos() as f64 / 1e3
    );
}

fn exits() {
    for (name, tuning) in [("jit", Tuning::JIT), ("interpreter", Tuning::INTERPRETER)] {
        for (what, code) in [
            ("OUT and JMP", out_loop()),
            ("150 instructions", work_loop()),
            ("200 blocks", many_blocks(100)),
        ] {
            let mut guest = Small::new(&soft(tuning), &code);
            for _ in 0..20_000 {
                guest.out();
            }
            measure(&format!("{what}, {name}"), 50, 2000, || {
                black_box(guest.out());
            });
        }
    }
    let mut guest = Small::new(&soft(Tuning::JIT), &work_loop());
    guest.vcpu.set_budget(Some(u64::MAX)).expect("a budget");
    for _ in 0..20_000 {
        guest.out();
    }
    measure("150 instructions, jit, counted", 50, 2000, || {
        black_box(guest.out());
    });
    let before = guest.vcpu.instructions();
    guest.out();
    let count = guest.vcpu.instructions().zip(before).map(|(a, b)| a - b);
    println!("instructions between two exits: {count:?}");
    let mut guest = Small::new(&soft(Tuning::JIT), &out_loop());
    for _ in 0..20_000 {
        guest.out();
    }
    measure("OUT and JMP in a call of its own", 50, 2000, || {
        guest.vcpu.begin_call();
        guest.out();
        guest.vcpu.end_call();
    });
}

fn states() {
    let mut guest = Small::new(&soft(Tuning::JIT), &work_loop());
    for _ in 0..20_000 {
        guest.out();
    }
    let mut state = guest.vcpu.state().expect("a state");
    measure("get state", 50, 1000, || {
        black_box(guest.vcpu.state().expect("a state"));
    });
    measure("set state, only general registers new", 50, 1000, || {
        state.general.gpr[3] += 1;
        guest.vcpu.set_state(&state).expect("a state");
    });
    measure("set state, 150 instructions", 50, 1000, || {
        state.general.gpr[3] += 1;
        guest.vcpu.set_state(&state).expect("a state");
        guest.out();
    });
    let registers = BootRegisters {
        general: state.general,
        system: state.system,
    };
    measure("set boot registers, 150 instructions", 50, 1000, || {
        guest
            .vcpu
            .set_boot_registers(&registers)
            .expect("registers");
        guest.out();
    });
}

fn dirty() {
    for (name, len) in [("1 MiB", 1 << 20), ("1 GiB", 1 << 30)] {
        let code = assemble(|a| {
            let (mut again, mut page) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.mov(ecx, 16)?;
            a.mov(rdi, rsi)?;
            a.set_label(&mut page)?;
            a.inc(qword_ptr(rdi))?;
            a.add(rdi, 0x3000)?;
            a.dec(ecx)?;
            a.jnz(page)?;
            a.out(u32::from(PORT), eax)?;
            a.jmp(again)
        });
        let mut guest = Small::with_ram(&soft(Tuning::JIT), &code, ram(len));
        for _ in 0..1000 {
            guest.out();
        }
        let mut times = Vec::new();
        let mut around = Vec::new();
        let mut pages = 0;
        for _ in 0..2000 {
            let start = Instant::now();
            guest.out();
            let drain = Instant::now();
            guest
                .vm
                .drain_dirty(Gpa(0), &mut |page| {
                    pages += 1;
                    black_box(page);
                })
                .expect("a log");
            times.push(drain.elapsed());
            around.push(start.elapsed());
        }
        println!(
            "{:40} {:>10.3} µs ({} pages)",
            format!("drain 16 dirty pages of {name}"),
            median(times).as_nanos() as f64 / 1e3,
            pages / 2000
        );
        println!(
            "{:40} {:>10.3} µs",
            "  with the guest that writes them",
            median(around).as_nanos() as f64 / 1e3,
        );
    }
}

/// Programs that never leave.
fn endless() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        (
            "jmp .",
            assemble(|a| {
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.jmp(again)
            }),
        ),
        (
            "a loop with loads and stores",
            assemble(|a| {
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.mov(rax, qword_ptr(rsi))?;
                a.add(qword_ptr(rdi), rax)?;
                a.dec(rcx)?;
                a.jmp(again)
            }),
        ),
        (
            "rep movsb of all memory",
            assemble(|a| {
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.mov(ecx, 0x2_0000)?;
                a.mov(rsi, 0xc_0000_u64)?;
                a.mov(rdi, 0xa_0000_u64)?;
                a.rep().movsb()?;
                a.jmp(again)
            }),
        ),
        (
            "two pages that jump to each other",
            assemble(|a| {
                let (mut here, mut there) = (a.create_label(), a.create_label());
                a.set_label(&mut here)?;
                a.inc(rax)?;
                a.jmp(there)?;
                a.db(&[0xcc; 0x1000])?;
                a.set_label(&mut there)?;
                a.inc(rbx)?;
                a.jmp(here)
            }),
        ),
    ]
}

/// How long it takes from a cancel to the end of the run.
fn cancel() {
    for (name, code) in endless() {
        for (way, tuning) in [("jit", Tuning::JIT), ("interpreter", Tuning::INTERPRETER)] {
            let mut guest = Small::new(&soft(tuning), &code);
            // Pages for what runs over the end of memory are mapped already.
            guest.ram.write_obj(0_u8, GuestAddress(0)).expect("memory");
            let canceller = guest.vcpu.canceller();
            let mut times = Vec::new();
            let origin = Instant::now();
            let at = AtomicU64::new(0);
            let running = AtomicBool::new(false);
            for _ in 0..50 {
                guest.vcpu.begin_call();
                let call = canceller.current().expect("a call");
                running.store(false, Ordering::SeqCst);
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        while !running.load(Ordering::SeqCst) {
                            std::thread::yield_now();
                        }
                        std::thread::sleep(Duration::from_millis(2));
                        at.store(origin.elapsed().as_nanos() as u64, Ordering::SeqCst);
                        assert_eq!(canceller.cancel(call), CancelOutcome::Cancelled);
                    });
                    running.store(true, Ordering::SeqCst);
                    let exit = guest.vcpu.run().expect("a run");
                    let end = origin.elapsed();
                    if exit == Exit::Cancelled {
                        times.push(end - Duration::from_nanos(at.load(Ordering::SeqCst)));
                    } else {
                        assert!(matches!(exit, Exit::Shutdown), "{exit:?}");
                    }
                });
                guest.vcpu.end_call();
            }
            if times.is_empty() {
                println!("{name}, {way}: the guest ended by itself");
                continue;
            }
            // On a busy host these are times of its scheduler, but for the best.
            let best = times.iter().min().copied().unwrap_or_default();
            let worst = times.iter().max().copied().unwrap_or_default();
            println!(
                "{:40} {:>10.3} µs, at best {:.1}, at worst {:.1}",
                format!("cancel {name}, {way}"),
                median(times).as_nanos() as f64 / 1e3,
                best.as_nanos() as f64 / 1e3,
                worst.as_nanos() as f64 / 1e3
            );
        }
    }
}

fn main() {
    let chosen: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let parts: [(&str, fn()); 5] = [
        ("create", create),
        ("exits", exits),
        ("states", states),
        ("dirty", dirty),
        ("cancel", cancel),
    ];
    for (name, part) in parts {
        if chosen.is_empty() || chosen.iter().any(|c| c == name) {
            part();
        }
    }
}
