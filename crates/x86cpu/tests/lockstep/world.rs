//! The machine that programs run in: page tables, descriptor tables, a handler of all exceptions
//! that writes a log and goes on elsewhere.
//!
//! ```text
//! CODE_SPACE  four pages of code      ALIAS  the same pages, writable
//! DATA        two pages, a read-only one, and one that is absent, RAM or a device
//! VARIABLES   fuel and jump tables    STACK_SPACE  two pages, nothing around
//! SYSTEM      the kernel's, for level 0 only: tables, handlers, log
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use skerry_x86cpu::sys::state::{DescriptorTable, Segment, cr4};
use skerry_x86cpu::testing::TestCpu;
use skerry_x86cpu::{Cpu, CpuExit, CpuShared, Tuning};

use crate::program::{Behind, END, Image, Program};
use crate::state::{DATA, DATA_LEN, DATA_WRITABLE};
use crate::{apic, assemble};

pub const CODE_SPACE: u64 = crate::state::CODE;
pub const CODE_LEN: usize = 4 * 4096;
pub const ALIAS: u64 = 0x3200_0000;
pub const VARIABLES: u64 = 0x3100_0000;
pub const FUEL: u64 = VARIABLES;
pub const SAVED: u64 = VARIABLES + 8;
pub const JUMPS: u64 = VARIABLES + 0x100;
pub const CALLS: u64 = VARIABLES + 0x140;
pub const STACK_SPACE: u64 = 0x3180_0000;
pub const STACK_LEN: u64 = 0x2000;
const SYSTEM: u64 = 0x6a5b_4c00_0000;
/// The port whose writing ends a program.
pub const END_PORT: u8 = 0xf4;

const CODE_GPA: u64 = 0x10_0000;
const DATA_GPA: u64 = 0x20_0000;
const VARIABLES_GPA: u64 = 0x21_0000;
const STACK_GPA: u64 = 0x22_0000;
const TABLES: u64 = 0x30_0000;
const TABLES_LEN: u64 = 0x2_0000;
const DEVICE: u64 = 0x1000_0000;

const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const HANDLERS: u64 = 0x4000;
const STUB: u64 = 0x20;
const LOG: u64 = 0x6000;
const ENTRIES: u64 = 0x7000;
const IST: u64 = 0xa000;
const START: u64 = 0xb000;
const AFTER_STUB: u64 = 0xc000;
const INTERRUPTS: u64 = 0xd000;
/// The vector of interrupts that must leave no trace.
const INTERRUPT: u8 = 0x30;
/// Faults before a program is given up.
const FAULTS: u64 = 60;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;
/// Data isn't code: what flags its bytes would leave undefined isn't known.
const NO_EXECUTE: u64 = 1 << 63;

/// Instructions of a device's exits, at most.
const EXITS: usize = 3000;

/// The state at an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stop {
    pub exit: CpuExit,
    pub gpr: [u64; 16],
    pub rip: u64,
    pub flags: u64,
    /// Instructions of the program so far, where they are counted.
    pub retired: Option<u64>,
}

/// A fault, as the handler saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub flags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub cr2: u64,
}

/// All that can be seen of a run.
#[derive(Clone, PartialEq, Eq)]
pub struct Outcome {
    pub stops: Vec<Stop>,
    pub faults: Vec<Fault>,
    pub cr2: u64,
    pub cpl: u8,
    pub segments: [Segment; 6],
    pub xsave: Vec<u8>,
    /// Name, first address, bytes.
    pub memory: Vec<(&'static str, u64, Vec<u8>)>,
}

impl Outcome {
    /// Whether the watch ended it.
    pub fn unfinished(&self) -> bool {
        self.stops
            .last()
            .is_none_or(|stop| matches!(stop.exit, CpuExit::Requested))
    }
}

/// Ends what doesn't end by itself.
#[derive(Clone)]
pub struct Watch {
    running: Arc<Mutex<Running>>,
    limit: Duration,
}

/// What runs, and since when.
type Running = Option<(Instant, Arc<CpuShared>)>;

impl Watch {
    /// A watch with its thread.
    pub fn start(limit: Duration) -> Self {
        let watch = Self {
            running: Arc::default(),
            limit,
        };
        let weak = Arc::downgrade(&watch.running);
        std::thread::spawn(move || {
            while let Some(slot) = weak.upgrade() {
                if let Ok(slot) = slot.lock()
                    && let Some((since, shared)) = &*slot
                    && since.elapsed() > limit
                {
                    shared.request_exit();
                    if since.elapsed() > 3 * limit {
                        crate::signal::stuck();
                    }
                }
                drop(slot);
                std::thread::sleep(limit / 8);
            }
        });
        watch
    }

    fn limit(&self) -> Duration {
        self.limit
    }

    fn set(&self, what: Option<(Instant, Arc<CpuShared>)>) {
        if let Ok(mut slot) = self.running.lock() {
            *slot = what;
        }
    }
}

/// Sends a machine interrupts, and asks its processor to leave, at any moment.
struct Pest(Arc<AtomicBool>);

impl Pest {
    fn start(t: &TestCpu) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let (flag, machine) = (end.clone(), t.machine.clone());
        let shared = t.cpu.shared.clone();
        std::thread::spawn(move || {
            let mut n = 0u32;
            while !flag.load(Ordering::Relaxed) {
                n = n.wrapping_add(1);
                if n.is_multiple_of(5) {
                    shared.request_exit();
                } else {
                    machine.post(0, INTERRUPT, false);
                }
                std::thread::sleep(Duration::from_micros(u64::from(n % 7) * 10));
            }
        });
        Self(end)
    }
}

impl Drop for Pest {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A machine.
pub struct World {
    t: TestCpu,
    watch: Watch,
    setting: Option<(bool, Behind)>,
    next_table: u64,
    /// What it sends must leave no trace.
    pest: Option<Pest>,
}

impl World {
    /// A machine; with `pestered`, one that is interrupted all the time; with `counted`, one that counts
    /// its instructions.
    pub fn new(tuning: Tuning, watch: &Watch, pestered: bool, counted: bool) -> Self {
        let mut t = TestCpu::with_tuning(1, tuning);
        TestCpu::set_up_64(&mut t.cpu);
        if counted {
            t.cpu.set_budget(Some(u64::MAX));
        }
        t.cpu.sys.cr4 |= cr4::FSGSBASE;
        t.cpu.sys.cr3 = TABLES;
        let mut world = Self {
            t,
            watch: watch.clone(),
            setting: None,
            next_table: TABLES + 0x1000,
            pest: None,
        };
        world.furnish();
        if pestered {
            world.enable_apic();
            world.pest = Some(Pest::start(&world.t));
        }
        world
    }

    /// Whether instructions that need these features are there.
    pub fn offers(&self, features: &[iced_x86::CpuidFeature]) -> bool {
        self.t.cpu.features.has_all(features)
    }

    /// Instructions so far.
    pub fn instructions(&self) -> u64 {
        self.t.cpu.instructions
    }

    /// Interrupts so far.
    pub fn interrupts(&self) -> u64 {
        self.t.read_u64(INTERRUPTS)
    }

    /// What was counted: traces compiled.
    pub fn compiled(&self) -> u64 {
        self.t.cpu.shared.counters.values().compiled_traces
    }

    fn put(&self, gpa: u64, value: u64) {
        self.t.write(gpa, &value.to_le_bytes());
    }

    fn map(&mut self, linear: u64, gpa: u64, rights: u64) {
        let mut table = TABLES;
        for level in [39, 30, 21] {
            let at = table + (linear >> level & 0x1ff) * 8;
            let mut entry = self.t.read_u64(at);
            if entry & PRESENT == 0 {
                entry = self.next_table | PRESENT | WRITABLE | USER | ACCESSED;
                self.next_table += 0x1000;
                self.put(at, entry);
            }
            table = entry & 0xf_ffff_ffff_f000;
        }
        let entry = if rights == 0 { 0 } else { gpa | rights };
        self.put(table + (linear >> 12 & 0x1ff) * 8, entry);
    }

    fn furnish(&mut self) {
        for page in 0..32 {
            // As if touched already: when the handlers run is chance.
            let rights = PRESENT | WRITABLE | ACCESSED | DIRTY;
            self.map(SYSTEM + page * 4096, page * 4096, rights);
        }
        let tss = SYSTEM + TSS;
        let entries: [u64; 7] = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x0000_8900_0000_0067 | (tss & 0xff_ffff) << 16 | (tss >> 24 & 0xff) << 56,
            tss >> 32,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
        ];
        for (n, entry) in entries.iter().enumerate() {
            self.put(GDT + 8 * n as u64, *entry);
        }
        self.t.write(TSS + 0x24, &(SYSTEM + IST).to_le_bytes());
        self.t.write(TSS + 0x66, &0x68u16.to_le_bytes());
        for vector in 0..64u64 {
            let handler = SYSTEM + HANDLERS + vector * STUB;
            let low =
                handler & 0xffff | 8 << 16 | 1 << 32 | 0xee << 40 | (handler >> 16 & 0xffff) << 48;
            self.put(IDT + 16 * vector, low);
            self.put(IDT + 16 * vector + 8, handler >> 32);
            let mut stub = Vec::new();
            if !matches!(vector, 8 | 10..=14 | 17 | 21) {
                stub.extend([0x6a, 0]);
            }
            stub.extend([0x6a, vector as u8, 0xe9]);
            let common = HANDLERS + 64 * STUB;
            let from = HANDLERS + vector * STUB + stub.len() as u64 + 4;
            stub.extend(((common - from) as u32).to_le_bytes());
            self.t.write(HANDLERS + vector * STUB, &stub);
        }
        self.t.write(HANDLERS + 64 * STUB, handler());
        self.t
            .write(HANDLERS + u64::from(INTERRUPT) * STUB, &interrupt_stub());
        self.t.write(AFTER_STUB, &interrupt());
        self.t.cpu.sys.gdt = DescriptorTable {
            base: SYSTEM + GDT,
            limit: 0x37,
        };
        self.t.cpu.sys.idt = DescriptorTable {
            base: SYSTEM + IDT,
            limit: 64 * 16 - 1,
        };
        self.t.cpu.sys.tr = Segment {
            selector: 0x18,
            base: tss,
            limit: 0x67,
            attributes: 0x8b,
            unusable: false,
        };
        let rights = PRESENT | WRITABLE | USER | NO_EXECUTE;
        self.map(VARIABLES, VARIABLES_GPA, rights);
        for page in 0..4 {
            let offset = page * 4096;
            self.map(ALIAS + offset, CODE_GPA + offset, rights);
            if offset < STACK_LEN {
                self.map(STACK_SPACE + offset, STACK_GPA + offset, rights);
            }
        }
    }

    fn enable_apic(&mut self) {
        self.t
            .write(START, &[apic::enable(), assemble!("out 0x99, al")].concat());
        self.set_segments(false);
        self.t.cpu.rip = SYSTEM + START;
        self.t.cpu.update_mode();
        let exit = self.t.cpu.run();
        assert!(matches!(exit, CpuExit::PortOut { .. }), "{exit:x?}");
        self.t.cpu.forget_devices();
    }

    fn set_segments(&mut self, user: bool) {
        let level: u16 = if user { 3 } else { 0 };
        let dpl = level << 5;
        for n in 0..6u8 {
            let code_segment = n == 1;
            let selector = match (code_segment, level) {
                (true, 0) => 8,
                (true, _) => 0x33,
                (false, 0) => 0x10,
                (false, _) => 0x2b,
            };
            self.t.cpu.set_segment(
                n,
                Segment {
                    selector,
                    base: 0,
                    limit: u32::MAX,
                    attributes: dpl | if code_segment { 0xa09b } else { 0xc093 },
                    unusable: false,
                },
            );
        }
    }

    fn configure(&mut self, program: &Program) {
        let setting = (program.setting.writable_code, program.setting.behind);
        if self.setting == Some(setting) {
            return;
        }
        self.setting = Some(setting);
        let rights = PRESENT | USER | if setting.0 { WRITABLE } else { 0 };
        for page in 0..4 {
            let offset = page * 4096;
            self.map(CODE_SPACE + offset, CODE_GPA + offset, rights);
        }
        for page in 0..4u64 {
            let offset = page * 4096;
            let (gpa, rights) = match (page, setting.1) {
                (3, Behind::Nothing) => (0, 0),
                (3, Behind::Device) => (DEVICE, PRESENT | USER | WRITABLE),
                (3, Behind::Ram) => (DATA_GPA + offset, PRESENT | USER | WRITABLE),
                _ if offset < DATA_WRITABLE as u64 => {
                    (DATA_GPA + offset, PRESENT | USER | WRITABLE)
                }
                _ => (DATA_GPA + offset, PRESENT | USER),
            };
            let rights = if rights == 0 { 0 } else { rights | NO_EXECUTE };
            self.map(DATA + offset, gpa, rights);
        }
        self.t.cpu.tlb_flush_all();
    }

    fn set_up(&mut self, program: &Program, image: &Image) {
        self.configure(program);
        let mut code = image.code.clone();
        code.resize(CODE_LEN - program.setting.offset as usize, 0xcc);
        self.t.write(CODE_GPA + program.setting.offset, &code);
        self.t
            .write(CODE_GPA, &vec![0xcc; program.setting.offset as usize]);
        self.t.write(DATA_GPA, &program.start.data);
        self.t
            .write(DATA_GPA + DATA_LEN as u64, &program.start.data[..4096]);
        self.t
            .write(STACK_GPA, &program.start.data[..STACK_LEN as usize]);
        self.put(VARIABLES_GPA, u64::from(program.setting.fuel));
        for n in 0..8 {
            let at = VARIABLES_GPA + (JUMPS - VARIABLES) + 8 * n as u64;
            self.put(at, image.label(program.jumps[n]));
            let at = VARIABLES_GPA + (CALLS - VARIABLES) + 8 * n as u64;
            self.put(at, image.label(program.calls[n]));
        }
        // The log: count, limit, where to go on, pointers to go on with.
        self.put(LOG, 0);
        self.put(LOG + 8, image.label(END));
        for n in 0..16 {
            self.put(LOG + 0x80 + 8 * n as u64, image.label(program.recovery[n]));
        }
        for n in 0..4 {
            self.put(LOG + 0x20 + 8 * n as u64, program.start.gpr[12 + n]);
        }
        self.put(LOG + 0x40, program.stack);
        self.set_segments(program.setting.user);
        let cpu = &mut self.t.cpu;
        for (n, base) in [(4, program.start.fs_base), (5, program.start.gs_base)] {
            cpu.seg_base[n] = base;
            cpu.sys.segments[n].base = base;
        }
        cpu.gpr[..16].copy_from_slice(&program.start.gpr);
        cpu.gpr[4] = program.stack;
        cpu.rip = image.base;
        // IOPL 3: an OUT is how a program ends. Interrupts may come.
        cpu.set_rflags(program.start.flags | 0x3202);
        cpu.sys.cr2 = 0;
        cpu.update_mode();
        if let Err(e) = cpu.set_xsave_image(&program.start.xsave) {
            panic!("the test's own image: {e}");
        }
    }

    /// Runs a program to its end.
    pub fn run(&mut self, program: &Program, image: &Image) -> Outcome {
        self.set_up(program, image);
        let shared = self.t.cpu.shared.clone();
        self.watch.set(Some((Instant::now(), shared)));
        let mut stops: Vec<Stop> = Vec::new();
        let before = self.t.cpu.retired().unwrap_or_default();
        let retired = |cpu: &Cpu| Some(cpu.retired()? - before);
        let started = Instant::now();
        while stops.len() < EXITS {
            let exit = self.t.cpu.run();
            let cpu = &mut self.t.cpu;
            let early = started.elapsed() < self.watch.limit();
            match exit {
                // An interrupt may have ended it: an OUT follows.
                CpuExit::Halted { .. } => {
                    cpu.sys.activity = Default::default();
                    continue;
                }
                CpuExit::Requested if self.pest.is_some() && early => continue,
                _ => {}
            }
            let mut gpr = [0; 16];
            gpr.copy_from_slice(&cpu.gpr[..16]);
            stops.push(Stop {
                exit,
                gpr,
                rip: cpu.rip,
                flags: cpu.rflags_full(),
                retired: retired(cpu),
            });
            let answer = (stops.len() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            match exit {
                CpuExit::PortOut { port, .. } if port == u16::from(END_PORT) => break,
                CpuExit::PortIn { .. } | CpuExit::MmioRead { .. } => cpu.complete_read(answer),
                CpuExit::PortOut { .. } | CpuExit::MmioWrite { .. } => {}
                _ => break,
            }
        }
        self.watch.set(None);
        self.t.cpu.forget_devices();
        let outcome = self.outcome(stops);
        self.t.cpu.sys.activity = Default::default();
        outcome
    }

    fn outcome(&mut self, stops: Vec<Stop>) -> Outcome {
        let count = self.t.read_u64(LOG).min(FAULTS + 4);
        let faults = (0..count)
            .map(|n| {
                let word = |k: u64| self.t.read_u64(ENTRIES + 64 * n + 8 * k);
                Fault {
                    vector: word(0),
                    error: word(1),
                    rip: word(2),
                    cs: word(3),
                    flags: word(4),
                    rsp: word(5),
                    ss: word(6),
                    cr2: word(7),
                }
            })
            .collect();
        let read = |name, linear, gpa, len: usize| (name, linear, self.t.read(gpa, len));
        let memory = vec![
            read("code", CODE_SPACE, CODE_GPA, CODE_LEN),
            read("data", DATA, DATA_GPA, DATA_LEN + 4096),
            read("variables", VARIABLES, VARIABLES_GPA, 4096),
            read("stack", STACK_SPACE, STACK_GPA, STACK_LEN as usize),
            read("page tables", TABLES, TABLES, TABLES_LEN as usize),
        ];
        let cpu = &mut self.t.cpu;
        Outcome {
            stops,
            faults,
            cr2: cpu.sys.cr2,
            cpl: cpu.cpl,
            segments: cpu.sys.segments,
            xsave: cpu.xsave_image(),
            memory,
        }
    }
}

/// A jump to [`interrupt`].
fn interrupt_stub() -> Vec<u8> {
    let from = HANDLERS + u64::from(INTERRUPT) * STUB + 5;
    let mut stub = vec![0xe9];
    stub.extend(((AFTER_STUB - from) as u32).to_le_bytes());
    stub
}

/// The handler of interrupts: counts, and says that it is done.
fn interrupt() -> Vec<u8> {
    apic::handler(assemble!(
        "mov rax, {count}",
        "inc qword ptr [rax]";
        count = const SYSTEM + INTERRUPTS,
    ))
}

/// The handler of all exceptions: an entry in the log, and on at the next place of recovery, with
/// good pointers and defined flags.
fn handler() -> &'static [u8] {
    assemble!(
        "push rax",
        "push rbx",
        "push rcx",
        "mov rax, {log}",
        "mov rbx, [rax]",
        "mov rcx, rbx",
        "shl rcx, 6",
        "lea rcx, [rax + rcx + {entries}]",
        // Vector, error, RIP, CS, RFLAGS, RSP, SS.
        "push qword ptr [rsp + 24]", "pop qword ptr [rcx]",
        "push qword ptr [rsp + 32]", "pop qword ptr [rcx + 8]",
        "push qword ptr [rsp + 40]", "pop qword ptr [rcx + 16]",
        "push qword ptr [rsp + 48]", "pop qword ptr [rcx + 24]",
        "push qword ptr [rsp + 56]", "pop qword ptr [rcx + 32]",
        "push qword ptr [rsp + 64]", "pop qword ptr [rcx + 40]",
        "push qword ptr [rsp + 72]", "pop qword ptr [rcx + 48]",
        "push rdx",
        "mov rdx, cr2",
        "mov [rcx + 56], rdx",
        "pop rdx",
        "inc qword ptr [rax]",
        "mov rcx, [rax + 8]",
        "cmp rbx, {faults}",
        "jae 2f",
        "and ebx, 15",
        "mov rcx, [rax + 8*rbx + 0x80]",
        "2:",
        "mov [rsp + 40], rcx",
        "and qword ptr [rsp + 56], {keep}",
        "mov r12, [rax + 0x20]",
        "mov r13, [rax + 0x28]",
        "mov r14, [rax + 0x30]",
        "mov r15, [rax + 0x38]",
        "mov rcx, [rax + 0x40]",
        "mov [rsp + 64], rcx",
        "pop rcx",
        "pop rbx",
        "pop rax",
        "add rsp, 16",
        "iretq";
        log = const SYSTEM + LOG,
        entries = const ENTRIES - LOG,
        faults = const FAULTS,
        // Neither arithmetic flags nor what would make stepping or checks.
        keep = const !0x4_49d5i64,
    )
}
