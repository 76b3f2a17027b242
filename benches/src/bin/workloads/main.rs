//! Workloads in a guest on Skerry and on QEMU's TCG, and natively: the same programs, in turn.
//!
//! ```text
//! images.sh ──► rootfs, rootfs.ext4 ─┐
//! benches/guests: workloads-guest ───┴─► run.rs: native, QEMU, Skerry, round after round
//!                                          └─► report.rs: medians, ratios, against rows.rs' limits
//! ```
//!
//! `cargo run --release -p skerry-benches --bin bench-workloads -- --images DIR --rounds 5`
#![forbid(unsafe_code)]

mod report;
mod rows;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use skerry_benches::qemu_version;

use report::Results;
use rows::{BOOT, GROUPS, Group};
use run::{Bench, System};

/// Workloads beside QEMU's TCG and the host, with the limits that Skerry sets itself
#[derive(Parser)]
struct Options {
    /// The folder that benches/images.sh filled
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// Runs of each
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,
    /// Only this workload, or this group of them; can be given several times
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Sizes of workloads, of what they are by default: small ones show the way, not the speed
    #[arg(long, default_value_t = 100, value_name = "PERCENT")]
    scale: u32,
    /// The QEMU to compare with
    #[arg(long, default_value = skerry_benches::QEMU, value_name = "PROGRAM")]
    qemu: PathBuf,
    /// Leave one out: native, tcg or skerry
    #[arg(long, value_name = "SYSTEM")]
    without: Vec<System>,
    /// What Skerry runs on
    #[arg(long, default_value = "soft", value_name = "NAME")]
    hypervisor: String,
    /// MiB of memory of the guests
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    memory: u32,
    /// Seconds that a guest may take for one group
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,
    /// Compare the host's processor time instead, for a host that has other things to do; not where
    /// several processors are compared
    #[arg(long)]
    cpu_time: bool,
    /// Write all that was measured to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Exit with 1 when a limit is missed
    #[arg(long)]
    check: bool,
    /// Show what Skerry says on stderr
    #[arg(long)]
    verbose: bool,
    /// Options for skerry boot
    #[arg(last = true, value_name = "OPTION")]
    skerry: Vec<String>,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let chosen = rows::chosen(&options.only)?;
    let systems: Vec<System> = System::ALL
        .into_iter()
        .filter(|system| !options.without.contains(system))
        .collect();
    let peer = if systems.contains(&System::Tcg) {
        qemu_version(&options.qemu)?
    } else {
        "none".into()
    };
    let bench = Bench::new(&options)?;
    let mut results = Results::new(peer, options.rounds, options.scale, options.cpu_time);
    for round in 0..options.rounds {
        for group in &GROUPS {
            let names: Vec<&str> = group
                .rows
                .iter()
                .copied()
                .filter(|name| chosen.contains(name))
                .collect();
            if names.is_empty() {
                continue;
            }
            for turn in 0..systems.len() {
                // Each is first as often as the others.
                let system = systems[(turn + round) % systems.len()];
                if let Err(error) = measure(&bench, system, group, &names, &mut results) {
                    eprintln!("{system:?}, {}: {error:#}", group.name);
                    results.failed(system, group, &names, round);
                }
            }
        }
        eprintln!("round {} of {}", round + 1, options.rounds);
        // After each, so that a run that is ended early was not for nothing.
        if let Some(path) = &options.json {
            let text = serde_json::to_string_pretty(&results.json())?;
            std::fs::write(path, text)
                .with_context(|| format!("Can't write {}", path.display()))?;
        }
    }
    println!("{}", results.text());
    let bad = results.any_failed() || (options.check && results.misses() > 0);
    Ok(ExitCode::from(u8::from(bad)))
}

fn measure(
    bench: &Bench<'_>,
    system: System,
    group: &Group,
    names: &[&str],
    results: &mut Results,
) -> Result<()> {
    if names == [BOOT] {
        if let Some(seconds) = bench.boot(system)? {
            results.add(system, 1, BOOT, seconds);
        }
        return Ok(());
    }
    for cpus in group.cpus {
        for found in bench.workloads(system, group, *cpus, names, results)? {
            results.add(system, *cpus, &found.name, found.seconds);
        }
    }
    Ok(())
}
