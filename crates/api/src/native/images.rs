//! Images of the store.

use axum::Json;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use skerry_engine::images::{self, NamedImage};
use skerry_engine::{Name, Progress};
use utoipa::{IntoParams, ToSchema};

use crate::error::{ApiError, Problem, chain};
use crate::streams::{BodySender, body};
use crate::work::{App, Shared, work};

/// Which image.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Named {
    /// Its name, as for `skerry run`, or its digest.
    name: String,
}

/// All images, a row for each name.
#[utoipa::path(get, path = "/images", tag = "images", responses(
    (status = 200, body = Vec<NamedImage>), (status = "default", body = Problem)))]
pub(crate) async fn list(State(app): State<Shared>) -> Result<Json<Vec<NamedImage>>, ApiError> {
    work(&app, |app| Ok(Json(named(app)?))).await
}

pub(crate) fn named(app: &App) -> Result<Vec<NamedImage>, ApiError> {
    let store = images::open(app.paths())?;
    let listing = store.list().map_err(skerry_engine::EngineError::from)?;
    for damaged in &listing.damaged {
        tracing::warn!(error = %chain(damaged), "An image is damaged");
    }
    Ok(listing.images.iter().flat_map(NamedImage::of).collect())
}

/// What was removed.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RemovedImages {
    /// Names and digests.
    removed: Vec<String>,
}

/// Whether it is meant.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Forced {
    /// The last name of an image that a machine needs goes too; the image stays until the machine is removed.
    #[serde(default)]
    force: bool,
}

/// Removes a name of an image; with its last name the image.
#[utoipa::path(delete, path = "/images", tag = "images", params(Named, Forced), responses(
    (status = 200, body = RemovedImages), (status = "default", body = Problem)))]
pub(crate) async fn remove(
    State(app): State<Shared>,
    Query(Named { name }): Query<Named>,
    Query(Forced { force }): Query<Forced>,
) -> Result<Json<RemovedImages>, ApiError> {
    work(&app, move |app| {
        let removed = vec![removed(images::remove(app.paths(), &name, force)?)];
        Ok(Json(RemovedImages { removed }))
    })
    .await
}

pub(crate) fn removed(removed: skerry_engine::Removed) -> String {
    match removed {
        skerry_engine::Removed::Name(name) => name,
        skerry_engine::Removed::Image(digest) => digest.to_string(),
    }
}

/// All that is known of an image.
#[utoipa::path(get, path = "/images/inspect", tag = "images", params(Named), responses(
    (status = 200, body = Object, description = "As `skerry image inspect` prints it"),
    (status = "default", body = Problem)))]
pub(crate) async fn inspect(
    State(app): State<Shared>,
    Query(Named { name }): Query<Named>,
) -> Result<Json<images::ImageDetails>, ApiError> {
    work(&app, move |app| {
        Ok(Json(images::inspect(app.paths(), &name)?))
    })
    .await
}

/// Removes images without a name, and what broken pulls have left.
#[utoipa::path(post, path = "/images/prune", tag = "images", responses(
    (status = 200, body = RemovedImages), (status = "default", body = Problem)))]
pub(crate) async fn prune(State(app): State<Shared>) -> Result<Json<RemovedImages>, ApiError> {
    work(&app, |app| {
        let digests = images::prune(app.paths())?;
        let removed = digests.iter().map(ToString::to_string).collect();
        Ok(Json(RemovedImages { removed }))
    })
    .await
}

/// What is to be tagged.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tag {
    /// The image.
    image: String,
    /// Its further name.
    name: String,
}

/// Gives an image a further name.
#[utoipa::path(post, path = "/images/tag", tag = "images", request_body = Tag, responses(
    (status = 204), (status = "default", body = Problem)))]
pub(crate) async fn tag(
    State(app): State<Shared>,
    Json(Tag { image, name }): Json<Tag>,
) -> Result<axum::http::StatusCode, ApiError> {
    work(&app, move |app| {
        images::tag(app.paths(), &image, &parse(&name)?)?;
        Ok(axum::http::StatusCode::NO_CONTENT)
    })
    .await
}

pub(crate) fn parse(name: &str) -> Result<Name, ApiError> {
    name.parse()
        .map_err(|error| skerry_engine::EngineError::RegistryName(error).into())
}

/// Gets an image from its registry. The last line says `digest` or `error`.
#[utoipa::path(post, path = "/images/pull", tag = "images", params(Named), responses(
    (status = 200, body = Step, content_type = "application/x-ndjson"),
    (status = "default", body = Problem)))]
pub(crate) async fn pull(
    State(app): State<Shared>,
    Query(Named { name }): Query<Named>,
) -> Result<Response, ApiError> {
    let name = parse(&name)?;
    Ok(steps(&app, move |app, out| {
        let pulled = images::pull(app.paths(), &name, &mut |progress| step(out, progress))?;
        Ok(pulled.digest.to_string())
    }))
}

/// Sends an image to the registry of its name. The last line says `digest` or `error`.
#[utoipa::path(post, path = "/images/push", tag = "images", params(Named), responses(
    (status = 200, body = Step, content_type = "application/x-ndjson"),
    (status = "default", body = Problem)))]
pub(crate) async fn push(
    State(app): State<Shared>,
    Query(Named { name }): Query<Named>,
) -> Result<Response, ApiError> {
    let name = parse(&name)?;
    Ok(steps(&app, move |app, out| {
        let pushed = images::push(app.paths(), &name, &mut |progress| step(out, progress))?;
        Ok(pushed.digest.to_string())
    }))
}

/// A line of a transfer.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct Step {
    /// A part that travels.
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<String>,
    /// Bytes of it that have.
    #[serde(skip_serializing_if = "Option::is_none")]
    done: Option<u64>,
    /// Of how many, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<u64>,
    /// At the end: the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    /// At the end: why it didn't come to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

pub(crate) fn step(out: &BodySender, progress: Progress) {
    if let Progress::Transfer {
        digest,
        done,
        size: total,
    } = progress
    {
        // A transfer goes on for the next who asks when this one's client has gone.
        let _ = out.send_line(&Step {
            layer: Some(digest.to_string()),
            done: Some(done),
            total,
            ..Step::default()
        });
    }
}

/// An answer of lines, written by what `act` does.
pub(crate) fn steps(
    app: &Shared,
    act: impl FnOnce(&App, &BodySender) -> Result<String, skerry_engine::EngineError> + Send + 'static,
) -> Response {
    let (out, body) = body();
    let app = app.clone();
    tokio::task::spawn_blocking(move || {
        let last = match act(&app, &out) {
            Ok(digest) => Step {
                digest: Some(digest),
                ..Step::default()
            },
            Err(error) => Step {
                error: Some(chain(&error)),
                ..Step::default()
            },
        };
        let _ = out.send_line(&last);
    });
    lines(body)
}

/// An answer of JSON objects, one a line.
pub(crate) fn lines(body: Body) -> Response {
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}
