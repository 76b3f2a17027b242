//! The image store, with the demo image in it.

use std::str::FromStr;

use skerry_oci::{Image, ImageRef, Progress, Removed, Store};

use crate::builtin;
use crate::error::EngineError;
use crate::paths::Paths;
use crate::warm;

/// Opens the user's store, making it where it doesn't exist.
pub fn open(paths: &Paths) -> Result<Store, EngineError> {
    let folder = paths.images();
    Paths::ensure(&folder)?;
    Ok(Store::open(folder)?)
}

/// The image that `name` means: imported and converted first where that has not been done.
/// `progress` is told what takes time.
pub fn resolve(
    paths: &Paths,
    name: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<Image, EngineError> {
    let store = open(paths)?;
    if name == builtin::DEMO_NAME {
        return Ok(store.import_embedded(builtin::DEMO_NAME, builtin::DEMO, progress)?);
    }
    let reference = ImageRef::from_str(name)?;
    Ok(store.import(&reference, progress)?)
}

/// Removes a name of an image; with its last name the image and what was kept of its starts.
pub fn remove(paths: &Paths, name: &str) -> Result<Removed, EngineError> {
    let removed = open(paths)?.remove(name)?;
    if let Removed::Image(digest) = &removed {
        warm::forget_image(paths, digest)?;
    }
    Ok(removed)
}
