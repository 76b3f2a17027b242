//! Processes that this one starts and that outlive it, as far as they do.
//!
//! ```text
//!  start ── a socket as its standard input ──► program verb ─► leave_terminal
//! ```

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::error::EngineError;

/// Started and not known to have ended.
static CHILDREN: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// Starts `program verb`, which begins with [`leave_terminal`]; gives the socket to it.
pub(crate) fn start(program: &Path, verb: &str) -> Result<UnixStream, EngineError> {
    let pair = UnixStream::pair().map_err(EngineError::host("make a socket"));
    let (own, theirs) = pair?;
    let child = Command::new(program)
        .arg(verb)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    reap(child.map_err(EngineError::host("start another skerry"))?);
    Ok(own)
}

/// Collects `child` when it has ended: with the next one that is started, so that no more than a few
/// ended ones ever wait for it.
fn reap(child: Child) {
    let mut children = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
    children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    children.push(child);
}

/// Takes this process away from the terminal of its maker; gives the socket to that, which is its
/// standard input.
pub(crate) fn leave_terminal() -> Result<UnixStream, EngineError> {
    // It fails in a process that leads a session already.
    let _ = rustix::process::setsid();
    let socket = rustix::io::dup(std::io::stdin());
    let unusable = EngineError::host("use its socket");
    let socket = socket.map_err(|error| unusable(error.into()))?;
    if let Ok(null) = File::open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(null);
    }
    Ok(UnixStream::from(socket))
}
