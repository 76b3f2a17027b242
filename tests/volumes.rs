//! Folders of the host and volumes, end to end, on the software processor.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use common::home::Home;
use common::{Ran, eventually, hex, noise};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The judge of both file systems that it runs on is the other one.
const POSIX: &str = include_str!("guests/posix.sh");

/// A folder of the host's, and what is in it.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("file");
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect("file")
    }

    /// The option that shares it.
    fn at(&self, target: &str) -> String {
        format!("{}:{target}", self.0.path().display())
    }
}

fn run(home: &Home, options: &[&str], script: &str) -> Ran {
    run_with(home, options, &["sh", "-c", script])
}

fn run_with(home: &Home, options: &[&str], command: &[&str]) -> Ran {
    let begin = ["run", "--hypervisor", "soft"];
    home.run(&[&begin[..], options, &["demo"], command].concat())
}

/// A script that succeeds in a machine of its own; gives what it printed.
#[track_caller]
fn sh(home: &Home, options: &[&str], script: &str) -> String {
    let ran = run(home, options, script);
    assert_eq!(ran.status, 0, "{script}: {}", ran.stderr);
    ran.text().trim_end().to_owned()
}

#[test]
fn a_folder_is_read_and_written_from_both_sides() {
    let (home, folder) = (Home::new(), Folder::new());
    folder.write("from-host", "hello\n");
    let script = "cat /srv/deep/from-host; echo back > /srv/deep/from-guest; mkdir /srv/deep/new";
    assert_eq!(sh(&home, &["-v", &folder.at("/srv/deep")], script), "hello");
    assert_eq!(folder.read("from-guest"), "back\n");
    assert!(folder.path("new").is_dir());
    // The kept start serves another folder, and the long form is the same.
    let other = Folder::new();
    other.write("from-host", "other\n");
    let long = format!(
        "type=bind,source={},target=/srv/deep",
        other.0.path().display()
    );
    assert_eq!(sh(&home, &["--mount", &long], "cat /srv/deep/*"), "other");
    // What the host changes while the guest looks is seen, within a second or two.
    home.start_with("watcher", &["-v", &other.at("/x")], &["sleep", "60"]);
    assert_eq!(home.sh("watcher", "cat /x/from-host"), "other");
    other.write("from-host", "changed by the host\n");
    other.write("new", "");
    eventually("the host's change", || {
        home.sh("watcher", "cat /x/from-host; ls /x") == "changed by the host\nfrom-host\nnew"
    });
    home.done(&["rm", "-f", "watcher"]);
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    let (home, folder) = (Home::new(), Folder::new());
    folder.write("file", "text");
    let options = ["-v", &format!("{}:ro", folder.at("/m"))[..], "--read-only"];
    // The place is made though the root is read-only, which it stays.
    let script = "cat /m/file; touch /m/new; echo x > /m/file; rm /m/file; touch /root/x; mount -o remount,rw /m; echo y > /m/file; true";
    let ran = run(&home, &options, script);
    assert_eq!(
        (ran.status, ran.text().as_str()),
        (0, "text"),
        "{}",
        ran.stderr
    );
    assert!(
        ran.stderr.matches("Read-only file system").count() >= 4,
        "{}",
        ran.stderr
    );
    assert_eq!(folder.read("file"), "text");
    assert!(!folder.path("new").exists());
}

#[test]
fn one_file_is_mounted_alone() {
    let (home, folder) = (Home::new(), Folder::new());
    folder.write("conf", "one\n");
    folder.write("secret", "no\n");
    let option = format!("{}:/etc/app/conf", folder.path("conf").display());
    let script = "cat /etc/app/conf; ls /etc/app; echo two > /etc/app/conf; ls -a /dev/.skerry";
    let ran = run(&home, &["-v", &option], script);
    assert_eq!(ran.text(), "one\nconf\n", "{}", ran.stderr);
    assert_eq!(folder.read("conf"), "two\n");
    assert!(!ran.text().contains("no\n"));
    let special = [
        "run",
        "--hypervisor",
        "soft",
        "-v",
        "/dev/null:/x",
        "demo",
        "true",
    ];
    home.refused(
        &special,
        &["/dev/null", "neither a folder nor a regular file"],
    );
    let missing = [
        "run",
        "--hypervisor",
        "soft",
        "-v",
        "/nonexistent/folder:/x",
        "demo",
        "true",
    ];
    home.refused(&missing, &["/nonexistent/folder"]);
    let above = [
        "run",
        "--hypervisor",
        "soft",
        "-v",
        "/tmp:/a/../b",
        "demo",
        "true",
    ];
    home.refused(&above, &["/a/../b"]);
}

#[test]
fn files_behave_in_a_folder_as_they_do_on_a_disk() {
    let (home, folder) = (Home::new(), Folder::new());
    let options = ["-v", &folder.at("/share")[..], "-v", "disk:/disk"];
    let both = "sh -c \"$0\" posix /share > /tmp/share; sh -c \"$0\" posix /disk > /tmp/disk; \
                sed 's/^\\([0-9]* .* directory .*\\) [0-9]*$/\\1/' -i /tmp/share /tmp/disk; \
                wc -l < /tmp/disk; grep -c 'Operation not permitted\\|Permission denied' /tmp/disk; \
                diff /tmp/disk /tmp/share";
    let ran = run_with(&home, &options, &["sh", "-c", both, POSIX]);
    let text = ran.text();
    let lines: usize = text
        .lines()
        .next()
        .and_then(|n| n.trim().parse().ok())
        .unwrap_or(0);
    assert!(lines > 170, "{text}{}", ran.stderr);
    // Only what the VMM's user may not do on the host differs, and as root there is nothing.
    assert_eq!((ran.status, text.lines().count()), (0, 2), "{text}");
    let refused: usize = text
        .lines()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    assert!(
        refused >= 15,
        "the script has somebody try what they may not: {text}"
    );
}

#[test]
fn large_files_and_many_files_arrive_whole() {
    let (home, folder) = (Home::new(), Folder::new());
    let sent = noise(64 << 20, 5);
    fs::write(folder.path("big"), &sent).expect("file");
    fs::create_dir(folder.path("many")).expect("folder");
    for number in 0..10_000 {
        folder.write(&format!("many/file-{number}"), "");
    }
    let script = "sha256sum < /m/big; cp /m/big /m/copy; cat < /m/copy > /m/back; \
                  ls /m/many | wc -l; ls -l /m/many | grep -c file-; cd /m/many; rm -r /m/many; ls -a /m";
    let text = sh(&home, &["-v", &folder.at("/m")], script);
    let expected = format!(
        "{}  -\n10000\n10000\n.\n..\nback\nbig\ncopy",
        hex(Sha256::digest(&sent))
    );
    assert_eq!(text, expected);
    for name in ["copy", "back"] {
        assert!(fs::read(folder.path(name)).expect("file") == sent, "{name}");
    }
}

#[test]
fn a_hostile_guest_stays_in_its_folder() {
    let (home, outer) = (Home::new(), Folder::new());
    outer.write("secret", "host's own\n");
    let shared = outer.path("shared");
    fs::create_dir(&shared).expect("folder");
    symlink("../secret", shared.join("planted")).expect("link");
    let option = format!("{}:/m", shared.display());
    // Links of every kind lead into the guest; directories are exchanged for links while they are walked.
    let script = "cd /m; echo guest > /secret; cat planted; ln -s / root; ls root/secret; \
        ln -s /proc/1/root abs; mkdir -p a/b/c; echo in > a/b/c/secret; \
        (for i in $(seq 300); do mv a x; ln -s .. a; rm a; mv x a; done) & \
        for i in $(seq 300); do cat a/b/c/secret a/secret a/../secret 2>/dev/null; done | sort -u; wait; \
        ls -a ..; cat ../secret";
    let ran = run(&home, &["-v", &option], script);
    assert!(!ran.text().contains("host's own"), "{}", ran.text());
    assert!(
        ran.text().contains("guest\n"),
        "the guest's own is what .. leads to"
    );
    assert_eq!(outer.read("secret"), "host's own\n");
    assert_eq!(fs::read_dir(outer.0.path()).expect("folder").count(), 2);
    // A FIFO without a writer on the host, and the guest opens it: among its own processes.
    let made = std::process::Command::new("mkfifo")
        .arg(shared.join("fifo"))
        .status();
    assert!(made.expect("mkfifo").success());
    let text = sh(
        &home,
        &["-v", &option],
        "(echo through > /m/fifo) & cat /m/fifo",
    );
    assert_eq!(text, "through");
}

#[test]
fn owners_are_those_of_the_host() {
    let (home, folder) = (Home::new(), Folder::new());
    let own = rustix::process::geteuid().as_raw();
    folder.write("hosts", "");
    fs::set_permissions(folder.0.path(), fs::Permissions::from_mode(0o777)).expect("mode");
    let script = "stat -c '%u:%g' /m/hosts; touch /m/roots; su -s /bin/sh demo -c 'touch /m/theirs; mkdir /m/dir'; \
                  stat -c %u /m/theirs";
    let text = sh(&home, &["-v", &folder.at("/m")], script);
    // Root gives files to whoever made them; anybody else owns what the guest makes.
    let (theirs, uid) = if own == 0 { (1000, "1000") } else { (own, "0") };
    assert_eq!(text, format!("0:0\n{uid}"));
    let owner = |name: &str| fs::metadata(folder.path(name)).expect("file").uid();
    assert_eq!(
        (owner("roots"), owner("theirs"), owner("dir")),
        (own, theirs, theirs)
    );
}

fn volume(home: &Home, name: &str) -> Value {
    let text = home.done(&["volume", "inspect", name]);
    let list: Value = serde_json::from_str(&text).expect("JSON");
    list[0].clone()
}

#[test]
fn a_volume_outlives_machines_and_is_one_machines_at_a_time() {
    let home = Home::new();
    let data = ["-v", "data:/data"];
    assert_eq!(
        sh(&home, &data, "echo kept > /data/file; ls -a /data"),
        ".\n..\nfile"
    );
    assert_eq!(sh(&home, &data, "cat /data/file"), "kept");
    assert_eq!(
        sh(
            &home,
            &["-v", "data:/data:ro"],
            "cat /data/file; touch /data/x || echo no"
        ),
        "kept\nno"
    );
    // One writes.
    home.start_with("one", &data, &["sleep", "100"]);
    let taken = [
        "run",
        "--hypervisor",
        "soft",
        "-v",
        "data:/x",
        "demo",
        "true",
    ];
    let ran = home.run(&taken);
    assert_eq!(ran.status, 125);
    assert!(
        ran.stderr
            .contains("volume data is in use by the machine one"),
        "{}",
        ran.stderr
    );
    assert_eq!(home.run(&["volume", "rm", "data"]).status, 125);
    assert_eq!(volume(&home, "data")["in_use"], true);
    assert_eq!(volume(&home, "data")["holder"], "one");
    home.done(&["rename", "one", "first"]);
    assert_eq!(volume(&home, "data")["holder"], "first");
    home.done(&["rename", "first", "one"]);
    // Killed in the middle of it: what was synced is there, and the journal makes the rest sound.
    home.sh(
        "one",
        "echo synced > /data/second; sync; echo lost-perhaps > /data/third",
    );
    home.kill_process("one");
    eventually("the lock's end", || {
        volume(&home, "data")["in_use"] == false
    });
    assert_eq!(
        sh(
            &home,
            &data,
            "cat /data/file /data/second; dmesg | grep -c 'recovery complete'"
        ),
        "kept\nsynced\n1"
    );
    // Several read.
    home.start_with("two", &["-v", "data:/data:ro"], &["sleep", "100"]);
    assert_eq!(
        sh(&home, &["-v", "data:/data:ro"], "cat /data/file"),
        "kept"
    );
    home.done(&["rm", "-f", "two"]);
    assert_eq!(home.done(&["volume", "ls", "-q"]), "data");
    assert_eq!(home.done(&["volume", "rm", "data"]), "data");
    home.refused(&["volume", "inspect", "data"], &["no volume data"]);
}

#[test]
fn volumes_are_made_and_pruned() {
    let home = Home::new();
    assert_eq!(
        home.done(&["volume", "create", "--size", "1G", "small"]),
        "small"
    );
    home.refused(
        &["volume", "create", "--size", "2G", "small"],
        &["small already"],
    );
    home.refused(&["volume", "create", "--size", "1M", "tiny"], &["256 MiB"]);
    home.refused(&["volume", "create", "../x"], &["../x"]);
    let size = sh(&home, &["-v", "small:/v"], "df -m /v | awk 'END{print $2}'");
    assert!((900..=1024).contains(&size.parse().expect("MiB")), "{size}");
    // Another size with the same kept start.
    let size = sh(&home, &["-v", "large:/v"], "df -m /v | awk 'END{print $2}'");
    assert!(
        (60_000..=65_536).contains(&size.parse().expect("MiB")),
        "{size}"
    );
    sh(&home, &["-v", "/anonymous"], "touch /anonymous/x");
    let names = home.done(&["volume", "ls", "-q"]);
    assert_eq!(names.lines().count(), 3, "{names}");
    let pruned = home.done(&["volume", "prune"]);
    assert_eq!((pruned.lines().count(), pruned.len()), (1, 32), "{pruned}");
    home.done(&["volume", "prune", "--all"]);
    assert_eq!(home.done(&["volume", "ls", "-q"]), "");
}

#[test]
fn a_new_volume_gets_what_the_image_has() {
    let home = Home::new();
    assert_eq!(
        sh(
            &home,
            &["-v", "etc:/etc"],
            "grep -c demo: /etc/passwd; echo x >> /etc/passwd"
        ),
        "1"
    );
    let text = sh(
        &home,
        &["-v", "etc:/other"],
        "tail -n 1 /other/passwd; ls -a /other | head -n 3",
    );
    assert!(text.starts_with("x\n.\n..\n"), "{text}");
    let option = "type=volume,source=bare,target=/etc,volume-nocopy";
    assert_eq!(sh(&home, &["--mount", option], "ls /etc | wc -l"), "0");
}

#[test]
fn space_that_is_free_goes_back_to_the_host() {
    let home = Home::new();
    let used = |home: &Home| volume(home, "v")["used"].as_u64().expect("bytes");
    let fill = "dd if=/dev/urandom of=/v/big bs=1M count=64 2>/dev/null";
    sh(&home, &["-v", "v:/v"], fill);
    assert!(used(&home) >= 64 << 20);
    sh(&home, &["-v", "v:/v"], "rm /v/big; sync; fstrim /v");
    assert!(used(&home) < 8 << 20, "{}", used(&home));
}

#[test]
fn memory_file_systems_have_size_and_mode() {
    let home = Home::new();
    let options = [
        "--tmpfs",
        "/t:size=1M,mode=700",
        "--mount",
        "type=tmpfs,target=/u",
    ];
    let script = "stat -c %a /t /u; df -k /t | awk 'END{print $2}'; dd if=/dev/zero of=/t/x bs=1M count=2 2>&1 | grep -o 'No space.*'";
    assert_eq!(
        sh(&home, &options, script),
        "700\n1777\n1024\nNo space left on device"
    );
    let twice = [
        "run",
        "--hypervisor",
        "soft",
        "--tmpfs",
        "/t",
        "--tmpfs",
        "/t",
        "demo",
        "true",
    ];
    home.refused(&twice, &["Two mounts", "/t"]);
}

#[test]
fn a_snapshot_goes_on_with_its_folder() {
    let (home, folder) = (Home::new(), Folder::new());
    folder.write("log", "");
    folder.write("lost", "x");
    let script = "exec 3< /m/lost; i=0; while sleep 0.1; do i=$((i + 1)); echo $i >> /m/log; done";
    home.start_with("first", &["-v", &folder.at("/m")], &["sh", "-c", script]);
    eventually("a line", || !folder.read("log").is_empty());
    home.done(&["snapshot", "create", "first", "kept"]);
    home.done(&["rm", "-f", "first"]);
    fs::remove_file(folder.path("lost")).expect("gone");
    // Whoever starts it says which folder it is to be: a snapshot can't name one of the host's.
    let restore = ["restore", "-d", "--hypervisor", "soft", "--name", "second"];
    let ran = home.run(&[&restore[..], &["kept"]].concat());
    assert!(
        ran.status == 125 && ran.stderr.contains("-v HOST:/m"),
        "{}",
        ran.stderr
    );
    let before = folder.read("log").lines().count();
    home.done(&[&restore[..], &["-v", &folder.at("/m"), "kept"]].concat());
    eventually("more lines", || {
        folder.read("log").lines().count() > before + 3
    });
    // A file that is gone is stale, and nothing else is.
    let text = home.sh(
        "second",
        "cat /proc/$(pidof sh | awk '{print $NF}')/fd/3 2>&1; ls /m",
    );
    assert!(text.ends_with("log"), "{text}");
    home.done(&["fork", "second"]);
    home.done(&["rm", "-f", "second"]);
    // With a volume there is no state to be had.
    home.start_with("third", &["-v", "data:/data"], &["sleep", "100"]);
    let ran = home.run(&["snapshot", "create", "third"]);
    assert!(
        ran.status == 125 && ran.stderr.contains("has a volume"),
        "{}",
        ran.stderr
    );
    assert_eq!(home.run(&["fork", "third"]).status, 125);
}

#[test]
fn a_volume_that_was_not_shut_down_is_sound() {
    let home = Home::new();
    home.start_with(
        "busy",
        &["-v", "v:/v"],
        &["sh", "-c", "while :; do cp -r /bin /v/a; rm -r /v/a; done"],
    );
    eventually("something written", || {
        volume(&home, "v")["used"].as_u64() > Some(2 << 20)
    });
    home.kill_process("busy");
    eventually("the lock's end", || volume(&home, "v")["in_use"] == false);
    sh(&home, &["-v", "v:/v"], "ls /v");
    let disk = home.path("skerry/volumes/v/disk");
    check(&disk);
}

/// Has e2fsprogs do what the journal has, and look, where this host has it.
fn check(disk: &Path) {
    let e2fsck = |options: &[&str]| {
        std::process::Command::new("e2fsck")
            .args(options)
            .arg(disk)
            .output()
    };
    match e2fsck(&["-E", "journal_only", "-y"]) {
        Ok(_) => {
            let output = e2fsck(&["-f", "-n"]).expect("e2fsck");
            assert!(output.status.success(), "{output:?}");
        }
        Err(error) => println!("not looked at: e2fsck is not on this host ({error})"),
    }
}

/// A volume that nobody named is the machine's at its every start, and its process reaches no other.
#[test]
fn an_unnamed_volume_is_one_machines_own() {
    let home = Home::new();
    home.done(&["volume", "create", "other"]);
    let create = [
        "create",
        "--hypervisor",
        "soft",
        "--name",
        "vm",
        "-v",
        "/own",
    ];
    home.done(&[&create[..], &["demo", "sleep", "1000"]].concat());
    home.done(&["start", "vm"]);
    home.sh("vm", "echo mine >/own/file; sync");
    home.done(&["restart", "-t", "0", "vm"]);
    assert_eq!(home.sh("vm", "cat /own/file"), "mine");
    let listed: serde_json::Value =
        serde_json::from_str(&home.done(&["volume", "ls", "--format", "json"])).expect("JSON");
    let listed = listed.as_array().expect("volumes");
    let own: Vec<_> = listed.iter().filter(|one| one["name"] != "other").collect();
    assert_eq!(own.len(), 1, "{listed:?}");
    assert_eq!(
        (&own[0]["anonymous"], &own[0]["holder"]),
        (&true.into(), &"vm".into())
    );
    home.done(&["rm", "-f", "vm"]);
    assert_eq!(home.done(&["volume", "prune"]).lines().count(), 1);
}
