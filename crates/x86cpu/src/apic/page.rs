//! The registers as a page, for snapshots.

use super::{LocalApic, base, error};

/// Registers of the page: one every 16 bytes of its first KiB.
pub const PAGE_REGISTERS: usize = 64;

/// A register page that no APIC can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPage {
    /// Wrong number of registers.
    #[error("Local APIC page has {0} registers: it must have 64")]
    Length(usize),
    /// The register holds bits that are reserved.
    #[error("Local APIC register {offset:#x} can't hold {value:#x}")]
    Register {
        /// Offset in the page.
        offset: usize,
        /// Its value.
        value: u32,
    },
    /// IA32_APIC_BASE names no mode or address.
    #[error("IA32_APIC_BASE can't be {0:#x}")]
    Base(u64),
}

impl LocalApic {
    /// The page; `now` is the guest clock, for the timer's current count.
    pub(crate) fn page(&self, now: u64) -> Vec<u32> {
        let mut page = vec![0; PAGE_REGISTERS];
        page[0x02] = if self.x2apic() {
            self.initial_id
        } else {
            u32::from(self.id) << 24
        };
        page[0x03] = 0x0005_0014;
        page[0x08] = u32::from(self.tpr);
        page[0x0a] = u32::from(self.ppr());
        page[0x0d] = self.ldr;
        page[0x0e] = self.dfr;
        page[0x0f] = self.svr;
        page[0x10..0x18].copy_from_slice(&self.isr);
        page[0x18..0x20].copy_from_slice(&self.tmr);
        page[0x20..0x28].copy_from_slice(&self.irr);
        page[0x28] = self.esr;
        page[0x30] = self.icr as u32;
        page[0x31] = (self.icr >> 32) as u32;
        page[0x32..0x38].copy_from_slice(&self.lvt);
        page[0x38] = self.timer.initial;
        page[0x39] = self.current_count(now);
        page[0x3e] = self.timer.divide;
        page
    }

    /// An APIC with the page's registers. The timer's count-down goes on from its current count.
    pub(crate) fn with_page(
        &self,
        apic_base: u64,
        address_bits: u32,
        page: &[u32],
        tsc_deadline: u64,
        now: u64,
    ) -> Result<Self, InvalidPage> {
        if page.len() != PAGE_REGISTERS {
            return Err(InvalidPage::Length(page.len()));
        }
        check_base(apic_base, address_bits)?;
        let check = |index: usize, allowed: u32| {
            let value = page[index];
            if value & !allowed == 0 {
                Ok(value)
            } else {
                Err(InvalidPage::Register {
                    offset: index * 16,
                    value,
                })
            }
        };
        let mut apic = self.clone();
        apic.base = apic_base;
        apic.errors = 0;
        apic.ended = [0; 8];
        if apic.x2apic() {
            // Some backends keep the id in the xAPIC form.
            let id = page[0x02];
            if id != self.initial_id && id != self.initial_id << 24 {
                return Err(InvalidPage::Register {
                    offset: 0x20,
                    value: id,
                });
            }
            apic.id = self.initial_id as u8;
            apic.ldr = apic.x2apic_ldr();
            apic.dfr = u32::MAX;
        } else {
            apic.id = (check(0x02, 0xff00_0000)? >> 24) as u8;
            apic.ldr = check(0x0d, 0xff00_0000)?;
            apic.dfr = page[0x0e] | 0x0fff_ffff;
        }
        apic.tpr = check(0x08, 0xff)? as u8;
        apic.svr = check(0x0f, 0x1fff)? & 0x1ff;
        apic.isr.copy_from_slice(&page[0x10..0x18]);
        apic.tmr.copy_from_slice(&page[0x18..0x20]);
        apic.irr.copy_from_slice(&page[0x20..0x28]);
        for index in [0x10, 0x20] {
            check(index, !0xffff)?;
        }
        apic.esr = check(
            0x28,
            error::SEND_ILLEGAL_VECTOR
                | error::RECEIVE_ILLEGAL_VECTOR
                | error::ILLEGAL_REGISTER
                | 0x1f,
        )?;
        apic.icr = u64::from(check(0x30, 0x000c_dfff)?) | (u64::from(page[0x31]) << 32);
        apic.icr &= !(1 << 12);
        for i in 0..apic.lvt.len() {
            apic.lvt[i] = check(0x32 + i, 0x0007_f7ff)?;
        }
        apic.timer.initial = page[0x38];
        apic.timer.divide = check(0x3e, 0xb)?;
        apic.timer.tsc_deadline = if apic.deadline_mode() {
            tsc_deadline
        } else {
            0
        };
        apic.resume_timer(page[0x39], now);
        Ok(apic)
    }

    /// Starts the count-down so that it stands at `current` now.
    fn resume_timer(&mut self, current: u32, now: u64) {
        self.timer.start_ns = now;
        self.timer.expired = false;
        if self.timer.initial == 0 || self.deadline_mode() {
            return;
        }
        // A periodic count-down at 0 is due, and a one-shot one is over.
        self.timer.expired = current == 0 && !self.periodic_mode();
        let current = current.min(self.timer.initial);
        let per_count = self.period_of_one();
        let gone = u64::from(self.timer.initial - current) * per_count;
        // A clock younger than the count-down can't express its start: it counts in full then.
        self.timer.start_ns = now.saturating_sub(gone);
    }

    fn period_of_one(&self) -> u64 {
        let one = super::timer::Timer {
            initial: 1,
            ..self.timer
        };
        one.period_ns()
    }
}

/// Checks IA32_APIC_BASE as a whole.
pub(crate) fn check_base(value: u64, address_bits: u32) -> Result<(), InvalidPage> {
    let address = ((1u64 << address_bits.min(52)) - 1) & !0xfff;
    let known = address | base::BSP | base::ENABLED | base::X2APIC;
    let mode = value & (base::ENABLED | base::X2APIC);
    if value & !known != 0 || mode == base::X2APIC {
        return Err(InvalidPage::Base(value));
    }
    Ok(())
}
