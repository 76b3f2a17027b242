//! What snapshots, forks, resets and pools cost, each a median.
//!
//! `cargo run --release -p skerry-benches --bin bench-clones -- --runs 100`

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Parser;
use skerry_benches::{median, skerry};
use skerry_engine::command::{self, CommandSpec, Surroundings};
use skerry_engine::hypervisor::{Backend, Choice};
use skerry_engine::pools::{Clones, Pool, PoolOptions};
use skerry_engine::vm::{ResumeSpec, Vm, VmSpec};
use skerry_engine::{ExitStatus, Paths, images};

/// Cost of snapshots, forks, resets and pools
#[derive(Parser)]
struct Options {
    /// How often each thing is done
    #[arg(long, default_value_t = 100)]
    runs: usize,
    /// Machines that are forked at once, and idle clones that are weighed
    #[arg(long, default_value_t = 100)]
    clones: usize,
    /// Only what has this in its name
    #[arg(long, default_value = "")]
    only: String,
}

/// Everything that a measurement needs.
struct Bench {
    options: Options,
    data: tempfile::TempDir,
    paths: Paths,
}

/// One of the things that are measured.
type Measure = fn(&Bench) -> Result<()>;

/// A list of durations, to be printed as medians.
#[derive(Default)]
struct Times(Vec<f64>);

impl Times {
    fn add(&mut self, duration: Duration) {
        self.0.push(duration.as_secs_f64() * 1e3);
    }
}

impl Bench {
    fn wanted(&self, name: &str) -> bool {
        name.contains(&self.options.only)
    }

    fn report(&self, what: &str, mut times: Times, target: f64) {
        let runs = times.0.len();
        // Sorts them.
        let median = median(&mut times.0);
        let [p90, p99, worst] = [0.9, 0.99, 1.0].map(|part| quantile(&times.0, part));
        let verdict = if median <= target { "ok" } else { "MISSED" };
        println!(
            "{what:<52} {median:>8.3} ms  (at most {target} ms: {verdict}; p90 {p90:.2}, p99 {p99:.2}, \
             worst {worst:.2}, {runs} runs)"
        );
    }

    fn vm(&self, memory: u64) -> Result<Vm> {
        let image = images::resolve(&self.paths, "demo", &mut |_| {})?;
        let mut spec = VmSpec::default();
        spec.options.memory = memory;
        spec.options.hypervisor = Choice::Only(Backend::Soft);
        Ok(Vm::start(&self.paths, &image, "demo", &spec, &mut |_| {})?)
    }

    fn skerry(&self, args: &[&str]) -> Result<String> {
        let data = self.data.path();
        let output = Command::new(skerry()?)
            .args(args)
            .env("XDG_DATA_HOME", data)
            .output()?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            bail!("skerry {} failed: {text}", args.join(" "));
        }
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }
}

/// What `part` of the values, which are sorted, don't exceed.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let rank = (sorted.len() as f64 * part).ceil() as usize;
    let last = sorted.len().saturating_sub(1);
    let found = sorted.get(rank.saturating_sub(1).min(last));
    found.copied().unwrap_or(f64::NAN)
}

fn resume(rewindable: bool) -> ResumeSpec {
    ResumeSpec {
        hypervisor: Choice::Only(Backend::Soft),
        rewindable,
        ..ResumeSpec::default()
    }
}

fn exec(vm: &Vm, words: &[&str]) -> Result<()> {
    let argv = words.iter().map(|&word| word.to_owned()).collect();
    let request = command::request(argv, &Surroundings::default(), &CommandSpec::default());
    let (mut out, mut err) = (Vec::new(), Vec::new());
    match vm.exec(request)?.wait(&mut out, &mut err)? {
        ExitStatus::Code(0) => Ok(()),
        status => bail!("{words:?} ended with {status:?}"),
    }
}

fn restore(bench: &Bench) -> Result<()> {
    let vm = bench.vm(2 << 30)?;
    let frozen = vm.capture()?.frozen;
    vm.kill();
    let (mut running, mut ready) = (Times::default(), Times::default());
    for _ in 0..bench.options.runs {
        let vm = Vm::resume(&bench.paths, &frozen, &resume(false), &mut |_| {})?;
        running.add(vm.timing().running);
        ready.add(vm.timing().ready);
        exec(&vm, &["true"])?;
    }
    bench.report("restore, 2 GiB: call to first instruction", running, 3.0);
    bench.report("restore, 2 GiB: call to the agent's answer", ready, 12.0);
    Ok(())
}

fn exec_true(bench: &Bench) -> Result<()> {
    let vm = bench.vm(512 << 20)?;
    let mut times = Times::default();
    for _ in 0..bench.options.runs {
        let begun = Instant::now();
        exec(&vm, &["true"])?;
        times.add(begun.elapsed());
    }
    bench.report("exec of true, library", times, 4.0);
    vm.kill();
    let name = bench.skerry(&["run", "-d", "--hypervisor", "soft", "demo", "sleep", "1000"])?;
    let mut times = Times::default();
    for _ in 0..bench.options.runs {
        let begun = Instant::now();
        bench.skerry(&["exec", &name, "true"])?;
        times.add(begun.elapsed());
    }
    bench.report("exec of true, skerry exec from start to exit", times, 4.0);
    bench.skerry(&["rm", "-f", &name])?;
    Ok(())
}

fn reset(bench: &Bench) -> Result<()> {
    for (memory, name) in [(512 << 20, "512 MiB"), (2 << 30, "2 GiB")] {
        let booted = bench.vm(memory)?;
        let frozen = booted.capture()?.frozen;
        booted.kill();
        let vm = Vm::resume(&bench.paths, &frozen, &resume(true), &mut |_| {})?;
        let (mut resets, mut ready, mut pages) = (Times::default(), Times::default(), Vec::new());
        for _ in 0..bench.options.runs {
            exec(
                &vm,
                &["dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M", "count=1"],
            )?;
            let rewound = vm.rewind()?;
            resets.add(rewound.reset);
            ready.add(rewound.ready);
            pages.push(rewound.pages as f64);
        }
        let pages = median(&mut pages);
        bench.report(
            &format!("reset, {name}, after 1 MiB dirtied ({pages} pages)"),
            resets,
            1.0,
        );
        bench.report(
            &format!("reset, {name}: until the agent answers"),
            ready,
            12.0,
        );
    }
    Ok(())
}

fn fork(bench: &Bench) -> Result<()> {
    let vm = bench.vm(512 << 20)?;
    let (mut pauses, mut children) = (Times::default(), Times::default());
    for _ in 0..bench.options.runs {
        exec(&vm, &["true"])?;
        let begun = Instant::now();
        let captured = vm.capture()?;
        let child = Vm::resume(&bench.paths, &captured.frozen, &resume(false), &mut |_| {})?;
        children.add(begun.elapsed());
        pauses.add(captured.pause);
        exec(&child, &["true"])?;
    }
    bench.report("fork, 512 MiB: the parent's pause", pauses, 10.0);
    bench.report("fork, 512 MiB: until the child answers", children, 15.0);
    vm.kill();
    let name = bench.skerry(&["run", "-d", "--hypervisor", "soft", "demo", "sleep", "1000"])?;
    let count = bench.options.clones.to_string();
    let mut times = Times::default();
    for _ in 0..(bench.options.runs / 20).max(1) {
        let begun = Instant::now();
        let ids = bench.skerry(&["fork", "--count", &count, "--rm", &name])?;
        times.add(begun.elapsed());
        let ids: Vec<&str> = ids.lines().collect();
        weigh(bench, &ids)?;
        bench.skerry(&[&["rm", "-f"], &ids[..]].concat())?;
    }
    bench.report(
        &format!("fork, {count} children, each a process"),
        times,
        1500.0,
    );
    bench.skerry(&["rm", "-f", &name])?;
    Ok(())
}

/// The share of memory of idle clones, each a process.
fn weigh(bench: &Bench, ids: &[&str]) -> Result<()> {
    std::thread::sleep(Duration::from_secs(2));
    let listed = bench.skerry(&["ps", "--format", "json"])?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    let mut sizes = Vec::new();
    for vm in listed.as_array().into_iter().flatten() {
        if vm["id"].as_str().is_some_and(|id| ids.contains(&id)) {
            let path = format!("/proc/{}/smaps_rollup", vm["pid"]);
            sizes.push(pss(Path::new(&path))?);
        }
    }
    let clones = sizes.len();
    println!(
        "{:<52} {:>8.2} MiB (at most 6 MiB; {clones} clones)",
        "memory of an idle clone (PSS)",
        median(&mut sizes)
    );
    Ok(())
}

fn pss(path: &Path) -> Result<f64> {
    let text = std::fs::read_to_string(path)?;
    let line = text.lines().find(|line| line.starts_with("Pss:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(kib.unwrap_or("0").parse::<f64>()? / 1024.0)
}

fn pool(bench: &Bench) -> Result<()> {
    let image = images::resolve(&bench.paths, "demo", &mut |_| {})?;
    let mut spec = VmSpec::default();
    spec.options.hypervisor = Choice::Only(Backend::Soft);
    let clones = Clones::of_image(&bench.paths, (&image, "demo"), &spec, None, &mut |_| {})?;
    let options = PoolOptions {
        min: 4,
        max: 4,
        ..PoolOptions::default()
    };
    let pool = Pool::open(clones, options)?;
    let (mut acquires, mut releases) = (Times::default(), Times::default());
    for _ in 0..bench.options.runs {
        if !pool.wait_filled(Duration::from_secs(20)) {
            bail!("The pool isn't filled: {:?}", pool.stats());
        }
        while pool.stats().ready == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let begun = Instant::now();
        let vm = pool.acquire()?;
        acquires.add(begun.elapsed());
        exec(&vm, &["true"])?;
        let begun = Instant::now();
        drop(vm);
        releases.add(begun.elapsed());
    }
    bench.report("pool: acquire, warm", acquires, 0.05);
    bench.report("pool: release, as the caller sees it", releases, 0.05);
    Ok(())
}

fn snapshot(bench: &Bench) -> Result<()> {
    let name = bench.skerry(&[
        "run",
        "-d",
        "-m",
        "1G",
        "--hypervisor",
        "soft",
        "demo",
        "sleep",
        "1000",
    ])?;
    let mut pauses = Times::default();
    for number in 0..(bench.options.runs / 5).max(1) {
        let label = format!("bench-{number}");
        let taken = bench.skerry(&["snapshot", "create", "--format", "json", &name, &label])?;
        let taken: serde_json::Value = serde_json::from_str(&taken)?;
        let micros = taken["pause_us"].as_u64().unwrap_or(u64::MAX);
        pauses.add(Duration::from_micros(micros));
        bench.skerry(&["snapshot", "rm", &label])?;
    }
    bench.report("live snapshot, 1 GiB idle: pause", pauses, 30.0);
    bench.skerry(&["rm", "-f", &name])?;
    Ok(())
}

fn main() -> Result<()> {
    let options = Options::parse();
    let data = tempfile::tempdir()?;
    let paths = Paths::at(data.path().join("skerry"));
    let bench = Bench {
        options,
        data,
        paths,
    };
    let all: [(&str, Measure); 6] = [
        ("restore", restore),
        ("exec", exec_true),
        ("reset", reset),
        ("fork", fork),
        ("pool", pool),
        ("snapshot", snapshot),
    ];
    for (name, measure) in all {
        if bench.wanted(name) {
            measure(&bench)?;
        }
    }
    Ok(())
}
