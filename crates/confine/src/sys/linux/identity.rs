//! Who the process is: namespaces, capabilities, groups.
#![expect(
    unsafe_code,
    reason = "leaving the namespaces of the maker is unsafe where descriptors are shared with others"
)]

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    unshare_unsafe,
};

use crate::Plan;

/// Capabilities that the process needs to the end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept(CapabilitySet);

impl Default for Kept {
    fn default() -> Self {
        Self(CapabilitySet::empty())
    }
}

impl Kept {
    /// As far as the process has them.
    pub(super) fn of(plan: &Plan) -> Self {
        let mut wanted = CapabilitySet::empty();
        if plan.low_ports {
            wanted |= CapabilitySet::NET_BIND_SERVICE;
        }
        if plan.shares {
            // What a server of files does in the name of their owners.
            wanted |= CapabilitySet::CHOWN
                | CapabilitySet::DAC_OVERRIDE
                | CapabilitySet::FOWNER
                | CapabilitySet::FSETID
                | CapabilitySet::SETFCAP
                | CapabilitySet::SETGID
                | CapabilitySet::SETUID
                | CapabilitySet::MKNOD;
        }
        let has = capabilities(None).map(|sets| sets.effective);
        Self(wanted & has.unwrap_or(CapabilitySet::empty()))
    }

    pub(super) const fn is_empty(self) -> bool {
        self.0.is_empty()
    }
}

fn failed(what: &str, error: impl std::fmt::Display) -> String {
    format!("{what}: {error}")
}

/// How long threads that end by themselves are waited for, where they are in the way.
const PATIENCE: Duration = Duration::from_millis(500);

/// Whether this may make namespaces without one of users.
fn administers() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// The other threads: how many end by themselves, and the rest.
fn others(passing: &[&str]) -> Result<(usize, Vec<String>), String> {
    let path = "/proc/self/task";
    let tasks = fs::read_dir(path).map_err(|error| failed(path, error))?;
    let mut ending = 0;
    let mut others = Vec::new();
    for task in tasks.flatten().skip(1) {
        match fs::read_to_string(task.path().join("comm")) {
            Ok(name) if passing.contains(&name.trim()) => ending += 1,
            Ok(name) => others.push(name.trim().to_owned()),
            // It has ended meanwhile.
            Err(_) => {}
        }
    }
    Ok((ending, others))
}

/// Refuses a process that has other threads, but for those that find out what the host can do and end
/// by themselves: they run nothing of a guest's.
pub(super) fn alone(plan: &Plan) -> Result<(), String> {
    let patience = Instant::now() + PATIENCE;
    let others = loop {
        let (ending, others) = others(plan.passing)?;
        // A namespace of users takes a process with one thread. One that has just begun has no name
        // of its own yet.
        let is_alone = others.is_empty() && (ending == 0 || administers());
        if is_alone || Instant::now() > patience {
            break others;
        }
        std::thread::sleep(Duration::from_micros(200));
    };
    match others.is_empty() {
        true => Ok(()),
        false => Err(format!(
            "the process has other threads ({})",
            others.join(", ")
        )),
    }
}

pub(super) fn no_new_privileges() -> Result<String, String> {
    set_no_new_privs(true).map_err(|error| failed("prctl", error))?;
    Ok("programs gain no rights".to_owned())
}

pub(super) fn not_dumpable() -> Result<String, String> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|error| failed("prctl", error))?;
    Ok("no core, no reading of its memory by processes of the same user".to_owned())
}

/// Takes namespaces of its own: with the right to, or in a user namespace.
pub(super) fn unshare(plan: &Plan) -> Result<String, String> {
    let mut flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    let mut names = vec!["mount", "ipc", "uts"];
    if !plan.network {
        flags |= UnshareFlags::NEWNET;
        names.push("net");
    }
    let administrator = administers();
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    if !administrator {
        flags |= UnshareFlags::NEWUSER;
        names.insert(0, "user");
    }
    // SAFETY: nothing but this thread is there; descriptors are not unshared.
    let unshared = unsafe { unshare_unsafe(flags) };
    unshared.map_err(|error| failed("unshare", error))?;
    if !administrator {
        // Itself, and nobody else: files keep their owner.
        let (user, group) = (user.as_raw(), group.as_raw());
        for (file, text) in [
            ("uid_map", format!("{user} {user} 1")),
            ("setgroups", "deny".to_owned()),
            ("gid_map", format!("{group} {group} 1")),
        ] {
            let path = format!("/proc/self/{file}");
            fs::write(&path, text).map_err(|error| failed(&path, error))?;
        }
    }
    let shared = if plan.network {
        "; that of the network is the host's, which the user-mode network needs"
    } else {
        ""
    };
    Ok(format!("{}{shared}", names.join(", ")))
}

/// Gives up groups, and all capabilities but those that are `kept`, for good.
pub(super) fn drop_rights(kept: Kept) -> Result<String, String> {
    let has = capabilities(None).map_err(|error| failed("capget", error))?;
    let mut groups = "";
    if has.effective.contains(CapabilitySet::SETGID) && set_thread_groups(&[]).is_ok() {
        groups = ", no further groups";
    }
    if has.effective.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all() - kept.0 {
            // The host's kernel may know fewer than we do.
            let _ = remove_capability_from_bounding_set(capability);
        }
    }
    // Kernels before 4.3 have no such set.
    let _ = clear_ambient_capability_set();
    leave(kept.0)?;
    Ok(match kept.0.is_empty() {
        true => format!("none{groups}"),
        false => format!("none but {:?} on threads that need it{groups}", kept.0),
    })
}

/// Gives up this thread's capabilities.
pub(super) fn drop_capabilities() -> Result<(), String> {
    leave(CapabilitySet::empty())
}

fn leave(rest: CapabilitySet) -> Result<(), String> {
    let sets = CapabilitySets {
        effective: rest,
        permitted: rest,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(|error| failed("capset", error))
}
