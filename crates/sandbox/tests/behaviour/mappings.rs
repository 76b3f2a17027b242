//! Files and shared regions in the guest's address space.

use crate::common::{builder, functions, sandbox};
use skerry_sandbox::{
    Access, CallError, Fault, MapFileError, MapMode, Sandbox, SharedRegion, SnapshotError,
};

fn peek(sandbox: &mut Sandbox, address: u64) -> u64 {
    sandbox.call("peek", (address,)).unwrap()
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

/// A file whose words are their own numbers.
fn numbers(len: usize) -> Vec<u8> {
    (0..len as u64 / 8 + 1)
        .flat_map(u64::to_le_bytes)
        .take(len)
        .collect()
}

#[test]
fn a_file_is_read_where_it_was_mapped() {
    for len in [8_usize, 4096, 5000, 3 << 20, (2 << 20) + 8] {
        let file = file(&numbers(len));
        let mut sandbox = sandbox();
        let mapped = sandbox.map_file(file.path(), MapMode::ReadOnly).unwrap();
        assert_eq!(mapped.len, len as u64);
        for word in [0, len as u64 / 16, len as u64 / 8 - 1] {
            assert_eq!(peek(&mut sandbox, mapped.address + word * 8), word, "{len}");
        }
        // What follows it in its last page is zero, and then nothing.
        if len % 4096 != 0 && len % 8 == 0 {
            assert_eq!(peek(&mut sandbox, mapped.address + len as u64), 0);
        }
        let end = mapped.address + (len as u64).next_multiple_of(4096);
        let error = sandbox.call::<u64>("peek", (end,)).unwrap_err();
        assert!(matches!(
            error,
            CallError::Fault(Fault::AccessViolation { mapped: false, .. })
        ));
    }
}

#[test]
fn a_read_only_mapping_is_not_written_and_not_executed() {
    let file = file(&numbers(8192));
    let mut sandbox = sandbox();
    let snapshot = sandbox.snapshot().unwrap();
    for (name, access) in [("poke", Access::Write), ("jump", Access::Execute)] {
        let mapped = sandbox.map_file(file.path(), MapMode::ReadOnly).unwrap();
        let ended = match name {
            "poke" => sandbox.call::<()>(name, (mapped.address, 7_u64)),
            _ => sandbox.call::<()>(name, (mapped.address,)),
        };
        match ended {
            Err(CallError::Fault(Fault::AccessViolation {
                address,
                access: told,
                ..
            })) => {
                assert_eq!((address, told), (mapped.address, access));
            }
            other => panic!("{other:?}"),
        }
        sandbox.restore(&snapshot).unwrap();
    }
    assert_eq!(std::fs::read(file.path()).unwrap(), numbers(8192));
}

#[test]
fn a_copy_on_write_mapping_is_the_sandboxs_own() {
    let file = file(&numbers(10_000));
    let mut sandbox = sandbox();
    let clean = sandbox.snapshot().unwrap();
    let mapped = sandbox.map_file(file.path(), MapMode::CopyOnWrite).unwrap();
    for at in [mapped.address, mapped.address + 9984] {
        sandbox.call::<()>("poke", (at, 0xabcd_u64)).unwrap();
        assert_eq!(peek(&mut sandbox, at), 0xabcd);
    }
    assert_eq!(std::fs::read(file.path()).unwrap(), numbers(10_000));
    assert!(matches!(
        sandbox.snapshot(),
        Err(SnapshotError::PrivateMapping)
    ));
    // A restore takes it away, and its changes.
    sandbox.restore(&clean).unwrap();
    let again = sandbox.map_file(file.path(), MapMode::CopyOnWrite).unwrap();
    assert_eq!(again, mapped);
    assert_eq!(peek(&mut sandbox, mapped.address), 0);
    sandbox.unmap(again).unwrap();
    assert!(matches!(
        sandbox.unmap(again),
        Err(MapFileError::NotMapped(_))
    ));
    assert!(sandbox.snapshot().is_ok());
}

#[test]
fn an_unmapped_address_is_nothing() {
    let file = file(&numbers(4096));
    let mut sandbox = sandbox();
    let snapshot = sandbox.snapshot().unwrap();
    for restore in [false, true] {
        let mapped = sandbox.map_file(file.path(), MapMode::ReadOnly).unwrap();
        assert_eq!(peek(&mut sandbox, mapped.address + 8), 1);
        match restore {
            true => sandbox.restore(&snapshot).unwrap(),
            false => sandbox.unmap(mapped).unwrap(),
        }
        let error = sandbox
            .call::<u64>("peek", (mapped.address + 8,))
            .unwrap_err();
        assert!(
            matches!(
                error,
                CallError::Fault(Fault::AccessViolation { mapped: false, .. })
            ),
            "{error}"
        );
        sandbox.restore(&snapshot).unwrap();
    }
}

#[test]
fn mappings_belong_to_the_snapshot_that_was_taken_with_them() {
    let first = file(&numbers(5000));
    let second = file(&numbers(100_000));
    let mut sandbox = sandbox();
    let none = sandbox.snapshot().unwrap();
    let a = sandbox.map_file(first.path(), MapMode::ReadOnly).unwrap();
    let with_a = sandbox.snapshot().unwrap();
    let b = sandbox.map_file(second.path(), MapMode::ReadOnly).unwrap();
    assert_eq!(
        (
            peek(&mut sandbox, a.address + 80),
            peek(&mut sandbox, b.address + 88)
        ),
        (10, 11)
    );
    let with_both = sandbox.snapshot().unwrap();
    sandbox.restore(&none).unwrap();
    sandbox.restore(&with_both).unwrap();
    assert_eq!(
        (
            peek(&mut sandbox, a.address + 80),
            peek(&mut sandbox, b.address + 88)
        ),
        (10, 11)
    );
    sandbox.restore(&with_a).unwrap();
    assert_eq!(peek(&mut sandbox, a.address + 80), 10);
    assert!(sandbox.call::<u64>("peek", (b.address,)).is_err());
    let functions = functions();
    let mut copy = Sandbox::from_snapshot_on(&with_both, &functions, crate::backend()).unwrap();
    assert_eq!(
        (
            peek(&mut copy, a.address + 80),
            peek(&mut copy, b.address + 88)
        ),
        (10, 11)
    );
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(
        with_a.save(folder.path()),
        Err(SnapshotError::Mappings)
    ));
}

#[test]
fn a_shared_region_is_seen_by_all_and_written_by_those_who_may() {
    let region = SharedRegion::new(10_000).unwrap();
    assert_eq!(region.size(), 12_288);
    region.write(16, &7_u64.to_le_bytes()).unwrap();
    assert!(region.write(12_285, &[0; 8]).is_none());
    let (mut writer, mut reader) = (sandbox(), sandbox());
    let of_writer = writer.map_shared(&region, true).unwrap();
    let of_reader = reader.map_shared(&region, false).unwrap();
    assert_eq!(peek(&mut writer, of_writer.address + 16), 7);
    writer
        .call::<()>("poke", (of_writer.address + 24, 8_u64))
        .unwrap();
    assert_eq!(peek(&mut reader, of_reader.address + 24), 8);
    let mut bytes = [0; 8];
    region.read(24, &mut bytes).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 8);
    assert!(
        reader
            .call::<()>("poke", (of_reader.address, 1_u64))
            .is_err()
    );
    assert_eq!(region.read(24, &mut bytes), Some(()));
}

#[test]
fn what_can_not_be_mapped_says_why() {
    let mut sandbox = builder().build().unwrap();
    let nowhere = sandbox
        .map_file("/nonexistent/file", MapMode::ReadOnly)
        .unwrap_err();
    assert!(nowhere.to_string().contains("/nonexistent/file"));
    let empty = file(b"");
    let error = sandbox
        .map_file(empty.path(), MapMode::ReadOnly)
        .unwrap_err();
    assert!(matches!(error, MapFileError::Empty(_)));
    let folder = sandbox.map_file("/", MapMode::ReadOnly).unwrap_err();
    assert!(matches!(folder, MapFileError::File { .. }));
    let huge = tempfile::NamedTempFile::new().unwrap();
    huge.as_file().set_len(1 << 40).unwrap();
    let error = sandbox
        .map_file(huge.path(), MapMode::ReadOnly)
        .unwrap_err();
    assert!(matches!(error, MapFileError::NoRoom(_)), "{error}");
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
}
