//! `skerry stats`.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::Result;
use skerry_engine::Paths;
use skerry_engine::vms::{self, Registry, Traffic, Usage, VmInfo};

use super::{mib, short, table};
use crate::args::{Format, UsageArgs};

/// How long machines are looked at for one row: the host counts time in hundredths of a second.
const SPAN: Duration = Duration::from_secs(1);

/// Prints what machines take, once or until they are gone.
pub fn execute(args: &UsageArgs) -> Result<u8> {
    let registry = Registry::open(&Paths::of_user()?)?;
    loop {
        let infos = chosen(&registry, &args.vms)?;
        let usages = vms::usage(&registry, &infos, SPAN);
        let mut out = io::stdout().lock();
        match args.format {
            Format::Json => {
                for usage in &usages {
                    writeln!(out, "{}", serde_json::to_string(usage)?)?;
                }
            }
            Format::Text => {
                if !args.no_stream && out.is_terminal() {
                    // The last one is written over: to the upper left corner, and clear (ECMA-48).
                    write!(out, "\x1b[H\x1b[2J")?;
                }
                write_table(&mut out, &usages)?;
            }
        }
        out.flush()?;
        if args.no_stream || (usages.is_empty() && !args.vms.is_empty()) {
            return Ok(0);
        }
    }
}

fn chosen(registry: &Registry, names: &[String]) -> Result<Vec<VmInfo>> {
    if names.is_empty() {
        return Ok(registry.list()?);
    }
    let found = names.iter().map(|name| registry.find(name));
    Ok(found.collect::<Result<_, _>>()?)
}

fn write_table(out: &mut impl Write, usages: &[Usage]) -> io::Result<()> {
    let header = [
        "ID",
        "NAME",
        "CPU %",
        "MEM USAGE / RAM",
        "MEM %",
        "NET I/O",
        "BLOCK I/O",
        "THREADS",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(usages.iter().map(|usage| {
        [
            short(&usage.id).to_owned(),
            usage.name.clone(),
            format!("{:.1}", usage.cpu_percent),
            format!("{} / {}", mib(usage.resident), mib(usage.memory)),
            format!(
                "{:.1}",
                100.0 * usage.resident as f64 / usage.memory.max(1) as f64
            ),
            moved(usage, |traffic| {
                [traffic.network_received, traffic.network_sent]
            }),
            moved(usage, |traffic| [traffic.block_read, traffic.block_written]),
            usage.threads.to_string(),
        ]
    }));
    table::write(out, &rows)
}

/// In and out; `-` of a machine that starts.
fn moved(usage: &Usage, of: impl Fn(&Traffic) -> [u64; 2]) -> String {
    usage.traffic.as_ref().map_or("-".to_owned(), |traffic| {
        let [from, to] = of(traffic);
        format!("{} / {}", mib(from), mib(to))
    })
}
