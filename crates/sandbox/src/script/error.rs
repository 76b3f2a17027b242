//! Why a script didn't load, or a call gave no value.

use std::fmt;

use skerry_sandbox_abi::script::{Ended, Limit, Position, Refusal, Value, ValueError};
use thiserror::Error;

use crate::error::{BuildError, CallError, RestoreError, SnapshotError};

/// Where in a script something happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Line and column, if they are known.
    pub position: Option<Position>,
    /// The script's functions that were being called, the innermost first; not all where they were many.
    pub calls: Vec<String>,
}

/// How many functions are told in a message.
const TOLD: usize = 4;

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(position) = &self.position {
            write!(f, " at {position}")?;
        }
        for (n, name) in self.calls.iter().take(TOLD).enumerate() {
            let how = if n == 0 { " in" } else { ", called by" };
            write!(f, "{how} {name}")?;
        }
        Ok(())
    }
}

/// A script did not load, or a call gave no value.
///
/// After [`ScriptError::Call`] the sandbox may be poisoned ([`crate::Status`]); after the others it can be
/// called again.
#[derive(Debug, Error)]
pub enum ScriptError {
    /// The sandbox can't be made.
    #[error(transparent)]
    Build(Box<BuildError>),
    /// The sandbox failed: a time-out, a kill, no memory, no stack.
    #[error(transparent)]
    Call(Box<CallError>),
    /// No snapshot.
    #[error(transparent)]
    Snapshot(Box<SnapshotError>),
    /// No restore.
    #[error(transparent)]
    Restore(Box<RestoreError>),
    /// The file is no text.
    #[error("The script is not UTF-8")]
    NotText,
    /// The text is no script.
    #[error("The script can't be compiled: {message}{place}")]
    Parse {
        /// Why.
        message: String,
        /// Where.
        place: Place,
    },
    /// It defines no function of this name.
    #[error("The script defines no function {0:?}")]
    NoFunction(String),
    /// The function takes another number of arguments.
    #[error("{name} takes {} arguments, and {given} were given", or(.takes))]
    Arity {
        /// The function.
        name: String,
        /// How many it takes, for each that has this name.
        takes: Vec<u32>,
        /// How many were given.
        given: u32,
    },
    /// An argument can't be a script's value.
    #[error("Wrong argument: {0}")]
    Argument(#[from] ValueError),
    /// The value can't be the type that was asked for.
    #[error("{of} returned a value of type {found}, and {wanted} was asked for: {source}")]
    Result {
        /// The function.
        of: String,
        /// What was asked for.
        wanted: &'static str,
        /// What it returned.
        found: &'static str,
        /// How they differ.
        source: ValueError,
    },
    /// The value can't leave the script.
    #[error("The script's value can't be passed: {0}")]
    Value(String),
    /// It threw, and caught it nowhere.
    #[error("The script threw{place}: {value}")]
    Thrown {
        /// What.
        value: Value,
        /// Where.
        place: Place,
    },
    /// It did what the language doesn't allow: an unknown name, a wrong type, an index out of bounds, a
    /// division by zero.
    #[error("The script failed{place}: {message}")]
    Runtime {
        /// What.
        message: String,
        /// Where.
        place: Place,
    },
    /// It reached one of its limits.
    #[error("The script was ended{place}: {limit}")]
    Limit {
        /// Which.
        limit: Limit,
        /// Where.
        place: Place,
    },
    /// It called a function that was granted when the snapshot's script was made, and isn't now.
    #[error("The script called {name}{place}, which it isn't granted any more")]
    NotGranted {
        /// The function.
        name: String,
        /// Where.
        place: Place,
    },
    /// A granted function that it called failed, or takes other arguments.
    #[error("The host function {name}, called by the script{place}: {message}")]
    Host {
        /// The function.
        name: String,
        /// Its message.
        message: String,
        /// Where.
        place: Place,
    },
    /// The sandbox holds no script, or one already: it is another guest's.
    #[error("The sandbox is not one that a script can be called in")]
    State,
}

fn or(numbers: &[u32]) -> String {
    let numbers: Vec<_> = numbers.iter().map(ToString::to_string).collect();
    numbers.join(" or ")
}

macro_rules! boxed {
    ($($variant:ident: $error:ty;)*) => {$(
        impl From<$error> for ScriptError {
            fn from(error: $error) -> Self {
                Self::$variant(Box::new(error))
            }
        }
    )*};
}

boxed! {
    Build: BuildError;
    Call: CallError;
    Snapshot: SnapshotError;
    Restore: RestoreError;
}

impl From<Ended> for ScriptError {
    fn from(ended: Ended) -> Self {
        let Ended {
            why,
            position,
            calls,
        } = ended;
        let place = Place { position, calls };
        match why {
            Refusal::Parse(message) => Self::Parse { message, place },
            Refusal::NoScript | Refusal::Loaded => Self::State,
            Refusal::NoFunction(name) => Self::NoFunction(name),
            Refusal::Arity { name, takes, given } => Self::Arity { name, takes, given },
            Refusal::Thrown(value) => Self::Thrown { value, place },
            Refusal::Runtime(message) => Self::Runtime { message, place },
            Refusal::Limit(limit) => Self::Limit { limit, place },
            Refusal::NotGranted(name) => Self::NotGranted { name, place },
            Refusal::Host { name, message } => Self::Host {
                name,
                message,
                place,
            },
            Refusal::Value(why) => Self::Value(why),
        }
    }
}
