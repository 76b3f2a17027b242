//! From a component to what the guest's interpreter runs.

use crate::wasm::WasmError;

/// The settings of the engine in the guest.
#[cfg(feature = "components")]
#[path = "../../../../guest/sandbox-rt/guests/component/src/config.rs"]
mod config;

/// Whether these bytes begin as a component does, and not as a module (Component Model binary format,
/// "layer").
pub fn is_component(bytes: &[u8]) -> bool {
    const MAGIC: &[u8] = b"\0asm";
    const LAYER: [u8; 2] = [1, 0];
    bytes.starts_with(MAGIC) && bytes.get(6..8) == Some(&LAYER)
}

/// Compiles a component for [`super::ComponentBuilder::compiled`], with code that counts fuel or without. The
/// result is for this version of this crate.
///
/// The compiler is wasmtime's, run on bytes that may be hostile: it validates them, and an embedder who
/// wants less on the host runs this in a process of its own. No limit of time is on it.
#[cfg(feature = "components")]
pub fn compile(component: &[u8], fuel: bool) -> Result<Vec<u8>, WasmError> {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use wasmtime::Engine;

    let refused = |error: wasmtime::Error| WasmError::Compile(format!("{error:#}"));
    // An assertion of the compiler's that a hostile component breaks is no more than a component that
    // can't be compiled: nothing outlives the attempt.
    let compiled = catch_unwind(AssertUnwindSafe(|| {
        let engine = Engine::new(&config::config(fuel)?)?;
        engine.precompile_component(component)
    }));
    match compiled {
        Ok(compiled) => compiled.map_err(refused),
        Err(_) => Err(WasmError::Compile("the compiler gave up".into())),
    }
}

/// Compiles nothing: the feature `components` is off.
#[cfg(not(feature = "components"))]
pub fn compile(_: &[u8], _: bool) -> Result<Vec<u8>, WasmError> {
    Err(WasmError::NoCompiler)
}
