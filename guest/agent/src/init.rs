//! From the kernel's hand-over to serving.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit};
use skerry_protocol::message::{Setup, ShutdownMode};

use crate::cgroup::Cgroup;
use crate::clone_event::{self, CloneEvents};
use crate::control::{self, Control, Guest};
use crate::exec::ExecServer;
use crate::mounts::named;
use crate::sys::Notice;
use crate::transport::Transport;
use crate::{files, log, mounts, network, root, sys};

/// Limits of open files that commands start with: soft, hard.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// Pauses between attempts to reach the host: at first none, as the only reason to fail is to have
/// been too early.
const PAUSES: [Duration; 6] = [
    Duration::ZERO,
    Duration::ZERO,
    Duration::from_millis(1),
    Duration::from_millis(4),
    Duration::from_millis(16),
    Duration::from_millis(64),
];

/// How long the host's port may take to answer at first.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs as PID 1; comes back only to end the machine.
pub fn run() -> i32 {
    sys::ignore_sigpipe();
    sys::block_notices();
    // What commands inherit.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    if let Err(error) = boot() {
        log::error(format_args!("cannot start: {error}"));
        control::shut_down(ShutdownMode::PowerOff);
    }
    // The kernel gives orphans to this thread; it starts no process itself from here on.
    loop {
        match sys::wait_for_notice() {
            Notice::Child => sys::collect_orphans(),
            Notice::Power => control::shut_down(ShutdownMode::PowerOff),
        }
    }
}

fn boot() -> io::Result<()> {
    mounts::early()?;
    let command_line = std::fs::read_to_string("/proc/cmdline")?;
    let transport = Transport::from_command_line(&command_line)?;
    // Connections are served by threads that live as long as the machine.
    let transport: &'static Transport = Box::leak(Box::new(transport));
    let mut control = meet_host(transport)?;
    let setup = control.receive_setup()?;
    match set_up(&setup, &command_line, transport) {
        Ok(mut guest) => {
            control.ready(Ok(())).map_err(io::Error::other)?;
            std::thread::Builder::new()
                .name("control".to_owned())
                .stack_size(128 * 1024)
                .spawn(move || serve_hosts(control, &mut guest, transport))?;
            Ok(())
        }
        Err(error) => {
            // The host reports it; nobody reads the log of a guest that never came up.
            let _ = control.ready(Err(error.to_string()));
            Err(error)
        }
    }
}

/// The host that started this guest.
fn meet_host(transport: &Transport) -> io::Result<Control> {
    let started = Instant::now();
    let mut pauses = pauses();
    loop {
        match transport.connect() {
            Ok(stream) => return Control::greet(stream).map_err(io::Error::other),
            Err(error) if started.elapsed() >= PATIENCE => {
                return Err(named("connection to the host", &error));
            }
            Err(_) => std::thread::sleep(pauses.next().unwrap_or_default()),
        }
    }
}

/// Does what one host after the other asks: a restored guest has another.
fn serve_hosts(mut control: Control, guest: &mut Guest, transport: &Transport) {
    let mut pauses = pauses();
    loop {
        if control.serve(guest) {
            pauses = self::pauses();
        }
        control = loop {
            let again = transport.connect().ok();
            if let Some(control) = again.and_then(|stream| Control::greet(stream).ok()) {
                break control;
            }
            std::thread::sleep(pauses.next().unwrap_or_default());
        };
    }
}

/// [`PAUSES`], the last of them for ever.
fn pauses() -> impl Iterator<Item = Duration> + use<> {
    let last = PAUSES.last().copied().unwrap_or_default();
    PAUSES.into_iter().chain(std::iter::repeat(last))
}

fn set_up(setup: &Setup, command_line: &str, transport: &'static Transport) -> io::Result<Guest> {
    control::refresh(setup);
    let disk = root::switch(&setup.root)?;
    mounts::standard()?;
    files::apply_settings(setup);
    files::write(Path::new("/"), setup);
    if let Err(error) = network::bring_up_loopback() {
        log::error(format_args!("loopback interface: {error}"));
    }
    network::bring_up_card(command_line).map_err(|error| named("network card", &error))?;
    let guest = Guest {
        cgroup: worth_a_note("cgroup", Cgroup::set_up()).map(Arc::new),
        clones: worth_a_note(clone_event::PATH, CloneEvents::set_up()),
        disk,
        volumes: Vec::new(),
    };
    if let Some(disk) = &guest.disk {
        worth_a_note("reserve of the disk", root::reserve(disk));
    }
    root::seal(&setup.root)?;
    let (current, maximum) = OPEN_FILES;
    let limit = Rlimit {
        current: Some(current),
        maximum: Some(maximum),
    };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, limit) {
        log::error(format_args!("limit of open files: {error}"));
    }
    let listener = transport
        .listen()
        .map_err(|error| named("exec port", &error))?;
    ExecServer::new(setup.env.clone(), guest.cgroup.clone()).start(&Arc::new(listener))?;
    Ok(guest)
}

/// A guest is of use without: its log says what is missing.
fn worth_a_note<T>(what: &str, result: io::Result<T>) -> Option<T> {
    result
        .inspect_err(|error| log::error(format_args!("{what}: {error}")))
        .ok()
}
