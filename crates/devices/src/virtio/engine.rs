//! Runs a device's queues: who serves which queue on which thread, and when the guest is interrupted.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use skerry_confine::Role;
use skerry_hypervisor::memory::GuestRam;

use super::queue::Stop;
use super::{DeviceKind, Queue, Served, VirtioDevice};
use crate::irq::IrqLine;

/// Interrupt status: a queue has used buffers (virtio 1.3, 4.2.2).
const ISR_USED_BUFFER: u32 = 1;
/// Interrupt status: the configuration changed.
const ISR_CONFIG_CHANGE: u32 = 2;
/// Who lets a machine run on doesn't wait longer for what its rings hold.
const RESUME_PATIENCE: Duration = Duration::from_millis(50);

/// Where a guest's notification is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QueueRunner {
    /// On the vCPU thread that notified: the least latency. What may wait long (flushes) goes to a
    /// thread of the device, which is started when first needed.
    Inline,
    /// On a thread of the device: the vCPU runs on meanwhile.
    #[default]
    Thread,
}

/// The interrupt status register and the line it drives.
#[derive(Debug)]
struct Interrupt {
    status: Mutex<u32>,
    line: IrqLine,
}

impl Interrupt {
    fn raise(&self, bit: u32) {
        let mut status = self.status.lock();
        if *status & bit == 0 {
            *status |= bit;
            self.line.set(true);
        }
    }

    fn acknowledge(&self, bits: u32) {
        let mut status = self.status.lock();
        *status &= !bits;
        // Low in between even if a bit is left: an edge-triggered input needs a new edge for it.
        self.line.set(false);
        self.line.set(*status != 0);
    }

    fn set(&self, bits: u32) {
        let mut status = self.status.lock();
        *status = bits;
        self.line.set(bits != 0);
    }
}

struct Slot {
    queue: Mutex<Option<Queue>>,
    /// Somebody wants the queue served. Set before `queue` is tried, looked at after it is let go.
    pending: AtomicBool,
}

/// The live half of a virtio transport.
pub struct QueueEngine {
    this: Weak<Self>,
    device: Arc<dyn VirtioDevice>,
    ram: Arc<GuestRam>,
    interrupt: Interrupt,
    slots: Vec<Slot>,
    runner: QueueRunner,
    /// Queues that the worker is to serve, one bit each.
    doorbell: AtomicU64,
    worker: Mutex<Option<JoinHandle<()>>>,
    worker_thread: std::sync::OnceLock<Thread>,
    stop: AtomicBool,
    paused: Arc<Stop>,
    /// The rings broke the rules, or the device gave up: nothing runs until a reset.
    broken: AtomicBool,
    config_generation: AtomicU32,
}

impl QueueEngine {
    pub(super) fn new(
        device: Arc<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        line: IrqLine,
        runner: QueueRunner,
    ) -> std::io::Result<Arc<Self>> {
        // The doorbell has a bit per queue.
        let slots = device
            .queue_sizes()
            .iter()
            .take(64)
            .map(|_| Slot {
                queue: Mutex::new(None),
                pending: AtomicBool::new(false),
            })
            .collect();
        let engine = Arc::new_cyclic(|this| Self {
            this: this.clone(),
            device,
            ram,
            interrupt: Interrupt {
                status: Mutex::new(0),
                line,
            },
            slots,
            runner,
            doorbell: AtomicU64::new(0),
            worker: Mutex::new(None),
            worker_thread: std::sync::OnceLock::new(),
            stop: AtomicBool::new(false),
            paused: Arc::default(),
            broken: AtomicBool::new(false),
            config_generation: AtomicU32::new(0),
        });
        engine.device.attach(Arc::downgrade(&engine));
        if runner == QueueRunner::Thread || engine.device.worker_role().is_some() {
            engine.start_worker()?;
        }
        Ok(engine)
    }

    /// Starts the worker unless it is there.
    fn start_worker(&self) -> std::io::Result<()> {
        let mut slot = self.worker.lock();
        if slot.is_none() && !self.stop.load(Ordering::SeqCst) {
            let weak = self.this.clone();
            let role = self.device.worker_role().unwrap_or(Role::Storage);
            let name = format!("virtio-{:?}", self.device.kind()).to_lowercase();
            let worker = std::thread::Builder::new().name(name).spawn(move || {
                skerry_confine::enter(role);
                work(&weak);
            })?;
            let _ = self.worker_thread.set(worker.thread().clone());
            *slot = Some(worker);
        }
        Ok(())
    }

    pub(super) fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    pub(super) const fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The guest notified queue `index`. On a vCPU thread: an atomic and a wake at most, unless the
    /// runner is inline.
    pub fn kick(&self, index: usize) {
        if index >= self.slots.len() {
            return;
        }
        match self.runner {
            QueueRunner::Thread => self.wake_worker(index),
            QueueRunner::Inline => self.serve_on(index, false),
        }
    }

    fn wake_worker(&self, index: usize) {
        if self.doorbell.fetch_or(1 << index, Ordering::SeqCst) & (1 << index) == 0
            && let Some(worker) = self.worker_thread.get()
        {
            worker.unpark();
        }
    }

    /// Serves queue `index` on this thread, which may wait for the host's disks. If another thread is at
    /// it, that one goes round again.
    pub fn serve(&self, index: usize) {
        self.serve_on(index, true);
    }

    /// The same when what is to be done is for this thread alone: it waits for another that is at the
    /// queue, which would only tell this one again, and again.
    pub fn serve_in_turn(&self, index: usize) {
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        let guard = slot.queue.lock();
        slot.pending.store(true, Ordering::SeqCst);
        self.serve_slot(index, slot, guard, true);
        self.go_round(index, slot, true);
    }

    fn serve_on(&self, index: usize, may_wait: bool) {
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        slot.pending.store(true, Ordering::SeqCst);
        self.go_round(index, slot, may_wait);
    }

    /// Serves a queue as long as somebody wants it served, unless another thread is at it.
    fn go_round(&self, index: usize, slot: &Slot, may_wait: bool) {
        while slot.pending.load(Ordering::SeqCst) && !self.is_stopped() {
            let Some(guard) = slot.queue.try_lock() else {
                return;
            };
            if !self.serve_slot(index, slot, guard, may_wait) {
                return;
            }
        }
    }

    /// Serves a queue that is this thread's now. Whether to look again.
    fn serve_slot(
        &self,
        index: usize,
        slot: &Slot,
        mut guard: MutexGuard<'_, Option<Queue>>,
        may_wait: bool,
    ) -> bool {
        let mut later = false;
        // Looked at again under the lock: `pause` waits for the lock after setting its flag.
        while !later && !self.is_stopped() && slot.pending.swap(false, Ordering::SeqCst) {
            let Some(queue) = guard.as_mut() else {
                return false;
            };
            queue.set_may_wait(may_wait);
            later = self.serve_locked(index, queue) == Some(Served::Later);
        }
        // The worker must find the lock free: nobody would tell it again.
        drop(guard);
        if later {
            self.hand_over(index);
        }
        !later
    }

    /// Lets the worker go on with a request that may take long.
    fn hand_over(&self, index: usize) {
        if let Err(error) = self.start_worker() {
            // Waiting here beats never answering.
            tracing::warn!(%error, "No thread for a virtio device: a processor waits for its disk");
            self.serve_on(index, true);
            return;
        }
        self.wake_worker(index);
    }

    fn is_stopped(&self) -> bool {
        self.paused.is_set() || self.broken.load(Ordering::SeqCst)
    }

    /// Serves a queue until there is nothing to do; `None` if its rings are broken.
    fn serve_locked(&self, index: usize, queue: &mut Queue) -> Option<Served> {
        let result = (|| {
            loop {
                queue.disable_notifications()?;
                let served = self.device.process(index, queue)?;
                let more = served == Served::Drained && queue.enable_notifications()?;
                if queue.take_interrupt()? {
                    self.interrupt.raise(ISR_USED_BUFFER);
                }
                if !more || self.is_stopped() {
                    return Ok(served);
                }
            }
        })();
        result.map_err(|error| self.fail(&error)).ok()
    }

    /// Stops the device until its driver resets it.
    pub(super) fn fail(&self, error: &super::QueueError) {
        let kind = self.device.kind();
        tracing::warn!(?kind, %error, "The guest's driver broke the rules of its virtqueue");
        self.broken.store(true, Ordering::SeqCst);
        self.interrupt.raise(ISR_CONFIG_CHANGE);
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// Tells the driver that the device's configuration changed.
    pub fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.interrupt.raise(ISR_CONFIG_CHANGE);
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        *self.interrupt.status.lock()
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.interrupt.acknowledge(bits);
    }

    pub(super) fn restore_interrupt(&self, bits: u32) {
        self.interrupt
            .set(bits & (ISR_USED_BUFFER | ISR_CONFIG_CHANGE));
    }

    /// Makes queue `index` live, or stops it; waits for a server that is at it.
    pub(super) fn set_queue(&self, index: usize, queue: Option<Queue>) {
        if let Some(slot) = self.slots.get(index) {
            *slot.queue.lock() = queue.map(|queue| queue.stop_with(&self.paused));
        }
    }

    pub(super) fn with_queue<T>(&self, index: usize, act: impl FnOnce(&Queue) -> T) -> Option<T> {
        self.slots.get(index)?.queue.lock().as_ref().map(act)
    }

    /// Back to the state before a driver came.
    pub(super) fn reset(&self) {
        for slot in &self.slots {
            *slot.queue.lock() = None;
            slot.pending.store(false, Ordering::SeqCst);
        }
        self.broken.store(false, Ordering::SeqCst);
        self.interrupt.set(0);
    }

    /// Serves everything once, when the queues have just become live.
    pub(super) fn kick_all(&self) {
        for index in 0..self.slots.len() {
            self.kick(index);
        }
    }

    /// Stops serving; none is under way when this returns, whatever the guest does meanwhile.
    /// Notifications are kept for `resume`.
    pub fn pause(&self) {
        self.paused.set(true);
        for slot in &self.slots {
            drop(slot.queue.lock());
        }
    }

    /// Serves again: what waits, on this thread, as far as that is done soon.
    pub fn resume(&self) {
        self.paused.set_patience(RESUME_PATIENCE);
        self.paused.set(false);
        self.device.resumed();
        self.kick_all();
        if self.paused.end_patience() {
            for index in 0..self.slots.len() {
                self.hand_over(index);
            }
        }
    }

    /// Serves what waits on this thread a last time, for `patience` at the most. To be closed next.
    pub(super) fn finish(&self, patience: Duration) {
        self.paused.set_patience(patience);
        self.paused.set(false);
        for index in 0..self.slots.len() {
            self.serve(index);
        }
    }

    /// What kind of device this is.
    pub fn kind(&self) -> DeviceKind {
        self.device.kind()
    }
}

/// The worker: serves what the doorbell says and sleeps in between.
fn work(engine: &Weak<QueueEngine>) {
    while let Some(engine) = engine.upgrade() {
        let mut bits = engine.doorbell.swap(0, Ordering::SeqCst);
        while bits != 0 {
            let index = bits.trailing_zeros();
            bits &= bits - 1;
            engine.serve(index as usize);
        }
        let idle = engine.doorbell.load(Ordering::SeqCst) == 0;
        if engine.stop.load(Ordering::SeqCst) {
            return;
        }
        // Not held while asleep, so that the engine can be dropped.
        drop(engine);
        if idle {
            std::thread::park();
        }
    }
}

impl QueueEngine {
    /// Ends the worker. Called by the transport when it is dropped.
    pub(super) fn shut_down(&self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(worker) = self.worker.lock().take() {
            worker.thread().unpark();
            if worker.thread().id() != std::thread::current().id() {
                let _ = worker.join();
            }
        }
    }
}

impl std::fmt::Debug for QueueEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueEngine")
            .field("kind", &self.device.kind())
            .field(
                "queues",
                &self
                    .slots
                    .iter()
                    .map(|slot| slot.queue.lock())
                    .collect::<Vec<_>>(),
            )
            .field("interrupt", &self.interrupt)
            .finish_non_exhaustive()
    }
}
