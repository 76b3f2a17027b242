//! `--rm` of docker's clients: who forgets a machine once it has ended and everybody has its output.
//!
//! A machine that forgets itself would do so before its client has read its last lines. So these are
//! made to stay, with a [`LABEL`], and the server that is there when they end removes them: this one, or
//! the next, which looks for the label when it begins.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use skerry_engine::EngineError;
use skerry_engine::vms::{self, Registry, VmConfig};

use crate::error::chain;
use crate::work::Shared;

/// What says of a machine that it is to be forgotten when it ends.
pub(super) const LABEL: &str = "skerry.docker.auto-remove";
/// How long those who read a machine's output may take to finish.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many machines' ends are remembered after they were forgotten.
const REMEMBERED: usize = 1024;
/// How often it is looked what has become of a machine.
const LOOK: Duration = Duration::from_millis(20);

/// Who is at which machine, and how those ended that are gone.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    users: HashMap<String, usize>,
    gone: VecDeque<(String, u8)>,
}

/// Somebody who still wants something of a machine.
#[derive(Debug)]
pub(super) struct User {
    app: Shared,
    id: String,
}

impl Drop for User {
    fn drop(&mut self) {
        let reaper = &self.app.reaper;
        let mut state = reaper.state.lock();
        if let Some(count) = state.users.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                state.users.remove(&self.id);
                reaper.changed.notify_all();
            }
        }
    }
}

/// Holds a machine's removal up until the answer is dropped.
pub(super) fn hold(app: &Shared, id: &str) -> User {
    let mut state = app.reaper.state.lock();
    *state.users.entry(id.to_owned()).or_default() += 1;
    User {
        app: app.clone(),
        id: id.to_owned(),
    }
}

/// Whether a machine is to be forgotten when it ends.
pub(super) fn is_brief(config: &VmConfig) -> bool {
    config.auto_remove || config.labels.contains_key(LABEL)
}

/// Has a thread remove a machine, which runs, when it has ended.
pub(super) fn watch(app: &Shared, id: &str) {
    let (app, id) = (app.clone(), id.to_owned());
    tokio::task::spawn_blocking(move || {
        if let Err(error) = remove(&app, &id) {
            tracing::warn!(error = %chain(&error), vm = id, "A machine is not removed");
        }
    });
}

fn remove(app: &Shared, id: &str) -> Result<(), EngineError> {
    let registry = app.registry()?;
    let code = match vms::wait(&registry, id) {
        Err(EngineError::NoSuchVm { .. }) => return Ok(()),
        waited => waited?,
    };
    let until = Instant::now() + PATIENCE;
    let mut state = app.reaper.state.lock();
    while state.users.contains_key(id) {
        if app.reaper.changed.wait_until(&mut state, until).timed_out() {
            break;
        }
    }
    state.gone.push_back((id.to_owned(), code));
    if state.gone.len() > REMEMBERED {
        state.gone.pop_front();
    }
    drop(state);
    // Its process may still hold its place.
    match vms::remove(&registry, id, true) {
        Err(EngineError::NoSuchVm { .. }) => Ok(()),
        removed => removed,
    }
}

/// Removes what an earlier server has left, now or when it ends.
pub(crate) fn take_over(app: &Shared) {
    let left = app.registry().and_then(|registry| registry.list());
    for info in left.unwrap_or_default() {
        if info.config.labels.contains_key(LABEL) && info.state.started.is_some() {
            watch(app, &info.config.id);
        }
    }
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// That it doesn't run.
    NotRunning,
    /// That it ends once more.
    NextExit,
    /// That it is forgotten.
    Removed,
}

/// Waits for a machine; gives its exit status. It was in `before` when it was asked for.
pub(super) fn wait(
    app: &Shared,
    id: &str,
    before: &vms::VmInfo,
    until: Until,
    gone: impl Fn() -> bool,
) -> Result<u8, EngineError> {
    let registry = app.registry()?;
    loop {
        let found = registry.find(id);
        match found {
            Ok(info) => {
                let ended = !info.state.status.is_alive() && info.state.exit_code.is_some();
                let again = info.state.finished != before.state.finished;
                let code = info.state.exit_code.unwrap_or_default();
                match until {
                    Until::NotRunning if !info.state.status.is_alive() => return Ok(code),
                    Until::NextExit if ended && again => return Ok(code),
                    _ if info.state.status.is_alive() => await_end(&registry, id),
                    _ => std::thread::sleep(LOOK),
                }
            }
            Err(EngineError::NoSuchVm { .. }) => return Ok(end_of(app, id)),
            Err(error) => return Err(error),
        }
        if gone() {
            return Ok(0);
        }
    }
}

/// Waits for a running machine's command as long as a look takes at least.
fn await_end(registry: &Registry, id: &str) {
    // Why not is found out with the next look.
    if vms::wait(registry, id).is_err() {
        std::thread::sleep(LOOK);
    }
}

/// How a machine ended that is gone; one that nobody here saw end was killed.
fn end_of(app: &Shared, id: &str) -> u8 {
    let state = app.reaper.state.lock();
    let seen = state.gone.iter().rev().find(|(gone, _)| gone == id);
    seen.map_or(vms::KILLED, |(_, code)| *code)
}
