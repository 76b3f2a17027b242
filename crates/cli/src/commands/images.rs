//! `skerry images` and `skerry rmi`.

use std::io::{self, Write};

use anyhow::Result;
use serde::Serialize;
use skerry_engine::{Image, Name, Paths, Removed};

use super::mib;
use crate::args::{Format, ImagesArgs, RmiArgs};

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
fn familiar(name: &str) -> String {
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
