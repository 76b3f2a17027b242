//! Descriptors in the GDT and LDT (Intel SDM 3A §§3.4.5, 3.5, 6.8.3): reading, checking, marking.

use crate::cpu::Cpu;
use crate::mem::Access;
use crate::sys::state::{Segment, attr, efer};
use crate::trap::{Trap, vector};

/// System descriptor types (S = 0), SDM 3A table 3-2.
pub(crate) mod system_type {
    pub(crate) const TSS16: u8 = 1;
    pub(crate) const LDT: u8 = 2;
    pub(crate) const TSS16_BUSY: u8 = 3;
    pub(crate) const CALL16: u8 = 4;
    pub(crate) const TASK_GATE: u8 = 5;
    pub(crate) const INTERRUPT16: u8 = 6;
    pub(crate) const TRAP16: u8 = 7;
    pub(crate) const TSS32: u8 = 9;
    pub(crate) const TSS32_BUSY: u8 = 11;
    pub(crate) const CALL32: u8 = 12;
    pub(crate) const INTERRUPT32: u8 = 14;
    pub(crate) const TRAP32: u8 = 15;
}

/// A descriptor and where it was found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    /// Linear address.
    pub(crate) address: u64,
    /// Its eight bytes.
    pub(crate) raw: u64,
}

impl Descriptor {
    pub(crate) fn attributes(&self) -> u16 {
        (self.raw >> 40) as u16 & attr::ALL
    }

    /// Type field.
    pub(crate) fn kind(&self) -> u8 {
        (self.raw >> 40) as u8 & 15
    }

    /// Code or data rather than system.
    pub(crate) fn is_segment(&self) -> bool {
        self.attributes() & attr::S != 0
    }

    pub(crate) fn is_code(&self) -> bool {
        self.attributes() & (attr::S | attr::CODE) == attr::S | attr::CODE
    }

    pub(crate) fn is_conforming(&self) -> bool {
        self.is_code() && self.attributes() & attr::CE != 0
    }

    pub(crate) fn is_writable_data(&self) -> bool {
        self.attributes() & (attr::S | attr::CODE | attr::RW) == attr::S | attr::RW
    }

    pub(crate) fn is_readable(&self) -> bool {
        let a = self.attributes();
        a & attr::S != 0 && (a & attr::CODE == 0 || a & attr::RW != 0)
    }

    pub(crate) fn dpl(&self) -> u8 {
        ((self.raw >> 45) & 3) as u8
    }

    pub(crate) fn present(&self) -> bool {
        self.raw & (1 << 47) != 0
    }

    pub(crate) fn limit(&self) -> u32 {
        let limit = (self.raw as u32 & 0xffff) | ((self.raw >> 32) as u32 & 0xf_0000);
        if self.attributes() & attr::G != 0 {
            (limit << 12) | 0xfff
        } else {
            limit
        }
    }

    pub(crate) fn base(&self) -> u64 {
        ((self.raw >> 16) & 0xff_ffff) | ((self.raw >> 32) & 0xff00_0000)
    }

    /// As it goes into a segment register.
    pub(crate) fn segment(&self, selector: u16) -> Segment {
        Segment {
            selector,
            base: self.base(),
            limit: self.limit(),
            attributes: self.attributes(),
            unusable: false,
        }
    }

    /// Gate: selector of the target.
    pub(crate) fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }

    /// Gate: low 32 bits of the target's offset (16 for 16-bit gates).
    pub(crate) fn gate_offset(&self) -> u32 {
        let low = self.raw as u32 & 0xffff;
        if self.kind() & 8 != 0 {
            low | ((self.raw >> 32) as u32 & 0xffff_0000)
        } else {
            low
        }
    }
}

/// Whether an address can be used with 48-bit linear addresses.
#[inline]
pub(crate) fn canonical(address: u64) -> bool {
    (((address << 16) as i64) >> 16) as u64 == address
}

/// Whether a selector names no descriptor.
#[inline]
pub(crate) fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

impl Cpu {
    /// Raises `vector` with the selector as error code.
    #[cold]
    pub(crate) fn selector_fault(&mut self, vector: u8, selector: u16) -> Trap {
        self.fault(vector, u32::from(selector & 0xfffc))
    }

    /// Where `length` bytes of the selector's descriptor are, if the table holds them.
    pub(crate) fn descriptor_address(&self, selector: u16, length: u64) -> Option<u64> {
        let (base, limit, usable) = if selector & 4 == 0 {
            (self.sys.gdt.base, u32::from(self.sys.gdt.limit), true)
        } else {
            (
                self.sys.ldt.base,
                self.sys.ldt.limit,
                !self.sys.ldt.unusable,
            )
        };
        let offset = u64::from(selector & 0xfff8);
        let fits = usable && offset + length - 1 <= u64::from(limit);
        fits.then(|| self.table_address(base.wrapping_add(offset)))
    }

    /// Linear addresses outside of IA-32e mode have 32 bits.
    pub(crate) fn table_address(&self, linear: u64) -> u64 {
        if self.sys.efer & efer::LMA != 0 {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// Reads the descriptor that a selector names; raises `vector` with the selector if the table
    /// ends before it.
    pub(crate) fn read_descriptor(
        &mut self,
        selector: u16,
        vector: u8,
    ) -> Result<Descriptor, Trap> {
        let Some(address) = self.descriptor_address(selector, 8) else {
            return Err(self.selector_fault(vector, selector));
        };
        let raw = self.load_lin::<u64>(address, Access::Supervisor)?;
        Ok(Descriptor { address, raw })
    }

    /// Reads the second half of a 16-byte descriptor of IA-32e mode; its type field must be zero.
    pub(crate) fn read_descriptor_high(&mut self, selector: u16, fault: u8) -> Result<u64, Trap> {
        let Some(address) = self.descriptor_address(selector, 16) else {
            return Err(self.selector_fault(fault, selector));
        };
        let high = self.load_lin::<u64>(address.wrapping_add(8), Access::Supervisor)?;
        if (high >> 40) & 0x1f != 0 {
            return Err(self.selector_fault(vector::GP, selector));
        }
        Ok(high & 0xffff_ffff)
    }

    /// Sets bits of the type field in memory (accessed, busy), as the processor does with a locked
    /// access.
    pub(crate) fn mark_descriptor(
        &mut self,
        descriptor: &mut Descriptor,
        bits: u64,
    ) -> Result<(), Trap> {
        let marked = descriptor.raw | (bits << 40);
        if marked != descriptor.raw {
            let byte = (marked >> 40) as u8;
            self.store_lin::<u8>(descriptor.address.wrapping_add(5), byte, Access::Supervisor)?;
            descriptor.raw = marked;
        }
        Ok(())
    }

    /// Marks a code or data segment as accessed.
    pub(crate) fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Result<(), Trap> {
        self.mark_descriptor(descriptor, u64::from(attr::ACCESSED))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields() {
        let flat = Descriptor {
            address: 0,
            raw: 0x00cf_9a00_0000_ffff,
        };
        assert_eq!(flat.limit(), u32::MAX);
        assert_eq!(flat.base(), 0);
        assert!(flat.is_code() && flat.present() && !flat.is_conforming());
        let odd = Descriptor {
            address: 0,
            raw: 0x1240_f234_5678_9abc,
        };
        assert_eq!(odd.base(), 0x1234_5678);
        assert_eq!(odd.limit(), 0x9abc);
        assert_eq!(odd.dpl(), 3);
        assert!(odd.is_writable_data());
        let gate = Descriptor {
            address: 0,
            raw: 0x1234_8e00_0008_5678,
        };
        assert_eq!(gate.gate_offset(), 0x1234_5678);
        assert_eq!(gate.gate_selector(), 8);
        assert_eq!(gate.kind(), system_type::INTERRUPT32);
    }

    #[test]
    fn canonical_addresses() {
        assert!(canonical(0x7fff_ffff_ffff));
        assert!(!canonical(0x8000_0000_0000));
        assert!(canonical(0xffff_8000_0000_0000));
        assert!(!canonical(0xffff_7fff_ffff_ffff));
    }
}
