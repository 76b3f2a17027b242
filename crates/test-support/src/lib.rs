//! What the tests of several crates share: random numbers that repeat, and the short form of
//! fuzzing. Only ever a development dependency.
//!
//! ```text
//!   seeds ──▶ mutate ──▶ target (a body of `fuzz/`, kept in the crate that it is about)
//!     ▲          ▲
//!   a test    Random
//! ```

use std::time::{Duration, Instant};

/// xorshift64*: the same numbers each time.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Numbers that depend on a seed.
    pub fn new(seed: u64) -> Self {
        // Zero is where it would stay for ever; and near seeds begin apart.
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `below`; zero when there is none.
    pub fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below.max(1)
    }

    /// Any bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next(256) as u8).collect()
    }
}

/// Changes bytes in a few places, as damage and malice would. `tokens` are bytes that mean
/// something in the format.
pub fn mutate(random: &mut Random, bytes: &mut Vec<u8>, tokens: &[u8]) {
    const BLOCK: usize = 512;
    for _ in 0..=random.next(5) {
        let (len, at) = (bytes.len(), random.next(bytes.len()));
        match random.next(8) {
            0 if len > 0 => bytes[at] = random.next(256) as u8,
            1 if len > 0 => bytes[at] ^= 1 << random.next(8),
            2 if random.next(2) == 0 => bytes.truncate(at),
            // A part is there twice, or in place of what followed.
            3 => {
                let part: Vec<u8> = bytes[at..].iter().take(300).copied().collect();
                let to = random.next(len);
                bytes.splice(to..to, part);
            }
            4 => {
                let part: Vec<u8> = bytes[at..].iter().take(2048).copied().collect();
                bytes.truncate(random.next(len));
                bytes.extend(part);
            }
            // Whole blocks change places.
            5 if len > BLOCK => {
                let mut block = || random.next(len / BLOCK) * BLOCK;
                let (one, two) = (block(), block());
                (0..BLOCK).for_each(|i| bytes.swap(one + i, two + i));
            }
            _ if len > 0 && !tokens.is_empty() => bytes[at] = tokens[random.next(tokens.len())],
            _ => {}
        }
    }
}

/// Runs `target` on each seed, and for `time` on changed ones.
pub fn fuzz_briefly(seeds: &[Vec<u8>], tokens: &[u8], time: Duration, target: impl Fn(&[u8])) {
    let mut random = Random::new(0x5eed);
    let start = Instant::now();
    seeds.iter().for_each(|seed| target(seed));
    while start.elapsed() < time {
        let mut bytes = seeds[random.next(seeds.len())].clone();
        mutate(&mut random, &mut bytes, tokens);
        target(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_each_time_and_never_out_of_bounds() {
        for len in [0, 1, 3, 511, 512, 513, 5000] {
            let run = || {
                let mut random = Random::new(7);
                let whole = random.bytes(len);
                let mut changed = 0;
                for _ in 0..2000 {
                    let mut bytes = whole.clone();
                    mutate(&mut random, &mut bytes, b"{}");
                    changed += usize::from(bytes != whole);
                }
                (changed, random.next(usize::MAX))
            };
            assert_eq!(run(), run());
            assert!(len < 3 || run().0 > 1000);
        }
        let mut zero = Random::new(0);
        assert!((0..20).any(|_| zero.next(1 << 20) != 0));
    }
}
