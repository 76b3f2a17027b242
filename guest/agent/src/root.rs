//! Making the image the root file system.
//!
//! ```text
//!   /skerry/lower    the image, read-only
//!   /skerry/rw       tmpfs, or the ext4 disk: upper/ and work/
//!   /skerry/root     overlay of both  --moved to-->  /
//! ```

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use skerry_protocol::message::{BlockDevice, RootSpec, Upper};

use crate::mounts::{self, named};
use crate::sys;

const LOWER: &str = "/skerry/lower";
const WRITABLE: &str = "/skerry/rw";
const ROOT: &str = "/skerry/root";

/// What the space of a disk is counted in by Linux.
const SECTOR: u64 = 512;

/// Blocks that ext4 holds back for changes that may not fail (Linux, filesystems/ext4: `reserved_clusters`).
const HELD_BACK: &str = "512";
/// A file beside the overlay's directories, which takes room on the disk that it needs to be mounted the next
/// time: without, a full disk's root could not be written, and nothing removed from it.
const RESERVE: &str = "reserve";
/// Its size at most and at least.
const RESERVED: std::ops::RangeInclusive<u64> = 4096..=65536;

/// How long a block device may take to appear.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);

/// Makes `spec` the root. Afterwards `/proc`, `/sys` and `/dev` are to be mounted anew. Returns the
/// file system that takes writes, where that is a disk's.
pub fn switch(spec: &RootSpec) -> io::Result<Option<OwnedFd>> {
    let RootSpec::Image {
        device,
        fs_type,
        upper,
    } = spec
    else {
        return Ok(None);
    };
    for directory in [LOWER, WRITABLE, ROOT] {
        fs::create_dir_all(directory)?;
    }
    let device = find(device)?;
    mount(&device, LOWER, fs_type, MountFlags::RDONLY, "")?;
    match upper {
        Upper::ReadOnly => mount_tmpfs(0)?,
        Upper::Tmpfs { size } => mount_tmpfs(*size)?,
        Upper::Ext4(disk) => {
            // The inode tables are zero already in a file that was sparse; nobody has to write
            // them again in the background.
            let disk = find(disk)?;
            let flags = MountFlags::NOATIME;
            mount(&disk, WRITABLE, "ext4", flags, "noinit_itable")?;
            grow(&disk).map_err(|error| named(disk.display(), &error))?;
            match fs::remove_file(Path::new(WRITABLE).join(RESERVE)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    for directory in ["upper", "work"] {
        fs::create_dir_all(Path::new(WRITABLE).join(directory))?;
    }
    // The root directory of an overlay is the upper layer's: it has to look like the image's.
    let image_root = fs::metadata(LOWER)?;
    copy_owner(&image_root, &Path::new(WRITABLE).join("upper"))?;
    let options = format!("lowerdir={LOWER},upperdir={WRITABLE}/upper,workdir={WRITABLE}/work");
    mount(
        Path::new("overlay"),
        ROOT,
        "overlay",
        MountFlags::empty(),
        &options,
    )?;
    let disk = match upper {
        Upper::Ext4(_) => Some(fs::File::open(WRITABLE)?.into()),
        Upper::ReadOnly | Upper::Tmpfs { .. } => None,
    };
    enter(Path::new(ROOT))?;
    Ok(disk)
}

/// Takes room for the next start, as far as there is some, on the file system that takes writes.
pub fn reserve(disk: &OwnedFd) -> io::Result<()> {
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(disk, RESERVE, flags, Mode::from_raw_mode(0o600))?;
    let mut size = *RESERVED.end();
    while size >= *RESERVED.start() {
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size) {
            Err(Errno::NOSPC) => size /= 2,
            result => return Ok(result?),
        }
    }
    Ok(())
}

/// Has the file system at [`WRITABLE`] take the whole of its disk, which may be larger.
fn grow(disk: &Path) -> io::Result<()> {
    let name = disk.file_name().unwrap_or_default();
    // What the kernel holds back is a part of the size that it finds when it mounts: less before the
    // growth than at the next start, which would eat up our reserve on a full disk.
    let held_back = Path::new("/sys/fs/ext4")
        .join(name)
        .join("reserved_clusters");
    fs::write(held_back, HELD_BACK)?;
    let size = Path::new("/sys/class/block").join(name).join("size");
    let sectors = fs::read_to_string(size)?.trim_end().parse::<u64>();
    let size = sectors.map_err(io::Error::other)?.saturating_mul(SECTOR);
    let mut superblock = [0; 1024];
    fs::File::open(disk)?.read_exact_at(&mut superblock, 1024)?;
    if ext4_size(&superblock) >= size {
        return Ok(());
    }
    sys::grow(&fs::File::open(WRITABLE)?.into(), size)
}

/// The size in bytes that an ext4 says in its superblock (Linux, filesystems/ext4/super.rst).
fn ext4_size(superblock: &[u8; 1024]) -> u64 {
    const INCOMPAT_64BIT: u32 = 0x80;
    let word = |at: usize| {
        let bytes = superblock
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok());
        u32::from_le_bytes(bytes.unwrap_or_default())
    };
    let high = match word(0x60) & INCOMPAT_64BIT {
        0 => 0,
        _ => word(0x150),
    };
    let blocks = u64::from(high) << 32 | u64::from(word(4));
    blocks.saturating_mul(1024u64.checked_shl(word(0x18)).unwrap_or(0))
}

/// Closes a root that is to be read-only, when the agent has put its files there.
pub fn seal(spec: &RootSpec) -> io::Result<()> {
    if let RootSpec::Image {
        upper: Upper::ReadOnly,
        ..
    } = spec
    {
        let flags = MountFlags::RDONLY;
        rustix::mount::mount_remount("/", flags, c"").map_err(|error| named("/", &error.into()))?;
    }
    Ok(())
}

/// Moves the mount at `root` over `/` and goes there (Linux, `switch_root` of an initramfs: the
/// RAM file system can't be unmounted or pivoted).
fn enter(root: &Path) -> io::Result<()> {
    mounts::leave_early();
    rustix::process::chdir(root)?;
    rustix::mount::mount_move(".", "/").map_err(|error| named(root.display(), &error.into()))?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    Ok(())
}

fn mount_tmpfs(size: u64) -> io::Result<()> {
    let options = if size == 0 {
        "mode=0755".to_owned()
    } else {
        format!("mode=0755,size={size}")
    };
    mount(
        Path::new("tmpfs"),
        WRITABLE,
        "tmpfs",
        MountFlags::empty(),
        &options,
    )
}

fn mount(
    source: &Path,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> io::Result<()> {
    let options = CString::new(options)?;
    rustix::mount::mount(source, target, kind, flags, options.as_c_str()).map_err(|error| {
        named(
            format_args!("mount {} ({kind}) at {target}", source.display()),
            &error.into(),
        )
    })
}

fn copy_owner(from: &fs::Metadata, to: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    std::os::unix::fs::chown(to, Some(from.uid()), Some(from.gid()))?;
    fs::set_permissions(to, from.permissions())
}

/// Device node of a block device, as soon as there is one.
pub fn find(device: &BlockDevice) -> io::Result<PathBuf> {
    let started = Instant::now();
    loop {
        let found = match device {
            BlockDevice::Path(path) => Some(PathBuf::from(path)).filter(|path| path.exists()),
            BlockDevice::Serial(serial) => find_serial(Path::new("/sys/block"), serial),
        };
        if let Some(found) = found {
            return Ok(found);
        }
        if started.elapsed() >= DEVICE_PATIENCE {
            let text = match device {
                BlockDevice::Path(path) => format!("no block device {path}"),
                BlockDevice::Serial(serial) => format!("no block device with serial {serial}"),
            };
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn find_serial(block: &Path, serial: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(block).ok()?.flatten() {
        let found = fs::read_to_string(entry.path().join("serial"));
        if found.is_ok_and(|found| found.trim_end() == serial) {
            return Some(Path::new("/dev").join(entry.file_name()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ext4_says_how_large_it_is() {
        let mut superblock = [0; 1024];
        superblock[4..8].copy_from_slice(&0x1_0000_u32.to_le_bytes());
        superblock[0x18] = 2;
        assert_eq!(ext4_size(&superblock), 256 << 20);
        superblock[0x150] = 1;
        assert_eq!(ext4_size(&superblock), 256 << 20, "no 64-bit blocks");
        superblock[0x60] = 0x80;
        assert_eq!(ext4_size(&superblock), (256 << 20) + (1 << 44));
        assert_eq!(ext4_size(&[0xff; 1024]), 0);
    }

    #[test]
    fn a_serial_names_its_device_and_no_other() {
        let block = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "root\n"), ("vdb", "scratch"), ("loop0", "")] {
            fs::create_dir(block.path().join(name)).unwrap();
            fs::write(block.path().join(name).join("serial"), serial).unwrap();
        }
        fs::create_dir(block.path().join("vdc")).unwrap();
        assert_eq!(
            find_serial(block.path(), "root"),
            Some(PathBuf::from("/dev/vda"))
        );
        assert_eq!(
            find_serial(block.path(), "scratch"),
            Some(PathBuf::from("/dev/vdb"))
        );
        assert_eq!(find_serial(block.path(), "roo"), None);
        assert_eq!(find_serial(Path::new("/nonexistent"), "root"), None);
    }
}
