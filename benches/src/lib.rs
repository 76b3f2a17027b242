//! What the benchmarks share: building guests, finding peers, running them, medians.
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The repository's root.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
        .to_owned()
}

/// The repository's guest kernel.
pub fn kernel() -> PathBuf {
    repository().join("guest/kernel/bzImage-x86_64")
}

/// The `skerry` program beside the running benchmark.
pub fn skerry() -> Result<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name("skerry");
    if !beside.exists() {
        bail!(
            "There is no {}: build it with cargo build --release first",
            beside.display()
        );
    }
    Ok(beside)
}

/// The peer, where none else is named.
pub const QEMU: &str = "qemu-system-x86_64";

/// The version line of a QEMU.
pub fn qemu_version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output();
    let output = output.with_context(|| {
        format!(
            "There is no {} to compare with: install qemu-system-x86, or run benches/qemu.sh",
            program.display()
        )
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().context("QEMU has no version")?;
    Ok(line.to_owned())
}

/// Builds a program of `benches/guests` without shared libraries.
pub fn static_guest(name: &str) -> Result<PathBuf> {
    let target = repository().join("target/static-guest");
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(repository())
        .args(["build", "--release", "--quiet", "-p", "skerry-bench-guests"])
        .args(["--bin", name, "--target-dir"])
        .arg(&target)
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .env(
            "RUSTFLAGS",
            "-C target-feature=+crt-static -C relocation-model=static",
        )
        .status()
        .context("Can't run cargo")?;
    if !status.success() {
        bail!("The guest program {name} can't be built");
    }
    Ok(target.join("x86_64-unknown-linux-gnu/release").join(name))
}

/// Writes an initial RAM disk whose `/init` is `program`.
pub fn write_initrd(program: &[u8], to: &Path) -> Result<()> {
    let archive = skerry_engine::initrd::with_init(program);
    let mut file = std::fs::File::create(to)?;
    file.write_all(&archive)?;
    Ok(())
}

/// Writes busybox with an `/init` script that prints BOOT-OK and powers off.
pub fn busybox_initrd(to: &Path) -> Result<()> {
    const SCRIPT: &str = "#!/bin/busybox sh\n\
        /bin/busybox mount -t proc proc /proc\n\
        echo BOOT-OK\n\
        /bin/busybox poweroff -f\n";
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find_map(|path| std::fs::read(path).ok())
        .context("There is no busybox: install busybox-static")?;
    let archive = skerry_engine::initrd::archive(&[
        skerry_engine::initrd::Entry::folder("dev"),
        skerry_engine::initrd::Entry::console(),
        skerry_engine::initrd::Entry::folder("proc"),
        skerry_engine::initrd::Entry::folder("bin"),
        skerry_engine::initrd::Entry::program("bin/busybox", &busybox),
        skerry_engine::initrd::Entry::program("init", SCRIPT.as_bytes()),
    ]);
    std::fs::write(to, archive)?;
    Ok(())
}

/// Skerry, booting the repository's kernel with `initrd` on `hypervisor`.
pub fn skerry_boot(initrd: &Path, command_line: &str, hypervisor: &str) -> Result<Command> {
    Machine::small(initrd, command_line).skerry(hypervisor)
}

/// A QEMU with TCG, booting the same.
pub fn qemu_boot(program: &Path, initrd: &Path, command_line: &str) -> Command {
    Machine::small(initrd, command_line).qemu(program)
}

/// What is booted, on Skerry and on its peer.
#[derive(Clone, Copy, Debug)]
pub struct Machine<'a> {
    /// The initial RAM disk.
    pub initrd: &'a Path,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// MiB of memory.
    pub memory: u32,
    /// Processors.
    pub cpus: u32,
    /// A disk, not to be written.
    pub disk: Option<&'a Path>,
}

impl<'a> Machine<'a> {
    /// One processor, little memory, no disk.
    pub fn small(initrd: &'a Path, command_line: &'a str) -> Self {
        Self {
            initrd,
            command_line,
            memory: 256,
            cpus: 1,
            disk: None,
        }
    }

    /// Skerry with this machine.
    pub fn skerry(&self, hypervisor: &str) -> Result<Command> {
        let mut command = Command::new(skerry()?);
        command
            .args(["boot", "--hypervisor", hypervisor])
            .args(["--memory", &format!("{}M", self.memory)])
            .args(["--cpus", &self.cpus.to_string()])
            .arg("--kernel")
            .arg(kernel())
            .arg("--initrd")
            .arg(self.initrd)
            .args(["--cmdline", self.command_line, "--no-reboot"]);
        if let Some(disk) = self.disk {
            command
                .arg("--disk")
                .arg(format!("{},ro", disk.to_string_lossy()));
        }
        Ok(command)
    }

    /// QEMU's TCG with this machine.
    ///
    /// The frequency is told: calibrating against a timer on a busy host hangs now and then.
    pub fn qemu(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .args(["-M", "microvm,accel=tcg,pit=on,pic=on,rtc=on,acpi=on"])
            .args(["-cpu", "max", "-no-reboot"])
            .args(["-m", &self.memory.to_string()])
            .args(["-smp", &self.cpus.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-serial", "stdio"])
            .arg("-kernel")
            .arg(kernel())
            .arg("-initrd")
            .arg(self.initrd)
            .arg("-append")
            .arg(with_tsc(self.command_line));
        if let Some(disk) = self.disk {
            command
                .arg("-drive")
                .arg(format!(
                    "id=root,file={},format=raw,if=none,readonly=on",
                    disk.to_string_lossy().replace(',', ",,")
                ))
                .args(["-device", "virtio-blk-device,drive=root"]);
        }
        command
    }
}

/// The command line with the time-stamp counter's frequency, before what is for `/init`.
fn with_tsc(command_line: &str) -> String {
    let frequency = format!("tsc_early_khz={} tsc=reliable", host_tsc_khz());
    match command_line.split_once(" -- ") {
        Some((kernel, init)) => format!("{kernel} {frequency} -- {init}"),
        None => format!("{command_line} {frequency}"),
    }
}

/// The host's time-stamp counter frequency in kHz: QEMU's TCG passes the counter through.
fn host_tsc_khz() -> u64 {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find(|line| line.starts_with("cpu MHz"))
        .and_then(|line| line.split(':').nth(1))
        .and_then(|mhz| mhz.trim().parse::<f64>().ok())
        .map_or(2_000_000, |mhz| (mhz * 1000.0) as u64)
}

/// Runs a command to its end; its output and how long it took.
pub fn timed(mut command: Command) -> Result<(String, Duration)> {
    let start = Instant::now();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("Can't run {:?}", command.get_program()))?;
    let taken = start.elapsed();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok((text, taken))
}

/// The middle value.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_is_the_kernels_not_inits() {
        let line = with_tsc("quiet -- gzip");
        assert!(line.starts_with("quiet tsc_early_khz="), "{line}");
        assert!(line.ends_with(" -- gzip"), "{line}");
    }

    #[test]
    fn medians() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&mut []).is_nan());
    }
}
