//! The command line itself: what it prints and how it fails, without a machine.

mod common;

use common::{golden, run};

#[test]
fn help_texts() {
    let commands: &[&[&str]] = &[
        &[],
        &["run"],
        &["warm"],
        &["pool"],
        &["pool", "create"],
        &["pool", "exec"],
        &["pool", "stats"],
        &["restore"],
        &["fork"],
        &["exec"],
        &["ps"],
        &["inspect"],
        &["logs"],
        &["pause"],
        &["unpause"],
        &["stop"],
        &["kill"],
        &["wait"],
        &["rm"],
        &["boot"],
        &["pull"],
        &["push"],
        &["tag"],
        &["save"],
        &["load"],
        &["image"],
        &["image", "inspect"],
        &["image", "history"],
        &["image", "prune"],
        &["snapshot"],
        &["snapshot", "create"],
        &["snapshot", "ls"],
        &["snapshot", "inspect"],
        &["snapshot", "rm"],
        &["snapshot", "export"],
        &["snapshot", "import"],
        &["snapshot", "prune"],
    ];
    for command in commands {
        let ran = run(&[command, &["--help"][..]].concat());
        assert_eq!(ran.status, 0, "{command:?}: {}", ran.stderr);
        let name = [&["help"], *command].concat().join("-");
        golden(&format!("{name}.txt"), &ran.text());
    }
}

/// What the verbs on machines and snapshots say of what isn't there or can't be.
#[test]
fn error_lines() {
    let folder = tempfile::tempdir().expect("folder");
    let lines: &[&[&str]] = &[
        &["exec", "nobody", "true"],
        &["inspect", "nobody"],
        &["logs", "nobody"],
        &["pause", "nobody"],
        &["stop", "nobody", "no/name"],
        &["rm", "nobody"],
        &["fork", "nobody"],
        &["fork", "--count", "1001", "nobody"],
        &["restore", "nothing"],
        &["run", "--from-snapshot", "nothing", "true"],
        &[
            "run",
            "--from-snapshot",
            "nothing",
            "--memory",
            "1G",
            "true",
        ],
        &["run"],
        &["run", "-d", "--stats", "demo"],
        &["run", "--soft-mode", "fast", "demo"],
        &[
            "run",
            "--hypervisor",
            "soft",
            "--soft-code-memory",
            "1K",
            "demo",
        ],
        &["run", "-d", "--name", "a b", "demo", "true"],
        &["exec", "nobody"],
        &["stop", "--time", "soon", "nobody"],
        &["kill", "--signal", "NONE", "nobody"],
        &["snapshot", "create", "nobody", "name"],
        &["snapshot", "rm", "nothing"],
        &["snapshot", "inspect", "../name"],
    ];
    let mut text = String::new();
    for args in lines {
        let mut command = common::skerry(args);
        command.env("XDG_DATA_HOME", folder.path());
        let ran = common::run_with(command, b"");
        assert_eq!(ran.status, 125, "{args:?}: {}", ran.stderr);
        assert!(ran.stdout.is_empty(), "{args:?}");
        text.push_str(&format!("$ skerry {}\n{}", args.join(" "), ran.stderr));
    }
    golden("errors.txt", &text);
}

#[test]
fn version_in_both_formats() {
    let ran = run(&["version"]);
    ran.expect(
        0,
        &format!("skerry {} (kvm, soft)\n", env!("CARGO_PKG_VERSION")),
    );
    let json: serde_json::Value =
        serde_json::from_slice(&run(&["version", "--format", "json"]).stdout).expect("JSON");
    assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(run(&["--version"]).status, 0);
}

#[test]
fn completions_and_man_pages_are_made() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(&["completion", shell]).text();
        assert!(
            script.contains("skerry") && script.contains("hypervisor"),
            "{shell}"
        );
    }
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().to_str().expect("UTF-8");
    assert_eq!(run(&["man", path]).status, 0);
    let page = std::fs::read_to_string(folder.path().join("skerry-run.1")).expect("page");
    assert!(page.contains("\\-\\-entrypoint"));
    let page = std::fs::read_to_string(folder.path().join("skerry-snapshot-ls.1")).expect("page");
    assert!(page.contains("\\-\\-quiet"));
}

/// Everything that is skerry's own failure: status 125, nothing on stdout, one message that names
/// the thing.
#[test]
fn failures_name_the_thing() {
    let cases: &[(&[&str], &str)] = &[
        (&["frobnicate"], "frobnicate"),
        (&["run"], "IMAGE"),
        (&["run", "--memory", "lots", "demo"], "lots"),
        (&["run", "--memory", "1K", "demo", "true"], "--memory"),
        (&["run", "--cpus", "0", "demo"], "--cpus"),
        (&["run", "--cpus", "1000", "demo"], "--cpus"),
        (&["run", "--timeout", "soon", "demo"], "soon"),
        (&["run", "--hypervisor", "magic", "demo"], "magic"),
        (
            &["run", "--cpu-model", "pentium", "demo", "true"],
            "pentium",
        ),
        (
            &["run", "oci:/nonexistent/layout:latest"],
            "/nonexistent/layout",
        ),
        (&["run", "oci-archive:/nonexistent.tar"], "/nonexistent.tar"),
        (
            &["run", "docker-archive:/nonexistent.tar"],
            "/nonexistent.tar",
        ),
        (&["run", "dir:/nonexistent"], "/nonexistent"),
        (
            &["run", "--pull", "never", "no-such-image"],
            "no-such-image",
        ),
        (&["rmi", "no-such-image"], "no-such-image"),
        (
            &["boot", "--kernel", "/nonexistent/kernel"],
            "/nonexistent/kernel",
        ),
        (&["boot", "--kernel", "/dev/null"], "/dev/null"),
        (&["boot", "--kernel", "/etc/passwd"], "/etc/passwd"),
        (
            &["boot", "--initrd", "/nonexistent/initrd"],
            "/nonexistent/initrd",
        ),
        (
            &["boot", "--disk", "/nonexistent/disk"],
            "/nonexistent/disk",
        ),
        (&["boot", "--serial", "carrier-pigeon"], "carrier-pigeon"),
        (
            &["boot", "--serial", "file=/nonexistent/log"],
            "/nonexistent/log",
        ),
        (&["boot", "--debug-exit", "front-door"], "front-door"),
        (&["boot", "--memory", "100000G"], "--memory"),
    ];
    for (args, names) in cases {
        let ran = run(args);
        assert_eq!(ran.status, 125, "{args:?}: {}", ran.stderr);
        assert!(ran.stdout.is_empty(), "{args:?}");
        assert!(ran.stderr.contains(names), "{args:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("panicked"), "{args:?}: {}", ran.stderr);
    }
}

#[test]
fn doctor_speaks_of_every_backend() {
    let ran = run(&["doctor", "--format", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&ran.stdout).expect("JSON");
    let backends = json["hypervisors"].as_array().expect("a list");
    let names: Vec<_> = backends.iter().map(|b| b["backend"].as_str()).collect();
    assert_eq!(names, [Some("kvm"), Some("soft")]);
    for backend in backends {
        if backend["usable"] == true {
            assert!(backend["mips"].as_f64().expect("speed") > 1.0);
        } else {
            assert!(!backend["reason"].as_str().expect("reason").is_empty());
            assert!(!backend["remedy"].as_str().expect("remedy").is_empty());
        }
    }
    let soft = &backends[1];
    assert_eq!(
        soft["usable"], true,
        "the software processor works everywhere"
    );
    assert_eq!(ran.status, 0);
    let text = run(&["doctor"]).text();
    assert!(text.contains("--hypervisor auto uses"), "{text}");
    // Where KVM is refused, asking for it by name is an error with the same reason.
    if let Some(reason) = backends[0]["reason"].as_str() {
        let ran = run(&["run", "--hypervisor", "kvm", "demo", "true"]);
        assert_eq!(ran.status, 125);
        let words: Vec<_> = reason.split(' ').take(4).collect();
        assert!(ran.stderr.contains(&words.join(" ")), "{}", ran.stderr);
    }
}

#[test]
fn an_empty_store_lists_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let mut command = common::skerry(&["images", "--format", "json"]);
    command.env("XDG_DATA_HOME", folder.path());
    common::run_with(command, b"").expect(0, "[]\n");
}
