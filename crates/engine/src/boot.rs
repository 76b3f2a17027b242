//! `skerry boot`: a kernel of the user's, its serial port, its disks.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use skerry_machine::{
    Attachments, DiskConfig, MachineConfig, MachineHandle, MachineRemote, NetBackend, Sampler,
};
use skerry_storage::{Access, Disk, RawDisk};

use crate::builtin;
use crate::confinement;
use crate::error::EngineError;
use crate::hypervisor::Selected;
use crate::machine::{Bounds, MachineOptions, prepare, start};
use crate::network::NetworkSpec;
use crate::paths::Paths;
use crate::statistics::{Statistics, sampler};

/// A disk of the host for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The raw image.
    pub path: PathBuf,
    /// Not written, and may be shared with other readers.
    pub read_only: bool,
}

/// Where the first serial port goes.
#[derive(Default)]
pub struct SerialPort {
    /// What the guest writes; `None` drops it.
    pub output: Option<Box<dyn Write + Send>>,
    /// What the guest reads.
    pub input: Option<Box<dyn Read + Send>>,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort")
            .field("output", &self.output.is_some())
            .field("input", &self.input.is_some())
            .finish()
    }
}

/// What to boot.
#[derive(Debug, Default)]
pub struct BootSpec {
    /// The machine.
    pub options: MachineOptions,
    /// The kernel; `None` is the built-in one.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk, or for a multiboot kernel a module with its arguments.
    pub initrd: Option<PathBuf>,
    /// Kernel command line; `None` is what is usual for the kernel's kind.
    pub command_line: Option<String>,
    /// Disks, in order.
    pub disks: Vec<DiskSpec>,
    /// COM1.
    pub serial: SerialPort,
    /// The network; there is a card only where a reach is named.
    pub network: NetworkSpec,
    /// A reset ends the run.
    pub no_reboot: bool,
    /// Port of the debug-exit device.
    pub debug_exit: Option<u16>,
    /// How its processors spend their time is sampled, for [`Booted::statistics`].
    pub sampled: bool,
    /// This process is the machine's own, and is confined to it for good.
    pub own_process: bool,
}

/// A machine that boots or has booted.
#[derive(Debug)]
pub struct Booted {
    /// The machine.
    pub handle: MachineHandle,
    selected: Selected,
    sampler: Option<Sampler>,
}

impl Booted {
    /// What its processors have done; how they spent their time if [`BootSpec::sampled`] says so.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        Statistics::of(self.handle.remote(), &self.selected, self.sampler.as_ref())
    }
}

/// Starts the machine. `note` is told what the user should know once.
pub fn boot(spec: BootSpec, note: &mut dyn FnMut(&str)) -> Result<Booted, EngineError> {
    let mut attachments = Attachments::default();
    if spec.kernel.is_none() {
        attachments.kernel = Some(Cow::Borrowed(builtin::KERNEL));
    }
    let mut disks = Vec::new();
    for disk in &spec.disks {
        let access = if disk.read_only {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        };
        let opened: Arc<dyn Disk> = Arc::new(RawDisk::open(&disk.path, access)?);
        attachments.disks.push(opened);
        disks.push(DiskConfig {
            name: disk.path.display().to_string(),
            read_only: disk.read_only,
            exchangeable: false,
        });
    }
    if let Some(tap) = &spec.network.tap
        && (tap.mac.is_some() || !tap.addresses.is_empty())
    {
        return Err(EngineError::TapWithoutAgent);
    }
    let named = spec.network.mode.is_some() || spec.network.tap.is_some();
    let asked = named || !spec.network.join.is_empty();
    let card = spec.network.card().filter(|_| asked);
    let paths = match card {
        Some(_) => Paths::of_user()?,
        // Nothing is looked for there: who has no home boots kernels too.
        None => Paths::at(PathBuf::new()),
    };
    if spec.own_process {
        let files = spec.kernel.iter().chain(&spec.initrd).cloned();
        spec.options.bound_process()?;
        let network = card.map(|_| (&paths, &spec.network));
        confinement::of_files(spec.options.confine, files.collect(), network)?;
    }
    let SerialPort { output, input } = spec.serial;
    attachments.serial[0] = output;
    let network = spec.network.make(&paths, card)?;
    attachments.network = network.map(|network| network as Arc<dyn NetBackend>);
    let config = MachineConfig {
        memory: spec.options.memory,
        cpus: spec.options.cpus,
        kernel: spec.kernel.unwrap_or_else(|| "built-in kernel".into()),
        initrd: spec.initrd,
        command_line: spec.command_line,
        disks,
        rng: true,
        network: card,
        no_reboot: spec.no_reboot,
        debug_exit: spec.debug_exit,
        ..MachineConfig::default()
    };
    let prepared = prepare(&spec.options, note)?;
    let limit = Bounds {
        time_limit: spec.options.time_limit,
        nano_cpus: spec.options.nano_cpus,
    };
    let handle = start(&prepared, config, attachments, None, limit)?;
    let sampler = sampler(handle.remote(), spec.sampled)?;
    if let Some(input) = input {
        feed_serial(handle.remote(), input)?;
    }
    Ok(Booted {
        handle,
        selected: prepared.selected,
        sampler,
    })
}

/// Passes `input` to COM1 as fast as the guest takes it, in a thread that ends with the input.
fn feed_serial(remote: &MachineRemote, mut input: Box<dyn Read + Send>) -> Result<(), EngineError> {
    let Some(port) = remote.serial_input(0) else {
        return Ok(());
    };
    let remote = remote.clone();
    std::thread::Builder::new()
        .name("serial-input".to_owned())
        .spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let bytes = match input.read(&mut buffer) {
                    Ok(0) | Err(_) => return,
                    Ok(length) => buffer.get(..length).unwrap_or_default(),
                };
                let mut sent = 0;
                while sent < bytes.len() {
                    if remote.outcome().is_some() {
                        return;
                    }
                    let rest = bytes.get(sent..).unwrap_or_default();
                    sent += port.push_all(rest, std::time::Duration::from_millis(200));
                }
            }
        })
        .map_err(EngineError::host("start a thread"))?;
    Ok(())
}

/// Opens the file that a serial port's output goes to.
pub fn serial_file(path: PathBuf) -> Result<Box<dyn Write + Send>, EngineError> {
    match File::create(&path) {
        Ok(file) => Ok(Box::new(file)),
        Err(source) => Err(EngineError::Open {
            what: "serial output",
            path,
            source,
        }),
    }
}
