//! What virtual machines take of the host, as the host has it.

use std::io;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::control::Traffic;
use super::info::VmInfo;
use super::operations::{is_alive, traffic};
use super::registry::Registry;

/// Fields of `/proc/PID/stat` behind the program's name, which is in parentheses (proc(5)): state is the
/// first.
const UTIME: usize = 11;
const STIME: usize = 12;
const THREADS: usize = 17;

/// What the process of a machine has taken up to one moment.
#[derive(Clone, Copy, Debug)]
struct Taken {
    at: Instant,
    /// Of all of its threads, those that have ended too.
    processor: Duration,
    resident: u64,
    threads: u32,
}

/// What a machine takes of the host.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Usage {
    /// The machine.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Time of the host's processors, in parts of a hundred of one of them.
    pub cpu_percent: f64,
    /// The same since its process began, in seconds of one processor.
    pub cpu_seconds: f64,
    /// Bytes of the host's memory: what its guest has touched, and what its process needs itself.
    pub resident: u64,
    /// Bytes of RAM that its guest has.
    pub memory: u64,
    /// Threads of its process.
    pub threads: u32,
    /// What it has moved since it was started; `None` while it starts.
    pub traffic: Option<Traffic>,
}

impl Taken {
    fn of(pid: u32) -> io::Result<Self> {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}"));
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "what /proc says is damaged");
        let stat = read("stat")?;
        let (_, fields) = stat.rsplit_once(')').ok_or_else(damaged)?;
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        let field = |n: usize| -> io::Result<u64> {
            let text = fields.get(n).ok_or_else(damaged)?;
            text.parse().map_err(|_| damaged())
        };
        let ticks = field(UTIME)?.saturating_add(field(STIME)?);
        let nanoseconds = u128::from(ticks) * 1_000_000_000
            / u128::from(rustix::param::clock_ticks_per_second().max(1));
        let pages = read("statm")?;
        let pages: u64 = pages
            .split_ascii_whitespace()
            .nth(1)
            .and_then(|pages| pages.parse().ok())
            .ok_or_else(damaged)?;
        Ok(Self {
            at: Instant::now(),
            processor: Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)),
            resident: pages.saturating_mul(rustix::param::page_size() as u64),
            threads: u32::try_from(field(THREADS)?).unwrap_or(u32::MAX),
        })
    }
}

/// What machines take of the host, looked at for as long as `span`; those that have ended, or end
/// meanwhile, are left out. A process id is trusted only while its machine's lock is held, before and
/// after.
pub fn usage(registry: &Registry, infos: &[VmInfo], span: Duration) -> Vec<Usage> {
    let alive = infos.iter().filter(|info| info.state.status.is_alive());
    let before: Vec<(&VmInfo, Taken)> = alive
        .filter_map(|info| Some((info, Taken::of(info.state.pid).ok()?)))
        .collect();
    std::thread::sleep(span);
    let now = |(info, before): (&VmInfo, Taken)| {
        let after = Taken::of(info.state.pid).ok()?;
        let wall = after.at.duration_since(before.at).as_secs_f64();
        let processor = after.processor.saturating_sub(before.processor);
        is_alive(registry, info).then(|| Usage {
            id: info.config.id.clone(),
            name: info.config.name.clone(),
            cpu_percent: 100.0 * processor.as_secs_f64() / wall.max(f64::MIN_POSITIVE),
            cpu_seconds: after.processor.as_secs_f64(),
            resident: after.resident,
            memory: info.config.memory,
            threads: after.threads,
            traffic: traffic(registry, info).ok(),
        })
    };
    before.into_iter().filter_map(now).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_takes_what_it_takes() {
        let before = Taken::of(std::process::id()).expect("stat");
        let until = Instant::now() + Duration::from_millis(200);
        let mut sum = 0u64;
        while Instant::now() < until {
            sum = sum.wrapping_mul(31).wrapping_add(1);
        }
        let mut filled = vec![0u8; 32 << 20];
        filled.fill((sum | 1) as u8);
        let after = Taken::of(std::process::id()).expect("stat");
        assert!(after.processor > before.processor);
        assert!(after.threads >= 1);
        assert!(
            after.resident >= before.resident / 2 + (24 << 20),
            "{after:?}"
        );
        assert!(filled.iter().all(|&byte| byte != 0));
        assert!(Taken::of(u32::MAX).is_err());
    }
}
