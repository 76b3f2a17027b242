//! `version`, `completion`, `man`: what is made from the program itself.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use clap::CommandFactory;
use serde::Serialize;

use crate::args::{Cli, CompletionArgs, Format, ManArgs, VersionArgs};

#[derive(Serialize)]
struct Version {
    version: &'static str,
    backends: Vec<&'static str>,
}

/// Prints the version.
pub fn version(args: &VersionArgs) -> Result<u8> {
    let version = Version {
        version: env!("CARGO_PKG_VERSION"),
        backends: skerry_engine::hypervisor::Backend::ALL
            .iter()
            .map(|backend| backend.name())
            .collect(),
    };
    let mut out = io::stdout().lock();
    match args.format {
        Format::Text => writeln!(
            out,
            "skerry {} ({})",
            version.version,
            version.backends.join(", ")
        )?,
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&version)?)?,
    }
    Ok(0)
}

/// Prints a completion script.
pub fn completion(args: &CompletionArgs) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "skerry", &mut script);
    io::stdout().lock().write_all(&script)?;
    Ok(0)
}

/// Writes a page for skerry and one for each verb, and for its verbs.
pub fn man(args: &ManArgs) -> Result<u8> {
    fs::create_dir_all(&args.dir)
        .with_context(|| format!("Can't make the folder {}", args.dir.display()))?;
    let mut command = Cli::command();
    command.build();
    pages(&args.dir, "skerry", &command)?;
    Ok(0)
}

fn pages(dir: &Path, name: &str, command: &clap::Command) -> Result<()> {
    page(dir, name, command.clone())?;
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        pages(dir, &format!("{name}-{}", verb.get_name()), verb)?;
    }
    Ok(())
}

fn page(dir: &Path, name: &str, command: clap::Command) -> Result<()> {
    let path = dir.join(format!("{name}.1"));
    let mut text = Vec::new();
    clap_mangen::Man::new(command)
        .title(name)
        .render(&mut text)?;
    fs::write(&path, text).with_context(|| format!("Can't write {}", path.display()))
}
