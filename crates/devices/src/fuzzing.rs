//! Bodies of the fuzz targets: each reads its input as a script of what a hostile guest (and now and
//! then its host) does to a device. Plain `cargo test` runs a bounded random form of them.
//!
//! A target fails by panicking, hanging or growing without bound; what the devices answer is the
//! business of the ordinary tests.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use skerry_hypervisor::memory::GuestRam;
use skerry_storage::{Abilities, Disk, DiskError, IoBuf, IoBufMut, check_range};
use vm_memory::{Bytes, GuestAddress};

use crate::bus::{MmioDevice, PortDevice};
use crate::chipset::{DualPic, IoApic, PicChip};
use crate::irq::testing::{LineProbe, MsiLog, NoExtInt};
use crate::irq::{InterruptRouter, IrqLine};
use crate::serial::Uart;
use crate::virtio::balloon::BalloonDevice;
use crate::virtio::block::{BlockConfig, BlockDevice};
use crate::virtio::console::{ConsoleDevice, ConsolePort, PortHandle};
use crate::virtio::fs::FsDevice;
use crate::virtio::net::{Checksum, Connection, NetBackend, NetConfig, NetDevice, NetPort};
use crate::virtio::rng::RngDevice;
use crate::virtio::testing::{BUFFERS, FakeGuest};
use crate::virtio::vsock::{VsockDevice, VsockHost, VsockListener, VsockStream};
use crate::virtio::{Queue, QueueLayout, QueueRunner, VirtioDevice};

/// Guest memory of a target: rings first, then as much again for buffers.
const RAM_LEN: usize = 2 * BUFFERS as usize;

/// The input as a stream of small numbers; zeros once it has run out.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// An address that is mostly in RAM.
    fn address(&mut self) -> u64 {
        match self.byte() {
            0 => u64::MAX - u64::from(self.byte()),
            1 => RAM_LEN as u64 - u64::from(self.byte()),
            2 => u64::from(self.u32()) << 12,
            3 => u64::from(self.u32()) % BUFFERS,
            _ => BUFFERS + u64::from(self.u16()),
        }
    }

    /// A length that is mostly small.
    fn len(&mut self) -> u32 {
        match self.byte() {
            0 => self.u32(),
            1 => u32::from(self.u16()),
            n @ 2..=63 => u32::from(n),
            n => u32::from(n) * 16,
        }
    }
}

fn ram() -> Arc<GuestRam> {
    crate::virtio::testing::ram(RAM_LEN)
}

/// What a target does on the host's side of its device.
trait HostSide {
    fn act(&mut self, script: &mut Script<'_>);
}

struct NoHost;

impl HostSide for NoHost {
    fn act(&mut self, _script: &mut Script<'_>) {}
}

/// Where descriptors are written: the table of a queue, or an indirect one.
fn table(script: &mut Script<'_>, guest: &FakeGuest, queue: usize) -> u64 {
    match script.byte() {
        0..=31 => BUFFERS + 0x8000,
        _ => guest.rings(queue).0,
    }
}

/// One step of a hostile driver.
fn guest_step(script: &mut Script<'_>, guest: &FakeGuest, queues: usize, shadow: &mut [u16]) {
    let queue = usize::from(script.byte()) % queues;
    let (_, available, _) = guest.rings(queue);
    let write = |address: u64, bytes: &[u8]| {
        let _ = guest.ram.write_slice(bytes, GuestAddress(address));
    };
    match script.byte() % 16 {
        0..=3 => {
            let mut raw = script.address().to_le_bytes().to_vec();
            raw.extend(script.len().to_le_bytes());
            raw.extend(u16::from(script.byte() & 7).to_le_bytes());
            raw.extend(u16::from(script.byte() & 15).to_le_bytes());
            let index = u64::from(script.byte() & 15);
            write(table(script, guest, queue) + 16 * index, &raw);
        }
        4..=7 => {
            let slot = u64::from(shadow[queue] & 15);
            let head = u16::from(script.byte() & 15);
            write(available + 4 + 2 * slot, &head.to_le_bytes());
            shadow[queue] = shadow[queue].wrapping_add(1);
            write(available + 2, &shadow[queue].to_le_bytes());
            guest.kick(queue);
        }
        8 => write(available, &u32::from(script.u16()).to_le_bytes()),
        9..=11 => {
            let len = usize::from(script.byte() % 64);
            let bytes: Vec<u8> = (0..len).map(|_| script.byte()).collect();
            write(script.address(), &bytes);
        }
        12 => {
            // Rarely the status register: most of the time that only ends the run early.
            let register = u64::from(script.byte() & 0x7f) * 4;
            if register != 0x70 || script.byte() < 16 {
                guest.write(register, script.u32());
            }
        }
        13 => {
            guest.read(u64::from(script.byte()) * 4);
            guest.acknowledge();
        }
        14 => {
            guest.mmio.pause();
            let saved = guest.mmio.save();
            let _ = guest.mmio.restore(saved);
            guest.mmio.resume();
        }
        _ => guest.kick(usize::from(script.byte())),
    }
}

fn run_virtio(data: &[u8], device: Arc<dyn VirtioDevice>, mut host: impl HostSide) {
    let mut script = Script(data);
    let mask = if script.byte() & 1 == 0 {
        u64::MAX
    } else {
        !(1 << 29)
    };
    let queues = device.queue_sizes().len().min(6);
    let guest = FakeGuest::start_in(ram(), device, mask, QueueRunner::Inline);
    let mut shadow = vec![0; queues];
    while !script.is_over() {
        if script.byte() < 32 {
            host.act(&mut script);
        } else {
            guest_step(&mut script, &guest, queues, &mut shadow);
        }
    }
}

/// The virtqueue alone, over memory that is the input.
pub fn virtio_queue(data: &[u8]) {
    let ram = crate::virtio::testing::ram(0x8000);
    let mut script = Script(data);
    let flags = script.byte();
    let layout = QueueLayout {
        size: 16,
        descriptors: 0,
        available: 0x100,
        used: 0x200,
    };
    let Ok(mut queue) = Queue::new(ram.clone(), layout, 16, flags & 1 != 0, flags & 2 != 0) else {
        return;
    };
    let rest = &script.0[..script.0.len().min(0x8000)];
    let _ = ram.write_slice(rest, GuestAddress(0));
    for _ in 0..64 {
        let Ok(Some(chain)) = queue.pop() else {
            break;
        };
        let mut out = vec![0; chain.readable_len().min(4096) as usize];
        let _ = chain.reader(&ram).read_exact(&mut out);
        let mut writer = chain.writer(&ram);
        let len = chain.writable_len().min(4096);
        let _ = writer.skip(len as usize / 2);
        let _ = writer.write_all(&vec![0xa5; len as usize / 2]);
        let _ = chain
            .writer(&ram)
            .take_slices(len as usize, &mut Vec::new());
        let _ = queue.complete(chain, len);
        let _ = queue.take_interrupt();
        let _ = queue.enable_notifications();
        let saved = queue.save();
        let _ = queue.restore(saved);
    }
}

/// A disk in memory, small enough to be quick.
#[derive(Debug)]
struct SmallDisk(Mutex<Vec<u8>>);

impl Disk for SmallDisk {
    fn name(&self) -> &str {
        "fuzz"
    }
    fn size(&self) -> u64 {
        64 * 1024
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn abilities(&self) -> Abilities {
        Abilities {
            discard: true,
            fast_zeroes: true,
        }
    }
    fn read_vectored_at(&self, bufs: &[IoBufMut<'_>], mut offset: u64) -> Result<(), DiskError> {
        let bytes = self.0.lock();
        for buf in bufs {
            check_range("fuzz", offset, buf.len() as u64, self.size())?;
            buf.copy_from(0, &bytes[offset as usize..offset as usize + buf.len()]);
            offset += buf.len() as u64;
        }
        Ok(())
    }
    fn write_vectored_at(&self, bufs: &[IoBuf<'_>], mut offset: u64) -> Result<(), DiskError> {
        let mut bytes = self.0.lock();
        for buf in bufs {
            check_range("fuzz", offset, buf.len() as u64, self.size())?;
            buf.copy_to(0, &mut bytes[offset as usize..offset as usize + buf.len()]);
            offset += buf.len() as u64;
        }
        Ok(())
    }
    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        check_range("fuzz", offset, len, self.size())
    }
    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<(), DiskError> {
        check_range("fuzz", offset, len, self.size())?;
        self.0.lock()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }
}

/// The block device.
pub fn virtio_blk(data: &[u8]) {
    let disk = Arc::new(SmallDisk(Mutex::new(vec![0x5a; 64 * 1024])));
    run_virtio(
        data,
        BlockDevice::new(disk, &BlockConfig::default()),
        NoHost,
    );
}

/// The entropy device.
pub fn virtio_rng(data: &[u8]) {
    run_virtio(data, RngDevice::new(), NoHost);
}

/// The memory balloon.
pub fn virtio_balloon(data: &[u8]) {
    let sink = Arc::new(crate::virtio::balloon::recording::Recorder::default());
    run_virtio(data, BalloonDevice::new(sink), NoHost);
}

/// The file system device, over a folder with a secret beside it.
pub fn virtio_fs(data: &[u8]) {
    let mut script = Script(data);
    let device = FsDevice::new("fuzz", skerry_share::fuzz::share());
    let guest = FakeGuest::start_in(ram(), device, u64::MAX, QueueRunner::Inline);
    let mut shadow = vec![0; 2];
    while !script.is_over() {
        match script.byte() {
            0..=127 => send_request(&mut script, &guest, &mut shadow),
            _ => guest_step(&mut script, &guest, 2, &mut shadow),
        }
    }
    // Waits for the device's own thread.
    guest.mmio.close();
    skerry_share::fuzz::nothing_left_the_folder();
}

/// A request of FUSE in two buffers, with an operation that there is, on files that there may be.
fn send_request(script: &mut Script<'_>, guest: &FakeGuest, shadow: &mut [u16]) {
    const SYNC_FS: u8 = 50;
    let opcode = match script.byte() % 52 {
        // Right, and slow.
        SYNC_FS => 0,
        opcode => opcode,
    };
    let mut raw = vec![0; 40];
    raw[4] = opcode;
    raw[16] = script.byte() % 8;
    // Handles and offsets are small numbers; names are short, or those that there are.
    raw.extend(u64::from(script.byte() % 8).to_le_bytes());
    raw.extend(u64::from(script.u16()).to_le_bytes());
    for _ in 0..script.byte() % 16 {
        raw.push(script.byte() & 0x2f);
    }
    raw.extend_from_slice(match script.byte() % 4 {
        0 => b"link\0",
        1 => b"file\0",
        2 => b"../secret\0",
        _ => b"folder\0",
    });
    let (address, room) = (BUFFERS + 0x1_0000, BUFFERS + 0x2_0000);
    let _ = guest.ram.write_slice(&raw, GuestAddress(address));
    let (descriptors, available, _) = guest.rings(1);
    let mut table = address.to_le_bytes().to_vec();
    table.extend((raw.len() as u32).to_le_bytes());
    table.extend([1, 0, 15, 0]);
    table.extend(room.to_le_bytes());
    table.extend((script.len() & 0xfff).to_le_bytes());
    table.extend([2, 0, 0, 0]);
    let write = |address: u64, bytes: &[u8]| {
        let _ = guest.ram.write_slice(bytes, GuestAddress(address));
    };
    write(descriptors + 16 * 14, &table);
    let size = guest.size(1);
    write(
        available + 4 + 2 * u64::from(shadow[1] % size),
        &14u16.to_le_bytes(),
    );
    shadow[1] = shadow[1].wrapping_add(1);
    write(available + 2, &shadow[1].to_le_bytes());
    guest.kick(1);
}

/// What a network card of a target is plugged into.
#[derive(Default)]
struct Plug(Mutex<Option<NetPort>>);

impl NetBackend for Plug {
    fn attach(&self, port: NetPort) {
        *self.0.lock() = Some(port);
    }

    fn wake(&self) {}

    fn connections(&self) -> Vec<Connection> {
        Vec::new()
    }

    fn replace(&self, _connections: Vec<Connection>) {}

    fn close(&self) {}
}

impl HostSide for Arc<Plug> {
    fn act(&mut self, script: &mut Script<'_>) {
        let Some(port) = self.0.lock().clone() else {
            return;
        };
        match script.byte() % 4 {
            0 => drop(port.receive()),
            1 => port.flush(),
            _ => {
                let buffer = port.buffer(usize::from(script.u16()));
                let checksum = (script.byte() & 1 == 0).then_some(Checksum {
                    start: script.u16(),
                    offset: script.u16(),
                });
                port.push(buffer, checksum);
                port.flush();
                let _ = port.has_room();
            }
        }
    }
}

/// The network card.
pub fn virtio_net(data: &[u8]) {
    let plug = Arc::new(Plug::default());
    let config = NetConfig {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        offload: data.len() % 2 == 1,
    };
    run_virtio(data, NetDevice::new(config, plug.clone()), plug);
}

struct ConsoleHost(Vec<PortHandle>);

impl HostSide for ConsoleHost {
    fn act(&mut self, script: &mut Script<'_>) {
        let index = usize::from(script.byte());
        let Some(port) = self.0.get_mut(index % 2) else {
            return;
        };
        port.set_read_timeout(Some(Duration::ZERO));
        let mut data = [0; 256];
        // A write blocks once the guest leaves 64 KiB lying, so few bytes and short scripts only.
        let _ = if script.byte() & 1 == 0 {
            port.read(&mut data)
        } else {
            port.write(&data[..16])
        };
    }
}

/// The console device with a console and a named port.
pub fn virtio_console(data: &[u8]) {
    let ports = vec![
        ConsolePort {
            name: String::new(),
            console: true,
        },
        ConsolePort {
            name: "agent".into(),
            console: false,
        },
    ];
    let (device, handles) = ConsoleDevice::new(ports);
    run_virtio(&data[..data.len().min(8192)], device, ConsoleHost(handles));
}

struct SocketHost {
    host: VsockHost,
    listener: Option<VsockListener>,
    streams: Vec<VsockStream>,
}

impl HostSide for SocketHost {
    fn act(&mut self, script: &mut Script<'_>) {
        let listener = self.listener.get_or_insert_with(|| {
            self.host
                .listen(1)
                .unwrap_or_else(|_| unreachable!("one listener at a time"))
        });
        if let Ok(stream) = listener.accept_timeout(Duration::ZERO) {
            let _ = stream.set_read_timeout(Some(Duration::from_nanos(1)));
            self.streams.push(stream);
        }
        let choice = script.byte();
        let Some(stream) = self.streams.last_mut() else {
            return;
        };
        let mut data = [0; 256];
        match choice % 8 {
            0..=3 => drop(stream.read(&mut data)),
            4 | 5 => drop(stream.write(&data[..32])),
            6 => drop(stream.shutdown(std::net::Shutdown::Write)),
            _ => drop(self.streams.pop()),
        }
    }
}

/// The socket device with a listener on port 1. Guest memory starts with some well-formed packets, since
/// a random one is mostly for another context.
pub fn virtio_vsock(data: &[u8]) {
    let (device, host) = VsockDevice::new(3);
    let listener = host.listen(1).ok();
    let host = SocketHost {
        host,
        listener,
        streams: Vec::new(),
    };
    let mut script = Script(data);
    let guest = FakeGuest::start_in(ram(), device, u64::MAX, QueueRunner::Inline);
    let mut host = host;
    let mut shadow = [0; 3];
    let mut steps = 0;
    while !script.is_over() && steps < 4096 {
        steps += 1;
        match script.byte() {
            0..=31 => host.act(&mut script),
            32..=127 => send_packet(&mut script, &guest, &mut shadow),
            _ => guest_step(&mut script, &guest, 3, &mut shadow),
        }
    }
}

/// A packet with the right contexts and little else that can be relied on.
fn send_packet(script: &mut Script<'_>, guest: &FakeGuest, shadow: &mut [u16]) {
    let mut raw = Vec::with_capacity(64);
    raw.extend(3u64.to_le_bytes());
    raw.extend(2u64.to_le_bytes());
    raw.extend(u32::from(script.byte() & 3).to_le_bytes());
    raw.extend(u32::from(script.byte() & 1).to_le_bytes());
    let len = script.len();
    raw.extend(len.to_le_bytes());
    raw.extend(1u16.to_le_bytes());
    raw.extend(u16::from(script.byte() % 9).to_le_bytes());
    raw.extend(u32::from(script.byte() & 3).to_le_bytes());
    raw.extend(u32::from(script.u16()).to_le_bytes());
    raw.extend(u32::from(script.u16()).to_le_bytes());
    let address = BUFFERS + 0x1_0000;
    let _ = guest.ram.write_slice(&raw, GuestAddress(address));
    let (descriptors, available, _) = guest.rings(1);
    let mut descriptor = address.to_le_bytes().to_vec();
    descriptor.extend((44 + len.min(0x1_0000)).to_le_bytes());
    descriptor.extend([0; 4]);
    let _ = guest
        .ram
        .write_slice(&descriptor, GuestAddress(descriptors + 16 * 15));
    let slot = u64::from(shadow[1]) % 256;
    let _ = guest
        .ram
        .write_slice(&15u16.to_le_bytes(), GuestAddress(available + 4 + 2 * slot));
    shadow[1] = shadow[1].wrapping_add(1);
    let _ = guest
        .ram
        .write_slice(&shadow[1].to_le_bytes(), GuestAddress(available + 2));
    guest.kick(1);
}

/// The serial port: register accesses, input and state round trips.
pub fn uart(data: &[u8]) {
    let (_, line) = LineProbe::new();
    let Ok(uart) = Uart::new(line, None) else {
        return;
    };
    let input = uart.input();
    let mut script = Script(data);
    while !script.is_over() {
        match script.byte() {
            0..=3 => uart
                .restore(uart.save())
                .unwrap_or_else(|e| panic!("own state refused: {e}")),
            4..=31 => drop(input.push(&[script.byte(); 5])),
            32 => input.send_break(),
            op @ 33..=127 => uart.read(u16::from(op & 7), &mut [0]),
            op => uart.write(u16::from(op & 7), &[script.byte()]),
        }
    }
}

/// Both interrupt controllers behind the router.
pub fn ioapic_pic(data: &[u8]) {
    let pic = DualPic::new(Arc::new(NoExtInt));
    let log = Arc::new(MsiLog::default());
    let ioapic = IoApic::new(0, log.clone());
    let router = InterruptRouter::new(pic.clone(), ioapic.clone());
    let lines: Vec<IrqLine> = (0..26).map(|gsi| router.line(gsi)).collect();
    let ports = [PicChip::Master, PicChip::Slave, PicChip::EdgeLevel].map(|chip| pic.ports(chip));
    let mut script = Script(data);
    while !script.is_over() {
        let (op, value) = (script.byte(), script.byte());
        let port = &ports[usize::from(value) % 3];
        match op % 10 {
            0 | 1 => lines[usize::from(value) % 26].set(script.byte() & 1 != 0),
            2 | 3 => port.write(u16::from(op & 1), &[script.byte()]),
            4 => port.read(u16::from(value & 1), &mut [0]),
            5 => drop(pic.ack()),
            6 => ioapic.write_register(value, script.u32()),
            7 => drop(ioapic.read_register(value)),
            8 => ioapic.eoi(value),
            _ => {
                let offset = u64::from(value) * 16 % 0x80;
                MmioDevice::write(&*ioapic, offset, &script.u32().to_le_bytes());
                let restored = pic.restore(pic.save()).and(ioapic.restore(ioapic.save()));
                restored.unwrap_or_else(|e| panic!("own state refused: {e}"));
            }
        }
        log.0.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The short form that CI runs: random scripts, the same every time.
    fn run(target: fn(&[u8]), rounds: u64) {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..rounds {
            let data: Vec<u8> = (0..1500)
                .map(|_| {
                    // xorshift64
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state >> 32) as u8
                })
                .collect();
            target(&data);
        }
    }

    #[test]
    fn queue_survives() {
        run(virtio_queue, 300);
    }

    #[test]
    fn block_survives() {
        run(virtio_blk, 300);
    }

    #[test]
    fn rng_survives() {
        run(virtio_rng, 300);
        run(virtio_balloon, 300);
    }

    #[test]
    fn console_survives() {
        run(virtio_console, 300);
    }

    #[test]
    fn vsock_survives() {
        run(virtio_vsock, 300);
    }

    #[test]
    fn fs_survives() {
        run(virtio_fs, 300);
    }

    #[test]
    fn net_survives() {
        run(virtio_net, 300);
    }

    #[test]
    fn uart_survives() {
        run(uart, 1000);
    }

    #[test]
    fn interrupt_controllers_survive() {
        run(ioapic_pic, 1000);
    }
}
