//! `skerry system`.

use std::io::{self, Write};

use anyhow::Result;
use skerry_engine::Paths;
use skerry_engine::check::{Finding, Findings, check};

use crate::args::{CheckArgs, Format, SystemArgs, SystemVerb};
use crate::output;

/// Does what the verb says.
pub fn execute(args: &SystemArgs) -> Result<u8> {
    match &args.verb {
        SystemVerb::Check(args) => run_check(args),
    }
}

/// Fails when something isn't whole, and hasn't been removed.
fn run_check(args: &CheckArgs) -> Result<u8> {
    let findings = check(&Paths::of_user()?, args.repair)?;
    let mut out = io::stdout().lock();
    match args.format {
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&findings)?)?,
        Format::Text => text(&mut out, &findings)?,
    }
    Ok(u8::from(!findings.is_clean()))
}

fn text(out: &mut impl Write, findings: &Findings) -> io::Result<()> {
    let Findings {
        images,
        snapshots,
        vms,
        damaged,
    } = findings;
    for Finding {
        kind,
        name,
        problem,
        repaired,
    } in damaged
    {
        let removed = if *repaired { " (removed)" } else { "" };
        writeln!(out, "{kind} {name}: {problem}{removed}")?;
    }
    writeln!(
        out,
        "{images} images, {snapshots} snapshots, {vms} virtual machines: {}",
        match damaged.len() {
            0 => "all are whole".to_owned(),
            count => format!("{count} damaged"),
        }
    )?;
    if !findings.is_clean() {
        output::note("skerry system check --repair removes what is damaged");
    }
    Ok(())
}
