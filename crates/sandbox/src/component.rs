//! WebAssembly components, each in a sandbox of its own.
//!
//! ```no_run
//! use skerry_sandbox::component::{Component, Grants};
//!
//! let grants = Grants::new()
//!     .stdout(|bytes| print!("{}", String::from_utf8_lossy(&bytes)))
//!     .import("shop:stock/prices", "price", |name: String| name.len() as u32);
//! let mut component = Component::builder().component("plugin.wasm").grants(&grants).build()?;
//! let names: Vec<String> = component.call("shop:stock/basket#names", (3_u32,))?;
//! let snapshot = component.snapshot()?;
//! let mut other = Component::from_snapshot(&snapshot, &grants)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! ```text
//!   host: component ─▶ compile (wasmtime's Cranelift) ─▶ bytecode for Pulley
//!   guest:             load ─▶ wasmtime's runtime, Pulley ─▶ call, imports ─▶ host functions
//! ```
//!
//! The component is compiled **on the host**, by the feature `components`, to the bytecode of an interpreter
//! that runs in the guest (`guest/sandbox-rt/guests/component`). The host runs nothing of it, but the
//! compiler reads it: unlike a module, which the host only copies. [`ComponentBuilder::compiled`] takes what
//! [`compile`] made elsewhere.
//!
//! What it is granted is as for modules ([`crate::wasm`]): a function `name` of an imported interface is
//! the host function of [`Grants::import`]`(interface, name, …)`, the interface with its version as the
//! component has it, `$root` for functions of none. Closures take and return Rust's types, [`Val`], or
//! [`Wit`] of any [`WitValue`]. WASI 0.2 is made of the other grants.
//!
//! A component that traps or exits can't be called again (its own rule): restore a snapshot.

mod compile;
mod text;
mod typed;

use std::sync::Arc;
use std::time::Duration;

use skerry_sandbox_abi::component::Limits;
use skerry_sandbox_abi::{Decode, Encode, Writer};

use crate::builder::{Builder, Guest};
use crate::error::BuildError;
use crate::processor::Backend;
use crate::sandbox::Sandbox;
use crate::snapshot::Snapshot;
use crate::wasm::{ask, options, sandboxed};

pub use crate::wasm::{Grants, WasmError};
pub use compile::{compile, is_component};
pub use skerry_sandbox_abi::component::{Func, Type, Val};
pub use text::{parse, to_json};
pub use typed::{Wit, WitArguments, WitValue};

/// The guest's program.
static GUEST: &[u8] = include_bytes!("../../../guest/sandbox-rt/guests/component/component-x86_64");

/// The guest's program, to be run as any other guest.
pub fn guest() -> &'static [u8] {
    GUEST
}

/// Makes a [`Component`].
#[derive(Debug)]
#[must_use]
pub struct ComponentBuilder {
    component: Option<Source>,
    sandbox: Builder,
    limits: Limits,
    heap: Option<u64>,
}

#[derive(Debug)]
enum Source {
    Component(Guest),
    Compiled(Guest),
}

impl Default for ComponentBuilder {
    fn default() -> Self {
        let limits = Limits {
            memory: 16 << 20,
            table: 100_000,
            stack: 1 << 20,
            fuel: None,
        };
        Self {
            component: None,
            sandbox: Sandbox::builder(),
            limits,
            heap: None,
        }
    }
}

impl ComponentBuilder {
    options!();

    /// The component: the path of a `.wasm` file, or its bytes. It is compiled here, see [`compile`].
    pub fn component(mut self, component: impl Into<Guest>) -> Self {
        self.component = Some(Source::Component(component.into()));
        self
    }

    /// A component that [`compile`] of this version has compiled, with fuel if [`Self::fuel`] is asked
    /// for. The guest believes what it is given: bytes of someone else's are as good as a guest of
    /// theirs, held by the sandbox and no more.
    pub fn compiled(mut self, artifact: impl Into<Guest>) -> Self {
        self.component = Some(Source::Compiled(artifact.into()));
        self
    }

    /// Bytes of the component's own stack (1 MiB unless told).
    pub fn stack(mut self, bytes: u64) -> Self {
        self.limits.stack = bytes;
        self
    }

    /// Makes it: compiles the component, starts the guest, and loads it. A time-out is for loading as for
    /// each call, and not for compiling.
    pub fn build(self) -> Result<Component, WasmError> {
        /// The artifact, its copy, and tables.
        const COPIES: u64 = 4;
        const ENGINE: u64 = 8 << 20;
        const BUFFERS: u64 = 1 << 20;
        /// Values that lie in each other are followed by recursion.
        const STACK: u64 = 1 << 20;
        let artifact = match self.component.ok_or(BuildError::NoGuest)? {
            Source::Component(component) => {
                compile(&component.read()?, self.limits.fuel.is_some())?.into()
            }
            Source::Compiled(artifact) => artifact.read()?,
        };
        let len = artifact.len() as u64;
        let memory = self.limits.memory.saturating_mul(2);
        let heap = self.heap.unwrap_or_else(|| {
            let own = self.limits.stack.saturating_add(ENGINE + len * COPIES);
            memory.saturating_add(own)
        });
        let sandbox = self
            .sandbox
            .guest(GUEST)
            .heap(heap)
            .stack(STACK)
            .buffers(BUFFERS.max(len + BUFFERS / 2))
            .build()?;
        let mut component = Component { sandbox };
        component.ask::<()>("load", 2, |out| {
            artifact.as_ref().encode(out);
            self.limits.encode(out);
        })?;
        Ok(component)
    }
}

/// A WebAssembly component in a sandbox.
#[derive(Debug)]
pub struct Component {
    sandbox: Sandbox,
}

impl Component {
    sandboxed!();

    /// Begins one.
    pub fn builder() -> ComponentBuilder {
        ComponentBuilder::default()
    }

    /// The functions that it exports, those of its interfaces as `namespace:package/interface#name`.
    pub fn exports(&mut self) -> Result<Vec<Func>, WasmError> {
        self.ask("exports", 0, |_| ())
    }

    /// The functions that it imports, by the names of the host functions that would be called; those of
    /// WASI that need less than that among them.
    pub fn imports(&mut self) -> Result<Vec<Func>, WasmError> {
        self.ask("imports", 0, |_| ())
    }

    /// Calls an exported function. Its state stays for the next call.
    pub fn call<R: WitValue>(
        &mut self,
        name: &str,
        arguments: impl WitArguments,
    ) -> Result<R, WasmError> {
        let value = self.call_values(name, &arguments.values())?;
        R::from_payload(value.map(Box::new)).ok_or_else(|| WasmError::Result {
            name: name.to_owned(),
            wanted: R::wit_name(),
        })
    }

    /// Calls an exported function whose type is known only now.
    pub fn call_values(&mut self, name: &str, arguments: &[Val]) -> Result<Option<Val>, WasmError> {
        self.ask("call", 2, |out| {
            name.encode(out);
            arguments.encode(out);
        })
    }

    /// Runs a program: calls its `wasi:cli/run`. Its exit code comes back: 0, 1 if it says that it failed,
    /// or what it exits with.
    pub fn run(&mut self) -> Result<i32, WasmError> {
        match self.ask("run", 0, |_| ()) {
            Ok(Some(Val::Result(Err(_)))) => Ok(1),
            Ok::<Option<Val>, _>(_) => Ok(0),
            Err(WasmError::Exit(code)) => Ok(code),
            Err(error) => Err(error),
        }
    }
}
