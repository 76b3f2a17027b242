//! Takes a serial port's output to the host without ever blocking the vCPU that wrote it.
//!
//! A thread per port writes to the sink. It gathers the rest of a line for a moment, so that a guest
//! that sends byte by byte doesn't cost a system call for each.

use std::io::Write;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Bytes that may wait for the sink before the port's transmitter stays full.
const CAPACITY: usize = 64 * 1024;
/// A partial line waits this long for its end.
const GATHER: Duration = Duration::from_millis(1);
/// How long the last output may take before it is given up.
const LAST_PATIENCE: Duration = Duration::from_secs(2);
/// A partial line of this length is written at once.
const GATHER_BYTES: usize = 512;

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// The thread is inside a write to the sink.
    writing: bool,
    /// The thread waits for the end of a line.
    gathering: bool,
    /// The thread waits for anything at all.
    sleeping: bool,
    stop: bool,
    /// The sink failed; output is thrown away from then on.
    broken: bool,
}

#[derive(Default)]
struct Shared {
    buffer: Mutex<Buffer>,
    wake: Condvar,
    drained: Condvar,
}

/// Called when a full buffer has room again.
pub(super) type OnRoom = Box<dyn Fn() + Send>;

/// The buffer between a port and its sink.
pub(super) struct OutputPump {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl OutputPump {
    /// Starts the thread that writes to `sink`; `on_room` is called after each write that empties a
    /// buffer that had been full.
    pub(super) fn new(sink: Box<dyn Write + Send>, on_room: OnRoom) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("serial-out".into())
            .spawn(move || {
                skerry_confine::enter(skerry_confine::Role::Stream);
                theirs.run(sink, &on_room);
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Takes `byte` unless the buffer is full.
    pub(super) fn push(&self, byte: u8) -> bool {
        let mut buffer = self.shared.buffer.lock();
        if buffer.broken {
            return true;
        }
        if buffer.bytes.len() >= CAPACITY {
            return false;
        }
        buffer.bytes.push(byte);
        let complete = byte == b'\n' || buffer.bytes.len() >= GATHER_BYTES;
        if buffer.sleeping || (buffer.gathering && complete) {
            buffer.sleeping = false;
            self.shared.wake.notify_one();
        }
        true
    }

    /// Waits until the sink has everything.
    pub(super) fn flush(&self) {
        let mut buffer = self.shared.buffer.lock();
        while !buffer.broken && (buffer.writing || !buffer.bytes.is_empty()) {
            buffer.gathering = false;
            self.shared.wake.notify_one();
            self.shared.drained.wait(&mut buffer);
        }
    }
}

impl Shared {
    fn run(&self, mut sink: Box<dyn Write + Send>, on_room: &OnRoom) {
        let mut chunk = Vec::new();
        loop {
            let mut buffer = self.buffer.lock();
            while buffer.bytes.is_empty() && !buffer.stop {
                buffer.sleeping = true;
                self.wake.wait(&mut buffer);
            }
            buffer.sleeping = false;
            if buffer.bytes.is_empty() {
                return;
            }
            if !buffer.stop && !buffer.bytes.ends_with(b"\n") && buffer.bytes.len() < GATHER_BYTES {
                buffer.gathering = true;
                let _ = self.wake.wait_for(&mut buffer, GATHER);
                buffer.gathering = false;
            }
            std::mem::swap(&mut buffer.bytes, &mut chunk);
            buffer.writing = true;
            drop(buffer);

            let result = sink.write_all(&chunk).and_then(|()| sink.flush());
            let was_full = chunk.len() >= CAPACITY;
            chunk.clear();

            let mut buffer = self.buffer.lock();
            buffer.writing = false;
            if let Err(error) = result {
                tracing::warn!(%error, "The sink of a serial port failed; its output is dropped");
                buffer.broken = true;
                buffer.bytes.clear();
            }
            let (broken, stop) = (buffer.broken, buffer.stop);
            drop(buffer);
            self.drained.notify_all();
            if was_full || broken {
                on_room();
            }
            if broken || (stop && self.buffer.lock().bytes.is_empty()) {
                return;
            }
        }
    }
}

impl Drop for OutputPump {
    fn drop(&mut self) {
        let deadline = Instant::now() + LAST_PATIENCE;
        let mut buffer = self.shared.buffer.lock();
        buffer.stop = true;
        self.shared.wake.notify_one();
        while !buffer.broken && (buffer.writing || !buffer.bytes.is_empty()) {
            if self
                .shared
                .drained
                .wait_until(&mut buffer, deadline)
                .timed_out()
            {
                // A sink that nobody reads keeps its thread, not us.
                return;
            }
        }
        drop(buffer);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Counts writes; blocks while `gate` is locked.
    struct Sink {
        gate: Arc<Mutex<()>>,
        writes: Arc<AtomicUsize>,
        bytes: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            let _gate = self.gate.lock();
            self.writes.fetch_add(1, Ordering::Relaxed);
            self.bytes.lock().extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn gathers_and_resists_a_stuck_sink() {
        let (gate, bytes) = (Arc::new(Mutex::new(())), Arc::new(Mutex::new(Vec::new())));
        let (writes, rooms) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let sink = Sink {
            gate: gate.clone(),
            writes: writes.clone(),
            bytes: bytes.clone(),
        };
        let counter = rooms.clone();
        let on_room = Box::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let pump = OutputPump::new(Box::new(sink), on_room).unwrap();
        let held = gate.lock();
        let mut sent = 0;
        while pump.push(b'x') {
            sent += 1;
            assert!(sent <= 4 * CAPACITY, "the buffer is bounded");
            if sent == 1 {
                // Let the thread get stuck in its first write.
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        drop(held);
        pump.flush();
        drop(pump);
        assert_eq!(bytes.lock().len(), sent);
        assert!(writes.load(Ordering::Relaxed) < 10);
        assert_eq!(rooms.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_broken_sink_does_not_stop_the_guest() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let pump = OutputPump::new(Box::new(Broken), Box::new(|| ())).unwrap();
        assert!(pump.push(b'\n'));
        pump.flush();
        for _ in 0..2 * CAPACITY {
            assert!(pump.push(b'x'));
        }
    }
}
