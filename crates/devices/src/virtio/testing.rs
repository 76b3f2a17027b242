//! A guest's side of virtio in memory: a driver that builds rings as a kernel would, for tests,
//! fuzzing and benchmarks.

#![expect(missing_docs, reason = "test support: the names say it")]
#![expect(
    clippy::unwrap_used,
    reason = "test support: a failure is a failed test"
)]

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use skerry_hypervisor::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::{F_EVENT_IDX, F_INDIRECT_DESC, QueueRunner, VirtioDevice, VirtioMmio};
use crate::bus::MmioDevice;
use crate::irq::IrqLine;
use crate::irq::testing::LineProbe;

pub const STATUS: u64 = 0x70;
pub const STATUS_OK: u32 = 0x0f;
pub const NEEDS_RESET: u32 = 0x40;
/// Where a queue's rings begin, by queue; buffers come after all of them.
const RING_STRIDE: u64 = 0x1_0000;
const MAX_QUEUES: u64 = 8;
pub const BUFFERS: u64 = RING_STRIDE * MAX_QUEUES;
pub const RAM_LEN: usize = 32 << 20;

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    pub writable: bool,
}

#[derive(Debug)]
struct DriverQueue {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    free: VecDeque<u16>,
    chains: HashMap<u16, Vec<u16>>,
    next_available: u16,
    next_used: u16,
}

/// A machine with one virtio device and its driver.
pub struct FakeGuest {
    pub ram: Arc<GuestRam>,
    pub mmio: Arc<VirtioMmio>,
    pub features: u64,
    probe: Arc<LineProbe>,
    queues: Vec<DriverQueue>,
    next_buffer: u64,
    indirect: bool,
}

pub fn ram(len: usize) -> Arc<GuestRam> {
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), len)]).unwrap())
}

impl FakeGuest {
    /// Builds the transport and goes through the driver's initialisation, accepting `mask` of what is
    /// offered.
    pub fn start(device: Arc<dyn VirtioDevice>, mask: u64, runner: QueueRunner) -> Self {
        Self::start_in(ram(RAM_LEN), device, mask, runner)
    }

    pub fn start_in(
        ram: Arc<GuestRam>,
        device: Arc<dyn VirtioDevice>,
        mask: u64,
        runner: QueueRunner,
    ) -> Self {
        let (probe, line): (_, IrqLine) = LineProbe::new();
        let sizes = device.queue_sizes().to_vec();
        let mmio = VirtioMmio::new(device, ram.clone(), line, runner).unwrap();
        let mut guest = Self {
            ram,
            mmio,
            features: 0,
            probe,
            queues: Vec::new(),
            next_buffer: BUFFERS,
            indirect: false,
        };
        guest.write(STATUS, 0);
        guest.write(STATUS, 3);
        guest.features = guest.offered() & mask;
        for half in 0..2 {
            guest.write(0x24, half);
            guest.write(0x20, (guest.features >> (32 * half)) as u32);
        }
        guest.write(STATUS, 0xb);
        assert_eq!(guest.read(STATUS), 0xb, "features refused");
        for (index, size) in sizes.into_iter().enumerate().take(MAX_QUEUES as usize) {
            guest.set_up_queue(index, size);
        }
        guest.write(STATUS, STATUS_OK);
        guest
    }

    pub fn offered(&self) -> u64 {
        (0..2).fold(0, |bits, half| {
            self.write(0x14, half);
            bits | u64::from(self.read(0x10)) << (32 * half)
        })
    }

    /// Uses indirect tables from now on.
    pub fn use_indirect(&mut self) {
        assert_ne!(self.features & F_INDIRECT_DESC, 0);
        self.indirect = true;
    }

    fn set_up_queue(&mut self, index: usize, size: u16) {
        let base = index as u64 * RING_STRIDE;
        let queue = DriverQueue {
            size,
            descriptors: base,
            available: base + 0x8000,
            used: base + 0xa000,
            free: (0..size).collect(),
            chains: HashMap::new(),
            next_available: 0,
            next_used: 0,
        };
        self.ram
            .write_slice(&vec![0; RING_STRIDE as usize], GuestAddress(base))
            .unwrap();
        self.write(0x30, index as u32);
        assert_eq!(self.read(0x44), 0);
        assert!(self.read(0x34) >= size.into());
        self.write(0x38, size.into());
        for (register, address) in [
            (0x80, queue.descriptors),
            (0x90, queue.available),
            (0xa0, queue.used),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
        assert_eq!(self.read(0x44), 1);
        self.queues.push(queue);
    }

    pub fn read(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        MmioDevice::read(&*self.mmio, register, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&self, register: u64, value: u32) {
        MmioDevice::write(&*self.mmio, register, &value.to_le_bytes());
    }

    pub fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        MmioDevice::read(&*self.mmio, 0x100 + offset, &mut data);
        data
    }

    pub fn needs_reset(&self) -> bool {
        self.read(STATUS) & NEEDS_RESET != 0
    }

    /// The interrupt line, and how often it rose.
    pub fn interrupt(&self) -> (bool, u32) {
        (self.probe.level(), self.probe.edges())
    }

    pub fn acknowledge(&self) {
        let status = self.read(0x60);
        self.write(0x64, status);
    }

    /// Reserves guest memory for a buffer.
    pub fn allocate(&mut self, len: u32) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += u64::from(len).next_multiple_of(64);
        assert!(self.next_buffer <= RAM_LEN as u64, "out of buffers");
        address
    }

    pub fn buffer(&mut self, len: u32, writable: bool) -> Buffer {
        Buffer {
            address: self.allocate(len),
            len,
            writable,
        }
    }

    pub fn readable(&mut self, data: &[u8]) -> Buffer {
        let buffer = self.buffer(data.len() as u32, false);
        self.ram
            .write_slice(data, GuestAddress(buffer.address))
            .unwrap();
        buffer
    }

    pub fn bytes(&self, buffer: Buffer) -> Vec<u8> {
        let mut data = vec![0; buffer.len as usize];
        self.ram
            .read_slice(&mut data, GuestAddress(buffer.address))
            .unwrap();
        data
    }

    pub fn write_descriptor(&self, table: u64, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&buffer.address.to_le_bytes());
        raw[8..12].copy_from_slice(&buffer.len.to_le_bytes());
        let flags = flags | if buffer.writable { 2 } else { 0 };
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.ram
            .write_slice(&raw, GuestAddress(table + 16 * u64::from(index)))
            .unwrap();
    }

    /// Makes a chain of `buffers` available, without notifying; returns its head.
    pub fn add(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let table = if self.indirect {
            self.allocate(16 * buffers.len() as u32)
        } else {
            0
        };
        let q = &mut self.queues[queue];
        let count = if self.indirect { 1 } else { buffers.len() };
        let indices: Vec<u16> = q.free.drain(..count).collect();
        let (head, descriptors) = (indices[0], q.descriptors);
        for (i, buffer) in buffers.iter().enumerate() {
            let last = i + 1 == buffers.len();
            let next = if last { 0 } else { i as u16 + 1 };
            if self.indirect {
                self.write_descriptor(table, i as u16, *buffer, u16::from(!last), next);
            } else {
                let next = if last { 0 } else { indices[i + 1] };
                self.write_descriptor(descriptors, indices[i], *buffer, u16::from(!last), next);
            }
        }
        if self.indirect {
            let whole = Buffer {
                address: table,
                len: 16 * buffers.len() as u32,
                writable: false,
            };
            self.write_descriptor(descriptors, head, whole, 4, 0);
        }
        let q = &mut self.queues[queue];
        q.chains.insert(head, indices);
        let slot = q.available + 4 + 2 * u64::from(q.next_available % q.size);
        q.next_available = q.next_available.wrapping_add(1);
        self.ram
            .store(head.to_le(), GuestAddress(slot), Ordering::Relaxed)
            .unwrap();
        let index = GuestAddress(q.available + 2);
        self.ram
            .store(q.next_available.to_le(), index, Ordering::Release)
            .unwrap();
        head
    }

    pub fn kick(&self, queue: usize) {
        self.write(0x50, queue as u32);
    }

    /// Whether the device wants a notification for what was made available last.
    pub fn must_kick(&self, queue: usize) -> bool {
        let q = &self.queues[queue];
        std::sync::atomic::fence(Ordering::SeqCst);
        let load = |at: u64| {
            self.ram
                .load::<u16>(GuestAddress(at), Ordering::Relaxed)
                .unwrap()
        };
        if self.features & F_EVENT_IDX != 0 {
            let event = load(q.used + 4 + 8 * u64::from(q.size));
            q.next_available.wrapping_sub(event).wrapping_sub(1) == 0
        } else {
            load(q.used) & 1 == 0
        }
    }

    /// Takes a used chain, if there is one: its head and the length the device wrote.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let q = &mut self.queues[queue];
        let index: u16 = self
            .ram
            .load(GuestAddress(q.used + 2), Ordering::Acquire)
            .unwrap();
        if index == q.next_used {
            return None;
        }
        let slot = q.used + 4 + 8 * u64::from(q.next_used % q.size);
        let id: u32 = self.ram.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.ram.read_obj(GuestAddress(slot + 4)).unwrap();
        q.next_used = q.next_used.wrapping_add(1);
        if self.features & F_EVENT_IDX != 0 {
            // "Interrupt me for the next one."
            let at = GuestAddress(q.available + 4 + 2 * u64::from(q.size));
            self.ram.store(q.next_used, at, Ordering::SeqCst).unwrap();
        }
        let head = id as u16;
        let chain = q.chains.remove(&head).unwrap();
        q.free.extend(chain);
        Some((head, len))
    }

    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(used) = self.used(queue) {
                return used;
            }
            assert!(Instant::now() < deadline, "the device never finished");
            std::thread::yield_now();
        }
    }

    /// One request: what the device reads, then how much it may write. Returns what it wrote into each
    /// buffer and the used length.
    pub fn request(
        &mut self,
        queue: usize,
        input: &[&[u8]],
        output: &[u32],
    ) -> (Vec<Vec<u8>>, u32) {
        let mut buffers: Vec<_> = input.iter().map(|data| self.readable(data)).collect();
        let writable: Vec<_> = output.iter().map(|len| self.buffer(*len, true)).collect();
        buffers.extend(&writable);
        self.add(queue, &buffers);
        self.kick(queue);
        let (_, len) = self.wait_used(queue);
        (
            writable
                .into_iter()
                .map(|buffer| self.bytes(buffer))
                .collect(),
            len,
        )
    }

    /// Where the three parts of a queue are: descriptors, available ring, used ring.
    pub fn rings(&self, queue: usize) -> (u64, u64, u64) {
        let q = &self.queues[queue];
        (q.descriptors, q.available, q.used)
    }

    /// Number of a queue's descriptors.
    pub fn size(&self, queue: usize) -> u16 {
        self.queues[queue].size
    }
}
