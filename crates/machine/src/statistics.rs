//! What processors have counted, and how they spend their time.
//!
//! ```text
//!  Sampler's thread ── every millisecond or so ─► Statistics::activity ─► samples by activity
//!  MachineRemote::statistics(sampler) ─► Statistics::counters + samples ─► ProcessorStatistics
//! ```
//! The thread is there as long as somebody wants to know; the processors do nothing for it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use skerry_hypervisor::Statistics;

use crate::tracking::AnyVm;

/// The least time between two samples; the most is three times that. It changes so that a guest which
/// does something at a steady rate isn't always met at the same.
const LEAST_PERIOD_US: u64 = 500;
/// Enough for a loop over processors.
const STACK: usize = 64 << 10;

/// How a processor spent its time while it was sampled.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct TimeShares {
    /// How often it was looked at.
    pub samples: u64,
    /// By what it was at: the part of the samples, of 1.
    pub shares: BTreeMap<String, f64>,
}

/// What a processor has done.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct ProcessorStatistics {
    /// Its number.
    pub id: u32,
    /// What it has counted since it was made, or holds now.
    pub counters: BTreeMap<String, u64>,
    /// How it spent its time, where that was sampled.
    pub time: Option<TimeShares>,
}

struct Samples {
    /// By processor, then by activity.
    seen: Box<[Box<[AtomicU64]>]>,
    stop: Mutex<bool>,
    changed: Condvar,
}

/// Looks at what a machine's processors are at, now and then, until it is dropped.
pub struct Sampler {
    samples: Arc<Samples>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sampler").finish_non_exhaustive()
    }
}

impl Sampler {
    /// Begins; `None` where the machine's backend has nothing to be seen.
    pub(crate) fn start(vm: Arc<dyn AnyVm>, processors: usize) -> io::Result<Option<Self>> {
        let Some(activities) = vm.statistics().map(|found| found.activities().len()) else {
            return Ok(None);
        };
        let none = || (0..activities).map(|_| AtomicU64::new(0)).collect();
        let samples = Arc::new(Samples {
            seen: (0..processors).map(|_| none()).collect(),
            stop: Mutex::new(false),
            changed: Condvar::new(),
        });
        let shared = samples.clone();
        let thread = std::thread::Builder::new()
            .name("statistics".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                skerry_confine::enter(skerry_confine::Role::Timer);
                if let Some(statistics) = vm.statistics() {
                    shared.take(statistics);
                }
            })?;
        Ok(Some(Self {
            samples,
            thread: Some(thread),
        }))
    }

    fn shares(&self, id: u32, activities: &[&str]) -> Option<TimeShares> {
        let seen = self.samples.seen.get(id as usize)?;
        let seen: Vec<u64> = seen.iter().map(|n| n.load(Ordering::Relaxed)).collect();
        let samples: u64 = seen.iter().sum();
        let share = |n: u64| n as f64 / samples.max(1) as f64;
        let named = activities.iter().zip(seen);
        Some(TimeShares {
            samples,
            shares: named
                .map(|(name, n)| ((*name).to_owned(), share(n)))
                .collect(),
        })
    }
}

impl Samples {
    fn take(&self, statistics: &dyn Statistics) {
        let mut random = 1_u32;
        let mut stop = self.stop.lock();
        while !*stop {
            // The generator of Numerical Recipes: its high bits do for this.
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let period = LEAST_PERIOD_US + u64::from(random >> 16) % (2 * LEAST_PERIOD_US);
            self.changed
                .wait_for(&mut stop, Duration::from_micros(period));
            for (id, seen) in (0..).zip(&self.seen) {
                let activity = statistics.activity(id);
                if let Some(count) = activity.and_then(|activity| seen.get(activity)) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        *self.samples.stop.lock() = true;
        self.samples.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What each of `processors` has done.
pub(crate) fn read(
    statistics: &dyn Statistics,
    processors: usize,
    sampler: Option<&Sampler>,
) -> Vec<ProcessorStatistics> {
    let ids = (0..).take(processors);
    ids.map(|id| ProcessorStatistics {
        id,
        counters: statistics
            .counters(id)
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        time: sampler.and_then(|sampler| sampler.shares(id, statistics.activities())),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use skerry_hypervisor::{DirtyLogError, Gpa, MapError, StateError};

    use super::*;

    /// Processor 0 is at the first thing half of the time, processor 1 always at the second.
    struct Scripted(AtomicU64, bool);

    impl Statistics for Scripted {
        fn counters(&self, id: u32) -> Vec<(&'static str, u64)> {
            vec![("things", u64::from(id) + 7)]
        }

        fn refresh(&self) {}

        fn activities(&self) -> &'static [&'static str] {
            &["work", "rest"]
        }

        fn activity(&self, id: u32) -> Option<usize> {
            match id {
                0 => Some(self.0.fetch_add(1, Ordering::Relaxed) as usize % 2),
                1 => Some(1),
                // Nobody has such a thing.
                _ => Some(9),
            }
        }
    }

    impl AnyVm for Scripted {
        fn clock_ns(&self) -> Result<u64, StateError> {
            Ok(0)
        }

        fn set_clock_ns(&self, _: u64) -> Result<(), StateError> {
            Ok(())
        }

        fn log_writes(&self, _: Gpa) -> Result<(), MapError> {
            Ok(())
        }

        fn dirty_pages(&self, _: Gpa) -> Result<Vec<u64>, DirtyLogError> {
            Ok(Vec::new())
        }

        fn statistics(&self) -> Option<&dyn Statistics> {
            self.1.then_some(self)
        }
    }

    #[test]
    fn samples_tell_what_processors_are_at() {
        let vm = Arc::new(Scripted(AtomicU64::new(0), true));
        let sampler = Sampler::start(vm.clone(), 3).unwrap().unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let read = loop {
            let read = read(&*vm, 3, Some(&sampler));
            let time = read[1].time.as_ref().unwrap();
            if time.samples >= 20 {
                break read;
            }
            assert!(std::time::Instant::now() < deadline, "{read:?}");
            std::thread::sleep(Duration::from_millis(5));
        };
        let share = |id: usize, name: &str| read[id].time.as_ref().unwrap().shares[name];
        assert!((share(0, "work") - 0.5).abs() <= 0.05, "{read:?}");
        assert!((share(0, "work") + share(0, "rest") - 1.0).abs() < 1e-9);
        assert_eq!((share(1, "work"), share(1, "rest")), (0.0, 1.0));
        assert_eq!(read[2].time.as_ref().unwrap().samples, 0);
        assert_eq!(read[1].counters["things"], 8);
        // Its thread, which holds the machine, ends with it.
        drop(sampler);
        assert_eq!(Arc::strong_count(&vm), 1);
    }

    #[test]
    fn a_backend_that_counts_nothing_is_not_sampled() {
        let vm = Arc::new(Scripted(AtomicU64::new(0), false));
        assert!(Sampler::start(vm, 1).unwrap().is_none());
    }
}
