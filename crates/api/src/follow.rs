//! Events as they happen, for clients of either interface.

use std::time::Duration;

use axum::body::Body;
use serde::Serialize;
use skerry_engine::events::{Happened, Reader};
use skerry_engine::vms::now;

use crate::error::ApiError;
use crate::streams::body;
use crate::work::{Shared, work};

/// How often it is looked whether the client has gone.
const LOOK: Duration = Duration::from_millis(500);

/// Sends what `tell` makes of each event from `since` on, a line each, up to `until`, for ever without it. Both are
/// in nanoseconds since 1970.
pub(crate) async fn follow<T: Serialize>(
    app: &Shared,
    since: Option<u64>,
    until: Option<u64>,
    tell: impl Fn(Happened) -> Option<T> + Send + 'static,
) -> Result<Body, ApiError> {
    let since = since.unwrap_or_else(now);
    let mut reader = work(app, |app| Ok(Reader::open(app.paths())?)).await?;
    let (out, body) = body();
    tokio::task::spawn_blocking(move || {
        while !out.is_closed() {
            let left = until.map(|until| Duration::from_nanos(until.saturating_sub(now())));
            let limit = left.map_or(LOOK, |left| left.min(LOOK));
            let told = match reader.next(Some(limit)) {
                Ok(Some(event)) if until.is_some_and(|until| event.time > until) => return,
                Ok(Some(event)) if event.time >= since => tell(event),
                Ok(None) if left == Some(Duration::ZERO) => return,
                Ok(_) => None,
                Err(_) => return,
            };
            // A client that has gone wants no more.
            if told.is_some_and(|told| out.send_line(&told).is_err()) {
                return;
            }
        }
    });
    Ok(body)
}
