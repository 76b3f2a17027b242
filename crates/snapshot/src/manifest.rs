//! The JSON documents of a snapshot (OCI image-spec: image-layout.md, manifest.md, descriptor.md).

use std::collections::{BTreeMap, BTreeSet};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{CHAIN_MAX, Digest, Error};

/// The version of the format as a whole.
pub(crate) const VERSION: u32 = 1;
pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
/// What the manifest of a snapshot says that it is (`artifactType`).
pub const ARTIFACT_TYPE: &str = "application/vnd.skerry.snapshot.v1+json";
pub(crate) const CONFIG_TYPE: &str = "application/vnd.skerry.snapshot.config.v1+json";
pub(crate) const STATE_TYPE: &str = "application/vnd.skerry.machine-state.v1+json";
pub(crate) const MEMORY_TYPE: &str = "application/vnd.skerry.memory.v1";
pub(crate) const DISK_TYPE: &str = "application/vnd.skerry.disk.v1";
pub(crate) const EXTRA_TYPE: &str = "application/vnd.skerry.extra.v1";
const NAME: &str = "org.skerry.name";
const TABLE: &str = "org.skerry.table.digest";

/// No index, manifest or configuration is longer.
pub(crate) const DOCUMENT_MAX: u64 = 4 << 20;
/// No state of a machine is longer.
pub(crate) const STATE_MAX: u64 = 64 << 20;
/// The bytes of `oci-layout`.
pub(crate) const LAYOUT: &[u8] = b"{\"imageLayoutVersion\":\"1.0.0\"}";
const NAME_MAX: usize = 64;
const PUNCTUATION: &str = "._-";

/// What a blob is and where to find it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

impl Descriptor {
    pub(crate) fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Descriptor {
            media_type: media_type.to_owned(),
            digest,
            size,
            artifact_type: None,
            annotations: BTreeMap::new(),
        }
    }

    pub(crate) fn with_name(mut self, name: &str) -> Self {
        self.annotations.insert(NAME.to_owned(), name.to_owned());
        self
    }

    pub(crate) fn with_table(mut self, digest: Digest) -> Self {
        self.annotations
            .insert(TABLE.to_owned(), digest.to_string());
        self
    }

    pub(crate) fn name(&self) -> Option<&str> {
        self.annotations.get(NAME).map(String::as_str)
    }

    pub(crate) fn table(&self) -> Option<Digest> {
        self.annotations.get(TABLE)?.parse().ok()
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutDocument {
    image_layout_version: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    manifests: Vec<Descriptor>,
}

/// The manifest as it is written.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: u32,
    media_type: String,
    artifact_type: String,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// A manifest whose parts are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) state: Descriptor,
    pub(crate) memory: Descriptor,
    pub(crate) disks: BTreeMap<String, Descriptor>,
    pub(crate) extras: BTreeMap<String, Descriptor>,
}

/// The configuration blob: ours around the caller's.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Envelope<C> {
    pub(crate) version: u32,
    /// Milliseconds since 1970.
    pub(crate) created_ms: u64,
    pub(crate) memory_size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<Digest>,
    pub(crate) config: C,
}

/// What a snapshot with this configuration is a difference to; `None` too where it is no configuration,
/// which opening the snapshot says.
#[must_use]
pub fn parent_of(config: &[u8]) -> Option<Digest> {
    let envelope: Envelope<serde::de::IgnoredAny> = serde_json::from_slice(config).ok()?;
    envelope.parent
}

fn parse<T: DeserializeOwned>(
    snapshot: &str,
    document: &'static str,
    bytes: &[u8],
) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|source| Error::Document {
        snapshot: snapshot.to_owned(),
        document,
        source,
    })
}

fn refused(snapshot: &str, problem: impl Into<String>) -> Error {
    Error::NotASnapshot {
        snapshot: snapshot.to_owned(),
        problem: problem.into(),
    }
}

/// Checks the name of a disk or extra blob.
pub(crate) fn check_part_name(name: &str) -> Result<(), Error> {
    check_name(name, NAME_MAX, PUNCTUATION)
}

pub(crate) fn check_name(name: &str, limit: usize, punctuation: &'static str) -> Result<(), Error> {
    let first = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let rest = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || punctuation.contains(c));
    if first && rest && name.len() <= limit {
        return Ok(());
    }
    Err(Error::Name {
        name: name
            .chars()
            .take(limit)
            .flat_map(char::escape_default)
            .collect(),
        limit,
        punctuation,
    })
}

/// Checks the document `oci-layout`.
pub(crate) fn check_layout(snapshot: &str, bytes: &[u8]) -> Result<(), Error> {
    let layout: LayoutDocument = parse(snapshot, "oci-layout", bytes)?;
    match layout.image_layout_version.as_str() {
        "1.0.0" => Ok(()),
        _ => Err(refused(snapshot, "its image layout isn't of version 1.0.0")),
    }
}

/// The bytes of `index.json` for manifests of the given digests and sizes.
pub(crate) fn index(manifests: impl Iterator<Item = (Digest, u64)>) -> Result<Vec<u8>, Error> {
    let descriptor = |(digest, size)| {
        let mut descriptor = Descriptor::new(MANIFEST_TYPE, digest, size);
        descriptor.artifact_type = Some(ARTIFACT_TYPE.to_owned());
        descriptor
    };
    let index = Index {
        schema_version: 2,
        media_type: INDEX_TYPE.to_owned(),
        manifests: manifests.map(descriptor).collect(),
    };
    serde_json::to_vec(&index).map_err(|source| Error::Encode { source })
}

/// What `index.json` names as manifests: one, or of a snapshot and its parents.
pub(crate) fn manifests_of_index(snapshot: &str, bytes: &[u8]) -> Result<Vec<Descriptor>, Error> {
    let index: Index = parse(snapshot, "index.json", bytes)?;
    let found = index.manifests;
    if found.is_empty() || found.len() > CHAIN_MAX {
        let problem = format!("its index names {} manifests", found.len());
        return Err(refused(snapshot, problem));
    }
    if found.iter().any(|found| found.media_type != MANIFEST_TYPE) {
        let problem = "what its index names is no image manifest";
        return Err(refused(snapshot, problem));
    }
    let digests: BTreeSet<_> = found.iter().map(|found| found.digest).collect();
    match digests.len() == found.len() {
        true => Ok(found),
        false => Err(refused(snapshot, "its index names a manifest twice")),
    }
}

/// The one manifest that `index.json` names.
pub(crate) fn manifest_of_index(snapshot: &str, bytes: &[u8]) -> Result<Descriptor, Error> {
    let found = manifests_of_index(snapshot, bytes)?;
    let [manifest] = <[Descriptor; 1]>::try_from(found).map_err(|all| {
        refused(
            snapshot,
            format!("its index names {} manifests and not one", all.len()),
        )
    })?;
    Ok(manifest)
}

impl Manifest {
    /// The bytes to be stored.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, Error> {
        let layers = [&self.state, &self.memory].into_iter();
        let layers = layers
            .chain(self.disks.values())
            .chain(self.extras.values());
        let document = Document {
            schema_version: 2,
            media_type: MANIFEST_TYPE.to_owned(),
            artifact_type: ARTIFACT_TYPE.to_owned(),
            config: self.config.clone(),
            layers: layers.cloned().collect(),
        };
        serde_json::to_vec(&document).map_err(|source| Error::Encode { source })
    }

    /// Understands stored bytes.
    pub(crate) fn decode(snapshot: &str, bytes: &[u8]) -> Result<Self, Error> {
        let document: Document = parse(snapshot, "manifest", bytes)?;
        if document.artifact_type != ARTIFACT_TYPE || document.config.media_type != CONFIG_TYPE {
            return Err(refused(
                snapshot,
                format!("its manifest isn't of the type {ARTIFACT_TYPE}"),
            ));
        }
        let (mut state, mut memory) = (None, None);
        let (mut disks, mut extras) = (BTreeMap::new(), BTreeMap::new());
        let mut seen = BTreeSet::new();
        for layer in document.layers {
            let of_pages = [MEMORY_TYPE, DISK_TYPE].contains(&&*layer.media_type);
            if of_pages && layer.table().is_none() {
                return Err(refused(
                    snapshot,
                    "a page image has no digest for its table",
                ));
            }
            let twice = match &*layer.media_type {
                STATE_TYPE => state.replace(layer).is_some(),
                MEMORY_TYPE => memory.replace(layer).is_some(),
                DISK_TYPE | EXTRA_TYPE => {
                    let name = layer.name().unwrap_or_default().to_owned();
                    check_part_name(&name)?;
                    let kind = if of_pages { &mut disks } else { &mut extras };
                    kind.insert(name.clone(), layer);
                    !seen.insert(name)
                }
                other => {
                    let problem = format!(
                        "it has a part of the type '{}', which isn't known here",
                        other.escape_default().take(80).collect::<String>()
                    );
                    return Err(refused(snapshot, problem));
                }
            };
            if twice {
                return Err(refused(snapshot, "it has a part twice"));
            }
        }
        let (Some(state), Some(memory)) = (state, memory) else {
            return Err(refused(snapshot, "it lacks its memory or state"));
        };
        Ok(Manifest {
            config: document.config,
            state,
            memory,
            disks,
            extras,
        })
    }

    /// All the blobs it names, with what they are to people.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = (String, &Descriptor)> {
        let fixed = [
            ("configuration", &self.config),
            ("machine state", &self.state),
            ("memory", &self.memory),
        ];
        let fixed = fixed.into_iter().map(|(what, d)| (what.to_owned(), d));
        let disks = self.disks.iter().map(|(name, d)| (disk_part(name), d));
        let extras = self.extras.iter().map(|(name, d)| (extra_part(name), d));
        fixed.chain(disks).chain(extras)
    }
}

pub(crate) fn disk_part(name: &str) -> String {
    format!("disk '{name}'")
}

pub(crate) fn extra_part(name: &str) -> String {
    format!("extra blob '{name}'")
}

/// Understands the configuration blob; the version is looked at first.
pub(crate) fn envelope<C: DeserializeOwned>(
    snapshot: &str,
    bytes: &[u8],
) -> Result<Envelope<C>, Error> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let Versioned { version } = parse(snapshot, "configuration", bytes)?;
    if version != VERSION {
        return Err(Error::Version {
            snapshot: snapshot.to_owned(),
            found: version,
            known: VERSION,
        });
    }
    parse(snapshot, "configuration", bytes)
}
