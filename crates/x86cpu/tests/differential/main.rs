//! The differential fuzzer: random user-mode instructions of every family that the processor offers
//! run on the host, in the interpreter and compiled, from the same state; the results must be the
//! same.
//!
//! ```text
//! cargo test --release -p skerry-x86cpu --test differential                      # as in CI
//! cargo test --release -p skerry-x86cpu --test differential -- --seconds 3600 --seed 7
//! cargo test --release -p skerry-x86cpu --test differential -- --family avx2 --cases 100000
//! ```
//! Each case runs instruction by instruction, as a block, and twice in a processor that compiles
//! what it meets; `--interpreter-only` leaves the last out.
//! `--family` takes a family as the table at the end names it, or a mnemonic. A mismatch prints the
//! code bytes, the disassembly, the start state and what differs, and the number of the case, which
//! `--seed S --case N` runs alone.

mod forms;
mod generate;
mod guest;
mod native;
mod operands;
#[path = "../common/options.rs"]
mod options;
mod report;
mod state;
mod templates;

use std::collections::HashSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use generate::{Case, Generator};
use guest::Guest;
use native::Native;
use options::Common;
use skerry_x86cpu::Tuning;
use state::{End, Random};

/// Cases when nothing else is asked for. Without optimisation it is a smoke test.
const DEFAULT_CASES: u64 = if cfg!(debug_assertions) {
    100_000
} else {
    2_000_000
};

struct Options {
    common: Common,
    family: Option<String>,
    native_only: bool,
    interpreter_only: bool,
    quiet: bool,
}

fn options() -> Result<Options, String> {
    let (mut native_only, mut interpreter_only, mut quiet) = (false, false, false);
    let mut family = None;
    let common = Common::parse(DEFAULT_CASES, 20, |option, value| match option {
        "--family" => family = value(),
        "--native-only" => native_only = true,
        "--interpreter-only" => interpreter_only = true,
        "--quiet" => quiet = true,
        // What the test harness would understand.
        _ => {}
    })?;
    Ok(Options {
        common,
        family,
        native_only,
        interpreter_only,
        quiet,
    })
}

/// The same processor twice.
struct Guests {
    interpreter: Guest,
    compiler: Guest,
}

struct Tally {
    names: Vec<String>,
    cases: Vec<u64>,
    faults: Vec<u64>,
    mismatches: Vec<u64>,
    reported: HashSet<iced_x86::Code>,
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::from(2);
        }
    };
    if std::env::args().any(|a| a == "--list") {
        println!("differential: test");
        return ExitCode::SUCCESS;
    }
    if let Some(reason) = native::unsuitable() {
        println!("skipped: {reason}");
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(n) => {
            println!("{n} mismatches");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<u64, String> {
    let mut native = Native::new().map_err(|e| format!("sandbox: {e}"))?;
    let mut guests = Guests {
        interpreter: Guest::new(Tuning::INTERPRETER),
        compiler: Guest::new(Tuning::STRESS),
    };
    let mut generator = {
        let offered = |features: &[iced_x86::CpuidFeature]| guests.interpreter.offers(features);
        Generator::new(&offered, options.family.as_deref())
    };
    let branches = templates::branches();
    let mut tally = Tally::new(&generator);
    let started = Instant::now();
    let limit = options.common.seconds.map(Duration::from_secs);
    let mut number = options.common.case.unwrap_or(0);
    loop {
        let done = match limit {
            _ if options.common.case.is_some_and(|case| number > case) => true,
            Some(limit) => number.is_multiple_of(256) && started.elapsed() > limit,
            None => number >= options.common.cases && options.common.case.is_none(),
        };
        if done || tally.reported.len() as u64 >= options.common.mismatches {
            break;
        }
        let mut random = Random::new(
            options
                .common
                .seed
                .wrapping_mul(0x1_0000_0001)
                .wrapping_add(number),
        );
        let this = number;
        number += 1;
        let special = match options.family.as_deref() {
            None => random.below(24),
            Some("sequences") => 0,
            Some("branches") => 3,
            Some("fpu-state") => 4,
            Some("vector-runs") => 5,
            Some("integer-runs") => 7,
            Some(_) => 99,
        };
        let last = tally.names.len() - 1;
        let found = match special {
            0..3 => generator
                .sequence(&mut random, false)
                .map(|case| (last, case)),
            5..7 => generator
                .sequence(&mut random, true)
                .map(|case| (last - 3, case)),
            7..9 => templates::integer_run(&mut random, &mut generator, &branches)
                .map(|case| (last - 4, case)),
            3 => templates::branch(&mut random, &branches).map(|case| (last - 1, case)),
            4 => templates::save_restore(&mut random).map(|case| (last - 2, case)),
            _ => generator.single(&mut random),
        };
        let Some((family, case)) = found else {
            continue;
        };
        check(
            options,
            &mut native,
            &mut guests,
            &case,
            family,
            this,
            &mut tally,
        );
    }
    tally.print(started.elapsed());
    Ok(tally.mismatches.iter().sum())
}

fn check(
    options: &Options,
    native: &mut Native,
    guests: &mut Guests,
    case: &Case,
    family: usize,
    number: u64,
    tally: &mut Tally,
) {
    let mut code = case.code.clone();
    code.extend_from_slice(&Native::landing_pad(0));
    code.extend_from_slice(&Native::landing_pad(1));
    let mut expected = case.start.clone();
    let end = native.run(&code, &mut expected);
    tally.cases[family] += 1;
    if matches!(end, End::Fault { .. }) {
        tally.faults[family] += 1;
    }
    if options.native_only {
        return;
    }
    let mut actual = case.start.clone();
    let interpreter = &mut guests.interpreter;
    let mut actual_end = interpreter.step(&case.code, &mut actual);
    let mut differences = report::compare(case, (&end, &expected), (&actual_end, &actual));
    if differences.is_empty() && case.instructions.len() > 1 {
        // As one block: what ops take from their block, and flags left uncomputed between them.
        actual = case.start.clone();
        actual_end = interpreter.run(&case.code, &mut actual);
        differences = report::compare(case, (&end, &expected), (&actual_end, &actual));
    }
    if differences.is_empty() && !options.interpreter_only {
        // The second run has it compiled, whatever the first one had.
        for _ in 0..2 {
            actual = case.start.clone();
            actual_end = guests.compiler.run(&case.code, &mut actual);
            differences = report::compare(case, (&end, &expected), (&actual_end, &actual));
            if !differences.is_empty() {
                differences.push("(compiled)".to_owned());
                break;
            }
        }
    }
    if differences.is_empty() && options.common.case.is_none() {
        return;
    }
    if !differences.is_empty() {
        tally.mismatches[family] += 1;
    }
    let first = case
        .instructions
        .first()
        .map_or(iced_x86::Code::INVALID, |i| i.code());
    if !options.quiet && tally.reported.insert(first) || options.common.case.is_some() {
        println!("case {number} of seed {}:", options.common.seed);
        report::print(case, &end, &actual_end, &differences);
    }
}

impl Tally {
    fn new(generator: &Generator) -> Self {
        let mut names: Vec<String> = generator.families.iter().map(|f| f.0.clone()).collect();
        names.extend(
            [
                "integer-runs",
                "vector-runs",
                "fpu-state",
                "branches",
                "sequences",
            ]
            .map(str::to_owned),
        );
        let zero = vec![0; names.len()];
        Self {
            cases: zero.clone(),
            faults: zero.clone(),
            mismatches: zero,
            names,
            reported: HashSet::new(),
        }
    }

    fn print(&self, elapsed: Duration) {
        println!(
            "{:20} {:>10} {:>10} {:>10}",
            "family", "cases", "faults", "mismatches"
        );
        for (n, name) in self.names.iter().enumerate() {
            let (cases, faults) = (self.cases[n], self.faults[n]);
            println!(
                "{name:20} {cases:>10} {faults:>10} {:>10}",
                self.mismatches[n]
            );
        }
        let total: u64 = self.cases.iter().sum();
        println!("{total} cases in {:.1} s", elapsed.as_secs_f64());
    }
}
