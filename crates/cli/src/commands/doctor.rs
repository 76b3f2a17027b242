//! `skerry doctor`: what this machine can run virtual machines on.

use std::io::{self, Write};

use anyhow::Result;
use skerry_engine::hypervisor::{Diagnosis, diagnose};
use skerry_hypervisor::probe::ProbeReport;

use crate::args::{DoctorArgs, Format};

/// Probes every backend and prints what it found; fails when none can be used.
pub fn execute(args: &DoctorArgs) -> Result<u8> {
    let report = diagnose();
    let mut out = io::stdout().lock();
    match args.format {
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?,
        Format::Text => text(&mut out, &report)?,
    }
    Ok(u8::from(report.auto.is_none()))
}

fn text(out: &mut impl Write, report: &Diagnosis) -> io::Result<()> {
    for ProbeReport { backend, result } in &report.hypervisors {
        match result {
            Ok(found) => {
                writeln!(out, "{backend:<6} usable      {}", found.description)?;
                let speed = found.measured_mips.unwrap_or_default();
                writeln!(
                    out,
                    "       {speed:.0} million instructions/s, up to {} CPUs",
                    found.max_vcpus
                )?;
            }
            Err(unusable) => {
                writeln!(out, "{backend:<6} not usable  {}", unusable.reason)?;
                writeln!(out, "       {}", unusable.remedy)?;
            }
        }
    }
    if let Some(confinement) = &report.confinement {
        writeln!(out, "\nThe process of a machine is confined by")?;
        for layer in &confinement.layers {
            let word = if layer.holds { "yes" } else { "no " };
            writeln!(out, "  {word} {:<18} {}", layer.layer.name(), layer.detail)?;
        }
    }
    writeln!(out, "\nWhat a machine takes is bounded by")?;
    for limit in &report.resources {
        let word = if limit.holds { "yes" } else { "no " };
        writeln!(out, "  {word} {:<18} {}", limit.name, limit.detail)?;
    }
    let word = if report.tap.usable { "yes" } else { "no " };
    writeln!(out, "\nA machine's network can be behind")?;
    writeln!(out, "  {word} {}", report.tap.detail)?;
    match report.auto {
        Some(backend) => writeln!(out, "\n--hypervisor auto uses {backend}"),
        None => writeln!(out, "\nNo hypervisor can be used"),
    }
}
