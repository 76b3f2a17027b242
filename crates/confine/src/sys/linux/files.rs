//! Which files: Landlock.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use crate::Plan;

/// What is known here of Landlock; an older kernel holds less of it, and it is told what.
const KNOWN: ABI = ABI::V6;

/// What every process reads: itself, how many processors there are, how names are resolved.
const ALWAYS_READ: [&str; 8] = [
    "/proc/self",
    "/sys/devices/system/cpu",
    "/sys/kernel/mm",
    "/sys/fs/cgroup",
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/proc/sys/kernel/random/boot_id",
];
/// Devices that say nothing of the host.
const ALWAYS_WRITE: [&str; 2] = ["/dev/null", "/dev/kvm"];

/// Leaves the process the files of `plan`.
pub(super) fn restrict(plan: &Plan) -> Result<String, String> {
    let status = rules(plan).map_err(|error| format!("Landlock: {error}"))?;
    let abi = match status.landlock {
        landlock::LandlockStatus::Available { effective_abi, .. } => format!("{effective_abi:?}"),
        landlock::LandlockStatus::NotEnabled => return Err("Landlock is not enabled".to_owned()),
        landlock::LandlockStatus::NotImplemented => {
            return Err("the kernel has no Landlock (Linux 5.13)".to_owned());
        }
    };
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(format!("files, devices, sockets, signals (ABI {abi})")),
        RulesetStatus::PartiallyEnforced => Err(format!(
            "files, but not all kinds of access (ABI {abi}; all of them since Linux 6.12)"
        )),
        RulesetStatus::NotEnforced => Err("Landlock is not enforced".to_owned()),
    }
}

fn rules(plan: &Plan) -> Result<landlock::RestrictionStatus, RulesetError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?;
    if !plan.network {
        rules = rules.handle_access(AccessNet::BindTcp | AccessNet::ConnectTcp)?;
    }
    let mut rules = rules.create()?;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let names = AccessFs::MakeDir | AccessFs::RemoveDir | AccessFs::MakeSym | AccessFs::RemoveFile;
    // Programs are never started.
    let all = AccessFs::from_all(KNOWN) & !BitFlags::from(AccessFs::Execute);
    for path in ALWAYS_READ.iter().map(Path::new) {
        rules = allow(rules, path, read)?;
    }
    for path in &plan.read {
        rules = allow(rules, path, read)?;
    }
    for path in ALWAYS_WRITE.iter().map(Path::new) {
        rules = allow(rules, path, all)?;
    }
    for path in &plan.write {
        rules = allow(rules, path, all)?;
    }
    for path in &plan.names {
        rules = allow(rules, path, names | AccessFs::ReadDir)?;
    }
    rules.restrict_self()
}

/// What doesn't exist needs no right.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: impl Into<BitFlags<AccessFs>>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(found) => {
            let access = access.into();
            let access = match path.is_dir() {
                true => access,
                false => access & AccessFs::from_file(KNOWN),
            };
            rules.add_rule(PathBeneath::new(found, access))
        }
        Err(_) => Ok(rules),
    }
}
