//! Registries that behave oddly: a small HTTP server in the test's own process.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use skerry_oci::{Digest, Error, Name, Pulled, RegistryError, Settings, Store};

/// What was asked.
#[derive(Debug, Clone)]
struct Request {
    path: String,
    headers: HashMap<String, String>,
}

/// What is answered: status, headers, body, and after how many bytes of that the line breaks.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    cut: Option<usize>,
}

fn answer(status: u16, body: impl Into<Vec<u8>>) -> Answer {
    Answer {
        status,
        headers: Vec::new(),
        body: body.into(),
        cut: None,
    }
}

type Handler = dyn Fn(&Request, usize) -> Answer + Send + Sync;

/// Serves until the test ends; the requests are kept.
struct Server {
    port: u16,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// The handler is told how often the path was asked for before.
    fn start(handler: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (kept, handler): (_, Arc<Handler>) = (requests.clone(), Arc::new(handler));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (kept, handler) = (kept.clone(), handler.clone());
                std::thread::spawn(move || serve(stream, &kept, &*handler));
            }
        });
        Server { port, requests }
    }

    fn name(&self) -> Name {
        format!("127.0.0.1:{}/x:1", self.port).parse().unwrap()
    }

    fn asked(&self, part: &str) -> Vec<Request> {
        let requests = self.requests.lock().unwrap();
        let asked = requests.iter().filter(|r| r.path.contains(part));
        asked.cloned().collect()
    }
}

fn serve(stream: TcpStream, kept: &Mutex<Vec<Request>>, handler: &Handler) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    let mut line = String::new();
    // A greeting with TLS is no line of text, and ends the connection.
    while reader.read_line(&mut line).is_ok_and(|n| n > 0) {
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut headers = HashMap::new();
        loop {
            line.clear();
            if !reader.read_line(&mut line).is_ok_and(|n| n > 0) {
                return;
            }
            let Some((key, value)) = line.trim().split_once(':') else {
                break;
            };
            headers.insert(key.to_lowercase(), value.trim().to_owned());
        }
        let request = Request { path, headers };
        let before = {
            let mut kept = kept.lock().unwrap();
            let before = kept.iter().filter(|r| r.path == request.path).count();
            kept.push(request.clone());
            before
        };
        let answer = handler(&request, before);
        let (status, len) = (answer.status, answer.body.len());
        let mut head = format!("HTTP/1.1 {status} X\r\nContent-Length: {len}\r\n");
        for (key, value) in &answer.headers {
            head += &format!("{key}: {value}\r\n");
        }
        let body = &answer.body[..answer.cut.unwrap_or(len).min(len)];
        let sent = stream
            .write_all(format!("{head}\r\n").as_bytes())
            .and_then(|()| stream.write_all(body));
        if sent.is_err() || answer.cut.is_some() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
            return;
        }
        line.clear();
    }
}

/// An image of one layer.
#[derive(Clone)]
struct Made {
    layer: Vec<u8>,
    config: String,
    manifest: String,
}

impl Made {
    fn new(size: usize) -> Self {
        let data: Vec<u8> = (0..size).map(|n| ((n * n) >> 7) as u8).collect();
        let mut header = tar::Header::new_gnu();
        header.set_size(size as u64);
        header.set_mode(0o644);
        let mut layer = tar::Builder::new(Vec::new());
        layer.append_data(&mut header, "data", &data[..]).unwrap();
        let layer = layer.into_inner().unwrap();
        let digest = Digest::of(&layer);
        let config = format!(
            r#"{{"os":"linux","architecture":"amd64","rootfs":{{"diff_ids":["{digest}"]}}}}"#
        );
        let manifest = Self::manifest_of(&config, digest, layer.len() as u64);
        Made {
            layer,
            config,
            manifest,
        }
    }

    fn manifest_of(config: &str, layer: Digest, size: u64) -> String {
        format!(
            r#"{{"schemaVersion":2,"config":{{"digest":"{}","size":{}}},"layers":[{{"digest":"{layer}","size":{size}}}]}}"#,
            Digest::of(config.as_bytes()),
            config.len()
        )
    }

    /// What an ordinary registry answers.
    fn answer(&self, request: &Request) -> Answer {
        let path = request.path.as_str();
        let layer = Digest::of(&self.layer).to_string();
        if path == "/v2/" {
            answer(200, "{}")
        } else if path.contains("/manifests/") {
            answer(200, self.manifest.clone())
        } else if path.ends_with(&layer) {
            let range = request.headers.get("range").and_then(|range| {
                range
                    .strip_prefix("bytes=")?
                    .strip_suffix('-')?
                    .parse::<usize>()
                    .ok()
            });
            match range {
                Some(start) => answer(206, &self.layer[start..]),
                None => answer(200, &self.layer[..]),
            }
        } else if path.contains("/blobs/") {
            answer(200, self.config.clone())
        } else {
            answer(
                404,
                r#"{"errors":[{"code":"NAME_UNKNOWN","message":"no"}]}"#,
            )
        }
    }
}

fn pull_into(root: &Path, server: &Server, settings: &Settings) -> Result<Pulled, Error> {
    let store = Store::open(root).unwrap();
    store.pull(&server.name(), settings, &mut |_| ())
}

fn pull(server: &Server) -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    let pulled = pull_into(dir.path(), server, &Settings::default());
    let store = Store::open(dir.path()).unwrap();
    let images = store.list().unwrap().images;
    assert_eq!(images.len(), usize::from(pulled.is_ok()));
    assert!(!pulled.as_ref().is_ok_and(|pulled| pulled.was_there));
    pulled.and_then(|pulled| store.verify(&pulled.image))
}

fn error(server: &Server) -> RegistryError {
    match pull(server) {
        Err(Error::Registry(error)) => *error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_ordinary_one() {
    let made = Made::new(100_000);
    let server = Server::start(move |request, _| made.answer(request));
    pull(&server).unwrap();
}

#[test]
fn a_token_is_fetched_and_shown() {
    let made = Made::new(1000);
    let port = Arc::new(Mutex::new(0));
    let told = port.clone();
    let server = Server::start(move |request, _| {
        let port = *told.lock().unwrap();
        if request.path.starts_with("/token") {
            return match request.headers.get("authorization").map(String::as_str) {
                // "jo:pw"
                Some("Basic am86cHc=") => answer(200, r#"{"token":"secret"}"#),
                _ => answer(401, "no"),
            };
        }
        if request.headers.get("authorization").map(String::as_str) == Some("Bearer secret") {
            return made.answer(request);
        }
        let challenge = format!(r#"Bearer realm="http://127.0.0.1:{port}/token",service="s""#);
        Answer {
            headers: vec![("WWW-Authenticate", challenge)],
            ..answer(
                401,
                r#"{"errors":[{"code":"UNAUTHORIZED","message":"no"}]}"#,
            )
        }
    });
    *port.lock().unwrap() = server.port;
    assert!(matches!(
        error(&server),
        RegistryError::Unauthorized { action: "pull", .. }
    ));
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    let text = format!(
        r#"{{"auths": {{"127.0.0.1:{}": {{"auth": "am86cHc="}}}}}}"#,
        server.port
    );
    std::fs::write(&config, text).unwrap();
    let settings = Settings::default().with_docker_config(config);
    pull_into(&dir.path().join("store"), &server, &settings).unwrap();
    let asked = server.asked("/token");
    assert!(
        asked
            .iter()
            .all(|r| r.path.contains("repository%3Ax%3Apull")),
        "{asked:?}"
    );
}

#[test]
fn a_login_stays_with_its_registry() {
    let made = Made::new(1000);
    let layer = Digest::of(&made.layer).to_string();
    let elsewhere = {
        let made = made.clone();
        Server::start(move |request, _| made.answer(request))
    };
    let target = format!("http://localhost:{}/blobs/{layer}", elsewhere.port);
    let server = Server::start(move |request, _| {
        if !request.headers.contains_key("authorization") {
            let basic = r#"Basic realm="x""#.to_owned();
            return Answer {
                headers: vec![("WWW-Authenticate", basic)],
                ..answer(401, "{}")
            };
        }
        match request.path.ends_with(&layer) {
            true => Answer {
                headers: vec![("Location", target.clone())],
                ..answer(307, "")
            },
            false => made.answer(request),
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    let text = format!(
        r#"{{"auths": {{"127.0.0.1:{}": {{"auth": "am86cHc="}}}}}}"#,
        server.port
    );
    std::fs::write(&config, text).unwrap();
    let settings = Settings::default().with_docker_config(config);
    pull_into(&dir.path().join("store"), &server, &settings).unwrap();
    let asked = elsewhere.asked("/blobs/");
    assert!(!asked.is_empty());
    assert!(
        asked
            .iter()
            .all(|r| !r.headers.contains_key("authorization")),
        "{asked:?}"
    );
}

#[test]
fn passing_failures_pass() {
    let made = Made::new(300_000);
    let layer = Digest::of(&made.layer).to_string();
    let server = Server::start(move |request, before| match before {
        // The registry coughs once at everything but the greeting.
        0 if request.path != "/v2/" => answer(503, "busy"),
        1 if request.path.ends_with(&layer) => Answer {
            cut: Some(200_000),
            ..made.answer(request)
        },
        _ => made.answer(request),
    });
    pull(&server).unwrap();
    let ranges: Vec<_> = server
        .asked("/blobs/")
        .iter()
        .filter_map(|request| request.headers.get("range").cloned())
        .collect();
    assert!(ranges.iter().any(|range| range != "bytes=0-"), "{ranges:?}");
}

/// Breaks off in the midst of the layer, and then sends all of it anew with `status`, whatever was asked
/// for.
fn starts_anew(status: u16) -> Server {
    let made = Made::new(300_000);
    let layer = Digest::of(&made.layer).to_string();
    Server::start(move |request, before| {
        let mut answer = made.answer(request);
        if request.path.ends_with(&layer) {
            answer = Answer {
                status,
                body: made.layer.clone(),
                cut: (before == 0).then_some(150_000),
                ..answer
            };
        }
        answer
    })
}

#[test]
fn one_that_knows_no_ranges() {
    pull(&starts_anew(200)).unwrap();
}

#[test]
fn one_that_lies_about_ranges() {
    // It says that it goes on where it was asked to, and starts anew.
    let server = starts_anew(206);
    let error = error(&server);
    assert!(matches!(error, RegistryError::Size { .. }), "{error}");
}

#[test]
fn leftovers_of_any_kind() {
    let made = Made::new(300_000);
    let layer = &made.layer;
    let mut spoilt = layer[..200_000].to_vec();
    spoilt[7] ^= 1;
    for left in [
        &layer[..100_000],
        &layer[..],
        &spoilt,
        &[&layer[..], b"more"].concat(),
    ] {
        let served = made.clone();
        let server = Server::start(move |request, _| served.answer(request));
        let dir = tempfile::tempdir().unwrap();
        Store::open(dir.path()).unwrap();
        let part = format!("downloads/{}.part", Digest::of(layer).hex());
        std::fs::write(dir.path().join(part), left).unwrap();
        let pulled = pull_into(dir.path(), &server, &Settings::default()).unwrap();
        Store::open(dir.path())
            .unwrap()
            .verify(&pulled.image)
            .unwrap();
    }
}

#[test]
fn one_that_stays_broken() {
    let made = Made::new(300_000);
    let layer = Digest::of(&made.layer).to_string();
    let server = Server::start(move |request, _| match request.path.ends_with(&layer) {
        true => Answer {
            cut: Some(0),
            ..made.answer(request)
        },
        false => made.answer(request),
    });
    let error = error(&server);
    assert!(
        matches!(error, RegistryError::Broken { attempts: 4, .. }),
        "{error}"
    );
}

#[test]
fn other_content() {
    let made = Made::new(1000);
    let other = Made::new(1001);
    // Each document, and the layer, is that of another image.
    for part in ["manifest", "config", "layer"] {
        let (made, other) = (made.clone(), other.clone());
        let server = Server::start(move |request, _| {
            let layer = Digest::of(&made.layer).to_string();
            let config = Digest::of(made.config.as_bytes()).to_string();
            let path = request.path.as_str();
            match part {
                "config" if path.ends_with(&config) => answer(200, other.config.clone()),
                "layer" if path.ends_with(&layer) => answer(200, &other.layer[..made.layer.len()]),
                _ => made.answer(request),
            }
        });
        let result = match part {
            "manifest" => {
                let pinned = format!("127.0.0.1:{}/x@{}", server.port, Digest::of(b"other"));
                let dir = tempfile::tempdir().unwrap();
                let store = Store::open(dir.path()).unwrap();
                let settings = Settings::default();
                store
                    .pull(&pinned.parse().unwrap(), &settings, &mut |_| ())
                    .map(|_| ())
            }
            _ => pull(&server),
        };
        let error = result.unwrap_err();
        let error = error.of_registry().unwrap_or_else(|| panic!("{error}"));
        assert!(
            matches!(error, RegistryError::Mismatch { .. }),
            "{part}: {error}"
        );
    }
}

#[test]
fn what_is_no_registry() {
    for (status, body) in [
        (200, "<html>hello</html>".as_bytes().to_vec()),
        (200, b"{}".to_vec()),
        (200, b"[1, 2".to_vec()),
        (204, Vec::new()),
        (418, b"\x1b[2Jteapot".to_vec()),
        (302, Vec::new()),
    ] {
        let server = Server::start(move |_, _| answer(status, body.clone()));
        let error = pull(&server).unwrap_err();
        let text = error.to_string();
        assert!(!text.contains('\x1b') && text.len() < 1000, "{text}");
    }
    let server = Server::start(|_, _| answer(429, "slowly"));
    assert!(matches!(error(&server), RegistryError::Busy { .. }));
    let server = Server::start(|_, _| answer(404, "no"));
    assert!(matches!(error(&server), RegistryError::NotFound { .. }));
    let server = Server::start(|_, _| answer(403, "no"));
    assert!(matches!(error(&server), RegistryError::Unauthorized { .. }));
}

#[test]
fn more_than_anybody_needs() {
    // A layer said to be larger than the store takes; a manifest with too many layers; an index in
    // an index in an index.
    let made = Made::new(10);
    let layer = Digest::of(&made.layer);
    let huge = Made {
        manifest: Made::manifest_of(&made.config, layer, u64::MAX),
        ..made.clone()
    };
    let server = Server::start(move |request, _| huge.answer(request));
    assert!(matches!(error(&server), RegistryError::Size { .. }));
    let entry = format!(r#"{{"digest":"{layer}","size":10}}"#);
    let many = Made {
        manifest: format!(
            r#"{{"schemaVersion":2,"config":{entry},"layers":[{}]}}"#,
            vec![entry.as_str(); 5000].join(",")
        ),
        ..made.clone()
    };
    let server = Server::start(move |request, _| many.answer(request));
    assert!(matches!(error(&server), RegistryError::Refused { .. }));
    let mut nested = made.manifest.clone();
    let mut all = vec![nested.clone()];
    for _ in 0..8 {
        nested = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"digest":"{}"}}]}}"#,
            Digest::of(nested.as_bytes())
        );
        all.push(nested.clone());
    }
    let server = Server::start(move |request, _| {
        let last = request.path.rsplit('/').next().unwrap_or_default();
        match all
            .iter()
            .find(|text| Digest::of(text.as_bytes()).to_string() == last)
        {
            Some(text) => answer(200, text.clone()),
            None if request.path.contains("/manifests/") => answer(200, nested.clone()),
            None => made.answer(request),
        }
    });
    assert!(pull(&server).is_err());
}
