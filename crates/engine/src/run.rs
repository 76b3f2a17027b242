//! `skerry run`: one command from an image, in a machine of its own.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::sync::mpsc::Receiver;

use serde::{Deserialize, Serialize};
use skerry_confine::Role;
use skerry_oci::Image;
use skerry_protocol::Transport;
use skerry_protocol::host::{ExecHandle, ExecSession};
use skerry_protocol::message::{ExecFailure, ExitStatus, WinSize};

use crate::command::CommandSpec;
use crate::error::EngineError;
use crate::paths::Paths;
use crate::vm::VmSpec;
use crate::vms::{Job, ReadyMark, RestartPolicy, Source, host};

/// Exit status of a run whose time limit passed, as `timeout` has it.
const TIMED_OUT: u8 = 124;

/// What to run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct RunSpec {
    /// The machine.
    pub vm: VmSpec,
    /// The command.
    pub command: CommandSpec,
    /// By what the machine is known to be ready.
    pub ready: Option<ReadyMark>,
    /// What the user notes about the machine.
    pub labels: BTreeMap<String, String>,
    /// When the machine is started again without being asked.
    pub restart: RestartPolicy,
}

/// What happens to the command from outside while it runs.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A signal to pass on.
    Signal(u8),
    /// The terminal has another size.
    Resize(WinSize),
}

/// The command's streams.
pub struct RunIo {
    /// Input; `None` is an empty one.
    pub stdin: Option<Box<dyn Read + Send>>,
    /// Output.
    pub stdout: Box<dyn Write + Send>,
    /// Errors; unused with a terminal.
    pub stderr: Box<dyn Write + Send>,
    /// Signals and sizes.
    pub events: Option<Receiver<Event>>,
}

impl fmt::Debug for RunIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunIo").finish_non_exhaustive()
    }
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunOutcome {
    /// By itself, or by a signal.
    Ended(ExitStatus),
    /// It could not be started.
    NotStarted(ExecFailure),
    /// The machine's time limit passed.
    TimedOut,
}

impl RunOutcome {
    /// The exit status for it, as a shell has it.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Ended(status) => status.shell_code(),
            Self::NotStarted(failure) => failure.kind.shell_code(),
            Self::TimedOut => TIMED_OUT,
        }
    }
}

/// Runs a command from `image`, which the user calls `name`; returns when it has ended and its
/// machine is gone.
pub fn run(
    paths: &Paths,
    image: &Image,
    name: &str,
    spec: &RunSpec,
    io: RunIo,
    note: &mut dyn FnMut(&str),
) -> Result<RunOutcome, EngineError> {
    let job = Job {
        source: Source::Image { image, name },
        spec,
        name: "",
        auto_remove: true,
        detached: false,
        launch: None,
        own_process: false,
        statistics: None,
    };
    host(paths, job, |_| Ok(io), |_| {}, note)
}

impl RunIo {
    /// Has threads of their own pass input, signals and sizes on to a command; gives what takes its
    /// output and its errors.
    pub(crate) fn feed<T: Transport>(
        self,
        session: &ExecSession<T>,
    ) -> io::Result<[Box<dyn Write + Send>; 2]> {
        if let Some(stdin) = self.stdin {
            session.pump_stdin(stdin)?;
        }
        if let Some(events) = self.events {
            let handle = session.handle();
            let thread = std::thread::Builder::new().name("run-events".to_owned());
            thread.spawn(move || {
                skerry_confine::enter(Role::Stream);
                pass_events(&events, &handle);
            })?;
        }
        Ok([self.stdout, self.stderr])
    }
}

/// Passes signals and sizes on until either side is gone.
fn pass_events<T: Transport>(events: &Receiver<Event>, handle: &ExecHandle<T>) {
    while let Ok(event) = events.recv() {
        let passed = match event {
            Event::Signal(signal) => handle.signal(signal),
            Event::Resize(size) => handle.resize(size),
        };
        if passed.is_err() {
            return;
        }
    }
}
