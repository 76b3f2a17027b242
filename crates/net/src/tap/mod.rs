//! A network of the host's: frames pass between the guest's card and a TAP device, and the host's kernel
//! does with them what it does with those of any interface.
//!
//! ```text
//!  virtio-net ─ frames with virtio headers ─► Bridge (own thread) ─► /dev/net/tun ─► the host's bridge, routes
//! ```
//! Checksums and the cutting of long TCP segments are left to whoever takes the frames in the end: the
//! header tells the host's kernel, and the guest's, what is left to do.

mod device;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::time::Timespec;
use serde::Serialize;
use skerry_devices::virtio::net::{HEADER_LEN, MAX_FRAME, NetPort, Offloads};

use crate::address::MTU;
use crate::counters::Counters;

/// What the epoll instance calls frames of the device.
pub(crate) const FRAMES: u64 = 1;
/// Frames that are read before others have their turn.
const TURN: usize = 256;
/// Batches of the guest's frames likewise.
const ROUNDS: usize = 16;
/// Frames that are read before the guest gets them.
const BATCH: usize = 32;
/// How long a device may be another's that is about to end.
const HANDOVER: Duration = Duration::from_secs(2);
/// IPv6 takes no shorter packets (RFC 8200, 5).
const LEAST_MTU: u32 = 1280;

/// Why a TAP device can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// A name that no interface has.
    #[error(
        "{0:?} is no name of a TAP device: write one of 1 to 15 letters, digits and . _ - characters"
    )]
    Name(String),
    /// The kernel has no TAP devices.
    #[error(
        "The host has no TAP devices: load the kernel's module (modprobe tun), or leave tap= out"
    )]
    NoDriver(#[source] io::Error),
    /// `/dev/net/tun` is not the user's to open.
    #[error(
        "/dev/net/tun can't be opened: have the administrator allow it (chmod 0666 /dev/net/tun), or leave tap= out"
    )]
    Door(#[source] io::Error),
    /// There is none.
    #[error(
        "The host has no TAP device {0}: make it with ip tuntap add dev {0} mode tap user \"$USER\", give it an \
         address or a bridge, and ip link set {0} up"
    )]
    Missing(String),
    /// It is down.
    #[error("The TAP device {0} is down: ip link set {0} up")]
    Down(String),
    /// It belongs to another user.
    #[error(
        "The TAP device {0} is not this user's: make it with ip tuntap add dev {0} mode tap user \"$USER\", or \
         run with CAP_NET_ADMIN"
    )]
    NotOwned(String),
    /// Some program has it already.
    #[error("The TAP device {0} is in use: each machine takes one of its own")]
    InUse(String),
    /// An interface of another kind, or with several queues.
    #[error("{0} is no TAP device with one queue: make one with ip tuntap add dev NAME mode tap")]
    NotTap(String),
    /// Its packets are too short.
    #[error(
        "Packets of the TAP device {name} have {mtu} bytes at most: ip link set {name} mtu 1500"
    )]
    ShortPackets {
        /// The device.
        name: String,
        /// Their length.
        mtu: u32,
    },
    /// Anything else.
    #[error("The TAP device {name} can't be used")]
    Failed {
        /// The device.
        name: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// A TAP device that is open. Its clones are the same device.
#[derive(Clone)]
pub struct Tap {
    name: String,
    mtu: u16,
    address: [u8; 6],
    frames: Arc<OwnedFd>,
}

impl fmt::Debug for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tap")
            .field("name", &self.name)
            .field("mtu", &self.mtu)
            .finish_non_exhaustive()
    }
}

/// A guest's place on the network behind a device.
#[derive(Debug, Clone)]
pub struct OnTap {
    /// The device.
    pub device: Tap,
    /// The guest's link address.
    pub link_address: [u8; 6],
    /// The guest's addresses.
    pub addresses: Vec<IpNet>,
    /// Where what is for other networks goes.
    pub gateways: Vec<IpAddr>,
    /// The name servers that it is told of.
    pub nameservers: Vec<IpAddr>,
}

/// Whether TAP devices can be used here, for those who ask beforehand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TapProbe {
    /// `/dev/net/tun` can be opened.
    pub usable: bool,
    /// Any device, or only those that were made for the user.
    pub any: bool,
    /// The same in words.
    pub detail: String,
}

/// Finds out whether TAP devices can be used here. Nothing is made.
#[must_use]
pub fn probe_taps() -> TapProbe {
    use rustix::thread::{CapabilitySet, capabilities};
    let sets = capabilities(None);
    let any = sets.is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN));
    match open_door() {
        Ok(_) => TapProbe {
            usable: true,
            any,
            detail: match any {
                true => "any TAP device (--network tap=NAME)",
                false => {
                    "TAP devices of this user's (ip tuntap add dev NAME mode tap user \"$USER\")"
                }
            }
            .to_owned(),
        },
        Err(error) => TapProbe {
            usable: false,
            any: false,
            detail: error.to_string(),
        },
    }
}

fn open_door() -> Result<OwnedFd, TapError> {
    device::door().map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => TapError::Door(error),
        _ => TapError::NoDriver(error),
    })
}

/// Whether an interface can have this name (`dev_valid_name` of the kernel, and without characters that
/// mean something to shells).
fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let some = (1..device::NAME_LEN).contains(&name.len());
    some && name.chars().all(good) && !matches!(name, "." | "..") && !name.starts_with('-')
}

impl Tap {
    /// Refuses what no device is called.
    pub fn check_name(name: &str) -> Result<(), TapError> {
        match is_name(name) {
            true => Ok(()),
            false => Err(TapError::Name(name.to_owned())),
        }
    }

    /// Opens the device `name`, which is there: one that is made by opening would be gone with the machine,
    /// and without an address.
    pub fn open(name: &str) -> Result<Self, TapError> {
        Self::check_name(name)?;
        let own = || name.to_owned();
        let interface = device::look(name).map_err(|error| missing(name, error))?;
        let frames = attach(name)?.map_err(|source| match Errno::from_io_error(&source) {
            Some(Errno::PERM | Errno::ACCESS) => TapError::NotOwned(own()),
            Some(Errno::BUSY) => TapError::InUse(own()),
            Some(Errno::INVAL) => TapError::NotTap(own()),
            _ => TapError::Failed {
                name: own(),
                source,
            },
        })?;
        if !interface.is_up {
            return Err(TapError::Down(own()));
        }
        if interface.mtu < LEAST_MTU {
            return Err(TapError::ShortPackets {
                name: own(),
                mtu: interface.mtu,
            });
        }
        Ok(Self {
            name: own(),
            mtu: longest(interface.mtu),
            address: interface.address,
            frames: Arc::new(frames),
        })
    }

    /// The longest packet of the device `name`, which is not opened.
    pub fn mtu_of(name: &str) -> Result<u16, TapError> {
        Self::check_name(name)?;
        let interface = device::look(name).map_err(|error| missing(name, error))?;
        Ok(longest(interface.mtu))
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The longest packet.
    #[must_use]
    pub const fn mtu(&self) -> u16 {
        self.mtu
    }

    /// A link address for the guest that is as much of its own as the device's is, and stays the same as
    /// long as that does.
    #[must_use]
    pub const fn guest_address(&self) -> [u8; 6] {
        let [a, b, c, d, e, f] = self.address;
        // Of one card, and given by nobody who makes cards (IEEE 802, 8.2).
        [a & !1 | 2, b ^ 0x53, c ^ 0x6b, d, e, f]
    }

    /// Has `epoll` tell of frames.
    pub(crate) fn watch(&self, epoll: &OwnedFd) -> io::Result<()> {
        let data = epoll::EventData::new_u64(FRAMES);
        Ok(epoll::add(
            epoll,
            &self.frames,
            data,
            EventFlags::IN | EventFlags::ET,
        )?)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.frames.as_fd()
    }
}

/// Opens a device. One whose machine has just ended is free in a moment.
fn attach(name: &str) -> Result<io::Result<OwnedFd>, TapError> {
    let until = Instant::now() + HANDOVER;
    loop {
        let attached = device::attach(open_door()?, name);
        let busy = |error: &io::Error| Errno::from_io_error(error) == Some(Errno::BUSY);
        if !attached.as_ref().is_err_and(busy) || Instant::now() >= until {
            return Ok(attached);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// As long as a card's packets get.
fn longest(mtu: u32) -> u16 {
    u16::try_from(mtu).unwrap_or(MTU).min(MTU)
}

fn missing(name: &str, source: io::Error) -> TapError {
    let name = name.to_owned();
    match Errno::from_io_error(&source) {
        Some(Errno::NODEV | Errno::NXIO) => TapError::Missing(name),
        _ => TapError::Failed { name, source },
    }
}

/// Passes frames between a card and a device.
pub(crate) struct Bridge {
    port: NetPort,
    tap: Tap,
    offloads: Offloads,
    readable: bool,
    buffer: Vec<u8>,
    counters: Counters,
}

impl Bridge {
    pub(crate) fn new(port: NetPort, tap: Tap) -> Self {
        port.keep_headers();
        let mut bridge = Self {
            port,
            tap,
            offloads: Offloads::default(),
            readable: true,
            buffer: vec![0; HEADER_LEN + MAX_FRAME],
            counters: Counters::default(),
        };
        // Whoever had the device before may have left others.
        bridge.set_offloads(Offloads::default());
        bridge
    }

    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    fn set_offloads(&mut self, offloads: Offloads) {
        if let Err(error) = device::set_offloads(self.tap.fd(), offloads) {
            tracing::warn!(%error, tap = self.tap.name, "The host completes the guest's frames itself");
        }
        self.offloads = offloads;
    }

    /// Does what there is to do; gives how long to wait for more.
    pub(crate) fn turn(&mut self, events: &[(u64, EventFlags)]) -> Option<Timespec> {
        self.readable |= events.iter().any(|(token, _)| *token == FRAMES);
        let offloads = self.port.offloads();
        if offloads != self.offloads {
            self.set_offloads(offloads);
        }
        let mut busy = false;
        for _ in 0..ROUNDS {
            let frames = self.port.receive();
            busy = !frames.is_empty();
            if !busy {
                break;
            }
            self.send(&frames);
        }
        busy |= self.read();
        busy.then(Timespec::default)
    }

    /// What the guest sent last goes out.
    pub(crate) fn finish(&mut self) {
        let frames = self.port.take();
        self.send(&frames);
    }

    fn send(&mut self, frames: &[Vec<u8>]) {
        for frame in frames {
            self.counters.frames_from_guest += 1;
            self.counters.bytes_from_guest += frame.len().saturating_sub(HEADER_LEN) as u64;
            // What the kernel doesn't take is lost, as networks lose frames: it has no room, the device
            // is down, or the guest's header makes no sense.
            if rustix::io::write(self.tap.fd(), frame).is_err() {
                self.counters.dropped += 1;
            }
        }
    }

    /// Reads frames for the guest, as far as it has room; whether there may be more.
    fn read(&mut self) -> bool {
        if !self.port.is_live() {
            // The kernel keeps only so many.
            self.drain();
            return false;
        }
        let mut left = TURN;
        while self.readable && left > 0 && self.port.has_room() {
            for _ in 0..BATCH {
                left = left.saturating_sub(1);
                if !self.read_one() {
                    break;
                }
            }
            self.port.flush();
        }
        self.readable && left == 0
    }

    fn read_one(&mut self) -> bool {
        match rustix::io::read(self.tap.fd(), &mut *self.buffer) {
            Ok(len) => {
                if let Some(frame) = self.buffer.get(HEADER_LEN..len) {
                    let length = frame.len();
                    let mut buffer = self.port.buffer(length);
                    buffer.copy_from_slice(&self.buffer[..len]);
                    self.port.push_whole(buffer);
                    self.counters.frames_to_guest += 1;
                    self.counters.bytes_to_guest += length as u64;
                }
                true
            }
            Err(Errno::INTR) => true,
            Err(_) => {
                self.readable = false;
                false
            }
        }
    }

    /// Frames for a guest without a driver are lost.
    fn drain(&mut self) {
        while self.readable {
            match rustix::io::read(self.tap.fd(), &mut *self.buffer) {
                Ok(_) => self.counters.dropped += 1,
                Err(Errno::INTR) => {}
                Err(_) => self.readable = false,
            }
        }
    }
}
