//! Values whose types are known only when they are there: for command lines and interpreters.

use serde_json::Value as Json;
use skerry_sandbox_abi::{
    Decode, DecodeError, Encode, Function, Reader, Tag, Writer, decode_struct, encode_struct,
};
use thiserror::Error;

use crate::error::CallError;
use crate::sandbox::Sandbox;

/// How deep lists and options may lie in each other.
const DEPTH: u32 = 32;

/// Any value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `()`.
    Unit,
    /// `bool`.
    Bool(bool),
    /// `i32`.
    I32(i32),
    /// `u32`.
    U32(u32),
    /// `i64`.
    I64(i64),
    /// `u64`.
    U64(u64),
    /// `f32`.
    F32(f32),
    /// `f64`.
    F64(f64),
    /// `String`.
    String(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// `Vec` of values.
    List(Vec<Self>),
    /// `Option` of a value.
    Option(Option<Box<Self>>),
    /// A structure, as JSON.
    Struct(Json),
}

/// A text or JSON is no value of the type that is wanted.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{text:?} is no {wanted}")]
pub struct NotAValue {
    /// What was given.
    pub text: String,
    /// The type.
    pub wanted: String,
}

impl Encode for Value {
    fn type_name(out: &mut String) {
        out.push_str("any");
    }

    fn encode(&self, out: &mut Writer<'_>) {
        match self {
            Self::Unit => ().encode(out),
            Self::Bool(value) => value.encode(out),
            Self::I32(value) => value.encode(out),
            Self::U32(value) => value.encode(out),
            Self::I64(value) => value.encode(out),
            Self::U64(value) => value.encode(out),
            Self::F32(value) => value.encode(out),
            Self::F64(value) => value.encode(out),
            Self::String(value) => value.encode(out),
            Self::Bytes(value) => value.encode(out),
            Self::List(values) => values.encode(out),
            Self::Option(value) => value.encode(out),
            Self::Struct(value) => encode_struct(value, out),
        }
    }
}

impl Decode<'_> for Value {
    fn type_name(out: &mut String) {
        out.push_str("any");
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::decode_at(from, 0)
    }
}

impl Value {
    fn decode_at(from: &mut Reader<'_>, depth: u32) -> Result<Self, DecodeError> {
        if depth == DEPTH {
            return Err(DecodeError::Malformed("values lie too deep in each other"));
        }
        Ok(match from.peek()? {
            Tag::Unit => <()>::decode(from).map(|()| Self::Unit)?,
            Tag::Bool => Self::Bool(Decode::decode(from)?),
            Tag::I32 => Self::I32(Decode::decode(from)?),
            Tag::U32 => Self::U32(Decode::decode(from)?),
            Tag::I64 => Self::I64(Decode::decode(from)?),
            Tag::U64 => Self::U64(Decode::decode(from)?),
            Tag::F32 => Self::F32(Decode::decode(from)?),
            Tag::F64 => Self::F64(Decode::decode(from)?),
            Tag::String => Self::String(Decode::decode(from)?),
            Tag::Bytes => Self::Bytes(Decode::decode(from)?),
            Tag::List => {
                let count = from.scalar(Tag::List).map(u32::from_le_bytes)? as usize;
                let mut values = Vec::with_capacity(count.min(from.rest().len()));
                for _ in 0..count {
                    values.push(Self::decode_at(from, depth + 1)?);
                }
                Self::List(values)
            }
            Tag::None => {
                from.expect(Tag::None)?;
                Self::Option(None)
            }
            Tag::Some => {
                from.expect(Tag::Some)?;
                Self::Option(Some(Box::new(Self::decode_at(from, depth + 1)?)))
            }
            Tag::Struct => Self::Struct(decode_struct(from)?),
        })
    }

    /// A value of the type `wanted`, as signatures name it, from a word of a command line. Lists, options
    /// and structures are JSON; `bytes` are the word's own.
    pub fn parse(text: &str, wanted: &str) -> Result<Self, NotAValue> {
        let not = || NotAValue {
            text: text.to_owned(),
            wanted: wanted.to_owned(),
        };
        fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
            text.parse().ok()
        }
        let value = match wanted {
            "()" => text.is_empty().then_some(Self::Unit),
            "bool" => number(text).map(Self::Bool),
            "i32" => number(text).map(Self::I32),
            "u32" => number(text).map(Self::U32),
            "i64" => number(text).map(Self::I64),
            "u64" => number(text).map(Self::U64),
            "f32" => number(text).map(Self::F32),
            "f64" => number(text).map(Self::F64),
            "String" => Some(Self::String(text.to_owned())),
            "bytes" => Some(Self::Bytes(text.as_bytes().to_vec())),
            _ => {
                let json = serde_json::from_str(text).map_err(|_| not())?;
                return Self::from_json(&json, wanted);
            }
        };
        value.ok_or_else(not)
    }

    /// A value of the type `wanted` from JSON; bytes are an array of numbers.
    pub fn from_json(json: &Json, wanted: &str) -> Result<Self, NotAValue> {
        let value = match wanted {
            "()" => json.is_null().then_some(Self::Unit),
            "bool" => json.as_bool().map(Self::Bool),
            "i32" => small(json.as_i64()).map(Self::I32),
            "u32" => small(json.as_u64()).map(Self::U32),
            "i64" => json.as_i64().map(Self::I64),
            "u64" => json.as_u64().map(Self::U64),
            "f32" => json.as_f64().map(|value| Self::F32(value as f32)),
            "f64" => json.as_f64().map(Self::F64),
            "String" => json.as_str().map(|text| Self::String(text.to_owned())),
            "bytes" => serde_json::from_value(json.clone()).ok().map(Self::Bytes),
            _ => {
                if let Some(inner) = inside(wanted, "Vec<") {
                    let values = json.as_array().map(|values| {
                        let values = values.iter().map(|value| Self::from_json(value, inner));
                        values.collect::<Result<_, _>>()
                    });
                    values.transpose()?.map(Self::List)
                } else if let Some(inner) = inside(wanted, "Option<") {
                    Some(Self::Option(match json {
                        Json::Null => None,
                        json => Some(Box::new(Self::from_json(json, inner)?)),
                    }))
                } else {
                    Some(Self::Struct(json.clone()))
                }
            }
        };
        value.ok_or_else(|| NotAValue {
            text: json.to_string(),
            wanted: wanted.to_owned(),
        })
    }

    /// As JSON. Numbers that JSON doesn't have (NaN, infinities) are their names.
    pub fn to_json(&self) -> Json {
        let float = |value: f64| match value.is_finite() {
            true => Json::from(value),
            false => Json::from(value.to_string()),
        };
        match self {
            Self::Unit => Json::Null,
            Self::Bool(value) => (*value).into(),
            Self::I32(value) => (*value).into(),
            Self::U32(value) => (*value).into(),
            Self::I64(value) => (*value).into(),
            Self::U64(value) => (*value).into(),
            Self::F32(value) => float((*value).into()),
            Self::F64(value) => float(*value),
            Self::String(value) => value.as_str().into(),
            Self::Bytes(value) => value.as_slice().into(),
            Self::List(values) => values.iter().map(Self::to_json).collect(),
            Self::Option(None) => Json::Null,
            Self::Option(Some(value)) => value.to_json(),
            Self::Struct(value) => value.clone(),
        }
    }
}

fn small<T: TryInto<U>, U>(number: Option<T>) -> Option<U> {
    number?.try_into().ok()
}

/// The parameter of a generic type.
fn inside<'a>(wanted: &'a str, before: &str) -> Option<&'a str> {
    wanted.strip_prefix(before)?.strip_suffix('>')
}

impl Sandbox {
    /// The signature of a function of the guest's.
    pub fn function(&self, name: &str) -> Option<&Function> {
        let exports = &self.exports.description.exports;
        exports
            .iter()
            .find(|function| !name.is_empty() && function.name == name)
    }

    /// Calls a function with values whose types are known only now.
    pub fn call_dynamic(&mut self, name: &str, arguments: &[Value]) -> Result<Value, CallError> {
        self.call_with(
            name,
            |out| {
                out.put(&(arguments.len() as u32).to_le_bytes());
                for argument in arguments {
                    argument.encode(out);
                }
            },
            |from| {
                let value = Value::decode(from)?;
                from.end()?;
                Ok(value)
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round(value: &Value) -> Value {
        let mut area = vec![0; 1 << 16];
        let mut out = Writer::new(&mut area);
        value.encode(&mut out);
        let len = out.finish().unwrap();
        let mut from = Reader::new(&area[..len]);
        let back = Value::decode(&mut from).unwrap();
        from.end().unwrap();
        back
    }

    #[test]
    fn words_become_values_of_their_types() {
        let parse = |text, kind| Value::parse(text, kind).unwrap();
        assert_eq!(parse("-5", "i32"), Value::I32(-5));
        assert_eq!(parse("18446744073709551615", "u64"), Value::U64(u64::MAX));
        assert_eq!(parse("5", "String"), Value::String("5".into()));
        assert_eq!(parse("ab", "bytes"), Value::Bytes(b"ab".to_vec()));
        assert_eq!(
            parse("[[1],[]]", "Vec<Vec<i32>>"),
            Value::List(vec![Value::List(vec![Value::I32(1)]), Value::List(vec![])])
        );
        assert_eq!(parse("null", "Option<i64>"), Value::Option(None));
        assert_eq!(
            parse(r#"{"a":1}"#, "Order"),
            Value::Struct(serde_json::json!({"a": 1}))
        );
        for (text, kind) in [
            ("x", "i32"),
            ("-1", "u32"),
            ("{", "Order"),
            ("[1.5]", "Vec<i32>"),
        ] {
            assert!(Value::parse(text, kind).is_err(), "{text} {kind}");
        }
        let error = Value::parse("4294967296", "u32").unwrap_err();
        assert_eq!(error.to_string(), "\"4294967296\" is no u32");
    }

    #[test]
    fn structures_pass_as_json() {
        let json = serde_json::json!({"a": [1, -2, 1.5, "x", null, true], "b": {"c": {}}});
        assert_eq!(round(&Value::Struct(json.clone())), Value::Struct(json));
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Unit),
            any::<bool>().prop_map(Value::Bool),
            any::<i32>().prop_map(Value::I32),
            any::<u32>().prop_map(Value::U32),
            any::<i64>().prop_map(Value::I64),
            any::<u64>().prop_map(Value::U64),
            any::<i16>().prop_map(|n| Value::F64(n.into())),
            ".{0,20}".prop_map(Value::String),
            prop::collection::vec(any::<u8>(), 0..40).prop_map(Value::Bytes),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::List),
                inner.prop_map(|value| Value::Option(Some(Box::new(value)))),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(value in any_value()) {
            prop_assert_eq!(round(&value), value);
        }

        #[test]
        fn any_bytes_are_a_value_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Value::decode(&mut Reader::new(&bytes));
            let _ = Vec::<String>::decode(&mut Reader::new(&bytes));
            let _ = skerry_sandbox_abi::Description::read(&mut Reader::new(&bytes));
        }

        #[test]
        fn tags_and_lengths_that_lie_are_errors(
            tags in prop::collection::vec(0_u8..16, 1..60),
            len in any::<u32>(),
        ) {
            let mut bytes = Vec::new();
            for tag in tags {
                bytes.push(tag);
                bytes.extend_from_slice(&len.to_le_bytes());
            }
            let _ = Value::decode(&mut Reader::new(&bytes));
        }
    }
}
