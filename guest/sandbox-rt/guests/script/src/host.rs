//! Functions of the host's that a script calls.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::any::TypeId;
use core::fmt;

use rhai::{Dynamic, Engine, EvalAltResult, Position};
use skerry_sandbox_rt::abi::script::{Granted, Value, host as names};
use skerry_sandbox_rt::abi::{Decode, Encode};
use skerry_sandbox_rt::{HostError, call_by_name_with};

use crate::values::{from_engine, to_engine};

/// What is thrown where a host function fails. A script that catches it has its parts and its text.
#[derive(Clone, Debug)]
pub(crate) struct HostFailure {
    pub(crate) name: String,
    pub(crate) message: String,
    /// Whether there is no such function any more.
    pub(crate) missing: bool,
}

impl fmt::Display for HostFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.message)
    }
}

impl HostFailure {
    fn thrown(name: &str, error: &HostError) -> Box<EvalAltResult> {
        let failure = Self {
            name: name.to_string(),
            message: error.to_string(),
            missing: *error == HostError::NoFunction,
        };
        EvalAltResult::ErrorRuntime(Dynamic::from(failure), Position::NONE).into()
    }
}

/// Makes the functions known to the engine, which finds them by name and number of arguments.
pub(crate) fn register(engine: &mut Engine, granted: &[Granted]) {
    engine
        .register_type_with_name::<HostFailure>("HostError")
        .register_get("function", |failure: &mut HostFailure| failure.name.clone())
        .register_get("message", |failure: &mut HostFailure| {
            failure.message.clone()
        })
        .register_fn("to_string", |failure: &mut HostFailure| failure.to_string())
        .register_fn("to_debug", |failure: &mut HostFailure| failure.to_string());
    for Granted { name, arity } in granted {
        let full = alloc::format!("{}{name}", names::FUNCTION);
        let own = name.clone();
        let types = alloc::vec![TypeId::of::<Dynamic>(); *arity as usize];
        engine.register_raw_fn(
            name.as_str(),
            types,
            move |_, arguments: &mut [&mut Dynamic]| call(&own, &full, arguments),
        );
    }
    engine
        .on_print(|text| say(names::PRINT, text))
        .on_debug(|text, _, at| match at.line() {
            Some(line) => say(names::DEBUG, &alloc::format!("line {line}: {text}")),
            None => say(names::DEBUG, text),
        });
}

fn call(
    name: &str,
    full: &str,
    arguments: &mut [&mut Dynamic],
) -> Result<Dynamic, Box<EvalAltResult>> {
    let values = arguments.iter_mut().map(|value| from_engine(value.clone()));
    let values: Result<Vec<Value>, _> = values.collect();
    let values = values.map_err(|refusal| {
        let error = HostError::Failed(match refusal {
            skerry_sandbox_rt::abi::script::Refusal::Value(what) => {
                alloc::format!("it can't be passed {what}")
            }
            other => alloc::format!("{other:?}"),
        });
        HostFailure::thrown(name, &error)
    })?;
    let answer = call_by_name_with(full, |out| {
        out.put(&(values.len() as u32).to_le_bytes());
        for value in &values {
            value.encode(out);
        }
    });
    let value = answer.and_then(|mut from| {
        let value = Value::decode(&mut from)?;
        from.end()?;
        Ok(value)
    });
    value
        .map(to_engine)
        .map_err(|error| HostFailure::thrown(name, &error))
}

/// Passes a line on; to the log where the host has no function for it.
fn say(name: &str, text: &str) {
    let said = call_by_name_with(name, |out| {
        out.put(&1_u32.to_le_bytes());
        text.encode(out);
    });
    match said {
        Ok(_) => {}
        Err(HostError::NoFunction) if name == names::PRINT => log::info!("{text}"),
        Err(HostError::NoFunction) => log::debug!("{text}"),
        Err(error) => log::error!("{name}: {error}"),
    }
}
