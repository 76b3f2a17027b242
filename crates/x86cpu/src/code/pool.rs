//! Memory that processors take turns with, where each is to have little of its own.

use std::sync::{Mutex, PoisonError};

/// Pieces that are kept at a time: as many threads as usually need one at once.
const KEPT: usize = 8;

/// Pieces that nobody uses now.
pub(crate) struct Pool<T>(Mutex<Vec<T>>);

impl<T> Pool<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// A piece that somebody gave.
    pub(crate) fn take(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    /// Lets others have a piece.
    pub(crate) fn give(&self, piece: T) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(piece);
        }
    }
}
