//! The kernel's file systems.

use std::io;
use std::path::Path;

use rustix::mount::MountFlags;

/// One mount.
struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static std::ffi::CStr,
    /// Whether the guest is no use without it.
    required: bool,
}

const NO_PROGRAMS: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);
const DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);

const fn mount(
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static std::ffi::CStr,
    required: bool,
) -> Mount {
    Mount {
        kind,
        target,
        flags,
        data,
        required,
    }
}

/// What the agent itself needs before there is a root.
const EARLY: [Mount; 3] = [
    mount("proc", "/proc", NO_PROGRAMS, c"", true),
    mount("sysfs", "/sys", NO_PROGRAMS, c"", true),
    mount("devtmpfs", "/dev", DEVICES, c"mode=0755", true),
];

/// What programs find on a Linux system; each after the one that holds its mount point.
const STANDARD: [Mount; 7] = [
    mount("proc", "/proc", NO_PROGRAMS, c"", true),
    mount("sysfs", "/sys", NO_PROGRAMS, c"", true),
    mount(
        "cgroup2",
        "/sys/fs/cgroup",
        NO_PROGRAMS,
        c"nsdelegate",
        false,
    ),
    mount("devtmpfs", "/dev", DEVICES, c"mode=0755", true),
    mount(
        "devpts",
        "/dev/pts",
        DEVICES,
        c"newinstance,ptmxmode=0666,mode=0620,gid=5",
        false,
    ),
    mount("tmpfs", "/dev/shm", NO_PROGRAMS, c"mode=1777", false),
    mount("mqueue", "/dev/mqueue", NO_PROGRAMS, c"", false),
];

/// Links in `/dev` that the kernel doesn't make (Linux, `admin-guide/devices.rst`, "Compulsory links").
const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("/proc/kcore", "/dev/core"),
];

/// Mounts what is needed to find the host and the root.
pub fn early() -> io::Result<()> {
    EARLY.iter().try_for_each(Mount::apply)
}

/// Leaves the early mounts before the root is switched, so that nothing holds on to them.
pub fn leave_early() {
    for mount in EARLY {
        // Still busy at worst, and then out of sight under the new root.
        let _ = rustix::mount::unmount(mount.target, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Mounts the standard file systems in the root.
pub fn standard() -> io::Result<()> {
    STANDARD.iter().try_for_each(Mount::apply)?;
    for (target, link) in LINKS {
        match std::os::unix::fs::symlink(target, link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.map_err(|error| named(link, &error))?,
        }
    }
    Ok(())
}

impl Mount {
    fn apply(&self) -> io::Result<()> {
        let target = Path::new(self.target);
        let result = std::fs::create_dir_all(target).and_then(|()| {
            Ok(rustix::mount::mount(
                self.kind, target, self.kind, self.flags, self.data,
            )?)
        });
        match result {
            // A kernel that mounts devtmpfs by itself (CONFIG_DEVTMPFS_MOUNT) was faster.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
            Err(error) if self.required => Err(named(self.target, &error)),
            _ => Ok(()),
        }
    }
}

/// An error with the thing that it is about.
pub fn named(what: impl std::fmt::Display, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
