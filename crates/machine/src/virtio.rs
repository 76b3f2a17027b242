//! The machine's virtio devices, in the order in which the guest finds them: disks, console,
//! entropy, sockets, network, balloon, file systems.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use skerry_devices::bus::MmioBusBuilder;
use skerry_devices::irq::InterruptRouter;
use skerry_devices::virtio::balloon::BalloonDevice;
use skerry_devices::virtio::block::{BlockConfig, BlockDevice};
use skerry_devices::virtio::console::{ConsoleDevice, ConsolePort, PortHandle};
use skerry_devices::virtio::fs::FsDevice;
use skerry_devices::virtio::net::{NetBackend, NetDevice};
use skerry_devices::virtio::rng::RngDevice;
use skerry_devices::virtio::vsock::{VsockDevice, VsockHost};
use skerry_devices::virtio::{QueueRunner, VirtioDevice, VirtioMmio, VirtioMmioState};
use skerry_hypervisor::GuestRam;
use skerry_share::Share;
use skerry_storage::Disk;

use crate::MachineError;
use crate::config::MachineConfig;
use crate::layout;
use crate::memory::FreeMemory;

/// How long the last of what a guest sent may take: its rings may be such that they never end.
const FINISH_PATIENCE: Duration = Duration::from_secs(1);

/// What a [`VirtioSet`] is built from.
pub(crate) struct VirtioParts<'a> {
    pub(crate) config: &'a MachineConfig,
    pub(crate) ram: &'a GuestRam,
    pub(crate) router: &'a Arc<InterruptRouter>,
    pub(crate) disks: Vec<Arc<dyn Disk>>,
    pub(crate) network: Option<Arc<dyn NetBackend>>,
    pub(crate) shares: Vec<Arc<Share>>,
}

/// All virtio devices of one machine, and the host's ends of those that talk.
pub struct VirtioSet {
    transports: Vec<Arc<VirtioMmio>>,
    disks: Vec<Arc<BlockDevice>>,
    console: Option<(Arc<ConsoleDevice>, PortHandle)>,
    vsock: Option<VsockHost>,
}

impl std::fmt::Debug for VirtioSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.transports.iter().map(|t| t.engine().kind()))
            .finish()
    }
}

/// Puts devices into slots. Requests are served on the processor's thread: a page-cache hit, a copy
/// into a ring or a few random bytes take less than waking another thread and being woken by it.
struct Builder<'a> {
    ram: Arc<GuestRam>,
    router: &'a Arc<InterruptRouter>,
    mmio: &'a mut MmioBusBuilder,
    transports: Vec<Arc<VirtioMmio>>,
}

impl Builder<'_> {
    fn add(&mut self, name: &str, device: Arc<dyn VirtioDevice>) -> Result<(), MachineError> {
        let slot = layout::virtio_slot(self.transports.len());
        let line = self.router.line(slot.gsi);
        let transport = VirtioMmio::new(device, self.ram.clone(), line, QueueRunner::Inline);
        let transport = transport.map_err(|source: io::Error| MachineError::Resource {
            what: "virtio device",
            source,
        })?;
        let (base, len) = (slot.base.into(), slot.len.into());
        self.mmio.add(name, base, len, transport.clone())?;
        self.transports.push(transport);
        Ok(())
    }
}

impl VirtioSet {
    pub(crate) fn new(
        parts: VirtioParts<'_>,
        mmio: &mut MmioBusBuilder,
    ) -> Result<Self, MachineError> {
        let VirtioParts {
            config,
            ram,
            router,
            disks,
            network,
            shares,
        } = parts;
        if disks.len() != config.disks.len() {
            return Err(MachineError::DiskCount {
                configured: config.disks.len(),
                attached: disks.len(),
            });
        }
        if config.network.is_some() != network.is_some() {
            return Err(MachineError::Network {
                configured: config.network.is_some(),
            });
        }
        if config.shares.len() != shares.len() {
            return Err(MachineError::ShareCount {
                configured: config.shares.len(),
                attached: shares.len(),
            });
        }
        let others = [
            config.console,
            config.rng,
            config.vsock.is_some(),
            config.network.is_some(),
            config.balloon,
        ];
        let wanted = disks.len() + shares.len() + others.iter().filter(|present| **present).count();
        if wanted > layout::VIRTIO_SLOTS {
            return Err(MachineError::TooManyDevices { wanted });
        }
        // 0 to 2 are the host's and nobody's (virtio 1.3, 5.10.4); the upper half must be zero.
        if let Some(cid) = config.vsock
            && !(3..u64::from(u32::MAX)).contains(&cid)
        {
            return Err(MachineError::BadContextId(cid));
        }
        let mut builder = Builder {
            ram: Arc::new(ram.clone()),
            router,
            mmio,
            transports: Vec::with_capacity(wanted),
        };
        let mut blocks = Vec::with_capacity(disks.len());
        for (n, (disk, named)) in disks.into_iter().zip(&config.disks).enumerate() {
            let block = BlockConfig {
                serial: named.name.clone(),
                exchangeable: named.exchangeable,
                ..BlockConfig::default()
            };
            let device = BlockDevice::new(disk, &block);
            builder.add(&format!("disk{n}"), device.clone())?;
            blocks.push(device);
        }
        let mut console = None;
        if config.console {
            let port = ConsolePort {
                name: String::new(),
                console: true,
            };
            let (device, handles) = ConsoleDevice::new(vec![port]);
            builder.add("console", device.clone())?;
            console = handles.into_iter().next().map(|handle| (device, handle));
        }
        if config.rng {
            builder.add("rng", RngDevice::new())?;
        }
        let mut vsock = None;
        if let Some(cid) = config.vsock {
            let (device, host) = VsockDevice::new(cid);
            builder.add("vsock", device)?;
            vsock = Some(host);
        }
        if let (Some(card), Some(backend)) = (config.network, network) {
            builder.add("network", NetDevice::new(card, backend))?;
        }
        if config.balloon {
            let sink = Arc::new(FreeMemory(ram.clone()));
            builder.add("balloon", BalloonDevice::new(sink))?;
        }
        for (share, named) in shares.into_iter().zip(&config.shares) {
            builder.add(&named.tag, FsDevice::new(&named.tag, share))?;
        }
        Ok(Self {
            transports: builder.transports,
            disks: blocks,
            console,
            vsock,
        })
    }

    /// How many devices there are.
    pub fn len(&self) -> usize {
        self.transports.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.transports.is_empty()
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn transports(&self) -> &[Arc<VirtioMmio>] {
        &self.transports
    }

    /// Bytes that the guest has read from its disks and written to them.
    pub fn disk_traffic(&self) -> (u64, u64) {
        let all = self.disks.iter().map(|disk| disk.transferred());
        all.fold((0, 0), |sum, disk| (sum.0 + disk.0, sum.1 + disk.1))
    }

    /// Why a disk first failed a request of the guest's, if one has.
    pub fn disk_failure(&self) -> Option<&str> {
        self.disks.iter().find_map(|disk| disk.failure())
    }

    /// The host's end of the virtio console.
    pub fn console(&self) -> Option<PortHandle> {
        self.console.as_ref().map(|(_, handle)| handle.clone())
    }

    /// Tells the guest the size of the virtio console's terminal.
    pub fn resize_console(&self, columns: u16, rows: u16) {
        if let Some((device, _)) = &self.console {
            device.resize(columns, rows);
        }
    }

    /// The host's end of the socket device.
    pub fn vsock(&self) -> Option<VsockHost> {
        self.vsock.clone()
    }

    pub(crate) fn pause(&self) {
        self.transports.iter().for_each(|t| t.pause());
    }

    pub(crate) fn resume(&self) {
        self.transports.iter().for_each(|t| t.resume());
    }

    /// When the processors are gone: what the guest sent before it ended still goes out, then
    /// connections to it break.
    pub(crate) fn shut_down(&self) {
        for transport in &self.transports {
            transport.finish(FINISH_PATIENCE);
            transport.close();
        }
    }

    pub(crate) fn reset(&self) {
        self.transports.iter().for_each(|t| t.reset());
    }

    pub(crate) fn save(&self) -> Vec<VirtioMmioState> {
        self.transports.iter().map(|t| t.save()).collect()
    }

    pub(crate) fn restore(&self, saved: Vec<VirtioMmioState>) -> Result<(), MachineError> {
        if saved.len() != self.transports.len() {
            let problem = "it has another number of virtio devices than this machine";
            return Err(skerry_devices::StateError::new("virtio", problem).into());
        }
        for (transport, state) in self.transports.iter().zip(saved) {
            transport.restore(state)?;
        }
        Ok(())
    }
}
