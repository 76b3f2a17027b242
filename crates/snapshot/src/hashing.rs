//! Hashing what is written, on a second thread when there is much of it.
//!
//! ```text
//!   writer ── full buffers ──▶ hasher
//!      ▲                         │
//!      └──── empty buffers ◀─────┘
//! ```

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use skerry_oci::Hasher;

use crate::Digest;

/// What is collected before it is written and hashed; several fit the cache.
pub(crate) const BUFFER: usize = 256 << 10;
/// A thread isn't worth its start for less.
const BESIDE_FROM: usize = 4 * BUFFER;
/// Buffers that wait to be hashed.
const WAITING: usize = 4;

/// The digest of bytes to come.
pub(crate) struct Hashing {
    hasher: Hasher,
    beside: Option<Beside>,
    taken: usize,
}

/// A thread that goes on with a hash.
struct Beside {
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
    thread: JoinHandle<Hasher>,
}

impl Beside {
    fn start(hasher: &Hasher) -> Option<Self> {
        let (full, waiting) = sync_channel(WAITING);
        let (done, empty) = channel();
        let hasher = hasher.clone();
        let thread = std::thread::Builder::new().name("snapshot hash".to_owned());
        let thread = thread.spawn(move || go_on(hasher, &waiting, &done)).ok()?;
        Some(Beside {
            full,
            empty,
            thread,
        })
    }
}

fn go_on(mut hasher: Hasher, full: &Receiver<Vec<u8>>, empty: &Sender<Vec<u8>>) -> Hasher {
    for mut buffer in full {
        hasher.update(&buffer);
        buffer.clear();
        // The writer is done when it no longer listens.
        let _ = empty.send(buffer);
    }
    hasher
}

impl Hashing {
    pub(crate) fn new() -> Self {
        Hashing {
            hasher: Hasher::default(),
            beside: None,
            taken: 0,
        }
    }

    /// Takes a buffer of bytes; gives an empty one.
    pub(crate) fn take(&mut self, mut buffer: Vec<u8>) -> Vec<u8> {
        self.taken = self.taken.saturating_add(buffer.len());
        if self.beside.is_none() && self.taken >= BESIDE_FROM {
            self.beside = Beside::start(&self.hasher);
        }
        let Some(beside) = &self.beside else {
            self.hasher.update(&buffer);
            buffer.clear();
            return buffer;
        };
        if beside.full.send(buffer).is_err() {
            unreachable!("the hasher listens as long as it can be sent to");
        }
        let empty = beside.empty.try_recv();
        empty.unwrap_or_else(|_| Vec::with_capacity(BUFFER))
    }

    pub(crate) fn finish(self) -> Digest {
        let Some(Beside { full, thread, .. }) = self.beside else {
            return self.hasher.finish();
        };
        drop(full);
        match thread.join() {
            Ok(hasher) => hasher.finish(),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_that_of_all_bytes() {
        let bytes: Vec<u8> = (0..BESIDE_FROM * 5).map(|n| ((n * n) >> 7) as u8).collect();
        for len in [0, 1, BUFFER, BESIDE_FROM - 1, BESIDE_FROM, bytes.len()] {
            let mut hashing = Hashing::new();
            let mut buffer = Vec::new();
            for part in bytes[..len].chunks(BUFFER - 9) {
                buffer.extend_from_slice(part);
                buffer = hashing.take(buffer);
                assert!(buffer.is_empty());
            }
            assert_eq!(hashing.beside.is_some(), len >= BESIDE_FROM);
            assert_eq!(hashing.finish(), Digest::of(&bytes[..len]));
        }
        // One that isn't finished ends its thread.
        let mut hashing = Hashing::new();
        hashing.take(bytes);
    }
}
