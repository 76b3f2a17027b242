//! A guest that runs one WebAssembly component.
//!
//! ```text
//!   host: component ─▶ Cranelift ─▶ artifact: bytecode of the interpreter Pulley
//!         load(artifact, limits) ─▶ Component, imports linked ─▶ Instance         snapshot here
//!         call(name, values)     ─▶ exported function ─▶ value, or Refusal
//!                                         │ import
//!                                         ├─ wasi:*@0.2 ─▶ wasi ─▶ host function wasi.*
//!                                         └─ interface.name ─▶ imports ─▶ host function "interface.name"
//! ```
//!
//! A component has no capability but those that the host has registered a function for: an import without
//! one is linked all the same, and ends the call with `NotGranted` when it is called.
//!
//! The artifact is believed: who can give another one can run any code in this guest, which the sandbox
//! holds as it does any guest.

#![no_std]
#![no_main]

extern crate alloc;

mod config;
mod imports;
mod instance;
mod platform;
mod values;
mod wasi;

use alloc::vec::Vec;

use skerry_sandbox_rt::abi::component::{Func, Limits, Val};
use skerry_sandbox_rt::abi::wasm::{Outcome, Refusal};
use skerry_sandbox_rt::guest_fn;
use spin::Mutex;

use instance::Loaded;

/// The component, once it is loaded. There is one thread: the lock is never waited for.
static COMPONENT: Mutex<Option<Loaded>> = Mutex::new(None);

fn with<T>(work: impl FnOnce(&mut Loaded) -> Result<T, Refusal>) -> Outcome<T> {
    let mut component = COMPONENT.lock();
    Outcome(component.as_mut().ok_or(Refusal::NoModule).and_then(work))
}

/// Instantiates a component that the host has compiled.
#[guest_fn]
fn load(artifact: &[u8], limits: Limits) -> Outcome<()> {
    let mut place = COMPONENT.lock();
    if place.is_some() {
        return Outcome(Err(Refusal::Loaded));
    }
    Outcome(Loaded::new(artifact, limits).map(|loaded| *place = Some(loaded)))
}

/// The functions that the component exports, also those of its interfaces.
#[guest_fn]
fn exports() -> Outcome<Vec<Func>> {
    with(|component| Ok(component.exports()))
}

/// The functions that the component imports, by the names of the host functions that would grant them.
#[guest_fn]
fn imports() -> Outcome<Vec<Func>> {
    with(|component| Ok(component.imports()))
}

/// Calls an exported function.
#[guest_fn]
fn call(name: &str, arguments: Vec<Val>) -> Outcome<Option<Val>> {
    with(|component| component.call(name, arguments))
}

/// Runs a program: its `wasi:cli/run`.
#[guest_fn]
fn run() -> Outcome<Option<Val>> {
    with(|component| component.run())
}

/// The fuel that the last call used; 0 where it is not counted.
#[guest_fn]
fn fuel_used() -> Outcome<u64> {
    with(|component| Ok(component.fuel_used()))
}
