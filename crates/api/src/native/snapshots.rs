//! Snapshots of the store.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use skerry_engine::snapshots::{self, Removed, SnapshotDetails, SnapshotEntry};
use utoipa::ToSchema;

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
