//! What a kept machine may say of itself. It may come from anybody; that its digests fit only tells
//! that it is what they made.
//!
//! ```text
//!  snapshot of the store ─┐                    ┌─► here: what concerns the host, and the parts with
//!  parcel of a process ───┴─► Frozen ─► vet ───┤   each other
//!                                              └─► then: the machine, each device, each processor
//! ```
//! A machine that passes is one that this build makes, but for its size and what is in it.

use skerry_machine::DiskConfig;
use skerry_net::address;
use skerry_storage::CLUSTER_SIZE;

use crate::error::EngineError;
use crate::frozen::{About, Base, Frozen};
use crate::mounts;
use crate::network::MTUS;
use crate::resources::is_disk_size;
use crate::vm::{GUEST_CID, ROOT_DISK, SCRATCH_DISK};

/// How many times the host's memory a machine may have: the host takes only what the guest touches,
/// but what is kept per page is taken at once.
const OVERCOMMIT: u64 = 16;
/// The longest name that is shown to the user.
const LONGEST_NAME: usize = 1024;

fn require(holds: bool, problem: impl FnOnce() -> String) -> Result<(), EngineError> {
    match holds {
        true => Ok(()),
        false => Err(EngineError::Implausible { problem: problem() }),
    }
}

impl Frozen {
    /// Refuses what no machine of this build says.
    pub(crate) fn vet(&self) -> Result<(), EngineError> {
        self.about.vet()?;
        let About {
            machine, read_only, ..
        } = &self.about;
        let cpus = self.state.cpus.len();
        require(cpus == machine.cpus as usize, || {
            format!(
                "it has {} processors, and the state of {cpus}",
                machine.cpus
            )
        })?;
        let size = self.scratch.as_ref().map(|(size, _)| *size);
        let plausible = match size {
            None => *read_only,
            Some(size) => !read_only && is_disk_size(size),
        };
        require(plausible, || match (size, read_only) {
            (None, _) => "its scratch disk is missing".to_owned(),
            (Some(_), true) => "it has a scratch disk and says that it has none".to_owned(),
            (Some(size), false) => {
                format!("its scratch disk has {size} bytes, which none of this build has")
            }
        })?;
        self.base
            .as_ref()
            .map_or(Ok(()), |base| self.vet_base(base))
    }

    fn vet_base(&self, base: &Base) -> Result<(), EngineError> {
        let size = self.scratch.as_ref().map_or(0, |(size, _)| *size);
        let whole = |at: u64| at.is_multiple_of(CLUSTER_SIZE) && at <= size;
        let within = base
            .disk
            .iter()
            .all(|range| range.start <= range.end && whole(range.start) && whole(range.end));
        require(within && base.layers <= self.memory.len(), || {
            "what it is a difference to has parts that it doesn't have".to_owned()
        })
    }
}

impl About {
    fn vet(&self) -> Result<(), EngineError> {
        let Self {
            backend: _,
            machine,
            cpuid,
            image,
            read_only,
            command: _,
            surroundings: _,
            mounts,
        } = self;
        require(cpuid.len() == machine.cpus as usize, || {
            let tables = cpuid.len();
            format!(
                "it has {} processors, and CPUID tables of {tables}",
                machine.cpus
            )
        })?;
        let most = rustix::system::sysinfo();
        let most = (most.totalram as u64)
            .saturating_mul(most.mem_unit.into())
            .saturating_mul(OVERCOMMIT);
        require(machine.memory <= most, || {
            let mib = machine.memory >> 20;
            format!("it has {mib} MiB of memory, more than {OVERCOMMIT} times what this host has")
        })?;
        let disk = |name: &str, read_only| DiskConfig {
            name: name.to_owned(),
            read_only,
            exchangeable: false,
        };
        let mut disks = vec![disk(ROOT_DISK, true)];
        disks.extend((!read_only).then(|| disk(SCRATCH_DISK, false)));
        let own = machine.disks.get(..disks.len()).unwrap_or_default();
        require(own == disks, || {
            "its disks are not a root disk and, where it can be written, a scratch disk".to_owned()
        })?;
        require(mounts::are_plausible(machine, disks.len()), || {
            "its further disks and file systems are none that this build makes".to_owned()
        })?;
        // A state with a volume in use is not taken.
        let fits = mounts.is_empty()
            || mounts.len() == machine.shares.len() && machine.disks.len() == disks.len();
        require(fits, || {
            "it has other folders mounted than it has file systems".to_owned()
        })?;
        require(machine.vsock == Some(GUEST_CID), || {
            format!("its socket device has not the context id {GUEST_CID}")
        })?;
        let card = machine
            .network
            .is_none_or(|card| card.mac == address::CARD.mac && MTUS.contains(&card.mtu));
        require(card, || {
            "its network card is none that this build makes".to_owned()
        })?;
        // What it would boot is a file of the host that it names.
        require(machine.no_reboot, || {
            "it boots again when it is reset".to_owned()
        })?;
        require(machine.debug_exit.is_none(), || {
            "it has the devices of test kernels".to_owned()
        })?;
        let names = [&image.name, &image.digest, &image.rootfs];
        // They are shown to the user, whose terminal obeys control characters.
        let shown = |name: &str| name.len() <= LONGEST_NAME && !name.contains(char::is_control);
        require(names.iter().all(|name| shown(name)), || {
            "its image's name is longer than any, or has control characters".to_owned()
        })
    }
}

#[cfg(test)]
mod tests;
