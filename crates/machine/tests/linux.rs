//! The repository's own kernel on the software processor: its memory taken back and copied under it,
//! and its clones told that they are such.

mod common;
#[path = "common/linux.rs"]
mod guest;

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Output, PAGE, PATIENCE, all, rebase};
use skerry_hypervisor::Hypervisor;
use skerry_hypervisor::cpu_model::CpuModel;
use skerry_hypervisor_soft::{Soft, Tuning};
use skerry_machine::{
    Attachments, DiskConfig, Machine, MachineConfig, MachineError, MachineRemote, PageSet,
    SavedMemory,
};
use skerry_storage::{Access, RawDisk};

/// A program that writes to so many pages, then sleeps so many nanoseconds, again and again.
type Program = Option<(u64, u64)>;

fn config(memory: u64, program: Program) -> MachineConfig {
    MachineConfig {
        memory,
        cpus: 2,
        kernel: guest::KERNEL.into(),
        initrd: program.map(|_| "init".into()),
        rng: true,
        console: true,
        vsock: Some(3),
        generation_id: true,
        ..MachineConfig::default()
    }
}

/// The software processor, in the mode in which all tests are to run, where one is named.
fn soft() -> Soft {
    let tuning = match std::env::var("SKERRY_TEST_SOFT_MODE").as_deref() {
        Ok("interpreter") => Tuning::INTERPRETER,
        Ok("jit-stress") => Tuning::STRESS,
        _ => Tuning::JIT,
    };
    Soft::open().unwrap().with_tuning(tuning)
}

fn machine(
    config: MachineConfig,
    program: Program,
    mut attachments: Attachments,
) -> (Machine<Soft>, Output) {
    let output = Output::default();
    attachments.serial[0] = Some(Box::new(output.clone()));
    attachments.initrd = program.map(|(pages, sleep)| guest::initrd(pages, sleep).into());
    let found = Soft::probe().unwrap();
    let model = CpuModel::best(&found);
    let tables = [0, 1].map(|id| model.cpuid(&found, 2, id).unwrap());
    let machine = Machine::new(&soft(), config, attachments, |id| {
        tables[id as usize].clone()
    });
    (machine.unwrap(), output)
}

fn wait_for(output: &Output, text: &str) {
    let deadline = Instant::now() + PATIENCE;
    let found = || {
        let output = output.0.lock().unwrap();
        String::from_utf8_lossy(&output).contains(text)
    };
    while !found() {
        assert!(Instant::now() < deadline, "no {text:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Lets the program go round a few times.
fn wait_rounds(output: &Output) {
    let deadline = Instant::now() + PATIENCE;
    let len = output.len() + 3;
    while output.len() < len {
        assert!(Instant::now() < deadline, "the program stands");
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn assert_same(now: &[u8], then: &[u8], but: &PageSet) {
    let page = PAGE as usize;
    let differs = (0..then.len())
        .step_by(page)
        .filter(|at| !but.contains(*at as u64 / PAGE))
        .find(|at| now[*at..][..page] != then[*at..][..page]);
    assert_eq!((differs, now.len()), (None, then.len()));
}

/// What setting a state writes: the page of the paravirtual clock.
fn clock_pages(remote: &MachineRemote) -> PageSet {
    let pages = remote.written().unwrap();
    assert!(pages.count() <= 1, "{pages:?}");
    pages
}

/// Paging, interrupts, timers, code that patches itself, and devices that write memory.
#[test]
fn it_goes_back_while_it_boots() {
    const MEMORY: u64 = 128 << 20;
    let mut image = tempfile::NamedTempFile::new().unwrap();
    image.write_all(&vec![0x5a; 1 << 20]).unwrap();
    let disk = RawDisk::open(image.path(), Access::ReadWrite).unwrap();
    let attachments = Attachments {
        disks: vec![Arc::new(disk)],
        ..Attachments::default()
    };
    let config = MachineConfig {
        disks: vec![DiskConfig {
            name: "disk".into(),
            read_only: false,
            exchangeable: false,
        }],
        ..config(MEMORY, None)
    };
    let (machine, output) = machine(config, None, attachments);
    let handle = machine.start(Some(PATIENCE * 5)).unwrap();
    let remote = handle.remote();
    wait_for(&output, "Brought up 1 node, 2 CPUs");
    remote.pause().unwrap();
    remote.track_writes().unwrap();
    let state = remote.save_state().unwrap();
    rebase(remote);
    let memory = all(remote, MEMORY);
    for round in 1..10_u32 {
        remote.resume();
        std::thread::sleep(Duration::from_millis(4) * round);
        remote.pause().unwrap();
        let rewound = remote.rewind(&state).unwrap();
        assert!(rewound.pages > 0);
        assert_same(&all(remote, MEMORY), &memory, &clock_pages(remote));
    }
    output.0.lock().unwrap().clear();
    remote.resume();
    wait_for(&output, "Kernel panic - not syncing");
    drop(handle);
}

/// So much that it is given back to the host rather than copied.
#[test]
fn much_goes_back() {
    const MEMORY: u64 = 256 << 20;
    const PAGES: u64 = 20_000;
    let program = Some((PAGES, 1_000_000));
    let (machine, output) = machine(config(MEMORY, program), program, Attachments::default());
    let handle = machine.start(Some(PATIENCE)).unwrap();
    let remote = handle.remote();
    wait_for(&output, "as init process");
    wait_rounds(&output);
    remote.pause().unwrap();
    remote.track_writes().unwrap();
    let state = remote.save_state().unwrap();
    rebase(remote);
    let memory = all(remote, MEMORY);
    for _ in 0..3 {
        remote.resume();
        wait_rounds(&output);
        remote.pause().unwrap();
        assert!(remote.rewind(&state).unwrap().pages >= PAGES);
        assert_same(&all(remote, MEMORY), &memory, &clock_pages(remote));
    }
    remote.resume();
    wait_rounds(&output);
}

/// Bytes of `pages`, one run after the other.
fn contents(remote: &MachineRemote, pages: &PageSet) -> Vec<u8> {
    let mut contents = Vec::new();
    remote
        .for_each_page_run(pages, |_, bytes| -> Result<(), MachineError> {
            contents.extend_from_slice(bytes);
            Ok(())
        })
        .unwrap();
    contents
}

/// Memory on both sides of the hole for devices, and a clone of it.
#[test]
fn memory_above_four_gib_goes_back() {
    const MEMORY: u64 = 3584 << 20;
    let program = Some((1000, 1_000_000));
    let config = config(MEMORY, program);
    let (parent, output) = machine(config.clone(), program, Attachments::default());
    let handle = parent.start(Some(PATIENCE)).unwrap();
    let remote = handle.remote();
    wait_for(&output, "as init process");
    wait_rounds(&output);
    remote.pause().unwrap();
    remote.track_writes().unwrap();
    let used = remote.written().unwrap();
    let high = (3 << 30) / PAGE;
    assert!(used.runs().any(|run| run.end < high) && used.runs().any(|run| run.start >= high));
    let state = remote.save_state().unwrap();
    let layers = rebase(remote);
    let memory = contents(remote, &used);
    let rewound = |remote: &MachineRemote| {
        let mut same = used.clone();
        same.subtract(&clock_pages(remote));
        let pages = used.runs().flatten().zip(memory.chunks(PAGE as usize));
        let kept: Vec<_> = pages
            .filter_map(|(page, bytes)| same.contains(page).then_some(bytes))
            .collect();
        contents(remote, &same) == kept.concat()
    };
    let attachments = Attachments {
        memory: Some(layers),
        track: true,
        ..Attachments::default()
    };
    let (clone, cloned) = machine(config, program, attachments);
    let clone = clone.restore(state.clone(), Some(PATIENCE)).unwrap();
    for (remote, output) in [(remote, &output), (clone.remote(), &cloned)] {
        for _ in 0..5 {
            remote.resume();
            wait_rounds(output);
            remote.pause().unwrap();
            let mut fresh = remote.written().unwrap();
            assert!(fresh.runs().any(|run| run.start >= high));
            fresh.subtract(&used);
            remote.rewind(&state).unwrap();
            assert!(rewound(remote));
            assert!(contents(remote, &fresh).iter().all(|byte| *byte == 0));
        }
    }
}

/// What a live copy does: everything once, then what was written meanwhile, in rounds that become
/// smaller, and the rest while the machine stands.
#[test]
fn a_copy_under_load_converges() {
    const MEMORY: u64 = 256 << 20;
    let program = Some((256, 5_000_000));
    let (machine, output) = machine(config(MEMORY, program), program, Attachments::default());
    let handle = machine.start(Some(PATIENCE)).unwrap();
    let remote = handle.remote();
    wait_for(&output, "as init process");
    wait_rounds(&output);
    remote.track_writes().unwrap();
    let mut copy = vec![0; MEMORY as usize];
    let mut rounds = Vec::new();
    for round in 0..10 {
        if round == 9 {
            remote.pause().unwrap();
        }
        let pages = remote.harvest().unwrap();
        rounds.push(pages.count());
        remote
            .for_each_page_run(&pages, |at, bytes| -> Result<(), MachineError> {
                copy[at as usize..][..bytes.len()].copy_from_slice(bytes);
                Ok(())
            })
            .unwrap();
    }
    assert_same(&all(remote, MEMORY), &copy, &PageSet::default());
    // The program's pages and the kernel's few, of the tens of thousands of the first round.
    assert!(rounds[0] > 5000 && rounds[8] < 2000, "{rounds:?}");
    assert!(remote.written_count().unwrap() >= rounds[0]);
}

#[test]
fn clones_learn_that_they_are_such() {
    const MEMORY: u64 = 128 << 20;
    const LEARNT: &str = "crng reseeded due to virtual machine fork";
    let program = Some((16, 5_000_000));
    let config = config(MEMORY, program);
    let (parent, output) = machine(config.clone(), program, Attachments::default());
    let handle = parent.start(Some(PATIENCE)).unwrap();
    let remote = handle.remote();
    wait_for(&output, "crng init done");
    wait_for(&output, "as init process");
    wait_rounds(&output);
    remote.pause().unwrap();
    remote.track_writes().unwrap();
    let state = remote.save_state().unwrap();
    let memory = rebase(remote);
    let id = generation(remote);
    assert_ne!(id, [0; 16]);

    let layers = memory.layers.iter();
    let layers = layers.map(|(file, runs)| (file.try_clone().unwrap(), runs.clone()));
    let attachments = Attachments {
        memory: Some(SavedMemory {
            layers: layers.collect(),
        }),
        track: true,
        ..Attachments::default()
    };
    let (clone, cloned) = machine(config, program, attachments);
    let clone = clone.restore(state.clone(), Some(PATIENCE)).unwrap();
    let before = clock_pages(clone.remote()).count();
    clone.remote().new_generation(&[0x5a; 16]).unwrap();
    assert_eq!(clone.remote().written_count().unwrap(), before + 1);
    assert_eq!(generation(clone.remote()), [0x5a; 16]);
    clone.remote().resume();
    wait_for(&cloned, LEARNT);
    wait_rounds(&cloned);
    // The parent goes on as itself, and so does a machine that is taken back, until it is told.
    remote.resume();
    wait_rounds(&output);
    remote.pause().unwrap();
    assert!(!String::from_utf8_lossy(&output.0.lock().unwrap()).contains(LEARNT));
    assert_eq!(generation(remote), id);
    remote.rewind(&state).unwrap();
    remote.new_generation(&[0xa5; 16]).unwrap();
    remote.resume();
    wait_for(&output, LEARNT);
}

/// The generation id's page is the last below 1 MiB.
fn generation(remote: &MachineRemote) -> [u8; 16] {
    let mut id = [0; 16];
    remote.read_memory(0xf_f000, &mut id).unwrap();
    id
}
