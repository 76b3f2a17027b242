use super::*;
use crate::command::Surroundings;

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
        digest: None,
        labels: Default::default(),
        restart: Default::default(),
        ports: Vec::new(),
        nano_cpus: None,
        pids_limit: None,
        disk_size: None,
    }
}

#[test]
fn a_machine_is_found_by_name_and_by_digits() {
    let folder = tempfile::tempdir().expect("folder");
    let registry = registry(folder.path());
    let mut one = registry.create(config("one"), None).expect("one");
    let two = registry.create(config(""), None).expect("two");
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
        registry.create(config("one"), None),
        Err(EngineError::NameTaken { .. })
    ));
    assert!(registry.create(config("../one"), None).is_err());
    assert_eq!(registry.list().expect("list").len(), 2);
}

#[test]
fn a_killed_machine_is_never_running() {
    let folder = tempfile::tempdir().expect("folder");
    let registry = registry(folder.path());
    let mut entry = registry.create(config("killed"), None).expect("entry");
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
    drop(registry.create(brief, None).expect("entry"));
    assert!(registry.find("brief").is_err());
    assert_eq!(registry.list().expect("list").len(), 1);
    // Both names are free again, once the first is removed.
    assert!(registry.create(config("killed"), None).is_err());
    registry.remove(&found).expect("remove");
    registry.create(config("killed"), None).expect("again");
    registry.create(config("brief"), None).expect("again");
}

#[test]
fn a_process_that_broke_its_confinement_left_its_line() {
    let folder = tempfile::tempdir().expect("folder");
    let registry = registry(folder.path());
    let mut entry = registry.create(config("bad"), None).expect("entry");
    entry
        .update(|state| state.status = Status::Running)
        .expect("update");
    let mut words = File::from(entry.last_words().expect("a file"));
    let line =
        "skerry: a thread of the role vcpu made the system call 59, which its filter forbids";
    std::io::Write::write_all(&mut words, format!("{line}\n").as_bytes()).expect("write");
    drop(entry);
    let error = registry.find("bad").expect("found").state.error;
    let error = error.expect("a reason");
    assert!(
        error.contains("the role vcpu made the system call 59"),
        "{error}"
    );
    // Whatever is in the file, there is an answer.
    std::fs::write(
        registry
            .folder(&registry.find("bad").expect("found").config.id)
            .join(LAST_WORDS),
        [0xff; 9000],
    )
    .expect("write");
    assert!(registry.find("bad").is_ok());
}

/// The last state is written where nothing else can be.
#[test]
fn room_is_kept_for_the_last_state() {
    let folder = tempfile::tempdir().expect("folder");
    let registry = registry(folder.path());
    let entry = registry.create(config("one"), None).expect("entry");
    let reserve = entry.folder().join(RESERVE);
    assert_eq!(
        std::fs::metadata(&reserve).expect("room").len(),
        RESERVED as u64
    );
    let brief = VmConfig {
        auto_remove: true,
        ..config("brief")
    };
    let brief = registry.create(brief, None).expect("entry");
    assert!(!brief.folder().join(RESERVE).exists());
}

#[test]
fn a_machine_gets_another_name() {
    let folder = tempfile::tempdir().expect("folder");
    let registry = registry(folder.path());
    let mut entry = registry.create(config("old"), None).expect("entry");
    let _other = registry.create(config("other"), None).expect("other");
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
    registry.create(config("old"), None).expect("old");
    registry.create(config("new"), None).expect("new");
    registry.remove(&found).expect("removed");
    assert!(registry.find("newer").is_err());
}

#[test]
fn a_running_machine_is_not_removed() {
    let folder = tempfile::tempdir().expect("folder");
    let registry = registry(folder.path());
    let entry = registry.create(config("busy"), None).expect("entry");
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

/// A folder between its making and the lock in it looks like a dead process's to whoever lists.
#[test]
fn lists_take_no_folder_away_that_is_being_made() {
    const MAKERS: usize = 3;
    const EACH: usize = 150;
    let folder = tempfile::tempdir().expect("folder");
    let registry = registry(folder.path());
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let makers: Vec<_> = (0..MAKERS)
            .map(|maker| {
                let registry = &registry;
                scope.spawn(move || {
                    for turn in 0..EACH {
                        let name = format!("m{maker}-{turn}");
                        let entry = registry.create(config(&name), None).expect("a place");
                        assert_eq!(entry.config.name, name);
                    }
                })
            })
            .collect();
        let lister = scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                registry.list().expect("a list");
            }
        });
        for maker in makers {
            maker.join().expect("a maker");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        lister.join().expect("the lister");
    });
    assert_eq!(registry.list().expect("a list").len(), MAKERS * EACH);
}
