//! System calls of sandboxes, counted by `strace` where it is installed: independent of the machine's noise.

mod common;

use std::process::Command;

use skerry_sandbox::{Backend, Sandbox};

/// What the process that is counted does, and how often.
const WHAT: &str = "SKERRY_COUNTED";

fn backend() -> Backend {
    match std::env::var(WHAT) {
        Ok(what) if what.starts_with("kvm") => Backend::Kvm,
        _ => Backend::Soft,
    }
}

/// The process that is counted; without [`WHAT`] nothing.
#[test]
fn counted() {
    let Ok(asked) = std::env::var(WHAT) else {
        return;
    };
    let mut words = asked.split(' ').skip(1);
    let what = words.next().unwrap();
    let times: i32 = words.next().unwrap().parse().unwrap();
    let functions = common::functions();
    let mut sandbox = common::sandbox();
    // Until all is compiled, where anything is.
    let warm = if backend() == Backend::Kvm { 50 } else { 3000 };
    for n in 0..warm {
        sandbox.call::<i32>("add", (n, 1)).unwrap();
        sandbox.call::<i32>("call_host", (n, 1)).unwrap();
    }
    let snapshot = sandbox.snapshot().unwrap();
    let copy = || Sandbox::from_snapshot_on(&snapshot, &functions, backend()).unwrap();
    drop(copy());
    let mut kept = Vec::new();
    for n in 0..times {
        match what {
            "call" => assert_eq!(sandbox.call::<i32>("add", (n, 1)).unwrap(), n + 1),
            "host" => assert_eq!(sandbox.call::<i32>("call_host", (n, 1)).unwrap(), n + 1),
            "restore" => sandbox.restore(&snapshot).unwrap(),
            _ => kept.push(copy()),
        }
    }
    // Nothing of the end is counted.
    std::process::exit(0);
}

/// System calls of one repetition; `None` where it can't be counted.
fn count(backend: &str, what: &str) -> Option<f64> {
    const TIMES: u32 = 100;
    let total = |times: u32| {
        let output = Command::new("strace")
            .args(["-f", "-c", "-o", "/dev/stdout"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "counted", "--test-threads", "1", "-q"])
            .env(WHAT, format!("{backend} {what} {times}"))
            .output()
            .ok()?;
        if !output.status.success() {
            return None;
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text
            .lines()
            .rev()
            .find(|line| line.ends_with("total"))?
            .to_owned();
        // "100.00 seconds usecs/call calls [errors] total"
        line.split_whitespace().nth(3)?.parse::<f64>().ok()
    };
    // The least of a few: threads come and go.
    let least = |times| (0..3).filter_map(|_| total(times)).reduce(f64::min);
    Some((least(TIMES)? - least(0)?) / f64::from(TIMES))
}

#[test]
fn calls_restores_and_copies_take_few_system_calls() {
    let _guest = common::guest("sandbox-testguest");
    // What one more would be over; the rest is for threads that wake up in one run and not in another.
    let limits = [
        (
            "soft",
            [
                ("call", 0.9),
                ("host", 0.9),
                ("restore", 0.9),
                ("copy", 15.0),
            ],
        ),
        (
            "kvm",
            [
                ("call", 3.0),
                ("host", 4.0),
                ("restore", 8.0),
                ("copy", 15.9),
            ],
        ),
    ];
    for (backend, rows) in limits {
        for (what, limit) in rows {
            match count(backend, what) {
                None => {
                    eprintln!("{what} on {backend} can't be counted here: no strace, or no KVM")
                }
                Some(calls) => {
                    println!("{what} on {backend}: {calls} system calls");
                    assert!(
                        calls <= limit,
                        "{what} on {backend}: {calls}, at most {limit}"
                    );
                }
            }
        }
    }
}
