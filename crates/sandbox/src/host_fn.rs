//! Functions that a guest can call.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use skerry_sandbox_abi::{
    Decode, DecodeError, Description, Function, Parameter, Reader, Returned, Writer,
};

use crate::error::BuildError;

type Call = dyn Fn(&mut Reader<'_>, &mut Writer<'_>) -> Result<u32, DecodeError> + Send + Sync;

/// A closure that guests can call: up to eight owned arguments that can be decoded, and a value or a
/// `Result` with an error that can be displayed.
///
/// It runs on the thread of the call, between two instructions of the guest, and is not subject to
/// cancelling: a kill takes effect when it returns.
pub trait HostFn<A>: Send + Sync + 'static {
    /// Its types.
    fn signature(name: &str) -> Function;
    /// Takes arguments, appends the result.
    fn call(&self, from: &mut Reader<'_>, out: &mut Writer<'_>) -> Result<u32, DecodeError>;
}

fn parameter(kind: impl FnOnce(&mut String)) -> Parameter {
    let mut text = String::new();
    kind(&mut text);
    Parameter {
        name: String::new(),
        kind: text,
    }
}

macro_rules! closures {
    ($($count:literal: $($name:ident $value:ident $index:tt),*;)*) => {$(
        impl<Fun, Ret, $($name),*> HostFn<($($name,)*)> for Fun
        where
            Fun: Fn($($name),*) -> Ret + Send + Sync + 'static,
            Ret: Returned,
            $($name: for<'a> Decode<'a>,)*
        {
            fn signature(name: &str) -> Function {
                let mut returns = String::new();
                Ret::type_name(&mut returns);
                Function {
                    name: name.to_owned(),
                    parameters: vec![$(parameter(<$name as Decode<'_>>::type_name)),*],
                    returns,
                }
            }
            fn call(&self, from: &mut Reader<'_>, out: &mut Writer<'_>) -> Result<u32, DecodeError> {
                from.arity($count)?;
                $(let $value = from.argument::<$name>($index)?;)*
                from.end()?;
                Ok(self($($value),*).put(out))
            }
        }
    )*};
}

closures! {
    0: ;
    1: A a 0;
    2: A a 0, B b 1;
    3: A a 0, B b 1, C c 2;
    4: A a 0, B b 1, C c 2, D d 3;
    5: A a 0, B b 1, C c 2, D d 3, E e 4;
    6: A a 0, B b 1, C c 2, D d 3, E e 4, F f 5;
    7: A a 0, B b 1, C c 2, D d 3, E e 4, F f 5, G g 6;
    8: A a 0, B b 1, C c 2, D d 3, E e 4, F f 5, G g 6, H h 7;
}

#[derive(Clone)]
struct Entry {
    signature: Function,
    call: Arc<Call>,
}

/// A set of functions; cheap to clone, to be shared by many sandboxes.
#[derive(Clone, Default)]
pub struct HostFunctions {
    entries: Vec<Entry>,
    names: HashMap<String, usize>,
}

impl fmt::Debug for HostFunctions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.entries.iter().map(|entry| &entry.signature))
            .finish()
    }
}

impl HostFunctions {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one; replaces the one of this name.
    pub fn add<A, F: HostFn<A>>(&mut self, name: &str, function: F) {
        self.put(Entry {
            signature: F::signature(name),
            call: Arc::new(move |from, out| function.call(from, out)),
        });
    }

    /// Adds one whose types are known only when it runs: an interpreter's, a proxy's. It gets the
    /// arguments as they come, their number first, and appends one value.
    pub fn add_raw(
        &mut self,
        signature: Function,
        call: impl Fn(&mut Reader<'_>, &mut Writer<'_>) -> Result<u32, DecodeError>
        + Send
        + Sync
        + 'static,
    ) {
        let call = Arc::new(call);
        self.put(Entry { signature, call });
    }

    /// Adds all of `others`.
    pub fn extend(&mut self, others: &Self) {
        for entry in &others.entries {
            self.put(entry.clone());
        }
    }

    fn put(&mut self, entry: Entry) {
        match self.names.get(&entry.signature.name) {
            Some(index) => self.entries[*index] = entry,
            None => {
                self.names
                    .insert(entry.signature.name.clone(), self.entries.len());
                self.entries.push(entry);
            }
        }
    }

    /// Which of them each import of a guest is.
    pub(crate) fn link(&self, guest: &Description) -> Result<Vec<Option<usize>>, BuildError> {
        let mut missing = Vec::new();
        let mut links = Vec::with_capacity(guest.imports.len());
        for wanted in &guest.imports {
            if wanted.name.is_empty() {
                links.push(None);
                continue;
            }
            match self.names.get(&wanted.name) {
                None => missing.push(wanted.clone()),
                Some(index) => {
                    let found = &self.entries[*index].signature;
                    if !found.same_types(wanted) {
                        return Err(BuildError::HostFunctionMismatch {
                            wanted: Box::new(wanted.clone()),
                            found: Box::new(found.clone()),
                        });
                    }
                    links.push(Some(*index));
                }
            }
        }
        match missing.is_empty() {
            true => Ok(links),
            false => Err(BuildError::MissingHostFunctions(missing)),
        }
    }

    /// The number of the function of this name.
    pub(crate) fn index(&self, name: &str) -> Option<usize> {
        self.names.get(name).copied()
    }

    /// Calls function `index`.
    pub(crate) fn call(
        &self,
        index: usize,
        from: &mut Reader<'_>,
        out: &mut Writer<'_>,
    ) -> Option<Result<u32, DecodeError>> {
        Some((self.entries.get(index)?.call)(from, out))
    }
}
