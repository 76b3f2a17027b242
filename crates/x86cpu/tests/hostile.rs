//! No bytes that a guest can execute, in any mode, may make the processor panic. Debug builds check
//! arithmetic too.

use skerry_x86cpu::testing::{CODE, DATA, TestCpu};
use skerry_x86cpu::{CpuExit, Tuning};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Bytes that reach deep into the opcode map more often than even ones would.
fn code(random: &mut Random, out: &mut [u8]) {
    let mut i = 0;
    while i < out.len() {
        let choice = random.below(8);
        let lead: &[u8] = match choice {
            0 => &[0x0f],
            1 => &[0x66, 0x0f],
            2 => &[0xf3, 0x0f],
            3 => &[0xf2],
            4 => &[0x48],
            5 => &[0xf0],
            6 => &[0xc5, 0xf9],
            _ => &[],
        };
        for byte in lead.iter().chain(&(random.next().to_le_bytes())[..6]) {
            if i < out.len() {
                out[i] = *byte;
                i += 1;
            }
        }
    }
}

fn value(random: &mut Random) -> u64 {
    match random.below(6) {
        0 => random.next(),
        1 => DATA + random.below(0x2000),
        2 => CODE + random.below(0x200),
        3 => 0u64.wrapping_sub(random.below(64)),
        4 => random.below(64),
        _ => 1 << random.below(64),
    }
}

fn scramble(t: &mut TestCpu, random: &mut Random) {
    let mut bytes = [0; 256];
    code(random, &mut bytes);
    t.write(CODE, &bytes);
    for i in 0..16 {
        t.cpu.gpr[i] = value(random);
    }
    t.cpu.set_rflags((random.next() & 0x4_0cd5) | 2);
    t.cpu.update_mode();
}

fn machine(random: &mut Random) -> TestCpu {
    match random.below(3) {
        0 => TestCpu::new16(),
        1 => TestCpu::new32(),
        // Each instruction compiled at once.
        _ => TestCpu::with_tuning(1, Tuning::STRESS).in_64_bit_mode(),
    }
}

/// One instruction after the other, faults ignored.
fn stepped(random: &mut Random) {
    let mut t = machine(random);
    for _ in 0..20 {
        scramble(&mut t, random);
        let start = if t.cpu.sys.mode.bits() == 16 { 0 } else { CODE };
        t.cpu.rip = start;
        for _ in 0..30 {
            if t.cpu.step().is_err() {
                t.cpu.forget_devices();
                // Somewhere else in the same bytes.
                t.cpu.rip = start + random.below(240);
            }
        }
    }
}

/// As a machine runs it: events delivered through whatever tables there are.
fn run(random: &mut Random) {
    let mut t = machine(random);
    scramble(&mut t, random);
    for _ in 0..40 {
        // A time limit, for programs that loop.
        let shared = t.cpu.shared.clone();
        let timer = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(1));
            shared.request_exit();
        });
        let exit = t.cpu.run();
        let joined = timer.join();
        assert!(joined.is_ok());
        match exit {
            CpuExit::PortIn { .. } | CpuExit::MmioRead { .. } => t.cpu.complete_read(random.next()),
            CpuExit::Shutdown | CpuExit::Halted { .. } | CpuExit::WaitForSipi => return,
            _ => {}
        }
    }
}

#[test]
fn random_code_one_step_at_a_time() {
    let mut random = Random(0x1234_5678_9abc_def1);
    for _ in 0..400 {
        stepped(&mut random);
    }
}

#[test]
fn random_code_in_a_machine() {
    let mut random = Random(0xfeed_f00d_dead_beef);
    for _ in 0..200 {
        run(&mut random);
    }
}
