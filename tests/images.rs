//! Images of registries, with a real registry server on loopback: what travels arrives and runs, and
//! what goes wrong leaves nothing behind.

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::registry::{Demands, Line, Proxy, Registry, layout};
use common::{Ran, copy_program, hex, noise, run_with, skerry};
use sha2::{Digest, Sha256};

/// Everything that a user has, in one folder.
struct User(tempfile::TempDir);

impl User {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = skerry(args);
        command
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("HOME", self.path("home"))
            .env_remove("DOCKER_CONFIG")
            .env_remove("SSL_CERT_FILE");
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        run_with(self.command(args), b"")
    }

    /// Runs what has to work, and gives its output.
    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.status, 0, "{args:?}: {}", ran.stderr);
        ran.text()
    }

    /// Runs what has to fail, and gives what it says.
    #[track_caller]
    fn fails(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!((ran.status, ran.text().as_str()), (125, ""), "{args:?}");
        ran.stderr
    }

    /// The store has no image, not even a broken one, and keeps nothing half done in sight.
    #[track_caller]
    fn has_nothing(&self) {
        let ran = self.run(&["images", "--format", "json"]);
        ran.expect(0, "[]\n");
        assert_eq!(ran.stderr, "");
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("folder")).expect("folder");
        std::fs::write(path, text).expect("file");
    }

    /// Pushes an image with these layers.
    fn publish(&self, name: &str, layers: &[&[u8]]) {
        let folder = self.path("layout");
        let _ = std::fs::remove_dir_all(&folder);
        layout(&folder, "amd64", layers);
        let image = format!("oci:{}", folder.display());
        self.ok(&["tag", &image, name]);
        self.ok(&["push", name]);
        self.ok(&["rmi", &image, name]);
    }
}

const SOFT: [&str; 3] = ["run", "--hypervisor", "soft"];

#[test]
fn what_is_pushed_is_pulled_and_runs() {
    let Some(registry) = Registry::start(Demands::default()) else {
        return;
    };
    let (maker, user) = (User::new(), User::new());
    let name = registry.name("tools/demo:v1");
    maker.ok(&["tag", "demo", &name]);
    let pushed = maker.ok(&["push", &name]);
    let digest = pushed
        .strip_prefix("v1: digest: ")
        .and_then(|rest| rest.split_whitespace().next())
        .expect("a digest");
    // Again, when nothing is left to send; and the name alone.
    assert_eq!(maker.ok(&["push", &name]), pushed);
    assert_eq!(maker.ok(&["push", "-q", &name]), format!("{name}\n"));

    // A run gets what is missing, and says so.
    let ran = user.run(&[&SOFT[..], &["--pull", "never", &name, "true"]].concat());
    assert_eq!(ran.status, 125);
    assert!(
        ran.stderr.contains("`skerry pull` gets one"),
        "{}",
        ran.stderr
    );
    let ran = user.run(&[&SOFT[..], &[&name, "echo", "from afar"]].concat());
    ran.expect(0, "from afar\n");
    assert!(
        ran.stderr.contains(&format!("pulling {name}")),
        "{}",
        ran.stderr
    );
    let again = user.run(&[&SOFT[..], &[&name, "echo", "again"]].concat());
    again.expect(0, "again\n");
    assert!(!again.stderr.contains("pulling"), "{}", again.stderr);

    // By tag and by digest; the store has it each time.
    let ran = user.run(&["pull", &name]);
    ran.expect(0, &format!("{name}\n"));
    assert!(
        ran.stderr.contains(digest) && ran.stderr.contains("had"),
        "{}",
        ran.stderr
    );
    let pinned = registry.name(&format!("tools/demo@{digest}"));
    assert_eq!(user.ok(&["pull", "-q", &pinned]), format!("{pinned}\n"));
    let listed = user.ok(&["images"]);
    assert!(
        listed.contains(&name) && listed.contains(&pinned),
        "{listed}"
    );
    let ran = user.run(&[&SOFT[..], &["--pull", "always", &pinned, "echo", "pinned"]].concat());
    ran.expect(0, "pinned\n");
    user.ok(&["rmi", &name]);
    user.ok(&["rmi", &pinned]);
    user.has_nothing();
}

#[test]
fn only_who_has_a_login_gets_in() {
    let Some(registry) = Registry::start(Demands {
        login: true,
        ..Demands::default()
    }) else {
        return;
    };
    let user = User::new();
    let host = format!("localhost:{}", registry.port);
    let name = registry.name("private");
    user.ok(&["tag", "demo", &name]);
    let said = user.fails(&["push", &name]);
    assert!(
        said.contains("without a login push") && said.contains("docker login"),
        "{said}"
    );
    // "jo:wrong", "jo:pass:word"
    for (auth, right) in [("am86d3Jvbmc=", false), ("am86cGFzczp3b3Jk", true)] {
        let config = format!(r#"{{"auths": {{"{host}": {{"auth": "{auth}"}}}}}}"#);
        user.write("home/.docker/config.json", &config);
        match right {
            true => assert!(user.ok(&["push", &name]).starts_with("latest: digest: ")),
            false => assert!(user.fails(&["push", &name]).contains("config.json push")),
        }
    }
    std::fs::remove_file(user.path("home/.docker/config.json")).expect("no more login");
    let said = user.fails(&["pull", &name]);
    assert!(said.contains("without a login pull"), "{said}");

    // The same from a helper program, which docker's other folder names.
    user.write(
        "docker/config.json",
        &format!(r#"{{"credHelpers": {{"{host}": "test"}}}}"#),
    );
    let helper = format!(
        "#!/bin/sh\nread host\n[ \"$1 $host\" = \"get {host}\" ] || exit 1\n\
         echo '{{\"Username\": \"jo\", \"Secret\": \"pass:word\"}}'\n"
    );
    user.write("bin/helper", &helper);
    copy_program(
        user.path("bin/helper"),
        &user.path("bin/docker-credential-test"),
    );
    let search = format!(
        "{}:{}",
        user.path("bin").display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let mut command = user.command(&["pull", &name]);
    command
        .env("DOCKER_CONFIG", user.path("docker"))
        .env("PATH", search);
    let ran = run_with(command, b"");
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    // One that isn't there.
    let mut command = user.command(&["pull", &name]);
    command.env("DOCKER_CONFIG", user.path("docker"));
    let ran = run_with(command, b"");
    assert!(
        ran.stderr.contains("docker-credential-test"),
        "{}",
        ran.stderr
    );
}

#[test]
fn certificates_are_checked() {
    let Some(registry) = Registry::start(Demands {
        tls: true,
        login: true,
    }) else {
        return;
    };
    let user = User::new();
    let name = registry.name("safe");
    let config = format!(
        r#"{{"auths": {{"localhost:{}": {{"username": "jo", "password": "pass:word"}}}}}}"#,
        registry.port
    );
    user.write("home/.docker/config.json", &config);
    user.ok(&["tag", "demo", &name]);
    let said = user.fails(&["push", &name]);
    assert!(said.contains("isn't trusted"), "{said}");
    let trusting = |args: &[&str]| {
        let mut command = user.command(args);
        command.env("SSL_CERT_FILE", registry.authority());
        run_with(command, b"")
    };
    assert_eq!(trusting(&["push", &name]).status, 0);
    user.ok(&["rmi", "demo", &name]);
    trusting(&["pull", &name]).expect(0, &format!("{name}:latest\n"));
    trusting(&[&SOFT[..], &[&name, "echo", "safe"]].concat()).expect(0, "safe\n");
    // Listed as insecure, whoever's certificate it is will do.
    let host = format!("localhost:{}", registry.port);
    user.write(
        "config/skerry/registries.json",
        &format!(r#"{{"insecure": ["{host}"]}}"#),
    );
    user.ok(&["pull", &name]);
    user.write("config/skerry/registries.json", r#"{"insecured": []}"#);
    assert!(user.fails(&["pull", &name]).contains("malformed"));
}

#[test]
fn mirrors_come_first() {
    let Some(registry) = Registry::start(Demands::default()) else {
        return;
    };
    let user = User::new();
    let demo = registry.name("library/demo");
    user.ok(&["tag", "demo", &demo]);
    user.ok(&["push", &demo]);
    let mirrors = format!(
        r#"{{"mirrors": {{"docker.io": ["127.0.0.1:1", "127.0.0.1:{}"]}}}}"#,
        registry.port
    );
    user.write("config/skerry/registries.json", &mirrors);
    let ran = user.run(&["pull", "demo"]);
    ran.expect(0, "docker.io/library/demo:latest\n");
    assert!(
        ran.stderr.contains("127.0.0.1:1 can't be reached"),
        "{}",
        ran.stderr
    );
    assert!(user.ok(&["images"]).contains("\ndemo:latest "));
}

#[test]
fn a_killed_pull_leaves_nothing_and_the_next_goes_on() {
    let Some(registry) = Registry::start(Demands::default()) else {
        return;
    };
    let (maker, user) = (User::new(), User::new());
    let layers = [noise(6 << 20, 1), noise(6 << 20, 2)];
    maker.publish(&registry.name("big"), &[&layers[0], &layers[1]]);
    // About 3 MB a second.
    let line = Line {
        pause: Duration::from_millis(5),
        cut: None,
    };
    let proxy = Proxy::start(registry.port, line);
    let name = proxy.name("big");
    let mut child = user
        .command(&["pull", &name])
        .stdout(Stdio::null())
        .spawn()
        .expect("skerry");
    common::eventually("half of the pull", || proxy.received() > 6 << 20);
    child.kill().expect("kill");
    child.wait().expect("end");
    user.has_nothing();
    user.ok(&["pull", &name]);
    let received = proxy.received();
    assert!(
        received < 15 << 20,
        "{received} bytes for 12 MiB: it began anew"
    );
    assert!(user.ok(&["images"]).contains(&name));
    // Nothing waits in the store any more.
    let downloads = user.path("data/skerry/images/downloads");
    assert_eq!(std::fs::read_dir(downloads).expect("folder").count(), 0);
}

#[test]
fn broken_connections_are_mended() {
    let Some(registry) = Registry::start(Demands::default()) else {
        return;
    };
    let (maker, user) = (User::new(), User::new());
    maker.publish(&registry.name("big"), &[&noise(5 << 20, 3)]);
    let line = Line {
        cut: Some(1 << 20),
        ..Line::default()
    };
    let proxy = Proxy::start(registry.port, line);
    user.ok(&["pull", &proxy.name("big")]);
    let received = proxy.received();
    assert!(received < 8 << 20, "{received} bytes for 5 MiB");
}

#[test]
fn two_at_once_receive_a_layer_once() {
    let Some(registry) = Registry::start(Demands::default()) else {
        return;
    };
    let (maker, user) = (User::new(), User::new());
    let (shared, own) = (noise(5 << 20, 4), noise(1 << 20, 5));
    maker.publish(&registry.name("one"), &[&shared]);
    maker.publish(&registry.name("two"), &[&shared, &own]);
    let line = Line {
        pause: Duration::from_millis(5),
        cut: None,
    };
    let proxy = Proxy::start(registry.port, line);
    let names = [proxy.name("one"), proxy.name("two"), proxy.name("one")];
    let children = names.each_ref().map(|name| {
        let mut command = user.command(&["pull", name]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("skerry")
    });
    for (child, name) in children.into_iter().zip(&names) {
        let output = child.wait_with_output().expect("end");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            format!("{name}:latest\n")
        );
    }
    let received = proxy.received();
    assert!(received < 7 << 20, "{received} bytes for 6 MiB");
    let listed = user.ok(&["images"]);
    assert!(
        listed.contains(&names[0]) && listed.contains(&names[1]),
        "{listed}"
    );
}

#[test]
fn damage_is_refused() {
    let Some(registry) = Registry::start(Demands::default()) else {
        return;
    };
    let (maker, user) = (User::new(), User::new());
    let name = registry.name("spoilt");
    maker.publish(&name, &[&noise(1 << 20, 6)]);
    let layer = registry.blob(&registry.largest_blob());
    let sound = std::fs::read(&layer).expect("layer");
    let mut changed = sound.clone();
    changed[700_000] ^= 1;
    std::fs::write(&layer, &changed).expect("damage");
    let said = user.fails(&["pull", &name]);
    assert!(said.contains("sent something else for a layer"), "{said}");
    user.has_nothing();
    // Too short, too long.
    for (bytes, words) in [
        (&sound[..500_000], "broke"),
        (&[&sound[..], b"more"].concat()[..], "bytes for a layer"),
    ] {
        std::fs::write(&layer, bytes).expect("damage");
        let said = user.fails(&["pull", &name]);
        assert!(said.contains(words), "{said}");
        user.has_nothing();
    }
    std::fs::write(&layer, &sound).expect("mended");
    user.ok(&["pull", &name]);
}

#[test]
fn an_index_leads_to_our_platform() {
    let Some(registry) = Registry::start(Demands::default()) else {
        return;
    };
    let (maker, user) = (User::new(), User::new());
    let name = registry.name("many");
    let manifest = |architecture: &str| {
        let text = std::fs::read(maker.path("layout/index.json")).expect("index");
        let index: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        let mut descriptor = index["manifests"][0].clone();
        descriptor["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
        descriptor
    };
    maker.publish(&name, &[b"other"]);
    let other = manifest("arm64");
    maker.publish(&name, &[b"ours"]);
    let ours = manifest("amd64");
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = |manifests: &[&serde_json::Value]| {
        serde_json::json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests})
            .to_string()
    };
    let both = index(&[&other, &ours]);
    registry.put("many", "latest", media_type, &both);
    let ran = user.run(&["pull", &name]);
    ran.expect(0, &format!("{name}:latest\n"));
    assert!(
        ran.stderr.contains(&hex(Sha256::digest(both.as_bytes()))),
        "{}",
        ran.stderr
    );
    registry.put("many", "foreign", media_type, &index(&[&other]));
    let said = user.fails(&["pull", &format!("{name}:foreign")]);
    assert!(
        said.contains("not for linux/amd64 but for linux/arm64"),
        "{said}"
    );
}

#[test]
fn what_cant_be_had_is_named() {
    let user = User::new();
    let said = user.fails(&["pull", "registry.invalid/x"]);
    assert!(
        said.contains("The registry registry.invalid is unknown"),
        "{said}"
    );
    let said = user.fails(&["pull", "127.0.0.1:1/x"]);
    assert!(said.contains("127.0.0.1:1 can't be reached"), "{said}");
    // One bad name doesn't keep others from being tried.
    let Some(registry) = Registry::start(Demands::default()) else {
        return;
    };
    let said = user.fails(&["pull", &registry.name("no"), "127.0.0.1:1/x"]);
    assert!(
        said.contains("has no image") && said.contains("can't be reached"),
        "{said}"
    );
    let said = user.fails(&["tag", "demo", &format!("x@sha256:{}", "0".repeat(64))]);
    assert!(said.contains("has a digest"), "{said}");
    let said = user.fails(&[&SOFT[..], &["sha256:0123", "true"]].concat());
    assert!(said.contains("There is no image"), "{said}");
    let said = user.fails(&["push", &registry.name("no")]);
    assert!(said.contains("There is no image"), "{said}");
    user.has_nothing();
}

/// A small file system of its own, where this process may mount one.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir(path).expect("folder");
        let mut mount = Command::new("mount");
        let size = format!("size={size}");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(path);
        let mounted = mount.stderr(Stdio::null()).status();
        mounted
            .is_ok_and(|status| status.success())
            .then(|| Self(path.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_said_and_freed() {
    let Some(registry) = Registry::start(Demands::default()) else {
        return;
    };
    let (maker, user) = (User::new(), User::new());
    let name = registry.name("big");
    maker.publish(&name, &[&noise(8 << 20, 7)]);
    // Too small for the layer; then for the image made of it.
    for size in ["4m", "14m"] {
        let Some(_disk) = SmallDisk::mount(&user.path("data"), size) else {
            writeln!(
                std::io::stderr(),
                "skipped: this process can't mount a tmpfs"
            )
            .expect("said");
            return;
        };
        let said = user.fails(&["pull", &name]);
        assert!(said.contains("is full"), "{said}");
        user.has_nothing();
        let downloads = user.path("data/skerry/images/downloads");
        assert_eq!(std::fs::read_dir(downloads).expect("folder").count(), 0);
        drop(_disk);
        std::fs::remove_dir(user.path("data")).expect("unmounted");
    }
}

#[test]
fn archives_carry_images() {
    let (maker, user) = (User::new(), User::new());
    maker.ok(&["tag", "demo", "example.com/a/demo:v1"]);
    maker.ok(&["tag", "demo", "mine"]);
    let archive = maker.path("images.tar").display().to_string();
    maker.ok(&["save", "-o", &archive, "example.com/a/demo:v1", "mine"]);
    assert_eq!(
        user.ok(&["load", "-i", &archive]),
        "Loaded image: example.com/a/demo:v1\nLoaded image: mine:latest\n"
    );
    user.run(&[&SOFT[..], &["mine", "echo", "carried"]].concat())
        .expect(0, "carried\n");
    // Its manifest came along.
    let manifest = |user: &User| {
        let text = user.ok(&["image", "inspect", "mine"]);
        let all: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(all[0]["layers"].as_array().map(Vec::len), Some(1), "{text}");
        all[0]["manifest"].as_str().expect("a digest").to_owned()
    };
    assert_eq!(manifest(&maker), manifest(&user));
    // The same bytes each time, through pipes; and as docker's own archives are read.
    let bytes = std::fs::read(&archive).expect("archive");
    let piped = run_with(
        user.command(&["save", "example.com/a/demo:v1", "mine"]),
        b"",
    );
    assert!(piped.stdout == bytes, "the archive changed on its way");
    let third = User::new();
    let ran = run_with(third.command(&["load", "-q"]), &bytes);
    ran.expect(0, "example.com/a/demo:v1\nmine:latest\n");
    let docker = format!("docker-archive:{archive}:mine");
    third
        .run(&[&SOFT[..], &[&docker, "echo", "docker's"]].concat())
        .expect(0, "docker's\n");
    // By digest it has no name; half an archive is none.
    let digest = user
        .ok(&["images", "-q"])
        .lines()
        .next()
        .expect("one")
        .to_owned();
    user.ok(&["save", "-o", &archive, &digest]);
    let fourth = User::new();
    let loaded = fourth.ok(&["load", "-i", &archive]);
    assert_eq!(loaded, format!("Loaded image ID: {digest}\n"));
    assert_eq!(fourth.ok(&["image", "prune"]), format!("{digest}\n"));
    fourth.has_nothing();
    let ran = run_with(fourth.command(&["load"]), &bytes[..bytes.len() / 2]);
    assert_eq!(ran.status, 125);
    fourth.has_nothing();
    assert!(
        user.ok(&["image", "history", "mine"])
            .starts_with("CREATED")
    );
    let gone = user.path("no/such/folder.tar").display().to_string();
    assert!(
        user.fails(&["save", "-o", &gone, "mine"])
            .contains("Can't write")
    );
}

#[test]
fn a_tag_that_moves_leaves_an_image_to_prune() {
    let Some(registry) = Registry::start(Demands::default()) else {
        return;
    };
    let (maker, user) = (User::new(), User::new());
    let name = registry.name("moving:1");
    maker.publish(&name, &[b"old"]);
    user.ok(&["pull", &name]);
    maker.publish(&name, &[b"new"]);
    user.ok(&["pull", &name]);
    let digests = user.ok(&["images", "-q"]);
    assert_eq!(digests.lines().count(), 2, "{digests}");
    assert!(user.ok(&["images"]).contains("<none>"));
    let pruned = user.ok(&["image", "prune"]);
    assert_eq!(pruned.lines().count(), 1, "{pruned}");
    assert!(digests.contains(pruned.trim()));
    assert_eq!(user.ok(&["image", "prune"]), "");
    assert_eq!(user.ok(&["images", "-q"]).lines().count(), 1);
}

/// As docker has it: without -f the last name stays, with it the image goes without one.
#[test]
fn what_a_machine_needs_is_not_removed() {
    let user = User::new();
    user.ok(&[
        &SOFT[..],
        &["-d", "--name", "runs", "demo", "sleep", "1000"],
    ]
    .concat());
    let digest = || -> String {
        let listed = user.ok(&["images", "--format", "json"]);
        let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
        listed[0]["digest"].as_str().unwrap_or_default().to_owned()
    };
    let id = digest();
    let said = user.fails(&["rmi", "demo"]);
    assert!(
        said.contains("(must force)") && said.contains("machine runs"),
        "{said}"
    );
    let said = user.fails(&["rmi", "-f", &id]);
    assert!(said.contains("(cannot be forced)"), "{said}");
    user.ok(&["stop", "-t", "0", "runs"]);
    let said = user.fails(&["rmi", "demo"]);
    assert!(said.contains("(must force)"), "{said}");
    let said = user.fails(&["rmi", &id]);
    assert!(
        said.contains("(must be forced)") && said.contains("stopped"),
        "{said}"
    );
    // A further name may go, and come.
    user.ok(&["tag", "demo", "example/other:1"]);
    user.ok(&["rmi", "example/other:1"]);
    // By force it goes without a name, and stays, whoever tidies up: the machine starts again.
    user.ok(&["rmi", "-f", "demo"]);
    assert_eq!(user.ok(&["image", "prune"]), "");
    assert_eq!(digest(), id);
    assert!(user.ok(&["images"]).contains("<none>"));
    user.ok(&["start", "runs"]);
    assert_eq!(user.ok(&["exec", "runs", "echo", "here"]), "here\n");
    // With the machine goes what keeps it.
    user.ok(&["rm", "-f", "runs"]);
    assert_eq!(user.ok(&["image", "prune"]).trim(), id);
    user.has_nothing();
}
