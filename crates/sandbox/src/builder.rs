//! How a sandbox is asked for.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skerry_sandbox_abi::Description;

use crate::debug::{Aids, DebugListener};
use crate::error::BuildError;
use crate::host_fn::{HostFn, HostFunctions};
use crate::processor::Backend;
use crate::sandbox::{Sandbox, Start};
use crate::versions::Versions;

/// Sizes in bytes, and limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The guest's heap.
    pub heap: u64,
    /// The guest's stack.
    pub stack: u64,
    /// The area for arguments and replies of host functions.
    pub input: u64,
    /// The area for results and arguments of host functions.
    pub output: u64,
    /// The area for log records between two exits.
    pub log: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            heap: 1 << 20,
            stack: 256 << 10,
            input: 1 << 20,
            output: 1 << 20,
            log: 16 << 10,
        }
    }
}

/// Where a guest's program comes from.
#[derive(Clone, Debug)]
pub enum Guest {
    /// A file.
    Path(PathBuf),
    /// Its bytes.
    Bytes(Arc<[u8]>),
}

impl Guest {
    /// Its bytes.
    pub(crate) fn read(self) -> Result<Arc<[u8]>, BuildError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::Path(path) => match std::fs::read(&path) {
                Ok(bytes) => Ok(bytes.into()),
                Err(source) => Err(BuildError::Read { path, source }),
            },
        }
    }
}

impl From<&str> for Guest {
    fn from(path: &str) -> Self {
        Self::Path(path.into())
    }
}

impl From<PathBuf> for Guest {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

impl From<&std::path::Path> for Guest {
    fn from(path: &std::path::Path) -> Self {
        Self::Path(path.into())
    }
}

impl From<Vec<u8>> for Guest {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}

impl From<Arc<[u8]>> for Guest {
    fn from(bytes: Arc<[u8]>) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<&[u8]> for Guest {
    fn from(bytes: &[u8]) -> Self {
        Self::Bytes(bytes.into())
    }
}

/// Limits of each call; none unless asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) timeout: Option<Duration>,
    pub(crate) cpu_time: Option<Duration>,
    pub(crate) instructions: Option<u64>,
}

/// How long a guest may initialise itself, unless told.
const INIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes a [`Sandbox`].
#[derive(Debug)]
#[must_use]
pub struct Builder {
    guest: Option<Guest>,
    backend: Backend,
    config: Config,
    limits: Limits,
    init_timeout: Duration,
    functions: HostFunctions,
    log_level: Option<tracing::Level>,
    gdb: Option<DebugListener>,
    aids: Aids,
    versions: Versions,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            guest: None,
            backend: Backend::default(),
            config: Config::default(),
            limits: Limits::default(),
            init_timeout: INIT_TIMEOUT,
            functions: HostFunctions::default(),
            log_level: None,
            gdb: None,
            aids: Aids::default(),
            versions: Versions::default(),
        }
    }
}

impl Builder {
    /// The guest's program: a path or its bytes.
    pub fn guest(mut self, guest: impl Into<Guest>) -> Self {
        self.guest = Some(guest.into());
        self
    }

    /// Which backend runs it; the best that works here unless told.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// All sizes at once.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Bytes of heap (1 MiB unless told).
    pub fn heap(mut self, bytes: u64) -> Self {
        self.config.heap = bytes;
        self
    }

    /// Bytes of stack (256 KiB unless told).
    pub fn stack(mut self, bytes: u64) -> Self {
        self.config.stack = bytes;
        self
    }

    /// Bytes for the arguments of a call, and for its result (1 MiB each unless told). Memory is taken
    /// only for what is used.
    pub fn buffers(mut self, bytes: u64) -> Self {
        self.config.input = bytes;
        self.config.output = bytes;
        self
    }

    /// A function that the guest can call.
    pub fn host_fn<A, F: HostFn<A>>(mut self, name: &str, function: F) -> Self {
        self.functions.add(name, function);
        self
    }

    /// Functions that the guest can call, shared between sandboxes; adds to those there are.
    pub fn host_functions(mut self, functions: &HostFunctions) -> Self {
        self.functions.extend(functions);
        self
    }

    /// How long a call may take; the guest is stopped then, and the sandbox is poisoned.
    pub fn call_timeout(mut self, timeout: Duration) -> Self {
        self.limits.timeout = Some(timeout);
        self
    }

    /// How long the guest may take to initialise itself (10 s unless told).
    pub fn init_timeout(mut self, timeout: Duration) -> Self {
        self.init_timeout = timeout;
        self
    }

    /// How much processor time a call may take.
    pub fn call_cpu_time(mut self, time: Duration) -> Self {
        self.limits.cpu_time = Some(time);
        self
    }

    /// How many instructions a call may take: the same number each time, whatever else the host does. Only
    /// `soft` counts them; a little more than that may run, see
    /// [`BUDGET_SLACK`](skerry_hypervisor::traits::BUDGET_SLACK).
    pub fn call_instructions(mut self, instructions: u64) -> Self {
        self.limits.instructions = Some(instructions);
        self
    }

    /// The least severe level of the guest's log that is wanted. What the program's own `tracing`
    /// subscriber wants, unless told.
    pub fn log_level(mut self, level: Option<tracing::Level>) -> Self {
        self.log_level = level;
        self
    }

    /// Waits for a debugger, and stops before the guest's first instruction. As
    /// [`Sandbox::debug`] does for a sandbox that there is.
    pub fn gdb(mut self, listener: DebugListener) -> Self {
        self.gdb = Some(listener);
        self
    }

    /// Writes a core dump of each crash into this folder, `core.PROCESS.NUMBER`: faults, panics, a full
    /// heap, what breaks the interface, and calls that take too long.
    pub fn core_dumps(mut self, folder: impl Into<PathBuf>) -> Self {
        self.aids.core_dumps = Some(folder.into());
        self
    }

    /// Counts the guest's allocations by who makes them: [`Sandbox::allocation_profile`].
    pub fn profile_allocations(mut self) -> Self {
        self.aids.profile = Some(Box::default());
        self
    }

    /// The versions of the interface that it offers.
    #[cfg(test)]
    pub(crate) fn versions(mut self, versions: Versions) -> Self {
        self.versions = versions;
        self
    }

    /// Makes it: loads the guest and runs it until it is ready.
    pub fn build(self) -> Result<Sandbox, BuildError> {
        self.start(true)
    }

    /// What the guest has and needs, without its host functions: it is run until it is ready, and no more.
    pub fn describe(self) -> Result<Description, BuildError> {
        Ok(self.start(false)?.description())
    }

    fn start(self, link: bool) -> Result<Sandbox, BuildError> {
        let program = self.guest.ok_or(BuildError::NoGuest)?.read()?;
        let level = self
            .log_level
            .map_or_else(crate::logs::wanted, crate::logs::number);
        let start = Start {
            backend: self.backend,
            config: self.config,
            limits: self.limits,
            init_timeout: self.init_timeout,
            functions: Arc::new(self.functions),
            log_level: level,
            gdb: self.gdb,
            aids: self.aids,
            link,
            versions: self.versions,
        };
        Sandbox::load(&program, start)
    }
}
