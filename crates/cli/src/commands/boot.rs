//! `skerry boot`.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::{Arc, OnceLock};

use anyhow::{Result, bail};
use skerry_engine::boot::{BootSpec, DiskSpec, SerialPort, boot, serial_file};
use skerry_engine::{CrashReason, MachineRemote, Outcome};

use super::machine_options;
use crate::args::{BootArgs, SerialArg};
use crate::terminal::{Escapes, Raw};
use crate::{output, status};

/// Signals that end the machine, and with it skerry.
const ENDING: [i32; 3] = [
    signal_hook::consts::SIGINT,
    signal_hook::consts::SIGTERM,
    signal_hook::consts::SIGHUP,
];

/// Boots a kernel and waits for its end.
pub fn execute(args: BootArgs) -> Result<u8> {
    let BootArgs {
        kernel,
        initrd,
        cmdline,
        disk,
        serial,
        no_reboot,
        debug_exit,
        network,
        stats,
        machine,
    } = args;
    let remote: Arc<OnceLock<MachineRemote>> = Arc::default();
    let stdio = serial == SerialArg::Stdio;
    let raw = if stdio { Raw::enter() } else { None };
    if raw.is_some() && io::stderr().is_terminal() {
        // In raw mode the terminal itself turns nothing into a new line.
        eprint!("skerry: Ctrl-A x ends the machine\r\n");
    }
    let serial = match serial {
        SerialArg::Stdio => SerialPort {
            output: Some(Box::new(io::stdout())),
            input: Some(input(raw.is_some(), remote.clone())),
        },
        SerialArg::File(path) => SerialPort {
            output: Some(serial_file(path)?),
            input: None,
        },
        SerialArg::None => SerialPort::default(),
    };
    if initrd.len() > 1 {
        bail!("More than one --initrd was given: join the archives into one file");
    }
    let spec = BootSpec {
        options: machine_options(machine),
        kernel,
        initrd: initrd.into_iter().next().map(Into::into),
        command_line: cmdline,
        disks: disk
            .into_iter()
            .map(|disk| DiskSpec {
                path: disk.path,
                read_only: disk.read_only,
            })
            .collect(),
        serial,
        network: super::network::network(network)?,
        no_reboot,
        debug_exit,
        sampled: stats.stats.is_some(),
        own_process: true,
    };
    let machine = boot(spec, &mut output::note)?;
    let _ = remote.set(machine.handle.remote().clone());
    let signal = end_on_signals(machine.handle.remote().clone())?;
    let outcome = machine.handle.wait();
    let statistics = stats.stats.map(|format| (machine.statistics(), format));
    drop(machine);
    drop(raw);
    io::stdout().flush().ok();
    let status = match (&outcome, signal.get()) {
        (Outcome::Killed, Some(signal)) => status::SIGNALLED.saturating_add(*signal),
        _ => status_of(outcome),
    };
    if let Some((statistics, format)) = statistics {
        super::stats::print(&statistics, format)?;
    }
    Ok(status)
}

/// Serial input: stdin, with escapes where it is a raw terminal.
fn input(raw: bool, remote: Arc<OnceLock<MachineRemote>>) -> Box<dyn Read + Send> {
    if !raw {
        return Box::new(io::stdin());
    }
    Box::new(Escapes::new(io::stdin(), move || {
        if let Some(remote) = remote.get() {
            remote.kill();
        }
    }))
}

/// Kills the machine when a signal asks skerry to end; tells which.
fn end_on_signals(remote: MachineRemote) -> Result<Arc<OnceLock<u8>>> {
    let seen: Arc<OnceLock<u8>> = Arc::default();
    let mut signals = signal_hook::iterator::Signals::new(ENDING)?;
    let first = seen.clone();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                let _ = first.set(signal as u8);
                remote.kill();
            }
        })?;
    Ok(seen)
}

fn status_of(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::PoweredOff | Outcome::Reset | Outcome::Killed => 0,
        // The shell sees the low eight bits, as with QEMU's isa-debug-exit.
        Outcome::DebugExit(value) => value as u8,
        Outcome::TimedOut => {
            output::note("the time limit passed");
            status::TIMED_OUT
        }
        Outcome::GuestCrash { reason, registers } => {
            let what = match reason {
                CrashReason::TripleFault { .. } => "the guest crashed",
                CrashReason::Panic => "the guest panicked",
            };
            output::note(&format!("{what}: {reason}\n{}", registers.trim_end()));
            status::GUEST_CRASHED
        }
        Outcome::InternalError(text) => {
            output::note(&text);
            status::FAILED
        }
    }
}
