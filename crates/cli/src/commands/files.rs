//! `skerry cp`, `top`.

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use skerry_engine::vms::{self, CopyOptions};

use super::table;
use super::vms::registry;
use crate::args::{CpArgs, Format, TopArgs};
use crate::output;

/// Lists the processes of a machine.
pub fn top(args: &TopArgs) -> Result<u8> {
    let processes = vms::processes(&registry()?, &args.vm)?;
    let mut out = io::stdout().lock();
    if args.format == Format::Json {
        writeln!(out, "{}", serde_json::to_string_pretty(&processes)?)?;
        return Ok(0);
    }
    let header = [
        "UID", "PID", "PPID", "STATE", "MEMORY", "AGE", "TIME", "CMD",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(processes.iter().map(|process| {
        [
            process.user.to_string(),
            process.pid.to_string(),
            process.parent.to_string(),
            process.state.to_string(),
            format!("{}K", process.memory / 1024),
            clock(process.age_ms),
            clock(process.cpu_ms),
            process.command.clone(),
        ]
    }));
    table::write(&mut out, &rows)?;
    Ok(0)
}

/// Hours, minutes and seconds.
fn clock(ms: u64) -> String {
    let seconds = Duration::from_millis(ms).as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}", seconds % 60)
}

/// One side of a copy.
enum Side<'a> {
    Guest(&'a str, &'a str),
    Host(&'a Path),
    Stream,
}

impl<'a> Side<'a> {
    /// As docker has it: what begins with a slash or a dot is a path of this machine.
    fn parse(text: &'a str) -> Self {
        if text == "-" {
            return Self::Stream;
        }
        match text.split_once(':') {
            Some((vm, path)) if !vm.is_empty() && !text.starts_with(['/', '.']) => {
                Self::Guest(vm, path)
            }
            _ => Self::Host(Path::new(text)),
        }
    }
}

/// Copies files into a machine or out of it.
pub fn copy(args: &CpArgs) -> Result<u8> {
    let registry = registry()?;
    let options = CopyOptions {
        keep_owner: args.archive,
        follow: args.follow_link,
    };
    match (Side::parse(&args.from), Side::parse(&args.to)) {
        (Side::Guest(vm, path), Side::Host(to)) => {
            let left_out = vms::copy_out(&registry, vm, path, to, options)?;
            for path in left_out {
                output::note(&format!(
                    "{} is a device or a pipe, and not copied",
                    path.display()
                ));
            }
        }
        (Side::Guest(vm, path), Side::Stream) => {
            vms::archive_out(&registry, vm, path, options, Box::new(io::stdout()))?;
        }
        (Side::Host(from), Side::Guest(vm, path)) => {
            vms::copy_in(&registry, vm, from, path, options)?;
        }
        (Side::Stream, Side::Guest(vm, path)) => {
            vms::archive_in(&registry, vm, path, options, Box::new(io::stdin()))?;
        }
        _ => bail!("One of both has to be in a virtual machine, VM:PATH, and the other one here"),
    }
    Ok(0)
}
