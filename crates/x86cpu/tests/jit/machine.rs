//! A machine at level 0 with descriptor tables, and ways to run it that end.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use skerry_x86cpu::sys::state::DescriptorTable;
use skerry_x86cpu::testing::{CODE, STACK, TestCpu};
use skerry_x86cpu::{Cpu, CpuExit, CpuShared, Host, TrapKind, Tuning};

/// How each test runs.
pub const TUNINGS: [(&str, Tuning); 4] = [
    ("interpreter", Tuning::INTERPRETER),
    ("jit", Tuning::JIT),
    ("stress", Tuning::STRESS),
    (
        "hardened",
        Tuning {
            hardened: true,
            small: true,
            ..Tuning::STRESS
        },
    ),
];

/// The ways to run that compile, soon.
pub const COMPILING: [(&str, Tuning); 3] = {
    let [_, (jit, tuning), stress, hardened] = TUNINGS;
    let soon = Tuning {
        threshold: 3,
        ..tuning
    };
    [(jit, soon), stress, hardened]
};

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
/// Linear addresses from here on show memory from address 0 a second time.
pub const ALIAS: u64 = 0x200_0000;

/// A host with the real clock.
#[derive(Debug)]
pub struct RealHost {
    started: Instant,
    /// Set when a processor is made.
    pub shared: std::sync::OnceLock<Arc<CpuShared>>,
    timer: Arc<AtomicBool>,
}

impl RealHost {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            shared: std::sync::OnceLock::new(),
            timer: Arc::default(),
        })
    }
}

impl Host for RealHost {
    fn wake(&self, _: u32) {}

    fn arm_timer(&self, _: u32, deadline: Option<u64>) {
        let Some(shared) = self.shared.get().cloned() else {
            return;
        };
        let Some(deadline) = deadline else { return };
        let wait = deadline.saturating_sub(self.clock_ns());
        self.timer.store(true, Ordering::SeqCst);
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_nanos(wait));
            shared.request(skerry_x86cpu::shared::request::TIMER);
        });
    }

    fn clock_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    fn wall_clock_base_ns(&self) -> u64 {
        0
    }
}

/// A machine of `count` processors, the first of them at [`CODE`].
pub fn machine(count: usize, tuning: Tuning) -> TestCpu {
    furnish(TestCpu::with_tuning(count, tuning))
}

/// Tables for a machine.
pub fn furnish(t: TestCpu) -> TestCpu {
    let mut t = t.in_64_bit_mode();
    for (n, entry) in [0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
        .iter()
        .enumerate()
    {
        t.write(GDT + 8 * n as u64, &entry.to_le_bytes());
    }
    // The same memory again: 2 MiB pages 16 and 17.
    for n in 0..2u64 {
        let entry = n << 21 | 0x87;
        let at = skerry_x86cpu::testing::TABLES + 0x2000 + (16 + n) * 8;
        t.write(at, &entry.to_le_bytes());
    }
    tables(&mut t.cpu);
    t
}

fn tables(cpu: &mut Cpu) {
    cpu.sys.gdt = DescriptorTable {
        base: GDT,
        limit: 0x17,
    };
    cpu.sys.idt = DescriptorTable {
        base: IDT,
        limit: 0xfff,
    };
}

/// Another processor, at an address.
pub fn another(t: &TestCpu, id: u32, rip: u64) -> Box<Cpu> {
    let mut cpu = t.another(id);
    TestCpu::set_up_64(&mut cpu);
    tables(&mut cpu);
    cpu.sys.activity = t.cpu.sys.activity;
    cpu.rip = rip;
    cpu.gpr[4] = STACK - 0x1000 * u64::from(id);
    cpu
}

/// Makes a vector's handler.
pub fn gate(t: &TestCpu, vector: u8, handler: u64) {
    let low = handler & 0xffff | 8 << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48;
    let at = IDT + 16 * u64::from(vector);
    t.write(at, &low.to_le_bytes());
    t.write(at + 8, &(handler >> 32).to_le_bytes());
}

/// Runs until something other than a port write happens; ends what doesn't end.
pub fn run(cpu: &mut Cpu, limit: Duration) -> CpuExit {
    let done = Arc::new(AtomicBool::new(false));
    let (flag, shared) = (done.clone(), cpu.shared.clone());
    let watch = std::thread::spawn(move || {
        let started = Instant::now();
        while !flag.load(Ordering::SeqCst) {
            if started.elapsed() > limit {
                shared.request_exit();
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
    });
    let exit = cpu.run();
    done.store(true, Ordering::SeqCst);
    watch.thread().unpark();
    let joined = watch.join();
    assert!(joined.is_ok());
    exit
}

/// Held by tests of several processors: they wait for each other by spinning, and want the host's
/// processors for themselves.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs until HLT.
pub fn run_to_halt(cpu: &mut Cpu, what: &str) {
    let exit = run(cpu, Duration::from_secs(60));
    assert!(
        matches!(exit, CpuExit::Halted { .. }),
        "{what}: {exit:x?} at {:x}, RAX {:x} RCX {:x} RSP {:x} CR2 {:x}",
        cpu.rip,
        cpu.gpr[0],
        cpu.gpr[1],
        cpu.gpr[4],
        cpu.sys.cr2
    );
}

/// What is seen of a run.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    trap: String,
    fault_address: u64,
    gpr: [u64; 16],
    rip: u64,
    pub flags: u64,
    xsave: Vec<u8>,
}

/// Runs code until something traps, with these general registers and base of FS and GS.
pub fn run_to_trap(t: &mut TestCpu, at: u64, gpr: &[u64; 16], base: u64) -> Seen {
    let cpu = &mut t.cpu;
    cpu.gpr[..16].copy_from_slice(gpr);
    cpu.rip = at;
    cpu.set_rflags(0x8d7);
    cpu.sys.cr2 = 0;
    for n in [4, 5] {
        cpu.seg_base[n] = base;
        cpu.sys.segments[n].base = base;
    }
    let mut image = vec![0; 832];
    image[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    image[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    image[512] = 7;
    for n in 0..32 {
        image[160 + n] = n as u8;
        image[576 + n] = 0x80 | n as u8;
    }
    assert_eq!(cpu.set_xsave_image(&image), Ok(()));
    cpu.fpu_enter();
    let mut trap = TrapKind::None;
    for _ in 0..5000 {
        trap = t.run_blocks();
        if !matches!(trap, TrapKind::None | TrapKind::Resume) {
            break;
        }
    }
    t.cpu.fpu_sync();
    t.cpu.forget_devices();
    let cpu = &mut t.cpu;
    let mut gpr = [0; 16];
    gpr.copy_from_slice(&cpu.gpr[..16]);
    Seen {
        trap: format!("{trap:x?}"),
        fault_address: if matches!(trap, TrapKind::Fault { vector: 14, .. }) {
            cpu.trap.address
        } else {
            0
        },
        gpr,
        rip: cpu.rip,
        flags: cpu.rflags_full(),
        xsave: cpu.xsave_image(),
    }
}

/// Puts code at [`CODE`] and runs it to HLT in every way; `check` looks at the end.
pub fn each_way(code: &[u8], check: impl Fn(&TestCpu, &str)) {
    for (name, tuning) in TUNINGS {
        let mut t = machine(1, tuning);
        t.write(CODE, code);
        run_to_halt(&mut t.cpu, name);
        check(&t, name);
    }
}

/// Ends the process if something takes so long that it must hang.
pub struct Deadline(Arc<AtomicBool>);

impl Deadline {
    pub fn new(what: String, limit: Duration) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let flag = done.clone();
        std::thread::spawn(move || {
            let started = Instant::now();
            while started.elapsed() < limit {
                if flag.load(Ordering::SeqCst) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            if !flag.load(Ordering::SeqCst) {
                // Not `eprintln`, which a test's output is kept back with.
                let text = format!("{what}: nothing ends it\n");
                let _ = std::io::stderr().write_all(text.as_bytes());
                std::process::exit(101);
            }
        });
        Self(done)
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
