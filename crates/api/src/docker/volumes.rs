//! `docker volume`, and `docker system df`.

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use skerry_engine::volumes::{Volume, Volumes};

use super::create::Fields;
use super::query::{FilterQuery, Filters, bytes, date, filters, flag};
use crate::error::ApiError;
use crate::work::{Shared, work};

/// What is true in the filters for this word.
fn is_set(filters: &Filters, word: &str) -> bool {
    let truth = |value: &String| matches!(value.as_str(), "1" | "true" | "True");
    filters
        .get(word)
        .is_some_and(|values| values.iter().any(truth))
}

fn fits(volume: &Volume, filters: &Filters) -> Result<bool, ApiError> {
    for (word, values) in filters {
        let fits = match word.as_str() {
            "name" => values
                .iter()
                .any(|value| volume.name.contains(value.as_str())),
            "driver" => values.iter().any(|value| value == "local"),
            "dangling" => is_set(filters, word) != volume.in_use,
            other => {
                return Err(ApiError::invalid(format!(
                    "Volumes can't be filtered by {other:?}: use name, driver or dangling"
                )));
            }
        };
        if !fits {
            return Ok(false);
        }
    }
    Ok(true)
}

fn described(volume: &Volume) -> Value {
    json!({
        "Name": volume.name,
        "Driver": "local",
        "Mountpoint": volume.path,
        "CreatedAt": date(Some(volume.created)),
        "Labels": {},
        "Options": { "size": volume.size.to_string() },
        "Scope": "local",
        "UsageData": { "Size": volume.used, "RefCount": i32::from(volume.in_use) },
    })
}

pub(super) async fn list(
    State(app): State<Shared>,
    Query(FilterQuery { filters: text }): Query<FilterQuery>,
) -> Result<Json<Value>, ApiError> {
    work(&app, move |app| {
        let filters = filters(text.as_deref())?;
        let mut rows = Vec::new();
        for volume in Volumes::open(app.paths())?.list()? {
            if fits(&volume, &filters)? {
                rows.push(described(&volume));
            }
        }
        Ok(Json(json!({ "Volumes": rows, "Warnings": null })))
    })
    .await
}

pub(super) async fn create(
    State(app): State<Shared>,
    Json(body): Json<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let (name, wanted) = wanted(body)?;
    work(&app, move |app| {
        let volumes = Volumes::open(app.paths())?;
        let named = (!name.is_empty()).then_some(name.as_str());
        // As docker has it: one that is there is as good as made.
        let made = match named.map(|name| volumes.inspect(name)) {
            Some(Ok(there)) => return Ok((StatusCode::CREATED, Json(described(&there)))),
            _ => volumes.create(named, wanted)?,
        };
        Ok((
            StatusCode::CREATED,
            Json(described(&volumes.inspect(&made)?)),
        ))
    })
    .await
}

/// A name, and the most bytes.
fn wanted(body: Value) -> Result<(String, Option<u64>), ApiError> {
    let mut fields = Fields::of("", body)?;
    let name: String = fields.take("Name")?;
    let driver: String = fields.take("Driver")?;
    if !["", "local"].contains(&driver.as_str()) {
        return Err(ApiError::invalid(format!(
            "Volumes are kept on this host's disk: leave the driver {driver} out"
        )));
    }
    let mut options = Fields::of("DriverOpts.", fields.take("DriverOpts")?)?;
    let text: String = options.take("size")?;
    let size = match text.is_empty() {
        true => None,
        false => Some(bytes(&text)?),
    };
    options.end()?;
    fields.end()?;
    Ok((name, size))
}

pub(super) async fn inspect(
    State(app): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    work(&app, move |app| {
        Ok(Json(described(
            &Volumes::open(app.paths())?.inspect(&name)?,
        )))
    })
    .await
}

#[derive(Debug, Deserialize)]
pub(super) struct RemoveQuery {
    #[serde(default, deserialize_with = "flag")]
    force: bool,
}

pub(super) async fn remove(
    State(app): State<Shared>,
    Path(name): Path<String>,
    Query(RemoveQuery { force }): Query<RemoveQuery>,
) -> Result<StatusCode, ApiError> {
    work(&app, move |app| {
        match Volumes::open(app.paths())?.remove(&name) {
            Ok(_) => Ok(StatusCode::NO_CONTENT),
            // As docker has it: what isn't there is removed by force.
            Err(error) if force && error.is_missing() => Ok(StatusCode::NO_CONTENT),
            Err(error) => Err(error.into()),
        }
    })
    .await
}

pub(super) async fn prune(
    State(app): State<Shared>,
    Query(FilterQuery { filters: text }): Query<FilterQuery>,
) -> Result<Json<Value>, ApiError> {
    work(&app, move |app| {
        let filters = filters(text.as_deref())?;
        if let Some(other) = filters.keys().find(|word| *word != "all") {
            return Err(ApiError::invalid(format!(
                "Volumes can't be pruned by {other:?}: use all"
            )));
        }
        // Before version 1.42 of the API those with names go too, and the client says so.
        let all = !filters.contains_key("all") || is_set(&filters, "all");
        let pruned = Volumes::open(app.paths())?.prune(all)?;
        let freed: u64 = pruned.iter().map(|(_, freed)| freed).sum();
        let names: Vec<String> = pruned.into_iter().map(|(name, _)| name).collect();
        Ok(Json(
            json!({ "VolumesDeleted": names, "SpaceReclaimed": freed }),
        ))
    })
    .await
}

/// What takes room on the host's disk.
pub(super) async fn disk_usage(State(app): State<Shared>) -> Result<Json<Value>, ApiError> {
    let (State(first), State(second)) = (State(app.clone()), State(app.clone()));
    let Json(images) = super::images::all(State(first)).await?;
    let Json(containers) = super::containers::all(State(second)).await?;
    work(&app, move |app| {
        let volumes: Vec<Value> = Volumes::open(app.paths())?
            .list()?
            .iter()
            .map(described)
            .collect();
        let layers: u64 = images
            .iter()
            .filter_map(|image| image["Size"].as_u64())
            .sum();
        let mut answer = Map::new();
        answer.insert("LayersSize".to_owned(), layers.into());
        answer.insert("Images".to_owned(), images.into());
        answer.insert("Containers".to_owned(), containers.into());
        answer.insert("Volumes".to_owned(), volumes.into());
        answer.insert("BuildCache".to_owned(), Value::Array(Vec::new()));
        Ok(Json(Value::Object(answer)))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_be_had_is_refused_by_name() {
        let refused = |body| wanted(body).map(drop).map_err(ApiError::into_message);
        assert_eq!(
            refused(json!({ "Name": "a", "Driver": "local", "DriverOpts": { "size": "1g" } })),
            Ok(())
        );
        for (body, why) in [
            (json!({ "Driver": "nfs" }), "nfs"),
            (json!({ "DriverOpts": { "type": "tmpfs" } }), "type"),
            (json!({ "Labels": { "a": "b" } }), "Labels"),
        ] {
            let told = refused(body).expect_err("refused");
            assert!(told.contains(why), "{told}");
        }
    }
}
