//! Snapshots and forks of machines that run.
//!
//! ```text
//!  fork: client ── Fork ─► the machine's process: capture ── state, descriptors ─► client
//!        client ── state, descriptors ─► skerry vm-host, one for each copy
//! ```

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use skerry_snapshot::SnapshotStore;

use super::control::{Client, Forked, Parted, Reply, Request, Snapshotted};
use super::host::Hosted;
use super::launch::{self, Begin, Detached, Launch};
use super::names;
use crate::error::EngineError;
use crate::frozen::{Frozen, Writing};
use crate::network::NetworkSpec;
use crate::parcel;
use crate::paths::Paths;
use crate::run::RunSpec;
use crate::snapshots;

/// Children that are started at a time.
const AT_ONCE: usize = 4;
/// The most children of one request.
const MOST: usize = 1000;

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Writes a snapshot to the store, and names it.
pub(super) fn snapshot(
    hosted: &Hosted,
    name: Option<&str>,
    writing: Writing,
) -> Result<Snapshotted, EngineError> {
    if let Some(name) = name {
        snapshots::check_name(name)?;
    }
    let vm = &hosted.life()?.vm;
    if writing.difference && !vm.has_base() {
        return Err(EngineError::NoParent {
            name: hosted.name(),
        });
    }
    let folder = hosted.paths.scratch();
    Paths::ensure(&folder)?;
    let store = SnapshotStore::open(hosted.paths.snapshots())?;
    let captured = vm.capture()?;
    let id = captured.frozen.write(&store, &folder, writing)?;
    if let Some(name) = name {
        store.tag(&id, name)?;
    }
    vm.saved(id, &captured.frozen);
    Ok(Snapshotted {
        id: id.hex(),
        pause_us: micros(captured.pause),
        freeze_us: micros(captured.freeze),
    })
}

/// Catches the machine's state for copies of it, which the one who asks makes: this process starts no
/// other.
pub(super) fn hand_out(hosted: &Hosted) -> Result<(Frozen, Parted), EngineError> {
    let vm = &hosted.life()?.vm;
    let captured = vm.capture()?;
    let mut spec = RunSpec::default();
    spec.vm.options.hypervisor = captured.frozen.about.backend.into();
    spec.vm.options.soft = vm.soft().clone();
    spec.vm.options.confine = hosted.confine;
    spec.vm.options.nano_cpus = hosted.nano_cpus;
    // Its ports stay the parent's.
    if let Some(network) = vm.network() {
        spec.vm.network = NetworkSpec::of_fork(network);
    }
    // What is in guest memory goes with it.
    let folders = vm.mounts().iter().filter(|mount| mount.is_bind());
    spec.vm.mounts = folders.cloned().collect();
    let parted = Parted {
        parent: hosted.name(),
        spec: Box::new(spec),
        pause_us: micros(captured.pause),
        freeze_us: micros(captured.freeze),
    };
    Ok((captured.frozen, parted))
}

/// Makes more machines, each in a process `program vm-host` of its own, from the state that a machine
/// sends over `client`.
pub(super) fn fork(
    client: Client,
    program: &Path,
    root: &Path,
    wanted: &[String],
    auto_remove: bool,
) -> Result<Forked, EngineError> {
    if wanted.is_empty() || wanted.len() > MOST {
        return Err(EngineError::ForkCount { most: MOST });
    }
    let named = wanted.iter().filter(|name| !name.is_empty());
    named.clone().try_for_each(|name| names::check(name))?;
    let (reply, mut stream) = client.ask(&Request::Fork)?;
    let Reply::Parted(parted) = reply else {
        return Err(EngineError::CantFork);
    };
    let frozen = parcel::take_over(&mut stream)?;
    let next = AtomicUsize::new(0);
    let ids = Mutex::new(vec![String::new(); wanted.len()]);
    let failure = Mutex::new(None);
    let start = || {
        while failure.lock().is_none() {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(name) = wanted.get(number) else {
                return;
            };
            let launch = Launch {
                root: root.to_owned(),
                begin: Begin::Machine(parted.parent.clone()),
                spec: (*parted.spec).clone(),
                name: name.clone(),
                auto_remove,
            };
            let begun = launch::begin(program, &launch, Some(&frozen), &mut |_| {});
            match begun {
                Ok(Detached::Runs(id)) => ids.lock()[number] = id,
                Ok(Detached::NotStarted(why)) => {
                    *failure.lock() = Some(EngineError::Detached(why.message));
                }
                Err(error) => *failure.lock() = Some(error),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..AT_ONCE.min(wanted.len()) {
            scope.spawn(start);
        }
        start();
    });
    let mut ids = ids.into_inner();
    ids.retain(|id| !id.is_empty());
    match failure.into_inner() {
        Some(error) if ids.is_empty() => Err(error),
        Some(error) => Err(EngineError::ForkedSome {
            made: ids.len(),
            wanted: wanted.len(),
            source: Box::new(error),
        }),
        None => Ok(Forked {
            ids,
            pause_us: parted.pause_us,
            freeze_us: parted.freeze_us,
        }),
    }
}
