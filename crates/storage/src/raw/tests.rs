use super::*;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use proptest::prelude::*;

fn disk_of(len: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.img");
    File::create(&path).unwrap().set_len(len).unwrap();
    (dir, path)
}

#[test]
fn open_names_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("nope.img");
    let error = RawDisk::open(&missing, Access::ReadOnly).unwrap_err();
    assert!(matches!(error, DiskError::Open { .. }), "{error}");
    assert!(error.to_string().contains("nope.img"), "{error}");

    let error = RawDisk::open(dir.path(), Access::ReadOnly).unwrap_err();
    assert!(error.to_string().contains("a directory"), "{error}");
    let error = RawDisk::open("/dev/null", Access::ReadWrite).unwrap_err();
    assert!(error.to_string().contains("a character device"), "{error}");

    let odd = dir.path().join("odd.img");
    std::fs::write(&odd, [0; 513]).unwrap();
    let error = RawDisk::open(&odd, Access::ReadWrite).unwrap_err();
    assert!(error.to_string().ends_with("truncate -s 1024`"), "{error}");
    std::fs::write(&odd, []).unwrap();
    let error = RawDisk::open(&odd, Access::ReadWrite).unwrap_err();
    assert!(matches!(error, DiskError::Empty { .. }), "{error}");
}

#[test]
fn a_pipe_is_refused_without_waiting_for_its_other_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let error = RawDisk::open(&path, Access::ReadOnly).unwrap_err();
    assert!(error.to_string().contains("a pipe"), "{error}");
}

#[test]
fn one_writer_or_many_readers() {
    let (_dir, path) = disk_of(4096);
    let locked = |access| matches!(RawDisk::open(&path, access), Err(DiskError::Locked { .. }));
    {
        let _writer = RawDisk::open(&path, Access::ReadWrite).unwrap();
        assert!(locked(Access::ReadWrite) && locked(Access::ReadOnly));
    }
    let _one = RawDisk::open(&path, Access::ReadOnly).unwrap();
    let _two = RawDisk::open(&path, Access::ReadOnly).unwrap();
    assert!(locked(Access::ReadWrite));
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let (_dir, path) = disk_of(4096);
    let disk = RawDisk::open(&path, Access::ReadOnly).unwrap();
    assert!(disk.is_read_only() && !disk.abilities().discard);
    for result in [
        disk.write_at(&[1; 512], 0),
        disk.discard(0, 512),
        disk.write_zeroes(0, 512, true),
    ] {
        assert!(matches!(result, Err(DiskError::ReadOnly { .. })));
    }
    disk.flush().unwrap();
}

#[test]
fn ranges_past_the_end_are_refused() {
    let (_dir, path) = disk_of(4096);
    let disk = RawDisk::open(&path, Access::ReadWrite).unwrap();
    let mut buf = [0; 512];
    for offset in [3585, 4096, u64::MAX, u64::MAX - 511, i64::MAX as u64] {
        assert!(matches!(
            disk.read_at(&mut buf, offset),
            Err(DiskError::OutOfRange { .. })
        ));
        assert!(matches!(
            disk.write_at(&buf, offset),
            Err(DiskError::OutOfRange { .. })
        ));
        assert!(matches!(
            disk.discard(offset, 512),
            Err(DiskError::OutOfRange { .. })
        ));
        assert!(matches!(
            disk.write_zeroes(offset, 512, false),
            Err(DiskError::OutOfRange { .. })
        ));
    }
    disk.read_at(&mut buf, 3584).unwrap();
    disk.read_at(&mut [], 4096).unwrap();
}

#[test]
fn a_file_cut_short_is_an_error_and_not_zeros() {
    let (_dir, path) = disk_of(8192);
    let disk = RawDisk::open(&path, Access::ReadWrite).unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4096 + 100)
        .unwrap();
    let error = disk.read_at(&mut [0; 8192], 0).unwrap_err();
    assert!(
        matches!(error, DiskError::Shrunk { offset: 4196, .. }),
        "{error}"
    );
}

#[test]
fn discard_gives_the_space_back() {
    let (_dir, path) = disk_of(1 << 20);
    let disk = RawDisk::open(&path, Access::ReadWrite).unwrap();
    disk.write_at(&vec![0xaa; 1 << 20], 0).unwrap();
    disk.flush().unwrap();
    if !disk.abilities().discard {
        assert!(matches!(
            disk.discard(0, 4096),
            Err(DiskError::Unsupported { .. })
        ));
        println!(
            "skipped: the file system of {} has no holes",
            path.display()
        );
        return;
    }
    let before = std::fs::metadata(&path).unwrap().blocks();
    disk.discard(0, 1 << 19).unwrap();
    assert!(std::fs::metadata(&path).unwrap().blocks() <= before - (1 << 19) / 512);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    let mut back = vec![1; 1 << 20];
    disk.read_at(&mut back, 0).unwrap();
    assert!(back[..1 << 19].iter().all(|b| *b == 0) && back[1 << 19..].iter().all(|b| *b == 0xaa));
}

#[test]
fn more_buffers_than_one_call_takes() {
    let (_dir, path) = disk_of(512 * 1024);
    let disk = RawDisk::open(&path, Access::ReadWrite).unwrap();
    let source: Vec<u8> = (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let bufs: Vec<IoBuf<'_>> = source.chunks(1001).map(IoBuf::from).collect();
    assert!(bufs.len() > 4 * sys::MAX_IOVECS);
    disk.write_vectored_at(&bufs, 77).unwrap();
    let mut target = vec![0; source.len()];
    let bufs: Vec<IoBufMut<'_>> = target.chunks_mut(501).map(IoBufMut::from).collect();
    disk.read_vectored_at(&bufs, 77).unwrap();
    assert!(source == target);
}

#[derive(Debug, Clone)]
enum Step {
    Write(Vec<Vec<u8>>, u64),
    Zero(u64, u64, bool),
    Read(Vec<usize>, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let chunk = || proptest::collection::vec(any::<u8>(), 0..900);
    let step = prop_oneof![
        (proptest::collection::vec(chunk(), 0..6), 0u64..20_000)
            .prop_map(|(c, o)| Step::Write(c, o)),
        (0u64..20_000, 0u64..9000, any::<bool>()).prop_map(|(o, l, u)| Step::Zero(o, l, u)),
        (proptest::collection::vec(0usize..900, 0..6), 0u64..20_000)
            .prop_map(|(l, o)| Step::Read(l, o)),
    ];
    proptest::collection::vec(step, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A disk behaves as an array of bytes does.
    #[test]
    fn like_an_array(steps in steps()) {
        let (_dir, path) = disk_of(16384);
        let disk = RawDisk::open(&path, Access::ReadWrite).unwrap();
        let mut model = vec![0u8; 16384];
        for step in steps {
            match step {
                Step::Write(chunks, offset) => {
                    let bytes = chunks.concat();
                    let bufs: Vec<_> = chunks.iter().map(|c| IoBuf::from(&c[..])).collect();
                    let fits = offset as usize + bytes.len() <= model.len();
                    prop_assert_eq!(disk.write_vectored_at(&bufs, offset).is_ok(), fits);
                    if fits {
                        model[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
                    }
                }
                Step::Zero(offset, len, unmap) => {
                    let fits = offset + len <= model.len() as u64;
                    prop_assert_eq!(disk.write_zeroes(offset, len, unmap).is_ok(), fits);
                    if fits {
                        model[offset as usize..][..len as usize].fill(0);
                    }
                }
                Step::Read(lens, offset) => {
                    let mut chunks: Vec<Vec<u8>> = lens.iter().map(|l| vec![0xee; *l]).collect();
                    let sum: usize = lens.iter().sum();
                    let fits = offset as usize + sum <= model.len();
                    let bufs: Vec<_> = chunks.iter_mut().map(|c| IoBufMut::from(&mut c[..])).collect();
                    prop_assert_eq!(disk.read_vectored_at(&bufs, offset).is_ok(), fits);
                    drop(bufs);
                    if fits {
                        prop_assert_eq!(&chunks.concat()[..], &model[offset as usize..][..sum]);
                    }
                }
            }
        }
        prop_assert_eq!(std::fs::metadata(&path).unwrap().size(), 16384);
    }
}
