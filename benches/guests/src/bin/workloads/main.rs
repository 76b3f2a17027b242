//! The guest's side of `bench-workloads`: runs workloads by name and says how long each took.
//!
//! ```text
//! as /init      mounts /dev/vda, the root that benches/images.sh made, and enters it
//! --native DIR  enters that root on the host, in a mount namespace of its own
//!     then      for each NAME: make its input, run it once small, print BEGIN NAME, run it,
//!               print END NAME and WORKLOAD NAME SECONDS CPU-SECONDS CHECKSUM-OF-WHAT-IT-SAID
//! ```
//!
//! Arguments: `[--native DIR] [--scale PERCENT] [--cpus N] NAME…`. Lines `CLOCK SECONDS` at the start
//! and the end let the host compare the guest's clock with its own. As process 1 it powers off.

mod inputs;
mod kernels;
mod list;
mod root;
mod system;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use list::{Settings, Work};

/// Where a command's output goes while it is measured: memory.
const OUTPUT: &str = "/tmp/output";

fn main() -> ExitCode {
    if let Some(status) = system::as_child() {
        return status;
    }
    let as_init = std::process::id() == 1;
    let result = run(as_init);
    if let Err(error) = &result {
        println!("WORKLOADS FAILED {error}");
    }
    if as_init {
        system::power_off();
    }
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(as_init: bool) -> Result<(), String> {
    let mut settings = Settings::default();
    let mut names = Vec::new();
    let mut arguments = std::env::args().skip(1);
    let mut native = None;
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--native" => native = Some(value()?),
            "--scale" => settings.percent = number(&value()?)?,
            "--cpus" => settings.cpus = number(&value()?)?,
            _ => names.push(argument),
        }
    }
    settings.native = native.is_some();
    match native {
        Some(folder) => root::enter_natively(Path::new(&folder))?,
        None if as_init => root::enter_disk()?,
        None => return Err("it takes --native DIR, or to be process 1".into()),
    }
    let start = Instant::now();
    clock(start);
    for name in &names {
        let work = list::find(name).ok_or(format!("there is no workload {name}"))?;
        let (taken, checksum) = measure(&work, &settings).map_err(|e| format!("{name}: {e}"))?;
        let Taken { seconds, cpu } = taken;
        println!("WORKLOAD {name} {seconds:.6} {cpu:.6} {checksum:016x}");
    }
    clock(start);
    println!("WORKLOADS DONE");
    Ok(())
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text} is no number"))
}

/// What this machine's clock says, at the moment when the line goes out.
fn clock(start: Instant) {
    println!("CLOCK {:.6}", start.elapsed().as_secs_f64());
    std::io::stdout().flush().ok();
}

/// What a workload took, by the clock, and of this machine's processors.
struct Taken {
    seconds: f64,
    cpu: f64,
}

/// Runs what is measured.
fn timed<T>(work: &Work, run: impl FnOnce() -> Result<T, String>) -> Result<(Taken, T), String> {
    println!("BEGIN {}", work.name);
    let (cpu, start) = (system::cpu_seconds(), Instant::now());
    let result = run()?;
    let taken = Taken {
        seconds: start.elapsed().as_secs_f64(),
        cpu: system::cpu_seconds() - cpu,
    };
    println!("END {}", work.name);
    Ok((taken, result))
}

fn measure(work: &Work, settings: &Settings) -> Result<(Taken, u64), String> {
    for input in work.inputs {
        inputs::make(*input, settings).map_err(|e| format!("its input can't be made: {e}"))?;
    }
    let count = settings.scaled(work.count);
    let taken = match &work.body {
        list::Body::Calls(function) => {
            function(count / 20 + 1);
            return timed(work, || Ok(function(count)));
        }
        list::Body::Command { line, warm } => {
            command(warm, 1)?;
            timed(work, || command(line, count))?.0
        }
        list::Body::Repeated { line } => {
            command(line, 1)?;
            timed(work, || (0..count).try_for_each(|_| command(line, 1)))?.0
        }
        list::Body::Together { lines } => {
            if settings.native && settings.cpus == 1 {
                system::stay_on_this_cpu();
            }
            let together = || {
                let children: Vec<_> = lines
                    .iter()
                    .map(|line| spawn(line, 1))
                    .collect::<Result<_, _>>()?;
                children.into_iter().try_for_each(finish)
            };
            timed(work, together)?.0
        }
    };
    Ok((taken, output_checksum()?))
}

/// Runs a command line, in which `COUNT` stands for how much to do.
fn command(line: &[&str], count: u64) -> Result<(), String> {
    finish(spawn(line, count)?)
}

fn spawn(line: &[&str], count: u64) -> Result<std::process::Child, String> {
    let words: Vec<String> = line
        .iter()
        .map(|word| word.replace("COUNT", &count.to_string()))
        .collect();
    let (program, arguments) = words.split_first().ok_or("an empty command")?;
    let output = fs::File::create(OUTPUT).map_err(|e| format!("{OUTPUT}: {e}"))?;
    Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("LC_ALL", "C")
        .env("PYTHONHASHSEED", "0")
        .env("TMPDIR", "/tmp")
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("{program}: {e}"))
}

fn finish(mut child: std::process::Child) -> Result<(), String> {
    let status = child.wait().map_err(|e| e.to_string())?;
    if !status.success() {
        return Err(format!("the command ended with {status}"));
    }
    Ok(())
}

fn output_checksum() -> Result<u64, String> {
    let bytes = fs::read(OUTPUT).map_err(|e| format!("{OUTPUT}: {e}"))?;
    Ok(inputs::checksum(&bytes))
}
