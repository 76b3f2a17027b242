//! A sandbox: calls, states, metrics.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use skerry_hypervisor::{Gpa, MemorySlot};
use skerry_sandbox_abi::{
    Arguments, Control, Decode, DecodeError, Description, Function, Reader, Writer, request, status,
};

use crate::builder::{Builder, Config, Limits};
use crate::debug::{Aids, DebugListener, Debugging, Watch};
use crate::elf::Program;
use crate::error::{BuildError, CallError};
use crate::host_fn::HostFunctions;
use crate::interrupt::{InterruptHandle, Shared};
use crate::layout::Layout;
use crate::logs::Spans;
use crate::mapping::Mappings;
use crate::processor::{self, Backend, Processor};
use crate::region::{ControlPage, Region};
use crate::snapshot::{Origin, Snapshot};
use crate::tables;
use crate::versions::Versions;
use crate::watchdog::Timer;

/// Whether a sandbox can be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// It can.
    Ready,
    /// A call ended in the middle of the guest: restore a snapshot to go on.
    Poisoned(String),
    /// A restore failed half way: drop it.
    Unrecoverable(String),
}

/// What a sandbox has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Calls of guest functions.
    pub calls: u64,
    /// Of which failed.
    pub failed: u64,
    /// Calls of host functions.
    pub host_calls: u64,
    /// Snapshots restored.
    pub restores: u64,
    /// Log records that made no sense.
    pub log_damaged: u64,
    /// Log records that the guest dropped, being larger than the log area.
    pub log_dropped: u64,
    /// Allocations that the guest says it has made.
    pub allocations: u64,
    /// Bytes that the guest says it has allocated.
    pub allocated: u64,
    /// The most that were at once.
    pub allocated_peak: u64,
    /// Why calls have failed.
    pub failures: Failures,
    /// Time of calls, the host functions that they call included: zero unless
    /// [`Sandbox::measure_time`] was asked for.
    pub time: Duration,
}

/// How many calls have failed, by kind. [`Metrics::failed`] is all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failures {
    /// The function returned an error.
    pub returned: u64,
    /// Other arguments or results than the function's, or too large.
    pub mismatched: u64,
    /// The guest panicked.
    pub panicked: u64,
    /// Its heap was full.
    pub out_of_memory: u64,
    /// It did what its memory or its rights don't allow.
    pub faults: u64,
    /// The call was killed.
    pub cancelled: u64,
    /// It took longer than it may, or more processor time or instructions.
    pub timed_out: u64,
    /// It broke the interface.
    pub misbehaved: u64,
    /// The backend failed, or a debugger.
    pub host: u64,
}

impl Failures {
    #[cold]
    fn count(&mut self, error: &CallError) {
        *match error {
            CallError::Failed(_) => &mut self.returned,
            CallError::NoFunction { .. }
            | CallError::Arity { .. }
            | CallError::ArgumentType { .. }
            | CallError::ReturnType { .. }
            | CallError::TooLarge { .. } => &mut self.mismatched,
            CallError::Panicked(_) => &mut self.panicked,
            CallError::OutOfMemory { .. } => &mut self.out_of_memory,
            CallError::Fault(_) => &mut self.faults,
            CallError::Cancelled => &mut self.cancelled,
            CallError::TimedOut(_) | CallError::CpuTime(_) | CallError::BudgetSpent(_) => {
                &mut self.timed_out
            }
            CallError::Misbehaved(_) => &mut self.misbehaved,
            CallError::Run(_)
            | CallError::State(_)
            | CallError::Budget(_)
            | CallError::Debugger(_)
            | CallError::Poisoned(_)
            | CallError::Unrecoverable(_) => &mut self.host,
        } += 1;
    }
}

/// What a guest has, shared by all sandboxes of a snapshot.
#[derive(Debug)]
pub(crate) struct Exports {
    pub(crate) description: Description,
    names: HashMap<String, u32>,
}

impl Exports {
    pub(crate) fn new(description: Description) -> Arc<Self> {
        let names = description.exports.iter().enumerate();
        let names = names.filter(|(_, function)| !function.name.is_empty());
        let names = names
            .map(|(n, function)| (function.name.clone(), n as u32))
            .collect();
        Arc::new(Self { description, names })
    }
}

/// A virtual machine that is called like a function. State stays between calls.
///
/// It may move between threads; one call runs at a time, on the caller's thread.
pub struct Sandbox {
    // The processor goes first: it uses the memory.
    pub(crate) processor: Box<dyn Processor>,
    pub(crate) region: Region,
    pub(crate) control: ControlPage,
    pub(crate) layout: Layout,
    pub(crate) exports: Arc<Exports>,
    pub(crate) functions: Arc<HostFunctions>,
    pub(crate) links: Vec<Option<usize>>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) timer: Option<Arc<Timer>>,
    pub(crate) limits: Limits,
    pub(crate) status: Status,
    pub(crate) metrics: Metrics,
    /// The guest's spans that are open.
    pub(crate) spans: Spans,
    pub(crate) mappings: Mappings,
    /// The debugger, if one is there or waited for.
    pub(crate) debug: Option<Box<Debugging>>,
    pub(crate) aids: Aids,
    /// What its memory differs from.
    pub(crate) origin: Origin,
    /// Whether nothing but plain snapshots ([`Snapshot::plain`](crate::Snapshot)) was set on its processor.
    pub(crate) plain: bool,
    /// Bytes of arguments of the request that is being answered.
    pub(crate) input_used: u64,
    /// Bytes at the start of the input area that the host has written since the origin.
    pub(crate) input_written: u64,
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox")
            .field("backend", &self.processor.backend())
            .field("status", &self.status)
            .field("memory", &self.layout.size)
            .finish_non_exhaustive()
    }
}

/// A number that is another each time it is asked for.
pub(crate) fn fresh_seed() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    if NEXT.load(Ordering::Relaxed) == 0 {
        let mut bytes = [0; 8];
        // Without entropy the numbers of two processes may be the same.
        let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
        let first = u64::from_le_bytes(bytes) | 1;
        let _ = NEXT.compare_exchange(0, first, Ordering::Relaxed, Ordering::Relaxed);
    }
    // SplitMix64.
    let mut z = NEXT.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

pub(crate) fn slot(region: &Region, layout: &Layout) -> MemorySlot {
    MemorySlot {
        gpa: Gpa(0),
        region: region.ram().clone(),
        offset: 0,
        len: layout.size as usize,
        read_only: false,
        log_dirty: true,
    }
}

/// How a sandbox is made of a program.
pub(crate) struct Start {
    pub(crate) backend: Backend,
    pub(crate) config: Config,
    pub(crate) limits: Limits,
    pub(crate) init_timeout: Duration,
    pub(crate) functions: Arc<HostFunctions>,
    pub(crate) log_level: u32,
    pub(crate) gdb: Option<DebugListener>,
    pub(crate) aids: Aids,
    /// Whether the host functions must be there.
    pub(crate) link: bool,
    pub(crate) versions: Versions,
}

/// The parts that a sandbox is made of.
pub(crate) struct Parts {
    pub(crate) processor: Box<dyn Processor>,
    pub(crate) region: Region,
    pub(crate) layout: Layout,
    pub(crate) functions: Arc<HostFunctions>,
    pub(crate) limits: Limits,
    pub(crate) exports: Arc<Exports>,
    pub(crate) links: Vec<Option<usize>>,
    pub(crate) origin: Origin,
}

impl Sandbox {
    /// Begins one.
    pub fn builder() -> Builder {
        Builder::default()
    }

    pub(crate) fn assemble(parts: Parts) -> Result<Self, BuildError> {
        let Parts {
            processor,
            mut region,
            layout,
            functions,
            limits,
            exports,
            links,
            origin,
        } = parts;
        let shared = Arc::new(Shared::new(processor.canceller()));
        let mut sandbox = Self {
            control: region.control(layout.control.at),
            processor,
            region,
            layout,
            exports,
            functions,
            links,
            shared,
            timer: None,
            limits: Limits::default(),
            status: Status::Ready,
            metrics: Metrics::default(),
            spans: Spans::default(),
            mappings: Mappings::default(),
            debug: None,
            aids: Aids::default(),
            origin,
            plain: true,
            input_used: 0,
            input_written: 0,
        };
        sandbox.limit(limits)?;
        Ok(sandbox)
    }

    /// Loads a program and runs it until it is ready.
    pub(crate) fn load(program: &[u8], start: Start) -> Result<Self, BuildError> {
        let Start {
            backend,
            config,
            limits,
            init_timeout,
            functions,
            log_level,
            gdb,
            aids,
            link,
            versions,
        } = start;
        let mut aids = aids;
        if let Some(profile) = &mut aids.profile {
            profile.set_program(program);
        }
        let program = Program::parse(program)?;
        let layout = Layout::new(&config, program.base, program.bytes.len() as u64)?;
        let mut region = Region::new(layout.size).map_err(BuildError::Memory)?;
        tables::build(&mut region, &layout, &program)?;
        let mut processor = processor::make(backend, slot(&region, &layout))?;
        processor.set_registers(&tables::entry_registers(&layout, program.entry))?;
        let written = program.bytes.len() as u64;
        let mut sandbox = Self::assemble(Parts {
            processor,
            region,
            layout,
            functions,
            limits: Limits {
                timeout: Some(init_timeout),
                ..Limits::default()
            },
            exports: Exports::new(Description::default()),
            links: Vec::new(),
            origin: Origin::empty(&layout, written),
        })?;
        sandbox
            .control
            .set_all(sandbox.first_control(&versions, log_level));
        sandbox.debug = gdb.map(Debugging::new);
        sandbox.aids = aids;
        sandbox.set_profiled();
        sandbox.introduce(&versions)?;
        if link {
            sandbox.links = sandbox.functions.link(&sandbox.exports.description)?;
        }
        sandbox.timer = None;
        sandbox.limit(limits)?;
        Ok(sandbox)
    }

    fn first_control(&self, versions: &Versions, log_level: u32) -> Control {
        let Layout {
            log,
            input,
            output,
            heap,
            ..
        } = self.layout;
        Control {
            version_min: versions.min(),
            version_max: versions.max(),
            log_level,
            input: input.gva,
            input_size: input.len,
            output: output.gva,
            output_size: output.len,
            log: log.gva,
            log_size: log.len,
            heap: heap.gva,
            heap_size: heap.len,
            seed: fresh_seed(),
            ..Control::default()
        }
    }

    /// Lets the guest initialise and describe itself.
    fn introduce(&mut self, versions: &Versions) -> Result<(), BuildError> {
        let init = |error| BuildError::Init(Box::new(error));
        self.enter().map_err(init)?;
        versions.check(self.control.version())?;
        self.control.set_request(request::DESCRIBE);
        self.control.set_input_len(0);
        self.enter().map_err(init)?;
        let description = match self.control.status() {
            status::OK => self.result_with(0, |from| {
                let description = Description::read(from)?;
                from.end()?;
                Ok(description)
            }),
            other => Err(CallError::Misbehaved(format!(
                "no description, but status {other}"
            ))),
        };
        let description = description.map_err(init)?;
        self.exports = Exports::new(description);
        Ok(())
    }

    /// Which backend runs it.
    pub fn backend(&self) -> Backend {
        self.processor.backend()
    }

    /// Whether it can be called.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// Its guest's functions, and the host functions that it uses.
    pub fn description(&self) -> Description {
        let mut description = self.exports.description.clone();
        description
            .exports
            .retain(|function| !function.name.is_empty());
        description
            .imports
            .retain(|function| !function.name.is_empty());
        description
    }

    /// The guest's memory in bytes: what it could use, not what it takes.
    pub fn memory_size(&self) -> u64 {
        self.layout.size
    }

    /// A handle that cancels calls, for any thread.
    pub fn interrupt_handle(&self) -> InterruptHandle {
        InterruptHandle(self.shared.clone())
    }

    /// How long each call may take from now on.
    pub fn set_call_timeout(&mut self, timeout: Option<Duration>) -> Result<(), BuildError> {
        self.limit(Limits {
            timeout,
            ..self.limits
        })
    }

    /// How much processor time each call may take from now on.
    pub fn set_call_cpu_time(&mut self, cpu_time: Option<Duration>) -> Result<(), BuildError> {
        self.limit(Limits {
            cpu_time,
            ..self.limits
        })
    }

    /// How many instructions each call may take from now on. Only `soft` counts them.
    pub fn set_call_instructions(&mut self, instructions: Option<u64>) -> Result<(), BuildError> {
        self.limit(Limits {
            instructions,
            ..self.limits
        })
    }

    /// Instructions that the guest has run since calls were first limited in them; `None` before that.
    pub fn instructions(&self) -> Option<u64> {
        self.processor.instructions()
    }

    fn limit(&mut self, limits: Limits) -> Result<(), BuildError> {
        if limits.instructions != self.limits.instructions {
            self.processor.set_budget(limits.instructions)?;
        }
        let timed = limits.timeout.is_some() || limits.cpu_time.is_some();
        if timed && self.timer.is_none() {
            let timer = Timer::new(self.shared.clone()).map_err(BuildError::Memory)?;
            self.timer = Some(timer);
        }
        self.limits = limits;
        Ok(())
    }

    /// What it has counted, and what the guest says of its heap.
    pub fn metrics(&self) -> Metrics {
        Metrics {
            log_dropped: self.control.log_dropped().into(),
            allocations: self.control.allocations(),
            allocated: self.control.allocated(),
            allocated_peak: self.control.allocated_peak(),
            ..self.metrics
        }
    }

    /// Calls a function of the guest's.
    ///
    /// What the guest changes in its memory stays for the next call. Errors that its function returns, and
    /// wrong arguments, leave it as it is; a panic, a fault, a limit or a kill poison it.
    pub fn call<R>(&mut self, name: &str, arguments: impl Arguments) -> Result<R, CallError>
    where
        R: for<'a> Decode<'a>,
    {
        self.call_with(
            name,
            |out| arguments.encode_all(out),
            |from| {
                let value = R::decode(from)?;
                from.end()?;
                Ok(value)
            },
        )
    }

    /// Calls a function whose types are known only now: `encode` appends the arguments, their number
    /// first, as [`Arguments`] does; `decode` takes the value, which may be borrowed from the
    /// guest's memory as long as it runs.
    ///
    /// With a `tracing` subscriber that wants it, each call is a span `call` of the target
    /// `skerry_sandbox::call` at the level `TRACE`, with the function's name, and with the duration in
    /// microseconds and the error at its end; the guest's own events are in it.
    pub fn call_with<R>(
        &mut self,
        name: &str,
        encode: impl FnOnce(&mut Writer<'_>),
        decode: impl FnOnce(&mut Reader<'_>) -> Result<R, DecodeError>,
    ) -> Result<R, CallError> {
        let watch = Watch::begin(name, self.aids.measures());
        let ended = self.call_unwatched(name, encode, decode);
        if let Some(watch) = watch {
            let error = ended.as_ref().err();
            self.metrics.time += watch.end(error);
        }
        ended
    }

    #[inline]
    fn call_unwatched<R>(
        &mut self,
        name: &str,
        encode: impl FnOnce(&mut Writer<'_>),
        decode: impl FnOnce(&mut Reader<'_>) -> Result<R, DecodeError>,
    ) -> Result<R, CallError> {
        self.check()?;
        let function = match self.exports.names.get(name) {
            Some(function) => *function,
            None => return Err(self.no_function(name)),
        };
        let area = self.layout.input;
        let room = self.region.bytes_mut(area.at, area.len).unwrap_or_default();
        let mut out = Writer::new(room);
        encode(&mut out);
        let len = match out.finish() {
            Ok(len) => len as u64,
            Err(size) => return Err(self.too_large("arguments", function, size as u64, area.len)),
        };
        self.input_used = len;
        self.note_input(len);
        self.control.set_request(request::CALL);
        self.control.set_function(function);
        self.control.set_input_len(len as u32);
        self.metrics.calls += 1;
        // If a host function panics, this is what stays.
        self.status = Status::Poisoned(String::new());
        if let Err(error) = self.enter() {
            self.metrics.failed += 1;
            self.metrics.failures.count(&error);
            self.status = Status::Poisoned(error.to_string());
            return Err(error);
        }
        self.status = Status::Ready;
        let ended = match self.control.status() {
            status::OK => self.result_with(function, decode),
            other => Err(self.refused(function, other)),
        };
        if let Err(error) = &ended {
            self.metrics.failed += 1;
            self.metrics.failures.count(error);
        }
        ended
    }

    /// Whether a call may begin.
    fn check(&self) -> Result<(), CallError> {
        match &self.status {
            Status::Ready => Ok(()),
            Status::Poisoned(why) if why.is_empty() => {
                Err(CallError::Poisoned("a host function panicked".into()))
            }
            Status::Poisoned(why) => Err(CallError::Poisoned(why.clone())),
            Status::Unrecoverable(why) => Err(CallError::Unrecoverable(why.clone())),
        }
    }

    /// The host has written so much of the input area.
    #[inline]
    pub(crate) fn note_input(&mut self, end: u64) {
        self.input_written = self.input_written.max(end);
    }

    fn export(&self, function: u32) -> Option<&Function> {
        self.exports.description.exports.get(function as usize)
    }

    fn signature(&self, function: u32) -> String {
        self.export(function)
            .map_or_else(String::new, ToString::to_string)
    }

    #[cold]
    fn no_function(&self, name: &str) -> CallError {
        let mut known: Vec<&str> = self.exports.names.keys().map(String::as_str).collect();
        known.sort_unstable();
        CallError::NoFunction {
            name: name.to_owned(),
            known: known.join(", "),
        }
    }

    #[cold]
    fn too_large(&self, what: &'static str, function: u32, size: u64, area: u64) -> CallError {
        CallError::TooLarge {
            what,
            function: self.signature(function),
            size,
            area,
        }
    }

    /// What the guest has put into the output area.
    fn output(&self) -> Result<&[u8], CallError> {
        let area = self.layout.output;
        let len = u64::from(self.control.output_len());
        let bytes = (len <= area.len)
            .then(|| self.region.bytes(area.at, len))
            .flatten();
        bytes.ok_or_else(|| CallError::Misbehaved("its result lies outside of its area".into()))
    }

    #[inline]
    fn result_with<R>(
        &mut self,
        function: u32,
        decode: impl FnOnce(&mut Reader<'_>) -> Result<R, DecodeError>,
    ) -> Result<R, CallError> {
        let mut from = Reader::new(self.output()?);
        decode(&mut from).map_err(|source| match source {
            DecodeError::Malformed(why) => CallError::Misbehaved(format!("its result: {why}")),
            source => CallError::ReturnType {
                function: self.signature(function),
                source,
            },
        })
    }

    /// Why the guest answered with another status.
    #[cold]
    fn refused(&mut self, function: u32, how: u32) -> CallError {
        let detail = self.control.detail();
        let given = self.arguments_given();
        let signature = self.signature(function);
        let output = self.output().unwrap_or_default();
        let mut from = Reader::new(output);
        let mut text = || String::decode(&mut from).unwrap_or_default();
        match how {
            status::FAILED => CallError::Failed(text()),
            status::ARITY => CallError::Arity {
                function: signature,
                given,
            },
            status::TYPE => CallError::ArgumentType {
                function: signature,
                index: detail,
                expected: text(),
                found: text(),
            },
            status::TOO_LARGE => {
                let area = self.layout.output.len;
                self.too_large("results", function, detail.into(), area)
            }
            status::MALFORMED => {
                CallError::Misbehaved(format!("it refused the arguments: {}", text()))
            }
            other => CallError::Misbehaved(format!("it answered with the unknown status {other}")),
        }
    }

    fn arguments_given(&self) -> u32 {
        let bytes = self.region.bytes(self.layout.input.at, 4);
        let count = bytes.and_then(|bytes| bytes.first_chunk().copied());
        count.map_or(0, u32::from_le_bytes)
    }

    /// Makes a sandbox that is what `snapshot` was when it was taken.
    pub fn from_snapshot(
        snapshot: &Arc<Snapshot>,
        functions: &Arc<HostFunctions>,
    ) -> Result<Self, BuildError> {
        Self::from_snapshot_on(snapshot, functions, Backend::Auto)
    }
}
