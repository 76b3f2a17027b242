//! What happens to machines and images, as it happens.

use axum::extract::{Query, State};
use axum::response::Response;
use serde::Deserialize;
use skerry_engine::events::Happened;
use utoipa::IntoParams;

use super::images::lines;
use crate::error::{ApiError, Problem};
use crate::follow::follow;
use crate::work::Shared;

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Span {
    /// From this moment on, in nanoseconds since 1970; from now on without it.
    since: Option<u64>,
    /// Up to this moment; for ever without it.
    until: Option<u64>,
}

/// What has happened and happens, an event a line.
#[utoipa::path(get, path = "/events", tag = "system", params(Span), responses(
    (status = 200, body = Happened, content_type = "application/x-ndjson"),
    (status = "default", body = Problem)))]
pub(crate) async fn events(
    State(app): State<Shared>,
    Query(Span { since, until }): Query<Span>,
) -> Result<Response, ApiError> {
    Ok(lines(follow(&app, since, until, Some).await?))
}
