//! The process of one virtual machine: its command from start to end, as often as that is run, and all
//! that the outside may ask of it meanwhile.
//!
//! ```text
//!  host ─► Hosted ─┬─ live: Vm, command, end ◄─┐
//!                  │        `── its restart policy applies: a pause
//!                  └─ finish: state, those who wait
//! ```

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use skerry_confine::Role;
use skerry_machine::Outcome;
use skerry_protocol::host::{ExecHandle, ExecSession, HostError};
use skerry_protocol::message::{ExitStatus, WinSize};

use super::control::{self, Reply};
use super::info::{Status, VmConfig};
use super::input::Input;
use super::job::{Job, Plan, Source, config};
use super::ready::{self, ReadyMark};
use super::registry::{Entry, Registry, now};
use super::restart::Pauses;
use super::serve;
use crate::command::Surroundings;
use crate::confinement::{self, Strictness};
use crate::error::EngineError;
use crate::mounts;
use crate::paths::Paths;
use crate::resources;
use crate::run::{RunIo, RunOutcome};
use crate::vm::{GuestStream, ResumeSpec, Vm, VmSpec, lost};

/// How long a guest may take to write its disk back before it ends.
const WRITING_BACK: Duration = Duration::from_secs(30);
/// The same, where it is to end at once.
const WRITING_BACK_AT_ONCE: Duration = Duration::from_secs(1);

/// What the threads of a machine's process share.
pub(super) struct Hosted {
    pub(super) paths: Paths,
    pub(super) confine: Strictness,
    /// How much of the host's processors it may take.
    pub(super) nano_cpus: Option<u64>,
    entry: Mutex<Option<Entry>>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

/// A machine from its start to its end.
pub(super) struct Life {
    pub(super) vm: Vm,
    command: OnceLock<ExecHandle<GuestStream>>,
    /// Where standard input comes from, unless it is this process's own.
    pub(super) input: Option<Input>,
    /// Its disk outlives it.
    kept: bool,
    killed: AtomicBool,
}

#[derive(Default)]
struct Progress {
    /// The machine, while there is one.
    life: Option<Arc<Life>>,
    /// It waits to be started again.
    resting: bool,
    /// Somebody has had it end: it isn't started again.
    ending: bool,
    /// Somebody had it end at once while there was no machine to be ended.
    killed: bool,
    ready: bool,
    /// Why a disk of the machine's failed a request.
    disk_failure: Option<String>,
    code: Option<u8>,
    /// Those who wait to be told.
    waiting: usize,
}

/// Runs a virtual machine in this process until its command has ended, and isn't to be started again.
/// `io` is asked for the command's streams once there is a place for them; `started` is called when
/// the command runs.
pub fn host(
    paths: &Paths,
    job: Job<'_>,
    io: impl FnOnce(&Entry) -> Result<RunIo, EngineError>,
    started: impl FnOnce(&VmConfig),
    note: &mut dyn FnMut(&str),
) -> Result<RunOutcome, EngineError> {
    let plan = Plan::of(&job)?;
    let entry = Registry::open(paths)?.create(config(&job, &plan), job.launch)?;
    let mut io = Some(io);
    let mut io = |entry: &Entry| match io.take() {
        Some(io) => io(entry),
        None => Err(EngineError::GuestEnded("its streams are gone".to_owned())),
    };
    host_in(entry, paths, job, &mut io, started, note)
}

/// The same for a machine that has its place.
pub(super) fn host_in(
    entry: Entry,
    paths: &Paths,
    job: Job<'_>,
    io: &mut dyn FnMut(&Entry) -> Result<RunIo, EngineError>,
    started: impl FnOnce(&VmConfig),
    note: &mut dyn FnMut(&str),
) -> Result<RunOutcome, EngineError> {
    let mut spec = job.spec.clone();
    let named = mounts::name_volumes(paths, &mut spec.vm.mounts, &entry.config.id);
    let job = Job { spec: &spec, ..job };
    let listener = named.and_then(|()| listen(&entry)).and_then(|listener| {
        if job.own_process {
            if job.detached {
                skerry_confine::last_words(entry.last_words()?);
            }
            job.spec.vm.options.bound_process()?;
            confinement::of_vm(paths, &job.spec.vm, &[entry.folder()])?;
        }
        Ok(listener)
    });
    let listener = match listener {
        Ok(listener) => listener,
        Err(error) => {
            entry.discard(&error);
            return Err(error);
        }
    };
    let hosted = Arc::new(Hosted {
        paths: paths.clone(),
        confine: job.spec.vm.options.confine,
        nano_cpus: job.spec.vm.options.nano_cpus,
        entry: Mutex::new(Some(entry)),
        progress: Mutex::default(),
        changed: Condvar::new(),
    });
    let _server = serve::start(listener, hosted.clone()).map_err(|error| hosted.discard(error))?;
    let mut started = Some(started);
    let mut started = |config: &VmConfig| {
        if let Some(started) = started.take() {
            started(config);
        }
    };
    let mut pauses = Pauses::new();
    let mut first = true;
    let result = loop {
        let born = Instant::now();
        let result = match hosted.come_to_life(&job, io, note) {
            Ok((life, plan, io)) => {
                let mark = job.spec.ready.as_ref();
                let result = hosted.run(&life, plan, mark, io, &mut started);
                if let Some(place) = job.statistics {
                    let _ = place.set(life.vm.statistics());
                }
                result
            }
            // It never was: whoever asked for it is told why.
            Err(error) if first => return Err(hosted.discard(error)),
            Err(error) => Err(error),
        };
        first = false;
        hosted.progress.lock().life = None;
        if !hosted.rest(&result, &job, pauses.after(born.elapsed())) {
            break result;
        }
    };
    hosted.finish(result)
}

/// Starts the machine.
fn begin(
    paths: &Paths,
    job: &Job<'_>,
    names: &[String],
    kept: Option<PathBuf>,
    note: &mut dyn FnMut(&str),
) -> Result<Vm, EngineError> {
    let spec = &mut job.spec.vm.clone();
    let hostname = spec.hostname.clone();
    let names = names.iter().map(String::as_str);
    spec.network.known_as(names.chain(hostname.as_deref()));
    match job.source {
        Source::Image { image, name } => {
            let spec = VmSpec {
                kept,
                ..spec.clone()
            };
            Vm::start(paths, image, name, &spec, note)
        }
        Source::Frozen { frozen, .. } => {
            resources::check(spec, None)?;
            let resume = ResumeSpec {
                hypervisor: spec.options.hypervisor,
                soft: spec.options.soft.clone(),
                time_limit: spec.options.time_limit,
                hostname: spec.hostname.clone(),
                network: spec.network.clone(),
                mounts: spec.mounts.clone(),
                show_console: spec.show_console,
                rewindable: false,
                sampled: spec.sampled,
                nano_cpus: spec.options.nano_cpus,
                pids_limit: spec.pids_limit,
            };
            Vm::resume(paths, frozen, &resume, note)
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

impl Life {
    /// Ends the machine at once, as SIGKILL does; what is kept of its disk is written back first, if
    /// that is done soon.
    fn kill(&self) {
        self.killed.store(true, Ordering::SeqCst);
        if self.kept && !self.vm.machine().is_paused() && !self.vm.machine().is_ending() {
            self.write_back(WRITING_BACK_AT_ONCE);
        }
        self.vm.settle();
        self.vm.kill();
    }

    /// Tells the command that its terminal has another size.
    pub(super) fn resize(&self, size: WinSize) -> Result<(), EngineError> {
        match self.command.get() {
            Some(command) => Ok(command.resize(size)?),
            None => Err(EngineError::GuestEnded("its command never ran".to_owned())),
        }
    }

    /// Has the guest write its disk back.
    fn write_back(&self, limit: Duration) {
        if let Err(error) = self.vm.sync(limit) {
            tracing::debug!(%error, "the guest's disk is not written back");
        }
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
}

impl Hosted {
    /// Starts the machine, and makes it known.
    fn come_to_life(
        &self,
        job: &Job<'_>,
        io: &mut dyn FnMut(&Entry) -> Result<RunIo, EngineError>,
        note: &mut dyn FnMut(&str),
    ) -> Result<(Arc<Life>, Plan, RunIo), EngineError> {
        let plan = Plan::of(job)?;
        let mut kept = None;
        if job.launch.is_some() && !job.spec.vm.read_only {
            self.update(|entry| {
                kept = Some(entry.folder());
                Ok(())
            })?;
        }
        let is_kept = kept.is_some() && matches!(job.source, Source::Image { .. });
        // What others on its networks find it by.
        let mut names = Vec::new();
        self.update(|entry| {
            const SHORT: usize = 12;
            let config = &entry.config;
            names.push(config.name.clone());
            names.extend(config.id.get(..SHORT).map(str::to_owned));
            Ok(())
        })?;
        let vm = begin(&self.paths, job, &names, kept, note)?;
        if let Some(name) = names.first() {
            vm.note_name(name);
        }
        let mut streams = None;
        self.update(|entry| {
            streams = Some(io(entry)?);
            Ok(())
        })?;
        let Some(mut io) = streams else {
            return Err(EngineError::GuestEnded("its place is gone".to_owned()));
        };
        let input = match &io.stdin {
            None if plan.stdin => {
                let (input, stdin) = Input::new().map_err(EngineError::host("make a socket"))?;
                io.stdin = Some(Box::new(stdin));
                Some(input)
            }
            _ => None,
        };
        let life = Arc::new(Life {
            vm,
            command: OnceLock::new(),
            input,
            kept: is_kept,
            killed: AtomicBool::new(false),
        });
        let mut progress = self.progress.lock();
        progress.life = Some(life.clone());
        let killed = progress.killed;
        drop(progress);
        self.changed.notify_all();
        if killed {
            life.kill();
        }
        Ok((life, plan, io))
    }

    /// Runs the command and waits for the first end.
    fn run(
        self: &Arc<Self>,
        life: &Arc<Life>,
        plan: Plan,
        mark: Option<&ReadyMark>,
        io: RunIo,
        started: &mut dyn FnMut(&VmConfig),
    ) -> Result<RunOutcome, EngineError> {
        let io = ready::watch(self, life, mark, io)?;
        let surroundings = plan.surroundings.clone();
        let (sender, receiver) = mpsc::channel();
        let watched = life.vm.clone();
        let machine = sender.clone();
        spawn("run-watcher", move || {
            let outcome = watched.wait();
            drop(watched);
            let _ = machine.send(Ended::Machine(outcome));
        })?;
        let outcome = match life.start(plan, io, sender) {
            Ok(()) => self
                .update(|entry| {
                    entry.update(|state| {
                        state.status = state.under_way();
                        state.started = Some(now());
                        state.exit_code = None;
                        state.error = None;
                    })?;
                    entry.note("start", &[]);
                    started(&entry.config);
                    Ok(())
                })
                .and_then(|()| self.begin_probes(life, mark, surroundings))
                .and_then(|()| life.first_end(&receiver)),
            Err(HostError::NotStarted(failure)) => Ok(RunOutcome::NotStarted(failure)),
            Err(error) => Err(life.vm.explain(error)),
        };
        if let Err(error) = life.vm.note_working_set(&self.paths) {
            tracing::debug!(%error, "no working set is noted");
        }
        if life.kept && !life.vm.machine().is_ending() {
            life.write_back(WRITING_BACK);
        }
        life.vm.settle();
        life.vm.kill();
        if let Some(failure) = life.vm.machine().virtio().disk_failure() {
            self.progress.lock().disk_failure = Some(failure.to_owned());
        }
        if let Some(input) = &life.input {
            input.end();
        }
        // The machine's threads, memory and files are gone when the watcher has told the end.
        while let Ok(ended) = receiver.recv() {
            if let Ended::Machine(_) = ended {
                break;
            }
        }
        outcome
    }

    /// Has a thread find out when the machine is ready, if it takes one.
    fn begin_probes(
        self: &Arc<Self>,
        life: &Arc<Life>,
        mark: Option<&ReadyMark>,
        surroundings: Surroundings,
    ) -> Result<(), EngineError> {
        let Some(argv) = mark.and_then(ReadyMark::probe) else {
            return Ok(());
        };
        let (hosted, life) = (self.clone(), life.clone());
        spawn("run-ready", move || {
            ready::probe(&hosted, &life, argv, &surroundings);
        })
    }

    /// Waits before a new start, if there is to be one.
    fn rest(
        &self,
        result: &Result<RunOutcome, EngineError>,
        job: &Job<'_>,
        pause: Duration,
    ) -> bool {
        let code = code(result);
        self.note("die", &[("exit_code", code.to_string())]);
        let ending = |progress: &Progress| progress.ending || progress.killed;
        if ending(&self.progress.lock()) {
            return false;
        }
        let mut again = false;
        let noted = self.update(|entry| {
            let restarts = entry.state().restarts;
            again = job.spec.restart.applies(code, restarts);
            if !again {
                return Ok(());
            }
            entry.update(|state| {
                state.status = Status::Starting;
                state.ready = None;
                state.finished = Some(now());
                state.exit_code = Some(code);
                state.error = result.as_ref().err().map(ToString::to_string);
                state.restarts = restarts.saturating_add(1);
            })
        });
        if let Err(error) = noted {
            tracing::warn!(%error, "that the machine is started again is not noted");
        }
        if !again {
            return false;
        }
        let until = Instant::now() + pause;
        let mut progress = self.progress.lock();
        progress.ready = false;
        progress.resting = true;
        self.changed.notify_all();
        while !ending(&progress) && !self.changed.wait_until(&mut progress, until).timed_out() {}
        progress.resting = false;
        !ending(&progress)
    }

    /// The machine, as soon as there is one.
    pub(super) fn life(&self) -> Result<Arc<Life>, EngineError> {
        let mut progress = self.progress.lock();
        loop {
            match &progress.life {
                Some(life) => return Ok(life.clone()),
                None if progress.code.is_some() => {
                    return Err(EngineError::GuestEnded("its command never ran".to_owned()));
                }
                None if progress.resting => return Err(EngineError::VmRests),
                None => self.changed.wait(&mut progress),
            }
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

    /// Notes the machine's new name.
    pub(super) fn renamed(&self, name: &str) {
        if let Some(life) = &self.progress.lock().life {
            life.vm.note_name(name);
        }
    }

    /// Changes the entry, unless the end has been noted.
    pub(super) fn update(
        &self,
        change: impl FnOnce(&mut Entry) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        self.entry.lock().as_mut().map_or(Ok(()), change)
    }

    /// Takes back that there is a machine: it can't be, for this reason, which is given back.
    fn discard(&self, why: EngineError) -> EngineError {
        if let Some(entry) = self.entry.lock().take() {
            entry.discard(&why);
        }
        self.tell_code(125);
        why
    }

    /// Notes the end and tells those who wait for it.
    fn finish(&self, result: Result<RunOutcome, EngineError>) -> Result<RunOutcome, EngineError> {
        let code = code(&result);
        let error = result.as_ref().err().map(ToString::to_string);
        let failure = self.progress.lock().disk_failure.clone();
        let noted = match self.entry.lock().take() {
            Some(entry) => entry.finish(|state| {
                state.status = match error {
                    Some(_) => Status::Failed,
                    None => Status::Stopped,
                };
                state.exit_code = Some(code);
                state.error = error.or(failure);
            }),
            None => Ok(()),
        };
        self.tell_code(code);
        noted.and(result)
    }

    /// Tells the end to those who wait for it.
    fn tell_code(&self, code: u8) {
        let mut progress = self.progress.lock();
        progress.code = Some(code);
        self.changed.notify_all();
        // Their answers are on their way out of this process, which may end next.
        let patience = Instant::now() + Duration::from_secs(1);
        while progress.waiting > 0 && !self.changed.wait_until(&mut progress, patience).timed_out()
        {
        }
    }

    /// Waits for the command's end and has `tell` tell it.
    pub(super) fn tell_end(&self, tell: impl FnOnce(u8)) {
        self.tell_when(|progress| progress.code, tell);
    }

    /// Waits until the machine is ready, or has ended, and has `tell` tell that.
    pub(super) fn tell_ready(&self, tell: impl FnOnce(Reply)) {
        let reply = |progress: &Progress| match (progress.ready, progress.code) {
            (true, _) => Some(Reply::Done),
            (false, Some(code)) => Some(Reply::Ended(code)),
            (false, None) => None,
        };
        self.tell_when(reply, tell);
    }

    /// Waits until there is something to tell, and has `tell` tell it before the end of this process.
    fn tell_when<T>(&self, ready: impl Fn(&Progress) -> Option<T>, tell: impl FnOnce(T)) {
        let mut progress = self.progress.lock();
        progress.waiting += 1;
        let told = loop {
            match ready(&progress) {
                Some(told) => break told,
                None => self.changed.wait(&mut progress),
            }
        };
        drop(progress);
        tell(told);
        self.progress.lock().waiting -= 1;
        self.changed.notify_all();
    }

    /// Notes that the machine is ready, and tells those who wait for it.
    pub(super) fn become_ready(&self, life: &Arc<Life>) {
        let is_this = |progress: &Progress| {
            let now = progress.life.as_ref();
            now.is_some_and(|now| Arc::ptr_eq(now, life))
        };
        if !is_this(&self.progress.lock()) {
            return;
        }
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
        self.progress.lock().ready = true;
        self.changed.notify_all();
        self.note("ready", &[]);
    }

    /// Notes what has happened to the machine.
    pub(super) fn note(&self, action: &str, more: &[(&str, String)]) {
        if let Some(entry) = &*self.entry.lock() {
            entry.note(action, more);
        }
    }

    /// Sends a signal to the command. One that has it end is the user's word that the machine is to
    /// end for good.
    pub(super) fn signal(&self, signal: u8) -> Result<(), EngineError> {
        const SIGTERM: u8 = 15;
        self.note("kill", &[("signal", signal.to_string())]);
        if signal == SIGTERM {
            let mut progress = self.progress.lock();
            progress.ending = true;
            self.changed.notify_all();
            if progress.resting {
                return Ok(());
            }
        }
        match self.life()?.command.get() {
            Some(command) => Ok(command.signal(signal)?),
            None => Err(EngineError::GuestEnded("its command never ran".to_owned())),
        }
    }

    /// Ends the machine at once, as SIGKILL does, and for good.
    pub(super) fn kill(&self) {
        const SIGKILL: u8 = 9;
        self.note("kill", &[("signal", SIGKILL.to_string())]);
        let mut progress = self.progress.lock();
        progress.killed = true;
        self.changed.notify_all();
        let life = progress.life.clone();
        drop(progress);
        if let Some(life) = life {
            life.kill();
        }
    }
}

/// The exit status of a run, as a shell has it, or Skerry's own.
fn code(result: &Result<RunOutcome, EngineError>) -> u8 {
    result.as_ref().map_or(125, RunOutcome::code)
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
        // Its output may show that the machine is ready, which is noted in a file.
        skerry_confine::enter(Role::Control);
        ended(session.wait(&mut stdout, &mut stderr));
    });
    thread.map(drop).map_err(lost)
}
