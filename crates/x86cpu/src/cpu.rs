//! The state of one virtual processor, in the order in which instructions use it.

use std::sync::Arc;

use crate::apic::LocalApic;
use crate::budget::Budget;
use crate::code::{BlockEnd, CodeCache, Op};
use crate::cpuid::{CpuidTable, Features};
use crate::flags::{LazyFlags, rflags};
use crate::fpu::FpuState;
use crate::mem::home::Home;
use crate::mem::{DeviceReplay, Mmu, PAGE_SIZE, TlbView};
use crate::shared::{CpuShared, Machine};
use crate::sys::SystemState;
use crate::trap::TrapState;

/// Indices into [`Cpu::gpr`]: 0–15 are the general registers in encoding order.
pub mod reg {
    #![expect(missing_docs, reason = "register names say it all")]
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R8: u8 = 8;
    pub const R11: u8 = 11;
    /// RIP of the running block's first instruction: base of RIP-relative operands.
    pub const BLOCK_RIP: u8 = 16;
    /// Always zero: stands for "no base" and "no index".
    pub const ZERO: u8 = 17;
    /// Written by pseudo-ops, to carry an address that no [`crate::code::Op`] can hold.
    pub const TMP: u8 = 18;
    /// Byte-register operands only: AH is `HIGH8 + 0`, CH, DH, BH follow.
    pub const HIGH8: u8 = 20;
}

/// Indices into [`Cpu::seg_base`]: the segment registers in encoding order, then the flat one.
pub mod seg {
    #![expect(missing_docs, reason = "register names say it all")]
    pub const ES: u8 = 0;
    pub const CS: u8 = 1;
    pub const SS: u8 = 2;
    pub const DS: u8 = 3;
    pub const FS: u8 = 4;
    pub const GS: u8 = 5;
    /// Base 0, no limit: what 64-bit mode makes of ES, CS, SS and DS.
    pub const FLAT: u8 = 6;
    /// As [`FLAT`], for stack accesses: what is wrong with the address is a stack fault.
    pub const FLAT_SS: u8 = 7;
}

/// Bytes of the home of a processor that begins small, with some for alignment.
const HOME: usize = Mmu::HOME + CodeCache::HOME + 4 * PAGE_SIZE;

/// One virtual processor.
///
/// Hot fields first: a compiled or interpreted instruction finds them within a byte displacement.
#[repr(C, align(64))]
pub struct Cpu {
    /// General registers and the pseudo-registers of [`reg`].
    pub gpr: [u64; 32],
    /// The instruction pointer. While a block runs it is the block's first instruction; an op's own
    /// address is `rip + op.ip`. Branches set it to their target.
    pub rip: u64,
    /// CF, PF, AF, ZF, SF, OF, not yet computed.
    pub flags: LazyFlags,
    /// RFLAGS without the six arithmetic flags (bit 1 set).
    pub rflags: u64,
    /// Segment bases by [`seg`]; ES, CS, SS, DS read as stored in legacy modes and are not used in
    /// 64-bit mode (lowering picks [`seg::FLAT`]).
    pub seg_base: [u64; 8],
    /// Which first-level TLB serves the current privilege, and under which tag.
    pub(crate) view: TlbView,
    /// The op that ends the running block; moved to the front to end it early.
    pub(crate) block_end: BlockEnd,
    /// Which part of a fused op did not complete, until that is dealt with.
    pub(crate) failed_part: BlockEnd,
    /// What is translated and how: the TLBs and the page walker.
    pub mmu: Box<Mmu>,
    /// Non-zero when an SSE/AVX or x87 instruction can't simply run (CR0.TS/EM, CR4.OSFXSR, XCR0):
    /// bit 0 x87/MMX, bit 1 SSE, bit 2 AVX. Kept by `sys` whenever those registers change.
    pub simd_blocked: u32,
    /// Current privilege level (SS.DPL; 3 in virtual-8086 mode, 0 in real mode).
    pub cpl: u8,
    /// Why the current op returned `Err(Trap)`.
    pub trap: TrapState,
    /// x87, SSE and AVX registers.
    pub fpu: FpuState,
    /// Control, debug, model-specific and segment registers.
    pub sys: SystemState,
    /// The local APIC.
    pub apic: LocalApic,
    /// Decoded blocks.
    pub code: CodeCache,
    /// Answers to the device accesses of the current instruction.
    pub(crate) devices: DeviceReplay,
    /// Instructions interpreted (whole blocks are counted at their start). Those that run in compiled
    /// code are counted nowhere.
    pub instructions: u64,
    /// How many more may run.
    pub(crate) budget: Budget,
    /// Number of the processor, also its initial APIC id.
    pub id: u32,
    /// CPUID as the guest sees it.
    pub cpuid: CpuidTable,
    /// The same as a set, for decoding.
    pub features: Features,
    /// What other threads may touch.
    pub shared: Arc<CpuShared>,
    /// What all processors of the machine share.
    pub machine: Arc<Machine>,
}

impl Cpu {
    /// Processor `id` of the machine as after power-up: number 0 runs from the reset vector, the
    /// others wait for INIT and SIPI. `None` if the machine has no such number free.
    pub fn new(machine: &Arc<Machine>, id: u32, cpuid: CpuidTable) -> Option<Box<Self>> {
        let shared = Arc::new(CpuShared::default());
        machine
            .cpus
            .get(usize::try_from(id).ok()?)?
            .set(shared.clone())
            .ok()?;
        let features = cpuid.features();
        let mut home = machine.tuning.small.then(|| Home::new(HOME));
        let mut mmu = Box::new(Mmu::new(machine.memory.slots(), home.as_mut()));
        mmu.set_physical_bits(cpuid.physical_address_bits());
        let mut cpu = Box::new(Self {
            gpr: [0; 32],
            rip: 0xfff0,
            flags: LazyFlags::default(),
            rflags: rflags::FIXED,
            seg_base: [0; 8],
            view: mmu.view(),
            block_end: BlockEnd::default(),
            failed_part: BlockEnd::default(),
            mmu,
            simd_blocked: 0,
            cpl: 0,
            trap: TrapState::default(),
            fpu: FpuState::default(),
            sys: SystemState::reset(),
            apic: LocalApic::new(id),
            code: CodeCache::new(machine.tuning, home.as_mut()),
            devices: DeviceReplay::default(),
            instructions: 0,
            budget: Budget::default(),
            id,
            cpuid,
            features,
            shared,
            machine: machine.clone(),
        });
        cpu.flags.set_bits(0);
        for i in 0..6 {
            cpu.seg_base[i] = cpu.sys.segments[i].base;
        }
        cpu.apic.publish(&cpu.shared);
        cpu.update_mode();
        Some(cpu)
    }

    /// RIP of the instruction after `op`, truncated to the code's size.
    #[inline(always)]
    pub fn next_rip(&self, op: &Op) -> u64 {
        self.truncate_rip(self.rip.wrapping_add(op.next_ip()))
    }

    /// RIP of `op`'s instruction, truncated to the code's size.
    #[inline(always)]
    pub fn own_rip(&self, op: &Op) -> u64 {
        self.truncate_rip(self.rip.wrapping_add(u64::from(op.ip)))
    }

    /// An instruction pointer as the code's size lets it be.
    #[inline(always)]
    pub fn truncate_rip(&self, rip: u64) -> u64 {
        match self.sys.mode.bits() {
            64 => rip,
            32 => rip & 0xffff_ffff,
            _ => rip & 0xffff,
        }
    }
}
