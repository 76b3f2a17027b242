//! Which pages of a slot the guest wrote: a bit for each, and a bit for each word of those that may
//! have any, so that a few pages among many are found without a look at all words.

use std::sync::atomic::{AtomicU64, Ordering};

/// The log of one slot.
///
/// A page's own bit is set before that of its word, and the word's is taken before its pages' are: what
/// is logged while the log is taken is either taken or found the next time.
pub(super) struct DirtyLog {
    pages: Box<[AtomicU64]>,
    /// Bit per word of `pages` that may not be zero.
    words: Box<[AtomicU64]>,
}

impl std::fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyLog")
            .field("words", &self.pages.len())
            .finish_non_exhaustive()
    }
}

fn zeros(bits: usize) -> Box<[AtomicU64]> {
    (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

impl DirtyLog {
    /// An empty one for so many pages.
    pub(super) fn new(pages: usize) -> Self {
        let pages = zeros(pages);
        let words = zeros(pages.len());
        Self { pages, words }
    }

    /// Logs a page; one that is none of the slot's is nothing.
    pub(super) fn add(&self, page: usize) {
        let bit = 1 << (page % 64);
        if let Some(pages) = self.pages.get(page / 64)
            && pages.load(Ordering::Relaxed) & bit == 0
        {
            pages.fetch_or(bit, Ordering::SeqCst);
            let word = page / 64;
            self.words[word / 64].fetch_or(1 << (word % 64), Ordering::SeqCst);
        }
    }

    /// Takes and clears what is logged, word by word, ascending; words of none are left out.
    pub(super) fn take(&self, mut each: impl FnMut(usize, u64)) {
        for (n, words) in self.words.iter().enumerate() {
            if words.load(Ordering::Relaxed) == 0 {
                continue;
            }
            for bit in bits(words.swap(0, Ordering::SeqCst)) {
                let word = n * 64 + bit as usize;
                let taken = self
                    .pages
                    .get(word)
                    .map_or(0, |p| p.swap(0, Ordering::SeqCst));
                if taken != 0 {
                    each(word, taken);
                }
            }
        }
    }

    /// Words that [`DirtyLog::take`] may name.
    pub(super) fn words(&self) -> usize {
        self.pages.len()
    }
}

/// The numbers of the bits that are set, ascending.
pub(super) fn bits(mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| word.trailing_zeros())?;
        word &= word - 1;
        Some(bit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(log: &DirtyLog) -> Vec<usize> {
        let mut pages = Vec::new();
        log.take(|word, taken| pages.extend(bits(taken).map(|bit| word * 64 + bit as usize)));
        pages
    }

    #[test]
    fn pages_are_taken_once_and_in_order() {
        let log = DirtyLog::new(64 * 64 * 3 + 1);
        assert_eq!(take(&log), [0; 0]);
        let pages = [0, 63, 64, 4095, 4096, 8191, 12287, 12288];
        for page in pages.iter().rev() {
            log.add(*page);
            log.add(*page);
        }
        log.add(64 * 64 * 4);
        assert_eq!(take(&log), pages);
        assert_eq!(take(&log), [0; 0]);
        log.add(4096);
        assert_eq!(take(&log), [4096]);
    }

    #[test]
    fn nothing_is_lost_that_is_logged_while_the_log_is_taken() {
        let log = DirtyLog::new(1 << 14);
        let mut found = vec![0_u32; 1 << 14];
        std::thread::scope(|scope| {
            for half in 0..2 {
                let log = &log;
                scope.spawn(move || (half..1 << 14).step_by(2).for_each(|page| log.add(page)));
            }
            for _ in 0..100 {
                log.take(|word, taken| {
                    bits(taken).for_each(|b| found[word * 64 + b as usize] += 1)
                });
            }
        });
        log.take(|word, taken| bits(taken).for_each(|b| found[word * 64 + b as usize] += 1));
        assert!(found.iter().all(|&times| times == 1));
    }
}
