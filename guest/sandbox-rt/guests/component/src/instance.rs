//! One component: loading, calling.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use skerry_sandbox_rt::abi::component::{Func as Exported, Limits, RUN, Val};
use skerry_sandbox_rt::abi::wasm::{Refusal, Trap};
use wasmtime::component::types::ComponentItem;
use wasmtime::component::{Component, Func, Instance, Linker, Val as EngineVal};
use wasmtime::error::OutOfMemory;
use wasmtime::{Engine, Error, ResourceLimiter, Store, Trap as EngineTrap};

use crate::config::config;
use crate::imports::{self, Ended};
use crate::values::{self, from_engine, to_engine};

/// Separates an interface from a function of it.
const OF: char = '#';

/// What belongs to the component while it runs.
#[derive(Debug)]
pub(crate) struct State {
    limits: Limits,
    /// Bytes of all memories.
    memory: u64,
    /// A memory or table was to be larger than it may be.
    refused: bool,
}

impl State {
    /// Bytes that its memories may have together.
    pub(crate) fn memory(&self) -> u64 {
        self.limits.memory
    }

    fn allow(&mut self, allowed: bool) -> wasmtime::Result<bool> {
        self.refused |= !allowed;
        Ok(allowed)
    }
}

impl ResourceLimiter for State {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let more = desired.saturating_sub(current) as u64;
        let memory = self.memory.saturating_add(more);
        let allowed = memory <= self.limits.memory;
        if allowed {
            self.memory = memory;
        }
        self.allow(allowed)
    }

    fn table_growing(
        &mut self,
        _: usize,
        desired: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        self.allow(desired as u64 <= self.limits.table)
    }
}

/// A component's instance, and what it belongs to.
pub(crate) struct Loaded {
    store: Store<State>,
    component: Component,
    instance: Instance,
    fuel: Option<u64>,
    fuel_used: u64,
    ended: bool,
}

fn trap(code: EngineTrap) -> Option<Trap> {
    Some(match code {
        EngineTrap::UnreachableCodeReached => Trap::Unreachable,
        EngineTrap::MemoryOutOfBounds => Trap::MemoryOutOfBounds,
        EngineTrap::TableOutOfBounds => Trap::TableOutOfBounds,
        EngineTrap::IndirectCallToNull => Trap::NullCall,
        EngineTrap::BadSignature => Trap::BadSignature,
        EngineTrap::IntegerDivisionByZero => Trap::DivisionByZero,
        EngineTrap::IntegerOverflow => Trap::IntegerOverflow,
        EngineTrap::BadConversionToInteger => Trap::BadConversion,
        EngineTrap::StackOverflow => Trap::StackExhausted,
        EngineTrap::OutOfFuel => Trap::OutOfFuel,
        EngineTrap::AllocationTooLarge => Trap::OutOfMemory,
        _ => return None,
    })
}

/// Why the engine gave up, `otherwise` being what it was doing.
fn refusal(error: &Error, otherwise: fn(String) -> Refusal) -> Refusal {
    if let Some(Ended(refusal)) = error.downcast_ref::<Ended>() {
        return refusal.clone();
    }
    if error.is::<OutOfMemory>() {
        return Refusal::Trap(Trap::OutOfMemory);
    }
    match error.downcast_ref::<EngineTrap>() {
        Some(EngineTrap::CannotEnterComponent) => Refusal::Ended,
        Some(code) => match trap(*code) {
            Some(trap) => Refusal::Trap(trap),
            // The others are broken rules of the component model.
            None => Refusal::Interface(code.to_string()),
        },
        None => otherwise(alloc::format!("{error:#}")),
    }
}

fn size(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn engine(limits: &Limits) -> wasmtime::Result<Engine> {
    // The engine refuses a stack of nothing.
    const LEAST: usize = 4 << 10;
    let mut config = config(limits.fuel.is_some())?;
    config.max_wasm_stack(size(limits.stack).max(LEAST));
    Engine::new(&config)
}

impl Loaded {
    /// Makes an instance of a component.
    pub(crate) fn new(artifact: &[u8], limits: Limits) -> Result<Self, Refusal> {
        let refused = |error: Error| refusal(&error, Refusal::Module);
        let engine = engine(&limits).map_err(refused)?;
        // SAFETY: what isn't the compiler's own may do anything in this guest, as any guest's program may:
        // the host takes nothing of it for granted.
        let component = unsafe { Component::deserialize(&engine, artifact) }.map_err(refused)?;
        let mut linker = Linker::new(&engine);
        imports::link(&mut linker, &component)?;
        let state = State {
            limits,
            memory: 0,
            refused: false,
        };
        let mut store = Store::new(&engine, state);
        store.limiter(|state| state);
        let fuel = limits.fuel;
        refuel(&mut store, fuel);
        let instance = linker.instantiate(&mut store, &component);
        let instance = instance.map_err(|error| match store.data().refused {
            true => Refusal::Trap(Trap::OutOfMemory),
            false => refusal(&error, Refusal::Import),
        })?;
        Ok(Self {
            store,
            component,
            instance,
            fuel,
            fuel_used: 0,
            ended: false,
        })
    }

    /// The functions that can be called from outside.
    pub(crate) fn exports(&self) -> Vec<Exported> {
        let engine = self.component.engine();
        let mut found = Vec::new();
        for (name, item) in self.component.component_type().exports(engine) {
            functions(engine, name, OF, item.ty, &mut found);
        }
        found
    }

    /// The functions that it imports.
    pub(crate) fn imports(&self) -> Vec<Exported> {
        let engine = self.component.engine();
        let mut found = Vec::new();
        for (name, item) in self.component.component_type().imports(engine) {
            functions(engine, name, imports::OF, item.ty, &mut found);
        }
        found
    }

    fn function(&mut self, name: &str) -> Option<Func> {
        let Some((interface, function)) = name.rsplit_once(OF) else {
            return self.instance.get_func(&mut self.store, name);
        };
        let interface = self
            .instance
            .get_export_index(&mut self.store, None, interface)?;
        let function =
            self.instance
                .get_export_index(&mut self.store, Some(&interface), function)?;
        self.instance.get_func(&mut self.store, function)
    }

    /// Calls an exported function.
    pub(crate) fn call(&mut self, name: &str, arguments: Vec<Val>) -> Result<Option<Val>, Refusal> {
        let function = self.function(name);
        let function = function.ok_or_else(|| Refusal::NoExport(name.to_string()))?;
        if self.ended {
            return Err(Refusal::Ended);
        }
        let kind = function.ty(&self.store);
        let described = || values::func(name.to_string(), &kind);
        if kind.params().len() != arguments.len() {
            let given = arguments.len();
            return Err(Refusal::Arguments(alloc::format!(
                "{given} were given for {}",
                described()
            )));
        }
        let each = kind.params().zip(arguments);
        let inputs = each.map(|((parameter, kind), value)| {
            to_engine(&kind, value).map_err(|_| {
                let kind = values::kind(&kind);
                Refusal::Arguments(alloc::format!("{parameter} is no {kind}"))
            })
        });
        let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
        let result = kind.results().next();
        let mut outputs = Vec::new();
        outputs.resize(kind.results().len(), EngineVal::Bool(false));
        refuel(&mut self.store, self.fuel);
        let ended = function.call(&mut self.store, &inputs, &mut outputs);
        self.fuel_used = match (self.fuel, self.store.get_fuel()) {
            (Some(given), Ok(left)) => given.saturating_sub(left),
            _ => 0,
        };
        if let Err(error) = ended {
            self.ended = true;
            return Err(refusal(&error, Refusal::Interface));
        }
        let (Some(kind), Some(value)) = (result, outputs.pop()) else {
            return Ok(None);
        };
        let value = from_engine(&kind, value).map_err(|_| {
            Refusal::Arguments(alloc::format!(
                "{} returns what can't be passed",
                described()
            ))
        })?;
        Ok(Some(value))
    }

    /// Calls a program's `wasi:cli/run`, of whichever version 0.2.
    pub(crate) fn run(&mut self) -> Result<Option<Val>, Refusal> {
        let engine = self.component.engine().clone();
        let kind = self.component.component_type();
        let mut names = kind.exports(&engine).map(|(name, _)| name);
        let interface = names.find(|name| name.starts_with(RUN));
        let interface = interface.ok_or_else(|| Refusal::NoExport(RUN.to_string()))?;
        self.call(&alloc::format!("{interface}{OF}run"), Vec::new())
    }

    pub(crate) fn fuel_used(&self) -> u64 {
        self.fuel_used
    }
}

/// Adds what functions an import or export is.
fn functions(
    engine: &Engine,
    name: &str,
    of: char,
    item: ComponentItem,
    found: &mut Vec<Exported>,
) {
    match item {
        ComponentItem::ComponentFunc(func) => found.push(values::func(name.to_string(), &func)),
        ComponentItem::ComponentInstance(instance) => {
            for (function, item) in instance.exports(engine) {
                if let ComponentItem::ComponentFunc(func) = item.ty {
                    let full = alloc::format!("{name}{of}{function}");
                    found.push(values::func(full, &func));
                }
            }
        }
        _ => {}
    }
}

/// Fails only where fuel isn't counted.
fn refuel(store: &mut Store<State>, fuel: Option<u64>) {
    if let Some(fuel) = fuel {
        let _ = store.set_fuel(fuel);
    }
}
