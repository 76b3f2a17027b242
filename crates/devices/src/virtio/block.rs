//! The block device (virtio 1.3, 5.2) over a [`Disk`].
//!
//! Data moves between guest RAM and the disk without a copy of our own: a chain's buffers become the
//! vectors of the disk's read or write.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use serde::{Deserialize, Serialize};
use skerry_hypervisor::memory::GuestRam;
use skerry_storage::{Disk, DiskError, IoBuf, IoBufMut, SECTOR_SIZE};

use super::{
    Chain, ChainCursor, DeviceKind, DeviceState, EngineLink, Queue, QueueEngine, QueueError,
    Served, VirtioDevice, read_config_bytes,
};
use crate::state::{StateError, require};

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const HEADER_LEN: usize = 16;
const RANGE_LEN: u32 = 16;
const RANGE_UNMAP: u32 = 1;
/// Bytes of the answer to GET_ID (5.2.6).
const ID_LEN: usize = 20;

/// Room for a request of 1 MiB whose pages lie apart.
const QUEUE_SIZE: u16 = 512;
/// Data buffers of one request: the queue's size less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Ranges of one discard or write-zeroes request.
const MAX_RANGES: u32 = 64;
/// Sectors of one discarded range: 1 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Sectors of one zeroed range: 64 MiB, so that no request keeps a queue for long.
const MAX_ZERO_SECTORS: u32 = 1 << 17;
/// Hosts' page size: smaller writes cost the host a read.
const PHYSICAL_BLOCK: u32 = 4096;
const CONFIG_LEN: usize = 60;

/// What is fixed about a block device.
#[derive(Debug, Clone)]
pub struct BlockConfig {
    /// What GET_ID answers; the guest finds it as the disk's serial number. 20 bytes at most count.
    pub serial: String,
    /// Number of request queues, 1 to 16.
    pub queues: u16,
    /// A saved state goes with a disk of any size: the guest has not used the one that it was saved
    /// with, and is told of the change.
    pub exchangeable: bool,
}

impl Default for BlockConfig {
    fn default() -> Self {
        Self {
            serial: String::new(),
            queues: 1,
            exchangeable: false,
        }
    }
}

/// What a snapshot keeps of a block device: enough to refuse another disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    size: u64,
    read_only: bool,
}

/// How a request ended; the values are those of the status byte (5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// The first bytes of a request.
struct Header {
    kind: u32,
    /// The sector in bytes, unless that is beyond all addresses.
    offset: Option<u64>,
}

impl Header {
    fn read(chain: &Chain, ram: &GuestRam) -> Result<Self, QueueError> {
        let mut raw = [0; HEADER_LEN];
        let read = chain.reader(ram).read_exact(&mut raw);
        read.map_err(|_| QueueError::Request("header"))?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = raw;
        Ok(Self {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            offset: u64::from_le_bytes(sector).checked_mul(SECTOR_SIZE),
        })
    }
}

/// A range of a discard or write-zeroes request, in bytes.
struct Range {
    offset: u64,
    len: u64,
    unmap: bool,
}

/// The block device.
pub struct BlockDevice {
    disk: Arc<dyn Disk>,
    id: [u8; ID_LEN],
    queue_sizes: Vec<u16>,
    config: [u8; CONFIG_LEN],
    features: u64,
    /// The driver didn't negotiate FLUSH, so a write is done when it is durable (5.2.5.2).
    write_through: AtomicBool,
    exchangeable: bool,
    /// The disk has another size than the guest was told.
    changed: AtomicBool,
    read: AtomicU64,
    written: AtomicU64,
    /// The first request that its disk failed.
    failure: OnceLock<String>,
    link: EngineLink,
}

impl BlockDevice {
    /// A block device over `disk`.
    pub fn new(disk: Arc<dyn Disk>, config: &BlockConfig) -> Arc<Self> {
        let queues = config.queues.clamp(1, 16);
        let mut id = [0; ID_LEN];
        let len = config.serial.len().min(ID_LEN);
        id[..len].copy_from_slice(&config.serial.as_bytes()[..len]);
        let mut features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ;
        if disk.is_read_only() {
            features |= F_RO;
        } else {
            let abilities = disk.abilities();
            if abilities.discard {
                features |= F_DISCARD;
            }
            if abilities.fast_zeroes {
                features |= F_WRITE_ZEROES;
            }
        }
        Arc::new(Self {
            config: Self::config_space(&*disk, queues),
            disk,
            id,
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
            features,
            write_through: AtomicBool::new(false),
            exchangeable: config.exchangeable,
            changed: AtomicBool::new(false),
            read: AtomicU64::new(0),
            written: AtomicU64::new(0),
            failure: OnceLock::new(),
            link: EngineLink::default(),
        })
    }

    /// Why its disk first failed a request, if it has.
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Bytes that the guest has read and written, since the device was made.
    pub fn transferred(&self) -> (u64, u64) {
        let read = self.read.load(Ordering::Relaxed);
        (read, self.written.load(Ordering::Relaxed))
    }

    /// The configuration layout of 5.2.4.
    fn config_space(disk: &dyn Disk, queues: u16) -> [u8; CONFIG_LEN] {
        let mut space = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(disk.size() / SECTOR_SIZE).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR_SIZE as u32).to_le_bytes());
        // Topology: log2 of logical blocks per physical one, then the optimal I/O size in blocks.
        put(
            24,
            &[(PHYSICAL_BLOCK / SECTOR_SIZE as u32).trailing_zeros() as u8],
        );
        put(26, &1u16.to_le_bytes());
        put(34, &queues.to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &(PHYSICAL_BLOCK / SECTOR_SIZE as u32).to_le_bytes());
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        space
    }

    /// Whether a request waits for the host's disk rather than its page cache.
    fn takes_long(&self, kind: u32) -> bool {
        match kind {
            T_FLUSH | T_DISCARD | T_WRITE_ZEROES => true,
            T_OUT => self.write_through.load(Ordering::Relaxed),
            _ => false,
        }
    }

    /// Does one request; returns the bytes written to the guest's memory, status included.
    fn request(&self, header: Header, chain: &Chain, ram: &GuestRam) -> Result<u32, QueueError> {
        let Some(data_len) = chain.writable_len().checked_sub(1) else {
            return Err(QueueError::Request("status byte"));
        };
        let Header { kind, offset } = header;
        let mut reader = chain.reader(ram);
        reader.skip(HEADER_LEN)?;

        let mut writer = chain.writer(ram);
        let (status, written) = match kind {
            T_IN => self.read(&mut writer, data_len, offset)?,
            T_OUT => (self.write(&mut reader, offset)?, 0),
            T_FLUSH => (self.outcome("flush", self.disk.flush()), 0),
            T_GET_ID => Self::get_id(&self.id, &mut writer, data_len)?,
            T_DISCARD if self.features & F_DISCARD != 0 => (self.discard(&mut reader)?, 0),
            T_WRITE_ZEROES if self.features & F_WRITE_ZEROES != 0 => (self.zero(&mut reader)?, 0),
            _ => (Status::Unsupported, 0),
        };
        // The status is the last writable byte whatever part of the data was filled.
        writer.skip((data_len - written) as usize)?;
        writer.write_all(&[status as u8])?;
        // Bytes behind a gap don't count as written (2.7.8.2).
        Ok(if written == data_len {
            written + 1
        } else {
            written
        })
    }

    fn outcome(&self, what: &str, result: Result<(), DiskError>) -> Status {
        match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                // A guest that goes on and on fills no log.
                if self.failure.set(error.to_string()).is_ok() {
                    tracing::warn!(
                        disk = self.disk.name(),
                        what,
                        "A guest's request failed: {error}"
                    );
                } else {
                    tracing::debug!(disk = self.disk.name(), what, %error, "A guest's request failed");
                }
                Status::IoError
            }
        }
    }

    /// The byte range of a transfer, if it lies on the disk in whole sectors.
    fn transfer(&self, offset: Option<u64>, len: u32) -> Option<u64> {
        let offset = offset?;
        let end = offset.checked_add(len.into())?;
        (end <= self.disk.size() && u64::from(len) % SECTOR_SIZE == 0).then_some(offset)
    }

    fn read(
        &self,
        writer: &mut ChainCursor<'_>,
        len: u32,
        offset: Option<u64>,
    ) -> Result<(Status, u32), QueueError> {
        let Some(offset) = self.transfer(offset, len) else {
            return Ok((Status::IoError, 0));
        };
        let mut slices = Vec::with_capacity(8);
        writer.take_slices(len as usize, &mut slices)?;
        let bufs: Vec<_> = slices.iter().map(IoBufMut::from_volatile).collect();
        let status = self.outcome("read", self.disk.read_vectored_at(&bufs, offset));
        if status == Status::Ok {
            self.read.fetch_add(len.into(), Ordering::Relaxed);
        }
        // What a failed read left in the buffers is of no use to the guest, but is written.
        Ok((status, len))
    }

    fn write(
        &self,
        reader: &mut ChainCursor<'_>,
        offset: Option<u64>,
    ) -> Result<Status, QueueError> {
        let len = reader.remaining();
        let Some(offset) = self
            .transfer(offset, len)
            .filter(|_| !self.disk.is_read_only())
        else {
            return Ok(Status::IoError);
        };
        let mut slices = Vec::with_capacity(8);
        reader.take_slices(len as usize, &mut slices)?;
        let bufs: Vec<_> = slices.iter().map(IoBuf::from_volatile).collect();
        let mut status = self.outcome("write", self.disk.write_vectored_at(&bufs, offset));
        if status == Status::Ok {
            self.written.fetch_add(len.into(), Ordering::Relaxed);
        }
        if status == Status::Ok && self.write_through.load(Ordering::Relaxed) {
            status = self.outcome("flush", self.disk.flush());
        }
        Ok(status)
    }

    fn get_id(
        id: &[u8; ID_LEN],
        writer: &mut ChainCursor<'_>,
        len: u32,
    ) -> Result<(Status, u32), QueueError> {
        if (len as usize) < ID_LEN {
            return Ok((Status::IoError, 0));
        }
        writer.write_all(id)?;
        Ok((Status::Ok, ID_LEN as u32))
    }

    /// Reads the ranges of a discard or write-zeroes request and checks each before any is acted on.
    fn ranges(
        &self,
        reader: &mut ChainCursor<'_>,
        max_sectors: u32,
        may_unmap: bool,
    ) -> Result<Result<Vec<Range>, Status>, QueueError> {
        let len = reader.remaining();
        if len == 0 || !len.is_multiple_of(RANGE_LEN) || len / RANGE_LEN > MAX_RANGES {
            return Ok(Err(Status::IoError));
        }
        let mut ranges = Vec::with_capacity((len / RANGE_LEN) as usize);
        while reader.remaining() > 0 {
            let mut raw = [0; RANGE_LEN as usize];
            reader.read_exact(&mut raw)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f @ ..] = raw;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(f);
            // Unknown flags, and "unmap" on a discard, are unsupported (5.2.6.2).
            if flags & !RANGE_UNMAP != 0 || (flags != 0 && !may_unmap) {
                return Ok(Err(Status::Unsupported));
            }
            let len = u64::from(sectors) * SECTOR_SIZE;
            let offset = sector.checked_mul(SECTOR_SIZE).filter(|offset| {
                offset
                    .checked_add(len)
                    .is_some_and(|end| end <= self.disk.size())
            });
            match offset.filter(|_| sectors <= max_sectors) {
                Some(offset) => ranges.push(Range {
                    offset,
                    len,
                    unmap: flags != 0,
                }),
                None => return Ok(Err(Status::IoError)),
            }
        }
        Ok(Ok(ranges))
    }

    fn discard(&self, reader: &mut ChainCursor<'_>) -> Result<Status, QueueError> {
        let ranges = match self.ranges(reader, MAX_DISCARD_SECTORS, false)? {
            Ok(ranges) => ranges,
            Err(status) => return Ok(status),
        };
        let mut ranges = ranges.iter().filter(|range| range.len > 0);
        let result = ranges.try_for_each(|range| self.disk.discard(range.offset, range.len));
        Ok(self.outcome("discard", result))
    }

    fn zero(&self, reader: &mut ChainCursor<'_>) -> Result<Status, QueueError> {
        let ranges = match self.ranges(reader, MAX_ZERO_SECTORS, true)? {
            Ok(ranges) => ranges,
            Err(status) => return Ok(status),
        };
        let mut ranges = ranges.iter().filter(|range| range.len > 0);
        let result = ranges
            .try_for_each(|range| self.disk.write_zeroes(range.offset, range.len, range.unmap));
        let mut status = self.outcome("write zeroes", result);
        if status == Status::Ok && self.write_through.load(Ordering::Relaxed) {
            status = self.outcome("flush", self.disk.flush());
        }
        Ok(status)
    }
}

impl VirtioDevice for BlockDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn attach(&self, engine: Weak<QueueEngine>) {
        self.link.set(engine);
    }

    fn resumed(&self) {
        if self.changed.swap(false, Ordering::SeqCst)
            && let Some(engine) = self.link.get()
        {
            engine.config_changed();
        }
    }

    fn activate(&self, features: u64) {
        self.write_through
            .store(features & F_FLUSH == 0, Ordering::Relaxed);
    }

    fn process(&self, _index: usize, queue: &mut Queue) -> Result<Served, QueueError> {
        let ram = queue.ram().clone();
        while let Some(chain) = queue.pop()? {
            let header = Header::read(&chain, &ram)?;
            if !queue.may_wait() && self.takes_long(header.kind) {
                queue.put_back(chain);
                return Ok(Served::Later);
            }
            let written = self.request(header, &chain, &ram)?;
            queue.complete(chain, written)?;
        }
        Ok(Served::Drained)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockState {
            size: self.disk.size(),
            read_only: self.disk.is_read_only(),
        })
    }

    fn restore(&self, saved: DeviceState) -> Result<(), StateError> {
        let DeviceState::Block(BlockState { size, read_only }) = saved else {
            return Err(StateError::new(
                "virtio-blk",
                "it belongs to another kind of device",
            ));
        };
        let same = size == self.disk.size();
        let problem = "the disk has another size";
        require(same || self.exchangeable, "virtio-blk", problem)?;
        self.changed.store(!same, Ordering::SeqCst);
        let same = read_only == self.disk.is_read_only();
        require(
            same,
            "virtio-blk",
            "the disk was read-only then or is now, but not both",
        )
    }
}

impl fmt::Debug for BlockDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockDevice")
            .field("disk", &self.disk)
            .finish_non_exhaustive()
    }
}
