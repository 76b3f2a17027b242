//! Things that take a while to make, kept ready: clean virtual machines, in Skerry's case.
//!
//! ```text
//!  acquire ── ready? ─► Lease ── dropped ─► used ── worker: reset, or throw away ─► ready
//!     └─ none, and fewer than max: a worker makes one    worker: make up to min, drop the long idle
//! ```
//! Whoever waits is served in the order of asking. Giving back hands the thing to a worker and
//! returns. Nothing is made or reset on the caller's thread.

use std::collections::VecDeque;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// How long a worker waits after a failure before it tries to make another one.
const AFTER_FAILURE: Duration = Duration::from_millis(500);

/// Makes what a pool keeps, and makes it clean again.
pub trait Template: Send + Sync + 'static {
    /// What the pool keeps.
    type Member: Send + 'static;
    /// Why one could not be made.
    type Error: fmt::Display + Send + 'static;

    /// Makes a new one.
    fn make(&self) -> Result<Self::Member, Self::Error>;

    /// Makes a used one as good as new; after a failure it is thrown away.
    fn reset(&self, member: &mut Self::Member) -> Result<(), Self::Error>;

    /// Whether one that waits can still be used.
    fn is_good(&self, member: &Self::Member) -> bool;
}

/// What becomes of a member that was used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum ResetPolicy {
    /// It is taken back to where it began.
    #[default]
    Rewind,
    /// It is thrown away, and a new one made.
    Replace,
}

/// How a pool is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct PoolOptions {
    /// So many are kept ready or in use at least.
    pub min: usize,
    /// And at most so many.
    pub max: usize,
    /// Ready ones beyond the minimum are thrown away after this time.
    #[cfg_attr(feature = "schema", schema(value_type = Option<Object>))]
    pub idle_timeout: Option<Duration>,
    /// How long [`Pool::acquire`] waits.
    #[cfg_attr(feature = "schema", schema(value_type = Object))]
    pub acquire_timeout: Duration,
    /// What becomes of used ones.
    pub reset: ResetPolicy,
    /// Threads that make and reset.
    pub workers: usize,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            min: 1,
            max: 8,
            idle_timeout: None,
            acquire_timeout: Duration::from_secs(30),
            reset: ResetPolicy::Rewind,
            workers: 2,
        }
    }
}

/// What a pool has and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct PoolStats {
    /// Members that wait for use.
    pub ready: usize,
    /// Members in use.
    pub in_use: usize,
    /// Members that are being made or reset.
    pub busy: usize,
    /// Callers that wait.
    pub waiting: usize,
    /// How many were made.
    pub made: u64,
    /// How often one was given out.
    pub acquired: u64,
    /// How often one was given out that had been ready.
    pub hits: u64,
    /// How often one was taken back to its beginning.
    pub resets: u64,
    /// How many were thrown away.
    pub discarded: u64,
    /// How often making or resetting failed.
    pub failures: u64,
    /// How many callers waited in vain.
    pub timeouts: u64,
}

/// A pool gave nothing.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PoolError {
    /// The limits contradict each other.
    #[error(
        "A pool of {min} to {max} members can't be: use at least 1 at most, and no more at least"
    )]
    Limits {
        /// At least.
        min: usize,
        /// At most.
        max: usize,
    },
    /// Nothing became free in time.
    #[error("No member of the pool became free within {} s: allow for more of them, or for more time", .waited.as_secs_f64())]
    TimedOut {
        /// How long it waited.
        waited: Duration,
    },
    /// Members can't be made.
    #[error("No member of the pool can be made: {0}")]
    Broken(String),
    /// The pool is no more.
    #[error("The pool is closed")]
    Closed,
    /// No threads.
    #[error("Can't start a thread for the pool: {0}")]
    Thread(String),
}

/// See the module's description. Clones are the same pool; with the last one it closes.
pub struct Pool<T: Template> {
    shared: Arc<Shared<T>>,
    /// Closes the pool when the last of its handles goes.
    closer: Arc<Closer<T>>,
}

impl<T: Template> Clone for Pool<T> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            closer: self.closer.clone(),
        }
    }
}

impl<T: Template> fmt::Debug for Pool<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

struct Shared<T: Template> {
    template: T,
    options: PoolOptions,
    state: Mutex<State<T::Member>>,
    /// For workers: there is something to do.
    work: Condvar,
}

struct State<M> {
    ready: VecDeque<(M, Instant)>,
    /// For workers to reset or throw away.
    used: Vec<M>,
    waiters: VecDeque<Arc<Waiter<M>>>,
    in_use: usize,
    busy: usize,
    closed: bool,
    /// No member is made before this.
    not_before: Option<Instant>,
    counts: PoolStats,
}

/// One caller that waits.
struct Waiter<M> {
    given: Mutex<Option<Result<M, PoolError>>>,
    changed: Condvar,
}

struct Closer<T: Template> {
    shared: Arc<Shared<T>>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

/// A member in use; dropping it gives it back.
pub struct Lease<T: Template> {
    member: Option<T::Member>,
    shared: Arc<Shared<T>>,
}

impl<T: Template> fmt::Debug for Lease<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").finish_non_exhaustive()
    }
}

impl<T: Template> Pool<T> {
    /// Opens a pool, whose workers begin to fill it.
    pub fn open(template: T, options: PoolOptions) -> Result<Self, PoolError> {
        let PoolOptions { min, max, .. } = options;
        if max == 0 || min > max {
            return Err(PoolError::Limits { min, max });
        }
        let count = options.workers.clamp(1, max);
        let shared = Arc::new(Shared {
            template,
            options,
            state: Mutex::new(State {
                ready: VecDeque::new(),
                used: Vec::new(),
                waiters: VecDeque::new(),
                in_use: 0,
                busy: 0,
                closed: false,
                not_before: None,
                counts: PoolStats::default(),
            }),
            work: Condvar::new(),
        });
        let closer = Arc::new(Closer {
            shared: shared.clone(),
            workers: Mutex::default(),
        });
        for _ in 0..count {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name("pool".to_owned());
            let thread = thread.spawn(move || shared.serve());
            let thread = thread.map_err(|error| PoolError::Thread(error.to_string()))?;
            closer.workers.lock().push(thread);
        }
        Ok(Self { shared, closer })
    }

    /// A clean member; waits its turn where there is none.
    pub fn acquire(&self) -> Result<Lease<T>, PoolError> {
        self.acquire_within(self.shared.options.acquire_timeout)
    }

    /// A clean member, if there is one within `patience`.
    pub fn acquire_within(&self, patience: Duration) -> Result<Lease<T>, PoolError> {
        let shared = &self.shared;
        let mut state = shared.state.lock();
        if state.closed {
            return Err(PoolError::Closed);
        }
        // Nobody overtakes those who wait.
        while state.waiters.is_empty()
            && let Some((member, _)) = state.ready.pop_front()
        {
            if shared.template.is_good(&member) {
                state.counts.hits += 1;
                return Ok(shared.lease(state, member));
            }
            state.throw(member);
            shared.work.notify_all();
        }
        let waiter = Arc::new(Waiter {
            given: Mutex::new(None),
            changed: Condvar::new(),
        });
        state.waiters.push_back(waiter.clone());
        shared.work.notify_all();
        drop(state);
        shared.wait(&waiter, patience)
    }

    /// Numbers.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let state = self.shared.state.lock();
        PoolStats {
            ready: state.ready.len(),
            in_use: state.in_use,
            busy: state.busy + state.used.len(),
            waiting: state.waiters.len(),
            ..state.counts
        }
    }

    /// Waits until there is a first member, or none can be made.
    pub fn wait_first(&self) -> Result<(), PoolError> {
        match self.shared.options.min {
            0 => Ok(()),
            _ => self.acquire().map(drop),
        }
    }

    /// Waits until as many are ready or in use as the minimum asks for; `false` if that takes longer
    /// than `patience`.
    #[must_use]
    pub fn wait_filled(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let PoolStats { ready, in_use, .. } = self.stats();
            if ready + in_use >= self.shared.options.min {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl<M> State<M> {
    /// All members, wherever they are.
    fn members(&self) -> usize {
        self.ready.len() + self.used.len() + self.in_use + self.busy
    }

    /// Has a worker throw a member away that can't be used.
    fn throw(&mut self, member: M) {
        // Its kind of end is the worker's to find out: what is no good fails to be reset.
        self.used.push(member);
    }
}

impl<T: Template> Shared<T> {
    fn lease(
        self: &Arc<Self>,
        mut state: MutexGuard<'_, State<T::Member>>,
        member: T::Member,
    ) -> Lease<T> {
        state.in_use += 1;
        state.counts.acquired += 1;
        // One less is ready: a worker may have to make another.
        if state.members() < self.options.min {
            self.work.notify_one();
        }
        Lease {
            member: Some(member),
            shared: self.clone(),
        }
    }

    fn wait(
        self: &Arc<Self>,
        waiter: &Arc<Waiter<T::Member>>,
        patience: Duration,
    ) -> Result<Lease<T>, PoolError> {
        let begun = Instant::now();
        let deadline = begun + patience;
        let mut given = waiter.given.lock();
        loop {
            if let Some(given) = given.take() {
                let member = given?;
                return Ok(Lease {
                    member: Some(member),
                    shared: self.clone(),
                });
            }
            if waiter.changed.wait_until(&mut given, deadline).timed_out() {
                break;
            }
        }
        drop(given);
        let mut state = self.state.lock();
        state.waiters.retain(|other| !Arc::ptr_eq(other, waiter));
        // It may have been served between the time-out and here.
        if let Some(given) = waiter.given.lock().take() {
            drop(state);
            let member = given?;
            return Ok(Lease {
                member: Some(member),
                shared: self.clone(),
            });
        }
        state.counts.timeouts += 1;
        Err(PoolError::TimedOut {
            waited: begun.elapsed(),
        })
    }

    /// Gives a clean member to the first who waits, or keeps it ready.
    fn offer(&self, state: &mut State<T::Member>, member: T::Member) {
        match state.waiters.pop_front() {
            Some(waiter) => {
                state.in_use += 1;
                state.counts.acquired += 1;
                *waiter.given.lock() = Some(Ok(member));
                waiter.changed.notify_one();
            }
            None => state.ready.push_back((member, Instant::now())),
        }
    }

    /// A worker's life.
    fn serve(&self) {
        let mut state = self.state.lock();
        while !state.closed {
            if let Some(member) = state.used.pop() {
                state.busy += 1;
                let member = MutexGuard::unlocked(&mut state, || self.clean(member));
                state.busy -= 1;
                match member {
                    Some(member) => {
                        state.counts.resets += 1;
                        self.offer(&mut state, member);
                    }
                    None => state.counts.discarded += 1,
                }
                continue;
            }
            if self.wants_more(&state) {
                state.busy += 1;
                let made = MutexGuard::unlocked(&mut state, || self.template.make());
                state.busy -= 1;
                self.made(&mut state, made);
                continue;
            }
            if let Some(member) = self.idle(&mut state) {
                state.counts.discarded += 1;
                MutexGuard::unlocked(&mut state, || drop(member));
                continue;
            }
            match self.next_event(&state) {
                Some(deadline) => {
                    self.work.wait_until(&mut state, deadline);
                }
                None => self.work.wait(&mut state),
            }
        }
    }

    fn made(&self, state: &mut State<T::Member>, made: Result<T::Member, T::Error>) {
        match made {
            Ok(member) => {
                state.counts.made += 1;
                state.not_before = None;
                self.offer(state, member);
            }
            Err(error) => {
                state.counts.failures += 1;
                state.not_before = Some(Instant::now() + AFTER_FAILURE);
                // With members about, those who wait are served by one of them; without any, they
                // would wait for nothing.
                if state.members() == 0 {
                    for waiter in state.waiters.drain(..) {
                        *waiter.given.lock() = Some(Err(PoolError::Broken(error.to_string())));
                        waiter.changed.notify_one();
                    }
                }
            }
        }
    }

    /// Makes a used member clean; `None` when it is thrown away.
    fn clean(&self, mut member: T::Member) -> Option<T::Member> {
        if self.options.reset == ResetPolicy::Replace {
            return None;
        }
        match self.template.reset(&mut member) {
            Ok(()) => Some(member),
            Err(error) => {
                tracing::debug!(%error, "a member of the pool is thrown away");
                None
            }
        }
    }

    fn wants_more(&self, state: &State<T::Member>) -> bool {
        let missing = state.members() < self.options.min;
        let asked = state.waiters.len() > state.busy && state.members() < self.options.max;
        let allowed = state.not_before.is_none_or(|time| Instant::now() >= time);
        (missing || asked) && allowed
    }

    /// A ready member that has waited for too long, beyond the minimum.
    fn idle(&self, state: &mut State<T::Member>) -> Option<T::Member> {
        let timeout = self.options.idle_timeout?;
        let (_, since) = state.ready.front()?;
        if state.members() > self.options.min && since.elapsed() >= timeout {
            return state.ready.pop_front().map(|(member, _)| member);
        }
        None
    }

    /// When something is to be done without being asked.
    fn next_event(&self, state: &State<T::Member>) -> Option<Instant> {
        let wanted = state.members() < self.options.min || !state.waiters.is_empty();
        let retry = state.not_before.filter(|_| wanted);
        let timeout = self.options.idle_timeout;
        let idle = match (timeout, state.ready.front()) {
            (Some(timeout), Some((_, since))) if state.members() > self.options.min => {
                Some(*since + timeout)
            }
            _ => None,
        };
        retry.into_iter().chain(idle).min()
    }
}

impl<T: Template> Drop for Closer<T> {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.closed = true;
        for waiter in state.waiters.drain(..) {
            *waiter.given.lock() = Some(Err(PoolError::Closed));
            waiter.changed.notify_one();
        }
        drop(state);
        self.shared.work.notify_all();
        for worker in self.workers.lock().drain(..) {
            // A template that panicked has said so.
            let _ = worker.join();
        }
        let mut state = self.shared.state.lock();
        let ready = std::mem::take(&mut state.ready);
        let used = std::mem::take(&mut state.used);
        drop(state);
        drop((ready, used));
    }
}

impl<T: Template> Deref for Lease<T> {
    type Target = T::Member;

    fn deref(&self) -> &T::Member {
        match &self.member {
            Some(member) => member,
            None => unreachable!("only dropping takes the member"),
        }
    }
}

impl<T: Template> DerefMut for Lease<T> {
    fn deref_mut(&mut self) -> &mut T::Member {
        match &mut self.member {
            Some(member) => member,
            None => unreachable!("only dropping takes the member"),
        }
    }
}

impl<T: Template> Drop for Lease<T> {
    fn drop(&mut self) {
        let Some(member) = self.member.take() else {
            return;
        };
        let mut state = self.shared.state.lock();
        state.in_use -= 1;
        if state.closed {
            // The pool's end is the member's.
            drop(state);
            drop(member);
            return;
        }
        state.used.push(member);
        drop(state);
        self.shared.work.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[derive(Default)]
    struct Things {
        made: AtomicUsize,
        alive: Arc<AtomicUsize>,
        broken: AtomicBool,
        bad_reset: AtomicBool,
    }

    struct Thing {
        number: usize,
        dirty: bool,
        good: bool,
        alive: Arc<AtomicUsize>,
    }

    impl Drop for Thing {
        fn drop(&mut self) {
            self.alive.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl Template for Arc<Things> {
        type Member = Thing;
        type Error = &'static str;

        fn make(&self) -> Result<Thing, &'static str> {
            if self.broken.load(Ordering::SeqCst) {
                return Err("out of things");
            }
            self.alive.fetch_add(1, Ordering::SeqCst);
            Ok(Thing {
                number: self.made.fetch_add(1, Ordering::SeqCst),
                dirty: false,
                good: true,
                alive: self.alive.clone(),
            })
        }

        fn reset(&self, thing: &mut Thing) -> Result<(), &'static str> {
            if self.bad_reset.load(Ordering::SeqCst) || !thing.good {
                return Err("stuck");
            }
            thing.dirty = false;
            Ok(())
        }

        fn is_good(&self, thing: &Thing) -> bool {
            thing.good
        }
    }

    fn options(min: usize, max: usize) -> PoolOptions {
        PoolOptions {
            min,
            max,
            acquire_timeout: Duration::from_secs(5),
            ..PoolOptions::default()
        }
    }

    fn until(what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !holds() {
            assert!(Instant::now() < deadline, "never: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn members_come_back_clean() {
        let things = Arc::new(Things::default());
        let pool = Pool::open(things.clone(), options(1, 1)).expect("pool");
        for _ in 0..100 {
            let mut thing = pool.acquire().expect("thing");
            assert!(!thing.dirty);
            assert_eq!(thing.number, 0);
            thing.dirty = true;
        }
        until("the last reset", || pool.stats().resets == 100);
        let stats = pool.stats();
        assert_eq!((stats.made, stats.acquired, stats.ready), (1, 100, 1));
        drop(pool);
        assert_eq!(things.alive.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn what_can_t_be_reset_is_replaced() {
        let things = Arc::new(Things::default());
        things.bad_reset.store(true, Ordering::SeqCst);
        let pool = Pool::open(things.clone(), options(2, 2)).expect("pool");
        for _ in 0..10 {
            drop(pool.acquire().expect("thing"));
        }
        until("full again", || pool.stats().ready == 2);
        assert_eq!(pool.stats().discarded, 10);
        let replacing = PoolOptions {
            reset: ResetPolicy::Replace,
            ..options(1, 1)
        };
        let pool = Pool::open(Arc::new(Things::default()), replacing).expect("pool");
        let first = pool.acquire().expect("thing").number;
        assert_ne!(pool.acquire().expect("thing").number, first);
    }

    #[test]
    fn one_that_went_bad_is_not_given_out() {
        let things = Arc::new(Things::default());
        let pool = Pool::open(things, options(1, 2)).expect("pool");
        assert!(pool.wait_filled(Duration::from_secs(5)));
        if let Some((thing, _)) = pool.shared.state.lock().ready.front_mut() {
            thing.good = false;
        }
        assert_eq!(pool.acquire().expect("another").number, 1);
    }

    #[test]
    fn nobody_gets_more_than_the_maximum() {
        let pool = Pool::open(Arc::new(Things::default()), options(0, 3)).expect("pool");
        let held: Vec<_> = (0..3).map(|_| pool.acquire().expect("thing")).collect();
        let short = Duration::from_millis(20);
        let refused = pool.acquire_within(short).map(drop);
        assert!(
            matches!(refused, Err(PoolError::TimedOut { .. })),
            "{refused:?}"
        );
        assert_eq!((pool.stats().timeouts, pool.stats().waiting), (1, 0));
        drop(held);
        pool.acquire().expect("again");
        assert_eq!(pool.stats().made, 3);
    }

    #[test]
    fn those_who_wait_are_served_in_order() {
        let pool = Pool::open(Arc::new(Things::default()), options(1, 1)).expect("pool");
        let first = pool.acquire().expect("thing");
        let order = Arc::new(Mutex::new(Vec::new()));
        let waiters: Vec<_> = (0..20)
            .map(|number| {
                let (asking, order) = (pool.clone(), order.clone());
                let waiter = std::thread::spawn(move || {
                    let thing = asking.acquire().expect("thing");
                    order.lock().push(number);
                    drop(thing);
                });
                until("it waits", || pool.stats().waiting == number + 1);
                waiter
            })
            .collect();
        drop(first);
        for waiter in waiters {
            waiter.join().expect("waiter");
        }
        assert_eq!(*order.lock(), (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn idle_ones_go_down_to_the_minimum() {
        let fading = PoolOptions {
            idle_timeout: Some(Duration::from_millis(20)),
            ..options(1, 4)
        };
        let things = Arc::new(Things::default());
        let pool = Pool::open(things.clone(), fading).expect("pool");
        let held: Vec<_> = (0..4).map(|_| pool.acquire().expect("thing")).collect();
        drop(held);
        until("one is left", || things.alive.load(Ordering::SeqCst) == 1);
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(pool.stats().ready, 1);
    }

    #[test]
    fn a_broken_template_is_told_and_mends() {
        let things = Arc::new(Things::default());
        things.broken.store(true, Ordering::SeqCst);
        let pool = Pool::open(things.clone(), options(1, 2)).expect("pool");
        let refused = pool.acquire().map(drop);
        assert_eq!(refused, Err(PoolError::Broken("out of things".to_owned())));
        things.broken.store(false, Ordering::SeqCst);
        pool.acquire().expect("mended");
    }

    #[test]
    fn contention_loses_and_makes_up_nothing() {
        let things = Arc::new(Things::default());
        let pool = Pool::open(things.clone(), options(2, 5)).expect("pool");
        let users: Vec<_> = (0..16)
            .map(|_| {
                let pool = pool.clone();
                std::thread::spawn(move || {
                    for _ in 0..200 {
                        let mut thing = pool.acquire().expect("thing");
                        assert!(!thing.dirty);
                        thing.dirty = true;
                    }
                })
            })
            .collect();
        for user in users {
            user.join().expect("user");
        }
        assert!(things.alive.load(Ordering::SeqCst) <= 5);
        assert_eq!(pool.stats().acquired, 3200);
        assert_eq!(pool.stats().in_use, 0);
    }

    #[test]
    fn closing_wakes_and_refuses() {
        assert!(Pool::open(Arc::new(Things::default()), options(2, 1)).is_err());
        assert!(Pool::open(Arc::new(Things::default()), options(0, 0)).is_err());
        let things = Arc::new(Things::default());
        let pool = Pool::open(things.clone(), options(1, 1)).expect("pool");
        let held = pool.acquire().expect("thing");
        drop(pool);
        assert_eq!(things.alive.load(Ordering::SeqCst), 1);
        drop(held);
        assert_eq!(things.alive.load(Ordering::SeqCst), 0);
    }
}
