//! Addresses of a shared network: a file for each that some process holds, and no process that keeps a list.
//!
//! ```text
//!  <members>/10.89.0.2.lease   locked by its machine's process as long as it lives; its process id, then
//!                              the names by which others find the machine, a line each
//!            10.89.0.2.sock    where its process takes packets
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::Subnets;

const LEASE: &str = "lease";
/// The longest lease that is read.
const LONGEST: u64 = 64 << 10;

/// An address of a shared network that this process has.
#[derive(Debug)]
pub struct Lease {
    folder: PathBuf,
    address: Ipv4Addr,
    /// Its lock is the lease.
    _file: File,
}

/// A machine on a shared network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its address there.
    pub address: Ipv4Addr,
    /// Its process.
    pub pid: u32,
    /// What others find it by, in small letters.
    pub names: Vec<String>,
}

fn path(folder: &Path, address: Ipv4Addr) -> PathBuf {
    folder.join(format!("{address}.{LEASE}"))
}

/// Where a member takes packets.
pub(super) fn socket_name(address: Ipv4Addr) -> String {
    format!("{address}.sock")
}

/// The file of an address, locked, unless some process has it.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(None);
    }
    // Whoever had it may have removed it meanwhile: the lock is of no use then.
    let same = |there: fs::Metadata| file.metadata().map(|own| own.ino() == there.ino());
    let is_there = fs::metadata(path).and_then(same).unwrap_or(false);
    Ok(is_there.then_some(file))
}

impl Lease {
    /// Takes the first address that nobody has, the gateway's apart. `None`: there is no such address.
    pub fn take(folder: &Path, subnets: Subnets, names: &[String]) -> io::Result<Option<Self>> {
        let hosts = subnets.v4.hosts();
        for address in hosts.filter(|address| *address != subnets.gateway) {
            let Some(mut file) = lock(&path(folder, address))? else {
                continue;
            };
            let lines: String = names.iter().map(|name| format!("{name}\n")).collect();
            file.set_len(0)?;
            file.rewind()?;
            write!(file, "{}\n{lines}", std::process::id())?;
            return Ok(Some(Self {
                folder: folder.to_owned(),
                address,
                _file: file,
            }));
        }
        Ok(None)
    }

    /// The address.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // While the lock is held, so that nobody loses what they made in the meantime.
        let _ = fs::remove_file(self.folder.join(socket_name(self.address)));
        let _ = fs::remove_file(path(&self.folder, self.address));
    }
}

fn read(path: &Path) -> Option<(u32, Vec<String>)> {
    let mut file = File::open(path).ok()?;
    let held = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_err();
    let mut text = String::new();
    let length = (&mut file).take(LONGEST).read_to_string(&mut text).ok()?;
    let mut lines = text.lines();
    let pid = lines.next().filter(|_| held && length > 0)?.parse().ok()?;
    Some((pid, lines.map(str::to_owned).collect()))
}

/// The machines on the network whose leases are in `folder`.
pub fn members(folder: &Path) -> io::Result<Vec<Member>> {
    let mut members = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let address = path.file_stem().and_then(|stem| stem.to_str());
        let address = address.and_then(|address| address.parse().ok());
        let is_lease = path.extension().is_some_and(|extension| extension == LEASE);
        if let (Some(address), true) = (address, is_lease)
            && let Some((pid, names)) = read(&path)
        {
            members.push(Member {
                address,
                pid,
                names,
            });
        }
    }
    members.sort_by_key(|member| member.address);
    Ok(members)
}

/// The process that has an address.
pub(super) fn owner(folder: &Path, address: Ipv4Addr) -> Option<u32> {
    Some(read(&path(folder, address))?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_once_and_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let subnet = Subnets {
            v4: "10.89.7.0/29".parse().unwrap(),
            v6: None,
            gateway: Ipv4Addr::new(10, 89, 7, 1),
        };
        let take = |name: &str| Lease::take(folder.path(), subnet, &[name.to_owned()]).unwrap();
        let taken: Vec<Lease> = (2..7)
            .map(|number| take(&format!("n{number}")).unwrap())
            .collect();
        let last: Vec<u8> = taken
            .iter()
            .map(|lease| lease.address().octets()[3])
            .collect();
        assert_eq!(last, [2, 3, 4, 5, 6]);
        assert!(take("late").is_none());
        let found = members(folder.path()).unwrap();
        assert_eq!(found.len(), 5);
        assert_eq!(
            (found[1].pid, &*found[1].names),
            (std::process::id(), &["n3".to_owned()][..])
        );
        let mut taken = taken;
        taken.remove(2);
        assert_eq!(members(folder.path()).unwrap().len(), 4);
        assert_eq!(take("next").unwrap().address(), Ipv4Addr::new(10, 89, 7, 4));
        // What a process that was killed left.
        fs::write(folder.path().join("10.89.7.4.lease"), "1\nghost\n").unwrap();
        assert_eq!(members(folder.path()).unwrap().len(), 4);
        assert_eq!(owner(folder.path(), Ipv4Addr::new(10, 89, 7, 4)), None);
        assert_eq!(take("heir").unwrap().address(), Ipv4Addr::new(10, 89, 7, 4));
    }
}
