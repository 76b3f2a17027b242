//! The local APIC (Intel SDM 3A chapter 12).
//!
//! ```text
//! other threads ── Machine::deliver_msi, IPIs ──> CpuShared mailboxes (atomics)
//!                                                     │ Cpu::collect_interrupts, between blocks
//! timer ── request::TIMER ──> Cpu::apic_timer_due ──> IRR ──> Cpu::poll_events (sys/events.rs)
//! guest ── MMIO page or x2APIC MSRs ──> registers.rs
//! ```
//! Only the processor's own thread touches a [`LocalApic`]; what others must know for routing is
//! mirrored into [`crate::shared::CpuShared`].

mod page;
mod registers;
mod route;
mod timer;

#[cfg(test)]
mod tests;

pub(crate) use page::check_base;
pub use page::{InvalidPage, PAGE_REGISTERS};
pub use route::InvalidMessage;

use std::sync::atomic::Ordering;

use crate::shared::CpuShared;
use timer::Timer;

/// IA32_APIC_BASE bits.
pub(crate) mod base {
    pub(crate) const BSP: u64 = 1 << 8;
    pub(crate) const X2APIC: u64 = 1 << 10;
    pub(crate) const ENABLED: u64 = 1 << 11;
    pub(crate) const DEFAULT_ADDRESS: u64 = 0xfee0_0000;
}

/// Indices into [`LocalApic::lvt`].
mod lvt {
    pub(super) const TIMER: usize = 0;
    // 1 and 2 are temperature and performance counters, which nothing raises.
    pub(super) const LINT0: usize = 3;
    pub(super) const LINT1: usize = 4;
    pub(super) const ERROR: usize = 5;
    pub(super) const MASKED: u32 = 1 << 16;
}

/// Bits of the error status register.
mod error {
    pub(super) const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub(super) const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub(super) const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Delivery modes of messages and LVT entries.
mod delivery {
    pub(super) const FIXED: u32 = 0;
    pub(super) const LOWEST: u32 = 1;
    pub(super) const NMI: u32 = 4;
    pub(super) const INIT: u32 = 5;
    pub(super) const STARTUP: u32 = 6;
    pub(super) const EXTINT: u32 = 7;
}

const SVR_ENABLED: u32 = 1 << 8;

/// A bit per vector.
pub(crate) type VectorSet = [u32; 8];

fn set_bit(set: &mut VectorSet, vector: u8) {
    set[usize::from(vector >> 5)] |= 1 << (vector & 31);
}

fn clear_bit(set: &mut VectorSet, vector: u8) {
    set[usize::from(vector >> 5)] &= !(1 << (vector & 31));
}

fn test_bit(set: &VectorSet, vector: u8) -> bool {
    set[usize::from(vector >> 5)] & (1 << (vector & 31)) != 0
}

fn highest(set: &VectorSet) -> Option<u8> {
    (0..8usize)
        .rev()
        .find(|&i| set[i] != 0)
        .map(|i| (i as u8) * 32 + (31 - set[i].leading_zeros() as u8))
}

/// One processor's local APIC.
#[derive(Clone, Debug)]
pub struct LocalApic {
    /// The processor's number: its x2APIC id, and its xAPIC id until the guest writes another.
    initial_id: u32,
    /// IA32_APIC_BASE.
    base: u64,
    /// xAPIC id.
    id: u8,
    tpr: u8,
    /// xAPIC: id in the top byte.
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: VectorSet,
    irr: VectorSet,
    tmr: VectorSet,
    esr: u32,
    /// Errors since ESR was last written.
    errors: u32,
    icr: u64,
    lvt: [u32; 6],
    timer: Timer,
    /// Level-triggered vectors ended, that the I/O APIC has not been told about.
    ended: VectorSet,
}

impl LocalApic {
    /// As after power-up of processor `id`.
    ///
    /// There is no firmware to connect the 8259s, so processor 0's LINT0 starts in ExtINT mode.
    pub fn new(id: u32) -> Self {
        let mut apic = Self {
            initial_id: id,
            base: 0,
            id: id as u8,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: [0; 8],
            irr: [0; 8],
            tmr: [0; 8],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [lvt::MASKED; 6],
            timer: Timer::default(),
            ended: [0; 8],
        };
        apic.reset();
        apic.base = base::DEFAULT_ADDRESS | base::ENABLED;
        if id == 0 {
            apic.base |= base::BSP;
        }
        apic
    }

    /// As after INIT: all but the base register and the id (SDM 3A §12.4.7.3).
    pub(crate) fn reset(&mut self) {
        self.tpr = 0;
        self.ldr = if self.x2apic() { self.x2apic_ldr() } else { 0 };
        self.dfr = u32::MAX;
        self.svr = 0xff;
        self.isr = [0; 8];
        self.irr = [0; 8];
        self.tmr = [0; 8];
        self.esr = 0;
        self.errors = 0;
        self.icr = 0;
        self.lvt = [lvt::MASKED; 6];
        if self.initial_id == 0 {
            self.lvt[lvt::LINT0] = delivery::EXTINT << 8;
        }
        self.timer = Timer::default();
        self.ended = [0; 8];
    }

    /// IA32_APIC_BASE.
    #[inline]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Sets IA32_APIC_BASE, checked by `check_base`.
    pub(crate) fn set_base(&mut self, base: u64) {
        self.base = base;
        if self.x2apic() {
            self.ldr = self.x2apic_ldr();
        }
    }

    /// Whether IA32_APIC_BASE enables it.
    #[inline]
    pub fn enabled(&self) -> bool {
        self.base & base::ENABLED != 0
    }

    /// x2APIC mode.
    #[inline]
    pub fn x2apic(&self) -> bool {
        self.base & base::X2APIC != 0
    }

    /// SVR bit 8, and enabled at all.
    pub(crate) fn software_enabled(&self) -> bool {
        self.enabled() && self.svr & SVR_ENABLED != 0
    }

    /// The APIC id that CPUID and the id register report.
    pub fn id(&self) -> u32 {
        if self.x2apic() {
            self.initial_id
        } else {
            u32::from(self.id)
        }
    }

    /// The page that xAPIC accesses go to; `None` when disabled or in x2APIC mode.
    #[inline]
    pub fn page_address(&self) -> Option<u64> {
        (self.base & (base::ENABLED | base::X2APIC) == base::ENABLED).then_some(self.base & !0xfff)
    }

    /// LDR of x2APIC mode: cluster and bit follow from the id (SDM 3A §12.12.10.2).
    fn x2apic_ldr(&self) -> u32 {
        ((self.initial_id >> 4) << 16) | (1 << (self.initial_id & 15))
    }

    /// Task priority as CR8 has it.
    #[inline]
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    /// Sets the task priority from CR8's four bits.
    #[inline]
    pub fn set_cr8(&mut self, value: u64) {
        self.tpr = ((value & 15) << 4) as u8;
    }

    /// Processor priority (SDM 3A §12.8.3.1).
    fn ppr(&self) -> u8 {
        let in_service = highest(&self.isr).unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 {
            self.tpr
        } else {
            in_service & 0xf0
        }
    }

    /// The vector that the processor would take now, RFLAGS.IF aside.
    #[inline]
    pub fn deliverable(&self) -> Option<u8> {
        let vector = highest(&self.irr)?;
        (self.software_enabled() && vector >> 4 > self.ppr() >> 4).then_some(vector)
    }

    /// Takes a vector from request to service.
    pub(crate) fn acknowledge(&mut self, vector: u8) {
        clear_bit(&mut self.irr, vector);
        set_bit(&mut self.isr, vector);
    }

    /// Accepts a fixed interrupt.
    pub(crate) fn accept(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            self.raise_error(error::RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        if level {
            set_bit(&mut self.tmr, vector);
        } else {
            clear_bit(&mut self.tmr, vector);
        }
        set_bit(&mut self.irr, vector);
    }

    /// Ends the interrupt in service; whether it was level-triggered and which.
    fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = highest(&self.isr)?;
        clear_bit(&mut self.isr, vector);
        test_bit(&self.tmr, vector).then_some(vector)
    }

    /// The next ended vector that the I/O APIC has to hear of.
    pub fn take_ended(&mut self) -> Option<u8> {
        let vector = highest(&self.ended)?;
        clear_bit(&mut self.ended, vector);
        Some(vector)
    }

    /// Records an error and raises the error interrupt (SDM 3A §12.5.3).
    fn raise_error(&mut self, bit: u32) {
        let new = self.errors & bit == 0;
        self.errors |= bit;
        let entry = self.lvt[lvt::ERROR];
        let vector = entry as u8;
        if new && entry & lvt::MASKED == 0 && vector >= 16 {
            clear_bit(&mut self.tmr, vector);
            set_bit(&mut self.irr, vector);
        }
    }

    /// Whether an 8259's interrupt gets through to the processor: LINT0 in ExtINT mode, or no APIC
    /// in between.
    pub fn accepts_extint(&self) -> bool {
        let lint0 = self.lvt[lvt::LINT0];
        !self.enabled() || lint0 & lvt::MASKED == 0 && (lint0 >> 8) & 7 == delivery::EXTINT
    }

    /// Copies what routing needs to where other threads see it.
    pub(crate) fn publish(&self, shared: &CpuShared) {
        let mut mode = 0;
        if self.enabled() {
            mode |= mode::ENABLED;
        }
        if self.x2apic() {
            mode |= mode::X2APIC;
        }
        if self.software_enabled() {
            mode |= mode::SOFTWARE_ENABLED;
        }
        shared.apic_id.store(self.id(), Ordering::SeqCst);
        shared.apic_ldr.store(self.ldr, Ordering::SeqCst);
        shared.apic_dfr.store(self.dfr, Ordering::SeqCst);
        shared.apic_mode.store(mode, Ordering::SeqCst);
    }
}

/// Bits of [`CpuShared::apic_mode`].
mod mode {
    pub(super) const ENABLED: u32 = 1 << 0;
    pub(super) const X2APIC: u32 = 1 << 1;
    pub(super) const SOFTWARE_ENABLED: u32 = 1 << 2;
}
