//! What the device side of virtio costs, seen from a driver in memory.
//!
//! `cargo bench -p skerry-devices --features fuzzing`

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use skerry_devices::virtio::block::{BlockConfig, BlockDevice};
use skerry_devices::virtio::testing::{Buffer, FakeGuest};
use skerry_devices::virtio::vsock::VsockDevice;
use skerry_devices::virtio::{QueueRunner, VirtioDevice};
use skerry_storage::{Access, RawDisk};
use vm_memory::{Bytes, GuestAddress};

const DISK_LEN: u64 = 64 << 20;
const RUN: Duration = Duration::from_secs(1);

/// Repeats `act` for a second; returns seconds per call.
fn measure(mut act: impl FnMut()) -> f64 {
    for _ in 0..100 {
        act();
    }
    let (start, mut calls) = (Instant::now(), 0u32);
    while start.elapsed() < RUN {
        for _ in 0..16 {
            act();
        }
        calls += 16;
    }
    start.elapsed().as_secs_f64() / f64::from(calls)
}

fn block(device: Arc<dyn VirtioDevice>, runner: QueueRunner, len: u32) {
    let mut guest = FakeGuest::start(device, u64::MAX, runner);
    let header = guest.readable(&[0; 16]);
    let buffers = [header, guest.buffer(len, true), guest.buffer(1, true)];
    let mut sector = 0u64;
    let each = measure(|| {
        sector = (sector + 8 * 97) % ((DISK_LEN - u64::from(len)) / 512);
        let place = GuestAddress(header.address + 8);
        guest
            .ram
            .write_obj(sector, place)
            .expect("the header is in RAM");
        guest.add(0, &buffers);
        guest.kick(0);
        guest.wait_used(0);
        guest.acknowledge();
    });
    println!(
        "block read  {len:>7} B  {runner:<8?} {:>8.2} µs  {:>9.0} MB/s",
        each * 1e6,
        f64::from(len) / each / 1e6
    );
}

const HEADER: usize = 44;

fn packet(op: u16, len: usize, fwd_cnt: u32) -> [u8; HEADER] {
    let mut raw = [0; HEADER];
    raw[0] = 3;
    raw[8] = 2;
    raw[16] = 1;
    raw[20] = 1;
    raw[24..28].copy_from_slice(&(len as u32).to_le_bytes());
    raw[28] = 1;
    raw[30..32].copy_from_slice(&op.to_le_bytes());
    raw[36..40].copy_from_slice(&(256u32 << 10).to_le_bytes());
    raw[40..44].copy_from_slice(&fwd_cnt.to_le_bytes());
    raw
}

struct Socket {
    guest: FakeGuest,
    receive: Vec<Buffer>,
    heads: Vec<usize>,
    credit: u32,
}

impl Socket {
    /// Takes what the device sent; returns bytes of payload.
    fn take(&mut self) -> u32 {
        let mut total = 0;
        let mut taken = false;
        while let Some((head, len)) = self.guest.used(0) {
            let slot = self.heads[usize::from(head)];
            let buffer = self.receive[slot];
            total += len - HEADER as u32;
            let again = self.guest.add(0, &[buffer]);
            self.heads[usize::from(again)] = slot;
            taken = true;
        }
        if taken {
            self.guest.acknowledge();
            if self.guest.must_kick(0) {
                self.guest.kick(0);
            }
        }
        total
    }

    /// The newest credit that the host has announced.
    fn credit(&mut self) -> u32 {
        while let Some((head, _)) = self.guest.used(0) {
            let slot = self.heads[usize::from(head)];
            let buffer = self.receive[slot];
            let place = GuestAddress(buffer.address + 40);
            self.credit = self
                .guest
                .ram
                .read_obj(place)
                .expect("the buffer is in RAM");
            let again = self.guest.add(0, &[buffer]);
            self.heads[usize::from(again)] = slot;
        }
        self.credit
    }

    fn send(&mut self, buffers: &[Buffer]) {
        self.guest.add(1, buffers);
        self.guest.kick(1);
        self.guest.wait_used(1);
    }
}

fn vsock(runner: QueueRunner) {
    let (device, host) = VsockDevice::new(3);
    let listener = host.listen(1).expect("the port is free");
    let mut guest = FakeGuest::start(device, u64::MAX, runner);
    let receive: Vec<_> = (0..200).map(|_| guest.buffer(4096, true)).collect();
    let mut heads = vec![0; 256];
    for (slot, buffer) in receive.iter().enumerate() {
        let head = guest.add(0, &[*buffer]);
        heads[usize::from(head)] = slot;
    }
    guest.kick(0);
    let mut socket = Socket {
        guest,
        receive,
        heads,
        credit: 0,
    };
    let header = socket.guest.readable(&packet(1, 0, 0));
    socket.send(&[header]);
    let stream = listener.accept().expect("the request is in");

    let mut reader = stream.try_clone().expect("clones are free");
    let sink = std::thread::spawn(move || {
        let mut data = vec![0; 256 << 10];
        let mut total = 0u64;
        while let Ok(len @ 1..) = reader.read(&mut data) {
            total += len as u64;
        }
        total
    });
    let payload = socket.guest.buffer(64 << 10, false);
    let place = GuestAddress(header.address);
    let (start, mut sent) = (Instant::now(), 0u64);
    while start.elapsed() < RUN {
        // Without following credit a fast sender would overrun it: stay a window behind.
        let raw = packet(5, 32 << 10, 0);
        socket
            .guest
            .ram
            .write_slice(&raw, place)
            .expect("the header is in RAM");
        socket.send(&[
            header,
            Buffer {
                len: 32 << 10,
                ..payload
            },
        ]);
        sent += 32 << 10;
        while (sent as u32).wrapping_sub(socket.credit()) > 200 << 10 {
            let raw = packet(7, 0, 0);
            socket
                .guest
                .ram
                .write_slice(&raw, place)
                .expect("the header is in RAM");
            socket.send(&[header]);
            std::thread::yield_now();
        }
    }
    let each = sent as f64 / start.elapsed().as_secs_f64();
    println!(
        "vsock guest → host     {runner:<8?} {:>21.0} MB/s",
        each / 1e6
    );

    let mut writer = stream.try_clone().expect("clones are free");
    let source = std::thread::spawn(move || {
        let data = vec![7; 64 << 10];
        while writer.write_all(&data).is_ok() {}
    });
    let (start, mut got, mut told) = (Instant::now(), 0u64, 0u64);
    while start.elapsed() < RUN {
        let len = socket.take();
        got += u64::from(len);
        if got - told >= 64 << 10 {
            told = got;
            let raw = packet(6, 0, got as u32);
            socket
                .guest
                .ram
                .write_slice(&raw, place)
                .expect("the header is in RAM");
            socket.send(&[header]);
        } else if len == 0 {
            std::thread::yield_now();
        }
    }
    let each = got as f64 / start.elapsed().as_secs_f64();
    let (_, interrupts) = socket.guest.interrupt();
    println!(
        "vsock host → guest     {runner:<8?} {:>21.0} MB/s, {interrupts} interrupts in all",
        each / 1e6
    );
    drop((socket, host, listener));
    source.join().expect("the writer ends with the device");
    let total = sink.join().expect("the reader ends with the device");
    assert_eq!(total, sent, "bytes lost");
}

fn main() {
    let path = std::env::temp_dir().join(format!("skerry-bench-{}", std::process::id()));
    let file = std::fs::File::create(&path).expect("the temporary directory is writable");
    file.set_len(DISK_LEN).expect("the file can be sparse");
    let disk = Arc::new(RawDisk::open(&path, Access::ReadOnly).expect("the file was just made"));
    let _ = std::fs::remove_file(&path);
    for runner in [QueueRunner::Inline, QueueRunner::Thread] {
        for len in [512, 4096, 128 << 10, 1 << 20] {
            block(
                BlockDevice::new(disk.clone(), &BlockConfig::default()),
                runner,
                len,
            );
        }
    }
    for runner in [QueueRunner::Inline, QueueRunner::Thread] {
        vsock(runner);
    }
}
