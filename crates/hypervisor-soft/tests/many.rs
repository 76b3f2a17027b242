//! Many small machines at once, each of which has run.
//!
//! The long form, as in a release's tests:
//! `cargo test --release -p skerry-hypervisor-soft --test many -- --ignored --nocapture`

mod common;

use common::{Small, many_blocks, mappings, ram, soft, status};
use skerry_hypervisor_soft::Tuning;

/// What a machine may take, beside its guest's memory, in KiB.
const MOST_KIB: f64 = 104.0;
/// The same in mappings.
const MOST_MAPPINGS: f64 = 3.0;

/// Makes so many machines and has each of them run; gives what one takes of memory in KiB, and of
/// mappings, without its guest's memory.
fn each_of(count: usize) -> (f64, f64) {
    // Turns of a loop, so that some of it is compiled.
    let code = many_blocks(2000);
    let soft = soft(Tuning::JIT);
    // What one process has for all of them.
    let mut first = Small::new(&soft, &code);
    first.out();
    let memory: Vec<_> = (0..count)
        .map(|_| {
            let ram = ram(1 << 18);
            common::fill(&ram, &code);
            // The pages that the guest writes.
            for page in [common::DATA, common::DATA + 0x1000] {
                let at = vm_memory::GuestAddress(page);
                vm_memory::Bytes::write_obj(&ram, 0_u8, at).expect("memory");
            }
            ram
        })
        .collect();
    let before = (status("VmRSS:"), mappings());
    let mut machines: Vec<Small> = memory
        .into_iter()
        .map(|ram| Small::with_ram(&soft, &code, ram))
        .collect();
    for machine in &mut machines {
        for _ in 0..3 {
            machine.out();
        }
    }
    let after = (status("VmRSS:"), mappings());
    let compiled = machines.iter().filter(|machine| {
        let statistics = skerry_hypervisor::Vm::statistics(&machine.vm).expect("statistics");
        let counters = statistics.counters(0);
        counters
            .iter()
            .any(|&(name, value)| name == "compiled_traces" && value > 0)
    });
    assert_eq!(compiled.count(), count, "all have compiled code");
    // They go on, each with its own memory.
    let last: Vec<u32> = machines.iter_mut().map(Small::out).collect();
    assert!(last.iter().all(|&out| out == last[0]));
    let each = |before: f64, after: f64| (after - before) / count as f64;
    (
        each(before.0 as f64, after.0 as f64),
        each(before.1 as f64, after.1 as f64),
    )
}

fn check(count: usize) {
    let (kib, mappings) = each_of(count);
    println!("{count} machines: {kib:.1} KiB and {mappings:.2} mappings each");
    assert!(kib <= MOST_KIB, "{kib:.1} KiB each");
    assert!(mappings <= MOST_MAPPINGS, "{mappings:.2} mappings each");
}

#[test]
fn three_hundred_at_once() {
    check(300);
}

#[test]
#[ignore = "takes two gigabytes and some seconds"]
fn ten_thousand_at_once() {
    check(10_000);
}
