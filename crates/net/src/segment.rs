//! A network that machines share: packets for its addresses go to the process of the machine that has the
//! address, by a socket in a folder that only the user's processes get to.
//!
//! ```text
//!  guest ─ packet for 10.89.0.3 ─► Link::To ─ SOCK_SEQPACKET ─► Link::From ─ looked at ─► the other guest
//!                                  (bounded queue)              (read while its guest has room)
//! ```
//! A machine's IPv6 address stands in its network where its IPv4 address stands in that one's, so that a
//! lease is of both.
//!
//! A guest can't send with another's address: what doesn't come from its own is dropped where it comes from,
//! and each connection is held to the address of the process at its other end.

mod lease;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::{Ipv4Net, Ipv6Net};
use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use crate::outlet::{Outlet, Unreachable};
use crate::wire::Packet;
pub use lease::{Lease, Member, members};

/// Bytes that wait for a neighbour that takes none; more are lost, as networks lose them.
const QUEUE: usize = 512 << 10;
/// Connections of others that are taken.
const MOST_LINKS: usize = 1024;
/// Packets of one neighbour that are taken before others have their turn.
const TURN: usize = 64;
const BACKLOG: i32 = 128;
/// How long what was read of names is good for.
const FRESH: Duration = Duration::from_millis(50);
/// How many names a neighbour may have that are looked at.
const MOST_NAMES: usize = 64;

/// Which socket of a segment something happened to.
pub(crate) type LinkId = u32;
/// The one where others connect.
const DOOR: LinkId = 0;

/// A connection between two machines' processes; packets go one way.
enum Link {
    To(To),
    From(From),
}

struct To {
    peer: Ipv4Addr,
    socket: OwnedFd,
    queue: VecDeque<Vec<u8>>,
    bytes: usize,
}

struct From {
    socket: OwnedFd,
    pid: u32,
    /// The address that it may send from, once it is known.
    source: Option<Ipv4Addr>,
    readable: bool,
}

/// The addresses of a shared network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnets {
    /// Those of IPv4.
    pub v4: Ipv4Net,
    /// Those of IPv6, if it has any; as many as of IPv4 at least.
    pub v6: Option<Ipv6Net>,
    /// The gateway's.
    pub gateway: Ipv4Addr,
}

impl Subnets {
    /// The IPv6 address that goes with an IPv4 one.
    #[must_use]
    pub fn v6_of(&self, address: Ipv4Addr) -> Option<Ipv6Addr> {
        let host = u32::from(address).checked_sub(self.v4.network().into())?;
        let network = u128::from(self.v6?.network());
        Some(Ipv6Addr::from(network | u128::from(host)))
    }

    /// The IPv4 address that an IPv6 one goes with.
    fn v4_of(&self, address: Ipv6Addr) -> Option<Ipv4Addr> {
        let network = u128::from(self.v6?.network());
        let host = u32::try_from(u128::from(address).checked_sub(network)?).ok()?;
        let address = u32::from(self.v4.network()).checked_add(host)?;
        let address = Ipv4Addr::from(address);
        self.v4.contains(&address).then_some(address)
    }

    /// The place of an address, in IPv4.
    fn place(&self, address: IpAddr) -> Option<Ipv4Addr> {
        match address {
            IpAddr::V4(address) => self.v4.contains(&address).then_some(address),
            IpAddr::V6(address) => self.v4_of(address),
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.contains(&address),
            IpAddr::V6(address) => self.v6.is_some_and(|v6| v6.contains(&address)),
        }
    }
}

/// A machine's place on a shared network.
pub struct Segment {
    name: String,
    subnets: Subnets,
    lease: Lease,
    folder: OwnedFd,
    door: OwnedFd,
    links: HashMap<LinkId, Link>,
    /// Links to neighbours, by their address.
    to: HashMap<Ipv4Addr, LinkId>,
    next: LinkId,
    waiting: bool,
    known: Vec<Member>,
    looked: Option<Instant>,
}

/// What a segment tells the stack of.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Passed {
    /// Packets that were passed on.
    pub(crate) packets: u64,
    /// Those of no use: from a strange address, malformed, or lost for want of room.
    pub(crate) dropped: u64,
    /// There may be more.
    pub(crate) more: bool,
}

/// What of a segment a machine's owner is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// The network's name.
    pub network: String,
    /// The machine's address there.
    pub address: Ipv4Addr,
    /// Its IPv6 address, where the network has such.
    pub address6: Option<Ipv6Addr>,
    /// The network's addresses.
    pub subnets: Subnets,
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(rustix::net::socket_with(family, kind, flags, None)?)
}

/// How epoll and the segment's caller watch a link.
pub(crate) struct Watch<'a> {
    pub(crate) epoll: &'a Arc<OwnedFd>,
    /// The event's data for a link.
    pub(crate) base: u64,
}

impl Watch<'_> {
    fn add(&self, socket: BorrowedFd<'_>, link: LinkId) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        let data = epoll::EventData::new_u64(self.base | u64::from(link));
        Ok(epoll::add(self.epoll, socket, data, flags)?)
    }
}

impl Segment {
    /// Takes up a place on the network `name`.
    pub fn open(name: &str, subnets: Subnets, lease: Lease) -> io::Result<Self> {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        let folder = rustix::fs::open(lease.folder(), flags, Mode::empty())?;
        let door = socket()?;
        let segment = Self {
            name: name.to_owned(),
            subnets,
            lease,
            folder,
            door,
            links: HashMap::new(),
            to: HashMap::new(),
            next: DOOR + 1,
            waiting: true,
            known: Vec::new(),
            looked: None,
        };
        // The address is this process's: what stands there was left by one that was killed.
        let place = segment.lease.folder();
        let _ = std::fs::remove_file(place.join(lease::socket_name(segment.address())));
        let own = SocketAddrUnix::new(segment.place(segment.address()))?;
        rustix::net::bind(&segment.door, &own)?;
        rustix::net::listen(&segment.door, BACKLOG)?;
        Ok(segment)
    }

    /// A path to a member's socket that is short enough for `sockaddr_un`, however long its folder's is.
    fn place(&self, address: Ipv4Addr) -> PathBuf {
        use std::os::fd::AsRawFd;
        let folder = PathBuf::from(format!("/proc/self/fd/{}", self.folder.as_raw_fd()));
        folder.join(lease::socket_name(address))
    }

    pub(crate) fn address(&self) -> Ipv4Addr {
        self.lease.address()
    }

    pub(crate) fn attached(&self) -> Attached {
        Attached {
            network: self.name.clone(),
            address: self.address(),
            address6: self.subnets.v6_of(self.address()),
            subnets: self.subnets,
        }
    }

    /// Whether an address is one of the network's.
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        self.subnets.contains(address)
    }

    /// Whether an address is the gateway's.
    pub(crate) fn is_gateway(&self, address: IpAddr) -> bool {
        self.subnets.place(address) == Some(self.subnets.gateway)
    }

    /// Whether an address is the machine's own.
    pub(crate) fn is_own(&self, address: IpAddr) -> bool {
        self.subnets.place(address) == Some(self.address())
    }

    /// Has `watch` tell of those who connect.
    pub(crate) fn start(&self, watch: &Watch<'_>) {
        if let Err(error) = watch.add(self.door.as_fd(), DOOR) {
            tracing::warn!(%error, network = self.name, "Neighbours can't connect");
        }
    }

    /// Something happened to a socket.
    pub(crate) fn note(&mut self, link: LinkId, flags: EventFlags) {
        if link == DOOR {
            self.waiting = true;
            return;
        }
        match self.links.get_mut(&link) {
            // Neighbours say nothing there: it is the end.
            Some(Link::To(to))
                if flags.intersects(EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP) =>
            {
                let peer = to.peer;
                self.forget(peer);
            }
            Some(Link::To(to)) => to.flush(),
            Some(Link::From(from)) => from.readable = true,
            None => {}
        }
    }

    fn forget(&mut self, peer: Ipv4Addr) {
        if let Some(link) = self.to.remove(&peer) {
            self.links.remove(&link);
        }
    }

    fn add(&mut self, link: Link, watch: &Watch<'_>) -> io::Result<LinkId> {
        let id = self.next;
        let socket = match &link {
            Link::To(to) => to.socket.as_fd(),
            Link::From(from) => from.socket.as_fd(),
        };
        watch.add(socket, id)?;
        self.links.insert(id, link);
        self.next = id.checked_add(1).unwrap_or(DOOR + 1);
        Ok(id)
    }

    fn connect(&mut self, peer: Ipv4Addr, watch: &Watch<'_>) -> io::Result<LinkId> {
        let socket = socket()?;
        let there = SocketAddrUnix::new(self.place(peer))?;
        rustix::net::connect(&socket, &there)?;
        let to = To {
            peer,
            socket,
            queue: VecDeque::new(),
            bytes: 0,
        };
        let id = self.add(Link::To(to), watch)?;
        self.to.insert(peer, id);
        Ok(id)
    }

    /// Sends a packet of the guest's to a neighbour; `Ok(false)`: it is lost.
    pub(crate) fn send(
        &mut self,
        packet: &Packet<'_>,
        watch: &Watch<'_>,
    ) -> Result<bool, Unreachable> {
        if !self.is_own(packet.source) {
            return Ok(false);
        }
        let Some(target) = self.subnets.place(packet.target) else {
            // IPv6 has more addresses than machines get.
            return Err(Unreachable::Host);
        };
        let v4 = self.subnets.v4;
        let for_many = target == v4.broadcast() || target == v4.network();
        if target == self.address() || for_many {
            return Ok(false);
        }
        // Once more where the neighbour is gone, and perhaps another has its address.
        for _ in 0..2 {
            let link = match self.to.get(&target) {
                Some(link) => *link,
                None => match self.connect(target, watch) {
                    Ok(link) => link,
                    // It has too many to answer to.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                    Err(_) => return Err(Unreachable::Host),
                },
            };
            match self.links.get_mut(&link) {
                Some(Link::To(to)) => match to.send(packet.bytes) {
                    Ok(sent) => return Ok(sent),
                    Err(_) => self.forget(target),
                },
                _ => self.forget(target),
            }
        }
        Err(Unreachable::Host)
    }

    fn accept(&mut self, watch: &Watch<'_>) {
        while self.waiting {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = match rustix::net::accept_with(&self.door, flags) {
                Ok(socket) => socket,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(_) => {
                    self.waiting = false;
                    return;
                }
            };
            let Ok(credentials) = sockopt::socket_peercred(&socket) else {
                continue;
            };
            if self.links.len() >= MOST_LINKS {
                continue;
            }
            let from = From {
                socket,
                pid: credentials.pid.as_raw_nonzero().get().unsigned_abs(),
                source: None,
                readable: true,
            };
            if let Err(error) = self.add(Link::From(from), watch) {
                tracing::debug!(%error, "A neighbour's connection is dropped");
            }
        }
    }

    /// Passes what neighbours sent to the guest, as far as it has room.
    pub(crate) fn serve(
        &mut self,
        buffer: &mut [u8],
        outlet: &Outlet,
        watch: &Watch<'_>,
    ) -> Passed {
        self.accept(watch);
        let (own, subnets) = (self.address(), self.subnets);
        let mut passed = Passed::default();
        let mut gone = Vec::new();
        for (id, link) in &mut self.links {
            let Link::From(from) = link else {
                continue;
            };
            let mut left = TURN;
            while from.readable && outlet.has_room() {
                if left == 0 {
                    passed.more = true;
                    break;
                }
                left -= 1;
                match rustix::net::recv(&from.socket, &mut *buffer, RecvFlags::empty()) {
                    Ok((0, _)) => {
                        gone.push(*id);
                        break;
                    }
                    Ok((len, _)) => {
                        let bytes = buffer.get(..len).unwrap_or_default();
                        let owner = |address| lease::owner(self.lease.folder(), address);
                        let good = Packet::parse(bytes)
                            .filter(|packet| subnets.place(packet.target) == Some(own))
                            .filter(|packet| !packet.is_discovery())
                            .filter(|packet| {
                                let source = subnets.place(packet.source);
                                source.is_some_and(|source| from.may_send(source, owner))
                            });
                        match good {
                            Some(packet) => {
                                let copy = |to: &mut [u8]| to.copy_from_slice(packet.bytes);
                                outlet.packet(packet.bytes.len(), copy);
                                passed.packets += 1;
                            }
                            None => passed.dropped += 1,
                        }
                    }
                    Err(Errno::AGAIN) => from.readable = false,
                    Err(Errno::INTR) => {}
                    Err(_) => {
                        gone.push(*id);
                        break;
                    }
                }
            }
        }
        for id in gone {
            self.links.remove(&id);
        }
        passed
    }

    /// The addresses of the members with this name, which may have the network's behind it.
    pub(crate) fn find(&mut self, name: &str) -> Vec<IpAddr> {
        if self.looked.is_none_or(|at| at.elapsed() >= FRESH) {
            self.known = members(self.lease.folder()).unwrap_or_default();
            self.looked = Some(Instant::now());
        }
        let suffix = format!(".{}", self.name.to_ascii_lowercase());
        let short = name.strip_suffix(&suffix);
        let found = self.known.iter().filter(|member| {
            let mut names = member.names.iter().take(MOST_NAMES);
            names.any(|own| own == name || Some(&**own) == short)
        });
        let addresses = |member: &Member| {
            let v6 = self.subnets.v6_of(member.address).map(IpAddr::V6);
            [Some(IpAddr::V4(member.address)), v6].into_iter().flatten()
        };
        found.flat_map(addresses).collect()
    }
}

impl To {
    /// Sends a packet or has it wait; `false`: it is lost, for too much waits.
    fn send(&mut self, packet: &[u8]) -> io::Result<bool> {
        if self.queue.is_empty() {
            match rustix::net::send(&self.socket, packet, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(true),
                Err(Errno::AGAIN | Errno::NOBUFS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if self.bytes + packet.len() > QUEUE {
            return Ok(false);
        }
        self.bytes += packet.len();
        self.queue.push_back(packet.to_vec());
        Ok(true)
    }

    fn flush(&mut self) {
        while let Some(packet) = self.queue.front() {
            if rustix::net::send(&self.socket, packet, SendFlags::NOSIGNAL).is_err() {
                return;
            }
            self.bytes -= packet.len();
            self.queue.pop_front();
        }
    }
}

impl From {
    /// Whether packets from `source` may come this way: it is the address of the process that sends them.
    fn may_send(&mut self, source: Ipv4Addr, owner: impl FnOnce(Ipv4Addr) -> Option<u32>) -> bool {
        if self.source.is_none() && owner(source) == Some(self.pid) {
            self.source = Some(source);
        }
        self.source == Some(source)
    }
}

impl std::fmt::Debug for Segment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Segment")
            .field("name", &self.name)
            .field("address", &self.address())
            .finish_non_exhaustive()
    }
}
