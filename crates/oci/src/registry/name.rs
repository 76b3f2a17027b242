//! Names of images in registries, as docker reads them.

use std::fmt;
use std::str::FromStr;

use crate::digest::{Digest, DigestError};

/// The registry of names without one.
const DEFAULT_HOST: &str = "docker.io";
/// How that registry was once called; names with it mean the same.
const LEGACY_HOST: &str = "index.docker.io";
/// Where the default registry keeps images named by one word.
const OFFICIAL: &str = "library/";
/// The most that registries take of host and repository together.
const NAME_MAX: usize = 255;

/// `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`, with everything that is left out put in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Name {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is no name of an image in a registry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// What stands before the first slash is no host.
    #[error(
        "'{name}' names no image in a registry: '{host}' is no host; write HOST or HOST:PORT before the first slash"
    )]
    Host {
        /// The whole text.
        name: String,
        /// The part.
        host: String,
    },
    /// The repository.
    #[error(
        "'{name}' names no image in a registry: '{repository}' is no repository; it is made of lower-case letters and digits, with . _ - between them and / between words"
    )]
    Repository {
        /// The whole text.
        name: String,
        /// The part.
        repository: String,
    },
    /// The tag.
    #[error(
        "'{name}' names no image in a registry: '{tag}' is no tag; a tag is made of letters, digits and . _ -, at most 128 of them, and begins with no . or -"
    )]
    Tag {
        /// The whole text.
        name: String,
        /// The part.
        tag: String,
    },
    /// The digest.
    #[error("'{name}' names no image in a registry")]
    Digest {
        /// The whole text.
        name: String,
        /// Why.
        source: DigestError,
    },
    /// What is, or looks like, an image's digest.
    #[error(
        "'{name}' is a digest and no name; an image of the store is found by it, one of a registry by REPOSITORY@sha256:…"
    )]
    LooksLikeDigest {
        /// The whole text.
        name: String,
    },
    /// Far too long.
    #[error(
        "A name of {0} bytes is too long for a registry; {NAME_MAX} is the most, without tag and digest"
    )]
    TooLong(usize),
}

fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        // An IPv6 address, in brackets because of its colons.
        Some(rest) => match rest.split_once(']') {
            Some((address, "")) => return address.parse::<std::net::Ipv6Addr>().is_ok(),
            Some((address, port)) => match port.strip_prefix(':') {
                Some(port) if address.parse::<std::net::Ipv6Addr>().is_ok() => {
                    return is_port(port);
                }
                _ => return false,
            },
            None => return false,
        },
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || c == b'-')
    };
    host.split('.').all(label) && port.is_none_or(is_port)
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|c| c.is_ascii_digit()) && text.parse::<u16>().is_ok_and(|port| port != 0)
}

/// Words of letters and digits with one of `.`, `_`, `__` or any number of `-` between them.
fn is_path_component(text: &str) -> bool {
    let alphanumeric = |c: &u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends = bytes.first().is_some_and(alphanumeric) && bytes.last().is_some_and(alphanumeric);
    let separators = bytes.split(|c| alphanumeric(c)).all(|between| {
        matches!(between, b"" | b"." | b"_" | b"__") || between.iter().all(|c| *c == b'-')
    });
    ends && separators
}

fn is_tag(text: &str) -> bool {
    let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    text.len() <= 128
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|c| word(c) || c == b'.' || c == b'-')
}

/// The host and what follows it; the first part is one when it can't be a word of a repository.
fn split_host(text: &str) -> (&str, &str) {
    match text.split_once('/') {
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.bytes().any(|c| c.is_ascii_uppercase()) =>
        {
            (
                if first == LEGACY_HOST {
                    DEFAULT_HOST
                } else {
                    first
                },
                rest,
            )
        }
        _ => (DEFAULT_HOST, text),
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        if Digest::from_hex(name).is_some() || name.starts_with("sha256:") {
            let name = name.to_owned();
            return Err(NameError::LooksLikeDigest { name });
        }
        let whole = || name.to_owned();
        let (rest, digest) = match name.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(|source| NameError::Digest {
                    name: whole(),
                    source,
                })?;
                (rest, Some(digest))
            }
            None => (name, None),
        };
        let (host, rest) = split_host(rest);
        if !is_host(host) {
            let host = host.to_owned();
            return Err(NameError::Host {
                name: whole(),
                host,
            });
        }
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (rest, None),
        };
        if !path.split('/').all(is_path_component) {
            let repository = path.to_owned();
            return Err(NameError::Repository {
                name: whole(),
                repository,
            });
        }
        if let Some(tag) = tag.filter(|tag| !is_tag(tag)) {
            let tag = tag.to_owned();
            return Err(NameError::Tag { name: whole(), tag });
        }
        let official = host == DEFAULT_HOST && !path.contains('/');
        let repository = format!("{}{path}", if official { OFFICIAL } else { "" });
        let len = host.len() + 1 + repository.len();
        if len > NAME_MAX {
            return Err(NameError::TooLong(len));
        }
        let tag = match (tag, digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Name {
            host: host.to_owned(),
            repository,
            tag,
            digest,
        })
    }
}

impl Name {
    /// The registry, with its port where one was given.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The path of the image in its registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; `latest` unless a tag or a digest was given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest of the image's manifest or index, where one was given.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Whether the registry is on this host.
    pub fn is_local(&self) -> bool {
        is_local(&self.host)
    }

    /// The name without what everybody leaves out.
    pub fn familiar(&self) -> String {
        let text = self.to_string();
        let rest = text.strip_prefix(DEFAULT_HOST);
        match rest.and_then(|rest| rest.strip_prefix('/')) {
            Some(rest) => {
                // A repository of two words would read as one of the default registry's own.
                let short = rest
                    .strip_prefix(OFFICIAL)
                    .filter(|short| !short.contains('/'));
                short.unwrap_or(rest).to_owned()
            }
            None => text,
        }
    }
}

/// Whether a host is this one: what is sent to it passes no wire.
pub(super) fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost"
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.map_or(Ok(()), |digest| write!(f, "@{digest}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_left_out_is_put_in() {
        let digest = Digest::of(b"x");
        for (text, whole, short) in [
            ("debian", "docker.io/library/debian:latest", "debian:latest"),
            ("debian:12", "docker.io/library/debian:12", "debian:12"),
            ("a/b", "docker.io/a/b:latest", "a/b:latest"),
            (
                "docker.io/debian",
                "docker.io/library/debian:latest",
                "debian:latest",
            ),
            (
                "index.docker.io/debian",
                "docker.io/library/debian:latest",
                "debian:latest",
            ),
            (
                "docker.io/library/a/b",
                "docker.io/library/a/b:latest",
                "library/a/b:latest",
            ),
            ("localhost/a", "localhost/a:latest", "localhost/a:latest"),
            (
                "localhost:5000/a/b:c",
                "localhost:5000/a/b:c",
                "localhost:5000/a/b:c",
            ),
            ("[::1]:5000/a", "[::1]:5000/a:latest", "[::1]:5000/a:latest"),
            (
                "example.com/x-y__z/w.v:V_1",
                "example.com/x-y__z/w.v:V_1",
                "example.com/x-y__z/w.v:V_1",
            ),
            ("Host/a", "Host/a:latest", "Host/a:latest"),
        ] {
            assert_eq!(parse(text).to_string(), whole, "{text}");
            assert_eq!(parse(text).familiar(), short, "{text}");
            assert_eq!(parse(short), parse(text), "{text}");
        }
        let pinned = parse(&format!("debian@{digest}"));
        assert_eq!(
            pinned.to_string(),
            format!("docker.io/library/debian@{digest}")
        );
        assert_eq!((pinned.tag(), pinned.digest()), (None, Some(digest)));
        let both = parse(&format!("debian:12@{digest}"));
        assert_eq!((both.tag(), both.digest()), (Some("12"), Some(digest)));
    }

    #[test]
    fn what_names_nothing() {
        let error = |text: &str| text.parse::<Name>().unwrap_err();
        for text in [
            "",
            "Debian",
            "a//b",
            "/a",
            "a/",
            "a b",
            "-a",
            "a..b",
            "a___b",
            "localhost/",
            "é",
        ] {
            assert!(
                matches!(error(text), NameError::Repository { .. }),
                "{text}"
            );
        }
        for text in [
            "a:",
            "a:-x",
            "a:b/c",
            "a:b:c",
            &format!("a:{}", "x".repeat(129)),
        ] {
            assert!(
                matches!(error(text), NameError::Tag { .. } | NameError::Host { .. }),
                "{text}"
            );
        }
        for text in [
            "a.:1/x",
            "x:/a",
            "x:0/a",
            "x:99999/a",
            "[::g]:1/a",
            "[::1/a",
            "-x.y/a",
            "a..b/x",
        ] {
            assert!(matches!(error(text), NameError::Host { .. }), "{text}");
        }
        assert!(matches!(error("a@sha256:00"), NameError::Digest { .. }));
        assert!(matches!(error(&"a".repeat(300)), NameError::TooLong(_)));
        let hex = Digest::of(b"").hex();
        for text in [&hex, &format!("sha256:{hex}"), "sha256:0123"] {
            assert!(matches!(error(text), NameError::LooksLikeDigest { .. }));
        }
    }

    #[test]
    fn this_host() {
        for (host, local) in [
            ("localhost:5000", true),
            ("127.0.0.1", true),
            ("127.9.9.9:1", true),
            ("[::1]:5", true),
            ("10.0.0.1", false),
            ("localhost.example", false),
            ("127.0.0.1.example:5", false),
        ] {
            assert_eq!(is_local(host), local, "{host}");
        }
    }

    proptest! {
        #[test]
        fn names_survive_printing(text in "([a-zA-Z0-9.:\\[\\]-]{1,12}/)?[a-z0-9._/-]{1,12}(:[\\w.-]{1,5})?") {
            if let Ok(name) = text.parse::<Name>() {
                prop_assert_eq!(name.to_string().parse(), Ok(name.clone()));
                prop_assert_eq!(name.familiar().parse(), Ok(name));
            }
        }

        #[test]
        fn nothing_panics(text in "\\PC*") {
            let _ = text.parse::<Name>();
        }
    }
}
