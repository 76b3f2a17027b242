//! Snapshots, restores and forks of running machines, end to end, on the software processor: what
//! goes on, what is whole, what is each clone's own, and what is refused.

mod common;

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::eventually;
use common::home::Home;
use common::registry::{Demands, Registry};
use serde_json::Value;
use sha2::{Digest, Sha256};

const SOFT: [&str; 2] = ["--hypervisor", "soft"];
/// Counts, in a file that is replaced and on stdout.
const COUNTS: &str =
    "i=0; while :; do i=$((i+1)); echo $i >/n; mv /n /count; echo $i; sleep 0.03; done";
/// The sum of all of a tree: names, kinds and contents.
const SUM: &str =
    "cd /data; { find . | sort; find . -type f | sort | xargs sha256sum; } | sha256sum";

/// The lines of a machine's log, each a number.
#[track_caller]
fn counted(home: &Home, name: &str) -> Vec<u64> {
    let text = home.done(&["logs", name]);
    let numbers = text.lines().map(|line| line.parse().expect("a number"));
    numbers.collect()
}

/// Asserts that each is one more than the one before.
#[track_caller]
fn consecutive(numbers: &[u64]) {
    let next = numbers.windows(2).find(|pair| pair[1] != pair[0] + 1);
    assert_eq!(next, None, "of {}", numbers.len());
}

#[test]
fn everyone_counts_on_from_the_same_place() {
    let home = Home::new();
    home.start("parent", COUNTS);
    eventually("a count", || counted(&home, "parent").len() > 3);
    let count = |name: &str| home.number(name, "cat /count");
    let before = count("parent");
    home.done(&["snapshot", "create", "parent", "mark"]);
    let forked = home.done(&["fork", "--count", "2", "--name", "child", "parent"]);
    let after = count("parent");
    assert_eq!(forked.lines().count(), 2);
    std::thread::sleep(Duration::from_secs(1));
    home.restore("mark", "restored");
    for name in ["child-1", "child-2", "restored"] {
        eventually("a count", || counted(&home, name).len() > 3);
        let numbers = counted(&home, name);
        consecutive(&numbers);
        // The line of the first may have been written before its moment.
        assert!(
            (before..=after + 1).contains(&numbers[0]),
            "{name}: {before} {numbers:?} {after}"
        );
        let reached = count(name);
        assert!(reached > numbers[0]);
        let info = home.info(name).expect("a machine");
        let from = if name == "restored" { "mark" } else { "parent" };
        assert_eq!(info["parent"], from, "{info}");
        assert_eq!(info["command"][2], COUNTS);
    }
    let first = counted(&home, "restored")[0];
    assert!(count("parent") > first + 10, "the parent goes on meanwhile");
    let numbers = counted(&home, "parent");
    assert_eq!(numbers[0], 1);
    consecutive(&numbers);
    // Nobody sees what another writes.
    for name in ["parent", "child-1", "child-2", "restored"] {
        assert_eq!(
            home.sh(
                name,
                &format!("test -e /mine || echo {name} > /mine; cat /mine")
            ),
            name
        );
    }
    // A child has children.
    home.done(&["fork", "--name", "grandchild", "child-1"]);
    assert_eq!(home.sh("grandchild", "cat /mine"), "child-1");
    home.done(&["kill", "child-1", "parent"]);
    let before = count("grandchild");
    eventually("progress", || count("grandchild") > before);
    assert_eq!(home.sh("child-2", "cat /mine"), "child-2");
}

#[test]
fn a_chain_of_differences_has_the_files_of_each_moment() {
    let home = Home::new();
    home.start("vm", "sleep 1000");
    home.sh(
        "vm",
        "echo 0 > /dev/shm/step; mkdir /data; cd /data; for i in $(seq 200); do echo $i > $i; done",
    );
    // Each moment: files made, changed, grown, cut, renamed and removed; on the disk and in memory.
    let changes = |step: u32| {
        format!(
            "cd /data; mkdir d{step}; head -c 300000 /dev/urandom > d{step}/random; \
             for i in $(seq {step} 7 200); do echo {step} >> $i; done; rm -f {step}1 {step}3; \
             mv {step}2 d{step}/moved; : > {step}4; ln -s ../5 d{step}/link; \
             test {step} -lt 3 || rm -r d$(({step} - 2)); \
             head -c 200000 /dev/urandom > /dev/shm/memory; echo {step} > /dev/shm/step; \
             test $(({step} % 2)) = 1 || sync"
        )
    };
    let sum = |name: &str| home.sh(name, &format!("{SUM}; sha256sum /dev/shm/*"));
    let mut sums = vec![];
    for step in 0..6 {
        if step > 0 {
            home.sh("vm", &changes(step));
        }
        sums.push(sum("vm"));
        let name = format!("step-{step}");
        let diff: &[&str] = if step == 0 { &[] } else { &["--diff"] };
        home.done(&[&["snapshot", "create"], diff, &["vm", &name]].concat());
    }
    home.sh("vm", "rm -r /data /dev/shm/*");
    home.done(&["rm", "-f", "vm"]);
    let inspect = |name: &str| home.inspect(name);
    let full = inspect("step-0");
    assert!(full["parent"].is_null());
    let mut parent = full["id"].clone();
    for (step, sum_then) in sums.iter().enumerate() {
        let name = format!("step-{step}");
        let details = inspect(&name);
        if step > 0 {
            assert_eq!(details["parent"], parent, "{name}");
            assert!(
                details["size"].as_u64() < full["size"].as_u64(),
                "{details}"
            );
            parent = details["id"].clone();
        }
        home.restore(&name, &name);
        assert_eq!(sum(&name), *sum_then, "{name}");
    }
    let distinct: HashSet<_> = sums.iter().collect();
    assert_eq!(distinct.len(), 6);
    // A clone of a difference is good for further ones.
    home.sh(
        "step-3",
        "cd /data; rm 1*; echo on > on; sync; echo on > /dev/shm/on",
    );
    let expected = sum("step-3");
    home.done(&["snapshot", "create", "--diff", "step-3", "branch"]);
    assert_eq!(inspect("branch")["parent"], inspect("step-3")["id"]);
    home.done(&["rm", "-f", "step-3"]);
    home.restore("branch", "branch");
    assert_eq!(sum("branch"), expected);
    assert_eq!(sum("step-5"), sums[5]);
    // What others are differences to stays; without it they would be nothing.
    home.refused(&["snapshot", "rm", "step-2"], &["is needed by"]);
    for name in ["branch", "step-5", "step-4", "step-3", "step-2"] {
        home.done(&["snapshot", "rm", name]);
    }
    // The file system is a healthy one after all that.
    assert_eq!(
        home.sh("step-5", "echo x > /data/new; sync; cat /data/new"),
        "x"
    );
}

#[test]
fn a_snapshot_with_its_image_goes_anywhere() {
    let (home, other) = (Home::new(), Home::empty());
    home.start_with("vm", &["-e", "A=b"], &["sh", "-c", COUNTS]);
    home.sh("vm", "echo precious > /root/file");
    home.done(&["snapshot", "create", "--with-image", "vm", "whole"]);
    home.done(&["snapshot", "create", "vm", "bare"]);
    let path = |name: &str| home.path(name).to_str().expect("UTF-8").to_owned();
    for name in ["whole", "bare"] {
        let archive = path(&format!("{name}.tar"));
        home.done(&["snapshot", "export", name, &archive]);
        other.done(&["snapshot", "import", &archive, "--name", name]);
    }
    let restore = |name| [&["restore", "-d", "--name", "vm"], &SOFT[..], &[name]].concat();
    other.refused(
        &restore("bare"),
        &["needs the image demo", "isn't in the store"],
    );
    assert_eq!(other.names(&["-a"]), [""; 0]);
    other.done(&restore("whole"));
    let script = "cat /root/file; echo $A; /bin/echo from the image";
    assert_eq!(other.sh("vm", script), "precious\nb\nfrom the image");
    eventually("progress", || counted(&other, "vm").len() > 3);
    consecutive(&counted(&other, "vm"));
    assert_eq!(other.done(&["images", "-q"]), "", "it brings itself alone");
    // What goes on from it can be kept and forked there.
    other.done(&["snapshot", "create", "--diff", "vm", "next"]);
    other.done(&["rm", "-f", "vm"]);
    other.restore("next", "again");
    other.done(&["fork", "--name", "child", "again"]);
    assert_eq!(other.sh("child", script), "precious\nb\nfrom the image");
    // With the image there, the bare one will do.
    other.done(&[&["run"], &SOFT[..], &["demo", "true"]].concat());
    other.done(&restore("bare"));
    assert_eq!(other.sh("vm", script), "precious\nb\nfrom the image");
}

/// A snapshot's documents in an exported directory, with a change made and every digest put right.
fn forge(folder: &Path, change: impl FnOnce(&mut Value, &mut Value)) {
    let blob = |digest: &Value| {
        let digest = digest.as_str().expect("a digest").strip_prefix("sha256:");
        folder.join("blobs/sha256").join(digest.expect("SHA-256"))
    };
    let read = |path: &Path| -> Value {
        serde_json::from_slice(&std::fs::read(path).expect("a document")).expect("JSON")
    };
    let put = |descriptor: &mut Value, document: &Value| {
        let bytes = serde_json::to_vec(document).expect("JSON");
        let digest = Sha256::digest(&bytes);
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::remove_file(blob(&descriptor["digest"])).expect("the old one goes");
        descriptor["digest"] = format!("sha256:{hex}").into();
        descriptor["size"] = bytes.len().into();
        std::fs::write(blob(&descriptor["digest"]), bytes).expect("written");
    };
    let mut index = read(&folder.join("index.json"));
    let mut manifest = read(&blob(&index["manifests"][0]["digest"]));
    let mut config = read(&blob(&manifest["config"]["digest"]));
    let layers = manifest["layers"].as_array().expect("layers");
    let is_state =
        |layer: &Value| layer["mediaType"] == "application/vnd.skerry.machine-state.v1+json";
    let at = layers.iter().position(is_state).expect("a state");
    let mut state = read(&blob(&manifest["layers"][at]["digest"]));
    change(&mut config, &mut state);
    put(&mut manifest["config"], &config);
    put(&mut manifest["layers"][at], &state);
    put(&mut index["manifests"][0], &manifest);
    std::fs::write(folder.join("index.json"), index.to_string()).expect("written");
}

#[test]
fn what_cannot_go_on_here_is_refused_by_name() {
    let home = Home::new();
    home.start("vm", "sleep 1000");
    home.done(&["snapshot", "create", "vm", "base"]);
    home.done(&["snapshot", "create", "--diff", "vm", "diff"]);
    home.done(&["rm", "-f", "vm"]);
    let text = |name: &str| home.path(name).to_str().expect("UTF-8").to_owned();
    type Change = fn(&mut Value, &mut Value);
    let forged: [(&str, Change, &[&str]); 6] = [
        // Leaf 7, EBX bit 16 is AVX-512F, which the software processor doesn't have (SDM vol. 2A, CPUID).
        (
            "cpu-feature",
            |config, _| {
                let tables = config["config"]["cpuid"].as_array_mut().expect("tables");
                for entry in tables
                    .iter_mut()
                    .flat_map(|t| t["entries"].as_array_mut().expect("entries"))
                {
                    if entry["leaf"] == 7 && entry["subleaf"] == 0 {
                        let ebx = entry["result"]["ebx"].as_u64().expect("a register");
                        entry["result"]["ebx"] = (ebx | 1 << 16).into();
                    }
                }
            },
            &["0x7 ebx bit 16"],
        ),
        (
            "format-version",
            |config, _| config["version"] = 99.into(),
            &["version 99"],
        ),
        (
            "state-version",
            |_, state| state["version"] = 99.into(),
            &["version"],
        ),
        (
            "no-state",
            |_, state| *state = serde_json::json!({}),
            &["machine state"],
        ),
        (
            "no-processor",
            |_, state| state["cpus"] = serde_json::json!([]),
            &["processors"],
        ),
        (
            "other-image",
            |config, _| config["config"]["image"]["rootfs"] = "00".repeat(32).into(),
            &["image demo"],
        ),
    ];
    let mut names = vec![];
    for (name, change, because) in forged {
        let folder = text(name);
        home.done(&["snapshot", "export", "base", &folder]);
        forge(Path::new(&folder), change);
        let ran = home.run(&["snapshot", "import", &folder, "--name", name]);
        if ran.status != 0 {
            // What can be seen without knowing machines is refused at the door.
            assert!(
                because.iter().all(|word| ran.stderr.contains(word)),
                "{name}: {}",
                ran.stderr
            );
            continue;
        }
        names.push((name, because));
    }
    assert!(names.len() >= 4, "{names:?}");
    for (name, because) in names {
        for verb in [
            &["restore", name][..],
            &["restore", "-d", name],
            &["run", "--from-snapshot", name, "true"],
        ] {
            let ran = home.refused(&[&verb[..1], &SOFT, &verb[1..]].concat(), &[]);
            let said = ran.stderr.to_lowercase();
            for word in because {
                assert!(said.contains(word), "{name}: {said}");
            }
            assert!(!said.contains("panic"), "{name}: {said}");
        }
    }
    // A difference without what it is one to.
    let archive = text("diff.tar");
    let ran = home.run(&["snapshot", "export", "diff", &archive]);
    assert!(
        ran.status == 0 && ran.stderr.contains("needed with it"),
        "{}",
        ran.stderr
    );
    let other = Home::new();
    let import = ["snapshot", "import", &archive, "--name", "diff"];
    other.refused(&import, &["is a difference to", "import that one first"]);
    other.refused(&[&["restore"], &SOFT[..], &["diff"]].concat(), &["diff"]);
    // With that it goes.
    let chain = text("chain.tar");
    home.done(&["snapshot", "export", "--with-parents", "diff", &chain]);
    other.done(&["snapshot", "import", &chain, "--name", "diff"]);
    other.restore("diff", "vm");
    other.exec("vm", &["true"]).expect(0, "");
    other.done(&["rm", "-f", "vm"]);
    // One whose parent went: nobody but a careless hand removes that.
    let gone = home.inspect("base")["id"].clone();
    let gone = gone
        .as_str()
        .expect("an identity")
        .trim_start_matches("sha256:");
    let stored = home.path("skerry/snapshots").join(gone);
    let aside = home.path("aside");
    std::fs::rename(&stored, &aside).expect("aside");
    home.refused(
        &[&["restore"], &SOFT[..], &["diff"]].concat(),
        &["is a difference to"],
    );
    home.refused(
        &[&["restore", "-d"], &SOFT[..], &["diff"]].concat(),
        &["is a difference to"],
    );
    std::fs::rename(&aside, &stored).expect("back");
    other.no_machines();
    home.no_machines();
    // None of that has harmed the good one.
    home.restore("diff", "vm");
    home.exec("vm", &["true"]).expect(0, "");
}

#[test]
fn a_booted_machine_has_nothing_to_differ_from() {
    let home = Home::new();
    home.start_with("vm", &["--fresh"], &["sh", "-c", COUNTS]);
    home.refused(
        &["snapshot", "create", "--diff", "vm", "a"],
        &["vm", "goes on from no snapshot"],
    );
    for bad in ["a b", "-x", "start-x"] {
        home.refused(&["snapshot", "create", "vm", "--", bad], &[bad]);
    }
    home.done(&["snapshot", "create", "vm", "a"]);
    home.sh("vm", "echo later > /later");
    home.done(&["snapshot", "create", "--diff", "vm", "b"]);
    // The name goes from one to the other.
    home.done(&["snapshot", "create", "--diff", "vm", "a"]);
    home.done(&["fork", "--name", "child", "vm"]);
    home.restore("a", "restored");
    for name in ["vm", "child", "restored"] {
        assert_eq!(home.sh(name, "cat /later"), "later");
        eventually("progress", || counted(&home, name).len() > 3);
        consecutive(&counted(&home, name));
    }
}

#[test]
fn ten_children_answer() {
    let home = Home::new();
    // Twelve processors' worth of guests share this machine.
    let counts = COUNTS.replace("0.03", "0.3");
    home.start_with(
        "parent",
        &["-e", "A=b", "--memory", "1G", "--cpus", "2"],
        &["sh", "-c", &counts],
    );
    home.sh(
        "parent",
        "echo shared > /file; head -c 1000000 /dev/urandom > /dev/shm/x",
    );
    let sum = home.sh("parent", "sha256sum /dev/shm/x");
    let text = home.done(&[
        "fork", "--count", "10", "--name", "c", "--rm", "--format", "json", "parent",
    ]);
    let forked: Value = serde_json::from_str(&text).expect("JSON");
    let ids = forked["ids"].as_array().expect("identities");
    let distinct: HashSet<_> = ids.iter().map(|id| id.as_str().expect("text")).collect();
    assert_eq!(distinct.len(), 10);
    assert!(
        forked["pause_us"].as_u64() <= forked["freeze_us"].as_u64(),
        "{forked}"
    );
    std::thread::scope(|scope| {
        for number in 1..=10 {
            let (home, sum) = (&home, &sum);
            scope.spawn(move || {
                let name = format!("c-{number}");
                assert_eq!(home.sh(&name, "cat /file; echo $A; nproc"), "shared\nb\n2");
                assert_eq!(home.sh(&name, "sha256sum /dev/shm/x"), *sum);
                eventually("progress", || counted(home, &name).len() > 2);
                consecutive(&counted(home, &name));
            });
        }
    });
    // A name that one of them can't have: those that were made are told.
    home.done(&["rm", "-f", "c-1"]);
    home.refused(
        &["fork", "-n", "2", "--name", "c", "parent"],
        &["c-2", "already"],
    );
    home.refused(&["fork", "--name", "a b", "parent"], &["a b"]);
    assert_eq!(home.run(&["fork", "--count", "0", "parent"]).status, 125);
}

#[test]
fn a_command_with_a_terminal_is_forked_with_it() {
    let home = Home::new();
    let script = "i=0; while :; do i=$((i+1)); test -t 0 && test -t 1 && echo $i $(stty size); sleep 0.05; done";
    home.start_with("parent", &["-t"], &["sh", "-c", script]);
    let last = |name: &str| home.done(&["logs", "-n", "1", name]).trim_end().to_owned();
    eventually("output", || last("parent").ends_with("24 80"));
    home.done(&["fork", "--name", "child", "parent"]);
    eventually("output", || last("child").ends_with("24 80"));
    let before = last("child");
    eventually("progress", || last("child") != before);
    // Its terminal's keys work.
    home.done(&["stop", "child"]);
    assert_eq!(home.info("child").expect("known")["tty"], true);
    assert_eq!(home.status("parent"), "running");
}

/// Sends a line and gives the answer.
fn talk(
    child: &mut Child,
    answers: &mut impl Iterator<Item = std::io::Result<String>>,
    line: &str,
) -> String {
    let input = child.stdin.as_mut().expect("a pipe");
    writeln!(input, "{line}").expect("write");
    answers.next().expect("an answer").expect("UTF-8")
}

#[test]
fn connections_are_the_parents_own() {
    let home = Home::new();
    // A command that reads its input goes on with that of whoever lets it go on.
    let script = "n=0; while read line; do n=$((n+1)); echo $n $line; done; echo end $n";
    let run = [
        &["run", "-i", "--name", "parent"],
        &SOFT[..],
        &["demo", "sh", "-c", script],
    ]
    .concat();
    let mut parent = home.spawn(&run);
    let mut answers = BufReader::new(parent.stdout.take().expect("a pipe")).lines();
    assert_eq!(talk(&mut parent, &mut answers, "a"), "1 a");
    assert_eq!(talk(&mut parent, &mut answers, "b"), "2 b");
    // A command on its way, in a machine that is taken: goes on there, and is dead in clones.
    let mut exec = home.spawn(&[
        "exec",
        "-i",
        "parent",
        "sh",
        "-c",
        "echo on; read x; echo $x; exec sleep 0.1",
    ]);
    let mut said = BufReader::new(exec.stdout.take().expect("a pipe")).lines();
    assert_eq!(said.next().expect("a line").expect("UTF-8"), "on");
    let lone = home.spawn(&["exec", "parent", "sleep", "986"]);
    let sleeps = |name: &str| {
        home.exec(name, &["sh", "-c", "ps | grep -q '[s]leep 986'"])
            .status
            == 0
    };
    eventually("the sleep", || sleeps("parent"));
    home.done(&["snapshot", "create", "parent", "talk"]);
    assert_eq!(talk(&mut parent, &mut answers, "c"), "3 c");
    let mut clone = home.spawn(
        &[
            &["run", "--name", "clone"],
            &SOFT[..],
            &["--from-snapshot", "talk"],
        ]
        .concat(),
    );
    let mut echoed = BufReader::new(clone.stdout.take().expect("a pipe")).lines();
    assert_eq!(talk(&mut clone, &mut echoed, "x"), "3 x");
    assert_eq!(talk(&mut clone, &mut echoed, "y"), "4 y");
    assert!(sleeps("parent"), "it is its client's");
    eventually("the end of a command without a client", || !sleeps("clone"));
    assert_eq!(talk(&mut exec, &mut said, "still here"), "still here");
    assert_eq!(exec.wait().expect("end").code(), Some(0));
    // The ends of their inputs are two.
    drop(clone.stdin.take());
    assert_eq!(echoed.next().expect("a line").expect("UTF-8"), "end 4");
    assert_eq!(clone.wait().expect("end").code(), Some(0));
    assert_eq!(talk(&mut parent, &mut answers, "d"), "4 d");
    drop(parent.stdin.take());
    assert_eq!(answers.next().expect("a line").expect("UTF-8"), "end 4");
    assert_eq!(parent.wait().expect("end").code(), Some(0));
    let mut lone = lone;
    assert_eq!(
        lone.wait().expect("end").code(),
        Some(125),
        "its machine is gone"
    );
    // A command of one's own instead of the one that runs there, with its status.
    let ran = home.run(
        &[
            &["run"],
            &SOFT[..],
            &["--from-snapshot", "talk", "sh", "-c", "exit 9"],
        ]
        .concat(),
    );
    assert_eq!(ran.status, 9, "{}", ran.stderr);
    home.no_machines();
}

#[test]
fn a_warmed_up_image_starts_warm() {
    let home = Home::new();
    let warm = |options: &[&str], script: &str| {
        let args = [
            &["warm"],
            &SOFT[..],
            options,
            &["demo", "--exec", "sh", "-c", script],
        ]
        .concat();
        home.run(&args)
    };
    let run =
        |script: &str| home.done(&[&["run"], &SOFT[..], &["demo", "sh", "-c", script]].concat());
    // What a command that has ended left in memory and on the disk.
    assert_eq!(
        warm(&[], "echo loaded > /dev/shm/state; echo kept > /root/kept").status,
        0
    );
    for _ in 0..2 {
        let script = "cat /dev/shm/state /root/kept; echo other > /dev/shm/state; rm /root/kept";
        assert_eq!(run(script), "loaded\nkept");
    }
    // One that fails takes the place of nothing.
    let ran = warm(&[], "echo why; exit 3");
    assert_eq!(ran.status, 125);
    assert!(
        ran.stderr.contains("exit status 3") && ran.stderr.contains("why"),
        "{}",
        ran.stderr
    );
    assert_eq!(run("cat /dev/shm/state"), "loaded");
    // One that goes on, in every run, from where it was ready.
    let counts = "i=0; while :; do i=$((i+1)); echo $i > /n; mv /n /count; [ $i != 5 ] || echo ready; sleep 0.05; done";
    let named = warm(&["--ready", "ready", "--name", "server"], counts);
    assert_eq!(named.status, 0, "{}", named.stderr);
    for _ in 0..2 {
        let count: u64 = run("cat /count").parse().expect("a number");
        assert!((4..100).contains(&count), "{count}");
    }
    home.restore("server", "vm");
    let before = home.number("vm", "cat /count");
    eventually("progress", || home.number("vm", "cat /count") > before);
    let silent = warm(&["--ready", "never written"], "echo something else");
    assert_eq!(silent.status, 125);
    assert!(silent.stderr.contains("never written"), "{}", silent.stderr);
}

/// Draws random numbers as fast as it can, and says between which identities of its machine it did.
const DRAWS: &str = "cd /run/skerry; n=0; { read g; read first; } <clone; while [ $n -lt 60 ]; do \
    { read g; read a; } <clone; read u </proc/sys/kernel/random/uuid; { read g; read b; } <clone; \
    echo \"${a#id } ${b#id } $u\"; [ \"$a\" = \"$first\" ] || n=$((n+1)); done; exec sleep 1000";
/// What a new process finds.
const FINDS: &str = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id /etc/machine-id; \
    head -c 16 /dev/urandom | od -An -tx1; sed -n 's/^id //p' /run/skerry/clone; \
    sed -n 's/^generation //p' /run/skerry/clone; date +%s; hostname";

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("a clock").as_secs()
}

#[test]
fn no_two_clones_are_alike() {
    let home = Home::new();
    home.start("parent", DRAWS);
    home.sh(
        "parent",
        "echo 0123456789abcdef0123456789abcdef > /etc/machine-id",
    );
    let original = home.sh("parent", "sed -n 's/^id //p' /run/skerry/clone");
    eventually("draws", || {
        home.done(&["logs", "-n", "1", "parent"])
            .contains(&original)
    });
    home.done(&["snapshot", "create", "parent", "seed"]);
    home.done(&["fork", "--count", "5", "--name", "forked", "parent"]);
    home.done(&["kill", "parent"]);
    std::thread::sleep(Duration::from_secs(2));
    let begun = now();
    std::thread::scope(|scope| {
        for half in 0..2 {
            let home = &home;
            scope.spawn(move || {
                for number in (half..20).step_by(2) {
                    home.restore("seed", &format!("restored-{number}"));
                }
            });
        }
    });
    let mut all: BTreeMap<&str, HashSet<String>> = BTreeMap::new();
    let mut once = |kind, value: &str| {
        let new = all.entry(kind).or_default().insert(value.to_owned());
        assert!(new, "{kind} {value} came twice");
    };
    let names = home.names(&[]);
    assert_eq!(names.len(), 25);
    for name in &names {
        let found = home.sh(name, FINDS);
        let lines: Vec<_> = found.lines().collect();
        let [uuid, boot, machine, random, id, generation, time, host] = lines[..] else {
            panic!("{name}: {found}");
        };
        once("uuid", uuid);
        once("boot_id", boot);
        once("random", random);
        once("clone", id);
        assert_eq!((machine.len(), host), (32, "skerry"));
        once("machine-id", machine);
        assert_eq!(generation, "2", "{name} is a clone of a clone of a boot");
        let time: u64 = time.parse().expect("a number");
        assert!(
            (begun..=now() + 1).contains(&time),
            "{name}: {time}, not {begun}"
        );
        // The process that was drawing when its machine was taken.
        let draws = || home.done(&["logs", name]);
        eventually("the draws", || draws().lines().count() >= 60);
        let mut before = 0;
        for line in draws().lines() {
            let words: Vec<_> = line.split(' ').collect();
            let [from, to, drawn] = words[..] else {
                panic!("{name}: {line}")
            };
            match (from == id, to == id) {
                // Drawn by the clone, as one of its own.
                (true, true) => once("drawn", drawn),
                // On its way when the machine was taken; there is no more than one such.
                _ => before += 1,
            }
            assert!(
                before < 2,
                "{name} drew before it was one of its own: {line}"
            );
        }
    }
}

#[test]
fn snapshots_travel_by_way_of_a_registry_with_what_they_differ_from() {
    let Some(registry) = Registry::start(Demands::default()) else {
        return;
    };
    let (home, other) = (Home::new(), Home::empty());
    home.start(
        "counts",
        "n=0; while :; do n=$((n+1)); echo $n > /n; sleep 0.05; done",
    );
    let base = home.done(&["snapshot", "create", "--with-image", "counts", "base"]);
    home.sh("counts", "echo kept > /later");
    let diff = home.done(&[
        "snapshot",
        "create",
        "--diff",
        "--with-image",
        "counts",
        "diff",
    ]);
    let name = registry.name("snapshots/counts:v1");
    let pushed = home.done(&["snapshot", "push", "diff", &name]);
    assert!(pushed.starts_with("v1: digest: sha256:"), "{pushed}");
    // What is there isn't sent again, and a name that means nothing is an error.
    home.done(&["snapshot", "push", "-q", "diff", &name]);
    home.refused(&["snapshot", "push", "nobody", &name], &["nobody"]);

    let pulled = other.done(&["snapshot", "pull", "--name", "there", &name]);
    assert_eq!(
        pulled.trim_start_matches("sha256:"),
        diff.trim_start_matches("sha256:")
    );
    let listed = other.done(&["snapshot", "ls", "-q", "--format", "json"]);
    assert!(
        listed.contains(base.trim_start_matches("sha256:")),
        "{listed}"
    );
    other.restore("there", "goes-on");
    assert_eq!(other.sh("goes-on", "cat /later"), "kept");
    let before = other.number("goes-on", "cat /n");
    eventually("it counts on", || {
        other.number("goes-on", "cat /n") > before
    });

    // An image is no snapshot, and a spoilt part is none either.
    let image = registry.name("demo:v1");
    home.done(&["tag", "demo", &image]);
    home.done(&["push", "-q", &image]);
    let empty = Home::empty();
    empty.refused(&["snapshot", "pull", &image], &["vnd.skerry.snapshot"]);
    let blob = registry.blob(&registry.largest_blob());
    let mut content = std::fs::read(&blob).expect("a blob");
    let middle = content.len() / 2;
    content[middle] ^= 1;
    std::fs::write(&blob, content).expect("spoilt");
    assert_eq!(empty.run(&["snapshot", "pull", &name]).status, 125);
    assert_eq!(empty.done(&["snapshot", "ls", "-q"]), "");
}
