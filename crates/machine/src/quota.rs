//! How much of the host's processors a machine may take, where the host's kernel doesn't see to it.
//!
//! As Linux has it (scheduler/sched-bwc): so much time in each period, for all virtual processors
//! together. A thread pays when it asks what to do next, which it is made to do every [`LOOK`]; what it has
//! taken beyond the budget by then is missing in the next period, so that the average is right.

use std::time::{Duration, Instant};

use rustix::time::ClockId;

/// What a budget is for.
const PERIOD: Duration = Duration::from_millis(100);
/// How long a processor runs at most before it pays.
pub(crate) const LOOK: Duration = Duration::from_millis(10);
const BILLION: u64 = 1_000_000_000;

/// A budget, and what of it is spent.
#[derive(Debug)]
pub(crate) struct Quota {
    budget: Duration,
    spent: Duration,
    ends: Instant,
    /// What each processor's thread had taken when it paid last.
    paid: Vec<Option<Duration>>,
}

/// What the calling thread has taken of the host's processors.
pub(crate) fn taken_by_thread() -> Duration {
    let time = rustix::time::clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::from_secs(seconds) + Duration::from_nanos(time.tv_nsec.unsigned_abs())
}

impl Quota {
    /// Of `nano_cpus` billionths of one processor's time, for a machine of `cpus` processors.
    pub(crate) fn new(nano_cpus: u64, cpus: usize, now: Instant) -> Self {
        let period = u128::from(PERIOD.as_millis() as u64) * 1_000_000;
        let budget = u128::from(nano_cpus) * period / u128::from(BILLION);
        Self {
            budget: Duration::from_nanos(u64::try_from(budget).unwrap_or(u64::MAX).max(1)),
            spent: Duration::ZERO,
            ends: now + PERIOD,
            paid: vec![None; cpus],
        }
    }

    /// Has a processor pay, whose thread has `taken` so much since it began; until when it has to wait.
    pub(crate) fn charge(
        &mut self,
        processor: usize,
        taken: Duration,
        now: Instant,
    ) -> Option<Instant> {
        // Before the next period begins: most of it was taken in the last.
        if let Some(paid) = self.paid.get_mut(processor) {
            // What it took before there was a quota is free.
            let since = taken.saturating_sub(paid.unwrap_or(taken));
            *paid = Some(taken);
            self.spent = self.spent.saturating_add(since);
        }
        let over = now.saturating_duration_since(self.ends);
        if now >= self.ends {
            let periods = over.as_nanos() / PERIOD.as_nanos() + 1;
            let periods = u32::try_from(periods).unwrap_or(u32::MAX);
            self.spent = self
                .spent
                .saturating_sub(self.budget.saturating_mul(periods));
            self.ends += PERIOD.saturating_mul(periods);
        }
        (self.spent >= self.budget).then_some(self.ends)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A processor that does nothing but run, for `span`: what it takes in all.
    fn run(quota: &mut Quota, start: Instant, span: Duration) -> Duration {
        let (mut now, mut taken) = (start, Duration::ZERO);
        while now < start + span {
            match quota.charge(0, taken, now) {
                Some(until) => {
                    assert!(until > now, "a wait ends");
                    now = until;
                }
                None => {
                    now += LOOK;
                    taken += LOOK;
                }
            }
        }
        taken
    }

    #[test]
    fn a_busy_processor_takes_its_share_and_no_more() {
        for (nano_cpus, percent) in [
            (500_000_000, 50),
            (10_000_000, 1),
            (250_000_000, 25),
            (990_000_000, 99),
        ] {
            let start = Instant::now();
            let mut quota = Quota::new(nano_cpus, 1, start);
            let taken = run(&mut quota, start, Duration::from_secs(100));
            let wanted = Duration::from_secs(100) * percent / 100;
            assert!(taken.abs_diff(wanted) <= PERIOD, "{taken:?} of {wanted:?}");
        }
    }

    #[test]
    fn what_was_not_taken_is_not_saved_up() {
        let start = Instant::now();
        let mut quota = Quota::new(500_000_000, 1, start);
        assert_eq!(quota.charge(0, Duration::ZERO, start), None);
        let later = start + Duration::from_secs(60);
        assert_eq!(quota.charge(0, MS, later), None);
        assert!(quota.charge(0, 52 * MS, later + MS).is_some());
    }

    #[test]
    fn processors_share_one_budget() {
        let start = Instant::now();
        let mut quota = Quota::new(1_500_000_000, 2, start);
        for processor in [0, 1] {
            assert_eq!(quota.charge(processor, Duration::ZERO, start), None);
        }
        assert_eq!(quota.charge(0, 80 * MS, start + 80 * MS), None);
        let until = quota.charge(1, 80 * MS, start + 80 * MS);
        assert_eq!(until, Some(start + PERIOD));
    }

    #[test]
    fn time_before_the_quota_is_free() {
        let start = Instant::now();
        let mut quota = Quota::new(500_000_000, 1, start);
        assert_eq!(quota.charge(0, Duration::from_secs(9), start), None);
        assert_eq!(
            quota.charge(7, Duration::from_secs(9), start),
            None,
            "no such processor"
        );
    }
}
