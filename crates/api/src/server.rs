//! The socket, and who answers at it.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::Uri;
use axum::routing::get;
use skerry_engine::{EngineError, Paths};
use tokio::signal::unix::{SignalKind, signal};
use tower::Layer;
use tower::util::MapRequestLayer;

use crate::work::App;
use crate::{docker, native, unread};

/// How long requests under way may take once the server is told to end.
const GRACE: Duration = Duration::from_secs(2);

/// Threads that read and write sockets; what takes time has others.
const THREADS: usize = 2;

/// What a server works with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where everything is kept.
    pub paths: Paths,
    /// What runs machines, asked with `vm-host`: the `skerry` program.
    pub program: PathBuf,
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Somebody answers there.
    #[error("Another server listens at {}: end it, or name another socket with --socket", .0.display())]
    Taken(PathBuf),
    /// Something else is there.
    #[error("{} is there and no socket: name another one with --socket", .0.display())]
    NotASocket(PathBuf),
    /// The socket can't be made.
    #[error("Can't listen at {}: check that its folder exists and is yours, and the path's length (107 bytes at most)", .0.display())]
    Listen(PathBuf, #[source] io::Error),
    /// The folder for it can't be made.
    #[error(transparent)]
    Folder(#[from] EngineError),
    /// Threads or signals are missing.
    #[error("Can't run a server on this host")]
    Host(#[source] io::Error),
}

/// Listens at `path`, as its user alone. A socket that a killed server left is replaced.
pub fn listen(path: &Path) -> Result<UnixListener, ServeError> {
    use std::os::unix::fs::FileTypeExt;
    let failed = |error| ServeError::Listen(path.to_owned(), error);
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ServeError::NotASocket(path.to_owned()));
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => return Err(ServeError::Taken(path.to_owned())),
            Err(_) => std::fs::remove_file(path).map_err(failed)?,
        },
    }
    // It gets its name when nobody else may open it any more.
    let mut staged = path.as_os_str().to_owned();
    staged.push(format!(".{}", std::process::id()));
    let staged = PathBuf::from(staged);
    let _ = std::fs::remove_file(&staged);
    let listener = UnixListener::bind(&staged).map_err(failed)?;
    let named = std::fs::set_permissions(&staged, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| std::fs::rename(&staged, path));
    if let Err(error) = named {
        let _ = std::fs::remove_file(&staged);
        return Err(failed(error));
    }
    Ok(listener)
}

/// Answers at `listener` until the process is told to end (SIGINT, SIGTERM).
pub fn serve(listener: UnixListener, options: Options) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .thread_name("serve")
        .build()
        .map_err(ServeError::Host)?;
    let served = runtime.block_on(answer(listener, options));
    // Threads that follow a log or wait for a machine would hold the process.
    runtime.shutdown_timeout(GRACE);
    served.map_err(ServeError::Host)
}

async fn answer(listener: UnixListener, options: Options) -> io::Result<()> {
    use axum::ServiceExt;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let (mut interrupt, mut terminate) = (
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
    );
    let told = async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let service = MapRequestLayer::new(without_version).layer(router(options));
    let serving = axum::serve(listener, ServiceExt::<Request>::into_make_service(service));
    let serving = std::future::IntoFuture::into_future(serving);
    tokio::select! {
        served = serving => served,
        () = told => Ok(()),
    }
}

/// All that is answered.
pub(crate) fn router(options: Options) -> Router {
    let app = Arc::new(App::new(options));
    let (own, document) = native::router();
    let document: Arc<str> = native::text(&document).into();
    let own = own.route(
        "/api/v1/openapi.json",
        get(move || {
            let document = document.to_string();
            async move { ([("content-type", "application/json")], document) }
        }),
    );
    docker::take_over(&app);
    let unread = axum::middleware::from_fn(unread::take);
    own.merge(docker::router()).layer(unread).with_state(app)
}

/// A request of the Docker Engine API without the version that its path may begin with: what is answered
/// is the same in all of them.
fn without_version(mut request: Request) -> Request {
    if let Some(uri) = unversioned(request.uri()) {
        *request.uri_mut() = uri;
    }
    request
}

fn unversioned(uri: &Uri) -> Option<Uri> {
    let text = uri.path_and_query()?.as_str();
    let (version, rest) = text.strip_prefix("/v1.")?.split_once('/')?;
    let number = !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit());
    number.then(|| format!("/{rest}").parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_left_out() {
        let of = |text: &str| unversioned(&text.parse().expect("uri")).map(|uri| uri.to_string());
        assert_eq!(
            of("/v1.41/containers/json?all=1").as_deref(),
            Some("/containers/json?all=1")
        );
        assert_eq!(of("/v1.50/_ping").as_deref(), Some("/_ping"));
        for other in [
            "/containers/json",
            "/v1./x",
            "/v2.1/x",
            "/v1.4a/x",
            "/api/v1/vms",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn a_socket_is_its_users_and_one_servers() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("socket");
        let first = listen(&path).expect("listens");
        let mode = std::fs::metadata(&path)
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(listen(&path), Err(ServeError::Taken(_))));
        // As a killed server leaves it.
        drop(first);
        let _second = listen(&path).expect("listens again");
        let file = folder.path().join("file");
        std::fs::write(&file, "mine").expect("written");
        assert!(matches!(listen(&file), Err(ServeError::NotASocket(_))));
        assert_eq!(std::fs::read_to_string(&file).expect("kept"), "mine");
        let nowhere = folder.path().join("no/socket");
        assert!(matches!(listen(&nowhere), Err(ServeError::Listen(..))));
        assert_eq!(std::fs::read_dir(folder.path()).expect("list").count(), 2);
    }
}
