//! Time limits of calls: one thread for all sandboxes of the process, which sleeps until the first limit.
//!
//! Setting and clearing a limit are a store each, but for the first after a pause: the thread looks
//! at its list when it wakes up, and calls that have ended in the meantime cost nothing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::time::{ClockId, clock_gettime};
use skerry_hypervisor::CallId;

use crate::interrupt::{Reason, Shared};

const NEVER: u64 = u64::MAX;

/// One sandbox's limits.
#[derive(Debug)]
pub(crate) struct Timer {
    target: Arc<Shared>,
    /// When to look at the call, in nanoseconds of the watchdog's clock; [`NEVER`] without call.
    due: AtomicU64,
    active: Mutex<Option<Active>>,
}

/// The call that is limited.
#[derive(Clone, Copy, Debug)]
struct Active {
    call: CallId,
    /// Of wall time.
    end: Option<Instant>,
    /// Of the thread's processor time: the clock, and when it is used up.
    cpu: Option<(libc::clockid_t, Duration)>,
}

#[derive(Default)]
struct List {
    timers: Vec<Weak<Timer>>,
    /// How many there may be before those that are gone are looked for.
    enough: usize,
    started: bool,
}

struct Watchdog {
    epoch: Instant,
    /// When the thread will wake by itself.
    wakes: AtomicU64,
    list: Mutex<List>,
    earlier: Condvar,
}

fn watchdog() -> &'static Watchdog {
    static WATCHDOG: OnceLock<Watchdog> = OnceLock::new();
    WATCHDOG.get_or_init(|| Watchdog {
        epoch: Instant::now(),
        wakes: AtomicU64::new(NEVER),
        list: Mutex::default(),
        earlier: Condvar::new(),
    })
}

/// What a clock of another thread shows; `None` if the thread is gone.
fn clock(id: libc::clockid_t) -> Option<Duration> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    #[expect(unsafe_code, reason = "rustix has no clocks of other threads")]
    // SAFETY: writes the structure that it is given.
    let result = unsafe { libc::clock_gettime(id, &mut time) };
    let nanos = u32::try_from(time.tv_nsec).ok()?;
    (result == 0).then(|| Duration::new(time.tv_sec.unsigned_abs(), nanos))
}

/// The clock of the calling thread's processor time, for other threads.
fn own_clock() -> Option<libc::clockid_t> {
    let mut id = 0;
    #[expect(unsafe_code, reason = "rustix has no clocks of other threads")]
    // SAFETY: asks for the calling thread, which is there; writes the number that it is given.
    let result = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut id) };
    (result == 0).then_some(id)
}

impl Watchdog {
    fn nanos(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.epoch).as_nanos();
        u64::try_from(since).unwrap_or(NEVER - 1)
    }

    fn add(&'static self, timer: &Arc<Timer>) -> std::io::Result<()> {
        let mut list = self.list.lock();
        if !list.started {
            let thread = std::thread::Builder::new().name("sandbox-timer".into());
            thread.spawn(|| self.watch())?;
            list.started = true;
        }
        if list.timers.len() >= list.enough {
            list.timers.retain(|timer| timer.strong_count() > 0);
            list.enough = 2 * list.timers.len() + 16;
        }
        list.timers.push(Arc::downgrade(timer));
        Ok(())
    }

    fn watch(&self) {
        let mut list = self.list.lock();
        loop {
            // Who sets a limit from here on either finds this or is found by the look below.
            self.wakes.store(0, Ordering::SeqCst);
            let now = self.nanos(Instant::now());
            let mut next = NEVER;
            list.timers.retain(|timer| {
                let Some(timer) = timer.upgrade() else {
                    return false;
                };
                if timer.due.load(Ordering::SeqCst) <= now {
                    timer.look(self);
                }
                next = next.min(timer.due.load(Ordering::SeqCst));
                true
            });
            self.wakes.store(next, Ordering::SeqCst);
            // One that was set between its look and that store is earlier than what it found.
            let missed = list
                .timers
                .iter()
                .filter_map(Weak::upgrade)
                .any(|timer| timer.due.load(Ordering::SeqCst) < next);
            if missed {
                continue;
            }
            match next {
                NEVER => self.earlier.wait(&mut list),
                _ => {
                    let until = self.epoch + Duration::from_nanos(next);
                    self.earlier.wait_until(&mut list, until);
                }
            }
        }
    }
}

impl Timer {
    /// A timer for the calls of `target`.
    pub(crate) fn new(target: Arc<Shared>) -> std::io::Result<Arc<Self>> {
        let timer = Arc::new(Self {
            target,
            due: AtomicU64::new(NEVER),
            active: Mutex::new(None),
        });
        watchdog().add(&timer)?;
        Ok(timer)
    }

    /// Limits the call that has just begun on this thread.
    pub(crate) fn set(&self, call: CallId, wall: Option<Duration>, cpu: Option<Duration>) {
        let now = Instant::now();
        let end = wall.and_then(|wall| now.checked_add(wall));
        let cpu = cpu.and_then(|limit| {
            let spent = Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).ok()?;
            Some((own_clock()?, spent.checked_add(limit)?, limit))
        });
        let first = [end, cpu.and_then(|(_, _, limit)| now.checked_add(limit))];
        let Some(first) = first.into_iter().flatten().min() else {
            return;
        };
        let cpu = cpu.map(|(clock, end, _)| (clock, end));
        *self.active.lock() = Some(Active { call, end, cpu });
        let watchdog = watchdog();
        let due = watchdog.nanos(first);
        self.due.store(due, Ordering::SeqCst);
        if due < watchdog.wakes.load(Ordering::SeqCst) {
            // With the lock: the thread is either waiting or has yet to look.
            let _list = watchdog.list.lock();
            watchdog.earlier.notify_one();
        }
    }

    /// The call has ended.
    pub(crate) fn clear(&self) {
        self.due.store(NEVER, Ordering::SeqCst);
        *self.active.lock() = None;
    }

    /// Cancels the call if a limit is reached; else says when to look again.
    fn look(&self, watchdog: &Watchdog) {
        let active = self.active.lock();
        let Some(Active { call, end, cpu }) = *active else {
            self.due.store(NEVER, Ordering::SeqCst);
            return;
        };
        let now = Instant::now();
        if end.is_some_and(|end| end <= now) {
            self.due.store(NEVER, Ordering::SeqCst);
            let _ = self.target.cancel(call, Reason::TimedOut);
            return;
        }
        let mut next = end;
        if let Some((id, limit)) = cpu {
            // A thread that is gone makes no call; its time stands still.
            let left = limit.saturating_sub(clock(id).unwrap_or_default());
            if left.is_zero() {
                self.due.store(NEVER, Ordering::SeqCst);
                let _ = self.target.cancel(call, Reason::CpuTime);
                return;
            }
            let look = now.checked_add(left);
            next = [next, look].into_iter().flatten().min();
        }
        let due = next.map_or(NEVER, |next| watchdog.nanos(next));
        self.due.store(due, Ordering::SeqCst);
    }
}
