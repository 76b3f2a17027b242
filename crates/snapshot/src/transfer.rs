//! Snapshots on their way between stores: as a directory, or as a tar archive of one.
//!
//! A difference can take its parents with it: then the index names its manifest first, and after
//! each manifest that of its parent.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::layout::{Layout, blob_path};
use crate::manifest::{self, DOCUMENT_MAX, Descriptor, Manifest};
use crate::snapshot::{Snapshot, Trust};
use crate::staging::Staging;
use crate::writer::{Finish, finish};
use crate::{Digest, Error, SnapshotId, SnapshotStore, store};

/// No archive has more members than a snapshot of any size needs.
const MEMBERS_MAX: usize = 10_000;
const BLOBS: &str = "blobs/sha256/";

/// What a snapshot is exported as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A directory in OCI image layout.
    Directory,
    /// A tar archive of such a directory.
    Archive,
}

/// The names of the blobs of a snapshot, the short ones first.
fn blobs(snapshot: &Snapshot) -> Vec<String> {
    let manifest = &snapshot.outline().manifest;
    let mut names = vec![format!("{BLOBS}{}", snapshot.id().hex())];
    names.extend(
        manifest
            .blobs()
            .map(|(_, blob)| format!("{BLOBS}{}", blob.digest.hex())),
    );
    names
}

/// What goes out: one snapshot, or one and its parents.
struct Parcel {
    index: Vec<u8>,
    /// Names in the layout, and where the files are.
    blobs: Vec<(String, PathBuf)>,
}

impl Parcel {
    /// Of snapshots that were verified, the wanted one first.
    fn of<'a>(snapshots: impl Iterator<Item = &'a Snapshot> + Clone) -> Result<Self, Error> {
        let mut seen = BTreeSet::new();
        let mut files = Vec::new();
        for snapshot in snapshots.clone() {
            for name in blobs(snapshot) {
                if seen.insert(name.clone()) {
                    let path = snapshot.path().join(&name);
                    files.push((name, path));
                }
            }
        }
        let manifests = snapshots.map(|s| (s.id(), s.outline().manifest_size));
        Ok(Parcel {
            index: manifest::index(manifests)?,
            blobs: files,
        })
    }

    fn documents(&self) -> [(&'static str, &[u8]); 2] {
        [
            ("oci-layout", manifest::LAYOUT),
            ("index.json", &self.index),
        ]
    }

    fn copy_to(&self, dir: &Path) -> io::Result<()> {
        std::fs::create_dir_all(dir.join(BLOBS))?;
        for (name, bytes) in self.documents() {
            std::fs::write(dir.join(name), bytes)?;
        }
        for (name, from) in &self.blobs {
            std::fs::copy(from, dir.join(name))?;
        }
        Ok(())
    }

    fn archive(&self, out: &mut File) -> io::Result<()> {
        let mut tar = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, out));
        let mut append = |name: &str, size: u64, content: &mut dyn Read| {
            let mut header = tar::Header::new_gnu();
            header.set_size(size);
            header.set_mode(0o600);
            tar.append_data(&mut header, name, content)
        };
        for (name, mut bytes) in self.documents() {
            append(name, bytes.len() as u64, &mut bytes)?;
        }
        for (name, from) in &self.blobs {
            let mut file = File::open(from)?;
            append(name, file.metadata()?.len(), &mut file)?;
        }
        tar.into_inner()?.flush()
    }

    fn write(&self, to: &Path, form: Form) -> Result<(), Error> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => Error::Exists {
                path: to.to_owned(),
            },
            _ => Error::io("write", to, error),
        };
        if to.symlink_metadata().is_ok() {
            return Err(failed(io::ErrorKind::AlreadyExists.into()));
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(".export-");
        match form {
            Form::Directory => {
                let dir = builder.tempdir_in(parent_dir(to)).map_err(failed)?;
                self.copy_to(dir.path()).map_err(failed)?;
                rename_new(dir.path(), to).map_err(failed)?;
                // It has gone from there.
                let _ = dir.keep();
                Ok(())
            }
            Form::Archive => {
                let mut file = builder.tempfile_in(parent_dir(to)).map_err(failed)?;
                self.archive(file.as_file_mut()).map_err(failed)?;
                let persisted = file.persist_noclobber(to);
                persisted.map(drop).map_err(|error| failed(error.error))
            }
        }
    }
}

/// Renames to a name that nothing has; an empty directory is something.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system that can't say so; the name was free a moment ago.
        Err(Errno::INVAL | Errno::NOSYS) => std::fs::rename(from, to),
        result => Ok(result?),
    }
}

fn parent_dir(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

impl SnapshotStore {
    /// Copies a snapshot out of the store to `to`, which must not exist. Everything is verified
    /// first. A difference goes without its parents.
    pub fn export(&self, id: &SnapshotId, to: &Path, form: Form) -> Result<(), Error> {
        let snapshot = self.get(id, Trust::Nothing)?;
        Parcel::of(std::iter::once(&snapshot))?.write(to, form)
    }

    /// The same with all that the snapshot is a difference to: what is exported so can be imported
    /// anywhere.
    pub fn export_chain(&self, id: &SnapshotId, to: &Path, form: Form) -> Result<(), Error> {
        let chain = self.open_chain(id, Trust::Nothing)?;
        Parcel::of(chain.iter().rev())?.write(to, form)
    }

    /// A folder for the blobs of a snapshot that are being received.
    pub fn receive(&self) -> Result<Receiving, Error> {
        Staging::create(self.root()).map(Receiving)
    }

    /// Takes a snapshot from a directory or archive into the store, verifying everything before any
    /// of it is to be seen. A difference needs its parents: with it, or in the store before it.
    pub fn import(&self, from: &Path) -> Result<SnapshotId, Error> {
        let failed = |error| Error::io("read", from, error);
        let staging = Staging::create(self.root())?;
        if std::fs::metadata(from).map_err(failed)?.is_dir() {
            copy_layout(from, staging.path())?;
        } else {
            let file = File::open(from).map_err(failed)?;
            unpack(file, from, staging.path())?;
        }
        let label = from.display().to_string();
        let layout = Layout::open(staging.path(), label.clone())?;
        let index = layout.document("index.json")?;
        manifest::check_layout(&label, &layout.document("oci-layout")?)?;
        let found = manifest::manifests_of_index(&label, &index)?;
        let incoming = match &found[..] {
            [_] => vec![Incoming::new(staging, label)?],
            _ => separate(&staging, &layout, &label, &found)?,
        };
        check_chain(self.root(), &incoming)?;
        // Those that others are differences to come first.
        for incoming in incoming.into_iter().rev() {
            incoming.publish()?;
        }
        found
            .first()
            .map(|manifest| manifest.digest)
            .ok_or_else(|| Error::io("read", from, io::ErrorKind::UnexpectedEof))
    }
}

/// A folder for the blobs of an OCI image layout. It goes when this is dropped; what a killed process
/// leaves is [swept](SnapshotStore::sweep).
#[derive(Debug)]
pub struct Receiving(Staging);

impl Receiving {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes the snapshot, and what it is a difference to, into the store: by digests and sizes of the
    /// manifests, the wanted one first.
    pub fn import(
        self,
        manifests: impl Iterator<Item = (Digest, u64)>,
    ) -> Result<SnapshotId, Error> {
        let index = manifest::index(manifests)?;
        for (name, bytes) in [("oci-layout", manifest::LAYOUT), ("index.json", &index)] {
            let path = self.path().join(name);
            std::fs::write(&path, bytes).map_err(|error| Error::io("write", &path, error))?;
        }
        SnapshotStore::open(self.0.root())?.import(self.path())
    }
}

/// A snapshot that was verified and isn't in its place yet.
struct Incoming {
    staging: Staging,
    snapshot: Snapshot,
    label: String,
}

impl Incoming {
    fn new(staging: Staging, label: String) -> Result<Self, Error> {
        let snapshot = Snapshot::open_as(staging.path(), label.clone(), Trust::Nothing)?;
        keep_only(staging.path(), &snapshot)?;
        Ok(Incoming {
            staging,
            snapshot,
            label,
        })
    }

    fn publish(self) -> Result<(), Error> {
        let outline = self.snapshot.outline();
        let parent = outline.parent.map(|parent| (parent, outline.memory_size));
        let manifest = Descriptor::new(manifest::MANIFEST_TYPE, outline.id, outline.manifest_size);
        // The blobs were hashed and sealed by the opening.
        let how = Finish {
            durable: true,
            seal: false,
        };
        finish(self.staging, &manifest, &outline.manifest, parent, how).map(drop)
    }
}

/// Gives each of several snapshots a directory of its own, and verifies it.
fn separate(
    from: &Staging,
    layout: &Layout,
    label: &str,
    found: &[Descriptor],
) -> Result<Vec<Incoming>, Error> {
    let mut parts = Vec::new();
    let mut uses = BTreeMap::new();
    for descriptor in found {
        let blob = layout.blob("manifest", descriptor)?;
        let manifest = Manifest::decode(label, &blob.bytes(DOCUMENT_MAX)?)?;
        let blobs = manifest.blobs().map(|(_, blob)| blob.digest);
        let blobs: BTreeSet<_> = blobs.chain([descriptor.digest]).collect();
        for digest in &blobs {
            *uses.entry(*digest).or_insert(0) += 1;
        }
        parts.push((descriptor, blobs));
    }
    let mut incoming = Vec::new();
    for (descriptor, blobs) in parts {
        let staging = Staging::create(from.root())?;
        let index = manifest::index(std::iter::once((descriptor.digest, descriptor.size)))?;
        for (name, bytes) in [("oci-layout", manifest::LAYOUT), ("index.json", &index)] {
            let path = staging.path().join(name);
            std::fs::write(&path, bytes).map_err(|error| Error::io("write", &path, error))?;
        }
        for digest in blobs {
            let name = format!("{BLOBS}{}", digest.hex());
            let (old, new) = (from.path().join(&name), staging.path().join(&name));
            let left = uses.entry(digest).or_insert(1);
            *left -= 1;
            // What several have is copied, for the seal of each to be about a file of its own.
            let moved = match left {
                0 => std::fs::rename(&old, &new),
                _ => std::fs::copy(&old, &new).map(drop),
            };
            match moved {
                // Found missing, by name, when it is opened.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                moved => moved.map_err(|error| Error::io("make", &new, error))?,
            }
        }
        let label = format!("{} of {label}", &descriptor.digest.hex()[..16]);
        incoming.push(Incoming::new(staging, label)?);
    }
    Ok(incoming)
}

/// Checks that each snapshot is a difference to the next one, and the last one fits the store.
fn check_chain(root: &Path, incoming: &[Incoming]) -> Result<(), Error> {
    for pair in incoming.windows(2) {
        let [child, parent] = pair else { continue };
        let (above, below) = (child.snapshot.outline(), parent.snapshot.outline());
        if above.parent != Some(below.id) {
            return Err(Error::NotASnapshot {
                snapshot: child.label.clone(),
                problem: format!("the next in the index, {}, isn't its parent", below.id),
            });
        }
        store::check_size(&child.label, above.memory_size, below.id, below.memory_size)?;
    }
    let Some(last) = incoming.last() else {
        return Ok(());
    };
    let outline = last.snapshot.outline();
    match outline.parent {
        Some(parent) => store::check_parent(root, &last.label, parent, Some(outline.memory_size)),
        None => Ok(()),
    }
}

/// Removes blobs that an archive had and its manifest doesn't name.
fn keep_only(dir: &Path, snapshot: &Snapshot) -> Result<(), Error> {
    let folder = dir.join(BLOBS);
    let failed = |error| Error::io("read", &folder, error);
    let wanted: BTreeSet<_> = blobs(snapshot).into_iter().collect();
    for entry in std::fs::read_dir(&folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if !wanted.contains(&format!("{BLOBS}{}", name.to_string_lossy())) {
            std::fs::remove_file(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

/// Copies the blobs that a layout's manifests name, and nothing else.
fn copy_layout(from: &Path, to: &Path) -> Result<(), Error> {
    let label = from.display().to_string();
    let layout = Layout::open(from, label.clone())?;
    let index = layout.document("index.json")?;
    let found = manifest::manifests_of_index(&label, &index)?;
    for (name, bytes) in [
        ("oci-layout", layout.document("oci-layout")?),
        ("index.json", index),
    ] {
        let path = to.join(name);
        std::fs::write(&path, bytes).map_err(|error| Error::io("write", &path, error))?;
    }
    let mut copied = BTreeSet::new();
    for found in &found {
        let bytes = layout.blob("manifest", found)?.bytes(DOCUMENT_MAX)?;
        let manifest = Manifest::decode(&label, &bytes)?;
        let manifest_blob = ("manifest".to_owned(), found);
        for (part, descriptor) in manifest.blobs().chain([manifest_blob]) {
            // Two that differ in size are found out when the blob is opened.
            if !copied.insert(descriptor.digest) {
                continue;
            }
            let mut blob = layout.blob(&part, descriptor)?;
            let path = blob_path(to, descriptor);
            let mut copy = || io::copy(&mut blob.file, &mut File::create(&path)?);
            copy().map_err(|error| Error::io("write", &path, error))?;
        }
    }
    Ok(())
}

/// Where a member of an archive goes; `None` for what isn't needed.
fn destination(name: &[u8]) -> Option<PathBuf> {
    let name = std::str::from_utf8(name).ok()?;
    let name = name.strip_prefix("./").unwrap_or(name);
    let is_document = ["oci-layout", "index.json"].contains(&name);
    let is_blob = name
        .strip_prefix(BLOBS)
        .is_some_and(|hex| Digest::from_hex(hex).is_some());
    (is_document || is_blob).then(|| PathBuf::from(name))
}

/// An error of the tar reader. What it says of malformed headers quotes their bytes, which are the
/// archive's to choose and not for a terminal.
fn unreadable(archive: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::Other
        | io::ErrorKind::InvalidData
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::UnexpectedEof => Error::NotAnArchive {
            path: archive.to_owned(),
        },
        _ => Error::io("read", archive, error),
    }
}

/// Unpacks an archive; only plain files with names of the layout are looked at.
fn unpack(file: File, archive: &Path, to: &Path) -> Result<(), Error> {
    let failed = |error| unreadable(archive, error);
    let mut tar = tar::Archive::new(io::BufReader::with_capacity(1 << 20, file));
    // Raw: extended headers are members like any other, and are never held in memory.
    for (count, entry) in tar.entries().map_err(failed)?.raw(true).enumerate() {
        let mut entry = entry.map_err(failed)?;
        let name = entry.path_bytes().into_owned();
        let refused = |problem| Error::Archive {
            path: archive.to_owned(),
            member: name
                .escape_ascii()
                .take(200)
                .collect::<Vec<_>>()
                .escape_ascii()
                .to_string(),
            problem,
        };
        if count == MEMBERS_MAX {
            return Err(refused("one of far too many members"));
        }
        match entry.header().entry_type() {
            tar::EntryType::Regular | tar::EntryType::Continuous => {}
            tar::EntryType::Directory | tar::EntryType::XGlobalHeader => continue,
            tar::EntryType::XHeader if !changes_meaning(&mut entry) => continue,
            tar::EntryType::XHeader => {
                return Err(refused("an extended header with a name or size"));
            }
            _ => return Err(refused("which is neither a plain file nor a directory")),
        }
        let Some(place) = destination(&name) else {
            continue;
        };
        let path = to.join(place);
        let out = match File::create_new(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(refused("a second time"));
            }
            out => out.map_err(|error| Error::io("make", &path, error))?,
        };
        let size = entry.header().size().map_err(failed)?;
        copy_sparsely(&mut entry, size, &out, archive, &path)?;
    }
    Ok(())
}

/// Whether an extended header says more than times and owners.
fn changes_meaning(entry: &mut tar::Entry<'_, impl Read>) -> bool {
    let mut text = Vec::new();
    let read = entry.take(64 << 10).read_to_end(&mut text);
    let mut records = tar::PaxExtensions::new(&text);
    let harmful = |key: &str| ["path", "size"].contains(&key) || key.starts_with("GNU.sparse");
    read.is_err() || records.any(|record| record.map_or(true, |r| r.key().map_or(true, harmful)))
}

fn copy_sparsely(
    from: &mut impl Read,
    size: u64,
    out: &File,
    archive: &Path,
    path: &Path,
) -> Result<(), Error> {
    let mut buffer = vec![0; 256 << 10];
    let mut at = 0;
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(unreadable(archive, error)),
        };
        if buffer[..n].iter().any(|byte| *byte != 0) {
            let written = out.write_all_at(&buffer[..n], at);
            written.map_err(|error| Error::io("write", path, error))?;
        }
        at += n as u64;
    }
    if at != size {
        return Err(unreadable(archive, io::ErrorKind::UnexpectedEof.into()));
    }
    out.set_len(at)
        .map_err(|error| Error::io("write", path, error))
}
