//! A bounded ring of bytes that grows as it is used.

/// Bytes in order of arrival, at most `limit` of them.
#[derive(Debug)]
pub(super) struct ByteRing {
    storage: Box<[u8]>,
    head: usize,
    len: usize,
    limit: usize,
}

/// The first allocation; most connections never need more.
const FIRST: usize = 4096;

impl ByteRing {
    /// An empty ring that takes up to `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            storage: Box::default(),
            head: 0,
            len: 0,
            limit,
        }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) const fn room(&self) -> usize {
        self.limit - self.len
    }

    /// Makes the storage hold `want` bytes, within the limit.
    fn grow(&mut self, want: usize) {
        if want <= self.storage.len() {
            return;
        }
        let size = want.next_power_of_two().max(FIRST).min(self.limit);
        let mut storage = vec![0; size].into_boxed_slice();
        let (first, second) = self.filled();
        storage[..first.len()].copy_from_slice(first);
        storage[first.len()..self.len].copy_from_slice(second);
        self.storage = storage;
        self.head = 0;
    }

    /// The bytes in order, in two pieces.
    pub(super) fn filled(&self) -> (&[u8], &[u8]) {
        let end = self.head + self.len;
        if end <= self.storage.len() {
            (&self.storage[self.head..end], &[])
        } else {
            (
                &self.storage[self.head..],
                &self.storage[..end - self.storage.len()],
            )
        }
    }

    /// Appends `len` bytes that `fill` provides piece by piece. `len` must fit the room; if `fill` fails
    /// nothing is appended.
    pub(super) fn append_with<E>(
        &mut self,
        len: usize,
        mut fill: impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let len = len.min(self.room());
        self.grow(self.len + len);
        let size = self.storage.len();
        if len == 0 {
            return Ok(());
        }
        let start = (self.head + self.len) % size;
        let first = len.min(size - start);
        fill(&mut self.storage[start..start + first])?;
        if first < len {
            fill(&mut self.storage[..len - first])?;
        }
        self.len += len;
        Ok(())
    }

    /// Appends as much of `data` as there is room for; returns how much.
    pub(super) fn push(&mut self, data: &[u8]) -> usize {
        let len = data.len().min(self.room());
        let mut rest = &data[..len];
        let done: Result<(), std::convert::Infallible> = self.append_with(len, |part| {
            let (now, later) = rest.split_at(part.len());
            part.copy_from_slice(now);
            rest = later;
            Ok(())
        });
        let Ok(()) = done;
        len
    }

    /// Forgets the first `len` bytes.
    pub(super) fn consume(&mut self, len: usize) {
        let len = len.min(self.len);
        self.len -= len;
        self.head = if self.len == 0 {
            0
        } else {
            (self.head + len) % self.storage.len()
        };
    }

    /// Moves the first bytes into `out`; returns how many.
    pub(super) fn pop(&mut self, out: &mut [u8]) -> usize {
        let len = out.len().min(self.len);
        let (first, second) = self.filled();
        let from_first = first.len().min(len);
        out[..from_first].copy_from_slice(&first[..from_first]);
        out[from_first..len].copy_from_slice(&second[..len - from_first]);
        self.consume(len);
        len
    }

    /// Forgets everything and gives the storage back.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn behaves_like_a_bounded_deque(
            ops in proptest::collection::vec((any::<bool>(), 0usize..6000), 1..100),
        ) {
            let limit = 10_000;
            let mut ring = ByteRing::new(limit);
            let mut model = VecDeque::<u8>::new();
            let mut next = 0u8;
            for (push, len) in ops {
                if push {
                    let data: Vec<u8> =
                        (0..len).map(|_| { next = next.wrapping_add(1); next }).collect();
                    let taken = ring.push(&data);
                    prop_assert_eq!(taken, len.min(limit - model.len()));
                    model.extend(&data[..taken]);
                } else {
                    let mut out = vec![0; len];
                    let got = ring.pop(&mut out);
                    prop_assert_eq!(got, len.min(model.len()));
                    prop_assert!(out[..got].iter().copied().eq(model.drain(..got)));
                }
                prop_assert_eq!(ring.len(), model.len());
            }
        }
    }
}
