//! The processor, set up so that the same code at the same addresses sees the same memory.

use skerry_x86cpu::sys::state::{Segment, cr4};
use skerry_x86cpu::testing::TestCpu;
use skerry_x86cpu::{TrapKind, TrapState, Tuning};

use crate::native::Native;
use crate::state::{CODE, DATA, DATA_LEN, DATA_WRITABLE, End, State};

/// Where the pages are in guest-physical memory, and the page tables that map them.
const CODE_GPA: u64 = 0x10_0000;
const DATA_GPA: u64 = 0x20_0000;
const TABLES: u64 = 0x30_0000;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

/// Instructions that a case may take: repeated string instructions count once per page.
const LIMIT: usize = 10_000;

pub struct Guest {
    t: TestCpu,
    code: Vec<u8>,
}

impl Guest {
    pub fn new(tuning: Tuning) -> Self {
        let mut t = TestCpu::with_tuning(1, tuning);
        TestCpu::set_up_64(&mut t.cpu);
        t.cpu.sys.cr4 |= cr4::FSGSBASE;
        let entry = |table: u64, address: u64, value: u64| {
            t.write(table + (address & 0x1ff) * 8, &value.to_le_bytes());
        };
        let link = PRESENT | WRITABLE | USER;
        let (directory, code, data) = (TABLES + 0x2000, TABLES + 0x3000, TABLES + 0x4000);
        entry(TABLES, 0, (TABLES + 0x1000) | link);
        entry(TABLES + 0x1000, 0, directory | link);
        entry(directory, CODE >> 21, code | link);
        entry(directory, DATA >> 21, data | link);
        entry(code, CODE >> 12, CODE_GPA | PRESENT | USER);
        for page in 0..DATA_LEN as u64 / 4096 {
            let writable = page * 4096 < DATA_WRITABLE as u64;
            let rights = PRESENT | USER | NO_EXECUTE | if writable { WRITABLE } else { 0 };
            entry(data, (DATA >> 12) + page, (DATA_GPA + page * 4096) | rights);
        }
        t.cpu.sys.cr3 = TABLES;
        for n in 0..6 {
            let code_segment = n == 1;
            t.cpu.set_segment(
                n,
                Segment {
                    selector: if code_segment { 0x33 } else { 0x2b },
                    base: 0,
                    limit: u32::MAX,
                    attributes: if code_segment { 0xa0fb } else { 0xc0f3 },
                    unusable: false,
                },
            );
        }
        t.cpu.update_mode();
        Self {
            t,
            code: Vec::new(),
        }
    }

    /// Whether instructions that need these features are there.
    pub fn offers(&self, features: &[iced_x86::CpuidFeature]) -> bool {
        self.t.cpu.features.has_all(features)
    }

    /// Runs `code` from `state`, one instruction at a time, and leaves what it made of it in `state`.
    pub fn step(&mut self, code: &[u8], state: &mut State) -> End {
        self.set_up(code, state);
        self.t.cpu.fpu_enter();
        let end = self.step_to_end(CODE + code.len() as u64);
        self.t.cpu.fpu_sync();
        self.take(state);
        end
    }

    /// The same as one block. A UD2 is where it ends, and another where its branch goes.
    pub fn run(&mut self, code: &[u8], state: &mut State) -> End {
        let mut whole = code.to_vec();
        whole.extend_from_slice(&[0x0f, 0x0b]);
        whole.resize(code.len() + Native::landing_pad(0).len(), 0xcc);
        whole.extend_from_slice(&[0x0f, 0x0b]);
        self.set_up(&whole, state);
        self.t.cpu.fpu_enter();
        let end = self.run_to_end(CODE + code.len() as u64);
        self.t.cpu.fpu_sync();
        self.t.cpu.forget_devices();
        self.take(state);
        end
    }

    fn run_to_end(&mut self, code_end: u64) -> End {
        for _ in 0..LIMIT {
            match self.t.run_blocks() {
                TrapKind::None | TrapKind::Resume => {}
                TrapKind::Fault { vector: 6, .. } if self.t.cpu.rip == code_end => {
                    return End::Exit(0);
                }
                TrapKind::Fault { vector: 6, .. }
                    if self.t.cpu.rip == code_end + Native::landing_pad(0).len() as u64 =>
                {
                    return End::Exit(1);
                }
                TrapKind::Fault { vector, error_code } => {
                    return End::Fault {
                        vector,
                        error: u64::from(error_code.unwrap_or(0)),
                        address: self.t.cpu.trap.address,
                        rip: self.t.cpu.rip,
                    };
                }
                TrapKind::Exit(_) => return End::Exit(98),
            }
        }
        End::Exit(99)
    }

    fn set_up(&mut self, code: &[u8], state: &State) {
        if self.code != code {
            // What follows is never executed.
            let mut bytes = code.to_vec();
            bytes.extend_from_slice(&[0xcc; 16]);
            self.t.write(CODE_GPA, &bytes);
            self.code = code.to_vec();
        }
        self.t.write(DATA_GPA, &state.data);
        let cpu = &mut self.t.cpu;
        cpu.gpr[..16].copy_from_slice(&state.gpr);
        cpu.set_rflags(state.flags | 0x202);
        cpu.seg_base[4] = state.fs_base;
        cpu.seg_base[5] = state.gs_base;
        cpu.sys.segments[4].base = state.fs_base;
        cpu.sys.segments[5].base = state.gs_base;
        cpu.rip = CODE;
        if let Err(e) = cpu.set_xsave_image(&state.xsave) {
            panic!("the fuzzer's own image: {e}");
        }
    }

    fn take(&mut self, state: &mut State) {
        let cpu = &mut self.t.cpu;
        state.gpr.copy_from_slice(&cpu.gpr[..16]);
        state.flags = cpu.rflags_full();
        state.xsave.copy_from_slice(&cpu.xsave_image());
        state.data = self.t.read(DATA_GPA, DATA_LEN);
    }

    fn step_to_end(&mut self, code_end: u64) -> End {
        let cpu = &mut self.t.cpu;
        for _ in 0..LIMIT {
            if cpu.rip == code_end {
                return End::Exit(0);
            }
            if cpu.rip == code_end + Native::landing_pad(0).len() as u64 {
                return End::Exit(1);
            }
            cpu.trap = TrapState::default();
            if cpu.step().is_ok() {
                continue;
            }
            return match cpu.trap.kind {
                TrapKind::Fault { vector, error_code } => End::Fault {
                    vector,
                    error: u64::from(error_code.unwrap_or(0)),
                    address: cpu.trap.address,
                    rip: cpu.rip,
                },
                other => panic!("{other:?}"),
            };
        }
        End::Exit(99)
    }
}
