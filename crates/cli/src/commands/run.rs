//! `skerry run`.

use std::io::{self, Write};
use std::sync::mpsc::{self, Receiver};

use anyhow::Result;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use skerry_engine::run::{Event, RunIo, RunOutcome, RunSpec, run};
use skerry_engine::{Paths, Progress, WinSize, images};

use super::machine_options;
use crate::args::RunArgs;
use crate::terminal::{self, Raw};
use crate::{output, status};

/// Signals that are passed on to the command.
const PASSED: [i32; 6] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];

/// Runs a command and returns its status.
pub fn execute(args: RunArgs, verbose: u8) -> Result<u8> {
    let paths = Paths::of_user()?;
    let image = images::resolve(&paths, &args.image, &mut |progress| {
        tell(&args.image, progress)
    })?;
    let size = args.tty.then(|| {
        terminal::size().unwrap_or(WinSize {
            rows: 24,
            cols: 80,
            ..WinSize::default()
        })
    });
    let spec = RunSpec {
        options: machine_options(args.machine),
        kernel: args.kernel,
        command: args.command,
        entrypoint: args.entrypoint,
        env: args.env.iter().filter_map(|text| variable(text)).collect(),
        working_dir: args.workdir,
        user: args.user,
        tty: size,
        read_only: args.read_only,
        fresh: args.fresh,
        hostname: args.hostname,
        show_console: verbose > 0,
    };
    let raw = if args.tty && args.interactive {
        Raw::enter()
    } else {
        None
    };
    let io = RunIo {
        stdin: args.interactive.then(|| Box::new(io::stdin()) as _),
        stdout: Box::new(io::stdout()),
        stderr: Box::new(io::stderr()),
        events: Some(events(args.tty)?),
    };
    let outcome = run(&paths, &image, spec, io, &mut output::note)?;
    drop(raw);
    io::stdout().flush().ok();
    Ok(match outcome {
        RunOutcome::Ended(status) => status.shell_code(),
        RunOutcome::NotStarted(failure) => {
            output::note(&failure.message);
            failure.kind.shell_code()
        }
        RunOutcome::TimedOut => {
            output::note("the time limit passed");
            status::TIMED_OUT
        }
    })
}

/// What takes time is worth a note.
fn tell(image: &str, progress: Progress) {
    match progress {
        Progress::Waiting => output::note(&format!(
            "waiting for another process that converts {image}"
        )),
        Progress::Layer { number, count } if count > 1 => {
            output::note(&format!("converting {image}: layer {number} of {count}"));
        }
        _ => {}
    }
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
fn events(tty: bool) -> Result<Receiver<Event>> {
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
