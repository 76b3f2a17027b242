//! Those who come to published ports.

use std::hash::BuildHasher;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use smoltcp::time::Instant;

use super::{Flow, Key, MOST_TCP, Stack};
use crate::address::{GUEST_V4, gateway};
use crate::datagram::Datagram;
use crate::publish::Door;
use crate::tcp::{Tcp, buffer_len};
use crate::wire;

/// Connections that are accepted before others have their turn.
const ACCEPTED: usize = 128;
/// Connections of a published port's that the guest may be about to answer. More wait at the door: a guest
/// that has too many of them (RFC 4987, 3.6) answers with cookies, and forgets those for whom its program
/// has no room at that moment, while they are told that they are connected.
const OPENING: usize = 16;
/// First port of the gateway's that they get.
const FIRST_PORT: u16 = 10_000;
/// Whatever happens to a listener, it is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// How long the guest may take to answer a datagram, at least.
const ANSWER: Duration = Duration::from_secs(30);

/// The ports of the gateway's, which they get in turn.
pub(super) struct Ports(u16);

impl Default for Ports {
    fn default() -> Self {
        Self(FIRST_PORT)
    }
}

impl Ports {
    fn next(&mut self) -> u16 {
        let port = self.0;
        self.0 = port.checked_add(1).unwrap_or(FIRST_PORT);
        port
    }
}

impl Stack {
    /// Takes those who wait at published ports; whether there may be more.
    pub(super) fn accept(&mut self) -> bool {
        let now = self.now();
        if self.short.is_some_and(|until| now < until) || !self.outlet.port().is_live() {
            return false;
        }
        self.short = None;
        let mut more = false;
        for number in 0..self.listeners.len() {
            let mut left = ACCEPTED;
            while self.listeners[number].ready && self.short.is_none() {
                let listener = &self.listeners[number];
                if listener.opening >= OPENING {
                    break;
                }
                if left == 0 || !self.outlet.has_room() {
                    more |= left == 0;
                    break;
                }
                left -= 1;
                self.accept_one(number, now);
            }
        }
        more
    }

    fn accept_one(&mut self, number: usize, now: Instant) {
        if self.connections >= MOST_TCP {
            self.short = Some(now + RETRY.into());
            return;
        }
        let listener = &mut self.listeners[number];
        let guest = SocketAddr::new(GUEST_V4.into(), listener.published.guest);
        let failed = match &listener.door {
            Door::Tcp(door) => match door.accept() {
                Ok((host, _)) => {
                    if let Err(error) = self.admit(number, guest, host, now) {
                        tracing::debug!(%error, "A connection to a published port is dropped");
                        self.counters.refused += 1;
                    }
                    return;
                }
                Err(error) => error,
            },
            Door::Udp(door) => match door.recv_from(&mut self.buffer) {
                Ok((len, client)) => return self.deliver((number, client), guest, len, now),
                Err(error) => error,
            },
        };
        match failed.kind() {
            io::ErrorKind::WouldBlock => listener.ready = false,
            io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => {}
            // An error of one client's; the queue goes on behind it.
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => {}
            _ => self.short = Some(now + RETRY.into()),
        }
    }

    /// A port of the gateway's that nobody has who talks to `guest`.
    fn free_port(&mut self, protocol: u8, guest: SocketAddr) -> Option<SocketAddr> {
        for _ in FIRST_PORT..=u16::MAX {
            let peer = SocketAddr::new(gateway(guest.ip()), self.ports.next());
            let key = Key {
                protocol,
                guest,
                peer,
            };
            if !self.tokens.contains_key(&key) {
                return Some(peer);
            }
        }
        None
    }

    /// Connects one who came to a published port to the guest.
    fn admit(
        &mut self,
        door: usize,
        guest: SocketAddr,
        host: TcpStream,
        now: Instant,
    ) -> io::Result<()> {
        host.set_nonblocking(true)?;
        host.set_nodelay(true)?;
        let peer = self.free_port(wire::TCP, guest);
        let peer = peer.ok_or_else(|| io::Error::other("no port is free"))?;
        let key = Key {
            protocol: wire::TCP,
            guest,
            peer,
        };
        self.watch(host.as_fd(), self.next_token)?;
        let setting = (
            buffer_len(self.connections),
            self.seed.hash_one(self.next_token),
        );
        let tcp = Tcp::connect(door, (guest, peer, host), setting, &self.outlet, now);
        self.listeners[door].opening += 1;
        let token = self.add(key, Flow::Tcp(Box::new(tcp)));
        self.counters.tcp_accepted += 1;
        self.make_due(token);
        Ok(())
    }

    /// Gives the guest a datagram that came to a published port.
    fn deliver(
        &mut self,
        client: (usize, SocketAddr),
        guest: SocketAddr,
        len: usize,
        now: Instant,
    ) {
        let token = match self.clients.get(&client) {
            Some(&token) => token,
            None => {
                self.make_place();
                let Some(peer) = self.free_port(wire::UDP, guest) else {
                    self.counters.refused += 1;
                    return;
                };
                let key = Key {
                    protocol: wire::UDP,
                    guest,
                    peer,
                };
                let flow = Datagram::client((guest, peer), client, now);
                self.counters.datagram_flows += 1;
                self.add(key, Flow::Datagram(Box::new(flow)))
            }
        };
        if let Some(Flow::Datagram(datagram)) = self.flows.get_mut(&token).map(|e| &mut e.flow) {
            datagram.pass(self.buffer.get(..len).unwrap_or_default(), &self.outlet);
            datagram.expires = datagram.expires.max(now + ANSWER.into());
            let expires = datagram.expires;
            self.set_timer(token, Some(expires));
        }
    }
}
