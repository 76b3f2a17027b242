//! What modules and components have in common: limits of theirs and of the sandbox around them, calls of
//! the guest, snapshots.

use skerry_sandbox_abi::wasm::Outcome;
use skerry_sandbox_abi::{Decode, Reader, Writer};

use super::WasmError;
use crate::sandbox::Sandbox;

/// Asks the guest for something that it may refuse: `count` arguments, which `put` encodes.
pub(crate) fn ask<T>(
    sandbox: &mut Sandbox,
    function: &str,
    count: u32,
    put: impl FnOnce(&mut Writer<'_>),
) -> Result<T, WasmError>
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
    let Outcome(outcome) = sandbox.call_with(function, encode, decode)?;
    Ok(outcome?)
}

/// Methods of a builder that has `sandbox`, `limits` and `heap`.
macro_rules! options {
    () => {
        /// What it may do, besides computing; adds to what was granted before.
        pub fn grants(mut self, grants: &Grants) -> Self {
            self.sandbox = self.sandbox.host_functions(grants.functions());
            self
        }

        /// Which backend runs it; the best that works here unless told.
        pub fn backend(mut self, backend: Backend) -> Self {
            self.sandbox = self.sandbox.backend(backend);
            self
        }

        /// Bytes that its memory may grow to (16 MiB unless told); a component's memories together.
        pub fn memory(mut self, bytes: u64) -> Self {
            self.limits.memory = bytes;
            self
        }

        /// Counts what it does and ends a call that does more than this, with
        /// [`Trap::OutOfFuel`](skerry_sandbox_abi::wasm::Trap::OutOfFuel); a simple instruction is about
        /// one. Unlike a time-out, it is the same every time. Not counted unless told: it costs speed.
        pub fn fuel(mut self, each_call: u64) -> Self {
            self.limits.fuel = Some(each_call);
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

        /// Bytes for engine, compiled code and memory together. Enough for the code and the memory that
        /// it may have, unless told; taken only as it is used.
        pub fn heap(mut self, bytes: u64) -> Self {
            self.heap = Some(bytes);
            self
        }
    };
}

/// Methods of what is in a field `sandbox`.
macro_rules! sandboxed {
    () => {
        /// Makes one that is what `snapshot` was when it was taken: nothing is compiled or loaded. Limits
        /// are those of the one it was taken of.
        pub fn from_snapshot(snapshot: &Arc<Snapshot>, grants: &Grants) -> Result<Self, WasmError> {
            Self::from_snapshot_on(snapshot, grants, Backend::Auto)
        }

        /// As `from_snapshot`, on this backend.
        pub fn from_snapshot_on(
            snapshot: &Arc<Snapshot>,
            grants: &Grants,
            backend: Backend,
        ) -> Result<Self, WasmError> {
            let sandbox = Sandbox::from_snapshot_on(snapshot, grants.functions(), backend)?;
            Ok(Self { sandbox })
        }

        /// The sandbox that it is in: its status, metrics, limits, interrupt handle.
        pub fn sandbox(&mut self) -> &mut Sandbox {
            &mut self.sandbox
        }

        /// Keeps what it is now.
        pub fn snapshot(&mut self) -> Result<Arc<Snapshot>, WasmError> {
            Ok(self.sandbox.snapshot()?)
        }

        /// Goes back to what `snapshot` kept.
        pub fn restore(&mut self, snapshot: &Arc<Snapshot>) -> Result<(), WasmError> {
            Ok(self.sandbox.restore(snapshot)?)
        }

        /// The fuel that the last call used.
        pub fn fuel_used(&mut self) -> Result<u64, WasmError> {
            self.ask("fuel_used", 0, |_| ())
        }

        fn ask<T>(
            &mut self,
            function: &str,
            count: u32,
            put: impl FnOnce(&mut Writer<'_>),
        ) -> Result<T, WasmError>
        where
            T: for<'a> Decode<'a>,
        {
            ask(&mut self.sandbox, function, count, put)
        }
    };
}

pub(crate) use {options, sandboxed};
