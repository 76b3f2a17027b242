//! Memory against its base: what is found written, copied while the machine runs, rebased and taken
//! back, on every backend that opens here.

#[path = "machine/guest.rs"]
mod guest;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use skerry_hypervisor::cpu_model::CpuModel;
use skerry_hypervisor::{CpuidEntry, CpuidResult, CpuidTable, Hypervisor};
use skerry_hypervisor_kvm::Kvm;
use skerry_hypervisor_soft::Soft;
use skerry_machine::{
    Attachments, DiskConfig, Machine, MachineConfig, MachineError, MachineHandle, MachineRemote,
    MachineState, PageSet, SavedMemory, SavedRun,
};
use skerry_storage::{Access, RawDisk};

const PATIENCE: Duration = Duration::from_secs(120);
const PAGE: u64 = 4096;
const MEMORY: u64 = 4 << 20;
/// Where the guest's processors write: its code, and pages of their own.
const CODE: u64 = 0x100;
const FIRST: [u64; 8] = [0x200, 0x203, 0x206, 0x209, 0x20c, 0x20f, 0x212, 0x215];
const SECOND: [u64; 4] = [0x30, 0x32, 0x34, 0x36];

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
    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn wait_for(&self, what: impl Fn(&[u8]) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !what(&self.0.lock().unwrap()) {
            assert!(Instant::now() < deadline, "no output");
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

fn config(command_line: &str, cpus: u32) -> MachineConfig {
    MachineConfig {
        memory: MEMORY,
        cpus,
        kernel: "test guest".into(),
        command_line: Some(command_line.into()),
        no_reboot: true,
        ..MachineConfig::default()
    }
}

fn cpuid(id: u32) -> CpuidTable {
    let entry = |leaf, eax, ebx, edx| CpuidEntry {
        leaf,
        subleaf: None,
        result: CpuidResult {
            eax,
            ebx,
            ecx: 0,
            edx,
        },
    };
    // FPU, PSE, TSC, MSR, PAE, CX8, APIC, CMOV.
    let features = 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 9 | 1 << 15;
    CpuidTable {
        entries: vec![entry(0, 1, 0, 0), entry(1, 0x600, id << 24, features)],
    }
}

struct Guest {
    handle: MachineHandle,
    output: Output,
    cpus: u32,
}

impl Guest {
    /// `None` where the backend does not open here.
    fn make<H: Hypervisor>(
        cpus: u32,
        memory: Option<SavedMemory>,
        track: bool,
    ) -> Option<(Machine<H>, Output)> {
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
            memory,
            track,
            ..Attachments::default()
        };
        attachments.serial[0] = Some(Box::new(output.clone()));
        let command_line = if cpus == 2 { "w2" } else { "w" };
        let machine = Machine::new(&hypervisor, config(command_line, cpus), attachments, cpuid);
        Some((machine.unwrap(), output))
    }

    fn start<H: Hypervisor>(cpus: u32, track: bool) -> Option<Self> {
        let (machine, output) = Self::make::<H>(cpus, None, track)?;
        let handle = machine.start(Some(PATIENCE)).unwrap();
        let guest = Self {
            handle,
            output,
            cpus,
        };
        guest.wait([0, 0]);
        Some(guest)
    }

    fn restore<H: Hypervisor>(memory: SavedMemory, state: &MachineState) -> Self {
        let (machine, output) = Self::make::<H>(1, Some(memory), true).unwrap();
        let handle = machine.restore(state.clone(), Some(PATIENCE)).unwrap();
        Self {
            handle,
            output,
            cpus: 1,
        }
    }

    fn remote(&self) -> &MachineRemote {
        self.handle.remote()
    }

    /// A counter of each processor: in the last of its pages that it writes in turn.
    fn counters(&self) -> [u16; 2] {
        [FIRST[7], SECOND[3]].map(|page| {
            let mut counter = [0; 2];
            let read = self.remote().read_memory(page * PAGE, &mut counter);
            read.unwrap();
            u16::from_le_bytes(counter)
        })
    }

    /// Lets the machine run until it has written each of its pages anew.
    fn run(&self) {
        let before = self.counters();
        self.remote().resume();
        self.wait(before);
        self.remote().pause().unwrap();
    }

    fn wait(&self, before: [u16; 2]) {
        let deadline = Instant::now() + PATIENCE;
        let printed = self.output.len();
        let done = || {
            let now = self.counters();
            let rounds = |cpu: usize| now[cpu].wrapping_sub(before[cpu]);
            rounds(0) >= 3 && (self.cpus == 1 || rounds(1) >= 3) && self.output.len() > printed + 2
        };
        while !done() {
            assert!(Instant::now() < deadline, "the guest stands");
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

fn all(remote: &MachineRemote, bytes: u64) -> Vec<u8> {
    let mut memory = vec![0; bytes as usize];
    remote.read_memory(0, &mut memory).unwrap();
    memory
}

/// `pages` as a layer: each at its own place of a sparse file.
fn layer(remote: &MachineRemote, pages: &PageSet) -> (File, Vec<SavedRun>) {
    let file = tempfile::tempfile().unwrap();
    remote
        .for_each_page_run(pages, |at, bytes| -> Result<(), MachineError> {
            file.write_all_at(bytes, at).unwrap();
            Ok(())
        })
        .unwrap();
    let runs = pages.runs().map(|run| SavedRun {
        at: run.start * PAGE,
        len: (run.end - run.start) * PAGE,
        offset: run.start * PAGE,
    });
    (file, runs.collect())
}

/// Makes what was written the machine's base.
fn rebase(remote: &MachineRemote) -> SavedMemory {
    let written = remote.written().unwrap();
    let wider = written.coalesce(PageSet::GAP, PageSet::RUNS);
    let (file, runs) = layer(remote, &wider);
    let copy = file.try_clone().unwrap();
    remote.rebase(file, runs.clone()).unwrap();
    assert_eq!(remote.written_count().unwrap(), 0);
    SavedMemory {
        layers: vec![(copy, runs)],
    }
}

fn set(pages: &[&[u64]]) -> PageSet {
    let mut set = PageSet::new(MEMORY / PAGE);
    for page in pages.iter().copied().flatten() {
        set.insert(*page..page + 1);
    }
    set
}

fn the_log_is_exact<H: Hypervisor>() {
    for track in [false, true] {
        let Some(guest) = Guest::start::<H>(2, track) else {
            return;
        };
        let remote = guest.remote();
        if !track {
            assert!(matches!(remote.written(), Err(MachineError::NotTracked)));
        }
        remote.pause().unwrap();
        remote.track_writes().unwrap();
        let expected = set(&[&[CODE], &FIRST, &SECOND]);
        // What was loaded is written, too: the kernel's page, tables, the second processor's code.
        let mut written = remote.written().unwrap();
        assert!(written.count() > expected.count());
        written.intersect(&expected);
        assert_eq!(written, expected);
        for _ in 0..5 {
            assert!(remote.harvest().unwrap().is_empty());
            guest.run();
            // No page of anything that it only reads.
            assert_eq!(remote.harvest().unwrap(), expected);
        }
        rebase(remote);
        guest.run();
        assert_eq!(remote.written_count().unwrap(), expected.count());
        assert_eq!(remote.written().unwrap(), expected);
        assert!(remote.harvest().unwrap().is_empty());
    }
}

fn a_running_machine_is_copied<H: Hypervisor>() {
    let Some(guest) = Guest::start::<H>(2, false) else {
        return;
    };
    let remote = guest.remote();
    remote.track_writes().unwrap();
    let mut copy = vec![0; MEMORY as usize];
    let mut take = |pages: &PageSet| {
        remote
            .for_each_page_run(pages, |at, bytes| -> Result<(), MachineError> {
                copy[at as usize..][..bytes.len()].copy_from_slice(bytes);
                Ok(())
            })
            .unwrap();
    };
    take(&remote.written().unwrap());
    for _ in 0..50 {
        take(&remote.harvest().unwrap());
    }
    remote.pause().unwrap();
    take(&remote.harvest().unwrap());
    assert!(copy == all(remote, MEMORY));
}

fn it_goes_back_as_often_as_it_must<H: Hypervisor>(times: usize) {
    let Some(guest) = Guest::start::<H>(2, false) else {
        return;
    };
    let remote = guest.remote();
    remote.track_writes().unwrap();
    remote.pause().unwrap();
    let state = remote.save_state().unwrap();
    assert!(matches!(remote.rewind(&state), Err(MachineError::NoBase)));
    rebase(remote);
    let memory = all(remote, MEMORY);
    let expected = set(&[&[CODE], &FIRST, &SECOND]);
    let printed = guest.output.len();
    guest.run();
    let next = guest.output.0.lock().unwrap()[printed..][..2].to_vec();
    for round in 0..times {
        assert!(all(remote, MEMORY) != memory, "round {round}");
        assert_eq!(remote.written().unwrap(), expected);
        let rewound = remote.rewind(&state).unwrap();
        assert_eq!(rewound.pages, expected.count());
        assert!(all(remote, MEMORY) == memory, "round {round}");
        assert_eq!(remote.written_count().unwrap(), 0);
        let again = remote.save_state().unwrap();
        assert_eq!(again.cpus[0].general, state.cpus[0].general);
        // The code that it changes is the old one again.
        let printed = guest.output.len();
        guest.run();
        assert_eq!(guest.output.0.lock().unwrap()[printed..][..2], next);
    }
    remote.resume();
    assert!(matches!(
        remote.rewind(&state),
        Err(MachineError::NotPaused)
    ));
    let (file, runs) = layer(remote, &set(&[&[CODE]]));
    assert!(matches!(
        remote.rebase(file, runs),
        Err(MachineError::NotPaused)
    ));
}

fn clones_share_a_layer_and_no_write<H: Hypervisor>() {
    let Some(parent) = Guest::start::<H>(1, true) else {
        return;
    };
    let remote = parent.remote();
    remote.pause().unwrap();
    let state = remote.save_state().unwrap();
    let saved = rebase(remote);
    let memory = all(remote, MEMORY);
    let clone = || {
        let layers = saved.layers.iter();
        let layers = layers.map(|(file, runs)| (file.try_clone().unwrap(), runs.clone()));
        let saved = SavedMemory {
            layers: layers.collect(),
        };
        Guest::restore::<H>(saved, &state)
    };
    let (one, two) = (clone(), clone());
    assert!(all(one.remote(), MEMORY) == memory);
    one.run();
    parent.run();
    assert!(all(one.remote(), MEMORY) != memory);
    assert!(all(two.remote(), MEMORY) == memory);
    assert_eq!(two.remote().written_count().unwrap(), 0);
    assert_eq!(one.remote().written().unwrap(), set(&[&[CODE], &FIRST]));
    two.run();
    // A clone's clone lies on both layers.
    let state = one.remote().save_state().unwrap();
    let child = rebase(one.remote());
    let memory = all(one.remote(), MEMORY);
    let both = saved.layers.into_iter().chain(child.layers).collect();
    let grandchild = Guest::restore::<H>(SavedMemory { layers: both }, &state);
    assert!(all(grandchild.remote(), MEMORY) == memory);
    grandchild.run();
    one.run();
    one.remote().rewind(&state).unwrap();
    grandchild.remote().rewind(&state).unwrap();
    assert!(all(one.remote(), MEMORY) == memory);
    assert!(all(grandchild.remote(), MEMORY) == memory);
}

macro_rules! on {
    ($backend:ident, $hypervisor:ty, $times:expr) => {
        mod $backend {
            #[test]
            fn the_log_is_exact() {
                super::the_log_is_exact::<$hypervisor>();
            }
            #[test]
            fn a_running_machine_is_copied() {
                super::a_running_machine_is_copied::<$hypervisor>();
            }
            #[test]
            fn it_goes_back_as_often_as_it_must() {
                super::it_goes_back_as_often_as_it_must::<$hypervisor>($times);
            }
            #[test]
            fn clones_share_a_layer_and_no_write() {
                super::clones_share_a_layer_and_no_write::<$hypervisor>();
            }
        }
    };
}

on!(kvm, super::Kvm, 50);
on!(soft, super::Soft, 1000);

/// Linux's boot, taken back again and again: paging, interrupts, timers, DMA of virtio devices, code
/// that patches itself.
#[test]
fn linux_goes_back_while_it_boots() {
    const MEMORY: u64 = 128 << 20;
    let found = Soft::probe().unwrap();
    let kernel = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../guest/kernel/bzImage-x86_64"
    );
    let mut image = tempfile::NamedTempFile::new().unwrap();
    image.write_all(&vec![0x5a; 1 << 20]).unwrap();
    let disk = RawDisk::open(image.path(), Access::ReadWrite).unwrap();
    let config = MachineConfig {
        memory: MEMORY,
        cpus: 2,
        kernel: kernel.into(),
        rng: true,
        console: true,
        vsock: Some(3),
        disks: vec![DiskConfig {
            name: "disk".into(),
            read_only: false,
        }],
        ..MachineConfig::default()
    };
    let output = Output::default();
    let mut attachments = Attachments {
        disks: vec![Arc::new(disk)],
        ..Attachments::default()
    };
    attachments.serial[0] = Some(Box::new(output.clone()));
    let model = CpuModel::best(&found);
    let tables = [0, 1].map(|id| model.cpuid(&found, 2, id).unwrap());
    let machine = Machine::new(&Soft::open().unwrap(), config, attachments, |id| {
        tables[id as usize].clone()
    });
    let handle = machine.unwrap().start(Some(PATIENCE * 5)).unwrap();
    let remote = handle.remote();
    let has = |text: &'static [u8]| {
        move |output: &[u8]| output.windows(text.len()).any(|window| window == text)
    };
    output.wait_for(has(b"Brought up 1 node, 2 CPUs"));
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
        let now = all(remote, MEMORY);
        let differs = (0..MEMORY as usize)
            .step_by(PAGE as usize)
            .find(|at| now[*at..][..PAGE as usize] != memory[*at..][..PAGE as usize]);
        assert_eq!(differs, None, "round {round}: {rewound:?}");
    }
    output.0.lock().unwrap().clear();
    remote.resume();
    output.wait_for(has(b"Kernel panic - not syncing"));
    drop(handle);
}
