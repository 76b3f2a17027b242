//! What asks the kernel: two processes that wait for each other, placement, power-off.
#![expect(unsafe_code, reason = "raw system calls")]

use std::io::{self, Read, Write};
use std::process::{Command, ExitCode, Stdio};

/// The argument that makes this program the other end of [`ping_pong`].
const ECHO: &str = "--echo";

/// If this process was started as a part of a workload: does that, and says how it went.
pub fn as_child() -> Option<ExitCode> {
    if std::env::args().nth(1).as_deref() != Some(ECHO) {
        return None;
    }
    let (mut from, mut to) = (io::stdin().lock(), io::stdout().lock());
    let mut byte = [0];
    while matches!(from.read(&mut byte), Ok(1)) {
        if to.write_all(&byte).and_then(|()| to.flush()).is_err() {
            return Some(ExitCode::FAILURE);
        }
    }
    Some(ExitCode::SUCCESS)
}

/// Sends a byte to another process and reads its answer, so often; how many came.
pub fn ping_pong(count: u64) -> u64 {
    stay_on_this_cpu();
    let child = Command::new("/proc/self/exe")
        .arg(ECHO)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else { return 0 };
    let (Some(mut to), Some(mut from)) = (child.stdin.take(), child.stdout.take()) else {
        return 0;
    };
    let mut byte = [1];
    let answers = (0..count)
        .take_while(|_| to.write_all(&byte).is_ok() && from.read_exact(&mut byte).is_ok())
        .count();
    drop(to);
    child.wait().ok();
    answers as u64
}

/// Keeps this thread, and what it starts, on the processor where it is: across two, natively, most
/// of a ping-pong's time is an idle processor's awakening.
pub fn stay_on_this_cpu() {
    // SAFETY: the set is a plain bit mask of this function, whose size is told.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let cpu = libc::sched_getcpu().max(0) as usize;
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
    }
}

/// Processor time of this process and of the children that it has waited for.
pub fn cpu_seconds() -> f64 {
    [libc::RUSAGE_SELF, libc::RUSAGE_CHILDREN]
        .into_iter()
        .map(|who| {
            // SAFETY: the structure is plain numbers, which the call fills in.
            let usage = unsafe {
                let mut usage: libc::rusage = std::mem::zeroed();
                libc::getrusage(who, &raw mut usage);
                usage
            };
            [usage.ru_utime, usage.ru_stime]
                .iter()
                .map(|time| time.tv_sec as f64 + time.tv_usec as f64 / 1e6)
                .sum::<f64>()
        })
        .sum()
}

/// Ends the machine, as process 1.
pub fn power_off() {
    // SAFETY: system calls without pointers.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
}
