//! The output of a command behind no terminal, kept in a file.
//!
//! One JSON object a line, as other container tools keep it: `{"time": …, "stream": "stdout",
//! "text": "…"}`. A piece of output that is no UTF-8 goes as `"bytes": [ … ]`, so that nothing is
//! lost.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::places;

use serde::{Deserialize, Serialize};

use super::registry::now;

/// Bytes of a line that never ends after which it is written down nevertheless.
const LONGEST: usize = 16 << 10;

/// Which of a command's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A line of a command's output, or as much of it as there was for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Line {
    /// When it came, in nanoseconds since 1970.
    pub time: u64,
    /// Where to.
    pub stream: Stream,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<Vec<u8>>,
}

impl Line {
    fn new(stream: Stream, bytes: Vec<u8>) -> Self {
        let (text, bytes) = match String::from_utf8(bytes) {
            Ok(text) => (Some(text), None),
            Err(error) => (None, Some(error.into_bytes())),
        };
        Self {
            time: now(),
            stream,
            text,
            bytes,
        }
    }

    /// What was written, its line's end included.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match (&self.text, &self.bytes) {
            (Some(text), _) => text.as_bytes(),
            (None, Some(bytes)) => bytes,
            (None, None) => &[],
        }
    }
}

/// Makes the file; gives the two streams' ends.
pub(crate) fn create(path: &Path) -> io::Result<[LogWriter; 2]> {
    let file = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)?;
    let file = Arc::new(Mutex::new(Log { file, lost: 0 }));
    Ok([Stream::Stdout, Stream::Stderr].map(|stream| LogWriter {
        file: file.clone(),
        stream,
        partial: Vec::new(),
    }))
}

/// Takes one of a command's streams.
#[derive(Debug)]
pub(crate) struct LogWriter {
    file: Arc<Mutex<Log>>,
    stream: Stream,
    partial: Vec<u8>,
}

impl LogWriter {
    fn put(&mut self, bytes: Vec<u8>) -> io::Result<()> {
        let mut text = serde_json::to_vec(&Line::new(self.stream, bytes))?;
        text.push(b'\n');
        let mut log = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        log.put(&text)
    }
}

/// The file, and how many lines went into none since the last.
#[derive(Debug)]
struct Log {
    file: File,
    lost: u64,
}

impl Log {
    /// Writes a line, or what there is no room for, not at all: the command goes on.
    fn put(&mut self, text: &[u8]) -> io::Result<()> {
        if self.lost > 0 {
            let count = self.lost;
            let note = format!("skerry: {count} lines are lost: the host's file system was full\n");
            let mut line = serde_json::to_vec(&Line::new(Stream::Stderr, note.into_bytes()))?;
            line.push(b'\n');
            if !self.whole(&line)? {
                self.lost += 1;
                return Ok(());
            }
            self.lost = 0;
        }
        if !self.whole(text)? {
            self.lost += 1;
        }
        Ok(())
    }

    /// Whether there was room for all of it; else there is nothing of it.
    fn whole(&mut self, text: &[u8]) -> io::Result<bool> {
        let length = self.file.metadata()?.len();
        match self.file.write_all(text) {
            Ok(()) => Ok(true),
            Err(error) if places::is_full(&error) => {
                self.file.set_len(length)?;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.partial.extend(piece);
            if piece.ends_with(b"\n") || self.partial.len() >= LONGEST {
                let line = std::mem::take(&mut self.partial);
                self.put(line)?;
            }
        }
        Ok(bytes.len())
    }

    /// A prompt has no end of line, and whoever looks at the log should see it.
    fn flush(&mut self) -> io::Result<()> {
        match std::mem::take(&mut self.partial) {
            partial if partial.is_empty() => Ok(()),
            partial => self.put(partial),
        }
    }
}

/// Reads the lines of a log as far as they are written.
#[derive(Debug)]
pub struct LogReader {
    file: BufReader<File>,
    partial: Vec<u8>,
}

impl LogReader {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::open_at(path, 0)
    }

    /// From this place on, where a line begins.
    pub(crate) fn open_at(path: &Path, at: u64) -> io::Result<Self> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(at))?;
        Ok(Self {
            file: BufReader::new(file),
            partial: Vec::new(),
        })
    }

    /// The next line; `None` where there is none yet.
    pub fn next_line(&mut self) -> io::Result<Option<Line>> {
        loop {
            self.file.read_until(b'\n', &mut self.partial)?;
            if !self.partial.ends_with(b"\n") {
                return Ok(None);
            }
            let line = std::mem::take(&mut self.partial);
            // A line that a full disk cut off says nothing.
            if let Ok(line) = serde_json::from_slice(&line) {
                return Ok(Some(line));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_comes_back() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("log");
        let [mut out, mut err] = create(&path).expect("log");
        out.write_all(b"one\ntw").expect("out");
        err.write_all(b"\xff\n").expect("err");
        out.write_all(b"o\n> ").expect("out");
        let mut reader = LogReader::open(&path).expect("open");
        let mut next = || {
            let line = reader.next_line().expect("read");
            line.map(|line| (line.stream, line.bytes().to_vec()))
        };
        assert_eq!(next(), Some((Stream::Stdout, b"one\n".to_vec())));
        assert_eq!(next(), Some((Stream::Stderr, b"\xff\n".to_vec())));
        assert_eq!(next(), Some((Stream::Stdout, b"two\n".to_vec())));
        assert_eq!(next(), None);
        out.flush().expect("flush");
        assert_eq!(next(), Some((Stream::Stdout, b"> ".to_vec())));
        out.write_all(&vec![b'x'; LONGEST * 2]).expect("long");
        assert!(next().is_some_and(|(_, bytes)| bytes.len() >= LONGEST));
    }
}
