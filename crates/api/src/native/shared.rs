//! What machines share: volumes, and networks between them.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use skerry_engine::networks::{self, NetworkConfig, NetworkInfo, NetworkPlan};
use skerry_engine::volumes::{Volume, Volumes};
use utoipa::{IntoParams, ToSchema};

use crate::error::{ApiError, Problem};
use crate::work::{Shared, work};

/// All volumes.
#[utoipa::path(get, path = "/volumes", tag = "volumes", responses(
    (status = 200, body = Vec<Volume>), (status = "default", body = Problem)))]
pub(crate) async fn volumes(State(app): State<Shared>) -> Result<Json<Vec<Volume>>, ApiError> {
    work(&app, |app| Ok(Json(Volumes::open(app.paths())?.list()?))).await
}

/// A volume to be.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NewVolume {
    /// Its name; one is made up without.
    name: Option<String>,
    /// What a guest may write, in bytes.
    size: Option<u64>,
}

/// Makes a volume.
#[utoipa::path(post, path = "/volumes", tag = "volumes", request_body = NewVolume, responses(
    (status = 201, body = Volume), (status = "default", body = Problem)))]
pub(crate) async fn create_volume(
    State(app): State<Shared>,
    Json(NewVolume { name, size }): Json<NewVolume>,
) -> Result<(StatusCode, Json<Volume>), ApiError> {
    work(&app, move |app| {
        let volumes = Volumes::open(app.paths())?;
        let name = volumes.create(name.as_deref(), size)?;
        Ok((StatusCode::CREATED, Json(volumes.inspect(&name)?)))
    })
    .await
}

/// All that is known of a volume.
#[utoipa::path(get, path = "/volumes/{volume}", tag = "volumes",
    params(("volume" = String, Path, description = "Its name")),
    responses((status = 200, body = Volume), (status = "default", body = Problem)))]
pub(crate) async fn inspect_volume(
    State(app): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<Volume>, ApiError> {
    work(&app, move |app| {
        Ok(Json(Volumes::open(app.paths())?.inspect(&name)?))
    })
    .await
}

/// What was freed.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Freed {
    /// Names.
    removed: Vec<String>,
    /// Bytes of the host's disk.
    freed: u64,
}

/// Removes a volume that no machine has.
#[utoipa::path(delete, path = "/volumes/{volume}", tag = "volumes",
    params(("volume" = String, Path, description = "Its name")),
    responses((status = 200, body = Freed), (status = "default", body = Problem)))]
pub(crate) async fn remove_volume(
    State(app): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<Freed>, ApiError> {
    work(&app, move |app| {
        let freed = Volumes::open(app.paths())?.remove(&name)?;
        let removed = vec![name];
        Ok(Json(Freed { removed, freed }))
    })
    .await
}

/// Which volumes.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct PruneQuery {
    /// Those that were named too.
    #[serde(default)]
    all: bool,
}

/// Removes volumes that no machine has and nobody named.
#[utoipa::path(post, path = "/volumes/prune", tag = "volumes", params(PruneQuery), responses(
    (status = 200, body = Freed), (status = "default", body = Problem)))]
pub(crate) async fn prune_volumes(
    State(app): State<Shared>,
    Query(PruneQuery { all }): Query<PruneQuery>,
) -> Result<Json<Freed>, ApiError> {
    work(&app, move |app| {
        let pruned = Volumes::open(app.paths())?.prune(all)?;
        Ok(Json(Freed {
            freed: pruned.iter().map(|(_, freed)| freed).sum(),
            removed: pruned.into_iter().map(|(name, _)| name).collect(),
        }))
    })
    .await
}

/// All networks between machines, and who is on them.
#[utoipa::path(get, path = "/networks", tag = "networks", responses(
    (status = 200, body = Vec<NetworkInfo>), (status = "default", body = Problem)))]
pub(crate) async fn networks(
    State(app): State<Shared>,
) -> Result<Json<Vec<NetworkInfo>>, ApiError> {
    work(&app, |app| Ok(Json(networks::list(app.paths())?))).await
}

/// A network to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewNetwork {
    /// Its name.
    name: String,
    /// Its addresses, such as `10.90.0.0/24`; some that are free without it.
    subnet: Option<String>,
    /// Its IPv6 addresses, such as `fd00:90::/64`.
    subnet6: Option<String>,
    /// The gateway's IPv4 address; the first without it.
    #[schema(value_type = Option<String>)]
    gateway: Option<Ipv4Addr>,
    /// Whether it has IPv6 addresses; without it, where `subnet6` names some.
    ipv6: Option<bool>,
    /// Machines that are on such networks only reach nothing else.
    #[serde(default)]
    internal: bool,
    /// What its owner says of it.
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

/// Makes a network.
#[utoipa::path(post, path = "/networks", tag = "networks", request_body = NewNetwork, responses(
    (status = 201, body = NetworkConfig), (status = "default", body = Problem)))]
pub(crate) async fn create_network(
    State(app): State<Shared>,
    Json(new): Json<NewNetwork>,
) -> Result<(StatusCode, Json<NetworkConfig>), ApiError> {
    let wrong = |text: &String| {
        ApiError::invalid(format!("{text:?} names no addresses: write 10.90.0.0/24"))
    };
    let subnets = [new.subnet, new.subnet6].into_iter().flatten();
    let subnets = subnets.map(|text| text.parse().map_err(|_| wrong(&text)));
    let plan = NetworkPlan {
        subnets: subnets.collect::<Result<_, _>>()?,
        gateway: new.gateway,
        ipv6: new.ipv6,
        internal: new.internal,
        labels: new.labels,
    };
    work(&app, move |app| {
        let made = networks::create(app.paths(), &new.name, plan)?;
        Ok((StatusCode::CREATED, Json(made)))
    })
    .await
}

/// A network, and who is on it.
#[utoipa::path(get, path = "/networks/{network}", tag = "networks",
    params(("network" = String, Path, description = "Its name")),
    responses((status = 200, body = NetworkInfo), (status = "default", body = Problem)))]
pub(crate) async fn inspect_network(
    State(app): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<NetworkInfo>, ApiError> {
    work(&app, move |app| {
        Ok(Json(networks::inspect(app.paths(), &name)?))
    })
    .await
}

/// Removes a network that nobody is on.
#[utoipa::path(delete, path = "/networks/{network}", tag = "networks",
    params(("network" = String, Path, description = "Its name")),
    responses((status = 204), (status = "default", body = Problem)))]
pub(crate) async fn remove_network(
    State(app): State<Shared>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    work(&app, move |app| {
        networks::remove(app.paths(), &name)?;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}
