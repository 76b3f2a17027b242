//! What happens to machines and what they take: `docker events`, `stats`, `top`.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use skerry_engine::events::{Happened, Kind};
use skerry_engine::vms::{self, Registry, Usage, VmInfo, now};

use super::query::{Filters, date, filters, flag, has_label, moment};
use crate::error::ApiError;
use crate::follow::follow;
use crate::streams::body;
use crate::work::{Shared, work};

/// What a machine takes is looked at for so long.
const SPAN: Duration = Duration::from_secs(1);
const JSON: [(header::HeaderName, &str); 1] = [(header::CONTENT_TYPE, "application/json")];

#[derive(Debug, Deserialize)]
pub(super) struct EventsQuery {
    since: Option<String>,
    until: Option<String>,
    filters: Option<String>,
}

/// Docker's word for what an event is about.
fn about(kind: Kind) -> &'static str {
    match kind {
        Kind::Machine => "container",
        Kind::Image => "image",
    }
}

/// Refuses filters that nobody knows here.
fn check(filters: &Filters) -> Result<(), ApiError> {
    const KNOWN: [&str; 5] = ["type", "event", "container", "image", "label"];
    match filters.keys().find(|word| !KNOWN.contains(&word.as_str())) {
        None => Ok(()),
        Some(other) => Err(ApiError::invalid(format!(
            "Events can't be filtered by {other:?}: use type, event, container, image or label"
        ))),
    }
}

fn fits(event: &Happened, filters: &Filters) -> bool {
    let attribute = |name: &str| event.attributes.get(name);
    let is = |name: &str, value: &String| attribute(name) == Some(value);
    filters.iter().all(|(word, values)| {
        values.iter().any(|value| match word.as_str() {
            "type" => about(event.kind) == value,
            "event" => event.action == *value,
            "container" => {
                let id = value.len() >= 4 && event.id.starts_with(value.as_str());
                event.kind == Kind::Machine && (id || is("name", value))
            }
            "image" => match event.kind {
                Kind::Image => event.id == *value || is("name", value),
                Kind::Machine => is("image", value),
            },
            _ => has_label(&event.attributes, value),
        })
    })
}

fn told(event: &Happened) -> Value {
    const SECOND: u64 = 1_000_000_000;
    let from = event.attributes.get("image").cloned().unwrap_or_default();
    json!({
        "Type": about(event.kind),
        "Action": event.action,
        "Actor": { "ID": event.id, "Attributes": event.attributes },
        "scope": "local",
        "time": event.time / SECOND,
        "timeNano": event.time,
        "status": event.action,
        "id": event.id,
        "from": from,
    })
}

pub(super) async fn events(
    State(app): State<Shared>,
    Query(query): Query<EventsQuery>,
) -> Result<Response, ApiError> {
    let filters = filters(query.filters.as_deref())?;
    check(&filters)?;
    let since = moment(query.since.as_deref())?;
    let until = moment(query.until.as_deref())?;
    let tell = move |event: Happened| fits(&event, &filters).then(|| told(&event));
    let body = follow(&app, since, until, tell).await?;
    Ok((JSON, body).into_response())
}

#[derive(Debug, Deserialize)]
pub(super) struct StatsQuery {
    #[serde(default = "yes", deserialize_with = "flag")]
    stream: bool,
}

const fn yes() -> bool {
    true
}

/// What a machine's process and all processors have done, as clients compare it: sums of what was
/// seen, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    machine: u64,
    host: u64,
}

impl Sums {
    fn after(self, usage: &Usage, cpus: u64) -> Self {
        let span = SPAN.as_nanos() as f64;
        // Parts of a hundred of one processor.
        let machine = (usage.cpu_percent / 100.0 * span).max(0.0) as u64;
        Self {
            machine: self.machine.saturating_add(machine),
            host: self.host.saturating_add((span as u64).saturating_mul(cpus)),
        }
    }

    fn told(self, cpus: u64) -> Value {
        json!({
            "cpu_usage": {
                "total_usage": self.machine,
                "usage_in_kernelmode": 0,
                "usage_in_usermode": self.machine,
            },
            "system_cpu_usage": self.host,
            "online_cpus": cpus,
            "throttling_data": { "periods": 0, "throttled_periods": 0, "throttled_time": 0 },
        })
    }
}

fn cpus() -> u64 {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64)
}

fn sample(info: &VmInfo, usage: Option<&Usage>, before: Sums, after: Sums) -> Value {
    let cpus = cpus();
    // One that doesn't run takes nothing.
    let (resident, threads) = usage.map_or((0, 0), |usage| (usage.resident, usage.threads));
    let traffic = usage
        .and_then(|usage| usage.traffic.clone())
        .unwrap_or_default();
    let blocks = [
        ("read", traffic.block_read),
        ("write", traffic.block_written),
    ];
    let blocks =
        blocks.map(|(op, value)| json!({ "major": 0, "minor": 0, "op": op, "value": value }));
    json!({
        "id": info.config.id,
        "name": format!("/{}", info.config.name),
        "read": date(Some(now())),
        "preread": date(Some(now().saturating_sub(SPAN.as_nanos() as u64))),
        "num_procs": 0,
        "pids_stats": { "current": threads },
        "cpu_stats": after.told(cpus),
        "precpu_stats": before.told(cpus),
        "memory_stats": { "usage": resident, "limit": info.config.memory, "stats": {} },
        "blkio_stats": { "io_service_bytes_recursive": blocks },
        "storage_stats": {},
        "networks": {
            "eth0": { "rx_bytes": traffic.network_received, "tx_bytes": traffic.network_sent },
        },
    })
}

pub(super) async fn stats(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(StatsQuery { stream }): Query<StatsQuery>,
) -> Result<Response, ApiError> {
    let (registry, info) = work(&app, move |app| {
        let registry = app.registry()?;
        let info = registry.find(&id)?;
        Ok((registry, info))
    })
    .await?;
    let (out, body) = body();
    tokio::task::spawn_blocking(move || {
        let mut sums = Sums::default();
        while !out.is_closed() {
            let usage = look(&registry, &info);
            let after = usage
                .as_ref()
                .map_or(sums, |usage| sums.after(usage, cpus()));
            let sent = out.send_line(&sample(&info, usage.as_ref(), sums, after));
            sums = after;
            if sent.is_err() || !stream {
                return;
            }
        }
    });
    Ok((JSON, body).into_response())
}

/// What a machine takes, after as long as it is looked at; nothing of one that doesn't run now.
fn look(registry: &Registry, info: &VmInfo) -> Option<Usage> {
    let Ok(info) = registry.find(&info.config.id) else {
        std::thread::sleep(SPAN);
        return None;
    };
    vms::usage(registry, &[info], SPAN).pop()
}

#[derive(Debug, Deserialize)]
pub(super) struct TopQuery {
    ps_args: Option<String>,
}

pub(super) async fn top(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(TopQuery { ps_args }): Query<TopQuery>,
) -> Result<Json<Value>, ApiError> {
    if let Some(other) = ps_args.filter(|args| !["", "-ef"].contains(&args.as_str())) {
        return Err(ApiError::invalid(format!(
            "The guest's agent lists processes, and not ps: leave {other} out"
        )));
    }
    work(&app, move |app| {
        let processes = vms::processes(&app.registry()?, &id)?;
        let rows = processes.iter().map(|process| {
            let seconds = process.cpu_ms / 1000;
            let time = format!(
                "{:02}:{:02}:{:02}",
                seconds / 3600,
                seconds / 60 % 60,
                seconds % 60
            );
            [
                process.user.to_string(),
                process.pid.to_string(),
                process.parent.to_string(),
                process.state.to_string(),
                time,
                process.command.clone(),
            ]
        });
        let rows: Vec<[String; 6]> = rows.collect();
        let titles = ["UID", "PID", "PPID", "STAT", "TIME", "CMD"];
        Ok(Json(json!({ "Titles": titles, "Processes": rows })))
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn event() -> Happened {
        Happened {
            time: 1_700_000_000_500_000_000,
            kind: Kind::Machine,
            action: "start".to_owned(),
            id: "abcdef012345".to_owned(),
            attributes: BTreeMap::from([
                ("name".to_owned(), "web".to_owned()),
                ("image".to_owned(), "demo".to_owned()),
                ("tier".to_owned(), "front".to_owned()),
            ]),
        }
    }

    #[test]
    fn events_are_dockers_and_filtered_as_there() {
        let told = told(&event());
        assert_eq!(
            (&told["Type"], &told["time"]),
            (&json!("container"), &json!(1_700_000_000))
        );
        let of = |text: &str| filters(Some(text)).map_err(|_| ()).expect("filters");
        for good in [
            r#"{"type":["container"],"event":["stop","start"]}"#,
            r#"{"container":["web"]}"#,
            r#"{"container":["abcdef"]}"#,
            r#"{"image":["demo"],"label":["tier=front"]}"#,
            r#"{"label":["tier"]}"#,
            "{}",
        ] {
            assert!(fits(&event(), &of(good)), "{good}");
        }
        for bad in [
            r#"{"type":["image"]}"#,
            r#"{"event":["stop"]}"#,
            r#"{"container":["we"]}"#,
            r#"{"label":["tier=back"]}"#,
        ] {
            assert!(!fits(&event(), &of(bad)), "{bad}");
        }
        assert!(check(&of(r#"{"daemon":["x"]}"#)).is_err());
    }

    #[test]
    fn a_client_computes_the_share_that_was_seen() {
        let usage = Usage {
            id: String::new(),
            name: String::new(),
            cpu_percent: 150.0,
            resident: 1,
            memory: 2,
            threads: 3,
            cpu_seconds: 0.0,
            traffic: None,
        };
        let before = Sums::default();
        let after = before.after(&usage, 4);
        let share = after.machine as f64 / after.host as f64 * 4.0 * 100.0;
        assert!((share - 150.0).abs() < 0.01, "{share}");
    }
}
