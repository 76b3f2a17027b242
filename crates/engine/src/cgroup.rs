//! A cgroup of its own for the process of a machine, where this host lets the user have one: it bounds the
//! process's time and memory from outside, whatever the process does.
//!
//! ```text
//!  v2   DIR/skerry-PID   cpu.max, memory.max                  DIR: below --cgroup-parent; else where
//!  v1   DIR/skerry-PID   cpu.cfs_quota_us; memory.limit_in_bytes        this process is, or beside it
//! ```
//! Linux: admin-guide/cgroup-v2, scheduler/sched-bwc, admin-guide/cgroup-v1/memory. Nobody is there to
//! remove the cgroup of a process that has ended: whoever makes the next one removes those that are empty.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use serde::Serialize;

use crate::error::EngineError;

/// What the names of our cgroups begin with.
const PREFIX: &str = "skerry-";
/// What a quota is for, in microseconds.
const PERIOD_US: u64 = 100_000;
/// The least quota that Linux takes, in microseconds.
const LEAST_QUOTA_US: u64 = 1000;
/// What the process may take beyond its guest's memory: compiled code, queues, what is read ahead.
const OVERHEAD: u64 = 256 << 20;
/// How often it is tried again when another process has removed a cgroup before we were in it.
const ATTEMPTS: usize = 8;

/// What a cgroup is to bound.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Time, in billionths of one processor's.
    pub(crate) nano_cpus: Option<u64>,
    /// Bytes of the guest's memory.
    pub(crate) memory: Option<u64>,
    /// The cgroup in which it is made, below the mount.
    pub(crate) parent: Option<String>,
}

/// Which bounds hold for this process, and in which cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Held {
    /// Of its time.
    pub cpu: Option<PathBuf>,
    /// Of its memory.
    pub memory: Option<PathBuf>,
}

static HELD: OnceLock<Held> = OnceLock::new();

/// What holds for this process, if it was put into a cgroup.
pub(crate) fn held() -> Option<&'static Held> {
    HELD.get()
}

/// A controller of cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Controller {
    Cpu,
    Memory,
}

impl Controller {
    const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
        }
    }

    /// The files of a bound and what is written there.
    fn settings(self, unified: bool, bounds: &Bounds) -> Vec<(&'static str, String)> {
        match self {
            Self::Cpu => {
                let Some(nano_cpus) = bounds.nano_cpus else {
                    return Vec::new();
                };
                let quota = u128::from(nano_cpus) * u128::from(PERIOD_US) / 1_000_000_000;
                let quota = quota.max(u128::from(LEAST_QUOTA_US));
                match unified {
                    true => vec![("cpu.max", format!("{quota} {PERIOD_US}"))],
                    false => vec![
                        ("cpu.cfs_period_us", PERIOD_US.to_string()),
                        ("cpu.cfs_quota_us", quota.to_string()),
                    ],
                }
            }
            Self::Memory => {
                let Some(memory) = bounds.memory else {
                    return Vec::new();
                };
                let most = memory.saturating_add(OVERHEAD).to_string();
                vec![(
                    if unified {
                        "memory.max"
                    } else {
                        "memory.limit_in_bytes"
                    },
                    most,
                )]
            }
        }
    }
}

/// Where this host has its cgroups and where in them this process is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    own: PathBuf,
    unified: bool,
}

/// Finds the hierarchy that has `controller`: version 2 where it is there, else version 1. `cgroup` and
/// `mounts` are what `/proc/self` says (cgroups(7), proc(5)).
fn hierarchies(cgroup: &str, mounts: &str, controller: Controller) -> Vec<Hierarchy> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let Some((front, back)) = line.split_once(" - ") else {
            continue;
        };
        let front: Vec<&str> = front.split(' ').collect();
        let back: Vec<&str> = back.split(' ').collect();
        let (Some(root), Some(mount), Some(kind)) = (front.get(3), front.get(4), back.first())
        else {
            continue;
        };
        let options = back.get(2).copied().unwrap_or_default();
        let unified = match *kind {
            "cgroup2" => true,
            "cgroup" if options.split(',').any(|option| option == controller.name()) => false,
            _ => continue,
        };
        let own = cgroup.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let is_this = match unified {
                true => number == "0" && controllers.is_empty(),
                false => controllers.split(',').any(|name| name == controller.name()),
            };
            is_this.then_some(path)
        });
        let Some(own) = own else { continue };
        // The mount may show only what is below a cgroup.
        let below = Path::new(own).strip_prefix(root).unwrap_or(Path::new(""));
        let hierarchy = Hierarchy {
            own: Path::new(mount).join(below),
            mount: mount.into(),
            unified,
        };
        match unified {
            true => found.insert(0, hierarchy),
            false => found.push(hierarchy),
        }
    }
    found
}

fn here(controller: Controller) -> io::Result<Vec<Hierarchy>> {
    let cgroup = fs::read_to_string("/proc/self/cgroup")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(hierarchies(&cgroup, &mounts, controller))
}

impl Hierarchy {
    /// The cgroups in which one may be made, the best first.
    fn parents(&self, wanted: Option<&str>, inside: Option<&Path>) -> Vec<PathBuf> {
        let inside = inside.filter(|cgroup| self.unified && cgroup.starts_with(&self.mount));
        if let Some(parent) = inside.and_then(Path::parent) {
            return vec![parent.to_owned()];
        }
        if let Some(wanted) = wanted {
            let below = wanted.trim_start_matches('/');
            return vec![self.mount.join(below)];
        }
        let mut parents = vec![self.own.clone()];
        // A cgroup of version 2 that has processes shares nothing out (no internal processes). Beside it
        // is as good, unless that would lead out of a bound.
        let bound = ["cpu.max", "memory.max"].iter().any(|file| {
            let text = fs::read_to_string(self.own.join(file));
            text.is_ok_and(|text| !text.starts_with("max"))
        });
        if self.unified
            && !bound
            && self.own != self.mount
            && let Some(parent) = self.own.parent()
        {
            parents.push(parent.to_owned());
        }
        parents
    }

    /// Lets cgroups below `parent` have the controller.
    fn share_out(&self, parent: &Path, controller: Controller) -> io::Result<()> {
        if !self.unified {
            return Ok(());
        }
        let file = parent.join("cgroup.subtree_control");
        let shared = fs::read_to_string(&file)?;
        if shared
            .split_ascii_whitespace()
            .any(|name| name == controller.name())
        {
            return Ok(());
        }
        fs::write(&file, format!("+{}", controller.name()))
    }

    /// Makes a cgroup with the bounds in `parent`.
    fn make(&self, parent: &Path, controller: Controller, bounds: &Bounds) -> io::Result<PathBuf> {
        sweep(parent);
        self.share_out(parent, controller)?;
        let cgroup = parent.join(format!("{PREFIX}{}", std::process::id()));
        match fs::create_dir(&cgroup) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        for (file, text) in controller.settings(self.unified, bounds) {
            fs::write(cgroup.join(file), text).inspect_err(|_| drop(fs::remove_dir(&cgroup)))?;
        }
        Ok(cgroup)
    }
}

/// Removes our cgroups that nobody is in any more.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            // One with a process in it stays: EBUSY.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Makes a cgroup for one controller in the first place that lets us, and puts this process into it. In
/// version 2 that is the one of all controllers, which it may be in by now.
fn enter(controller: Controller, bounds: &Bounds, inside: Option<&Path>) -> io::Result<PathBuf> {
    place(controller, bounds, inside, |cgroup| {
        fs::write(cgroup.join("cgroup.procs"), "0")
    })
}

fn place(
    controller: Controller,
    bounds: &Bounds,
    inside: Option<&Path>,
    act: impl Fn(&Path) -> io::Result<()>,
) -> io::Result<PathBuf> {
    let name = controller.name();
    let mut refusal = io::Error::other(format!("this host has no {name} controller of cgroups"));
    for hierarchy in here(controller)? {
        for parent in hierarchy.parents(bounds.parent.as_deref(), inside) {
            for _ in 0..ATTEMPTS {
                let made = hierarchy.make(&parent, controller, bounds);
                match made.and_then(|cgroup| act(&cgroup).map(|()| cgroup)) {
                    Ok(cgroup) => return Ok(cgroup),
                    // Another process took an empty cgroup for a forgotten one.
                    Err(error) if error.kind() == io::ErrorKind::NotFound && parent.is_dir() => {
                        refusal = error;
                    }
                    Err(error) => {
                        let text = format!("{}: {error}", parent.display());
                        refusal = io::Error::new(error.kind(), text);
                        break;
                    }
                }
            }
        }
    }
    Err(refusal)
}

/// Puts this process into cgroups of its own with these bounds, as far as this host lets it; where
/// [`Bounds::parent`] is named, all of them have to hold.
pub(crate) fn confine(bounds: &Bounds) -> Result<(), EngineError> {
    if let Some(parent) = &bounds.parent {
        let is_plain = |part| matches!(part, Component::Normal(_) | Component::RootDir);
        if !Path::new(parent).components().all(is_plain) {
            return Err(EngineError::CgroupParent(parent.clone()));
        }
    }
    let (mut held, mut first) = (Held::default(), None);
    for (controller, place, wanted) in [
        (Controller::Cpu, &mut held.cpu, bounds.nano_cpus.is_some()),
        (
            Controller::Memory,
            &mut held.memory,
            bounds.memory.is_some(),
        ),
    ] {
        if !wanted {
            continue;
        }
        match enter(controller, bounds, first.as_deref()) {
            Ok(cgroup) => {
                first.get_or_insert_with(|| cgroup.clone());
                *place = Some(cgroup);
            }
            Err(source) if bounds.parent.is_some() => {
                let parent = bounds.parent.clone().unwrap_or_default();
                return Err(EngineError::Cgroup { parent, source });
            }
            Err(error) => tracing::debug!(%error, "no cgroup bounds {}", controller.name()),
        }
    }
    let _ = HELD.set(held);
    Ok(())
}

/// Whether a process here could be given a cgroup that bounds its time, and one for its memory: where, or
/// why not. Tried out.
pub(crate) fn probe() -> [Result<PathBuf, String>; 2] {
    let bounds = Bounds {
        nano_cpus: Some(500_000_000),
        memory: Some(1 << 30),
        parent: None,
    };
    [Controller::Cpu, Controller::Memory].map(|controller| {
        let made =
            place(controller, &bounds, None, |_| Ok(())).map_err(|error| error.to_string())?;
        // Another process may have taken it for a forgotten one.
        let _ = fs::remove_dir(&made);
        Ok(made.parent().unwrap_or(&made).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
36 25 0:30 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
37 25 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
38 25 0:32 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn a_controller_is_found_in_either_version() {
        let own = "5:cpu,cpuacct:/a\n4:memory:/b/c\n0::/u\n";
        let found = hierarchies(own, V1, Controller::Memory);
        let paths: Vec<_> = found
            .iter()
            .map(|one| (one.own.to_str(), one.unified))
            .collect();
        assert_eq!(
            paths,
            [
                (Some("/sys/fs/cgroup/unified/u"), true),
                (Some("/sys/fs/cgroup/memory/b/c"), false)
            ]
        );
        let found = hierarchies(own, V1, Controller::Cpu);
        assert_eq!(
            found.last().map(|one| one.own.clone()),
            Some("/sys/fs/cgroup/cpu/a".into())
        );
        assert_eq!(hierarchies("", V1, Controller::Cpu), []);
        assert_eq!(hierarchies(own, "nonsense - x\n\n", Controller::Cpu), []);
    }

    #[test]
    fn a_mount_that_shows_a_part_is_understood() {
        let mounts = "9 8 0:3 /docker/1 /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
        let found = hierarchies("0::/docker/1/in\n", mounts, Controller::Cpu);
        assert_eq!(found[0].own, Path::new("/sys/fs/cgroup/in"));
        // A namespace of cgroups shows its root as /.
        let mounts = "9 8 0:3 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
        let found = hierarchies("0::/\n", mounts, Controller::Cpu);
        assert_eq!(found[0].own, Path::new("/sys/fs/cgroup/"));
    }

    #[test]
    fn bounds_are_written_as_each_version_has_them() {
        let bounds = Bounds {
            nano_cpus: Some(1_500_000_000),
            memory: Some(512 << 20),
            parent: None,
        };
        let cpu = |unified| Controller::Cpu.settings(unified, &bounds);
        assert_eq!(cpu(true), [("cpu.max", "150000 100000".to_owned())]);
        assert_eq!(
            cpu(false).last(),
            Some(&("cpu.cfs_quota_us", "150000".to_owned()))
        );
        let most = (768u64 << 20).to_string();
        assert_eq!(
            Controller::Memory.settings(true, &bounds),
            [("memory.max", most)]
        );
        assert_eq!(Controller::Memory.settings(true, &Bounds::default()), []);
    }

    /// A folder that looks like a hierarchy of version 2.
    fn unified(mount: &Path) -> Hierarchy {
        let own = mount.join("user/session");
        fs::create_dir_all(&own).expect("folder");
        for folder in [mount, &mount.join("user"), &own] {
            fs::write(folder.join("cgroup.subtree_control"), "cpu memory\n").expect("file");
            fs::write(folder.join("cpu.max"), "max 100000\n").expect("file");
        }
        Hierarchy {
            mount: mount.to_owned(),
            own,
            unified: true,
        }
    }

    #[test]
    fn version_two_has_one_cgroup_for_all_bounds() {
        let folder = tempfile::tempdir().expect("folder");
        let hierarchy = unified(folder.path());
        let bounds = Bounds {
            nano_cpus: Some(500_000_000),
            memory: Some(256 << 20),
            parent: None,
        };
        let [own, beside] = &hierarchy.parents(None, None)[..] else {
            panic!("not two places");
        };
        assert_eq!((own, beside), (&hierarchy.own, &folder.path().join("user")));
        let cpu = hierarchy
            .make(beside, Controller::Cpu, &bounds)
            .expect("cgroup");
        // The process is in it now, and is not put below it.
        let again = hierarchy.parents(None, Some(&cpu));
        assert_eq!(again, std::slice::from_ref(beside));
        let memory = hierarchy
            .make(&again[0], Controller::Memory, &bounds)
            .expect("cgroup");
        assert_eq!(cpu, memory);
        let read = |file: &str| fs::read_to_string(cpu.join(file)).expect("a bound");
        assert_eq!(read("cpu.max"), "50000 100000");
        assert_eq!(read("memory.max"), (512u64 << 20).to_string());
    }

    #[test]
    fn nobody_gets_out_of_a_bound() {
        let folder = tempfile::tempdir().expect("folder");
        let hierarchy = unified(folder.path());
        fs::write(hierarchy.own.join("cpu.max"), "50000 100000\n").expect("file");
        let parents = hierarchy.parents(None, None);
        assert_eq!(parents, std::slice::from_ref(&hierarchy.own));
        // Where the user names a place, it is that one.
        let named = hierarchy.parents(Some("/some/place"), None);
        assert_eq!(named, [folder.path().join("some/place")]);
    }

    #[test]
    fn a_parent_can_not_lead_elsewhere() {
        for parent in ["../x", "a/../../b", "/a/../b"] {
            let bounds = Bounds {
                parent: Some(parent.to_owned()),
                ..Bounds::default()
            };
            assert!(
                matches!(confine(&bounds), Err(EngineError::CgroupParent(_))),
                "{parent}"
            );
        }
    }

    #[test]
    fn the_probe_leaves_nothing() {
        for parent in probe().into_iter().flatten() {
            let name = format!("{PREFIX}{}", std::process::id());
            assert!(!parent.join(name).exists());
        }
    }
}
