//! The short form of fuzzing. `fuzz/` has the long form.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};

use skerry_hypervisor_soft::Soft;
use skerry_test_support::Random;

use super::*;

const CASES: usize = 4000;
/// Bytes that stand for a case's choices.
const BYTES: usize = 64;
/// No case takes so long, however busy the host.
const PATIENCE: Duration = Duration::from_secs(60);

/// Panics of threads that are a machine's.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn watch_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        let ours = ["vcpu", "timers", "apic-", "machine", "virtio-", "serial-"];
        if ours.iter().any(|prefix| name.starts_with(prefix)) {
            PANICS.lock().unwrap().push(format!("{name}: {info}"));
        }
        before(info);
    }));
}

/// Ends the process, which nothing else can, when `case` hasn't changed for too long.
fn watch_time(case: &'static AtomicUsize) -> mpsc::Sender<()> {
    let (running, watched) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        let mut seen = usize::MAX;
        while watched.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            let now = case.load(Ordering::SeqCst);
            if now == seen {
                eprintln!("case {now} hangs");
                std::process::abort();
            }
            seen = now;
        }
    });
    running
}

fn run(cases: std::ops::RangeInclusive<usize>) {
    static CASE: AtomicUsize = AtomicUsize::new(0);
    watch_panics();
    let _running = watch_time(&CASE);
    let soft = Soft::open().unwrap();
    let seed = Seed::make(&soft).unwrap();
    assert_eq!(seed.restore(&soft, &[]).unwrap(), Reached::Ran);
    let mut reached = [0; 4];
    let count = cases.clone().count();
    for case in cases {
        CASE.store(case, Ordering::SeqCst);
        let choices = Random::new(case as u64).bytes(BYTES);
        match seed.restore(&soft, &choices) {
            Ok(far) => reached[far as usize] += 1,
            Err(fault) => panic!("case {case}: {fault}"),
        }
        let panics = PANICS.lock().unwrap();
        assert!(panics.is_empty(), "case {case}: {panics:?}");
    }
    let [nothing, read, built, ran] = reached;
    println!("{nothing} not read, {read} not built, {built} not restored, {ran} ran");
    assert!(ran > count / 5 && built > count / 20, "{reached:?}");
}

#[test]
fn changed_machines_briefly() {
    run(1..=CASES);
}

#[test]
#[ignore = "takes an hour"]
fn changed_machines_for_long() {
    run(CASES + 1..=1_000_000);
}
