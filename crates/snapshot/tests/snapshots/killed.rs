//! Writers that are killed: a snapshot is absent or whole, and what they leave is swept.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{Random, page};
use skerry_snapshot::{Error, PAGE_SIZE, SnapshotStore, Trust, WriteOptions};

const CHILD: &str = "SKERRY_TEST_SNAPSHOT_CHILD";
const PAGES: u64 = 600;
const MOMENTS: usize = 200;

fn write(store: &SnapshotStore, options: WriteOptions) {
    let mut writer = store.writer(options).unwrap();
    writer
        .memory::<Error>(PAGES * PAGE_SIZE, |out| {
            (0..PAGES).try_for_each(|number| out.write(number, &page(number)))
        })
        .unwrap();
    writer.state(b"state").unwrap();
    writer.extra("disk", &page(1)[..]).unwrap();
    let id = writer.commit(&std::process::id()).unwrap();
    store.tag(&id, "latest").unwrap();
}

/// Not a test of its own: what the next one starts and kills.
#[test]
fn child() {
    if let Ok(root) = std::env::var(CHILD) {
        let store = SnapshotStore::open(root).unwrap();
        let first = std::process::id().is_multiple_of(2);
        for durable in [first, !first].into_iter().cycle() {
            let parent = None;
            write(&store, WriteOptions { durable, parent });
            for old in store.list().unwrap().snapshots.iter().skip(2) {
                store.remove(&old.id).unwrap();
            }
        }
    }
}

#[test]
fn at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let store = SnapshotStore::open(&root).unwrap();
    let mut random = Random::new(0xdead);
    let (mut swept, mut whole, mut whole_before) = (0, 0, 0);
    for moment in 0..MOMENTS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::child"])
            .env(CHILD, &root)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // It writes its first snapshot by then, or has written and removed several.
        let start = Instant::now();
        let begun = || std::fs::read_dir(&root).unwrap().count() > 1 + whole_before;
        while !begun() && start.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_micros(100));
        }
        std::thread::sleep(Duration::from_micros(random.next(60_000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        swept += store.sweep().unwrap();
        let listing = store.list().unwrap();
        assert!(
            listing.damaged.is_empty(),
            "{moment}: {:?}",
            listing.damaged
        );
        for info in &listing.snapshots {
            let snapshot = store.get(&info.id, Trust::Nothing).unwrap();
            assert_eq!(snapshot.memory.data_pages(), PAGES);
            whole += 1;
            store.remove(&info.id).unwrap();
        }
        let rest = std::fs::read_dir(&root)
            .unwrap()
            .map(|e| e.unwrap().file_name());
        let rest: Vec<_> = rest
            .filter(|name| !name.to_string_lossy().contains("name"))
            .collect();
        assert_eq!(rest, [".lock"], "{moment}: nothing else is left");
        whole_before = std::fs::read_dir(&root).unwrap().count() - 1;
    }
    assert!(
        swept > MOMENTS / 10 && whole > MOMENTS / 20,
        "{swept} swept, {whole} whole"
    );
}

#[test]
fn a_living_writer_is_not_swept() {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(dir.path()).unwrap();
    let mut writer = store.writer(crate::common::CACHE).unwrap();
    writer
        .memory::<Error>(PAGE_SIZE, |out| out.write(0, &page(0)))
        .unwrap();
    assert_eq!(store.sweep().unwrap(), 0);
    writer.state(b"").unwrap();
    let id = writer.commit(&()).unwrap();
    drop(store.writer(crate::common::CACHE).unwrap());
    assert_eq!(store.sweep().unwrap(), 0);
    store.get(&id, Trust::Nothing).unwrap();
}
