//! Rust types as WebAssembly's.

use skerry_sandbox_abi::wasm::{Kind, Value};

/// A type that is one of WebAssembly's.
trait Number: Copy {
    const KIND: Kind;
    fn value(self) -> Value;
    fn from_value(value: Value) -> Option<Self>;
}

macro_rules! numbers {
    ($($type:ty: $kind:ident, $value:ident => $to:expr, $back:ident => $from:expr;)*) => {$(
        impl Number for $type {
            const KIND: Kind = Kind::$kind;
            fn value(self) -> Value {
                let $value = self;
                Value::$kind($to)
            }
            fn from_value(value: Value) -> Option<Self> {
                match value {
                    Value::$kind($back) => Some($from),
                    _ => None,
                }
            }
        }
        impl WasmResults for $type {
            fn kinds() -> Vec<Kind> {
                vec![Kind::$kind]
            }
            fn from_values(values: &[Value]) -> Option<Self> {
                match values {
                    [value] => Self::from_value(*value),
                    _ => None,
                }
            }
        }
    )*};
}

/// What a function is called with: a tuple of up to eight numbers.
pub trait WasmArguments {
    /// As values.
    fn values(self) -> impl AsRef<[Value]>;
}

/// What a function returns: nothing, a number, or a tuple of up to four.
pub trait WasmResults: Sized {
    /// The types.
    fn kinds() -> Vec<Kind>;
    /// From values; `None` if they have other types.
    fn from_values(values: &[Value]) -> Option<Self>;
}

// Integers have no sign in WebAssembly: the unsigned ones are the same bits.
numbers! {
    i32: I32, v => v, b => b;
    u32: I32, v => v as i32, b => b as u32;
    i64: I64, v => v, b => b;
    u64: I64, v => v as i64, b => b as u64;
    f32: F32, v => v, b => b;
    f64: F64, v => v, b => b;
}

impl WasmArguments for &[Value] {
    fn values(self) -> impl AsRef<[Value]> {
        self
    }
}

macro_rules! arguments {
    ($($($name:ident $index:tt),*;)*) => {$(
        impl<$($name: Number),*> WasmArguments for ($($name,)*) {
            fn values(self) -> impl AsRef<[Value]> {
                [$(self.$index.value()),*] as [Value; _]
            }
        }
    )*};
}

arguments! {
    A 0;
    A 0, B 1;
    A 0, B 1, C 2;
    A 0, B 1, C 2, D 3;
    A 0, B 1, C 2, D 3, E 4;
    A 0, B 1, C 2, D 3, E 4, F 5;
    A 0, B 1, C 2, D 3, E 4, F 5, G 6;
    A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7;
}

impl WasmArguments for () {
    fn values(self) -> impl AsRef<[Value]> {
        [] as [Value; 0]
    }
}

impl WasmResults for () {
    fn kinds() -> Vec<Kind> {
        Vec::new()
    }
    fn from_values(values: &[Value]) -> Option<Self> {
        values.is_empty().then_some(())
    }
}

macro_rules! results {
    ($($($name:ident $value:ident),*;)*) => {$(
        impl<$($name: Number),*> WasmResults for ($($name,)*) {
            fn kinds() -> Vec<Kind> {
                vec![$($name::KIND),*]
            }
            fn from_values(values: &[Value]) -> Option<Self> {
                match values {
                    [$($value),*] => Some(($($name::from_value(*$value)?,)*)),
                    _ => None,
                }
            }
        }
    )*};
}

results! {
    A a, B b;
    A a, B b, C c;
    A a, B b, C c, D d;
}
