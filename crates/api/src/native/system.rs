//! The server and its host.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use skerry_engine::hypervisor::{Backend, Diagnosis, diagnose};
use utoipa::ToSchema;

use crate::error::{ApiError, Problem};
use crate::work::{Shared, work};

/// What answers.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Version {
    /// Skerry's version.
    version: &'static str,
    /// The backends of this build.
    hypervisors: Vec<Backend>,
}

/// The version of the server.
#[utoipa::path(get, path = "/version", tag = "system", responses(
    (status = 200, body = Version), (status = "default", body = Problem)))]
pub(crate) async fn version() -> Json<Version> {
    Json(Version {
        version: env!("CARGO_PKG_VERSION"),
        hypervisors: Backend::ALL.to_vec(),
    })
}

/// What this host can run machines on; each backend runs a small guest for it.
#[utoipa::path(get, path = "/doctor", tag = "system", responses(
    (status = 200, body = Object, description = "As `skerry doctor --format json` prints it"),
    (status = "default", body = Problem)))]
pub(crate) async fn doctor(State(app): State<Shared>) -> Result<Json<Diagnosis>, ApiError> {
    work(&app, |_| Ok(Json(diagnose()))).await
}
