//! The image store, with the demo image in it.

use std::path::PathBuf;
use std::str::FromStr;

use skerry_oci::{
    Digest, Image, ImageRef, Name, Progress, Pulled, Pushed, Removed, Settings, Store,
};

use crate::builtin;
use crate::error::EngineError;
use crate::events;
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

/// When an image is got from its registry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// When the store doesn't have it.
    #[default]
    Missing,
    /// Each time: the store's own is used only where the registry has no other.
    Always,
    /// Not at all.
    Never,
}

/// What this user has said about registries: `skerry/registries.json` in the folder for
/// configuration, and the logins in docker's `config.json`.
pub fn settings() -> Result<Settings, EngineError> {
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let home = absolute("HOME");
    let own = absolute("XDG_CONFIG_HOME").or_else(|| home.as_ref().map(|h| h.join(".config")));
    let settings = match own {
        Some(folder) => Settings::read(&folder.join("skerry/registries.json"))
            .map_err(skerry_oci::Error::from)?,
        None => Settings::default(),
    };
    let docker = match std::env::var_os("DOCKER_CONFIG").filter(|folder| !folder.is_empty()) {
        Some(folder) => Some(PathBuf::from(folder)),
        None => home.map(|home| home.join(".docker")),
    };
    Ok(match docker {
        Some(folder) => settings.with_docker_config(folder.join("config.json")),
        None => settings,
    })
}

/// Brings an image from its registry into the store.
pub fn pull(
    paths: &Paths,
    name: &Name,
    progress: &mut dyn FnMut(Progress),
) -> Result<Pulled, EngineError> {
    let pulled = open(paths)?.pull(name, &settings()?, progress)?;
    events::image(paths, "pull", &name.to_string());
    Ok(pulled)
}

/// Sends an image of the store to the registry of its name.
pub fn push(
    paths: &Paths,
    name: &Name,
    progress: &mut dyn FnMut(Progress),
) -> Result<Pushed, EngineError> {
    let pushed = open(paths)?.push(name, &settings()?, progress)?;
    events::image(paths, "push", &name.to_string());
    Ok(pushed)
}

/// Gives an image, which is imported first where that has not been done, a further name.
pub fn tag(paths: &Paths, image: &str, name: &Name) -> Result<(), EngineError> {
    if name.digest().is_some() {
        return Err(EngineError::TagWithDigest(name.to_string()));
    }
    let image = resolve(paths, image, &mut |_| ())?;
    open(paths)?.tag(&image.digest.to_string(), &name.to_string())?;
    events::image(paths, "tag", &name.to_string());
    Ok(())
}

/// The name under which what `image` means has to be pulled before it can be used; nothing where
/// the store has it, or where no registry does.
pub fn to_pull(
    paths: &Paths,
    image: &str,
    policy: PullPolicy,
) -> Result<Option<Name>, EngineError> {
    let stored = match ImageRef::from_str(image)? {
        ImageRef::Stored(name) if name != builtin::DEMO_NAME => name,
        _ if policy == PullPolicy::Always => {
            return Err(EngineError::NotFromRegistry(image.to_owned()));
        }
        _ => return Ok(None),
    };
    let missing = || match open(paths)?.get(&stored) {
        Ok(_) => Ok(None),
        // What can't be a name of a registry's is for the store to miss.
        Err(skerry_oci::Error::NoSuchImage { .. }) => Ok(stored.parse().ok()),
        Err(error) => Err(error.into()),
    };
    match policy {
        PullPolicy::Never => Ok(None),
        PullPolicy::Missing => missing(),
        PullPolicy::Always => Ok(Some(stored.parse().map_err(EngineError::RegistryName)?)),
    }
}

/// Removes a name of an image; with its last name the image and what was kept of its starts.
pub fn remove(paths: &Paths, name: &str) -> Result<Removed, EngineError> {
    let removed = open(paths)?.remove(name)?;
    events::image(paths, "untag", name);
    if let Removed::Image(digest) = &removed {
        events::image(paths, "delete", &digest.to_string());
        warm::forget_image(paths, digest)?;
    }
    Ok(removed)
}

/// Removes images without a name, what was kept of their starts, and what broken pulls have left.
pub fn prune(paths: &Paths) -> Result<Vec<Digest>, EngineError> {
    let removed = open(paths)?.prune()?;
    for digest in &removed {
        events::image(paths, "delete", &digest.to_string());
        warm::forget_image(paths, digest)?;
    }
    Ok(removed)
}
