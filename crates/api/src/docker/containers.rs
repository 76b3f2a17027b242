//! Machines, as docker's clients know containers.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use skerry_engine::dates;
use skerry_engine::network::Published;
use skerry_engine::vms::{self, Line, Registry, RestartPolicy, Status, Stream, VmConfig, VmInfo};

use super::query::{Filters, date, filters, flag, has_label, moment};
use super::reaper::{self, Until, is_brief};
use crate::error::ApiError;
use crate::native::Log;
use crate::streams::{Kind, Wire, body, content_type};
use crate::work::{App, Shared, work};

/// Docker's word for a state.
fn word(status: Status) -> &'static str {
    match status {
        Status::Created => "created",
        Status::Starting | Status::Running | Status::Ready => "running",
        Status::Paused => "paused",
        Status::Stopped | Status::Failed => "exited",
    }
}

/// What people read in `docker ps`.
fn phrase(info: &VmInfo) -> String {
    let since = |at: Option<u64>| {
        let at = Duration::from_nanos(at.unwrap_or(info.config.created));
        let age = SystemTime::UNIX_EPOCH + at;
        let age = SystemTime::now().duration_since(age).unwrap_or_default();
        dates::ago(age)
    };
    let up = || {
        let since = since(info.state.started);
        let span = since.strip_suffix(" ago").unwrap_or("Less than a second");
        format!("Up {span}")
    };
    match info.state.status {
        Status::Created => "Created".to_owned(),
        Status::Starting | Status::Running => up(),
        Status::Ready => up() + " (healthy)",
        Status::Paused => up() + " (Paused)",
        Status::Stopped | Status::Failed => {
            let code = info.state.exit_code.unwrap_or_default();
            format!("Exited ({code}) {}", since(info.state.finished))
        }
    }
}

/// The published ports of a machine that runs; of another one there are none.
fn ports(registry: &Registry, info: &VmInfo) -> Vec<Published> {
    match info.state.status {
        status if !status.is_alive() || status == Status::Starting => Vec::new(),
        // It may end at any moment.
        _ => vms::network(registry, &info.config.id).map_or_else(|_| Vec::new(), |net| net.ports),
    }
}

fn fits(info: &VmInfo, filters: &Filters) -> Result<bool, ApiError> {
    let config = &info.config;
    for (word_of, values) in filters {
        let fits = |value: &String| match word_of.as_str() {
            "id" => Ok(config.id.starts_with(value.as_str())),
            "name" => Ok(config.name.contains(value.trim_start_matches('/'))),
            "status" => Ok(word(info.state.status) == value),
            "ancestor" => Ok(config.image == *value),
            "label" => Ok(has_label(&config.labels, value)),
            "exited" => {
                Ok(info.state.exit_code.map(|code| code.to_string()).as_ref() == Some(value))
            }
            other => Err(ApiError::invalid(format!(
                "Machines can't be filtered by {other:?}: use id, name, status, label, ancestor or exited"
            ))),
        };
        let mut one = false;
        for value in values {
            one |= fits(value)?;
        }
        if !one {
            return Ok(false);
        }
    }
    Ok(true)
}

#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    #[serde(default, deserialize_with = "flag")]
    all: bool,
    limit: Option<i64>,
    filters: Option<String>,
}

pub(super) async fn list(
    State(app): State<Shared>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Vec<Value>>, ApiError> {
    work(&app, move |app| {
        let filters = filters(query.filters.as_deref())?;
        let registry = app.registry()?;
        let limit = usize::try_from(query.limit.unwrap_or(0)).unwrap_or(0);
        let every = query.all || limit > 0 || filters.contains_key("status");
        let mut rows = Vec::new();
        for info in registry.list()? {
            if (every || info.state.status.is_alive()) && fits(&info, &filters)? {
                rows.push(row(&registry, &info));
            }
            if limit > 0 && rows.len() == limit {
                break;
            }
        }
        Ok(Json(rows))
    })
    .await
}

/// All machines.
pub(super) async fn all(State(app): State<Shared>) -> Result<Json<Vec<Value>>, ApiError> {
    work(&app, |app| {
        let registry = app.registry()?;
        let infos = registry.list()?;
        Ok(Json(
            infos.iter().map(|info| row(&registry, info)).collect(),
        ))
    })
    .await
}

/// Forgets the machines that don't run.
pub(super) async fn prune(
    State(app): State<Shared>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Value>, ApiError> {
    work(&app, move |app| {
        let filters = filters(query.filters.as_deref())?;
        if let Some(other) = filters.keys().find(|word| *word != "label") {
            return Err(ApiError::invalid(format!(
                "Machines can't be pruned by {other:?}: use label"
            )));
        }
        let registry = app.registry()?;
        let mut removed = Vec::new();
        for info in registry.list()? {
            if !info.state.status.is_alive() && fits(&info, &filters)? {
                vms::remove(&registry, &info.config.id, false)?;
                removed.push(info.config.id);
            }
        }
        // What their disks took is not counted.
        Ok(Json(
            json!({ "ContainersDeleted": removed, "SpaceReclaimed": 0 }),
        ))
    })
    .await
}

fn row(registry: &Registry, info: &VmInfo) -> Value {
    let config = &info.config;
    let ports: Vec<Value> = ports(registry, info)
        .iter()
        .map(|port| {
            json!({
                "IP": port.host.ip(),
                "PrivatePort": port.guest,
                "PublicPort": port.host.port(),
                "Type": port.protocol.to_string(),
            })
        })
        .collect();
    json!({
        "Id": config.id,
        "Names": [format!("/{}", config.name)],
        "Image": config.image,
        "ImageID": config.digest.as_ref().unwrap_or(&config.image),
        "Command": config.command.join(" "),
        "Created": config.created / 1_000_000_000,
        "Ports": ports,
        "Labels": config.labels,
        "State": word(info.state.status),
        "Status": phrase(info),
        "HostConfig": { "NetworkMode": "default" },
        "NetworkSettings": { "Networks": {} },
        "Mounts": [],
    })
}

pub(super) async fn inspect(
    State(app): State<Shared>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    work(&app, move |app| {
        let registry = app.registry()?;
        let info = registry.find(&id)?;
        Ok(Json(details(&registry, &info)))
    })
    .await
}

fn details(registry: &Registry, info: &VmInfo) -> Value {
    let VmInfo { config, state } = info;
    let alive = state.status.is_alive();
    let mut bound: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for port in ports(registry, info) {
        let name = format!("{}/{}", port.guest, port.protocol);
        bound.entry(name).or_default().push(json!({
            "HostIp": port.host.ip().to_string(),
            "HostPort": port.host.port().to_string(),
        }));
    }
    let (path, args) = match config.command.split_first() {
        Some((path, args)) => (path.as_str(), args),
        None => ("", &[][..]),
    };
    json!({
        "Id": config.id,
        "Created": date(Some(config.created)),
        "Path": path,
        "Args": args,
        "State": {
            "Status": word(state.status),
            "Running": alive,
            "Paused": state.status == Status::Paused,
            "Restarting": false,
            "OOMKilled": false,
            "Dead": false,
            "Pid": if alive { state.pid } else { 0 },
            "ExitCode": state.exit_code.unwrap_or(0),
            "Error": state.error.as_deref().unwrap_or_default(),
            "StartedAt": date(state.started),
            "FinishedAt": date(state.finished),
        },
        "Image": config.digest.as_ref().unwrap_or(&config.image),
        "Name": format!("/{}", config.name),
        "RestartCount": state.restarts,
        "Driver": "erofs",
        "Platform": "linux",
        "Mounts": [],
        "Config": container_config(config),
        "HostConfig": {
            "NetworkMode": "default",
            "AutoRemove": is_brief(config),
            "Memory": config.memory,
            "NanoCpus": config.nano_cpus.unwrap_or(u64::from(config.cpus) * 1_000_000_000),
            "PidsLimit": config.pids_limit,
            "StorageOpt": config.disk_size.map(|size| json!({ "size": size.to_string() })),
            "PortBindings": bound,
            "RestartPolicy": restart_policy(config.restart),
            "LogConfig": { "Type": "json-file", "Config": {} },
        },
        "NetworkSettings": { "Ports": bound, "Networks": {} },
    })
}

fn restart_policy(policy: RestartPolicy) -> Value {
    let (name, most) = match policy {
        RestartPolicy::No => ("no", None),
        RestartPolicy::OnFailure(most) => ("on-failure", most),
        RestartPolicy::Always => ("always", None),
        RestartPolicy::UnlessStopped => ("unless-stopped", None),
    };
    json!({ "Name": name, "MaximumRetryCount": most.unwrap_or(0) })
}

fn container_config(config: &VmConfig) -> Value {
    let surroundings = &config.surroundings;
    json!({
        "Hostname": "skerry",
        "User": surroundings.user,
        "Tty": config.tty,
        "OpenStdin": false,
        "AttachStdin": false,
        "AttachStdout": !config.detached,
        "AttachStderr": !config.detached,
        "StdinOnce": false,
        "Env": surroundings.env,
        "Cmd": config.command,
        "Image": config.image,
        "WorkingDir": surroundings.working_dir,
        "Entrypoint": null,
        "Labels": config.labels,
    })
}

/// Does what has no answer but its status.
async fn simply(
    app: &Shared,
    act: impl FnOnce(&App) -> Result<(), ApiError> + Send + 'static,
) -> Result<StatusCode, ApiError> {
    work(app, act).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Deserialize)]
pub(super) struct StopQuery {
    t: Option<i64>,
}

pub(super) async fn stop(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(StopQuery { t }): Query<StopQuery>,
) -> Result<StatusCode, ApiError> {
    work(&app, move |app| {
        const TEN_SECONDS: u64 = 10;
        let registry = app.registry()?;
        if !registry.find(&id)?.state.status.is_alive() {
            return Ok(StatusCode::NOT_MODIFIED);
        }
        // Fewer than none is for ever.
        let grace = match t {
            None => Duration::from_secs(TEN_SECONDS),
            Some(seconds) => u64::try_from(seconds).map_or(Duration::MAX, Duration::from_secs),
        };
        vms::stop(&registry, &id, grace)?;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

#[derive(Debug, Deserialize)]
pub(super) struct KillQuery {
    signal: Option<String>,
}

pub(super) async fn kill(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(KillQuery { signal }): Query<KillQuery>,
) -> Result<StatusCode, ApiError> {
    const SIGKILL: u8 = 9;
    let signal = match signal.filter(|name| !name.is_empty()) {
        None => SIGKILL,
        Some(name) => skerry_engine::signals::parse(&name).map_err(ApiError::invalid)?,
    };
    simply(&app, move |app| {
        Ok(vms::signal(&app.registry()?, &id, signal)?)
    })
    .await
}

pub(super) async fn pause(
    State(app): State<Shared>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    simply(&app, move |app| Ok(vms::pause(&app.registry()?, &id)?)).await
}

pub(super) async fn unpause(
    State(app): State<Shared>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    simply(&app, move |app| Ok(vms::unpause(&app.registry()?, &id)?)).await
}

#[derive(Debug, Deserialize)]
pub(super) struct RenameQuery {
    name: String,
}

pub(super) async fn rename(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(RenameQuery { name }): Query<RenameQuery>,
) -> Result<StatusCode, ApiError> {
    simply(&app, move |app| {
        Ok(vms::rename(&app.registry()?, &id, &name)?)
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
    Path(id): Path<String>,
    Query(RemoveQuery { force }): Query<RemoveQuery>,
) -> Result<StatusCode, ApiError> {
    simply(&app, move |app| {
        Ok(vms::remove(&app.registry()?, &id, force)?)
    })
    .await
}

#[derive(Debug, Deserialize)]
pub(super) struct WaitQuery {
    condition: Option<String>,
}

/// Waits for a machine's end, or until it is forgotten.
pub(super) async fn wait(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(WaitQuery { condition }): Query<WaitQuery>,
) -> Result<Response, ApiError> {
    let until = match condition.as_deref() {
        None | Some("" | "not-running") => Until::NotRunning,
        Some("next-exit") => Until::NextExit,
        Some("removed") => Until::Removed,
        Some(other) => {
            return Err(ApiError::invalid(format!(
                "A machine can't be waited for to be {other:?}: use not-running, next-exit or removed"
            )));
        }
    };
    let before = work(&app, move |app| Ok(app.registry()?.find(&id)?)).await?;
    // The client starts the machine once it has the answer's head.
    let (out, body) = body();
    tokio::task::spawn_blocking(move || {
        let id = &before.config.id;
        let waited = reaper::wait(&app, id, &before, until, || out.is_closed());
        let answer = match waited {
            Ok(code) => json!({ "StatusCode": code }),
            Err(error) => json!({
                "StatusCode": 125,
                "Error": { "Message": crate::error::chain(&error) },
            }),
        };
        let _ = out.send_line(&answer);
    });
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

#[derive(Debug, Deserialize)]
pub(super) struct LogsQuery {
    #[serde(default, deserialize_with = "flag")]
    follow: bool,
    #[serde(default, deserialize_with = "flag")]
    stdout: bool,
    #[serde(default, deserialize_with = "flag")]
    stderr: bool,
    #[serde(default, deserialize_with = "flag")]
    timestamps: bool,
    #[serde(default, deserialize_with = "flag")]
    details: bool,
    tail: Option<String>,
    since: Option<String>,
    until: Option<String>,
}

pub(super) async fn logs(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(query): Query<LogsQuery>,
) -> Result<Response, ApiError> {
    if !(query.stdout || query.stderr) {
        return Err(ApiError::invalid(
            "Neither stdout nor stderr was asked for: choose one",
        ));
    }
    if query.details {
        return Err(ApiError::invalid("Logs have no details: leave them out"));
    }
    let tail = match query.tail.as_deref() {
        None | Some("" | "all") => None,
        Some(count) => Some(
            count
                .parse()
                .map_err(|_| ApiError::invalid(format!("{count:?} is no number of lines")))?,
        ),
    };
    let (since, until) = (
        moment(query.since.as_deref())?,
        moment(query.until.as_deref())?,
    );
    let (log, tty) = work(&app, move |app| {
        let tty = app.registry()?.find(&id)?.config.tty;
        Ok((Log::open(app, &id, query.follow, tail)?, tty))
    })
    .await?;
    let (out, body) = body();
    tokio::task::spawn_blocking(move || {
        let wanted = |line: &Line| {
            let stream = match line.stream {
                Stream::Stdout => query.stdout,
                Stream::Stderr => query.stderr,
            };
            stream
                && since.is_none_or(|since| line.time >= since)
                && until.is_none_or(|until| line.time <= until)
        };
        let shared = Arc::new(Mutex::new(out.clone()));
        let each = |line: &Line| match wanted(line) {
            true => write_line(&shared, line, tty, query.timestamps),
            false => Ok(()),
        };
        // A client that has gone wants no more.
        let _ = log.read(each, || out.is_closed());
    });
    Ok(([(header::CONTENT_TYPE, content_type(tty))], body).into_response())
}

/// Sends a line of a log as docker's clients want it.
fn write_line<W: io::Write>(
    out: &Arc<Mutex<W>>,
    line: &Line,
    tty: bool,
    timestamps: bool,
) -> io::Result<()> {
    let kind = match line.stream {
        Stream::Stdout => Kind::Stdout,
        Stream::Stderr => Kind::Stderr,
    };
    let mut text = Vec::new();
    if timestamps {
        text.extend(date(Some(line.time)).bytes());
        text.push(b' ');
    }
    text.extend(line.bytes());
    let mut wire = Wire {
        out: out.clone(),
        kind: (!tty).then_some(kind),
    };
    io::Write::write_all(&mut wire, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_filters_are_read() {
        let of = |text| filters(Some(text)).map_err(|_| ());
        let expected = Filters::from([("name".to_owned(), vec!["web".to_owned()])]);
        assert_eq!(of(r#"{"name":["web"]}"#), Ok(expected.clone()));
        assert_eq!(of(r#"{"name":{"web":true,"no":false}}"#), Ok(expected));
        assert_eq!(of(""), Ok(Filters::new()));
        assert_eq!(of("[1]"), Err(()));
    }
}
