//! The ways in which the software processor runs code, and what it tells of them.

mod common;

use common::home::Home;
use common::{demo, run};
use serde_json::Value;

const MODES: [&str; 3] = ["interpreter", "jit", "jit-stress"];
const COUNTERS: [&str; 20] = [
    "calls_interpreter",
    "compiled_bytes",
    "compiled_instructions",
    "compiled_traces",
    "compiler_ns",
    "decoded_blocks",
    "decoded_bytes",
    "entries",
    "exits_indirect",
    "exits_interpreter",
    "exits_request",
    "exits_trap",
    "exits_unlinked",
    "flushes",
    "interpreted_instructions",
    "invalidated_traces",
    "jumps_found",
    "tlb_misses",
    "tlb_second_hits",
    "tlb_walks",
];

/// Strings, numbers, floating point, processes, pipes: what differs where a mode is wrong.
const SCRIPT: &str = "seq 1 3000 | sort -r | awk '{ s += sqrt($1) } END { printf \"%.9f\\n\", s }'; \
                      seq 1 5000 | sha256sum; seq 1 5000 | gzip -9 | gunzip | tail -n 1; \
                      i=0; while [ $i -lt 300 ]; do i=$((i + 1)); done; echo $i";

/// The statistics in the last line of stderr.
#[track_caller]
fn last_line(stderr: &str) -> Value {
    let line = stderr.lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {stderr}"))
}

#[test]
fn a_program_does_the_same_in_every_mode() {
    let said = MODES.map(|mode| {
        let ran = demo(
            &["--fresh", "--soft-mode", mode, "--stats=json"],
            &["sh", "-c", SCRIPT],
        );
        assert_eq!(ran.status, 0, "{mode}: {}", ran.stderr);
        let statistics = last_line(&ran.stderr);
        assert_eq!(statistics["hypervisor"], "soft");
        assert_eq!(statistics["soft"]["mode"], mode);
        let processor = &statistics["processors"][0];
        let counters = processor["counters"].as_object().expect("counters");
        let names: Vec<_> = counters.keys().collect();
        assert_eq!(names, COUNTERS, "the book has a table of them");
        assert!(counters["interpreted_instructions"].as_u64() > Some(100_000));
        assert!(counters["decoded_blocks"].as_u64() > Some(1000));
        if mode == "interpreter" {
            assert_eq!(counters["compiled_traces"], 0);
        }
        let time = &processor["time"];
        assert!(time["samples"].as_u64() > Some(10), "{time}");
        let shares = time["shares"].as_object().expect("shares");
        let names: Vec<_> = shares.keys().collect();
        assert_eq!(names, ["compiled", "compiler", "interpreter", "outside"]);
        let shares = shares
            .values()
            .map(|share| share.as_f64().expect("a share"));
        assert!((shares.sum::<f64>() - 1.0).abs() < 1e-6, "{time}");
        ran.text()
    });
    assert!(said[0].ends_with("5000\n300\n"), "{}", said[0]);
    assert_eq!(said[0], said[1]);
    assert_eq!(said[0], said[2]);
}

#[test]
fn people_get_a_table_on_stderr() {
    let ran = demo(&["--cpus", "2", "--stats"], &["echo", "hello"]);
    ran.expect(0, "hello\n");
    for part in [
        "ran on soft (",
        "cpu 0",
        "cpu 1",
        "time: interpreter",
        "tlb_walks",
    ] {
        assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
    }
    // Of a command that can't be started too, and with the status that belongs to that.
    let ran = demo(&["--stats"], &["/no/such/program"]);
    assert_eq!(ran.status, 127, "{}", ran.stderr);
    assert!(ran.stderr.contains("tlb_walks"), "{}", ran.stderr);
    let ran = demo(&[], &["true"]);
    assert_eq!(ran.stderr, "", "nothing is said where nobody asks");
}

/// A kept start, a snapshot and a running machine belong to no mode: what goes on from them is told
/// its own.
#[test]
fn machines_change_modes_where_they_go_on() {
    let home = Home::new();
    let soft = |mode| ["--hypervisor", "soft", "--soft-mode", mode];
    let mode_of = |vm: &str| {
        let found = home.done(&["inspect", "--sample", "10ms", vm]);
        let found: Value = serde_json::from_str(&found).expect("JSON");
        assert_eq!(found["name"], vm);
        found["statistics"]["soft"]["mode"].clone()
    };
    // Counts as long as it lives, and what it says it takes from where it was.
    let script = "i=0; while :; do i=$((i + 1)); echo $i > /n; mv /n /count; sleep 0.02; done";
    let count = |vm: &str| home.number(vm, "until [ -s /count ]; do :; done; cat /count");
    home.start_with("jit-stress", &soft("jit-stress"), &["sh", "-c", script]);
    let mut least = 0;
    let mut from = "jit-stress";
    for mode in ["interpreter", "jit"] {
        least = least.max(count(from));
        home.done(&["snapshot", "create", from, mode]);
        let restored = [&["restore", "-d", "--name", mode], &soft(mode)[..], &[mode]].concat();
        home.done(&restored);
        assert_eq!(mode_of(mode), mode);
        assert!(count(mode) >= least);
        from = mode;
    }
    assert_eq!(mode_of("jit-stress"), "jit-stress");
    // A child is as its parent.
    home.done(&["fork", "--name", "child", "interpreter"]);
    assert_eq!(mode_of("child"), "interpreter");
    assert!(count("child") > 0);
    // A pool's machines are as the pool was told.
    for source in [&["demo"][..], &["--from-snapshot", "jit"]] {
        let created = [&["pool", "create"], &soft("jit-stress")[..], &["p"], source].concat();
        home.done(&created);
        assert_eq!(home.done(&["pool", "exec", "p", "echo", "hello"]), "hello");
        home.done(&["pool", "rm", "p"]);
    }
}

#[test]
fn a_running_machine_can_be_looked_into() {
    let home = Home::new();
    let id = home.start("busy", "while :; do :; done");
    let look = || {
        let text = home.done(&["inspect", "--sample", "300ms", "busy"]);
        serde_json::from_str::<Value>(&text).expect("JSON")
    };
    let before = look();
    assert_eq!(before["id"], *id);
    assert_eq!(before["status"], "running");
    let (first, second) = (&before["statistics"], look());
    let second = &second["statistics"];
    let [first, second] = [first, second].map(|found| &found["processors"][0]);
    let shares = &second["time"]["shares"];
    let outside = shares["outside"].as_f64().expect("a share");
    assert!(outside < 0.5, "it never waits: {shares}");
    // A loop that leaves guest code for nothing is counted all the same.
    let done = |found: &Value| {
        let counters = &found["counters"];
        ["interpreted_instructions", "entries"].map(|name| counters[name].as_u64().expect(name))
    };
    assert!(
        done(second).iter().sum::<u64>() > done(first).iter().sum(),
        "{second}"
    );
    home.done(&["pause", "busy"]);
    let paused = look();
    assert_eq!(paused["status"], "paused");
    let shares = &paused["statistics"]["processors"][0]["time"]["shares"];
    assert_eq!(shares["outside"], 1.0, "{shares}");
    home.done(&["kill", "busy"]);
    let ended = look();
    assert_eq!(ended["status"], "stopped");
    assert!(ended["statistics"].is_null(), "{ended}");
}

/// What a processor derives from guest code stays within its bound, however much code the guest has.
#[test]
fn memory_for_code_is_bounded() {
    const BOUND: u64 = 2 << 20;
    let home = Home::new();
    let options = ["--soft-code-memory", "2M"];
    let script = "while :; do seq 1 200 | sort -r | gzip | sha256sum; done";
    home.start_with("busy", &options, &["sh", "-c", script]);
    let mut flushes = 0;
    common::eventually("several flushes", || {
        let found = home.done(&["inspect", "--sample", "20ms", "busy"]);
        let found: Value = serde_json::from_str(&found).expect("JSON");
        let counters = &found["statistics"]["processors"][0]["counters"];
        let count = |name: &str| counters[name].as_u64().expect(name);
        let held = count("decoded_bytes") + count("compiled_bytes");
        assert!(held <= BOUND, "{counters}");
        flushes = count("flushes");
        flushes > 5
    });
}

/// What can't be had is refused before anything is made, by the name of the option.
#[test]
fn options_that_cannot_be_had_are_refused() {
    let soft = ["run", "--hypervisor", "soft"];
    let cases: &[(&[&str], &str)] = &[
        (&["--soft-mode", "fast"], "--soft-mode"),
        (&["--soft-code-memory", "1000K"], "--soft-code-memory"),
        (&["--soft-code-memory", "2G"], "--soft-code-memory"),
        (
            &["--soft-mode", "interpreter", "--soft-hardened"],
            "--soft-hardened",
        ),
        (
            &["--soft-mode", "interpreter", "--soft-perf-map"],
            "--soft-perf-map",
        ),
        (&["-d", "--stats"], "--stats"),
        (&["--stats=xml"], "--stats"),
    ];
    for (options, name) in cases {
        let ran = run(&[&soft, *options, &["demo", "true"]].concat());
        assert_eq!(ran.status, 125, "{options:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(name), "{options:?}: {}", ran.stderr);
    }
}

/// Where KVM can be used it is refused the software processor's options, asked for or picked.
#[test]
fn no_other_hypervisor_takes_them() {
    let usable = run(&["doctor", "--format", "json"]);
    let found: Value = serde_json::from_slice(&usable.stdout).expect("JSON");
    if found["auto"] != "kvm" {
        eprintln!("skipped: KVM can't be used here");
        return;
    }
    for hypervisor in ["auto", "kvm"] {
        for option in [
            &["--soft-mode", "jit"][..],
            &["--soft-code-memory", "64M"],
            &["--soft-hardened"],
            &["--soft-perf-map"],
        ] {
            let command = ["run", "--hypervisor", hypervisor];
            let ran = run(&[&command, option, &["demo", "true"]].concat());
            assert_eq!(ran.status, 125, "{}", ran.stderr);
            for part in [option[0], "kvm", "--hypervisor soft"] {
                assert!(ran.stderr.contains(part), "{}", ran.stderr);
            }
        }
    }
}
