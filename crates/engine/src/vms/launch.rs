//! Virtual machines behind no terminal: started by one process, which ends, and run by another.
//!
//! ```text
//!  run -d ─► detach ── socket as its stdin ──► skerry vm-host ─► run_detached ─► host
//!            Launch ─►      ◄─ notes, then started or failed
//! ```

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;

use serde::{Deserialize, Serialize};
use skerry_oci::Progress;
use skerry_protocol::message::ExecFailure;

use super::children;
use super::control::{receive, send};
use super::host::{Job, Source, host};
use super::output;
use super::registry::Entry;
use crate::error::EngineError;
use crate::frozen::Frozen;
use crate::images;
use crate::parcel;
use crate::paths::Paths;
use crate::run::{Event, RunIo, RunOutcome, RunSpec};

/// What another process is to begin with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Begin {
    /// An image, as the user names it.
    Image(String),
    /// A snapshot of the store.
    Snapshot(String),
    /// A machine with this name, whose state follows.
    Machine(String),
}

/// A virtual machine to be run by another process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// Where everything is kept.
    pub root: PathBuf,
    /// What it begins with.
    pub begin: Begin,
    /// The machine and its command.
    pub spec: RunSpec,
    /// Its name; empty for any.
    pub name: String,
    /// It is forgotten when it ends.
    pub auto_remove: bool,
}

/// What the new process tells its maker.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Told {
    Note(String),
    Started(String),
    NotStarted(ExecFailure),
    Failed(String),
}

/// What became of a virtual machine that another process was to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detached {
    /// It runs, under this identity.
    Runs(String),
    /// Its command could not be started.
    NotStarted(ExecFailure),
}

/// Has another process, `program vm-host`, run a virtual machine; returns once its command runs.
pub fn detach(
    program: &Path,
    launch: &Launch,
    note: &mut dyn FnMut(&str),
) -> Result<Detached, EngineError> {
    begin(program, launch, None, note)
}

/// As [`detach`], with the state of the machine that the new one goes on from.
pub(super) fn begin(
    program: &Path,
    launch: &Launch,
    frozen: Option<&Frozen>,
    note: &mut dyn FnMut(&str),
) -> Result<Detached, EngineError> {
    let mut own = children::start(program, "vm-host")?;
    send(&mut own, launch).map_err(EngineError::host("tell another skerry what to run"))?;
    if let Some(frozen) = frozen {
        parcel::hand_over(&mut own, frozen)?;
    }
    loop {
        match receive(&mut own).map_err(EngineError::host("hear from another skerry"))? {
            Told::Note(text) => note(&text),
            Told::Started(id) => return Ok(Detached::Runs(id)),
            Told::NotStarted(failure) => return Ok(Detached::NotStarted(failure)),
            Told::Failed(reason) => return Err(EngineError::Detached(reason)),
        }
    }
}

/// The whole life of a process that [`detach`] made: its standard input is a socket to its maker.
pub fn run_detached() -> Result<(), EngineError> {
    let mut maker = children::leave_terminal()?;
    let launch: Launch = receive(&mut maker).map_err(EngineError::host("hear what to run"))?;
    let result = run(&launch, &mut maker);
    if let Err(error) = &result {
        let _ = send(
            &mut maker,
            &Told::Failed(skerry_hypervisor::probe::chain(error)),
        );
    }
    result
}

fn run(launch: &Launch, maker: &mut UnixStream) -> Result<(), EngineError> {
    let paths = Paths::at(&launch.root);
    let taken = match launch.begin {
        Begin::Machine(_) => Some(parcel::take_over(maker)?),
        Begin::Image(_) | Begin::Snapshot(_) => None,
    };
    let maker = &*maker;
    let tell = |told: Told| {
        // Nobody may listen any more, and the machine runs all the same.
        let _ = send(&mut &*maker, &told);
    };
    let (image, frozen);
    let source = match (&launch.begin, taken) {
        (Begin::Image(name), _) => {
            image = images::resolve(&paths, name, &mut |progress| {
                if let Some(text) = told_of(name, progress) {
                    tell(Told::Note(text));
                }
            })?;
            Source::Image {
                image: &image,
                name,
            }
        }
        (Begin::Snapshot(parent) | Begin::Machine(parent), taken) => {
            frozen = match taken {
                Some(taken) => taken,
                None => Frozen::open(&paths, parent)?,
            };
            Source::Frozen {
                frozen: &frozen,
                parent,
            }
        }
    };
    let job = Job {
        source,
        spec: &launch.spec,
        name: &launch.name,
        auto_remove: launch.auto_remove,
        detached: true,
        own_process: true,
        statistics: None,
    };
    let started = |config: &super::VmConfig| {
        tell(Told::Started(config.id.clone()));
        let _ = maker.shutdown(std::net::Shutdown::Both);
    };
    let mut note = |text: &str| tell(Told::Note(text.to_owned()));
    let outcome = host(&paths, job, log, started, &mut note)?;
    if let RunOutcome::NotStarted(failure) = outcome {
        tell(Told::NotStarted(failure));
    }
    Ok(())
}

/// What of an import takes time enough for a note.
#[must_use]
pub fn told_of(image: &str, progress: Progress) -> Option<String> {
    match progress {
        Progress::Waiting => Some(format!("waiting for another process that converts {image}")),
        Progress::Layer { number, count } if count > 1 => {
            Some(format!("converting {image}: layer {number} of {count}"))
        }
        _ => None,
    }
}

/// The streams of a command behind no terminal.
fn log(entry: &Entry) -> Result<RunIo, EngineError> {
    let [stdout, stderr] = output::create(&entry.log()).map_err(EngineError::host("keep a log"))?;
    let stdin: Option<Box<dyn Read + Send>> = None;
    let events: Option<Receiver<Event>> = None;
    Ok(RunIo {
        stdin,
        stdout: Box::new(stdout),
        stderr: Box::new(stderr),
        events,
    })
}
