//! The console device (virtio 1.3, 5.3) with several ports.
//!
//! ```text
//! PortHandle::write ──> to_guest   ring ──> receive queue of the port  ──> /dev/hvc0, /dev/vportNpM
//! PortHandle::read  <── from_guest ring <── transmit queue of the port <──
//! ```
//! Port 0 is the console; further ports have names, under which the guest finds them in
//! `/dev/virtio-ports`. Both rings are bounded: a slow reader on either side stalls the other.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

use super::ring::ByteRing;
use super::{
    DeviceKind, DeviceState, EngineLink, Queue, QueueEngine, QueueError, Served, VirtioDevice,
    read_config_bytes, wait,
};
use crate::state::{StateError, require};

const F_SIZE: u64 = 1 << 0;
const F_MULTIPORT: u64 = 1 << 1;
const F_EMERG_WRITE: u64 = 1 << 2;

const CONTROL_DEVICE_READY: u16 = 0;
const CONTROL_PORT_ADD: u16 = 1;
const CONTROL_PORT_READY: u16 = 3;
const CONTROL_CONSOLE_PORT: u16 = 4;
const CONTROL_RESIZE: u16 = 5;
const CONTROL_PORT_OPEN: u16 = 6;
const CONTROL_PORT_NAME: u16 = 7;

const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
const CONTROL_LEN: usize = 8;
/// Control messages that may wait for the driver before its own are left waiting.
const MAX_CONTROL: usize = 256;
/// Offset of the emergency-write field in the configuration.
const CONFIG_EMERGENCY: u64 = 8;

const QUEUE_SIZE: u16 = 128;
/// Bytes that wait in either direction of a port.
const RING_LEN: usize = 64 * 1024;
/// Ports of one device; the doorbell has a bit per queue.
const MAX_PORTS: usize = 16;

/// What is fixed about one port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsolePort {
    /// The name in `/dev/virtio-ports`; may be empty for a console.
    pub name: String,
    /// Whether the guest makes a console (`hvcN`) of it.
    pub console: bool,
}

/// One port's part of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PortState {
    to_guest: Vec<u8>,
    from_guest: Vec<u8>,
    transmit_offset: u32,
    guest_open: bool,
}

/// Everything that changes in a [`ConsoleDevice`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    columns: u16,
    rows: u16,
    control: Vec<Vec<u8>>,
    ports: Vec<PortState>,
}

struct PortIo {
    to_guest: ByteRing,
    from_guest: ByteRing,
    /// Bytes of the transmit queue's next chain that were taken before the ring was full.
    transmit_offset: u32,
    /// The transmit queue waits for the host to read.
    stalled: bool,
    guest_open: bool,
    /// No more traffic: the device is gone.
    closed: bool,
    /// Nobody on the host has the port: output is dropped.
    abandoned: bool,
}

struct Port {
    config: ConsolePort,
    receive: usize,
    transmit: usize,
    io: Mutex<PortIo>,
    readable: Condvar,
    writable: Condvar,
}

impl Port {
    fn new(index: usize, config: ConsolePort) -> Arc<Self> {
        // Queues 2 and 3 are the control queues; port 0 comes before, the others after (5.3.2).
        let receive = if index == 0 { 0 } else { 2 * index + 2 };
        Arc::new(Self {
            config,
            receive,
            transmit: receive + 1,
            io: Mutex::new(PortIo {
                to_guest: ByteRing::new(RING_LEN),
                from_guest: ByteRing::new(RING_LEN),
                transmit_offset: 0,
                stalled: false,
                guest_open: false,
                closed: false,
                abandoned: false,
            }),
            readable: Condvar::new(),
            writable: Condvar::new(),
        })
    }

    /// Moves bytes from the ring into the driver's buffers.
    fn process_receive(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        let ram = queue.ram().clone();
        let mut io = self.io.lock();
        loop {
            if io.to_guest.is_empty() {
                return Ok(Served::Waiting);
            }
            let Some(chain) = queue.pop()? else {
                return Ok(Served::Drained);
            };
            let mut writer = chain.writer(&ram);
            let len = io.to_guest.len().min(chain.writable_len() as usize);
            let (first, second) = io.to_guest.filled();
            let from_first = first.len().min(len);
            writer.write_all(&first[..from_first])?;
            writer.write_all(&second[..len - from_first])?;
            io.to_guest.consume(len);
            self.writable.notify_all();
            queue.complete(chain, len as u32)?;
        }
    }

    /// Moves bytes from the driver's buffers into the ring.
    fn process_transmit(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        let ram = queue.ram().clone();
        let mut io = self.io.lock();
        while let Some(chain) = queue.pop()? {
            let mut reader = chain.reader(&ram);
            // A driver that changes a chain under way can make it shorter; that is its own loss.
            let offset = io.transmit_offset.min(reader.remaining());
            reader.skip(offset as usize)?;
            let left = reader.remaining() as usize;
            let taken = if io.abandoned {
                left
            } else {
                left.min(io.from_guest.room())
            };
            if !io.abandoned {
                io.from_guest
                    .append_with(taken, |part| reader.read_exact(part))?;
                self.readable.notify_all();
            }
            if taken < left {
                io.transmit_offset = offset + taken as u32;
                io.stalled = true;
                queue.put_back(chain);
                return Ok(Served::Waiting);
            }
            io.transmit_offset = 0;
            queue.complete(chain, 0)?;
        }
        Ok(Served::Drained)
    }

    fn save(&self) -> PortState {
        let io = self.io.lock();
        let bytes = |ring: &ByteRing| {
            let (first, second) = ring.filled();
            [first, second].concat()
        };
        PortState {
            to_guest: bytes(&io.to_guest),
            from_guest: bytes(&io.from_guest),
            transmit_offset: io.transmit_offset,
            guest_open: io.guest_open,
        }
    }

    fn restore(&self, saved: PortState) {
        let PortState {
            to_guest,
            from_guest,
            transmit_offset,
            guest_open,
        } = saved;
        let mut io = self.io.lock();
        io.to_guest.clear();
        io.to_guest.push(&to_guest);
        io.from_guest.clear();
        io.from_guest.push(&from_guest);
        io.transmit_offset = transmit_offset;
        io.guest_open = guest_open;
        self.readable.notify_all();
    }
}

/// The console device.
pub struct ConsoleDevice {
    ports: Vec<Arc<Port>>,
    link: Arc<EngineLink>,
    queue_sizes: Vec<u16>,
    features: u64,
    multiport: AtomicBool,
    /// Columns in the low half, rows in the high half.
    size: AtomicU32,
    control: Mutex<VecDeque<Vec<u8>>>,
    control_stalled: AtomicBool,
}

impl ConsoleDevice {
    /// A device with `ports`, the first of which should be a console, and the host's end of each.
    pub fn new(ports: Vec<ConsolePort>) -> (Arc<Self>, Vec<PortHandle>) {
        let link = Arc::new(EngineLink::default());
        let mut ports = ports;
        ports.truncate(MAX_PORTS);
        if ports.is_empty() {
            ports.push(ConsolePort {
                name: String::new(),
                console: true,
            });
        }
        let multiport = ports.len() > 1 || !ports[0].console;
        let ports: Vec<_> = ports
            .into_iter()
            .enumerate()
            .map(|(i, c)| Port::new(i, c))
            .collect();
        let handles = ports
            .iter()
            .map(|port| PortHandle {
                end: Arc::new(HostEnd {
                    port: port.clone(),
                    link: link.clone(),
                }),
                read_timeout: None,
            })
            .collect();
        let queues = if multiport { 2 * ports.len() + 2 } else { 2 };
        let device = Arc::new(Self {
            ports,
            link,
            queue_sizes: vec![QUEUE_SIZE; queues],
            features: F_SIZE | F_EMERG_WRITE | if multiport { F_MULTIPORT } else { 0 },
            multiport: AtomicBool::new(false),
            size: AtomicU32::new(80 | 25 << 16),
            control: Mutex::new(VecDeque::new()),
            control_stalled: AtomicBool::new(false),
        });
        (device, handles)
    }

    /// Tells the guest the size of the console's terminal.
    pub fn resize(&self, columns: u16, rows: u16) {
        self.size
            .store(u32::from(columns) | u32::from(rows) << 16, Ordering::SeqCst);
        if self.multiport.load(Ordering::SeqCst) {
            self.send_resize(0);
            self.link.serve(CONTROL_RECEIVE);
        }
        if let Some(engine) = self.link.get() {
            engine.config_changed();
        }
    }

    fn send_control(&self, port: usize, event: u16, value: u16, rest: &[u8]) {
        let mut message = Vec::with_capacity(CONTROL_LEN + rest.len());
        message.extend((port as u32).to_le_bytes());
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        message.extend(rest);
        let mut control = self.control.lock();
        // Twice the driver's bound: its own messages stop first, the host's few fit above.
        if control.len() < 2 * MAX_CONTROL {
            control.push_back(message);
        }
    }

    fn send_resize(&self, port: usize) {
        // Columns, then rows (5.3.6.2).
        let size = self.size.load(Ordering::SeqCst).to_le_bytes();
        self.send_control(port, CONTROL_RESIZE, 0, &size);
    }

    fn handle_control(&self, id: u32, event: u16, value: u16) {
        match event {
            CONTROL_DEVICE_READY if value == 1 => {
                for index in 0..self.ports.len() {
                    self.send_control(index, CONTROL_PORT_ADD, 1, &[]);
                }
            }
            CONTROL_PORT_READY if value == 1 => {
                let index = id as usize;
                let Some(port) = self.ports.get(index) else {
                    return;
                };
                if port.config.console {
                    self.send_control(index, CONTROL_CONSOLE_PORT, 1, &[]);
                    self.send_resize(index);
                }
                if !port.config.name.is_empty() {
                    self.send_control(index, CONTROL_PORT_NAME, 1, port.config.name.as_bytes());
                }
                self.send_control(index, CONTROL_PORT_OPEN, 1, &[]);
            }
            CONTROL_PORT_OPEN => {
                if let Some(port) = self.ports.get(id as usize) {
                    port.io.lock().guest_open = value != 0;
                    port.readable.notify_all();
                }
            }
            _ => {}
        }
    }

    fn process_control_transmit(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        let ram = queue.ram().clone();
        let mut served = Served::Drained;
        while let Some(chain) = queue.pop()? {
            if self.control.lock().len() >= MAX_CONTROL {
                queue.put_back(chain);
                self.control_stalled.store(true, Ordering::SeqCst);
                served = Served::Waiting;
                break;
            }
            let mut raw = [0; CONTROL_LEN];
            let read = chain.reader(&ram).read_exact(&mut raw);
            read.map_err(|_| QueueError::Request("control message"))?;
            let [i0, i1, i2, i3, e0, e1, v0, v1] = raw;
            self.handle_control(
                u32::from_le_bytes([i0, i1, i2, i3]),
                u16::from_le_bytes([e0, e1]),
                u16::from_le_bytes([v0, v1]),
            );
            queue.complete(chain, 0)?;
        }
        self.link.serve(CONTROL_RECEIVE);
        Ok(served)
    }

    fn process_control_receive(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        let ram = queue.ram().clone();
        let served = loop {
            if self.control.lock().is_empty() {
                break Served::Waiting;
            }
            let Some(chain) = queue.pop()? else {
                break Served::Drained;
            };
            let message = self.control.lock().pop_front().unwrap_or_default();
            // A buffer too short gets what fits, as a datagram would.
            let len = message.len().min(chain.writable_len() as usize);
            chain.writer(&ram).write_all(&message[..len])?;
            queue.complete(chain, len as u32)?;
        };
        if self.control.lock().len() < MAX_CONTROL
            && self.control_stalled.swap(false, Ordering::SeqCst)
        {
            self.link.serve(CONTROL_TRANSMIT);
        }
        Ok(served)
    }

    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..4].copy_from_slice(&self.size.load(Ordering::SeqCst).to_le_bytes());
        config[4..8].copy_from_slice(&(self.ports.len() as u32).to_le_bytes());
        config
    }
}

impl VirtioDevice for ConsoleDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        // Emergency write: one character to the console, queues or not (5.3.4).
        if let (CONFIG_EMERGENCY, Some(byte), Some(port)) =
            (offset, data.first(), self.ports.first())
        {
            let mut io = port.io.lock();
            if !io.abandoned {
                io.from_guest.push(&[*byte]);
                port.readable.notify_all();
            }
        }
    }

    fn attach(&self, engine: std::sync::Weak<QueueEngine>) {
        self.link.set(engine);
    }

    fn activate(&self, features: u64) {
        self.multiport
            .store(features & F_MULTIPORT != 0, Ordering::SeqCst);
        if features & F_MULTIPORT == 0
            && let Some(port) = self.ports.first()
        {
            port.io.lock().guest_open = true;
        }
    }

    fn reset(&self) {
        self.control.lock().clear();
        self.control_stalled.store(false, Ordering::SeqCst);
        self.multiport.store(false, Ordering::SeqCst);
        for port in &self.ports {
            let mut io = port.io.lock();
            io.to_guest.clear();
            io.transmit_offset = 0;
            io.stalled = false;
            io.guest_open = false;
            port.readable.notify_all();
            port.writable.notify_all();
        }
    }

    fn close(&self) {
        for port in &self.ports {
            port.io.lock().closed = true;
            port.readable.notify_all();
            port.writable.notify_all();
        }
    }

    fn process(&self, index: usize, queue: &mut Queue) -> Result<Served, QueueError> {
        match index {
            CONTROL_RECEIVE => return self.process_control_receive(queue),
            CONTROL_TRANSMIT => return self.process_control_transmit(queue),
            _ => {}
        }
        for port in &self.ports {
            if port.receive == index {
                return port.process_receive(queue);
            }
            if port.transmit == index {
                return port.process_transmit(queue);
            }
        }
        Ok(Served::Drained)
    }

    fn save(&self) -> DeviceState {
        let [c0, c1, r0, r1] = self.size.load(Ordering::SeqCst).to_le_bytes();
        DeviceState::Console(ConsoleState {
            columns: u16::from_le_bytes([c0, c1]),
            rows: u16::from_le_bytes([r0, r1]),
            control: self.control.lock().iter().cloned().collect(),
            ports: self.ports.iter().map(|port| port.save()).collect(),
        })
    }

    fn restore(&self, saved: DeviceState) -> Result<(), StateError> {
        let DeviceState::Console(ConsoleState {
            columns,
            rows,
            control,
            ports,
        }) = saved
        else {
            return Err(StateError::new(
                "virtio-console",
                "it belongs to another kind of device",
            ));
        };
        let same = ports.len() == self.ports.len();
        require(
            same,
            "virtio-console",
            "the device has another number of ports",
        )?;
        let bounded = control.len() <= 2 * MAX_CONTROL;
        require(bounded, "virtio-console", "too many control messages wait")?;
        let full = |port: &PortState| port.to_guest.len().max(port.from_guest.len()) > RING_LEN;
        require(
            !ports.iter().any(full),
            "virtio-console",
            "more bytes wait at a port than it has room for",
        )?;
        self.size
            .store(u32::from(columns) | u32::from(rows) << 16, Ordering::SeqCst);
        *self.control.lock() = control.into();
        for (port, saved) in self.ports.iter().zip(ports) {
            port.restore(saved);
        }
        Ok(())
    }
}

impl fmt::Debug for ConsoleDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports: Vec<_> = self.ports.iter().map(|port| &port.config).collect();
        f.debug_struct("ConsoleDevice")
            .field("ports", &ports)
            .finish_non_exhaustive()
    }
}

impl Drop for ConsoleDevice {
    fn drop(&mut self) {
        self.close();
    }
}

/// The host's side of a port; dropped with the last handle.
struct HostEnd {
    port: Arc<Port>,
    link: Arc<EngineLink>,
}

impl Drop for HostEnd {
    fn drop(&mut self) {
        self.port.io.lock().abandoned = true;
        self.link.serve(self.port.transmit);
    }
}

/// The host's end of a console port: reads what the guest writes, and the other way round.
///
/// Reads and writes block, in both directions at once if need be: clones share the port.
#[derive(Clone)]
pub struct PortHandle {
    end: Arc<HostEnd>,
    read_timeout: Option<Duration>,
}

impl PortHandle {
    /// The port's name.
    pub fn name(&self) -> &str {
        &self.end.port.config.name
    }

    /// Whether a process in the guest has the port open.
    pub fn is_guest_open(&self) -> bool {
        self.end.port.io.lock().guest_open
    }

    /// How long a read through this handle waits for data; `None` for as long as it takes.
    pub fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.read_timeout = timeout;
    }
}

impl Read for &PortHandle {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let port = &self.end.port;
        let deadline = self.read_timeout.map(|timeout| Instant::now() + timeout);
        let mut io = port.io.lock();
        loop {
            let len = io.from_guest.pop(out);
            if len > 0 || out.is_empty() {
                let stalled = std::mem::take(&mut io.stalled);
                drop(io);
                if stalled {
                    self.end.link.serve(port.transmit);
                }
                return Ok(len);
            }
            if io.closed {
                return Ok(0);
            }
            if !wait(&port.readable, &mut io, deadline) {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}

impl Write for &PortHandle {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let port = &self.end.port;
        let mut io = port.io.lock();
        while !io.closed && io.to_guest.room() == 0 && !data.is_empty() {
            port.writable.wait(&mut io);
        }
        if io.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let len = io.to_guest.push(data);
        drop(io);
        self.end.link.serve(port.receive);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for PortHandle {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        (&*self).read(out)
    }
}

impl Write for PortHandle {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        (&*self).write(data)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for PortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortHandle")
            .field("name", &self.name())
            .finish_non_exhaustive()
    }
}
