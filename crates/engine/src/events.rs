//! What happens to machines and images, noted by whoever does it, and read by whoever wants to know.
//!
//! ```text
//!  any process ─► note ─► events       a JSON object a line, appended in one write
//!                            │ of 4 MiB: renamed
//!                            ▼
//!                         events.1     the older half
//!  Reader ◄─ both, then what is written from now on
//! ```
//! A line is written under a shared lock and the renaming done under the same lock taken alone: a reader
//! that has seen the end of a file that has another name by now has seen all of it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::error::EngineError;
use crate::paths::Paths;
use crate::vms::{VmConfig, Watch, now};

/// A folder of their own: the process of a machine may write in few others.
const FOLDER: &str = "log";
const FILE: &str = "log/events";
const OLDER: &str = "log/events.1";
const LOCK: &str = "log/events.lock";
/// Bytes of a file after which the next one is begun.
const LONGEST: u64 = 4 << 20;
/// How often it is looked for new events where the host tells of none.
const LOOK: Duration = Duration::from_millis(200);

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A virtual machine.
    Machine,
    /// An image of the store.
    Image,
}

impl Kind {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Image => "image",
        }
    }
}

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Happened {
    /// When, in nanoseconds since 1970.
    pub time: u64,
    /// To what.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// What: the verb, as docker has it.
    pub action: String,
    /// The identity of the machine, or the image.
    pub id: String,
    /// What else there is to it: the machine's name, image and labels, exit statuses, signals.
    #[serde(default)]
    pub attributes: BTreeMap<String, String>,
}

/// Notes that something has happened to a machine.
pub(crate) fn machine(root: &Path, config: &VmConfig, action: &str, more: &[(&str, String)]) {
    let mut attributes = config.labels.clone();
    attributes.insert("name".to_owned(), config.name.clone());
    attributes.insert("image".to_owned(), config.image.clone());
    attributes.extend(
        more.iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone())),
    );
    note(root, Kind::Machine, action, &config.id, attributes);
}

/// Notes that something has happened to an image.
pub(crate) fn image(paths: &Paths, action: &str, id: &str) {
    let attributes = BTreeMap::from([("name".to_owned(), id.to_owned())]);
    note(paths.root(), Kind::Image, action, id, attributes);
}

fn note(root: &Path, kind: Kind, action: &str, id: &str, attributes: BTreeMap<String, String>) {
    let event = Happened {
        time: now(),
        kind,
        action: action.to_owned(),
        id: id.to_owned(),
        attributes,
    };
    // What is done is done, whether or not it can be noted.
    if let Err(error) = append(root, &event) {
        tracing::debug!(%error, action, "an event is not noted");
    }
}

fn append(root: &Path, event: &Happened) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    if !root.join(FOLDER).exists() {
        fs::create_dir_all(root.join(FOLDER))?;
    }
    let lock = private().write(true).create(true).open(root.join(LOCK))?;
    rustix::fs::flock(&lock, FlockOperation::LockShared)?;
    let path = root.join(FILE);
    let mut file = private().append(true).create(true).open(&path)?;
    file.write_all(&line)?;
    if file.metadata()?.len() < LONGEST {
        return Ok(());
    }
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    // Another may have done it before it was this one's turn.
    if fs::metadata(&path)?.len() >= LONGEST {
        fs::rename(&path, root.join(OLDER))?;
    }
    Ok(())
}

/// The folder that events are in.
pub(crate) fn folder(paths: &Paths) -> PathBuf {
    paths.root().join(FOLDER)
}

fn private() -> fs::OpenOptions {
    let mut options = File::options();
    options.mode(0o600);
    options
}

/// Reads events, the older ones first, and waits for more.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: Option<BufReader<File>>,
    /// The older half comes first.
    older: bool,
    partial: Vec<u8>,
    watch: Watch,
}

impl Reader {
    /// Begins with the oldest that is known.
    pub fn open(paths: &Paths) -> Result<Self, EngineError> {
        Paths::ensure(&folder(paths))?;
        let older = File::open(paths.root().join(OLDER)).ok();
        let mut reader = Self {
            path: paths.root().join(FILE),
            older: older.is_some(),
            file: older.map(BufReader::new),
            partial: Vec::new(),
            watch: Watch::new(),
        };
        // That there is one more file shows in the folder.
        reader.watch.add_folder(&folder(paths));
        Ok(reader)
    }

    /// The next one that is written already.
    pub fn written(&mut self) -> io::Result<Option<Happened>> {
        loop {
            if self.file.is_none() && !self.begin_file()? {
                return Ok(None);
            }
            // Before the reading: all of a file that has another name by now is written.
            let complete = self.older || !self.is_current()?;
            let Some(file) = &mut self.file else {
                return Ok(None);
            };
            file.read_until(b'\n', &mut self.partial)?;
            if self.partial.ends_with(b"\n") {
                let line = std::mem::take(&mut self.partial);
                // What a full disk cut off says nothing.
                if let Ok(event) = serde_json::from_slice(&line) {
                    return Ok(Some(event));
                }
            } else if complete {
                self.partial.clear();
                self.older = false;
                self.file = None;
            } else {
                return Ok(None);
            }
        }
    }

    fn begin_file(&mut self) -> io::Result<bool> {
        match File::open(&self.path) {
            Ok(file) => {
                self.file = Some(BufReader::new(file));
                self.watch.add(&self.path);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether the file that is read is the one that is written.
    fn is_current(&self) -> io::Result<bool> {
        let Some(file) = &self.file else {
            return Ok(false);
        };
        let own = file.get_ref().metadata()?;
        match fs::metadata(&self.path) {
            Ok(there) => Ok((there.dev(), there.ino()) == (own.dev(), own.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The next one, waited for; `None` when `limit` has passed without one.
    pub fn next(&mut self, limit: Option<Duration>) -> io::Result<Option<Happened>> {
        let until = limit.map(|limit| std::time::Instant::now() + limit);
        loop {
            if let Some(event) = self.written()? {
                return Ok(Some(event));
            }
            let left =
                until.map(|until| until.saturating_duration_since(std::time::Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            self.watch.wait(left.unwrap_or(LOOK).min(LOOK));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: usize, text: &str) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("n".to_owned(), number.to_string()),
            ("text".to_owned(), text.to_owned()),
        ])
    }

    #[test]
    fn events_come_in_order_across_files() {
        let folder = tempfile::tempdir().expect("folder");
        let paths = Paths::at(folder.path());
        let mut early = Reader::open(&paths).expect("reader");
        assert_eq!(early.written().expect("none"), None);
        let long = "x".repeat(64 << 10);
        // More than one file, and less than three.
        const COUNT: usize = 100;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..COUNT {
                    note(
                        paths.root(),
                        Kind::Machine,
                        "test",
                        "id",
                        event(number, &long),
                    );
                }
            });
            for number in 0..COUNT {
                let event = early.next(Some(Duration::from_secs(10))).expect("read");
                let event = event.expect("in time");
                assert_eq!(event.attributes["n"], number.to_string());
            }
        });
        assert!(folder.path().join(OLDER).exists());
        assert_eq!(
            early.next(Some(Duration::from_millis(10))).expect("none"),
            None
        );
        let mut late = Reader::open(&paths).expect("reader");
        let mut count = 0;
        while late.written().expect("read").is_some() {
            count += 1;
        }
        assert_eq!(count, COUNT);
    }

    #[test]
    fn what_is_no_event_is_passed_over() {
        let folder = tempfile::tempdir().expect("folder");
        let paths = Paths::at(folder.path());
        fs::create_dir(folder.path().join(FOLDER)).expect("folder");
        fs::write(folder.path().join(FILE), "half of a li\n{}\n\n").expect("file");
        note(paths.root(), Kind::Image, "pull", "id", BTreeMap::new());
        let mut reader = Reader::open(&paths).expect("reader");
        let event = reader.written().expect("read").expect("one");
        assert_eq!((event.kind, event.action.as_str()), (Kind::Image, "pull"));
        assert_eq!(reader.written().expect("none"), None);
    }
}
