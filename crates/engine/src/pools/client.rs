//! What any process may do with the pools of its user.

use std::io;
use std::os::unix::net::UnixStream;

use super::PoolStats;
use super::place::{self, PoolInfo, control};
use super::server::{PoolReply, PoolRequest};
use crate::command::CommandSpec;
use crate::error::EngineError;
use crate::paths::Paths;
use crate::run::{RunIo, RunOutcome};
use crate::vms::{command_over, connect, receive, send};

fn ask(
    paths: &Paths,
    name: &str,
    request: &PoolRequest,
) -> Result<(PoolReply, UnixStream, PoolInfo), EngineError> {
    let info = place::find(paths, name)?;
    let silent = |source: io::Error| EngineError::PoolSilent {
        name: name.to_owned(),
        source,
    };
    let mut stream = connect(&control(paths, name)).map_err(silent)?;
    send(&mut stream, request).map_err(silent)?;
    match receive(&mut stream).map_err(silent)? {
        PoolReply::Failed(reason) => Err(EngineError::PoolRefused {
            name: name.to_owned(),
            reason,
        }),
        reply => Ok((reply, stream, info)),
    }
}

fn strange(name: &str) -> EngineError {
    EngineError::PoolRefused {
        name: name.to_owned(),
        reason: "its answer is not one to the question".to_owned(),
    }
}

/// All pools, by name.
pub fn list(paths: &Paths) -> Result<Vec<PoolInfo>, EngineError> {
    place::all(paths)
}

/// Runs a command in a clean machine of a pool, or in the one that was given out as `lease`.
pub fn exec(
    paths: &Paths,
    name: &str,
    lease: Option<u64>,
    spec: &CommandSpec,
    io: RunIo,
) -> Result<RunOutcome, EngineError> {
    let request = lease.map_or(PoolRequest::Exec, PoolRequest::ExecIn);
    let (_, stream, info) = ask(paths, name, &request)?;
    let still_there = || place::find(paths, name).is_ok();
    command_over(stream, &info.surroundings, spec, io, still_there)
}

/// Has a pool give a machine out; gives its number.
pub fn acquire(paths: &Paths, name: &str) -> Result<u64, EngineError> {
    match ask(paths, name, &PoolRequest::Acquire)? {
        (PoolReply::Leased(number), ..) => Ok(number),
        _ => Err(strange(name)),
    }
}

/// Gives a machine back.
pub fn release(paths: &Paths, name: &str, lease: u64) -> Result<(), EngineError> {
    ask(paths, name, &PoolRequest::Release(lease)).map(drop)
}

/// A pool's numbers.
pub fn stats(paths: &Paths, name: &str) -> Result<PoolStats, EngineError> {
    match ask(paths, name, &PoolRequest::Stats)? {
        (PoolReply::Stats(stats), ..) => Ok(stats),
        _ => Err(strange(name)),
    }
}

/// Ends a pool and its machines, those in use among them.
pub fn close(paths: &Paths, name: &str) -> Result<(), EngineError> {
    ask(paths, name, &PoolRequest::Close).map(drop)
}
