//! The architectural state of one virtual processor, the same for every backend.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

/// The version of [`CpuState`]'s fields; raised with every change of them.
pub const CPU_STATE_VERSION: u32 = 2;

/// One segment register with its hidden part (Intel SDM 3A §3.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes (already scaled by G).
    pub limit: u32,
    /// Type (bits 0–3), S (4), DPL (5–6), P (7), AVL (12), L (13), D/B (14), G (15): the layout of
    /// the descriptor's second doubleword, shifted right by 8; bits 8–11 are zero.
    pub attributes: u16,
    /// Null or otherwise not usable for access.
    pub unusable: bool,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// General registers, instruction pointer and flags, in instruction-encoding order
/// (RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8–R15).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GeneralRegisters {
    /// The sixteen registers.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
}

/// Segments, tables and control registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemRegisters {
    /// ES, CS, SS, DS, FS, GS, in encoding order.
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldt: Segment,
    /// GDTR.
    pub gdt: DescriptorTable,
    /// IDTR.
    pub idt: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8, the task priority (also in the local APIC page, which rules where they differ).
    pub cr8: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
}

/// Debug registers (DR4 and DR5 are aliases).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebugRegisters {
    /// DR0–DR3.
    pub address: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
}

/// Activity state (Intel SDM 3A §9.4, MP initialisation).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MpState {
    /// Executes instructions.
    #[default]
    Runnable,
    /// After reset, an application processor that waits for INIT.
    Uninitialized,
    /// After INIT, waits for SIPI.
    InitReceived,
    /// In HLT.
    Halted,
    /// SIPI received with this vector, not yet started.
    SipiReceived(u8),
}

/// An exception on its way into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExceptionEvent {
    /// Vector 0–31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// CR2 or DR6 value that the delivery sets, where it has not yet been set.
    pub payload: Option<u64>,
    /// Delivery has begun (*injected*) or not (*pending*).
    pub injected: bool,
}

impl ExceptionEvent {
    /// Whether it is INT3's or INTO's and its delivery was broken off: the processor still stands
    /// before the instruction (Intel SDM 3C §27.2.4), which raises it again.
    pub fn is_unfinished_trap(&self) -> bool {
        self.injected && matches!(self.vector, 3 | 4)
    }
}

/// An interrupt on its way into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptEvent {
    /// Vector.
    pub vector: u8,
    /// From INT n rather than from outside.
    pub soft: bool,
}

/// Events between instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// Exception being delivered.
    pub exception: Option<ExceptionEvent>,
    /// Interrupt accepted and not yet delivered.
    pub interrupt: Option<InterruptEvent>,
    /// STI shadow: interrupts held off for one instruction.
    pub sti_shadow: bool,
    /// MOV SS / POP SS shadow.
    pub mov_ss_shadow: bool,
    /// NMI accepted and not yet delivered.
    pub nmi_injected: bool,
    /// NMI waiting.
    pub nmi_pending: bool,
    /// NMIs masked until IRET.
    pub nmi_masked: bool,
}

/// The local APIC's registers, as the 4 KiB page of Intel SDM 3A table 12-1 has them: one 32-bit
/// value every 16 bytes, the first 1 KiB of it. In x2APIC mode the same page, the id in bits
/// 31–0 of register 0x20.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalApicState {
    /// The registers at offsets 0x000, 0x010, … 0x3f0. The current count of a one-shot timer is 0 when
    /// its interrupt was raised; that of a periodic one is 0 when it is due.
    pub registers: Vec<u32>,
    /// IA32_TSC_DEADLINE; zero when disarmed.
    pub tsc_deadline: u64,
}

/// Everything that a processor is, architecturally, between two instructions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// [`CPU_STATE_VERSION`].
    pub version: u32,
    /// General registers.
    pub general: GeneralRegisters,
    /// System registers.
    pub system: SystemRegisters,
    /// Debug registers.
    pub debug: DebugRegisters,
    /// XCR0.
    pub xcr0: u64,
    /// The XSAVE area in standard (not compacted) format, for the bits of XCR0 that the CPU model
    /// allows: legacy region, header, then the extended regions at the offsets of CPUID leaf 0xd.
    pub xsave: Vec<u8>,
    /// Model-specific registers by index, ascending; those that have a field above excepted.
    pub msrs: Vec<(u32, u64)>,
    /// The local APIC; `None` in a VM without.
    pub lapic: Option<LocalApicState>,
    /// Activity state.
    pub mp_state: MpState,
    /// Events between instructions.
    pub events: Events,
    /// The time-stamp counter when the state was read. Its frequency is told by the CPUID table.
    pub tsc: u64,
    /// The guest's clock at that moment ([`crate::Vm::clock_ns`]). Counter and clock go on together in
    /// a machine whose clock was set: a guest compares them.
    pub clock_ns: u64,
}

/// What a boot loader sets before the first instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BootRegisters {
    /// General registers.
    pub general: GeneralRegisters,
    /// System registers.
    pub system: SystemRegisters,
}

/// For backends: keeps time-stamp counters that were in step in step, though their values were read
/// one after the other, and are set so.
#[derive(Debug, Default)]
pub struct SharedTscOffset(Mutex<Option<Epoch>>);

/// One setting of all processors.
#[derive(Clone, Copy, Debug)]
struct Epoch {
    offset: u64,
    /// A bit per processor that has it.
    processors: u64,
}

impl SharedTscOffset {
    fn epoch(&self) -> MutexGuard<'_, Option<Epoch>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The offset to give processor `id`, which would by itself get `offset`: that of the first one,
    /// if they differ by less than a second of ticks. A processor that is set again begins anew.
    pub fn common(&self, id: u32, offset: u64, tsc_khz: u32) -> u64 {
        let bit = 1u64.checked_shl(id).unwrap_or(0);
        let mut epoch = self.epoch();
        // As numbers on a ring: a small negative one is near a small positive one.
        let near = |first: u64| {
            (first.wrapping_sub(offset) as i64).unsigned_abs() < u64::from(tsc_khz) * 1000
        };
        match &mut *epoch {
            Some(epoch) if epoch.processors & bit == 0 && near(epoch.offset) => {
                epoch.processors |= bit;
                epoch.offset
            }
            _ => {
                let processors = bit;
                epoch.insert(Epoch { offset, processors }).offset
            }
        }
    }

    /// What comes is another state.
    pub fn forget(&self) {
        *self.epoch() = None;
    }
}

impl Segment {
    /// A segment that can't be used for access.
    pub const UNUSABLE: Self = Self {
        selector: 0,
        base: 0,
        limit: 0,
        attributes: 0,
        unusable: true,
    };

    /// A flat segment: base 0, limit 4 GiB - 1.
    pub const fn flat(selector: u16, attributes: u16) -> Self {
        Self {
            selector,
            base: 0,
            limit: u32::MAX,
            attributes,
            unusable: false,
        }
    }
}

impl BootRegisters {
    /// 64-bit mode at privilege level 0, interrupts off, with the page tables at `cr3`: flat
    /// segments as a GDT of null, 64-bit code (8) and data (16) would give, no tables loaded.
    pub fn long_mode(cr3: u64, rip: u64, rsp: u64) -> Self {
        const CR0_PE_ET_NE_WP_PG: u64 = 0x8001_0031;
        const CR4_PAE: u64 = 1 << 5;
        const EFER_LME_LMA: u64 = (1 << 8) | (1 << 10);
        const CODE64: u16 = 0xa09b;
        const DATA: u16 = 0xc093;
        const BUSY_TSS: u16 = 0x008b;
        let data = Segment::flat(16, DATA);
        let mut gpr = [0; 16];
        gpr[4] = rsp;
        Self {
            general: GeneralRegisters {
                gpr,
                rip,
                rflags: 2,
            },
            system: SystemRegisters {
                segments: [data, Segment::flat(8, CODE64), data, data, data, data],
                tr: Segment {
                    limit: 0xffff,
                    attributes: BUSY_TSS,
                    ..Segment::default()
                },
                ldt: Segment::UNUSABLE,
                cr0: CR0_PE_ET_NE_WP_PG,
                cr3,
                cr4: CR4_PAE,
                efer: EFER_LME_LMA,
                apic_base: 0xfee0_0900,
                ..SystemRegisters::default()
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_in_step_stay_in_step() {
        const KHZ: u32 = 1_000_000;
        const SECOND: u64 = 1_000_000_000;
        let offsets = SharedTscOffset::default();
        assert_eq!(offsets.common(0, 5, KHZ), 5);
        assert_eq!(offsets.common(1, 5_u64.wrapping_sub(900), KHZ), 5);
        assert_eq!(offsets.common(2, 5 + SECOND / 2, KHZ), 5);
        // One that the guest has moved, on purpose or not.
        assert_eq!(offsets.common(3, 7 * SECOND, KHZ), 7 * SECOND);
        // The same processor again: another state.
        assert_eq!(offsets.common(3, 7 * SECOND + 4, KHZ), 7 * SECOND + 4);
        offsets.forget();
        assert_eq!(offsets.common(1, 9, KHZ), 9);
    }
}
