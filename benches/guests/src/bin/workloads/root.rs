//! The way into the root file system that benches/images.sh made.
#![expect(unsafe_code, reason = "raw system calls for mounts and namespaces")]

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

const DISK: &str = "/dev/vda";
const ROOT: &str = "/mnt";

/// As process 1: the first disk becomes the root.
pub fn enter_disk() -> Result<(), String> {
    fs::create_dir_all(ROOT).map_err(|e| format!("{ROOT}: {e}"))?;
    mount("devtmpfs", "/dev", "devtmpfs", 0)?;
    // Its driver may still be looking for it.
    let start = Instant::now();
    while !Path::new(DISK).exists() {
        if start.elapsed() > Duration::from_secs(20) {
            return Err(format!("there is no {DISK}"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    mount(DISK, ROOT, "ext4", libc::MS_RDONLY)?;
    mount("devtmpfs", &format!("{ROOT}/dev"), "devtmpfs", 0)?;
    enter(Path::new(ROOT))
}

/// On the host: `folder` becomes this process's root, and its mounts its own. Without privilege in a
/// user namespace, whose root is the caller.
pub fn enter_natively(folder: &Path) -> Result<(), String> {
    // SAFETY: system calls without pointers.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    let mut spaces = libc::CLONE_NEWNS;
    if user != 0 {
        spaces |= libc::CLONE_NEWUSER;
    }
    // SAFETY: a system call without pointers.
    if unsafe { libc::unshare(spaces) } != 0 {
        return Err(format!(
            "namespaces: {}: run it as root",
            io::Error::last_os_error()
        ));
    }
    if user != 0 {
        for (file, text) in [
            ("setgroups", "deny".to_owned()),
            ("uid_map", format!("0 {user} 1")),
            ("gid_map", format!("0 {group} 1")),
        ] {
            fs::write(format!("/proc/self/{file}"), text).map_err(|e| format!("{file}: {e}"))?;
        }
    }
    mount("none", "/", "", libc::MS_REC | libc::MS_PRIVATE)?;
    let dev = folder.join("dev");
    mount(
        "/dev",
        &dev.to_string_lossy(),
        "",
        libc::MS_BIND | libc::MS_REC,
    )?;
    // A process of a user namespace alone can't mount another /proc, but bind the host's.
    let proc = folder.join("proc");
    mount(
        "/proc",
        &proc.to_string_lossy(),
        "",
        libc::MS_BIND | libc::MS_REC,
    )?;
    enter(folder)
}

fn enter(folder: &Path) -> Result<(), String> {
    let at = |name: &str| folder.join(name).to_string_lossy().into_owned();
    mount("tmpfs", &at("tmp"), "tmpfs", 0)?;
    if !folder.join("proc/version").exists() {
        mount("proc", &at("proc"), "proc", 0)?;
    }
    let path = CString::new(folder.as_os_str().as_bytes()).map_err(|e| e.to_string())?;
    // SAFETY: the string lives across the call.
    if unsafe { libc::chroot(path.as_ptr()) } != 0 {
        return Err(format!("chroot: {}", io::Error::last_os_error()));
    }
    std::env::set_current_dir("/").map_err(|e| e.to_string())
}

fn mount(from: &str, to: &str, kind: &str, flags: libc::c_ulong) -> Result<(), String> {
    let text = |s: &str| CString::new(s).map_err(|e| e.to_string());
    let (source, target, kind) = (text(from)?, text(to)?, text(kind)?);
    // SAFETY: the strings live across the call; there is no data.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            std::ptr::null(),
        )
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        // The kernel may have mounted it already.
        if error.raw_os_error() == Some(libc::EBUSY) {
            return Ok(());
        }
        return Err(format!("mount {from} at {to}: {error}"));
    }
    Ok(())
}
