//! What a script may do besides computing.

use std::fmt::Display;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use skerry_sandbox_abi::script::{Granted, Value, from_value, host, to_value};
use skerry_sandbox_abi::{DecodeError, Function, Parameter, Reader, Returned};

use crate::host_fn::{HostFn, HostFunctions};

/// Capabilities of scripts; cheap to clone, to be used for many. Nothing unless granted.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Grants {
    functions: Arc<HostFunctions>,
    names: Arc<Vec<Granted>>,
}

/// A closure that scripts can call: up to eight arguments of types that can be deserialised.
///
/// It runs on the thread of the call, and is not subject to cancelling: a kill takes effect when it
/// returns.
pub trait ScriptFn<A, R>: Send + Sync + 'static {
    /// How many arguments it takes.
    const ARITY: u32;
    /// Calls it; `Err` says which argument is not what it takes.
    fn call(&self, arguments: Vec<Value>) -> Result<R, String>;
}

macro_rules! closures {
    ($($count:literal: $($name:ident $value:ident),*;)*) => {$(
        impl<Fun, R, $($name),*> ScriptFn<($($name,)*), R> for Fun
        where
            Fun: Fn($($name),*) -> R + Send + Sync + 'static,
            $($name: DeserializeOwned,)*
        {
            const ARITY: u32 = $count;
            fn call(&self, arguments: Vec<Value>) -> Result<R, String> {
                let given = arguments.len();
                let values: Result<[Value; $count], _> = arguments.try_into();
                let Ok([$($value),*]) = values else {
                    return Err(format!("it takes {} arguments, and {given} were given", $count));
                };
                let _number = 0;
                $(let _number = _number + 1;
                let $value = argument::<$name>(_number, $value)?;)*
                Ok(self($($value),*))
            }
        }
    )*};
}

closures! {
    0: ;
    1: A a;
    2: A a, B b;
    3: A a, B b, C c;
    4: A a, B b, C c, D d;
    5: A a, B b, C c, D d, E e;
    6: A a, B b, C c, D d, E e, F f;
    7: A a, B b, C c, D d, E e, F f, G g;
    8: A a, B b, C c, D d, E e, F f, G g, H h;
}

fn argument<T: DeserializeOwned>(number: u32, value: Value) -> Result<T, String> {
    from_value(value).map_err(|error| format!("its argument {number}: {error}"))
}

/// The arguments that a script passes: their number, then each.
fn arguments(from: &mut Reader<'_>) -> Result<Vec<Value>, DecodeError> {
    let count = from.u32()?;
    let mut values = Vec::new();
    for index in 0..count {
        values.push(from.argument(index)?);
    }
    from.end()?;
    Ok(values)
}

impl Grants {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// The host functions that they are.
    pub fn functions(&self) -> &Arc<HostFunctions> {
        &self.functions
    }

    pub(super) fn granted(&self) -> Arc<Vec<Granted>> {
        self.names.clone()
    }

    /// These and `others`.
    pub(super) fn and(mut self, others: &Self) -> Self {
        Arc::make_mut(&mut self.functions).extend(&others.functions);
        for granted in others.names.iter() {
            self.name(&granted.name, granted.arity);
        }
        self
    }

    fn name(&mut self, name: &str, arity: u32) {
        let names = Arc::make_mut(&mut self.names);
        names.retain(|granted| granted.name != name);
        names.push(Granted {
            name: name.to_owned(),
            arity,
        });
    }

    fn add<A, R>(
        mut self,
        name: &str,
        function: impl ScriptFn<A, R>,
        value: impl Fn(R) -> Result<Value, String> + Send + Sync + 'static,
    ) -> Self {
        fn arity<A, R, F: ScriptFn<A, R>>(_: &F) -> u32 {
            F::ARITY
        }
        let arity = arity(&function);
        self.name(name, arity);
        let any = || Parameter {
            name: String::new(),
            kind: "any".into(),
        };
        let signature = Function {
            name: format!("{}{name}", host::FUNCTION),
            parameters: (0..arity).map(|_| any()).collect(),
            returns: "any".into(),
        };
        Arc::make_mut(&mut self.functions).add_raw(signature, move |from, out| {
            let arguments = arguments(from)?;
            let ended = function.call(arguments).and_then(&value);
            Ok(ended.put(out))
        });
        self
    }

    /// A function that scripts call as `name(…)`. One of their own of this name goes before it, and so does one
    /// of the language's that takes these types. What it returns can be serialised; where that can't be a
    /// script's value (an integer above `i64::MAX`), the script gets an error.
    ///
    /// An argument of another type than the function's throws in the script, which can catch it.
    pub fn function<A, R: Serialize>(self, name: &str, function: impl ScriptFn<A, R>) -> Self {
        self.add(name, function, |value| {
            to_value(&value).map_err(|error| error.to_string())
        })
    }

    /// As [`Grants::function`], for one that may fail: its error is thrown in the script, which can catch it
    /// and gets the text as `error.message`.
    pub fn fallible<A, R: Serialize, E: Display>(
        self,
        name: &str,
        function: impl ScriptFn<A, Result<R, E>>,
    ) -> Self {
        self.add(name, function, |ended| {
            let value = ended.map_err(|error| error.to_string())?;
            to_value(&value).map_err(|error| error.to_string())
        })
    }

    fn add_host<A, F: HostFn<A>>(mut self, name: &str, function: F) -> Self {
        Arc::make_mut(&mut self.functions).add(name, function);
        self
    }

    /// What `print` prints, a line without its end. It goes to the guest's log, at the level of
    /// information, unless granted.
    pub fn print(self, line: impl Fn(String) + Send + Sync + 'static) -> Self {
        self.add_host(host::PRINT, line)
    }

    /// What `debug` prints, with the number of the line in the script. It goes to the guest's log, at
    /// the level for debugging, unless granted.
    pub fn debug(self, line: impl Fn(String) + Send + Sync + 'static) -> Self {
        self.add_host(host::DEBUG, line)
    }
}
