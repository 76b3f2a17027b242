//! How a virtual machine comes to life: from its kernel, or from where another one was kept.

use std::borrow::Cow;
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use skerry_devices::virtio::vsock::{VsockHost, VsockListener, VsockStream};
use skerry_hypervisor::probe::chain;
use skerry_machine::{
    Attachments, DiskConfig, MachineConfig, MachineHandle, MachineRemote, NetBackend, Sampler,
};
use skerry_net::address;
use skerry_oci::Image;
use skerry_protocol::CONTROL_PORT;
use skerry_protocol::host::{Control, HostError};
use skerry_protocol::message::{ExecRequest, Setup};
use skerry_storage::{Access, Disk, Overlay, RawDisk, scratch};

use super::{Books, GuestStream, Shared, Timing, Vm, VmSpec, ended, lost, setup};
use crate::command::Surroundings;
use crate::error::EngineError;
use crate::frozen::{About, Frozen, ImageAbout};
use crate::hypervisor::{Choice, select};
use crate::log::ConsoleLog;
use crate::machine::{Bounds, Prepared, prepare, start};
use crate::mounts::{self, MountSpec, Opened};
use crate::network::{Network, NetworkSpec, addresses, card_of};
use crate::paths::Paths;
use crate::random::random;
use crate::resources::{self, disk_size};
use crate::soft::SoftOptions;
use crate::statistics::sampler;
use crate::warm::{Warm, WarmDisk};
use crate::{builtin, initrd};

/// Context id of the guest on its socket device.
pub(crate) const GUEST_CID: u64 = 3;
/// How many seconds the agent of a restored guest may take to come back, before its guest is told
/// again. A busy host may take a while; in the end it is an error.
const PATIENCE: [u64; 4] = [4, 8, 16, 32];
/// Virtio serials by which the agent finds its disks.
pub(crate) const ROOT_DISK: &str = "root";
pub(crate) const SCRATCH_DISK: &str = "scratch";

/// What may be said anew of a machine that goes on from where another one was kept.
#[derive(Clone, Debug, Default)]
pub struct ResumeSpec {
    /// What runs it.
    pub hypervisor: Choice,
    /// How it runs code, if it is the software processor.
    pub soft: SoftOptions,
    /// The longest that it may run.
    pub time_limit: Option<Duration>,
    /// Host name; `None` is `skerry`.
    pub hostname: Option<String>,
    /// The guest's console goes to stderr.
    pub show_console: bool,
    /// Its network; one without a card has none.
    pub network: NetworkSpec,
    /// The folders and volumes that it had, by the places where it has them mounted.
    pub mounts: Vec<MountSpec>,
    /// It is to be taken back to where it began again and again: what it writes is noted from the
    /// start.
    pub rewindable: bool,
    /// How its processors spend their time is sampled from the start, for [`Vm::statistics`].
    pub sampled: bool,
    /// How much of the host's processors it may take, in billionths of one.
    pub nano_cpus: Option<u64>,
    /// The most processes that its commands have; `None`: as where it was kept.
    pub pids_limit: Option<u32>,
}

impl Vm {
    /// Starts a machine from `image`, which the user calls `name`; returns when its agent takes
    /// commands. `note` is told what the user should know once.
    pub fn start(
        paths: &Paths,
        image: &Image,
        name: &str,
        spec: &VmSpec,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self, EngineError> {
        let vm = Self::start_unmounted(paths, image, name, spec, note)?;
        vm.finish(spec.pids_limit)?;
        Ok(vm)
    }

    /// The same, with its folders and volumes attached and not mounted.
    pub(crate) fn start_unmounted(
        paths: &Paths,
        image: &Image,
        name: &str,
        spec: &VmSpec,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self, EngineError> {
        let begun = Instant::now();
        resources::check(spec, Some(image))?;
        let prepared = prepare(&spec.options, note)?;
        let config = machine_config(spec);
        let network = spec.network.make(paths, config.network)?;
        // What the user's own kernel does when it is started is the user's to see; and a guest that goes
        // on from a kept start has in its memory what the disk was then.
        let taken_up = spec.kept.as_deref().is_some_and(Overlay::is_kept);
        let warm = if spec.fresh || spec.kernel.is_some() || taken_up {
            None
        } else {
            let journal = spec.kept.is_some();
            let disk = WarmDisk {
                journal,
                size: spec.disk_size,
            };
            Some(Warm::of(paths, image, &prepared, &config, disk)?)
        };
        let place = Place {
            paths,
            prepared: &prepared,
            bounds: Bounds {
                time_limit: spec.options.time_limit,
                nano_cpus: spec.options.nano_cpus,
            },
            hostname: spec.hostname.as_deref(),
            console: ConsoleLog::new(spec.show_console),
            track: false,
            sampled: spec.sampled,
            kept: spec.kept.as_deref(),
            wanted: &spec.network,
            network: Cell::new(network),
            mounts: Opened::new(paths, &spec.mounts)?,
            begun,
        };
        if let Some(kept) = &warm {
            let found = kept.find(paths, image);
            match found.and_then(|found| found.map(|found| place.paused(&found)).transpose()) {
                Ok(Some(paused)) => return place.go_on(paused),
                Ok(None) => {}
                Err(error) => {
                    let why = chain(&error);
                    note(&format!(
                        "booting, since the kept start of the image can't be used: {why}"
                    ));
                    kept.forget()?;
                }
            }
        }
        let about = about(&prepared, config, (image, name), spec.read_only);
        let vm = place.boot(image, spec, about)?;
        if let Some(warm) = warm {
            let kept = vm.run_first_programs().and_then(|()| warm.keep(paths, &vm));
            if let Err(error) = kept {
                let why = chain(&error);
                note(&format!(
                    "the next run of this image will boot again: {why}"
                ));
            }
        }
        Ok(vm)
    }

    /// Does what is to be in no state that is kept for other machines.
    fn finish(&self, pids_limit: Option<u32>) -> Result<(), EngineError> {
        self.mount()?;
        if pids_limit.is_some() {
            let asked = self.shared.agent.lock().limit_processes(pids_limit);
            asked.map_err(|error| self.explain(error))?;
        }
        Ok(())
    }

    /// Has the agent mount what the machine was given besides its root. After its state was kept, so
    /// that another machine can go on from there with other folders.
    fn mount(&self) -> Result<(), EngineError> {
        let mounts = &self.shared.mounts;
        if mounts.requests().is_empty() {
            return Ok(());
        }
        let asked = self.shared.agent.lock().mount(mounts.requests().to_vec());
        asked.map_err(|error| self.explain(error))?;
        self.shared.mounted.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Has the guest run programs once, so that what the first ones take longer for is behind it when
    /// its state is kept: the agent itself, which every guest has, and which does nothing when it
    /// isn't process 1; then, where the image has one, a shell with nothing to do, for what most
    /// programs share. That more than once: the kernel does some things for the second and third.
    pub(crate) fn run_first_programs(&self) -> Result<(), EngineError> {
        let shell = &["/bin/sh", "-c", ":"];
        for argv in [&["/proc/1/exe"][..], shell, shell, shell] {
            let argv: Vec<String> = argv.iter().map(|&word| word.to_owned()).collect();
            let ended = self
                .exec(ExecRequest::new(argv))
                .and_then(|session| session.wait(&mut std::io::sink(), &mut std::io::sink()));
            match ended {
                Ok(_) | Err(HostError::NotStarted(_)) => {}
                Err(error) => return Err(self.explain(error)),
            }
        }
        Ok(())
    }

    /// Starts a machine from where another one was kept; returns when its agent takes commands.
    pub fn resume(
        paths: &Paths,
        frozen: &Frozen,
        spec: &ResumeSpec,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self, EngineError> {
        let begun = Instant::now();
        let selected = select(spec.hypervisor, &spec.soft)?;
        selected.notes.iter().for_each(|text| note(text));
        let prepared = Prepared {
            selected,
            tables: frozen.about.cpuid.clone(),
        };
        let place = Place {
            paths,
            prepared: &prepared,
            bounds: Bounds {
                time_limit: spec.time_limit,
                nano_cpus: spec.nano_cpus,
            },
            hostname: spec.hostname.as_deref(),
            console: ConsoleLog::new(spec.show_console),
            track: spec.rewindable,
            sampled: spec.sampled,
            kept: None,
            wanted: &spec.network,
            network: Cell::new(None),
            mounts: Opened::again(
                paths,
                &spec.mounts,
                &frozen.about.mounts,
                &frozen.about.machine,
            )?,
            begun,
        };
        frozen
            .check(&prepared.selected)?
            .iter()
            .for_each(|text| note(text));
        let vm = place.go_on(place.paused(frozen)?)?;
        vm.finish(spec.pids_limit)?;
        Ok(vm)
    }
}

/// What a new machine says of itself.
fn about(
    prepared: &Prepared,
    machine: MachineConfig,
    (image, name): (&Image, &str),
    read_only: bool,
) -> About {
    About {
        backend: prepared.selected.backend,
        machine,
        cpuid: prepared.tables.clone(),
        image: ImageAbout {
            name: name.to_owned(),
            digest: image.digest.to_string(),
            rootfs: image.rootfs_digest().hex(),
        },
        read_only,
        command: None,
        surroundings: Surroundings::of(&image.config),
        mounts: Vec::new(),
    }
}

/// Where a machine is to run.
struct Place<'a> {
    paths: &'a Paths,
    prepared: &'a Prepared,
    bounds: Bounds,
    hostname: Option<&'a str>,
    console: ConsoleLog,
    /// Writes to memory are noted from the start.
    track: bool,
    /// How its processors spend their time is sampled.
    sampled: bool,
    /// Where its writable disk is kept, if it is.
    kept: Option<&'a Path>,
    /// The network that was asked for.
    wanted: &'a NetworkSpec,
    /// The same, made and not yet plugged into a machine.
    network: Cell<Option<Arc<Network>>>,
    /// Folders and volumes.
    mounts: Opened,
    /// When it was asked for.
    begun: Instant,
}

/// A machine that stands still, in the state of another one.
struct Paused {
    handle: MachineHandle,
    sampler: Option<Sampler>,
    scratch: Option<Arc<Overlay>>,
    about: About,
    books: Books,
    root: Arc<File>,
    network: Option<Arc<Network>>,
}

impl Place<'_> {
    /// The folder for what machines write, made.
    fn folder(&self) -> Result<PathBuf, EngineError> {
        let folder = self.paths.scratch();
        Paths::ensure(&folder)?;
        Ok(folder)
    }

    /// The network of a machine, made now unless it has been.
    fn network(&self, about: &About) -> Result<Option<Arc<Network>>, EngineError> {
        match self.network.take() {
            Some(made) => Ok(Some(made)),
            None => self.wanted.make(self.paths, about.machine.network),
        }
    }

    fn attachments(
        &self,
        root: &File,
        scratch: Option<&Arc<Overlay>>,
        network: Option<&Arc<Network>>,
    ) -> Result<Attachments, EngineError> {
        // By way of the descriptor: the file may have no name any more.
        let path = format!("/proc/self/fd/{}", root.as_raw_fd());
        let root: Arc<dyn Disk> = Arc::new(RawDisk::open(path, Access::ReadOnly)?);
        let mut attachments = Attachments {
            disks: vec![root],
            ..Attachments::default()
        };
        if let Some(disk) = scratch {
            attachments.disks.push(disk.clone());
        }
        attachments.disks.extend(self.mounts.disks());
        attachments.shares = self.mounts.shares.clone();
        attachments.network = network.map(|network| network.clone() as Arc<dyn NetBackend>);
        attachments.serial[0] = Some(Box::new(self.console.clone()));
        Ok(attachments)
    }

    /// Boots a machine.
    fn boot(&self, image: &Image, spec: &VmSpec, about: About) -> Result<Vm, EngineError> {
        let scratch = match spec.read_only {
            true => None,
            false => Some(Arc::new(match self.kept {
                Some(folder) => scratch::kept(folder, spec.disk_size.map(disk_size))?,
                None => scratch::overlay(self.folder()?, spec.disk_size.map(disk_size))?,
            })),
        };
        let root = Arc::new(crate::frozen::open_root(image)?);
        let network = self.network(&about)?;
        let mut attachments = self.attachments(&root, scratch.as_ref(), network.as_ref())?;
        if spec.kernel.is_none() {
            attachments.kernel = Some(Cow::Borrowed(builtin::KERNEL));
        }
        attachments.initrd = Some(Cow::Owned(initrd::with_init(builtin::AGENT)));
        let config = about.machine.clone();
        let handle = start(self.prepared, config, attachments, None, self.bounds)?;
        let paused = Paused {
            sampler: sampler(handle.remote(), self.sampled)?,
            handle,
            scratch,
            about,
            books: Books::default(),
            root,
            network,
        };
        self.meet(paused, false)
    }

    /// Makes a machine in the state of `frozen`.
    fn paused(&self, frozen: &Frozen) -> Result<Paused, EngineError> {
        let scratch = match &frozen.scratch {
            None => None,
            Some((size, layers)) => {
                let disk = match self.kept {
                    Some(folder) => Overlay::keep(*size, layers.clone(), folder)?,
                    None => Overlay::new(*size, layers.clone(), &self.folder()?)?,
                };
                Some(Arc::new(disk))
            }
        };
        let network = self.network(&frozen.about)?;
        let mut attachments = self.attachments(&frozen.root, scratch.as_ref(), network.as_ref())?;
        frozen.prefetch()?;
        attachments.memory = Some(frozen.saved_memory()?);
        attachments.track = self.track;
        let config = frozen.about.machine.clone();
        let state = Some((*frozen.state).clone());
        let handle = start(self.prepared, config, attachments, state, self.bounds)?;
        let about = About {
            backend: self.prepared.selected.backend,
            ..frozen.about.clone()
        };
        Ok(Paused {
            sampler: sampler(handle.remote(), self.sampled)?,
            handle,
            scratch,
            about,
            books: Books::of(frozen),
            root: frozen.root.clone(),
            network,
        })
    }

    /// Lets a machine in another one's state go on, as one of its own.
    fn go_on(&self, paused: Paused) -> Result<Vm, EngineError> {
        new_generation(&paused.about, paused.handle.remote())?;
        self.meet(paused, true)
    }

    /// Waits for the agent, which has to come back where the machine stands still `restored`, and has
    /// it set up its guest.
    fn meet(&self, machine: Paused, restored: bool) -> Result<Vm, EngineError> {
        let Paused {
            handle,
            sampler,
            scratch,
            about,
            books,
            root: image,
            network,
        } = machine;
        let vsock = handle.remote().virtio().vsock();
        let vsock =
            vsock.ok_or_else(|| EngineError::GuestEnded("it has no socket device".to_owned()))?;
        let setup = setup(&about, self.hostname);
        let listener = vsock.listen(CONTROL_PORT).map_err(lost)?;
        let (running, met);
        if restored {
            handle.remote().resume();
            running = self.begun.elapsed();
            met = greet_again(&vsock, &listener, &setup);
        } else {
            running = self.begun.elapsed();
            let stream = listener.accept().map_err(lost);
            met = stream.and_then(|stream| greet(stream, &setup));
        }
        let met = met.and_then(|mut agent| {
            give_addresses(&mut agent, network.as_deref())?;
            Ok(agent)
        });
        let agent = match met {
            Ok(agent) => agent,
            Err(_) if handle.remote().is_ending() => {
                return Err(ended(&handle.wait(), &self.console));
            }
            Err(error) => return Err(error.into()),
        };
        let shared = Shared {
            handle,
            sampler,
            selected: self.prepared.selected.clone(),
            vsock,
            listener,
            agent: Mutex::new(agent),
            scratch,
            root: image,
            surroundings: Mutex::new(about.surroundings.clone()),
            about,
            hostname: self.hostname.map(str::to_owned),
            network,
            mounted: AtomicBool::new(self.mounts.is_mounted()),
            mounts: self.mounts.clone(),
            born: self.begun,
            timing: Timing {
                running,
                ready: self.begun.elapsed(),
            },
            command: Mutex::new(None),
            books: Mutex::new(books),
            console: self.console.clone(),
        };
        Ok(Vm {
            shared: Arc::new(shared),
        })
    }
}

/// Tells the guest's kernel, before its first instruction, that it is a copy: it draws new random
/// numbers then, whatever the agent does.
pub(super) fn new_generation(about: &About, machine: &MachineRemote) -> Result<(), EngineError> {
    if !about.machine.generation_id {
        return Ok(());
    }
    Ok(machine.new_generation(&random()?)?)
}

/// Has the guest take its addresses on the networks that it shares, or on the host's.
pub(super) fn give_addresses(
    agent: &mut Control<GuestStream>,
    network: Option<&Network>,
) -> Result<(), HostError> {
    if let Some(card) = card_of(network) {
        return agent.set_card(card);
    }
    match addresses(network) {
        // A guest has none by itself.
        none if none.is_empty() => Ok(()),
        addresses => agent.set_addresses(addresses),
    }
}

/// Waits for the agent of a guest that boots, for as long as that takes.
fn greet(agent: VsockStream, setup: &Setup) -> Result<Control<GuestStream>, HostError> {
    let mut agent = Control::accept(GuestStream(agent))?;
    tracing::debug!(
        agent = agent.hello().agent,
        kernel = agent.hello().kernel,
        "agent speaks"
    );
    agent.set_up(setup)?;
    tracing::debug!("guest is ready");
    Ok(agent)
}

/// Waits for the agent of a guest that was put into another state, and tells the guest again that its
/// connections are gone where it doesn't seem to know.
pub(super) fn greet_again(
    vsock: &VsockHost,
    listener: &VsockListener,
    setup: &Setup,
) -> Result<Control<GuestStream>, HostError> {
    let mut silent = io::Error::from(io::ErrorKind::TimedOut);
    for seconds in PATIENCE {
        let patience = Duration::from_secs(seconds);
        let met = listener.accept_timeout(patience).and_then(|stream| {
            stream.set_read_timeout(Some(patience))?;
            Ok(stream)
        });
        match met {
            Ok(stream) => match greet(stream.try_clone().map_err(lost)?, setup) {
                Err(HostError::Connection(_)) => {}
                met => {
                    stream.set_read_timeout(None).map_err(lost)?;
                    return met;
                }
            },
            Err(error) if error.kind() == io::ErrorKind::TimedOut => silent = error,
            Err(error) => return Err(lost(error)),
        }
        tracing::debug!("the agent doesn't come back: its guest is told again");
        vsock.reset();
    }
    Err(lost(silent))
}

pub(crate) fn machine_config(spec: &VmSpec) -> MachineConfig {
    let mut disks = vec![DiskConfig {
        name: ROOT_DISK.to_owned(),
        read_only: true,
        exchangeable: false,
    }];
    if !spec.read_only {
        disks.push(DiskConfig {
            name: SCRATCH_DISK.to_owned(),
            read_only: false,
            exchangeable: false,
        });
    }
    let (volumes, shares) = mounts::devices(&spec.mounts);
    disks.extend(volumes);
    // The kernel finds the virtio devices in the DSDT.
    let mut command_line = "console=ttyS0 quiet loglevel=4 panic=-1 dummy.numdummies=0 \
                        skerry.transport=vsock"
        .to_owned();
    let network = spec.network.card();
    // On a network of the host's, the guest's addresses are not those of every machine.
    if network.is_some_and(|card| !card.offload) {
        command_line.push(' ');
        command_line.push_str(&address::kernel_parameter());
    }
    MachineConfig {
        memory: spec.options.memory,
        cpus: spec.options.cpus,
        kernel: spec
            .kernel
            .clone()
            .unwrap_or_else(|| "built-in kernel".into()),
        initrd: Some("agent".into()),
        command_line: Some(command_line),
        disks,
        rng: true,
        balloon: true,
        vsock: Some(GUEST_CID),
        network,
        shares,
        generation_id: true,
        no_reboot: true,
        ..MachineConfig::default()
    }
}
