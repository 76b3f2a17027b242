//! What a script's function is called with.

use serde::Serialize;
use skerry_sandbox_abi::script::{Value, ValueError, to_value};

/// A tuple of up to eight values, or a list of [`Value`]s.
pub trait ScriptArguments {
    /// As values.
    fn values(self) -> Result<impl AsRef<[Value]>, ValueError>;
}

impl ScriptArguments for &[Value] {
    fn values(self) -> Result<impl AsRef<[Value]>, ValueError> {
        Ok(self)
    }
}

impl ScriptArguments for Vec<Value> {
    fn values(self) -> Result<impl AsRef<[Value]>, ValueError> {
        Ok(self)
    }
}

macro_rules! tuples {
    ($($($name:ident $index:tt),*;)*) => {$(
        impl<$($name: Serialize),*> ScriptArguments for ($($name,)*) {
            fn values(self) -> Result<impl AsRef<[Value]>, ValueError> {
                Ok([$(to_value(&self.$index)?),*] as [Value; _])
            }
        }
    )*};
}

tuples! {
    ;
    A 0;
    A 0, B 1;
    A 0, B 1, C 2;
    A 0, B 1, C 2, D 3;
    A 0, B 1, C 2, D 3, E 4;
    A 0, B 1, C 2, D 3, E 4, F 5;
    A 0, B 1, C 2, D 3, E 4, F 5, G 6;
    A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7;
}
