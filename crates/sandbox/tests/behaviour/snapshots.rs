//! Snapshots: going back, copies, other sandboxes, files.

use std::sync::Arc;

use crate::common::{builder, functions, guest, sandbox};
use skerry_sandbox::{
    BuildError, CallError, HostFunctions, RestoreError, Sandbox, Snapshot, SnapshotError, Status,
};

fn count(sandbox: &mut Sandbox) -> i64 {
    sandbox.call("count", ()).unwrap()
}

#[test]
fn a_restore_goes_back_to_what_was() {
    let mut sandbox = sandbox();
    assert_eq!(count(&mut sandbox), 1);
    let first = sandbox.snapshot().unwrap();
    assert_eq!(count(&mut sandbox), 2);
    assert_eq!(count(&mut sandbox), 3);
    sandbox.restore(&first).unwrap();
    assert_eq!(count(&mut sandbox), 2);
    let second = sandbox.snapshot().unwrap();
    assert_eq!(count(&mut sandbox), 3);
    // To the one before, forward again, and to itself.
    sandbox.restore(&first).unwrap();
    assert_eq!(count(&mut sandbox), 2);
    sandbox.restore(&second).unwrap();
    assert_eq!(count(&mut sandbox), 3);
    sandbox.restore(&second).unwrap();
    sandbox.restore(&second).unwrap();
    assert_eq!(count(&mut sandbox), 3);
    let third = sandbox.snapshot().unwrap();
    assert_eq!(count(&mut sandbox), 4);
    sandbox.restore(&first).unwrap();
    assert_eq!(count(&mut sandbox), 2);
    sandbox.restore(&third).unwrap();
    assert_eq!(count(&mut sandbox), 4);
}

#[test]
fn memory_is_what_it_was_byte_for_byte() {
    let mut sandbox = builder().heap(8 << 20).build().unwrap();
    let heap: u64 = sandbox.call("heap_address", ()).unwrap();
    assert_eq!(sandbox.call::<u64>("dirty_pages", (64_u64,)).unwrap(), 1);
    let snapshot = sandbox.snapshot().unwrap();
    let look = |sandbox: &mut Sandbox| -> Vec<u64> {
        (0..64)
            .map(|n| sandbox.call("peek", (heap + n * 4096,)).unwrap())
            .collect()
    };
    let before = look(&mut sandbox);
    for pages in [1_u64, 16, 64] {
        assert_eq!(sandbox.call::<u64>("dirty_pages", (pages,)).unwrap(), 2);
        assert_eq!(
            sandbox.call::<u64>("allocate", (4_u64 << 20,)).unwrap(),
            1024
        );
        sandbox.restore(&snapshot).unwrap();
        assert_eq!(look(&mut sandbox), before);
        sandbox.restore(&snapshot).unwrap();
    }
}

#[test]
fn what_the_host_gave_one_tenant_the_next_does_not_find() {
    let mut sandbox = sandbox();
    let snapshot = sandbox.snapshot().unwrap();
    let secret = b"a secret of the first tenant".repeat(500);
    assert_eq!(
        sandbox.call::<u64>("length", (&secret[..],)).unwrap(),
        secret.len() as u64
    );
    let back: Vec<u8> = sandbox.call("call_host_echo", (&secret[..],)).unwrap();
    assert_eq!(back, secret);
    sandbox.restore(&snapshot).unwrap();
    // The input area (0x4000_5000 on): what the call itself brings ends before.
    for at in (64..20_000_u64).step_by(8) {
        let found: u64 = sandbox.call("peek", (0x4000_5000 + at,)).unwrap();
        assert_eq!(found, 0, "at {at}");
    }
}

#[test]
fn registers_of_one_tenant_are_not_the_nexts() {
    let mut sandbox = sandbox();
    let clean: Vec<u64> = sandbox.call("find_traces", ()).unwrap();
    let snapshot = sandbox.snapshot().unwrap();
    sandbox
        .call::<()>("leave_traces", (0x5ec2_e700_5ec2_e700_u64,))
        .unwrap();
    sandbox.restore(&snapshot).unwrap();
    let found: Vec<u64> = sandbox.call("find_traces", ()).unwrap();
    assert_eq!(found, clean);
    assert!(!found.contains(&0x5ec2_e700_5ec2_e700));
}

#[test]
fn copies_are_apart() {
    let mut first = sandbox();
    assert_eq!(count(&mut first), 1);
    let snapshot = first.snapshot().unwrap();
    let functions = functions();
    let mut copies: Vec<Sandbox> = (0..50)
        .map(|_| Sandbox::from_snapshot_on(&snapshot, &functions, crate::backend()).unwrap())
        .collect();
    for (n, copy) in copies.iter_mut().enumerate() {
        for step in 0..n as i64 {
            assert_eq!(count(copy), 2 + step);
        }
        assert_eq!(
            copy.call::<i32>("call_host", (n as i32, 1)).unwrap(),
            n as i32 + 1
        );
    }
    assert_eq!(count(&mut first), 2);
    let seeds: Vec<u64> = copies
        .iter_mut()
        .map(|copy| copy.call("seed", ()).unwrap())
        .collect();
    let distinct: std::collections::HashSet<_> = seeds.iter().collect();
    assert_eq!(distinct.len(), seeds.len());
    // One whose snapshot, origin and functions are gone.
    drop((snapshot, first, functions));
    assert_eq!(count(&mut copies[0]), 2);
}

#[test]
fn a_snapshot_of_another_guest_or_layout_takes_its_place() {
    let mut small = sandbox();
    assert_eq!(count(&mut small), 1);
    let of_small = small.snapshot().unwrap();
    let mut large = builder().heap(16 << 20).stack(1 << 20).build().unwrap();
    for n in 1..=5 {
        assert_eq!(count(&mut large), n);
    }
    let of_large = large.snapshot().unwrap();
    small.restore(&of_large).unwrap();
    assert_eq!(count(&mut small), 6);
    assert_eq!(
        small.call::<u64>("allocate", (10_u64 << 20,)).unwrap(),
        2560
    );
    small.restore(&of_small).unwrap();
    assert_eq!(count(&mut small), 2);
    // A sandbox of the same layout that was never near the snapshot.
    let mut other = sandbox();
    assert_eq!(count(&mut other), 1);
    assert_eq!(count(&mut other), 2);
    assert_eq!(count(&mut other), 3);
    other.restore(&of_small).unwrap();
    assert_eq!(count(&mut other), 2);
}

#[test]
fn host_functions_must_be_there_and_nothing_changes_if_not() {
    let mut sandbox = sandbox();
    let snapshot = sandbox.snapshot().unwrap();
    let none = Arc::new(HostFunctions::new());
    let error = Sandbox::from_snapshot_on(&snapshot, &none, crate::backend()).unwrap_err();
    assert!(
        matches!(error, BuildError::MissingHostFunctions(_)),
        "{error}"
    );
    let mut more = (*functions()).clone();
    more.add("another", || 1_i32);
    assert!(Sandbox::from_snapshot_on(&snapshot, &Arc::new(more), crate::backend()).is_ok());
    let mut plain = Sandbox::builder()
        .guest(guest("sandbox-plainguest"))
        .backend(crate::backend())
        .build()
        .unwrap();
    assert_eq!(plain.call::<i32>("double", (21,)).unwrap(), 42);
    let error = plain.restore(&snapshot).unwrap_err();
    assert!(matches!(error, RestoreError::HostFunctions(_)), "{error}");
    assert_eq!(*plain.status(), Status::Ready);
    assert_eq!(plain.call::<i32>("double", (21,)).unwrap(), 42);
}

#[test]
fn a_snapshot_is_small_whatever_the_memory() {
    let mut sizes = Vec::new();
    for heap in [1_u64 << 20, 1 << 30, 8 << 30] {
        let mut sandbox = builder().heap(heap).build().unwrap();
        assert_eq!(count(&mut sandbox), 1);
        let snapshot = sandbox.snapshot().unwrap();
        assert!(snapshot.memory_size() > heap);
        sizes.push(snapshot.size());
    }
    assert!(sizes.iter().all(|size| *size < 600 << 10), "{sizes:?}");
}

#[test]
fn snapshots_go_to_disk_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut sandbox = sandbox();
    assert_eq!(count(&mut sandbox), 1);
    let kept = sandbox.snapshot().unwrap();
    let id = kept.save(folder.path()).unwrap().to_string();
    assert_eq!(count(&mut sandbox), 2);
    drop((sandbox, kept));
    let loaded = Snapshot::load(folder.path(), &id).unwrap();
    let mut sandbox = Sandbox::from_snapshot_on(&loaded, &functions(), crate::backend()).unwrap();
    assert_eq!(count(&mut sandbox), 2);
    assert_eq!(sandbox.call::<i32>("call_host", (40, 2)).unwrap(), 42);
    sandbox.restore(&loaded).unwrap();
    assert_eq!(count(&mut sandbox), 2);
    assert!(
        sandbox
            .description()
            .exports
            .iter()
            .any(|f| f.name == "add")
    );
    // What is none.
    let error = Snapshot::load(folder.path(), "nothing").unwrap_err();
    assert!(matches!(error, SnapshotError::Disk(_)), "{error}");
}

#[test]
fn a_damaged_file_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let id = sandbox()
        .snapshot()
        .unwrap()
        .save(folder.path())
        .unwrap()
        .to_string();
    let blobs = walk(folder.path());
    assert!(blobs.len() >= 4, "{blobs:?}");
    for path in blobs {
        let good = std::fs::read(&path).unwrap();
        if good.is_empty() {
            continue;
        }
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        let _ = Snapshot::load(folder.path(), &id).map(|_| panic!("{path:?} was changed"));
        std::fs::write(&path, &good).unwrap();
    }
    assert!(Snapshot::load(folder.path(), &id).is_ok());
}

/// The blobs of all snapshots below a folder.
fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(walk(&path)),
            false if path.components().any(|part| part.as_os_str() == "blobs") => found.push(path),
            false => {}
        }
    }
    found
}

#[test]
fn a_poisoned_sandbox_is_not_kept() {
    let mut sandbox = sandbox();
    let good = sandbox.snapshot().unwrap();
    assert!(sandbox.call::<()>("panics", ("x",)).is_err());
    assert!(matches!(
        sandbox.snapshot(),
        Err(SnapshotError::Poisoned(_))
    ));
    assert!(matches!(
        sandbox.call::<i32>("add", (1, 2)),
        Err(CallError::Poisoned(_))
    ));
    sandbox.restore(&good).unwrap();
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
}
