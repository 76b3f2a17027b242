//! Networks that machines share: a folder for each, and nobody who keeps a list.
//!
//! ```text
//!  networks/<name>/config    what it is (JSON)
//!                  lock      shared by those who take an address, exclusive for who removes the network
//!                  members/  a lease and a socket for each machine (skerry_net::Lease)
//! ```
//! A network appears whole, by a rename, and goes by one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

pub use ipnet::Ipv4Net;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use skerry_net::{Lease, Segment, address, members};

use crate::error::EngineError;
use crate::paths::Paths;
use crate::random::random;
use crate::vms::places::{read_json, write_json};
use crate::vms::{check_name as check_vm_name, now};

const CONFIG: &str = "config";
const LOCK: &str = "lock";
const MEMBERS: &str = "members";
/// Folders that are no networks yet, or no more.
const HIDDEN: &str = ".new-";
/// Words that `--network` has another meaning for.
const TAKEN: [&str; 8] = [
    "none",
    "public",
    "full",
    "default",
    "bridge",
    "host",
    "tap",
    "container",
];
/// Networks are made from this one where no addresses are asked for.
const POOL: Ipv4Addr = Ipv4Addr::new(10, 89, 0, 0);
const PREFIX: u8 = 24;
/// The largest network and the smallest.
const PREFIXES: std::ops::RangeInclusive<u8> = 16..=29;

/// What a network is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// 32 hexadecimal digits.
    pub id: String,
    /// Its name, which no other has.
    pub name: String,
    /// Its addresses.
    pub subnet: Ipv4Net,
    /// What its owner says of it.
    pub labels: BTreeMap<String, String>,
    /// When it was made, in nanoseconds since 1970.
    pub created: u64,
}

/// A machine on a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetworkMember {
    /// Its address there.
    pub address: Ipv4Addr,
    /// What others find it by.
    pub names: Vec<String>,
    /// Its process.
    pub pid: u32,
}

/// A network and who is on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetworkInfo {
    /// What it is.
    #[serde(flatten)]
    pub config: NetworkConfig,
    /// The machines that are on it now.
    pub members: Vec<NetworkMember>,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> EngineError {
    EngineError::host(what)
}

/// Refuses what can't be a network's name.
pub fn check_name(name: &str) -> Result<(), EngineError> {
    let taken = TAKEN.contains(&name);
    if taken || check_vm_name(name).is_err() {
        let name = name.to_owned();
        return Err(EngineError::BadNetworkName { name });
    }
    Ok(())
}

fn folder(paths: &Paths, name: &str) -> Result<PathBuf, EngineError> {
    check_name(name)?;
    Ok(paths.networks().join(name))
}

fn read_config(folder: &Path, name: &str) -> Result<NetworkConfig, EngineError> {
    match read_json(&folder.join(CONFIG)) {
        Ok(config) => Ok(config),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(EngineError::NoSuchNetwork {
            name: name.to_owned(),
        }),
        Err(error) => Err(failed("read what a network is")(error)),
    }
}

fn overlap(one: Ipv4Net, other: Ipv4Net) -> bool {
    one.contains(&other.network()) || other.contains(&one.network())
}

/// The subnet of a new network among `others`.
fn subnet(wanted: Option<Ipv4Net>, others: &[NetworkConfig]) -> Result<Ipv4Net, EngineError> {
    let of_guests = Ipv4Net::new_assert(address::GUEST_V4, address::PREFIX_V4).trunc();
    let clash = |subnet: Ipv4Net| {
        let own = overlap(subnet, of_guests).then(|| "every machine's own network".to_owned());
        let mut others = others.iter();
        let other = others.find(|other| overlap(subnet, other.subnet));
        own.or_else(|| other.map(|other| format!("the network {}", other.name)))
    };
    if let Some(wanted) = wanted {
        let wanted = wanted.trunc();
        let unusable = |reason: String| EngineError::BadSubnet {
            subnet: wanted,
            reason,
        };
        if !wanted.network().is_private() || !wanted.broadcast().is_private() {
            let reason = "its addresses are not private ones (RFC 1918)";
            return Err(unusable(reason.to_owned()));
        }
        if !PREFIXES.contains(&wanted.prefix_len()) {
            let (from, to) = (PREFIXES.start(), PREFIXES.end());
            return Err(unusable(format!(
                "its prefix is not from {from} to {to} bits long"
            )));
        }
        return match clash(wanted) {
            Some(other) => Err(unusable(format!("it overlaps {other}"))),
            None => Ok(wanted),
        };
    }
    let candidates = (0..=u8::MAX).map(|number| {
        let [a, b, ..] = POOL.octets();
        Ipv4Net::new_assert(Ipv4Addr::new(a, b, number, 0), PREFIX)
    });
    let mut free = candidates.filter(|candidate| clash(*candidate).is_none());
    free.next().ok_or(EngineError::NoSubnet)
}

/// The networks' folders, locked against others who make networks.
fn lock_all(paths: &Paths) -> Result<File, EngineError> {
    let all = paths.networks();
    Paths::ensure(&all)?;
    let lock = File::open(&all).map_err(failed("open the folder of networks"))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)
        .map_err(|error| failed("lock the folder of networks")(error.into()))?;
    Ok(lock)
}

fn configs(paths: &Paths) -> Result<Vec<NetworkConfig>, EngineError> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(paths.networks()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(failed("list networks")(error)),
    };
    for entry in entries {
        let entry = entry.map_err(failed("list networks"))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(HIDDEN) {
            continue;
        }
        match read_config(&entry.path(), &name) {
            Ok(config) => found.push(config),
            // It was removed meanwhile.
            Err(EngineError::NoSuchNetwork { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}

/// Makes a network.
pub fn create(
    paths: &Paths,
    name: &str,
    wanted: Option<Ipv4Net>,
    labels: BTreeMap<String, String>,
) -> Result<NetworkConfig, EngineError> {
    let place = folder(paths, name)?;
    let _lock = lock_all(paths)?;
    if place.exists() {
        let name = name.to_owned();
        return Err(EngineError::NetworkExists { name });
    }
    let subnet = subnet(wanted, &configs(paths)?)?;
    let id: [u8; 16] = random()?;
    let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let config = NetworkConfig {
        name: name.to_owned(),
        subnet,
        labels,
        created: now(),
        id,
    };
    let new = paths.networks().join(format!("{HIDDEN}{}", config.id));
    Paths::ensure(&new.join(MEMBERS))?;
    let made = File::create(new.join(LOCK))
        .and_then(|_| write_json(&new.join(CONFIG), &config))
        .and_then(|()| fs::rename(&new, &place));
    made.map_err(failed("make a network"))?;
    Ok(config)
}

fn info(paths: &Paths, config: NetworkConfig) -> Result<NetworkInfo, EngineError> {
    let found = members(&paths.networks().join(&config.name).join(MEMBERS));
    let found = match found {
        // Removed meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        found => found.map_err(failed("list the machines of a network"))?,
    };
    let members = found.into_iter().map(|member| NetworkMember {
        address: member.address,
        names: member.names,
        pid: member.pid,
    });
    Ok(NetworkInfo {
        config,
        members: members.collect(),
    })
}

/// All networks, by name.
pub fn list(paths: &Paths) -> Result<Vec<NetworkInfo>, EngineError> {
    let configs = configs(paths)?.into_iter();
    configs.map(|config| info(paths, config)).collect()
}

/// One network.
pub fn inspect(paths: &Paths, name: &str) -> Result<NetworkInfo, EngineError> {
    info(paths, read_config(&folder(paths, name)?, name)?)
}

/// Removes a network that no machine is on.
pub fn remove(paths: &Paths, name: &str) -> Result<(), EngineError> {
    let place = folder(paths, name)?;
    let config = read_config(&place, name)?;
    let lock = File::open(place.join(LOCK)).map_err(failed("open a network's lock"))?;
    // Whoever takes an address has it for a moment; then the machine is counted.
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)
        .map_err(|error| failed("lock a network")(error.into()))?;
    let members = info(paths, config.clone())?.members;
    if !members.is_empty() {
        return Err(EngineError::NetworkInUse {
            name: name.to_owned(),
            count: members.len(),
        });
    }
    let gone = paths.networks().join(format!("{HIDDEN}gone-{}", config.id));
    fs::rename(&place, &gone)
        .and_then(|()| fs::remove_dir_all(&gone))
        .map_err(failed("remove a network"))
}

/// Removes the networks that no machine is on; gives their names.
pub fn prune(paths: &Paths) -> Result<Vec<String>, EngineError> {
    let mut removed = Vec::new();
    for config in configs(paths)? {
        match remove(paths, &config.name) {
            Ok(()) => removed.push(config.name),
            Err(EngineError::NetworkInUse { .. } | EngineError::NoSuchNetwork { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

/// A place on the network `name` for a machine that others find by `names`.
pub(crate) fn join(paths: &Paths, name: &str, names: &[String]) -> Result<Segment, EngineError> {
    let place = folder(paths, name)?;
    let none = || EngineError::NoSuchNetwork {
        name: name.to_owned(),
    };
    let lock = File::open(place.join(LOCK)).map_err(|_| none())?;
    rustix::fs::flock(&lock, FlockOperation::LockShared)
        .map_err(|error| failed("lock a network")(error.into()))?;
    // It is gone if it was removed before the lock was there.
    let config = read_config(&place, name)?;
    let taking = failed("take an address of a network");
    let lease = Lease::take(&place.join(MEMBERS), config.subnet, names).map_err(taking)?;
    let lease = lease.ok_or_else(|| EngineError::NetworkFull {
        name: name.to_owned(),
        subnet: config.subnet,
    })?;
    Segment::open(name, config.subnet, lease).map_err(failed("listen for a network's machines"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_come_and_go() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::at(folder.path());
        assert_eq!(list(&paths).unwrap(), []);
        let one = create(&paths, "one", None, BTreeMap::new()).unwrap();
        let two = create(&paths, "two", None, BTreeMap::new()).unwrap();
        assert!(!overlap(one.subnet, two.subnet));
        let again = create(&paths, "one", None, BTreeMap::new());
        assert!(matches!(again, Err(EngineError::NetworkExists { .. })));
        for bad in ["none", "full", "a/b", "", ".x", "tap"] {
            assert!(create(&paths, bad, None, BTreeMap::new()).is_err(), "{bad}");
        }
        let segment = join(&paths, "one", &["db".to_owned()]).unwrap();
        let found = inspect(&paths, "one").unwrap();
        assert_eq!(
            (found.members.len(), &*found.members[0].names),
            (1, &["db".to_owned()][..])
        );
        assert_eq!(found.members[0].address.octets()[3], 2);
        assert!(matches!(
            remove(&paths, "one"),
            Err(EngineError::NetworkInUse { count: 1, .. })
        ));
        assert_eq!(prune(&paths).unwrap(), ["two"]);
        drop(segment);
        remove(&paths, "one").unwrap();
        assert!(matches!(
            remove(&paths, "one"),
            Err(EngineError::NoSuchNetwork { .. })
        ));
        assert!(matches!(
            join(&paths, "one", &[]),
            Err(EngineError::NoSuchNetwork { .. })
        ));
    }

    #[test]
    fn subnets_are_private_and_apart() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::at(folder.path());
        let make = |name: &str, subnet: &str| {
            create(&paths, name, Some(subnet.parse().unwrap()), BTreeMap::new())
        };
        make("a", "192.168.7.0/24").unwrap();
        for bad in [
            "192.168.0.0/16",
            "10.0.2.0/25",
            "8.8.8.0/24",
            "10.0.0.0/8",
            "10.1.0.0/30",
        ] {
            assert!(
                matches!(make("b", bad), Err(EngineError::BadSubnet { .. })),
                "{bad}"
            );
        }
        // The whole pool is one network's.
        make("c", "10.89.0.0/16").unwrap();
        let none = create(&paths, "d", None, BTreeMap::new());
        assert!(matches!(none, Err(EngineError::NoSubnet)));
    }
}
