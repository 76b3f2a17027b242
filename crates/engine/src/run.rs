//! `skerry run`: one command from an image, in a machine of its own.
//!
//! ```text
//!  image (EROFS, shared) ─┐                         ┌─► agent (PID 1) mounts root, says ready
//!  scratch (ext4, own) ───┴─► Machine ── vsock ─────┴─► exec: stdin ► ◄ stdout, stderr, status
//! ```

use std::borrow::Cow;
use std::fmt;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{SystemTime, UNIX_EPOCH};

use skerry_devices::virtio::vsock::VsockHost;
use skerry_hypervisor::probe::chain;
use skerry_machine::{
    Attachments, DiskConfig, MachineConfig, MachineHandle, MachineRemote, Outcome,
};
use skerry_oci::{Image, ImageConfig};
use skerry_protocol::host::{Control, ExecHandle, ExecSession, HostError};
use skerry_protocol::message::{
    BlockDevice, ExecFailure, ExecRequest, ExitStatus, RootSpec, Setup, Upper, WinSize,
};
use skerry_protocol::{CONTROL_PORT, EXEC_PORT};
use skerry_storage::{Access, Disk, RawDisk, scratch};

use crate::error::EngineError;
use crate::log::ConsoleLog;
use crate::machine::{MachineOptions, Prepared, prepare, start};
use crate::paths::Paths;
use crate::transport::GuestStream;
use crate::warm::{Found, Warm};
use crate::{builtin, initrd};

/// Context id of the guest on its socket device.
const GUEST_CID: u64 = 3;
/// Virtio serials by which the agent finds its disks.
const ROOT_DISK: &str = "root";
const SCRATCH_DISK: &str = "scratch";
/// The search path of a command whose image sets none, as other container tools have it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct RunSpec {
    /// The machine.
    pub options: MachineOptions,
    /// Kernel other than the built-in one.
    pub kernel: Option<PathBuf>,
    /// Command and arguments in place of the image's.
    pub command: Vec<String>,
    /// Program in place of the image's entry point.
    pub entrypoint: Option<String>,
    /// Variables on top of the image's.
    pub env: Vec<(String, String)>,
    /// Working directory in place of the image's.
    pub working_dir: Option<String>,
    /// `USER[:GROUP]` in place of the image's.
    pub user: Option<String>,
    /// A terminal of this size.
    pub tty: Option<WinSize>,
    /// The root file system can't be written.
    pub read_only: bool,
    /// Host name; `None` is `skerry`.
    pub hostname: Option<String>,
    /// The guest's console goes to stderr.
    pub show_console: bool,
    /// Boot, whether or not a start of the image was kept, and keep none.
    pub fresh: bool,
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

/// Runs a command from `image`; returns when it has ended and its machine is gone.
pub fn run(
    paths: &Paths,
    image: &Image,
    spec: RunSpec,
    io: RunIo,
    note: &mut dyn FnMut(&str),
) -> Result<RunOutcome, EngineError> {
    let request = exec_request(image, &spec, io.stdin.is_some())?;
    let console = ConsoleLog::new(spec.show_console);
    let prepared = prepare(&spec.options, note)?;
    let Started {
        handle,
        scratch,
        restored,
        warm,
    } = start_machine(paths, image, &spec, &prepared, &console, note)?;
    let remote = handle.remote().clone();
    let vsock = remote
        .virtio()
        .vsock()
        .ok_or_else(|| EngineError::GuestEnded("it has no socket device".to_owned()))?;
    let setup = setup(&spec);
    let (sender, receiver) = mpsc::channel();
    let driver = sender.clone();
    let guest = remote.clone();
    spawn("run-driver", move || {
        let listening = || {
            if restored {
                guest.resume();
            }
        };
        let ready = |vsock: &VsockHost| {
            let Some(warm) = warm.filter(|_| !restored) else {
                return;
            };
            let kept = warm_up(vsock)
                .map_err(EngineError::from)
                .and_then(|()| warm.keep(&guest, scratch.as_deref()));
            if let Err(error) = kept {
                let _ = driver.send(Ended::NotKept(error));
            }
        };
        let result = drive(&vsock, setup, request, io, listening, ready);
        // The receiver is gone only when the machine's end was told first.
        let _ = driver.send(Ended::Command(result));
    })?;
    watch(handle, sender)?;
    let result = first_end(&receiver, &remote, &console, note);
    remote.kill();
    // The machine's threads, memory and files are gone when the watcher has told the end.
    while let Ok(ended) = receiver.recv() {
        if let Ended::Machine(_) = ended {
            break;
        }
    }
    result
}

/// What the waiting thread is told.
enum Ended {
    /// Not an end: the machine's start could not be kept.
    NotKept(EngineError),
    Command(Result<ExitStatus, HostError>),
    Machine(Outcome),
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), EngineError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map(drop)
        .map_err(|source| EngineError::Host {
            what: "start a thread",
            source,
        })
}

fn watch(handle: MachineHandle, sender: Sender<Ended>) -> Result<(), EngineError> {
    spawn("run-watcher", move || {
        let outcome = handle.wait();
        drop(handle);
        let _ = sender.send(Ended::Machine(outcome));
    })
}

/// The end that comes first, as the result of the run.
fn first_end(
    receiver: &Receiver<Ended>,
    remote: &MachineRemote,
    console: &ConsoleLog,
    note: &mut dyn FnMut(&str),
) -> Result<RunOutcome, EngineError> {
    loop {
        return match receiver.recv() {
            Ok(Ended::NotKept(error)) => {
                note(&format!(
                    "the next run of this image will boot again: {}",
                    chain(&error)
                ));
                continue;
            }
            Ok(Ended::Command(Ok(status))) => Ok(RunOutcome::Ended(status)),
            Ok(Ended::Command(Err(HostError::NotStarted(failure)))) => {
                Ok(RunOutcome::NotStarted(failure))
            }
            Ok(Ended::Command(Err(error))) => {
                // If the connection broke because the machine ends, that is what counts.
                if remote.is_ending()
                    && let Ok(Ended::Machine(outcome)) = receiver.recv()
                {
                    return machine_ended(outcome, console);
                }
                Err(error.into())
            }
            Ok(Ended::Machine(outcome)) => machine_ended(outcome, console),
            Err(_) => Err(EngineError::GuestEnded("its threads are gone".to_owned())),
        };
    }
}

fn machine_ended(outcome: Outcome, console: &ConsoleLog) -> Result<RunOutcome, EngineError> {
    let reason = match outcome {
        Outcome::TimedOut => return Ok(RunOutcome::TimedOut),
        Outcome::PoweredOff => "the guest powered off".to_owned(),
        Outcome::Reset => "the guest reset itself".to_owned(),
        Outcome::DebugExit(_) | Outcome::Killed => "it was stopped".to_owned(),
        Outcome::InternalError(text) => text,
        Outcome::GuestCrash { reason, registers } => format!("{reason}\n{registers}"),
    };
    let tail = console.tail(20);
    Err(EngineError::GuestEnded(if tail.is_empty() {
        reason
    } else {
        format!("{reason}\nLast lines of its console:\n{tail}")
    }))
}

/// Meets the agent, starts the command and passes its streams. `listening` is called when the agent
/// can connect, `ready` when it has done what was to be done before the command.
fn drive(
    vsock: &VsockHost,
    setup: Setup,
    request: ExecRequest,
    io: RunIo,
    listening: impl FnOnce(),
    ready: impl FnOnce(&VsockHost),
) -> Result<ExitStatus, HostError> {
    let lost = |source| HostError::LocalStream {
        stream: "connection",
        source,
    };
    let listener = vsock.listen(CONTROL_PORT).map_err(lost)?;
    listening();
    let mut control = Control::accept(GuestStream(listener.accept().map_err(lost)?))?;
    tracing::debug!(
        agent = control.hello().agent,
        kernel = control.hello().kernel,
        "agent speaks"
    );
    control.set_up(&setup)?;
    tracing::debug!("guest is ready");
    ready(vsock);
    let stream = GuestStream(vsock.connect(EXEC_PORT).map_err(lost)?);
    let session = ExecSession::start(stream, request)?;
    let RunIo {
        stdin,
        mut stdout,
        mut stderr,
        events,
    } = io;
    if let Some(stdin) = stdin {
        session.pump_stdin(stdin).map_err(lost)?;
    }
    if let Some(events) = events {
        let handle = session.handle();
        std::thread::Builder::new()
            .name("run-events".to_owned())
            .spawn(move || pass_events(&events, &handle))
            .map_err(lost)?;
    }
    session.wait(&mut stdout, &mut stderr)
}

/// Has the guest run programs once, so that what the first ones take longer for is behind it when its
/// start is kept: the agent itself, which every guest has, and which does nothing when it isn't process
/// 1; then, where the image has one, a shell with nothing to do, for what most programs share.
fn warm_up(vsock: &VsockHost) -> Result<(), HostError> {
    let lost = |source| HostError::LocalStream {
        stream: "connection",
        source,
    };
    for argv in [&["/proc/1/exe"][..], &["/bin/sh", "-c", ":"]] {
        let stream = GuestStream(vsock.connect(EXEC_PORT).map_err(lost)?);
        let argv: Vec<String> = argv.iter().map(|&word| word.to_owned()).collect();
        let ended = ExecSession::start(stream, ExecRequest::new(argv))
            .and_then(|session| session.wait(&mut std::io::sink(), &mut std::io::sink()));
        match ended {
            Ok(_) | Err(HostError::NotStarted(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Passes signals and sizes on until either side is gone.
fn pass_events(events: &Receiver<Event>, handle: &ExecHandle<GuestStream>) {
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

/// A machine on its way to the command.
struct Started {
    handle: MachineHandle,
    /// Its writable disk.
    scratch: Option<Arc<RawDisk>>,
    /// It is paused, in the state of an earlier start.
    restored: bool,
    /// Where its start is to be kept.
    warm: Option<Warm>,
}

fn start_machine(
    paths: &Paths,
    image: &Image,
    spec: &RunSpec,
    prepared: &Prepared,
    console: &ConsoleLog,
    note: &mut dyn FnMut(&str),
) -> Result<Started, EngineError> {
    let config = machine_config(spec);
    // What the user's own kernel does when it is started is the user's to see.
    let warm = if spec.fresh || spec.kernel.is_some() {
        None
    } else {
        Some(Warm::of(paths, image, prepared, &config)?)
    };
    let setting = Setting {
        paths,
        image,
        spec,
        prepared,
        console,
        config,
    };
    if let Some(kept) = &warm {
        let resumed = kept.find().and_then(|found| {
            let found = found.map(|found| setting.start(Some(found)));
            found.transpose()
        });
        match resumed {
            Ok(Some((handle, scratch))) => {
                return Ok(Started {
                    handle,
                    scratch,
                    restored: true,
                    warm,
                });
            }
            Ok(None) => {}
            Err(error) => {
                note(&format!(
                    "booting, since the kept start of the image can't be used: {}",
                    chain(&error)
                ));
                kept.forget()?;
            }
        }
    }
    let (handle, scratch) = setting.start(None)?;
    Ok(Started {
        handle,
        scratch,
        restored: false,
        warm,
    })
}

/// What a machine is started from, booted or resumed.
struct Setting<'a> {
    paths: &'a Paths,
    image: &'a Image,
    spec: &'a RunSpec,
    prepared: &'a Prepared,
    console: &'a ConsoleLog,
    config: MachineConfig,
}

impl Setting<'_> {
    /// Starts the machine: paused, in the state of an earlier start, or from its kernel. Gives its
    /// writable disk with it.
    fn start(
        &self,
        found: Option<Found>,
    ) -> Result<(MachineHandle, Option<Arc<RawDisk>>), EngineError> {
        let mut attachments = Attachments::default();
        let root: Arc<dyn Disk> = Arc::new(RawDisk::open(&self.image.rootfs, Access::ReadOnly)?);
        attachments.disks.push(root);
        attachments.serial[0] = Some(Box::new(self.console.clone()));
        let folder = self.paths.scratch();
        if !self.spec.read_only {
            Paths::ensure(&folder)?;
        }
        let disk = match &found {
            Some(found) => found.scratch.as_ref().map(|saved| {
                scratch::create_with(&folder, |file| {
                    saved.unpack(file)?;
                    Ok(saved.size)
                })
            }),
            None if self.spec.read_only => None,
            None => Some(scratch::create(&folder)),
        };
        let scratch = disk.transpose()?.map(Arc::new);
        if let Some(disk) = &scratch {
            attachments.disks.push(disk.clone());
        }
        let state = match found {
            Some(found) => {
                attachments.memory = Some(found.memory);
                Some(found.state)
            }
            None => {
                if self.spec.kernel.is_none() {
                    attachments.kernel = Some(Cow::Borrowed(builtin::KERNEL));
                }
                attachments.initrd = Some(Cow::Owned(initrd::with_init(builtin::AGENT)));
                None
            }
        };
        let config = self.config.clone();
        let handle = start(
            &self.spec.options,
            self.prepared,
            config,
            attachments,
            state,
        )?;
        Ok((handle, scratch))
    }
}

fn machine_config(spec: &RunSpec) -> MachineConfig {
    let mut disks = vec![DiskConfig {
        name: ROOT_DISK.to_owned(),
        read_only: true,
    }];
    if !spec.read_only {
        disks.push(DiskConfig {
            name: SCRATCH_DISK.to_owned(),
            read_only: false,
        });
    }
    // The kernel finds the virtio devices in the DSDT.
    let command_line = "console=ttyS0 quiet loglevel=4 panic=-1 dummy.numdummies=0 \
                        skerry.transport=vsock"
        .to_owned();
    MachineConfig {
        memory: spec.options.memory,
        cpus: spec.options.cpus,
        kernel: spec
            .kernel
            .clone()
            .unwrap_or_else(|| "built-in kernel".into()),
        initrd: Some("agent".into()),
        command_line: Some(command_line),
        disks,
        rng: true,
        vsock: Some(GUEST_CID),
        no_reboot: true,
        ..MachineConfig::default()
    }
}

fn setup(spec: &RunSpec) -> Setup {
    let mut entropy = vec![0; 64];
    // Without entropy from here the guest still has its virtio source.
    if getrandom::fill(&mut entropy).is_err() {
        entropy.clear();
    }
    let wall_clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_nanos()).ok())
        .unwrap_or(0);
    Setup {
        root: RootSpec::Image {
            device: BlockDevice::Serial(ROOT_DISK.to_owned()),
            fs_type: "erofs".to_owned(),
            upper: if spec.read_only {
                Upper::ReadOnly
            } else {
                Upper::Ext4(BlockDevice::Serial(SCRATCH_DISK.to_owned()))
            },
        },
        hostname: spec.hostname.clone().unwrap_or_else(|| "skerry".to_owned()),
        entropy,
        wall_clock,
        ..Setup::default()
    }
}

/// Merges the image's configuration with what the user says, as other container tools do.
fn exec_request(image: &Image, spec: &RunSpec, stdin: bool) -> Result<ExecRequest, EngineError> {
    let config = &image.config;
    let argv = command_of(config, spec);
    if argv.is_empty() {
        return Err(EngineError::NoCommand(image.names.join(", ")));
    }
    let pair = |name: &str, value: &str| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
    let mut env = vec![pair("PATH", DEFAULT_PATH)];
    if spec.tty.is_some() {
        env.push(pair("TERM", "xterm"));
    }
    for variable in &config.env {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        env.push(pair(name, value));
    }
    env.extend(spec.env.iter().map(|(name, value)| pair(name, value)));
    let user = spec.user.clone().unwrap_or_else(|| config.user.clone());
    let cwd = spec
        .working_dir
        .clone()
        .unwrap_or_else(|| config.working_dir.clone());
    Ok(ExecRequest {
        env,
        cwd: cwd.into_bytes(),
        user,
        tty: spec.tty,
        stdin,
        ..ExecRequest::new(argv)
    })
}

/// Entry point, then command; an entry point of the user's drops the image's command too.
fn command_of(config: &ImageConfig, spec: &RunSpec) -> Vec<String> {
    let mut argv = match &spec.entrypoint {
        Some(program) if program.is_empty() => Vec::new(),
        Some(program) => vec![program.clone()],
        None => config.entrypoint.clone(),
    };
    if !spec.command.is_empty() {
        argv.extend(spec.command.iter().cloned());
    } else if spec.entrypoint.is_none() {
        argv.extend(config.cmd.iter().cloned());
    }
    argv
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn command_and_entry_point_merge_as_elsewhere() {
        let config = ImageConfig {
            entrypoint: words("/entry -x"),
            cmd: words("default args"),
            ..ImageConfig::default()
        };
        let argv = |entrypoint: Option<&str>, command: &str| {
            let spec = RunSpec {
                entrypoint: entrypoint.map(str::to_owned),
                command: words(command),
                ..RunSpec::default()
            };
            command_of(&config, &spec)
        };
        assert_eq!(argv(None, ""), words("/entry -x default args"));
        assert_eq!(argv(None, "other"), words("/entry -x other"));
        assert_eq!(argv(Some("sh"), ""), words("sh"));
        assert_eq!(argv(Some("sh"), "-c true"), words("sh -c true"));
        assert_eq!(argv(Some(""), "ls"), words("ls"));
    }
}
