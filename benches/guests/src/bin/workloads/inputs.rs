//! What workloads read: made here, the same every time, in memory, and not counted.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use crate::list::Settings;

/// A workload's input.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// `/tmp/text`: lines of words, 64 MiB.
    Text,
    /// `/tmp/source.c`: functions with loops, structures and switches; and `/tmp/small.c`.
    Source,
}

const TEXT_BYTES: u64 = 64 << 20;
const FUNCTIONS: u64 = 50;

/// Makes it, unless it is there.
pub fn make(input: Input, settings: &Settings) -> io::Result<()> {
    match input {
        Input::Text => once("/tmp/text", || text(settings.scaled(TEXT_BYTES) as usize)),
        Input::Source => {
            once("/tmp/small.c", || source(1).into_bytes())?;
            once("/tmp/source.c", || {
                source(settings.scaled(FUNCTIONS)).into_bytes()
            })
        }
    }
}

fn once(path: &str, bytes: impl FnOnce() -> Vec<u8>) -> io::Result<()> {
    if Path::new(path).exists() {
        return Ok(());
    }
    fs::write(path, bytes())
}

/// FNV-1a.
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, |hash, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (hash ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Marsaglia's xorshift64.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// `length` bytes of lines of words, some often and most seldom, as in a language.
fn text(length: usize) -> Vec<u8> {
    const SYLLABLES: [&str; 16] = [
        "ka", "zu", "ma", "ri", "to", "len", "sha", "po", "dir", "est", "a", "o", "ing", "pre",
        "qui", "ber",
    ];
    let mut random = Random::new(0x9e37_79b9_7f4a_7c15);
    let words: Vec<String> = (0..4096)
        .map(|_| {
            let mut bits = random.next();
            let mut word = String::new();
            for _ in 0..1 + bits % 4 {
                bits >>= 4;
                word.push_str(SYLLABLES[(bits % 16) as usize]);
            }
            word
        })
        .collect();
    let mut text = Vec::with_capacity(length + 256);
    while text.len() < length {
        let bits = random.next();
        for word in 0..4 + bits % 8 {
            if word > 0 {
                text.push(b' ');
            }
            let bits = random.next();
            // The product of two numbers below 64 prefers small ones.
            let index = (bits % 64) * (bits >> 8 & 63);
            text.extend_from_slice(words[index as usize].as_bytes());
        }
        text.push(b'\n');
    }
    text.truncate(length - 1);
    text.push(b'\n');
    text
}

/// C, of `functions` functions.
fn source(functions: u64) -> String {
    let mut random = Random::new(0x2545_f491_4f6c_dd1d);
    let mut text = String::from(
        "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n\n\
         struct item { struct item *next; long key, value; double weight; char name[24]; };\n\n",
    );
    for n in 0..functions {
        let mut pick = |below: u64| random.next() % below;
        let (a, b, c) = (pick(90) + 3, pick(900) + 7, pick(30) + 2);
        write!(
            text,
            "static long cases_{n}(struct item *i, long x)\n{{\n    switch (x % {c}) {{\n"
        )
        .ok();
        for case in 0..c.min(12) {
            let value = pick(10_000);
            writeln!(
                text,
                "    case {case}: i->value = x * {value} + i->key; i->weight *= {value}.5; break;"
            )
            .ok();
        }
        write!(
            text,
            "    default: i->key ^= x >> {};\n    }}\n    return i->value - x;\n}}\n\n\
             long run_{n}(struct item *list, long count, double *out)\n{{\n\
             \x20   long sum = {b};\n    char name[32];\n\
             \x20   for (struct item *i = list; i; i = i->next) {{\n\
             \x20       for (long k = 0; k < count % {a}; k++) {{\n\
             \x20           sum += cases_{n}(i, k * {b} + sum) & 0x{b:x}fff;\n\
             \x20           out[k % 16] += i->weight * (double)k / (1.0 + (double)sum);\n\
             \x20           if (sum % {a} == {c}) {{ i->key += k; continue; }}\n\
             \x20           if (sum < 0) sum = -sum;\n        }}\n\
             \x20       snprintf(name, sizeof name, \"item %ld of {n}\", i->key);\n\
             \x20       if (strcmp(name, i->name) > 0) memcpy(i->name, name, sizeof i->name - 1);\n\
             \x20   }}\n    return sum;\n}}\n\n",
            pick(13) + 1
        )
        .ok();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_its_length_and_is_the_same_each_time() {
        let made = text(10_000);
        assert_eq!(made.len(), 10_000);
        assert_eq!(made.last(), Some(&b'\n'));
        assert_eq!(checksum(&made), checksum(&text(10_000)));
        assert!(made.iter().filter(|b| **b == b'\n').count() > 100);
    }

    #[test]
    fn a_checksum_sees_every_byte() {
        assert_ne!(checksum(b"0123456789"), checksum(b"0123456788"));
        assert_ne!(checksum(b"01234567x"), checksum(b"01234567y"));
    }
}
