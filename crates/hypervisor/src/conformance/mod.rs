//! The conformance suite: what every backend must do, tried with small guests.
//!
//! A backend's test target (`harness = false`) calls [`main`] with a hypervisor and what it can't
//! do; every case is a named test, and each that is skipped is printed with the reason:
//!
//! ```text
//! cargo test -p skerry-hypervisor-soft --test conformance            # all, on the software processor
//! cargo test -p skerry-hypervisor-kvm --test conformance             # on this host's KVM
//! cargo test -p skerry-hypervisor-kvm --test conformance -- cancel   # those with "cancel" in the name
//! ```
//!
//! On a machine that has no real KVM, the test binary runs in the KVM test bed:
//!
//! ```text
//! cargo test -p skerry-hypervisor-kvm --test conformance --no-run     # prints the binary's path
//! ../shared/tools/kvm-testbed.sh --mem 1500 -- target/debug/deps/conformance-…
//! ```
//!
//! ```text
//!   main ── for each Case ── own thread, time limit ── case(&H)
//!                                                        │ guest::Guest: VM, memory, tables, code
//!                                                        └ run, answer exits, compare
//! ```

mod cancelling;
mod code;
mod guest;
mod interrupts;
mod io;
mod memory;
mod processors;
mod registers;
mod restore;
mod time;
pub mod travel;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::traits::Hypervisor;

bitflags::bitflags! {
    /// What a case needs of the backend beyond running integer instructions.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Needs: u32 {
        /// Guests may use SSE.
        const SSE = 1;
        /// The processor model has AVX.
        const AVX = 1 << 1;
        /// Millions of instructions in reasonable time.
        const SPEED = 1 << 2;
        /// Two processors that run at once.
        const SMP = 1 << 3;
        /// Every architectural corner that an instruction emulator in a host's kernel may lack.
        const EXACT = 1 << 4;
    }
}

/// One point of the contract.
pub struct Case<H: Hypervisor> {
    /// Its name.
    pub name: &'static str,
    /// What it needs.
    pub needs: Needs,
    /// Panics, with a message, if the backend fails it.
    pub run: fn(&H),
}

macro_rules! cases {
    ($($module:ident :: $name:ident $(($($need:ident)|+))?),* $(,)?) => {
        vec![$(Case {
            name: concat!(stringify!($module), "::", stringify!($name)),
            needs: Needs::empty() $($(.union(Needs::$need))+)?,
            run: $module::$name::<H>,
        }),*]
    };
}

/// Every case.
pub fn cases<H: Hypervisor>() -> Vec<Case<H>> {
    cases![
        io::port_out_in_long_mode,
        io::port_in_of_every_size,
        io::mmio_read_of_every_size,
        io::mmio_write_of_every_size,
        io::mmio_across_pages,
        io::mmio_wider_than_eight_bytes(SSE),
        io::string_output,
        io::string_input,
        io::read_must_be_completed,
        io::cpuid_as_given,
        memory::unmapped_then_mapped_then_unmapped,
        memory::map_while_running(SMP),
        memory::read_only_slot,
        memory::dirty_log_is_exact,
        memory::bad_slots_are_refused,
        memory::host_writes_are_seen,
        interrupts::external_through_window,
        interrupts::message_signalled,
        interrupts::level_triggered_end_is_reported,
        interrupts::nmi,
        interrupts::bad_messages_are_refused,
        interrupts::held_off_while_disabled(EXACT),
        interrupts::halt_wakes_on_message,
        interrupts::halt_wakes_on_external,
        interrupts::halt_exits_without_apics,
        interrupts::x2apic,
        processors::init_sipi_starts_second(SMP),
        processors::interprocessor_interrupt(SMP),
        processors::locked_counter(SMP | SPEED),
        processors::bad_ids_are_refused,
        cancelling::spinning,
        cancelling::never_run,
        cancelling::several_at_once(SMP),
        cancelling::during_host_exit,
        cancelling::halted,
        cancelling::waiting_for_sipi,
        cancelling::late_misses_next_call,
        cancelling::without_call_does_nothing,
        cancelling::is_sticky_until_call_ends,
        cancelling::kick_interrupts_once,
        cancelling::storm(SPEED),
        code::exceptions_reach_handlers,
        code::self_modifying,
        code::host_rewrites_code,
        code::cross_modifying(SMP | SPEED),
        code::triple_fault_is_shutdown,
        code::sse_arithmetic(SSE),
        registers::round_trip_of_every_field,
        registers::round_trip_of_events,
        registers::round_trip_of_activity,
        registers::guest_sees_what_was_set,
        registers::guest_sees_vectors_that_were_set(SSE | AVX),
        registers::state_is_between_instructions,
        registers::boot_registers_round_trip,
        restore::counter_goes_on_in_fresh_vm,
        restore::pending_interrupt_goes_on_in_fresh_vm,
        restore::halted_goes_on_in_fresh_vm,
        restore::damaged_states_are_refused,
        restore::random_states_do_no_harm,
        restore::user_state_replaces_what_a_guest_left,
        time::tsc_is_monotonic_after_restore,
        time::tsc_has_the_frequency_told(SPEED),
        time::tsc_has_another_frequency_or_none(SPEED),
        time::clock_round_trip,
        time::apic_timer_one_shot,
        time::apic_timer_deadline,
        time::apic_timer_wakes_from_halt,
    ]
}

/// The longest that a case may take: they take milliseconds, and a test bed is a hundred times
/// slower.
const TIME_LIMIT: Duration = Duration::from_secs(60);

enum Outcome {
    Passed,
    Failed(String),
}

fn message(panic: Box<dyn Any + Send>) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panicked".into())
}

fn run_case<H: Hypervisor>(hypervisor: &Arc<H>, case: fn(&H)) -> Outcome {
    let (done, wait) = mpsc::channel();
    let hypervisor = hypervisor.clone();
    std::thread::spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(|| case(&hypervisor)));
        // The other end is gone if the time was up.
        let _ = done.send(result);
    });
    match wait.recv_timeout(TIME_LIMIT) {
        Ok(Ok(())) => Outcome::Passed,
        Ok(Err(panic)) => Outcome::Failed(message(panic)),
        Err(_) => Outcome::Failed(format!("hangs: no end after {TIME_LIMIT:?}")),
    }
}

/// Runs the suite as a test program would: arguments are `--list`, `--exact` and parts of names
/// (other flags of the standard test harness are ignored). `missing` says what this backend can't
/// be asked here, and why.
pub fn main<H: Hypervisor>(hypervisor: H, missing: &[(Needs, &str)]) -> ExitCode {
    main_of_each(vec![(None, hypervisor)], missing)
}

/// The same, for a backend that runs guests in more than one way: each case is run in each, and is
/// named `WAY::CASE`.
pub fn main_of_each<H: Hypervisor>(
    ways: Vec<(Option<&'static str>, H)>,
    missing: &[(Needs, &str)],
) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let exact = arguments.iter().any(|a| a == "--exact");
    let filters: Vec<&String> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| {
        filters.is_empty()
            || filters.iter().any(|f| {
                if exact {
                    name == *f
                } else {
                    name.contains(f.as_str())
                }
            })
    };
    let mut chosen = Vec::new();
    for (way, hypervisor) in ways {
        let hypervisor = Arc::new(hypervisor);
        for case in cases::<H>() {
            let name = way.map_or(case.name.to_owned(), |way| format!("{way}::{}", case.name));
            if wanted(&name) {
                chosen.push((name, hypervisor.clone(), case));
            }
        }
    }
    if arguments.iter().any(|a| a == "--list") {
        for (name, ..) in &chosen {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let (mut passed, mut skipped, mut failed) = (0, 0, Vec::new());
    println!("\nrunning {} conformance cases", chosen.len());
    for (name, hypervisor, case) in &chosen {
        if let Some((_, reason)) = missing
            .iter()
            .find(|(lack, _)| case.needs.intersects(*lack))
        {
            println!("skipped {name}: {reason}");
            skipped += 1;
            continue;
        }
        let start = Instant::now();
        match run_case(hypervisor, case.run) {
            Outcome::Passed => {
                println!("test {name} ... ok ({:.1?})", start.elapsed());
                passed += 1;
            }
            Outcome::Failed(why) => {
                println!("test {name} ... FAILED: {why}");
                failed.push(name);
            }
        }
    }
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\nconformance: {verdict}. {passed} passed; {} failed; {skipped} skipped\n",
        failed.len()
    );
    for name in &failed {
        println!("    failed: {name}");
    }
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
