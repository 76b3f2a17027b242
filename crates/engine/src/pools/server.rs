//! The process of a pool.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use skerry_confine::Role;
use skerry_hypervisor::probe::chain;

use super::place::{Place, PoolConfig, control};
use super::{Clones, Lease, Pool, PoolOptions, PoolStats, VmPool};
use crate::command::CommandSpec;
use crate::confinement;
use crate::error::EngineError;
use crate::frozen::Frozen;
use crate::hypervisor::Choice;
use crate::images;
use crate::mounts::MountSpec;
use crate::paths::Paths;
use crate::vm::{ResumeSpec, Vm, VmSpec};
use crate::vms::{Begin, bridge, children, listen, receive, send, told_of};

/// What a pool's process is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum PoolRequest {
    /// Turn the connection into one to the agent of a clean machine, for one command; the machine is
    /// given back with its end.
    Exec,
    /// Give a clean machine out under a number.
    Acquire,
    /// As `Exec`, in a machine that was given out.
    ExecIn(u64),
    /// Take a machine back.
    Release(u64),
    /// Tell the numbers.
    Stats,
    /// End.
    Close,
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum PoolReply {
    Done,
    Leased(u64),
    Stats(PoolStats),
    Failed(String),
}

/// A pool to be kept by another process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolLaunch {
    /// Where everything is kept.
    pub root: PathBuf,
    /// Its name.
    pub name: String,
    /// What its machines begin with.
    pub begin: Begin,
    /// The machine, of an image; of a snapshot, what may be said anew.
    pub vm: VmSpec,
    /// A command that is run before the first machine is cloned.
    pub prewarm: Option<CommandSpec>,
    /// How it is kept.
    pub options: PoolOptions,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Told {
    Note(String),
    Open,
    Failed(String),
}

/// Has another process, `program pool-host`, keep a pool; returns when it has its first machines.
pub fn create(
    program: &Path,
    launch: &PoolLaunch,
    note: &mut dyn FnMut(&str),
) -> Result<(), EngineError> {
    let mut own = children::start(program, "pool-host")?;
    send(&mut own, launch).map_err(EngineError::host("tell another skerry what to keep"))?;
    loop {
        match receive(&mut own).map_err(EngineError::host("hear from another skerry"))? {
            Told::Note(text) => note(&text),
            Told::Open => return Ok(()),
            Told::Failed(reason) => return Err(EngineError::Detached(reason)),
        }
    }
}

/// The whole life of a process that [`create`] made: its standard input is a socket to its maker.
pub fn run_pool() -> Result<(), EngineError> {
    let mut maker = children::leave_terminal()?;
    let launch: PoolLaunch = receive(&mut maker).map_err(EngineError::host("hear what to keep"))?;
    let result = keep(&launch, &maker);
    if let Err(error) = &result {
        let _ = send(&mut maker, &Told::Failed(chain(error)));
    }
    result
}

/// What the threads of a pool's process share.
struct Kept {
    name: String,
    pool: VmPool,
    leases: Mutex<Leases>,
    /// Those who have asked for its end, to be told when its name is free.
    closing: Mutex<Vec<UnixStream>>,
    changed: Condvar,
}

#[derive(Default)]
struct Leases {
    last: u64,
    given: BTreeMap<u64, Arc<Lease<Clones>>>,
}

/// Refuses what only one machine can have.
fn check(vm: &VmSpec) -> Result<(), EngineError> {
    if vm.network.tap.is_some() {
        return Err(EngineError::TapOfOne);
    }
    if !vm.network.publish.is_empty() {
        return Err(EngineError::PoolPorts);
    }
    match vm.mounts.iter().any(MountSpec::is_volume) {
        true => Err(EngineError::PoolVolume),
        false => Ok(()),
    }
}

fn keep(launch: &PoolLaunch, maker: &UnixStream) -> Result<(), EngineError> {
    check(&launch.vm)?;
    let paths = Paths::at(&launch.root);
    let place = Place::take(&paths, &launch.name)?;
    let listener =
        listen(&control(&paths, &launch.name)).map_err(EngineError::host("listen at a socket"))?;
    let tell = |told: Told| {
        // Nobody may listen any more, and the pool is kept all the same.
        let _ = send(&mut &*maker, &told);
    };
    let folder = paths.pools().join(&launch.name);
    confinement::of_vm(&paths, &launch.vm, &[folder])?;
    let (clones, source) = clones(&paths, launch, &mut |text| {
        tell(Told::Note(text.to_owned()));
    })?;
    let mut config = PoolConfig {
        name: launch.name.clone(),
        source,
        options: launch.options.clone(),
        surroundings: clones.surroundings().clone(),
        created: 0,
        pid: 0,
    };
    let pool = Pool::open(clones, launch.options.clone())?;
    pool.wait_first()?;
    place.publish(&paths, &mut config)?;
    let kept = Arc::new(Kept {
        name: launch.name.clone(),
        pool,
        leases: Mutex::default(),
        closing: Mutex::default(),
        changed: Condvar::new(),
    });
    let serving = kept.clone();
    let accepting = move || {
        skerry_confine::enter(Role::Control);
        while let Ok((stream, _)) = listener.accept() {
            let kept = serving.clone();
            let thread = std::thread::Builder::new().name("control".to_owned());
            let _ = thread.spawn(move || serve(stream, &kept));
        }
    };
    let thread = std::thread::Builder::new().name("accept".to_owned());
    thread
        .spawn(accepting)
        .map_err(EngineError::host("start a thread"))?;
    tell(Told::Open);
    let _ = maker.shutdown(std::net::Shutdown::Both);
    let mut closing = kept.closing.lock();
    while closing.is_empty() {
        kept.changed.wait(&mut closing);
    }
    // Before the machines, which take longer to go.
    drop(place);
    for stream in closing.iter_mut() {
        let _ = send(stream, &PoolReply::Done);
    }
    Ok(())
}

/// What the pool's machines are clones of, and what the user calls that.
fn clones(
    paths: &Paths,
    launch: &PoolLaunch,
    note: &mut dyn FnMut(&str),
) -> Result<(Clones, String), EngineError> {
    let prewarm = launch.prewarm.as_ref();
    match &launch.begin {
        Begin::Image(name) => {
            let image = images::resolve(paths, name, &mut |progress| {
                if let Some(text) = told_of(name, progress) {
                    note(&text);
                }
            })?;
            let clones = Clones::of_image(paths, (&image, name), &launch.vm, prewarm, note)?;
            Ok((clones, name.clone()))
        }
        Begin::Snapshot(name) | Begin::Machine(name) => {
            let mut spec = ResumeSpec {
                hypervisor: launch.vm.options.hypervisor,
                soft: launch.vm.options.soft.clone(),
                time_limit: None,
                hostname: launch.vm.hostname.clone(),
                network: launch.vm.network.clone(),
                mounts: launch.vm.mounts.clone(),
                show_console: false,
                rewindable: true,
                sampled: false,
                nano_cpus: launch.vm.options.nano_cpus,
                pids_limit: launch.vm.pids_limit,
            };
            let mut frozen = Frozen::open(paths, name)?;
            if let Some(command) = prewarm {
                let vm = Vm::resume(paths, &frozen, &spec, note)?;
                vm.prewarm(command)?;
                frozen = vm.capture()?.frozen;
                spec.hypervisor = Choice::Only(frozen.about.backend);
                vm.kill();
            }
            Ok((Clones::of(paths, frozen, spec, note)?, name.clone()))
        }
    }
}

fn serve(mut stream: UnixStream, kept: &Arc<Kept>) {
    let request = match receive(&mut stream) {
        Ok(request) => request,
        Err(error) => {
            let reason = format!("the request is not understood: {error}");
            let _ = send(&mut stream, &PoolReply::Failed(reason));
            return;
        }
    };
    let result = match request {
        PoolRequest::Exec => match kept.pool.acquire() {
            // The machine goes back when this returns.
            Ok(lease) => return command_in(stream, &lease),
            Err(error) => Err(error.into()),
        },
        PoolRequest::ExecIn(number) => match kept.lease(number) {
            Ok(lease) => return command_in(stream, &lease),
            Err(error) => Err(error),
        },
        PoolRequest::Acquire => kept.acquire().map(PoolReply::Leased),
        PoolRequest::Release(number) => kept.release(number).map(|()| PoolReply::Done),
        PoolRequest::Stats => Ok(PoolReply::Stats(kept.pool.stats())),
        PoolRequest::Close => {
            kept.closing.lock().push(stream);
            kept.changed.notify_all();
            return;
        }
    };
    let reply = result.unwrap_or_else(|error| PoolReply::Failed(chain(&error)));
    let _ = send(&mut stream, &reply);
}

/// Passes one command on to a machine.
fn command_in(mut stream: UnixStream, vm: &Vm) {
    match vm.connect() {
        Ok(guest) => {
            if send(&mut stream, &PoolReply::Done).is_ok() {
                bridge(stream, guest);
            }
        }
        Err(error) => {
            let _ = send(&mut stream, &PoolReply::Failed(chain(&vm.explain(error))));
        }
    }
}

impl Kept {
    fn acquire(&self) -> Result<u64, EngineError> {
        let lease = self.pool.acquire()?;
        let mut leases = self.leases.lock();
        leases.last += 1;
        let number = leases.last;
        leases.given.insert(number, Arc::new(lease));
        Ok(number)
    }

    fn missing(&self, lease: u64) -> EngineError {
        let pool = self.name.clone();
        EngineError::NoSuchLease { pool, lease }
    }

    fn lease(&self, number: u64) -> Result<Arc<Lease<Clones>>, EngineError> {
        let found = self.leases.lock().given.get(&number).cloned();
        found.ok_or_else(|| self.missing(number))
    }

    fn release(&self, number: u64) -> Result<(), EngineError> {
        let found = self.leases.lock().given.remove(&number);
        // A command that still runs in it keeps the machine until its end.
        found.map(drop).ok_or_else(|| self.missing(number))
    }
}
