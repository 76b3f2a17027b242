//! The controls of a TAP device (Linux, Documentation/networking/tuntap.rst, `linux/if_tun.h`).
#![expect(
    unsafe_code,
    reason = "the controls of a TAP device and of network interfaces have no safe interface"
)]

use std::ffi::{c_int, c_uint};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{self, IntegerSetter, Opcode, Setter, Updater, opcode};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use skerry_devices::virtio::net::{HEADER_LEN, Offloads};

/// Where TAP devices are opened.
const DOOR: &str = "/dev/net/tun";
/// Bytes of an interface's name, the zero at its end included (`IFNAMSIZ`).
pub(super) const NAME_LEN: usize = 16;

const TUNSETIFF: Opcode = opcode::write::<c_int>(b'T', 202);
const TUNGETFEATURES: Opcode = opcode::read::<c_uint>(b'T', 207);
const TUNSETOFFLOAD: Opcode = opcode::write::<c_uint>(b'T', 208);
const TUNSETVNETHDRSZ: Opcode = opcode::write::<c_int>(b'T', 216);
// `linux/sockios.h`.
const SIOCGIFFLAGS: Opcode = 0x8913;
const SIOCGIFMTU: Opcode = 0x8921;
const SIOCGIFHWADDR: Opcode = 0x8927;

const IFF_TAP: u16 = 2;
/// No word about the protocol before each frame.
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
/// Of an interface: it is up.
const IFF_UP: u16 = 1;
const TUN_F_CSUM: usize = 1;
const TUN_F_TSO4: usize = 2;
const TUN_F_TSO6: usize = 4;

/// `struct ifreq`: a name, and a union of 24 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
struct Request {
    name: [u8; NAME_LEN],
    value: [u8; 24],
}

impl Request {
    /// About the interface `name`, which is a short one.
    fn about(name: &str) -> Self {
        let mut request = Self {
            name: [0; NAME_LEN],
            value: [0; 24],
        };
        let bytes = name.bytes().take(NAME_LEN - 1);
        for (place, byte) in request.name.iter_mut().zip(bytes) {
            *place = byte;
        }
        request
    }

    fn flags(&self) -> u16 {
        let [low, high, ..] = self.value;
        u16::from_ne_bytes([low, high])
    }
}

/// What an interface is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) mtu: u32,
    pub(super) address: [u8; 6],
    pub(super) is_up: bool,
}

/// Asks the kernel about an interface.
pub(super) fn look(name: &str) -> io::Result<Interface> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
    let (mut mtu, mut address, mut state) = (
        Request::about(name),
        Request::about(name),
        Request::about(name),
    );
    // SAFETY: SIOCGIFMTU reads and writes one `struct ifreq`, which `Request` is as large as.
    unsafe { ioctl::ioctl(&socket, Updater::<SIOCGIFMTU, _>::new(&mut mtu)) }?;
    // SAFETY: so does SIOCGIFHWADDR.
    unsafe { ioctl::ioctl(&socket, Updater::<SIOCGIFHWADDR, _>::new(&mut address)) }?;
    // SAFETY: and SIOCGIFFLAGS.
    unsafe { ioctl::ioctl(&socket, Updater::<SIOCGIFFLAGS, _>::new(&mut state)) }?;
    let [a, b, c, d, ..] = mtu.value;
    // Behind the family of `struct sockaddr`.
    let [_, _, one, two, three, four, five, six, ..] = address.value;
    Ok(Interface {
        mtu: u32::from_ne_bytes([a, b, c, d]),
        address: [one, two, three, four, five, six],
        is_up: state.flags() & IFF_UP != 0,
    })
}

/// Opens the place where TAP devices are opened.
pub(super) fn door() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let door = rustix::fs::open(DOOR, flags, Mode::empty())?;
    // SAFETY: TUNGETFEATURES writes an unsigned int.
    unsafe { ioctl::ioctl(&door, ioctl::Getter::<TUNGETFEATURES, c_uint>::new()) }?;
    Ok(door)
}

/// Has what comes out of `door` be the frames of the device `name`, each behind a virtio header.
pub(super) fn attach(door: OwnedFd, name: &str) -> io::Result<OwnedFd> {
    let mut request = Request::about(name);
    let flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR).to_ne_bytes();
    request.value[..flags.len()].copy_from_slice(&flags);
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, whatever its number says of an int.
    unsafe { ioctl::ioctl(&door, Updater::<TUNSETIFF, _>::new(&mut request)) }?;
    let len = HEADER_LEN as c_int;
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    unsafe { ioctl::ioctl(&door, Setter::<TUNSETVNETHDRSZ, c_int>::new(len)) }?;
    Ok(door)
}

/// Has the kernel give frames as the guest takes them.
pub(super) fn set_offloads(tap: impl AsFd, offloads: Offloads) -> io::Result<()> {
    let Offloads {
        checksums,
        tcp4,
        tcp6,
    } = offloads;
    let mut flags = 0;
    for (wanted, flag) in [
        (checksums, TUN_F_CSUM),
        (tcp4, TUN_F_TSO4),
        (tcp6, TUN_F_TSO6),
    ] {
        flags |= if wanted { flag } else { 0 };
    }
    // SAFETY: TUNSETOFFLOAD takes its argument as a number, and no pointer.
    unsafe { ioctl::ioctl(tap, IntegerSetter::<TUNSETOFFLOAD>::new_usize(flags)) }?;
    Ok(())
}
