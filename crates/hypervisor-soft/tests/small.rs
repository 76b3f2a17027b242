//! Guests as function sandboxes have them: states that are set often, and budgets.

mod common;

use common::{CODE, DATA, PORT, Small, assemble, many_blocks, soft, work_loop};
use iced_x86::code_asm::*;
use skerry_hypervisor::{BUDGET_SLACK, CpuState, Exit, Vcpu, Vm};
use skerry_hypervisor_soft::Tuning;
use vm_memory::{Bytes, GuestAddress};

const TUNINGS: [Tuning; 3] = [Tuning::JIT, Tuning::STRESS, Tuning::INTERPRETER];

/// Tells what is at the start of the data, again and again.
fn reader() -> Vec<u8> {
    assemble(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(eax, dword_ptr(rsi))?;
        a.out(u32::from(PORT), eax)?;
        a.jmp(again)
    })
}

fn counter(guest: &Small, name: &str) -> u64 {
    let counters = guest.vm.statistics().expect("statistics").counters(0);
    let found = counters.into_iter().find(|counter| counter.0 == name);
    found.expect("a counter").1
}

/// A guest that tells 1, and has run so often that all is known and compiled; its state at the start.
fn warm(tuning: Tuning) -> (Small, CpuState) {
    let mut guest = Small::new(&soft(tuning), &reader());
    let put = |at: u64, value: u32| {
        let at = GuestAddress(at);
        guest.ram.write_obj(value, at).expect("memory");
    };
    put(DATA, 1);
    put(DATA + 0x5000, 2);
    for _ in 0..2000 {
        assert_eq!(guest.out(), 1);
    }
    let mut state = guest.vcpu.state().expect("a state");
    state.general.rip = CODE;
    (guest, state)
}

/// The entry of the page of data in tables that start here.
const fn entry_of_data(tables: u64) -> u64 {
    tables + 0x3000 + (DATA >> 12) * 8
}

const TABLES: u64 = 0x1000;
const OTHER_TABLES: u64 = 0x8000;

#[test]
fn a_state_with_other_registers_costs_nothing_that_is_known() {
    let mut guest = Small::new(&soft(Tuning::JIT), &work_loop());
    for _ in 0..5000 {
        guest.out();
    }
    let mut state = guest.vcpu.state().expect("a state");
    let names = [
        "decoded_blocks",
        "compiled_traces",
        "interpreted_instructions",
        "tlb_walks",
        "tlb_second_hits",
    ];
    let counters = |guest: &Small| names.map(|name| counter(guest, name));
    guest.vcpu.set_state(&state).expect("a state");
    guest.out();
    let before = counters(&guest);
    for n in 0..100 {
        state.general.gpr[3] = n;
        state.xsave[160] = n as u8;
        guest.vcpu.set_state(&state).expect("a state");
        guest.out();
    }
    assert_eq!(counters(&guest), before);
    let after = guest.vcpu.state().expect("a state");
    assert_eq!(after.xsave[160], 99);
}

#[test]
fn a_state_with_other_tables_is_one_of_other_memory() {
    for tuning in TUNINGS {
        let (mut guest, mut state) = warm(tuning);
        // The same tables again, but for the page of data.
        for level in 0..4 {
            for n in 0..512 {
                let at = level * 0x1000 + n * 8;
                let entry: u64 = guest
                    .ram
                    .read_obj(GuestAddress(TABLES + at))
                    .expect("memory");
                let entry = match entry {
                    0 => 0,
                    entry if level < 3 => entry + (OTHER_TABLES - TABLES),
                    entry => entry,
                };
                let at = GuestAddress(OTHER_TABLES + at);
                guest.ram.write_obj(entry, at).expect("memory");
            }
        }
        let at = GuestAddress(entry_of_data(OTHER_TABLES));
        guest.ram.write_obj(DATA + 0x5007, at).expect("memory");
        for (tables, value) in [(OTHER_TABLES, 2), (TABLES, 1), (OTHER_TABLES, 2)] {
            state.system.cr3 = tables;
            for _ in 0..3 {
                guest.vcpu.set_state(&state).expect("a state");
                assert_eq!(guest.out(), value);
            }
        }
    }
}

#[test]
fn tables_that_the_host_wrote_hold_from_the_next_state_on() {
    for tuning in TUNINGS {
        let (mut guest, state) = warm(tuning);
        for (entry, value) in [(DATA + 0x5007, 2), (DATA + 7, 1), (DATA + 0x5007, 2)] {
            let at = GuestAddress(entry_of_data(TABLES));
            guest.ram.write_obj(entry, at).expect("memory");
            guest.vcpu.set_state(&state).expect("a state");
            assert_eq!(guest.out(), value);
        }
        let registers = guest.vcpu.boot_registers().expect("registers");
        let at = GuestAddress(entry_of_data(TABLES));
        guest.ram.write_obj(DATA + 7, at).expect("memory");
        let mut start = registers;
        start.general.rip = CODE;
        guest.vcpu.set_boot_registers(&start).expect("registers");
        assert_eq!(guest.out(), 1);
    }
}

#[test]
fn a_budget_ends_a_run_and_counts_are_the_same_in_all_ways() {
    let mut counts = Vec::new();
    for tuning in TUNINGS {
        let mut guest = Small::new(&soft(tuning), &work_loop());
        assert_eq!(guest.vcpu.instructions(), None);
        guest.vcpu.set_budget(Some(u64::MAX)).expect("a budget");
        assert_eq!(guest.vcpu.instructions(), Some(0));
        for _ in 0..3000 {
            guest.out();
        }
        counts.push(guest.vcpu.instructions().expect("a count"));
        guest.vcpu.set_budget(Some(100)).expect("a budget");
        let before = guest.vcpu.instructions().expect("a count");
        while guest.vcpu.run().expect("a run") != Exit::BudgetSpent {}
        let ran = guest.vcpu.instructions().expect("a count") - before;
        assert!((100..100 + BUDGET_SLACK).contains(&ran), "{ran}");
        assert_eq!(guest.vcpu.run().expect("a run"), Exit::BudgetSpent);
        guest.vcpu.set_budget(None).expect("a budget");
        guest.out();
    }
    assert_eq!(counts, vec![counts[0]; TUNINGS.len()]);
}

#[test]
fn what_begins_small_grows() {
    // Far more code than a small processor has room for: blocks, and, where all is compiled, traces.
    let code = assemble(|a| {
        let mut again = a.create_label();
        // Behind the code.
        a.mov(rsi, 0xe_0000_u64)?;
        a.set_label(&mut again)?;
        for n in 0..9000 {
            let mut over = a.create_label();
            a.test(eax, 1 << (n % 31))?;
            a.jnz(over)?;
            a.add(dword_ptr(rsi + n % 64 * 4), eax)?;
            a.set_label(&mut over)?;
            a.add(eax, 77)?;
        }
        a.out(u32::from(PORT), eax)?;
        a.jmp(again)
    });
    let mut outs = Vec::new();
    for tuning in [
        Tuning::INTERPRETER,
        Tuning::JIT,
        Tuning {
            threshold: 1,
            ..Tuning::JIT
        },
    ] {
        let mut guest = Small::new(&soft(tuning), &code[..]);
        let told: Vec<u32> = (0..20).map(|_| guest.out()).collect();
        assert!(counter(&guest, "flushes") >= 1, "it has grown");
        // Once is enough.
        let flushes = counter(&guest, "flushes");
        for _ in 0..200 {
            guest.out();
        }
        assert_eq!(counter(&guest, "flushes"), flushes);
        outs.push(told);
    }
    assert!(outs.iter().all(|told| *told == outs[0]));
}

#[test]
fn many_blocks_run_alike_in_all_ways() {
    let mut outs = Vec::new();
    for tuning in TUNINGS {
        let mut guest = Small::new(&soft(tuning), &many_blocks(300));
        outs.push((0..200).map(|_| guest.out()).collect::<Vec<_>>());
    }
    assert!(outs.iter().all(|told| *told == outs[0]));
}
