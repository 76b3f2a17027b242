//! What goes in comes out: memory, disks, state, configuration, chains.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use crate::common::{CACHE, Config, config, content, diff_to, lay_over, page, sample};
use proptest::prelude::*;
use skerry_snapshot::{
    Content, Error, PAGE_SIZE, PagesError, Run, SnapshotId, SnapshotStore, SnapshotWriter, Trust,
    WriteOptions,
};

const PAGES: u64 = 300;

fn store() -> (tempfile::TempDir, SnapshotStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(dir.path().join("snapshots")).unwrap();
    (dir, store)
}

fn write(
    store: &SnapshotStore,
    options: WriteOptions,
    pages: &BTreeMap<u64, Vec<u8>>,
) -> SnapshotId {
    let mut writer = store.writer(options).unwrap();
    writer
        .memory::<Error>(PAGES * PAGE_SIZE, |out| {
            pages
                .iter()
                .try_for_each(|(number, page)| out.write(*number, page))
        })
        .unwrap();
    writer.state(b"s").unwrap();
    writer.commit(&()).unwrap()
}

fn runs(present: &[u64], options: WriteOptions, store: &SnapshotStore) -> Vec<(u64, u64)> {
    let pages = present.iter().map(|n| (*n, page(*n))).collect();
    let id = write(store, options, &pages);
    let snapshot = store.get(&id, Trust::Seal).unwrap();
    let pairs = snapshot.memory.runs.iter();
    pairs.map(|run: &Run| (run.guest_page, run.pages)).collect()
}

#[test]
fn short_gaps_are_bridged_in_full_snapshots_only() {
    let (_dir, store) = store();
    // 15 pages between, then 16.
    let present = [3, 19, 36, 37];
    assert_eq!(runs(&present, CACHE, &store), [(3, 17), (36, 2)]);
    let parent = write(&store, CACHE, &BTreeMap::new());
    let expected = [(3, 1), (19, 1), (36, 2)];
    assert_eq!(runs(&present, diff_to(parent), &store), expected);
}

#[test]
fn everything_comes_back() {
    let (_dir, store) = store();
    for options in [CACHE, WriteOptions::default()] {
        let id = sample(&store, options, 7);
        let snapshot = store.get(&id, Trust::Seal).unwrap();
        assert!(snapshot.was_sealed());
        assert_eq!(snapshot.id(), id);
        assert_eq!(snapshot.state(), br#"{"rip":4096}"#);
        assert_eq!(snapshot.config::<Config>().unwrap(), config());
        assert_eq!(snapshot.memory_size(), 32 * PAGE_SIZE);
        assert_eq!(snapshot.disks["root"].size, 5000);
        assert_eq!(snapshot.extras["log"].size, 999);
        let verified = store.get(&id, Trust::Nothing).unwrap();
        assert!(!verified.was_sealed());
        assert_eq!(content(&verified), content(&snapshot));
    }
    assert_eq!(store.sweep().unwrap(), 0);
}

#[test]
fn a_large_sparse_disk_is_small() {
    let (dir, store) = store();
    let mut disk = std::fs::File::create_new(dir.path().join("disk")).unwrap();
    let size = (64 << 30) + 100;
    disk.set_len(size).unwrap();
    for at in [5000, 40 << 30, size - 10] {
        disk.seek(SeekFrom::Start(at)).unwrap();
        disk.write_all(b"something").unwrap();
    }
    let disk = std::fs::File::open(dir.path().join("disk")).unwrap();
    let mut writer = store.writer(CACHE).unwrap();
    writer.memory::<Error>(0, |_| Ok(())).unwrap();
    writer.state(b"").unwrap();
    let packed = writer.disk_file("root", &disk).unwrap();
    assert_eq!((packed.runs, packed.data_pages), (3, 3));
    let id = writer.commit(&()).unwrap();
    let snapshot = store.get(&id, Trust::Nothing).unwrap();
    let out = tempfile::tempfile_in(dir.path()).unwrap();
    snapshot.disks["root"].unpack(&out).unwrap();
    assert_eq!(out.metadata().unwrap().len(), size);
    for at in [5000, 40 << 30, size - 10] {
        let mut bytes = [0; 9];
        out.read_exact_at(&mut bytes, at).unwrap();
        assert_eq!(&bytes, b"something");
    }
}

fn pages_error(result: Result<(), Error>) -> PagesError {
    match result {
        Err(Error::Pages { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_writer_that_errs_is_told() {
    let (_dir, store) = store();
    let mut writer = store.writer(CACHE).unwrap();
    writer
        .memory::<Error>(4 * PAGE_SIZE, |out| {
            out.write(2, &page(2))?;
            assert_eq!(
                pages_error(out.write(2, &page(2))),
                PagesError::NotAscending(2)
            );
            assert_eq!(
                pages_error(out.write(4, &page(4))),
                PagesError::BeyondEnd(4)
            );
            assert_eq!(pages_error(out.write(9, &[])), PagesError::BeyondEnd(9));
            assert_eq!(
                pages_error(out.write(3, b"abc")),
                PagesError::NotWholePages(3)
            );
            Ok(())
        })
        .unwrap();
    let twice = writer.memory::<Error>(4 * PAGE_SIZE, |_| Ok(()));
    assert!(matches!(twice, Err(Error::Incomplete { .. })));
    assert!(matches!(
        writer.extra("../x", &b""[..]),
        Err(Error::Name { .. })
    ));
    writer.extra("x", &b""[..]).unwrap();
    assert!(matches!(
        writer.extra("x", &b""[..]),
        Err(Error::Incomplete { .. })
    ));
    let diff = writer.disk::<Error>("d", 0, Content::Diff, |_| Ok(()));
    assert!(matches!(diff, Err(Error::Incomplete { .. })));
    assert!(matches!(writer.commit(&()), Err(Error::Incomplete { .. })));
    let names: Vec<_> = std::fs::read_dir(store.root()).unwrap().collect();
    assert_eq!(names.len(), 1, "only the lock stays");
}

#[test]
fn zeros_of_a_difference_hide_what_the_parent_has() {
    let (_dir, store) = store();
    let parent = write(&store, CACHE, &BTreeMap::from([(1, page(1)), (2, page(2))]));
    let zero = vec![0; PAGE_SIZE as usize];
    let child = write(&store, diff_to(parent), &BTreeMap::from([(2, zero)]));
    let chain = store.open_chain(&child, Trust::Seal).unwrap();
    let ids: Vec<_> = chain.iter().map(|snapshot| snapshot.id()).collect();
    assert_eq!(ids, [parent, child]);
    let mut memory = Vec::new();
    chain
        .iter()
        .for_each(|snapshot| lay_over(&snapshot.memory, &mut memory));
    assert_eq!(memory[4096..8192], page(1));
    assert!(memory[8192..12288].iter().all(|byte| *byte == 0));
}

#[test]
fn chains_end() {
    let (_dir, store) = store();
    let mut last = write(&store, CACHE, &BTreeMap::new());
    for n in 1..64 {
        last = write(&store, diff_to(last), &BTreeMap::from([(n, page(n))]));
    }
    assert_eq!(store.open_chain(&last, Trust::Seal).unwrap().len(), 64);
    let error = SnapshotWriter::create(store.root(), diff_to(last))
        .err()
        .unwrap();
    assert!(
        matches!(error, Error::ChainTooLong { limit: 63, .. }),
        "{error}"
    );
}

#[test]
fn parents_that_are_missing_or_others() {
    let (_dir, store) = store();
    let nobody = SnapshotId::of(b"nobody");
    let error = store.writer(diff_to(nobody)).err().unwrap();
    assert!(matches!(error, Error::MissingParent { parent, .. } if parent == nobody));
    let parent = write(&store, CACHE, &BTreeMap::from([(1, page(1))]));
    let mut writer = store.writer(diff_to(parent)).unwrap();
    writer.memory::<Error>(PAGE_SIZE, |_| Ok(())).unwrap();
    writer.state(b"").unwrap();
    let error = writer.commit(&()).unwrap_err();
    assert!(matches!(error, Error::WrongParent { .. }), "{error}");
    let child = write(&store, diff_to(parent), &BTreeMap::from([(2, page(2))]));
    let error = store.remove(&parent).unwrap_err();
    assert!(matches!(error, Error::HasChildren { children, .. } if children == [child]));
    // Another snapshot in the parent's place; none; and a damaged one.
    let other = write(&store, CACHE, &BTreeMap::from([(3, page(3))]));
    let place = |id: &SnapshotId| store.root().join(id.hex());
    let aside = store.root().join("aside");
    std::fs::rename(place(&parent), &aside).unwrap();
    let error = store.open_chain(&child, Trust::Seal).unwrap_err();
    assert!(matches!(error, Error::MissingParent { .. }), "{error}");
    std::fs::rename(place(&other), place(&parent)).unwrap();
    let error = store.open_chain(&child, Trust::Seal).unwrap_err();
    assert!(
        matches!(error, Error::WrongId { expected, found } if expected == parent && found == other)
    );
    assert_eq!(store.list().unwrap().damaged.len(), 1);
}

fn page_sets() -> impl Strategy<Value = (BTreeSet<u64>, BTreeSet<u64>, BTreeSet<u64>)> {
    let set = || proptest::collection::btree_set(0..PAGES, 0..80);
    (set(), set(), set())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_pages_come_back((full, changed, zeroed) in page_sets()) {
        let (_dir, store) = store();
        let zero = vec![0; PAGE_SIZE as usize];
        let mut expected = vec![0; (PAGES * PAGE_SIZE) as usize];
        let mut apply = |pages: &BTreeMap<u64, Vec<u8>>| for (number, page) in pages {
            let at = (number * PAGE_SIZE) as usize;
            expected[at..at + page.len()].copy_from_slice(page);
        };
        let first = full.iter().map(|n| (*n, page(*n))).collect();
        let mut second: BTreeMap<_, _> = changed.iter().map(|n| (*n, page(n + 1000))).collect();
        second.extend(zeroed.iter().map(|n| (*n, zero.clone())));
        apply(&first);
        apply(&second);
        let parent = write(&store, CACHE, &first);
        let child = write(&store, diff_to(parent), &second);
        for trust in [Trust::Seal, Trust::Nothing] {
            let chain = store.open_chain(&child, trust).unwrap();
            let image = &chain[1].memory;
            let zeros: u64 = image.zeros.iter().map(|pages| pages.end - pages.start).sum();
            prop_assert_eq!(image.data_pages() + zeros, second.len() as u64);
            let mut memory = Vec::new();
            chain.iter().for_each(|snapshot| lay_over(&snapshot.memory, &mut memory));
            prop_assert!(memory == expected);
        }
    }
}
