//! `skerry snapshot`: the kept start of an image is listed, carried to another store and removed.

mod common;

use std::path::{Path, PathBuf};

use common::{Ran, demo_command, run_with, skerry};
use serde_json::Value;

/// A data folder of its own, removed at the end.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `skerry snapshot` with this folder.
    fn snapshot(&self, args: &[&str]) -> Ran {
        let args: Vec<_> = ["snapshot"].iter().chain(args).copied().collect();
        let mut command = skerry(&args);
        command.env("XDG_DATA_HOME", self.0.path());
        run_with(command, b"")
    }

    /// One that succeeds.
    #[track_caller]
    fn done(&self, args: &[&str]) -> Ran {
        let ran = self.snapshot(args);
        assert_eq!(ran.status, 0, "{args:?}: {}", ran.stderr);
        ran
    }

    /// One that fails with a sentence that names this, and prints nothing else.
    #[track_caller]
    fn refused(&self, args: &[&str], names: &str) -> Ran {
        let ran = self.snapshot(args);
        assert_eq!(ran.status, 125, "{args:?}: {}", ran.stderr);
        assert!(ran.stdout.is_empty(), "{args:?}");
        assert!(ran.stderr.contains(names), "{args:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("panicked"), "{args:?}: {}", ran.stderr);
        ran
    }

    #[track_caller]
    fn list(&self) -> Vec<Value> {
        let ran = self.done(&["ls", "--format", "json"]);
        serde_json::from_slice(&ran.stdout).expect("JSON")
    }

    /// Runs a command in the demo image, which keeps its start.
    #[track_caller]
    fn run_demo(&self) {
        let mut command = demo_command(&[], &["true"]);
        command.env("XDG_DATA_HOME", self.0.path());
        run_with(command, b"").expect(0, "");
    }

    /// The snapshots and whatever else is visible in the store's folder or hidden there.
    fn folders(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path("skerry/snapshots")).expect("store");
        let paths = entries.map(|entry| entry.expect("entry").path());
        paths.filter(|path| path.is_dir()).collect()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn from_one_store_to_another() {
    let (home, other) = (Home::new(), Home::new());
    home.done(&["ls"])
        .expect(0, "ID            NAME  MEMORY  SIZE  CREATED\n");
    home.run_demo();

    let list = home.list();
    let [entry] = &list[..] else {
        panic!("not one snapshot: {list:?}");
    };
    let id = entry["id"].as_str().expect("ID");
    let start = entry["names"][0].as_str().expect("name");
    assert!(start.starts_with("start-"), "{start}");
    assert_eq!(entry["memory"], 512 << 20);
    let size = entry["size"].as_u64().expect("size");
    assert!((1 << 20..512 << 20).contains(&size), "{size}");
    home.done(&["ls", "-q"]).expect(0, &format!("{id}\n"));
    let digits = &id["sha256:".len()..][..12];
    let table = home.done(&["ls", "--format", "table"]).text();
    let row: Vec<_> = table.lines().nth(1).expect("a row").split("  ").collect();
    assert_eq!((row[0], row[2]), (digits, "512.0 MiB"), "{table}");

    let inspected = home.done(&["inspect", digits]).stdout;
    let details: Value = serde_json::from_slice(&inspected).expect("JSON");
    for key in ["id", "names", "created", "parent", "memory", "size"] {
        assert_eq!(details[key], entry[key], "{key}");
    }
    assert_eq!(details["config"]["backend"], "soft");
    let stored = details["memory_stored"].as_u64().expect("pages");
    assert!(0 < stored && stored < size, "{stored} of {size}");

    let (archive, folder) = (home.path("start.tar"), home.path("start"));
    home.done(&["export", start, text(&archive)]).expect(0, "");
    home.done(&["export", id, text(&folder)]).expect(0, "");
    home.refused(&["export", id, text(&folder)], "exists already");
    for source in [&archive, &folder] {
        other
            .done(&["import", text(source), "--name", "mine"])
            .expect(0, &format!("{id}\n"));
        let details: Value =
            serde_json::from_slice(&other.done(&["inspect", "mine"]).stdout).expect("JSON");
        assert_eq!(details["names"], serde_json::json!(["mine"]));
        other.done(&["rm", "mine"]).expect(0, &format!("{id}\n"));
        assert!(other.list().is_empty());
    }

    damaged_archives_leave_nothing(&archive);
    pruning(&home, id, &archive);
}

/// One byte changed, an end that lacks, and what is no archive at all.
fn damaged_archives_leave_nothing(archive: &Path) {
    let home = Home::new();
    let good = std::fs::read(archive).expect("archive");
    let mut changed = good.clone();
    changed[good.len() / 2] ^= 1;
    let cases = [
        ("changed.tar", &changed[..]),
        ("cut.tar", &good[..good.len() / 2]),
        ("text.tar", b"not an archive"),
        ("empty.tar", b""),
        ("hostile.tar", &[b'\x1b'; 1024]),
    ];
    for (name, bytes) in cases {
        let path = home.path(name);
        std::fs::write(&path, bytes).expect("archive");
        let ran = home.refused(&["import", text(&path), "--name", "mine"], name);
        assert!(!ran.stderr.contains('\x1b'), "{name}: {:?}", ran.stderr);
        assert!(home.list().is_empty(), "{name}");
        assert!(home.folders().is_empty(), "{name}: {:?}", home.folders());
    }
}

/// The kept start goes unless it has a name of the user's; then the next run keeps it again.
fn pruning(home: &Home, id: &str, archive: &Path) {
    home.done(&["import", text(archive), "--name", "mine"]);
    home.done(&["prune"]).expect(0, "");
    home.done(&["rm", "mine"]).expect(0, "mine\n");
    // As a killed process leaves it.
    std::fs::create_dir(home.path("skerry/snapshots/.new-1-0")).expect("leftover");
    let ran = home.done(&["prune"]);
    assert_eq!(ran.text(), format!("{id}\n"));
    assert!(ran.stderr.contains("1 kept start"), "{}", ran.stderr);
    assert!(ran.stderr.contains("1 leftover "), "{}", ran.stderr);
    assert!(home.folders().is_empty(), "{:?}", home.folders());
    home.run_demo();
    assert_eq!(home.list().len(), 1);
}

#[test]
fn failures_name_the_thing() {
    let home = Home::new();
    for verb in ["inspect", "rm"] {
        home.refused(&[verb, "no-such-snapshot"], "no-such-snapshot");
    }
    home.refused(
        &["export", "no-such-snapshot", text(&home.path("a"))],
        "no-such-snapshot",
    );
    assert!(!home.path("a").exists());
    home.refused(&["export", "any", "-"], "pipe");
    home.refused(&["import", "-"], "pipe");
    home.refused(&["import", "/nonexistent.tar"], "/nonexistent.tar");
    home.refused(&["import", "/dev/null"], "/dev/null");
    let empty = home.path("empty");
    std::fs::create_dir(&empty).expect("folder");
    home.refused(&["import", text(&empty)], text(&empty));
    home.refused(&["import", text(&empty), "--name", "a b"], "a b");
    home.refused(&["import", text(&empty), "--name", "start-x"], "start-x");
    home.refused(&["rm"], "NAME");
    home.refused(&["ls", "--format", "yaml"], "yaml");
    assert!(home.list().is_empty());
}

#[test]
fn a_damaged_snapshot_is_a_note() {
    let home = Home::new();
    home.done(&["ls"]);
    let hex = "ab".repeat(32);
    std::fs::create_dir(home.path("skerry/snapshots").join(&hex)).expect("folder");
    let ran = home.done(&["ls", "--format", "json"]);
    ran.expect(0, "[]\n");
    assert!(ran.stderr.contains(&hex), "{}", ran.stderr);
    home.refused(&["inspect", "abab"], &hex);
    home.done(&["rm", "abab"])
        .expect(0, &format!("sha256:{hex}\n"));
    assert_eq!(home.done(&["ls"]).stderr, "");
}
