//! The end of a guest's console, kept for the day it is needed.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that are kept.
const KEEP: usize = 64 * 1024;

/// Keeps the last of what is written to it, and passes it on where asked to.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConsoleLog {
    kept: Arc<Mutex<VecDeque<u8>>>,
    echo: bool,
}

impl ConsoleLog {
    /// A log that also goes to stderr if `echo`.
    pub(crate) fn new(echo: bool) -> Self {
        Self {
            kept: Arc::default(),
            echo,
        }
    }

    /// The last `lines` lines.
    pub(crate) fn tail(&self, lines: usize) -> String {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        drop(kept);
        let text = String::from_utf8_lossy(&bytes);
        let all: Vec<&str> = text.lines().collect();
        all.get(all.len().saturating_sub(lines)..)
            .unwrap_or_default()
            .join("\n")
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.echo {
            // The log is a note to the user: it must not stop the guest when stderr is gone.
            let _ = io::stderr().write_all(bytes);
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEEP);
        kept.drain(..excess);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_end() {
        let mut log = ConsoleLog::new(false);
        for n in 0..20_000 {
            writeln!(log, "line {n}").unwrap();
        }
        assert_eq!(log.tail(2), "line 19998\nline 19999");
        assert!(log.kept.lock().unwrap().len() <= KEEP);
    }
}
