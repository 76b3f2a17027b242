//! Names, prefixes, removal, export and import.

use crate::common::{CACHE, content, diff_to, sample};
use skerry_snapshot::{Error, Form, SnapshotStore, Trust};

fn store() -> (tempfile::TempDir, SnapshotStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(dir.path().join("snapshots")).unwrap();
    (dir, store)
}

#[test]
fn names_and_prefixes() {
    let (_dir, store) = store();
    let ids: Vec<_> = (0..20).map(|seed| sample(&store, CACHE, seed)).collect();
    store.tag(&ids[0], "warm/python:3").unwrap();
    store.tag(&ids[0], "latest").unwrap();
    store.tag(&ids[1], "latest").unwrap();
    assert_eq!(store.resolve("warm/python:3").unwrap(), ids[0]);
    assert_eq!(store.resolve("latest").unwrap(), ids[1]);
    assert_eq!(store.info(&ids[0]).unwrap().names, ["warm/python:3"]);
    for id in &ids {
        assert_eq!(store.resolve(&id.hex()).unwrap(), *id);
        assert_eq!(store.resolve(&id.to_string()).unwrap(), *id);
        assert_eq!(store.resolve(&id.hex()[..12]).unwrap(), *id);
    }
    // Twenty identifiers of sixteen first digits.
    let shared = ids
        .iter()
        .find_map(|id| match store.resolve(&id.hex()[..1]) {
            Err(Error::Ambiguous { candidates, .. }) => Some(candidates),
            _ => None,
        });
    assert!(shared.unwrap().len() > 1);
    for name in ["", "sha256:", "nothing", "../x"] {
        let error = store.resolve(name).unwrap_err();
        assert!(
            matches!(error, Error::NoSuchSnapshot { .. }),
            "{name}: {error}"
        );
    }
    for name in ["", "/x", "a b", "a\n", &"a".repeat(256)] {
        let error = store.tag(&ids[0], name).unwrap_err();
        assert!(matches!(error, Error::Name { .. }), "{name}: {error}");
    }
    assert!(store.untag("latest").unwrap());
    assert!(!store.untag("latest").unwrap());
    store.remove(&ids[0]).unwrap();
    assert!(store.resolve("warm/python:3").is_err());
    assert!(store.remove(&ids[0]).is_err());
    let listing = store.list().unwrap();
    assert_eq!((listing.snapshots.len(), listing.damaged.len()), (19, 0));
}

#[test]
fn there_and_back() {
    let (dir, store) = store();
    let parent = sample(&store, CACHE, 1);
    let mut writer = store.writer(diff_to(parent)).unwrap();
    let size = store.info(&parent).unwrap().memory_size;
    writer
        .memory::<Error>(size, |out| out.write(3, &crate::common::page(3)))
        .unwrap();
    writer.state(b"{}").unwrap();
    let child = writer.commit(&()).unwrap();
    for form in [Form::Directory, Form::Archive] {
        let other = SnapshotStore::open(dir.path().join(format!("{form:?}-store"))).unwrap();
        let path =
            |id: &skerry_snapshot::SnapshotId| dir.path().join(format!("{form:?}-{}", id.hex()));
        for id in [parent, child] {
            store.export(&id, &path(&id), form).unwrap();
            let again = store.export(&id, &path(&id), form).unwrap_err();
            assert!(matches!(again, Error::Exists { .. }), "{again}");
        }
        let error = other.import(&path(&child)).unwrap_err();
        assert!(
            matches!(error, Error::MissingParent { parent: p, .. } if p == parent),
            "{error}"
        );
        assert_eq!(other.import(&path(&parent)).unwrap(), parent);
        assert_eq!(
            other.import(&path(&parent)).unwrap(),
            parent,
            "a second time"
        );
        assert_eq!(other.import(&path(&child)).unwrap(), child);
        let (here, there) = (
            store.get(&parent, Trust::Seal).unwrap(),
            other.get(&parent, Trust::Seal).unwrap(),
        );
        assert!(there.was_sealed());
        assert_eq!(content(&here), content(&there));
        assert_eq!(other.open_chain(&child, Trust::Nothing).unwrap().len(), 2);
        assert_eq!(other.sweep().unwrap(), 0);
    }
}

#[test]
fn torn_imports_are_refused() {
    let (dir, store) = store();
    let id = sample(&store, CACHE, 1);
    let path = dir.path().join("s.tar");
    store.export(&id, &path, Form::Archive).unwrap();
    let other = SnapshotStore::open(dir.path().join("other")).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let mut random = crate::common::Random(9);
    for round in 0..300 {
        let mut bytes = whole.clone();
        match round % 3 {
            0 => bytes.truncate(random.next(whole.len())),
            _ => {
                let at = random.next(whole.len());
                bytes[at] ^= 1 << random.next(8);
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        match other.import(&path) {
            // A bit of padding, of a header's owner, of the end of the archive.
            Ok(found) => {
                assert_eq!(found, id);
                let snapshot = other.get(&id, Trust::Nothing).unwrap();
                assert_eq!(
                    content(&snapshot),
                    content(&store.get(&id, Trust::Seal).unwrap())
                );
                other.remove(&id).unwrap();
            }
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("s.tar"), "{text}");
            }
        }
    }
    assert!(other.list().unwrap().snapshots.is_empty());
    assert_eq!(other.sweep().unwrap(), 0);
}

#[test]
fn archives_with_tricks() {
    let (dir, store) = store();
    let path = dir.path().join("s.tar");
    let member = |kind: tar::EntryType, name: &str, link: &str| {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(0);
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        header.set_cksum();
        tar.append(&header, &b""[..]).unwrap();
        std::fs::write(&path, tar.into_inner().unwrap()).unwrap();
        store.import(&path).unwrap_err()
    };
    let link = member(tar::EntryType::Symlink, "index.json", "/etc/passwd");
    assert!(matches!(link, Error::Archive { .. }), "{link}");
    // A name that leads elsewhere is none of ours.
    let escape = member(tar::EntryType::Regular, "blobs/sha256/../../../x", "");
    assert!(matches!(escape, Error::Missing { .. }), "{escape}");
    assert!(!dir.path().join("x").exists() && !store.root().join("x").exists());
}
