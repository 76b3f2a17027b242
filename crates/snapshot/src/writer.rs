//! Writing snapshots: a hidden directory, filled and then renamed into place.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;

use crate::layout::{Layout, blob_path};
use crate::manifest::{self, Descriptor, Envelope, Manifest};
use crate::packing::{BlobSink, Packed, PageWriter};
use crate::pages::{Content, PAGE_SIZE};
use crate::snapshot::{Snapshot, Trust, seal_written};
use crate::staging::{self, Gone, Staging, StoreLock};
use crate::{Error, SnapshotId, store};

/// How a snapshot is written.
#[derive(Debug, Clone, Copy)]
pub struct WriteOptions {
    /// Whether it has reached the disk when it is committed. Without, a loss of power may take it,
    /// which is found out when it is opened; right for what can be made again.
    pub durable: bool,
    /// What it is a difference to.
    pub parent: Option<SnapshotId>,
}

impl Default for WriteOptions {
    fn default() -> Self {
        WriteOptions {
            durable: true,
            parent: None,
        }
    }
}

/// A snapshot that is being written. Dropped before it is [committed](Self::commit), it leaves
/// nothing; killed, it leaves what [`SnapshotStore::sweep`](crate::SnapshotStore::sweep) removes.
pub struct SnapshotWriter {
    staging: Staging,
    options: WriteOptions,
    memory: Option<(Descriptor, u64)>,
    state: Option<Descriptor>,
    disks: BTreeMap<String, Descriptor>,
    extras: BTreeMap<String, Descriptor>,
    incoming: u64,
}

fn incomplete(problem: impl Into<String>) -> Error {
    Error::Incomplete {
        problem: problem.into(),
    }
}

fn check_length(part: &str, size: usize, limit: u64) -> Result<(), Error> {
    if size as u64 <= limit {
        return Ok(());
    }
    Err(Error::TooLarge {
        snapshot: "(being written)".to_owned(),
        part: part.to_owned(),
        size: size as u64,
        limit,
    })
}

impl SnapshotWriter {
    /// Begins a snapshot in the store at `root`, making the store if need be.
    pub fn create(root: &Path, options: WriteOptions) -> Result<Self, Error> {
        let staging = Staging::create(root)?;
        if let Some(parent) = options.parent {
            // Early, before much is written; and again at the end.
            store::check_parent(root, "(being written)", parent, None)?;
        }
        Ok(SnapshotWriter {
            staging,
            options,
            memory: None,
            state: None,
            disks: BTreeMap::new(),
            extras: BTreeMap::new(),
            incoming: 0,
        })
    }

    fn sink(&mut self) -> Result<BlobSink, Error> {
        self.incoming += 1;
        let name = format!("incoming-{}", self.incoming);
        BlobSink::create(self.staging.path().join(name))
    }

    /// Names a finished blob by its content.
    fn place(&self, sink: BlobSink, media_type: &str) -> Result<Descriptor, Error> {
        let from = sink.path.clone();
        let (digest, size) = sink.finish()?;
        let descriptor = Descriptor::new(media_type, digest, size);
        let to = blob_path(self.staging.path(), &descriptor);
        std::fs::rename(&from, &to).map_err(|error| Error::io("make", &to, error))?;
        Ok(descriptor)
    }

    fn blob(&mut self, bytes: &[u8], media_type: &str) -> Result<Descriptor, Error> {
        let mut sink = self.sink()?;
        sink.write(bytes)?;
        self.place(sink, media_type)
    }

    fn image<T, E: From<Error>>(
        &mut self,
        part: String,
        media_type: &str,
        (size, content): (u64, Content),
        fill: impl FnOnce(&mut PageWriter) -> Result<T, E>,
    ) -> Result<(Descriptor, Packed), E> {
        let sink = self.sink()?;
        let mut writer = PageWriter::new(sink, part, size, content)?;
        fill(&mut writer)?;
        let (sink, table, packed) = writer.finish()?;
        Ok((self.place(sink, media_type)?.with_table(table), packed))
    }

    /// Writes the guest's memory of `size` bytes. `fill` gives its pages in ascending order: those
    /// of a snapshot without parent may be zero or left out alike, those of a difference are the
    /// ones that changed.
    pub fn memory<E: From<Error>>(
        &mut self,
        size: u64,
        fill: impl FnOnce(&mut PageWriter) -> Result<(), E>,
    ) -> Result<Packed, E> {
        if self.memory.is_some() {
            return Err(incomplete("its memory was given twice").into());
        }
        if !size.is_multiple_of(PAGE_SIZE) {
            return Err(incomplete(format!("{size} bytes of memory aren't whole pages")).into());
        }
        let content = match self.options.parent {
            None => Content::Full,
            Some(_) => Content::Diff,
        };
        let part = "memory".to_owned();
        let (descriptor, packed) =
            self.image(part, manifest::MEMORY_TYPE, (size, content), fill)?;
        self.memory = Some((descriptor, size));
        Ok(packed)
    }

    /// Takes the state of the machine.
    pub fn state(&mut self, bytes: &[u8]) -> Result<(), Error> {
        check_length("machine state", bytes.len(), manifest::STATE_MAX)?;
        let descriptor = self.blob(bytes, manifest::STATE_TYPE)?;
        match self.state.replace(descriptor) {
            None => Ok(()),
            Some(_) => Err(incomplete("its machine state was given twice")),
        }
    }

    fn check_new(&self, name: &str) -> Result<(), Error> {
        manifest::check_part_name(name)?;
        if self.disks.contains_key(name) || self.extras.contains_key(name) {
            return Err(incomplete(format!("its part '{name}' was given twice")));
        }
        Ok(())
    }

    /// Writes a disk of `size` bytes as `fill` gives its pages; the last page may go beyond the
    /// end, with zeros. A [difference](Content::Diff) needs a parent.
    pub fn disk<E: From<Error>>(
        &mut self,
        name: &str,
        size: u64,
        content: Content,
        fill: impl FnOnce(&mut PageWriter) -> Result<(), E>,
    ) -> Result<Packed, E> {
        self.check_new(name)?;
        if content == Content::Diff && self.options.parent.is_none() {
            return Err(incomplete(format!("its disk '{name}' is a difference to nothing")).into());
        }
        let part = manifest::disk_part(name);
        let (descriptor, packed) = self.image(part, manifest::DISK_TYPE, (size, content), fill)?;
        self.disks
            .insert(name.to_owned(), descriptor.with_name(name));
        Ok(packed)
    }

    /// Writes the whole of a disk from a file. Its holes cost nothing.
    pub fn disk_file(&mut self, name: &str, file: &File) -> Result<Packed, Error> {
        let path = PathBuf::from(name);
        let size = file
            .metadata()
            .map_err(|error| Error::io("read", &path, error))?
            .len();
        self.disk(name, size, Content::Full, |pages| {
            pages.write_file(file, &path)
        })
    }

    /// Takes a further blob, as it is.
    pub fn extra(&mut self, name: &str, mut source: impl Read) -> Result<(), Error> {
        self.check_new(name)?;
        let mut sink = self.sink()?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => sink.write(&buffer[..n])?,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("read", Path::new(name), error)),
            }
        }
        let descriptor = self.place(sink, manifest::EXTRA_TYPE)?.with_name(name);
        self.extras.insert(name.to_owned(), descriptor);
        Ok(())
    }

    /// Makes the snapshot visible, whole, with one rename.
    pub fn commit<C: Serialize>(mut self, config: &C) -> Result<SnapshotId, Error> {
        let memory = self.memory.take();
        let (memory, memory_size) = memory.ok_or_else(|| incomplete("its memory wasn't given"))?;
        let state = self.state.take();
        let state = state.ok_or_else(|| incomplete("its machine state wasn't given"))?;
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let envelope = Envelope {
            version: manifest::VERSION,
            created_ms: since.map_or(0, |since| since.as_millis() as u64),
            memory_size,
            parent: self.options.parent,
            config,
        };
        let bytes = serde_json::to_vec(&envelope).map_err(|source| Error::Encode { source })?;
        check_length("configuration", bytes.len(), manifest::DOCUMENT_MAX)?;
        let manifest = Manifest {
            config: self.blob(&bytes, manifest::CONFIG_TYPE)?,
            state,
            memory,
            disks: std::mem::take(&mut self.disks),
            extras: std::mem::take(&mut self.extras),
        };
        let bytes = manifest.encode()?;
        check_length("manifest", bytes.len(), manifest::DOCUMENT_MAX)?;
        let descriptor = self.blob(&bytes, manifest::MANIFEST_TYPE)?;
        let parent = self.options.parent.map(|parent| (parent, memory_size));
        finish(
            self.staging,
            &descriptor,
            &manifest,
            parent,
            Finish {
                durable: self.options.durable,
                seal: true,
            },
        )
    }
}

/// How a filled staging directory is finished.
pub(crate) struct Finish {
    pub(crate) durable: bool,
    pub(crate) seal: bool,
}

/// Adds the documents of the layout, brings all to disk and publishes it.
pub(crate) fn finish(
    mut staging: Staging,
    descriptor: &Descriptor,
    manifest: &Manifest,
    parent: Option<(SnapshotId, u64)>,
    how: Finish,
) -> Result<SnapshotId, Error> {
    let id = descriptor.digest;
    let index = manifest::index(std::iter::once((id, descriptor.size)))?;
    for (name, bytes) in [("oci-layout", manifest::LAYOUT), ("index.json", &index)] {
        let path = staging.path().join(name);
        std::fs::write(&path, bytes).map_err(|error| Error::io("write", &path, error))?;
    }
    if how.durable {
        sync_files(&staging, descriptor, manifest)?;
    }
    if how.seal {
        let layout = Layout::open(staging.path(), "(being written)".to_owned())?;
        seal_written(&layout, id, manifest, how.durable)?;
    }
    if how.durable {
        staging.sync()?;
    }
    let root = staging.root().to_owned();
    publish(&mut staging, &root, id, parent)?;
    if how.durable {
        staging::sync_dir(&root)?;
    }
    Ok(id)
}

fn sync_files(
    staging: &Staging,
    descriptor: &Descriptor,
    manifest: &Manifest,
) -> Result<(), Error> {
    let blobs = manifest.blobs().map(|(_, blob)| blob).chain([descriptor]);
    let mut paths: Vec<_> = blobs.map(|blob| blob_path(staging.path(), blob)).collect();
    paths.extend(["oci-layout", "index.json"].map(|name| staging.path().join(name)));
    for path in paths {
        let sync = || File::open(&path)?.sync_all();
        sync().map_err(|error| Error::io("write", &path, error))?;
    }
    Ok(())
}

fn publish(
    staging: &mut Staging,
    root: &Path,
    id: SnapshotId,
    parent: Option<(SnapshotId, u64)>,
) -> Result<(), Error> {
    {
        let _lock = StoreLock::shared(root)?;
        if let Some((parent, size)) = parent {
            store::check_parent(root, &id.hex(), parent, Some(size))?;
        }
        if staging.publish(&id)? {
            return Ok(());
        }
    }
    // There is one already, with the very same content if it is whole.
    let place = root.join(id.hex());
    let found = Snapshot::open(&place, Trust::Seal);
    if found.is_ok_and(|found| found.id() == id) {
        return Ok(());
    }
    let gone = {
        let _lock = StoreLock::exclusive(root)?;
        let gone = Gone::take(root, &id)?;
        if !staging.publish(&id)? {
            let exists = std::io::ErrorKind::AlreadyExists;
            return Err(Error::io("make", &place, exists));
        }
        gone
    };
    gone.delete()
}
