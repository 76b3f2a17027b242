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

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use skerry_protocol::MAX_DATA;
use skerry_protocol::message::{ExecFailure, FailureKind, GuestString};

use self::kept::Kept;
use self::user::AccountCache;
use crate::cgroup::Cgroup;
use crate::log;
use crate::sys;

/// Execs at one time; more connections are closed at once.
const MAX_SESSIONS: usize = 4096;

/// Threads that wait for connections: from the start, and at most.
const FIRST_THREADS: usize = 2;
const SPARE_THREADS: usize = 8;

/// What all exec sessions of a guest share.
#[derive(Debug)]
pub struct ExecServer {
    env: Vec<(GuestString, GuestString)>,
    cgroup: Option<Arc<Cgroup>>,
    kept: Arc<Kept>,
    accounts: AccountCache,
    /// `/dev/null`, for every command without input.
    null: OnceLock<OwnedFd>,
    sessions: AtomicUsize,
    /// Threads that wait for a connection.
    waiting: AtomicUsize,
}

/// What a thread keeps from one session to the next.
#[derive(Debug)]
pub struct Desk {
    /// For reads.
    scratch: Vec<u8>,
    /// The supplementary groups of this thread, where it has set them.
    groups: Option<Vec<u32>>,
}

impl Desk {
    fn new() -> Self {
        Self {
            scratch: vec![0; MAX_DATA],
            groups: None,
        }
    }
}

/// Where exec connections come from.
pub trait Accept: Send + Sync + 'static {
    /// The next connection, for one of the threads that ask.
    fn accept(&self) -> io::Result<UnixStream>;
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
            accounts: AccountCache::default(),
            null: OnceLock::new(),
            sessions: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
        })
    }

    /// Serves all connections, each in the thread that took it, while another waits for the next.
    pub fn start(self: &Arc<Self>, connections: &Arc<impl Accept>) -> io::Result<()> {
        (0..FIRST_THREADS).try_for_each(|_| self.add_thread(connections))
    }

    fn add_thread(self: &Arc<Self>, connections: &Arc<impl Accept>) -> io::Result<()> {
        let (server, connections) = (Arc::clone(self), Arc::clone(connections));
        self.waiting.fetch_add(1, Ordering::SeqCst);
        spawn(move || server.take_turns(&connections)).inspect_err(|_| {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        })
    }

    /// One thread's life: it counts as waiting when this begins.
    fn take_turns(self: &Arc<Self>, connections: &Arc<impl Accept>) {
        // Who exits here is collected here. Without a thread to want it, the signal isn't even sent.
        sys::unblock_child_signal();
        let mut desk = Desk::new();
        loop {
            match connections.accept() {
                Ok(connection) => {
                    if self.waiting.fetch_sub(1, Ordering::SeqCst) == 1
                        && let Err(error) = self.add_thread(connections)
                    {
                        log::error(format_args!("no thread for the next exec: {error}"));
                    }
                    self.serve_here(connection, &mut desk);
                    if self.waiting.fetch_add(1, Ordering::SeqCst) >= SPARE_THREADS {
                        self.waiting.fetch_sub(1, Ordering::SeqCst);
                        return;
                    }
                }
                Err(error) => {
                    log::error(format_args!("accept: {error}"));
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }

    /// Serves one connection in a thread of its own.
    pub fn serve(self: &Arc<Self>, connection: UnixStream) {
        let server = Arc::clone(self);
        if let Err(error) = spawn(move || server.serve_here(connection, &mut Desk::new())) {
            log::error(format_args!("no thread for an exec: {error}"));
        }
    }

    /// Serves one connection in this thread.
    fn serve_here(&self, connection: UnixStream, desk: &mut Desk) {
        if self.sessions.fetch_add(1, Ordering::Relaxed) < MAX_SESSIONS
            && let Err(error) = session::run(connection, self, desk)
        {
            log::error(format_args!("exec session: {error}"));
        }
        self.sessions.fetch_sub(1, Ordering::Relaxed);
    }
}

fn spawn(body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new()
        .name("exec".to_owned())
        .stack_size(256 * 1024)
        .spawn(body)
        .map(drop)
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
