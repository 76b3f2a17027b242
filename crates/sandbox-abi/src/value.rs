//! Rust types as values.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Display;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec::{DecodeError, Reader, Tag, Writer};
use crate::layout::status;

/// A type that can be sent.
pub trait Encode {
    /// Appends the type's name, as signatures have it.
    fn type_name(out: &mut String);
    /// Appends the value.
    fn encode(&self, out: &mut Writer<'_>);
}

/// A type that can be received; it may borrow from the area.
pub trait Decode<'a>: Sized {
    /// Appends the type's name, as signatures have it.
    fn type_name(out: &mut String);
    /// Takes the value.
    fn decode(from: &mut Reader<'a>) -> Result<Self, DecodeError>;
}

macro_rules! scalars {
    ($($type:ty, $tag:ident, $value:ident => $bytes:expr, $array:ident => $back:expr;)*) => {$(
        impl Encode for $type {
            fn type_name(out: &mut String) {
                out.push_str(Tag::$tag.name());
            }
            #[inline]
            fn encode(&self, out: &mut Writer<'_>) {
                let $value = *self;
                out.scalar(Tag::$tag, $bytes);
            }
        }
        impl Decode<'_> for $type {
            fn type_name(out: &mut String) {
                out.push_str(Tag::$tag.name());
            }
            #[inline]
            fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
                let $array = from.scalar(Tag::$tag)?;
                $back
            }
        }
    )*};
}

// Floating point goes as its bits: a signalling NaN stays one.
scalars! {
    i32, I32, v => v.to_le_bytes(), a => Ok(i32::from_le_bytes(a));
    u32, U32, v => v.to_le_bytes(), a => Ok(u32::from_le_bytes(a));
    i64, I64, v => v.to_le_bytes(), a => Ok(i64::from_le_bytes(a));
    u64, U64, v => v.to_le_bytes(), a => Ok(u64::from_le_bytes(a));
    f32, F32, v => v.to_bits().to_le_bytes(), a => Ok(f32::from_bits(u32::from_le_bytes(a)));
    f64, F64, v => v.to_bits().to_le_bytes(), a => Ok(f64::from_bits(u64::from_le_bytes(a)));
    bool, Bool, v => [u8::from(v)], a => match a {
        [0] => Ok(false),
        [1] => Ok(true),
        _ => Err(DecodeError::Malformed("a bool that is neither 0 nor 1")),
    };
}

impl Encode for () {
    fn type_name(out: &mut String) {
        out.push_str(Tag::Unit.name());
    }
    #[inline]
    fn encode(&self, out: &mut Writer<'_>) {
        out.tag(Tag::Unit);
    }
}

impl Decode<'_> for () {
    fn type_name(out: &mut String) {
        out.push_str(Tag::Unit.name());
    }
    #[inline]
    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        from.expect(Tag::Unit)
    }
}

impl Encode for str {
    fn type_name(out: &mut String) {
        out.push_str(Tag::String.name());
    }
    fn encode(&self, out: &mut Writer<'_>) {
        out.block(Tag::String, self.as_bytes());
    }
}

impl<'a> Decode<'a> for &'a str {
    fn type_name(out: &mut String) {
        out.push_str(Tag::String.name());
    }
    fn decode(from: &mut Reader<'a>) -> Result<Self, DecodeError> {
        let bytes = from.block(Tag::String)?;
        core::str::from_utf8(bytes).map_err(|_| DecodeError::Malformed("a string is not UTF-8"))
    }
}

impl Encode for String {
    fn type_name(out: &mut String) {
        out.push_str(Tag::String.name());
    }
    fn encode(&self, out: &mut Writer<'_>) {
        self.as_str().encode(out);
    }
}

impl Decode<'_> for String {
    fn type_name(out: &mut String) {
        out.push_str(Tag::String.name());
    }
    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        <&str>::decode(from).map(String::from)
    }
}

/// Bytes that are shared or owned by others: a name for `[u8]` in signatures.
pub type Bytes = [u8];

impl Encode for [u8] {
    fn type_name(out: &mut String) {
        out.push_str(Tag::Bytes.name());
    }
    fn encode(&self, out: &mut Writer<'_>) {
        out.block(Tag::Bytes, self);
    }
}

impl<const N: usize> Encode for [u8; N] {
    fn type_name(out: &mut String) {
        out.push_str(Tag::Bytes.name());
    }
    fn encode(&self, out: &mut Writer<'_>) {
        self.as_slice().encode(out);
    }
}

impl<'a> Decode<'a> for &'a [u8] {
    fn type_name(out: &mut String) {
        out.push_str(Tag::Bytes.name());
    }
    fn decode(from: &mut Reader<'a>) -> Result<Self, DecodeError> {
        from.block(Tag::Bytes)
    }
}

impl Encode for Vec<u8> {
    fn type_name(out: &mut String) {
        out.push_str(Tag::Bytes.name());
    }
    fn encode(&self, out: &mut Writer<'_>) {
        self.as_slice().encode(out);
    }
}

impl Decode<'_> for Vec<u8> {
    fn type_name(out: &mut String) {
        out.push_str(Tag::Bytes.name());
    }
    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        <&[u8]>::decode(from).map(Vec::from)
    }
}

fn encode_list<T: Encode>(values: &[T], out: &mut Writer<'_>) {
    out.scalar(Tag::List, (values.len() as u32).to_le_bytes());
    for value in values {
        value.encode(out);
    }
}

impl<T: Encode> Encode for Vec<T> {
    fn type_name(out: &mut String) {
        out.push_str("Vec<");
        T::type_name(out);
        out.push('>');
    }
    fn encode(&self, out: &mut Writer<'_>) {
        encode_list(self, out);
    }
}

impl<T: Encode> Encode for [T] {
    fn type_name(out: &mut String) {
        <Vec<T> as Encode>::type_name(out);
    }
    fn encode(&self, out: &mut Writer<'_>) {
        encode_list(self, out);
    }
}

impl<'a, T: Decode<'a>> Decode<'a> for Vec<T> {
    fn type_name(out: &mut String) {
        out.push_str("Vec<");
        T::type_name(out);
        out.push('>');
    }
    fn decode(from: &mut Reader<'a>) -> Result<Self, DecodeError> {
        let count = from.scalar(Tag::List).map(u32::from_le_bytes)? as usize;
        // Each value takes a byte at least: a count that lies makes no large allocation.
        let mut values = Vec::with_capacity(count.min(from.rest().len()));
        for _ in 0..count {
            values.push(T::decode(from)?);
        }
        Ok(values)
    }
}

impl<T: Encode> Encode for Option<T> {
    fn type_name(out: &mut String) {
        out.push_str("Option<");
        T::type_name(out);
        out.push('>');
    }
    fn encode(&self, out: &mut Writer<'_>) {
        match self {
            None => out.tag(Tag::None),
            Some(value) => {
                out.tag(Tag::Some);
                value.encode(out);
            }
        }
    }
}

impl<'a, T: Decode<'a>> Decode<'a> for Option<T> {
    fn type_name(out: &mut String) {
        out.push_str("Option<");
        T::type_name(out);
        out.push('>');
    }
    fn decode(from: &mut Reader<'a>) -> Result<Self, DecodeError> {
        if from.expect(Tag::None).is_ok() {
            return Ok(None);
        }
        from.expect(Tag::Some)?;
        T::decode(from).map(Some)
    }
}

impl<T: Encode + ?Sized> Encode for &T {
    fn type_name(out: &mut String) {
        T::type_name(out);
    }
    #[inline]
    fn encode(&self, out: &mut Writer<'_>) {
        T::encode(self, out);
    }
}

impl<T: Encode + ?Sized> Encode for Box<T> {
    fn type_name(out: &mut String) {
        T::type_name(out);
    }
    fn encode(&self, out: &mut Writer<'_>) {
        T::encode(self, out);
    }
}

/// A `serde` value as one CBOR item. A type that can't be told in CBOR makes a value that none reads.
pub fn encode_struct<T: Serialize>(value: &T, out: &mut Writer<'_>) {
    let mut item = Vec::new();
    if ciborium::into_writer(value, &mut item).is_err() {
        item.clear();
    }
    out.block(Tag::Struct, &item);
}

/// A `serde` value from one CBOR item.
pub fn decode_struct<T: DeserializeOwned>(from: &mut Reader<'_>) -> Result<T, DecodeError> {
    let item = from.block(Tag::Struct)?;
    ciborium::from_reader(item)
        .map_err(|_| DecodeError::Malformed("a structure has other fields than are wanted"))
}

/// Makes `serde` types values: they travel as CBOR maps, so that a field which one side lacks is
/// subject to `serde`'s own rules (`default`, `skip`).
///
/// ```
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct Point { x: i32, y: i32 }
/// skerry_sandbox_abi::serde_value!(Point);
/// ```
#[macro_export]
macro_rules! serde_value {
    ($($type:ty),+ $(,)?) => {$(
        impl $crate::Encode for $type {
            fn type_name(out: &mut $crate::__private::String) {
                out.push_str(::core::stringify!($type));
            }
            fn encode(&self, out: &mut $crate::Writer<'_>) {
                $crate::encode_struct(self, out);
            }
        }
        impl $crate::Decode<'_> for $type {
            fn type_name(out: &mut $crate::__private::String) {
                out.push_str(::core::stringify!($type));
            }
            fn decode(from: &mut $crate::Reader<'_>)
                -> ::core::result::Result<Self, $crate::DecodeError>
            {
                $crate::decode_struct(from)
            }
        }
    )+};
}

/// The arguments of a call: a tuple of values.
pub trait Arguments {
    /// How many there are.
    const COUNT: u32;
    /// Appends their number and all of them.
    fn encode_all(&self, out: &mut Writer<'_>);
}

macro_rules! tuples {
    ($($count:literal: $($name:ident $index:tt),*;)*) => {$(
        impl<$($name: Encode),*> Arguments for ($($name,)*) {
            const COUNT: u32 = $count;
            #[inline]
            fn encode_all(&self, out: &mut Writer<'_>) {
                out.put(&Self::COUNT.to_le_bytes());
                $(self.$index.encode(out);)*
            }
        }
    )*};
}

tuples! {
    0: ;
    1: A 0;
    2: A 0, B 1;
    3: A 0, B 1, C 2;
    4: A 0, B 1, C 2, D 3;
    5: A 0, B 1, C 2, D 3, E 4;
    6: A 0, B 1, C 2, D 3, E 4, F 5;
    7: A 0, B 1, C 2, D 3, E 4, F 5, G 6;
    8: A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7;
    9: A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8;
    10: A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9;
    11: A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10;
    12: A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10, L 11;
}

impl<'a> Reader<'a> {
    /// Takes the number of arguments, which must be `expected`.
    #[inline]
    pub fn arity(&mut self, expected: u32) -> Result<(), DecodeError> {
        let found = self.u32()?;
        match found == expected {
            true => Ok(()),
            false => Err(DecodeError::Arity { expected, found }),
        }
    }

    /// Takes argument `index`.
    #[inline]
    pub fn argument<T: Decode<'a>>(&mut self, index: u32) -> Result<T, DecodeError> {
        self.at_argument(index);
        T::decode(self)
    }
}

/// What a function may return: a value, or a `Result` with one.
pub trait Returned {
    /// Appends the name of the value's type.
    fn type_name(out: &mut String);
    /// Appends the value, or the error's message; says which ([`status`]).
    fn put(self, out: &mut Writer<'_>) -> u32;
}

impl<T: Encode> Returned for T {
    fn type_name(out: &mut String) {
        <T as Encode>::type_name(out);
    }
    #[inline]
    fn put(self, out: &mut Writer<'_>) -> u32 {
        self.encode(out);
        status::OK
    }
}

impl<T: Encode, E: Display> Returned for Result<T, E> {
    fn type_name(out: &mut String) {
        <T as Encode>::type_name(out);
    }
    #[inline]
    fn put(self, out: &mut Writer<'_>) -> u32 {
        match self {
            Ok(value) => value.put(out),
            Err(error) => {
                error.to_string().encode(out);
                status::FAILED
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;
    use serde::Deserialize;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    enum Kind {
        Unit,
        Tuple(i32, String),
        Named { unit: (), option: Option<()> },
    }

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct All {
        kinds: Vec<Kind>,
        map: BTreeMap<String, f64>,
        unit: (),
        nested: Option<Box<All>>,
        #[serde(default)]
        added: u8,
    }

    crate::serde_value!(All);

    fn round(value: &All) -> All {
        let mut area = [0; 4096];
        let mut out = Writer::new(&mut area);
        value.encode(&mut out);
        let len = out.finish().unwrap();
        let mut from = Reader::new(&area[..len]);
        let back = All::decode(&mut from).unwrap();
        from.end().unwrap();
        back
    }

    #[test]
    fn structures_of_all_kinds_go_round() {
        let inner = All {
            kinds: alloc::vec![Kind::Unit, Kind::Tuple(-1, "x".into())],
            map: BTreeMap::from([("a".into(), 1.5)]),
            unit: (),
            nested: None,
            added: 255,
        };
        let named = Kind::Named {
            unit: (),
            option: None,
        };
        let outer = All {
            kinds: alloc::vec![named],
            nested: Some(Box::new(inner.clone())),
            ..inner.clone()
        };
        assert_eq!(round(&inner), inner);
        assert_eq!(round(&outer), outer);
    }
}
