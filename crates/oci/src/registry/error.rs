//! What can go wrong between us and a registry.

use std::io;
use std::path::PathBuf;

use crate::digest::Digest;

/// What an HTTP library says; its texts are chains of causes.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// An error of a registry, or of what was said about registries.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// Its name can't be resolved.
    #[error(
        "The registry {host} is unknown: its name has no address; check the name and this host's network"
    )]
    UnknownHost {
        /// The registry.
        host: String,
    },
    /// Nothing answers there.
    #[error(
        "The registry {host} can't be reached; check its address and port, this host's network, and whether it runs"
    )]
    Unreachable {
        /// The registry.
        host: String,
        /// Why.
        source: Cause,
    },
    /// Its certificate.
    #[error(
        "The certificate of the registry {host} isn't trusted; name a file with its authority's in SSL_CERT_FILE, or list the registry as insecure in registries.json"
    )]
    Untrusted {
        /// The registry.
        host: String,
        /// Why.
        source: Cause,
    },
    /// No certificates of authorities on this host.
    #[error(
        "This host has no certificates of authorities; install them (package ca-certificates), or name a file with them in SSL_CERT_FILE"
    )]
    NoAuthorities,
    /// No such image.
    #[error("The registry {host} has no image {name}; check the name and the tag")]
    NotFound {
        /// The registry.
        host: String,
        /// The image.
        name: String,
    },
    /// Who we are isn't enough.
    #[error(
        "The registry {host} doesn't let {who} {action} {name}; put the right user and password into docker's config.json, for example with `docker login {host}`"
    )]
    Unauthorized {
        /// The registry.
        host: String,
        /// The image.
        name: String,
        /// Who asked.
        who: &'static str,
        /// What was tried.
        action: &'static str,
    },
    /// Too many requests.
    #[error("The registry {host} wants no more requests for now; try later, or log in")]
    Busy {
        /// The registry.
        host: String,
    },
    /// Another refusal.
    #[error("The registry {host} refused to {action} {name}: {said}")]
    Refused {
        /// The registry.
        host: String,
        /// The image.
        name: String,
        /// What was tried.
        action: &'static str,
        /// Its words.
        said: String,
    },
    /// The connection broke, again and again.
    #[error(
        "The connection to the registry {host} broke {attempts} times amid {what}; try again, what was received is kept"
    )]
    Broken {
        /// The registry.
        host: String,
        /// What was on its way.
        what: String,
        /// How often it was tried.
        attempts: u32,
        /// Why, the last time.
        source: Cause,
    },
    /// What came isn't what was asked for.
    #[error(
        "The registry {host} sent something else for {part} of {name}: its digest is {found} instead of {expected}; tell who keeps the registry, it was not used"
    )]
    Mismatch {
        /// The registry.
        host: Box<str>,
        /// The image.
        name: Box<str>,
        /// The part.
        part: &'static str,
        /// What it should be.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// More or less than was announced.
    #[error(
        "The registry {host} sent {found} bytes for {part} of {name} instead of {expected}; tell who keeps the registry, it was not used"
    )]
    Size {
        /// The registry.
        host: String,
        /// The image.
        name: String,
        /// The part.
        part: &'static str,
        /// What was announced, or is the most.
        expected: String,
        /// What came.
        found: u64,
    },
    /// Not what a registry says.
    #[error("What answers at {host} doesn't speak as a registry does; check the name")]
    NoRegistry {
        /// The registry.
        host: String,
        /// Why.
        source: Cause,
    },
    /// A file with settings.
    #[error("'{}' can't be read; check its permissions", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Our own settings.
    #[error("'{}' is malformed; it is JSON with the keys insecure, a list of HOST:PORT, and mirrors, lists by host", path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Docker's.
    #[error("Docker's configuration '{}' is malformed; mend it, or name another folder in DOCKER_CONFIG", path.display())]
    DockerConfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// An entry of docker's configuration.
    #[error("Docker's configuration '{}' has a login for {host} that can't be used here; log in again with a user and a password", path.display())]
    Login {
        /// The file.
        path: PathBuf,
        /// The registry.
        host: String,
    },
    /// A helper program.
    #[error(
        "The program {program} was to tell who logs in to {host}, and failed: {problem}; mend it, or take it out of docker's config.json"
    )]
    Helper {
        /// The program.
        program: String,
        /// The registry.
        host: String,
        /// What happened.
        problem: String,
    },
    /// An image whose layers aren't here.
    #[error(
        "The image {name} was put into the store without its layers as they travel; import it again, after `skerry rmi {name}`"
    )]
    NoSource {
        /// The image.
        name: String,
    },
    /// A digest where a tag is needed.
    #[error(
        "An image is pushed under a tag, and {name} has a digest instead; give it a name with `skerry tag`"
    )]
    PushByDigest {
        /// The image.
        name: String,
    },
    /// This process.
    #[error("The network can't be used from this process")]
    Runtime(#[source] io::Error),
}
