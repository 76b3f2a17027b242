//! A virtual processor: its run loop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use skerry_hypervisor::cancel::CallWord;
use skerry_hypervisor::validate::StateLimits;
use skerry_hypervisor::{
    BootRegisters, BudgetError, CallId, Canceller, CpuState, CpuidTable, CreateVcpuError, Exit,
    Gpa, InterruptError, Irqchip, Kick, RunError, StateError, Vcpu,
};
use skerry_x86cpu::sys::state::Activity;
use skerry_x86cpu::{Cpu, CpuExit, CpuShared, Host};

use crate::host::SoftHost;
use crate::probe::Model;
use crate::state;
use crate::vm::{MAX_VCPUS, VmShared};

/// After so long with little to do a processor gives back the memory of what it has derived from
/// guest code.
const IDLE: Duration = Duration::from_secs(1);
/// More of its thread's time than this within [`IDLE`] is not little: a guest that does nothing takes less
/// for its timers, and a program in it takes more.
const BUSY: Duration = Duration::from_millis(10);

/// How much a processor has had to do lately. That is told from the time of its thread, which is the
/// same whether code is interpreted or compiled, and in which no other thread of a busy host has a part.
struct Workload {
    /// When counting began, and what the thread had taken by then.
    since: Instant,
    taken: Duration,
    /// When it was last found to have much to do.
    busy: Instant,
}

impl Workload {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            since: now,
            taken: Duration::ZERO,
            busy: now,
        }
    }

    /// How much longer it must have little to do to be idle, if its thread has taken so much time.
    fn until_idle(&mut self, taken: Duration, now: Instant) -> Duration {
        // It may go on in another thread, which has taken less.
        let much = taken.saturating_sub(self.taken) > BUSY;
        if much {
            self.busy = now;
        }
        if much || now.duration_since(self.since) >= IDLE {
            self.since = now;
            self.taken = taken;
        }
        IDLE.saturating_sub(now.duration_since(self.busy))
    }
}

/// The processor time that the calling thread has taken.
fn thread_time() -> Duration {
    let taken = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(taken).unwrap_or_default()
}

/// Makes a processor leave its loop at the next block, or its thread wake up.
struct SoftKick {
    id: u32,
    shared: Arc<CpuShared>,
    host: Arc<SoftHost>,
}

impl Kick for SoftKick {
    fn kick(&self) {
        self.shared.request_exit();
        self.host.wake(self.id);
    }
}

/// A virtual processor.
pub struct SoftVcpu {
    pub(crate) cpu: Box<Cpu>,
    pub(crate) limits: StateLimits,
    word: Arc<CallWord>,
    kick: Arc<SoftKick>,
    /// An exit that came up while an instruction was being finished.
    queued: Option<CpuExit>,
    workload: Workload,
    vm: Arc<VmShared>,
}

impl SoftVcpu {
    pub(crate) fn new(
        vm: Arc<VmShared>,
        id: u32,
        cpuid: &CpuidTable,
    ) -> Result<Self, CreateVcpuError> {
        let bad = |reason| CreateVcpuError::BadId { id, reason };
        let made = vm.machine.cpus.get(id as usize).filter(|_| id < MAX_VCPUS);
        let slot = made.ok_or(bad("the virtual machine was not made for so many"))?;
        if slot.get().is_some() {
            return Err(bad("there is one with this id"));
        }
        let unsupported = |feature| CreateVcpuError::Unsupported { id, feature };
        let model = Model::of(cpuid);
        if let Some(feature) = &model.missing {
            return Err(unsupported(feature.clone()));
        }
        let mut cpu =
            Cpu::new(&vm.machine, id, model.own.clone()).ok_or(bad("there is one with this id"))?;
        let khz = model.khz;
        if !cpu.set_tsc_khz(khz) {
            return Err(unsupported(format!("a time-stamp counter of {khz} kHz")));
        }
        if id != 0 && vm.irqchip == Irqchip::Split {
            cpu.sys.activity = Activity::WaitForInit;
        }
        vm.host.add_processor(id, cpu.shared.clone());
        let kick = Arc::new(SoftKick {
            id,
            shared: cpu.shared.clone(),
            host: vm.host.clone(),
        });
        Ok(Self {
            cpu,
            limits: model.limits(vm.irqchip == Irqchip::Split),
            word: Arc::default(),
            kick,
            queued: None,
            workload: Workload::new(),
            vm,
        })
    }

    pub(crate) fn has_apic(&self) -> bool {
        self.vm.irqchip == Irqchip::Split
    }

    /// What the contract calls `exit`; `None` to go on.
    fn translate(&mut self, exit: CpuExit) -> Option<Exit> {
        Some(match exit {
            CpuExit::PortIn { port, size } => Exit::PortIn { port, size },
            CpuExit::PortOut { port, size, data } => Exit::PortOut { port, size, data },
            CpuExit::MmioRead { gpa, size } => Exit::MmioRead {
                gpa: Gpa(gpa),
                size,
            },
            CpuExit::MmioWrite { gpa, size, data } => Exit::MmioWrite {
                gpa: Gpa(gpa),
                size,
                data,
            },
            CpuExit::Halted { .. } if !self.has_apic() => {
                self.cpu.sys.activity = Activity::Running;
                Exit::Halt
            }
            CpuExit::Halted { .. } | CpuExit::WaitForSipi => {
                self.wait();
                return None;
            }
            CpuExit::InterruptWindow => {
                self.cpu.request_interrupt_window(false);
                Exit::InterruptWindow
            }
            CpuExit::IoapicEoi { vector } => Exit::IoapicEoi { vector },
            CpuExit::Shutdown => Exit::Shutdown,
            CpuExit::BudgetSpent => Exit::BudgetSpent,
            CpuExit::Requested if self.word.is_cancelled() => self.leave(),
            CpuExit::Requested if self.word.take_kick() => Exit::Interrupted,
            // What asked for it has been dealt with.
            CpuExit::Requested => return None,
        })
    }

    /// The exit of a call that was cancelled. Who saves the processor next finds nothing in its state of
    /// an interrupt that has ended and that the I/O APIC has not heard of, so that comes first.
    fn leave(&mut self) -> Exit {
        match self.cpu.apic.take_ended() {
            Some(vector) => Exit::IoapicEoi { vector },
            None => Exit::Cancelled,
        }
    }

    /// Waits until there is a reason to run. What was derived from a guest's code is of no use to one
    /// that does nothing for long.
    fn wait(&mut self) {
        let host = &self.vm.host;
        let (id, shared) = (self.cpu.id, self.cpu.shared.clone());
        let much = self.cpu.has_much_code();
        let idle = much.then(|| self.workload.until_idle(thread_time(), Instant::now()));
        if !host.park(id, &shared, idle) {
            self.cpu.forget_code();
            host.park(id, &shared, None);
        }
    }

    /// Finishes an instruction that exited, so that the processor stands between two.
    fn finish_instruction(&mut self) -> Result<(), StateError> {
        let inside = StateError::InsideInstruction { id: self.cpu.id };
        if self.queued.is_some() || self.cpu.wants_value() {
            return Err(inside);
        }
        if !self.cpu.inside_instruction() {
            return Ok(());
        }
        // It goes on with the instruction, then leaves for the request.
        self.cpu.shared.request_exit();
        match self.cpu.run() {
            CpuExit::Requested => Ok(()),
            other => {
                self.queued = Some(other);
                Err(inside)
            }
        }
    }
}

impl Vcpu for SoftVcpu {
    fn id(&self) -> u32 {
        self.cpu.id
    }

    fn canceller(&self) -> Canceller {
        Canceller::new(self.word.clone(), self.kick.clone())
    }

    fn begin_call(&mut self) -> CallId {
        self.word.begin()
    }

    fn end_call(&mut self) {
        self.word.end();
    }

    fn run(&mut self) -> Result<Exit, RunError> {
        loop {
            if self.word.is_cancelled() {
                return Ok(self.leave());
            }
            if self.cpu.wants_value() {
                return Err(RunError::ReadNotCompleted { id: self.cpu.id });
            }
            let exit = match self.queued.take() {
                Some(exit) => exit,
                None => self.cpu.run(),
            };
            if let Some(exit) = self.translate(exit) {
                return Ok(exit);
            }
        }
    }

    fn set_budget(&mut self, instructions: Option<u64>) -> Result<(), BudgetError> {
        self.cpu.set_budget(instructions);
        Ok(())
    }

    fn instructions(&self) -> Option<u64> {
        self.cpu.retired()
    }

    fn complete_read(&mut self, value: u64) {
        self.cpu.complete_read(value);
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        self.cpu.request_interrupt_window(wanted);
    }

    fn ready_for_extint(&self) -> bool {
        self.cpu.ready_for_extint()
    }

    fn inject_extint(&mut self, vector: u8) -> Result<(), InterruptError> {
        self.cpu.inject_extint(vector);
        Ok(())
    }

    fn set_boot_registers(&mut self, registers: &BootRegisters) -> Result<(), StateError> {
        self.limits.check_boot(registers)?;
        self.queued = None;
        self.cpu
            .set_boot_registers(
                &state::general_to(&registers.general),
                &state::system_to(&registers.system),
            )
            .map_err(state::invalid)
    }

    fn boot_registers(&self) -> Result<BootRegisters, StateError> {
        Ok(BootRegisters {
            general: state::general_from(&self.cpu.general_registers()),
            system: state::system_from(&self.cpu.system_registers()),
        })
    }

    fn state(&mut self) -> Result<CpuState, StateError> {
        self.finish_instruction()?;
        let lapic = self.has_apic();
        let saved = self.cpu.save_state();
        Ok(state::state_from(saved, lapic, self.limits.xsave_size))
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.limits.check(state)?;
        state::load(&mut self.cpu, state)?;
        let offset = self.cpu.tsc_offset();
        let khz = self.cpu.sys.time.scale.khz();
        let common = self.vm.tsc_offset.common(self.cpu.id, offset, khz);
        if common != offset {
            self.cpu.set_tsc_offset(common);
        }
        self.queued = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_idle_when_it_has_run_little_for_long() {
        let mut workload = Workload::new();
        let start = workload.since;
        let at = |ms| start + Duration::from_millis(ms);
        let little = BUSY / 10;
        assert_eq!(
            workload.until_idle(little, at(400)),
            Duration::from_millis(600)
        );
        // Much at once.
        assert_eq!(workload.until_idle(2 * BUSY, at(500)), IDLE);
        // A little, now and then, is nothing.
        for n in 1..10_u32 {
            let waited = Duration::from_millis(u64::from(n) * 200);
            let left = workload.until_idle(2 * BUSY + n * little, at(500) + waited);
            assert_eq!(left, IDLE.saturating_sub(waited));
        }
        // Many littles within a second are much.
        let mut now = at(10_000);
        workload.until_idle(20 * BUSY, now);
        for n in 1..=3_u32 {
            now += Duration::from_millis(100);
            let left = workload.until_idle(20 * BUSY + n * (BUSY / 2), now);
            assert_eq!(left == IDLE, n == 3);
        }
        // Another thread begins again.
        now += Duration::from_millis(200);
        assert!(workload.until_idle(Duration::ZERO, now) < IDLE);
        now += Duration::from_secs(1);
        workload.until_idle(little, now);
        assert_eq!(workload.until_idle(2 * BUSY, now), IDLE);
    }

    #[test]
    fn a_threads_time_is_what_it_works_and_not_what_it_waits() {
        let before = thread_time();
        std::thread::sleep(4 * BUSY);
        let slept = thread_time();
        assert!(slept.saturating_sub(before) < BUSY);
        // Only this thread's own work ends the loop.
        while thread_time().saturating_sub(slept) <= BUSY {
            std::hint::spin_loop();
        }
        let mut workload = Workload::new();
        workload.taken = slept;
        assert_eq!(workload.until_idle(thread_time(), Instant::now()), IDLE);
    }
}
