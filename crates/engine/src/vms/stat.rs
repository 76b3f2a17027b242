//! What a file of a guest is, without its content.

use std::io;

use super::copy::{CopyOptions, archive_out, copying, kind, running};
use super::registry::Registry;
use crate::error::EngineError;

/// What a path in a guest leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathStat {
    /// What it is.
    pub kind: PathKind,
    /// Bytes of a file.
    pub size: u64,
    /// Permissions, with the bits for set-user-ID, set-group-ID and sticky (inode(7)).
    pub mode: u32,
    /// When it was changed last, in seconds since 1970.
    pub modified: u64,
    /// Where a symbolic link points to.
    pub target: Option<String>,
}

/// A kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// A folder.
    Folder,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
    /// A device or a pipe.
    Other,
}

/// What a path in a guest leads to, itself and not what it points to; `None`: nothing is there.
pub fn stat(registry: &Registry, name: &str, path: &str) -> Result<Option<PathStat>, EngineError> {
    let info = running(registry, name)?;
    let bare = path.trim_end_matches("/.");
    let bare = if bare.is_empty() { "/" } else { bare };
    if kind(registry, &info, bare)? == "missing" {
        return Ok(None);
    }
    // An archive begins with what it is of; nobody takes the rest.
    let (reader, writer) = io::pipe().map_err(copying)?;
    let packing = {
        let (registry, id, path) = (registry.clone(), info.config.id, path.to_owned());
        let thread = std::thread::Builder::new().name("stat".to_owned());
        thread.spawn(move || {
            let options = CopyOptions::default();
            archive_out(&registry, &id, &path, options, Box::new(writer))
        })
    };
    let packing = packing.map_err(copying)?;
    let found = first(reader);
    match (packing.join(), found) {
        (_, Ok(Some(found))) => Ok(Some(found)),
        (Ok(Err(error)), _) => Err(error),
        (_, Err(error)) => Err(copying(error)),
        // It went meanwhile.
        _ => Ok(None),
    }
}

/// The first file of an archive, which comes from a guest: whatever it says, it is only told.
fn first(archive: impl io::Read) -> io::Result<Option<PathStat>> {
    const MODES: u32 = 0o7777;
    let mut archive = tar::Archive::new(archive);
    let Some(entry) = archive.entries()?.next() else {
        return Ok(None);
    };
    let entry = entry?;
    let header = entry.header();
    let kind = match header.entry_type() {
        tar::EntryType::Directory => PathKind::Folder,
        tar::EntryType::Symlink => PathKind::Link,
        tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
            PathKind::File
        }
        _ => PathKind::Other,
    };
    let target = entry.link_name()?;
    let target = target.filter(|_| kind == PathKind::Link);
    Ok(Some(PathStat {
        kind,
        size: entry.size(),
        mode: header.mode()? & MODES,
        modified: header.mtime()?,
        target: target.map(|target| target.to_string_lossy().into_owned()),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_tells_what_it_is_of() {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o104_755);
        header.set_size(5);
        header.set_mtime(1_700_000_000);
        header.set_cksum();
        archive
            .append_data(&mut header, "hosts", &b"hello"[..])
            .unwrap();
        let bytes = archive.into_inner().unwrap();
        let found = first(&*bytes).unwrap().unwrap();
        assert_eq!(
            (found.kind, found.size, found.mode),
            (PathKind::File, 5, 0o4755)
        );
        assert_eq!((found.modified, found.target), (1_700_000_000, None));
        assert_eq!(first(&[0; 1024][..]).unwrap(), None);
        for bad in [&b"nonsense"[..], &[7; 512]] {
            assert!(first(bad).is_err());
        }
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_mode(0o777);
        header.set_mtime(0);
        header.set_size(0);
        archive
            .append_link(&mut header, "link", "to/there")
            .unwrap();
        let found = first(&*archive.into_inner().unwrap()).unwrap().unwrap();
        assert_eq!(found.target.as_deref(), Some("to/there"));
    }
}
