//! What the user has said about registries.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::RegistryError;
use super::name::is_local;

/// The file is written by hand and has a few lines.
const SETTINGS_MAX: u64 = 1 << 20;

/// How registries are reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    insecure: Vec<String>,
    mirrors: BTreeMap<String, Vec<String>>,
    docker: Option<PathBuf>,
}

/// `registries.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Document {
    insecure: Vec<String>,
    mirrors: BTreeMap<String, Vec<String>>,
}

impl Settings {
    /// Reads `registries.json`; where there is none, nothing was said.
    ///
    /// ```json
    /// {"insecure": ["registry.example:5000"],
    ///  "mirrors": {"registry.example": ["mirror.example:5000"]}}
    /// ```
    pub fn read(path: &Path) -> Result<Self, RegistryError> {
        let Some(bytes) = read_bounded(path, SETTINGS_MAX)? else {
            return Ok(Settings::default());
        };
        let document: Document =
            serde_json::from_slice(&bytes).map_err(|source| RegistryError::Settings {
                path: path.to_owned(),
                source,
            })?;
        Ok(Settings {
            insecure: document.insecure,
            mirrors: document.mirrors,
            docker: None,
        })
    }

    /// The same, with credentials from docker's configuration in this file.
    #[must_use]
    pub fn with_docker_config(mut self, path: PathBuf) -> Self {
        self.docker = Some(path);
        self
    }

    /// The same, with one more registry that may be spoken to in the clear.
    #[must_use]
    pub fn with_insecure(mut self, host: &str) -> Self {
        self.insecure.push(host.to_owned());
        self
    }

    /// Docker's configuration.
    pub(super) fn docker_config(&self) -> Option<&Path> {
        self.docker.as_deref()
    }

    /// Whether a registry may be spoken to without TLS, or with a certificate that nobody vouches
    /// for.
    pub(super) fn is_insecure(&self, host: &str) -> bool {
        self.insecure.iter().any(|insecure| insecure == host)
    }

    /// Whether a registry may be spoken to without TLS.
    pub(super) fn may_be_plain(&self, host: &str) -> bool {
        is_local(host) || self.is_insecure(host)
    }

    /// The hosts to pull from: mirrors, then the registry itself.
    pub(super) fn hosts<'a>(&'a self, host: &'a str) -> impl Iterator<Item = &'a str> {
        let mirrors = self.mirrors.get(host).into_iter().flatten();
        mirrors.map(String::as_str).chain([host])
    }
}

/// Reads a whole file; `None` when there is none.
pub(super) fn read_bounded(path: &Path, most: u64) -> Result<Option<Vec<u8>>, RegistryError> {
    use std::io::Read as _;
    let failed = |source| RegistryError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(most + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > most {
        return Err(failed(io::Error::other(format!(
            "it has more than {most} bytes"
        ))));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_and_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registries.json");
        assert_eq!(Settings::read(&path).unwrap(), Settings::default());
        std::fs::write(
            &path,
            r#"{"insecure": ["a.example:1"], "mirrors": {"docker.io": ["m.example"]}}"#,
        )
        .unwrap();
        let settings = Settings::read(&path).unwrap();
        assert!(settings.is_insecure("a.example:1") && !settings.is_insecure("a.example"));
        assert!(settings.may_be_plain("localhost:5000") && !settings.may_be_plain("m.example"));
        let hosts: Vec<_> = settings.hosts("docker.io").collect();
        assert_eq!(hosts, ["m.example", "docker.io"]);
        assert_eq!(
            settings.hosts("b.example").collect::<Vec<_>>(),
            ["b.example"]
        );
        std::fs::write(&path, r#"{"unsecure": []}"#).unwrap();
        let error = Settings::read(&path).unwrap_err();
        assert!(matches!(error, RegistryError::Settings { .. }), "{error}");
    }
}
