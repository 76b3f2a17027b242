//! A running machine: its supervisor thread and the handle that others hold.

use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use skerry_boot::layout::GENERATION_ID;
use skerry_devices::serial::SerialInput;
use skerry_hypervisor::Vm;
use skerry_hypervisor::probe::chain;
use skerry_hypervisor::state::CpuState;

use crate::chipset::Chipset;
use crate::control::{Command, Control, Reply, Task};
use crate::machine::BootSource;
use crate::memory::SavedRun;
use crate::outcome::Outcome;
use crate::pages::PageSet;
use crate::quota::Quota;
use crate::state::{MACHINE_STATE_VERSION, MachineState};
use crate::statistics::{self, ProcessorStatistics, Sampler};
use crate::tracking::{AnyVm, TrackedMemory};
use crate::virtio::VirtioSet;
use crate::{MachineError, layout};

/// How long the output of serial ports may take to reach its sinks when a run ends.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

/// No guest's clock has got here, 146 years after its start.
const CLOCK_END: u64 = 1 << 62;

/// Refuses a state of another build, or with other than `cpus` processors.
pub(crate) fn check_kind(version: u32, found: usize, cpus: usize) -> Result<(), MachineError> {
    if version == MACHINE_STATE_VERSION && found == cpus {
        Ok(())
    } else {
        Err(MachineError::OtherMachine {
            version,
            cpus: found,
        })
    }
}

/// What the supervisor owns.
pub(crate) struct Supervisor<V> {
    pub(crate) control: Arc<Control>,
    pub(crate) chipset: Arc<Chipset>,
    pub(crate) virtio: Arc<VirtioSet>,
    pub(crate) boot: BootSource,
    pub(crate) vm: Arc<V>,
    pub(crate) cpus: usize,
    pub(crate) memory: Arc<TrackedMemory>,
    pub(crate) generation_id: bool,
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

/// What [`MachineRemote::rewind`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewound {
    /// Pages that were written since the base and have its content again.
    pub pages: u64,
}

/// Whether a processor has yet to take or to end an interrupt: it is in its local APIC's request or
/// in-service register (Intel SDM 3A §12.8.4).
fn has_interrupt(cpu: &CpuState, vector: u8) -> bool {
    const IN_SERVICE: usize = 0x10;
    const REQUEST: usize = 0x20;
    let Some(lapic) = &cpu.lapic else {
        return false;
    };
    let (word, bit) = (usize::from(vector / 32), vector % 32);
    let registers = [IN_SERVICE, REQUEST].map(|first| lapic.registers.get(first + word));
    registers
        .into_iter()
        .flatten()
        .any(|register| register & (1 << bit) != 0)
}

/// What may be done to a running machine from any thread.
#[derive(Clone)]
pub struct MachineRemote {
    control: Arc<Control>,
    vm: Arc<dyn AnyVm>,
    cpus: usize,
    chipset: Arc<Chipset>,
    virtio: Arc<VirtioSet>,
    memory: Arc<TrackedMemory>,
    generation_id: bool,
}

impl std::fmt::Debug for MachineRemote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineRemote")
            .field("outcome", &self.control.outcome_now())
            .finish_non_exhaustive()
    }
}

impl MachineRemote {
    /// Has the processors take no more of the host's than `nano_cpus` billionths of one, all together;
    /// `None`: as much as there is. What devices take is not counted.
    pub fn limit_processors(&self, nano_cpus: Option<u64>) {
        let quota = |share| Quota::new(share, self.cpus, Instant::now());
        self.control.limit(nano_cpus.map(quota));
    }

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
        self.paused()?;
        let mut cpus = self.save_processors()?;
        // A backend may hold back what a processor told of an interrupt's end until it runs again (KVM
        // does), where no saved state has it: the device would never be heard again.
        let ended: Vec<u8> = self.chipset.ioapic.unfinished();
        let ended = ended.into_iter();
        let ended: Vec<u8> = ended
            .filter(|vector| !cpus.iter().any(|cpu| has_interrupt(cpu, *vector)))
            .collect();
        if !ended.is_empty() {
            ended
                .iter()
                .for_each(|vector| self.chipset.ioapic.eoi(*vector));
            // What that made the I/O APIC send is theirs now.
            cpus = self.save_processors()?;
        }
        Ok(MachineState {
            version: MACHINE_STATE_VERSION,
            clock_ns: self.vm.clock_ns()?,
            cpus,
            virtio: self.virtio.save(),
            chipset: self.chipset.save(),
        })
    }

    fn save_processors(&self) -> Result<Vec<CpuState>, MachineError> {
        let mut cpus = Vec::with_capacity(self.cpus);
        for cpu in 0..self.cpus {
            match self.command(cpu, Command::Save)? {
                Reply::State(state) => cpus.push(*state),
                Reply::Text(_) | Reply::Done => return Err(MachineError::Ended),
            }
        }
        Ok(cpus)
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
        self.paused()?;
        check_kind(version, cpus.len(), self.cpus)?;
        if clock_ns >= CLOCK_END {
            return Err(MachineError::BadClock(clock_ns));
        }
        self.virtio.restore(virtio)?;
        self.chipset.restore(chipset)?;
        self.vm.set_clock_ns(clock_ns)?;
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
        self.memory.for_each(&self.memory.used()?, each)
    }

    /// Starts the log of writes to memory, the guest's and the host's; nothing if it is on. What was
    /// written before counts as written since the base: all that is used, in a machine that booted.
    /// The guest runs a little slower from here on: the first write to each page after each
    /// harvest is noticed.
    pub fn track_writes(&self) -> Result<(), MachineError> {
        self.memory.track()
    }

    /// The pages that were written since the base: since the machine was restored, or since they
    /// were rebased. While the machine runs these may be more by the time this returns.
    pub fn written(&self) -> Result<PageSet, MachineError> {
        self.memory.written()
    }

    /// How many pages [`MachineRemote::written`] would tell of.
    pub fn written_count(&self) -> Result<u64, MachineError> {
        self.memory.written_count()
    }

    /// The pages that were written since this or [`MachineRemote::written`] was last called, for
    /// the rounds of a copy that is made while the machine runs. What is read after this returns
    /// and changes yet is in the next harvest.
    pub fn harvest(&self) -> Result<PageSet, MachineError> {
        self.memory.harvest()
    }

    /// Calls `each` with place (counted without the holes in the address space) and bytes of the
    /// pages of `set`, ascending. While the machine runs a page may be seen half-written.
    pub fn for_each_page_run<E: From<MachineError>>(
        &self,
        set: &PageSet,
        each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.memory.for_each(set, each)
    }

    /// Reads memory at `at`, counted without the holes in the address space.
    pub fn read_memory(&self, at: u64, into: &mut [u8]) -> Result<(), MachineError> {
        self.memory.read(at, into)
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn write_memory(&self, at: u64, bytes: &[u8]) -> Result<(), MachineError> {
        self.memory.write_physical(at, bytes)
    }

    /// Maps `runs` of `layer` over the memory of a paused machine, which must hold the same bytes:
    /// from here on they are its base, shared with everything else that maps the file, and no
    /// longer written. The log is started if it is off. Where this fails the runs before are
    /// mapped, and the others as they were.
    pub fn rebase(&self, layer: File, runs: Vec<SavedRun>) -> Result<(), MachineError> {
        self.paused()?;
        self.memory.rebase(layer, runs)
    }

    /// The pages of memory that this process has touched, and such as the host brought in with them.
    pub fn resident(&self) -> Result<PageSet, MachineError> {
        self.memory.touched()
    }

    /// How many pieces of files memory is mapped from: each takes a mapping of the host's, or two.
    pub fn base_pieces(&self) -> usize {
        self.memory.pieces()
    }

    /// Takes a paused machine back: to the base in memory, and to `state`, which was saved with it,
    /// in everything else. Host's ends of connections break; listeners stay. After a failure the
    /// machine is in no consistent state: end it.
    pub fn rewind(&self, state: &MachineState) -> Result<Rewound, MachineError> {
        self.paused()?;
        let pages = self.memory.rewind()?;
        self.restore_state(state.clone())?;
        Ok(Rewound { pages })
    }

    /// Whether the machine stands still because it was paused.
    pub fn is_paused(&self) -> bool {
        self.control.is_paused()
    }

    /// Gives the machine a new generation id and tells its guest, which then knows that it is a copy
    /// and draws new random numbers. For a clone before its first instruction. The id is memory
    /// that the host writes: it counts as written.
    pub fn new_generation(&self, id: &[u8; 16]) -> Result<(), MachineError> {
        if !self.generation_id {
            return Err(MachineError::NoGenerationId);
        }
        self.memory.write_physical(GENERATION_ID, id)?;
        self.chipset.acpi.raise_gpe(layout::GENERATION_EVENT);
        Ok(())
    }

    fn paused(&self) -> Result<(), MachineError> {
        if self.control.is_paused() {
            Ok(())
        } else if self.control.is_ending() {
            Err(MachineError::Ended)
        } else {
            Err(MachineError::NotPaused)
        }
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

    /// Begins to look at what the processors are at; `None` where the backend can't tell.
    pub fn sample(&self) -> Result<Option<Sampler>, MachineError> {
        let sampler = Sampler::start(self.vm.clone(), self.cpus);
        sampler.map_err(|source| MachineError::Resource {
            what: "statistics thread",
            source,
        })
    }

    /// What the processors have done, with how they spent their time as the sampler saw it; `None` where
    /// the backend doesn't count. The counters of a processor that runs may be some time behind:
    /// [`MachineRemote::refresh_statistics`] has it catch up.
    pub fn statistics(&self, sampler: Option<&Sampler>) -> Option<Vec<ProcessorStatistics>> {
        let found = self.vm.statistics()?;
        Some(statistics::read(found, self.cpus, sampler))
    }

    /// Has processors that run show what they have counted, within moments.
    pub fn refresh_statistics(&self) {
        if let Some(found) = self.vm.statistics() {
            found.refresh();
        }
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
            vm: supervisor.vm.clone(),
            cpus: supervisor.cpus,
            chipset: supervisor.chipset.clone(),
            virtio: supervisor.virtio.clone(),
            memory: supervisor.memory.clone(),
            generation_id: supervisor.generation_id,
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

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_hypervisor::state::LocalApicState;

    #[test]
    fn interrupts_are_found_where_they_wait() {
        let mut lapic = LocalApicState {
            registers: vec![0; 0x40],
            tsc_deadline: 0,
        };
        lapic.registers[0x11] = 1 << 3;
        lapic.registers[0x27] = 1 << 31;
        let cpu = CpuState {
            lapic: Some(lapic),
            ..CpuState::default()
        };
        let found = (0..=255).filter(|vector| has_interrupt(&cpu, *vector));
        assert_eq!(found.collect::<Vec<u8>>(), [35, 255]);
        assert!(!has_interrupt(&CpuState::default(), 35));
    }
}
