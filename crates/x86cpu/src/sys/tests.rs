//! A small kernel's furniture (GDT, IDT, TSS, stacks) and what the system side does with it.

mod legacy;
mod long;
mod state;

use crate::CpuExit;
use crate::cpu::{Cpu, reg, seg};
use crate::sys::state::{DescriptorTable, Segment};
use crate::testing::TestCpu;
use crate::trap::Trap;

pub(super) const GDT: u64 = 0x1000;
pub(super) const IDT: u64 = 0x2000;
pub(super) const TSS: u64 = 0x3000;
pub(super) const HANDLERS: u64 = 0x5000;
pub(super) const RSP0: u64 = 0x9000;
pub(super) const IST1: u64 = 0xa000;
pub(super) const IST2: u64 = 0xb000;

pub(super) const KERNEL_CODE: u16 = 0x08;
pub(super) const KERNEL_DATA: u16 = 0x10;
pub(super) const USER_CODE32: u16 = 0x1b;
pub(super) const USER_DATA: u16 = 0x23;
pub(super) const USER_CODE64: u16 = 0x2b;
pub(super) const TSS_SELECTOR: u16 = 0x30;
pub(super) const ABSENT: u16 = 0x40;
pub(super) const CALL_GATE: u16 = 0x48;
pub(super) const KERNEL_CODE32: u16 = 0x58;
pub(super) const TSS2_SELECTOR: u16 = 0x60;
pub(super) const TASK_GATE: u16 = 0x68;

/// A machine whose handler for vector n is at [`HANDLERS`] + 16 n and halts.
pub(super) struct Kernel {
    pub(super) t: TestCpu,
    pub(super) long: bool,
}

impl std::ops::Deref for Kernel {
    type Target = Cpu;
    fn deref(&self) -> &Cpu {
        &self.t.cpu
    }
}

impl std::ops::DerefMut for Kernel {
    fn deref_mut(&mut self) -> &mut Cpu {
        &mut self.t.cpu
    }
}

impl Kernel {
    pub(super) fn long() -> Self {
        let t = TestCpu::new64();
        let mut kernel = Self { t, long: true };
        kernel.furnish();
        kernel.put(TSS + 4, &RSP0.to_le_bytes());
        kernel.put(TSS + 0x24, &IST1.to_le_bytes());
        kernel.put(TSS + 0x2c, &IST2.to_le_bytes());
        kernel.gate(8, KERNEL_CODE, 0x8e, 1);
        kernel.gate(2, KERNEL_CODE, 0x8e, 2);
        kernel
    }

    pub(super) fn protected() -> Self {
        let t = TestCpu::new32();
        let mut kernel = Self { t, long: false };
        kernel.furnish();
        kernel.put(TSS + 4, &(RSP0 as u32).to_le_bytes());
        kernel.put(TSS + 8, &KERNEL_DATA.to_le_bytes());
        kernel
    }

    fn furnish(&mut self) {
        let code: u64 = if self.long {
            0x00af_9b00_0000_ffff
        } else {
            0x00cf_9b00_0000_ffff
        };
        let entries: [u64; 14] = [
            0,
            code,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x0000_8900_0000_0067 | (TSS << 16),
            0,
            0x00cf_1300_0000_ffff,
            0,
            0,
            0x00cf_9b00_0000_ffff,
            0x0000_8900_0000_0067 | ((TSS + 0x100) << 16),
            0x0000_e500_0000_0000 | (u64::from(TSS2_SELECTOR) << 16),
        ];
        for (n, entry) in entries.iter().enumerate() {
            self.put(GDT + 8 * n as u64, &entry.to_le_bytes());
        }
        for vector in 0..=255u8 {
            let kind = if matches!(vector, 3 | 4 | 0x80) {
                0xee
            } else {
                0x8e
            };
            self.gate(vector, KERNEL_CODE, kind, 0);
            self.put(HANDLERS + 16 * u64::from(vector), &[0xf4]);
        }
        // The I/O map begins past the limit: no ports.
        self.put(TSS + 0x66, &0x68u16.to_le_bytes());
        self.sys.gdt = DescriptorTable {
            base: GDT,
            limit: 0x6f,
        };
        self.sys.idt = DescriptorTable {
            base: IDT,
            limit: if self.long { 0xfff } else { 0x7ff },
        };
        assert_eq!(self.load_task_register(TSS_SELECTOR), Ok(()));
    }

    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.t.write(at, bytes);
    }

    pub(super) fn gate(&mut self, vector: u8, selector: u16, kind: u8, ist: u8) {
        let target = HANDLERS + 16 * u64::from(vector);
        let low = (target & 0xffff)
            | (u64::from(selector) << 16)
            | (u64::from(ist) << 32)
            | (u64::from(kind) << 40)
            | ((target >> 16) << 48);
        let size = if self.long { 16 } else { 8 };
        self.put(IDT + size * u64::from(vector), &low.to_le_bytes());
    }

    /// A handler of more than HLT.
    pub(super) fn handler(&mut self, vector: u8, code: &[u8]) {
        assert!(code.len() <= 16);
        self.put(HANDLERS + 16 * u64::from(vector), code);
    }

    /// Code at RIP, run until a handler halts: its vector.
    pub(super) fn run_to_handler(&mut self, code: &[u8]) -> u8 {
        let at = self.rip;
        self.put(at, code);
        self.sys.activity = crate::sys::state::Activity::Running;
        self.resume_to_handler()
    }

    pub(super) fn resume_to_handler(&mut self) -> u8 {
        let exit = self.run();
        assert!(matches!(exit, CpuExit::Halted { .. }), "{exit:?}");
        let offset = self.rip.wrapping_sub(HANDLERS + 1);
        assert_eq!(offset % 16, 0, "halted at {:#x}", self.rip);
        (offset / 16) as u8
    }

    /// Words of the handler's stack, top first; 8 or 4 bytes each.
    pub(super) fn frame<const N: usize>(&self) -> [u64; N] {
        let size = if self.long { 8 } else { 4 };
        let rsp = self.gpr[usize::from(reg::RSP)];
        std::array::from_fn(|n| {
            let word = self.t.read_u64(rsp + size * n as u64);
            if self.long { word } else { word & 0xffff_ffff }
        })
    }

    /// Goes to privilege level 3, RIP and RSP as they are.
    pub(super) fn enter_user(&mut self, code: u16) {
        let long = code == USER_CODE64;
        let make = |selector, attributes| Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            attributes,
            unusable: false,
        };
        self.set_segment(seg::CS, make(code, if long { 0xa0fb } else { 0xc0fb }));
        for index in [seg::SS, seg::DS, seg::ES] {
            self.set_segment(index, make(USER_DATA, 0xc0f3));
        }
        self.update_mode();
        assert_eq!(self.cpl, 3);
    }

    pub(super) fn change_cr0(&mut self, change: fn(u64) -> u64) -> Result<(), Trap> {
        let value = change(self.sys.cr0);
        self.write_cr0(value)
    }

    pub(super) fn change_cr4(&mut self, change: fn(u64) -> u64) -> Result<(), Trap> {
        let value = change(self.sys.cr4);
        self.write_cr4(value)
    }

    pub(super) fn change_efer(&mut self, change: fn(u64) -> u64) -> Result<(), Trap> {
        let value = change(self.sys.efer);
        self.write_efer(value)
    }

    pub(super) fn set(&mut self, register: u8, value: u64) {
        self.gpr[usize::from(register)] = value;
    }

    pub(super) fn get(&self, register: u8) -> u64 {
        self.gpr[usize::from(register)]
    }
}
