//! `skerry pull`, `skerry push` and `skerry tag`.

use std::io::{self, Write};

use anyhow::Result;
use skerry_engine::images::{self, PullPolicy};
use skerry_engine::{Name, Paths};

use crate::args::{PullArg, PullArgs, PushArgs, TagArgs};
use crate::output;
use crate::progress::Bars;

/// Gets images; goes on after one that can't be had.
pub fn pull(args: &PullArgs) -> Result<u8> {
    let paths = Paths::of_user()?;
    for_each(&args.names, |name| {
        pull_one(&paths, name, args.quiet)?;
        writeln!(io::stdout(), "{name}")?;
        Ok(())
    })
}

/// Sends images; goes on after one that can't be sent.
pub fn push(args: &PushArgs) -> Result<u8> {
    let paths = Paths::of_user()?;
    for_each(&args.names, |name| {
        let mut bars = Bars::new(args.quiet);
        let pushed = images::push(&paths, name, &mut |progress| bars.show(name, progress))?;
        drop(bars);
        if args.quiet {
            writeln!(io::stdout(), "{name}")?;
        } else {
            let (tag, digest, size) = (name.tag().unwrap_or_default(), pushed.digest, pushed.size);
            writeln!(io::stdout(), "{tag}: digest: {digest} size: {size}")?;
        }
        Ok(())
    })
}

/// Gives an image a further name.
pub fn tag(args: &TagArgs) -> Result<u8> {
    images::tag(&Paths::of_user()?, &args.image, &args.name)?;
    Ok(0)
}

/// Sees to it that an image which a registry has is in the store.
pub fn provide(paths: &Paths, image: &str, when: PullArg) -> Result<()> {
    let policy = match when {
        PullArg::Missing => PullPolicy::Missing,
        PullArg::Always => PullPolicy::Always,
        PullArg::Never => PullPolicy::Never,
    };
    if let Some(name) = images::to_pull(paths, image, policy)? {
        if when == PullArg::Missing {
            output::note(&format!(
                "the store doesn't have the image {image}: pulling {name}"
            ));
        }
        pull_one(paths, &name, false)?;
    }
    Ok(())
}

fn pull_one(paths: &Paths, name: &Name, quiet: bool) -> Result<()> {
    let mut bars = Bars::new(quiet);
    let pulled = images::pull(paths, name, &mut |progress| bars.show(name, progress))?;
    drop(bars);
    if !quiet {
        let digest = pulled.digest;
        output::note(&match pulled.was_there {
            true => format!("{name} is {digest}, which the store had"),
            false => format!("{name} is {digest}"),
        });
    }
    Ok(())
}

/// Does something for each; the last to fail makes the status.
fn for_each(names: &[Name], mut each: impl FnMut(&Name) -> Result<()>) -> Result<u8> {
    let mut status = 0;
    for name in names {
        if let Err(error) = each(name) {
            output::error(&error);
            status = crate::status::FAILED;
        }
    }
    Ok(status)
}
