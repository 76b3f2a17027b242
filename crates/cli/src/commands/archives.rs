//! `skerry save` and `skerry load`.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};

use anyhow::{Context, Result, bail};
use skerry_engine::{Paths, images};

use crate::args::{LoadArgs, SaveArgs};

/// Writes images to an archive; a file that can't be finished is removed.
pub fn save(args: &SaveArgs) -> Result<u8> {
    let store = images::open(&Paths::of_user()?)?;
    let Some(path) = &args.output else {
        if io::stdout().is_terminal() {
            bail!(
                "An archive is nothing for a terminal: name a file with -o, or redirect the output"
            );
        }
        store.save(&args.images, BufWriter::new(io::stdout().lock()))?;
        return Ok(0);
    };
    // What is there stays as long as the new archive isn't whole.
    let mut partial = path.clone().into_os_string();
    partial.push(".part");
    let file = File::create(&partial).with_context(|| format!("Can't write {}", path.display()))?;
    let saved = store.save(&args.images, BufWriter::new(&file));
    let moved = saved.map_err(anyhow::Error::from).and_then(|()| {
        std::fs::rename(&partial, path).with_context(|| format!("Can't write {}", path.display()))
    });
    if moved.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    moved.map(|()| 0)
}

/// Brings the images of an archive into the store.
pub fn load(args: &LoadArgs) -> Result<u8> {
    let store = images::open(&Paths::of_user()?)?;
    let loaded = match &args.input {
        Some(path) => store.load_archive(path, &mut |_| ())?,
        None => {
            if io::stdin().is_terminal() {
                bail!("There is no archive: name a file with -i, or redirect the input");
            }
            // Its parts are read in another order than they come.
            store.load_stream(io::stdin().lock(), &mut |_| ())?
        }
    };
    let mut out = io::stdout().lock();
    for image in loaded {
        let text = match &image.name {
            Some(name) => images::familiar(name),
            None => image.digest.to_string(),
        };
        match (args.quiet, image.name.is_some()) {
            (true, _) => writeln!(out, "{text}")?,
            (false, true) => writeln!(out, "Loaded image: {text}")?,
            (false, false) => writeln!(out, "Loaded image ID: {text}")?,
        }
    }
    Ok(0)
}
