//! From the making of a machine to its removal, end to end on the software processor: created, started
//! again with its files, restarted, attached to, looked into, copied to and from, told of.

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::home::Home;
use common::{eventually, noise, run_with};

/// Adds a line to a file, says what the file has, and stays.
const APPENDS: &str = "echo run >>/runs; sync; wc -l </runs; exec sleep 1000";

fn create(home: &Home, name: &str, options: &[&str], command: &[&str]) -> String {
    let made = ["create", "--hypervisor", "soft", "--name", name];
    home.done(&[&made, options, &["demo"], command].concat())
}

/// The last line of a machine's log.
fn last(home: &Home, name: &str) -> String {
    home.done(&["logs", "-n", "1", name]).trim().to_owned()
}

#[test]
fn what_a_machine_writes_is_there_when_it_is_started_again() {
    let home = Home::new();
    let id = create(
        &home,
        "web",
        &["-l", "tier=front", "-l", "x"],
        &["sh", "-c", APPENDS],
    );
    let info = home.info("web").expect("known");
    assert_eq!(
        (&info["status"], &info["id"]),
        (&"created".into(), &id.as_str().into())
    );
    assert_eq!(info["labels"]["tier"], "front");
    assert_eq!(home.names(&[]), [""; 0], "it doesn't run");
    home.refused(&["exec", "web", "true"], &["web", "not running"]);
    home.refused(
        &["cp", "web:/etc/hosts", "/tmp"],
        &["web", "start it first"],
    );
    home.done(&["rename", "web", "site"]);
    for life in 1..=3 {
        assert_eq!(home.done(&["start", "site"]), "site");
        home.refused(&["start", "site"], &["site", "runs"]);
        eventually("the command", || last(&home, "site") == life.to_string());
        // Not written back by the command, but by the stop.
        home.sh("site", &format!("echo {life} >/last"));
        home.done(&["stop", "-t", "0.2", "site"]);
        assert_eq!(home.status("site"), "stopped");
    }
    home.done(&["start", "site"]);
    assert_eq!(home.sh("site", "cat /last"), "3");
    // What a process that is killed leaves is what a disk has after its power was cut.
    home.sh("site", "echo kept >/kept; sync; echo lost >/lost");
    home.kill_process("site");
    eventually("the end", || home.status("site") == "failed");
    home.done(&["start", "site"]);
    assert_eq!(home.sh("site", "cat /kept"), "kept");
    assert_eq!(home.sh("site", "dmesg | grep -c 'recovery complete'"), "1");
    // A snapshot freezes the disk, which goes on in another file.
    home.done(&["snapshot", "create", "site", "s"]);
    home.sh("site", "echo after >/kept");
    home.done(&["stop", "-t", "0.2", "site"]);
    home.done(&["start", "site"]);
    assert_eq!(home.sh("site", "cat /kept"), "after");
    home.done(&["rm", "-f", "site"]);
    home.no_machines();
}

#[test]
fn a_machine_that_is_not_kept_leaves_nothing() {
    let home = Home::new();
    create(&home, "once", &["--rm"], &["sh", "-c", "echo here"]);
    assert_eq!(home.done(&["start", "once"]), "once");
    eventually("its end", || home.info("once").is_none());
    home.no_machines();
    // One that goes on from another's memory has nothing to begin with again.
    home.start("parent", "sleep 1000");
    home.done(&["fork", "--name", "child", "parent"]);
    home.done(&["kill", "child"]);
    home.refused(&["start", "child"], &["child", "can't be started again"]);
    assert_eq!(home.status("child"), "stopped");
    // What can't be started says why, and is as it was.
    create(&home, "wrong", &[], &["no-such-program"]);
    let ran = home.run(&["start", "wrong"]);
    assert!(
        ran.status == 125 && ran.stderr.contains("no-such-program"),
        "{}",
        ran.stderr
    );
    assert_eq!(home.info("wrong").expect("known")["exit_code"], 127);
}

#[test]
fn policies_start_a_machine_again() {
    let home = Home::new();
    let run = |name: &str, policy: &str, script: &str| {
        home.start_with(name, &["--restart", policy], &["sh", "-c", script]);
    };
    run("thrice", "on-failure:3", "echo life; exit 4");
    run("well", "on-failure", "exit 0");
    run(
        "second",
        "on-failure",
        "[ -e /been ] && exit 0; touch /been; sync; exit 1",
    );
    run("always", "always", "echo life; exit 0");
    assert_eq!(home.done(&["wait", "thrice", "well", "second"]), "4\n0\n0");
    let restarts = |name: &str| home.info(name).expect("known")["restarts"].clone();
    assert_eq!(
        (restarts("thrice"), restarts("well"), restarts("second")),
        (3.into(), 0.into(), 1.into())
    );
    assert_eq!(home.done(&["logs", "thrice"]), "life\nlife\nlife\nlife");
    eventually("some lives", || restarts("always").as_u64() > Some(2));
    let begun = Instant::now();
    home.done(&["stop", "always"]);
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "a pause holds nobody up"
    );
    assert!(["stopped", "failed"].contains(&home.status("always").as_str()));
    let count = restarts("always");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(restarts("always"), count, "it was stopped for good");
    // After the host was switched off, as it were.
    run("server", "unless-stopped", "exec sleep 1000");
    home.kill_process("server");
    eventually("the end", || home.status("server") == "failed");
    let started = home.done(&["start", "--all-restarting"]);
    let mut started: Vec<&str> = started.lines().collect();
    started.sort_unstable();
    assert_eq!(started, ["always", "server"]);
    assert_eq!(home.status("server"), "running");
    home.done(&["restart", "-t", "0.2", "server"]);
    assert_eq!(home.status("server"), "running");
    let ran = home.run(&["run", "--restart", "always", "demo", "true"]);
    assert!(
        ran.status == 125 && ran.stderr.contains("-d"),
        "{}",
        ran.stderr
    );
    home.done(&["rm", "-f", "always", "server"]);
}

#[test]
fn two_are_attached_to_one_command() {
    let home = Home::new();
    // Reads lines, says them to both streams, and ends with the number of the last.
    let script = "while read line; do echo out $line; echo err $line >&2; \
                  case $line in end*) exit ${line#end};; esac; done";
    home.start_with("cat", &["-i"], &["sh", "-c", script]);
    let mut watcher = home.spawn(&["attach", "--no-stdin", "cat"]);
    let mut writer = home.spawn(&["attach", "cat"]);
    // Both have begun to look when the first line is there.
    let mut seen = [0; 6];
    let mut input = writer.stdin.take().expect("a pipe");
    let mut sent = 0;
    let output = watcher.stdout.take().expect("a pipe");
    let first = std::thread::spawn(move || {
        let mut output = output;
        output.read_exact(&mut seen).expect("a line");
        let mut rest = Vec::new();
        output.read_to_end(&mut rest).expect("the end");
        [&seen[..], &rest].concat()
    });
    while sent < 20 && !first.is_finished() {
        writeln!(input, "line").expect("sent");
        sent += 1;
        std::thread::sleep(Duration::from_millis(50));
    }
    writeln!(input, "end7").expect("sent");
    let output = writer.wait_with_output().expect("end");
    assert_eq!(output.status.code(), Some(7));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.ends_with("out end7\n"), "{text}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("err end7"));
    assert_eq!(watcher.wait().expect("end").code(), Some(7));
    let watched = String::from_utf8_lossy(&first.join().expect("no panic")).into_owned();
    assert!(
        watched.starts_with("out li") && watched.ends_with("out end7\n"),
        "{watched}"
    );
    home.refused(&["attach", "cat"], &["cat", "not running"]);
    // From the first byte on, with the status; and input that ends.
    let mut started = home.command(&["start", "-a", "-i", "cat"]);
    started.stdin(Stdio::piped());
    let ran = run_with(started, b"one\nend3\n");
    assert_eq!(
        (ran.status, ran.text().as_str()),
        (3, "out one\nout end3\n")
    );
    // A signal to the one who is attached is the command's.
    home.start(
        "trap",
        "trap 'echo got; exit 9' USR1; echo up; while :; do sleep 0.05; done",
    );
    eventually("up", || home.done(&["logs", "trap"]) == "up");
    let attached = home.spawn(&["attach", "--no-stdin", "trap"]);
    std::thread::sleep(Duration::from_millis(300));
    let pid = rustix::process::Pid::from_child(&attached);
    rustix::process::kill_process(pid, rustix::process::Signal::USR1).expect("sent");
    let output = attached.wait_with_output().expect("end");
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(9), &b"got\n"[..])
    );
}

#[test]
fn who_is_attached_and_gone_holds_nothing_up() {
    let home = Home::new();
    home.start(
        "noisy",
        "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; sleep 1000",
    );
    // One that never reads, and one that is killed.
    let mut stuck = home.spawn(&["attach", "--no-stdin", "noisy"]);
    let mut killed = home.spawn(&["attach", "--no-stdin", "noisy"]);
    killed.kill().expect("killed");
    killed.wait().expect("end");
    eventually("the last line", || last(&home, "noisy") == "line 19999");
    assert_eq!(home.exec("noisy", &["true"]).status, 0);
    stuck.kill().expect("killed");
    stuck.wait().expect("end");
}

#[test]
fn what_runs_in_a_machine_is_listed() {
    let home = Home::new();
    home.start("vm", "sleep 500 & sleep 600 & wait");
    eventually("both", || {
        home.done(&["top", "vm"]).matches("sleep ").count() == 4
    });
    let text = home.done(&["top", "--format", "json", "vm"]);
    let listed: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let listed = listed.as_array().expect("a list");
    let one = listed
        .iter()
        .find(|process| process["command"] == "sleep 600");
    let one = one.expect("it runs");
    let shell = listed
        .iter()
        .find(|process| process["pid"] == one["parent"]);
    assert!(
        shell.expect("its parent")["command"]
            .as_str()
            .is_some_and(|c| c.starts_with("sh -c"))
    );
    assert!(listed.iter().all(|process| process["pid"] != 1));
    assert!(one["memory"].as_u64() > Some(0));
}

fn tree(folder: &Path) -> String {
    let script = "cd \"$1\" && find . | sort | while read -r f; do \
                  if [ -L \"$f\" ]; then echo \"$f -> $(readlink \"$f\")\"; \
                  elif [ -f \"$f\" ]; then echo \"$f $(stat -c %a \"$f\") $(md5sum <\"$f\")\"; \
                  else echo \"$f/\"; fi; done";
    let output = Command::new("sh")
        .arg("-c")
        .arg(script)
        .arg("sh")
        .arg(folder)
        .output();
    String::from_utf8(output.expect("sh").stdout).expect("text")
}

#[test]
fn files_go_in_and_out() {
    let home = Home::new();
    home.start("vm", "sleep 1000");
    let here = home.path("here");
    std::fs::create_dir_all(here.join("tree/sub/deep")).expect("folders");
    std::fs::write(here.join("tree/big"), noise(20 << 20, 7)).expect("file");
    std::fs::write(here.join("tree/sub/deep/empty"), b"").expect("file");
    std::fs::write(here.join(format!("tree/{}", "long".repeat(50))), b"long").expect("file");
    symlink("sub/deep", here.join("tree/link")).expect("link");
    symlink("/nowhere", here.join("tree/dangling")).expect("link");
    let script = here.join("tree/script");
    std::fs::write(&script, b"#!/bin/sh\necho ran\n").expect("file");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o750);
    std::fs::set_permissions(&script, mode).expect("mode");
    let path = |name: &str| here.join(name).to_str().expect("text").to_owned();
    // A folder to a new name, into one that is there, and what is in it.
    home.done(&["cp", &path("tree"), "vm:/new"]);
    home.done(&["cp", &path("tree"), "vm:/tmp"]);
    home.done(&["cp", &path("tree/."), "vm:/srv/"]);
    assert_eq!(
        home.sh(
            "vm",
            "/new/script; /tmp/tree/script; /srv/script; stat -c %u:%a /new/script"
        ),
        "ran\nran\nran\n0:750"
    );
    home.done(&["cp", "vm:/new", &path("back")]);
    assert_eq!(tree(&here.join("back")), tree(&here.join("tree")));
    home.done(&["cp", "vm:/tmp/tree/.", &path("flat")]);
    assert_eq!(tree(&here.join("flat")), tree(&here.join("tree")));
    std::fs::create_dir(here.join("into")).expect("folder");
    home.done(&["cp", "vm:srv/script", &path("into")]);
    home.done(&["cp", "vm:/srv/script", &path("into/other")]);
    assert_eq!(tree(&here.join("into")).lines().count(), 3);
    home.done(&["cp", "-L", "vm:/srv/link", &path("followed")]);
    assert!(here.join("followed/empty").is_file());
    // One file over another, and as a stream of tar both ways.
    std::fs::write(here.join("one"), b"one\n").expect("file");
    home.done(&["cp", &path("one"), "vm:/srv/script"]);
    assert_eq!(home.sh("vm", "cat /srv/script"), "one");
    let packed = home.run(&["cp", "vm:/srv/sub", "-"]);
    assert_eq!(packed.status, 0, "{}", packed.stderr);
    let ran = run_with(home.command(&["cp", "-", "vm:/new/sub"]), &packed.stdout);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    assert_eq!(home.sh("vm", "ls /new/sub/sub/deep"), "empty");
    // What can't be.
    home.refused(&["cp", "vm:/no/such", &path("x")], &["/no/such"]);
    home.refused(&["cp", &path("no-such"), "vm:/x"], &["no-such"]);
    home.refused(
        &["cp", &path("tree"), "vm:/srv/script"],
        &["/srv/script", "no folder"],
    );
    home.refused(&["cp", "vm:/new", &path("one")], &["one", "no folder"]);
    home.refused(&["cp", &path("one"), "vm:/no/such/file"], &["/no/such"]);
    home.refused(&["cp", &path("one"), &path("two")], &["VM:PATH"]);
}

#[test]
fn a_hostile_guest_gets_nothing_out_of_its_place() {
    let home = Home::new();
    home.start("vm", "sleep 1000");
    let outside = home.path("outside");
    std::fs::create_dir(&outside).expect("folder");
    let to = home.path("to");
    std::fs::create_dir(&to).expect("folder");
    // The guest is its root's: what is run there as the agent's program packs a link, and then something
    // below it.
    let plant = format!(
        "mkdir -p /w/a /w/b/evil && ln -s {} /w/a/evil && echo x >/w/b/evil/planted && \
         tar -C /w/a -cf /w/1 evil && tar -C /w/b -cf /w/2 evil/planted && \
         (head -c 512 /w/1; cat /w/2) >/evil.tar && \
         echo '#!/bin/sh' >/fake && \
         echo 'case $1 in kind) echo directory;; pack) cat /evil.tar;; esac' >>/fake && \
         chmod +x /fake && mount -t tmpfs none /proc && mkdir /proc/1 && cp /fake /proc/1/exe",
        outside.display()
    );
    home.sh("vm", &plant);
    assert_eq!(
        home.done(&["exec", "vm", "/proc/1/exe", "kind"]),
        "directory"
    );
    let to = to.to_str().expect("text");
    home.refused(&["cp", "vm:/w/.", to], &["symbolic link"]);
    let left: Vec<_> = std::fs::read_dir(&outside).expect("it is there").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_happens_is_told_in_order() {
    let home = Home::new();
    let mut follower = home.spawn(&[
        "events",
        "--format",
        "json",
        "--since",
        "0",
        "--filter",
        "event=destroy",
    ]);
    create(
        &home,
        "vm",
        &["-l", "a=b", "--ready", "up"],
        &["sh", "-c", "echo up; exec sleep 1000"],
    );
    home.done(&["start", "vm"]);
    home.done(&["wait", "--ready", "vm"]);
    home.done(&["pause", "vm"]);
    home.done(&["unpause", "vm"]);
    home.exec("vm", &["sh", "-c", "exit 3"]);
    home.done(&["stop", "-t", "0.2", "vm"]);
    home.done(&["rename", "vm", "named"]);
    home.done(&["start", "named"]);
    home.kill_process("named");
    eventually("the end", || home.status("named") == "failed");
    home.done(&["rm", "named"]);
    let told = |options: &[&str]| -> Vec<serde_json::Value> {
        let args = [
            "events", "--format", "json", "--since", "0", "--until", "0s",
        ];
        let text = home.done(&[&args, options].concat());
        text.lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect()
    };
    let events = told(&["--filter", "label=a=b"]);
    let actions: Vec<&str> = events
        .iter()
        .map(|event| event["action"].as_str().expect("text"))
        .collect();
    let wanted = [
        "create",
        "start",
        "ready",
        "pause",
        "unpause",
        "exec_create",
        "exec_start",
        "exec_die",
        "kill",
        "kill",
        "die",
        "stop",
        "rename",
        "start",
        "die",
        "destroy",
    ];
    // sleep as the first process of a session takes SIGTERM: there is no second signal then.
    let plain: Vec<&str> = wanted
        .iter()
        .enumerate()
        .filter(|(n, _)| *n != 9)
        .map(|(_, w)| *w)
        .collect();
    // The mark may be seen before the second start is over.
    let actions: Vec<&str> = {
        let mut first = true;
        actions
            .into_iter()
            .filter(|a| *a != "ready" || std::mem::take(&mut first))
            .collect()
    };
    assert!(actions == wanted || actions == plain, "{actions:?}");
    let died: Vec<_> = events
        .iter()
        .filter(|event| event["action"] == "die")
        .collect();
    assert_eq!(died[0]["attributes"]["exit_code"], "143");
    assert_eq!(died[1]["attributes"]["exit_code"], "137");
    let exec = told(&["--filter", "event=exec_die"]);
    assert_eq!(exec[0]["attributes"]["exit_code"], "3");
    let mut line = String::new();
    let mut output = follower.stdout.take().expect("a pipe");
    let mut byte = [0];
    while !line.ends_with("named") {
        output.read_exact(&mut byte).expect("an event");
        line.push(char::from(byte[0]));
    }
    follower.kill().expect("killed");
    follower.wait().expect("end");
}

#[test]
fn lists_have_what_was_asked_for() {
    let home = Home::new();
    create(&home, "made", &["-l", "a=1"], &["true"]);
    home.start_with("runs", &["-l", "a=2", "-l", "b"], &["sleep", "1000"]);
    home.start("ended", "exit 3");
    home.done(&["wait", "ended"]);
    let names = |filters: &[&str]| {
        let options: Vec<&str> = filters.iter().flat_map(|f| ["--filter", f]).collect();
        home.names(&[&["-a"], &options[..]].concat())
    };
    assert_eq!(names(&["status=created"]), ["made"]);
    assert_eq!(
        names(&["status=created", "status=running"]),
        ["made", "runs"]
    );
    assert_eq!(names(&["label=a"]), ["made", "runs"]);
    assert_eq!(names(&["label=a=2", "label=b"]), ["runs"]);
    assert_eq!(names(&["exited=3"]), ["ended"]);
    assert_eq!(names(&["name=un", "status=running"]), ["runs"]);
    let quiet = home.done(&["ps", "-q", "--no-trunc", "--filter", "status=exited"]);
    assert_eq!(
        quiet,
        home.info("ended").expect("known")["id"]
            .as_str()
            .expect("text")
    );
    home.refused(&["ps", "--filter", "colour=red"], &["colour", "status"]);
    assert_eq!(
        home.done(&["prune", "--filter", "label=a"]).lines().count(),
        1
    );
    assert_eq!(home.names(&["-a"]), ["ended", "runs"]);
    assert_eq!(home.done(&["prune"]).lines().count(), 1);
    assert_eq!(home.names(&["-a"]), ["runs"]);
}

#[test]
fn a_machine_is_ready_when_its_port_is_open() {
    let home = Home::new();
    let script = "sleep 0.7; nc -l -p 8080 >/dev/null; sleep 1000";
    home.start_with("server", &["--ready-tcp", "8080"], &["sh", "-c", script]);
    let early = home.run(&["wait", "--ready", "--timeout", "1ms", "server"]);
    assert_eq!(early.status, 124, "{}", early.stderr);
    home.done(&["wait", "--ready", "--timeout", "30s", "server"]);
    assert_eq!(home.status("server"), "ready");
}

#[test]
fn killed_at_any_moment_and_started_again() {
    let home = Home::new();
    create(
        &home,
        "vm",
        &[],
        &[
            "sh",
            "-c",
            "n=$(cat /n 2>/dev/null || echo 0); while :; do n=$((n+1)); echo $n >/n.new; sync; mv /n.new /n; sync; echo $n; done",
        ],
    );
    let mut most = 0;
    for round in 0_u64..6 {
        let child = home.spawn(&["start", "vm"]);
        std::thread::sleep(Duration::from_millis(150 + round * 430));
        if home.info("vm").expect("known")["pid"].as_u64() != Some(0)
            && home.status("vm") != "failed"
        {
            home.kill_process("vm");
        }
        child.wait_with_output().expect("end");
        eventually("the end", || {
            !["starting", "running"].contains(&home.status("vm").as_str())
        });
        assert_eq!(home.names(&[]), [""; 0]);
        // A number that was written back is there, and no lower one.
        let text = home.done(&["logs", "vm"]);
        let numbers: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
        assert!(numbers.is_sorted(), "{numbers:?}");
        most = most.max(numbers.last().copied().unwrap_or(0));
    }
    assert!(most > 0, "nothing ever ran");
    home.done(&["rm", "vm"]);
    home.no_machines();
}
