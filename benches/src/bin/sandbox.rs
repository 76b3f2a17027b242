//! Function sandboxes beside hyperlight-host, in one run: times, memory of many at once.
//!
//! ```text
//! cargo run --release -p skerry-benches --bin bench-sandbox -- [--peer] [--check] [--alive 10000]
//! ```
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use skerry_benches::{median, repository};
use skerry_sandbox::{Backend, CallError, HostFunctions, Killed, Sandbox, Snapshot};

/// Function sandboxes beside hyperlight-host, in one run.
#[derive(Parser)]
struct Args {
    /// Build and run hyperlight-host too (needs /dev/kvm, and rustup for its guest's target)
    #[arg(long)]
    peer: bool,
    /// Fail if a limit is missed
    #[arg(long)]
    check: bool,
    /// Samples of each row
    #[arg(long, default_value_t = 500)]
    samples: usize,
    /// Have so many sandboxes alive at once, too
    #[arg(long)]
    alive: Option<usize>,
    /// What runs Skerry's sandboxes: auto, kvm or soft
    #[arg(long, default_value = "soft")]
    hypervisor: Backend,
}

/// A row: its key in the peer's output, its name, the limit in µs.
const ROWS: [(&str, &str, f64); 7] = [
    ("create_elf_us", "create from ELF", 1000.0),
    ("create_snapshot_us", "create from a snapshot", 150.0),
    ("call_us", "warm call, two integers", 3.0),
    ("host_call_us", "call with one host call", 6.0),
    ("restore_1mib_us", "restore, 16 pages of 1 MiB", 20.0),
    ("restore_1gib_us", "restore, 16 pages of 1 GiB", 20.0),
    ("kill_us", "kill of a spinning guest", 200.0),
];

/// Skerry's guests.
fn guest(name: &str) -> Result<PathBuf> {
    let target = repository().join("target/sandbox-guests");
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "build",
            "--release",
            "--quiet",
            "--locked",
            "-p",
            name,
            "--manifest-path",
        ])
        .arg(repository().join("guest/sandbox-rt/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .status()
        .context("Can't run cargo")?;
    if !status.success() {
        bail!("The guest {name} can't be built");
    }
    Ok(target.join("release").join(name))
}

fn functions() -> Arc<HostFunctions> {
    let mut functions = HostFunctions::new();
    functions.add("host_add", |a: i32, b: i32| a.wrapping_add(b));
    functions.add("host_echo", |bytes: Vec<u8>| bytes);
    functions.add("host_fail", |message: String| Err::<i32, String>(message));
    Arc::new(functions)
}

fn samples(count: usize, mut one: impl FnMut() -> Result<Duration>) -> Result<f64> {
    let micros = |_| Ok(one()?.as_nanos() as f64 / 1000.0);
    let mut times = (0..count).map(micros).collect::<Result<Vec<_>>>()?;
    Ok(median(&mut times))
}

fn timed<T, E>(what: impl FnOnce() -> Result<T, E>) -> Result<Duration, E> {
    let started = Instant::now();
    let made = what()?;
    let took = started.elapsed();
    drop(made);
    Ok(took)
}

struct Bench {
    program: Arc<[u8]>,
    functions: Arc<HostFunctions>,
    backend: Backend,
    samples: usize,
}

impl Bench {
    fn build(&self, heap: u64) -> Result<Sandbox> {
        let builder = Sandbox::builder()
            .guest(self.program.clone())
            .backend(self.backend);
        Ok(builder.heap(heap).host_functions(&self.functions).build()?)
    }

    fn call(&self, name: &str) -> Result<f64> {
        let mut sandbox = self.build(1 << 20)?;
        for n in 0..5000 {
            sandbox.call::<i32>(name, (n, 1))?;
        }
        let mut n = 0;
        samples(self.samples * 20, || {
            n += 1;
            let started = Instant::now();
            let sum = sandbox.call::<i32>(name, (n, 1))?;
            let took = started.elapsed();
            match sum == n + 1 {
                true => Ok(took),
                false => bail!("{n} + 1 is not {sum}"),
            }
        })
    }

    fn restore(&self, heap: u64) -> Result<f64> {
        let mut sandbox = self.build(heap)?;
        sandbox.call::<u64>("dirty_pages", (16_u64,))?;
        let snapshot = sandbox.snapshot()?;
        samples(self.samples, || {
            let first = sandbox.call::<u64>("dirty_pages", (16_u64,))?;
            if first != 2 {
                bail!("the restore before has left {first}");
            }
            Ok(timed(|| sandbox.restore(&snapshot))?)
        })
    }

    fn kill(&self) -> Result<f64> {
        let mut sandbox = self.build(1 << 20)?;
        let snapshot = sandbox.snapshot()?;
        samples(self.samples.min(100), || {
            let handle = sandbox.interrupt_handle();
            let killer = std::thread::spawn(move || {
                while handle.current().is_none() {
                    std::thread::sleep(Duration::from_micros(100));
                }
                std::thread::sleep(Duration::from_millis(3));
                let at = Instant::now();
                (at, handle.kill())
            });
            let ended = sandbox.call::<()>("spin", ());
            let end = Instant::now();
            let Ok((at, Killed::Call)) = killer.join() else {
                bail!("the killer found no call");
            };
            if !matches!(ended, Err(CallError::Cancelled)) {
                bail!("the call was not cancelled");
            }
            sandbox.restore(&snapshot)?;
            Ok(end.saturating_duration_since(at))
        })
    }

    fn row(&self, key: &str) -> Result<f64> {
        match key {
            "create_elf_us" => samples(self.samples.min(300), || timed(|| self.build(1 << 20))),
            "create_snapshot_us" => {
                let snapshot = self.warm()?;
                samples(self.samples, || timed(|| self.copy(&snapshot)))
            }
            "call_us" => self.call("add"),
            "host_call_us" => self.call("call_host"),
            "restore_1mib_us" => self.restore(1 << 20),
            "restore_1gib_us" => self.restore(1 << 30),
            _ => self.kill(),
        }
    }

    fn warm(&self) -> Result<Arc<Snapshot>> {
        let mut sandbox = self.build(1 << 20)?;
        sandbox.call::<i32>("add", (1, 2))?;
        Ok(sandbox.snapshot()?)
    }

    fn copy(&self, snapshot: &Arc<Snapshot>) -> Result<Sandbox> {
        Ok(Sandbox::from_snapshot_on(
            snapshot,
            &self.functions,
            self.backend,
        )?)
    }

    /// Memory of `count` sandboxes that have each been called, in bytes.
    fn alive(&self, count: usize) -> Result<u64> {
        let snapshot = self.warm()?;
        let before = resident()?;
        let mut all = Vec::with_capacity(count);
        for n in 0..count as i32 {
            let mut sandbox = self.copy(&snapshot)?;
            if sandbox.call::<i32>("add", (n, 1))? != n + 1 {
                bail!("a sandbox of many can't add");
            }
            all.push(sandbox);
        }
        // All of them, again: none was made room for.
        for (n, sandbox) in all.iter_mut().enumerate() {
            sandbox.call::<i32>("call_host", (n as i32, 1))?;
        }
        Ok(resident()?.saturating_sub(before))
    }
}

/// What this process takes of the host's memory: pages that several of its mappings show count once.
fn resident() -> Result<u64> {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup")?;
    let line = rollup.lines().find(|line| line.starts_with("Pss:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(kib.context("no Pss")?.parse::<u64>()? << 10)
}

/// The peer's medians.
fn peer() -> Result<serde_json::Value> {
    let folder = repository().join("benches/sandbox-peer");
    let target = folder.join("target");
    let built = Command::new("bash")
        .arg(folder.join("build.sh"))
        .env("CARGO_TARGET_DIR", &target)
        .stdout(std::process::Stdio::null())
        .status()?;
    if !built.success() {
        bail!(
            "The peer can't be built: run {}",
            folder.join("build.sh").display()
        );
    }
    run_peer(&target)
}

fn run_peer(target: &Path) -> Result<serde_json::Value> {
    let output = Command::new(target.join("release/sandbox-peer"))
        .arg(target.join("x86_64-unknown-none/release/sandbox-peer-guest"))
        .stderr(std::process::Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("The peer failed");
    }
    let all: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    all.get("hyperlight")
        .cloned()
        .context("the peer said nothing of itself")
}

fn main() -> Result<()> {
    let args = Args::parse();
    let bench = Bench {
        program: std::fs::read(guest("sandbox-testguest")?)?.into(),
        functions: functions(),
        backend: args.hypervisor,
        samples: args.samples.max(1),
    };
    let peer = match args.peer {
        true => Some(peer()?),
        false => None,
    };
    let version = peer
        .as_ref()
        .and_then(|peer| peer["version"].as_str())
        .unwrap_or("-");
    println!(
        "Medians in µs; Skerry on {}, hyperlight-host {version} on KVM",
        args.hypervisor
    );
    println!(
        "{:<30}{:>10}{:>10}{:>14}{:>10}",
        "", "skerry", "limit", "hyperlight", "ratio"
    );
    let mut missed = Vec::new();
    for (key, name, limit) in ROWS {
        let own = bench.row(key)?;
        let other = peer.as_ref().and_then(|peer| peer[key].as_f64());
        let ratio = other.map_or("-".into(), |other| format!("{:.1}", other / own));
        let other = other.map_or("-".into(), |other| format!("{other:.1}"));
        println!("{name:<30}{own:>10.2}{limit:>10.0}{other:>14}{ratio:>10}");
        if own > limit {
            missed.push(name);
        }
    }
    if let Some(count) = args.alive {
        let bytes = bench.alive(count)?;
        let each = bytes as f64 / 1024.0 / count.max(1) as f64;
        println!(
            "{count} alive at once: {} MiB, {each:.0} KiB each",
            bytes >> 20
        );
        if each > 2048.0 * 1024.0 / 10_000.0 {
            missed.push("memory of many");
        }
    }
    match args.check && !missed.is_empty() {
        true => bail!("missed: {}", missed.join(", ")),
        false => Ok(()),
    }
}
