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
use skerry_oci::{Image, Progress};
use skerry_protocol::message::ExecFailure;

use super::children;
use super::control::{receive, send};
use super::host::host_in;
use super::job::{self, Job, Plan, Source};
use super::output;
use super::registry::{Entry, Registry};
use crate::error::EngineError;
use crate::frozen::Frozen;
use crate::images;
use crate::parcel;
use crate::paths::Paths;
use crate::resources;
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

/// What another process is asked for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    /// Make a machine and run it.
    Run(Box<Launch>),
    /// Run one that has its place.
    Start {
        /// Where everything is kept.
        root: PathBuf,
        /// Which.
        id: String,
    },
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

/// Makes a virtual machine that is to be [started](start) later, of the image that its name means now;
/// gives its identity.
pub fn create(launch: &Launch, note: &mut dyn FnMut(&str)) -> Result<String, EngineError> {
    let paths = Paths::at(&launch.root);
    let registry = Registry::open(&paths)?;
    let origin = Origin::of(&paths, &launch.begin, None, None, note)?;
    let job = launch.job(origin.source());
    let image = match job.source {
        Source::Image { image, .. } => Some(image),
        Source::Frozen { .. } => None,
    };
    resources::check(&launch.spec.vm, image)?;
    let config = job::config(&job, &Plan::of(&job)?);
    Ok(registry.prepare(config, launch)?.id)
}

/// Has another process, `program vm-host`, run a virtual machine that was made and doesn't run; returns
/// once its command runs.
pub fn start(
    paths: &Paths,
    program: &Path,
    name: &str,
    note: &mut dyn FnMut(&str),
) -> Result<Detached, EngineError> {
    let registry = Registry::open(paths)?;
    let info = registry.find(name)?;
    let name = || info.config.name.clone();
    if info.state.status.is_alive() {
        return Err(EngineError::VmRuns { name: name() });
    }
    if registry.launch(&info.config.id)?.is_none() {
        return Err(EngineError::NotAgain { name: name() });
    }
    let order = Order::Start {
        root: paths.root().to_owned(),
        id: info.config.id,
    };
    ask(program, &order, None, note)
}

/// As [`detach`], with the state of the machine that the new one goes on from.
pub(super) fn begin(
    program: &Path,
    launch: &Launch,
    frozen: Option<&Frozen>,
    note: &mut dyn FnMut(&str),
) -> Result<Detached, EngineError> {
    ask(program, &Order::Run(Box::new(launch.clone())), frozen, note)
}

fn ask(
    program: &Path,
    order: &Order,
    frozen: Option<&Frozen>,
    note: &mut dyn FnMut(&str),
) -> Result<Detached, EngineError> {
    let mut own = children::start(program, "vm-host")?;
    send(&mut own, order).map_err(EngineError::host("tell another skerry what to run"))?;
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
    let order: Order = receive(&mut maker).map_err(EngineError::host("hear what to run"))?;
    let result = match order {
        Order::Run(launch) => run(&launch, None, &mut maker),
        Order::Start { root, id } => start_known(&root, &id, &mut maker),
    };
    if let Err(error) = &result {
        let _ = send(
            &mut maker,
            &Told::Failed(skerry_hypervisor::probe::chain(error)),
        );
    }
    result
}

/// Runs a machine that has its place.
fn start_known(root: &Path, id: &str, maker: &mut UnixStream) -> Result<(), EngineError> {
    let registry = Registry::open(&Paths::at(root))?;
    let entry = registry.begin(id)?;
    match registry.launch(id) {
        Ok(Some(launch)) => run(&launch, Some(entry), maker),
        Ok(None) => {
            let name = entry.config.name.clone();
            let error = EngineError::NotAgain { name };
            entry.discard(&error);
            Err(error)
        }
        Err(error) => {
            entry.discard(&error);
            Err(error)
        }
    }
}

/// What a machine begins with, at hand.
enum Origin {
    Image { image: Box<Image>, name: String },
    Frozen { frozen: Box<Frozen>, parent: String },
}

impl Origin {
    /// Finds it; the image with this digest, where one is named.
    fn of(
        paths: &Paths,
        begin: &Begin,
        digest: Option<&str>,
        taken: Option<Frozen>,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self, EngineError> {
        match (begin, taken) {
            (Begin::Image(name), _) => {
                let wanted = digest.unwrap_or(name);
                let image = images::resolve(paths, wanted, &mut |progress| {
                    if let Some(text) = told_of(name, progress) {
                        note(&text);
                    }
                })?;
                Ok(Self::Image {
                    image: Box::new(image),
                    name: name.clone(),
                })
            }
            (Begin::Snapshot(parent) | Begin::Machine(parent), taken) => Ok(Self::Frozen {
                frozen: Box::new(match taken {
                    Some(taken) => taken,
                    None => Frozen::open(paths, parent)?,
                }),
                parent: parent.clone(),
            }),
        }
    }

    fn source(&self) -> Source<'_> {
        match self {
            Self::Image { image, name } => Source::Image { image, name },
            Self::Frozen { frozen, parent } => Source::Frozen { frozen, parent },
        }
    }
}

impl Launch {
    /// What the machine's process has to do.
    fn job<'a>(&'a self, source: Source<'a>) -> Job<'a> {
        // The state of a machine that it was made from is gone with it.
        let again = !self.auto_remove && !matches!(self.begin, Begin::Machine(_));
        Job {
            source,
            spec: &self.spec,
            name: &self.name,
            auto_remove: self.auto_remove,
            detached: true,
            launch: again.then_some(self),
            own_process: true,
            statistics: None,
        }
    }
}

fn run(launch: &Launch, entry: Option<Entry>, maker: &mut UnixStream) -> Result<(), EngineError> {
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
    let mut note = |text: &str| tell(Told::Note(text.to_owned()));
    let digest = entry.as_ref().and_then(|entry| entry.config.digest.clone());
    let origin = match Origin::of(&paths, &launch.begin, digest.as_deref(), taken, &mut note) {
        Ok(origin) => origin,
        Err(error) => {
            if let Some(entry) = entry {
                entry.discard(&error);
            }
            return Err(error);
        }
    };
    let job = launch.job(origin.source());
    let started = |config: &super::VmConfig| {
        tell(Told::Started(config.id.clone()));
        let _ = maker.shutdown(std::net::Shutdown::Both);
    };
    let outcome = match entry {
        None => {
            let entry =
                Registry::open(&paths)?.create(job::config(&job, &Plan::of(&job)?), job.launch)?;
            host_in(entry, &paths, job, &mut log, started, &mut note)?
        }
        Some(entry) => host_in(entry, &paths, job, &mut log, started, &mut note)?,
    };
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
