//! What a chain of differences comes to: layers that can be mapped, nothing twice.

use std::collections::BTreeMap;
use std::sync::Arc;

use skerry_storage::{Layer, LayerRun, Part, flatten};

use crate::pages::{Content, PAGE_SIZE, PageImage};
use crate::snapshot::Snapshot;
use crate::{Error, manifest};

// What is a page here is a cluster there.
const _: () = assert!(PAGE_SIZE == skerry_storage::CLUSTER_SIZE);

/// A memory or disk as parts of files. No two of the layers say something of the same page, and
/// what none of them has is zero.
#[derive(Debug, Clone)]
pub struct Merged {
    /// How many bytes the whole stands for.
    pub size: u64,
    /// The files, and what is taken of each.
    pub layers: Vec<Layer>,
}

impl PageImage {
    /// Its runs in bytes.
    fn layer_runs(&self) -> Vec<LayerRun> {
        let run = |run: &crate::Run| LayerRun {
            at: run.guest_page * PAGE_SIZE,
            len: run.pages * PAGE_SIZE,
            offset: run.file_page * PAGE_SIZE,
        };
        self.runs.iter().map(run).collect()
    }
}

/// The images of one part, from the last one that is complete on.
struct Pile<'a> {
    part: String,
    images: Vec<(&'a Snapshot, &'a PageImage)>,
}

impl Pile<'_> {
    fn merge(&self) -> Result<Merged, Error> {
        let mut parts = Vec::new();
        for (snapshot, image) in &self.images {
            let label = snapshot.id().hex();
            let file = image.file.try_clone();
            let file = file.map_err(|error| Error::io("read", snapshot.path(), error))?;
            let layer = Layer::new(Arc::new(file), image.layer_runs());
            let layer = layer.map_err(|source| Error::Layer {
                snapshot: label,
                part: self.part.clone(),
                source: Box::new(source),
            })?;
            let zeros = image.zeros.iter();
            let zeros = zeros.map(|pages| pages.start * PAGE_SIZE..pages.end * PAGE_SIZE);
            parts.push(Part::Zeros(zeros.collect()));
            parts.push(Part::Layer(layer));
        }
        let size = self.images.last().map_or(0, |(_, image)| image.size);
        let layers = flatten(&parts);
        Ok(Merged { size, layers })
    }
}

fn broken(child: &Snapshot, part: &str, problem: &'static str) -> Error {
    Error::BrokenChain {
        snapshot: child.id().hex(),
        part: part.to_owned(),
        parent: child.parent().unwrap_or(child.id()),
        problem,
    }
}

/// Collects the images that make up one part of the last snapshot of a chain.
fn pile<'a>(
    chain: &'a [Snapshot],
    part: String,
    image: impl Fn(&'a Snapshot) -> Option<&'a PageImage>,
) -> Result<Pile<'a>, Error> {
    let mut images: Vec<(&Snapshot, &PageImage)> = Vec::new();
    for snapshot in chain.iter().rev() {
        let above = images.last();
        let Some(found) = image(snapshot) else {
            let problem = "it is a difference, and its parent has no such part";
            return Err(match above {
                Some((child, _)) => broken(child, &part, problem),
                None => broken(snapshot, &part, "it isn't there"),
            });
        };
        if let Some((child, above)) = above
            && above.size != found.size
        {
            let problem = "it is a difference, and the part of its parent has another size";
            return Err(broken(child, &part, problem));
        }
        images.push((snapshot, found));
        if found.content == Content::Full {
            images.reverse();
            return Ok(Pile { part, images });
        }
    }
    match images.last() {
        Some((first, _)) => {
            let problem = "it is a difference, and its parent isn't among what was given";
            Err(broken(first, &part, problem))
        }
        None => Err(Error::Incomplete {
            problem: "there is no snapshot to be opened".to_owned(),
        }),
    }
}

/// What the memory of the last snapshot of a chain is made of. The chain is that of
/// [`SnapshotStore::open_chain`](crate::SnapshotStore::open_chain), or of one that isn't a
/// difference.
pub fn merged_memory(chain: &[Snapshot]) -> Result<Merged, Error> {
    pile(chain, "memory".to_owned(), |snapshot| {
        Some(&snapshot.memory)
    })?
    .merge()
}

/// The same for its disks, by name.
pub fn merged_disks(chain: &[Snapshot]) -> Result<BTreeMap<String, Merged>, Error> {
    let names = chain.last().into_iter().flat_map(|last| last.disks.keys());
    let mut disks = BTreeMap::new();
    for name in names {
        let pile = pile(chain, manifest::disk_part(name), |s| s.disks.get(name))?;
        disks.insert(name.clone(), pile.merge()?);
    }
    Ok(disks)
}
