//! Why a virtual processor stopped running guest code.

use crate::memory::Gpa;

/// The reason for which [`crate::Vcpu::run`] returned.
///
/// After [`Exit::PortIn`] or [`Exit::MmioRead`] the caller gives the value with
/// [`crate::Vcpu::complete_read`] before the next run. Accesses wider than 8 bytes and repeated
/// string I/O arrive as several exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// `IN`: `size` (1, 2 or 4) bytes from `port`; complete with the value.
    PortIn {
        /// Port number.
        port: u16,
        /// Bytes.
        size: u8,
    },
    /// `OUT`: the low `size` (1, 2 or 4) bytes of `data` to `port`.
    PortOut {
        /// Port number.
        port: u16,
        /// Bytes.
        size: u8,
        /// Value, zero-extended.
        data: u32,
    },
    /// A read of `size` (1, 2, 4 or 8; any size to 8 where an access is split) bytes where nothing
    /// is mapped; complete with the value.
    MmioRead {
        /// First address.
        gpa: Gpa,
        /// Bytes.
        size: u8,
    },
    /// A write where nothing is mapped, or to a read-only slot.
    MmioWrite {
        /// First address.
        gpa: Gpa,
        /// Bytes.
        size: u8,
        /// Value, zero-extended.
        data: u64,
    },
    /// `HLT` in a VM without local APICs ([`crate::Irqchip::None`]). With local APICs a halted
    /// processor waits inside [`crate::Vcpu::run`].
    Halt,
    /// The guest can now take the external interrupt asked for with
    /// [`crate::Vcpu::request_interrupt_window`].
    InterruptWindow,
    /// A local APIC ended a level-triggered interrupt of this vector (for I/O APICs).
    IoapicEoi {
        /// The vector.
        vector: u8,
    },
    /// Triple fault or shutdown: the processor can't go on.
    Shutdown,
    /// A breakpoint or single step that the host asked for.
    Debug,
    /// The call that this run belongs to was cancelled; sticky until the call ends.
    Cancelled,
    /// The budget of [`crate::Vcpu::set_budget`] is spent; sticky until another is set.
    BudgetSpent,
    /// [`crate::Canceller::kick`] or a signal: nothing happened in the guest, run again.
    Interrupted,
}
