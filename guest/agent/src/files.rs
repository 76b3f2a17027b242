//! The few files and settings of a guest that follow from its set-up and not from its image.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use skerry_protocol::message::Setup;

use crate::log;

/// Kernel settings: what container tools set for their containers, then rest for a guest that idles
/// (by default memory is looked over for compaction twice a second, and statistics are gathered every
/// second: Linux, admin-guide/sysctl/vm).
const SETTINGS: [(&str, &str); 4] = [
    ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
    ("/proc/sys/vm/compaction_proactiveness", "0"),
    ("/proc/sys/vm/stat_interval", "60"),
];

/// Writes names and settings under `root`.
///
/// None of it is worth failing for: an image may have a directory in such a place.
pub fn write(root: &Path, setup: &Setup) {
    let attempts = [
        ("/etc/hostname", hostname(root, setup)),
        ("/etc/hosts", hosts(root, &setup.hostname, &[])),
        ("/etc/resolv.conf", resolv_conf(root, &setup.nameservers)),
        ("/tmp", tmp(root)),
    ];
    for (what, result) in attempts {
        if let Err(error) = result {
            log::error(format_args!("{what}: {error}"));
        }
    }
}

/// Sets what the kernel keeps.
pub fn apply_settings(setup: &Setup) {
    if let Err(error) = rustix::system::sethostname(setup.hostname.as_bytes()) {
        log::error(format_args!("host name \"{}\": {error}", setup.hostname));
    }
    for (path, value) in SETTINGS {
        // A kernel without that setting has nothing to set.
        let _ = fs::write(path, value);
    }
    if rustix::system::uname()
        .release()
        .to_bytes()
        .ends_with(b"-skerry")
    {
        let _ = fs::write("/proc/sys/kernel/modules_disabled", "1");
    }
}

/// Makes this guest one of its own, after it was restored from a state that others share: the clock
/// and the entropy are taken care of, so this is its names.
pub fn become_clone(setup: &Setup) {
    let current = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    if current != setup.hostname {
        if let Err(error) = rustix::system::sethostname(setup.hostname.as_bytes()) {
            log::error(format_args!("host name \"{}\": {error}", setup.hostname));
        }
        write(Path::new("/"), setup);
    }
    set_addresses(&setup.hostname, &[]);
    if let Err(error) = machine_id() {
        log::error(format_args!("/etc/machine-id: {error}"));
    }
}

/// Another machine id (machine-id(5)) where there is one: an empty or missing file means that whoever
/// needs one makes it.
fn machine_id() -> io::Result<()> {
    const DIGITS: usize = 32;
    let path = Path::new("/etc/machine-id");
    match fs::read(path) {
        Ok(old) if old.trim_ascii().len() == DIGITS => {}
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    // Sixteen random bytes with the marks of a version 4 UUID, as systemd makes them.
    let id = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    let id: String = id.chars().filter(char::is_ascii_hexdigit).collect();
    replace(path, &format!("{id}\n"))
}

fn hostname(root: &Path, setup: &Setup) -> io::Result<()> {
    replace(&root.join("etc/hostname"), &format!("{}\n", setup.hostname))
}

/// What was written to `/etc/hosts` last.
static HOSTS: Mutex<String> = Mutex::new(String::new());

/// Has a name of the guest's own stand for the addresses at which others reach it, if there are any.
pub fn set_addresses(hostname: &str, addresses: &[String]) {
    if let Err(error) = hosts(Path::new("/"), hostname, addresses) {
        log::error(format_args!("/etc/hosts: {error}"));
    }
}

/// Images made by container tools have an empty file in this place; one with anything in it that isn't
/// from here is left alone.
fn hosts(root: &Path, hostname: &str, addresses: &[String]) -> io::Result<()> {
    let path = root.join("etc/hosts");
    let text = hosts_text(hostname, addresses);
    let mut last = HOSTS.lock().unwrap_or_else(PoisonError::into_inner);
    let current = fs::read(&path).unwrap_or_default();
    if current == text.as_bytes() || !current.is_empty() && current != last.as_bytes() {
        return Ok(());
    }
    replace(&path, &text)?;
    *last = text;
    Ok(())
}

fn hosts_text(hostname: &str, addresses: &[String]) -> String {
    let loopback = match addresses {
        [] => format!(" {hostname}"),
        _ => String::new(),
    };
    let mut text = format!(
        "127.0.0.1\tlocalhost{loopback}\n::1\tlocalhost ip6-localhost ip6-loopback{loopback}\n"
    );
    for address in addresses.iter().filter_map(|text| text.split('/').next()) {
        text.push_str(&format!("{address}\t{hostname}\n"));
    }
    text
}

/// Has the guest ask these name servers, if there are any.
pub fn set_nameservers(servers: &[String]) {
    if let Err(error) = resolv_conf(Path::new("/"), servers) {
        log::error(format_args!("/etc/resolv.conf: {error}"));
    }
}

fn resolv_conf(root: &Path, servers: &[String]) -> io::Result<()> {
    if servers.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = servers
        .iter()
        .map(|server| format!("nameserver {server}\n"))
        .collect();
    replace(&root.join("etc/resolv.conf"), &lines.concat())
}

fn tmp(root: &Path) -> io::Result<()> {
    let path = root.join("tmp");
    if path.exists() {
        return Ok(());
    }
    fs::create_dir(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o1777))
}

/// Puts a regular file in a place, whatever link was there.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink()) {
        fs::remove_file(path)?;
    }
    fs::write(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup() -> Setup {
        Setup {
            hostname: "box".to_owned(),
            nameservers: vec!["10.0.2.3".to_owned(), "fd00::3".to_owned()],
            ..Setup::default()
        }
    }

    #[test]
    fn an_empty_root_gets_its_files() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), &setup());
        let read = |name: &str| fs::read_to_string(root.path().join(name)).unwrap();
        assert_eq!(read("etc/hostname"), "box\n");
        assert!(read("etc/hosts").starts_with("127.0.0.1\tlocalhost box\n"));
        assert_eq!(
            read("etc/resolv.conf"),
            "nameserver 10.0.2.3\nnameserver fd00::3\n"
        );
        let mode = fs::metadata(root.path().join("tmp"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o1777);
    }

    #[test]
    fn an_image_keeps_its_hosts_and_loses_a_dangling_resolver() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        fs::create_dir(&etc).unwrap();
        fs::write(etc.join("hosts"), "mine\n").unwrap();
        std::os::unix::fs::symlink("/run/gone/stub.conf", etc.join("resolv.conf")).unwrap();
        write(root.path(), &setup());
        assert_eq!(fs::read_to_string(etc.join("hosts")).unwrap(), "mine\n");
        let text = fs::read_to_string(etc.join("resolv.conf")).unwrap();
        assert!(text.starts_with("nameserver 10.0.2.3"));
    }

    #[test]
    fn a_shared_address_is_the_guests_own() {
        let text = hosts_text("db", &["10.89.0.2/24".to_owned()]);
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"), "{text}");
        assert!(text.ends_with("\n10.89.0.2\tdb\n"), "{text}");
    }

    #[test]
    fn without_name_servers_the_resolver_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        write(
            root.path(),
            &Setup {
                nameservers: Vec::new(),
                ..setup()
            },
        );
        assert!(!root.path().join("etc/resolv.conf").exists());
    }
}
