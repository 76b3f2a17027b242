//! The `skerry` command: parses, calls the engine, prints, and turns results into exit statuses.
//!
//! ```text
//!  args (clap) ─► commands/* ─► engine
//!  stdout: the workload's bytes, or what was asked for; stderr: notes and errors
//! ```

mod args;
mod commands;
mod output;
mod progress;
mod status;
mod terminal;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Asking for help is no failure; a mistaken line is skerry's own (125), as docker has
            // it. Nothing can be done where stdout or stderr are closed.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(status::FAILED),
            };
        }
    };
    start_log(cli.verbose);
    let result = match cli.command {
        Command::Run(args) => commands::run::execute(args, cli.verbose),
        Command::Create(args) => commands::run::create(args, cli.verbose),
        Command::Start(args) => commands::lifecycle::start(&args),
        Command::Attach(args) => commands::lifecycle::attach(&args),
        Command::Restart(args) => commands::lifecycle::restart(&args),
        Command::Top(args) => commands::files::top(&args),
        Command::Cp(args) => commands::files::copy(&args),
        Command::Events(args) => commands::events::execute(&args),
        Command::Prune(args) => commands::lifecycle::prune(&args),
        Command::Warm(args) => commands::run::warm(args, cli.verbose),
        Command::Restore(args) => commands::run::restore(args, cli.verbose),
        Command::Fork(args) => commands::vms::fork(&args),
        Command::Exec(args) => commands::vms::exec(args),
        Command::Ps(args) => commands::vms::list(&args),
        Command::Inspect(args) => commands::stats::inspect(&args),
        Command::Stats(args) => commands::usage::execute(&args),
        Command::Logs(args) => commands::vms::logs(&args),
        Command::Port(args) => commands::network::ports(&args),
        Command::Pause(args) => commands::vms::pause(&args),
        Command::Unpause(args) => commands::vms::unpause(&args),
        Command::Stop(args) => commands::vms::stop(&args),
        Command::Kill(args) => commands::vms::kill(&args),
        Command::Wait(args) => commands::vms::wait(&args),
        Command::Rename(args) => commands::vms::rename(&args),
        Command::Rm(args) => commands::vms::remove(&args),
        Command::Pool(args) => commands::pool::execute(args, cli.verbose),
        Command::Network(args) => commands::networks::execute(args),
        Command::PoolHost => commands::pool::host(),
        Command::VmHost => commands::vms::host(),
        Command::Boot(args) => commands::boot::execute(args),
        Command::Pull(args) => commands::registry::pull(&args),
        Command::Push(args) => commands::registry::push(&args),
        Command::Tag(args) => commands::registry::tag(&args),
        Command::Images(args) => commands::images::list(&args),
        Command::Rmi(args) => commands::images::remove(&args),
        Command::Save(args) => commands::archives::save(&args),
        Command::Load(args) => commands::archives::load(&args),
        Command::Image(args) => commands::images::execute(&args),
        Command::Volume(args) => commands::volume::volume(args),
        Command::Snapshot(args) => commands::snapshot::execute(&args),
        Command::Sandbox(args) => commands::sandbox::execute(&args),
        Command::Serve(args) => commands::serve::execute(&args),
        Command::System(args) => commands::system::execute(&args),
        Command::Doctor(args) => commands::doctor::execute(&args),
        Command::Version(args) => commands::about::version(&args),
        Command::Completion(args) => commands::about::completion(&args),
        Command::Man(args) => commands::about::man(&args),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            output::error(&error);
            ExitCode::from(status::FAILED)
        }
    }
}

/// Events of the library go to stderr: warnings, with --verbose what is done, given twice all.
fn start_log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "skerry=debug,info",
        _ => "trace",
    };
    let filter = EnvFilter::try_new(level).unwrap_or_default();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(output::colours())
        .with_target(verbose > 1)
        .init();
}
