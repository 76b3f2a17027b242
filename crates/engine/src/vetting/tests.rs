use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde_json::Value;
use skerry_hypervisor::{CpuidTable, Hypervisor};
use skerry_hypervisor_soft::Soft;
use skerry_machine::MachineState;
use skerry_machine::fuzzing::{Choices, Seed, change};
use skerry_snapshot::{PAGE_SIZE, SnapshotStore, WriteOptions};
use skerry_storage::scratch;
use skerry_storage::{Layer, LayerRun};
use skerry_test_support::Random;

use super::*;
use crate::command::Surroundings;
use crate::frozen::{CommandAbout, ImageAbout};
use crate::hypervisor::Backend;
use crate::machine::MachineOptions;
use crate::parcel;
use crate::paths::Paths;
use crate::vm::{VmSpec, machine_config};

const MEMORY: u64 = 4 << 20;

fn about() -> About {
    let spec = VmSpec {
        options: MachineOptions {
            memory: MEMORY,
            cpus: 2,
            ..MachineOptions::default()
        },
        ..VmSpec::default()
    };
    About {
        backend: Backend::Soft,
        machine: machine_config(&spec),
        cpuid: vec![CpuidTable::default(); 2],
        image: ImageAbout {
            name: "image".to_owned(),
            digest: "sha256:0".to_owned(),
            rootfs: "0".to_owned(),
        },
        read_only: false,
        command: Some(CommandAbout {
            argv: vec!["sh".to_owned(), "-c".to_owned(), "sleep 1\n".to_owned()],
            tty: false,
            stdin: false,
            session: 1,
        }),
        surroundings: Surroundings::default(),
        mounts: Vec::new(),
    }
}

fn state() -> MachineState {
    let soft = Soft::open().expect("a processor in software");
    let seed = Seed::make(&soft).expect("a machine");
    serde_json::from_value(seed.documents().1.clone()).expect("its state")
}

fn layer(pages: u64) -> Layer {
    let file = tempfile::tempfile().expect("file");
    file.set_len(pages * PAGE_SIZE).expect("length");
    let run = LayerRun {
        at: 0,
        len: pages * PAGE_SIZE,
        offset: 0,
    };
    Layer::new(file, [run]).expect("layer")
}

fn frozen(state: MachineState) -> Frozen {
    let id = skerry_snapshot::SnapshotId::of(b"parent");
    Frozen {
        about: about(),
        state: Arc::new(state),
        memory: vec![layer(3)],
        scratch: Some((scratch::SIZE, vec![layer(1)])),
        root: Arc::new(tempfile::tempfile().expect("root")),
        base: Some(Base {
            id,
            layers: 1,
            disk: vec![0..CLUSTER_SIZE, 2 * CLUSTER_SIZE..scratch::SIZE],
        }),
        capture: 0,
        working: None,
    }
}

type Damage = fn(&mut Frozen);

#[test]
fn what_no_machine_says_is_refused_by_name() {
    let good = frozen(state());
    good.vet().expect("plausible");
    let cases: [(&str, Damage); 17] = [
        ("memory", |f| f.about.machine.memory = 1 << 62),
        ("CPUID tables", |f| f.about.cpuid.clear()),
        ("CPUID tables", |f| f.about.machine.cpus = 4_000_000),
        ("state of 2", |f| {
            f.about.machine.cpus = 1;
            f.about.cpuid.truncate(1);
        }),
        ("disks", |f| {
            let disk = f.about.machine.disks[0].clone();
            f.about.machine.disks = vec![disk; 1_000_000];
        }),
        ("disks", |f| f.about.machine.disks[1].name.clear()),
        ("disks", |f| f.about.read_only = true),
        ("says that it has none", |f| {
            f.about.read_only = true;
            f.about.machine.disks.truncate(1);
        }),
        ("missing", |f| f.scratch = None),
        ("scratch disk has", |f| {
            f.scratch.as_mut().expect("scratch").0 = 1 << 45;
        }),
        ("context id", |f| f.about.machine.vsock = Some(2)),
        ("network card", |f| {
            f.about.machine.network.as_mut().expect("card").mtu = 65_535;
        }),
        ("boots again", |f| {
            f.about.machine.no_reboot = false;
            f.about.machine.initrd = Some("/etc/shadow".into());
        }),
        ("test kernels", |f| f.about.machine.debug_exit = Some(0xf4)),
        ("control characters", |f| {
            f.about.image.name = "\u{1b}[2J".to_owned();
        }),
        ("difference", |f| f.base.as_mut().expect("base").layers = 2),
        ("difference", |f| {
            let base = f.base.as_mut().expect("base");
            base.disk[1].end = u64::MAX;
        }),
    ];
    for (text, damage) in cases {
        let mut bad = good.clone();
        damage(&mut bad);
        let error = bad.vet().expect_err(text).to_string();
        assert!(error.contains(text), "{error} has no {text:?}");
    }
}

#[test]
fn the_store_gives_out_nothing_implausible() {
    let folder = tempfile::tempdir().expect("folder");
    let paths = Paths::at(folder.path());
    Paths::ensure(&paths.snapshots()).expect("store");
    let store = SnapshotStore::open(paths.snapshots()).expect("store");
    let state = serde_json::to_vec(&state()).expect("state");
    let open = |about: &Value| {
        let options = WriteOptions {
            durable: false,
            parent: None,
        };
        let mut writer = store.writer(options).expect("writer");
        let page = [1; PAGE_SIZE as usize];
        writer
            .memory(MEMORY, |pages| pages.write(1, &page))
            .expect("memory");
        writer.state(&state).expect("state");
        let scratch = |pages: &mut skerry_snapshot::PageWriter| pages.write(1, &page);
        writer
            .disk(
                "scratch",
                scratch::SIZE,
                skerry_snapshot::Content::Full,
                scratch,
            )
            .expect("scratch");
        let mut root = tempfile::tempfile().expect("root");
        root.write_all(&[0; 4096]).expect("root");
        std::io::Seek::rewind(&mut root).expect("root");
        writer.extra("root", root).expect("root");
        let id = writer.commit(about).expect("commit");
        Frozen::open(&paths, &id.hex())
    };
    let good = serde_json::to_value(about()).expect("about");
    open(&good).expect("plausible");
    let with = |place: &str, value: Value| {
        let mut bad = good.clone();
        *bad.pointer_mut(place).expect("place") = value;
        open(&bad).expect_err(place).to_string()
    };
    let text = with("/machine/memory", (8 << 20).into());
    assert!(text.contains("were saved"), "{text}");
    let text = with("/machine/no_reboot", false.into());
    assert!(text.contains("boots again"), "{text}");
    with("/machine/cpus", u32::MAX.into());
    with("/machine/vsock", (-1).into());
    with("/backend", "xen".into());
    with("/cpuid", Value::Null);
}

/// What passes is such that nothing of it concerns the host.
fn check(frozen: &Frozen) {
    if frozen.vet().is_ok() {
        let machine = &frozen.about.machine;
        assert!(machine.no_reboot && machine.disks.len() <= 2);
        assert_eq!(frozen.about.cpuid.len(), machine.cpus as usize);
        assert_eq!(frozen.state.cpus.len(), machine.cpus as usize);
    }
}

#[test]
fn changed_descriptions_briefly() {
    let mut frozen = frozen(state());
    let whole = serde_json::to_value(&frozen.about).expect("about");
    let mut read = 0;
    for case in 0..5000 {
        let bytes = Random::new(case).bytes(32);
        let mut changed = whole.clone();
        change(&mut changed, &mut Choices::new(&bytes));
        if let Ok(about) = serde_json::from_value(changed) {
            frozen.about = about;
            check(&frozen);
            read += 1;
        }
    }
    assert!(read > 500, "{read}");
}

#[test]
fn changed_parcels_briefly() {
    let frozen = frozen(state());
    let whole = parcel::testing::packed(&frozen);
    let mut taken = 0;
    for case in 0..400 {
        let mut changed = whole.clone();
        if case != 0 {
            let bytes = Random::new(case).bytes(32);
            change(&mut changed, &mut Choices::new(&bytes));
        }
        let (mut ours, mut theirs) = UnixStream::pair().expect("sockets");
        let result = std::thread::scope(|scope| {
            scope.spawn(|| parcel::testing::hand_over(&mut ours, &changed, &frozen));
            let result = parcel::take_over(&mut theirs);
            // For a maker that has not yet sent all.
            drop(theirs);
            result
        });
        if let Ok(frozen) = result {
            check(&frozen);
            taken += 1;
        }
        assert!(case != 0 || taken == 1, "as it was");
    }
    assert!(taken > 20, "{taken}");
}
