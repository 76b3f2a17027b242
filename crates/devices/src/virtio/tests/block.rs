//! The block device: data, every status code, limits.

use std::fs::File;
use std::sync::Arc;

use parking_lot::Mutex;
use skerry_storage::{Abilities, Disk, DiskError, IoBuf, IoBufMut, Operation, check_range};

use super::super::block::*;
use super::super::testing::*;
use super::super::*;

const SECTORS: u64 = 2048;

/// A disk in memory that counts flushes and fails on demand.
#[derive(Debug)]
struct MemoryDisk {
    bytes: Mutex<Vec<u8>>,
    read_only: bool,
    flushes: Mutex<u32>,
    fail: Mutex<bool>,
}

impl MemoryDisk {
    fn new(read_only: bool) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new((0..SECTORS * 512).map(|i| (i / 512) as u8).collect()),
            read_only,
            flushes: Mutex::new(0),
            fail: Mutex::new(false),
        })
    }

    fn check(&self) -> Result<(), DiskError> {
        match *self.fail.lock() {
            false => Ok(()),
            true => Err(DiskError::Io {
                disk: "test".into(),
                operation: Operation::Read,
                offset: 0,
                source: File::open("/nonexistent").unwrap_err(),
            }),
        }
    }
}

impl Disk for MemoryDisk {
    fn name(&self) -> &str {
        "memory"
    }
    fn size(&self) -> u64 {
        SECTORS * 512
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn abilities(&self) -> Abilities {
        Abilities {
            discard: true,
            fast_zeroes: true,
        }
    }
    fn read_vectored_at(&self, bufs: &[IoBufMut<'_>], mut offset: u64) -> Result<(), DiskError> {
        self.check()?;
        let bytes = self.bytes.lock();
        for buf in bufs {
            check_range("memory", offset, buf.len() as u64, self.size())?;
            buf.copy_from(0, &bytes[offset as usize..offset as usize + buf.len()]);
            offset += buf.len() as u64;
        }
        Ok(())
    }
    fn write_vectored_at(&self, bufs: &[IoBuf<'_>], mut offset: u64) -> Result<(), DiskError> {
        self.check()?;
        let mut bytes = self.bytes.lock();
        for buf in bufs {
            check_range("memory", offset, buf.len() as u64, self.size())?;
            buf.copy_to(0, &mut bytes[offset as usize..offset as usize + buf.len()]);
            offset += buf.len() as u64;
        }
        Ok(())
    }
    fn flush(&self) -> Result<(), DiskError> {
        *self.flushes.lock() += 1;
        self.check()
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.write_zeroes(offset, len, true)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<(), DiskError> {
        self.check()?;
        check_range("memory", offset, len, self.size())?;
        self.bytes.lock()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }
}

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut raw = kind.to_le_bytes().to_vec();
    raw.extend([0; 4]);
    raw.extend(sector.to_le_bytes());
    raw
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut raw = sector.to_le_bytes().to_vec();
    raw.extend(sectors.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    raw
}

fn start(disk: Arc<MemoryDisk>, mask: u64) -> FakeGuest {
    let config = BlockConfig {
        serial: "skerry-root".into(),
        queues: 1,
        exchangeable: false,
    };
    FakeGuest::start(BlockDevice::new(disk, &config), mask, QueueRunner::Inline)
}

impl FakeGuest {
    /// The status byte of a request without data from the device.
    fn status(&mut self, kind: u32, sector: u64, data: &[u8]) -> u8 {
        let header = header(kind, sector);
        let input: &[&[u8]] = if data.is_empty() {
            &[&header]
        } else {
            &[&header, data]
        };
        let (output, len) = self.request(0, input, &[1]);
        assert_eq!(len, 1);
        output[0][0]
    }
}

#[test]
fn reads_and_writes_scattered_sectors() {
    let disk = MemoryDisk::new(false);
    let mut guest = start(disk.clone(), u64::MAX);
    assert_eq!(guest.config(0), SECTORS.to_le_bytes());
    let (output, len) = guest.request(0, &[&header(0, 5)], &[512, 100, 412, 1]);
    assert_eq!(len, 1025);
    assert_eq!(output[0], [5; 512]);
    assert_eq!(
        (&output[1][..], &output[2][..]),
        (&[6; 100][..], &[6; 412][..])
    );
    assert_eq!(output[3], [OK]);

    let data: Vec<u8> = (0..1024u32).map(|i| i as u8).collect();
    assert_eq!(guest.status(1, 9, &data), OK);
    assert_eq!(disk.bytes.lock()[9 * 512..11 * 512], data);
    // A header in pieces, with data and status right behind, is as good.
    let h = header(1, 20);
    let pieces: &[&[u8]] = &[&h[..3], &h[3..], &data[..7], &data[7..512]];
    let (output, _) = guest.request(0, pieces, &[1]);
    assert_eq!(output[0], [OK]);
    assert_eq!(disk.bytes.lock()[20 * 512..21 * 512], data[..512]);
}

#[test]
fn transfers_beyond_the_disk_fail() {
    let disk = MemoryDisk::new(false);
    let mut guest = start(disk, u64::MAX);
    for sector in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / 512] {
        assert_eq!(guest.status(1, sector, &[0; 1024]), IO_ERROR);
        let (output, len) = guest.request(0, &[&header(0, sector)], &[1024, 1]);
        assert_eq!((output[1][0], len), (IO_ERROR, 0));
    }
    assert_eq!(
        guest.status(1, 0, &[0; 100]),
        IO_ERROR,
        "not a whole sector"
    );
    let (output, _) = guest.request(0, &[&header(0, 0)], &[100, 1]);
    assert_eq!(output[1], [IO_ERROR]);
    assert!(!guest.needs_reset());
}

#[test]
fn flush_and_write_through() {
    let disk = MemoryDisk::new(false);
    let mut guest = start(disk.clone(), u64::MAX);
    assert_eq!(guest.status(1, 0, &[1; 512]), OK);
    assert_eq!(*disk.flushes.lock(), 0);
    assert_eq!(guest.status(4, 0, &[]), OK);
    assert_eq!(*disk.flushes.lock(), 1);
    // A driver that can't flush gets every write made durable.
    let mut guest = start(disk.clone(), !(1 << 9));
    assert_eq!(guest.status(1, 0, &[1; 512]), OK);
    assert_eq!(*disk.flushes.lock(), 2);
    *disk.fail.lock() = true;
    assert_eq!(guest.status(4, 0, &[]), IO_ERROR);
    assert_eq!(guest.status(1, 0, &[1; 512]), IO_ERROR);
}

#[test]
fn read_only_disk_refuses_changes() {
    let disk = MemoryDisk::new(true);
    let mut guest = start(disk.clone(), u64::MAX);
    assert_ne!(guest.features & 1 << 5, 0);
    assert_eq!(guest.features & (1 << 13 | 1 << 14), 0);
    assert_eq!(guest.status(1, 0, &[9; 512]), IO_ERROR);
    assert_eq!(guest.status(11, 0, &range(0, 1, 0)), UNSUPPORTED);
    assert_eq!(guest.status(13, 0, &range(0, 1, 0)), UNSUPPORTED);
    assert_eq!(disk.bytes.lock()[..512], [0; 512]);
    assert_eq!(guest.request(0, &[&header(0, 1)], &[512, 1]).0[0], [1; 512]);
}

#[test]
fn identity_and_unknown_requests() {
    let mut guest = start(MemoryDisk::new(false), u64::MAX);
    let (output, len) = guest.request(0, &[&header(8, 0)], &[20, 1]);
    assert_eq!(len, 21);
    assert_eq!(&output[0][..12], b"skerry-root\0");
    let (output, _) = guest.request(0, &[&header(8, 0)], &[8, 1]);
    assert_eq!(output[1], [IO_ERROR]);
    assert_eq!(guest.status(77, 0, &[]), UNSUPPORTED);
    let (output, _) = guest.request(0, &[&header(77, 0)], &[64, 1]);
    assert_eq!(output[1], [UNSUPPORTED]);
}

#[test]
fn discard_and_write_zeroes() {
    let disk = MemoryDisk::new(false);
    let mut guest = start(disk.clone(), u64::MAX);
    let two = [range(2, 1, 0), range(4, 2, 0)].concat();
    assert_eq!(guest.status(11, 0, &two), OK);
    let zeroed = |sector: usize| disk.bytes.lock()[sector * 512..][..512] == [0; 512];
    assert!(zeroed(2) && !zeroed(3) && zeroed(4) && zeroed(5) && !zeroed(6));
    assert_eq!(guest.status(13, 0, &range(6, 1, 1)), OK);
    assert!(zeroed(6));
    assert_eq!(
        guest.status(11, 0, &range(0, 1, 1)),
        UNSUPPORTED,
        "unmap on a discard"
    );
    assert_eq!(
        guest.status(13, 0, &range(8, 1, 2)),
        UNSUPPORTED,
        "unknown flag"
    );
    for bad in [
        range(SECTORS, 1, 0),
        range(u64::MAX, 1, 0),
        range(0, u32::MAX, 0),
    ] {
        assert_eq!(guest.status(11, 0, &bad), IO_ERROR);
        assert_eq!(guest.status(13, 0, &bad), IO_ERROR);
    }
    // One bad range spoils the request before any of it is done.
    let mixed = [range(10, 1, 0), range(SECTORS, 1, 0)].concat();
    assert_eq!(guest.status(13, 0, &mixed), IO_ERROR);
    assert!(!zeroed(10));
    assert_eq!(guest.status(11, 0, &[0; 15]), IO_ERROR);
    assert_eq!(guest.status(11, 0, &range(0, 1, 0).repeat(65)), IO_ERROR);
}

#[test]
fn malformed_requests_need_a_reset() {
    let mut guest = start(MemoryDisk::new(false), u64::MAX);
    let buffer = guest.readable(&header(0, 0));
    guest.add(0, &[buffer]);
    guest.kick(0);
    assert!(guest.needs_reset(), "no status byte");
    assert!(guest.used(0).is_none());
    let mut guest = start(MemoryDisk::new(false), u64::MAX);
    let (short, status) = (guest.readable(&[0; 15]), guest.buffer(1, true));
    guest.add(0, &[short, status]);
    guest.kick(0);
    assert!(guest.needs_reset(), "no header");
}

#[test]
fn a_snapshot_refuses_another_disk() {
    let guest = start(MemoryDisk::new(false), u64::MAX);
    let saved = guest.mmio.save();
    let other = start(MemoryDisk::new(true), u64::MAX);
    assert!(other.mmio.restore(saved.clone()).is_err());
    let same = start(MemoryDisk::new(false), u64::MAX);
    same.mmio.restore(saved).unwrap();
}
