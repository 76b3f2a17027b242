//! `skerry volume`.

use std::io::{self, Write};

use anyhow::Result;
use skerry_engine::Paths;
use skerry_engine::volumes::{Volume, Volumes};

use super::{mib, table};
use crate::args::{
    Format, VolumeArgs, VolumeCreateArgs, VolumeLsArgs, VolumeNamesArgs, VolumePruneArgs,
    VolumeVerb,
};

/// Does what is asked of volumes.
pub fn volume(args: VolumeArgs) -> Result<u8> {
    let volumes = Volumes::open(&Paths::of_user()?)?;
    match args.verb {
        VolumeVerb::Create(args) => create(&volumes, args),
        VolumeVerb::Ls(args) => list(&volumes, &args),
        VolumeVerb::Inspect(args) => inspect(&volumes, &args),
        VolumeVerb::Rm(args) => remove(&volumes, &args),
        VolumeVerb::Prune(args) => prune(&volumes, &args),
    }
}

fn create(volumes: &Volumes, args: VolumeCreateArgs) -> Result<u8> {
    let size = args.size.map(|size| size.0);
    let created = volumes.create(args.name.as_deref(), size);
    let name = match created {
        Ok(name) => name,
        // Docker's habit: the volume is there, which is what was asked for.
        Err(skerry_engine::EngineError::VolumeExists(name)) if size.is_none() => name,
        Err(error) => return Err(error.into()),
    };
    writeln!(io::stdout(), "{name}")?;
    Ok(0)
}

fn list(volumes: &Volumes, args: &VolumeLsArgs) -> Result<u8> {
    let found = volumes.list()?;
    let mut out = io::stdout().lock();
    if args.quiet {
        for volume in &found {
            writeln!(out, "{}", volume.name)?;
        }
        return Ok(0);
    }
    if args.format == Format::Json {
        writeln!(out, "{}", serde_json::to_string_pretty(&found)?)?;
        return Ok(0);
    }
    let header = ["NAME", "SIZE", "USED", "IN USE"].map(str::to_owned);
    let row = |volume: &Volume| {
        let holder = volume
            .holder
            .as_deref()
            .map_or("yes".to_owned(), |name| format!("by {name}"));
        let in_use = if volume.in_use {
            holder
        } else {
            "no".to_owned()
        };
        [
            volume.name.clone(),
            mib(volume.size),
            mib(volume.used),
            in_use,
        ]
    };
    let rows: Vec<_> = std::iter::once(header)
        .chain(found.iter().map(row))
        .collect();
    table::write(&mut out, &rows)?;
    Ok(0)
}

fn inspect(volumes: &Volumes, args: &VolumeNamesArgs) -> Result<u8> {
    let found = args.names.iter().map(|name| volumes.inspect(name));
    let found: Vec<Volume> = found.collect::<Result<_, _>>()?;
    writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&found)?)?;
    Ok(0)
}

fn remove(volumes: &Volumes, args: &VolumeNamesArgs) -> Result<u8> {
    for name in &args.names {
        volumes.remove(name)?;
        writeln!(io::stdout(), "{name}")?;
    }
    Ok(0)
}

fn prune(volumes: &Volumes, args: &VolumePruneArgs) -> Result<u8> {
    let removed = volumes.prune(args.all)?;
    for (name, _) in &removed {
        writeln!(io::stdout(), "{name}")?;
    }
    let freed = removed.iter().map(|(_, used)| used).sum();
    crate::output::note(&format!("{} given back", mib(freed)));
    Ok(0)
}
