//! Making small 64-bit guests.

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::cpuid::CpuidTable;
use crate::exit::Exit;
use crate::memory::{Gpa, GuestRam, MemorySlot, RamRegion};
use crate::probe::chain;
use crate::state::{BootRegisters, DescriptorTable, Segment};
use crate::traits::{Hypervisor, Irqchip, Vcpu, Vm, VmSpec};

/// Bytes of RAM from address 0, one slot. The lay-out:
/// page tables 0x1000–0x6fff, GDT 0x7000, IDT 0x8000, TSS 0x9000, real-mode start-up code 0xa000,
/// code 0x10000, data 0x40000, stacks below 0x80000 and 0x90000.
pub(super) const RAM: usize = 0x20_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORIES: u64 = 0x3000;
const GDT: u64 = 0x7000;
const IDT: u64 = 0x8000;
const TSS: u64 = 0x9000;
/// Where an application processor starts (SIPI vector 0x0a).
pub(super) const AP_START: u64 = 0xa000;
/// Where a program is loaded.
pub(super) const CODE: u64 = 0x1_0000;
/// Scratch memory of programs.
pub(super) const DATA: u64 = 0x4_0000;
/// The stack of a second processor.
pub(super) const SECOND_STACK: u64 = 0x9_0000;
const STACK: u64 = 0x8_0000;
/// Programs tell the host 32-bit values here.
pub(super) const REPORT: u16 = 0x500;
/// No memory here, but the page tables map it (as all of the first 4 GiB).
pub(super) const HOLE: u64 = 0xd000_0000;
/// A second slot that some cases map.
pub(super) const EXTRA: u64 = 0x40_0000;
/// The local APIC's page.
pub(super) const APIC: u64 = 0xfee0_0000;

type Assembler = CodeAssembler;
/// Interrupt vectors and their handlers.
pub(super) type Handlers = Vec<(u8, CodeLabel)>;

/// A virtual machine with RAM, tables and a program.
pub(super) struct Guest<H: Hypervisor> {
    pub(super) vm: H::Vm,
    pub(super) ram: GuestRam,
    pub(super) cpuid: CpuidTable,
}

/// Memory for one slot, at `gpa`.
pub(super) fn make_ram(gpa: u64, len: usize) -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(gpa), len)]).expect("memory for a guest")
}

/// The slot over all of `ram`'s only region.
pub(super) fn slot(ram: &GuestRam) -> MemorySlot {
    let region = ram.iter().next().expect("a region");
    let mapping: std::sync::Arc<RamRegion> = region.get_mmap();
    MemorySlot {
        gpa: Gpa(region.start_addr().0),
        offset: 0,
        len: mapping.size(),
        region: mapping,
        read_only: false,
        log_dirty: false,
    }
}

fn assemble(
    bits: u32,
    at: u64,
    write: impl FnOnce(&mut Assembler) -> Result<Handlers, IcedError>,
) -> (Vec<u8>, Vec<(u8, u64)>) {
    let mut assembler = Assembler::new(bits).expect("an assembler");
    let handlers = write(&mut assembler).expect("a program");
    let code = assembler
        .assemble_options(at, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)
        .expect("an encodable program");
    let handlers = handlers
        .iter()
        .map(|(vector, label)| (*vector, code.label_ip(label).expect("a handler's address")))
        .collect();
    (code.inner.code_buffer, handlers)
}

impl<H: Hypervisor> Guest<H> {
    /// A machine without program.
    pub(super) fn bare(hypervisor: &H, irqchip: Irqchip) -> Self {
        let spec = VmSpec {
            irqchip,
            max_vcpus: 4,
        };
        let vm = hypervisor
            .create_vm(&spec)
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
        let ram = make_ram(0, RAM);
        vm.map(slot(&ram))
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
        let guest = Self {
            vm,
            ram,
            cpuid: hypervisor.supported_cpuid().clone(),
        };
        guest.write_tables();
        guest
    }

    /// A machine with local APICs and this 64-bit program at [`CODE`].
    pub(super) fn new(
        hypervisor: &H,
        program: impl FnOnce(&mut Assembler) -> Result<Handlers, IcedError>,
    ) -> Self {
        let guest = Self::bare(hypervisor, Irqchip::Split);
        guest.load(program);
        guest
    }

    /// A machine like this one, with the same memory contents.
    pub(super) fn twin(&self, hypervisor: &H) -> Self {
        let twin = Self::bare(hypervisor, Irqchip::Split);
        let mut contents = vec![0; RAM];
        self.ram
            .read_slice(&mut contents, GuestAddress(0))
            .expect("a read");
        twin.ram
            .write_slice(&contents, GuestAddress(0))
            .expect("a write");
        twin
    }

    fn write_tables(&self) {
        self.write(PML4, PDPT | 3);
        for giga in 0..4 {
            self.write(PDPT + giga * 8, (DIRECTORIES + giga * 0x1000) | 3);
            for entry in 0..512 {
                // Present, writable, 2 MiB.
                let page = (giga << 30) | (entry << 21) | 0x83;
                self.write(DIRECTORIES + giga * 0x1000 + entry * 8, page);
            }
        }
        // Null, 64-bit code, data, task state segment (busy).
        let tss_low = 0x0000_8b00_0000_0067 | (TSS & 0xff_ffff) << 16;
        for (index, entry) in [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, tss_low, 0]
            .into_iter()
            .enumerate()
        {
            self.write(GDT + index as u64 * 8, entry);
        }
    }

    /// Loads a 64-bit program and its handlers.
    pub(super) fn load(&self, program: impl FnOnce(&mut Assembler) -> Result<Handlers, IcedError>) {
        let (code, handlers) = assemble(64, CODE, program);
        self.ram
            .write_slice(&code, GuestAddress(CODE))
            .expect("a write");
        for (vector, address) in handlers {
            // A 64-bit interrupt gate through code segment 8.
            let gate = IDT + u64::from(vector) * 16;
            let low = (address & 0xffff) | 8 << 16 | 0x8e00 << 32 | (address >> 16 & 0xffff) << 48;
            self.write(gate, low);
            self.write(gate + 8, address >> 32);
        }
    }

    /// Loads 16-bit code where an application processor starts.
    pub(super) fn load_start_up(
        &self,
        program: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
    ) {
        let (code, _) = assemble(16, 0, |a| program(a).map(|()| Vec::new()));
        self.ram
            .write_slice(&code, GuestAddress(AP_START))
            .expect("a write");
    }

    pub(super) fn write(&self, at: u64, value: u64) {
        self.ram
            .write_obj(value, GuestAddress(at))
            .expect("a write");
    }

    pub(super) fn read(&self, at: u64) -> u64 {
        self.ram.read_obj(GuestAddress(at)).expect("a read")
    }

    /// A processor as after reset.
    pub(super) fn vcpu(&self, id: u32) -> VcpuOf<H> {
        let cpuid = with_apic_id(&self.cpuid, id);
        self.vm
            .create_vcpu(id, &cpuid)
            .unwrap_or_else(|e| panic!("{}", chain(&e)))
    }

    /// Processor 0, about to execute the program.
    pub(super) fn start(&self) -> VcpuOf<H> {
        self.start_with(|_| {})
    }

    /// Processor 0 with changed registers.
    pub(super) fn start_with(&self, change: impl FnOnce(&mut BootRegisters)) -> VcpuOf<H> {
        let mut vcpu = self.vcpu(0);
        let mut registers = entry();
        change(&mut registers);
        vcpu.set_boot_registers(&registers)
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
        vcpu.begin_call();
        vcpu
    }
}

/// The processor type of a hypervisor.
pub(super) type VcpuOf<H> = <<H as Hypervisor>::Vm as Vm>::Vcpu;

fn with_apic_id(cpuid: &CpuidTable, id: u32) -> CpuidTable {
    let mut cpuid = cpuid.clone();
    for entry in &mut cpuid.entries {
        match entry.leaf {
            1 => entry.result.ebx = entry.result.ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => entry.result.edx = id,
            _ => {}
        }
    }
    cpuid
}

/// The registers with which a program starts.
pub(super) fn entry() -> BootRegisters {
    let mut registers = BootRegisters::long_mode(PML4, CODE, STACK);
    let system = &mut registers.system;
    system.gdt = DescriptorTable {
        base: GDT,
        limit: 0x27,
    };
    system.idt = DescriptorTable {
        base: IDT,
        limit: 0xfff,
    };
    system.tr = Segment {
        selector: 0x18,
        base: TSS,
        limit: 0x67,
        attributes: 0x8b,
        unusable: false,
    };
    // OSFXSR and OSXMMEXCPT, MP: SSE is on.
    system.cr4 |= 3 << 9;
    system.cr0 |= 2;
    registers
}

/// The next exit that means something.
pub(super) fn next(vcpu: &mut impl Vcpu) -> Exit {
    loop {
        match vcpu.run() {
            Ok(Exit::Interrupted) => {}
            Ok(exit) => return exit,
            Err(error) => panic!("{}", chain(&error)),
        }
    }
}

/// The next value that the program reports.
pub(super) fn reported(vcpu: &mut impl Vcpu) -> u32 {
    match next(vcpu) {
        Exit::PortOut {
            port: REPORT,
            size: 4,
            data,
        } => data,
        other => panic!("{other:?} instead of a report"),
    }
}

/// `out REPORT, eax`.
pub(super) fn report(a: &mut Assembler) -> Result<(), IcedError> {
    a.mov(edx, u32::from(REPORT))?;
    a.out(dx, eax)
}

/// Reports a constant.
pub(super) fn report_value(a: &mut Assembler, value: u32) -> Result<(), IcedError> {
    a.mov(eax, value)?;
    report(a)
}

/// Ends a program: spins for ever.
pub(super) fn stop(a: &mut Assembler) -> Result<(), IcedError> {
    let mut here = a.create_label();
    a.set_label(&mut here)?;
    a.jmp(here)
}

/// Some hundred instructions: time for an interrupt to come, on backends that look for one only
/// now and then. Clobbers ECX.
pub(super) fn spin(a: &mut Assembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(ecx, 1000)?;
    a.set_label(&mut again)?;
    a.dec(ecx)?;
    a.jnz(again)
}

/// Writes a register of the local APIC through its page. Clobbers RBX.
pub(super) fn apic_write(a: &mut Assembler, register: i32, value: u32) -> Result<(), IcedError> {
    a.mov(ebx, APIC as u32)?;
    a.mov(dword_ptr(rbx + register), value)
}

/// Enables the local APIC (spurious vector 0xff).
pub(super) fn apic_enable(a: &mut Assembler) -> Result<(), IcedError> {
    apic_write(a, 0xf0, 0x1ff)
}

/// A handler that reports `value`, ends the interrupt and returns. Keeps all registers.
pub(super) fn reporting_handler(
    a: &mut Assembler,
    value: u32,
    end: bool,
) -> Result<CodeLabel, IcedError> {
    let mut handler = a.create_label();
    a.set_label(&mut handler)?;
    a.push(rax)?;
    a.push(rdx)?;
    a.push(rbx)?;
    report_value(a, value)?;
    if end {
        apic_write(a, 0xb0, 0)?;
    }
    a.pop(rbx)?;
    a.pop(rdx)?;
    a.pop(rax)?;
    a.iretq()?;
    Ok(handler)
}
