//! Snapshots on their way between stores: as a directory, or as a tar archive of one.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::layout::{Layout, blob_path};
use crate::manifest::{self, DOCUMENT_MAX};
use crate::snapshot::{Snapshot, Trust};
use crate::staging::Staging;
use crate::writer::{Finish, finish};
use crate::{Digest, Error, SnapshotId, SnapshotStore};

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

/// The files of a snapshot, the short ones first.
fn files(snapshot: &Snapshot) -> Vec<String> {
    let manifest = &snapshot.outline().manifest;
    let mut names = vec!["oci-layout".to_owned(), "index.json".to_owned()];
    names.push(format!("{BLOBS}{}", snapshot.id().hex()));
    let mut seen = BTreeSet::new();
    for (_, descriptor) in manifest.blobs() {
        if seen.insert(descriptor.digest) {
            names.push(format!("{BLOBS}{}", descriptor.digest.hex()));
        }
    }
    names
}

fn parent_dir(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

impl SnapshotStore {
    /// Copies a snapshot out of the store to `to`, which must not exist. Everything is verified
    /// first. A difference goes without its parents; export those too.
    pub fn export(&self, id: &SnapshotId, to: &Path, form: Form) -> Result<(), Error> {
        let snapshot = self.get(id, Trust::Nothing)?;
        if to.symlink_metadata().is_ok() {
            return Err(Error::Exists {
                path: to.to_owned(),
            });
        }
        let failed = |error| Error::io("write", to, error);
        match form {
            Form::Directory => {
                let dir = tempfile::Builder::new()
                    .prefix(".export-")
                    .tempdir_in(parent_dir(to))
                    .map_err(failed)?;
                std::fs::create_dir_all(dir.path().join(BLOBS)).map_err(failed)?;
                for name in files(&snapshot) {
                    let (from, to) = (snapshot.path().join(&name), dir.path().join(&name));
                    std::fs::copy(&from, &to).map_err(failed)?;
                }
                std::fs::rename(dir.path(), to).map_err(failed)?;
                // It has gone from there.
                let _ = dir.keep();
                Ok(())
            }
            Form::Archive => {
                let mut file = tempfile::Builder::new()
                    .prefix(".export-")
                    .tempfile_in(parent_dir(to))
                    .map_err(failed)?;
                archive(&snapshot, file.as_file_mut()).map_err(failed)?;
                match file.persist_noclobber(to) {
                    Ok(_) => Ok(()),
                    Err(error) => Err(failed(error.error)),
                }
            }
        }
    }

    /// Takes a snapshot from a directory or archive into the store, verifying everything. A
    /// difference needs its parents there before it.
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
        let snapshot = Snapshot::open_as(staging.path(), label.clone(), Trust::Nothing)?;
        let layout = Layout::open(staging.path(), label.clone())?;
        let found = manifest::manifest_of_index(&label, &layout.document("index.json")?)?;
        let outline = snapshot.outline();
        keep_only(staging.path(), &snapshot)?;
        let parent = outline.parent.map(|parent| (parent, outline.memory_size));
        if let Some((parent, size)) = parent {
            crate::store::check_parent(self.root(), &label, parent, Some(size))?;
        }
        // The blobs were hashed and sealed by the opening.
        let how = Finish {
            durable: true,
            seal: false,
        };
        finish(staging, &found, &outline.manifest, parent, how)
    }
}

/// Removes blobs that an archive had and its manifest doesn't name.
fn keep_only(dir: &Path, snapshot: &Snapshot) -> Result<(), Error> {
    let blobs = dir.join(BLOBS);
    let failed = |error| Error::io("read", &blobs, error);
    let wanted: BTreeSet<_> = files(snapshot).into_iter().collect();
    for entry in std::fs::read_dir(&blobs).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if !wanted.contains(&format!("{BLOBS}{}", name.to_string_lossy())) {
            std::fs::remove_file(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

fn archive(snapshot: &Snapshot, out: &mut File) -> io::Result<()> {
    let mut tar = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, out));
    for name in files(snapshot) {
        let mut file = File::open(snapshot.path().join(&name))?;
        let mut header = tar::Header::new_gnu();
        header.set_size(file.metadata()?.len());
        header.set_mode(0o600);
        tar.append_data(&mut header, &name, &mut file)?;
    }
    tar.into_inner()?.flush()
}

/// Copies the blobs that a layout's manifest names, and nothing else.
fn copy_layout(from: &Path, to: &Path) -> Result<(), Error> {
    let label = from.display().to_string();
    let layout = Layout::open(from, label.clone())?;
    let index = layout.document("index.json")?;
    let found = manifest::manifest_of_index(&label, &index)?;
    let bytes = layout.blob("manifest", &found)?.bytes(DOCUMENT_MAX)?;
    let manifest = manifest::Manifest::decode(&label, &bytes)?;
    for (name, bytes) in [
        ("oci-layout", layout.document("oci-layout")?),
        ("index.json", index),
    ] {
        let path = to.join(name);
        std::fs::write(&path, bytes).map_err(|error| Error::io("write", &path, error))?;
    }
    let manifest_blob = ("manifest".to_owned(), &found);
    for (part, descriptor) in manifest.blobs().chain([manifest_blob]) {
        let mut blob = layout.blob(&part, descriptor)?;
        let path = blob_path(to, descriptor);
        let mut copy = || io::copy(&mut blob.file, &mut File::create(&path)?);
        copy().map_err(|error| Error::io("write", &path, error))?;
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
