//! Restores a snapshot, runs a command in the clone and ends it, again and again in one process, and
//! watches what the process and the store hold meanwhile: what is held at the end and wasn't after the
//! first hundred cycles is a leak.
//!
//! `cargo run --release -p skerry-benches --bin bench-cycles -- --cycles 10000`

use std::fmt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use skerry_engine::command::{self, CommandSpec, Surroundings};
use skerry_engine::frozen::Frozen;
use skerry_engine::hypervisor::{Backend, Choice};
use skerry_engine::vm::{ResumeSpec, Vm, VmSpec};
use skerry_engine::{ExitStatus, Paths, images, snapshots};

/// Cycles after which everything that is made once has been made.
const SETTLED: usize = 100;
/// Memory of a process moves by as much as its allocator likes.
const SLACK_KIB: u64 = 16 << 10;

/// Many restores in one process
#[derive(Parser)]
struct Options {
    /// How often
    #[arg(long, default_value_t = 10_000)]
    cycles: usize,
}

/// What a process and its store hold.
#[derive(Clone, Copy)]
struct Held {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    resident_kib: u64,
    store_bytes: u64,
    scratch_files: usize,
    processes: usize,
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            descriptors,
            threads,
            mappings,
            resident_kib,
            store_bytes,
            scratch_files,
            processes,
        } = self;
        write!(
            f,
            "{descriptors} descriptors, {threads} threads, {mappings} mappings, {resident_kib} KiB \
             resident, {processes} child processes, {scratch_files} scratch files, store {store_bytes} bytes"
        )
    }
}

fn count(path: impl AsRef<Path>) -> Result<usize> {
    let path = path.as_ref();
    let entries = std::fs::read_dir(path).with_context(|| path.display().to_string())?;
    Ok(entries.count())
}

/// The bytes of all files below a folder.
fn size(folder: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        total += match metadata.is_dir() {
            true => size(&entry.path())?,
            false => metadata.len(),
        };
    }
    Ok(total)
}

impl Held {
    fn now(paths: &Paths) -> Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let resident = line.and_then(|line| line.split_whitespace().nth(1));
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
        Ok(Self {
            descriptors: count("/proc/self/fd")?,
            threads: count("/proc/self/task")?,
            mappings: maps.lines().count(),
            resident_kib: resident.unwrap_or_default().parse()?,
            store_bytes: size(&paths.snapshots())?,
            scratch_files: count(paths.scratch())?,
            processes: children.split_whitespace().count(),
        })
    }

    /// What there is more of than before.
    fn leaks(&self, before: &Self) -> Vec<&'static str> {
        // A few mappings more are an allocator's arenas.
        let grown = [
            ("descriptors", self.descriptors > before.descriptors),
            ("threads", self.threads > before.threads),
            ("mappings", self.mappings > before.mappings + 16),
            (
                "memory",
                self.resident_kib > before.resident_kib + SLACK_KIB,
            ),
            ("the store", self.store_bytes > before.store_bytes),
            ("scratch files", self.scratch_files > before.scratch_files),
            ("processes", self.processes > before.processes),
        ];
        let grown = grown.into_iter().filter(|(_, grown)| *grown);
        grown.map(|(name, _)| name).collect()
    }
}

fn soft() -> Choice {
    Choice::Only(Backend::Soft)
}

fn echo(vm: &Vm, word: &str) -> Result<()> {
    let argv = vec!["echo".to_owned(), word.to_owned()];
    let request = command::request(argv, &Surroundings::default(), &CommandSpec::default());
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let ended = vm.exec(request)?.wait(&mut out, &mut err)?;
    match ended == ExitStatus::Code(0) && out == format!("{word}\n").as_bytes() {
        true => Ok(()),
        false => bail!("echo {word} ended with {ended:?} and {out:?}"),
    }
}

fn cycle(paths: &Paths, name: &str, number: usize) -> Result<()> {
    let frozen = Frozen::open(paths, name)?;
    let spec = ResumeSpec {
        hypervisor: soft(),
        // Every third can be taken back to where it began, and is.
        rewindable: number.is_multiple_of(3),
        ..ResumeSpec::default()
    };
    let vm = Vm::resume(paths, &frozen, &spec, &mut |_| {})?;
    echo(&vm, &number.to_string())?;
    if spec.rewindable {
        vm.rewind()?;
        echo(&vm, "again")?;
    }
    // Every tenth has a child.
    if number.is_multiple_of(10) {
        let captured = vm.capture()?;
        let child = Vm::resume(paths, &captured.frozen, &spec, &mut |_| {})?;
        echo(&child, "child")?;
        child.kill();
        let _ = child.wait();
    }
    vm.kill();
    let _ = vm.wait();
    Ok(())
}

fn main() -> Result<()> {
    let options = Options::parse();
    let data = tempfile::tempdir()?;
    let paths = Paths::at(data.path().join("skerry"));
    let image = images::resolve(&paths, "demo", &mut |_| {})?;
    let mut spec = VmSpec::default();
    spec.options.hypervisor = soft();
    // Its start is kept, and is the snapshot.
    let vm = Vm::start(&paths, &image, "demo", &spec, &mut |_| {})?;
    vm.kill();
    let _ = vm.wait();
    drop(vm);
    let kept = snapshots::list(&paths)?.snapshots;
    let name = kept.first().context("No start was kept")?.id.to_string();
    let begun = Instant::now();
    let mut before = None;
    for number in 1..=options.cycles {
        cycle(&paths, &name, number).with_context(|| format!("Cycle {number} failed"))?;
        if number == SETTLED.min(options.cycles / 2).max(1) {
            before = Some(Held::now(&paths)?);
        }
        if number.is_multiple_of((options.cycles / 10).max(1)) {
            println!("{number:>6} cycles: {}", Held::now(&paths)?);
        }
    }
    let took = begun.elapsed().as_secs_f64();
    let leaks = before.map_or(Ok(vec![]), |before| {
        Held::now(&paths).map(|now| now.leaks(&before))
    })?;
    println!(
        "{} cycles in {took:.1} s, {:.1} ms each",
        options.cycles,
        took * 1e3 / options.cycles as f64
    );
    match leaks.is_empty() {
        true => Ok(()),
        false => bail!("More than before: {}", leaks.join(", ")),
    }
}
