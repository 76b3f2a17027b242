//! The traits that a backend implements.

use crate::cancel::{CallId, Canceller};
use crate::cpuid::CpuidTable;
use crate::error::{
    BudgetError, CreateVcpuError, CreateVmError, DirtyLogError, InterruptError, MapError, RunError,
    StateError, Unusable,
};
use crate::exit::Exit;
use crate::memory::{Gpa, MemorySlot};
use crate::state::{BootRegisters, CpuState};
use crate::statistics::Statistics;
use serde::Serialize;

/// What a backend that can be used can do here.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Capabilities {
    /// Backend name as `--hypervisor` takes it.
    pub name: &'static str,
    /// One line for a person: device, version, processor.
    pub description: String,
    /// Guest instructions a second, in millions, where the probe's guest was run.
    pub measured_mips: Option<f64>,
    /// Virtual processors a VM can have.
    pub max_vcpus: u32,
    /// Every CPUID bit that a guest may be shown.
    pub supported_cpuid: CpuidTable,
    /// Every CPUID bit that a guest which was started elsewhere may have been shown.
    pub accepted_cpuid: CpuidTable,
    /// Frequency of the time-stamp counter that a guest gets unless it is to have another, in kHz.
    pub tsc_khz: u32,
    /// Whether it can have another.
    pub tsc_scaling: bool,
    /// Guest code runs on the host's processor itself, with its faults of speculation.
    pub native: bool,
    /// Bits of guest-physical addresses.
    pub physical_address_bits: u8,
}

/// Which interrupt controllers the backend has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Irqchip {
    /// Local APICs in the backend; PIC, PIT and I/O APIC are the machine's devices.
    #[default]
    Split,
    /// None: `HLT` leaves the guest as [`Exit::Halt`].
    None,
}

/// What a VM is made with.
#[derive(Clone, Debug, Default)]
pub struct VmSpec {
    /// Interrupt controllers.
    pub irqchip: Irqchip,
    /// The largest number of processors that will be made.
    pub max_vcpus: u32,
}

/// A way of running virtual machines.
pub trait Hypervisor: Send + Sync + Sized + 'static {
    /// Its virtual machines.
    type Vm: Vm;

    /// Runs a small guest and says what the backend can do, or why it can't be used.
    ///
    /// A device that opens but can't run a few dozen instructions with SSE at speed is unusable.
    fn probe() -> Result<Capabilities, Unusable>;

    /// Says the same to whoever is about to use the backend. One that is part of this program has
    /// no device to distrust, and needn't run the guest.
    fn usable() -> Result<Capabilities, Unusable> {
        Self::probe()
    }

    /// Opens the backend without probing it.
    fn open() -> Result<Self, Unusable>;

    /// Every CPUID bit that a guest may be shown, without probing.
    fn supported_cpuid(&self) -> &CpuidTable;

    /// Every CPUID bit that a guest which was started elsewhere may have been shown, without probing.
    fn accepted_cpuid(&self) -> &CpuidTable {
        self.supported_cpuid()
    }

    /// Makes a virtual machine without memory or processors.
    fn create_vm(&self, spec: &VmSpec) -> Result<Self::Vm, CreateVmError>;
}

/// A virtual machine: memory, interrupts, processors.
pub trait Vm: Send + Sync + 'static {
    /// Its processors.
    type Vcpu: Vcpu;

    /// Maps memory. A slot may be mapped and unmapped while processors run.
    fn map(&self, slot: MemorySlot) -> Result<(), MapError>;

    /// Unmaps the slot that starts at `gpa`.
    fn unmap(&self, gpa: Gpa) -> Result<(), MapError>;

    /// Changes whether the slot at `gpa` is read-only and whether it logs guest writes.
    ///
    /// No processor may run while `read_only` changes: a backend may have to take the slot away
    /// for a moment.
    fn protect(&self, gpa: Gpa, read_only: bool, log_dirty: bool) -> Result<(), MapError>;

    /// Takes and clears the log of pages that the *guest* wrote in the slot at `gpa`: one bit per
    /// page, lowest first. (Host writes are in the region's own tracker.)
    fn dirty_pages(&self, gpa: Gpa) -> Result<Vec<u64>, DirtyLogError>;

    /// Takes and clears the same log, and calls `each` with the index in the slot of every page in it,
    /// ascending. Unlike [`Vm::dirty_pages`] it costs by the pages that were written and hardly by the
    /// slot's size, where the backend can: for who does this often.
    ///
    /// Where processors run meanwhile, what a page holds is to be read after this has returned: until
    /// then a processor may still write a page that `each` was told of, without logging it again.
    fn drain_dirty(&self, gpa: Gpa, each: &mut dyn FnMut(u64)) -> Result<(), DirtyLogError>;

    /// Makes processor `id` (also its APIC id). It starts as after reset; processor 0 runnable,
    /// the others waiting for INIT and SIPI. Its time-stamp counter has the frequency that the table
    /// tells; a table that tells what the backend does not accept is refused by name.
    fn create_vcpu(&self, id: u32, cpuid: &CpuidTable) -> Result<Self::Vcpu, CreateVcpuError>;

    /// Delivers a message-signalled interrupt (Intel SDM 3A §12.11).
    fn signal_msi(&self, address: u64, data: u32) -> Result<(), InterruptError>;

    /// Tells which vectors belong to level-triggered I/O APIC pins (a bit per vector, and the
    /// destinations they go to as messages), so that their end is reported as
    /// [`Exit::IoapicEoi`]. Called when the I/O APIC's redirection table changes.
    fn set_ioapic_routes(&self, messages: &[(u64, u32)]) -> Result<(), InterruptError>;

    /// Raises a non-maskable interrupt on processor `id`.
    fn inject_nmi(&self, id: u32) -> Result<(), InterruptError>;

    /// The guest's clock in nanoseconds since the VM was made (paravirtual clock).
    fn clock_ns(&self) -> Result<u64, StateError>;

    /// Sets the guest's clock. To restore a machine set it first: the time-stamp counters of the
    /// processors' states that follow go on with it, and in step.
    fn set_clock_ns(&self, ns: u64) -> Result<(), StateError>;

    /// What its processors have counted, where the backend counts anything.
    fn statistics(&self) -> Option<&dyn Statistics> {
        None
    }
}

/// Fewer instructions than this run after a budget ([`Vcpu::set_budget`]) is spent.
pub const BUDGET_SLACK: u64 = 8192;

/// A virtual processor. Owned by one thread at a time; its [`Canceller`] is for all others.
pub trait Vcpu: Send + 'static {
    /// Its id.
    fn id(&self) -> u32;

    /// A handle that stops it, from any thread.
    fn canceller(&self) -> Canceller;

    /// Starts a call: the runs until [`Vcpu::end_call`] can be cancelled by its id.
    fn begin_call(&mut self) -> CallId;

    /// Ends the call; a cancel for it does nothing from here on.
    fn end_call(&mut self);

    /// Runs guest code until something needs the caller.
    fn run(&mut self) -> Result<Exit, RunError>;

    /// After so many more guest instructions [`Vcpu::run`] returns [`Exit::BudgetSpent`], and goes on
    /// returning it until this is called again; `None` for no end.
    ///
    /// The guest may run a little further than that, because it is not looked at between any two
    /// instructions: by less than [`BUDGET_SLACK`] of them. An instruction with a REP prefix is one,
    /// however often it repeats. A device access whose exit was returned is finished first.
    fn set_budget(&mut self, instructions: Option<u64>) -> Result<(), BudgetError>;

    /// Guest instructions retired since [`Vcpu::set_budget`] was first called with a number; exact
    /// between two runs. `None` before that, and where the backend can't count.
    fn instructions(&self) -> Option<u64>;

    /// Gives the value of the [`Exit::PortIn`] or [`Exit::MmioRead`] that [`Vcpu::run`] just
    /// returned; bits past its size are ignored.
    fn complete_read(&mut self, value: u64);

    /// Asks for [`Exit::InterruptWindow`] as soon as the guest can take an external interrupt;
    /// `false` takes the request back.
    fn request_interrupt_window(&mut self, wanted: bool);

    /// Whether [`Vcpu::inject_extint`] would be taken now.
    fn ready_for_extint(&self) -> bool;

    /// Delivers an external (8259) interrupt; right after [`Exit::InterruptWindow`] or when
    /// [`Vcpu::ready_for_extint`].
    fn inject_extint(&mut self, vector: u8) -> Result<(), InterruptError>;

    /// Sets registers for a boot protocol.
    fn set_boot_registers(&mut self, registers: &BootRegisters) -> Result<(), StateError>;

    /// Reads general and system registers (cheaper than [`Vcpu::state`]).
    fn boot_registers(&self) -> Result<BootRegisters, StateError>;

    /// Reads everything. An access whose exit [`Vcpu::run`] returned is finished first (a backend
    /// may have to enter the guest for that), so that the state is one between two instructions;
    /// fails where the instruction goes on with another access.
    fn state(&mut self) -> Result<CpuState, StateError>;

    /// Sets everything; what was left of an access whose exit was returned is forgotten. The state
    /// is checked first; if it is refused as [`StateError::Invalid`] nothing was changed.
    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError>;

    /// Sets what code in ring 3 of a machine without interrupt controllers can have changed: general,
    /// system and debug registers, the XSAVE area, pending events; and XCR0 where it differs from what
    /// was set last. Model-specific registers and time may stay as they are. It is for a guest that has
    /// run nothing in ring 0 that changes those, since the processor was made or [`Vcpu::set_state`]
    /// was called. The state is checked as there, but for whether the backend has its model-specific
    /// registers.
    fn set_user_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.set_state(state)
    }
}
