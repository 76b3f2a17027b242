//! Images of OCI registries (OCI distribution-spec): into the store, and out of it.
//!
//! ```text
//!  Name ─► session: host, TLS or not, who we are (settings, credentials)
//!             │ manifest or index by tag ── by digest ─► configuration
//!             ▼
//!          download: layers, several at once ─► downloads/ ─► Store's import ─► images/HEX
//!          upload:   images/HEX/source ─► blobs the registry lacks, then the manifest
//! ```
//! The network is spoken to by `oci-client` on a runtime that lives as long as one call.

mod artifact;
mod credentials;
mod download;
mod error;
mod name;
mod session;
mod settings;
mod upload;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::{StreamExt, stream};
use oci_client::secrets::RegistryAuth;
use serde_json::json;

use crate::config::ConfigDocument;
use crate::digest::Digest;
use crate::files::{Bytes, Files};
use crate::manifest::{DOCUMENT_MAX, INDEX_DEPTH, Part, blob, part, resolve_oci};
use crate::store::DOWNLOADS;
use crate::{Error, Image, Progress, Store};

pub use artifact::{Incoming, Outgoing};
use download::{Downloads, Reporter};
pub use error::RegistryError;
pub use name::{Name, NameError};
use session::{Action, Session};
pub use settings::Settings;

/// Layers that are received at once.
const AT_ONCE: usize = 4;
/// Manifests of one index that are looked at before it is given up.
const CANDIDATES_MAX: usize = 32;
/// More than Linux could stack.
const LAYERS_MAX: usize = 1000;

/// What [`Store::pull`] has brought.
#[derive(Debug)]
pub struct Pulled {
    /// The image.
    pub image: Image,
    /// The digest of the manifest or index that the name stands for in the registry.
    pub digest: Digest,
    /// Whether the store had the image already.
    pub was_there: bool,
}

/// What [`Store::push`] has sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pushed {
    /// Of the manifest.
    pub digest: Digest,
    /// Of the manifest, in bytes.
    pub size: u64,
}

/// What a manifest may be.
const ACCEPTED: &[&str] = &[
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// A runtime for one call.
fn runtime() -> Result<tokio::runtime::Runtime, RegistryError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(RegistryError::Runtime)
}

/// The documents of an image, all of which name the next by digest.
struct Documents {
    /// Of the first one.
    digest: Digest,
    parts: HashMap<String, Bytes>,
    layers: Vec<(Digest, Option<u64>)>,
}

impl Store {
    /// Brings an image from its registry, or a mirror of that, into the store.
    pub fn pull(
        &self,
        name: &Name,
        settings: &Settings,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Pulled, Error> {
        let runtime = runtime()?;
        let hosts: Vec<_> = settings.hosts(name.host()).collect();
        let (last, mirrors) = hosts.split_last().unwrap_or((&"", &[]));
        for host in mirrors {
            match runtime.block_on(self.fetch(name, host, settings, progress)) {
                Ok((files, digest)) => return self.import_pulled(name, &files, digest, progress),
                Err(Error::Registry(error)) => tracing::warn!("{error}; the next one is asked"),
                Err(error) => return Err(error),
            }
        }
        let (files, digest) = runtime.block_on(self.fetch(name, last, settings, progress))?;
        self.import_pulled(name, &files, digest, progress)
    }

    fn import_pulled(
        &self,
        name: &Name,
        files: &Files,
        digest: Digest,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Pulled, Error> {
        let resolved = resolve_oci(files, None)?;
        let was_there = matches!(self.load(&resolved.digest), Ok(Some(_)));
        let imported = self.import_resolved(&name.to_string(), files, &resolved, progress);
        // The image has links to them now; and a full disk has better uses.
        if matches!(imported, Ok(_) | Err(Error::StoreFull { .. })) {
            self.forget_downloads(resolved.layers.iter().filter_map(|layer| layer.digest));
        }
        Ok(Pulled {
            image: imported?,
            digest,
            was_there,
        })
    }

    fn forget_downloads(&self, layers: impl Iterator<Item = Digest>) {
        for layer in layers {
            let path = self.root().join(DOWNLOADS).join(layer.hex());
            let _ = std::fs::remove_file(path);
        }
    }

    /// Gets all parts of an image that aren't here.
    async fn fetch(
        &self,
        name: &Name,
        host: &str,
        settings: &Settings,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Files, Digest), Error> {
        let session = Session::open(name, host, Action::Pull, settings).await?;
        let reporter = Reporter::new(progress);
        let downloads = Downloads {
            session: &session,
            store: self,
            reporter: &reporter,
        };
        let documents = documents(name, &downloads).await?;
        let (digest, mut parts) = (documents.digest, documents.parts);
        let files = |parts, paths| Files::Parts {
            image: name.to_string(),
            parts,
            paths,
        };
        let known = files(parts.clone(), HashMap::new());
        let resolved = resolve_oci(&known, None)?;
        if matches!(self.load(&resolved.digest), Ok(Some(_))) {
            return Ok((known, digest));
        }
        let mut paths = HashMap::new();
        let received = layers(&downloads, &documents.layers).await;
        if let Err(Error::StoreFull { .. }) = received {
            self.forget_downloads(documents.layers.iter().map(|(digest, _)| *digest));
        }
        for (layer, path, file) in received? {
            parts.insert(blob(&layer), Bytes::File(Arc::new(file)));
            paths.insert(blob(&layer), path);
        }
        Ok((files(parts, paths), digest))
    }
}

/// Receives layers, each once, some of them at the same time.
async fn layers(
    downloads: &Downloads<'_>,
    layers: &[(Digest, Option<u64>)],
) -> Result<Vec<(Digest, PathBuf, File)>, Error> {
    let most = downloads.store.limits.unpacked_bytes;
    let mut seen = HashSet::new();
    let once = layers.iter().filter(|(digest, _)| seen.insert(*digest));
    let mut received = stream::iter(once)
        .map(|(digest, size)| async move {
            let (path, file) = downloads.layer(*digest, *size, most).await?;
            Ok::<_, Error>((*digest, path, file))
        })
        .buffer_unordered(AT_ONCE);
    let mut all = Vec::new();
    while let Some(layer) = received.next().await {
        all.push(layer?);
    }
    Ok(all)
}

/// Gets the manifest, through an index where there is one, and the configuration.
async fn documents(name: &Name, downloads: &Downloads<'_>) -> Result<Documents, Error> {
    let session = downloads.session;
    let root = manifest(session, name.digest(), &session.reference).await?;
    let digest = Digest::of(&root);
    let index = json!({"schemaVersion": 2, "manifests": [{"digest": digest}]});
    let index = memory(index.to_string().into_bytes());
    let mut documents = Documents {
        digest,
        parts: HashMap::from([("index.json".to_owned(), index)]),
        layers: Vec::new(),
    };
    // The next one is the last; those of an index are looked at in its order.
    let mut todo = vec![(digest, Some(root), INDEX_DEPTH)];
    let mut looked_at = 0;
    while let Some((digest, bytes, depth)) = todo.pop() {
        looked_at += 1;
        if looked_at > CANDIDATES_MAX {
            return Err(session
                .refused("its index names too many images".to_owned())
                .into());
        }
        let bytes = match bytes {
            Some(bytes) => bytes,
            None => {
                let reference = session.reference.clone_with_digest(digest.to_string());
                manifest(session, Some(digest), &reference).await?
            }
        };
        let next = part(&bytes);
        documents.parts.insert(blob(&digest), memory(bytes));
        match next {
            Part::Image(members) => {
                let Some(((config, _), layers)) = members.split_first() else {
                    continue;
                };
                if layers.len() > LAYERS_MAX {
                    let said = format!("it has {} layers", layers.len());
                    return Err(session.refused(said).into());
                }
                let document = downloads.document(*config, DOCUMENT_MAX).await?;
                let is_ours = is_ours(&document);
                documents.parts.insert(blob(config), memory(document));
                if is_ours {
                    documents.layers = layers.to_vec();
                    return Ok(documents);
                }
            }
            Part::Index(manifests) if depth > 0 => {
                let next = manifests.iter().rev();
                todo.extend(next.map(|(digest, _)| (*digest, None, depth - 1)));
            }
            Part::Index(_) => {}
        }
    }
    Ok(documents)
}

/// Whether a configuration is for our platform; one that can't be read is for resolving to refuse.
fn is_ours(document: &[u8]) -> bool {
    serde_json::from_slice::<ConfigDocument>(document)
        .map_or(true, |config| config.foreign_platform().is_none())
}

fn memory(bytes: Vec<u8>) -> Bytes {
    Bytes::Memory(bytes.into())
}

/// Gets a manifest or an index, and checks its digest where that is known.
async fn manifest(
    session: &Session,
    expected: Option<Digest>,
    reference: &oci_client::Reference,
) -> Result<Vec<u8>, Error> {
    let bytes = session
        .again(async || {
            session
                .client
                .pull_manifest_raw(reference, &RegistryAuth::Anonymous, ACCEPTED)
                .await
        })
        .await?;
    let (bytes, _) = bytes;
    let size = bytes.len() as u64;
    if size > DOCUMENT_MAX {
        let error = RegistryError::Size {
            host: session.host.clone(),
            name: session.name().to_owned(),
            part: "the manifest",
            expected: format!("at most {DOCUMENT_MAX}"),
            found: size,
        };
        return Err(error.into());
    }
    match (expected, Digest::of(&bytes)) {
        (Some(expected), found) if expected != found => {
            Err(session.mismatch("the manifest", expected, found).into())
        }
        _ => Ok(bytes.to_vec()),
    }
}
