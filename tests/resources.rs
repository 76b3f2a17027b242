//! What a machine may take of the host is what it takes, and what `stats` says is what the host says.

mod common;

use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::home::Home;
use serde_json::Value;

/// How far what we say may be from what the host says.
const TOLERANCE: f64 = 0.05;

#[track_caller]
fn close(what: &str, said: f64, true_value: f64) {
    let apart = (said / true_value - 1.0).abs();
    assert!(
        apart <= TOLERANCE,
        "{what}: {said}, and the host says {true_value}"
    );
}

/// Processor time of a process, in seconds (proc(5)).
fn processor_seconds(pid: u64) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    let (_, fields) = stat.rsplit_once(')').expect("fields");
    let fields: Vec<f64> = fields
        .split(' ')
        .map(|f| f.parse().unwrap_or(0.0))
        .collect();
    (fields[12] + fields[13]) / rustix::param::clock_ticks_per_second() as f64
}

/// A number of bytes in a file of `/proc` with lines of `Name: N kB`.
fn kilobytes(pid: u64, file: &str, name: &str) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number: f64 = line
        .trim_start_matches(':')
        .trim()
        .strip_suffix(" kB")?
        .parse()
        .ok()?;
    Some(number * 1024.0)
}

fn pid(home: &Home, name: &str) -> u64 {
    home.info(name).expect("it runs")["pid"]
        .as_u64()
        .expect("a process")
}

fn stats(home: &Home, name: &str) -> Value {
    let line = home.done(&["stats", "--no-stream", "--format", "json", name]);
    serde_json::from_str(&line).expect("one line of JSON")
}

/// Looks at a machine that is busy with the same all the time: the host first, then `stats`, then the host
/// again, whose mean it has to be.
#[test]
fn a_busy_machine_takes_what_stats_says() {
    let home = Home::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the guest comes");
        std::io::copy(&mut stream, &mut std::io::sink()).expect("bytes")
    });
    let sent = 40u64 << 20;
    let written = 48u64 << 20;
    // Memory that stays, bytes for the host, bytes for the disk; then work without end.
    let script = format!(
        "mkdir /m; mount -t tmpfs -o size=100M none /m; dd if=/dev/urandom of=/m/x bs=1M count=64 2>/dev/null; \
         dd if=/dev/zero bs=64k count={} 2>/dev/null | nc 10.0.2.2 {port}; \
         dd if=/m/x of=/disk bs=1M count=48 2>/dev/null; sync; echo ready; while :; do :; done",
        sent >> 16
    );
    let options = ["--ready", "ready", "--network", "full"];
    home.start_with("busy", &options, &["sh", "-c", &script]);
    home.done(&["wait", "--ready", "busy"]);
    assert_eq!(server.join().expect("server"), sent);
    let pid = pid(&home, "busy");

    // `stats` looks for a second of its own: the host's figure is that of a span around it, of a machine
    // that does nothing but compute.
    let mut said = Vec::new();
    let (before, began) = (processor_seconds(pid), Instant::now());
    for _ in 0..4 {
        said.push(stats(&home, "busy"));
    }
    let taken = processor_seconds(pid) - before;
    let percent = 100.0 * taken / began.elapsed().as_secs_f64();
    let mean = said
        .iter()
        .map(|one| one["cpu_percent"].as_f64().expect("percent"))
        .sum::<f64>()
        / 4.0;
    close("processor time", mean, percent);
    let last = &said[3];
    close(
        "processor time in all",
        last["cpu_seconds"].as_f64().expect("seconds"),
        processor_seconds(pid),
    );
    // The superuser may add up the pages; others are told by the kernel.
    let resident = kilobytes(pid, "smaps_rollup", "Rss")
        .or_else(|| kilobytes(pid, "status", "VmRSS"))
        .expect("resident pages");
    close(
        "memory",
        last["resident"].as_f64().expect("bytes"),
        resident,
    );
    assert!(resident > f64::from(64 << 20), "{resident}");
    let traffic = &last["traffic"];
    let moved = |name: &str| traffic[name].as_f64().expect("bytes");
    close("sent", moved("network_sent"), sent as f64);
    assert!(moved("network_received") < sent as f64 / 4.0, "{traffic}");
    close("written", moved("block_written"), written as f64);
    let table = home.done(&["stats", "--no-stream"]);
    assert!(
        table.contains("NET I/O") && table.contains("BLOCK I/O"),
        "{table}"
    );
}

/// How much of one processor a machine's process takes while it computes, looked at for a while.
fn share(home: &Home, name: &str) -> f64 {
    let pid = pid(home, name);
    let (before, began) = (processor_seconds(pid), Instant::now());
    std::thread::sleep(Duration::from_secs(3));
    (processor_seconds(pid) - before) / began.elapsed().as_secs_f64()
}

const BUSY: &str = "while :; do :; done";

/// The bound holds whoever sees to it: on hosts where we may make cgroups one does, elsewhere the machine
/// itself; and for one that is started again.
#[test]
fn a_fraction_of_a_processor_is_no_more_than_that() {
    let home = Home::new();
    home.start_with("slow", &["--cpus", "0.25"], &["sh", "-c", BUSY]);
    let slow = share(&home, "slow");
    assert!((0.1..0.32).contains(&slow), "{slow}");
    let info: Value = serde_json::from_str(&home.done(&["inspect", "slow"])).expect("JSON");
    assert_eq!(
        (&info["cpus"], &info["nano_cpus"]),
        (&1.into(), &250_000_000.into())
    );
    assert_eq!(home.sh("slow", "nproc"), "1");
    home.done(&["restart", "-t", "0", "slow"]);
    let slow = share(&home, "slow");
    assert!((0.1..0.32).contains(&slow), "{slow} after a new start");
    // So does a fork of it.
    home.done(&["fork", "--name", "copy", "slow"]);
    let copy = share(&home, "copy");
    assert!(copy < 0.32, "{copy}");
    home.start_with("two", &["--cpus", "1.5"], &["sh", "-c", BUSY]);
    assert_eq!(home.sh("two", "nproc"), "2");
    for wrong in ["0", "0.001", "65", "x"] {
        let ran = home.run(&["run", "--cpus", wrong, "demo", "true"]);
        assert_eq!(ran.status, 125, "{ran:?}");
    }
}

/// A cgroup of version 1 or 2 for a test, where this host lets us make one: its path below the mount, and
/// the folders of the controllers.
fn parent() -> Option<(String, Vec<PathBuf>)> {
    let name = format!("skerry-test-{}", std::process::id());
    let root = Path::new("/sys/fs/cgroup");
    let unified = std::fs::read_to_string(root.join("cgroup.controllers"));
    let roots = match unified {
        Ok(controllers) if controllers.contains("cpu") => vec![root.to_owned()],
        _ => vec![root.join("cpu"), root.join("memory")],
    };
    let folders: Vec<PathBuf> = roots.iter().map(|root| root.join(&name)).collect();
    let made = folders
        .iter()
        .all(|folder| std::fs::create_dir(folder).is_ok());
    if !made {
        folders
            .iter()
            .for_each(|folder| drop(std::fs::remove_dir(folder)));
    }
    made.then_some((name, folders))
}

#[test]
fn a_machine_is_put_where_it_is_to_be() {
    let home = Home::new();
    let refused = ["run", "--cgroup-parent", "/nothing/there", "demo", "true"];
    home.refused(&refused, &["/nothing/there", "--cgroup-parent"]);
    home.refused(
        &["run", "--cgroup-parent", "../x", "demo", "true"],
        &["../x"],
    );
    let Some((name, folders)) = parent() else {
        eprintln!("skipped: this user may make no cgroup here");
        return;
    };
    let options = ["--cgroup-parent", &name, "--cpus", "0.5", "-m", "256m"];
    home.start_with("held", &options, &["sleep", "1000"]);
    let pid = pid(&home, "held");
    let own = |folder: &PathBuf| folder.join(format!("skerry-{pid}"));
    let procs: Vec<String> = folders
        .iter()
        .map(|folder| {
            std::fs::read_to_string(own(folder).join("cgroup.procs")).expect("its cgroup")
        })
        .collect();
    assert!(
        procs.iter().all(|procs| procs.trim() == pid.to_string()),
        "{procs:?}"
    );
    let read = |files: [&str; 2]| {
        let all = folders
            .iter()
            .flat_map(|folder| files.map(|file| own(folder).join(file)));
        let mut texts = all.filter_map(|path| std::fs::read_to_string(path).ok());
        texts.next().expect("a bound").trim().to_owned()
    };
    let quota = read(["cpu.max", "cpu.cfs_quota_us"]);
    assert!(quota.starts_with("50000"), "{quota}");
    let most: u64 = read(["memory.max", "memory.limit_in_bytes"])
        .parse()
        .expect("bytes");
    assert_eq!(most, 512 << 20);
    home.done(&["rm", "-f", "held"]);
    common::eventually("the process's end", || {
        !Path::new(&format!("/proc/{pid}")).exists()
    });
    // The next one removes what it left, and so do we.
    home.done(&[
        "run",
        "--hypervisor",
        "soft",
        "--cgroup-parent",
        &name,
        "--cpus",
        "0.5",
        "demo",
        "true",
    ]);
    for folder in &folders {
        assert!(!own(folder).exists(), "{} is left", own(folder).display());
        for entry in std::fs::read_dir(folder).expect("folder").flatten() {
            if entry.path().is_dir() {
                std::fs::remove_dir(entry.path()).expect("an empty cgroup");
            }
        }
        std::fs::remove_dir(folder).expect("an empty cgroup");
    }
}

#[test]
fn processes_are_counted() {
    let home = Home::new();
    let forks = "i=0; while [ $i -lt 40 ]; do sleep 100 & i=$((i+1)); done; echo all";
    let limited = [
        "run",
        "--hypervisor",
        "soft",
        "--pids-limit",
        "16",
        "demo",
        "sh",
        "-c",
    ];
    let ran = home.run(&[&limited[..], &[forks]].concat());
    assert!(ran.status != 0 && ran.text() != "all\n", "{ran:?}");
    assert!(ran.stderr.contains("fork"), "{ran:?}");
    // The guest's superuser can't change it; a machine without a limit has none; -1 is none.
    let change = "echo 1000 2>/dev/null >/sys/fs/cgroup/pids.max; cat /sys/fs/cgroup/pids.max";
    assert_eq!(home.done(&[&limited[..], &[change]].concat()), "16");
    let free = ["run", "--hypervisor", "soft", "demo", "sh", "-c", forks];
    home.run(&free).expect(0, "all\n");
    let none = [
        "run",
        "--hypervisor",
        "soft",
        "--pids-limit",
        "-1",
        "demo",
        "sh",
        "-c",
        forks,
    ];
    home.run(&none).expect(0, "all\n");
    home.refused(
        &["run", "--pids-limit", "5000000", "demo", "true"],
        &["4194304"],
    );
    // One that is made now and started later has it each time, and those that go on from it too.
    let create = [
        "create",
        "--hypervisor",
        "soft",
        "--name",
        "later",
        "--pids-limit",
        "24",
    ];
    home.done(&[&create[..], &["demo", "sleep", "1000"]].concat());
    let most = |name: &str| home.sh(name, "cat /sys/fs/cgroup/pids.max");
    for _ in 0..2 {
        home.done(&["start", "later"]);
        assert_eq!(most("later"), "24");
        home.done(&["kill", "later"]);
        home.run(&["wait", "later"]);
    }
    home.done(&["start", "later"]);
    home.done(&["fork", "--name", "copy", "later"]);
    assert_eq!(most("copy"), "24");
    let info: Value = serde_json::from_str(&home.done(&["inspect", "later"])).expect("JSON");
    assert_eq!(info["pids_limit"], 24);
}

/// Fills the disk, says how much of it was written in MiB.
const FILL: &str =
    "dd if=/dev/zero of=/big bs=1M count=2000 2>/dev/null; echo $? $(($(stat -c %s /big) >> 20))";

#[test]
fn a_disk_ends_where_it_was_to_end() {
    let home = Home::new();
    let sized = |size: &str, command: &[&str]| {
        let size = format!("size={size}");
        let run = [
            "run",
            "--hypervisor",
            "soft",
            "--storage-opt",
            &size,
            "demo",
        ];
        home.done(&[&run[..], command].concat())
    };
    // From a boot, and from the start that it left.
    for _ in 0..2 {
        let text = sized("300M", &["sh", "-c", FILL]);
        let (status, written) = text.split_once(' ').expect("two numbers");
        let written: u64 = written.parse().expect("MiB");
        assert!(status == "1" && (200..300).contains(&written), "{text}");
    }
    // Larger than the usual.
    let size = ["sh", "-c", "df -k / | tail -1 | awk '{ print $2 }'"];
    let total: u64 = sized("100G", &size).parse().expect("KiB");
    assert!((95 << 20..100 << 20).contains(&total), "{total}");
    // The bound and the content outlive the machine.
    let create = [
        "create",
        "--hypervisor",
        "soft",
        "--storage-opt",
        "size=300M",
        "--name",
        "kept",
    ];
    home.done(&[&create[..], &["demo", "sleep", "1000"]].concat());
    home.done(&["start", "kept"]);
    let first = home.sh("kept", FILL);
    assert!(first.starts_with("1 2"), "{first}");
    home.sh("kept", "sync");
    home.done(&["stop", "-t", "0", "kept"]);
    home.done(&["start", "kept"]);
    assert_eq!(
        first,
        format!("1 {}", home.number("kept", "stat -c %s /big") >> 20)
    );
    home.sh(
        "kept",
        "rm /big && dd if=/dev/zero of=/small bs=1M count=100 2>/dev/null",
    );
    // A snapshot has its disk, of that size.
    home.done(&["rm", "-f", "kept"]);
    home.start_with(
        "live",
        &["--storage-opt", "size=300M", "--rm"],
        &["sleep", "1000"],
    );
    home.done(&["snapshot", "create", "live", "point"]);
    home.restore("point", "back");
    assert!(home.sh("back", FILL).starts_with("1 2"));
    // What can't be.
    home.refused(
        &["run", "--storage-opt", "size=100M", "demo", "true"],
        &["256 MiB"],
    );
    let both = [
        "run",
        "--read-only",
        "--storage-opt",
        "size=1G",
        "demo",
        "true",
    ];
    home.refused(&both, &["--read-only"]);
}

#[test]
fn an_image_that_does_not_fit_is_refused() {
    let home = Home::new();
    let root = home.path("rootfs");
    std::fs::create_dir_all(root.join("bin")).expect("folder");
    // It has no holes and does not compress.
    let mut noise = vec![0; 300 << 20];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut noise))
        .expect("noise");
    std::fs::write(root.join("big"), &noise).expect("file");
    let image = format!("dir:{}", root.display());
    let refused = [
        "run",
        "--hypervisor",
        "soft",
        "--storage-opt",
        "size=256M",
        &image,
        "/big",
    ];
    home.refused(
        &refused,
        &["The image takes 30", "256 MiB", "--storage-opt"],
    );
}

#[test]
fn doctor_says_what_is_bounded() {
    let home = Home::empty();
    let text = home.run(&["doctor", "--format", "json"]).text();
    let report: Value = serde_json::from_str(&text).expect("JSON");
    let resources = report["resources"].as_array().expect("bounds");
    let names: Vec<&str> = resources
        .iter()
        .filter_map(|one| one["name"].as_str())
        .collect();
    assert_eq!(names, ["cpus", "memory", "processes", "disk"]);
    assert!(resources.iter().all(|one| one["holds"] == true), "{report}");
}
