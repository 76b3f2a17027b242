//! A data folder of its own for a test, and the virtual machines in it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

use super::{Ran, run_with, skerry};

/// A data folder with the demo image and its kept start in it, made once for all tests of a file.
fn seed() -> &'static Path {
    static SEED: OnceLock<PathBuf> = OnceLock::new();
    SEED.get_or_init(|| {
        let file = std::env::current_exe().expect("the test's own path");
        let name = file.file_stem().expect("a name").to_owned();
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join("seed")
            .join(name);
        if folder.exists() {
            std::fs::remove_dir_all(&folder).expect("an older seed goes");
        }
        std::fs::create_dir_all(&folder).expect("a seed");
        let mut command = super::demo_command(&[], &["true"]);
        command.env("XDG_DATA_HOME", &folder);
        run_with(command, b"").expect(0, "");
        // And the start of those whose disk is kept.
        let run = |args: &[&str]| {
            let mut command = skerry(args);
            command.env("XDG_DATA_HOME", &folder);
            run_with(command, b"")
        };
        assert_eq!(
            run(&["run", "-d", "--name", "seed", "demo", "true"]).status,
            0
        );
        run(&["wait", "seed"]).expect(0, "0\n");
        run(&["rm", "seed"]).expect(0, "seed\n");
        folder
    })
}

/// A data folder of its own; its machines end with it.
pub struct Home(tempfile::TempDir);

impl Home {
    /// With the demo image and its kept start in it.
    pub fn new() -> Self {
        Self::seeded(Self::empty())
    }

    /// The same, in a folder: that of a small file system, for example.
    pub fn new_in(folder: &Path) -> Self {
        Self::seeded(Self(tempfile::tempdir_in(folder).expect("folder")))
    }

    fn seeded(home: Self) -> Self {
        let seed = seed().join("skerry");
        let mut copying = Command::new("cp");
        copying.arg("-a").arg(seed).arg(home.0.path());
        let copied = copying.status().is_ok_and(|status| status.success());
        assert!(copied, "the seed can't be copied");
        home
    }

    /// With nothing in it.
    pub fn empty() -> Self {
        Self(tempfile::tempdir().expect("folder"))
    }

    /// A place in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `skerry` with this folder, not yet started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = skerry(args);
        command.env("XDG_DATA_HOME", self.0.path());
        command
    }

    /// `skerry` with this folder.
    pub fn run(&self, args: &[&str]) -> Ran {
        run_with(self.command(args), b"")
    }

    /// One that succeeds; gives what it printed, without the last line's end.
    #[track_caller]
    pub fn done(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.status, 0, "{args:?}: {}", ran.stderr);
        ran.text().trim_end_matches('\n').to_owned()
    }

    /// One that fails: status 125, nothing printed, one line of error that has all of `names`.
    #[track_caller]
    pub fn refused(&self, args: &[&str], names: &[&str]) -> Ran {
        let ran = self.run(args);
        assert_eq!(ran.status, 125, "{args:?}: {}", ran.stderr);
        assert_eq!(ran.text(), "", "{args:?}");
        assert_eq!(ran.stderr.lines().count(), 1, "{args:?}: {}", ran.stderr);
        for name in names {
            assert!(ran.stderr.contains(name), "{args:?}: {}", ran.stderr);
        }
        ran
    }

    /// The same, not run yet, with streams to pipes.
    pub fn spawn(&self, args: &[&str]) -> Child {
        self.command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("skerry starts")
    }

    /// Builds the program `tests/guests/NAME.rs`; gives what `-v` takes to have it in `/programs`.
    pub fn guest_program(&self, name: &str) -> String {
        let folder = self.path("programs");
        std::fs::create_dir_all(&folder).expect("a folder");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/guests");
        let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let status = Command::new(compiler)
            .args(["-O", "--edition", "2024", "-C", "relocation-model=static"])
            .args(["-C", "target-feature=+crt-static", "-o"])
            .arg(folder.join(name))
            .arg(source.join(name).with_extension("rs"))
            .status();
        assert!(status.is_ok_and(|status| status.success()), "{name}.rs");
        format!("{}:/programs:ro", folder.display())
    }

    /// Runs a shell script in a machine in the background.
    #[track_caller]
    pub fn start(&self, name: &str, script: &str) -> String {
        self.start_with(name, &[], &["sh", "-c", script])
    }

    /// Runs a command in a machine in the background.
    #[track_caller]
    pub fn start_with(&self, name: &str, options: &[&str], command: &[&str]) -> String {
        let mut args = vec!["run", "-d", "--hypervisor", "soft", "--name", name];
        args.extend(options);
        args.push("demo");
        args.extend(command);
        self.done(&args)
    }

    /// Lets a machine go on from a snapshot in the background.
    #[track_caller]
    pub fn restore(&self, snapshot: &str, name: &str) -> String {
        let soft = ["--hypervisor", "soft"];
        self.done(&[&["restore", "-d", "--name", name], &soft[..], &[snapshot]].concat())
    }

    /// Runs a command in a machine.
    pub fn exec(&self, vm: &str, command: &[&str]) -> Ran {
        self.run(&[&["exec", vm], command].concat())
    }

    /// Runs a script that succeeds in a machine; gives what it printed, without the last line's end.
    #[track_caller]
    pub fn sh(&self, vm: &str, script: &str) -> String {
        self.done(&["exec", vm, "sh", "-c", script])
    }

    /// A number that a script prints.
    #[track_caller]
    pub fn number(&self, vm: &str, script: &str) -> u64 {
        let text = self.sh(vm, script);
        let number = text.trim().parse();
        number.unwrap_or_else(|_| panic!("{script}: {text:?} is no number"))
    }

    /// The names of the pools.
    fn pools(&self) -> Vec<String> {
        let text = self.run(&["pool", "ls", "--format", "json"]).text();
        let listed: Vec<Value> = serde_json::from_str(&text).unwrap_or_default();
        let names = listed.iter().filter_map(|pool| pool["name"].as_str());
        names.map(str::to_owned).collect()
    }

    /// What `ps` says.
    #[track_caller]
    pub fn listed(&self, options: &[&str]) -> Vec<Value> {
        let text = self.done(&[&["ps", "--format", "json"], options].concat());
        serde_json::from_str(&text).expect("JSON")
    }

    /// Everything that is known of a snapshot.
    #[track_caller]
    pub fn inspect(&self, snapshot: &str) -> Value {
        let text = self.done(&["snapshot", "inspect", snapshot]);
        serde_json::from_str(&text).expect("JSON")
    }

    /// The names that `ps` says, sorted.
    #[track_caller]
    pub fn names(&self, options: &[&str]) -> Vec<String> {
        let listed = self.listed(options);
        let names = listed.iter().map(|vm| vm["name"].as_str().expect("a name"));
        let mut names: Vec<String> = names.map(str::to_owned).collect();
        names.sort();
        names
    }

    /// What `ps -a` says of one machine.
    #[track_caller]
    pub fn info(&self, name: &str) -> Option<Value> {
        let listed = self.listed(&["-a"]);
        listed.into_iter().find(|vm| vm["name"] == name)
    }

    /// How a machine is; empty where there is none.
    #[track_caller]
    pub fn status(&self, name: &str) -> String {
        let info = self.info(name).unwrap_or_default();
        info["status"].as_str().unwrap_or_default().to_owned()
    }

    /// Kills the process of a machine.
    #[track_caller]
    pub fn kill_process(&self, name: &str) {
        let pid = self.info(name).expect("a machine")["pid"].as_i64();
        let pid = pid.and_then(|pid| rustix::process::Pid::from_raw(pid.try_into().ok()?));
        let killed =
            rustix::process::kill_process(pid.expect("a process"), rustix::process::Signal::KILL);
        killed.expect("kill");
    }

    /// Asserts that machines left no file of theirs behind.
    #[track_caller]
    pub fn scratch_is_empty(&self) {
        let scratch = self.path("skerry/scratch");
        super::eventually("an empty scratch folder", || {
            std::fs::read_dir(&scratch).is_ok_and(|mut entries| entries.next().is_none())
        });
    }

    /// Asserts that there is no machine, and nothing left of any.
    #[track_caller]
    pub fn no_machines(&self) {
        assert_eq!(self.names(&["-a"]), [""; 0]);
        let entries = std::fs::read_dir(self.path("skerry/vms")).expect("registry");
        let names: Vec<_> = entries
            .map(|entry| entry.expect("entry").file_name())
            .collect();
        assert_eq!(names, ["names"]);
        let links = std::fs::read_dir(self.path("skerry/vms/names")).expect("names");
        assert_eq!(links.count(), 0, "names are left");
        self.scratch_is_empty();
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for pool in self.pools() {
            self.run(&["pool", "rm", &pool]);
        }
        let ids = self.run(&["ps", "-q", "--no-trunc"]).text();
        let ids: Vec<&str> = ids.lines().collect();
        if !ids.is_empty() {
            self.run(&[&["rm", "-f"], &ids[..]].concat());
        }
    }
}
