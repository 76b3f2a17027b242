//! A small machine around one processor, for tests, benchmarks and fuzzers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::MmapRegion;

use crate::cpu::{Cpu, reg, seg};
use crate::cpuid::{CpuidTable, HostFeatures, supported};
use crate::mem::Backing;
use crate::shared::{Host, Machine};
use crate::sys::state::{Segment, cr0, cr4, efer};
use crate::trap::{TrapKind, TrapState};
use crate::tuning::Tuning;

/// A host whose clock advances by one microsecond each time it is read.
#[derive(Debug, Default)]
pub struct FakeHost {
    /// Nanoseconds.
    pub clock: AtomicU64,
}

impl Host for FakeHost {
    fn wake(&self, _: u32) {}

    fn arm_timer(&self, _: u32, _: Option<u64>) {}

    fn clock_ns(&self) -> u64 {
        self.clock.fetch_add(1000, Ordering::Relaxed)
    }

    fn wall_clock_base_ns(&self) -> u64 {
        1_700_000_000_000_000_000
    }
}

/// What [`TestCpu::run_bytes`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The end of the bytes.
    End,
    /// A fault or exit: RIP is on the instruction.
    Trap(TrapKind),
    /// Too many instructions.
    Unfinished,
}

/// One processor, flat segments, RAM from address 0.
pub struct TestCpu {
    /// The processor.
    pub cpu: Box<Cpu>,
    /// Its machine.
    pub machine: Arc<Machine>,
    region: Arc<MmapRegion<()>>,
    backing: Arc<Backing>,
}

/// Where [`TestCpu::run_bytes`] puts code.
pub const CODE: u64 = 0x10000;
/// Top of the stack that the processor starts with.
pub const STACK: u64 = 0x20000;
/// Free for data: this address up to the end of RAM less the page tables.
pub const DATA: u64 = 0x40000;
/// RAM.
pub const RAM: usize = 4 << 20;
/// Page tables of the 64-bit set-up: identity, 2 MiB pages of the first GiB, user and writable.
pub const TABLES: u64 = RAM as u64 - 0x4000;

impl TestCpu {
    /// As after reset, with RAM.
    pub fn new() -> Self {
        Self::with_processors(1)
    }

    /// Room for more processors: see [`TestCpu::another`].
    pub fn with_processors(count: usize) -> Self {
        Self::with_tuning(count, Tuning::default())
    }

    /// The same, in a machine that runs code as `tuning` says.
    pub fn with_tuning(count: usize, tuning: Tuning) -> Self {
        Self::with_host(Arc::new(FakeHost::default()), count, tuning)
    }

    /// The same on a host of the caller's.
    pub fn with_host(host: Arc<dyn Host>, count: usize, tuning: Tuning) -> Self {
        let region = match MmapRegion::<()>::new(RAM) {
            Ok(region) => Arc::new(region),
            Err(error) => panic!("no memory for a test machine: {error}"),
        };
        let machine = Arc::new(Machine::with_tuning(host, count, tuning));
        let Some(backing) = Backing::new(region.clone()) else {
            panic!("a mapping is made of pages");
        };
        if let Err(error) = machine.map(0, RAM as u64, &backing, 0, false, false) {
            panic!("{error}");
        }
        let Some(mut cpu) = Cpu::new(&machine, 0, Self::cpuid()) else {
            panic!("processor 0 is free");
        };
        // Tests look at memory before it runs.
        cpu.catch_up_with_memory();
        cpu.leave_memory();
        Self {
            cpu,
            machine,
            region,
            backing,
        }
    }

    /// Everything that can be offered on this host.
    pub fn cpuid() -> CpuidTable {
        supported(&HostFeatures::detect())
    }

    /// Another processor of the same machine.
    pub fn another(&self, id: u32) -> Box<Cpu> {
        match Cpu::new(&self.machine, id, Self::cpuid()) {
            Some(cpu) => cpu,
            None => panic!("processor {id} isn't free"),
        }
    }

    /// The RAM's backing.
    pub fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    /// 64-bit mode at privilege level 0, identity-mapped.
    pub fn new64() -> Self {
        Self::new().in_64_bit_mode()
    }

    /// Its first processor in 64-bit mode at privilege level 0, identity-mapped.
    pub fn in_64_bit_mode(mut self) -> Self {
        self.make_tables();
        Self::set_up_64(&mut self.cpu);
        self
    }

    /// Puts a processor into 64-bit mode on [`TABLES`].
    pub fn set_up_64(cpu: &mut Cpu) {
        cpu.sys.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET | cr0::MP;
        cpu.sys.cr3 = TABLES;
        cpu.sys.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::PGE;
        cpu.sys.efer = efer::LMA | efer::LME | efer::NXE | efer::SCE;
        cpu.sys.xcr0 = 7;
        Self::segments(cpu, 0xa09b, 0xc093, u32::MAX);
    }

    /// 32-bit protected mode without paging.
    pub fn new32() -> Self {
        let mut t = Self::new();
        t.cpu.sys.cr0 = cr0::PE | cr0::NE | cr0::ET | cr0::MP;
        t.cpu.sys.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        t.cpu.sys.xcr0 = 7;
        Self::segments(&mut t.cpu, 0xc09b, 0xc093, u32::MAX);
        t
    }

    /// Real-address mode, CS and all others at base 0x10000 so that offset 0 is [`CODE`].
    pub fn new16() -> Self {
        let mut t = Self::new();
        t.cpu.sys.cr0 = cr0::ET;
        Self::segments(&mut t.cpu, 0x9b, 0x93, 0xffff);
        for i in 0..6 {
            t.cpu.set_segment(i, Segment::real((CODE >> 4) as u16));
        }
        t.cpu.update_mode();
        t.cpu.rip = 0;
        t.cpu.gpr[usize::from(reg::RSP)] = 0xfff0;
        t
    }

    fn segments(cpu: &mut Cpu, code: u16, data: u16, limit: u32) {
        for i in 0..6u8 {
            cpu.set_segment(
                i,
                Segment {
                    selector: if i == seg::CS { 8 } else { 16 },
                    base: 0,
                    limit,
                    attributes: if i == seg::CS { code } else { data },
                    unusable: false,
                },
            );
        }
        cpu.update_mode();
        cpu.rip = CODE;
        cpu.gpr[usize::from(reg::RSP)] = STACK;
    }

    fn make_tables(&self) {
        const PRESENT_WRITABLE_USER: u64 = 7;
        const LARGE: u64 = 0x80;
        self.write(
            TABLES,
            &((TABLES + 0x1000) | PRESENT_WRITABLE_USER).to_le_bytes(),
        );
        self.write(
            TABLES + 0x1000,
            &((TABLES + 0x2000) | PRESENT_WRITABLE_USER).to_le_bytes(),
        );
        for i in 0..512u64 {
            let entry = i << 21 | LARGE | PRESENT_WRITABLE_USER;
            self.write(TABLES + 0x2000 + i * 8, &entry.to_le_bytes());
        }
    }

    /// Writes RAM, as a device would.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        use vm_memory::VolatileMemory;
        let at = gpa as usize;
        match self.region.get_slice(at, bytes.len()) {
            Ok(slice) => slice.copy_from(bytes),
            Err(error) => panic!("test writes outside of RAM: {error}"),
        }
        self.backing.host_wrote(at, bytes.len());
    }

    /// Reads RAM.
    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        use vm_memory::VolatileMemory;
        let mut bytes = vec![0; len];
        match self.region.get_slice(gpa as usize, len) {
            Ok(slice) => {
                slice.copy_to(&mut bytes[..]);
            }
            Err(error) => panic!("test reads outside of RAM: {error}"),
        }
        bytes
    }

    /// Eight bytes of RAM.
    pub fn read_u64(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.read(gpa, 8));
        u64::from_le_bytes(bytes)
    }

    /// Runs whole blocks from where the processor stands, without looking at events, until an
    /// instruction doesn't complete or the processor has other things to do.
    pub fn run_blocks(&mut self) -> TrapKind {
        self.cpu.shared.requests.store(0, Ordering::SeqCst);
        self.cpu.catch_up_with_memory();
        self.cpu.devices.restart();
        self.cpu.trap = TrapState::default();
        let result = self.cpu.run_blocks();
        self.cpu.leave_memory();
        match result {
            Ok(()) => TrapKind::None,
            Err(_) => self.cpu.trap.kind,
        }
    }

    /// Writes `code` where RIP points and runs it, one instruction at a time, until RIP is behind
    /// it or something traps.
    pub fn run_bytes(&mut self, code: &[u8]) -> Outcome {
        let start = self.cpu.rip;
        let at = start
            + if self.cpu.sys.mode.is64() {
                0
            } else {
                self.cpu.seg_base[1]
            };
        self.write(at, code);
        for _ in 0..1_000_000 {
            self.cpu.trap = TrapState::default();
            if self.cpu.step().is_err() {
                return Outcome::Trap(self.cpu.trap.kind);
            }
            if self.cpu.rip == start + code.len() as u64 {
                return Outcome::End;
            }
        }
        Outcome::Unfinished
    }
}

impl Default for TestCpu {
    fn default() -> Self {
        Self::new()
    }
}
