//! Which virtual machines there are: a folder for each, and nobody who keeps a list.
//!
//! ```text
//!  vms/<id>/lock      held by the machine's process as long as it lives: the one sign of life
//!           config    what it is (JSON, replaced by rename when the machine gets another name)
//!           state     how it is (JSON, replaced by rename)
//!           control   socket of its process          log   its command's output, line by line
//!  vms/names/<name> ─► ../<id>
//! ```
//! A machine whose process was killed holds no lock: whatever its state says, it is not running, and
//! process ids are never trusted for that. A folder appears whole, by a rename, with its lock held.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::names;
use super::places::{self, read_json, write_json};
use super::ready::ReadyMark;
use crate::EngineError;
use crate::command::Surroundings;
use crate::paths::Paths;
use crate::random::random;

const NAMES: &str = "names";
const NEW: &str = ".new-";
const GONE: &str = ".new-gone-";
const LOCK: &str = "lock";
const CONFIG: &str = "config";
const STATE: &str = "state";
const CONTROL: &str = "control";
const LOG: &str = "log";

/// What a virtual machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// 32 hexadecimal digits.
    pub id: String,
    /// Its name, which no other has.
    pub name: String,
    /// The image, as the user named it.
    pub image: String,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// What further commands in it find.
    pub surroundings: Surroundings,
    /// The command has a terminal.
    pub tty: bool,
    /// Bytes of RAM.
    pub memory: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// The snapshot or machine that it goes on from.
    pub parent: Option<String>,
    /// It is forgotten when it ends.
    pub auto_remove: bool,
    /// It runs behind no terminal, and keeps its output in a log.
    pub detached: bool,
    /// When it was made, in nanoseconds since 1970.
    pub created: u64,
    /// By what it is known to be ready.
    #[serde(default)]
    pub ready_mark: Option<ReadyMark>,
}

/// How a virtual machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its guest starts.
    Starting,
    /// Its command runs.
    Running,
    /// Its command runs, and it has shown what it is ready by.
    Ready,
    /// It stands still.
    Paused,
    /// It has ended.
    Stopped,
    /// It has ended by a failure.
    Failed,
}

impl Status {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Ready => "ready",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }

    /// Whether its process lives.
    #[must_use]
    pub fn is_alive(self) -> bool {
        matches!(
            self,
            Self::Starting | Self::Running | Self::Ready | Self::Paused
        )
    }
}

/// The part of a virtual machine's description that changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// How it is.
    pub status: Status,
    /// Its process, while it lives.
    pub pid: u32,
    /// When its command was started, in nanoseconds since 1970.
    pub started: Option<u64>,
    /// When it was ready.
    #[serde(default)]
    pub ready: Option<u64>,
    /// When it ended.
    pub finished: Option<u64>,
    /// The exit status of its command, as a shell has it, or Skerry's own.
    pub exit_code: Option<u8>,
    /// Why it failed.
    pub error: Option<String>,
}

impl VmState {
    /// What it is while its command runs and nothing holds it up.
    #[must_use]
    pub fn under_way(&self) -> Status {
        match self.ready {
            Some(_) => Status::Ready,
            None => Status::Running,
        }
    }
}

/// Exit code of a command whose machine was killed.
pub const KILLED: u8 = 137;

/// A virtual machine, as found in the registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmInfo {
    /// What it is.
    #[serde(flatten)]
    pub config: VmConfig,
    /// How it is; true at the moment of asking.
    #[serde(flatten)]
    pub state: VmState,
}

/// All virtual machines of a user.
#[derive(Clone, Debug)]
pub struct Registry {
    root: PathBuf,
}

/// The place of a virtual machine that this process runs. Its lock goes with it.
#[derive(Debug)]
pub struct Entry {
    registry: Registry,
    /// What it is.
    pub config: VmConfig,
    state: VmState,
    _lock: File,
}

/// Nanoseconds since 1970.
#[must_use]
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}

/// A new identity.
pub(crate) fn new_id() -> Result<String, EngineError> {
    let bytes: [u8; 16] = random()?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn is_id(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether some process holds the lock in `folder`.
fn is_held(folder: &Path) -> bool {
    places::is_held(&folder.join(LOCK))
}

/// Removes a folder of a machine that is forgotten. Others may be at it, and take files away from under
/// each other.
fn clear(gone: &Path) {
    const TRIES: u32 = 3;
    let _ = (0..TRIES).any(|_| {
        let _ = fs::remove_dir_all(gone);
        !gone.exists()
    });
}

impl Registry {
    /// The user's own; made where it doesn't exist.
    pub fn open(paths: &Paths) -> Result<Self, EngineError> {
        let root = paths.vms();
        Paths::ensure(&root.join(NAMES))?;
        Ok(Self { root })
    }

    /// The folder that this and everything else is in.
    pub(crate) fn data(&self) -> &Path {
        self.root.parent().unwrap_or(&self.root)
    }

    fn folder(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// The socket of a machine's process.
    pub(crate) fn control(&self, id: &str) -> PathBuf {
        self.folder(id).join(CONTROL)
    }

    /// The output of a machine's command.
    pub(crate) fn log(&self, id: &str) -> PathBuf {
        self.folder(id).join(LOG)
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> EngineError + use<> {
        let path = self.root.clone();
        move |source| EngineError::Registry { what, path, source }
    }

    /// Makes a place for a machine that this process is about to run. `config`'s identity is given
    /// here, and its name where it has none.
    pub fn create(&self, mut config: VmConfig) -> Result<Entry, EngineError> {
        if !config.name.is_empty() {
            names::check(&config.name)?;
        }
        config.id = new_id()?;
        config.created = now();
        let state = VmState {
            status: Status::Starting,
            pid: std::process::id(),
            started: None,
            ready: None,
            finished: None,
            exit_code: None,
            error: None,
        };
        let staged = self.root.join(format!("{NEW}{}", config.id));
        let lock = self
            .stage(&staged, &state)
            .map_err(self.failed("make a place for a virtual machine"))?;
        let result = self.publish(&staged, &mut config);
        if let Err(error) = result {
            // What is left of it is removed with the next listing at the latest.
            let _ = fs::remove_dir_all(&staged);
            return Err(error);
        }
        Ok(Entry {
            registry: self.clone(),
            config,
            state,
            _lock: lock,
        })
    }

    fn stage(&self, staged: &Path, state: &VmState) -> io::Result<File> {
        fs::DirBuilder::new().mode(0o700).create(staged)?;
        let lock = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(staged.join(LOCK))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
        write_json(&staged.join(STATE), state)?;
        Ok(lock)
    }

    /// Claims a name, then lets the folder appear.
    fn publish(&self, staged: &Path, config: &mut VmConfig) -> Result<(), EngineError> {
        if config.name.is_empty() {
            config.name = self.claim_any(&config.id)?;
        } else if !self.claim(&config.name, &config.id)? {
            let name = config.name.clone();
            return Err(EngineError::NameTaken { name });
        }
        let result = write_json(&staged.join(CONFIG), config)
            .and_then(|()| fs::rename(staged, self.folder(&config.id)));
        result.map_err(|source| {
            let _ = fs::remove_file(self.root.join(NAMES).join(&config.name));
            self.failed("make a place for a virtual machine")(source)
        })
    }

    fn claim_any(&self, id: &str) -> Result<String, EngineError> {
        for attempt in 0.. {
            let name = names::generate(id, attempt);
            if self.claim(&name, id)? {
                return Ok(name);
            }
        }
        unreachable!("the loop has no end")
    }

    /// Takes a name for `id` unless another machine has it.
    fn claim(&self, name: &str, id: &str) -> Result<bool, EngineError> {
        let link = self.root.join(NAMES).join(name);
        let target = Path::new("..").join(id);
        loop {
            match symlink(&target, &link) {
                Ok(()) => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(self.failed("name a virtual machine")(error)),
            }
            let Ok(owner) = fs::read_link(&link) else {
                continue;
            };
            let owner = owner.file_name().unwrap_or_default().to_string_lossy();
            let staged = self.root.join(format!("{NEW}{owner}"));
            if self.folder(&owner).exists() || is_held(&staged) {
                return Ok(false);
            }
            // Its machine is gone. Two that find so at once: renaming the link takes it from the
            // first only.
            let stale = self.root.join(NAMES).join(format!(".stale-{id}"));
            if fs::rename(&link, &stale).is_ok() {
                let _ = fs::remove_file(&stale);
            }
        }
    }

    /// All machines, the newest first. What killed processes left and nobody can ask for is
    /// removed.
    pub fn list(&self) -> Result<Vec<VmInfo>, EngineError> {
        let failed = self.failed("list the virtual machines");
        let folders = fs::read_dir(&self.root).map_err(failed)?;
        let mut found = Vec::new();
        for folder in folders.flatten() {
            let name = folder.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(GONE) {
                clear(&folder.path());
            } else if name.starts_with(NEW) {
                self.sweep(&folder.path());
            } else if is_id(&name)
                && let Some(info) = self.read(&name)
            {
                found.push(info);
            }
        }
        found.sort_by_key(|info| std::cmp::Reverse(info.config.created));
        Ok(found)
    }

    /// Removes a folder that never became a machine's.
    fn sweep(&self, staged: &Path) {
        let Ok(lock) = File::open(staged.join(LOCK)) else {
            return;
        };
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = fs::remove_dir_all(staged);
        }
    }

    /// A machine by its identity; `None` if there is none (any more).
    fn read(&self, id: &str) -> Option<VmInfo> {
        let folder = self.folder(id);
        // Before the state: a machine that ends in between has written its last state by then.
        let alive = is_held(&folder);
        let config: VmConfig = read_json(&folder.join(CONFIG)).ok()?;
        let mut state: VmState = read_json(&folder.join(STATE)).ok()?;
        if !alive && state.status.is_alive() {
            if config.auto_remove {
                self.forget(&config);
                return None;
            }
            state.status = Status::Failed;
            state.exit_code = Some(KILLED);
            state.error = Some("its process was killed".to_owned());
        }
        Some(VmInfo { config, state })
    }

    /// A machine by name, identity or the first digits of that.
    pub fn find(&self, name: &str) -> Result<VmInfo, EngineError> {
        let unknown = || EngineError::NoSuchVm {
            name: name.to_owned(),
        };
        if names::check(name).is_ok()
            && let Ok(target) = fs::read_link(self.root.join(NAMES).join(name))
            && let Some(id) = target.file_name().and_then(|id| id.to_str())
            && let Some(info) = self.read(id)
        {
            return Ok(info);
        }
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(unknown());
        }
        let wanted = name.to_ascii_lowercase();
        let mut matching = self.list()?;
        matching.retain(|info| info.config.id.starts_with(&wanted));
        match matching.len() {
            0 => Err(unknown()),
            1 => matching.pop().ok_or_else(unknown),
            count => Err(EngineError::AmbiguousVm {
                name: name.to_owned(),
                count,
            }),
        }
    }

    /// Forgets a machine that has ended.
    pub fn remove(&self, info: &VmInfo) -> Result<(), EngineError> {
        if is_held(&self.folder(&info.config.id)) {
            let name = info.config.name.clone();
            return Err(EngineError::VmRuns { name });
        }
        self.forget(&info.config);
        Ok(())
    }

    fn forget(&self, config: &VmConfig) {
        // First out of sight, so that no half of it is ever found.
        let gone = self.root.join(format!("{GONE}{}", config.id));
        if fs::rename(self.folder(&config.id), &gone).is_ok() {
            self.release_name(config);
            clear(&gone);
        }
    }

    /// Gives a machine that has ended another name.
    pub fn rename(&self, info: &VmInfo, name: &str) -> Result<(), EngineError> {
        let failed = || self.failed("rename a virtual machine");
        let lock = File::open(self.folder(&info.config.id).join(LOCK)).map_err(failed())?;
        // Whoever removes it meanwhile takes its folder away as a whole.
        let free = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive);
        free.map_err(|_| EngineError::VmRuns {
            name: info.config.name.clone(),
        })?;
        self.give_name(&mut info.config.clone(), name)
    }

    /// Claims the new name, makes it known, and lets the old one go.
    fn give_name(&self, config: &mut VmConfig, name: &str) -> Result<(), EngineError> {
        names::check(name)?;
        if config.name == name {
            return Ok(());
        }
        if !self.claim(name, &config.id)? {
            let name = name.to_owned();
            return Err(EngineError::NameTaken { name });
        }
        let old = config.clone();
        name.clone_into(&mut config.name);
        let folder = self.folder(&config.id);
        let staged = folder.join("config.new");
        let written = write_json(&staged, config)
            .and_then(|()| fs::rename(&staged, folder.join(CONFIG)))
            .map_err(self.failed("rename a virtual machine"));
        if let Err(error) = written {
            self.release_name(config);
            *config = old;
            return Err(error);
        }
        self.release_name(&old);
        Ok(())
    }

    fn release_name(&self, config: &VmConfig) {
        let link = self.root.join(NAMES).join(&config.name);
        let own = Path::new("..").join(&config.id);
        if fs::read_link(&link).is_ok_and(|target| target == own) {
            let _ = fs::remove_file(link);
        }
    }
}

impl Entry {
    /// How the machine is.
    #[must_use]
    pub fn state(&self) -> &VmState {
        &self.state
    }

    /// All that it has of its own.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.registry.folder(&self.config.id)
    }

    /// The socket to listen at.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.registry.control(&self.config.id)
    }

    /// The file for the command's output.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.registry.log(&self.config.id)
    }

    /// Changes the state and makes it known.
    pub fn update(&mut self, change: impl FnOnce(&mut VmState)) -> Result<(), EngineError> {
        change(&mut self.state);
        let folder = self.registry.folder(&self.config.id);
        let staged = folder.join("state.new");
        write_json(&staged, &self.state)
            .and_then(|()| fs::rename(&staged, folder.join(STATE)))
            .map_err(self.registry.failed("note the state of a virtual machine"))
    }

    /// Gives the machine another name.
    pub fn rename(&mut self, name: &str) -> Result<(), EngineError> {
        let registry = self.registry.clone();
        registry.give_name(&mut self.config, name)
    }

    /// The end of what never became a machine.
    pub fn discard(self) {
        self.registry.forget(&self.config);
    }

    /// The end: with this state, or forgotten where that was asked for.
    pub fn finish(mut self, change: impl FnOnce(&mut VmState)) -> Result<(), EngineError> {
        let _ = fs::remove_file(self.control());
        if self.config.auto_remove {
            self.registry.forget(&self.config);
            return Ok(());
        }
        self.update(|state| {
            state.finished = Some(now());
            change(state);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(folder: &Path) -> Registry {
        Registry::open(&Paths::at(folder)).expect("registry")
    }

    fn config(name: &str) -> VmConfig {
        VmConfig {
            id: String::new(),
            name: name.to_owned(),
            image: "demo".to_owned(),
            command: vec!["true".to_owned()],
            surroundings: Surroundings::default(),
            tty: false,
            memory: 1 << 20,
            cpus: 1,
            parent: None,
            auto_remove: false,
            detached: true,
            created: 0,
            ready_mark: None,
        }
    }

    #[test]
    fn a_machine_is_found_by_name_and_by_digits() {
        let folder = tempfile::tempdir().expect("folder");
        let registry = registry(folder.path());
        let mut one = registry.create(config("one")).expect("one");
        let two = registry.create(config("")).expect("two");
        one.update(|state| state.status = Status::Running)
            .expect("update");
        let found = registry.find("one").expect("by name");
        assert_eq!(found.state.status, Status::Running);
        assert_eq!(
            registry.find(&two.config.name).expect("two").config,
            two.config
        );
        assert_eq!(
            registry.find(&one.config.id[..16]).expect("id").config,
            one.config
        );
        assert!(matches!(
            registry.find("three"),
            Err(EngineError::NoSuchVm { .. })
        ));
        assert!(matches!(
            registry.find("../one"),
            Err(EngineError::NoSuchVm { .. })
        ));
        assert!(matches!(
            registry.create(config("one")),
            Err(EngineError::NameTaken { .. })
        ));
        assert!(registry.create(config("../one")).is_err());
        assert_eq!(registry.list().expect("list").len(), 2);
    }

    #[test]
    fn a_killed_machine_is_never_running() {
        let folder = tempfile::tempdir().expect("folder");
        let registry = registry(folder.path());
        let mut entry = registry.create(config("killed")).expect("entry");
        entry
            .update(|state| state.status = Status::Running)
            .expect("update");
        // The process is gone with its lock.
        drop(entry);
        let found = registry.find("killed").expect("found");
        assert_eq!(
            (found.state.status, found.state.exit_code),
            (Status::Failed, Some(KILLED))
        );
        let brief = VmConfig {
            auto_remove: true,
            ..config("brief")
        };
        drop(registry.create(brief).expect("entry"));
        assert!(registry.find("brief").is_err());
        assert_eq!(registry.list().expect("list").len(), 1);
        // Both names are free again, once the first is removed.
        assert!(registry.create(config("killed")).is_err());
        registry.remove(&found).expect("remove");
        registry.create(config("killed")).expect("again");
        registry.create(config("brief")).expect("again");
    }

    #[test]
    fn a_machine_gets_another_name() {
        let folder = tempfile::tempdir().expect("folder");
        let registry = registry(folder.path());
        let mut entry = registry.create(config("old")).expect("entry");
        let _other = registry.create(config("other")).expect("other");
        let taken = entry.rename("other");
        assert!(matches!(taken, Err(EngineError::NameTaken { .. })));
        assert!(entry.rename("../old").is_err());
        entry.rename("new").expect("renamed");
        assert!(registry.find("old").is_err());
        let found = registry.find("new").expect("found");
        assert_eq!(found.config, entry.config);
        // Not by another process while it runs.
        let runs = registry.rename(&found, "newer");
        assert!(matches!(runs, Err(EngineError::VmRuns { .. })));
        entry
            .finish(|state| state.status = Status::Stopped)
            .expect("finish");
        registry.rename(&found, "newer").expect("renamed");
        let found = registry.find("newer").expect("found");
        assert_eq!(found.config.name, "newer");
        // The old names are free.
        registry.create(config("old")).expect("old");
        registry.create(config("new")).expect("new");
        registry.remove(&found).expect("removed");
        assert!(registry.find("newer").is_err());
    }

    #[test]
    fn a_running_machine_is_not_removed() {
        let folder = tempfile::tempdir().expect("folder");
        let registry = registry(folder.path());
        let entry = registry.create(config("busy")).expect("entry");
        let found = registry.find("busy").expect("found");
        assert!(matches!(
            registry.remove(&found),
            Err(EngineError::VmRuns { .. })
        ));
        entry
            .finish(|state| {
                state.status = Status::Stopped;
                state.exit_code = Some(3);
            })
            .expect("finish");
        let found = registry.find("busy").expect("found");
        assert_eq!(found.state.exit_code, Some(3));
        assert!(found.state.finished.is_some());
        registry.remove(&found).expect("remove");
        assert!(registry.list().expect("list").is_empty());
        assert_eq!(
            fs::read_dir(folder.path().join("vms/names"))
                .expect("names")
                .count(),
            0
        );
    }

    #[test]
    fn what_was_never_finished_is_swept() {
        let folder = tempfile::tempdir().expect("folder");
        let registry = registry(folder.path());
        let staged = folder.path().join("vms/.new-0123");
        fs::create_dir(&staged).expect("folder");
        File::create(staged.join(LOCK)).expect("lock");
        // As two that removed one machine at once left it.
        let gone = folder.path().join("vms/.new-gone-0123");
        fs::create_dir(&gone).expect("folder");
        assert!(registry.list().expect("list").is_empty());
        assert!(!staged.exists() && !gone.exists());
    }
}
