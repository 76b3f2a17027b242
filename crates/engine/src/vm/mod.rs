//! A virtual machine with an agent in it: started, talked to, ended.
//!
//! ```text
//!  image (EROFS, shared) ─┐                         ┌─► agent (PID 1) mounts root, says ready
//!  scratch (ext4, own) ───┴─► Machine ── vsock ─────┴─► exec: stdin ► ◄ stdout, stderr, status
//! ```

mod capture;
mod prewarm;
mod rewind;
mod start;

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use skerry_devices::virtio::vsock::{VsockHost, VsockListener};
use skerry_machine::{MachineHandle, MachineRemote, MachineState, Outcome, Sampler};
use skerry_protocol::EXEC_PORT;
use skerry_protocol::host::{Control, ExecSession, HostError};
use skerry_protocol::message::{ExecRequest, RootSpec, Setup, Upper};
use skerry_storage::{Layer, Overlay};

use crate::command::Surroundings;
use crate::error::EngineError;
use crate::frozen::{About, Base, CommandAbout, Frozen};
use crate::hypervisor::Selected;
use crate::log::ConsoleLog;
use crate::machine::MachineOptions;
use crate::mounts::{MountAbout, MountSpec, Opened};
use crate::network::{Network, NetworkSpec, nameservers};
use crate::soft::SoftOptions;
use crate::statistics::Statistics;
pub use crate::transport::GuestStream;
use crate::vms::Traffic;
pub use capture::Captured;
pub use rewind::Rewound;
pub use start::ResumeSpec;
#[cfg(test)]
pub(crate) use start::machine_config;
pub(crate) use start::{GUEST_CID, ROOT_DISK, SCRATCH_DISK};

/// How long processors that run get to show what they have counted.
const SETTLING: Duration = Duration::from_millis(5);

/// How long a guest may take to write its volumes back.
const SETTLE: Duration = Duration::from_secs(30);

/// What a virtual machine is made with, its image apart.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct VmSpec {
    /// The machine.
    pub options: MachineOptions,
    /// Kernel other than the built-in one.
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub kernel: Option<PathBuf>,
    /// The root file system can't be written.
    pub read_only: bool,
    /// Host name; `None` is `skerry`.
    pub hostname: Option<String>,
    /// Its network.
    pub network: NetworkSpec,
    /// Folders, volumes and memory file systems.
    pub mounts: Vec<MountSpec>,
    /// The guest's console goes to stderr.
    pub show_console: bool,
    /// Boot, whether or not a start of the image was kept, and keep none.
    pub fresh: bool,
    /// How its processors spend their time is sampled from the start, for [`Vm::statistics`].
    pub sampled: bool,
    /// The folder in which its writable disk is kept, made or taken up again; without one, the disk goes
    /// with the machine.
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub kept: Option<PathBuf>,
    /// The most processes and threads that its commands have, all together; `None`: as many as its kernel
    /// lets them.
    pub pids_limit: Option<u32>,
    /// The size of its writable disk in bytes; `None`: [`scratch::SIZE`](skerry_storage::scratch::SIZE).
    pub disk_size: Option<u64>,
}

/// A running virtual machine whose agent answers. Clones are the same one; the last to go ends it.
#[derive(Clone, Debug)]
pub struct Vm {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    handle: MachineHandle,
    sampler: Option<Sampler>,
    selected: Selected,
    vsock: VsockHost,
    /// Where the agent comes back to after its guest was put into another state.
    listener: VsockListener,
    agent: Mutex<Control<GuestStream>>,
    /// Its writable disk.
    scratch: Option<Arc<Overlay>>,
    /// Its image's root file system.
    root: Arc<File>,
    about: About,
    hostname: Option<String>,
    network: Option<Arc<Network>>,
    mounts: Opened,
    /// The guest has them.
    mounted: AtomicBool,
    timing: Timing,
    born: Instant,
    /// The command that goes on where the machine does.
    command: Mutex<Option<CommandAbout>>,
    /// What further commands find: the image's, as the user changed it for the first.
    surroundings: Mutex<Surroundings>,
    books: Mutex<Books>,
    console: ConsoleLog,
}

/// How long a machine took to come to life, from the call on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// To its first instruction.
    pub running: Duration,
    /// Until its agent took commands.
    pub ready: Duration,
}

/// What a machine's memory and disk are made of, apart from what was written since.
#[derive(Debug, Default)]
struct Books {
    /// Layers of memory.
    memory: Vec<Layer>,
    /// What it was in the store.
    base: Option<Base>,
    /// How often its state was taken.
    captures: u64,
    /// What was written to its disk before each of these, since the base.
    disk: Vec<(u64, Vec<Range<u64>>)>,
    /// It was not known which pages machines from the base touch first.
    unknown: bool,
    /// The state that belongs to the memory's layers and the disk's.
    origin: Option<Arc<MachineState>>,
}

impl Books {
    fn of(frozen: &Frozen) -> Self {
        Self {
            memory: frozen.memory.clone(),
            base: frozen.base.clone(),
            origin: Some(frozen.state.clone()),
            unknown: frozen.base.is_some() && frozen.working.is_none() && frozen.capture == 0,
            ..Self::default()
        }
    }

    /// The layers of memory that are not those of the base in the store.
    fn own_layers(&self) -> &[Layer] {
        let of_base = self.base.as_ref().map_or(0, |base| base.layers);
        self.memory.get(of_base..).unwrap_or_default()
    }
}

pub(crate) fn lost(source: std::io::Error) -> HostError {
    HostError::LocalStream {
        stream: "connection",
        source,
    }
}

impl Vm {
    /// What may be done to the machine below the agent.
    #[must_use]
    pub fn machine(&self) -> &MachineRemote {
        self.shared.handle.remote()
    }

    /// What machine it is.
    #[must_use]
    pub fn about(&self) -> &About {
        &self.shared.about
    }

    /// Its network, if it has one.
    #[must_use]
    pub fn network(&self) -> Option<&Network> {
        self.shared.network.as_deref()
    }

    /// The folders, volumes and memory file systems that it was given.
    #[must_use]
    pub fn mounts(&self) -> &[MountSpec] {
        self.shared.mounts.specs()
    }

    /// What its state says of the folders that it has; with a volume there is none.
    fn mounts_about(&self) -> Result<Vec<MountAbout>, EngineError> {
        let Shared {
            mounts, mounted, ..
        } = &*self.shared;
        match mounted.load(Ordering::SeqCst) {
            false => Ok(Vec::new()),
            true if mounts.has_volumes() => Err(EngineError::VolumeInState),
            true => Ok(mounts.about()),
        }
    }

    /// Has what the guest wrote to volumes put on their disks, before it is ended.
    pub(crate) fn settle(&self) {
        let machine = self.machine();
        let idle = machine.is_ending() || machine.is_paused();
        if !self.shared.mounts.has_volumes() || idle {
            return;
        }
        let mut agent = self.shared.agent.lock();
        // A guest that doesn't answer is ended all the same, as by a loss of power.
        let patience = agent
            .stream()
            .and_then(|stream| stream.0.set_read_timeout(Some(SETTLE)));
        let settled = patience.map_err(lost).and_then(|()| agent.sync_volumes());
        if let Err(error) = settled {
            tracing::warn!(%error, "What was written to volumes last may be lost");
        }
    }

    /// Notes where others find what it holds that it is called this.
    pub(crate) fn note_name(&self, name: &str) {
        self.shared.mounts.note_holder(name);
    }

    /// What its network card and its disks have moved.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let counters = self.network().map(Network::counters).unwrap_or_default();
        let virtio = self.machine().virtio();
        let (block_read, block_written) = virtio.disk_traffic();
        Traffic {
            network_received: counters.bytes_to_guest,
            network_sent: counters.bytes_from_guest,
            block_read,
            block_written,
            disk_failure: virtio.disk_failure().map(str::to_owned),
        }
    }

    /// How long it took to come to life.
    #[must_use]
    pub fn timing(&self) -> Timing {
        self.shared.timing
    }

    /// How it runs code, if it is the software processor.
    #[must_use]
    pub fn soft(&self) -> &SoftOptions {
        &self.shared.selected.soft
    }

    /// What its processors have done since it was made; how they spent their time if it was started
    /// [sampled](VmSpec::sampled).
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let Shared {
            selected, sampler, ..
        } = &*self.shared;
        Statistics::of(self.machine(), selected, sampler.as_ref())
    }

    /// The same, with how they spend their time while it is sampled for as long as `span`.
    pub fn sample(&self, span: Duration) -> Result<Statistics, EngineError> {
        let sampler = self.machine().sample()?;
        std::thread::sleep(span.saturating_sub(SETTLING));
        self.machine().refresh_statistics();
        std::thread::sleep(SETTLING);
        let selected = &self.shared.selected;
        Ok(Statistics::of(self.machine(), selected, sampler.as_ref()))
    }

    /// A connection to the agent for one command.
    pub fn connect(&self) -> Result<GuestStream, HostError> {
        Ok(GuestStream(
            self.shared.vsock.connect(EXEC_PORT).map_err(lost)?,
        ))
    }

    /// Starts a command.
    pub fn exec(&self, request: ExecRequest) -> Result<ExecSession<GuestStream>, HostError> {
        ExecSession::start(self.connect()?, request)
    }

    /// Starts the command that goes on where the machine does; or, without a request, takes up the
    /// one that runs. Further commands find `surroundings`.
    pub(crate) fn command(
        &self,
        about: CommandAbout,
        surroundings: &Surroundings,
        request: Option<ExecRequest>,
    ) -> Result<ExecSession<GuestStream>, HostError> {
        let stream = self.connect()?;
        let session = match request {
            Some(request) => ExecSession::start_kept(stream, about.session, request),
            None => ExecSession::attach(stream, about.session),
        };
        let session = session?;
        *self.shared.command.lock() = Some(about);
        self.shared.surroundings.lock().clone_from(surroundings);
        Ok(session)
    }

    /// The command has ended.
    pub(crate) fn command_ended(&self) {
        *self.shared.command.lock() = None;
    }

    /// Has every processor and device stand still.
    pub fn pause(&self) -> Result<(), EngineError> {
        Ok(self.machine().pause()?)
    }

    /// Lets a machine that was paused go on.
    pub fn unpause(&self) {
        self.machine().resume();
    }

    /// Has the guest write everything back to its disks, and waits for so long at most.
    pub(crate) fn sync(&self, limit: Duration) -> Result<(), EngineError> {
        let mut agent = self.shared.agent.lock();
        let stream = agent.stream().map_err(lost)?;
        let limited = |limit| stream.0.set_read_timeout(limit).map_err(lost);
        limited(Some(limit))?;
        let synced = agent.sync();
        limited(None)?;
        Ok(synced?)
    }

    /// Ends the machine at once.
    pub fn kill(&self) {
        self.machine().kill();
    }

    /// Waits until the machine has ended and its threads are gone.
    pub fn wait(&self) -> Outcome {
        self.shared.handle.wait()
    }

    /// What `error` comes from: if the machine has ended, that is what counts.
    #[must_use]
    pub fn explain(&self, error: HostError) -> EngineError {
        match self.machine().is_ending() {
            true => ended(&self.wait(), &self.shared.console),
            false => error.into(),
        }
    }

    /// The machine's end, where none was asked for.
    #[must_use]
    pub fn end(&self, outcome: &Outcome) -> EngineError {
        ended(outcome, &self.shared.console)
    }
}

/// A machine's end as an error, with the last that it said.
fn ended(outcome: &Outcome, console: &ConsoleLog) -> EngineError {
    let reason = match outcome {
        Outcome::TimedOut => return EngineError::TimedOut,
        Outcome::PoweredOff => "the guest powered off".to_owned(),
        Outcome::Reset => "the guest reset itself".to_owned(),
        Outcome::DebugExit(_) | Outcome::Killed => "it was stopped".to_owned(),
        Outcome::InternalError(text) => text.clone(),
        Outcome::GuestCrash { reason, registers } => format!("{reason}\n{registers}"),
    };
    let tail = console.tail(20);
    EngineError::GuestEnded(if tail.is_empty() {
        reason
    } else {
        format!("{reason}\nLast lines of its console:\n{tail}")
    })
}

/// What the agent is told about its guest, with new entropy and the time of day.
fn setup(about: &About, hostname: Option<&str>) -> Setup {
    let mut entropy = vec![0; 64];
    // Without entropy from here the guest still has its virtio source.
    if getrandom::fill(&mut entropy).is_err() {
        entropy.clear();
    }
    Setup {
        root: root(about.read_only),
        hostname: hostname.unwrap_or("skerry").to_owned(),
        nameservers: nameservers(about.machine.network),
        entropy,
        wall_clock: crate::vms::now(),
        ..Setup::default()
    }
}

/// The guest's root file system: the image under a writable disk, or alone.
fn root(read_only: bool) -> RootSpec {
    use skerry_protocol::message::BlockDevice;
    let disk = |name: &str| BlockDevice::Serial(name.to_owned());
    RootSpec::Image {
        device: disk(start::ROOT_DISK),
        fs_type: "erofs".to_owned(),
        upper: match read_only {
            true => Upper::ReadOnly,
            false => Upper::Ext4(disk(start::SCRATCH_DISK)),
        },
    }
}
