//! Scripts' values and those of Rust types, by `serde`.

use alloc::borrow::ToOwned;
use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use ciborium::Value as Cbor;
use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer,
    MapAccess, SeqAccess, VariantAccess, Visitor,
};
use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Deserialize, Serialize, Serializer, forward_to_deserialize_any};

use super::{DEPTH, Value};

/// A Rust value is none of a script's, or the other way round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueError(String);

impl fmt::Display for ValueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for ValueError {}

impl serde::de::Error for ValueError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

/// What a script gets for a value of any type: maps for structures and for enums with content, their
/// variant being the only key; strings for enums without.
pub fn to_value<T: Serialize + ?Sized>(value: &T) -> Result<Value, ValueError> {
    let cbor = Cbor::serialized(value).map_err(|error| ValueError(error.to_string()))?;
    from_cbor(cbor, DEPTH)
}

/// A value of a Rust type from a script's: what [`to_value`] makes, and integers where numbers with a
/// fraction are wanted.
pub fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, ValueError> {
    T::deserialize(value)
}

/// `room` is how deep it may be.
fn from_cbor(cbor: Cbor, room: usize) -> Result<Value, ValueError> {
    let inside = || {
        let error = || {
            ValueError(alloc::format!(
                "more than {DEPTH} arrays or maps in each other"
            ))
        };
        room.checked_sub(1).ok_or_else(error)
    };
    Ok(match cbor {
        Cbor::Null => Value::Unit,
        Cbor::Bool(value) => Value::Bool(value),
        Cbor::Integer(value) => Value::Int(i64::try_from(value).map_err(|_| {
            ValueError::custom("an integer is larger than a script's are (64 bits with sign)")
        })?),
        Cbor::Float(value) => Value::Float(value),
        Cbor::Text(text) => Value::String(text),
        Cbor::Bytes(bytes) => Value::Bytes(bytes),
        Cbor::Array(values) => {
            let room = inside()?;
            let values = values.into_iter().map(|value| from_cbor(value, room));
            Value::Array(values.collect::<Result<_, _>>()?)
        }
        Cbor::Map(entries) => {
            let room = inside()?;
            let entries = entries.into_iter().map(|(key, value)| match key {
                Cbor::Text(key) => Ok((key, from_cbor(value, room)?)),
                _ => Err(ValueError::custom(
                    "a map's key is no string, as a script's are",
                )),
            });
            Value::Map(entries.collect::<Result<_, _>>()?)
        }
        _ => return Err(ValueError::custom("a value of a kind that scripts lack")),
    })
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Unit => to.serialize_unit(),
            Self::Bool(value) => to.serialize_bool(*value),
            Self::Int(value) => to.serialize_i64(*value),
            Self::Float(value) => to.serialize_f64(*value),
            Self::String(value) => to.serialize_str(value),
            Self::Bytes(value) => to.serialize_bytes(value),
            Self::Array(values) => {
                let mut seq = to.serialize_seq(Some(values.len()))?;
                for value in values {
                    seq.serialize_element(value)?;
                }
                seq.end()
            }
            Self::Map(values) => {
                let mut map = to.serialize_map(Some(values.len()))?;
                for (key, value) in values {
                    map.serialize_entry(key, value)?;
                }
                map.end()
            }
        }
    }
}

struct Whole;

impl<'de> Visitor<'de> for Whole {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a script's value")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Unit)
    }
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Unit)
    }
    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        Value::deserialize(from)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value))
    }
    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        let value = i64::try_from(value);
        value
            .map(Value::Int)
            .map_err(|_| E::custom("an integer is larger than a script's are"))
    }
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }
    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }
    fn visit_bytes<E>(self, value: &[u8]) -> Result<Value, E> {
        Ok(Value::Bytes(value.to_vec()))
    }
    fn visit_byte_buf<E>(self, value: Vec<u8>) -> Result<Value, E> {
        Ok(Value::Bytes(value))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut values = BTreeMap::new();
        while let Some((key, value)) = map.next_entry()? {
            values.insert(key, value);
        }
        Ok(Value::Map(values))
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Whole)
    }
}

impl<'de> IntoDeserializer<'de, ValueError> for Value {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Value {
    type Error = ValueError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self {
            Self::Unit => visitor.visit_unit(),
            Self::Bool(value) => visitor.visit_bool(value),
            Self::Int(value) => visitor.visit_i64(value),
            Self::Float(value) => visitor.visit_f64(value),
            Self::String(value) => visitor.visit_string(value),
            Self::Bytes(value) => visitor.visit_byte_buf(value),
            Self::Array(values) => {
                let mut seq = SeqDeserializer::new(values.into_iter());
                let value = visitor.visit_seq(&mut seq)?;
                seq.end()?;
                Ok(value)
            }
            Self::Map(values) => {
                let mut map = MapDeserializer::new(values.into_iter());
                let value = visitor.visit_map(&mut map)?;
                map.end()?;
                Ok(value)
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self {
            Self::Unit => visitor.visit_none(),
            value => visitor.visit_some(value),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        visitor.visit_newtype_struct(self)
    }

    /// A blob is a list of its bytes, for `Vec<u8>`.
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self {
            Self::Bytes(bytes) => visitor.visit_seq(SeqDeserializer::new(bytes.into_iter())),
            value => value.deserialize_any(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        match self {
            Self::String(name) => visitor.visit_enum(name.into_deserializer()),
            Self::Map(values) if values.len() == 1 => match values.into_iter().next() {
                Some((name, content)) => visitor.visit_enum(Variant { name, content }),
                None => Err(ValueError::custom("a map without a key is no variant")),
            },
            other => Err(ValueError(alloc::format!(
                "a string or a map with one key is wanted for an enum, and {} is given",
                other.kind()
            ))),
        }
    }

    /// As it is for what [`to_value`] uses.
    fn is_human_readable(&self) -> bool {
        false
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct tuple tuple_struct map struct identifier ignored_any
    }
}

/// An enum's variant with content.
struct Variant {
    name: String,
    content: Value,
}

impl<'de> EnumAccess<'de> for Variant {
    type Error = ValueError;
    type Variant = Content;
    fn variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<(S::Value, Content), ValueError> {
        let name: serde::de::value::StringDeserializer<ValueError> = self.name.into_deserializer();
        Ok((seed.deserialize(name)?, Content(self.content)))
    }
}

struct Content(Value);

impl<'de> VariantAccess<'de> for Content {
    type Error = ValueError;
    fn unit_variant(self) -> Result<(), ValueError> {
        <()>::deserialize(self.0)
    }
    fn newtype_variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<S::Value, ValueError> {
        seed.deserialize(self.0)
    }
    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, ValueError> {
        self.0.deserialize_any(visitor)
    }
    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        self.0.deserialize_any(visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    enum Shape {
        Point,
        Circle(f64),
        Line(i32, i32),
        Box { width: u32, height: Option<u32> },
    }

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Drawing {
        name: String,
        initial: char,
        shapes: Vec<Shape>,
        raw: Vec<u8>,
        nested: Option<alloc::boxed::Box<Drawing>>,
        pair: (i8, u64),
        unit: (),
        by_name: BTreeMap<String, f32>,
    }

    fn drawing() -> Drawing {
        Drawing {
            name: "one".into(),
            initial: 'ü',
            shapes: vec![
                Shape::Point,
                Shape::Circle(1.5),
                Shape::Line(-1, 2),
                Shape::Box {
                    width: 3,
                    height: None,
                },
            ],
            raw: vec![0, 255],
            nested: None,
            pair: (-128, i64::MAX as u64),
            unit: (),
            by_name: BTreeMap::from([("x".into(), 0.25)]),
        }
    }

    #[test]
    fn structures_of_all_kinds_go_round() {
        let inner = drawing();
        let outer = Drawing {
            nested: Some(inner.clone().into()),
            ..inner.clone()
        };
        for drawing in [inner, outer] {
            let value = to_value(&drawing).unwrap();
            // Through the value's own way too.
            assert_eq!(to_value(&value).unwrap(), value);
            assert_eq!(from_value::<Value>(value.clone()).unwrap(), value);
            assert_eq!(from_value::<Drawing>(value).unwrap(), drawing);
        }
    }

    #[test]
    fn numbers_are_checked() {
        assert!(to_value(&u64::MAX).is_err());
        assert!(from_value::<u8>(Value::Int(256)).is_err());
        assert!(from_value::<u32>(Value::Int(-1)).is_err());
        assert!(from_value::<i64>(Value::Float(1.0)).is_err());
        assert_eq!(from_value::<f64>(Value::Int(3)), Ok(3.0));
        assert_eq!(from_value::<Vec<u8>>(Value::Bytes(vec![7])), Ok(vec![7]));
        assert_eq!(from_value::<Option<i32>>(Value::Unit), Ok(None));
        assert_eq!(from_value::<Option<i32>>(Value::Int(1)), Ok(Some(1)));
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let empty = || Value::Map(BTreeMap::new());
        assert!(from_value::<Drawing>(empty()).is_err());
        assert!(from_value::<Shape>(empty()).is_err());
        assert!(from_value::<Shape>(Value::Int(1)).is_err());
        assert!(from_value::<Shape>(Value::String("Square".into())).is_err());
        assert!(from_value::<(i32, i32)>(Value::Array(vec![Value::Int(1)])).is_err());
        let long = Value::Array(vec![Value::Int(1); 3]);
        assert!(from_value::<(i32, i32)>(long).is_err());
        assert!(to_value(&BTreeMap::from([(1, 2)])).is_err());
        let mut deep = Value::Unit;
        for _ in 0..DEPTH {
            deep = Value::Array(vec![deep]);
        }
        assert_eq!(to_value(&deep).as_ref(), Ok(&deep));
        assert!(to_value(&[deep]).is_err());
    }
}
