//! Memory against its base: what is found written, copied while the machine runs, rebased and taken
//! back, on every backend that opens here.

mod common;
#[path = "machine/guest.rs"]
mod guest;
#[path = "common/modes.rs"]
mod modes;
#[path = "../src/fuzzing/processor.rs"]
mod processor;

use std::time::{Duration, Instant};

use common::{Output, PAGE, PATIENCE, all, layer, rebase};
use processor::cpuid;
use skerry_hypervisor::Hypervisor;
use skerry_hypervisor_kvm::Kvm;
use skerry_hypervisor_soft::Soft;
use skerry_machine::{
    Attachments, Machine, MachineConfig, MachineError, MachineHandle, MachineRemote, MachineState,
    PageSet, SavedMemory,
};

const MEMORY: u64 = 4 << 20;
/// Where the guest's processors write: its code, and pages of their own.
const CODE: u64 = 0x100;
const FIRST: [u64; 8] = [0x200, 0x203, 0x206, 0x209, 0x20c, 0x20f, 0x212, 0x215];
const SECOND: [u64; 4] = [0x30, 0x32, 0x34, 0x36];

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

    fn restore<H: Hypervisor>(memory: SavedMemory, state: &MachineState, track: bool) -> Self {
        let (machine, output) = Self::make::<H>(1, Some(memory), track).unwrap();
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
        // Reading a page that nothing was written to would have the host take one.
        let second = if self.cpus == 2 { SECOND[3] } else { FIRST[7] };
        [FIRST[7], second].map(|page| {
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
            rounds(0) >= 3 && rounds(1) >= 3 && self.output.len() > printed + 2
        };
        while !done() {
            assert!(Instant::now() < deadline, "the guest stands");
            std::thread::sleep(Duration::from_micros(100));
        }
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
    assert!(matches!(remote.harvest(), Ok(pages) if pages.is_empty()));
    remote.kill();
    drop(guest.handle.wait());
    // Memory outlives the run.
    assert!(remote.harvest().unwrap().count() < 10);
    assert!(matches!(remote.save_state(), Err(MachineError::Ended)));
}

fn it_goes_back_as_often_as_it_must<H: Hypervisor>(times: usize) {
    let Some(guest) = Guest::start::<H>(2, false) else {
        return;
    };
    let remote = guest.remote();
    remote.track_writes().unwrap();
    assert!(matches!(remote.save_state(), Err(MachineError::NotPaused)));
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
    let clone = |track| {
        let layers = saved.layers.iter();
        let layers = layers.map(|(file, runs)| (file.try_clone().unwrap(), runs.clone()));
        let saved = SavedMemory {
            layers: layers.collect(),
        };
        Guest::restore::<H>(saved, &state, track)
    };
    let (one, two) = (clone(true), clone(true));
    assert!(all(one.remote(), MEMORY) == memory);
    one.run();
    parent.run();
    assert!(all(one.remote(), MEMORY) != memory);
    assert!(all(two.remote(), MEMORY) == memory);
    assert_eq!(two.remote().written_count().unwrap(), 0);
    assert_eq!(one.remote().written().unwrap(), set(&[&[CODE], &FIRST]));
    two.run();
    // What one that was not tracked has written is found all the same.
    let late = clone(false);
    late.run();
    late.remote().track_writes().unwrap();
    let written = late.remote().written().unwrap();
    assert_eq!(written, set(&[&[CODE], &FIRST]));
    late.run();
    late.remote().rewind(&state).unwrap();
    assert!(all(late.remote(), MEMORY) == memory);
    // A clone's clone lies on both layers.
    let state = one.remote().save_state().unwrap();
    let child = rebase(one.remote());
    let memory = all(one.remote(), MEMORY);
    let both = saved.layers.into_iter().chain(child.layers).collect();
    let grandchild = Guest::restore::<H>(SavedMemory { layers: both }, &state, true);
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
on!(interpreter, super::modes::Interpreter, 50);
on!(stress, super::modes::Stress, 50);
