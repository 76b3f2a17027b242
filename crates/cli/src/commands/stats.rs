//! `--stats`, and `skerry inspect`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Write};

use anyhow::Result;
use skerry_engine::vms::{self, Registry};
use skerry_engine::{Paths, ProcessorStatistics, SoftMode, Statistics};

use super::mib;
use crate::args::{Format, InspectArgs};

/// Says on stderr what a machine's processors did. In JSON that is one line, the last.
pub fn print(statistics: &Statistics, format: Format) -> Result<()> {
    let text = match format {
        Format::Text => text(statistics),
        Format::Json => serde_json::to_string(statistics)? + "\n",
    };
    // Where stderr is closed there is nobody to tell.
    let _ = io::stderr().write_all(text.as_bytes());
    Ok(())
}

/// Prints all that is known of a machine.
pub fn inspect(args: &InspectArgs) -> Result<u8> {
    let registry = Registry::open(&Paths::of_user()?)?;
    let found = vms::inspect(&registry, &args.vm, args.sample.0)?;
    writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&found)?)?;
    Ok(0)
}

fn text(statistics: &Statistics) -> String {
    let mut text = format!("skerry: ran on {}", statistics.hypervisor);
    if let Some(soft) = &statistics.soft {
        let mode = match soft.mode.unwrap_or_default() {
            SoftMode::Interpreter => "interpreter",
            SoftMode::Jit => "jit",
            SoftMode::JitStress => "jit-stress",
        };
        let memory = mib(soft.code_memory.unwrap_or_default());
        let hardened = if soft.hardened { ", hardened" } else { "" };
        // Writing to a string can't fail.
        let _ = write!(
            text,
            " ({mode}{hardened}, {memory} for each processor's code)"
        );
    }
    match &statistics.processors {
        Some(processors) => {
            text.push('\n');
            table(&mut text, processors);
        }
        None => text.push_str(", which counts nothing\n"),
    }
    text
}

/// A row for each number, a column for each processor.
fn table(text: &mut String, processors: &[ProcessorStatistics]) {
    let mut rows = Vec::new();
    let header = |processor: &ProcessorStatistics| format!("cpu {}", processor.id);
    rows.push((String::new(), processors.iter().map(header).collect()));
    let times = || processors.iter().filter_map(|one| one.time.as_ref());
    let activities: BTreeSet<&String> = times().flat_map(|time| time.shares.keys()).collect();
    for activity in activities {
        let share = |processor: &ProcessorStatistics| {
            let time = processor.time.as_ref();
            let share = time.and_then(|time| time.shares.get(activity));
            share.map_or_else(String::new, |share| format!("{:.1}%", share * 100.0))
        };
        let cells: Vec<_> = processors.iter().map(share).collect();
        rows.push((format!("time: {activity}"), cells));
    }
    let names: BTreeSet<&String> = processors
        .iter()
        .flat_map(|one| one.counters.keys())
        .collect();
    for name in names {
        let count = |processor: &ProcessorStatistics| {
            let count = processor.counters.get(name);
            count.map_or_else(String::new, u64::to_string)
        };
        rows.push((name.clone(), processors.iter().map(count).collect()));
    }
    let widest = |width: usize, cell: &String| width.max(cell.len());
    let names = rows.iter().map(|row| &row.0).fold(0, widest);
    let cells = rows.iter().flat_map(|row| &row.1).fold(0, widest);
    for (name, values) in &rows {
        let _ = write!(text, "  {name:<names$}");
        for value in values {
            let _ = write!(text, "  {value:>cells$}");
        }
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use skerry_engine::hypervisor::Backend;
    use skerry_engine::{SoftOptions, TimeShares};

    use super::*;

    #[test]
    fn people_see_a_table() {
        let processor = |id: u32, entries: u64| ProcessorStatistics {
            id,
            counters: [("entries".to_owned(), entries), ("flushes".to_owned(), 0)].into(),
            time: (id == 0).then(|| TimeShares {
                samples: 4,
                shares: [("compiled".to_owned(), 0.75), ("outside".to_owned(), 0.25)].into(),
            }),
        };
        let statistics = Statistics {
            hypervisor: Backend::Soft,
            soft: Some(SoftOptions {
                mode: Some(SoftMode::Jit),
                code_memory: Some(64 << 20),
                hardened: true,
                perf_map: false,
            }),
            processors: Some(vec![processor(0, 123_456), processor(1, 7)]),
        };
        assert_eq!(
            text(&statistics),
            "skerry: ran on soft (jit, hardened, 64.0 MiB for each processor's code)\n\
             \x20                  cpu 0   cpu 1\n\
             \x20 time: compiled   75.0%        \n\
             \x20 time: outside    25.0%        \n\
             \x20 entries         123456       7\n\
             \x20 flushes              0       0\n"
        );
        let kvm = Statistics {
            hypervisor: Backend::Kvm,
            soft: None,
            processors: None,
        };
        assert_eq!(text(&kvm), "skerry: ran on kvm, which counts nothing\n");
    }
}
