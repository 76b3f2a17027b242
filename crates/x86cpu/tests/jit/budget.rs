//! Instructions are counted exactly, and a budget of them ends what runs.

use std::time::Duration;

use skerry_x86cpu::CpuExit;
use skerry_x86cpu::testing::{CODE, DATA};

use crate::assemble;
use crate::machine::{Deadline, TUNINGS, machine, run};

/// What may run beyond a budget: see `skerry_hypervisor::BUDGET_SLACK`.
const SLACK: u64 = 8192;

/// Loops without end: each with the instructions of a turn.
fn loops() -> Vec<(&'static str, &'static [u8], u64)> {
    vec![
        ("jmp $", assemble!("2:", "jmp 2b"), 1),
        (
            "loads and stores in a row",
            assemble!(
                "lea rsi, [rip + 4f]",
                "3:",
                "mov rdi, {data}",
                "mov ecx, 100",
                "2:",
                "mov rax, [rdi + 8*rcx]",
                "add [rdi], rax",
                "dec ecx",
                "jnz 2b",
                "jmp 3b",
                "4:";
                data = const DATA,
            ),
            403,
        ),
        (
            "a call and an indirect jump",
            assemble!(
                "jmp 5f",
                "4:",
                "inc rbx",
                "ret",
                "5:",
                "lea rax, [rip + 2f]",
                "2:",
                "call 4b",
                "jmp rax",
            ),
            4,
        ),
        (
            "what is the interpreter's",
            assemble!("2:", "xor eax, eax", "cpuid", "inc r15", "jmp 2b"),
            4,
        ),
        (
            "a string",
            assemble!(
                "2:",
                "mov rdi, {data}",
                "mov ecx, 5000",
                "rep stosb",
                "jmp 2b";
                data = const DATA,
            ),
            4,
        ),
    ]
}

#[test]
fn loops_without_end_are_ended() {
    for (name, tuning) in TUNINGS {
        for (what, code, _) in loops() {
            let what = format!("{name}, {what}");
            let _deadline = Deadline::new(what.clone(), Duration::from_secs(60));
            let mut t = machine(1, tuning);
            t.write(CODE, code);
            assert_eq!(t.cpu.retired(), None);
            let mut expected = 0;
            for budget in [0, 1, 10, 100_000, 3_000_000, 7] {
                t.cpu.set_budget(Some(budget));
                let before = t.cpu.retired().expect("a count");
                assert_eq!(before, expected, "{what}");
                assert_eq!(t.cpu.run(), CpuExit::BudgetSpent, "{what}");
                expected = t.cpu.retired().expect("a count");
                let ran = expected - before;
                assert!(
                    (budget..budget + SLACK).contains(&ran),
                    "{what}: {ran} of {budget}"
                );
                // It stays spent.
                assert_eq!(t.cpu.run(), CpuExit::BudgetSpent, "{what}");
                assert_eq!(t.cpu.retired(), Some(expected), "{what}");
            }
            // Without an end it goes on, and is counted.
            t.cpu.set_budget(None);
            let exit = run(&mut t.cpu, Duration::from_millis(1));
            assert_eq!(exit, CpuExit::Requested, "{what}");
        }
    }
}

#[test]
fn every_instruction_is_counted_once() {
    for (name, tuning) in TUNINGS {
        for (what, code, turn) in loops() {
            let mut t = machine(1, tuning);
            t.write(CODE, code);
            // To the start of a turn, and that many turns further: RIP is there again.
            t.cpu.set_budget(Some(10_000));
            assert_eq!(t.cpu.run(), CpuExit::BudgetSpent);
            let (mut first, mut last) = (None, 0);
            for _ in 0..2000 {
                // One block of the interpreter, or one trace.
                t.cpu.set_budget(Some(1));
                assert_eq!(t.cpu.run(), CpuExit::BudgetSpent);
                let count = t.cpu.retired().expect("a count");
                let place = (t.cpu.rip, t.cpu.gpr[1]);
                match first {
                    None => first = Some((place, count)),
                    Some((at, from)) if at == place => {
                        assert_eq!((count - from) % turn, 0, "{name}, {what}");
                        last = count;
                    }
                    Some(_) => {}
                }
            }
            assert!(last > 0, "{name}, {what}: never there again");
        }
    }
}

#[test]
fn an_access_is_finished_though_the_budget_is_spent() {
    for (name, tuning) in TUNINGS {
        let mut t = machine(1, tuning);
        t.write(CODE, assemble!("2:", "in al, 0x10", "inc rbx", "jmp 2b"));
        t.cpu.set_budget(Some(3));
        assert!(matches!(t.cpu.run(), CpuExit::PortIn { .. }), "{name}");
        assert_eq!(t.cpu.retired(), Some(0));
        t.cpu.set_budget(Some(0));
        t.cpu.complete_read(0x5a);
        assert_eq!(t.cpu.run(), CpuExit::BudgetSpent, "{name}");
        assert_eq!((t.cpu.gpr[0] & 0xff, t.cpu.retired()), (0x5a, Some(1)));
        t.cpu.set_budget(None);
        assert!(matches!(t.cpu.run(), CpuExit::PortIn { .. }), "{name}");
        assert_eq!(t.cpu.retired(), Some(3));
    }
}
