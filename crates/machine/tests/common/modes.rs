//! The software processor in the ways to run code that aren't its usual one.

use skerry_hypervisor::{Capabilities, CpuidTable, CreateVmError, Hypervisor, Unusable, VmSpec};
use skerry_hypervisor_soft::{Soft, SoftVm, Tuning};

/// It interprets everything.
pub(crate) struct Interpreter(Soft);

/// It compiles everything, into as little memory as will do.
pub(crate) struct Stress(Soft);

macro_rules! tuned {
    ($name:ident, $tuning:expr) => {
        impl Hypervisor for $name {
            type Vm = SoftVm;

            fn probe() -> Result<Capabilities, Unusable> {
                Soft::probe()
            }

            fn open() -> Result<Self, Unusable> {
                Ok(Self(Soft::open()?.with_tuning($tuning)))
            }

            fn supported_cpuid(&self) -> &CpuidTable {
                self.0.supported_cpuid()
            }

            fn create_vm(&self, spec: &VmSpec) -> Result<SoftVm, CreateVmError> {
                self.0.create_vm(spec)
            }
        }
    };
}

tuned!(Interpreter, Tuning::INTERPRETER);
tuned!(Stress, Tuning::STRESS);
