//! Whatever happens to the files of a snapshot: an error that names it, or the exact same content.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::common::{CACHE, Random, content, copy_tree, sample};
use skerry_snapshot::{Error, Snapshot, SnapshotStore, Trust};

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

struct Victim {
    _dir: tempfile::TempDir,
    path: PathBuf,
    files: Vec<PathBuf>,
    content: Vec<Vec<u8>>,
}

impl Victim {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = SnapshotStore::open(dir.path()).unwrap();
        let id = sample(&store, CACHE, 3);
        let path = dir.path().join(id.hex());
        let mut names = Vec::new();
        files(&path, &mut names);
        assert_eq!(names.len(), 9, "documents, seal and six blobs: {names:?}");
        let snapshot = store.get(&id, Trust::Seal).unwrap();
        Victim {
            content: content(&snapshot),
            _dir: dir,
            path,
            files: names,
        }
    }

    /// True when the snapshot was refused; false when it is what it was.
    fn check(&self, what: &str) -> bool {
        match Snapshot::open(&self.path, Trust::Seal) {
            Ok(snapshot) => {
                assert!(
                    content(&snapshot) == self.content,
                    "silently different: {what}"
                );
                false
            }
            Err(error) => {
                let text = error.to_string();
                assert!(
                    error.is_damage() || matches!(error, Error::Version { .. }),
                    "{what}: {error:?}"
                );
                assert!(
                    text.contains(&self.path.display().to_string()),
                    "{what}: {text}"
                );
                true
            }
        }
    }

    fn restore(&self, path: &Path, bytes: &[u8]) {
        std::fs::write(path, bytes).unwrap();
    }
}

#[test]
fn flipped_bits() {
    let victim = Victim::new();
    let mut random = Random(0xf11b);
    let (mut refused, mut harmless) = (0, BTreeMap::new());
    for round in 0..4000 {
        let path = &victim.files[round % victim.files.len()];
        let whole = std::fs::read(path).unwrap();
        let (at, bit) = (random.next(whole.len()), random.next(8));
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(&[whole[at] ^ 1 << bit], at as u64)
            .unwrap();
        let what = format!("bit {bit} of byte {at} of {}", path.display());
        match victim.check(&what) {
            true => refused += 1,
            false => *harmless.entry(path.file_name().unwrap()).or_insert(0) += 1,
        }
        file.write_all_at(&[whole[at]], at as u64).unwrap();
    }
    // Only the documents that no digest covers have bytes without meaning.
    let harmless: Vec<_> = harmless
        .into_keys()
        .map(|name| name.to_str().unwrap())
        .collect();
    assert_eq!(harmless, ["index.json", "seal.json"]);
    assert!(refused > 3000, "{refused}");
    assert!(!victim.check("nothing"));
}

#[test]
fn truncated_files() {
    let victim = Victim::new();
    let mut random = Random(0x7c);
    for path in &victim.files {
        let whole = std::fs::read(path).unwrap();
        for _ in 0..40 {
            let len = random.next(whole.len());
            victim.restore(path, &whole[..len]);
            let refused = victim.check(&format!("{len} bytes of {}", path.display()));
            assert_eq!(refused, !path.ends_with("seal.json"));
        }
        victim.restore(path, &[&whole[..], b"\0"].concat());
        let refused = victim.check(&format!("one byte more of {}", path.display()));
        assert_eq!(refused, !path.ends_with("seal.json"));
        std::fs::remove_file(path).unwrap();
        let refused = victim.check(&format!("no {}", path.display()));
        assert_eq!(refused, !path.ends_with("seal.json"));
        victim.restore(path, &whole);
    }
    assert!(!victim.check("nothing"));
}

#[test]
fn blobs_that_change_places() {
    let victim = Victim::new();
    let aside = victim.path.join("aside");
    for one in &victim.files {
        for two in &victim.files {
            if one == two || one.ends_with("seal.json") || two.ends_with("seal.json") {
                continue;
            }
            let swap = || {
                std::fs::rename(one, &aside).unwrap();
                std::fs::rename(two, one).unwrap();
                std::fs::rename(&aside, two).unwrap();
            };
            swap();
            assert!(victim.check(&format!("{} and {}", one.display(), two.display())));
            swap();
        }
    }
    assert!(!victim.check("nothing"));
}

#[test]
fn what_is_no_file() {
    let victim = Victim::new();
    let aside = victim.path.join("aside");
    for path in &victim.files {
        if path.ends_with("seal.json") {
            continue;
        }
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
    let victim = Victim::new();
    let opened = || {
        Snapshot::open(&victim.path, Trust::Seal)
            .unwrap()
            .was_sealed()
    };
    let seal = victim.path.join("seal.json");
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
    let copy = victim.path.with_extension("copy");
    copy_tree(&victim.path, &copy);
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
