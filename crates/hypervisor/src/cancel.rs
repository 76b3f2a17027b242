//! Forcing virtual processors out of the guest, from any thread, without races.
//!
//! Every run belongs to a *call* ([`crate::Vcpu::begin_call`] … [`crate::Vcpu::end_call`]). A
//! cancel names the call it means, so that one that comes late can't hit the next call. The state
//! is one atomic word: generation in the high bits, then "active" and "cancelled".

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const CANCELLED: u64 = 1;
const ACTIVE: u64 = 2;
const GENERATION: u64 = 4;

/// Names one call of one virtual processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallId(u64);

/// What a cancel found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum CancelOutcome {
    /// The call was active; the guest stops, or will not be resumed.
    Cancelled,
    /// The call had ended, or none was active: nothing was done.
    NotActive,
}

/// How a backend gets a thread out of the guest. Must be safe in every state: never run, running,
/// between runs, halted; an unneeded kick is at worst a spurious [`crate::Exit::Interrupted`].
pub trait Kick: Send + Sync {
    /// Makes a running or next run return soon.
    fn kick(&self);
}

/// The word that a backend's vCPU and its cancellers share.
#[derive(Debug, Default)]
pub struct CallWord {
    word: AtomicU64,
    kicked: AtomicBool,
}

impl CallWord {
    /// Starts a call. A call that is still active is ended first.
    pub fn begin(&self) -> CallId {
        let old = self.word.load(Ordering::Relaxed);
        let generation = (old & !(GENERATION - 1)).wrapping_add(GENERATION);
        self.word.store(generation | ACTIVE, Ordering::SeqCst);
        CallId(generation)
    }

    /// Ends the active call, if there is one.
    pub fn end(&self) {
        self.word.fetch_and(!(ACTIVE | CANCELLED), Ordering::SeqCst);
    }

    /// Whether the active call was cancelled. A backend asks before it enters the guest, after it
    /// has made itself reachable for kicks, and after every kick.
    pub fn is_cancelled(&self) -> bool {
        self.word.load(Ordering::SeqCst) & CANCELLED != 0
    }

    /// Takes a pending kick.
    pub fn take_kick(&self) -> bool {
        self.kicked.load(Ordering::Relaxed) && self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Whether a kick is pending.
    pub fn kick_pending(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    /// Marks the call, and says whether it is the first to do so: one kick is enough, and many who cancel
    /// the same call would keep its thread busy with theirs.
    fn cancel(&self, call: CallId) -> (CancelOutcome, bool) {
        let active = call.0 | ACTIVE;
        match self.word.compare_exchange(
            active,
            active | CANCELLED,
            Ordering::SeqCst,
            Ordering::SeqCst,
        ) {
            Ok(_) => (CancelOutcome::Cancelled, true),
            Err(now) if now == active | CANCELLED => (CancelOutcome::Cancelled, false),
            Err(_) => (CancelOutcome::NotActive, false),
        }
    }

    fn current(&self) -> Option<CallId> {
        let word = self.word.load(Ordering::SeqCst);
        (word & ACTIVE != 0).then_some(CallId(word & !(GENERATION - 1)))
    }
}

/// Stops one virtual processor from any thread.
#[derive(Clone)]
pub struct Canceller {
    word: Arc<CallWord>,
    kick: Arc<dyn Kick>,
}

impl fmt::Debug for Canceller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canceller")
            .field("word", &self.word)
            .finish_non_exhaustive()
    }
}

impl Canceller {
    /// For backends: a canceller over the vCPU's word and its way of kicking.
    pub fn new(word: Arc<CallWord>, kick: Arc<dyn Kick>) -> Self {
        Self { word, kick }
    }

    /// The call that is active now.
    pub fn current(&self) -> Option<CallId> {
        self.word.current()
    }

    /// Cancels `call`: its run, or its next run, returns [`crate::Exit::Cancelled`].
    pub fn cancel(&self, call: CallId) -> CancelOutcome {
        let (outcome, first) = self.word.cancel(call);
        if first {
            self.kick.kick();
        }
        outcome
    }

    /// Makes the current or next run return once with [`crate::Exit::Interrupted`].
    pub fn kick(&self) {
        self.word.kicked.store(true, Ordering::SeqCst);
        self.kick.kick();
    }
}

/// Cancels the calls that are active now on all of `cancellers`: marks every one before it kicks
/// the first, so that none runs on for the time that another's kick takes.
pub fn cancel_all(cancellers: &[Canceller]) -> Vec<CancelOutcome> {
    let outcomes: Vec<_> = cancellers
        .iter()
        .map(|c| match c.word.current() {
            Some(call) => c.word.cancel(call),
            None => (CancelOutcome::NotActive, false),
        })
        .collect();
    for (canceller, (_, first)) in cancellers.iter().zip(&outcomes) {
        if *first {
            canceller.kick.kick();
        }
    }
    outcomes.into_iter().map(|(outcome, _)| outcome).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoKick;

    impl Kick for NoKick {
        fn kick(&self) {}
    }

    #[test]
    fn a_late_cancel_misses_the_next_call() {
        let word = Arc::new(CallWord::default());
        let canceller = Canceller::new(word.clone(), Arc::new(NoKick));
        assert_eq!(canceller.current(), None);
        let first = word.begin();
        assert_eq!(canceller.cancel(first), CancelOutcome::Cancelled);
        assert!(word.is_cancelled());
        word.end();
        let second = word.begin();
        assert_eq!(canceller.cancel(first), CancelOutcome::NotActive);
        assert!(!word.is_cancelled());
        assert_eq!(canceller.current(), Some(second));
        word.end();
        assert_eq!(canceller.cancel(second), CancelOutcome::NotActive);
        assert_eq!(cancel_all(&[canceller]), vec![CancelOutcome::NotActive]);
    }
}
