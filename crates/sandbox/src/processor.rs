//! A virtual machine of whichever backend.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use skerry_hypervisor::{
    BootRegisters, BudgetError, CallId, Canceller, Capabilities, CpuModel, CpuState, CpuidTable,
    DirtyLogError, Exit, Gpa, Hypervisor, Irqchip, MapError, MemorySlot, RunError, StateError,
    Unusable, Vcpu, Vm, VmSpec,
};
use skerry_hypervisor_kvm::Kvm;
use skerry_hypervisor_soft::Soft;

use crate::error::BuildError;

/// What runs a sandbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Backend {
    /// KVM where it works at speed, else `soft`.
    #[default]
    Auto,
    /// Linux KVM, even where it emulates: guests built without SSE run there.
    Kvm,
    /// Skerry's own processor.
    Soft,
}

impl Backend {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Soft => "soft",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Auto, Self::Kvm, Self::Soft]
            .into_iter()
            .find(|backend| backend.name() == name)
            .ok_or_else(|| format!("Hypervisor {name:?} doesn't exist; choose auto, kvm or soft"))
    }
}

/// One virtual machine with one processor.
pub(crate) trait Processor: Send {
    fn backend(&self) -> Backend;
    fn begin_call(&mut self) -> CallId;
    fn end_call(&mut self);
    fn run(&mut self) -> Result<Exit, RunError>;
    fn set_budget(&mut self, instructions: Option<u64>) -> Result<(), BudgetError>;
    fn instructions(&self) -> Option<u64>;
    fn complete_read(&mut self, value: u64);
    fn canceller(&self) -> Canceller;
    fn registers(&self) -> Result<BootRegisters, StateError>;
    fn set_registers(&mut self, registers: &BootRegisters) -> Result<(), StateError>;
    fn state(&mut self) -> Result<CpuState, StateError>;
    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError>;
    fn set_user_state(&mut self, state: &CpuState) -> Result<(), StateError>;
    fn map(&mut self, slot: MemorySlot) -> Result<(), MapError>;
    fn unmap(&mut self, gpa: Gpa) -> Result<(), MapError>;
    fn drain_dirty(&mut self, gpa: Gpa, each: &mut dyn FnMut(u64)) -> Result<(), DirtyLogError>;
}

/// The one implementation. The processor goes before its machine.
struct On<V: Vm> {
    vcpu: V::Vcpu,
    vm: V,
    backend: Backend,
}

impl<V: Vm> Processor for On<V> {
    fn backend(&self) -> Backend {
        self.backend
    }

    fn begin_call(&mut self) -> CallId {
        self.vcpu.begin_call()
    }

    fn end_call(&mut self) {
        self.vcpu.end_call();
    }

    fn run(&mut self) -> Result<Exit, RunError> {
        self.vcpu.run()
    }

    fn set_budget(&mut self, instructions: Option<u64>) -> Result<(), BudgetError> {
        self.vcpu.set_budget(instructions)
    }

    fn instructions(&self) -> Option<u64> {
        self.vcpu.instructions()
    }

    fn complete_read(&mut self, value: u64) {
        self.vcpu.complete_read(value);
    }

    fn canceller(&self) -> Canceller {
        self.vcpu.canceller()
    }

    fn registers(&self) -> Result<BootRegisters, StateError> {
        self.vcpu.boot_registers()
    }

    fn set_registers(&mut self, registers: &BootRegisters) -> Result<(), StateError> {
        self.vcpu.set_boot_registers(registers)
    }

    fn state(&mut self) -> Result<CpuState, StateError> {
        self.vcpu.state()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.vcpu.set_state(state)
    }

    fn set_user_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.vcpu.set_user_state(state)
    }

    fn map(&mut self, slot: MemorySlot) -> Result<(), MapError> {
        self.vm.map(slot)
    }

    fn unmap(&mut self, gpa: Gpa) -> Result<(), MapError> {
        self.vm.unmap(gpa)
    }

    fn drain_dirty(&mut self, gpa: Gpa, each: &mut dyn FnMut(u64)) -> Result<(), DirtyLogError> {
        self.vm.drain_dirty(gpa, each)
    }
}

/// A backend, and what CPUID tells its guests.
struct Opened<H> {
    hypervisor: H,
    cpuid: CpuidTable,
}

/// The model that all backends share, so that a snapshot of one runs on the other. Without the time-stamp
/// counter's frequency, which differs and which nothing in a sandbox has a use for.
fn table(capabilities: &Capabilities) -> CpuidTable {
    const TIME: [u32; 3] = [0x15, 0x16, 0x4000_0010];
    let model = CpuModel::V2.cpuid(capabilities, 1, 0);
    // An old host or one that emulates has less.
    let table = model.or_else(|_| CpuModel::Host.cpuid(capabilities, 1, 0));
    let mut table = table.unwrap_or_else(|_| capabilities.supported_cpuid.clone());
    table.entries.retain(|entry| !TIME.contains(&entry.leaf));
    table
}

impl<H: Hypervisor> Opened<H> {
    fn open() -> Result<Self, Unusable> {
        let hypervisor = H::open()?;
        let capabilities = Capabilities {
            name: "",
            description: String::new(),
            measured_mips: None,
            max_vcpus: 1,
            supported_cpuid: hypervisor.supported_cpuid().clone(),
            accepted_cpuid: hypervisor.accepted_cpuid().clone(),
            tsc_khz: 0,
            tsc_scaling: false,
            native: false,
            physical_address_bits: 36,
        };
        let cpuid = table(&capabilities);
        Ok(Self { hypervisor, cpuid })
    }

    fn make(&self, backend: Backend, slot: MemorySlot) -> Result<Box<dyn Processor>, BuildError> {
        let spec = VmSpec {
            irqchip: Irqchip::None,
            max_vcpus: 1,
        };
        let vm = self.hypervisor.create_vm(&spec)?;
        vm.map(slot)?;
        let vcpu = vm.create_vcpu(0, &self.cpuid)?;
        Ok(Box::new(On { vcpu, vm, backend }))
    }
}

fn opened<H: Hypervisor>(
    cell: &'static OnceLock<Result<Opened<H>, Unusable>>,
    backend: Backend,
) -> Result<&'static Opened<H>, BuildError> {
    let opened = cell.get_or_init(Opened::open).as_ref();
    opened.map_err(|source| BuildError::Unusable {
        backend: backend.name(),
        source: source.clone(),
    })
}

/// A machine with this memory at 0, before its first instruction.
pub(crate) fn make(backend: Backend, slot: MemorySlot) -> Result<Box<dyn Processor>, BuildError> {
    static KVM: OnceLock<Result<Opened<Kvm>, Unusable>> = OnceLock::new();
    static SOFT: OnceLock<Result<Opened<Soft>, Unusable>> = OnceLock::new();
    static KVM_WORKS: OnceLock<bool> = OnceLock::new();
    let kvm = match backend {
        Backend::Kvm => true,
        Backend::Soft => false,
        Backend::Auto => *KVM_WORKS.get_or_init(|| Kvm::usable().is_ok()),
    };
    match kvm {
        true => opened(&KVM, Backend::Kvm)?.make(Backend::Kvm, slot),
        false => opened(&SOFT, Backend::Soft)?.make(Backend::Soft, slot),
    }
}
