//! Register reads and writes: the MMIO page and the x2APIC MSRs name the same registers, the MSRs
//! by the page offset divided by 16 (Intel SDM 3A tables 12-1 and 12-6).

use super::{LocalApic, base, error, lvt};
use crate::cpu::Cpu;
use crate::trap::Trap;

mod reg {
    pub(super) const ID: u32 = 0x02;
    pub(super) const VERSION: u32 = 0x03;
    pub(super) const TPR: u32 = 0x08;
    pub(super) const APR: u32 = 0x09;
    pub(super) const PPR: u32 = 0x0a;
    pub(super) const EOI: u32 = 0x0b;
    pub(super) const LDR: u32 = 0x0d;
    pub(super) const DFR: u32 = 0x0e;
    pub(super) const SVR: u32 = 0x0f;
    pub(super) const ISR: u32 = 0x10;
    pub(super) const TMR: u32 = 0x18;
    pub(super) const IRR: u32 = 0x20;
    pub(super) const ESR: u32 = 0x28;
    pub(super) const ICR: u32 = 0x30;
    pub(super) const ICR_HIGH: u32 = 0x31;
    pub(super) const LVT_TIMER: u32 = 0x32;
    pub(super) const LVT_ERROR: u32 = 0x37;
    pub(super) const INITIAL_COUNT: u32 = 0x38;
    pub(super) const CURRENT_COUNT: u32 = 0x39;
    pub(super) const DIVIDE: u32 = 0x3e;
    pub(super) const SELF_IPI: u32 = 0x3f;
}

/// Version 0x14, six LVT entries, no suppression of EOI broadcasts.
const VERSION: u32 = 0x0005_0014;

/// ICR bits that a write keeps: vector, modes, level, trigger, shorthand.
const ICR_LOW: u32 = 0x000c_cfff;

fn lvt_mask(index: usize) -> u32 {
    match index {
        lvt::TIMER => 0x0007_00ff,
        lvt::LINT0 | lvt::LINT1 => 0x0001_a7ff,
        lvt::ERROR => 0x0001_00ff,
        _ => 0x0001_07ff,
    }
}

impl LocalApic {
    /// A register by its index (page offset / 16); `None` if there is none such.
    fn read_register(&self, index: u32, now: u64) -> Option<u32> {
        let word = (index & 7) as usize;
        Some(match index {
            reg::ID if self.x2apic() => self.initial_id,
            reg::ID => u32::from(self.id) << 24,
            reg::VERSION => VERSION,
            reg::TPR => u32::from(self.tpr),
            reg::APR if !self.x2apic() => 0,
            reg::PPR => u32::from(self.ppr()),
            reg::EOI if !self.x2apic() => 0,
            reg::LDR => self.ldr,
            reg::DFR if !self.x2apic() => self.dfr,
            reg::SVR => self.svr,
            reg::ISR..=0x17 => self.isr[word],
            reg::TMR..=0x1f => self.tmr[word],
            reg::IRR..=0x27 => self.irr[word],
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::ICR_HIGH if !self.x2apic() => (self.icr >> 32) as u32,
            reg::LVT_TIMER..=reg::LVT_ERROR => self.lvt[(index - reg::LVT_TIMER) as usize],
            reg::INITIAL_COUNT => self.timer.initial,
            reg::CURRENT_COUNT => self.current_count(now),
            reg::DIVIDE => self.timer.divide,
            _ => return None,
        })
    }

    fn write_svr(&mut self, value: u32) {
        self.svr = value & 0x1ff;
        if !self.software_enabled() {
            // Software disable masks every LVT entry (SDM 3A §12.4.7.2).
            for entry in &mut self.lvt {
                *entry |= lvt::MASKED;
            }
        }
    }

    fn write_lvt(&mut self, index: usize, value: u32) {
        let mut value = value & lvt_mask(index);
        if !self.software_enabled() {
            value |= lvt::MASKED;
        }
        let old = std::mem::replace(&mut self.lvt[index], value);
        if index == lvt::TIMER {
            self.timer_mode_changed(old);
        }
    }
}

impl Cpu {
    /// A read from the APIC page.
    pub fn apic_mmio_read(&mut self, offset: u64, size: u8) -> u64 {
        let now = self.machine.host.clock_ns();
        let index = ((offset >> 4) & 0xff) as u32;
        let value = match self.apic.read_register(index, now) {
            Some(value) => u64::from(value),
            None => {
                self.apic.raise_error(error::ILLEGAL_REGISTER);
                self.want_events_if_deliverable();
                0
            }
        };
        let bytes = u64::from(size.clamp(1, 8));
        let mask = u64::MAX >> (64 - 8 * bytes);
        // Only aligned 32-bit reads are defined; a narrower one sees its part.
        (value >> (8 * (offset & 3))) & mask
    }

    /// A write to the APIC page; only aligned ones of 32 bits have an effect.
    pub fn apic_mmio_write(&mut self, offset: u64, size: u8, value: u64) {
        if offset & 15 != 0 || size < 4 {
            return;
        }
        let index = ((offset >> 4) & 0xff) as u32;
        let value = value as u32;
        match index {
            reg::ID => self.apic.id = (value >> 24) as u8,
            reg::LDR => self.apic.ldr = value & 0xff00_0000,
            reg::DFR => self.apic.dfr = value | 0x0fff_ffff,
            reg::ICR => {
                self.apic.icr = (self.apic.icr & !0xffff_ffff) | u64::from(value & ICR_LOW);
                self.apic_send_ipi(self.apic.icr);
            }
            reg::ICR_HIGH => {
                self.apic.icr =
                    (self.apic.icr & 0xffff_ffff) | (u64::from(value & 0xff00_0000) << 32);
            }
            _ => {
                if !self.apic_write_common(index, value) {
                    self.apic.raise_error(error::ILLEGAL_REGISTER);
                }
            }
        }
        self.apic.publish(&self.shared);
        self.want_events_if_deliverable();
    }

    /// Registers that both forms of access write alike; `false` if there is none such.
    fn apic_write_common(&mut self, index: u32, value: u32) -> bool {
        match index {
            reg::TPR => self.apic.tpr = value as u8,
            reg::EOI => self.apic_eoi(),
            reg::SVR => self.apic.write_svr(value),
            reg::ESR => {
                self.apic.esr = std::mem::take(&mut self.apic.errors);
            }
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                let i = (index - reg::LVT_TIMER) as usize;
                if i == lvt::TIMER {
                    // What is over by now is over under the old mode.
                    self.apic_timer_due();
                }
                self.apic.write_lvt(i, value);
                if i == lvt::TIMER {
                    self.apic_arm_timer();
                }
                if i == lvt::LINT0 {
                    self.want_events();
                }
            }
            reg::INITIAL_COUNT => self.apic_start_timer(value),
            reg::DIVIDE => self.apic_set_divide(value),
            _ => return false,
        }
        true
    }

    fn apic_eoi(&mut self) {
        use std::sync::atomic::Ordering;
        let Some(vector) = self.apic.end_of_interrupt() else {
            return;
        };
        let word = self.machine.eoi_exit[usize::from(vector >> 5)].load(Ordering::Relaxed);
        if word & (1 << (vector & 31)) != 0 {
            super::set_bit(&mut self.apic.ended, vector);
            self.want_events();
        }
    }

    /// RDMSR of 0x800 to 0x8ff.
    pub(crate) fn x2apic_read(&mut self, msr: u32) -> Result<u64, Trap> {
        if !self.apic.x2apic() {
            return Err(self.gp0());
        }
        let index = msr & 0xff;
        if index == reg::ICR {
            return Ok(self.apic.icr);
        }
        if matches!(index, reg::EOI | reg::SELF_IPI) {
            return Err(self.gp0());
        }
        let now = self.machine.host.clock_ns();
        match self.apic.read_register(index, now) {
            Some(value) => Ok(u64::from(value)),
            None => Err(self.gp0()),
        }
    }

    /// WRMSR of 0x800 to 0x8ff: reserved bits raise #GP (SDM 3A §12.12.1.3).
    pub(crate) fn x2apic_write(&mut self, msr: u32, value: u64) -> Result<(), Trap> {
        if !self.apic.x2apic() {
            return Err(self.gp0());
        }
        let index = msr & 0xff;
        let allowed = match index {
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => 0x1ff,
            reg::ICR => u64::from(ICR_LOW) | 0xffff_ffff_0000_0000,
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                // Delivery status and remote IRR are read-only, not reserved.
                u64::from(lvt_mask((index - reg::LVT_TIMER) as usize)) | 0x5000
            }
            reg::INITIAL_COUNT => 0xffff_ffff,
            reg::DIVIDE => 0xb,
            _ => return Err(self.gp0()),
        };
        if value & !allowed != 0 {
            return Err(self.gp0());
        }
        match index {
            reg::ICR => {
                self.apic.icr = value;
                self.apic_send_ipi(value);
            }
            reg::SELF_IPI => {
                let vector = value as u8;
                if vector < 16 {
                    self.apic.raise_error(error::SEND_ILLEGAL_VECTOR);
                } else {
                    self.apic.accept(vector, false);
                }
            }
            _ => {
                self.apic_write_common(index, value as u32);
            }
        }
        self.apic.publish(&self.shared);
        self.want_events_if_deliverable();
        Ok(())
    }

    /// WRMSR of IA32_APIC_BASE: mode changes as in SDM 3A §12.12.5.
    pub(crate) fn apic_write_base(&mut self, value: u64) -> Result<(), Trap> {
        let address_bits = self.cpuid.physical_address_bits();
        let address_mask = ((1u64 << address_bits) - 1) & !0xfff;
        let mode_bits = base::ENABLED | base::X2APIC;
        let has_x2apic = self.cpuid.feature_ecx() & (1 << 21) != 0;
        let reserved = !(address_mask | base::BSP | mode_bits);
        let (old, new) = (self.apic.base & mode_bits, value & mode_bits);
        let illegal = new == base::X2APIC
            || new & base::X2APIC != 0 && !has_x2apic
            || old == mode_bits && new == base::ENABLED
            || old == 0 && new == mode_bits;
        if value & reserved != 0 || illegal {
            return Err(self.gp0());
        }
        // The bootstrap flag is read-only in effect: the guest can't move it.
        self.apic.base = (value & !base::BSP) | (self.apic.base & base::BSP);
        if old != new {
            if new == 0 {
                self.apic.reset();
                self.apic.id = self.id as u8;
                self.apic_arm_timer();
            }
            self.apic.ldr = if new == mode_bits {
                self.apic.x2apic_ldr()
            } else {
                0
            };
        }
        self.apic.publish(&self.shared);
        self.apic_page_moved();
        Ok(())
    }
}
