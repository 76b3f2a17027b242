//! Whatever happens to the files of a snapshot: an error that names it, or the exact same content.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::common::{CACHE, Random, content, copy_tree, diff_to, sample};
use skerry_snapshot::{
    Error, Merged, PAGE_SIZE, Snapshot, SnapshotId, SnapshotStore, Trust, merged_disks,
    merged_memory,
};

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => files(&entry.path(), found),
            false => found.push(entry.path()),
        }
    }
    found.sort();
}

/// A chain of two: a snapshot and a difference to it, with everything in both.
struct Victim {
    dir: tempfile::TempDir,
    store: SnapshotStore,
    full: SnapshotId,
    diff: SnapshotId,
    files: Vec<PathBuf>,
    content: Vec<Vec<u8>>,
}

/// All that a chain gives: each of its snapshots, and what they come to.
fn chain_content(chain: &[Snapshot]) -> Result<Vec<Vec<u8>>, Error> {
    let mut all: Vec<_> = chain.iter().flat_map(content).collect();
    let mut merged: Vec<_> = merged_disks(chain)?.into_values().collect();
    merged.push(merged_memory(chain)?);
    for Merged { size, layers } in merged {
        let mut bytes = vec![0; size.next_multiple_of(PAGE_SIZE) as usize];
        for layer in layers {
            for run in layer.runs().iter() {
                let to = &mut bytes[run.at as usize..][..run.len as usize];
                layer.file().read_exact_at(to, run.offset).unwrap();
            }
        }
        all.push(bytes);
    }
    Ok(all)
}

impl Victim {
    fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = SnapshotStore::open(dir.path()).unwrap();
        let full = sample(&store, CACHE, seed);
        let diff = sample(&store, diff_to(full), seed + 100);
        let mut names = Vec::new();
        for id in [full, diff] {
            files(&dir.path().join(id.hex()), &mut names);
        }
        assert_eq!(names.len(), 18, "documents, seals and blobs: {names:?}");
        let chain = store.open_chain(&diff, Trust::Seal).unwrap();
        assert!(!chain[1].memory.zeros.is_empty());
        Victim {
            content: chain_content(&chain).unwrap(),
            dir,
            store,
            full,
            diff,
            files: names,
        }
    }

    /// True when the chain was refused; false when it is what it was.
    fn check(&self, what: &str) -> bool {
        let chain = self.store.open_chain(&self.diff, Trust::Seal);
        match chain.and_then(|chain| chain_content(&chain)) {
            Ok(content) => {
                assert!(content == self.content, "silently different: {what}");
                false
            }
            Err(error) => {
                let text = error.to_string();
                assert!(
                    error.is_damage() || matches!(error, Error::Version { .. }),
                    "{what}: {error:?}"
                );
                let named = [self.full, self.diff].map(|id| text.contains(&id.hex()));
                assert!(named.contains(&true), "{what}: {text}");
                true
            }
        }
    }

    /// Whether a file is covered by no digest, and makes no difference when it is gone.
    fn is_seal(path: &Path) -> bool {
        path.ends_with("seal.json")
    }

    /// One bit after the other, each put back after it was looked at; how many were refused, and
    /// the names of files in which some made no difference.
    fn flip(&self, random: &mut Random, rounds: usize) -> (usize, BTreeSet<String>) {
        let (mut refused, mut harmless) = (0, BTreeSet::new());
        for round in 0..rounds {
            let path = &self.files[round % self.files.len()];
            let whole = std::fs::read(path).unwrap();
            let (at, bit) = (random.next(whole.len()), random.next(8));
            let file = File::options().write(true).open(path).unwrap();
            file.write_all_at(&[whole[at] ^ 1 << bit], at as u64)
                .unwrap();
            let what = format!("bit {bit} of byte {at} of {}", path.display());
            if self.check(&what) {
                refused += 1;
            } else {
                let name = path.file_name().unwrap().to_str().unwrap();
                harmless.insert(name.to_owned());
            }
            file.write_all_at(&[whole[at]], at as u64).unwrap();
        }
        assert!(!self.check("nothing"));
        (refused, harmless)
    }
}

/// Waiting for a clock's next tick is most of the time that a check takes; so many at once.
const THREADS: usize = 8;

fn flips(rounds: usize, seed: u64) {
    let each = rounds / THREADS;
    std::thread::scope(|scope| {
        for thread in 0..THREADS as u64 {
            scope.spawn(move || {
                let victim = Victim::new(3 + thread);
                let mut random = Random::new(seed + thread);
                let (refused, harmless) = victim.flip(&mut random, each);
                // Only the documents that no digest covers have bytes without meaning.
                let known = ["index.json", "seal.json"];
                assert!(
                    harmless.iter().all(|name| known.contains(&&**name)),
                    "{harmless:?}"
                );
                assert!(refused * 4 > each * 3, "{refused} of {each}");
            });
        }
    });
}

#[test]
fn flipped_bits() {
    flips(10_000, 0xf11b);
}

#[test]
#[ignore = "takes minutes"]
fn flipped_bits_at_length() {
    flips(200_000, 0x10_f11b);
}

#[test]
fn truncated_files() {
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                let victim = Victim::new(4);
                let mut random = Random::new(0x7c + thread as u64);
                for path in victim.files.iter().skip(thread).step_by(THREADS) {
                    truncate(&victim, path, &mut random);
                }
                assert!(!victim.check("nothing"));
            });
        }
    });
}

fn truncate(victim: &Victim, path: &Path, random: &mut Random) {
    let whole = std::fs::read(path).unwrap();
    let place = path.display();
    let check = |what: &str| {
        let refused = victim.check(&format!("{what} {place}"));
        assert_eq!(refused, !Victim::is_seal(path), "{what} {place}");
    };
    let len = whole.len();
    let pages = (0..=len / 4096).map(|page| page * 4096);
    let chosen: BTreeSet<_> = (0..60)
        .map(|_| random.next(len))
        .chain(pages)
        .chain([0, 1, len - 1])
        .filter(|cut| *cut < len)
        .collect();
    for cut in chosen {
        std::fs::write(path, &whole[..cut]).unwrap();
        check(&format!("{cut} bytes of"));
    }
    std::fs::write(path, [&whole[..], b"\0"].concat()).unwrap();
    check("one byte more of");
    std::fs::remove_file(path).unwrap();
    check("no");
    std::fs::write(path, &whole).unwrap();
}

/// Within a snapshot, between the two of a chain, and with one that isn't of the chain.
#[test]
fn blobs_that_change_places() {
    let victim = Victim::new(5);
    let other = sample(&victim.store, CACHE, 77);
    let mut all = victim.files.clone();
    files(&victim.dir.path().join(other.hex()), &mut all);
    all.retain(|path| !Victim::is_seal(path));
    let aside = victim.dir.path().join("aside");
    let mut different = 0;
    for one in &victim.files {
        for two in all
            .iter()
            .filter(|two| *two != one && !Victim::is_seal(one))
        {
            let same = std::fs::read(one).unwrap() == std::fs::read(two).unwrap();
            let swap = || {
                std::fs::rename(one, &aside).unwrap();
                std::fs::rename(two, one).unwrap();
                std::fs::rename(&aside, two).unwrap();
            };
            swap();
            let refused = victim.check(&format!("{} and {}", one.display(), two.display()));
            assert_eq!(refused, !same, "{} and {}", one.display(), two.display());
            different += usize::from(refused);
            swap();
        }
    }
    assert!(different > 300, "{different}");
    assert!(!victim.check("nothing"));
    assert!(victim.store.get(&other, Trust::Seal).is_ok());
}

/// A parent that isn't the one: another whole snapshot, the child itself, an older state of things.
#[test]
fn wrong_parents() {
    let victim = Victim::new(6);
    let store = &victim.store;
    let place = |id: &SnapshotId| store.root().join(id.hex());
    let aside = store.root().join("aside");
    // Like the parent in everything but its content; a difference; the child; one of another size.
    let twin = sample(store, CACHE, 7);
    let cousin = sample(store, diff_to(twin), 8);
    for other in [twin, cousin, victim.diff] {
        std::fs::rename(place(&victim.full), &aside).unwrap();
        copy_tree(&place(&other), &place(&victim.full));
        assert!(victim.check(&format!("{other} in place of the parent")));
        let error = store.open_chain(&victim.diff, Trust::Nothing).unwrap_err();
        let expected = victim.full;
        assert!(
            matches!(error, Error::WrongId { expected: e, found } if e == expected && found == other),
            "{error}"
        );
        // Nor is a further difference written to what isn't there.
        assert!(store.writer(diff_to(victim.diff)).is_err());
        // A link to it is no better than a copy.
        std::fs::remove_dir_all(place(&victim.full)).unwrap();
        std::os::unix::fs::symlink(place(&other), place(&victim.full)).unwrap();
        assert!(victim.check(&format!("a link to {other} in place of the parent")));
        std::fs::remove_file(place(&victim.full)).unwrap();
        assert!(matches!(
            store.open_chain(&victim.diff, Trust::Seal).unwrap_err(),
            Error::MissingParent { parent, .. } if parent == victim.full
        ));
        std::fs::rename(&aside, place(&victim.full)).unwrap();
        assert!(!victim.check("nothing"));
    }
    // The child in its own place is all there is of a circle: identities are digests.
    let pages = merged_memory(&store.open_chain(&victim.diff, Trust::Seal).unwrap()[1..]);
    assert!(matches!(pages.unwrap_err(), Error::BrokenChain { .. }));
}

#[test]
fn what_is_no_file() {
    let victim = Victim::new(3);
    let aside = victim.dir.path().join("aside");
    for path in victim.files.iter().filter(|path| !Victim::is_seal(path)) {
        std::fs::rename(path, &aside).unwrap();
        std::os::unix::fs::symlink(&aside, path).unwrap();
        assert!(victim.check(&format!("a link at {}", path.display())));
        std::fs::remove_file(path).unwrap();
        std::fs::create_dir(path).unwrap();
        assert!(victim.check(&format!("a directory at {}", path.display())));
        std::fs::remove_dir(path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::RUSR).unwrap();
        assert!(victim.check(&format!("a pipe at {}", path.display())));
        std::fs::remove_file(path).unwrap();
        std::fs::rename(&aside, path).unwrap();
    }
    assert!(!victim.check("nothing"));
}

#[test]
fn a_seal_is_for_this_very_snapshot() {
    let victim = Victim::new(3);
    let path = victim.dir.path().join(victim.full.hex());
    let opened = || Snapshot::open(&path, Trust::Seal).unwrap().was_sealed();
    let seal = path.join("seal.json");
    assert!(opened());
    // The same content with other white space still fits; anything else is made anew.
    let text = std::fs::read_to_string(&seal).unwrap();
    std::fs::write(&seal, text.replace(',', " ,\n")).unwrap();
    assert!(opened());
    for wrong in [
        "",
        "{}",
        "\0",
        &text.replace("\"version\":1", "\"version\":2"),
    ] {
        std::fs::write(&seal, wrong).unwrap();
        assert!(!opened(), "{wrong}");
        assert!(opened(), "sealed again");
    }
    // Anyone's seal is nobody's.
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&seal, std::fs::Permissions::from_mode(0o666)).unwrap();
    assert!(!opened());
    // A copy has other inodes.
    let copy = path.with_extension("copy");
    copy_tree(&path, &copy);
    assert!(!Snapshot::open(&copy, Trust::Seal).unwrap().was_sealed());
    assert!(Snapshot::open(&copy, Trust::Seal).unwrap().was_sealed());
}

/// A change that keeps the size and sets the modification time back, in the tick of the sealing.
#[test]
fn a_seal_sees_the_slightest_change() {
    for seed in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        let store = SnapshotStore::open(dir.path()).unwrap();
        let id = sample(&store, CACHE, seed);
        let snapshot = store.get(&id, Trust::Seal).unwrap();
        assert!(snapshot.was_sealed());
        let path = &snapshot.extras["log"].path;
        let modified = std::fs::metadata(path).unwrap().modified().unwrap();
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(b"changed", 0).unwrap();
        file.set_modified(modified).unwrap();
        let error = store.get(&id, Trust::Seal).unwrap_err();
        assert!(matches!(error, Error::Digest { .. }), "{error}");
    }
}
