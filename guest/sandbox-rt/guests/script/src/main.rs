//! A guest that runs one script.
//!
//! ```text
//!   host: load(source, limits, granted) ─▶ Engine, AST                        snapshot here,
//!         run() ─▶ statements ─▶ Scope ─▶ Value                               or here
//!         call(name, values) ─▶ function, which sees the Scope ─▶ Value, or Ended
//!         eval(source) ─▶ more statements and functions
//!                           │ name(…) of a granted function, print, debug
//!                           └─▶ host function script.fn.name, script.print, script.debug
//! ```
//!
//! The language is Rhai's. What a script does is limited twice: by the engine, whose limits it can be
//! called again after, and by the sandbox around it.

#![no_std]
#![no_main]

extern crate alloc;

mod ended;
mod host;
mod loaded;
mod values;

use alloc::vec::Vec;

use skerry_sandbox_rt::abi::script::{Defined, Granted, Limits, Outcome, Refusal, Value};
use skerry_sandbox_rt::guest_fn;
use spin::Mutex;

use loaded::Loaded;

/// A value in a lock, of which there is one thread that never waits for it.
struct Place(Mutex<Option<Loaded>>);

// SAFETY: there is one thread, and no interrupt returns to guest code.
unsafe impl Sync for Place {}

/// The script, once it is loaded.
static SCRIPT: Place = Place(Mutex::new(None));

fn with<T>(
    work: impl FnOnce(&mut Loaded) -> Result<T, skerry_sandbox_rt::abi::script::Ended>,
) -> Outcome<T> {
    let mut script = SCRIPT.0.lock();
    let script = script.as_mut().ok_or_else(|| Refusal::NoScript.into());
    Outcome(script.and_then(work))
}

/// Makes an engine and compiles a script for it. Nothing of it is run.
#[guest_fn]
fn load(source: &str, limits: Limits, granted: Vec<Granted>) -> Outcome<()> {
    let mut place = SCRIPT.0.lock();
    if place.is_some() {
        return Outcome(Err(Refusal::Loaded.into()));
    }
    Outcome(Loaded::new(source, &limits, granted).map(|loaded| *place = Some(loaded)))
}

/// The functions that can be called.
#[guest_fn]
fn functions() -> Outcome<Vec<Defined>> {
    with(|script| Ok(script.functions()))
}

/// Runs the script's statements from the start, without anything that was there.
#[guest_fn]
fn run() -> Outcome<Value> {
    with(Loaded::run)
}

/// Runs more statements with what is there.
#[guest_fn]
fn eval(source: &str) -> Outcome<Value> {
    with(|script| script.eval(source))
}

/// Calls a function.
#[guest_fn]
fn call(name: &str, arguments: Vec<Value>) -> Outcome<Value> {
    with(|script| script.call(name, arguments))
}

/// The operations of the last run or call.
#[guest_fn]
fn operations() -> Outcome<u64> {
    with(|script| Ok(script.operations()))
}
