//! `skerry images`, `skerry rmi` and `skerry image`.

use std::io::{self, Write};

use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};
use skerry_engine::{Image, Name, Paths, Removed};

use super::mib;
use crate::args::{Format, ImageArgs, ImageHistoryArgs, ImageVerb, ImagesArgs, RmiArgs};

#[derive(Serialize)]
struct Row {
    name: String,
    digest: String,
    size: u64,
}

/// Lists the store.
pub fn list(args: &ImagesArgs) -> Result<u8> {
    let store = skerry_engine::images::open(&Paths::of_user()?)?;
    let listing = store.list()?;
    for damaged in listing.damaged {
        crate::output::error(&damaged.into());
    }
    let rows: Vec<Row> = listing.images.iter().flat_map(rows_of).collect();
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

/// A row for each of an image's names.
fn rows_of(image: &Image) -> Vec<Row> {
    let row = |name: &str| Row {
        name: name.to_owned(),
        digest: image.digest.to_string(),
        size: image.size,
    };
    if image.names.is_empty() {
        return vec![row("<none>")];
    }
    image
        .names
        .iter()
        .map(|name| row(&familiar(name)))
        .collect()
}

/// A name of a registry's as people write it; others as they are.
pub fn familiar(name: &str) -> String {
    match name.parse::<Name>() {
        Ok(parsed) if parsed.to_string() == name => parsed.familiar(),
        _ => name.to_owned(),
    }
}

/// Removes images; goes on after one that can't be removed.
pub fn remove(args: &RmiArgs) -> Result<u8> {
    let paths = Paths::of_user()?;
    let mut status = 0;
    for name in &args.images {
        match skerry_engine::images::remove(&paths, name) {
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
    let store = skerry_engine::images::open(&Paths::of_user()?)?;
    let mut all = Vec::new();
    for name in names {
        let image = store.get(name)?;
        let (document, manifest) = (store.configuration(name)?, store.manifest_of(name)?);
        let of_document = |key: &str| document.as_ref().and_then(|d| d.get(key)).cloned();
        let (digest, manifest) = manifest.unzip();
        let names: Vec<_> = image.names.iter().map(|name| familiar(name)).collect();
        all.push(json!({
            "digest": image.digest.to_string(),
            "names": names,
            "manifest": digest.map(|digest| digest.to_string()),
            "layers": manifest.as_ref().and_then(|manifest| manifest.get("layers")),
            "created": of_document("created"),
            "imported": crate::dates::rfc3339(image.imported),
            "os": "linux",
            "architecture": "amd64",
            "config": image.config,
            "rootfs": {
                "path": image.rootfs,
                "size": image.size,
                "digest": image.rootfs_digest().to_string(),
            },
        }));
    }
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
