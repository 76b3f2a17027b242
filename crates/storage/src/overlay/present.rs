//! Which clusters the top file of an overlay has.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::layer::CLUSTER_SIZE;

const WORD: u64 = u64::BITS as u64;
/// Clusters that share a lock and the memory for their bits: 32 MiB of the disk. Little in tests,
/// which look at all bytes of several zones.
const ZONE_CLUSTERS: u64 = if cfg!(test) { 256 } else { 8192 };
/// The bytes of these.
pub(super) const ZONE_SIZE: u64 = ZONE_CLUSTERS * CLUSTER_SIZE;
const ZONE_WORDS: usize = (ZONE_CLUSTERS / WORD) as usize;

/// A part of the disk that something was written to.
pub(super) struct Zone {
    /// Held shared by who writes whole clusters or to clusters that are present, alone by who
    /// copies clusters up or takes them away: a copy must not undo a write that went on beside it.
    pub(super) lock: RwLock<()>,
    words: [AtomicU64; ZONE_WORDS],
}

impl Zone {
    fn new() -> Box<Self> {
        Box::new(Zone {
            lock: RwLock::new(()),
            words: [const { AtomicU64::new(0) }; ZONE_WORDS],
        })
    }

    /// The words and bits of a range of clusters of the disk that lie in one zone.
    fn bits(&self, clusters: Range<u64>) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let from = clusters.start % ZONE_CLUSTERS;
        let to = from + (clusters.end - clusters.start);
        let words = (from / WORD) as usize..to.div_ceil(WORD) as usize;
        let first = from / WORD * WORD;
        let words = self.words.get(words).unwrap_or(&[]).iter();
        words
            .zip((first..).step_by(WORD as usize))
            .map(move |(word, base)| {
                let low = from.saturating_sub(base).min(WORD);
                let high = (to - base).min(WORD);
                (word, ones(high) & !ones(low))
            })
    }

    /// A range of whole clusters, in bytes of the disk, is there from now on.
    pub(super) fn set(&self, range: Range<u64>) {
        for (word, bits) in self.bits(clusters(&range)) {
            word.fetch_or(bits, Ordering::Release);
        }
    }

    /// Whether all clusters of a range are there.
    pub(super) fn has_all(&self, range: &Range<u64>) -> bool {
        let mut bits = self.bits(clusters(range));
        bits.all(|(word, bits)| word.load(Ordering::Acquire) & bits == bits)
    }

    /// The bits of a range of clusters and of their neighbours, as bytes with the lowest bit first,
    /// and the number of the first byte, counted from the beginning of the disk.
    pub(super) fn bytes(&self, range: &Range<u64>) -> (u64, Vec<u8>) {
        let clusters = clusters(range);
        let words = self.bits(clusters.clone());
        let bytes = words.flat_map(|(word, _)| word.load(Ordering::Acquire).to_le_bytes());
        (clusters.start / WORD * (WORD / 8), bytes.collect())
    }

    /// A range of whole clusters is no longer there.
    pub(super) fn clear(&self, range: Range<u64>) {
        for (word, bits) in self.bits(clusters(&range)) {
            word.fetch_and(!bits, Ordering::Release);
        }
    }

    /// Whether the cluster that holds byte `at` of the disk is there.
    pub(super) fn has(&self, at: u64) -> bool {
        let cluster = at / CLUSTER_SIZE;
        let mut bits = self.bits(cluster..cluster + 1);
        bits.any(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }
}

/// The lowest `n` bits.
fn ones(n: u64) -> u64 {
    match n {
        WORD.. => u64::MAX,
        n => (1 << n) - 1,
    }
}

fn clusters(range: &Range<u64>) -> Range<u64> {
    range.start / CLUSTER_SIZE..range.end.div_ceil(CLUSTER_SIZE)
}

/// All zones of a disk. Untouched ones take a few bytes each.
pub(super) struct Present {
    zones: Box<[OnceLock<Box<Zone>>]>,
}

impl Present {
    pub(super) fn new(size: u64) -> Self {
        let zones = (0..size.div_ceil(ZONE_SIZE)).map(|_| OnceLock::new());
        Present {
            zones: zones.collect(),
        }
    }

    /// The zone of a byte of the disk, if anything was ever written there.
    pub(super) fn touched(&self, at: u64) -> Option<&Zone> {
        let zone = self.zones.get((at / ZONE_SIZE) as usize)?.get()?;
        Some(zone)
    }

    /// The zone of a byte of the disk; None beyond its end.
    pub(super) fn zone(&self, at: u64) -> Option<&Zone> {
        let zone = self.zones.get((at / ZONE_SIZE) as usize)?;
        Some(zone.get_or_init(Zone::new))
    }

    /// The first part of a range that is there as a whole or not at all, and whether it is.
    pub(super) fn first_part(&self, range: Range<u64>) -> (bool, Range<u64>) {
        let end = range.end.min((range.start / ZONE_SIZE + 1) * ZONE_SIZE);
        let Some(zone) = self.touched(range.start) else {
            return (false, range.start..end);
        };
        let there = zone.has(range.start);
        let clusters = clusters(&(range.start..end));
        // Word by word: the first bit that differs ends the part.
        for (n, (word, bits)) in zone.bits(clusters.clone()).enumerate() {
            let word = word.load(Ordering::Acquire);
            let differ = bits & if there { !word } else { word };
            if differ != 0 {
                let base = clusters.start / WORD * WORD + n as u64 * WORD;
                let stop = (base + u64::from(differ.trailing_zeros())) * CLUSTER_SIZE;
                // A bit that changed since it was looked at first is part of the answer.
                let stop = stop.max(range.start + 1).next_multiple_of(CLUSTER_SIZE);
                return (there, range.start..stop.min(end));
            }
        }
        (there, range.start..end)
    }

    /// All that is there, in bytes.
    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (number, zone) in self.zones.iter().enumerate() {
            let Some(zone) = zone.get() else { continue };
            for (n, word) in zone.words.iter().enumerate() {
                let first = number as u64 * ZONE_CLUSTERS + n as u64 * WORD;
                let mut word = word.load(Ordering::Acquire);
                while word != 0 {
                    let from = u64::from(word.trailing_zeros());
                    let len = u64::from((word >> from).trailing_ones());
                    word &= !(ones(len) << from);
                    let (start, end) = (first + from, first + from + len);
                    match ranges.last_mut() {
                        Some(last) if last.end == start * CLUSTER_SIZE => {
                            last.end = end * CLUSTER_SIZE;
                        }
                        _ => ranges.push(start * CLUSTER_SIZE..end * CLUSTER_SIZE),
                    }
                }
            }
        }
        ranges
    }

    /// Forgets everything.
    pub(super) fn reset(&mut self) {
        for zone in &mut self.zones {
            zone.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: u64 = CLUSTER_SIZE;

    #[test]
    fn bits_at_the_edges_of_words_and_zones() {
        let present = Present::new(3 * ZONE_SIZE);
        assert!(present.ranges().is_empty() && present.zone(3 * ZONE_SIZE).is_none());
        const Z: u64 = ZONE_CLUSTERS;
        for range in [0..1, 63..65, 128..192, Z - 2..Z, Z..Z + 1, 3 * Z - 1..3 * Z] {
            let bytes = range.start * C..range.end * C;
            present.zone(bytes.start).unwrap().set(bytes);
        }
        let clusters = |present: &Present| {
            let ranges = present.ranges();
            ranges
                .iter()
                .map(|r| r.start / C..r.end / C)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            clusters(&present),
            [0..1, 63..65, 128..192, Z - 2..Z + 1, 3 * Z - 1..3 * Z]
        );
        present.zone(0).unwrap().clear(64 * C..130 * C);
        assert_eq!(
            clusters(&present),
            [0..1, 63..64, 130..192, Z - 2..Z + 1, 3 * Z - 1..3 * Z]
        );
        assert_eq!(present.first_part(5..9 * C), (true, 5..C));
        assert_eq!(present.first_part(C + 7..99 * C), (false, C + 7..63 * C));
        assert_eq!(
            present.first_part(131 * C..133 * C),
            (true, 131 * C..133 * C)
        );
        assert_eq!(
            present.first_part(131 * C..250 * C),
            (true, 131 * C..192 * C)
        );
        // Not beyond the zone, which has an own lock.
        assert_eq!(
            present.first_part((Z - 1) * C..(Z + 1) * C),
            (true, (Z - 1) * C..Z * C)
        );
        assert_eq!(
            present.first_part(2 * ZONE_SIZE - 7..3 * ZONE_SIZE),
            (false, 2 * ZONE_SIZE - 7..2 * ZONE_SIZE)
        );
    }

    #[test]
    fn every_range_of_a_small_disk() {
        for from in (0..200).step_by(7) {
            for to in (from + 1..=200).step_by(11) {
                let mut present = Present::new(200 * C);
                let zone = present.zone(0).unwrap();
                zone.set(from * C..to * C);
                for cluster in 0..200 {
                    assert_eq!(zone.has(cluster * C + 9), (from..to).contains(&cluster));
                }
                let range = from * C..to * C;
                assert_eq!(present.ranges(), std::slice::from_ref(&range));
                present.reset();
                assert!(present.ranges().is_empty());
            }
        }
    }
}
