//! `skerry pool` and its verbs.

use std::io::{self, Write};

use anyhow::{Context, Result, bail};
use skerry_engine::Paths;
use skerry_engine::pools::{self, PoolLaunch, PoolOptions, PoolStats, ResetPolicy};
use skerry_engine::vm::VmSpec;
use skerry_engine::vms::Begin;

use super::network::network;
use super::run::{Attached, command, finish, from_here};
use super::{machine_options, registry};
use crate::args::{
    CommandArgs, Format, PoolArgs, PoolCreateArgs, PoolExecArgs, PoolLsArgs, PoolRmArgs,
    PoolStatsArgs, PoolVerb, PullArg, ResetArg,
};
use crate::{output, status};

/// Keeps a pool for another process.
pub fn host() -> Result<u8> {
    pools::run_pool()?;
    Ok(0)
}

/// Does what the verb says.
pub fn execute(args: PoolArgs, verbose: u8) -> Result<u8> {
    let paths = Paths::of_user()?;
    match args.verb {
        PoolVerb::Create(args) => create(&paths, *args, verbose),
        PoolVerb::Exec(args) => exec(&paths, args),
        PoolVerb::Acquire(args) => {
            let number = pools::acquire(&paths, &args.name)?;
            writeln!(io::stdout(), "{number}")?;
            Ok(0)
        }
        PoolVerb::Release(args) => {
            pools::release(&paths, &args.name, args.lease)?;
            Ok(0)
        }
        PoolVerb::Ls(args) => list(&paths, &args),
        PoolVerb::Stats(args) => stats(&paths, &args),
        PoolVerb::Rm(args) => remove(&paths, &args),
    }
}

fn create(paths: &Paths, args: PoolCreateArgs, verbose: u8) -> Result<u8> {
    if args.machine.timeout.is_some() {
        bail!("The machines of a pool have no time limit: --timeout can't be used with it");
    }
    let begin = match (args.from_snapshot, args.image) {
        (Some(snapshot), _) => Begin::Snapshot(snapshot),
        (None, Some(image)) => {
            registry::provide(paths, &image, PullArg::Missing)?;
            Begin::Image(from_here(image)?)
        }
        (None, None) => bail!("Neither an image nor a snapshot was named"),
    };
    let launch = PoolLaunch {
        root: paths.root().to_owned(),
        name: args.name,
        begin,
        vm: VmSpec {
            options: machine_options(args.machine),
            read_only: args.read_only,
            network: network(args.network)?,
            mounts: args.mounts.specs(),
            show_console: verbose > 0,
            ..VmSpec::default()
        },
        prewarm: match args.exec.is_empty() {
            true => None,
            false => Some(command(CommandArgs::default(), args.exec)),
        },
        options: PoolOptions {
            min: args.min,
            max: args.max,
            idle_timeout: args.idle_timeout.map(|span| span.0),
            acquire_timeout: args.acquire_timeout.0,
            reset: match args.reset {
                ResetArg::Rewind => ResetPolicy::Rewind,
                ResetArg::Replace => ResetPolicy::Replace,
            },
            ..PoolOptions::default()
        },
    };
    let program = std::env::current_exe().context("Can't tell where skerry itself is")?;
    pools::create(&program, &launch, &mut output::note)?;
    writeln!(io::stdout(), "{}", launch.name)?;
    Ok(0)
}

fn exec(paths: &Paths, args: PoolExecArgs) -> Result<u8> {
    let attached = Attached::new(args.io.tty, args.io.interactive)?;
    let spec = command(args.io, args.line.command);
    let outcome = pools::exec(paths, &args.name, args.lease, &spec, attached.io);
    drop(attached.raw);
    Ok(finish(outcome?))
}

fn list(paths: &Paths, args: &PoolLsArgs) -> Result<u8> {
    let found = pools::list(paths)?;
    let mut out = io::stdout().lock();
    if args.format == Format::Json {
        writeln!(out, "{}", serde_json::to_string_pretty(&found)?)?;
        return Ok(0);
    }
    let width = |texts: &mut dyn Iterator<Item = usize>| texts.max().unwrap_or(0).max(6);
    let names = width(&mut found.iter().map(|pool| pool.name.len()));
    let sources = width(&mut found.iter().map(|pool| pool.source.len()));
    writeln!(out, "{:<names$}  {:<sources$}  MIN  MAX", "NAME", "SOURCE")?;
    for pool in &found {
        let PoolOptions { min, max, .. } = pool.options;
        let (name, source) = (&pool.name, &pool.source);
        writeln!(out, "{name:<names$}  {source:<sources$}  {min:<3}  {max}")?;
    }
    Ok(0)
}

fn stats(paths: &Paths, args: &PoolStatsArgs) -> Result<u8> {
    let stats = pools::stats(paths, &args.name)?;
    let mut out = io::stdout().lock();
    if args.format == Format::Json {
        writeln!(out, "{}", serde_json::to_string_pretty(&stats)?)?;
        return Ok(0);
    }
    let PoolStats {
        ready,
        in_use,
        busy,
        waiting,
        made,
        acquired,
        hits,
        resets,
        discarded,
        failures,
        timeouts,
    } = stats;
    writeln!(out, "ready      {ready}")?;
    writeln!(out, "in use     {in_use}")?;
    writeln!(out, "busy       {busy}")?;
    writeln!(out, "waiting    {waiting}")?;
    writeln!(out, "made       {made}")?;
    writeln!(out, "acquired   {acquired} ({hits} at once)")?;
    writeln!(out, "resets     {resets}")?;
    writeln!(out, "discarded  {discarded}")?;
    writeln!(out, "failures   {failures}")?;
    writeln!(out, "time-outs  {timeouts}")?;
    Ok(0)
}

fn remove(paths: &Paths, args: &PoolRmArgs) -> Result<u8> {
    let mut exit = 0;
    for name in &args.names {
        match pools::close(paths, name) {
            Ok(()) => writeln!(io::stdout(), "{name}")?,
            Err(error) => {
                output::error(&error.into());
                exit = status::FAILED;
            }
        }
    }
    Ok(exit)
}
