//! What any process may do with the virtual machines of its user.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::Serialize;
use skerry_protocol::host::{ExecSession, HostError};

use super::control::{Client, Forked, Reply, Request, Snapshotted, Traffic};
use super::copies;
use super::info::{Status, VmInfo};
use super::launch::Detached;
use super::names;
use super::output::LogReader;
use super::registry::Registry;
use crate::EngineError;
use crate::command::{self, CommandSpec, Surroundings};
use crate::confinement::Report;
use crate::network::NetworkReport;
use crate::paths::Paths;
use crate::run::{RunIo, RunOutcome};
use crate::statistics::Statistics;

/// How long a machine's process may take to answer what takes it no time.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same for what others don't wait for.
const BRIEF: Duration = Duration::from_millis(500);
const SIGTERM: u8 = 15;
const SIGKILL: u8 = 9;

/// A connection to the process of a machine that runs.
fn reach(registry: &Registry, info: &VmInfo) -> Result<Client, EngineError> {
    let name = &info.config.name;
    if !info.state.status.is_alive() {
        let name = name.clone();
        return Err(EngineError::VmStopped { name });
    }
    Client::connect(name, &registry.control(&info.config.id))
}

fn ask(registry: &Registry, info: &VmInfo, request: &Request) -> Result<(), EngineError> {
    let client = reach(registry, info)?;
    client.limit(PATIENCE)?;
    client.ask(request).map(drop)
}

/// Runs one more command in a machine.
pub fn exec(
    registry: &Registry,
    name: &str,
    spec: &CommandSpec,
    io: RunIo,
) -> Result<RunOutcome, EngineError> {
    let info = registry.find(name)?;
    let id = super::registry::new_id()?;
    let note = |action: &str, more: &[(&str, String)]| {
        let mut all = vec![("exec_id", id.clone()), ("command", spec.command.join(" "))];
        all.extend_from_slice(more);
        registry.note(&info.config, action, &all);
    };
    note("exec_create", &[]);
    note("exec_start", &[]);
    let result = run_in(registry, &info, spec, io);
    if let Ok(outcome) = &result {
        note("exec_die", &[("exit_code", outcome.code().to_string())]);
    }
    result
}

/// The same without a word about it.
pub(super) fn run_in(
    registry: &Registry,
    info: &VmInfo,
    spec: &CommandSpec,
    io: RunIo,
) -> Result<RunOutcome, EngineError> {
    if info.state.status == Status::Paused {
        let name = info.config.name.clone();
        return Err(EngineError::VmPaused { name });
    }
    let (_, stream) = reach(registry, info)?.ask(&Request::Exec)?;
    let surroundings = &info.config.surroundings;
    command_over(stream, surroundings, spec, io, || !ends(registry, info))
}

/// Runs a command over a connection that has become one to a guest's agent. `alive` tells whether the
/// guest can still be there.
pub(crate) fn command_over(
    stream: UnixStream,
    surroundings: &Surroundings,
    spec: &CommandSpec,
    io: RunIo,
    alive: impl Fn() -> bool,
) -> Result<RunOutcome, EngineError> {
    let request = command::request(spec.command.clone(), surroundings, spec);
    let session = match ExecSession::start(stream, request) {
        Err(HostError::NotStarted(failure)) => return Ok(RunOutcome::NotStarted(failure)),
        started => started?,
    };
    let fed = io.feed(&session);
    let [mut stdout, mut stderr] = fed.map_err(EngineError::host("start a thread"))?;
    match session.wait(&mut stdout, &mut stderr) {
        Ok(status) => Ok(RunOutcome::Ended(status)),
        Err(HostError::NotStarted(failure)) => Ok(RunOutcome::NotStarted(failure)),
        Err(HostError::Connection(_)) if !alive() => {
            Err(EngineError::GuestEnded("it was stopped".to_owned()))
        }
        Err(error) => Err(error.into()),
    }
}

pub(super) fn is_alive(registry: &Registry, info: &VmInfo) -> bool {
    let found = registry.find(&info.config.id);
    found.is_ok_and(|info| info.state.status.is_alive())
}

/// Whether a machine whose process has closed a connection is about to end: its lock goes soon after.
fn ends(registry: &Registry, info: &VmInfo) -> bool {
    const LOOKS: u32 = 50;
    (0..LOOKS).any(|look| {
        if look > 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        !is_alive(registry, info)
    })
}

/// The output of a machine's command, where it is kept.
pub fn log(registry: &Registry, info: &VmInfo) -> std::io::Result<LogReader> {
    LogReader::open(&registry.log(&info.config.id))
}

/// Has a machine stand still.
pub fn pause(registry: &Registry, name: &str) -> Result<(), EngineError> {
    let info = registry.find(name)?;
    if info.state.status == Status::Paused {
        let name = info.config.name;
        return Err(EngineError::VmPaused { name });
    }
    ask(registry, &info, &Request::Pause)
}

/// Lets a machine go on.
pub fn unpause(registry: &Registry, name: &str) -> Result<(), EngineError> {
    let info = registry.find(name)?;
    if info.state.status == info.state.under_way() {
        let name = info.config.name;
        return Err(EngineError::VmNotPaused { name });
    }
    ask(registry, &info, &Request::Unpause)
}

/// Gives a machine another name, which no other may have.
pub fn rename(registry: &Registry, name: &str, to: &str) -> Result<(), EngineError> {
    let info = registry.find(name)?;
    names::check(to)?;
    let taken = registry.find(to).is_ok_and(|other| other.config.name == to);
    if taken {
        let name = to.to_owned();
        return Err(EngineError::NameTaken { name });
    }
    match info.state.status.is_alive() {
        true => ask(registry, &info, &Request::Rename(to.to_owned())),
        false => registry.rename(&info, to),
    }
}

/// Sends a signal to a machine's command; SIGKILL ends the machine.
pub fn signal(registry: &Registry, name: &str, signal: u8) -> Result<(), EngineError> {
    if signal == SIGKILL {
        return kill(registry, name).map(drop);
    }
    let info = registry.find(name)?;
    if info.state.status == Status::Paused {
        let name = info.config.name;
        return Err(EngineError::VmPaused { name });
    }
    ask(registry, &info, &Request::Signal(signal))
}

/// Ends a machine at once; gives the exit status.
pub fn kill(registry: &Registry, name: &str) -> Result<u8, EngineError> {
    let info = registry.find(name)?;
    let asked = ask(registry, &info, &Request::Kill);
    match asked.and_then(|()| wait_for(registry, &info, Some(PATIENCE))) {
        Ok(Some(code)) => Ok(code),
        Err(error @ EngineError::VmStopped { .. }) => Err(error),
        // Its process doesn't answer.
        Ok(None) | Err(EngineError::VmSilent { .. }) => kill_process(registry, &info),
        Err(error) => Err(error),
    }
}

/// Ends the process of a machine. Its id is trusted as long as its lock is held.
fn kill_process(registry: &Registry, info: &VmInfo) -> Result<u8, EngineError> {
    let unkilled = EngineError::host("kill the process of a virtual machine");
    let failed = |error: rustix::io::Errno| unkilled(error.into());
    let Some(pid) = i32::try_from(info.state.pid).ok().and_then(Pid::from_raw) else {
        return Err(failed(rustix::io::Errno::SRCH));
    };
    // The descriptor first: what holds the lock afterwards is the process that it is of.
    let process = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        // It has just ended by itself.
        Err(rustix::io::Errno::SRCH) if ends(registry, info) => return Ok(super::KILLED),
        opened => opened.map_err(failed)?,
    };
    if is_alive(registry, info) {
        rustix::process::pidfd_send_signal(&process, Signal::KILL).map_err(failed)?;
        for _ in 0..500 {
            if !is_alive(registry, info) {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(super::KILLED)
}

/// Asks a machine's command to end and, after `grace`, ends the machine; gives the exit status.
pub fn stop(registry: &Registry, name: &str, grace: Duration) -> Result<u8, EngineError> {
    let info = registry.find(name)?;
    if !info.state.status.is_alive() {
        return Ok(info.state.exit_code.unwrap_or(super::KILLED));
    }
    let asked = match info.state.status {
        Status::Paused => ask(registry, &info, &Request::Unpause),
        _ => Ok(()),
    };
    let ended = asked
        .and_then(|()| ask(registry, &info, &Request::Signal(SIGTERM)))
        .and_then(|()| wait_for(registry, &info, Some(grace)));
    let code = match ended {
        Ok(Some(code)) => code,
        Ok(None) | Err(_) if is_alive(registry, &info) => match kill(registry, &info.config.id) {
            // It ended by itself between the two looks.
            Err(EngineError::VmStopped { .. } | EngineError::NoSuchVm { .. }) => {
                final_code(registry, &info)?
            }
            killed => killed?,
        },
        Ok(None) | Err(_) => final_code(registry, &info)?,
    };
    registry.note(&info.config, "stop", &[]);
    Ok(code)
}

/// Stops a machine, if it runs, and starts it again: see [`stop`] and [`start`](super::start).
pub fn restart(
    paths: &Paths,
    program: &Path,
    name: &str,
    grace: Duration,
    note: &mut dyn FnMut(&str),
) -> Result<Detached, EngineError> {
    let registry = Registry::open(paths)?;
    let info = registry.find(name)?;
    if info.state.status.is_alive() {
        stop(&registry, &info.config.id, grace)?;
        // Its process is about to let go of its place.
        ends(&registry, &info);
    }
    let started = super::start(paths, program, &info.config.id, note)?;
    registry.note(&info.config, "restart", &[]);
    Ok(started)
}

/// Writes a snapshot of a machine to the store; it goes on meanwhile.
pub fn snapshot(
    registry: &Registry,
    name: &str,
    snapshot: Option<&str>,
    difference: bool,
    with_image: bool,
) -> Result<Snapshotted, EngineError> {
    let request = Request::Snapshot {
        name: snapshot.map(str::to_owned),
        difference,
        with_image,
    };
    let info = registry.find(name)?;
    match reach(registry, &info)?.ask(&request)? {
        (Reply::Snapshotted(taken), _) => Ok(taken),
        _ => Err(strange(&info)),
    }
}

/// Makes more machines from a running one, with these names (an empty one for any): each in a process
/// `program vm-host`, which this one starts.
pub fn fork(
    registry: &Registry,
    program: &Path,
    name: &str,
    names: &[String],
    auto_remove: bool,
) -> Result<Forked, EngineError> {
    let info = registry.find(name)?;
    let client = reach(registry, &info)?;
    copies::fork(client, program, registry.data(), names, auto_remove)
}

/// What a running machine's network is, and has done.
pub fn network(registry: &Registry, name: &str) -> Result<NetworkReport, EngineError> {
    let info = registry.find(name)?;
    let client = reach(registry, &info)?;
    client.limit(PATIENCE)?;
    match client.ask(&Request::Network)? {
        (Reply::Network(report), _) => Ok(*report),
        _ => Err(strange(&info)),
    }
}

/// What a running machine has moved; it is not waited for long, as it may be busy with its start.
pub(super) fn traffic(registry: &Registry, info: &VmInfo) -> Result<Traffic, EngineError> {
    let client = reach(registry, info)?;
    client.limit(BRIEF)?;
    match client.ask(&Request::Traffic)? {
        (Reply::Traffic(traffic), _) => Ok(traffic),
        _ => Err(strange(info)),
    }
}

/// How a running machine's process is confined.
fn confinement(registry: &Registry, info: &VmInfo) -> Result<Report, EngineError> {
    let client = reach(registry, info)?;
    client.limit(PATIENCE)?;
    match client.ask(&Request::Confinement)? {
        (Reply::Confinement(report), _) => Ok(report),
        _ => Err(strange(info)),
    }
}

/// What a running machine is, and what its processors do, looked at for as long as `span`.
pub fn inspect(registry: &Registry, name: &str, span: Duration) -> Result<Inspected, EngineError> {
    let info = registry.find(name)?;
    let alive = info.state.status.is_alive();
    if !alive || info.state.status == Status::Starting {
        return Ok(Inspected {
            info,
            statistics: None,
            network: None,
            confinement: None,
            traffic: None,
        });
    }
    let client = reach(registry, &info)?;
    client.limit(PATIENCE.saturating_add(span))?;
    let sample_ms = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    match client.ask(&Request::Statistics { sample_ms })? {
        (Reply::Statistics(statistics), _) => Ok(Inspected {
            network: Some(network(registry, &info.config.id)?),
            confinement: Some(confinement(registry, &info)?),
            traffic: Some(traffic(registry, &info)?),
            info,
            statistics: Some(statistics),
        }),
        _ => Err(strange(&info)),
    }
}

/// A machine, as [`inspect`] found it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Inspected {
    /// What the registry has of it.
    #[serde(flatten)]
    pub info: VmInfo,
    /// What runs it and what its processors do, while its command runs.
    pub statistics: Option<Statistics>,
    /// Its network, likewise.
    pub network: Option<NetworkReport>,
    /// How its process is confined, likewise.
    pub confinement: Option<Report>,
    /// What it has moved, likewise.
    pub traffic: Option<Traffic>,
}

/// An answer to another question.
fn strange(info: &VmInfo) -> EngineError {
    EngineError::VmRefused {
        name: info.config.name.clone(),
        reason: "its answer is not one to the question".to_owned(),
    }
}

/// Waits for the end of a machine's command; gives its exit status.
pub fn wait(registry: &Registry, name: &str) -> Result<u8, EngineError> {
    let info = registry.find(name)?;
    match wait_for(registry, &info, None) {
        Ok(Some(code)) => Ok(code),
        // Killed while it was about to answer.
        Ok(None) | Err(EngineError::VmSilent { .. } | EngineError::VmStopped { .. }) => {
            final_code(registry, &info)
        }
        Err(error) => Err(error),
    }
}

/// Waits until a machine is ready, for `limit` at most.
pub fn wait_ready(
    registry: &Registry,
    name: &str,
    limit: Option<Duration>,
) -> Result<(), EngineError> {
    let info = registry.find(name)?;
    let name = info.config.name.clone();
    if info.config.ready_mark.is_none() {
        return Err(EngineError::NoReadyMark { name });
    }
    if info.state.ready.is_some() && info.state.status.is_alive() {
        return Ok(());
    }
    let client = reach(registry, &info)?;
    if let Some(limit) = limit {
        client.limit(limit.max(Duration::from_millis(1)))?;
    }
    match client.ask(&Request::Ready) {
        Ok((Reply::Done, _)) => Ok(()),
        Ok((Reply::Ended(code), _)) => Err(EngineError::EndedUnready { name, code }),
        Ok(_) => Err(strange(&info)),
        Err(EngineError::VmSilent { source, .. })
            if source.kind() == std::io::ErrorKind::WouldBlock =>
        {
            Err(EngineError::Unready { name })
        }
        Err(error) => Err(error),
    }
}

/// What a machine that answers no more left, once its process is gone; one that is forgotten was killed
/// before it could say.
fn final_code(registry: &Registry, info: &VmInfo) -> Result<u8, EngineError> {
    loop {
        match registry.find(&info.config.id) {
            // It doesn't answer, but hasn't written how it ended yet.
            Ok(info) if info.state.status.is_alive() => std::thread::sleep(ENDING),
            Ok(info) => return Ok(info.state.exit_code.unwrap_or(super::KILLED)),
            Err(EngineError::NoSuchVm { .. }) => return Ok(super::KILLED),
            Err(error) => return Err(error),
        }
    }
}

/// How often it is looked whether a process that ends has come to its end.
const ENDING: Duration = Duration::from_millis(5);

/// The exit status, if the command ends in time.
fn wait_for(
    registry: &Registry,
    info: &VmInfo,
    limit: Option<Duration>,
) -> Result<Option<u8>, EngineError> {
    let client = reach(registry, info)?;
    if let Some(limit) = limit {
        client.limit(limit.max(Duration::from_millis(1)))?;
    }
    match client.ask(&Request::Wait) {
        Ok((Reply::Ended(code), _)) => Ok(Some(code)),
        Ok(_) => Ok(None),
        Err(EngineError::VmSilent { source, .. })
            if source.kind() == std::io::ErrorKind::WouldBlock =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Forgets a machine that has ended; `force` ends it first.
pub fn remove(registry: &Registry, name: &str, force: bool) -> Result<(), EngineError> {
    let info = registry.find(name)?;
    if force && info.state.status.is_alive() {
        match kill(registry, &info.config.id) {
            // It ended by itself meanwhile, and was forgotten if it was to be.
            Ok(_) | Err(EngineError::VmStopped { .. } | EngineError::NoSuchVm { .. }) => {}
            Err(error) => return Err(error),
        }
        // Its process holds on to its place until it is gone, and one that was to be removed goes by
        // itself.
        for _ in 0..500 {
            match registry.remove(&info) {
                Err(EngineError::VmRuns { .. }) => std::thread::sleep(Duration::from_millis(2)),
                result => return result,
            }
        }
    }
    registry.remove(&info)
}
