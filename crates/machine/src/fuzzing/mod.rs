//! The body of the fuzz target `machine_state`: a saved machine, changed by somebody, is restored
//! and runs for a moment.
//!
//! ```text
//!  Seed::make: a machine with every device, saved ─► one document ─► changed as the fuzzer says
//!     ─► Machine::new ─► restore ─► run a millisecond ─► save, put back, run ─► drop
//! ```
//! All of it may be refused. Nothing of it may panic or wait for ever.

mod changes;
mod guest;
mod processor;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use skerry_hypervisor::{CpuidTable, Hypervisor};
use skerry_storage::{Access, Disk, Overlay, RawDisk};

pub use changes::{Choices, change, change_text};
use processor::cpuid;

use crate::{
    Attachments, DiskConfig, Machine, MachineConfig, MachineError, MachineHandle, MachineState,
    Outcome, SavedMemory, SavedRun,
};

const MEMORY: u64 = 4 << 20;
/// A larger one takes no more courage, but time to make.
const MOST_MEMORY: u64 = 64 << 20;
const DISK: u64 = 1 << 20;
/// Changes of one case.
const MOST_CHANGES: usize = 6;
const MOMENT: Duration = Duration::from_millis(1);

/// Everything that is saved of a machine but the bytes of its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Saved {
    config: MachineConfig,
    cpuid: Vec<CpuidTable>,
    /// Place, length and place in the file.
    memory: Vec<(u64, u64, u64)>,
    state: MachineState,
}

/// A saved machine. What can't be made of it is an [`io::Error`] or a [`MachineError`] here.
#[derive(Debug)]
pub struct Seed {
    saved: Value,
    /// Guest memory, each page at its own place.
    memory: File,
    root: File,
}

/// How far a changed machine came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// Its documents can't be read.
    Nothing,
    /// The machine was refused.
    Read,
    /// Its state was refused.
    Built,
    /// It ran.
    Ran,
}

/// What a case found that should never be.
#[derive(Debug, thiserror::Error)]
#[error("The machine ended by a fault of ours: {0}")]
pub struct Fault(String);

fn memory_file(len: u64) -> io::Result<File> {
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC)?);
    file.set_len(len)?;
    Ok(file)
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}

fn config() -> MachineConfig {
    let disk = |name: &str, read_only| DiskConfig {
        name: name.to_owned(),
        read_only,
        exchangeable: false,
    };
    MachineConfig {
        memory: MEMORY,
        cpus: 2,
        kernel: "fuzz guest".into(),
        serial: [true, true, false, false],
        disks: vec![disk("root", true), disk("scratch", false)],
        console: true,
        rng: true,
        vsock: Some(3),
        generation_id: true,
        no_reboot: true,
        ..MachineConfig::default()
    }
}

impl Seed {
    /// Starts a machine, has a driver of sorts set up its devices, and saves it.
    pub fn make<H: Hypervisor>(hypervisor: &H) -> io::Result<Self> {
        let root = memory_file(DISK)?;
        let mut attachments = attachments(&root)?;
        attachments.kernel = Some(guest::kernel(guest::DEVICES).into());
        let machine = Machine::new(hypervisor, config(), attachments, cpuid).map_err(other)?;
        let handle = machine.start(None).map_err(other)?;
        let remote = handle.remote();
        std::thread::sleep(5 * MOMENT);
        remote.pause().map_err(other)?;
        for (slot, transport) in remote.virtio().transports().iter().enumerate() {
            let base = guest::RINGS + slot as u64 * guest::RINGS_OF_ONE;
            guest::set_up(transport, base, &mut |at, bytes| {
                remote.write_memory(at, bytes).map_err(other)
            })?;
        }
        let memory = memory_file(MEMORY)?;
        let mut runs = Vec::new();
        remote
            .for_each_used_memory(|at, bytes| -> Result<(), MachineError> {
                use std::os::unix::fs::FileExt;
                runs.push((at, bytes.len() as u64, at));
                let written = memory.write_all_at(bytes, at);
                written.map_err(|source| MachineError::Resource {
                    what: "file",
                    source,
                })
            })
            .map_err(other)?;
        let saved = Saved {
            config: config(),
            cpuid: (0..config().cpus).map(cpuid).collect(),
            memory: runs,
            state: remote.save_state().map_err(other)?,
        };
        Ok(Self {
            saved: serde_json::to_value(saved)?,
            memory,
            root,
        })
    }

    /// The configuration and the state, as documents.
    pub fn documents(&self) -> (&Value, &Value) {
        (&self.saved["config"], &self.saved["state"])
    }

    /// Restores the machine with the changes that `choices` make, and lets it run.
    pub fn restore<H: Hypervisor>(&self, hypervisor: &H, choices: &[u8]) -> Result<Reached, Fault> {
        let Some(saved) = self.changed(choices) else {
            return Ok(Reached::Nothing);
        };
        let Ok(machine) = self.build(hypervisor, &saved) else {
            return Ok(Reached::Read);
        };
        let Ok(handle) = machine.restore(saved.state, Some(Duration::from_secs(30))) else {
            return Ok(Reached::Built);
        };
        exercise(&handle);
        handle.remote().kill();
        match handle.wait() {
            Outcome::InternalError(text) if text.starts_with("The thread of CPU") => {
                Err(Fault(text))
            }
            _ => Ok(Reached::Ran),
        }
    }

    fn changed(&self, choices: &[u8]) -> Option<Saved> {
        let mut choices = Choices::new(choices);
        let mut saved = self.saved.clone();
        if choices.is_empty() {
            return serde_json::from_value(saved).ok();
        }
        if choices.below(16) == 0 {
            let mut text = serde_json::to_vec(&saved).ok()?;
            change_text(&mut text, &mut choices);
            return serde_json::from_slice(&text).ok();
        }
        // The state has most of what there is to be changed.
        let part = ["config", "cpuid", "memory"].get(choices.below(12));
        let part = *part.unwrap_or(&"state");
        let mut readable = None;
        for _ in 0..MOST_CHANGES {
            if choices.is_empty() {
                break;
            }
            let mut changed = saved.clone();
            change(&mut changed[part], &mut choices);
            // A change that can't be read would hide all others.
            if let Ok(read) = Saved::deserialize(&changed) {
                readable = Some(read);
                saved = changed;
            }
        }
        readable
    }

    fn build<H: Hypervisor>(
        &self,
        hypervisor: &H,
        saved: &Saved,
    ) -> Result<Machine<H>, MachineError> {
        let failed = |source| MachineError::Resource {
            what: "disk",
            source,
        };
        if (MOST_MEMORY..crate::layout::MAX_MEMORY).contains(&saved.config.memory) {
            return Err(MachineError::BadMemorySize(saved.config.memory));
        }
        let mut attachments = attachments(&self.root).map_err(failed)?;
        let runs = saved.memory.iter();
        let runs = runs.map(|&(at, len, offset)| SavedRun { at, len, offset });
        attachments.memory = Some(SavedMemory {
            layers: vec![(self.memory.try_clone().map_err(failed)?, runs.collect())],
        });
        Machine::new(hypervisor, saved.config.clone(), attachments, |id| {
            let table = saved.cpuid.get(id as usize);
            table.cloned().unwrap_or_default()
        })
    }
}

fn attachments(root: &File) -> io::Result<Attachments> {
    let path = format!("/proc/self/fd/{}", root.as_raw_fd());
    let root: Arc<dyn Disk> = Arc::new(RawDisk::open(path, Access::ReadOnly).map_err(other)?);
    let scratch = Overlay::new(DISK, Vec::new(), &std::env::temp_dir()).map_err(other)?;
    let mut attachments = Attachments {
        disks: vec![root, Arc::new(scratch)],
        ..Attachments::default()
    };
    attachments.serial[0] = Some(Box::new(io::sink()));
    Ok(attachments)
}

/// Lets a restored machine run, and whatever else one is asked for.
fn exercise(handle: &MachineHandle) {
    let remote = handle.remote();
    let _ = remote.new_generation(&[7; 16]);
    remote.resume();
    std::thread::sleep(MOMENT);
    if let Some(input) = remote.serial_input(0) {
        input.push(b"input");
    }
    remote.press_power_button();
    if remote.pause().is_err() {
        return;
    }
    if let Ok(again) = remote.save_state() {
        // What was let in comes out as something that is let in.
        if remote.restore_state(again).is_ok() {
            remote.resume();
            std::thread::sleep(MOMENT / 4);
        }
    }
}
