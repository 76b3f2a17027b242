//! What the host and the script guest (`guest/sandbox-rt/guests/script`) say to each other: values whose
//! types are known only when they are passed, and why a script was refused or ended.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::codec::{DecodeError, Reader, Tag, Writer};
use crate::value::{Decode, Encode, decode_struct, encode_struct};

mod value;

pub use value::{ValueError, from_value, to_value};

/// A value of a script's. As `serde` sees it, it is what a script's author would write for it: a map for a
/// structure, `()` for nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Value {
    /// `()`: nothing.
    #[default]
    Unit,
    /// `true` or `false`.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A floating-point number.
    Float(f64),
    /// A string; a character is one of length 1.
    String(String),
    /// A blob.
    Bytes(Vec<u8>),
    /// An array.
    Array(Vec<Self>),
    /// An object map.
    Map(BTreeMap<String, Self>),
}

/// How deep arrays and maps that are passed may lie in each other.
pub const DEPTH: usize = 64;

impl Value {
    /// The name of its type.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unit => "()",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::String(_) => "string",
            Self::Bytes(_) => "bytes",
            Self::Array(_) => "array",
            Self::Map(_) => "map",
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unit => f.write_str("()"),
            Self::Bool(value) => value.fmt(f),
            Self::Int(value) => value.fmt(f),
            Self::Float(value) => fmt::Debug::fmt(value, f),
            Self::String(value) => value.fmt(f),
            Self::Bytes(value) => write!(f, "{value:?}"),
            Self::Array(values) => {
                f.write_str("[")?;
                for (n, value) in values.iter().enumerate() {
                    let comma = if n == 0 { "" } else { ", " };
                    write!(f, "{comma}{value}")?;
                }
                f.write_str("]")
            }
            Self::Map(values) => {
                f.write_str("#{")?;
                for (n, (key, value)) in values.iter().enumerate() {
                    let comma = if n == 0 { "" } else { ", " };
                    write!(f, "{comma}{key}: {value}")?;
                }
                f.write_str("}")
            }
        }
    }
}

/// What a script may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Operations of each call; not counted without.
    pub operations: Option<u64>,
    /// Calls that may be in one another.
    pub calls: u64,
    /// How deep expressions and blocks may lie in each other, at the top of a script and in its functions.
    pub nesting: u64,
    /// Bytes of a string.
    pub string: u64,
    /// Elements of an array, bytes of a blob.
    pub array: u64,
    /// Properties of a map.
    pub map: u64,
    /// Variables at once.
    pub variables: u64,
    /// Functions of a script.
    pub functions: u64,
}

impl Default for Limits {
    /// For scripts that nobody has looked at, on the stack and heap that they get unless told.
    fn default() -> Self {
        Self {
            operations: None,
            calls: 64,
            nesting: 64,
            string: 1 << 20,
            array: 100_000,
            map: 100_000,
            variables: 1000,
            functions: 1000,
        }
    }
}

/// A place in a script's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// From 1.
    pub line: u32,
    /// From 1, in characters.
    pub column: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

/// Which limit a script reached. It can't catch that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Limit {
    /// Operations of a call.
    Operations,
    /// Calls in one another.
    Calls,
    /// Expressions and blocks in each other.
    Nesting,
    /// The size of a string, an array, a blob or a map.
    Size,
    /// Variables at once.
    Variables,
    /// Functions.
    Functions,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Operations => "its operations are used up",
            Self::Calls => "its calls are too deep",
            Self::Nesting => "its expressions are too deep",
            Self::Size => "a string, array, blob or map is too large",
            Self::Variables => "it has too many variables",
            Self::Functions => "it has too many functions",
        })
    }
}

/// A function that a script defines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defined {
    /// Its name.
    pub name: String,
    /// Its parameters.
    pub parameters: Vec<String>,
}

/// Why there is no script, or no value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Refusal {
    /// The text is no script.
    Parse(String),
    /// None was loaded.
    NoScript,
    /// One was loaded before.
    Loaded,
    /// It defines no function of this name.
    NoFunction(String),
    /// It defines functions of this name, which take so many arguments.
    Arity {
        /// The function.
        name: String,
        /// What there are, by their number of parameters.
        takes: Vec<u32>,
        /// How many were given.
        given: u32,
    },
    /// It threw a value, and didn't catch it.
    Thrown(Value),
    /// It did what the language doesn't allow.
    Runtime(String),
    /// It reached a limit.
    Limit(Limit),
    /// It called a function that the host had granted when it was loaded, and doesn't now.
    NotGranted(String),
    /// A host function failed, or takes other arguments.
    Host {
        /// The host function.
        name: String,
        /// Its message.
        message: String,
    },
    /// A value that can't be passed: a function, a range; or too deep.
    Value(String),
}

/// A refusal, and where in the script; the functions that were being called, the innermost first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// Why.
    pub why: Refusal,
    /// Where, if it is known.
    pub position: Option<Position>,
    /// Functions of the script.
    pub calls: Vec<String>,
}

impl From<Refusal> for Ended {
    fn from(why: Refusal) -> Self {
        Self {
            why,
            position: None,
            calls: Vec::new(),
        }
    }
}

/// A function of the host's that a script may call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// Its name in scripts.
    pub name: String,
    /// How many arguments it takes.
    pub arity: u32,
}

crate::serde_value!(Limits, Defined, Ended, Granted);

/// Simple values as those of any function; arrays and maps as one CBOR item, with all that is in them.
impl Encode for Value {
    fn type_name(out: &mut String) {
        out.push_str("any");
    }
    fn encode(&self, out: &mut Writer<'_>) {
        match self {
            Self::Unit => ().encode(out),
            Self::Bool(value) => value.encode(out),
            Self::Int(value) => value.encode(out),
            Self::Float(value) => value.encode(out),
            Self::String(value) => value.encode(out),
            Self::Bytes(value) => value.encode(out),
            Self::Array(_) | Self::Map(_) => encode_struct(self, out),
        }
    }
}

impl Decode<'_> for Value {
    fn type_name(out: &mut String) {
        out.push_str("any");
    }
    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match from.peek()? {
            Tag::Unit => <()>::decode(from).map(|()| Self::Unit),
            Tag::Bool => Decode::decode(from).map(Self::Bool),
            Tag::I64 => Decode::decode(from).map(Self::Int),
            Tag::F64 => Decode::decode(from).map(Self::Float),
            Tag::String => Decode::decode(from).map(Self::String),
            Tag::Bytes => Decode::decode(from).map(Self::Bytes),
            Tag::Struct => decode_struct(from),
            _ => Err(from.unexpected("any")),
        }
    }
}

/// A value, or why there is none.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome<T>(pub Result<T, Ended>);

impl<T: Encode> Encode for Outcome<T> {
    fn type_name(out: &mut String) {
        T::type_name(out);
    }
    fn encode(&self, out: &mut Writer<'_>) {
        match &self.0 {
            Ok(value) => {
                out.tag(Tag::Some);
                value.encode(out);
            }
            Err(ended) => ended.encode(out),
        }
    }
}

impl<'a, T: Decode<'a>> Decode<'a> for Outcome<T> {
    fn type_name(out: &mut String) {
        T::type_name(out);
    }
    fn decode(from: &mut Reader<'a>) -> Result<Self, DecodeError> {
        if from.expect(Tag::Some).is_ok() {
            return Ok(Self(Ok(T::decode(from)?)));
        }
        Ended::decode(from).map(|ended| Self(Err(ended)))
    }
}

/// Names of the host functions.
pub mod host {
    /// `(String)`: what `print` prints, without the end of the line.
    pub const PRINT: &str = "script.print";
    /// `(String)`: what `debug` prints.
    pub const DEBUG: &str = "script.debug";
    /// In front of the names of functions that scripts call.
    pub const FUNCTION: &str = "script.fn.";
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn back<T: Encode + for<'a> Decode<'a>>(value: &T) -> T {
        let mut area = [0; 1024];
        let mut out = Writer::new(&mut area);
        value.encode(&mut out);
        let len = out.finish().expect("it fits");
        let mut from = Reader::new(&area[..len]);
        let value = T::decode(&mut from).expect("it decodes");
        from.end().expect("nothing is left");
        value
    }

    fn one_of_each() -> Value {
        let map = [("a".into(), Value::Int(1)), ("b".into(), Value::Unit)];
        Value::Array(vec![
            Value::Unit,
            Value::Bool(true),
            Value::Int(i64::MIN),
            Value::Int(i64::MAX),
            Value::Float(-0.5),
            Value::Float(f64::INFINITY),
            Value::String("ü\0".into()),
            Value::Bytes(vec![0, 255]),
            Value::Map(map.into()),
        ])
    }

    #[test]
    fn outcomes_come_back() {
        let good = Outcome(Ok(one_of_each()));
        assert_eq!(back(&good), good);
        for why in [
            Refusal::NoScript,
            Refusal::Thrown(one_of_each()),
            Refusal::Limit(Limit::Nesting),
            Refusal::Arity {
                name: "f".into(),
                takes: vec![0, 2],
                given: 1,
            },
        ] {
            let bad: Outcome<Value> = Outcome(Err(Ended {
                why,
                position: Some(Position { line: 1, column: 2 }),
                calls: vec!["f".into()],
            }));
            assert_eq!(back(&bad), bad);
        }
    }

    #[test]
    fn values_are_shown_as_scripts_write_them() {
        assert_eq!(
            alloc::format!("{}", one_of_each()),
            "[(), true, -9223372036854775808, 9223372036854775807, -0.5, inf, ü\0, [0, 255], \
             #{a: 1, b: ()}]"
        );
    }

    #[test]
    fn what_lies_too_deep_is_an_error() {
        // So many arrays of one element (RFC 8949 §3, major type 4), in one another.
        let mut bytes = vec![Tag::Struct as u8];
        let item = [&[0x81; 100_000][..], &[0xf6]].concat();
        bytes.extend_from_slice(&(item.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&item);
        assert!(Value::decode(&mut Reader::new(&bytes)).is_err());
    }
}
