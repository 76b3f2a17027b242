//! `skerry start`, `attach`, `restart`, `prune`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc;

use anyhow::{Context, Result, bail};
use skerry_engine::Paths;
use skerry_engine::run::{Event, RunIo};
use skerry_engine::vms::{
    self, AttachEnd, DetachKeys, Detached, Registry, RestartPolicy, Since, Status, VmInfo,
};

use super::run::events;
use super::vms::{each, label_matches, registry};
use crate::args::{AttachArgs, Keys, PruneArgs, RestartArgs, StartArgs};
use crate::terminal::{self, Raw};
use crate::{output, status};

fn program() -> Result<PathBuf> {
    std::env::current_exe().context("Can't tell where skerry itself is")
}

fn begun(detached: Detached) -> Result<()> {
    match detached {
        Detached::Runs(_) => Ok(()),
        Detached::NotStarted(failure) => bail!("{}", failure.message),
    }
}

/// Starts machines that don't run.
pub fn start(args: &StartArgs) -> Result<u8> {
    let paths = Paths::of_user()?;
    let program = program()?;
    if args.attach || args.interactive {
        let [name] = &args.vms[..] else {
            bail!("Only one machine at a time can be attached to");
        };
        let registry = registry()?;
        let info = registry.find(name)?;
        let since = Since::At(vms::log_length(&registry, &info));
        match vms::start(&paths, &program, name, &mut output::note)? {
            Detached::Runs(_) => {}
            Detached::NotStarted(failure) => {
                output::note(&failure.message);
                return Ok(failure.kind.shell_code());
            }
        }
        return attach_to(
            &registry,
            &info,
            since,
            args.interactive,
            true,
            &args.detach_keys,
        );
    }
    let names = match args.all_restarting {
        true => restarting(&registry()?)?,
        false => args.vms.clone(),
    };
    each(&names, |_, name| {
        begun(vms::start(&paths, &program, name, &mut output::note)?)?;
        Ok(name.to_owned())
    })
}

/// Machines that would run still, had the host not been switched off.
fn restarting(registry: &Registry) -> Result<Vec<String>> {
    let infos = registry
        .list()?
        .into_iter()
        .filter(|info| match info.config.restart {
            RestartPolicy::Always => !info.state.status.is_alive() && info.state.started.is_some(),
            // One whose process was killed was not stopped by anybody.
            RestartPolicy::UnlessStopped => info.state.status == Status::Failed,
            RestartPolicy::No | RestartPolicy::OnFailure(_) => false,
        });
    Ok(infos.map(|info| info.config.name).collect())
}

/// Attaches to a machine's command.
pub fn attach(args: &AttachArgs) -> Result<u8> {
    let registry = registry()?;
    let info = registry.find(&args.vm)?;
    let stdin = !args.no_stdin;
    attach_to(
        &registry,
        &info,
        Since::Now,
        stdin,
        args.sig_proxy,
        &args.detach_keys,
    )
}

fn attach_to(
    registry: &Registry,
    info: &VmInfo,
    since: Since,
    stdin: bool,
    signals: bool,
    keys: &Keys,
) -> Result<u8> {
    let tty = info.config.tty;
    let raw = if tty && stdin { Raw::enter() } else { None };
    // Only a terminal has keys; elsewhere every byte is the command's.
    let keys = if tty { keys.0.clone() } else { Vec::new() };
    let events = match (signals, tty.then(terminal::size).flatten()) {
        (true, size) => {
            let passed = events(tty)?;
            Some(with_first(size.map(Event::Resize), passed)?)
        }
        (false, Some(size)) => {
            let (sender, receiver) = mpsc::channel();
            sender.send(Event::Resize(size)).ok();
            Some(receiver)
        }
        (false, None) => None,
    };
    let io = RunIo {
        stdin: stdin.then(|| Box::new(DetachKeys::new(io::stdin(), &keys)) as _),
        stdout: Box::new(io::stdout()),
        stderr: Box::new(io::stderr()),
        events,
    };
    let end = vms::attach(registry, &info.config.id, since, io);
    drop(raw);
    io::stdout().flush().ok();
    Ok(match end? {
        AttachEnd::Ended(code) => code,
        AttachEnd::Detached => {
            output::note(&format!("left {}, which goes on", info.config.name));
            0
        }
    })
}

/// One event before all others.
fn with_first(first: Option<Event>, rest: mpsc::Receiver<Event>) -> Result<mpsc::Receiver<Event>> {
    let Some(first) = first else {
        return Ok(rest);
    };
    let (sender, receiver) = mpsc::channel();
    sender.send(first).ok();
    let thread = std::thread::Builder::new().name("events".to_owned());
    thread.spawn(move || {
        while let Ok(event) = rest.recv() {
            if sender.send(event).is_err() {
                return;
            }
        }
    })?;
    Ok(receiver)
}

/// Stops machines and starts them again.
pub fn restart(args: &RestartArgs) -> Result<u8> {
    let paths = Paths::of_user()?;
    let program = program()?;
    each(&args.vms, |_, name| {
        let note = &mut output::note;
        begun(vms::restart(&paths, &program, name, args.time.0, note)?)?;
        Ok(name.to_owned())
    })
}

/// Removes machines that have ended; those that were created and never started, too.
pub fn prune(args: &PruneArgs) -> Result<u8> {
    for filter in &args.filter {
        if filter.key != "label" {
            bail!("There is no filter {}: prune knows label", filter.key);
        }
    }
    let registry = registry()?;
    let mut exit = 0;
    for info in registry.list()? {
        let wanted = |filter: &crate::args::Filter| label_matches(&info, &filter.value);
        if info.state.status.is_alive() || !args.filter.iter().all(wanted) {
            continue;
        }
        match vms::remove(&registry, &info.config.id, false) {
            Ok(()) => writeln!(io::stdout(), "{}", info.config.id)?,
            // Another was faster, or started it meanwhile.
            Err(
                skerry_engine::EngineError::NoSuchVm { .. }
                | skerry_engine::EngineError::VmRuns { .. },
            ) => {}
            Err(error) => {
                output::error(&error.into());
                exit = status::FAILED;
            }
        }
    }
    Ok(exit)
}
