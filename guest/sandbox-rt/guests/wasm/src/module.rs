//! One module: loading, calling, its memory.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use skerry_sandbox_rt::abi::wasm::{Exported, Kind, Limits, Refusal, Trap, Value};
use wasmi::errors::{ErrorKind, InstantiationError};
use wasmi::{
    CompilationMode, Config, EnforcedLimits, Engine, ExternType, F32, F64, Func, FuncType,
    Instance, Linker, Memory, Module, Store, StoreLimits, StoreLimitsBuilder, TrapCode, Val,
    ValType,
};

use crate::imports::{self, Ended};

/// A module's instance, and what it belongs to.
pub(crate) struct Loaded {
    store: Store<StoreLimits>,
    instance: Instance,
    exports: Vec<Exported>,
    fuel: Option<u64>,
    fuel_used: u64,
}

/// The type of a value that can be passed.
pub(crate) fn kind(kind: &ValType) -> Option<Kind> {
    match kind {
        ValType::I32 => Some(Kind::I32),
        ValType::I64 => Some(Kind::I64),
        ValType::F32 => Some(Kind::F32),
        ValType::F64 => Some(Kind::F64),
        _ => None,
    }
}

/// The types of all, if they can be passed.
pub(crate) fn kinds(types: &[ValType]) -> Option<Vec<Kind>> {
    types.iter().map(kind).collect()
}

/// A value for the engine. Floating point goes as its bits.
pub(crate) fn to_engine(value: &Value) -> Val {
    match *value {
        Value::I32(value) => Val::I32(value),
        Value::I64(value) => Val::I64(value),
        Value::F32(value) => Val::F32(F32::from_bits(value.to_bits())),
        Value::F64(value) => Val::F64(F64::from_bits(value.to_bits())),
    }
}

/// A value of the engine's.
pub(crate) fn from_engine(value: &Val) -> Option<Value> {
    Some(match value {
        Val::I32(value) => Value::I32(*value),
        Val::I64(value) => Value::I64(*value),
        Val::F32(value) => Value::F32(f32::from_bits(value.to_bits())),
        Val::F64(value) => Value::F64(f64::from_bits(value.to_bits())),
        _ => return None,
    })
}

fn trap(code: TrapCode) -> Trap {
    match code {
        TrapCode::UnreachableCodeReached => Trap::Unreachable,
        TrapCode::MemoryOutOfBounds => Trap::MemoryOutOfBounds,
        TrapCode::TableOutOfBounds => Trap::TableOutOfBounds,
        TrapCode::IndirectCallToNull => Trap::NullCall,
        TrapCode::IntegerDivisionByZero => Trap::DivisionByZero,
        TrapCode::IntegerOverflow => Trap::IntegerOverflow,
        TrapCode::BadConversionToInteger => Trap::BadConversion,
        TrapCode::StackOverflow => Trap::StackExhausted,
        TrapCode::BadSignature => Trap::BadSignature,
        TrapCode::OutOfFuel => Trap::OutOfFuel,
        TrapCode::GrowthOperationLimited | TrapCode::OutOfSystemMemory => Trap::OutOfMemory,
    }
}

/// Why the engine gave up, `otherwise` being what it was doing.
fn refusal(error: &wasmi::Error, otherwise: fn(String) -> Refusal) -> Refusal {
    if let Some(Ended(refusal)) = error.downcast_ref::<Ended>() {
        return refusal.clone();
    }
    if let Some(code) = error.as_trap_code() {
        return Refusal::Trap(trap(code));
    }
    match error.kind() {
        ErrorKind::Memory(_) | ErrorKind::Table(_) => Refusal::Trap(Trap::OutOfMemory),
        ErrorKind::Linker(error) => Refusal::Import(error.to_string()),
        ErrorKind::Instantiation(error @ InstantiationError::FuncTypeMismatch { .. }) => {
            Refusal::Import(error.to_string())
        }
        ErrorKind::Instantiation(InstantiationError::ElementSegmentDoesNotFit { .. }) => {
            Refusal::Trap(Trap::TableOutOfBounds)
        }
        ErrorKind::Instantiation(
            InstantiationError::FailedToInstantiateMemory(_)
            | InstantiationError::FailedToInstantiateTable(_),
        ) => Refusal::Trap(Trap::OutOfMemory),
        _ => otherwise(error.to_string()),
    }
}

fn config(limits: &Limits) -> Config {
    // The engine refuses a least stack that is larger than the largest.
    const LEAST: usize = 1 << 10;
    let mut config = Config::default();
    config
        .set_min_stack_height(LEAST)
        .set_max_stack_height(size(limits.stack).max(LEAST))
        .set_max_recursion_depth(size(limits.depth))
        .consume_fuel(limits.fuel.is_some())
        .ignore_custom_sections(true)
        // Whole at once, so that a snapshot has all of it and fuel is for running only.
        .compilation_mode(CompilationMode::Eager)
        .enforced_limits(EnforcedLimits::default());
    config
}

fn size(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// The functions that can be called from outside.
fn exports(module: &Module) -> Vec<Exported> {
    let functions = module.exports().filter_map(|export| match export.ty() {
        ExternType::Func(function) => Some(Exported {
            name: export.name().to_string(),
            parameters: kinds(function.params())?,
            results: kinds(function.results())?,
        }),
        _ => None,
    });
    functions.collect()
}

impl Loaded {
    /// Makes an instance of a module.
    pub(crate) fn new(bytes: &[u8], limits: Limits) -> Result<Self, Refusal> {
        /// Runs first, if there is one (WASI application ABI, reactors).
        const INITIALIZE: &str = "_initialize";
        let engine = Engine::new(&config(&limits));
        let module =
            Module::new(&engine, bytes).map_err(|error| refusal(&error, Refusal::Module))?;
        let linker = imports::link(&engine, &module)?;
        let store_limits = StoreLimitsBuilder::new()
            .memory_size(size(limits.memory))
            .table_elements(size(limits.table))
            .instances(1)
            .build();
        let mut store = Store::new(&engine, store_limits);
        store.limiter(|limits| limits);
        let fuel = limits.fuel;
        refuel(&mut store, fuel);
        let instance = instantiate(&linker, &mut store, &module)?;
        let mut loaded = Self {
            store,
            instance,
            exports: exports(&module),
            fuel,
            fuel_used: 0,
        };
        if loaded.function(INITIALIZE).is_ok() {
            loaded.call(INITIALIZE, &[])?;
        }
        Ok(loaded)
    }

    pub(crate) fn exports(&self) -> &[Exported] {
        &self.exports
    }

    fn function(&self, name: &str) -> Result<Func, Refusal> {
        let function = self.instance.get_func(&self.store, name);
        function.ok_or_else(|| Refusal::NoExport(name.to_string()))
    }

    /// Calls an exported function.
    pub(crate) fn call(&mut self, name: &str, arguments: &[Value]) -> Result<Vec<Value>, Refusal> {
        let function = self.function(name)?;
        let kind = function.ty(&self.store);
        check(&kind, arguments)?;
        let inputs: Vec<Val> = arguments.iter().map(to_engine).collect();
        let mut outputs: Vec<Val> = kind.results().iter().map(|_| Val::I32(0)).collect();
        refuel(&mut self.store, self.fuel);
        let ended = function.call(&mut self.store, &inputs, &mut outputs);
        let left = self.store.get_fuel().ok();
        self.fuel_used = match (self.fuel, left) {
            (Some(given), Some(left)) => given.saturating_sub(left),
            _ => 0,
        };
        ended.map_err(|error| refusal(&error, Refusal::Arguments))?;
        let values = outputs.iter().map(from_engine).collect::<Option<Vec<_>>>();
        values.ok_or_else(|| not_numbers(name))
    }

    pub(crate) fn fuel_used(&self) -> u64 {
        self.fuel_used
    }

    fn memory(&self) -> Result<Memory, Refusal> {
        let memory = self.instance.get_memory(&self.store, "memory");
        memory.ok_or(Refusal::NoMemory)
    }

    pub(crate) fn memory_size(&self) -> Result<u64, Refusal> {
        Ok(self.memory()?.data(&self.store).len() as u64)
    }

    pub(crate) fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, Refusal> {
        let data = self.memory()?.data(&self.store);
        let end = size(at).saturating_add(size(len));
        let bytes = data.get(size(at)..end).ok_or(Refusal::Range)?;
        Ok(bytes.to_vec())
    }

    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Refusal> {
        let data = self.memory()?.data_mut(&mut self.store);
        let end = size(at).saturating_add(bytes.len());
        let room = data.get_mut(size(at)..end).ok_or(Refusal::Range)?;
        room.copy_from_slice(bytes);
        Ok(())
    }
}

fn instantiate(
    linker: &Linker<StoreLimits>,
    store: &mut Store<StoreLimits>,
    module: &Module,
) -> Result<Instance, Refusal> {
    let instance = linker.instantiate_and_start(store, module);
    instance.map_err(|error| refusal(&error, Refusal::Module))
}

/// Fails only where fuel isn't counted.
fn refuel(store: &mut Store<StoreLimits>, fuel: Option<u64>) {
    if let Some(fuel) = fuel {
        let _ = store.set_fuel(fuel);
    }
}

fn not_numbers(name: &str) -> Refusal {
    Refusal::Arguments(alloc::format!("{name} passes references, not numbers"))
}

fn check(kind: &FuncType, arguments: &[Value]) -> Result<(), Refusal> {
    let given: Vec<Kind> = arguments.iter().map(Value::kind).collect();
    match kinds(kind.params()) {
        Some(wanted) if wanted == given => Ok(()),
        Some(wanted) => Err(Refusal::Arguments(alloc::format!(
            "it takes {wanted:?}, and was given {given:?}"
        ))),
        None => Err(not_numbers("it")),
    }
}
