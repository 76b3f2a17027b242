//! Commands that prepare a machine for those who go on from it.

use std::io::{self, Write};

use skerry_protocol::host::HostError;
use skerry_protocol::message::ExitStatus;

use super::Vm;
use crate::command::{self, CommandSpec};
use crate::error::EngineError;
use crate::frozen::CommandAbout;
use crate::vms::Finder;

/// The agent's number for a command that was left running; those of runs are larger.
const LEFT_RUNNING: u32 = 0;
/// Bytes of output that are kept to look at.
const KEEP: usize = 64 << 10;

/// Output that is looked through for a mark.
struct Watch {
    finder: Finder,
    found: bool,
    seen: Vec<u8>,
}

impl Watch {
    fn new(mark: &str) -> Self {
        Self {
            finder: Finder::new(mark.as_bytes()),
            found: false,
            seen: Vec::new(),
        }
    }
}

impl Write for Watch {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.found |= self.finder.take(bytes);
        if self.found {
            // The way out of waiting for the end of a command that goes on.
            return Err(io::Error::other("it is ready"));
        }
        self.seen.extend(bytes);
        let excess = self.seen.len().saturating_sub(KEEP);
        self.seen.drain(..excess);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn last_lines(output: &[u8]) -> String {
    const LINES: usize = 10;
    let text = String::from_utf8_lossy(output);
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LINES);
    lines.get(from..).unwrap_or_default().join("\n")
}

fn failed(spec: &CommandSpec, why: &str) -> EngineError {
    EngineError::Prewarm {
        command: spec.command.join(" "),
        why: why.trim_end().to_owned(),
    }
}

impl Vm {
    /// Runs a command to its end, which must be a success, so that what it leaves in memory is there
    /// for those who go on from here.
    pub fn prewarm(&self, spec: &CommandSpec) -> Result<(), EngineError> {
        let surroundings = self.shared.surroundings.lock().clone();
        let request = command::request(spec.command.clone(), &surroundings, spec);
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let ended = self
            .exec(request)
            .and_then(|session| session.wait(&mut output, &mut errors));
        match ended {
            Ok(ExitStatus::Code(0)) => Ok(()),
            Ok(status) => {
                output.extend(errors);
                let code = status.shell_code();
                Err(failed(
                    spec,
                    &format!("exit status {code}\n{}", last_lines(&output)),
                ))
            }
            Err(HostError::NotStarted(failure)) => Err(failed(spec, &failure.message)),
            Err(error) => Err(self.explain(error)),
        }
    }

    /// Starts a command and waits until it has written `mark`. It goes on, here and in those who go
    /// on from here, who can take its input and output up.
    pub fn leave_running(&self, spec: &CommandSpec, mark: &str) -> Result<(), EngineError> {
        let surroundings = self.shared.surroundings.lock().clone();
        let request = command::request(spec.command.clone(), &surroundings, spec);
        let about = CommandAbout {
            argv: spec.command.clone(),
            tty: spec.tty.is_some(),
            stdin: spec.stdin,
            session: LEFT_RUNNING,
        };
        let session = match self.command(about, &surroundings, Some(request)) {
            Ok(session) => session,
            Err(HostError::NotStarted(failure)) => return Err(failed(spec, &failure.message)),
            Err(error) => return Err(self.explain(error)),
        };
        if mark.is_empty() {
            // It is there as soon as the command is.
            return Ok(());
        }
        let (mut output, mut errors) = (Watch::new(mark), Watch::new(mark));
        let ended = session.wait(&mut output, &mut errors);
        if output.found || errors.found {
            return Ok(());
        }
        self.command_ended();
        match ended {
            Ok(status) => {
                output.seen.extend(errors.seen);
                let (code, lines) = (status.shell_code(), last_lines(&output.seen));
                let why =
                    format!("it ended (exit status {code}) without writing {mark:?}\n{lines}");
                Err(failed(spec, &why))
            }
            Err(HostError::NotStarted(failure)) => Err(failed(spec, &failure.message)),
            Err(error) => Err(self.explain(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_found_across_writes() {
        let mut watch = Watch::new("ready");
        assert!(watch.write_all(b"not yet rea").is_ok());
        assert!(!watch.found);
        assert!(watch.write_all(b"dy!").is_err());
        assert!(watch.found);
    }

    #[test]
    fn only_the_end_of_much_output_is_kept() {
        let mut watch = Watch::new("never");
        watch.write_all(&vec![b'x'; 3 * KEEP]).expect("write");
        assert_eq!(watch.seen.len(), KEEP);
        assert_eq!(last_lines(b"1\n2\n3"), "1\n2\n3");
        assert_eq!(
            last_lines("line\n".repeat(99).as_bytes()).lines().count(),
            10
        );
    }
}
