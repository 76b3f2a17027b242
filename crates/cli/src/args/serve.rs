//! `skerry serve`.

use std::path::PathBuf;

use clap::Args;

/// Where to answer.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Listen at this Unix socket [default: skerry.sock in $XDG_RUNTIME_DIR, or in Skerry's data folder]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// Print the OpenAPI document of Skerry's own API, and end
    #[arg(long, conflicts_with = "socket")]
    pub openapi: bool,
}
