//! The network card (virtio 1.3, 5.1): one pair of queues, frames up to an IP packet's longest.
//!
//! ```text
//!  guest: transmit ring ─ kick ─► wake ─► host thread ─ NetPort::receive ─► frames, copied out
//!  guest: receive ring ◄─ NetPort::flush ◄─ frames that wait (bounded) ◄─ NetPort::push
//! ```
//! A vCPU that notifies only wakes the [`NetBackend`]'s thread, which takes everything at once and has
//! notifications off meanwhile. Frames to the guest wait until it has room: nothing is lost on the way.

mod port;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::ThreadId;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{
    Chain, DeviceKind, DeviceState, EngineLink, Queue, QueueEngine, QueueError, Served,
    VirtioDevice, read_config_bytes,
};
use crate::state::{StateError, require};
pub use port::{Checksum, NetPort, Offloads};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 256;

/// The driver may leave checksums of what it sends to the device (5.1.3).
const F_CSUM: u64 = 1 << 0;
/// The device may leave checksums of what the guest gets to its driver.
const F_GUEST_CSUM: u64 = 1 << 1;
/// The largest packet is told.
const F_MTU: u64 = 1 << 3;
/// The card has an address of its own.
const F_MAC: u64 = 1 << 5;
/// The device may send TCP segments that are longer than the network's.
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
/// The driver may send TCP segments that are longer than the network's.
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
/// A frame may take several receive buffers.
const F_MRG_RXBUF: u64 = 1 << 15;
/// Whether the link is up is told.
const F_STATUS: u64 = 1 << 16;
const FEATURES: u64 =
    F_CSUM | F_GUEST_CSUM | F_MTU | F_MAC | F_HOST_TSO4 | F_HOST_TSO6 | F_MRG_RXBUF | F_STATUS;
/// What a card has besides whose frames leave the process.
const OFFLOADS: u64 = F_GUEST_TSO4 | F_GUEST_TSO6;
const STATUS_LINK_UP: u16 = 1;

/// What stands before each frame in a buffer (5.1.6); with the modern interface always this long.
pub const HEADER_LEN: usize = 12;
/// Where in it the number of buffers of a frame stands.
const NUM_BUFFERS: usize = 10;
/// The longest frame: the longest IP packet behind an Ethernet header with a VLAN tag.
pub const MAX_FRAME: usize = 65_535 + 18;
/// Buffers of the driver's that one frame may take: of one page each, and then some.
const MAX_BUFFERS: usize = 64;
/// Bytes that wait on the way from the guest, beyond which the guest waits.
const FROM_GUEST: usize = 512 << 10;
/// Frames likewise.
const FRAMES_FROM_GUEST: usize = 1024;
/// The most connections that a saved state names.
pub const MAX_CONNECTIONS: usize = 16 << 10;

/// What a network card is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Its address.
    pub mac: [u8; 6],
    /// The longest packet, without the Ethernet header.
    pub mtu: u16,
    /// It is for a network of the host's, whose kernel passes on long TCP segments whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub offload: bool,
}

/// A connection of the guest's that a saved state has and its new host doesn't.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Connection {
    /// The guest's end.
    pub guest: SocketAddr,
    /// The other end, as the guest knows it.
    pub peer: SocketAddr,
}

/// What a network card is plugged into.
pub trait NetBackend: Send + Sync {
    /// Gives the way to the card. Called once.
    fn attach(&self, port: NetPort);

    /// There is something to do with the port: frames, or room for more. Called on vCPU threads.
    fn wake(&self);

    /// The connections of the guest, for a snapshot.
    fn connections(&self) -> Vec<Connection>;

    /// The guest is another one from now on, with these connections, which are to break.
    fn replace(&self, connections: Vec<Connection>);

    /// The machine is over: what the guest sent last goes out as far as that is done soon.
    fn close(&self);
}

/// Frames for the guest.
#[derive(Default)]
struct ToGuest {
    /// Each with its header.
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The host's thread waits for room.
    stalled: bool,
    /// Buffers that are used again.
    spare: Vec<Vec<u8>>,
}

/// Frames from the guest, without headers unless the backend wants them.
#[derive(Default)]
struct FromGuest {
    frames: Vec<Vec<u8>>,
    bytes: usize,
}

/// What the device and its port share.
struct Wire {
    mtu: u16,
    link: EngineLink,
    to_guest: Mutex<ToGuest>,
    from_guest: Mutex<FromGuest>,
    features: AtomicU64,
    /// The driver is ready.
    live: AtomicBool,
    /// The backend takes and gives frames with their headers.
    headers: AtomicBool,
    /// The thread that takes frames: it need not be woken for those that it fetches itself.
    receiver: OnceLock<ThreadId>,
}

/// The network card.
pub struct NetDevice {
    config: NetConfig,
    backend: Arc<dyn NetBackend>,
    wire: Arc<Wire>,
}

/// What became of a frame for the guest.
enum Delivery {
    Done,
    /// The driver has only so many buffers, which is too few.
    NoRoom(u16),
    /// No number of buffers is enough.
    TooLong,
}

impl NetDevice {
    /// A card that is plugged into `backend`.
    pub fn new(config: NetConfig, backend: Arc<dyn NetBackend>) -> Arc<Self> {
        let wire = Arc::new(Wire {
            mtu: config.mtu,
            link: EngineLink::default(),
            to_guest: Mutex::default(),
            from_guest: Mutex::default(),
            features: AtomicU64::new(0),
            live: AtomicBool::new(false),
            headers: AtomicBool::new(false),
            receiver: OnceLock::new(),
        });
        backend.attach(NetPort(wire.clone()));
        Arc::new(Self {
            config,
            backend,
            wire,
        })
    }

    fn has(&self, feature: u64) -> bool {
        self.wire.has(feature)
    }

    fn process_transmit(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        if !queue.may_wait() {
            // Notifications stay off until the woken thread has taken everything.
            self.backend.wake();
            return Ok(Served::Waiting);
        }
        let ram = queue.ram().clone();
        let headers = self.wire.headers.load(Ordering::SeqCst);
        let mut from_guest = self.wire.from_guest.lock();
        let before = from_guest.frames.len();
        let served = loop {
            if from_guest.bytes >= FROM_GUEST || from_guest.frames.len() >= FRAMES_FROM_GUEST {
                break Served::Waiting;
            }
            let Some(chain) = queue.pop()? else {
                break Served::Drained;
            };
            let len = (chain.readable_len() as usize).saturating_sub(HEADER_LEN);
            if (1..=MAX_FRAME).contains(&len) {
                let mut reader = chain.reader(&ram);
                let mut frame = match headers {
                    true => vec![0; HEADER_LEN + len],
                    false => {
                        // Checksums that are left to us and sizes of segments concern nobody: packets
                        // end here.
                        reader.skip(HEADER_LEN)?;
                        vec![0; len]
                    }
                };
                reader.read_exact(&mut frame)?;
                from_guest.bytes += len;
                from_guest.frames.push(frame);
            }
            queue.complete(chain, 0)?;
        };
        let more = from_guest.frames.len() > before;
        drop(from_guest);
        if more && self.wire.receiver.get() != Some(&std::thread::current().id()) {
            self.backend.wake();
        }
        Ok(served)
    }

    fn process_receive(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        let mut to_guest = self.wire.to_guest.lock();
        let served = loop {
            let Some(frame) = to_guest.frames.front() else {
                // Notifications stay off: nobody waits for buffers.
                break Served::Waiting;
            };
            match self.deliver(queue, frame)? {
                Delivery::Done | Delivery::TooLong => to_guest.pop(),
                Delivery::NoRoom(available) => {
                    if !queue.await_more(available)? {
                        break Served::Waiting;
                    }
                }
            }
        };
        let stalled = to_guest.has_room() && std::mem::take(&mut to_guest.stalled);
        drop(to_guest);
        if stalled {
            self.backend.wake();
        }
        Ok(served)
    }

    /// Copies a frame into as many of the driver's buffers as it takes (5.1.6.4).
    fn deliver(&self, queue: &mut Queue, frame: &[u8]) -> Result<Delivery, QueueError> {
        let ram = queue.ram().clone();
        let most = if self.has(F_MRG_RXBUF) {
            MAX_BUFFERS
        } else {
            1
        };
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        let mut outcome = Delivery::Done;
        while room < frame.len() {
            if chains.len() == most {
                outcome = Delivery::TooLong;
                break;
            }
            let Some(chain) = queue.pop()? else {
                outcome = Delivery::NoRoom(u16::try_from(chains.len()).unwrap_or(u16::MAX));
                break;
            };
            if chains.is_empty() && (chain.writable_len() as usize) < HEADER_LEN {
                return Err(QueueError::Request("room for a header"));
            }
            room += chain.writable_len() as usize;
            chains.push(chain);
        }
        if !matches!(outcome, Delivery::Done) {
            for chain in chains.into_iter().rev() {
                queue.put_back(chain);
            }
            return Ok(outcome);
        }
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        let mut rest = frame;
        for (number, chain) in chains.into_iter().enumerate() {
            let (part, after) = rest.split_at(rest.len().min(chain.writable_len() as usize));
            let mut writer = chain.writer(&ram);
            match part.split_at_checked(HEADER_LEN).filter(|_| number == 0) {
                Some((header, body)) => {
                    writer.write_all(&header[..NUM_BUFFERS])?;
                    writer.write_all(&count.to_le_bytes())?;
                    writer.write_all(body)?;
                }
                None => writer.write_all(part)?,
            }
            // No longer than a frame.
            queue.fill_used(chain, part.len() as u32)?;
            rest = after;
        }
        // All at once: a driver that finds the first takes the others to be there.
        queue.show_used()?;
        Ok(Delivery::Done)
    }

    fn config_space(&self) -> [u8; 12] {
        let NetConfig {
            mac,
            mtu,
            offload: _,
        } = self.config;
        let mut config = [0; 12];
        config[..6].copy_from_slice(&mac);
        config[6..8].copy_from_slice(&STATUS_LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&1_u16.to_le_bytes());
        config[10..].copy_from_slice(&mtu.to_le_bytes());
        config
    }
}

impl VirtioDevice for NetDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        FEATURES | if self.config.offload { OFFLOADS } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config_space(), offset, data);
    }

    fn attach(&self, engine: Weak<QueueEngine>) {
        self.wire.link.set(engine);
    }

    fn activate(&self, features: u64) {
        self.wire.features.store(features, Ordering::SeqCst);
        self.wire.live.store(true, Ordering::SeqCst);
    }

    fn reset(&self) {
        self.wire.clear();
    }

    fn close(&self) {
        self.backend.close();
    }

    fn process(&self, index: usize, queue: &mut Queue) -> Result<Served, QueueError> {
        match index {
            RECEIVE => self.process_receive(queue),
            TRANSMIT => self.process_transmit(queue),
            _ => Ok(Served::Drained),
        }
    }

    fn save(&self) -> DeviceState {
        // Frames on the way are lost, as networks lose them: whoever sent them sends them again.
        let mut connections = self.backend.connections();
        connections.truncate(MAX_CONNECTIONS);
        DeviceState::Net(NetState { connections })
    }

    fn restore(&self, saved: DeviceState) -> Result<(), StateError> {
        let DeviceState::Net(NetState { connections }) = saved else {
            let problem = "it belongs to another kind of device";
            return Err(StateError::new("virtio-net", problem));
        };
        let bounded = connections.len() <= MAX_CONNECTIONS;
        require(bounded, "virtio-net", "it has too many connections")?;
        self.wire.clear();
        self.backend.replace(connections);
        Ok(())
    }
}

impl std::fmt::Debug for NetDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NetDevice")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// The state of a network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// What its guest was connected to.
    connections: Vec<Connection>,
}
