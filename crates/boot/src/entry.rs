//! Processor state at a kernel's entry.

use skerry_hypervisor::BootRegisters;
use skerry_hypervisor::state::{DescriptorTable, Segment};

use crate::layout;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_FIXED: u64 = 2;

const RAX: usize = 0;
const RBX: usize = 3;
const RSP: usize = 4;
const RSI: usize = 6;

/// Selectors that Linux's boot protocol fixes (`__BOOT_CS`, `__BOOT_DS`).
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CODE_32: u16 = 0xc09b;
const CODE_64: u16 = 0xa09b;
const DATA_32: u16 = 0xc093;
const TASK_BUSY: u16 = 0x008b;

/// How and where a loaded kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Linux's 64-bit boot protocol: long mode, identity page tables, RSI holds the zero page.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// Address of `struct boot_params`.
        zero_page: u64,
    },
    /// PVH: 32-bit protected mode without paging, EBX holds `hvm_start_info`.
    Pvh {
        /// First instruction.
        eip: u32,
        /// Address of `struct hvm_start_info`.
        start_info: u32,
    },
    /// Multiboot 1: as PVH, EBX holds the information structure and EAX the magic number.
    Multiboot {
        /// First instruction.
        eip: u32,
        /// Address of the information structure.
        info: u32,
    },
}

/// What a multiboot loader leaves in EAX (Multiboot 0.6.96 §3.2).
pub const MULTIBOOT_BOOTLOADER_MAGIC: u32 = 0x2bad_b002;

/// The descriptor table that the selectors name: null, null, code, data, task.
pub(crate) fn gdt(entry: &Entry) -> [u64; 5] {
    let code = match entry {
        Entry::Linux64 { .. } => CODE_64,
        _ => CODE_32,
    };
    // Base 0, limit 0xfffff pages; the task segment 0x67 bytes.
    let flat = |attributes: u16| {
        let high = u64::from(attributes & 0xf0ff) << 40;
        high | 0x000f_0000_0000_ffff
    };
    [
        0,
        0,
        flat(code),
        flat(DATA_32),
        (u64::from(TASK_BUSY) << 40) | 0x67,
    ]
}

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: 0xffff_ffff,
        attributes,
        unusable: false,
    }
}

impl Entry {
    /// Address of the first instruction.
    pub fn rip(&self) -> u64 {
        match *self {
            Entry::Linux64 { rip, .. } => rip,
            Entry::Pvh { eip, .. } | Entry::Multiboot { eip, .. } => eip.into(),
        }
    }

    /// Changes `registers`, as they are after reset, to what the kernel expects. Fields that no
    /// boot protocol speaks of (the APIC base) stay.
    pub fn apply(&self, registers: &mut BootRegisters) {
        let general = &mut registers.general;
        general.gpr = [0; 16];
        general.rip = self.rip();
        general.rflags = RFLAGS_FIXED;
        let system = &mut registers.system;
        system.segments = [segment(DATA, DATA_32); 6];
        system.tr = Segment {
            selector: TASK,
            base: 0,
            limit: 0x67,
            attributes: TASK_BUSY,
            unusable: false,
        };
        system.ldt = Segment {
            unusable: true,
            ..Segment::default()
        };
        system.gdt = DescriptorTable {
            base: layout::GDT,
            limit: 5 * 8 - 1,
        };
        system.idt = DescriptorTable::default();
        system.cr2 = 0;
        system.cr3 = 0;
        system.cr4 = 0;
        system.cr8 = 0;
        system.efer = 0;
        system.cr0 = CR0_PE | CR0_ET | CR0_NE;
        let code = match *self {
            Entry::Linux64 { zero_page, .. } => {
                general.gpr[RSI] = zero_page;
                general.gpr[RSP] = layout::ZERO_PAGE;
                system.cr0 |= CR0_PG;
                system.cr3 = layout::PAGE_TABLES;
                system.cr4 = CR4_PAE;
                system.efer = EFER_LME | EFER_LMA;
                CODE_64
            }
            Entry::Pvh { start_info, .. } => {
                general.gpr[RBX] = start_info.into();
                CODE_32
            }
            Entry::Multiboot { info, .. } => {
                general.gpr[RAX] = MULTIBOOT_BOOTLOADER_MAGIC.into();
                general.gpr[RBX] = info.into();
                CODE_32
            }
        };
        system.segments[1] = segment(CODE, code);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_mode_entry_keeps_the_apic_base() {
        let mut registers = BootRegisters::default();
        registers.system.apic_base = 0xfee0_0900;
        let entry = Entry::Linux64 {
            rip: 0x100_0000,
            zero_page: 0x7000,
        };
        entry.apply(&mut registers);
        assert_eq!(registers.system.apic_base, 0xfee0_0900);
        assert_eq!(registers.general.rip, 0x100_0000);
        assert_eq!(registers.general.gpr[RSI], 0x7000);
        assert_eq!(registers.system.efer, 0x500);
        assert_eq!(registers.system.segments[1].attributes & 0x6000, 0x2000);
    }

    #[test]
    fn descriptors_say_what_the_hidden_parts_say() {
        let entry = Entry::Multiboot { eip: 0, info: 0 };
        assert_eq!(gdt(&entry)[2], 0x00cf_9b00_0000_ffff);
        assert_eq!(gdt(&entry)[3], 0x00cf_9300_0000_ffff);
        let entry = Entry::Linux64 {
            rip: 0,
            zero_page: 0,
        };
        assert_eq!(gdt(&entry)[2], 0x00af_9b00_0000_ffff);
    }
}
