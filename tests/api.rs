//! `skerry serve`: its own API over HTTP, and a stock docker client at the same socket.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use common::home::Home;
use common::{Ran, eventually, run_with};
use serde_json::{Value, json};

/// A server that ends with the test.
struct Server<'a> {
    home: &'a Home,
    child: Child,
    socket: PathBuf,
}

impl<'a> Server<'a> {
    fn start(home: &'a Home) -> Self {
        let socket = home.path("api.sock");
        let mut command = home.command(&["serve", "--socket"]);
        let child = command.arg(&socket).stderr(Stdio::piped()).spawn();
        let child = child.expect("the server starts");
        eventually("the server listens", || {
            UnixStream::connect(&socket).is_ok()
        });
        Self {
            home,
            child,
            socket,
        }
    }

    /// One request of HTTP/1.0, so that the answer ends with the connection.
    fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, String) {
        let mut stream = UnixStream::connect(&self.socket).expect("connect");
        let body = body.map(Value::to_string).unwrap_or_default();
        let kind = match body.is_empty() {
            true => "",
            false => "Content-Type: application/json\r\n",
        };
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: skerry\r\n{kind}Content-Length: {length}\r\n\r\n{body}"
        )
        .expect("send");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        let status = head.split_whitespace().nth(1).expect("a status");
        (status.parse().expect("a number"), body.to_owned())
    }

    /// One that succeeds, and answers JSON or nothing.
    #[track_caller]
    fn done(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let (status, text) = self.ask(method, path, body);
        assert!(
            (200..300).contains(&status),
            "{method} {path}: {status} {text}"
        );
        match text.is_empty() {
            true => Value::Null,
            false => serde_json::from_str(&text).expect("JSON"),
        }
    }

    /// One that can't be done, with its word for why.
    #[track_caller]
    fn refused(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, String, String) {
        let (status, text) = self.ask(method, path, body);
        assert!(status >= 400, "{method} {path}: {status} {text}");
        let problem: Value = serde_json::from_str(&text).expect("a problem");
        let field = |name: &str| problem[name].as_str().expect(name).to_owned();
        (status, field("code"), field("message"))
    }

    /// The objects of an answer that has one a line.
    #[track_caller]
    fn lines(&self, method: &str, path: &str, body: Option<&Value>) -> Vec<Value> {
        let (status, text) = self.ask(method, path, body);
        assert_eq!(status, 200, "{text}");
        let lines = text.lines().map(serde_json::from_str);
        lines.collect::<Result<_, _>>().expect("JSON")
    }

    /// Docker's command, for this server.
    fn docker(&self, args: &[&str], input: &[u8]) -> Ran {
        let mut command = Command::new("docker");
        command
            .args(args)
            .env("DOCKER_HOST", format!("unix://{}", self.socket.display()))
            .env("DOCKER_CONFIG", self.home.path("docker"));
        run_with(command, input)
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let _ = Command::new("kill")
            .arg(self.child.id().to_string())
            .status();
        let ended = self.child.wait().expect("the server ends");
        if !std::thread::panicking() {
            assert!(ended.success(), "told to end, the server fails: {ended}");
            assert!(!self.socket.exists(), "its socket stays");
        }
    }
}

fn new_vm(name: &str, script: &str) -> Value {
    json!({
        "image": "demo",
        "name": name,
        "spec": {
            "vm": { "options": { "hypervisor": { "only": "soft" } } },
            "command": { "command": ["sh", "-c", script] },
        },
    })
}

#[test]
fn a_machines_whole_life_goes_over_the_api() {
    let home = Home::new();
    let server = Server::start(&home);
    let vm = new_vm("web", "echo out; echo err >&2; while :; do sleep 1; done");
    let made = server.done("POST", "/api/v1/vms", Some(&vm));
    let id = made["id"].as_str().expect("an identity").to_owned();
    // What the command prints is what the API says.
    let listed = server.done("GET", "/api/v1/vms", None);
    assert_eq!(listed, Value::from(home.listed(&[])));
    assert_eq!(listed[0]["id"], id.as_str());

    let exec = json!({ "command": ["sh", "-c", "cat; echo bad >&2; exit 3"], "input": "aGk=" });
    let lines = server.lines("POST", "/api/v1/vms/web/exec", Some(&exec));
    assert!(
        lines.contains(&json!({ "stream": "stdout", "base64": "aGk=" })),
        "{lines:?}"
    );
    assert!(
        lines.contains(&json!({ "stream": "stderr", "base64": "YmFkCg==" })),
        "{lines:?}"
    );
    assert_eq!(lines.last(), Some(&json!({ "exit_code": 3 })));

    let logs = server.lines("GET", "/api/v1/vms/web/logs", None);
    let texts: Vec<&str> = logs
        .iter()
        .filter_map(|line| line["text"].as_str())
        .collect();
    assert_eq!(texts, ["out\n", "err\n"]);
    assert_eq!(
        server
            .lines("GET", "/api/v1/vms/web/logs?tail=1", None)
            .len(),
        1
    );

    server.done("POST", "/api/v1/vms/web/pause", None);
    assert_eq!(home.status("web"), "paused");
    server.done("POST", "/api/v1/vms/web/unpause", None);
    let taken = json!({ "name": "s1" });
    let taken = server.done("POST", "/api/v1/vms/web/snapshot", Some(&taken));
    let snapshot = server.done("GET", "/api/v1/snapshots/s1", None);
    assert!(
        snapshot["id"]
            .as_str()
            .expect("id")
            .contains(taken["id"].as_str().expect("id"))
    );
    let forks = json!({ "names": ["", "twin"] });
    let forked = server.done("POST", "/api/v1/vms/web/fork", Some(&forks));
    assert_eq!(forked["ids"].as_array().map(Vec::len), Some(2));
    let usage = server.done("GET", "/api/v1/stats?span=100", None);
    assert_eq!(usage.as_array().map(Vec::len), Some(3));
    server.done("POST", "/api/v1/vms/twin/rename?name=other", None);

    let ended = server.done("POST", "/api/v1/vms/web/stop?grace=1", None);
    assert!(
        ended["exit_code"].as_u64().is_some_and(|code| code >= 128),
        "{ended}"
    );
    let waited = server.done("POST", "/api/v1/vms/web/wait", None);
    assert_eq!(waited["ended"], ended["exit_code"]);
    server.done("DELETE", "/api/v1/vms/web", None);
    server.done("DELETE", "/api/v1/vms/other?force=true", None);
    server.done("DELETE", "/api/v1/snapshots/s1", None);
    assert_eq!(home.names(&["-a"]).len(), 1);
}

#[test]
fn what_can_not_be_done_says_why() {
    let home = Home::new();
    let server = Server::start(&home);
    let (status, code, message) = server.refused("GET", "/api/v1/vms/nobody", None);
    assert_eq!((status, code.as_str()), (404, "not_found"));
    assert!(message.contains("nobody"), "{message}");
    let (status, ..) = server.refused("POST", "/api/v1/vms", Some(&json!({ "name": "x" })));
    assert_eq!(status, 400);
    home.start("there", "sleep 100");
    let (status, code, _) = server.refused("POST", "/api/v1/vms", Some(&new_vm("there", "true")));
    assert_eq!((status, code.as_str()), (409, "conflict"));
    let (status, ..) = server.refused("DELETE", "/api/v1/vms/there", None);
    assert_eq!(status, 409);
    let (status, ..) = server.refused("POST", "/api/v1/vms/there/kill?signal=99", None);
    assert_eq!(status, 400);
    let (status, _, message) = server.refused("GET", "/nowhere", None);
    assert_eq!(status, 404);
    assert!(message.contains("/nowhere"), "{message}");
    // A field that nobody knows is not left out in silence.
    let (status, text) = server.ask("POST", "/api/v1/vms", Some(&json!({ "imagee": "demo" })));
    assert!((400..500).contains(&status), "{status} {text}");
    let (status, text) = server.ask("GET", "/api/v1/openapi.json", None);
    assert_eq!(status, 200);
    let document: Value = serde_json::from_str(&text).expect("JSON");
    assert!(document["paths"]["/api/v1/vms/{vm}/exec"].is_object());
    // One server has one socket.
    let socket = home.path("api.sock");
    let socket = socket.to_str().expect("UTF-8");
    home.refused(&["serve", "--socket", socket], &["Another server", socket]);
}

/// Whether there is a docker client; says so where there isn't.
fn has_docker() -> bool {
    let found = Command::new("docker").arg("--version").output();
    let found = found.is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("skipped: no docker client on this host (package docker.io)");
    }
    found
}

#[test]
fn a_stock_docker_client_lists_runs_execs_and_reads_logs() {
    if !has_docker() {
        return;
    }
    let home = Home::new();
    let server = Server::start(&home);
    let docker = |args: &[&str]| server.docker(args, b"");

    let ran = docker(&[
        "run",
        "-d",
        "--name",
        "web",
        "--label",
        "a=b",
        "demo",
        "sh",
        "-c",
        "echo one; echo two >&2; sleep 1000",
    ]);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    let id = ran.text().trim().to_owned();
    assert_eq!(
        id,
        home.info("web").expect("it runs")["id"]
            .as_str()
            .expect("id")
    );
    docker(&["ps", "--format", "{{.Names}} {{.Image}} {{.State}}"]).expect(0, "web demo running\n");
    docker(&["ps", "-q", "--no-trunc", "--filter", "label=a=b"]).expect(0, &format!("{id}\n"));
    docker(&["ps", "-q", "--filter", "name=nobody"]).expect(0, "");
    eventually("the log has both lines", || {
        docker(&["logs", "web"]).stderr == "two\n"
    });
    docker(&["logs", "web"]).expect(0, "one\n");
    let ran = docker(&[
        "exec",
        "-e",
        "A=1",
        "-w",
        "/tmp",
        "web",
        "sh",
        "-c",
        "echo $A $PWD; echo no >&2; exit 9",
    ]);
    ran.expect(9, "1 /tmp\n");
    assert_eq!(ran.stderr, "no\n");
    server
        .docker(&["exec", "-i", "web", "cat"], b"through")
        .expect(0, "through");
    docker(&[
        "inspect",
        "web",
        "--format",
        "{{.State.Running}} {{index .Config.Labels \"a\"}}",
    ])
    .expect(0, "true b\n");
    docker(&["pause", "web"]).expect(0, "web\n");
    docker(&["unpause", "web"]).expect(0, "web\n");
    docker(&["exec", "web", "touch", "/kept"]).expect(0, "");
    docker(&["stop", "-t", "1", "web"]).expect(0, "web\n");
    // What it wrote is there when it is started again.
    docker(&["start", "web"]).expect(0, "web\n");
    docker(&["exec", "web", "ls", "/kept"]).expect(0, "/kept\n");
    docker(&["kill", "web"]).expect(0, "web\n");
    docker(&["wait", "web"]).expect(0, "137\n");
    docker(&["rename", "web", "site"]).expect(0, "");
    docker(&["rm", "site"]).expect(0, "site\n");
    assert_eq!(home.names(&["-a"]), [] as [&str; 0]);
    docker(&["images", "--format", "{{.Repository}}:{{.Tag}}"]).expect(0, "demo:latest\n");
}

#[test]
fn docker_run_in_the_foreground_has_streams_and_statuses() {
    if !has_docker() {
        return;
    }
    let home = Home::new();
    let server = Server::start(&home);
    let docker = |args: &[&str]| server.docker(args, b"");
    let ran = docker(&[
        "run",
        "--rm",
        "demo",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 7",
    ]);
    ran.expect(7, "out\n");
    assert_eq!(ran.stderr, "err\n");
    let mut noise = common::noise(300_000, 7);
    noise.push(b'\n');
    let ran = server.docker(&["run", "--rm", "-i", "demo", "cat"], &noise);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    assert!(ran.stdout == noise, "{} bytes came back", ran.stdout.len());
    let ran = docker(&["run", "--rm", "demo", "nosuchprogram"]);
    assert_eq!(ran.status, 127, "{}", ran.stderr);
    // What a machine can't have is said, with its name.
    let ran = docker(&["run", "--rm", "--privileged", "demo", "true"]);
    assert_eq!(ran.status, 125, "{}", ran.stderr);
    assert!(ran.stderr.contains("Privileged"), "{}", ran.stderr);
    // All of them are forgotten.
    eventually("nothing is left", || home.names(&["-a"]).is_empty());
}

#[test]
fn docker_copies_files_and_watches_machines() {
    if !has_docker() {
        return;
    }
    let home = Home::new();
    let server = Server::start(&home);
    let docker = |args: &[&str]| server.docker(args, b"");
    let began = std::time::SystemTime::now();
    let began = began
        .duration_since(std::time::UNIX_EPOCH)
        .expect("a time")
        .as_secs();
    let script = "sleep 1000";
    let ran = docker(&[
        "run",
        "-d",
        "--name",
        "web",
        "-p",
        "127.0.0.1::80",
        "demo",
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    // Files and folders both ways, and to and from archives.
    let folder = home.path("folder");
    std::fs::create_dir_all(folder.join("below")).expect("folders");
    let noise = common::noise(3 << 20, 11);
    std::fs::write(folder.join("below/noise"), &noise).expect("a file");
    let text = |path: &std::path::Path| path.to_str().expect("a path").to_owned();
    let from = text(&folder);
    let ran = docker(&["cp", &from, "web:/tmp"]);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    docker(&["exec", "web", "stat", "-c", "%s", "/tmp/folder/below/noise"]).expect(0, "3145728\n");
    let back = text(&home.path("back"));
    let ran = docker(&["cp", "web:/tmp/folder", &back]);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    assert!(std::fs::read(home.path("back/below/noise")).expect("it came back") == noise);
    let file = text(&home.path("passwd"));
    docker(&["cp", "web:/etc/passwd", &file]);
    let passwd = std::fs::read_to_string(&file).expect("a file");
    docker(&["exec", "web", "cat", "/etc/passwd"]).expect(0, &passwd);
    let tar = docker(&["cp", "web:/etc/passwd", "-"]);
    assert!(tar.status == 0 && tar.stdout.starts_with(b"passwd\0"));
    let ran = server.docker(&["cp", "-", "web:/tmp"], &tar.stdout);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    docker(&["exec", "web", "cat", "/tmp/passwd"]).expect(0, &passwd);
    let ran = docker(&["cp", "web:/no/such", &back]);
    assert!(
        ran.status == 1 && ran.stderr.contains("/no/such"),
        "{}",
        ran.stderr
    );
    // What runs in it, what it takes, what it is reached by.
    let ran = docker(&["top", "web"]);
    assert!(
        ran.text().contains("PID") && ran.text().contains("1000"),
        "{}",
        ran.text()
    );
    let ran = docker(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.Name}} {{.MemUsage}} {{.CPUPerc}}",
        "web",
    ]);
    assert!(
        ran.text().starts_with("web ") && ran.text().contains("MiB"),
        "{}",
        ran.text()
    );
    assert!(
        docker(&["port", "web"])
            .text()
            .starts_with("80/tcp -> 127.0.0.1:")
    );
    docker(&["restart", "-t", "1", "web"]).expect(0, "web\n");
    docker(&["kill", "web"]).expect(0, "web\n");
    docker(&["wait", "web"]).expect(0, "137\n");
    docker(&["container", "prune", "-f"]);
    assert_eq!(home.names(&["-a"]), [] as [&str; 0]);
    let (since, until) = (began.to_string(), (began + 3600).to_string());
    let events = [
        "events",
        "--since",
        &since,
        "--format",
        "{{.Type}} {{.Action}} {{.Actor.Attributes.name}}",
    ];
    let now = std::time::SystemTime::now();
    let now = now
        .duration_since(std::time::UNIX_EPOCH)
        .expect("a time")
        .as_secs()
        + 1;
    let (_, now) = (until, now.to_string());
    let filter = [
        "--until",
        &now,
        "--filter",
        "container=web",
        "--filter",
        "type=container",
    ];
    let ran = docker(&[&events[..], &filter[..]].concat());
    for action in ["create", "start", "kill", "die", "destroy"] {
        let line = format!("container {action} web");
        assert!(
            ran.text().lines().any(|found| found == line),
            "{action}: {}",
            ran.text()
        );
    }
    let ran = docker(&[
        "events", "--since", &since, "--until", &now, "--filter", "daemon=x",
    ]);
    assert!(
        ran.status == 1 && ran.stderr.contains("daemon"),
        "{}",
        ran.stderr
    );
}

#[test]
fn docker_keeps_networks_and_volumes() {
    if !has_docker() {
        return;
    }
    let home = Home::new();
    let server = Server::start(&home);
    let docker = |args: &[&str]| server.docker(args, b"");
    let good = |args: &[&str]| {
        let ran = docker(args);
        assert_eq!(ran.status, 0, "{args:?}: {}", ran.stderr);
        ran.text().trim_end().to_owned()
    };
    let id = good(&[
        "network",
        "create",
        "--subnet",
        "10.90.0.0/24",
        "--gateway",
        "10.90.0.9",
        "--internal",
        "--label",
        "a=b",
        "lab",
    ]);
    assert_eq!(
        good(&["network", "ls", "--no-trunc", "-q", "--filter", "label=a=b"]),
        id
    );
    let format = "{{(index .IPAM.Config 0).Gateway}} {{.Internal}} {{len .Containers}}";
    assert_eq!(
        good(&["network", "inspect", "--format", format, &id[..12]]),
        "10.90.0.9 true 0"
    );
    for name in ["one", "two"] {
        good(&[
            "run",
            "-d",
            "--name",
            name,
            "--network",
            "lab",
            "-v",
            &format!("{name}:/data"),
            "demo",
            "sleep",
            "1000",
        ]);
    }
    good(&["exec", "one", "ping", "-c", "1", "-w", "20", "two"]);
    // Its walls: nothing else is reached.
    let ran = docker(&["exec", "one", "wget", "-qO-", "http://192.0.2.1/"]);
    assert_ne!(ran.status, 0);
    assert_eq!(
        good(&["network", "inspect", "--format", format, "lab"]),
        "10.90.0.9 true 2"
    );
    for refused in [
        ["network", "connect", "lab", "one"],
        ["network", "disconnect", "lab", "one"],
    ] {
        let ran = docker(&refused);
        assert!(
            ran.status == 1 && ran.stderr.contains("--network lab"),
            "{}",
            ran.stderr
        );
    }
    let ran = docker(&["network", "rm", "lab"]);
    assert!(
        ran.status == 1 && ran.stderr.contains("2 machine"),
        "{}",
        ran.stderr
    );
    let ran = docker(&["network", "create", "-d", "overlay", "far"]);
    assert!(
        ran.status == 1 && ran.stderr.contains("overlay"),
        "{}",
        ran.stderr
    );
    // Volumes that were made with machines, and by themselves.
    assert_eq!(good(&["volume", "ls", "-q"]), "one\ntwo");
    assert_eq!(
        good(&["volume", "create", "-o", "size=512m", "kept"]),
        "kept"
    );
    assert_eq!(
        good(&["volume", "inspect", "--format", "{{.Options.size}}", "kept"]),
        "536870912"
    );
    let ran = docker(&["volume", "rm", "one"]);
    assert!(
        ran.status == 1 && ran.stderr.contains("in use"),
        "{}",
        ran.stderr
    );
    let ran = docker(&["volume", "create", "-d", "nfs", "far"]);
    assert!(
        ran.status == 1 && ran.stderr.contains("nfs"),
        "{}",
        ran.stderr
    );
    let usage = good(&["system", "df", "--format", "{{.Type}} {{.TotalCount}}"]);
    for line in ["Images 1", "Containers 2", "Local Volumes 3"] {
        assert!(usage.lines().any(|found| found == line), "{usage}");
    }
    good(&["rm", "-f", "one", "two"]);
    good(&["network", "rm", "lab"]);
    assert_eq!(good(&["volume", "rm", "kept"]), "kept");
    let pruned = good(&["volume", "prune", "-f"]);
    assert!(pruned.contains("one") && pruned.contains("two"), "{pruned}");
    assert_eq!(good(&["volume", "ls", "-q"]), "");
    assert!(good(&["info", "--format", "{{.OperatingSystem}}"]).contains("Skerry"));
}

#[test]
fn the_store_is_checked() {
    let home = Home::new();
    home.start("one", "sleep 1000");
    let text = home.done(&["system", "check"]);
    assert!(
        text.ends_with("1 virtual machines: all are whole"),
        "{text}"
    );
    // A byte of an image changes.
    let images = home.path("skerry/images/images");
    let image = std::fs::read_dir(images).expect("images").next();
    let rootfs = image
        .expect("one")
        .expect("entry")
        .path()
        .join("rootfs.erofs");
    let mut content = std::fs::read(&rootfs).expect("rootfs");
    let middle = content.len() / 2;
    content[middle] ^= 1;
    std::fs::write(&rootfs, &content).expect("changed");
    let ran = home.run(&["system", "check", "--format", "json"]);
    assert_eq!(ran.status, 1, "{}", ran.stderr);
    let found: Value = serde_json::from_str(&ran.text()).expect("JSON");
    assert_eq!(found["damaged"][0]["kind"], "image", "{found}");
    assert_eq!(found["damaged"][0]["repaired"], false);
    let ran = home.run(&["system", "check", "--repair"]);
    assert_eq!(ran.status, 0, "{}", ran.text());
    assert!(ran.text().contains("(removed)"), "{}", ran.text());
    let text = home.done(&["system", "check"]);
    assert!(
        text.contains("0 images") && text.ends_with("all are whole"),
        "{text}"
    );
}
