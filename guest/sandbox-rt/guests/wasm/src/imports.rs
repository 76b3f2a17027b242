//! What a module's imports are linked to.

use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use skerry_sandbox_rt::abi::wasm::{Kind, Refusal, Value, wasi as names};
use skerry_sandbox_rt::abi::{Decode, Encode, Reader, Writer};
use skerry_sandbox_rt::{HostError, call_by_name};
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
        let arguments = arguments(&values.unwrap_or_default());
        let reply = host(&full, &full, &arguments)?;
        if let (Some(kind), Some(output)) = (result, outputs.first_mut()) {
            let value = value(&reply, kind);
            let value = value.ok_or_else(|| end(other_type(&full, kind)))?;
            *output = to_engine(&value);
        }
        Ok(())
    };
    let linked = linker.func_new(module, name, kind.clone(), call);
    linked.map_err(|error| Refusal::Import(error.to_string()))?;
    Ok(())
}

fn other_type(name: &str, kind: Kind) -> Refusal {
    Refusal::Host {
        name: name.to_string(),
        message: alloc::format!("it doesn't return {kind}"),
    }
}

/// Values as a host call has them: their number, then each.
fn arguments(values: &[Value]) -> Vec<u8> {
    /// A tag and eight bytes at most.
    const LARGEST: usize = 9;
    encoded(values.len() as u32, LARGEST * values.len(), |out| {
        for value in values {
            value.encode(out);
        }
    })
}

/// `count` arguments of at most `size` bytes.
pub(crate) fn encoded(count: u32, size: usize, put: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut area = vec![0; size_of::<u32>() + size];
    let mut out = Writer::new(&mut area);
    out.put(&count.to_le_bytes());
    put(&mut out);
    let len = out.finish().unwrap_or_default();
    area.truncate(len);
    area
}

fn value(reply: &[u8], kind: Kind) -> Option<Value> {
    let mut from = Reader::new(reply);
    let value = Value::decode(&mut from).ok()?;
    from.end().ok()?;
    (value.kind() == kind).then_some(value)
}

/// Calls the host's function `name` for `import`.
pub(crate) fn host(import: &str, name: &str, arguments: &[u8]) -> Result<Vec<u8>, wasmi::Error> {
    call_by_name(name, arguments).map_err(|error| {
        end(match error {
            HostError::NoFunction => Refusal::NotGranted {
                import: import.to_string(),
                needs: name.to_string(),
            },
            error => Refusal::Host {
                name: name.to_string(),
                message: error.to_string(),
            },
        })
    })
}

/// Calls the host's function `name` for a function of WASI's, and decodes what it returns.
pub(crate) fn capability<T: for<'a> Decode<'a>>(
    function: &str,
    name: &str,
    arguments: &[u8],
) -> Result<T, wasmi::Error> {
    let mut import = String::from(names::MODULE);
    import.push('.');
    import.push_str(function);
    let reply = host(&import, name, arguments)?;
    let mut from = Reader::new(&reply);
    let value = T::decode(&mut from).and_then(|value| from.end().map(|()| value));
    value.map_err(|error| {
        end(Refusal::Host {
            name: name.to_string(),
            message: error.to_string(),
        })
    })
}
