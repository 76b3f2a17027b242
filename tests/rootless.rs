//! Everything as a user without any rights of the superuser's: where these tests are the superuser's, they
//! run `skerry` as nobody, from a copy of it in a folder of nobody's; else as whoever runs them.

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use common::{Ran, copy_program, eventually, run_with};
use serde_json::Value;

/// Linux's user and group that own nothing.
const NOBODY: u32 = 65534;

/// A user, with a home of its own that its machines end with.
struct User {
    home: tempfile::TempDir,
    program: PathBuf,
    /// Whom to become.
    other: Option<u32>,
    uid: u32,
}

impl User {
    fn new() -> Self {
        let home = tempfile::tempdir().expect("folder");
        let own = rustix::process::geteuid();
        let other = own.is_root().then_some(NOBODY);
        let program = home.path().join("skerry");
        copy_program(env!("CARGO_BIN_EXE_skerry"), &program);
        if other.is_some() {
            chown(home.path(), other, other).expect("chown");
        }
        Self {
            program,
            other,
            uid: other.unwrap_or(own.as_raw()),
            home,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// A folder of the user's.
    fn folder(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir(&path).expect("folder");
        chown(&path, self.other, self.other).expect("chown");
        path
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(args)
            .env_clear()
            .env("HOME", self.home.path())
            .env("PATH", "/usr/bin:/bin")
            .current_dir(self.home.path());
        if let Some(other) = self.other {
            // Further groups go with the user.
            command.uid(other).gid(other);
        }
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        run_with(self.command(args), b"")
    }

    #[track_caller]
    fn done(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.status, 0, "{args:?}: {}", ran.stderr);
        ran.text().trim_end_matches('\n').to_owned()
    }

    /// `run` on the software processor.
    #[track_caller]
    fn demo(&self, options: &[&str], command: &[&str]) -> String {
        let run = ["run", "--hypervisor", "soft"];
        self.done(&[&run[..], options, &["demo"], command].concat())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let ids = self.run(&["ps", "-q", "--no-trunc"]).text();
        let ids: Vec<&str> = ids.lines().collect();
        if !ids.is_empty() {
            self.run(&[&["rm", "-f"], &ids[..]].concat());
        }
    }
}

#[test]
fn a_machine_runs_and_is_the_users() {
    let user = User::new();
    assert_eq!(user.demo(&[], &["id", "-u"]), "0");
    assert_eq!(user.demo(&["--confine", "auto"], &["echo", "warm"]), "warm");
    user.demo(&["-d", "--name", "one"], &["sleep", "1000"]);
    let listed: Value =
        serde_json::from_str(&user.done(&["ps", "--format", "json"])).expect("JSON");
    let pid = listed[0]["pid"].as_u64().expect("a process");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    let uids = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .expect("Uid");
    assert!(
        uids.split_whitespace()
            .all(|uid| uid == user.uid.to_string()),
        "{uids}"
    );
    assert_eq!(
        user.done(&["exec", "one", "cat", "/etc/hostname"]),
        "skerry"
    );
    let stats: Value =
        serde_json::from_str(&user.done(&["stats", "--no-stream", "--format", "json"]))
            .expect("JSON");
    assert!(stats["resident"].as_u64() > Some(1 << 20), "{stats}");
    user.done(&["stop", "-t", "1", "one"]);
    user.done(&["start", "one"]);
    user.done(&["rm", "-f", "one"]);
    let check = user.done(&["system", "check"]);
    assert!(!check.contains("damaged"), "{check}");
}

/// Layers may be missing on a host, and then `strict` refuses; `doctor` says the same.
#[test]
fn confinement_holds_as_far_as_doctor_says() {
    let user = User::new();
    let report: Value =
        serde_json::from_str(&user.run(&["doctor", "--format", "json"]).text()).expect("JSON");
    let layers = report["confinement"]["layers"].as_array().expect("layers");
    let all = layers.iter().all(|layer| layer["holds"] == true);
    let strict = [
        "run",
        "--hypervisor",
        "soft",
        "--confine",
        "strict",
        "demo",
        "true",
    ];
    let ran = user.run(&strict);
    match all {
        true => ran.expect(0, ""),
        false => assert_eq!(ran.status, 125, "{ran:?}"),
    }
    // What the user has no right to is bounded by what it has.
    let bounds = report["resources"].as_array().expect("bounds");
    assert!(
        bounds.iter().all(|bound| bound["holds"] == true),
        "{report}"
    );
    assert_eq!(
        user.demo(&["--cpus", "0.5", "--pids-limit", "50"], &["echo", "slow"]),
        "slow"
    );
}

#[test]
fn folders_and_volumes_are_the_users() {
    let user = User::new();
    let folder = user.folder("shared");
    std::fs::write(folder.join("given"), "from the host\n").expect("file");
    std::fs::set_permissions(folder.join("given"), PermissionsExt::from_mode(0o644)).expect("mode");
    let share = format!("{}:/data", folder.display());
    let script = "cat /data/given; echo back >/data/made; mkdir /data/folder; ln -s made /data/link; \
                  mv /data/made /data/folder/made; cat /data/folder/made";
    assert_eq!(
        user.demo(&["-v", &share], &["sh", "-c", script]),
        "from the host\nback"
    );
    let made = folder.join("folder/made").metadata().expect("it is there");
    assert_eq!(made.uid(), user.uid, "it is the user's");
    let read_only = format!("{share}:ro");
    let refused = user.run(&[
        "run",
        "--hypervisor",
        "soft",
        "-v",
        &read_only,
        "demo",
        "touch",
        "/data/x",
    ]);
    assert_eq!(refused.status, 1, "{refused:?}");
    // A volume that one machine writes is another's.
    user.demo(&["-v", "disk:/v"], &["sh", "-c", "echo kept >/v/file"]);
    assert_eq!(user.demo(&["-v", "disk:/v"], &["cat", "/v/file"]), "kept");
    assert_eq!(
        user.demo(
            &["-v", "/anonymous", "--confine", "auto"],
            &["sh", "-c", "echo a >/anonymous/a"]
        ),
        ""
    );
    user.done(&["volume", "prune"]);
    user.done(&["volume", "rm", "disk"]);
}

/// Asks the guest's server behind a published port.
fn fetch(port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(20)))?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn ports_and_networks_are_the_users() {
    let user = User::new();
    let web = "mkdir /w; echo hello >/w/index.html; httpd -f -p 80 -h /w";
    user.demo(
        &["-d", "--name", "web", "-p", "127.0.0.1:0:80"],
        &["sh", "-c", web],
    );
    let port = user.done(&["port", "web"]);
    let port: u16 = port
        .rsplit(':')
        .next()
        .and_then(|port| port.parse().ok())
        .expect("a port");
    eventually("a page", || {
        fetch(port).is_ok_and(|page| page.contains("hello"))
    });
    user.done(&["network", "create", "inner"]);
    user.demo(
        &["-d", "--name", "server", "--network", "inner"],
        &["sh", "-c", web],
    );
    let get = "i=0; while ! wget -qO- http://server/index.html; do i=$((i+1)); [ $i -lt 100 ] || exit 1; sleep 0.1; done";
    assert_eq!(
        user.demo(&["--network", "inner"], &["sh", "-c", get]),
        "hello"
    );
    user.done(&["rm", "-f", "web", "server"]);
    user.done(&["network", "rm", "inner"]);
}

#[test]
fn snapshots_and_forks_are_the_users() {
    let user = User::new();
    user.demo(
        &["-d", "--name", "first"],
        &["sh", "-c", "echo state >/f; sleep 1000"],
    );
    eventually("the file", || {
        user.run(&["exec", "first", "cat", "/f"]).text() == "state\n"
    });
    user.done(&["snapshot", "create", "first", "point"]);
    user.done(&[
        "restore",
        "-d",
        "--hypervisor",
        "soft",
        "--name",
        "second",
        "point",
    ]);
    user.done(&["fork", "--name", "third", "first"]);
    for name in ["second", "third"] {
        assert_eq!(user.done(&["exec", name, "cat", "/f"]), "state");
    }
    user.done(&["rm", "-f", "first", "second", "third"]);
    user.done(&["snapshot", "rm", "point"]);
}

/// A server, which ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_server_is_the_users() {
    let user = User::new();
    let socket = user.path("api.sock");
    let listen = socket.display().to_string();
    let mut command = user.command(&["serve", "--socket", &listen]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let _server = Server(command.spawn().expect("serve"));
    let ask = |request: &str| -> std::io::Result<String> {
        let mut stream = UnixStream::connect(&socket)?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    eventually("an answer", || {
        let get = "GET /api/v1/vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        ask(get).is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
    });
    let body = r#"{"image":"demo","name":"by-api","spec":{"vm":{"options":{"hypervisor":{"only":"soft"}}},"command":{"command":["sleep","1000"]}}}"#;
    let post = format!(
        "POST /api/v1/vms HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let answer = ask(&post).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 2"), "{answer}");
    assert_eq!(user.done(&["exec", "by-api", "echo", "here"]), "here");
    let mode = std::fs::metadata(&socket)
        .expect("socket")
        .permissions()
        .mode();
    assert_eq!(mode & 0o077, 0, "nobody else may speak to it");
}
