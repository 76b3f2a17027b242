//! Opening snapshots: nothing is handed out before its digest was checked.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::de::{DeserializeOwned, IgnoredAny};

use crate::layout::{Blob, Layout};
use crate::manifest::{self, Descriptor, Envelope, Manifest};
use crate::pages::{Content, PAGE_SIZE, PageImage};
use crate::seal::Seal;
use crate::{Error, PagesError, SnapshotId};

/// What to believe about bulky blobs. The short ones are hashed on every opening.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Trust {
    /// This host's seal: blobs that it verified before, and that the file system says weren't
    /// changed since. Without a seal that fits, everything is hashed, and sealed when it is good.
    #[default]
    Seal,
    /// Nothing: everything is hashed.
    Nothing,
}

/// A blob that is a plain file.
#[derive(Debug)]
pub struct Extra {
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// The file that was checked, read-only, at its start.
    pub file: File,
}

/// A snapshot whose every part has been checked.
#[derive(Debug)]
pub struct Snapshot {
    outline: Outline,
    path: PathBuf,
    state: Vec<u8>,
    /// Its memory.
    pub memory: PageImage,
    /// Its disks, by name.
    pub disks: BTreeMap<String, PageImage>,
    /// Its other blobs, by name.
    pub extras: BTreeMap<String, Extra>,
    sealed: bool,
}

/// What the documents of a snapshot say, checked by digest.
#[derive(Debug)]
pub(crate) struct Outline {
    pub(crate) label: String,
    pub(crate) id: SnapshotId,
    pub(crate) manifest: Manifest,
    pub(crate) manifest_size: u64,
    config: Vec<u8>,
    pub(crate) memory_size: u64,
    pub(crate) parent: Option<SnapshotId>,
    pub(crate) created: SystemTime,
    pub(crate) size: u64,
}

impl Outline {
    /// Reads the documents.
    pub(crate) fn read(layout: &Layout) -> Result<Self, Error> {
        let label = &layout.label;
        manifest::check_layout(label, &layout.document("oci-layout")?)?;
        let found = manifest::manifest_of_index(label, &layout.document("index.json")?)?;
        let bytes = layout
            .blob("manifest", &found)?
            .bytes(manifest::DOCUMENT_MAX)?;
        let manifest = Manifest::decode(label, &bytes)?;
        let config = layout
            .blob("configuration", &manifest.config)?
            .bytes(manifest::DOCUMENT_MAX)?;
        let Envelope {
            version: _,
            created_ms,
            memory_size,
            parent,
            config: IgnoredAny,
        } = manifest::envelope(label, &config)?;
        let sizes = manifest.blobs().map(|(_, descriptor)| descriptor.size);
        Ok(Outline {
            label: label.clone(),
            id: found.digest,
            size: sizes.fold(found.size, u64::saturating_add),
            manifest,
            manifest_size: found.size,
            config,
            memory_size,
            parent,
            created: SystemTime::UNIX_EPOCH
                .checked_add(Duration::from_millis(created_ms))
                .unwrap_or(SystemTime::UNIX_EPOCH),
        })
    }

    /// Checks that a page image belongs here.
    fn check_image(&self, part: &str, image: &PageImage, is_memory: bool) -> Result<(), Error> {
        let refused = |source| Error::Pages {
            snapshot: self.label.clone(),
            part: part.to_owned(),
            source,
        };
        let is_diff = image.content == Content::Diff;
        // A disk may be whole in a diff: then it has been replaced.
        if is_diff != self.parent.is_some() && (is_memory || is_diff) {
            return Err(refused(PagesError::Content));
        }
        if is_memory && (image.size != self.memory_size || !image.size.is_multiple_of(PAGE_SIZE)) {
            return Err(refused(PagesError::Disagrees {
                found: image.size,
                expected: self.memory_size,
            }));
        }
        Ok(())
    }
}

impl Snapshot {
    /// Opens and verifies the snapshot in a directory.
    pub fn open(path: &Path, trust: Trust) -> Result<Self, Error> {
        Self::open_as(path, path.display().to_string(), trust)
    }

    pub(crate) fn open_as(path: &Path, label: String, trust: Trust) -> Result<Self, Error> {
        let layout = Layout::open(path, label)?;
        let outline = Outline::read(&layout)?;
        let manifest = &outline.manifest;
        let state = layout
            .blob("machine state", &manifest.state)?
            .bytes(manifest::STATE_MAX)?;
        let mut bulk = vec![layout.blob("memory", &manifest.memory)?];
        for (name, disk) in &manifest.disks {
            bulk.push(layout.blob(&manifest::disk_part(name), disk)?);
        }
        for (name, extra) in &manifest.extras {
            bulk.push(layout.blob(&manifest::extra_part(name), extra)?);
        }
        let stamps = stamps(&bulk, manifest)?;
        let sealed = trust == Trust::Seal
            && Seal::load(&layout.dir).is_some_and(|seal| seal.covers(outline.id, &stamps));
        if !sealed {
            verify(&layout, &outline, &bulk)?;
        }
        let mut bulk = bulk.into_iter();
        let mut image = |is_memory| -> Result<_, Error> {
            let Some(blob) = bulk.next() else {
                unreachable!("one blob was opened for each descriptor")
            };
            let part = blob.part().to_owned();
            let image = blob.into_pages()?;
            outline.check_image(&part, &image, is_memory)?;
            Ok(image)
        };
        let memory = image(true)?;
        let mut disks = BTreeMap::new();
        for name in manifest.disks.keys() {
            disks.insert(name.clone(), image(false)?);
        }
        let extras = manifest
            .extras
            .iter()
            .zip(bulk)
            .map(|((name, descriptor), blob)| {
                let extra = Extra {
                    path: layout.blob_path(descriptor),
                    size: descriptor.size,
                    file: blob.file,
                };
                (name.clone(), extra)
            });
        Ok(Snapshot {
            state,
            memory,
            disks,
            extras: extras.collect(),
            path: path.to_owned(),
            outline,
            sealed,
        })
    }

    /// Its identity, the digest of its manifest.
    pub fn id(&self) -> SnapshotId {
        self.outline.id
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The snapshot that this one is a difference to.
    pub fn parent(&self) -> Option<SnapshotId> {
        self.outline.parent
    }

    /// When it was taken.
    pub fn created(&self) -> SystemTime {
        self.outline.created
    }

    /// The size of the guest's memory in bytes.
    pub fn memory_size(&self) -> u64 {
        self.outline.memory_size
    }

    /// The size of all its blobs in bytes.
    pub fn size(&self) -> u64 {
        self.outline.size
    }

    /// The state of the machine, as it was given.
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// The configuration, as it was given.
    pub fn config<C: DeserializeOwned>(&self) -> Result<C, Error> {
        manifest::envelope(&self.outline.label, &self.outline.config)
            .map(|envelope| envelope.config)
    }

    /// Whether the bulk of it was taken on the word of the seal.
    pub fn was_sealed(&self) -> bool {
        self.sealed
    }

    pub(crate) fn outline(&self) -> &Outline {
        &self.outline
    }
}

fn bulk_descriptors(manifest: &Manifest) -> impl Iterator<Item = &Descriptor> {
    std::iter::once(&manifest.memory)
        .chain(manifest.disks.values())
        .chain(manifest.extras.values())
}

fn stamps(
    bulk: &[Blob<'_>],
    manifest: &Manifest,
) -> Result<BTreeMap<crate::Digest, crate::seal::Stamp>, Error> {
    let pairs = bulk_descriptors(manifest).zip(bulk);
    pairs
        .map(|(descriptor, blob)| Ok((descriptor.digest, blob.stamp()?)))
        .collect()
}

/// Hashes the bulky blobs, and seals the snapshot when they are as they should be.
fn verify(layout: &Layout, outline: &Outline, bulk: &[Blob<'_>]) -> Result<(), Error> {
    let before = stamps(bulk, &outline.manifest)?;
    // A change from here on, in the very tick of the last one too, must show.
    let settled = before.values().all(crate::seal::Stamp::settle);
    for blob in bulk {
        blob.verify()?;
    }
    let on_disk = bulk.iter().all(|blob| blob.file.sync_data().is_ok());
    if settled && stamps(bulk, &outline.manifest)? == before {
        let seal = Seal::new(outline.id, before, on_disk);
        if let Err(error) = seal.store(&layout.dir, false) {
            tracing::debug!(snapshot = layout.label, %error, "not sealed");
        }
    }
    Ok(())
}

/// Seals a snapshot that was hashed while it was written.
pub(crate) fn seal_written(
    layout: &Layout,
    id: SnapshotId,
    manifest: &Manifest,
    durable: bool,
) -> Result<(), Error> {
    let mut stamps = BTreeMap::new();
    for descriptor in bulk_descriptors(manifest) {
        stamps.insert(descriptor.digest, layout.blob("part", descriptor)?.stamp()?);
    }
    if stamps.values().all(crate::seal::Stamp::settle) {
        let seal = Seal::new(id, stamps, durable);
        let path = layout.path.join(crate::seal::FILE);
        seal.store(&layout.dir, durable)
            .map_err(|error| Error::io("write", &path, error))?;
    }
    Ok(())
}
