//! Unpacking what a guest has packed: an archive that may be made to do harm.
//!
//! Every name is looked up below the folder that was named, by the kernel, with no symbolic link
//! followed on the way (`openat2`, `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`): neither `..`, an absolute
//! name, a link that the archive itself planted nor one that somebody plants meanwhile leads elsewhere.
//! Nothing is written through what is there already: a file is replaced, not opened.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use skerry_oci::tar::{Entry, EntryKind, Limits, Skip, TarReader};

/// What the archive's first name is to be called, and what of the rest is wanted.
#[derive(Clone, Debug, Default)]
pub(super) struct How {
    /// In place of the first part of each name; nothing where all goes into the folder itself.
    pub(super) rename: Option<PathBuf>,
    /// The archive is of what is in a folder: its names have no first part to be replaced.
    pub(super) contents: bool,
    /// Owners are kept, where that is allowed.
    pub(super) keep_owner: bool,
}

fn wrong(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Unpacks an archive below `folder`; gives the names of what was left out: devices, pipes.
pub(super) fn unpack(source: impl Skip, folder: &Path, how: &How) -> io::Result<Vec<PathBuf>> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let root = rustix::fs::open(folder, flags, Mode::empty())?;
    let mut reader = TarReader::new(source, Limits::default());
    let mut left_out = Vec::new();
    // A folder that can't be written would take nothing: their modes come last.
    let mut folders = Vec::new();
    while let Some(entry) = reader.next_entry().map_err(io::Error::other)? {
        let path = how.place(&entry.path)?;
        if path.as_os_str().is_empty() {
            continue;
        }
        let done = match entry.kind {
            EntryKind::Directory => {
                folders.push((path.clone(), entry.clone()));
                folder_at(&root, &path).map(drop)
            }
            EntryKind::File => file(&root, &path, &entry, how, &mut reader),
            EntryKind::Symlink => symlink(&root, &path, &entry, how),
            EntryKind::HardLink => hard_link(&root, &path, &how.place(&entry.link)?),
            EntryKind::CharDevice | EntryKind::BlockDevice | EntryKind::Fifo => {
                left_out.push(path.clone());
                Ok(())
            }
        };
        done.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    }
    for (path, entry) in folders.iter().rev() {
        let folder = beneath(&root, path, OFlags::DIRECTORY | OFlags::RDONLY)?;
        finish(&folder, entry, how)?;
    }
    Ok(left_out)
}

impl How {
    /// Where below the folder a name of the archive's belongs: no name leads out of it.
    fn place(&self, name: &[u8]) -> io::Result<PathBuf> {
        let name = Path::new(std::ffi::OsStr::from_bytes(name));
        let mut parts = PathBuf::new();
        for part in name.components() {
            match part {
                Component::Normal(part) => parts.push(part),
                Component::CurDir => {}
                Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                    let text = format!("{} is no name below a folder", name.display());
                    return Err(wrong(text));
                }
            }
        }
        let Some(top) = &self.rename else {
            return Ok(parts);
        };
        let mut rest = parts.components();
        if !self.contents {
            rest.next();
        }
        Ok(match rest.as_path() {
            rest if rest.as_os_str().is_empty() => top.clone(),
            rest => top.join(rest),
        })
    }
}

fn beneath(root: impl AsFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let path = match path.as_os_str().is_empty() {
        true => Path::new("."),
        false => path,
    };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::CLOEXEC;
    loop {
        match rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve) {
            // Somebody renames things meanwhile, and the kernel can't tell where it is.
            Err(Errno::AGAIN) => {}
            Err(Errno::LOOP) => {
                let text = "a symbolic link is where a folder should be".to_owned();
                return Err(wrong(text));
            }
            result => return Ok(result?),
        }
    }
}

/// The folder that a name is in, made where it doesn't exist, and the name in it.
fn parent<'a>(root: &OwnedFd, path: &'a Path) -> io::Result<(OwnedFd, &'a Path)> {
    let name = path.file_name().map(Path::new);
    let name = name.ok_or_else(|| wrong(format!("{} has no name", path.display())))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    Ok((folder_at(root, folder)?, name))
}

/// The folder of this name, made where it doesn't exist.
fn folder_at(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY;
    match beneath(root, path, flags) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => return result,
    }
    let mut done = PathBuf::new();
    for part in path {
        let above = beneath(root, &done, flags)?;
        match rustix::fs::mkdirat(&above, Path::new(part), Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        done.push(part);
    }
    beneath(root, path, flags)
}

/// Takes away what is not a folder.
fn clear(folder: &OwnedFd, name: &Path) -> io::Result<()> {
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => Err(wrong("a folder is where a file should be".to_owned())),
        Err(error) => Err(error.into()),
    }
}

fn file(
    root: &OwnedFd,
    path: &Path,
    entry: &Entry,
    how: &How,
    content: &mut impl Read,
) -> io::Result<()> {
    let (folder, name) = parent(root, path)?;
    clear(&folder, name)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&folder, name, flags, Mode::RUSR | Mode::WUSR)?;
    let mut file = File::from(file);
    match &entry.extents {
        None => {
            io::copy(&mut content.take(entry.size), &mut file)?;
        }
        Some(extents) => {
            for extent in extents {
                file.seek(SeekFrom::Start(extent.offset))?;
                io::copy(&mut content.take(extent.len), &mut file)?;
            }
        }
    }
    file.set_len(entry.size)?;
    file.flush()?;
    finish(&OwnedFd::from(file), entry, how)
}

fn symlink(root: &OwnedFd, path: &Path, entry: &Entry, how: &How) -> io::Result<()> {
    let (folder, name) = parent(root, path)?;
    clear(&folder, name)?;
    let target = Path::new(std::ffi::OsStr::from_bytes(&entry.link));
    rustix::fs::symlinkat(target, &folder, name)?;
    if how.keep_owner {
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(&folder, name, Some(uid), Some(gid), flags)?;
    }
    Ok(())
}

fn hard_link(root: &OwnedFd, path: &Path, target: &Path) -> io::Result<()> {
    let (folder, name) = parent(root, path)?;
    let (of, old) = parent(root, target)?;
    clear(&folder, name)?;
    // Without a flag to follow it, a symbolic link gets one more name itself.
    Ok(rustix::fs::linkat(
        &of,
        old,
        &folder,
        name,
        AtFlags::empty(),
    )?)
}

/// Owner, mode and time. That a program runs with another's rights is a guest's word, and not taken.
fn finish(file: &OwnedFd, entry: &Entry, how: &How) -> io::Result<()> {
    if how.keep_owner {
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        rustix::fs::fchown(file, Some(uid), Some(gid))?;
    }
    rustix::fs::fchmod(file, Mode::from_raw_mode(u32::from(entry.mode) & 0o1777))?;
    let time = Timespec {
        tv_sec: entry.mtime.seconds,
        tv_nsec: i64::from(entry.mtime.nanoseconds.min(999_999_999)),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(rustix::fs::futimens(file, &times)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use proptest::prelude::*;
    use skerry_oci::tar::Streaming;

    use super::*;

    /// Any entry, with names that a decent writer refuses.
    fn member(name: &str, kind: tar::EntryType, link: &str, content: &[u8]) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        let field = &mut header.as_old_mut().name;
        field[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o6755);
        header.set_uid(12345);
        header.set_gid(12345);
        header.set_mtime(1_000_000_000);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    fn run(members: &[Vec<u8>], to: &Path, how: &How) -> io::Result<Vec<PathBuf>> {
        let mut bytes = members.concat();
        bytes.resize(bytes.len() + 1024, 0);
        unpack(Streaming(&bytes[..]), to, how)
    }

    /// A folder to unpack to, beside one that nothing may reach.
    fn places() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let all = tempfile::tempdir().expect("folder");
        let (to, outside) = (all.path().join("to"), all.path().join("outside"));
        std::fs::create_dir(&to).expect("folder");
        std::fs::create_dir(&outside).expect("folder");
        std::fs::write(outside.join("secret"), b"as it was").expect("file");
        (all, to, outside)
    }

    fn untouched(outside: &Path) {
        let names: Vec<_> = std::fs::read_dir(outside).expect("it is there").collect();
        assert_eq!(names.len(), 1);
        let secret = std::fs::read(outside.join("secret")).expect("it is there");
        assert_eq!(secret, b"as it was");
    }

    #[test]
    fn what_is_packed_comes_out() {
        let (_all, to, _) = places();
        let members = [
            member("top/", tar::EntryType::Directory, "", b""),
            member("top/a", tar::EntryType::Regular, "", b"text"),
            member("top/b", tar::EntryType::Symlink, "../elsewhere", b""),
            member("top/c", tar::EntryType::Link, "top/a", b""),
            member("top/null", tar::EntryType::Char, "", b""),
        ];
        let how = How {
            rename: Some("new".into()),
            ..How::default()
        };
        let left_out = run(&members, &to, &how).expect("unpacked");
        assert_eq!(left_out, [PathBuf::from("new/null")]);
        let a = std::fs::metadata(to.join("new/a")).expect("a file");
        assert_eq!((a.mtime(), a.nlink()), (1_000_000_000, 2));
        assert_eq!(a.permissions().mode() & 0o7777, 0o755, "no set-id bits");
        assert_ne!(a.uid(), 12345);
        let link = std::fs::read_link(to.join("new/b")).expect("a link");
        assert_eq!(link, Path::new("../elsewhere"));
        assert_eq!(std::fs::read(to.join("new/c")).expect("a file"), b"text");
        // Again, over what is there.
        run(&members, &to, &how).expect("unpacked");
    }

    #[test]
    fn no_archive_reaches_what_is_beside_its_folder() {
        let (_all, to, outside) = places();
        let at = outside.to_str().expect("text");
        let escapes: [&[Vec<u8>]; 7] = [
            &[member("../outside/x", tar::EntryType::Regular, "", b"x")],
            &[member("/outside/x", tar::EntryType::Regular, "", b"x")],
            &[member(
                "a/../../outside/x",
                tar::EntryType::Regular,
                "",
                b"x",
            )],
            &[
                member("l", tar::EntryType::Symlink, at, b""),
                member("l/x", tar::EntryType::Regular, "", b"x"),
            ],
            &[
                member("l", tar::EntryType::Symlink, "..", b""),
                member("l/outside/x/", tar::EntryType::Directory, "", b""),
            ],
            &[member("x", tar::EntryType::Link, "../outside/secret", b"")],
            &[
                member("l", tar::EntryType::Symlink, at, b""),
                member("x", tar::EntryType::Link, "l/secret", b""),
            ],
        ];
        for members in escapes {
            let error = run(members, &to, &How::default());
            assert!(error.is_err(), "{members:?}");
            untouched(&outside);
        }
        // A link is replaced and not written through.
        let secret = outside.join("secret");
        run(
            &[
                member(
                    "s",
                    tar::EntryType::Symlink,
                    secret.to_str().expect("text"),
                    b"",
                ),
                member("s", tar::EntryType::Regular, "", b"new"),
            ],
            &to,
            &How::default(),
        )
        .expect("unpacked");
        untouched(&outside);
        assert_eq!(std::fs::read(to.join("s")).expect("a file"), b"new");
    }

    #[test]
    fn folders_that_turn_into_links_meanwhile_lead_nowhere() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let (_all, to, outside) = places();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (folder, aside) = (to.join("d"), to.join("aside"));
                while !done.load(Ordering::Relaxed) {
                    let _ = std::fs::rename(&folder, &aside);
                    let _ = std::os::unix::fs::symlink(&outside, &folder);
                    let _ = std::fs::remove_file(&folder);
                    let _ = std::fs::rename(&aside, &folder);
                }
            });
            let members = [
                member("d/", tar::EntryType::Directory, "", b""),
                member("d/x", tar::EntryType::Regular, "", b"x"),
            ];
            for _ in 0..300 {
                let _ = run(&members, &to, &How::default());
            }
            done.store(true, Ordering::Relaxed);
        });
        untouched(&outside);
    }

    proptest! {
        #[test]
        fn a_name_is_below_the_folder_or_refused(name in "[a/.]{0,12}", renamed in any::<bool>()) {
            let how = How { rename: renamed.then(|| "top".into()), ..How::default() };
            if let Ok(place) = how.place(name.as_bytes()) {
                let normal = |part| matches!(part, Component::Normal(_));
                prop_assert!(place.components().all(normal), "{place:?}");
                prop_assert!(!renamed || place.starts_with("top"));
            }
        }
    }
}
