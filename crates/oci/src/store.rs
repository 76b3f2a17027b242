//! The store: images converted once, by content.
//!
//! ```text
//! ROOT/format                 the version of this layout
//!      images/HEX/            one image, HEX being its digest
//!          image.json           what `Record` says
//!          rootfs.erofs         the root file system
//!          source/              what it was made from, as it travels: see `source`
//!      downloads/HEX        parts of images that a pull has received, and HEX.part, not all yet
//!      names.json             names → digests
//!      locks/HEX, names, tmp  files to lock; never removed while anyone may wait for them
//!      tmp/HEX/               an image being converted or removed, by the holder of locks/HEX
//!          dir-PID-N.erofs    a `dir:` image, locked by its user
//! ```
//! An image comes into being by renaming `tmp/HEX` to `images/HEX`, and ends the other way round;
//! what a killed process left in `tmp` is swept by the next [`Store::open`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::config::ImageConfig;
use crate::convert::{Workshop, is_prefix};
use crate::digest::{Digest, HashingReader};
use crate::files::Files;
use crate::layer::Limits;
use crate::lock::Lock;
use crate::manifest::{Resolved, resolve_docker, resolve_oci};
use crate::registry::Name;
use crate::source::SOURCE;
use crate::{Error, ImageRef, erofs};

/// The layout of the store together with the rules by which images are converted: a change of
/// either makes a new store.
const FORMAT: &str = "skerry-images-1\n";

/// Where a pull keeps what it has received.
pub(crate) const DOWNLOADS: &str = "downloads";

/// How long, for a pull that goes on.
const DOWNLOADS_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// What an import is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// A part of an image travels from or to a registry.
    Transfer {
        /// Which.
        digest: Digest,
        /// Bytes that have arrived; those that were there before are among them.
        done: u64,
        /// Of how many, where that is known.
        size: Option<u64>,
    },
    /// Another process converts the same image; its result will be used.
    Waiting,
    /// A layer is unpacked.
    Layer {
        /// From 1.
        number: usize,
        /// Of how many.
        count: usize,
    },
    /// The root file system is written.
    Writing,
}

/// An image that is ready to run.
#[derive(Debug, Clone)]
pub struct Image {
    /// The names it has in the store; or how a `dir:` image was named.
    pub names: Vec<String>,
    /// Of its configuration document, which names its layers by content. A `dir:` image has that
    /// of its file system.
    pub digest: Digest,
    /// Its root file system, an EROFS file. Open it before the `Image` is dropped: that of a
    /// `dir:` image is removed then.
    pub rootfs: PathBuf,
    /// How its commands are run.
    pub config: ImageConfig,
    /// The size of `rootfs` in bytes.
    pub size: u64,
    /// When it was imported.
    pub imported: SystemTime,
    rootfs_digest: Digest,
    _transient: Option<Arc<Transient>>,
}

impl Image {
    /// The digest of its root file system.
    pub fn rootfs_digest(&self) -> Digest {
        self.rootfs_digest
    }
}

/// What the store has.
#[derive(Debug, Default)]
pub struct Listing {
    /// Usable images, the newest first.
    pub images: Vec<Image>,
    /// An error for each entry that isn't usable, naming it.
    pub damaged: Vec<Error>,
}

/// What [`Store::remove`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    /// A name; the image has others.
    Name(String),
    /// An image with all its names.
    Image(Digest),
}

/// `image.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    digest: Digest,
    size: u64,
    rootfs: Digest,
    config: ImageConfig,
}

/// A file that goes when it is no longer used.
#[derive(Debug)]
struct Transient {
    path: PathBuf,
    /// Held so that no other process sweeps the file away.
    _lock: Lock,
}

impl Drop for Transient {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A directory of images, used by any number of processes at once.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    pub(crate) limits: Limits,
}

pub(crate) fn or_missing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The names under which the store may have what is called so: as it was said, with the tag that
/// is left out, and as a registry has it.
fn known_as(name: &str) -> impl Iterator<Item = String> {
    let in_registry = name.parse::<Name>().ok().map(|name| name.to_string());
    [name.to_owned(), format!("{name}:latest")]
        .into_iter()
        .chain(in_registry)
}

impl Store {
    /// Opens the store in `root`, making it if need be, and sweeps up after killed processes.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, Error> {
        let store = Store {
            root: root.into(),
            limits: Limits::default(),
        };
        for dir in ["images", "locks", "tmp", DOWNLOADS] {
            let path = store.root.join(dir);
            // An image's files may be nobody else's business: its /etc/shadow is in there.
            let mut builder = std::fs::DirBuilder::new();
            let made = builder.recursive(true).mode(0o700).create(&path);
            made.map_err(|e| store.failed("make", &path, e))?;
        }
        let path = store.root.join("format");
        let read = || or_missing(std::fs::read(&path)).map_err(|e| store.failed("read", &path, e));
        match read()? {
            Some(found) if found == FORMAT.as_bytes() => {}
            Some(found) if !found.is_empty() => {
                let found = String::from_utf8_lossy(&found)
                    .trim()
                    .chars()
                    .take(40)
                    .collect();
                return Err(Error::StoreFormat {
                    path: store.root,
                    found,
                });
            }
            _ => std::fs::write(&path, FORMAT).map_err(|e| store.failed("write", &path, e))?,
        }
        store.sweep()?;
        Ok(store)
    }

    /// The same store with other bounds for what is imported.
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn failed(&self, action: &'static str, path: &Path, source: io::Error) -> Error {
        Error::store(&self.root, action, path, source)
    }

    pub(crate) fn entry(&self, digest: &Digest) -> PathBuf {
        self.root.join("images").join(digest.hex())
    }

    pub(crate) fn tmp(&self, name: &str) -> PathBuf {
        self.root.join("tmp").join(name)
    }

    pub(crate) fn lock(&self, name: &str) -> Result<Lock, Error> {
        let path = self.root.join("locks").join(name);
        Lock::exclusive(&path).map_err(|error| self.failed("lock", &path, error))
    }

    pub(crate) fn try_lock(&self, name: &str) -> Result<Option<Lock>, Error> {
        let path = self.root.join("locks").join(name);
        Lock::try_exclusive(&path).map_err(|error| self.failed("lock", &path, error))
    }

    fn remove_tree(&self, path: &Path) -> Result<(), Error> {
        let removed = or_missing(std::fs::remove_dir_all(path));
        removed
            .map(|_| ())
            .map_err(|error| self.failed("remove", path, error))
    }

    pub(crate) fn file_names(&self, dir: &str) -> Result<Vec<String>, Error> {
        let path = self.root.join(dir);
        let failed = |error| self.failed("read", &path, error);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(failed)? {
            names.extend(entry.map_err(failed)?.file_name().into_string());
        }
        Ok(names)
    }

    /// Removes what nobody works on any more.
    fn sweep(&self) -> Result<(), Error> {
        for name in self.file_names("tmp")? {
            let path = self.tmp(&name);
            if Digest::from_hex(&name).is_some() {
                if let Some(_lock) = self.try_lock(&name)? {
                    self.remove_tree(&path)?;
                }
            } else if name.starts_with("dir-") {
                // The lock on "tmp" is held while such a file is made and not yet locked.
                let Some(_making) = self.try_lock("tmp")? else {
                    continue;
                };
                let unused = Lock::try_existing(&path);
                if let Some(Some(_lock)) = or_missing(unused).unwrap_or(None) {
                    let _ = std::fs::remove_file(&path);
                }
            }
        }
        self.drop_downloads(DOWNLOADS_KEPT)
    }

    /// Makes an image ready: finds it in the store, or converts it into the store.
    pub fn import(
        &self,
        image: &ImageRef,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image, Error> {
        let name = image.to_string();
        let most = self.limits.unpacked_bytes;
        let archive = |path| Files::archive(&name, path, &self.root.join("tmp"), most);
        let (files, resolved) = match image {
            ImageRef::Stored(name) => return self.get(name),
            ImageRef::Directory { dir } => return self.import_directory(&name, dir, progress),
            ImageRef::OciLayout { dir, tag } => {
                let files = Files::directory(&name, dir)?;
                let resolved = resolve_oci(&files, tag.as_deref())?;
                (files, resolved)
            }
            ImageRef::OciArchive { path, tag } => {
                let files = archive(path)?;
                let resolved = resolve_oci(&files, tag.as_deref())?;
                (files, resolved)
            }
            ImageRef::DockerArchive { path, tag } => {
                let files = archive(path)?;
                let resolved = resolve_docker(&files, tag.as_deref())?;
                (files, resolved)
            }
        };
        self.import_resolved(&name, &files, &resolved, progress)
    }

    /// Makes an image ready that is built into the program as an OCI archive, under `name`.
    pub fn import_embedded(
        &self,
        name: &str,
        archive: &'static [u8],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image, Error> {
        let files = Files::embedded(name, archive)?;
        let resolved = resolve_oci(&files, None)?;
        self.import_resolved(name, &files, &resolved, progress)
    }

    pub(crate) fn import_resolved(
        &self,
        name: &str,
        files: &Files,
        resolved: &Resolved,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image, Error> {
        let digest = resolved.digest;
        self.provide(name, files, resolved, progress)?;
        self.set_name(name, digest)?;
        let image = self.load(&digest)?;
        // Somebody may have removed it this moment.
        image.ok_or_else(|| Error::NoSuchImage {
            name: name.to_owned(),
        })
    }

    /// Sees to it that the store has an image, under whatever name.
    pub(crate) fn provide(
        &self,
        name: &str,
        files: &Files,
        resolved: &Resolved,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), Error> {
        if matches!(self.load(&resolved.digest), Ok(Some(_))) {
            return Ok(());
        }
        self.convert_once(name, files, resolved, progress)
    }

    fn convert_once(
        &self,
        name: &str,
        files: &Files,
        resolved: &Resolved,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), Error> {
        let hex = resolved.digest.hex();
        let _lock = match self.try_lock(&hex)? {
            Some(lock) => lock,
            None => {
                progress(Progress::Waiting);
                self.lock(&hex)?
            }
        };
        match self.load(&resolved.digest) {
            Ok(Some(_)) => return Ok(()),
            Ok(None) => {}
            // Its source is at hand, so it is mended rather than complained about.
            Err(error) => {
                tracing::warn!("{error}; it is imported anew");
                self.remove_tree(&self.entry(&resolved.digest))?;
            }
        }
        let tmp = self.tmp(&hex);
        self.remove_tree(&tmp)?;
        std::fs::create_dir(&tmp).map_err(|error| self.failed("make", &tmp, error))?;
        let made = self
            .make_entry(name, files, resolved, &tmp, progress)
            .and_then(|()| {
                let entry = self.entry(&resolved.digest);
                std::fs::rename(&tmp, &entry)
                    .map_err(|error| self.failed("make", &entry, error))?;
                self.sync_directory(&self.root.join("images"))
            });
        if made.is_err() {
            let _ = std::fs::remove_dir_all(&tmp);
        }
        made
    }

    fn make_entry(
        &self,
        name: &str,
        files: &Files,
        resolved: &Resolved,
        dir: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), Error> {
        let rootfs = dir.join("rootfs.erofs");
        let mut out =
            File::create_new(&rootfs).map_err(|error| self.failed("make", &rootfs, error))?;
        let workshop = Workshop {
            image: name,
            store: &self.root,
            dir,
            limits: self.limits,
        };
        let written = workshop.convert(files, resolved, &mut out, progress)?;
        // What is visible must be whole, even after a loss of power.
        out.sync_data()
            .map_err(|error| self.failed("write", &rootfs, error))?;
        let record = Record {
            digest: resolved.digest,
            size: written.size,
            rootfs: written.digest,
            config: resolved.config.config.clone(),
        };
        self.keep_source(files, resolved, &dir.join(SOURCE))?;
        self.write_json(&dir.join("image.json"), &record)?;
        self.sync_directory(dir)
    }

    fn write_json(&self, path: &Path, value: &impl Serialize) -> Result<(), Error> {
        let write = || {
            let mut file = File::create(path)?;
            file.write_all(&serde_json::to_vec_pretty(value)?)?;
            file.sync_data()
        };
        write().map_err(|error| self.failed("write", path, error))
    }

    pub(crate) fn sync_directory(&self, path: &Path) -> Result<(), Error> {
        let sync = || File::open(path)?.sync_all();
        sync().map_err(|error| self.failed("write", path, error))
    }

    fn import_directory(
        &self,
        name: &str,
        dir: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image, Error> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let rootfs = self.tmp(&format!("dir-{}-{number}.erofs", std::process::id()));
        let making = self.lock("tmp")?;
        let failed = |error| self.failed("make", &rootfs, error);
        // A file of this name can only be left over from a process that had our number before.
        or_missing(std::fs::remove_file(&rootfs)).map_err(failed)?;
        let mut out = File::create_new(&rootfs).map_err(failed)?;
        let lock = Lock::shared(&rootfs).map_err(failed)?;
        drop(making);
        // From here on the file goes with `transient`, whatever happens.
        let transient = Transient {
            path: rootfs.clone(),
            _lock: lock,
        };
        progress(Progress::Writing);
        let tmp = self.root.join("tmp");
        let workshop = Workshop {
            image: name,
            store: &self.root,
            dir: &tmp,
            limits: self.limits,
        };
        let written = workshop.convert_directory(dir, &mut out)?;
        Ok(Image {
            names: vec![name.to_owned()],
            digest: written.digest,
            rootfs,
            config: ImageConfig::default(),
            size: written.size,
            imported: SystemTime::now(),
            rootfs_digest: written.digest,
            _transient: Some(Arc::new(transient)),
        })
    }

    /// An image by its digest; `None` when there is none.
    pub fn load(&self, digest: &Digest) -> Result<Option<Image>, Error> {
        let dir = self.entry(digest);
        let path = dir.join("image.json");
        let corrupt = |problem: String| Error::Corrupt {
            digest: digest.hex(),
            problem,
        };
        let Some(bytes) =
            or_missing(std::fs::read(&path)).map_err(|e| self.failed("read", &path, e))?
        else {
            return match dir.exists() {
                true => Err(corrupt("its image.json is missing".to_owned())),
                false => Ok(None),
            };
        };
        let record: Record = serde_json::from_slice(&bytes)
            .map_err(|error| corrupt(format!("its image.json is malformed ({error})")))?;
        if record.digest != *digest {
            return Err(corrupt(format!(
                "its image.json is that of {}",
                record.digest
            )));
        }
        let rootfs = dir.join("rootfs.erofs");
        let file = or_missing(File::open(&rootfs))
            .map_err(|error| self.failed("read", &rootfs, error))?
            .ok_or_else(|| corrupt("its rootfs.erofs is missing".to_owned()))?;
        let metadata = file
            .metadata()
            .map_err(|e| self.failed("read", &rootfs, e))?;
        if metadata.len() != record.size {
            let (found, size) = (metadata.len(), record.size);
            return Err(corrupt(format!(
                "its rootfs.erofs has {found} bytes instead of {size}"
            )));
        }
        erofs::check_superblock(&file).map_err(|source| Error::CorruptRootfs {
            digest: digest.hex(),
            source,
        })?;
        Ok(Some(Image {
            names: self
                .names()?
                .into_iter()
                .filter(|(_, d)| d == digest)
                .map(|(n, _)| n)
                .collect(),
            digest: *digest,
            rootfs,
            config: record.config,
            size: record.size,
            imported: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            rootfs_digest: record.rootfs,
            _transient: None,
        }))
    }

    /// Reads all of an image's root file system and compares its digest.
    pub fn verify(&self, image: &Image) -> Result<(), Error> {
        let read = || HashingReader::new(File::open(&image.rootfs)?).finish();
        match read().map_err(|error| self.failed("read", &image.rootfs, error))? {
            found if found == image.rootfs_digest => Ok(()),
            _ => Err(Error::Corrupt {
                digest: image.digest.hex(),
                problem: "the content of its rootfs.erofs has changed".to_owned(),
            }),
        }
    }

    /// What images there are, by digest; whole or not.
    pub fn digests(&self) -> Result<Vec<Digest>, Error> {
        let names = self.file_names("images")?;
        let mut digests: Vec<_> = names
            .iter()
            .filter_map(|name| Digest::from_hex(name))
            .collect();
        digests.sort();
        Ok(digests)
    }

    /// All images of the store.
    pub fn list(&self) -> Result<Listing, Error> {
        let mut listing = Listing::default();
        for digest in self.digests()? {
            match self.load(&digest) {
                Ok(Some(image)) => listing.images.push(image),
                Ok(None) => {}
                Err(error) => listing.damaged.push(error),
            }
        }
        listing
            .images
            .sort_by_key(|image| std::cmp::Reverse(image.imported));
        Ok(listing)
    }

    /// The digest that a name, a digest or the start of one stands for.
    pub(crate) fn find(&self, name: &str) -> Result<Digest, Error> {
        let digests = self.digests()?;
        let names = self.names()?;
        let named = known_as(name).find_map(|name| names.get(&name));
        if let Some(digest) = named.filter(|digest| digests.contains(digest)) {
            return Ok(*digest);
        }
        let found: Vec<_> = digests
            .iter()
            .filter(|digest| is_prefix(name, digest))
            .collect();
        match found[..] {
            [] => Err(Error::NoSuchImage {
                name: name.to_owned(),
            }),
            [digest] => Ok(*digest),
            _ => Err(Error::Ambiguous {
                prefix: name.to_owned(),
                candidates: found
                    .iter()
                    .map(|digest| digest.hex()[..16].to_owned())
                    .collect(),
            }),
        }
    }

    /// An image of the store, by name, digest or the start of its digest.
    pub fn get(&self, name: &str) -> Result<Image, Error> {
        let image = self.load(&self.find(name)?)?;
        image.ok_or_else(|| Error::NoSuchImage {
            name: name.to_owned(),
        })
    }

    /// Removes a name; or an image, when this was its last name or it is given by digest.
    ///
    /// A virtual machine that runs from it goes on: its open file stays.
    pub fn remove(&self, name: &str) -> Result<Removed, Error> {
        let digest = self.find(name)?;
        let is_last = self.change_names(|names| {
            let by_name = known_as(name).any(|name| names.remove(&name).is_some());
            let is_last = !by_name || !names.values().any(|other| *other == digest);
            if is_last {
                names.retain(|_, other| *other != digest);
            }
            is_last
        })?;
        if !is_last {
            return Ok(Removed::Name(name.to_owned()));
        }
        self.remove_entry(&digest)?;
        Ok(Removed::Image(digest))
    }

    /// Removes a name of an image, or all of them where it is given by digest; the image stays.
    pub fn untag(&self, name: &str) -> Result<Removed, Error> {
        let digest = self.find(name)?;
        self.change_names(|names| {
            let by_name = known_as(name).any(|name| names.remove(&name).is_some());
            if !by_name {
                names.retain(|_, other| *other != digest);
            }
        })?;
        Ok(Removed::Name(name.to_owned()))
    }

    /// Whether this is a name of an image, and no digest.
    pub fn is_name(&self, name: &str) -> Result<bool, Error> {
        let names = self.names()?;
        Ok(known_as(name).any(|name| names.contains_key(&name)))
    }

    fn remove_entry(&self, digest: &Digest) -> Result<(), Error> {
        let hex = digest.hex();
        let _lock = self.lock(&hex)?;
        let (entry, tmp) = (self.entry(digest), self.tmp(&hex));
        self.remove_tree(&tmp)?;
        let moved = or_missing(std::fs::rename(&entry, &tmp));
        moved.map_err(|error| self.failed("remove", &entry, error))?;
        self.remove_tree(&tmp)
    }

    /// Removes images that have no name and that nobody `needs`, and what broken pulls have left; gives the
    /// images.
    pub fn prune(&self, needs: impl Fn(&Digest) -> bool) -> Result<Vec<Digest>, Error> {
        self.drop_downloads(Duration::ZERO)?;
        let mut removed = Vec::new();
        for digest in self.digests()? {
            // Under the lock of the names, so that nobody gives it one meanwhile.
            let _names = self.lock("names")?;
            if !needs(&digest) && !self.names()?.values().any(|named| *named == digest) {
                self.remove_entry(&digest)?;
                removed.push(digest);
            }
        }
        Ok(removed)
    }

    /// Removes what was received for pulls that nobody has gone on with for so long.
    fn drop_downloads(&self, older: Duration) -> Result<(), Error> {
        for name in self.file_names(DOWNLOADS)? {
            let path = self.root.join(DOWNLOADS).join(&name);
            let hex = name.strip_suffix(".part").unwrap_or(&name);
            if Digest::from_hex(hex).is_none() {
                continue;
            }
            let modified = std::fs::metadata(&path).and_then(|metadata| metadata.modified());
            let age = modified.map(|at| at.elapsed().unwrap_or_default());
            // Gone already where that can't be told.
            if age.is_ok_and(|age| age >= older)
                && let Some(_lock) = self.try_lock(&format!("blob-{hex}"))?
            {
                let removed = or_missing(std::fs::remove_file(&path));
                removed.map_err(|error| self.failed("remove", &path, error))?;
            }
        }
        Ok(())
    }

    /// Names of images that aren't there.
    pub fn dangling(&self) -> Result<Vec<String>, Error> {
        // The names first: an image is there before it has one.
        let names = self.names()?;
        let digests = self.digests()?;
        let gone = names.into_iter().filter(|(_, of)| !digests.contains(of));
        Ok(gone.map(|(name, _)| name).collect())
    }

    /// Forgets a name of an image that isn't there.
    pub fn forget_name(&self, name: &str) -> Result<(), Error> {
        let digests = self.digests()?;
        self.change_names(|names| {
            names.retain(|known, of| known != name || digests.contains(of));
        })
    }

    /// Gives an image of the store a further name, taking it from another that has it.
    pub fn tag(&self, image: &str, name: &str) -> Result<(), Error> {
        let digest = self.find(image)?;
        self.set_name(name, digest)
    }

    fn names(&self) -> Result<BTreeMap<String, Digest>, Error> {
        let path = self.root.join("names.json");
        let bytes = or_missing(std::fs::read(&path));
        match bytes.map_err(|error| self.failed("read", &path, error))? {
            None => Ok(BTreeMap::new()),
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| self.failed("understand", &path, error.into())),
        }
    }

    pub(crate) fn set_name(&self, name: &str, digest: Digest) -> Result<(), Error> {
        // Most runs change nothing, and then nobody has to wait.
        if self.names()?.get(name) == Some(&digest) {
            return Ok(());
        }
        self.change_names(|names| {
            names.insert(name.to_owned(), digest);
        })
    }

    fn change_names<T>(
        &self,
        change: impl FnOnce(&mut BTreeMap<String, Digest>) -> T,
    ) -> Result<T, Error> {
        let _lock = self.lock("names")?;
        let mut names = self.names()?;
        let before = names.clone();
        let result = change(&mut names);
        if names != before {
            let (tmp, path) = (self.tmp("names.json"), self.root.join("names.json"));
            self.write_json(&tmp, &names)?;
            std::fs::rename(&tmp, &path).map_err(|error| self.failed("write", &path, error))?;
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests;
