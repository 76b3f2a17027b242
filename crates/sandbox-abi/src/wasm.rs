//! What the host and the WebAssembly guest (`guest/sandbox-rt/guests/wasm`) say to each other: values
//! whose types are known only when they are passed, and why a module was refused or ended.

use alloc::string::String;
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::codec::{DecodeError, Reader, Tag, Writer};
use crate::value::{Decode, Encode};

/// A type of WebAssembly's that can be passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// 32-bit integer, signed or not.
    I32,
    /// 64-bit integer, signed or not.
    I64,
    /// 32-bit floating point.
    F32,
    /// 64-bit floating point.
    F64,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::F32 => "f32",
            Self::F64 => "f64",
        })
    }
}

/// A value with its type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// 32-bit integer.
    I32(i32),
    /// 64-bit integer.
    I64(i64),
    /// 32-bit floating point.
    F32(f32),
    /// 64-bit floating point.
    F64(f64),
}

impl Value {
    /// Its type.
    pub fn kind(&self) -> Kind {
        match self {
            Self::I32(_) => Kind::I32,
            Self::I64(_) => Kind::I64,
            Self::F32(_) => Kind::F32,
            Self::F64(_) => Kind::F64,
        }
    }
}

impl Encode for Value {
    fn type_name(out: &mut String) {
        out.push_str("Value");
    }
    fn encode(&self, out: &mut Writer<'_>) {
        match self {
            Self::I32(value) => value.encode(out),
            Self::I64(value) => value.encode(out),
            Self::F32(value) => value.encode(out),
            Self::F64(value) => value.encode(out),
        }
    }
}

impl Decode<'_> for Value {
    fn type_name(out: &mut String) {
        out.push_str("Value");
    }
    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match from.peek()? {
            Tag::I32 => Decode::decode(from).map(Self::I32),
            Tag::I64 => Decode::decode(from).map(Self::I64),
            Tag::F32 => Decode::decode(from).map(Self::F32),
            Tag::F64 => Decode::decode(from).map(Self::F64),
            _ => Err(from.unexpected("Value")),
        }
    }
}

/// What a module may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes that each of its linear memories may grow to.
    pub memory: u64,
    /// Elements that each of its tables may grow to.
    pub table: u64,
    /// Bytes of its own stack of values.
    pub stack: u64,
    /// Calls that may be in one another.
    pub depth: u64,
    /// Units of work of each call; not counted without.
    pub fuel: Option<u64>,
}

/// A function that a module exports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    /// Its name.
    pub name: String,
    /// The types of its parameters.
    pub parameters: alloc::vec::Vec<Kind>,
    /// The types of its results.
    pub results: alloc::vec::Vec<Kind>,
}

/// Why a module's own instruction ended the call (WebAssembly core specification §4.4, "trap").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Trap {
    /// `unreachable`: what a panic becomes.
    Unreachable,
    /// An address outside of its memory.
    MemoryOutOfBounds,
    /// An index outside of its table.
    TableOutOfBounds,
    /// A call through an empty element of a table.
    NullCall,
    /// A call through a table of a function of another type.
    BadSignature,
    /// A division of an integer by zero.
    DivisionByZero,
    /// The lowest integer divided by -1, or a number that fits no integer.
    IntegerOverflow,
    /// Not-a-number as an integer.
    BadConversion,
    /// Its stack, or the depth of its calls.
    StackExhausted,
    /// Its fuel is used up.
    OutOfFuel,
    /// A memory or table that may not be so large.
    OutOfMemory,
}

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreachable => "it reached `unreachable`, as after a panic",
            Self::MemoryOutOfBounds => "it accessed memory out of bounds",
            Self::TableOutOfBounds => "it accessed a table out of bounds",
            Self::NullCall => "it called an empty element of a table",
            Self::BadSignature => "it called a function of another type through a table",
            Self::DivisionByZero => "it divided an integer by zero",
            Self::IntegerOverflow => "an integer overflowed",
            Self::BadConversion => "it converted a number that is none to an integer",
            Self::StackExhausted => "its calls are too deep",
            Self::OutOfFuel => "its fuel is used up",
            Self::OutOfMemory => "it has no more memory",
        })
    }
}

/// Why there is no module, or no result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The bytes are no module that this engine runs.
    Module(String),
    /// It needs something that can't be given: all but functions on numbers.
    Import(String),
    /// None was loaded.
    NoModule,
    /// One was loaded before.
    Loaded,
    /// It exports no function of this name.
    NoExport(String),
    /// It exports no memory named `memory`.
    NoMemory,
    /// A range outside of its memory.
    Range,
    /// Other arguments than the function takes.
    Arguments(String),
    /// It trapped.
    Trap(Trap),
    /// It called an import, and the host gives no function for it.
    NotGranted {
        /// The import.
        import: String,
        /// The name of the host function that is not there.
        needs: String,
    },
    /// A host function failed, or is of another type.
    Host {
        /// The host function.
        name: String,
        /// Its message.
        message: String,
    },
    /// It ended itself: `proc_exit` with this number.
    Exit(i32),
    /// It broke a rule of the component model's: a string that isn't UTF-8, a case that isn't there.
    Interface(String),
    /// A component that ended a call by a trap or an exit: it can't be entered any more.
    Ended,
}

crate::serde_value!(Limits, Exported, Refusal);

/// A value, or why there is none.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome<T>(pub Result<T, Refusal>);

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
            Err(refusal) => refusal.encode(out),
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
        Refusal::decode(from).map(|refusal| Self(Err(refusal)))
    }
}

/// Names of the host functions that WASI's functions become. A host that registers one grants it.
pub mod wasi {
    /// The import module (WASI preview 1).
    pub const MODULE: &str = "wasi_snapshot_preview1";
    /// `(bytes)`: what is written to descriptor 1.
    pub const STDOUT: &str = "wasi.stdout";
    /// `(bytes)`: what is written to descriptor 2.
    pub const STDERR: &str = "wasi.stderr";
    /// `(u32) -> bytes`: at most so many, read from descriptor 0; none at its end.
    pub const STDIN: &str = "wasi.stdin";
    /// `(u32) -> u64`: nanoseconds of this clock.
    pub const CLOCK: &str = "wasi.clock";
    /// `(u32) -> bytes`: so many random ones.
    pub const RANDOM: &str = "wasi.random";
    /// `() -> Vec<String>`: the program's arguments, its name first.
    pub const ARGS: &str = "wasi.args";
    /// `() -> Vec<String>`: `NAME=value` each.
    pub const ENVIRON: &str = "wasi.environ";
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    fn back<T: Encode + for<'a> Decode<'a>>(value: &T) -> T {
        let mut area = [0; 512];
        let mut out = Writer::new(&mut area);
        value.encode(&mut out);
        let len = out.finish().expect("it fits");
        let mut from = Reader::new(&area[..len]);
        let value = T::decode(&mut from).expect("it decodes");
        from.end().expect("nothing is left");
        value
    }

    #[test]
    fn outcomes_come_back() {
        let values = vec![
            Value::I32(-1),
            Value::I64(i64::MIN),
            Value::F32(1.5),
            Value::F64(-0.0),
        ];
        let good = Outcome(Ok(values));
        assert_eq!(back(&good), good);
        let refusals = [
            Refusal::Trap(Trap::OutOfFuel),
            Refusal::NoModule,
            Refusal::Exit(-3),
            Refusal::NotGranted {
                import: "a.b".into(),
                needs: "c".into(),
            },
        ];
        for refusal in refusals {
            let bad: Outcome<Vec<Value>> = Outcome(Err(refusal));
            assert_eq!(back(&bad), bad);
        }
        let limits = Limits {
            memory: 1 << 40,
            table: 3,
            stack: 2,
            depth: 1,
            fuel: Some(u64::MAX),
        };
        assert_eq!(back(&limits), limits);
    }
}
