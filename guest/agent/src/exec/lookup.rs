//! Finding the program of a command, with the errors that shells and container tools give.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use skerry_protocol::message::{ExecFailure, FailureKind};

use super::{failure, show};

/// What stands at a path, as far as running it goes.
enum Candidate {
    Program,
    Missing,
    NotRunnable(&'static str),
}

/// Path of the program `name`: itself when it has a `/`, else the first match in `path`.
///
/// A relative path is relative to `cwd`. A match that can't be run is remembered and reported
/// only when no other directory has the program, as shells do.
pub fn find(name: &[u8], path: &[u8], cwd: &Path) -> Result<PathBuf, ExecFailure> {
    if name.is_empty() {
        return Err(failure(FailureKind::NotFound, "Command is empty"));
    }
    if name.contains(&b'/') {
        let program = cwd.join(OsStr::from_bytes(name));
        return match examine(&program) {
            Candidate::Program => Ok(program),
            Candidate::Missing => Err(not_found(name, "there is no such file")),
            Candidate::NotRunnable(why) => Err(not_executable(name, why)),
        };
    }
    let mut blocked = None;
    for directory in path.split(|&byte| byte == b':') {
        // An empty element is the working directory (POSIX, XBD 8.3).
        let program = cwd
            .join(OsStr::from_bytes(directory))
            .join(OsStr::from_bytes(name));
        match examine(&program) {
            Candidate::Program => return Ok(program),
            Candidate::Missing => {}
            // A directory of that name is not a program that someone forgot to mark.
            Candidate::NotRunnable("it is a directory") => {}
            Candidate::NotRunnable(why) => blocked = blocked.or(Some(why)),
        }
    }
    Err(match blocked {
        Some(why) => not_executable(name, why),
        None => not_found(name, "it is in no directory of PATH"),
    })
}

fn examine(path: &Path) -> Candidate {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Candidate::NotRunnable("it is a directory"),
        Ok(metadata) if !metadata.is_file() => Candidate::NotRunnable("it is not a regular file"),
        Ok(metadata) if metadata.permissions().mode() & 0o111 == 0 => {
            Candidate::NotRunnable("it has no execute permission")
        }
        Ok(_) => Candidate::Program,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Candidate::NotRunnable("permission denied")
        }
        Err(_) => Candidate::Missing,
    }
}

fn not_found(name: &[u8], why: &str) -> ExecFailure {
    failure(
        FailureKind::NotFound,
        format!("Command \"{}\" not found: {why}", show(name)),
    )
}

fn not_executable(name: &[u8], why: &str) -> ExecFailure {
    let text = format!("Command \"{}\" cannot be executed: {why}", show(name));
    failure(FailureKind::NotExecutable, text)
}

/// What a failed `execve` of a program that was found means.
#[must_use]
pub fn exec_failure(name: &[u8], error: &io::Error) -> ExecFailure {
    match error.raw_os_error() {
        // The file is there, so what's missing is its interpreter or loader.
        Some(libc::ENOENT) => not_found(name, "its interpreter is missing"),
        Some(libc::ENOTDIR) => not_found(name, "there is no such file"),
        Some(libc::EACCES | libc::EPERM) => not_executable(name, "permission denied"),
        Some(libc::ENOEXEC) => not_executable(
            name,
            "not a format that this kernel runs (a script without \"#!\"?)",
        ),
        Some(libc::E2BIG) => not_executable(name, "arguments and environment are too long"),
        Some(libc::ENOMEM | libc::EAGAIN) => {
            let text = format!("No resources to run \"{}\": {error}", show(name));
            failure(FailureKind::Resources, text)
        }
        _ => not_executable(name, &error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn file(path: &Path, mode: u32) {
        fs::write(path, "").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn path_is_searched_in_order_and_a_blocked_match_is_reported_last() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        fs::create_dir_all(&a).unwrap();
        fs::create_dir_all(b.join("tool")).unwrap();
        file(&a.join("data"), 0o644);
        file(&b.join("data"), 0o755);
        file(&b.join("plain"), 0o644);
        let path = [a.as_os_str().as_bytes(), b.as_os_str().as_bytes()].join(&b':');
        let cwd = Path::new("/");
        assert_eq!(find(b"data", &path, cwd).unwrap(), b.join("data"));
        let kind = |name: &[u8]| find(name, &path, cwd).unwrap_err().kind;
        assert_eq!(kind(b"plain"), FailureKind::NotExecutable);
        assert_eq!(kind(b"tool"), FailureKind::NotFound);
        assert_eq!(kind(b"none"), FailureKind::NotFound);
        assert_eq!(kind(b""), FailureKind::NotFound);
    }

    #[test]
    fn a_name_with_a_slash_is_a_path_from_the_working_directory() {
        let directory = tempfile::tempdir().unwrap();
        file(&directory.path().join("run"), 0o755);
        file(&directory.path().join("data"), 0o644);
        let found = find(b"./run", b"/bin", directory.path()).unwrap();
        assert_eq!(
            fs::canonicalize(found).unwrap(),
            directory.path().join("run")
        );
        let kind = |name: &[u8]| find(name, b"/bin", directory.path()).unwrap_err().kind;
        assert_eq!(kind(b"./data"), FailureKind::NotExecutable);
        assert_eq!(kind(b"./"), FailureKind::NotExecutable);
        assert_eq!(kind(b"./gone"), FailureKind::NotFound);
        assert_eq!(kind(b"/dev/null"), FailureKind::NotExecutable);
    }
}
