//! `docker attach`, and `docker run` without `-d`: a connection to a machine's command.

use std::io;
use std::sync::Arc;

use axum::extract::{Path, Query, Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use parking_lot::Mutex;
use serde::Deserialize;
use skerry_engine::run::RunIo;
use skerry_engine::vms::{self, Since, Status};

use super::query::flag;
use super::reaper;
use crate::error::{ApiError, chain};
use crate::streams::{self, Kind, Wire};
use crate::work::{Shared, work};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct AttachQuery {
    #[serde(default, deserialize_with = "flag")]
    stdin: bool,
    #[serde(default, deserialize_with = "flag")]
    stdout: bool,
    #[serde(default, deserialize_with = "flag")]
    stderr: bool,
    #[serde(default, deserialize_with = "flag")]
    logs: bool,
}

pub(super) async fn attach(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(query): Query<AttachQuery>,
    request: Request,
) -> Result<Response, ApiError> {
    let info = work(&app, move |app| Ok(app.registry()?.find(&id)?)).await?;
    let tty = info.config.tty;
    // What is made to be attached to is heard from its first byte on.
    let since = match query.logs || info.state.status == Status::Created {
        true => Since::Start,
        false => Since::Now,
    };
    // Before the answer: the client has the machine started then, and it may be over soon.
    let held = reaper::hold(&app, &info.config.id);
    let attachment = work(&app, {
        let info = info.clone();
        move |app| Ok(vms::Attachment::new(&app.registry()?, &info, since)?)
    })
    .await?;
    let work = move |stdin: Option<Box<dyn io::Read + Send>>, out: Box<dyn io::Write + Send>| {
        let out = Arc::new(Mutex::new(out));
        let wire = |kind, wanted: bool| -> Box<dyn io::Write + Send> {
            let out = out.clone();
            match wanted {
                true => Box::new(Wire {
                    out,
                    kind: (!tty).then_some(kind),
                }),
                false => Box::new(io::sink()),
            }
        };
        let io = RunIo {
            stdin,
            stdout: wire(Kind::Stdout, query.stdout),
            stderr: wire(Kind::Stderr, query.stderr),
            events: None,
        };
        if let Err(error) = attachment.run(io) {
            tracing::debug!(error = %chain(&error), "An attachment broke");
        }
        drop(held);
    };
    if !streams::asks_upgrade(request.headers()) {
        let (out, body) = streams::body();
        tokio::task::spawn_blocking(move || work(None, Box::new(out)));
        let kind = [(header::CONTENT_TYPE, streams::content_type(tty))];
        return Ok((kind, body).into_response());
    }
    let upgrade = streams::take(request);
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || match streams::ends(&runtime, upgrade) {
        Ok((input, output)) => {
            let stdin = query.stdin.then(|| Box::new(input) as _);
            work(stdin, Box::new(output));
        }
        Err(error) => tracing::debug!(%error, "A client has gone before it was attached"),
    });
    Ok(streams::switching(tty))
}
