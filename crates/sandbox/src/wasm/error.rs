//! Why a module didn't load, or a call gave no value.

use skerry_sandbox_abi::wasm::{Kind, Refusal, Trap};
use thiserror::Error;

use crate::error::{BuildError, CallError, RestoreError, SnapshotError};

/// A module did not load, or a call gave no value.
///
/// After [`WasmError::Call`] the sandbox may be poisoned ([`crate::Status`]); after the others it can be
/// called again.
#[derive(Debug, Error)]
pub enum WasmError {
    /// The sandbox can't be made.
    #[error(transparent)]
    Build(Box<BuildError>),
    /// The sandbox failed: a time-out, a kill, no memory for the engine.
    #[error(transparent)]
    Call(Box<CallError>),
    /// No snapshot.
    #[error(transparent)]
    Snapshot(Box<SnapshotError>),
    /// No restore.
    #[error(transparent)]
    Restore(Box<RestoreError>),
    /// The bytes are no module that the engine runs; components aren't either.
    #[error("The WebAssembly code can't be loaded: {0}")]
    Module(String),
    /// It imports what can't be given: memories, tables, globals, functions on references.
    #[error("The imports can't be given: {0}")]
    Import(String),
    /// It exports no such function.
    #[error("No function {0:?} is exported")]
    NoExport(String),
    /// It exports no memory.
    #[error("The module exports no memory named \"memory\"")]
    NoMemory,
    /// A range that is not in its memory.
    #[error("The range lies outside of the module's memory")]
    Range,
    /// The function takes others.
    #[error("Wrong arguments: {0}")]
    Arguments(String),
    /// The function returns others.
    #[error("{name} returns {found:?}, and {wanted:?} was asked for")]
    Results {
        /// The function.
        name: String,
        /// What was asked for.
        wanted: Vec<Kind>,
        /// What it returned.
        found: Vec<Kind>,
    },
    /// A component's function returns something else.
    #[error("{name} doesn't return {wanted}")]
    Result {
        /// The function.
        name: String,
        /// What was asked for.
        wanted: String,
    },
    /// It trapped.
    #[error("WebAssembly trapped: {0}")]
    Trap(Trap),
    /// It called an import that it isn't granted.
    #[error("WebAssembly called {import}, which it isn't granted: no host function {needs:?}")]
    NotGranted {
        /// The import.
        import: String,
        /// The host function that would grant it.
        needs: String,
    },
    /// A host function that it called failed, or has another type.
    #[error("The host function {name}, called by WebAssembly: {message}")]
    Host {
        /// The host function.
        name: String,
        /// Its message.
        message: String,
    },
    /// It ended itself by `proc_exit`.
    #[error("The program ended itself with code {0}")]
    Exit(i32),
    /// A component broke a rule of the component model's: a string that isn't UTF-8, a case that isn't
    /// there.
    #[error("The component broke its interface: {0}")]
    Interface(String),
    /// A component ended an earlier call by a trap or an exit: by the component model's rules it can't be
    /// entered again. Restore a snapshot.
    #[error("The component ended in an earlier call: restore a snapshot")]
    Ended,
    /// A component can't be compiled: it is none, or needs what the compiler doesn't have.
    #[error("The component can't be compiled: {0}")]
    Compile(String),
    /// Built without the feature `components`: only what was compiled before runs.
    #[error(
        "Components can't be compiled: skerry-sandbox was built without its feature `components`"
    )]
    NoCompiler,
    /// The sandbox holds no module, or one already: it is another guest's.
    #[error("The sandbox is not one that a module can be called in")]
    State,
}

macro_rules! boxed {
    ($($variant:ident: $error:ty;)*) => {$(
        impl From<$error> for WasmError {
            fn from(error: $error) -> Self {
                Self::$variant(Box::new(error))
            }
        }
    )*};
}

boxed! {
    Build: BuildError;
    Call: CallError;
    Snapshot: SnapshotError;
    Restore: RestoreError;
}

impl From<Refusal> for WasmError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Module(why) => Self::Module(why),
            Refusal::Import(why) => Self::Import(why),
            Refusal::NoModule | Refusal::Loaded => Self::State,
            Refusal::NoExport(name) => Self::NoExport(name),
            Refusal::NoMemory => Self::NoMemory,
            Refusal::Range => Self::Range,
            Refusal::Arguments(why) => Self::Arguments(why),
            Refusal::Trap(trap) => Self::Trap(trap),
            Refusal::NotGranted { import, needs } => Self::NotGranted { import, needs },
            Refusal::Host { name, message } => Self::Host { name, message },
            Refusal::Exit(code) => Self::Exit(code),
            Refusal::Interface(why) => Self::Interface(why),
            Refusal::Ended => Self::Ended,
        }
    }
}
