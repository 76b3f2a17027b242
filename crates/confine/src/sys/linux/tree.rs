//! A search tree in front of a filter: what is allowed or forbidden whatever its arguments is decided in
//! a few steps.
//!
//! The kernel goes through a filter for each call that there is when it is put on, and remembers which of
//! them it always allows (`seccomp_cache_prepare`, Linux 5.11): with a chain of comparisons that takes
//! longer than all else that confines a thread.
//!
//! ```text
//!  load number ─► below 88? ─► below 31? ─► … ─► allowed │ forbidden │ the filter, for a look at arguments
//! ```

use std::collections::{BTreeMap, BTreeSet};

use seccompiler::{BpfProgram, sock_filter};

// Of `linux/bpf_common.h`, `linux/audit.h` and `linux/seccomp.h`.
const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_GREATER_EQUAL: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
const ARCH_X86_64: u32 = 0xc000_003e;
const KILL_PROCESS: u32 = 0x8000_0000;
const TRAP: u32 = 0x0003_0000;
const ALLOW: u32 = 0x7fff_0000;
/// Where a call's number and architecture are in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Allowed,
    Forbidden,
    /// It depends on its arguments.
    Open,
}

const fn step(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// The first numbers of stretches of calls, and what becomes of each in them.
fn stretches(allowed: &BTreeSet<u32>, open: &BTreeSet<u32>) -> Vec<(u32, Fate)> {
    let fates: BTreeMap<u32, Fate> = allowed
        .iter()
        .map(|number| (*number, Fate::Allowed))
        .chain(open.iter().map(|number| (*number, Fate::Open)))
        .collect();
    let mut stretches = vec![(0, Fate::Forbidden)];
    let mut add = |from: u32, fate: Fate| match stretches.last_mut() {
        Some(last) if last.1 == fate => {}
        Some(last) if last.0 == from => last.1 = fate,
        _ => stretches.push((from, fate)),
    };
    for (number, fate) in fates {
        add(number, fate);
        add(number + 1, Fate::Forbidden);
    }
    // One that took the place of another may be like the one before.
    stretches.dedup_by(|next, before| next.1 == before.1);
    stretches
}

/// Emits the search; notes where it goes on to the filter.
fn search(stretches: &[(u32, Fate)], program: &mut BpfProgram, open: &mut Vec<usize>) {
    let (left, right) = stretches.split_at(stretches.len() / 2);
    let (Some(first), false) = (right.first(), left.is_empty()) else {
        match stretches.first().map(|stretch| stretch.1) {
            Some(Fate::Allowed) => program.push(step(RETURN, 0, 0, ALLOW)),
            Some(Fate::Open) => {
                open.push(program.len());
                program.push(step(JUMP, 0, 0, 0));
            }
            Some(Fate::Forbidden) | None => program.push(step(RETURN, 0, 0, TRAP)),
        }
        return;
    };
    // What a comparison can jump over is little: it jumps over a jump.
    let at = program.len();
    program.push(step(JUMP_GREATER_EQUAL, 0, 1, first.0));
    program.push(step(JUMP, 0, 0, 0));
    search(left, program, open);
    program[at + 1].k = (program.len() - at - 2) as u32;
    search(right, program, open);
}

/// `filter` behind a search for calls that need no look at their arguments: `allowed`. Those that do are
/// `open`, and no others come to the filter.
pub(super) fn before(allowed: &[i64], open: &[i64], filter: &[sock_filter]) -> BpfProgram {
    let set = |calls: &[i64]| -> BTreeSet<u32> {
        calls
            .iter()
            .filter_map(|call| u32::try_from(*call).ok())
            .collect()
    };
    let mut program = vec![
        step(LOAD, 0, 0, ARCH),
        step(JUMP_EQUAL, 1, 0, ARCH_X86_64),
        step(RETURN, 0, 0, KILL_PROCESS),
        step(LOAD, 0, 0, NUMBER),
    ];
    let mut jumps = Vec::new();
    search(
        &stretches(&set(allowed), &set(open)),
        &mut program,
        &mut jumps,
    );
    for at in jumps {
        program[at].k = (program.len() - at - 1) as u32;
    }
    program.extend_from_slice(filter);
    program
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILTER: u32 = 0x1234;

    /// What a program of these steps says to a call.
    fn run(program: &[sock_filter], arch: u32, number: u32) -> (u32, usize) {
        let (mut at, mut a, mut steps) = (0, 0, 0);
        loop {
            let step = &program[at];
            at += 1;
            steps += 1;
            let holds = match step.code {
                LOAD => {
                    a = if step.k == ARCH { arch } else { number };
                    continue;
                }
                RETURN => return (step.k, steps),
                JUMP => {
                    at += step.k as usize;
                    continue;
                }
                JUMP_EQUAL => a == step.k,
                JUMP_GREATER_EQUAL => a >= step.k,
                code => panic!("an instruction {code:#x}"),
            };
            at += usize::from(if holds { step.jt } else { step.jf });
        }
    }

    proptest! {
        #[test]
        fn every_call_has_its_fate(
            allowed in proptest::collection::btree_set(0_i64..500, 0..300),
            open in proptest::collection::btree_set(0_i64..500, 0..30),
        ) {
            let filter = [step(RETURN, 0, 0, FILTER)];
            let list = |calls: &BTreeSet<i64>| calls.iter().copied().collect::<Vec<_>>();
            let program = before(&list(&allowed), &list(&open), &filter);
            for number in (0..600).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
                let (said, steps) = run(&program, ARCH_X86_64, number);
                let wanted = match i64::from(number) {
                    call if open.contains(&call) => FILTER,
                    call if allowed.contains(&call) => ALLOW,
                    _ => TRAP,
                };
                prop_assert_eq!(said, wanted, "{}", number);
                prop_assert!(steps < 32, "{} steps", steps);
            }
            prop_assert_eq!(run(&program, 0x4000_0003, 0).0, KILL_PROCESS);
        }
    }
}
