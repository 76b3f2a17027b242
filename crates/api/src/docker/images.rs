//! Images, as docker's clients know them.

use std::io;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use skerry_engine::images::{self, ImageDetails, familiar};
use skerry_engine::{EngineError, Progress};

use super::query::{filters, flag};
use crate::error::{ApiError, chain};
use crate::native;
use crate::streams::{BodySender, body};
use crate::work::{App, Shared, work};

#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    filters: Option<String>,
}

/// All images.
pub(super) async fn all(State(app): State<Shared>) -> Result<Json<Vec<Value>>, ApiError> {
    list(State(app), Query(ListQuery { filters: None })).await
}

pub(super) async fn list(
    State(app): State<Shared>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Vec<Value>>, ApiError> {
    work(&app, move |app| {
        let wanted = filters(query.filters.as_deref())?;
        if let Some(other) = wanted.keys().find(|word| *word != "reference") {
            return Err(ApiError::invalid(format!(
                "Images can't be filtered by {other:?}: use reference"
            )));
        }
        let references = wanted.get("reference");
        let store = images::open(app.paths())?;
        let listing = store.list().map_err(EngineError::from)?;
        let mut rows = Vec::new();
        for image in &listing.images {
            let names: Vec<String> = image.names.iter().map(|name| familiar(name)).collect();
            let fits = |name: &String| {
                let bare = name
                    .rsplit_once(':')
                    .map_or(name.as_str(), |(bare, _)| bare);
                references.is_none_or(|all| all.iter().any(|one| one == name || one == bare))
            };
            let names: Vec<String> = names.into_iter().filter(fits).collect();
            if names.is_empty() && references.is_some() {
                continue;
            }
            let created = image.imported.duration_since(std::time::UNIX_EPOCH);
            // Without a tag the client shows none of it.
            let tagged = |name: String| match name.contains(':') {
                true => name,
                false => name + ":latest",
            };
            let names: Vec<String> = names.into_iter().map(tagged).collect();
            let digests: &[&str] = match names.is_empty() {
                true => &["<none>@<none>"],
                false => &[],
            };
            rows.push(json!({
                "Id": image.digest.to_string(),
                "ParentId": "",
                "RepoTags": names,
                "RepoDigests": digests,
                "Created": created.map_or(0, |since| since.as_secs()),
                "Size": image.size,
                "SharedSize": -1,
                "VirtualSize": image.size,
                "Labels": image.config.labels,
                "Containers": -1,
            }));
        }
        Ok(Json(rows))
    })
    .await
}

/// `NAME/json` and `NAME/history`; names have slashes themselves.
pub(super) async fn get(
    State(app): State<Shared>,
    Path(rest): Path<String>,
) -> Result<Json<Value>, ApiError> {
    work(&app, move |app| match rest.rsplit_once('/') {
        Some((name, "json")) => Ok(Json(details(app, name)?)),
        Some((name, "history")) => {
            let store = images::open(app.paths())?;
            let document = store.configuration(name).map_err(EngineError::from)?;
            let steps = document.and_then(|document| document.get("history").cloned());
            let steps = steps.as_ref().and_then(Value::as_array);
            let row = |step: &Value| {
                json!({
                    "Id": "<missing>",
                    "Created": 0,
                    "CreatedBy": step.get("created_by").cloned().unwrap_or_default(),
                    "Tags": null,
                    "Size": 0,
                    "Comment": step.get("comment").cloned().unwrap_or_default(),
                })
            };
            Ok(Json(steps.into_iter().flatten().rev().map(row).collect()))
        }
        _ => Err(ApiError::missing(format!(
            "Skerry's server has nothing at GET /images/{rest}"
        ))),
    })
    .await
}

fn details(app: &App, name: &str) -> Result<Value, ApiError> {
    let ImageDetails {
        digest,
        names,
        layers,
        created,
        config,
        rootfs,
        imported,
        ..
    } = images::inspect(app.paths(), name)?;
    let ports: serde_json::Map<String, Value> = config
        .exposed_ports
        .iter()
        .map(|port| (port.clone(), json!({})))
        .collect();
    let layers = layers.as_ref().and_then(Value::as_array);
    let layers = layers.into_iter().flatten();
    let layers: Vec<&Value> = layers.filter_map(|layer| layer.get("digest")).collect();
    Ok(json!({
        "Id": digest,
        "RepoTags": names,
        "RepoDigests": [],
        "Created": created.unwrap_or_else(|| imported.into()),
        "Architecture": "amd64",
        "Os": "linux",
        "Size": rootfs.size,
        "VirtualSize": rootfs.size,
        "Config": {
            "User": config.user,
            "Env": config.env,
            "Cmd": config.cmd,
            "Entrypoint": config.entrypoint,
            "WorkingDir": config.working_dir,
            "Labels": config.labels,
            "ExposedPorts": ports,
            "StopSignal": config.stop_signal,
        },
        "RootFS": { "Type": "layers", "Layers": layers },
    }))
}

/// `docker pull`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PullQuery {
    from_image: Option<String>,
    tag: Option<String>,
    platform: Option<String>,
}

pub(super) async fn pull(
    State(app): State<Shared>,
    Query(query): Query<PullQuery>,
) -> Result<Response, ApiError> {
    let Some(image) = query.from_image.filter(|image| !image.is_empty()) else {
        return Err(ApiError::invalid(
            "Images are made elsewhere: only pulling one (fromImage) is possible",
        ));
    };
    if let Some(platform) = query.platform.filter(|p| !p.is_empty())
        && !["linux/amd64", "linux"].contains(&platform.to_lowercase().as_str())
    {
        return Err(ApiError::invalid(format!(
            "Machines are linux/amd64: {platform} can't be pulled"
        )));
    }
    let name = match query.tag.filter(|tag| !tag.is_empty()) {
        Some(digest) if digest.contains(':') => format!("{image}@{digest}"),
        Some(tag) => format!("{image}:{tag}"),
        None => image,
    };
    let name = native::image_name(&name)?;
    let (out, body) = body();
    tokio::task::spawn_blocking(move || {
        let shown = name.familiar();
        let _ = say(&out, &format!("Pulling from {shown}"));
        let pulled = images::pull(app.paths(), &name, &mut |progress| {
            let _ = tell(&out, progress, "Downloading", "Download complete");
        });
        let _ = match pulled {
            Ok(pulled) => say(&out, &format!("Digest: {}", pulled.digest)).and_then(|()| {
                let what = match pulled.was_there {
                    true => "Image is up to date for",
                    false => "Downloaded newer image for",
                };
                say(&out, &format!("Status: {what} {shown}"))
            }),
            Err(error) => {
                let text = chain(&error);
                out.send_line(&json!({ "errorDetail": { "message": text }, "error": text }))
            }
        };
    });
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

fn say(out: &BodySender, status: &str) -> io::Result<()> {
    out.send_line(&json!({ "status": status }))
}

fn tell(out: &BodySender, progress: Progress, goes: &str, done_word: &str) -> io::Result<()> {
    let Progress::Transfer {
        digest,
        done,
        size: total,
    } = progress
    else {
        return Ok(());
    };
    let id: String = digest.hex().chars().take(12).collect();
    let status = match total {
        Some(total) if total == done => done_word,
        _ => goes,
    };
    out.send_line(&json!({
        "id": id,
        "status": status,
        "progressDetail": { "current": done, "total": total },
    }))
}

/// `docker tag`.
#[derive(Debug, Deserialize)]
pub(super) struct TagQuery {
    repo: Option<String>,
    tag: Option<String>,
}

/// `NAME/tag` and `NAME/push`; names have slashes themselves.
pub(super) async fn post(
    State(app): State<Shared>,
    Path(rest): Path<String>,
    Query(query): Query<TagQuery>,
) -> Result<Response, ApiError> {
    match rest.rsplit_once('/') {
        Some((image, "tag")) => {
            let made = tag(app, image.to_owned(), query).await?;
            Ok(made.into_response())
        }
        Some((image, "push")) => push(app, image, query.tag),
        _ => Err(ApiError::missing(format!(
            "Skerry's server has nothing at {} /images/{rest}",
            Method::POST
        ))),
    }
}

async fn tag(app: Shared, image: String, query: TagQuery) -> Result<StatusCode, ApiError> {
    let Some(repo) = query.repo else {
        return Err(ApiError::invalid("An image gets a name: give one (repo)"));
    };
    let name = match query.tag.filter(|tag| !tag.is_empty()) {
        Some(tag) => format!("{repo}:{tag}"),
        None => repo,
    };
    let name = native::image_name(&name)?;
    work(&app, move |app| {
        images::tag(app.paths(), &image, &name)?;
        Ok(StatusCode::CREATED)
    })
    .await
}

/// Sends an image to the registry of its name. Who may is what docker's configuration on this host says.
fn push(app: Shared, image: &str, tag: Option<String>) -> Result<Response, ApiError> {
    let name = match tag.filter(|tag| !tag.is_empty()) {
        Some(tag) => format!("{image}:{tag}"),
        None => image.to_owned(),
    };
    let name = native::image_name(&name)?;
    let (out, body) = body();
    tokio::task::spawn_blocking(move || {
        let shown = name.familiar();
        let _ = say(&out, &format!("The push refers to repository [{shown}]"));
        let pushed = images::push(app.paths(), &name, &mut |progress| {
            let _ = tell(&out, progress, "Pushing", "Pushed");
        });
        let _ = match pushed {
            Ok(pushed) => say(&out, &format!("{shown}: digest: {}", pushed.digest)),
            Err(error) => {
                let text = chain(&error);
                out.send_line(&json!({ "errorDetail": { "message": text }, "error": text }))
            }
        };
    });
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// `docker image prune`: those without a name, whatever the filters say of dangling ones.
pub(super) async fn prune(
    State(app): State<Shared>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Value>, ApiError> {
    work(&app, move |app| {
        let wanted = filters(query.filters.as_deref())?;
        let all = wanted.get("dangling").is_some_and(|values| {
            let all = |value: &String| matches!(value.as_str(), "0" | "false");
            values.iter().any(all)
        });
        if let Some(other) = wanted.keys().find(|word| all || *word != "dangling") {
            return Err(ApiError::invalid(format!(
                "Images with names stay, and are not pruned by {other:?}: remove them by name"
            )));
        }
        let removed = images::prune(app.paths())?;
        let removed = removed
            .iter()
            .map(|digest| json!({ "Deleted": digest.to_string() }));
        let removed: Vec<Value> = removed.collect();
        Ok(Json(
            json!({ "ImagesDeleted": removed, "SpaceReclaimed": 0 }),
        ))
    })
    .await
}

/// `docker rmi`.
#[derive(Debug, Deserialize)]
pub(super) struct RemoveQuery {
    #[serde(default, deserialize_with = "flag")]
    force: bool,
}

pub(super) async fn remove(
    State(app): State<Shared>,
    Path(name): Path<String>,
    Query(RemoveQuery { force }): Query<RemoveQuery>,
) -> Result<Json<Value>, ApiError> {
    work(&app, move |app| {
        match images::remove(app.paths(), &name, force) {
            Ok(removed @ skerry_engine::Removed::Name(_)) => Ok(Json(
                json!([{ "Untagged": native::removed_image(removed) }]),
            )),
            Ok(removed) => Ok(Json(json!([{ "Deleted": native::removed_image(removed) }]))),
            // As docker has it: what isn't there is removed by force.
            Err(error) if force && error.is_missing() => Ok(Json(json!([]))),
            Err(error) => Err(error.into()),
        }
    })
    .await
}
