//! What goes wrong, one type per operation.

use std::path::PathBuf;

use skerry_hypervisor::{
    BudgetError, CreateVcpuError, CreateVmError, DirtyLogError, MapError, RunError, StateError,
    Unusable,
};
use skerry_sandbox_abi::Function;
use thiserror::Error;

use crate::fault::Fault;
use crate::mapping::MapFileError;

/// A sandbox could not be made.
#[derive(Debug, Error)]
pub enum BuildError {
    /// No guest was given.
    #[error("A sandbox needs a guest: give a program or a snapshot")]
    NoGuest,
    /// The guest's file can't be read.
    #[error("Can't read the guest {path:?}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The guest is no program for a sandbox.
    #[error("The guest is no program for a sandbox: {0}")]
    BadProgram(String),
    /// A size that can't be had.
    #[error("{what} of {size} bytes can't be had: it is {limit} bytes at most")]
    TooLarge {
        /// Which.
        what: &'static str,
        /// Asked for.
        size: u64,
        /// Possible.
        limit: u64,
    },
    /// The backend can't be used here.
    #[error("The hypervisor {backend} can't be used: {source}")]
    Unusable {
        /// Which.
        backend: &'static str,
        /// Why, and what to do.
        source: Unusable,
    },
    /// No memory from the host.
    #[error("The host gives no memory for a sandbox")]
    Memory(#[source] std::io::Error),
    /// The backend refused.
    #[error(transparent)]
    Vm(#[from] CreateVmError),
    /// The backend refused.
    #[error(transparent)]
    Vcpu(#[from] CreateVcpuError),
    /// The backend refused.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The backend refused.
    #[error(transparent)]
    State(#[from] StateError),
    /// What was mapped can't be again.
    #[error(transparent)]
    Mapping(Box<MapFileError>),
    /// Instructions can't be counted.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// The guest needs host functions that were not given.
    #[error("The guest needs host functions that aren't registered: {}", list(.0))]
    MissingHostFunctions(Vec<Function>),
    /// A host function is not what the guest was built for.
    #[error("The guest calls the host function {wanted}, and the one registered is {found}")]
    HostFunctionMismatch {
        /// As the guest declares it.
        wanted: Box<Function>,
        /// As the host has it.
        found: Box<Function>,
    },
    /// The guest speaks another interface.
    #[error("The guest speaks no version of the interface that this host offers ({min} to {max})")]
    Version {
        /// Oldest.
        min: u32,
        /// Newest.
        max: u32,
    },
    /// It failed before it was ready.
    #[error("The guest failed while it initialised itself")]
    Init(#[source] Box<CallError>),
}

fn list(functions: &[Function]) -> String {
    let names: Vec<_> = functions.iter().map(ToString::to_string).collect();
    names.join(", ")
}

/// A call gave no value.
#[derive(Debug, Error)]
pub enum CallError {
    /// The guest has no such function.
    #[error("The guest has no function {name:?}; it has: {known}")]
    NoFunction {
        /// Asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// Another number of arguments.
    #[error("{function} was called with {given} arguments")]
    Arity {
        /// Its signature.
        function: String,
        /// How many were given.
        given: u32,
    },
    /// An argument of another type.
    #[error("{function} was called with {found} for argument {index}, and takes {expected}")]
    ArgumentType {
        /// Its signature.
        function: String,
        /// Which argument, from 0.
        index: u32,
        /// Type that it takes.
        expected: String,
        /// Type that was given.
        found: String,
    },
    /// The result is of another type.
    #[error("{function} returned another type than was asked for: {source}")]
    ReturnType {
        /// Its signature.
        function: String,
        /// How.
        source: skerry_sandbox_abi::DecodeError,
    },
    /// Arguments or result are larger than their area.
    #[error(
        "The {what} of {function} take {size} bytes, and the area for them has {area}: build the \
         sandbox with larger buffers"
    )]
    TooLarge {
        /// Which.
        what: &'static str,
        /// The function.
        function: String,
        /// Bytes.
        size: u64,
        /// Bytes.
        area: u64,
    },
    /// The function's own error.
    #[error("{0}")]
    Failed(String),
    /// The guest panicked.
    #[error("The guest panicked: {0}")]
    Panicked(String),
    /// The guest's heap is full.
    #[error("The guest has no memory for {bytes} bytes more")]
    OutOfMemory {
        /// What it asked for.
        bytes: u32,
    },
    /// The guest did what its memory or its rights don't allow.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// It was killed by its [`InterruptHandle`](crate::InterruptHandle).
    #[error("The call was cancelled")]
    Cancelled,
    /// It took longer than it may.
    #[error("The call took longer than {0:?}")]
    TimedOut(std::time::Duration),
    /// It took more processor time than it may.
    #[error("The call took more than {0:?} of processor time")]
    CpuTime(std::time::Duration),
    /// It ran more instructions than it may.
    #[error("The call took more than {0} instructions")]
    BudgetSpent(u64),
    /// The guest did what the interface doesn't know.
    #[error("The guest broke the interface: {0}")]
    Misbehaved(String),
    /// No debugger could connect; the call has not begun.
    #[error("No debugger could connect")]
    Debugger(#[source] std::io::Error),
    /// An earlier call left the guest in an unknown state.
    #[error("The sandbox is poisoned by what happened before ({0}); restore a snapshot first")]
    Poisoned(String),
    /// A restore failed half way.
    #[error("The sandbox can't be used any more: {0}")]
    Unrecoverable(String),
    /// The backend gave up.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The backend refused.
    #[error(transparent)]
    State(#[from] StateError),
    /// Instructions can't be counted.
    #[error(transparent)]
    Budget(#[from] BudgetError),
}

/// A snapshot could not be taken, kept or read.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The sandbox is not in a state worth keeping.
    #[error("The sandbox is poisoned ({0}); there is nothing to keep")]
    Poisoned(String),
    /// It is not usable at all.
    #[error("The sandbox can't be used any more: {0}")]
    Unrecoverable(String),
    /// A file is mapped that the guest may have changed.
    #[error("The sandbox has a file mapped copy-on-write, which no snapshot keeps; unmap it first")]
    PrivateMapping,
    /// Files or shared regions are mapped.
    #[error("The snapshot has files or shared regions mapped, which can't go to disk with it")]
    Mappings,
    /// No memory from the host.
    #[error("The host gives no memory for a snapshot")]
    Memory(#[source] std::io::Error),
    /// The backend refused.
    #[error(transparent)]
    State(#[from] StateError),
    /// The backend refused.
    #[error(transparent)]
    Dirty(#[from] DirtyLogError),
    /// The files.
    #[error(transparent)]
    Disk(#[from] skerry_snapshot::Error),
    /// What the files hold is no sandbox.
    #[error("The snapshot is not one of a function sandbox: {0}")]
    NotASandbox(String),
}

/// A snapshot could not be restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// Host functions that the snapshot's guest needs are not there; nothing was changed.
    #[error(transparent)]
    HostFunctions(Box<BuildError>),
    /// The sandbox can't be used any more.
    #[error("The sandbox can't be used any more: {0}")]
    Unrecoverable(String),
    /// The backend refused: the sandbox can't be used any more.
    #[error(transparent)]
    State(#[from] StateError),
    /// The backend refused: the sandbox can't be used any more.
    #[error(transparent)]
    Dirty(#[from] DirtyLogError),
    /// The backend refused: the sandbox can't be used any more.
    #[error(transparent)]
    Rebuild(Box<BuildError>),
    /// What was mapped can't be again: the sandbox can't be used any more.
    #[error(transparent)]
    Mapping(#[from] MapFileError),
}
