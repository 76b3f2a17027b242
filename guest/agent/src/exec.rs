//! Running commands: one session for each.
//!
//! [`session`] speaks the protocol with [`output`] and [`kept`]; [`user`], [`lookup`] and
//! [`environment`] turn a request into what `execve` takes, and [`spawn`] and [`child`] make the
//! process.

pub mod child;
pub mod environment;
pub mod kept;
pub mod lookup;
pub mod output;
pub mod session;
pub mod spawn;
pub mod user;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use skerry_protocol::message::{ExecFailure, FailureKind, GuestString};

use self::kept::Kept;
use crate::cgroup::Cgroup;
use crate::log;

/// Execs at one time; more connections are closed at once.
const MAX_SESSIONS: usize = 4096;

/// What all exec sessions of a guest share.
#[derive(Debug)]
pub struct ExecServer {
    env: Vec<(GuestString, GuestString)>,
    cgroup: Option<Arc<Cgroup>>,
    kept: Arc<Kept>,
    sessions: AtomicUsize,
}

impl ExecServer {
    /// A server whose commands have `env` unless they name a variable themselves, and live in
    /// `cgroup`.
    #[must_use]
    pub fn new(env: Vec<(GuestString, GuestString)>, cgroup: Option<Arc<Cgroup>>) -> Arc<Self> {
        Arc::new(Self {
            env,
            cgroup,
            kept: Arc::default(),
            sessions: AtomicUsize::new(0),
        })
    }

    /// Serves one connection in a thread of its own.
    pub fn serve(self: &Arc<Self>, connection: UnixStream) {
        if self.sessions.fetch_add(1, Ordering::Relaxed) >= MAX_SESSIONS {
            self.sessions.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let server = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name("exec".to_owned())
            .stack_size(256 * 1024)
            .spawn(move || {
                server.serve_here(connection);
                server.sessions.fetch_sub(1, Ordering::Relaxed);
            });
        if let Err(error) = thread {
            self.sessions.fetch_sub(1, Ordering::Relaxed);
            log::error(format_args!("no thread for an exec: {error}"));
        }
    }

    /// Serves one connection in this thread.
    pub fn serve_here(&self, connection: UnixStream) {
        if let Err(error) = session::run(connection, self) {
            log::error(format_args!("exec session: {error}"));
        }
    }
}

/// A failure with its words.
fn failure(kind: FailureKind, message: impl Into<String>) -> ExecFailure {
    ExecFailure {
        kind,
        message: message.into(),
    }
}

/// A guest string for people.
fn show(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
