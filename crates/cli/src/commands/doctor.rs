//! `skerry doctor`: what this machine can run virtual machines on.

use std::io::{self, Write};

use anyhow::Result;
use serde::Serialize;
use skerry_engine::confinement::{self, Report as Confinement};
use skerry_engine::hypervisor::Backend;
use skerry_hypervisor::probe::ProbeReport;

use crate::args::{DoctorArgs, Format};

#[derive(Serialize)]
struct Report {
    /// What `--hypervisor auto` takes.
    auto: Option<&'static str>,
    hypervisors: Vec<ProbeReport>,
    /// How the process of a machine is confined here.
    confinement: Confinement,
}

/// Probes every backend and prints what it found; fails when none can be used.
pub fn execute(args: &DoctorArgs) -> Result<u8> {
    // Before the probes' threads: it takes a process with one.
    let confinement = confinement::probe()?;
    let hypervisors: Vec<_> = Backend::ALL.into_iter().map(Backend::probe).collect();
    let auto = hypervisors
        .iter()
        .find(|report| report.result.is_ok())
        .map(|report| report.backend);
    let report = Report {
        auto,
        hypervisors,
        confinement,
    };
    let mut out = io::stdout().lock();
    match args.format {
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?,
        Format::Text => text(&mut out, &report)?,
    }
    Ok(u8::from(report.auto.is_none()))
}

fn text(out: &mut impl Write, report: &Report) -> io::Result<()> {
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
    writeln!(out, "\nThe process of a machine is confined by")?;
    for layer in &report.confinement.layers {
        let word = if layer.holds { "yes" } else { "no " };
        writeln!(out, "  {word} {:<18} {}", layer.layer.name(), layer.detail)?;
    }
    match report.auto {
        Some(backend) => writeln!(out, "\n--hypervisor auto uses {backend}"),
        None => writeln!(out, "\nNo hypervisor can be used"),
    }
}
