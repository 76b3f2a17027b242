//! The process of a machine is confined, every thread of it, whatever the machine does; and what it
//! takes of the host's memory goes back when its guest is done with it.

mod common;

use std::fs;

use common::home::Home;
use common::{eventually, skerry};

/// The process of a machine.
fn process(home: &Home, name: &str) -> u64 {
    let info = home.info(name).expect("it is known");
    info["pid"].as_u64().expect("a process")
}

/// The values of `fields` for each thread of a process, with the thread's name.
fn threads(pid: u64, fields: &[&str]) -> Vec<(String, Vec<String>)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    let read = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let value = |field: &str| {
            let mut lines = status.lines();
            let line = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            line.unwrap_or_default().trim().to_owned()
        };
        Some((
            value("Name"),
            fields.iter().map(|field| value(field)).collect(),
        ))
    };
    tasks.flatten().filter_map(read).collect()
}

/// What `inspect` says of a machine.
fn inspected(home: &Home, name: &str) -> serde_json::Value {
    serde_json::from_str(&home.done(&["inspect", "--sample", "20ms", name])).expect("JSON")
}

fn all_confined(home: &Home, name: &str) {
    let found = threads(
        process(home, name),
        &["Seccomp", "NoNewPrivs", "CapEff", "CapPrm", "CapBnd"],
    );
    let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    for wanted in ["vcpu0", "network", "accept", "timers"] {
        assert!(names.contains(&wanted), "{names:?}");
    }
    for (thread, values) in &found {
        assert_eq!(values[..2], ["2", "1"], "{thread}");
        for set in &values[2..4] {
            assert_eq!(set.trim_start_matches('0'), "", "{thread}");
        }
    }
    let info = inspected(home, name);
    let layers = info["confinement"]["layers"].as_array().expect("layers");
    assert_eq!(layers.len(), 6, "{info}");
    // What doctor says holds here, holds for the machine.
    let doctor = home.run(&["doctor", "--format", "json"]);
    let doctor: serde_json::Value = serde_json::from_slice(&doctor.stdout).expect("JSON");
    for (layer, probed) in layers
        .iter()
        .zip(doctor["confinement"]["layers"].as_array().expect("layers"))
    {
        assert_eq!(layer["layer"], probed["layer"]);
        assert_eq!(layer["holds"], probed["holds"], "{layer} {probed}");
    }
}

#[test]
fn every_thread_of_a_machine_is_confined_and_all_works() {
    let home = Home::new();
    home.start_with("a", &["-p", "0:80"], &["sleep", "1000"]);
    all_confined(&home, "a");
    assert_eq!(
        home.sh(
            "a",
            "dd if=/dev/zero of=/f bs=1M count=60 2>/dev/null; sync; wc -c </f"
        ),
        "62914560"
    );
    assert_eq!(
        home.exec("a", &["nslookup", "localhost", "10.0.2.3"])
            .stderr,
        ""
    );
    home.done(&["snapshot", "create", "a", "kept"]);
    home.done(&["fork", "a", "--name", "b"]);
    all_confined(&home, "b");
    assert_eq!(home.sh("b", "wc -c </f"), "62914560");
    home.restore("kept", "c");
    all_confined(&home, "c");
    home.done(&["pause", "a"]);
    home.done(&["unpause", "a"]);
    home.done(&["rename", "a", "d"]);
    home.done(&["inspect", "--sample", "50ms", "d"]);
    home.done(&["stop", "d"]);
    home.done(&["rm", "-f", "b", "c", "d"]);
    let soft = ["--hypervisor", "soft"];
    home.done(
        &[
            &["pool", "create", "p", "--min", "1", "--max", "2"],
            &soft[..],
            &["demo"],
        ]
        .concat(),
    );
    assert_eq!(
        home.done(&["pool", "exec", "p", "echo", "pooled"]),
        "pooled"
    );
    home.done(&["pool", "rm", "p"]);
    let fresh = [
        "run",
        "--hypervisor",
        "soft",
        "--fresh",
        "--cpus",
        "2",
        "--network",
        "none",
    ];
    assert_eq!(
        home.done(&[&fresh[..], &["demo", "echo", "booted"]].concat()),
        "booted"
    );
}

#[test]
fn confinement_is_as_it_was_asked_for() {
    let home = Home::new();
    let run = |how: &str| {
        home.start_with(how, &["--confine", how], &["sleep", "1000"]);
        threads(process(&home, how), &["Seccomp", "NoNewPrivs"])
    };
    for (thread, values) in run("off") {
        assert_eq!(values, ["0", "0"], "{thread}");
    }
    let info = inspected(&home, "off");
    assert_eq!(info["confinement"]["layers"], serde_json::json!([]));
    // Where something is missing, strict is an error that names it.
    let doctor = skerry(&["doctor", "--format", "json"])
        .output()
        .expect("doctor");
    let doctor: serde_json::Value = serde_json::from_slice(&doctor.stdout).expect("JSON");
    let layers = doctor["confinement"]["layers"].as_array().expect("layers");
    match layers.iter().find(|layer| layer["holds"] == false) {
        None => assert!(
            run("strict")
                .iter()
                .all(|(_, values)| *values == ["2", "1"])
        ),
        Some(missing) => {
            let name = missing["layer"].as_str().expect("a name");
            home.refused(&["run", "--confine", "strict", "demo", "true"], &[name]);
        }
    }
    home.done(&["rm", "-f", "off"]);
    home.run(&["rm", "-f", "strict"]);
}

/// Anonymous memory of a process, in MiB, without what compiled code takes.
fn anonymous(pid: u64) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("its memory");
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"));
    let kib = line.expect("a line").trim().trim_end_matches(" kB");
    kib.parse::<u64>().expect("a number") >> 10
}

#[test]
fn what_a_guest_frees_goes_back_to_the_host() {
    const FILL: &str = "mkdir -p /m; mount -t tmpfs -o size=300m t /m; \
                        dd if=/dev/zero bs=1M count=200 2>/dev/null | tr '\\0' x >/m/x; md5sum </m/x";
    let home = Home::new();
    home.start_with("a", &["-m", "512M"], &["sleep", "1000"]);
    let pid = process(&home, "a");
    let before = anonymous(pid);
    let sum = home.sh("a", FILL);
    assert!(anonymous(pid) >= before + 195, "{before} MiB before");
    // Linux reports what is free some two seconds later.
    home.sh("a", "rm /m/x");
    eventually("it has its memory back", || anonymous(pid) < before + 40);
    // The same memory is there again, as good as new, in this machine and in copies of it.
    assert_eq!(home.sh("a", FILL), sum);
    home.done(&["fork", "a", "--name", "b"]);
    home.done(&["snapshot", "create", "a", "full"]);
    for name in ["a", "b"] {
        assert_eq!(home.sh(name, "md5sum </m/x"), sum, "{name}");
        home.sh(name, "rm /m/x");
    }
    eventually("it has its memory back", || anonymous(pid) < before + 40);
    home.restore("full", "c");
    for name in ["a", "b", "c"] {
        assert_eq!(home.sh(name, FILL), sum, "{name}");
    }
    home.done(&["rm", "-f", "a", "b", "c"]);
}

/// The most that a machine's process takes beside its guest's memory, in KiB: compiled code and its
/// tables, of a guest that has just started, are in it.
const OWN_MEMORY: u64 = 16 << 10;

#[test]
fn the_process_takes_little_beside_its_guest() {
    let home = Home::new();
    home.start("a", "sleep 1000");
    home.sh("a", "true");
    let pid = process(&home, "a");
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("its memory");
    let (mut guest, mut own) = (false, 0);
    for line in smaps.lines() {
        // A line for each mapping, then its numbers.
        let first = line.split(' ').next().unwrap_or_default();
        if first.contains('-') {
            guest = line.contains("/snapshots/");
        } else if let Some(kib) = line.strip_prefix("Private_Dirty:")
            && !guest
        {
            let kib = kib.trim().trim_end_matches(" kB");
            own += kib.parse::<u64>().expect("a number");
        }
    }
    assert!(own > 0 && own <= OWN_MEMORY, "{own} KiB");
    home.done(&["rm", "-f", "a"]);
}

/// The line is where those find it who have no terminal to look at.
#[test]
fn a_forbidden_call_behind_no_terminal_is_told() {
    let home = Home::new();
    home.start("bad", "sleep 1000");
    let pid = process(&home, "bad").to_string();
    // What the kernel sends for a call that a filter forbids.
    let sent = std::process::Command::new("kill")
        .args(["-s", "SYS", &pid])
        .status();
    assert!(sent.is_ok_and(|status| status.success()));
    eventually("its end", || home.status("bad") == "failed");
    let error = home.info("bad").expect("known")["error"].clone();
    let error = error.as_str().expect("a reason");
    assert!(
        error.contains("a thread of the role") && error.contains("its filter forbids"),
        "{error}"
    );
    let listed = home.done(&["ps", "-a"]);
    assert!(listed.contains("its filter forbids"), "{listed}");
    home.done(&["rm", "bad"]);
}
