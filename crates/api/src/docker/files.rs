//! Files into machines and out of them: `docker cp`.

use std::io;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::json;
use skerry_engine::dates;
use skerry_engine::vms::{self, CopyOptions, PathKind, PathStat};
use std::time::{Duration, SystemTime};
use tokio_stream::StreamExt;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::query::flag;
use crate::error::ApiError;
use crate::streams::body;
use crate::work::{App, Shared, work};

/// The header with what a path leads to.
const STAT: &str = "x-docker-container-path-stat";

/// Go's `os.FileMode`, by which clients know files.
fn go_mode(stat: &PathStat) -> u32 {
    const DIR: u32 = 1 << 31;
    const SYMLINK: u32 = 1 << 27;
    const DEVICE: u32 = 1 << 26;
    const SETUID: u32 = 1 << 23;
    const SETGID: u32 = 1 << 22;
    const STICKY: u32 = 1 << 20;
    let mut mode = stat.mode & 0o777;
    mode |= match stat.kind {
        PathKind::Folder => DIR,
        PathKind::Link => SYMLINK,
        PathKind::Other => DEVICE,
        PathKind::File => 0,
    };
    for (bit, go) in [(0o4000, SETUID), (0o2000, SETGID), (0o1000, STICKY)] {
        mode |= if stat.mode & bit != 0 { go } else { 0 };
    }
    mode
}

fn described(path: &str, stat: &PathStat) -> String {
    let name = path.trim_end_matches("/.").trim_end_matches('/');
    let name = name.rsplit('/').next().filter(|name| !name.is_empty());
    // A guest may claim any second.
    let modified = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(stat.modified));
    let text = json!({
        "name": name.unwrap_or("/"),
        "size": stat.size,
        "mode": go_mode(stat),
        "mtime": dates::rfc3339(modified.unwrap_or(SystemTime::UNIX_EPOCH)),
        "linkTarget": stat.target.as_deref().unwrap_or_default(),
    });
    BASE64_STANDARD.encode(text.to_string())
}

#[derive(Debug, Deserialize)]
pub(super) struct PathQuery {
    path: String,
}

fn found(app: &App, id: &str, path: &str) -> Result<String, ApiError> {
    let found = vms::stat(&app.registry()?, id, path)?;
    let missing = || ApiError::missing(format!("There is no {path} in {id}"));
    Ok(described(path, &found.ok_or_else(missing)?))
}

pub(super) async fn stat(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(PathQuery { path }): Query<PathQuery>,
) -> Result<Response, ApiError> {
    let stat = work(&app, move |app| found(app, &id, &path)).await?;
    Ok(([(STAT, stat)], StatusCode::OK).into_response())
}

pub(super) async fn read(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(PathQuery { path }): Query<PathQuery>,
) -> Result<Response, ApiError> {
    let (stat, registry, id, path) = work(&app, move |app| {
        Ok((found(app, &id, &path)?, app.registry()?, id, path))
    })
    .await?;
    let (out, body) = body();
    tokio::task::spawn_blocking(move || {
        let options = CopyOptions::default();
        let packed = vms::archive_out(&registry, &id, &path, options, Box::new(out.clone()));
        if let Err(error) = packed {
            // The archive ends early, by which the client knows.
            tracing::debug!(%error, "An archive is not whole");
        }
    });
    let headers = [
        (
            header::CONTENT_TYPE.as_str(),
            "application/x-tar".to_owned(),
        ),
        (STAT, stat),
    ];
    Ok((headers, body).into_response())
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WriteQuery {
    path: String,
    #[serde(default, rename = "copyUIDGID", deserialize_with = "flag")]
    keep_owner: bool,
}

/// Takes an archive. A folder is never replaced by what is none, nor the other way round, whatever
/// `noOverwriteDirNonDir` says.
pub(super) async fn write(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(WriteQuery { path, keep_owner }): Query<WriteQuery>,
    archive: Body,
) -> Result<StatusCode, ApiError> {
    let pieces = archive.into_data_stream();
    let pieces = pieces.map(|piece| piece.map_err(io::Error::other));
    let reader = SyncIoBridge::new(StreamReader::new(pieces));
    work(&app, move |app| {
        let options = CopyOptions {
            keep_owner,
            ..CopyOptions::default()
        };
        vms::archive_in(&app.registry()?, &id, &path, options, Box::new(reader))?;
        Ok(StatusCode::OK)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_described_as_go_has_them() {
        let stat = PathStat {
            kind: PathKind::Folder,
            size: 0,
            mode: 0o1777,
            modified: u64::MAX,
            target: None,
        };
        assert_eq!(go_mode(&stat), 0x8010_01ff);
        let read = |path: &str| {
            let text = BASE64_STANDARD
                .decode(described(path, &stat))
                .expect("base64");
            let value: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
            value["name"].as_str().expect("a name").to_owned()
        };
        let names = ["/tmp", "/tmp/", "/var/tmp/.", "/", "/."].map(read);
        assert_eq!(names, ["tmp", "tmp", "tmp", "/", "/"]);
    }
}
