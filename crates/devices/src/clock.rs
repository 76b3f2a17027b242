//! Machine time, and the one thread that runs every device's timers.
//!
//! Devices count in nanoseconds of *machine time*: it starts at zero, stands still while the machine is
//! paused, and continues from a saved value after a restore. A timer calls its device back when machine
//! time has reached the deadline; the device then looks at the clock and decides what that means, so a
//! late, early or spurious call is harmless.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::state::{StateError, require};

/// A device that asked to be called at a point in machine time.
pub trait TimerTarget: Send + Sync {
    /// Machine time has reached (at least) the armed deadline.
    fn timer_expired(&self, now_ns: u64);
}

/// No machine has run for longer (18 years); what devices compute from a time before this fits 64 bits.
const LONGEST_NS: u64 = 1 << 59;

/// The frozen marker of [`MachineClock`]: the clock runs.
const RUNNING: u64 = u64::MAX;

/// Machine time in nanoseconds.
#[derive(Debug)]
pub struct MachineClock {
    /// `None`: time moves only by [`TimerService::advance`].
    origin: Option<Instant>,
    /// Machine time minus host time since `origin`, wrapping.
    skew: AtomicU64,
    /// The machine time at which the clock stands, or [`RUNNING`].
    frozen: AtomicU64,
}

impl MachineClock {
    fn host_elapsed(&self) -> u64 {
        self.origin
            .map_or(0, |origin| origin.elapsed().as_nanos() as u64)
    }

    /// The machine time now.
    pub fn now(&self) -> u64 {
        match self.frozen.load(Ordering::Acquire) {
            RUNNING => self
                .host_elapsed()
                .wrapping_add(self.skew.load(Ordering::Acquire)),
            at => at,
        }
    }

    fn freeze(&self) {
        self.frozen.store(self.now(), Ordering::Release);
    }

    fn thaw(&self) {
        let at = self.now();
        self.skew
            .store(at.wrapping_sub(self.host_elapsed()), Ordering::Release);
        self.frozen.store(RUNNING, Ordering::Release);
    }

    fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Acquire) != RUNNING
    }
}

struct Slot {
    target: Weak<dyn TimerTarget>,
    deadline: Option<u64>,
}

#[derive(Default)]
struct Timers {
    slots: Vec<Option<Slot>>,
    /// When the thread will look next on its own; deadlines after that need not wake it.
    next_look: u64,
    calling: bool,
    stop: bool,
}

impl Timers {
    fn earliest(&self) -> Option<u64> {
        self.slots
            .iter()
            .flatten()
            .filter_map(|slot| slot.deadline)
            .min()
    }

    /// Takes one timer that is due.
    fn take_due(&mut self, now: u64) -> Option<Weak<dyn TimerTarget>> {
        let slot = self
            .slots
            .iter_mut()
            .flatten()
            .filter(|slot| slot.deadline.is_some_and(|at| at <= now))
            .min_by_key(|slot| slot.deadline)?;
        slot.deadline = None;
        Some(slot.target.clone())
    }
}

struct Shared {
    clock: MachineClock,
    timers: Mutex<Timers>,
    /// Wakes the thread.
    wake: Condvar,
    /// Tells `pause` that a callback has returned.
    idle: Condvar,
}

impl Shared {
    /// Runs everything that is due, without holding the lock during a callback.
    fn run_due(&self) {
        let mut timers = self.timers.lock();
        while !self.clock.is_frozen() || self.clock.origin.is_none() {
            let now = self.clock.now();
            let Some(target) = timers.take_due(now) else {
                break;
            };
            timers.calling = true;
            drop(timers);
            if let Some(target) = target.upgrade() {
                target.timer_expired(now);
            }
            timers = self.timers.lock();
            timers.calling = false;
            self.idle.notify_all();
        }
    }

    fn thread_main(&self) {
        loop {
            self.run_due();
            let mut timers = self.timers.lock();
            if timers.stop {
                return;
            }
            let now = self.clock.now();
            match timers.earliest().filter(|_| !self.clock.is_frozen()) {
                None => {
                    timers.next_look = u64::MAX;
                    self.wake.wait(&mut timers);
                }
                Some(at) if at > now => {
                    timers.next_look = at;
                    let _ = self
                        .wake
                        .wait_for(&mut timers, Duration::from_nanos(at - now));
                }
                Some(_) => {}
            }
            timers.next_look = 0;
            if timers.stop {
                return;
            }
        }
    }
}

/// The clock and the timers of one machine.
pub struct TimerService {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl TimerService {
    /// A clock that runs with the host's monotonic clock, and the thread that serves its timers.
    pub fn new() -> std::io::Result<Arc<Self>> {
        let service = Self::with_origin(Some(Instant::now()));
        let shared = service.shared.clone();
        let thread = std::thread::Builder::new()
            .name("timers".into())
            .spawn(move || {
                skerry_confine::enter(skerry_confine::Role::Timer);
                shared.thread_main();
            })?;
        *service.thread.lock() = Some(thread);
        Ok(Arc::new(service))
    }

    /// A clock that moves only by [`advance`](Self::advance): for tests and replay.
    pub fn manual() -> Arc<Self> {
        Arc::new(Self::with_origin(None))
    }

    fn with_origin(origin: Option<Instant>) -> Self {
        let frozen = if origin.is_some() { RUNNING } else { 0 };
        Self {
            shared: Arc::new(Shared {
                clock: MachineClock {
                    origin,
                    skew: AtomicU64::new(0),
                    frozen: AtomicU64::new(frozen),
                },
                timers: Mutex::new(Timers::default()),
                wake: Condvar::new(),
                idle: Condvar::new(),
            }),
            thread: Mutex::new(None),
        }
    }

    /// The machine time now, in nanoseconds.
    pub fn now(&self) -> u64 {
        self.shared.clock.now()
    }

    /// A timer that calls `target`. It is not armed.
    pub fn timer(&self, target: Weak<dyn TimerTarget>) -> Timer {
        let mut timers = self.shared.timers.lock();
        let slot = Slot {
            target,
            deadline: None,
        };
        let index = match timers.slots.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                timers.slots.push(None);
                timers.slots.len() - 1
            }
        };
        timers.slots[index] = Some(slot);
        Timer {
            shared: self.shared.clone(),
            index,
        }
    }

    /// Stops machine time. No timer callback is running when this returns.
    pub fn pause(&self) {
        let mut timers = self.shared.timers.lock();
        if self.shared.clock.origin.is_some() {
            self.shared.clock.freeze();
        }
        while timers.calling {
            self.shared.idle.wait(&mut timers);
        }
    }

    /// Lets machine time go on from where it stands.
    pub fn resume(&self) {
        if self.shared.clock.origin.is_some() && self.shared.clock.is_frozen() {
            self.shared.clock.thaw();
        }
        self.wake();
    }

    /// Sets machine time, for a restore. The clock must be paused (or manual).
    pub fn set_now(&self, now_ns: u64) {
        if self.shared.clock.is_frozen() {
            self.shared
                .clock
                .frozen
                .store(now_ns.min(RUNNING - 1), Ordering::Release);
        }
    }

    /// Sets machine time to a saved one. The clock must be paused (or manual).
    pub fn restore(&self, now_ns: u64) -> Result<(), StateError> {
        let problem = "the machine has run for longer than any can";
        require(now_ns < LONGEST_NS, "clock", problem)?;
        self.set_now(now_ns);
        Ok(())
    }

    /// Moves a manual clock forward, running the timers that fall due in their order.
    pub fn advance(&self, ns: u64) {
        if self.shared.clock.origin.is_some() {
            return;
        }
        let end = self.now().saturating_add(ns).min(RUNNING - 1);
        loop {
            let next = self.shared.timers.lock().earliest().filter(|at| *at <= end);
            let Some(at) = next else { break };
            self.set_now(at.max(self.now()));
            self.shared.run_due();
        }
        self.set_now(end);
    }

    fn wake(&self) {
        let _timers = self.shared.timers.lock();
        self.shared.wake.notify_one();
    }
}

impl std::fmt::Debug for TimerService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TimerService")
            .field("clock", &self.shared.clock)
            .finish()
    }
}

impl Drop for TimerService {
    fn drop(&mut self) {
        self.shared.timers.lock().stop = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.get_mut().take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// One device's timer. Dropping it disarms it.
pub struct Timer {
    shared: Arc<Shared>,
    index: usize,
}

impl Timer {
    /// Calls the target once machine time reaches `deadline_ns`; replaces an earlier deadline.
    pub fn arm(&self, deadline_ns: u64) {
        let mut timers = self.shared.timers.lock();
        if let Some(Some(slot)) = timers.slots.get_mut(self.index) {
            slot.deadline = Some(deadline_ns);
        }
        if deadline_ns < timers.next_look {
            self.shared.wake.notify_one();
        }
    }

    /// Forgets the deadline. A call that is already under way may still arrive.
    pub fn disarm(&self) {
        let mut timers = self.shared.timers.lock();
        if let Some(Some(slot)) = timers.slots.get_mut(self.index) {
            slot.deadline = None;
        }
    }

    /// Arms or disarms.
    pub fn set(&self, deadline_ns: Option<u64>) {
        match deadline_ns {
            Some(at) => self.arm(at),
            None => self.disarm(),
        }
    }

    /// The machine time now.
    pub fn now(&self) -> u64 {
        self.shared.clock.now()
    }
}

impl std::fmt::Debug for Timer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Timer").field("index", &self.index).finish()
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if let Some(slot) = self.shared.timers.lock().slots.get_mut(self.index) {
            *slot = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Target(Mutex<Vec<u64>>, Condvar);

    impl TimerTarget for Target {
        fn timer_expired(&self, now_ns: u64) {
            self.0.lock().push(now_ns);
            self.1.notify_all();
        }
    }

    fn timer(service: &TimerService) -> (Arc<Target>, Timer) {
        let target = Arc::new(Target::default());
        let as_dyn: Arc<dyn TimerTarget> = target.clone();
        let timer = service.timer(Arc::downgrade(&as_dyn));
        (target, timer)
    }

    #[test]
    fn manual_clock_runs_timers_in_order() {
        let service = TimerService::manual();
        let (a, ta) = timer(&service);
        let (b, tb) = timer(&service);
        ta.arm(300);
        tb.arm(100);
        tb.arm(200);
        service.advance(250);
        assert_eq!(
            (a.0.lock().clone(), b.0.lock().clone()),
            (vec![], vec![200])
        );
        ta.disarm();
        service.advance(250);
        assert!(a.0.lock().is_empty());
        assert_eq!(service.now(), 500);
    }

    #[test]
    fn host_clock_calls_and_pauses() {
        let service = TimerService::new().unwrap();
        let (a, ta) = timer(&service);
        ta.arm(service.now() + 1_000_000);
        let mut calls = a.0.lock();
        while calls.is_empty() {
            assert!(
                !a.1.wait_for(&mut calls, Duration::from_secs(10))
                    .timed_out()
            );
        }
        drop(calls);
        service.pause();
        let at = service.now();
        ta.arm(at + 1);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(service.now(), at);
        assert_eq!(a.0.lock().len(), 1);
        service.set_now(5_000_000_000);
        service.resume();
        assert!(service.now() >= 5_000_000_000);
        let mut calls = a.0.lock();
        while calls.len() < 2 {
            assert!(
                !a.1.wait_for(&mut calls, Duration::from_secs(10))
                    .timed_out()
            );
        }
    }

    #[test]
    fn a_time_that_nothing_has_reached_is_refused() {
        let service = TimerService::manual();
        service.restore(LONGEST_NS - 1).unwrap();
        assert_eq!(service.now(), LONGEST_NS - 1);
        assert!(service.restore(LONGEST_NS).is_err());
        assert!(service.restore(u64::MAX).is_err());
    }
}
