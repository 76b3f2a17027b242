//! The life of virtual machines, end to end, on the software processor: started behind no terminal,
//! listed, talked to, made to stand still, stopped, killed, removed.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::home::Home;
use common::{echoes_as_typed, eventually, golden, noise, run_with};

/// Goes on until `/go` is there, and ends with 7.
const UNTIL_TOLD: &str = "while [ ! -e /go ]; do sleep 0.05; done; exit 7";
/// Makes `/go`, for a machine that may be gone before this command of it has told its end.
fn tell(home: &Home, name: &str) {
    let status = home.exec(name, &["touch", "/go"]).status;
    assert!(status == 0 || status == 125, "{status}");
}

/// Counts, in a file and on stdout.
const COUNTS: &str =
    "i=0; while :; do i=$((i+1)); echo $i >/n; mv /n /count; echo $i; sleep 0.05; done";

/// Says that it is ready after a while, in two pieces; then goes on until it is told to end.
const READY_SOON: &str = "echo one; sleep 0.3; printf 'not rea' >&2; sleep 0.1; echo dy >&2; touch /up; \
                          while [ ! -e /go ]; do sleep 0.05; done";

#[test]
fn a_machine_is_ready_when_it_says_so_or_when_it_can_be_used() {
    let home = Home::new();
    home.start_with("says", &["--ready", "ready"], &["sh", "-c", READY_SOON]);
    home.start_with(
        "shows",
        &["--ready-cmd", "test -e /up"],
        &["sh", "-c", READY_SOON],
    );
    home.start_with(
        "never",
        &["--ready", "nobody writes this"],
        &["sh", "-c", READY_SOON],
    );
    home.start("plain", READY_SOON);
    assert_eq!(
        home.done(&["wait", "--ready", "says", "shows"]),
        "says\nshows"
    );
    for name in ["says", "shows"] {
        let info = home.info(name).expect("it runs");
        assert_eq!(info["status"], "ready", "{name}");
        assert!(info["ready"].as_u64() > info["started"].as_u64(), "{info}");
    }
    assert_eq!(home.done(&["logs", "says"]), "one");
    // It stands still, and is ready again afterwards.
    home.done(&["pause", "says"]);
    assert_eq!(home.info("says").expect("paused")["status"], "paused");
    home.done(&["unpause", "says"]);
    assert_eq!(home.info("says").expect("goes on")["status"], "ready");
    // What takes too long, what can't be known, and what ends before.
    let late = home.run(&["wait", "--ready", "--timeout", "200ms", "never"]);
    assert_eq!(late.status, 124, "{late:?}");
    assert!(
        late.stderr.contains("never was not ready in time"),
        "{late:?}"
    );
    home.refused(&["wait", "--ready", "plain"], &["plain", "--ready-cmd"]);
    tell(&home, "never");
    home.refused(&["wait", "--ready", "never"], &["never"]);
    home.start_with(
        "brief",
        &["--ready", "never this"],
        &["sh", "-c", "sleep 1; exit 3"],
    );
    home.refused(
        &["wait", "--ready", "brief"],
        &["brief ended (exit status 3) before it was ready"],
    );
    for name in ["says", "shows", "plain"] {
        tell(&home, name);
        assert_eq!(home.done(&["wait", name]), "0");
    }
    assert_eq!(home.info("says").expect("known still")["status"], "stopped");
}

#[test]
fn what_machines_take_is_what_the_host_says() {
    let home = Home::new();
    home.start("busy", "while :; do :; done");
    home.start("idle", "sleep 1000");
    let taken = |name: &str| -> serde_json::Value {
        let line = home.done(&["stats", "--no-stream", "--format", "json", name]);
        serde_json::from_str(&line).expect("one line of JSON")
    };
    let pid = home.info("busy").expect("it runs")["pid"].clone();
    let ticks = || -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
        let (_, fields) = stat.rsplit_once(')').expect("fields");
        let fields: Vec<u64> = fields.split(' ').map(|f| f.parse().unwrap_or(0)).collect();
        fields[12] + fields[13]
    };
    let (before, began) = (ticks(), Instant::now());
    let busy = taken("busy");
    let percent = (ticks() - before) as f64 / began.elapsed().as_secs_f64();
    let said = busy["cpu_percent"].as_f64().expect("a number");
    assert!(
        (said - percent).abs() < 10.0 + percent / 10.0,
        "{said} {percent}"
    );
    let pages = std::fs::read_to_string(format!("/proc/{pid}/statm")).expect("it lives");
    let pages: u64 = pages
        .split(' ')
        .nth(1)
        .and_then(|n| n.parse().ok())
        .expect("pages");
    let resident = busy["resident"].as_f64().expect("a number");
    let apart = (resident / (pages * 4096) as f64 - 1.0).abs();
    assert!(apart < 0.05, "{resident} {pages}");
    assert_eq!(busy["memory"], 512u64 << 20);
    let idle = taken("idle");
    assert!(idle["cpu_percent"].as_f64() < busy["cpu_percent"].as_f64());
    let table = home.done(&["stats", "--no-stream"]);
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(table.starts_with("ID ") && table.contains("busy") && table.contains("idle"));
    home.done(&["kill", "busy", "idle"]);
    assert_eq!(
        home.done(&["stats", "--no-stream", "busy"]).lines().count(),
        1
    );
    home.refused(&["stats", "nobody"], &["nobody"]);
}

#[test]
fn a_machine_is_known_by_its_new_name() {
    let home = Home::new();
    let id = home.start("first", UNTIL_TOLD);
    home.start("second", UNTIL_TOLD);
    home.refused(&["rename", "first", "second"], &["second"]);
    home.refused(&["rename", "first", "no/name"], &["no/name"]);
    home.done(&["rename", "first", "third"]);
    home.refused(&["exec", "first", "true"], &["first"]);
    assert_eq!(home.info("third").expect("known")["id"], *id);
    tell(&home, "third");
    assert_eq!(home.done(&["wait", "third"]), "7");
    home.done(&["rename", &id[..12], "first"]);
    assert_eq!(home.status("first"), "stopped");
    home.done(&["rm", "first"]);
    home.done(&["rm", "-f", "second"]);
    home.no_machines();
}

#[test]
fn a_machine_from_its_start_to_its_removal() {
    let home = Home::new();
    let id = home.start_with("one", &["-e", "A=b"], &["sh", "-c", UNTIL_TOLD]);
    assert!(
        id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()),
        "{id}"
    );
    let listed = home.listed(&[]);
    assert_eq!(listed.len(), 1);
    let vm = &listed[0];
    assert_eq!(vm["id"], *id);
    assert_eq!(
        (&vm["name"], &vm["image"], &vm["status"]),
        (&"one".into(), &"demo".into(), &"running".into())
    );
    assert_eq!(
        (&vm["memory"], &vm["cpus"]),
        (&(512u64 << 20).into(), &1.into())
    );
    assert_eq!(vm["command"][2], UNTIL_TOLD);
    assert!(vm["started"].as_u64() > vm["created"].as_u64(), "{vm}");
    assert!(vm["finished"].is_null() && vm["exit_code"].is_null());
    // By name, by identity, by some of it, in any case.
    for name in ["one", &id, &id[..16], &id[..12].to_uppercase()] {
        assert_eq!(home.sh(name, "echo $A"), "b", "{name}");
    }
    assert_eq!(home.done(&["ps", "-q"]), id[..12]);
    assert_eq!(home.done(&["ps", "-q", "--no-trunc"]), id);
    home.refused(&["rm", "one"], &["one", "runs", "--force"]);
    tell(&home, "one");
    assert_eq!(home.done(&["wait", "one"]), "7");
    assert_eq!(home.done(&["ps", "-q"]), "");
    let vm = home.info("one").expect("still known");
    assert_eq!(
        (&vm["status"], &vm["exit_code"]),
        (&"stopped".into(), &7.into())
    );
    assert!(vm["finished"].as_u64() > vm["started"].as_u64(), "{vm}");
    assert!(vm["error"].is_null());
    // What has ended can be asked how, and takes no orders.
    assert_eq!(home.done(&["wait", "one"]), "7");
    assert_eq!(home.done(&["stop", "one"]), "one");
    for verb in ["pause", "unpause", "kill"] {
        home.refused(&[verb, "one"], &["one", "not running"]);
    }
    home.refused(&["exec", "one", "true"], &["one", "not running"]);
    home.refused(&["fork", "one"], &["one", "not running"]);
    home.refused(&["snapshot", "create", "one"], &["one", "not running"]);
    assert_eq!(home.done(&["rm", "one"]), "one");
    home.no_machines();
}

#[test]
fn commands_in_a_running_machine() {
    let home = Home::new();
    let options = ["-e", "KEPT=from run", "-w", "/tmp", "-u", "1000:1001"];
    home.start_with("vm", &options, &["sleep", "1000"]);
    for status in [0, 1, 42, 125, 255] {
        home.exec("vm", &["sh", "-c", &format!("exit {status}")])
            .expect(status, "");
    }
    home.exec("vm", &["sh", "-c", "kill -TERM $$"])
        .expect(128 + 15, "");
    for (command, status) in [("no-such-command", 127), ("/etc", 126)] {
        let ran = home.exec("vm", &[command]);
        ran.expect(status, "");
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        assert!(ran.stderr.contains(command), "{}", ran.stderr);
    }
    let ran = home.exec("vm", &["sh", "-c", "echo out; echo err >&2; echo out"]);
    ran.expect(0, "out\nout\n");
    assert_eq!(ran.stderr, "err\n");
    // What `run` was told holds for further commands, until they are told otherwise.
    let script = "echo $KEPT; pwd; id -u; id -g";
    assert_eq!(home.sh("vm", script), "from run\n/tmp\n1000\n1001");
    let options = ["-e", "KEPT=mine", "-w", "/etc", "-u", "0"];
    let args = [&["exec"], &options[..], &["vm", "sh", "-c", script]].concat();
    assert_eq!(home.done(&args), "mine\n/etc\n0\n0");
    let mut command = home.command(&[
        "exec",
        "-e",
        "FROM_HOST",
        "vm",
        "sh",
        "-c",
        "echo $FROM_HOST",
    ]);
    command.env("FROM_HOST", "yes");
    run_with(command, b"").expect(0, "yes\n");
    let sized = "test -t 0 && test -t 1 && stty size";
    let ran = home.run(&["exec", "-t", "vm", "sh", "-c", sized]);
    ran.expect(0, "24 80\r\n");
    home.exec("vm", &["sh", "-c", "test -t 0 || test -t 1 || echo none"])
        .expect(0, "none\n");
    // Commands find each other: it is one machine.
    assert!(home.sh("vm", "pidof sleep").parse::<u32>().is_ok());
    assert_eq!(home.status("vm"), "running");
}

#[test]
fn bytes_survive_an_exec() {
    let home = Home::new();
    home.start("vm", "sleep 1000");
    let bytes = noise(2 << 20, 7);
    let ran = run_with(home.command(&["exec", "-i", "vm", "cat"]), &bytes);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    assert!(ran.stdout == bytes, "{} bytes came back", ran.stdout.len());
    let ran = run_with(home.command(&["exec", "vm", "wc", "-c"]), b"not passed on");
    assert_eq!(ran.text().trim(), "0");
    // As it is typed, and to the end of it.
    echoes_as_typed(home.spawn(&["exec", "-i", "vm", "cat"]));
}

#[test]
fn signals_reach_an_exec() {
    let home = Home::new();
    home.start("vm", "sleep 1000");
    let script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let mut child = home.spawn(&["exec", "vm", "sh", "-c", script]);
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let mut next = || lines.next().map(|line| line.expect("UTF-8"));
    assert_eq!(next().as_deref(), Some("ready"));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("kill");
    assert_eq!(next().as_deref(), Some("caught"));
    assert_eq!(child.wait().expect("end").code(), Some(3));
    // One whose client is killed ends too, and the machine goes on.
    let mut child = home.spawn(&["exec", "vm", "sh", "-c", "echo on; exec sleep 987"]);
    let mut seen = [0; 3];
    let mut output = child.stdout.take().expect("a pipe");
    output.read_exact(&mut seen).expect("on");
    child.kill().expect("kill");
    child.wait().expect("end");
    eventually("the end of the command", || {
        home.exec("vm", &["sh", "-c", "ps | grep -q '[s]leep 987'"])
            .status
            == 1
    });
    assert_eq!(home.status("vm"), "running");
}

#[test]
fn logs_keep_what_the_command_wrote() {
    let home = Home::new();
    let script = "echo first; echo wrong >&2; printf 'no end'; while [ ! -e /go ]; do sleep 0.05; done; \
                  echo; for i in 1 2 3; do echo line $i; done";
    home.start("vm", script);
    eventually("the output", || {
        home.run(&["logs", "vm"]).text().ends_with("no end")
    });
    let ran = home.run(&["logs", "vm"]);
    ran.expect(0, "first\nno end");
    assert_eq!(ran.stderr, "wrong\n");
    let follower = home.spawn(&["logs", "-f", "vm"]);
    tell(&home, "vm");
    let all = "first\nno end\nline 1\nline 2\nline 3\n";
    let followed = follower
        .wait_with_output()
        .expect("the follower ends with the command");
    assert_eq!(String::from_utf8_lossy(&followed.stdout), all);
    assert!(followed.status.success());
    assert_eq!(home.done(&["wait", "vm"]), "0");
    // They stay when it has ended.
    home.run(&["logs", "vm"]).expect(0, all);
    home.run(&["logs", "-f", "vm"]).expect(0, all);
    home.run(&["logs", "-n", "2", "vm"])
        .expect(0, "line 2\nline 3\n");
    home.run(&["logs", "-n", "0", "vm"]).expect(0, "");
    let timed = home.done(&["logs", "-t", "-n", "1", "vm"]);
    let (time, text) = timed.split_once(' ').expect("a time");
    assert_eq!(text, "line 3");
    assert!(
        time.starts_with("20") && time.ends_with('Z') && time.len() == 24,
        "{time}"
    );
    home.done(&["rm", "vm"]);
    home.refused(&["logs", "vm"], &["vm"]);
}

#[test]
fn a_paused_machine_stands_still() {
    let home = Home::new();
    home.start("vm", COUNTS);
    let count = || home.done(&["logs", "-n", "1", "vm"]);
    eventually("progress", || !count().is_empty());
    assert_eq!(home.done(&["pause", "vm"]), "vm");
    assert_eq!(home.status("vm"), "paused");
    assert_eq!(home.names(&[]), ["vm"], "it is still one that lives");
    // What was on its way is there by now.
    std::thread::sleep(Duration::from_millis(100));
    let before = count();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(count(), before);
    let begun = Instant::now();
    home.refused(&["exec", "vm", "true"], &["vm", "paused", "skerry unpause"]);
    home.refused(&["pause", "vm"], &["vm", "paused"]);
    home.refused(&["kill", "-s", "TERM", "vm"], &["vm", "paused"]);
    home.refused(&["snapshot", "create", "vm"], &["vm", "paused"]);
    home.refused(&["fork", "vm"], &["vm", "paused"]);
    home.refused(&["rm", "vm"], &["vm", "runs"]);
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "nothing waits for it"
    );
    assert_eq!(home.done(&["unpause", "vm"]), "vm");
    home.refused(&["unpause", "vm"], &["vm", "not paused"]);
    assert_eq!(home.status("vm"), "running");
    let number = || count().parse::<u64>().expect("a number");
    let stood = before.parse::<u64>().expect("a number");
    eventually("progress", || number() > stood + 3);
    // Whatever is asked of a machine's end finds one that stands still, too.
    home.done(&["pause", "vm"]);
    home.done(&["stop", "-t", "0.5", "vm"]);
    assert_eq!(home.info("vm").expect("known")["exit_code"], 128 + 15);
    for (name, verb) in [("killed", "kill"), ("removed", "rm")] {
        home.start(name, "sleep 1000");
        home.done(&["pause", name]);
        let args: &[&str] = if verb == "rm" {
            &["rm", "-f", name]
        } else {
            &["kill", name]
        };
        home.done(args);
    }
    assert_eq!(home.info("killed").expect("known")["exit_code"], 137);
    assert!(home.info("removed").is_none());
}

#[test]
fn stopping_and_killing() {
    let home = Home::new();
    let code = |name: &str| home.info(name).expect("known")["exit_code"].clone();
    let trap =
        "trap 'echo bye; exit 5' TERM; trap 'echo hup' USR1; echo up; while :; do sleep 0.05; done";
    home.start("polite", trap);
    let says = |text: &str| {
        eventually(text, || {
            home.done(&["logs", "polite"])
                .lines()
                .any(|line| line == text)
        });
    };
    says("up");
    home.done(&["kill", "-s", "USR1", "polite"]);
    says("hup");
    home.done(&["kill", "--signal", "sigusr1", "polite"]);
    assert_eq!(home.status("polite"), "running");
    home.done(&["stop", "polite"]);
    assert_eq!(
        (home.status("polite"), code("polite")),
        ("stopped".to_owned(), 5.into())
    );
    says("bye");

    home.start(
        "stubborn",
        "trap '' TERM; echo up; while :; do sleep 0.05; done",
    );
    eventually("up", || home.done(&["logs", "stubborn"]) == "up");
    let begun = Instant::now();
    home.done(&["stop", "-t", "700ms", "stubborn"]);
    let took = begun.elapsed();
    assert!((700..5000).contains(&took.as_millis()), "{took:?}");
    assert_eq!(
        (home.status("stubborn"), code("stubborn")),
        ("stopped".to_owned(), 137.into())
    );

    home.start("any", "sleep 1000");
    home.done(&["kill", "any"]);
    assert_eq!(
        (home.status("any"), code("any")),
        ("stopped".to_owned(), 137.into())
    );
    home.start("numbered", "sleep 1000");
    home.done(&["kill", "-s", "15", "numbered"]);
    assert_eq!(home.done(&["wait", "numbered"]), "143");
    let ran = home.run(&["kill", "-s", "NONSENSE", "any"]);
    assert!(
        ran.status == 125 && ran.stderr.contains("NONSENSE"),
        "{}",
        ran.stderr
    );
    home.scratch_is_empty();
}

#[test]
fn everyone_who_waits_is_told() {
    let home = Home::new();
    for name in ["a", "b"] {
        home.start(name, UNTIL_TOLD);
    }
    let waiting: Vec<_> = (0..5).map(|_| home.spawn(&["wait", "a", "b"])).collect();
    let told = home.spawn(&["wait", "a"]);
    tell(&home, "b");
    tell(&home, "a");
    for child in waiting {
        let output = child.wait_with_output().expect("end");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "7\n7\n");
        assert!(output.status.success());
    }
    assert_eq!(told.wait_with_output().expect("end").stdout, b"7\n");
    // The end by a signal to its process is an end that is told, too.
    home.start("c", "sleep 1000");
    let waiting = home.spawn(&["wait", "c"]);
    std::thread::sleep(Duration::from_millis(100));
    home.kill_process("c");
    assert_eq!(waiting.wait_with_output().expect("end").stdout, b"137\n");
}

#[test]
fn removal_takes_what_it_can() {
    let home = Home::new();
    home.start("runs", "sleep 1000");
    home.start("ended", "exit 3");
    assert_eq!(home.done(&["wait", "ended"]), "3");
    let ran = home.run(&["rm", "runs", "nobody", "ended"]);
    ran.expect(125, "ended\n");
    let lines: Vec<_> = ran.stderr.lines().collect();
    assert!(
        lines.len() == 2 && lines[0].contains("runs") && lines[1].contains("nobody"),
        "{lines:?}"
    );
    home.done(&["rm", "--force", "runs"]);
    home.no_machines();
    // One that is to be forgotten is, however it ends; its end is told all the same.
    for (name, script) in [
        ("by-itself", UNTIL_TOLD),
        ("killed", "sleep 1000"),
        ("forced", "sleep 1000"),
    ] {
        home.start_with(name, &["--rm"], &["sh", "-c", script]);
    }
    let waiting = home.spawn(&["wait", "by-itself"]);
    std::thread::sleep(Duration::from_millis(100));
    tell(&home, "by-itself");
    assert_eq!(waiting.wait_with_output().expect("end").stdout, b"7\n");
    home.done(&["kill", "killed"]);
    home.done(&["rm", "-f", "forced"]);
    home.no_machines();
}

#[test]
fn names_are_checked_before_anything_starts() {
    let home = Home::new();
    let run = |name: &str| {
        let args = [
            "run",
            "-d",
            "--hypervisor",
            "soft",
            "--name",
            name,
            "demo",
            "true",
        ];
        args.map(str::to_owned)
    };
    home.start("web", "sleep 1000");
    let refused = |name: &str, because: &[&str]| {
        let args = run(name);
        home.refused(&args.each_ref().map(String::as_str), because);
    };
    refused("web", &["web", "already"]);
    let long = "x".repeat(65);
    for name in ["a b", "../x", ".hidden", "a/b", "ä", "new\nline", &long] {
        refused(name, &["can't be a virtual machine's name"]);
    }
    home.refused(
        &[
            "run",
            "--hypervisor",
            "soft",
            "--name",
            "web",
            "demo",
            "true",
        ],
        &["web", "already"],
    );
    assert_eq!(home.names(&["-a"]), ["web"]);
    // A name is free when its machine is removed, not when it ends.
    home.done(&["kill", "web"]);
    refused("web", &["web", "already"]);
    home.done(&["rm", "web"]);
    home.start("web", "exit 0");
    assert_eq!(home.done(&["wait", "web"]), "0");
    // Without one, one is made up, and leads to the machine.
    let id = home.done(&["run", "-d", "--hypervisor", "soft", "demo", "sleep", "1000"]);
    let listed = home.listed(&[]);
    assert_eq!((listed.len(), &listed[0]["id"]), (1, &id.into()));
    let name = listed[0]["name"].as_str().expect("a name");
    home.exec(name, &["true"]).expect(0, "");
}

#[test]
fn who_is_not_there_is_named() {
    let home = Home::empty();
    let verbs: &[&[&str]] = &[
        &["exec", "nobody", "true"],
        &["logs", "nobody"],
        &["pause", "nobody"],
        &["unpause", "nobody"],
        &["stop", "nobody"],
        &["kill", "nobody"],
        &["wait", "nobody"],
        &["rm", "nobody"],
        &["rm", "-f", "nobody"],
        &["fork", "nobody"],
        &["snapshot", "create", "nobody"],
        &["snapshot", "create", "--diff", "nobody", "name"],
    ];
    for args in verbs {
        home.refused(args, &["no virtual machine nobody"]);
    }
    home.refused(&["restore", "nobody"], &["no snapshot 'nobody'"]);
    home.refused(&["restore", "-d", "nobody"], &["no snapshot 'nobody'"]);
    home.refused(
        &["run", "--from-snapshot", "nobody"],
        &["no snapshot 'nobody'"],
    );
    let missing = ["run", "-d", "--pull", "never", "no-such-image"];
    home.refused(&missing, &["no-such-image"]);
    home.refused(
        &["run", "-d", "--hypervisor", "soft", "dir:/nonexistent"],
        &["/nonexistent"],
    );
    assert_eq!(home.names(&["-a"]), [""; 0]);
}

#[test]
fn a_command_that_never_started_is_no_machine_that_runs() {
    let home = Home::new();
    let soft = ["run", "-d", "--rm", "--hypervisor", "soft", "demo"];
    for (command, status) in [("no-such-command", 127), ("/etc", 126)] {
        let ran = home.run(&[&soft[..], &[command]].concat());
        ran.expect(status, "");
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        assert!(ran.stderr.contains(command), "{}", ran.stderr);
    }
    home.no_machines();
    let ran = home.run(&[
        "run",
        "-d",
        "--name",
        "kept",
        "--hypervisor",
        "soft",
        "demo",
        "no-such-command",
    ]);
    ran.expect(127, "");
    let kept = home.info("kept").expect("known");
    assert_eq!(
        (&kept["status"], &kept["exit_code"]),
        (&"stopped".into(), &127.into())
    );
}

#[test]
fn a_killed_process_is_never_listed_as_running() {
    let home = Home::new();
    let gone = |name: &str| {
        eventually("the end", || home.status(name) == "failed");
        let vm = home.info(name).expect("known");
        assert_eq!(vm["exit_code"], 137, "{vm}");
        assert_eq!(home.names(&[]), [""; 0]);
        home.refused(&["exec", name, "true"], &[name, "not running"]);
        assert_eq!(home.done(&["wait", name]), "137");
        home.refused(
            &[
                "run",
                "-d",
                "--name",
                name,
                "--hypervisor",
                "soft",
                "demo",
                "true",
            ],
            &[name],
        );
        home.done(&["rm", name]);
        home.no_machines();
    };
    // While its guest starts.
    let starting = [
        "run",
        "-d",
        "--fresh",
        "--hypervisor",
        "soft",
        "--name",
        "vm",
        "demo",
        "sleep",
        "1000",
    ];
    let child = home.spawn(&starting);
    eventually("the place of the machine", || {
        home.status("vm") == "starting"
    });
    home.kill_process("vm");
    let output = child.wait_with_output().expect("end");
    assert_eq!(output.status.code(), Some(125));
    assert!(output.stdout.is_empty());
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
    gone("vm");
    // While its command runs; the same name serves again.
    home.start("vm", "sleep 1000");
    let exec = home.spawn(&["exec", "vm", "sh", "-c", "touch /up; sleep 1000"]);
    eventually("the exec", || {
        home.exec("vm", &["test", "-e", "/up"]).status == 0
    });
    home.kill_process("vm");
    let output = exec.wait_with_output().expect("end");
    assert_eq!(
        output.status.code(),
        Some(125),
        "an exec ends with its machine"
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.lines().count() == 1 && said.contains("ended before the command"),
        "{said}"
    );
    gone("vm");
    // While it stands still.
    home.start("vm", "sleep 1000");
    home.done(&["pause", "vm"]);
    home.kill_process("vm");
    gone("vm");
    // And one that nobody is to remember is forgotten.
    home.start_with("vm", &["--rm"], &["sleep", "1000"]);
    home.kill_process("vm");
    eventually("the end", || home.names(&["-a"]).is_empty());
    home.start("vm", "sleep 1000");
}

#[test]
fn a_run_in_the_foreground_is_a_machine_like_others() {
    let home = Home::new();
    let run = [
        "run",
        "--hypervisor",
        "soft",
        "--name",
        "fore",
        "demo",
        "sh",
        "-c",
    ];
    let mut child = home.spawn(&[&run[..], &["echo up; sleep 1000"]].concat());
    let mut seen = [0; 3];
    child
        .stdout
        .take()
        .expect("a pipe")
        .read_exact(&mut seen)
        .expect("up");
    assert_eq!(home.names(&[]), ["fore"]);
    assert_eq!(home.sh("fore", "echo there"), "there");
    home.refused(&["logs", "fore"], &["fore", "no log"]);
    home.done(&["stop", "-t", "5", "fore"]);
    assert_eq!(child.wait().expect("end").code(), Some(128 + 15));
    home.no_machines();
    // It is gone with its process, too.
    let mut child = home.spawn(&[&run[..], &["echo up; sleep 1000"]].concat());
    child
        .stdout
        .take()
        .expect("a pipe")
        .read_exact(&mut seen)
        .expect("up");
    assert_eq!(home.status("fore"), "running");
    child.kill().expect("kill");
    child.wait().expect("end");
    home.no_machines();
    home.done(&[&run[..], &["exit 0"]].concat());
}

#[test]
fn thirty_start_at_once() {
    let home = Home::new();
    std::thread::scope(|scope| {
        for number in 0..30 {
            let home = &home;
            scope.spawn(move || {
                let name = format!("vm-{number}");
                home.start(&name, &format!("echo {number} > /number; sleep 1000"));
            });
        }
    });
    assert_eq!(home.names(&[]).len(), 30);
    for number in (0..30).step_by(7) {
        let name = format!("vm-{number}");
        eventually("the file", || {
            home.exec(&name, &["cat", "/number"]).text() == format!("{number}\n")
        });
    }
    let names = home.names(&[]);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let begun = Instant::now();
    home.done(&[&["rm", "-f"], &names[..]].concat());
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    home.no_machines();
}

#[test]
fn a_detached_machine_needs_no_terminal_or_parent() {
    let home = Home::new();
    let mut command = home.command(&[
        "run",
        "-d",
        "--name",
        "vm",
        "--hypervisor",
        "soft",
        "demo",
        "sh",
        "-c",
        COUNTS,
    ]);
    // Whoever reads its output to the end isn't kept waiting by the machine's process.
    let output = command.stdin(Stdio::null()).output().expect("it ends");
    assert!(output.status.success());
    let vm = home.info("vm").expect("a machine");
    let pid = vm["pid"].as_u64().expect("a process");
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let (_, rest) = stat.rsplit_once(") ").expect("stat");
    let fields: Vec<_> = rest.split(' ').collect();
    // proc_pid_stat(5): its session is its own, and there is no terminal.
    assert_eq!(
        (fields[3], fields[4]),
        (pid.to_string().as_str(), "0"),
        "{stat}"
    );
    let count = || home.number("vm", "cat /count");
    eventually("a count", || {
        home.exec("vm", &["cat", "/count"]).status == 0
    });
    let before = count();
    eventually("progress", || count() > before);
    let last = home.done(&["logs", "-n", "1", "vm"]);
    assert!(last.parse::<u64>().is_ok(), "{last}");
}

#[test]
fn the_table_of_machines() {
    let home = Home::new();
    let states: [(&str, &str); 6] = [
        ("runs", "sleep 1000"),
        ("paused", "sleep 1000"),
        ("ended", "exit 3"),
        ("killed", "sleep 1000"),
        ("gone", "sleep 1000"),
        ("long", "echo a very long command\twith\ttabs; sleep 1000"),
    ];
    for (name, script) in states {
        home.start(name, script);
    }
    home.done(&["pause", "paused"]);
    home.done(&["wait", "ended"]);
    home.done(&["kill", "killed"]);
    home.kill_process("gone");
    home.done(&["wait", "gone"]);
    let table = |options: &[&str]| {
        let text = home.done(&[&["ps"], options].concat());
        let mut rows = vec![];
        for (number, line) in text.lines().enumerate() {
            // Columns are as wide as their longest cells, ages among them.
            let cells = line
                .split("  ")
                .map(str::trim)
                .filter(|cell| !cell.is_empty());
            let mut cells: Vec<_> = cells.map(str::to_owned).collect();
            if number > 0 {
                assert!(cells[0].bytes().all(|b| b.is_ascii_hexdigit()), "{line}");
                cells[0] = "0".repeat(cells[0].len());
                assert!(
                    cells[4] == "just now" || cells[4].ends_with(" ago"),
                    "{line}"
                );
                cells[4] = "just now".to_owned();
            }
            rows.push(cells.join(" | ") + "\n");
        }
        rows.concat()
    };
    let text = format!("{}{}{}", table(&[]), table(&["-a"]), table(&["--no-trunc"]));
    golden("ps.txt", &text);
}
