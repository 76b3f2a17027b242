//! iperf3 between a guest and the host's loopback interface: Skerry's network beside QEMU's user-mode
//! network (slirp), with one kernel and one initrd, in turn.
//!
//! `cargo run --release -p skerry-benches --bin bench-network -- --runs 3`

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use skerry_benches::{Machine, QEMU, median, qemu_version, timed};
use skerry_engine::initrd::{Entry, archive};

/// Throughput of the network beside QEMU's slirp
#[derive(Parser)]
struct Options {
    /// Boots of each; every one measures both directions with each number of streams
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Processors of the guest
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// The QEMU to compare with
    #[arg(long, default_value = QEMU, value_name = "PROGRAM")]
    qemu: PathBuf,
    /// What Skerry runs on
    #[arg(long, default_value = "soft")]
    hypervisor: String,
}

/// Both have the guest at 10.0.2.15 and the host at 10.0.2.2. Streams and direction come from the
/// command line.
const SCRIPT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
$b ip link set lo up
$b ip link set eth0 up
$b ip addr add 10.0.2.15/24 dev eth0
$b ip route add default via 10.0.2.2
for word in $($b cat /proc/cmdline); do
    case $word in bench.*) eval "${word#bench.}" ;; esac
done
for streams in 1 4; do
    for way in up down; do
        flag=; [ $way = down ] && flag=-R
        echo "BENCH $way $streams"
        /bin/iperf3 -c 10.0.2.2 -p $port -t $seconds -P $streams -f m -i 0 $flag 2>&1
    done
done
echo BENCH-END
$b poweroff -f
"#;

/// The libraries that a program needs, and the program.
fn with_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output();
    let output = output.context("Can't run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let words = text.split_ascii_whitespace();
    let libraries = words.filter(|word| word.starts_with('/'));
    let libraries: Vec<_> = libraries.map(PathBuf::from).collect();
    if libraries.is_empty() {
        bail!("{} has no libraries: is it there?", program.display());
    }
    Ok(libraries)
}

/// Writes an initrd with busybox, iperf3 and its libraries.
fn initrd(to: &Path) -> Result<()> {
    let iperf = Path::new("/usr/bin/iperf3");
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let read = |path: &Path| {
        fs::read(path).with_context(|| {
            let path = path.display();
            format!("There is no {path}: install iperf3 and busybox-static")
        })
    };
    files.insert("bin/busybox".to_owned(), read(Path::new("/bin/busybox"))?);
    files.insert("bin/iperf3".to_owned(), read(iperf)?);
    files.insert("init".to_owned(), SCRIPT.into());
    for library in with_libraries(iperf)? {
        let name = library.to_string_lossy().trim_start_matches('/').to_owned();
        files.insert(name, read(&library)?);
    }
    // iperf3 makes its files for streams there.
    let mut folders: Vec<String> = ["bin", "dev", "proc", "tmp"].map(str::to_owned).to_vec();
    for name in files.keys() {
        let parents = Path::new(name).ancestors().skip(1);
        let parents = parents.filter_map(|path| path.to_str());
        folders.extend(parents.filter(|path| !path.is_empty()).map(str::to_owned));
    }
    folders.sort();
    folders.dedup();
    let mut entries: Vec<_> = folders.iter().map(|name| Entry::folder(name)).collect();
    entries.push(Entry::console());
    let programs = files.iter();
    entries.extend(programs.map(|(name, data)| Entry::program(name, data)));
    Ok(fs::write(to, archive(&entries))?)
}

/// The server on the host, which goes when this does.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start() -> Result<Self> {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = free.local_addr()?.port();
        drop(free);
        let child = Command::new("iperf3")
            .args(["-s", "-B", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .spawn()
            .context("There is no iperf3: install it")?;
        let server = Self { child, port };
        for _ in 0..100 {
            // It takes one that says nothing for a client that went away.
            if TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() {
                std::thread::sleep(Duration::from_millis(200));
                return Ok(server);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("iperf3 doesn't listen at port {port}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Mbit/s that arrived, by way and streams.
type Figures = BTreeMap<(String, u32), f64>;

/// What the guest printed, as figures.
fn figures(text: &str) -> Result<Figures> {
    let mut figures = Figures::new();
    let mut current = None;
    for line in text.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        if let ["BENCH", way, streams] = words[..] {
            current = Some((way.to_owned(), streams.parse()?));
        }
        let unit = words.iter().position(|word| *word == "Mbits/sec");
        if let (Some(unit), Some((way, streams)), Some(&"receiver")) =
            (unit, &current, words.last())
            && (*streams == 1 || line.starts_with("[SUM]"))
        {
            let number = words.get(unit.wrapping_sub(1)).context("no number")?;
            figures.insert((way.clone(), *streams), number.parse()?);
        }
    }
    if figures.len() != 4 {
        bail!("The guest measured {} of 4:\n{text}", figures.len());
    }
    Ok(figures)
}

fn main() -> Result<()> {
    let options = Options::parse();
    let folder = tempfile::tempdir()?;
    let initrd_path = folder.path().join("initrd");
    initrd(&initrd_path)?;
    let version = qemu_version(&options.qemu)?;
    let server = Server::start()?;
    let command_line = format!(
        "console=ttyS0 panic=-1 quiet bench.port={} bench.seconds={}",
        server.port, options.seconds
    );
    let machine = Machine {
        cpus: options.cpus,
        ..Machine::small(&initrd_path, &command_line)
    };
    let mut ours: BTreeMap<(String, u32), Vec<f64>> = BTreeMap::new();
    let mut theirs = ours.clone();
    for _ in 0..options.runs {
        let mut command = machine.skerry(&options.hypervisor)?;
        command.args(["--network", "full"]);
        for (key, value) in figures(&timed(command)?.0)? {
            ours.entry(key).or_default().push(value);
        }
        let mut command = machine.qemu(&options.qemu);
        command.args(["-netdev", "user,id=net"]);
        command.args(["-device", "virtio-net-device,netdev=net"]);
        for (key, value) in figures(&timed(command)?.0)? {
            theirs.entry(key).or_default().push(value);
        }
    }
    println!(
        "iperf3 over TCP, {} s each, {} runs in turn, {} processor(s), Mbit/s that arrived",
        options.seconds, options.runs, options.cpus
    );
    println!(
        "skerry ({}) beside {version} (TCG, slirp)",
        options.hypervisor
    );
    println!("way   streams   skerry    slirp   ratio (median of pairs)");
    let mut least = f64::INFINITY;
    for (key, ours) in &mut ours {
        let theirs = theirs.get_mut(key).context("QEMU measured less")?;
        let mut ratios: Vec<f64> = ours.iter().zip(&*theirs).map(|(a, b)| a / b).collect();
        let ratio = median(&mut ratios);
        least = least.min(ratio);
        let (ours, theirs) = (median(ours), median(theirs));
        println!(
            "{:5} {:7} {ours:8.0} {theirs:8.0}   {ratio:.2}",
            key.0, key.1
        );
    }
    println!("least ratio: {least:.2}, limit: 2");
    if least < 2.0 {
        bail!("Skerry's network is less than twice as fast");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_that_arrived() {
        let mut text = String::new();
        for (way, streams) in [("up", 1), ("down", 1), ("up", 4), ("down", 4)] {
            text += &format!("BENCH {way} {streams}\n");
            text += "[  5]   0.00-4.00   sec  1 MBytes  10.5 Mbits/sec    0             sender\n";
            text += "[  5]   0.00-4.00   sec  1 MBytes  10.1 Mbits/sec                  receiver\n";
            if streams > 1 {
                text += "[SUM]   0.00-4.00   sec  1 MBytes  40.2 Mbits/sec              receiver\n";
            }
        }
        let figures = figures(&text).unwrap();
        assert_eq!(figures[&("up".to_owned(), 1)], 10.1);
        assert_eq!(figures[&("down".to_owned(), 4)], 40.2);
        assert!(super::figures("BENCH up 1\n").is_err());
    }
}
