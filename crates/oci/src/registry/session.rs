//! One registry, one repository: a connection that is authorised, and its errors in our words.

use std::error::Error as StdError;
use std::sync::Once;
use std::time::Duration;

use oci_client::client::{Certificate, ClientConfig, ClientProtocol};
use oci_client::errors::{DigestError, OciDistributionError, OciErrorCode};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};

use super::credentials::Credentials;
use super::{Name, RegistryError, Settings};
use crate::digest::Digest;

/// How often something is tried before it is given up.
pub(super) const ATTEMPTS: u32 = 4;
/// A server that says nothing for so long is as good as gone.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// The most that is repeated of a registry's words.
const SAID_MAX: usize = 300;

/// A registry that has let us in, for one image.
pub(super) struct Session {
    pub(super) client: Client,
    /// The image as it is asked for: with the host that is spoken to.
    pub(super) reference: Reference,
    pub(super) host: String,
    name: String,
    anonymous: bool,
    action: &'static str,
}

/// What happens on a session.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Pull,
    Push,
}

impl Action {
    fn operation(self) -> RegistryOperation {
        match self {
            Action::Pull => RegistryOperation::Pull,
            Action::Push => RegistryOperation::Push,
        }
    }
}

/// How the bytes travel.
#[derive(Clone, Copy)]
enum Transport {
    Tls,
    /// Whoever's certificate it is.
    AnyTls,
    Plain,
}

fn client(host: &str, transport: Transport) -> Result<Client, RegistryError> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // A program around us may have chosen another one, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    // The client library makes a TLS client whether one is used or not, and has no error for it.
    if rustls_native_certs::load_native_certs().certs.is_empty() {
        return Err(RegistryError::NoAuthorities);
    }
    let config = ClientConfig {
        protocol: match transport {
            Transport::Plain => ClientProtocol::Http,
            Transport::Tls | Transport::AnyTls => ClientProtocol::Https,
        },
        accept_invalid_certificates: matches!(transport, Transport::AnyTls),
        extra_root_certificates: Vec::<Certificate>::new(),
        use_monolithic_push: true,
        read_timeout: Some(READ_TIMEOUT),
        connect_timeout: Some(CONNECT_TIMEOUT),
        user_agent: concat!("skerry/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    };
    Client::try_from(config).map_err(|error| RegistryError::Unreachable {
        host: host.to_owned(),
        source: error.into(),
    })
}

impl Session {
    /// Finds out how `host` is spoken to, and who we are to it.
    pub(super) async fn open(
        name: &Name,
        host: &str,
        action: Action,
        settings: &Settings,
    ) -> Result<Self, RegistryError> {
        let credentials = Credentials::find(host, settings.docker_config())?;
        let anonymous = credentials == Credentials::Anonymous;
        let auth = match credentials {
            Credentials::Anonymous => RegistryAuth::Anonymous,
            Credentials::Basic { user, password } => RegistryAuth::Basic(user, password),
            Credentials::Bearer(token) => RegistryAuth::Bearer(token),
        };
        let repository = name.repository().to_owned();
        let tag = name.tag().unwrap_or("latest").to_owned();
        let reference = match name.digest() {
            Some(digest) => Reference::with_digest(host.to_owned(), repository, digest.to_string()),
            None => Reference::with_tag(host.to_owned(), repository, tag),
        };
        let first = match settings.is_insecure(host) {
            true => Transport::AnyTls,
            false => Transport::Tls,
        };
        let mut session = Session {
            client: client(host, first)?,
            reference,
            host: host.to_owned(),
            name: name.to_string(),
            anonymous,
            action: match action {
                Action::Pull => "pull",
                Action::Push => "push",
            },
        };
        let operation = action.operation();
        let mut entered = session.enter(&auth, operation).await;
        if let Err(error) = &entered
            && settings.may_be_plain(host)
            && speaks_plainly(error)
        {
            session.client = client(host, Transport::Plain)?;
            entered = session.enter(&auth, operation).await;
        }
        entered.map_err(|error| session.told(error))?;
        Ok(session)
    }

    async fn enter(
        &self,
        auth: &RegistryAuth,
        operation: RegistryOperation,
    ) -> Result<(), OciDistributionError> {
        let entered = self.client.auth(&self.reference, auth, operation).await;
        entered.map(|_| ())
    }

    /// Does something that may be done again, until it works or is no use.
    pub(super) async fn again<T>(
        &self,
        mut attempt: impl AsyncFnMut() -> Result<T, OciDistributionError>,
    ) -> Result<T, RegistryError> {
        let mut number = 1;
        loop {
            match attempt().await {
                Ok(value) => return Ok(value),
                Err(error) if number < ATTEMPTS && is_passing(&error) => {
                    tracing::debug!("{}: {error}; trying again", self.host);
                    pause(number).await;
                    number += 1;
                }
                Err(error) => return Err(self.told(error)),
            }
        }
    }

    /// An error in our words.
    pub(super) fn told(&self, error: OciDistributionError) -> RegistryError {
        use OciDistributionError as Other;
        match &error {
            Other::RequestError(inner) => match inner.status().map(|status| status.as_u16()) {
                Some(status) => self.told_status(status, String::new()),
                None => self.told_network(error),
            },
            Other::IoError(_) => self.told_network(error),
            Other::UnauthorizedError { .. } | Other::AuthenticationFailure(_) => {
                self.unauthorized()
            }
            Other::ServerError { code, message, .. } => self.told_status(*code, message.clone()),
            Other::RegistryError { envelope, .. } => self.told_envelope(&envelope.errors),
            Other::ImageManifestNotFoundError(_) => self.not_found(),
            Other::DigestError(DigestError::VerificationError { expected, actual }) => {
                match (expected.parse(), actual.parse()) {
                    (Ok(expected), Ok(found)) => self.mismatch("the manifest", expected, found),
                    _ => self.not_a_registry(error),
                }
            }
            _ => self.not_a_registry(error),
        }
    }

    fn not_a_registry(&self, error: OciDistributionError) -> RegistryError {
        RegistryError::NoRegistry {
            host: self.host.clone(),
            source: error.into(),
        }
    }

    /// Something else came than what was asked for.
    pub(super) fn mismatch(
        &self,
        part: &'static str,
        expected: Digest,
        found: Digest,
    ) -> RegistryError {
        RegistryError::Mismatch {
            host: self.host.as_str().into(),
            name: self.name.as_str().into(),
            part,
            expected,
            found,
        }
    }

    fn told_envelope(&self, errors: &[oci_client::errors::OciError]) -> RegistryError {
        let Some(first) = errors.first() else {
            return self.refused("(without a reason)".to_owned());
        };
        match first.code {
            OciErrorCode::ManifestUnknown
            | OciErrorCode::NameUnknown
            | OciErrorCode::NotFound
            | OciErrorCode::BlobUnknown
            | OciErrorCode::ManifestBlobUnknown => self.not_found(),
            OciErrorCode::Unauthorized | OciErrorCode::Denied => self.unauthorized(),
            OciErrorCode::Toomanyrequests => self.busy(),
            _ if first.message.is_empty() => self.refused(format!("{:?}", first.code)),
            _ => self.refused(first.message.clone()),
        }
    }

    fn told_status(&self, status: u16, said: String) -> RegistryError {
        match status {
            401 | 403 => self.unauthorized(),
            404 => self.not_found(),
            429 => self.busy(),
            _ if said.trim().is_empty() => self.refused(format!("HTTP status {status}")),
            _ => self.refused(format!("HTTP status {status}, {said}")),
        }
    }

    fn told_network(&self, error: OciDistributionError) -> RegistryError {
        let host = self.host.clone();
        if causes(&error).any(|cause| cause.to_string() == "dns error") {
            return RegistryError::UnknownHost { host };
        }
        let source: Box<dyn StdError + Send + Sync> = error.into();
        match tls_error(&*source) {
            Some(rustls::Error::InvalidCertificate(_)) => RegistryError::Untrusted { host, source },
            _ => RegistryError::Unreachable { host, source },
        }
    }

    fn busy(&self) -> RegistryError {
        let host = self.host.clone();
        RegistryError::Busy { host }
    }

    fn not_found(&self) -> RegistryError {
        RegistryError::NotFound {
            host: self.host.clone(),
            name: self.name.clone(),
        }
    }

    fn unauthorized(&self) -> RegistryError {
        RegistryError::Unauthorized {
            host: self.host.clone(),
            name: self.name.clone(),
            who: if self.anonymous {
                "somebody without a login"
            } else {
                "the user of docker's config.json"
            },
            action: self.action,
        }
    }

    pub(super) fn refused(&self, said: String) -> RegistryError {
        // It goes to a terminal.
        let said = said
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .take(SAID_MAX)
            .collect();
        RegistryError::Refused {
            host: self.host.clone(),
            name: self.name.clone(),
            action: self.action,
            said,
        }
    }

    /// The image, for messages.
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

/// Waits longer from time to time.
pub(super) async fn pause(number: u32) {
    let milliseconds = 200 * 3u64.saturating_pow(number.saturating_sub(1)).min(50);
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
}

type Cause = dyn StdError + 'static;

/// An error and what caused it.
fn causes(error: &Cause) -> impl Iterator<Item = &Cause> {
    std::iter::successors(Some(error), |&error| {
        // An I/O error gives the source of what it wraps, and not that itself.
        let wrapped = error
            .downcast_ref::<std::io::Error>()
            .and_then(|error| error.get_ref());
        match wrapped {
            Some(wrapped) => Some(wrapped as &Cause),
            None => error.source(),
        }
    })
}

fn tls_error(error: &Cause) -> Option<&rustls::Error> {
    causes(error).find_map(|cause| cause.downcast_ref())
}

/// Whether an error is what a server without TLS causes when it is greeted with it.
fn speaks_plainly(error: &OciDistributionError) -> bool {
    if !matches!(error, OciDistributionError::RequestError(error) if error.is_connect()) {
        return false;
    }
    match tls_error(error) {
        Some(rustls::Error::InvalidMessage(_)) => true,
        Some(_) => false,
        // One that doesn't answer such a greeting at all.
        None => causes(error).any(|cause| {
            let kind = cause.downcast_ref::<std::io::Error>().map(|e| e.kind());
            matches!(
                kind,
                Some(std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset)
            )
        }),
    }
}

/// Whether an error may be gone the next time.
pub(super) fn is_passing(error: &OciDistributionError) -> bool {
    match error {
        OciDistributionError::RequestError(error) => match error.status() {
            Some(status) => status.is_server_error() || status.as_u16() == 429,
            None => {
                tls_error(error).is_none()
                    && !causes(error).any(|cause| cause.to_string() == "dns error")
                    && !error.is_builder()
            }
        },
        OciDistributionError::IoError(_) => true,
        OciDistributionError::ServerError { code, .. } => *code >= 500 || *code == 429,
        OciDistributionError::RegistryError { envelope, .. } => envelope
            .errors
            .iter()
            .any(|error| error.code == OciErrorCode::Toomanyrequests),
        _ => false,
    }
}
