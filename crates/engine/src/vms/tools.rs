//! What the agent's own program does in a guest for whoever asks, whatever the image has: see
//! `guest/agent/src/tools.rs`.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::info::VmInfo;
use super::operations::run_in;
use super::registry::Registry;
use crate::command::CommandSpec;
use crate::error::EngineError;
use crate::run::{RunIo, RunOutcome};

/// The agent's program, as every guest has it.
const AGENT: &str = "/proc/1/exe";
/// The most that is kept of what a guest answers.
const LONGEST: usize = 4 << 20;

/// A process of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// The one that made it.
    pub parent: u32,
    /// Whose it is.
    pub user: u32,
    /// The kernel's letter for what it does.
    pub state: char,
    /// Bytes of memory that it has in use.
    pub memory: u64,
    /// Processor time, in milliseconds.
    pub cpu_ms: u64,
    /// For how long it has been there, in milliseconds.
    pub age_ms: u64,
    /// Its program and arguments; the kernel's name for it in brackets where it has none.
    pub command: String,
}

impl Process {
    /// From a line of the agent's, which may be anybody's.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(8, '\t');
        let mut next = || fields.next();
        Some(Self {
            pid: next()?.parse().ok()?,
            parent: next()?.parse().ok()?,
            user: next()?.parse().ok()?,
            state: next()?.chars().next()?,
            memory: next()?.parse::<u64>().ok()?.checked_mul(1024)?,
            cpu_ms: next()?.parse().ok()?,
            age_ms: next()?.parse().ok()?,
            command: next()?
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect(),
        })
    }
}

/// The processes of a guest, in the order of their numbers. Those of its kernel and its agent, which
/// are not the user's, are left out.
pub fn processes(registry: &Registry, name: &str) -> Result<Vec<Process>, EngineError> {
    let info = registry.find(name)?;
    let text = answer(registry, &info, &["processes"])?;
    let all = text.lines().filter_map(Process::parse);
    let own = |process: &Process| {
        let kernels = process.pid == 2 || process.parent == 2;
        let agents = process.pid == 1 || process.command == format!("{AGENT} processes");
        !kernels && !agents
    };
    let mut found: Vec<_> = all.filter(own).collect();
    found.sort_by_key(|process| process.pid);
    Ok(found)
}

/// Keeps what is written, up to a bound.
#[derive(Clone, Debug, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Kept {
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = LONGEST.saturating_sub(kept.len()).min(bytes.len());
        kept.extend(bytes.iter().take(room));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a verb of the agent's writes.
pub(super) fn answer(
    registry: &Registry,
    info: &VmInfo,
    words: &[&str],
) -> Result<String, EngineError> {
    let out = Kept::default();
    run(registry, info, words, None, Box::new(out.clone()))?;
    Ok(out.text())
}

/// Runs a verb of the agent's, as root.
pub(super) fn run(
    registry: &Registry,
    info: &VmInfo,
    words: &[&str],
    stdin: Option<Box<dyn Read + Send>>,
    stdout: Box<dyn Write + Send>,
) -> Result<(), EngineError> {
    let command = std::iter::once(AGENT).chain(words.iter().copied());
    let spec = CommandSpec {
        command: command.map(str::to_owned).collect(),
        user: Some("0:0".to_owned()),
        working_dir: Some("/".to_owned()),
        stdin: stdin.is_some(),
        ..CommandSpec::default()
    };
    let errors = Kept::default();
    let io = RunIo {
        stdin,
        stdout,
        stderr: Box::new(errors.clone()),
        events: None,
    };
    let reason = match run_in(registry, info, &spec, io)? {
        outcome if outcome.code() == 0 => return Ok(()),
        RunOutcome::NotStarted(failure) => failure.message,
        _ => errors.text(),
    };
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let reason: String = reason.trim_end().chars().map(printable).collect();
    Err(EngineError::InGuest {
        name: info.config.name.clone(),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_guests_is_a_process_or_nothing() {
        let line = "7\t1\t1000\tS\t2048\t30\t5000\tsh -c a\tb";
        let process = Process::parse(line).expect("a process");
        assert_eq!((process.pid, process.user, process.state), (7, 1000, 'S'));
        assert_eq!(process.memory, 2 << 20);
        assert_eq!(process.command, "sh -c a b");
        for line in [
            "",
            "7",
            "7\t1\tx\tS\t1\t1\t1\tc",
            "7\t1\t0\tS\t18446744073709551615\t1\t1\tc",
        ] {
            assert_eq!(Process::parse(line), None, "{line:?}");
        }
    }
}
