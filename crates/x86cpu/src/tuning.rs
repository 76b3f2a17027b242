//! How the processor runs code, and what it counts while it does.

use std::sync::atomic::{AtomicU64, Ordering};

/// How a machine's processors run code. The outcome for the guest is the same whatever this says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Whether code that runs often is compiled; else all is interpreted.
    pub compile: bool,
    /// A block is compiled when it has been interpreted so often, at least 1; a run for which compiled
    /// code was left counts for several.
    pub threshold: u16,
    /// Bytes that each processor may take for what it derives from guest code: decoded blocks,
    /// compiled code and the tables of both.
    pub code_bytes: usize,
    /// Whether compiled code is told to Linux `perf`, in `/tmp/perf-PID.map`.
    pub perf_map: bool,
    /// Whether tables begin small: for many machines in one process that run little each. They grow to what
    /// the rest says when that turns out to be too little.
    pub small: bool,
    /// Whether compiled code holds speculation back where a TLB miss could be taken for a hit.
    pub hardened: bool,
}

impl Tuning {
    /// What [`Tuning::code_bytes`] is by default: 64 MiB.
    pub const CODE_BYTES: usize = 64 << 20;
    /// The least that it may be: one flush after the other, but right.
    pub const LEAST_CODE_BYTES: usize = 1 << 20;

    /// Everything is interpreted.
    pub const INTERPRETER: Self = Self {
        compile: false,
        ..Self::JIT
    };
    /// What is warm is compiled.
    pub const JIT: Self = Self {
        compile: true,
        threshold: 16,
        code_bytes: Self::CODE_BYTES,
        perf_map: false,
        small: false,
        hardened: false,
    };
    /// Everything is compiled the first time that it runs, into as little memory as will do. For
    /// tests: it brings out what else takes hours.
    pub const STRESS: Self = Self {
        threshold: 1,
        code_bytes: Self::LEAST_CODE_BYTES,
        ..Self::JIT
    };
}

impl Default for Tuning {
    fn default() -> Self {
        Self::JIT
    }
}

/// Names each counter once: the atomics that a processor's thread writes, and what others read.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a processor has counted since it was made, or still holds. Its own thread writes,
        /// others may look at any time; what belongs together may be a moment apart.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        /// [`Counters`] at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct CounterValues {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// The values now.
            pub fn values(&self) -> CounterValues {
                CounterValues {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                }
            }
        }

        impl CounterValues {
            /// Names and values, in the order of their definition.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }
    };
}

counters! {
    /// Instructions interpreted, each time.
    interpreted_instructions,
    /// Blocks decoded.
    decoded_blocks,
    /// Bytes that decoded blocks take now.
    decoded_bytes,
    /// Traces compiled.
    compiled_traces,
    /// Guest instructions in them, as they were compiled: nothing counts how often they run.
    compiled_instructions,
    /// Bytes that compiled code and its tables take now.
    compiled_bytes,
    /// How often all decoded and compiled code was dropped for want of room.
    flushes,
    /// Traces dropped because the guest changed their code.
    invalidated_traces,
    /// Entries into compiled code.
    entries,
    /// Left because control went where nothing is compiled or linked yet.
    exits_unlinked,
    /// Left because a jump to another page, or an indirect one, went where nothing is compiled yet.
    exits_indirect,
    /// Such jumps that missed the jump caches but went where something is compiled.
    jumps_found,
    /// Left for an instruction that only the interpreter has.
    exits_interpreter,
    /// Left for an interrupt or because somebody asked.
    exits_request,
    /// Left with an exception or for a device.
    exits_trap,
    /// Instructions interpreted without leaving the trace around them.
    calls_interpreter,
    /// Memory accesses that missed the first-level TLB (compiled code only).
    tlb_misses,
    /// Of the processor's TLB misses: found in the second level.
    tlb_second_hits,
    /// The same: took a walk of the page tables.
    tlb_walks,
    /// Nanoseconds spent compiling.
    compiler_ns,
}

impl Counters {
    /// Adds to a counter that only the caller's thread writes.
    #[inline]
    pub(crate) fn add(counter: &AtomicU64, n: u64) {
        counter.store(counter.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    /// Sets one.
    #[inline]
    pub(crate) fn set(counter: &AtomicU64, value: u64) {
        counter.store(value, Ordering::Relaxed);
    }
}
