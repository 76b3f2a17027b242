//! Chains of differences, of memory and of overlay disks: what they come to.

use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;
use skerry_snapshot::{
    Content, Error, Merged, PAGE_SIZE, Snapshot, SnapshotId, SnapshotStore, Trust, merged_disks,
    merged_memory,
};
use skerry_storage::{Disk, DiskError, Overlay};

use crate::common::{CACHE, diff_to, lay_over};

const PAGES: u64 = 64;
const SIZE: u64 = PAGES * PAGE_SIZE;
/// A disk whose last page is a part of one.
const DISK: u64 = SIZE - 512;

fn store() -> (tempfile::TempDir, SnapshotStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(dir.path().join("snapshots")).unwrap();
    (dir, store)
}

/// The content of all layers, of which no two may have the same page.
fn content(merged: &Merged) -> Vec<u8> {
    let mut bytes = vec![0; merged.size as usize];
    let mut seen = vec![false; merged.size.div_ceil(PAGE_SIZE) as usize];
    for layer in &merged.layers {
        assert!(!layer.is_empty());
        for run in layer.runs().iter() {
            let pages = run.at / PAGE_SIZE..(run.at + run.len) / PAGE_SIZE;
            for page in pages {
                assert!(!std::mem::replace(&mut seen[page as usize], true));
            }
            let len = run.len.min(merged.size - run.at) as usize;
            let to = &mut bytes[run.at as usize..][..len];
            layer.file().read_exact_at(to, run.offset).unwrap();
        }
    }
    bytes
}

/// What an engine does for a snapshot of a machine with an overlay.
fn save(
    store: &SnapshotStore,
    parent: Option<SnapshotId>,
    pages: &[(u64, Vec<u8>)],
    disk: &Overlay,
) -> SnapshotId {
    let options = parent.map_or(CACHE, diff_to);
    let (kind, ranges) = match parent {
        None => (Content::Full, disk.used()),
        Some(_) => (Content::Diff, disk.written()),
    };
    let mut writer = store.writer(options).unwrap();
    writer
        .memory::<Error>(SIZE, |out| {
            let mut pages = pages.iter();
            pages.try_for_each(|(number, page)| out.write_at(number * PAGE_SIZE, page))
        })
        .unwrap();
    writer
        .disk::<Error>("root", DISK, kind, |out| {
            disk.read_ranges(&ranges, |at, bytes| {
                Ok::<_, Failed>(out.write_at(at, bytes)?)
            })
            .map_err(|Failed(text)| panic!("{text}"))
        })
        .unwrap();
    writer.state(b"s").unwrap();
    let id = writer.commit(&()).unwrap();
    disk.freeze().unwrap();
    disk.rebase();
    id
}

#[derive(Debug)]
struct Failed(String);

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Failed(error.to_string())
    }
}

impl From<DiskError> for Failed {
    fn from(error: DiskError) -> Self {
        Failed(error.to_string())
    }
}

fn restored(chain: &[Snapshot], folder: &Path) -> Overlay {
    let disks = merged_disks(chain).unwrap();
    let root = &disks["root"];
    Overlay::new(root.size, root.layers.clone(), folder).unwrap()
}

/// What happens between two snapshots: pages of memory with their content, writes to the disk,
/// discards of it, and whether the machine starts anew from the last snapshot then.
type Step = (Vec<(u64, u8)>, Vec<(u64, u64, u8)>, Vec<(u64, u64)>, bool);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let byte = || prop_oneof![Just(0), any::<u8>()];
    // Often many in a row, so that there are long runs of zeros.
    let pages = (0..PAGES, 1..30u64, byte()).prop_map(|(first, count, byte)| {
        (first..PAGES.min(first + count))
            .map(|page| (page, byte))
            .collect::<Vec<_>>()
    });
    let pages = proptest::collection::vec(pages, 0..4).prop_map(|all| all.concat());
    let write = (0..DISK, 0..40_000u64, byte());
    let discard = (0..DISK, 0..100_000u64);
    let step = (
        pages,
        proptest::collection::vec(write, 0..4),
        proptest::collection::vec(discard, 0..3),
        any::<bool>(),
    );
    proptest::collection::vec(step, 1..6)
}

fn check(steps: Vec<Step>) {
    let (dir, store) = store();
    let mut disk = Overlay::new(DISK, Vec::new(), dir.path()).unwrap();
    let mut memory = vec![0; SIZE as usize];
    let mut parent = None;
    for (pages, writes, discards, anew) in steps {
        let mut dirty = std::collections::BTreeMap::new();
        for (page, byte) in pages {
            let at = (page * PAGE_SIZE) as usize;
            memory[at..at + PAGE_SIZE as usize].fill(byte);
            dirty.insert(page, vec![byte; PAGE_SIZE as usize]);
        }
        for (at, len, byte) in writes {
            let len = len.min(DISK - at) as usize;
            disk.write_at(&vec![byte; len], at).unwrap();
        }
        for (at, len) in discards {
            disk.discard(at, len.min(DISK - at)).unwrap();
        }
        let mut on_disk = vec![0; DISK as usize];
        disk.read_at(&mut on_disk, 0).unwrap();
        let dirty: Vec<_> = dirty.into_iter().collect();
        let id = save(&store, parent, &dirty, &disk);
        parent = Some(id);
        for trust in [Trust::Seal, Trust::Nothing] {
            let chain = store.open_chain(&id, trust).unwrap();
            let merged = merged_memory(&chain).unwrap();
            assert_eq!(merged.size, SIZE);
            assert!(content(&merged) == memory);
            assert!(content(&merged_disks(&chain).unwrap()["root"]) == on_disk);
            // And one after the other, into a file.
            let out = tempfile::tempfile().unwrap();
            let mut laid = Vec::new();
            for snapshot in &chain {
                snapshot.memory.unpack(&out).unwrap();
                lay_over(&snapshot.memory, &mut laid);
            }
            let mut unpacked = vec![1; SIZE as usize];
            out.read_exact_at(&mut unpacked, 0).unwrap();
            assert!(unpacked == memory && laid == memory);
            if anew {
                disk = restored(&chain, dir.path());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn a_chain_is_what_was_saved_last(steps in steps()) {
        check(steps);
    }
}

#[test]
fn long_runs_of_zeros_take_no_space() {
    let (dir, store) = store();
    let disk = Overlay::new(1 << 30, Vec::new(), dir.path()).unwrap();
    disk.write_at(&vec![7; 32 << 20], 0).unwrap();
    let write = |parent: Option<SnapshotId>, content, ranges: Vec<std::ops::Range<u64>>| {
        let mut writer = store.writer(parent.map_or(CACHE, diff_to)).unwrap();
        writer.memory::<Error>(0, |_| Ok(())).unwrap();
        writer.state(b"").unwrap();
        let packed = writer
            .disk::<Error>("root", 1 << 30, content, |out| {
                let put = |at, bytes: &[u8]| Ok::<_, Failed>(out.write_at(at, bytes)?);
                disk.read_ranges(&ranges, put).unwrap();
                Ok(())
            })
            .unwrap();
        (writer.commit(&()).unwrap(), packed)
    };
    let (full, packed) = write(None, Content::Full, disk.used());
    assert_eq!((packed.data_pages, packed.zero_pages), (8192, 0));
    disk.freeze().unwrap();
    disk.rebase();
    disk.discard(0, 1 << 30).unwrap();
    disk.write_at(&[1; 4096], 16 << 20).unwrap();
    let (diff, packed) = write(Some(full), Content::Diff, disk.written());
    assert_eq!(
        (packed.runs, packed.data_pages, packed.zero_pages),
        (1, 1, 8191)
    );
    assert!(store.info(&diff).unwrap().size < 32 << 10);
    // Nothing of the parent is left to be mapped.
    let chain = store.open_chain(&diff, Trust::Seal).unwrap();
    let root = &merged_disks(&chain).unwrap()["root"];
    let bytes: u64 = root.layers.iter().map(|layer| layer.len()).sum();
    assert_eq!((root.layers.len(), bytes), (1, 4096));
}

#[test]
fn a_few_zero_pages_among_data_are_written() {
    let (_dir, store) = store();
    let page = |byte| vec![byte; PAGE_SIZE as usize];
    let parent = {
        let mut writer = store.writer(CACHE).unwrap();
        writer.memory::<Error>(SIZE, |_| Ok(())).unwrap();
        writer.state(b"").unwrap();
        writer.commit(&()).unwrap()
    };
    // Runs of data and of zeros, in pages: 1, 15 zeros, 1, 16 zeros, 1, 2 zeros.
    let mut writer = store.writer(diff_to(parent)).unwrap();
    let packed = writer
        .memory::<Error>(SIZE, |out| {
            for number in 4..40 {
                out.write(number, &page(u8::from([4, 20, 37].contains(&number))))?;
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(
        (packed.runs, packed.data_pages, packed.zero_pages),
        (2, 18, 18)
    );
    writer.state(b"").unwrap();
    let id = writer.commit(&()).unwrap();
    let image = store.get(&id, Trust::Nothing).unwrap().memory;
    assert_eq!(image.zeros, [21..37, 38..40]);
}

#[test]
fn disks_that_do_not_fit_are_named() {
    let (_dir, store) = store();
    let write = |parent: Option<SnapshotId>, disk: Option<(u64, Content)>| {
        let mut writer = store.writer(parent.map_or(CACHE, diff_to)).unwrap();
        writer.memory::<Error>(SIZE, |_| Ok(())).unwrap();
        writer.state(b"").unwrap();
        if let Some((size, content)) = disk {
            let page = [1; PAGE_SIZE as usize];
            let fill = |out: &mut skerry_snapshot::PageWriter| out.write(0, &page);
            writer.disk::<Error>("data", size, content, fill).unwrap();
        }
        writer.commit(&()).unwrap()
    };
    let (without, with) = (write(None, None), write(None, Some((SIZE, Content::Full))));
    for (parent, disk, fits) in [
        (without, Some((SIZE, Content::Diff)), false),
        (with, Some((DISK, Content::Diff)), false),
        (with, Some((SIZE, Content::Diff)), true),
        // Replaced, or gone.
        (with, Some((DISK, Content::Full)), true),
        (without, Some((DISK, Content::Full)), true),
        (with, None, true),
    ] {
        let id = write(Some(parent), disk);
        let chain = store.open_chain(&id, Trust::Seal).unwrap();
        match merged_disks(&chain) {
            Ok(disks) => {
                assert!(fits);
                let size = disks.get("data").map(|disk| disk.size);
                assert_eq!(size, disk.map(|(size, _)| size));
            }
            Err(error) => {
                let text = error.to_string();
                assert!(
                    !fits && matches!(error, Error::BrokenChain { .. }),
                    "{text}"
                );
                assert!(text.contains(&parent.to_string()) && text.contains("'data'"));
                assert!(text.contains(&id.hex()), "{text}");
            }
        }
        // Without its parent, a difference is nothing.
        if let Some((_, Content::Diff)) = disk {
            let error = merged_memory(&chain[1..]).unwrap_err();
            assert!(matches!(error, Error::BrokenChain { .. }), "{error}");
        }
    }
}
