//! The image store, with the demo image in it.

use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;
use serde_json::Value;
use skerry_oci::{
    Digest, Image, ImageConfig, ImageRef, Name, Progress, Pulled, Pushed, Removed, Settings, Store,
};

use crate::builtin;
use crate::dates;
use crate::error::EngineError;
use crate::events;
use crate::paths::Paths;
use crate::vms::{Registry, VmInfo};
use crate::warm;

/// Digits of a digest that people are shown.
const SHORT: usize = 12;

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

/// The machines that were made from images, by the images' digests.
fn users(paths: &Paths) -> Result<Vec<(String, VmInfo)>, EngineError> {
    let machines = Registry::open(paths)?.list()?.into_iter();
    let used = machines.filter_map(|info| Some((info.config.digest.clone()?, info)));
    Ok(used.collect())
}

/// Whether the image that `name` means has to stay where a machine needs it. As docker has it: the last
/// name is kept, unless by `force`; by digest only what doesn't run gives way to that.
fn has_to_stay(
    store: &Store,
    image: &Image,
    name: &str,
    user: &VmInfo,
    force: bool,
) -> Result<(), EngineError> {
    let by_name = store.is_name(name)?;
    let runs = user.state.status.is_alive();
    let short = |id: &str| id.chars().take(SHORT).collect::<String>();
    let conflict = |what: &str, remedy: &str, use_of_it: &str| {
        Err(EngineError::ImageNeeded {
            what: what.to_owned(),
            remedy: remedy.to_owned(),
            by: format!("{use_of_it} {}", user.config.name),
        })
    };
    match (by_name, force) {
        (true, false) if image.names.len() <= 1 => conflict(
            &format!("remove repository reference \"{name}\""),
            "must force",
            "is needed by the machine",
        ),
        (true, _) => Ok(()),
        (false, _) if runs => conflict(
            &format!("delete {}", short(&image.digest.hex())),
            "cannot be forced",
            "is being used by the running machine",
        ),
        (false, false) => conflict(
            &format!("delete {}", short(&image.digest.hex())),
            "must be forced",
            "is being used by the stopped machine",
        ),
        (false, true) => Ok(()),
    }
}

/// Removes a name of an image; with its last name the image and what was kept of its starts. One that a
/// machine needs keeps its last name, and with `force` goes without one until that machine is removed.
pub fn remove(paths: &Paths, name: &str, force: bool) -> Result<Removed, EngineError> {
    let store = open(paths)?;
    let image = store.get(name)?;
    let digest = image.digest.to_string();
    let mut users = users(paths)?;
    users.retain(|(used, _)| *used == digest);
    users.sort_by_key(|(_, info)| !info.state.status.is_alive());
    let removed = match users.first() {
        None => store.remove(name)?,
        Some((_, user)) => {
            has_to_stay(&store, &image, name, user, force)?;
            store.untag(name)?
        }
    };
    note_removed(paths, name, &removed)?;
    Ok(removed)
}

/// Removes an image that is damaged, whoever needs it.
pub(crate) fn discard(paths: &Paths, digest: &str) -> Result<(), EngineError> {
    let removed = open(paths)?.remove(digest)?;
    note_removed(paths, digest, &removed)
}

fn note_removed(paths: &Paths, name: &str, removed: &Removed) -> Result<(), EngineError> {
    events::image(paths, "untag", name);
    if let Removed::Image(digest) = removed {
        events::image(paths, "delete", &digest.to_string());
        warm::forget_image(paths, digest)?;
    }
    Ok(())
}

/// Removes images without a name that no machine needs, what was kept of their starts, and what broken pulls have left.
pub fn prune(paths: &Paths) -> Result<Vec<Digest>, EngineError> {
    let users = users(paths)?;
    let needed = |digest: &Digest| {
        let digest = digest.to_string();
        users.iter().any(|(used, _)| *used == digest)
    };
    let removed = open(paths)?.prune(needed)?;
    for digest in &removed {
        events::image(paths, "delete", &digest.to_string());
        warm::forget_image(paths, digest)?;
    }
    Ok(removed)
}

/// A name of an image of the store, as programs are told of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct NamedImage {
    /// As people write it; `<none>` for an image without one.
    pub name: String,
    /// The image's digest.
    pub digest: String,
    /// Bytes that it takes in the store.
    pub size: u64,
}

impl NamedImage {
    /// One for each of an image's names.
    #[must_use]
    pub fn of(image: &Image) -> Vec<Self> {
        let named = |name: String| Self {
            name,
            digest: image.digest.to_string(),
            size: image.size,
        };
        match &image.names[..] {
            [] => vec![named("<none>".to_owned())],
            names => names.iter().map(|name| named(familiar(name))).collect(),
        }
    }
}

/// A name of a registry's as people write it; others as they are.
#[must_use]
pub fn familiar(name: &str) -> String {
    match name.parse::<Name>() {
        Ok(parsed) if parsed.to_string() == name => parsed.familiar(),
        _ => name.to_owned(),
    }
}

/// All that is known of an image, as programs are told of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ImageDetails {
    /// What the store knows it by.
    pub digest: String,
    /// Its names.
    pub names: Vec<String>,
    /// Digest of its manifest, where it came with one.
    pub manifest: Option<String>,
    /// The manifest's layers.
    pub layers: Option<Value>,
    /// When it was made, in its own words.
    pub created: Option<Value>,
    /// When the store took it in, as RFC 3339 has it.
    pub imported: String,
    /// The system that its programs are for.
    pub os: &'static str,
    /// The processor that they are for.
    pub architecture: &'static str,
    /// How its command is run.
    pub config: ImageConfig,
    /// Its root file system.
    pub rootfs: RootFileSystem,
}

/// The root file system of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RootFileSystem {
    /// Its file, an EROFS image.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Its content.
    pub digest: String,
}

/// Tells everything about an image of the store.
pub fn inspect(paths: &Paths, name: &str) -> Result<ImageDetails, EngineError> {
    let store = open(paths)?;
    let image = store.get(name)?;
    let (document, manifest) = (store.configuration(name)?, store.manifest_of(name)?);
    let of_document = |key: &str| document.as_ref().and_then(|d| d.get(key)).cloned();
    let (digest, manifest) = manifest.unzip();
    let of_manifest = |key: &str| manifest.as_ref().and_then(|m| m.get(key)).cloned();
    Ok(ImageDetails {
        digest: image.digest.to_string(),
        names: image.names.iter().map(|name| familiar(name)).collect(),
        manifest: digest.map(|digest| digest.to_string()),
        layers: of_manifest("layers"),
        created: of_document("created"),
        imported: dates::rfc3339(image.imported),
        os: "linux",
        architecture: "amd64",
        rootfs: RootFileSystem {
            digest: image.rootfs_digest().to_string(),
            size: image.size,
            path: image.rootfs,
        },
        config: image.config,
    })
}
