//! What a component's imports are linked to.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use skerry_sandbox_rt::abi::component::Val;
use skerry_sandbox_rt::abi::wasm::Refusal;
use skerry_sandbox_rt::abi::{Decode, Encode, Reader, Writer};
use skerry_sandbox_rt::wasm::{failed, host};
use wasmtime::component::types::{ComponentFunc, ComponentItem};
use wasmtime::component::{
    Component, Linker, LinkerInstance, ResourceType, Type as EngineType, Val as EngineVal,
};
use wasmtime::{Engine, Error};

use crate::instance::State;
use crate::values::{self, from_engine, to_engine};
use crate::wasi;

/// Separates an interface from a function in the name of a host function.
pub(crate) const OF: char = '.';

/// The interface of functions that are imported from none.
const ROOT: &str = "$root";

/// Ends a call from inside of an import.
#[derive(Debug)]
pub(crate) struct Ended(pub(crate) Refusal);

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl core::error::Error for Ended {}

/// The engine's error that carries a refusal through the component.
pub(crate) fn end(refusal: Refusal) -> Error {
    Error::new(Ended(refusal))
}

/// A resource that no function of this guest's makes.
#[derive(Debug)]
pub(crate) enum Unknown {}

fn refused(error: Error) -> Refusal {
    Refusal::Import(alloc::format!("{error:#}"))
}

/// The name of the host function that an import is.
pub(crate) fn full_name(interface: Option<&str>, name: &str) -> String {
    alloc::format!("{}{OF}{name}", interface.unwrap_or(ROOT))
}

/// Links all that the component imports.
pub(crate) fn link(linker: &mut Linker<State>, component: &Component) -> Result<(), Refusal> {
    let engine = component.engine().clone();
    let kind = component.component_type();
    for (name, item) in kind.imports(&engine) {
        if let ComponentItem::ComponentInstance(instance) = item.ty {
            let mut linked = linker.instance(name).map_err(refused)?;
            for (function, item) in instance.exports(&engine) {
                define(&engine, &mut linked, Some(name), function, &item.ty)?;
            }
        } else {
            define(&engine, &mut linker.root(), None, name, &item.ty)?;
        }
    }
    Ok(())
}

fn define(
    engine: &Engine,
    linker: &mut LinkerInstance<'_, State>,
    interface: Option<&str>,
    name: &str,
    item: &ComponentItem,
) -> Result<(), Refusal> {
    match item {
        ComponentItem::ComponentFunc(_) => {
            let wasi = interface.map_or(Ok(false), |interface| wasi::link(linker, interface, name));
            if !wasi.map_err(refused)? {
                forward(linker, interface, name).map_err(refused)?;
            }
            Ok(())
        }
        ComponentItem::Resource(_) => {
            let known = interface.and_then(|interface| wasi::resource(interface, name));
            let kind = known.unwrap_or_else(ResourceType::host::<Unknown>);
            // A handle of this guest's has nothing behind it that would be freed.
            linker.resource(name, kind, |_, _| Ok(())).map_err(refused)
        }
        ComponentItem::Type(_) => Ok(()),
        ComponentItem::ComponentInstance(instance) => {
            // Within another: only by hand, no interface is one.
            let mut linked = linker.instance(name).map_err(refused)?;
            for (function, item) in instance.exports(engine) {
                define(engine, &mut linked, Some(name), function, &item.ty)?;
            }
            Ok(())
        }
        _ => Err(Refusal::Import(alloc::format!(
            "{} is neither a function nor a resource",
            full_name(interface, name)
        ))),
    }
}

/// Links a function that passes its arguments to the host's function `interface.name`.
fn forward(
    linker: &mut LinkerInstance<'_, State>,
    interface: Option<&str>,
    name: &str,
) -> wasmtime::Result<()> {
    let full = full_name(interface, name);
    linker.func_new(name, move |_, kind, inputs, outputs| {
        call_host(&full, &kind, inputs, outputs).map_err(end)
    })
}

fn call_host(
    full: &str,
    kind: &ComponentFunc,
    inputs: &[EngineVal],
    outputs: &mut [EngineVal],
) -> Result<(), Refusal> {
    let each = kind.params().zip(inputs);
    let values: Result<Vec<Val>, _> = each
        .map(|((_, kind), value)| from_engine(&kind, value.clone()))
        .collect();
    let passed = values.map_err(|_| {
        failed(
            full,
            &"resources, streams and futures can't be passed to a host function",
        )
    });
    // Also where they can't be passed the host is asked: it tells whether the function is granted.
    let count = kind.params().len() as u32;
    let arguments = |out: &mut Writer<'_>| {
        out.put(&count.to_le_bytes());
        let values = passed.iter().flatten();
        values.for_each(|value| value.encode(out));
    };
    let reply = host(full, full, arguments, |reply| {
        if let (Some(kind), Some(output)) = (kind.results().next(), outputs.first_mut()) {
            *output = returned(full, reply, &kind)?;
        }
        Ok(())
    });
    match (reply, passed) {
        (Err(Refusal::Host { .. }), Err(why)) => Err(why),
        (reply, _) => reply,
    }
}

fn returned(full: &str, reply: &mut Reader<'_>, kind: &EngineType) -> Result<EngineVal, Refusal> {
    let value = Val::decode(reply).and_then(|value| reply.end().map(|()| value));
    let value = value.ok().and_then(|value| to_engine(kind, value).ok());
    value.ok_or_else(|| {
        let kind = values::kind(kind).to_string();
        failed(full, &alloc::format!("it doesn't return {kind}"))
    })
}
