//! Small guests as function sandboxes have them: no interrupt controllers, one slot, 64-bit code at
//! level 3 that leaves with OUT.
#![allow(dead_code, reason = "each user needs some of it")]

use std::sync::Arc;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use skerry_hypervisor::state::Segment;
use skerry_hypervisor::{
    BootRegisters, Exit, Gpa, GuestRam, Hypervisor, Irqchip, MemorySlot, RamRegion, Vcpu, Vm,
    VmSpec,
};
use skerry_hypervisor_soft::{Soft, SoftVcpu, SoftVm, Tuning};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Where the guests' parts are, linear and physical alike.
pub const CODE: u64 = 0x1_0000;
pub const DATA: u64 = 0x2_0000;
pub const STACK: u64 = 0x3_0000;
const TABLES: u64 = 0x1000;
/// The port of all guests.
pub const PORT: u16 = 0x10;

/// What the processors look like.
pub const SPEC: VmSpec = VmSpec {
    irqchip: Irqchip::None,
    max_vcpus: 1,
};

/// A program, assembled.
pub fn assemble(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("an assembler");
    write(&mut a).expect("a program");
    a.assemble(CODE).expect("an encodable program")
}

/// Leaves, again and again.
pub fn out_loop() -> Vec<u8> {
    assemble(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.out(u32::from(PORT), eax)?;
        a.jmp(again)
    })
}

/// About 150 instructions with loads, stores, calls and returns between two exits.
pub fn work_loop() -> Vec<u8> {
    assemble(|a| {
        let (mut again, mut turn, mut f) = (a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.mov(ecx, 8)?;
        a.set_label(&mut turn)?;
        a.mov(rax, qword_ptr(rsi + rcx * 8))?;
        a.add(rax, rbx)?;
        a.mov(qword_ptr(rdi + rcx * 8), rax)?;
        a.call(f)?;
        a.xor(rbx, rax)?;
        a.dec(ecx)?;
        a.jnz(turn)?;
        for n in 0..16 {
            a.mov(rdx, qword_ptr(rsi + n * 8))?;
            a.lea(rdx, qword_ptr(rdx + n))?;
            a.mov(qword_ptr(rdi + n * 8 + 0x100), rdx)?;
        }
        a.out(u32::from(PORT), eax)?;
        a.jmp(again)?;
        a.set_label(&mut f)?;
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.add(rax, qword_ptr(rbp + 8))?;
        a.rol(rax, 3)?;
        a.pop(rbp)?;
        a.ret()
    })
}

/// About 200 basic blocks, some of which a loop runs `turns` times, then an exit; again and again.
pub fn many_blocks(turns: u32) -> Vec<u8> {
    assemble(|a| {
        let (mut again, mut turn) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        for n in 0..95 {
            let mut over = a.create_label();
            a.test(eax, 1 << (n % 31))?;
            a.jnz(over)?;
            a.add(rax, n + 1)?;
            a.mov(qword_ptr(rsi + n * 8), rax)?;
            a.set_label(&mut over)?;
            a.inc(rbx)?;
        }
        a.mov(ecx, turns)?;
        a.set_label(&mut turn)?;
        a.add(rax, qword_ptr(rsi + rcx))?;
        a.mov(qword_ptr(rdi), rax)?;
        a.dec(ecx)?;
        a.jnz(turn)?;
        a.out(u32::from(PORT), eax)?;
        a.jmp(again)
    })
}

/// Memory of so many bytes from address 0.
pub fn ram(len: usize) -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), len)]).expect("memory")
}

/// All of it as one slot.
pub fn slot(ram: &GuestRam, log_dirty: bool) -> MemorySlot {
    let region = ram.iter().next().expect("a region");
    let mapping: Arc<RamRegion> = region.get_mmap();
    MemorySlot {
        gpa: Gpa(0),
        offset: 0,
        len: region.len() as usize,
        region: mapping,
        read_only: false,
        log_dirty,
    }
}

/// Writes page tables that show the first 2 MiB to level 3, and a program.
pub fn fill(ram: &GuestRam, code: &[u8]) {
    const FLAGS: u64 = 7;
    let put = |at: u64, value: u64| ram.write_obj(value, GuestAddress(at)).expect("memory");
    for level in 0..3 {
        let table = TABLES + level * 0x1000;
        put(table, (table + 0x1000) | FLAGS);
    }
    for page in 0..256 {
        put(TABLES + 0x3000 + page * 8, page << 12 | FLAGS);
    }
    ram.write_slice(code, GuestAddress(CODE)).expect("memory");
}

/// Registers at the start.
pub fn entry() -> BootRegisters {
    let mut registers = BootRegisters::long_mode(TABLES, CODE, STACK);
    let segment = |selector, attributes| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes,
        unusable: false,
    };
    registers.system.segments = [segment(0x23, 0xc0f3); 6];
    registers.system.segments[1] = segment(0x2b, 0xa0fb);
    // OSFXSR and OSXMMEXCPT, MP.
    registers.system.cr4 |= 3 << 9;
    registers.system.cr0 |= 2;
    registers.general.rflags = 0x3002;
    registers.general.gpr[6] = DATA;
    registers.general.gpr[7] = DATA + 0x1000;
    registers
}

/// A machine with its program, ready to run.
pub struct Small {
    pub vcpu: SoftVcpu,
    pub vm: SoftVm,
    pub ram: GuestRam,
}

impl Small {
    pub fn new(soft: &Soft, code: &[u8]) -> Self {
        Self::with_ram(soft, code, ram(1 << 20))
    }

    pub fn with_ram(soft: &Soft, code: &[u8], ram: GuestRam) -> Self {
        fill(&ram, code);
        let vm = soft.create_vm(&SPEC).expect("a machine");
        vm.map(slot(&ram, true)).expect("a slot");
        let mut vcpu = vm
            .create_vcpu(0, soft.supported_cpuid())
            .expect("a processor");
        vcpu.set_boot_registers(&entry()).expect("registers");
        Self { vcpu, vm, ram }
    }

    /// Runs to the next OUT, whose value it gives.
    pub fn out(&mut self) -> u32 {
        match self.vcpu.run().expect("a run") {
            Exit::PortOut {
                port: PORT,
                size: 4,
                data,
            } => data,
            other => panic!("{other:?}"),
        }
    }
}

/// The backend, in a way of running code.
pub fn soft(tuning: Tuning) -> Soft {
    Soft::open().expect("the backend").with_tuning(tuning)
}

/// A number from `/proc/self/status`, in KiB.
pub fn status(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = text.lines().find(|line| line.starts_with(name));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.and_then(|n| n.parse().ok()).expect("a number")
}

/// Mappings of this process.
pub fn mappings() -> usize {
    let text = std::fs::read_to_string("/proc/self/maps").expect("mappings");
    text.lines().count()
}
