//! Scratch disks: an empty ext4 for what one virtual machine writes, gone when it ends; or kept in its
//! folder, with a journal then, so that it is whole after whatever end the machine had. And volumes,
//! which begin with an empty ext4 as well, and stay.
//!
//! The host may have no `mkfs`, and making a file system takes longer than starting a guest, so an
//! empty one ships inside this crate: the few blocks of it that aren't zero (`template/`).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

use crate::{Access, CLUSTER_SIZE, DiskError, Layer, LayerRun, Overlay, RawDisk, sys};

/// What `template/make` wrote; the format is described in `examples/pack-template.rs`.
const TEMPLATE: &[u8] = include_bytes!("../template/ext4.z");
/// The same with a journal.
const JOURNAL_TEMPLATE: &[u8] = include_bytes!("../template/ext4-journal.z");
/// A small one that is grown to its volume's size.
const VOLUME_TEMPLATE: &[u8] = include_bytes!("../template/volume.z");
const MAGIC: &[u8; 8] = b"skscr01\n";

/// The size of every scratch disk. It is what the guest may address, not what the host spends: the
/// file is sparse.
pub const SIZE: u64 = 64 << 30;

/// The least size of a volume: that of the file system that it begins with.
pub const MIN_VOLUME: u64 = 256 << 20;

/// Makes an empty file the disk of a volume, of `size` bytes: a sparse ext4, with a journal, which its
/// first guest grows to that size.
pub fn make_volume(file: &File, size: u64) -> io::Result<()> {
    unpack_to_file(VOLUME_TEMPLATE, file)?;
    file.set_len(size.max(MIN_VOLUME))
}

/// Makes a scratch disk whose changes go to a file without a name in `folder`: of [`SIZE`] bytes, or of
/// `size`, to which its guest grows the file system that is in it. The empty ext4 that it begins with is
/// shared by all scratch disks of the process.
pub fn overlay(folder: impl AsRef<Path>, size: Option<u64>) -> Result<Overlay, DiskError> {
    match size {
        None => Overlay::new(SIZE, vec![template()?], folder.as_ref()),
        Some(size) => sized(size, |size, layer| {
            Overlay::new(size, vec![layer], folder.as_ref())
        }),
    }
}

/// A disk of another size than [`SIZE`].
fn sized(
    size: u64,
    make: impl FnOnce(u64, Layer) -> Result<Overlay, DiskError>,
) -> Result<Overlay, DiskError> {
    static UNPACKED: OnceLock<Layer> = OnceLock::new();
    // None is smaller than the file system that it begins with.
    make(
        size.max(MIN_VOLUME),
        unpacked_once(&UNPACKED, VOLUME_TEMPLATE)?,
    )
}

/// The empty ext4 that a scratch disk of [`SIZE`] bytes begins with. It is unpacked into memory
/// once.
pub fn template() -> Result<Layer, DiskError> {
    static UNPACKED: OnceLock<Layer> = OnceLock::new();
    unpacked_once(&UNPACKED, TEMPLATE)
}

/// The same with a journal (of 32 MiB), for a disk that outlives the machine.
pub fn journal_template() -> Result<Layer, DiskError> {
    static UNPACKED: OnceLock<Layer> = OnceLock::new();
    unpacked_once(&UNPACKED, JOURNAL_TEMPLATE)
}

/// The writable disk that is kept in `folder`, made where there is none yet: of [`SIZE`] bytes, or of
/// `size`.
pub fn kept(folder: impl AsRef<Path>, size: Option<u64>) -> Result<Overlay, DiskError> {
    let folder = folder.as_ref();
    match (Overlay::is_kept(folder), size) {
        (true, size) => Overlay::reopen(size.unwrap_or(SIZE), folder),
        (false, None) => Overlay::keep(SIZE, vec![journal_template()?], folder),
        (false, Some(size)) => sized(size, |size, layer| Overlay::keep(size, vec![layer], folder)),
    }
}

fn unpacked_once(place: &OnceLock<Layer>, template: &[u8]) -> Result<Layer, DiskError> {
    if let Some(layer) = place.get() {
        return Ok(layer.clone());
    }
    let layer = unpack_to_memory(template)?;
    Ok(place.get_or_init(|| layer).clone())
}

fn unpack_to_memory(template: &[u8]) -> Result<Layer, DiskError> {
    let failed = |source| DiskError::Scratch {
        dir: "(memory)".into(),
        source,
    };
    let file = sys::memory_file("skerry-scratch").map_err(failed)?;
    let mut runs = Vec::new();
    let blocks = unpack(template, |at, block| {
        let offset = runs.len() as u64 * CLUSTER_SIZE;
        let len = CLUSTER_SIZE;
        runs.push(LayerRun { at, len, offset });
        file.write_all_at(block, offset)
    });
    blocks.and_then(|_| sys::seal(&file)).map_err(failed)?;
    Layer::new(file, runs)
}

/// Makes a scratch disk in `dir`: a file without a name, sparse, holding an empty ext4.
///
/// The file's space is freed by the host as soon as the disk is dropped or the process ends,
/// however it ends.
pub fn create(dir: impl AsRef<Path>) -> Result<RawDisk, DiskError> {
    create_with(dir, |file| unpack_to_file(TEMPLATE, file))
}

/// The same with other contents: `fill` gets the empty file, and gives the disk's size.
pub fn create_with(
    dir: impl AsRef<Path>,
    fill: impl FnOnce(&File) -> io::Result<u64>,
) -> Result<RawDisk, DiskError> {
    let dir = dir.as_ref();
    let failed = |source| DiskError::Scratch {
        dir: dir.to_owned(),
        source,
    };
    let file = sys::unnamed_file(dir).map_err(failed)?;
    let size = fill(&file).map_err(failed)?;
    let name = format!("{}/(scratch)", dir.display());
    Ok(RawDisk::from_file(file, name, size, Access::ReadWrite))
}

fn u32_from(reader: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    reader.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Calls `each` with place and bytes of the blocks of a packed template; returns the size of the
/// disk.
fn unpack(template: &[u8], mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<u64> {
    let mut reader = flate2::read::ZlibDecoder::new(template);
    let mut magic = [0; MAGIC.len()];
    reader.read_exact(&mut magic)?;
    let (block_size, blocks) = (u32_from(&mut reader)?, u32_from(&mut reader)?);
    let stored = u32_from(&mut reader)?;
    if &magic != MAGIC || u64::from(block_size) != CLUSTER_SIZE || stored > blocks {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not a packed template",
        ));
    }
    let mut block = [0; CLUSTER_SIZE as usize];
    for _ in 0..stored {
        let number = u32_from(&mut reader)?;
        reader.read_exact(&mut block)?;
        each(u64::from(number) * CLUSTER_SIZE, &block)?;
    }
    Ok(u64::from(blocks) * CLUSTER_SIZE)
}

/// Writes a packed template into an empty file; returns the size of the disk.
fn unpack_to_file(template: &[u8], file: &File) -> io::Result<u64> {
    let size = unpack(template, |at, block| file.write_all_at(block, at))?;
    file.set_len(size)?;
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Disk;
    use std::process::Command;

    fn le32(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn holds_an_ext4_superblock_of_the_stated_size() {
        let dir = tempfile::tempdir().unwrap();
        let disk = create(dir.path()).unwrap();
        assert_eq!(disk.size(), SIZE);
        let mut superblock = [0; 1024];
        disk.read_at(&mut superblock, 1024).unwrap();
        // Offsets: kernel documentation, filesystems/ext4/super.rst.
        assert_eq!(superblock[0x38..0x3a], [0x53, 0xef]);
        assert_eq!(
            u64::from(le32(&superblock, 4)) << (10 + le32(&superblock, 0x18)),
            SIZE
        );
        assert_eq!(superblock[0x3a], 1, "cleanly unmounted");
        let (compat, incompat) = (le32(&superblock, 0x5c), le32(&superblock, 0x60));
        assert_eq!(
            compat & 4,
            0,
            "no journal: nothing here outlives a crash anyway"
        );
        assert_eq!(incompat & 4, 0, "no recovery needed");
        assert_ne!(incompat & 0x40, 0, "extents");
    }

    #[test]
    fn a_kept_one_has_a_journal() {
        let dir = tempfile::tempdir().unwrap();
        let disk = kept(dir.path(), None).unwrap();
        let mut superblock = [0; 1024];
        disk.read_at(&mut superblock, 1024).unwrap();
        assert_ne!(le32(&superblock, 0x5c) & 4, 0, "has_journal");
        assert_eq!(disk.size(), SIZE);
        disk.write_at(b"stays", SIZE - 4096).unwrap();
        drop(disk);
        let mut back = [0; 5];
        let disk = kept(dir.path(), None).unwrap();
        disk.read_at(&mut back, SIZE - 4096).unwrap();
        assert_eq!(&back, b"stays");
    }

    #[test]
    fn one_of_another_size_ends_there() {
        let dir = tempfile::tempdir().unwrap();
        for disk in [
            overlay(dir.path(), Some(1 << 30)).unwrap(),
            kept(dir.path(), Some(1 << 30)).unwrap(),
            kept(dir.path(), Some(1 << 30)).unwrap(),
        ] {
            assert_eq!(disk.size(), 1 << 30);
            let mut superblock = [0; 1024];
            disk.read_at(&mut superblock, 1024).unwrap();
            assert_eq!(superblock[0x38..0x3a], [0x53, 0xef]);
            assert_ne!(le32(&superblock, 0x5c) & 4, 0, "has_journal");
            assert!(disk.write_at(b"x", 1 << 30).is_err());
        }
    }

    #[test]
    fn leaves_no_file_and_spends_little() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let file = sys::unnamed_file(dir.path()).unwrap();
        unpack_to_file(TEMPLATE, &file).unwrap();
        let metadata = file.metadata().unwrap();
        assert!(
            metadata.blocks() * 512 < 2 << 20,
            "{} blocks",
            metadata.blocks()
        );
        assert_eq!(metadata.nlink(), 0);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn two_never_share_a_byte() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (create(dir.path()).unwrap(), create(dir.path()).unwrap());
        one.write_at(&[0x5a; 4096], SIZE - 4096).unwrap();
        let mut back = [1; 4096];
        two.read_at(&mut back, SIZE - 4096).unwrap();
        assert_eq!(back, [0; 4096]);
    }

    #[test]
    fn an_overlay_of_the_template_is_the_same_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (raw, overlay) = (
            create(dir.path()).unwrap(),
            overlay(dir.path(), None).unwrap(),
        );
        assert_eq!(overlay.size(), raw.size());
        let used = overlay.used();
        overlay
            .read_ranges::<DiskError>(&used, |at, bytes| {
                let mut same = vec![0; bytes.len()];
                raw.read_at(&mut same, at)?;
                assert!(same == bytes, "at {at:#x}");
                Ok(())
            })
            .unwrap();
        // And there is nothing else in the one that is a file.
        let (mut data, mut at) = (Vec::new(), 0);
        while let Ok(start) = rustix::fs::seek(raw.file(), rustix::fs::SeekFrom::Data(at)) {
            at = rustix::fs::seek(raw.file(), rustix::fs::SeekFrom::Hole(start)).unwrap();
            data.push(start..at);
        }
        assert_eq!(used, data);
        assert!(overlay.written().is_empty());
        assert!(sys::memory_file("x").is_ok());
        assert!(template().unwrap().file().write_all_at(b"x", 0).is_err());
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = create("/nonexistent/skerry").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/skerry"), "{error}");
    }

    #[test]
    fn a_damaged_template_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = sys::unnamed_file(dir.path()).unwrap();
        for damaged in [&TEMPLATE[..TEMPLATE.len() / 2], b""] {
            assert!(unpack_to_file(damaged, &file).is_err());
            assert!(unpack_to_memory(damaged).is_err());
        }
    }

    #[test]
    fn a_volume_has_a_journal_and_takes_little() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        make_volume(&file, 64 << 30).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 64 << 30);
        assert!(file.metadata().unwrap().blocks() * 512 < 2 << 20);
        let mut superblock = [0; 1024];
        file.read_exact_at(&mut superblock, 1024).unwrap();
        assert_eq!(superblock[0x38..0x3a], [0x53, 0xef]);
        assert_eq!(le32(&superblock, 0x5c) & 4, 4, "a journal");
        make_volume(&file, 0).unwrap();
        assert_eq!(file.metadata().unwrap().len(), MIN_VOLUME);
    }

    /// The judge is e2fsprogs itself, where the machine has it.
    #[test]
    fn e2fsck_finds_nothing_to_mend() {
        for template in [TEMPLATE, JOURNAL_TEMPLATE] {
            check(template);
        }
    }

    fn check(template: &[u8]) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scratch.img");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        unpack_to_file(template, &file).unwrap();
        match Command::new("e2fsck")
            .args(["-f", "-n"])
            .arg(&path)
            .output()
        {
            Ok(output) => assert!(output.status.success(), "{output:?}"),
            Err(error) => println!("skipped: e2fsck is not on this machine ({error})"),
        }
    }
}
