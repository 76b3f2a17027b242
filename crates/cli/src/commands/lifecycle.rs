//! `skerry start`.

use anyhow::{Context, Result, bail};
use skerry_engine::Paths;
use skerry_engine::vms::{self, Detached};

use super::vms::each;
use crate::args::StartArgs;
use crate::output;

/// Starts machines that don't run.
pub fn start(args: &StartArgs) -> Result<u8> {
    let paths = Paths::of_user()?;
    let program = std::env::current_exe().context("Can't tell where skerry itself is")?;
    each(&args.vms, |_, name| {
        match vms::start(&paths, &program, name, &mut output::note)? {
            Detached::Runs(_) => Ok(name.to_owned()),
            Detached::NotStarted(failure) => bail!("{}", failure.message),
        }
    })
}
