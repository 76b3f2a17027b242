//! Runs the guest program where it is to be measured, and reads what it says.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use skerry_benches::{Machine, busybox_initrd, repository, static_guest, timed, write_initrd};

use crate::Options;
use crate::report::Results;
use crate::rows::Group;

const COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet";
/// How far a guest's clock may be from the host's: more is an error of the measurement.
const CLOCK_SHARE: f64 = 0.03;
/// What of that a serial line's and the host's delays may be.
const CLOCK_SLACK: f64 = 0.1;

/// Where workloads run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum System {
    Native,
    Tcg,
    Skerry,
}

impl System {
    pub const ALL: [Self; 3] = [Self::Native, Self::Tcg, Self::Skerry];
}

/// One workload's time.
pub struct Found {
    pub name: String,
    pub seconds: f64,
    /// What the host's processors had to do for it.
    pub cpu: f64,
}

/// All that runs need.
pub struct Bench<'a> {
    options: &'a Options,
    rootfs: PathBuf,
    disk: PathBuf,
    guest: PathBuf,
    initrd: PathBuf,
    busybox: PathBuf,
    _folder: tempfile::TempDir,
}

impl<'a> Bench<'a> {
    /// Builds what the guests start with.
    pub fn new(options: &'a Options) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let (rootfs, disk) = (
            options.images.join("rootfs"),
            options.images.join("rootfs.ext4"),
        );
        if !rootfs.is_dir() || !disk.is_file() {
            bail!(
                "{} has no rootfs and rootfs.ext4: run {} {0} first",
                options.images.display(),
                repository().join("benches/images.sh").display()
            );
        }
        let guest = static_guest("workloads-guest")?;
        let initrd = folder.path().join("initrd");
        write_initrd(&std::fs::read(&guest)?, &initrd)?;
        let busybox = folder.path().join("busybox");
        busybox_initrd(&busybox)?;
        Ok(Self {
            options,
            rootfs: rootfs.canonicalize()?,
            disk: disk.canonicalize()?,
            guest,
            initrd,
            busybox,
            _folder: folder,
        })
    }

    /// Boots to a shell script and power-off: the whole time. Nothing where nothing boots.
    pub fn boot(&self, system: System) -> Result<Option<f64>> {
        let machine = Machine::small(&self.busybox, COMMAND_LINE);
        let Some(command) = self.machine(system, &machine)? else {
            return Ok(None);
        };
        let before = cpu_of_children();
        let (text, time) = timed(command)?;
        if !text.contains("BOOT-OK") {
            bail!("It did not get to BOOT-OK:\n{text}");
        }
        if self.options.cpu_time {
            return Ok(Some(cpu_of_children() - before));
        }
        Ok(Some(time.as_secs_f64()))
    }

    /// Runs these workloads, one after the other, on a machine with so many processors.
    pub fn workloads(
        &self,
        system: System,
        group: &Group,
        cpus: u32,
        names: &[&str],
        results: &mut Results,
    ) -> Result<Vec<Found>> {
        let arguments = format!(
            "--scale {} --cpus {cpus} {}",
            self.options.scale,
            names.join(" ")
        );
        let line = format!("{COMMAND_LINE} -- {arguments}");
        let machine = Machine {
            memory: self.options.memory,
            cpus,
            disk: Some(&self.disk),
            ..Machine::small(&self.initrd, &line)
        };
        let command = match self.machine(system, &machine)? {
            Some(command) => command,
            None => self.natively(&arguments),
        };
        let limit = Duration::from_secs(self.options.timeout);
        let lines = watched(command, limit, self.options.verbose)?;
        let mut found = read(system, &lines, names, results)?;
        if self.options.cpu_time && group.scaling.is_none() {
            for one in &mut found {
                one.seconds = one.cpu;
            }
        }
        Ok(found)
    }

    fn machine(&self, system: System, machine: &Machine<'_>) -> Result<Option<Command>> {
        Ok(match system {
            System::Native => None,
            System::Tcg => Some(machine.qemu(&self.options.qemu)),
            System::Skerry => {
                let mut command = machine.skerry(&self.options.hypervisor)?;
                command.args(&self.options.skerry);
                Some(command)
            }
        })
    }

    fn natively(&self, arguments: &str) -> Command {
        let mut command = Command::new(&self.guest);
        command.arg("--native").arg(&self.rootfs);
        command.args(arguments.split(' '));
        command
    }
}

/// A line of output, when it came, and what processor time had been taken then.
struct Line {
    text: String,
    at: Instant,
    cpu: f64,
}

/// Processor time that the threads of a process have taken, in seconds.
fn cpu_of(process: u32) -> f64 {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{process}/task")) else {
        return 0.0;
    };
    let nanoseconds: u64 = threads
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    nanoseconds as f64 / 1e9
}

/// Processor time that this process's children have taken that have ended, in seconds.
fn cpu_of_children() -> f64 {
    // Linux proc_pid_stat(5): behind the name in brackets, cutime and cstime are the 14th and 15th,
    // in ticks, of which there are 100 a second.
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = text.rsplit(')').next().unwrap_or_default();
    let ticks: u64 = fields
        .split_whitespace()
        .skip(13)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    ticks as f64 / 100.0
}

/// Runs a command to its end, or to the limit, and notes when it said what.
fn watched(mut command: Command, limit: Duration, verbose: bool) -> Result<Vec<Line>> {
    let name = command.get_program().to_owned();
    let errors = if verbose {
        Stdio::inherit()
    } else {
        Stdio::null()
    };
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .with_context(|| format!("Can't run {}", Path::new(&name).display()))?;
    let result = lines(&mut child, limit);
    if result.is_err() {
        child.kill().ok();
    }
    child.wait()?;
    result
}

fn lines(child: &mut Child, limit: Duration) -> Result<Vec<Line>> {
    let output = child.stdout.take().context("It has no output")?;
    let (send, receive) = channel();
    let process = child.id();
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut bytes = Vec::new();
        while matches!(output.read_until(b'\n', &mut bytes), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&bytes).trim().to_owned();
            let (at, cpu) = (Instant::now(), cpu_of(process));
            if send.send(Line { text, at, cpu }).is_err() {
                break;
            }
            bytes.clear();
        }
    });
    let start = Instant::now();
    let mut lines = Vec::new();
    loop {
        match receive.recv_timeout(limit.saturating_sub(start.elapsed())) {
            Ok(line) => lines.push(line),
            Err(RecvTimeoutError::Disconnected) => return Ok(lines),
            Err(RecvTimeoutError::Timeout) => bail!(
                "It took longer than {} s, after:\n{}",
                limit.as_secs(),
                tail(&lines)
            ),
        }
    }
}

fn tail(lines: &[Line]) -> String {
    let from = lines.len().saturating_sub(12);
    let texts: Vec<&str> = lines[from..].iter().map(|line| &*line.text).collect();
    texts.join("\n")
}

/// The times among the lines. What a workload computed has to be the same wherever it runs, and the
/// guest's clock right.
fn read(
    system: System,
    lines: &[Line],
    names: &[&str],
    results: &mut Results,
) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    let mut clocks = Vec::new();
    let mut begun = 0.0;
    let mut ended = 0.0;
    for line in lines {
        let words: Vec<&str> = line.text.split_whitespace().collect();
        match words[..] {
            ["BEGIN", _] => begun = line.cpu,
            ["END", _] => ended = line.cpu,
            ["WORKLOAD", name, seconds, cpu, checksum] => {
                let name = name.to_owned();
                let seconds = seconds.parse().context("A time is no number")?;
                let cpu = match system {
                    // The program's children are no threads of it, and it knows.
                    System::Native => cpu.parse().context("A time is no number")?,
                    System::Tcg | System::Skerry => ended - begun,
                };
                results.computed(&name, checksum)?;
                found.push(Found { name, seconds, cpu });
            }
            ["CLOCK", seconds] => {
                let seconds: f64 = seconds.parse().context("A time is no number")?;
                clocks.push((seconds, line.at));
            }
            _ => {}
        }
    }
    if found.len() != names.len() || !lines.iter().any(|line| line.text == "WORKLOADS DONE") {
        bail!("It did not come to its end:\n{}", tail(lines));
    }
    if let [(a, first), (b, last)] = clocks[..] {
        let (guest, host) = (b - a, (last - first).as_secs_f64());
        let off = (guest - host).abs();
        if off > host * CLOCK_SHARE + CLOCK_SLACK {
            bail!("Its clock is wrong: {guest:.3} s passed there, {host:.3} s here");
        }
        results.clock(system, off / host.max(CLOCK_SLACK));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(texts: &[&str], seconds: &[f64]) -> Vec<Line> {
        let start = Instant::now();
        texts
            .iter()
            .zip(seconds)
            .map(|(text, after)| Line {
                text: (*text).to_owned(),
                at: start + Duration::from_secs_f64(*after),
                cpu: *after / 2.0,
            })
            .collect()
    }

    const TEXTS: [&str; 6] = [
        "CLOCK 0.0",
        "BEGIN gzip",
        "END gzip",
        "WORKLOAD gzip 9.5 9.4 00ff",
        "CLOCK 10.0",
        "WORKLOADS DONE",
    ];

    fn results() -> Results {
        Results::new(String::new(), 1, 100, false)
    }

    #[test]
    fn times_are_read() {
        let lines = said(&TEXTS, &[0.0, 0.1, 9.5, 9.6, 10.1, 10.1]);
        let found = read(System::Tcg, &lines, &["gzip"], &mut results()).unwrap();
        assert_eq!(found[0].seconds, 9.5);
        assert!((found[0].cpu - 4.7).abs() < 1e-9);
        let found = read(System::Native, &lines, &["gzip"], &mut results()).unwrap();
        assert_eq!(found[0].cpu, 9.4);
    }

    #[test]
    fn a_clock_that_is_not_the_hosts_is_an_error() {
        let lines = said(&TEXTS, &[0.0, 0.1, 9.5, 9.6, 12.0, 12.0]);
        assert!(read(System::Tcg, &lines, &["gzip"], &mut results()).is_err());
    }

    #[test]
    fn another_result_is_an_error() {
        let lines = said(&TEXTS, &[0.0, 0.1, 9.5, 9.6, 10.0, 10.0]);
        let mut results = results();
        results.computed("gzip", "00fe").unwrap();
        assert!(read(System::Tcg, &lines, &["gzip"], &mut results).is_err());
    }

    #[test]
    fn a_guest_that_stops_early_is_an_error() {
        let lines = said(&TEXTS[..4], &[0.0, 0.1, 9.5, 9.6]);
        assert!(read(System::Tcg, &lines, &["gzip"], &mut results()).is_err());
    }
}
