//! From the files of an image to its configuration and its layers.

use std::collections::BTreeMap;
use std::io::Read;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::Error;
use crate::config::ConfigDocument;
use crate::digest::{Digest, HashingReader};
use crate::files::{Cursor, Files};
use crate::layer::Compression;

/// Real ones have some kilobytes; registries refuse those above 4 MiB.
pub(crate) const DOCUMENT_MAX: u64 = 8 << 20;
/// An index may name indexes; how deep that goes.
pub(crate) const INDEX_DEPTH: usize = 4;

/// What names a piece of content (OCI image-spec, descriptor.md).
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
}

/// An index or a manifest; some writers leave the type out, so it is told by what is there.
#[derive(Debug, Deserialize)]
struct IndexOrManifest {
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    #[serde(default, rename = "fsLayers")]
    fs_layers: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Deserialize)]
struct DockerManifest {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags", default)]
    repo_tags: Option<Vec<String>>,
    #[serde(rename = "Layers", default)]
    layers: Option<Vec<String>>,
}

/// A layer that is still to be read.
#[derive(Debug, Clone)]
pub(crate) struct LayerSource {
    /// Its file in the image.
    pub file: String,
    /// What the file must hold, where the image says so.
    pub digest: Option<Digest>,
    /// How it is said to be compressed.
    pub compression: Option<Compression>,
    /// The digest of the unpacked stream.
    pub diff_id: Digest,
}

/// An image found in its files, its configuration checked.
#[derive(Debug, Clone)]
pub(crate) struct Resolved {
    /// Of the configuration, which names the layers by content: the same image has the same
    /// digest in whatever form it is stored.
    pub digest: Digest,
    pub config: ConfigDocument,
    /// The file of the configuration.
    pub config_file: String,
    pub layers: Vec<LayerSource>,
    /// The manifest, as it travels; docker's archives have none.
    pub manifest: Option<Vec<u8>>,
}

/// The file of a blob in an image layout, and in the store.
pub(crate) fn blob(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

impl Files {
    fn missing(&self, part: &str, hint: &'static str) -> Error {
        Error::MissingPart {
            image: self.image().to_owned(),
            part: part.to_owned(),
            hint,
        }
    }

    fn document(&self, name: &str, hint: &'static str) -> Result<Vec<u8>, Error> {
        let (reader, size) = self.open(name)?.ok_or_else(|| self.missing(name, hint))?;
        let (image, limit) = (self.image().to_owned(), DOCUMENT_MAX);
        if size > limit {
            return Err(Error::DocumentSize {
                image,
                document: name.to_owned(),
                size,
                limit,
            });
        }
        let mut bytes = Vec::new();
        reader
            .take(limit)
            .read_to_end(&mut bytes)
            .map_err(|e| self.unreadable(name, e))?;
        Ok(bytes)
    }

    fn parse<T: DeserializeOwned>(&self, name: &str, bytes: &[u8]) -> Result<T, Error> {
        serde_json::from_slice(bytes).map_err(|source| Error::Document {
            image: self.image().to_owned(),
            document: name.to_owned(),
            source,
        })
    }

    fn digest(&self, text: &str) -> Result<Digest, Error> {
        text.parse().map_err(|source| Error::Digest {
            image: self.image().to_owned(),
            source,
        })
    }

    fn verified(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        let name = blob(digest);
        let bytes = self.document(&name, COPY_AGAIN)?;
        self.compare(&name, *digest, Digest::of(&bytes))?;
        Ok(bytes)
    }

    fn compare(&self, part: &str, expected: Digest, found: Digest) -> Result<(), Error> {
        if expected == found {
            return Ok(());
        }
        let (image, part) = (self.image().to_owned(), part.to_owned());
        Err(Error::Mismatch {
            image,
            part,
            expected,
            found,
        })
    }

    /// Opens a layer, its file's digest checked where the image states one.
    pub(crate) fn open_layer(&self, layer: &LayerSource) -> Result<Cursor, Error> {
        let open = || {
            let file = self.open(&layer.file)?;
            file.map(|(cursor, _)| cursor)
                .ok_or_else(|| self.missing(&layer.file, COPY_AGAIN))
        };
        if let Some(digest) = layer.digest {
            let found = HashingReader::new(open()?).finish();
            let found = found.map_err(|error| self.unreadable(&layer.file, error))?;
            self.compare(&layer.file, digest, found)?;
        }
        open()
    }
}

const COPY_AGAIN: &str = ", which it names; save or copy it again";
const NO_LAYOUT: &str =
    "; is it an OCI image layout? `docker-archive:` and `dir:` name other forms";
const NO_ARCHIVE: &str =
    "; is it an OCI image layout, or from `docker save`? Other archives can't be loaded";
const NO_DOCKER: &str =
    "; is it from `docker save`? `oci-archive:` names an OCI image layout in a tar file";

/// The names that a tag may match: the whole reference and what follows its last colon.
fn names_of(descriptor: &Descriptor) -> Vec<&str> {
    let annotations = descriptor.annotations.iter().flatten();
    annotations
        .filter(|(key, _)| {
            matches!(
                key.as_str(),
                "org.opencontainers.image.ref.name" | "io.containerd.image.name"
            )
        })
        .map(|(_, value)| value.as_str())
        .collect()
}

fn is_named(descriptor: &Descriptor, tag: &str) -> bool {
    names_of(descriptor)
        .iter()
        .any(|name| *name == tag || name.rsplit_once(':').is_some_and(|(_, last)| last == tag))
}

/// Finds an image in an OCI image layout (OCI image-spec, image-layout.md).
pub(crate) fn resolve_oci(files: &Files, tag: Option<&str>) -> Result<Resolved, Error> {
    let bytes = files.document("index.json", NO_LAYOUT)?;
    let index: IndexOrManifest = files.parse("index.json", &bytes)?;
    let all = index
        .manifests
        .ok_or_else(|| files.missing("index.json: manifests", NO_LAYOUT))?;
    resolve_in(files, &all, tag)
}

fn resolve_in(files: &Files, all: &[Descriptor], tag: Option<&str>) -> Result<Resolved, Error> {
    let named = |tag| {
        all.iter()
            .filter(|d| is_named(d, tag))
            .cloned()
            .collect::<Vec<_>>()
    };
    let tags = || {
        let mut tags: Vec<String> = all.iter().flat_map(names_of).map(str::to_owned).collect();
        tags.sort();
        tags.dedup();
        tags
    };
    let no_tag = |asked| Error::Tag {
        image: files.image().to_owned(),
        asked,
        tags: tags(),
    };
    let chosen = match tag {
        Some(tag) => Some(named(tag))
            .filter(|found| !found.is_empty())
            .ok_or(no_tag(true))?,
        // The same names, or none at all: the entries are variants of one image. The same
        // content: one image with several names.
        None if all
            .iter()
            .all(|d| names_of(d) == names_of(&all[0]) || d.digest == all[0].digest) =>
        {
            all.to_vec()
        }
        None => Some(named("latest"))
            .filter(|found| !found.is_empty())
            .ok_or(no_tag(false))?,
    };
    let mut others = Vec::new();
    match from_descriptors(files, &chosen, INDEX_DEPTH, &mut others)? {
        Some(resolved) => Ok(resolved),
        None => Err(foreign(files, others)),
    }
}

fn foreign(files: &Files, mut others: Vec<String>) -> Error {
    others.sort();
    others.dedup();
    others.truncate(16);
    let found = if others.is_empty() {
        "nothing".to_owned()
    } else {
        others.join(", ")
    };
    Error::Platform {
        image: files.image().to_owned(),
        found,
    }
}

/// The first image for our platform; the platforms passed over are noted in `others`.
fn from_descriptors(
    files: &Files,
    descriptors: &[Descriptor],
    depth: usize,
    others: &mut Vec<String>,
) -> Result<Option<Resolved>, Error> {
    for descriptor in descriptors {
        if let Some(platform) = &descriptor.platform {
            // "unknown" marks attestations, which aren't images at all.
            if platform.os == "unknown" || platform.architecture == "unknown" {
                continue;
            }
            if platform.os != "linux" || platform.architecture != "amd64" {
                others.push(format!("{}/{}", platform.os, platform.architecture));
                continue;
            }
        }
        if let Some(resolved) = from_descriptor(files, descriptor, depth, others)? {
            return Ok(Some(resolved));
        }
    }
    Ok(None)
}

fn media_type(files: &Files, what: &'static str, descriptor: &Descriptor) -> Error {
    let media_type = descriptor.media_type.clone();
    Error::MediaType {
        image: files.image().to_owned(),
        what,
        media_type,
    }
}

fn from_descriptor(
    files: &Files,
    descriptor: &Descriptor,
    depth: usize,
    others: &mut Vec<String>,
) -> Result<Option<Resolved>, Error> {
    let digest = files.digest(&descriptor.digest)?;
    let bytes = files.verified(&digest)?;
    let document: IndexOrManifest = files.parse(&blob(&digest), &bytes)?;
    match document {
        IndexOrManifest {
            manifests: Some(inner),
            ..
        } if depth > 0 => from_descriptors(files, &inner, depth - 1, others),
        IndexOrManifest {
            config: Some(config),
            layers: Some(layers),
            ..
        } => {
            let resolved = from_manifest(files, &config, &layers, others)?;
            Ok(resolved.map(|resolved| Resolved {
                manifest: Some(bytes),
                ..resolved
            }))
        }
        IndexOrManifest {
            fs_layers: Some(_), ..
        } => Err(media_type(files, "manifest (schema 1)", descriptor)),
        _ => Err(media_type(files, "manifest", descriptor)),
    }
}

/// How a layer's type says that it is compressed; `None` for a type that is no layer.
fn layer_compression(media_type: &str) -> Option<Option<Compression>> {
    let oci = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
    ];
    let docker = [
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ];
    if media_type.is_empty() {
        return Some(None);
    }
    let suffix = oci
        .iter()
        .chain(&docker)
        .find_map(|prefix| media_type.strip_prefix(prefix))?;
    match suffix {
        "" => Some(None),
        "+gzip" | ".gzip" => Some(Some(Compression::Gzip)),
        "+zstd" | ".zstd" => Some(Some(Compression::Zstd)),
        _ => None,
    }
}

fn from_manifest(
    files: &Files,
    config: &Descriptor,
    layers: &[Descriptor],
    others: &mut Vec<String>,
) -> Result<Option<Resolved>, Error> {
    let known = [
        "",
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
    ];
    if !known.contains(&config.media_type.as_str()) {
        return Err(media_type(files, "configuration", config));
    }
    let digest = files.digest(&config.digest)?;
    let document: ConfigDocument = files.parse(&blob(&digest), &files.verified(&digest)?)?;
    if let Some(platform) = document.foreign_platform() {
        others.push(platform);
        return Ok(None);
    }
    let mut sources = Vec::new();
    for layer in layers {
        let compression = layer_compression(&layer.media_type)
            .ok_or_else(|| media_type(files, "layer", layer))?;
        let digest = files.digest(&layer.digest)?;
        sources.push(LayerFile {
            file: blob(&digest),
            digest: Some(digest),
            compression,
        });
    }
    let config = (blob(&digest), document);
    with_layers(files, digest, config, sources).map(Some)
}

/// A layer before the configuration says what it unpacks to.
struct LayerFile {
    file: String,
    digest: Option<Digest>,
    compression: Option<Compression>,
}

fn with_layers(
    files: &Files,
    digest: Digest,
    (config_file, config): (String, ConfigDocument),
    sources: Vec<LayerFile>,
) -> Result<Resolved, Error> {
    let (layers, diff_ids) = (sources.len(), config.rootfs.diff_ids.len());
    if layers != diff_ids {
        return Err(Error::LayerCount {
            image: files.image().to_owned(),
            layers,
            diff_ids,
        });
    }
    let layers = sources
        .into_iter()
        .zip(&config.rootfs.diff_ids)
        .map(|(layer, diff_id)| LayerSource {
            file: layer.file,
            digest: layer.digest,
            compression: layer.compression,
            diff_id: *diff_id,
        })
        .collect();
    Ok(Resolved {
        digest,
        config,
        config_file,
        layers,
        manifest: None,
    })
}

/// Finds an image in what `docker save` writes.
pub(crate) fn resolve_docker(files: &Files, tag: Option<&str>) -> Result<Resolved, Error> {
    let bytes = files.document("manifest.json", NO_DOCKER)?;
    let all: Vec<DockerManifest> = files.parse("manifest.json", &bytes)?;
    resolve_docker_in(files, &all, tag)
}

fn resolve_docker_in(
    files: &Files,
    all: &[DockerManifest],
    tag: Option<&str>,
) -> Result<Resolved, Error> {
    let tags = |manifest: &DockerManifest| manifest.repo_tags.clone().unwrap_or_default();
    let no_tag = |asked| {
        let tags = all.iter().flat_map(tags).collect();
        Error::Tag {
            image: files.image().to_owned(),
            asked,
            tags,
        }
    };
    let manifest = match (tag, all) {
        (None, [only]) => only,
        (None, _) => return Err(no_tag(false)),
        (Some(tag), _) => {
            // `debian` means `debian:latest`, for Docker as well.
            let latest = format!("{tag}:latest");
            let wanted = |name: &String| name == tag || *name == latest || has_tag(name, tag);
            let mut found = all
                .iter()
                .filter(|manifest| tags(manifest).iter().any(wanted));
            match (found.next(), found.next()) {
                (Some(manifest), None) => manifest,
                (Some(_), Some(_)) => return Err(no_tag(false)),
                (None, _) => return Err(no_tag(true)),
            }
        }
    };
    docker_image(files, manifest)
}

fn docker_image(files: &Files, manifest: &DockerManifest) -> Result<Resolved, Error> {
    let bytes = files.document(&manifest.config, COPY_AGAIN)?;
    let digest = Digest::of(&bytes);
    // The file is named by its digest.
    let stem = manifest
        .config
        .rsplit('/')
        .next()
        .unwrap_or("")
        .trim_end_matches(".json");
    if let Some(expected) = Digest::from_hex(stem) {
        files.compare(&manifest.config, expected, digest)?;
    }
    let config: ConfigDocument = files.parse(&manifest.config, &bytes)?;
    if let Some(platform) = config.foreign_platform() {
        return Err(foreign(files, vec![platform]));
    }
    // A layer's file may have a digest as its name too, but of something else than its bytes in
    // older archives; the configuration's digests of the unpacked streams are what is checked.
    let layers = manifest.layers.iter().flatten();
    let sources = layers.map(|layer| LayerFile {
        file: layer.clone(),
        digest: None,
        compression: None,
    });
    let config = (manifest.config.clone(), config);
    with_layers(files, digest, config, sources.collect())
}

/// All the images for our platform, each with a name that is said to be its own.
pub(crate) fn images_in(files: &Files) -> Result<Vec<(Option<String>, Resolved)>, Error> {
    let mut all = Vec::new();
    if files.open("index.json")?.is_none() {
        let bytes = files.document("manifest.json", NO_ARCHIVE)?;
        let images: Vec<DockerManifest> = files.parse("manifest.json", &bytes)?;
        for image in &images {
            let names = image.repo_tags.clone().unwrap_or_default();
            push_named(&mut all, names, &docker_image(files, image)?);
        }
        return Ok(all);
    }
    let bytes = files.document("index.json", NO_LAYOUT)?;
    let index: IndexOrManifest = files.parse("index.json", &bytes)?;
    let mut others = Vec::new();
    for descriptor in index.manifests.iter().flatten() {
        let one = std::slice::from_ref(descriptor);
        if let Some(resolved) = from_descriptors(files, one, INDEX_DEPTH, &mut others)? {
            // A bare tag says nothing of what it is a tag of.
            let names = names_of(descriptor).into_iter();
            let whole = names.filter(|name| name.contains(['/', ':'])).take(1);
            push_named(&mut all, whole.map(str::to_owned).collect(), &resolved);
        }
    }
    match all.is_empty() {
        true => Err(foreign(files, others)),
        false => Ok(all),
    }
}

fn push_named(all: &mut Vec<(Option<String>, Resolved)>, names: Vec<String>, resolved: &Resolved) {
    if names.is_empty() {
        all.push((None, resolved.clone()));
    }
    all.extend(names.into_iter().map(|name| (Some(name), resolved.clone())));
}

/// A document that names the rest of an image, as a registry sends it.
pub(crate) enum Part {
    /// Manifests that may be for our platform, in their order, with their sizes.
    Index(Vec<(Digest, Option<u64>)>),
    /// The configuration and the layers of an image, with their sizes.
    Image(Vec<(Digest, Option<u64>)>),
}

/// What to get after a manifest or an index; nothing where it is neither, which resolving it says.
pub(crate) fn part(bytes: &[u8]) -> Part {
    let known = |descriptor: &Descriptor| Some((descriptor.digest.parse().ok()?, descriptor.size));
    let ours = |descriptor: &&Descriptor| {
        let platform = descriptor.platform.as_ref();
        platform.is_none_or(|p| p.os == "linux" && p.architecture == "amd64")
    };
    match serde_json::from_slice(bytes) {
        Ok(IndexOrManifest {
            manifests: Some(manifests),
            ..
        }) => Part::Index(manifests.iter().filter(ours).filter_map(known).collect()),
        Ok(IndexOrManifest {
            config: Some(config),
            layers: Some(layers),
            ..
        }) => Part::Image([config].iter().chain(&layers).filter_map(known).collect()),
        _ => Part::Index(Vec::new()),
    }
}

fn has_tag(name: &str, tag: &str) -> bool {
    name.rsplit_once(':').is_some_and(|(_, last)| last == tag)
}

/// Any bytes as each of the documents; one that parses as an index is resolved, with nothing
/// behind its digests.
pub(crate) fn fuzz(bytes: &[u8]) {
    let empty = std::path::Path::new("/nonexistent/skerry");
    let files = Files::Directory {
        image: "fuzz".to_owned(),
        dir: empty.to_owned(),
    };
    let _ = serde_json::from_slice::<ConfigDocument>(bytes).map(|c| c.foreign_platform());
    let _ = serde_json::from_slice::<Vec<DockerManifest>>(bytes)
        .map(|all| resolve_docker_in(&files, &all, Some("latest")));
    if let Ok(index) = serde_json::from_slice::<IndexOrManifest>(bytes) {
        let _ = index
            .manifests
            .map(|all| resolve_in(&files, &all, Some("latest")));
        if let (Some(config), Some(layers)) = (index.config, index.layers) {
            let _ = from_manifest(&files, &config, &layers, &mut Vec::new());
        }
    }
}

#[cfg(test)]
mod tests;
