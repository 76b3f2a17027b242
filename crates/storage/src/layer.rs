//! Read-only parts of disks, to be laid over each other.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use crate::DiskError;

/// What the places of a layer are multiples of.
pub const CLUSTER_SIZE: u64 = 4096;

/// Consecutive bytes of a disk that lie together in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerRun {
    /// Where they belong on the disk.
    pub at: u64,
    /// How many.
    pub len: u64,
    /// Where they are in the file.
    pub offset: u64,
}

/// What one file says of a disk: the content of some of its clusters. Where the file has a hole,
/// zeros are said, over whatever lies below.
#[derive(Debug, Clone)]
pub struct Layer {
    file: Arc<File>,
    runs: Arc<[LayerRun]>,
}

impl Layer {
    /// A layer of the given runs, which must be whole clusters, ascending, apart from each other
    /// and within the file. Nobody may change the file from now on.
    pub fn new(
        file: impl Into<Arc<File>>,
        runs: impl Into<Arc<[LayerRun]>>,
    ) -> Result<Self, DiskError> {
        let (file, runs) = (file.into(), runs.into());
        let metadata = file.metadata();
        let metadata = metadata.map_err(|source| DiskError::Io {
            disk: "(layer)".to_owned(),
            operation: crate::Operation::Read,
            offset: 0,
            source,
        })?;
        // The length of a block device is found out when it is read.
        let limit = if metadata.is_file() {
            metadata.len()
        } else {
            u64::MAX
        };
        let mut end = 0;
        for (number, run) in runs.iter().enumerate() {
            let refused = |problem| DiskError::Layer { number, problem };
            let whole = [run.at, run.len, run.offset]
                .iter()
                .all(|place| place.is_multiple_of(CLUSTER_SIZE));
            if !whole || run.len == 0 {
                return Err(refused("isn't one or more whole clusters of 4096 bytes"));
            }
            if run.at < end {
                return Err(refused("begins before the end of the one before"));
            }
            end = match run.at.checked_add(run.len) {
                Some(end) => end,
                None => return Err(refused("goes beyond all disks")),
            };
            if run.offset.checked_add(run.len).is_none_or(|to| to > limit) {
                return Err(refused("goes beyond the end of its file"));
            }
        }
        Ok(Layer { file, runs })
    }

    /// Where the bytes are.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// What there is, ascending and apart.
    pub fn runs(&self) -> &Arc<[LayerRun]> {
        &self.runs
    }

    /// The bytes of the disk that it stands for.
    pub fn len(&self) -> u64 {
        self.runs.iter().map(|run| run.len).sum()
    }

    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Where its last run ends.
    pub(crate) fn end(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.at + run.len)
    }
}

/// A part of what is laid over each other.
#[derive(Debug, Clone)]
pub enum Part {
    /// What a file says.
    Layer(Layer),
    /// Ranges that are zero, whatever lies below; ascending and apart, in whole clusters.
    Zeros(Vec<Range<u64>>),
}

/// The same content as `parts`, later ones over earlier ones, in layers that don't overlap, with
/// zeros where they have nothing. What is hidden altogether is left out.
pub fn flatten(parts: &[Part]) -> Vec<Layer> {
    let mut files = Vec::new();
    let mut index = |part: &Part| match part {
        Part::Layer(layer) => {
            files.push(layer.file.clone());
            Index::single(files.len() - 1, &layer.runs)
        }
        Part::Zeros(ranges) => {
            let run = |range: &Range<u64>| LayerRun {
                at: range.start,
                len: range.end.saturating_sub(range.start),
                offset: 0,
            };
            Index::single(ZEROS, &ranges.iter().map(run).collect::<Vec<_>>())
        }
    };
    let all = parts.iter().map(&mut index).collect();
    Index::merged(all).layers(&files)
}

/// In place of the number of a file: zeros, which are in none.
const ZEROS: usize = usize::MAX;

/// The files of some layers, in the same order.
pub(crate) fn files_of(layers: &[Layer]) -> Vec<Arc<File>> {
    layers.iter().map(|layer| layer.file.clone()).collect()
}

/// A run, and which of several files it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) offset: u64,
    /// Index in a list of files.
    pub(crate) file: usize,
}

impl Extent {
    pub(crate) fn end(&self) -> u64 {
        self.at + self.len
    }

    /// The part that lies in a range which it meets.
    pub(crate) fn within(self, range: &Range<u64>) -> Self {
        let (at, end) = (self.at.max(range.start), self.end().min(range.end));
        Extent {
            at,
            len: end.saturating_sub(at),
            offset: self.offset + (at - self.at),
            file: self.file,
        }
    }
}

/// Which file has what of a disk: sorted, nothing twice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Index {
    extents: Vec<Extent>,
}

impl Index {
    /// Lays all layers over each other; the number of a file is that of its layer.
    pub(crate) fn of(layers: &[Layer]) -> Self {
        let single = |(file, layer): (usize, &Layer)| Self::single(file, &layer.runs);
        Self::merged(layers.iter().enumerate().map(single).collect())
    }

    /// Lays all over each other.
    fn merged(mut level: Vec<Self>) -> Self {
        // In pairs, so that the runs of a long chain aren't gone through once for each layer.
        while level.len() > 1 {
            let pair = |pair: &[Index]| match pair {
                [lower, upper] => lower.under(upper),
                rest => rest.first().cloned().unwrap_or_default(),
            };
            level = level.chunks(2).map(pair).collect();
        }
        level.pop().unwrap_or_default()
    }

    /// The runs of one file.
    pub(crate) fn single(file: usize, runs: &[LayerRun]) -> Self {
        let mut index = Index::default();
        for run in runs {
            index.push(Extent {
                at: run.at,
                len: run.len,
                offset: run.offset,
                file,
            });
        }
        index
    }

    /// Adds what comes after all that there is.
    fn push(&mut self, extent: Extent) {
        match self.extents.last_mut() {
            Some(last)
                if last.file == extent.file
                    && last.end() == extent.at
                    && last.offset + last.len == extent.offset =>
            {
                last.len += extent.len;
            }
            _ => self.extents.push(extent),
        }
    }

    /// This with another one over it.
    pub(crate) fn under(&self, upper: &Index) -> Self {
        let mut merged = Index {
            extents: Vec::with_capacity(self.extents.len() + upper.extents.len()),
        };
        let mut uppers = upper.extents.iter().peekable();
        for low in &self.extents {
            let mut at = low.at;
            while let Some(up) = uppers.peek() {
                if up.at >= low.end() {
                    break;
                }
                if at < up.at {
                    merged.push(low.within(&(at..up.at)));
                }
                at = at.max(up.end());
                if up.end() >= low.end() {
                    // It may hide more than this one.
                    break;
                }
                merged.push(**up);
                uppers.next();
            }
            if at < low.end() {
                merged.push(low.within(&(at..low.end())));
            }
        }
        uppers.for_each(|up| merged.push(*up));
        merged
    }

    pub(crate) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// What there is in a range, cut to it.
    pub(crate) fn within(&self, range: Range<u64>) -> impl Iterator<Item = Extent> + '_ {
        let first = self.extents.partition_point(|e| e.end() <= range.start);
        self.extents[first..]
            .iter()
            .take_while(move |e| e.at < range.end)
            .map(move |e| e.within(&range))
    }

    /// Gives each extent another file and place, in which the order stays.
    pub(crate) fn relocate(&self, place: impl Fn(&Extent) -> (usize, u64)) -> Self {
        let mut index = Index::default();
        for extent in &self.extents {
            let (file, offset) = place(extent);
            index.push(Extent {
                file,
                offset,
                ..*extent
            });
        }
        index
    }

    /// The bytes that are read from each of `files` files.
    pub(crate) fn bytes_by_file(&self, files: usize) -> Vec<u64> {
        let mut bytes = vec![0; files];
        for extent in &self.extents {
            if let Some(bytes) = bytes.get_mut(extent.file) {
                *bytes += extent.len;
            }
        }
        bytes
    }

    /// One layer for each file that has something.
    pub(crate) fn layers(&self, files: &[Arc<File>]) -> Vec<Layer> {
        let mut runs = vec![Vec::new(); files.len()];
        for extent in &self.extents {
            if let Some(runs) = runs.get_mut(extent.file) {
                runs.push(LayerRun {
                    at: extent.at,
                    len: extent.len,
                    offset: extent.offset,
                });
            }
        }
        let both = files.iter().zip(runs).filter(|(_, runs)| !runs.is_empty());
        both.map(|(file, runs)| Layer {
            file: file.clone(),
            runs: runs.into(),
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CLUSTERS: u64 = 40;

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(CLUSTERS * CLUSTER_SIZE).unwrap();
        file
    }

    fn run(at: u64, len: u64, offset: u64) -> LayerRun {
        let [at, len, offset] = [at, len, offset].map(|clusters| clusters * CLUSTER_SIZE);
        LayerRun { at, len, offset }
    }

    #[test]
    fn runs_that_make_no_sense_are_refused_by_number() {
        let odd = |at, len, offset| LayerRun { at, len, offset };
        for (number, runs) in [
            (0, vec![odd(1, 4096, 0)]),
            (0, vec![odd(0, 4095, 0)]),
            (0, vec![odd(0, 4096, 512)]),
            (1, vec![run(0, 1, 0), run(1, 0, 1)]),
            (1, vec![run(0, 2, 0), run(1, 1, 2)]),
            (1, vec![run(5, 1, 0), run(1, 1, 2)]),
            (0, vec![odd(u64::MAX - 4095, 4096, 0)]),
            (0, vec![odd(0, 4096, u64::MAX - 4095)]),
            (0, vec![run(0, 1, CLUSTERS)]),
            (0, vec![run(0, CLUSTERS, 1)]),
        ] {
            let error = Layer::new(file(), runs).unwrap_err();
            assert!(
                matches!(error, DiskError::Layer { number: n, .. } if n == number),
                "{error}"
            );
        }
        let whole = Layer::new(file(), [run(0, CLUSTERS, 0)]).unwrap();
        assert_eq!(whole.len(), CLUSTERS * CLUSTER_SIZE);
        assert!(Layer::new(file(), []).unwrap().is_empty());
    }

    /// Runs of at most five clusters, somewhere in the file each.
    fn runs() -> impl Strategy<Value = Vec<LayerRun>> {
        let one = (0..4u64, 1..6u64, 0..CLUSTERS - 6);
        proptest::collection::vec(one, 0..10).prop_map(|list| {
            let mut end = 0;
            let mut runs = Vec::new();
            for (gap, len, offset) in list {
                if end + gap + len <= CLUSTERS {
                    runs.push(run(end + gap, len, offset));
                    end += gap + len;
                }
            }
            runs
        })
    }

    proptest! {
        #[test]
        fn the_last_that_has_a_cluster_gives_it(all in proptest::collection::vec(runs(), 0..7)) {
            let layers: Vec<_> = all
                .iter()
                .map(|runs| Layer::new(file(), runs.clone()).unwrap())
                .collect();
            let mut model = vec![None; CLUSTERS as usize];
            for (number, runs) in all.iter().enumerate() {
                for run in runs {
                    for n in 0..run.len / CLUSTER_SIZE {
                        let place = run.offset + n * CLUSTER_SIZE;
                        model[(run.at / CLUSTER_SIZE + n) as usize] = Some((number, place));
                    }
                }
            }
            let index = Index::of(&layers);
            let mut found = vec![None; CLUSTERS as usize];
            for e in index.extents() {
                for n in 0..e.len / CLUSTER_SIZE {
                    let slot = &mut found[(e.at / CLUSTER_SIZE + n) as usize];
                    prop_assert!(slot.is_none(), "twice");
                    *slot = Some((e.file, e.offset + n * CLUSTER_SIZE));
                }
            }
            prop_assert_eq!(&found, &model);
            prop_assert!(index.extents().windows(2).all(|pair| pair[0].end() <= pair[1].at));
            // A second time changes nothing.
            let parts: Vec<_> = layers.iter().cloned().map(Part::Layer).collect();
            let flat = flatten(&parts);
            prop_assert!(flat.iter().all(|layer| !layer.is_empty()));
            let bytes: u64 = flat.iter().map(Layer::len).sum();
            prop_assert_eq!(bytes, index.extents().iter().map(|e| e.len).sum::<u64>());
            let again: Vec<_> = flat.iter().cloned().map(Part::Layer).collect();
            let again = flatten(&again);
            let of = |layers: &[Layer]| layers.iter().map(|l| l.runs().to_vec()).collect::<Vec<_>>();
            prop_assert_eq!(of(&again), of(&flat));
            // Zeros take away what is below them, and nothing else.
            let ranges = [2..4, 4..5].map(|r| r.start * CLUSTER_SIZE..r.end * CLUSTER_SIZE);
            let zeros = Part::Zeros(ranges.to_vec());
            let bytes_with = |place: usize| {
                let mut parts = parts.clone();
                parts.insert(place.min(parts.len()), zeros.clone());
                flatten(&parts).iter().map(Layer::len).sum::<u64>()
            };
            let hidden = model[2..5].iter().flatten().count() as u64 * CLUSTER_SIZE;
            prop_assert_eq!(bytes_with(usize::MAX), bytes - hidden);
            prop_assert_eq!(bytes_with(0), bytes);
            // Looking for a part finds that part.
            for (from, to) in [(0, CLUSTERS), (3, 9), (7, 8), (30, CLUSTERS)] {
                let range = from * CLUSTER_SIZE..to * CLUSTER_SIZE;
                let len: u64 = index.within(range).map(|e| e.len).sum();
                let there = model[from as usize..to as usize].iter().flatten().count() as u64;
                prop_assert_eq!(len, there * CLUSTER_SIZE);
            }
        }
    }
}
