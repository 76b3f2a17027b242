//! Rust types as those of WIT.

use skerry_sandbox_abi::component::Val;
use skerry_sandbox_abi::{Decode, DecodeError, Encode, Reader, Writer};

/// A type that is one of WIT's: `bool`, integers, floats, `char`, `String`, `Vec`, `Option`, `Result`, tuples,
/// and [`Val`] for all the others.
pub trait WitValue: Sized {
    /// The name of the type in WIT.
    fn wit_name() -> String;
    /// As a value.
    fn into_val(self) -> Val;
    /// From a value; `None` if it is of another type.
    fn from_val(value: Val) -> Option<Self>;

    /// As a list.
    fn into_list(values: Vec<Self>) -> Val {
        Val::List(values.into_iter().map(Self::into_val).collect())
    }
    /// From a list.
    fn from_list(value: Val) -> Option<Vec<Self>> {
        match value {
            Val::List(values) => values.into_iter().map(Self::from_val).collect(),
            _ => None,
        }
    }
    /// As what a `result` has inside, or a function returns: nothing, for `()`.
    fn into_payload(self) -> Option<Box<Val>> {
        Some(Box::new(self.into_val()))
    }
    /// From what a `result` has inside, or a function returns.
    fn from_payload(value: Option<Box<Val>>) -> Option<Self> {
        Self::from_val(*value?)
    }
}

macro_rules! simple {
    ($($type:ty: $kind:ident $name:literal;)*) => {$(
        impl WitValue for $type {
            fn wit_name() -> String {
                $name.into()
            }
            fn into_val(self) -> Val {
                Val::$kind(self)
            }
            fn from_val(value: Val) -> Option<Self> {
                match value {
                    Val::$kind(value) => Some(value),
                    _ => None,
                }
            }
        }
    )*};
}

simple! {
    bool: Bool "bool";
    i8: S8 "s8";
    i16: S16 "s16";
    u16: U16 "u16";
    i32: S32 "s32";
    u32: U32 "u32";
    i64: S64 "s64";
    u64: U64 "u64";
    f32: F32 "f32";
    f64: F64 "f64";
    char: Char "char";
    String: String "string";
}

impl WitValue for u8 {
    fn wit_name() -> String {
        "u8".into()
    }
    fn into_val(self) -> Val {
        Val::U8(self)
    }
    fn from_val(value: Val) -> Option<Self> {
        match value {
            Val::U8(value) => Some(value),
            _ => None,
        }
    }
    fn into_list(values: Vec<Self>) -> Val {
        Val::Bytes(values)
    }
    fn from_list(value: Val) -> Option<Vec<Self>> {
        match value {
            Val::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }
}

impl WitValue for &str {
    fn wit_name() -> String {
        String::wit_name()
    }
    fn into_val(self) -> Val {
        Val::String(self.into())
    }
    /// Never: a value owns its text.
    fn from_val(_: Val) -> Option<Self> {
        None
    }
}

impl WitValue for Val {
    fn wit_name() -> String {
        "any value".into()
    }
    fn into_val(self) -> Val {
        self
    }
    fn from_val(value: Val) -> Option<Self> {
        Some(value)
    }
}

/// Nothing: what a function without result returns, and a `result` without value has.
impl WitValue for () {
    fn wit_name() -> String {
        "nothing".into()
    }
    fn into_val(self) -> Val {
        Val::Tuple(Vec::new())
    }
    fn from_val(value: Val) -> Option<Self> {
        match value {
            Val::Tuple(values) if values.is_empty() => Some(()),
            _ => None,
        }
    }
    fn into_payload(self) -> Option<Box<Val>> {
        None
    }
    fn from_payload(value: Option<Box<Val>>) -> Option<Self> {
        value.is_none().then_some(())
    }
}

impl<T: WitValue> WitValue for Vec<T> {
    fn wit_name() -> String {
        format!("list<{}>", T::wit_name())
    }
    fn into_val(self) -> Val {
        T::into_list(self)
    }
    fn from_val(value: Val) -> Option<Self> {
        T::from_list(value)
    }
}

impl<T: WitValue> WitValue for Option<T> {
    fn wit_name() -> String {
        format!("option<{}>", T::wit_name())
    }
    fn into_val(self) -> Val {
        Val::Option(self.map(|value| Box::new(value.into_val())))
    }
    fn from_val(value: Val) -> Option<Self> {
        match value {
            Val::Option(None) => Some(None),
            Val::Option(Some(value)) => T::from_val(*value).map(Some),
            _ => None,
        }
    }
}

impl<T: WitValue, E: WitValue> WitValue for Result<T, E> {
    fn wit_name() -> String {
        format!("result<{}, {}>", T::wit_name(), E::wit_name())
    }
    fn into_val(self) -> Val {
        Val::Result(match self {
            Ok(value) => Ok(value.into_payload()),
            Err(value) => Err(value.into_payload()),
        })
    }
    fn from_val(value: Val) -> Option<Self> {
        match value {
            Val::Result(Ok(value)) => T::from_payload(value).map(Ok),
            Val::Result(Err(value)) => E::from_payload(value).map(Err),
            _ => None,
        }
    }
}

/// What a function is called with: a tuple of up to eight values, or values.
pub trait WitArguments {
    /// As values.
    fn values(self) -> Vec<Val>;
}

impl WitArguments for &[Val] {
    fn values(self) -> Vec<Val> {
        self.to_vec()
    }
}

impl WitArguments for () {
    fn values(self) -> Vec<Val> {
        Vec::new()
    }
}

macro_rules! tuples {
    ($($($name:ident $index:tt),*;)*) => {$(
        impl<$($name: WitValue),*> WitArguments for ($($name,)*) {
            fn values(self) -> Vec<Val> {
                vec![$(self.$index.into_val()),*]
            }
        }
        impl<$($name: WitValue),*> WitValue for ($($name,)*) {
            fn wit_name() -> String {
                format!("tuple<{}>", [$($name::wit_name()),*].join(", "))
            }
            fn into_val(self) -> Val {
                Val::Tuple(self.values())
            }
            fn from_val(value: Val) -> Option<Self> {
                let Val::Tuple(values) = value else {
                    return None;
                };
                let mut values = values.into_iter();
                let tuple = ($($name::from_val(values.next()?)?,)*);
                values.next().is_none().then_some(tuple)
            }
        }
    )*};
}

tuples! {
    A 0;
    A 0, B 1;
    A 0, B 1, C 2;
    A 0, B 1, C 2, D 3;
    A 0, B 1, C 2, D 3, E 4;
    A 0, B 1, C 2, D 3, E 4, F 5;
    A 0, B 1, C 2, D 3, E 4, F 5, G 6;
    A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7;
}

/// A type of WIT's as an argument or result of a host function, where it isn't one that host functions have
/// anyway: `u8`, `char`, tuples, `Result` as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wit<T>(pub T);

impl<T: WitValue + Clone> Encode for Wit<T> {
    fn type_name(out: &mut String) {
        out.push_str(&T::wit_name());
    }
    fn encode(&self, out: &mut Writer<'_>) {
        self.0.clone().into_val().encode(out);
    }
}

impl<T: WitValue> Decode<'_> for Wit<T> {
    fn type_name(out: &mut String) {
        out.push_str(&T::wit_name());
    }
    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let unexpected = from.unexpected(&T::wit_name());
        let value = Val::decode(from)?;
        T::from_val(value).map(Self).ok_or(unexpected)
    }
}
