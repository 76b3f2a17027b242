//! `skerry serve`: the engine over HTTP.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use skerry_api::Options;
use skerry_engine::Paths;

use crate::args::ServeArgs;
use crate::output;

const NAME: &str = "skerry.sock";

/// Answers until it is told to end.
pub fn execute(args: &ServeArgs) -> Result<u8> {
    if args.openapi {
        write!(io::stdout(), "{}", skerry_api::document())?;
        return Ok(0);
    }
    let paths = Paths::of_user()?;
    let socket = match &args.socket {
        Some(path) => path.clone(),
        None => usual(&paths)?,
    };
    let program = std::env::current_exe().context("Can't tell where skerry itself is")?;
    let listener = skerry_api::listen(&socket)?;
    let shown = std::path::absolute(&socket).unwrap_or(socket.clone());
    output::note(&format!("listening at unix://{}", shown.display()));
    let served = skerry_api::serve(listener, Options { paths, program });
    // Unless somebody has put another one there.
    let _ = std::fs::remove_file(&socket);
    served?;
    Ok(0)
}

/// Where the socket is unless another place is named.
fn usual(paths: &Paths) -> Result<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    match runtime.filter(|folder| folder.is_absolute() && folder.is_dir()) {
        Some(folder) => Ok(folder.join(NAME)),
        None => {
            Paths::ensure(paths.root())?;
            Ok(paths.root().join(NAME))
        }
    }
}
