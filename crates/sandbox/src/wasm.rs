//! WebAssembly modules, each in a sandbox of its own: the engine is inside.
//!
//! ```no_run
//! use skerry_sandbox::wasm::{Grants, Wasm};
//!
//! let grants = Grants::new().clock().stdout(|bytes| print!("{}", String::from_utf8_lossy(&bytes)));
//! let mut wasm = Wasm::builder().module("plugin.wasm").grants(&grants).build()?;
//! let sum: i32 = wasm.call("add", (1, 2))?;
//! let snapshot = wasm.snapshot()?;
//! let mut other = Wasm::from_snapshot(&snapshot, &grants)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The guest is `guest/sandbox-rt/guests/wasm`, an interpreter (wasmi) that comes with this crate. A
//! module is checked by it and shut in by the sandbox: what breaks out of the one is in the other.
//!
//! A module can do nothing but compute, unless it is granted more. Its imports `module.name` are the host
//! functions of [`Grants::import`]; those of WASI preview 1 that programs for `wasm32-wasip1` need are
//! made of the other grants. An import that isn't granted does no harm until it is called: then the
//! call ends with [`WasmError::NotGranted`]. There are no files and no sockets.
//!
//! Components (the component model) are for [`crate::component`]: this engine refuses them.

mod error;
mod grants;
mod shared;
mod values;

use std::sync::Arc;
use std::time::Duration;

use skerry_sandbox_abi::wasm::Limits;
use skerry_sandbox_abi::{Decode, Encode, Writer};

use crate::builder::{Builder, Guest};
use crate::error::BuildError;
use crate::processor::Backend;
use crate::sandbox::Sandbox;
use crate::snapshot::Snapshot;

pub use error::WasmError;
pub use grants::Grants;
pub(crate) use shared::{ask, options, sandboxed};
pub use skerry_sandbox_abi::wasm::{Exported, Kind, Trap, Value};
pub use values::{WasmArguments, WasmResults};

/// The guest's program.
static GUEST: &[u8] = include_bytes!("../../../guest/sandbox-rt/guests/wasm/wasm-x86_64");

/// The guest's program, to be run as any other guest.
pub fn guest() -> &'static [u8] {
    GUEST
}

/// Makes a [`Wasm`].
#[derive(Debug)]
#[must_use]
pub struct WasmBuilder {
    module: Option<Guest>,
    sandbox: Builder,
    limits: Limits,
    heap: Option<u64>,
}

impl Default for WasmBuilder {
    fn default() -> Self {
        let limits = Limits {
            memory: 16 << 20,
            table: 100_000,
            stack: 1 << 20,
            depth: 10_000,
            fuel: None,
        };
        Self {
            module: None,
            sandbox: Sandbox::builder(),
            limits,
            heap: None,
        }
    }
}

impl WasmBuilder {
    options!();

    /// The module: the path of a `.wasm` file, or its bytes.
    pub fn module(mut self, module: impl Into<Guest>) -> Self {
        self.module = Some(module.into());
        self
    }

    /// Bytes of the module's own stack (1 MiB unless told), and how many of its calls may be in one
    /// another (10 000 unless told).
    pub fn stack(mut self, bytes: u64, depth: u64) -> Self {
        self.limits.stack = bytes;
        self.limits.depth = depth;
        self
    }

    /// Makes it: starts the guest, and loads the module. A time-out is for this as for each call.
    pub fn build(self) -> Result<Wasm, WasmError> {
        /// Compiled code and its tables, per byte of the module: 4 for an ordinary program, 29 for one that
        /// has nothing but the smallest functions.
        const COMPILED: u64 = 32;
        const ENGINE: u64 = 8 << 20;
        const BUFFERS: u64 = 1 << 20;
        let module = self.module.ok_or(BuildError::NoGuest)?.read()?;
        let len = module.len() as u64;
        let memory = self.limits.memory.saturating_mul(2);
        let heap = self.heap.unwrap_or_else(|| {
            let own = self.limits.stack.saturating_add(ENGINE + len * COMPILED);
            memory.saturating_add(own)
        });
        let sandbox = self
            .sandbox
            .guest(GUEST)
            .heap(heap)
            .buffers(BUFFERS.max(len + BUFFERS / 2))
            .build()?;
        let mut wasm = Wasm { sandbox };
        wasm.ask::<()>("load", 2, |out| {
            module.as_ref().encode(out);
            self.limits.encode(out);
        })?;
        Ok(wasm)
    }
}

/// A WebAssembly module in a sandbox.
#[derive(Debug)]
pub struct Wasm {
    sandbox: Sandbox,
}

impl Wasm {
    /// Begins one.
    pub fn builder() -> WasmBuilder {
        WasmBuilder::default()
    }

    sandboxed!();

    /// The functions that it exports, as far as they pass numbers only.
    pub fn exports(&mut self) -> Result<Vec<Exported>, WasmError> {
        self.ask("exports", 0, |_| ())
    }

    /// Calls an exported function. Its memory and globals stay as they are for the next call, also when
    /// it traps; a time-out, a kill or an error of the sandbox's needs a [`Wasm::restore`].
    pub fn call<R: WasmResults>(
        &mut self,
        name: &str,
        arguments: impl WasmArguments,
    ) -> Result<R, WasmError> {
        let values = self.call_values(name, arguments.values().as_ref())?;
        R::from_values(&values).ok_or_else(|| WasmError::Results {
            name: name.to_owned(),
            wanted: R::kinds(),
            found: values.iter().map(Value::kind).collect(),
        })
    }

    /// Calls an exported function whose type is known only now.
    pub fn call_values(
        &mut self,
        name: &str,
        arguments: &[Value],
    ) -> Result<Vec<Value>, WasmError> {
        self.ask("call", 2, |out| {
            name.encode(out);
            arguments.encode(out);
        })
    }

    /// Runs a program: calls `_start`. Its exit code comes back, 0 if it just returns.
    pub fn run(&mut self) -> Result<i32, WasmError> {
        match self.call::<()>("_start", ()) {
            Ok(()) => Ok(0),
            Err(WasmError::Exit(code)) => Ok(code),
            Err(error) => Err(error),
        }
    }

    /// The size of the memory that it exports as `memory`.
    pub fn memory_size(&mut self) -> Result<u64, WasmError> {
        self.ask("memory_size", 0, |_| ())
    }

    /// Reads the memory that it exports as `memory`: strings and structures that a function returned the
    /// address of.
    pub fn read_memory(&mut self, at: u64, len: u64) -> Result<Vec<u8>, WasmError> {
        self.ask("memory_read", 2, |out| {
            at.encode(out);
            len.encode(out);
        })
    }

    /// Writes to the memory that it exports as `memory`.
    pub fn write_memory(&mut self, at: u64, bytes: &[u8]) -> Result<(), WasmError> {
        self.ask("memory_write", 2, |out| {
            at.encode(out);
            bytes.encode(out);
        })
    }
}
