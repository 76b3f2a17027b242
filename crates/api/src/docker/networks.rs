//! Networks between machines: `docker network`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use skerry_engine::EngineError;
use skerry_engine::network::IpNet;
use skerry_engine::networks::{self, NetworkInfo, NetworkPlan};

use super::create::Fields;
use super::query::{FilterQuery, Filters, date, filters, has_label};
use crate::error::ApiError;
use crate::work::{App, Shared, work};

/// The fewest digits of an identity that stand for it.
const DIGITS: usize = 4;

fn fits(info: &NetworkInfo, filters: &Filters) -> Result<bool, ApiError> {
    let config = &info.config;
    for (word, values) in filters {
        let one = |value: &String| match word.as_str() {
            "name" => Ok(config.name.contains(value.as_str())),
            "id" => Ok(config.id.starts_with(value.as_str())),
            "driver" => Ok(value == "bridge"),
            "scope" => Ok(value == "local"),
            "type" => Ok(value == "custom"),
            "label" => Ok(has_label(&config.labels, value)),
            other => Err(ApiError::invalid(format!(
                "Networks can't be filtered by {other:?}: use name, id, driver, scope, type or label"
            ))),
        };
        let mut any = false;
        for value in values {
            any |= one(value)?;
        }
        if !any {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The network of a name, or of an identity's first digits.
fn find(app: &App, name: &str) -> Result<NetworkInfo, ApiError> {
    let all = networks::list(app.paths())?;
    let mut named = all.iter().filter(|info| info.config.name == name);
    if let Some(found) = named.next() {
        return Ok(found.clone());
    }
    let mut of = all
        .into_iter()
        .filter(|info| info.config.id.starts_with(name));
    match (of.next(), of.next()) {
        (Some(found), None) if name.len() >= DIGITS => Ok(found),
        _ => {
            let name = name.to_owned();
            Err(EngineError::NoSuchNetwork { name }.into())
        }
    }
}

fn described(app: &App, info: &NetworkInfo) -> Result<Value, ApiError> {
    let config = &info.config;
    let mut pools = vec![json!({
        "Subnet": config.subnet.to_string(),
        "Gateway": config.gateway().to_string(),
    })];
    if let Some(subnet) = config.subnet6 {
        let gateway = config.gateway6().map(|gateway| gateway.to_string());
        pools.push(json!({ "Subnet": subnet.to_string(), "Gateway": gateway }));
    }
    let mut members = Map::new();
    if !info.members.is_empty() {
        let machines = app.registry()?.list()?;
        for member in &info.members {
            let of = |machine: &&skerry_engine::vms::VmInfo| {
                machine.state.status.is_alive() && machine.state.pid == member.pid
            };
            // One of a pool's is in no list.
            let Some(machine) = machines.iter().find(of) else {
                continue;
            };
            let v6 = member.address6.zip(config.subnet6);
            let v6 = v6.map(|(address, net)| format!("{address}/{}", net.prefix_len()));
            let described = json!({
                "Name": machine.config.name,
                "EndpointID": "",
                "MacAddress": "",
                "IPv4Address": format!("{}/{}", member.address, config.subnet.prefix_len()),
                "IPv6Address": v6.unwrap_or_default(),
            });
            members.insert(machine.config.id.clone(), described);
        }
    }
    Ok(json!({
        "Name": config.name,
        "Id": config.id,
        "Created": date(Some(config.created)),
        "Scope": "local",
        "Driver": "bridge",
        "EnableIPv4": true,
        "EnableIPv6": config.subnet6.is_some(),
        "IPAM": { "Driver": "default", "Options": null, "Config": pools },
        "Internal": config.internal,
        "Attachable": false,
        "Ingress": false,
        "ConfigFrom": { "Network": "" },
        "ConfigOnly": false,
        "Containers": members,
        "Options": {},
        "Labels": config.labels,
    }))
}

pub(super) async fn list(
    State(app): State<Shared>,
    Query(FilterQuery { filters: text }): Query<FilterQuery>,
) -> Result<Json<Vec<Value>>, ApiError> {
    work(&app, move |app| {
        let filters = filters(text.as_deref())?;
        let mut rows = Vec::new();
        for info in networks::list(app.paths())? {
            if fits(&info, &filters)? {
                rows.push(described(app, &info)?);
            }
        }
        Ok(Json(rows))
    })
    .await
}

pub(super) async fn inspect(
    State(app): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    work(&app, move |app| {
        Ok(Json(described(app, &find(app, &name)?)?))
    })
    .await
}

pub(super) async fn remove(
    State(app): State<Shared>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    work(&app, move |app| {
        networks::remove(app.paths(), &find(app, &name)?.config.name)?;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

pub(super) async fn prune(
    State(app): State<Shared>,
    Query(FilterQuery { filters: text }): Query<FilterQuery>,
) -> Result<Json<Value>, ApiError> {
    work(&app, move |app| {
        if let Some((word, _)) = filters(text.as_deref())?.first_key_value() {
            return Err(ApiError::invalid(format!(
                "All networks without machines are removed: leave the filter {word} out"
            )));
        }
        let removed = networks::prune(app.paths())?;
        Ok(Json(json!({ "NetworksDeleted": removed })))
    })
    .await
}

/// A machine's card is there from its start, and its networks with it.
pub(super) async fn connect(Path(name): Path<String>) -> ApiError {
    ApiError::new(
        StatusCode::NOT_IMPLEMENTED,
        format!(
            "A machine can't join or leave {name} while it exists: make it with --network {name}, or without"
        ),
    )
}

pub(super) async fn create(
    State(app): State<Shared>,
    Json(body): Json<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let (name, plan) = plan(body)?;
    work(&app, move |app| {
        let made = networks::create(app.paths(), &name, plan)?;
        let answer = json!({ "Id": made.id, "Warning": "" });
        Ok((StatusCode::CREATED, Json(answer)))
    })
    .await
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Pool {
    subnet: String,
    gateway: String,
    #[serde(rename = "IPRange")]
    range: String,
    auxiliary_addresses: BTreeMap<String, String>,
}

/// What a client wants.
fn plan(body: Value) -> Result<(String, NetworkPlan), ApiError> {
    let mut fields = Fields::of("", body)?;
    let name: String = fields.take("Name")?;
    let driver: String = fields.take("Driver")?;
    if !["", "bridge", "default"].contains(&driver.as_str()) {
        return Err(ApiError::invalid(format!(
            "Networks of machines are made by Skerry itself: leave the driver {driver} out"
        )));
    }
    let ipv6: Option<bool> = fields.take("EnableIPv6")?;
    if fields.take::<Option<bool>>("EnableIPv4")? == Some(false) {
        return Err(ApiError::invalid(
            "Networks of machines have IPv4: leave EnableIPv4 out",
        ));
    }
    let mut plan = NetworkPlan {
        ipv6,
        internal: fields.take("Internal")?,
        labels: fields.take("Labels")?,
        ..NetworkPlan::default()
    };
    let mut ipam = Fields::of("IPAM.", fields.take("IPAM")?)?;
    let driver: String = ipam.take("Driver")?;
    if !["", "default"].contains(&driver.as_str()) {
        return Err(ApiError::invalid(format!(
            "Addresses are given by Skerry itself: leave IPAM.Driver {driver} out"
        )));
    }
    for pool in ipam.take::<Vec<Pool>>("Config")? {
        add(&mut plan, &pool)?;
    }
    ipam.end()?;
    // Names are always looked at; scopes are those of swarms.
    fields.ignore(&["CheckDuplicate", "Scope"]);
    fields.end()?;
    Ok((name, plan))
}

fn add(plan: &mut NetworkPlan, pool: &Pool) -> Result<(), ApiError> {
    if !pool.range.is_empty() || !pool.auxiliary_addresses.is_empty() {
        return Err(ApiError::invalid(
            "Machines get any address of a network: leave the IP range and further addresses out",
        ));
    }
    if !pool.subnet.is_empty() {
        let net: IpNet = pool.subnet.parse().map_err(|_| {
            ApiError::invalid(format!(
                "{:?} names no addresses: write 10.90.0.0/24",
                pool.subnet
            ))
        })?;
        plan.subnets.push(net);
    }
    let unclear = || ApiError::invalid(format!("{:?} is no gateway's address", pool.gateway));
    match pool.gateway.is_empty() {
        true => Ok(()),
        false => match pool.gateway.parse().map_err(|_| unclear())? {
            IpAddr::V4(gateway) => {
                let before: Option<Ipv4Addr> = plan.gateway.replace(gateway);
                before.map_or(Ok(()), |_| Err(unclear()))
            }
            IpAddr::V6(gateway) => Err(ApiError::invalid(format!(
                "The IPv6 gateway stands where the IPv4 one does: leave {gateway} out"
            ))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: Value) -> String {
        plan(body).map(drop).expect_err("refused").into_message()
    }

    #[test]
    fn what_clients_send_is_a_plan() {
        let (name, made) = plan(json!({
            "Name": "lab", "CheckDuplicate": true, "Driver": "bridge", "EnableIPv6": false,
            "IPAM": { "Driver": "default", "Options": {}, "Config": [
                { "Subnet": "10.90.0.0/24", "Gateway": "10.90.0.9" } ] },
            "Internal": true, "Attachable": false, "Ingress": false, "ConfigOnly": false,
            "ConfigFrom": { "Network": "" }, "Options": {}, "Labels": { "a": "b" },
        }))
        .map_err(ApiError::into_message)
        .expect("a plan");
        assert_eq!(name, "lab");
        assert_eq!(
            made.subnets,
            ["10.90.0.0/24".parse::<IpNet>().expect("a net")]
        );
        assert_eq!(made.gateway, Some(Ipv4Addr::new(10, 90, 0, 9)));
        assert!(made.internal && made.ipv6 == Some(false));
        assert_eq!(made.labels["a"], "b");
    }

    #[test]
    fn what_can_not_be_is_refused_by_name() {
        assert!(refused(json!({ "Name": "a", "Driver": "overlay" })).contains("overlay"));
        assert!(refused(json!({ "Name": "a", "Attachable": true })).contains("Attachable"));
        assert!(refused(json!({ "Name": "a", "Options": { "x": "y" } })).contains("Options"));
        let pool = |pool: Value| json!({ "Name": "a", "IPAM": { "Config": [pool] } });
        assert!(refused(pool(json!({ "Subnet": "x" }))).contains("\"x\""));
        assert!(refused(pool(json!({ "IPRange": "10.0.0.0/28" }))).contains("range"));
        assert!(refused(pool(json!({ "Gateway": "fd00::1" }))).contains("fd00::1"));
    }
}
