//! From a place in the code to what belongs to it.

/// Bytes of code between two entries of the directory, as a power of two: a few calls.
const SHIFT: u32 = 8;

/// Things that have a place in the code, in its order.
pub(super) struct Places<T> {
    all: Vec<T>,
    /// For each so many bytes of code: how many things are before them.
    before: Vec<u32>,
}

/// Something at a place: right behind it the code goes on.
pub(super) trait Placed {
    fn place(&self) -> u32;
}

impl<T: Placed> Places<T> {
    pub(super) const fn new() -> Self {
        Self {
            all: Vec::new(),
            before: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Bytes that it takes.
    pub(super) fn used(&self) -> usize {
        self.all.len() * size_of::<T>() + self.before.len() * size_of::<u32>()
    }

    pub(super) fn get(&self, number: u32) -> Option<&T> {
        self.all.get(number as usize)
    }

    /// Adds what comes behind all others.
    pub(super) fn push(&mut self, thing: T) {
        let stretch = (thing.place() >> SHIFT) as usize;
        if self.before.len() <= stretch {
            self.before.resize(stretch + 1, self.all.len() as u32);
        }
        self.all.push(thing);
    }

    /// The number of what is at a place.
    pub(super) fn at(&self, place: u32) -> Option<u32> {
        let from = *self.before.get((place >> SHIFT) as usize)?;
        for (number, thing) in (from..).zip(self.all.get(from as usize..)?) {
            if thing.place() >= place {
                return (thing.place() == place).then_some(number);
            }
        }
        None
    }

    pub(super) fn clear(&mut self) {
        self.all.clear();
        self.before.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Placed for u32 {
        fn place(&self) -> u32 {
            *self
        }
    }

    #[test]
    fn what_was_put_somewhere_is_found_there_and_nowhere_else() {
        let mut places = Places::new();
        let put = [3, 4, 511, 512, 513, 1024, 5000, 5119, 5120, 90_000];
        for place in put {
            places.push(place);
        }
        for place in 0..100_000 {
            let number = put.iter().position(|&p| p == place);
            assert_eq!(places.at(place), number.map(|n| n as u32), "{place}");
        }
        places.clear();
        assert_eq!(places.at(3), None);
    }
}
