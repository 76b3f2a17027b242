//! Snapshots of the store.

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use skerry_engine::snapshots::{self, Removed, SnapshotDetails, SnapshotEntry};
use utoipa::{IntoParams, ToSchema};

use super::images::{Step, parse, step, steps};
use crate::error::{ApiError, Problem, chain};
use crate::work::{Shared, work};

/// All snapshots, the newest first.
#[utoipa::path(get, path = "/snapshots", tag = "snapshots", responses(
    (status = 200, body = Vec<SnapshotEntry>), (status = "default", body = Problem)))]
pub(crate) async fn list(State(app): State<Shared>) -> Result<Json<Vec<SnapshotEntry>>, ApiError> {
    work(&app, |app| {
        let listing = snapshots::list(app.paths())?;
        for damaged in &listing.damaged {
            tracing::warn!(error = %chain(damaged), "A snapshot is damaged");
        }
        let entries = listing.snapshots.into_iter().map(SnapshotEntry::of);
        Ok(Json(entries.collect()))
    })
    .await
}

/// Verifies a snapshot and tells everything about it.
#[utoipa::path(get, path = "/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "Its name or ID")),
    responses((status = 200, body = SnapshotDetails), (status = "default", body = Problem)))]
pub(crate) async fn inspect(
    State(app): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<SnapshotDetails>, ApiError> {
    work(&app, move |app| {
        let details = snapshots::inspect(app.paths(), &name)?;
        Ok(Json(SnapshotDetails::of(details)))
    })
    .await
}

/// What was removed.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RemovedSnapshots {
    /// Names and IDs.
    removed: Vec<String>,
    /// What could not be removed, and why.
    failed: Vec<String>,
}

/// Takes a name from a snapshot that has others, or else removes it.
#[utoipa::path(delete, path = "/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "Its name or ID")),
    responses((status = 200, body = RemovedSnapshots), (status = "default", body = Problem)))]
pub(crate) async fn remove(
    State(app): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<RemovedSnapshots>, ApiError> {
    work(&app, move |app| {
        let removed = match snapshots::remove(app.paths(), &name)? {
            Removed::Name(name) => name,
            Removed::Snapshot(id) => id.to_string(),
        };
        Ok(Json(RemovedSnapshots {
            removed: vec![removed],
            failed: Vec::new(),
        }))
    })
    .await
}

/// Removes the kept starts of images, and what killed processes have left.
#[utoipa::path(post, path = "/snapshots/prune", tag = "snapshots", responses(
    (status = 200, body = RemovedSnapshots), (status = "default", body = Problem)))]
pub(crate) async fn prune(State(app): State<Shared>) -> Result<Json<RemovedSnapshots>, ApiError> {
    work(&app, |app| {
        let pruned = snapshots::prune(app.paths())?;
        let removed = pruned.removed.iter().map(|info| info.id.to_string());
        let failed = pruned.failed.iter().map(|error| chain(error));
        Ok(Json(RemovedSnapshots {
            removed: removed.collect(),
            failed: failed.collect(),
        }))
    })
    .await
}

/// Where to.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Target {
    /// As of an image: `registry.example/snapshots/web:v1`.
    name: String,
}

/// Sends a snapshot, and what it is a difference to, to a registry. The last line says `digest` or `error`.
#[utoipa::path(post, path = "/snapshots/{snapshot}/push", tag = "snapshots",
    params(("snapshot" = String, Path, description = "Its name or ID"), Target),
    responses((status = 200, body = Step, content_type = "application/x-ndjson"),
              (status = "default", body = Problem)))]
pub(crate) async fn push(
    State(app): State<Shared>,
    Path(snapshot): Path<String>,
    Query(Target { name }): Query<Target>,
) -> Result<Response, ApiError> {
    let name = parse(&name)?;
    Ok(steps(&app, move |app, out| {
        let mut tell = |progress| step(out, progress);
        let pushed = snapshots::push(app.paths(), &snapshot, &name, &mut tell)?;
        Ok(pushed.digest.to_string())
    }))
}

/// Where from.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Source {
    /// As of an image: `registry.example/snapshots/web:v1`.
    name: String,
    /// What it is called in the store.
    snapshot: Option<String>,
}

/// Gets a snapshot, and what it is a difference to, from a registry. The last line says `digest`, which is
/// its ID, or `error`.
#[utoipa::path(post, path = "/snapshots/pull", tag = "snapshots", params(Source),
    responses((status = 200, body = Step, content_type = "application/x-ndjson"),
              (status = "default", body = Problem)))]
pub(crate) async fn pull(
    State(app): State<Shared>,
    Query(Source { name, snapshot }): Query<Source>,
) -> Result<Response, ApiError> {
    let name = parse(&name)?;
    Ok(steps(&app, move |app, out| {
        let mut tell = |progress| step(out, progress);
        let id = snapshots::pull(app.paths(), &name, snapshot.as_deref(), &mut tell)?;
        Ok(id.to_string())
    }))
}
