//! Where a guest's memory goes, and what is told of its calls.

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::guest;
use skerry_sandbox::{AllocationProfile, CallError, Sandbox};

/// What these tests run on.
fn backend() -> skerry_sandbox::Backend {
    skerry_sandbox::Backend::Soft
}

fn program() -> PathBuf {
    guest("sandbox-debugguest")
}

/// Allocations and bytes by function.
fn of(profile: &AllocationProfile, function: &str) -> (u64, u64) {
    let sites = profile.sites.iter();
    let sites = sites.filter(|site| site.function() == Some(function));
    sites.fold((0, 0), |(allocations, bytes), site| {
        (allocations + site.allocations, bytes + site.bytes)
    })
}

#[test]
fn allocations_are_counted_by_function() {
    let builder = common::builder().guest(program()).profile_allocations();
    let mut sandbox = builder.build().unwrap();
    let start = sandbox.allocation_profile();
    assert_eq!(of(&start, "debug_small"), (0, 0));
    let fresh = sandbox.snapshot().unwrap();
    for _ in 0..3 {
        let capacities: u64 = sandbox.call("allocates", (2000_u64, 5_u64)).unwrap();
        assert_eq!(capacities, 2000 * 16 + 1000 + 5000);
        // What was counted is the host's, and is not restored.
        sandbox.restore(&fresh).unwrap();
    }
    let profile = sandbox.allocation_profile();
    println!("{profile}");
    assert_eq!(of(&profile, "debug_small"), (6000, 6000 * 16 + 3000));
    assert_eq!(of(&profile, "debug_large"), (15, 15 * 8000));
    assert_eq!(sandbox.metrics().log_damaged, 0);
    assert!(profile.to_string().contains("debug_large"));
    sandbox.stop_profiling();
    sandbox.call::<u64>("allocates", (1_u64, 1_u64)).unwrap();
    assert_eq!(sandbox.allocation_profile(), AllocationProfile::default());
    // Begun late, without names.
    let mut other = Sandbox::from_snapshot(&fresh, &Default::default()).unwrap();
    other.call::<u64>("allocates", (1_u64, 1_u64)).unwrap();
    other.profile_allocations(&[]);
    other.call::<u64>("allocates", (0_u64, 7_u64)).unwrap();
    let profile = other.allocation_profile();
    assert!(
        profile
            .sites
            .iter()
            .any(|site| site.allocations == 7 && site.function().is_none())
    );
}

/// The guest, built with frame pointers.
fn with_frame_pointers() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/sandbox-rt/Cargo.toml");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sandbox-guests-frames");
    let status = Command::new(env!("CARGO"))
        .args([
            "build",
            "--quiet",
            "--release",
            "--locked",
            "-p",
            "sandbox-debugguest",
        ])
        .arg("--manifest-path")
        .arg(&manifest)
        .arg("--target-dir")
        .arg(&target)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C force-frame-pointers=yes")
        .status()
        .expect("cargo runs");
    assert!(status.success(), "the guest doesn't build");
    target.join("release/sandbox-debugguest")
}

#[test]
fn frame_pointers_make_callers_certain() {
    let program = with_frame_pointers();
    let builder = common::builder().guest(program).profile_allocations();
    let mut sandbox = builder.build().unwrap();
    sandbox.call::<u64>("allocates", (0_u64, 4_u64)).unwrap();
    let profile = sandbox.allocation_profile();
    println!("{profile}");
    let site = profile
        .sites
        .iter()
        .find(|site| site.function() == Some("debug_large"));
    let site = site.expect("it allocates");
    assert!(site.certain);
    assert_eq!((site.allocations, site.bytes), (4, 32_000));
    let last = site.frames.last().unwrap().function.as_ref().unwrap();
    assert_eq!(last.0, "_start", "the chain ends where the guest begins");
}

#[test]
fn failures_are_counted_by_kind() {
    let mut sandbox = common::sandbox();
    let fresh = sandbox.snapshot().unwrap();
    sandbox.call::<i32>("fail", ("oh",)).unwrap_err();
    sandbox.call::<i32>("add", (1,)).unwrap_err();
    sandbox.call::<String>("add", (1, 2)).unwrap_err();
    sandbox.call::<()>("panics", ("oh",)).unwrap_err();
    sandbox.restore(&fresh).unwrap();
    sandbox.call::<u64>("peek", (8_u64,)).unwrap_err();
    sandbox.restore(&fresh).unwrap();
    sandbox
        .set_call_timeout(Some(Duration::from_millis(5)))
        .unwrap();
    let error = sandbox.call::<()>("spin", ()).unwrap_err();
    assert!(matches!(error, CallError::TimedOut(_)), "{error}");
    sandbox.set_call_timeout(None).unwrap();
    sandbox.restore(&fresh).unwrap();
    let metrics = sandbox.metrics();
    let failures = metrics.failures;
    assert_eq!((failures.returned, failures.mismatched), (1, 2));
    assert_eq!(
        (failures.panicked, failures.faults, failures.timed_out),
        (1, 1, 1)
    );
    assert_eq!((metrics.calls, metrics.failed), (6, 6));
    assert_eq!(metrics.time, Duration::ZERO);
    sandbox.measure_time(true);
    sandbox.call::<u64>("work", (100_000_u64,)).unwrap();
    let time = sandbox.metrics().time;
    assert!(time > Duration::ZERO);
    sandbox.measure_time(false);
    sandbox.call::<u64>("work", (100_000_u64,)).unwrap();
    assert_eq!(sandbox.metrics().time, time);
}

/// What is written by a subscriber.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn calls_are_spans_with_a_duration() {
    use tracing_subscriber::fmt::format::FmtSpan;
    let mut sandbox = common::builder()
        .log_level(Some(tracing::Level::INFO))
        .build()
        .unwrap();
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_span_events(FmtSpan::CLOSE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        sandbox.call::<i32>("add", (1, 2)).unwrap();
        sandbox.call::<()>("log_all", ("words",)).unwrap();
        sandbox.call::<i32>("fail", ("went wrong",)).unwrap_err();
    });
    sandbox.call::<i32>("add", (3, 4)).unwrap();
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    println!("{text}");
    let closed: Vec<_> = text
        .lines()
        .filter(|line| line.contains("skerry_sandbox::call: close"))
        .collect();
    assert_eq!(closed.len(), 3, "{text}");
    assert!(closed[0].contains("function=\"add\"") && closed[0].contains("duration_us="));
    assert!(closed[2].contains("error=went wrong"));
    let within = text.lines().find(|line| line.contains("words 3")).unwrap();
    assert!(within.contains("call{function=\"log_all\"}"), "{within}");
}
