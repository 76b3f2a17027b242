//! `skerry run demo true`, process start to exit: from the kept start, and booted anew, in turn.
//!
//! `cargo run --release -p skerry-benches --bin bench-run -- --runs 100`

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use clap::Parser;
use skerry_benches::{median, skerry, timed};

/// Time of a run whose image has been started before, beside one that boots
#[derive(Parser)]
struct Options {
    /// Runs from the kept start; a tenth as many boot
    #[arg(long, default_value_t = 100)]
    runs: usize,
    /// What Skerry runs on
    #[arg(long, default_value = "auto")]
    hypervisor: String,
}

fn command(options: &Options, data: &Path, fresh: bool) -> Result<Command> {
    let mut command = Command::new(skerry()?);
    command.args(["run", "--hypervisor", &options.hypervisor]);
    if fresh {
        command.arg("--fresh");
    }
    command.args(["demo", "true"]).env("XDG_DATA_HOME", data);
    Ok(command)
}

fn main() -> Result<()> {
    let options = Options::parse();
    let data = tempfile::tempdir()?;
    // Converts the image, and keeps the start.
    timed(command(&options, data.path(), false)?)?;
    let (mut kept, mut fresh) = (Vec::new(), Vec::new());
    for run in 0..options.runs {
        kept.push(
            timed(command(&options, data.path(), false)?)?
                .1
                .as_secs_f64(),
        );
        if run % 10 == 0 {
            fresh.push(
                timed(command(&options, data.path(), true)?)?
                    .1
                    .as_secs_f64(),
            );
        }
    }
    println!(
        "skerry run demo true, process start to exit, on {}",
        options.hypervisor
    );
    println!(
        "kept start: median of {} runs {:.1} ms",
        kept.len(),
        1e3 * median(&mut kept)
    );
    println!(
        "booted:     median of {} runs {:.1} ms",
        fresh.len(),
        1e3 * median(&mut fresh)
    );
    Ok(())
}
