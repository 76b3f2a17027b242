//! Virtual machines behind no terminal: started by one process, which ends, and run by another.
//!
//! ```text
//!  run -d ─► detach ── socket as its stdin ──► skerry vm-host ─► run_detached ─► host
//!            Launch ─►      ◄─ notes, then started or failed
//! ```

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::Receiver;

use serde::{Deserialize, Serialize};
use skerry_oci::Progress;
use skerry_protocol::message::ExecFailure;

use super::control::{receive, send};
use super::host::{Job, Source, host};
use super::output;
use super::registry::Entry;
use crate::error::EngineError;
use crate::images;
use crate::paths::Paths;
use crate::run::{Event, RunIo, RunOutcome, RunSpec};

/// A virtual machine to be run by another process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// Where everything is kept.
    pub root: PathBuf,
    /// The image, as the user names it.
    pub image: String,
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

fn failed(what: &'static str) -> impl Fn(std::io::Error) -> EngineError {
    move |source| EngineError::Host { what, source }
}

/// Has another process, `program vm-host`, run a virtual machine; returns once its command runs.
pub fn detach(
    program: Command,
    launch: &Launch,
    note: &mut dyn FnMut(&str),
) -> Result<Detached, EngineError> {
    let (mut own, theirs) = UnixStream::pair().map_err(failed("make a socket"))?;
    let mut program = program;
    program
        .arg("vm-host")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = program.spawn().map_err(failed("start another skerry"))?;
    // It is nobody's child soon, and until then nobody's to wait for.
    drop((child, program));
    send(&mut own, launch).map_err(failed("tell another skerry what to run"))?;
    loop {
        match receive(&mut own).map_err(failed("hear from another skerry"))? {
            Told::Note(text) => note(&text),
            Told::Started(id) => return Ok(Detached::Runs(id)),
            Told::NotStarted(failure) => return Ok(Detached::NotStarted(failure)),
            Told::Failed(reason) => return Err(EngineError::Detached(reason)),
        }
    }
}

/// The whole life of a process that [`detach`] made: its standard input is a socket to its maker.
pub fn run_detached() -> Result<(), EngineError> {
    // Away from the terminal of its maker.
    let _ = rustix::process::setsid();
    let stdin = rustix::io::dup(std::io::stdin())
        .map_err(|error| failed("use its socket")(error.into()))?;
    if let Ok(null) = std::fs::File::open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(null);
    }
    let mut maker = UnixStream::from(stdin);
    let launch: Launch = receive(&mut maker).map_err(failed("hear what to run"))?;
    let result = run(&launch, &maker);
    if let Err(error) = &result {
        let _ = send(
            &mut maker,
            &Told::Failed(skerry_hypervisor::probe::chain(error)),
        );
    }
    result
}

fn run(launch: &Launch, maker: &UnixStream) -> Result<(), EngineError> {
    let paths = Paths::at(&launch.root);
    let tell = |told: Told| {
        // Nobody may listen any more, and the machine runs all the same.
        let _ = send(&mut &*maker, &told);
    };
    let image = images::resolve(&paths, &launch.image, &mut |progress| {
        if let Some(text) = told_of(&launch.image, progress) {
            tell(Told::Note(text));
        }
    })?;
    let job = Job {
        source: Source::Image(&image),
        image: &launch.image,
        spec: &launch.spec,
        name: &launch.name,
        auto_remove: launch.auto_remove,
        detached: true,
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
    let [stdout, stderr] = output::create(&entry.log()).map_err(failed("keep a log"))?;
    let stdin: Option<Box<dyn Read + Send>> = None;
    let events: Option<Receiver<Event>> = None;
    Ok(RunIo {
        stdin,
        stdout: Box::new(stdout),
        stderr: Box::new(stderr),
        events,
    })
}
