//! What an image was made from, kept as it travels: for pushing it on, and so that a layer that
//! is here is not fetched again.
//!
//! ```text
//! images/HEX/source/manifest.json          the image's manifest, byte by byte
//!                   blobs/sha256/DIGEST    its configuration and its layers
//! ```
//! Images that have a layer in common have it as one file with several links.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::Error;
use crate::digest::{Digest, Hasher, HashingReader};
use crate::files::Files;
use crate::layer::Compression;
use crate::manifest::{Part, Resolved, blob, part};
use crate::store::{DOWNLOADS, Image, Store, or_missing};

/// The folder in an image's own.
pub(crate) const SOURCE: &str = "source";
pub(crate) const MANIFEST: &str = "manifest.json";
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A blob that was put into a source.
struct Kept {
    digest: Digest,
    size: u64,
    /// Its first bytes, which tell how it is compressed.
    start: [u8; 4],
}

impl Store {
    /// The folder of an image's source.
    pub(crate) fn source(&self, image: &Digest) -> PathBuf {
        self.entry(image).join(SOURCE)
    }

    /// The manifest of an image; `None` when its source isn't here.
    pub(crate) fn manifest(&self, image: &Digest) -> Result<Option<Vec<u8>>, Error> {
        let path = self.source(image).join(MANIFEST);
        or_missing(std::fs::read(&path)).map_err(|error| self.failed("read", &path, error))
    }

    /// Reads all that an image was made from, where that is kept, and compares digests.
    pub fn verify_source(&self, image: &Image) -> Result<(), Error> {
        let Some(manifest) = self.manifest(&image.digest)? else {
            return Ok(());
        };
        let corrupt = |problem: String| Error::Corrupt {
            digest: image.digest.hex(),
            problem,
        };
        let Part::Image(parts) = part(&manifest) else {
            return Err(corrupt("its source/manifest.json is malformed".to_owned()));
        };
        for (digest, _) in parts {
            let path = self.source(&image.digest).join(blob(&digest));
            let read = || HashingReader::new(File::open(&path)?).finish();
            let found = or_missing(read()).map_err(|error| self.failed("read", &path, error))?;
            if found != Some(digest) {
                return Err(corrupt(format!(
                    "its part {digest} is missing or has changed"
                )));
            }
        }
        Ok(())
    }

    /// A file with this content: received earlier, or of an image. It is checked.
    pub(crate) fn find_blob(&self, digest: &Digest) -> Result<Option<(PathBuf, File)>, Error> {
        // A download becomes an image's before it goes, so that looking in this order finds it.
        let received = [self.root().join(DOWNLOADS).join(digest.hex())];
        let images = self.digests()?;
        let kept = images
            .iter()
            .map(|image| self.source(image).join(blob(digest)));
        for path in received.into_iter().chain(kept) {
            let Ok(file) = File::open(&path) else {
                continue;
            };
            let found = HashingReader::new(&file).finish();
            if found.map_err(|error| self.failed("read", &path, error))? == *digest {
                return Ok(Some((path, file)));
            }
            tracing::warn!("{} is damaged, and not used", path.display());
        }
        Ok(None)
    }

    /// Fills an image's source.
    pub(crate) fn keep_source(
        &self,
        files: &Files,
        resolved: &Resolved,
        dir: &Path,
    ) -> Result<(), Error> {
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).map_err(|error| self.failed("make", &blobs, error))?;
        let config = self.keep(files, &resolved.config_file, Some(resolved.digest), dir)?;
        let mut layers = Vec::new();
        for layer in &resolved.layers {
            layers.push(self.keep(files, &layer.file, layer.digest, dir)?);
        }
        let path = dir.join(MANIFEST);
        let manifest = match &resolved.manifest {
            Some(manifest) => manifest.clone(),
            None => made_up(&config, &layers),
        };
        let write = || {
            let mut file = File::create(&path)?;
            file.write_all(&manifest)?;
            file.sync_data()
        };
        write().map_err(|error| self.failed("write", &path, error))?;
        self.sync_directory(&blobs)?;
        self.sync_directory(dir)
    }

    /// Puts one part into a source: by a link where the store has it, else by a copy.
    fn keep(
        &self,
        files: &Files,
        name: &str,
        digest: Option<Digest>,
        dir: &Path,
    ) -> Result<Kept, Error> {
        let linked = match (files.own_path(name), digest) {
            (Some(path), Some(digest)) => self.link(path, &dir.join(blob(&digest))),
            (None, Some(digest)) => match self.find_blob(&digest)? {
                Some((path, _)) => self.link(&path, &dir.join(blob(&digest))),
                None => false,
            },
            (_, None) => false,
        };
        match (linked, digest) {
            (true, Some(digest)) => {
                let path = dir.join(blob(&digest));
                let size = std::fs::metadata(&path).map(|metadata| metadata.len());
                let size = size.map_err(|error| self.failed("read", &path, error))?;
                let start = [0; 4];
                Ok(Kept {
                    digest,
                    size,
                    start,
                })
            }
            _ => self.copy(files, name, dir),
        }
    }

    /// Whether a link could be made, or was there: a layer may be in an image twice.
    fn link(&self, from: &Path, to: &Path) -> bool {
        to.exists() || std::fs::hard_link(from, to).is_ok()
    }

    fn copy(&self, files: &Files, name: &str, dir: &Path) -> Result<Kept, Error> {
        let failed = |error| self.failed("write into", dir, error);
        let Some((mut from, size)) = files.open(name)? else {
            let (image, part) = (files.image().to_owned(), name.to_owned());
            let hint = ", which was there a moment ago; leave the image alone and try again";
            return Err(Error::MissingPart { image, part, hint });
        };
        let mut to = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
        let (mut hasher, mut start, mut done) = (Hasher::default(), [0; 4], 0u64);
        let mut buf = vec![0; 128 << 10];
        loop {
            let n = match from.read(&mut buf) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(files.unreadable(name, error)),
            };
            if done == 0 {
                let most = n.min(start.len());
                start[..most].copy_from_slice(&buf[..most]);
            }
            hasher.update(&buf[..n]);
            to.write_all(&buf[..n]).map_err(failed)?;
            done += n as u64;
        }
        to.as_file().sync_data().map_err(failed)?;
        let digest = hasher.finish();
        let path = dir.join(blob(&digest));
        to.persist(&path)
            .map_err(|error| self.failed("make", &path, error.error))?;
        debug_assert!(done == size || matches!(files, Files::Directory { .. }));
        Ok(Kept {
            digest,
            size: done,
            start,
        })
    }
}

/// A manifest for an image that came without one.
fn made_up(config: &Kept, layers: &[Kept]) -> Vec<u8> {
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            let suffix = match Compression::of_magic(&layer.start) {
                Compression::Plain => "",
                Compression::Gzip => "+gzip",
                Compression::Zstd => "+zstd",
            };
            let media_type = format!("{OCI_LAYER}{suffix}");
            json!({"mediaType": media_type, "digest": layer.digest, "size": layer.size})
        })
        .collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": config.digest, "size": config.size},
        "layers": layers,
    });
    manifest.to_string().into_bytes()
}

#[cfg(test)]
mod tests;
