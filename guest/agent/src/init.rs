//! From the kernel's hand-over to serving.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit};
use skerry_protocol::message::{Setup, ShutdownMode};

use crate::control::{self, Control};
use crate::exec::ExecServer;
use crate::mounts::named;
use crate::reap::Reaper;
use crate::transport::{Listener, Transport};
use crate::{files, log, mounts, network, root, sys};

/// Limits of open files that commands start with: soft, hard.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// Runs as PID 1; comes back only to end the machine.
pub fn run() -> i32 {
    sys::ignore_sigpipe();
    sys::block_power_signal();
    if let Err(error) = boot() {
        log::error(format_args!("cannot start: {error}"));
    }
    control::shut_down(ShutdownMode::PowerOff)
}

fn boot() -> io::Result<()> {
    std::thread::Builder::new()
        .name("power".to_owned())
        .stack_size(64 * 1024)
        .spawn(|| {
            sys::wait_for_power_button();
            control::shut_down(ShutdownMode::PowerOff)
        })?;
    mounts::early()?;
    let command_line = std::fs::read_to_string("/proc/cmdline")?;
    let transport = Transport::from_command_line(&command_line)?;
    // Connections are served by threads that live as long as the machine.
    let transport: &'static Transport = Box::leak(Box::new(transport));
    let stream = transport
        .connect()
        .map_err(|error| named("connection to the host", &error))?;
    let mut control = Control::greet(stream).map_err(io::Error::other)?;
    let setup = control.receive_setup()?;

    match set_up(&setup, transport) {
        Ok((server, listener)) => {
            control.ready(Ok(())).map_err(io::Error::other)?;
            std::thread::Builder::new()
                .name("accept".to_owned())
                .stack_size(128 * 1024)
                .spawn(move || accept(&server, &listener))?;
        }
        Err(error) => {
            // The host reports it; nobody reads the log of a guest that never came up.
            let _ = control.ready(Err(error.to_string()));
            return Err(error);
        }
    }
    loop {
        let error = control.serve();
        log::info(format_args!(
            "control connection ended ({error}); connecting again"
        ));
        control = loop {
            let again = transport.connect().map_err(|error| error.to_string());
            match again.and_then(|stream| Control::greet(stream).map_err(|e| e.to_string())) {
                Ok(control) => break control,
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        };
    }
}

fn set_up(
    setup: &Setup,
    transport: &'static Transport,
) -> io::Result<(Arc<ExecServer>, Listener<'static>)> {
    control::refresh(setup);
    root::switch(&setup.root)?;
    mounts::standard()?;
    files::apply_settings(setup);
    files::write(Path::new("/"), setup);
    if let Err(error) = network::bring_up_loopback() {
        log::error(format_args!("loopback interface: {error}"));
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
    let reaper = Reaper::new();
    reaper.start()?;
    let listener = transport
        .listen()
        .map_err(|error| named("exec port", &error))?;
    Ok((ExecServer::new(reaper, setup.env.clone()), listener))
}

fn accept(server: &Arc<ExecServer>, listener: &Listener<'_>) {
    loop {
        match listener.accept() {
            Ok(connection) => server.serve(connection),
            Err(error) => {
                log::error(format_args!("accept: {error}"));
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}
