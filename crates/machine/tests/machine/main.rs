//! Whole machines with a tiny guest, on every backend that opens here. A KVM that only emulates is
//! good enough: the guest uses integer instructions alone.

mod guest;
#[path = "../common/modes.rs"]
mod modes;
#[path = "../../src/fuzzing/processor.rs"]
mod processor;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use processor::cpuid;
use skerry_hypervisor::Hypervisor;
use skerry_hypervisor::cpu_model::CpuModel;
use skerry_machine::{
    Attachments, CrashReason, Machine, MachineConfig, MachineError, MachineHandle, MachineRemote,
    MachineState, Outcome, SavedMemory, SavedRun,
};

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Output {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn wait_longer_than(&self, len: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.len() <= len {
            assert!(Instant::now() < deadline, "no output");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn config(command_line: &str) -> MachineConfig {
    MachineConfig {
        memory: 16 << 20,
        kernel: "test guest".into(),
        command_line: Some(command_line.into()),
        no_reboot: true,
        debug_exit: Some(0xf4),
        ..MachineConfig::default()
    }
}

/// `None` where the backend does not open here.
fn start<H: Hypervisor>(
    config: MachineConfig,
    initrd: Option<&'static [u8]>,
    limit: Duration,
) -> Option<(MachineHandle, Output)> {
    let hypervisor = match H::open() {
        Ok(hypervisor) => hypervisor,
        Err(unusable) => {
            eprintln!("skipped: {unusable}");
            return None;
        }
    };
    let output = Output::default();
    let mut attachments = Attachments {
        kernel: Some(guest::kernel()),
        initrd: initrd.map(Into::into),
        ..Attachments::default()
    };
    attachments.serial[0] = Some(Box::new(output.clone()));
    let machine = Machine::new(&hypervisor, config, attachments, cpuid).unwrap();
    Some((machine.start(Some(limit)).unwrap(), output))
}

fn expect<H: Hypervisor>(config: MachineConfig, expected: &Outcome) -> String {
    let Some((handle, output)) = start::<H>(config, None, PATIENCE) else {
        return String::new();
    };
    assert_eq!(handle.wait(), *expected);
    output.text()
}

const DONE: Outcome = Outcome::DebugExit(0x21);

fn output_and_exit_status<H: Hypervisor>() {
    let Some((handle, output)) = start::<H>(config("echo this"), None, PATIENCE) else {
        return;
    };
    assert_eq!(handle.wait(), DONE);
    assert_eq!(output.text(), "echo this");
}

fn module_is_loaded<H: Hypervisor>() {
    let config = MachineConfig {
        initrd: Some("module".into()),
        ..config("module")
    };
    let Some((handle, output)) = start::<H>(config, Some(b"the module"), PATIENCE) else {
        return;
    };
    assert_eq!(handle.wait(), DONE);
    assert_eq!(output.text(), "the module");
}

fn power_off<H: Hypervisor>() {
    expect::<H>(config("power off"), &Outcome::PoweredOff);
}

fn reset_ends_or_reboots<H: Hypervisor>() {
    expect::<H>(config("reset"), &Outcome::Reset);
    let config = MachineConfig {
        no_reboot: false,
        cpus: 2,
        ..config("reset")
    };
    expect::<H>(config, &DONE);
}

fn triple_fault_is_reported<H: Hypervisor>() {
    let Some((handle, _)) = start::<H>(config("triple fault"), None, PATIENCE) else {
        return;
    };
    match handle.wait() {
        Outcome::GuestCrash { reason, registers } => {
            assert_eq!(reason, CrashReason::TripleFault { cpu: 0 });
            assert!(
                registers.contains("CPU 0: RIP 0x0000000000100"),
                "{registers}"
            );
        }
        other => panic!("{other:?}"),
    }
}

fn panic_notifier_is_reported<H: Hypervisor>() {
    let config = MachineConfig {
        cpus: 2,
        ..config("notify panic")
    };
    let Some((handle, _)) = start::<H>(config, None, PATIENCE) else {
        return;
    };
    match handle.wait() {
        Outcome::GuestCrash { reason, registers } => {
            assert_eq!(reason, CrashReason::Panic);
            assert!(registers.contains("CPU 0: RIP") && registers.contains("CPU 1: RIP"));
        }
        other => panic!("{other:?}"),
    }
}

fn pic_interrupts_reach_the_guest<H: Hypervisor>() {
    expect::<H>(config("interrupts"), &DONE);
}

fn second_processor_starts<H: Hypervisor>() {
    let config = MachineConfig {
        cpus: 2,
        ..config("application processor")
    };
    expect::<H>(config, &DONE);
}

fn time_limit_ends_spinning_and_halted_guests<H: Hypervisor>() {
    for command_line in ["spin", "halt"] {
        let limit = Duration::from_millis(200);
        let Some((handle, _)) = start::<H>(config(command_line), None, limit) else {
            return;
        };
        let started = Instant::now();
        assert_eq!(handle.wait(), Outcome::TimedOut);
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}

fn pause_stops_and_resume_goes_on<H: Hypervisor>() {
    let Some((handle, output)) = start::<H>(config("spin"), None, PATIENCE) else {
        return;
    };
    let remote = handle.remote().clone();
    for _ in 0..3 {
        output.wait_longer_than(output.len());
        remote.pause().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let len = output.len();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(output.len(), len);
        remote.resume();
        output.wait_longer_than(len);
    }
    remote.kill();
    assert_eq!(handle.wait(), Outcome::Killed);
    assert!(matches!(remote.pause(), Err(MachineError::Ended)));
}

fn state_is_saved_and_put_back<H: Hypervisor>() {
    let Some((handle, output)) = start::<H>(config("spin"), None, PATIENCE) else {
        return;
    };
    let remote = handle.remote();
    output.wait_longer_than(10);
    remote.pause().unwrap();
    let state = remote.save_state().unwrap();
    remote.resume();
    output.wait_longer_than(output.len() + 10);
    remote.pause().unwrap();
    remote.restore_state(state.clone()).unwrap();
    let again = remote.save_state().unwrap();
    assert_eq!(again.cpus[0].general, state.cpus[0].general);
    assert_eq!(again.cpus[0].lapic, state.cpus[0].lapic);
    assert_eq!(again.virtio, state.virtio);
    remote.resume();
    output.wait_longer_than(output.len() + 10);
}

/// Memory that was saved run by run, as a snapshot has it: dense in a file.
fn saved_memory(remote: &MachineRemote) -> SavedMemory {
    let mut file = tempfile::tempfile().unwrap();
    let (mut runs, mut offset) = (Vec::new(), 0);
    remote
        .for_each_used_memory(|at, bytes| -> Result<(), MachineError> {
            file.write_all(bytes).unwrap();
            let len = bytes.len() as u64;
            runs.push(SavedRun { at, len, offset });
            offset += len;
            Ok(())
        })
        .unwrap();
    assert!(
        offset < 4 << 20,
        "{offset} bytes of a guest that uses little"
    );
    SavedMemory {
        layers: vec![(file, runs)],
    }
}

fn restored<H: Hypervisor>(
    hypervisor: &H,
    memory: SavedMemory,
    state: MachineState,
) -> Result<(MachineHandle, Output), MachineError> {
    let output = Output::default();
    let mut attachments = Attachments {
        memory: Some(memory),
        ..Attachments::default()
    };
    attachments.serial[0] = Some(Box::new(output.clone()));
    let machine = Machine::new(hypervisor, config("spin"), attachments, cpuid)?;
    Ok((machine.restore(state, Some(PATIENCE))?, output))
}

fn a_saved_machine_goes_on_in_a_fresh_one<H: Hypervisor>() {
    let Some((handle, output)) = start::<H>(config("spin"), None, PATIENCE) else {
        return;
    };
    let remote = handle.remote();
    output.wait_longer_than(10);
    remote.pause().unwrap();
    let state = remote.save_state().unwrap();
    let memory = saved_memory(remote);
    drop(handle);
    let hypervisor = H::open().unwrap();
    let (handle, output) = restored(&hypervisor, memory, state.clone()).unwrap();
    // It stands until it is let go; then it can be saved again, from what it was restored from.
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(output.len(), 0);
    let remote = handle.remote();
    let again = remote.save_state().unwrap();
    assert_eq!(again.cpus[0].general, state.cpus[0].general);
    let memory = saved_memory(remote);
    remote.resume();
    output.wait_longer_than(10);
    drop(handle);
    let (handle, output) = restored(&hypervisor, memory, state.clone()).unwrap();
    handle.remote().resume();
    output.wait_longer_than(10);
    // Memory of another machine.
    let run = SavedRun {
        at: 16 << 20,
        len: 4096,
        offset: 0,
    };
    let memory = SavedMemory {
        layers: vec![(tempfile::tempfile().unwrap(), vec![run])],
    };
    let refused = restored(&hypervisor, memory, state);
    assert!(matches!(refused, Err(MachineError::SavedMemory { .. })));
}

/// The repository's own kernel, told to run a program that is not there: from its first
/// instruction to the end of its boot, with two processors.
fn linux_boots_and_panics_without_a_root<H: Hypervisor>() {
    let found = match H::probe() {
        Ok(found) => found,
        Err(unusable) => {
            eprintln!("skipped: {unusable}");
            return;
        }
    };
    let kernel = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../guest/kernel/bzImage-x86_64"
    );
    let config = MachineConfig {
        memory: 128 << 20,
        cpus: 2,
        kernel: kernel.into(),
        command_line: None,
        rng: true,
        ..MachineConfig::default()
    };
    let output = Output::default();
    let mut attachments = Attachments::default();
    attachments.serial[0] = Some(Box::new(output.clone()));
    let model = CpuModel::best(&found);
    let table = |id| model.cpuid(&found, config.cpus, id).unwrap();
    let tables = [table(0), table(1)];
    let machine = Machine::new(&H::open().unwrap(), config.clone(), attachments, |id| {
        tables[id as usize].clone()
    });
    let handle = machine.unwrap().start(Some(PATIENCE * 5)).unwrap();
    let outcome = handle.wait();
    let text = output.text();
    assert!(
        matches!(
            &outcome,
            Outcome::GuestCrash {
                reason: CrashReason::Panic,
                ..
            }
        ),
        "{outcome:?}\n{text}"
    );
    assert!(text.contains("Brought up 1 node, 2 CPUs"), "{text}");
    assert!(text.contains("Kernel panic - not syncing"), "{text}");
}

macro_rules! on {
    ($backend:ident, $hypervisor:ty) => {
        mod $backend {
            #[test]
            fn output_and_exit_status() {
                super::output_and_exit_status::<$hypervisor>();
            }
            #[test]
            fn module_is_loaded() {
                super::module_is_loaded::<$hypervisor>();
            }
            #[test]
            fn power_off() {
                super::power_off::<$hypervisor>();
            }
            #[test]
            fn reset_ends_or_reboots() {
                super::reset_ends_or_reboots::<$hypervisor>();
            }
            #[test]
            fn triple_fault_is_reported() {
                super::triple_fault_is_reported::<$hypervisor>();
            }
            #[test]
            fn panic_notifier_is_reported() {
                super::panic_notifier_is_reported::<$hypervisor>();
            }
            #[test]
            fn pic_interrupts_reach_the_guest() {
                super::pic_interrupts_reach_the_guest::<$hypervisor>();
            }
            #[test]
            fn second_processor_starts() {
                super::second_processor_starts::<$hypervisor>();
            }
            #[test]
            fn time_limit_ends_spinning_and_halted_guests() {
                super::time_limit_ends_spinning_and_halted_guests::<$hypervisor>();
            }
            #[test]
            fn pause_stops_and_resume_goes_on() {
                super::pause_stops_and_resume_goes_on::<$hypervisor>();
            }
            #[test]
            fn linux_boots_and_panics_without_a_root() {
                super::linux_boots_and_panics_without_a_root::<$hypervisor>();
            }
            #[test]
            fn a_saved_machine_goes_on_in_a_fresh_one() {
                super::a_saved_machine_goes_on_in_a_fresh_one::<$hypervisor>();
            }

            #[test]
            fn state_is_saved_and_put_back() {
                super::state_is_saved_and_put_back::<$hypervisor>();
            }
        }
    };
}

on!(kvm, skerry_hypervisor_kvm::Kvm);
on!(soft, skerry_hypervisor_soft::Soft);
on!(interpreter, crate::modes::Interpreter);
on!(stress, crate::modes::Stress);

#[test]
fn what_can_not_be_is_refused_in_words() {
    let Ok(kvm) = skerry_hypervisor_kvm::Kvm::open() else {
        eprintln!("skipped: no /dev/kvm");
        return;
    };
    let message = |config: MachineConfig| {
        let machine = Machine::new(&kvm, config, Attachments::default(), cpuid);
        match machine.and_then(|machine| machine.start(None)) {
            Ok(_) => panic!("started"),
            Err(error) => error.to_string(),
        }
    };
    let odd = MachineConfig {
        memory: 1000,
        ..config("")
    };
    assert!(message(odd).contains("--memory"));
    let huge = MachineConfig {
        memory: 1 << 50,
        ..config("")
    };
    assert!(message(huge).contains("1 TiB"));
    let none = MachineConfig {
        cpus: 0,
        ..config("")
    };
    assert!(message(none).contains("--cpus"));
    let text = message(config(""));
    assert!(
        text.contains("test guest") && text.contains("path"),
        "{text}"
    );
}
