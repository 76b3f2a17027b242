//! The thread of one virtual processor.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use skerry_boot::Entry;
use skerry_devices::bus::{MmioBus, PortBus};
use skerry_devices::chipset::{DualPic, IoApic};
use skerry_hypervisor::probe::chain;
use skerry_hypervisor::state::CpuState;
use skerry_hypervisor::{Exit, RunError, StateError, Vcpu};

use crate::control::{Command, Control, Next, Reply};
use crate::outcome::{CrashReason, Outcome};
use crate::report;

/// What an exit needs: looked up without a lock.
pub(crate) struct ExitPath {
    pub(crate) ports: PortBus,
    pub(crate) mmio: MmioBus,
    pub(crate) ioapic: Arc<IoApic>,
    pub(crate) pic: Arc<DualPic>,
}

/// Why guest code is no longer run.
enum Left {
    /// The call was cancelled.
    Cancelled,
    /// Triple fault.
    Shutdown,
}

/// One virtual processor and what its thread needs.
pub(crate) struct VcpuThread<V: Vcpu> {
    pub(crate) vcpu: V,
    pub(crate) index: usize,
    pub(crate) control: Arc<Control>,
    pub(crate) path: Arc<ExitPath>,
    /// The state after reset, where the machine may be reset.
    pub(crate) after_reset: Option<Box<CpuState>>,
}

impl<V: Vcpu> VcpuThread<V> {
    /// Runs until the control says stop. A panic of ours ends the machine, not the process.
    pub(crate) fn run(mut self) {
        let control = self.control.clone();
        let index = self.index;
        let result = catch_unwind(AssertUnwindSafe(|| self.serve()));
        if result.is_err() {
            let text = format!("The thread of CPU {index} failed");
            control.end(Outcome::InternalError(text));
        }
        control.thread_ended(index);
    }

    fn serve(&mut self) {
        loop {
            match self.control.next(self.index) {
                Next::Stop => return,
                Next::Command(command) => {
                    let reply = self.execute(command);
                    self.control.reply(self.index, reply);
                }
                Next::Run => {
                    self.vcpu.begin_call();
                    // A change of mind before the call began cancelled nothing; after, it does.
                    let left = if self.control.wants_attention() {
                        Ok(Left::Cancelled)
                    } else {
                        self.run_guest()
                    };
                    self.vcpu.end_call();
                    match left {
                        Ok(Left::Cancelled) => {}
                        Ok(Left::Shutdown) => self.triple_fault(),
                        Err(error) => self.failed(&error),
                    }
                }
            }
        }
    }

    /// The exit path: no allocation, no lock but those of the device that is spoken to.
    fn run_guest(&mut self) -> Result<Left, RunError> {
        loop {
            if self.index == 0 {
                self.external_interrupt();
            }
            match self.vcpu.run()? {
                Exit::PortIn { port, size } => {
                    let mut data = [0; 4];
                    self.path
                        .ports
                        .read(port, &mut data[..usize::from(size).min(4)]);
                    self.vcpu.complete_read(u32::from_le_bytes(data).into());
                }
                Exit::PortOut { port, size, data } => {
                    let data = data.to_le_bytes();
                    self.path
                        .ports
                        .write(port, &data[..usize::from(size).min(4)]);
                }
                Exit::MmioRead { gpa, size } => {
                    let mut data = [0; 8];
                    self.path
                        .mmio
                        .read(gpa.0, &mut data[..usize::from(size).min(8)]);
                    self.vcpu.complete_read(u64::from_le_bytes(data));
                }
                Exit::MmioWrite { gpa, size, data } => {
                    let data = data.to_le_bytes();
                    self.path
                        .mmio
                        .write(gpa.0, &data[..usize::from(size).min(8)]);
                }
                Exit::IoapicEoi { vector } => self.path.ioapic.eoi(vector),
                // No machine sets a budget.
                Exit::InterruptWindow
                | Exit::Interrupted
                | Exit::Debug
                | Exit::Halt
                | Exit::BudgetSpent => {}
                Exit::Cancelled => return Ok(Left::Cancelled),
                Exit::Shutdown => return Ok(Left::Shutdown),
            }
        }
    }

    /// Gives processor 0 the PIC's interrupt as soon as it can take it.
    fn external_interrupt(&mut self) {
        if !self.path.pic.intr_pending() {
            return;
        }
        if self.vcpu.ready_for_extint() {
            let vector = self.path.pic.ack();
            if let Err(error) = self.vcpu.inject_extint(vector) {
                tracing::warn!(vector, %error, "PIC interrupt lost");
            }
        }
        self.vcpu
            .request_interrupt_window(self.path.pic.intr_pending());
    }

    fn execute(&mut self, command: Command) -> Result<Reply, StateError> {
        match command {
            Command::Save => Ok(Reply::State(Box::new(self.vcpu.state()?))),
            Command::Restore(state) => {
                self.vcpu.set_state(&state)?;
                Ok(Reply::Done)
            }
            Command::Reset(entry) => {
                if let Some(state) = &self.after_reset {
                    self.vcpu.set_state(state)?;
                }
                if let Some(entry) = entry {
                    enter(&mut self.vcpu, &entry)?;
                }
                Ok(Reply::Done)
            }
            Command::Describe => Ok(Reply::Text(self.describe())),
        }
    }

    fn describe(&self) -> String {
        match self.vcpu.boot_registers() {
            Ok(registers) => report::registers(self.vcpu.id(), &registers),
            Err(error) => format!("CPU {}: {error}\n", self.vcpu.id()),
        }
    }

    fn triple_fault(&self) {
        self.control.end(Outcome::GuestCrash {
            reason: CrashReason::TripleFault {
                cpu: self.vcpu.id(),
            },
            registers: self.describe(),
        });
    }

    fn failed(&self, error: &RunError) {
        let mut text = chain(error);
        text.push('\n');
        text.push_str(&self.describe());
        self.control.end(Outcome::InternalError(text));
    }
}

/// Sets the registers of a processor that is as after reset to a kernel's entry.
pub(crate) fn enter<V: Vcpu>(vcpu: &mut V, entry: &Entry) -> Result<(), StateError> {
    let mut registers = vcpu.boot_registers()?;
    entry.apply(&mut registers);
    vcpu.set_boot_registers(&registers)
}
