//! A guest that runs one WebAssembly module.
//!
//! ```text
//!   host: load(bytes, limits) ─▶ Module, imports linked ─▶ Instance       snapshot here
//!         call(name, values)  ─▶ exported function ─▶ values, or Refusal
//!                                      │ import
//!                                      ├─ wasi_snapshot_preview1.* ─▶ wasi ─▶ host function wasi.*
//!                                      └─ module.name ─▶ imports ─▶ host function "module.name"
//! ```
//!
//! A module has no capability but those that the host has registered a function for: an import without
//! one is linked all the same, and ends the call with `NotGranted` when it is called.
//!
//! What a module does is checked twice: by the engine, and by the sandbox around the engine.

#![no_std]
#![no_main]

extern crate alloc;

mod imports;
mod module;
mod wasi;

use alloc::vec::Vec;

use skerry_sandbox_rt::abi::wasm::{Exported, Limits, Outcome, Refusal, Value};
use skerry_sandbox_rt::guest_fn;
use spin::Mutex;

use module::Loaded;

/// The module, once it is loaded. There is one thread: the lock is never waited for.
static MODULE: Mutex<Option<Loaded>> = Mutex::new(None);

fn with<T>(work: impl FnOnce(&mut Loaded) -> Result<T, Refusal>) -> Outcome<T> {
    let mut module = MODULE.lock();
    Outcome(module.as_mut().ok_or(Refusal::NoModule).and_then(work))
}

/// Compiles and instantiates a module, runs its start function and, if it has one, `_initialize`.
#[guest_fn]
fn load(module: &[u8], limits: Limits) -> Outcome<()> {
    let mut place = MODULE.lock();
    if place.is_some() {
        return Outcome(Err(Refusal::Loaded));
    }
    Outcome(Loaded::new(module, limits).map(|loaded| *place = Some(loaded)))
}

/// The functions that the module exports.
#[guest_fn]
fn exports() -> Outcome<Vec<Exported>> {
    with(|module| Ok(module.exports().to_vec()))
}

/// Calls an exported function.
#[guest_fn]
fn call(name: &str, arguments: Vec<Value>) -> Outcome<Vec<Value>> {
    with(|module| module.call(name, &arguments))
}

/// The fuel that the last call used; 0 where it is not counted.
#[guest_fn]
fn fuel_used() -> Outcome<u64> {
    with(|module| Ok(module.fuel_used()))
}

/// The size of the module's memory in bytes.
#[guest_fn]
fn memory_size() -> Outcome<u64> {
    with(|module| module.memory_size())
}

/// Bytes of the module's memory.
#[guest_fn]
fn memory_read(at: u64, len: u64) -> Outcome<Vec<u8>> {
    with(|module| module.read(at, len))
}

/// Changes bytes of the module's memory.
#[guest_fn]
fn memory_write(at: u64, bytes: &[u8]) -> Outcome<()> {
    with(|module| module.write(at, bytes))
}
