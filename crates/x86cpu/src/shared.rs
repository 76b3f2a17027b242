//! What threads other than the processor's own may touch.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::mem::Memory;
use crate::tuning::{Counters, Tuning};

/// Bits of [`CpuShared::requests`]: reasons to leave the fast path at the next block.
pub mod request {
    /// Return [`crate::CpuExit::Requested`].
    pub const EXIT: u32 = 1 << 0;
    /// Interrupts were posted to the APIC's mailbox (also INIT, SIPI, NMI).
    pub const INTERRUPT: u32 = 1 << 1;
    /// The APIC timer's deadline has passed.
    pub const TIMER: u32 = 1 << 2;
    /// Memory slots, dirty logging or code pages changed: bring the TLB up to date.
    pub const MEMORY: u32 = 1 << 3;
    /// The processor itself wants its events looked at (a window opened, a shadow ended).
    pub const EVENTS: u32 = 1 << 4;
    /// Another processor has changed code.
    pub const CODE: u32 = 1 << 5;
}

/// Per processor.
#[derive(Debug)]
pub struct CpuShared {
    /// Bits of [`request`]; checked at every block entry.
    pub requests: AtomicU32,
    /// Posted vectors, as the IRR: bit n of word n / 32.
    pub posted: [AtomicU32; 8],
    /// For each posted vector, whether it is level-triggered.
    pub posted_level: [AtomicU32; 8],
    /// NMIs posted.
    pub nmi: AtomicU32,
    /// INIT posted.
    pub init: AtomicBool,
    /// SIPI posted: 0x100 | vector.
    pub sipi: AtomicU32,
    /// Physical APIC id, logical id (xAPIC LDR byte or x2APIC) and mode, for message routing by
    /// other threads; kept by the owner.
    pub apic_id: AtomicU32,
    /// LDR as written (xAPIC: id in bits 24–31; x2APIC: the whole register).
    pub apic_ldr: AtomicU32,
    /// DFR (xAPIC).
    pub apic_dfr: AtomicU32,
    /// Bit 0 enabled (IA32_APIC_BASE.EN), bit 1 x2APIC, bit 2 software-enabled (SVR bit 8).
    pub apic_mode: AtomicU32,
    /// Memory generation that this processor's TLB has caught up with; `u64::MAX` while it runs no
    /// guest code (it catches up before it does).
    pub memory_seen: AtomicU64,
    /// What the processor is at, as a [`Doing`]: for whoever takes samples.
    pub doing: AtomicU8,
    /// What the processor counts.
    pub counters: Counters,
}

/// What a processor's thread is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Doing {
    /// Not in [`crate::Cpu::run`].
    Outside = 0,
    /// Interpreting, or looking for what comes next.
    Interpreting = 1,
    /// Compiling.
    Compiling = 2,
    /// In compiled code.
    Compiled = 3,
}

impl Default for CpuShared {
    fn default() -> Self {
        Self {
            requests: AtomicU32::new(0),
            posted: Default::default(),
            posted_level: Default::default(),
            nmi: AtomicU32::new(0),
            init: AtomicBool::new(false),
            sipi: AtomicU32::new(0),
            apic_id: AtomicU32::new(0),
            apic_ldr: AtomicU32::new(0),
            apic_dfr: AtomicU32::new(0),
            apic_mode: AtomicU32::new(0),
            memory_seen: AtomicU64::new(u64::MAX),
            doing: AtomicU8::new(Doing::Outside as u8),
            counters: Counters::default(),
        }
    }
}

impl CpuShared {
    /// Sets bits of [`request`], for the processor to see at its next block.
    pub fn request(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
    }

    /// What the processor is at.
    pub fn doing(&self) -> Doing {
        match self.doing.load(Ordering::Relaxed) {
            1 => Doing::Interpreting,
            2 => Doing::Compiling,
            3 => Doing::Compiled,
            _ => Doing::Outside,
        }
    }

    /// Takes note of what the processor is at.
    #[inline]
    pub(crate) fn set_doing(&self, doing: Doing) {
        self.doing.store(doing as u8, Ordering::Relaxed);
    }

    /// Makes the current or next run return [`crate::CpuExit::Requested`].
    pub fn request_exit(&self) {
        self.request(request::EXIT);
    }

    /// Whether a halted processor has a reason to run again.
    pub fn wake_pending(&self) -> bool {
        self.requests.load(Ordering::SeqCst) & !(request::MEMORY | request::CODE) != 0
    }
}

/// What the processor asks of its host; implemented by the backend.
pub trait Host: Send + Sync {
    /// Wakes processor `cpu` if it waits in [`crate::CpuExit::Halted`] or
    /// [`crate::CpuExit::WaitForSipi`]; its `requests` are already set.
    fn wake(&self, cpu: u32);

    /// Arms the APIC timer of processor `cpu`: at guest-clock time `deadline` (ns) set
    /// [`request::TIMER`] and wake it. Replaces the earlier deadline; `None` disarms.
    fn arm_timer(&self, cpu: u32, deadline: Option<u64>);

    /// The guest clock in nanoseconds: monotonic, starts near 0 with the machine; the time-stamp
    /// counters follow it. Must be cheap (tens of nanoseconds).
    fn clock_ns(&self) -> u64;

    /// What the guest clock stood at when it was last set; 0 if it never was.
    fn clock_base_ns(&self) -> u64 {
        0
    }

    /// Wall-clock time that corresponds to guest clock 0, in nanoseconds since 1970 (kvmclock).
    fn wall_clock_base_ns(&self) -> u64;
}

/// What all processors of one machine share.
pub struct Machine {
    /// Guest-physical memory.
    pub memory: Memory,
    /// The backend.
    pub host: Arc<dyn Host>,
    /// Every processor's shared part, by id; a slot is set when its processor is made.
    pub cpus: Box<[OnceLock<Arc<CpuShared>>]>,
    /// Bit per vector: the I/O APIC wants to know of its end (level-triggered pins).
    pub eoi_exit: [AtomicU32; 8],
    /// How its processors run code.
    pub tuning: Tuning,
}

impl Machine {
    /// A machine without memory for up to `processors` processors.
    pub fn new(host: Arc<dyn Host>, processors: usize) -> Self {
        Self::with_tuning(host, processors, Tuning::default())
    }

    /// The same, whose processors run code as `tuning` says.
    pub fn with_tuning(host: Arc<dyn Host>, processors: usize, tuning: Tuning) -> Self {
        Self {
            tuning,
            memory: Memory::new(),
            host,
            cpus: (0..processors).map(|_| OnceLock::new()).collect(),
            eoi_exit: Default::default(),
        }
    }
}
