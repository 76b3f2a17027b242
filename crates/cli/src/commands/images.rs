//! `skerry images`, `skerry rmi` and `skerry image`.

use std::io::{self, Write};

use anyhow::Result;
use serde_json::Value;
use skerry_engine::images::{self, ImageDetails, NamedImage};
use skerry_engine::{Paths, Removed};

use super::mib;
use crate::args::{Format, ImageArgs, ImageHistoryArgs, ImageVerb, ImagesArgs, RmiArgs};

/// Lists the store.
pub fn list(args: &ImagesArgs) -> Result<u8> {
    let store = skerry_engine::images::open(&Paths::of_user()?)?;
    let listing = store.list()?;
    for damaged in listing.damaged {
        crate::output::error(&damaged.into());
    }
    let rows: Vec<_> = listing.images.iter().flat_map(NamedImage::of).collect();
    let mut out = io::stdout().lock();
    if args.quiet {
        for row in &rows {
            writeln!(out, "{}", row.digest)?;
        }
        return Ok(0);
    }
    match args.format {
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?,
        Format::Text => {
            let width = rows
                .iter()
                .map(|row| row.name.len())
                .max()
                .unwrap_or(0)
                .max(4);
            writeln!(out, "{:<width$}  {:<19}  SIZE", "NAME", "DIGEST")?;
            for row in &rows {
                let short: String = row.digest.chars().take(19).collect();
                writeln!(out, "{:<width$}  {short}  {}", row.name, mib(row.size))?;
            }
        }
    }
    Ok(0)
}

/// Removes images; goes on after one that can't be removed.
pub fn remove(args: &RmiArgs) -> Result<u8> {
    let paths = Paths::of_user()?;
    let mut status = 0;
    for name in &args.images {
        match skerry_engine::images::remove(&paths, name, args.force) {
            Ok(Removed::Name(name)) => writeln!(io::stdout(), "{name}")?,
            Ok(Removed::Image(digest)) => writeln!(io::stdout(), "{digest}")?,
            Err(error) => {
                crate::output::error(&error.into());
                status = crate::status::FAILED;
            }
        }
    }
    Ok(status)
}

/// `skerry image`.
pub fn execute(args: &ImageArgs) -> Result<u8> {
    match &args.verb {
        ImageVerb::Inspect(args) => inspect(&args.images),
        ImageVerb::History(args) => history(args),
        ImageVerb::Prune => {
            for digest in skerry_engine::images::prune(&Paths::of_user()?)? {
                writeln!(io::stdout(), "{digest}")?;
            }
            Ok(0)
        }
    }
}

fn inspect(names: &[String]) -> Result<u8> {
    let paths = Paths::of_user()?;
    let found = names.iter().map(|name| images::inspect(&paths, name));
    let all = found.collect::<Result<Vec<ImageDetails>, _>>()?;
    writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&all)?)?;
    Ok(0)
}

/// How much of a command fits beside the rest.
const COMMAND_WIDTH: usize = 60;

fn history(args: &ImageHistoryArgs) -> Result<u8> {
    let store = skerry_engine::images::open(&Paths::of_user()?)?;
    let document = store.configuration(&args.image)?.unwrap_or_default();
    let steps = document.get("history").and_then(Value::as_array);
    let steps: Vec<_> = steps.into_iter().flatten().rev().collect();
    let mut out = io::stdout().lock();
    if args.format == Format::Json {
        writeln!(out, "{}", serde_json::to_string_pretty(&steps)?)?;
        return Ok(0);
    }
    writeln!(out, "{:<20}  {:<5}  CREATED BY", "CREATED", "LAYER")?;
    for step in steps {
        let text = |key: &str| -> String {
            let text = step.get(key).and_then(Value::as_str).unwrap_or_default();
            // It goes to a terminal, and others have written it.
            text.chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect()
        };
        let created: String = text("created").chars().take(20).collect();
        let empty = step.get("empty_layer").and_then(Value::as_bool);
        let layer = if empty == Some(true) { "no" } else { "yes" };
        let mut command = text("created_by");
        if !args.no_trunc && command.chars().count() > COMMAND_WIDTH {
            command = command
                .chars()
                .take(COMMAND_WIDTH - 1)
                .chain(['…'])
                .collect();
        }
        writeln!(out, "{created:<20}  {layer:<5}  {command}")?;
    }
    Ok(0)
}
