//! What a module may do besides computing.

use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use rustix::time::{ClockId, clock_gettime};
use skerry_sandbox_abi::wasm::wasi;

use crate::host_fn::{HostFn, HostFunctions};

/// Capabilities of modules; cheap to clone, to be used for many. Nothing unless granted.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Grants(Arc<HostFunctions>);

impl Grants {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    fn add<A, F: HostFn<A>>(mut self, name: &str, function: F) -> Self {
        Arc::make_mut(&mut self.0).add(name, function);
        self
    }

    /// The host functions that they are.
    pub fn functions(&self) -> &Arc<HostFunctions> {
        &self.0
    }

    /// A function that modules import as `name` from `module`, on `i32`, `i64`, `f32` and `f64` with at
    /// most one result.
    pub fn import<A, F: HostFn<A>>(self, module: &str, name: &str, function: F) -> Self {
        self.add(&format!("{module}.{name}"), function)
    }

    /// What a program writes to its standard output (descriptor 1), at most 64 KiB at a time.
    pub fn stdout(self, write: impl Fn(Vec<u8>) + Send + Sync + 'static) -> Self {
        self.add(wasi::STDOUT, write)
    }

    /// What a program writes to its standard error (descriptor 2).
    pub fn stderr(self, write: impl Fn(Vec<u8>) + Send + Sync + 'static) -> Self {
        self.add(wasi::STDERR, write)
    }

    /// What a program reads from its standard input (descriptor 0): at most so many bytes each time,
    /// none at its end.
    pub fn stdin(self, read: impl Fn(u32) -> Vec<u8> + Send + Sync + 'static) -> Self {
        self.add(wasi::STDIN, read)
    }

    /// The host's clocks.
    pub fn clock(self) -> Self {
        self.clock_with(|clock| {
            let id = match clock {
                0 => ClockId::Realtime,
                1 => ClockId::Monotonic,
                2 => ClockId::ProcessCPUTime,
                _ => ClockId::ThreadCPUTime,
            };
            let time = clock_gettime(id);
            (time.tv_sec as u64)
                .wrapping_mul(1_000_000_000)
                .wrapping_add(time.tv_nsec as u64)
        })
    }

    /// Clocks of your own, in nanoseconds: 0 is the time of day since 1970, 1 is monotonic, 2 and 3 are
    /// processor time.
    pub fn clock_with(self, now: impl Fn(u32) -> u64 + Send + Sync + 'static) -> Self {
        self.add(wasi::CLOCK, now)
    }

    /// Random bytes of the host's.
    pub fn random(self) -> Self {
        self.random_with(|len| {
            let mut bytes = vec![0; len as usize];
            let mut filled = 0;
            // A module asks for 4 KiB at most, but a guest may ask for anything: the reply then does not
            // fit its area.
            while let Some(room) = bytes.get_mut(filled..).filter(|room| !room.is_empty()) {
                match getrandom(room, GetRandomFlags::empty()) {
                    Ok(count) => filled += count,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.to_string()),
                }
            }
            Ok(bytes)
        })
    }

    /// Bytes of your own for who asks for random ones: exactly as many as are asked for.
    pub fn random_with(
        self,
        fill: impl Fn(u32) -> Result<Vec<u8>, String> + Send + Sync + 'static,
    ) -> Self {
        let fill = move |len: u32| match len {
            0..=RANDOM_MAX => fill(len),
            _ => Err(format!("more than {RANDOM_MAX} bytes at once")),
        };
        self.add(wasi::RANDOM, fill)
    }

    /// A program's arguments, its name first.
    pub fn args<S: Into<String>>(self, args: impl IntoIterator<Item = S>) -> Self {
        let args: Vec<String> = args.into_iter().map(Into::into).collect();
        self.add(wasi::ARGS, move || args.clone())
    }

    /// A program's environment.
    pub fn env<N: AsRef<str>, V: AsRef<str>>(
        self,
        variables: impl IntoIterator<Item = (N, V)>,
    ) -> Self {
        let variables: Vec<String> = variables
            .into_iter()
            .map(|(name, value)| format!("{}={}", name.as_ref(), value.as_ref()))
            .collect();
        self.add(wasi::ENVIRON, move || variables.clone())
    }
}

/// What a hostile guest can make the host allocate.
const RANDOM_MAX: u32 = 4096;
