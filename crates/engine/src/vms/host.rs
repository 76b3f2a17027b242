//! The process of one virtual machine: its command from start to end, and all that the outside may
//! ask of it meanwhile.

use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex};
use skerry_confine::Role;
use skerry_machine::Outcome;
use skerry_oci::Image;
use skerry_protocol::host::{ExecHandle, ExecSession, HostError};
use skerry_protocol::message::{ExecRequest, ExitStatus};

use super::control::{self, Reply};
use super::ready::{self, ReadyMark};
use super::registry::{Entry, Registry, Status, VmConfig, now};
use super::serve;
use crate::command::{self, Surroundings};
use crate::confinement::{self, Strictness};
use crate::error::EngineError;
use crate::frozen::{About, CommandAbout, Frozen};
use crate::paths::Paths;
use crate::run::{RunIo, RunOutcome, RunSpec};
use crate::statistics::Statistics;
use crate::vm::{GuestStream, ResumeSpec, Vm, lost};

/// The agent's number for the first command of a machine.
const FIRST_SESSION: u32 = 1;

/// What a virtual machine begins with.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A start of an image.
    Image {
        /// The image.
        image: &'a Image,
        /// How the user calls it.
        name: &'a str,
    },
    /// Where another machine was.
    Frozen {
        /// Its state.
        frozen: &'a Frozen,
        /// The snapshot or machine.
        parent: &'a str,
    },
}

/// A virtual machine to be, and its command.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// What it begins with.
    pub source: Source<'a>,
    /// The machine and its command; of one that goes on, only what [`ResumeSpec`] has. Without a
    /// command, that goes on which was running.
    pub spec: &'a RunSpec,
    /// Its name; empty for any.
    pub name: &'a str,
    /// It is forgotten when it ends.
    pub auto_remove: bool,
    /// It runs behind no terminal.
    pub detached: bool,
    /// This process is the machine's own, and is confined to it for good.
    pub own_process: bool,
    /// What its processors have done is put here when it has ended.
    pub statistics: Option<&'a OnceLock<Statistics>>,
}

/// The command of a machine to be.
struct Plan {
    argv: Vec<String>,
    /// `None`: the one that runs already goes on.
    request: Option<ExecRequest>,
    /// The agent's number for it.
    session: u32,
    tty: bool,
    stdin: bool,
    surroundings: Surroundings,
}

impl Plan {
    fn of(job: &Job<'_>) -> Result<Self, EngineError> {
        let spec = &job.spec.command;
        let (argv, found, session) = match job.source {
            Source::Image { image, name } => {
                let argv = command::argv(&image.config, spec);
                if argv.is_empty() {
                    return Err(EngineError::NoCommand(name.to_owned()));
                }
                (argv, Surroundings::of(&image.config), FIRST_SESSION)
            }
            Source::Frozen { frozen, parent } => {
                let about = &frozen.about;
                match &about.command {
                    Some(command) if spec.command.is_empty() => {
                        return Ok(Self {
                            argv: command.argv.clone(),
                            request: None,
                            session: command.session,
                            tty: command.tty,
                            stdin: command.stdin,
                            surroundings: about.surroundings.clone(),
                        });
                    }
                    None if spec.command.is_empty() => {
                        return Err(EngineError::NothingRuns(parent.to_owned()));
                    }
                    running => {
                        let session = running.as_ref().map_or(0, |command| command.session);
                        let argv = spec.command.clone();
                        (
                            argv,
                            about.surroundings.clone(),
                            session.wrapping_add(FIRST_SESSION),
                        )
                    }
                }
            }
        };
        Ok(Self {
            request: Some(command::request(argv.clone(), &found, spec)),
            argv,
            session,
            tty: spec.tty.is_some(),
            stdin: spec.stdin,
            surroundings: found.with(spec),
        })
    }

    fn about(&self) -> CommandAbout {
        CommandAbout {
            argv: self.argv.clone(),
            tty: self.tty,
            stdin: self.stdin,
            session: self.session,
        }
    }
}

/// What the registry keeps of a machine.
fn config(job: &Job<'_>, plan: &Plan) -> VmConfig {
    let options = &job.spec.vm.options;
    let (image, memory, cpus, parent) = match job.source {
        Source::Image { name, .. } => (name, options.memory, options.cpus, None),
        Source::Frozen { frozen, parent } => {
            let About { machine, image, .. } = &frozen.about;
            (
                image.name.as_str(),
                machine.memory,
                machine.cpus,
                Some(parent),
            )
        }
    };
    VmConfig {
        id: String::new(),
        name: job.name.to_owned(),
        image: image.to_owned(),
        command: plan.argv.clone(),
        surroundings: plan.surroundings.clone(),
        tty: plan.tty,
        memory,
        cpus,
        parent: parent.map(str::to_owned),
        auto_remove: job.auto_remove,
        detached: job.detached,
        created: 0,
        ready_mark: job.spec.ready.clone(),
    }
}

/// What the threads of a machine's process share.
pub(super) struct Hosted {
    pub(super) vm: Vm,
    pub(super) paths: Paths,
    pub(super) confine: Strictness,
    command: OnceLock<ExecHandle<GuestStream>>,
    entry: Mutex<Option<Entry>>,
    killed: AtomicBool,
    end: Mutex<End>,
    changed: Condvar,
}

#[derive(Default)]
struct End {
    ready: bool,
    code: Option<u8>,
    /// Those who wait to be told.
    waiting: usize,
}

/// Runs a virtual machine in this process until its command has ended. `io` is asked for the
/// command's streams once there is a place for them; `started` is called when the command runs.
pub fn host(
    paths: &Paths,
    job: Job<'_>,
    io: impl FnOnce(&Entry) -> Result<RunIo, EngineError>,
    started: impl FnOnce(&VmConfig),
    note: &mut dyn FnMut(&str),
) -> Result<RunOutcome, EngineError> {
    let plan = Plan::of(&job)?;
    let entry = Registry::open(paths)?.create(config(&job, &plan))?;
    let began = listen(&entry).and_then(|listener| {
        if job.own_process {
            confinement::of_vm(paths, &job.spec.vm, &[entry.folder()])?;
        }
        // Its threads begin after that.
        let io = io(&entry)?;
        Ok((begin(paths, &job, note)?, listener, io))
    });
    let (vm, listener, io) = match began {
        Ok(began) => began,
        // It never was: whoever asked for it is told why.
        Err(error) => {
            entry.discard();
            return Err(error);
        }
    };
    let hosted = Arc::new(Hosted {
        vm,
        paths: paths.clone(),
        confine: job.spec.vm.options.confine,
        command: OnceLock::new(),
        entry: Mutex::new(Some(entry)),
        killed: AtomicBool::new(false),
        end: Mutex::default(),
        changed: Condvar::new(),
    });
    let server = serve::start(listener, hosted.clone());
    let result = server.and_then(|_server| hosted.run(plan, job.spec.ready.as_ref(), io, started));
    if let Some(place) = job.statistics {
        let _ = place.set(hosted.vm.statistics());
    }
    hosted.finish(result)
}

/// Starts the machine.
fn begin(paths: &Paths, job: &Job<'_>, note: &mut dyn FnMut(&str)) -> Result<Vm, EngineError> {
    let spec = &job.spec.vm;
    match job.source {
        Source::Image { image, name } => Vm::start(paths, image, name, spec, note),
        Source::Frozen { frozen, .. } => {
            let spec = ResumeSpec {
                hypervisor: spec.options.hypervisor,
                soft: spec.options.soft.clone(),
                time_limit: spec.options.time_limit,
                hostname: spec.hostname.clone(),
                network: spec.network.clone(),
                show_console: spec.show_console,
                rewindable: false,
                sampled: spec.sampled,
            };
            Vm::resume(paths, frozen, &spec, note)
        }
    }
}

fn listen(entry: &Entry) -> Result<UnixListener, EngineError> {
    let failed = EngineError::host("listen at a virtual machine's socket");
    control::listen(&entry.control()).map_err(failed)
}

/// What the waiting thread is told.
enum Ended {
    Command(Result<ExitStatus, HostError>),
    Machine(Outcome),
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), EngineError> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    let thread = thread.spawn(body).map(drop);
    thread.map_err(EngineError::host("start a thread"))
}

impl Hosted {
    /// Runs the command and waits for the first end.
    fn run(
        self: &Arc<Self>,
        plan: Plan,
        mark: Option<&ReadyMark>,
        io: RunIo,
        started: impl FnOnce(&VmConfig),
    ) -> Result<RunOutcome, EngineError> {
        let io = ready::watch(self, mark, io);
        let surroundings = plan.surroundings.clone();
        let (sender, receiver) = mpsc::channel();
        let watched = self.vm.clone();
        let machine = sender.clone();
        spawn("run-watcher", move || {
            let outcome = watched.wait();
            drop(watched);
            let _ = machine.send(Ended::Machine(outcome));
        })?;
        let outcome = match self.start(plan, io, sender) {
            Ok(()) => self
                .update(|entry| {
                    entry.update(|state| {
                        state.status = state.under_way();
                        state.started = Some(now());
                    })?;
                    started(&entry.config);
                    Ok(())
                })
                .and_then(|()| self.begin_probes(mark, surroundings))
                .and_then(|()| self.first_end(&receiver)),
            Err(HostError::NotStarted(failure)) => Ok(RunOutcome::NotStarted(failure)),
            Err(error) => Err(self.vm.explain(error)),
        };
        if let Err(error) = self.vm.note_working_set(&self.paths) {
            tracing::debug!(%error, "no working set is noted");
        }
        self.vm.kill();
        // The machine's threads, memory and files are gone when the watcher has told the end.
        while let Ok(ended) = receiver.recv() {
            if let Ended::Machine(_) = ended {
                break;
            }
        }
        outcome
    }

    /// Starts the command, or takes up the one that runs, with threads for its streams.
    fn start(&self, plan: Plan, io: RunIo, ended: Sender<Ended>) -> Result<(), HostError> {
        let session = self
            .vm
            .command(plan.about(), &plan.surroundings, plan.request)?;
        let _ = self.command.set(session.handle());
        let vm = self.vm.clone();
        attach(session, io, move |result| {
            vm.command_ended();
            drop(vm);
            // The receiver is gone only when the machine's end was told first.
            let _ = ended.send(Ended::Command(result));
        })
    }

    /// Has a thread find out when the machine is ready, if it takes one.
    fn begin_probes(
        self: &Arc<Self>,
        mark: Option<&ReadyMark>,
        surroundings: Surroundings,
    ) -> Result<(), EngineError> {
        let Some(ReadyMark::Shell(shell)) = mark.cloned() else {
            return Ok(());
        };
        let hosted = self.clone();
        spawn("run-ready", move || {
            ready::probe(&hosted, &shell, &surroundings);
        })
    }

    /// The end that comes first, as the result of the run.
    fn first_end(&self, receiver: &Receiver<Ended>) -> Result<RunOutcome, EngineError> {
        match receiver.recv() {
            Ok(Ended::Command(Ok(status))) => Ok(RunOutcome::Ended(status)),
            Ok(Ended::Command(Err(HostError::NotStarted(failure)))) => {
                Ok(RunOutcome::NotStarted(failure))
            }
            Ok(Ended::Command(Err(error))) => {
                // If the connection broke because the machine ends, that is what counts.
                if self.vm.machine().is_ending()
                    && let Ok(Ended::Machine(outcome)) = receiver.recv()
                {
                    return self.machine_ended(&outcome);
                }
                Err(error.into())
            }
            Ok(Ended::Machine(outcome)) => self.machine_ended(&outcome),
            Err(_) => Err(EngineError::GuestEnded("its threads are gone".to_owned())),
        }
    }

    fn machine_ended(&self, outcome: &Outcome) -> Result<RunOutcome, EngineError> {
        if self.killed.load(Ordering::SeqCst) {
            const SIGKILL: u8 = 9;
            return Ok(RunOutcome::Ended(ExitStatus::Signal {
                signal: SIGKILL,
                core: false,
            }));
        }
        match self.vm.end(outcome) {
            EngineError::TimedOut => Ok(RunOutcome::TimedOut),
            error => Err(error),
        }
    }

    /// The machine's name.
    pub(super) fn name(&self) -> String {
        let entry = self.entry.lock();
        entry
            .as_ref()
            .map(|entry| entry.config.name.clone())
            .unwrap_or_default()
    }

    /// Changes the entry, unless the end has been noted.
    pub(super) fn update(
        &self,
        change: impl FnOnce(&mut Entry) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        self.entry.lock().as_mut().map_or(Ok(()), change)
    }

    /// Notes the end and tells those who wait for it.
    fn finish(&self, result: Result<RunOutcome, EngineError>) -> Result<RunOutcome, EngineError> {
        let code = result.as_ref().map_or(125, RunOutcome::code);
        let error = result.as_ref().err().map(ToString::to_string);
        let noted = match self.entry.lock().take() {
            Some(entry) => entry.finish(|state| {
                state.status = match error {
                    Some(_) => Status::Failed,
                    None => Status::Stopped,
                };
                state.exit_code = Some(code);
                state.error = error;
            }),
            None => Ok(()),
        };
        let mut end = self.end.lock();
        end.code = Some(code);
        self.changed.notify_all();
        // Their answers are on their way out of this process, which may end next.
        let patience = std::time::Instant::now() + std::time::Duration::from_secs(1);
        while end.waiting > 0 && !self.changed.wait_until(&mut end, patience).timed_out() {}
        drop(end);
        noted.and(result)
    }

    /// Waits for the command's end and has `tell` tell it.
    pub(super) fn tell_end(&self, tell: impl FnOnce(u8)) {
        self.tell_when(|end| end.code, tell);
    }

    /// Waits until the machine is ready, or has ended, and has `tell` tell that.
    pub(super) fn tell_ready(&self, tell: impl FnOnce(Reply)) {
        let reply = |end: &End| match (end.ready, end.code) {
            (true, _) => Some(Reply::Done),
            (false, Some(code)) => Some(Reply::Ended(code)),
            (false, None) => None,
        };
        self.tell_when(reply, tell);
    }

    /// Waits until there is something to tell, and has `tell` tell it before the end of this process.
    fn tell_when<T>(&self, ready: impl Fn(&End) -> Option<T>, tell: impl FnOnce(T)) {
        let mut end = self.end.lock();
        end.waiting += 1;
        let told = loop {
            match ready(&end) {
                Some(told) => break told,
                None => self.changed.wait(&mut end),
            }
        };
        drop(end);
        tell(told);
        self.end.lock().waiting -= 1;
        self.changed.notify_all();
    }

    /// Notes that the machine is ready, and tells those who wait for it.
    pub(super) fn become_ready(&self) {
        let noted = self.update(|entry| {
            entry.update(|state| {
                state.ready.get_or_insert_with(now);
                if state.status == Status::Running {
                    state.status = Status::Ready;
                }
            })
        });
        if let Err(error) = noted {
            tracing::warn!(%error, "that the machine is ready is not noted");
        }
        self.end.lock().ready = true;
        self.changed.notify_all();
    }

    /// Whether the command has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.vm.machine().is_ending() || self.end.lock().code.is_some()
    }

    /// Sends a signal to the command.
    pub(super) fn signal(&self, signal: u8) -> Result<(), EngineError> {
        match self.command.get() {
            Some(command) => Ok(command.signal(signal)?),
            None => Err(EngineError::GuestEnded("its command never ran".to_owned())),
        }
    }

    /// Ends the machine at once, as SIGKILL does.
    pub(super) fn kill(&self) {
        self.killed.store(true, Ordering::SeqCst);
        self.vm.kill();
    }
}

/// Passes a command's streams, signals and sizes in threads of their own; tells its end.
fn attach(
    session: ExecSession<GuestStream>,
    io: RunIo,
    ended: impl FnOnce(Result<ExitStatus, HostError>) + Send + 'static,
) -> Result<(), HostError> {
    let [mut stdout, mut stderr] = io.feed(&session).map_err(lost)?;
    let thread = std::thread::Builder::new().name("run-output".to_owned());
    let thread = thread.spawn(move || {
        skerry_confine::enter(Role::Stream);
        ended(session.wait(&mut stdout, &mut stderr));
    });
    thread.map(drop).map_err(lost)
}
