//! The host's disk is full: during a run, a pull, a load, a snapshot. Nothing crashes, nothing of the host's is
//! lost, what is full is named, the store is whole each time, and with room again everything works.
//!
//! The data folder is on a small memory file system of its own. Where these tests may not mount one, they do
//! in a user namespace, in a process of their own.

mod common;

use std::path::Path;
use std::process::Command;

use common::home::Home;
use common::noise;
use common::registry::{Demands, Registry};
use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::Value;

/// Room for the demo image, its two kept starts, and a little more.
const SIZE: &std::ffi::CStr = c"size=160m";
/// Bytes of the file in an image that is got.
const NOISE: usize = 24 << 20;
/// A file of the host's on the same file system.
const CANARY: usize = 3 << 20;

/// A small file system with a data folder on it.
struct Small {
    home: Home,
    mount: Mount,
}

struct Mount(tempfile::TempDir);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

/// Mounts it, or has `test` run again where that may be done; `None` where it was, or can't be.
fn small(test: &str) -> Option<Small> {
    let folder = tempfile::tempdir().expect("folder");
    let mounted =
        rustix::mount::mount(c"tmpfs", folder.path(), c"tmpfs", MountFlags::empty(), SIZE);
    if mounted.is_ok() {
        let mount = Mount(folder);
        let home = Home::new_in(mount.0.path());
        std::fs::write(mount.0.path().join("canary"), noise(CANARY, 7)).expect("canary");
        return Some(Small { home, mount });
    }
    let again = std::env::current_exe().expect("the test's own path");
    let ran = Command::new("unshare").args(["-Urm", "true"]).status();
    if !ran.is_ok_and(|status| status.success()) {
        eprintln!("skipped: {test}: this user may mount nothing here, nor make a user namespace");
        return None;
    }
    let status = Command::new("unshare")
        .arg("-Urm")
        .arg(again)
        .args(["--exact", test, "--nocapture"])
        .status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "{test} in a user namespace"
    );
    None
}

impl Small {
    fn root(&self) -> &Path {
        self.mount.0.path()
    }

    /// Takes all the room but for so many KiB. Machines that run take some meanwhile.
    fn fill(&self, leave: u64) {
        let mut file = std::fs::File::create(self.root().join("filler")).expect("filler");
        for size in [1 << 20, 4096] {
            let piece = vec![1; size];
            while std::io::Write::write_all(&mut file, &piece).is_ok() {}
        }
        let taken = file.metadata().expect("filler").len();
        file.set_len(taken.saturating_sub(leave << 10))
            .expect("filler");
    }

    fn free(&self) {
        std::fs::remove_file(self.root().join("filler")).expect("filler");
    }

    /// What is the host's is as it was, and the store is whole.
    #[track_caller]
    fn whole(&self) {
        let canary = std::fs::read(self.root().join("canary")).expect("canary");
        assert!(
            canary == noise(CANARY, 7),
            "a file of the host's is another"
        );
        let checked = self.home.run(&["system", "check"]);
        assert_eq!(checked.status, 0, "{checked:?}");
        assert!(checked.text().contains("all are whole"), "{checked:?}");
    }

    /// Refused with one sentence that says what is full.
    #[track_caller]
    fn no_room(&self, args: &[&str]) {
        let ran = self.home.run(args);
        assert_eq!(ran.status, 125, "{args:?}: {ran:?}");
        assert_eq!(ran.stderr.lines().count(), 1, "{args:?}: {}", ran.stderr);
        let said = ran.stderr.to_lowercase();
        let names = ["is full", "no space left", "free space", "has space"];
        assert!(
            names.iter().any(|name| said.contains(name)),
            "{args:?}: {said}"
        );
        let place = self.root().to_str().expect("a path");
        let named = [place, "the volume disk"]
            .iter()
            .any(|name| ran.stderr.contains(name));
        assert!(named, "{args:?}: {}", ran.stderr);
        self.whole();
    }
}

/// Writes more than there is, as far as that goes, and says how that ended; then goes on.
const GREEDY: &str = "dd if=/dev/urandom of=/big bs=1M count=160 conv=fsync 2>/tmp/said; \
                      echo ended $?; cat /tmp/said; echo goes on; exit 9";

#[test]
fn a_guest_that_fills_the_host_gets_errors() {
    let Some(small) = small("a_guest_that_fills_the_host_gets_errors") else {
        return;
    };
    let home = &small.home;
    let run = [
        "run",
        "--hypervisor",
        "soft",
        "-m",
        "256M",
        "demo",
        "sh",
        "-c",
    ];
    let ran = home.run(&[&run[..], &[GREEDY]].concat());
    assert_eq!(ran.status, 9, "{ran:?}");
    assert!(
        ran.text().contains("ended 1") && ran.text().contains("goes on"),
        "{ran:?}"
    );
    let text = ran.text();
    assert!(
        text.contains("Input/output error") || text.contains("No space left"),
        "{text}"
    );
    // Said once, however often the guest tries.
    assert_eq!(
        ran.stderr.matches("file system is full").count(),
        1,
        "{ran:?}"
    );
    assert!(ran.stderr.contains("scratch"), "{ran:?}");
    small.whole();
    home.scratch_is_empty();
    home.run(&[&run[..], &["echo works again"]].concat())
        .expect(0, "works again\n");
}

#[test]
fn a_machine_in_the_background_outlives_a_full_disk() {
    let Some(small) = small("a_machine_in_the_background_outlives_a_full_disk") else {
        return;
    };
    let home = &small.home;
    // What it writes stays on its disk, so that the host's stays full.
    let script = format!("{GREEDY}; ");
    home.start_with("greedy", &["-m", "256M"], &["sh", "-c", &script]);
    assert_eq!(home.done(&["wait", "greedy"]), "9");
    let info = home.info("greedy").expect("known");
    assert_eq!(
        (&info["status"], &info["exit_code"]),
        (&"stopped".into(), &9.into()),
        "{info}"
    );
    let error = info["error"].as_str().expect("what was full");
    assert!(error.contains("file system is full"), "{error}");
    small.whole();
    // There is no room for another; what there was is as it was.
    small.fill(0);
    small.no_room(&["run", "--hypervisor", "soft", "-d", "demo", "true"]);
    small.no_room(&["create", "--hypervisor", "soft", "demo", "true"]);
    small.free();
    assert_eq!(home.status("greedy"), "stopped");
    home.done(&["rm", "greedy"]);
    small.whole();
    home.start_with("next", &[], &["sh", "-c", "echo fine >/f; sync; cat /f"]);
    assert_eq!(home.done(&["wait", "next"]), "0");
    assert_eq!(home.done(&["logs", "next"]), "fine");
    small.whole();
}

/// A machine that runs while another fills the disk goes on, and its log too as soon as there is room.
#[test]
fn a_full_disk_costs_lines_of_a_log_and_no_machine() {
    let Some(small) = small("a_full_disk_costs_lines_of_a_log_and_no_machine") else {
        return;
    };
    let home = &small.home;
    let counts = "i=0; while [ ! -e /mem/go ]; do i=$((i+1)); echo line $i; echo $i >/mem/new; mv /mem/new /mem/n; sleep 0.01; done; echo last";
    // What it counts in is not on the disk.
    home.start_with("talks", &["--tmpfs", "/mem"], &["sh", "-c", counts]);
    small.fill(0);
    let count = || home.number("talks", "cat /mem/n");
    let before = count();
    common::eventually("more lines", || count() > before + 200);
    small.whole();
    small.free();
    let after = count();
    common::eventually("more lines", || count() > after + 5);
    // The guest's command has not noticed.
    home.sh("talks", "touch /mem/go");
    assert_eq!(home.done(&["wait", "talks"]), "0");
    let ran = home.run(&["logs", "talks"]);
    assert_eq!(ran.status, 0, "{ran:?}");
    assert!(ran.text().ends_with("last\n"), "{}", ran.text());
    assert!(ran.stderr.contains("lines are lost"), "{}", ran.stderr);
    home.done(&["rm", "talks"]);
    small.whole();
}

/// An image with a file that can't be compressed.
fn noisy(folder: &Path) -> String {
    let layout = folder.join("layout");
    common::registry::layout(&layout, "amd64", &[&noise(NOISE, 3)]);
    format!("oci:{}", layout.display())
}

#[test]
fn what_finds_no_room_leaves_nothing() {
    let Some(small) = small("what_finds_no_room_leaves_nothing") else {
        return;
    };
    let home = &small.home;
    home.start_with("runs", &[], &["sleep", "1000"]);
    // An image that is not there yet, in a file elsewhere.
    let elsewhere = tempfile::tempdir().expect("folder");
    let image = noisy(elsewhere.path());
    small.fill(6 << 10);
    small.no_room(&["run", "--hypervisor", "soft", &image, "/noise"]);
    small.no_room(&["snapshot", "create", "runs", "point"]);
    let archive = elsewhere.path().join("demo.tar");
    let archive = archive.to_str().expect("a path");
    small.free();
    home.done(&["save", "-o", archive, "demo"]);
    home.done(&["rmi", "-f", "demo"]);
    small.fill(64);
    let full = home.run(&["load", "-i", archive]);
    assert!(full.status == 125 || full.status == 0, "{full:?}");
    small.whole();
    small.free();
    small.fill(0);
    small.no_room(&["volume", "create", "disk"]);
    small.free();
    home.done(&["load", "-i", archive]);
    home.done(&["volume", "create", "disk"]);
    home.done(&["snapshot", "create", "runs", "point"]);
    small.whole();
    assert_eq!(home.exec("runs", &["echo", "goes on"]).text(), "goes on\n");
}

#[test]
fn a_volume_that_fills_the_host_is_whole() {
    let Some(small) = small("a_volume_that_fills_the_host_is_whole") else {
        return;
    };
    let home = &small.home;
    let run = [
        "run",
        "--hypervisor",
        "soft",
        "-v",
        "disk:/v",
        "demo",
        "sh",
        "-c",
    ];
    home.done(&[&run[..], &["echo kept >/v/first; sync"]].concat());
    let greedy =
        "dd if=/dev/urandom of=/v/big bs=1M count=160 conv=fsync 2>/dev/null; echo ended $?";
    let ran = home.run(&[&run[..], &[greedy]].concat());
    assert!(ran.text().contains("ended 1"), "{ran:?}");
    assert_eq!(
        ran.stderr.matches("file system is full").count(),
        1,
        "{ran:?}"
    );
    small.whole();
    // What was there before it was full is there: with room, a machine takes it up again.
    let used: Vec<Value> =
        serde_json::from_str(&home.done(&["volume", "ls", "--format", "json"])).expect("JSON");
    assert!(used[0]["used"].as_u64() > Some(8 << 20), "{used:?}");
    let bigger = c"size=320m";
    rustix::mount::mount_remount(small.root(), MountFlags::empty(), bigger).expect("more room");
    let text = home.done(
        &[
            &run[..],
            &["cat /v/first; rm -f /v/big; echo more >/v/more; cat /v/more"],
        ]
        .concat(),
    );
    assert_eq!(text, "kept\nmore");
    small.whole();
}

#[test]
fn a_pull_that_finds_no_room_leaves_nothing() {
    let Some(small) = small("a_pull_that_finds_no_room_leaves_nothing") else {
        return;
    };
    let Some(registry) = Registry::start(Demands::default()) else {
        return;
    };
    let home = &small.home;
    let elsewhere = tempfile::tempdir().expect("folder");
    let image = noisy(elsewhere.path());
    let name = registry.name("noise");
    let other = Home::empty();
    other.done(&["tag", &image, &name]);
    other.done(&["push", &name]);
    for leave in [64, 6 << 10, 30 << 10] {
        small.fill(leave);
        small.no_room(&["pull", &name]);
        let listed = home.done(&["images"]);
        assert!(!listed.contains("noise"), "{listed}");
        small.free();
        small.whole();
    }
    home.done(&["pull", &name]);
    small.whole();
    assert!(home.done(&["images"]).contains("noise"));
}
