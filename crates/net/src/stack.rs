//! All flows of one guest: which packet belongs to which, and who is served when.

mod doors;
mod neighbours;
mod reach;

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::time::Timespec;
use skerry_devices::virtio::net::{Connection, MAX_CONNECTIONS, NetPort};
use smoltcp::time::Instant;

use doors::Ports;
use neighbours::{is_of_neighbour, place_of, segment_base, segment_of};
pub(crate) use reach::Heard;

use crate::address::{GUEST_MAC, Place};
use crate::counters::Counters;
use crate::datagram::Datagram;
use crate::dhcp;
use crate::fragments::{Fragment, Reassembly};
use crate::local;
use crate::network::Options;
use crate::outlet::{Outlet, Unreachable};
use crate::policy::{Denial, Policy};
use crate::publish::{Door, Listener};
use crate::resolvers::Resolvers;
use crate::segment::{Segment, Watch};
use crate::tcp::{Fate, Tcp, buffer_len};
use crate::wire::{self, Frame, Packet};

/// What the epoll instance calls the event that wakes its thread.
pub(crate) const WAKE: u64 = 0;
/// Listeners come next, then flows.
const FIRST_FLOW: u64 = 1 << 32;
/// Links of shared networks are last: a bit, the number of the network, the number of the link.
const SEGMENTS: u64 = 1 << 63;
const SEGMENT_SHIFT: u32 = 32;
/// The most TCP connections; as many as a saved state has room for.
const MOST_TCP: usize = MAX_CONNECTIONS;
/// The most flows of datagrams.
const MOST_DATAGRAM: usize = 2048;
/// Batches of the guest's frames that are handled before others have their turn.
const ROUNDS: usize = 16;
/// The longest datagram.
const DATAGRAM: usize = 65_536;
const DNS_PORT: u16 = 53;

/// What tells flows apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    protocol: u8,
    guest: SocketAddr,
    peer: SocketAddr,
}

/// A connection of the guest's that the host is still at.
struct Connecting {
    socket: OwnedFd,
    syn: Vec<u8>,
}

enum Flow {
    Connecting(Connecting),
    Tcp(Box<Tcp>),
    Datagram(Box<Datagram>),
}

struct Entry {
    key: Key,
    flow: Flow,
    timer: Option<Instant>,
    /// It stands in the list of those to be served.
    due: bool,
}

pub(crate) struct Stack {
    policy: Policy,
    resolvers: Resolvers,
    /// Which name server answered last.
    resolver: usize,
    outlet: Outlet,
    fragments: Reassembly,
    epoll: Arc<OwnedFd>,
    began: std::time::Instant,
    flows: HashMap<u64, Entry>,
    tokens: HashMap<Key, u64>,
    /// Flows of those who send to published ports, by port and sender.
    clients: HashMap<(usize, SocketAddr), u64>,
    next_token: u64,
    ports: Ports,
    connections: usize,
    timers: BTreeSet<(Instant, u64)>,
    due: Vec<u64>,
    blocked: Vec<u64>,
    listeners: Vec<Listener>,
    segments: Vec<Segment>,
    /// Connections that the guest has from an earlier life, which are to break.
    lost: Vec<Connection>,
    counters: Counters,
    seed: RandomState,
    buffer: Vec<u8>,
    /// Descriptors ran out: listeners wait until then.
    short: Option<Instant>,
}

impl Stack {
    pub(crate) fn new(
        port: NetPort,
        epoll: Arc<OwnedFd>,
        options: &Options,
        listeners: Vec<Listener>,
        segments: Vec<Segment>,
    ) -> Self {
        for (number, listener) in (1_u64..).zip(&listeners) {
            let door = match &listener.door {
                Door::Tcp(door) => door.as_fd(),
                Door::Udp(door) => door.as_fd(),
            };
            let data = epoll::EventData::new_u64(number);
            // Without it, the port is looked at whenever something else happens.
            if let Err(error) = epoll::add(&*epoll, door, data, EventFlags::IN | EventFlags::ET) {
                tracing::warn!(%error, port = %listener.published, "A published port is slow");
            }
        }
        for (number, segment) in segments.iter().enumerate() {
            segment.start(&Watch {
                epoll: &epoll,
                base: segment_base(number),
            });
        }
        Self {
            policy: Policy::new(options.mode, &options.allow, &options.deny),
            resolvers: Resolvers::new(&options.dns),
            resolver: 0,
            outlet: Outlet::new(port, GUEST_MAC),
            fragments: Reassembly::default(),
            epoll,
            began: std::time::Instant::now(),
            flows: HashMap::new(),
            tokens: HashMap::new(),
            clients: HashMap::new(),
            next_token: FIRST_FLOW,
            ports: Ports::default(),
            connections: 0,
            timers: BTreeSet::new(),
            due: Vec::new(),
            blocked: Vec::new(),
            listeners,
            segments,
            lost: Vec::new(),
            counters: Counters::default(),
            seed: RandomState::new(),
            buffer: vec![0; DATAGRAM],
            short: None,
        }
    }

    fn now(&self) -> Instant {
        let elapsed = self.began.elapsed().as_micros();
        Instant::from_micros(i64::try_from(elapsed).unwrap_or(i64::MAX))
    }

    pub(crate) fn counters(&self) -> Counters {
        Counters {
            frames_to_guest: self.outlet.frames(),
            bytes_to_guest: self.outlet.bytes(),
            ..self.counters
        }
    }

    pub(crate) fn denials(&self) -> Vec<Denial> {
        self.policy.denials()
    }

    pub(crate) fn connections(&self) -> Vec<Connection> {
        let open = self.flows.values();
        let open = open.filter(|entry| matches!(entry.flow, Flow::Tcp(_)));
        open.map(|entry| Connection {
            guest: entry.key.guest,
            peer: entry.key.peer,
        })
        .chain(self.lost.iter().copied())
        .collect()
    }

    /// The guest is another one: what it had to do with the host is over.
    pub(crate) fn replace(&mut self, connections: Vec<Connection>) {
        for entry in self.flows.values() {
            if let Flow::Tcp(tcp) = &entry.flow {
                let _ = rustix::net::sockopt::set_socket_linger(tcp.host(), Some(Duration::ZERO));
            }
        }
        self.flows.clear();
        for listener in &mut self.listeners {
            listener.opening = 0;
        }
        self.tokens.clear();
        self.clients.clear();
        self.timers.clear();
        self.due.clear();
        self.blocked.clear();
        self.connections = 0;
        self.fragments.clear();
        self.policy.forget();
        self.lost = connections;
    }

    /// Does what there is to do; gives how long to wait for more.
    pub(crate) fn turn(&mut self, events: &[(u64, EventFlags)]) -> Option<Timespec> {
        for (token, flags) in events {
            self.note(*token, *flags);
        }
        let mut busy = false;
        for _ in 0..ROUNDS {
            // With no room for answers, questions wait; the card wakes this thread when there is some.
            busy = self.outlet.has_room();
            if !busy {
                break;
            }
            let frames = self.outlet.port().receive();
            if frames.is_empty() {
                busy = false;
                break;
            }
            self.frames(&frames);
            self.serve_due();
            self.outlet.port().flush();
        }
        self.fire_timers();
        self.counters.dropped += self.fragments.expire(self.now());
        self.break_lost();
        busy |= self.accept();
        busy |= self.serve_segments();
        self.serve_due();
        self.outlet.port().flush();
        for _ in 0..ROUNDS {
            if self.blocked.is_empty() || !self.outlet.has_room() {
                break;
            }
            for token in std::mem::take(&mut self.blocked) {
                self.make_due(token);
            }
            self.serve_due();
            self.outlet.port().flush();
        }
        if busy || !self.blocked.is_empty() && self.outlet.has_room() {
            return Some(Timespec::default());
        }
        self.next_timeout()
    }

    fn next_timeout(&self) -> Option<Timespec> {
        let first = self.timers.first().map(|(at, _)| *at);
        let all = [first, self.short, self.fragments.deadline()];
        let at = all.into_iter().flatten().min()?;
        let micros = (at - self.now().min(at)).total_micros();
        // Up, so that it is due then.
        let micros = micros.saturating_add(1);
        Timespec::try_from(Duration::from_micros(micros)).ok()
    }

    /// What the guest sent last goes out as far as that can be done at once.
    pub(crate) fn finish(&mut self) {
        let frames = self.outlet.port().take();
        self.frames(&frames);
        let all: Vec<u64> = self.flows.keys().copied().collect();
        for token in all {
            self.make_due(token);
        }
        self.serve_due();
    }

    fn note(&mut self, token: u64, flags: EventFlags) {
        if token & SEGMENTS != 0 {
            return self.note_segment(token, flags);
        }
        if token < FIRST_FLOW {
            let listener = usize::try_from(token - 1).ok();
            if let Some(listener) = listener.and_then(|number| self.listeners.get_mut(number)) {
                listener.ready = true;
            }
            return;
        }
        let Some(entry) = self.flows.get_mut(&token) else {
            return;
        };
        let broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
        let readable = broken || flags.intersects(EventFlags::IN | EventFlags::RDHUP);
        let writable = broken || flags.contains(EventFlags::OUT);
        match &mut entry.flow {
            Flow::Connecting(_) if writable => return self.connected(token),
            Flow::Connecting(_) => return,
            Flow::Tcp(tcp) => {
                tcp.readable |= readable;
                tcp.writable |= writable;
            }
            Flow::Datagram(datagram) => datagram.readable |= readable,
        }
        self.make_due(token);
    }

    fn make_due(&mut self, token: u64) {
        if let Some(entry) = self.flows.get_mut(&token)
            && !entry.due
        {
            entry.due = true;
            self.due.push(token);
        }
    }

    fn serve_due(&mut self) {
        for token in std::mem::take(&mut self.due) {
            let now = self.now();
            let Some(entry) = self.flows.get_mut(&token) else {
                continue;
            };
            entry.due = false;
            let fate = match &mut entry.flow {
                Flow::Connecting(_) => continue,
                Flow::Tcp(tcp) => {
                    let fate = tcp.serve(&self.outlet, now);
                    if let Some(door) = tcp.opened() {
                        self.listeners[door].opening -= 1;
                    }
                    fate
                }
                Flow::Datagram(datagram) => {
                    let refused = datagram.is_refused();
                    let mut heard = Heard::new(&mut self.policy, now);
                    let blocked = !datagram.receive(&mut self.buffer, &self.outlet, &mut heard);
                    let expires = datagram.expires;
                    if refused {
                        self.ask_another(token, now);
                    }
                    Fate::Goes {
                        again: Some(expires),
                        blocked,
                    }
                }
            };
            match fate {
                Fate::Over => self.remove(token),
                Fate::Goes { again, blocked } => {
                    if blocked {
                        self.blocked.push(token);
                    }
                    self.set_timer(token, again);
                }
            }
        }
    }

    fn set_timer(&mut self, token: u64, at: Option<Instant>) {
        let Some(entry) = self.flows.get_mut(&token) else {
            return;
        };
        if entry.timer != at {
            if let Some(before) = entry.timer {
                self.timers.remove(&(before, token));
            }
            entry.timer = at;
            if let Some(at) = at {
                self.timers.insert((at, token));
            }
        }
    }

    fn fire_timers(&mut self) {
        let now = self.now();
        while let Some((at, token)) = self.timers.first().copied()
            && at <= now
        {
            self.timers.remove(&(at, token));
            let Some(entry) = self.flows.get_mut(&token) else {
                continue;
            };
            entry.timer = None;
            match &entry.flow {
                Flow::Datagram(datagram) if datagram.expires <= now => self.remove(token),
                _ => self.make_due(token),
            }
        }
    }

    fn add(&mut self, key: Key, flow: Flow) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.connections += usize::from(key.protocol == wire::TCP);
        if let Flow::Datagram(datagram) = &flow
            && let Some(client) = datagram.of_client()
        {
            self.clients.insert(client, token);
        }
        let entry = Entry {
            key,
            flow,
            timer: None,
            due: false,
        };
        self.flows.insert(token, entry);
        self.tokens.insert(key, token);
        token
    }

    fn remove(&mut self, token: u64) {
        let Some(mut entry) = self.flows.remove(&token) else {
            return;
        };
        if let Flow::Tcp(tcp) = &mut entry.flow
            && let Some(door) = tcp.given_up()
        {
            self.listeners[door].opening -= 1;
        }
        self.connections -= usize::from(entry.key.protocol == wire::TCP);
        self.tokens.remove(&entry.key);
        if let Some(at) = entry.timer {
            self.timers.remove(&(at, token));
        }
        if let Flow::Datagram(datagram) = &entry.flow
            && let Some(client) = datagram.of_client()
        {
            self.clients.remove(&client);
        }
    }

    fn watch(&self, socket: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(
            &*self.epoll,
            socket,
            epoll::EventData::new_u64(token),
            flags,
        )?;
        Ok(())
    }

    fn frames(&mut self, frames: &[Vec<u8>]) {
        for bytes in frames {
            self.counters.frames_from_guest += 1;
            self.counters.bytes_from_guest += bytes.len() as u64;
            let Some(frame) = Frame::parse(bytes) else {
                self.counters.dropped += 1;
                continue;
            };
            self.outlet.guest = frame.source;
            match frame.kind {
                wire::ARP => {
                    let segments = &self.segments;
                    let shared = |address| is_of_neighbour(segments, address);
                    local::arp(frame.body, &self.outlet, shared);
                }
                wire::IPV4 | wire::IPV6 => match Fragment::parse(frame.body) {
                    Some(fragment) => self.fragment(&fragment),
                    None => self.whole(frame.body),
                },
                _ => self.counters.dropped += 1,
            }
        }
    }

    fn fragment(&mut self, fragment: &Fragment<'_>) {
        match self.fragments.take(fragment, self.now()) {
            Ok(None) => {}
            Ok(Some(packet)) => {
                self.counters.reassembled += 1;
                self.whole(&packet);
            }
            Err(lost) => self.counters.dropped += lost,
        }
    }

    fn whole(&mut self, bytes: &[u8]) {
        match Packet::parse(bytes) {
            Some(packet) => self.packet(&packet),
            None => self.counters.dropped += 1,
        }
    }

    fn packet(&mut self, packet: &Packet<'_>) {
        // Who has an address is nobody else's business: the gateway has them all.
        if !packet.is_discovery()
            && let Some(number) = segment_of(&self.segments, packet.target)
        {
            return self.pass_to_neighbour(number, packet);
        }
        match (packet.protocol, packet.target) {
            (wire::TCP, _) => self.tcp(packet),
            (wire::UDP, _) => self.udp(packet),
            (wire::ICMP, IpAddr::V4(_)) | (wire::ICMPV6, IpAddr::V6(_)) => {
                let segments = &self.segments;
                let here = |address| place_of(segments, address) != Place::Remote;
                let shared = |address| is_of_neighbour(segments, address);
                if !local::icmp(packet, &self.outlet, here, shared) {
                    self.echo(packet);
                }
            }
            _ => self.counters.dropped += 1,
        }
    }

    fn tcp(&mut self, packet: &Packet<'_>) {
        let (Some((guest, peer)), Some(flags)) = (packet.ends(), packet.tcp_flags()) else {
            self.counters.dropped += 1;
            return;
        };
        let key = Key {
            protocol: wire::TCP,
            guest,
            peer,
        };
        if let Some(&token) = self.tokens.get(&key) {
            let now = self.now();
            match self.flows.get_mut(&token).map(|entry| &mut entry.flow) {
                Some(Flow::Tcp(tcp)) => {
                    tcp.input(packet.bytes, &self.outlet, now);
                    self.make_due(token);
                }
                Some(Flow::Connecting(_)) if flags & wire::RST != 0 => self.remove(token),
                _ => {}
            }
            return;
        }
        if flags & (wire::SYN | wire::ACK | wire::RST) != wire::SYN {
            // Of another life of the guest's, or of none.
            return self.outlet.reset(packet);
        }
        let target = match self.target(wire::TCP, peer) {
            Ok(target) => target,
            Err(Unreachable::Port) => return self.outlet.reset(packet),
            Err(why) => return self.outlet.refuse(packet, why),
        };
        if self.connections >= MOST_TCP {
            self.counters.refused += 1;
            return self.outlet.reset(packet);
        }
        match self.open(key, target, packet) {
            Ok(()) => self.counters.tcp_opened += 1,
            Err(error) => self.not_connected(packet.bytes, &error),
        }
    }

    /// Has the host connect for the guest.
    fn open(&mut self, key: Key, target: SocketAddr, packet: &Packet<'_>) -> io::Result<()> {
        let family = match target {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &target) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        // Known before it is added, since whatever has happened by then is told.
        self.watch(socket.as_fd(), self.next_token)?;
        let syn = packet.bytes.to_vec();
        self.add(key, Flow::Connecting(Connecting { socket, syn }));
        Ok(())
    }

    /// The host has connected, or failed to.
    fn connected(&mut self, token: u64) {
        let Some(entry) = self.flows.get_mut(&token) else {
            return;
        };
        let Flow::Connecting(connecting) = &mut entry.flow else {
            return;
        };
        let result = rustix::net::sockopt::socket_error(&connecting.socket);
        let result = result.and_then(|result| result);
        let syn = std::mem::take(&mut connecting.syn);
        let socket = connecting.socket.try_clone();
        match result.map_err(io::Error::from).and(socket) {
            Ok(_) => {
                let key = entry.key;
                let setting = (buffer_len(self.connections), self.seed.hash_one(token));
                let now = self.now();
                let Some(Entry {
                    flow: Flow::Connecting(connecting),
                    ..
                }) = self.flows.remove(&token)
                else {
                    return;
                };
                let host = TcpStream::from(connecting.socket);
                let _ = host.set_nodelay(true);
                let tcp = Tcp::answer((key.peer, host), &syn, setting, &self.outlet, now);
                let entry = Entry {
                    key,
                    flow: Flow::Tcp(Box::new(tcp)),
                    timer: None,
                    due: false,
                };
                self.flows.insert(token, entry);
                self.make_due(token);
            }
            Err(error) => {
                self.remove(token);
                self.not_connected(&syn, &error);
            }
        }
    }

    /// Answers a SYN for which the host got no connection.
    fn not_connected(&mut self, syn: &[u8], error: &io::Error) {
        let Some(packet) = Packet::parse(syn) else {
            return;
        };
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(
                Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::TIMEDOUT | Errno::ADDRNOTAVAIL,
            ) => {
                self.outlet.refuse(&packet, Unreachable::Host);
            }
            // The guest tries again in a while.
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                self.counters.refused += 1;
            }
            _ => self.outlet.reset(&packet),
        }
    }

    fn udp(&mut self, packet: &Packet<'_>) {
        let Some((guest, peer)) = packet.ends() else {
            self.counters.dropped += 1;
            return;
        };
        let key = Key {
            protocol: wire::UDP,
            guest,
            peer,
        };
        let place = place_of(&self.segments, peer.ip());
        let dns = place == Place::Dns;
        if dns && peer.port() == DNS_PORT {
            self.counters.dns_queries += 1;
            if let Some(answer) = self.own_answer(packet.datagram().unwrap_or_default()) {
                return self.outlet.udp(peer, guest, &answer);
            }
        }
        if self.tokens.contains_key(&key) {
            return self.send(key, packet);
        }
        let near = is_for_many(peer.ip()) || place == Place::Gateway;
        if near && peer.port() == dhcp::SERVER_PORT && peer.is_ipv4() {
            return dhcp::serve(packet.datagram().unwrap_or_default(), &self.outlet);
        }
        if is_for_many(peer.ip()) {
            self.counters.dropped += 1;
            return;
        }
        let target = match self.target(wire::UDP, peer) {
            Ok(target) => target,
            Err(why) => return self.outlet.unreachable(packet, why),
        };
        let (ends, now) = ((guest, peer), self.now());
        let made = match dns {
            true => Datagram::dns(ends, target, now),
            false => Datagram::udp(ends, target, now),
        };
        self.begin(key, made, packet);
    }

    fn echo(&mut self, packet: &Packet<'_>) {
        let id = packet.payload.get(4..6).and_then(|id| id.try_into().ok());
        let Some(id) = id.map(u16::from_be_bytes) else {
            return;
        };
        let key = Key {
            protocol: packet.protocol,
            guest: SocketAddr::new(packet.source, id),
            peer: SocketAddr::new(packet.target, 0),
        };
        if self.tokens.contains_key(&key) {
            return self.send(key, packet);
        }
        if is_for_many(packet.target) {
            self.counters.dropped += 1;
            return;
        }
        if let Err(reason) = self
            .policy
            .check((packet.target, packet.target), None, self.now())
        {
            self.deny(packet.protocol, SocketAddr::new(packet.target, 0), reason);
            return self.outlet.unreachable(packet, Unreachable::Prohibited);
        }
        let made = Datagram::echo((key.guest, key.peer), packet.target, self.now());
        self.begin(key, made, packet);
    }

    /// Adds a flow of datagrams and sends its first.
    fn begin(&mut self, key: Key, made: io::Result<Datagram>, packet: &Packet<'_>) {
        let datagram = match made {
            Ok(datagram) => datagram,
            Err(error) => {
                tracing::debug!(%error, peer = %key.peer, "The host has no socket for a packet");
                self.counters.refused += 1;
                return self.outlet.unreachable(packet, Unreachable::Host);
            }
        };
        self.make_place();
        let socket = datagram.socket();
        if let Some(Err(error)) = socket.map(|socket| self.watch(socket, self.next_token)) {
            tracing::debug!(%error, "The host can't wait for a packet");
            self.counters.refused += 1;
            return;
        }
        self.counters.datagram_flows += 1;
        let expires = datagram.expires;
        let token = self.add(key, Flow::Datagram(Box::new(datagram)));
        self.set_timer(token, Some(expires));
        self.send(key, packet);
    }

    /// Has the flow of datagrams go that would go next, where there are too many.
    fn make_place(&mut self) {
        if self.flows.len() - self.connections.min(self.flows.len()) < MOST_DATAGRAM {
            return;
        }
        let flows = self
            .flows
            .iter()
            .filter_map(|(token, entry)| match &entry.flow {
                Flow::Datagram(datagram) => Some((datagram.expires, *token)),
                _ => None,
            });
        if let Some((_, token)) = flows.min() {
            self.remove(token);
        }
    }

    fn send(&mut self, key: Key, packet: &Packet<'_>) {
        let now = self.now();
        let Some(&token) = self.tokens.get(&key) else {
            return;
        };
        let Some(Flow::Datagram(datagram)) = self.flows.get_mut(&token).map(|e| &mut e.flow) else {
            return;
        };
        let door = datagram.of_client().and_then(|(number, _)| {
            match self.listeners.get(number).map(|listener| &listener.door) {
                Some(Door::Udp(door)) => Some(door),
                _ => None,
            }
        });
        let ignored = datagram.is_ignored(now);
        datagram.send(packet, door, &self.outlet, now);
        if ignored {
            self.ask_another(token, now);
        }
    }

    /// Has the next name server answer a flow's questions.
    fn ask_another(&mut self, token: u64, now: Instant) {
        self.resolver = self.resolver.wrapping_add(1);
        let servers = self.resolvers.servers();
        let server = servers.get(self.resolver % servers.len().max(1)).copied();
        let Some(entry) = self.flows.get_mut(&token) else {
            return;
        };
        if let (Flow::Datagram(datagram), Some(server)) = (&mut entry.flow, server) {
            let asked = datagram.ask(server, now);
            let socket = datagram.socket();
            // The socket is a new one. What can't be asked stays without an answer, as if it were lost.
            let _ = asked.and_then(|()| match socket {
                Some(socket) => epoll::add(
                    &*self.epoll,
                    socket,
                    epoll::EventData::new_u64(token),
                    EventFlags::IN | EventFlags::ET,
                )
                .map_err(Into::into),
                None => Ok(()),
            });
        }
    }

    /// Breaks connections of an earlier life: a SYN in the middle of one is answered with what the guest
    /// expects next (RFC 5961, 4.2), and that with a reset.
    fn break_lost(&mut self) {
        while !self.lost.is_empty() && self.outlet.port().is_live() && self.outlet.has_room() {
            let Some(Connection { guest, peer }) = self.lost.pop() else {
                return;
            };
            let sequence = self.seed.hash_one((guest, peer)) as u32;
            let header = wire::tcp_header((peer.port(), guest.port()), sequence, (wire::SYN, 0));
            if guest.is_ipv4() == peer.is_ipv4() {
                self.outlet
                    .ip((peer.ip(), guest.ip()), wire::TCP, &[&header]);
            }
        }
    }
}

/// Whether an address is a whole network's.
fn is_for_many(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            address.is_multicast() || address.is_broadcast() || [a, b, c, d] == [10, 0, 2, 255]
        }
        IpAddr::V6(address) => address.is_multicast(),
    }
}
