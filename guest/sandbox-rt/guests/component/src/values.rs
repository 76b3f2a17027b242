//! Types and values of the engine's as the host has them.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use skerry_sandbox_rt::abi::component::{Func, Type, Val};
use wasmtime::component::types::{self, ComponentFunc};
use wasmtime::component::{Type as EngineType, Val as EngineVal};

/// A type for the host.
pub(crate) fn kind(kind: &EngineType) -> Type {
    let boxed = |inner: EngineType| Box::new(self::kind(&inner));
    let names = |names: &mut dyn Iterator<Item = &str>| names.map(String::from).collect();
    match kind {
        EngineType::Bool => Type::Bool,
        EngineType::S8 => Type::S8,
        EngineType::U8 => Type::U8,
        EngineType::S16 => Type::S16,
        EngineType::U16 => Type::U16,
        EngineType::S32 => Type::S32,
        EngineType::U32 => Type::U32,
        EngineType::S64 => Type::S64,
        EngineType::U64 => Type::U64,
        EngineType::Float32 => Type::F32,
        EngineType::Float64 => Type::F64,
        EngineType::Char => Type::Char,
        EngineType::String => Type::String,
        EngineType::List(list) => Type::List(boxed(list.ty())),
        EngineType::Option(option) => Type::Option(boxed(option.ty())),
        EngineType::Result(result) => Type::Result(result.ok().map(boxed), result.err().map(boxed)),
        EngineType::Tuple(tuple) => {
            Type::Tuple(tuple.types().map(|item| self::kind(&item)).collect())
        }
        EngineType::Record(record) => {
            let field = |field: types::Field<'_>| (field.name.to_string(), self::kind(&field.ty));
            Type::Record(record.fields().map(field).collect())
        }
        EngineType::Variant(variant) => {
            let case = |case: types::Case<'_>| {
                let inner = case.ty.map(|inner| self::kind(&inner));
                (case.name.to_string(), inner)
            };
            Type::Variant(variant.cases().map(case).collect())
        }
        EngineType::Enum(of) => Type::Enum(names(&mut of.names())),
        EngineType::Flags(of) => Type::Flags(names(&mut of.names())),
        EngineType::Own(_) | EngineType::Borrow(_) => Type::Resource,
        EngineType::Map(_) => Type::Other("map".into()),
        EngineType::Future(_) => Type::Other("future".into()),
        EngineType::Stream(_) => Type::Other("stream".into()),
        EngineType::ErrorContext => Type::Other("error-context".into()),
        EngineType::FixedLengthList(_) => Type::Other("fixed-length list".into()),
    }
}

/// A function's type for the host.
pub(crate) fn func(name: String, func: &ComponentFunc) -> Func {
    let parameter = |(name, kind): (&str, EngineType)| (name.to_string(), self::kind(&kind));
    Func {
        name,
        parameters: func.params().map(parameter).collect(),
        result: func.results().next().map(|kind| self::kind(&kind)),
    }
}

/// A value is none of the type that is wanted, or of one that can't be passed.
#[derive(Debug)]
pub(crate) struct Mismatch;

fn engine_payload(
    kind: Option<EngineType>,
    value: Option<Box<Val>>,
) -> Result<Option<Box<EngineVal>>, Mismatch> {
    match (kind, value) {
        (Some(kind), Some(value)) => Ok(Some(Box::new(to_engine(&kind, *value)?))),
        (None, None) => Ok(None),
        _ => Err(Mismatch),
    }
}

/// A value for the engine, if it is one of type `kind`.
pub(crate) fn to_engine(kind: &EngineType, value: Val) -> Result<EngineVal, Mismatch> {
    Ok(match (kind, value) {
        (EngineType::Bool, Val::Bool(value)) => EngineVal::Bool(value),
        (EngineType::S8, Val::S8(value)) => EngineVal::S8(value),
        (EngineType::U8, Val::U8(value)) => EngineVal::U8(value),
        (EngineType::S16, Val::S16(value)) => EngineVal::S16(value),
        (EngineType::U16, Val::U16(value)) => EngineVal::U16(value),
        (EngineType::S32, Val::S32(value)) => EngineVal::S32(value),
        (EngineType::U32, Val::U32(value)) => EngineVal::U32(value),
        (EngineType::S64, Val::S64(value)) => EngineVal::S64(value),
        (EngineType::U64, Val::U64(value)) => EngineVal::U64(value),
        (EngineType::Float32, Val::F32(value)) => EngineVal::Float32(value),
        (EngineType::Float64, Val::F64(value)) => EngineVal::Float64(value),
        (EngineType::Char, Val::Char(value)) => EngineVal::Char(value),
        (EngineType::String, Val::String(value)) => EngineVal::String(value),
        (EngineType::List(list), Val::Bytes(bytes)) if list.ty() == EngineType::U8 => {
            EngineVal::List(bytes.into_iter().map(EngineVal::U8).collect())
        }
        (EngineType::List(list), Val::List(values)) => {
            let item = list.ty();
            let values = values.into_iter().map(|value| to_engine(&item, value));
            EngineVal::List(values.collect::<Result<_, _>>()?)
        }
        (EngineType::Option(option), Val::Option(value)) => {
            let kind = value.is_some().then(|| option.ty());
            EngineVal::Option(engine_payload(kind, value)?)
        }
        (EngineType::Result(result), Val::Result(value)) => EngineVal::Result(match value {
            Ok(value) => Ok(engine_payload(result.ok(), value)?),
            Err(value) => Err(engine_payload(result.err(), value)?),
        }),
        (kind, value) => return named_to_engine(kind, value),
    })
}

/// Values of types that are made of named or numbered parts.
fn named_to_engine(kind: &EngineType, value: Val) -> Result<EngineVal, Mismatch> {
    Ok(match (kind, value) {
        (EngineType::Tuple(tuple), Val::Tuple(values)) if tuple.types().len() == values.len() => {
            let each = tuple.types().zip(values);
            let each = each.map(|(kind, value)| to_engine(&kind, value));
            EngineVal::Tuple(each.collect::<Result<_, _>>()?)
        }
        (EngineType::Record(record), Val::Record(mut given))
            if record.fields().len() == given.len() =>
        {
            let fields = record.fields().map(|field| {
                // Most often in order: then the first is the one.
                let at = given.iter().position(|(name, _)| name == field.name);
                let (name, value) = given.remove(at.ok_or(Mismatch)?);
                Ok((name, to_engine(&field.ty, value)?))
            });
            EngineVal::Record(fields.collect::<Result<_, _>>()?)
        }
        (EngineType::Variant(variant), Val::Variant(name, value)) => {
            let case = variant.cases().find(|case| case.name == name);
            let value = engine_payload(case.ok_or(Mismatch)?.ty, value)?;
            EngineVal::Variant(name, value)
        }
        (EngineType::Enum(of), Val::Enum(name)) if of.names().any(|one| one == name) => {
            EngineVal::Enum(name)
        }
        (EngineType::Flags(of), Val::Flags(names))
            if names.iter().all(|name| of.names().any(|one| one == name)) =>
        {
            EngineVal::Flags(names)
        }
        _ => return Err(Mismatch),
    })
}

fn payload(
    kind: Option<EngineType>,
    value: Option<Box<EngineVal>>,
) -> Result<Option<Box<Val>>, Mismatch> {
    match (kind, value) {
        (Some(kind), Some(value)) => Ok(Some(Box::new(from_engine(&kind, *value)?))),
        (None, None) => Ok(None),
        _ => Err(Mismatch),
    }
}

/// A value of the engine's, which has type `kind`: only that tells an empty list of bytes from another.
pub(crate) fn from_engine(kind: &EngineType, value: EngineVal) -> Result<Val, Mismatch> {
    Ok(match (kind, value) {
        (_, EngineVal::Bool(value)) => Val::Bool(value),
        (_, EngineVal::S8(value)) => Val::S8(value),
        (_, EngineVal::U8(value)) => Val::U8(value),
        (_, EngineVal::S16(value)) => Val::S16(value),
        (_, EngineVal::U16(value)) => Val::U16(value),
        (_, EngineVal::S32(value)) => Val::S32(value),
        (_, EngineVal::U32(value)) => Val::U32(value),
        (_, EngineVal::S64(value)) => Val::S64(value),
        (_, EngineVal::U64(value)) => Val::U64(value),
        (_, EngineVal::Float32(value)) => Val::F32(value),
        (_, EngineVal::Float64(value)) => Val::F64(value),
        (_, EngineVal::Char(value)) => Val::Char(value),
        (_, EngineVal::String(value)) => Val::String(value),
        (_, EngineVal::Enum(name)) => Val::Enum(name),
        (_, EngineVal::Flags(names)) => Val::Flags(names),
        (EngineType::List(list), EngineVal::List(values)) => match list.ty() {
            EngineType::U8 => Val::Bytes(bytes(&values)?),
            item => {
                let values = values.into_iter().map(|value| from_engine(&item, value));
                Val::List(values.collect::<Result<_, _>>()?)
            }
        },
        (EngineType::Option(option), EngineVal::Option(value)) => {
            let kind = value.is_some().then(|| option.ty());
            Val::Option(payload(kind, value)?)
        }
        (EngineType::Result(result), EngineVal::Result(value)) => Val::Result(match value {
            Ok(value) => Ok(payload(result.ok(), value)?),
            Err(value) => Err(payload(result.err(), value)?),
        }),
        (EngineType::Tuple(tuple), EngineVal::Tuple(values)) => {
            let each = tuple.types().zip(values);
            let each = each.map(|(kind, value)| from_engine(&kind, value));
            Val::Tuple(each.collect::<Result<_, _>>()?)
        }
        (EngineType::Record(record), EngineVal::Record(values)) => {
            let each = record.fields().zip(values);
            let each =
                each.map(|(field, (name, value))| Ok((name, from_engine(&field.ty, value)?)));
            Val::Record(each.collect::<Result<_, _>>()?)
        }
        (EngineType::Variant(variant), EngineVal::Variant(name, value)) => {
            let case = variant.cases().find(|case| case.name == name);
            let value = payload(case.ok_or(Mismatch)?.ty, value)?;
            Val::Variant(name, value)
        }
        _ => return Err(Mismatch),
    })
}

fn bytes(values: &[EngineVal]) -> Result<Vec<u8>, Mismatch> {
    let byte = |value: &EngineVal| match value {
        EngineVal::U8(byte) => Ok(*byte),
        _ => Err(Mismatch),
    };
    values.iter().map(byte).collect()
}
