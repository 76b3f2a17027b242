//! Turns a resolved image, or a directory, into an EROFS file.

use std::fs::File;
use std::path::Path;

use crate::digest::Digest;
use crate::erofs::{self, WriteError, Written};
use crate::error::is_full;
use crate::files::Files;
use crate::layer::{LayerError, Limits, Unpacker, decompress};
use crate::manifest::{LayerSource, Resolved};
use crate::spool::{Spool, SpoolWriter};
use crate::tree::{FileData, Tree};
use crate::{Error, Progress, hostdir};

/// Where an image is converted, and within which bounds.
pub(crate) struct Workshop<'a> {
    pub image: &'a str,
    pub store: &'a Path,
    /// For temporary files.
    pub dir: &'a Path,
    pub limits: Limits,
}

impl Workshop<'_> {
    fn storage(&self, action: &'static str, source: std::io::Error) -> Error {
        Error::store(self.store, action, self.dir, source)
    }

    /// Applies all layers and writes the image to `out`.
    pub(crate) fn convert(
        &self,
        files: &Files,
        resolved: &Resolved,
        out: &mut File,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Written, Error> {
        let spool = SpoolWriter::new(self.dir).map_err(|e| self.storage("write into", e))?;
        let mut unpacker = Unpacker::new(spool, self.limits);
        let count = resolved.layers.len();
        for (index, layer) in resolved.layers.iter().enumerate() {
            let number = index + 1;
            progress(Progress::Layer { number, count });
            self.layer(files, layer, &mut unpacker, (number, count))?;
        }
        let Unpacker { tree, spool, .. } = unpacker;
        let spool = spool.finish().map_err(|e| self.storage("write into", e))?;
        progress(Progress::Writing);
        self.write(&tree, &spool, resolved.digest.prefix16(), out)
    }

    fn layer(
        &self,
        files: &Files,
        layer: &LayerSource,
        unpacker: &mut Unpacker,
        (number, count): (usize, usize),
    ) -> Result<(), Error> {
        let failed = |source| match source {
            LayerError::Spool(source) => self.storage("write into", source),
            source => {
                let (image, layer) = (self.image.to_owned(), layer.file.clone());
                Error::Layer {
                    image,
                    layer,
                    number,
                    count,
                    source,
                }
            }
        };
        let raw = files.open_layer(layer)?;
        let stream = decompress(raw, layer.compression).map_err(failed)?;
        let found = unpacker.apply(stream).map_err(failed)?;
        if found != layer.diff_id {
            return Err(Error::Mismatch {
                image: self.image.to_owned(),
                part: format!("{} (unpacked)", layer.file),
                expected: layer.diff_id,
                found,
            });
        }
        Ok(())
    }

    /// Writes a directory of the host as an image.
    pub(crate) fn convert_directory(&self, root: &Path, out: &mut File) -> Result<Written, Error> {
        let (tree, spool) = hostdir::read(root)?;
        // It lives as long as one run, so its identity says nothing.
        self.write(&tree, &spool, [0; 16], out)
    }

    fn write(
        &self,
        tree: &Tree,
        spool: &Spool,
        uuid: [u8; 16],
        out: &mut File,
    ) -> Result<Written, Error> {
        erofs::write(tree, spool, uuid, out).map_err(|error| match error {
            WriteError::TooLarge => Error::ImageSize {
                image: self.image.to_owned(),
            },
            WriteError::Output(source) => self.storage("write into", source),
            WriteError::Data(data @ FileData::Host { .. }, source) if !is_full(&source) => {
                let path = spool.host_path(&data).unwrap_or(self.dir).to_owned();
                Error::Changed { path, source }
            }
            WriteError::Data(_, source) => self.storage("read back from", source),
        })
    }
}

/// A digest from what may be its beginning.
pub(crate) fn is_prefix(text: &str, digest: &Digest) -> bool {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    !hex.is_empty() && digest.hex().starts_with(hex)
}
