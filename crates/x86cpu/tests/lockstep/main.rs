//! Lock step: random programs run in an interpreting and in compiling processors; all that can be
//! seen of them must be the same.
//!
//! ```text
//! cargo test --release -p skerry-x86cpu --test lockstep                      # as in CI
//! cargo test --release -p skerry-x86cpu --test lockstep -- --seconds 3600 --seed 7
//! cargo test --release -p skerry-x86cpu --test lockstep -- --seed 7 --case 1234
//! cargo test --release -p skerry-x86cpu --test lockstep -- --seed 7 --case 1234 --apart
//! ```
//! (the last for a case of which the process dies or hangs: shrinks it in processes of their own)
//!
//! compose.rs ─ programs ─▶ program.rs: laid out ─▶ world.rs: run in each machine ─▶ report.rs
//!
//! Programs loop, call, return, fault, reach devices and change their own code, at level 0 and at
//! level 3; one of the compiling processors is interrupted all the time. An exception handler of the guest's logs each fault and goes on elsewhere. A mismatch is
//! shrunk and printed: seed and number of the case, listing, start state and what differs.
#![expect(unsafe_code, reason = "assembled guest code")]

#[path = "../common/apic.rs"]
mod apic;
#[path = "../common/assemble.rs"]
mod assemble;
mod compose;
#[path = "../differential/forms.rs"]
mod forms;
#[path = "../differential/generate.rs"]
#[expect(dead_code, reason = "the fuzzer's own use of it isn't here")]
mod generate;
#[path = "../differential/operands.rs"]
mod operands;
#[path = "../common/options.rs"]
mod options;
mod program;
mod report;
mod shrink;
mod signal;
#[path = "../differential/state.rs"]
#[expect(dead_code, reason = "the fuzzer's own use of it isn't here")]
mod state;
mod world;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use skerry_x86cpu::Tuning;

use compose::Composer;
use generate::Generator;
use options::Common;
use program::{Image, Program};
use state::Random;
use world::{Outcome, Watch, World};

/// Programs when nothing else is asked for. Without optimisation it is a smoke test.
const DEFAULT_CASES: u64 = if cfg!(debug_assertions) {
    2_000
} else {
    30_000
};

/// Programs that run in the same machines.
const RENEWED_AFTER: u64 = 1000;

struct Options {
    common: Common,
    shrink: bool,
    apart: bool,
}

fn options() -> Result<Options, String> {
    let (mut shrink, mut apart) = (true, false);
    let common = Common::parse(DEFAULT_CASES, 5, |option, _| match option {
        "--apart" => apart = true,
        "--no-shrink" => shrink = false,
        // What the test harness would understand.
        _ => {}
    })?;
    Ok(Options {
        common,
        shrink,
        apart,
    })
}

/// The same machine, running code in different ways.
pub struct Worlds {
    interpreter: World,
    others: Vec<(&'static str, World)>,
}

/// Whether instructions are counted.
fn counted(number: u64) -> bool {
    (number / RENEWED_AFTER) % 2 == 1
}

/// How compiled code runs, and whether it is interrupted all the time.
fn tunings(number: u64) -> Vec<(&'static str, Tuning, bool)> {
    let hardened = (number / RENEWED_AFTER) % 4 == 3;
    let small = (number / RENEWED_AFTER).is_multiple_of(3);
    vec![
        (
            "stress",
            Tuning {
                hardened,
                small,
                ..Tuning::STRESS
            },
            false,
        ),
        (
            "jit",
            Tuning {
                threshold: 6,
                small,
                ..Tuning::JIT
            },
            true,
        ),
    ]
}

impl Worlds {
    /// New machines for the case of this number.
    pub fn new(number: u64, watch: &Watch) -> Self {
        Self {
            interpreter: World::new(Tuning::INTERPRETER, watch, false, counted(number)),
            others: tunings(number)
                .into_iter()
                // What interrupts run is counted too, and chance.
                .map(|(name, tuning, pest)| {
                    let counted = counted(number) && !pest;
                    (name, World::new(tuning, watch, pest, counted))
                })
                .collect(),
        }
    }

    /// Runs a program everywhere. `None` if it doesn't end; else the interpreter's outcome, and
    /// those that differ.
    pub fn run(
        &mut self,
        program: &Program,
        image: &Image,
    ) -> Option<(Outcome, Vec<(&'static str, Outcome)>)> {
        let expected = self.interpreter.run(program, image);
        if expected.unfinished() {
            return None;
        }
        let mut different = Vec::new();
        for (name, world) in &mut self.others {
            let actual = world.run(program, image);
            if !report::differences(program, image, &expected, &actual).is_empty() {
                different.push((*name, actual));
            }
        }
        Some((expected, different))
    }
}

#[derive(Default)]
struct Tally {
    programs: u64,
    unusable: u64,
    endless: u64,
    faults: u64,
    exits: u64,
    instructions: u64,
    compiled: u64,
    interrupts: u64,
    mismatches: u64,
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
        println!("lockstep: test");
        return ExitCode::SUCCESS;
    }
    signal::install();
    let tally = run(&options);
    println!(
        "{} programs ({} could not be laid out, {} endless), {} instructions, {} faults, {} exits, {} interrupts, {} traces compiled, {} mismatches",
        tally.programs,
        tally.unusable,
        tally.endless,
        tally.instructions,
        tally.faults,
        tally.exits,
        tally.interrupts,
        tally.compiled,
        tally.mismatches
    );
    if tally.mismatches == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(options: &Options) -> Tally {
    let watch = Watch::start(Duration::from_secs(4));
    let mut number = options.common.case.unwrap_or(0);
    let mut worlds = Worlds::new(number, &watch);
    let mut composer = {
        let offered = |features: &[iced_x86::CpuidFeature]| worlds.interpreter.offers(features);
        Composer::new(Generator::new(&offered, None))
    };
    let mut tally = Tally::default();
    let started = Instant::now();
    let limit = options.common.seconds.map(Duration::from_secs);
    loop {
        let done = match limit {
            _ if options.common.case.is_some() => number > options.common.case.unwrap_or(0),
            Some(limit) => started.elapsed() > limit,
            None => number >= options.common.cases,
        };
        if done || tally.mismatches >= options.common.mismatches {
            tally.count(&worlds);
            return tally;
        }
        if number.is_multiple_of(RENEWED_AFTER) && number > 0 {
            tally.count(&worlds);
            worlds = Worlds::new(number, &watch);
        }
        let mut random = Random::new(
            options
                .common
                .seed
                .wrapping_mul(0x1_0000_0001)
                .wrapping_add(number),
        );
        signal::running(options.common.seed, number);
        number += 1;
        let Some(program) = composer.program(&mut random) else {
            continue;
        };
        let Some(image) = program.image() else {
            tally.unusable += 1;
            continue;
        };
        tally.programs += 1;
        if options.apart {
            match shrink::shrink(&program, number - 1) {
                Some(program) => report::shrunk(&program, number - 1),
                None => println!("doesn't fail"),
            }
            continue;
        }
        let Some((expected, different)) = worlds.run(&program, &image) else {
            tally.endless += 1;
            continue;
        };
        tally.faults += expected.faults.len() as u64;
        tally.exits += expected.stops.len() as u64;
        if let Some((name, actual)) = different.first() {
            tally.mismatches += 1;
            println!(
                "case {} of seed {}, {name}:",
                number - 1,
                options.common.seed
            );
            if options.shrink
                && let Some(program) = shrink::shrink(&program, number - 1)
            {
                report::shrunk(&program, number - 1);
            } else {
                println!(
                    "  only after the {} programs before it",
                    (number - 1) % RENEWED_AFTER
                );
                report::print(&program, &image, &expected, actual);
            }
            // What they hold now differs.
            tally.count(&worlds);
            worlds = Worlds::new(number, &watch);
        }
        if options.common.case.is_some() && different.is_empty() {
            report::print(&program, &image, &expected, &expected);
        }
    }
}

impl Tally {
    fn count(&mut self, worlds: &Worlds) {
        self.instructions += worlds.interpreter.instructions();
        for (_, world) in &worlds.others {
            self.compiled += world.compiled();
            self.interrupts += world.interrupts();
        }
    }
}
