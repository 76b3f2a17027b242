//! Makes a failing program smaller while it still fails.

use std::time::Duration;

use crate::Worlds;
use crate::program::{Behind, Program};
use crate::world::Watch;

/// Whether a program fails in new machines: in a process of its own, which may crash or hang.
pub fn fails(program: &Program, number: u64, limit: Duration) -> bool {
    let Some(image) = program.image() else {
        return false;
    };
    crate::signal::in_a_process(8 * limit, || {
        let watch = Watch::start(limit);
        Worlds::new(number, &watch)
            .run(program, &image)
            .is_some_and(|(_, different)| !different.is_empty())
    })
}

/// The smallest failing program that can be found by leaving things out; `None` if it doesn't fail
/// in new machines.
pub fn shrink(program: &Program, number: u64) -> Option<Program> {
    let limit = Duration::from_secs(2);
    if !fails(program, number, limit) {
        return None;
    }
    let mut best = program.clone();
    let limit = Duration::from_millis(100);
    smaller(&mut best, number, limit, false);
    // Without what keeps programs from running for ever, too.
    smaller(&mut best, number, limit, true);
    simplify(&mut best, number, limit);
    Some(best)
}

fn smaller(best: &mut Program, number: u64, limit: Duration, all: bool) {
    let mut size = (best.elements.len() / 2).max(1);
    loop {
        let mut at = 0;
        let mut progress = false;
        while at < best.elements.len() {
            let mut candidate = best.clone();
            let (mut n, len) = (0, candidate.elements.len());
            candidate.elements.retain(|element| {
                n += 1;
                let last = n == len;
                last || element.keep && !all || !(at + 1..at + 1 + size).contains(&n)
            });
            if candidate.elements.len() < best.elements.len() && fails(&candidate, number, limit) {
                *best = candidate;
                progress = true;
            } else {
                at += size;
            }
        }
        if size == 1 && !progress {
            return;
        }
        size = (size / 2).max(1);
    }
}

/// Zeros and the plainest world, where they will do.
fn simplify(best: &mut Program, number: u64, limit: Duration) {
    let mut attempt = |change: &dyn Fn(&mut Program)| {
        let mut candidate = best.clone();
        change(&mut candidate);
        if fails(&candidate, number, limit) {
            *best = candidate;
        }
    };
    for fuel in [300, 100, 40, 10, 3, 1] {
        attempt(&|p| p.setting.fuel = fuel);
    }
    attempt(&|p| p.setting.offset = 0);
    attempt(&|p| p.setting.user = false);
    attempt(&|p| p.setting.behind = Behind::Ram);
    attempt(&|p| p.setting.writable_code = true);
    attempt(&|p| p.start.flags = 2);
    attempt(&|p| p.start.data.fill(0));
    for n in 0..16 {
        attempt(&|p| p.start.gpr[n] = 0);
    }
}
