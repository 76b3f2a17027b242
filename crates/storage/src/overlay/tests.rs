use std::os::unix::fs::MetadataExt;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::compact::FILES_MAX;
use super::*;

const C: u64 = CLUSTER_SIZE;

fn overlay(size: u64) -> (tempfile::TempDir, Overlay) {
    let dir = tempfile::tempdir().unwrap();
    let disk = Overlay::new(size, Vec::new(), dir.path()).unwrap();
    (dir, disk)
}

fn bytes(disk: &Overlay) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.size() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Whether a list is of one range.
fn covers(ranges: &[Range<u64>], range: Range<u64>) -> bool {
    ranges == std::slice::from_ref(&range)
}

/// Bytes that the host spends for the top.
fn spent(disk: &Overlay) -> u64 {
    disk.stack.read().top.metadata().unwrap().blocks() * 512
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for size in [0, 1, 513, OVERLAY_MAX + 512, u64::MAX, u64::MAX - 511] {
        let error = Overlay::new(size, Vec::new(), dir.path()).unwrap_err();
        assert!(matches!(error, DiskError::Size { .. }), "{error}");
    }
    let disk = Overlay::new(OVERLAY_MAX, Vec::new(), dir.path()).unwrap();
    disk.write_at(&[7; 512], OVERLAY_MAX - 512).unwrap();
    let mut back = [0; 512];
    disk.read_at(&mut back, OVERLAY_MAX - 512).unwrap();
    assert_eq!(back, [7; 512]);
    let layer = disk.freeze().unwrap();
    let error = Overlay::new(1 << 20, vec![layer], dir.path()).unwrap_err();
    assert!(matches!(error, DiskError::LayerEnd { .. }), "{error}");
    let nowhere = Path::new("/nonexistent/skerry");
    let error = Overlay::new(1 << 20, Vec::new(), nowhere).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/skerry"), "{error}");
}

#[test]
fn ranges_past_the_end_are_refused() {
    let (_dir, disk) = overlay(1 << 20);
    for offset in [(1 << 20) - 511, 1 << 20, u64::MAX, u64::MAX - 511] {
        for result in [
            disk.read_at(&mut [0; 512], offset),
            disk.write_at(&[0; 512], offset),
            disk.discard(offset, 512),
            disk.write_zeroes(offset, 512, true),
        ] {
            assert!(
                matches!(result, Err(DiskError::OutOfRange { .. })),
                "{offset}"
            );
        }
    }
}

#[test]
fn discarded_space_is_freed_and_hides_what_is_below() {
    let (dir, disk) = overlay(64 << 30);
    let mib = vec![0x5a; 1 << 20];
    for at in 0..8 {
        disk.write_at(&mib, at << 20).unwrap();
    }
    let layer = disk.freeze().unwrap();
    assert_eq!(layer.len(), 8 << 20);
    for at in 4..12 {
        disk.write_at(&mib, at << 20).unwrap();
    }
    assert!(spent(&disk) >= 8 << 20);
    // As `fstrim` does, of far more than there is.
    disk.discard(2 << 20, (64 << 30) - (2 << 20)).unwrap();
    assert!(spent(&disk) < 64 << 10, "{}", spent(&disk));
    assert!(covers(&disk.written(), 0..8 << 20));
    assert!(covers(
        &disk.stack.read().present.ranges(),
        2 << 20..8 << 20
    ));
    let mut back = vec![1; 4 << 20];
    disk.read_at(&mut back, 0).unwrap();
    assert!(back[..2 << 20].iter().all(|byte| *byte == 0x5a));
    assert!(back[2 << 20..].iter().all(|byte| *byte == 0));
    // Zeros are passed on as well, without taking space.
    let zeros = disk.freeze().unwrap();
    assert_eq!(zeros.len(), 6 << 20);
    assert!(zeros.file().metadata().unwrap().blocks() * 512 < 64 << 10);
    let clone = Overlay::new(64 << 30, vec![layer, zeros], dir.path()).unwrap();
    let mut again = vec![1; 4 << 20];
    clone.read_at(&mut again, 0).unwrap();
    assert!(back == again);
    assert!(clone.written().is_empty());
}

#[test]
fn rewinding_frees_what_was_written() {
    let (_dir, disk) = overlay(1 << 30);
    disk.write_at(&[1; 4096], 0).unwrap();
    disk.freeze().unwrap();
    // In place, and with another file.
    for len in [IN_PLACE_MAX / 2, IN_PLACE_MAX + C] {
        disk.write_at(&vec![2; len as usize], 100).unwrap();
        disk.discard(0, 4096).unwrap();
        assert!(spent(&disk) >= len);
        disk.rewind().unwrap();
        assert_eq!(spent(&disk), 0);
        let mut back = [9; 8192];
        disk.read_at(&mut back, 0).unwrap();
        assert!(back[..4096] == [1; 4096] && back[4096..] == [0; 4096]);
    }
    assert!(covers(&disk.written(), 0..4096));
    disk.rebase();
    assert!(disk.written().is_empty());
    disk.rewind().unwrap();
    assert!(disk.freeze().unwrap().is_empty());
    assert_eq!(disk.layers().len(), 1);
}

#[test]
fn a_layer_that_is_cut_short_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 * C).unwrap();
    let run = LayerRun {
        at: 0,
        len: 8 * C,
        offset: 0,
    };
    let layer = Layer::new(file, [run]).unwrap();
    let disk = Overlay::new(8 * C, vec![layer.clone()], dir.path()).unwrap();
    layer.file().set_len(C).unwrap();
    let error = disk.read_at(&mut [0; 512], 2 * C).unwrap_err();
    assert!(matches!(error, DiskError::Shrunk { .. }), "{error}");
    // Nor is half a cluster made of it.
    let error = disk.write_at(&[1; 512], 2 * C).unwrap_err();
    assert!(matches!(error, DiskError::Shrunk { .. }), "{error}");
    assert!(disk.written().is_empty());
    disk.write_at(&[1; C as usize], 2 * C).unwrap();
    disk.read_at(&mut [0; C as usize], 2 * C).unwrap();
}

#[test]
fn a_chain_of_forks_stays_short() {
    let dir = tempfile::tempdir().unwrap();
    let size = 4096 * C;
    // Something that isn't in its file where it is on the disk, as in snapshots.
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xab; C as usize], C).unwrap();
    let run = LayerRun {
        at: 4000 * C,
        len: C,
        offset: C,
    };
    let base = Layer::new(file, [run]).unwrap();
    let mut disk = Overlay::new(size, vec![base], dir.path()).unwrap();
    let mut model = vec![0; size as usize];
    model[4000 * C as usize..][..C as usize].fill(0xab);
    for round in 0..400u64 {
        // One cluster of its own, and one that all write.
        for at in [round * 7 % 4096 * C, 5 * C] {
            let byte = round as u8 | 1;
            disk.write_at(&[byte; C as usize], at).unwrap();
            model[at as usize..][..C as usize].fill(byte);
        }
        disk.freeze().unwrap();
        assert!(disk.layers().len() <= FILES_MAX);
        if round % 3 == 0 {
            disk = Overlay::new(size, disk.layers(), dir.path()).unwrap();
        }
    }
    assert!(bytes(&disk) == model);
    assert!(disk.layers().len() > FILES_MAX / 2);
}

/// Sectors of the same clusters, written by all threads at once, over a layer; while another
/// thread freezes.
#[test]
fn no_write_undoes_another() {
    const THREADS: u64 = 4;
    const CLUSTERS: u64 = 64;
    let (_dir, disk) = overlay(CLUSTERS * C);
    for round in 1..=20u8 {
        let start = Barrier::new(THREADS as usize + 2);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (disk, start) = (&disk, &start);
                scope.spawn(move || {
                    start.wait();
                    for cluster in 0..CLUSTERS {
                        // Each has two sectors of eight; every fourth cluster is one's own.
                        let (at, len) = match cluster % 8 {
                            own if own == thread => (0, C),
                            own if own < THREADS => continue,
                            _ => (thread * 1024, 1024),
                        };
                        let byte = round ^ (thread as u8) << 6;
                        let buf = vec![byte; len as usize];
                        disk.write_at(&buf, cluster * C + at).unwrap();
                        let mut back = vec![0; len as usize];
                        disk.read_at(&mut back, cluster * C + at).unwrap();
                        assert!(back == buf, "{cluster}");
                    }
                });
            }
            scope.spawn(|| {
                start.wait();
                for _ in 0..4 {
                    disk.freeze().unwrap();
                }
            });
            start.wait();
        });
        let content = bytes(&disk);
        for (place, byte) in content.iter().enumerate() {
            let (cluster, within) = (place as u64 / C, place as u64 % C);
            let thread = match cluster % 8 {
                own if own < THREADS => own,
                _ => within / 1024,
            };
            assert_eq!(*byte, round ^ (thread as u8) << 6, "{place}");
        }
    }
}

/// Both have to bring the same cluster up at the same moment.
#[test]
fn two_parts_of_a_cluster() {
    const CLUSTERS: u64 = 1000;
    let (_dir, disk) = overlay(CLUSTERS * C);
    let turn = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for half in 0..2 {
            let (disk, turn) = (&disk, &turn);
            scope.spawn(move || {
                for cluster in 0..CLUSTERS {
                    turn.fetch_add(1, Ordering::SeqCst);
                    while turn.load(Ordering::SeqCst) < 2 * (cluster + 1) {
                        std::thread::yield_now();
                    }
                    let at = cluster * C + half * C / 2;
                    disk.write_at(&[half as u8 + 1; C as usize / 2], at)
                        .unwrap();
                }
            });
        }
    });
    for cluster in bytes(&disk).chunks(C as usize) {
        let (low, high) = cluster.split_at(C as usize / 2);
        assert!(low.iter().all(|byte| *byte == 1) && high.iter().all(|byte| *byte == 2));
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(Vec<usize>, u64, u8),
    Read(Vec<usize>, u64),
    Discard(u64, u64),
    Zero(u64, u64),
    Freeze,
    Rewind,
    Rebase,
    Clone,
    Flatten,
}

/// Not whole clusters, and more than one zone.
const SIZE: u64 = ZONE_SIZE + 20 * C + 1024;
/// Where the steps take place: around the beginning, the border of the zones and the end.
const WINDOW: u64 = 12 * C;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || {
        let base = prop_oneof![Just(0), Just(ZONE_SIZE - WINDOW / 2), Just(SIZE - WINDOW)];
        let within = prop_oneof![0..WINDOW, (0..12u64).prop_map(|n| n * C)];
        (base, within).prop_map(|(base, within)| base + within)
    };
    let lens = || {
        let one = prop_oneof![0..9000usize, Just(4096), Just(8192), Just(512)];
        proptest::collection::vec(one, 0..5)
    };
    let len = || prop_oneof![0..WINDOW, (0..12u64).prop_map(|n| n * C)];
    let step = prop_oneof![
        6 => (lens(), place(), any::<u8>()).prop_map(|(l, p, b)| Step::Write(l, p, b)),
        3 => (lens(), place()).prop_map(|(l, p)| Step::Read(l, p)),
        2 => (place(), len()).prop_map(|(p, l)| Step::Discard(p, l)),
        2 => (place(), len()).prop_map(|(p, l)| Step::Zero(p, l)),
        2 => Just(Step::Freeze),
        1 => Just(Step::Rewind),
        1 => Just(Step::Rebase),
        1 => Just(Step::Clone),
        1 => Just(Step::Flatten),
    ];
    proptest::collection::vec(step, 0..60)
}

/// The whole disk, what it was at the last freeze and at the base.
struct Model {
    now: Vec<u8>,
    frozen: Vec<u8>,
    base: Vec<u8>,
}

fn write(disk: &Overlay, model: &mut Model, lens: &[usize], at: u64, byte: u8) {
    let data: Vec<Vec<u8>> = (0..)
        .zip(lens)
        .map(|(n, len)| [byte.wrapping_add(n), byte].repeat(len / 2 + 1)[..*len].to_vec())
        .collect();
    let bufs: Vec<_> = data.iter().map(|data| IoBuf::from(&data[..])).collect();
    let all = data.concat();
    match model.now.get_mut(at as usize..at as usize + all.len()) {
        Some(range) => {
            disk.write_vectored_at(&bufs, at).unwrap();
            range.copy_from_slice(&all);
        }
        None => assert!(disk.write_vectored_at(&bufs, at).is_err()),
    }
}

fn read(disk: &Overlay, model: &Model, lens: &[usize], at: u64) {
    let mut data: Vec<Vec<u8>> = lens.iter().map(|len| vec![0xee; *len]).collect();
    let bufs: Vec<_> = data
        .iter_mut()
        .map(|data| IoBufMut::from(&mut data[..]))
        .collect();
    let result = disk.read_vectored_at(&bufs, at);
    drop(bufs);
    let all = data.concat();
    match model.now.get(at as usize..at as usize + all.len()) {
        Some(range) => assert!(result.is_ok() && range == all),
        None => assert!(result.is_err()),
    }
}

/// Everything that can be looked at in the windows, against the model.
fn check(disk: &Overlay, model: &Model) {
    for base in [0, ZONE_SIZE - WINDOW / 2, SIZE - WINDOW] {
        read(disk, model, &[WINDOW as usize], base);
    }
    // The base and what was written since are all.
    let mut rebuilt = model.base.clone();
    rebuilt.resize(SIZE.next_multiple_of(C) as usize, 0);
    let written = disk.written();
    assert!(written.windows(2).all(|pair| pair[0].end < pair[1].start));
    disk.read_ranges::<DiskError>(&written, |at, bytes| {
        rebuilt[at as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    })
    .unwrap();
    assert!(rebuilt[..SIZE as usize] == model.now);
    assert!(rebuilt[SIZE as usize..].iter().all(|byte| *byte == 0));
    // Nothing but zeros outside of what is used.
    let mut at = 0;
    for range in disk.used() {
        assert!(model.now[at..range.start as usize].iter().all(|b| *b == 0));
        at = (range.end as usize).min(model.now.len());
    }
    assert!(model.now[at..].iter().all(|byte| *byte == 0));
}

/// What a discard left: zeros or old data, in whole clusters at least zeros.
fn discard(disk: &Overlay, model: &mut Model, at: u64, len: u64) {
    let Some(range) = model.now.get_mut(at as usize..(at + len) as usize) else {
        assert!(disk.discard(at, len).is_err());
        return;
    };
    disk.discard(at, len).unwrap();
    let mut left = vec![0; len as usize];
    disk.read_at(&mut left, at).unwrap();
    for (n, (left, old)) in left.iter().zip(&*range).enumerate() {
        let cluster = (at + n as u64) / C * C;
        let whole = at <= cluster && (cluster + C).min(SIZE) <= at + len;
        assert!(*left == 0 || (*left == *old && !whole));
    }
    range.copy_from_slice(&left);
}

fn run(steps: &[Step]) {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = Overlay::new(SIZE, Vec::new(), dir.path()).unwrap();
    let zeros = vec![0; SIZE as usize];
    let mut model = Model {
        now: zeros.clone(),
        frozen: zeros.clone(),
        base: zeros,
    };
    // Every frozen state, by the layers up to it.
    let mut layers = Vec::new();
    for step in steps {
        match step {
            Step::Write(lens, at, byte) => write(&disk, &mut model, lens, *at, *byte),
            Step::Read(lens, at) => read(&disk, &model, lens, *at),
            Step::Discard(at, len) => discard(&disk, &mut model, *at, *len),
            Step::Zero(at, len) => match model.now.get_mut(*at as usize..(at + len) as usize) {
                Some(range) => {
                    disk.write_zeroes(*at, *len, len % 2 == 0).unwrap();
                    range.fill(0);
                }
                None => assert!(disk.write_zeroes(*at, *len, true).is_err()),
            },
            Step::Freeze => {
                let layer = disk.freeze().unwrap();
                if !layer.is_empty() {
                    layers.push(layer);
                }
                model.frozen.clone_from(&model.now);
            }
            Step::Rewind => {
                disk.rewind().unwrap();
                model.now.clone_from(&model.frozen);
            }
            Step::Rebase => {
                disk.rebase();
                model.base.clone_from(&model.frozen);
            }
            Step::Clone | Step::Flatten => {
                let from = match step {
                    Step::Clone => layers.clone(),
                    _ => disk.layers(),
                };
                disk = Overlay::new(SIZE, from, dir.path()).unwrap();
                model.now.clone_from(&model.frozen);
                model.base.clone_from(&model.frozen);
            }
        }
    }
    check(&disk, &model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn does_what_an_array_of_bytes_does(steps in steps()) {
        run(&steps);
    }
}

#[test]
fn the_union_of_ranges() {
    assert_eq!(union(&[], &[]), []);
    let (one, two) = ([0..2, 4..6], [1..3, 6..7, 9..10]);
    assert_eq!(union(&one, &two), [0..3, 4..7, 9..10]);
    assert_eq!(union(&two, &one), [0..3, 4..7, 9..10]);
    assert_eq!(union(&[0..1, 2..9], &[3..4, 5..10]), [0..1, 2..10]);
    assert_eq!(union(&[3..4, 5..6], &[]), [3..4, 5..6]);
}
