//! What the processors of one VM ask of their host: a clock, timers, and to be woken.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use skerry_x86cpu::shared::request;
use skerry_x86cpu::{CpuShared, Host};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half-done under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a halted processor's thread waits.
#[derive(Default)]
struct Parking {
    /// Its thread waits, or is about to look once more before it does.
    waiting: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
    shared: OnceLock<Arc<CpuShared>>,
}

#[derive(Default)]
struct Timers {
    /// By processor: when its local APIC's timer fires, in guest-clock nanoseconds.
    deadlines: Vec<Option<u64>>,
    /// Until when the timer thread sleeps; `None` while nothing is armed.
    sleeping_until: Option<u64>,
    stop: bool,
}

/// The host's side of one VM.
pub(crate) struct SoftHost {
    start: Instant,
    /// Guest clock minus time since `start` (wrapping).
    offset: AtomicU64,
    /// What the guest clock was last set to.
    base: AtomicU64,
    parking: Box<[Parking]>,
    timers: Mutex<Timers>,
    timer_wake: Condvar,
}

impl SoftHost {
    pub(crate) fn new(processors: usize) -> Self {
        Self {
            start: Instant::now(),
            offset: AtomicU64::new(0),
            base: AtomicU64::new(0),
            parking: (0..processors).map(|_| Parking::default()).collect(),
            timers: Mutex::new(Timers {
                deadlines: vec![None; processors],
                ..Timers::default()
            }),
            timer_wake: Condvar::new(),
        }
    }

    /// Tells which shared part belongs to processor `id`.
    pub(crate) fn add_processor(&self, id: u32, shared: Arc<CpuShared>) {
        if let Some(parking) = self.parking.get(id as usize) {
            let _ = parking.shared.set(shared);
        }
    }

    /// Lets processor `id`'s thread wait until it has a reason to run; its timer is one. `false` if
    /// it has waited for `idle` and has none.
    pub(crate) fn park(&self, id: u32, shared: &CpuShared, idle: Option<Duration>) -> bool {
        let Some(parking) = self.parking.get(id as usize) else {
            return true;
        };
        // From here on the timer is looked at here: that takes one wake-up where two threads take
        // two.
        let deadline = self.take_deadline(id);
        let idle = idle.map(|idle| self.clock_ns().saturating_add(idle.as_nanos() as u64));
        let mut guard = lock(&parking.lock);
        // Whoever wakes writes the reason, then reads this; here it is the other way round.
        parking.waiting.store(true, Ordering::SeqCst);
        let woken = loop {
            if shared.wake_pending() {
                break true;
            }
            let now = self.clock_ns();
            if deadline.is_some_and(|at| at <= now) {
                break true;
            }
            if idle.is_some_and(|at| at <= now) {
                break false;
            }
            guard = match deadline.into_iter().chain(idle).min() {
                None => parking
                    .wake
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    parking
                        .wake
                        .wait_timeout(guard, Duration::from_nanos(at - now).min(LONGEST_SLEEP))
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        };
        parking.waiting.store(false, Ordering::SeqCst);
        drop(guard);
        match deadline {
            Some(at) if at <= self.clock_ns() => shared.request(request::TIMER),
            Some(_) => self.arm_timer(id, deadline),
            None => {}
        }
        woken
    }

    fn take_deadline(&self, id: u32) -> Option<u64> {
        lock(&self.timers).deadlines.get_mut(id as usize)?.take()
    }

    pub(crate) fn set_clock_ns(&self, ns: u64) {
        let offset = ns.wrapping_sub(self.start.elapsed().as_nanos() as u64);
        self.offset.store(offset, Ordering::SeqCst);
        self.base.store(ns, Ordering::SeqCst);
        // Deadlines are times of this clock.
        drop(lock(&self.timers));
        self.timer_wake.notify_all();
        for parking in &self.parking {
            drop(lock(&parking.lock));
            parking.wake.notify_all();
        }
    }

    /// Starts the thread that fires the timers; it ends when the VM does.
    pub(crate) fn start_timers(self: &Arc<Self>) -> std::io::Result<TimerThread> {
        let host = Arc::downgrade(self);
        let thread = std::thread::Builder::new()
            .name("apic-timers".into())
            .spawn(move || {
                skerry_confine::enter(skerry_confine::Role::Timer);
                run_timers(&host);
            })?;
        Ok(TimerThread {
            host: self.clone(),
            thread: Some(thread),
        })
    }

    /// Fires what is due and gives the time of the next deadline.
    fn fire(&self, timers: &mut Timers) -> Option<u64> {
        let now = self.clock_ns();
        let mut next: Option<u64> = None;
        for (deadline, id) in timers.deadlines.iter_mut().zip(0..) {
            match *deadline {
                Some(at) if at <= now => {
                    *deadline = None;
                    if let Some(shared) = self.parking.get(id as usize).and_then(|p| p.shared.get())
                    {
                        shared.request(request::TIMER);
                    }
                    self.wake(id);
                }
                Some(at) => next = Some(next.map_or(at, |next| next.min(at))),
                None => {}
            }
        }
        next
    }
}

/// Longer than this the timer thread never sleeps at once: the clock may be set meanwhile.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

fn run_timers(host: &Weak<SoftHost>) {
    // The VM joins this thread before it lets the host go.
    let Some(host) = host.upgrade() else {
        return;
    };
    let mut timers = lock(&host.timers);
    while !timers.stop {
        let next = host.fire(&mut timers);
        timers.sleeping_until = next;
        timers = match next {
            None => host
                .timer_wake
                .wait(timers)
                .unwrap_or_else(PoisonError::into_inner),
            Some(at) => {
                let wait = Duration::from_nanos(at.saturating_sub(host.clock_ns()));
                host.timer_wake
                    .wait_timeout(timers, wait.min(LONGEST_SLEEP))
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        };
    }
}

impl Host for SoftHost {
    fn wake(&self, cpu: u32) {
        if let Some(parking) = self.parking.get(cpu as usize)
            && parking.waiting.load(Ordering::SeqCst)
        {
            let _guard = lock(&parking.lock);
            parking.wake.notify_all();
        }
    }

    fn arm_timer(&self, cpu: u32, deadline: Option<u64>) {
        let mut timers = lock(&self.timers);
        let Some(slot) = timers.deadlines.get_mut(cpu as usize) else {
            return;
        };
        *slot = deadline;
        // A later deadline, or none, is found when the thread wakes by itself.
        let earlier =
            deadline.is_some_and(|at| timers.sleeping_until.is_none_or(|until| at < until));
        if earlier {
            timers.sleeping_until = deadline;
            self.timer_wake.notify_all();
        }
    }

    fn clock_ns(&self) -> u64 {
        let elapsed = self.start.elapsed().as_nanos() as u64;
        elapsed.wrapping_add(self.offset.load(Ordering::Relaxed))
    }

    fn clock_base_ns(&self) -> u64 {
        self.base.load(Ordering::Relaxed)
    }

    fn wall_clock_base_ns(&self) -> u64 {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        (now.as_nanos() as u64).saturating_sub(self.clock_ns())
    }
}

/// Stops and joins the timer thread when it goes.
pub(crate) struct TimerThread {
    host: Arc<SoftHost>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for TimerThread {
    fn drop(&mut self) {
        lock(&self.host.timers).stop = true;
        self.host.timer_wake.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_wakes_a_parked_processor() {
        let host = Arc::new(SoftHost::new(2));
        let _timers = host.start_timers().unwrap();
        let shared = Arc::new(CpuShared::default());
        host.add_processor(1, shared.clone());
        for wait in [0, 2_000_000, 5_000_000] {
            let deadline = host.clock_ns() + wait;
            host.arm_timer(0, Some(deadline + 1_000_000_000_000));
            host.arm_timer(1, Some(deadline));
            assert!(host.park(1, &shared, None));
            assert!(host.clock_ns() >= deadline);
            assert_eq!(shared.requests.swap(0, Ordering::SeqCst), request::TIMER);
        }
    }

    #[test]
    fn a_timer_fires_while_its_processor_runs() {
        let host = Arc::new(SoftHost::new(1));
        let _timers = host.start_timers().unwrap();
        let shared = Arc::new(CpuShared::default());
        host.add_processor(0, shared.clone());
        host.arm_timer(0, Some(host.clock_ns() + 1_000_000));
        while shared.requests.load(Ordering::SeqCst) != request::TIMER {
            std::thread::yield_now();
        }
    }

    #[test]
    fn idleness_ends_a_wait_and_leaves_the_timer_armed() {
        let host = Arc::new(SoftHost::new(1));
        let _timers = host.start_timers().unwrap();
        let shared = Arc::new(CpuShared::default());
        host.add_processor(0, shared.clone());
        let deadline = host.clock_ns() + 50_000_000;
        host.arm_timer(0, Some(deadline));
        assert!(!host.park(0, &shared, Some(Duration::from_millis(1))));
        assert_eq!(shared.requests.load(Ordering::SeqCst), 0);
        assert!(host.park(0, &shared, None));
        assert!(host.clock_ns() >= deadline);
    }

    #[test]
    fn a_parked_processor_hears_of_a_new_clock() {
        let host = Arc::new(SoftHost::new(1));
        let shared = Arc::new(CpuShared::default());
        host.add_processor(0, shared.clone());
        host.arm_timer(0, Some(1 << 60));
        std::thread::scope(|scope| {
            scope.spawn(|| host.park(0, &shared, None));
            std::thread::sleep(Duration::from_millis(5));
            host.set_clock_ns(1 << 60);
        });
        assert_eq!(shared.requests.load(Ordering::SeqCst), request::TIMER);
    }

    #[test]
    fn a_wake_is_never_lost() {
        let host = Arc::new(SoftHost::new(1));
        let shared = Arc::new(CpuShared::default());
        host.add_processor(0, shared.clone());
        std::thread::scope(|scope| {
            let (host, shared) = (&host, &shared);
            scope.spawn(move || {
                for _ in 0..2000 {
                    shared.request_exit();
                    host.wake(0);
                    while shared.wake_pending() {
                        std::thread::yield_now();
                    }
                }
            });
            for _ in 0..2000 {
                host.park(0, shared, None);
                shared.requests.store(0, Ordering::SeqCst);
            }
        });
    }

    #[test]
    fn the_clock_can_be_set_both_ways() {
        let host = SoftHost::new(1);
        host.set_clock_ns(1 << 50);
        assert!(host.clock_ns() >= 1 << 50);
        host.set_clock_ns(5);
        assert!(host.clock_ns() < 1 << 40);
        assert!(host.wall_clock_base_ns() > 1_600_000_000_000_000_000);
    }
}
