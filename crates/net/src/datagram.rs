//! Flows of datagrams: UDP and echo requests, each by a connected socket of the host's that nobody else
//! can send to, and datagrams from published ports.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};
use smoltcp::time::Instant;

use crate::outlet::{Outlet, Unreachable};
use crate::stack::Heard;
use crate::wire::{self, Packet};

/// How long a flow lives without a packet (RFC 4787 asks for two minutes at least).
const IDLE: Duration = Duration::from_secs(120);
/// The same for questions and echoes.
const SHORT: Duration = Duration::from_secs(20);
/// A name server that takes longer is not asked again.
const DNS_PATIENCE: Duration = Duration::from_secs(1);
/// Questions of one flow that are asked anew when a server turns out to be none.
const QUESTIONS: usize = 16;
/// Bytes of a packet that are kept for an error's sake.
const QUOTED: usize = 64;

enum Kind {
    Udp(UdpSocket),
    Dns(Dns),
    Echo(OwnedFd),
    /// Somebody who sent to a published port.
    Client {
        listener: usize,
        client: SocketAddr,
    },
}

struct Dns {
    socket: UdpSocket,
    questions: Vec<Vec<u8>>,
    /// When a question was asked that has no answer.
    asked: Option<Instant>,
}

pub(crate) struct Datagram {
    guest: SocketAddr,
    /// The other end, as the guest knows it.
    peer: SocketAddr,
    kind: Kind,
    pub(crate) expires: Instant,
    /// The socket may have something.
    pub(crate) readable: bool,
    /// The start of the last packet that the guest sent.
    quote: Vec<u8>,
}

fn unspecified(family: IpAddr) -> SocketAddr {
    let address: IpAddr = match family {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(address, 0)
}

fn connected(to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(unspecified(to.ip()))?;
    socket.set_nonblocking(true)?;
    socket.connect(to)?;
    Ok(socket)
}

impl Datagram {
    fn new((guest, peer): (SocketAddr, SocketAddr), kind: Kind, now: Instant) -> Self {
        Self {
            guest,
            peer,
            kind,
            expires: now + SHORT.into(),
            readable: false,
            quote: Vec::new(),
        }
    }

    /// From the guest to `to`, which it knows as `ends.1`.
    pub(crate) fn udp(
        ends: (SocketAddr, SocketAddr),
        to: SocketAddr,
        now: Instant,
    ) -> io::Result<Self> {
        Ok(Self::new(ends, Kind::Udp(connected(to)?), now))
    }

    /// Questions of the guest's for a name server of the host's.
    pub(crate) fn dns(
        ends: (SocketAddr, SocketAddr),
        to: SocketAddr,
        now: Instant,
    ) -> io::Result<Self> {
        let kind = Kind::Dns(Dns {
            socket: connected(to)?,
            questions: Vec::new(),
            asked: None,
        });
        Ok(Self::new(ends, kind, now))
    }

    /// Echo requests; the ports of the guest's end are the identifier.
    pub(crate) fn echo(
        ends: (SocketAddr, SocketAddr),
        to: IpAddr,
        now: Instant,
    ) -> io::Result<Self> {
        let (family, protocol) = match to {
            IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
            IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, Some(protocol))?;
        rustix::net::connect(&socket, &SocketAddr::new(to, 0))?;
        Ok(Self::new(ends, Kind::Echo(socket), now))
    }

    /// Datagrams of a client of a published port.
    pub(crate) fn client(
        ends: (SocketAddr, SocketAddr),
        (listener, client): (usize, SocketAddr),
        now: Instant,
    ) -> Self {
        Self::new(ends, Kind::Client { listener, client }, now)
    }

    /// The socket to be waited for, if it has one of its own.
    pub(crate) fn socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Udp(socket) => Some(socket.as_fd()),
            Kind::Dns(dns) => Some(dns.socket.as_fd()),
            Kind::Echo(socket) => Some(socket.as_fd()),
            Kind::Client { .. } => None,
        }
    }

    /// The client of a published port that it is of.
    pub(crate) const fn of_client(&self) -> Option<(usize, SocketAddr)> {
        match self.kind {
            Kind::Client { listener, client } => Some((listener, client)),
            _ => None,
        }
    }

    /// Sends what the guest's packet carries. `door` is the socket of the published port.
    pub(crate) fn send(
        &mut self,
        packet: &Packet<'_>,
        door: Option<&UdpSocket>,
        outlet: &Outlet,
        now: Instant,
    ) {
        let Some(data) = (match self.kind {
            Kind::Echo(_) => Some(packet.payload),
            _ => packet.datagram(),
        }) else {
            return;
        };
        self.quote.clear();
        let quoted = packet.bytes.get(..QUOTED).unwrap_or(packet.bytes);
        self.quote.extend_from_slice(quoted);
        let life = match self.kind {
            Kind::Udp(_) | Kind::Client { .. } => IDLE,
            Kind::Dns(_) | Kind::Echo(_) => SHORT,
        };
        self.expires = now + life.into();
        let sent = match &mut self.kind {
            Kind::Udp(socket) => socket.send(data).map(drop),
            Kind::Dns(dns) => {
                dns.asked.get_or_insert(now);
                if dns.questions.len() == QUESTIONS {
                    dns.questions.remove(0);
                }
                dns.questions.push(data.to_vec());
                dns.socket.send(data).map(drop)
            }
            Kind::Echo(socket) => rustix::net::send(socket, data, SendFlags::empty())
                .map(drop)
                .map_err(Into::into),
            Kind::Client { client, .. } => match door {
                Some(door) => door.send_to(data, *client).map(drop),
                None => Ok(()),
            },
        };
        if let Err(error) = sent {
            self.failed(&error, outlet);
        }
    }

    /// Passes on what has come for the guest; `false` if there may be more, for which there is no room.
    pub(crate) fn receive(
        &mut self,
        buffer: &mut [u8],
        outlet: &Outlet,
        heard: &mut Heard<'_>,
    ) -> bool {
        while self.readable {
            if !outlet.has_room() {
                return false;
            }
            let received = match &self.kind {
                Kind::Udp(socket) => socket.recv(buffer),
                Kind::Dns(dns) => dns.socket.recv(buffer),
                Kind::Echo(socket) => rustix::net::recv(socket, &mut *buffer, RecvFlags::empty())
                    .map(|(len, _)| len)
                    .map_err(Into::into),
                Kind::Client { .. } => return true,
            };
            match received {
                Ok(len) => {
                    let data = buffer.get(..len).unwrap_or_default();
                    let known = match &self.kind {
                        Kind::Dns(dns) => heard.answer(&dns.questions, data),
                        _ => true,
                    };
                    if known {
                        self.pass(data, outlet);
                    }
                    self.expires = self.expires.max(heard.now + SHORT.into());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                // It has told of an error that came back; what comes next may be data.
                Err(error) => self.failed(&error, outlet),
            }
        }
        true
    }

    /// Gives the guest what came from the other end.
    pub(crate) fn pass(&mut self, data: &[u8], outlet: &Outlet) {
        match &mut self.kind {
            Kind::Udp(_) | Kind::Client { .. } => outlet.udp(self.peer, self.guest, data),
            Kind::Dns(dns) => {
                dns.asked = None;
                let id = data.get(..2);
                dns.questions.retain(|question| question.get(..2) != id);
                outlet.udp(self.peer, self.guest, data);
            }
            Kind::Echo(_) => {
                let ends = (self.peer.ip(), self.guest.ip());
                let (protocol, reply) = match ends.0 {
                    IpAddr::V4(_) => (wire::ICMP, 0),
                    IpAddr::V6(_) => (wire::ICMPV6, 129),
                };
                // The kernel has put an identifier of its own into the request.
                if let ([kind, 0, _, _, _, _, high, low], Some(body)) = (
                    data.first_chunk().copied().unwrap_or([255; 8]),
                    data.get(8..),
                ) && kind == reply
                {
                    let [id_high, id_low] = self.guest.port().to_be_bytes();
                    let rest = [id_high, id_low, high, low];
                    outlet.ip(ends, protocol, &[&wire::icmp(ends, (reply, 0), rest, body)]);
                }
            }
        }
    }

    fn failed(&self, error: &io::Error, outlet: &Outlet) {
        let why = match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::CONNREFUSED) => Unreachable::Port,
            Some(Errno::HOSTUNREACH | Errno::NETUNREACH) => Unreachable::Host,
            _ => return,
        };
        // Another server may do.
        if !matches!(self.kind, Kind::Dns(_)) {
            let quoted = Packet {
                source: self.guest.ip(),
                target: self.peer.ip(),
                protocol: wire::UDP,
                payload: &[],
                bytes: &self.quote,
            };
            outlet.unreachable(&quoted, why);
        }
    }

    /// Whether its name server doesn't answer.
    pub(crate) fn is_ignored(&self, now: Instant) -> bool {
        match &self.kind {
            Kind::Dns(dns) => dns.asked.is_some_and(|at| now - at >= DNS_PATIENCE.into()),
            _ => false,
        }
    }

    /// Whether its name server turned out to be none. The error is gone then.
    pub(crate) fn is_refused(&self) -> bool {
        match &self.kind {
            Kind::Dns(dns) => matches!(dns.socket.take_error(), Ok(Some(_)) | Err(_)),
            _ => false,
        }
    }

    /// Asks another name server what has no answer.
    pub(crate) fn ask(&mut self, server: SocketAddr, now: Instant) -> io::Result<()> {
        if let Kind::Dns(dns) = &mut self.kind {
            dns.socket = connected(server)?;
            dns.asked = Some(now);
            for question in &dns.questions {
                dns.socket.send(question)?;
            }
        }
        Ok(())
    }
}
