//! Far more code than fits.

use skerry_x86cpu::Tuning;
use skerry_x86cpu::testing::{CODE, TestCpu};

use crate::machine::{machine, run_to_halt};

/// Functions, each of a few instructions and a jump to the next in a random order.
const FUNCTIONS: u64 = 40_000;
const SPACING: u64 = 64;
const BASE: u64 = 0x4_0000;

fn build(t: &TestCpu) -> u64 {
    let mut order: Vec<u64> = (0..FUNCTIONS).collect();
    let mut state = 0x1234_5678_9abc_def1u64;
    for n in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(n, (state % (n as u64 + 1)) as usize);
    }
    let mut area = vec![0xcc; (FUNCTIONS * SPACING) as usize];
    let mut sum = 0u64;
    for (n, place) in order.iter().enumerate() {
        let at = (place * SPACING) as usize;
        let mut code = Vec::new();
        // ADD RAX, n; XOR RBX, RAX; INC dword [RSI]
        code.extend([0x48, 0x05]);
        code.extend((n as u32).to_le_bytes());
        code.extend([0x48, 0x31, 0xc3, 0xff, 0x06]);
        sum += n as u64;
        match order.get(n + 1) {
            Some(next) if n % 3 == 0 => {
                // LEA RDI, [next]; JMP RDI
                code.extend([0x48, 0x8d, 0x3d]);
                let from = at + code.len() + 4;
                code.extend((((next * SPACING) as i32) - from as i32).to_le_bytes());
                code.extend([0xff, 0xe7]);
            }
            Some(next) => {
                code.push(0xe9);
                let from = at + code.len() + 4;
                code.extend((((next * SPACING) as i32) - from as i32).to_le_bytes());
            }
            // HLT
            None => code.push(0xf4),
        }
        area[at..at + code.len()].copy_from_slice(&code);
    }
    t.write(BASE, &area);
    // To the first.
    let mut start = vec![0xe9];
    start.extend(((BASE + order[0] * SPACING) as i32 - (CODE as i32 + 5)).to_le_bytes());
    t.write(CODE, &start);
    sum
}

#[test]
fn more_code_than_fits() {
    for tuning in [
        Tuning::INTERPRETER,
        Tuning::STRESS,
        Tuning {
            code_bytes: 2 << 20,
            threshold: 2,
            ..Tuning::JIT
        },
        // Room for all of it, but not in the jump caches.
        Tuning {
            threshold: 2,
            ..Tuning::JIT
        },
    ] {
        let mut t = machine(1, tuning);
        let sum = build(&t);
        for round in 1..=5 {
            t.cpu.rip = CODE;
            t.cpu.gpr[0] = 0;
            t.cpu.gpr[6] = 0x3000;
            t.cpu.sys.activity = Default::default();
            run_to_halt(&mut t.cpu, "a chain of functions");
            assert_eq!(t.cpu.gpr[0], sum, "{tuning:?}, round {round}");
            assert_eq!(t.read_u64(0x3000) & 0xffff_ffff, round * FUNCTIONS);
        }
        let counters = t.cpu.shared.counters.values();
        if tuning.compile && tuning.code_bytes < Tuning::CODE_BYTES {
            assert!(counters.flushes > 0, "{tuning:?}: {counters:?}");
        }
        let bytes = counters.decoded_bytes + counters.compiled_bytes;
        assert!(
            !tuning.compile || bytes <= tuning.code_bytes as u64,
            "{tuning:?}: {counters:?}"
        );
    }
}
