//! Pools of clean machines.

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use skerry_engine::command::CommandSpec;
use skerry_engine::pools::{self, PoolConfig, PoolLaunch, PoolOptions, PoolStats};
use skerry_engine::vm::VmSpec;
use skerry_engine::vms::Begin;
use utoipa::{IntoParams, ToSchema};

use super::images::lines;
use super::vms::{NewExec, prepared, tell_end};
use crate::error::{ApiError, Problem};
use crate::work::{Shared, work};

/// All pools, by name.
#[utoipa::path(get, path = "/pools", tag = "pools", responses(
    (status = 200, body = Vec<PoolConfig>), (status = "default", body = Problem)))]
pub(crate) async fn list(State(app): State<Shared>) -> Result<Json<Vec<PoolConfig>>, ApiError> {
    work(&app, |app| Ok(Json(pools::list(app.paths())?))).await
}

/// A pool to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewPool {
    /// Its name.
    name: String,
    /// The image of its machines; or else `snapshot`.
    image: Option<String>,
    /// The snapshot that they go on from.
    snapshot: Option<String>,
    /// The machines.
    #[serde(default)]
    vm: VmSpec,
    /// A command that each machine has run when it is given out.
    prewarm: Option<CommandSpec>,
    /// How it is kept.
    #[serde(default)]
    options: PoolOptions,
}

/// A pool that was made.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct MadePool {
    /// Its name.
    name: String,
    /// What its user should know.
    notes: Vec<String>,
}

/// Makes a pool, whose machines are ready when this returns.
#[utoipa::path(post, path = "/pools", tag = "pools", request_body = NewPool, responses(
    (status = 201, body = MadePool), (status = "default", body = Problem)))]
pub(crate) async fn create(
    State(app): State<Shared>,
    Json(new): Json<NewPool>,
) -> Result<(StatusCode, Json<MadePool>), ApiError> {
    work(&app, move |app| {
        let begin = match (new.image, new.snapshot) {
            (Some(image), None) => Begin::Image(image),
            (None, Some(snapshot)) => Begin::Snapshot(snapshot),
            _ => {
                return Err(ApiError::invalid(
                    "A pool is made from one image or one snapshot: name either",
                ));
            }
        };
        let launch = PoolLaunch {
            root: app.paths().root().to_owned(),
            name: new.name,
            begin,
            vm: new.vm,
            prewarm: new.prewarm,
            options: new.options,
        };
        let mut notes = Vec::new();
        let mut note = |text: &str| notes.push(text.to_owned());
        pools::create(&app.options.program, &launch, &mut note)?;
        let name = launch.name;
        Ok((StatusCode::CREATED, Json(MadePool { name, notes })))
    })
    .await
}

/// A pool's numbers.
#[utoipa::path(get, path = "/pools/{pool}", tag = "pools",
    params(("pool" = String, Path, description = "Its name")),
    responses((status = 200, body = PoolStats), (status = "default", body = Problem)))]
pub(crate) async fn stats(
    State(app): State<Shared>,
    Path(pool): Path<String>,
) -> Result<Json<PoolStats>, ApiError> {
    work(&app, move |app| Ok(Json(pools::stats(app.paths(), &pool)?))).await
}

/// Ends a pool and its machines.
#[utoipa::path(delete, path = "/pools/{pool}", tag = "pools",
    params(("pool" = String, Path, description = "Its name")),
    responses((status = 204), (status = "default", body = Problem)))]
pub(crate) async fn remove(
    State(app): State<Shared>,
    Path(pool): Path<String>,
) -> Result<StatusCode, ApiError> {
    work(&app, move |app| {
        pools::close(app.paths(), &pool)?;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// Which machine.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct InLease {
    /// The number of one that was given out; without it, any clean one.
    lease: Option<u64>,
}

/// Runs a command in a clean machine, or in one that was given out, and tells its output as it comes.
#[utoipa::path(post, path = "/pools/{pool}/exec", tag = "pools", request_body = NewExec,
    params(("pool" = String, Path, description = "Its name"), InLease),
    responses((status = 200, body = super::vms::ExecLine, content_type = "application/x-ndjson"),
              (status = "default", body = Problem)))]
pub(crate) async fn exec(
    State(app): State<Shared>,
    Path(pool): Path<String>,
    Query(InLease { lease }): Query<InLease>,
    Json(new): Json<NewExec>,
) -> Result<Response, ApiError> {
    let (spec, io, out, body) = prepared(new)?;
    work(&app, {
        let pool = pool.clone();
        move |app| Ok(pools::stats(app.paths(), &pool).map(drop)?)
    })
    .await?;
    tokio::task::spawn_blocking(move || {
        tell_end(&out, pools::exec(app.paths(), &pool, lease, &spec, io));
    });
    Ok(lines(body))
}

/// A machine that was given out.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Leased {
    /// Its number.
    lease: u64,
}

/// Has a pool give a machine out.
#[utoipa::path(post, path = "/pools/{pool}/leases", tag = "pools",
    params(("pool" = String, Path, description = "Its name")),
    responses((status = 201, body = Leased), (status = "default", body = Problem)))]
pub(crate) async fn acquire(
    State(app): State<Shared>,
    Path(pool): Path<String>,
) -> Result<(StatusCode, Json<Leased>), ApiError> {
    work(&app, move |app| {
        let lease = pools::acquire(app.paths(), &pool)?;
        Ok((StatusCode::CREATED, Json(Leased { lease })))
    })
    .await
}

/// Gives a machine back.
#[utoipa::path(delete, path = "/pools/{pool}/leases/{lease}", tag = "pools",
    params(("pool" = String, Path, description = "The pool's name"),
           ("lease" = u64, Path, description = "The machine's number")),
    responses((status = 204), (status = "default", body = Problem)))]
pub(crate) async fn release(
    State(app): State<Shared>,
    Path((pool, lease)): Path<(String, u64)>,
) -> Result<StatusCode, ApiError> {
    work(&app, move |app| {
        pools::release(app.paths(), &pool, lease)?;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}
