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

/// A machine to be, with `change` made to what was saved of another.
fn build(change: impl FnOnce(&mut Value)) -> (Result<Machine<Soft>, MachineError>, MachineState) {
    let soft = Soft::open().unwrap();
    let mut seed = Seed::make(&soft).unwrap();
    change(&mut seed.saved);
    let saved = Saved::deserialize(&seed.saved).unwrap();
    (seed.build(&soft, &saved), saved.state)
}

#[test]
fn machines_that_can_not_be_are_refused_before_they_are_made() {
    let refused = |change: fn(&mut Value)| match build(change).0 {
        Ok(_) => panic!("built"),
        Err(error) => error,
    };
    use MachineError as E;
    let error = refused(|saved| saved["config"]["memory"] = u64::MAX.into());
    assert!(matches!(error, E::BadMemorySize(u64::MAX)), "{error}");
    let error = refused(|saved| saved["config"]["cpus"] = 4_000_000.into());
    assert!(matches!(error, E::BadCpuCount(4_000_000)), "{error}");
    let error = refused(|saved| {
        let disk = saved["config"]["disks"][0].clone();
        saved["config"]["disks"] = vec![disk; 1_000_000].into();
    });
    assert!(matches!(error, E::DiskCount { .. }), "{error}");
    for cid in [0, 2, u64::from(u32::MAX), u64::MAX] {
        let (built, _) = build(|saved| saved["config"]["vsock"] = cid.into());
        let error = built.map(drop).unwrap_err();
        assert!(
            matches!(error, E::BadContextId(bad) if bad == cid),
            "{error}"
        );
    }
    for run in [
        [MEMORY, 4096, 0],
        [0, 2 * MEMORY, 0],
        [u64::MAX - 4095, 8192, 0],
        [100, 4096, 0],
        [0, 4096, MEMORY],
        [0, 4096, u64::MAX - 4095],
    ] {
        let (built, _) = build(|saved| saved["memory"][0] = run.to_vec().into());
        let error = built.map(drop).unwrap_err();
        assert!(matches!(error, E::SavedMemory { .. }), "{error}");
    }
}

#[test]
fn states_that_can_not_be_are_refused() {
    let refused = |change: fn(&mut Value)| {
        let (built, state) = build(change);
        built.unwrap().restore(state, None).map(drop).unwrap_err()
    };
    use MachineError as E;
    let error = refused(|saved| saved["state"]["clock_ns"] = (1_u64 << 62).into());
    assert!(matches!(error, E::BadClock(_)), "{error}");
    let error = refused(|saved| saved["state"]["chipset"]["time_ns"] = u64::MAX.into());
    assert!(matches!(error, E::DeviceState(_)), "{error}");
    let error = refused(|saved| {
        let cpu = saved["state"]["cpus"][0].clone();
        saved["state"]["cpus"].as_array_mut().unwrap().push(cpu);
    });
    assert!(matches!(error, E::OtherMachine { cpus: 3, .. }), "{error}");
    let error = refused(|saved| saved["state"]["version"] = 77.into());
    assert!(
        matches!(error, E::OtherMachine { version: 77, .. }),
        "{error}"
    );
}

#[test]
fn a_restored_machine_reads_no_file_when_it_is_reset() {
    use std::os::unix::fs::FileExt;
    // MOV AL, 0FEh; OUT 64h, AL; JMP $
    const RESET: [u8; 6] = [0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
    const PLACE: u64 = 0x18_0000;
    let soft = Soft::open().unwrap();
    let mut seed = Seed::make(&soft).unwrap();
    seed.memory.write_all_at(&RESET, PLACE).unwrap();
    let kernel = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(kernel.path(), guest::kernel(0)).unwrap();
    let saved = &mut seed.saved;
    let page = vec![PLACE, 4096, PLACE];
    saved["memory"].as_array_mut().unwrap().push(page.into());
    saved["state"]["cpus"][0]["general"]["rip"] = PLACE.into();
    saved["config"]["no_reboot"] = false.into();
    saved["config"]["kernel"] = kernel.path().to_str().into();
    saved["config"]["initrd"] = "/etc/passwd".into();
    let saved = Saved::deserialize(&seed.saved).unwrap();
    let machine = seed.build(&soft, &saved).unwrap();
    let handle = machine.restore(saved.state, Some(PATIENCE)).unwrap();
    handle.remote().resume();
    match handle.wait() {
        Outcome::InternalError(text) => assert!(text.contains("can't boot again"), "{text}"),
        outcome => panic!("{outcome:?}"),
    }
}
