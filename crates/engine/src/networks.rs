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
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

pub use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use skerry_net::{Lease, Segment, Subnets, address, members};

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

/// The largest network of IPv6 and the smallest, which has a place for each IPv4 address.
const PREFIXES_V6: std::ops::RangeInclusive<u8> = 48..=112;
const PREFIX_V6: u8 = 64;

/// What is asked of a new network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkPlan {
    /// Its addresses; one of each family at most, and those that are missing are chosen.
    pub subnets: Vec<IpNet>,
    /// The gateway's address; `None` is the first.
    pub gateway: Option<Ipv4Addr>,
    /// Whether it has IPv6; `None`: where such a subnet is named.
    pub ipv6: Option<bool>,
    /// Machines that are on such networks only reach nothing else.
    pub internal: bool,
    /// What its owner says of it.
    pub labels: BTreeMap<String, String>,
}

/// What a network is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct NetworkConfig {
    /// 32 hexadecimal digits.
    pub id: String,
    /// Its name, which no other has.
    pub name: String,
    /// Its addresses.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub subnet: Ipv4Net,
    /// Its IPv6 addresses, if it has any.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub subnet6: Option<Ipv6Net>,
    /// The gateway's address; `None` is the first.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub gateway: Option<Ipv4Addr>,
    /// Machines that are on such networks only reach nothing else.
    #[serde(default)]
    pub internal: bool,
    /// What its owner says of it.
    pub labels: BTreeMap<String, String>,
    /// When it was made, in nanoseconds since 1970.
    pub created: u64,
}

impl NetworkConfig {
    /// The gateway's address.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        let first = || self.subnet.hosts().next();
        let gateway = self.gateway.or_else(first);
        gateway.unwrap_or(self.subnet.network())
    }

    /// The gateway's IPv6 address, which has the same place in its network.
    #[must_use]
    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        self.subnets().v6_of(self.gateway())
    }

    pub(crate) fn subnets(&self) -> Subnets {
        Subnets {
            v4: self.subnet,
            v6: self.subnet6,
            gateway: self.gateway(),
        }
    }
}

/// A machine on a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct NetworkMember {
    /// Its address there.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub address: Ipv4Addr,
    /// Its IPv6 address, where the network has such.
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub address6: Option<Ipv6Addr>,
    /// What others find it by.
    pub names: Vec<String>,
    /// Its process.
    pub pid: u32,
}

/// A network and who is on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
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
            subnet: wanted.into(),
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

/// The IPv6 addresses of a new network with this identity among `others`.
fn subnet6(
    wanted: Option<Ipv6Net>,
    id: [u8; 16],
    others: &[NetworkConfig],
) -> Result<Ipv6Net, EngineError> {
    let of_guests = Ipv6Net::new_assert(address::GUEST_V6, address::PREFIX_V6).trunc();
    let Some(wanted) = wanted else {
        // Random ones (RFC 4193, 3.2), as the identity is: nobody else has them.
        let mut octets = [0; 16];
        octets[0] = 0xfd;
        octets[1..6].copy_from_slice(&id[..5]);
        return Ok(Ipv6Net::new_assert(octets.into(), PREFIX_V6));
    };
    let wanted = wanted.trunc();
    let unusable = |reason: String| EngineError::BadSubnet {
        subnet: wanted.into(),
        reason,
    };
    if !wanted.network().is_unique_local() {
        return Err(unusable(
            "its addresses are not unique local ones (RFC 4193)".to_owned(),
        ));
    }
    if !PREFIXES_V6.contains(&wanted.prefix_len()) {
        let (from, to) = (PREFIXES_V6.start(), PREFIXES_V6.end());
        return Err(unusable(format!(
            "its prefix is not from {from} to {to} bits long"
        )));
    }
    let clash =
        |other: Ipv6Net| other.contains(&wanted.network()) || wanted.contains(&other.network());
    if clash(of_guests) {
        return Err(unusable(
            "it overlaps every machine's own network".to_owned(),
        ));
    }
    let mut others = others.iter();
    match others.find(|other| other.subnet6.is_some_and(clash)) {
        Some(other) => Err(unusable(format!("it overlaps the network {}", other.name))),
        None => Ok(wanted),
    }
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

/// The subnets of a plan, one of each family.
fn wanted(plan: &NetworkPlan) -> Result<(Option<Ipv4Net>, Option<Ipv6Net>), EngineError> {
    let (mut v4, mut v6) = (None, None);
    for net in &plan.subnets {
        let twice = match net {
            IpNet::V4(net) => v4.replace(*net).is_some(),
            IpNet::V6(net) => v6.replace(*net).is_some(),
        };
        let unusable = |reason: &str| EngineError::BadSubnet {
            subnet: *net,
            reason: reason.to_owned(),
        };
        if twice {
            return Err(unusable("it is the second of its family"));
        }
        if net.network().is_ipv6() && plan.ipv6 == Some(false) {
            return Err(unusable("the network is to have no IPv6"));
        }
    }
    Ok((v4, v6))
}

/// Makes a network.
pub fn create(paths: &Paths, name: &str, plan: NetworkPlan) -> Result<NetworkConfig, EngineError> {
    let place = folder(paths, name)?;
    let (v4, v6) = wanted(&plan)?;
    let _lock = lock_all(paths)?;
    if place.exists() {
        let name = name.to_owned();
        return Err(EngineError::NetworkExists { name });
    }
    let others = configs(paths)?;
    let subnet = subnet(v4, &others)?;
    let id: [u8; 16] = random()?;
    let ipv6 = plan.ipv6.unwrap_or(v6.is_some());
    let subnet6 = ipv6.then(|| subnet6(v6, id, &others)).transpose()?;
    if let Some(gateway) = plan.gateway {
        let ends = [subnet.network(), subnet.broadcast()];
        if !subnet.contains(&gateway) || ends.contains(&gateway) {
            return Err(EngineError::BadGateway { gateway, subnet });
        }
    }
    let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let config = NetworkConfig {
        name: name.to_owned(),
        subnet,
        subnet6,
        gateway: plan.gateway,
        internal: plan.internal,
        labels: plan.labels,
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
    let subnets = config.subnets();
    let members = found.into_iter().map(|member| NetworkMember {
        address: member.address,
        address6: subnets.v6_of(member.address),
        names: member.names,
        pid: member.pid,
    });
    let members = members.collect();
    Ok(NetworkInfo { config, members })
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

/// Whether machines reach nothing else than these networks, of which there are some.
pub(crate) fn are_internal(paths: &Paths, names: &[String]) -> Result<bool, EngineError> {
    for name in names {
        if !read_config(&folder(paths, name)?, name)?.internal {
            return Ok(false);
        }
    }
    Ok(!names.is_empty())
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
    let subnets = config.subnets();
    let lease = Lease::take(&place.join(MEMBERS), subnets, names).map_err(taking)?;
    let lease = lease.ok_or_else(|| EngineError::NetworkFull {
        name: name.to_owned(),
        subnet: config.subnet,
    })?;
    Segment::open(name, subnets, lease).map_err(failed("listen for a network's machines"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(subnets: &str) -> NetworkPlan {
        NetworkPlan {
            subnets: subnets.split(' ').map(|one| one.parse().unwrap()).collect(),
            ..NetworkPlan::default()
        }
    }

    #[test]
    fn networks_come_and_go() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::at(folder.path());
        assert_eq!(list(&paths).unwrap(), []);
        let one = create(&paths, "one", NetworkPlan::default()).unwrap();
        let two = create(&paths, "two", NetworkPlan::default()).unwrap();
        assert!(!overlap(one.subnet, two.subnet));
        let again = create(&paths, "one", NetworkPlan::default());
        assert!(matches!(again, Err(EngineError::NetworkExists { .. })));
        for bad in ["none", "full", "a/b", "", ".x", "tap"] {
            assert!(
                create(&paths, bad, NetworkPlan::default()).is_err(),
                "{bad}"
            );
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
        let make = |name: &str, subnet: &str| create(&paths, name, plan(subnet));
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
        let none = create(&paths, "d", NetworkPlan::default());
        assert!(matches!(none, Err(EngineError::NoSubnet)));
    }

    #[test]
    fn networks_have_ipv6_addresses_a_gateway_and_walls() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::at(folder.path());
        let own = create(&paths, "own", plan("fd01:2:3::/64 192.168.9.0/24")).unwrap();
        assert_eq!(own.subnet6, Some("fd01:2:3::/64".parse().unwrap()));
        assert_eq!(own.gateway(), Ipv4Addr::new(192, 168, 9, 1));
        let segment = join(&paths, "own", &[]).unwrap();
        let member = &inspect(&paths, "own").unwrap().members[0];
        assert_eq!(member.address6, Some("fd01:2:3::2".parse().unwrap()));
        drop(segment);
        let six = NetworkPlan {
            ipv6: Some(true),
            ..NetworkPlan::default()
        };
        let chosen = create(&paths, "chosen", six).unwrap();
        assert!(chosen.subnet6.unwrap().network().is_unique_local());
        let old = NetworkPlan {
            ipv6: Some(false),
            gateway: Some(Ipv4Addr::new(10, 70, 0, 2)),
            internal: true,
            ..plan("10.70.0.0/29")
        };
        let old = create(&paths, "old", old).unwrap();
        assert_eq!(
            (old.subnet6, old.gateway()),
            (None, Ipv4Addr::new(10, 70, 0, 2))
        );
        // The gateway's address is nobody's.
        let places: Vec<Segment> = (0..5).map(|_| join(&paths, "old", &[]).unwrap()).collect();
        let members = inspect(&paths, "old").unwrap().members;
        let last: Vec<u8> = members.iter().map(|one| one.address.octets()[3]).collect();
        assert_eq!(last, [1, 3, 4, 5, 6]);
        assert!(matches!(
            join(&paths, "old", &[]),
            Err(EngineError::NetworkFull { .. })
        ));
        drop(places);
        let names = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        assert!(are_internal(&paths, &names(&["old"])).unwrap());
        assert!(!are_internal(&paths, &names(&["old", "own"])).unwrap());
        assert!(!are_internal(&paths, &[]).unwrap());
        let make = |plan: NetworkPlan| create(&paths, "bad", plan);
        for bad in [
            "2001:db8::/64",
            "fd01:2::/40",
            "fd01:2:3::/120",
            "fd53:6b72:7279:2::/64",
            "fd01:2:3::/96",
            "10.5.0.0/24 10.6.0.0/24",
            "fd05::/64 fd06::/64",
        ] {
            let refused = make(plan(bad));
            assert!(
                matches!(refused, Err(EngineError::BadSubnet { .. })),
                "{bad}"
            );
        }
        let mut without = plan("fd05::/64");
        without.ipv6 = Some(false);
        assert!(matches!(make(without), Err(EngineError::BadSubnet { .. })));
        for gateway in ["10.71.0.0", "10.71.0.255", "10.72.0.1"] {
            let mut outside = plan("10.71.0.0/24");
            outside.gateway = Some(gateway.parse().unwrap());
            assert!(
                matches!(make(outside), Err(EngineError::BadGateway { .. })),
                "{gateway}"
            );
        }
    }
}
