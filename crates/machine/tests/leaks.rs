//! Machines that come and go leave nothing behind. Alone in its process, so that it can count.

#[path = "machine/guest.rs"]
mod guest;

use std::time::Duration;

use skerry_hypervisor::cpu_model::CpuModel;
use skerry_hypervisor::{CpuidTable, Hypervisor};
use skerry_hypervisor_soft::{Soft, Tuning};
use skerry_machine::{Attachments, Machine, MachineConfig, Outcome};

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

/// Threads, open files and mappings of this process.
fn counts() -> [usize; 3] {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    [
        entries("/proc/self/task"),
        entries("/proc/self/fd"),
        maps.lines().count(),
    ]
}

fn run(hypervisor: &Soft, tables: &[CpuidTable]) {
    let config = MachineConfig {
        memory: 16 << 20,
        cpus: 2,
        kernel: "test guest".into(),
        command_line: Some("echo".into()),
        rng: true,
        console: true,
        vsock: Some(3),
        debug_exit: Some(0xf4),
        ..MachineConfig::default()
    };
    let mut attachments = Attachments {
        kernel: Some(guest::kernel()),
        ..Attachments::default()
    };
    attachments.serial[0] = Some(Box::new(std::io::sink()));
    let table = |id: u32| tables[id as usize].clone();
    let machine = Machine::new(hypervisor, config, attachments, table).unwrap();
    let handle = machine.start(None).unwrap();
    let listener = handle.remote().virtio().vsock().unwrap().listen(1025);
    assert_eq!(handle.wait(), Outcome::DebugExit(0x21));
    drop(listener);
}

/// One test, since what other threads of the process make would count.
#[test]
fn machines_leave_nothing_behind() {
    for tuning in [Tuning::JIT, Tuning::STRESS] {
        leave_nothing_behind(&Soft::open().unwrap().with_tuning(tuning));
    }
}

fn leave_nothing_behind(hypervisor: &Soft) {
    let found = Soft::probe().unwrap();
    let model = CpuModel::best(&found);
    let tables: Vec<_> = (0..2)
        .map(|id| model.cpuid(&found, 2, id).unwrap())
        .collect();
    // What is made once for the process, and the allocator's arenas, are there after the first few. A
    // thread that has been waited for is still listed for a moment.
    const MACHINES: usize = 40;
    for _ in 0..20 {
        run(hypervisor, &tables);
    }
    std::thread::sleep(Duration::from_millis(200));
    let [threads, files, maps] = counts();
    for _ in 0..MACHINES {
        run(hypervisor, &tables);
    }
    std::thread::sleep(Duration::from_millis(200));
    let after = counts();
    assert_eq!(after[..2], [threads, files]);
    // The allocator takes and gives back a few.
    assert!(
        after[2] < maps + MACHINES / 2,
        "{maps} mappings became {}",
        after[2]
    );
}
