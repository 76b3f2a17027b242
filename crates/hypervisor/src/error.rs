//! One error type per operation; each says what was tried on what.

use crate::memory::Gpa;
use serde::Serialize;
use thiserror::Error;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why a backend can't be used on this machine, in words for a person.
#[derive(Clone, Debug, Error, PartialEq, Serialize)]
#[error("{reason}")]
pub struct Unusable {
    /// What was found.
    pub reason: String,
    /// What the person can do about it.
    pub remedy: String,
    /// Guest instructions a second, in millions, where the device ran a guest at all.
    pub measured_mips: Option<f64>,
}

/// [`crate::Vcpu::set_budget`] failed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum BudgetError {
    /// The backend can't count a guest's instructions.
    #[error("{0} doesn't count a guest's instructions, and can't stop it after a number of them")]
    Unsupported(&'static str),
}

/// [`crate::Hypervisor::create_vm`] failed.
#[derive(Debug, Error)]
pub enum CreateVmError {
    /// The backend refused.
    #[error("Can't {what} for a new virtual machine")]
    Backend {
        /// The step.
        what: &'static str,
        /// Its cause.
        source: Source,
    },
    /// Something asked for that this backend does not have.
    #[error("This hypervisor has no {0}")]
    Unsupported(&'static str),
}

/// [`crate::Vm::map`], [`crate::Vm::unmap`] or [`crate::Vm::protect`] failed.
#[derive(Debug, Error)]
pub enum MapError {
    /// Not a multiple of the page size, empty, or past the end of its region.
    #[error("Memory slot of {len:#x} bytes at {gpa} isn't made of whole pages of its region")]
    Misaligned {
        /// First address.
        gpa: Gpa,
        /// Bytes.
        len: usize,
    },
    /// Overlaps a slot that is mapped.
    #[error("Memory slot of {len:#x} bytes at {gpa} overlaps one that is mapped")]
    Overlap {
        /// First address.
        gpa: Gpa,
        /// Bytes.
        len: usize,
    },
    /// No slot starts there.
    #[error("No memory slot starts at {0}")]
    NotMapped(Gpa),
    /// The backend refused.
    #[error("Can't map {len:#x} bytes at {gpa}")]
    Backend {
        /// First address.
        gpa: Gpa,
        /// Bytes.
        len: usize,
        /// The cause.
        source: Source,
    },
}

/// [`crate::Vm::dirty_pages`] or [`crate::Vm::drain_dirty`] failed.
#[derive(Debug, Error)]
pub enum DirtyLogError {
    /// No slot starts there, or it does not log.
    #[error("The memory slot at {0} keeps no dirty log")]
    NotLogged(Gpa),
    /// The backend refused.
    #[error("Can't read the dirty log of the slot at {gpa}")]
    Backend {
        /// The slot's first address.
        gpa: Gpa,
        /// The cause.
        source: Source,
    },
}

/// [`crate::Vm::create_vcpu`] failed.
#[derive(Debug, Error)]
pub enum CreateVcpuError {
    /// The id is taken, or larger than the backend can have.
    #[error("Virtual processor {id} can't be made: {reason}")]
    BadId {
        /// The id.
        id: u32,
        /// Why.
        reason: &'static str,
    },
    /// The CPUID table asks for what the backend can't do.
    #[error("Virtual processor {id} can't have {feature}")]
    Unsupported {
        /// The id.
        id: u32,
        /// The feature, by name.
        feature: String,
    },
    /// The backend refused.
    #[error("Can't {what} of virtual processor {id}")]
    Backend {
        /// The id.
        id: u32,
        /// The step.
        what: &'static str,
        /// The cause.
        source: Source,
    },
}

/// An interrupt could not be delivered.
#[derive(Debug, Error)]
pub enum InterruptError {
    /// The message does not address a local APIC (Intel SDM 3A §12.11).
    #[error("Interrupt message {data:#x} to {address:#x} addresses no local APIC")]
    BadMessage {
        /// Message address.
        address: u64,
        /// Message data.
        data: u32,
    },
    /// The VM has no local APICs.
    #[error("The virtual machine has no local APICs")]
    NoApic,
    /// The backend refused.
    #[error("Can't deliver an interrupt")]
    Backend(#[source] Source),
}

/// [`crate::Vcpu::run`] failed: the processor is in a state that can't be resumed as it is.
#[derive(Debug, Error)]
pub enum RunError {
    /// A read exit was not completed before this run.
    #[error("The last read exit of virtual processor {id} was not completed")]
    ReadNotCompleted {
        /// The processor.
        id: u32,
    },
    /// The backend can't execute what the guest asks for.
    #[error("Virtual processor {id} can't go on at {rip:#x}: {reason}")]
    Internal {
        /// The processor.
        id: u32,
        /// Where it stands.
        rip: u64,
        /// Why, in words.
        reason: String,
    },
    /// The backend refused.
    #[error("Can't run virtual processor {id}")]
    Backend {
        /// The processor.
        id: u32,
        /// The cause.
        source: Source,
    },
}

/// Reading or setting processor state failed; what was set before the failure stays unspecified.
#[derive(Debug, Error)]
pub enum StateError {
    /// The state itself is not valid: it was refused before anything was set.
    #[error("Processor state has a bad {field}: {reason}")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// Why.
        reason: String,
    },
    /// A version that this build does not know.
    #[error("Processor state has version {found}, and this build reads version {expected}")]
    Version {
        /// In the data.
        found: u32,
        /// In this build.
        expected: u32,
    },
    /// The instruction that left the guest has more accesses to make.
    #[error("Virtual processor {id} stands inside an instruction; run it to its next exit first")]
    InsideInstruction {
        /// The processor.
        id: u32,
    },
    /// The backend refused.
    #[error("Can't {what} of virtual processor {id}")]
    Backend {
        /// The processor.
        id: u32,
        /// The step.
        what: &'static str,
        /// The cause.
        source: Source,
    },
}
