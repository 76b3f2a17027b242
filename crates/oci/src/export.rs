//! Images out of the store into an archive, and out of an archive into the store.
//!
//! What is written is an OCI image layout with docker's `manifest.json` beside its index, so that
//! both kinds of tools read it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use serde_json::{Value, json};

use crate::digest::Digest;
use crate::files::Files;
use crate::manifest::{Part, blob, images_in, part};
use crate::registry::{Name, RegistryError};
use crate::source::{MANIFEST, OCI_MANIFEST};
use crate::store::or_missing;
use crate::tar::TarWriter;
use crate::{Error, Progress, Store};

/// An image that an archive had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// What it is called now, where the archive said that.
    pub name: Option<String>,
    /// The image.
    pub digest: Digest,
}

impl Store {
    /// Writes images, with the names by which they are asked for, as one tar archive.
    pub fn save(&self, images: &[String], out: impl Write) -> Result<(), Error> {
        let mut blobs = BTreeMap::new();
        let (mut index, mut docker): (Vec<Value>, Vec<Value>) = Default::default();
        for asked in images {
            let image = self.find(asked)?;
            let no_source = || RegistryError::NoSource {
                name: asked.clone(),
            };
            let manifest = self.manifest(&image)?.ok_or_else(no_source)?;
            let Part::Image(parts) = part(&manifest) else {
                return Err(no_source().into());
            };
            let digest = Digest::of(&manifest);
            let name = self.name_of(asked, &image)?;
            index.push(described(&manifest, &digest, name.as_ref()));
            let files: Vec<_> = parts.iter().map(|(digest, _)| blob(digest)).collect();
            let tags: Vec<_> = name.iter().map(Name::familiar).collect();
            docker
                .push(json!({"Config": files.first(), "RepoTags": tags, "Layers": files.get(1..)}));
            for (digest, _) in parts {
                blobs.insert(digest, self.source(&image).join(blob(&digest)));
            }
            blobs.insert(digest, self.source(&image).join(MANIFEST));
        }
        let index = json!({"schemaVersion": 2, "manifests": index});
        let mut archive = TarWriter::new(out);
        let failed = |source| Error::Save { source };
        for (name, document) in [
            ("oci-layout", json!({"imageLayoutVersion": "1.0.0"})),
            ("index.json", index),
            ("manifest.json", Value::Array(docker)),
        ] {
            let text = document.to_string();
            let written = archive.file(name, text.len() as u64, text.as_bytes());
            written.map_err(failed)?;
        }
        for (digest, path) in blobs {
            let unreadable = |error| self.failed("read", &path, error);
            let file = File::open(&path).map_err(unreadable)?;
            let size = file.metadata().map_err(unreadable)?.len();
            archive.file(&blob(&digest), size, file).map_err(failed)?;
        }
        archive.finish().map_err(failed)
    }

    /// The name under which an image was asked for; none where that was by its digest.
    fn name_of(&self, asked: &str, image: &Digest) -> Result<Option<Name>, Error> {
        let Ok(name) = asked.parse::<Name>() else {
            return Ok(None);
        };
        let names = self
            .load(image)?
            .map(|image| image.names)
            .unwrap_or_default();
        let tagged = name.tag().is_some() && name.digest().is_none();
        let whole = name.to_string();
        let known = names.iter().any(|known| *known == whole || known == asked);
        Ok((tagged && known).then_some(name))
    }

    /// Brings all the images of an archive, or of a directory in the OCI layout, into the store.
    pub fn load_archive(
        &self,
        path: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Loaded>, Error> {
        let called = path.display().to_string();
        let tmp = self.root().join("tmp");
        let files = match path.is_dir() {
            true => Files::directory(&called, path)?,
            false => Files::archive(&called, path, &tmp, self.limits.unpacked_bytes)?,
        };
        let mut all = Vec::new();
        for (said, resolved) in images_in(&files)? {
            let name = said
                .and_then(|said| said.parse::<Name>().ok())
                .map(|name| name.to_string());
            let called = name.as_deref().unwrap_or(&called);
            self.provide(called, &files, &resolved, progress)?;
            if let Some(name) = &name {
                self.set_name(name, resolved.digest)?;
            }
            let digest = resolved.digest;
            all.push(Loaded { name, digest });
        }
        Ok(all)
    }

    /// The same for an archive that can only be read from its start to its end.
    pub fn load_stream(
        &self,
        mut archive: impl Read,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Loaded>, Error> {
        let tmp = self.root().join("tmp");
        let failed = |error| self.failed("write into", &tmp, error);
        let mut file = tempfile::tempfile_in(&tmp).map_err(failed)?;
        let most = self.limits.unpacked_bytes;
        let copied = std::io::copy(&mut archive.by_ref().take(most), &mut file).map_err(failed)?;
        if copied == most {
            return Err(failed(std::io::Error::other(format!(
                "the archive has {most} bytes or more"
            ))));
        }
        // Unnamed, so that nothing is left of it whatever happens.
        use std::os::fd::AsRawFd as _;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        self.load_archive(Path::new(&path), progress)
    }

    /// The configuration document of an image as it came, history and all; `None` where what it
    /// was made from isn't here.
    pub fn configuration(&self, name: &str) -> Result<Option<Value>, Error> {
        let image = self.find(name)?;
        let path = self.source(&image).join(blob(&image));
        let Some(bytes) =
            or_missing(std::fs::read(&path)).map_err(|error| self.failed("read", &path, error))?
        else {
            return Ok(None);
        };
        let document = serde_json::from_slice(&bytes);
        document.map(Some).map_err(|source| Error::Document {
            image: name.to_owned(),
            document: blob(&image),
            source,
        })
    }

    /// The manifest of an image and its digest; `None` where what it was made from isn't here.
    pub fn manifest_of(&self, name: &str) -> Result<Option<(Digest, Value)>, Error> {
        let image = self.find(name)?;
        let Some(bytes) = self.manifest(&image)? else {
            return Ok(None);
        };
        let document = serde_json::from_slice(&bytes);
        let document = document.map_err(|source| Error::Document {
            image: name.to_owned(),
            document: "manifest".to_owned(),
            source,
        })?;
        Ok(Some((Digest::of(&bytes), document)))
    }
}

/// An image in an index, with the name by which other tools load it.
fn described(manifest: &[u8], digest: &Digest, name: Option<&Name>) -> Value {
    let document: Value = serde_json::from_slice(manifest).unwrap_or_default();
    let media_type = document["mediaType"].as_str().unwrap_or(OCI_MANIFEST);
    let mut descriptor = json!({"mediaType": media_type, "digest": digest, "size": manifest.len()});
    if let Some(name) = name {
        descriptor["annotations"] = json!({
            "io.containerd.image.name": name.to_string(),
            "org.opencontainers.image.ref.name": name.tag(),
        });
    }
    descriptor
}
