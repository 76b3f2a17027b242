//! Many virtual machines under one program: a small trait for what can be done with one, and a manager
//! over it that can be tested without any.
//!
//! ```text
//!  Manager<D> ── boots many at a time, waits, ends them ──► D: Driver
//!                                        Vms (the registry: real machines) ──┤
//!                                        mock::Mock (no machines)  ──────────┘
//! ```
//!
//! ```no_run
//! use std::time::Duration;
//! use skerry_engine::driver::{Driver, MachineSpec, Manager, Vms};
//! use skerry_engine::{EngineError, Paths};
//!
//! # fn main() -> Result<(), EngineError> {
//! let driver = Vms::new(Paths::of_user()?, "/usr/bin/skerry");
//! let manager = Manager::new(driver).parallel(4).stop_on_drop(Duration::from_secs(10));
//! let specs: Vec<_> = (0..8).map(|n| MachineSpec::new("demo", ["sleep", "1000"]).name(format!("w{n}"))).collect();
//! for booted in manager.boot_all(&specs) {
//!     println!("{}", manager.driver().state(&booted?)?.name());
//! }
//! # Ok(())
//! # }
//! ```

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::error::EngineError;
use crate::paths::Paths;
use crate::run::RunSpec;
use crate::vms::{self, Begin, Detached, Launch, Registry, Status};

/// A machine to be.
#[derive(Clone, Debug, Default)]
pub struct MachineSpec {
    /// Its image.
    pub image: String,
    /// Its name; empty for any.
    pub name: String,
    /// The machine and its command.
    pub run: RunSpec,
    /// It stays in the registry when it has ended, with its disk, log and exit status.
    pub keep: bool,
}

impl MachineSpec {
    /// A machine of this image with this command; with none, the image's.
    pub fn new<T: Into<String>>(
        image: impl Into<String>,
        command: impl IntoIterator<Item = T>,
    ) -> Self {
        let mut run = RunSpec::default();
        run.command.command = command.into_iter().map(Into::into).collect();
        Self {
            image: image.into(),
            run,
            ..Self::default()
        }
    }

    /// The same under a name.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }
}

/// What can be done with virtual machines, each known by its identity.
pub trait Driver: Send + Sync {
    /// Makes a machine and runs its command; returns when that runs.
    fn boot(&self, spec: &MachineSpec) -> Result<String, EngineError>;
    /// Asks the command to end and, after `grace`, ends the machine; gives the exit status.
    fn stop(&self, id: &str, grace: Duration) -> Result<u8, EngineError>;
    /// Ends the machine at once.
    fn kill(&self, id: &str) -> Result<u8, EngineError>;
    /// How it is.
    fn state(&self, id: &str) -> Result<Status, EngineError>;
    /// Has it stand still.
    fn pause(&self, id: &str) -> Result<(), EngineError>;
    /// Lets it go on.
    fn resume(&self, id: &str) -> Result<(), EngineError>;
    /// Waits until it is ready, by the mark of its spec.
    fn wait_ready(&self, id: &str, limit: Duration) -> Result<(), EngineError>;
    /// Waits for the end of its command; gives the exit status.
    fn wait(&self, id: &str) -> Result<u8, EngineError>;
}

/// The machines of the registry, each a process of its own.
#[derive(Clone, Debug)]
pub struct Vms {
    paths: Paths,
    program: PathBuf,
}

impl Vms {
    /// Machines below `paths`, run by `program`, which is `skerry`.
    #[must_use]
    pub fn new(paths: Paths, program: impl Into<PathBuf>) -> Self {
        Self {
            paths,
            program: program.into(),
        }
    }

    fn registry(&self) -> Result<Registry, EngineError> {
        Registry::open(&self.paths)
    }
}

impl Driver for Vms {
    fn boot(&self, spec: &MachineSpec) -> Result<String, EngineError> {
        let launch = Launch {
            root: self.paths.root().to_owned(),
            begin: Begin::Image(spec.image.clone()),
            spec: spec.run.clone(),
            name: spec.name.clone(),
            auto_remove: !spec.keep,
        };
        let mut note = |text: &str| tracing::info!(machine = spec.name, text);
        match vms::detach(&self.program, &launch, &mut note)? {
            Detached::Runs(id) => Ok(id),
            Detached::NotStarted(failure) => Err(EngineError::Detached(failure.message)),
        }
    }

    fn stop(&self, id: &str, grace: Duration) -> Result<u8, EngineError> {
        vms::stop(&self.registry()?, id, grace)
    }

    fn kill(&self, id: &str) -> Result<u8, EngineError> {
        vms::kill(&self.registry()?, id)
    }

    fn state(&self, id: &str) -> Result<Status, EngineError> {
        Ok(self.registry()?.find(id)?.state.status)
    }

    fn pause(&self, id: &str) -> Result<(), EngineError> {
        vms::pause(&self.registry()?, id)
    }

    fn resume(&self, id: &str) -> Result<(), EngineError> {
        vms::unpause(&self.registry()?, id)
    }

    fn wait_ready(&self, id: &str, limit: Duration) -> Result<(), EngineError> {
        vms::wait_ready(&self.registry()?, id, Some(limit))
    }

    fn wait(&self, id: &str) -> Result<u8, EngineError> {
        vms::wait(&self.registry()?, id)
    }
}

/// Machines that belong together.
#[derive(Debug)]
pub struct Manager<D: Driver> {
    driver: D,
    parallel: usize,
    on_drop: Option<Duration>,
    machines: Mutex<Vec<String>>,
}

impl<D: Driver> Manager<D> {
    /// A manager of no machines yet.
    pub fn new(driver: D) -> Self {
        Self {
            driver,
            parallel: 4,
            on_drop: None,
            machines: Mutex::default(),
        }
    }

    /// So many are booted or ended at a time; 4 unless said.
    #[must_use]
    pub fn parallel(mut self, count: usize) -> Self {
        self.parallel = count.max(1);
        self
    }

    /// All are stopped, with this grace, when the manager goes.
    #[must_use]
    pub fn stop_on_drop(mut self, grace: Duration) -> Self {
        self.on_drop = Some(grace);
        self
    }

    /// What can be done with one of them.
    pub fn driver(&self) -> &D {
        &self.driver
    }

    /// The identities of those that were booted and not ended by the manager.
    pub fn machines(&self) -> Vec<String> {
        self.machines.lock().clone()
    }

    /// Boots one.
    pub fn boot(&self, spec: &MachineSpec) -> Result<String, EngineError> {
        let id = self.driver.boot(spec)?;
        self.machines.lock().push(id.clone());
        Ok(id)
    }

    /// Boots many; the results are in the order of the specs.
    pub fn boot_all(&self, specs: &[MachineSpec]) -> Vec<Result<String, EngineError>> {
        self.each(specs, |spec| self.boot(spec))
    }

    /// Waits until all are ready, each for `limit` at most; gives those that are not, and why.
    pub fn wait_ready(&self, limit: Duration) -> Vec<(String, EngineError)> {
        self.all(|id| self.driver.wait_ready(id, limit))
    }

    /// Stops all; gives those that couldn't be, and why.
    pub fn stop_all(&self, grace: Duration) -> Vec<(String, EngineError)> {
        self.end(|id| self.driver.stop(id, grace).map(drop))
    }

    /// Kills all; gives those that couldn't be, and why.
    pub fn kill_all(&self) -> Vec<(String, EngineError)> {
        self.end(|id| self.driver.kill(id).map(drop))
    }

    fn end(
        &self,
        end: impl Fn(&str) -> Result<(), EngineError> + Sync,
    ) -> Vec<(String, EngineError)> {
        let ended = self.machines();
        let failed = self.all(|id| match end(id) {
            // It has ended by itself.
            Err(EngineError::VmStopped { .. } | EngineError::NoSuchVm { .. }) => Ok(()),
            result => result,
        });
        let kept = |id: &String| !ended.contains(id) || failed.iter().any(|(other, _)| other == id);
        self.machines.lock().retain(kept);
        failed
    }

    fn all(
        &self,
        act: impl Fn(&str) -> Result<(), EngineError> + Sync,
    ) -> Vec<(String, EngineError)> {
        let ids = self.machines();
        let results = self.each(&ids, |id| act(id));
        let failed = ids.into_iter().zip(results);
        failed
            .filter_map(|(id, result)| result.err().map(|error| (id, error)))
            .collect()
    }

    /// Does something for each, some at a time.
    fn each<I: Sync, T: Send>(&self, items: &[I], act: impl Fn(&I) -> T + Sync) -> Vec<T> {
        let next = AtomicUsize::new(0);
        let done = Mutex::new(Vec::with_capacity(items.len()));
        let work = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(item) = items.get(number) else {
                    return;
                };
                let result = act(item);
                done.lock().push((number, result));
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.parallel.min(items.len()) {
                scope.spawn(work);
            }
            work();
        });
        let mut done = done.into_inner();
        done.sort_by_key(|(number, _)| *number);
        done.into_iter().map(|(_, result)| result).collect()
    }
}

impl<D: Driver> Drop for Manager<D> {
    fn drop(&mut self) {
        if let Some(grace) = self.on_drop {
            for (id, error) in self.stop_all(grace) {
                tracing::warn!(%error, id, "a machine is not stopped");
            }
        }
    }
}

/// A driver without machines, for tests of what is built on [`Driver`].
pub mod mock {
    use std::collections::BTreeMap;

    use super::*;

    /// Notes what it is asked for, and keeps states as machines would have them.
    #[derive(Debug, Default)]
    pub struct Mock {
        machines: Mutex<BTreeMap<String, Status>>,
        calls: Mutex<Vec<String>>,
        /// Boots of machines with these names fail.
        pub refuse: Vec<String>,
        /// How long a boot takes.
        pub boot_time: Duration,
        busy: AtomicUsize,
        busiest: AtomicUsize,
    }

    impl Mock {
        /// The calls so far: the verb, and the name or identity.
        pub fn calls(&self) -> Vec<String> {
            self.calls.lock().clone()
        }

        /// The most boots that went on at a time.
        pub fn busiest(&self) -> usize {
            self.busiest.load(Ordering::SeqCst)
        }

        fn call(&self, verb: &str, id: &str) {
            self.calls.lock().push(format!("{verb} {id}"));
        }

        /// Goes from one of the states to another.
        fn go(&self, verb: &str, id: &str, from: &[Status], to: Status) -> Result<(), EngineError> {
            self.call(verb, id);
            let mut machines = self.machines.lock();
            let name = id.to_owned();
            match machines.get_mut(id) {
                None => Err(EngineError::NoSuchVm { name }),
                Some(status) if from.contains(status) => {
                    *status = to;
                    Ok(())
                }
                Some(Status::Paused) => Err(EngineError::VmPaused { name }),
                Some(status) if status.is_alive() => Err(EngineError::VmNotPaused { name }),
                Some(_) => Err(EngineError::VmStopped { name }),
            }
        }
    }

    impl Driver for Mock {
        fn boot(&self, spec: &MachineSpec) -> Result<String, EngineError> {
            self.call("boot", &spec.name);
            let busy = self.busy.fetch_add(1, Ordering::SeqCst) + 1;
            self.busiest.fetch_max(busy, Ordering::SeqCst);
            std::thread::sleep(self.boot_time);
            self.busy.fetch_sub(1, Ordering::SeqCst);
            if self.refuse.contains(&spec.name) {
                return Err(EngineError::Detached(format!("{} is refused", spec.name)));
            }
            let mut machines = self.machines.lock();
            let id = format!("{:032x}", machines.len() + 1);
            machines.insert(id.clone(), Status::Running);
            Ok(id)
        }

        fn stop(&self, id: &str, _grace: Duration) -> Result<u8, EngineError> {
            let alive = [Status::Running, Status::Ready, Status::Paused];
            self.go("stop", id, &alive, Status::Stopped).map(|()| 143)
        }

        fn kill(&self, id: &str) -> Result<u8, EngineError> {
            let alive = [Status::Running, Status::Ready, Status::Paused];
            self.go("kill", id, &alive, Status::Stopped)
                .map(|()| vms::KILLED)
        }

        fn state(&self, id: &str) -> Result<Status, EngineError> {
            let name = id.to_owned();
            let machines = self.machines.lock();
            machines
                .get(id)
                .copied()
                .ok_or(EngineError::NoSuchVm { name })
        }

        fn pause(&self, id: &str) -> Result<(), EngineError> {
            let from = [Status::Running, Status::Ready];
            self.go("pause", id, &from, Status::Paused)
        }

        fn resume(&self, id: &str) -> Result<(), EngineError> {
            self.go("resume", id, &[Status::Paused], Status::Running)
        }

        fn wait_ready(&self, id: &str, _limit: Duration) -> Result<(), EngineError> {
            let from = [Status::Running, Status::Ready];
            self.go("wait_ready", id, &from, Status::Ready)
        }

        fn wait(&self, id: &str) -> Result<u8, EngineError> {
            self.call("wait", id);
            match self.state(id)? {
                Status::Stopped => Ok(143),
                // A mock's command never ends by itself.
                _ => Err(EngineError::Unready {
                    name: id.to_owned(),
                }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::mock::Mock;
    use super::*;

    fn specs(count: usize) -> Vec<MachineSpec> {
        let names = (0..count).map(|n| format!("m{n}"));
        names
            .map(|name| MachineSpec::new("demo", ["true"]).name(name))
            .collect()
    }

    #[test]
    fn as_many_are_booted_at_a_time_as_was_said() {
        let mut mock = Mock::default();
        mock.boot_time = Duration::from_millis(20);
        mock.refuse = vec!["m3".to_owned()];
        let manager = Manager::new(mock).parallel(3);
        let booted = manager.boot_all(&specs(9));
        assert_eq!(manager.driver().busiest(), 3);
        let failed: Vec<bool> = booted.iter().map(Result::is_err).collect();
        assert_eq!(failed.iter().position(|failed| *failed), Some(3));
        assert_eq!(manager.machines().len(), 8);
        assert!(manager.wait_ready(Duration::ZERO).is_empty());
        let id = &manager.machines()[0];
        assert_eq!(manager.driver().state(id).expect("there"), Status::Ready);
    }

    #[test]
    fn what_has_ended_by_itself_is_no_failure() {
        let manager = Manager::new(Mock::default());
        manager.boot_all(&specs(3));
        let first = manager.machines()[0].clone();
        manager.driver().kill(&first).expect("killed");
        assert!(manager.stop_all(Duration::ZERO).is_empty());
        assert!(manager.machines().is_empty());
        assert!(manager.driver().pause(&first).is_err());
    }

    #[test]
    fn a_manager_that_goes_stops_its_machines_if_that_was_said() {
        /// A driver of which something is left to look at.
        struct Shared(std::sync::Arc<Mock>);
        impl Driver for Shared {
            fn boot(&self, spec: &MachineSpec) -> Result<String, EngineError> {
                self.0.boot(spec)
            }
            fn stop(&self, id: &str, grace: Duration) -> Result<u8, EngineError> {
                self.0.stop(id, grace)
            }
            fn kill(&self, id: &str) -> Result<u8, EngineError> {
                self.0.kill(id)
            }
            fn state(&self, id: &str) -> Result<Status, EngineError> {
                self.0.state(id)
            }
            fn pause(&self, id: &str) -> Result<(), EngineError> {
                self.0.pause(id)
            }
            fn resume(&self, id: &str) -> Result<(), EngineError> {
                self.0.resume(id)
            }
            fn wait_ready(&self, id: &str, limit: Duration) -> Result<(), EngineError> {
                self.0.wait_ready(id, limit)
            }
            fn wait(&self, id: &str) -> Result<u8, EngineError> {
                self.0.wait(id)
            }
        }
        for stops in [false, true] {
            let mock = std::sync::Arc::new(Mock::default());
            let mut manager = Manager::new(Shared(mock.clone()));
            if stops {
                manager = manager.stop_on_drop(Duration::ZERO);
            }
            manager.boot_all(&specs(2));
            drop(manager);
            let stopped = mock
                .calls()
                .iter()
                .filter(|call| call.starts_with("stop"))
                .count();
            assert_eq!(stopped, if stops { 2 } else { 0 });
        }
    }
}
