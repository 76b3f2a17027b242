//! A real registry server on loopback, and what stands between it and a test.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::hex;

/// Runs a program that a test needs; `false` when this host doesn't have it.
fn tool(name: &str, args: &[&str]) -> Option<Vec<u8>> {
    let output = Command::new(name)
        .args(args)
        .stderr(Stdio::null())
        .output()
        .ok()?;
    assert!(output.status.success(), "{name} {args:?}");
    Some(output.stdout)
}

/// What a server asks of its clients.
#[derive(Clone, Copy, Default)]
pub struct Demands {
    /// The user `jo` with the password `pass:word`.
    pub login: bool,
    /// A certificate by an authority of its own.
    pub tls: bool,
}

/// `docker-registry` with a folder of its own.
pub struct Registry {
    server: Child,
    folder: tempfile::TempDir,
    pub port: u16,
}

impl Registry {
    /// Starts one; `None`, with a word about it, where this host has no such server.
    pub fn start(demands: Demands) -> Option<Self> {
        let folder = tempfile::tempdir().expect("folder");
        if Command::new("docker-registry")
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .is_err()
        {
            eprintln!("skipped: no docker-registry on this host (package docker-registry)");
            return None;
        }
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a port")
            .port();
        let root = folder.path().display();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {root}/data}}}}\n\
             http:\n  addr: 127.0.0.1:{port}\n"
        );
        if demands.tls {
            certificates(folder.path())?;
            config += &format!("  tls: {{certificate: {root}/leaf.pem, key: {root}/leaf.key}}\n");
        }
        if demands.login {
            let Some(file) = tool("htpasswd", &["-Bbn", "jo", "pass:word"]) else {
                eprintln!("skipped: no htpasswd on this host (package apache2-utils)");
                return None;
            };
            std::fs::write(folder.path().join("users"), file).expect("users");
            config += &format!("auth: {{htpasswd: {{realm: test, path: {root}/users}}}}\n");
        }
        let path = folder.path().join("config.yml");
        std::fs::write(&path, config).expect("configuration");
        let server = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry");
        super::eventually("the registry's start", || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        Some(Self {
            server,
            folder,
            port,
        })
    }

    /// The certificate of the authority.
    pub fn authority(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// The name of an image here.
    pub fn name(&self, image: &str) -> String {
        format!("localhost:{}/{image}", self.port)
    }

    /// The file in which the registry keeps a blob.
    pub fn blob(&self, hex: &str) -> PathBuf {
        let blobs = "data/docker/registry/v2/blobs/sha256";
        let folder = self.folder.path().join(blobs);
        folder.join(&hex[..2]).join(hex).join("data")
    }

    /// The digits of the largest blob: a layer.
    pub fn largest_blob(&self) -> String {
        let blobs = self
            .folder
            .path()
            .join("data/docker/registry/v2/blobs/sha256");
        let names = std::fs::read_dir(blobs).expect("blobs");
        let hexes = names
            .flat_map(|entry| std::fs::read_dir(entry.expect("entry").path()).expect("folder"));
        let largest = hexes.max_by_key(|entry| {
            let path = entry.as_ref().expect("entry").path().join("data");
            std::fs::metadata(path).expect("blob").len()
        });
        let entry = largest.expect("a blob").expect("entry");
        entry.file_name().into_string().expect("digits")
    }

    /// Puts a manifest or an index under a tag.
    pub fn put(&self, image: &str, tag: &str, media_type: &str, body: &str) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("connection");
        write!(
            stream,
            "PUT /v2/{image}/manifests/{tag} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: {media_type}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answer");
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// An authority, and a certificate of its for this host.
fn certificates(folder: &Path) -> Option<()> {
    let at = |name: &str| folder.join(name).display().to_string();
    std::fs::write(
        at("extensions"),
        "subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n",
    )
    .expect("extensions");
    let key = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    ];
    let (ca_key, ca, leaf_key) = (at("ca.key"), at("ca.pem"), at("leaf.key"));
    let (request, leaf, extensions) = (at("leaf.csr"), at("leaf.pem"), at("extensions"));
    let mut args = vec![
        "req",
        "-x509",
        "-subj",
        "/CN=test authority",
        "-days",
        "3650",
    ];
    args.extend(key);
    args.extend(["-keyout", &ca_key, "-out", &ca]);
    if tool("openssl", &args).is_none() {
        eprintln!("skipped: no openssl on this host");
        return None;
    }
    let mut args = vec!["req", "-new", "-subj", "/CN=localhost"];
    args.extend(key);
    args.extend(["-keyout", &leaf_key, "-out", &request]);
    tool("openssl", &args)?;
    let signing = [
        "x509",
        "-req",
        "-in",
        &request,
        "-CA",
        &ca,
        "-CAkey",
        &ca_key,
        "-CAcreateserial",
        "-days",
        "3650",
        "-extfile",
        &extensions,
        "-out",
        &leaf,
    ];
    tool("openssl", &signing).map(|_| ())
}

/// Forwards connections to a port, counting what comes back, slowly or only so far.
pub struct Proxy {
    pub port: u16,
    received: Arc<AtomicU64>,
}

/// What a proxy does to what comes back.
#[derive(Clone, Copy, Default)]
pub struct Line {
    /// Waits so long before each 16 KiB.
    pub pause: Duration,
    /// Breaks each connection after so many bytes.
    pub cut: Option<u64>,
}

impl Proxy {
    /// In front of a port of this host; it lasts as long as the test.
    pub fn start(target: u16, line: Line) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("address").port();
        let received = Arc::new(AtomicU64::new(0));
        let counter = received.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let counter = counter.clone();
                std::thread::spawn(move || forward(client, target, line, &counter));
            }
        });
        Self { port, received }
    }

    /// Bytes that have come back through it.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// The name of an image through it.
    pub fn name(&self, image: &str) -> String {
        format!("localhost:{}/{image}", self.port)
    }
}

fn forward(client: TcpStream, target: u16, line: Line, counter: &AtomicU64) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else {
        return;
    };
    let (mut from, mut to) = (
        client.try_clone().expect("socket"),
        server.try_clone().expect("socket"),
    );
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let (mut server, mut client) = (server, client);
    let (mut buf, mut passed) = ([0; 16 << 10], 0);
    while let Ok(n @ 1..) = server.read(&mut buf) {
        std::thread::sleep(line.pause);
        if client.write_all(&buf[..n]).is_err() {
            break;
        }
        passed += n as u64;
        counter.fetch_add(n as u64, Ordering::Relaxed);
        if line.cut.is_some_and(|cut| passed >= cut) {
            break;
        }
    }
    let _ = server.shutdown(Shutdown::Both);
    let _ = client.shutdown(Shutdown::Both);
}

/// Writes an image with layers of one file each in the OCI layout.
pub fn layout(folder: &Path, architecture: &str, layers: &[&[u8]]) {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).expect("blobs");
    let blob = |bytes: &[u8]| {
        let digits = hex(Sha256::digest(bytes));
        std::fs::write(blobs.join(&digits), bytes).expect("blob");
        serde_json::json!({"digest": format!("sha256:{digits}"), "size": bytes.len()})
    };
    let typed = |mut descriptor: serde_json::Value, kind: &str| {
        descriptor["mediaType"] = format!("application/vnd.oci.image.{kind}").into();
        descriptor
    };
    let archives: Vec<_> = layers
        .iter()
        .enumerate()
        .map(|(number, bytes)| archive(&format!("file{number}"), bytes))
        .collect();
    let diff_ids: Vec<_> = archives
        .iter()
        .map(|a| format!("sha256:{}", hex(Sha256::digest(a))))
        .collect();
    let config = serde_json::json!({"os": "linux", "architecture": architecture,
        "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let config = typed(blob(config.to_string().as_bytes()), "config.v1+json");
    let layers: Vec<_> = archives
        .iter()
        .map(|a| typed(blob(a), "layer.v1.tar"))
        .collect();
    let manifest = serde_json::json!({"schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": layers});
    let manifest = typed(blob(manifest.to_string().as_bytes()), "manifest.v1+json");
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
    std::fs::write(folder.join("index.json"), index.to_string()).expect("index");
}

fn archive(name: &str, bytes: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    let mut archive = tar::Builder::new(Vec::new());
    archive
        .append_data(&mut header, name, bytes)
        .expect("entry");
    archive.into_inner().expect("archive")
}
