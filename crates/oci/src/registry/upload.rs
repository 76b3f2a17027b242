//! An image of the store, to a registry: what that lacks of its parts, then its manifest.

use std::io::Read;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::stream;
use oci_client::errors::OciDistributionError;
use serde::Deserialize;

use super::download::Reporter;
use super::session::{Action, Session};
use super::{Name, Pushed, RegistryError, Settings, runtime};
use crate::digest::Digest;
use crate::manifest::{Part, blob, part};
use crate::source::OCI_MANIFEST;
use crate::{Error, Progress, Store};

/// Bytes that are read and sent in one piece.
const PIECE: usize = 256 << 10;

/// How often it is told how much has been sent.
const TICK: Duration = Duration::from_millis(100);

/// What a manifest says about itself.
#[derive(Default, Deserialize)]
struct Typed {
    #[serde(default, rename = "mediaType")]
    media_type: String,
}

impl Store {
    /// Sends an image of the store to the registry of its name.
    pub fn push(
        &self,
        name: &Name,
        settings: &Settings,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Pushed, Error> {
        if name.digest().is_some() || name.tag().is_none() {
            let name = name.to_string();
            return Err(RegistryError::PushByDigest { name }.into());
        }
        let image = self.find(&name.to_string())?;
        let no_source = || RegistryError::NoSource {
            name: name.to_string(),
        };
        let manifest = self.manifest(&image)?.ok_or_else(no_source)?;
        let Part::Image(parts) = part(&manifest) else {
            return Err(no_source().into());
        };
        let reporter = Reporter::new(progress);
        runtime()?.block_on(async {
            let session = Session::open(name, name.host(), Action::Push, settings).await?;
            // The configuration last, as it names the layers.
            for (digest, _) in parts.iter().rev() {
                let path = self.source(&image).join(blob(digest));
                let size = std::fs::metadata(&path)
                    .map_err(|error| self.failed("read", &path, error))?
                    .len();
                send(&session, &reporter, *digest, &path, size).await?;
            }
            let typed: Typed = serde_json::from_slice(&manifest).unwrap_or_default();
            let media_type = match typed.media_type.as_str() {
                "" => OCI_MANIFEST,
                media_type => media_type,
            };
            let pushed = session
                .again(async || {
                    let media_type = media_type.try_into().map_err(|_| {
                        OciDistributionError::UnsupportedMediaTypeError(media_type.to_owned())
                    })?;
                    let (client, reference) = (&session.client, &session.reference);
                    client
                        .push_manifest_raw(reference, manifest.clone(), media_type)
                        .await
                })
                .await;
            pushed.map_err(Error::from)
        })?;
        Ok(Pushed {
            digest: Digest::of(&manifest),
            size: manifest.len() as u64,
        })
    }
}

/// Sends a part, unless the registry has it.
pub(super) async fn send(
    session: &Session,
    reporter: &Reporter<'_>,
    digest: Digest,
    path: &Path,
    size: u64,
) -> Result<(), Error> {
    let (client, reference, name) = (&session.client, &session.reference, digest.to_string());
    let is_there = session
        .again(async || client.blob_exists(reference, &name).await)
        .await?;
    let report = |done| {
        let size = Some(size);
        reporter.tell(Progress::Transfer { digest, done, size });
    };
    if !is_there {
        session
            .again(async || {
                let sent = Arc::new(AtomicU64::new(0));
                let pieces = stream::iter(pieces(path, sent.clone())?);
                let mut push = pin!(client.push_blob_stream(reference, pieces, &name, Some(size)));
                loop {
                    report(sent.load(Ordering::Relaxed).min(size));
                    if let Ok(pushed) = tokio::time::timeout(TICK, push.as_mut()).await {
                        return pushed;
                    }
                }
            })
            .await?;
    }
    report(size);
    Ok(())
}

/// A file, piece by piece; those that were asked for are counted.
fn pieces(
    path: &Path,
    sent: Arc<AtomicU64>,
) -> std::io::Result<impl Iterator<Item = Result<bytes::Bytes, OciDistributionError>> + use<>> {
    let mut file = std::fs::File::open(path)?;
    let mut ended = false;
    Ok(std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let mut piece = vec![0; PIECE];
        match file.read(&mut piece) {
            Ok(0) => None,
            Ok(n) => {
                piece.truncate(n);
                sent.fetch_add(n as u64, Ordering::Relaxed);
                Some(Ok(piece.into()))
            }
            Err(error) => {
                ended = true;
                Some(Err(error.into()))
            }
        }
    }))
}
