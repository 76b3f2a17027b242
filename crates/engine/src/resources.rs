//! How much of the host a machine may take, as its user asks for it; and what sees to it.
//!
//! | asked for | seen to by |
//! |---|---|
//! | processors, a fraction too | so many virtual ones; for a fraction a cgroup's quota, else the machine itself |
//! | memory | the guest's RAM; in a cgroup a bound of the whole process as well |
//! | processes | a cgroup in the guest |
//! | disk | the size of the guest's disk |

use serde::Serialize;
use skerry_oci::Image;
use skerry_storage::scratch;

use crate::cgroup::{self, Bounds};
use crate::error::EngineError;
use crate::machine::MachineOptions;
use crate::vm::VmSpec;

pub use crate::cgroup::Held;

/// One processor's time.
const BILLION: u64 = 1_000_000_000;
/// The least share of a processor, as docker has it: a hundredth.
const LEAST_SHARE: u64 = BILLION / 100;
/// As many processors as a machine can have.
const MOST_CPUS: u64 = 64;
/// The largest disk of a machine.
const MOST_DISK: u64 = 16 << 40;
/// Sizes of disks are multiples of this.
const GRAIN: u64 = 1 << 20;
/// As many processes as a guest's kernel can count.
const MOST_PROCESSES: u32 = 1 << 22;

/// What to do where a bound is wanted.
#[derive(Clone, Debug, Serialize)]
pub struct Limit {
    /// What is bounded.
    pub name: &'static str,
    /// It can be bounded here.
    pub holds: bool,
    /// By what; or why not.
    pub detail: String,
}

impl MachineOptions {
    /// Takes `--cpus` in billionths of one: as many virtual processors as are needed for that, and where it
    /// is no whole number a bound of their time.
    pub fn set_nano_cpus(&mut self, nano_cpus: u64) -> Result<(), EngineError> {
        if !(LEAST_SHARE..=MOST_CPUS * BILLION).contains(&nano_cpus) {
            return Err(EngineError::Processors { most: MOST_CPUS });
        }
        let cpus = nano_cpus.div_ceil(BILLION);
        self.cpus = u32::try_from(cpus).map_err(|_| EngineError::Processors { most: MOST_CPUS })?;
        self.nano_cpus = (!nano_cpus.is_multiple_of(BILLION)).then_some(nano_cpus);
        Ok(())
    }

    /// The bounds for a cgroup, if the machine's process is to have one.
    fn bounds(&self) -> Option<Bounds> {
        let wanted = self.nano_cpus.is_some() || self.cgroup_parent.is_some();
        wanted.then(|| Bounds {
            nano_cpus: self.nano_cpus,
            memory: Some(self.memory),
            parent: self.cgroup_parent.clone(),
        })
    }

    /// Bounds this process from outside, where that was asked for and can be had: to be called by a process
    /// that is one machine's own, before it is confined.
    pub fn bound_process(&self) -> Result<(), EngineError> {
        self.bounds()
            .map_or(Ok(()), |bounds| cgroup::confine(&bounds))
    }
}

/// What a machine has to see to itself of the bound of its processors' time.
pub(crate) fn own_quota(nano_cpus: Option<u64>) -> Option<u64> {
    let outside = cgroup::held().is_some_and(|held| held.cpu.is_some());
    nano_cpus.filter(|_| !outside)
}

/// The size of a disk of at least `size` bytes.
#[must_use]
pub fn disk_size(size: u64) -> u64 {
    size.next_multiple_of(GRAIN)
}

/// Whether a disk of a machine can have this size.
pub(crate) fn is_disk_size(size: u64) -> bool {
    size == scratch::SIZE
        || ((scratch::MIN_VOLUME..=MOST_DISK).contains(&size) && size.is_multiple_of(GRAIN))
}

/// Refuses what no machine of `image` can have.
pub(crate) fn check(spec: &VmSpec, image: Option<&Image>) -> Result<(), EngineError> {
    let most = u64::from(spec.options.cpus) * BILLION;
    let share = spec.options.nano_cpus;
    if share.is_some_and(|share| !(LEAST_SHARE..=most).contains(&share)) {
        return Err(EngineError::Processors { most: MOST_CPUS });
    }
    if spec
        .pids_limit
        .is_some_and(|most| !(1..=MOST_PROCESSES).contains(&most))
    {
        return Err(EngineError::Processes {
            most: MOST_PROCESSES,
        });
    }
    let Some(size) = spec.disk_size else {
        return Ok(());
    };
    if spec.read_only {
        return Err(EngineError::DiskOfNone);
    }
    let Some(image) = image else {
        return Err(EngineError::DiskOfState);
    };
    if !is_disk_size(disk_size(size)) {
        return Err(EngineError::DiskSize {
            least: scratch::MIN_VOLUME >> 20,
            most: MOST_DISK >> 40,
        });
    }
    if image.size > size {
        return Err(EngineError::DiskBelowImage {
            size: size >> 20,
            image: image.size.div_ceil(1 << 20),
        });
    }
    Ok(())
}

/// What holds on this host, by trying.
#[must_use]
pub fn probe() -> Vec<Limit> {
    let limit = |name, holds, detail: String| Limit {
        name,
        holds,
        detail,
    };
    let [cpu, memory] = cgroup::probe();
    let cpu = match cpu {
        Ok(parent) => format!("a cgroup in {}", parent.display()),
        Err(reason) => format!("the machine itself, processors without devices ({reason})"),
    };
    let memory = match memory {
        Ok(parent) => format!(
            "the guest's RAM; with a fraction of a processor or --cgroup-parent, a cgroup in {} too",
            parent.display()
        ),
        Err(reason) => format!("the guest's RAM alone ({reason})"),
    };
    vec![
        limit("cpus", true, cpu),
        limit("memory", true, memory),
        limit("processes", true, "a cgroup in the guest".to_owned()),
        limit("disk", true, "the size of the guest's disk".to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_are_rounded_up_and_bounded() {
        let mut options = MachineOptions::default();
        for (nano_cpus, cpus, bound) in [
            (500_000_000, 1, Some(500_000_000)),
            (1_500_000_000, 2, Some(1_500_000_000)),
            (BILLION, 1, None),
            (4 * BILLION, 4, None),
            (10_000_000, 1, Some(10_000_000)),
            (63 * BILLION + 1, 64, Some(63 * BILLION + 1)),
        ] {
            options.set_nano_cpus(nano_cpus).expect("it can be had");
            assert_eq!((options.cpus, options.nano_cpus), (cpus, bound));
        }
        for wrong in [0, 1, 9_999_999, 64 * BILLION + 1, u64::MAX] {
            assert!(options.set_nano_cpus(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn disks_have_sizes_that_can_be_made() {
        assert!(is_disk_size(scratch::SIZE) && is_disk_size(256 << 20) && is_disk_size(10 << 30));
        for wrong in [
            0,
            1,
            255 << 20,
            (256 << 20) + 1,
            MOST_DISK + GRAIN,
            u64::MAX,
        ] {
            assert!(!is_disk_size(wrong), "{wrong}");
        }
        assert_eq!(disk_size((256 << 20) + 1), 257 << 20);
    }

    #[test]
    fn what_no_machine_can_have_is_refused() {
        let spec = VmSpec {
            pids_limit: Some(0),
            ..VmSpec::default()
        };
        assert!(matches!(
            check(&spec, None),
            Err(EngineError::Processes { .. })
        ));
        let spec = VmSpec {
            disk_size: Some(1 << 30),
            ..VmSpec::default()
        };
        assert!(matches!(check(&spec, None), Err(EngineError::DiskOfState)));
        let spec = VmSpec {
            read_only: true,
            ..spec
        };
        assert!(matches!(check(&spec, None), Err(EngineError::DiskOfNone)));
    }
}
