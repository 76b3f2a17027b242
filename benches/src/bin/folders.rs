//! fio on a volume and in a shared folder, in a guest of Skerry's and in one of QEMU's TCG with virtio-blk and
//! virtiofsd: the same kernel, programs and files. Beside them, fio on the host itself.
//!
//! `cargo run --release -p skerry-benches --bin bench-folders -- --rounds 5 --check`

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use skerry_benches::{Machine, QEMU, median, qemu_version, skerry, timed};

/// Throughput of files beside QEMU's TCG
#[derive(Parser)]
struct Options {
    /// Rounds of all jobs; the host comes first, then Skerry or QEMU by turns
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Fail where a row misses its limit
    #[arg(long)]
    check: bool,
    /// Where the files of both lie
    #[arg(long, default_value = "/var/tmp", value_name = "FOLDER")]
    files: PathBuf,
    /// Seconds of each job
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// The QEMU to compare with
    #[arg(long, default_value = QEMU, value_name = "PROGRAM")]
    qemu: PathBuf,
    /// Its server of folders
    #[arg(
        long,
        default_value = "/usr/lib/qemu/virtiofsd",
        value_name = "PROGRAM"
    )]
    virtiofsd: PathBuf,
    /// The fio for the guests
    #[arg(long, default_value = "/usr/bin/fio", value_name = "PROGRAM")]
    fio: PathBuf,
    /// What Skerry runs on
    #[arg(long, default_value = "soft")]
    hypervisor: String,
}

/// Jobs and their options; past the guest's cache, but for the last.
const JOBS: [(&str, &str); 5] = [
    ("read-1m", "--rw=read --bs=1M --direct=1"),
    ("write-1m", "--rw=write --bs=1M --direct=1"),
    ("randread-4k", "--rw=randread --bs=4k --direct=1"),
    ("randwrite-4k", "--rw=randwrite --bs=4k --direct=1"),
    (
        "read-cached",
        "--rw=read --bs=64k --direct=0 --invalidate=1",
    ),
];
/// Where fio's terse lines have KiB/s of reads and of writes.
const READ_FIELD: usize = 6;
const WRITE_FIELD: usize = 47;
const KINDS: [&str; 2] = ["volume", "folder"];
const MEMORY: u32 = 512;
/// How many times as fast as QEMU each row has to be.
const LIMIT: f64 = 1.5;

/// The script that all run: fio in the first argument's folder, for each job with the third argument's options.
fn script(options: &Options, fio: &str) -> String {
    let mut script = String::from("cd \"$1\"\n");
    let seconds = options.seconds;
    for (job, options) in JOBS {
        script.push_str(&format!(
            "echo \"RESULT $2 {job} $({fio} --minimal --thread --name=job --filename=file --size=96M \
             --ioengine=psync --time_based --runtime={seconds} {options} $3 | tail -n 1)\"\n"
        ));
    }
    script.push_str("rm -f file\n");
    script
}

/// A root file system with busybox, fio, and what fio is linked with.
fn make_root(options: &Options, root: &Path) -> Result<()> {
    for folder in [
        "bin", "usr/bin", "proc", "sys", "dev", "tmp", "volume", "folder", "etc",
    ] {
        fs::create_dir_all(root.join(folder))?;
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new);
    let busybox = busybox.iter().find(|path| path.exists());
    let busybox = busybox.context("There is no busybox: install busybox-static")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    for applet in ["sh", "mount", "tail", "poweroff", "rm", "echo", "true"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))?;
    }
    fs::copy(&options.fio, root.join("usr/bin/fio"))
        .with_context(|| format!("There is no {}: install fio", options.fio.display()))?;
    let linked = Command::new("ldd").arg(&options.fio).output()?;
    for word in String::from_utf8_lossy(&linked.stdout).split_whitespace() {
        if word.starts_with('/') {
            let to = root.join(word.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("a library has a folder")?)?;
            fs::copy(word, to)?;
        }
    }
    fs::write(root.join("bench.sh"), script(options, "/usr/bin/fio"))?;
    let init = "#!/bin/sh\nmount -t proc proc /proc\nmount -t devtmpfs dev /dev 2>/dev/null\n\
        mount -t ext4 -o noinit_itable /dev/vda /volume\nmount -t virtiofs folder /folder\n\
        sh /bench.sh /volume volume\nsh /bench.sh /folder folder\npoweroff -f\n";
    fs::write(root.join("init"), init)?;
    for program in ["init", "bin/busybox", "usr/bin/fio"] {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(root.join(program), fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// KiB/s of every job, by its number, on each kind of place.
fn results(text: &str, kinds: &[&str]) -> Result<Vec<f64>> {
    let mut found = Vec::new();
    for kind in kinds {
        for (job, _) in JOBS {
            let begin = format!("RESULT {kind} {job} ");
            let line = text
                .lines()
                .find_map(|line| line.trim().strip_prefix(&begin));
            let line = line.with_context(|| format!("no result of {kind} {job} in:\n{text}"))?;
            let fields: Vec<&str> = line.split(';').collect();
            let at = if job.contains("write") {
                WRITE_FIELD
            } else {
                READ_FIELD
            };
            let speed = fields.get(at).and_then(|field| field.parse().ok());
            found.push(speed.with_context(|| format!("{kind} {job}: {line}"))?);
        }
    }
    Ok(found)
}

/// On the host: through its page cache, which is where both guests' files are.
fn native(options: &Options, work: &Path) -> Result<Vec<f64>> {
    let text = script(options, &options.fio.display().to_string());
    let mut command = Command::new("sh");
    command
        .args(["-c", &text, "bench"])
        .arg(work.join("shared"));
    command.args(["host", "--direct=0 --invalidate=0"]);
    let once = results(&timed(command)?.0, &["host"])?;
    Ok([once.clone(), once].concat())
}

fn ours(options: &Options, work: &Path) -> Result<Vec<f64>> {
    let mut command = Command::new(skerry()?);
    command.args(["run", "--hypervisor", &options.hypervisor, "--memory"]);
    command
        .arg(format!("{MEMORY}M"))
        .args(["-v", "bench:/volume", "-v"]);
    command.arg(format!("{}:/folder", work.join("shared").display()));
    command.arg(format!("dir:{}", work.join("root").display()));
    command.args([
        "sh",
        "-c",
        "sh /bench.sh /volume volume; sh /bench.sh /folder folder",
    ]);
    command.env("XDG_DATA_HOME", work.join("data"));
    results(&timed(command)?.0, &KINDS)
}

/// Ends what it holds when it goes.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn theirs(options: &Options, work: &Path) -> Result<Vec<f64>> {
    let socket = work.join("virtiofsd.sock");
    let _ = fs::remove_file(&socket);
    let mut server = Command::new(&options.virtiofsd);
    server.arg(format!("--socket-path={}", socket.display()));
    server.args(["-o", &format!("source={}", work.join("shared").display())]);
    server
        .args(["-o", "cache=auto"])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let server = server.spawn().with_context(|| {
        let program = options.virtiofsd.display();
        format!("There is no {program}: install qemu-system-common of Debian 12")
    })?;
    let _server = Server(server);
    let begun = Instant::now();
    while !socket.exists() {
        if begun.elapsed() > Duration::from_secs(10) {
            bail!("virtiofsd doesn't listen");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let initrd = work.join("initrd");
    let machine = Machine {
        memory: MEMORY,
        ..Machine::small(&initrd, "console=ttyS0 panic=-1 quiet loglevel=4")
    };
    let mut command = machine.qemu(&options.qemu);
    // The server speaks the modern interface only.
    command.args(["-global", "virtio-mmio.force-legacy=false"]);
    let memory = format!("memory-backend-memfd,id=mem,size={MEMORY}M,share=on");
    command.args(["-object", &memory, "-machine", "memory-backend=mem"]);
    let disk = format!(
        "file={},if=none,id=disk,format=raw,discard=unmap",
        work.join("disk").display()
    );
    command.args(["-drive", &disk, "-device", "virtio-blk-device,drive=disk"]);
    command.args([
        "-chardev",
        &format!("socket,id=fs,path={}", socket.display()),
    ]);
    command.args([
        "-device",
        "vhost-user-fs-device,chardev=fs,tag=folder,queue-size=1024",
    ]);
    results(&timed(command)?.0, &KINDS)
}

fn main() -> Result<()> {
    let options = Options::parse();
    let version = qemu_version(&options.qemu)?;
    let folder = tempfile::tempdir_in(&options.files)?;
    let work = folder.path();
    let root = work.join("root");
    make_root(&options, &root)?;
    fs::create_dir(work.join("shared"))?;
    let packed = "find . | cpio --quiet -o -H newc > ../initrd";
    let status = Command::new("sh")
        .args(["-c", packed])
        .current_dir(&root)
        .status()?;
    if !status.success() {
        bail!("The initial RAM disk can't be made: install cpio");
    }
    // Imports the image and keeps its start; the volume that it leaves is what QEMU gets a copy of.
    let mut first = Command::new(skerry()?);
    first.args(["run", "--hypervisor", &options.hypervisor, "--memory"]);
    first
        .arg(format!("{MEMORY}M"))
        .args(["-v", "bench:/volume", "-v"]);
    first.arg(format!("{}:/folder", work.join("shared").display()));
    first.arg(format!("dir:{}", root.display())).arg("true");
    timed({
        first.env("XDG_DATA_HOME", work.join("data"));
        first
    })?;
    let volume = work.join("data/skerry/volumes/bench/disk");
    let mut copying = Command::new("cp");
    let copied = copying
        .arg("--sparse=always")
        .arg(volume)
        .arg(work.join("disk"))
        .status()?;
    if !copied.success() {
        bail!("The volume can't be copied");
    }
    let mut rounds = Vec::new();
    for round in 0..options.rounds {
        let host = native(&options, work)?;
        let (ours, theirs) = match round % 2 {
            0 => {
                let ours = ours(&options, work)?;
                (ours, theirs(&options, work)?)
            }
            _ => {
                let theirs = theirs(&options, work)?;
                (self::ours(&options, work)?, theirs)
            }
        };
        rounds.push([host, ours, theirs]);
        eprintln!("round {} of {}", round + 1, options.rounds);
    }
    println!(
        "fio, MiB/s, medians of {} rounds in turn; {version} (TCG), virtiofsd",
        options.rounds
    );
    let missed = print_table(&rounds);
    match missed {
        0 => println!("all rows keep the limit"),
        missed => println!("{missed} rows MISSED the limit"),
    }
    if options.check && missed > 0 {
        bail!("{missed} rows are less than {LIMIT} times as fast as QEMU");
    }
    Ok(())
}

/// Prints a row for each job; returns how many miss the limit. Ratios are those of one round each: what
/// else the host does changes from round to round.
fn print_table(rounds: &[[Vec<f64>; 3]]) -> usize {
    println!(
        "{:<20} {:>8} {:>8} {:>8} {:>7}   limit {LIMIT}",
        "job", "host", "skerry", "qemu", "ratio"
    );
    let names = KINDS
        .iter()
        .flat_map(|kind| JOBS.map(|(job, _)| format!("{kind} {job}")));
    let mut missed = 0;
    for (number, name) in names.enumerate() {
        let middle = |figure: &dyn Fn(&[Vec<f64>; 3]) -> f64| {
            median(&mut rounds.iter().map(figure).collect::<Vec<_>>())
        };
        let [host, ours, theirs] =
            [0, 1, 2].map(|who| middle(&|round| round[who][number] / 1024.0));
        let ratio = middle(&|[_, ours, theirs]| ours[number] / theirs[number]);
        let kept = ratio >= LIMIT;
        missed += usize::from(!kept);
        println!(
            "{name:<20} {host:>8.1} {ours:>8.1} {theirs:>8.1} {ratio:>7.2}   {}",
            if kept { "kept" } else { "MISSED" }
        );
    }
    missed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_judged_by_the_ratios_of_its_rounds() {
        let round = |ours: f64, theirs: f64| {
            let rows = |figure| vec![figure; JOBS.len() * KINDS.len()];
            [rows(1.0), rows(ours), rows(theirs)]
        };
        // A round on a busy host is slow for both.
        let kept = [round(30.0, 20.0), round(3.0, 2.0), round(10.0, 9.0)];
        assert_eq!(print_table(&kept), 0);
        let missed = [round(30.0, 20.0), round(2.9, 2.0), round(10.0, 9.0)];
        assert_eq!(print_table(&missed), JOBS.len() * KINDS.len());
    }

    #[test]
    fn results_are_fios() {
        let mut text = String::new();
        for (number, (job, _)) in JOBS.iter().enumerate() {
            let mut fields = vec!["0".to_owned(); 60];
            let write = job.contains("write");
            fields[if write { WRITE_FIELD } else { READ_FIELD }] = number.to_string();
            text += &format!("RESULT host {job} {}\n", fields.join(";"));
        }
        assert_eq!(
            results(&text, &["host"]).unwrap(),
            [0.0, 1.0, 2.0, 3.0, 4.0]
        );
        assert!(results(&text, &KINDS).is_err());
    }
}
