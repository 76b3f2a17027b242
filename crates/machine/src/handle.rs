//! A running machine: its supervisor thread and the handle that others hold.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use skerry_devices::serial::SerialInput;
use skerry_hypervisor::probe::chain;
use skerry_hypervisor::{GuestRam, StateError, Vm};

use crate::MachineError;
use crate::chipset::Chipset;
use crate::control::{Command, Control, Reply, Task};
use crate::machine::BootSource;
use crate::memory::{self, SavedRun};
use crate::outcome::Outcome;
use crate::state::{MACHINE_STATE_VERSION, MachineState};
use crate::virtio::VirtioSet;

/// How long the output of serial ports may take to reach its sinks when a run ends.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

/// What the supervisor owns.
pub(crate) struct Supervisor<V> {
    pub(crate) control: Arc<Control>,
    pub(crate) chipset: Arc<Chipset>,
    pub(crate) virtio: Arc<VirtioSet>,
    pub(crate) boot: BootSource,
    pub(crate) vm: Arc<V>,
    pub(crate) cpus: usize,
    /// What memory was restored from.
    pub(crate) saved: Arc<[SavedRun]>,
}

impl<V: Vm> Supervisor<V> {
    fn run(&self, deadline: Option<Instant>) -> Outcome {
        loop {
            match self.control.next_task(deadline) {
                Task::End(outcome) => {
                    self.stop_processors();
                    return self.complete(outcome);
                }
                Task::Reset(source) => {
                    tracing::info!(?source, "machine reset");
                    self.stop_processors();
                    match self.reset() {
                        Ok(()) => {
                            self.virtio.resume();
                            self.control.run();
                        }
                        Err(error) => self.control.end(Outcome::InternalError(chain(&error))),
                    }
                }
            }
        }
    }

    /// Adds the registers to a crash that a device reported.
    fn complete(&self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::GuestCrash { reason, registers } if registers.is_empty() => {
                let registers = self.describe();
                Outcome::GuestCrash { reason, registers }
            }
            Outcome::TimedOut => {
                tracing::debug!("at the time limit:\n{}", self.describe());
                outcome
            }
            outcome => outcome,
        }
    }

    /// Waits until all processors are parked. Device queues stop first: a guest that feeds a queue on
    /// one processor could keep another one, which serves it, from ever getting here.
    fn stop_processors(&self) {
        self.virtio.pause();
        self.control.wait_parked();
    }

    /// The registers of all processors, which are parked.
    fn describe(&self) -> String {
        (0..self.cpus)
            .filter_map(|cpu| match self.control.command(cpu, Command::Describe) {
                Some(Ok(Reply::Text(text))) => Some(text),
                _ => None,
            })
            .collect()
    }

    /// All processors are parked: devices first, so that none writes into the new kernel.
    fn reset(&self) -> Result<(), MachineError> {
        self.chipset.timers.pause();
        self.virtio.reset();
        self.chipset.reset();
        let entry = self.boot.load()?;
        for cpu in 0..self.cpus {
            let entry = (cpu == 0).then_some(entry);
            match self.control.command(cpu, Command::Reset(entry)) {
                Some(result) => result?,
                None => return Err(MachineError::Ended),
            };
        }
        self.chipset.timers.resume();
        Ok(())
    }

    /// Ends threads and lets the serial ports' output go out.
    fn shut_down(&self, threads: Vec<JoinHandle<()>>, flush: bool) {
        self.control.stop_threads();
        for thread in threads {
            // A panic has been reported as the outcome.
            let _ = thread.join();
        }
        self.chipset.timers.pause();
        self.virtio.shut_down();
        if flush {
            flush_serial(&self.chipset);
        }
        tracing::debug!(clock_ns = self.vm.clock_ns().ok(), "machine ended");
    }
}

/// Waits for the sinks, but not for ever: one may be a pipe that nobody reads.
fn flush_serial(chipset: &Arc<Chipset>) {
    let (done, finished) = mpsc::channel();
    let chipset = chipset.clone();
    let flusher = std::thread::Builder::new()
        .name("serial-flush".into())
        .spawn(move || {
            for uart in chipset.uarts.iter().flatten() {
                uart.flush();
            }
            let _ = done.send(());
        });
    if flusher.is_ok() && finished.recv_timeout(FLUSH_PATIENCE).is_err() {
        tracing::warn!("serial output was not taken in time and is lost");
    }
}

/// What a handle needs of the virtual machine, whichever backend's it is.
trait VmClock: Send + Sync {
    fn clock_ns(&self) -> Result<u64, StateError>;
    fn set_clock_ns(&self, ns: u64) -> Result<(), StateError>;
}

impl<V: Vm> VmClock for V {
    fn clock_ns(&self) -> Result<u64, StateError> {
        Vm::clock_ns(self)
    }

    fn set_clock_ns(&self, ns: u64) -> Result<(), StateError> {
        Vm::set_clock_ns(self, ns)
    }
}

/// What may be done to a running machine from any thread.
#[derive(Clone)]
pub struct MachineRemote {
    control: Arc<Control>,
    clock: Arc<dyn VmClock>,
    cpus: usize,
    chipset: Arc<Chipset>,
    virtio: Arc<VirtioSet>,
    ram: GuestRam,
    saved: Arc<[SavedRun]>,
}

impl std::fmt::Debug for MachineRemote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineRemote")
            .field("outcome", &self.control.outcome_now())
            .finish_non_exhaustive()
    }
}

impl MachineRemote {
    /// Parks every processor and stops machine time and device threads.
    pub fn pause(&self) -> Result<(), MachineError> {
        // Queues first, or a processor that serves one might never park; and again in case a reset
        // that was under way has started them anew.
        self.virtio.pause();
        if !self.control.pause() {
            return Err(MachineError::Ended);
        }
        self.chipset.timers.pause();
        self.virtio.pause();
        Ok(())
    }

    /// Lets a paused machine run on.
    pub fn resume(&self) {
        self.virtio.resume();
        self.chipset.timers.resume();
        self.control.unpause();
    }

    /// The state of a machine that is paused: processors first, so that what they had in hand is
    /// finished, then devices, sources of interrupts before the controllers.
    pub fn save_state(&self) -> Result<MachineState, MachineError> {
        let mut cpus = Vec::with_capacity(self.cpus);
        for cpu in 0..self.cpus {
            match self.command(cpu, Command::Save)? {
                Reply::State(state) => cpus.push(*state),
                Reply::Text(_) | Reply::Done => return Err(MachineError::Ended),
            }
        }
        Ok(MachineState {
            version: MACHINE_STATE_VERSION,
            clock_ns: self.clock.clock_ns()?,
            cpus,
            virtio: self.virtio.save(),
            chipset: self.chipset.save(),
        })
    }

    /// Puts a saved state back into a machine that is paused, and whose memory is that of the
    /// state. After a failure the machine is in no consistent state: end it.
    pub fn restore_state(&self, saved: MachineState) -> Result<(), MachineError> {
        let MachineState {
            version,
            clock_ns,
            cpus,
            virtio,
            chipset,
        } = saved;
        if version != MACHINE_STATE_VERSION || cpus.len() != self.cpus {
            return Err(MachineError::OtherMachine {
                version,
                cpus: cpus.len(),
            });
        }
        self.virtio.restore(virtio)?;
        self.chipset.restore(chipset)?;
        self.clock.set_clock_ns(clock_ns)?;
        for (cpu, state) in cpus.into_iter().enumerate() {
            self.command(cpu, Command::Restore(Box::new(state)))?;
        }
        Ok(())
    }

    /// Calls `each` with place (counted without the holes in the address space) and bytes (whole
    /// pages) of all memory that may hold something, ascending; the rest is zero. For a machine that
    /// is paused.
    pub fn for_each_used_memory<E: From<MachineError>>(
        &self,
        each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        memory::for_each_used(&self.ram, &self.saved, each)
    }

    fn command(&self, cpu: usize, command: Command) -> Result<Reply, MachineError> {
        let reply = self
            .control
            .command(cpu, command)
            .ok_or(MachineError::Ended)?;
        Ok(reply?)
    }

    /// Asks the guest to power off, as the power button does.
    pub fn press_power_button(&self) {
        self.chipset.acpi.press_power_button();
    }

    /// Ends the run at once.
    pub fn kill(&self) {
        self.control.end(Outcome::Killed);
    }

    /// The receiver of COM`n`+1, if the machine has that port.
    pub fn serial_input(&self, n: usize) -> Option<SerialInput> {
        Some(self.chipset.uarts.get(n)?.as_ref()?.input())
    }

    /// The machine's virtio devices.
    pub fn virtio(&self) -> &VirtioSet {
        &self.virtio
    }

    /// Whether the run is over or about to be: then there will be an outcome shortly.
    pub fn is_ending(&self) -> bool {
        self.control.is_ending()
    }

    /// How the run ended, once it has.
    pub fn outcome(&self) -> Option<Outcome> {
        self.control.outcome_now()
    }
}

/// A running machine; dropping it ends the run.
#[derive(Debug)]
pub struct MachineHandle {
    remote: MachineRemote,
    supervisor: Mutex<Option<JoinHandle<()>>>,
}

impl MachineHandle {
    pub(crate) fn start<V: Vm>(
        supervisor: Supervisor<V>,
        threads: Vec<JoinHandle<()>>,
        deadline: Option<Instant>,
    ) -> Result<Self, MachineError> {
        let remote = MachineRemote {
            control: supervisor.control.clone(),
            clock: supervisor.vm.clone(),
            cpus: supervisor.cpus,
            chipset: supervisor.chipset.clone(),
            virtio: supervisor.virtio.clone(),
            ram: supervisor.boot.ram().clone(),
            saved: supervisor.saved.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("machine".into())
            .spawn(move || {
                supervisor.control.run();
                let outcome = supervisor.run(deadline);
                supervisor.shut_down(threads, outcome != Outcome::Killed);
                supervisor.control.publish(outcome);
            })
            .map_err(|source| MachineError::Resource {
                what: "machine thread",
                source,
            })?;
        Ok(Self {
            remote,
            supervisor: Mutex::new(Some(thread)),
        })
    }

    /// A handle for other threads.
    pub fn remote(&self) -> &MachineRemote {
        &self.remote
    }

    /// Waits until the run has ended and every thread of the machine is gone.
    pub fn wait(&self) -> Outcome {
        let outcome = self.remote.control.outcome();
        if let Some(thread) = self.supervisor.lock().take() {
            let _ = thread.join();
        }
        outcome
    }
}

impl Drop for MachineHandle {
    fn drop(&mut self) {
        self.remote.kill();
        let _ = self.wait();
    }
}
