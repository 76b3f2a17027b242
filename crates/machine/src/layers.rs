//! What guest memory held when the machine began, or was last rebased: which file has which page.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::memory::SavedRun;

/// Bytes of a file.
#[derive(Clone, Debug)]
struct Piece {
    len: u64,
    file: Arc<LayerFile>,
    offset: u64,
}

/// Where a part of the base lies: in a file from an offset on, or nowhere and thus zero.
pub(crate) type Source<'a> = Option<(&'a LayerFile, u64)>;

/// A file that parts of the base lie in.
#[derive(Debug)]
pub(crate) struct LayerFile {
    file: File,
    /// The whole file, to be read without asking the kernel for each page; once anything is copied.
    mapped: OnceLock<Option<MmapRegion>>,
}

impl LayerFile {
    fn new(file: File) -> Arc<Self> {
        Arc::new(Self {
            file,
            mapped: OnceLock::new(),
        })
    }

    fn map(&self) -> Option<MmapRegion> {
        let len = usize::try_from(self.file.metadata().ok()?.len()).ok()?;
        let file = FileOffset::new(self.file.try_clone().ok()?, 0);
        let (read, shared) = (ProtFlags::READ.bits(), MapFlags::SHARED.bits());
        MmapRegion::build(Some(file), len, read.cast_signed(), shared.cast_signed()).ok()
    }

    /// Copies what is at `offset` to `to`, whole.
    pub(crate) fn copy<B: BitmapSlice>(
        &self,
        offset: u64,
        to: &VolatileSlice<'_, B>,
    ) -> io::Result<()> {
        let mapped = self.mapped.get_or_init(|| self.map()).as_ref();
        let from = mapped.and_then(|map| {
            let offset = usize::try_from(offset).ok()?;
            map.get_slice(offset, to.len()).ok()
        });
        if let Some(from) = from {
            from.copy_to_volatile_slice(to.clone());
            return Ok(());
        }
        let mut bytes = vec![0; to.len()];
        self.file.read_exact_at(&mut bytes, offset)?;
        to.copy_from(&bytes);
        Ok(())
    }
}

/// The content that memory goes back to: pieces of files, zero elsewhere. A file that no piece is of
/// any longer is closed.
#[derive(Debug, Default)]
pub(crate) struct Base {
    /// By place in guest memory; disjoint.
    pieces: BTreeMap<u64, Piece>,
    /// Layers that aren't in `pieces` yet: a machine that is never saved or rewound needs no index.
    pending: Vec<(Arc<LayerFile>, Vec<SavedRun>)>,
    layers: usize,
}

impl Base {
    /// Lays `runs` of `file` over what there is.
    pub(crate) fn overlay(&mut self, file: File, runs: Vec<SavedRun>) {
        self.layers += 1;
        self.pending.push((LayerFile::new(file), runs));
    }

    /// Whether anything was ever laid down.
    pub(crate) const fn is_none(&self) -> bool {
        self.layers == 0
    }

    fn index(&mut self) -> &BTreeMap<u64, Piece> {
        for (file, runs) in std::mem::take(&mut self.pending) {
            for run in runs.iter().filter(|run| run.len != 0) {
                self.clear(run.at..run.at.saturating_add(run.len));
                let piece = Piece {
                    len: run.len,
                    file: file.clone(),
                    offset: run.offset,
                };
                self.pieces.insert(run.at, piece);
            }
        }
        &self.pieces
    }

    /// Cuts `range` out of all pieces.
    fn clear(&mut self, range: Range<u64>) {
        // The last piece that starts before may reach into the range, or over all of it.
        let before = self.pieces.range_mut(..range.start).next_back();
        if let Some((at, piece)) = before
            && at + piece.len > range.start
        {
            let end = at + piece.len;
            piece.len = range.start - at;
            let rest = piece.offset + piece.len;
            let file = piece.file.clone();
            if end > range.end {
                let piece = Piece {
                    len: end - range.end,
                    file,
                    offset: rest + (range.end - range.start),
                };
                self.pieces.insert(range.end, piece);
                return;
            }
        }
        while let Some((&at, piece)) = self.pieces.range(range.clone()).next() {
            let mut piece = piece.clone();
            self.pieces.remove(&at);
            let over = range.end - at;
            if piece.len > over {
                piece.len -= over;
                piece.offset += over;
                self.pieces.insert(range.end, piece);
            }
        }
    }

    /// All that files hold, ascending.
    pub(crate) fn runs(&mut self) -> impl Iterator<Item = Range<u64>> {
        self.index().iter().map(|(at, piece)| *at..at + piece.len)
    }

    /// How many separate pieces there are.
    pub(crate) fn len(&mut self) -> usize {
        self.index().len()
    }

    /// Calls `each` with the parts of `range`, ascending, and where each lies.
    pub(crate) fn find<E>(
        &mut self,
        range: Range<u64>,
        mut each: impl FnMut(Range<u64>, Source<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let pieces = self.index();
        let mut at = range.start;
        let before = pieces.range(..=at).next_back().map_or(at, |(at, _)| *at);
        for (&start, piece) in pieces.range(before..range.end.max(before)) {
            let end = (start + piece.len).min(range.end);
            if end <= at {
                continue;
            }
            if start > at {
                each(at..start, None)?;
                at = start;
            }
            let source = (&*piece.file, piece.offset + (at - start));
            each(at..end, Some(source))?;
            at = end;
        }
        if at < range.end {
            each(at..range.end, None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;
    use std::os::unix::fs::FileExt;

    const LEN: usize = 64;

    proptest! {
        /// Bytes stand for pages: which layer each comes from is written into the layers' files.
        #[test]
        fn later_layers_lie_over_earlier_ones(
            layers in prop::collection::vec(
                prop::collection::vec((0..LEN as u64, 1..20_u64), 0..6), 0..6),
            from in 0..LEN as u64,
            len in 0..LEN as u64,
        ) {
            let mut model = [0_u8; 2 * LEN];
            let mut base = Base::default();
            for (layer, runs) in (1..).zip(layers) {
                let file = tempfile::tempfile().unwrap();
                let mut offset = 0;
                let mut saved = Vec::new();
                for (n, (at, len)) in (0_u8..).zip(runs) {
                    let bytes: Vec<u8> = (0..len as u8).map(|i| (layer * 40) ^ (n * 20) ^ i).collect();
                    file.write_all_at(&bytes, offset).unwrap();
                    model[at as usize..(at + len) as usize].copy_from_slice(&bytes);
                    saved.push(SavedRun { at, len, offset });
                    offset += len;
                }
                base.overlay(file, saved);
            }
            let range = from..from + len;
            let mut found = Vec::new();
            let Ok(()) = base.find(range.clone(), |part, source| {
                assert_eq!(part.start, from + found.len() as u64);
                assert!(part.start < part.end);
                let mut bytes = vec![0; (part.end - part.start) as usize];
                if let Some((file, offset)) = source {
                    file.file.read_exact_at(&mut bytes, offset).unwrap();
                }
                found.extend(bytes);
                Ok::<_, Infallible>(())
            });
            prop_assert_eq!(&found[..], &model[from as usize..(from + len) as usize]);
            let runs: Vec<_> = base.runs().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end <= pair[1].start));
        }
    }
}
