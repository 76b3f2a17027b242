//! Maps of sparse files: which parts of a file the archive stores.

use super::header::number;
use super::pax::decimal;
use super::{BLOCK, Extent};

/// Areas of GNU's old format: pairs of 12-byte numbers, ended by an empty one.
pub(super) fn push_old(area: &[u8], extents: &mut Vec<Extent>, most: usize) -> Option<()> {
    for pair in area.chunks_exact(24) {
        if pair[0] == 0 && pair[12] == 0 {
            break;
        }
        let field = |bytes| u64::try_from(number(bytes)?).ok();
        if extents.len() >= most {
            return None;
        }
        extents.push(Extent {
            offset: field(&pair[..12])?,
            len: field(&pair[12..])?,
        });
    }
    Some(())
}

/// Whether areas are in order, apart, inside the file, and as long as what is stored.
pub(super) fn is_sound(extents: &[Extent], size: u64, stored: u64) -> bool {
    let mut end = 0u64;
    let mut sum = 0u64;
    for extent in extents {
        let Some(next) = extent.offset.checked_add(extent.len) else {
            return false;
        };
        if extent.offset < end || next > size {
            return false;
        }
        end = next;
        sum += extent.len;
    }
    sum == stored
}

/// The map of format 1.0: decimal lines in front of the data, in whole blocks.
pub(super) struct MapReader {
    line: Vec<u8>,
    count: Option<u64>,
    offset: Option<u64>,
    extents: Vec<Extent>,
    most: usize,
}

impl MapReader {
    pub(super) fn new(most: usize) -> Self {
        MapReader {
            line: Vec::new(),
            count: None,
            offset: None,
            extents: Vec::new(),
            most,
        }
    }

    /// Takes a block; `Some(true)` when the map is whole, `None` when it is no map.
    pub(super) fn block(&mut self, block: &[u8; BLOCK]) -> Option<bool> {
        for byte in block {
            if *byte != b'\n' {
                // The longest number has 20 digits.
                if self.line.len() >= 20 {
                    return None;
                }
                self.line.push(*byte);
                continue;
            }
            let number = decimal(&self.line)?;
            self.line.clear();
            match (self.count, self.offset.take()) {
                (None, _) => {
                    if usize::try_from(number).map_or(true, |n| n > self.most) {
                        return None;
                    }
                    self.count = Some(number);
                }
                (Some(_), None) => self.offset = Some(number),
                (Some(_), Some(offset)) => self.extents.push(Extent {
                    offset,
                    len: number,
                }),
            }
            if self.offset.is_none() && self.count == Some(self.extents.len() as u64) {
                return Some(true);
            }
        }
        Some(false)
    }

    pub(super) fn finish(self) -> Vec<Extent> {
        self.extents
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soundness() {
        let e = |offset, len| Extent { offset, len };
        assert!(is_sound(&[], 10, 0));
        assert!(is_sound(&[e(0, 4), e(4, 2), e(10, 0)], 10, 6));
        assert!(!is_sound(&[e(0, 4)], 10, 5));
        assert!(!is_sound(&[e(0, 4), e(3, 2)], 10, 6));
        assert!(!is_sound(&[e(8, 4)], 10, 4));
        assert!(!is_sound(&[e(u64::MAX, 4)], u64::MAX, 4));
    }

    #[test]
    fn maps_of_one_and_several_blocks() {
        let mut block = [0; BLOCK];
        block[..12].copy_from_slice(b"2\n0\n5\n100\n7\n");
        let mut reader = MapReader::new(8);
        assert_eq!(reader.block(&block), Some(true));
        assert_eq!(
            reader.finish(),
            [
                Extent { offset: 0, len: 5 },
                Extent {
                    offset: 100,
                    len: 7
                }
            ]
        );
        assert_eq!(MapReader::new(1).block(&block), None, "too many");
        block[2] = b'x';
        assert_eq!(MapReader::new(8).block(&block), None);
        let mut none = [0; BLOCK];
        none[..2].copy_from_slice(b"0\n");
        assert_eq!(MapReader::new(1).block(&none), Some(true));
    }
}
