//! How long a Linux guest on the software processor stands while it is copied, and how long it takes
//! to take it back to its base: `memory [--memory MIB] [--pages N] [--sleep µs] [--rounds N] [--cpus N]`.
//!
//! The guest writes to so many pages and sleeps so long, again and again.

#[path = "../tests/common/linux.rs"]
mod linux;

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use skerry_hypervisor::Hypervisor;
use skerry_hypervisor::cpu_model::CpuModel;
use skerry_hypervisor_soft::Soft;
use skerry_machine::{
    Attachments, Machine, MachineConfig, MachineError, MachineHandle, MachineRemote, PageSet,
    SavedRun,
};

const PAGE: u64 = 4096;

/// Counts the guest's dots.
#[derive(Clone, Default)]
struct Dots(Arc<AtomicUsize>);

impl Write for Dots {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // The kernel's messages have dots, too, but none at a line's start.
        self.0.fetch_add(bytes.len(), Ordering::SeqCst);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Dots {
    fn wait(&self, more: usize) {
        let until = self.0.load(Ordering::SeqCst) + more;
        while self.0.load(Ordering::SeqCst) < until {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

struct Options {
    memory: u64,
    pages: u64,
    sleep: u64,
    rounds: usize,
    cpus: u32,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        memory: 512,
        pages: 256,
        sleep: 1000,
        rounds: 200,
        cpus: 1,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let value: u64 = args.next().ok_or("an option needs a value")?.parse()?;
        match arg.as_str() {
            "--memory" => options.memory = value,
            "--pages" => options.pages = value,
            "--sleep" => options.sleep = value,
            "--rounds" => options.rounds = value as usize,
            "--cpus" => options.cpus = value as u32,
            other => return Err(format!("no option {other}").into()),
        }
    }
    Ok(options)
}

fn start(options: &Options, dots: &Dots) -> Result<MachineHandle, Box<dyn Error>> {
    let config = MachineConfig {
        memory: options.memory << 20,
        cpus: options.cpus,
        kernel: linux::KERNEL.into(),
        initrd: Some("init".into()),
        command_line: Some("console=ttyS0 quiet loglevel=0".into()),
        rng: true,
        console: true,
        vsock: Some(3),
        ..MachineConfig::default()
    };
    let mut attachments = Attachments {
        initrd: Some(linux::initrd(options.pages, options.sleep * 1000).into()),
        ..Attachments::default()
    };
    attachments.serial[0] = Some(Box::new(dots.clone()));
    let found = Soft::probe()?;
    let model = CpuModel::best(&found);
    let tables: Vec<_> = (0..options.cpus)
        .map(|id| model.cpuid(&found, options.cpus, id))
        .collect::<Result<_, _>>()?;
    let machine = Machine::new(&Soft::open()?, config, attachments, |id| {
        tables[id as usize].clone()
    })?;
    Ok(machine.start(None)?)
}

fn rebase(remote: &MachineRemote) -> Result<(), Box<dyn Error>> {
    let pages = remote.written()?.coalesce(PageSet::GAP, PageSet::RUNS);
    let fd = rustix::fs::memfd_create("base", rustix::fs::MemfdFlags::CLOEXEC)?;
    let file = File::from(fd);
    remote.for_each_page_run(&pages, |at, bytes| -> Result<(), MachineError> {
        file.write_all_at(bytes, at)
            .map_err(|source| MachineError::Resource {
                what: "base",
                source,
            })
    })?;
    let runs = pages.runs().map(|run| SavedRun {
        at: run.start * PAGE,
        len: (run.end - run.start) * PAGE,
        offset: run.start * PAGE,
    });
    Ok(remote.rebase(file, runs.collect())?)
}

/// Copies memory while the machine runs, then what is left while it stands.
fn live_copy(remote: &MachineRemote) -> Result<(), Box<dyn Error>> {
    let file = File::from(rustix::fs::memfd_create(
        "copy",
        rustix::fs::MemfdFlags::CLOEXEC,
    )?);
    let copy = |pages: &PageSet| {
        remote.for_each_page_run(pages, |at, bytes| -> Result<(), MachineError> {
            file.write_all_at(bytes, at)
                .map_err(|source| MachineError::Resource {
                    what: "copy",
                    source,
                })
        })
    };
    let begun = Instant::now();
    remote.track_writes()?;
    let tracked = begun.elapsed();
    let mut rounds = Vec::new();
    for _ in 0..8 {
        let pages = remote.harvest()?;
        rounds.push(pages.count());
        copy(&pages)?;
        if pages.count() < 64 {
            break;
        }
    }
    let running = begun.elapsed();
    let timed = Instant::now();
    remote.pause()?;
    let paused = timed.elapsed();
    let pages = remote.harvest()?;
    let harvested = timed.elapsed();
    copy(&pages)?;
    let copied = timed.elapsed();
    let state = remote.save_state()?;
    let saved = timed.elapsed();
    remote.resume();
    let stood = timed.elapsed();
    println!(
        "live copy: {running:?} for rounds of {rounds:?} pages, of it the log's start {tracked:?}; then it stood {stood:?} for {} pages: pause {paused:?}, harvest {:?}, copy {:?}, state of {} CPUs {:?}",
        pages.count(),
        harvested - paused,
        copied - harvested,
        state.cpus.len(),
        saved - copied,
    );
    Ok(())
}

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e3;
    println!(
        "{what:<28} median {:.3} ms, 90 % {:.3} ms, most {:.3} ms",
        at(50),
        at(90),
        at(100)
    );
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = options()?;
    let dots = Dots::default();
    let handle = start(&options, &dots)?;
    let remote = handle.remote();
    dots.wait(20);
    std::thread::sleep(Duration::from_millis(500));
    live_copy(remote)?;
    let timed = Instant::now();
    remote.pause()?;
    let paused = timed.elapsed();
    let state = remote.save_state()?;
    let saved = timed.elapsed() - paused;
    let pages = remote.written()?;
    println!(
        "{} MiB: pause {paused:?}, save state {saved:?}; {} pages in {} runs are used, {} runs when coalesced",
        options.memory,
        pages.count(),
        pages.runs().count(),
        pages.coalesce(PageSet::GAP, PageSet::RUNS).runs().count()
    );
    let timed = Instant::now();
    rebase(remote)?;
    println!(
        "copy to a layer and rebase   {:?}, {} pieces",
        timed.elapsed(),
        remote.base_pieces()
    );
    let (mut whole, mut states, mut next, mut pauses) = (vec![], vec![], vec![], vec![]);
    let mut pages = Vec::new();
    for _ in 0..options.rounds {
        let timed = Instant::now();
        remote.resume();
        dots.wait(1);
        next.push(timed.elapsed());
        let timed = Instant::now();
        remote.pause()?;
        pauses.push(timed.elapsed());
        let timed = Instant::now();
        let rewound = remote.rewind(&state)?;
        whole.push(timed.elapsed());
        pages.push(rewound.pages);
        let timed = Instant::now();
        remote.restore_state(state.clone())?;
        states.push(timed.elapsed());
    }
    pages.sort_unstable();
    println!("{} pages written (median)", pages[pages.len() / 2]);
    show("pause", pauses);
    show("rewind", whole);
    show("  of that, restore state", states);
    show("resume to the next dot", next);
    Ok(())
}
