//! What an image says about running it (OCI image-spec, config.md).

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::digest::Digest;

/// How a command is run in an image, unless told otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ImageConfig {
    /// The start of the command line.
    #[serde(deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// The rest of the command line.
    #[serde(deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// `NAME=VALUE` pairs.
    #[serde(deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// The working directory; empty is `/`.
    #[serde(deserialize_with = "or_default")]
    pub working_dir: String,
    /// `user`, `uid`, `user:group`, `uid:gid` and so on; empty is root.
    #[serde(deserialize_with = "or_default")]
    pub user: String,
    /// Like `80/tcp`.
    #[serde(deserialize_with = "set_or_default")]
    pub exposed_ports: Vec<String>,
    /// Directories for data.
    #[serde(deserialize_with = "set_or_default")]
    pub volumes: Vec<String>,
    /// Free text by name.
    #[serde(deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    /// The signal that asks the command to end; empty is SIGTERM.
    #[serde(deserialize_with = "or_default")]
    pub stop_signal: String,
}

/// Go writes `null` for what is empty.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Sets are objects whose values say nothing; our own form is a list.
fn set_or_default<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Set {
        Object(BTreeMap<String, serde::de::IgnoredAny>),
        List(Vec<String>),
    }
    Ok(match Option::deserialize(deserializer)? {
        None => Vec::new(),
        Some(Set::Object(object)) => object.into_keys().collect(),
        Some(Set::List(list)) => list,
    })
}

/// The whole configuration document.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ConfigDocument {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(default, deserialize_with = "or_default")]
    pub config: ImageConfig,
    pub rootfs: RootFs,
}

/// The layers of an image, by the digests of their unpacked streams.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default, deserialize_with = "or_default")]
    pub diff_ids: Vec<Digest>,
}

impl ConfigDocument {
    /// The platform when it isn't the one that runs here.
    pub(crate) fn foreign_platform(&self) -> Option<String> {
        let known = |text: &str| {
            if text.is_empty() {
                "(unnamed)".to_owned()
            } else {
                text.into()
            }
        };
        (self.os != "linux" || self.architecture != "amd64")
            .then(|| format!("{}/{}", known(&self.os), known(&self.architecture)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_and_nothing() {
        let text = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":null},
            "config":{"Entrypoint":["/bin/x"],"Cmd":null,"Env":["A=b"],"WorkingDir":"/w","User":"1:2",
            "ExposedPorts":{"80/tcp":{}},"Volumes":null,"Labels":{"k":"v"},"StopSignal":"SIGINT",
            "Unknown":7}}"#;
        let document: ConfigDocument = serde_json::from_str(text).unwrap();
        assert_eq!(document.foreign_platform(), None);
        let config = document.config;
        assert_eq!(config.entrypoint, ["/bin/x"]);
        assert!(config.cmd.is_empty());
        assert_eq!((&config.working_dir[..], &config.user[..]), ("/w", "1:2"));
        assert_eq!(config.exposed_ports, ["80/tcp"]);
        assert_eq!(config.stop_signal, "SIGINT");
        let again: ImageConfig =
            serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);

        let bare: ConfigDocument =
            serde_json::from_str(r#"{"rootfs":{},"config":null,"os":"windows"}"#).unwrap();
        assert_eq!(bare.config, ImageConfig::default());
        assert_eq!(
            bare.foreign_platform().as_deref(),
            Some("windows/(unnamed)")
        );
    }
}
