//! `skerry run` on the software processor, with the built-in image: streams, statuses, isolation.

mod common;

use std::io::Read;
use std::process::Stdio;

use common::{data_folder, demo, demo_command, echoes_as_typed, eventually, noise, run, run_with};

#[test]
fn output_and_statuses_are_the_commands_own() {
    demo(&[], &["echo", "hello"]).expect(0, "hello\n");
    for status in [0, 1, 42, 125, 255] {
        demo(&[], &["sh", "-c", &format!("exit {status}")]).expect(status, "");
    }
    demo(&[], &["sh", "-c", "kill -TERM $$"]).expect(128 + 15, "");
    demo(&[], &["sh", "-c", "kill -KILL $$"]).expect(128 + 9, "");
}

#[test]
fn stdout_and_stderr_stay_apart() {
    let ran = demo(&[], &["sh", "-c", "echo out; echo err >&2; echo out"]);
    ran.expect(0, "out\nout\n");
    assert!(
        ran.stderr.lines().any(|line| line == "err"),
        "{}",
        ran.stderr
    );
}

#[test]
fn commands_that_cannot_be_invoked() {
    let ran = demo(&[], &["no-such-command"]);
    ran.expect(127, "");
    assert!(ran.stderr.contains("no-such-command"), "{}", ran.stderr);
    let ran = demo(&[], &["/etc"]);
    ran.expect(126, "");
    assert!(ran.stderr.contains("/etc"), "{}", ran.stderr);
}

#[test]
fn bytes_survive_the_way_in_and_out() {
    let bytes = noise(3 << 20, 1);
    let ran = run_with(demo_command(&["-i"], &["cat"]), &bytes);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    assert!(ran.stdout == bytes, "{} bytes came back", ran.stdout.len());
    // Without -i the command's input is empty.
    let ran = run_with(demo_command(&[], &["wc", "-c"]), b"not passed on");
    assert_eq!(ran.text().trim(), "0");
}

#[test]
fn environment_user_and_folder() {
    demo(
        &["-e", "GREETING=good day"],
        &["sh", "-c", "echo $GREETING"],
    )
    .expect(0, "good day\n");
    let mut command = demo_command(&["-e", "FROM_HOST"], &["sh", "-c", "echo $FROM_HOST"]);
    command.env("FROM_HOST", "yes");
    run_with(command, b"").expect(0, "yes\n");
    demo(&["-u", "1000:1001"], &["sh", "-c", "id -u; id -g"]).expect(0, "1000\n1001\n");
    demo(&["-w", "/tmp/made/here"], &["pwd"]).expect(0, "/tmp/made/here\n");
    demo(&["--entrypoint", "echo"], &["a", "b"]).expect(0, "a b\n");
    demo(&["--hostname", "heron"], &["hostname"]).expect(0, "heron\n");
}

#[test]
fn a_terminal_when_asked_for() {
    demo(
        &["-t"],
        &["sh", "-c", "test -t 0 && test -t 1 && stty size"],
    )
    .expect(0, "24 80\r\n");
    demo(&[], &["sh", "-c", "test -t 0 || test -t 1 || echo none"]).expect(0, "none\n");
}

#[test]
fn nothing_leaks_from_run_to_run() {
    demo(
        &[],
        &["sh", "-c", "echo secret > /root/left; cat /root/left"],
    )
    .expect(0, "secret\n");
    demo(&[], &["sh", "-c", "test -e /root/left || echo clean"]).expect(0, "clean\n");
    let scratch = data_folder().join("skerry/scratch");
    let left: Vec<_> = std::fs::read_dir(scratch)
        .expect("scratch folder")
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_read_only_root_refuses_writes() {
    let ran = demo(&["--read-only"], &["sh", "-c", "echo x > /file"]);
    assert_ne!(ran.status, 0);
    assert!(
        ran.stderr.contains("Read-only file system"),
        "{}",
        ran.stderr
    );
}

#[test]
fn several_processors_and_much_memory() {
    demo(&["--cpus", "2"], &["nproc"]).expect(0, "2\n");
    let ran = demo(
        &["--memory", "1G"],
        &["sh", "-c", "grep MemTotal /proc/meminfo"],
    );
    let kib: u64 = ran
        .text()
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .expect("a number");
    assert!((900 << 10..1 << 20).contains(&kib), "{kib} KiB");
}

#[test]
fn the_time_limit_ends_it() {
    let ran = demo(&["--timeout", "6s"], &["sleep", "1000"]);
    assert_eq!(ran.status, 124, "{}", ran.stderr);
    assert!(ran.stderr.contains("time limit"), "{}", ran.stderr);
}

#[test]
fn signals_are_passed_on() {
    let script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let mut child = demo_command(&[], &["sh", "-c", script])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("skerry starts");
    let mut stdout = child.stdout.take().expect("a pipe");
    let mut seen = [0; 6];
    stdout.read_exact(&mut seen).expect("ready");
    assert_eq!(&seen, b"ready\n");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("kill");
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).expect("output");
    assert_eq!(rest, "caught\n");
    assert_eq!(child.wait().expect("end").code(), Some(3));
}

#[test]
fn interactive_input_arrives_as_it_is_typed() {
    let child = demo_command(&["-i"], &["cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    echoes_as_typed(child.expect("skerry starts"));
}

#[test]
fn a_killed_skerry_leaves_nothing_behind() {
    let mut child = demo_command(&[], &["sh", "-c", "echo up; sleep 1000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("skerry starts");
    let mut seen = [0; 3];
    child
        .stdout
        .take()
        .expect("a pipe")
        .read_exact(&mut seen)
        .expect("up");
    child.kill().expect("kill");
    child.wait().expect("end");
    let scratch = data_folder().join("skerry/scratch");
    eventually("an empty scratch folder", || {
        std::fs::read_dir(&scratch).is_ok_and(|mut entries| entries.next().is_none())
    });
}

#[test]
fn auto_says_once_what_it_passed_over() {
    let ran = run(&["run", "--timeout", "300", "demo", "true"]);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    assert!(ran.stdout.is_empty());
    let notes = ran.stderr.matches("using soft, not kvm").count();
    let json: serde_json::Value =
        serde_json::from_slice(&run(&["doctor", "--format", "json"]).stdout).expect("JSON");
    let expected = usize::from(json["auto"] == "soft");
    assert_eq!(notes, expected, "{}", ran.stderr);
}

#[test]
fn images_lists_what_was_used_and_rmi_removes_it() {
    let folder = tempfile::tempdir().expect("folder");
    let with = |args: &[&str]| {
        let mut command = common::skerry(args);
        command.env("XDG_DATA_HOME", folder.path());
        run_with(command, b"")
    };
    with(&["run", "--hypervisor", "soft", "demo", "true"]).expect(0, "");
    let list = with(&["images"]).text();
    assert!(list.contains("demo"), "{list}");
    assert_eq!(with(&["rmi", "demo"]).status, 0);
    with(&["images", "--quiet"]).expect(0, "");
}

/// A data folder of its own, and `skerry run` in it.
fn run_in(folder: &std::path::Path, options: &[&str], command: &[&str]) -> common::Ran {
    let mut process = demo_command(options, command);
    process.env("XDG_DATA_HOME", folder);
    run_with(process, b"")
}

/// The kept starts: folders with 64 digits for a name.
fn kept(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder.join("skerry/snapshots")) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.len() == 64))
        .collect()
}

#[test]
fn later_runs_go_on_from_a_kept_start() {
    let folder = tempfile::tempdir().expect("folder");
    let folder = folder.path();
    run_in(folder, &["--fresh"], &["echo", "a"]).expect(0, "a\n");
    assert_eq!(kept(folder).len(), 0, "--fresh keeps nothing");
    let script = "cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1; \
                  cat /proc/sys/kernel/random/boot_id";
    let mut seen = std::collections::HashSet::new();
    for round in 0..5 {
        let ran = run_in(folder, &[], &["sh", "-c", script]);
        assert_eq!(ran.status, 0, "{}", ran.stderr);
        assert_eq!(kept(folder).len(), 1, "round {round}");
        for line in ran.text().lines() {
            assert!(seen.insert(line.to_owned()), "{line} came twice");
        }
    }
    // Each clone has the host's time, its own name and a clean disk.
    let now = || {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.expect("a clock").as_secs()
    };
    let before = now();
    let ran = run_in(
        folder,
        &["--hostname", "heron"],
        &["sh", "-c", "date +%s; hostname"],
    );
    let text = ran.text();
    let (time, name) = text.trim().split_once('\n').expect("two lines");
    let time: u64 = time.parse().expect("a number");
    assert!((before..=now() + 1).contains(&time), "{time} at {before}");
    assert_eq!(name, "heron");
    run_in(
        folder,
        &[],
        &["sh", "-c", "test -e /left || echo clean; echo x > /left"],
    )
    .expect(0, "clean\n");
    run_in(folder, &[], &["sh", "-c", "test -e /left || echo clean"]).expect(0, "clean\n");
    // Another machine is another start.
    run_in(folder, &["--cpus", "2"], &["nproc"]).expect(0, "2\n");
    run_in(folder, &["--cpus", "2"], &["nproc"]).expect(0, "2\n");
    run_in(
        folder,
        &["--read-only"],
        &["sh", "-c", "echo x > /file || echo refused"],
    )
    .expect(0, "refused\n");
    run_in(
        folder,
        &["--read-only"],
        &["sh", "-c", "echo x > /file || echo refused"],
    )
    .expect(0, "refused\n");
    assert_eq!(kept(folder).len(), 3);
    // What the user has named stays when the image goes.
    let named = |args: &[&str]| {
        let mut command = common::skerry(args);
        command.env("XDG_DATA_HOME", folder);
        run_with(command, b"")
    };
    let archive = folder.join("start.tar");
    let archive = archive.to_str().expect("UTF-8");
    let id = kept(folder)[0].file_name().expect("a name").to_owned();
    let id = id.to_str().expect("UTF-8").to_owned();
    assert_eq!(named(&["snapshot", "export", &id, archive]).status, 0);
    assert_eq!(
        named(&["snapshot", "import", archive, "--name", "mine"]).status,
        0
    );
    let mut rmi = common::skerry(&["rmi", "demo"]);
    rmi.env("XDG_DATA_HOME", folder);
    assert_eq!(run_with(rmi, b"").status, 0);
    assert_eq!(kept(folder).len(), 1, "they go with their image");
    assert_eq!(named(&["snapshot", "rm", "mine"]).status, 0);
    assert_eq!(kept(folder).len(), 0);
}

#[test]
fn a_damaged_start_is_told_and_made_again() {
    let folder = tempfile::tempdir().expect("folder");
    let folder = folder.path();
    run_in(folder, &[], &["true"]).expect(0, "");
    let blobs = kept(folder)[0].join("blobs/sha256");
    let largest = std::fs::read_dir(blobs)
        .expect("blobs")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .max_by_key(|path| path.metadata().map_or(0, |metadata| metadata.len()))
        .expect("a blob");
    let mut permissions = largest.metadata().expect("metadata").permissions();
    #[expect(clippy::permissions_set_readonly_false, reason = "the test's own file")]
    permissions.set_readonly(false);
    std::fs::set_permissions(&largest, permissions).expect("permissions");
    let mut bytes = std::fs::read(&largest).expect("memory");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&largest, bytes).expect("written");
    let ran = run_in(folder, &[], &["echo", "still"]);
    ran.expect(0, "still\n");
    assert!(ran.stderr.contains("kept start"), "{}", ran.stderr);
    let ran = run_in(folder, &[], &["echo", "again"]);
    ran.expect(0, "again\n");
    assert!(!ran.stderr.contains("kept start"), "{}", ran.stderr);
    // So is one without its documents.
    for name in ["index.json", "oci-layout"] {
        std::fs::write(kept(folder)[0].join(name), "{").expect("written");
        let ran = run_in(folder, &[], &["echo", "still"]);
        ran.expect(0, "still\n");
        assert!(ran.stderr.contains("kept start"), "{}", ran.stderr);
        assert_eq!(kept(folder).len(), 1);
    }
}
