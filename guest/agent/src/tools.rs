//! What the host runs of this program beside process 1, as `/proc/1/exe VERB …`: things that an image may
//! have no program for.
//!
//! ```text
//!   processes                      a line for each process: fields with tabs between
//!   pack PATH [follow]             a tar archive of PATH on stdout; PATH/. for what is in it
//!   unpack FOLDER [keep-owner]     the tar archive on stdin, below FOLDER
//!   kind PATH                      directory, file, link, other or missing
//!   connect PORT                   whether a connection to a TCP port of this guest is accepted
//! ```

use std::fs::{self, Metadata};
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Runs a verb; gives the exit status, or nothing where there is no such verb.
pub fn run(words: &[String]) -> Option<i32> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["processes"] => processes(),
        ["pack", path] => pack(path, false),
        ["pack", path, "follow"] => pack(path, true),
        ["unpack", folder] => unpack(Path::new(folder), false),
        ["unpack", folder, "keep-owner"] => unpack(Path::new(folder), true),
        ["connect", port] => connect(port),
        ["kind", path] => kind(Path::new(path)),
        _ => return None,
    };
    Some(match done {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{error}");
            1
        }
    })
}

fn named(path: &Path) -> impl Fn(io::Error) -> io::Error + '_ {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Prints pid, parent, user, state, kilobytes of memory, processor time and age in milliseconds, command.
fn processes() -> io::Result<()> {
    let uptime = fs::read_to_string("/proc/uptime")?;
    let uptime: f64 = field(&uptime, 0).unwrap_or(0.0);
    let mut out = io::stdout().lock();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // One that has ended meanwhile is none.
        if let Some(line) = process(pid, uptime) {
            out.write_all(line.as_bytes())?;
        }
    }
    out.flush()
}

fn field<T: std::str::FromStr>(text: &str, number: usize) -> Option<T> {
    text.split_ascii_whitespace().nth(number)?.parse().ok()
}

fn process(pid: u32, uptime: f64) -> Option<String> {
    /// The kernel's `USER_HZ` on x86.
    const TICKS: u64 = 100;
    const PAGE_KB: u64 = 4;
    let folder = PathBuf::from(format!("/proc/{pid}"));
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    // proc_pid_stat(5): the name is in parentheses, and may have some itself.
    let (head, rest) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1;
    let state = rest.split_ascii_whitespace().next()?;
    let parent: u32 = field(rest, 1)?;
    let ticks: u64 = field::<u64>(rest, 11)?.saturating_add(field(rest, 12)?);
    let started: u64 = field(rest, 19)?;
    let memory = field::<u64>(rest, 21)?.saturating_mul(PAGE_KB);
    let user = fs::metadata(&folder).ok()?.uid();
    let age = (uptime * 1000.0 - (started * 1000 / TICKS) as f64).max(0.0) as u64;
    let command = fs::read(folder.join("cmdline")).unwrap_or_default();
    let command = match command.strip_suffix(b"\0") {
        Some(words) => String::from_utf8_lossy(words).replace('\0', " "),
        // A thread of the kernel has no command line.
        None => format!("[{name}]"),
    };
    let command: String = command
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let cpu = ticks * 1000 / TICKS;
    Some(format!(
        "{pid}\t{parent}\t{user}\t{state}\t{memory}\t{cpu}\t{age}\t{command}\n"
    ))
}

fn connect(port: &str) -> io::Result<()> {
    /// As the host's network has it: see crates/net/src/address.rs.
    const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
    const PATIENCE: Duration = Duration::from_secs(1);
    let port: u16 = port.parse().map_err(io::Error::other)?;
    let addresses = [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        Ipv6Addr::LOCALHOST.into(),
        OWN.into(),
    ];
    let mut result = Ok(());
    for address in addresses {
        result = TcpStream::connect_timeout(&(address, port).into(), PATIENCE).map(drop);
        if result.is_ok() {
            break;
        }
    }
    result
}

fn kind(path: &Path) -> io::Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => "directory",
        Ok(metadata) if metadata.is_file() => "file",
        Ok(metadata) if metadata.is_symlink() => match fs::metadata(path) {
            Ok(target) if target.is_dir() => "link-to-directory",
            _ => "link",
        },
        Ok(_) => "other",
        Err(error) if error.kind() == io::ErrorKind::NotFound => "missing",
        Err(error) => return Err(named(path)(error)),
    };
    writeln!(io::stdout(), "{kind}")
}

/// Writes an archive of a file or a folder under its own name; of what is in a folder where the path
/// ends in a dot. With `follow`, a symbolic link stands for what it points to.
fn pack(path: &str, follow: bool) -> io::Result<()> {
    let (contents, path) = match path.strip_suffix("/.") {
        Some(folder) => (
            true,
            Path::new(if folder.is_empty() { "/" } else { folder }),
        ),
        None => (path == "/", Path::new(path)),
    };
    let name = match path.file_name() {
        Some(name) if !contents => PathBuf::from(name),
        _ => PathBuf::from("."),
    };
    let out = io::BufWriter::with_capacity(256 << 10, io::stdout().lock());
    let mut archive = tar::Builder::new(out);
    add(&mut archive, path, &name, contents || follow)?;
    archive.into_inner()?.flush()
}

fn add<W: Write>(
    archive: &mut tar::Builder<W>,
    path: &Path,
    name: &Path,
    follow: bool,
) -> io::Result<()> {
    let metadata = match follow {
        true => fs::metadata(path),
        false => fs::symlink_metadata(path),
    };
    let metadata: Metadata = metadata.map_err(named(path))?;
    if metadata.file_type().is_socket() {
        // It is nothing without its process.
        return Ok(());
    }
    archive.follow_symlinks(follow);
    if !metadata.is_dir() {
        return archive
            .append_path_with_name(path, name)
            .map_err(named(path));
    }
    archive.append_dir(name, path).map_err(named(path))?;
    let mut entries: Vec<_> = fs::read_dir(path)
        .map_err(named(path))?
        .collect::<Result<_, _>>()
        .map_err(named(path))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let below = entry.path();
        match add(archive, &below, &name.join(entry.file_name()), false) {
            // It has gone meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !exists(&below) => {}
            result => result?,
        }
    }
    Ok(())
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn unpack(folder: &Path, keep_owner: bool) -> io::Result<()> {
    let mut archive =
        tar::Archive::new(io::BufReader::with_capacity(256 << 10, io::stdin().lock()));
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_preserve_ownerships(keep_owner);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path_bytes().into_owned();
        let path = Path::new(std::ffi::OsStr::from_bytes(&name)).to_owned();
        let unpacked = entry.unpack_in(folder).map_err(named(&path))?;
        if !unpacked {
            let text = format!("{} is no place below {}", path.display(), folder.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found_among_the_others() {
        let line = process(std::process::id(), 1e9).expect("it lives");
        let fields: Vec<&str> = line.trim_end().split('\t').collect();
        assert_eq!(fields.len(), 8, "{line}");
        assert_eq!(fields[0], std::process::id().to_string());
        assert!(fields[4].parse::<u64>().expect("memory") > 100);
        assert!(process(u32::MAX, 0.0).is_none());
    }

    #[test]
    fn no_verb_is_left_to_process_one() {
        assert_eq!(run(&[]), None);
        assert_eq!(run(&["pack".to_owned()]), None);
    }

    #[test]
    fn an_archive_has_names_from_the_last_part_of_the_path() {
        let folder = tempfile::tempdir().expect("folder");
        let top = folder.path().join("top");
        fs::create_dir(&top).expect("folder");
        fs::write(top.join("file"), b"text").expect("file");
        std::os::unix::fs::symlink("/nowhere", top.join("link")).expect("link");
        let _socket = std::os::unix::net::UnixListener::bind(top.join("socket")).expect("socket");
        let mut archive = tar::Builder::new(Vec::new());
        add(&mut archive, &top, Path::new("top"), false).expect("packed");
        let bytes = archive.into_inner().expect("bytes");
        let mut archive = tar::Archive::new(&bytes[..]);
        let names: Vec<_> = archive
            .entries()
            .expect("entries")
            .map(|entry| entry.expect("entry").path().expect("path").into_owned())
            .collect();
        let wanted = ["top", "top/file", "top/link"].map(PathBuf::from);
        assert_eq!(names, wanted);
    }
}
