//! Times the operations of `hyperlight-host`'s sandboxes that Skerry's function sandboxes are measured by.
//!
//! Prints one JSON object of medians in microseconds, with the number of samples behind each. Every
//! sample's result is checked: a call that fails or gives a wrong answer ends the run with an error.

mod sandboxes;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use serde_json::{Map, Value, json};

use sandboxes::Peer;

/// Time hyperlight-host's sandboxes and print medians as JSON
#[derive(Parser)]
struct Options {
    /// The ELF file of sandbox-peer-guest
    guest: PathBuf,
    /// Only this row; may be given several times
    #[arg(long, value_enum)]
    only: Vec<Row>,
    /// So many samples of each row, in place of its own number
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    samples: Option<u32>,
}

/// One operation that is timed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Row {
    /// A sandbox from the guest's ELF image, until it is ready for a call
    CreateElf,
    /// A sandbox from a snapshot in memory
    CreateSnapshot,
    /// A call with two integers in a warm sandbox
    Call,
    /// The same, where the guest calls the host once
    HostCall,
    /// Restore after 16 dirtied pages, with a heap of 1 MiB
    #[value(name = "restore-1mib")]
    Restore1Mib,
    /// Restore after 16 dirtied pages, with a heap of 1 GiB
    #[value(name = "restore-1gib")]
    Restore1Gib,
    /// From the kill of a spinning guest to the end of its call
    Kill,
}

impl Row {
    /// The row's name in the report.
    fn key(self) -> &'static str {
        match self {
            Self::CreateElf => "create_elf",
            Self::CreateSnapshot => "create_snapshot",
            Self::Call => "call",
            Self::HostCall => "host_call",
            Self::Restore1Mib => "restore_1mib",
            Self::Restore1Gib => "restore_1gib",
            Self::Kill => "kill",
        }
    }

    /// How many samples its median is taken of, unless told otherwise.
    fn samples(self) -> u32 {
        match self {
            Self::Call | Self::HostCall => 500,
            Self::CreateElf | Self::CreateSnapshot | Self::Restore1Mib | Self::Kill => 200,
            Self::Restore1Gib => 100,
        }
    }

    fn measure(self, peer: &Peer, samples: u32) -> Result<Vec<Duration>> {
        match self {
            Self::CreateElf => peer.create_elf(samples),
            Self::CreateSnapshot => peer.create_snapshot(samples),
            Self::Call => peer.call("Add", samples),
            Self::HostCall => peer.call("AddByHost", samples),
            Self::Restore1Mib => peer.restore(1 << 20, samples),
            Self::Restore1Gib => peer.restore(1 << 30, samples),
            Self::Kill => peer.kill(samples),
        }
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let guest = std::fs::read(&options.guest)
        .with_context(|| format!("Cannot read the guest {}", options.guest.display()))?;
    let peer = Peer::new(guest);

    let mut report = Map::new();
    let mut counts = Map::new();
    report.insert("version".into(), json!(hyperlight_version()?));
    for &row in Row::value_variants() {
        if !options.only.is_empty() && !options.only.contains(&row) {
            continue;
        }
        let samples = options.samples.unwrap_or_else(|| row.samples());
        let times = row
            .measure(&peer, samples)
            .with_context(|| format!("Cannot measure {}", row.key()))?;
        counts.insert(row.key().into(), json!(times.len()));
        let median = median_us(times).context("A row without samples")?;
        report.insert(format!("{}_us", row.key()), json!(median));
    }
    report.insert("samples".into(), Value::Object(counts));
    println!("{}", json!({ "hyperlight": report }));
    Ok(())
}

/// The median in microseconds, to a hundredth: the upper of the middle two where the number is even.
fn median_us(mut times: Vec<Duration>) -> Option<f64> {
    times.sort_unstable();
    let median = times.get(times.len() / 2)?;
    Some((median.as_secs_f64() * 1e8).round() / 100.0)
}

/// The version of hyperlight-host that was built in, which the crate itself does not tell.
fn hyperlight_version() -> Result<&'static str> {
    include_str!("../../Cargo.lock")
        .split("[[package]]")
        .find(|package| package.contains("name = \"hyperlight-host\""))
        .and_then(|package| package.split("version = \"").nth(1))
        .and_then(|rest| rest.split('"').next())
        .context("Cargo.lock does not name hyperlight-host")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_ignores_order_and_outliers() {
        let times = [900_000, 3, 1, 2, 4].map(Duration::from_micros);
        assert_eq!(median_us(times.to_vec()), Some(3.0));
        assert_eq!(median_us(Vec::new()), None);
    }

    #[test]
    fn the_version_is_the_pinned_one() {
        assert_eq!(hyperlight_version().unwrap(), "0.18.0");
    }
}
