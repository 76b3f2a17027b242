//! Building a machine and starting it.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use skerry_boot::layout::GENERATION_ID;
use skerry_boot::{BootInputs, Entry, Kernel, MemoryMap, NamedBytes, Platform, acpi, mptable};
use skerry_devices::bus::{MmioBusBuilder, PortBusBuilder};
use skerry_devices::virtio::net::NetBackend;
use skerry_hypervisor::{CpuidTable, GuestRam, Hypervisor, Irqchip, Vcpu, Vm, VmSpec};

use crate::chipset::{Chipset, ChipsetParts, SerialSink};
use crate::config::MachineConfig;
use crate::control::Control;
use crate::handle::{MachineHandle, Supervisor, check_kind};
use crate::interrupts::{MsiToVm, PicToVcpu};
use crate::memory::SavedMemory;
use crate::state::MachineState;
use crate::tracking::TrackedMemory;
use crate::vcpu::{ExitPath, VcpuThread, enter};
use crate::virtio::{VirtioParts, VirtioSet};
use crate::{MachineError, layout, memory};

/// The live things that a configuration only names.
#[derive(Default)]
pub struct Attachments {
    /// The kernel's bytes, where it is not a file.
    pub kernel: Option<Cow<'static, [u8]>>,
    /// The initrd's bytes, likewise.
    pub initrd: Option<Cow<'static, [u8]>>,
    /// Where COM1 to COM4 write to; `None` drops it.
    pub serial: [Option<SerialSink>; 4],
    /// Disks, one for each of the configuration's.
    pub disks: Vec<Arc<dyn skerry_storage::Disk>>,
    /// What the network card is plugged into, if the configuration has one.
    pub network: Option<Arc<dyn NetBackend>>,
    /// Folders, one for each of the configuration's shares.
    pub shares: Vec<Arc<skerry_share::Share>>,
    /// What memory holds from the start: for [`Machine::restore`].
    pub memory: Option<SavedMemory>,
    /// Writes to memory are logged from the start, as
    /// [`MachineRemote::track_writes`](crate::MachineRemote::track_writes) does later.
    pub track: bool,
}

impl fmt::Debug for Attachments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachments")
            .field("disks", &self.disks)
            .finish_non_exhaustive()
    }
}

/// What is loaded at every boot: read again at each, so that nothing is held in between.
pub(crate) struct BootSource {
    config: Arc<MachineConfig>,
    kernel: Option<Cow<'static, [u8]>>,
    initrd: Option<Cow<'static, [u8]>>,
    map: MemoryMap,
    ram: GuestRam,
    platform: Platform,
    /// What was not attached is read from the host's files. Not for a restored machine: whoever
    /// wrote its configuration need not be who may read them.
    from_files: bool,
}

impl BootSource {
    /// Loads the tables, the kernel and the initrd into guest memory.
    pub(crate) fn load(&self) -> Result<Entry, MachineError> {
        let kernel_name = self.config.kernel.display().to_string();
        let kernel = self.read("kernel", &self.config.kernel, self.kernel.as_deref())?;
        let initrd_name = self
            .config
            .initrd
            .as_ref()
            .map(|path| path.display().to_string());
        let initrd = match &self.config.initrd {
            Some(path) => Some(self.read("initrd", path, self.initrd.as_deref())?),
            None => None,
        };
        let kernel = Kernel::parse(&kernel_name, &kernel)?;
        let mut inputs = BootInputs {
            ram: &self.ram,
            map: &self.map,
            command_line: self
                .config
                .command_line
                .as_deref()
                .unwrap_or(kernel.usual_command_line()),
            initrd: initrd
                .as_deref()
                .zip(initrd_name.as_deref())
                .map(|(bytes, name)| NamedBytes { name, bytes }),
            rsdp: None,
        };
        inputs.rsdp = Some(acpi::write(&inputs, &self.platform)?);
        mptable::write(&inputs, &self.platform)?;
        Ok(kernel.load(&inputs)?)
    }

    fn read<'a>(
        &self,
        what: &'static str,
        path: &Path,
        given: Option<&'a [u8]>,
    ) -> Result<Cow<'a, [u8]>, MachineError> {
        match given {
            Some(bytes) => Ok(Cow::Borrowed(bytes)),
            None if self.from_files => {
                let failed = |source| MachineError::ReadFile {
                    what,
                    path: path.to_owned(),
                    source,
                };
                std::fs::read(path).map(Cow::Owned).map_err(failed)
            }
            None => Err(MachineError::NoKernel {
                path: path.to_owned(),
            }),
        }
    }
}

/// A machine that has not started.
pub struct Machine<H: Hypervisor> {
    vcpus: Vec<<H::Vm as Vm>::Vcpu>,
    vm: Arc<H::Vm>,
    control: Arc<Control>,
    path: Arc<ExitPath>,
    chipset: Arc<Chipset>,
    virtio: Arc<VirtioSet>,
    boot: BootSource,
    no_reboot: bool,
    memory: Arc<TrackedMemory>,
    generation_id: bool,
}

impl<H: Hypervisor> fmt::Debug for Machine<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("cpus", &self.vcpus.len())
            .field("chipset", &self.chipset)
            .finish_non_exhaustive()
    }
}

fn resource(what: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Resource { what, source }
}

impl<H: Hypervisor> Machine<H> {
    /// Builds memory, processors and devices. `cpuid` gives each processor its table.
    pub fn new(
        hypervisor: &H,
        config: MachineConfig,
        attachments: Attachments,
        cpuid: impl Fn(u32) -> CpuidTable,
    ) -> Result<Self, MachineError> {
        let map = MemoryMap::new(config.memory)
            .filter(|map| map.size() <= layout::MAX_MEMORY)
            .ok_or(MachineError::BadMemorySize(config.memory))?;
        if !(1..=layout::MAX_CPUS).contains(&config.cpus) {
            return Err(MachineError::BadCpuCount(config.cpus));
        }
        let Attachments { memory, track, .. } = attachments;
        if let Some(memory) = &memory {
            memory.check(map.size())?;
        }
        let ram = memory::allocate(&map, memory.as_ref(), track).map_err(|source| {
            MachineError::Memory {
                mib: map.size() >> 20,
                source,
            }
        })?;
        let vm = Arc::new(hypervisor.create_vm(&VmSpec {
            irqchip: Irqchip::Split,
            max_vcpus: config.cpus,
        })?);
        for slot in ram.slots {
            vm.map(slot)?;
        }
        let memory = TrackedMemory::new(ram.memory.clone(), vm.clone(), memory, track);
        let control = Arc::new(Control::new(config.cpus as usize, config.no_reboot));
        let extint = Arc::new(PicToVcpu::default());
        let mut ports = PortBusBuilder::new();
        let mut mmio = MmioBusBuilder::new();
        let parts = ChipsetParts {
            map: &map,
            events: control.clone(),
            msi: Arc::new(MsiToVm::new(vm.clone())),
            extint: extint.clone(),
            serial: config.serial,
            sinks: attachments.serial,
            debug_exit: config.debug_exit,
        };
        let chipset = Chipset::new(parts, &mut ports, &mut mmio)?;
        let parts = VirtioParts {
            config: &config,
            ram: &ram.memory,
            router: &chipset.router,
            disks: attachments.disks,
            network: attachments.network,
            shares: attachments.shares,
        };
        let virtio = VirtioSet::new(parts, &mut mmio)?;
        let vcpus: Vec<_> = (0..config.cpus)
            .map(|id| vm.create_vcpu(id, &cpuid(id)))
            .collect::<Result<_, _>>()?;
        if let Some(first) = vcpus.first() {
            extint.connect(first.canceller());
        }
        control.connect(vcpus.iter().map(Vcpu::canceller).collect());
        let path = ExitPath {
            ports: ports.build(),
            mmio: mmio.build(),
            ioapic: chipset.ioapic.clone(),
            pic: chipset.pic.clone(),
        };
        let (no_reboot, generation_id) = (config.no_reboot, config.generation_id);
        let platform = layout::platform(&config, virtio.len());
        Ok(Self {
            vcpus,
            vm,
            control,
            path: Arc::new(path),
            chipset: Arc::new(chipset),
            virtio: Arc::new(virtio),
            boot: BootSource {
                config: Arc::new(config),
                kernel: attachments.kernel,
                initrd: attachments.initrd,
                map,
                ram: ram.memory,
                platform,
                from_files: true,
            },
            no_reboot,
            memory: Arc::new(memory),
            generation_id,
        })
    }

    /// Loads the kernel and lets the processors run, for at most `limit`.
    pub fn start(self, limit: Option<Duration>) -> Result<MachineHandle, MachineError> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let entry = self.boot.load()?;
        if self.generation_id {
            let mut id = [0; 16];
            getrandom(&mut id, GetRandomFlags::empty())
                .map_err(io::Error::from)
                .map_err(resource("VM generation id"))?;
            self.memory.write_physical(GENERATION_ID, &id)?;
        }
        self.launch(Some(entry), deadline)
    }

    /// Puts `state` into the machine, whose memory is that of the state, and leaves it paused:
    /// [`MachineRemote::resume`](crate::MachineRemote::resume) lets it run, for at most `limit` from
    /// now. The configuration's files are not read: to be reset it needs its kernel attached.
    pub fn restore(
        mut self,
        state: MachineState,
        limit: Option<Duration>,
    ) -> Result<MachineHandle, MachineError> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        // Before threads are made for it.
        check_kind(state.version, state.cpus.len(), self.vcpus.len())?;
        self.boot.from_files = false;
        let handle = self.launch(None, deadline)?;
        handle.remote().restore_state(state)?;
        Ok(handle)
    }

    /// Starts the threads: to run from `entry`, or, without one, paused.
    fn launch(
        self,
        entry: Option<Entry>,
        deadline: Option<Instant>,
    ) -> Result<MachineHandle, MachineError> {
        let mut threads = Vec::with_capacity(self.vcpus.len());
        let stop_all = StopOnError(Some(self.control.clone()));
        for (index, mut vcpu) in self.vcpus.into_iter().enumerate() {
            let after_reset = if self.no_reboot {
                None
            } else {
                Some(Box::new(vcpu.state()?))
            };
            if let Some(entry) = entry.as_ref().filter(|_| index == 0) {
                enter(&mut vcpu, entry)?;
            }
            let thread = VcpuThread {
                vcpu,
                index,
                control: self.control.clone(),
                path: self.path.clone(),
                after_reset,
            };
            threads.push(spawn(thread)?);
        }
        if entry.is_none() {
            self.virtio.pause();
            self.control.pause();
            self.chipset.timers.pause();
        }
        let supervisor = Supervisor {
            control: self.control.clone(),
            chipset: self.chipset,
            virtio: self.virtio,
            boot: self.boot,
            vm: self.vm,
            cpus: threads.len(),
            memory: self.memory,
            generation_id: self.generation_id,
        };
        let handle = MachineHandle::start(supervisor, threads, deadline)?;
        stop_all.disarm();
        Ok(handle)
    }
}

fn spawn<V: Vcpu>(thread: VcpuThread<V>) -> Result<JoinHandle<()>, MachineError> {
    std::thread::Builder::new()
        .name(format!("vcpu{}", thread.index))
        .spawn(move || {
            skerry_confine::enter(skerry_confine::Role::Vcpu);
            thread.run();
        })
        .map_err(resource("processor thread"))
}

/// Ends the threads that were started if a later step fails.
struct StopOnError(Option<Arc<Control>>);

impl StopOnError {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for StopOnError {
    fn drop(&mut self) {
        if let Some(control) = &self.0 {
            control.stop_threads();
        }
    }
}
