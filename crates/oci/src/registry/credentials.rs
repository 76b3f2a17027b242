//! Who we are to a registry: docker's `config.json` and the helper programs it names.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use base64::Engine as _;
use serde::Deserialize;

use super::RegistryError;
use super::settings::read_bounded;

/// Far more than any real one.
const CONFIG_MAX: u64 = 4 << 20;
/// The same for what a helper program says.
const ANSWER_MAX: u64 = 1 << 20;
/// How docker's files name the default registry.
const DEFAULT_KEY: &str = "https://index.docker.io/v1/";

/// What is shown to a registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    Anonymous,
    Basic { user: String, password: String },
    Bearer(String),
}

/// The parts of docker's configuration that say who we are.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    auths: BTreeMap<String, Login>,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Login {
    auth: String,
    username: String,
    password: String,
    #[serde(rename = "identitytoken")]
    identity_token: String,
    #[serde(rename = "registrytoken")]
    registry_token: String,
}

/// What a helper program prints.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// The host that a key of `auths` stands for: some have a scheme and a path.
fn host_of(key: &str) -> &str {
    let rest = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    rest.split('/').next().unwrap_or_default()
}

/// Whether a key of docker's files is for a registry.
fn is_for(key: &str, host: &str) -> bool {
    let found = host_of(key);
    found == host || host == "docker.io" && found == "index.docker.io"
}

/// What docker asks helper programs for.
fn key_of(host: &str) -> &str {
    if host == "docker.io" {
        DEFAULT_KEY
    } else {
        host
    }
}

impl Credentials {
    /// Looks a registry up in docker's configuration.
    pub(super) fn find(host: &str, config: Option<&Path>) -> Result<Self, RegistryError> {
        let Some(path) = config else {
            return Ok(Credentials::Anonymous);
        };
        let Some(bytes) = read_bounded(path, CONFIG_MAX)? else {
            return Ok(Credentials::Anonymous);
        };
        let config: Config =
            serde_json::from_slice(&bytes).map_err(|source| RegistryError::DockerConfig {
                path: path.to_owned(),
                source,
            })?;
        let own = config.helpers.iter().find(|(key, _)| is_for(key, host));
        let helper = own.map(|(_, helper)| helper).or(config.store.as_ref());
        if let Some(helper) = helper.filter(|helper| !helper.is_empty()) {
            let found = ask(helper, host)?;
            if found != Credentials::Anonymous {
                return Ok(found);
            }
        }
        let exact = config.auths.get(key_of(host));
        let login = exact.or_else(|| {
            let mut all = config.auths.iter();
            all.find_map(|(key, login)| is_for(key, host).then_some(login))
        });
        login.map_or(Ok(Credentials::Anonymous), |login| {
            of_login(login).ok_or_else(|| RegistryError::Login {
                path: path.to_owned(),
                host: host.to_owned(),
            })
        })
    }
}

/// What an entry of `auths` says; `None` when it can't be understood.
fn of_login(login: &Login) -> Option<Credentials> {
    if !login.registry_token.is_empty() {
        return Some(Credentials::Bearer(login.registry_token.clone()));
    }
    if !login.identity_token.is_empty() {
        return None;
    }
    let (user, password) = if login.auth.is_empty() {
        (login.username.clone(), login.password.clone())
    } else {
        let engine = base64::engine::general_purpose::STANDARD;
        let text = String::from_utf8(engine.decode(&login.auth).ok()?).ok()?;
        let (user, password) = text.split_once(':')?;
        // Docker's own decoder cuts these off.
        (user.to_owned(), password.trim_matches('\0').to_owned())
    };
    if user.is_empty() {
        // An entry that says only that a helper knows more.
        return Some(Credentials::Anonymous);
    }
    Some(Credentials::Basic { user, password })
}

/// Asks a helper program, as docker does: the registry on its stdin, JSON on its stdout.
fn ask(helper: &str, host: &str) -> Result<Credentials, RegistryError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let failed = |problem: String| RegistryError::Helper {
        program: format!("docker-credential-{helper}"),
        host: host.to_owned(),
        problem,
    };
    if !helper.chars().all(plain) {
        return Err(failed("that is no name of a program".to_owned()));
    }
    let mut child = Command::new(format!("docker-credential-{helper}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("it can't be started ({error})")))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that doesn't read has its own reasons, and says so by its status.
        let _ = stdin.write_all(key_of(host).as_bytes());
    }
    let mut answer = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let read = stdout.take(ANSWER_MAX).read_to_end(&mut answer);
        read.map_err(|error| failed(format!("it can't be heard ({error})")))?;
    }
    let status = child
        .wait()
        .map_err(|error| failed(format!("it can't be waited for ({error})")))?;
    if !status.success() {
        let said = String::from_utf8_lossy(&answer);
        // The words by which helpers say that they know nothing, which is no failure.
        if said.contains("credentials not found") {
            return Ok(Credentials::Anonymous);
        }
        let said: String = said.trim().chars().take(200).collect();
        return Err(failed(format!("{status}: {said}")));
    }
    let answer: Answer = serde_json::from_slice(&answer)
        .map_err(|error| failed(format!("its answer is malformed ({error})")))?;
    match answer.username.as_str() {
        "" => Ok(Credentials::Anonymous),
        "<token>" => Err(failed(
            "it has an identity token, which is not understood here".to_owned(),
        )),
        _ => Ok(Credentials::Basic {
            user: answer.username,
            password: answer.secret,
        }),
    }
}

/// Any bytes as docker's configuration: no panic, and no credentials for others.
#[cfg(test)]
fn parse(bytes: &[u8], host: &str) -> Option<Credentials> {
    let config: Config = serde_json::from_slice(bytes).ok()?;
    let login = config
        .auths
        .iter()
        .find_map(|(key, login)| is_for(key, host).then_some(login))?;
    of_login(login)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn find(config: &str, host: &str) -> Result<Credentials, RegistryError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, config).unwrap();
        Credentials::find(host, Some(&path))
    }

    fn basic(user: &str, password: &str) -> Credentials {
        Credentials::Basic {
            user: user.to_owned(),
            password: password.to_owned(),
        }
    }

    fn known(config: &str, host: &str, expected: &Credentials) {
        match find(config, host) {
            Ok(found) => assert!(found == *expected, "{host} in {config}"),
            Err(error) => panic!("{host} in {config}: {error}"),
        }
    }

    #[test]
    fn each_form_of_an_entry() {
        // "joz:pw" and "jo:pw:x".
        let config = r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "am96OnB3"},
            "localhost:5000": {"auth": "am86cHc6eA=="},
            "https://b.example/v2/": {"username": "u", "password": "p"},
            "c.example": {"registrytoken": "t"},
            "d.example": {"identitytoken": "t"},
            "e.example": {"auth": "!"},
            "f.example": {}}, "HttpHeaders": {"x": "y"}}"#;
        known(config, "localhost:5000", &basic("jo", "pw:x"));
        known(config, "docker.io", &basic("joz", "pw"));
        known(config, "b.example", &basic("u", "p"));
        known(config, "c.example", &Credentials::Bearer("t".to_owned()));
        known(config, "f.example", &Credentials::Anonymous);
        known(config, "localhost", &Credentials::Anonymous);
        for host in ["d.example", "e.example"] {
            assert!(
                matches!(find(config, host), Err(RegistryError::Login { .. })),
                "{host}"
            );
        }
        assert!(matches!(
            find("{", "x"),
            Err(RegistryError::DockerConfig { .. })
        ));
        let none = Credentials::find("x", Some(Path::new("/nonexistent/skerry")));
        assert!(matches!(none, Ok(Credentials::Anonymous)));
    }

    #[test]
    fn helpers_have_sane_names_and_must_exist() {
        for helper in ["../x", "a b", "skerry-has-none"] {
            let config = format!(r#"{{"credsStore": "{helper}"}}"#);
            let error = find(&config, "a.example");
            assert!(
                matches!(error, Err(RegistryError::Helper { .. })),
                "{helper}"
            );
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&bytes, "a.example");
        }

        #[test]
        fn what_docker_writes_is_read(user in "[^:\\x00]{1,12}", password in "[^\\x00]{0,12}") {
            let engine = base64::engine::general_purpose::STANDARD;
            let auth = engine.encode(format!("{user}:{password}"));
            let config = serde_json::json!({"auths": {"a.example": {"auth": auth}}}).to_string();
            prop_assert!(parse(config.as_bytes(), "a.example") == Some(basic(&user, &password)));
            prop_assert!(parse(config.as_bytes(), "b.example").is_none());
        }
    }
}
