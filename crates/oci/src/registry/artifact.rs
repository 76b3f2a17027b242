//! Artifacts: manifests whose parts are not an image's, to a registry and from it. Each is a folder in
//! OCI image layout on this side.
//!
//! One that refers to others of its kind takes them with it: the first is what the name means, the others
//! follow by digest, and in the registry by a tag of their own as well, so that it keeps them.

use std::path::{Path, PathBuf};

use oci_client::errors::OciDistributionError;
use serde::Deserialize;

use super::download::{Downloads, Reporter};
use super::session::{Action, Session};
use super::upload::send;
use super::{LAYERS_MAX, Name, Pushed, RegistryError, Settings, layers, manifest, runtime};
use crate::digest::Digest;
use crate::manifest::{Part, blob, part};
use crate::source::OCI_MANIFEST;
use crate::{Error, Progress, Store};

/// The most artifacts that one brings.
const TOGETHER_MAX: usize = 1024;
/// Digits of a digest in a tag.
const TAG_DIGITS: usize = 32;

/// An artifact to be sent.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// Its folder, in OCI image layout.
    pub folder: PathBuf,
    /// Its manifest.
    pub manifest: Digest,
}

/// An artifact that has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incoming {
    /// Its manifest.
    pub manifest: Digest,
    /// The manifest's size in bytes.
    pub size: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Typed {
    #[serde(default)]
    artifact_type: String,
}

impl Store {
    /// Sends artifacts, what the registry lacks of them: the first under `name`, then those that it
    /// refers to.
    pub fn push_artifacts(
        &self,
        name: &Name,
        artifacts: &[Outgoing],
        settings: &Settings,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Pushed, Error> {
        if name.digest().is_some() || name.tag().is_none() {
            let name = name.to_string();
            return Err(RegistryError::PushByDigest { name }.into());
        }
        let reporter = Reporter::new(progress);
        runtime()?.block_on(async {
            let session = Session::open(name, name.host(), Action::Push, settings).await?;
            let mut pushed = None;
            // Those that others refer to come first.
            for (number, artifact) in artifacts.iter().enumerate().rev() {
                let reference = match number {
                    0 => session.reference.clone(),
                    _ => tagged(&session, &artifact.manifest),
                };
                pushed = Some(
                    self.send_artifact(&session, &reporter, &reference, artifact)
                        .await?,
                );
            }
            pushed.ok_or_else(|| {
                session
                    .refused("there is nothing to send".to_owned())
                    .into()
            })
        })
    }

    async fn send_artifact(
        &self,
        session: &Session,
        reporter: &Reporter<'_>,
        reference: &oci_client::Reference,
        artifact: &Outgoing,
    ) -> Result<Pushed, Error> {
        let path = artifact.folder.join(blob(&artifact.manifest));
        let bytes = std::fs::read(&path).map_err(|error| self.failed("read", &path, error))?;
        let Part::Image(parts) = part(&bytes) else {
            return Err(session
                .refused("its manifest names no parts".to_owned())
                .into());
        };
        // The configuration last, as it names the others.
        for (digest, _) in parts.iter().rev() {
            let path = artifact.folder.join(blob(digest));
            let metadata = std::fs::metadata(&path);
            let size = metadata
                .map_err(|error| self.failed("read", &path, error))?
                .len();
            send(session, reporter, *digest, &path, size).await?;
        }
        let pushed = session.again(async || {
            let kind = OCI_MANIFEST.try_into().map_err(|_| {
                OciDistributionError::UnsupportedMediaTypeError(OCI_MANIFEST.to_owned())
            })?;
            let client = &session.client;
            client
                .push_manifest_raw(reference, bytes.clone(), kind)
                .await
        });
        pushed.await?;
        Ok(Pushed {
            digest: artifact.manifest,
            size: bytes.len() as u64,
        })
    }

    /// Brings an artifact of a `kind` (its `artifactType`) into `folder`, as blobs of an OCI image layout,
    /// and those that it refers to: `next` tells the manifest that the last one needs, from the folder and
    /// that one's configuration. Gives them in that order.
    pub fn pull_artifacts(
        &self,
        name: &Name,
        kind: &str,
        folder: &Path,
        settings: &Settings,
        next: &mut dyn FnMut(&[u8]) -> Option<Digest>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Incoming>, Error> {
        let blobs = folder.join("blobs/sha256");
        let made = std::fs::create_dir_all(&blobs);
        made.map_err(|error| self.failed("make", &blobs, error))?;
        runtime()?.block_on(async {
            let session = Session::open(name, name.host(), Action::Pull, settings).await?;
            let reporter = Reporter::new(progress);
            let downloads = Downloads {
                session: &session,
                store: self,
                reporter: &reporter,
            };
            let mut all = Vec::new();
            let mut wanted = name.digest();
            loop {
                let reference = match wanted {
                    None => session.reference.clone(),
                    Some(digest) => session.reference.clone_with_digest(digest.to_string()),
                };
                let bytes = manifest(&session, wanted, &reference).await?;
                let found = Incoming {
                    manifest: Digest::of(&bytes),
                    size: bytes.len() as u64,
                };
                all.push(found);
                let config = self
                    .fetch_artifact(&downloads, &bytes, kind, folder)
                    .await?;
                wanted = next(&config);
                if wanted.is_none() {
                    return Ok(all);
                }
                if all.len() == TOGETHER_MAX {
                    let said = "it refers to too many others".to_owned();
                    return Err(session.refused(said).into());
                }
            }
        })
    }

    /// Gets all parts of an artifact; gives its configuration.
    async fn fetch_artifact(
        &self,
        downloads: &Downloads<'_>,
        bytes: &[u8],
        kind: &str,
        folder: &Path,
    ) -> Result<Vec<u8>, Error> {
        let session = downloads.session;
        let typed: Typed = serde_json::from_slice(bytes).unwrap_or(Typed {
            artifact_type: String::new(),
        });
        let Part::Image(parts) = part(bytes) else {
            return Err(session
                .refused("its manifest names no parts".to_owned())
                .into());
        };
        if typed.artifact_type != kind {
            let said = match typed.artifact_type.is_empty() {
                true => format!("it is no {kind}"),
                false => format!("it is a {}, and no {kind}", typed.artifact_type),
            };
            return Err(session.refused(said).into());
        }
        if parts.len() > LAYERS_MAX {
            let said = format!("it has {} parts", parts.len());
            return Err(session.refused(said).into());
        }
        let keep = |digest: &Digest, content: &dyn Fn(&Path) -> std::io::Result<()>| {
            let path = folder.join(blob(digest));
            let kept = if path.exists() {
                Ok(())
            } else {
                content(&path)
            };
            kept.map_err(|error| self.failed("write", &path, error))
        };
        keep(&Digest::of(bytes), &|path| std::fs::write(path, bytes))?;
        let received = layers(downloads, &parts).await?;
        for (digest, from, _) in &received {
            keep(digest, &|path| {
                std::fs::hard_link(from, path).or_else(|_| std::fs::copy(from, path).map(drop))
            })?;
        }
        self.forget_downloads(received.iter().map(|(digest, ..)| *digest));
        let Some((config, _)) = parts.first() else {
            return Ok(Vec::new());
        };
        let path = folder.join(blob(config));
        std::fs::read(&path).map_err(|error| self.failed("read", &path, error))
    }
}

/// The name of an artifact that another one refers to.
fn tagged(session: &Session, manifest: &Digest) -> oci_client::Reference {
    let reference = &session.reference;
    let digits: String = manifest.hex().chars().take(TAG_DIGITS).collect();
    oci_client::Reference::with_tag(
        reference.registry().to_owned(),
        reference.repository().to_owned(),
        format!("part-{digits}"),
    )
}
