//! The socket device (virtio 1.3, 5.10), with the host's sockets in this process.
//!
//! ```text
//! VsockStream::write ─> send ring ─┐                                ┌─> receive queue ─> guest
//!                                  ├─ ready list ─> QueueEngine ────┤   (on the writing thread)
//! control packets (RST, RESPONSE) ─┘                                │
//! VsockStream::read  <─ receive ring <─ Connection::receive <───────┴── transmit queue <─ guest
//! ```
//! A writing host thread carries its data into guest memory itself: no thread hop, and one interrupt for
//! all that fits. Credit bounds both directions; a guest that breaks it loses the connection. Locks are
//! never nested: the table of connections is let go before a connection is locked.

mod connection;
mod host;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

use super::{
    ChainCursor, DeviceKind, DeviceState, EngineLink, Queue, QueueEngine, QueueError, Served,
    VirtioDevice, read_config_bytes,
};
use crate::state::{StateError, require};
use connection::{Connection, Key, Outcome, Phase, RECEIVE_LEN};
use host::AcceptQueue;
pub use host::{VsockHost, VsockListener, VsockStream};
pub use packet::HOST_CID;
use packet::*;

/// Queue on which the guest receives.
const RECEIVE_QUEUE: usize = 0;
/// Queue on which the guest transmits.
const TRANSMIT_QUEUE: usize = 1;
/// Queue of events for the guest.
const EVENT_QUEUE: usize = 2;

const F_STREAM: u64 = 1 << 0;
/// All connections are gone, the guest's CID may have changed (5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Connections at one time, those included that wait for the guest's last word.
const MAX_CONNECTIONS: usize = 1024;
/// Control packets that may wait for the guest before its own are left waiting.
const MAX_CONTROL: usize = 1024;
/// Packets of one connection before the next has its turn.
const TURN: usize = 16;
/// Where the host's ephemeral ports begin.
const FIRST_EPHEMERAL_PORT: u32 = 1 << 30;

/// What a snapshot keeps of a socket device. Connections don't survive a restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    guest_cid: u64,
}

/// Who is connected, and what waits to be sent.
struct Table {
    connections: HashMap<Key, Arc<Connection>>,
    listeners: HashMap<u32, Arc<AcceptQueue>>,
    control: VecDeque<Header>,
    ready: VecDeque<Arc<Connection>>,
    next_port: u32,
    /// A driver is there.
    active: bool,
    /// The device is gone.
    closed: bool,
    /// The guest's packets wait until it takes ours.
    transmit_stalled: bool,
    transport_reset_due: bool,
}

struct Shared {
    guest_cid: u64,
    link: EngineLink,
    table: Mutex<Table>,
    activated: Condvar,
}

/// Something to put into the guest's receive queue.
enum Item {
    Control(Header),
    Data(Arc<Connection>),
}

impl Shared {
    /// Sends what `connection` has if it was just claimed for the ready list.
    fn send_if(&self, claimed: bool, connection: &Arc<Connection>) {
        if claimed {
            self.table.lock().ready.push_back(connection.clone());
            self.link.serve(RECEIVE_QUEUE);
        }
    }

    fn send_control(&self, header: Header) {
        let mut table = self.table.lock();
        // The guest's packets stop at MAX_CONTROL; what the host adds beyond is bounded by its sockets.
        if table.control.len() < 2 * MAX_CONTROL {
            table.control.push_back(header);
        }
        drop(table);
        self.link.serve(RECEIVE_QUEUE);
    }

    fn add_listener(&self, port: u32, queue: Arc<AcceptQueue>) -> io::Result<()> {
        let mut table = self.table.lock();
        if table.closed {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if table.listeners.contains_key(&port) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        table.listeners.insert(port, queue);
        Ok(())
    }

    fn remove_listener(&self, port: u32, queue: &Arc<AcceptQueue>) {
        let mut table = self.table.lock();
        if table
            .listeners
            .get(&port)
            .is_some_and(|listener| Arc::ptr_eq(listener, queue))
        {
            table.listeners.remove(&port);
        }
    }

    /// Asks the guest for a connection to its `port`, once its driver is there.
    fn request(&self, port: u32, deadline: Instant) -> io::Result<Arc<Connection>> {
        let mut table = self.table.lock();
        while !table.active {
            if table.closed {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if self.activated.wait_until(&mut table, deadline).timed_out() {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        if table.connections.len() >= MAX_CONNECTIONS {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let key = loop {
            let host_port = table.next_port;
            table.next_port = host_port.wrapping_add(1).max(FIRST_EPHEMERAL_PORT);
            let key = Key {
                host_port,
                guest_port: port,
            };
            if !table.connections.contains_key(&key) {
                break key;
            }
        };
        let connection = Arc::new(Connection::connecting(key));
        table.connections.insert(key, connection.clone());
        drop(table);
        self.send_control(Header {
            op: OP_REQUEST,
            ..connection.header(self.guest_cid)
        });
        Ok(connection)
    }

    /// The host has dropped its end.
    fn abandon(&self, connection: &Arc<Connection>) {
        let (phase, claimed) = connection.abandon();
        if phase == Phase::Connecting && self.remove(connection) {
            self.send_control(Header {
                op: OP_RST,
                ..connection.header(self.guest_cid)
            });
        }
        self.send_if(claimed, connection);
    }

    fn remove(&self, connection: &Arc<Connection>) -> bool {
        let mut table = self.table.lock();
        let known = table.connections.get(&connection.key);
        let found = known.is_some_and(|known| Arc::ptr_eq(known, connection));
        if found {
            table.connections.remove(&connection.key);
        }
        found
    }

    /// Ends every connection, those included that nobody has accepted yet.
    fn kill_all(&self, error: io::ErrorKind) {
        let mut table = self.table.lock();
        let connections = std::mem::take(&mut table.connections);
        let listeners: Vec<_> = table.listeners.values().cloned().collect();
        table.control.clear();
        table.ready.clear();
        table.transmit_stalled = false;
        drop(table);
        for connection in connections.values() {
            connection.kill(error);
        }
        for queue in listeners {
            queue.forget_waiting();
        }
    }

    /// Ends everything: connections, listeners, and whoever waits for either.
    fn close(&self) {
        let mut table = self.table.lock();
        table.closed = true;
        table.active = false;
        let listeners = std::mem::take(&mut table.listeners);
        drop(table);
        self.kill_all(io::ErrorKind::ConnectionAborted);
        self.activated.notify_all();
        for queue in listeners.values() {
            queue.close();
        }
    }

    /// The guest asks for a connection to a port of the host.
    fn accept(self: &Arc<Self>, key: Key, request: &Header) -> bool {
        let mut table = self.table.lock();
        let Some(queue) = table.listeners.get(&key.host_port).cloned() else {
            return false;
        };
        if table.connections.len() >= MAX_CONNECTIONS || !queue.has_room() {
            return false;
        }
        let connection = Arc::new(Connection::accepted(key, request));
        table.connections.insert(key, connection.clone());
        // Before the stream is anybody's, so that the answer precedes its data.
        table.control.push_back(Header {
            op: OP_RESPONSE,
            ..connection.header(self.guest_cid)
        });
        drop(table);
        queue.push(VsockStream::new(self.clone(), connection));
        true
    }

    /// Takes in one packet from the guest.
    fn handle(
        self: &Arc<Self>,
        header: &Header,
        data: &mut ChainCursor<'_>,
    ) -> Result<(), QueueError> {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return Ok(());
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let known = self.table.lock().connections.get(&key).cloned();
        let reset = match known.filter(|_| header.kind == TYPE_STREAM) {
            None if header.kind == TYPE_STREAM && header.op == OP_REQUEST => {
                !self.accept(key, header)
            }
            None => header.op != OP_RST,
            Some(connection) => {
                let (outcome, claimed) = connection.receive(header, data)?;
                if outcome != Outcome::Keep {
                    self.remove(&connection);
                }
                if claimed {
                    self.table.lock().ready.push_back(connection);
                }
                outcome == Outcome::Reset
            }
        };
        if reset {
            self.table.lock().control.push_back(header.reset_reply());
        }
        Ok(())
    }

    fn next_item(&self) -> Option<Item> {
        let mut table = self.table.lock();
        table
            .control
            .pop_front()
            .map(Item::Control)
            .or_else(|| table.ready.pop_front().map(Item::Data))
    }

    /// Fills the guest's receive buffers.
    fn process_receive(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        let ram = queue.ram().clone();
        let mut turn: Option<(Arc<Connection>, usize)> = None;
        let served = loop {
            let Some(chain) = queue.pop()? else {
                if let Some((connection, _)) = turn.take() {
                    self.table.lock().ready.push_front(connection);
                }
                break Served::Drained;
            };
            if (chain.writable_len() as usize) < HEADER_LEN {
                return Err(QueueError::Request("room for a header"));
            }
            let written = loop {
                let item = match turn.take() {
                    Some((connection, left)) if left > 0 => {
                        turn = Some((connection.clone(), left - 1));
                        Item::Data(connection)
                    }
                    other => {
                        if let Some((connection, _)) = other {
                            self.table.lock().ready.push_back(connection);
                        }
                        match self.next_item() {
                            Some(item) => item,
                            None => break None,
                        }
                    }
                };
                let mut writer = chain.writer(&ram);
                match item {
                    Item::Control(header) => {
                        writer.write_all(&header.to_bytes())?;
                        break Some(HEADER_LEN as u32);
                    }
                    Item::Data(connection) => {
                        match connection.emit(self.guest_cid, &mut writer)? {
                            Some(written) => {
                                if turn.is_none() {
                                    turn = Some((connection, TURN));
                                }
                                break Some(written);
                            }
                            None => turn = None,
                        }
                    }
                }
            };
            match written {
                Some(written) => queue.complete(chain, written)?,
                None => {
                    queue.put_back(chain);
                    break Served::Waiting;
                }
            }
        };
        let mut table = self.table.lock();
        let unstall = table.transmit_stalled && table.control.len() < MAX_CONTROL / 2;
        table.transmit_stalled &= !unstall;
        drop(table);
        if unstall {
            self.link.serve(TRANSMIT_QUEUE);
        }
        Ok(served)
    }

    /// Takes the guest's packets.
    fn process_transmit(self: &Arc<Self>, queue: &mut Queue) -> Result<Served, QueueError> {
        let ram = queue.ram().clone();
        let mut served = Served::Drained;
        while let Some(chain) = queue.pop()? {
            let mut table = self.table.lock();
            if table.control.len() >= MAX_CONTROL {
                table.transmit_stalled = true;
                queue.put_back(chain);
                served = Served::Waiting;
                break;
            }
            drop(table);
            let mut reader = chain.reader(&ram);
            let mut raw = [0; HEADER_LEN];
            reader
                .read_exact(&mut raw)
                .map_err(|_| QueueError::Request("header"))?;
            self.handle(&Header::from_bytes(&raw), &mut reader)?;
            queue.complete(chain, 0)?;
        }
        let table = self.table.lock();
        let outgoing = !table.control.is_empty() || !table.ready.is_empty();
        drop(table);
        if outgoing {
            self.link.serve(RECEIVE_QUEUE);
        }
        Ok(served)
    }

    /// Breaks all connections, and has the guest told.
    fn reset_transport(&self) {
        self.kill_all(io::ErrorKind::ConnectionReset);
        self.table.lock().transport_reset_due = true;
        self.link.serve(EVENT_QUEUE);
    }

    fn process_event(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        let ram = queue.ram().clone();
        if !self.table.lock().transport_reset_due {
            return Ok(Served::Waiting);
        }
        let Some(chain) = queue.pop()? else {
            return Ok(Served::Drained);
        };
        chain
            .writer(&ram)
            .write_all(&EVENT_TRANSPORT_RESET.to_le_bytes())?;
        self.table.lock().transport_reset_due = false;
        queue.complete(chain, 4)?;
        Ok(Served::Waiting)
    }
}

/// Where a device's ephemeral ports begin: anywhere. A restored guest has, until it notices that they
/// are gone, connections of the device that it had before; a new one with the ports of such a one would
/// be refused.
fn first_port() -> u32 {
    let offset = getrandom::u32().unwrap_or_default();
    FIRST_EPHEMERAL_PORT + offset % FIRST_EPHEMERAL_PORT
}

/// The socket device.
pub struct VsockDevice {
    shared: Arc<Shared>,
}

impl VsockDevice {
    /// A socket device for the guest with context identifier `guest_cid` (3 or more), and the host's
    /// side of it.
    pub fn new(guest_cid: u64) -> (Arc<Self>, VsockHost) {
        let shared = Arc::new(Shared {
            guest_cid,
            link: EngineLink::default(),
            table: Mutex::new(Table {
                connections: HashMap::new(),
                listeners: HashMap::new(),
                control: VecDeque::new(),
                ready: VecDeque::new(),
                next_port: first_port(),
                active: false,
                closed: false,
                transmit_stalled: false,
                transport_reset_due: false,
            }),
            activated: Condvar::new(),
        });
        (
            Arc::new(Self {
                shared: shared.clone(),
            }),
            VsockHost { shared },
        )
    }

    /// Bytes the guest may send on one connection before the host reads.
    pub const fn receive_window() -> usize {
        RECEIVE_LEN
    }
}

impl VirtioDevice for VsockDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.shared.guest_cid.to_le_bytes(), offset, data);
    }

    fn attach(&self, engine: Weak<QueueEngine>) {
        self.shared.link.set(engine);
    }

    fn activate(&self, _features: u64) {
        self.shared.table.lock().active = true;
        self.shared.activated.notify_all();
    }

    fn reset(&self) {
        self.shared.table.lock().active = false;
        self.shared.kill_all(io::ErrorKind::ConnectionReset);
    }

    fn close(&self) {
        self.shared.close();
    }

    fn process(&self, index: usize, queue: &mut Queue) -> Result<Served, QueueError> {
        match index {
            RECEIVE_QUEUE => self.shared.process_receive(queue),
            TRANSMIT_QUEUE => self.shared.process_transmit(queue),
            EVENT_QUEUE => self.shared.process_event(queue),
            _ => Ok(Served::Drained),
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState {
            guest_cid: self.shared.guest_cid,
        })
    }

    fn restore(&self, saved: DeviceState) -> Result<(), StateError> {
        let DeviceState::Vsock(VsockState { guest_cid }) = saved else {
            return Err(StateError::new(
                "virtio-vsock",
                "it belongs to another kind of device",
            ));
        };
        let same = guest_cid == self.shared.guest_cid;
        require(
            same,
            "virtio-vsock",
            "the guest has another context identifier",
        )?;
        self.shared.kill_all(io::ErrorKind::ConnectionReset);
        self.shared.table.lock().transport_reset_due = true;
        Ok(())
    }
}

impl fmt::Debug for VsockDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.shared.table.lock();
        f.debug_struct("VsockDevice")
            .field("guest_cid", &self.shared.guest_cid)
            .field("connections", &table.connections.len())
            .field("listeners", &table.listeners.keys().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl Drop for VsockDevice {
    fn drop(&mut self) {
        self.shared.close();
    }
}
