//! Processes that this one started and that outlive it, as far as they do.

use std::process::Child;
use std::sync::Mutex;

/// Started and not known to have ended.
static CHILDREN: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// Collects `child` when it has ended: with the next one that is started, so that no more than a few
/// ended ones ever wait for it.
pub(super) fn reap(child: Child) {
    let mut children = CHILDREN
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    children.push(child);
}
