//! `skerry run`.

use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use skerry_engine::command::CommandSpec;
use skerry_engine::frozen::Frozen;
use skerry_engine::run::{Event, RunIo, RunOutcome, RunSpec};
use skerry_engine::vm::VmSpec;
use skerry_engine::vms::{self, Begin, Detached, Job, Launch, ReadyMark, RestartPolicy, Source};
use skerry_engine::warm::WarmSpec;
use skerry_engine::{
    EngineError, Image, MachineOptions, Paths, WinSize, confinement, hypervisor, images,
};

use super::network::{network, reach};
use super::{choice, machine_options, registry, soft_options, stats, strictness};
use crate::args::{CommandArgs, Format, ResourceArgs, RestoreArgs, RunArgs, WarmArgs};
use crate::output;
use crate::terminal::{self, Raw};

/// Signals that are passed on to the command.
const PASSED: [i32; 6] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];

/// How a machine is run, whatever it begins with.
struct How {
    detach: bool,
    stats: Option<Format>,
    name: Option<String>,
    rm: bool,
}

/// Runs a command and returns its status.
pub fn execute(args: RunArgs, verbose: u8) -> Result<u8> {
    if args.lifecycle.restart != RestartPolicy::No && !args.detach {
        bail!("A machine in the foreground isn't started again: --restart needs -d");
    }
    let how = How {
        detach: args.detach,
        stats: args.stats.stats,
        name: args.name.clone(),
        rm: args.rm,
    };
    let (begin, spec) = plan(args, verbose)?;
    start(begin, spec, how)
}

/// Makes a machine that is to be started later, and prints its ID.
pub fn create(args: RunArgs, verbose: u8) -> Result<u8> {
    if args.detach || args.stats.stats.is_some() {
        bail!("create runs nothing: -d and --stats are for run");
    }
    let (name, auto_remove) = (args.name.clone().unwrap_or_default(), args.rm);
    let (begin, spec) = plan(args, verbose)?;
    let launch = Launch {
        root: Paths::of_user()?.root().to_owned(),
        begin: absolute(begin)?,
        spec,
        name,
        auto_remove,
    };
    let id = vms::create(&launch, &mut output::note)?;
    writeln!(io::stdout(), "{id}")?;
    Ok(0)
}

/// What a machine begins with, which is there then, and what it is to be.
fn plan(args: RunArgs, verbose: u8) -> Result<(Begin, RunSpec)> {
    let mut words = args.command;
    let begin = match (args.from_snapshot, args.image) {
        (Some(snapshot), first) => {
            // There is no image: what stands in its place is the command.
            words.splice(0..0, first);
            Begin::Snapshot(snapshot)
        }
        (None, Some(image)) => Begin::Image(image),
        (None, None) => bail!("Neither an image nor a snapshot was named"),
    };
    let command = CommandSpec {
        entrypoint: args.entrypoint,
        ..command(args.io, words)
    };
    let ResourceArgs {
        pids_limit,
        storage_opt,
        cgroup_parent,
    } = args.resources;
    let spec = RunSpec {
        vm: VmSpec {
            options: MachineOptions {
                cgroup_parent,
                ..machine_options(args.machine)
            },
            kernel: args.kernel,
            read_only: args.read_only,
            fresh: args.fresh,
            hostname: args.hostname,
            network: network(args.network)?,
            mounts: args.mounts.specs(),
            show_console: verbose > 0,
            sampled: args.stats.stats.is_some(),
            kept: None,
            pids_limit: pids_limit.and_then(|limit| limit.0),
            disk_size: storage_opt.map(|size| size.0),
        },
        command,
        ready: match (args.ready, args.ready_cmd) {
            (Some(text), _) => Some(ReadyMark::Text(text)),
            (None, shell) => shell
                .map(ReadyMark::Shell)
                .or(args.ready_tcp.map(ReadyMark::Tcp)),
        },
        labels: args
            .lifecycle
            .labels
            .iter()
            .map(|label| text_pair(label))
            .collect(),
        restart: args.lifecycle.restart,
    };
    hypervisor::look_ahead(spec.vm.options.hypervisor);
    if let Begin::Image(image) = &begin {
        registry::provide(&Paths::of_user()?, image, args.pull)?;
    }
    Ok((begin, spec))
}

/// `KEY=VALUE`, or `KEY` with an empty value.
fn text_pair(text: &str) -> (String, String) {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    (key.to_owned(), value.to_owned())
}

/// Lets a machine go on from a snapshot, with the command that runs in it.
pub fn restore(args: RestoreArgs, verbose: u8) -> Result<u8> {
    let mut spec = RunSpec::default();
    spec.vm.options.hypervisor = choice(args.hypervisor);
    spec.vm.options.soft = soft_options(&args.soft);
    spec.vm.options.confine = strictness(&args.confine);
    spec.vm.sampled = args.stats.stats.is_some();
    spec.vm.options.time_limit = args.timeout.map(|span| span.0);
    spec.vm.hostname = args.hostname;
    spec.vm.network = network(args.network)?;
    spec.vm.mounts = args.mounts.specs();
    spec.vm.show_console = verbose > 0;
    let how = How {
        detach: args.detach,
        stats: args.stats.stats,
        name: args.name,
        rm: args.rm,
    };
    start(Begin::Snapshot(args.snapshot), spec, how)
}

/// Keeps a warm start of an image.
pub fn warm(args: WarmArgs, verbose: u8) -> Result<u8> {
    let paths = Paths::of_user()?;
    registry::provide(&paths, &args.image, args.pull)?;
    let image = resolve(&paths, &args.image)?;
    let spec = WarmSpec {
        vm: VmSpec {
            options: machine_options(args.machine),
            read_only: args.read_only,
            network: reach(args.reach)?,
            mounts: args.mounts.specs(),
            show_console: verbose > 0,
            ..VmSpec::default()
        },
        command: match args.exec.is_empty() {
            true => None,
            false => Some(command(args.io, args.exec)),
        },
        ready: args.ready,
        name: args.name,
    };
    confinement::of_vm(&paths, &spec.vm, &[])?;
    let id = skerry_engine::warm::warm(&paths, &image, &args.image, &spec, &mut output::note)?;
    writeln!(io::stdout(), "{}", id.hex())?;
    Ok(0)
}

/// Finds an image, importing it where that has not been done.
fn resolve(paths: &Paths, name: &str) -> Result<Image> {
    let image = images::resolve(paths, name, &mut |progress| {
        if let Some(text) = vms::told_of(name, progress) {
            output::note(&text);
        }
    });
    Ok(image?)
}

fn start(begin: Begin, spec: RunSpec, how: How) -> Result<u8> {
    let paths = Paths::of_user()?;
    let name = how.name.unwrap_or_default();
    if how.detach {
        return detach(&Launch {
            root: paths.root().to_owned(),
            begin: absolute(begin)?,
            spec,
            name,
            auto_remove: how.rm,
        });
    }
    let (image, frozen);
    let (mut tty, mut interactive) = (spec.command.tty.is_some(), spec.command.stdin);
    let source = match &begin {
        Begin::Image(name) => {
            image = resolve(&paths, name)?;
            Source::Image {
                image: &image,
                name,
            }
        }
        Begin::Snapshot(parent) | Begin::Machine(parent) => {
            frozen = Frozen::open(&paths, parent)?;
            if spec.command.command.is_empty()
                && let Some(running) = &frozen.about.command
            {
                (tty, interactive) = (running.tty, running.stdin);
            }
            Source::Frozen {
                frozen: &frozen,
                parent,
            }
        }
    };
    let statistics = OnceLock::new();
    let job = Job {
        source,
        spec: &spec,
        name: &name,
        auto_remove: true,
        detached: false,
        launch: None,
        own_process: true,
        statistics: how.stats.is_some().then_some(&statistics),
    };
    let mut raw = None;
    // Called when the process is confined: its threads begin then.
    let mut attach = || {
        let attached = Attached::new(tty, interactive).map_err(|source| EngineError::Host {
            what: "pass signals on",
            source,
        })?;
        raw = attached.raw;
        Ok(attached.io)
    };
    let outcome = vms::host(&paths, job, |_| attach(), |_| {}, &mut output::note);
    drop(raw);
    let status = outcome.map(finish);
    if let (Some(format), Some(statistics)) = (how.stats, statistics.get()) {
        stats::print(statistics, format)?;
    }
    Ok(status?)
}

/// The same as it can be named from any folder.
fn absolute(begin: Begin) -> Result<Begin> {
    Ok(match begin {
        Begin::Image(image) => Begin::Image(from_here(image)?),
        begin => begin,
    })
}

/// Has another process run the machine.
fn detach(launch: &Launch) -> Result<u8> {
    let program = std::env::current_exe().context("Can't tell where skerry itself is")?;
    match vms::detach(&program, launch, &mut output::note)? {
        Detached::Runs(id) => {
            writeln!(io::stdout(), "{id}")?;
            Ok(0)
        }
        Detached::NotStarted(failure) => Ok(finish(RunOutcome::NotStarted(failure))),
    }
}

/// An image as it can be named from any folder.
pub fn from_here(image: String) -> Result<String> {
    let Some((kind, path)) = image.split_once(':') else {
        return Ok(image);
    };
    if !["oci", "oci-archive", "docker-archive", "dir"].contains(&kind) {
        return Ok(image);
    }
    let absolute = std::path::absolute(path).with_context(|| format!("Can't find {path}"))?;
    match absolute.to_str() {
        Some(path) => Ok(format!("{kind}:{path}")),
        None => bail!("The path of the image {image} is no UTF-8: rename a folder of it"),
    }
}

/// A command as the engine has it.
pub fn command(args: CommandArgs, command: Vec<String>) -> CommandSpec {
    let size = || {
        terminal::size().unwrap_or(WinSize {
            rows: 24,
            cols: 80,
            ..WinSize::default()
        })
    };
    CommandSpec {
        command,
        entrypoint: None,
        env: args.env.iter().filter_map(|text| variable(text)).collect(),
        working_dir: args.workdir,
        user: args.user,
        tty: args.tty.then(size),
        stdin: args.interactive,
    }
}

/// A command's streams on those of this process.
pub struct Attached {
    /// The terminal is as it was when this is dropped.
    pub raw: Option<Raw>,
    /// The streams.
    pub io: RunIo,
}

impl Attached {
    /// Takes stdin where the command is interactive.
    pub fn new(tty: bool, interactive: bool) -> io::Result<Self> {
        let raw = if tty && interactive {
            Raw::enter()
        } else {
            None
        };
        let io = RunIo {
            stdin: interactive.then(|| Box::new(io::stdin()) as _),
            stdout: Box::new(io::stdout()),
            stderr: Box::new(io::stderr()),
            events: Some(events(tty)?),
        };
        Ok(Self { raw, io })
    }
}

/// Says what is to be said of a command's end; gives the exit status.
pub fn finish(outcome: RunOutcome) -> u8 {
    io::stdout().flush().ok();
    match &outcome {
        RunOutcome::Ended(_) => {}
        RunOutcome::NotStarted(failure) => output::note(&failure.message),
        RunOutcome::TimedOut => output::note("the time limit passed"),
    }
    outcome.code()
}

/// `KEY=VALUE`, or `KEY` with the value it has here; a variable that is not set is not passed.
fn variable(text: &str) -> Option<(String, String)> {
    match text.split_once('=') {
        Some((name, value)) => Some((name.to_owned(), value.to_owned())),
        None => std::env::var(text)
            .ok()
            .map(|value| (text.to_owned(), value)),
    }
}

/// Signals and, with a terminal, its sizes, as they come.
pub fn events(tty: bool) -> io::Result<Receiver<Event>> {
    let (sender, receiver) = mpsc::channel();
    let mut wanted = PASSED.to_vec();
    if tty {
        wanted.push(SIGWINCH);
    }
    let mut signals = signal_hook::iterator::Signals::new(wanted)?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                let event = if signal == SIGWINCH {
                    terminal::size().map(Event::Resize)
                } else {
                    Some(Event::Signal(signal as u8))
                };
                if let Some(event) = event
                    && sender.send(event).is_err()
                {
                    return;
                }
            }
        })?;
    Ok(receiver)
}
