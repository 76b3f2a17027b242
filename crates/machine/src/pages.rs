//! Sets of guest pages.

use std::fmt;
use std::ops::Range;

/// A set of pages of guest memory, each by its number, counted without the holes in the guest's
/// address space: page 0 lies at [`SavedRun::at`](crate::SavedRun::at) 0.
#[derive(Clone, Default)]
pub struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// An empty set with room for the pages below `pages`.
    pub fn new(pages: u64) -> Self {
        Self {
            words: vec![0; pages.div_ceil(64) as usize],
        }
    }

    /// Adds `range`, as far as there is room for it.
    pub fn insert(&mut self, range: Range<u64>) {
        self.apply(range, |word, mask| *word |= mask);
    }

    /// Takes `range` out.
    pub fn remove(&mut self, range: Range<u64>) {
        self.apply(range, |word, mask| *word &= !mask);
    }

    fn apply(&mut self, range: Range<u64>, act: impl Fn(&mut u64, u64)) {
        let end = range.end.min(self.words.len() as u64 * 64);
        let mut at = range.start;
        while at < end {
            let next = ((at / 64 + 1) * 64).min(end);
            // Between one and 64 pages of one word.
            let mask = (u64::MAX >> (64 - (next - at))) << (at % 64);
            if let Some(word) = self.words.get_mut((at / 64) as usize) {
                act(word, mask);
            }
            at = next;
        }
    }

    /// Adds the pages whose bits are set in `words`, the first of which belongs to page `first`.
    pub(crate) fn insert_words(&mut self, first: u64, words: &[u64]) {
        let shift = first % 64;
        for (at, word) in (first / 64..).zip(words) {
            let parts = [
                (at, word << shift),
                (at + 1, word.checked_shr(64 - shift as u32).unwrap_or(0)),
            ];
            for (at, bits) in parts {
                if let Some(word) = self.words.get_mut(at as usize) {
                    *word |= bits;
                }
            }
        }
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        let word = self.words.get((page / 64) as usize);
        word.is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// How many pages there are.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Takes every page out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds every page of `other`.
    pub fn union(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
    }

    /// Keeps the pages that are also in `other`.
    pub fn intersect(&mut self, other: &Self) {
        let others = other.words.iter().chain(std::iter::repeat(&0));
        for (word, other) in self.words.iter_mut().zip(others) {
            *word &= other;
        }
    }

    /// Takes out the pages that are in `other`.
    pub fn subtract(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
    }

    /// The set as ranges of consecutive pages, ascending, as few as there can be.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, 0)?;
            let end = self
                .next(start, u64::MAX)
                .unwrap_or(self.words.len() as u64 * 64);
            at = end;
            Some(start..end)
        })
    }

    /// The first page from `at` on whose bit is set in the words, each XORed with `flip`.
    fn next(&self, at: u64, flip: u64) -> Option<u64> {
        let first = (at / 64) as usize;
        let mut mask = u64::MAX << (at % 64);
        for (n, word) in self.words.iter().enumerate().skip(first) {
            let found = (word ^ flip) & mask;
            if found != 0 {
                return Some(n as u64 * 64 + u64::from(found.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }

    /// A larger set in fewer runs: gaps of at most `max_gap` pages are filled, and then the
    /// smallest of those that are left until there are at most `max_runs` runs.
    ///
    /// A run that is mapped from a file takes a mapping of the host, of which a process has 65530
    /// by default, and a page fault takes longer the more there are; a page that is saved or mapped
    /// needlessly takes 4 KiB of a file that may be shared. [`PageSet::GAP`] and [`PageSet::RUNS`]
    /// weigh these up.
    #[must_use]
    pub fn coalesce(&self, max_gap: u64, max_runs: usize) -> Self {
        let runs: Vec<_> = self.runs().collect();
        let gap = |pair: &[Range<u64>]| match pair {
            [left, right] => right.start - left.end,
            _ => 0,
        };
        let mut gaps: Vec<u64> = runs.windows(2).map(gap).collect();
        gaps.sort_unstable_by(|a, b| b.cmp(a));
        // What is as large as the first gap that must go goes too: there may be more of its size.
        let excess = gaps.get(max_runs.max(1) - 1).copied().unwrap_or(0);
        let mut wider = self.clone();
        for pair in runs.windows(2) {
            if let [left, right] = pair
                && gap(pair) <= max_gap.max(excess)
            {
                wider.insert(left.end..right.start);
            }
        }
        wider
    }

    /// A sensible gap for [`PageSet::coalesce`]: 32 KiB.
    pub const GAP: u64 = 8;
    /// A sensible number of runs for [`PageSet::coalesce`].
    pub const RUNS: usize = 2048;
}

impl PartialEq for PageSet {
    /// Sets are equal that have the same pages, whatever they have room for.
    fn eq(&self, other: &Self) -> bool {
        let len = self.words.len().max(other.words.len());
        let word = |set: &Self, n: usize| set.words.get(n).copied().unwrap_or(0);
        (0..len).all(|n| word(self, n) == word(other, n))
    }
}

impl Eq for PageSet {}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.runs()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGES: u64 = 300;

    fn set(pages: &BTreeSet<u64>) -> PageSet {
        let mut set = PageSet::new(PAGES);
        pages.iter().for_each(|page| set.insert(*page..page + 1));
        set
    }

    fn pages(set: &PageSet) -> BTreeSet<u64> {
        set.runs().flatten().collect()
    }

    /// Few pages, or nearly all.
    fn any() -> impl Strategy<Value = BTreeSet<u64>> {
        prop_oneof![Just(5_u8), Just(50), Just(95)].prop_flat_map(|share| {
            prop::collection::vec(0..100_u8, PAGES as usize).prop_map(move |dice| {
                (0..)
                    .zip(dice)
                    .filter(|(_, n)| *n < share)
                    .map(|(page, _)| page)
                    .collect()
            })
        })
    }

    proptest! {
        #[test]
        fn does_what_a_set_does(a in any(), b in any(), from in 0..PAGES, len in 0..PAGES) {
            let (one, two) = (set(&a), set(&b));
            prop_assert_eq!(&pages(&one), &a);
            prop_assert_eq!(one.count(), a.len() as u64);
            prop_assert_eq!(one.is_empty(), a.is_empty());
            prop_assert!((0..PAGES + 70).all(|page| one.contains(page) == a.contains(&page)));
            let mut result = one.clone();
            result.union(&two);
            prop_assert_eq!(pages(&result), a.union(&b).copied().collect());
            result = one.clone();
            result.intersect(&two);
            prop_assert_eq!(pages(&result), a.intersection(&b).copied().collect());
            result = one.clone();
            result.subtract(&two);
            prop_assert_eq!(pages(&result), a.difference(&b).copied().collect());
            result = one.clone();
            result.insert(from..from + len);
            let end = (from + len).min(PAGES.next_multiple_of(64));
            let range: BTreeSet<u64> = (from..end).collect();
            prop_assert_eq!(pages(&result), a.union(&range).copied().collect());
            result = one.clone();
            result.remove(from..from + len);
            prop_assert_eq!(pages(&result), a.difference(&range).copied().collect());
            // Words of a log that starts anywhere.
            result = PageSet::new(2 * PAGES);
            result.insert_words(from, &one.words);
            prop_assert_eq!(pages(&result), a.iter().map(|page| page + from).collect());
        }

        #[test]
        fn fewer_runs_hold_all_pages(a in any(), gap in 0..20_u64, most in 1..20_usize) {
            let one = set(&a);
            let wider = one.coalesce(gap, most);
            prop_assert!(pages(&wider).is_superset(&a));
            prop_assert!(wider.runs().count() <= most);
            let runs: Vec<_> = wider.runs().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[1].start - pair[0].end > gap));
            // The ends of runs are pages of the set.
            prop_assert!(runs.iter().all(|run| a.contains(&run.start) && a.contains(&(run.end - 1))));
            prop_assert_eq!(one.coalesce(0, usize::MAX), one);
        }
    }
}
