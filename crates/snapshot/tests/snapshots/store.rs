//! Names, prefixes, removal, export and import.

use crate::common::{CACHE, content, diff_to, sample};
use skerry_snapshot::{
    Error, Form, PAGE_SIZE, Snapshot, SnapshotId, SnapshotStore, Trust, WorkingSet,
};

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

/// Four in a row, of which two have a blob in common.
fn family(store: &SnapshotStore) -> Vec<SnapshotId> {
    let mut ids = vec![sample(store, CACHE, 1)];
    for seed in 2..5 {
        ids.push(sample(store, diff_to(ids[ids.len() - 1]), seed));
    }
    ids
}

#[test]
fn a_whole_family_there_and_back() {
    let (dir, store) = store();
    let ids = family(&store);
    let youngest = ids[3];
    let expected = store.open_chain(&youngest, Trust::Seal).unwrap();
    for form in [Form::Directory, Form::Archive] {
        let path = dir.path().join(format!("{form:?}"));
        // An empty directory is in the way too.
        std::fs::create_dir(&path).unwrap();
        let error = store.export_chain(&youngest, &path, form).unwrap_err();
        assert!(matches!(error, Error::Exists { .. }), "{error}");
        std::fs::remove_dir(&path).unwrap();
        store.export_chain(&youngest, &path, form).unwrap();
        let other = SnapshotStore::open(dir.path().join(format!("{form:?}-store"))).unwrap();
        // Nothing is there, then a part, then all.
        for keep in [0, 2, 4] {
            for id in ids.iter().skip(keep).rev() {
                let _ = other.remove(id);
            }
            assert_eq!(other.import(&path).unwrap(), youngest);
            let found = other.open_chain(&youngest, Trust::Seal).unwrap();
            assert!(found.iter().all(|snapshot| snapshot.was_sealed()));
            let contents = |chain: &[Snapshot]| chain.iter().map(content).collect::<Vec<_>>();
            assert_eq!(contents(&found), contents(&expected));
            assert_eq!(other.list().unwrap().snapshots.len(), 4);
            assert_eq!(other.sweep().unwrap(), 0);
        }
        // One that has no parents is a family as well.
        let alone = dir.path().join(format!("{form:?}-alone"));
        store.export_chain(&ids[0], &alone, form).unwrap();
        assert_eq!(other.import(&alone).unwrap(), ids[0]);
    }
}

/// Whatever is wrong with one member, none of the family is let in.
#[test]
fn damaged_families_are_refused_as_a_whole() {
    let (dir, store) = store();
    let ids = family(&store);
    let path = dir.path().join("family");
    store.export_chain(&ids[3], &path, Form::Directory).unwrap();
    let other = SnapshotStore::open(dir.path().join("other")).unwrap();
    let refused = |what: &str| {
        let error = other.import(&path).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("family"), "{what}: {text}");
        let listing = other.list().unwrap();
        assert!(listing.snapshots.is_empty(), "{what}");
        assert_eq!(other.sweep().unwrap(), 0);
        error
    };
    // Each blob in turn.
    for entry in std::fs::read_dir(path.join("blobs/sha256")).unwrap() {
        let blob = entry.unwrap().path();
        let whole = std::fs::read(&blob).unwrap();
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 1;
        std::fs::write(&blob, damaged).unwrap();
        refused("changed");
        std::fs::remove_file(&blob).unwrap();
        refused("missing");
        std::fs::write(&blob, whole).unwrap();
    }
    // The index: in another order, with one left out, twice, too many.
    let index = path.join("index.json");
    let good = std::fs::read_to_string(&index).unwrap();
    let document: serde_json::Value = serde_json::from_str(&good).unwrap();
    let with = |order: &[usize]| {
        let all = document["manifests"].as_array().unwrap();
        let mut document = document.clone();
        document["manifests"] = order.iter().map(|n| all[*n].clone()).collect();
        std::fs::write(&index, document.to_string()).unwrap();
    };
    let orders = [
        &[][..],
        &[3, 2, 1, 0],
        &[0, 2, 3],
        &[0, 1, 3],
        &[0, 0],
        &[0; 99],
    ];
    for order in orders {
        with(order);
        let error = refused(&format!("{order:?}"));
        assert!(matches!(error, Error::NotASnapshot { .. }), "{error}");
    }
    with(&[0, 1, 2]);
    let error = refused("without the last parent");
    assert!(
        matches!(error, Error::MissingParent { parent, .. } if parent == ids[0]),
        "{error}"
    );
    std::fs::write(&index, good).unwrap();
    assert_eq!(other.import(&path).unwrap(), ids[3]);
}

#[test]
fn a_name_is_not_taken_over_unasked() {
    let (_dir, store) = store();
    let (one, two) = (sample(&store, CACHE, 1), sample(&store, CACHE, 2));
    store.tag_new(&one, "name").unwrap();
    store.tag_new(&one, "name").unwrap();
    let error = store.tag_new(&two, "name").unwrap_err();
    assert!(
        matches!(&error, Error::NameTaken { name, id } if name == "name" && *id == one),
        "{error}"
    );
    assert_eq!(store.resolve("name").unwrap(), one);
    store.remove(&one).unwrap();
    store.tag_new(&two, "name").unwrap();
    assert!(store.tag_new(&one, "other").is_err());
}

#[test]
fn a_working_set_comes_with_a_snapshot_or_is_noted_beside_it() {
    let (_dir, store) = store();
    let set = |page: u64| WorkingSet::new([page..page + 2, 20..21]).unwrap();
    let mut writer = store.writer(CACHE).unwrap();
    writer.memory::<Error>(32 * PAGE_SIZE, |_| Ok(())).unwrap();
    writer.state(b"").unwrap();
    writer
        .extra(WorkingSet::NAME, &set(3).encode()[..])
        .unwrap();
    let with = writer.commit(&()).unwrap();
    let open = |id| store.get(id, Trust::Seal).unwrap();
    assert_eq!(open(&with).working_set(), Some(set(3)));
    let without = sample(&store, CACHE, 1);
    assert_eq!(open(&without).working_set(), None);
    for page in [5, 9] {
        open(&without).note_working_set(&set(page)).unwrap();
        let snapshot = open(&without);
        assert!(snapshot.was_sealed() && snapshot.id() == without);
        assert_eq!(snapshot.working_set(), Some(set(page)));
    }
    // What can't be is as good as none: pages that the machine lacks, damage, no file.
    open(&without).note_working_set(&set(31)).unwrap();
    assert_eq!(open(&without).working_set(), None);
    let note = store.root().join(without.hex()).join(WorkingSet::NAME);
    std::fs::write(&note, b"SKRYWSET").unwrap();
    assert_eq!(open(&without).working_set(), None);
    std::fs::remove_file(&note).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &note).unwrap();
    assert_eq!(open(&without).working_set(), None);
    open(&without).note_working_set(&set(5)).unwrap();
    assert_eq!(open(&without).working_set(), Some(set(5)));
    store.remove(&without).unwrap();
}

#[test]
fn torn_imports_are_refused() {
    let (dir, store) = store();
    let parent = sample(&store, CACHE, 1);
    let id = sample(&store, diff_to(parent), 2);
    let path = dir.path().join("s.tar");
    store.export_chain(&id, &path, Form::Archive).unwrap();
    let other = SnapshotStore::open(dir.path().join("other")).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let mut random = crate::common::Random::new(9);
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
                other.remove(&parent).unwrap();
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
