//! Collecting orphans as PID 1 must, without taking the statuses that exec sessions wait for.

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::sys;

/// Knows which children belong to an exec session.
#[derive(Debug, Default)]
pub struct Reaper {
    owned: Mutex<HashSet<i32>>,
    changed: Condvar,
}

impl Reaper {
    /// A reaper; where this process is PID 1, [`Self::start`] it too.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Starts the thread that collects orphans.
    pub fn start(self: &Arc<Self>) -> io::Result<()> {
        let reaper = Arc::clone(self);
        std::thread::Builder::new()
            .name("reaper".to_owned())
            .stack_size(64 * 1024)
            .spawn(move || reaper.collect_orphans())?;
        Ok(())
    }

    /// Runs `spawn` and owns the child that it returns. No orphan is collected meanwhile, so the
    /// child can't be taken for one, however early it ends.
    pub fn spawn<E>(&self, spawn: impl FnOnce() -> Result<i32, E>) -> Result<i32, E> {
        let mut owned = self.owned();
        let result = spawn();
        if let Ok(pid) = &result {
            owned.insert(*pid);
        }
        drop(owned);
        self.changed.notify_all();
        result
    }

    /// Gives up a child whose status has been collected.
    pub fn release(&self, pid: i32) {
        self.owned().remove(&pid);
        self.changed.notify_all();
    }

    fn owned(&self) -> MutexGuard<'_, HashSet<i32>> {
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, HashSet<i32>>) -> MutexGuard<'a, HashSet<i32>> {
        self.changed
            .wait(guard)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn collect_orphans(&self) {
        loop {
            match sys::peek_ended_child() {
                Ok(pid) => {
                    let mut owned = self.owned();
                    if !owned.contains(&pid) {
                        sys::collect_child(pid);
                    }
                    // Its session collects it and says so; until then each peek would find it again.
                    while owned.contains(&pid) {
                        owned = self.wait(owned);
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // No children at all, and only a spawn can change that. One that came between the
                // peek and here is in the set.
                Err(_) => {
                    let owned = self.owned();
                    if owned.is_empty() {
                        drop(self.wait(owned));
                    }
                }
            }
        }
    }
}
