//! As much of the Docker Engine API as its command needs to list, run, look into and end machines.
//!
//! ```text
//!  docker CLI ─► /_ping /version /info                       system
//!             ─► /containers/…  json, stop, logs, wait, …    containers
//!             ─► /exec/…        in a running machine         exec
//!             ─► /images/…      json, create (pull), …       images
//!             ─► …/archive      cp                           files
//!             ─► /events, …/stats, …/top                     watch
//!             ─► /networks/…, /volumes/…, /system/df         networks, volumes
//! ```
//! A container is a virtual machine. What a client asks for and can't be had is an error that names it,
//! never left out silently.

mod attach;
mod containers;
mod create;
mod exec;
mod files;
mod images;
mod networks;
mod query;
mod reaper;
mod system;
mod volumes;
mod watch;

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{delete, get, post};

pub(crate) use exec::Execs;
pub(crate) use reaper::{Reaper, take_over};

use crate::error::ApiError;
use crate::work::Shared;

/// The version of the API whose shapes these are; older clients find theirs in it.
const API_VERSION: &str = "1.41";
const OLDEST: &str = "1.24";

pub(crate) fn router() -> Router<Shared> {
    Router::new()
        .route("/_ping", get(system::ping).head(system::ping))
        .route("/version", get(system::version))
        .route("/info", get(system::info))
        .route("/containers/json", get(containers::list))
        .route("/containers/{id}", delete(containers::remove))
        .route("/containers/{id}/json", get(containers::inspect))
        .route("/containers/create", post(create::create))
        .route("/containers/{id}/start", post(create::start))
        .route("/containers/{id}/restart", post(create::start_anew))
        .route("/containers/{id}/resize", post(create::resize))
        .route("/containers/{id}/attach", post(attach::attach))
        .route("/containers/{id}/stop", post(containers::stop))
        .route("/containers/{id}/kill", post(containers::kill))
        .route("/containers/{id}/pause", post(containers::pause))
        .route("/containers/{id}/unpause", post(containers::unpause))
        .route("/containers/{id}/rename", post(containers::rename))
        .route("/containers/{id}/wait", post(containers::wait))
        .route("/containers/{id}/logs", get(containers::logs))
        .route("/containers/{id}/top", get(watch::top))
        .route("/containers/{id}/stats", get(watch::stats))
        .route(
            "/containers/{id}/archive",
            get(files::read).head(files::stat).put(files::write),
        )
        .route("/containers/prune", post(containers::prune))
        .route("/containers/{id}/exec", post(exec::create))
        .route("/exec/{id}/start", post(exec::start))
        .route("/exec/{id}/json", get(exec::inspect))
        .route("/exec/{id}/resize", post(exec::resize))
        .route("/images/json", get(images::list))
        .route("/images/create", post(images::pull))
        .route("/images/prune", post(images::prune))
        .route(
            "/images/{*rest}",
            get(images::get).post(images::post).delete(images::remove),
        )
        .route("/events", get(watch::events))
        .route("/system/df", get(volumes::disk_usage))
        .merge(shared())
        .fallback(unknown)
}

/// What machines share.
fn shared() -> Router<Shared> {
    Router::new()
        .route("/networks", get(networks::list))
        .route("/networks/create", post(networks::create))
        .route("/networks/prune", post(networks::prune))
        .route(
            "/networks/{name}",
            get(networks::inspect).delete(networks::remove),
        )
        .route("/networks/{name}/connect", post(networks::connect))
        .route("/networks/{name}/disconnect", post(networks::connect))
        .route("/volumes", get(volumes::list))
        .route("/volumes/create", post(volumes::create))
        .route("/volumes/prune", post(volumes::prune))
        .route(
            "/volumes/{name}",
            get(volumes::inspect).delete(volumes::remove),
        )
}

async fn unknown(request: Request) -> impl IntoResponse {
    let (method, path) = (request.method(), request.uri().path());
    let message = format!("Skerry's server has nothing at {method} {path}");
    ApiError::new(StatusCode::NOT_FOUND, message)
}
