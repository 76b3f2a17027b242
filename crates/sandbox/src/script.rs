//! Scripts, each in a sandbox of its own: the engine is inside.
//!
//! ```no_run
//! use skerry_sandbox::script::{Grants, Script};
//!
//! let grants = Grants::new()
//!     .function("price", |item: String| item.len() as f64 * 2.5)
//!     .print(|line| println!("{line}"));
//! let mut script = Script::builder()
//!     .source("let sold = 0; fn sell(item) { sold += 1; price(item) * 1.2 }")
//!     .grants(&grants)
//!     .build()?;
//! script.run::<()>()?;
//! let price: f64 = script.call("sell", ("pear",))?;
//! let snapshot = script.snapshot()?;
//! let mut other = Script::from_snapshot(&snapshot, &grants)?;
//! assert_eq!(other.eval::<u32>("sold")?, 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The guest is `guest/sandbox-rt/guests/script`, the engine Rhai, which comes with this crate. A script is
//! limited by it and shut in by the sandbox: what breaks out of the one is in the other.
//!
//! A script can do nothing but compute, unless it is granted more: it calls a function of [`Grants`] as it
//! calls its own, and catches its errors like any. There are no files, no sockets, no modules, no clock.
//!
//! Values pass by `serde`: whatever can be serialised is an argument, whatever can be deserialised a result.
//! [`Value`] is for those whose type is known only when they are there.

mod arguments;
mod error;
mod grants;

use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use skerry_sandbox_abi::script::Outcome;
use skerry_sandbox_abi::{Decode, Encode, Reader, Writer};

use crate::builder::{Builder, Guest};
use crate::error::BuildError;
use crate::processor::Backend;
use crate::sandbox::Sandbox;
use crate::snapshot::Snapshot;

pub use arguments::ScriptArguments;
pub use error::{Place, ScriptError};
pub use grants::{Grants, ScriptFn};
pub use skerry_sandbox_abi::script::{
    DEPTH, Defined, Limit, Limits, Position, Value, ValueError, from_value, to_value,
};

/// The guest's program.
static GUEST: &[u8] = include_bytes!("../../../guest/sandbox-rt/guests/script/script-x86_64");

/// The guest's program, to be run as any other guest.
pub fn guest() -> &'static [u8] {
    GUEST
}

/// Makes a [`Script`].
#[derive(Debug)]
#[must_use]
pub struct ScriptBuilder {
    source: Option<Guest>,
    grants: Grants,
    sandbox: Builder,
    limits: Limits,
    buffers: u64,
}

impl Default for ScriptBuilder {
    fn default() -> Self {
        /// The engine with its functions takes 1 MiB of it.
        const HEAP: u64 = 32 << 20;
        /// What the limits of [`Limits::default`] allow takes half of it.
        const STACK: u64 = 4 << 20;
        Self {
            source: None,
            grants: Grants::new(),
            sandbox: Sandbox::builder().heap(HEAP).stack(STACK),
            limits: Limits::default(),
            buffers: 1 << 20,
        }
    }
}

impl ScriptBuilder {
    /// The script's text.
    pub fn source(mut self, text: impl Into<String>) -> Self {
        self.source = Some(Guest::from(text.into().into_bytes()));
        self
    }

    /// The file with the script's text.
    pub fn path(mut self, path: impl AsRef<std::path::Path>) -> Self {
        self.source = Some(Guest::from(path.as_ref()));
        self
    }

    /// What the script may do, besides computing; adds to what was granted before. These are the names that
    /// it can call, also when it is made of a snapshot.
    pub fn grants(mut self, grants: &Grants) -> Self {
        self.grants = self.grants.and(grants);
        self
    }

    /// Which backend runs it; the best that works here unless told.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.sandbox = self.sandbox.backend(backend);
        self
    }

    /// What the script may use; [`Limits::default`] unless told. It can be called again after it has reached
    /// one. Sizes are looked at where the engine makes or changes a value as a whole; what is never more
    /// is [`ScriptBuilder::heap`].
    ///
    /// Calls and nesting take stack: with more than the default, see [`ScriptBuilder::stack`].
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Counts what the script does and ends a call that does more than this, with [`Limit::Operations`]; a
    /// simple expression is about one. Unlike a time-out, it is the same every time and the script can be
    /// called again. Not counted unless told: it costs speed.
    pub fn operations(mut self, each_call: u64) -> Self {
        self.limits.operations = Some(each_call);
        self
    }

    /// How long a call may take; see [`Builder::call_timeout`].
    pub fn call_timeout(mut self, timeout: Duration) -> Self {
        self.sandbox = self.sandbox.call_timeout(timeout);
        self
    }

    /// How much processor time a call may take; see [`Builder::call_cpu_time`].
    pub fn call_cpu_time(mut self, time: Duration) -> Self {
        self.sandbox = self.sandbox.call_cpu_time(time);
        self
    }

    /// Bytes for engine, script and all of its values together (32 MiB unless told); taken only as they are
    /// used. A script that needs more ends with [`crate::CallError::OutOfMemory`].
    pub fn heap(mut self, bytes: u64) -> Self {
        self.sandbox = self.sandbox.heap(bytes);
        self
    }

    /// Bytes of stack (4 MiB unless told); taken only as they are used.
    pub fn stack(mut self, bytes: u64) -> Self {
        self.sandbox = self.sandbox.stack(bytes);
        self
    }

    /// Bytes for the arguments of a call, and for its result (1 MiB each, and room for the script, unless
    /// told).
    pub fn buffers(mut self, bytes: u64) -> Self {
        self.buffers = bytes;
        self
    }

    /// Makes it: starts the guest, and compiles the script. Nothing of the script is run. A time-out is for
    /// this as for each call.
    pub fn build(self) -> Result<Script, ScriptError> {
        let source = self.source.ok_or(BuildError::NoGuest)?.read()?;
        let source = std::str::from_utf8(&source).map_err(|_| ScriptError::NotText)?;
        /// For what goes with the text.
        const FRAME: u64 = 64 << 10;
        let granted = self.grants.granted();
        let sandbox = self
            .sandbox
            .guest(GUEST)
            .host_functions(self.grants.functions())
            .buffers(self.buffers.max(source.len() as u64 + FRAME))
            .build()?;
        let mut script = Script { sandbox };
        script.ask::<()>("load", 3, |out| {
            source.encode(out);
            self.limits.encode(out);
            granted.as_slice().encode(out);
        })?;
        Ok(script)
    }
}

/// A script in a sandbox.
#[derive(Debug)]
pub struct Script {
    sandbox: Sandbox,
}

impl Script {
    /// Begins one.
    pub fn builder() -> ScriptBuilder {
        ScriptBuilder::default()
    }

    /// Makes one that is what `snapshot` was when it was taken: nothing is compiled or run. Limits are
    /// those of the one it was taken of, and so are the names that it can call; what they do is what
    /// `grants` says. One that isn't granted any more throws [`ScriptError::NotGranted`] when it is called.
    pub fn from_snapshot(snapshot: &Arc<Snapshot>, grants: &Grants) -> Result<Self, ScriptError> {
        Self::from_snapshot_on(snapshot, grants, Backend::Auto)
    }

    /// As [`Script::from_snapshot`], on this backend.
    pub fn from_snapshot_on(
        snapshot: &Arc<Snapshot>,
        grants: &Grants,
        backend: Backend,
    ) -> Result<Self, ScriptError> {
        let sandbox = Sandbox::from_snapshot_on(snapshot, grants.functions(), backend)?;
        Ok(Self { sandbox })
    }

    /// The sandbox that it is in: its status, metrics, limits, interrupt handle.
    pub fn sandbox(&mut self) -> &mut Sandbox {
        &mut self.sandbox
    }

    /// Keeps what it is now.
    pub fn snapshot(&mut self) -> Result<Arc<Snapshot>, ScriptError> {
        Ok(self.sandbox.snapshot()?)
    }

    /// Goes back to what `snapshot` kept.
    pub fn restore(&mut self, snapshot: &Arc<Snapshot>) -> Result<(), ScriptError> {
        Ok(self.sandbox.restore(snapshot)?)
    }

    fn ask<T>(
        &mut self,
        function: &str,
        count: u32,
        put: impl FnOnce(&mut Writer<'_>),
    ) -> Result<T, ScriptError>
    where
        T: for<'a> Decode<'a>,
    {
        let encode = |out: &mut Writer<'_>| {
            out.put(&count.to_le_bytes());
            put(out);
        };
        let decode = |from: &mut Reader<'_>| {
            let outcome = Outcome::<T>::decode(from)?;
            from.end()?;
            Ok(outcome)
        };
        let Outcome(outcome) = self.sandbox.call_with(function, encode, decode)?;
        Ok(outcome?)
    }

    /// The functions that can be called from outside, by name.
    pub fn functions(&mut self) -> Result<Vec<Defined>, ScriptError> {
        self.ask("functions", 0, |_| ())
    }

    /// Runs the script from the start: its variables are new ones. The value is that of its last expression,
    /// or what it gave to `return` or `exit`.
    pub fn run<R: DeserializeOwned>(&mut self) -> Result<R, ScriptError> {
        result("the script", self.run_value()?)
    }

    /// As [`Script::run`], for a value of any type.
    pub fn run_value(&mut self) -> Result<Value, ScriptError> {
        self.ask("run", 0, |_| ())
    }

    /// Runs more text, which sees and may change the variables that there are; variables and functions of its
    /// own stay. The value is that of its last expression.
    pub fn eval<R: DeserializeOwned>(&mut self, source: &str) -> Result<R, ScriptError> {
        result("the text", self.eval_value(source)?)
    }

    /// As [`Script::eval`], for a value of any type.
    pub fn eval_value(&mut self, source: &str) -> Result<Value, ScriptError> {
        self.ask("eval", 1, |out| source.encode(out))
    }

    /// Calls a function that the script defines. It sees and may change the script's variables, if the script
    /// was run; they stay as they are for the next call, also when it throws. A time-out, a kill or an
    /// error of the sandbox's needs a [`Script::restore`].
    pub fn call<R: DeserializeOwned>(
        &mut self,
        name: &str,
        arguments: impl ScriptArguments,
    ) -> Result<R, ScriptError> {
        let arguments = arguments.values()?;
        result(name, self.call_values(name, arguments.as_ref())?)
    }

    /// As [`Script::call`], for values of any type.
    pub fn call_values(&mut self, name: &str, arguments: &[Value]) -> Result<Value, ScriptError> {
        self.ask("call", 2, |out| {
            name.encode(out);
            arguments.encode(out);
        })
    }

    /// The operations that the last run or call took; 0 where they are not counted.
    pub fn operations_used(&mut self) -> Result<u64, ScriptError> {
        self.ask("operations", 0, |_| ())
    }
}

fn result<R: DeserializeOwned>(of: &str, value: Value) -> Result<R, ScriptError> {
    let found = value.kind();
    from_value(value).map_err(|source| ScriptError::Result {
        of: of.to_owned(),
        wanted: std::any::type_name::<R>(),
        found,
        source,
    })
}
