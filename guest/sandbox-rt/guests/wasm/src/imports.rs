//! What a module's imports are linked to.

use alloc::string::ToString;
use alloc::vec::Vec;
use core::fmt;

use skerry_sandbox_rt::abi::wasm::{Kind, Refusal, Value, wasi as names};
use skerry_sandbox_rt::abi::{Decode, Encode, Reader, Writer};
use skerry_sandbox_rt::wasm::{failed, host};
use wasmi::{Engine, ExternType, FuncType, Linker, Module, StoreLimits, Val};

use crate::module::{from_engine, kinds, to_engine};
use crate::wasi;

/// Ends a call from inside of an import.
#[derive(Debug)]
pub(crate) struct Ended(pub(crate) Refusal);

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl wasmi::errors::HostError for Ended {}

/// The engine's error that carries a refusal through the module.
pub(crate) fn end(refusal: Refusal) -> wasmi::Error {
    wasmi::Error::host(Ended(refusal))
}

/// A function for each import.
pub(crate) fn link(engine: &Engine, module: &Module) -> Result<Linker<StoreLimits>, Refusal> {
    let mut linker = Linker::new(engine);
    let mut wasi_wanted = false;
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for import in module.imports() {
        let (from, name) = (import.module(), import.name());
        let ExternType::Func(kind) = import.ty() else {
            return Err(Refusal::Import(alloc::format!(
                "{from}.{name} is no function"
            )));
        };
        if from == names::MODULE && wasi::NAMES.contains(&name) {
            wasi_wanted = true;
            continue;
        }
        // A module may import one function twice.
        if seen.contains(&(from, name)) {
            continue;
        }
        seen.push((from, name));
        forward(&mut linker, from, name, kind)?;
    }
    if wasi_wanted {
        wasi::link(&mut linker).map_err(|error| Refusal::Import(error.to_string()))?;
    }
    Ok(linker)
}

/// Links a function that passes its arguments to the host's function `module.name`.
fn forward(
    linker: &mut Linker<StoreLimits>,
    module: &str,
    name: &str,
    kind: &FuncType,
) -> Result<(), Refusal> {
    let full = alloc::format!("{module}.{name}");
    let parameters = kinds(kind.params());
    let results = kinds(kind.results());
    let (Some(_), Some(results)) = (parameters, results) else {
        return Err(Refusal::Import(alloc::format!(
            "{full} passes references, not numbers"
        )));
    };
    if results.len() > 1 {
        return Err(Refusal::Import(alloc::format!(
            "{full} returns more than one value"
        )));
    }
    let result = results.first().copied();
    let call = move |_: wasmi::Caller<'_, StoreLimits>, inputs: &[Val], outputs: &mut [Val]| {
        let values: Option<Vec<Value>> = inputs.iter().map(from_engine).collect();
        let values = values.unwrap_or_default();
        let arguments = |out: &mut Writer<'_>| {
            out.put(&(values.len() as u32).to_le_bytes());
            values.iter().for_each(|value| value.encode(out));
        };
        host(&full, &full, arguments, |reply| {
            if let (Some(kind), Some(output)) = (result, outputs.first_mut()) {
                let value = value(reply, kind);
                let value = value.ok_or_else(|| other_type(&full, kind))?;
                *output = to_engine(&value);
            }
            Ok(())
        })
        .map_err(end)
    };
    let linked = linker.func_new(module, name, kind.clone(), call);
    linked.map_err(|error| Refusal::Import(error.to_string()))?;
    Ok(())
}

fn other_type(name: &str, kind: Kind) -> Refusal {
    failed(name, &alloc::format!("it doesn't return {kind}"))
}

fn value(reply: &mut Reader<'_>, kind: Kind) -> Option<Value> {
    let value = Value::decode(reply).ok()?;
    reply.end().ok()?;
    (value.kind() == kind).then_some(value)
}
