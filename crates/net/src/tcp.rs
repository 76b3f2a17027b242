//! A TCP connection of the guest's, spliced to one of the host's.
//!
//! ```text
//!  guest ─ segments ─► smoltcp socket ─ receive buffer ─► host socket
//!        ◄─ segments ─                ◄─ send buffer ────
//! ```
//! A full buffer closes the window on the one side or leaves data in the host's socket on the other. The
//! ends of both directions pass separately, and so does a reset.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpEndpoint};

use crate::address::MTU;
use crate::outlet::Outlet;

/// How long the guest may take to answer a connection to a published port.
const PATIENCE: Duration = Duration::from_secs(60);

/// The link of one connection: a packet in, packets out.
struct Pipe<'a> {
    input: Option<&'a [u8]>,
    outlet: &'a Outlet,
    /// Sends even where there is little room.
    forced: bool,
    /// Something was not sent for want of room.
    blocked: bool,
}

struct Rx<'a>(&'a [u8]);
struct Tx<'a>(&'a Outlet);

impl RxToken for Rx<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, with: F) -> R {
        with(self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, with: F) -> R {
        self.0.packet(len, with)
    }
}

impl<'p> Pipe<'p> {
    const fn new(outlet: &'p Outlet) -> Self {
        Self {
            input: None,
            outlet,
            forced: false,
            blocked: false,
        }
    }
}

impl<'p> Device for Pipe<'p> {
    type RxToken<'a>
        = Rx<'p>
    where
        Self: 'a;
    type TxToken<'a>
        = Tx<'p>
    where
        Self: 'a;

    fn receive(&mut self, _now: Instant) -> Option<(Rx<'p>, Tx<'p>)> {
        self.input.take().map(|input| (Rx(input), Tx(self.outlet)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Tx<'p>> {
        if self.forced || self.outlet.has_room() {
            return Some(Tx(self.outlet));
        }
        self.blocked = true;
        None
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(MTU);
        // Nothing is damaged on the way through memory; for the guest the card does it.
        capabilities.checksum.tcp = Checksum::None;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities
    }
}

/// What becomes of a connection after it was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It goes on; to be served again at this time at the latest, and when there is room if it was
    /// blocked.
    Goes {
        again: Option<Instant>,
        blocked: bool,
    },
    /// It has ended, or was broken.
    Over,
}

pub(crate) struct Tcp {
    iface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    host: TcpStream,
    /// The host's socket may have data, or room.
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The host's end has sent all.
    host_ended: bool,
    /// The guest has sent all, and the host's socket was told.
    guest_ended: bool,
    /// The guest broke the connection.
    reset: bool,
    began: Instant,
    /// The published port that it came to, until the guest has answered.
    door: Option<usize>,
}

/// Bytes of each of a connection's buffers, by how many connections there are: together they stay small.
pub(crate) const fn buffer_len(connections: usize) -> usize {
    match connections {
        0..64 => 256 << 10,
        64..512 => 64 << 10,
        512..2048 => 16 << 10,
        _ => 8 << 10,
    }
}

fn endpoint(end: SocketAddr) -> IpEndpoint {
    IpEndpoint::new(end.ip().into(), end.port())
}

impl Tcp {
    fn new(
        peer: SocketAddr,
        host: TcpStream,
        buffers: usize,
        seed: u64,
        outlet: &Outlet,
        now: Instant,
    ) -> Self {
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut iface = Interface::new(config, &mut Pipe::new(outlet), now);
        let address: IpAddress = peer.ip().into();
        let bits = match peer.ip() {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        };
        iface.update_ip_addrs(|addresses| {
            // The first of two that there is room for.
            let _ = addresses.push(IpCidr::new(address, bits));
        });
        // To itself: everything is at the other end of the pipe. There is room for one of each family.
        match peer.ip() {
            IpAddr::V4(gateway) => iface.routes_mut().add_default_ipv4_route(gateway).map(drop),
            IpAddr::V6(gateway) => iface.routes_mut().add_default_ipv6_route(gateway).map(drop),
        }
        .unwrap_or_default();
        let buffer = || SocketBuffer::new(vec![0; buffers]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self {
            iface,
            sockets,
            handle,
            host,
            readable: true,
            writable: true,
            host_ended: false,
            guest_ended: false,
            reset: false,
            began: now,
            door: None,
        }
    }

    /// Answers the guest's `syn` to `peer`, now that the host is connected.
    pub(crate) fn answer(
        (peer, host): (SocketAddr, TcpStream),
        syn: &[u8],
        (buffers, seed): (usize, u64),
        outlet: &Outlet,
        now: Instant,
    ) -> Self {
        let mut tcp = Self::new(peer, host, buffers, seed, outlet, now);
        // A socket that is closed listens at any port but zero, at which nothing can be.
        tcp.reset = tcp.socket().listen(endpoint(peer)).is_err();
        tcp.input(syn, outlet, now);
        tcp
    }

    /// Connects to the guest for one who connected to the published port of number `door`.
    pub(crate) fn connect(
        door: usize,
        (guest, peer, host): (SocketAddr, SocketAddr, TcpStream),
        (buffers, seed): (usize, u64),
        outlet: &Outlet,
        now: Instant,
    ) -> Self {
        let mut tcp = Self::new(peer, host, buffers, seed, outlet, now);
        let context = tcp.iface.context();
        let socket = tcp.sockets.get_mut::<Socket<'_>>(tcp.handle);
        let asked = socket.connect(context, endpoint(guest), endpoint(peer));
        tcp.reset = asked.is_err();
        tcp.door = Some(door);
        tcp
    }

    /// The published port that it came to, once, when the guest has answered.
    pub(crate) fn opened(&mut self) -> Option<usize> {
        match self.socket().state() {
            State::SynSent => None,
            _ => self.door.take(),
        }
    }

    /// The same when nobody waits for its answer any more.
    pub(crate) fn given_up(&mut self) -> Option<usize> {
        self.door.take()
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// Takes a packet of the guest's; [`serve`](Self::serve) comes next.
    pub(crate) fn input(&mut self, packet: &[u8], outlet: &Outlet, now: Instant) {
        let before = self.socket().state();
        let mut pipe = Pipe::new(outlet);
        pipe.input = Some(packet);
        self.iface
            .poll_ingress_single(now, &mut pipe, &mut self.sockets);
        let ending = matches!(before, State::LastAck | State::Closing | State::TimeWait);
        self.reset |= match self.socket().state() {
            State::Closed => !ending,
            // A reset takes a socket that was about to be connected back to where it was.
            State::Listen => true,
            _ => false,
        };
    }

    /// Passes on what can be, in both directions.
    pub(crate) fn serve(&mut self, outlet: &Outlet, now: Instant) -> Fate {
        if self.reset {
            self.break_host();
            return Fate::Over;
        }
        let passed = self.drain_to_host().and_then(|()| self.fill_from_host());
        if passed.is_err() {
            self.break_guest(outlet, now);
            return Fate::Over;
        }
        let mut pipe = Pipe::new(outlet);
        while let PollResult::SocketStateChanged =
            self.iface.poll_egress(now, &mut pipe, &mut self.sockets)
        {}
        let blocked = pipe.blocked;
        let guest_ended = self.guest_ended;
        match self.socket().state() {
            State::Closed | State::TimeWait if guest_ended && !blocked => return Fate::Over,
            State::SynSent if now - self.began > PATIENCE.into() => {
                self.break_guest(outlet, now);
                return Fate::Over;
            }
            _ => {}
        }
        let again = self.iface.poll_at(now, &self.sockets);
        Fate::Goes {
            // What is due and blocked waits for room, not for time.
            again: again.filter(|at| !blocked || *at > now),
            blocked,
        }
    }

    /// Passes on what the guest sent, and its end.
    fn drain_to_host(&mut self) -> io::Result<()> {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        while self.writable && socket.can_recv() {
            let host = &mut self.host;
            let wrote = socket.recv(|data| match host.write(data) {
                Ok(len) => (len, Ok(true)),
                Err(error) => (0, unless_later(error).map(|()| false)),
            });
            match wrote {
                Ok(result) => self.writable = result?,
                Err(_) => break,
            }
        }
        let ended = matches!(
            socket.state(),
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait | State::Closed
        );
        if ended && !self.guest_ended && socket.recv_queue() == 0 {
            self.guest_ended = true;
            match self.host.shutdown(std::net::Shutdown::Write) {
                // Both ends closed at once.
                Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// Takes what the host's end sent, as far as there is room, and its end.
    fn fill_from_host(&mut self) -> io::Result<()> {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        while self.readable && !self.host_ended && socket.can_send() {
            let host = &mut self.host;
            let read = socket.send(|room| match host.read(room) {
                Ok(len) => (len, Ok(Some(len))),
                Err(error) => (0, unless_later(error).map(|()| None)),
            });
            match read {
                Ok(result) => match result? {
                    Some(0) => {
                        self.host_ended = true;
                        socket.close();
                    }
                    Some(_) => {}
                    None => self.readable = false,
                },
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Whoever has the host's end learns that the connection broke.
    fn break_host(&self) {
        let _ = rustix::net::sockopt::set_socket_linger(&self.host, Some(Duration::ZERO));
    }

    /// The guest learns that the connection broke.
    fn break_guest(&mut self, outlet: &Outlet, now: Instant) {
        self.break_host();
        self.socket().abort();
        let mut pipe = Pipe::new(outlet);
        pipe.forced = true;
        self.iface.poll_egress(now, &mut pipe, &mut self.sockets);
    }

    pub(crate) const fn host(&self) -> &TcpStream {
        &self.host
    }
}

/// An error that isn't merely "not now".
fn unless_later(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::WouldBlock => Ok(()),
        io::ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}
