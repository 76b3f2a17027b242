//! Parts of images, from a registry into the store: several at once, going on where an earlier
//! attempt broke off, and checked before they have their name.
//!
//! ```text
//! downloads/HEX.part ── appended to by the holder of locks/blob-HEX ── digest right ──► downloads/HEX
//! ```

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt;
use oci_client::client::BlobResponse;
use oci_client::errors::OciDistributionError;

use super::RegistryError;
use super::session::{ATTEMPTS, Session, is_passing, pause};
use crate::digest::{Digest, Hasher};
use crate::lock::Lock;
use crate::store::{DOWNLOADS, Store};
use crate::{Error, Progress};

/// How often somebody who downloads the same is asked whether that is done.
const POLL: Duration = Duration::from_millis(100);

/// Where news of all the transfers go.
pub(super) struct Reporter<'a>(RefCell<&'a mut dyn FnMut(Progress)>);

impl<'a> Reporter<'a> {
    pub(super) fn new(progress: &'a mut dyn FnMut(Progress)) -> Self {
        Reporter(RefCell::new(progress))
    }

    pub(super) fn tell(&self, news: Progress) {
        (self.0.borrow_mut())(news);
    }
}

/// What downloads of one image have in common.
pub(super) struct Downloads<'a> {
    pub(super) session: &'a Session,
    pub(super) store: &'a Store,
    pub(super) reporter: &'a Reporter<'a>,
}

/// How an attempt ended that could be repeated.
enum Broken {
    Registry(OciDistributionError),
    Stream(std::io::Error),
    /// All is there, and it is not what it should be.
    Wrong(Digest),
}

/// A part that is being received.
struct Part {
    path: PathBuf,
    file: File,
    hasher: Hasher,
    len: u64,
}

impl Downloads<'_> {
    fn size_error(&self, part: &'static str, expected: String, found: u64) -> Error {
        let error = RegistryError::Size {
            host: self.session.host.clone(),
            name: self.session.name().to_owned(),
            part,
            expected,
            found,
        };
        error.into()
    }

    fn broken(&self, what: String, source: Box<dyn std::error::Error + Send + Sync>) -> Error {
        let error = RegistryError::Broken {
            host: self.session.host.clone(),
            what,
            attempts: ATTEMPTS,
            source,
        };
        error.into()
    }

    fn report(&self, digest: Digest, done: u64, size: Option<u64>) {
        self.reporter
            .tell(Progress::Transfer { digest, done, size });
    }

    /// A small blob, into memory.
    pub(super) async fn document(&self, digest: Digest, most: u64) -> Result<Vec<u8>, Error> {
        let (session, name) = (self.session, digest.to_string());
        let mut number = 1;
        let bytes = loop {
            let attempt = async {
                let (client, reference) = (&session.client, &session.reference);
                let response = client
                    .pull_blob_stream_partial(reference, name.as_str(), 0, None)
                    .await?;
                let (BlobResponse::Full(mut stream) | BlobResponse::Partial(mut stream)) = response;
                let mut bytes = Vec::new();
                while let Some(chunk) = stream.next().await {
                    match chunk {
                        Ok(chunk) => bytes.extend_from_slice(&chunk),
                        // The library checks digests too, at the end; ours is what counts.
                        Err(error) if is_digest_error(&error) => break,
                        Err(error) => return Err(error.into()),
                    }
                    if bytes.len() as u64 > most {
                        break;
                    }
                }
                Ok::<_, OciDistributionError>(bytes)
            };
            match attempt.await {
                Ok(bytes) => break bytes,
                Err(error) if number < ATTEMPTS && is_passing(&error) => {
                    pause(number).await;
                    number += 1;
                }
                Err(error) => return Err(session.told(error).into()),
            }
        };
        if bytes.len() as u64 > most {
            let expected = format!("at most {most}");
            return Err(self.size_error("the configuration", expected, bytes.len() as u64));
        }
        match Digest::of(&bytes) {
            found if found == digest => Ok(bytes),
            found => Err(session.mismatch("the configuration", digest, found).into()),
        }
    }

    /// A layer: the store's own, or received now. Nobody else receives it at the same time.
    pub(super) async fn layer(
        &self,
        digest: Digest,
        size: Option<u64>,
        most: u64,
    ) -> Result<(PathBuf, File), Error> {
        if let Some(size) = size.filter(|size| *size > most) {
            return Err(self.size_error("a layer", format!("at most {most}"), size));
        }
        let lock_name = format!("blob-{}", digest.hex());
        let _lock = self.lock(&lock_name).await?;
        if let Some(found) = self.store.find_blob(&digest)? {
            let done = found.1.metadata().map_or(0, |metadata| metadata.len());
            self.report(digest, done, Some(done));
            return Ok(found);
        }
        let whole = self.store.root().join(DOWNLOADS).join(digest.hex());
        let mut part = self.part(whole.with_extension("part"))?;
        // What can't be the start of the layer is no use; nor is what may be all of it already,
        // where that can't be told: no server has anything behind its end.
        if size.is_none_or(|size| part.len > size) {
            self.rewind(&mut part)?;
        }
        let resumed = part.len > 0;
        let received = self.receive(digest, size, most, &mut part).await;
        let received = match received {
            // What an earlier process left may be spoilt: once more, from the start.
            Err(error) if resumed && is_wrong(&error) => {
                self.rewind(&mut part)?;
                self.receive(digest, size, most, &mut part).await
            }
            received => received,
        };
        if let Err(error) = received {
            let spoilt = is_wrong(&error);
            if spoilt || matches!(error, Error::StoreFull { .. }) || part.len == 0 {
                let _ = std::fs::remove_file(&part.path);
            }
            return Err(error);
        }
        let failed = |error| self.store.failed("write", &part.path, error);
        part.file.sync_data().map_err(failed)?;
        std::fs::rename(&part.path, &whole).map_err(failed)?;
        Ok((whole, part.file))
    }

    /// Waits for others who receive the same. A thread that waited in the kernel would hold up
    /// the other parts that this process receives, for which that process may wait in turn.
    async fn lock(&self, name: &str) -> Result<Lock, Error> {
        let mut told = false;
        loop {
            if let Some(lock) = self.store.try_lock(name)? {
                return Ok(lock);
            }
            if !told {
                self.reporter.tell(Progress::Waiting);
                told = true;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn part(&self, path: PathBuf) -> Result<Part, Error> {
        let open = || open_part(&path);
        let (file, hasher, len) = open().map_err(|e| self.store.failed("write", &path, e))?;
        Ok(Part {
            path,
            file,
            hasher,
            len,
        })
    }

    fn rewind(&self, part: &mut Part) -> Result<(), Error> {
        let rewind = || {
            part.file.set_len(0)?;
            (&part.file).seek(SeekFrom::Start(0))
        };
        rewind().map_err(|error| self.store.failed("write", &part.path, error))?;
        (part.hasher, part.len) = (Hasher::default(), 0);
        Ok(())
    }

    /// Receives what is missing, trying again as long as that gets on.
    async fn receive(
        &self,
        digest: Digest,
        size: Option<u64>,
        most: u64,
        part: &mut Part,
    ) -> Result<(), Error> {
        let mut number = 1;
        loop {
            let before = part.len;
            let broken = match self.attempt(digest, size, most, part).await? {
                Ok(()) => return Ok(()),
                Err(Broken::Wrong(found)) => {
                    return Err(self.session.mismatch("a layer", digest, found).into());
                }
                Err(broken) => broken,
            };
            if part.len > before {
                number = 1;
            }
            let what = || format!("layer {}", &digest.hex()[..12]);
            match broken {
                Broken::Registry(error) if !is_passing(&error) => {
                    return Err(self.session.told(error).into());
                }
                Broken::Registry(error) if number >= ATTEMPTS => {
                    return Err(self.broken(what(), error.into()));
                }
                Broken::Stream(error) if number >= ATTEMPTS => {
                    return Err(self.broken(what(), error.into()));
                }
                _ => {}
            }
            pause(number).await;
            number += 1;
        }
    }

    /// One request for what is missing, and what comes of it.
    async fn attempt(
        &self,
        digest: Digest,
        size: Option<u64>,
        most: u64,
        part: &mut Part,
    ) -> Result<Result<(), Broken>, Error> {
        let most = size.unwrap_or(most);
        let announced = || match size {
            Some(size) => size.to_string(),
            None => format!("at most {most}"),
        };
        if size.is_none_or(|size| part.len != size) {
            let name = digest.to_string();
            let (client, reference) = (&self.session.client, &self.session.reference);
            let response =
                client.pull_blob_stream_partial(reference, name.as_str(), part.len, None);
            let mut stream = match response.await {
                Ok(BlobResponse::Partial(stream)) => stream,
                Ok(BlobResponse::Full(stream)) => {
                    self.rewind(part)?;
                    stream
                }
                Err(error) => return Ok(Err(Broken::Registry(error))),
            };
            while let Some(chunk) = stream.next().await {
                let chunk = match chunk {
                    Ok(chunk) => chunk,
                    // The library checks digests too, at the end; ours is what counts.
                    Err(error) if is_digest_error(&error) => break,
                    Err(error) => return Ok(Err(Broken::Stream(error))),
                };
                let len = part.len + chunk.len() as u64;
                if len > most {
                    return Err(self.size_error("a layer", announced(), len));
                }
                part.file
                    .write_all(&chunk)
                    .map_err(|error| self.store.failed("write", &part.path, error))?;
                part.hasher.update(&chunk);
                part.len = len;
                self.report(digest, len, size);
            }
        }
        if let Some(size) = size.filter(|size| part.len < *size) {
            let (len, kind) = (part.len, std::io::ErrorKind::UnexpectedEof);
            let text = format!("{len} of {size} bytes came");
            return Ok(Err(Broken::Stream(std::io::Error::new(kind, text))));
        }
        match part.hasher.clone().finish() {
            found if found == digest => Ok(Ok(())),
            found => Ok(Err(Broken::Wrong(found))),
        }
    }
}

/// A part as an earlier attempt left it, and the digest of that.
fn open_part(path: &Path) -> std::io::Result<(File, Hasher, u64)> {
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    let (mut hasher, mut len) = (Hasher::default(), 0);
    let mut buf = vec![0; 128 << 10];
    loop {
        match file.read(&mut buf) {
            Ok(0) => return Ok((file, hasher, len)),
            Ok(n) => {
                hasher.update(&buf[..n]);
                len += n as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether what came is not what was asked for.
fn is_wrong(error: &Error) -> bool {
    matches!(
        error.of_registry(),
        Some(RegistryError::Mismatch { .. } | RegistryError::Size { .. })
    )
}

fn is_digest_error(error: &std::io::Error) -> bool {
    let inner = error.get_ref();
    inner.is_some_and(|inner| inner.is::<oci_client::errors::DigestError>())
}
