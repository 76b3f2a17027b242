//! Boots the same kernel and initrd on Skerry and on QEMU's TCG in turn, process start to power-off.
//!
//! `cargo run --release -p skerry-benches --bin bench-boot -- --runs 10`

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Parser;
use skerry_benches::{QEMU, median, qemu_boot, qemu_version, skerry_boot, timed};

/// Boot time beside QEMU's TCG
#[derive(Parser)]
struct Options {
    /// Boots of each
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// An initrd that prints BOOT-OK and powers off [default: one with busybox, made here]
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// The QEMU to compare with
    #[arg(long, default_value = QEMU, value_name = "PROGRAM")]
    qemu: PathBuf,
    /// What Skerry runs on
    #[arg(long, default_value = "soft")]
    hypervisor: String,
}

const COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet";

fn main() -> Result<()> {
    let options = Options::parse();
    let folder = tempfile::tempdir()?;
    let initrd = match options.initrd {
        Some(path) => path,
        None => {
            let path = folder.path().join("initrd");
            skerry_benches::busybox_initrd(&path)?;
            path
        }
    };
    let version = qemu_version(&options.qemu)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 0..=options.runs {
        let (text, a) = timed(skerry_boot(&initrd, COMMAND_LINE, &options.hypervisor)?)?;
        if !text.contains("BOOT-OK") {
            bail!("Skerry did not get to BOOT-OK:\n{text}");
        }
        let (text, b) = timed(qemu_boot(&options.qemu, &initrd, COMMAND_LINE))?;
        if !text.contains("BOOT-OK") {
            bail!("QEMU did not get to BOOT-OK:\n{text}");
        }
        // The first pair warms the page cache.
        if run > 0 {
            ours.push(a.as_secs_f64());
            theirs.push(b.as_secs_f64());
        }
    }
    let mut ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a / b).collect();
    println!(
        "boot to a shell script and power off, {} runs each, in turn",
        options.runs
    );
    println!(
        "skerry ({}): median {:.3} s",
        options.hypervisor,
        median(&mut ours)
    );
    println!(
        "{version} (TCG, microvm): median {:.3} s",
        median(&mut theirs)
    );
    println!("ratio, median of pairs: {:.2}", median(&mut ratios));
    Ok(())
}
