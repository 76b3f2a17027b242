//! What happens to machines and images, as it happens.

use std::time::Duration;

use axum::extract::{Query, State};
use axum::response::Response;
use serde::Deserialize;
use skerry_engine::events::{Happened, Reader};
use skerry_engine::vms::now;
use utoipa::IntoParams;

use super::images::lines;
use crate::error::{ApiError, Problem};
use crate::streams::body;
use crate::work::{Shared, work};

/// How often it is looked whether the client has gone.
const LOOK: Duration = Duration::from_millis(500);

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
    let since = since.unwrap_or_else(now);
    let mut reader = work(&app, |app| Ok(Reader::open(app.paths())?)).await?;
    let (out, body) = body();
    tokio::task::spawn_blocking(move || {
        while !out.is_closed() {
            let left = until.map(|until| Duration::from_nanos(until.saturating_sub(now())));
            let limit = left.map_or(LOOK, |left| left.min(LOOK));
            let sent = match reader.next(Some(limit)) {
                Ok(Some(event)) if until.is_some_and(|until| event.time > until) => return,
                Ok(Some(event)) if event.time >= since => out.send_line(&event),
                Ok(Some(_)) => Ok(()),
                Ok(None) if left == Some(Duration::ZERO) => return,
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            // A client that has gone wants no more.
            if sent.is_err() {
                return;
            }
        }
    });
    Ok(lines(body))
}
