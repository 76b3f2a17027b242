//! What the host and the guest for WebAssembly components (`guest/sandbox-rt/guests/component`) say to
//! each other, besides what [`crate::wasm`] has: types and values of the component model.
//!
//! A value that Rust has a type of its own for among those of [`crate::Encode`] is encoded as that one, so
//! that a host function which takes a `String` or a `Vec<u32>` gets it from a component as from any guest. The
//! others have kinds that no [`Tag`] has.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::codec::{DecodeError, Reader, Tag, Writer};
use crate::value::{Decode, Encode};

/// A type of the component model. Names of types are not kept, as two of one structure are one type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "those of WIT, by its names")]
pub enum Type {
    Bool,
    S8,
    U8,
    S16,
    U16,
    S32,
    U32,
    S64,
    U64,
    F32,
    F64,
    Char,
    String,
    List(Box<Self>),
    Record(Vec<(String, Self)>),
    Tuple(Vec<Self>),
    Variant(Vec<(String, Option<Self>)>),
    Enum(Vec<String>),
    Option(Box<Self>),
    Result(Option<Box<Self>>, Option<Box<Self>>),
    Flags(Vec<String>),
    /// What only the component knows the inside of; it can't be passed.
    Resource,
    /// One that can't be passed, by its name.
    Other(String),
}

/// Writes `each` of `items`, a comma between them.
fn commas<T>(
    f: &mut fmt::Formatter<'_>,
    items: &[T],
    mut each: impl FnMut(&mut fmt::Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    for (n, item) in items.iter().enumerate() {
        if n != 0 {
            f.write_str(", ")?;
        }
        each(f, item)?;
    }
    Ok(())
}

/// In the notation of WIT; records, variants, enums and flags, which have names there, with what they
/// are made of in braces.
impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let simple = match self {
            Self::Bool => "bool",
            Self::S8 => "s8",
            Self::U8 => "u8",
            Self::S16 => "s16",
            Self::U16 => "u16",
            Self::S32 => "s32",
            Self::U32 => "u32",
            Self::S64 => "s64",
            Self::U64 => "u64",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Char => "char",
            Self::String => "string",
            Self::Resource => "resource",
            Self::Other(name) => name,
            Self::List(item) => return write!(f, "list<{item}>"),
            Self::Option(item) => return write!(f, "option<{item}>"),
            Self::Result(None, None) => "result",
            Self::Result(Some(ok), None) => return write!(f, "result<{ok}>"),
            Self::Result(None, Some(err)) => return write!(f, "result<_, {err}>"),
            Self::Result(Some(ok), Some(err)) => return write!(f, "result<{ok}, {err}>"),
            Self::Tuple(items) => {
                f.write_str("tuple<")?;
                commas(f, items, |f, item| write!(f, "{item}"))?;
                return f.write_str(">");
            }
            Self::Record(fields) => {
                f.write_str("record { ")?;
                commas(f, fields, |f, (name, kind)| write!(f, "{name}: {kind}"))?;
                return f.write_str(" }");
            }
            Self::Variant(cases) => {
                f.write_str("variant { ")?;
                commas(f, cases, |f, (name, kind)| match kind {
                    Some(kind) => write!(f, "{name}({kind})"),
                    None => f.write_str(name),
                })?;
                return f.write_str(" }");
            }
            Self::Enum(names) => {
                f.write_str("enum { ")?;
                commas(f, names, |f, name| f.write_str(name))?;
                return f.write_str(" }");
            }
            Self::Flags(names) => {
                f.write_str("flags { ")?;
                commas(f, names, |f, name| f.write_str(name))?;
                return f.write_str(" }");
            }
        };
        f.write_str(simple)
    }
}

/// A function that a component exports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Func {
    /// Its name; `namespace:package/interface#name` if it is one of an interface.
    pub name: String,
    /// Names and types of its parameters.
    pub parameters: Vec<(String, Type)>,
    /// What it returns.
    pub result: Option<Type>,
}

impl fmt::Display for Func {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: func(", self.name)?;
        commas(f, &self.parameters, |f, (name, kind)| {
            write!(f, "{name}: {kind}")
        })?;
        f.write_str(")")?;
        match &self.result {
            Some(kind) => write!(f, " -> {kind}"),
            None => Ok(()),
        }
    }
}

/// A value of the component model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "those of WIT, by its names")]
pub enum Val {
    Bool(bool),
    S8(i8),
    U8(u8),
    S16(i16),
    U16(u16),
    S32(i32),
    U32(u32),
    S64(i64),
    U64(u64),
    F32(f32),
    F64(f64),
    Char(char),
    String(String),
    /// A `list<u8>`, as it comes from a component. To a component a list of `U8` may go as well.
    Bytes(Vec<u8>),
    List(Vec<Self>),
    /// Fields in their order.
    Record(Vec<(String, Self)>),
    Tuple(Vec<Self>),
    Variant(String, Option<Box<Self>>),
    Enum(String),
    Option(Option<Box<Self>>),
    Result(Result<Option<Box<Self>>, Option<Box<Self>>>),
    /// Those that are set.
    Flags(Vec<String>),
}

/// In WAVE, the notation of values that belongs to WIT.
impl fmt::Display for Val {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn payload(
            f: &mut fmt::Formatter<'_>,
            name: &str,
            value: &Option<Box<Val>>,
        ) -> fmt::Result {
            match value {
                Some(value) => write!(f, "{name}({value})"),
                None => f.write_str(name),
            }
        }
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::S8(value) => write!(f, "{value}"),
            Self::U8(value) => write!(f, "{value}"),
            Self::S16(value) => write!(f, "{value}"),
            Self::U16(value) => write!(f, "{value}"),
            Self::S32(value) => write!(f, "{value}"),
            Self::U32(value) => write!(f, "{value}"),
            Self::S64(value) => write!(f, "{value}"),
            Self::U64(value) => write!(f, "{value}"),
            Self::F32(value) if value.is_nan() => f.write_str("nan"),
            Self::F64(value) if value.is_nan() => f.write_str("nan"),
            Self::F32(value) => write!(f, "{value}"),
            Self::F64(value) => write!(f, "{value}"),
            Self::Char(value) => write!(f, "'{}'", value.escape_default()),
            Self::String(value) => {
                f.write_str("\"")?;
                for letter in value.chars() {
                    match letter {
                        '"' | '\\' => write!(f, "\\{letter}")?,
                        letter if letter.is_control() => write!(f, "{}", letter.escape_default())?,
                        letter => write!(f, "{letter}")?,
                    }
                }
                f.write_str("\"")
            }
            Self::Bytes(bytes) => {
                f.write_str("[")?;
                commas(f, bytes, |f, byte| write!(f, "{byte}"))?;
                f.write_str("]")
            }
            Self::List(values) => {
                f.write_str("[")?;
                commas(f, values, |f, value| write!(f, "{value}"))?;
                f.write_str("]")
            }
            Self::Tuple(values) => {
                f.write_str("(")?;
                commas(f, values, |f, value| write!(f, "{value}"))?;
                f.write_str(")")
            }
            Self::Record(fields) => {
                f.write_str("{")?;
                commas(f, fields, |f, (name, value)| write!(f, "{name}: {value}"))?;
                f.write_str("}")
            }
            Self::Flags(names) => {
                f.write_str("{")?;
                commas(f, names, |f, name| f.write_str(name))?;
                f.write_str("}")
            }
            Self::Enum(name) => f.write_str(name),
            Self::Variant(name, value) => payload(f, name, value),
            Self::Option(None) => f.write_str("none"),
            Self::Option(value) => payload(f, "some", value),
            Self::Result(Ok(value)) => payload(f, "ok", value),
            Self::Result(Err(value)) => payload(f, "err", value),
        }
    }
}

/// Kinds that no [`Tag`] has the number of: 32 and above.
mod kind {
    pub(super) const S8: u8 = 32;
    pub(super) const U8: u8 = 33;
    pub(super) const S16: u8 = 34;
    pub(super) const U16: u8 = 35;
    pub(super) const CHAR: u8 = 36;
    /// Count, then a name and a value each.
    pub(super) const RECORD: u8 = 37;
    /// Count, then the values.
    pub(super) const TUPLE: u8 = 38;
    /// A name, then an option.
    pub(super) const VARIANT: u8 = 39;
    /// A name.
    pub(super) const ENUM: u8 = 40;
    /// An option.
    pub(super) const OK: u8 = 41;
    /// An option.
    pub(super) const ERR: u8 = 42;
    /// Count, then the names.
    pub(super) const FLAGS: u8 = 43;
}

/// How deep values may lie in each other; types may lie 100 deep (the validator's limit).
const DEPTH: u32 = 128;

/// What a count, which may lie, is believed to make room for.
const BELIEVED: usize = 1024;

fn put_count(out: &mut Writer<'_>, kind: u8, count: usize) {
    out.put(&[kind]);
    // As with blocks: a count that is cut belongs to a value that fits no area.
    out.put(&(count as u32).to_le_bytes());
}

impl Encode for Val {
    fn type_name(out: &mut String) {
        out.push_str("Val");
    }

    fn encode(&self, out: &mut Writer<'_>) {
        match self {
            Self::Bool(value) => value.encode(out),
            Self::S8(value) => out.put(&[kind::S8, *value as u8]),
            Self::U8(value) => out.put(&[kind::U8, *value]),
            Self::S16(value) => {
                out.put(&[kind::S16]);
                out.put(&value.to_le_bytes());
            }
            Self::U16(value) => {
                out.put(&[kind::U16]);
                out.put(&value.to_le_bytes());
            }
            Self::S32(value) => value.encode(out),
            Self::U32(value) => value.encode(out),
            Self::S64(value) => value.encode(out),
            Self::U64(value) => value.encode(out),
            Self::F32(value) => value.encode(out),
            Self::F64(value) => value.encode(out),
            Self::Char(value) => {
                out.put(&[kind::CHAR]);
                out.put(&u32::from(*value).to_le_bytes());
            }
            Self::String(value) => value.encode(out),
            Self::Bytes(value) => value.encode(out),
            Self::List(values) => values.encode(out),
            Self::Option(value) => value.encode(out),
            Self::Record(fields) => {
                put_count(out, kind::RECORD, fields.len());
                for (name, value) in fields {
                    name.encode(out);
                    value.encode(out);
                }
            }
            Self::Tuple(values) => {
                put_count(out, kind::TUPLE, values.len());
                values.iter().for_each(|value| value.encode(out));
            }
            Self::Variant(name, value) => {
                out.put(&[kind::VARIANT]);
                name.encode(out);
                value.encode(out);
            }
            Self::Enum(name) => {
                out.put(&[kind::ENUM]);
                name.encode(out);
            }
            Self::Result(result) => {
                let (kind, value) = match result {
                    Ok(value) => (kind::OK, value),
                    Err(value) => (kind::ERR, value),
                };
                out.put(&[kind]);
                value.encode(out);
            }
            Self::Flags(names) => {
                put_count(out, kind::FLAGS, names.len());
                names.iter().for_each(|name| name.encode(out));
            }
        }
    }
}

impl Decode<'_> for Val {
    fn type_name(out: &mut String) {
        out.push_str("Val");
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::decode_at(from, 0)
    }
}

/// `count` of what `one` takes.
fn several<'a, T>(
    from: &mut Reader<'a>,
    count: usize,
    mut one: impl FnMut(&mut Reader<'a>) -> Result<T, DecodeError>,
) -> Result<Vec<T>, DecodeError> {
    let mut values = Vec::with_capacity(count.min(BELIEVED));
    for _ in 0..count {
        values.push(one(from)?);
    }
    Ok(values)
}

impl Val {
    fn decode_at(from: &mut Reader<'_>, depth: u32) -> Result<Self, DecodeError> {
        if depth == DEPTH {
            return Err(DecodeError::Malformed("values lie too deep in each other"));
        }
        let first = from.rest().first().copied();
        match first {
            Some(kind) if kind >= kind::S8 => {
                from.array::<1>()?;
                Self::decode_own(from, kind, depth + 1)
            }
            _ => Self::decode_tagged(from, depth + 1),
        }
    }

    fn decode_tagged(from: &mut Reader<'_>, depth: u32) -> Result<Self, DecodeError> {
        Ok(match from.peek()? {
            Tag::Bool => Self::Bool(Decode::decode(from)?),
            Tag::I32 => Self::S32(Decode::decode(from)?),
            Tag::U32 => Self::U32(Decode::decode(from)?),
            Tag::I64 => Self::S64(Decode::decode(from)?),
            Tag::U64 => Self::U64(Decode::decode(from)?),
            Tag::F32 => Self::F32(Decode::decode(from)?),
            Tag::F64 => Self::F64(Decode::decode(from)?),
            Tag::String => Self::String(Decode::decode(from)?),
            Tag::Bytes => Self::Bytes(Decode::decode(from)?),
            Tag::List => {
                let count = from.scalar(Tag::List).map(u32::from_le_bytes)?;
                Self::List(several(from, count as usize, |from| {
                    Self::decode_at(from, depth)
                })?)
            }
            Tag::None | Tag::Some => Self::Option(Self::decode_option(from, depth)?),
            Tag::Unit | Tag::Struct => return Err(from.unexpected("Val")),
        })
    }

    fn decode_option(from: &mut Reader<'_>, depth: u32) -> Result<Option<Box<Self>>, DecodeError> {
        if from.expect(Tag::None).is_ok() {
            return Ok(None);
        }
        from.expect(Tag::Some)?;
        Ok(Some(Box::new(Self::decode_at(from, depth)?)))
    }

    fn decode_own(from: &mut Reader<'_>, kind: u8, depth: u32) -> Result<Self, DecodeError> {
        Ok(match kind {
            kind::S8 => Self::S8(i8::from_le_bytes(from.array()?)),
            kind::U8 => Self::U8(u8::from_le_bytes(from.array()?)),
            kind::S16 => Self::S16(i16::from_le_bytes(from.array()?)),
            kind::U16 => Self::U16(u16::from_le_bytes(from.array()?)),
            kind::CHAR => {
                let value = char::from_u32(from.u32()?);
                Self::Char(value.ok_or(DecodeError::Malformed("a char that is none"))?)
            }
            kind::RECORD => {
                let count = from.u32()? as usize;
                let field = |from: &mut Reader<'_>| {
                    Ok((String::decode(from)?, Self::decode_at(from, depth)?))
                };
                Self::Record(several(from, count, field)?)
            }
            kind::TUPLE => {
                let count = from.u32()? as usize;
                Self::Tuple(several(from, count, |from| Self::decode_at(from, depth))?)
            }
            kind::VARIANT => {
                let name = String::decode(from)?;
                Self::Variant(name, Self::decode_option(from, depth)?)
            }
            kind::ENUM => Self::Enum(Decode::decode(from)?),
            kind::OK => Self::Result(Ok(Self::decode_option(from, depth)?)),
            kind::ERR => Self::Result(Err(Self::decode_option(from, depth)?)),
            kind::FLAGS => {
                let count = from.u32()? as usize;
                Self::Flags(several(from, count, String::decode)?)
            }
            _ => return Err(DecodeError::Malformed("unknown kind of value")),
        })
    }
}

/// What a component may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes that its memories may grow to together.
    pub memory: u64,
    /// Elements that each of its tables may grow to.
    pub table: u64,
    /// Bytes of its own stack.
    pub stack: u64,
    /// Units of work of each call; not counted without.
    pub fuel: Option<u64>,
}

crate::serde_value!(Limits, Func);

/// The program interface of WASI 0.2, whose versions 0.2.x are one.
pub const RUN: &str = "wasi:cli/run@0.2";

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec;

    fn encoded(value: &Val) -> Vec<u8> {
        let mut area = vec![0; 4096];
        let mut out = Writer::new(&mut area);
        value.encode(&mut out);
        let len = out.finish().expect("it fits");
        area.truncate(len);
        area
    }

    fn every_kind() -> Vec<Val> {
        vec![
            Val::Bool(true),
            Val::S8(i8::MIN),
            Val::U8(u8::MAX),
            Val::S16(i16::MIN),
            Val::U16(u16::MAX),
            Val::S32(i32::MIN),
            Val::U32(u32::MAX),
            Val::S64(i64::MIN),
            Val::U64(u64::MAX),
            Val::F32(-0.5),
            Val::F64(f64::INFINITY),
            Val::Char('\u{10ffff}'),
            Val::String("é".into()),
            Val::Bytes(vec![0, 255]),
            Val::List(vec![Val::U16(1), Val::U16(2)]),
            Val::Record(vec![("a-b".into(), Val::U8(1))]),
            Val::Tuple(vec![]),
            Val::Variant("none".into(), None),
            Val::Variant("some".into(), Some(Box::new(Val::Char('x')))),
            Val::Enum("red".into()),
            Val::Option(None),
            Val::Option(Some(Box::new(Val::Option(None)))),
            Val::Result(Ok(None)),
            Val::Result(Err(Some(Box::new(Val::String("no".into()))))),
            Val::Flags(vec!["r".into(), "w".into()]),
        ]
    }

    #[test]
    fn values_of_every_kind_come_back() {
        let all = Val::List(every_kind());
        let bytes = encoded(&all);
        let mut from = Reader::new(&bytes);
        assert_eq!(Val::decode(&mut from), Ok(all));
        from.end().expect("nothing is left");
    }

    #[test]
    fn bytes_that_are_cut_or_lie_are_errors() {
        for value in every_kind() {
            let bytes = encoded(&value);
            for len in 0..bytes.len() {
                assert!(Val::decode(&mut Reader::new(&bytes[..len])).is_err());
            }
        }
        let mut deep = [Tag::Some as u8; 1000].to_vec();
        deep.push(Tag::None as u8);
        assert!(Val::decode(&mut Reader::new(&deep)).is_err());
        let lies = [kind::TUPLE, 255, 255, 255, 255];
        assert!(Val::decode(&mut Reader::new(&lies)).is_err());
        assert!(Val::decode(&mut Reader::new(&[kind::CHAR, 0, 0xd8, 0, 0])).is_err());
        assert!(Val::decode(&mut Reader::new(&[200])).is_err());
    }

    #[test]
    fn what_rust_has_a_type_for_is_encoded_as_it() {
        let bytes = encoded(&Val::List(vec![Val::U32(1), Val::U32(2)]));
        assert_eq!(<Vec<u32>>::decode(&mut Reader::new(&bytes)), Ok(vec![1, 2]));
        let bytes = encoded(&Val::Option(Some(Box::new(Val::String("x".into())))));
        let value = <Option<String>>::decode(&mut Reader::new(&bytes));
        assert_eq!(value, Ok(Some("x".into())));
    }

    #[test]
    fn functions_are_told_as_wit_has_them() {
        let func = Func {
            name: "a:b/c#d".into(),
            parameters: vec![
                ("x".into(), Type::List(Box::new(Type::U8))),
                (
                    "y".into(),
                    Type::Record(vec![("n".into(), Type::Option(Box::new(Type::Char)))]),
                ),
            ],
            result: Some(Type::Result(None, Some(Box::new(Type::String)))),
        };
        assert_eq!(
            func.to_string(),
            "a:b/c#d: func(x: list<u8>, y: record { n: option<char> }) -> result<_, string>"
        );
    }
}
