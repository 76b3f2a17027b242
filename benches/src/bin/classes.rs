//! Cost by class of instruction: one static program natively, under QEMU's TCG and under Skerry.
//!
//! `cargo run --release -p skerry-benches --bin bench-classes -- --runs 3`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};
use clap::Parser;
use skerry_benches::{
    QEMU, median, qemu_boot, qemu_version, skerry_boot, static_guest, timed, write_initrd,
};

/// Cost by class of instruction, beside the host and QEMU's TCG
#[derive(Parser)]
struct Options {
    /// Runs of each
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// The QEMU to compare with
    #[arg(long, default_value = QEMU, value_name = "PROGRAM")]
    qemu: PathBuf,
    /// What Skerry runs on
    #[arg(long, default_value = "soft")]
    hypervisor: String,
}

const COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet";

type Costs = BTreeMap<String, Vec<f64>>;

fn collect(text: &str, costs: &mut Costs, order: &mut Vec<String>) -> Result<()> {
    if !text.contains("CLASSES DONE") {
        bail!("The guest program did not come to its end:\n{text}");
    }
    for line in text.lines() {
        let mut words = line.trim().split(' ');
        if words.next() != Some("CLASS") {
            continue;
        }
        if let (Some(name), Some(Ok(cost))) = (words.next(), words.next().map(str::parse)) {
            costs.entry(name.to_owned()).or_default().push(cost);
            if !order.iter().any(|known| known == name) {
                order.push(name.to_owned());
            }
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let options = Options::parse();
    let folder = tempfile::tempdir()?;
    let guest = static_guest("classes-guest")?;
    let initrd = folder.path().join("initrd");
    write_initrd(&std::fs::read(&guest)?, &initrd)?;
    let version = qemu_version(&options.qemu)?;
    let mut order = Vec::new();
    let mut costs: [Costs; 3] = Default::default();
    for _ in 0..options.runs {
        let commands = [
            Command::new(&guest),
            qemu_boot(&options.qemu, &initrd, COMMAND_LINE),
            skerry_boot(&initrd, COMMAND_LINE, &options.hypervisor)?,
        ];
        for (command, costs) in commands.into_iter().zip(&mut costs) {
            collect(&timed(command)?.0, costs, &mut order)?;
        }
    }
    println!(
        "nanoseconds an operation, medians of {} runs, in turn",
        options.runs
    );
    println!("peer: {version}");
    println!(
        "{:<15} {:>12} {:>12} {:>12} {:>12} {:>12}",
        "class", "native", "TCG", "skerry", "skerry/TCG", "skerry/native"
    );
    for name in order {
        let [native, tcg, ours] = std::array::from_fn(|n| {
            median(costs[n].get_mut(&name).map_or(&mut [][..], |values| values))
        });
        println!(
            "{name:<15} {native:>12.2} {tcg:>12.2} {ours:>12.2} {:>12.2} {:>12.2}",
            ours / tcg,
            ours / native
        );
    }
    Ok(())
}
