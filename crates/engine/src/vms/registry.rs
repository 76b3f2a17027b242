//! Which virtual machines there are: a folder for each, and nobody who keeps a list.
//!
//! ```text
//!  vms/<id>/lock      held by the machine's process as long as it lives: the one sign of life
//!           config    what it is (JSON, replaced by rename when the machine gets another name)
//!           state     how it is (JSON, replaced by rename)
//!           control   socket of its process          log   its command's output, line by line
//!           launch    all that it takes to start it again; disk-0, …  what it has written
//!  vms/names/<name> ─► ../<id>
//! ```
//! A machine whose process was killed holds no lock: whatever its state says, it is not running, and
//! process ids are never trusted for that. A folder appears whole, by a rename, with its lock held.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;

use super::info::{KILLED, Status, VmConfig, VmInfo, VmState};
use super::launch::Launch;
use super::names;
use super::places::{self, read_json, write_json};
use crate::EngineError;
use crate::events;
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
const LAUNCH: &str = "launch";
/// What a process says of its violent end.
const LAST_WORDS: &str = "last-words";
/// Takes room for the state that a machine ends with.
const RESERVE: &str = "reserve";
const RESERVED: usize = 16 << 10;
/// The longest that they may be.
const LONGEST_WORDS: u64 = 1024;

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
    /// How it was before, if it was.
    before: Option<VmState>,
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

/// A new identity: 32 hexadecimal digits.
pub fn new_id() -> Result<String, EngineError> {
    let bytes: [u8; 16] = random()?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Waits for the right to change the state of a machine whose process has gone.
fn turn(folder: &Path) -> io::Result<File> {
    let folder = File::open(folder)?;
    rustix::fs::flock(&folder, FlockOperation::LockExclusive)?;
    Ok(folder)
}

/// Replaces the state in a folder.
fn write_state(folder: &Path, state: &VmState) -> io::Result<()> {
    let staged = folder.join("state.new");
    let write =
        || write_json(&staged, state).and_then(|()| fs::rename(&staged, folder.join(STATE)));
    match write() {
        // What is kept for this makes room.
        Err(error) if places::is_full(&error) => {
            fs::remove_file(folder.join(RESERVE))?;
            write()
        }
        result => result,
    }
}

/// Takes room on the host's disk for the last state of a machine in `folder`: its guest may have written until
/// there was no more.
fn reserve(folder: &Path) -> io::Result<()> {
    fs::write(folder.join(RESERVE), [0; RESERVED])
}

fn is_id(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether some process holds the lock in `folder`.
fn is_held(folder: &Path) -> bool {
    places::is_held(&folder.join(LOCK))
}

/// Whether `file` is what is at `path` still.
fn is_same(path: &Path, file: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    let inode = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (fs::metadata(path).map(inode), file.metadata().map(inode)) {
        (Ok(there), Ok(held)) => there == held,
        _ => false,
    }
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

    /// Notes what has happened to a machine.
    pub(crate) fn note(&self, config: &VmConfig, action: &str, more: &[(&str, String)]) {
        if let Some(root) = self.root.parent() {
            events::machine(&Paths::at(root), config, action, more);
        }
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

    /// Makes a place for a machine that this process is about to run; with `launch`, one that can be
    /// [begun](Self::begin) again. `config`'s identity is given here, and its name where it has none.
    pub fn create(&self, config: VmConfig, launch: Option<&Launch>) -> Result<Entry, EngineError> {
        let state = VmState::new(Status::Starting, std::process::id());
        self.place(config, state, launch)
    }

    /// Makes a place for a machine that is to be [begun](Self::begin) later; gives its identity.
    pub fn prepare(&self, config: VmConfig, launch: &Launch) -> Result<VmConfig, EngineError> {
        let state = VmState::new(Status::Created, 0);
        Ok(self.place(config, state, Some(launch))?.config)
    }

    fn place(
        &self,
        mut config: VmConfig,
        state: VmState,
        launch: Option<&Launch>,
    ) -> Result<Entry, EngineError> {
        if !config.name.is_empty() {
            names::check(&config.name)?;
        }
        config.id = new_id()?;
        config.created = now();
        let staged = self.root.join(format!("{NEW}{}", config.id));
        let lock = self
            .stage(&staged, &state)
            .and_then(|lock| {
                launch.map_or(Ok(()), |launch| write_json(&staged.join(LAUNCH), launch))?;
                if !config.auto_remove {
                    reserve(&staged)?;
                }
                Ok(lock)
            })
            .map_err(self.failed("make a place for a virtual machine"))?;
        let result = self.publish(&staged, &mut config);
        if let Err(error) = result {
            // What is left of it is removed with the next listing at the latest.
            let _ = fs::remove_dir_all(&staged);
            return Err(error);
        }
        self.note(&config, "create", &[]);
        Ok(Entry {
            registry: self.clone(),
            config,
            state,
            before: None,
            _lock: lock,
        })
    }

    /// Takes the place of a machine that doesn't run, for this process to run it.
    pub fn begin(&self, id: &str) -> Result<Entry, EngineError> {
        let gone = || EngineError::NoSuchVm {
            name: id.to_owned(),
        };
        let folder = self.folder(id);
        let _turn = turn(&folder).map_err(|_| gone())?;
        let lock = self.hold(&folder, id)?;
        let config: VmConfig = read_json(&folder.join(CONFIG)).map_err(|_| gone())?;
        let state: VmState = read_json(&folder.join(STATE)).map_err(|_| gone())?;
        let info = VmInfo { config, state };
        let mut entry = Entry {
            registry: self.clone(),
            config: info.config,
            state: info.state.clone(),
            before: Some(info.state),
            _lock: lock,
        };
        // Left by a process that was killed.
        let _ = fs::remove_file(entry.control());
        reserve(&folder).map_err(self.failed("make room for the state of a virtual machine"))?;
        entry.update(|state| *state = VmState::new(Status::Starting, std::process::id()))?;
        Ok(entry)
    }

    /// Takes the lock of a machine that doesn't run.
    fn hold(&self, folder: &Path, name: &str) -> Result<File, EngineError> {
        let name = name.to_owned();
        let path = folder.join(LOCK);
        let Ok(lock) = File::options().read(true).write(true).open(&path) else {
            return Err(EngineError::NoSuchVm { name });
        };
        if !places::hold(&lock) {
            return Err(EngineError::VmRuns { name });
        }
        // Whoever removes a machine takes its folder away as a whole: it may be gone by now.
        match is_same(&path, &lock) {
            true => Ok(lock),
            false => Err(EngineError::NoSuchVm { name }),
        }
    }

    /// All that it takes to start a machine; `None` of one that can't be started again.
    pub(crate) fn launch(&self, id: &str) -> Result<Option<Launch>, EngineError> {
        match read_json(&self.folder(id).join(LAUNCH)) {
            Ok(launch) => Ok(Some(launch)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed("read how a virtual machine is started")(error)),
        }
    }

    fn stage(&self, staged: &Path, state: &VmState) -> io::Result<File> {
        let lock = loop {
            fs::DirBuilder::new().mode(0o700).create(staged)?;
            let path = staged.join(LOCK);
            let lock = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
            // Whoever lists the machines takes a folder whose lock is free for a dead process's, and
            // may have found this one so: then it is about to be gone, or is.
            if is_same(&path, &lock) {
                break lock;
            }
            clear(staged);
        };
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

    /// Machines that are here and whose description can't be read, and why: no list has them.
    pub(crate) fn unreadable(&self) -> Result<Vec<(String, String)>, EngineError> {
        let folders = fs::read_dir(&self.root).map_err(self.failed("list the virtual machines"))?;
        let mut found = Vec::new();
        for folder in folders.flatten() {
            let name = folder.file_name().to_string_lossy().into_owned();
            if !is_id(&name) {
                continue;
            }
            let config = read_json::<VmConfig>(&folder.path().join(CONFIG)).map(drop);
            let read = config.and_then(|()| read_json::<VmState>(&folder.path().join(STATE)));
            if let Err(error) = read
                // Else it was removed meanwhile.
                && folder.path().exists()
            {
                found.push((name, format!("its description can't be read: {error}")));
            }
        }
        Ok(found)
    }

    /// Removes a folder that never became a machine's.
    fn sweep(&self, staged: &Path) {
        let Ok(lock) = File::open(staged.join(LOCK)) else {
            return;
        };
        let path = staged.join(LOCK);
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
            && is_same(&path, &lock)
        {
            // The lock first, while it is held: whoever was about to take it makes the folder anew.
            let _ = fs::remove_file(path);
            let _ = fs::remove_dir_all(staged);
        }
    }

    /// A machine by its identity; `None` if there is none (any more).
    fn read(&self, id: &str) -> Option<VmInfo> {
        let folder = self.folder(id);
        // Before the state: a machine that ends in between has written its last state by then.
        let alive = is_held(&folder);
        let config: VmConfig = read_json(&folder.join(CONFIG)).ok()?;
        let info = self.judged(config, alive)?;
        if info.state.status == Status::Failed && !alive {
            self.bury(&info);
        }
        Some(info)
    }

    /// Writes down that a machine's process was killed, and tells it, once: whoever finds it so first.
    /// Without the machine's lock, which would make it look alive.
    fn bury(&self, info: &VmInfo) {
        let folder = self.folder(&info.config.id);
        let unburied = || {
            let state = read_json(&folder.join(STATE));
            !is_held(&folder) && state.is_ok_and(|state: VmState| state.status.is_alive())
        };
        if !unburied() {
            return;
        }
        let Ok(_turn) = turn(&folder) else {
            return;
        };
        if unburied() && write_state(&folder, &info.state).is_ok() {
            let code = ("exit_code", KILLED.to_string());
            self.note(&info.config, "die", &[code]);
        }
    }

    /// How a machine is whose lock is held or not.
    fn judged(&self, config: VmConfig, alive: bool) -> Option<VmInfo> {
        let folder = self.folder(&config.id);
        let mut state: VmState = read_json(&folder.join(STATE)).ok()?;
        // A process may have begun it since; it took the lock before it wrote.
        let alive = alive || state.status.is_alive() && is_held(&folder);
        if !alive && state.status.is_alive() {
            if config.auto_remove {
                self.forget(&config);
                return None;
            }
            state.status = Status::Failed;
            state.exit_code = Some(KILLED);
            state.error = Some(match last_words(&folder) {
                Some(line) => format!("its process was ended: {line}"),
                None => "its process was killed".to_owned(),
            });
            state.finished = Some(now());
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
        // Held until it is out of sight, so that nobody begins it meanwhile.
        let _lock = match self.hold(&self.folder(&info.config.id), &info.config.name) {
            Ok(lock) => lock,
            // Another was faster, or it has gone by itself.
            Err(EngineError::NoSuchVm { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        self.forget(&info.config);
        Ok(())
    }

    fn forget(&self, config: &VmConfig) {
        // First out of sight, so that no half of it is ever found.
        let gone = self.root.join(format!("{GONE}{}", config.id));
        if fs::rename(self.folder(&config.id), &gone).is_ok() {
            self.release_name(config);
            self.note(config, "destroy", &[]);
            clear(&gone);
        }
    }

    /// Gives a machine that has ended another name.
    pub fn rename(&self, info: &VmInfo, name: &str) -> Result<(), EngineError> {
        let _lock = self.hold(&self.folder(&info.config.id), &info.config.name)?;
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
        self.note(config, "rename", &[("old_name", old.name)]);
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

/// The line that a process left which broke its confinement.
fn last_words(folder: &Path) -> Option<String> {
    let mut text = String::new();
    let file = File::open(folder.join(LAST_WORDS)).ok()?;
    file.take(LONGEST_WORDS).read_to_string(&mut text).ok()?;
    let line = text.lines().next()?;
    Some(line.strip_prefix("skerry: ").unwrap_or(line).to_owned())
}

impl Entry {
    /// How the machine is.
    #[must_use]
    pub fn state(&self) -> &VmState {
        &self.state
    }

    /// The socket to listen at.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.registry.control(&self.config.id)
    }

    /// A file for what the process says of its own violent end, empty.
    pub(crate) fn last_words(&self) -> Result<OwnedFd, EngineError> {
        let made = fs::File::create(self.folder().join(LAST_WORDS));
        Ok(made
            .map_err(EngineError::host("make a file for last words"))?
            .into())
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
        write_state(&folder, &self.state)
            .map_err(self.registry.failed("note the state of a virtual machine"))
    }

    /// Gives the machine another name.
    pub fn rename(&mut self, name: &str) -> Result<(), EngineError> {
        let registry = self.registry.clone();
        registry.give_name(&mut self.config, name)
    }

    /// All that it has of its own, its writable disk too.
    pub(crate) fn folder(&self) -> PathBuf {
        self.registry.folder(&self.config.id)
    }

    /// Notes what has happened to the machine.
    pub(crate) fn note(&self, action: &str, more: &[(&str, String)]) {
        self.registry.note(&self.config, action, more);
    }

    /// The end of what never became a machine; one that was there before is as it was, and says why it
    /// can't be started.
    pub fn discard(mut self, why: &EngineError) {
        let _ = fs::remove_file(self.control());
        let Some(before) = self.before.take() else {
            return self.registry.forget(&self.config);
        };
        let why = why.to_string();
        // Where it can't be written, what is written says the same: it starts, and its lock is free.
        let _ = self.update(|state| {
            *state = VmState {
                error: Some(why),
                ..before
            }
        });
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
mod tests;
