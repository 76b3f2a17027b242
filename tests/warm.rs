//! Warm starts and pools: what is prepared once and used often.

mod common;

use std::process::Stdio;

use common::home::Home;
use common::run_with;

const SOFT: [&str; 2] = ["--hypervisor", "soft"];

fn warm(home: &Home, options: &[&str], exec: &[&str]) -> common::Ran {
    let args = [&["warm"], &SOFT[..], options, &["demo", "--exec"], exec].concat();
    home.run(&args)
}

fn run(home: &Home, script: &str) -> String {
    home.done(&[&["run"], &SOFT[..], &["demo", "sh", "-c", script]].concat())
}

#[test]
fn a_command_that_ended_is_in_later_runs() {
    let home = Home::new();
    let prepared = warm(
        &home,
        &[],
        &["sh", "-c", "echo prepared > /dev/shm/mark; echo done"],
    );
    assert_eq!(prepared.status, 0, "{}", prepared.stderr);
    // Only the snapshot's identity is printed.
    assert_eq!(prepared.text().trim().len(), 64);
    assert_eq!(
        run(&home, "cat /dev/shm/mark; echo mine > /dev/shm/mark"),
        "prepared"
    );
    assert_eq!(run(&home, "cat /dev/shm/mark"), "prepared");
    // Another warming takes the place of the first.
    warm(&home, &[], &["true"]).text();
    assert_eq!(run(&home, "ls /dev/shm"), "");
    let fresh = [&["run", "--fresh"], &SOFT[..], &["demo", "ls", "/dev/shm"]].concat();
    assert_eq!(home.done(&fresh), "");
}

#[test]
fn a_command_left_running_takes_up_the_streams_of_who_goes_on() {
    let home = Home::new();
    let server = "n=7; echo listening; while read line; do n=$((n+1)); echo $n $line; done; exit 3";
    let warmed = warm(
        &home,
        &["-i", "--ready", "listening", "--name", "server"],
        &["sh", "-c", server],
    );
    assert_eq!(warmed.status, 0, "{}", warmed.stderr);
    for _ in 0..3 {
        let mut command =
            home.command(&[&["run", "-i"], &SOFT[..], &["--from-snapshot", "server"]].concat());
        command.stdin(Stdio::piped());
        run_with(command, b"one\ntwo\n").expect(3, "8 one\n9 two\n");
    }
    // It is in runs of the image too, beside their own command.
    let seen = run(&home, "ps -o args | grep -c '[l]istening'");
    assert_eq!(seen, "1");
    home.done(&["snapshot", "rm", "server"]);
}

#[test]
fn a_mark_of_no_bytes_is_there_with_the_command() {
    let home = Home::new();
    let warmed = warm(
        &home,
        &["--ready", ""],
        &["sh", "-c", "echo up; sleep 1000"],
    );
    assert_eq!(warmed.status, 0, "{}", warmed.stderr);
    assert_eq!(run(&home, "pidof sleep | wc -w"), "1");
}

#[test]
fn a_command_that_fails_keeps_nothing() {
    let home = Home::new();
    let before = home.done(&["snapshot", "ls", "--quiet"]);
    for (options, exec, told) in [
        (&[][..], &["sh", "-c", "echo broken; exit 9"][..], "broken"),
        (&["--ready", "never"], &["echo", "once"], "never"),
        (&[], &["no-such-program"], "no-such-program"),
    ] {
        let failed = warm(&home, options, exec);
        assert_eq!((failed.status, failed.text().as_str()), (125, ""));
        assert!(failed.stderr.contains(told), "{}", failed.stderr);
    }
    home.refused(&["warm", "demo", "--name", "start-x"], &["start-x"]);
    assert_eq!(home.done(&["snapshot", "ls", "--quiet"]), before);
}

fn create(home: &Home, name: &str, options: &[&str]) {
    let args = [&["pool", "create"], &SOFT[..], options, &[name, "demo"]].concat();
    assert_eq!(home.done(&args), name);
}

fn stats(home: &Home, name: &str) -> serde_json::Value {
    let text = home.done(&["pool", "stats", "--format", "json", name]);
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn machines_of_a_pool_come_clean_and_prepared() {
    let home = Home::new();
    let args = [
        "pool",
        "create",
        "--hypervisor",
        "soft",
        "--min",
        "2",
        "--max",
        "2",
        "fast",
        "demo",
    ];
    home.done(
        &[
            &args[..],
            &["--exec", "sh", "-c", "echo prepared > /etc/mark"],
        ]
        .concat(),
    );
    for _ in 0..6 {
        let script = "cat /etc/mark; ls /dev/shm; rm /etc/mark; echo used > /dev/shm/used; exit 5";
        home.run(&["pool", "exec", "fast", "sh", "-c", script])
            .expect(5, "prepared\n");
    }
    let mut command = home.command(&["pool", "exec", "-i", "fast", "wc", "-c"]);
    command.stdin(Stdio::piped());
    assert_eq!(run_with(command, &[7; 100_000]).text().trim(), "100000");
    assert_eq!(stats(&home, "fast")["made"], 2);
    home.refused(&["pool", "create", "fast", "demo"], &["fast"]);
    assert_eq!(home.done(&["pool", "rm", "fast"]), "fast");
    home.refused(&["pool", "exec", "fast", "true"], &["fast"]);
}

#[test]
fn an_acquired_machine_is_ones_own_until_it_is_released() {
    let home = Home::new();
    create(
        &home,
        "p",
        &["--min", "1", "--max", "1", "--acquire-timeout", "300ms"],
    );
    let lease = home.done(&["pool", "acquire", "p"]);
    let within = ["pool", "exec", "--lease", &lease, "p"];
    home.done(&[&within[..], &["sh", "-c", "echo mine > /dev/shm/x"]].concat());
    assert_eq!(
        home.done(&[&within[..], &["cat", "/dev/shm/x"]].concat()),
        "mine"
    );
    home.refused(&["pool", "acquire", "p"], &["p", "0.3"]);
    home.done(&["pool", "release", "p", &lease]);
    home.refused(&["pool", "release", "p", &lease], &[&lease]);
    home.refused(&[&within[..], &["true"]].concat(), &[&lease]);
    assert_eq!(home.done(&["pool", "exec", "p", "ls", "/dev/shm"]), "");
    assert_eq!(stats(&home, "p")["timeouts"], 1);
    home.done(&["pool", "rm", "p"]);
}

#[test]
fn a_pools_machines_have_folders_and_no_volumes() {
    let home = Home::new();
    let folder = home.path("folder");
    std::fs::create_dir(&folder).expect("a folder");
    std::fs::write(folder.join("given"), "given\n").expect("a file");
    let volume = format!("{}:/shared", folder.display());
    let create = [
        "pool",
        "create",
        "--hypervisor",
        "soft",
        "--min",
        "2",
        "--max",
        "2",
    ];
    let mounts = [
        "-v",
        &volume,
        "--tmpfs",
        "/scratch:size=8M",
        "--dns",
        "127.0.0.1:5353",
    ];
    home.done(&[&create[..], &mounts, &["fast", "demo"]].concat());
    // Each of them, again and again: what is in memory is gone, what is in the folder stays.
    for number in 0..6 {
        let script = format!(
            "cat /shared/given; ls /scratch | wc -l; touch /scratch/mine; echo {number} >>/shared/log; \
             wc -l </shared/log"
        );
        let ran = home.done(&["pool", "exec", "fast", "sh", "-c", &script]);
        assert_eq!(ran, format!("given\n0\n{}", number + 1));
    }
    let log = std::fs::read_to_string(folder.join("log")).expect("a log");
    assert_eq!(log.lines().count(), 6);
    home.done(&["pool", "rm", "fast"]);
    for (option, value, why) in [
        ("-v", "data:/data", "volume"),
        ("--mount", "type=volume,source=data,target=/data", "volume"),
        ("-p", "8080:80", "--publish"),
    ] {
        home.refused(
            &[&create[..], &[option, value, "bad", "demo"]].concat(),
            &[why],
        );
    }
    // A start is kept for runs with a folder, whichever it is.
    home.done(&["warm", "--hypervisor", "soft", "-v", &volume, "demo"]);
    let other = home.path("other");
    std::fs::create_dir(&other).expect("a folder");
    std::fs::write(other.join("given"), "other\n").expect("a file");
    let other = format!("{}:/elsewhere", other.display());
    let run = [
        "run",
        "--rm",
        "--hypervisor",
        "soft",
        "-v",
        &other,
        "demo",
        "cat",
        "/elsewhere/given",
    ];
    assert_eq!(home.done(&run), "other");
    let with = [
        "warm",
        "--hypervisor",
        "soft",
        "-v",
        &volume,
        "demo",
        "--exec",
        "true",
    ];
    home.refused(&with, &["--exec"]);
}

#[test]
fn many_users_share_a_pool() {
    let home = Home::new();
    create(&home, "busy", &["--min", "1", "--max", "3"]);
    let users: Vec<_> = (0..20)
        .map(|_| {
            home.spawn(&[
                "pool",
                "exec",
                "busy",
                "cat",
                "/proc/sys/kernel/random/uuid",
            ])
        })
        .collect();
    let mut drawn: Vec<_> = users
        .into_iter()
        .map(|user| {
            let output = user.wait_with_output().expect("output");
            assert!(
                output.status.success(),
                "{:?}",
                String::from_utf8(output.stderr)
            );
            String::from_utf8(output.stdout).expect("text")
        })
        .collect();
    drawn.sort();
    drawn.dedup();
    assert_eq!(drawn.len(), 20);
    let stats = stats(&home, "busy");
    assert!(
        stats["made"].as_u64().is_some_and(|made| made <= 3),
        "{stats}"
    );
    home.done(&["pool", "rm", "busy"]);
}

#[test]
fn a_pool_of_a_snapshot_and_a_killed_one() {
    let home = Home::new();
    home.start("vm", "echo kept > /dev/shm/x; sleep 1000");
    common::eventually("the file", || {
        home.exec("vm", &["cat", "/dev/shm/x"]).text() == "kept\n"
    });
    home.done(&["snapshot", "create", "vm", "snap"]);
    let args = [
        "pool",
        "create",
        "--hypervisor",
        "soft",
        "--from-snapshot",
        "snap",
        "p",
    ];
    home.done(&args);
    assert_eq!(
        home.done(&["pool", "exec", "p", "cat", "/dev/shm/x"]),
        "kept"
    );
    let listed = home.done(&["pool", "ls", "--format", "json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    let pid = listed[0]["pid"].as_i64().expect("pid").to_string();
    let killed = std::process::Command::new("kill")
        .args(["-9", &pid])
        .status();
    assert!(killed.is_ok_and(|status| status.success()));
    common::eventually("it is listed no more", || {
        home.done(&["pool", "ls", "--format", "json"]).trim() == "[]"
    });
    home.refused(&["pool", "exec", "p", "true"], &["p"]);
    // The name is free again.
    home.done(&args);
    home.done(&["pool", "rm", "p"]);
}

#[test]
fn the_first_run_notes_what_it_touches_and_a_damaged_note_is_no_harm() {
    let home = Home::new();
    assert_eq!(run(&home, "echo 1"), "1");
    let snapshots = std::fs::read_dir(home.path("skerry/snapshots")).expect("snapshots");
    let notes: Vec<_> = snapshots
        .map(|entry| entry.expect("entry").path().join("working-set"))
        .filter(|note| note.exists())
        .collect();
    assert_eq!(notes.len(), 1, "{notes:?}");
    std::fs::write(&notes[0], b"SKRYWSET\x01\xff\xff\xff").expect("damage");
    assert_eq!(run(&home, "echo 2"), "2");
    assert!(
        std::fs::metadata(&notes[0]).is_ok_and(|note| note.len() > 100),
        "noted again"
    );
}
