//! Why [`crate::Cpu::run`] returned.

/// What the processor needs from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuExit {
    /// `IN` of `size` bytes; give the value with [`crate::Cpu::complete_read`].
    PortIn {
        /// Port.
        port: u16,
        /// Bytes: 1, 2 or 4.
        size: u8,
    },
    /// `OUT`.
    PortOut {
        /// Port.
        port: u16,
        /// Bytes: 1, 2 or 4.
        size: u8,
        /// Value.
        data: u32,
    },
    /// A read outside of RAM; give the value with [`crate::Cpu::complete_read`].
    MmioRead {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes, 1 to 8.
        size: u8,
    },
    /// A write outside of RAM or to read-only RAM.
    MmioWrite {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes, 1 to 8.
        size: u8,
        /// Value.
        data: u64,
    },
    /// In HLT with nothing to deliver: wait for [`crate::shared::CpuShared::wake_pending`], or until
    /// the guest clock (ns) reaches `deadline`, then run again.
    Halted {
        /// When the APIC timer fires, in guest-clock nanoseconds.
        deadline: Option<u64>,
    },
    /// Waiting for INIT or SIPI.
    WaitForSipi,
    /// External interrupts can be taken and a window was asked for.
    InterruptWindow,
    /// A level-triggered vector was ended.
    IoapicEoi {
        /// Vector.
        vector: u8,
    },
    /// Triple fault.
    Shutdown,
    /// The budget of [`crate::Cpu::set_budget`] is spent.
    BudgetSpent,
    /// Somebody asked for an exit ([`crate::shared::CpuShared::request_exit`]).
    Requested,
}
