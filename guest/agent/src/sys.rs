//! System calls that have no safe wrapper: the whole of the agent's `unsafe` but the making of an
//! exec's process (`exec::child`) and the entry point.
#![expect(unsafe_code, reason = "system calls without a safe wrapper in rustix")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::Signal;

/// The host's context id (virtio 1.3 §5.10.4).
pub const HOST_CID: u32 = 2;

/// Any context id, for listening.
const ANY_CID: u32 = u32::MAX;

/// `struct sockaddr_vm` of Linux's `vm_sockets.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

impl VsockAddress {
    fn new(cid: u32, port: u32) -> Self {
        let family = AddressFamily::VSOCK.as_raw();
        Self {
            family,
            reserved: 0,
            port,
            cid,
            flags: 0,
            zero: [0; 3],
        }
    }
}

// SAFETY: the pointer is to a live `VsockAddress`, which has the layout of `sockaddr_vm`, with its
// whole length.
unsafe impl SocketAddrArg for VsockAddress {
    unsafe fn with_sockaddr<R>(
        &self,
        f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        f(
            (&raw const *self).cast(),
            size_of::<Self>() as SocketAddrLen,
        )
    }
}

fn vsock_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(
        AddressFamily::VSOCK,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

/// Connects to a port of the host.
pub fn vsock_connect(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    rustix::net::connect(&socket, &VsockAddress::new(HOST_CID, port))?;
    Ok(socket)
}

/// Listens on a port of this guest.
pub fn vsock_listen(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    rustix::net::bind(&socket, &VsockAddress::new(ANY_CID, port))?;
    rustix::net::listen(&socket, 128)?;
    Ok(socket)
}

/// The next connection of a listening socket, and the context id at its other end.
pub fn vsock_accept(socket: BorrowedFd<'_>) -> io::Result<(OwnedFd, u32)> {
    let mut address = VsockAddress::new(0, 0);
    let mut length = size_of::<VsockAddress>() as libc::socklen_t;
    // SAFETY: the address is writable for the length given, and any bytes are a valid value.
    let accepted = unsafe {
        libc::accept4(
            socket.as_raw_fd(),
            (&raw mut address).cast(),
            &raw mut length,
            libc::SOCK_CLOEXEC,
        )
    };
    if accepted < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else has.
    let accepted = unsafe { OwnedFd::from_raw_fd(accepted) };
    if length as usize != size_of::<VsockAddress>()
        || address.family != AddressFamily::VSOCK.as_raw()
    {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((accepted, address.cid))
}

/// Collects the orphans that have ended: children of the calling thread, which is to be the first,
/// to whom the kernel gives them, and to start none itself. Other threads' children are their own.
pub fn collect_orphans() {
    let options = libc::WNOHANG | libc::__WNOTHREAD;
    // SAFETY: a null status pointer is allowed (POSIX waitpid).
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), options) } > 0 {}
}

/// Waits for the end of a child and collects it.
pub fn wait_for_child(pid: i32) {
    // SAFETY: as above.
    while unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

/// Gives the calling process a cgroup namespace with its own cgroup as the root.
pub fn unshare_cgroup_namespace() -> rustix::io::Result<()> {
    // SAFETY: descriptors and memory stay as they are.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWCGROUP) }
}

/// The signal of a number from 1 to 64, real-time signals included.
#[must_use]
pub fn signal(number: u8) -> Option<Signal> {
    // SAFETY: the number is not 0 and is a signal of Linux; the ones that the C library keeps for
    // itself are only sent here, never handled.
    (1..=64)
        .contains(&number)
        .then(|| unsafe { Signal::from_raw_unchecked(i32::from(number)) })
}

/// Ignores SIGPIPE, as a C entry point leaves it at "terminate".
pub fn ignore_sigpipe() {
    // SAFETY: "ignore" involves no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Signal that the kernel sends PID 1 when the machine's power button is pressed: SIGRTMIN+4, as
/// systemd has it (`CONFIG_ACPI_TINY_POWER_BUTTON_SIGNAL` of our kernel).
const POWER_SIGNAL: libc::c_int = 38;

/// What the first thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A child has ended, or several.
    Child,
    /// The power button was pressed.
    Power,
}

/// The signals of [`Notice`].
fn notices() -> libc::sigset_t {
    // SAFETY: all-zero bytes are a valid set, which sigemptyset overwrites.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is writable and the numbers are signals'.
    unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigaddset(&raw mut set, POWER_SIGNAL);
    }
    set
}

/// Keeps the signals of [`Notice`] from this thread and from those that it will start, so that
/// [`wait_for_notice`] gets them: a blocked signal waits, also one that is ignored by default.
pub fn block_notices() {
    let set = notices();
    // SAFETY: `set` is valid, and the old mask isn't asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Leaves [`Notice::Child`] of this thread's own children unsent: the kernel drops a signal that is
/// neither handled nor blocked by the child's parent.
pub fn unblock_child_signal() {
    // SAFETY: all-zero bytes are a valid set, which sigemptyset overwrites.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is writable, the number is a signal's, and the old mask isn't asked for.
    unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// Blocks until there is something to do.
#[must_use]
pub fn wait_for_notice() -> Notice {
    let set = notices();
    let mut signal = 0;
    // SAFETY: both pointers are valid.
    while unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 {}
    if signal == POWER_SIGNAL {
        Notice::Power
    } else {
        Notice::Child
    }
}

/// Credits bytes to the kernel's entropy pool and has its generator take them now.
pub fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    /// `struct rand_pool_info` of Linux's `random.h` with room for one piece.
    #[repr(C)]
    struct PoolInfo {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; 256],
    }
    // _IOW('R', 3, int[2]) and _IO('R', 7) of Linux's `random.h`.
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

    let random = File::open("/dev/urandom")?;
    for piece in bytes.chunks(256) {
        let mut info = PoolInfo {
            entropy_count: piece.len() as libc::c_int * 8,
            buf_size: piece.len() as libc::c_int,
            buf: [0; 256],
        };
        info.buf[..piece.len()].copy_from_slice(piece);
        // SAFETY: `info` is a pool-info header followed by at least `buf_size` bytes.
        if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the request takes no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Tells the disk below a file system which of its blocks are free, if it wants to know.
pub fn trim(file_system: BorrowedFd<'_>) -> io::Result<()> {
    /// `struct fstrim_range` of Linux's `fs.h`: start, length, least length of a piece.
    type Range = [u64; 3];
    // _IOWR('X', 121, struct fstrim_range).
    const FITRIM: libc::c_ulong = 0xc018_5879;
    let mut range: Range = [0, u64::MAX, 0];
    // SAFETY: `range` has the layout that the request reads and writes.
    if unsafe { libc::ioctl(file_system.as_raw_fd(), FITRIM, &raw mut range) } < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            // Neither the file system nor the disk has to have that.
            Some(libc::EOPNOTSUPP | libc::ENOTTY) => Ok(()),
            _ => Err(error),
        };
    }
    Ok(())
}

/// Lets an ext4 that is mounted have all of its disk, which has `size` bytes.
pub fn grow(file_system: &OwnedFd, size: u64) -> io::Result<()> {
    // _IOW('f', 16, __u64) of Linux's `fs/ext4/ext4.h`: EXT4_IOC_RESIZE_FS.
    const RESIZE_FS: libc::c_ulong = 0x4008_6610;
    let stat = rustix::fs::fstatfs(file_system)?;
    // The size of a block is a small number.
    let blocks = size / stat.f_bsize as u64;
    // SAFETY: the request reads one 64-bit number.
    if unsafe { libc::ioctl(file_system.as_raw_fd(), RESIZE_FS, &raw const blocks) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sends a signal to every process but this one.
pub fn signal_everyone(signal: Signal) {
    // SAFETY: kill has no memory effects. It fails when there is nobody, which is fine.
    unsafe { libc::kill(-1, signal.as_raw()) };
}
