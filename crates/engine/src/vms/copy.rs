//! Files into a guest and out of it, as archives that the agent's program makes and takes.
//!
//! ```text
//!  out:  guest: pack ── tar ──► unpack (hostile) ─► folder of the host
//!  in:   folder of the host ─► tar::Builder ── tar ──► guest: unpack
//! ```

use std::fs::{self, Metadata};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use skerry_oci::tar::Streaming;

use super::info::VmInfo;
use super::registry::Registry;
use super::{tools, unpack};
use crate::error::EngineError;

const BUFFER: usize = 256 << 10;

/// How files are copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyOptions {
    /// Owners are kept; otherwise what comes is the copier's, and in a guest root's.
    pub keep_owner: bool,
    /// A symbolic link that is named stands for what it points to.
    pub follow: bool,
}

/// A path in a guest.
struct GuestPath {
    /// From the root.
    path: String,
    /// What is in it is meant, and not itself.
    contents: bool,
    /// It can only be a folder.
    folder: bool,
}

impl GuestPath {
    fn new(text: &str) -> Self {
        let path = match text.starts_with('/') {
            true => text.to_owned(),
            false => format!("/{text}"),
        };
        let contents = path.ends_with("/.") || path == "/";
        let folder = contents || path.ends_with('/');
        let plain = path
            .strip_suffix("/.")
            .unwrap_or(&path)
            .trim_end_matches('/');
        let path = if plain.is_empty() { "/" } else { plain }.to_owned();
        Self {
            path,
            contents,
            folder,
        }
    }

    /// Its folder and its name.
    fn split(&self) -> (&str, &str) {
        match self.path.rsplit_once('/') {
            Some(("", name)) => ("/", name),
            Some(parts) => parts,
            None => ("/", &self.path),
        }
    }

    fn to_pack(&self) -> String {
        match (self.contents, self.path.as_str()) {
            (true, "/") => "/.".to_owned(),
            (true, path) => format!("{path}/."),
            (false, path) => path.to_owned(),
        }
    }
}

/// A machine whose files can be reached.
pub(super) fn running(registry: &Registry, name: &str) -> Result<VmInfo, EngineError> {
    let info = registry.find(name)?;
    match info.state.status.is_alive() {
        true => Ok(info),
        false => Err(EngineError::CopyStopped {
            name: info.config.name,
        }),
    }
}

pub(super) fn kind(registry: &Registry, info: &VmInfo, path: &str) -> Result<String, EngineError> {
    let kind = tools::answer(registry, info, &["kind", path])?;
    Ok(kind.trim_end().to_owned())
}

fn refused(path: impl std::fmt::Display, problem: &'static str) -> EngineError {
    EngineError::Copy {
        path: path.to_string(),
        problem,
    }
}

pub(super) fn copying(error: io::Error) -> EngineError {
    EngineError::host("copy files")(error)
}

/// Writes an archive of a file or folder of a guest; `PATH/.` is what is in it.
pub fn archive_out(
    registry: &Registry,
    name: &str,
    path: &str,
    options: CopyOptions,
    out: Box<dyn Write + Send>,
) -> Result<(), EngineError> {
    let info = running(registry, name)?;
    let path = GuestPath::new(path).to_pack();
    let mut words = vec!["pack", &path];
    if options.follow {
        words.push("follow");
    }
    tools::run(registry, &info, &words, None, out)
}

/// Unpacks an archive in a folder of a guest.
pub fn archive_in(
    registry: &Registry,
    name: &str,
    folder: &str,
    options: CopyOptions,
    archive: Box<dyn Read + Send>,
) -> Result<(), EngineError> {
    let info = running(registry, name)?;
    let folder = GuestPath::new(folder).path;
    if !is_folder(&kind(registry, &info, &folder)?) {
        return Err(refused(folder, "is no folder of the guest"));
    }
    let mut words = vec!["unpack", &folder];
    if options.keep_owner {
        words.push("keep-owner");
    }
    tools::run(registry, &info, &words, Some(archive), Box::new(io::sink()))
}

fn is_folder(kind: &str) -> bool {
    kind == "directory" || kind == "link-to-directory"
}

/// Copies a file or folder out of a guest: into `to` if that is a folder, else under that name. Gives
/// what can't be copied: devices and pipes.
pub fn copy_out(
    registry: &Registry,
    name: &str,
    from: &str,
    to: &Path,
    options: CopyOptions,
) -> Result<Vec<PathBuf>, EngineError> {
    let info = running(registry, name)?;
    let path = GuestPath::new(from);
    let found = kind(registry, &info, &path.path)?;
    let folder = match found.as_str() {
        "missing" => return Err(refused(from, "is not there in the guest")),
        "link-to-directory" => options.follow || path.folder,
        other => other == "directory",
    };
    if path.folder && !folder {
        return Err(refused(from, "is no folder of the guest"));
    }
    let (folder, rename) = target(to, path.split().1, folder, path.contents)?;
    let (reader, writer) = io::pipe().map_err(copying)?;
    let packing = {
        let (registry, name, from) = (registry.clone(), info.config.id, from.to_owned());
        let out = Box::new(writer);
        let thread = std::thread::Builder::new().name("copy".to_owned());
        thread.spawn(move || archive_out(&registry, &name, &from, options, out))
    };
    let packing = packing.map_err(copying)?;
    let how = unpack::How {
        rename,
        contents: path.contents,
        keep_owner: options.keep_owner,
    };
    let reader = BufReader::with_capacity(BUFFER, reader);
    let unpacked = unpack::unpack(Streaming(reader), &folder, &how);
    match unpacked {
        Ok(left_out) => {
            let packed = packing.join();
            packed.map_err(|_| copying(io::ErrorKind::BrokenPipe.into()))??;
            Ok(left_out)
        }
        // Why the guest stopped says more than where.
        Err(_) if packing.is_finished() => match packing.join() {
            Ok(Err(error)) => Err(error),
            _ => unpacked.map_err(copying),
        },
        Err(error) => Err(copying(error)),
    }
}

/// The folder of the host to unpack in, and what the archive's top is called there.
fn target(
    to: &Path,
    name: &str,
    folder: bool,
    contents: bool,
) -> Result<(PathBuf, Option<PathBuf>), EngineError> {
    match fs::metadata(to) {
        Ok(there) if there.is_dir() => {
            let rename = (!contents).then(|| PathBuf::from(name));
            return Ok((to.to_owned(), rename));
        }
        Ok(_) if folder => return Err(refused(to.display(), "is no folder")),
        Err(_) if !folder && to.as_os_str().as_encoded_bytes().ends_with(b"/") => {
            return Err(refused(to.display(), "is a folder that doesn't exist"));
        }
        _ => {}
    }
    let name = to.file_name();
    let name = name.ok_or_else(|| refused(to.display(), "names no file"))?;
    let above = match to.parent() {
        Some(above) if !above.as_os_str().is_empty() => above,
        _ => Path::new("."),
    };
    Ok((above.to_owned(), Some(PathBuf::from(name))))
}

/// Copies a file or folder of the host into a guest: into `to` if that is a folder, else under that
/// name.
pub fn copy_in(
    registry: &Registry,
    name: &str,
    from: &Path,
    to: &str,
    options: CopyOptions,
) -> Result<(), EngineError> {
    let info = running(registry, name)?;
    let text = from.as_os_str().as_encoded_bytes();
    let contents = text.ends_with(b"/.") || text == b"." || from == Path::new("/");
    let follow = options.follow || contents || text.ends_with(b"/");
    let metadata = match follow {
        true => fs::metadata(from),
        false => fs::symlink_metadata(from),
    };
    let metadata = metadata.map_err(copying_named(from)).map_err(copying)?;
    let path = GuestPath::new(to);
    let (above, last) = path.split();
    let (folder, top) = match kind(registry, &info, &path.path)?.as_str() {
        found if is_folder(found) => {
            let own = from.file_name().map(PathBuf::from);
            let top = own.filter(|_| !contents).unwrap_or_else(|| ".".into());
            (path.path.as_str(), top)
        }
        "missing" if path.folder && !metadata.is_dir() => {
            return Err(refused(to, "is a folder that doesn't exist"));
        }
        "missing" if !is_folder(&kind(registry, &info, above)?) => {
            return Err(refused(above, "is no folder of the guest"));
        }
        "missing" => (above, PathBuf::from(last)),
        _ if metadata.is_dir() || path.folder => return Err(refused(to, "is no folder")),
        _ => (above, PathBuf::from(last)),
    };
    let (reader, writer) = io::pipe().map_err(copying)?;
    let from = from.to_owned();
    let thread = std::thread::Builder::new().name("copy".to_owned());
    let packing = thread.spawn(move || {
        let mut archive = tar::Builder::new(BufWriter::with_capacity(BUFFER, writer));
        add(&mut archive, &from, &top, follow)?;
        archive.into_inner()?.flush()
    });
    let packing = packing.map_err(copying)?;
    let taken = archive_in(registry, &info.config.id, folder, options, Box::new(reader));
    match packing.join() {
        // It stopped because nobody took any more.
        Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => taken,
        Ok(Err(error)) => Err(copying(error)),
        Ok(Ok(())) => taken,
        Err(_) => Err(copying(io::ErrorKind::BrokenPipe.into())),
    }
}

fn copying_named(path: &Path) -> impl Fn(io::Error) -> io::Error + '_ {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Adds a file, or a folder with all that is in it.
fn add<W: Write>(
    archive: &mut tar::Builder<W>,
    path: &Path,
    name: &Path,
    follow: bool,
) -> io::Result<()> {
    let named = copying_named(path);
    let metadata: Metadata = match follow {
        true => fs::metadata(path),
        false => fs::symlink_metadata(path),
    }
    .map_err(&named)?;
    if metadata.file_type().is_socket() {
        // It is nothing without its process.
        return Ok(());
    }
    archive.follow_symlinks(follow);
    if !metadata.is_dir() {
        return archive.append_path_with_name(path, name).map_err(&named);
    }
    archive.append_dir(name, path).map_err(&named)?;
    for entry in fs::read_dir(path).map_err(&named)? {
        let entry = entry?;
        add(archive, &entry.path(), &name.join(entry.file_name()), false)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_a_guest_are_from_its_root() {
        let path = |text| {
            let path = GuestPath::new(text);
            let (folder, name) = path.split();
            let (folder, name) = (folder.to_owned(), name.to_owned());
            (path.to_pack(), folder, name, path.folder)
        };
        let wanted = |pack: &str, folder: &str, name: &str, is: bool| {
            (pack.to_owned(), folder.to_owned(), name.to_owned(), is)
        };
        assert_eq!(
            path("etc/hosts"),
            wanted("/etc/hosts", "/etc", "hosts", false)
        );
        assert_eq!(path("/etc/"), wanted("/etc", "/", "etc", true));
        assert_eq!(path("/etc/."), wanted("/etc/.", "/", "etc", true));
        assert_eq!(path("/").0, "/.");
        assert_eq!(path("").0, "/.");
    }

    #[test]
    fn a_target_is_a_folder_or_a_new_name() {
        let folder = tempfile::tempdir().expect("folder");
        let at = folder.path();
        fs::write(at.join("file"), b"").expect("file");
        let into = target(at, "a", false, false).expect("a folder");
        assert_eq!(into, (at.to_owned(), Some("a".into())));
        assert_eq!(target(at, "a", true, true).expect("a folder").1, None);
        let over = target(&at.join("file"), "a", false, false).expect("a file");
        assert_eq!(over, (at.to_owned(), Some("file".into())));
        let new = target(&at.join("new"), "a", true, true).expect("a name");
        assert_eq!(new, (at.to_owned(), Some("new".into())));
        assert!(target(&at.join("file"), "a", true, false).is_err());
        assert!(target(&at.join("new/"), "a", false, false).is_err());
    }
}
