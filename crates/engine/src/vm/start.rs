//! How a virtual machine comes to life: from its kernel, or from where an earlier one was kept.

use std::borrow::Cow;
use std::sync::Arc;

use parking_lot::Mutex;
use skerry_devices::virtio::vsock::{VsockHost, VsockListener};
use skerry_hypervisor::probe::chain;
use skerry_machine::{Attachments, DiskConfig, MachineConfig, MachineHandle};
use skerry_oci::Image;
use skerry_protocol::host::{Control, ExecSession, HostError};
use skerry_protocol::message::{ExecRequest, Setup};
use skerry_protocol::{CONTROL_PORT, EXEC_PORT};
use skerry_storage::{Access, Disk, RawDisk, scratch};

use super::{GuestStream, Shared, Vm, VmSpec, ended, lost, root, setup};
use crate::error::EngineError;
use crate::log::ConsoleLog;
use crate::machine::{Prepared, prepare, start};
use crate::paths::Paths;
use crate::warm::{Found, Warm};
use crate::{builtin, initrd};

/// Context id of the guest on its socket device.
const GUEST_CID: u64 = 3;
/// Virtio serials by which the agent finds its disks.
pub(super) const ROOT_DISK: &str = "root";
pub(super) const SCRATCH_DISK: &str = "scratch";

impl Vm {
    /// Starts a machine from `image`; returns when its agent takes commands. `note` is told what
    /// the user should know once.
    pub fn start(
        paths: &Paths,
        image: &Image,
        spec: &VmSpec,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self, EngineError> {
        let console = ConsoleLog::new(spec.show_console);
        let prepared = prepare(&spec.options, note)?;
        let Started {
            handle,
            scratch,
            restored,
            warm,
        } = start_machine(paths, image, spec, &prepared, &console, note)?;
        let vsock = handle.remote().virtio().vsock();
        let vsock =
            vsock.ok_or_else(|| EngineError::GuestEnded("it has no socket device".to_owned()))?;
        let setup = setup(root(spec.read_only), spec.hostname.as_deref());
        let met = meet(&vsock, &setup, || {
            if restored {
                handle.remote().resume();
            }
        });
        let (listener, agent) = match met {
            Ok(met) => met,
            Err(_) if handle.remote().is_ending() => return Err(ended(&handle.wait(), &console)),
            Err(error) => return Err(error.into()),
        };
        if let Some(warm) = warm.filter(|_| !restored) {
            let kept = warm_up(&vsock)
                .map_err(EngineError::from)
                .and_then(|()| warm.keep(handle.remote(), scratch.as_deref()));
            if let Err(error) = kept {
                let why = chain(&error);
                note(&format!(
                    "the next run of this image will boot again: {why}"
                ));
            }
        }
        let shared = Shared {
            handle,
            vsock,
            _listener: listener,
            _agent: Mutex::new(agent),
            _scratch: scratch,
            console,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }
}

/// Waits for the agent and has it set up its guest. `listening` is called when it can connect.
fn meet(
    vsock: &VsockHost,
    setup: &Setup,
    listening: impl FnOnce(),
) -> Result<(VsockListener, Control<GuestStream>), HostError> {
    let listener = vsock.listen(CONTROL_PORT).map_err(lost)?;
    listening();
    let mut agent = Control::accept(GuestStream(listener.accept().map_err(lost)?))?;
    tracing::debug!(
        agent = agent.hello().agent,
        kernel = agent.hello().kernel,
        "agent speaks"
    );
    agent.set_up(setup)?;
    tracing::debug!("guest is ready");
    Ok((listener, agent))
}

/// Has the guest run programs once, so that what the first ones take longer for is behind it when its
/// start is kept: the agent itself, which every guest has, and which does nothing when it isn't process
/// 1; then, where the image has one, a shell with nothing to do, for what most programs share.
fn warm_up(vsock: &VsockHost) -> Result<(), HostError> {
    for argv in [&["/proc/1/exe"][..], &["/bin/sh", "-c", ":"]] {
        let stream = GuestStream(vsock.connect(EXEC_PORT).map_err(lost)?);
        let argv: Vec<String> = argv.iter().map(|&word| word.to_owned()).collect();
        let ended = ExecSession::start(stream, ExecRequest::new(argv))
            .and_then(|session| session.wait(&mut std::io::sink(), &mut std::io::sink()));
        match ended {
            Ok(_) | Err(HostError::NotStarted(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A machine on its way to the command.
struct Started {
    handle: MachineHandle,
    /// Its writable disk.
    scratch: Option<Arc<RawDisk>>,
    /// It is paused, in the state of an earlier start.
    restored: bool,
    /// Where its start is to be kept.
    warm: Option<Warm>,
}

fn start_machine(
    paths: &Paths,
    image: &Image,
    spec: &VmSpec,
    prepared: &Prepared,
    console: &ConsoleLog,
    note: &mut dyn FnMut(&str),
) -> Result<Started, EngineError> {
    let config = machine_config(spec);
    // What the user's own kernel does when it is started is the user's to see.
    let warm = if spec.fresh || spec.kernel.is_some() {
        None
    } else {
        Some(Warm::of(paths, image, prepared, &config)?)
    };
    let setting = Setting {
        paths,
        image,
        spec,
        prepared,
        console,
        config,
    };
    if let Some(kept) = &warm {
        let resumed = kept.find().and_then(|found| {
            let found = found.map(|found| setting.start(Some(found)));
            found.transpose()
        });
        match resumed {
            Ok(Some((handle, scratch))) => {
                return Ok(Started {
                    handle,
                    scratch,
                    restored: true,
                    warm,
                });
            }
            Ok(None) => {}
            Err(error) => {
                note(&format!(
                    "booting, since the kept start of the image can't be used: {}",
                    chain(&error)
                ));
                kept.forget()?;
            }
        }
    }
    let (handle, scratch) = setting.start(None)?;
    Ok(Started {
        handle,
        scratch,
        restored: false,
        warm,
    })
}

/// What a machine is started from, booted or resumed.
struct Setting<'a> {
    paths: &'a Paths,
    image: &'a Image,
    spec: &'a VmSpec,
    prepared: &'a Prepared,
    console: &'a ConsoleLog,
    config: MachineConfig,
}

impl Setting<'_> {
    /// Starts the machine: paused, in the state of an earlier start, or from its kernel. Gives its
    /// writable disk with it.
    fn start(
        &self,
        found: Option<Found>,
    ) -> Result<(MachineHandle, Option<Arc<RawDisk>>), EngineError> {
        let mut attachments = Attachments::default();
        let root: Arc<dyn Disk> = Arc::new(RawDisk::open(&self.image.rootfs, Access::ReadOnly)?);
        attachments.disks.push(root);
        attachments.serial[0] = Some(Box::new(self.console.clone()));
        let folder = self.paths.scratch();
        if !self.spec.read_only {
            Paths::ensure(&folder)?;
        }
        let disk = match &found {
            Some(found) => found.scratch.as_ref().map(|saved| {
                scratch::create_with(&folder, |file| {
                    saved.unpack(file)?;
                    Ok(saved.size)
                })
            }),
            None if self.spec.read_only => None,
            None => Some(scratch::create(&folder)),
        };
        let scratch = disk.transpose()?.map(Arc::new);
        if let Some(disk) = &scratch {
            attachments.disks.push(disk.clone());
        }
        let state = match found {
            Some(found) => {
                attachments.memory = Some(found.memory);
                Some(found.state)
            }
            None => {
                if self.spec.kernel.is_none() {
                    attachments.kernel = Some(Cow::Borrowed(builtin::KERNEL));
                }
                attachments.initrd = Some(Cow::Owned(initrd::with_init(builtin::AGENT)));
                None
            }
        };
        let config = self.config.clone();
        let handle = start(
            &self.spec.options,
            self.prepared,
            config,
            attachments,
            state,
        )?;
        Ok((handle, scratch))
    }
}

fn machine_config(spec: &VmSpec) -> MachineConfig {
    let mut disks = vec![DiskConfig {
        name: ROOT_DISK.to_owned(),
        read_only: true,
    }];
    if !spec.read_only {
        disks.push(DiskConfig {
            name: SCRATCH_DISK.to_owned(),
            read_only: false,
        });
    }
    // The kernel finds the virtio devices in the DSDT.
    let command_line = "console=ttyS0 quiet loglevel=4 panic=-1 dummy.numdummies=0 \
                        skerry.transport=vsock"
        .to_owned();
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
        vsock: Some(GUEST_CID),
        no_reboot: true,
        ..MachineConfig::default()
    }
}
