//! Values of the engine and values that can be passed.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use rhai::{Blob, Dynamic, Map};
use skerry_sandbox_rt::abi::script::{DEPTH, Refusal, Value};

use crate::host::HostFailure;

/// A value for the engine.
pub(crate) fn to_engine(value: Value) -> Dynamic {
    match value {
        Value::Unit => Dynamic::UNIT,
        Value::Bool(value) => value.into(),
        Value::Int(value) => value.into(),
        Value::Float(value) => value.into(),
        Value::String(value) => value.into(),
        Value::Bytes(value) => Dynamic::from_blob(value),
        Value::Array(values) => Dynamic::from_array(values.into_iter().map(to_engine).collect()),
        Value::Map(values) => {
            let entries = values.into_iter();
            let entries = entries.map(|(key, value)| (key.into(), to_engine(value)));
            Dynamic::from_map(entries.collect())
        }
    }
}

/// A value of the engine's. Those that have no meaning outside of it can't be passed: functions, ranges.
pub(crate) fn from_engine(value: Dynamic) -> Result<Value, Refusal> {
    convert(value, DEPTH)
}

fn convert(value: Dynamic, room: usize) -> Result<Value, Refusal> {
    if value.is_shared() {
        return convert(value.flatten(), room);
    }
    if value.is_unit() {
        return Ok(Value::Unit);
    }
    if let Ok(value) = value.as_bool() {
        return Ok(Value::Bool(value));
    }
    if let Ok(value) = value.as_int() {
        return Ok(Value::Int(value));
    }
    if let Ok(value) = value.as_float() {
        return Ok(Value::Float(value));
    }
    if let Ok(value) = value.as_char() {
        return Ok(Value::String(value.into()));
    }
    if value.is_string() {
        return value.into_string().map(Value::String).map_err(unlike);
    }
    if value.is_blob() {
        return Ok(Value::Bytes(value.cast::<Blob>()));
    }
    let inside = || {
        let error = || {
            Refusal::Value(alloc::format!(
                "more than {DEPTH} arrays or maps in each other"
            ))
        };
        room.checked_sub(1).ok_or_else(error)
    };
    if value.is_array() {
        let room = inside()?;
        let values = value.into_array().map_err(unlike)?.into_iter();
        let values: Result<Vec<_>, _> = values.map(|value| convert(value, room)).collect();
        return values.map(Value::Array);
    }
    if value.is_map() {
        let room = inside()?;
        let entries = value.cast::<Map>().into_iter();
        let entries =
            entries.map(|(key, value)| Ok((String::from(key.as_str()), convert(value, room)?)));
        return entries.collect::<Result<_, _>>().map(Value::Map);
    }
    if value.is::<HostFailure>() {
        return Ok(Value::String(value.cast::<HostFailure>().to_string()));
    }
    Err(unlike(value.type_name()))
}

fn unlike(kind: &str) -> Refusal {
    Refusal::Value(alloc::format!("a value of the type {kind}"))
}
