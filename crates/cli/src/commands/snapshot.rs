//! `skerry snapshot` and its verbs.

use std::io::{self, Write};
use std::time::SystemTime;

use anyhow::Result;
use skerry_engine::snapshots::{
    self, Removed, START_PREFIX, SnapshotDetails, SnapshotEntry, SnapshotInfo,
};
use skerry_engine::vms::{self, Registry};
use skerry_engine::{Paths, dates};

use super::{SHORT, mib, short};
use crate::args::{
    Format, SnapshotArgs, SnapshotCreateArgs, SnapshotExportArgs, SnapshotImportArgs,
    SnapshotInspectArgs, SnapshotLsArgs, SnapshotPullArgs, SnapshotPushArgs, SnapshotRmArgs,
    SnapshotVerb,
};
use crate::progress::Bars;
use crate::{output, status};

/// Does what the verb says.
pub fn execute(args: &SnapshotArgs) -> Result<u8> {
    let paths = Paths::of_user()?;
    match &args.verb {
        SnapshotVerb::Create(args) => create(args),
        SnapshotVerb::Ls(args) => list(&paths, args),
        SnapshotVerb::Inspect(args) => inspect(&paths, args),
        SnapshotVerb::Rm(args) => remove(&paths, args),
        SnapshotVerb::Export(args) => export(&paths, args),
        SnapshotVerb::Import(args) => import(&paths, args),
        SnapshotVerb::Push(args) => push(&paths, args),
        SnapshotVerb::Pull(args) => pull(&paths, args),
        SnapshotVerb::Prune => prune(&paths),
    }
}

fn list(paths: &Paths, args: &SnapshotLsArgs) -> Result<u8> {
    let listing = snapshots::list(paths)?;
    for damaged in listing.damaged {
        output::error(&damaged.into());
    }
    let mut out = io::stdout().lock();
    if args.quiet {
        for info in &listing.snapshots {
            writeln!(out, "{}", info.id)?;
        }
        return Ok(0);
    }
    match args.format {
        Format::Json => {
            let entries: Vec<_> = listing
                .snapshots
                .into_iter()
                .map(SnapshotEntry::of)
                .collect();
            writeln!(out, "{}", serde_json::to_string_pretty(&entries)?)?;
        }
        Format::Text => table(&mut out, &listing.snapshots)?,
    }
    Ok(0)
}

/// A row for each of a snapshot's names.
fn table(out: &mut impl Write, snapshots: &[SnapshotInfo]) -> io::Result<()> {
    let now = SystemTime::now();
    let mut rows = vec![["ID", "NAME", "MEMORY", "SIZE", "CREATED"].map(str::to_owned)];
    for info in snapshots {
        let names = match &info.names[..] {
            [] => vec!["<none>".to_owned()],
            names => names.iter().map(|name| shown(name)).collect(),
        };
        let created = match now.duration_since(info.created) {
            Ok(age) => dates::ago(age),
            Err(_) => "in the future".to_owned(),
        };
        for name in names {
            rows.push([
                short(&info.id.hex()).to_owned(),
                name,
                mib(info.memory_size),
                mib(info.size),
                created.clone(),
            ]);
        }
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let [name, memory, size] = [1, 2, 3].map(|column| width(column).unwrap_or(0));
    for [a, b, c, d, e] in &rows {
        writeln!(
            out,
            "{a:<SHORT$}  {b:<name$}  {c:<memory$}  {d:<size$}  {e}"
        )?;
    }
    Ok(())
}

/// A name as it is shown: nobody reads the 64 digits of a kept start's.
fn shown(name: &str) -> String {
    match name.strip_prefix(START_PREFIX) {
        Some(digits) if digits.chars().count() > SHORT => {
            format!("{START_PREFIX}{}…", short(digits))
        }
        _ => name.to_owned(),
    }
}

fn inspect(paths: &Paths, args: &SnapshotInspectArgs) -> Result<u8> {
    let inspection = SnapshotDetails::of(snapshots::inspect(paths, &args.name)?);
    let text = serde_json::to_string_pretty(&inspection)?;
    writeln!(io::stdout(), "{text}")?;
    Ok(0)
}

/// Removes snapshots; goes on after one that can't be removed.
fn remove(paths: &Paths, args: &SnapshotRmArgs) -> Result<u8> {
    let mut status = 0;
    for name in &args.names {
        match snapshots::remove(paths, name) {
            Ok(Removed::Name(name)) => writeln!(io::stdout(), "{name}")?,
            Ok(Removed::Snapshot(id)) => writeln!(io::stdout(), "{id}")?,
            Err(error) => {
                output::error(&error.into());
                status = status::FAILED;
            }
        }
    }
    Ok(status)
}

fn export(paths: &Paths, args: &SnapshotExportArgs) -> Result<u8> {
    if let Some(parent) = snapshots::export(paths, &args.name, &args.target, args.with_parents)? {
        output::note(&format!(
            "{} is a difference to {parent}, which is needed with it: use --with-parents, or export that too",
            args.name
        ));
    }
    Ok(0)
}

fn import(paths: &Paths, args: &SnapshotImportArgs) -> Result<u8> {
    let id = snapshots::import(paths, &args.source, args.name.as_deref())?;
    writeln!(io::stdout(), "{id}")?;
    Ok(0)
}

fn push(paths: &Paths, args: &SnapshotPushArgs) -> Result<u8> {
    let target = &args.target;
    let mut bars = Bars::new(args.quiet);
    let mut show = |progress| bars.show(target, progress);
    let pushed = snapshots::push(paths, &args.name, target, &mut show)?;
    drop(bars);
    let (tag, digest) = (target.tag().unwrap_or_default(), pushed.digest);
    match args.quiet {
        true => writeln!(io::stdout(), "{target}")?,
        false => writeln!(
            io::stdout(),
            "{tag}: digest: {digest} size: {}",
            pushed.size
        )?,
    }
    Ok(0)
}

fn pull(paths: &Paths, args: &SnapshotPullArgs) -> Result<u8> {
    let source = &args.source;
    let mut bars = Bars::new(args.quiet);
    let mut show = |progress| bars.show(source, progress);
    let id = snapshots::pull(paths, source, args.name.as_deref(), &mut show)?;
    drop(bars);
    writeln!(io::stdout(), "{id}")?;
    Ok(0)
}

fn prune(paths: &Paths) -> Result<u8> {
    let pruned = snapshots::prune(paths)?;
    let mut out = io::stdout().lock();
    let mut freed = 0u64;
    for info in &pruned.removed {
        freed = freed.saturating_add(info.size);
        writeln!(out, "{}", info.id)?;
    }
    let starts = counted(pruned.removed.len(), "kept start");
    output::note(&format!("freed {} by removing {starts}", mib(freed)));
    if pruned.leftovers > 0 {
        let leftovers = counted(pruned.leftovers, "leftover");
        output::note(&format!("removed {leftovers} of killed processes"));
    }
    let status = match pruned.failed.is_empty() {
        true => 0,
        false => status::FAILED,
    };
    for error in pruned.failed {
        output::error(&error.into());
    }
    Ok(status)
}

fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

fn create(args: &SnapshotCreateArgs) -> Result<u8> {
    let registry = Registry::open(&Paths::of_user()?)?;
    let name = args.name.as_deref();
    let taken = vms::snapshot(&registry, &args.vm, name, args.diff, args.with_image)?;
    let mut out = io::stdout().lock();
    match args.format {
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&taken)?)?,
        Format::Text => writeln!(out, "{}", taken.id)?,
    }
    Ok(0)
}
