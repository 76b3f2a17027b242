//! When a machine is ready: not when its command runs, but when that can be worked with.
//!
//! ```text
//!  output ─► Watched ─ the text is there ─┐
//!  guest ◄─ probe, again and again ─ 0 ───┴─► Hosted::become_ready ─► state, those who wait
//! ```

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skerry_protocol::message::ExitStatus;

use super::host::{Hosted, Life};
use crate::command::{self, CommandSpec, Surroundings};
use crate::run::RunIo;

/// How long after a probe that failed the next one begins.
const PAUSE: Duration = Duration::from_millis(200);

/// By what a machine is known to be ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum ReadyMark {
    /// Its command has written this, to standard output or standard error.
    Text(String),
    /// This, given to the guest's shell, succeeds.
    Shell(String),
    /// A connection to this TCP port of the guest is accepted.
    Tcp(u16),
}

impl ReadyMark {
    /// The command that tells whether the machine is ready, where one does.
    pub(super) fn probe(&self) -> Option<Vec<String>> {
        let words = |words: [&str; 3]| Some(words.map(str::to_owned).to_vec());
        match self {
            Self::Text(_) => None,
            Self::Shell(shell) => words(["/bin/sh", "-c", shell]),
            Self::Tcp(port) => words(["/proc/1/exe", "connect", &port.to_string()]),
        }
    }
}

/// Looks for a text in what comes piece by piece.
#[derive(Debug)]
pub(crate) struct Finder {
    text: Vec<u8>,
    /// What a text may have begun with that goes on in the next piece.
    tail: Vec<u8>,
}

impl Finder {
    pub(crate) fn new(text: &[u8]) -> Self {
        Self {
            text: text.to_vec(),
            tail: Vec::new(),
        }
    }

    /// Takes a piece; says whether the text has ended in it.
    pub(crate) fn take(&mut self, piece: &[u8]) -> bool {
        if self.text.is_empty() {
            return true;
        }
        self.tail.extend(piece);
        let length = self.text.len();
        let found = self.tail.windows(length).any(|window| window == self.text);
        let excess = self.tail.len().saturating_sub(length - 1);
        self.tail.drain(..excess);
        found
    }
}

/// One of a command's streams on its way.
struct Watched {
    inner: Box<dyn Write + Send>,
    finder: Option<Finder>,
    hosted: Arc<Hosted>,
    life: Arc<Life>,
}

impl Write for Watched {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        let piece = bytes.get(..written).unwrap_or_default();
        if self
            .finder
            .as_mut()
            .is_some_and(|finder| finder.take(piece))
        {
            self.finder = None;
            // Whoever is told looks at the output next.
            let _ = self.inner.flush();
            self.hosted.become_ready(&self.life);
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Has the streams looked through, if it is a text that says when the machine is ready.
pub(super) fn watch(
    hosted: &Arc<Hosted>,
    life: &Arc<Life>,
    mark: Option<&ReadyMark>,
    io: RunIo,
) -> RunIo {
    let Some(ReadyMark::Text(text)) = mark else {
        return io;
    };
    let watched = |inner| {
        Box::new(Watched {
            inner,
            finder: Some(Finder::new(text.as_bytes())),
            hosted: hosted.clone(),
            life: life.clone(),
        })
    };
    RunIo {
        stdout: watched(io.stdout),
        stderr: watched(io.stderr),
        ..io
    }
}

/// Runs the probe until it succeeds, or there is nothing to ask any more.
pub(super) fn probe(
    hosted: &Hosted,
    life: &Arc<Life>,
    argv: Vec<String>,
    surroundings: &Surroundings,
) {
    let request = command::request(argv, surroundings, &CommandSpec::default());
    while !life.vm.machine().is_ending() {
        let session = life.vm.exec(request.clone());
        let ended = session.and_then(|session| session.wait(&mut io::sink(), &mut io::sink()));
        match ended {
            Ok(ExitStatus::Code(0)) => return hosted.become_ready(life),
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "a probe came to nothing"),
        }
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_text_is_found_however_it_comes(
            before in "[ab]{0,12}", text in "[ab]{1,5}", after in "[ab]{0,5}",
            cuts in prop::collection::vec(0_usize..24, 0..4), with in any::<bool>(),
        ) {
            let whole = if with { format!("{before}{text}{after}") } else { before };
            let mut ends: Vec<usize> = cuts.into_iter().map(|cut| cut.min(whole.len())).collect();
            ends.extend([0, whole.len()]);
            ends.sort_unstable();
            let mut finder = Finder::new(text.as_bytes());
            let mut found = false;
            for pair in ends.windows(2) {
                found |= finder.take(&whole.as_bytes()[pair[0]..pair[1]]);
            }
            prop_assert_eq!(found, whole.contains(&text));
        }
    }
}
