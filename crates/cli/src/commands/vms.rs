//! `skerry exec`, `ps`, `logs`, `pause`, `unpause`, `stop`, `kill`, `wait`, `rm`.

use std::cell::Cell;
use std::io::{self, Write};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use skerry_engine::vms::{self, LogReader, Registry, Status, Stream, VmInfo};
use skerry_engine::{EngineError, Paths, dates};

use super::run::{Attached, command, finish};
use super::{short, table};
use crate::args::{
    ExecArgs, Filter, ForkArgs, Format, KillArgs, LogsArgs, NamesArgs, PsArgs, RenameArgs, RmArgs,
    StopArgs, WaitArgs,
};
use crate::{output, status};

/// How often a log is looked at while it is followed.
const FOLLOW: Duration = Duration::from_millis(50);

pub fn registry() -> Result<Registry> {
    Ok(Registry::open(&Paths::of_user()?)?)
}

/// Runs a virtual machine for another process.
pub fn host() -> Result<u8> {
    vms::run_detached()?;
    Ok(0)
}

/// Runs one more command in a machine.
pub fn exec(args: ExecArgs) -> Result<u8> {
    let registry = registry()?;
    let attached = Attached::new(args.io.tty, args.io.interactive)?;
    let spec = command(args.io, args.line.command);
    let outcome = vms::exec(&registry, &args.vm, &spec, attached.io);
    drop(attached.raw);
    Ok(finish(outcome?))
}

/// Does something to each of several machines, prints the names of those where it was done, and goes
/// on after a failure.
pub fn each(vms: &[String], act: impl Fn(&Registry, &str) -> Result<String>) -> Result<u8> {
    let registry = registry()?;
    let mut exit = 0;
    for name in vms {
        match act(&registry, name) {
            Ok(text) => writeln!(io::stdout(), "{text}")?,
            Err(error) => {
                output::error(&error);
                exit = status::FAILED;
            }
        }
    }
    Ok(exit)
}

/// Pauses machines.
pub fn pause(args: &NamesArgs) -> Result<u8> {
    each(&args.vms, |registry, name| {
        vms::pause(registry, name)?;
        Ok(name.to_owned())
    })
}

/// Lets machines go on.
pub fn unpause(args: &NamesArgs) -> Result<u8> {
    each(&args.vms, |registry, name| {
        vms::unpause(registry, name)?;
        Ok(name.to_owned())
    })
}

/// Stops machines.
pub fn stop(args: &StopArgs) -> Result<u8> {
    each(&args.vms, |registry, name| {
        vms::stop(registry, name, args.time.0)?;
        Ok(name.to_owned())
    })
}

/// Kills machines, or sends signals.
pub fn kill(args: &KillArgs) -> Result<u8> {
    each(&args.vms, |registry, name| {
        vms::signal(registry, name, args.signal.0)?;
        Ok(name.to_owned())
    })
}

/// Waits for the end of machines, or until they are ready.
pub fn wait(args: &WaitArgs) -> Result<u8> {
    if !args.ready {
        return each(&args.vms, |registry, name| {
            Ok(vms::wait(registry, name)?.to_string())
        });
    }
    let until = args.timeout.map(|span| Instant::now() + span.0);
    let timed_out = Cell::new(false);
    let exit = each(&args.vms, |registry, name| {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let waited = vms::wait_ready(registry, name, left);
        timed_out.set(timed_out.get() || matches!(waited, Err(EngineError::Unready { .. })));
        waited?;
        Ok(name.to_owned())
    })?;
    Ok(match timed_out.get() {
        true => status::TIMED_OUT,
        false => exit,
    })
}

/// Makes more machines from a running one.
pub fn fork(args: &ForkArgs) -> Result<u8> {
    let names = (1..=args.count).map(|number| match &args.name {
        None => String::new(),
        Some(name) if args.count == 1 => name.clone(),
        Some(name) => format!("{name}-{number}"),
    });
    let names: Vec<_> = names.collect();
    let program = std::env::current_exe().context("Can't tell where skerry itself is")?;
    let forked = vms::fork(&registry()?, &program, &args.vm, &names, args.rm)?;
    let mut out = io::stdout().lock();
    match args.format {
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&forked)?)?,
        Format::Text => forked.ids.iter().try_for_each(|id| writeln!(out, "{id}"))?,
    }
    Ok(0)
}

/// Gives a machine another name.
pub fn rename(args: &RenameArgs) -> Result<u8> {
    vms::rename(&registry()?, &args.vm, &args.name)?;
    Ok(0)
}

/// Removes machines.
pub fn remove(args: &RmArgs) -> Result<u8> {
    each(&args.vms, |registry, name| {
        vms::remove(registry, name, args.force)?;
        Ok(name.to_owned())
    })
}

/// Lists machines.
pub fn list(args: &PsArgs) -> Result<u8> {
    for filter in &args.filter {
        let known = ["status", "name", "id", "image", "exited", "label"];
        if !known.contains(&filter.key.as_str()) {
            let key = &filter.key;
            bail!("There is no filter {key}: ps knows status, name, id, image, exited and label");
        }
    }
    let mut infos = registry()?.list()?;
    // As docker has it: who asks for a status wants those that have ended, too.
    let asks = |filter: &Filter| ["status", "exited"].contains(&filter.key.as_str());
    let all = args.all || args.filter.iter().any(asks);
    infos.retain(|info| (all || info.state.status.is_alive()) && wanted(info, &args.filter));
    let mut out = io::stdout().lock();
    if args.quiet {
        for info in &infos {
            writeln!(out, "{}", id(info, args.no_trunc))?;
        }
        return Ok(0);
    }
    match args.format {
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&infos)?)?,
        Format::Text => rows(&mut out, &infos, args.no_trunc)?,
    }
    Ok(0)
}

/// Whether a machine passes: of several values for one key, one has to fit.
fn wanted(info: &VmInfo, filters: &[Filter]) -> bool {
    let fits = |filter: &Filter| {
        let value = filter.value.as_str();
        let status = info.state.status;
        match filter.key.as_str() {
            "status" => {
                // Docker's words for them are understood, too.
                status.name() == value
                    || value == "exited" && matches!(status, Status::Stopped | Status::Failed)
                    || value == "running" && status == Status::Ready
            }
            "name" => info.config.name.contains(value.trim_start_matches('/')),
            "id" => info.config.id.starts_with(value),
            "image" => info.config.image == value,
            "exited" => {
                !status.is_alive()
                    && info
                        .state
                        .exit_code
                        .is_some_and(|code| code.to_string() == value)
            }
            _ => label_matches(info, value),
        }
    };
    filters.iter().all(|filter| {
        let mut same = filters.iter().filter(|other| other.key == filter.key);
        same.any(fits)
    })
}

/// Whether a machine has a label: `KEY`, or `KEY=VALUE`.
pub fn label_matches(info: &VmInfo, wanted: &str) -> bool {
    let labels = &info.config.labels;
    match wanted.split_once('=') {
        Some((key, value)) => labels.get(key).is_some_and(|own| own == value),
        None => labels.contains_key(wanted),
    }
}

/// A count of nanoseconds since 1970.
fn time(nanoseconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds)
}

fn id(info: &VmInfo, whole: bool) -> &str {
    let id = info.config.id.as_str();
    match whole {
        true => id,
        false => short(id),
    }
}

/// A row a machine, columns as wide as what is in them.
fn rows(out: &mut impl Write, infos: &[VmInfo], whole: bool) -> io::Result<()> {
    let header = [
        "ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(infos.iter().map(|info| {
        let config = &info.config;
        [
            id(info, whole).to_owned(),
            config.name.clone(),
            config.image.clone(),
            command_text(&config.command, whole),
            dates::ago(
                SystemTime::now()
                    .duration_since(time(config.created))
                    .unwrap_or_default(),
            ),
            status_text(info),
            ports_text(info),
        ]
    }));
    table::write(out, &rows)
}

/// A command on one line, without what a terminal could take for an order.
fn command_text(command: &[String], whole: bool) -> String {
    const LONGEST: usize = 30;
    let text = command.join(" ");
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) if !whole => format!("{}…", &text[..end]),
        _ => text,
    }
}

/// The published ports of a machine, as they were asked for.
fn ports_text(info: &VmInfo) -> String {
    let ports: Vec<String> = info.config.ports.iter().map(ToString::to_string).collect();
    ports.join(", ")
}

fn status_text(info: &VmInfo) -> String {
    let state = &info.state;
    let code = state.exit_code.unwrap_or_default();
    match state.status {
        Status::Stopped => format!("stopped ({code})"),
        Status::Failed => {
            let why = state.error.as_deref().unwrap_or_default();
            let why = why.lines().next().unwrap_or_default();
            format!("failed ({code}): {why}")
        }
        Status::Created => match &state.error {
            Some(why) => format!("created: {}", why.lines().next().unwrap_or_default()),
            None => "created".to_owned(),
        },
        alive => alive.name().to_owned(),
    }
}

/// Prints the output of a machine's command.
pub fn logs(args: &LogsArgs) -> Result<u8> {
    let registry = registry()?;
    let info = registry.find(&args.vm)?;
    if !info.config.detached {
        bail!(
            "The virtual machine {} keeps no log: its output went to where it was run",
            info.config.name
        );
    }
    let mut reader = match vms::log(&registry, &info) {
        Ok(reader) => reader,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error.into()),
    };
    if let Some(count) = args.tail {
        let mut lines = std::collections::VecDeque::new();
        while let Some(line) = reader.next_line()? {
            lines.push_back(line);
            if lines.len() > count {
                lines.pop_front();
            }
        }
        lines
            .iter()
            .try_for_each(|line| print(line, args.timestamps))?;
        if !args.follow {
            return Ok(0);
        }
    }
    loop {
        // Before the reading: what a command writes last is read when it is known to have ended.
        let more = args.follow
            && registry
                .find(&info.config.id)
                .is_ok_and(|info| info.state.status.is_alive());
        print_all(&mut reader, args.timestamps)?;
        if !more {
            return Ok(0);
        }
        std::thread::sleep(FOLLOW);
    }
}

fn print_all(reader: &mut LogReader, timestamps: bool) -> io::Result<()> {
    while let Some(line) = reader.next_line()? {
        print(&line, timestamps)?;
    }
    Ok(())
}

fn print(line: &vms::Line, timestamps: bool) -> io::Result<()> {
    let mut text = Vec::new();
    if timestamps {
        write!(text, "{} ", dates::rfc3339(time(line.time)))?;
    }
    text.extend(line.bytes());
    match line.stream {
        Stream::Stdout => {
            let mut out = io::stdout().lock();
            out.write_all(&text)?;
            out.flush()
        }
        Stream::Stderr => io::stderr().write_all(&text),
    }
}
