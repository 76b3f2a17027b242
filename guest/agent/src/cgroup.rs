//! The cgroup of all that execs start, and stopping it.
//!
//! ```text
//!   /                      the agent, kernel threads
//!   └── skerry             every exec's process, from its first instruction on; what they see as "/"
//!       └── ...            cgroups of the workload's own
//! ```
//!
//! Processes live in a cgroup namespace whose root is this cgroup, and `/sys/fs/cgroup` shows it from
//! there, so that a workload which manages cgroups finds the whole tree its own, and can't leave the
//! one that a freeze stops (Linux, admin-guide/cgroup-v2, "Namespace").

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::exec::child;

/// Where the kernel's cgroups are mounted.
const MOUNT: &str = "/sys/fs/cgroup";

/// The cgroup of all that execs start.
const NAME: &str = "/sys/fs/cgroup/skerry";

/// Cgroup for execs of a workload that has closed the one above to processes.
const LEAF: &str = "exec";

/// How long it may take until all processes stand still: one that waits for a disk does so first.
const PATIENCE: Duration = Duration::from_secs(2);

/// The cgroup.
#[derive(Debug)]
pub struct Cgroup {
    directory: OwnedFd,
    freeze: OwnedFd,
    events: OwnedFd,
    /// Where the number of processes is limited, if the kernel has that controller.
    most: Option<OwnedFd>,
    namespace: OwnedFd,
    /// A freeze was asked for, and no thaw since.
    frozen: AtomicBool,
}

impl Cgroup {
    /// Makes the cgroup and shows it at `MOUNT`; where that fails the mount is as it was.
    ///
    /// To be called before there are other threads: the mount is away for a moment.
    pub fn set_up() -> io::Result<Self> {
        match rustix::fs::mkdir(NAME, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        share_out();
        let directory = open(NAME, OFlags::PATH | OFlags::DIRECTORY)?;
        let freeze = open(&format!("{NAME}/cgroup.freeze"), OFlags::WRONLY)?;
        let events = open(&format!("{NAME}/cgroup.events"), OFlags::RDONLY)?;
        let most = open(&format!("{NAME}/pids.max"), OFlags::WRONLY).ok();
        rustix::mount::unmount(MOUNT, UnmountFlags::DETACH)?;
        let namespace = child::run_in_cgroup(directory.as_fd(), enter).inspect_err(|_| {
            // A second failure changes nothing: there are no cgroups to see then.
            let _ = mount();
        })?;
        Ok(Self {
            directory,
            freeze,
            events,
            most,
            namespace,
            frozen: AtomicBool::new(false),
        })
    }

    /// Its directory, for a process to be born in.
    #[must_use]
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// The namespace whose root it is.
    #[must_use]
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// A cgroup below it without any below that.
    pub fn leaf(&self) -> io::Result<OwnedFd> {
        match rustix::fs::mkdirat(&self.directory, LEAF, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(
            &self.directory,
            LEAF,
            flags,
            Mode::empty(),
        )?)
    }

    /// Lets it have so many processes and threads at most. Its root in the workload's namespace is not the
    /// workload's to change (`nsdelegate`).
    pub fn limit_processes(&self, most: Option<u32>) -> io::Result<()> {
        let none =
            || io::Error::other("this guest's kernel has no cgroup controller for processes");
        let file = self.most.as_ref().ok_or_else(none)?;
        let text = most.map_or_else(|| "max".to_owned(), |most| most.to_string());
        rustix::io::pwrite(file, text.as_bytes(), 0)?;
        Ok(())
    }

    /// Stops every process in it, and returns when all stand still. After an error none does.
    pub fn freeze(&self) -> io::Result<()> {
        self.frozen.store(true, Ordering::Relaxed);
        rustix::io::pwrite(&self.freeze, b"1", 0)?;
        self.wait_until_frozen().inspect_err(|_| {
            // Fails only where the freezing has failed too.
            let _ = self.thaw();
        })
    }

    /// Lets them go on.
    pub fn thaw(&self) -> io::Result<()> {
        if self.frozen.load(Ordering::Relaxed) {
            rustix::io::pwrite(&self.freeze, b"0", 0)?;
            self.frozen.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    fn wait_until_frozen(&self) -> io::Result<()> {
        let started = Instant::now();
        loop {
            // Reading is also what the next change is counted from.
            let mut text = [0; 128];
            let length = rustix::io::pread(&self.events, &mut text, 0)?;
            let text = text.get(..length).unwrap_or_default();
            if text
                .split(|&byte| byte == b'\n')
                .any(|line| line == b"frozen 1")
            {
                return Ok(());
            }
            let left = PATIENCE.saturating_sub(started.elapsed());
            if left.is_zero() {
                let text = format!(
                    "a process did not stop within {} s; all go on",
                    PATIENCE.as_secs()
                );
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            let timeout = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut watch = [PollFd::new(&self.events, PollFlags::PRI)];
            match rustix::event::poll(&mut watch, Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Lets cgroups below the root's children have every resource controller that the kernel offers.
fn share_out() {
    let offered = std::fs::read_to_string(format!("{MOUNT}/cgroup.controllers"));
    for controller in offered.unwrap_or_default().split_ascii_whitespace() {
        // One at a time: what one of them refuses is not the others' loss.
        let _ = std::fs::write(
            format!("{MOUNT}/cgroup.subtree_control"),
            format!("+{controller}"),
        );
    }
}

fn open(path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        path,
        flags | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Makes the namespace, from a process in the cgroup. Runs in a child that shares our memory.
fn enter() -> Result<OwnedFd, Errno> {
    crate::sys::unshare_cgroup_namespace()?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let namespace = rustix::fs::open(c"/proc/self/ns/cgroup", flags, Mode::empty())?;
    mount()?;
    Ok(namespace)
}

/// Mounts the cgroups as the caller's namespace shows them.
fn mount() -> Result<(), Errno> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount(
        c"cgroup2",
        c"/sys/fs/cgroup",
        c"cgroup2",
        flags,
        c"nsdelegate",
    )
}
