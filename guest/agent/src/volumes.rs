//! Folders of the host, volumes and memory file systems: mounted where the host says.
//!
//! What is shown at the target is not always a whole file system: of a folder only one file, of a
//! volume's disk one directory (`lost+found` is beside it). Those are mounted out of sight first, in `/dev`, which
//! can be written even where the root can't.

use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Gid, Mode, Uid};
use rustix::mount::{MountFlags, UnmountFlags};
use skerry_protocol::message::{Mount, MountSource};

use crate::mounts::named;
use crate::{root, sys};

/// Where things are mounted out of sight.
const ASIDE: &str = "/dev/.skerry";
/// The directory of a volume's disk that is the volume.
const CONTENT: &str = "volume";
/// The same while the image's files are copied into it.
const UNFINISHED: &str = "volume.new";
/// How long a disk may take to have the size that the host told of.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the space of a disk is counted in by Linux.
const SECTOR: u64 = 512;

/// Mounts one after the other; gives the volumes that can be written.
pub fn mount_all(mounts: &[Mount]) -> io::Result<Vec<OwnedFd>> {
    let mut volumes = Vec::new();
    for mount in mounts {
        let target = PathBuf::from(OsStr::from_bytes(&mount.target));
        let mounted = mount_one(mount, &target);
        volumes.extend(mounted.map_err(|error| named(target.display(), &error))?);
    }
    // Empty again, if it was needed.
    let _ = fs::remove_dir(ASIDE);
    Ok(volumes)
}

fn mount_one(mount: &Mount, target: &Path) -> io::Result<Option<OwnedFd>> {
    let read_only = match mount.read_only {
        true => MountFlags::RDONLY,
        false => MountFlags::empty(),
    };
    match &mount.source {
        MountSource::Tmpfs { size, mode } => {
            make_point(target, false)?;
            let mut options = format!("mode={mode:o}");
            if *size > 0 {
                options.push_str(&format!(",size={size}"));
            }
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | read_only;
            attach("tmpfs", target, "tmpfs", flags, &options)?;
            Ok(None)
        }
        MountSource::Share { tag, file: None } => {
            make_point(target, false)?;
            attach(tag, target, "virtiofs", read_only, "")?;
            Ok(None)
        }
        MountSource::Share {
            tag,
            file: Some(name),
        } => {
            make_point(target, true)?;
            aside(tag, "virtiofs", read_only, "", |folder| {
                bind(&folder.join(OsStr::from_bytes(name)), target, read_only)
            })?;
            Ok(None)
        }
        MountSource::Volume { device, size, fill } => {
            let device = root::find(device)?;
            await_size(&device, *size)?;
            let disk = device.display().to_string();
            if mount.read_only {
                make_point(target, false)?;
                let show = |folder: &Path| bind(&folder.join(CONTENT), target, read_only);
                return match aside(&disk, "ext4", read_only, "", show) {
                    // Whoever wrote it last didn't come to an end: what its journal has stays unread.
                    Err(error) if error.raw_os_error() == Some(libc::EROFS) => {
                        aside(&disk, "ext4", read_only, "noload", show)
                    }
                    result => result,
                }
                .map(|()| None);
            }
            let options = "noinit_itable,discard";
            aside(&disk, "ext4", read_only, options, |folder| {
                let opened = fs::File::open(folder)?.into();
                sys::grow(&opened, *size)?;
                prepare(folder, target, *fill)?;
                make_point(target, false)?;
                bind(&folder.join(CONTENT), target, read_only)?;
                Ok(Some(opened))
            })
        }
    }
}

fn attach(
    source: &str,
    target: &Path,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> io::Result<()> {
    let options = CString::new(options)?;
    Ok(rustix::mount::mount(
        source,
        target,
        kind,
        flags,
        options.as_c_str(),
    )?)
}

fn bind(from: &Path, target: &Path, flags: MountFlags) -> io::Result<()> {
    rustix::mount::mount_bind(from, target)?;
    if flags.contains(MountFlags::RDONLY) {
        // Only a second call makes a bind mount read-only (mount(2)).
        rustix::mount::mount_remount(target, MountFlags::BIND | flags, c"")?;
    }
    Ok(())
}

/// Mounts out of sight for as long as `act` takes; what it bound stays.
fn aside<T>(
    source: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
    act: impl FnOnce(&Path) -> io::Result<T>,
) -> io::Result<T> {
    let folder = Path::new(ASIDE);
    fs::create_dir_all(folder)?;
    attach(source, folder, kind, flags, options)?;
    let result = act(folder);
    rustix::mount::unmount(folder, UnmountFlags::DETACH)?;
    result
}

/// Makes what is mounted over: a directory or a file, where there is none.
fn make_point(target: &Path, file: bool) -> io::Result<()> {
    let make = || {
        if file {
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent)?;
            }
            let made = fs::File::options().append(true).create(true).open(target);
            // There is one that can't be written, which is as good.
            return made.map(drop).or_else(|error| match target.is_file() {
                true => Ok(()),
                false => Err(error),
            });
        }
        fs::create_dir_all(target)
    };
    match make() {
        Err(error) if error.raw_os_error() == Some(libc::EROFS) => {
            // The root was closed for the user, not for the places of mounts.
            rustix::mount::mount_remount("/", MountFlags::empty(), c"")?;
            let made = make();
            rustix::mount::mount_remount("/", MountFlags::RDONLY, c"")?;
            made
        }
        result => result,
    }
}

/// Waits until the kernel knows how large a disk is: that of a guest which goes on where another one
/// was kept is another disk.
fn await_size(device: &Path, size: u64) -> io::Result<()> {
    let name = device.file_name().unwrap_or_default();
    let path = Path::new("/sys/block").join(name).join("size");
    let started = Instant::now();
    loop {
        let sectors = fs::read_to_string(&path)?;
        if sectors.trim_end().parse() == Ok(size / SECTOR) {
            return Ok(());
        }
        if started.elapsed() >= PATIENCE {
            let text = format!(
                "it has {} sectors, not {}",
                sectors.trim_end(),
                size / SECTOR
            );
            return Err(io::Error::other(text));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Makes the directory that is the volume, once. With `fill` an empty one gets what the image has in
/// its place.
fn prepare(disk: &Path, image: &Path, fill: bool) -> io::Result<()> {
    let (content, unfinished) = (disk.join(CONTENT), disk.join(UNFINISHED));
    let is_empty = |path: &Path| Ok::<_, io::Error>(fs::read_dir(path)?.next().is_none());
    let exists = content.exists();
    let from = fill && image.is_dir() && !is_empty(image)?;
    if exists && !(from && is_empty(&content)?) {
        return Ok(());
    }
    // What a copy that was cut short left.
    match fs::remove_dir_all(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if from {
        copy(image, &unfinished)?;
    } else {
        fs::create_dir(&unfinished)?;
    }
    if exists {
        fs::remove_dir(&content)?;
    }
    fs::rename(&unfinished, &content)
}

/// Copies a file or a directory with all that is in it: owners, modes, times, links.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(from)?;
    let kind = metadata.file_type();
    let mode = Mode::from_raw_mode(metadata.mode());
    if kind.is_dir() {
        fs::create_dir(to)?;
        for entry in fs::read_dir(from)? {
            let name = entry?.file_name();
            copy(&from.join(&name), &to.join(&name))?;
        }
    } else if kind.is_symlink() {
        std::os::unix::fs::symlink(fs::read_link(from)?, to)?;
    } else if kind.is_file() {
        fs::copy(from, to)?;
    } else {
        let node = match () {
            () if kind.is_fifo() => FileType::Fifo,
            () if kind.is_socket() => FileType::Socket,
            () if kind.is_block_device() => FileType::BlockDevice,
            () => FileType::CharacterDevice,
        };
        rustix::fs::mknodat(CWD, to, node, mode, metadata.rdev())?;
    }
    let owner = (Uid::from_raw(metadata.uid()), Gid::from_raw(metadata.gid()));
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(CWD, to, Some(owner.0), Some(owner.1), flags)?;
    if !kind.is_symlink() {
        fs::set_permissions(to, metadata.permissions())?;
    }
    // Seconds and nanoseconds as the kernel gave them.
    let time = |tv_sec, tv_nsec| rustix::fs::Timespec { tv_sec, tv_nsec };
    let times = rustix::fs::Timestamps {
        last_access: time(metadata.atime(), metadata.atime_nsec()),
        last_modification: time(metadata.mtime(), metadata.mtime_nsec()),
    };
    rustix::fs::utimensat(CWD, to, &times, flags)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_new_volume_gets_what_the_image_has() {
        let root = tempfile::tempdir().unwrap();
        let (image, disk) = (root.path().join("image"), root.path().join("disk"));
        fs::create_dir_all(image.join("a/b")).unwrap();
        fs::create_dir(&disk).unwrap();
        fs::write(image.join("a/b/file"), "text").unwrap();
        fs::set_permissions(image.join("a"), fs::Permissions::from_mode(0o750)).unwrap();
        std::os::unix::fs::symlink("nowhere", image.join("link")).unwrap();
        // A copy that was cut short counts for nothing.
        fs::create_dir_all(disk.join(UNFINISHED).join("half")).unwrap();
        prepare(&disk, &image, true).unwrap();
        let volume = disk.join(CONTENT);
        assert_eq!(fs::read_to_string(volume.join("a/b/file")).unwrap(), "text");
        assert_eq!(
            fs::metadata(volume.join("a")).unwrap().mode() & 0o777,
            0o750
        );
        assert_eq!(
            fs::read_link(volume.join("link")).unwrap(),
            Path::new("nowhere")
        );
        assert!(!volume.join("half").exists() && !disk.join(UNFINISHED).exists());
        // What is in it stays.
        fs::remove_dir_all(volume.join("a")).unwrap();
        prepare(&disk, &image, true).unwrap();
        assert!(!volume.join("a").exists() && volume.join("link").is_symlink());
    }

    #[test]
    fn a_volume_that_is_not_to_be_filled_stays_empty() {
        let root = tempfile::tempdir().unwrap();
        let (image, disk) = (root.path().join("image"), root.path().join("disk"));
        fs::create_dir_all(image.join("a")).unwrap();
        fs::create_dir(&disk).unwrap();
        prepare(&disk, &image, false).unwrap();
        assert_eq!(fs::read_dir(disk.join(CONTENT)).unwrap().count(), 0);
        // The image has nothing there.
        prepare(&disk, &root.path().join("none"), true).unwrap();
        assert_eq!(fs::read_dir(disk.join(CONTENT)).unwrap().count(), 0);
    }
}
